"""The search of ``clbench merge`` against closed forms and brute force, on real merges of small live weights.

The judge here is quadratic: a general item costs more the farther a tensor is from the base, a domain item the farther
it is from the tuned weights. So retention and gain of every merge are known without a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clbench.errors import ClbenchError
from clbench.merge import search
from clbench.merge.evaluate import Benchmark, JointJudge, Judge, SuiteJudge, draw, read_text
from clbench.merge.execute import Sources, merge_weights
from clbench.merge.families import BASE, TUNED, Restoring, Spot
from clbench.merge.families import Path as PathFamily
from clbench.merge.front import Point, pick
from clbench.merge.outcome import Yardstick
from clbench.merge.plan import KEEP, RESTORE, Action, MergePlan, Rule
from clbench.merge.scores import Scorer, TensorScore, block_depth
from clbench.merge.search import Desk, Walk
from clbench.merge.select import Ordering, order_units
from clbench.method import Weights
from clbench.suite import Rows
from tests.merge.models import gaussian, live

N_LAYERS = 12
FORGETS = {layer: 0.02 * (layer + 1) ** 2 for layer in range(N_LAYERS)}
"""What a layer costs on the general side when it is tuned, in nats."""
LEARNS = {layer: 0.3 + 0.05 * ((7 * layer) % N_LAYERS) for layer in range(N_LAYERS)}
"""What it gives on the domain side."""


def pair(n_layers: int = N_LAYERS) -> tuple[Weights, Weights]:
    """A tuned and a base model; drift grows with depth, so drift ranks layers as FORGETS does."""
    base: Weights = {"embed.weight": gaussian(6, 4, seed=1)}
    base |= {f"layers.{i}.up.weight": gaussian(8, 6, seed=10 + i) for i in range(n_layers)}
    tuned = {
        name: w if block_depth(name) is None else w + 0.01 * (1 + int(name.split(".")[1])) * gaussian(*w.shape, seed=99)
        for name, w in base.items()
    }
    return tuned, base


class Quadratic(Judge):
    """Losses 2 + sum of FORGETS share² and 3 + sum of LEARNS (1 - share)²; share: how tuned a layer is."""

    benchmarks = (Benchmark(name="old", side="general"), Benchmark(name="new", side="domain"))
    sha256 = "quadratic"

    def __init__(self, tuned: Weights, base: Weights, *, noise: float = 0.0, fail_after: int | None = None) -> None:
        self.tuned, self.base, self.noise, self.fail_after, self.n = tuned, base, noise, fail_after, 0

    def losses(self, weights: Weights) -> tuple[float, float]:
        general, domain = 2.0, 3.0
        for name, w0 in self.base.items():
            if (layer := block_depth(name)) is not None:
                layer = int(name.split(".")[1])
                share = float((weights[name] - w0).norm() / (self.tuned[name] - w0).norm())
                general += FORGETS[layer] * share**2
                domain += LEARNS[layer] * (1 - share) ** 2
        return general, domain

    def measure(self, checkpoint: Any) -> Rows:
        if self.n == self.fail_after:
            raise KeyboardInterrupt
        self.n += 1
        return rows_of(*self.losses(checkpoint.weights), noise=self.noise, seed=self.n)

    def cost(self, checkpoint: Any) -> tuple[int, float]:
        return 400, 1e6


def rows_of(general: float, domain: float, *, n: int = 20, noise: float = 0.0, seed: int = 0) -> Rows:
    """Items of 10 tokens each whose mean is the given loss."""
    wobble = noise * np.random.default_rng(seed).standard_normal(2 * n)
    wobble -= np.repeat(wobble.reshape(2, n).mean(1), n)
    return Rows(
        item=[f"item {i}" for i in range(n)] * 2,
        stage=np.repeat([0, 1], n),
        metric=["nll_nats"] * 2 * n,
        value=10 * (np.repeat([general, domain], n) + wobble),
        n_tokens=np.full(2 * n, 10),
        n_bytes=np.full(2 * n, 40),
        group=[""] * 2 * n,
        change=["new"] * 2 * n,
    )


class LiveBench:
    """Merges live weights; stands where a model is."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    @contextmanager
    def holding(self, plan: MergePlan) -> Iterator[Any]:
        yield SimpleNamespace(weights=merge_weights(plan, self.sources))


