"""Cells over processes: nothing twice, a kill loses one cell, a failing cell is named, and the same on runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from clbench import cells, extras, fanout, outside, registry
from clbench.build import build_stream
from clbench.cli import app
from clbench.errors import BusyError, ClbenchError, ConfigError, NotFoundError
from clbench.fanout import Job, Outcome, Request, Subject, measure
from clbench.leaderboard import submission
from clbench.results import tasks
from clbench.results.store import RunStore
from clbench.results.summary import summarise
from clbench.run import Place, execute
from clbench.stream import Stream
from clbench.tracking import plan_of
from clbench.train.models import load_model, make_model, save_model, weights_of
from tests import probe_suite
from tests.command_line.driver import write_track
from tests.engine import prepare_tiny, tiny_track
from tests.probe_suite import N_ITEMS

ROOT = Path(__file__).parents[1]


def make_models(folder: Path, n_right: dict[str, int]) -> dict[str, str]:
    """Small models that the probe gives so many right answers, with a tokenizer each."""
    track = tiny_track()
    assert track.model is not None
    built = build_stream(registry.make_stream_source(track.stream), progress=False)
    found = {}
    for name, right in n_right.items():
        model = make_model(track.model, vocab_size=built.vocab_size, eos_id=built.eos_id, seed=0)
        with torch.no_grad():
            dict(model.named_parameters())["model.norm.weight"][0] = float(right)
        save_model(model, weights_of(model), folder / name, tokenizer_folder=built.tokenizer_folder)
        found[name] = str(folder / name)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"), {"one": 35, "two": 20})


@pytest.fixture
def fresh_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of cells; all else of the cache folder stays."""
    monkeypatch.setattr(cells, "cells_folder", lambda: tmp_path / "cells")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, which worker processes share."""
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))


def spec(place: Path) -> str:
    return f"{probe_suite.__file__}:Probe:place={place}"


def jobs(models: dict[str, str], place: Path) -> list[Job]:
    place.mkdir(exist_ok=True)
    request = Request(spec=spec(place))
    return [Job(subject=Subject(label=name, path=path), requests=(request,)) for name, path in models.items()]


def lines(place: Path, name: str = "log") -> list[str]:
    path = place / name
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def measured(place: Path) -> Counter[str]:
    """How often each cell was measured to its end."""
    return Counter(line.rpartition(" ")[0] for line in lines(place))


def score(outcome: Outcome, job: int) -> dict[str, float]:
    cell = outcome.cell(job, 0)
    assert cell is not None
    return {name: task.score for name, task in tasks.tasks_of(cell.rows).items()}


@pytest.mark.usefixtures("fresh_cells")
def test_every_cell_once_and_then_from_the_cache(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "probe"
    first = measure(jobs(models, place))
    assert (first.n_measured, first.n_cached, first.failures) == (6, 0, [])
    assert set(measured(place).values()) == {1}
    assert score(first, 0) == {"task-a": 35 / N_ITEMS, "task-b": 0.75, "task-c": 0.75}
    assert score(first, 1)["task-a"] == 20 / N_ITEMS
    again = measure(jobs(models, place))
    assert (again.n_measured, again.n_cached) == (0, 6)
    assert len(lines(place)) == 6
    known = [
        Job(subject=Subject(label="one", path=models["one"], weights_sha256=first.weights_sha256[0]),
            requests=(Request(spec=spec(place)),))
    ]  # fmt: skip
    monkeypatch.setattr(fanout.Bench, "_model", None)  # what is measured already needs no model
    assert measure(known).n_cached == 3
    assert not list((tmp_path / "cells" / "locks").glob("*"))


@pytest.mark.usefixtures("fresh_cells")
def test_a_failing_cell_is_named_and_the_rest_goes_on(models: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "probe"
    place.mkdir()
    (place / "crash-a").touch()
    (place / "refuse-c").touch()
    outcome = measure(jobs(models, place))
    assert [str(one).replace(spec(place), "probe") for one in outcome.failures] == [
        "one · probe · a: ValueError: a defect",
        "one · probe · c: it cannot be asked (c)",
        "two · probe · a: ValueError: a defect",
        "two · probe · c: it cannot be asked (c)",
    ]
    assert outcome.n_measured == 2
    assert outcome.cell(0, 0) is None
    (place / "crash-a").unlink()
    (place / "refuse-c").unlink()
    mended = measure(jobs(models, place))
    assert (mended.n_measured, mended.n_cached, mended.failures) == (4, 2, [])


@pytest.mark.usefixtures("fresh_cells")
def test_a_checkpoint_that_is_not_what_was_meant(models: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "probe"
    given = jobs({**models, "gone": str(tmp_path / "nowhere")}, place)
    given[0] = Job(
        subject=Subject(label="one", path=models["one"], weights_sha256="0" * 64), requests=given[0].requests
    )
    outcome = measure(given)
    whys = {one.subject: one.why for one in outcome.failures}
    assert "these are not the weights" in whys["one"]
    assert "no tokenizer beside this checkpoint" in whys["gone"] or "missing" in whys["gone"]
    assert outcome.cell(1, 0) is not None


def test_a_suite_that_is_not_there_is_said_before_anything_is_measured(models: dict[str, str]) -> None:
    job = Job(subject=Subject(label="one", path=models["one"]), requests=(Request(spec="no-such-suite"),))
    with pytest.raises(NotFoundError, match="unknown suite"):
        measure([job])


def in_another_process(models: dict[str, str], place: Path) -> subprocess.Popen[bytes]:
    """Measure the same in another process; returns once it has begun."""
    code = (
        "import json, sys; from clbench.fanout import *\n"
        "models, spec = json.loads(sys.argv[1]), sys.argv[2]\n"
        "measure([Job(subject=Subject(label=n, path=p), requests=(Request(spec=spec),)) for n, p in models.items()])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(models), spec(place)], cwd=ROOT)
    wait_for(lambda: bool(lines(place, "begun")) or process.poll() is not None)
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.usefixtures("own_home")
def test_two_at_once_measure_each_cell_once(models: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "probe"
    place.mkdir()
    (place / "slow").write_text("0.3")
    other = in_another_process(models, place)
    mine = measure(jobs(models, place))
    assert other.wait(timeout=120) == 0
    assert set(measured(place).values()) == {1}
    assert len(lines(place)) == 6
    assert (mine.failures, mine.n_measured + mine.n_cached) == ([], 6)
    assert mine.n_measured > 0, "it only waited for the other"


@pytest.mark.usefixtures("fresh_cells")
def test_a_locked_cell_is_busy_or_waited_for(models: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "probe"
    place.mkdir()
    bench, subject = fanout.Bench("cpu"), Subject(label="one", path=models["one"])
    request = Request(spec=spec(place))
    digest = bench._model(models["one"], torch.device("cpu"))[1]
    suite = bench.suite(request)
    name = cells.address(
        suite, weights_sha256=digest, tokenizer_sha256=bench.tokenizer(suite, models["one"])[1], shard="a"
    )
    with cells._locked(name, wait=True), pytest.raises(BusyError):
        bench.measure(subject, request, "a", wait=False)
    assert bench.measure(subject, request, "a", wait=False)[0].cached is False


@pytest.mark.usefixtures("own_home")
def test_workers_share_the_work_and_a_killed_one_loses_one_cell(models: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "probe"
    place.mkdir()
    (place / "kill-b").touch()
    (place / "crash-c").touch()
    outcome = measure(jobs(models, place), n_jobs=2, devices=["cpu"])
    assert [(one.subject, one.shard, one.why) for one in sorted(outcome.failures, key=str)] == [
        ("one", "c", "ValueError: a defect"),
        ("two", "c", "ValueError: a defect"),
    ]
    assert set(measured(place).values()) == {1}
    assert outcome.n_measured == 4
    assert Counter(lines(place, "begun"))["b"] == 3  # once more than models: the one that died
    pids = {line.rpartition(" ")[2] for line in lines(place)}
    assert str(os.getpid()) not in pids
    assert score_of_shards(outcome) == {"one": {"a", "b"}, "two": {"a", "b"}}


def score_of_shards(outcome: Outcome) -> dict[str, set[str]]:
    return {name: set(outcome.shards[j, 0]) for j, name in enumerate(("one", "two"))}


@pytest.mark.usefixtures("own_home")
def test_a_killed_call_goes_on_where_it_was(models: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL to the process that measures: what it had finished is there, the lock of the other cell is free."""
    place = tmp_path / "probe"
    place.mkdir()
    (place / "slow").write_text("0.4")
    process = in_another_process(models, place)
    wait_for(lambda: len(lines(place)) >= 2 or process.poll() is not None)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(lines(place))
    assert 2 <= done < 6
    (place / "slow").unlink()
    outcome = measure(jobs(models, place))
    assert (outcome.failures, outcome.n_measured + outcome.n_cached) == ([], 6)
    assert outcome.n_measured in (6 - done, 6 - done + 1)  # the log is written a moment before the cell
    assert sum(measured(place).values()) <= 7


