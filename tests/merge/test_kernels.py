"""Kernels against closed forms, brute force, float64 and limits."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.errors import ConfigError
from clbench.merge import kernels as k
from tests.merge.models import gaussian

W0, W1, W2 = gaussian(40, 30, seed=0), gaussian(40, 30, seed=1), gaussian(40, 30, seed=2)
D = W1.double() - W0.double()
V = gaussian(40, 30, seed=3).square()
Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

EVERY: dict[str, Kernel] = {
    "lerp": lambda w1, w0: k.lerp(w1, w0, 0.3),
    "slerp": lambda w1, w0: k.slerp(w1, w0, 0.3),
    "nuslerp": lambda w1, w0: k.nuslerp(w1, w0, w1, 0.3),
    "task_arithmetic": lambda w1, w0: k.task_arithmetic(w1, w0, weights=[0.7]),
    "ties": lambda w1, w0: k.ties(w1, w0, density=0.5),
    "dare": lambda w1, w0: k.dare(w1, w0, density=0.5, seed=0),
    "breadcrumbs": lambda w1, w0: k.breadcrumbs(w1, w0, density=0.5),
    "model_stock": lambda w1, w0: k.model_stock(w1, w0, [w1]),
    "dg_hard": lambda w1, w0: k.dg_hard(w1, w0, min_numel=0),
    "graft": lambda w1, w0: k.graft(w1, w0, torch.ones(w1.shape), density=0.5),
}


def at_angle(angle: float, n: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 unit vectors at this angle."""
    a = gaussian(n, seed=4).double()
    b = gaussian(n, seed=5).double()
    a /= a.norm()
    b -= (a @ b) * a
    return a, math.cos(angle) * a + math.sin(angle) * b / b.norm()


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# --- what holds for every kernel ---


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_and_shapes_are_those_of_the_tuned_and_inputs_stay(name: str, dtype: torch.dtype) -> None:
    for w1, w0 in [
        (W1.to(dtype), W0.to(dtype)),
        (W1[:, 0].to(dtype), W0[:, 0].to(dtype)),
        (W1.to(dtype).T, W0.to(dtype).T),
    ]:
        before = digest(w1), digest(w0)
        result = EVERY[name](w1, w0)
        assert (result.dtype, result.shape) == (dtype, w1.shape)
        assert (digest(w1), digest(w0)) == before
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 1), (0, 3), (3, 3)])
def test_equal_inputs_zeros_and_tiny_shapes_give_the_input_and_never_nan(name: str, shape: tuple[int, ...]) -> None:
    for same in (torch.zeros(shape), gaussian(*shape, seed=6)):
        result = EVERY[name](same, same.clone())
        torch.testing.assert_close(result, same, rtol=1e-6, atol=0)
    assert torch.isfinite(EVERY[name](gaussian(*shape, seed=7), torch.zeros(shape))).all()
    assert torch.isfinite(EVERY[name](torch.zeros(shape), gaussian(*shape, seed=7))).all()


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"dare"}))
def test_bf16_is_computed_in_fp32_and_rounded_once(name: str) -> None:
    w1, w0 = W1.bfloat16(), W0.bfloat16()
    assert torch.equal(EVERY[name](w1, w0), EVERY[name](w1.float(), w0.float()).bfloat16())


@pytest.mark.parametrize("path", [k.lerp, k.slerp])
def test_ends_are_copies_to_the_bit(path: Callable[..., torch.Tensor]) -> None:
    w1, w0 = torch.tensor([1e-45, -0.0, 3e38, float("nan")]), torch.tensor([-0.0, 1e30, 1e-45, 2.0])
    for s, end in ((0, w1), (0.0, w1), (1, w0), (1.0, w0)):
        result = path(w1, w0, s)
        assert digest(result) == digest(end) and result.data_ptr() != end.data_ptr()


@pytest.mark.parametrize("path", [k.lerp, k.slerp])
def test_out_is_written_to_and_returned(path: Callable[..., torch.Tensor]) -> None:
    out = torch.full_like(W1, 7)
    for s in (0, 0.3, 1):
        assert path(W1, W0, s, out=out) is out
        assert torch.equal(out, path(W1, W0, s))


@pytest.mark.parametrize("s", [-0.1, 1.1, math.nan, math.inf])
def test_strengths_beyond_the_ends_are_refused(s: float) -> None:
    for path in (k.lerp, k.slerp):
        with pytest.raises(ConfigError, match="out of range"):
            path(W1, W0, s)


