"""Learned shares: gradients against autograd, ends to the bit, and that learning finds what it should."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.errors import ConfigError
from clbench.merge import learn
from clbench.merge.execute import merge_weights
from clbench.merge.families import BASE, TUNED, Learned
from clbench.method import Weights
from clbench.track import ModelSpec
from clbench.train.models import copy_weights, make_model, weights_of
from tests.merge.models import live

SPEC = ModelSpec(hidden_size=16, intermediate_size=24, n_layers=3, n_heads=2, max_length=16)


def llama(seed: int) -> torch.nn.Module:
    return make_model(SPEC, vocab_size=32, eos_id=0, seed=seed).eval()


def text(seed: int, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 32, (n, 13), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def ends(*models: torch.nn.Module) -> list[learn.Read]:
    return [copy_weights(weights_of(model)).__getitem__ for model in models]


def loss_at(shares: dict[str, torch.Tensor], models: list[Weights], where: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a mixture as one graph, through ``functional_call``."""
    units = learn.units_of(list(models[0]))
    mixed = {name: sum(shares[units[name]][n] * m[name].double() for n, m in enumerate(models)) for name in models[0]}
    total = torch.zeros((), dtype=torch.float64)
    for weight, inputs, targets in batch:
        logits = torch.func.functional_call(where, mixed, kwargs={"input_ids": inputs, "use_cache": False}).logits
        total = total + weight * torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return total


@pytest.mark.parametrize("n_ends", [2, 3])
def test_one_step_is_adams_on_the_gradient_that_autograd_finds(n_ends: int) -> None:
    models = [llama(seed) for seed in range(n_ends)]
    here = llama(9)
    before = copy_weights(weights_of(here))
    batch = [(0.3, *text(1)), (0.7, *text(2))]
    found = learn.learn_shares(here, ends(*models), lambda step: batch, n_steps=1, learning_rate=0.1)
    assert all(torch.equal(before[n], w) for n, w in weights_of(here).items())  # its own weights are back
    assert found.n_tokens == 2 * 4 * 12

    wide = [{n: w.double() for n, w in copy_weights(weights_of(m)).items()} for m in models]
    units = sorted(set(learn.units_of(list(wide[0])).values()))
    assert len(units) == 3 + 2  # blocks, embeddings, last norm
    z = {unit: torch.zeros(n_ends, dtype=torch.float64, requires_grad=True) for unit in units}
    graph = llama(9).double()
    loss = loss_at({unit: torch.softmax(one, 0) for unit, one in z.items()}, wide, graph, batch)
    loss.backward()
    assert found.losses_nats == [pytest.approx(float(loss), rel=1e-5)]
    for unit, one in z.items():
        assert one.grad is not None
        # Adam's first step is the learning rate along the gradient's sign, but for its epsilon.
        stepped = -0.1 * one.grad / (one.grad.abs() + 1e-8)
        assert found.shares[unit] == pytest.approx(torch.softmax(stepped, 0).tolist(), abs=2e-3)
        assert sum(found.shares[unit]) == pytest.approx(1)


def test_learning_goes_to_the_model_that_knows_the_text() -> None:
    """One end is trained on the text: its shares grow, the loss falls, and the other text pulls the other way."""
    base, tuned = llama(0), llama(0)
    domain = text(5, n=8)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=0.01)
    for _ in range(40):
        logits = tuned(input_ids=domain[0]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), domain[1].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    pair = ends(base, tuned)
    found = learn.learn_shares(llama(0), pair, lambda step: [(1.0, *domain)], n_steps=25)
    assert found.losses_nats[-1] < found.losses_nats[0] - 0.05
    blocks = [own[1] for unit, own in found.shares.items() if "layers" in unit]
    assert min(blocks) > 0.5
    sources = live(copy_weights(weights_of(tuned)), copy_weights(weights_of(base)))
    merged = merge_weights(Learned(found.shares).spot(None, 0.5).plan, sources)
    for name, unit in learn.units_of(list(merged)).items():
        share = found.shares[unit]
        wanted = share[0] * sources.base.read(name) + share[1] * sources.tuned.read(name)
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)


def test_one_hot_shares_are_the_models_to_the_bit_and_a_path_leads_from_end_to_end() -> None:
    base, tuned, other = (copy_weights(weights_of(llama(seed))) for seed in range(3))
    units = sorted(set(learn.units_of(list(base)).values()))
    pair = live(tuned, base)
    for own, model in (((1.0, 0.0), base), ((0.0, 1.0), tuned)):
        merged = merge_weights(learn.plan_of(dict.fromkeys(units, own), 2), pair)
        assert all(torch.equal(merged[name], model[name]) for name in model)
    three = live(tuned, base, other)
    for place, model in enumerate((base, tuned, other)):
        own = tuple(float(place == n) for n in range(3))
        merged = merge_weights(learn.plan_of(dict.fromkeys(units, own), 3), three)
        assert all(torch.equal(merged[name], model[name]) for name in model)
    family = Learned(dict.fromkeys(units, (0.3, 0.7)))
    assert family.spot(None, 0.0).plan == TUNED.plan and family.spot(None, 1.0).plan == BASE.plan
    shares = {"a": (0.2, 0.6, 0.2)}
    assert learn.moved_shares(shares, 0.5)["a"] == pytest.approx(shares["a"])
    assert learn.moved_shares(shares, 0.0)["a"] == pytest.approx((0.0, 0.75, 0.25))
    assert learn.moved_shares(shares, 0.75)["a"] == pytest.approx((0.6, 0.3, 0.1))
    assert learn.moved_shares({"a": (1.0, 0.0, 0.0)}, 0.25)["a"] == pytest.approx((0.5, 0.5, 0.0))


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 97 for c in text]}


def test_portions_hold_every_window_once_before_any_comes_again() -> None:
    texts = {"general": SimpleNamespace(documents=["abcdefg", "hij"]), "domain": SimpleNamespace(documents=["kl"])}
    dealt = learn.portions(texts, Letters(), length=3, mix=0.25, n_steps=3)
    general = [(w, i.tolist(), t.tolist()) for step in dealt for w, i, t in step[:-1]]
    assert [g[1:] for g in general] == [
        ([[0, 1, 2]], [[1, 2, 3]]),
        ([[3, 4, 5]], [[4, 5, 6]]),
        ([[7, 8]], [[8, 9]]),
    ]
    for step in dealt:
        assert sum(w for w, _, _ in step) == pytest.approx(1)
        assert step[-1][0] == 0.75 and step[-1][1].tolist() == [[10]]  # a short text comes around
    with pytest.raises(ConfigError, match="general"):
        learn.portions({**texts, "general": SimpleNamespace(documents=["a"])}, Letters(), length=3, mix=0.5, n_steps=1)
    with pytest.raises(ConfigError):
        learn.learn_shares(llama(0), ends(llama(0)), lambda step: [(1.0, *text(1))], n_steps=1)
