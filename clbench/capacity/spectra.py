"""Ranks and decay of a spectrum, from sums over samples that are seen once.

``Moments`` keeps the number, the sum and the products of n vectors of width d: one ``[d, d]`` matrix of float64, 8 d^2
bytes, whatever n is. The singular values of the n x d matrix of samples are the roots of the eigenvalues of the
products; those of the covariance follow from the same matrix less the mean.

Two families have one name in the literature and differ a lot: entropies of *singular values* (RankMe, Roy and Vetterli)
and of *covariance eigenvalues*, which are squares. Here they have two names, ``rankme_sigma`` and ``erank_cov``.

Shapes: N samples, D width, K = min(N, D) values, in falling order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clbench.capacity.figure import Figure, figure, undefined

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]

EPSILON = 1e-7
"""Added to every share before its entropy is taken, as RankMe (arXiv 2210.02885) and the language-model geometry code
do."""
SRANK_DELTA = 0.01
"""Kumar et al. 2021 (arXiv 2010.14498): values that make up 1 - delta of the sum."""
FEATURE_RANK_THRESHOLD = 0.01
"""Lyle et al. 2022 (arXiv 2204.09560): singular values of Phi / sqrt(n) above it are counted."""
WIDE_RANKS = (12, 100)
"""Ranks of the alpha-ReQ fit where the width allows: as in the language-model geometry code, indices 11 to 99."""
FEWEST_RANKS = 4
"""Ranks below which a slope and its R^2 say nothing."""


@dataclass
class Moments:
    """Number, sum and products of vectors about ``shift_D``, in float64; add what is seen of the same shift.

    A shift near the mean keeps digits where the mean is large beside the spread, as in the residual stream of a
    language model; the results do not depend on it otherwise.
    """

    shift_D: torch.Tensor
    n: int = 0
    sum_D: torch.Tensor = field(init=False)
    products_DD: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing seen."""
        self.shift_D = self.shift_D.detach().double()
        width = len(self.shift_D)
        self.sum_D = self.shift_D.new_zeros(width)
        self.products_DD = self.shift_D.new_zeros(width, width)

    @property
    def width(self) -> int:
        """D."""
        return len(self.shift_D)

    def add(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Add samples of any floating type; returns them in float64, less the shift."""
        moved_ND = x_ND.detach().double() - self.shift_D
        self.n += len(moved_ND)
        self.sum_D += moved_ND.sum(0)
        self.products_DD += moved_ND.T @ moved_ND
        return moved_ND

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both.

        Raises:
            ValueError: the shifts differ.
        """
        if not self.shift_D.equal(other.shift_D):
            raise ValueError("moments about different shifts do not add up")
        both = Moments(self.shift_D, self.n + other.n)
        both.sum_D = self.sum_D + other.sum_D
        both.products_DD = self.products_DD + other.products_DD
        return both

    def mean_D(self) -> torch.Tensor:
        """Return the mean of the samples."""
        return self.shift_D + self.sum_D / max(1, self.n)

    def scatter_DD(self, *, centred: bool) -> torch.Tensor:
        """Return sum_i x_i x_i^T, of the samples or of the samples less their mean."""
        about_mean_DD = self.products_DD - self.sum_D.outer(self.sum_D) / max(1, self.n)
        if centred:
            return about_mean_DD
        mean_D = self.mean_D()
        return about_mean_DD + self.n * mean_D.outer(mean_D)

    def squared_norm(self) -> float:
        """Return the sum over samples of the squared distance from their mean."""
        return float(self.scatter_DD(centred=True).diagonal().sum())

    def eigenvalues_K(self, *, centred: bool) -> Floats:
        """Return the K largest eigenvalues of the scatter matrix in falling order, none below 0.

        At most n - 1 of a centred one are not zero.
        """
        import torch

        values = torch.linalg.eigvalsh(self.scatter_DD(centred=centred)).flip(0).clamp(min=0)
        found: Floats = values[: min(self.n - int(centred), self.width)].cpu().numpy()
        return found


# --- figures of a spectrum


def entropy_rank(values_K: Floats, *, epsilon: float = EPSILON) -> Figure:
    """Return exp(-sum p log p) with p = values / sum + epsilon.

    Of singular values: RankMe (Garrido et al. 2023, eq. 1; Roy and Vetterli's effective rank with epsilon 0). Of
    eigenvalues of a covariance: the effective rank of the language-model geometry code. k equal values give k, but for
    epsilon.
    """
    total = values_K.sum()
    if not total > 0:
        return undefined("all values are zero")
    p_K = values_K / total + epsilon
    p_K = p_K[p_K > 0]
    return Figure(float(np.exp(-np.sum(p_K * np.log(p_K)))))


def stable_rank(eigenvalues_K: Floats) -> Figure:
    """Return ||X||_F^2 / ||X||_2^2 from the squared singular values: between 1 and the rank."""
    top = eigenvalues_K.max(initial=0.0)
    return Figure(float(eigenvalues_K.sum() / top)) if top > 0 else undefined("all values are zero")


def srank(values_K: Floats, *, delta: float = SRANK_DELTA) -> Figure:
    """Return the smallest k whose k largest values make up 1 - delta of the sum.

    Of singular values: ``srank99``, what Kumar et al. define and Dohare et al.'s code calls the stable rank.
    Of their squares: ``approx_rank99``, Dohare et al.'s approximate rank.
    """
    total = values_K.sum()
    if not total > 0:
        return undefined("all values are zero")
    reached_K = np.cumsum(values_K) / total >= 1 - delta - 1e-12  # rounding of k equal values
    return Figure(float(np.argmax(reached_K) + 1))


def feature_rank(eigenvalues_K: Floats, n: int, *, threshold: float = FEATURE_RANK_THRESHOLD) -> Figure:
    """Return how many singular values of X / sqrt(n) are above the threshold (Lyle et al. 2022). Depends on scale."""
    return Figure(float(np.sum(np.sqrt(eigenvalues_K / n) > threshold)))


def alpha_ranks(width: int) -> tuple[int, int] | None:
    """Return the first and the last rank of the fit, counted from 1: 12 to 100, or 4 to d/4 where d is at most 100.

    None where fewer than ``FEWEST_RANKS`` ranks are left.
    """
    first, last = WIDE_RANKS if width > WIDE_RANKS[1] else (4, width // 4)
    return (first, last) if last - first + 1 >= FEWEST_RANKS else None


@dataclass(frozen=True)
class Decay:
    """A power law lambda_i ~ i^-alpha over ranks ``first`` to ``last``."""

    alpha: Figure
    r2: Figure
    first: int
    last: int


def alpha_req(eigenvalues_K: Floats, ranks: tuple[int, int]) -> Decay:
    """Return the decay exponent of covariance eigenvalues (alpha-ReQ, Agrawal et al. 2022, arXiv 2202.05808).

    Weighted least squares of log lambda_i on -log i with weights 1/i, as in the language-model geometry code. R^2 is
    weighted likewise. Publish the ranks beside the exponent: it depends on them.
    """
    first, last = ranks
    chosen = eigenvalues_K[first - 1 : last]
    if len(chosen) < last - first + 1 or not (chosen > 0).all():
        why = f"fewer than {last} eigenvalues are above zero"
        return Decay(undefined(why), undefined(why), first, last)
    i = np.arange(first, last + 1, dtype=np.float64)
    x, y, w = -np.log(i), np.log(chosen), (1 / i) / np.sum(1 / i)
    dx, dy = x - w @ x, y - w @ y
    slope = (w @ (dx * dy)) / (w @ dx**2)
    spread, rest = w @ dy**2, w @ (dy - slope * dx) ** 2
    flat = "all eigenvalues are equal over the ranks of the fit"
    r2 = float(1 - rest / spread) if spread > 0 else np.nan
    return Decay(Figure(float(slope)), figure(r2, flat), first, last)


def figures(moments: Moments, *, centred: bool, least_ratio: float = 4.0) -> dict[str, Figure]:
    """Return every figure of a representation by name.

    Args:
        moments: of the samples.
        centred: whether the mean is taken out first.
        least_ratio: below so many samples a dimension the figures are NaN: they would measure n, not the model.
    """
    names = ("rankme_sigma", "erank_cov", "alpha_req", "alpha_req_r2", "stable_rank", "srank99", "approx_rank99")
    if moments.n < least_ratio * moments.width:
        why = f"{moments.n} samples of width {moments.width}, {least_ratio:g} a dimension are wanted"
        return dict.fromkeys((*names, "feature_rank"), undefined(why))
    lambda_K = moments.eigenvalues_K(centred=centred)
    sigma_K = np.sqrt(lambda_K)
    ranks = alpha_ranks(moments.width)
    short = undefined(f"a width of {moments.width} leaves too few ranks for a fit")
    decay = alpha_req(lambda_K, ranks) if ranks else Decay(short, short, 0, 0)
    return {
        "rankme_sigma": entropy_rank(sigma_K),
        "erank_cov": entropy_rank(lambda_K),
        "alpha_req": decay.alpha,
        "alpha_req_r2": decay.r2,
        "stable_rank": stable_rank(lambda_K),
        "srank99": srank(sigma_K),
        "approx_rank99": srank(lambda_K),
        "feature_rank": feature_rank(lambda_K, moments.n),
    }
