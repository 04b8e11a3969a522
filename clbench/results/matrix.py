"""The stage x period matrix of losses, from measured rows; and the per-document arrays that resampling needs.

Legend: R rows (checkpoints: 0 is the base, k the release weights after stage k), C columns (periods),
D documents.
Rows and columns are named by their stage, never by their position: a matrix may hold any subset of either.
What cannot be computed is NaN, and ``Matrix.reason`` says why. No metric is computed here, see ``metrics``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clbench.errors import ConfigError, IntegrityError
from clbench.results.store import RunStore

Array = NDArray[np.float64]
Unit = Literal["nats_per_token", "bits_per_byte", "mean_value"]
"""``mean_value`` is the plain mean over items: accuracies and other scores of a suite."""


@dataclass(frozen=True)
class Matrix:
    """Losses of checkpoints on periods.

    ``values`` has shape ``[R, C]``, or ``[..., R, C]`` for many resamples of one matrix; lower is better.
    ``reasons`` maps (row stage, column stage) to why that cell is NaN.
    """

    values: Array
    row_stages: tuple[int, ...]
    column_stages: tuple[int, ...]
    unit: Unit = "nats_per_token"
    reasons: Mapping[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shape and order.

        Raises:
            ConfigError: the shape does not fit the stages, or stages are not ascending and unique.
        """
        if self.values.shape[-2:] != (len(self.row_stages), len(self.column_stages)):
            raise ConfigError(
                f"matrix of shape {self.values.shape} for {len(self.row_stages)} rows and "
                f"{len(self.column_stages)} columns",
                mend="give one row per checkpoint and one column per period",
            )
        for stages in (self.row_stages, self.column_stages):
            if list(stages) != sorted(set(stages)):
                raise ConfigError(f"stages {list(stages)} are not ascending and unique", mend="sort them")

    def at(self, row: int, column: int) -> Array:
        """Return the loss after stage ``row`` on period ``column``, shape ``[...]``."""
        cell: Array = self.values[..., self.row_stages.index(row), self.column_stages.index(column)]
        return cell

    def reason(self, row: int, column: int) -> str | None:
        """Return why a cell is not a number; None when it is one."""
        if row not in self.row_stages:
            return f"row {row} is not measured"
        if column not in self.column_stages:
            return f"period {column} is not measured"
        if np.all(np.isfinite(self.at(row, column))):
            return None
        return self.reasons.get((row, column), f"the loss after stage {row} on period {column} is missing")

    def as_dict(self) -> dict[str, Any]:
        """Return the matrix as JSON-able values, NaN as None."""
        return {
            "unit": self.unit,
            "row_stages": list(self.row_stages),
            "column_stages": list(self.column_stages),
            "values": [[finite_or_none(v) for v in row] for row in self.values.tolist()],
            "reasons": [{"row": row, "column": column, "reason": text} for (row, column), text in self.reasons.items()],
        }


