"""``clbench capacity``, ``probe``, ``forecast`` and ``predictors``: real runs through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from clbench.results.matrix import matrix_of
from clbench.results.metrics import METRICS
from clbench.results.store import RunStore
from tests.command_line.driver import Outcome, clbench

SMALL = ("--tokens", 300, "--orders", 2, "--rates", "1+2", "--heldout", 200, "--device", "cpu", "--mlflow", "none")


@pytest.fixture(scope="module")
def copies(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the finished runs, which commands may write figures into."""
    return Path(shutil.copytree(runs, tmp_path_factory.mktemp("copies") / "runs"))


@pytest.fixture
def sequential(copies: Path) -> Path:
    return copies / "tiny" / "sequential" / "seed-0"


def found(outcome: Outcome) -> Any:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_capacity_measures_keeps_and_shows_the_same(copies: Path, sequential: Path, tmp_path: Path) -> None:
    page = tmp_path / "capacity.html"
    told = clbench("capacity", copies, "--html", page, "--gradients", "--device", "cpu", "--mlflow", "none", "--json")
    one, other = sorted(found(told), key=lambda m: m["label"])
    assert (one["label"], other["label"]) == ("replay", "sequential")
    matrix = matrix_of(RunStore(sequential))
    best = matrix.values.min(axis=0)
    cost = other["clemc"]["per_stage"]["cost"]["2"]["value"]
    assert cost == pytest.approx((matrix.values[2, :3] - best[:3]).mean())
    assert other["clemc"]["reference"] == "best_of_run"
    figures = other["figures"]
    assert figures["drift"]["0"]["value"] == 0.0
    assert figures["drift"]["3"]["value"] > 0.0
    parts = [figures[key]["3"]["value"] for key in ("first_order", "curvature", "step_change")]
    assert parts[0] + parts[1] == pytest.approx(parts[2])
    assert figures["rankme"]["0"]["reason"] or figures["rankme"]["0"]["value"] > 1
    kept = json.loads((sequential / "capacity.json").read_text())
    assert kept["stages"]["3"]["drift"] == figures["drift"]["3"]["value"]
    assert "<title>Capacity: replay, sequential</title>" in page.read_text(encoding="utf-8")

    again = clbench("capacity", sequential, "--no-measure", "--mlflow", "none")
    assert again.code == 0, again.err
    assert "Forgetting cost" in again.out
    assert "drift from the base" in again.out  # from what was kept


def test_capacity_leaves_a_folder_alone_that_it_may_not_write(runs: Path) -> None:
    folder = runs / "tiny" / "replay" / "seed-0"
    before = sorted(folder.rglob("*"))
    told = clbench("capacity", folder, "--no-keep", "--no-measure", "--json")
    (one,) = found(told)
    assert one["clemc"]["per_stage"]["weight_driven"]["3"]["interval"].startswith("bootstrap over documents")
    assert one["notes"] == ["the suite was measured for 0 of 1 seeds"]
    assert sorted(folder.rglob("*")) == before


def test_a_probe_is_shown_kept_and_part_of_the_page(sequential: Path, tmp_path: Path) -> None:
    text = tmp_path / "unseen.txt"
    text.write_text("\n\n".join(f"zq xylem {i} owl {i * i} }} kwarg " * 60 for i in range(60)))
    told = clbench("probe", sequential, "--on", text, "--stages", "3", *SMALL)
    assert told.code == 0, told.err
    assert "stage 3: " in told.out
    assert "12 probes" in told.out  # three models, two rates, two orders
    kept = json.loads((sequential / "probe.json").read_text())["reports"]
    assert [list(report["models"]) for report in kept] == [["base", "fresh", "stage 3"]]
    page = tmp_path / "c.html"
    assert clbench("capacity", sequential, "--no-measure", "--html", page, "--mlflow", "none").code == 0
    assert "Plasticity probe: sequential-s0" in page.read_text(encoding="utf-8")


def test_mlflow_shows_the_figures_by_stage(sequential: Path) -> None:
    from clbench.tracking import plan_of

    keys = {(p.key, p.step): p.value for p in plan_of(RunStore(sequential)).parent.points}
    matrix = matrix_of(RunStore(sequential))
    assert keys["capacity/clemc_proxy_weight_driven", 1] == pytest.approx(matrix.at(1, 0) - matrix.at(0, 0))
    assert keys["capacity/drift", 3] > 0
    assert any(key.startswith("probe/") and step == 3 for key, step in keys)


# forecast


