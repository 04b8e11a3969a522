"""Running a merge plan, tensor by tensor: on live weights, or from folder to folder.

Both ways use the same kernels, so their results are equal to the bit, whatever the shards are. Memory: two tensors of
each model and their results, and what the kernel needs (SLERP and LERP nothing; an SVD a few fp32 copies).
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import clbench
from clbench import seeds
from clbench.errors import ConfigError
from clbench.files import atomic_folder, write_json
from clbench.merge import kernels
from clbench.merge.plan import KEEP, Action, MergePlan
from clbench.merge.scores import sibling
from clbench.merge.tensors import (
    ShardWriter,
    TensorSource,
    beside_the_weights,
    check_compatible,
    layout_sha256,
    tensor_sha256,
    tokenizer_sha256,
)
from clbench.method import Weights

PLAN_FILE = "merge_plan.json"
STALE_SECONDS = 3600
MOMENT, ROW, COLUMN = "exp_avg_sq/", "exp_avg_sq_row/", "exp_avg_sq_column/"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What is merged."""

    tuned: TensorSource
    base: TensorSource
    others: tuple[TensorSource, ...] = ()
    """Other models that started from the base."""
    moments: TensorSource | None = None
    """Second moments of the tuned model as ``exp_avg_sq/NAME``, or what ``compress_moments`` makes of them."""
    other_moments: tuple[TensorSource, ...] = ()
    """Those of the other models, in their order."""

    @property
    def models(self) -> tuple[TensorSource, ...]:
        """Tuned, base and others."""
        return self.tuned, self.base, *self.others

    @property
    def experts(self) -> tuple[TensorSource, ...]:
        """Tuned and others."""
        return self.tuned, *self.others

    def moments_of(self, expert: int) -> TensorSource | None:
        """Return the second moments of an expert, 0 is the tuned model."""
        known = (self.moments, *self.other_moments)
        return known[expert] if expert < len(known) else None


