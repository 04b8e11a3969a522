"""Complete, plausible run folders without training anything: for tests of metrics, pages and the MLflow sink.

The losses follow a small formula (see ``stage_loss``), so a test can know the right answer. Documents (ids,
groups, change kinds, token and byte counts, difficulty) depend on the stage alone: they are the same for all
methods and seeds. Half of each stage's documents come back in the next stage under the same id.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clbench.files import digest_of
from clbench.results.store import ROWS_SCHEMA, RunStore, StepLine
from clbench.seeds import generator

FORGETTING = {"sequential": 0.6, "replay:fraction=1/2": 0.15, "frozen": 0.0}
"""Loss in nats per token that a method adds to a period long after it was trained, where none is given."""
OLD_SHARE = {"replay:fraction=1/2": 0.5}
"""Share of a stage's tokens that comes from earlier stages."""
TOKENS_PER_STAGE = 200_000
STEPS_PER_STAGE = 20
N_PARAMETERS = 1_000_000
GROUPS = ("numpy", "sqlalchemy", "django")


def stage_loss(row: int, column: int, *, frozen: bool, drift: float, forgetting: float) -> float:
    """Return the loss in nats per token of a typical document of period ``column`` after stage ``row``.

    floor(i) + drift * (i - k) for a future period, + forgetting * (1 - exp(i - k)) for a past one.
    """
    distance = column - (0 if frozen else row)
    floor = 2.5 + 0.1 * math.sin(column)
    return floor + (drift * distance if distance >= 0 else forgetting * (1 - math.exp(distance)))


