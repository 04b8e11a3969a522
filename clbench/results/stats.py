"""Intervals and tests that say what they are: t over seeds, bootstrap over documents, Holm, rank ranges.

The unit of replication is the training seed. Documents are a second, nested level: resampling them tells how
well the *models at hand* were measured, not how a method behaves, so it is labelled evaluation noise.
Undefined is NaN with a reason. Everything random comes from named streams of ``clbench.seeds``. Protocol:
docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from clbench.errors import ClbenchError
from clbench.results.matrix import Array, Documents, Matrix, Unit
from clbench.seeds import generator
from clbench.stream import identity_of

LEVEL = 0.95
N_RESAMPLES = 10_000
CHUNK_WEIGHTS = 4_000_000
"""Resampling weights held at once: 32 MB."""

OVER_SEEDS = "t over seeds"
OVER_DOCUMENTS = "bootstrap over documents (evaluation noise)"
NONE = "none"


@dataclass(frozen=True)
class Interval:
    """A value with its interval.

    ``n`` counts seeds or documents, whatever ``kind`` varies; ``p`` is the two-sided p-value of zero (for
    differences); ``reason`` says why value, bounds or p are NaN.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    kind: str = NONE
    p: float = math.nan
    reason: str | None = None


# seeds


def t_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Return mean +- t(n-1) * s / sqrt(n) over seeds, with the p-value of the one-sample t-test against 0.

    The percentile bootstrap covers 75% instead of 95% with three seeds, the t-interval 94-95%. One value, or
    values that do not vary, give no interval: there is nothing to estimate the spread from.
    """
    sample = np.asarray(values, dtype=np.float64)
    n = len(sample)
    if n == 0 or not np.all(np.isfinite(sample)):
        return Interval(math.nan, n=n, reason="no seed has a value" if n == 0 else "a seed has no value")
    mean = float(sample.mean())
    if n == 1:
        return Interval(mean, n=1, reason="one seed: the spread between seeds is unknown")
    if no_variance(sample):
        return Interval(mean, n=n, reason=f"no variance between {n} seeds")
    error = float(sample.std(ddof=1)) / math.sqrt(n)
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    p = float(2 * special.stdtr(n - 1, -abs(mean) / error))
    return Interval(mean, mean - half, mean + half, n, OVER_SEEDS, p)


def no_variance(sample: Array) -> bool:
    """Return whether all values are equal up to rounding."""
    return bool(np.ptp(sample) <= 1e-12 * max(1.0, float(np.abs(sample).max())))


def paired_t(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Interval:
    """Return the t-interval of the per-seed differences a - b; both in the same order of seeds."""
    return t_interval(_differences(a, b), level)


def _differences(a: ArrayLike, b: ArrayLike) -> Array:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ClbenchError(
            f"{first.size} and {second.size} values cannot be paired", mend="give one value per common seed"
        )
    return first - second


def sign_flip(differences: ArrayLike, n_resamples: int = N_RESAMPLES) -> float:
    """Return the two-sided p-value of the sign-flip permutation test of paired differences.

    Exact (all 2^n sign patterns) up to n = 16, else ``n_resamples`` random patterns with the observed one.
    The smallest p is 2 / 2^n: five seeds can never reach 0.05.
    """
    sample = np.asarray(differences, dtype=np.float64)
    n = len(sample)
    if n == 0 or not np.all(np.isfinite(sample)):
        return math.nan
    if n <= 16:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = generator(0, "sign_flip", n).choice([-1.0, 1.0], size=(n_resamples, n))
        signs[0] = 1.0
    sums = np.abs(signs @ sample)
    return float(np.mean(sums >= abs(sample.sum()) * (1 - 1e-12)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given; NaN stays NaN but counts as a hypothesis.

    adjusted_(j) = max over the first j of (m - rank) * p, at most 1; reject where it is below alpha.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    largest = 0.0
    order = [int(j) for j in np.argsort(p, kind="stable") if not np.isnan(p[j])]
    for rank, j in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * float(p[j])))
        adjusted[j] = largest
    return [float(v) for v in adjusted]


# effect sizes


@dataclass(frozen=True)
class Effect:
    """A standardised mean difference with its interval; ``df`` degrees of freedom."""

    value: float
    low: float = math.nan
    high: float = math.nan
    df: int = 0
    reason: str | None = None


def small_sample_factor(df: int) -> float:
    """Return J(df) = Gamma(df/2) / (sqrt(df/2) Gamma((df-1)/2)), about 1 - 3/(4 df - 1); NaN below df = 2."""
    if df < 2:
        return math.nan
    return math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)


def hedges_g(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Effect:
    """Return Hedges' g = J(df) (mean a - mean b) / s_pooled, df = n_a + n_b - 2, for independent groups.

    The interval inverts the noncentral t distribution. On three seeds it is enormous; print it.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    df = len(x) + len(y) - 2
    if min(len(x), len(y)) < 2:
        return Effect(math.nan, df=df, reason="fewer than two values in a group")
    pooled = math.sqrt(float((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / df)
    if pooled == 0:
        same = bool(x.mean() == y.mean())
        return Effect(0.0 if same else math.nan, df=df, reason="no variance within the groups")
    scale = math.sqrt(len(x) * len(y) / (len(x) + len(y)))
    t = float(x.mean() - y.mean()) / pooled * scale
    factor = small_sample_factor(df) / scale
    low, high = _noncentrality(t, df, level)
    reason = None if math.isfinite(low + high) else "the noncentral t distribution could not be inverted"
    return Effect(factor * t, factor * low, factor * high, df, reason)


def _noncentrality(t: float, df: int, level: float) -> tuple[float, float]:
    """Return the noncentralities that put ``t`` at the upper and at the lower tail; NaN if not found."""
    bounds = []
    for tail, step in (((1 + level) / 2, -1.0), ((1 - level) / 2, 1.0)):

        def gap(delta: float, tail: float = tail) -> float:
            return float(special.nctdtr(df, delta, t)) - tail

        far = t + step
        while math.isfinite(gap(far)) and gap(far) * step > 0 and abs(far - t) < 1e4:
            far = t + 2 * (far - t)
        near, here = gap(t), gap(far)
        found = math.isfinite(near) and math.isfinite(here) and near * here < 0
        bounds.append(float(optimize.brentq(gap, t, far)) if found else math.nan)
    return bounds[0], bounds[1]


def paired_effects(a: ArrayLike, b: ArrayLike) -> dict[Literal["d_z", "d_av"], Effect]:
    """Return both paired effect sizes, each with J(n - 1).

    ``d_z`` = mean difference / SD of the differences (grows with the correlation of the pairs);
    ``d_av`` = mean difference / mean of the two SDs.
    """
    difference = _differences(a, b)
    df = len(difference) - 1
    if df < 2:
        few = Effect(math.nan, df=df, reason="fewer than three pairs")
        return {"d_z": few, "d_av": few}
    spreads: dict[Literal["d_z", "d_av"], float] = {
        "d_z": float(difference.std(ddof=1)),
        "d_av": float(np.std(np.asarray(a), ddof=1) + np.std(np.asarray(b), ddof=1)) / 2,
    }
    mean = small_sample_factor(df) * float(difference.mean())
    return {
        name: Effect(mean / spread, df=df) if spread > 0 else Effect(math.nan, df=df, reason="no variance")
        for name, spread in spreads.items()
    }


# documents


def resample(
    systems: Sequence[Documents],
    unit: Unit,
    column_stages: Sequence[int],
    *,
    n_resamples: int = N_RESAMPLES,
    root: int | str = "bootstrap",
) -> list[Matrix]:
    """Return the matrices of each system on resampled documents, the *same* documents for all of them.

    Identities (all versions of one document) are drawn with replacement, stratified by the period in which an
    identity first appears; without recurring documents that is stratified by period. Each cell is again the
    ratio of sums, so long documents weigh more.

    Args:
        systems: runs measured on the same documents; their rows may differ.
        unit: of the matrices.
        column_stages: periods, ``[C]``.
        n_resamples: B.
        root: seed of the resampling.

    Returns:
        one Matrix per system, values ``[B, R, C]``.

    Raises:
        ClbenchError: the systems were not measured on the same documents.
    """
    _check_same_documents(systems)
    values = [np.full((n_resamples, len(s.row_stages), len(column_stages)), np.nan) for s in systems]
    stage = systems[0].stage
    _, identity = np.unique([identity_of(item) for item in systems[0].item.tolist()], return_inverse=True)
    columns = [np.flatnonzero(stage == column) for column in column_stages]
    for start, counts in _resampled_counts(stage, identity, n_resamples, root):
        chunk = slice(start, start + len(counts))
        for place, here in enumerate(columns):
            drawn = counts[:, identity[here]]
            for system, out in zip(systems, values, strict=True):
                weights = drawn @ system.per(unit)[here]
                with np.errstate(invalid="ignore", divide="ignore"):
                    out[chunk, :, place] = (drawn @ system.value[:, here].T) / weights[:, None]
    return [
        Matrix(out, system.row_stages, tuple(column_stages), unit) for system, out in zip(systems, values, strict=True)
    ]


def _check_same_documents(systems: Sequence[Documents]) -> None:
    first = systems[0]
    for other in systems[1:]:
        if not (np.array_equal(first.stage, other.stage) and np.array_equal(first.item, other.item)):
            raise ClbenchError(
                "the runs were not measured on the same documents, so they cannot be paired",
                mend="measure both on the same stream",
            )


def _resampled_counts(
    stage: NDArray[np.int64], identity: NDArray[np.int64], n_resamples: int, root: int | str
) -> Iterator[tuple[int, Array]]:
    """Yield (first resample, how often each identity is drawn [chunk, n_identities]) until B are through."""
    n_identities = int(identity.max()) + 1 if len(identity) else 0
    first_stage = np.full(n_identities, np.iinfo(np.int64).max)
    np.minimum.at(first_stage, identity, stage)
    strata = [np.flatnonzero(first_stage == value) for value in np.unique(first_stage)]
    rng = generator(root, "documents", n_resamples)
    size = max(1, min(n_resamples, CHUNK_WEIGHTS // max(1, n_identities)))
    for start in range(0, n_resamples, size):
        n = min(size, n_resamples - start)
        counts = np.zeros((n, n_identities))
        for members in strata:
            m = len(members)
            drawn = rng.integers(0, m, size=(n, m)) + m * np.arange(n)[:, None]
            counts[:, members] = np.bincount(drawn.ravel(), minlength=n * m).reshape(n, m)
        yield start, counts


def bootstrap_interval(value: float, resamples: Array, n_documents: int, level: float = LEVEL) -> Interval:
    """Return the percentile interval of a value from its resamples ``[B]``, labelled evaluation noise.

    p = 2 min(#{<= 0} + 1, #{>= 0} + 1) / (B + 1).
    """
    if not math.isfinite(value) or not np.all(np.isfinite(resamples)):
        return Interval(value, n=n_documents, reason="some resamples of the documents leave it undefined")
    low, high = np.quantile(resamples, [(1 - level) / 2, (1 + level) / 2])
    tail = min(int((resamples <= 0).sum()), int((resamples >= 0).sum())) + 1
    p = min(1.0, 2 * tail / (len(resamples) + 1))
    return Interval(value, float(low), float(high), n_documents, OVER_DOCUMENTS, p)


# ranks


@dataclass(frozen=True)
class RankRange:
    """The ranks a method may have, 1 = best; ``reason`` says why it could not be narrowed."""

    best: int
    worst: int
    reason: str | None = None


def rank_ranges(
    labels: Sequence[str],
    pairs: Mapping[tuple[str, str], Interval],
    *,
    direction: Literal["lower", "higher"],
    alpha: float = 1 - LEVEL,
) -> dict[str, RankRange]:
    """Return each method's best and worst possible rank from pairwise differences, Holm over all pairs.

    best = 1 + number of methods that beat it, worst = number of methods - number that it beats. A pair
    without a p-value over seeds (one seed, no variance) decides nothing: one seed is never ranked.

    Args:
        labels: the methods.
        pairs: (a, b) -> interval of a - b; each pair once.
        direction: which way is better.
        alpha: family-wise error over all pairs.
    """
    usable = {pair: i.p if i.kind == OVER_SEEDS else math.nan for pair, i in pairs.items()}
    adjusted = dict(zip(usable, holm(list(usable.values())), strict=True))
    losses = dict.fromkeys(labels, 0)
    wins = dict.fromkeys(labels, 0)
    for (a, b), p in adjusted.items():
        if p < alpha:
            a_better = (pairs[a, b].value < 0) == (direction == "lower")
            wins[a if a_better else b] += 1
            losses[b if a_better else a] += 1
    return {
        label: RankRange(1 + losses[label], len(labels) - wins[label], _undecided(label, pairs, usable))
        for label in labels
    }


def _undecided(
    label: str, pairs: Mapping[tuple[str, str], Interval], p_values: Mapping[tuple[str, str], float]
) -> str | None:
    """Return why a pair of this method could not be tested, if any."""
    for a, b in pairs:
        if label in (a, b) and math.isnan(p_values[a, b]):
            other = b if label == a else a
            return f"not compared with {other}: {pairs[a, b].reason or 'one common seed, evaluation noise only'}"
    return None
