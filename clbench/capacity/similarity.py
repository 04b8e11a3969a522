"""How alike two representations of the same samples are, from sums over samples that are seen once.

``Pairs`` is fed the vectors of both models for the same samples. It keeps three matrices, 8 (d d + e e + d e)
bytes for widths d and e, and no vector of a sample.

Debiased HSIC (Song et al. 2012, eq. 4) sums over the Gram matrices K~ = K, L~ = L with zero diagonals,

    HSIC = [ sum(K~ o L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1 ] / (n (n-3)),

and for linear kernels all three sums follow from d x e sums. With k_i = ||x_i||^2, l_i = ||y_i||^2, C = sum x_i y_i^T:

    sum(K~ o L~) = ||C||_F^2 - sum k_i l_i,      1'K~1 = ||sum x_i||^2 - sum k_i,
    1'K~L~1 = s_x'C s_y - s_x'sum l_i x_i - s_y'sum k_i y_i + sum k_i l_i.

It does not change when a constant is taken from all x, so sums are kept about a shift near the mean.
Shapes: N samples, D and E widths of the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clbench.capacity.figure import Figure, figure, undefined
from clbench.capacity.spectra import Moments

if TYPE_CHECKING:
    import torch


@dataclass
class Pairs:
    """Sums over pairs (x_i, y_i) of two representations of sample i; add what is seen of the same shifts."""

    x: Moments
    y: Moments
    cross_DE: torch.Tensor = field(init=False)
    cosines: float = 0.0
    """Sum of cos(x_i, y_i), of the vectors as they are; kept where the widths are equal."""
    n_zero: int = 0
    """Pairs with a zero vector, which has no cosine."""
    k_l: float = 0.0
    k_k: float = 0.0
    l_l: float = 0.0
    lx_D: torch.Tensor = field(init=False)
    kx_D: torch.Tensor = field(init=False)
    ky_E: torch.Tensor = field(init=False)
    ly_E: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing seen."""
        self.cross_DE = self.x.sum_D.new_zeros(self.x.width, self.y.width)
        self.lx_D, self.kx_D = self.x.sum_D.new_zeros(self.x.width), self.x.sum_D.new_zeros(self.x.width)
        self.ky_E, self.ly_E = self.y.sum_D.new_zeros(self.y.width), self.y.sum_D.new_zeros(self.y.width)

    @classmethod
    def about(cls, shift_x_D: torch.Tensor, shift_y_E: torch.Tensor) -> Pairs:
        """Return empty sums about two shifts."""
        return cls(Moments(shift_x_D), Moments(shift_y_E))

    @property
    def n(self) -> int:
        """Samples seen."""
        return self.x.n

    def add(self, x_ND: torch.Tensor, y_NE: torch.Tensor) -> None:
        """Add the vectors of the same samples."""
        x, y = self.x.add(x_ND), self.y.add(y_NE)
        self.cross_DE += x.T @ y
        k_N, l_N = x.square().sum(1), y.square().sum(1)
        self.k_l += float(k_N @ l_N)
        self.k_k += float(k_N @ k_N)
        self.l_l += float(l_N @ l_N)
        self.kx_D += k_N @ x
        self.lx_D += l_N @ x
        self.ky_E += k_N @ y
        self.ly_E += l_N @ y
        if self.x.width == self.y.width:
            raw_x, raw_y = x + self.x.shift_D, y + self.y.shift_D
            lengths_N = raw_x.norm(dim=1) * raw_y.norm(dim=1)
            there_N = lengths_N > 0
            self.cosines += float(((raw_x * raw_y).sum(1)[there_N] / lengths_N[there_N]).sum())
            self.n_zero += int((~there_N).sum())

    def __add__(self, other: Pairs) -> Pairs:
        """Return the sums over both."""
        both = Pairs(self.x + other.x, self.y + other.y)
        for name in ("cross_DE", "cosines", "n_zero", "k_l", "k_k", "l_l", "lx_D", "kx_D", "ky_E", "ly_E"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def centred_cross_DE(self) -> torch.Tensor:
        """Return sum_i (x_i - mean)(y_i - mean)^T."""
        return self.cross_DE - self.x.sum_D.outer(self.y.sum_D) / max(1, self.n)


def cka_biased(pairs: Pairs) -> Figure:
    """Return ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) of centred columns (Kornblith et al. 2019): p/(n+p) under no relation.

    For comparison with published figures and for tests; nothing else reports it.
    """
    norms = [m.scatter_DD(centred=True).norm() for m in (pairs.x, pairs.y)]
    bottom = float(norms[0] * norms[1])
    top = float(pairs.centred_cross_DE().square().sum())
    return figure(top / bottom if bottom > 0 else math.nan, "a representation does not vary")


def cka_debiased(pairs: Pairs) -> Figure:
    """Return linear CKA from debiased HSIC: 1 for x against a xQ + b, about 0 under no relation whatever n and d.

    May be slightly below 0. NaN below 4 samples, and where a debiased HSIC of one with itself is not positive.
    """
    if pairs.n < 4:
        return undefined("fewer than 4 samples")
    x, y, n = pairs.x, pairs.y, pairs.n
    xx = _hsic(n, x.products_DD, x.sum_D, x.sum_D, pairs.kx_D, pairs.kx_D, pairs.k_k)
    yy = _hsic(n, y.products_DD, y.sum_D, y.sum_D, pairs.ly_E, pairs.ly_E, pairs.l_l)
    xy = _hsic(n, pairs.cross_DE, x.sum_D, y.sum_D, pairs.lx_D, pairs.ky_E, pairs.k_l, x.products_DD, y.products_DD)
    bottom = math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan
    return figure(xy / bottom if bottom > 0 else math.nan, "a representation does not vary")


def _hsic(
    n: int,
    cross_DE: torch.Tensor,
    sum_x_D: torch.Tensor,
    sum_y_E: torch.Tensor,
    lx_D: torch.Tensor,
    ky_E: torch.Tensor,
    k_l: float,
    xx_DD: torch.Tensor | None = None,
    yy_EE: torch.Tensor | None = None,
) -> float:
    """Return debiased HSIC; see the module. ``xx_DD`` and ``yy_EE`` are ``cross_DE`` for one with itself."""
    k = float((cross_DE if xx_DD is None else xx_DD).diagonal().sum())
    l = float((cross_DE if yy_EE is None else yy_EE).diagonal().sum())  # noqa: E741 - as in the formula
    both = float(cross_DE.square().sum()) - k_l
    sums = (float(sum_x_D @ sum_x_D) - k) * (float(sum_y_E @ sum_y_E) - l) / ((n - 1) * (n - 2))
    rows = float(sum_x_D @ cross_DE @ sum_y_E) - float(sum_x_D @ lx_D) - float(sum_y_E @ ky_E) + k_l
    return (both + sums - 2 / (n - 2) * rows) / (n * (n - 3))


def procrustes(pairs: Pairs, *, least_ratio: float = 4.0) -> Figure:
    """Return the orthogonal Procrustes distance of the centred representations, each of unit Frobenius norm.

    sqrt(2 - 2 ||X'Y||_*): 0 where one is the other turned, moved and scaled, sqrt(2) where they share no direction.
    With few samples a dimension a rotation fits noise, so below ``least_ratio`` it is NaN.
    """
    import torch

    width = max(pairs.x.width, pairs.y.width)
    if pairs.n < least_ratio * width:
        return undefined(f"{pairs.n} samples of width {width}, {least_ratio:g} a dimension are wanted")
    norm = math.sqrt(max(0.0, pairs.x.squared_norm()) * max(0.0, pairs.y.squared_norm()))
    if not norm > 0:
        return undefined("a representation does not vary")
    nuclear = float(torch.linalg.svdvals(pairs.centred_cross_DE()).sum()) / norm
    return Figure(math.sqrt(max(0.0, 2 - 2 * nuclear)))


def cosine_shift(pairs: Pairs) -> Figure:
    """Return the mean of 1 - cos(x_i, y_i) over samples: how far vectors turned, coordinates as they are."""
    if pairs.x.width != pairs.y.width:
        return undefined(f"widths {pairs.x.width} and {pairs.y.width} differ")
    n = pairs.n - pairs.n_zero
    return Figure(1 - pairs.cosines / n) if n else undefined("every pair has a zero vector")


def centred_shift(pairs: Pairs) -> Figure:
    """Return 1 - tr(X'Y) / (||X||_F ||Y||_F) of the centred representations.

    A few dimensions of a language model are huge for every token and hold the plain cosine near 1; without the mean
    they count by what they vary.
    """
    if pairs.x.width != pairs.y.width:
        return undefined(f"widths {pairs.x.width} and {pairs.y.width} differ")
    bottom = math.sqrt(max(0.0, pairs.x.squared_norm()) * max(0.0, pairs.y.squared_norm()))
    top = float(pairs.centred_cross_DE().diagonal().sum())
    return figure(1 - top / bottom if bottom > 0 else math.nan, "a representation does not vary")


def figures(pairs: Pairs, *, least_ratio: float = 4.0) -> dict[str, Figure]:
    """Return every figure of two representations by name."""
    return {
        "cka_debiased": cka_debiased(pairs),
        "procrustes": procrustes(pairs, least_ratio=least_ratio),
        "cosine_shift": cosine_shift(pairs),
        "centred_shift": centred_shift(pairs),
    }
