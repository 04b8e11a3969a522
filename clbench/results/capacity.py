"""What the suite ``capacity`` says about a run, stage by stage: headline figures from its rows, with intervals.

A row of the suite is one figure of one layer, part or pair on one period; most pages want a dozen numbers a
checkpoint. ``HEADLINES`` says which, and how they are taken from the rows. Nothing is measured here, see
``clbench.capacity_report``; what each figure means stands in docs/capacity.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from clbench.errors import IntegrityError
from clbench.files import read_json
from clbench.results import clemc, stats
from clbench.results.clemc import Estimate, interval_dict
from clbench.results.matrix import Array, Documents, finite_or_none
from clbench.results.metrics import Value
from clbench.results.stats import Interval
from clbench.results.store import RunStore

SUITE = "capacity"
FILE = "capacity.json"
FORMAT = 1
UNDATED = -1
"""Period of figures that belong to none (``clbench.suite.UNDATED``)."""
UNDEFINED = "undefined: "
"""What ``change`` begins with in a row without a value (``clbench.suite.UNDEFINED``)."""
Take = Literal["all", "past", "own"]


class Figures:
    """The rows of one checkpoint, to be asked for single figures.

    Args:
        rows: of the suite, schema ROWS_SCHEMA.
    """

    def __init__(self, rows: pa.Table) -> None:
        columns = (rows[name].to_pylist() for name in ("group", "item", "stage", "metric", "value", "change"))
        self._values: dict[tuple[str, str, int, str], tuple[float, str]] = {}
        for group, item, stage, metric, value, change in zip(*columns, strict=True):
            reason = change.removeprefix(UNDEFINED) if change.startswith(UNDEFINED) else ""
            self._values[group, item, stage, metric] = (value, reason)

    def get(self, group: str, item: str, stage: int, metric: str) -> Value:
        """Return one figure; NaN and why where it is undefined or was not measured."""
        value, reason = self._values.get((group, item, stage, metric), (math.nan, "not measured"))
        return Value(np.array(value), None if math.isfinite(value) else reason or "not finite")

    def periods(self, group: str, item: str, metric: str) -> list[int]:
        """Return the periods that have this figure, defined or not, ascending."""
        return sorted(s for g, i, s, m in self._values if (g, i, m) == (group, item, metric) and s != UNDATED)

    def mean(self, group: str, item: str, periods: Iterable[int], metric: str) -> Value:
        """Return the plain mean over periods; NaN with a reason when one is undefined or there is none."""
        found = [self.get(group, item, stage, metric) for stage in periods]
        if not found:
            return Value(np.array(math.nan), "no such period")
        reason = next((one.reason for one in found if one.reason), None)
        return Value(np.array(np.mean([one.value for one in found])), reason)

    def gram(self, periods: Sequence[int]) -> Array:
        """Return the products of the periods' gradients, ``[T, T]``; NaN where they were not measured."""
        return np.array(
            [[self.get("gradients", f"period {j}", i, "gradient_dot").value for j in periods] for i in periods]
        )


@dataclass(frozen=True)
class Headline:
    """One number a checkpoint, and where it stands in the rows."""

    key: str
    title: str
    section: str
    group: str = ""
    item: str = ""
    metric: str = ""
    take: Take = "all"
    """all: of all periods together, or of none. past: mean over the periods before the checkpoint. own: its period."""
    compute: Callable[[Figures, int], Value] | None = None
    """Takes the place of the rest."""

    def of(self, figures: Figures, stage: int) -> Value:
        """Return it of the checkpoint after ``stage``."""
        if self.compute is not None:
            return self.compute(figures, stage)
        if self.take == "past":
            periods = [k for k in figures.periods(self.group, self.item, self.metric) if k < stage]
            return figures.mean(self.group, self.item, periods, self.metric)
        return figures.get(self.group, self.item, UNDATED if self.take == "all" else stage, self.metric)


def opposition_to_next(figures: Figures, stage: int) -> Value:
    """Return cos(grad J_k, -grad L_{k+1}); positive: a descent step on the next period raises the cost of the old.

    J_k is the plain mean over the periods up to k, so its gradient is the mean of theirs; products of independent half
    batches keep the noise out (see the suite).
    """
    old = [k for k in figures.periods("gradients", "period 0", "gradient_dot") if k <= stage]
    gram = figures.gram([*old, stage + 1])
    if not old or not np.all(np.isfinite(gram)):
        return Value(np.array(math.nan), "gradients were not measured, or there is no next period")
    cross, own, new = gram[:-1, -1].mean(), gram[:-1, :-1].mean(), gram[-1, -1]
    if own <= 0 or new <= 0:
        return Value(np.array(math.nan), "a gradient is no longer than its noise")
    return Value(np.array(-cross / math.sqrt(own * new)))


def step_part(metric: str) -> Callable[[Figures, int], Value]:
    """Return what takes a part of the last step's change of J over the periods before it; see ``clemc``."""

    def part(figures: Figures, stage: int) -> Value:
        periods = [k for k in figures.periods("gradients", "previous", metric) if k < stage]
        return figures.mean("gradients", "previous", periods, metric)

    return part


