"""Retention, plasticity and transfer from a matrix of losses: pure functions with named variants.

One convention: **losses go in, lower is better** (``matrix.negated`` turns accuracies into losses). What is
called forgetting is positive when the model got worse; what is called transfer or retention is larger when it
got better.

Notation: ``L[k][i]`` loss after stage k on period i; row 0 the base; ``z`` the last row; ``L*`` the oracle.
*Tasks* are the periods that have their own row (stage in both rows and columns), from ``first_column`` on.
Every function returns a ``Value``: NaN with a reason where the metric is undefined, never 0. All of them also
work on ``[..., R, C]``, many resamples of a matrix at once: so ``stats`` gets intervals of any of them.
Formulas and their sources: docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clbench.errors import ConfigError
from clbench.results.matrix import Array, Matrix

Cell = tuple[int, int]
"""(row stage, column stage)."""


@dataclass(frozen=True)
class Value:
    """A metric's value, shape ``[...]`` of the matrix, or NaN and why."""

    array: Array
    reason: str | None = None

    @property
    def value(self) -> float:
        """The number of a single matrix."""
        return float(self.array)


def _undefined(matrix: Matrix, reason: str) -> Value:
    return Value(np.full(matrix.values.shape[:-2], np.nan), reason)


def _result(matrix: Matrix, array: Array, cells: Sequence[Cell]) -> Value:
    """Return the value, with the first missing cell as the reason where it is NaN."""
    if np.all(np.isfinite(array)):
        return Value(array)
    reasons = (matrix.reason(*cell) for cell in cells)
    return Value(array, next((reason for reason in reasons if reason), "the oracle lacks a period"))


def _mean(matrix: Matrix, terms: Sequence[Array], cells: Sequence[Cell], empty: str) -> Value:
    """Return the flat mean of the terms; ``empty`` is the reason when there are none."""
    if not terms:
        return _undefined(matrix, empty)
    return _result(matrix, np.mean(np.stack(terms), axis=0), cells)


def _mean_of_cells(matrix: Matrix, cells: Sequence[Cell], oracle: Array | None, empty: str) -> Value:
    """Return the flat mean of L[k][i], or of L[k][i] - L*[i]."""
    if oracle is not None and np.shape(oracle) != (len(matrix.column_stages),):
        raise ConfigError(
            f"the oracle has {np.size(oracle)} losses for {len(matrix.column_stages)} periods",
            mend="give one per period",
        )
    floor = np.zeros(len(matrix.column_stages)) if oracle is None else np.asarray(oracle, dtype=np.float64)
    terms = [matrix.at(k, i) - floor[matrix.column_stages.index(i)] for k, i in cells]
    return _mean(matrix, terms, cells, empty)


def _cells(matrix: Matrix, first_row: int, first_column: int) -> list[Cell]:
    return [(k, i) for k in matrix.row_stages if k >= first_row for i in matrix.column_stages if i >= first_column]


# TiC-LM's three summaries: flat means over the strict lower triangle, the diagonal, the strict upper triangle


def backward(matrix: Matrix, oracle: Array | None = None, *, first_row: int = 1, first_column: int = 0) -> Value:
    """Return the mean loss on periods before the checkpoint, k > i; lower is better.

    mean over {k > i} of L[k][i], or of L[k][i] - L*[i] with an oracle. ``first_column=1`` leaves out what the
    base was trained on, as TiC-LM's table does.
    """
    cells = [(k, i) for k, i in _cells(matrix, first_row, first_column) if k > i]
    return _mean_of_cells(matrix, cells, oracle, "no checkpoint later than a period")


def in_distribution(matrix: Matrix, oracle: Array | None = None, *, first_row: int = 1, first_column: int = 0) -> Value:
    """Return the mean loss of each checkpoint on its own period, k = i; lower is better (more plastic).

    The base's own cell L[0][0] is left out unless ``first_row=0``: no method had a hand in it.
    """
    cells = [(k, i) for k, i in _cells(matrix, first_row, first_column) if k == i]
    return _mean_of_cells(matrix, cells, oracle, "no checkpoint has its own period")


def forward(matrix: Matrix, oracle: Array | None = None, *, first_row: int = 1, first_column: int = 0) -> Value:
    """Return the mean loss on periods after the checkpoint, k < i; lower is better.

    The base's row is left out unless ``first_row=0``: it is the same for all methods.
    """
    cells = [(k, i) for k, i in _cells(matrix, first_row, first_column) if k < i]
    return _mean_of_cells(matrix, cells, oracle, "no checkpoint earlier than a period")


# tasks


