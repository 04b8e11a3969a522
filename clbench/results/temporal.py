"""Dated items read in time: the stage x period matrix of any suite, by what befell the items, and staleness.

Every row of a suite says which period its item is of and what befell it there (``change``): of facts ``new``,
``kept``, ``updated``, ``reverted`` or ``obsolete``, of documents ``new``, ``changed`` or ``unchanged``. Row k, column p
of a sheet is what the release weights after stage k make of the items of period p: p = k is the present, p < k the past
(what is kept in mind), p > k the future. An answer is *stale* where it was the truth of an earlier period and is not
that of p; among updated items of the present that is the share that the model knows only as it was.

Corrected for chance: (accuracy - chance) / (1 - chance), with the chance of the items at hand. Intervals: one seed,
bootstrap over items (evaluation noise), Wilson's where all items of a cell agree; several seeds, t. Undefined is NaN
with a reason. No torch. Definitions for people: docs/api-change.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clbench.errors import ConfigError, NotFoundError, did_you_mean
from clbench.results.knowledge import wilson
from clbench.results.matrix import Array, Documents, Matrix, Unit, documents_from_rows, finite_or_none
from clbench.results.stats import NONE, Interval, bootstrap_interval, resample, t_interval
from clbench.results.store import RunStore

ALL = "all"
KINDS = ("new", "kept", "updated", "reverted", "obsolete", "changed", "unchanged")
"""What can befall an item, in the order of tables."""
PREFERENCE = ("acc_norm", "acc", "right", "exact_match", "score", "nll_nats")
"""What a suite is read by unless a metric is named: the first that it has."""
FORMS = ("", "plain", "trained")
"""Forms of a metric in the order of preference; then any other."""
STALE = {"acc": "outdated", "acc_norm": "outdated_norm", "acc_pmi": "outdated_pmi"}
"""Metrics with another that says how stale an answer is; of ``right`` it is told from the answers in other periods."""
CHANCE, CHANCE_STALE = "chance", "chance_outdated"
TIMES: dict[str, Callable[[int, int], bool]] = {
    "present": lambda k, p: k == p,
    "past": lambda k, p: p < k,
    "future": lambda k, p: p > k,
}
"""Cells that a mean is taken of, row 0 being the base: its own period is its present, too."""
N_RESAMPLES = 2000
OVER_ITEMS = "bootstrap over items (evaluation noise)"


@dataclass(frozen=True)
class Dated:
    """The dated items of one run, aligned: one column per item of one period, ``[D]`` or ``[R, D]``."""

    metric: str
    unit: Unit
    items: Documents
    change: NDArray[np.str_]
    stale: Array | None
    """How stale each answer is, ``[R, D]``; None where the suite cannot say."""
    chance: Array
    """Of a right answer, ``[D]``; NaN where it is not known."""
    chance_stale: Array

    def of(self, members: NDArray[np.bool_]) -> Dated:
        """Return some of the items."""
        return replace(
            self,
            items=_some(self.items, self.items.value, members),
            change=self.change[members],
            stale=None if self.stale is None else self.stale[:, members],
            chance=self.chance[members],
            chance_stale=self.chance_stale[members],
        )


def _some(items: Documents, value: Array, members: NDArray[np.bool_]) -> Documents:
    columns = {name: getattr(items, name)[members] for name in ("stage", "item", "n_tokens", "n_bytes")}
    return Documents(value=value[:, members], row_stages=items.row_stages, **columns)


# --- reading rows


def read_dated(
    rows: Mapping[int, pa.Table],
    metric: str | None = None,
    *,
    group: str | None = None,
    chances: Mapping[tuple[int, str], tuple[float, float]] | None = None,
) -> Dated:
    """Align the dated rows of several checkpoints.

    Args:
        rows: checkpoint's stage -> its rows of one suite.
        metric: what items are read by, with its form; chosen by PREFERENCE when not given.
        group: only groups of this name, ``*`` and ``?`` stand for anything.
        chances: (period, item) -> chance of a right and of a stale answer, for suites whose rows do not say.

    Raises:
        NotFoundError: no row is dated, none is of this metric, or none of this group; what there is is said.
        IntegrityError: an item is there twice.
    """
    dated = {stage: table.filter(pc.greater_equal(table["stage"], 0)) for stage, table in rows.items()}
    if not dated or not all(table.num_rows for table in dated.values()):
        raise NotFoundError("no item of this suite belongs to a period", mend="choose a suite whose items are dated")
    metric = metric or default_metric(dated)
    of_metric = {stage: _filtered(table, "metric", metric) for stage, table in dated.items()}
    chosen = {stage: _in_group(table, group) for stage, table in of_metric.items()}
    items = documents_from_rows(chosen, metric=metric)
    first = next(iter(chosen.values()))
    change = dict(zip(_keys(first), first["change"].to_pylist(), strict=True))
    keys = list(zip(items.stage.tolist(), items.item.tolist(), strict=True))
    known = [_chances_in(next(iter(dated.values())), name) for name in (CHANCE, CHANCE_STALE)]
    both = [tuple(one.get(key, math.nan) for one in known) for key in keys]
    if chances is not None:
        both = [
            chances.get(key, found) if math.isnan(found[0]) else found for key, found in zip(keys, both, strict=True)
        ]
    return Dated(
        metric=metric,
        unit="nats_per_token" if metric.startswith("nll_nats") else "mean_value",
        items=items,
        change=np.array([change.get(key, "") for key in keys], np.str_),
        stale=_stale(dated, metric, items),
        chance=np.array([c for c, _ in both], np.float64),
        chance_stale=np.array([c for _, c in both], np.float64),
    )


def default_metric(rows: Mapping[int, pa.Table]) -> str:
    """Return the metric that a suite is read by: the first of PREFERENCE, in the first of FORMS that it has."""
    names: list[str] = sorted({name for table in rows.values() for name in pc.unique(table["metric"]).to_pylist()})
    for wanted in PREFERENCE:
        found = [name for name in names if name.partition(":")[0] == wanted]
        if found:
            return min(found, key=lambda name: (_place(name.partition(":")[2]), name))
    raise NotFoundError(f"no metric of this suite is a known score: {', '.join(names)}", mend="name one with --metric")


def _place(form: str) -> int:
    return FORMS.index(form) if form in FORMS else len(FORMS)


def _filtered(table: pa.Table, column: str, value: str) -> pa.Table:
    found = table.filter(pc.equal(table[column], value))
    if not found.num_rows:
        known = pc.unique(table[column]).to_pylist()
        raise NotFoundError(f"no dated row of {column} {value!r}", mend=did_you_mean(value, known))
    return found


def _in_group(table: pa.Table, pattern: str | None) -> pa.Table:
    if pattern is None:
        return table
    names = pc.unique(table["group"]).to_pylist()
    wanted = [name for name in names if fnmatchcase(name, pattern)]
    if not wanted:
        raise NotFoundError(f"no group is called {pattern!r}", mend=f"there are {', '.join(sorted(names))}")
    return table.filter(pc.is_in(table["group"], pa.array(wanted)))


def _keys(table: pa.Table) -> list[tuple[int, str]]:
    return list(zip(table["stage"].to_pylist(), table["item"].to_pylist(), strict=True))


def _chances_in(table: pa.Table, name: str) -> dict[tuple[int, str], float]:
    found = table.filter(pc.equal(table["metric"], name))
    return dict(zip(_keys(found), found["value"].to_pylist(), strict=True))


def _stale(rows: Mapping[int, pa.Table], metric: str, items: Documents) -> Array | None:
    """Return how stale each answer is: as its rows say, else as the answers in other periods tell."""
    name, colon, form = metric.partition(":")
    if name == "nll_nats":
        return None
    if name in STALE:
        said = f"{STALE[name]}{colon}{form}"
        found = {stage: table.filter(pc.equal(table["metric"], said)) for stage, table in rows.items()}
        if not all(table.num_rows for table in found.values()):
            return None
        values = [
            dict(zip(_keys(table), table["value"].to_pylist(), strict=True)) for _, table in sorted(found.items())
        ]
        keys = list(zip(items.stage.tolist(), items.item.tolist(), strict=True))
        return np.array([[one.get(key, math.nan) for key in keys] for one in values], np.float64)
    return _told_by_others(items) if name == "right" else None


def _told_by_others(items: Documents) -> Array:
    """Return 1 where an item is answered with what is right in an earlier period and wrong in its own, ``[R, D]``."""
    stale = np.zeros(items.value.shape)
    right_before: dict[str, NDArray[np.bool_]] = {}
    for d in np.argsort(items.stage, kind="stable"):
        name = str(items.item[d])
        before = right_before.get(name, np.zeros(len(stale), np.bool_))
        stale[:, d] = before & (items.value[:, d] < 1)
        right_before[name] = before | (items.value[:, d] == 1)
    return stale


# --- sheets


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What checkpoints make of the items of one kind; cells are ``[R][C]``, per-period values ``[C]``."""

    kind: str
    row_stages: tuple[int, ...]
    column_stages: tuple[int, ...]
    n_items: tuple[int, ...]
    chance: tuple[float, ...]
    chance_stale: tuple[float, ...]
    score: list[list[Interval]]
    """Mean over items, or nats per token."""
    corrected: list[list[Interval]]
    stale: list[list[Interval]]
    times: dict[str, dict[str, Interval]]
    """``score``, ``corrected`` and ``stale`` of the present, past and future: plain means over those cells."""

    def matrix(self, unit: Unit = "mean_value") -> Matrix:
        """Return the scores as a matrix that other pages and metrics can use."""
        values = np.array([[cell.value for cell in row] for row in self.score], np.float64)
        places = product(enumerate(self.row_stages), enumerate(self.column_stages))
        reasons = {(k, p): self.score[r][c].reason or "" for (r, k), (c, p) in places if np.isnan(values[r, c])}
        return Matrix(values.reshape(len(self.row_stages), -1), self.row_stages, self.column_stages, unit, reasons)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, NaN as None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Temporal:
    """One method on the dated items of one suite: a sheet of all items, and one of each kind."""

    label: str
    suite: str
    metric: str
    unit: Unit
    group: str | None
    n_seeds: int
    stages: dict[int, str]
    """Names of the periods."""
    sheets: dict[str, Sheet]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, NaN as None."""
        head = {name: getattr(self, name) for name in ("label", "suite", "metric", "unit", "group", "n_seeds")}
        stages = {str(index): name for index, name in self.stages.items()}
        return {**head, "stages": stages, "sheets": {name: sheet.as_dict() for name, sheet in self.sheets.items()}}


def temporal(
    runs: Sequence[RunStore],
    *,
    suite: str,
    metric: str | None = None,
    group: str | None = None,
    chances: Mapping[tuple[int, str], tuple[float, float]] | None = None,
    n_resamples: int = N_RESAMPLES,
) -> Temporal:
    """Read the dated items of a suite in time.

    Args:
        runs: of one method on one track, one per seed.
        suite: whose rows.
        metric: see ``read_dated``, as ``group`` and ``chances``.
        group: of the items.
        chances: for suites whose rows do not say.
        n_resamples: of the items, where there is one seed.

    Raises:
        NotFoundError: no row is complete, or see ``read_dated``.
        ConfigError: the seeds have different rows or items.
    """
    config = runs[0].config()
    seeds = [read_dated(_rows(store, suite), metric, group=group, chances=chances) for store in runs]
    for other in seeds[1:]:
        same = all(
            np.array_equal(getattr(other.items, name), getattr(seeds[0].items, name))
            for name in ("row_stages", "stage", "item")
        )
        if not same:
            raise ConfigError("the seeds have different rows or items", mend="finish all seeds on one stream first")
    found = [ALL, *(kind for kind in KINDS if kind in set(seeds[0].change.tolist()))]
    return Temporal(
        label=str(config["method"]["label"]),
        suite=suite,
        metric=seeds[0].metric,
        unit=seeds[0].unit,
        group=group,
        n_seeds=len(seeds),
        stages={int(stage["index"]): str(stage["name"]) for stage in config["stages"]},
        sheets={kind: sheet_of(seeds, kind, n_resamples=n_resamples) for kind in found},
    )


def _rows(store: RunStore, suite: str) -> dict[int, pa.Table]:
    """Return the rows of every stage that the suite was measured after."""
    done = store.stages_done()
    if not done:
        raise NotFoundError("no row of the matrix is complete yet", where=store.folder, mend="run it first")
    found: dict[int, pa.Table] = {}
    for stage in done:
        with suppress(NotFoundError):
            found[stage] = store.rows(suite, stage)
    if not found:
        raise NotFoundError(
            f"suite {suite!r} was not measured",
            where=store.folder,
            mend="measure it with `clbench evaluate RUN --suite`",
        )
    return found


def sheet_of(seeds: Sequence[Dated], kind: str = ALL, *, n_resamples: int = N_RESAMPLES) -> Sheet:
    """Return the sheet of one kind from the same items under one or several seeds."""
    own = [one.of((one.change == kind) | (kind == ALL)) for one in seeds]
    first = own[0]
    columns = tuple(sorted(set(first.items.stage.tolist())))
    rows = first.items.row_stages
    here = [first.items.stage == column for column in columns]
    chance = tuple(float(first.chance[one].mean()) for one in here)
    scores = _Cells.of([one.items for one in own], first.unit, columns, n_resamples)
    corrected = scores.corrected(np.array(chance), why=_why_uncorrected(first, chance))
    stale = None
    if all(one.stale is not None for one in own):
        items = [_some(one.items, one.stale, np.ones(one.items.n, np.bool_)) for one in own if one.stale is not None]
        stale = _Cells.of(items, "mean_value", columns, n_resamples)
    no_stale = Interval(math.nan, reason="the rows do not say which answers were true before")
    kept = {"score": scores, "corrected": corrected, "stale": stale}
    return Sheet(
        kind=kind,
        row_stages=rows,
        column_stages=columns,
        n_items=tuple(int(one.sum()) for one in here),
        chance=chance,
        chance_stale=tuple(float(first.chance_stale[one].mean()) for one in here),
        score=scores.intervals(),
        corrected=corrected.intervals(),
        stale=[[no_stale for _ in columns] for _ in rows] if stale is None else stale.intervals(),
        times={
            time: {name: no_stale if one is None else one.mean_over(time) for name, one in kept.items()}
            for time in TIMES
        },
    )


def _why_uncorrected(dated: Dated, chance: Sequence[float]) -> str | None:
    if dated.unit != "mean_value":
        return "a loss has no chance level"
    if any(math.isnan(one) for one in chance):
        return "the chance level is not known"
    return "there is one candidate" if any(one >= 1 for one in chance) else None


@dataclass(frozen=True)
class _Cells:
    """Cells of one quantity: per seed ``[S, R, C]``, and for one seed on resampled items ``[B, R, C]``."""

    values: Array
    draws: Array | None
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    n: NDArray[np.int64]
    """Items of each column, ``[C]``."""
    is_share: bool
    """Values are means of items in [0, 1]."""
    why: str | None = None

    @classmethod
    def of(cls, seeds: Sequence[Documents], unit: Unit, columns: tuple[int, ...], n_resamples: int) -> _Cells:
        values = np.stack([one.matrix(unit, columns).values for one in seeds])
        draws = None
        if len(seeds) == 1 and seeds[0].n:
            draws = resample(seeds, unit, columns, n_resamples=n_resamples, root="temporal")[0].values
        n = np.array([int((seeds[0].stage == column).sum()) for column in columns], np.int64)
        return cls(values, draws, seeds[0].row_stages, columns, n, unit == "mean_value")

    def corrected(self, chance: Array, why: str | None) -> _Cells:
        """Return (value - chance) / (1 - chance), column by column."""
        if why is not None:
            return replace(self, values=np.full_like(self.values, math.nan), draws=None, why=why)
        draws = None if self.draws is None else (self.draws - chance) / (1 - chance)
        return replace(self, values=(self.values - chance) / (1 - chance), draws=draws, is_share=False)

    def intervals(self) -> list[list[Interval]]:
        """Return every cell with its interval."""
        places = range(len(self.columns))
        return [[self._interval((r, c), int(self.n[c])) for c in places] for r in range(len(self.rows))]

    def mean_over(self, time: str) -> Interval:
        """Return the plain mean over the cells of the present, the past or the future."""
        chosen = [
            (r, c) for (r, k), (c, p) in product(enumerate(self.rows), enumerate(self.columns)) if TIMES[time](k, p)
        ]
        if not chosen:
            return Interval(math.nan, reason=f"no checkpoint has items of its {time}")
        where = tuple(np.array(chosen).T)
        means = self.values[:, where[0], where[1]].mean(axis=1)
        draws = None if self.draws is None else self.draws[:, where[0], where[1]].mean(axis=1)
        return self._of(means, draws, int(self.n[np.unique(where[1])].sum()))

    def _interval(self, cell: tuple[int, int], n: int) -> Interval:
        r, c = cell
        return self._of(self.values[:, r, c], None if self.draws is None else self.draws[:, r, c], n)

    def _of(self, per_seed: Array, draws: Array | None, n: int) -> Interval:
        if self.why is not None:
            return Interval(math.nan, n=n, reason=self.why)
        if len(per_seed) > 1:
            return t_interval(per_seed)
        value = float(per_seed[0])
        if not math.isfinite(value):
            return Interval(math.nan, n=n, reason="an item is missing after this stage")
        if self.is_share and value in (0.0, 1.0):
            return wilson(value, n)
        if draws is None or np.ptp(draws) == 0:
            return Interval(value, n=n, kind=NONE, reason="all items agree")
        return replace(bootstrap_interval(value, draws, n), kind=OVER_ITEMS, p=math.nan)