REPRESENTATION, UNITS, OLD, GRADIENTS = "Representation", "Weights and units", "Old text", "Gradients"
HEADLINES: tuple[Headline, ...] = (
    Headline("rankme", "RankMe (singular values)", REPRESENTATION, "representation", "final", "rankme_sigma:centred"),
    Headline("erank", "effective rank (covariance)", REPRESENTATION, "representation", "final", "erank_cov:centred"),
    Headline("alpha_req", "alpha-ReQ", REPRESENTATION, "representation", "final", "alpha_req:centred"),
    Headline("stable_rank", "stable rank", REPRESENTATION, "representation", "final", "stable_rank:centred"),
    Headline("cka_base", "CKA with the base", REPRESENTATION, "base", "final", "cka_debiased"),
    Headline("procrustes_base", "Procrustes distance to base", REPRESENTATION, "base", "final", "procrustes"),
    Headline("norm", "weight norm", UNITS, "weights", "all", "norm"),
    Headline("drift", "drift from the base", UNITS, "weights", "all", "drift"),
    Headline("dormant", "dormant units (ReDo, 0.1)", UNITS, "units", "all blocks", "redo_0.1"),
    Headline("interference_old", "interference D", OLD, "interference", "previous", "interference", "past"),
    Headline("null_old", "null of D", OLD, "interference", "previous", "interference_null_blocks", "past"),
    Headline("magnitude_old", "magnitude M, nats", OLD, "interference", "previous", "magnitude_nats", "past"),
    Headline("change_old", "change of loss, nats", OLD, "interference", "previous", "change_nats", "past"),
    Headline("opposition", "cos(old, -next)", GRADIENTS, compute=opposition_to_next),
    Headline("step_change", "change on a sample, nats", GRADIENTS, compute=step_part("loss_change_nats")),
    Headline("first_order", "first order, nats", GRADIENTS, compute=step_part("first_order_nats")),
    Headline("curvature", "curvature remainder, nats", GRADIENTS, compute=step_part("curvature_nats")),
)
"""Layers are those after the final norm; ``:centred`` takes the mean out first."""
COST = "Forgetting cost"
COSTS = {
    "cost": "J",
    "cost_past": "J, past",
    "cost_new": "J, new",
    "increment": "increment of J",
    "weight_driven": "W: weights",
    "data_driven": "X: new data",
}
"""What of ``clemc`` a page shows; its two sums rise by construction and stand in --json alone."""
SHORT_COSTS = ("cost", "cost_past", "weight_driven", "data_driven")
"""Those of a table in a terminal."""


def headlines_of(rows: pa.Table, stage: int) -> dict[str, Value]:
    """Return every headline of one checkpoint."""
    figures = Figures(rows)
    return {one.key: one.of(figures, stage) for one in HEADLINES}


@dataclass(frozen=True)
class MethodCapacity:
    """What is known about one method on one track."""

    label: str
    """With the track's name where several tracks are shown."""
    track: str
    seeds: tuple[int, ...]
    stages: Mapping[int, str]
    """Of the track: index -> name."""
    estimate: Estimate
    headlines: Mapping[str, Mapping[int, Interval]]
    """Key -> row -> value; empty rows where the suite was not measured."""
    probes: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    """What is missing, and why."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "label": self.label,
            "track": self.track,
            "seeds": list(self.seeds),
            "stages": {str(k): name for k, name in self.stages.items()},
            "clemc": self.estimate.as_dict(),
            "figures": {
                key: {str(row): interval_dict(one) for row, one in values.items()}
                for key, values in self.headlines.items()
            },
            "probes": list(self.probes),
            "notes": list(self.notes),
        }

    def values(self, key: str) -> Mapping[int, Interval]:
        """Return one quantity by row: of ``COSTS`` or of ``HEADLINES``."""
        found = self.estimate.per_stage.get(key)
        return self.headlines.get(key, {}) if found is None else found


def over_seeds(per_seed: Mapping[int, Mapping[int, Mapping[str, Value]]]) -> dict[str, dict[int, Interval]]:
    """Return key -> row -> t-interval over seeds, of seed -> row -> key -> value.

    A row that a seed lacks is left out. One seed has values and no intervals: document noise stands in the rows.
    """
    rows = sorted(set.intersection(*(set(found) for found in per_seed.values()))) if per_seed else []
    keys = list(next(iter(next(iter(per_seed.values())).values()))) if rows else []
    found: dict[str, dict[int, Interval]] = {}
    for key in keys:
        for row in rows:
            each = [by_row[row][key] for by_row in per_seed.values()]
            reason = next((one.reason for one in each if one.reason), None)
            found.setdefault(key, {})[row] = (
                Interval(math.nan, n=len(each), reason=reason)
                if reason
                else stats.t_interval([one.value for one in each])
            )
    return found


def estimate_of(documents: Mapping[int, Documents], columns: Sequence[int], oracle: Array | None) -> Estimate:
    """Return the clemc estimate of one method, against the oracle where there is one."""
    return clemc.estimate(documents, columns, clemc.choose_reference(oracle))


# figures kept in a run folder


def kept_headlines(store: RunStore) -> dict[int, dict[str, float | None]]:
    """Return row -> key -> value: from the run's own rows of the suite, else from what ``clbench capacity`` kept.

    Raises:
        IntegrityError: the file is none of ours.
    """
    path = store.folder / FILE
    kept: dict[int, dict[str, float | None]] = {}
    if path.is_file():
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("stages"), dict):
            raise IntegrityError("these are no capacity figures", where=path, mend="delete it and measure again")
        kept = {int(stage): dict(found) for stage, found in value["stages"].items()}
    for stage in store.stages_done():
        if stage not in kept and has_rows(store, stage):
            found = headlines_of(store.rows(SUITE, stage), stage)
            kept[stage] = {key: finite_or_none(one.value) for key, one in found.items()}
    return kept


def has_rows(store: RunStore, stage: int) -> bool:
    """Say whether the run's track measured the suite after a stage."""
    return (store.folder / "rows" / f"{SUITE}-{stage:02d}.parquet").is_file()
