"""What the Gram matrix K_ij = g_i . g_j of N gradients says about the Fisher F = mean_i g_i g_i^T, never formed.

Pure numpy, no model: ``clbench.fisher.diagnostic`` makes the Gram matrices. Every quantity comes with what pure noise
would give (an analytic floor), and those that involve the mean gradient mu also with a sign-flip null: random signs of
the g_i leave F as it is, bit for bit, and turn mu into noise, so whatever is left is not evidence about mu.

Why there are several variants of one quantity: from N gradients of P >> N coordinates the plug-in figures are biased
so far that they look like results. In-sample c* is 1 under pure noise, in-sample |cos| is 1/sqrt(N), and the diagonal's
plug-in error is 1 also where F *is* diagonal. *Unbiased* figures leave out what a gradient has with itself
(U-statistics over distinct samples); *cross-fitted* ones take the direction from one half of the samples and measure it
on the other, averaged over random halves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clbench import seeds

Floats = NDArray[np.float64]
N_SPLITS = 16
"""Random halves that a cross-fitted quantity is averaged over, each used both ways."""
N_EIGEN_SPLITS = 4
"""The same where every half costs an eigendecomposition."""
N_SIGN_FLIPS = 60
"""Draws of the null. The smallest p-value is 1/61."""
ALPHA = 0.05
"""Share of the null's draws beyond the bound that is shown beside a quantity."""
Better = Literal["high", "low", "none"]
"""Which side of its noise floor speaks for a rank-1 Fisher along mu."""

PERFECT: dict[str, tuple[float | None, Better]] = {
    "kappa": (None, "high"),
    "kappa_plugin": (None, "high"),
    "noise_scale": (None, "low"),
    "top_share": (1.0, "high"),
    "eigen_ratio": (0.0, "low"),
    "effective_rank": (1.0, "low"),
    "mean_abs_cos": (1.0, "high"),
    "alignment": (1.0, "high"),
    "split_half": (1.0, "high"),
    "captured": (1.0, "high"),
    "top_captured": (1.0, "high"),
    "rank1_error": (0.0, "low"),
    "rank1_error_unbiased": (0.0, "low"),
    "rank1_error_plugin": (0.0, "low"),
    "best_rank1_error": (0.0, "low"),
    "best_rank1_error_plugin": (0.0, "low"),
    "diagonal_error": (None, "low"),
    "diagonal_error_plugin": (None, "low"),
    "c_star": (None, "high"),
    "c_star_unbiased": (None, "none"),
    "c_star_plugin": (None, "none"),
    "rho": (None, "high"),
    "rho_plugin": (None, "high"),
    "trace": (None, "none"),
}
"""Quantity -> what exactly collinear gradients give (None: no one number), and which side speaks for rank 1."""


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of N gradients over some parameters, and sums that it does not hold.

    Grams of disjoint sets of parameters add up: ``a + b`` is that of both.
    """

    k_NN: Floats
    n_parameters: int
    diagonal: tuple[float, float] | None = None
    """(||diag F||^2 = sum_p (mean_i g_ip^2)^2, sum_ip g_ip^4); None where it was not kept."""
    along: Mapping[str, tuple[Floats, float]] = field(default_factory=dict)
    """Direction d, such as the weights -> (g_i . d, shape ``[N]``; ||d||^2)."""
    sketch_dims: int | None = None
    """Dimensions that every part was projected to; None: K is exact."""
    sketch_NN: Floats | None = None
    """Variance of every entry of K that comes from the projection."""

    def __add__(self, other: Gram) -> Gram:
        """Return the Gram of both sets of parameters."""
        both = self.diagonal is not None and other.diagonal is not None
        sketches = [one.sketch_NN for one in (self, other) if one.sketch_NN is not None]
        return Gram(
            k_NN=self.k_NN + other.k_NN,
            n_parameters=self.n_parameters + other.n_parameters,
            diagonal=tuple(a + b for a, b in zip(self.diagonal, other.diagonal, strict=True)) if both else None,  # type: ignore[arg-type]
            along={
                name: (self.along[name][0] + other.along[name][0], self.along[name][1] + other.along[name][1])
                for name in self.along
                if name in other.along
            },
            sketch_dims=self.sketch_dims or other.sketch_dims,
            sketch_NN=sum(sketches[1:], sketches[0]) if sketches else None,
        )


@dataclass(frozen=True)
class Quantity:
    """One figure beside what noise gives; None where it is not defined (mu indistinguishable from 0)."""

    name: str
    value: float | None
    floor: float | None = None
    """Expected under pure noise, analytically; see docs/fisher.md for the formulas."""
    null_mean: float | None = None
    """Mean over random signs of the gradients."""
    null_bound: float | None = None
    """What 95 % of the null's draws stay below (or above, where low is better)."""
    p: float | None = None
    """Share of the null's draws that are at least as good, (1 + n) / (1 + draws)."""

    def as_dict(self) -> dict[str, float | None]:
        """Return the JSON-able form."""
        return {name: getattr(self, name) for name in ("value", "floor", "null_mean", "null_bound", "p")}


