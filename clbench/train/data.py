"""Which tokens are in which batch: a pure function of (stream, seed, stage, step).

Resuming therefore needs one integer, and the number of processes does not change a batch. Shapes: B rows, T positions.
What a row holds is the batching: *packed* cuts a stage's tokens every T targets, across documents; *rows* gives each
document rows of its own, so that short documents make more steps of fewer tokens.

What a row may not hold: text of excluded documents, and the control rows, where a method steers by them. A *pool*
bounds how much of a source is drawn from: what this run drew first when that source was the current stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from clbench import seeds
from clbench.errors import ConfigError
from clbench.stream import Stream, identity_of

Batching = Literal["packed", "rows"]

IGNORE = -100
"""Target of a position that is not trained on (torch's convention)."""
CONTROL_ROWS = 64
"""Rows of every stage that are kept back from training when a method needs control data, at most a tenth of it."""


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch on the training device: int64, shape ``[B, T]``; targets are IGNORE after a row's end."""

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    n_targets: int
    n_targets_by_source: dict[int, int]
    source_B: torch.Tensor
    """Source stage of every row, int64, shape ``[B]``."""
    first_row: int
    """Place of the first row in the order that the batch is from."""


def allocate(n_tokens: int, mixture: Mapping[int, float]) -> dict[int, int]:
    """Split a token budget by shares, exactly, by largest remainder; ties go to the later stage."""
    exact = {stage: n_tokens * share for stage, share in mixture.items() if share > 0}
    whole = {stage: int(tokens) for stage, tokens in exact.items()}
    missing = n_tokens - sum(whole.values())
    by_remainder = sorted(exact, key=lambda stage: (exact[stage] - whole[stage], stage), reverse=True)
    for stage in by_remainder[:missing]:
        whole[stage] += 1
    return {stage: tokens for stage, tokens in sorted(whole.items()) if tokens}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which rows of each source may be drawn, and how; the default is all of them, shuffled.

    See ``clbench.method.StagePlan`` for pools and excluded documents.
    """

    pools: Mapping[int, int] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    keeps_control: bool = False
    """Whether control rows are kept back."""
    in_sequence: bool = False
    """Rows of one source stay in the order of its pool; only the sources are mixed."""
    drawn: Mapping[int, int] = field(default_factory=dict)
    """Source -> rows that were drawn from it before, with ``in_sequence``; it goes on after them."""


class DataOrder:
    """The rows of one stage in training order.

    Each source stage's tokens are cut into chunks of at most ``length`` targets, within documents when batching is
    ``rows``; a permutation that depends on (stream, seed, stage, source, epoch) says which come first; the last chunk
    is cut so that the budget is met to the token; one more permutation mixes the sources. Two methods with the same
    seed see the same new text in the same order. With ``n_rows`` the budget is rows instead, and no chunk is cut.

    Args:
        stream: the built stream.
        mixture: source stage -> share of ``n_tokens``, or of ``n_rows``.
        n_tokens: target tokens in all.
        length: targets per row.
        batch_rows: rows per optimizer step.
        seed: the run's seed.
        stage: index of the stage being trained.
        name: separates draws that must not coincide (training, a Fisher pass …).
        batching: packed, or one document a row.
        n_rows: takes the place of ``n_tokens``: so many rows, whatever tokens they hold.
        draw: which rows may be drawn.

    Raises:
        ConfigError: a source has nothing to train on.
    """

    def __init__(
        self,
        stream: Stream,
        mixture: Mapping[int, float],
        *,
        n_tokens: int,
        length: int,
        batch_rows: int,
        seed: int,
        stage: int,
        name: str = "train",
        batching: Batching = "packed",
        n_rows: int | None = None,
        draw: Draw | None = None,
    ) -> None:
        self.length, self.batch_rows = length, batch_rows
        draw = draw or Draw()
        quota = allocate(n_tokens if n_rows is None else n_rows, mixture)
        # As plain arrays: a slice of numpy's memmap class costs three times as much.
        self.tokens = {source: np.asarray(stream.tokens("train", source)) for source in quota}
        self._windows = {s: sliding_window_view(t, length + 1) for s, t in self.tokens.items() if len(t) > length}
        key = (stream.sha256, seed, name, stage)
        parts = []
        for source, wanted in quota.items():
            shelf = Shelf(stream, source, length=length, seed=seed, batching=batching)
            free = shelf.free(draw)
            if not len(shelf.start) or (free is not None and not free.any()):
                left = " that may be drawn" if len(shelf.start) else ""
                raise ConfigError(f"stage {source} has no training text{left}", mend="leave it out of the mixture")
            skip = draw.drawn.get(source, 0)
            parts.append(shelf.choose(wanted, (*key, source), free=free, skip=skip, count_rows=n_rows is not None))
        mix = seeds.permutation(sum(len(start) for start, _ in parts), *key, "mix", *chain(*sorted(draw.drawn.items())))
        sources = np.repeat(np.array([*quota], np.int16), [len(start) for start, _ in parts])
        if draw.in_sequence:  # the places are mixed, every source fills its own in order
            mix = np.argsort(np.argsort(sources[mix], kind="stable"), kind="stable")
        self.source = sources[mix]
        """Source stage of every row, shape ``[n_rows]``."""
        self.start = np.concatenate([start for start, _ in parts])[mix]
        """First token of every row."""
        self.n_targets = np.concatenate([n for _, n in parts])[mix]
        """Targets of every row."""

    @property
    def n_steps(self) -> int:
        """Optimizer steps that use up the budget; the last may be smaller."""
        return -(-len(self.start) // self.batch_rows)

    def micro_batches(
        self, step: int, *, micro_rows: int | None, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> list[TokenBatch]:
        """Return one process's share of the batch of one step, cut into micro-batches of at most ``micro_rows`` rows.

        The shares of ranks 0, 1 … one after another are the batch, whatever the number of processes. A share of a
        batch with fewer rows than processes may be empty.
        """
        first, end = step * self.batch_rows, min((step + 1) * self.batch_rows, len(self.start))
        first, end = (first + (end - first) * r // world_size for r in (rank, rank + 1))
        size = micro_rows or max(1, end - first)
        return [self.read(slice(i, min(i + size, end)), device) for i in range(first, end, size)]

    def read(self, rows: slice, device: torch.device) -> TokenBatch:
        """Return some rows, by their places in this order."""
        start, n = self.start[rows], self.n_targets[rows]
        sources = self.source[rows].tolist()
        source_B = torch.tensor(sources, dtype=torch.int64, device=device)
        n_by_source = dict.fromkeys(sources, int(n.sum()))
        if len(n_by_source) > 1:
            n_by_source = {s: int(n[self.source[rows] == s].sum()) for s in n_by_source}
        if len(n_by_source) == 1 and n.min() == self.length:
            text_BT = self._windows[sources[0]][start]  # one gather for the usual batch
            inputs_BT, targets_BT = text_BT[:, :-1].astype(np.int64), text_BT[:, 1:].astype(np.int64)
        else:
            inputs_BT, targets_BT = _gather(self.tokens, sources, start, n, self.length)
        inputs, targets = torch.from_numpy(inputs_BT).to(device), torch.from_numpy(targets_BT).to(device)
        return TokenBatch(inputs, targets, int(n.sum()), n_by_source, source_B, rows.start)

    def drawn(self, n_steps: int) -> tuple[dict[int, int], dict[int, int]]:
        """Return what the first ``n_steps`` batches drew from every source: rows, and target tokens."""
        source, n = (part[: n_steps * self.batch_rows] for part in (self.source, self.n_targets))
        found = [int(s) for s in np.unique(source)]
        return {s: int((source == s).sum()) for s in found}, {s: int(n[source == s].sum()) for s in found}

    def then(self, n_steps: int, other: DataOrder) -> None:
        """Replace what comes after the first ``n_steps`` batches by another order of the same stream."""
        kept = n_steps * self.batch_rows
        for part in ("source", "start", "n_targets"):
            setattr(self, part, np.concatenate([getattr(self, part)[:kept], getattr(other, part)]))
        self.tokens |= other.tokens
        self._windows |= other._windows


class Shelf:
    """The chunks of one source in the order of the text, and which of them may be drawn.

    Args:
        stream: the built stream.
        source: a stage.
        length: targets per chunk, at most.
        seed: the run's seed.
        batching: packed, or one document a row.
    """

    def __init__(self, stream: Stream, source: int, *, length: int, seed: int, batching: Batching) -> None:
        self.stream, self.source, self.length = stream, source, length
        offsets = stream.offsets("train", source) if batching == "rows" else None
        self.start, self.n_targets = _chunks(len(stream.tokens("train", source)), offsets, length)
        self._key = (stream.sha256, seed, "train", source, source, 0)

    def first_order(self) -> NDArray[np.int64]:
        """Return the chunks as this run draws them in its first pass over the stage when it is new."""
        return seeds.permutation(len(self.start), *self._key)

    def control(self) -> NDArray[np.int64]:
        """Return the chunks that are kept back from training: the last of ``first_order``."""
        n = min(CONTROL_ROWS, len(self.start) // 10)
        return self.first_order()[len(self.start) - n :]

    def free(self, draw: Draw) -> NDArray[np.bool_] | None:
        """Return which chunks may be drawn, or None for all of them."""
        if not (self.source in draw.pools or draw.excluded or draw.keeps_control):
            return None
        free = np.ones(len(self.start), dtype=bool)
        if draw.keeps_control:
            free[self.control()] = False
        if self.source in draw.pools:
            order = self.first_order()
            order = order[free[order]]
            before = np.cumsum(self.n_targets[order], dtype=np.int64) - self.n_targets[order]
            free[order[before >= draw.pools[self.source]]] = False
        if draw.excluded:
            free &= ~self.touches(excluded_documents(self.stream, self.source, draw.excluded))
        return free

    def control_batches(self, draw: Draw, n_rows: int, batch_rows: int, device: torch.device) -> Iterator[TokenBatch]:
        """Yield the first ``n_rows`` control rows that hold no excluded document."""
        chunks = self.control()
        if draw.excluded:
            chunks = chunks[~self.touches(excluded_documents(self.stream, self.source, draw.excluded))[chunks]]
        tokens = np.asarray(self.stream.tokens("train", self.source))
        for first in range(0, min(n_rows, len(chunks)), batch_rows):
            rows = chunks[first : min(first + batch_rows, n_rows)]
            n, sources = self.n_targets[rows], [self.source] * len(rows)
            inputs_BT, targets_BT = _gather({self.source: tokens}, sources, self.start[rows], n, self.length)
            yield TokenBatch(
                torch.from_numpy(inputs_BT).to(device),
                torch.from_numpy(targets_BT).to(device),
                int(n.sum()),
                {self.source: int(n.sum())},
                torch.tensor(sources, dtype=torch.int64, device=device),
                first,
            )

    def touches(self, documents: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which chunks hold a token of some documents, as inputs or as targets."""
        offsets = self.stream.offsets("train", self.source)
        marked = np.zeros(len(offsets) - 1, dtype=np.int64)
        marked[documents] = 1
        before = np.concatenate([[0], np.cumsum(marked)])
        first = np.searchsorted(offsets, self.start, side="right") - 1
        last = np.searchsorted(offsets, self.start + self.n_targets, side="right") - 1
        found: NDArray[np.bool_] = before[last + 1] > before[first]
        return found

    def choose(
        self, quota: int, key: tuple[Any, ...], *, free: NDArray[np.bool_] | None, skip: int, count_rows: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return first tokens and targets of permuted chunks that hold exactly ``quota`` targets (or are so many).

        Epochs repeat the chunks, each in its own order; the first ``skip`` chunks were drawn before.
        """
        chosen: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
        left, epoch = quota, 0
        while left:
            order = seeds.permutation(len(self.start), *key, epoch)
            if free is not None:
                order = order[free[order]]
            epoch += 1
            if skip >= len(order):
                skip -= len(order)
                continue
            order, skip = order[skip:], 0
            if count_rows:
                order = order[:left]
                n = self.n_targets[order]
                left -= len(order)
            else:
                total = np.cumsum(self.n_targets[order], dtype=np.int64)
                order = order[: np.searchsorted(total, left) + 1]
                n = self.n_targets[order]
                n[-1] -= max(0, total[len(order) - 1] - left)
                left -= int(n.sum())
            chosen.append((self.start[order], n))
        return np.concatenate([s for s, _ in chosen]), np.concatenate([n for _, n in chosen])


def excluded_documents(stream: Stream, stage: int, identities: frozenset[str]) -> NDArray[np.int64]:
    """Return which documents of a stage's training text, in packed order, have one of these identities."""
    batches = stream.document_batches("train", stage, ["id"])
    ids = chain.from_iterable(batch.column("id").to_pylist() for batch in batches)
    return np.array([i for i, one in enumerate(ids) if identity_of(one) in identities], dtype=np.int64)


def _gather(
    tokens: Mapping[int, NDArray[Any]],
    sources: list[int],
    start: NDArray[np.int64],
    n_targets: NDArray[np.int32],
    length: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return inputs and targets of rows of any length, shape ``[B, T]``."""
    inputs_BT = np.zeros((len(sources), length), dtype=np.int64)
    targets_BT = np.full((len(sources), length), IGNORE, dtype=np.int64)
    for b, (source, first, k) in enumerate(zip(sources, start.tolist(), n_targets.tolist(), strict=True)):
        text = tokens[source][first : first + k + 1]
        inputs_BT[b, :k], targets_BT[b, :k] = text[:-1], text[1:]
    return inputs_BT, targets_BT


def _chunks(
    n_tokens: int, offsets: NDArray[np.int64] | None, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return first tokens and numbers of targets of the chunks of a source: of its documents when offsets are given."""
    offsets = np.array([0, n_tokens]) if offsets is None else offsets
    # A text without a first token to go on from (an EOS alone) has no target.
    n_targets = np.maximum(np.diff(offsets) - 1, 0)
    pieces = -(-n_targets // length)
    before = np.repeat(np.cumsum(pieces) - pieces, pieces)
    within = (np.arange(len(before)) - before) * length
    start = np.repeat(offsets[:-1], pieces) + within
    return start, np.minimum(length, np.repeat(n_targets, pieces) - within).astype(np.int32)