@dataclass(frozen=True)
class Prepared:
    """A plan that has been checked against its sources."""

    sources: Sources
    actions: dict[str, Action]
    tied: dict[str, str]

    def compute(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return one merged tensor; it may be the tuned model's own, or written to ``out``."""
        info, name = self.sources.tuned.layout[name], self.tied.get(name, name)
        return apply(self.actions[name] if info.is_merged else KEEP, name, self.sources, out)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor of every model."""
        for model in self.sources.models:
            for one in {name, self.tied.get(name, name)}:
                model.done(one)
        for one in around(name, self.actions[name]).values():
            self.sources.tuned.done(one)
        for expert in range(len(self.sources.experts)):
            moments = self.sources.moments_of(expert)
            if moments is not None and MOMENT + name in moments.layout:
                moments.done(MOMENT + name)


def prepare(plan: MergePlan, sources: Sources, *, mixed_dtypes: bool = False) -> Prepared:
    """Check everything that can be checked before a weight is merged.

    Raises:
        ConfigError: the models do not fit each other, or the plan does not fit them.
    """
    tied = check_compatible(sources.models, mixed_dtypes=mixed_dtypes)
    layout = sources.tuned.layout
    if not layout:
        raise ConfigError(f"{sources.tuned.name} has no weights", mend="give a model")
    actions = plan.actions({name: len(info.shape) for name, info in layout.items()})
    actions |= {copy: actions[name] for copy, name in tied.items()}
    for name in [name for name in layout if name not in tied]:
        _check_action(name, actions[name], sources)
    return Prepared(sources, actions, tied)


def _check_action(name: str, action: Action, sources: Sources) -> None:
    n_models = 1 + len(sources.others)
    weights = action.options.get("weights")
    if isinstance(weights, list | tuple) and len(weights) != n_models:
        mend = "give one for the tuned and each other model"
        raise ConfigError(f"{action.kernel} has {len(weights)} weights for {n_models} models ({name})", mend=mend)
    if action.kernel == "ties" and weights is None and n_models > 1:
        raise ConfigError("ties of several models needs weights", mend="give one for the tuned and each other model")
    if (action.kernel == "nuslerp" and n_models != 2) or (action.kernel == "model_stock" and n_models < 2):
        raise ConfigError(f"{action.kernel} needs another tuned model", mend="give one, or use lerp")
    if action.kernel == "neighbours":
        _check_neighbours(name, action, sources)
    if action.kernel == "mean":
        shares = action.options["shares"]
        if isinstance(shares, list | tuple) and len(shares) != 1 + n_models:
            mend = "give base, tuned and each other one"
            raise ConfigError(f"mean has {len(shares)} shares for {1 + n_models} models ({name})", mend=mend)
    if action.kernel in ("graft", "ota") and sources.tuned.layout[name].is_merged:
        for expert in range(n_models if action.kernel == "ota" else 1):
            _moment_place(name, sources, expert)


def _check_neighbours(name: str, action: Action, sources: Sources) -> None:
    layout, found = sources.tuned.layout, around(name, action)
    if not found:
        raise ConfigError(f"neighbours of {name} are not named", mend="give below, above or both")
    for other in found.values():
        if other not in layout or layout[other].shape != layout[name].shape:
            raise ConfigError(f"{sources.tuned.name} has no {other} like {name}", mend="name a block of equal make")


def around(name: str, action: Action) -> dict[str, str]:
    """Return the tensors that ``neighbours`` reads besides: ``below`` and ``above``, those that its options name."""
    found = {side: action.options[side] for side in ("below", "above") if side in action.options}
    return {side: sibling(name, int(block)) for side, block in found.items() if isinstance(block, int | float)}


def apply(action: Action, name: str, sources: Sources, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the result of one action on one tensor."""
    options: dict[str, Any] = dict(action.options)
    w1 = sources.tuned.read(name)
    if action.kernel == "keep":
        return w1
    if action.kernel == "neighbours":
        near = {side: sources.tuned.read(other) for side, other in around(name, action).items()}
        return kernels.neighbours(w1, near.get("below"), near.get("above"), **_without(options, "below", "above"))
    w0 = sources.base.read(name).to(w1.device)
    if action.kernel in ("lerp", "slerp", "restore"):
        path = kernels.slerp if action.kernel == "slerp" else kernels.lerp
        return path(w1, w0, **(options or {"s": 1}), out=out)
    others = [one.read(name).to(w1.device) for one in sources.others]
    if action.kernel == "nuslerp":
        return kernels.nuslerp(w1, w0, others[0], **options)
    if action.kernel in ("task_arithmetic", "ties", "model_stock", "mean", "ota"):
        if action.kernel == "ota":
            options["moments"] = [read_moment(name, sources, n).to(w1.device) for n in range(1 + len(others))]
        several: Callable[..., torch.Tensor] = getattr(kernels, action.kernel)
        return several(w1, w0, others, **options)
    if action.kernel == "dare":
        options["seed"] = seeds.derive(options["seed"], "dare", name)
    if action.kernel == "graft":
        options["moment"] = read_moment(name, sources).to(w1.device)
    single: Callable[..., torch.Tensor] = getattr(kernels, action.kernel)
    return single(w1, w0, **options)


def _without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}


def _moment_place(name: str, sources: Sources, expert: int = 0) -> str:
    moments = sources.moments_of(expert)
    if moments is None:
        model = sources.experts[expert].name
        raise ConfigError(f"this merge needs Adam's second moments of {model}", mend="give the moments of every expert")
    layout, shape = moments.layout, sources.tuned.layout[name].shape
    if MOMENT + name in layout:
        found = layout[MOMENT + name].shape
    elif ROW + name in layout and COLUMN + name in layout:
        found = layout[ROW + name].shape + layout[COLUMN + name].shape
    else:
        raise ConfigError(f"{moments.name} has no second moments of {name}", mend="only AdamW keeps them")
    if found != shape:
        raise ConfigError(
            f"second moments of {name} have shape {found}, the weights {shape}", mend="give the same run's"
        )
    return MOMENT if MOMENT + name in layout else ROW


def read_moment(name: str, sources: Sources, expert: int = 0) -> torch.Tensor:
    """Return the second moments of a tensor, made from their row and column sums where only those are kept."""
    place, moments = _moment_place(name, sources, expert), sources.moments_of(expert)
    assert moments is not None
    if place == MOMENT:
        return moments.read(MOMENT + name)
    return kernels.moment_from_factors(moments.read(ROW + name), moments.read(COLUMN + name))