def _tasks(matrix: Matrix, first_column: int) -> list[int]:
    """Return the periods that have their own row."""
    return [i for i in matrix.column_stages if i >= first_column and i in matrix.row_stages]


def _past(matrix: Matrix, first_column: int) -> tuple[list[int], int]:
    """Return the tasks before the last row, and the last row."""
    last = matrix.row_stages[-1] if matrix.row_stages else -1
    return [i for i in _tasks(matrix, first_column) if i < last], last


TINY = 1e-12
"""A denominator below this is rounding noise, in nats or bits."""
NO_PAST = "one task only: nothing that could be forgotten yet"


def final(matrix: Matrix, *, first_column: int = 0) -> Value:
    """Return the mean loss of the last checkpoint on all tasks so far, mean_i L[z][i]; lower is better.

    The negative of GEM's ACC.
    """
    last = matrix.row_stages[-1] if matrix.row_stages else -1
    cells = [(last, i) for i in _tasks(matrix, first_column)]
    return _mean_of_cells(matrix, cells, None, "no task is measured")


def learning(matrix: Matrix, *, first_column: int = 0) -> Value:
    """Return the mean loss on each task right after it was trained, mean_i L[i][i]; lower is better.

    The negative of learning accuracy (Riemer et al.). ``final = learning - (T-1)/T * bwt`` over the same T
    tasks when the last row is one of them.
    """
    cells = [(i, i) for i in _tasks(matrix, first_column)]
    return _mean_of_cells(matrix, cells, None, "no task is measured")


def bwt(matrix: Matrix, *, first_column: int = 0) -> Value:
    """Return backward transfer, 1/(T-1) sum_{i<z} (L[i][i] - L[z][i]); positive = old periods got better.

    GEM's definition, divided by T - 1 (GEM's own code divides by T: a factor (T-1)/T).
    """
    past, last = _past(matrix, first_column)
    terms = [matrix.at(i, i) - matrix.at(last, i) for i in past]
    return _mean(matrix, terms, [cell for i in past for cell in ((i, i), (last, i))], NO_PAST)


def fwt(matrix: Matrix) -> Value:
    """Return forward transfer, mean_i (L[0][i] - L[i'][i]); positive = the past helped the future.

    i' is the last checkpoint before i that was trained here (1 <= i' < i), so i starts at 2; the baseline is
    the base (row 0), not a random initialisation as in GEM.
    """
    if 0 not in matrix.row_stages:
        return _undefined(matrix, "row 0 (the base) is not measured")
    before = {i: [k for k in matrix.row_stages if 1 <= k < i] for i in matrix.column_stages}
    pairs = [(rows[-1], i) for i, rows in before.items() if rows]
    terms = [matrix.at(0, i) - matrix.at(k, i) for k, i in pairs]
    return _mean(matrix, terms, [*pairs, *((0, i) for _, i in pairs)], "no trained checkpoint before a period")


def forgetting_first(matrix: Matrix, *, first_column: int = 0) -> Value:
    """Return how much worse the last checkpoint is than right after training, mean_{i<z} (L[z][i] - L[i][i]).

    First minus last as in avalanche, = -bwt; positive = forgot. With ``first_column=0`` the base's own period
    is a task like the others; its forgetting alone is ``forgetting_of_base``.
    """
    value = bwt(matrix, first_column=first_column)
    return Value(0.0 - value.array, value.reason)


def forgetting_of_base(matrix: Matrix) -> Value:
    """Return how much worse the last checkpoint is on what the base was trained on, L[z][0] - L[0][0]."""
    past, last = _past(matrix, 0)
    if 0 not in past:
        return _undefined(matrix, "the base or its period is not measured, or nothing was trained after it")
    return _result(matrix, matrix.at(last, 0) - matrix.at(0, 0), [(last, 0), (0, 0)])


def forgetting_max(matrix: Matrix, *, rows: Literal["before_last", "all"] = "before_last", base: bool = True) -> Value:
    """Return max-minus-last forgetting, mean_{i<z} (L[z][i] - min_k L[k][i]); positive = forgot.

    ``rows="before_last"``: k < z, also rows before i was trained (A-GEM's code); can be negative.
    ``rows="all"``: k <= z (mammoth), so it is >= 0 per task. ``base=False`` leaves row 0 out of the best and
    period 0 out of the tasks; ``base=True`` makes it regret against the base too. Always >= -bwt over the
    same tasks.
    """
    past, last = _past(matrix, 0 if base else 1)
    best = [k for k in matrix.row_stages if (base or k >= 1) and (rows == "all" or k < last)]
    cells = [(k, i) for i in past for k in [*best, last]]
    terms = [matrix.at(last, i) - np.min(np.stack([matrix.at(k, i) for k in best]), axis=0) for i in past]
    return _mean(matrix, terms, cells, NO_PAST)


