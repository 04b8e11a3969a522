"""The picture of a forecast: one file that says what its axes, marks and gaps are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clbench.forecast_plot import draw
from clbench.results.forecast import (
    BackTest,
    Fit,
    Forecast,
    Observation,
    Prediction,
    back_test,
    fit,
    law_for,
)

BUDGETS = tuple(10_000.0 * 2**k for k in range(6))


def forecast(observations: list[Observation], wanted: tuple[float, float], method: str = "m") -> Forecast:
    law, reason = law_for("loss", observations)
    found: Fit | None = None if law is None else fit(law, observations)
    nothing = Prediction(*wanted, float("nan"), reason=reason)
    test: BackTest = back_test("loss", observations, 1)
    prediction = nothing if found is None else found.predict(*wanted)
    return Forecast(method, "in_distribution", tuple(observations), prediction, found, test, reach=2.0)


def said(path: Path) -> set[str]:
    """The texts of a picture: matplotlib draws letters as paths and keeps each text in a comment."""
    parts = path.read_text(encoding="utf-8").split("<!--")[1:]
    return {part.split("-->")[0].strip() for part in parts}


def sweep() -> list[Observation]:
    return [Observation(1e6, n, 3.0 + 40.0 * n**-0.4) for n in BUDGETS]


def test_budgets_are_the_axis_and_every_mark_is_explained(tmp_path: Path) -> None:
    one = forecast(sweep(), (1e6, 1e6))
    assert one.back_test.reason is None
    draw([one, replace(one, method="other")], tmp_path / "f.svg")
    assert {"tokens a stage", "In-distribution", "m", "other", "run that the back-test hid"} <= said(tmp_path / "f.svg")


def test_a_sweep_of_sizes_alone_has_sizes_on_its_axis(tmp_path: Path) -> None:
    sizes = [Observation(n, 50_000.0, 2.0 + 30.0 * n**-0.3) for n in np.geomspace(1e5, 1e7, 6).tolist()]
    draw([forecast(sizes, (1e8, 50_000.0))], tmp_path / "f.svg")
    assert "parameters" in said(tmp_path / "f.svg")
    assert "tokens a stage" not in said(tmp_path / "f.svg")


def test_an_interval_that_would_flatten_the_rest_is_cut_and_its_bound_written(tmp_path: Path) -> None:
    one = forecast(sweep(), (1e6, 1e6))
    wide = replace(one.prediction, low=one.prediction.value - 0.01, high=271.0)
    draw([replace(one, prediction=wide)], tmp_path / "f.svg")
    texts = said(tmp_path / "f.svg")
    assert "271" in texts
    numbers = [float(text) for text in texts if text.replace(".", "").isdigit()]
    assert sorted(numbers)[-2] < 10  # but for the bound, no tick is far from the losses


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_too_small_a_sweep_says_why_there_is_no_line(tmp_path: Path, suffix: str) -> None:
    one = forecast(sweep()[:2], (1e6, 1e6))
    draw([one], tmp_path / "f.svg")
    assert f"m: {one.prediction.reason}" in said(tmp_path / "f.svg")
    draw([one], tmp_path / f"f.{suffix}")
    assert (tmp_path / f"f.{suffix}").read_bytes()[:4] in (b"\x89PNG", b"%PDF")
