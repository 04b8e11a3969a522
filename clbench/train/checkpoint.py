"""Resume states: atomic folders of safetensors and JSON, each with its own manifest.

A state is everything that the rest of a run depends on: weights, Adam's moments, method state, position, bill. Two
are kept; when the newest is damaged the one before it is used and that is said.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clbench.errors import ClbenchError, IntegrityError
from clbench.files import atomic_folder, read_json, sha256_file, write_json
from clbench.method import Weights
from clbench.train.models import save_file

FORMAT = 1
KEPT = 2


@dataclass
class TrainState:
    """Where a run stands.

    ``position`` is (stage, steps done, whether the stage's end was reached), the steps of a decay branch among them;
    tensors are on the CPU after loading.
    """

    stage: int
    step: int
    ended: bool
    weights: Weights
    optimizer: Weights = field(default_factory=dict)
    method_tensors: Weights = field(default_factory=dict)
    method_values: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)
    aside: Weights = field(default_factory=dict)
    """What a decay branch has put aside, see clbench.train.branch."""
    aside_values: list[dict[str, Any]] = field(default_factory=list)

    @property
    def position(self) -> tuple[int, int, bool]:
        """Return what orders states in time."""
        return self.stage, self.step, self.ended


def save(folder: Path, state: TrainState) -> Path:
    """Write a state below ``folder`` and remove all but the newest ones; returns its place."""
    path = folder / f"{state.stage:03d}-{state.step:08d}-{int(state.ended)}"
    with atomic_folder(path) as temporary:
        for name in ("weights", "optimizer", "method_tensors", *(["aside"] if state.aside else [])):
            save_file(getattr(state, name), temporary / f"{name}.safetensors")
        values = {
            "stage": state.stage,
            "step": state.step,
            "ended": state.ended,
            "method_values": state.method_values,
            "ledger": state.ledger,
            "aside_values": state.aside_values,
        }
        write_json(temporary / "state.json", values)
        digests = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", {"format": FORMAT, "files": digests})
    for old in saved(folder)[:-KEPT]:
        shutil.rmtree(old)
    return path


def saved(folder: Path) -> list[Path]:
    """Return the saved states, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*-[0-9]*-[01]") if path.is_dir())


def load(path: Path) -> TrainState:
    """Read one state.

    Raises:
        IntegrityError: a file is missing, or is not what the manifest says.
    """
    try:
        manifest = read_json(path / "manifest.json")
        for name, expected in manifest["files"].items():
            if not (path / name).is_file() or sha256_file(path / name) != expected:
                raise IntegrityError("a file of this checkpoint is damaged", where=path / name)
        values = read_json(path / "state.json")
        return TrainState(
            **values,
            weights=load_file(path / "weights.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            method_tensors=load_file(path / "method_tensors.safetensors"),
            aside=load_file(path / "aside.safetensors") if "aside.safetensors" in manifest["files"] else {},
        )
    except IntegrityError:
        raise
    except (ClbenchError, SafetensorError, KeyError, TypeError, OSError) as error:
        raise IntegrityError(f"this checkpoint cannot be read: {error}", where=path) from None


def load_latest(folder: Path, warn: Callable[[str], None]) -> TrainState | None:
    """Return the newest state that is whole, or None when there is none at all; newer damaged ones are removed.

    Raises:
        IntegrityError: states exist, but none is whole; nothing is removed.
    """
    damaged: list[tuple[Path, IntegrityError]] = []
    for path in reversed(saved(folder)):
        try:
            state = load(path)
        except IntegrityError as error:
            damaged.append((path, error))
            continue
        for bad, why in damaged:
            warn(f"{why}; going back to the checkpoint before it")
            shutil.rmtree(bad)
        return state
    if damaged:
        raise IntegrityError(
            f"no checkpoint of this run is whole: {damaged[0][1]}",
            where=folder,
            mend="delete this folder and run again: training begins anew",
        )
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]) -> Weights:
    """Return the optimizer's state as ``key/parameter name -> tensor`` (no copy)."""
    tensors: Weights = {}
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}/{name}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], tensors: Weights
) -> None:
    """Put back what ``optimizer_tensors`` returned."""
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        # Adam's step counter stays where its optimizer wants it: fused kernels keep it beside the parameter.
        optimizer.state[parameter][kind] = tensor.to(parameter.device)