def intransigence(matrix: Matrix, oracle: Array) -> Value:
    """Return how much worse each period is learnt than by the oracle, mean_{k>=1} (L[k][k] - L*[k]).

    Chaudhry's I_k averaged over stages; positive = failed to learn. The reference here is one model trained
    on all stages, not one per k, so this is ``in_distribution`` as regret, under the name that papers use.
    """
    return in_distribution(matrix, oracle)


def worst_since(matrix: Matrix, *, first_column: int = 0) -> Value:
    """Return the worst loss on past tasks since each was finished; lower is better.

    mean_{i<z} max_{i<k<=z} L[k][i], the negative of min-ACC (De Lange), at stage ends only: it misses the
    dips within a stage, and depends on how often is measured.
    """
    past, last = _past(matrix, first_column)
    cells = [(k, i) for i in past for k in matrix.row_stages if i < k <= last]
    terms = [_worst(matrix, i) for i in past]
    return _mean(matrix, terms, cells, NO_PAST)


def worst_case(matrix: Matrix, *, first_column: int = 0) -> Value:
    """Return (L[z][z] + sum_{i<z} max_{i<k<=z} L[k][i]) / T; lower is better, never below ``final``.

    The negative of WC-ACC (De Lange).
    """
    past, last = _past(matrix, first_column)
    if last not in matrix.column_stages:
        return _undefined(matrix, "the last checkpoint's own period is not measured")
    cells = [(last, last), *((k, i) for i in past for k in matrix.row_stages if i < k <= last)]
    return _mean(matrix, [matrix.at(last, last), *(_worst(matrix, i) for i in past)], cells, NO_PAST)


def _worst(matrix: Matrix, column: int) -> Array:
    """Return the largest loss on a period over the rows after its own."""
    worst: Array = np.max(np.stack([matrix.at(k, column) for k in matrix.row_stages if k > column]), axis=0)
    return worst


# retention


def retention(matrix: Matrix, *, reference: Literal["first", "base"] = "first", first_column: int = 0) -> Value:
    """Return kept probability, mean_{i<z} exp(L[ref][i] - L[z][i]); 1 = kept all, below 1 = forgot.

    The ratio of the geometric-mean probability of a token (in bits per byte: of a byte, with 2 for e) between
    the last checkpoint and ``reference``: "first" = right after training i; "base" = row 0. There is no
    standard; this is ours.
    """
    past, last = _past(matrix, first_column)
    refs = {i: i if reference == "first" else 0 for i in past}
    if reference == "base" and 0 not in matrix.row_stages:
        return _undefined(matrix, "row 0 (the base) is not measured")
    power = np.exp2 if matrix.unit == "bits_per_byte" else np.exp
    terms = [power(matrix.at(refs[i], i) - matrix.at(last, i)) for i in past]
    return _mean(matrix, terms, [cell for i in past for cell in ((refs[i], i), (last, i))], NO_PAST)


def gain_kept(matrix: Matrix) -> Value:
    """Return the share of what training gained over the base that is left at the end, over 1 <= i < z.

    sum_i (L[0][i] - L[z][i]) / sum_i (L[0][i] - L[i][i]), a ratio of sums. Undefined where training gained
    nothing.
    """
    past, last = _past(matrix, 1)
    if not past:
        return _undefined(matrix, NO_PAST)
    if 0 not in matrix.row_stages:
        return _undefined(matrix, "row 0 (the base) is not measured")
    kept = sum((matrix.at(0, i) - matrix.at(last, i) for i in past), np.zeros(()))
    gained = sum((matrix.at(0, i) - matrix.at(i, i) for i in past), np.zeros(()))
    cells = [cell for i in past for cell in ((0, i), (i, i), (last, i))]
    return _ratio(matrix, kept, gained, cells, "training gained nothing over the base")


def recovery(matrix: Matrix, *, first_column: int = 0) -> Value:
    """Return the share of the worst forgetting that is made good by the end; 1 = all, 0 = none.

    sum_i (max_{k>=i} L[k][i] - L[z][i]) / sum_i (max_{k>=i} L[k][i] - L[i][i]) over tasks with at least two
    later checkpoints. Undefined where nothing was ever forgotten.
    """
    past, last = _past(matrix, first_column)
    past = [i for i in past if sum(k > i for k in matrix.row_stages) >= 2]
    if not past:
        return _undefined(matrix, "no task has two later checkpoints")
    worst = [np.maximum(_worst(matrix, i), matrix.at(i, i)) for i in past]
    regained = sum((w - matrix.at(last, i) for w, i in zip(worst, past, strict=True)), np.zeros(()))
    lost = sum((w - matrix.at(i, i) for w, i in zip(worst, past, strict=True)), np.zeros(()))
    cells = [(k, i) for i in past for k in matrix.row_stages if k >= i]
    return _ratio(matrix, regained, lost, cells, "nothing was ever forgotten")