class Lab:
    """Models, scores and a desk over a folder."""

    def __init__(self, folder: Path, **judge: Any) -> None:
        self.tuned, self.base = pair()
        self.sources = live(self.tuned, self.base)
        self.judge = Quadratic(self.tuned, self.base, **judge)
        self.scores: list[TensorScore] = Scorer().score((name, self.base[name], w) for name, w in self.tuned.items())
        bench: Any = LiveBench(self.sources)
        self.desk = Desk(self.sources, self.judge, lambda: bench, address="lab", folder=folder)

    def restoring(self, by: str = "drift", **options: Any) -> Restoring:
        dimensions = {name: tensor.ndim for name, tensor in self.tuned.items()}
        return Restoring(order_units(self.scores, by=by), dimensions, **options)

    def walk(self, family: Any, keep: float, **options: Any) -> Walk:
        return Walk(desk=self.desk, family=family, keep=keep, **options)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


# --- the walk


def wise_ft_strength(keep: float) -> float:
    """Where retention 2 / (2 + F (1-s)²) reaches keep."""
    return 1 - math.sqrt((2 / keep - 2) / math.fsum(FORGETS.values()))


@pytest.mark.parametrize("keep", [0.6, 0.8, 0.95, 0.99])
def test_wise_ft_is_bracketed_at_the_strength_of_the_closed_form(lab: Lab, keep: float) -> None:
    walk = lab.walk(PathFamily("wise-ft", lab.sources), keep)
    chosen = walk.run()
    assert chosen is not None
    s = wise_ft_strength(keep)
    assert walk.retention(chosen) >= keep
    near = walk.retention(chosen) - keep < search.CLOSE
    assert s <= chosen.spot.about["s"] <= s + 1 / 64 + 1e-9 or near
    assert walk.gain(chosen) == pytest.approx(1 - chosen.spot.about["s"] ** 2, abs=1e-5)
    assert len(walk.walked) - 1 <= 6  # halving 64 levels; base and tuned besides


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.9, 0.97])
def test_spear_finds_what_brute_force_finds_with_fewer_evaluations(lab: Lab, keep: float) -> None:
    family, strengths = lab.restoring(), (1.0, 0.7, 0.4)
    walk = lab.walk(family, keep, strengths=strengths)
    chosen = walk.run()
    assert chosen is not None
    spots = [family.first(n, s) for n in range(N_LAYERS + 1) for s in strengths]
    exact = {spot.plan.sha256: lab.judge.losses(merge_weights(spot.plan, lab.sources)) for spot in spots}
    total = math.fsum(LEARNS.values())
    points = [Point(2 / g, (3 + total - d) / total, key) for key, (g, d) in exact.items()]
    best = pick(points, keep=keep)
    assert best is not None
    assert walk.retention(chosen) >= keep
    assert walk.gain(chosen) >= best.domain - 0.02  # halving stops within 0.002 of the retention
    assert len(walk.walked) - 1 <= 16 < len(spots) - 1
    assert not walk.exhausted


def test_sets_are_nested_and_only_units_in_front_are_restored(lab: Lab) -> None:
    family = lab.restoring()
    assert family.order.units[0] == f"layers.{N_LAYERS - 1}"  # drift grows with depth
    for n in range(1, N_LAYERS + 1):
        merged = merge_weights(family.first(n, 1.0).plan, lab.sources)
        restored = {name for name in merged if merged[name].equal(lab.base[name]) and name != "embed.weight"}
        assert restored == {f"{unit}.up.weight" for unit in family.order.units[:n]}
        assert family.shares[n] == pytest.approx(n / N_LAYERS)


def test_a_tuned_model_that_keeps_enough_is_chosen_after_two_evaluations(lab: Lab) -> None:
    walk = lab.walk(lab.restoring(), 0.05)
    chosen = walk.run()
    assert chosen is not None
    assert chosen.spot.plan == TUNED.plan
    assert len(lab.desk.found) == 2


def test_nothing_is_chosen_where_nothing_keeps_enough_and_any_gain(lab: Lab) -> None:
    walk = lab.walk(lab.restoring(), 1.0)  # all blocks restored is the base: retention 1 and no gain
    assert walk.run() is None
    weak = lab.walk(lab.restoring(), 0.9, strengths=(0.1,))
    assert weak.run() is None
    assert len(weak.walked) - 1 <= 4


