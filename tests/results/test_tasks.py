"""Scores by task: closed forms, coverage by simulation, buckets by construction, the junk paper's effect size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats as reference

from clbench.results import tasks
from clbench.results.store import ROWS_SCHEMA
from clbench.results.tasks import Task, buckets, changes, difference, retention, score_of, tasks_of
from clbench.seeds import generator

FEW = 2000


def rows_of(*rows: tuple[str, str, str, float], n_bytes: int = 1, n_tokens: int = 1) -> pa.Table:
    """(group, item, metric, value) as measured rows."""
    columns = {
        "item": [item for _, item, _, _ in rows],
        "stage": [-1] * len(rows),
        "metric": [metric for _, _, metric, _ in rows],
        "value": [value for *_, value in rows],
        "n_tokens": [n_tokens] * len(rows),
        "n_bytes": [n_bytes] * len(rows),
        "group": [group for group, *_ in rows],
        "change": [""] * len(rows),
    }
    return pa.table(columns, schema=ROWS_SCHEMA)


def task(values: Any, *, name: str = "quiz", metric: str = "acc", chance: float = 0.25) -> Task:
    """One task with a value a question."""
    value = np.asarray(values, dtype=np.float64)
    items = tuple(f"q{place:05d}" for place in range(len(value)))
    return Task(name, metric, items, value, np.ones(len(value)), chance=chance)


def answers(n_right: int, n: int = 400, *, first: int = 0, name: str = "quiz") -> Task:
    """A task of which the questions from ``first`` on are right, so many of them."""
    value = np.zeros(n)
    value[first : first + n_right] = 1
    return task(value, name=name)


# reading rows


def test_the_primary_metric_is_chosen_by_rule() -> None:
    assert tasks.primary_metric(["acc", "acc_norm", "chance"]) == "acc_norm"
    assert tasks.primary_metric(["acc", "exact_match", "acc_norm"]) == "exact_match"
    assert tasks.primary_metric(["acc:b", "acc:a"]) == "acc:a"
    assert tasks.primary_metric(["nll_nats", "acc"]) == "acc"
    assert tasks.primary_metric(["zeal", "vanity", "chance"]) == "vanity"
    assert tasks.primary_metric(["chance"]) is None


def test_rows_become_tasks_with_their_chance() -> None:
    found = tasks_of(
        rows_of(
            *(("arc", f"q{i}", "acc", float(i < 3)) for i in range(4)),
            *(("arc", f"q{i}", "chance", 0.25 if i else 0.5) for i in range(4)),
            ("gsm", "g0", "exact_match", 1.0),
            ("mood", "m0", "vanity", 0.4),
        ),
        prefix="general/",
    )
    assert list(found) == ["general/arc", "general/gsm", "general/mood"]
    assert found["general/arc"].score == 0.75
    assert found["general/arc"].chance == pytest.approx((0.5 + 3 * 0.25) / 4)
    assert found["general/gsm"].chance == 0.0
    assert math.isnan(found["general/mood"].chance)
    assert [one.direction for one in found.values()] == ["higher", "higher", "either"]


def test_losses_are_bits_per_byte_and_versions_are_one_identity() -> None:
    rows = rows_of(("docs", "page", "nll_nats", 3.0), ("docs", "page@@2", "nll_nats", 5.0), n_bytes=10, n_tokens=2)
    found = tasks_of(rows)["docs"]
    assert found.n == 1
    assert found.score == pytest.approx(8.0 / (20 * math.log(2)))
    assert (found.unit, found.direction, found.is_binary) == ("bits per byte", "lower", False)


def test_a_group_without_a_name_gets_one() -> None:
    assert list(tasks_of(rows_of(("", "a", "acc", 1.0)), name="mine")) == ["mine"]


def test_what_has_no_value_has_no_score() -> None:
    found = score_of(task([1.0, math.nan, 0.0]))
    assert math.isnan(found.value)
    assert found.reason == "1 of 3 items have no value"
    assert score_of(task([])).reason == "no items"


def test_tasks_of_one_name_are_told_apart() -> None:
    quiz, other = answers(3), answers(4)
    found = tasks.together({"general": {"quiz": quiz, "a": quiz}, "mine": {"quiz": other}})
    assert {name: task.value.sum() for name, task in found.items()} == {"general-quiz": 3, "a": 3, "mine-quiz": 4}
    later = tasks.together({"general": {"quiz": quiz}}, {"general": ["quiz"], "mine": ["quiz"]})
    assert list(later) == ["general-quiz"], "one name at every stage"


# scores and differences


def test_wilson_against_scipy() -> None:
    for n_right, n in ((0, 10), (3, 10), (10, 10), (130, 400)):
        expected = reference.binomtest(n_right, n).proportion_ci(method="wilson")
        found = tasks.wilson(n_right, n)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_score_that_is_no_proportion_is_bootstrapped() -> None:
    values = np.linspace(0, 1, 400)
    found = score_of(task(values, metric="score"))
    assert found.kind == tasks.OVER_ITEMS
    half = 1.96 * values.std() / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.003)


def test_classes_are_the_bootstrap_over_items() -> None:
    """Mean and standard deviation of the resampled difference, in closed form: sd(d, ddof = 0) / sqrt(n)."""
    rng = generator(0, "classes")
    a, b = task(rng.integers(0, 2, 300)), task(rng.integers(0, 2, 300))
    drawn = tasks.resampled([a, b], n_resamples=20_000)
    change = b.value - a.value
    found = drawn[:, 1] - drawn[:, 0]
    assert found.mean() == pytest.approx(change.mean(), abs=0.002)
    assert found.std() == pytest.approx(change.std() / math.sqrt(300), rel=0.03)


def test_the_sign_test_is_mcnemars() -> None:
    before, after = answers(200), answers(200, first=12)  # 12 got worse, 12 better
    assert difference(before, after, n_resamples=FEW).interval.p == 1.0
    after = answers(186, first=2)  # questions 0, 1 and 188 to 199 got worse
    found = difference(before, after, n_resamples=FEW)
    assert found.value == pytest.approx(-14 / 400)
    assert found.interval.p == pytest.approx(2 * 0.5**14)
    assert found.test == tasks.EXACT
    changed = np.array([-1.0] * 14 + [0.0] * 386)
    assert found.effect == pytest.approx(changed.mean() / changed.std(ddof=1))
    assert found.error == pytest.approx(changed.std() / math.sqrt(400), rel=0.06)


def test_the_paired_interval_covers_as_it_says() -> None:
    """200 experiments of 150 questions with a known difference of -0.1: 95 % of the intervals hold it."""
    held = 0
    for place in range(200):
        rng = generator(place, "coverage")
        before = rng.random(150) < 0.7
        after = np.where(rng.random(150) < 0.2, rng.random(150) < 0.2, before)  # 0.8 * 0.7 + 0.2 * 0.2 = 0.6
        found = difference(task(before), task(after), n_resamples=1000).interval
        held += found.low <= -0.1 <= found.high
    assert 0.90 <= held / 200 <= 0.985


def test_only_common_items_are_compared() -> None:
    before, after = answers(30, 40), answers(20, 50)
    found = difference(before, after, n_resamples=FEW)
    assert (found.value, found.n_left_out) == (pytest.approx(-0.25), 10)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (answers(2, 4), answers(1, 4), "4 common items, too few"),
        (answers(5), task([1.0] * 400, metric="acc_norm"), "measured as acc before and as acc_norm after"),
        (answers(5, 10), task([math.nan] * 10), "10 of 10 items have no value"),
    ],
)
def test_what_cannot_be_compared_says_why(before: Task, after: Task, reason: str) -> None:
    found = difference(before, after)
    assert math.isnan(found.value)
    assert reason in str(found.interval.reason)
    assert changes({"quiz": before}, {"quiz": after})[0].state == "undecided"


def test_nothing_changed_is_nothing() -> None:
    found = changes({"quiz": answers(100)}, {"quiz": answers(100)}, n_resamples=FEW)[0]
    assert (found.state, found.difference.interval.p, found.difference.n_errors) == ("unchanged", 1.0, 0.0)


def test_holm_is_over_the_tasks_compared() -> None:
    """A p of 0.021 (10 against 2) is sure alone and not among three."""
    worse = answers(100)
    worse.value[:10] = 0
    worse.value[100:102] = 1
    sides = {"quiz": answers(100)}, {"quiz": worse}
    p = 2 * reference.binom.cdf(2, 12, 0.5)
    assert changes(*sides, n_resamples=FEW)[0].state == ("damaged" if p < 0.05 else "unchanged") == "damaged"
    more = {name: answers(100, name=name) for name in ("a", "b")}
    found = changes(sides[0] | more, sides[1] | more, n_resamples=FEW)
    assert found[0].p_holm == pytest.approx(3 * p)
    assert found[0].state == "unchanged"


def test_losses_get_worse_upwards() -> None:
    rng = generator(0, "losses")
    loss = rng.random(100) + 2
    before, after = (task(v, metric="nll_nats", chance=math.nan) for v in (loss, loss + 0.05 * rng.random(100)))
    found = changes({"quiz": before}, {"quiz": after}, n_resamples=FEW)[0]
    assert (found.state, found.unit, found.is_worse) == ("damaged", "bits per byte", True)
    assert tasks.sentence([found]).startswith("damaged on 1 of 1 task: quiz (+0.0")


def test_what_has_no_better_side_is_never_damaged() -> None:
    before, after = (answers(n) for n in (200, 100))
    sides = [{"quiz": task(one.value, metric="openness")} for one in (before, after)]
    found = changes(*sides, n_resamples=FEW)
    assert found[0].state == "changed"
    assert "changed on 1 that have no better side" in tasks.sentence(found)
    assert math.isnan(retention(*sides).plain.value)


def test_the_verdict_names_the_worst_first() -> None:
    before = {name: answers(200, name=name) for name in ("a", "b", "c", "d")}
    after = {"a": answers(180), "b": answers(100), "c": answers(260), "d": answers(200)}
    found = tasks.sentence(changes(before, after, n_resamples=FEW))
    assert found == "damaged on 2 of 4 tasks: b (-0.250), a (-0.050); improved on 1: c (+0.150)"


# effect sizes

JUNK_ARC = [(41.6, 46.2), (39.4, 40.3), (50.0, 51.5), (38.0, 45.0)]
"""Any four models: what matters is the formula."""


def test_the_papers_effect_size_beside_ordinary_ones() -> None:
    """Four tasks, differences d: paper 4/7 mean/sd, paired J(3) mean/sd, average J(3) mean/mean of SDs."""
    after, before = (np.array(side) / 100 for side in zip(*JUNK_ARC, strict=True))
    sides = []
    for scores in (before, after):
        sides.append({f"t{i}": answers(round(s * 1000), 1000, name=f"t{i}") for i, s in enumerate(scores)})
    found = tasks.effects(changes(*sides, n_resamples=200))
    d = after - before
    j3 = math.gamma(1.5) / (math.sqrt(1.5) * math.gamma(1.0))
    assert found["paper"].value == pytest.approx(4 / 7 * d.mean() / d.std(ddof=1))
    assert found["d_z"].value == pytest.approx(j3 * d.mean() / d.std(ddof=1))
    spread = (after.std(ddof=1) + before.std(ddof=1)) / 2
    assert found["d_av"].value == pytest.approx(j3 * d.mean() / spread)


def test_effects_need_tasks() -> None:
    found = tasks.effects(changes({"quiz": answers(10)}, {"quiz": answers(9)}, n_resamples=FEW))
    assert all(math.isnan(one.value) and one.reason for one in found.values())


# retention


def test_retention_in_closed_form() -> None:
    """0.8 -> 0.55 keeps 68.75 % plainly and 30/55 above a chance of 0.25; a loss of 2 -> 2.5 keeps 80 %."""
    base = {"quiz": answers(320), "docs": task([2.0] * 50, metric="nll_nats", chance=math.nan)}
    after = {"quiz": answers(220), "docs": task([2.5] * 50, metric="nll_nats", chance=math.nan)}
    found = retention(base, after)
    assert found.by_task["quiz"].plain == pytest.approx(0.6875)
    assert found.by_task["quiz"].corrected == pytest.approx(0.3 / 0.55)
    assert found.by_task["docs"].plain == found.by_task["docs"].corrected == pytest.approx(0.8)
    assert found.corrected.value == pytest.approx((0.3 / 0.55 + 0.8) / 2)
    assert found.corrected.low < found.corrected.value < found.corrected.high
    assert found.left_out == {}


def test_a_base_at_chance_has_nothing_to_retain() -> None:
    """25 % above 400 questions has a standard error of 2.2 points: 29 % is less than two of them above chance."""
    base = {"guess": answers(116, name="guess"), "quiz": answers(320)}
    after = {"guess": answers(60, name="guess"), "quiz": answers(320)}
    found = retention(base, after, n_resamples=FEW)
    assert math.isnan(found.by_task["guess"].corrected)
    assert "not 2 standard errors (0.023) above chance 0.250" in str(found.by_task["guess"].reason)
    assert found.by_task["guess"].plain == pytest.approx(60 / 116)
    assert (found.corrected.value, found.corrected.n) == (1.0, 1)
    assert list(found.left_out) == ["guess"]
    one_more = retention({"guess": answers(120, name="guess")}, {"guess": answers(120, name="guess")}, n_resamples=FEW)
    assert one_more.corrected.value == 1.0


def test_retention_without_chance_or_without_tasks() -> None:
    unknown = task(answers(320).value, chance=math.nan)
    found = retention({"quiz": unknown}, {"quiz": unknown}, n_resamples=FEW)
    assert found.plain.value == 1.0
    assert found.by_task["quiz"].reason == "chance is not known"
    assert found.corrected.reason == "no task has a base to retain anything of"
    assert found.as_dict()["corrected"]["value"] is None


def test_the_interval_of_retention_covers_as_it_says() -> None:
    """100 experiments: base 0.75, after 0.6 of the same questions, chance 0.25, so 0.7 is retained."""
    held = 0
    for place in range(100):
        rng = generator(place, "retention")
        base = rng.random(200) < 0.75
        after = base & (rng.random(200) < 0.8)
        found = retention({"quiz": task(base)}, {"quiz": task(after)}, n_resamples=1000).corrected
        held += found.low <= 0.7 <= found.high
    assert 0.88 <= held / 100 <= 1.0


# buckets


def test_every_bucket_by_construction() -> None:
    """(right answers of 400 under base, before and after) -> what training did, and the bucket."""
    cases = {
        "healed": ((300, 200, 280), "damaged", "healed"),
        "still bad": ((300, 200, 205), "damaged", "damaged"),
        "kept": ((200, 300, 295), "improved", "preserved"),
        "lost again": ((200, 300, 210), "improved", "damaged"),
        "calm": ((200, 201, 199), "unchanged", "undamaged"),
        "better": ((200, 201, 300), "unchanged", "undamaged"),
        "struck": ((200, 199, 120), "unchanged", "damaged"),
    }
    sides = [{name: answers(n[side], name=name) for name, (n, _, _) in cases.items()} for side in range(3)]
    found = {one.task: one for one in buckets(*sides, n_resamples=FEW)}
    assert {name: (one.first, one.bucket) for name, one in found.items()} == {
        name: (first, bucket) for name, (_, first, bucket) in cases.items()
    }
    assert found["healed"].undone == pytest.approx(0.8)
    assert math.isnan(found["kept"].undone)
    assert tasks.rates(list(found.values())) == {"healed": (1, 2), "preserved": (1, 2), "undamaged": (2, 3)}


def test_going_back_to_the_base_heals_and_preserves_nothing() -> None:
    """The trap that buckets are for: the base itself heals all damage and throws all gain away."""
    base = {"a": answers(300, name="a"), "b": answers(200, name="b")}
    tuned = {"a": answers(200, name="a"), "b": answers(300, name="b")}
    found = tasks.rates(buckets(base, tuned, base, n_resamples=FEW))
    assert found == {"healed": (1, 1), "preserved": (0, 1), "undamaged": (0, 0)}


def test_too_few_items_are_in_no_bucket() -> None:
    one = {"quiz": answers(2, 4)}
    found = buckets(one, one, one)
    assert [fate.bucket for fate in found] == ["undecided"]
    assert tasks.rates(found)["undamaged"] == (0, 0)
