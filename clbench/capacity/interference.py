"""Destructive interference of changes: how much of them cancels, beside what cancels by chance (zero-sum learning).

z are changes of single tokens' losses between two checkpoints, in nats. With D = 1 - |sum z| / sum |z| (0: all go the
same way, 1: they cancel) and M = mean |z|, the change of the mean loss is exactly |mean z| = M (1 - D): a loss moves by
more movement or by less cancelling.

D near 1 is no finding by itself. Where signs are random, sum z is about normal with variance sum z^2, so that

    E[D] = 1 - sqrt(2/pi) ||z||_2 / ||z||_1,

which for normal z is 1 - 1/sqrt(N). Tokens of one document are not independent; with one random sign a *document*
sum z^2 becomes the sum over documents of squared sums, which is the null to read D against.

Shapes: N tokens, B documents, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clbench import seeds
from clbench.capacity.figure import Figure, undefined

Floats = NDArray[np.float64]
N_RESAMPLES = 2000
LEVEL = 0.95
NORMAL_BOUND = 1.959963984540054
"""|standard normal| stays below it with probability 0.95."""
BLOCK = 64
"""Resamples that exist at a time, each a count a document."""


def destructive_interference(z_N: Floats) -> Figure:
    """Return D = 1 - |sum z| / sum |z|."""
    bottom = float(np.abs(z_N).sum())
    return Figure(1 - abs(float(z_N.sum())) / bottom) if bottom > 0 else undefined("nothing changed")


def null_of_normal(n: int) -> float:
    """Return what n independent, normal changes of mean zero give on average: 1 - 1/sqrt(n), to first order."""
    return 1 - 1 / math.sqrt(n)


def null_of_signs(z_N: Floats, block_N: NDArray[np.int64] | None = None) -> tuple[Figure, Figure]:
    """Return the mean of D under random signs, and the value that it stays above with probability 0.95.

    Args:
        z_N: changes; only their sizes count, and with blocks their sums.
        block_N: document of every change, which share one sign; None: every change has its own.

    A normal approximation over the blocks: with fewer than about 10 of them of equal weight it is coarse.
    """
    bottom = float(np.abs(z_N).sum())
    if not bottom > 0:
        return undefined("nothing changed"), undefined("nothing changed")
    sums = z_N if block_N is None else np.bincount(block_N, weights=z_N)
    spread = float(np.sqrt(np.sum(sums**2))) / bottom
    return Figure(1 - math.sqrt(2 / math.pi) * spread), Figure(max(0.0, 1 - NORMAL_BOUND * spread))


@dataclass(frozen=True)
class Opposition:
    """What the changes of one text's tokens do to each other."""

    n_tokens: int
    n_documents: int
    figures: dict[str, Figure]
    """``interference`` (D), ``magnitude_nats`` (M), ``change_nats`` (mean z), each with ``_low`` and ``_high``, and the
    nulls of D: ``interference_null``, ``interference_null_blocks`` and its bound ``interference_null_blocks_low``."""


def opposition(z_N: Floats, block_N: NDArray[np.int64], *, seed: int = 0) -> Opposition:
    """Return every figure of one text, with 95 % intervals by resampling documents.

    Args:
        z_N: change of every token's loss, nats.
        block_N: its document, counted from 0.
        seed: of the resamples.
    """
    found = {
        "interference": destructive_interference(z_N),
        "magnitude_nats": Figure(float(np.abs(z_N).mean())) if len(z_N) else undefined("no token"),
        "change_nats": Figure(float(z_N.mean())) if len(z_N) else undefined("no token"),
    }
    found["interference_null"], _ = null_of_signs(z_N)
    found["interference_null_blocks"], found["interference_null_blocks_low"] = null_of_signs(z_N, block_N)
    n_documents = len(np.unique(block_N))
    return Opposition(len(z_N), n_documents, found | _intervals(z_N, block_N, n_documents, seed))


def _intervals(z_N: Floats, block_N: NDArray[np.int64], n_documents: int, seed: int) -> dict[str, Figure]:
    """Return percentile bounds of D, M and the mean over resampled documents."""
    names = ("interference", "magnitude_nats", "change_nats")
    if n_documents < 2 or not np.abs(z_N).sum() > 0:
        why = undefined("nothing changed" if n_documents >= 2 else "fewer than 2 documents")
        return {f"{name}_{side}": why for name in names for side in ("low", "high")}
    _, block_N = np.unique(block_N, return_inverse=True)
    sums_3B = np.stack([np.bincount(block_N, weights=w) for w in (z_N, np.abs(z_N), np.ones(len(z_N)))])
    generator = seeds.generator(seed, "capacity", "documents", n_documents)
    parts = []
    for start in range(0, N_RESAMPLES, BLOCK):
        n = min(BLOCK, N_RESAMPLES - start)
        counts_RB = generator.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=n)
        parts.append(counts_RB @ sums_3B.T)
    total, absolute, n_tokens = np.concatenate(parts).T
    resampled = {
        "interference": 1 - np.abs(total) / np.maximum(absolute, 1e-300),
        "magnitude_nats": absolute / n_tokens,
        "change_nats": total / n_tokens,
    }
    sides = {"low": (1 - LEVEL) / 2, "high": (1 + LEVEL) / 2}
    return {
        f"{name}_{side}": Figure(float(np.quantile(resampled[name], q))) for name in names for side, q in sides.items()
    }
