"""Adapters: frozen weights, exact merges, O-LoRA's penalty against autograd, and what may stand beside them."""

from __future__ import annotations

import copy
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from clbench.errors import ConfigError
from clbench.method import Context, Method, Stage, StagePlan, Weights
from clbench.methods._adapters import ADAPTER, chosen, factors, fold, inject, layers, merge_flops, merged
from clbench.methods.lora import Lora
from clbench.methods.o_lora import OLora, orthogonality, orthogonality_gradient
from clbench.track import ModelSpec
from clbench.train.checkpoint import load_latest
from clbench.train.models import copy_weights, load_model, load_weights, make_model, weights_of
from tests.engine import run_tiny
from tests.methods.test_lwf import Stop, Stopper, distance, last_weights
from tests.train.test_data import stage

WIDTH, INNER, N_LAYERS, VOCABULARY = 16, 24, 2, 32
SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
"""(d_out, d_in) of a Llama layer's linear maps: q, k, v, o, gate, up, down."""


def llama() -> torch.nn.Module:
    spec = ModelSpec(hidden_size=WIDTH, intermediate_size=INNER, n_layers=N_LAYERS, n_heads=2, max_length=16)
    return make_model(spec, vocab_size=VOCABULARY, eos_id=0, seed=0)


def adapted(*, rank: int = 3, alpha: float = 5.0, target: str = "all", seed: int = 1) -> torch.nn.Module:
    model = llama()
    inject(model, rank=rank, alpha=alpha, dropout=0.0, target=target, seed=seed)
    return model