def compress_moments(moments: Weights) -> Weights:
    """Return second moments with matrices replaced by their row and column sums; other tensors are left out."""
    small: Weights = {}
    for key, moment in moments.items():
        name = key.removeprefix(MOMENT)
        if key.startswith(MOMENT) and moment.ndim == 2:
            small[ROW + name], small[COLUMN + name] = kernels.moment_factors(moment)
        elif key.startswith(MOMENT):
            small[key] = moment
    return small


def graft_threshold(sources: Sources, density: float, expert: int = 0) -> float:
    """Return the saliency threshold that leaves this share of an expert's weights tuned, over the whole model."""

    def stream() -> Iterator[torch.Tensor]:
        for name, info in sources.tuned.layout.items():
            if info.is_merged:
                w1, w0 = sources.experts[expert].read(name), sources.base.read(name)
                yield kernels.saliency(w1, w0.to(w1.device), read_moment(name, sources, expert).to(w1.device))
                for model in sources.models:
                    model.done(name)

    return kernels.threshold_of_density(stream, density)


# --- live weights -----------------------------------------------------------------------------------------------------


def run(plan: MergePlan, sources: Sources, *, mixed_dtypes: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, merged tensor) in the tuned model's order; checks come before the first.

    Tensors that are kept are the tuned model's own, not copies.

    Raises:
        ConfigError: the models do not fit each other, or the plan does not fit them.
    """
    prepared = prepare(plan, sources, mixed_dtypes=mixed_dtypes)
    return ((name, prepared.compute(name)) for name in sources.tuned.layout)


def merge_weights(plan: MergePlan, sources: Sources, *, mixed_dtypes: bool = False) -> Weights:
    """Return all merged tensors; see ``run``."""
    return dict(run(plan, sources, mixed_dtypes=mixed_dtypes))


# --- folders ----------------------------------------------------------------------------------------------------------


def merge_folder(
    plan: MergePlan,
    sources: Sources,
    out: Path,
    *,
    shard_bytes: int = 5_000_000_000,
    hash_inputs: bool = True,
    weights_sha256: Sequence[str] | None = None,
    mixed_dtypes: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the merged model as a Hugging Face folder, whole or not at all; returns what ``merge_plan.json`` says.

    Configuration and tokenizer are the tuned model's, and so are names, shapes and types of the weights.

    Args:
        plan: what is done.
        sources: models, as opened by ``open_source``.
        out: the folder to make.
        shard_bytes: the largest size of a shard.
        hash_inputs: note digests of all inputs; reads every tensor of every model.
        weights_sha256: those digests (``layout_sha256``), in the order of ``sources.models``, where they are known.
        mixed_dtypes: allow inputs of different floating types.
        overwrite: replace ``out`` where it exists.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: the models or the plan do not fit, or ``out`` is taken.
        ClbenchError: the disk is full or forbidden; nothing is half-written.
    """
    _check_out(out, sources, overwrite)
    prepared = prepare(plan, sources, mixed_dtypes=mixed_dtypes)
    remove_stale(out)
    with atomic_folder(out) as temporary:
        writer = ShardWriter(temporary, sources.tuned.layout, shard_bytes=shard_bytes)
        try:
            digests = _write_all(prepared, writer, hash_inputs and weights_sha256 is None, progress)
            writer.close()
        finally:
            writer.abort()
        if sources.tuned.folder is not None:
            for file in beside_the_weights(sources.tuned.folder):
                shutil.copyfile(file, temporary / file.name)
        known = list(weights_sha256 or map(_digest, sources.models, digests))
        note = _note(plan, prepared, known)
        write_json(temporary / PLAN_FILE, note)
    return note


def _check_out(out: Path, sources: Sources, overwrite: bool) -> None:
    for source in sources.models:
        if source.folder and out.resolve() in (source.folder.resolve(), *source.folder.resolve().parents):
            raise ConfigError(f"{source.name} is read from there", where=out, mend="choose another place")
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError("there is something already", where=out, mend="choose another place, or allow overwriting")


