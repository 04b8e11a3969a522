"""Gradients of texts: against autograd, against Hessians, and unbiased where plain means are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from clbench.capacity import gradients
from clbench.capacity.gradients import Halves
from clbench.train.data import IGNORE


@dataclass(frozen=True)
class Batch:
    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor


@pytest.fixture(scope="module")
def model() -> Any:
    """A small GPT-2 in float64 throughout (Llama's norms go through float32), with attention that has a Hessian."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=29, n_embd=12, n_layer=2, n_head=2, n_positions=16, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).double().eval()


def batch(seed: int, rows: int = 5) -> Batch:
    tokens = torch.randint(29, (rows, 9), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[0, :3] = IGNORE
    return Batch(tokens[:, :-1], targets)


def loss_of(model: Any, one: Batch) -> torch.Tensor:
    """Mean over sequences of the mean over a sequence's targets."""
    logits = model(input_ids=one.inputs_BT).logits
    rows = [
        torch.nn.functional.cross_entropy(row, target, ignore_index=IGNORE)
        for row, target in zip(logits, one.targets_BT, strict=True)
    ]
    return torch.stack(rows).mean()


def moved(model: Any, step: dict[str, torch.Tensor], size: float) -> Any:
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.add_(size * step[name])
    return other


def random_step(model: Any, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator).double() for name, p in model.named_parameters()}


# --- passes


def test_mean_gradients_and_embedding_lengths_are_autograds(model: Any) -> None:
    one = batch(0)
    gradient, lengths = gradients.mean_gradient(model, [Batch(one.inputs_BT[:2], one.targets_BT[:2]), batch_of(one, 2)])
    expected = torch.autograd.grad(loss_of(model, one), [*model.parameters()])
    for (name, _), g in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradient[name], g, rtol=1e-9, atol=1e-12)
    for row in range(5):
        embeddings = model.get_input_embeddings()(one.inputs_BT[row : row + 1]).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, one.targets_BT[row], ignore_index=IGNORE)
        (g,) = torch.autograd.grad(loss, embeddings)
        assert lengths[row] == pytest.approx(g.norm().item(), rel=1e-9)
    assert not model.get_input_embeddings()._forward_hooks


def batch_of(one: Batch, start: int) -> Batch:
    return Batch(one.inputs_BT[start:], one.targets_BT[start:])


def test_the_change_is_that_of_the_loss_and_its_parts_add_up(model: Any) -> None:
    one, after = batch(1), moved(model, random_step(model), 0.02)
    found = gradients.increment(model, after, [one])
    with torch.no_grad():
        assert found.change_nats == pytest.approx((loss_of(after, one) - loss_of(model, one)).item(), rel=1e-9)
    expected = torch.autograd.grad(loss_of(model, one), [*model.parameters()])
    step = gradients.step_between(model, after)
    dots = sum((g * step[name]).sum() for (name, _), g in zip(model.named_parameters(), expected, strict=True))
    assert found.first_order_nats == pytest.approx(float(dots), rel=1e-8)
    assert found.first_order_nats + found.curvature_nats == pytest.approx(found.change_nats, rel=1e-12)
    assert len(found.change_B) == 5


def test_the_rest_is_half_of_the_step_times_the_hessian_times_the_step(model: Any) -> None:
    one, step = batch(2), random_step(model)
    parameters = [*model.parameters()]
    first = torch.autograd.grad(loss_of(model, one), parameters, create_graph=True)
    names = [name for name, _ in model.named_parameters()]
    along = sum((g * step[name]).sum() for name, g in zip(names, first, strict=True))
    second = torch.autograd.grad(along, parameters)
    bend = float(sum((h * step[name]).sum() for name, h in zip(names, second, strict=True))) / 2
    errors = []
    for size in (2e-4, 1e-4):
        found = gradients.increment(model, moved(model, step, size), [one])
        errors.append(abs(found.curvature_nats / size**2 - bend))
    assert errors[0] < 0.05 * abs(bend)
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)  # what is left is of third order


# --- a quadratic, on which everything is known


def quadratic() -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], float], Callable[[np.ndarray], np.ndarray]]:
    """J(w) = 1/2 (w-a)' H (w-a), with its H and a."""
    generator = np.random.default_rng(0)
    root = generator.standard_normal((6, 6))
    h, a = root @ root.T + np.eye(6), generator.standard_normal(6)
    return h, a, lambda w: 0.5 * (w - a) @ h @ (w - a), lambda w: h @ (w - a)