@dataclass(frozen=True)
class Documents:
    """The measured documents of one run, aligned: one column per document of one period.

    ``value`` has shape ``[R, D]`` (``nll_nats``: summed over the document; NaN where a row lacks it),
    everything else ``[D]``. Documents are ordered by (stage, item); the same ``item`` in two stages is two
    versions of one identity.
    """

    value: Array
    row_stages: tuple[int, ...]
    stage: NDArray[np.int64]
    item: NDArray[np.str_]
    n_tokens: NDArray[np.int64]
    n_bytes: NDArray[np.int64]

    @property
    def n(self) -> int:
        """Number of (period, document) pairs."""
        return len(self.stage)

    def per(self, unit: Unit) -> Array:
        """Return what each document weighs in the denominator of ``unit``, shape ``[D]``.

        bits per byte = nats / (ln 2 * bytes), so ln 2 is part of the weight.
        """
        if unit == "nats_per_token":
            return self.n_tokens.astype(np.float64)
        if unit == "bits_per_byte":
            return self.n_bytes.astype(np.float64) * math.log(2)
        return np.ones(self.n)

    def matrix(self, unit: Unit, column_stages: Sequence[int] | None = None) -> Matrix:
        """Return the matrix: sum of values / sum of weights, per row and period."""
        columns = tuple(sorted(set(self.stage.tolist()))) if column_stages is None else tuple(column_stages)
        values = np.full((len(self.row_stages), len(columns)), np.nan)
        reasons: dict[tuple[int, int], str] = {}
        weights = self.per(unit)
        for place, column in enumerate(columns):
            here = self.stage == column
            total = weights[here].sum()
            if total > 0:
                # Row by row: a row's last bits must not depend on how many rows there are.
                values[:, place] = [row.copy().sum() / total for row in self.value[:, here]]
            for r, row in enumerate(self.row_stages):
                if not np.isfinite(values[r, place]):
                    values[r, place] = np.nan
                    reasons[row, column] = _why(self.value[r, here], row, column)
        return Matrix(values, self.row_stages, columns, unit, reasons)


def _why(values: Array, row: int, column: int) -> str:
    """Return why the cell of these documents is not a number."""
    if len(values) == 0:
        return f"period {column} has no documents"
    if missing := int(np.isnan(values).sum()):
        return f"{missing} of {len(values)} documents of period {column} are missing after stage {row}"
    if not np.all(np.isfinite(values)):
        return f"the loss after stage {row} on period {column} is infinite"
    return f"the documents of period {column} hold no tokens or bytes"


def documents_from_rows(
    rows: Mapping[int, pa.Table],
    *,
    change: str | None = None,
    group: str | None = None,
    metric: str = "nll_nats",
) -> Documents:
    """Align the rows of several checkpoints.

    Args:
        rows: row stage -> table of ROWS_SCHEMA.
        change: keep only documents of this change kind.
        group: keep only documents of this group.
        metric: keep only rows of this metric.

    Raises:
        IntegrityError: a document is there twice, or its token or byte count differs between checkpoints.
    """
    tables = {row: _Columns.of(_select(table, metric, change, group), row) for row, table in sorted(rows.items())}
    keys = sorted(set().union(*(columns.place for columns in tables.values()))) if tables else []
    value = np.full((len(tables), len(keys)), np.nan)
    counts = np.full((2, len(keys)), -1, dtype=np.int64)
    index = {key: place for place, key in enumerate(keys)}
    for r, (row, columns) in enumerate(tables.items()):
        at = np.array([index[key] for key in columns.place], dtype=np.int64)
        value[r, at] = columns.value
        differs = (counts[:, at] >= 0) & (counts[:, at] != columns.counts)
        if differs.any():
            stage, item = keys[at[int(np.argmax(differs.any(axis=0)))]]
            raise IntegrityError(
                f"document {item!r} of period {stage} has another length after stage {row} than before",
                mend="measure all checkpoints of a run on the same stream with the same tokenizer",
            )
        counts[:, at] = columns.counts
    return Documents(
        value=value,
        row_stages=tuple(tables),
        stage=np.array([stage for stage, _ in keys], dtype=np.int64),
        item=np.array([item for _, item in keys], dtype=np.str_),
        n_tokens=counts[0],
        n_bytes=counts[1],
    )


