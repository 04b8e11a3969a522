"""Scores by task from the rows of any suite: intervals, paired differences, retention, the four buckets. No torch.

A *task* is a group of rows of one suite (``arc_easy``, one package's documents). Its **primary metric** is the first of
``PREFERENCE`` that the group has, else its first metric in alphabetical order but ``chance``. A metric may carry a form
after a colon (``acc:plain``); of several forms the first in alphabetical order counts. Its score is the sum of values
over the sum of weights: ``n_tokens`` (1 for a question), for ``nll_nats`` ``ln 2 * n_bytes``, hence **bits per byte**,
which compare across tokenizers. Rows of one identity (versions of one item) are summed first: they are drawn together.

Everything here varies over *items* with fixed weights of the model: evaluation noise, not the noise of training.
Definitions for people: docs/health.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import special

from clbench.results.arms import paired_g
from clbench.results.matrix import Array, finite_or_none
from clbench.results.stats import LEVEL, Effect, Interval, bootstrap_interval, holm, paired_effects
from clbench.results.store import RunStore
from clbench.seeds import generator
from clbench.stream import identity_of

PREFERENCE = ("exact_match", "acc_norm", "acc", "score", "f1", "nll_nats")
"""Primary metrics, the first that a group has counts. ``acc_norm`` before ``acc``: where a suite gives it, answers
differ in length, and plain ``acc`` prefers the short ones."""
DIRECTION: dict[str, Direction] = {
    "exact_match": "higher",
    "acc_norm": "higher",
    "acc": "higher",
    "score": "higher",
    "f1": "higher",
    "nll_nats": "lower",
}
"""Of any other metric nobody knows here which way is better: such tasks change, and are never damaged."""
OPEN_ENDED = ("exact_match", "score", "f1")
"""Metrics of generated answers: nothing can be guessed, so chance is 0 where no row says otherwise."""
CHANCE = "chance"
OVER_ITEMS = "bootstrap over items (evaluation noise)"
WILSON = "Wilson score"
EXACT = "exact sign test"
N_RESAMPLES = 10_000
ALPHA = 1 - LEVEL
STANDARD_ERRORS = 2.0
"""A base that is not so many above chance has nothing to retain; a smaller difference is none."""
MIN_ITEMS = 5
"""With fewer items nothing is tested."""
CHUNK = 4_000_000
"""Counts that are drawn at once: 32 MB."""

Direction = Literal["higher", "lower", "either"]
State = Literal["damaged", "improved", "unchanged", "changed", "undecided"]
Bucket = Literal["healed", "preserved", "undamaged", "damaged", "undecided"]


@dataclass(frozen=True)
class Task:
    """The items of one task under one model, one entry an identity, sorted; ``n`` of them."""

    name: str
    metric: str
    """With its form."""
    item: tuple[str, ...]
    value: Array
    """Summed over the rows of an identity, ``[n]``."""
    weight: Array
    """What they are divided by, ``[n]``."""
    chance: float = math.nan
    """Mean score of guessing; NaN where it is not known or means nothing."""
    single: bool = True
    """Every identity is one row of weight 1, so that values of 0 and 1 are trials."""

    @property
    def n(self) -> int:
        """Number of identities."""
        return len(self.item)

    @property
    def direction(self) -> Direction:
        """Which way is better."""
        return DIRECTION.get(self.metric.partition(":")[0], "either")

    @property
    def unit(self) -> str:
        """What the score is, for people."""
        return "bits per byte" if self.metric.partition(":")[0] == "nll_nats" else self.metric

    @property
    def is_binary(self) -> bool:
        """Whether every item is right or wrong."""
        return self.single and bool(np.isin(self.value, (0.0, 1.0)).all())

    @property
    def score(self) -> float:
        """Sum of values over sum of weights; NaN without items, or where one has no value."""
        total = float(self.weight.sum())
        return float(self.value.sum()) / total if total > 0 else math.nan

    def why_undefined(self) -> str | None:
        """Return why there is no score; None where there is one."""
        if self.n == 0:
            return "no items"
        if bad := int((~np.isfinite(self.value)).sum()):
            return f"{bad} of {self.n} items have no value"
        return None if math.isfinite(self.score) else "the items hold no tokens or bytes"


def tasks_of(rows: pa.Table, *, name: str = "all", prefix: str = "") -> dict[str, Task]:
    """Return the tasks in measured rows, by name, in the order of their first rows.

    Args:
        rows: of one suite and checkpoint, schema ROWS_SCHEMA.
        name: of the task of rows without a group.
        prefix: goes before every name, to tell suites apart.
    """
    columns = {column: rows[column].to_pylist() for column in ("item", "stage", "metric", "group")}
    numbers = {column: rows[column].to_numpy() for column in ("value", "n_tokens", "n_bytes")}
    places: dict[str, dict[str, list[int]]] = {}
    for place, (group, metric) in enumerate(zip(columns["group"], columns["metric"], strict=True)):
        places.setdefault(group, {}).setdefault(metric, []).append(place)
    found = {}
    for group, by_metric in places.items():
        if (metric := primary_metric(by_metric)) is None:
            continue
        title = prefix + (group or name)
        task = _task(title, metric, by_metric[metric], columns["item"], numbers)
        chances = {m: p for m, p in by_metric.items() if m.partition(":")[0] == CHANCE}
        found[title] = replace(task, chance=_chance(metric, chances, numbers))
    return found


def primary_metric(metrics: Mapping[str, Any]) -> str | None:
    """Return the metric that a group is judged by; None where it has nothing but ``chance``."""
    names = sorted(name for name in metrics if name.partition(":")[0] != CHANCE)
    for wanted in PREFERENCE:
        for name in names:
            if name.partition(":")[0] == wanted:
                return name
    return names[0] if names else None


def _task(
    name: str, metric: str, places: Sequence[int], items: Sequence[str], numbers: Mapping[str, NDArray[Any]]
) -> Task:
    identities = [identity_of(items[place]) for place in places]
    names, at = np.unique(np.array(identities, dtype=np.str_), return_inverse=True)
    weights = numbers["n_bytes"] * math.log(2) if metric.partition(":")[0] == "nll_nats" else numbers["n_tokens"]
    value, weight = np.zeros(len(names)), np.zeros(len(names))
    np.add.at(value, at, numbers["value"][list(places)])
    np.add.at(weight, at, weights[list(places)])
    single = len(names) == len(places) and bool((weight == 1).all())
    return Task(name, metric, tuple(names.tolist()), value, weight, single=single)


def _chance(metric: str, chances: Mapping[str, list[int]], numbers: Mapping[str, NDArray[Any]]) -> float:
    """Return the mean score of guessing, of the same form where there are several."""
    base, _, form = metric.partition(":")
    if chances:
        places = chances.get(f"{CHANCE}:{form}") or chances[min(chances)]
        return float(numbers["value"][places].sum() / numbers["n_tokens"][places].sum())
    return 0.0 if base in OPEN_ENDED else math.nan


# --- runs


def tasks_of_run(store: RunStore) -> dict[int, dict[str, Task]]:
    """Return the tasks of a run by stage: of every suite, its own or measured later, that has scores and not losses.

    Tasks of one name in two suites are told apart as ``SUITE-TASK``.
    """
    by_suite: dict[str, dict[int, dict[str, Task]]] = {}
    for suite, stages in store.suites().items():
        tables = {stage: store.rows(suite, stage) for stage in stages}
        if stages and _has_scores(tables[stages[0]]):
            by_suite[suite] = {stage: tasks_of(table, name=suite) for stage, table in tables.items()}
    every = {suite: {name for here in by.values() for name in here} for suite, by in by_suite.items()}
    stages = sorted({stage for by_stage in by_suite.values() for stage in by_stage})
    found = {}
    for stage in stages:
        here = together({suite: by.get(stage, {}) for suite, by in by_suite.items()}, every)
        found[stage] = {name: task for name, task in here.items() if task.direction == "higher"}
    return found


def together(
    by_suite: Mapping[str, Mapping[str, Task]], every: Mapping[str, Collection[str]] | None = None
) -> dict[str, Task]:
    """Return the tasks of several suites under one name each: ``SUITE-TASK`` where two suites have a task of a name.

    ``every``: all names of each suite, where some are not at hand; else those that are.
    """
    n_suites = Counter(name for names in (every or by_suite).values() for name in names)
    found = {}
    for suite, tasks in by_suite.items():
        for name, task in tasks.items():
            unique = f"{suite}-{name}" if n_suites[name] > 1 else name
            found[unique] = replace(task, name=unique)
    return found


def _has_scores(rows: pa.Table) -> bool:
    metrics = {name.partition(":")[0] for name in pc.unique(rows["metric"]).to_pylist()}
    return any(DIRECTION.get(name) == "higher" for name in metrics)


@dataclass(frozen=True)
class StageTable:
    """Scores of a run by task and stage, and what each stage retains of the base's."""

    stages: Mapping[int, str]
    """Stages that have scores, with their names."""
    scores: Mapping[str, Mapping[int, Interval]]
    retention: Mapping[int, Retention]
    """By stage, where row 0 has scores."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, NaN as None."""
        return {
            "stages": {str(stage): name for stage, name in self.stages.items()},
            "scores": {
                name: {str(stage): interval_dict(one) for stage, one in by_stage.items()}
                for name, by_stage in self.scores.items()
            },
            "retention": {str(stage): one.as_dict() for stage, one in self.retention.items()},
        }


