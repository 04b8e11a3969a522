"""Metrics against published summaries, hand examples and exact identities."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.errors import ConfigError
from clbench.results import metrics
from clbench.results.matrix import Matrix, mean_of, negated

MONTHS = [201403, 201501, 201602, 201701, 201801, 201901, 202001, 202101, 202201, 202301, 202402, 202407]
# TiC-CC losses (nats per token) of the released 1B oracles on these months, as published with TiC-LM
TIC_CC_1B = {
    201305: [2.363, 2.394, 2.421, 2.494, 2.619, 2.671, 2.637, 2.661, 2.668, 2.636, 2.586, 2.590],
    201501: [2.284, 2.289, 2.355, 2.444, 2.599, 2.656, 2.625, 2.648, 2.655, 2.623, 2.573, 2.577],
    201701: [2.287, 2.283, 2.298, 2.319, 2.559, 2.627, 2.600, 2.624, 2.631, 2.601, 2.552, 2.556],
    201901: [2.295, 2.290, 2.302, 2.304, 2.478, 2.501, 2.525, 2.548, 2.562, 2.534, 2.483, 2.484],
    202101: [2.303, 2.298, 2.309, 2.307, 2.470, 2.473, 2.469, 2.476, 2.505, 2.484, 2.433, 2.433],
    202301: [2.310, 2.304, 2.315, 2.313, 2.470, 2.470, 2.461, 2.455, 2.458, 2.435, 2.389, 2.389],
    202407: [2.313, 2.307, 2.317, 2.314, 2.470, 2.467, 2.457, 2.448, 2.449, 2.415, 2.344, 2.337],
}


def tic_matrix(rows: list[list[float]]) -> Matrix:
    """Months are stages 1..12; the base of 201305 is stage 0 and has no row here."""
    stages = tuple(range(1, 13))
    return Matrix(np.array(rows), stages, stages)


def square(values: list[list[float]]) -> Matrix:
    stages = tuple(range(len(values)))
    return Matrix(np.array(values, dtype=float), stages, stages)


@pytest.mark.parametrize("first_column", [0, 1])
def test_tic_lm_oracle_series(first_column: int) -> None:
    series = [TIC_CC_1B[max(cutoff for cutoff in TIC_CC_1B if cutoff <= month)] for month in MONTHS]
    oracle = np.array(TIC_CC_1B[202407])
    matrix = tic_matrix(series)
    got = [
        f(matrix, oracle, first_column=first_column).value
        for f in (metrics.backward, metrics.in_distribution, metrics.forward)
    ]
    assert got == pytest.approx([-0.003, 0.035, 0.154], abs=0.001)


def test_tic_lm_never_updated() -> None:
    matrix, oracle = tic_matrix([TIC_CC_1B[201305]] * 12), np.array(TIC_CC_1B[202407])
    got = [f(matrix, oracle).value for f in (metrics.backward, metrics.in_distribution, metrics.forward)]
    assert got == pytest.approx([0.139, 0.175, 0.212], abs=0.001)


# hand example: base and two trained stages

HAND = square([[2.0, 3.0, 4.0], [2.5, 1.0, 3.5], [2.25, 1.5, 2.0]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("backward", (2.5 + 2.25 + 1.5) / 3),
        ("backward_trained", 1.5),
        ("in_distribution", (1.0 + 2.0) / 2),
        ("forward", 3.5),
        ("forgetting_first", (0.25 + 0.5) / 2),
        ("bwt", -(0.25 + 0.5) / 2),
        ("fwt", 4.0 - 3.5),
        ("retention", (math.exp(-0.25) + math.exp(-0.5)) / 2),
        ("retention_base", (math.exp(-0.25) + math.exp(1.5)) / 2),
        ("final", (2.25 + 1.5 + 2.0) / 3),
        ("learning", (2.0 + 1.0 + 2.0) / 3),
        ("forgetting_max", (0.25 + 0.5) / 2),
        ("forgetting_max_all", (0.25 + 0.5) / 2),
        ("forgetting_max_trained", 0.5),
        ("forgetting_of_base", 0.25),
        ("worst_since", (2.5 + 1.5) / 2),
        ("worst_case", (2.5 + 1.5 + 2.0) / 3),
        ("gain_kept", 1.5 / 2.0),
        ("recovery", 0.25 / 0.5),
    ],
)
def test_hand_example(name: str, expected: float) -> None:
    assert metrics.METRICS[name].compute(HAND, None).value == pytest.approx(expected, abs=1e-12)


def test_hand_regrets() -> None:
    oracle = np.array([1.5, 1.25, 1.75])
    compute = {name: metric.compute(HAND, oracle).value for name, metric in metrics.METRICS.items()}
    assert compute["backward"] == pytest.approx((1.0 + 0.75 + 0.25) / 3)
    assert compute["in_distribution"] == pytest.approx((-0.25 + 0.25) / 2)
    assert compute["forward"] == pytest.approx(1.75)
    assert compute["intransigence"] == compute["in_distribution"]
    assert compute["final"] == pytest.approx((2.25 + 1.5 + 2.0) / 3), "only the three summaries are regrets"


def test_every_metric_has_a_hand_value() -> None:
    tested = {case[0] for case in test_hand_example.pytestmark[0].args[1]}
    assert tested | {"intransigence"} == set(metrics.METRICS)
    assert set(metrics.MAIN) <= set(metrics.METRICS)


def test_two_tasks() -> None:
    """ACC 0.7 = LA 0.85 + 1/2 BWT -0.3, in accuracies 0.9 then 0.6 and 0.8."""
    losses = negated(square([[0.9, 0.1], [0.6, 0.8]]))
    assert metrics.final(losses).value == pytest.approx(-0.7)
    assert metrics.learning(losses).value == pytest.approx(-0.85)
    assert metrics.bwt(losses).value == pytest.approx(-0.3)
    assert metrics.score_retention(np.array([0.9]), np.array([0.6])).value == pytest.approx(2 / 3)
    assert metrics.score_retention(np.array([0.9]), np.array([0.6]), 0.5).value == pytest.approx(0.25)


def test_variants_of_max_forgetting_differ() -> None:
    """The last checkpoint is the best on period 1 and the base the best on period 0."""
    losses = square([[1.0, 9.0, 9.0], [2.0, 3.0, 9.0], [1.5, 2.0, 1.0]])
    assert metrics.forgetting_max(losses).value == pytest.approx((0.5 - 1.0) / 2)
    assert metrics.forgetting_max(losses, rows="all").value == pytest.approx(0.5 / 2)
    assert metrics.forgetting_max(losses, base=False).value == pytest.approx(-1.0)
    assert metrics.forgetting_max(losses, rows="all", base=False).value == 0.0


def test_bits_per_byte_retention_uses_two() -> None:
    bits = Matrix(HAND.values, HAND.row_stages, HAND.column_stages, "bits_per_byte")
    assert metrics.retention(bits).value == pytest.approx((2**-0.25 + 2**-0.5) / 2)


# undefined is NaN with a reason


def test_one_task_is_undefined() -> None:
    one = square([[2.0]])
    for name in (
        "bwt",
        "forgetting_first",
        "forgetting_max",
        "retention",
        "worst_since",
        "backward",
        "forward",
        "fwt",
    ):
        value = metrics.METRICS[name].compute(one, None)
        assert math.isnan(value.value), name
        assert value.reason, name
    assert metrics.final(one).value == 2.0


def test_missing_cell_makes_what_uses_it_undefined() -> None:
    values = HAND.values.copy()
    values[1, 0] = np.nan
    matrix = Matrix(values, (0, 1, 2), (0, 1, 2), "nats_per_token", {(1, 0): "eaten by a mouse"})
    for name in ("backward", "worst_since", "worst_case", "recovery", "forgetting_max"):
        value = metrics.METRICS[name].compute(matrix, None)
        assert math.isnan(value.value), name
        assert value.reason == "eaten by a mouse", name
    assert metrics.in_distribution(matrix).value == 1.5
    assert metrics.bwt(matrix).value == pytest.approx(-0.375)


def test_no_oracle_no_gain_no_forgetting() -> None:
    still = square([[1.0, 2.0, 3.0]] * 3)
    for name, reason in [
        ("intransigence", "no oracle"),
        ("gain_kept", "gained nothing"),
        ("recovery", "ever forgotten"),
    ]:
        value = metrics.METRICS[name].compute(still, None)
        assert math.isnan(value.value)
        assert reason in (value.reason or "")
    assert metrics.forgetting_first(still).value == 0.0
    assert metrics.retention(still).value == 1.0
    assert math.isnan(metrics.score_retention(np.array([0.2]), np.array([0.3]), 0.25).value)


def test_oracle_must_fit() -> None:
    with pytest.raises(ConfigError, match="2 losses for 3 periods"):
        metrics.backward(HAND, np.zeros(2))


def test_stages_not_positions_define_triangles() -> None:
    """Checkpoints 2 and 4 of a six-stage stream: columns 2 and 4 are their own."""
    rows = Matrix(np.arange(12, dtype=float).reshape(2, 6), (2, 4), (0, 1, 2, 3, 4, 5))
    assert metrics.in_distribution(rows).value == np.mean([2, 10])
    assert metrics.backward(rows).value == np.mean([0, 1, 6, 7, 8, 9])
    assert metrics.forward(rows).value == np.mean([3, 4, 5, 11])
    assert metrics.forgetting_first(rows).value == 8 - 2
    assert "row 0" in (metrics.fwt(rows).reason or "")


# exact identities

finite = st.floats(-5, 5).map(lambda x: round(x, 6))


@st.composite
def matrices(draw: st.DrawFn, smallest: int = 2) -> Matrix:
    n = draw(st.integers(smallest, 6))
    return square(draw(st.lists(st.lists(finite, min_size=n, max_size=n), min_size=n, max_size=n)))


@given(matrices())
def test_accuracy_is_learning_plus_transfer(losses: Matrix) -> None:
    n = len(losses.column_stages)
    acc, la = -metrics.final(losses).value, -metrics.learning(losses).value
    assert acc == pytest.approx(la + (n - 1) / n * metrics.bwt(losses).value, abs=1e-9)


@given(matrices(smallest=3))
def test_forgetting_is_at_least_minus_transfer(losses: Matrix) -> None:
    for base in (True, False):
        transfer = metrics.bwt(losses, first_column=0 if base else 1).value
        before = metrics.forgetting_max(losses, base=base).value
        everything = metrics.forgetting_max(losses, rows="all", base=base).value
        assert before >= -transfer - 1e-9
        assert everything >= max(before, 0.0) - 1e-9


@given(matrices())
def test_worst_case_is_never_better_than_final(losses: Matrix) -> None:
    assert metrics.worst_case(losses).value >= metrics.final(losses).value - 1e-9


@given(matrices(), st.data())
def test_regret_ignores_how_hard_a_period_is(losses: Matrix, data: st.DataObject) -> None:
    n = len(losses.column_stages)
    shift = np.array(data.draw(st.lists(finite, min_size=n, max_size=n)))
    oracle = np.array(data.draw(st.lists(finite, min_size=n, max_size=n)))
    moved = Matrix(losses.values + shift, losses.row_stages, losses.column_stages)
    for name, metric in metrics.METRICS.items():
        if not (metric.regret or name in ("final", "learning", "worst_since", "worst_case")):
            before, after = metric.compute(losses, oracle).value, metric.compute(moved, oracle + shift).value
            if not (name in ("gain_kept", "recovery") and (math.isnan(before) or math.isnan(after))):
                assert after == pytest.approx(before, abs=1e-6, rel=1e-6, nan_ok=True), name
    for metric in (m for m in metrics.METRICS.values() if m.regret):
        before, after = metric.compute(losses, oracle).value, metric.compute(moved, oracle + shift).value
        assert after == pytest.approx(before, abs=1e-9, nan_ok=True)


@given(matrices(), finite)
def test_plain_summaries_move_with_the_losses(losses: Matrix, constant: float) -> None:
    moved = Matrix(losses.values + constant, losses.row_stages, losses.column_stages)
    for name in ("backward", "in_distribution", "forward", "final", "learning", "worst_since", "worst_case"):
        compute = metrics.METRICS[name].compute
        assert compute(moved, None).value == pytest.approx(
            compute(losses, None).value + constant, abs=1e-9, nan_ok=True
        )


@settings(max_examples=30)
@given(st.lists(matrices(smallest=4).filter(lambda m: len(m.row_stages) == 4), min_size=2, max_size=3))
def test_many_resamples_at_once_equal_one_by_one(singles: list[Matrix]) -> None:
    batch = Matrix(np.stack([m.values for m in singles]), singles[0].row_stages, singles[0].column_stages)
    oracle = np.array([1.0, 2.0, 0.5, 1.5])
    for metric in metrics.METRICS.values():
        together = metric.compute(batch, oracle).array
        alone = [metric.compute(single, oracle).value for single in singles]
        np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean_of(singles).values, batch.values.mean(axis=0))


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name, metric in metrics.METRICS.items():
        assert f"| `{name}` |" in page, name
        assert metric.description.endswith("."), name