@dataclass(frozen=True)
class _Columns:
    """One table: ``place`` maps (stage, item) to the position, ``counts`` is tokens and bytes [2, n]."""

    place: dict[tuple[int, str], int]
    value: Array
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, table: pa.Table, row: int) -> _Columns:
        if any(table[name].null_count for name in ("item", "stage", "value", "n_tokens", "n_bytes")):
            raise IntegrityError(
                f"the rows after stage {row} have empty cells",
                mend="delete the rows of this stage and run again",
            )
        keys = list(zip(table["stage"].to_pylist(), table["item"].to_pylist(), strict=True))
        place = {key: n for n, key in enumerate(keys)}
        if len(place) < len(keys):
            twice = next(key for n, key in enumerate(keys) if place[key] != n)
            raise IntegrityError(
                f"document {twice[1]!r} of period {twice[0]} is measured twice after stage {row}",
                mend="delete the rows of this stage and run again",
            )
        counts = np.stack([table["n_tokens"].to_numpy(), table["n_bytes"].to_numpy()]).astype(np.int64)
        return cls(place, table["value"].to_numpy().astype(np.float64), counts)


def _select(table: pa.Table, metric: str, change: str | None, group: str | None) -> pa.Table:
    """Return the rows of one metric, one change kind and one group."""
    for name, wanted in (("metric", metric), ("change", change), ("group", group)):
        if wanted is not None:
            table = table.filter(pc.equal(table[name], wanted))
    return table


def from_rows(
    rows: Mapping[int, pa.Table],
    unit: Unit = "nats_per_token",
    *,
    change: str | None = None,
    group: str | None = None,
    metric: str = "nll_nats",
    column_stages: Sequence[int] | None = None,
) -> Matrix:
    """Return the matrix of measured rows, see ``documents_from_rows``; columns are the periods found."""
    documents = documents_from_rows(rows, change=change, group=group, metric=metric)
    return documents.matrix(unit, column_stages)


def documents_of(
    store: RunStore,
    suite: str = "heldout",
    *,
    change: str | None = None,
    group: str | None = None,
    metric: str = "nll_nats",
) -> Documents:
    """Return the aligned documents of a run's complete rows."""
    rows = {stage: store.rows(suite, stage) for stage in store.stages_done()}
    return documents_from_rows(rows, change=change, group=group, metric=metric)


def matrix_of(
    store: RunStore,
    suite: str = "heldout",
    unit: Unit = "nats_per_token",
    *,
    change: str | None = None,
    group: str | None = None,
    metric: str = "nll_nats",
) -> Matrix:
    """Return the matrix of a run's complete rows; its columns are all stages of the stream."""
    documents = documents_of(store, suite, change=change, group=group, metric=metric)
    return documents.matrix(unit, stage_indices(store))


def stage_indices(store: RunStore) -> tuple[int, ...]:
    """Return the indices of all stages of the run's stream.

    Raises:
        IntegrityError: run.yaml does not list them.
    """
    try:
        return tuple(sorted(int(stage["index"]) for stage in store.config()["stages"]))
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(
            "run.yaml does not list its stages", where=store.folder, mend="restore the file or run again"
        ) from None


def mean_of(matrices: Sequence[Matrix]) -> Matrix:
    """Return the cell-wise mean over seeds; a cell that any seed lacks is NaN, with that seed's reason.

    Raises:
        ConfigError: there is none, or their rows, columns or units differ.
    """
    if not matrices:
        raise ConfigError("no matrix to average")
    first = matrices[0]
    for other in matrices[1:]:
        if (other.row_stages, other.column_stages, other.unit) != (
            first.row_stages,
            first.column_stages,
            first.unit,
        ):
            raise ConfigError("matrices of different shape cannot be averaged", mend="finish all seeds first")
    reasons = {cell: text for matrix in reversed(matrices) for cell, text in matrix.reasons.items()}
    values: Array = np.mean([matrix.values for matrix in matrices], axis=0)
    return Matrix(values, first.row_stages, first.column_stages, first.unit, reasons)


def negated(matrix: Matrix) -> Matrix:
    """Return scores as losses, or losses as scores: every metric here wants lower = better."""
    return Matrix(-matrix.values, matrix.row_stages, matrix.column_stages, matrix.unit, matrix.reasons)


def finite_or_none(value: float) -> float | None:
    """Return a JSON-able number: NaN and infinity become None."""
    return float(value) if math.isfinite(value) else None