def stage_table(store: RunStore, *, n_resamples: int = N_RESAMPLES) -> StageTable:
    """Return the scores of a run by task and stage, with retention against row 0."""
    found = tasks_of_run(store)
    titles = {int(stage["index"]): str(stage["name"]) for stage in store.config()["stages"]}
    scores: dict[str, dict[int, Interval]] = {}
    for stage, here in found.items():
        for name, task in here.items():
            scores.setdefault(name, {})[stage] = score_of(task, n_resamples=n_resamples)
    base = found.get(0, {})
    return StageTable(
        stages={stage: titles.get(stage, str(stage)) if stage else "base" for stage in found},
        scores=scores,
        retention={stage: retention(base, here, n_resamples=n_resamples) for stage, here in found.items() if base},
    )


# --- scores


def wilson(n_right: float, n: int, level: float = LEVEL) -> Interval:
    """Return a proportion with Wilson's score interval; it stays inside 0 and 1 and has a width at both ends."""
    if n == 0:
        return Interval(math.nan, reason="no items")
    z = float(special.ndtri((1 + level) / 2))
    p, shrink = n_right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n, WILSON)


def score_of(task: Task, *, n_resamples: int = N_RESAMPLES) -> Interval:
    """Return a task's score: Wilson's interval for right and wrong, else the bootstrap over items."""
    if (reason := task.why_undefined()) is not None:
        return Interval(math.nan, n=task.n, reason=reason)
    if task.is_binary:
        return wilson(float(task.value.sum()), task.n)
    found = bootstrap_interval(task.score, resampled([task], n_resamples=n_resamples)[:, 0], task.n)
    return replace(found, kind=OVER_ITEMS, p=math.nan)


