"""Arms compared: what is refused, closed forms of slopes and effect sizes, and the junk paper's own numbers."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from clbench.errors import ConfigError
from clbench.results.arms import ALL, OTHER, ArmComparison, Contrast, compare_arms, paired_g, slope_interval, spearman
from clbench.results.store import RunStore
from clbench.seeds import generator
from tests.arm_runs import write_arm

BASE = {"docs": 3.0, "junk": 5.0, "control": 4.0}
CONTROL = {"docs": 3.2, "junk": 4.5, "control": 3.0}
JUNK = {"docs": 3.7, "junk": 3.5, "control": 3.9}


def two_arms(folder: Path, *, seeds: tuple[int, ...] = (0,), junk: dict[str, Any] | None = None) -> list[RunStore]:
    """Control and junk, with what of the junk arm is another."""
    more = junk or {}
    return [
        write_arm(
            folder / f"{name}-{seed}", name, seed=seed, loss=loss, base=BASE, **({} if name == "control" else more)
        )
        for name, loss in (("control", CONTROL), ("junk", JUNK))
        for seed in seeds
    ]


def compared(runs: list[RunStore], *differ: str, **options: Any) -> ArmComparison:
    return compare_arms(runs, differ, n_resamples=200, **options)


def contrast(found: ArmComparison, what: str, group: str, period: int | None = None) -> Contrast:
    [one] = [c for c in found.contrasts if (c.what, c.group, c.period) == (what, group, period)]
    return one


def test_junk_minus_control_and_control_minus_base_come_together(tmp_path: Path) -> None:
    found = compared(two_arms(tmp_path))
    for period in (None, 0, 1):
        for group in BASE:
            junk = contrast(found, "junk - control", group, period)
            assert junk.over_documents.value == pytest.approx(JUNK[group] - CONTROL[group])
            base = contrast(found, "control - base", group, period)
            assert base.over_documents.value == pytest.approx(CONTROL[group] - BASE[group])
    assert len(found.contrasts) == 2 * 3 * 4  # contrasts x periods (0, 1, both) x groups (three and all)
    assert found.n_documents == 180
    assert found.control == "control"


def test_groups_can_stand_apart_from_all_other_text(tmp_path: Path) -> None:
    found = compared(two_arms(tmp_path), apart=["junk"])
    assert {c.group for c in found.contrasts} == {ALL, "junk", OTHER}
    other = contrast(found, "junk - control", OTHER).over_documents.value
    one, two = (
        contrast(compared(two_arms(tmp_path)), "junk - control", g).over_documents.value for g in ("docs", "control")
    )
    assert min(one, two) < other < max(one, two)


@pytest.mark.parametrize(
    ("quantity", "bill", "shown"),
    [
        ("tokens", {"tokens": {"1": {"1": 1001}}}, "tokens (control 1,000, junk 1,001)"),
        ("rows", {"rows": {"1": 180}}, "rows (control 160, junk 180)"),
        ("steps", {"steps": {"1": 57}}, "steps (control 10, junk 57)"),
        ("learning_rate_sum", {"learning_rate_sum": {"1": 0.0512}}, "learning_rate_sum (control 0.05, junk 0.0512)"),
        ("rows", {"rows": None}, "rows (control 160, junk unknown)"),
    ],
)
def test_arms_that_were_not_shown_as_much_are_refused(
    tmp_path: Path, quantity: str, bill: dict[str, Any], shown: str
) -> None:
    runs = two_arms(tmp_path, junk={"bill": bill})
    with pytest.raises(ConfigError, match=re.escape(f"the arms differ in {shown}; ")) as refused:
        compared(runs)
    assert f"--differ {quantity}" in str(refused.value)
    for other in {"tokens", "rows", "steps"} - {quantity}:
        with pytest.raises(ConfigError, match="the arms differ in"):
            compared(runs, other)
    assert set(compared(runs, quantity).unmatched) == {quantity}


def test_all_unmatched_quantities_are_named_at_once(tmp_path: Path) -> None:
    bill = {"rows": {"1": 900}, "steps": {"1": 57}, "learning_rate_sum": {"1": 0.3}}
    runs = two_arms(tmp_path, junk={"bill": bill})
    with pytest.raises(ConfigError, match=re.escape("--differ rows,steps,learning_rate_sum")):
        compared(runs)
    with pytest.raises(ConfigError, match="the arms differ in steps"):
        compared(runs, "rows", "learning_rate_sum")
    assert set(compared(runs, "rows", "steps", "learning_rate_sum").unmatched) == {"rows", "steps", "learning_rate_sum"}


def test_quantities_are_compared_stage_by_stage(tmp_path: Path) -> None:
    """Totals agree, stages do not."""
    runs = []
    for name, by_stage in (("control", (500, 1500)), ("junk", (1000, 1000))):
        tokens = {"tokens": {str(k): {str(k): n} for k, n in enumerate(by_stage, 1)}}
        run = write_arm(tmp_path / name, name, loss=CONTROL, base=BASE, bill=tokens)
        run.write_rows("heldout", 2, run.rows("heldout", 1))
        run.write_stage_record({**run.stage_record(1), "stage": 2})
        runs.append(run)
    with pytest.raises(ConfigError, match=re.escape("tokens (control 2,000, junk 2,000)")):
        compared(runs)


def test_one_row_more_or_less_is_matched(tmp_path: Path) -> None:
    assert not compared(two_arms(tmp_path, junk={"bill": {"rows": {"1": 161}}})).unmatched


@pytest.mark.parametrize(
    ("what", "junk"),
    [("base", {"base_sha256": "c" * 64}), ("settings", {"training": {"learning_rate": 0.02}})],
)
def test_another_base_or_other_settings_are_refused_unless_named(
    tmp_path: Path, what: str, junk: dict[str, Any]
) -> None:
    runs = two_arms(tmp_path, junk=junk)
    with pytest.raises(ConfigError, match=f"differ in {what}"):
        compared(runs)
    assert set(compared(runs, what).unmatched) == {what}


def test_batching_alone_is_no_other_setting(tmp_path: Path) -> None:
    assert not compared(two_arms(tmp_path, junk={"training": {"batching": "rows", "n_steps_per_stage": 7}})).unmatched


def test_documents_that_not_all_arms_have_are_left_out_and_counted(tmp_path: Path) -> None:
    found = compared(two_arms(tmp_path, junk={"drop": 2}))
    assert (found.n_documents, found.n_left_out) == (168, 12)
    assert contrast(found, "junk - control", "docs").over_documents.value == pytest.approx(0.5)


def test_seeds_give_a_paired_t_and_documents_their_own_interval(tmp_path: Path) -> None:
    shifts = [0.0, 0.05, -0.02, 0.09]
    runs = []
    for seed, shift in enumerate(shifts):
        for name, loss in (("control", CONTROL), ("junk", {k: v + shift for k, v in JUNK.items()})):
            runs.append(write_arm(tmp_path / f"{name}{seed}", name, seed=seed, loss=loss, base=BASE, noise=0.5))
    found = contrast(compared(runs), "junk - control", "docs")
    expected = scipy_stats.ttest_1samp([0.5 + s for s in shifts], 0.0)
    interval = expected.confidence_interval(0.95)
    assert found.over_seeds.value == pytest.approx(0.53)
    assert (found.over_seeds.low, found.over_seeds.high) == pytest.approx((interval.low, interval.high))
    assert found.over_seeds.p == pytest.approx(expected.pvalue)
    # Every document differs by as much, so resampling them changes nothing.
    assert (found.over_documents.low, found.over_documents.high) == pytest.approx((0.53, 0.53))
    d = np.array(shifts) + 0.5
    assert found.effects["paper"].value == pytest.approx(4 / 7 * d.mean() / d.std(ddof=1))
    assert found.effects["paired"].value == pytest.approx(8 / 11 * d.mean() / d.std(ddof=1))


def test_one_seed_has_no_interval_over_seeds(tmp_path: Path) -> None:
    found = contrast(compared(two_arms(tmp_path)), "junk - control", "docs")
    assert math.isnan(found.over_seeds.low)
    assert "one seed" in str(found.over_seeds.reason)
    assert math.isnan(found.effects["paired"].value)


def test_slope_over_doses(tmp_path: Path) -> None:
    """Losses on a line: 3.2 + 0.5 r on docs, falling on junk."""
    runs, doses = [], {}
    for dose in (0.0, 0.2, 0.5, 0.8, 1.0):
        name = f"dose-{dose}"
        doses[name] = dose
        loss = {"docs": 3.2 + 0.5 * dose, "junk": 4.5 - dose, "control": 3.0}
        runs.append(write_arm(tmp_path / name, name, loss=loss, base=BASE, noise=0.3))
    found = compared(runs[::-1], doses=doses)
    assert found.control == "dose-0.0"
    slopes = {slope.group: slope for slope in found.slopes}
    assert slopes["docs"].over_documents.value == pytest.approx(0.5)
    assert slopes["docs"].over_runs.value == pytest.approx(0.5)
    assert slopes["junk"].over_documents.value == pytest.approx(-1.0)
    assert (slopes["docs"].spearman, slopes["junk"].spearman) == pytest.approx((1.0, -1.0))
    assert math.isnan(slopes["control"].spearman)
    assert slopes["docs"].n_doses == 5


def test_two_doses_have_no_slope(tmp_path: Path) -> None:
    assert not compared(two_arms(tmp_path), doses={"control": 0.0, "junk": 1.0}).slopes


def test_slope_interval_is_that_of_ordinary_least_squares() -> None:
    rng = generator(3, "slope")
    x = np.repeat([0.0, 0.2, 0.5, 0.8, 1.0], 3)
    y = 3 + 0.4 * x + 0.1 * rng.standard_normal(15)
    found, expected = slope_interval(x, y), scipy_stats.linregress(x, y)
    half = scipy_stats.t.ppf(0.975, 13) * expected.stderr
    assert (found.value, found.p) == pytest.approx((expected.slope, expected.pvalue))
    assert (found.low, found.high) == pytest.approx((expected.slope - half, expected.slope + half))


def test_spearman_with_ties() -> None:
    x, y = [0, 0.2, 0.5, 0.5, 1.0], [3.0, 3.5, 3.1, 3.5, 3.9]
    assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize(
    ("differences", "paper", "paired"),
    [
        ([1.0, 2.0, 3.0, 4.0], 4 / 7 * 2.5 / math.sqrt(5 / 3), 8 / 11 * 2.5 / math.sqrt(5 / 3)),
        ([1.0, -1.0, 1.0, -1.0], 0.0, 0.0),
        ([2.0, 2.0, 2.0, 2.0, 7.0], 8 / 11 * 3 / math.sqrt(5), 12 / 15 * 3 / math.sqrt(5)),
    ],
)
def test_both_paired_g_in_closed_form(differences: list[float], paper: float, paired: float) -> None:
    found = paired_g(np.array(differences) + 50, np.full(len(differences), 50.0))
    assert found["paper"].value == pytest.approx(paper)
    assert found["paired"].value == pytest.approx(paired)


def test_paired_g_is_undefined_where_its_factor_is() -> None:
    three = paired_g([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    assert math.isnan(three["paper"].value)  # 1 - 3 / (12 - 9) = 0
    assert three["paired"].value == pytest.approx((1 - 3 / 7) * (7 / 3) / np.std([1, 2, 4], ddof=1))
    assert "no variance" in str(paired_g([1.0] * 4, [0.0] * 4)["paper"].reason)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"differ": ["stepz"]}, "no quantity 'stepz'.*did you mean 'steps'"),
        ({"control": "contrl"}, "did you mean 'control'"),
    ],
)
def test_names_are_checked(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        compare_arms(two_arms(tmp_path), n_resamples=10, **change)


def test_what_is_no_set_of_arms_is_refused(tmp_path: Path) -> None:
    runs = two_arms(tmp_path)
    with pytest.raises(ConfigError, match="1 arm cannot be compared"):
        compared(runs[:1])
    with pytest.raises(ConfigError, match="comes twice"):
        compared([*runs, RunStore(runs[0].folder)])
    runs[1].write_status("running")
    with pytest.raises(ConfigError, match="the run is running"):
        compared(runs)


def test_the_result_is_json(tmp_path: Path) -> None:
    text = json.dumps(compared(two_arms(tmp_path)).as_dict(), allow_nan=False)
    assert json.loads(text)["arms"][1]["exposure"]["steps"] == {"1": 10.0}


PAPER = {
    "ARC-Easy acc": (-0.61, -0.48),
    "ARC-Challenge acc": (-0.71, -0.69),
    "ARC-Challenge CoT acc": (-0.84, -0.45),
    "RULER overall": (-0.64, -0.51),
    "AdvBench risk (lower better)": (0.74, 0.09),
    "HH-RLHF risk (lower better)": (1.01, 0.42),
    "TRAIT Agreeableness": (-0.63, 0.71),
    "TRAIT Extraversion": (0.40, 0.75),
    "TRAIT Openness": (-0.07, 0.48),
    "TRAIT Conscientiousness": (-0.34, 0.04),
    "TRAIT Narcissism": (0.56, -0.10),
    "TRAIT Psychopathy": (0.39, 0.30),
    "TRAIT Machiavellianism": (0.29, -0.17),
    "TRAIT Neuroticism": (-0.19, -0.19),
}
"""Hedges' g of 100 % against 0 % junk over four models, M1 and M2, as the junk paper's figure shows them."""


@pytest.mark.skipif("CLBENCH_SHARED_DATA" not in os.environ, reason="CLBENCH_SHARED_DATA names no folder")
def test_the_junk_papers_g_from_its_tables() -> None:
    path = Path(os.environ["CLBENCH_SHARED_DATA"]) / "brainrot_v2_tables_4to7.csv"
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] in PAPER]
    assert len(rows) == 4 * len(PAPER)
    for metric, expected in PAPER.items():
        for intervention, value in zip(("M1", "M2"), expected, strict=True):
            both = [
                [float(row[f"{intervention}_{dose}"]) for row in rows if row["metric"] == metric] for dose in (100, 0)
            ]
            assert round(paired_g(*both)["paper"].value, 2) == value
