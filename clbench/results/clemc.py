"""Effective capacity over checkpoints, from a matrix of losses: forgetting cost, its maximum, its sum, its increments.

The quantities are those that "On Understanding of the Dynamics of Model Capacity in Continual Learning" (Chakraborty &
Raghavan 2025, arXiv 2508.08052) names CLEMC. Its text could not be read when this was written, so they are called
``clemc_proxy`` until somebody has compared them. Notation: ``e[k][i]`` excess loss after stage k on period i,
``S_k`` the periods up to k, ``J_k`` the mean of ``e[k][i]`` over ``S_k`` with weights gamma.

Two of the parts (running maximum, cumulative sum) rise by construction, so "capacity grows" is no finding: increments
and slopes are what is to be read. Everything works on ``[..., R, C]``, many resamples of a matrix at once.
Formulas and what they do not say: docs/capacity.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.errors import ConfigError
from clbench.results import stats
from clbench.results.matrix import Array, Documents, Matrix, Unit, finite_or_none
from clbench.results.stats import Interval

NAME = "clemc_proxy"
"""What the estimator is called until it was checked against the paper."""
N_RESAMPLES = 2_000
ReferenceKind = Literal["oracle", "best_of_run", "none"]


@dataclass(frozen=True)
class Reference:
    """What is subtracted from a loss to get its excess; an entropy that nobody can learn is no forgetting.

    ``oracle``: the track's frozen losses, one a period. ``best_of_run``: the least loss of any row of the same run,
    which makes every excess non-negative and a run its own measure. ``none``: plain losses, where adding a period of
    high entropy reads as forgetting.
    """

    kind: ReferenceKind
    losses: Array | None = None
    """Of the oracle, shape ``[C]``."""

    def of(self, matrix: Matrix) -> Array:
        """Return the reference losses, shape ``[..., C]``.

        Raises:
            ConfigError: the oracle does not have one loss a period.
        """
        if self.kind == "none":
            return np.zeros(matrix.values.shape[-1])
        if self.kind == "best_of_run":
            found: Array = np.min(matrix.values, axis=-2)
            return found
        if self.losses is None or np.shape(self.losses) != (len(matrix.column_stages),):
            n_losses = 0 if self.losses is None else np.size(self.losses)
            raise ConfigError(
                f"the oracle has {n_losses} losses for {len(matrix.column_stages)} periods",
                mend="give one per period, or take best_of_run",
            )
        return np.asarray(self.losses, dtype=np.float64)


def choose_reference(oracle: Array | None) -> Reference:
    """Return the oracle where the track has one, else the best of the run."""
    return Reference("best_of_run") if oracle is None else Reference("oracle", oracle)


def excess(matrix: Matrix, reference: Reference) -> Matrix:
    """Return the matrix of excess losses, e[k][i] = L[k][i] - L*[i]."""
    values = matrix.values - reference.of(matrix)[..., None, :]
    return Matrix(values, matrix.row_stages, matrix.column_stages, matrix.unit, matrix.reasons)


@dataclass(frozen=True)
class Capacity:
    """The quantities of one run, or of many resamples of it; K rows, arrays ``[..., K]`` unless said otherwise."""

    stages: tuple[int, ...]
    """The rows: 0 is the base."""
    cost: Array
    """J_k."""
    cost_past: Array
    """J_k over the periods of earlier rows; NaN in the first row."""
    cost_new: Array
    """J_k over the periods that this row adds."""
    femc: Array
    """max over j <= k of J_j; never falls."""
    clemc: Array
    """sum over j <= k of FEMC_j; rises wherever FEMC is positive, so FEMC is its increment."""
    weight_driven: Array
    """W_k = J(theta_{k+1}; S_k) - J(theta_k; S_k), ``[..., K - 1]``: positive is forgetting."""
    data_driven: Array
    """X_k = J_{k+1} - J(theta_{k+1}; S_k), ``[..., K - 1]``: what adding the new periods does to the mean."""

    @property
    def increment(self) -> Array:
        """J_{k+1} - J_k, ``[..., K - 1]``; equals ``weight_driven + data_driven`` exactly."""
        found: Array = np.diff(self.cost, axis=-1)
        return found

    @property
    def slope(self) -> Array:
        """Least-squares slope of J over the stages, per stage, ``[...]``; NaN with fewer than two rows."""
        return slope(self.stages, self.cost)

    @property
    def clemc_per_stage(self) -> Array:
        """CLEMC of the last row divided by the number of rows, ``[...]``: the mean of FEMC."""
        found: Array = self.clemc[..., -1] / len(self.stages)
        return found


def slope(stages: Sequence[int], values: Array) -> Array:
    """Return the least-squares slope of values ``[..., K]`` over the stages ``[K]``; NaN with fewer than two."""
    if len(stages) < 2:
        return np.full(values.shape[:-1], np.nan)
    place = np.asarray(stages, dtype=np.float64)
    centred = place - place.mean()
    found: Array = values @ centred / (centred @ centred)
    return found


def capacity_of(matrix: Matrix, weights: ArrayLike | None = None, *, first_column: int = 0) -> Capacity:
    """Return the quantities of a matrix of excess losses.

    Args:
        matrix: of ``excess``, values ``[..., R, C]``.
        weights: gamma, one positive number a period of the matrix, ``[C]``; equal ones when not given.
        first_column: 1 leaves out what the base was trained on, and the base's row with it.

    Raises:
        ConfigError: weights that do not fit, or no row has a period of its own time.
    """
    gamma = _weights(matrix, weights)
    columns = np.array(matrix.column_stages)
    seen = {k: (columns <= k) & (columns >= first_column) for k in matrix.row_stages}
    rows = [k for k in matrix.row_stages if seen[k].any()]
    if not rows:
        raise ConfigError(
            "no row of this matrix has a period up to it", mend="measure the periods that were trained on"
        )

    def cost(row: int, mask: NDArray[np.bool_]) -> Array:
        values = matrix.values[..., matrix.row_stages.index(row), :][..., mask]
        found: Array = values @ gamma[mask] / gamma[mask].sum() if mask.any() else np.full(values.shape[:-1], np.nan)
        return found

    before = [np.zeros_like(columns, dtype=bool), *(seen[k] for k in rows[:-1])]
    total = [cost(k, seen[k]) for k in rows]
    kept = [cost(after, seen[k]) for k, after in itertools.pairwise(rows)]
    stacked = np.stack(total, axis=-1)
    femc = np.maximum.accumulate(stacked, axis=-1)
    empty = np.zeros((*stacked.shape[:-1], 0))
    return Capacity(
        stages=tuple(rows),
        cost=stacked,
        cost_past=np.stack([cost(k, old) for k, old in zip(rows, before, strict=True)], axis=-1),
        cost_new=np.stack([cost(k, seen[k] & ~old) for k, old in zip(rows, before, strict=True)], axis=-1),
        femc=femc,
        clemc=np.cumsum(femc, axis=-1),
        weight_driven=np.stack([a - b for a, b in zip(kept, total, strict=False)], axis=-1) if kept else empty,
        data_driven=np.stack([a - b for a, b in zip(total[1:], kept, strict=True)], axis=-1) if kept else empty,
    )


def _weights(matrix: Matrix, weights: ArrayLike | None) -> Array:
    """Return gamma, checked."""
    n = len(matrix.column_stages)
    gamma = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if gamma.shape != (n,) or not np.all(gamma > 0) or not np.all(np.isfinite(gamma)):
        raise ConfigError("gamma is not one positive number a period", mend=f"give {n} positive weights, or none")
    return gamma


def curvature(weight_driven: ArrayLike, first_order: ArrayLike) -> Array:
    """Return W_k - w1_k, what the linear term ``w1_k = grad J_k(theta_k) . (theta_{k+1} - theta_k)`` leaves.

    For a quadratic cost it is ``1/2 D^T H D`` exactly.
    """
    found: Array = np.asarray(weight_driven, dtype=np.float64) - np.asarray(first_order, dtype=np.float64)
    return found


# intervals


PER_STAGE: dict[str, Callable[[Capacity], Array]] = {
    "cost": lambda one: one.cost,
    "cost_past": lambda one: one.cost_past,
    "cost_new": lambda one: one.cost_new,
    "femc": lambda one: one.femc,
    "clemc": lambda one: one.clemc,
    "increment": lambda one: one.increment,
    "weight_driven": lambda one: one.weight_driven,
    "data_driven": lambda one: one.data_driven,
}
"""Quantities with a value a row (or a step from row to row, which is named by the row it leads to)."""
PER_RUN: dict[str, Callable[[Capacity], Array]] = {
    "slope": lambda one: one.slope,
    "clemc_per_stage": lambda one: one.clemc_per_stage,
    "weight_driven_total": lambda one: one.weight_driven.sum(axis=-1) if len(one.stages) > 1 else one.slope,
    "data_driven_total": lambda one: one.data_driven.sum(axis=-1) if len(one.stages) > 1 else one.slope,
}
"""Quantities with one value a run."""
STEPS = ("increment", "weight_driven", "data_driven")


@dataclass(frozen=True)
class Estimate:
    """The quantities of a method with intervals: t over seeds, or for one seed the bootstrap over documents."""

    stages: tuple[int, ...]
    reference: ReferenceKind
    unit: str
    per_stage: Mapping[str, Mapping[int, Interval]]
    """Name -> row -> value; those in ``STEPS`` begin with the second row."""
    per_run: Mapping[str, Interval]
    n_seeds: int

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, NaN as None."""
        return {
            "estimator": NAME,
            "reference": self.reference,
            "unit": self.unit,
            "n_seeds": self.n_seeds,
            "stages": list(self.stages),
            "per_stage": {
                name: {str(k): interval_dict(one) for k, one in values.items()}
                for name, values in self.per_stage.items()
            },
            "per_run": {name: interval_dict(one) for name, one in self.per_run.items()},
        }


