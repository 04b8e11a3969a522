"""GEM: its quadratic program against brute force over active sets, and A-GEM as its smallest case."""

from __future__ import annotations

from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clbench.errors import ConfigError
from clbench.methods._projection import SLICE, cosine, gram, nearest
from clbench.methods.agem import Agem
from clbench.methods.gem import Gem
from tests.methods.memory_desk import Desk, V, edited, gradient, noise

Array = NDArray[np.float64]


def brute_force(quadratic: Array, linear: Array, margin: float) -> Array:
    """Minimise 1/2 v'Pv + c'v for v >= margin by trying every set of free weights."""
    t, best, value = len(linear), np.zeros(0), np.inf
    for free in map(list, chain.from_iterable(combinations(range(t), n) for n in range(t + 1))):
        v = np.full(t, margin)
        held = [i for i in range(t) if i not in free]
        if free:
            v[free] = np.linalg.solve(
                quadratic[np.ix_(free, free)], -linear[free] - quadratic[np.ix_(free, held)] @ v[held]
            )
        now = 0.5 * v @ quadratic @ v + linear @ v
        if (v >= margin - 1e-12).all() and now < value:
            best, value = v, now
    return best


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
def test_the_weights_are_those_of_brute_force(margin: float, ridge: float) -> None:
    n_active = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        t = 1 + seed % 4
        memories, g = rng.normal(size=(t, 9)) * 10.0 ** rng.integers(-6, 6), rng.normal(size=9)
        products = memories @ memories.T
        quadratic = products + ridge * np.trace(products) / t * np.eye(t)
        v = nearest(products, memories @ g, margin=margin, ridge=ridge)
        expected = brute_force(quadratic, memories @ g, margin)
        np.testing.assert_allclose(v, expected, rtol=1e-6, atol=1e-9 * (1 + np.abs(expected).max()))
        n_active.add(int((v > margin + 1e-9).sum()))
    assert len(n_active) > 2  # none, one, several constraints bind


def test_no_constraint_is_violated_and_nothing_nearer_does_so_little() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        memories, g = rng.normal(size=(5, 8)), rng.normal(size=8)
        v = nearest(memories @ memories.T, memories @ g)
        z = g + v @ memories
        assert (memories @ z >= -1e-9).all() and (v >= 0).all()
        np.testing.assert_allclose(v * (memories @ z), 0, atol=1e-8)  # a weight only where the constraint binds
        for _ in range(200):  # projection on a convex set: the angle to every allowed point is obtuse
            other = rng.normal(size=8)
            if (memories @ other >= 0).all():
                assert (g - z) @ (other - z) <= 1e-8


def test_one_constraint_is_agems_and_collinear_or_empty_memories_have_an_answer() -> None:
    assert nearest(np.array([[4.0]]), np.array([-2.0])).tolist() == [0.5]
    assert nearest(np.array([[4.0]]), np.array([2.0])).tolist() == [0.0]
    r, g = np.array([1.0, 2.0, 0.0]), np.array([-1.0, -1.0, 3.0])
    memories = np.stack([r, 2 * r, 0 * r])
    z = g + nearest(memories @ memories.T, memories @ g) @ memories
    np.testing.assert_allclose(z, g - (g @ r) / (r @ r) * r, atol=1e-9)
    assert nearest(np.zeros((2, 2)), np.zeros(2), margin=0.5).tolist() == [0.0, 0.0]


def test_dots_are_those_of_double_precision_over_slices() -> None:
    big, small = 1e4 * noise(0, SLICE + 5), 1e-4 * noise(1, 3, 2)
    vectors = [[big, small], [noise(2, SLICE + 5), small + 1]]
    flat = [torch.cat([part.double().flatten() for part in parts]) for parts in vectors]
    expected = torch.tensor([[(a * b).sum() for b in flat] for a in flat])
    torch.testing.assert_close(gram(vectors), expected, rtol=1e-12, atol=1e-6)
    dots = gram(vectors).numpy()
    assert cosine(dots, 0, 1) == pytest.approx((flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()).item())
    assert cosine(np.zeros((2, 2)), 0, 1) == 0.0


def gem(**options: Any) -> Gem:
    return Gem(Gem.Options(**{"rows": 100, **options}))


def test_the_edited_gradient_meets_every_stages_constraint_where_agems_does_not() -> None:
    better = 0
    for seed in range(10):
        desk = Desk()
        each = [gradient(desk.module, desk.text[i]) for i in range(3)]
        g = noise(seed, V, V) / 50 - each[0] + 0.5 * each[1]
        z = edited(gem(margin=0.0, ridge=0.0), desk, g)
        assert all((z * r).sum() > -1e-6 * z.norm() * r.norm() for r in each)
        weights = torch.linalg.lstsq(torch.stack([r.flatten() for r in each]).T, (z - g).flatten()).solution
        assert (weights > -1e-5).all()
        projected = edited(Agem(Agem.Options(rows=100)), Desk(), g)
        better += any((projected * r).sum() < -1e-4 * g.norm() * r.norm() for r in each)
    assert better > 5


def test_with_one_past_stage_it_is_agem() -> None:
    for seed in range(5):
        found = []
        for method in (gem(margin=0.0, ridge=0.0), Agem(Agem.Options(rows=100))):
            desk = Desk()
            desk.stage = desk.stage.__class__(**{**vars(desk.stage), "index": 1})
            found.append(edited(method, desk, noise(seed, V, V)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_the_margin_pulls_towards_the_past_and_only_when_a_constraint_is_violated() -> None:
    desk = Desk()
    each = [gradient(desk.module, desk.text[i]) for i in range(3)]
    agreeing = each[0] + each[1] + each[2]
    assert all((agreeing * r).sum() > 0 for r in each)
    assert torch.equal(edited(gem(), desk, agreeing), agreeing)
    against = -0.01 * agreeing
    for margin, expected in ((0.5, 0.5), (0.0, 0.01)):  # nearest is z = 0
        z = edited(gem(ridge=0.0, margin=margin), desk, against)
        weights = torch.linalg.lstsq(torch.stack([r.flatten() for r in each]).T, (z - against).flatten()).solution
        torch.testing.assert_close(weights[:, None], torch.full((3, 1), expected), rtol=0, atol=1e-4)


def test_passes_are_billed_and_opposition_is_noted() -> None:
    desk, method = Desk(), gem(micro_rows=2)
    each = [gradient(desk.module, desk.text[i]) for i in range(3)]
    method.begin_stage(desk.ctx)
    edited(method, desk, -each[0])
    assert desk.bills == [("memory_gradient", 81.0, 27)] * 3
    method.load_state_dict(*method.state_dict())
    method.end_stage(desk.ctx)
    mean = sum((-each[0] * r).sum() / (each[0].norm() * r.norm()) for r in each) / 3
    assert desk.notes == {"violation_rate": 1.0, "mean_cosine": pytest.approx(float(mean), rel=1e-5)}


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"margin": -1.0}, {"ridge": float("nan")}, {"micro_rows": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        Gem(Gem.Options(**wrong))
