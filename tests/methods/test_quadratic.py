"""Quadratic penalties: exact dots, gradients and proximal steps against linear algebra, alone and in two processes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clbench.errors import ConfigError
from clbench.methods import _quadratic as quadratic
from clbench.methods._quadratic import CHUNK_ELEMENTS_CPU, Directions, Layout, block_of, dots
from clbench.track import ModelSpec
from clbench.train.models import make_model
from tests.methods.quadratic_desk import Desk, finite_difference, numbers, positive
from tests.methods.sharded_driver import SIZES, outcome

N = 12
Function = Callable[[torch.Tensor], float]


def same(values: torch.Tensor) -> torch.Tensor:
    return values


def directions(n_terms: int, *, shapes: tuple[tuple[int, ...], ...] = ((N,),), per_layer: bool = False) -> Directions:
    """Return terms with random directions and anchors on parameters of some shapes."""
    empty = {f"layers.{i}.w": torch.zeros(shape, dtype=torch.float64) for i, shape in enumerate(shapes)}
    terms = Directions(Layout.of(empty, per_layer=per_layer))
    n, n_blocks = sum(math.prod(shape) for shape in shapes), len(terms.layout.parts)
    for k in range(n_terms):
        rho_L = numbers(50 + k, n_blocks).abs() + 0.1
        terms = terms.with_term(numbers(k, n), rho_L, numbers(100 + k, n), same)
    return terms


def residuals(terms: Directions, theta: torch.Tensor) -> torch.Tensor:
    return terms.residuals(terms.layout.named(theta), same)


def moved(terms: Directions, theta: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Return theta and the vectors' combination."""
    target = theta.clone()
    terms.add_to(terms.layout.views(target), coefficients)
    return target


def gradient(terms: Directions, theta: torch.Tensor, strength: float) -> torch.Tensor:
    return moved(terms, torch.zeros_like(theta), terms.coupled(residuals(terms, theta), strength))


def test_a_dot_of_twenty_million_is_exact_enough_for_a_drift_of_one_in_two_thousand() -> None:
    # Research notes 1.6: |theta| 0.02, drift 1e-5 a coordinate; single precision has an error of 0.3 %.
    n = 20_000_000
    generator = torch.Generator().manual_seed(0)
    u, theta, drift = (torch.rand(n, generator=generator).sub_(0.5).mul_(scale) for scale in (8e-4, 0.07, 3.5e-5))
    now = theta + drift
    exact = (u.double() @ (now.double() - theta.double())).item()
    terms = Directions(Layout.of({"w": theta})).with_term(u, torch.ones(1, dtype=torch.float64), theta, same)
    s = terms.residuals({"w": now}, same).item()
    assert abs(s / exact - 1) < 1e-8
    single = (u @ now - u @ theta).item()
    assert abs(single / exact - 1) > 1e-5  # so the check above can fail


def test_dots_are_summed_over_chunks_and_parts() -> None:
    n = 2 * CHUNK_ELEMENTS_CPU + 3
    a, b, c = (torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(3))
    parts = [slice(0, 5), slice(5, CHUNK_ELEMENTS_CPU + 7), slice(CHUNK_ELEMENTS_CPU + 7, n)]
    found = dots([a, b], c, parts)
    expected = torch.stack([torch.stack([v[p].double() @ c[p].double() for p in parts]) for v in (a, b)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_gradient_is_that_of_finite_differences(per_layer: bool) -> None:
    terms, theta = directions(3, shapes=((3, 2), (6,)), per_layer=per_layer), numbers(7, N)
    value: Function = lambda at: terms.value(residuals(terms, at), 0.7).item()  # noqa: E731
    expected = finite_difference(value, theta)
    torch.testing.assert_close(gradient(terms, theta, 0.7), expected, rtol=1e-6, atol=1e-6)
    blocks = terms.layout.parts
    by_hand = sum(
        0.35 * terms.rho_KL[k, i] * (terms.vectors[k][p] @ (theta - numbers(100 + k, N))[p]) ** 2
        for k in range(3)
        for i, p in enumerate(blocks)
    )
    assert value(theta) == pytest.approx(float(by_hand), rel=1e-12)


def test_across_the_directions_there_is_no_curvature() -> None:
    terms, theta = directions(2), numbers(7, N)
    basis = torch.linalg.qr(torch.stack(terms.vectors).T)[0]
    across = numbers(8, N)
    across -= basis @ (basis.T @ across)
    change = gradient(terms, theta + 100 * across, 1.0) - gradient(terms, theta, 1.0)
    assert change.abs().max() < 1e-10
    along = gradient(terms, theta + basis[:, 0], 1.0) - gradient(terms, theta, 1.0)
    assert along.abs().max() > 1e-2


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e6])
def test_the_proximal_step_solves_the_linear_system(strength: float, per_layer: bool) -> None:
    terms, theta = directions(3, shapes=((3, 2), (6,)), per_layer=per_layer), numbers(7, N)
    found = moved(terms, theta, terms.proximal(residuals(terms, theta), strength))
    system, right = torch.eye(N, dtype=torch.float64), theta.clone()
    for k, vector in enumerate(terms.vectors):
        for i, part in enumerate(terms.layout.parts):
            u = torch.zeros(N, dtype=torch.float64)
            u[part] = vector[part]
            system += strength * terms.rho_KL[k, i] * torch.outer(u, u)
            right += strength * terms.rho_KL[k, i] * terms.b_KL[k, i] * u
    assert ((system @ found - right).abs().max() / right.abs().max()).item() < 1e-12
    if strength == 1.0:
        torch.testing.assert_close(found, torch.linalg.solve(system, right), rtol=1e-12, atol=1e-12)


