"""Policies, orders, controls, equal distance and freeze lists; the front and the direct estimate by brute force."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.merge import front as fronts
from clbench.merge import select
from clbench.merge.front import Point
from clbench.merge.impact import Impact, agreement, leave_one_restored, spearman
from clbench.merge.kernels import lerp
from clbench.merge.scores import TensorScore
from clbench.merge.select import Ordering, Policy
from tests.merge.test_scores import model, noisy, scored

SHARES = [0.0, 0.1, 0.15, 0.3, 0.5, 0.77, 1.0]


# --- policies and orders ---


def test_policies_by_name_and_by_hand() -> None:
    assert select.policy_of("conservative") == Policy(q=0.5, s=1.0)
    assert select.policy_of("balanced") == Policy(q=0.3, s=0.7)
    assert select.policy_of("aggressive", s=0.9) == Policy(q=0.15, s=0.9)
    assert select.policy_of("free", 0.2, 0.4) == Policy(q=0.2, s=0.4)
    for name, q, s in (
        ("free", 0.2, None),
        ("bold", None, None),
        ("balanced", 1.1, None),
        ("balanced", None, math.nan),
    ):
        with pytest.raises(ConfigError):
            select.policy_of(name, q, s)
    assert select.grid([0, 0.5, 1], [0, 1]) == [Policy(q=0, s=0), Policy(q=0.5, s=1), Policy(q=1, s=1)]


@pytest.mark.parametrize("granularity", ["layer", "module", "tensor"])
@pytest.mark.parametrize("by", select.CHOICES)
def test_sets_are_nested_in_q_and_complete(by: str, granularity: select.Granularity) -> None:
    found = scored(noisy(model(7)), model(7))
    order = select.order_units(found, by=by, granularity=granularity, seed=5)
    tops = [set(order.top(q)) for q in SHARES]
    assert tops[0] == set() and tops[-1] == set(order.units) == set(order.sizes) and len(tops[1]) >= 1
    assert all(small <= large for small, large in itertools.pairwise(tops))
    assert sum(order.sizes.values()) == sum(score.n_parameters for score in found if score.is_matrix)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0.001, 1))
def test_the_share_that_is_restored_is_the_nearest_there_is(sizes: list[int], q: float) -> None:
    units = tuple(str(i) for i in range(len(sizes)))
    order = Ordering(units=units, sizes=dict(zip(units, sizes, strict=True)), scores={})
    total, top = sum(sizes), order.top(q)
    assert top == units[: len(top)] and top
    off = [abs(sum(sizes[: n + 1]) - q * total) for n in range(len(sizes))]
    assert off[len(top) - 1] <= min(off) + 1e-6 * total


def test_half_of_equal_layers_is_half_of_them() -> None:
    units = tuple(f"layers.{i}" for i in range(30))
    order = Ordering(units=units, sizes=dict.fromkeys(units, 17), scores={})
    assert [len(order.top(q)) for q in (0.15, 0.3, 0.5)] == [5, 9, 15]  # 4.5: the larger


def test_controls() -> None:
    found = scored(noisy(model(6)), model(6))
    names = [f"model.layers.{i}" for i in range(6)]

    def order(by: str, seed: int = 0) -> list[str]:
        return list(select.order_units(found, by=by, seed=seed).units)

    assert order("first") == names and order("last") == names[::-1]
    spear = select.order_units(found, by="spear")
    assert list(spear.units) == sorted(names, key=lambda unit: -spear.scores[unit])
    if len(set(spear.scores.values())) == 6:
        assert order("bottom") == order("spear")[::-1]
    draws = {tuple(order("random", seed)) for seed in range(8)}
    assert len(draws) > 5 and all(sorted(draw) == names for draw in draws)
    assert order("random", 3) == order("random", 3)
    with pytest.raises(ConfigError, match="spear"):
        order("best")
    with pytest.raises(ConfigError, match="blocks"):
        select.order_units([score for score in found if not score.is_matrix])


def test_only_the_chosen_units_have_a_strength() -> None:
    names = [
        f"layers.{i}.{part}"
        for i in (1, 10)
        for part in ("mlp.up.weight", "mlp.up.bias", "attn.q.weight", "norm.weight")
    ]
    names += ["embed.weight", "norm.weight"]

    def strong(*units: str, outside: bool = False) -> set[str]:
        found = select.strengths_of(names, units, 0.7, outside=outside)
        assert set(found.values()) <= {0.0, 0.7} and list(found) == names
        return {name for name, s in found.items() if s}

    assert strong("layers.1") == set(names[:4])
    assert strong("layers.1.mlp", "layers.10.attn") == {names[0], names[1], names[6]}
    assert strong("layers.10.mlp.up") == {names[4], names[5]}
    assert strong("layers.1", outside=True) == {*names[:4], "embed.weight", "norm.weight"}
    assert strong() == set()


# --- equal distance ---


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.floats(0, 1)), min_size=1, max_size=6))
def test_equal_strength_gives_equal_mean_distances_to_both_ends(parts: list[tuple[float, float]]) -> None:
    """Of real merges, tensor by tensor, with SLERP's straight line."""
    w0 = {
        str(i): torch.randn(9, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i in range(len(parts))
    }
    w1 = {
        name: w0[name] + torch.full((9,), moved / 3, dtype=torch.float64)
        for name, (moved, _) in zip(w0, parts, strict=True)
    }
    strengths = {name: s for name, (_, s) in zip(w0, parts, strict=True)}
    one = select.equal_strength({name: moved for name, (moved, _) in zip(w0, parts, strict=True)}, strengths)
    for end in (w0, w1):
        selected = sum(float((lerp(w1[n], w0[n], strengths[n]) - end[n]).norm()) for n in w0)
        uniform = sum(float((lerp(w1[n], w0[n], min(1.0, one)) - end[n]).norm()) for n in w0)
        assert uniform == pytest.approx(selected, abs=1e-9)
    assert select.equal_strength({"a": 0.0}, {"a": 0.5}) == 0


# --- freeze lists ---


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_freeze_lists_go_out_and_come_back(tmp_path: Path, suffix: str) -> None:
    file, names = tmp_path / f"list{suffix}", ["layers.1.w", "layers.10.w", "layers.2.w", "embed.weight"]
    document = select.freeze_list(names, ["layers.10", "layers.2"], method="spear-mm", q=0.5)
    select.write_freeze_list(file, document)
    assert select.read_freeze_list(file) == ["layers.2", "layers.10"]
    text = file.read_text()
    assert (json.loads(text) if suffix == ".json" else yaml.safe_load(text)) == document
    assert document["unfrozen_parameters"] == ["^embed\\.weight$", "^layers\\.1\\.w$"] and document["q"] == 0.5


def test_what_is_no_freeze_list_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    with pytest.raises(NotFoundError):
        select.read_freeze_list(file)
    for text in ("[1, 2", "a: 1", "frozen_modules: [3]", "frozen_modules: layers.1", "\udc80"):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(IntegrityError, match="frozen_modules"):
            select.read_freeze_list(file)


# --- the front ---

COORDINATES = st.floats(-1, 2) | st.sampled_from([0.0, 0.5, 1.0, math.nan])


@given(st.lists(st.tuples(COORDINATES, COORDINATES), max_size=14))
def test_the_front_is_what_nothing_dominates(places: list[tuple[float, float]]) -> None:
    points = [Point(general, domain, n) for n, (general, domain) in enumerate(places)]
    sound = [p for p in points if not (math.isnan(p.general) or math.isnan(p.domain))]

    def beaten(p: Point[int]) -> bool:
        return any(
            q.general >= p.general and q.domain >= p.domain and (q.general > p.general or q.domain > p.domain)
            for q in sound
        )

    assert {p.what for p in fronts.front(points)} == {p.what for p in sound if not beaten(p)}
    for keep in (0.0, 0.5, 1.0):
        picked, allowed = fronts.pick(points, keep=keep), [p for p in sound if p.general >= keep]
        assert (picked is None) == (not allowed)
        if picked is not None:
            assert picked.general >= keep and picked.domain == max(p.domain for p in allowed)
            assert not beaten(picked)


def test_retention_matches_the_papers_example_and_says_why_it_is_undefined() -> None:
    assert fronts.retention(0.556, 0.80).value == pytest.approx(0.695)
    assert fronts.retention(0.40, 0.50, chance=0.25).value == pytest.approx(0.6)
    assert fronts.retention(0.55, 0.50).value == pytest.approx(1.1)  # not cut off
    assert fronts.retention(4.0, 3.0, lower_is_better=True).value == pytest.approx(0.75)
    for undefined in (
        fronts.retention(0.3, 0.25, chance=0.25),
        fronts.retention(0.3, 0.0),
        fronts.retention(math.nan, 0.5),
        fronts.retention(0.0, 3.0, lower_is_better=True),
    ):
        assert math.isnan(undefined.value) and undefined.reason
    assert fronts.mean_retention({"a": 0.4, "b": 0.9}, {"a": 0.5, "b": 0.9}).value == pytest.approx(0.9)
    poor = fronts.mean_retention({"a": 0.4, "b": 0.9}, {"a": 0.5, "b": 0.9}, {"a": 0.5})
    assert math.isnan(poor.value) and poor.reason is not None and poor.reason.startswith("a: ")
    with pytest.raises(ConfigError):
        fronts.mean_retention({"a": 1}, {"b": 1})


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_kept_domain_gain_is_the_same_for_scores_and_losses(merged: float, base: float, tuned: float) -> None:
    value = fronts.domain_gain_retention(merged, base, tuned, standard_error=0.01)
    flipped = fronts.domain_gain_retention(-merged, -base, -tuned, standard_error=0.01)
    if abs(tuned - base) < 0.02:
        assert math.isnan(value.value) and value.reason and flipped.reason
    else:
        assert value.value == pytest.approx(flipped.value)
        assert base + value.value * (tuned - base) == pytest.approx(merged, abs=1e-9)


def test_cost_reduction() -> None:
    assert fronts.cost_reduction(1.0, 10.0).value == pytest.approx(0.9)
    assert math.isnan(fronts.cost_reduction(1.0, 0.0).value)


# --- leaving one restored ---


def test_the_impact_of_a_layer_is_what_restoring_it_alone_does() -> None:
    """Losses that are sums of known parts of the blocks: the answer is in closed form."""
    base = {f"layers.{i}.w": torch.zeros(2) for i in range(11)} | {"embed.w": torch.zeros(2)}
    tuned = {name: torch.full((2,), float(n + 1)) for n, name in enumerate(base)}
    seen: list[str] = []
    units = [f"layers.{i}" for i in (1, 10, 4)]

    def total(weights: dict[str, torch.Tensor]) -> float:
        return sum(float(w[0]) for w in weights.values())

    found = leave_one_restored(tuned, base, units, general=total, domain=lambda w: -3 * total(w), progress=seen.append)
    assert [impact.unit for impact in found] == seen == units
    assert [impact.general_gain for impact in found] == [2, 11, 5]
    assert [impact.domain_cost for impact in found] == [6, 33, 15]
    assert found[0].value == pytest.approx(2 / 6.001)
    assert Impact(unit="a", general_gain=0.5, domain_cost=-9.0).value == pytest.approx(500)
    with pytest.raises(ConfigError, match=r"layers\.99"):
        leave_one_restored(tuned, base, ["layers.99"], general=total, domain=total)


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 99]).value == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]).value == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 2, 0, 2, 1, 1: their squares sum to 10
    assert spearman([1, 2, 3, 4, 5], [3, 2, 1, 5, 4]).value == pytest.approx(1 - 6 * 10 / 120)
    assert spearman([1, 2, 3], [5, 5, 5]).reason and spearman([1, 2], [1, 2]).reason
    with pytest.raises(ConfigError):
        spearman([1, 2, 3], [1, 2])
    impacts = [Impact(unit=u, general_gain=g, domain_cost=0) for u, g in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    assert agreement(impacts, {"a": 0.1, "c": 0.5, "b": 0.9}).value == pytest.approx(1)


def test_no_score_is_of_a_tensor_outside_the_blocks() -> None:
    outside = TensorScore(name="embed.weight", n_parameters=9, norm=1.0, moved=1.0, is_matrix=False)
    inside = TensorScore(name="layers.0.w", n_parameters=4, norm=1.0, moved=1.0, is_matrix=True)
    assert select.order_units([outside, inside], by="drift").sizes == {"layers.0": 4}
