"""``clbench.results.predictors``: scipy's Spearman, planted relations, and how often noise looks like something."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as reference

from clbench.results import predictors
from clbench.results.matrix import Matrix
from clbench.results.predictors import Predictor, RunFigures, spearman


def run(
    forgetting: float, figures: dict[str, float], *, method: str, track: str = "t", seed: int = 0, late: float = 0.0
) -> RunFigures:
    """Three stages; period 0 loses ``forgetting`` in the first and ``late`` in the second, period 1 ``late``."""
    values = np.array([[1.0, 9, 9], [1 + forgetting, 2, 9], [1 + forgetting + late, 2 + late, 3]])
    at = {0: dict.fromkeys(figures, 0.0), 1: figures, 2: figures}
    return RunFigures(track, method, seed, Matrix(values, (0, 1, 2), (0, 1, 2)), at)


def find(found: list[Predictor], name: str, view: str) -> Predictor:
    (one,) = [p for p in found if (p.name, p.view) == (name, view)]
    return one


def test_spearman_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 12).astype(float), rng.normal(size=12)
        assert spearman(x, y) == pytest.approx(reference.spearmanr(x, y).statistic)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_targets_and_views_by_hand() -> None:
    one = run(0.5, {"a": 4.0}, method="m", late=0.2)
    assert one.target("early") == pytest.approx(0.2)  # what periods 0 and 1 lose after the first stage
    assert one.target("last") == pytest.approx((0.7 + 0.2) / 2)
    other = RunFigures("t", "m", 0, one.matrix, {0: {"a": 1.0}, 1: {"a": 2.0}, 2: {"a": 5.0}})
    assert [other.value("a", view) for view in ("early", "last", "change")] == [2.0, 5.0, 4.0]
    assert math.isnan(other.value("b", "last"))
    assert math.isnan(RunFigures("t", "m", 0, one.matrix).value("a", "early"))


def test_a_planted_figure_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(2)
    amounts = rng.uniform(0, 1, 16)
    runs = [
        run(a, {"told": a**3, "against": -a, **{f"noise{j}": rng.normal() for j in range(10)}}, method=f"m{i}", late=a)
        for i, a in enumerate(amounts)
    ]
    found = predictors.predictors(runs, n_resamples=500)
    told = find(found, "told", "last")
    assert (told.rho, told.n_methods, told.n_runs) == (pytest.approx(1.0), 16, 16)
    assert told.low > 0.99
    assert told.p_max < 0.01
    assert find(found, "against", "early").rho == pytest.approx(-1.0)
    noise = [one for one in found if one.name.startswith("noise") and one.view == "last"]
    assert all(one.p_max > 0.05 for one in noise)
    # and some of ten noises alone would have looked well: that is what p_max is for
    assert max(abs(one.rho) for one in noise) > 0.3
    assert {one.name for one in [p for p in found if p.view == "last"][:2]} == {"told", "against"}


def test_the_level_of_the_largest_holds_under_noise() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(40):
        runs = [
            run(rng.uniform(), {f"noise{j}": rng.normal() for j in range(8)}, method=f"{trial}-{i}") for i in range(8)
        ]
        last = [one.p_max for one in predictors.predictors(runs, n_resamples=200) if one.view == "last"]
        hits += min(last) <= 0.05
    assert hits <= 6  # binomial(40, 0.05): more has probability 0.01; unadjusted it would be a third of all


def test_seeds_are_averaged_and_tracks_ranked_by_themselves() -> None:
    runs = []
    for track, shift in (("x", 0.0), ("y", 100.0)):
        for i in range(5):
            for seed, wobble in enumerate((-0.01, 0.01)):
                runs.append(run(i + shift + wobble, {"a": i - shift}, method=f"m{i}", track=track, seed=seed))
    one = find(predictors.predictors(runs, n_resamples=100), "a", "last")
    assert (one.n_methods, one.n_runs) == (10, 20)
    assert one.rho == pytest.approx(1.0)  # pooled without regard to tracks it would be negative


def test_intervals_widen_with_fewer_methods_and_stop() -> None:
    rng = np.random.default_rng(3)

    def width(n: int) -> float:
        runs = [run(a, {"a": a + rng.normal()}, method=f"m{i}") for i, a in enumerate(rng.normal(size=n))]
        one = find(predictors.predictors(runs, n_resamples=500), "a", "last")
        return one.high - one.low

    assert width(40) < width(8)
    few = predictors.predictors([run(float(i), {"a": i, "b": 1.0}, method=f"m{i}") for i in range(4)])
    assert "no interval below 5" in str(find(few, "a", "last").reason)
    assert find(few, "a", "last").rho == pytest.approx(1.0)
    assert find(few, "b", "last").reason == "it does not vary between methods"
    assert find(few, "a", "last").as_dict()["low"] is None
    two = predictors.predictors([run(float(i), {"a": i}, method=f"m{i}") for i in range(2)])
    assert find(two, "a", "last").reason == "2 methods have it"
    assert predictors.predictors([]) == []