@pytest.fixture(scope="module")
def sweep(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six run folders that say they had budgets of 1,500 to 48,000 tokens, with losses of a known law."""
    root = tmp_path_factory.mktemp("sweep")
    for place in range(6):
        folder = Path(shutil.copytree(runs / "tiny" / "sequential" / "seed-0", root / f"budget-{place}"))
        n_tokens = 1500 * 2**place
        ledger = json.loads((folder / "ledger.json").read_text())
        ledger["tokens"] = {str(k): {str(k): n_tokens} for k in (1, 2, 3)}
        (folder / "ledger.json").write_text(json.dumps(ledger))
        config = yaml.safe_load((folder / "run.yaml").read_text())
        (folder / "run.yaml").write_text(yaml.safe_dump(config | {"run_id": f"{place:016d}"}))
        for path in (folder / "rows").glob("heldout-*.parquet"):
            stage, table = int(path.stem[-2:]), pq.read_table(path)
            loss = 2.0 + 30.0 * n_tokens**-0.5 + (0.001 * n_tokens**0.6 if stage == 3 else 0.0)
            values = [loss * n for n in table["n_tokens"].to_pylist()]
            RunStore(folder).write_rows("heldout", stage, table.set_column(3, "value", [values]))
    return root


def test_a_forecast_finds_the_law_it_was_given(sweep: Path, tmp_path: Path) -> None:
    picture = tmp_path / "f.svg"
    told = found(clbench("forecast", sweep, "--at", "10x", "--plot", picture, "--json"))
    by_metric = {one["metric"]: one for one in told["forecasts"]}
    matrix = matrix_of(RunStore(sweep / "budget-5"))
    assert METRICS["forgetting_first"].compute(matrix, None).value == pytest.approx(0.001 * 48000**0.6)
    assert by_metric["forgetting_first"]["prediction"]["value"] == pytest.approx(0.001 * 480000**0.6, rel=0.01)
    assert by_metric["forgetting_first"]["fit"]["exponents"]["gamma"]["value"] == pytest.approx(0.6, rel=0.01)
    assert by_metric["forgetting_first"]["back_test"]["error_nats"] < 0.01
    assert by_metric["forgetting_first"]["reach"] == 10
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    shown = clbench("forecast", sweep, "--at", "480000")
    assert "at 480,000 tokens a stage (10 times the largest)" in shown.out
    assert "back-test, 2 times beyond what it saw" in shown.out


def test_too_small_a_sweep_says_so_and_is_no_error(runs: Path) -> None:
    told = clbench("forecast", runs / "tiny" / "sequential")
    assert told.code == 0, told.err
    assert "no forecast: all runs have one budget and one model size" in told.out


def test_predictors_say_how_little_two_methods_tell(copies: Path) -> None:
    told = found(clbench("predictors", copies, "--no-measure", "--json"))
    assert {one["view"] for one in told} == {"early", "last", "change"}
    assert all(one["rho"] is None and one["reason"] == "2 methods have it" for one in told if one["n_methods"] == 2)
    assert {one["name"] for one in told} >= {"drift", "weight_driven", "loss_own"}
    assert clbench("predictors", copies, "--no-measure").code == 0


# mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("capacity", "{empty}"), "no run in these folders"),
        (("capacity", "{run}", "--html", "x.txt"), "this is no page"),
        (("probe", "{empty}", "--on", "tinydocs@1"), "not a run folder"),
        (("probe", "{run}", "--on", "tinydocs@1"), "the run has trained on stage 1"),
        (("probe", "{run}", "--on", "tinydocs@1", "--stages", "1-3"), "are no stages"),
        (("probe", "{run}", "--on", "tinydocs@3", "--stages", "9"), "no row after stage 9"),
        (("probe", "{run}", "--on", "tinydocs@1", "--rates", "1+x"), "'x' is no learning rate"),
        (("probe", "{run}", "--on", "tinydocs@1", "--orders", "0"), "without tokens or orders"),
        (("forecast", "{run}", "--at", "soon"), "'soon' is no budget"),
        (("forecast", "{run}", "--plot", "x.txt"), "this is no picture"),
        (("forecast", "{run}", "--parameters", "-1"), "a model without parameters"),
        (("predictors", "{empty}"), "no run in these folders"),
    ],
)
def test_a_mistake_is_one_line(runs: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    places = {"{run}": runs / "tiny" / "sequential" / "seed-0", "{empty}": tmp_path}
    told = clbench(*(places.get(word, word) for word in arguments))
    assert says in told.error
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_made_elsewhere_are_measured_where_they_lie(runs: Path, tiny: Path, tmp_path: Path) -> None:
    release = runs / "tiny" / "sequential" / "seed-0" / "release"
    pairs = [f"1={release / 'stage-01'}", f"3={release / 'stage-03'}"]
    made = clbench("evaluate", *pairs, "-t", tiny, "--out", tmp_path / "mine" / "seed-0", "--device", "cpu")
    assert made.code == 0, made.err
    (one,) = found(clbench("capacity", tmp_path / "mine", "--device", "cpu", "--mlflow", "none", "--json"))
    assert one["figures"]["norm"]["3"]["value"] > 0
    assert one["figures"]["drift"]["3"]["reason"] == "the checkpoint has no base to compare with"
    assert set(one["clemc"]["per_stage"]["weight_driven"]) == {"3"}