def resampled(models: Sequence[Task], *, n_resamples: int = N_RESAMPLES) -> Array:
    """Return the scores of models on resampled items, the same items for all of them, ``[B, M]``.

    Items that all models answered alike are one class: how often classes are drawn is multinomial, which is the
    bootstrap over items itself, at the cost of the number of classes.

    Args:
        models: one task, aligned items (``paired``).
        n_resamples: B.
    """
    table = np.stack([row for task in models for row in (task.value, task.weight)])
    classes, counts = np.unique(table, axis=1, return_counts=True)
    n, k = int(counts.sum()), len(counts)
    rng = generator("tasks", models[0].name, n, n_resamples)
    found = np.empty((n_resamples, len(models)))
    size = max(1, CHUNK // max(1, k))
    for start in range(0, n_resamples, size):
        drawn = rng.multinomial(n, counts / n, size=min(size, n_resamples - start)).astype(np.float64)
        sums = drawn @ classes.T
        found[start : start + size] = sums[:, 0::2] / sums[:, 1::2]
    return found


# --- differences


@dataclass(frozen=True)
class Difference:
    """``after - before`` on the same items, in the task's own unit."""

    interval: Interval
    """With the two-sided p-value of no difference."""
    error: float = math.nan
    """Its standard error over items."""
    test: str = OVER_ITEMS
    """What p is of."""
    effect: float = math.nan
    """Mean difference of an item over the standard deviation of the differences (d_z over items)."""
    n_left_out: int = 0
    """Items that only one of the two has."""

    @property
    def value(self) -> float:
        """The difference."""
        return self.interval.value

    @property
    def n_errors(self) -> float:
        """The difference in standard errors; 0 where nothing differs."""
        if self.error == 0:
            return 0.0
        return self.value / self.error


def paired(models: Sequence[Task]) -> list[Task]:
    """Return one task under several models, cut down to the items that all of them have."""
    common = set(models[0].item).intersection(*(task.item for task in models[1:]))
    found = []
    for task in models:
        keep = np.array([name in common for name in task.item], dtype=bool)
        item = tuple(name for name in task.item if name in common)
        found.append(replace(task, item=item, value=task.value[keep], weight=task.weight[keep]))
    return found


def difference(before: Task, after: Task, *, n_resamples: int = N_RESAMPLES) -> Difference:
    """Return how a task changed between two models, on the items that both have.

    The interval is the paired bootstrap. Where all items are right or wrong, p is the exact sign test of the items that
    changed (McNemar's): the bootstrap's p cannot be believed where few did. NaN with a reason otherwise.
    """
    a, b = paired([before, after])
    left_out = len({*before.item, *after.item}) - a.n
    reason = a.why_undefined() or b.why_undefined()
    if before.metric != after.metric:
        reason = f"measured as {before.metric} before and as {after.metric} after"
    elif reason is None and a.n < MIN_ITEMS:
        reason = f"{a.n} common items, too few to test"
    if reason is not None:
        return Difference(Interval(math.nan, n=a.n, reason=reason), n_left_out=left_out)
    drawn = resampled([a, b], n_resamples=n_resamples)
    interval = replace(bootstrap_interval(b.score - a.score, drawn[:, 1] - drawn[:, 0], a.n), kind=OVER_ITEMS)
    test = OVER_ITEMS
    if a.is_binary and b.is_binary:
        interval, test = replace(interval, p=sign_test(a.value, b.value)), EXACT
    changes = b.value - a.value if a.single else b.value / b.weight - a.value / a.weight
    spread = float(changes.std(ddof=1))
    return Difference(
        interval=interval,
        error=float((drawn[:, 1] - drawn[:, 0]).std(ddof=1)),
        test=test,
        effect=float(changes.mean()) / spread if spread > 0 else 0.0 if not changes.any() else math.nan,
        n_left_out=left_out,
    )


def sign_test(before: Array, after: Array) -> float:
    """Return the exact two-sided p-value of as many items getting better as worse: 2 P(X <= min), X ~ B(n, 1/2)."""
    better, worse = int((after > before).sum()), int((after < before).sum())
    if better + worse == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(better, worse), better + worse, 0.5)))


