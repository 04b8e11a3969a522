from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import typer
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from clbench.cli_temporal import temporal as temporal_command
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError
from clbench.results.knowledge import Answers, wilson
from clbench.results.matrix import from_rows, matrix_of
from clbench.results.store import ROWS_SCHEMA, RunStore
from clbench.results.temporal import Sheet, default_metric, read_dated, sheet_of, temporal
from tests.results.test_knowledge import rows_of, truth_table
from tests.synthetic_runs import write_run

CHANCE = 0.25


def table(cells: list[tuple[Any, ...]]) -> pa.Table:
    """Rows from (item, stage, metric, value, group, change)."""
    full = [(item, stage, metric, value, 1, 1, group, change) for item, stage, metric, value, group, change in cells]
    columns = [list(column) for column in zip(*full, strict=True)]
    return pa.table(dict(zip(ROWS_SCHEMA.names, columns, strict=True)), schema=ROWS_SCHEMA)


FACTS: dict[str, list[tuple[int, str, str]]] = {
    "a": [(0, "new", "x"), (1, "kept", "x")],
    "b": [(0, "new", "x"), (1, "updated", "y")],
    "c": [(0, "new", "x"), (1, "obsolete", "z")],
    "d": [(1, "new", "x")],
}
"""Item -> period, what befell it, its truth."""


def rows_from(answers: dict[str, str], *, form: str = "plain", group: str = "g", chance: float | None = CHANCE) -> Any:
    """Rows of a checkpoint that gives these answers, one letter an item, with what its suite says about staleness."""
    cells: list[tuple[Any, ...]] = [("undated", -1, f"acc:{form}", 1.0, group, "")]
    for item, periods in FACTS.items():
        for period, change, truth in periods:
            older = {value for p, _, value in periods if p < period} - {truth}
            values = {
                f"acc:{form}": float(answers[item] == truth), f"outdated:{form}": float(answers[item] in older),
                **({} if chance is None else {"chance": chance, "chance_outdated": len(older) * chance}),
            }  # fmt: skip
            cells += [(item, period, metric, value, group, change) for metric, value in values.items()]
    return table(cells)


TWO = {0: rows_from(dict.fromkeys("abcd", "x")), 1: rows_from({"a": "x", "b": "y", "c": "x", "d": "w"})}
"""The base knows the first period; the next checkpoint learns of b, not of c, and misses d."""


def numbers(cells: Any) -> list[list[float]]:
    return [[cell.value for cell in row] for row in cells]