def test_a_gain_within_two_standard_errors_cannot_be_shared_out(tmp_path: Path) -> None:
    lab = Lab(tmp_path, noise=30.0)
    walk = lab.walk(PathFamily("wise-ft", lab.sources), 0.9)
    assert walk.run() is None
    assert "nothing sure" in str(walk.yardstick.gain.reason)
    assert math.isnan(walk.yardstick.gain.value)
    assert len(lab.desk.found) == 2  # and nothing was searched


def test_the_budget_ends_a_search_with_the_best_so_far(lab: Lab) -> None:
    walk = lab.walk(PathFamily("wise-ft", lab.sources), 0.6, n_evaluations=2)
    chosen = walk.run()
    assert walk.exhausted
    assert len(walk.walked) - 1 == 2
    assert chosen is not None
    assert chosen.spot.about["s"] == 0.75  # 0.683 is where it would have ended


def test_where_all_units_are_too_much_some_are_tried(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers that fit each other only when both are tuned or both are not: the whole set keeps less than a part."""
    plain = lab.judge.losses

    def odd(weights: Weights) -> tuple[float, float]:
        general, domain = plain(weights)
        first = weights["layers.0.up.weight"].equal(lab.base["layers.0.up.weight"])  # last in the order of drift
        return general + (
            50.0 if first and not weights["embed.weight"].equal(lab.base["embed.weight"]) else 0.0
        ), domain

    lab.tuned["embed.weight"] = lab.tuned["embed.weight"] + 1
    lab.desk.sources = lab.sources = live(lab.tuned, lab.base)
    lab.desk._open_bench = lambda: LiveBench(lab.sources)  # type: ignore[assignment,return-value]
    monkeypatch.setattr(lab.judge, "losses", odd)
    chosen = lab.walk(lab.restoring(), 0.7).run()
    assert chosen is not None
    assert 0 < len(chosen.spot.about["units"]) < N_LAYERS


def test_a_strength_between_the_grid_and_the_base_is_found(lab: Lab) -> None:
    """Only all units at full strength keep enough, which is the base itself and no gain: less is looked for."""
    chosen = lab.walk(lab.restoring(interp="lerp"), 0.995, strengths=(1.0, 0.1)).run()
    assert chosen is not None
    assert chosen.spot.about["q"] == 1.0  # without the least of the layers 0.990 would be kept
    least = wise_ft_strength(0.995)
    assert least <= chosen.spot.about["s"] <= least + 0.9 / 58 + 1e-4


# --- what is kept


def test_a_search_that_was_cut_off_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = Lab(tmp_path / "whole")
    wanted = whole.walk(whole.restoring(), 0.9).run()
    first = Lab(tmp_path / "cut", fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        first.walk(first.restoring(), 0.9).run()
    second = Lab(tmp_path / "cut")
    found = second.walk(second.restoring(), 0.9).run()
    assert found is not None
    assert wanted is not None
    assert found.spot == wanted.spot
    assert second.desk.n_fresh == whole.desk.n_fresh - 4
    assert second.desk.bill(["end", "walk"])["tokens"] == whole.desk.bill(["end", "walk"])["tokens"]
    again = Lab(tmp_path / "cut")
    again.walk(again.restoring(), 0.9).run()
    assert again.desk.n_fresh == 0


def test_a_damaged_measurement_is_made_again(lab: Lab, tmp_path: Path) -> None:
    before = lab.desk.measure(BASE, "end")
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text()[:50])
    other = Lab(tmp_path)
    after = other.desk.measure(BASE, "end")
    assert other.desk.n_fresh == 1
    assert np.array_equal(before.rows.value, after.rows.value)


# --- figures


def test_retention_gain_and_intervals_of_known_losses() -> None:
    quadratic = Quadratic({}, {})
    base, tuned = rows_of(2.0, 5.0), rows_of(4.0, 3.0)
    yardstick = Yardstick(benchmarks=quadratic.benchmarks, base=base, tuned=tuned)
    merged, same = yardstick.standings([rows_of(2.5, 3.5), base], keep=0.9)
    assert merged.general.value == pytest.approx(2.0 / 2.5)
    assert merged.domain.value == pytest.approx(0.75)
    assert merged.recovered == pytest.approx(0.75)
    # Every document is alike, so drawing them again changes nothing.
    assert (merged.general.low, merged.general.high) == pytest.approx((0.8, 0.8))
    assert merged.keeps == 0.0
    assert same.keeps == 1.0
    assert (same.general.value, same.domain.value) == (1.0, 0.0)
    assert merged.scores["old"]["bits_per_byte"] == pytest.approx(2.5 * 10 / 40 / math.log(2))


def test_documents_are_paired_so_noise_that_all_models_share_does_not_widen_the_interval() -> None:
    quadratic, hard = Quadratic({}, {}), np.random.default_rng(0).uniform(0.2, 5.0, 40)

    def scaled(general: float, domain: float) -> Rows:
        plain = rows_of(1.0, 1.0)
        return Rows(**{**vars(plain), "value": plain.value * hard * np.repeat([general, domain], 20)})

    yardstick = Yardstick(benchmarks=quadratic.benchmarks, base=scaled(2, 5), tuned=scaled(4, 3))
    (merged,) = yardstick.standings([scaled(2.5, 3.5)])
    assert (merged.general.low, merged.general.high) == pytest.approx((0.8, 0.8))
    assert (merged.domain.low, merged.domain.high) == pytest.approx((0.75, 0.75))


def test_accuracies_take_the_place_of_losses() -> None:
    sides = (
        Benchmark(name="arc", side="general", lower_is_better=False, chance=0.25),
        Benchmark(name="own", side="domain", lower_is_better=False),
    )

    def answers(arc: float, own: float) -> Rows:
        right = np.concatenate([np.arange(40) < 40 * arc, np.arange(40) < 40 * own])
        plain = rows_of(0, 0, n=40)
        return Rows(**{**vars(plain), "value": right.astype(float), "n_tokens": np.ones(80, dtype=np.int64)})

    yardstick = Yardstick(benchmarks=sides, base=answers(0.75, 0.2), tuned=answers(0.5, 0.8))
    (merged,) = yardstick.standings([answers(0.65, 0.65)])
    assert merged.general.value == pytest.approx((0.65 - 0.25) / (0.75 - 0.25))
    assert merged.domain.value == pytest.approx(0.75)
    assert merged.recovered == pytest.approx(0.6)
    assert merged.scores == {"arc": {"score": 0.65}, "own": {"score": 0.65}}
    worse = Yardstick(benchmarks=sides, base=answers(0.75, 0.8), tuned=answers(0.5, 0.2))
    assert "worse" in str(worse.gain.reason)


# --- controls and impacts


def test_controls_restore_as_much_and_uniform_is_as_far_away(lab: Lab) -> None:
    family = lab.restoring(interp="lerp")  # on straight lines distances are exact
    chosen = family.first(4, 0.7)
    spots = {spot.label: spot for spot in search.controls(family, chosen, lab.scores, lab.sources)}
    randoms = [tuple(spots[f"random {i}"].about["units"]) for i in (1, 2, 3)]
    assert len(set(randoms)) == 3
    for label in ("random 1", "random 2", "random 3", "bottom", "drift", "first", "last"):
        assert (spots[label].about["q"], spots[label].about["s"]) == (pytest.approx(4 / 12), 0.7)
    assert spots["first"].about["units"] == [f"layers.{i}" for i in range(4)]
    assert spots["drift"].plan == chosen.plan
    merged = merge_weights(chosen.plan, lab.sources)
    uniform = merge_weights(next(s.plan for name, s in spots.items() if name.startswith("uniform")), lab.sources)
    far = [sum(float((m[name] - w).norm()) for name, w in lab.tuned.items()) for m in (merged, uniform)]
    assert far[0] == pytest.approx(far[1], rel=1e-4)


def test_what_lies_outside_is_a_control_of_its_own(lab: Lab) -> None:
    dimensions = {name: weight.ndim for name, weight in lab.tuned.items()}
    chosen, label = lab.restoring().first(4, 0.7), "no units, embeddings"
    found = search.controls(lab.restoring(outside=True), chosen, lab.scores, lab.sources)
    (alone,) = [spot for spot in found if spot.label == label]
    moved = {name for name, n in dimensions.items() if alone.plan.action(name, n) != KEEP}
    assert moved == {name for name in dimensions if "layers." not in name} and moved
    assert label not in {spot.label for spot in search.controls(lab.restoring(), chosen, lab.scores, lab.sources)}


def test_uniform_is_as_far_as_any_other_method(lab: Lab) -> None:
    family = PathFamily("trim", lab.sources)
    chosen = family.spot(None, 0.5)
    (uniform,) = search.controls(family, chosen, lab.scores, lab.sources)
    far = []
    for plan in (chosen.plan, uniform.plan):
        merged = merge_weights(plan, lab.sources)
        far.append(sum(float((merged[name] - w).norm()) for name, w in lab.tuned.items()))
    assert far[0] == pytest.approx(far[1], rel=1e-4)


def test_impacts_are_those_of_the_quadratic_and_a_score_that_ranks_like_them_agrees(lab: Lab) -> None:
    walk, family = lab.walk(lab.restoring(), 0.9), lab.restoring()
    found = {impact.unit: impact for impact in search.impacts(lab.desk, family, walk.yardstick)}
    for layer in range(N_LAYERS):
        impact = found[f"layers.{layer}"]
        assert impact.general_gain == pytest.approx(FORGETS[layer], abs=1e-6)
        assert impact.domain_cost == pytest.approx(LEARNS[layer], abs=1e-6)
    rho = search.agreements(list(found.values()), lab.scores, family)["drift"].value
    values = [FORGETS[i] / (LEARNS[i] + 1e-3) for i in range(N_LAYERS)]
    names = [f"layers.{i}.up.weight" for i in range(N_LAYERS)]
    drifts = [float((lab.tuned[name] - lab.base[name]).norm() / lab.base[name].norm()) for name in names]
    a, b = (np.argsort(np.argsort(one)) for one in (values, drifts))
    assert rho == pytest.approx(1 - 6 * float(((a - b) ** 2).sum()) / (N_LAYERS * (N_LAYERS**2 - 1)))


# --- families


def test_ends_of_every_path_are_the_models_and_the_middle_of_dg_hard_is_its_default(lab: Lab) -> None:
    for name in ("wise-ft", "slerp", "dg-hard", "trim", "dare", "breadcrumbs"):
        family = PathFamily(name, lab.sources)
        assert family.spot(None, 0.0).plan == TUNED.plan
        assert family.spot(None, 1.0).plan == BASE.plan
        for wrong in ({"q": 0.5, "s": 0.5}, {"q": None, "s": 1.5}):
            with pytest.raises(ClbenchError):
                family.spot(**wrong)  # type: ignore[arg-type]
    assert PathFamily("dg-hard", lab.sources).spot(None, 0.5).plan.default.options == {"scale": 1.0}
    with pytest.raises(ClbenchError, match="--moments"):
        PathFamily("graft", lab.sources)


@pytest.mark.parametrize("s", [0.4, 1.0])
def test_a_unit_whose_path_stands_inside_another_name_does_not_take_that_along(s: float) -> None:
    dimensions = {"layers.1.w": 2, "layers.10.w": 2, "vision.layers.1.w": 2, "layers.1.norm": 1, "embed": 2}
    units = ("layers.1", "layers.10", "vision.layers.1")
    order = Ordering(units=units, sizes=dict.fromkeys(units, 1), scores={})
    plan = Restoring(order, dimensions).plan(["layers.1"], s)
    moved = {name for name, n in dimensions.items() if plan.action(name, n) != KEEP}
    assert moved == {"layers.1.w", "layers.1.norm"}
    kinds: Mapping[str, str] = {name: plan.action(name, dimensions[name]).kernel for name in moved}
    assert kinds == (
        {"layers.1.w": "slerp", "layers.1.norm": "lerp"} if s < 1 else dict.fromkeys(moved, RESTORE.kernel)
    )
    wide = Restoring(order, dimensions, outside=True).plan(["layers.1"], s)
    assert {name for name, n in dimensions.items() if wide.action(name, n) != KEEP} == moved | {"embed"}


# --- texts


class Words:
    """A tokenizer that counts words."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * len(text.split())}


def test_texts_of_every_form(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("\n\n".join(f"paragraph {i} " + "word " * 100 for i in range(40)))
    cut = read_text(str(plain), "general")
    assert all(len(piece) >= 2000 for piece in cut.documents[:-1])
    assert "\n\n".join(cut.documents) == plain.read_text()
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(f'{{"body": "text {i}"}}\n' for i in range(9)))
    assert read_text(str(lines), "general", column="body").documents[8] == "text 8"
    table = tmp_path / "c.csv"
    table.write_text("id,text\n" + "".join(f'{i},"two\nlines {i}"\n' for i in range(9)))
    assert read_text(str(table), "domain").documents[0] == "two\nlines 0"
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.md").write_text(f"file {i}")
    assert read_text(str(folder), "domain").ids[0] == "0.md"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"one line", "1 documents"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.jsonl", b'{"text": 1}\n', "no text column"),
        ("a.jsonl", b'{"body": "x"}\n', "--text-column"),
        ("a.jsonl", b'{"text": \n', "line 1 is no JSON"),
        ("a.csv", b"id\n1\n", "no text column"),
    ],
)
def test_texts_that_are_refused(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClbenchError, match=match):
        read_text(str(tmp_path / name), "general")


