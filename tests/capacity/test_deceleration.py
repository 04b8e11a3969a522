"""The loss-deceleration fit: planted parameters come back, intervals hold what they promise, bad input is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from clbench.capacity.deceleration import Deceleration, fit, of_stages, thinned
from clbench.cli_deceleration import deceleration
from clbench.errors import ConfigError
from clbench.results.store import RunStore, StepLine


def planted(*, t_d: float, loss_d: float, rate: float, c0: float, f: float, t_last: float = 262144) -> Deceleration:
    log_b = math.log(loss_d) + c0 * math.log(t_d)
    return Deceleration(log_b, c0, rate - c0, t_d, f, 0.0, t_last, {})


OF_14M = planted(t_d=5877, loss_d=4.05, rate=0.013, c0=0.2, f=0.3)
"""The published fit of a model of 14 million parameters (mirandrom/zsl)."""


@pytest.mark.parametrize(
    "truth",
    [
        OF_14M,
        planted(t_d=4644, loss_d=3.16, rate=0.035, c0=0.28, f=0.1),
        planted(t_d=3717, loss_d=2.86, rate=0.034, c0=0.17, f=0.6),
        planted(t_d=60, loss_d=4.4, rate=0.4, c0=0.1, f=0.2, t_last=2000),  # it may also quicken
    ],
)
def test_noiseless_data_give_their_parameters_back(truth: Deceleration) -> None:
    t = np.geomspace(truth.t_d / 50, truth.t_last, 80)
    found = fit(t, truth.loss_at(t), intervals=False)
    for name in ("t_d", "loss_d_nats", "rate_d", "c0", "c1", "f"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-6), name
    assert found.rsle < 1e-9


def test_derived_figures_are_the_limits_of_the_curve() -> None:
    far, near = 1e12, 1e-3
    assert OF_14M.loss_at(far) == pytest.approx(OF_14M.far_loss_at(far), rel=1e-6)
    assert OF_14M.far_loss_at(OF_14M.t_d) == pytest.approx(4.05)
    slope = math.log(OF_14M.loss_at(near) / OF_14M.loss_at(2 * near)) / math.log(2)
    assert slope == pytest.approx(0.2, rel=1e-6)
    assert OF_14M.far_loss_at(262144) == pytest.approx(3.88, abs=0.03)  # as published, from rounded figures


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    t = np.geomspace(100, OF_14M.t_last, 60)
    generator = np.random.default_rng(0)
    hits = dict.fromkeys(("t_d", "loss_d_nats", "rate_d"), 0)
    n = 6
    for _ in range(n):
        found = fit(t, OF_14M.loss_at(t) * np.exp(0.004 * generator.standard_normal(len(t))))
        for name in hits:
            low, high = found.intervals[name]
            assert low < getattr(found, name) < high
            hits[name] += low <= getattr(OF_14M, name) <= high
    assert all(n - 2 <= hit <= n for hit in hits.values()), hits


def test_more_noise_makes_wider_intervals_and_none_makes_them_vanish() -> None:
    t = np.geomspace(100, OF_14M.t_last, 60)
    noise = np.random.default_rng(1).standard_normal(len(t))
    widths = []
    for size in (0.0, 0.001, 0.01):
        low, high = fit(t, OF_14M.loss_at(t) * np.exp(size * noise)).intervals["rate_d"]
        widths.append(high - low)
    assert widths[0] < 1e-4 < widths[1] < widths[2]


def test_a_curve_without_a_break_leaves_its_place_unbounded() -> None:
    t = np.geomspace(100, 1e5, 40)
    noise = np.exp(0.01 * np.random.default_rng(2).standard_normal(len(t)))
    found = fit(t, 10 * t**-0.1 * noise)
    figures = found.figures()
    sides = [figures[f"t_d_{side}"] for side in ("low", "high")]
    assert any(math.isnan(one.value) and one.reason == "the data do not bound it" for one in sides)
    assert t[0] <= found.t_d <= t[-1]


def test_thinning_keeps_a_tenth_of_each_decade_and_means_of_a_window() -> None:
    t = np.arange(1, 20_001, dtype=np.float64)
    kept, loss = thinned(t, t)
    assert kept[0] == 101 and list(np.diff(kept[:50])) == [10] * 49
    late = kept[kept > 1000]
    assert set(np.diff(late[late < 10_000])) == {100} and set(np.diff(kept[kept > 10_500])) == {1000}
    place = 30
    window = t[(t >= kept[place] / 1.2) & (t <= kept[place])]
    assert loss[place] == pytest.approx(window.mean())
    short, _ = thinned(t[:50], t[:50], first=5)
    assert short[0] == 6 and len(short) > 30


@pytest.mark.parametrize(
    ("t", "loss", "message"),
    [
        (np.arange(1, 8), np.ones(7), "7 times and 7 losses"),
        (np.arange(1, 10), np.ones(8), "9 times and 8 losses"),
        (np.arange(9), np.ones(9), "positive and rising"),
        (np.ones(9), np.ones(9), "positive and rising"),
        (np.arange(1, 10), np.array([1.0] * 8 + [math.nan]), "positive and rising"),
    ],
)
def test_what_cannot_be_fitted_is_refused(t: np.ndarray, loss: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(t, loss)


# --- of a run


def logged(folder: Path, curves: dict[int, Deceleration], n_steps: int = 4000) -> RunStore:
    """A run folder with a log of every tenth step of planted curves."""
    store = RunStore(folder)
    for stage, truth in curves.items():
        for done in range(10, n_steps + 1, 10):
            store.append_steps([_line(stage, done, float(truth.loss_at(done)))])
    return store


def _line(stage: int, done: int, loss_nats: float) -> StepLine:
    return StepLine(
        stage=stage,
        step=done - 1,
        loss_nats=loss_nats,
        lr=0.1,
        grad_norm=1.0,
        n_tokens=100 * done,
        tokens_per_second=1.0,
        memory_bytes=1,
        cpu_percent=1.0,
        time="2026-01-01T00:00:00+00:00",
    )


def test_every_stage_of_a_run_is_fitted_by_its_own_steps(tmp_path: Path) -> None:
    curves = {
        1: planted(t_d=500, loss_d=4.0, rate=0.05, c0=0.2, f=0.2),
        2: planted(t_d=900, loss_d=4.5, rate=0.02, c0=0.15, f=0.2),
    }
    store = logged(tmp_path, curves)
    found = of_stages(store)
    assert [(one.stage, one.n_steps, one.first) for one in found] == [(1, 4000, 100), (2, 4000, 100)]
    for one in found:
        assert one.fit is not None
        truth = curves[one.stage]
        # means over [t/1.2, t] are a little above the curve and slow down later
        assert one.fit.t_d == pytest.approx(1.1 * truth.t_d, rel=0.05)
        assert one.fit.rate_d == pytest.approx(truth.rate_d, abs=0.01)
        assert one.fit.loss_d_nats == pytest.approx(truth.loss_d_nats, rel=0.01)
    (short,) = of_stages(logged(tmp_path / "short", {1: curves[1]}, n_steps=60), first=10)
    assert short.fit is None and short.reason == "5 points are left, 8 are wanted" and short.as_dict()["figures"] == {}


def test_the_command_shows_a_row_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = logged(tmp_path, {1: planted(t_d=500, loss_d=4.0, rate=0.05, c0=0.2, f=0.2)}, n_steps=2000)
    deceleration(_as_run(store), first=None, as_json=True)
    (fits,) = json.loads(capsys.readouterr().out).values()
    figures = fits[0]["figures"]
    assert figures["t_d"]["value"] == pytest.approx(550, rel=0.06)
    assert figures["t_d_low"]["value"] < figures["t_d"]["value"] < figures["t_d_high"]["value"]
    deceleration(_as_run(store), first=200, as_json=False)
    shown = capsys.readouterr().out
    assert "break at step" in shown and "2000" in shown
    with pytest.raises(ConfigError, match="cannot be left out"):
        deceleration([tmp_path], first=-1)
    with pytest.raises(ConfigError, match="no run in these folders"):
        (tmp_path / "empty").mkdir()
        deceleration([tmp_path / "empty"])


def _as_run(store: RunStore) -> list[Path]:
    """Make a folder one that is found as a run."""
    config = {"run_id": "r", "track": {}, "stages": [], "method": {"label": "m"}, "seed": 0}
    (store.folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    return [store.folder]