# the queue


def test_a_worker_stays_with_its_checkpoint() -> None:
    queue = fanout._Queue([fanout._Task(job=j, request=0, shard=s) for j in range(2) for s in "abc"])
    first, second = queue.take(None), queue.take(None)
    assert first is not None
    assert second is not None
    assert (first.job, second.job) == (0, 1)
    assert [queue.take(0).job for _ in range(2)] == [0, 0]  # type: ignore[union-attr]
    third = queue.take(0)  # nothing left of its own: it helps the other
    assert third is not None
    assert (third.job, third.shard) == (1, "b")
    queue.put_back(third)
    assert [queue.take(1).shard for _ in range(2)] == ["c", "b"]  # type: ignore[union-attr]
    assert queue.take(1) is None


def test_devices_are_checked() -> None:
    assert fanout.devices_of("cpu,cpu") == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match="names no devices"):
        fanout.devices_of("cpu,")
    with pytest.raises(ConfigError, match="cannot be used"):
        fanout.devices_of("cuda:99")


# runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clbench_home: Path) -> RunStore:
    track = tiny_track()
    prepare_tiny(track)
    place = Place(runs_root=tmp_path_factory.mktemp("runs"), device="cpu")
    return execute(track, [registry.make_method("sequential")], seed=0, place=place)


