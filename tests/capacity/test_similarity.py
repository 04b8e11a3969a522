"""Similarity of representations: the plain n x n formulas, published biases, SciPy's Procrustes, planted angles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes as scipy_procrustes

from clbench.capacity import similarity
from clbench.capacity.similarity import Pairs
from clbench.capacity.spectra import Floats


def pairs_of(x_ND: Floats, y_NE: Floats, *, batch: int = 10**9, shift: float = 0.0) -> Pairs:
    pairs = Pairs.about(
        torch.full((x_ND.shape[1],), shift, dtype=torch.float64), torch.full((y_NE.shape[1],), -shift).double()
    )
    for start in range(0, len(x_ND), batch):
        here = slice(start, start + batch)
        pairs.add(torch.from_numpy(x_ND[here]), torch.from_numpy(y_NE[here]))
    return pairs


def plain_hsic(x_ND: Floats, y_NE: Floats) -> float:
    """Debiased HSIC of linear kernels, term by term from the n x n Gram matrices (Song et al. 2012, eq. 4)."""
    n = len(x_ND)
    k, l = x_ND @ x_ND.T, y_NE @ y_NE.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    terms = np.sum(k * l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return float(terms / (n * (n - 3)))


def random(n: int, d: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, d))


def turned(x_ND: Floats, seed: int = 5) -> Floats:
    q_DD, _ = np.linalg.qr(random(x_ND.shape[1], x_ND.shape[1], seed))
    return x_ND @ q_DD


@pytest.mark.parametrize(("n", "d", "e"), [(40, 6, 6), (25, 40, 8), (12, 3, 30)])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_debiased_cka_is_the_formula_over_gram_matrices(n: int, d: int, e: int, shift: float) -> None:
    x = random(n, d) + 3
    y = np.tanh(x @ random(d, e, 1)) + 0.5 * random(n, e, 2) - 1
    expected = plain_hsic(x, y) / math.sqrt(plain_hsic(x, x) * plain_hsic(y, y))
    for batch in (5, n):
        assert similarity.cka_debiased(pairs_of(x, y, batch=batch, shift=shift)).value == pytest.approx(
            expected, abs=1e-9
        )


def test_cka_is_1_for_what_is_turned_scaled_and_moved_and_symmetric() -> None:
    x = random(60, 8) * np.linspace(1, 3, 8)
    y = -2.5 * turned(x) + random(1, 8, 3)
    assert similarity.cka_debiased(pairs_of(x, y)).value == pytest.approx(1, abs=1e-10)
    assert similarity.cka_biased(pairs_of(x, y)).value == pytest.approx(1, abs=1e-10)
    z = x + random(60, 8, 9)
    there, back = similarity.cka_debiased(pairs_of(x, z)), similarity.cka_debiased(pairs_of(z, x))
    assert 0.3 < there.value < 0.95 and there.value == pytest.approx(back.value, rel=1e-12)


@pytest.mark.parametrize(("p", "expected"), [(50, 0.20), (200, 0.50), (800, 0.80)])
def test_unrelated_representations_look_alike_to_the_biased_form_only(p: int, expected: float) -> None:
    n = 200
    pairs = pairs_of(random(n, p, 1), random(n, p, 2))
    assert similarity.cka_biased(pairs).value == pytest.approx(p / (n + p), abs=0.02)
    assert similarity.cka_biased(pairs).value == pytest.approx(expected, abs=0.02)
    assert abs(similarity.cka_debiased(pairs).value) < 0.03


def test_pairs_of_parts_add_up() -> None:
    x, y = random(90, 7) + 2, random(90, 7, 1)
    whole = similarity.figures(pairs_of(x, y, shift=1))
    parts = similarity.figures(pairs_of(x[:30], y[:30], shift=1) + pairs_of(x[30:], y[30:], batch=11, shift=1))
    for name, one in whole.items():
        assert parts[name].value == pytest.approx(one.value, rel=1e-9), name


def test_procrustes_is_zero_turned_root_two_apart_and_scipys_between() -> None:
    x = random(80, 6) * np.linspace(1, 2, 6)
    assert similarity.procrustes(pairs_of(x, 3 * turned(x) + 1)).value == pytest.approx(0, abs=1e-6)
    q, _ = np.linalg.qr(random(80, 13) - random(80, 13).mean(0))
    apart = similarity.procrustes(pairs_of(q[:, :6] - q[:, :6].mean(0), q[:, 6:12] - q[:, 6:12].mean(0)))
    assert apart.value == pytest.approx(math.sqrt(2), abs=0.05)
    y = x + random(80, 6, 4)
    _, _, disparity = scipy_procrustes(x, y)  # 1 - (sum of singular values)^2
    expected = math.sqrt(2 - 2 * math.sqrt(1 - disparity))
    assert similarity.procrustes(pairs_of(x, y)).value == pytest.approx(expected, rel=1e-9)


def test_cosine_shift_is_the_planted_angle() -> None:
    angle = 0.3
    x = random(50, 2)
    y = x @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) * 7
    assert similarity.cosine_shift(pairs_of(x, y, shift=2)).value == pytest.approx(1 - math.cos(angle), rel=1e-10)
    assert similarity.centred_shift(pairs_of(x, x + 100)).value == pytest.approx(0, abs=1e-10)
    assert similarity.cosine_shift(pairs_of(x, x + 100)).value > 0.1
    with_zero = np.concatenate([x, np.zeros((1, 2))])
    turned_zero = np.concatenate([y, np.ones((1, 2))])
    assert similarity.cosine_shift(pairs_of(with_zero, turned_zero)).value == pytest.approx(1 - math.cos(angle))


def test_what_is_not_defined_says_why() -> None:
    x = random(10, 3)
    assert "does not vary" in similarity.cka_debiased(pairs_of(x, np.ones((10, 3)))).reason
    assert "does not vary" in similarity.centred_shift(pairs_of(x, np.ones((10, 3)))).reason
    assert "fewer than 4" in similarity.cka_debiased(pairs_of(x[:3], x[:3])).reason
    assert similarity.procrustes(pairs_of(x, x)).reason == "10 samples of width 3, 4 a dimension are wanted"
    assert similarity.cosine_shift(pairs_of(x, random(10, 4))).reason == "widths 3 and 4 differ"