def measure(gram: Gram, *, seed: int = 0) -> dict[str, Quantity]:
    """Return every quantity of one Gram matrix by name, in the order of ``PERFECT``, then the directions' cosines.

    Args:
        gram: at least 4 samples, not all of them zero.
        seed: of the random halves and signs.
    """
    n = len(gram.k_NN)
    halves = _halves(n, seed)
    eigenvalues, w_NN = np.linalg.eigh(gram.k_NN / n)
    top = float(eigenvalues[-1])
    values = _of_fisher(gram, eigenvalues, halves) | _of_mean(gram, gram.k_NN, top, w_NN[:, -1], halves)
    nulls: dict[str, list[float]] = {}
    generator = seeds.generator(seed, "fisher", "signs", n)
    for _ in range(N_SIGN_FLIPS):
        e_N = generator.choice(np.array([-1.0, 1.0]), n)
        flipped_NN = gram.k_NN * np.outer(e_N, e_N)
        for name, value in _of_mean(gram, flipped_NN, top, w_NN[:, -1] * e_N, halves, e_N).items():
            nulls.setdefault(name, []).append(math.nan if value is None else value)
    floors = floors_of(gram, values)
    order = [name for name in PERFECT if name in values] + [name for name in values if name not in PERFECT]
    return {name: _with_null(name, values[name], floors.get(name), nulls.get(name)) for name in order}


def _with_null(name: str, value: float | None, floor: float | None, null: list[float] | None) -> Quantity:
    """Return a quantity with the null's mean, bound and p-value; a draw without a value is as bad as can be."""
    value = value if value is not None and math.isfinite(value) else None
    if null is None:
        return Quantity(name, value, floor)
    draws, better = np.array(null), PERFECT.get(name, (1.0, "high"))[1]
    known = draws[np.isfinite(draws)]
    if not len(known) or better == "none":
        return Quantity(name, value, floor, float(known.mean()) if len(known) else None)
    sign = -1.0 if better == "low" else 1.0
    if name.startswith("cos_"):  # signed: either sign may be evidence
        worst, beyond = np.abs(known), None if value is None else np.abs(draws) >= abs(value)
    else:
        worst, beyond = sign * known, None if value is None else sign * draws >= sign * value
    p = None if beyond is None else float((1 + beyond.sum()) / (1 + len(draws)))
    bound = float(np.quantile(worst, 1 - ALPHA)) * (1.0 if name.startswith("cos_") else sign) + 0.0
    return Quantity(name, value, floor, float(known.mean()), bound, p)


def _of_fisher(gram: Gram, eigenvalues: Floats, halves: list[NDArray[np.bool_]]) -> dict[str, float | None]:
    """Return what depends on F alone: the spectrum, the best rank-1 and the diagonal approximation."""
    k, n = gram.k_NN, len(gram.k_NN)
    trace, top = float(np.trace(k)) / n, float(eigenvalues[-1])
    f2, f2_plugin = squared_norms(gram)
    found: dict[str, float | None] = {
        "trace": trace,
        "top_share": top / trace,
        "eigen_ratio": max(0.0, float(eigenvalues[-2])) / top,
        "effective_rank": trace**2 / f2 if f2 > 0 else None,
        "best_rank1_error_plugin": relative_error(top**2, f2_plugin),
    }
    captured = float(np.mean([_top_captured(k, half) for half in halves[:N_EIGEN_SPLITS]]))
    found["top_captured"] = captured / trace
    found["best_rank1_error"] = relative_error(captured**2, f2)
    if gram.diagonal is not None:
        plugin, fourth = gram.diagonal
        unbiased = (n**2 * plugin - fourth) / (n * (n - 1))  # pairs of distinct samples only
        found["diagonal_error"] = relative_error(unbiased, f2)
        found["diagonal_error_plugin"] = relative_error(plugin, f2_plugin)
    return found


