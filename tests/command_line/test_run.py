"""Runs that are stopped, damaged or disturbed: one clear line, nothing lost, and the same bits in the end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clbench.files import exclusive
from clbench.results.store import RunStore
from clbench.train import checkpoint
from tests.command_line.driver import Outcome, clbench, results_of, write_track

PROBES = Path(__file__).with_name("probes.py")


def run(track: Path, out: Path, method: object = "sequential", *more: object) -> Outcome:
    """Run a method on seed 0 with a resume state after every step."""
    return clbench("run", "-m", method, "-t", track, "-o", out, "--mlflow", "none", "--checkpoint-seconds", 0, *more)


def sequential(out: Path) -> RunStore:
    return RunStore(out / "tiny" / "sequential" / "seed-0")


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> RunStore:
    """A finished run that a test may damage."""
    shutil.copytree(runs / "tiny" / "sequential", tmp_path / "tiny" / "sequential")
    return sequential(tmp_path)


@pytest.fixture
def whole(runs: Path) -> dict[str, Any]:
    """The results of the run that nobody disturbed."""
    return results_of(sequential(runs))


def lose_row(store: RunStore, stage: int) -> None:
    """Take a run back to before a stage was measured, as a kill does."""
    (store.folder / "stages" / f"{stage:02d}.json").unlink()
    (store.folder / "rows" / f"heldout-{stage:02d}.parquet").unlink()
    shutil.rmtree(store.folder / "release" / f"stage-{stage:02d}")


def damage(path: Path) -> None:
    """Turn one bit of a file's middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- damaged files


@pytest.mark.parametrize("how", ["one bit", "cut off", "missing file", "missing manifest", "no JSON"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    copied: RunStore, whole: dict[str, Any], tiny: Path, tmp_path: Path, how: str
) -> None:
    lose_row(copied, 3)
    older, newest = checkpoint.saved(copied.folder / "checkpoints")
    weights = newest / "weights.safetensors"
    if how == "one bit":
        damage(weights)
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "missing file":
        weights.unlink()
    elif how == "missing manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{", encoding="utf-8")
    outcome = run(tiny, tmp_path)
    assert outcome.code == 0
    assert "going back to the checkpoint before it" in outcome.err
    assert str(newest) in outcome.err
    assert results_of(copied) == whole
    assert older in checkpoint.saved(copied.folder / "checkpoints")


def test_when_every_checkpoint_is_damaged_it_says_what_to_do_and_that_helps(
    copied: RunStore, whole: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    lose_row(copied, 3)
    folder = copied.folder / "checkpoints"
    for path in checkpoint.saved(folder):
        damage(path / "optimizer.safetensors")
    for _ in range(2):  # the second attempt must not slip through
        outcome = run(tiny, tmp_path)
        assert outcome.code == 2
        assert "no checkpoint of this run is whole" in outcome.error
        assert f"({folder}); delete this folder and run again" in outcome.error
    assert copied.status()["state"] == "failed"
    shutil.rmtree(folder)
    assert run(tiny, tmp_path).code == 0
    assert results_of(copied) == whole


def test_a_row_that_other_weights_stand_behind_is_measured_again(
    copied: RunStore, whole: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    """As after checkpoints were lost and training began anew on another number of threads."""
    lose_row(copied, 3)
    shutil.rmtree(copied.folder / "checkpoints")
    record = copied.stage_record(2)
    record["weights_sha256"] = "0" * 64
    copied.write_stage_record(record)
    assert run(tiny, tmp_path).code == 0
    assert results_of(copied) == whole


@pytest.mark.parametrize("stage", [0, 2])
def test_lost_rows_are_measured_again_from_the_release_weights(
    copied: RunStore, whole: dict[str, Any], tiny: Path, tmp_path: Path, stage: int, clbench_home: Path
) -> None:
    shutil.rmtree(clbench_home / "cells")  # so that it has to be measured, not looked up
    (copied.folder / "rows" / f"heldout-{stage:02d}.parquet").unlink()
    outcome = run(tiny, tmp_path)
    assert outcome.code == 0
    assert f"measuring stage {stage} again" in outcome.err
    assert results_of(copied) == whole


def test_lost_rows_and_changed_release_weights_are_refused(copied: RunStore, tiny: Path, tmp_path: Path) -> None:
    damage(copied.folder / "rows" / "heldout-02.parquet")
    shutil.copyfile(
        copied.folder / "release" / "stage-01" / "model.safetensors",
        copied.folder / "release" / "stage-02" / "model.safetensors",
    )
    assert "release weights are not those that were measured" in run(tiny, tmp_path).error


def test_a_damaged_cell_of_the_cache_is_measured_again(
    whole: dict[str, Any], tiny: Path, tmp_path: Path, clbench_home: Path
) -> None:
    for path in clbench_home.glob("cells/*/*.parquet"):
        path.unlink()
    assert run(tiny, tmp_path).code == 0
    assert results_of(sequential(tmp_path)) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("track: [", "run.yaml is broken"),
        ("words", "run.yaml is not a mapping"),
        ("a: 1", "run.yaml lacks method, run_id"),
    ],
)
def test_a_broken_run_yaml_is_named(copied: RunStore, tiny: Path, tmp_path: Path, text: str, expected: str) -> None:
    (copied.folder / "run.yaml").write_text(text, encoding="utf-8")
    outcome = run(tiny, tmp_path)
    assert expected in outcome.error
    assert str(copied.folder) in outcome.error


