"""The weights behind the rows of a run: release weights, the base, or checkpoints that were trained elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clbench.audit import track_of
from clbench.base import open_base
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.results.store import RunStore
from clbench.run import hardware_for
from clbench.stream import Stream
from clbench.train.models import load_model, weights_sha256

BASE = 0
OUTSIDE = "checkpoints"
"""Name of the component that ``clbench evaluate`` writes into run.yaml."""


@dataclass(frozen=True)
class Release:
    """The weights of one row, checked against the digest that was measured."""

    model: torch.nn.Module
    weights_sha256: str
    tokenizer: Any = None
    """None: the model reads the stream's own token ids."""
    tokenizer_sha256: str = ""


def release_folder(store: RunStore, stage: int) -> Path:
    """Return where a stage's release weights lie, if they are kept."""
    return store.folder / "release" / f"stage-{stage:02d}"


def release_of(store: RunStore, stage: int, stream: Stream, device: str) -> Release:
    """Return the weights of one row of a run's matrix.

    Raises:
        NotFoundError: they are not kept.
        IntegrityError: they are not those that were measured.
    """
    expected = store.stage_record(stage)["weights_sha256"]
    folder = release_folder(store, stage)
    tokenizer, tokenizer_sha256 = None, ""
    if folder.is_dir():
        model = load_model(folder)
    elif (path := outside_paths(store).get(stage)) is not None:
        from clbench.outside import outside_tokenizer

        model = load_model(path)
        tokenizer, tokenizer_sha256 = outside_tokenizer(path, stream)
    elif stage == BASE:
        track = track_of(store)
        model = open_base(track, stream, hardware_for(track, stream, device)).load()
    else:
        raise NotFoundError("the release weights are not kept", where=folder, mend="run it again, or choose a stage")
    if weights_sha256(model) != expected:
        mend = "run `clbench prepare` where the run was made" if stage == BASE else "delete the run and run again"
        raise IntegrityError("these are not the weights that the run measured", where=f"stage {stage}", mend=mend)
    return Release(model, expected, tokenizer, tokenizer_sha256)


def outside_paths(store: RunStore) -> dict[int, str]:
    """Return stage -> folder or hub id of checkpoints that were trained elsewhere; empty for our own runs."""
    components: list[dict[str, Any]] = store.config()["method"].get("components", [])
    paths: dict[str, str] = next((one["options"]["paths"] for one in components if one.get("name") == OUTSIDE), {})
    return {int(stage): str(path) for stage, path in paths.items()}


def stages_with_weights(store: RunStore, wanted: Sequence[int] | None = None) -> list[int]:
    """Return the finished stages whose weights are here, the base among them; or those asked for.

    Raises:
        ConfigError: one that is asked for is not finished, or there is none.
    """
    done, outside = store.stages_done(), outside_paths(store)
    if wanted:
        for stage in wanted:
            if stage not in done:
                there = f"{done[0]} to {done[-1]}" if done else "none"
                raise ConfigError(f"no row after stage {stage}", where=store.folder, mend=f"finished stages: {there}")
        return sorted(set(wanted))
    found = [k for k in done if k == BASE or k in outside or release_folder(store, k).is_dir()]
    if not found:
        raise ConfigError("no finished stage with weights here", where=store.folder, mend="finish the run first")
    return found