def test_what_is_drawn_depends_on_ids_alone_and_ends_at_the_budget(tmp_path: Path) -> None:
    for n in (50, 200):
        (tmp_path / f"{n}.jsonl").write_text("".join(f'{{"text": "{"w " * 10}{i}"}}\n' for i in range(n)))
    tokenizer: Any = Words()
    small, large = (draw(read_text(str(tmp_path / f"{n}.jsonl"), "general"), tokenizer, 220) for n in (50, 200))
    assert len(small.ids) == len(large.ids) == 20
    assert small.n_tokens == 220
    assert small.ids == draw(read_text(str(tmp_path / "50.jsonl"), "domain"), tokenizer, 220).ids
    assert len(draw(read_text(str(tmp_path / "50.jsonl"), "general"), tokenizer, 1).ids) == 8  # enough for an interval
    assert small.ids != small.ids[:1] + [f"line {i}" for i in range(2, 21)]  # not the first ones


def test_what_a_search_tells_is_every_measurement_once(lab: Lab) -> None:
    told: list[Spot] = []
    lab.desk.tell = lambda one: told.append(one.spot)
    lab.walk(lab.restoring(), 0.9).run()
    assert len(told) == len(lab.desk.found)


# --- CheckFree: the blocks around in the place of the base


def test_checkfree_takes_the_nearest_blocks_that_are_not_restored_themselves(lab: Lab) -> None:
    family = lab.restoring()
    units = ["layers.0", "layers.4", "layers.5", f"layers.{N_LAYERS - 1}"]
    plan = family.checkfree(units, 1.0)
    assert plan is not None
    merged, tuned = merge_weights(plan, lab.sources), lab.tuned
    blocks = {0: (1, 1), 4: (3, 6), 5: (3, 6), N_LAYERS - 1: (N_LAYERS - 2, N_LAYERS - 2)}
    for layer in range(N_LAYERS):
        name = f"layers.{layer}.up.weight"
        low, high = (tuned[f"layers.{n}.up.weight"] for n in blocks.get(layer, (layer, layer)))
        torch.testing.assert_close(merged[name], (low + high) / 2)
    assert torch.equal(merged["embed.weight"], tuned["embed.weight"])
    assert family.checkfree(list(family.order.units), 1.0) is None  # nothing is left to take
    assert MergePlan.from_dict(plan.as_dict()) == plan
    with pytest.raises(ClbenchError, match=r"layers\.99"):
        merge_weights(MergePlan(KEEP, (Rule("layers.1", Action("neighbours", {"below": 99})),)), lab.sources)
    labels = [spot.label for spot in search.controls(family, family.first(4, 0.7), lab.scores, lab.sources)]
    assert "checkfree" in labels


