"""Which figure of a checkpoint goes with forgetting? Rank correlations over methods, with intervals.

The unit is a method on a track: its seeds are averaged first, as they are no independent methods. Ranks are taken
within a track, so that tracks of different losses can stand together. Three views of a figure are kept apart:

    early    after the first trained stage, against what is lost *after* it: this predicts
    last     after the last stage, against all forgetting: this only goes with it
    change   last less base, against all forgetting: likewise

With many figures the best one looks good by luck, so p-values are of the largest |rho| of all figures of a view under
permutations of the methods (Westfall & Young's max-T).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from clbench.results.matrix import Array, Matrix, finite_or_none
from clbench.results.metrics import forgetting_first
from clbench.results.stats import LEVEL
from clbench.seeds import generator

View = Literal["early", "last", "change"]
N_RESAMPLES = 2_000
LEAST_METHODS = 5
"""Below this no interval is given: five ranks have 120 orders."""


@dataclass(frozen=True)
class RunFigures:
    """What one run brings: its forgetting, and figures by row."""

    track: str
    method: str
    seed: int
    matrix: Matrix
    figures: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Row -> figure -> value, NaN where it is undefined."""

    def target(self, view: View) -> float:
        """Return the forgetting that a view is compared with, nats per token."""
        if view != "early":
            return forgetting_first(self.matrix).value
        rows = [k for k in self.matrix.row_stages if k > 0]
        if len(rows) < 2:
            return math.nan
        first, last = rows[0], rows[-1]
        old = [i for i in self.matrix.column_stages if i <= first]
        return float(np.mean([self.matrix.at(last, i) - self.matrix.at(first, i) for i in old]))

    def value(self, name: str, view: View) -> float:
        """Return a figure as a view takes it."""
        rows = [k for k in sorted(self.figures) if k > 0]
        if not rows:
            return math.nan
        at = self.figures[rows[0] if view == "early" else rows[-1]].get(name, math.nan)
        return at - self.figures.get(0, {}).get(name, math.nan) if view == "change" else at