def test_extrapolation_goes_on_where_it_is_allowed() -> None:
    got = k.lerp(W1, W0, -0.5, extrapolate=True).double()
    torch.testing.assert_close(got, W1.double() + 0.5 * D, rtol=1e-5, atol=1e-6)


# --- lerp and slerp ---


def test_lerp_is_affine_and_long_tensors_have_no_seams() -> None:
    n = 2 * k.BLOCK + 3
    a, b = gaussian(n, seed=8), gaussian(n, seed=9)
    torch.testing.assert_close(k.lerp(a, b, 0.25).double(), 0.75 * a.double() + 0.25 * b.double(), rtol=1e-6, atol=1e-7)
    half = k.lerp(a, b, 0.5)
    torch.testing.assert_close(half, (k.lerp(a, b, 0.25) + k.lerp(a, b, 0.75)) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(k.slerp(a, b, 0.3)[-5:], k.slerp(a.reshape(1, -1), b.reshape(1, -1), 0.3)[0, -5:])


@settings(max_examples=60, deadline=None)
@given(angle=st.floats(0.04, 3.10), s=st.floats(0.01, 0.99))
def test_slerp_goes_along_the_great_circle(angle: float, s: float) -> None:
    a, b = at_angle(angle)
    got = k.slerp(a, b, s)
    assert float(got.norm()) == pytest.approx(1, abs=1e-9)
    assert math.acos(max(-1, min(1, float(got @ a)))) == pytest.approx(s * angle, abs=1e-6)
    torch.testing.assert_close(got, k.slerp(b, a, 1 - s), rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle", [0.04, 0.1, 0.3])
def test_slerp_differs_from_lerp_by_an_eighth_of_the_squared_angle(angle: float) -> None:
    a, b = at_angle(angle)
    gap = float((k.slerp(a, b, 0.5) - k.lerp(a, b, 0.5)).norm())
    assert gap == pytest.approx(angle**2 / 8, rel=0.02)


def test_slerp_hardly_jumps_where_it_becomes_lerp() -> None:
    switch = math.acos(k.COLLINEAR)
    a, before = at_angle(switch - 1e-9)
    _, after = at_angle(switch + 1e-9)
    assert torch.equal(k.slerp(a, before, 0.5), k.lerp(a, before, 0.5))
    jump = float((k.slerp(a, after, 0.5) - k.slerp(a, before, 0.5)).norm())
    assert 1e-5 < jump < 1.3e-4


def test_slerp_is_lerp_for_one_direction_opposite_ones_and_zeros() -> None:
    a, _ = at_angle(1)
    for other in (3 * a, -a, -2 * a, torch.zeros_like(a), at_angle(math.pi - 0.01)[1]):
        for pair in ((a, other), (other, a)):
            assert torch.equal(k.slerp(*pair, 0.3), k.lerp(*pair, 0.3))


def test_lengths_far_apart_do_not_lose_the_angle() -> None:
    a, b = at_angle(1.0)
    for scale in (1e-18, 1e18):
        got = k.slerp((a * scale).float(), b.float(), 0.5).double()
        wanted = (math.sin(0.5) * (a * scale + b)) / math.sin(1)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_nuslerp_keeps_the_length_of_task_vectors() -> None:
    base = gaussian(1000, seed=10).double()
    a, b = at_angle(1.2)
    got = k.nuslerp(base + a, base, base + b, 0.25) - base
    assert float(got.norm()) == pytest.approx(1, abs=1e-9)
    assert math.acos(float(got @ a)) == pytest.approx(0.3, abs=1e-7)
    assert torch.equal(k.nuslerp(W1, W0, W2, 0), W1) and torch.equal(k.nuslerp(W1, W0, W2, 1), W2)


# --- task vectors ---


def test_one_task_vector_with_weight_w_is_lerp() -> None:
    torch.testing.assert_close(k.task_arithmetic(W1, W0, weights=[0.7]), k.lerp(W1, W0, 0.3), rtol=1e-5, atol=1e-6)


def test_task_arithmetic_adds() -> None:
    wanted = W0.double() + 0.5 * D + 2 * (W2.double() - W0.double())
    torch.testing.assert_close(k.task_arithmetic(W1, W0, [W2], weights=[0.5, 2]).double(), wanted, rtol=1e-5, atol=1e-5)


def brute_force_ties(changes: list[np.ndarray], density: float, weights: list[float], normalize: bool) -> np.ndarray:
    """TIES entry by entry."""
    n = changes[0].size
    kept = []
    for change in changes:
        order = sorted(range(n), key=lambda i: (-abs(change[i]), i))[: max(1, int(density * n))]
        kept.append({i: change[i] for i in order})
    result = np.zeros(n)
    for i in range(n):
        terms = [(w, one[i]) for w, one in zip(weights, kept, strict=True) if i in one]
        positive = sum(w * value for w, value in terms) >= 0
        agree = [(w, value) for w, value in terms if w * value != 0 and (w * value > 0) == positive]
        total, share = sum(w * v for w, v in agree), sum(w for w, _ in agree)
        result[i] = total / share if normalize and agree else total
    return result


@pytest.mark.parametrize(("density", "normalize"), list(itertools.product([1.0, 0.4, 0.1], [True, False])))
def test_ties_is_what_brute_force_gives(density: float, normalize: bool) -> None:
    models = [gaussian(60, seed=20 + i).double() for i in range(3)]
    base = gaussian(60, seed=30).double()
    weights = [0.5, 1.0, 2.0]
    got = k.ties(models[0], base, models[1:], density=density, weights=weights, normalize=normalize, scale=0.8)
    wanted = base.numpy() + 0.8 * brute_force_ties(
        [(one - base).numpy() for one in models], density, weights, normalize
    )
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-12)


def test_ties_of_one_model_is_trimming_whatever_its_weight() -> None:
    trimmed = W0 + (W1 - W0) * k.keep_top((W1 - W0).abs(), 120)
    for weight in (0.1, 1.0, 3.0):
        torch.testing.assert_close(k.ties(W1, W0, density=0.1, weights=[weight]), trimmed, rtol=1e-5, atol=1e-6)
    assert torch.equal(k.ties(W1, W0, density=1.0), W1)
    assert torch.equal(k.ties(W1, W0, density=0.0), W0)


def test_ties_and_model_stock_do_not_depend_on_the_order_of_models() -> None:
    forth = k.ties(W1, W0, [W2], density=0.5, weights=[1, 2])
    torch.testing.assert_close(forth, k.ties(W2, W0, [W1], density=0.5, weights=[2, 1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k.model_stock(W1, W0, [W2]), k.model_stock(W2, W0, [W1]), rtol=1e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=30), n=st.integers(-1, 31))
def test_keep_top_keeps_exactly_n_and_the_first_of_equals(values: list[int], n: int) -> None:
    magnitude = torch.tensor(values, dtype=torch.float32).abs()
    wanted = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[: max(n, 0)]
    assert k.keep_top(magnitude, n).nonzero().flatten().tolist() == sorted(wanted)


def test_dare_keeps_the_share_repeats_itself_and_is_unbiased() -> None:
    base, tuned = torch.zeros(20_000), torch.ones(20_000)
    one = k.dare(tuned, base, density=0.2, seed=1)
    assert torch.equal(one, k.dare(tuned, base, density=0.2, seed=1))
    assert not torch.equal(one, k.dare(tuned, base, density=0.2, seed=2))
    assert set(one.unique().tolist()) == {0.0, 5.0}
    assert abs(int((one > 0).sum()) - 4000) < 4 * math.sqrt(20_000 * 0.2 * 0.8)
    mean = torch.stack([k.dare(W1, W0, density=0.5, seed=seed) for seed in range(400)]).double().mean(0)
    deviations = (mean - W1.double()) / (D.abs() / math.sqrt(400))  # std of one entry: |d| sqrt((1-p)/p) = |d|
    assert float(deviations.abs().max()) < 5 and 0.9 < float(deviations.std()) < 1.1


def test_dare_rescales_as_asked() -> None:
    kept = k.dare(W1, W0, density=0.3, seed=0, rescale="none").double() - W0
    l1 = k.dare(W1, W0, density=0.3, seed=0, rescale="l1").double() - W0
    assert float(l1.abs().sum()) == pytest.approx(float(D.abs().sum()), rel=1e-5)
    torch.testing.assert_close(k.dare(W1, W0, density=0.3, seed=0).double() - W0, kept / 0.3, rtol=1e-4, atol=1e-5)
    assert torch.equal(k.dare(W1, W0, density=1.0, seed=0), W1)
    assert torch.equal(k.dare(W1, W0, density=0.0, seed=0), W0)


@pytest.mark.parametrize(("density", "gamma"), [(0.8, 0.1), (0.5, 0.01), (0.95, 0.2), (0.3, 0.0)])
def test_breadcrumbs_drops_both_tails(density: float, gamma: float) -> None:
    n = 40
    base = torch.zeros(n)
    tuned = torch.arange(1.0, n + 1)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    kept = int(density * n)
    top = min(int(gamma * n), n - kept)
    wanted = {float(v) for v in range(n - top - kept + 1, n - top + 1)}
    assert {v for v in k.breadcrumbs(tuned, base, density=density, gamma=gamma).tolist() if v} == wanted


def test_breadcrumbs_of_a_small_tensor_is_not_all_base() -> None:
    tuned = torch.tensor([1.0, 2.0, 3.0])
    assert k.breadcrumbs(tuned, torch.zeros(3), density=0.7, gamma=0.01).tolist() == [0.0, 2.0, 3.0]


def test_model_stock_of_orthogonal_parallel_and_opposite_task_vectors() -> None:
    base = gaussian(1000, seed=11).double()
    a, b = at_angle(math.pi / 2)
    torch.testing.assert_close(k.model_stock(base + a, base, [base + b]), base, rtol=0, atol=1e-9)
    torch.testing.assert_close(k.model_stock(base + a, base, [base + 3 * a]), base + 2 * a, rtol=0, atol=1e-9)
    assert torch.equal(k.model_stock(base + a, base, [base - a]), base)
    a, b = at_angle(math.pi / 3)  # c = 1/2, t = 2/3
    torch.testing.assert_close(k.model_stock(base + a, base, [base + b]), base + (a + b) / 3, rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match="two tuned models"):
        k.model_stock(W1, W0, [])


# --- DG-Hard ---


@pytest.mark.parametrize("shape", [(100, 100), (80, 160), (60, 240)])
def test_noise_has_the_median_of_the_marchenko_pastur_law(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(gaussian(*shape, seed=12, scale=0.3))
    beta = min(shape) / max(shape)
    assert float(values.median()) == pytest.approx(k.mp_median(beta) * 0.3 * math.sqrt(max(shape)), rel=0.04)


def test_the_marchenko_pastur_median_of_square_matrices_halves_the_law() -> None:
    # beta = 1, singular value s in [0, 2]: density sqrt(4 - s^2)/pi, the quarter circle
    s = k.mp_median(1.0)
    assert (s * math.sqrt(4 - s * s) / 2 + 2 * math.asin(s / 2)) / math.pi == pytest.approx(0.5, abs=1e-4)
    assert k.hard_threshold(1.0) == pytest.approx(4 / math.sqrt(3))
    assert k.hard_threshold(1.0) / s == pytest.approx(2.858, abs=1e-3)  # Gavish and Donoho's constant


@pytest.mark.parametrize("shape", [(96, 96), (64, 160)])
def test_dg_hard_returns_to_the_base_on_noise_and_keeps_what_stands_out(shape: tuple[int, int]) -> None:
    base, noise = gaussian(*shape, seed=13), gaussian(*shape, seed=14, scale=0.01)
    torch.testing.assert_close(k.dg_hard(base + noise, base), base, rtol=0, atol=1e-6)
    signal = gaussian(shape[0], 8, seed=15) @ gaussian(8, shape[1], seed=16)
    once = k.dg_hard(base + signal + noise, base)
    assert int(torch.linalg.matrix_rank(once - base, atol=1e-3)) == 8
    assert float((once - base - signal).norm()) < 0.7 * float(noise.norm())
    rounding = 6e-6 * float(once.abs().max())  # two float32 SVDs, which processors round otherwise
    torch.testing.assert_close(k.dg_hard(once, base), once, rtol=0, atol=rounding)  # again: its median is 0
    torch.testing.assert_close(k.dg_hard((base + signal + noise).T, base.T), once.T, rtol=0, atol=rounding)


def test_dg_hard_keeps_everything_at_scale_0_and_less_at_larger_ones() -> None:
    tuned = W0 + gaussian(40, 5, seed=17) @ gaussian(5, 30, seed=18) * 0.1 + 0.1 * D.float()
    ranks = [int(torch.linalg.matrix_rank(k.dg_hard(tuned, W0, scale=s) - W0, atol=1e-3)) for s in (0, 0.3, 1, 2, 9)]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == 30 and ranks[-1] == 0
    assert torch.equal(k.dg_hard(tuned, W0, scale=0), tuned)


def test_dg_hard_leaves_vectors_small_tensors_and_low_rank_changes() -> None:
    assert torch.equal(k.dg_hard(W1[0], W0[0], min_numel=0), W1[0])
    assert torch.equal(k.dg_hard(W1[:10, :10], W0[:10, :10]), W1[:10, :10])
    lora = W0 + gaussian(40, 4, seed=17) @ gaussian(4, 30, seed=18)
    torch.testing.assert_close(k.dg_hard(lora, W0), lora, rtol=0, atol=2e-5)


# --- grafting ---


def test_graft_keeps_what_matters_by_copy() -> None:
    importance = V.double() * D.square()
    bound = float(importance.flatten().sort().values[600])
    got = k.graft(W1, W0, V, threshold=bound)
    assert torch.equal(got, torch.where(importance >= bound, W1, W0))
    assert torch.equal(got, k.graft(W1, W0, V, density=0.5))
    assert torch.equal(k.graft(W1, W0, V, threshold=0.0), W1)
    assert torch.equal(k.graft(W1, W0, V, threshold=math.inf), W0)
    assert torch.equal(k.graft(W1, W0, 1e-12 * V.double(), threshold=1e-12 * bound * (1 - 1e-9)), got)


def test_graft_masks_are_nested() -> None:
    kept = [k.graft(W1, W0, V, density=density) == W1 for density in (0.1, 0.3, 0.8)]
    assert all(bool((small <= large).all()) for small, large in itertools.pairwise(kept))


def test_graft_sees_moments_at_the_end_of_fp32() -> None:
    moment, tiny = torch.tensor([1e-30, 2e-30]), 1e-9
    got = k.graft(torch.tensor([tiny, tiny]), torch.zeros(2), moment, density=0.5)
    assert got[0] == 0 and got[1] > 0


def test_rank_1_moments_are_exact_on_outer_products_and_keep_the_sums() -> None:
    row, column = gaussian(5, seed=40).square(), gaussian(7, seed=41).square()
    torch.testing.assert_close(
        k.moment_from_factors(*k.moment_factors(torch.outer(row, column))), torch.outer(row, column)
    )
    made = k.moment_from_factors(*k.moment_factors(V))
    torch.testing.assert_close(made.sum(0), V.sum(0))
    torch.testing.assert_close(made.sum(1), V.sum(1))
    assert torch.equal(k.moment_from_factors(*k.moment_factors(torch.zeros(2, 3))), torch.zeros(2, 3))


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e300) | st.sampled_from([0.0, 1e-300, 5e-324, 1.0]), min_size=1, max_size=40),
    density=st.floats(0.001, 1),
)
def test_the_threshold_of_a_density_is_that_of_a_sorted_list(values: list[float], density: float) -> None:
    cut = len(values) // 2
    parts = [torch.tensor(part, dtype=torch.float64) for part in (values[:cut], values[cut:])]
    wanted = sorted(values, reverse=True)[k.n_kept(density, len(values)) - 1]
    assert k.threshold_of_density(lambda: parts, density) == wanted
    assert k.threshold_of_density(lambda: parts, 0) == math.inf


