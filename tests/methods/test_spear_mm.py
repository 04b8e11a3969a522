"""SPEAR-MM and the other merges of the release, on the real loop: what is restored is the base's, to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clbench import registry, seeds
from clbench.contract.lab import Lab, Trace
from clbench.errors import ClbenchError, ConfigError
from clbench.merge import kernels, select
from clbench.merge.scores import Scorer, block_number, unit_of
from clbench.method import Method, Need, Weights
from clbench.train.models import copy_weights, weights_of
from tests.engine import run_tiny

STAGES = (1, 2)


@pytest.fixture(scope="module")
def lab(clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("spear"))


@pytest.fixture(scope="module")
def plain(lab: Lab) -> Trace:
    """The same training without a merge: its releases are the trained weights."""
    return released(lab, "sequential")


def released(lab: Lab, *specs: str) -> Trace:
    return lab.train([make(spec) for spec in specs], n_stages=len(STAGES))


def make(spec: str) -> Method:
    return registry.make_method(spec).method


def base_of(lab: Lab) -> Weights:
    return copy_weights(weights_of(lab.base))


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def notes(trace: Trace, stage: int) -> dict[str, float]:
    (own,) = trace.ledger["notes"][str(stage)].values()
    return dict(own)


@pytest.mark.parametrize("towards", ["base", "previous"])
def test_conservative_restores_whole_layers_to_the_bit_and_training_goes_on_unmerged(
    lab: Lab, plain: Trace, towards: str
) -> None:
    merged = released(lab, f"spear-mm:policy=conservative,towards={towards}")
    for stage in STAGES:
        older = base_of(lab) if towards == "base" or stage == 1 else plain.releases[1]
        tuned, found = plain.releases[stage], merged.releases[stage]
        scores = Scorer().score((name, older[name], tuned[name]) for name in tuned)
        order = select.order_units(scores)
        chosen = order.top(0.5)
        assert 0 < len(chosen) < len(order.units)
        for name, tensor in found.items():
            restored = unit_of(name, "layer") in chosen
            assert same(tensor, (older if restored else tuned)[name]), name
        said = notes(merged, stage)
        assert {unit for unit in order.units if said[f"restored_{unit}"] == 1} == set(chosen)
        assert {unit: said[f"score_{unit}"] for unit in order.units} == order.scores
        above = [score.spectral.svdr > 0 for score in scores if score.spectral is not None]
        assert said["svdr_above_0"] == sum(above) / len(above) and len(above) == 14  # 7 matrices a block
        assert 0 < said["moved_from_tuned"] < 1 and 0 < said["distance_to_base"] < 1
        # Two parts at right angles: what was taken back, and what was not.
        assert said["moved_from_tuned"] ** 2 + said["distance_to_base"] ** 2 == pytest.approx(1)
    assert merged.ledger["flops"]["merge"] > 0 and merged.ledger["flops"]["train"] == plain.ledger["flops"]["train"]


class Here:
    """The context of one release beside the loop: the base, and what is noted and billed."""

    def __init__(self, base: Weights, seed: int = 0) -> None:
        self.base, self.noted, self.billed, self.root = base, dict[str, float](), 0.0, seed

    def base_weights(self) -> Weights:
        return {name: tensor.clone() for name, tensor in self.base.items()}

    def note(self, name: str, value: float) -> None:
        self.noted[name] = value

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        assert purpose == "merge"
        self.billed += flops

    def seed(self, *names: int | str) -> int:
        return seeds.derive(self.root, *names)


def merge(spec: str, tuned: Weights, base: Weights, seed: int = 0) -> tuple[Weights, Here]:
    here = Here(base, seed)
    before = copy_weights(tuned)
    found = make(spec).release(here, tuned)  # type: ignore[arg-type]
    assert all(same(before[name], tuned[name]) for name in tuned)  # inputs stay
    assert list(found) == list(tuned) and all(found[n].dtype == tuned[n].dtype for n in tuned)
    return found, here


MERGES = [
    "spear-mm:policy=free,q=1,s=0.3",
    "spear-mm:choose=uniform",
    "spear-mm:granularity=tensor,interp=lerp,embeddings=true",
    "wise-ft:alpha=0.3",
    "wise-ft:interp=slerp",
    "dg-hard",
    "intruder-reduction:factor=0",
    "task-vector",
    "task-vector:kind=breadcrumbs,scale=0.5",
    "task-vector:kind=dare",
]


@pytest.mark.parametrize("spec", MERGES)
def test_merging_a_model_with_itself_changes_nothing(lab: Lab, spec: str) -> None:
    base = base_of(lab)
    found, here = merge(spec, base, base)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, base[name], rtol=1e-6, atol=0)
    assert math.isnan(here.noted["moved_from_tuned"]) and here.billed > 0


@pytest.mark.parametrize(
    ("spec", "end"),
    [
        ("wise-ft:alpha=1", "tuned"),
        ("wise-ft:alpha=0", "base"),
        ("wise-ft:alpha=0,interp=slerp", "base"),
        ("spear-mm:q=0", "tuned"),
        ("spear-mm:s=0", "tuned"),
        ("spear-mm:policy=free,q=1,s=1,embeddings=true", "base"),
        ("dg-hard:scale=0", "tuned"),
        ("intruder-reduction:factor=1", "tuned"),
        ("intruder-reduction:epsilon=0", "tuned"),
        ("task-vector:density=1", "tuned"),
        ("task-vector:kind=dare,density=1", "tuned"),
        ("task-vector:kind=breadcrumbs,density=1", "tuned"),
        ("task-vector:density=0", "base"),
    ],
)
def test_ends_are_exact(lab: Lab, plain: Trace, spec: str, end: str) -> None:
    tuned, base = plain.releases[2], base_of(lab)
    found, _ = merge(spec, tuned, base)
    assert all(same(tensor, {"tuned": tuned, "base": base}[end][name]) for name, tensor in found.items())


def test_everything_restored_leaves_what_is_outside_the_blocks(lab: Lab, plain: Trace) -> None:
    tuned, base = plain.releases[2], base_of(lab)
    found, _ = merge("spear-mm:policy=free,q=1,s=1", tuned, base)
    for name, tensor in found.items():
        assert same(tensor, (tuned if unit_of(name, "layer") is None else base)[name])


def test_uniform_moves_as_far_as_the_selection_and_every_draw_as_it_says(lab: Lab, plain: Trace) -> None:
    tuned, base = plain.releases[2], base_of(lab)

    def mean_distance(spec: str) -> float:
        found, _ = merge(f"spear-mm:interp=lerp,{spec}", tuned, base)
        return sum(float((found[n].double() - base[n].double()).norm()) for n in found) / len(found)

    assert mean_distance("choose=uniform") == pytest.approx(mean_distance("choose=spear"), rel=1e-6)
    uniform, here = merge("spear-mm:choose=uniform", tuned, base)
    assert len({here.noted[name] for name in here.noted if name.startswith("restored_model")}) == 1
    assert all(not same(uniform[n], tuned[n]) for n in uniform if not same(tuned[n], base[n]))


@pytest.mark.parametrize("by", select.CHOICES)
def test_every_choice_restores_its_own_front_units(lab: Lab, plain: Trace, by: str) -> None:
    tuned, base = plain.releases[2], base_of(lab)
    found, here = merge(f"spear-mm:choose={by},s=1,q=0.4,granularity=tensor", tuned, base, seed=3)
    scores = Scorer().score((name, base[name], tuned[name]) for name in tuned)
    seed = here.seed("units", 0)
    top = set(select.order_units(scores, by=by, granularity="tensor", seed=seed).top(0.4))
    assert {unit_of(n, "tensor") for n in found if unit_of(n, "layer") and not same(found[n], tuned[n])} == top
    # Two-dimensional tensors of the blocks alone: norms belong to no matrix.
    assert all(same(found[n], tuned[n]) for n in found if "norm" in n)


def test_slerp_is_lerp_up_to_the_square_of_the_angle(lab: Lab, plain: Trace) -> None:
    """Where training is short both are the same formula; on a drift of 10 % they differ as theta / 8 of the change."""
    tuned, base = plain.releases[1], base_of(lab)
    for name in (n for n in tuned if tuned[n].ndim == 2):
        noise = torch.randn(base[name].shape, generator=torch.Generator().manual_seed(1))
        for drift in (0.01, 0.1):
            far = base[name] + drift * noise * (base[name].norm() / noise.norm())
            arc, line = (kernel(far, base[name], 0.5) for kernel in (kernels.slerp, kernels.lerp))
            apart = float((arc - line).norm() / (far - base[name]).norm())
            if drift == 0.01:
                assert apart == 0  # below mergekit's 0.0316 rad
            else:
                assert apart == pytest.approx(drift / 8, rel=0.3)


def test_task_vectors_keep_the_share_that_they_say(lab: Lab, plain: Trace) -> None:
    tuned, base = plain.releases[2], base_of(lab)
    name = max(tuned, key=lambda n: tuned[n].numel())
    change = (tuned[name] - base[name]).abs()
    for spec, share in (
        ("trim,density=0.3", 0.3),
        ("breadcrumbs,density=0.4,gamma=0.05", 0.4),
        ("dare,density=0.25", 0.25),
    ):
        found, _ = merge(f"task-vector:kind={spec}", tuned, base)
        kept = found[name] != base[name]
        assert float(kept.float().mean()) == pytest.approx(share * float((change > 0).float().mean()), abs=0.03), spec
        if spec.startswith("trim"):
            assert float(change[kept].min()) >= float(change[~kept].max())
        if spec.startswith("breadcrumbs"):
            assert float(change.max()) > float(change[kept].max())
    half, _ = merge("task-vector:density=1,scale=0.5", tuned, base)
    line, _ = merge("wise-ft:alpha=0.5", tuned, base)
    torch.testing.assert_close(half[name], line[name])


def test_dg_hard_undoes_noise_and_keeps_what_is_learnt(lab: Lab) -> None:
    """A change of rank 3 in the feed-forward matrices, under noise: the noise goes, the change stays."""
    base, generator = base_of(lab), torch.Generator().manual_seed(0)
    names = [n for n in base if "mlp" in n and base[n].ndim == 2]
    learnt = {
        n: 0.05
        * torch.randn(base[n].shape[0], 3, generator=generator)
        @ torch.randn(3, base[n].shape[1], generator=generator)
        for n in names
    }
    noise = {n: 0.002 * torch.randn(base[n].shape, generator=generator) for n in names}
    tuned = base | {n: base[n] + learnt[n] + noise[n] for n in names}
    found, _ = merge("dg-hard", tuned, base)
    for name in names:
        assert float((found[name] - base[name] - learnt[name]).norm()) < 0.5 * float(noise[name].norm())
    assert all(same(found[n], base[n]) for n in base if n not in names)


def test_adapters_are_merged_first_and_the_base_is_found_without_them(lab: Lab) -> None:
    pytest.importorskip("peft")
    merged, adapted = released(lab, "lora", "spear-mm:policy=free,q=1,s=1"), released(lab, "lora")
    base = base_of(lab)
    assert any(not same(adapted.releases[2][n], base[n]) for n in base)
    assert all(same(tensor, base[n]) for n, tensor in merged.releases[2].items() if unit_of(n, "layer"))
    for specs in (("spear-mm", "lora"), ("lora", "spear-mm:towards=previous")):
        with pytest.raises(ConfigError, match="put it last"):
            released(lab, *specs)


# --- freeze ---


def test_frozen_modules_stay_to_the_bit(lab: Lab, tmp_path: Path) -> None:
    file, base = tmp_path / "list.yaml", base_of(lab)
    select.write_freeze_list(file, select.freeze_list(list(base), ["model.layers.1"]))
    for spec, frozen in (
        ("freeze:modules=layers.0.mlp+norm", ("layers.0.mlp.", "model.norm.")),
        (f"freeze:file={file}", ("layers.1.",)),
    ):
        trace = released(lab, spec)
        for name, tensor in trace.releases[2].items():
            assert same(tensor, base[name]) == any(part in name for part in frozen), name


@pytest.mark.parametrize("modules", ["layers.9", "layer", "ayers.0", "model"])
def test_freeze_takes_whole_parts_of_names_and_leaves_something_to_train(lab: Lab, modules: str) -> None:
    with pytest.raises(ConfigError):
        released(lab, f"freeze:modules={modules}")


@pytest.mark.parametrize(
    "spec",
    [
        "spear-mm:policy=free",
        "spear-mm:policy=free,q=0.3",
        "spear-mm:policy=bold",
        "spear-mm:q=1.2",
        "spear-mm:s=-0.1",
        "spear-mm:choose=best",
        "spear-mm:mix=2",
        "spear-mm:granularity=head",
        "spear-mm:towards=next",
        "wise-ft:alpha=1.5",
        "wise-ft:interp=arc",
        "dg-hard:scale=-1",
        "intruder-reduction:factor=2",
        "intruder-reduction:top_k=0",
        "learned-alpha:mix=-1",
        "learned-alpha:steps=0",
        "task-vector:kind=ties",
        "task-vector:density=2",
        "freeze:file=nowhere.yaml",
    ],
)
def test_wrong_options_are_refused(lab: Lab, spec: str) -> None:
    with pytest.raises(ClbenchError):
        make(spec).attach(torch.nn.Linear(1, 1), 0)


def test_needs_are_those_that_are_used() -> None:
    assert make("spear-mm").needs == {Need.STAGE_BOUNDARIES, Need.BASE_WEIGHTS}
    assert make("spear-mm:towards=previous").needs == {Need.STAGE_BOUNDARIES}


def test_checkfree_fills_the_chosen_blocks_from_those_around_them(lab: Lab, plain: Trace) -> None:
    tuned, base = plain.releases[2], base_of(lab)
    found, _ = merge("spear-mm:choose=checkfree,q=0.4,s=1", tuned, base)
    scores = Scorer().score((name, base[name], tuned[name]) for name in tuned)
    chosen = select.order_units(scores).top(0.4)
    moved = {name for name in found if not same(found[name], tuned[name])}
    assert moved and {unit_of(name, "layer") for name in moved} <= set(chosen)
    for name in moved:
        near = select.surviving_neighbours(tuned, [n for n in tuned if unit_of(n, "layer") in chosen])[name]
        parts = [tuned[name.replace(f"layers.{block_number(name)}.", f"layers.{n}.")] for n in near.values()]
        torch.testing.assert_close(found[name], sum(parts) / len(parts))
    with pytest.raises(AssertionError):  # the base is not looked at
        assert any(same(found[name], base[name]) for name in moved)


def test_intruder_reduction_behind_lora_is_what_peft_does_to_it(lab: Lab) -> None:
    plain = released(lab, "lora:r=2,alpha=64")
    reduced = released(lab, "lora:r=2,alpha=64", "intruder-reduction:factor=0.5,epsilon=0.9,rank=2")
    base, n_moved = base_of(lab), 0
    for name, tuned in plain.releases[2].items():
        wanted = tuned
        if tuned.ndim == 2 and unit_of(name, "layer") is not None:
            wanted = kernels.reduce_intruders(tuned, base[name], factor=0.5, epsilon=0.9, rank=2)
            n_moved += not same(wanted, tuned)
        assert same(reduced.releases[2][name], wanted), name
    said = {key: value for own in reduced.ledger["notes"]["2"].values() for key, value in own.items()}
    assert said["intruders"] >= said["matrices_with_intruders"] == n_moved > 0


def test_learned_alpha_learns_on_training_text_and_releases_every_layer_on_its_own_place(
    lab: Lab, plain: Trace
) -> None:
    spec = "learned-alpha:steps=3,rows=1,learning_rate=0.5"
    found = released(lab, spec)
    base = base_of(lab)
    for stage in STAGES:
        said, tuned = notes(found, stage), plain.releases[stage]  # training itself is unchanged
        shares = {key.removeprefix("restored_"): value for key, value in said.items() if key.startswith("restored_")}
        assert len(set(shares.values())) > 1 and all(0 < share < 1 for share in shares.values())
        for name, tensor in found.releases[stage].items():
            share = shares[unit_of(name, "layer") or name]
            assert same(tensor, kernels.lerp(tuned[name], base[name], share)), name
        assert said["loss_after"] != said["loss_before"]
    assert found.ledger["flops"]["merge"] > plain.ledger["flops"].get("merge", 0.0)
    assert make(spec).needs >= {Need.PAST_DATA, Need.CURRENT_DATA, Need.BASE_WEIGHTS}
    with pytest.raises(ConfigError, match="adapters"):
        released(lab, "lora:r=2", spec)


def test_second_moments_lie_beside_every_release_and_change_nothing_else(clbench_home: Path, tmp_path: Path) -> None:
    whole = run_tiny(tmp_path / "full", place={"moments": "full"}).folder
    small = run_tiny(tmp_path / "rank1", place={"moments": "rank1"}).folder
    for stage in (1, 2, 3):
        release = Path("release") / f"stage-{stage:02d}"
        full, factors = (load_file(run / release / "moments.safetensors") for run in (whole, small))
        names = {key.partition("/")[2] for key in full}
        assert names == {name for name in load_file(whole / release / "model.safetensors") if "lm_head" not in name}
        for name in names:
            v = full[f"exp_avg_sq/{name}"]
            if v.ndim == 2:
                torch.testing.assert_close(factors[f"exp_avg_sq_row/{name}"], v.sum(1))
                torch.testing.assert_close(factors[f"exp_avg_sq_column/{name}"], v.sum(0))
            else:
                assert same(factors[f"exp_avg_sq/{name}"], v)
    last = load_file(sorted(whole.glob("checkpoints/003-*-1"))[-1] / "optimizer.safetensors")
    full = load_file(whole / "release" / "stage-03" / "moments.safetensors")
    assert all(same(tensor, last[key]) for key, tensor in full.items())
    assert all(key.startswith("exp_avg_sq/") for key in full)
    tuned = load_file(whole / "release" / "stage-03" / "model.safetensors")
    assert all(same(tensor, load_file(small / "release" / "stage-03" / "model.safetensors")[n])
               for n, tensor in tuned.items())  # fmt: skip


class Plain(Method):
    """Gradient descent, which keeps no second moments."""

    def make_optimizer(self, groups: Any, *, learning_rate: float, betas: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=learning_rate)


def test_moments_that_nobody_keeps_are_refused_before_anything_is_trained(clbench_home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SGD keeps no second moments"):
        run_tiny(tmp_path, [Plain()], place={"moments": "full"})
    assert not list(tmp_path.rglob("moments.safetensors"))
    with pytest.raises(ConfigError, match="those of adapters"):
        run_tiny(tmp_path, ["lora"], place={"moments": "full"})
    with pytest.raises(ConfigError, match="give full or rank1"):
        run_tiny(tmp_path, place={"moments": "svd"})