@dataclass(frozen=True)
class Predictor:
    """How the ranks of one figure go with those of forgetting."""

    name: str
    view: View
    rho: float
    low: float = math.nan
    high: float = math.nan
    p_max: float = math.nan
    """Share of permutations whose largest |rho| over all figures of the view is at least this |rho|."""
    n_methods: int = 0
    n_runs: int = 0
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        numbers = {name: finite_or_none(getattr(self, name)) for name in ("rho", "low", "high", "p_max")}
        return {**vars(self), **numbers}


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; NaN where one of the two does not vary."""
    return float(_correlation(_ranks(np.asarray(x, float)), _ranks(np.asarray(y, float))))


def _ranks(values: Array) -> Array:
    """Return ranks as shares from -1/2 to 1/2, ties at their mean, along the last axis."""
    n = values.shape[-1]
    found: Array = (scipy_stats.rankdata(values, axis=-1) - (n + 1) / 2) / n
    return found


def _correlation(x: Array, y: Array) -> Array:
    """Return the correlation along the last axis of what has mean zero there."""
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(size > 1e-12, (x * y).sum(-1) / size, np.nan)
    return found


@dataclass(frozen=True)
class _Table:
    """Methods of one view: figures ``[F, M]`` and forgetting ``[M]``, and to which track each belongs."""

    names: list[str]
    values: Array
    target: Array
    track: NDArray[np.int64]
    n_runs: int

    def rho(self, values: Array, target: Array) -> Array:
        """Return the correlation of ranks within tracks, over the last axis."""
        return _correlation(self._within(values), self._within(target))

    def _within(self, values: Array) -> Array:
        out = np.empty_like(values, dtype=np.float64)
        for one in np.unique(self.track):
            here = self.track == one
            out[..., here] = _ranks(values[..., here]) * here.sum()
        return out


def predictors(runs: Sequence[RunFigures], *, n_resamples: int = N_RESAMPLES) -> list[Predictor]:
    """Return every figure and view, the strongest of each view first.

    Args:
        runs: finished ones; those without figures are left out.
        n_resamples: bootstrap resamples of the methods within tracks, and permutations likewise.
    """
    found: list[Predictor] = []
    names = sorted({name for run in runs for by_row in run.figures.values() for name in by_row})
    for view in get_args(View):
        mine = [_one_by_one(name, view, _table([name], view, runs), n_resamples) for name in names]
        most = max((one.n_methods for one in mine), default=0)  # one that few have must not thin out the others
        whole = _table([one.name for one in mine if not one.reason and one.n_methods == most], view, runs)
        adjusted = _p_max(whole, n_resamples) if len(whole.target) >= LEAST_METHODS else {}
        mine = [Predictor(**{**vars(one), "p_max": adjusted.get(one.name, math.nan)}) for one in mine]
        found += sorted(mine, key=lambda one: -abs(one.rho) if math.isfinite(one.rho) else 1.0)
    return found


def _table(names: list[str], view: View, runs: Sequence[RunFigures]) -> _Table:
    """Average seeds; a method that lacks one of the figures is left out."""
    groups: dict[tuple[str, str], list[list[float]]] = {}
    n_runs = 0
    for run in runs:
        row = [run.target(view), *(run.value(name, view) for name in names)]
        if np.all(np.isfinite(row)):
            groups.setdefault((run.track, run.method), []).append(row)
            n_runs += 1
    means = np.array([np.mean(rows, axis=0) for rows in groups.values()]).reshape(len(groups), 1 + len(names))
    tracks = {track: place for place, track in enumerate(dict.fromkeys(track for track, _ in groups))}
    track = np.array([tracks[track] for track, _ in groups], dtype=np.int64)
    return _Table(names, means[:, 1:].T, means[:, 0], track, n_runs)


def _one_by_one(name: str, view: View, table: _Table, n_resamples: int) -> Predictor:
    """Return one figure with its bootstrap interval over methods."""
    n = len(table.target)
    facts: dict[str, Any] = {"name": name, "view": view, "n_methods": n, "n_runs": table.n_runs}
    if n < 3:
        return Predictor(rho=math.nan, reason=f"{n} methods have it", **facts)
    rho = float(table.rho(table.values[0], table.target))
    if not math.isfinite(rho):
        return Predictor(rho=math.nan, reason="it does not vary between methods", **facts)
    if n < LEAST_METHODS:
        return Predictor(rho=rho, reason=f"{n} methods: no interval below {LEAST_METHODS}", **facts)
    rng = generator("predictors", name, view)
    drawn = np.empty((n_resamples, n), dtype=np.int64)
    for one in np.unique(table.track):
        here = np.flatnonzero(table.track == one)
        drawn[:, here] = here[rng.integers(0, len(here), (n_resamples, len(here)))]
    rhos = table.rho(table.values[0][drawn], table.target[drawn])
    rhos = rhos[np.isfinite(rhos)]
    low, high = np.quantile(rhos, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Predictor(rho=rho, low=float(low), high=float(high), **facts)


def _p_max(table: _Table, n_resamples: int) -> dict[str, float]:
    """Return max-T adjusted p-values: forgetting is dealt anew among the methods of each track."""
    if not table.names:
        return {}
    rng = generator("predictors", "permutation")
    observed = np.abs(table.rho(table.values, table.target[None]))
    order = np.tile(np.arange(len(table.target)), (n_resamples, 1))
    for one in np.unique(table.track):
        here = np.flatnonzero(table.track == one)
        order[:, here] = here[np.argsort(rng.random((n_resamples, len(here))), axis=1)]
    largest = np.nanmax(np.abs(table.rho(table.values[None], table.target[order][:, None])), axis=1)
    return {
        name: float((1 + (largest >= rho - 1e-12).sum()) / (1 + n_resamples))
        for name, rho in zip(table.names, observed, strict=True)
    }
