"""EWC: the Fisher against gradients by hand, anchors that collapse exactly, the planted bug of squared batch means."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import clbench.fisher.estimate
from clbench.errors import ConfigError
from clbench.method import Need
from clbench.methods.ewc import Ewc
from tests.engine import run_tiny
from tests.fisher.gaussian import Gaussian
from tests.methods.quadratic_desk import Desk, finite_difference, flat, gradient_of, numbers, put, stage_of, values_of
from tests.methods.test_rank1_ewc import D, desk_of, gradients, last_weights

Seen = tuple[torch.Tensor, torch.Tensor]


def through(desk: Desk, n_stages: int, **options: Any) -> tuple[Ewc, list[Seen]]:
    """Return a method after some stages, each at other weights, and (Fisher, anchor) of each by hand."""
    n = len(cast(Gaussian, desk.module).x_ND)
    method = Ewc(Ewc.Options(**({"rows": n, "rows_per_batch": 4} | options)))
    seen: list[Seen] = []
    for k in range(n_stages):
        put(desk, numbers(20 + k, D))
        desk.stage = stage_of(k)
        if k == 0:
            desk.stage = stage_of(1)
            method.begin_stage(desk.ctx)
        else:
            method.end_stage(desk.ctx)
        seen.append((gradients(desk).square().mean(0), numbers(20 + k, D)))
    return method, seen


def test_the_fisher_is_the_mean_square_of_each_sequences_gradient() -> None:
    desk = desk_of()
    method, [(fisher, anchor)] = through(desk, 1)
    torch.testing.assert_close(method.fisher["layer.weight"][0], fisher, rtol=1e-10, atol=0)
    torch.testing.assert_close(method.anchor["layer.weight"][0], anchor)
    assert desk.notes["base_trace"] == pytest.approx(fisher.sum().item(), rel=1e-9) and desk.asked == [0]
    assert sum(flops for flops, _ in desk.bills) == 3 * 32


def test_in_a_linear_model_the_fisher_is_known_in_closed_form() -> None:
    # [(s2 + D^T S D) S_jj + 2 a_j^2] / s2^2 with a = S D, research notes 2.1.
    s2, shift = 0.5, numbers(3, D)
    desk = desk_of(60_000, s2=s2)
    method = Ewc(Ewc.Options(rows=60_000, rows_per_batch=2000))
    method.begin_stage(desk.ctx)
    from tests.methods.quadratic_desk import positive

    s = positive(4, D)
    a = s @ shift
    expected = ((s2 + shift @ s @ shift) * s.diagonal() + 2 * a.square()) / s2**2
    torch.testing.assert_close(method.fisher["layer.weight"][0], expected, rtol=0.05, atol=0)


def same_for_all_batch_sizes() -> None:
    """Fail unless the strength means the same whatever the rows per pass."""
    found = [through(desk_of(), 1, rows_per_batch=b)[0].fisher["layer.weight"] for b in (1, 4, 16)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=0)


def test_the_fisher_does_not_depend_on_how_rows_are_batched() -> None:
    same_for_all_batch_sizes()


def test_squares_of_batch_means_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared_batch_means(model: Any, batches: Any, *, names: Any) -> Any:
        means = [clbench.fisher.estimate.mean_gradient(model, [batch], names=names)[0] for batch in batches]
        return {n: torch.stack([m[n].square() for m in means]).mean(0) for n in names}, means[0], len(means)

    monkeypatch.setattr(clbench.fisher.estimate, "second_moment", squared_batch_means)
    with pytest.raises(AssertionError):
        same_for_all_batch_sizes()
    with pytest.raises(AssertionError):
        test_the_fisher_is_the_mean_square_of_each_sequences_gradient()


@pytest.mark.parametrize("apply", ["coupled", "prox"])
def test_two_vectors_hold_all_anchors_exactly(apply: str) -> None:
    desk = desk_of()
    method, seen = through(desk, 4, strength=0.7, apply=apply)
    theta = numbers(9, D)
    put(desk, theta)
    if apply == "coupled":
        expected = sum(0.7 * f * (theta - a) for f, a in seen)
        torch.testing.assert_close(gradient_of(method, desk), expected, rtol=1e-10, atol=1e-10)
        value = lambda at: float(sum(0.35 * (f * (at - a).square()).sum() for f, a in seen))  # noqa: E731
        torch.testing.assert_close(gradient_of(method, desk), finite_difference(value, theta), rtol=1e-6, atol=1e-5)
    else:
        method.after_step(desk.ctx)
        kappa = 0.07  # lr 0.1 times 0.7
        f_sum, m = sum(f for f, _ in seen), sum(f * a for f, a in seen)
        torch.testing.assert_close(flat(desk), (theta + kappa * m) / (1 + kappa * f_sum), rtol=1e-10, atol=1e-10)
    tensors = values_of(method)[0]
    assert sum(t.numel() for t in tensors.values()) == 2 * D


def test_weights_of_which_nothing_is_known_are_free() -> None:
    desk = desk_of()
    cast(Gaussian, desk.module).x_ND[:, 2] = 0  # this weight never has a gradient
    method, _ = through(desk, 3, strength=1e6)
    assert torch.isfinite(method.anchor["layer.weight"]).all()
    put(desk, numbers(9, D))
    found = gradient_of(method, desk)
    assert found[2] == 0 and found[[0, 1, 3, 4, 5]].abs().min() > 0


def test_online_forgets_the_fisher_and_moves_the_anchor() -> None:
    method, seen = through(desk_of(), 3, variant="online", gamma=0.5)
    expected = 0.25 * seen[0][0] + 0.5 * seen[1][0] + seen[2][0]
    torch.testing.assert_close(method.fisher["layer.weight"][0], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(method.anchor["layer.weight"][0], seen[2][1])


def test_state_comes_back_and_replaces_what_was_there() -> None:
    desk = desk_of()
    method, _ = through(desk, 2)
    tensors, values = values_of(method)
    used, _ = through(desk_of(seed=5), 3)
    used.load_state_dict(tensors, values)
    put(desk, numbers(9, D))
    assert torch.equal(gradient_of(method, desk), gradient_of(used, desk))
    used.end_stage(desk.ctx)  # and it is a copy
    assert all(torch.equal(t, method.state_dict()[0][name]) for name, t in tensors.items())


def test_needs_and_options() -> None:
    assert Need.PAST_DATA in Ewc().needs and Need.PAST_DATA not in Ewc(Ewc.Options(base_stage=False)).needs
    for wrong in ({"gamma": 1.5}, {"variant": "both"}, {"strength": -1.0}, {"apply": "late"}, {"rows_per_batch": 0}):
        with pytest.raises(ConfigError, match="give"):
            Ewc(Ewc.Options(**cast(Any, wrong)))


def test_without_strength_a_run_is_the_plain_one(tmp_path: Any) -> None:
    plain = last_weights(run_tiny(tmp_path / "plain"))
    off = last_weights(run_tiny(tmp_path / "off", [Ewc(Ewc.Options(strength=0.0, rows=8))]))
    held = last_weights(run_tiny(tmp_path / "held", [Ewc(Ewc.Options(strength=1e8, rows=8, apply="prox"))]))
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert any(not torch.equal(plain[name], held[name]) for name in plain)
