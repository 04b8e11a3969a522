"""Intervals and tests against scipy, tables, hand examples and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from clbench.errors import ClbenchError
from clbench.results import metrics, stats
from clbench.results.matrix import Array, Documents
from clbench.seeds import generator


def documents(
    value: Array, stage: list[int], n_tokens: list[int] | None = None, items: list[str] | None = None
) -> Documents:
    n = value.shape[1]
    tokens = np.array(n_tokens or [1] * n)
    names = np.array(items or [f"d{i:05d}" for i in range(n)])
    return Documents(value, tuple(range(len(value))), np.array(stage), names, tokens, 4 * tokens)


# seeds


def test_t_interval_is_scipys() -> None:
    values = [2.1, 2.4, 1.9, 2.2]
    interval = stats.t_interval(values)
    expected = scipy_stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert (interval.low, interval.high, interval.p) == pytest.approx((low, high, expected.pvalue))
    assert (interval.value, interval.n, interval.kind) == (pytest.approx(2.15), 4, stats.OVER_SEEDS)


@pytest.mark.parametrize(("n", "half"), [(3, 2.48), (4, 1.59), (5, 1.24), (6, 1.05), (8, 0.84), (10, 0.72)])
def test_half_width_in_standard_deviations(n: int, half: float) -> None:
    values = generator(0, "half", n).standard_normal(n)
    interval = stats.t_interval(values)
    assert (interval.high - interval.low) / 2 / values.std(ddof=1) == pytest.approx(half, abs=0.0051)


def test_paired_t_is_scipys() -> None:
    a, b = [1.0, 2.0, 4.0], [0.5, 1.8, 3.1]
    expected = scipy_stats.ttest_rel(a, b)
    interval = stats.paired_t(a, b)
    low, high = expected.confidence_interval(0.95)
    assert (interval.low, interval.high, interval.p) == pytest.approx((low, high, expected.pvalue))
    with pytest.raises(ClbenchError, match="3 and 2 values cannot be paired"):
        stats.paired_t(a, b[:2])


@pytest.mark.parametrize(
    ("values", "mean", "reason"),
    [
        ([], math.nan, "no seed"),
        ([1.5], 1.5, "one seed"),
        ([1.5, 1.5, 1.5], 1.5, "no variance"),
        ([0.1 + 0.2, 0.3], 0.3, "no variance"),
        ([1.0, math.nan], math.nan, "a seed has no value"),
    ],
)
def test_no_interval_where_there_is_no_spread(values: list[float], mean: float, reason: str) -> None:
    interval = stats.t_interval(values)
    assert interval.value == pytest.approx(mean, nan_ok=True)
    assert math.isnan(interval.low) and math.isnan(interval.high) and math.isnan(interval.p)
    assert interval.kind == stats.NONE
    assert reason in (interval.reason or "")


def test_coverage_with_three_seeds() -> None:
    """The t-interval holds its 95%; the percentile bootstrap of three values, for comparison, does not."""
    rng = generator(0, "coverage")
    samples = rng.standard_normal((1_500, 3))
    covered = [i.low <= 0 <= i.high for i in map(stats.t_interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.017)
    means = samples[np.arange(1_500)[:, None, None], rng.integers(0, 3, (1_500, 200, 3))].mean(axis=2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.80


def test_sign_flip() -> None:
    assert stats.sign_flip([0.1, 0.2, 0.3, 0.4, 0.5]) == 0.0625
    assert stats.sign_flip([-1.0, -2.0, -3.0]) == 0.25
    assert stats.sign_flip([1.0, -1.0]) == 1.0
    assert stats.sign_flip([3.0, -1.0, 2.0]) == 0.5  # |sum| >= 4 for 4 of the 8 patterns: 6, 4, -6, -4
    assert math.isnan(stats.sign_flip([]))
    assert math.isnan(stats.sign_flip([1.0, math.nan]))


def test_sign_flip_by_chance_agrees_with_scipy() -> None:
    differences = generator(0, "flips").standard_normal(30) + 0.35
    expected = scipy_stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    assert stats.sign_flip(differences) == pytest.approx(expected.pvalue, abs=0.01)
    assert stats.sign_flip(differences) == stats.sign_flip(differences)


def test_holm() -> None:
    """By hand: sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made monotone."""
    assert stats.holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []
    assert stats.holm([0.01, math.nan]) == pytest.approx([0.02, math.nan], nan_ok=True)


# effect sizes


@pytest.mark.parametrize(
    ("df", "factor"),
    [
        (2, 0.5642),
        (3, 0.7236),
        (4, 0.7979),
        (6, 0.8686),
        (8, 0.9027),
        (10, 0.9227),
        (18, 0.9576),
        (38, 0.9801),
    ],
)
def test_small_sample_factor(df: int, factor: float) -> None:
    assert stats.small_sample_factor(df) == pytest.approx(factor, abs=5e-5)


def test_hedges_g() -> None:
    same = stats.hedges_g([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert same.value == 0.0
    assert same.low == pytest.approx(-same.high, abs=1e-6)
    # means 3 and 2, pooled SD 1, df 4
    effect = stats.hedges_g([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert effect.value == pytest.approx(0.7979, abs=5e-5)
    assert effect.low < 0 < effect.value < effect.high
    scale = stats.small_sample_factor(4) / math.sqrt(1.5)
    t = math.sqrt(1.5)
    assert scipy_stats.nct.cdf(t, 4, effect.low / scale) == pytest.approx(0.975, abs=1e-6)
    assert scipy_stats.nct.cdf(t, 4, effect.high / scale) == pytest.approx(0.025, abs=1e-6)


def test_undefined_effects() -> None:
    assert stats.hedges_g([1.0], [1.0, 2.0]).reason == "fewer than two values in a group"
    assert math.isnan(stats.hedges_g([1.0, 1.0], [2.0, 2.0]).value)
    assert math.isnan(stats.paired_effects([1.0, 2.0], [1.0, 3.0])["d_z"].value)


def test_paired_effects() -> None:
    """Differences 1, 2, 3: mean 2, SD 1; the two SDs are 3 and 4."""
    effects = stats.paired_effects([1.0, 5.0, 9.0], [0.0, 3.0, 6.0])
    factor = stats.small_sample_factor(2)
    assert effects["d_z"].value == pytest.approx(factor * 2.0)
    assert effects["d_av"].value == pytest.approx(factor * 2.0 / 3.5)


# documents


def test_equal_documents_give_zero_width() -> None:
    system = documents(np.full((2, 30), 6.0), [0] * 10 + [1] * 20, [3] * 30)
    (drawn,) = stats.resample([system], "nats_per_token", (0, 1), n_resamples=500)
    assert drawn.values.shape == (500, 2, 2)
    value = metrics.backward(drawn)
    interval = stats.bootstrap_interval(2.0, value.array, system.n)
    assert (interval.low, interval.high) == (2.0, 2.0)
    assert interval.kind == "bootstrap over documents (evaluation noise)"


def test_bootstrap_is_close_to_the_normal_interval() -> None:
    """A mean over 800 documents of equal length: mean +- 1.96 s / sqrt(n)."""
    values = 3 + generator(0, "normal").standard_normal((1, 800))
    (drawn,) = stats.resample([documents(values, [0] * 800)], "nats_per_token", (0,))
    interval = stats.bootstrap_interval(float(values.mean()), drawn.at(0, 0), 800)
    half = 1.959964 * values.std() / math.sqrt(800)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_ratio_estimator_against_the_delta_method() -> None:
    rng = generator(0, "ratio")
    n_tokens = rng.integers(10, 500, 400)
    nll = n_tokens * (2.0 + 0.3 * rng.standard_normal(400))
    (drawn,) = stats.resample([documents(nll[None], [0] * 400, n_tokens.tolist())], "nats_per_token", (0,))
    ratio = nll.sum() / n_tokens.sum()
    expected = math.sqrt(((nll - ratio * n_tokens) ** 2).sum()) / n_tokens.sum()
    assert drawn.at(0, 0).std() == pytest.approx(expected, rel=0.04)


def test_pairing_removes_what_both_share() -> None:
    """Both systems on the same documents, b worse by 0.1 everywhere: the difference has no noise at all."""
    hard = 3 + generator(0, "hard").standard_normal((2, 100))
    a, b = documents(hard, [0] * 50 + [1] * 50), documents(hard + 0.1, [0] * 50 + [1] * 50)
    first, second = stats.resample([a, b], "nats_per_token", (0, 1), n_resamples=1_000)
    difference = metrics.backward(second).array - metrics.backward(first).array
    assert difference == pytest.approx(0.1, abs=1e-12)
    assert metrics.backward(first).array.std() > 0.05


def test_periods_are_strata_and_versions_stay_together() -> None:
    """Equal values within a period: strata keep each cell fixed. Shared identities are drawn in both."""
    system = documents(np.array([[1.0] * 5 + [2.0] * 5]), [0] * 5 + [1] * 5)
    (drawn,) = stats.resample([system], "nats_per_token", (0, 1), n_resamples=200)
    assert np.all(drawn.values == [[1.0, 2.0]])
    names = [f"d{i}" for i in range(5)]
    values = generator(0, "versions").standard_normal(5)
    twice = documents(np.array([[*values, *values]]), [0] * 5 + [1] * 5, items=names * 2)
    (drawn,) = stats.resample([twice], "nats_per_token", (0, 1), n_resamples=200)
    np.testing.assert_array_equal(drawn.at(0, 0), drawn.at(0, 1))
    apart = documents(np.array([[*values, *values]]), [0] * 5 + [1] * 5)
    (drawn,) = stats.resample([apart], "nats_per_token", (0, 1), n_resamples=200)
    assert abs(np.corrcoef(drawn.at(0, 0), drawn.at(0, 1))[0, 1]) < 0.3


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    system = documents(generator(0, "chunks").standard_normal((2, 40)), [0] * 20 + [1] * 20)
    (one,) = stats.resample([system], "bits_per_byte", (0, 1), n_resamples=300)
    (same,) = stats.resample([system], "bits_per_byte", (0, 1), n_resamples=300)
    np.testing.assert_array_equal(one.values, same.values)
    monkeypatch.setattr(stats, "CHUNK_WEIGHTS", 40 * 7)
    (many,) = stats.resample([system], "bits_per_byte", (0, 1), n_resamples=300)
    assert many.values.shape == one.values.shape
    assert np.all(np.isfinite(many.values))
    np.testing.assert_allclose(many.values.std(axis=0), one.values.std(axis=0), rtol=0.3)


def test_different_documents_cannot_be_paired() -> None:
    a, b = documents(np.ones((1, 2)), [0, 0]), documents(np.ones((1, 2)), [0, 0], items=["x", "y"])
    with pytest.raises(ClbenchError, match="not measured on the same documents"):
        stats.resample([a, b], "nats_per_token", (0,))


def test_undefined_resamples_give_no_interval() -> None:
    interval = stats.bootstrap_interval(1.0, np.array([1.0, math.nan]), 9)
    assert math.isnan(interval.low)
    assert "resamples" in (interval.reason or "")


def test_bootstrap_p_value() -> None:
    draws = np.concatenate([np.full(990, 0.2), np.full(9, -0.2)])
    assert stats.bootstrap_interval(0.2, draws, 5).p == pytest.approx(2 * 10 / 1_000)
    assert stats.bootstrap_interval(0.0, np.zeros(99), 5).p == 1.0


# ranks


def seeds_interval(value: float, p: float, kind: str = stats.OVER_SEEDS) -> stats.Interval:
    return stats.Interval(value, value - 0.1, value + 0.1, 3, kind, p)


def test_rank_ranges() -> None:
    """a beats b and c; b against c is open after Holm (3 pairs: .001 * 3, .01 * 2, .06)."""
    pairs = {
        ("a", "b"): seeds_interval(-1.0, 0.001),
        ("a", "c"): seeds_interval(-0.5, 0.01),
        ("b", "c"): seeds_interval(0.2, 0.06),
    }
    ranks = stats.rank_ranges("abc", pairs, direction="lower")
    assert [(r.best, r.worst, r.reason) for r in ranks.values()] == [(1, 1, None), (2, 3, None), (2, 3, None)]
    turned = stats.rank_ranges("abc", pairs, direction="higher")
    assert [(r.best, r.worst) for r in turned.values()] == [(3, 3), (1, 2), (1, 2)]


def test_holm_widens_ranks() -> None:
    pairs = {
        ("a", "b"): seeds_interval(-1.0, 0.03),
        ("a", "c"): seeds_interval(-1.0, 0.03),
        ("b", "c"): seeds_interval(0.0, 0.9),
    }
    assert stats.rank_ranges("abc", pairs, direction="lower")["a"] == stats.RankRange(1, 3)


def test_evaluation_noise_never_ranks() -> None:
    pairs = {("a", "b"): seeds_interval(-1.0, 0.0001, stats.OVER_DOCUMENTS)}
    ranks = stats.rank_ranges("ab", pairs, direction="lower")
    assert [(r.best, r.worst) for r in ranks.values()] == [(1, 2), (1, 2)]
    assert "evaluation noise" in (ranks["a"].reason or "")