# --- CheckFree's neighbours


def test_neighbours_are_the_weighted_mean_and_a_lone_one_is_copied() -> None:
    w1, below, above = (gaussian(5, 7, seed=n) for n in (1, 2, 3))
    torch.testing.assert_close(k.neighbours(w1, below, above), (below + above) / 2)
    weighted = k.neighbours(w1, below, above, weights=(3.0, 1.0))
    torch.testing.assert_close(weighted, (3 * below + above) / 4)
    assert torch.equal(k.neighbours(w1, below, None), below)
    assert torch.equal(k.neighbours(w1, None, above), above)
    assert torch.equal(k.neighbours(w1, below, above, weights=(1.0, 0.0)), below)  # weights to their limits
    assert torch.equal(k.neighbours(w1, below, above, weights=(0.0, 1.0)), above)
    assert torch.equal(k.neighbours(w1, below, above, s=0.0), w1)
    half = k.neighbours(w1, below, above, s=0.5)
    torch.testing.assert_close(half, w1 / 2 + (below + above) / 4)
    torch.testing.assert_close(k.neighbours(w1, below, below), below)  # equal neighbours: that value
    narrow = k.neighbours(w1.bfloat16(), below.bfloat16(), above.bfloat16())
    wide = (below.bfloat16().float() + above.bfloat16().float()) / 2
    assert torch.equal(narrow, wide.bfloat16())  # fp32 within, one cast
    for weights in ((0.0, 0.0), (-1.0, 2.0), (math.nan, 1.0), (1.0,)):
        with pytest.raises(ConfigError):
            k.neighbours(w1, below, above, weights=weights)