# --- other configurations, other processes


def test_a_folder_of_another_configuration_is_refused_by_name(copied: RunStore, runs: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in copied.folder.rglob("*") if path.is_file()}
    other = write_track(tmp_path / "other.yaml", training={"warmup_steps": 6})
    assert clbench("prepare", other).code == 0
    outcome = run(other, tmp_path)
    assert "this folder holds another run: track " in outcome.error
    assert {path: path.read_bytes() for path in copied.folder.rglob("*") if path.is_file()} == before
    shutil.rmtree(copied.folder)
    shutil.copytree(runs / "tiny" / "replay" / "seed-0", copied.folder)
    outcome = run(write_track(tmp_path / "tiny.yaml"), tmp_path)
    assert "method replay there, sequential now" in outcome.error


def test_three_seeds_are_three_runs_in_three_folders(tiny: Path, tmp_path: Path) -> None:
    outcome = run(tiny, tmp_path, "frozen", "--seed", 0, "--seed", 1, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)[0]["seeds"] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "tiny" / "frozen").iterdir()) == ["seed-0", "seed-1"]


def test_a_second_process_is_told_to_wait(copied: RunStore, tiny: Path, tmp_path: Path) -> None:
    with exclusive(copied.folder, mend=""):
        outcome = run(tiny, tmp_path)
    assert "another process is working here" in outcome.error
    assert str(copied.folder) in outcome.error
    assert run(tiny, tmp_path).code == 0