# --- accuracies of a suite


QUESTIONS = '''
import numpy as np
from clbench.suite import Rows, Suite


class Quiz(Suite):
    """Sums: right where the model says so."""

    needs_stream = False

    def data_sha256(self):
        return "quiz"

    def measure(self, checkpoint):
        rows = []
        for group, n, share, chance in (("sums", 40, checkpoint.model.sums, 0.25), ("luck", 40, 0.5, 0.5)):
            for i in range(n):
                rows.append((f"{group}/{i}", "acc", float(i < n * share), group))
                rows.append((f"{group}/{i}", "chance", chance, group))
        ones = np.ones(len(rows), dtype=np.int64)
        return Rows(item=[r[0] for r in rows], stage=-ones, metric=[r[1] for r in rows],
                    value=np.array([r[2] for r in rows]), n_tokens=ones, n_bytes=ones,
                    group=[r[3] for r in rows], change=[""] * len(rows))

    def flops(self, checkpoint):
        return 7.0


class Losses(Quiz):
    def measure(self, checkpoint):
        rows = Quiz.measure(self, checkpoint)
        return Rows(**{**vars(rows), "metric": ["nll_nats"] * len(rows.item)})
'''


class Answering(Quadratic):
    """The quadratic judge beside a suite: a model also says how many sums it gets right."""

    def measure(self, checkpoint: Any) -> Rows:
        self.n += 1
        return rows_of(*checkpoint.losses)


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    file = tmp_path / "quiz.py"
    file.write_text(QUESTIONS)
    return file