def test_two_equal_terms_are_one_of_twice_the_strength() -> None:
    one, theta = directions(1), numbers(7, N)
    two = one.with_term(one.vectors[0], one.rho_KL[0], numbers(100, N), same)  # a singular Gram matrix
    for strength in (0.5, 1e8):
        a = moved(one, theta, one.proximal(residuals(one, theta), 2 * strength))
        b = moved(two, theta, two.proximal(residuals(two, theta), strength))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_proximal_steps_converge_where_gradient_descent_diverges() -> None:
    terms, start = directions(1), numbers(7, N)
    terms.vectors[0] /= terms.vectors[0].norm()
    terms = Directions(terms.layout).with_term(terms.vectors[0], terms.rho_KL[0], numbers(100, N), same)
    strength = 1e6 / terms.rho_KL.item()  # lr lambda rho = 1e6
    explicit, implicit = start.clone(), start.clone()
    for _ in range(20):
        explicit -= gradient(terms, explicit, strength)
        implicit = moved(terms, implicit, terms.proximal(residuals(terms, implicit), strength))
    assert residuals(terms, explicit).abs().item() > 1e80
    assert residuals(terms, implicit).abs().item() < 1e-12
    u = terms.vectors[0]
    torch.testing.assert_close(implicit - u * (u @ implicit), start - u * (u @ start), rtol=0, atol=1e-9)