@pytest.mark.slow
def test_interrupt_is_said_and_can_be_resumed(tmp_path: Path) -> None:
    """A real process gets a real SIGINT; while it is there, a second one is refused."""
    track = write_track(tmp_path / "long.yaml", name="long", training={"n_tokens_per_stage": 12000})
    assert clbench("prepare", track).code == 0
    command = [sys.executable, "-m", "clbench", "run", "-m", "sequential", "-t", str(track), "--mlflow", "none"]
    process = subprocess.Popen(
        [*command, "--checkpoint-seconds", "0", "-o", str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    store = RunStore(tmp_path / "a" / "long" / "sequential" / "seed-0")
    end = time.monotonic() + 120
    while not checkpoint.saved(store.folder / "checkpoints") and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    assert "another process is working here" in run(track, tmp_path / "a").error
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "error: interrupted; the same command goes on from the last checkpoint"
    assert "Traceback" not in err
    assert store.status()["state"] == "stopped"
    assert store.stages_done() == [0]
    assert run(track, tmp_path / "a").code == 0
    assert run(track, tmp_path / "b").code == 0
    assert results_of(store) == results_of(RunStore(tmp_path / "b" / "long" / "sequential" / "seed-0"))
    assert "error" not in store.status()


# --- methods that go wrong, or ask much of a resume


def test_nan_stops_the_run_and_says_where(tiny: Path, tmp_path: Path) -> None:
    outcome = run(tiny, tmp_path, f"{PROBES}:Diverging")
    assert outcome.code == 2
    assert "the loss is" in outcome.error
    assert "(stage 2, step 1)" in outcome.error
    (store,) = [RunStore(path.parent) for path in tmp_path.rglob("run.yaml")]
    assert store.status()["state"] == "failed"
    assert "stage 2, step 1" in store.status()["error"]
    assert store.stages_done() == [0, 1]
    newest = checkpoint.load(checkpoint.saved(store.folder / "checkpoints")[-1])
    assert newest.position == (2, 1, False)
    assert all(bool(tensor.isfinite().all()) for tensor in newest.weights.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("back", [1, 2])
def test_carried_moments_and_other_release_weights_survive_a_kill(
    tiny: Path, tmp_path: Path, stage: int, back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right before a stage is measured; resumed at its end (back=1) or one step before it (back=2)."""
    from clbench import cells

    real, n_calls = cells.measure, 0

    def stopping(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == stage + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    method = f"{PROBES}:Averaging"
    assert run(tiny, tmp_path / "whole", method).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(cells, "measure", stopping)
        assert run(tiny, tmp_path / "cut", method).code == 130
    (cut,) = [RunStore(path.parent) for path in (tmp_path / "cut").rglob("run.yaml")]
    (uncut,) = [RunStore(path.parent) for path in (tmp_path / "whole").rglob("run.yaml")]
    assert cut.status()["state"] == "stopped"
    states = checkpoint.saved(cut.folder / "checkpoints")
    for path in states[len(states) - back + 1 :]:
        shutil.rmtree(path)
    assert checkpoint.load(checkpoint.saved(cut.folder / "checkpoints")[-1]).ended is (back == 1)
    assert run(tiny, tmp_path / "cut", method).code == 0
    assert results_of(cut) == results_of(uncut)
    final = checkpoint.load(checkpoint.saved(cut.folder / "checkpoints")[-1])
    assert final.method_values == [{"n_ended": 3}]
    released = cut.stage_record(3)["weights_sha256"]
    assert released not in {cut.stage_record(k)["weights_sha256"] for k in (0, 1, 2)}


def test_a_stage_shorter_than_one_batch_is_trained_to_the_token(tmp_path: Path) -> None:
    track = write_track(tmp_path / "short.yaml", name="short", training={"n_tokens_per_stage": 5})
    assert clbench("prepare", track).code == 0
    assert run(track, tmp_path, "replay:fraction=1/2").code == 0
    (store,) = [RunStore(path.parent) for path in tmp_path.rglob("run.yaml")]
    tokens = store.ledger()["tokens"]
    assert [sum(row.values()) for row in tokens.values()] == [5, 5, 5]
    assert [store.stage_record(k)["n_steps"] for k in (1, 2, 3)] == [1, 1, 1]


# --- places that cannot be written


def test_a_file_in_the_way_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    outcome = run(tiny, tmp_path / "runs")
    assert "a file is in the way" in outcome.error
    assert str(tmp_path / "runs") in outcome.error
    outcome = clbench("report", tiny.parent, "-o", tmp_path / "runs" / "report.html")
    assert outcome.code == 2


@pytest.mark.parametrize("n_whole", [0, 1, 4])
def test_a_full_disk_leaves_the_previous_checkpoint(
    tiny: Path, tmp_path: Path, whole: dict[str, Any], n_whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's write fails as on a full disk, at every place where a real one may fail as well."""
    import errno

    import safetensors.torch

    real, n_calls = safetensors.torch.save_file, 0

    def full(*arguments: Any, **more: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 3 * n_whole + 2:  # the last of three files of a checkpoint
            text = f"I/O error: No space left on device (os error {errno.ENOSPC})"
            raise safetensors.SafetensorError(text)
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        outcome = run(tiny, tmp_path)
    assert "the disk is full, nothing was half-written" in outcome.error
    store = sequential(tmp_path)
    assert store.status()["state"] == "failed"
    assert len(checkpoint.saved(store.folder / "checkpoints")) == min(n_whole, checkpoint.KEPT)
    assert [path.name for path in store.folder.rglob(".*.tmp")] == []
    assert run(tiny, tmp_path).code == 0
    assert results_of(store) == whole


@pytest.mark.slow
def test_a_really_full_and_a_really_read_only_disk(tiny: Path, tmp_path: Path) -> None:
    unshare = ["unshare", "--map-root-user", "--mount"]
    trial = [*unshare, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a disk of its own")
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "tests.command_line.full_disk_driver", str(tiny), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["whole"] == 0
    for kib, size in found["sizes"].items():
        assert size["code"] == 2, (kib, size)
        assert "the disk is full, nothing was half-written" in size["error"], size
        assert size["code_again"] == 0, size
        assert size["equal"], size
    assert {size["n_saved"] for size in found["sizes"].values()} >= {0, 2}, "the disk ended at one place only"
    assert found["read_only"]["code"] == 2
    assert "this place cannot be written" in found["read_only"]["error"]


def test_an_edited_method_file_is_another_run(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    code = "from clbench.method import Method\n\nclass Mine(Method):\n    '''Does {}.'''\n"
    file.write_text(code.format("this"), encoding="utf-8")
    arguments = ("run", "-t", tiny, "-m", file, "--out", tmp_path / "runs", "--mlflow", "none")
    assert clbench(*arguments).code == 0
    assert clbench(*arguments).code == 0  # unchanged: the same run
    file.write_text(code.format("that"), encoding="utf-8")
    assert "method source" in clbench(*arguments).error
