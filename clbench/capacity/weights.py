"""Norms and spectra of weights, and how far they drifted from other ones.

Everything goes tensor by tensor and piece by piece: beside the weights themselves at most 2^22 numbers are held in
float64 at a time, and the few dozen vectors of one matrix's Lanczos basis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from clbench import seeds
from clbench.capacity.figure import Figure, figure

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-9
"""Relative change of the squared spectral norm at which Lanczos stops, twice in a row."""
MOST_STEPS = 200
PIECE = 2**22
"""Numbers that are in float64 at a time."""


@dataclass(frozen=True)
class Size:
    """Sums over some parameters; sums of disjoint ones add up."""

    n: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    moved: float = 0.0
    """||theta - theta_0||^2."""
    from_squared: float = 0.0
    """||theta_0||^2."""

    def __add__(self, other: Size) -> Size:
        """Return the sums over both."""
        return Size(
            self.n + other.n,
            self.absolute + other.absolute,
            self.squared + other.squared,
            self.moved + other.moved,
            self.from_squared + other.from_squared,
        )

    @property
    def mean_abs(self) -> Figure:
        """Mean |w| (the weight norm of Dohare et al. 2024)."""
        return figure(self.absolute / self.n if self.n else math.nan, "no parameter")

    @property
    def drift(self) -> Figure:
        """||theta - theta_0|| / ||theta_0||."""
        known = self.from_squared > 0
        return figure(math.sqrt(self.moved / self.from_squared) if known else math.nan, "the base's weights are zero")


def size_of(weight: torch.Tensor, base: torch.Tensor | None = None) -> Size:
    """Return the sums over one tensor, in float64; without a base as if it had not moved from zero."""
    import torch

    found = Size()
    pieces = torch.split(weight.detach().flatten(), PIECE)
    before = [None] * len(pieces) if base is None else torch.split(base.detach().flatten(), PIECE)
    for piece, old in zip(pieces, before, strict=True):
        w = piece.double()
        one = Size(w.numel(), float(w.abs().sum()), float(w.square().sum()))
        if old is not None:
            b = old.to(w.device).double()
            one = replace(one, moved=float((w - b).square().sum()), from_squared=float(b.square().sum()))
        found += one
    return found


def total(sizes: Iterable[Size]) -> Size:
    """Return the sums over all."""
    return sum(sizes, Size())


def share_of_drift(part: Size, whole: Size) -> Figure:
    """Return the part's share of ||theta - theta_0||^2; shares of disjoint parts add up to 1."""
    return figure(part.moved / whole.moved if whole.moved > 0 else math.nan, "the weights did not move")


def spectral_norm(matrix: torch.Tensor, *, seed: int = 0) -> float:
    """Return the largest singular value, by Lanczos steps on A'A in float64 with full reorthogonalisation.

    Steps stop when the squared value changes by less than 1e-9 of itself twice in a row; 10 to 40 are usual. The value
    is at most the true one. Tensors of more than two dimensions are flattened to rows.
    """
    import torch

    a = matrix.detach().flatten(1)
    if a.shape[0] < a.shape[1]:
        a = a.T
    width = a.shape[1]
    rows = [a.double()] if a.numel() <= PIECE else torch.split(a, max(1, PIECE // width))
    start = seeds.generator(seed, "capacity", "lanczos", width).standard_normal(width)
    v = torch.from_numpy(start).to(a.device)
    basis = [v / v.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    top, calm = 0.0, 0
    for _ in range(min(width, MOST_STEPS)):
        u = _squared_times(rows, basis[-1])
        diagonal.append(float(u @ basis[-1]))
        before, top = top, _top_of_tridiagonal(diagonal, beside)
        calm = calm + 1 if top - before <= TOLERANCE * top else 0
        kept = torch.stack(basis)
        for _ in range(2):  # twice is enough
            u = u - kept.T @ (kept @ u)
        norm = float(u.norm())
        if calm == 2 or norm <= 1e-12 * max(top, 1e-300):  # an invariant subspace: nothing more to find from here
            break
        beside.append(norm)
        basis.append(u / norm)
    return math.sqrt(max(top, 0.0))


def _squared_times(rows: Sequence[torch.Tensor], v: torch.Tensor) -> torch.Tensor:
    """Return A'A v from pieces of A's rows, each in float64 while it is used."""
    import torch

    product = torch.zeros_like(v)
    for piece in rows:
        a = piece.double()
        product += a.T @ (a @ v)
    return product


def _top_of_tridiagonal(diagonal: list[float], beside: list[float]) -> float:
    from scipy.linalg import eigh_tridiagonal

    if len(diagonal) == 1:
        return diagonal[0]
    last = len(diagonal) - 1
    values = eigh_tridiagonal(diagonal, beside, eigvals_only=True, select="i", select_range=(last, last))
    return float(values[0])


def stable_rank(size: Size, norm: float) -> Figure:
    """Return ||W||_F^2 / ||W||_2^2: d for the identity, 1 for a matrix of rank 1."""
    return figure(size.squared / norm**2 if norm > 0 else math.nan, "the matrix is zero")


def same_shapes(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> str:
    """Return why two sets of weights cannot be compared; empty where they can."""
    if ours.keys() != theirs.keys():
        return f"weight {min(ours.keys() ^ theirs.keys())} stands in one of the two models only"
    for name, one in ours.items():
        if one.shape != theirs[name].shape:
            return f"weight {name} has shape {tuple(one.shape)}, in the other {tuple(theirs[name].shape)}"
    return ""