def copied(run: RunStore, folder: Path) -> RunStore:
    shutil.copytree(run.folder, folder)
    return RunStore(folder)


@pytest.mark.usefixtures("fresh_cells")
def test_a_run_gets_further_suites_beside_its_own(run: RunStore, tmp_path: Path) -> None:
    store, place = copied(run, tmp_path / "run"), tmp_path / "probe"
    place.mkdir()
    told: list[RunStore] = []
    before = {path.name: path.read_bytes() for path in sorted((store.folder / "stages").iterdir())}
    figures = summarise([store]).as_dict()
    found = extras.measure_extras([store], [spec(place)], sinks=[told.append])
    stages = store.stages_done()
    assert (found.failures, found.outcome.n_measured, len(told)) == ([], 3 * len(stages), 1)
    assert store.suites() == {"heldout": stages, "probe": stages}
    assert {path.name: path.read_bytes() for path in sorted((store.folder / "stages").iterdir())} == before
    assert summarise([store]).as_dict() == figures
    table = tasks.stage_table(store, n_resamples=200)
    assert list(table.stages) == stages
    assert table.scores["task-b"][stages[-1]].value == 0.75
    assert table.retention[stages[-1]].by_task["task-b"].corrected == 1.0

    again = extras.measure_extras([store], [spec(place)], sinks=[told.append])
    assert (again.outcome.n_measured, len(told)) == (0, 1)
    (store.folder / "rows" / "probe-01.parquet").unlink()
    extras.measure_extras([store], [spec(place)], sinks=[told.append])
    assert store.rows("probe", 1).num_rows == 3 * 2 * N_ITEMS
    assert len(told) == 2

    points = {(p.key, p.step): p.value for p in plan_of(store).parent.points}
    assert points["acc/task-b", stages[-1]] == 0.75
    assert ("acc/task-a", 0) in points
    assert not any(key.startswith("acc/") for key in {p.key for p in plan_of(run).parent.points})


def test_extras_neither_stop_a_run_nor_get_into_an_entry(run: RunStore, tmp_path: Path) -> None:
    track = tiny_track()
    root, place = tmp_path / "runs", tmp_path / "probe"
    place.mkdir()
    store = copied(run, root / track.name / "sequential" / "seed-0")
    extras.measure_extras([store], [spec(place)])
    execute(track, [registry.make_method("sequential")], seed=0, place=Place(runs_root=root, device="cpu"))
    assert store.status()["state"] == "done"
    assert "probe" in store.suites()
    target = RunStore(tmp_path / "copy")
    submission.copy_run(store, target.folder, len(store.config()["stages"]))
    assert {path.name.partition("-")[0] for path in (target.folder / "rows").iterdir()} == {"heldout"}


def test_rows_of_other_weights_do_not_count(run: RunStore, tmp_path: Path) -> None:
    store, place = copied(run, tmp_path / "run"), tmp_path / "probe"
    place.mkdir()
    extras.measure_extras([store], [spec(place)])
    record = store.stage_record(1)
    store.write_stage_record({**record, "weights_sha256": "0" * 64})
    assert 1 not in store.suites()["probe"]
    found = extras.measure_extras([store], [spec(place)])
    assert ["these are not the weights" in one.why for one in found.failures] == [True] * 3
    store.write_stage_record(record)
    shutil.rmtree(store.folder / "release" / "stage-02")
    found = extras.measure_extras([store], [spec(place)])
    assert ["weights are not kept" in one.why for one in found.failures] == [True]
    assert 2 in store.suites()["probe"], "what was measured stays"


def test_a_runs_own_suite_is_not_replaced(run: RunStore, tmp_path: Path) -> None:
    found = extras.measure_extras([run], ["heldout"])
    assert (found.outcome.n_measured, found.outcome.n_cached) == (0, 0)
    with pytest.raises(ConfigError, match="would take its place"):
        extras.measure_extras([run], ["heldout:max_length=16"])
    with pytest.raises(ConfigError, match="named twice"):
        extras.measure_extras([run], [spec(tmp_path), spec(tmp_path)])


