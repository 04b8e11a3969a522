"""Which tokens are in which batch: a pure function of (stream, seed, stage, step).

Resuming therefore needs one integer, and the number of processes does not change a batch. Shapes: B rows, T positions.
What a row holds is the batching: *packed* cuts a stage's tokens every T targets, across documents; *rows* gives each
document rows of its own, so that short documents make more steps of fewer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from clbench import seeds
from clbench.errors import ConfigError
from clbench.stream import Stream

Batching = Literal["packed", "rows"]

IGNORE = -100
"""Target of a position that is not trained on (torch's convention)."""


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch on the training device: int64, shape ``[B, T]``; targets are IGNORE after a row's end."""

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    n_targets: int
    n_targets_by_source: dict[int, int]


def allocate(n_tokens: int, mixture: Mapping[int, float]) -> dict[int, int]:
    """Split a token budget by shares, exactly, by largest remainder; ties go to the later stage."""
    exact = {stage: n_tokens * share for stage, share in mixture.items() if share > 0}
    whole = {stage: int(tokens) for stage, tokens in exact.items()}
    missing = n_tokens - sum(whole.values())
    by_remainder = sorted(exact, key=lambda stage: (exact[stage] - whole[stage], stage), reverse=True)
    for stage in by_remainder[:missing]:
        whole[stage] += 1
    return {stage: tokens for stage, tokens in sorted(whole.items()) if tokens}


class DataOrder:
    """The rows of one stage in training order.

    Each source stage's tokens are cut into chunks of at most ``length`` targets, within documents when batching is
    ``rows``; a permutation that depends on (stream, seed, stage, source, epoch) says which come first; the last chunk
    is cut so that the budget is met to the token; one more permutation mixes the sources. Two methods with the same
    seed see the same new text in the same order. With ``n_steps`` the budget is rows instead, and no chunk is cut.

    Args:
        stream: the built stream.
        mixture: source stage -> share of ``n_tokens``, or of the rows of ``n_steps``.
        n_tokens: target tokens in all.
        length: targets per row.
        batch_rows: rows per optimizer step.
        seed: the run's seed.
        stage: index of the stage being trained.
        name: separates draws that must not coincide (training, a Fisher pass …).
        batching: packed, or one document a row.
        n_steps: takes the place of ``n_tokens``: so many full batches, whatever tokens they hold.

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
        n_steps: int | None = None,
    ) -> None:
        self.length, self.batch_rows = length, batch_rows
        quota = allocate(n_tokens if n_steps is None else n_steps * batch_rows, mixture)
        # As plain arrays: a slice of numpy's memmap class costs three times as much.
        self.tokens = {source: np.asarray(stream.tokens("train", source)) for source in quota}
        self._windows = {s: sliding_window_view(t, length + 1) for s, t in self.tokens.items() if len(t) > length}
        key = (stream.sha256, seed, name, stage)
        parts = []
        for source, wanted in quota.items():
            offsets = stream.offsets("train", source) if batching == "rows" else None
            chunks = _chunks(len(self.tokens[source]), offsets, length)
            if not len(chunks[0]):
                raise ConfigError(f"stage {source} has no training text", mend="leave it out of the mixture")
            parts.append(_choose(*chunks, wanted, (*key, source), count_rows=n_steps is not None))
        mix = seeds.permutation(sum(len(start) for start, _ in parts), *key, "mix")
        self.source = np.repeat(np.array([*quota], np.int16), [len(start) for start, _ in parts])[mix]
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
        return [self._read(slice(i, min(i + size, end)), device) for i in range(first, end, size)]

    def _read(self, rows: slice, device: torch.device) -> TokenBatch:
        start, n = self.start[rows], self.n_targets[rows]
        sources = self.source[rows].tolist()
        n_by_source = dict.fromkeys(sources, int(n.sum()))
        if len(n_by_source) > 1:
            n_by_source = {s: int(n[self.source[rows] == s].sum()) for s in n_by_source}
        if len(n_by_source) == 1 and n.min() == self.length:
            text_BT = self._windows[sources[0]][start]  # one gather for the usual batch
            inputs_BT, targets_BT = text_BT[:, :-1].astype(np.int64), text_BT[:, 1:].astype(np.int64)
        else:
            inputs_BT = np.zeros((len(n), self.length), dtype=np.int64)
            targets_BT = np.full((len(n), self.length), IGNORE, dtype=np.int64)
            for b, (source, first, k) in enumerate(zip(sources, start.tolist(), n.tolist(), strict=True)):
                text = self.tokens[source][first : first + k + 1]
                inputs_BT[b, :k], targets_BT[b, :k] = text[:-1], text[1:]
        return TokenBatch(
            torch.from_numpy(inputs_BT).to(device), torch.from_numpy(targets_BT).to(device), int(n.sum()), n_by_source
        )


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


def _choose(
    start: NDArray[np.int64], n_targets: NDArray[np.int32], quota: int, key: tuple[Any, ...], *, count_rows: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return permuted chunks with exactly ``quota`` targets (or rows); epochs repeat them, each in its own order."""
    chosen: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
    left, epoch = quota, 0
    while left:
        order = seeds.permutation(len(start), *key, epoch)
        if count_rows:
            order = order[:left]
            n = n_targets[order]
            left -= len(order)
        else:
            total = np.cumsum(n_targets[order], dtype=np.int64)
            order = order[: np.searchsorted(total, left) + 1]
            n = n_targets[order]
            n[-1] -= max(0, total[len(order) - 1] - left)
            left -= int(n.sum())
        chosen.append((start[order], n))
        epoch += 1
    return np.concatenate([s for s, _ in chosen]), np.concatenate([n for _, n in chosen])
