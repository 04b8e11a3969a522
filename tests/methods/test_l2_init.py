"""L2 Init against closed forms, and fresh initialisations of several architectures."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench import seeds
from clbench.contract.guards import random_states
from clbench.errors import ConfigError
from clbench.methods._fresh import Fresh, norm_names
from clbench.methods.l2_init import L2Init


def llama(seed: int = 0) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return built(LlamaForCausalLM, config, seed)


def gpt2(seed: int = 0) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=8, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return built(GPT2LMHeadModel, config, seed)


def opt(seed: int = 0) -> torch.nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    return built(OPTForCausalLM, config, seed)


def neox(seed: int = 0) -> torch.nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return built(GPTNeoXForCausalLM, config, seed)


def built(kind: Any, config: Any, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = kind(config)
    return model


class Bench:
    """A context around a model that no data comes to: seeds, steps and notes."""

    def __init__(self, module: torch.nn.Module, n_steps: int = 5, seed: int = 7) -> None:
        self.module, self.device = module, torch.device("cpu")
        self.stage = SimpleNamespace(index=1, n_stages=3, seed=seed)
        self.step, self.n_steps = 0, n_steps
        self.notes: dict[str, float] = {}

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def seed(self, *names: int | str) -> int:
        return seeds.derive(self.stage.seed, self.stage.index, self.step, *names)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def note(self, name: str, value: float) -> None:
        self.notes[name] = value

    def descend(self, method: Any, rate: float, n_steps: int, gradient: Any = torch.zeros_like) -> None:
        """Gradient descent on gradient(w) and what the method adds."""
        for self.step in range(n_steps):
            for _, p in self.parameters():
                p.grad = gradient(p.detach())
            method.edit_gradients(self)
            for _, p in self.parameters():
                p.data.sub_(p.grad, alpha=rate)  # type: ignore[arg-type]
                p.grad = None


def make(**options: Any) -> L2Init:
    return L2Init(L2Init.Options(**options))


def theta_0(seed: int = 7) -> dict[str, torch.Tensor]:
    """What the method has to draw, in the test's own words: the initialiser over the modules, after the seed."""
    model = llama(99)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "l2_init"))
        model.apply(model._init_weights)  # type: ignore[arg-type]
    return {name: p.detach() for name, p in model.named_parameters()}


def test_without_a_task_the_gap_decays_by_1_minus_rate_strength() -> None:
    model, rate, strength, n = llama(), 0.3, 0.5, 7
    start, anchor = {k: p.detach().clone() for k, p in model.named_parameters()}, theta_0()
    ctx = Bench(model)
    ctx.descend(make(strength=strength), rate, n)
    for name, p in model.named_parameters():
        expected = start[name]
        if "norm" not in name:
            expected = anchor[name] + (1 - rate * strength) ** n * (start[name] - anchor[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


def test_optimum_beside_a_quadratic() -> None:
    """h/2 (w - b)^2 + lambda/2 (w - theta_0)^2 has its optimum at (h b + lambda theta_0)/(h + lambda)."""
    model, h, b, strength = llama(), 2.0, 0.3, 0.5
    ctx, anchor = Bench(model), theta_0()
    ctx.descend(make(strength=strength, norms=True), 0.3, 60, gradient=lambda w: h * (w - b))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), (h * b + strength * anchor[name]) / (h + strength), rtol=1e-4, atol=1e-6)
    squares = sum(float((p.detach() - anchor[name]).double().square().sum()) for name, p in model.named_parameters())
    ctx.step = ctx.n_steps - 1
    method = make(strength=strength, norms=True)
    method.edit_gradients(ctx)  # type: ignore[arg-type]
    assert ctx.notes["penalty"] == pytest.approx(strength / 2 * squares, rel=1e-5)


def test_resampled_pulls_to_another_theta_0_every_step_and_to_their_mean_in_the_end() -> None:
    ctx = Bench(llama())
    method = make(variant="resampled", strength=1.0)
    first = {n: t.clone() for n, t in method._initial(ctx).items()}  # type: ignore[arg-type]
    ctx.step = 1
    second = method._initial(ctx)  # type: ignore[arg-type]
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert abs(float(torch.corrcoef(torch.stack([first[matrix].flatten(), second[matrix].flatten()]))[0, 1])) < 0.1
    ctx.descend(method, 0.1, 100)
    # w <- 0.9 w + 0.1 theta_0: variance 0.1^2/(1 - 0.9^2) of theta_0's
    weight = dict(ctx.parameters())[matrix].detach()
    assert float(weight.var()) == pytest.approx(0.02**2 * 0.1**2 / (1 - 0.9**2), rel=0.1)


def test_one_theta_0_for_all_stages_of_a_run_and_another_for_another_seed() -> None:
    ctx, method = Bench(llama()), make()
    first = {n: t.clone() for n, t in method._initial(ctx).items()}  # type: ignore[arg-type]
    ctx.stage.index, ctx.step = 2, 3
    again = make()._initial(ctx)  # type: ignore[arg-type]  # as after a resume
    assert all(torch.equal(first[n], again[n]) for n in first)
    ctx.stage.seed = 8
    assert not torch.equal(method._initial(ctx)["model.embed_tokens.weight"], first["model.embed_tokens.weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize("make_model", [llama, gpt2, opt, neox])
def test_fresh_weights_are_distributed_as_the_model_begins(make_model: Any) -> None:
    """Every parameter has the spread that building the model gives it; global random states stay; draws repeat."""
    model, before, fresh = make_model(3), random_states(), Fresh()
    drawn = {n: t.clone() for n, t in fresh.draw(Bench(model), 5, norms=True).items()}  # type: ignore[arg-type]
    assert random_states() == before
    again = fresh.draw(Bench(model), 5, norms=True)  # type: ignore[arg-type]
    assert drawn.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.equal(drawn[name], again[name])
        assert float(drawn[name].mean()) == pytest.approx(float(p.detach().mean()), abs=0.006)
        assert float(drawn[name].std()) == pytest.approx(float(p.detach().std()), rel=0.15, abs=1e-6)
        assert p.ndim < 2 or not torch.equal(drawn[name], p.detach())
    norms = norm_names(model)
    assert norms == {n for n in drawn if "norm" in n or ".ln_" in n}
    assert fresh.draw(Bench(model), 5, norms=False).keys() == drawn.keys() - norms  # type: ignore[arg-type]


def test_what_cannot_be_drawn_is_refused() -> None:
    model = llama()
    model.register_parameter("lora", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ConfigError, match="adapters"):
        make().edit_gradients(Bench(model))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"variant": "zero"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="; give "):
        make(**options)