def _ratio(matrix: Matrix, part: Array, whole: Array, cells: Sequence[Cell], reason: str) -> Value:
    """Return part / whole, NaN where the whole is not positive."""
    positive = whole > TINY
    array = np.where(positive, part / np.where(positive, whole, 1.0), np.nan)
    missing = next((text for cell in cells if (text := matrix.reason(*cell))), None)
    return Value(array, None if np.all(np.isfinite(array)) else missing or reason)


def score_retention(first: Array, last: Array, chance: Array | float = 0.0) -> Value:
    """Return chance-corrected retention of accuracies, mean_i (last - chance) / (first - chance).

    Args:
        first: score right after training, shape ``[C]``, higher is better.
        last: score at the end, shape ``[C]``.
        chance: score of guessing; 0 gives the plain ratio.

    Undefined where a first score does not exceed chance.
    """
    first, last = np.asarray(first, dtype=np.float64), np.asarray(last, dtype=np.float64)
    above = first - chance
    if first.size == 0:
        return Value(np.array(np.nan), NO_PAST)
    if not np.all(above > 0):
        return Value(np.array(np.nan), "a score right after training does not exceed chance")
    return Value(np.array(np.mean((last - chance) / above)))


# the table of metrics


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named metric as pages and tables show it.

    ``compute(matrix, oracle)``; ``regret`` says whether an oracle, where there is one, is subtracted.
    """

    name: str
    title: str
    direction: Literal["lower", "higher"]
    """Which way is better."""
    unit: Literal["loss", "ratio"]
    """``loss``: the matrix's unit, nats per token or bits per byte; ``ratio``: none."""
    description: str
    formula: str
    compute: Callable[[Matrix, Array | None], Value]
    regret: bool = False


def _needs_oracle(matrix: Matrix, oracle: Array | None) -> Value:
    return _undefined(matrix, "the track has no oracle") if oracle is None else intransigence(matrix, oracle)