def test_a_suite_of_questions_in_a_track(tmp_path: Path, tinydocs: Stream) -> None:
    """The recorder gives a suite without a stream the stream's tokenizer; its cells are those of the extras."""
    place = tmp_path / "probe"
    place.mkdir()
    track = tiny_track().model_copy(update={"name": "asked", "suites": ["heldout", spec(place)]})
    prepare_tiny(track)
    store = execute(track, [registry.make_method("frozen")], seed=0, place=Place(runs_root=tmp_path, device="cpu"))
    assert set(store.stage_record(0)["cells"]) == {"heldout", "probe"}
    assert tasks.tasks_of_run(store)[1]["task-b"].score == 0.75
    assert submission.suite_names(track.suites) == ["heldout", "probe"]
    subject = extras.subject_of(store, 1)
    outcome = measure([Job(subject=subject, requests=(Request(spec=spec(place)),))])
    assert (outcome.n_measured, outcome.n_cached) == (0, 3)


# the command


def clbench(*words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit | ClbenchError):
        raise result.exception
    error = str(result.exception) if isinstance(result.exception, ClbenchError) else result.stderr
    return result.exit_code, result.stdout, error


@pytest.mark.usefixtures("fresh_cells")
def test_evaluate_measures_a_run(run: RunStore, tmp_path: Path) -> None:
    store, place = copied(run, tmp_path / "run"), tmp_path / "probe"
    place.mkdir()
    (place / "crash-b").touch()
    code, out, error = clbench("evaluate", store.folder, "--suite", spec(place), "--json")
    assert code == 1
    assert f"{store.folder} base · {spec(place)} · b: ValueError: a defect" in error
    assert set(json.loads(out)["runs"][str(store.folder)]["scores"]) == {"task-a", "task-c"}
    assert set((store.extra_record("probe", 1) or {})["cells"]) == {"a", "c"}
    (place / "crash-b").unlink()
    code, out, _ = clbench("evaluate", store.folder, "--suite", spec(place))
    assert code == 0
    assert "task-b" in out
    assert "retained" in out


@pytest.mark.usefixtures("fresh_cells")
def test_a_track_of_questions_alone_shows_their_scores(run: RunStore, tmp_path: Path) -> None:
    (place := tmp_path / "probe").mkdir()
    track = write_track(tmp_path / "questions.yaml", suites=[spec(place)])
    given = run.folder / "release" / "stage-01"
    code, out, _ = clbench("evaluate", "--checkpoints", f"0={given}", "-t", track, "-o", tmp_path / "mine", "--json")
    assert code == 0
    assert set(json.loads(out)["runs"][str(tmp_path / "mine")]["scores"]) == {"task-a", "task-b", "task-c"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--suite", "no-such"], "unknown suite"),
        ([], "no suite was named"),
        (["0=base", "--suite", "probe"], "cannot be measured at once"),
        (["--suite", "heldout", "--devices", "cuda:99"], "cannot be used"),
    ],
)
def test_evaluate_says_what_is_wrong(run: RunStore, words: list[str], expected: str) -> None:
    code, _, error = clbench("evaluate", run.folder, *words)
    assert code != 0
    assert expected in error


def test_evaluate_with_workers_is_evaluate(
    run: RunStore, tinydocs: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints from elsewhere get the rows that the run has; one that cannot be measured has none, and is named."""
    monkeypatch.setattr(fanout._Run, "spread", lambda self, n_workers, devices: self.here())
    place, track = Place(runs_root=tmp_path, device="cpu"), tiny_track()
    given = {stage: str(run.folder / "release" / f"stage-{stage:02d}") for stage in (1, 2)}
    store, failures = outside.measure_checkpoints(track, given, label="mine", out=tmp_path / "a", place=place, n_jobs=2)
    assert (failures, store.stages_done(), store.status()["state"]) == ([], [1, 2], "done")
    for stage in given:
        assert store.rows("heldout", stage).equals(run.rows("heldout", stage))
        assert store.stage_record(stage)["weights_sha256"] == run.stage_record(stage)["weights_sha256"]
    assert store.ledger()["evaluations"].keys() == {"1", "2"}

    broken = shutil.copytree(given[2], tmp_path / "broken")
    model = load_model(given[2])
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    save_model(model, weights_of(model), broken, tokenizer_folder=tinydocs.tokenizer_folder)
    store, failures = outside.measure_checkpoints(
        track, {1: given[1], 2: str(broken)}, label="mine", out=tmp_path / "b", place=place, n_jobs=2
    )
    assert [one.subject for one in failures] == ["stage 2"]
    assert (store.stages_done(), store.status()["state"]) == ([1], "failed")