def documents(stage: int, n_documents: int = 40) -> dict[str, Any]:
    """Return the held-out documents of one stage as columns; ``difficulty`` multiplies the loss."""
    first = stage * (n_documents // 2)
    numbers = range(first, first + n_documents)
    rng = generator("synthetic", "documents", stage)
    n_tokens = rng.integers(20, 400, n_documents)
    old = [stage > 0 and number < first + n_documents // 2 for number in numbers]
    return {
        "item": [f"{GROUPS[number % 3]}/page-{number:04d}" for number in numbers],
        "group": [GROUPS[number % 3] for number in numbers],
        "change": [
            ("unchanged" if number % 2 else "changed") if o else "new" for number, o in zip(numbers, old, strict=True)
        ],
        "n_tokens": n_tokens,
        "n_bytes": n_tokens * 4 + rng.integers(0, 20, n_documents),
        "difficulty": np.exp(0.1 * rng.standard_normal(n_documents)),
    }


def rows_table(
    row: int, *, method: str, seed: int, n_stages: int, n_documents: int, drift: float, forgetting: float
) -> pa.Table:
    """Return the rows of suite ``heldout`` under the release weights after stage ``row``."""
    frozen = method == "frozen" or row == 0
    noise = generator("synthetic", "noise", *(("base",) if frozen else (method, seed, row)))
    tables = []
    for stage in range(n_stages):
        docs = documents(stage, n_documents)
        level = (
            stage_loss(row, stage, frozen=frozen, drift=drift, forgetting=forgetting) + 0.01 * noise.standard_normal()
        )
        nats_per_token = level * docs["difficulty"] + 0.02 * noise.standard_normal(n_documents)
        columns = {
            "item": docs["item"],
            "stage": [stage] * n_documents,
            "metric": ["nll_nats"] * n_documents,
            "value": nats_per_token * docs["n_tokens"],
            "n_tokens": docs["n_tokens"],
            "n_bytes": docs["n_bytes"],
            "group": docs["group"],
            "change": docs["change"],
        }
        tables.append(pa.table(columns, schema=ROWS_SCHEMA))
    return pa.concat_tables(tables)


def pooled(rows: pa.Table, n_stages: int) -> dict[str, list[float]]:
    """Return ``nats_per_token`` and ``bits_per_byte`` per period, plainly summed."""
    sums = {stage: [0.0, 0, 0] for stage in range(n_stages)}
    for row in rows.to_pylist():
        for place, key in enumerate(("value", "n_tokens", "n_bytes")):
            sums[row["stage"]][place] += row[key]
    return {
        "nats_per_token": [nll / tokens for nll, tokens, _ in sums.values()],
        "bits_per_byte": [nll / math.log(2) / n_bytes for nll, _, n_bytes in sums.values()],
    }


def track_dict(name: str, *, n_stages: int, n_documents: int, drift: float, oracle: bool) -> dict[str, Any]:
    """Return the copy of the track that stands in run.yaml; its oracle lies 0.03 nats above the floor."""
    shape = {"n_stages": n_stages, "n_documents": n_documents, "drift": drift, "forgetting": 0.0}
    row0 = pooled(rows_table(0, method="frozen", seed=0, **shape), n_stages)
    best = [rows_table(stage, method="oracle", seed=0, **shape) for stage in range(n_stages)]
    losses = [pooled(table, n_stages) for table in best]
    track: dict[str, Any] = {
        "name": name,
        "version": 1,
        "stream": "synthetic",
        "stream_sha256": digest_of(["synthetic", n_stages, n_documents]),
        "description": "Losses from a formula; nothing was trained.",
        "seeds": [0, 1, 2],
        "oracle": {
            "n_tokens": TOKENS_PER_STAGE * n_stages,
            "seeds": [0],
            "nats_per_token": [loss["nats_per_token"][i] + 0.03 for i, loss in enumerate(losses)],
            "bits_per_byte": [loss["bits_per_byte"][i] + 0.01 for i, loss in enumerate(losses)],
            "command": f"clbench oracle {name}",
            "date": "2026-01-02",
        }
        if oracle
        else None,
        "row0": {**row0, "tolerance_nats": 0.01},
    }
    return {**track, "sha256": digest_of(track)}


def config_dict(track: dict[str, Any], method: str, seed: int, n_stages: int) -> dict[str, Any]:
    """Return a whole run.yaml."""
    name, _, options = method.partition(":")
    settings = dict(pair.split("=", 1) for pair in options.split(",") if pair)
    config: dict[str, Any] = {
        "track": track,
        "stages": [
            {"index": i, "name": str(2010 + i), "start": f"{2010 + i}-01-01", "end": f"{2010 + i}-12-31"}
            for i in range(n_stages)
        ],
        "method": {"label": method, "components": [{"name": name, "options": settings}]},
        "seed": seed,
        "base": {"weights_sha256": digest_of(["base", track["name"]]), "n_parameters": N_PARAMETERS},
        "training": {
            "tokens_per_stage": TOKENS_PER_STAGE,
            "batch_size": 16,
            "sequence_length": 256,
            "lr": 0.001,
        },
    }
    facts = {
        "environment": {
            "python": "3.11.0",
            "torch": "2.6.0",
            "platform": "Linux-x86_64",
            "device": "cpu",
            "precision": "fp32",
            "n_threads": 2,
            "clbench": "0.1.0",
        },
        "command": f"clbench run {track['name']} -m {method} --seed {seed}",
    }
    return {"format": 1, "run_id": digest_of(config), **config, **facts}


def ledger_dict(method: str, n_stages: int, n_rows: int) -> dict[str, Any]:
    """Return the bill of a finished run."""
    tokens: dict[str, dict[str, int]] = {}
    for stage in range(1, n_rows):
        old = int(TOKENS_PER_STAGE * OLD_SHARE.get(method, 0.0)) // stage * stage
        sources = {str(source): old // stage for source in range(stage) if old}
        tokens[str(stage)] = {} if method == "frozen" else {**sources, str(stage): TOKENS_PER_STAGE - old}
    n_trained = sum(n for sources in tokens.values() for n in sources.values())
    return {
        "tokens": tokens,
        "flops": {
            "train": 6.0 * N_PARAMETERS * n_trained,
            "evaluate": 2.0 * N_PARAMETERS * 8_000 * n_stages * n_rows,
        },
        "seconds": {"train": n_trained / 20_000, "evaluate": 2.5 * n_rows, "checkpoint": 0.5 * n_rows},
        "peak_memory_bytes": 500_000_000 + 1_000_000 * len(method),
        "stored_bytes": {"method_state": 0, "replay_data": 800_000 if method in OLD_SHARE else 0},
    }


def step_lines(method: str, seed: int, stage: int) -> list[StepLine]:
    """Return the training log of one stage."""
    noise = generator("synthetic", "steps", method, seed, stage)
    per_step = TOKENS_PER_STAGE // STEPS_PER_STAGE
    return [
        StepLine(
            stage=stage,
            step=step,
            loss_nats=2.6 + 0.4 * math.exp(-step / 5) + 0.02 * float(noise.standard_normal()),
            lr=0.0005 * (1 + math.cos(math.pi * step / STEPS_PER_STAGE)),
            grad_norm=1.0 + 0.1 * float(noise.random()),
            n_tokens=per_step * step,
            tokens_per_second=20_000.0 + float(noise.integers(1_000)),
            memory_bytes=450_000_000,
            cpu_percent=190.0,
            time=f"2026-01-0{1 + seed % 9}T{stage % 24:02d}:00:{step % 60:02d}Z",
        )
        for step in range(1, STEPS_PER_STAGE + 1)
    ]


def write_run(
    folder: Path,
    *,
    method: str = "sequential",
    seed: int = 0,
    n_stages: int = 4,
    n_documents: int = 40,
    drift: float = 0.15,
    forgetting: float | None = None,
    oracle: bool = True,
    track: str = "synthetic",
    n_rows: int | None = None,
    state: str = "done",
) -> RunStore:
    """Write one run folder and return its store.

    Args:
        folder: the folder of this seed; made if missing.
        method: the label; ``frozen`` keeps the base, others take their forgetting from ``FORGETTING``.
        seed: changes the noise of every trained row (row 0 and ``frozen`` are the same for all seeds).
        n_stages: stages 0..n_stages-1.
        n_documents: held-out documents per stage.
        drift: loss added per stage of distance to a future period, nats per token.
        forgetting: loss added to a period long past, nats per token.
        oracle: whether the track has one.
        track: its name; another name gives another digest.
        n_rows: how many matrix rows are complete; all unless given.
        state: of status.json.
    """
    store = RunStore(folder)
    n_rows = n_stages if n_rows is None else n_rows
    forgetting = FORGETTING.get(method, 0.3) if forgetting is None else forgetting
    protocol = track_dict(track, n_stages=n_stages, n_documents=n_documents, drift=drift, oracle=oracle)
    shape = {"n_stages": n_stages, "n_documents": n_documents, "drift": drift, "forgetting": forgetting}
    store.write_config(config_dict(protocol, method, seed, n_stages))
    for row in range(n_rows):
        store.write_rows("heldout", row, rows_table(row, method=method, seed=seed, **shape))
        trained = row > 0 and method != "frozen"
        if trained:
            store.append_steps(step_lines(method, seed, row))
        weights = digest_of([method, seed, row] if trained else ["base", track])
        store.write_stage_record(
            {
                "stage": row,
                "weights_sha256": weights,
                "cells": {"heldout": digest_of([weights, protocol["stream_sha256"]])},
                "finished": f"2026-01-0{1 + seed % 9}T{row % 24:02d}:30:00Z",
                "n_steps": STEPS_PER_STAGE if trained else 0,
            }
        )
    store.write_ledger(ledger_dict(method, n_stages, n_rows))
    store.write_status(state)
    return store
