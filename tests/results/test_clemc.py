"""``clbench.results.clemc``: closed forms, exact identities, and hand-computed matrices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from clbench.errors import ConfigError
from clbench.results import clemc
from clbench.results.clemc import Reference, capacity_of, excess
from clbench.results.matrix import Documents, Matrix


def matrix(values: object, rows: tuple[int, ...] | None = None, columns: tuple[int, ...] | None = None) -> Matrix:
    array = np.asarray(values, dtype=np.float64)
    return Matrix(array, rows or tuple(range(array.shape[-2])), columns or tuple(range(array.shape[-1])))


def random_matrix(*shape: int, seed: int = 0) -> Matrix:
    return matrix(np.random.default_rng(seed).normal(size=shape))


# closed forms


def test_no_excess_is_no_cost() -> None:
    one = capacity_of(matrix(np.zeros((4, 4))))
    for values in (one.cost, one.femc, one.clemc, one.weight_driven, one.data_driven, one.slope):
        assert np.all(values == 0)


def test_a_constant_cost_adds_up() -> None:
    one = capacity_of(matrix(np.full((5, 5), 0.25)))
    np.testing.assert_allclose(one.femc, 0.25, rtol=1e-15)
    np.testing.assert_allclose(one.clemc, 0.25 * np.arange(1, 6), rtol=1e-15)
    assert one.clemc_per_stage == pytest.approx(0.25)


def test_two_stages_by_hand() -> None:
    # e[0][0] = 1; after stage 1: e[1][0] = 3, e[1][1] = 2. J_0 = 1, J_1 = 2.5, W = 3 - 1, X = 2.5 - 3.
    one = capacity_of(matrix([[1.0, 9.0], [3.0, 2.0]]))
    assert one.cost.tolist() == [1.0, 2.5]
    assert np.isnan(one.cost_past[0])
    assert one.cost_past[1] == 3.0
    assert one.cost_new.tolist() == [1.0, 2.0]
    assert (one.weight_driven.tolist(), one.data_driven.tolist()) == ([2.0], [-0.5])
    assert one.clemc.tolist() == [1.0, 3.5]
    assert one.slope == pytest.approx(1.5)


def test_weights_by_hand() -> None:
    one = capacity_of(matrix([[1.0, 9.0], [3.0, 2.0]]), [1.0, 3.0])
    assert one.cost.tolist() == [1.0, (3.0 + 3 * 2.0) / 4]
    with pytest.raises(ConfigError, match="gamma"):
        capacity_of(matrix([[1.0, 9.0], [3.0, 2.0]]), [1.0, 0.0])
    with pytest.raises(ConfigError, match="gamma"):
        capacity_of(matrix([[1.0, 9.0], [3.0, 2.0]]), [1.0])


# identities


@pytest.mark.parametrize("seed", range(5))
def test_increments_split_exactly_and_sums_never_fall(seed: int) -> None:
    values = random_matrix(3, 6, 6, seed=seed)
    gamma = np.random.default_rng(seed).uniform(0.1, 2, 6)
    one = capacity_of(values, gamma)
    np.testing.assert_allclose(one.weight_driven + one.data_driven, one.increment, atol=1e-14)
    assert np.all(np.diff(one.femc) >= 0)
    positive = capacity_of(Matrix(np.abs(values.values), values.row_stages, values.column_stages))
    assert np.all(np.diff(positive.clemc) >= 0)
    np.testing.assert_allclose(np.diff(positive.clemc), positive.femc[..., 1:])  # the increment is FEMC
    shares = np.cumsum(gamma)  # J is the mean of its two parts, weighted
    both = one.cost_past[..., 1:] * shares[:-1] + one.cost_new[..., 1:] * gamma[1:]
    np.testing.assert_allclose(both / shares[1:], one.cost[..., 1:], atol=1e-14)


def test_equal_weights_do_not_care_which_period_is_which() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(3, 5))
    rows = (4, 5, 6)  # all periods are past in every row, so their labels can be exchanged
    one = capacity_of(matrix(values, rows, (0, 1, 2, 3, 4)))
    other = capacity_of(matrix(values[:, rng.permutation(5)], rows, (0, 1, 2, 3, 4)))
    np.testing.assert_allclose(one.clemc, other.clemc)
    np.testing.assert_allclose(one.data_driven, 0, atol=1e-15)


def test_rows_may_be_missing_and_the_base_left_out() -> None:
    full = random_matrix(6, 6)
    some = Matrix(full.values[[0, 2, 5]], (0, 2, 5), full.column_stages)
    one = capacity_of(some)
    assert one.stages == (0, 2, 5)
    assert one.cost[1] == pytest.approx(full.values[2, :3].mean())
    assert one.weight_driven[1] == pytest.approx((full.values[5, :3] - full.values[2, :3]).mean())
    late = capacity_of(full, first_column=1)
    assert late.stages == (1, 2, 3, 4, 5)
    assert late.cost[0] == pytest.approx(full.values[1, 1])
    with pytest.raises(ConfigError, match="no row"):
        capacity_of(matrix([[1.0]], (0,), (3,)))


def test_resamples_are_computed_one_by_one() -> None:
    many = random_matrix(4, 5, 5)
    at_once = capacity_of(many)
    for place in range(4):
        alone = capacity_of(matrix(many.values[place]))
        for name, get in {**clemc.PER_STAGE, **clemc.PER_RUN}.items():
            np.testing.assert_allclose(get(at_once)[place], get(alone), atol=1e-14, err_msg=name)


def test_the_slope_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=4)
    expected = reference.linregress([0, 1, 3, 7], values).slope
    assert clemc.slope((0, 1, 3, 7), values) == pytest.approx(expected)
    assert np.isnan(clemc.slope((2,), values[:1]))


# quadratic: the first-order part and what it leaves


def test_on_a_quadratic_the_remainder_is_the_curvature() -> None:
    rng = np.random.default_rng(5)
    n = 7
    roots = rng.normal(size=(3, n, n))
    hessians = roots @ roots.transpose(0, 2, 1)
    minima, floors = rng.normal(size=(3, n)), rng.uniform(1, 2, 3)
    path = rng.normal(size=(3, n))  # theta_0, theta_1, theta_2

    def loss(theta: np.ndarray, i: int) -> float:
        return float(floors[i] + 0.5 * (theta - minima[i]) @ hessians[i] @ (theta - minima[i]))

    values = matrix([[loss(theta, i) for i in range(3)] for theta in path])
    one = capacity_of(excess(values, Reference("oracle", floors)))
    for k in range(2):
        step = path[k + 1] - path[k]
        gradient = np.mean([hessians[i] @ (path[k] - minima[i]) for i in range(k + 1)], axis=0)
        half = 0.5 * step @ np.mean(hessians[: k + 1], axis=0) @ step
        assert clemc.curvature(one.weight_driven[k], gradient @ step) == pytest.approx(half)


# references and intervals


def test_references() -> None:
    values = matrix([[3.0, 5.0], [4.0, 2.0]])
    assert excess(values, Reference("best_of_run")).values.tolist() == [[0.0, 3.0], [1.0, 0.0]]
    assert excess(values, Reference("oracle", np.array([1.0, 2.0]))).values.tolist() == [[2.0, 3.0], [3.0, 0.0]]
    assert excess(values, Reference("none")).values.tolist() == values.values.tolist()
    assert clemc.choose_reference(None).kind == "best_of_run"
    assert clemc.choose_reference(np.ones(2)).kind == "oracle"
    with pytest.raises(ConfigError, match="oracle"):
        excess(values, Reference("oracle", np.ones(3)))
    with pytest.raises(ConfigError, match="oracle"):
        excess(values, Reference("oracle"))


def documents(shift: float, *, n: int = 40, seed: int = 0) -> Documents:
    """Two periods of ``n`` one-token documents; the second row is ``shift`` worse on the first period."""
    rng = np.random.default_rng(seed)
    first = rng.normal(3.0, 0.5, (2, 2 * n))
    first[1, :n] = first[0, :n] + shift + rng.normal(0, 0.05, n)
    return Documents(
        value=first,
        row_stages=(0, 1),
        stage=np.repeat([0, 1], n),
        item=np.array([f"d{i}" for i in range(2 * n)]),
        n_tokens=np.ones(2 * n, dtype=np.int64),
        n_bytes=np.ones(2 * n, dtype=np.int64),
    )


def test_one_seed_is_bootstrapped_over_paired_documents() -> None:
    found = clemc.estimate({0: documents(0.7)}, (0, 1), Reference("none"))
    forgetting = found.per_stage["weight_driven"][1]
    assert forgetting.kind == "bootstrap over documents (evaluation noise)"
    assert forgetting.low < 0.7 < forgetting.high
    # Paired: the documents' own spread of 0.5 cancels, 0.05 / sqrt(40) is left.
    assert forgetting.high - forgetting.low == pytest.approx(2 * 1.96 * 0.05 / np.sqrt(40), rel=0.4)
    assert found.per_stage["cost_past"][0].reason == "not defined in this row"
    assert found.as_dict()["estimator"] == "clemc_proxy"
    assert found.as_dict()["per_stage"]["cost_past"]["0"]["value"] is None


def test_seeds_are_the_outer_level() -> None:
    shifts = (0.5, 0.6, 0.8)
    found = clemc.estimate({seed: documents(s, seed=seed) for seed, s in enumerate(shifts)}, (0, 1), Reference("none"))
    one = found.per_stage["weight_driven"][1]
    each = [float(np.diff(documents(s, seed=k).value[:, :40].mean(axis=1))[0]) for k, s in enumerate(shifts)]
    low, high = reference.t.interval(0.95, 2, np.mean(each), reference.sem(each))
    assert (one.kind, one.n, found.n_seeds) == ("t over seeds", 3, 3)
    assert (one.value, one.low, one.high) == pytest.approx((np.mean(each), low, high))


def test_a_missing_cell_is_not_a_number_and_says_why() -> None:
    whole = documents(0.1)
    whole.value[1, 3] = np.nan
    found = clemc.estimate({0: whole}, (0, 1), Reference("best_of_run"), n_resamples=50)
    assert np.isnan(found.per_stage["cost"][1].value)
    assert "missing after stage 1" in str(found.per_stage["cost"][1].reason)
