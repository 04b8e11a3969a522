"""A suite for tests of cells and health: three shards, answers that a weight decides, and faults on demand.

Its folder (option ``place``) holds ``log``, one line a measurement, and files that say what shall go wrong: ``kill-b``
(once: the process dies), ``crash-b`` (a defect), ``refuse-b`` (an error for people), ``slow`` (seconds).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clbench.errors import ConfigError
from clbench.files import digest_of
from clbench.suite import UNDATED, Checkpoint, Rows, Suite

N_ITEMS = 40


class Probe(Suite):
    """Shard ``a`` is right on as many of 40 questions as a weight says (``n_right``), ``b`` and ``c`` on 30."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Where its log is."""

        place: str

    name = "probe"
    needs_stream = False
    options: Options

    def sha256(self) -> str:
        return digest_of(self.name)

    def data_sha256(self) -> str:
        return digest_of("questions")

    def shard_sha256(self, shard: str) -> str:
        return digest_of(shard)

    def licences(self) -> dict[str, str]:
        return {"probe": "CC0-1.0 <b>"}

    def shards(self) -> list[str]:
        return ["a", "b", "c"]

    def measure(self, checkpoint: Checkpoint) -> Rows:
        return Rows.joined([self.measure_shard(checkpoint, shard) for shard in self.shards()])

    def measure_shard(self, checkpoint: Checkpoint, shard: str) -> Rows:
        place = Path(self.options.place)
        with (place / "begun").open("a", encoding="utf-8") as log:
            log.write(f"{shard}\n")
        if (place / "slow").exists():
            time.sleep(float((place / "slow").read_text()))
        if (place / f"kill-{shard}").exists():
            (place / f"kill-{shard}").unlink()
            os._exit(9)
        if (place / f"crash-{shard}").exists():
            raise ValueError("a defect\nof two lines")
        if (place / f"refuse-{shard}").exists():
            raise ConfigError("it cannot be asked", where=shard)
        with (place / "log").open("a", encoding="utf-8") as log:
            log.write(f"{shard} {checkpoint.weights_sha256[:8]} {os.getpid()}\n")
        return answers(shard, n_right(checkpoint) if shard == "a" else 30, known=checkpoint.tokenizer is not None)

    def shard_flops(self, checkpoint: Checkpoint, shard: str) -> float:
        return 1e6


def n_right(checkpoint: Checkpoint) -> int:
    """What the model's last norm says."""
    weights = dict(checkpoint.model.named_parameters())
    return round(weights["model.norm.weight"][0].item())


def answers(task: str, n: int, *, known: bool) -> Rows:
    """Rows ``acc`` and ``chance`` of 40 questions; none is right without a tokenizer."""
    value = (np.arange(N_ITEMS) < (n if known else 0)).astype(np.float64)
    n_rows = 2 * N_ITEMS
    return Rows(
        item=[f"q{i}" for i in range(N_ITEMS)] * 2,
        stage=np.full(n_rows, UNDATED),
        metric=["acc"] * N_ITEMS + ["chance"] * N_ITEMS,
        value=np.concatenate([value, np.full(N_ITEMS, 0.25)]),
        n_tokens=np.ones(n_rows, dtype=np.int64),
        n_bytes=np.ones(n_rows, dtype=np.int64),
        group=[f"task-{task}"] * n_rows,
        change=[""] * n_rows,
    )
