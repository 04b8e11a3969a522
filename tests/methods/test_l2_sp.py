"""L2-SP: gradient, proximal step, anchors, and a trace that is the Fisher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from clbench.errors import ConfigError
from clbench.method import Need
from clbench.methods.l2_sp import L2Sp
from tests.engine import run_tiny
from tests.methods.quadratic_desk import Desk, finite_difference, flat, gradient_of, numbers, put, stage_of, values_of
from tests.methods.test_rank1_ewc import D, desk_of, gradients, last_weights


def begun(desk: Desk, index: int = 1, **options: Any) -> L2Sp:
    method = L2Sp(L2Sp.Options(**({"rows": 32} | options)))
    desk.stage = stage_of(index)
    method.begin_stage(desk.ctx)
    return method


@pytest.mark.parametrize("anchor", ["base", "previous"])
def test_gradient_and_proximal_step(anchor: str) -> None:
    desk = desk_of()
    at, theta = numbers(7, D), numbers(9, D)
    put(desk, at)
    expected_anchor = at if anchor == "previous" else torch.zeros_like(at)  # the desk's base is zero
    coupled, prox = (begun(desk, strength=0.6, anchor=anchor, apply=apply) for apply in ("coupled", "prox"))
    put(desk, theta)
    value: Callable[[torch.Tensor], float] = lambda t: 0.3 * (t - expected_anchor).square().sum().item()  # noqa: E731
    torch.testing.assert_close(gradient_of(coupled, desk), 0.6 * (theta - expected_anchor), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_of(coupled, desk), finite_difference(value, theta), rtol=1e-6, atol=1e-6)
    assert gradient_of(prox, desk).abs().max() == 0
    coupled.after_step(desk.ctx)
    assert torch.equal(flat(desk), theta)
    prox.after_step(desk.ctx)
    torch.testing.assert_close(flat(desk), (theta + 0.06 * expected_anchor) / 1.06, rtol=1e-12, atol=1e-12)
    put(desk, theta)
    coupled.end_stage(desk.ctx)
    assert desk.notes["penalty"] == pytest.approx(value(theta), rel=1e-12)
    assert (coupled.state_dict()[0] == {}) == (anchor == "base")


def test_the_trace_is_that_of_the_past_stages_fisher() -> None:
    desk = desk_of()
    method = begun(desk, scale="trace", anchor="previous", strength=2.0)
    traces = [gradients(desk).square().sum(1).mean().item()]
    put(desk, numbers(8, D))
    method.end_stage(desk.ctx)
    traces.append(gradients(desk).square().sum(1).mean().item())
    assert method.scale * D == pytest.approx(sum(traces), rel=1e-9) and desk.asked == [0, 1]
    desk.stage = stage_of(2)
    method.begin_stage(desk.ctx)
    put(desk, numbers(9, D))
    expected = 2 * sum(traces) / D * (numbers(9, D) - numbers(8, D))
    torch.testing.assert_close(gradient_of(method, desk), expected, rtol=1e-9, atol=1e-9)
    assert sum(flops for flops, _ in desk.bills) == 2 * 3 * 32


def test_state_comes_back_and_replaces_what_was_there() -> None:
    desk = desk_of()
    method = begun(desk, scale="trace", anchor="previous")
    tensors, values = values_of(method)
    put(desk, numbers(9, D))
    used = begun(desk_of(seed=3), scale="trace", anchor="previous")
    used.load_state_dict(tensors, values)
    assert torch.equal(gradient_of(method, desk), gradient_of(used, desk))
    assert gradient_of(used, desk).abs().max() > 0


def test_needs_are_those_of_the_options() -> None:
    assert L2Sp().needs == {Need.STAGE_BOUNDARIES, Need.BASE_WEIGHTS}
    assert L2Sp(L2Sp.Options(anchor="previous")).needs == {Need.STAGE_BOUNDARIES}
    assert {Need.PAST_DATA, Need.CURRENT_DATA} < L2Sp(L2Sp.Options(scale="trace")).needs
    for wrong in ({"strength": -1.0}, {"anchor": "next"}, {"scale": "two"}, {"params": "some"}, {"rows": 0}):
        with pytest.raises(ConfigError, match="give"):
            L2Sp(L2Sp.Options(**cast(Any, wrong)))


def test_in_runs(tmp_path: Any) -> None:
    plain = last_weights(run_tiny(tmp_path / "plain"))
    off = last_weights(run_tiny(tmp_path / "off", [L2Sp(L2Sp.Options(strength=0.0))]))
    held = last_weights(run_tiny(tmp_path / "held", [L2Sp(L2Sp.Options(strength=1e9, apply="prox"))]))
    frozen = last_weights(run_tiny(tmp_path / "frozen", ["frozen"]))
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    for name in frozen:
        torch.testing.assert_close(held[name], frozen[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(plain[name], frozen[name])
