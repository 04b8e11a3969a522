"""The oracle: joint training from scratch on all stages at a run's token count; the normaliser of regret, not a floor.

Its losses are frozen in the track file, so it is trained when a track is made and when somebody doubts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from clbench import cells, console, registry
from clbench.base import make_base, open_stream, train_from_scratch
from clbench.files import digest_of, exclusive, write_json, write_text
from clbench.home import bases_folder
from clbench.results.matrix import Unit, from_rows
from clbench.results.store import utc_now
from clbench.run import hardware_for
from clbench.stream import Stream
from clbench.suite import Checkpoint
from clbench.track import Track
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
    stream = open_stream(track)
    hardware = hardware_for(track, stream, device)
    base = make_base(track, stream, hardware)
    n_stages = len(stream.stages())
    n_tokens = track.base.n_tokens + (n_stages - 1) * track.training.n_tokens_per_stage
    folders = [_make(track, stream, hardware, n_tokens=n_tokens, seed=seed) for seed in seeds]
    losses = [_losses(track, stream, hardware, folder) for folder in folders]
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


def _make(track: Track, stream: Stream, hardware: Hardware, *, n_tokens: int, seed: int) -> Path:
    address = digest_of(
        {
            "recipe": track.base_sha256(),
            "stream": stream.sha256,
            "n_tokens": n_tokens,
            "seed": seed,
            "p": hardware.precision,
        }
    )
    folder = bases_folder() / f"{track.name}-oracle-{address[:12]}"
    with exclusive(folder, mend="wait until it has trained the oracle"):
        if (folder / "oracle.json").is_file():
            return folder / "model"
        model, ledger, _ = train_from_scratch(
            track,
            stream,
            hardware,
            work=folder / "work",
            title=f"oracle of {track.name} · seed {seed}",
            mixture=dict.fromkeys(range(len(stream.stages())), 1 / len(stream.stages())),
            n_tokens=n_tokens,
            seed=seed,
        )
        save_model(model, weights_of(model), folder / "model", tokenizer_folder=stream.tokenizer_folder)
        write_json(folder / "oracle.json", {"seed": seed, "n_tokens": n_tokens, "ledger": ledger.as_dict()})
    return folder / "model"


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
