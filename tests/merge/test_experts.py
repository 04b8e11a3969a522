"""Several experts: OTA merging against a loop over entries, its masks, and means of models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clbench.errors import ConfigError
from clbench.merge import kernels as k
from clbench.merge.execute import compress_moments, graft_threshold, merge_weights
from clbench.merge.families import BASE
from clbench.merge.families import Path as PathFamily
from clbench.merge.plan import Action, MergePlan
from clbench.merge.tensors import open_source
from clbench.method import Weights
from tests.merge.models import gaussian, live, make_weights

W0, A, B = (gaussian(9, 7, seed=n) for n in (0, 1, 2))
VA, VB = (1e-11 * gaussian(9, 7, seed=n).square() for n in (3, 4))
"""As small as Adam's second moments are."""


def brute(thresholds: tuple[float, float] | None, power: float, scales: tuple[float, float]) -> torch.Tensor:
    """OTA entry by entry, with Python's floats; the weights' floor is left out, it is 1e-12 of them."""
    out = torch.empty_like(W0)
    for i in range(W0.shape[0]):
        for j in range(W0.shape[1]):
            w0, top, bottom = float(W0[i, j]), 0.0, 0.0
            for n, (w, v) in enumerate(((A, VA), (B, VB))):
                d = float(w[i, j]) - w0
                if thresholds is None or float(v[i, j]) * d * d >= thresholds[n]:
                    weight = scales[n] * float(v[i, j]) ** power
                    top, bottom = top + weight * d, bottom + weight
            out[i, j] = w0 + (top / bottom if bottom else 0.0)
    return out


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("thresholds", [None, (1e-12, 4e-12), (0.0, 1e-11)])
def test_ota_is_the_curvature_weighted_mean_of_what_is_not_masked(
    power: float, thresholds: tuple[float, float] | None
) -> None:
    found = k.ota(A, W0, [B], moments=[VA, VB], power=power, thresholds=thresholds, scales=[1.0, 3.0])
    torch.testing.assert_close(found, brute(thresholds, power, (1.0, 3.0)), rtol=1e-5, atol=1e-6)


def test_limits_of_ota() -> None:
    equal = k.ota(A, W0, [B], moments=[VA, VA])  # equal curvature: the plain mean
    torch.testing.assert_close(equal, (A + B) / 2)
    assert torch.equal(k.ota(A, W0, [B], moments=[VA, VB], thresholds=[math.inf, math.inf]), W0)  # all masked
    mean = k.ota(A, W0, [B], moments=[VA, VB], thresholds=[math.inf, math.inf], fallback="mean")
    torch.testing.assert_close(mean, (A + B) / 2)
    only = k.ota(A, W0, [B], moments=[VA, VB], thresholds=[0.0, math.inf])
    assert torch.equal(only, A)  # by copy where one alone has a say
    for threshold in (0.0, 1e-12, math.inf):
        graft = k.graft(A, W0, VA, threshold=threshold)
        assert torch.equal(k.ota(A, W0, moments=[VA], thresholds=[threshold]), graft)  # one expert: a cancels
    flat = k.ota(A, W0, [B], moments=[torch.zeros_like(VA), torch.zeros_like(VB)])
    torch.testing.assert_close(flat, (A + B) / 2)  # nothing is known, and nothing is 0/0
    sure = k.ota(A, W0, [B], moments=[torch.zeros_like(VA), VB])
    torch.testing.assert_close(sure, B, rtol=1e-5, atol=1e-6)
    scaled = [k.ota(A, W0, [B], moments=[c * VA, c * VB], thresholds=[c * 1e-12] * 2) for c in (1.0, 1e6)]
    torch.testing.assert_close(*scaled)  # a relative floor: units of v do not count
    swapped = k.ota(B, W0, [A], moments=[VB, VA], thresholds=[4e-12, 1e-12])
    torch.testing.assert_close(swapped, k.ota(A, W0, [B], moments=[VA, VB], thresholds=[1e-12, 4e-12]))
    assert torch.equal(k.ota(W0, W0, [W0], moments=[VA, VB]), W0)


def test_densities_are_those_of_the_mask_and_masks_are_nested() -> None:
    last = torch.zeros_like(W0, dtype=torch.bool)
    for density in (0.1, 0.4, 0.8, 1.0):
        found = k.ota(A, W0, [W0], moments=[VA, VA], densities=[density, 0.0])
        mask = found != W0
        assert int(mask.sum()) == k.n_kept(density, W0.numel())
        assert not (last & ~mask).any()
        last = mask


