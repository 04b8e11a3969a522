"""Continual backprop: the correction that keeps the function, running averages by hand, maturity, fractional rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clbench.contract.lab import Lab
from clbench.errors import ConfigError
from clbench.methods import _units
from clbench.methods._utility import Record
from clbench.methods.continual_backprop import ContinualBackprop
from tests.methods.test_l2_init import gpt2, llama, neox, opt
from tests.methods.test_redo import Place, layer_of

CONSTANT = 5


def make(**options: Any) -> ContinualBackprop:
    return ContinualBackprop(ContinualBackprop.Options(**{"steps": 1, "rate": 0.0, "maturity": 0, **options}))


def with_constant_unit(model: torch.nn.Module) -> Place:
    """A model in whose first layer one unit gives 1.5 or so whatever comes in, with large outgoing weights."""
    ctx = Place(model)
    units = layer_of(ctx)
    with torch.no_grad():
        for layer in units.incoming.values():
            _units.by_unit(layer, layer.weight, incoming=True)[CONSTANT] = 0.0
            layer.bias[CONSTANT] = 1.5
        units.out_FD[CONSTANT] *= 30
    return ctx


@pytest.mark.parametrize("make_model", [gpt2, opt, neox])
@pytest.mark.parametrize("correct", [None, True, False])
def test_replacing_a_constant_unit_leaves_the_function_if_it_is_corrected(
    make_model: Any, correct: bool | None
) -> None:
    """Without the correction, or with a mean that is forgotten before it is read, the logits move."""
    ctx = with_constant_unit(make_model())
    logits, units = ctx.logits(), layer_of(ctx)
    method = make(rate=1 / len(units.out_FD), maturity=1, correct=correct, decay=0.9)
    method.after_step(ctx)  # type: ignore[arg-type]
    assert method.n_replaced == 0 and torch.equal(ctx.logits(), logits)
    for record in method.records.values():
        record.utility_F += 1e6  # of the other layers none is due yet
        record.owed -= 1.5
    first = method.records[units.name]
    first.owed += 1.5
    first.utility_F[CONSTANT] = -1e6
    method.after_step(ctx)  # type: ignore[arg-type]
    assert method.n_replaced == 1
    assert not bool(units.out_FD[CONSTANT].any()) and bool(units.in_FD[0][CONSTANT].any())
    assert first.age_F[CONSTANT] == first.mean_F[CONSTANT] == first.utility_F[CONSTANT] == 0
    gap = float((ctx.logits() - logits).abs().max())
    assert gap > 1e-2 if correct is False else gap < 2e-6


def test_the_correction_is_the_mean_contribution() -> None:
    """Any unit: the bias gains E[h] w_out, E over the looks, with the averages' own weights."""
    ctx = with_constant_unit(neox())
    units, method = layer_of(ctx), make(decay=0.8)
    method.after_step(ctx)  # type: ignore[arg-type]
    h_F = method.records[units.name].expected(0.8)
    seen = _units.look(ctx, [units], rows=4, seen=lambda _, h_NF: h_NF.mean(0))[0]  # type: ignore[arg-type]
    torch.testing.assert_close(h_F, seen, rtol=1e-5, atol=1e-7)
    size = _units.look(ctx, [units], rows=4, seen=lambda _, h_NF: h_NF.abs().mean(0))[0]  # type: ignore[arg-type]
    out_FD, bias = units.out_FD.clone(), units.outgoing.bias.detach().clone()
    second = make(decay=0.8, rate=3 / len(out_FD))
    second.after_step(ctx)  # type: ignore[arg-type]
    gone = (units.out_FD == 0).all(1)
    assert int(gone.sum()) == 3
    torch.testing.assert_close(units.outgoing.bias.detach() - bias, seen[gone] @ out_FD[gone], rtol=1e-3, atol=1e-7)
    # Those whose contribution |w_out| |h| is smallest.
    assert sorted(gone.nonzero().flatten().tolist()) == sorted((out_FD.abs().mean(1) * size).argsort()[:3].tolist())


