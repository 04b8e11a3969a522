"""What one sample of a Fisher is: a packed row, a document, or a piece of a row, cut from a stream or a text.

Grouping decides what the gradients are means over, and with that how collinear they look: the longer the text of one
sample, the less of its gradient is noise of single tokens. ``sequence`` is what training and the EWC methods see.
Legend: B rows, T positions, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clbench import seeds
from clbench.errors import ConfigError
from clbench.fisher.diagnostic import SampleBatch
from clbench.stream import Stream
from clbench.train.data import IGNORE, Batching, Shelf

MAX_WINDOWS = 8
"""Rows of a document that are read, at most: the first ones."""
MIN_TARGETS = 8
"""Rows and documents with fewer targets are no samples: their gradients are those of a few tokens."""


@dataclass(frozen=True)
class Grouping:
    """How text is cut into samples."""

    kind: str
    """sequence, document or block."""
    n_tokens: int = 0
    """Targets of a block."""

    @classmethod
    def parse(cls, text: str) -> Grouping:
        """Return ``sequence``, ``document`` or a number of tokens as a grouping.

        Raises:
            ConfigError: it is none of them.
        """
        if text in ("sequence", "document"):
            return cls(text)
        if text.isdecimal() and int(text) >= 1:
            return cls("block", int(text))
        raise ConfigError(f"there is no grouping {text!r}", mend="choose sequence, document or a number of tokens")

    def __str__(self) -> str:
        """Return what ``parse`` takes."""
        return str(self.n_tokens) if self.kind == "block" else self.kind


@dataclass(frozen=True)
class Samples:
    """Chosen samples; calling it yields them in batches, the same every time."""

    tokens: NDArray[Any]
    starts: list[NDArray[np.int64]]
    """First token of every row of every sample."""
    n_targets: list[NDArray[np.int64]]
    length: int
    first_target: NDArray[np.int64] | None = None
    """Block: where in its row the one block of every sample begins."""
    n_block: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows_per_batch: int = 8

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return sum(map(len, self.starts))

    def __call__(self) -> Iterator[SampleBatch]:
        """Yield whole samples, as many as fill ``rows_per_batch`` rows, at least one."""
        chosen: list[int] = []
        n_rows = 0
        for sample, starts in enumerate(self.starts):
            if chosen and n_rows + len(starts) > self.rows_per_batch:
                yield self._batch(chosen)
                chosen, n_rows = [], 0
            chosen.append(sample)
            n_rows += len(starts)
        if chosen:
            yield self._batch(chosen)

    def _batch(self, chosen: list[int]) -> SampleBatch:
        n_rows = sum(len(self.starts[s]) for s in chosen)
        inputs_BT = np.zeros((n_rows, self.length), dtype=np.int64)
        targets_BT = np.full((n_rows, self.length), IGNORE, dtype=np.int64)
        weights_SB = np.zeros((len(chosen), n_rows), dtype=np.float32)
        row = 0
        for place, sample in enumerate(chosen):
            for start, k in zip(self.starts[sample], self.n_targets[sample], strict=True):
                text = self.tokens[start : start + k + 1].astype(np.int64)
                inputs_BT[row, :k], targets_BT[row, :k] = text[:-1], text[1:]
                weights_SB[place, row] = k / self.n_targets[sample].sum()  # mean over the tokens of the whole sample
                row += 1
            if self.first_target is not None:
                first = int(self.first_target[sample])
                targets_BT[row - 1, :first] = targets_BT[row - 1, first + self.n_block :] = IGNORE
        to = self.device
        weights = torch.from_numpy(weights_SB).to(to) if n_rows > len(chosen) else None
        return SampleBatch(torch.from_numpy(inputs_BT).to(to), torch.from_numpy(targets_BT).to(to), weights)


def of_stream(
    stream: Stream,
    stage: int,
    *,
    n: int,
    length: int,
    grouping: Grouping,
    seed: int,
    run_seed: int = 0,
    batching: Batching = "packed",
    n_drawn_tokens: int | None = None,
    device: torch.device | None = None,
) -> Samples:
    """Choose samples of one stage's training text.

    Args:
        stream: the built stream.
        stage: whose training text.
        n: how many samples.
        length: targets per row.
        grouping: what a sample is.
        seed: of the choice.
        run_seed: of the run whose first rows ``n_drawn_tokens`` counts.
        batching: how that run filled its rows; documents have rows of their own whatever it says.
        n_drawn_tokens: what the run drew of the stage while it was new, only that is chosen from; None: all.
        device: where the batches go.

    Raises:
        ConfigError: the text holds fewer samples.
    """
    by_document = grouping.kind == "document"
    shelf = Shelf(stream, stage, length=length, seed=run_seed, batching="rows" if by_document else batching)
    wanted = np.flatnonzero(shelf.n_targets >= max(MIN_TARGETS, grouping.n_tokens))
    if n_drawn_tokens is not None and not by_document:
        order = shelf.first_order()
        before = np.cumsum(shelf.n_targets[order], dtype=np.int64) - shelf.n_targets[order]
        wanted = np.intersect1d(wanted, order[before < n_drawn_tokens])
    groups = _documents(stream, stage, shelf) if by_document else [np.array([row]) for row in wanted]
    where = f"{stream.name}, stage {stage}"
    if len(groups) < n:
        raise ConfigError(f"{len(groups)} samples by {grouping}, {n} wanted", where=where, mend="lower --rows")
    order = seeds.permutation(len(groups), stream.sha256, seed, "fisher", str(grouping), stage)
    chosen = [groups[i] for i in order[:n]]
    return _make(
        np.asarray(stream.tokens("train", stage)),
        [shelf.start[rows] for rows in chosen],
        [shelf.n_targets[rows].astype(np.int64) for rows in chosen],
        length,
        grouping,
        seed,
        device,
    )


def _documents(stream: Stream, stage: int, shelf: Shelf) -> list[NDArray[np.int64]]:
    """Return the rows of every document that is long enough, its first ones."""
    offsets = stream.offsets("train", stage)
    document = np.searchsorted(offsets, shelf.start, side="right") - 1
    bounds = np.flatnonzero(np.diff(document, prepend=-1, append=len(offsets)))
    groups = [np.arange(a, min(b, a + MAX_WINDOWS)) for a, b in pairwise(bounds)]
    return [rows for rows in groups if shelf.n_targets[rows].sum() >= MIN_TARGETS]


def of_text(
    tokens: NDArray[Any],
    *,
    n: int,
    length: int,
    grouping: Grouping,
    seed: int,
    device: torch.device | None = None,
    where: object = None,
) -> Samples:
    """Choose samples of one text that is one document.

    Raises:
        ConfigError: it holds fewer samples, or samples are to be documents.
    """
    if grouping.kind == "document":
        raise ConfigError("a text file is one document", where=where, mend="group by sequence or a number of tokens")
    starts = np.arange(0, max(0, len(tokens) - 1), length, dtype=np.int64)
    k = np.minimum(length, len(tokens) - 1 - starts)
    wanted = np.flatnonzero(k >= max(MIN_TARGETS, grouping.n_tokens))
    if len(wanted) < n:
        raise ConfigError(
            f"{len(wanted)} rows of {length} tokens, {n} wanted", where=where, mend="lower --rows, or give more text"
        )
    rows = wanted[seeds.permutation(len(wanted), seed, "fisher", str(grouping))[:n]]
    return _make(tokens, [starts[[r]] for r in rows], [k[[r]] for r in rows], length, grouping, seed, device)


def _make(
    tokens: NDArray[Any],
    starts: list[NDArray[np.int64]],
    n_targets: list[NDArray[np.int64]],
    length: int,
    grouping: Grouping,
    seed: int,
    device: torch.device | None,
) -> Samples:
    """Return samples; of every row one block at random, so that samples stay independent."""
    first = None
    if grouping.kind == "block":
        room = np.array([max(1, int(k[0]) // grouping.n_tokens) for k in n_targets])
        draws = seeds.generator(seed, "fisher", "pieces").random(len(room))
        first = (draws * room).astype(np.int64) * grouping.n_tokens
    device = device or torch.device("cpu")
    return Samples(tokens, starts, n_targets, length, first, grouping.n_tokens, device)