@pytest.mark.parametrize(
    "options",
    [
        {"moments": [VA]},
        {"moments": [VA, VB], "thresholds": [0.0]},
        {"moments": [VA, VB], "thresholds": [0.0, 0.0], "densities": [1.0, 1.0]},
        {"moments": [VA, VB], "scales": [1.0, 0.0]},
        {"moments": [VA, VB], "fallback": "zero"},
    ],
)
def test_what_ota_refuses(options: dict[str, list[float]]) -> None:
    with pytest.raises(ConfigError):
        k.ota(A, W0, [B], **options)  # type: ignore[arg-type]


def moments_of(weights: Weights, seed: int) -> Weights:
    floating = [name for name, w in weights.items() if w.is_floating_point()]
    return {f"exp_avg_sq/{n}": gaussian(*weights[n].shape, seed=seed + i).square() for i, n in enumerate(floating)}


def test_a_plan_merges_models_with_whole_and_with_compressed_moments(tmp_path: Path) -> None:
    base = make_weights(0)
    one, two = make_weights(1, like=base), make_weights(2, like=base)
    va, vb = moments_of(one, 100), moments_of(two, 200)
    sources = live(one, base, two, moments=va)
    with pytest.raises(ConfigError, match="second moments of other 0"):
        merge_weights(MergePlan(Action("ota")), sources)
    sources = type(sources)(**{**vars(sources), "other_moments": (open_source(compress_moments(vb), "small"),)})
    name = "model.layers.3.mlp.up_proj.weight"
    rank_one = k.moment_from_factors(*k.moment_factors(vb[f"exp_avg_sq/{name}"]))
    torch.testing.assert_close(rank_one.sum(0), vb[f"exp_avg_sq/{name}"].sum(0))  # row and column sums stay
    merged = merge_weights(MergePlan(Action("ota")), sources)
    wanted = k.ota(one[name], base[name], [two[name]], moments=[va[f"exp_avg_sq/{name}"], rank_one])
    assert torch.equal(merged[name], wanted)
    assert torch.equal(merged["model.mask"], base["model.mask"])
    family = PathFamily("ota", sources)
    assert family.spot(None, 0.0).plan == MergePlan(Action("ota"))
    assert family.spot(None, 1.0).plan == BASE.plan
    plan = family.spot(None, 0.7).plan
    wanted_thresholds = [graft_threshold(sources, 0.3, expert) for expert in (0, 1)]
    assert plan.default.options["thresholds"] == wanted_thresholds
    values = [k.saliency(one[n], base[n], va[f"exp_avg_sq/{n}"]).flatten() for n in one if one[n].is_floating_point()]
    share = float((torch.cat(values) >= wanted_thresholds[0]).double().mean())  # of the whole model
    assert share == pytest.approx(0.3, abs=0.01)
    assert MergePlan.from_dict(plan.as_dict()) == plan


# --- means


def test_means_are_those_of_float64_and_one_model_alone_is_a_copy() -> None:
    shares = [0.2, 0.5, 0.3]
    wanted = (0.2 * W0.double() + 0.5 * A.double() + 0.3 * B.double()).float()
    assert torch.equal(k.mean(A, W0, [B], shares=shares), wanted)
    torch.testing.assert_close(k.mean(A, W0, [B], shares=[2, 5, 3]), wanted)
    for shares, model in (([1, 0, 0], W0), ([0, 1, 0], A), ([0, 0, 2.5], B)):
        assert torch.equal(k.mean(A, W0, [B], shares=shares), model)
    narrow = k.mean(A.bfloat16(), W0.bfloat16(), shares=[1, 1])
    assert torch.equal(narrow, ((A.bfloat16().double() + W0.bfloat16().double()) / 2).bfloat16())
    torch.testing.assert_close(k.mean(A, W0, shares=[0.3, 0.7]), k.lerp(A, W0, 0.3))
    for wrong in ([1.0, 1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [math.nan, 1.0, 1.0]):
        with pytest.raises(ConfigError):
            k.mean(A, W0, [B], shares=wrong)
    with pytest.raises(ConfigError, match="2 shares for 3 models"):
        base = make_weights(0)
        merge_weights(MergePlan(Action("mean", {"shares": [1.0, 1.0]})), live(base, base, base))