@dataclass(frozen=True)
class Change:
    """One task before and after, and whether it got worse beyond what items explain."""

    task: str
    unit: str
    direction: Direction
    before: Interval
    after: Interval
    difference: Difference
    p_holm: float
    """Adjusted over all tasks that were compared."""
    state: State

    @property
    def is_worse(self) -> bool:
        """Whether the difference points the wrong way, sure or not."""
        return _gain(self.difference.value, self.direction) < 0


def changes(
    before: Mapping[str, Task], after: Mapping[str, Task], *, alpha: float = ALPHA, n_resamples: int = N_RESAMPLES
) -> list[Change]:
    """Return what became of every task that both models have, with Holm's correction over them.

    Sure is a difference with an adjusted p below ``alpha`` and at least two standard errors: then a task is damaged or
    improved (changed, where nobody knows which way is better), else unchanged. That is no proof of equality: read the
    interval.
    """
    common = [name for name in before if name in after]
    found = [difference(before[name], after[name], n_resamples=n_resamples) for name in common]
    adjusted = holm([one.interval.p for one in found])
    return [
        Change(
            task=name,
            unit=after[name].unit,
            direction=after[name].direction,
            before=score_of(before[name], n_resamples=n_resamples),
            after=score_of(after[name], n_resamples=n_resamples),
            difference=one,
            p_holm=p,
            state=_state(one, p, after[name].direction, alpha),
        )
        for name, one, p in zip(common, found, adjusted, strict=True)
    ]


