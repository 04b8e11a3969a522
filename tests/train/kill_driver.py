"""Kills real runs with SIGKILL at chosen moments, resumes them, and prints what came out, as JSON.

Run as a process of its own: it imports the heavy libraries once and forks a child for every run, so that a child can
die for real. Usage: python -m tests.train.kill_driver FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import clbench.files
import clbench.train.checkpoint
from clbench import cells
from clbench.eval.heldout import Heldout
from clbench.method import Context, Method, Need, Weights
from clbench.results.store import RunStore
from tests.engine import prepare_tiny, run_tiny, tiny_track


def die() -> None:
    """Die as by kill -9: no handler, no clean-up, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


class Momentum(Method):
    """A method with state of every kind: tensors, JSON, noise of its own, and edits of gradients and weights."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self) -> None:
        super().__init__()
        self.mean: Weights = {}
        self.n_steps = 0

    def begin_stage(self, ctx: Context) -> None:
        self.mean = {name: p.detach().clone() for name, p in ctx.parameters()}

    def edit_gradients(self, ctx: Context) -> None:
        generator = torch.Generator().manual_seed(ctx.seed("noise"))
        for _, p in ctx.parameters():
            p.grad.add_(1e-3 * torch.randn(p.shape, generator=generator))  # type: ignore[union-attr]

    def after_step(self, ctx: Context) -> None:
        self.n_steps += 1
        for name, p in ctx.parameters():
            self.mean[name].lerp_(p.detach(), 0.2)

    def end_stage(self, ctx: Context) -> None:
        ctx.bill("average", flops=float(self.n_steps))

    def release(self, ctx: Context, weights: Weights) -> Weights:
        return {name: self.mean[name].cpu().clone() for name in weights}

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        return self.mean, {"n_steps": self.n_steps}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        self.mean, self.n_steps = dict(tensors), values["n_steps"]


def nth_call(n: int, real: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """Wrap a function so that the process dies at its n-th call, before or after it ran."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n and not after:
            die()
        result = real(*args, **kwargs)
        if calls == n and after:
            die()
        return result

    return wrapped


def patch(target: Any, name: str, n: int, *, after: bool = False) -> Callable[[], None]:
    """Return a trap to set in the child."""
    return lambda: setattr(target, name, nth_call(n, getattr(target, name), after=after))


TRAPS: dict[str, Callable[[], None]] = {
    "in the middle of a stage": patch(Momentum, "after_step", 5),
    "between two files of a checkpoint": patch(clbench.train.checkpoint, "save_file", 8),
    "before a checkpoint's manifest": patch(clbench.train.checkpoint, "write_json", 6),
    "before the last rename of a checkpoint": patch(clbench.files, "fsync", 25),
    "at the end of a stage": patch(Momentum, "end_stage", 2),
    "after the end of a stage, before it is measured": patch(Momentum, "release", 2),
    "inside evaluation": patch(Heldout, "measure", 3),
    "after evaluation, before its cell is written": patch(cells, "write_rows", 2),
    "between rows and record": patch(RunStore, "write_stage_record", 3),
    "after the record, before the bill": patch(RunStore, "write_ledger", 3),
    "while measuring the base": patch(Heldout, "measure", 1),
}


def outcome(store: RunStore) -> dict[str, Any]:
    """Return everything of a run that must be the same, whatever happened on the way."""
    ledger = store.ledger()
    return {
        "state": store.status()["state"],
        "weights": [store.stage_record(k)["weights_sha256"] for k in store.stages_done()],
        "rows": [clbench.files.sha256_file(p) for p in sorted((store.folder / "rows").glob("*.parquet"))],
        "release": [clbench.files.sha256_file(p) for p in sorted(store.folder.glob("release/*/model.safetensors"))],
        "tokens": ledger["tokens"],
        "flops": ledger["flops"],
        "steps": [(s["stage"], s["step"], s["loss_nats"], s["lr"], s["grad_norm"]) for s in store.steps()],
        "leftovers": [str(p) for p in store.folder.rglob(".*.tmp")],
    }


def child(work: Callable[[], None]) -> int:
    """Run something in a forked child; returns the signal that killed it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a child failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def scenario(folder: Path, trap: Callable[[], None] | None) -> dict[str, Any]:
    """Run with a trap until it dies, then again to the end, each in its own child with its own cells."""
    os.environ["CLBENCH_HOME"] = str(folder / "home")
    (folder / "home").mkdir(parents=True)
    for part in ("streams", "bases"):
        (folder / "home" / part).symlink_to(folder.parent / "shared" / part)

    def trapped() -> None:
        if trap is not None:
            trap()
        run_tiny(folder / "runs", [Momentum(), "replay"])

    killed_by = child(trapped)
    if killed_by:
        child(lambda: run_tiny(folder / "runs", [Momentum(), "replay"]) and None)
    store = RunStore.open(next((folder / "runs").rglob("run.yaml")).parent)
    return {"killed_by": killed_by, **outcome(store)}


def run_all(folder: Path) -> dict[str, Any]:
    """Return name -> outcome for the uninterrupted run and every trap."""
    torch.set_num_threads(1)
    os.environ["CLBENCH_HOME"] = str(folder / "shared")
    prepare_tiny(tiny_track())
    results = {"uninterrupted": scenario(folder / "uninterrupted", None)}
    for i, (name, trap) in enumerate(TRAPS.items()):
        results[name] = scenario(folder / f"trap-{i}", trap)
    return results


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_all(Path(sys.argv[1]))))
