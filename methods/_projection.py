"""Nearest vectors under constraints on dot products: the algebra of A-GEM and GEM on inner products alone.

What it leaves to others: where the gradients come from. Nothing here sees more of a vector than its local shard;
sums over shards are the caller's one ``ctx.all_reduce``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from clbench.method import Context

SLICE = 2**20
"""Coordinates that are held in double precision at a time."""
RANK_TOLERANCE = 1e-12
"""Eigenvalues of a Gram matrix below this share of the largest are rounding: dots of fp32 vectors, summed in fp64."""


def gram(vectors: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Return all dot products of n vectors, each a list of tensors, over the local shard: float64 ``[n, n]``."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0][0].device)
    for parts in zip(*vectors, strict=True):
        flat = [part.reshape(-1) for part in parts]
        for first in range(0, len(flat[0]), SLICE):
            block = torch.stack([part[first : first + SLICE].double() for part in flat])
            total += block @ block.T
    return total


def cosine(dots: NDArray[np.float64], i: int, j: int) -> float:
    """Return the cosine of two vectors from all dot products; 0 where one of them vanishes."""
    norms = float(np.sqrt(dots[i, i] * dots[j, j]))
    return float(dots[i, j]) / norms if norms else 0.0


def nearest(
    gram_tt: NDArray[np.float64], dots_t: NDArray[np.float64], *, margin: float = 0.0, ridge: float = 0.0
) -> NDArray[np.float64]:
    """Return v such that ``z = g + G^T v`` is nearest to g with ``G z >= 0`` (Lopez-Paz & Ranzato 2017, eq. 11).

    The dual: minimise ``1/2 v^T (G G^T + ridge m I) v + (G g)^T v`` for ``v >= margin``, m the mean squared norm of the
    rows of G, t x P. With ``w = v - margin`` and any A that has ``A^T A = G G^T + ...`` it is the least-squares
    problem ``|A w - b|`` for ``w >= 0``, which the active-set method of Lawson & Hanson solves in finitely many steps.

    Args:
        gram_tt: ``G G^T``.
        dots_t: ``G g``.
        margin: least weight of each memory gradient; 0 for the nearest vector.
        ridge: keeps v bounded where memory gradients are collinear; constraints then hold to ``ridge m v``.
    """
    scale = float(np.trace(gram_tt)) / len(gram_tt)
    if not scale:
        return np.zeros(len(gram_tt))
    quadratic = gram_tt / scale + ridge * np.eye(len(gram_tt))
    linear = dots_t / scale + margin * quadratic.sum(1)
    values, vectors = np.linalg.eigh(quadratic)
    kept = values > RANK_TOLERANCE * values[-1]
    root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    wanted = -(vectors[:, kept].T @ linear) / np.sqrt(values[kept])
    weights: NDArray[np.float64] = nnls(root, wanted)[0] + margin
    return weights


@dataclass
class Opposition:
    """How often the gradients of past and present were opposed in a stage."""

    n_steps: int = 0
    n_violated: int = 0
    """Steps in which some constraint was."""
    cosine_sum: float = 0.0

    def count(self, cosine: float, *, violated: bool) -> None:
        """Count one step."""
        self.n_steps += 1
        self.n_violated += violated
        self.cosine_sum += cosine

    def note(self, ctx: Context) -> None:
        """Note the stage's rates; nothing where no step had past rows."""
        if self.n_steps:
            ctx.note("violation_rate", self.n_violated / self.n_steps)
            ctx.note("mean_cosine", self.cosine_sum / self.n_steps)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Opposition:
        """Take them back."""
        return cls(int(values["n_steps"]), int(values["n_violated"]), float(values["cosine_sum"]))
