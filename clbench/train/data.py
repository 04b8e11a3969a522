"""Which tokens are in which batch: a pure function of (stream, seed, stage, step).

Resuming therefore needs one integer, and the number of processes does not change a batch. Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from clbench import seeds
from clbench.errors import ConfigError
from clbench.stream import Stream

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

    Each source stage's packed tokens are cut into chunks of ``length`` targets; a permutation that depends on (stream,
    seed, stage, source, epoch) says which come first; the last chunk is cut so that the budget is met to the token; one
    more permutation mixes the sources. Two methods with the same seed see the same new text in the same order.

    Args:
        stream: the built stream.
        mixture: source stage -> share of ``n_tokens``.
        n_tokens: target tokens in all.
        length: targets per row.
        batch_rows: rows per optimizer step.
        seed: the run's seed.
        stage: index of the stage being trained.
        name: separates draws that must not coincide (training, a Fisher pass …).
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
    ) -> None:
        self.length, self.batch_rows = length, batch_rows
        self.quota = allocate(n_tokens, mixture)
        self.tokens = {source: stream.tokens("train", source) for source in self.quota}
        key = (stream.sha256, seed, name, stage)
        parts = [_rows_of_source(len(self.tokens[s]), quota, length, s, key) for s, quota in self.quota.items()]
        rows = np.concatenate(parts)
        self.rows: NDArray[np.int64] = rows[seeds.permutation(len(rows), *key, "mix")]
        """Source stage, first token, number of targets; shape ``[n_rows, 3]``."""

    @property
    def n_steps(self) -> int:
        """Optimizer steps that use up the budget; the last may be smaller."""
        return -(-len(self.rows) // self.batch_rows)

    def micro_batches(self, step: int, *, micro_rows: int | None, device: torch.device) -> list[TokenBatch]:
        """Return the batch of one step, cut into micro-batches of at most ``micro_rows`` rows."""
        rows = self.rows[step * self.batch_rows : (step + 1) * self.batch_rows]
        size = micro_rows or len(rows)
        return [self._read(rows[i : i + size], device) for i in range(0, len(rows), size)]

    def _read(self, rows: NDArray[np.int64], device: torch.device) -> TokenBatch:
        inputs_BT = np.zeros((len(rows), self.length), dtype=np.int64)
        targets_BT = np.full((len(rows), self.length), IGNORE, dtype=np.int64)
        by_source: dict[int, int] = {}
        for b, (source, start, n) in enumerate(rows.tolist()):
            text = self.tokens[source][start : start + n + 1]
            inputs_BT[b, :n], targets_BT[b, :n] = text[:-1], text[1:]
            by_source[source] = by_source.get(source, 0) + n
        return TokenBatch(
            torch.from_numpy(inputs_BT).to(device),
            torch.from_numpy(targets_BT).to(device),
            int(rows[:, 2].sum()),
            by_source,
        )


def _rows_of_source(
    n_available: int, quota: int, length: int, source: int, key: tuple[str, int, str, int]
) -> NDArray[np.int64]:
    """Return chunks of one source that hold exactly ``quota`` targets, shape ``[n_rows, 3]``; epochs repeat it."""
    if n_available < 2:
        raise ConfigError(f"stage {source} has no training text", mend="leave it out of the mixture")
    starts = np.arange(0, n_available - 1, length)
    lengths = np.minimum(length, n_available - 1 - starts)
    chosen: list[NDArray[np.int64]] = []
    left, epoch = quota, 0
    while left:
        order = seeds.permutation(len(starts), *key, source, epoch)
        rows = np.stack([np.full(len(order), source), starts[order], lengths[order]], axis=1)
        before = np.cumsum(rows[:, 2]) - rows[:, 2]
        rows = rows[before < left]
        rows[-1, 2] = min(rows[-1, 2], left - before[len(rows) - 1])
        chosen.append(rows)
        left -= int(rows[:, 2].sum())
        epoch += 1
    return np.concatenate(chosen)
