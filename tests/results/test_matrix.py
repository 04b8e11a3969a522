"""The matrix from rows, and what is said about cells that cannot be computed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clbench.errors import ConfigError, IntegrityError
from clbench.results.matrix import Matrix, documents_from_rows, from_rows, matrix_of, mean_of
from clbench.results.store import ROWS_SCHEMA
from tests.synthetic_runs import pooled, write_run


def table(rows: list[tuple[str, int, float, int, int]], **same: str) -> pa.Table:
    """Rows of (item, stage, value, n_tokens, n_bytes)."""
    facts = {"metric": "nll_nats", "group": "numpy", "change": "new", **same}
    names = ("item", "stage", "value", "n_tokens", "n_bytes")
    return pa.Table.from_pylist([{**dict(zip(names, row, strict=True)), **facts} for row in rows], schema=ROWS_SCHEMA)


TWO_DOCUMENTS = [("a", 0, 10.0, 5, 20), ("b", 0, 2.0, 1, 10), ("a", 1, 9.0, 3, 12)]


def test_a_cell_is_a_ratio_of_sums() -> None:
    matrix = from_rows({0: table(TWO_DOCUMENTS)})
    assert matrix.values.tolist() == [[12 / 6, 9 / 3]]
    bits = from_rows({0: table(TWO_DOCUMENTS)}, "bits_per_byte")
    assert bits.values[0] == pytest.approx([12 / math.log(2) / 30, 9 / math.log(2) / 12])
    assert from_rows({0: table(TWO_DOCUMENTS)}, "mean_value").values.tolist() == [[6.0, 9.0]]


def test_order_of_rows_does_not_matter() -> None:
    later = [("a", 1, 6.0, 3, 12), ("b", 0, 1.0, 1, 10), ("a", 0, 5.0, 5, 20)]
    matrix = from_rows({2: table(later), 0: table(TWO_DOCUMENTS)})
    assert matrix.row_stages == (0, 2)
    assert matrix.values.tolist() == [[2.0, 3.0], [1.0, 2.0]]


def test_change_group_and_metric_are_selected() -> None:
    both = pa.concat_tables(
        [
            table([("a", 0, 4.0, 2, 8)], change="new", group="numpy"),
            table([("b", 0, 9.0, 3, 9)], change="changed", group="django"),
            table([("b", 0, 1.0, 1, 1)], metric="accuracy"),
        ]
    )
    assert from_rows({0: both}, change="new").values.tolist() == [[2.0]]
    assert from_rows({0: both}, group="django").values.tolist() == [[3.0]]
    assert from_rows({0: both}, "mean_value", metric="accuracy").values.tolist() == [[1.0]]
    assert from_rows({0: both}).values.tolist() == [[13 / 5]]


def test_missing_cells_say_why() -> None:
    matrix = from_rows(
        {
            0: table(TWO_DOCUMENTS),
            1: table(TWO_DOCUMENTS[1:]),
            2: table([("a", 0, math.inf, 5, 20), *TWO_DOCUMENTS[1:]]),
        },
        column_stages=(0, 1, 2),
    )
    assert np.isnan(matrix.values).tolist() == [
        [False, False, True],
        [True, False, True],
        [True, False, True],
    ]
    assert matrix.reason(0, 0) is None
    assert matrix.reason(1, 0) == "1 of 2 documents of period 0 are missing after stage 1"
    assert matrix.reason(2, 0) == "the loss after stage 2 on period 0 is infinite"
    assert matrix.reason(0, 2) == "period 2 has no documents"
    assert matrix.reason(7, 0) == "row 7 is not measured"
    assert matrix.as_dict()["values"][0] == [2.0, 3.0, None]


def test_documents_without_tokens() -> None:
    matrix = from_rows({0: table([("a", 0, 0.0, 0, 0)])})
    assert math.isnan(matrix.values[0, 0])
    assert "no tokens" in (matrix.reason(0, 0) or "")


def test_no_rows_at_all() -> None:
    assert from_rows({0: table([])}).values.shape == (1, 0)
    assert documents_from_rows({}).n == 0


def test_broken_rows_are_refused() -> None:
    with pytest.raises(IntegrityError, match="'a' of period 0 is measured twice after stage 3"):
        from_rows({3: table([("a", 0, 1.0, 1, 1), ("a", 0, 1.0, 1, 1)])})
    with pytest.raises(IntegrityError, match="'a' of period 0 has another length after stage 1"):
        from_rows({0: table([("a", 0, 1.0, 7, 1)]), 1: table([("a", 0, 1.0, 8, 1)])})
    empty_cell = table([("a", 0, 1.0, 1, 1)]).set_column(3, "value", pa.array([None], pa.float64()))
    with pytest.raises(IntegrityError, match="empty cells"):
        from_rows({0: empty_cell})


def test_matrix_of_a_run(tmp_path: Path) -> None:
    store = write_run(tmp_path, n_stages=4, n_rows=3)
    for unit in ("nats_per_token", "bits_per_byte"):
        matrix = matrix_of(store, unit=unit)
        assert matrix.row_stages == (0, 1, 2)
        assert matrix.column_stages == (0, 1, 2, 3)
        expected = [pooled(store.rows("heldout", row), 4)[unit] for row in range(3)]
        np.testing.assert_allclose(matrix.values, expected, rtol=1e-12)


def test_matrix_of_a_run_without_stages(tmp_path: Path) -> None:
    store = write_run(tmp_path)
    store.write_config({**store.config(), "stages": "four"})
    with pytest.raises(IntegrityError, match="does not list its stages"):
        matrix_of(store)


def test_shape_and_order_are_checked() -> None:
    with pytest.raises(ConfigError, match="shape"):
        Matrix(np.zeros((2, 2)), (0, 1), (0,))
    with pytest.raises(ConfigError, match="ascending"):
        Matrix(np.zeros((2, 1)), (1, 0), (0,))
    with pytest.raises(ConfigError, match="different shape"):
        mean_of([Matrix(np.zeros((1, 1)), (0,), (0,)), Matrix(np.zeros((1, 1)), (1,), (0,))])
