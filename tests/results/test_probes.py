"""``clbench.results.probes``: areas and thresholds by hand, paired differences against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as reference

from clbench.errors import ConfigError
from clbench.results import probes
from clbench.results.probes import Curve, loss_of_plasticity


def curve(losses: list[float], tokens: list[float] | None = None) -> Curve:
    return Curve(np.array(tokens or list(range(len(losses))), dtype=float), np.array(losses, dtype=float))


def shifted(by: float, *, orders: int = 3, noise: float = 0.0, seed: int = 0) -> dict[int, Curve]:
    rng = np.random.default_rng(seed)
    return {o: curve([5 + by, 4 + by, 3 + by + noise * rng.normal()]) for o in range(orders)}


def test_figures_of_a_curve_by_hand() -> None:
    one = curve([5.0, 4.0, 2.0], [0, 10, 40])
    assert (one.start, one.final, one.drop) == (5.0, 2.0, 3.0)
    assert one.area == pytest.approx((4.5 * 10 + 3.0 * 30) / 40)
    assert one.tokens_to(4.5).value == pytest.approx(5.0)
    assert one.tokens_to(3.0).value == pytest.approx(25.0)
    assert one.tokens_to(6.0).value == 0.0
    assert one.tokens_to(2.0).value == 40.0
    never = one.tokens_to(1.0)
    assert math.isnan(never.value)
    assert "above 1.000" in str(never.reason)


def test_a_loss_that_rises_again_counts_from_its_first_crossing() -> None:
    assert curve([5.0, 3.0, 4.0, 2.0]).tokens_to(3.5).value == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("losses", "tokens"), [([1.0], [0]), ([1.0, 2.0], [1, 2]), ([1.0, 2.0], [0, 0]), ([1.0, math.inf], [0, 1])]
)
def test_what_is_no_curve_is_refused(losses: list[float], tokens: list[float]) -> None:
    with pytest.raises(ConfigError):
        curve(losses, tokens)


def test_loss_of_plasticity_is_paired_by_order() -> None:
    rng = np.random.default_rng(1)
    orders = rng.normal(0, 1.0, 4)  # what an order does to every model
    own = rng.normal(0.3, 0.02, 4)
    base = {"1": {o: curve([5 + orders[o], 3 + orders[o]]) for o in range(4)}}
    model = {"1": {o: curve([5 + orders[o] + own[o], 3 + orders[o] + own[o]]) for o in range(4)}}
    found = loss_of_plasticity(model, base)
    low, high = reference.t.interval(0.95, 3, own.mean(), reference.sem(own))
    assert (found.by_rate["1"].value, found.by_rate["1"].low) == pytest.approx((own.mean(), low))
    assert found.at_best.high == pytest.approx(high)
    assert found.verdict == "loss of plasticity at every rate and at the best"


def test_a_loss_that_vanishes_at_another_rate_is_an_effect_of_the_rate() -> None:
    base = {"1": shifted(0.0, noise=0.01), "3": shifted(0.5, noise=0.01, seed=1)}
    model = {"1": shifted(0.4, noise=0.01, seed=2), "3": shifted(0.0, noise=0.01, seed=3)}
    found = loss_of_plasticity(model, base)
    assert (found.best_rate, found.best_rate_of_base) == ("3", "1")
    assert found.by_rate["1"].low > 0
    assert found.by_rate["3"].high < 0
    assert found.verdict == "an effect of the learning rate: lost at 1, not at the best rates"


def test_verdicts_do_not_say_more_than_the_intervals() -> None:
    base = {"1": shifted(0.0, noise=0.3)}
    assert "no loss" in loss_of_plasticity({"1": shifted(0.0, noise=0.3, seed=9)}, base).verdict
    assert "better" in loss_of_plasticity({"1": shifted(-1.0, noise=0.3, seed=9)}, base).verdict
    one = {"1": shifted(0.0, orders=1)}
    assert "not told" in loss_of_plasticity({"1": shifted(1.0, orders=1)}, one).verdict
    with pytest.raises(ConfigError, match="alike"):
        loss_of_plasticity({"1": shifted(0.0)}, one)


def test_a_report_has_every_figure_and_no_nan() -> None:
    models = {"base": {"1": shifted(0.0, noise=0.1)}, "stage 1": {"1": shifted(3.0, noise=0.1, seed=4)}}
    found = probes.report(models)
    # The base starts at 5 and ends near 3: half of its drop is near 4.
    assert found["threshold_nats"] == pytest.approx(4.0, abs=0.1)
    stage = found["models"]["stage 1"]
    assert stage["against_base"]["by_rate"]["1"]["value"] == pytest.approx(3.0, abs=0.1)
    reached = stage["figures"]["1"]["tokens_to"]
    assert reached["value"] is None
    assert "above" in reached["reason"]
    assert stage["curves"]["1"]["tokens"] == [0, 1, 2]
    assert "against_base" not in found["models"]["base"]
