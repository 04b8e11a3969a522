"""A run's matrix cut into separate evaluation sets: one matrix and its summaries per group, or per change kind.

A slice is what ``summary`` computes for all documents, computed for some of them: a package of ``codedocs``, or the
documents that were new, changed or unchanged in their period. Periods in which a slice has next to no documents are
left out of its matrix, with the reason; what is then undefined is NaN, with the reason.

Regret needs the oracle's loss on the slice. A track freezes the oracle's losses on whole periods only, so it takes
a run whose last checkpoint is the oracle; without one, losses are plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clbench.errors import ConfigError, NotFoundError, did_you_mean
from clbench.results.matrix import Array, Documents, Matrix, Unit, documents_from_rows, mean_of
from clbench.results.metrics import METRICS
from clbench.results.store import RunStore
from clbench.results.summary import MethodSummary, Score, scores_of, summarise
from clbench.stream import Change

By = Literal["group", "change"]
SUMMARIES = ("backward", "in_distribution", "forward")
NO_DOCUMENTS = "no documents"
MIN_DOCUMENTS = 5
"""Per period: below that, a cell says more about the documents than about the model."""


@dataclass(frozen=True)
class Slice:
    """One method on some of the documents of a stream."""

    label: str
    """Of the method."""
    by: By
    name: str
    """The package, or the change kind."""
    n_documents: int
    """In the periods of the matrix."""
    n_tokens: int
    left_out: dict[int, str]
    """Period -> why it has no column."""
    matrix: Matrix
    """Mean over seeds; columns are the periods that have enough documents."""
    scores: dict[str, Score]
    """Plain losses."""
    regrets: dict[str, Score]
    """Against the oracle; empty without one."""
    documents: dict[int, Documents] = field(repr=False, compare=False)
    """Per seed."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, everything but the documents."""
        return {
            "method": self.label,
            "by": self.by,
            "name": self.name,
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "left_out": {str(period): reason for period, reason in self.left_out.items()},
            "matrix": self.matrix.as_dict(),
            "scores": {name: score.as_dict() for name, score in self.scores.items()},
            "regrets": {name: score.as_dict() for name, score in self.regrets.items()},
        }


def slices_of(
    runs: Sequence[RunStore],
    by: By = "group",
    *,
    metrics: Sequence[str] = SUMMARIES,
    suite: str = "heldout",
    unit: Unit = "nats_per_token",
    oracle: Sequence[RunStore] = (),
    min_documents: int = MIN_DOCUMENTS,
) -> list[Slice]:
    """Return one slice per group in alphabetical order, or one per change kind.

    Args:
        runs: of one method on one track, one per seed; see ``summary.summarise``.
        by: what makes a slice.
        metrics: names of METRICS.
        suite: whose rows are cut.
        unit: of matrices and scores.
        oracle: runs whose last checkpoint is the oracle (several are averaged), measured on the same documents.
        min_documents: periods with fewer of them are left out.

    Raises:
        ConfigError: see ``summarise``; or the oracle was measured on other documents.
        NotFoundError: no row is complete, or an unknown metric.
        IntegrityError: a file is broken.
    """
    if unknown := next((name for name in metrics if name not in METRICS), None):
        raise NotFoundError(f"unknown score {unknown!r}", mend=did_you_mean(unknown, METRICS))
    if min_documents < 1:
        raise ConfigError(f"min_documents is {min_documents}", mend="choose at least 1")
    whole = summarise(runs, suite=suite, unit=unit)
    stores = {int(store.config()["seed"]): store for store in runs}
    rows = {seed: _rows(stores[seed], suite, stores[seed].stages_done()) for seed in whole.seeds}
    oracle_rows = [_rows(store, suite, _last_row(store)) for store in oracle]
    names = _names(next(iter(rows.values())), by)
    return [
        _slice(
            whole,
            by,
            name,
            {seed: _cut(tables, by, name) for seed, tables in rows.items()},
            [_cut(tables, by, name) for tables in oracle_rows],
            metrics,
            min_documents,
        )
        for name in names
    ]


def _rows(store: RunStore, suite: str, stages: Sequence[int]) -> dict[int, pa.Table]:
    return {stage: store.rows(suite, stage) for stage in stages}


def _last_row(store: RunStore) -> list[int]:
    """Return the last complete row of the oracle's run."""
    done = store.stages_done()
    if not done:
        raise NotFoundError("the oracle has no complete row", where=store.folder, mend="measure it first")
    return [max(done)]


def _names(rows: dict[int, pa.Table], by: By) -> list[str]:
    """Return the slices that there are, in order."""
    found = {name for table in rows.values() for name in pc.unique(table[by]).to_pylist() if name}
    return [kind for kind in get_args(Change) if kind in found] if by == "change" else sorted(found, key=str.lower)


def _cut(rows: dict[int, pa.Table], by: By, name: str) -> Documents:
    """Return the documents of one slice."""
    if by == "group":
        return documents_from_rows(rows, group=name)
    return documents_from_rows(rows, change=name)


def _slice(
    whole: MethodSummary,
    by: By,
    name: str,
    documents: dict[int, Documents],
    oracle_documents: Sequence[Documents],
    metrics: Sequence[str],
    min_documents: int,
) -> Slice:
    first = next(iter(documents.values()))
    columns, left_out = _periods(first, [int(stage["index"]) for stage in whole.stages], min_documents)
    matrices = {seed: one.matrix(whole.unit, columns) for seed, one in documents.items()}
    here = np.isin(first.stage, columns)
    with_regret = [metric for metric in metrics if METRICS[metric].regret]
    regrets: dict[str, Score] = {}
    if oracle_documents:
        losses = _oracle_losses(first, oracle_documents)
        over = {seed: replace(one, value=one.value - losses) for seed, one in documents.items()}
        # Summed over documents, these are L - L*; and a resample draws the same documents for both.
        scores = scores_of(
            {seed: one.matrix(whole.unit, columns) for seed, one in over.items()}, over, None, with_regret
        )
        regrets = {metric: replace(score, regret=True) for metric, score in scores.items()}
    return Slice(
        label=whole.label,
        by=by,
        name=name,
        n_documents=int(here.sum()),
        n_tokens=int(first.n_tokens[here].sum()),
        left_out=left_out,
        matrix=mean_of(list(matrices.values())),
        scores=scores_of(matrices, documents, None, metrics),
        regrets=regrets,
        documents=documents,
    )


def _periods(documents: Documents, stages: Sequence[int], least: int) -> tuple[list[int], dict[int, str]]:
    """Return the periods that get a column, and why each other one gets none."""
    counts = {stage: int((documents.stage == stage).sum()) for stage in stages}
    left_out = {
        stage: f"period {stage} has {n} of the {least} documents that a column needs" if n else NO_DOCUMENTS
        for stage, n in counts.items()
        if n < least
    }
    return [stage for stage in stages if stage not in left_out], left_out


def _oracle_losses(documents: Documents, oracles: Sequence[Documents]) -> Array:
    """Return the oracle's loss on each document, summed over its tokens, shape ``[D]``."""
    for one in oracles:
        if not (np.array_equal(one.stage, documents.stage) and np.array_equal(one.item, documents.item)):
            raise ConfigError(
                "the oracle was not measured on the documents of these runs", mend="measure both on the same stream"
            )
    losses: Array = np.mean([one.value[-1] for one in oracles], axis=0)
    return losses