def _gain(value: float, direction: Direction) -> float:
    """Return a difference as an improvement; NaN where nobody knows which way is better."""
    return {"higher": value, "lower": -value, "either": math.nan}[direction]


def _state(one: Difference, p_holm: float, direction: Direction, alpha: float) -> State:
    if math.isnan(one.value) or math.isnan(p_holm):
        return "undecided"
    if not (p_holm < alpha and abs(one.n_errors) >= STANDARD_ERRORS):
        return "unchanged"
    if direction == "either":
        return "changed"
    return "improved" if _gain(one.value, direction) > 0 else "damaged"


def effects(found: Sequence[Change]) -> dict[str, Effect]:
    """Return standardised mean differences over tasks, of scores where higher is better: all of one scale.

    ``paper``: mean over SD of paired differences times J = 1 - 3 / (4 N - 9), as the junk paper has it over N
    models (here: N tasks). ``d_z``: the same with the J of N - 1 degrees of freedom; ``d_av``: over the mean of the two
    SDs. None of them knows how large a change is: they say how alike the tasks changed.
    """
    kept = [one for one in found if one.direction == "higher" and math.isfinite(one.difference.value)]
    before = np.array([one.before.value for one in kept])
    after = before + np.array([one.difference.value for one in kept])
    return {"paper": paired_g(after, before)["paper"], **dict(paired_effects(after, before).items())}


def sentence(found: Sequence[Change]) -> str:
    """Return the verdict in one sentence: ``damaged on 2 of 9 tasks: arc_easy (-0.041), …``."""
    by_state: dict[str, list[Change]] = {}
    for one in found:
        by_state.setdefault(one.state, []).append(one)
    damaged, improved = by_state.get("damaged", []), by_state.get("improved", [])
    damaged.sort(key=lambda one: one.difference.n_errors * (-1 if one.direction == "lower" else 1))
    parts = [
        f"damaged on {len(damaged)} of {_tasks(len(found))}" if damaged else f"no damage shown on {_tasks(len(found))}"
    ]
    if damaged:
        parts[0] += f": {_named(damaged)}"
    if improved:
        parts.append(f"improved on {len(improved)}: {_named(improved)}")
    if moved := by_state.get("changed"):
        parts.append(f"changed on {len(moved)} that have no better side: {_named(moved)}")
    if open_ := by_state.get("undecided"):
        parts.append(f"not tested on {len(open_)}: {', '.join(one.task for one in open_)}")
    return "; ".join(parts)


def _tasks(n: int) -> str:
    return "1 task" if n == 1 else f"{n} tasks"


def _named(some: Sequence[Change]) -> str:
    return ", ".join(f"{one.task} ({one.difference.value:+.3f})" for one in some)


# --- retention


@dataclass(frozen=True)
class TaskRetention:
    """What is left of one task's score; NaN with the reason."""

    plain: float
    corrected: float
    reason: str | None = None
    """Why ``corrected`` is undefined."""


