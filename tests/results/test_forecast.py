"""``clbench.results.forecast``: planted parameters come back, intervals cover, and too small a sweep says so."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as reference

from clbench.errors import ConfigError
from clbench.results import forecast
from clbench.results.forecast import Law, Observation, back_test, fit, law_for, wanted_tokens

BUDGETS = (1e4, 2e4, 4e4, 8e4, 16e4, 32e4)
SIZES = (1e5, 3e5, 1e6, 3e6)


def loss(n: float, d: float) -> float:
    return 2.5 + 40.0 * n**-0.35 + 60.0 * d**-0.45


def forgetting(n: float, d: float) -> float:
    return -0.05 + 0.02 * d**0.4 * n**-0.15


def sweep(law, sizes=SIZES, budgets=BUDGETS, *, noise: float = 0.0, seed: int = 0) -> list[Observation]:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    return [Observation(n, d, law(n, d) + noise * rng.normal()) for n in sizes for d in budgets]


# planted parameters


def test_the_loss_law_is_recovered_and_extrapolates() -> None:
    found = fit(Law("loss", of_size=True), sweep(loss))
    assert dict(zip(found.law.exponents, found.exponents, strict=True)) == pytest.approx(
        {"alpha": 0.35, "beta": 0.45}, rel=1e-3
    )
    assert found.outer_coefficients() == pytest.approx({"E": 2.5, "A": 40.0, "B": 60.0}, rel=1e-2)
    assert found.at(1e7, 32e5) == pytest.approx(loss(1e7, 32e5), abs=1e-3)


def test_the_forgetting_law_is_recovered_and_extrapolates() -> None:
    found = fit(Law("forgetting", of_size=True), sweep(forgetting))
    assert dict(zip(found.law.exponents, found.exponents, strict=True)) == pytest.approx(
        {"gamma": 0.4, "delta": 0.15}, rel=1e-3
    )
    assert found.outer_coefficients() == pytest.approx({"E": -0.05, "A": 0.02}, rel=1e-2)
    assert found.at(3e6, 32e5) == pytest.approx(forgetting(3e6, 32e5), abs=1e-3)


def test_one_size_fits_tokens_alone_as_a_library_does() -> None:
    runs = sweep(loss, (1e6,), noise=0.01)
    found = fit(Law("loss"), runs)
    d, y = np.array([one.n_tokens for one in runs]), np.array([one.value for one in runs])
    popt, _ = optimize.curve_fit(lambda x, e, b, beta: e + b * (x / 5e4) ** -beta, d, y, p0=(2.5, 1.0, 0.5))
    assert found.exponents[0] == pytest.approx(popt[2], rel=1e-3)
    assert found.at(1e6, 32e5) == pytest.approx(popt[0] + popt[1] * (32e5 / 5e4) ** -popt[2], abs=1e-3)


def test_signs_are_kept() -> None:
    rising = [Observation(1e6, d, 1.0 + 0.1 * math.log(d)) for d in BUDGETS]
    found = fit(Law("loss"), rising)  # a loss that rises with tokens: the law has no such shape
    assert np.all(found.coefficients >= 0)
    assert found.at(1e6, 1e7) == pytest.approx(np.mean([one.value for one in rising]), abs=0.05)


# intervals


def test_intervals_of_a_prediction_cover_at_their_level() -> None:
    """A power law with noise, 30 sweeps: the 95 % interval of one new run at 4 x holds most of them."""
    rng = np.random.default_rng(5)
    inside, widths = 0, []
    for seed in range(30):
        found = fit(Law("forgetting"), sweep(forgetting, (1e6,), (*BUDGETS, 64e4), noise=0.02, seed=seed))
        made = found.predict(1e6, 256e4)
        inside += made.low <= forgetting(1e6, 256e4) + 0.02 * rng.normal() <= made.high
        widths.append(made.high - made.low)
    assert inside >= 26  # binomial(30, 0.95): fewer has probability 0.02
    assert np.median(widths) < 1.0  # and it does say something


def test_with_known_exponent_the_interval_is_that_of_linear_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "EXPONENTS", (0.39999, 0.40001))
    runs = sweep(forgetting, (1e6,), noise=0.02)
    made = fit(Law("forgetting"), runs).predict(1e6, 1e6)
    x = np.array([one.n_tokens for one in runs]) ** 0.4
    X, y, at = np.stack([np.ones_like(x), x], 1), np.array([one.value for one in runs]), np.array([1.0, 1e6**0.4])
    theta, rss = np.linalg.lstsq(X, y, rcond=None)[:2]
    df = len(y) - 3  # the exponent counts as fitted
    t = reference.t.ppf(0.975, df)
    s = math.sqrt(rss[0] / df)
    half = t * s * math.sqrt(1 + at @ np.linalg.inv(X.T @ X) @ at)
    assert made.value == pytest.approx(at @ theta, abs=1e-3)
    assert (made.high - made.value, made.value - made.low) == pytest.approx((half, half), rel=0.01)


def test_an_exponent_that_the_data_do_not_bound_says_so() -> None:
    rng = np.random.default_rng(0)
    flat = [Observation(1e6, d, 3.0 + 0.01 * rng.normal()) for d in BUDGETS]
    told = fit(Law("loss"), flat).as_dict()["exponents"]["beta"]
    assert not told["bounded"]
    told = fit(Law("loss"), sweep(loss, (1e6,), noise=1e-4)).as_dict()["exponents"]["beta"]
    assert told["bounded"]
    assert told["low"] < 0.45 < told["high"]


# back-test


def test_the_back_test_hides_the_largest_budgets() -> None:
    found = back_test("loss", sweep(loss, (1e6,), noise=1e-4), n_hidden=2)
    assert found.hidden == (16e4, 32e4)
    assert found.reach == 4.0
    assert found.error < 0.01 < found.error_of_no_change
    assert found.error_of_no_change == pytest.approx(
        np.mean([abs(loss(1e6, 8e4) - loss(1e6, d)) for d in (16e4, 32e4)]), abs=1e-3
    )
    assert found.covered == 1.0


def test_a_law_that_breaks_is_caught_by_the_back_test() -> None:
    kinked = [Observation(1e6, d, 0.1 * (d / 1e4) ** 0.3 + (1.0 if d > 2e5 else 0.0)) for d in BUDGETS]
    found = back_test("forgetting", kinked)
    assert found.error == pytest.approx(1.0, abs=0.05)
    assert found.covered == 0.0


# too small a sweep


@pytest.mark.parametrize(
    ("sizes", "budgets", "says"),
    [
        ((1e6,), (1e4,), "one budget and one model size"),
        ((1e6,), (1e4, 2e4), "2 different budgets: an exponent needs 3"),
        ((1e6, 2e6), BUDGETS, "2 different model sizes"),
        ((1e6,), BUDGETS[:3], "3 runs for 3 numbers"),
    ],
)
def test_what_a_sweep_cannot_carry(sizes: tuple[float, ...], budgets: tuple[float, ...], says: str) -> None:
    law, reason = law_for("loss", sweep(loss, sizes, budgets))
    assert law is None
    assert says in str(reason)


def test_a_back_test_without_enough_says_why() -> None:
    found = back_test("loss", sweep(loss, (1e6,), BUDGETS[:4]))
    assert math.isnan(found.error)
    assert "without the largest budgets: 3 runs for 3 numbers" in str(found.reason)
    assert found.as_dict()["error_nats"] is None
    assert "1 budgets" in str(back_test("loss", sweep(loss, (1e6,), BUDGETS[:1])).reason)


def test_budgets_are_multiples_or_tokens() -> None:
    assert wanted_tokens("10x", 3e4) == 3e5
    assert wanted_tokens("2.5e6", 3e4) == 2.5e6
    for bad in ("ten", "x", "-1x", "0", "nan", "inf"):
        with pytest.raises(ConfigError, match="no budget"):
            wanted_tokens(bad, 3e4)
