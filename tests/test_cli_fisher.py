"""``clbench fisher``: a real run and real checkpoints measured through the command line; one line for every mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clbench.cli_fisher import number, tracking_uri
from clbench.fisher import subjects
from clbench.fisher.diagnostic import Report
from clbench.fisher.plot import draw
from clbench.results.store import RunStore
from clbench.tracking import MlflowSink, default_uri, plan_of
from tests.command_line.driver import clbench
from tests.engine import run_tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL = ("--rows", 16, "--blocks", "none", "--device", "cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A finished run: 4 stages, 1,500 tokens each."""
    return run_tiny(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(store: RunStore, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return shutil.copytree(store.folder, tmp_path / "runs" / "tiny" / "sequential" / "seed-0")


def measured(*arguments: object) -> list[dict[str, Any]]:
    done = clbench("fisher", *arguments, *SMALL, "--json")
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = json.loads(done.out)
    return found


def mistake(*arguments: object) -> str:
    return clbench("fisher", *arguments).error


def test_a_run_is_measured_stage_by_stage_and_never_twice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = measured(run)
    abouts = [report["about"] for report in reports]
    assert [(about["stage"], about["period"]) for about in abouts] == [(1, 1), (2, 2), (3, 3)]
    records = [RunStore(run).stage_record(stage)["weights_sha256"] for stage in (1, 2, 3)]
    assert [about["weights_sha256"] for about in abouts] == records
    figures = reports[0]["blocks"]["all"]["quantities"]
    assert figures["trace"]["value"] > 0
    assert 0 < figures["rank1_error"]["value"] <= 1
    # The last resume states are kept, and with them Adam's second moments.
    seen = ["cos_minus_sqrt_v_theta" in report["blocks"]["all"]["quantities"] for report in reports]
    assert seen == [False, False, True]
    monkeypatch.setattr(subjects, "diagnose", None)
    assert measured(run) == reports
    (run / "fisher.json").unlink()
    assert measured(run) == reports  # from the cache folder


def test_base_and_next_text_are_measured(run: Path) -> None:
    (base,) = measured(run, "--stage", 0, "--on", "next")
    assert (base["about"]["stage"], base["about"]["period"]) == (0, 1)
    assert [r["about"]["period"] for r in measured(run, "--on", "next")] == [2, 3]
    (old,) = measured(run, "--stage", 3, "--on", 0)
    assert old["about"]["period"] == 0
    assert len(json.loads((run / "fisher.json").read_text())["reports"]) == 4


def test_the_table_says_what_noise_would_give(run: Path) -> None:
    done = clbench("fisher", run, "--stage", 2, "--rows", 16, "--device", "cpu")
    assert done.code == 0, done.err
    for words in ("after stage 2", "rank-1 error, along mu", "noise", "reaches", "attention", "layer 0"):
        assert words in done.out
    assert "the Fisher here" in done.out or "direction" in done.out
    tables = done.out[done.out.index("quantity") : done.out.index("along the mean gradient")]
    assert max(map(len, tables.splitlines()[:-1])) <= 80


def test_mlflow_shows_the_stages(run: Path) -> None:
    before = plan_of(RunStore(run)).parent.points
    reports = measured(run)
    measured(run, "--stage", 1, "--on", "next")
    measured(run, "--stage", 1, "--group", 8)
    points = plan_of(RunStore(run)).parent.points
    fisher = [point for point in points if point.key.startswith("fisher/")]
    assert [point for point in points if point not in fisher] == before
    shown = {point.step: point.value for point in points if point.key == "fisher/all/kappa"}
    assert shown == {r["about"]["stage"]: r["blocks"]["all"]["quantities"]["kappa"]["value"] for r in reports}
    assert len(fisher) == len(points) - len(before)


def test_a_tracked_run_is_synced(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, Path]] = []
    monkeypatch.setattr(MlflowSink, "safe_sync", lambda sink, store: synced.append((sink.uri, store.folder)))
    assert tracking_uri(RunStore(run), "auto") is None
    measured(run, "--stage", 2)
    assert synced == []
    (run.parents[2] / "mlflow.db").touch()
    for words in ([], ["--mlflow", "sqlite"], ["--mlflow", "none"]):
        measured(run, "--stage", 2, *words)
    assert synced == [(default_uri(run.parents[2]), run)] * 2


def test_pictures_are_drawn(run: Path, tmp_path: Path) -> None:
    reports = [Report.from_dict(one) for one in measured(run, "--plot", tmp_path / "fisher.html")]
    draw(reports[:1], tmp_path / "fisher.png")
    for kind, start in {"png": b"\x89PNG", "html": b"<!doctype html"}.items():
        assert start in (tmp_path / f"fisher.{kind}").read_bytes()[:300]
    assert b"<svg" in (tmp_path / "fisher.html").read_bytes()


def test_a_checkpoint_is_measured_like_the_run_that_released_it(run: Path, store: RunStore) -> None:
    release = run / "release" / "stage-03"
    (report,) = measured(release, "--stream", "tinydocs", "--stage", 2)
    assert report["about"]["period"] == 2
    assert report["about"]["weights_sha256"] == store.stage_record(3)["weights_sha256"]
    (by_track,) = measured(release, "--track", "tinydocs", "--stage", 2, "--group", "document")
    assert by_track["about"]["grouping"] == "document"


def test_a_text_file_is_read_under_the_checkpoints_tokenizer(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The function returns a list of names, sorted by length. " * 200, encoding="utf-8")
    (report,) = measured(run / "release" / "stage-01", "--text", text)
    (pieces,) = measured(run / "release" / "stage-01", "--text", text, "--group", 4)
    assert report["n_samples"] == pieces["n_samples"] == 16
    assert report["about"]["text"] == pieces["about"]["text"]
    text.write_text("too short", encoding="utf-8")
    assert "16 wanted" in mistake(run / "release" / "stage-01", "--text", text, *SMALL)


def test_mistakes_get_one_line(run: Path, tmp_path: Path) -> None:
    release = run / "release" / "stage-01"
    for arguments, words in {
        (tmp_path / "nothing",): "checkpoint folder is missing",
        (tmp_path / "nothing", "--track", "tinydocs"): "checkpoint folder is missing",
        (run.parent, "--track", "tinydocs"): "no safetensors file",
        (run, "--stage", 9): "no row after stage 9",
        (run, "--stage", 3, "--on", "next"): "after stage 3 comes no other",
        (run, "--on", 7): "stage 7 is not in the stream",
        (run, "--on", "later"): "--on 'later' is no stage",
        (run, "--rows", 5000): "samples by sequence, 5000 wanted",
        (run, "--rows", 3): "greater than or equal to 16",
        (run, "--group", "word"): "no grouping 'word'",
        (run, "--projection", "few"): "not a projection",
        (run, "--blocks", "some"): "no blocks 'some'",
        (run, "--plot", "x.pdf"): "this is no picture",
        (run, "--track", "tinydocs"): "--track is for checkpoints",
        (release,): "needs one text",
        (release, "--track", "tinydocs", "--stream", "tinydocs"): "needs one text",
        (release, "--text", tmp_path / "none.txt"): "text cannot be read",
        (release, "--track", "tinydocs", "--stage", 8): "stage 8 is not in the stream",
        (release, "--track", "tinydocs", "--on", "next"): "--on is for runs",
        (release, "--track", "nowhere"): "nowhere",
    }.items():
        assert words in mistake(*arguments), arguments
    assert not (run / "fisher.json").exists()


def test_damage_is_seen(run: Path) -> None:
    (run / "fisher.json").write_text('{"format": 99}', encoding="utf-8")
    assert "no file of Fisher reports" in mistake(run, *SMALL)
    (run / "fisher.json").unlink()
    shutil.rmtree(run / "release" / "stage-02")
    assert "release weights are not kept" in mistake(run, "--stage", 2, *SMALL)
    shutil.copytree(run / "release" / "stage-01", run / "release" / "stage-02")
    assert "not the weights that the run measured" in mistake(run, "--stage", 2, *SMALL)


def test_numbers_are_short() -> None:
    shown = [number(value) for value in (None, 0.0, 0.5, 0.99951, 0.0123, 1.2e-5, 12.34, 1234.5, 4.2e5, -0.25)]
    assert shown == ["–", "0.000", "0.500", "1.000", "0.0123", "1.2e-05", "12.3", "1,234", "4.2e+05", "-0.250"]