@dataclass(frozen=True)
class Retention:
    """What is left of a base's scores: the unweighted mean over tasks, and every task's share."""

    plain: Interval
    corrected: Interval
    """Chance taken off: the headline."""
    by_task: Mapping[str, TaskRetention] = field(default_factory=dict)

    @property
    def left_out(self) -> dict[str, str]:
        """Tasks that the headline does not count, and why."""
        return {name: one.reason for name, one in self.by_task.items() if one.reason is not None}

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, NaN as None."""
        return {
            "plain": interval_dict(self.plain),
            "corrected": interval_dict(self.corrected),
            "n_tasks": len(self.by_task),
            "tasks": {
                name: {"plain": finite_or_none(one.plain), "corrected": finite_or_none(one.corrected),
                       "reason": one.reason}
                for name, one in self.by_task.items()
            },
        }  # fmt: skip


def retention(base: Mapping[str, Task], after: Mapping[str, Task], *, n_resamples: int = N_RESAMPLES) -> Retention:
    """Return which share of a base's scores a model has left, plain and above chance.

    Plain: after / base. Corrected: (after - chance) / (base - chance), undefined where the base is not two standard
    errors above chance, as there is nothing to lose. A loss enters both as base / after. The mean counts the tasks that
    are defined, which the base alone decides; its interval draws items of every task anew, the same for both models.
    """
    by_task: dict[str, TaskRetention] = {}
    draws: dict[str, list[Array]] = {"plain": [], "corrected": []}
    for name in [name for name in base if name in after]:
        a, b = paired([base[name], after[name]])
        if (reason := _why_no_retention(a, b)) is not None:
            by_task[name] = TaskRetention(math.nan, math.nan, reason)
            continue
        drawn = resampled([a, b], n_resamples=n_resamples)
        reason = _why_not_corrected(a) if a.direction == "higher" else None
        shares = {"plain": math.nan, "corrected": math.nan}
        for kind, chance in (("plain", 0.0), ("corrected", a.chance if a.direction == "higher" else 0.0)):
            if kind == "plain" or reason is None:
                shares[kind] = float(_share(np.array([[a.score, b.score]]), chance, a.direction)[0])
            if math.isfinite(shares[kind]):
                draws[kind].append(_share(drawn, chance, a.direction))
        by_task[name] = TaskRetention(shares["plain"], shares["corrected"], reason)
    return Retention(
        plain=_mean_share([one.plain for one in by_task.values()], draws["plain"]),
        corrected=_mean_share([one.corrected for one in by_task.values()], draws["corrected"]),
        by_task=by_task,
    )


def _share(scores: Array, chance: float, direction: Direction) -> Array:
    """Return the retention of ``[B, 2]`` scores of base and after, ``[B]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if direction == "lower":
            found: Array = scores[:, 0] / scores[:, 1]
        else:
            found = (scores[:, 1] - chance) / (scores[:, 0] - chance)
    return np.where(np.isfinite(found), found, np.nan)


def _why_no_retention(base: Task, after: Task) -> str | None:
    if base.metric != after.metric:
        return f"measured as {base.metric} before and as {after.metric} after"
    if base.direction == "either":
        return f"nobody knows which way {base.metric} is better"
    if (reason := base.why_undefined() or after.why_undefined()) is not None:
        return reason
    if base.direction == "lower" and min(base.score, after.score) <= 0:
        return "a loss of 0"
    return None


def _why_not_corrected(base: Task) -> str | None:
    """Return why a base has nothing above chance to retain."""
    if math.isnan(base.chance):
        return "chance is not known"
    above = base.score - base.chance
    residuals = base.value - base.score * base.weight  # of a ratio of sums, linearised
    error = math.sqrt(float(residuals @ residuals) * base.n / max(1, base.n - 1)) / float(base.weight.sum())
    if above > 0 and above >= STANDARD_ERRORS * error:
        return None
    return f"the base's {base.score:.3f} is not {STANDARD_ERRORS:g} standard errors ({error:.3f}) above chance " + (
        f"{base.chance:.3f}"
    )


