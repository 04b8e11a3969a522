"""Small synthetic boards, made once for all tests of this folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clbench.leaderboard.report import build_report
from clbench.leaderboard.site import build_site
from clbench.leaderboard.submission import pack, read_submissions
from clbench.results.store import ROWS_SCHEMA, RunStore
from tests.synthetic_runs import TOKENS_PER_STAGE, write_run

METHODS = ("sequential", "replay:fraction=1/2", "frozen")
DECLARED = {"authors": ["A. Author"], "only_track_data": True, "heldout_untouched": True}
SHAPE = {"n_stages": 3, "n_documents": 12}


def add_capacity(run: RunStore, row: int, values: dict[tuple[str, str, str], float]) -> None:
    """Write rows of the suite ``capacity`` as ``clbench evaluate`` does: (group, item, metric) -> value."""
    columns: dict[str, list[Any]] = {name: [] for name in ROWS_SCHEMA.names}
    for (group, item, metric), value in values.items():
        change = "undefined: <i>too few</i> samples" if math.isnan(value) else ""
        for name, one in zip(columns, (item, -1, metric, value, 1, 1, group, change), strict=True):
            columns[name].append(one)
    run.write_rows("capacity", row, pa.table(columns, schema=ROWS_SCHEMA))
    facts = {"suite": "capacity", "spec": "capacity", "stage": row, "cells": {}, "finished": "", "evaluation": {}}
    run.write_extra_record({**facts, "weights_sha256": run.stage_record(row)["weights_sha256"]})


RANKME, CKA = ("representation", "final", "rankme_sigma:centred"), ("base", "final", "cka_debiased")


def known_track(run: RunStore) -> dict[str, Any]:
    """Return the track as the board knows it: run.yaml's copy with the budget."""
    return {**run.config()["track"], "training": {"n_tokens_per_stage": TOKENS_PER_STAGE}}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[RunStore]]:
    folder = tmp_path_factory.mktemp("runs")
    found = {
        method: [
            write_run(folder / method.replace("/", "-") / f"seed-{seed}", method=method, seed=seed, **SHAPE)
            for seed in range(3)
        ]
        for method in METHODS
    }
    for seed, run in enumerate(found["replay:fraction=1/2"]):  # the others have no suite capacity
        for row in range(3):
            add_capacity(run, row, {RANKME: 39.0 + row + (seed - 1) * row, CKA: math.nan})
    return found


@pytest.fixture(scope="session")
def site(runs: dict[str, list[RunStore]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the first page of a site with one checked entry and two reported methods."""
    submissions = tmp_path_factory.mktemp("submissions")
    pack(runs["sequential"], submissions, declarations=DECLARED)
    found = read_submissions(submissions, find=lambda _: known_track(runs["sequential"][0]))
    assert found.rejected == {}
    loose = [run for method in METHODS[1:] for run in runs[method]]
    return build_site([*found.accepted, *loose], tmp_path_factory.mktemp("out") / "site").index


@pytest.fixture(scope="session")
def report(runs: dict[str, list[RunStore]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    both = [*runs["sequential"], *runs["replay:fraction=1/2"]]
    return build_report(both, tmp_path_factory.mktemp("report") / "report.html")