def test_on_a_quadratic_the_rest_is_exactly_half_d_h_d() -> None:
    h, _, j, gradient = quadratic()
    w, d = np.random.default_rng(1).standard_normal((2, 6))
    found = gradients.Increment(np.array([j(w + d) - j(w)]), np.array([gradient(w) @ d]))
    assert found.curvature_nats == pytest.approx(0.5 * d @ h @ d, rel=1e-12)
    assert found.change_nats == pytest.approx(found.first_order_nats + 0.5 * d @ h @ d, rel=1e-12)


def test_interference_is_positive_where_a_step_on_the_new_raises_the_old() -> None:
    _, _, j_old, grad_old = quadratic()
    generator = np.random.default_rng(2)
    signs = set()
    for _ in range(20):
        w, centre = generator.standard_normal((2, 6))
        grad_new = w - centre  # of 1/2 |w - centre|^2
        g = np.stack([grad_old(w), grad_new])
        found = gradients.interference(g @ g.T, [0], 1)
        cosine = g[0] @ g[1] / np.linalg.norm(g[0]) / np.linalg.norm(g[1])
        assert found.value == pytest.approx(-cosine, rel=1e-12)
        rise = j_old(w - 1e-6 * grad_new) - j_old(w)
        assert (rise > 0) == (found.value > 0)
        signs.add(found.value > 0)
    assert signs == {True, False}


def test_interference_with_several_old_texts_is_with_their_mean() -> None:
    g = np.random.default_rng(3).standard_normal((4, 9))
    mean = g[:3].mean(0)
    expected = -mean @ g[3] / np.linalg.norm(mean) / np.linalg.norm(g[3])
    assert gradients.interference(g @ g.T, [0, 1, 2], 3).value == pytest.approx(expected, rel=1e-12)
    assert gradients.interference(g @ g.T, [], 3).reason == "there is no older text"


# --- products across halves


def kept(vectors: dict[tuple[int, str], np.ndarray], sketch_dims: int | None = None) -> Halves:
    halves = Halves(sketch_dims)
    for (text, half), v in vectors.items():
        parts = np.split(v, [len(v) // 3])
        halves.add(text, half, {f"p{i}": torch.from_numpy(part.reshape(1, -1)) for i, part in enumerate(parts)})
    return halves


def test_products_across_halves_have_no_share_of_the_noise() -> None:
    generator = np.random.default_rng(4)
    truth = generator.standard_normal((2, 30)) * 0.3
    sums, plain = np.zeros((2, 2)), np.zeros((2, 2))
    n = 400
    for _ in range(n):
        shared = generator.standard_normal((2, 30))  # noise of documents that both texts hold, by half
        noisy = {
            (t, h): truth[t] + shared[i] + generator.standard_normal(30)
            for t in range(2)
            for i, h in enumerate(gradients.HALVES)
        }
        sums += kept(noisy).gram([0, 1])
        means = np.stack([(noisy[t, "a"] + noisy[t, "b"]) / 2 for t in range(2)])
        plain += means @ means.T
    expected = truth @ truth.T
    np.testing.assert_allclose(sums / n, expected, atol=1.0)  # standard error about 0.5
    assert (plain / n - expected).min() > 10  # noise: 30 of shared and 15 of own a text


def test_a_sketch_keeps_products_and_exact_norms() -> None:
    generator = np.random.default_rng(5)
    vectors = {(t, h): generator.standard_normal(3000) + 0.5 for t in range(3) for h in gradients.HALVES}
    exact, sketched = kept(vectors), kept(vectors, sketch_dims=4096)
    assert sketched.norms == exact.norms
    norms = [exact.norms[t, "a"] for t in range(3)]
    off = np.abs(sketched.gram([0, 1, 2]) - exact.gram([0, 1, 2])) / np.outer(norms, norms)
    assert 0 < off.max() < 5 / math.sqrt(4096)
    assert exact.gram([0, 1, 2])[0, 1] == pytest.approx(
        (vectors[0, "a"] @ vectors[1, "b"] + vectors[0, "b"] @ vectors[1, "a"]) / 2, rel=1e-5
    )


def test_large_models_are_sketched(model: Any) -> None:
    assert Halves.for_model(model, 6).sketch_dims is None
    assert Halves.for_model(model, 6, memory_bytes=1000).sketch_dims == gradients.SKETCH_DIMS


def test_what_is_not_told_from_noise_is_nan() -> None:
    gram = np.array([[1.0, 0.2], [0.2, -0.1]])
    assert gradients.cosine(gram, 0, 1).reason == gradients.length(-0.1).reason.replace("the", "a", 1)
    assert gradients.length(4.0).value == 2
    assert gradients.cosine(gram, 0, 0).value == 1
    assert gradients.interference(gram, [0], 1).reason == "a gradient is not told from noise"
