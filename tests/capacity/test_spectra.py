"""Ranks and decay against closed forms, finite samples of known spectra, and NumPy's own singular values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clbench.capacity import spectra
from clbench.capacity.figure import Figure, undefined
from clbench.capacity.spectra import Floats, Moments


def moments_of(x_ND: Floats, *, batch: int = 10**9, shift: float = 0.0) -> Moments:
    """Moments of all rows, batch by batch."""
    moments = Moments(torch.full((x_ND.shape[1],), shift, dtype=torch.float64))
    for start in range(0, len(x_ND), batch):
        moments.add(torch.from_numpy(x_ND[start : start + batch]))
    return moments


def draw(n: int, scale_D: Floats, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, len(scale_D))) * scale_D


def turned(x_ND: Floats, seed: int = 1) -> Floats:
    q_DD, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((x_ND.shape[1], x_ND.shape[1])))
    return x_ND @ q_DD


# --- figures of a known spectrum


def test_k_equal_values_have_rank_k() -> None:
    for k in (1, 7, 128):
        assert spectra.entropy_rank(np.full(k, 3.0), epsilon=0).value == pytest.approx(k, rel=1e-12)
    assert spectra.entropy_rank(np.full(128, 3.0)).value == pytest.approx(128.006, abs=5e-4)


def test_a_two_level_spectrum_has_the_entropy_that_pencil_and_paper_give() -> None:
    values = np.array([4.0] * 3 + [1.0] * 8)
    entropy = -3 * (0.2 * math.log(0.2)) - 8 * (0.05 * math.log(0.05))  # 4/20 and 1/20
    assert spectra.entropy_rank(values, epsilon=0).value == pytest.approx(math.exp(entropy), rel=1e-12)


def test_the_two_effective_ranks_differ_as_the_notes_say() -> None:
    eigenvalues = 1 / np.arange(1, 1025)
    assert spectra.entropy_rank(np.sqrt(eigenvalues)).value == pytest.approx(805.6, abs=0.05)
    assert spectra.entropy_rank(eigenvalues).value == pytest.approx(182.5, abs=0.05)


def test_stable_rank_is_the_dimension_of_the_identity_and_1_of_rank_1() -> None:
    assert spectra.stable_rank(np.ones(9)).value == 9
    assert spectra.stable_rank(np.array([5.0, 0.0, 0.0])).value == 1
    assert spectra.stable_rank(np.array([4.0, 1.0])).value == 1.25


def test_sranks_count_the_values_that_reach_99_percent() -> None:
    assert spectra.srank(np.ones(100)).value == 99
    assert spectra.srank(np.ones(50)).value == 50
    sigma = np.array([98.0, 1.0, 0.5, 0.5])
    assert spectra.srank(sigma).value == 2  # 99 of 100
    assert spectra.srank(sigma**2).value == 1


def test_feature_rank_counts_singular_values_of_phi_over_root_n() -> None:
    n = 400
    sigma = np.array([1.0, 0.0101, 0.0099, 0.0]) * math.sqrt(n)
    assert spectra.feature_rank(sigma**2, n).value == 2


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("ranks", [(12, 100), (4, 100), (4, 16)])
def test_a_power_law_gives_its_exponent_and_a_perfect_fit(alpha: float, ranks: tuple[int, int]) -> None:
    eigenvalues = np.arange(1, 129, dtype=np.float64) ** -alpha
    first = spectra.alpha_req(eigenvalues, ranks)
    again = spectra.alpha_req(eigenvalues, ranks)  # the reference code shifts its ranks in place
    assert first == again
    assert first.alpha.value == pytest.approx(alpha, abs=1e-12)
    assert first.r2.value == pytest.approx(1, abs=1e-12)
    assert (first.first, first.last) == ranks


def test_alpha_is_the_weighted_fit_over_its_ranks_only() -> None:
    generator = np.random.default_rng(0)
    eigenvalues = np.sort(generator.random(200))[::-1]
    i = np.arange(12, 101)
    slope, _ = np.polyfit(-np.log(i), np.log(eigenvalues[11:100]), 1, w=np.sqrt(1 / i))
    changed = eigenvalues.copy()
    changed[:11] *= 100
    changed[100:] /= 100
    assert spectra.alpha_req(changed, (12, 100)).alpha.value == pytest.approx(slope, rel=1e-10)


def test_the_ranks_of_the_fit_follow_the_width() -> None:
    assert spectra.alpha_ranks(576) == spectra.alpha_ranks(101) == (12, 100)
    assert spectra.alpha_ranks(100) == (4, 25)
    assert spectra.alpha_ranks(64) == (4, 16)
    assert spectra.alpha_ranks(28) == (4, 7)
    assert spectra.alpha_ranks(27) is None


def test_what_is_not_defined_is_nan_with_a_reason() -> None:
    zero = np.zeros(5)
    for found in (spectra.entropy_rank(zero), spectra.stable_rank(zero), spectra.srank(zero)):
        assert math.isnan(found.value) and found.reason == "all values are zero"
    short = spectra.alpha_req(np.ones(50), (12, 100))
    assert math.isnan(short.alpha.value) and "fewer than 100" in short.alpha.reason
    assert "all eigenvalues are equal" in spectra.alpha_req(np.ones(200), (12, 100)).r2.reason
    with pytest.raises(ValueError, match="reason"):
        Figure(math.nan)
    with pytest.raises(ValueError, match="reason"):
        Figure(1.0, "because")


# --- from samples


def test_eigenvalues_are_the_squared_singular_values_of_the_samples() -> None:
    x = draw(300, np.linspace(1, 4, 20)) + 5
    for centred, matrix in ((False, x), (True, x - x.mean(0))):
        expected = np.linalg.svd(matrix, compute_uv=False) ** 2
        np.testing.assert_allclose(moments_of(x, shift=4).eigenvalues_K(centred=centred), expected, rtol=1e-11)


def test_a_mean_ten_thousand_times_the_spread_costs_no_digits() -> None:
    x = draw(400, np.linspace(0.5, 2, 10)) + 1e4
    near = Moments(torch.from_numpy(x[:8].mean(0)))
    near.add(torch.from_numpy(x))
    expected = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(near.eigenvalues_K(centred=True), expected, rtol=1e-10)


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_streaming_gives_what_all_samples_at_once_give(batch: int) -> None:
    x = draw(300, np.linspace(1, 2, 12)) + 3
    whole, parts = moments_of(x, shift=3), moments_of(x, batch=batch, shift=3)
    halves = moments_of(x[:100], shift=3) + moments_of(x[100:], shift=3)
    for centred in (True, False):
        reference = spectra.figures(whole, centred=centred)
        for one in (parts, halves):
            for name, found in spectra.figures(one, centred=centred).items():
                assert found.value == pytest.approx(reference[name].value, rel=1e-10, nan_ok=True), name
    with pytest.raises(ValueError, match="shifts"):
        moments_of(x) + moments_of(x, shift=1)


def test_rotation_and_scale_change_nothing_but_the_feature_rank() -> None:
    x = draw(600, np.geomspace(1, 0.003, 40))
    reference = spectra.figures(moments_of(x), centred=True)
    for other in (turned(x), 10 * x):
        found = spectra.figures(moments_of(other), centred=True)
        for name in reference.keys() - {"feature_rank"}:
            assert found[name].value == pytest.approx(reference[name].value, rel=1e-9), name
    assert spectra.figures(moments_of(turned(x)), centred=True)["feature_rank"] == reference["feature_rank"]
    assert spectra.figures(moments_of(10 * x), centred=True)["feature_rank"].value > reference["feature_rank"].value


def test_ranks_are_ordered_and_the_mean_counts_only_uncentred() -> None:
    x = draw(800, np.geomspace(1, 0.1, 30))
    for centred in (True, False):
        f = spectra.figures(moments_of(x + 50), centred=centred)
        assert 1 <= f["stable_rank"].value <= f["erank_cov"].value <= f["rankme_sigma"].value <= 30.01
        assert (f["stable_rank"].value < 1.01) == (not centred)
    moved = spectra.figures(moments_of(x + 50, shift=50), centred=True)
    assert moved["erank_cov"].value == pytest.approx(spectra.figures(moments_of(x), centred=True)["erank_cov"].value)


def expected_log_erank(eigenvalues: Floats, n: int) -> tuple[float, float]:
    """Mean and standard deviation of the sample's log effective rank, by perturbation of second order.

    H = log S - T/S with S = sum l_i, T = sum l_i log l_i. Entries of a sample covariance have variance l_i l_j / n,
    twice that on the diagonal: E[T] - T = 1/2 sum_ij (log l_i - log l_j)/(l_i - l_j) var_ij, 1/l_i where i = j.
    """
    l, logs = eigenvalues, np.log(eigenvalues)  # noqa: E741
    apart = np.subtract.outer(l, l)
    np.fill_diagonal(apart, 1)
    divided = np.subtract.outer(logs, logs) / apart
    np.fill_diagonal(divided, 1 / l)
    variances = np.outer(l, l) * (1 + np.eye(len(l))) / n
    total, t = l.sum(), (l * logs).sum()
    of_t = t + np.sum(divided * variances) / 2
    var_s, cov = 2 * np.sum(l**2) / n, 2 * np.sum(l**2 * (logs + 1)) / n
    mean = np.log(total) - var_s / (2 * total**2) - of_t / total + cov / total**2 - t * var_s / total**3
    slope = (t / total - logs) / total
    return float(mean), float(np.sqrt(np.sum(slope**2 * 2 * l**2 / n)))


def test_few_samples_underestimate_by_what_theory_and_the_notes_say() -> None:
    eigenvalues = 1 / np.arange(1, 1025)
    few, more = (
        spectra.figures(moments_of(draw(n, np.sqrt(eigenvalues))), centred=True, least_ratio=1) for n in (1100, 4000)
    )
    mean, spread = expected_log_erank(eigenvalues, 4000)
    assert math.exp(mean) == pytest.approx(172.6, abs=0.2)  # the truth is 182.5
    assert math.log(more["erank_cov"].value) == pytest.approx(mean, abs=4 * spread)
    assert few["erank_cov"].value == pytest.approx(150.9, abs=9)  # one draw in the notes, one here
    assert few["alpha_req"].value == pytest.approx(0.939, abs=0.03)  # the truth is 1
    assert more["alpha_req"].value == pytest.approx(0.984, abs=0.009)


def test_too_few_samples_give_nan_with_the_number_that_is_wanted() -> None:
    found = spectra.figures(moments_of(draw(79, np.ones(20))), centred=True)
    assert set(found) == set(spectra.figures(moments_of(draw(80, np.ones(20))), centred=True))
    why = "79 samples of width 20, 4 a dimension are wanted"
    assert all(math.isnan(one.value) and one.reason == why for one in found.values())
    narrow = spectra.figures(moments_of(draw(80, np.ones(20))), centred=True)
    assert narrow["alpha_req"].reason == undefined("a width of 20 leaves too few ranks for a fit").reason
    assert narrow["erank_cov"].value > 15