def interval_dict(one: Interval) -> dict[str, Any]:
    """Return a value with its interval as JSON-able values."""
    return {
        "value": finite_or_none(one.value),
        "low": finite_or_none(one.low),
        "high": finite_or_none(one.high),
        "n": one.n,
        "interval": one.kind,
        "reason": one.reason,
    }


def estimate(
    documents: Mapping[int, Documents],
    column_stages: Sequence[int],
    reference: Reference,
    *,
    weights: ArrayLike | None = None,
    first_column: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> Estimate:
    """Return the quantities of one method with their intervals.

    Several seeds: a t-interval over seeds. One seed: documents are resampled, the same ones for all checkpoints, and
    ``best_of_run`` is taken anew in every resample; the losses of an oracle are held fixed, so its noise is left out.

    Args:
        documents: per seed, of ``matrix.documents_of``; losses in nats.
        column_stages: periods, ``[C]``.
        reference: what excess is measured from.
        weights: gamma, see ``capacity_of``.
        first_column: see ``capacity_of``.
        n_resamples: of the bootstrap.
    """
    unit: Unit = "nats_per_token"
    per_seed = {seed: one.matrix(unit, column_stages) for seed, one in documents.items()}
    found = [capacity_of(excess(matrix, reference), weights, first_column=first_column) for matrix in per_seed.values()]
    resampled = None
    if len(found) == 1:
        ((_, only),) = documents.items()
        (draws,) = stats.resample([only], unit, column_stages, n_resamples=n_resamples, root="clemc")
        resampled = capacity_of(excess(draws, reference), weights, first_column=first_column)
    n_documents = next(iter(documents.values())).n
    reason = _first_reason(per_seed)

    def interval(values: list[float], draws: Array | None) -> Interval:
        if not all(math.isfinite(value) for value in values):
            return Interval(math.nan, n=len(values), reason=reason or "not defined in this row")
        if draws is None:
            return stats.t_interval(values)
        return stats.bootstrap_interval(values[0], draws, n_documents)

    per_stage = {}
    for name, get in PER_STAGE.items():
        rows = found[0].stages[1:] if name in STEPS else found[0].stages
        per_stage[name] = {
            row: interval(
                [float(get(one)[place]) for one in found], None if resampled is None else get(resampled)[:, place]
            )
            for place, row in enumerate(rows)
        }
    per_run = {
        name: interval([float(get(one)) for one in found], None if resampled is None else get(resampled))
        for name, get in PER_RUN.items()
    }
    return Estimate(found[0].stages, reference.kind, unit, per_stage, per_run, len(found))


def _first_reason(matrices: Mapping[int, Matrix]) -> str | None:
    """Return why a cell is missing, if one is."""
    return next((text for matrix in matrices.values() for text in matrix.reasons.values()), None)
