"""Slices of whole run folders, against sums over their rows written out."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from clbench.cli_results import slices as command
from clbench.errors import ClbenchError, ConfigError, NotFoundError
from clbench.results.matrix import matrix_of
from clbench.results.slices import slices_of
from clbench.results.store import RunStore
from tests.synthetic_runs import GROUPS, write_run

N_STAGES = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunStore]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"seed-{seed}", seed=seed) for seed in range(3)]


def cell(store: RunStore, row: int, column: int, **wanted: str) -> float:
    """Return the loss of one cell from the rows of some documents, one by one."""
    rows = [
        r
        for r in store.rows("heldout", row).to_pylist()
        if r["stage"] == column and all(r[key] == value for key, value in wanted.items())
    ]
    return sum(r["value"] for r in rows) / sum(r["n_tokens"] for r in rows) if rows else math.nan


def test_each_group_has_the_matrix_of_its_own_documents(runs: list[RunStore]) -> None:
    found = slices_of(runs, "group")
    assert [one.name for one in found] == sorted(GROUPS)
    for one in found:
        assert one.matrix.column_stages == one.matrix.row_stages == tuple(range(N_STAGES)) and one.left_out == {}
        for row, column in product(range(N_STAGES), repeat=2):
            mean = np.mean([cell(store, row, column, group=one.name) for store in runs])
            assert one.matrix.at(row, column) == pytest.approx(mean, rel=1e-12)


def test_slices_put_together_are_the_whole(runs: list[RunStore]) -> None:
    whole = matrix_of(runs[0]).values
    for by in ("group", "change"):
        found = slices_of(runs[:1], by, min_documents=1)
        assert sum(one.n_documents for one in found) == 40 * N_STAGES
        nats, tokens = np.zeros((N_STAGES, N_STAGES)), np.zeros(N_STAGES)
        for one in found:
            documents = one.documents[0]
            for column in one.matrix.column_stages:
                here = documents.n_tokens[documents.stage == column].sum()
                nats[:, column] += one.matrix.values[:, one.matrix.column_stages.index(column)] * here
                tokens[column] += here
        np.testing.assert_allclose(nats / tokens, whole, rtol=1e-12)


def test_change_kinds_leave_out_periods_without_them(runs: list[RunStore]) -> None:
    new, changed, unchanged = slices_of(runs, "change")
    assert [new.name, changed.name, unchanged.name] == ["new", "changed", "unchanged"]
    assert new.matrix.column_stages == (0, 1, 2, 3)
    assert changed.matrix.column_stages == (1, 2, 3) and changed.left_out == {0: "no documents"}
    backward = [cell(s, k, i, change="changed") for s in runs for k in range(1, N_STAGES) for i in range(1, k)]
    per_seed = np.array(backward).reshape(3, -1).mean(axis=1)
    score = changed.scores["backward"]
    assert list(score.per_seed.values()) == pytest.approx(per_seed)
    half = 4.302653 * np.std(per_seed, ddof=1) / math.sqrt(3)  # t(0.975, 2)
    assert (score.low, score.high) == pytest.approx((per_seed.mean() - half, per_seed.mean() + half))
    assert not score.regret and changed.regrets == {}, "the track's oracle is of whole periods, not of a slice"


def test_a_slice_that_is_too_small_says_so(tmp_path: Path) -> None:
    store = write_run(tmp_path, n_documents=8)
    found = {one.name: one for one in slices_of([store], "change")}
    assert found["changed"].matrix.column_stages == () and found["changed"].n_documents == 0
    score = found["changed"].scores["backward"]
    assert math.isnan(score.value) and score.reason == "no checkpoint later than a period"
    assert found["changed"].left_out[2] == "period 2 has 2 of the 5 documents that a column needs"
    assert found["new"].matrix.column_stages == (0,), "8 new documents at first, then 4"
    json.dumps([one.as_dict() for one in found.values()], allow_nan=False)
    enough = {one.name: one for one in slices_of([store], "change", min_documents=2)}
    assert math.isfinite(enough["changed"].scores["backward"].value)
    assert enough["changed"].scores["backward"].interval == "bootstrap over documents (evaluation noise)"


def test_regret_is_against_the_last_row_of_the_oracle_on_the_same_documents(
    runs: list[RunStore], tmp_path: Path
) -> None:
    oracles = [write_run(tmp_path / f"seed-{seed}", seed=7 + seed, forgetting=0.0) for seed in range(2)]
    best = {i: np.mean([cell(o, N_STAGES - 1, i, group="django") for o in oracles]) for i in range(N_STAGES)}
    [django] = [one for one in slices_of(runs[:1], "group", oracle=oracles) if one.name == "django"]
    wanted = np.mean([cell(runs[0], k, i, group="django") - best[i] for k in range(1, N_STAGES) for i in range(k)])
    regret, plain = django.regrets["backward"], django.scores["backward"]
    assert regret.value == pytest.approx(wanted) and regret.regret and not plain.regret
    assert regret.high - regret.low < 0.5 * (plain.high - plain.low), "both are resampled together"
    assert regret.low < regret.value < regret.high
    itself = slices_of(runs[:1], "group", oracle=runs[:1], metrics=["final", "in_distribution"])[0]
    last = [cell(runs[0], i, i, group="django") - cell(runs[0], 3, i, group="django") for i in range(1, N_STAGES)]
    assert itself.regrets["in_distribution"].value == pytest.approx(np.mean(last))


def test_what_cannot_be_cut_is_named(runs: list[RunStore], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"'bakward'.*'backward'"):
        slices_of(runs, metrics=["bakward"])
    with pytest.raises(ConfigError, match="at least 1"):
        slices_of(runs, min_documents=0)
    with pytest.raises(ConfigError, match="not measured on the documents"):
        slices_of(runs, oracle=[write_run(tmp_path / "other", n_documents=20)])
    with pytest.raises(NotFoundError, match="oracle has no complete row"):
        slices_of(runs, oracle=[write_run(tmp_path / "empty", n_rows=0)])


def run_command(*arguments: str) -> tuple[str, BaseException | None]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})
    return result.output, result.exception


def test_the_command(runs: list[RunStore], tmp_path: Path) -> None:
    write_run(tmp_path / "frozen", method="frozen")
    folders = [str(runs[0].folder), str(tmp_path / "frozen")]
    said, error = run_command("--by", "change", "--metric", "backward", *folders)
    assert error is None and all(text in said for text in ("Backward", "unchanged", "sequential", "frozen", "95 %"))
    said, error = run_command("--json", *folders)
    found: list[dict[str, Any]] = json.loads(said)
    assert error is None and [(one["method"], one["name"]) for one in found] == [
        (method, group) for method in ("sequential", "frozen") for group in sorted(GROUPS)
    ]
    [first] = slices_of(runs[:1], "group", metrics=["forward"])[:1]
    assert found[0]["scores"]["forward"] == first.scores["forward"].as_dict()
    for arguments in (["--by", "grup"], ["--unit", "nats"], ["--metric", "bakward"]):
        _, error = run_command(*arguments, *folders)
        assert isinstance(error, ClbenchError) and "\n" not in str(error)
    _, error = run_command(str(tmp_path / "none"))
    assert isinstance(error, NotFoundError)