@pytest.mark.parametrize("strength", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("apply", ["coupled", "prox"])
def test_two_tasks_end_at_the_optimum_of_sherman_and_morrison(apply: str, strength: float) -> None:
    # min 1/2 (t-b)^T B (t-b) + strength rho/2 (u . (t-a))^2, research notes 1.9.
    terms = directions(1)
    u, rho, a = terms.vectors[0] / 4, terms.rho_KL[0], numbers(100, N)
    terms = Directions(terms.layout).with_term(u, rho, a, same)
    b_matrix, b = positive(5, N), numbers(6, N)
    solved, weight = torch.linalg.solve(b_matrix, u), strength * rho.item()
    optimum = b - weight * (u @ (b - a)) / (1 + weight * (u @ solved)) * solved
    curvature = torch.linalg.eigvalsh(b_matrix)[-1].item() + (weight * (u @ u).item() if apply == "coupled" else 0)
    t, rate = numbers(9, N), 1 / curvature
    for _ in range(800):
        step = b_matrix @ (t - b) + (gradient(terms, t, strength) if apply == "coupled" else 0)
        t = t - rate * step
        if apply == "prox":
            t = moved(terms, t, terms.proximal(residuals(terms, t), rate * strength))
    torch.testing.assert_close(t, optimum, rtol=0, atol=1e-8)
    if strength == 0:
        torch.testing.assert_close(t, b, rtol=0, atol=1e-8)


def test_at_infinite_strength_only_the_direction_is_held() -> None:
    terms = directions(1)
    u, a, b_matrix, b = terms.vectors[0], numbers(100, N), positive(5, N), numbers(6, N)
    t, rate = numbers(9, N), 1 / torch.linalg.eigvalsh(b_matrix)[-1].item()
    for _ in range(800):
        t = t - rate * b_matrix @ (t - b)
        t = moved(terms, t, terms.proximal(residuals(terms, t), 1e12))
    assert abs((u @ (t - a)).item()) < 1e-9
    left = b_matrix @ (t - b)  # what is left of the loss's gradient points along u
    assert (left - u * (u @ left) / (u @ u)).abs().max() < 1e-8
    assert left.abs().max() > 1e-3


def test_pull_and_shrink_are_the_diagonal_optimum() -> None:
    b_matrix, b, a, f, strength = positive(5, N), numbers(6, N), numbers(7, N), numbers(8, N).square(), 3.0
    f[0] = 0.0
    curvature = torch.linalg.eigvalsh(b_matrix)[-1].item()
    optimum = torch.linalg.solve(b_matrix + strength * torch.diag(f), b_matrix @ b + strength * f * a)
    coupled = torch.nn.Parameter(numbers(9, N))
    prox = numbers(9, N)
    rate = 1 / (curvature + strength * f.max().item())
    for _ in range(800):
        coupled.grad = b_matrix @ (coupled.detach() - b)
        quadratic.pull([coupled], [a], strength, [f])
        coupled.data -= rate * coupled.grad
        prox -= b_matrix @ (prox - b) / curvature
        quadratic.shrink_to([prox], [a], strength / curvature, [f])
    torch.testing.assert_close(coupled.detach(), optimum, rtol=0, atol=1e-9)
    torch.testing.assert_close(prox, optimum, rtol=0, atol=1e-9)


def test_shrinking_stays_between_weight_and_anchor_at_any_strength() -> None:
    theta, a, f = numbers(1, N), numbers(2, N), numbers(3, N).square()
    for kappa in (1e-6, 1.0, 1e20):
        for weights in (None, [f]):
            held = theta.clone()
            quadratic.shrink_to([held], [a], kappa, weights)
            k = kappa * (f if weights else 1.0)
            torch.testing.assert_close(held, (theta + k * a) / (1 + k), rtol=1e-12, atol=1e-12)


def test_parameters_without_a_gradient_are_left_out() -> None:
    terms = directions(1, shapes=((3, 2), (6,)))
    target = torch.zeros(6, dtype=torch.float64)
    terms.add_to([None, target], torch.full((1, 1), 2.0, dtype=torch.float64))
    torch.testing.assert_close(target, 2 * terms.vectors[0][6:])
    with_grad, without = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with_grad.grad = torch.zeros(2)
    quadratic.pull([without, with_grad], [torch.zeros(2), torch.zeros(2)], 3.0)
    assert without.grad is None and with_grad.grad.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("per_layer", [False, True])
def test_on_an_accelerator_the_vectors_are_combined_first_to_the_same_sum(per_layer: bool) -> None:
    terms = directions(3, shapes=((3, 2), (6,)), per_layer=per_layer)
    c_KL, zero = numbers(1, 3, 2 if per_layer else 1), torch.zeros(N, dtype=torch.float64)
    torch.testing.assert_close(terms.combined(c_KL), moved(terms, zero, c_KL), rtol=1e-12, atol=1e-12)


def test_blocks_are_layers_and_stand_together() -> None:
    assert block_of("model.layers.11.mlp.up_proj.weight") == "model.layers.11"
    assert block_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert block_of("scale") == "scale"
    names = ("m.layers.0.a", "m.norm.w", "m.layers.1.a", "m.layers.0.b")
    layout = Layout.of({name: torch.full((i + 1,), float(i)) for i, name in enumerate(names)}, per_layer=True)
    assert layout.names == ("m.layers.0.a", "m.layers.0.b", "m.norm.w", "m.layers.1.a")
    assert layout.block_names == ("m.layers.0", "m.norm", "m.layers.1")
    assert layout.parts == [slice(0, 5), slice(5, 7), slice(7, 10)] and layout.groups[0] == slice(0, 2)
    flat = layout.flat({name: torch.full((i + 1,), float(i)) for i, name in enumerate(names)})
    assert flat.tolist() == [0, 3, 3, 3, 3, 1, 1, 2, 2, 2]
    assert [view.tolist() for view in layout.views(flat)][2] == [1, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_which_parameters_are_held(tied: bool) -> None:
    spec = ModelSpec(hidden_size=8, intermediate_size=16, n_layers=2, n_heads=2, max_length=8)
    model: Any = make_model(spec, vocab_size=32, eos_id=0, seed=0)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    desk = Desk(model)
    every = {name for name, _ in model.named_parameters()}
    embeddings = {name for name in every if "embed" in name or "lm_head" in name}
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
    assert len(embeddings) == (1 if tied else 2) and len(vectors) == 5
    kept = {"all": every, "no_embed": every - embeddings, "no_norms": every - vectors}
    for params, names in (kept | {"matrices": every - embeddings - vectors}).items():
        assert set(quadratic.selected(desk.ctx, params)) == names
    with pytest.raises(ConfigError, match="params=all"):
        quadratic.selected(Desk(torch.nn.LayerNorm(3)).ctx, "matrices")


def test_two_processes_with_half_of_every_parameter_do_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.methods.sharded_driver"]
    here = Path(__file__).parents[2]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=here) for rank in (0, 1)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    whole = outcome(None, same)
    halves = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert len(whole) == 14
    for name, expected in whole.items():
        pieces = [half[name] for half in halves]
        if name.startswith("s/"):
            assert torch.equal(*pieces)
            torch.testing.assert_close(pieces[0], expected, rtol=1e-12, atol=1e-12)
            continue
        cut = [torch.split(piece, [size // 2 for size in SIZES]) for piece in pieces]
        joined = torch.cat([torch.cat([cut[0][i], cut[1][i]]) for i in range(len(SIZES))])
        torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().max() > 0.1