def disturb(model: torch.nn.Module, seed: int = 3) -> None:
    """Give every factor other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(20).reshape(2, 10) % VOCABULARY
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=tokens).logits
    return out


def frozen(model: torch.nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@dataclass
class Desk:
    """What a context gives to a method with adapters."""

    module: torch.nn.Module
    stage: Stage = field(default_factory=lambda: stage(2))
    bills: list[float] = field(default_factory=list)

    def seed(self, *names: int | str) -> int:
        return 11

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        assert purpose == "merge"
        self.bills.append(flops)


def context(module: torch.nn.Module, index: int = 2) -> Context:
    return cast(Context, Desk(module, stage(index)))


def test_only_the_factors_are_trained_and_there_are_r_times_the_sum_of_widths_of_them() -> None:
    model = adapted(rank=3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == N_LAYERS * sum(3 * (o + i) for o, i in SHAPES)
    before = frozen(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        loss = model(input_ids=torch.arange(20).reshape(2, 10)).logits.logsumexp(-1).sum()
        loss.backward()
        optimizer.step()
    after = frozen(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(bool(b.any()) for b in (factors(layer)[1] for _, layer in layers(model)))


def test_a_new_adapter_changes_nothing_and_the_released_names_and_shapes_are_the_plain_models() -> None:
    plain, model = llama(), adapted()
    assert torch.equal(logits_of(plain), logits_of(model))
    released = merged(weights_of(model), 5 / 3)
    own = weights_of(plain)
    assert {n: (t.shape, t.dtype) for n, t in released.items()} == {n: (t.shape, t.dtype) for n, t in own.items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in released.items())


def test_merged_weights_give_the_adapters_logits_and_are_those_of_peft() -> None:
    plain, model = llama(), adapted()
    disturb(model)
    released = merged(weights_of(model), 5 / 3)
    assert (logits_of(plain) - logits_of(model)).abs().max() > 0.01
    load_weights(plain, released)
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=0, atol=2e-6)
    for name, layer in layers(model):
        expected = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
        torch.testing.assert_close(released[f"{name}.weight"], expected.detach(), rtol=0, atol=1e-6)


def test_adapters_depend_on_their_seed_alone_and_leave_the_global_generator() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = adapted(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(456)
    same, other = adapted(seed=1), adapted(seed=2)
    pairs = [(factors(a)[0], factors(b)[0], factors(c)[0]) for (_, a), (_, b), (_, c) in
             zip(layers(one), layers(same), layers(other), strict=True)]  # fmt: skip
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)


def test_targets_are_named_by_the_last_part_and_the_output_layer_is_none() -> None:
    model = llama()
    assert len(chosen(model, "all")) == N_LAYERS * len(SHAPES)
    assert chosen(model, "q_proj+down_proj")[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    for wrong in ("lm_head", "q_proj+nonsense", ""):
        with pytest.raises(ConfigError, match=r"down_proj\+gate_proj"):
            chosen(model, wrong)
    with pytest.raises(ConfigError, match="no linear layer"):
        chosen(torch.nn.Sequential(torch.nn.ReLU()), "all")


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_best_update_of_each_rank_is_reached_and_full_rank_expresses_every_update(rank: int) -> None:
    # Least squares on the unit vectors: the best error is the tail of the singular values (Eckart and Young 1936).
    generator = torch.Generator().manual_seed(0)
    start, goal = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False)).double()
    with torch.no_grad():
        cast(torch.nn.Linear, model[0]).weight.copy_(start)
    inject(model, rank=rank, alpha=2.0, dropout=0.0, target="all", seed=0)
    model.double()
    disturb(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(
        trained, max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = (model(torch.eye(6, dtype=torch.float64)).T - goal).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    reached = (merged(weights_of(model), 2 / rank)["0.weight"] - goal).square().sum().item()
    best = torch.linalg.svdvals(goal - start)[rank:].square().sum().item()
    assert reached == pytest.approx(best, rel=1e-6, abs=1e-10)


def test_folding_keeps_the_function_and_begins_adapters_that_change_nothing() -> None:
    model = adapted()
    disturb(model)
    before, expected = logits_of(model), merged(weights_of(model), 5 / 3)
    old = [factors(layer)[0].detach().clone() for _, layer in layers(model)]
    fold(model, seed=4)
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=2e-6)
    for (name, layer), a_before in zip(layers(model), old, strict=True):
        a, b = factors(layer)
        assert not b.any() and not torch.equal(a, a_before) and a.requires_grad
        assert a.abs().max() <= 1 / math.sqrt(a.shape[1])  # as torch.nn.Linear begins
        assert torch.equal(layer.base_layer.weight, expected[f"{name}.weight"])


def test_one_adapter_a_run_is_never_folded_and_one_a_stage_is_with_the_optimizer_reset() -> None:
    for scope, folds in (("run", False), ("stage", True)):
        method = Lora(Lora.Options(r=3, alpha=5.0, scope=scope))  # type: ignore[arg-type]
        assert method.plan(stage(1)) == StagePlan(optimizer="reset" if folds else None)
        model = llama()
        method.attach(model, 1)
        disturb(model)
        before = frozen(model)
        for index in (1, 2):
            desk = Desk(model, stage(index))
            method.begin_stage(cast(Context, desk))
            assert (distance(before, frozen(model)) > 0) == (folds and index == 2)
            assert desk.bills == ([merge_flops(model)] if folds and index == 2 else [])
    assert merge_flops(model) == N_LAYERS * sum(2 * 3 * o * i for o, i in SHAPES)


def orthonormal(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def test_orthogonal_directions_have_no_penalty_and_rotating_the_inputs_changes_nothing() -> None:
    basis = orthonormal(8, 0)
    exact = torch.eye(8, dtype=torch.float64)
    assert orthogonality(exact[:3], exact[3:6]).item() == 0
    assert not orthogonality_gradient(exact[:3], exact[3:6]).any()
    assert orthogonality(basis[:3], basis[3:6]).item() < 1e-14
    new, old = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned = orthogonality(new @ basis, old @ basis)
    assert turned.item() == pytest.approx(orthogonality(new, old).item(), rel=1e-12)
    gradient = orthogonality_gradient(new @ basis, old @ basis)
    torch.testing.assert_close(gradient, orthogonality_gradient(new, old) @ basis, rtol=0, atol=1e-12)
    by_hand = sum(abs(float(a @ b)) for a in new for b in old)
    assert orthogonality(new, old).item() == pytest.approx(by_hand, rel=1e-12)


def test_the_gradient_that_is_added_is_the_penaltys() -> None:
    method = OLora(OLora.Options(r=3, alpha=5.0, lambda1=0.7, lambda2=0.3))
    model = llama()
    method.attach(model, 1)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name, _ in layers(model)}
    for index in (1, 2, 3):  # two earlier stages
        for name, layer in layers(model):
            if index > 1:
                kept[name].append(factors(layer)[0].detach().clone())
        method.begin_stage(context(model, index))
        disturb(model, seed=index)
    live = [factor for _, layer in layers(model) for factor in factors(layer)]
    penalty = sum(
        0.7 * sum((factors(layer)[0] @ old.T).abs().sum() for old in kept[name])
        + 0.3 * sum(factor.norm() for factor in factors(layer))
        for name, layer in layers(model)
    )
    expected = torch.autograd.grad(cast(torch.Tensor, penalty), live)
    for factor in live:
        factor.grad = torch.ones_like(factor)
    method.edit_gradients(context(model, 3))
    for factor, gradient in zip(live, expected, strict=True):
        torch.testing.assert_close(cast(torch.Tensor, factor.grad), 1 + gradient, rtol=1e-5, atol=1e-5)


def test_the_first_stage_has_no_penalty_and_a_factor_that_is_zero_has_no_gradient_of_its_norm() -> None:
    method = OLora(OLora.Options(lambda2=0.5))
    model = llama()
    method.attach(model, 1)
    method.begin_stage(context(model, 1))
    method.edit_gradients(context(model, 1))
    for _, layer in layers(model):
        a, b = factors(layer)
        assert b.grad is not None and not b.grad.any()  # B begins at zero
        torch.testing.assert_close(a.grad, 0.5 * a.detach() / a.detach().norm())
    assert method.old == {}


def test_earlier_factors_come_back_from_the_state_of_another_object() -> None:
    method, model = OLora(), llama()
    method.attach(model, 1)
    for index in (1, 2, 3):
        method.begin_stage(context(model, index))
    tensors, values = method.state_dict()
    assert len(tensors) == N_LAYERS * len(SHAPES) and {len(t) for t in tensors.values()} == {2 * 8}
    used = OLora()
    used.old = {"nonsense": torch.zeros(1)}
    used.load_state_dict(tensors, values)
    assert used.old.keys() == tensors.keys() and all(torch.equal(used.old[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Lora(Lora.Options(r=0)), "rank"),
        (lambda: Lora(Lora.Options(alpha=0.0)), "scale"),
        (lambda: Lora(Lora.Options(alpha=math.inf)), "scale"),
        (lambda: Lora(Lora.Options(dropout=1.0)), "share"),
        (lambda: OLora(OLora.Options(lambda1=-1.0)), "lambda1"),
        (lambda: OLora(OLora.Options(lambda2=math.nan)), "lambda2"),
    ],
)
def test_options_that_make_no_adapter_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


def test_without_peft_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install peft"):
        Lora()


def test_two_methods_with_adapters_are_refused() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="at most one"):
        OLora().attach(model, 1)


def test_averages_of_one_adapter_are_merged_and_averages_over_several_are_refused() -> None:
    for scope in ("run", "stage"):
        method = Lora(Lora.Options(r=3, alpha=5.0, scope=scope))  # type: ignore[arg-type]
        model = llama()
        method.attach(model, 1)
        disturb(model)
        own = copy_weights(weights_of(model))
        average = {n: 0.5 * t if ".lora_" in n else t for n, t in own.items()}
        assert method.release(context(model), own).keys() == weights_of(llama()).keys()
        if scope == "run":
            found, whole = method.release(context(model), average), merged(own, 5 / 3)
            start = weights_of(llama())
            for name in whole:  # half of B times half of A
                torch.testing.assert_close(
                    found[name] - start[name], (whole[name] - start[name]) / 4, rtol=0, atol=1e-6
                )
        else:
            with pytest.raises(ConfigError, match="scope=run"):
                method.release(context(model), average)


def test_a_run_with_adapters_ships_plain_models_and_trains_nothing_else(tmp_path: Path) -> None:
    store = run_tiny(tmp_path, ["replay", "lwf:teacher=base", "ema", "lora"])
    state = load_latest(store.folder / "checkpoints", pytest.fail)
    assert state is not None
    first, *later = (weights_of(load_model(folder)) for folder in sorted((store.folder / "release").iterdir()))
    for name, tensor in first.items():
        adapts = name.endswith("proj.weight")
        assert all(torch.equal(tensor, one[name]) != adapts for one in later), name
        assert adapts or torch.equal(state.weights[name], tensor)
    assert sum(t.numel() for n, t in state.optimizer.items() if n.startswith("exp_avg/")) == sum(
        t.numel() for n, t in state.weights.items() if ".lora_" in n
    )


def test_an_average_behind_the_merge_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-m ema -m lora"):
        run_tiny(tmp_path, ["lora", "ema"])


@pytest.mark.parametrize("methods", [["wsd:optimizer=track", "lora:scope=stage"], ["o-lora:lambda1=2,lambda2=0.1"]])
def test_a_stage_that_is_stopped_in_the_middle_ends_with_the_same_bits(
    methods: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe() -> list[str | Method]:
        return [*methods, Stopper()]

    whole = run_tiny(tmp_path / "whole", probe())
    monkeypatch.setattr(Stopper, "at", (3, 1))
    with pytest.raises(Stop):
        run_tiny(tmp_path / "stopped", probe())
    monkeypatch.setattr(Stopper, "at", None)
    resumed = run_tiny(tmp_path / "stopped", probe())
    assert distance(last_weights(whole), last_weights(resumed)) == 0
    assert whole.ledger()["flops"] == pytest.approx(resumed.ledger()["flops"])


def test_a_copy_of_the_model_has_its_own_adapters() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    disturb(model)
    assert not any(bool(factors(layer)[1].any()) for _, layer in layers(twin))