def squared_norms(gram: Gram) -> tuple[float, float]:
    """Return ||F||_F^2 over pairs of distinct samples (unbiased), and over all pairs (that of the empirical F).

    Both less what a projection adds to the squares.
    """
    k, n = gram.k_NN, len(gram.k_NN)
    squares = k**2
    if gram.sketch_NN is not None:
        squares = squares - gram.sketch_NN
    within = float(np.sum(np.diagonal(k) ** 2))  # norms are exact also where K is projected
    between = float(squares.sum() - np.trace(squares))
    return between / (n * (n - 1)), (between + within) / n**2


def relative_error(squared_part: float, squared_norm: float) -> float | None:
    """Return ||F - approximation||_F / ||F||_F of F's projection of squared norm ``squared_part``."""
    return math.sqrt(max(0.0, 1 - squared_part / squared_norm)) if squared_norm > 0 else None


def _top_captured(k: Floats, half: NDArray[np.bool_]) -> float:
    """Return u^T F u, u the top eigenvector of one half of the samples and F that of the other, mean of both ways."""
    shares = []
    for a in (half, ~half):
        values, vectors = np.linalg.eigh(k[np.ix_(a, a)])
        q = k[np.ix_(~a, a)] @ vectors[:, -1] / math.sqrt(max(float(values[-1]), 1e-300))
        shares.append(float(np.mean(q**2)))
    return float(np.mean(shares))


def _of_mean(
    gram: Gram, k: Floats, top: float, w_N: Floats, halves: list[NDArray[np.bool_]], e_N: Floats | float = 1.0
) -> dict[str, float | None]:
    """Return what involves the mean gradient; ``k`` and ``w_N`` may have the signs ``e_N`` in them."""
    n = len(k)
    trace, norms_N = float(np.trace(k)) / n, np.diagonal(k)
    m_N = k.mean(axis=1)  # mu . g_i
    mu2 = max(float(m_N.mean()), 1e-300)
    mu2_unbiased = (n * mu2 - trace) / (n - 1)
    kappa = mu2_unbiased / trace
    f2, f2_plugin = squared_norms(gram)
    captured = float(np.mean(m_N**2)) / mu2  # rho: u^T F u along u = mu / ||mu||
    rest_N = n * m_N - norms_N  # g_i . (sum of the others)
    rest2_N = np.maximum(n * n * mu2 - 2 * n * m_N + norms_N, 1e-300)
    found: dict[str, float | None] = {
        "kappa": kappa,
        "kappa_plugin": mu2 / trace,
        "noise_scale": (1 - kappa) / kappa if kappa > 0 else None,
        "mean_abs_cos": float(np.mean(np.abs(rest_N) / np.sqrt(np.maximum(norms_N, 1e-300) * rest2_N))),
        "alignment": min(1.0, abs(float(w_N.sum())) * math.sqrt(n * max(top, 0.0)) / (n * math.sqrt(mu2))),
        "rank1_error_plugin": relative_error(captured**2, f2_plugin),
        "rho_plugin": captured,
        "c_star_plugin": captured / mu2,
    }
    found |= _unbiased(gram, k, rest_N, mu2_unbiased, f2)
    found |= _cross_fitted(k, halves, f2, trace)
    for name, (a_N, norm2) in gram.along.items():
        found[f"cos_{name}"] = float(np.mean(a_N * e_N)) / math.sqrt(mu2 * norm2) if norm2 > 0 else None
    return found


