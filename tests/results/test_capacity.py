"""``clbench.results.capacity``: headlines by hand from rows, intervals over seeds, what is kept in a run folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats as reference

from clbench.errors import IntegrityError
from clbench.files import write_json
from clbench.results import capacity
from clbench.results.capacity import Figures, headlines_of, over_seeds
from clbench.results.matrix import matrix_of
from clbench.results.metrics import Value
from clbench.results.store import ROWS_SCHEMA, RunStore, StageRecord
from tests.synthetic_runs import write_run

Row = tuple[str, str, int, str, float]


def table(*rows: Row, reasons: dict[str, str] | None = None) -> pa.Table:
    """Rows (group, item, stage, metric, value) of one checkpoint."""
    columns: dict[str, list[Any]] = {name: [] for name in ROWS_SCHEMA.names}
    for group, item, stage, metric, value in rows:
        change = f"undefined: {(reasons or {}).get(metric, 'no reason')}" if math.isnan(value) else ""
        one = dict(
            item=item, stage=stage, metric=metric, value=value, n_tokens=1, n_bytes=1, group=group, change=change
        )
        for name, values in columns.items():
            values.append(one[name])
    return pa.table(columns, schema=ROWS_SCHEMA)


def test_headlines_by_hand() -> None:
    old = [("interference", "previous", period, "interference", 0.1 * period) for period in range(4)]
    rows = table(
        ("representation", "final", -1, "rankme_sigma:centred", 41.0),
        ("representation", "final", 0, "rankme_sigma:centred", 7.0),  # of one period: not the headline
        ("representation", "first", -1, "rankme_sigma:centred", 8.0),
        ("base", "final", -1, "cka_debiased", math.nan),
        *old,
        reasons={"cka_debiased": "fewer than four samples"},
    )
    found = headlines_of(rows, 3)
    assert found["rankme"].value == 41.0
    assert found["cka_base"].reason == "fewer than four samples"
    assert found["interference_old"].value == pytest.approx((0.0 + 0.1 + 0.2) / 3)  # periods before stage 3
    assert found["drift"].reason == "not measured"
    assert headlines_of(rows, 0)["interference_old"].reason == "no such period"


def test_opposition_is_the_cosine_of_mean_gradients() -> None:
    rng = np.random.default_rng(0)
    g = rng.normal(size=(4, 30))
    gram = g @ g.T
    rows = table(
        *[("gradients", f"period {j}", i, "gradient_dot", gram[i, j]) for i in range(4) for j in range(4)],
    )
    for stage in range(3):
        mean, new = g[: stage + 1].mean(axis=0), g[stage + 1]
        expected = -mean @ new / np.linalg.norm(mean) / np.linalg.norm(new)
        assert headlines_of(rows, stage)["opposition"].value == pytest.approx(expected)
    assert "no next period" in str(headlines_of(rows, 3)["opposition"].reason)
    noise = table(*[("gradients", f"period {j}", i, "gradient_dot", -1.0) for i in range(2) for j in range(2)])
    assert "noise" in str(headlines_of(noise, 0)["opposition"].reason)


def test_parts_of_a_step_add_up_over_old_periods() -> None:
    changes = {
        "loss_change_nats": (0.5, 0.3, 9.0),
        "first_order_nats": (-0.1, 0.1, 9.0),
        "curvature_nats": (0.6, 0.2, 9.0),
    }
    rows = table(
        *[("gradients", "previous", k, metric, v) for metric, values in changes.items() for k, v in enumerate(values)]
    )
    found = headlines_of(rows, 2)
    assert found["step_change"].value == pytest.approx(0.4)
    assert found["first_order"].value + found["curvature"].value == pytest.approx(found["step_change"].value)


def test_over_seeds_is_a_t_interval_and_one_hole_is_a_hole() -> None:
    def value(x: float) -> Value:
        return Value(np.array(x), None if math.isfinite(x) else "a reason")

    each = (1.0, 2.0, 4.0)
    found = over_seeds(
        {
            s: {0: {"a": value(x), "b": value(x if s else math.nan)}, s + 1: {"a": value(0.0)}}
            for s, x in enumerate(each)
        }
    )
    low, high = reference.t.interval(0.95, 2, np.mean(each), reference.sem(each))
    assert (found["a"][0].low, found["a"][0].high) == pytest.approx((low, high))
    assert found["b"][0].reason == "a reason"
    assert set(found["a"]) == {0}  # rows that a seed lacks are left out
    assert over_seeds({}) == {}


def test_units_of_a_table_are_found_by_period() -> None:
    figures = Figures(table(("units", "all blocks", 2, "redo_0.1", 0.5), ("units", "all blocks", -1, "redo_0.1", 0.25)))
    assert figures.periods("units", "all blocks", "redo_0.1") == [2]
    assert figures.mean("units", "all blocks", [2], "redo_0.1").value == 0.5
    assert figures.mean("units", "all blocks", [2, 3], "redo_0.1").reason == "not measured"


def test_rows_of_the_run_come_first_then_what_was_kept(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for stage in (0, 1):
        rows = table(("representation", "final", -1, "rankme_sigma:centred", 40.0 + stage))
        store.write_rows("capacity", stage, rows)
        cells = {"capacity": "address"}
        store.write_stage_record(
            StageRecord(stage=stage, weights_sha256="x", cells=cells, finished="2026-01-01T00:00:00+00:00", n_steps=0)
        )
    kept = {"1": {"rankme": 7.0, "curvature": 0.5, "drift": None}, "2": {"rankme": 8.0}}
    write_json(tmp_path / capacity.FILE, {"format": capacity.FORMAT, "stages": kept})
    found = capacity.kept_headlines(store)
    assert (found[0]["rankme"], found[0]["drift"]) == (40.0, None)
    assert (found[1]["rankme"], found[1]["curvature"], found[1]["drift"]) == (41.0, 0.5, None)
    assert found[2] == {"rankme": 8.0}
    assert capacity.headlines_here(store)[1]["drift"].reason == "undefined when measured"
    (tmp_path / capacity.FILE).write_text("[]")
    with pytest.raises(IntegrityError, match="no capacity figures"):
        capacity.kept_headlines(store)


def test_rows_of_other_weights_do_not_count(tmp_path: Path) -> None:
    """``clbench evaluate`` measured the stage, then the run was made again."""
    store = RunStore(tmp_path)
    store.write_rows("capacity", 0, table(("representation", "final", -1, "rankme_sigma:centred", 40.0)))
    record = StageRecord(stage=0, weights_sha256="new", cells={}, finished="2026-01-01T00:00:00+00:00", n_steps=0)
    store.write_stage_record(record)
    extra = {"suite": "capacity", "spec": "capacity", "stage": 0, "cells": {}, "finished": "", "evaluation": {}}
    store.write_extra_record({**extra, "weights_sha256": "old"})
    assert capacity.kept_headlines(store) == {}
    store.write_extra_record({**extra, "weights_sha256": "new"})
    assert capacity.kept_headlines(store)[0]["rankme"] == 40.0


def write_synthetic(folder: Path, seeds: int, **rankme: float) -> list[RunStore]:
    """Runs without an oracle; row 2 has ``rankme`` of ``s0``, ``s1`` … by seed."""
    stores = [write_run(folder / f"seed-{s}", seed=s, n_stages=3, n_documents=8, oracle=False) for s in range(seeds)]
    for store, value in zip(stores, rankme.values(), strict=False):
        rows = table(("representation", "final", -1, "rankme_sigma:centred", value))
        store.write_rows("capacity", 2, rows)
        record = store.stage_record(2)
        store.write_stage_record({**record, "cells": {**record["cells"], "capacity": "address"}})
    return stores


def test_of_runs_brings_cost_and_figures_of_all_seeds_together(tmp_path: Path) -> None:
    stores = write_synthetic(tmp_path, 2, s0=30.0, s1=34.0)
    found = capacity.of_runs("m", "t", stores)
    weights = []
    for store in stores:
        at = matrix_of(store).at
        steps = [at(1, 0) - at(0, 0), ((at(2, 0) - at(1, 0)) + (at(2, 1) - at(1, 1))) / 2]
        weights.append(sum(steps))
    assert found.estimate.per_run["weight_driven_total"].value == pytest.approx(np.mean(weights))
    one = found.figure("rankme", found.last)
    low, high = reference.t.interval(0.95, 1, 32.0, reference.sem([30.0, 34.0]))
    assert (one.value, one.low, one.high) == pytest.approx((32.0, low, high))
    assert found.figure("rankme", 0).reason == "not measured"
    told = found.summary_dict()
    assert set(told["per_run"]) == {"slope", "weight_driven_total", "data_driven_total"}  # no sum that only rises
    assert told["figures"]["2"]["rankme"]["value"] == 32.0
    assert told["figures"]["0"]["rankme"]["value"] is None


def test_of_runs_without_the_suite_has_the_cost_and_says_what_is_missing(tmp_path: Path) -> None:
    found = capacity.of_runs("m", "t", write_synthetic(tmp_path, 2, s0=30.0))
    assert found.notes == ("the suite was measured for 1 of 2 seeds",)
    assert found.measured
    bare = capacity.of_runs("m", "t", write_synthetic(tmp_path / "bare", 1))
    assert not bare.measured
    assert bare.summary_dict()["figures"] == {}
    assert math.isfinite(bare.estimate.per_run["slope"].value)


def test_every_headline_of_the_suite_has_a_range() -> None:
    metrics = {one.metric.partition(":")[0] for one in capacity.HEADLINES if one.metric}
    assert metrics <= set(capacity.RANGES)
