"""The oracle: joint training from scratch on all stages at a run's token count; the normaliser of regret, not a floor.

Its losses are frozen in the track file, so it is trained when a track is made and when somebody doubts it. Oracles of
earlier dates are trained here, too; what is made of a series of them stands in ``clbench.oracle_series``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from clbench import cells, console, registry
from clbench.base import before_the_first_stage, check_recipe, make_base, open_stream, train_from_scratch
from clbench.files import digest_of, exclusive, read_json, remove_leftovers, write_json, write_text
from clbench.home import bases_folder
from clbench.results.matrix import Unit, from_rows
from clbench.results.series import tokens_at
from clbench.results.store import RunStore, StepLine, utc_now
from clbench.run import hardware_for
from clbench.stream import Stream
from clbench.suite import Checkpoint
from clbench.track import Track
from clbench.train.ledger import Ledger
from clbench.train.models import load_model, save_model, weights_of, weights_sha256
from clbench.train.parallel import Hardware

ROW0_TOLERANCE_NATS = 0.05
"""How far another machine's base may lie from the frozen row 0; see docs/tracks.md for where it comes from."""
UNITS: tuple[Unit, ...] = ("nats_per_token", "bits_per_byte")


def train_oracle(name: str, *, seeds: Sequence[int], device: str = "auto", write: bool = False) -> dict[str, Any]:
    """Train the oracle of a track for several seeds and return what a track file freezes.

    Every stage gets an equal share of ``base.n_tokens + (T - 1) training.n_tokens_per_stage`` tokens; the recipe is the
    base's. Returns ``stream_sha256``, ``oracle`` and ``row0`` (measured on the base of this machine).
    """
    track = registry.load_track(name)
    check_recipe(track)
    stream = open_stream(track)
    hardware = hardware_for(track, stream, device)
    base = make_base(track, stream, hardware)
    last = len(stream.stages()) - 1
    n_tokens = tokens_at(last, n_initial=track.base.n_tokens, n_per_stage=track.training.n_tokens_per_stage)
    oracles = [make_oracle(track, stream, hardware, cutoff=last, seed=seed) for seed in seeds]
    losses = [_losses(track, stream, hardware, oracle.model_folder) for oracle in oracles]
    row0 = _losses(track, stream, hardware, base.model_folder)
    means = {unit: np.mean([loss[unit] for loss in losses], axis=0) for unit in UNITS}
    frozen: dict[str, Any] = {
        "stream_sha256": stream.sha256,
        "oracle": {
            "n_tokens": n_tokens,
            "seeds": list(seeds),
            **{unit: _rounded(means[unit]) for unit in UNITS},
            "command": f"clbench oracle {track.name} " + " ".join(f"--seed {seed}" for seed in seeds),
            "date": utc_now()[:10],
        },
        "row0": {**{unit: _rounded(row0[unit]) for unit in UNITS}, "tolerance_nats": ROW0_TOLERANCE_NATS},
    }
    if write:
        path = registry.track_path(name)
        write_text(path, with_frozen(path.read_text(encoding="utf-8"), frozen))
        console.say(f"written into {path}")
    return frozen


@dataclass(frozen=True)
class Oracle:
    """A trained oracle on this machine."""

    folder: Path
    ledger: Ledger

    @property
    def model_folder(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "model"

    def log(self) -> list[StepLine]:
        """Return its training log."""
        return RunStore(self.folder / "work").steps()


def make_oracle(track: Track, stream: Stream, hardware: Hardware, *, cutoff: int, seed: int) -> Oracle:
    """Train the oracle of a date, or return it when it is there; goes on after a kill.

    It is trained from scratch with the base's recipe on an equal share of every stage up to ``cutoff``, with as many
    tokens as a run has seen by then (TiC-LM), and cannot read what comes later. That of stage 0 is a base of another
    seed; with the base's own seed it is the base.
    """
    check_recipe(track)
    if cutoff == 0 and seed == track.base.seed:
        base = make_base(track, stream, hardware)
        return Oracle(base.folder, Ledger.from_dict(base.facts["ledger"]))
    past = stream.until(cutoff) if cutoff else before_the_first_stage(stream)
    n_tokens = tokens_at(cutoff, n_initial=track.base.n_tokens, n_per_stage=track.training.n_tokens_per_stage)
    parts = {
        "recipe": track.base_sha256(),
        "stream": past.sha256,
        "n_tokens": n_tokens,
        "seed": seed,
        "p": hardware.precision,
    }
    if cutoff < len(stream.stages()) - 1:  # tracks are frozen on the full oracle, whose address has none
        parts["cutoff"] = cutoff
    folder = bases_folder() / f"{track.name}-oracle-{digest_of(parts)[:12]}"
    with exclusive(folder, mend="wait until it has trained the oracle"):
        if not (folder / "oracle.json").is_file():
            remove_leftovers(folder)
            model, ledger, _ = train_from_scratch(
                track,
                past,
                hardware,
                work=folder / "work",
                title=f"oracle of {track.name} · to stage {cutoff} · seed {seed}",
                mixture=dict.fromkeys(range(cutoff + 1), 1 / (cutoff + 1)),
                n_tokens=n_tokens,
                seed=seed,
            )
            save_model(model, weights_of(model), folder / "model", tokenizer_folder=stream.tokenizer_folder)
            facts = {"seed": seed, "cutoff": cutoff, "n_tokens": n_tokens, "ledger": ledger.as_dict()}
            write_json(folder / "oracle.json", facts)
        shutil.rmtree(folder / "work" / "checkpoints", ignore_errors=True)
    return Oracle(folder, Ledger.from_dict(read_json(folder / "oracle.json")["ledger"]))


def _losses(track: Track, stream: Stream, hardware: Hardware, folder: Path) -> dict[str, NDArray[np.float64]]:
    model = load_model(folder).to(hardware.device).eval()
    checkpoint = Checkpoint(
        model=model, weights_sha256=weights_sha256(model), device=hardware.device, autocast_dtype=None
    )
    rows = cells.measure(registry.make_suite(track.suites[0], stream), checkpoint).rows
    return {unit: from_rows({0: rows}, unit=unit).values[0] for unit in UNITS}


def _rounded(values: NDArray[np.float64]) -> list[float]:
    assert all(math.isfinite(value) for value in values)
    return [round(float(value), 5) for value in values]


def with_frozen(text: str, frozen: dict[str, Any]) -> str:
    """Return a track file's text with the frozen blocks replaced; everything else keeps its comments.

    Top-level blocks are cut by indentation: a track file is our own, block-style YAML.
    """
    kept: list[str] = []
    skipping = False
    for line in text.splitlines():
        comment = line.startswith("#")
        if line and not line[0].isspace() and not comment:
            skipping = line.partition(":")[0] in frozen
        if comment or not skipping:
            kept.append(line)
    block = yaml.safe_dump(frozen, sort_keys=False, default_flow_style=None, width=110)
    return "\n".join(kept).rstrip() + "\n" + block
