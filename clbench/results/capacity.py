"""What the suite ``capacity`` says about a run, stage by stage: headline figures from its rows, with intervals.

A row of the suite is one figure of one layer, part or pair on one period; most pages want a dozen numbers a
checkpoint. ``HEADLINES`` says which, and how they are taken from the rows; ``of_runs`` brings them together with the
forgetting cost, which needs the loss matrix alone. Nothing is measured here, see ``clbench.capacity_report``; what each
figure means stands in docs/capacity.md.
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
from clbench.results.matrix import Array, documents_of, finite_or_none, stage_indices
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
PER_RUN = {
    "weight_driven_total": ("W: weights", "What the weights did to J, all steps together. Positive is forgetting."),
    "data_driven_total": ("X: new data", "What adding new periods did to J, all steps together."),
    "slope": ("slope of J", "Nats a stage. W and X say whether forgetting or new text made it."),
}
"""What of ``clemc`` sums up a run: key -> title, how to read it. Its two sums rise by construction and are left out."""
MAIN = {
    "rankme": ("RankMe", "Entropy of the singular values of the last hidden states: directions in use."),
    "erank": ("effective rank", "The same of the eigenvalues of their covariance; not comparable with RankMe."),
    "alpha_req": ("alpha-ReQ", "Exponent with which the eigenvalues fall off; compare at equal width."),
    "cka_base": ("CKA with base", "How alike hidden states are to the base's: 1 for equal ones."),
    "drift": ("weight drift", "Distance of the weights from the base's, in norms of the base."),
    "dormant": ("dormant units", "Share of hidden units below a tenth of their layer's mean activity."),
}
"""Headlines that a report and a board show: key -> title, how to read it."""
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("rankme_sigma", "erank_cov", "stable_rank", "srank99", "approx_rank99", "feature_rank"), (0, 1e6)),
    "alpha_req": (-100, 100),
    "cka_debiased": (-10, 10),  # bounded by 1 in expectation only
    "procrustes": (0, 2),
    **dict.fromkeys(("dead", "dormant_1pct", "redo_0.01", "redo_0.025", "redo_0.1", "fau_0.1"), (0, 1)),
    **dict.fromkeys(("norm", "drift", "mean_abs", "spectral_norm"), (0, 1e9)),
    "drift_share": (0, 1),
    **dict.fromkeys(("interference", "interference_null", "interference_null_blocks"), (-1, 1)),
    **dict.fromkeys(("magnitude_nats", "change_nats"), (-1e3, 1e3)),
    **dict.fromkeys(("loss_change_nats", "first_order_nats", "curvature_nats"), (-1e6, 1e6)),
}
"""Metric, without its variant -> least and largest value that anybody need believe; wider than the definitions."""


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

    @property
    def last(self) -> int:
        """The last row."""
        return self.estimate.stages[-1]

    @property
    def measured(self) -> bool:
        """Whether the suite has a figure of ``MAIN`` for some row."""
        return any(math.isfinite(one.value) for key in MAIN for one in self.headlines.get(key, {}).values())

    def figure(self, key: str, row: int) -> Interval:
        """Return a headline of one row; NaN and why where it was not measured."""
        return self.headlines.get(key, {}).get(row, Interval(math.nan, reason="not measured"))

    def summary_dict(self) -> dict[str, Any]:
        """Return what sums up a run as JSON-able values: ``PER_RUN``, and ``MAIN`` of the base and the last row."""
        rows = dict.fromkeys((0, self.last)) if self.measured else ()
        return {
            "estimator": clemc.NAME,
            "reference": self.estimate.reference,
            "unit": self.estimate.unit,
            "per_run": {key: interval_dict(self.estimate.per_run[key]) for key in PER_RUN},
            "figures": {str(row): {key: interval_dict(self.figure(key, row)) for key in MAIN} for row in rows},
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


def of_runs(
    label: str,
    track: str,
    runs: Sequence[RunStore],
    *,
    measured: Mapping[str, Mapping[int, pa.Table]] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    probes: Sequence[dict[str, Any]] = (),
) -> MethodCapacity:
    """Return what is known about the capacity of one method; seeds with fewer rows than others are left out.

    Args:
        label: what the method is called.
        track: the name of its track.
        runs: one a seed, ascending, each with at least one row.
        measured: run folder -> row -> rows of the suite, where they were measured just now; other runs have the rows of
            their track, or what ``clbench capacity`` kept.
        notes: run folder -> what could not be measured.
        probes: reports of ``clbench.probe``.

    Raises:
        IntegrityError, NotFoundError: a file of a run is broken or missing.
    """
    done = [store.stages_done() for store in runs]
    most = max(done, key=len)
    kept = {int(s.config()["seed"]): s for s, stages in zip(runs, done, strict=True) if stages == most}
    first = next(iter(kept.values()))
    columns = stage_indices(first)
    documents = {seed: documents_of(store) for seed, store in kept.items()}
    found = {seed: headlines_of_run(store, (measured or {}).get(str(store.folder))) for seed, store in kept.items()}
    per_seed = {seed: headlines for seed, headlines in found.items() if headlines}
    said = [f"seed {seed}: {text}" for seed, store in kept.items() for text in (notes or {}).get(str(store.folder), ())]
    said += [f"seed {s.config()['seed']} has fewer rows and is left out" for s in runs if s not in kept.values()]
    if len(per_seed) < len(kept):
        said.append(f"the suite was measured for {len(per_seed)} of {len(kept)} seeds")
    return MethodCapacity(
        label=label,
        track=track,
        seeds=tuple(kept),
        stages={int(stage["index"]): str(stage["name"]) for stage in first.config()["stages"]},
        estimate=clemc.estimate(documents, columns, clemc.choose_reference(_oracle(first, len(columns)))),
        headlines=over_seeds(per_seed),
        probes=tuple(probes),
        notes=tuple(said),
    )


def headlines_of_run(store: RunStore, measured: Mapping[int, pa.Table] | None) -> dict[int, dict[str, Value]]:
    """Return row -> key -> value of one run: measured now, else what is there."""
    if measured is not None:
        return {row: headlines_of(rows, row) for row, rows in measured.items()}
    return headlines_here(store)


def _oracle(store: RunStore, n_columns: int) -> Array | None:
    """Return the track's frozen oracle in nats per token, where it has one that fits."""
    losses = (store.config()["track"].get("oracle") or {}).get("nats_per_token")
    return None if losses is None or len(losses) != n_columns else np.asarray(losses, dtype=np.float64)