def _unbiased(gram: Gram, k: Floats, rest_N: Floats, mu2: float, f2: float) -> dict[str, float | None]:
    """Return c* and the error along mu from triples of distinct samples; undefined unless ||mu||^2 > 0 is seen."""
    n = len(k)
    if mu2 <= 0:
        return {"c_star_unbiased": None, "rank1_error_unbiased": None}
    squares = (k**2).sum(axis=1) - np.diagonal(k) ** 2
    mu_f_mu = float((rest_N**2 - squares).sum()) / (n * (n - 1) * (n - 2))
    if gram.sketch_dims:  # two inner products with one projected g_k share its noise
        mu_f_mu -= mu2 * float(np.trace(k)) / n / gram.sketch_dims
    if mu_f_mu <= 0:
        return {"c_star_unbiased": None, "rank1_error_unbiased": None}
    return {
        "c_star_unbiased": mu_f_mu / mu2**2,
        "rank1_error_unbiased": relative_error((mu_f_mu / mu2) ** 2, f2),
    }


def _cross_fitted(k: Floats, halves: list[NDArray[np.bool_]], f2: float, trace: float) -> dict[str, float | None]:
    """Return what a mean gradient from half of the samples is worth on the other half."""
    a_NS = np.stack([h / h.sum() for h in halves] + [~h / (~h).sum() for h in halves], axis=1)
    q_NS = k @ a_NS
    mu2_S = np.maximum(np.einsum("ns,ns->s", a_NS, q_NS), 1e-300)
    other_NS = np.roll(a_NS, len(halves), axis=1)
    rho_S = np.einsum("ns,ns->s", other_NS, q_NS**2) / mu2_S
    cos_S = np.einsum("ns,ns->s", other_NS, q_NS) / np.sqrt(mu2_S * np.roll(mu2_S, len(halves)))
    rho = float(rho_S.mean())
    return {
        "split_half": float(cos_S.mean()),
        "rho": rho,
        "captured": rho / trace,
        "c_star": float(np.mean(rho_S / mu2_S)),
        "rank1_error": relative_error(rho**2, f2),
    }


def _halves(n: int, seed: int) -> list[NDArray[np.bool_]]:
    """Return random halves of n samples as masks."""
    found = []
    for i in range(N_SPLITS):
        mask = np.zeros(n, dtype=bool)
        mask[seeds.permutation(n, seed, "fisher", "halves", i)[: n // 2]] = True
        found.append(mask)
    return found


def floors_of(gram: Gram, values: Mapping[str, float | None]) -> dict[str, float]:
    """Return what pure noise gives, in closed form (research notes 1.7, and derived in docs/fisher.md).

    Two kinds: *isotropic* noise in P dimensions for what depends on F alone (spectrum, diagonal); noise of the F that
    was found, with effective rank d = tr(F)^2/||F||_F^2, for what depends on mu.
    """
    n = len(gram.k_NN)
    p = float(gram.n_parameters)
    if gram.sketch_dims:
        p = 1 / (1 / p + 1 / gram.sketch_dims)  # a projection to k dimensions has at least the spread of k dimensions
    edge = (1 + math.sqrt(n / p)) ** 2 / n  # Marchenko-Pastur
    rank = max(1.0, values.get("effective_rank") or p)
    chance = math.sqrt(2 / math.pi)  # E|z| of a standard normal
    return {
        "kappa": 0.0,
        "kappa_plugin": 1 / n,
        "top_share": min(1.0, edge),
        "eigen_ratio": 1.0,
        "effective_rank": float(gram.n_parameters),
        "mean_abs_cos": chance / math.sqrt(rank),
        "alignment": chance * math.sqrt(values["top_share"] or 0.0),
        "split_half": 0.0,
        "captured": 1 / rank,
        "top_captured": 1 / gram.n_parameters,
        "rank1_error": math.sqrt(1 - 1 / rank),
        "rank1_error_unbiased": 1.0,
        "rank1_error_plugin": math.sqrt(max(0.0, 1 - (1 + n / p) / n)),
        "best_rank1_error": math.sqrt(1 - 1 / gram.n_parameters),
        "best_rank1_error_plugin": math.sqrt(max(0.0, 1 - edge**2 / (1 / n + 1 / p))),
        "diagonal_error": 0.0,
        "diagonal_error_plugin": math.sqrt(gram.n_parameters / (n + gram.n_parameters)),
        "c_star": n / 2 / rank,
        "c_star_plugin": 1.0,
        **{f"cos_{name}": 0.0 for name in gram.along},
    }


def summary_values(quantities: Mapping[str, Quantity]) -> dict[str, Any]:
    """Return quantity -> JSON-able fields."""
    return {name: one.as_dict() for name, one in quantities.items()}
