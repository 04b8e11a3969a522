"""Plans: whole name parts, the first rule, round trips, and mergekit's substring filters."""

from __future__ import annotations

import json

import pytest
import yaml

from clbench.errors import ConfigError
from clbench.merge.plan import KEEP, RESTORE, Action, MergePlan, Rule, filters, selects, to_mergekit_yaml

DIMENSIONS = {"model.embed_tokens.weight": 2, "model.norm.weight": 1} | {
    f"model.layers.{i}.{part}": n
    for i in range(21)
    for part, n in (("mlp.up_proj.weight", 2), ("self_attn.q_proj.weight", 2), ("norm.weight", 1))
}
SLERP, LERP = Action("slerp", {"s": 0.7}), Action("lerp", {"s": 0.7})


@pytest.mark.parametrize(
    ("selector", "name", "wanted"),
    [
        ("layers.1", "model.layers.1.mlp.weight", True),
        ("layers.1", "model.layers.10.mlp.weight", False),
        ("layers.1", "model.sublayers.1.mlp.weight", False),
        ("layers.*.mlp", "model.layers.10.mlp.weight", True),
        ("layers.*.mlp", "model.layers.10.attn.mlp.weight", False),
        ("norm.weight", "model.layers.1.norm.weight", True),
        ("=norm.weight", "model.norm.weight", False),
        ("=model.norm.weight", "model.norm.weight", True),
        ("*", "a", True),
        ("a.b.c.d", "a.b", False),
        ("weight.model", "model.weight", False),
    ],
)
def test_selectors_match_whole_parts(selector: str, name: str, wanted: bool) -> None:
    assert selects(selector, name) is wanted


def test_the_first_rule_counts_and_the_default_does_elsewhere() -> None:
    plan = MergePlan(KEEP, (Rule("layers.1.norm", RESTORE), Rule("layers.1", SLERP, "matrices"), Rule("norm", LERP)))
    actions = plan.actions(DIMENSIONS)
    assert actions["model.layers.1.norm.weight"] == RESTORE
    assert actions["model.layers.1.mlp.up_proj.weight"] == SLERP
    assert actions["model.layers.11.mlp.up_proj.weight"] == KEEP
    assert actions["model.norm.weight"] == LERP
    assert plan.action("model.layers.1.b", 1) == KEEP


def test_plans_go_through_json_and_have_one_digest() -> None:
    plan = MergePlan(RESTORE, (Rule("layers.1", SLERP, "matrices"), Rule("*", Action("ties", {"density": 0.2}))))
    again = MergePlan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert again == plan and again.sha256 == plan.sha256
    assert MergePlan(KEEP, plan.rules).sha256 != plan.sha256
    assert MergePlan(RESTORE, plan.rules[::-1]).sha256 != plan.sha256


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ("slurp", {"s": 0.5}, "did you mean 'slerp'"),
        ("slerp", {"t": 0.5}, "no option 't'"),
        ("slerp", {}, "needs the option s"),
        ("slerp", {"s": 1.5}, "out of range"),
        ("slerp", {"s": float("nan")}, "out of range"),
        ("slerp", {"s": True}, "wrong type"),
        ("slerp", {"s": "0.5"}, "wrong type"),
        ("ties", {"density": 0.5, "weights": [1, "a"]}, "out of range"),
        ("ties", {"density": 0.5, "normalize": 1}, "wrong type"),
        ("graft", {}, "threshold or a density"),
        ("graft", {"density": 0.5, "threshold": 1e-9}, "threshold or a density"),
    ],
)
def test_actions_that_no_kernel_takes_are_refused(kernel: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Action(kernel, options)


def test_rules_that_select_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.99"):
        MergePlan(KEEP, (Rule("layers.99", SLERP),)).actions(DIMENSIONS)
    with pytest.raises(ConfigError, match="empty part"):
        Rule("layers..1", SLERP)
    with pytest.raises(ConfigError, match="unknown"):
        Rule("layers", SLERP, "tensors")  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{}, [], None, {"format": 2}, {"format": 1, "default": {}, "rules": []}])
def test_what_is_no_plan_is_refused(values: object) -> None:
    with pytest.raises(ConfigError, match="merge plan"):
        MergePlan.from_dict(values)


# --- mergekit ---


def by_mergekits_rule(entries: object, name: str) -> float:
    """First filter that is a substring of the name."""
    if not isinstance(entries, list):
        return float(entries)  # type: ignore[arg-type]
    return next(float(entry["value"]) for entry in entries if "filter" not in entry or entry["filter"] in name)


def test_the_export_gives_every_tensor_its_t() -> None:
    plan = MergePlan(KEEP, (Rule("layers.1", SLERP), Rule("layers.7.mlp", RESTORE), Rule("=model.norm.weight", SLERP)))
    config = yaml.safe_load(to_mergekit_yaml(plan, DIMENSIONS, tuned="T", base="B"))
    assert (config["merge_method"], config["base_model"]) == ("slerp", "T")
    strengths = {"keep": 0.0, "slerp": 0.7, "restore": 1.0}
    for name, action in plan.actions(DIMENSIONS).items():
        assert by_mergekits_rule(config["parameters"]["t"], name) == strengths[action.kernel]
    assert len(config["parameters"]["t"]) == 4


def test_filters_shield_what_a_longer_name_would_catch() -> None:
    values = {"norm.weight": 1.0, "model.norm.weight": 0.0, "model.layers.0.weight": 0.0}
    entries = filters(values)
    assert all(by_mergekits_rule(entries, name) == value for name, value in values.items())


def test_what_mergekit_cannot_do_is_refused() -> None:
    both = MergePlan(KEEP, (Rule("layers.1", SLERP, "matrices"), Rule("layers.1", LERP, "vectors")))
    with pytest.raises(ConfigError, match="lerp and slerp"):
        to_mergekit_yaml(both, DIMENSIONS, tuned="T", base="B")
    assert "slerp" in to_mergekit_yaml(both, DIMENSIONS, tuned="T", base="B", lerp_as_slerp=True)
    for action in (Action("dg_hard"), Action("dare", {"density": 0.5, "seed": 0})):
        with pytest.raises(ConfigError, match="mergekit has no"):
            to_mergekit_yaml(MergePlan(action), DIMENSIONS, tuned="T", base="B")
    with pytest.raises(ConfigError, match="beside other actions"):
        partly = MergePlan(KEEP, (Rule("layers.1", Action("ties", {"density": 0.5})),))
        to_mergekit_yaml(partly, DIMENSIONS, tuned="T", base="B")
