"""The MLflow sink against real SQLite stores, a real server and real processes; runs come from a formula."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clbench import tracking
from clbench.errors import ClbenchError, ConfigError
from clbench.results.store import RunStore
from clbench.tracking import MlflowSink, default_uri, flatten, open_ui, plan_of, public_uri, uri_of_mode
from tests.synthetic_runs import STEPS_PER_STAGE, pooled, step_lines, write_run

Points = Counter[tuple[str, int, float, int]]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database shared by the tests of this file; each test has its own track, hence its own experiment."""
    return default_uri(tmp_path_factory.mktemp("shared"))


def client_of(uri: str) -> Any:
    tracking.quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_of(uri: str, track: str) -> dict[str, Any]:
    """All active runs of a track by name; fails on two runs of one name."""
    client = client_of(uri)
    experiment = client.get_experiment_by_name(f"clbench/{track}-v1")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    names = Counter(run.info.run_name for run in runs)
    assert set(names.values()) <= {1}, names
    return {run.info.run_name: run for run in runs}


def points_of(uri: str, run: Any) -> Points:
    """The full history of every metric of one run, as MLflow gives it back."""
    client = client_of(uri)
    return Counter(
        (p.key, p.step, p.value, p.timestamp)
        for key in run.data.metrics
        for p in client.get_metric_history(run.info.run_id, key)
    )


def shown(uri: str, track: str) -> dict[str, tuple[Points, dict[str, str], str, dict[str, str], Any, Any]]:
    """Everything MLflow shows of a track, without its own random ids."""
    ids = {"mlflow.parentRunId", "clbench.mark", "clbench.artifacts"}
    return {
        name: (
            points_of(uri, run),
            run.data.params,
            run.info.status,
            {key: value for key, value in run.data.tags.items() if key not in ids},
            run.info.start_time,
            run.info.end_time,
        )
        for name, run in runs_of(uri, track).items()
    }


def curve(points: Points, key: str) -> dict[int, float]:
    """Step -> value of one metric; fails on two points of one step."""
    found = [(step, value) for name, step, value, _ in points.elements() if name == key]
    assert len(found) == len({step for step, _ in found}), f"{key} has two points of one step"
    return dict(sorted(found))