# figures in a run folder


def headlines_here(store: RunStore) -> dict[int, dict[str, Value]]:
    """Return row -> key -> value: from the run's rows of the suite, and what they lack from what was kept.

    Raises:
        IntegrityError: the file of ``clbench capacity`` is none of ours, or rows cannot be read.
    """
    path = store.folder / FILE
    found: dict[int, dict[str, Value]] = {}
    if path.is_file():
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("stages"), dict):
            raise IntegrityError("these are no capacity figures", where=path, mend="delete it and measure again")
        found = {int(row): {key: _kept(one) for key, one in each.items()} for row, each in value["stages"].items()}
    for row in store.suites().get(SUITE, []):
        kept = found.get(row, {})
        for key, one in headlines_of(store.rows(SUITE, row), row).items():
            kept[key] = kept.get(key, one) if one.reason else one
        found[row] = kept
    return dict(sorted(found.items()))


def _kept(value: float | None) -> Value:
    """Return a figure that was kept; why it was undefined is not."""
    return Value(np.array(math.nan), "undefined when measured") if value is None else Value(np.array(value))


def kept_headlines(store: RunStore) -> dict[int, dict[str, float | None]]:
    """Return ``headlines_here`` as numbers, None where a figure is undefined."""
    return {row: {k: finite_or_none(v.value) for k, v in each.items()} for row, each in headlines_here(store).items()}