def _mean_share(shares: Sequence[float], draws: Sequence[Array]) -> Interval:
    defined = [share for share in shares if math.isfinite(share)]
    if not defined:
        return Interval(math.nan, reason="no task has a base to retain anything of")
    mean = np.mean(draws, axis=0)
    finite = mean[np.isfinite(mean)]  # now and then a resampled base is exactly at chance
    found = bootstrap_interval(
        math.fsum(defined) / len(defined), finite if len(finite) > 0.99 * len(mean) else mean, len(defined)
    )
    return replace(found, kind=OVER_ITEMS, p=math.nan)


# --- the four buckets


@dataclass(frozen=True)
class Fate:
    """What training did to a task, and what became of it afterwards."""

    task: str
    first: State
    """Before against base: damaged, improved, unchanged."""
    bucket: Bucket
    training: Change
    """Before - base."""
    afterwards: Difference
    """After - before; after - base where training had changed nothing."""
    p_holm: float
    """Of ``afterwards``."""
    undone: float = math.nan
    """Of a damaged task: (after - before) / (base - before)."""


def buckets(
    base: Mapping[str, Task],
    before: Mapping[str, Task],
    after: Mapping[str, Task],
    *,
    alpha: float = ALPHA,
    n_resamples: int = N_RESAMPLES,
) -> list[Fate]:
    """Return the fate of every task under a remedy: base -> training -> ``before`` -> remedy -> ``after``.

    Training decides what can happen to a task: it was damaged, improved or left unchanged (``changes``, Holm over
    tasks). Then one paired test a task, again Holm over tasks, decides: a damaged task is **healed** if ``after`` is
    surely better than ``before``; an improved one is **preserved** unless ``after`` is surely worse than ``before``; an
    unchanged one is **undamaged** unless ``after`` is surely worse than the base. All others are **damaged**. A mean of
    scores cannot tell these apart: it rewards to go back to the base.
    """
    common = [name for name in base if name in before and name in after]
    kept = [name for name in common if base[name].direction != "either"]
    training = changes(*({name: side[name] for name in kept} for side in (base, before)), alpha=alpha,
                       n_resamples=n_resamples)  # fmt: skip
    tested = [
        difference((base if one.state == "unchanged" else before)[one.task], after[one.task], n_resamples=n_resamples)
        for one in training
    ]
    adjusted = holm([one.interval.p for one in tested])
    return [
        Fate(
            task=one.task,
            first=one.state,
            bucket=_bucket(one, _state(then, p, one.direction, alpha)),
            training=one,
            afterwards=then,
            p_holm=p,
            undone=-then.value / one.difference.value if one.state == "damaged" else math.nan,
        )
        for one, then, p in zip(training, tested, adjusted, strict=True)
    ]


def _bucket(training: Change, then: State) -> Bucket:
    if training.state == "undecided" or then == "undecided":
        return "undecided"
    if training.state == "damaged":
        return "healed" if then == "improved" else "damaged"
    if then == "damaged":
        return "damaged"
    return "preserved" if training.state == "improved" else "undamaged"


def rates(fates: Sequence[Fate]) -> dict[str, tuple[int, int]]:
    """Return (reached, possible) of healing, preservation and non-damage, by what training had done."""
    pairs: dict[str, tuple[State, Bucket]] = {
        "healed": ("damaged", "healed"),
        "preserved": ("improved", "preserved"),
        "undamaged": ("unchanged", "undamaged"),
    }  # fmt: skip
    decided = [one for one in fates if one.bucket != "undecided"]
    return {
        name: (
            sum(one.bucket == bucket and one.first == first for one in decided),
            sum(one.first == first for one in decided),
        )
        for name, (first, bucket) in pairs.items()
    }


def interval_dict(one: Interval) -> dict[str, Any]:
    """Return an interval as JSON-able values, NaN as None."""
    return {
        "value": finite_or_none(one.value),
        "low": finite_or_none(one.low),
        "high": finite_or_none(one.high),
        "n": one.n,
        "kind": one.kind,
        "reason": one.reason,
    }