def test_curves_are_the_columns_of_the_matrix(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", track="curves")
    run_id = MlflowSink(uri).sync(store)
    parent = runs_of(uri, "curves")["sequential-s0"]
    assert parent.info.run_id == run_id
    points = points_of(uri, parent)
    rows = [pooled(store.rows("heldout", k), 4) for k in range(4)]
    for unit, section in (("bits_per_byte", "bpb"), ("nats_per_token", "nats")):
        for period in range(4):
            expected = {k: pytest.approx(rows[k][unit][period], rel=1e-12) for k in range(4)}
            assert curve(points, f"{section}/{2010 + period}") == expected
    # the parts of row 2 by hand; no period lies before row 0, none after row 3
    row = rows[2]["nats_per_token"]
    assert curve(points, "cl/backward")[2] == pytest.approx((row[0] + row[1]) / 2)
    assert curve(points, "cl/in_distribution")[2] == pytest.approx(row[2])
    assert curve(points, "cl/forward")[2] == pytest.approx(row[3])
    assert set(curve(points, "cl/backward")) == {1, 2, 3}
    assert set(curve(points, "cl/forward")) == {0, 1, 2}
    assert parent.info.status == "FINISHED"


def test_bill_scores_and_identity_of_a_finished_run(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", method="replay:fraction=1/2", seed=1, track="bill")
    MlflowSink(uri).sync(store)
    parent = runs_of(uri, "bill")["replay:fraction=1/2-s1"]
    metrics, tags, ledger = parent.data.metrics, parent.data.tags, store.ledger()
    assert metrics["cost/tokens"] == 600_000
    assert metrics["cost/train_flop"] == ledger["flops"]["train"]
    assert metrics["cost/seconds"] == pytest.approx(600_000 / 20_000 + 10 + 2)
    assert metrics["cost/peak_memory_bytes"] == ledger["peak_memory_bytes"]
    final = pooled(store.rows("heldout", 3), 4)["nats_per_token"]
    assert metrics["score/final"] == pytest.approx(sum(final) / 4)
    assert metrics["score/final_low"] < metrics["score/final"] < metrics["score/final_high"]
    config = store.config()
    assert tags["clbench.run_id"] == config["run_id"]
    assert tags["clbench.kind"] == "benchmark"
    assert tags["clbench.method"] == "replay:fraction=1/2"
    assert (tags["clbench.track"], tags["clbench.seed"], tags["clbench.status"]) == ("bill", "1", "done")
    assert tags["clbench.stream_sha256"] == config["track"]["stream_sha256"]
    assert parent.data.params["training.lr"] == "0.001"
    assert parent.data.params["method.label"] == "replay:fraction=1/2"


def test_stages_are_nested_runs_with_the_training_log(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", track="nested")
    parent_id = MlflowSink(uri).sync(store)
    runs = runs_of(uri, "nested")
    assert set(runs) == {"sequential-s0", "t01-2011", "t02-2012", "t03-2013"}
    child = runs["t02-2012"]
    assert child.data.tags["mlflow.parentRunId"] == parent_id
    assert child.data.tags["clbench.kind"] == "stage"
    lines = step_lines("sequential", 0, 2)
    points = points_of(uri, child)
    assert curve(points, "train/loss") == {line["step"]: line["loss_nats"] for line in lines}
    assert curve(points, "train/grad_norm") == {line["step"]: line["grad_norm"] for line in lines}
    assert curve(points, "train/lr") == {line["step"]: line["lr"] for line in lines}
    assert curve(points, "perf/tokens_per_second") == {line["step"]: line["tokens_per_second"] for line in lines}
    assert set(curve(points, "system/system_memory_usage_megabytes").values()) == {450.0}
    assert len(curve(points, "system/cpu_utilization_percentage")) == STEPS_PER_STAGE


def test_artifacts_are_there_and_follow_the_run(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", track="artifacts", n_rows=2, state="running")
    sink, client = MlflowSink(uri), client_of(uri)
    run_id = sink.sync(store)

    def fetched(name: str) -> bytes:
        return Path(client.download_artifacts(run_id, name, str(tmp_path))).read_bytes()

    assert len(fetched("matrix.csv").splitlines()) == 1 + 2 * 4
    report = tmp_path / "some-page.html"
    report.write_text("<p>one</p>", encoding="utf-8")
    write_run(tmp_path / "run", track="artifacts", n_rows=4)
    run_id = sink.sync(store, report)
    names = {item.path for item in client.list_artifacts(run_id)}
    pictures = {"matrix-bits_per_byte.png", "matrix-nats_per_token.png"}
    assert names == {"matrix.csv", "run.yaml", "ledger.json", "report.html", *pictures}
    for name in pictures:
        assert fetched(name).startswith(b"\x89PNG")
    cells = fetched("matrix.csv").decode().splitlines()
    assert len(cells) == 1 + 4 * 4
    row = pooled(store.rows("heldout", 3), 4)
    assert cells[-4].split(",")[:4] == ["3", "2013", "0", "2010"]
    assert [float(x) for x in cells[-4].split(",")[4:]] == pytest.approx(
        [row["bits_per_byte"][0], row["nats_per_token"][0]]
    )
    assert fetched("run.yaml") == (store.folder / "run.yaml").read_bytes()
    report.write_text("<p>two</p>", encoding="utf-8")
    sink.sync(store, report)
    assert fetched("report.html") == b"<p>two</p>"


@pytest.mark.parametrize("method", ["sequential", "frozen"])  # a frozen run's children have no points
def test_syncing_twice_stores_nothing_twice(method: str, uri: str, tmp_path: Path) -> None:
    from mlflow.entities import ViewType

    track = f"twice-{method}"
    store = write_run(tmp_path / "run", method=method, track=track)
    first_id = MlflowSink(uri).sync(store)
    first = shown(uri, track)
    assert MlflowSink(uri).sync(store) == first_id
    assert shown(uri, track) == first
    assert max(first[f"{method}-s0"][0].values()) == 1
    experiment = client_of(uri).get_experiment_by_name(f"clbench/{track}-v1")
    assert len(client_of(uri).search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)) == 4


def test_live_syncing_ends_like_a_rebuild_in_a_fresh_database(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ids = set()
    sink = MlflowSink(uri)
    for n_rows in (1, 3, 4):
        shutil.rmtree(folder, ignore_errors=True)  # the same bytes again, with one stage more
        store = write_run(folder, track="live", n_rows=n_rows, state="running")
        ids.add(sink.sync(store))
        parent = runs_of(uri, "live")["sequential-s0"]
        assert parent.info.status == "RUNNING"
        assert set(curve(points_of(uri, parent), "bpb/2010")) == set(range(n_rows))
        assert not any(key.startswith(("score/", "cost/")) for key in parent.data.metrics)
    store.write_status("done")
    ids.add(sink.sync(store))
    assert len(ids) == 1
    rebuilt = default_uri(tmp_path / "elsewhere")
    MlflowSink(rebuilt).sync(store)
    assert shown(rebuilt, "live") == shown(uri, "live")


@pytest.mark.parametrize("seen_short", [True, False])
def test_steps_that_a_resume_writes_again_are_stored_once(seen_short: bool, uri: str, tmp_path: Path) -> None:
    track = f"resume-{seen_short}"
    store = write_run(tmp_path / "run", track=track, n_rows=2, state="running")
    lines = step_lines("sequential", 0, 2)
    store.append_steps(lines[:15])
    sink = MlflowSink(uri)
    sink.sync(store)
    assert len(curve(points_of(uri, runs_of(uri, track)["t02-2012"]), "train/loss")) == 15
    store.forget_steps_from(2, 11)  # killed at step 15, resumed from a checkpoint at step 10, a month later
    if seen_short:
        sink.sync(store)
    again = [dict(line, time=line["time"].replace("2026-01", "2026-02"), tokens_per_second=7.0) for line in lines]
    store.append_steps(again[10:])  # type: ignore[arg-type]
    sink.sync(store)
    child = runs_of(uri, track)["t02-2012"]
    speed = curve(points_of(uri, child), "perf/tokens_per_second")
    assert speed == {line["step"]: line["tokens_per_second"] if line["step"] <= 10 else 7.0 for line in lines}
    MlflowSink(uri, experiment=f"clbench/{track}-anew-v1").sync(store)
    assert shown(uri, f"{track}-anew") == shown(uri, track)


@pytest.mark.parametrize("arrives", [True, False])
def test_a_sync_cut_off_while_it_sends_points_is_finished_by_the_next(
    arrives: bool, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    track = f"cut-{arrives}"
    store = write_run(tmp_path / "run", track=track)
    send, sent = MlflowClient.log_batch, []

    def lossy(self: Any, run_id: str, **entries: Any) -> None:
        sent.append(entries)
        cut = "metrics" in entries and sum("metrics" in e for e in sent) == 2
        if arrives or not cut:
            send(self, run_id, **entries)
        if cut:
            raise ConnectionError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lossy)
        with pytest.raises(ClbenchError, match="cut"):
            MlflowSink(uri).sync(store)
    MlflowSink(uri).sync(store)
    MlflowSink(uri, experiment=f"clbench/{track}-anew-v1").sync(store)
    assert shown(uri, track) == shown(uri, f"{track}-anew")


def test_changed_parameters_do_not_trip_over_write_once(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", track="params")
    sink = MlflowSink(uri)
    sink.sync(store)
    config = store.config()
    config["environment"]["torch"] = "9.9"
    store.write_config(config)
    sink.sync(store)
    runs = runs_of(uri, "params")
    parent = runs["sequential-s0"]
    assert parent.data.params["environment.torch"] == "9.9"
    assert {r.data.tags.get("mlflow.parentRunId") for r in runs.values()} == {None, parent.info.run_id}


def test_values_mlflow_cannot_hold_are_said_to_be_undefined(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", track="infinite", oracle=False, n_rows=2, state="running")
    line = dict(step_lines("sequential", 0, 2)[0], grad_norm=float("inf"), loss_nats=float("nan"))
    with (store.folder / "steps.jsonl").open("a", encoding="utf-8") as log:  # the store itself refuses to write it
        log.write(json.dumps(line) + "\n")
    MlflowSink(uri).sync(store)
    child = runs_of(uri, "infinite")["t02-2012"]
    points = points_of(uri, child)
    assert curve(points, "train/grad_norm/undefined") == {1: 1.0}
    assert curve(points, "train/loss/undefined") == {1: 1.0}
    assert {"train/grad_norm", "train/loss"}.isdisjoint(child.data.metrics)
    short = write_run(tmp_path / "short", track="short", n_stages=1)  # nothing can be forgotten in one stage
    MlflowSink(uri).sync(short)
    parent = runs_of(uri, "short")["sequential-s0"]
    assert parent.data.metrics["score/backward/undefined"] == 1.0
    assert "score/backward" not in parent.data.metrics
    assert parent.data.tags["clbench.undefined.backward"]
    assert all(abs(value) < 1e300 for value in parent.data.metrics.values())


def test_checkpoints_made_elsewhere_have_no_bill_but_curves(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", method="frozen", track="outside")
    (store.folder / "ledger.json").unlink()
    MlflowSink(uri).sync(store)
    parent = runs_of(uri, "outside")["frozen-s0"]
    assert len(curve(points_of(uri, parent), "bpb/2012")) == 4
    assert not any(key.startswith("cost/") for key in parent.data.metrics)


def test_odd_stage_names_become_unique_metric_names(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", track="odd", n_stages=3, n_rows=1, state="running")
    config = store.config()
    for stage, name in zip(config["stages"], ("CC=2013/20", "CC@2013/20", "日本 [x]"), strict=True):
        stage["name"] = name
    store.write_config(config)
    MlflowSink(uri).sync(store)
    keys = {key for key in runs_of(uri, "odd")["sequential-s0"].data.metrics if key.startswith("bpb/")}
    assert keys == {"bpb/CC_2013_20", "bpb/CC_2013_20-01", "bpb/日本 _x_"}


def test_parameters_keep_mlflows_limits() -> None:
    flat = flatten({"a": {"b=c": 1, "long": "x" * 7000}, "list": [1, 2], "none": None, "yes": True, "empty": {}})
    assert flat["a.b_c"] == "1"
    assert flat["list"] == "[1, 2]"
    assert (flat["none"], flat["yes"], flat["empty"]) == ("null", "true", "{}")
    assert len(flat["a.long"]) == 6000
    assert "7000 characters" in flat["a.long"]


def test_hundreds_of_parameters_and_thousands_of_points_fit(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", track="many", n_rows=1, state="running")
    config = store.config()
    config["training"] |= {f"option_{n}": n for n in range(250)}
    store.write_config(config)
    line = step_lines("sequential", 0, 1)[0]
    store.append_steps([dict(line, step=n) for n in range(1, 401)])  # type: ignore[misc]
    MlflowSink(uri).sync(store)
    runs = runs_of(uri, "many")
    assert runs["sequential-s0"].data.params["training.option_249"] == "249"
    assert set(curve(points_of(uri, runs["t01-2011"]), "train/lr")) == set(range(1, 401))


def test_failed_and_resumed_runs_change_their_state(uri: str, tmp_path: Path) -> None:
    store = write_run(tmp_path / "run", track="state", n_rows=2, state="failed")
    sink = MlflowSink(uri)
    sink.sync(store)
    assert runs_of(uri, "state")["sequential-s0"].info.status == "FAILED"
    store.write_status("running")
    sink.sync(store)
    parent = runs_of(uri, "state")["sequential-s0"]
    assert (parent.info.status, parent.data.tags["clbench.status"]) == ("RUNNING", "running")


WORKER = """
import sys
from pathlib import Path
from clbench.results.store import RunStore
from clbench.tracking import MlflowSink
def warn(line):
    raise SystemExit(line)
print(MlflowSink(sys.argv[1], warn=warn).safe_sync(RunStore.open(Path(sys.argv[2]))))
"""


@pytest.mark.slow
def test_many_processes_on_a_fresh_database(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    for seed in range(2):
        write_run(tmp_path / f"seed-{seed}", seed=seed, track="together", n_stages=2)
    folders = [tmp_path / f"seed-{seed}" for seed in (0, 1, 1)]  # two of them at once on one run
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, uri, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, answers
    assert answers[1][0] == answers[2][0]
    client = client_of(uri)
    experiment = client.get_experiment_by_name("clbench/together-v1")
    runs = client.search_runs([experiment.experiment_id])
    assert Counter(run.data.tags["clbench.kind"] for run in runs) == {"benchmark": 2, "stage": 2}
    for run in runs:
        assert set(points_of(uri, run).values()) == {1}
        steps = Counter((key, step) for key, step, _, _ in points_of(uri, run).elements())
        assert set(steps.values()) == {1}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("kind", ["refused", "unknown scheme", "not a folder", "not a database", "no file"])
def test_a_broken_sink_never_breaks_a_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"this is no database" * 100)
    uri = {
        "refused": f"http://user:secret@127.0.0.1:{closed_port()}",
        "unknown scheme": "nonsense://somewhere",
        "not a folder": f"sqlite:///{garbage}/mlflow.db",
        "not a database": f"sqlite:///{garbage}",
        "no file": "sqlite://",
    }[kind]
    store = write_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    said: list[str] = []
    sink = MlflowSink(uri, warn=said.append)
    start = time.monotonic()
    assert sink.safe_sync(store) is None
    assert sink.safe_sync(store) is None
    assert time.monotonic() - start < 30
    assert len(said) == 1
    assert "\n" not in said[0]
    assert "secret" not in said[0]
    assert f"clbench mlflow sync {store.folder}" in said[0]
    with pytest.raises(ClbenchError) as caught:
        sink.sync(store)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    after = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    assert {path for path in after if path.name != ".mlflow.lock"} == set(before)
    assert all(after[path] == data for path, data in before.items())


def test_a_sink_that_recovers_shows_everything(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("in the way", encoding="utf-8")
    said: list[str] = []
    sink = MlflowSink(default_uri(blocked), warn=said.append)
    store = write_run(tmp_path / "run", track="recovers")
    assert sink.safe_sync(store) is None
    blocked.unlink()
    assert sink.safe_sync(store) is not None
    assert len(said) == 1
    assert len(runs_of(default_uri(blocked), "recovers")) == 4


def test_a_broken_run_folder_is_one_line(tmp_path: Path) -> None:
    store = write_run(tmp_path / "run")
    config = store.config()
    del config["track"]["name"]
    store.write_config(config)
    with pytest.raises(ClbenchError, match=r"run\.yaml lacks a field"):
        plan_of(store)


def test_modes(tmp_path: Path) -> None:
    assert uri_of_mode("none", tmp_path) is None
    assert uri_of_mode("sqlite", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert uri_of_mode("http://127.0.0.1:5000", tmp_path) == "http://127.0.0.1:5000"
    for wrong in ("sqlit", "file:///somewhere", "mlruns"):
        with pytest.raises(ConfigError, match="--mlflow"):
            uri_of_mode(wrong, tmp_path)
    assert public_uri("http://me:word@host/x") == "http://host/x"


def test_importing_the_sink_imports_neither_mlflow_nor_matplotlib() -> None:
    heavy = {"mlflow", "matplotlib", "sqlalchemy", "torch"}
    code = f"import sys, clbench.tracking\nprint({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()


PAGE = """
import sys
from clbench.tracking import open_ui
ui = open_ui(sys.argv[1], port=0)
print(ui.url, flush=True)
ui.wait()
"""


@pytest.mark.slow
def test_the_page_answers_shows_the_runs_and_is_stopped(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    store = write_run(tmp_path / "run", track="page")
    run_id = MlflowSink(uri).sync(store)
    process = subprocess.Popen([sys.executable, "-c", PAGE, uri], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        port = int(url.rpartition(":")[2])
        status, page = get(port, "/")
        assert status == 200
        assert b"<html" in page.lower()
        run = json.loads(get(port, f"/api/2.0/mlflow/runs/get?run_id={run_id}")[1])
        assert run["run"]["info"]["run_name"] == "sequential-s0"
        status, picture = get(port, f"/get-artifact?run_id={run_id}&path=matrix-bits_per_byte.png")
        assert status == 200
        assert picture.startswith(b"\x89PNG")
        # through a server it is the same run, nothing twice, and artifacts go where the database has them
        before = shown(uri, "page")
        report = tmp_path / "page.html"
        report.write_text("<p>", encoding="utf-8")
        assert MlflowSink(url).sync(RunStore.open(store.folder), report) == run_id
        assert shown(uri, "page") == before
        assert get(port, f"/get-artifact?run_id={run_id}&path=report.html") == (200, b"<p>")
        with pytest.raises(ClbenchError, match="cannot listen"):
            open_ui(uri, port=port)
    finally:
        process.send_signal(signal.SIGINT)  # Ctrl-C
        process.wait(timeout=20)
    with pytest.raises(OSError):
        get(port, "/health")


def test_no_page_without_a_database(tmp_path: Path) -> None:
    with pytest.raises(ClbenchError, match="no MLflow database"):
        open_ui(default_uri(tmp_path))
