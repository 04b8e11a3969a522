"""A method at stage k cannot read stage k + 1: not through its context, nor through what that keeps to itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from clbench.errors import NeedError
from clbench.method import Batch, Context, Method, Need, Weights
from clbench.stream import Stream
from clbench.train.data import DataOrder
from tests.engine import run_tiny

LEAVES = (str, bytes, int, float, complex, bool, type(None), type, torch.device, torch.dtype)


def walk(start: Any, *, private: bool) -> Iterator[tuple[str, Any]]:
    """Yield every object that attributes, items and elements lead to, with the path; models count as one object."""
    seen: set[int] = set()
    kept: list[Any] = []  # a freed object's id may come again
    waiting: list[tuple[str, Any]] = [("ctx", start)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or isinstance(value, LEAVES):
            continue
        seen.add(id(value))
        kept.append(value)
        yield path, value
        if isinstance(value, (torch.nn.Module, torch.optim.Optimizer, torch.Tensor, np.ndarray, Path)):
            continue
        if isinstance(value, dict):
            waiting += [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, Iterator):
            continue
        waiting += [(f"{path}.{name}", item) for name, item in attributes(value, private=private)]


def attributes(value: Any, *, private: bool) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object that are not functions of its class."""
    for name in dir(value):
        if name.startswith("__") or (name.startswith("_") and not private):
            continue
        try:
            item = getattr(value, name)
        except Exception:  # a property that does not want to be read here
            continue
        if not callable(item) or dataclasses.is_dataclass(item):
            yield name, item


def read_everything(stream: Stream, stage: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every way to read a stage of a stream."""
    for split in ("train", "heldout"):
        yield "tokens", lambda split=split: stream.tokens(split, stage)
        yield "offsets", lambda split=split: stream.offsets(split, stage)
        yield "counts", lambda split=split: stream.counts(split, stage)
        yield "documents", lambda split=split: stream.documents(split, stage)
        yield "batches", lambda split=split: next(stream.document_batches(split, stage))
        yield "files", lambda split=split: stream.document_files(split, stage)
    yield "until", lambda: stream.until(stage)
    yield "manifest", lambda: stream.manifest["stages"][stage]
    yield "stages", lambda: stream.stages()[stage]
    yield "order", lambda: DataOrder(stream, {stage: 1.0}, n_tokens=9, length=4, batch_rows=2, seed=0, stage=stage)


class Curious(Method):
    """Looks through its context at every seam."""

    needs = frozenset(Need)
    looked: ClassVar[dict[str, int]] = {}

    def look(self, seam: str, ctx: Context) -> None:
        """Hold what can be reached to the rules."""
        key = f"{seam}, stage {ctx.stage.index}"
        if key in self.looked:
            return
        self.looked[key] = 0
        for path, value in walk(ctx, private=False):
            assert not isinstance(value, (Stream, DataOrder, np.ndarray, Path)), path
        later = range(ctx.stage.index + 1, ctx.stage.n_stages)
        for path, value in walk(ctx, private=True):
            if not isinstance(value, Stream):
                continue
            self.looked[key] += 1
            value.tokens("train", ctx.stage.index)
            for stage in later:
                for name, read in read_everything(value, stage):
                    with pytest.raises((NeedError, IndexError)):
                        pytest.fail(f"{path} gives {name} of stage {stage}: {read()!r}")
        for stage in later:
            with pytest.raises(NeedError, match="have happened"):
                next(iter(ctx.batches(stage, n_rows=1, name="peek")))

    def begin_stage(self, ctx: Context) -> None:
        self.look("begin_stage", ctx)

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> None:
        self.look("extra_loss", ctx)

    def edit_gradients(self, ctx: Context) -> None:
        self.look("edit_gradients", ctx)

    def after_step(self, ctx: Context) -> None:
        self.look("after_step", ctx)

    def end_stage(self, ctx: Context) -> None:
        next(iter(ctx.batches(ctx.stage.index, n_rows=1, name="now")))
        self.look("end_stage", ctx)

    def release(self, ctx: Context, weights: Weights) -> Weights:
        self.look("release", ctx)
        return weights


@pytest.mark.parametrize("batching", ["packed", "rows"])
def test_no_seam_leads_to_text_that_comes_later(tmp_path: Path, batching: str) -> None:
    Curious.looked = {}
    store = run_tiny(tmp_path, [Curious()], batching=batching)
    n_stages = len(store.config()["stages"])
    seams = ("begin_stage", "extra_loss", "edit_gradients", "after_step", "end_stage", "release")
    stages = sorted({int(key.rpartition(" ")[2]) for key in Curious.looked})
    assert n_stages > 2
    assert stages == list(range(1, n_stages))
    # The stream is found in every context's own parts, so the check above was not about nothing.
    assert Curious.looked == {f"{seam}, stage {k}": 1 for k in stages for seam in seams}