_ALL = (
    Metric(
        name="backward",
        title="Backward",
        direction="lower",
        unit="loss",
        regret=True,
        description="Loss on periods before the checkpoint: what was kept of the past.",
        formula="mean over k > i, k ≥ 1 of L[k][i] (− L*[i])",
        compute=backward,
    ),
    Metric(
        name="in_distribution",
        title="In-distribution",
        direction="lower",
        unit="loss",
        regret=True,
        description="Loss of each checkpoint on its own period: how well the new was learnt (plasticity).",
        formula="mean over k ≥ 1 of L[k][k] (− L*[k])",
        compute=in_distribution,
    ),
    Metric(
        name="forward",
        title="Forward",
        direction="lower",
        unit="loss",
        regret=True,
        description="Loss on periods after the checkpoint: how fast it goes stale.",
        formula="mean over 1 ≤ k < i of L[k][i] (− L*[i])",
        compute=forward,
    ),
    Metric(
        name="forgetting_first",
        title="Forgetting",
        direction="lower",
        unit="loss",
        description="How much worse past periods are at the end than right after training on them.",
        formula="mean over i < z of L[z][i] − L[i][i]  (= −BWT)",
        compute=lambda matrix, _: forgetting_first(matrix),
    ),
    Metric(
        name="retention",
        title="Retention",
        direction="higher",
        unit="ratio",
        description="Probability of old text at the end, over that right after training on it.",
        formula="mean over i < z of exp(L[i][i] − L[z][i])  (2^… in bits per byte)",
        compute=lambda matrix, _: retention(matrix),
    ),
    Metric(
        name="final",
        title="Final loss",
        direction="lower",
        unit="loss",
        description="Loss of the last checkpoint, averaged over all periods so far.",
        formula="mean over i ≤ z of L[z][i]  (= −ACC)",
        compute=lambda matrix, _: final(matrix),
    ),
    Metric(
        name="learning",
        title="Learning loss",
        direction="lower",
        unit="loss",
        description="Loss on each period right after it was trained, the base's own period included.",
        formula="mean over i of L[i][i]  (= −LA)",
        compute=lambda matrix, _: learning(matrix),
    ),
    Metric(
        name="bwt",
        title="BWT",
        direction="higher",
        unit="loss",
        description="Backward transfer: how much past periods gained (positive) or lost by the end.",
        formula="1/(T−1) · sum over i < z of L[i][i] − L[z][i]",
        compute=lambda matrix, _: bwt(matrix),
    ),
    Metric(
        name="fwt",
        title="FWT",
        direction="higher",
        unit="loss",
        description="Forward transfer: how much earlier stages helped a period before it was trained.",
        formula="mean over i ≥ 2 of L[0][i] − L[i−1][i]",
        compute=lambda matrix, _: fwt(matrix),
    ),
    Metric(
        name="forgetting_max",
        title="Forgetting (max)",
        direction="lower",
        unit="loss",
        description="How much worse the last checkpoint is than the best before it, base included (A-GEM).",
        formula="mean over i < z of L[z][i] − min over k < z of L[k][i]",
        compute=lambda matrix, _: forgetting_max(matrix),
    ),
    Metric(
        name="forgetting_max_all",
        title="Forgetting (max, all rows)",
        direction="lower",
        unit="loss",
        description="As forgetting (max), the last checkpoint among the candidates: never negative.",
        formula="mean over i < z of L[z][i] − min over k ≤ z of L[k][i]",
        compute=lambda matrix, _: forgetting_max(matrix, rows="all"),
    ),
    Metric(
        name="forgetting_max_trained",
        title="Forgetting (max, without the base)",
        direction="lower",
        unit="loss",
        description="As forgetting (max), without row 0 and without the base's own period.",
        formula="mean over 1 ≤ i < z of L[z][i] − min over 1 ≤ k < z of L[k][i]",
        compute=lambda matrix, _: forgetting_max(matrix, base=False),
    ),
    Metric(
        name="forgetting_of_base",
        title="Forgetting of the base",
        direction="lower",
        unit="loss",
        description="How much worse the last checkpoint is than the base on what the base was trained on.",
        formula="L[z][0] − L[0][0]",
        compute=lambda matrix, _: forgetting_of_base(matrix),
    ),
    Metric(
        name="backward_trained",
        title="Backward (TiC-LM)",
        direction="lower",
        unit="loss",
        regret=True,
        description="Backward without the base's own period, exactly as TiC-LM averages.",
        formula="mean over k > i ≥ 1 of L[k][i] (− L*[i])",
        compute=lambda matrix, oracle: backward(matrix, oracle, first_column=1),
    ),
    Metric(
        name="intransigence",
        title="Intransigence",
        direction="lower",
        unit="loss",
        description="How much worse each period is learnt than by the oracle.",
        formula="mean over k ≥ 1 of L[k][k] − L*[k]",
        compute=_needs_oracle,
    ),
    Metric(
        name="worst_since",
        title="Worst since",
        direction="lower",
        unit="loss",
        description="Worst loss on past periods since each was trained, at stage ends (min-ACC for losses).",
        formula="mean over i < z of max over i < k ≤ z of L[k][i]",
        compute=lambda matrix, _: worst_since(matrix),
    ),
    Metric(
        name="worst_case",
        title="Worst case",
        direction="lower",
        unit="loss",
        description="Worst-since together with the current period (WC-ACC for losses).",
        formula="(L[z][z] + sum over i < z of max over i < k ≤ z of L[k][i]) / T",
        compute=lambda matrix, _: worst_case(matrix),
    ),
    Metric(
        name="retention_base",
        title="Retention against the base",
        direction="higher",
        unit="ratio",
        description="Probability that the last checkpoint gives text of past periods, relative to the base.",
        formula="mean over i < z of exp(L[0][i] − L[z][i])",
        compute=lambda matrix, _: retention(matrix, reference="base"),
    ),
    Metric(
        name="gain_kept",
        title="Gain kept",
        direction="higher",
        unit="ratio",
        description="Share of what training gained over the base on past periods that is left at the end.",
        formula="sum over 1 ≤ i < z of (L[0][i] − L[z][i]) / sum of (L[0][i] − L[i][i])",
        compute=lambda matrix, _: gain_kept(matrix),
    ),
    Metric(
        name="recovery",
        title="Recovery",
        direction="higher",
        unit="ratio",
        description="Share of the worst forgetting that is made good by the end.",
        formula="sum over i of (W[i] − L[z][i]) / sum of (W[i] − L[i][i]), W[i] = max over k ≥ i of L[k][i]",
        compute=lambda matrix, _: recovery(matrix),
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every metric by name, main ones first."""
MAIN = ("backward", "in_distribution", "forward", "forgetting_first", "retention", "final")
"""The columns of the leaderboard."""