def model(sums: float, general: float, domain: float) -> Any:
    return SimpleNamespace(model=SimpleNamespace(sums=sums), losses=(general, domain))


def test_a_suites_groups_are_benchmarks_beside_losses_and_what_the_base_cannot_is_left_out(quiz: Path) -> None:
    joint = JointJudge([Answering({}, {}), SuiteJudge(f"{quiz}:Quiz")])
    raw = [joint.measure(model(*one)) for one in ((0.85, 2.0, 5.0), (0.55, 4.0, 3.0), (0.7, 2.5, 3.5))]
    benchmarks, base = joint.read(raw[0])
    assert [(b.name, b.side, b.lower_is_better, b.chance) for b in benchmarks] == [
        ("old", "general", True, 0.0),
        ("new", "domain", True, 0.0),
        ("sums", "general", False, 0.25),
        ("luck", "general", False, 0.5),
    ]
    assert [int((base.stage == c).sum()) for c in range(4)] == [20, 20, 40, 40]
    items = [joint.read(one)[1] for one in raw]
    yardstick = Yardstick(benchmarks=benchmarks, base=items[0], tuned=items[1])
    assert list(yardstick.left_out) == ["luck"]
    wanted = (2.0 / 2.5 + (0.7 - 0.25) / (0.85 - 0.25)) / 2
    assert yardstick.retention(items[2]) == pytest.approx(wanted)
    (merged,) = yardstick.standings(items[2:])
    assert merged.general.value == pytest.approx(wanted)
    assert merged.domain.value == pytest.approx(0.75)  # the domain side has no questions
    assert merged.recovered == pytest.approx((1.5 / 2 + 0.15 / 0.3) / 2)
    assert merged.scores["sums"] == {"score": pytest.approx(0.7)}
    assert yardstick.losses(items[2]) == (pytest.approx(2.5), pytest.approx(3.5))  # nats and shares do not mix
    assert joint.cost(model(0, 0, 0)) == (400, 1e6 + 7.0)