@pytest.mark.parametrize("utility", ["contribution", "adaptable"])
def test_averages_by_hand(utility: str) -> None:
    """In float64 by numpy over all looks: weights d^(k-1-i)(1-d), divided by 1 - d^k, d = decay^steps."""
    ctx, d, n = Place(llama()), 0.9**4, 5
    units, method = layer_of(ctx), make(decay=0.9, steps=4, utility=utility)
    generator = torch.Generator().manual_seed(0)
    looks = [torch.randn(50, len(units.out_FD), generator=generator) + 0.5 for _ in range(n)]
    w_out = np.abs(units.out_FD.double().numpy()).mean(1)
    w_in = sum(np.abs(w.double().numpy()).mean(1) for w in units.in_FD) / 2
    mean = used = 0.0
    for k, h in enumerate(looks, start=1):
        method._update(units, h)
        values = h.double().numpy()
        mean = d * mean + (1 - d) * values.mean(0)
        if utility == "contribution":
            now = w_out * np.abs(values).mean(0)
        else:
            now = w_out * np.abs(values - mean / (1 - d**k)).mean(0) / w_in
        used = d * used + (1 - d) * now
    record = method.records[units.name]
    assert record.age_F.tolist() == [4 * n] * len(units.out_FD)
    np.testing.assert_allclose(record.expected(0.9).numpy(), mean / (1 - d**n), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(record.utility_F.numpy(), used, rtol=1e-4)


def test_rates_below_one_unit_add_up_and_young_units_are_left_alone() -> None:
    record, share, maturity = Record.empty(10), 0.025, 3
    record.utility_F += torch.arange(10.0) + 1
    replaced = []
    for step in range(1, 41):
        record.age_F += 1
        due = record.due(share=share, maturity=maturity, decay=0.5)
        assert bool((record.age_F[due] > maturity).all())
        assert due.tolist() == sorted(due.tolist())  # utilities rise with the place
        record.forget(due)
        record.utility_F[due] = 100.0  # never again
        replaced.append(len(due))
        n_mature = int((record.age_F > maturity).sum())
        assert n_mature >= 8 or step <= maturity
    # 37 steps of 0.025 of ten mature units, less those that are young for a while
    assert sum(replaced[:3]) == 0 and max(replaced) == 1
    assert 8 <= sum(replaced) <= 9


def test_no_more_are_replaced_than_are_mature() -> None:
    record = Record.empty(4)
    record.age_F += torch.tensor([9, 9, 1, 1])
    record.utility_F += torch.tensor([2.0, 1.0, 0.0, 0.0])
    assert record.due(share=5.0, maturity=5, decay=0.9).tolist() == [1, 0]


def test_a_llama_has_no_bias_to_correct() -> None:
    with pytest.raises(ConfigError, match="has no bias"):
        make(correct=True).after_step(Place(llama()))  # type: ignore[arg-type]
    ctx = Place(llama())
    method = make(rate=1 / 64)
    method.after_step(ctx)  # type: ignore[arg-type]
    assert method.n_replaced == ctx.notes["replaced_in_run"] == 1


@pytest.fixture(scope="module")
def lab(clbench_home: Any, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("cbp"))


def test_in_the_loop_it_replaces_the_rate(lab: Lab) -> None:
    method = make(rate=0.01, maturity=2, rows=2)
    method.name = "continual-backprop"
    trace = lab.train([method], n_stages=2)
    n_units = sum(len(record.age_F) for record in method.records.values())
    n_steps = sum(trace.n_steps.values())
    assert method.n_replaced == pytest.approx(0.01 * n_units * (n_steps - 2), abs=len(method.records) + 2)
    assert trace.ledger["extra_tokens"]["units"] == n_steps * 2 * lab.length


@pytest.mark.parametrize(
    "options",
    [{"rate": 2.0}, {"maturity": -1}, {"decay": 1.0}, {"utility": "age"}, {"steps": 0}, {"rows": 0}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="; give "):
        make(**options)
