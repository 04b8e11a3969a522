"""Weights: spectral norms against PyTorch's SVD, drift against its definition, sums in pieces."""

from __future__ import annotations

import math

import pytest
import torch

from clbench.capacity import weights
from clbench.capacity.weights import Size, size_of, spectral_norm


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (40, 40), (300, 64), (64, 300), (8, 5, 7)])
def test_spectral_norm_is_the_largest_singular_value(shape: tuple[int, ...]) -> None:
    a = random(*shape)
    expected = torch.linalg.svdvals(a.flatten(1).double())[0].item()
    assert spectral_norm(a) == pytest.approx(expected, rel=1e-6)
    assert spectral_norm(a) <= expected * (1 + 1e-12)


def test_spectral_norm_of_special_matrices() -> None:
    assert spectral_norm(torch.eye(30)) == pytest.approx(1, rel=1e-12)
    assert spectral_norm(torch.zeros(5, 4)) == 0
    u, v = random(20), random(30, seed=1)
    assert spectral_norm(u.outer(v)) == pytest.approx((u.norm() * v.norm()).item(), rel=1e-6)
    close = torch.diag(torch.tensor([1.0, 0.9999, 0.9998] + [0.5] * 200))
    assert spectral_norm(close) == pytest.approx(1, rel=1e-6)


def test_large_matrices_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(120, 16).half(), random(120, 16, seed=1).half()
    whole, norm = size_of(a, b), spectral_norm(a)
    monkeypatch.setattr(weights, "PIECE", 50)
    pieces = size_of(a, b)
    for name in ("n", "absolute", "squared", "moved", "from_squared"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert spectral_norm(a) == pytest.approx(norm, rel=1e-12)


def test_stable_rank_is_the_dimension_of_the_identity_and_1_of_rank_1() -> None:
    for matrix, expected in ((torch.eye(12), 12), (7 * torch.eye(12), 12), (torch.ones(9, 4), 1)):
        assert weights.stable_rank(size_of(matrix), spectral_norm(matrix)).value == pytest.approx(expected)
    assert weights.stable_rank(size_of(torch.zeros(2, 2)), 0.0).reason == "the matrix is zero"


def test_mean_size_and_drift_are_their_definitions() -> None:
    base = {"a": random(30, 4), "b": random(7, seed=2)}
    now = {"a": base["a"] + 0.1 * random(30, 4, seed=3), "b": base["b"]}
    sizes = {name: size_of(now[name], base[name]) for name in base}
    whole = weights.total(sizes.values())
    flat_now, flat_base = (torch.cat([w.flatten() for w in one.values()]).double() for one in (now, base))
    assert whole.mean_abs.value == pytest.approx(flat_now.abs().mean().item(), rel=1e-6)
    assert whole.drift.value == pytest.approx(((flat_now - flat_base).norm() / flat_base.norm()).item(), rel=1e-6)
    shares = [weights.share_of_drift(one, whole).value for one in sizes.values()]
    assert shares == [1, 0] and sum(shares) == 1
    still = size_of(base["a"], base["a"])
    assert still.drift.value == 0
    assert weights.share_of_drift(still, still).reason == "the weights did not move"
    assert size_of(base["a"], torch.zeros(30, 4)).drift.reason == "the base's weights are zero"
    assert math.isnan(Size().mean_abs.value)


def test_weights_of_another_kind_are_told_apart_by_name_and_shape() -> None:
    a = {"x": torch.zeros(2, 3)}
    assert weights.same_shapes(a, {"x": torch.ones(2, 3)}) == ""
    assert weights.same_shapes(a, {"y": torch.zeros(2, 3)}) == "weight x stands in one of the two models only"
    assert weights.same_shapes(a, {"x": torch.zeros(3, 2)}) == "weight x has shape (2, 3), in the other (3, 2)"