def test_measurements_of_a_suite_are_kept_with_what_says_its_chance(quiz: Path, lab: Lab, tmp_path: Path) -> None:
    bench: Any = SimpleNamespace(holding=lambda plan: nullcontext(model(0.85 if plan == BASE.plan else 0.5, 2.0, 5.0)))

    def desk() -> Desk:
        judge = JointJudge([Answering({}, {}), SuiteJudge(f"{quiz}:Quiz")])
        return Desk(lab.sources, judge, lambda: bench, address="quiz", folder=tmp_path / "kept")

    first, second = desk(), desk()
    fresh, kept = first.measure(BASE, "end"), second.measure(BASE, "end")
    assert (first.n_fresh, second.n_fresh) == (1, 0)
    assert second.benchmarks == first.benchmarks
    assert kept.rows.item == fresh.rows.item
    assert np.array_equal(kept.rows.stage, fresh.rows.stage)


def test_suites_that_answer_no_questions_are_refused(quiz: Path) -> None:
    judge = SuiteJudge(f"{quiz}:Losses")
    with pytest.raises(ClbenchError, match="metric acc"):
        judge.read(judge.measure(model(0.5, 0, 0)))
    with pytest.raises(ClbenchError, match="name a stream"):
        SuiteJudge("heldout")
    twice = JointJudge([SuiteJudge(f"{quiz}:Quiz"), SuiteJudge(f"{quiz}:Quiz")])
    with pytest.raises(ClbenchError, match="two benchmarks"):
        twice.read(twice.measure(model(0.5, 0, 0)))
    alone = SuiteJudge(f"{quiz}:Quiz")
    benchmarks, base = alone.read(alone.measure(model(0.25, 0, 0)))
    own = Benchmark(name="own", side="domain", lower_is_better=False)
    with pytest.raises(ClbenchError, match="no general benchmark is left"):
        Yardstick(benchmarks=(*benchmarks, own), base=with_own(base), tuned=with_own(base))


def with_own(rows: Rows) -> Rows:
    """A domain benchmark of as many questions."""
    own = Rows(**{**vars(rows), "stage": np.full(len(rows.item), 2)})
    return Rows.joined([rows, own])