def remove_stale(out: Path) -> None:
    """Remove what killed merges to ``out`` left beside it: hidden folders that nothing was written to for an hour."""
    for left in out.parent.glob(f".{out.name}.*.tmp"):
        times = [path.stat().st_mtime for path in (left, *left.rglob("*"))]
        if left.is_dir() and time.time() - max(times) > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _write_all(
    prepared: Prepared, writer: ShardWriter, hash_inputs: bool, progress: Progress | None
) -> list[dict[str, str]]:
    """Write every tensor; returns the digests of the inputs' tensors, model by model."""
    flow = Flow(prepared, writer, hash_inputs=hash_inputs, progress=progress)
    with flow:
        for turn, name in enumerate(writer.order):
            flow.put(name, prepared.compute(name, flow.room(turn)))
    return flow.digests


class Flow:
    """Writes and hashes a tensor while the next one is computed; two are under way at most.

    Results are computed in two pieces of memory by turns: fresh memory for each costs as much as the arithmetic.
    """

    def __init__(
        self, prepared: Prepared, writer: ShardWriter, *, hash_inputs: bool, progress: Progress | None = None
    ) -> None:
        self.prepared, self.writer, self.progress = prepared, writer, progress
        self.models = prepared.sources.models
        self.hashed = self.models if hash_inputs else ()
        self.digests: list[dict[str, str]] = [{} for _ in self.models]
        self._layout = prepared.sources.tuned.layout
        infos = [self._layout[name] for name in writer.order]
        sizes = (max((i.n_bytes for i in infos[first::2] if i.is_merged), default=0) for first in (0, 1))
        self._rooms = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self._total, self._done = sum(info.n_bytes for info in infos), 0
        self._waiting: deque[tuple[str, Future[None], list[Future[str]]]] = deque()
        self._writing = ThreadPoolExecutor(max_workers=1)  # one: tensors stand in the file in their order
        self._hashing = ThreadPoolExecutor(max_workers=len(self.models))

    def __enter__(self) -> Flow:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._settle()
        finally:
            self._writing.shutdown(cancel_futures=True)
            self._hashing.shutdown(cancel_futures=True)

    def room(self, turn: int) -> torch.Tensor | None:
        """Return memory for the result of a turn, once what was there before is written; None where it is copied."""
        while len(self._waiting) > 1:
            self._settle()
        info = self._layout[self.writer.order[turn]]
        room = self._rooms[turn % 2]
        return room[: info.n_bytes].view(info.dtype).reshape(info.shape) if info.is_merged else None

    def put(self, name: str, result: torch.Tensor) -> None:
        """Begin to write a tensor, and to hash what it was made from."""
        hashes = [self._hashing.submit(tensor_sha256, model.read(name)) for model in self.hashed]
        self._waiting.append((name, self._writing.submit(self.writer.write, name, result), hashes))

    def _settle(self) -> None:
        name, written, hashes = self._waiting.popleft()
        written.result()
        for found, digest in zip(self.digests, hashes, strict=False):
            found[name] = digest.result()
        self.prepared.release(name)
        self._done += self._layout[name].n_bytes
        if self.progress:
            self.progress(self._done, self._total)


def _digest(source: TensorSource, digests: dict[str, str]) -> str | None:
    return layout_sha256(source, digests) if digests else None


def _note(plan: MergePlan, prepared: Prepared, digests: Sequence[str | None]) -> dict[str, Any]:
    """Return what was done, for ``merge_plan.json``; no paths of this machine."""
    sources, kernel_bytes = prepared.sources, dict[str, int]()
    for name, info in sources.tuned.layout.items():
        kernel = prepared.actions[name].kernel if info.is_merged else "keep"
        kernel_bytes[kernel] = kernel_bytes.get(kernel, 0) + info.n_bytes
    roles = ["tuned", "base", *(f"other_{n + 1}" for n in range(len(sources.others)))]
    inputs = {role: _input(*pair) for role, pair in zip(roles, zip(sources.models, digests, strict=True), strict=True)}
    note: dict[str, Any] = {"clbench": clbench.__version__, "plan_sha256": plan.sha256, "plan": plan.as_dict()}
    return note | {"inputs": inputs, "tied": prepared.tied, "bytes_by_kernel": dict(sorted(kernel_bytes.items()))}


def _input(source: TensorSource, digest: str | None) -> dict[str, Any]:
    return {
        "name": source.name,
        "weights_sha256": digest,
        "tokenizer_sha256": tokenizer_sha256(source.folder),
        "n_tensors": len(source.layout),
        "n_bytes": sum(info.n_bytes for info in source.layout.values()),
    }