def test_the_matrix_of_every_kind_by_hand() -> None:
    dated = read_dated(TWO)
    whole = sheet_of([dated], n_resamples=50)
    assert (dated.metric, whole.row_stages, whole.column_stages, whole.n_items) == ("acc:plain", (0, 1), (0, 1), (3, 4))
    assert numbers(whole.score) == [[1.0, 0.5], [2 / 3, 0.5]]
    assert numbers(whole.stale) == [[0.0, 0.5], [0.0, 0.25]]
    expected = {
        "new": ([[1.0, 1.0], [2 / 3, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
        "kept": ([[1.0], [1.0]], [[0.0], [0.0]]),
        "updated": ([[0.0], [1.0]], [[1.0], [0.0]]),
        "obsolete": ([[0.0], [0.0]], [[1.0], [1.0]]),
    }
    for kind, (score, stale) in expected.items():
        sheet = sheet_of([dated], kind, n_resamples=50)
        assert numbers(sheet.score) == score and numbers(sheet.stale) == stale, kind
    assert sheet_of([dated], "kept", n_resamples=50).column_stages == (1,)


def test_chance_is_subtracted_and_stands_beside_staleness() -> None:
    whole = sheet_of([read_dated(TWO)], n_resamples=50)
    assert whole.chance == (CHANCE, CHANCE) and whole.chance_stale == (0.0, CHANCE / 2)
    assert whole.corrected[1][0].value == pytest.approx((2 / 3 - CHANCE) / (1 - CHANCE))
    assert whole.corrected[0][1].value == pytest.approx((0.5 - CHANCE) / (1 - CHANCE))


def test_present_past_and_future_are_means_over_cells() -> None:
    times = sheet_of([read_dated(TWO)], n_resamples=50).times
    assert times["present"]["score"].value == pytest.approx((1.0 + 0.5) / 2)
    assert times["past"]["score"].value == pytest.approx(2 / 3)
    assert times["future"]["stale"].value == 0.5
    one = sheet_of([read_dated({1: TWO[1]})], "updated", n_resamples=50).times["past"]["score"]
    assert math.isnan(one.value) and one.reason == "no checkpoint has items of its past"


def test_staleness_is_told_by_other_periods_as_knowledge_tells_it() -> None:
    histories = {"a": "ccc", "b": "cct", "d": "cti", "e": "-ct", "f": "ctc", "g": "ccn"}
    truth = truth_table(histories)
    code = {"c": 0, "t": 1, "i": 2, "n": 3}
    answers = ["cctcct", "cciccc", "ittttc"]
    rows = {k: rows_of(truth, [{code[c]} for c in row]) for k, row in enumerate(answers)}
    known = Answers.of(rows, truth)
    dated = read_dated(rows)
    assert dated.metric == "right:trained" and dated.stale is not None
    for k in range(3):
        for f, fact in enumerate(truth.facts):
            if truth.code[f, k] >= 0:
                place = [(int(s), str(i)) for s, i in zip(dated.items.stage, dated.items.item, strict=True)]
                stale = dated.stale[k, place.index((k, fact.fact))]
                assert stale == float(known.answer[k, f] == 1), (k, fact.fact)


def test_losses_have_the_matrix_that_they_always_had(tmp_path: Path) -> None:
    store = write_run(tmp_path, n_stages=3, n_rows=3)
    found = temporal([store], suite="heldout", n_resamples=50)
    assert (found.metric, found.unit) == ("nll_nats", "nats_per_token")
    whole = found.sheets["all"]
    np.testing.assert_allclose(whole.matrix(found.unit).values, matrix_of(store).values, rtol=1e-12)
    rows = {k: store.rows("heldout", k) for k in range(3)}
    changed = found.sheets["changed"]
    expected = from_rows(rows, change="changed", column_stages=changed.column_stages)
    np.testing.assert_allclose(changed.matrix().values, expected.values, rtol=1e-12)
    assert list(found.sheets) == ["all", "new", "changed", "unchanged"]
    assert whole.corrected[0][0].reason == "a loss has no chance level" and math.isnan(whole.corrected[0][0].value)
    assert whole.stale[0][0].reason == "the rows do not say which answers were true before"


def many(seed: int, n: int = 60) -> Any:
    """Rows of a checkpoint that is right about two thirds of n items of one period."""
    right = np.random.default_rng(seed).random(n) < 2 / 3
    return table([(f"i{i}", 0, "acc", float(one), "g", "new") for i, one in enumerate(right)]), float(right.mean())


def test_one_seed_has_the_noise_of_items() -> None:
    rows, mean = many(1)
    cell = sheet_of([read_dated({0: rows})]).score[0][0]
    assert cell.value == mean and cell.kind == "bootstrap over items (evaluation noise)" and cell.n == 60
    half = 1.96 * math.sqrt(mean * (1 - mean) / 60)
    assert (cell.low, cell.high) == pytest.approx((mean - half, mean + half), abs=0.02)


def test_items_that_agree_have_wilsons_interval() -> None:
    cell = sheet_of([read_dated(TWO)], "obsolete", n_resamples=50).score[1][0]
    expected = wilson(0.0, 1)
    assert (cell.value, cell.low, cell.high) == (0.0, expected.low, expected.high) and cell.high > 0.7


def test_several_seeds_have_the_noise_of_training() -> None:
    made = [many(seed) for seed in (1, 2, 3)]
    cell = sheet_of([read_dated({0: rows}) for rows, _ in made]).score[0][0]
    means = [mean for _, mean in made]
    expected = scipy_stats.t.interval(0.95, 2, np.mean(means), scipy_stats.sem(means))
    assert cell.kind == "t over seeds" and (cell.low, cell.high) == pytest.approx(expected)


def test_what_is_not_known_is_nan_with_a_reason() -> None:
    rows = {0: rows_from(dict.fromkeys("abcd", "x"), chance=None)}
    cell = sheet_of([read_dated(rows)], n_resamples=50).corrected[0][0]
    assert math.isnan(cell.value) and cell.reason == "the chance level is not known"
    given = {(p, item): (0.5, 0.0) for item in "abcd" for p in (0, 1)}
    assert sheet_of([read_dated(rows, chances=given)], n_resamples=50).corrected[0][0].value == 1.0
    certain = {key: (1.0, 0.0) for key in given}
    assert (
        sheet_of([read_dated(rows, chances=certain)], n_resamples=50).corrected[0][0].reason == "there is one candidate"
    )
    gap = {0: TWO[0], 1: TWO[1].filter(pa.compute.not_equal(TWO[1]["item"], "a"))}
    sheet = sheet_of([read_dated(gap)], n_resamples=50)
    assert math.isnan(sheet.score[1][0].value) and sheet.score[1][0].reason == "an item is missing after this stage"
    assert sheet.matrix().reason(1, 0) == "an item is missing after this stage"


def test_what_a_suite_is_read_by() -> None:
    def rows(*metrics: str) -> dict[int, pa.Table]:
        return {0: table([("i", 0, metric, 1.0, "g", "new") for metric in metrics])}

    assert (
        default_metric(rows("chance", "acc:dated", "acc:plain", "acc_norm:dated", "acc_norm:plain")) == "acc_norm:plain"
    )
    assert default_metric(rows("right:paraphrase", "right:trained", "choice_nats:trained")) == "right:trained"
    assert default_metric(rows("nll_nats", "n")) == "nll_nats"
    with pytest.raises(NotFoundError, match="no metric of this suite is a known score: chance"):
        default_metric(rows("chance"))


def test_groups_are_chosen_by_a_pattern() -> None:
    both = {0: pa.concat_tables([rows_from(dict.fromkeys("abcd", "x"), group="module, trained")])}
    assert read_dated(both, group="*, trained").items.n == 7
    with pytest.raises(NotFoundError, match="there are module, trained"):
        read_dated(both, group="*, heldout")


def test_bad_rows_are_one_line() -> None:
    undated = table([("i", -1, "acc", 1.0, "g", "")])
    with pytest.raises(NotFoundError, match="no item of this suite belongs to a period"):
        read_dated({0: undated})
    with pytest.raises(NotFoundError, match="acc:plain"):
        read_dated(TWO, "acc:plian")
    with pytest.raises(IntegrityError, match="twice"):
        read_dated({0: pa.concat_tables([TWO[0], TWO[0]])})


# --- runs


def run_with(folder: Path, rows: dict[int, pa.Table], seed: int = 0) -> RunStore:
    store = write_run(folder, n_stages=2, n_documents=4, n_rows=len(rows), seed=seed)
    for stage, one in rows.items():
        store.write_rows("api_change", stage, one)
    return store


def test_a_method_in_all(tmp_path: Path) -> None:
    found = temporal([run_with(tmp_path, TWO)], suite="api_change", group="g", n_resamples=50)
    assert list(found.sheets) == ["all", "new", "kept", "updated", "obsolete"]
    assert (found.n_seeds, found.stages) == (1, {0: "2010", 1: "2011"})
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["sheets"]["updated"]["stale"][0][0]["value"] == 1.0
    assert told["sheets"]["updated"]["times"]["past"]["score"] == {
        "value": None, "low": None, "high": None, "n": 0, "kind": "none", "p": None,
        "reason": "no checkpoint has items of its past",
    }  # fmt: skip


def test_seeds_must_have_the_same_items(tmp_path: Path) -> None:
    first = run_with(tmp_path / "0", TWO)
    other = run_with(
        tmp_path / "1", {k: one.filter(pa.compute.not_equal(one["item"], "d")) for k, one in TWO.items()}, 1
    )
    with pytest.raises(ConfigError, match="different rows or items"):
        temporal([first, other], suite="api_change", n_resamples=50)
    with pytest.raises(NotFoundError, match="suite 'general' was not measured"):
        temporal([first], suite="general")


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(temporal_command)
    run_with(tmp_path / "runs" / "seed-0", TWO)
    words = [str(tmp_path / "runs")]
    shown = CliRunner().invoke(app, [*words, "--value", "stale", "--kind", "updated"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= 80 or max(map(len, lines[:-3])) <= 80
    assert [line.split() for line in lines if line.startswith(("2010", "2011"))] == [["2010", "1.00"], ["2011", "0.00"]]
    assert "…" not in shown.output
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert told[0]["sheets"]["all"]["score"][1][1]["value"] == 0.5
    for wrong in (["--value", "x"], ["--kind", "reverted"], ["--suite", "x"], ["--metric", "x"]):
        assert isinstance(CliRunner().invoke(app, [*words, *wrong]).exception, ClbenchError)


def test_a_sheet_is_a_matrix_for_other_pages() -> None:
    sheet: Sheet = sheet_of([read_dated(TWO)], n_resamples=50)
    matrix = sheet.matrix()
    assert (matrix.row_stages, matrix.column_stages, matrix.unit) == ((0, 1), (0, 1), "mean_value")
    assert float(matrix.at(1, 0)) == pytest.approx(2 / 3)
