"""Shrink and perturb against its mean and its stationary variance, and its two places in the loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clbench.contract.lab import Lab
from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Weights
from clbench.methods.shrink_perturb import ShrinkPerturb
from clbench.train.models import copy_weights, weights_of
from tests.methods.test_l2_init import Bench, llama

MATRIX = "model.layers.0.mlp.up_proj.weight"
VARIANCE = 0.02**2


def make(**options: Any) -> ShrinkPerturb:
    return ShrinkPerturb(ShrinkPerturb.Options(**options))


def walked(method: ShrinkPerturb, n_steps: int) -> tuple[Weights, Weights]:
    """Weights before and after so many steps without a gradient."""
    ctx = Bench(llama())
    start = copy_weights(weights_of(ctx.module))
    for ctx.step in range(n_steps):
        method.after_step(ctx)  # type: ignore[arg-type]
    return start, copy_weights(weights_of(ctx.module))


def test_without_noise_weights_shrink_by_a_power() -> None:
    start, end = walked(make(shrink=0.05, perturb=0.0), 20)
    for name, tensor in end.items():
        factor = 1 if "norm" in name else 0.95**20
        torch.testing.assert_close(tensor, factor * start[name], rtol=1e-5, atol=1e-9)


def test_mean_and_variance_of_the_noise() -> None:
    """After t steps from theta_0: mean (1-s)^t theta_0, variance p^2 V (1 - (1-s)^2t)/(1 - (1-s)^2) per weight."""
    s, p, n = 0.1, 0.5, 8
    start, end = walked(make(shrink=s, perturb=p), n)
    noise = end[MATRIX] - (1 - s) ** n * start[MATRIX]
    expected = p**2 * VARIANCE * (1 - (1 - s) ** (2 * n)) / (1 - (1 - s) ** 2)
    assert float(noise.var()) == pytest.approx(expected, rel=0.08)
    assert abs(float(noise.mean())) < 4 * math.sqrt(expected / noise.numel())
    slope = float((end[MATRIX] * start[MATRIX]).sum() / start[MATRIX].square().sum())
    assert slope == pytest.approx((1 - s) ** n, abs=4 * math.sqrt(expected / (VARIANCE * noise.numel())))


def test_stationary_variance_needs_another_draw_every_step() -> None:
    """p^2 V/(1 - (1-s)^2); one draw used again and again would give p^2 V/s^2."""
    s, p = 0.1, 0.5
    _, end = walked(make(shrink=s, perturb=p), 60)
    assert float(end[MATRIX].var()) == pytest.approx(p**2 * VARIANCE / (1 - (1 - s) ** 2), rel=0.08)


@pytest.fixture(scope="module")
def lab(clbench_home: Any, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("shrink"))


class Begins(Method):
    """Keeps the weights at every stage's begin and end."""

    name = "begins"
    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[tuple[int, str], Weights] = {}

    def begin_stage(self, ctx: Context) -> None:
        self.at[ctx.stage.index, "begin"] = copy_weights(weights_of(ctx.module))

    def end_stage(self, ctx: Context) -> None:
        self.at[ctx.stage.index, "end"] = copy_weights(weights_of(ctx.module))


def test_before_every_stage_it_acts_once(lab: Lab) -> None:
    method, seen = make(when="stage", shrink=0.4, perturb=0.0), Begins()
    method.name = "shrink-perturb"
    lab.train([method, seen], n_stages=2)
    before = {1: copy_weights(weights_of(lab.base)), 2: seen.at[1, "end"]}
    for k, weights in before.items():
        for name, tensor in weights.items():
            factor = 1.0 if "norm" in name else 0.6
            torch.testing.assert_close(seen.at[k, "begin"][name], factor * tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{"when": "epoch"}, {"shrink": 1.5}, {"perturb": -1.0}, {"shrink": math.nan}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="; give "):
        make(**options)
