"""The command line as a user meets it: help, mistakes in the arguments, and every command once on a real run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clbench import registry
from clbench.results.store import RunStore
from clbench.stream import Stream
from tests.command_line.driver import clbench, results_of, write_track

COMMANDS = [
    "",
    "prepare",
    "run",
    "evaluate",
    "oracle",
    "report",
    "slices",
    "ledger",
    "fisher",
    "merge",
    "capacity",
    "probe",
    "forecast",
    "predictors",
    "deceleration",
    "facts",
    "arms",
    "stream",
    "stream build",
    "stream show",
    "stream arms",
    "leaderboard",
    "leaderboard build",
    "leaderboard pack",
    "leaderboard verify",
    "list",
    "ui",
    "mlflow",
    "mlflow sync",
    "doctor",
    "quickstart",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    for flag in ("-h", "--help"):
        shown = clbench(*command.split(), flag)
        assert shown.code == 0
        assert f"Usage: clbench {command}".strip() in shown.out
        assert shown.err == ""


def test_help_lists_the_commands_that_are_tested_here() -> None:
    listed = clbench("--help").out.partition("Commands:")[2].split("\n  ")
    top = {line.split()[0] for line in listed if line.strip() and not line.startswith(" ")}
    assert top == {command.split()[0] for command in COMMANDS if command}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("rnu", "'run'"),
        ("leaderboard bild", "'build'"),
        ("run", "--method"),
        ("run -m sequential --sed 1", "--seed"),
        ("run -m sequential --seed x", "valid integer"),
        ("run -m sequentail -t tinydocs", "did you mean 'sequential'?"),
        ("run -m replay:fractoin=1/2 -t tinydocs", "did you mean 'fraction'?"),
        ("run -m replay:fraction=3 -t tinydocs", "number between 0 and 1"),
        ("run -m replay:fraction -t tinydocs", "replay:fraction"),
        ("run -m no/such/file.py -t tinydocs", "file is missing"),
        ("run -m no_such_package.module:Class -t tinydocs", "no module 'no_such_package'"),
        ("run -m sequential -t tinydosc", "did you mean 'tinydocs'?"),
        ("run -m sequential -t no/such/track.yaml", "track file is missing"),
        ("run -m replay -m replay -t TRACK", "both set the mixture"),
        ("run -m sequential -t tinydocs --device gpu", "device 'gpu' cannot be used"),
        ("run -m sequential -t tinydocs --device meta", "device 'meta' cannot be used"),
        ("run -m sequential -t tinydocs --device cuda:77", "clbench doctor"),
        ("run -m sequential -t TRACK --mlflow sqlit", "not an MLflow target: 'sqlit'"),
        ("prepare tinydosc", "did you mean 'tinydocs'?"),
        ("prepare no/such/stream.py", "file is missing"),
        ("oracle tinydosc", "did you mean 'tinydocs'?"),
        ("quickstart -t tinydosc", "did you mean 'tinydocs'?"),
        ("list metods", "did you mean 'methods'"),
        ("report no-such-folder", "folder is missing"),
        ("leaderboard build no-such-folder", "folder is missing"),
        ("leaderboard pack no-such-folder", "folder is missing"),
        ("mlflow sync no-such-folder", "folder is missing"),
        ("evaluate -t tinydocs", "no checkpoint was given"),
        ("evaluate -t tinydocs base", "is no checkpoint"),
        ("evaluate -t tinydocs 0=a 0=b", "stage 0 is given twice"),
        ("evaluate -t tinydocs --checkpoints x=a", "is no checkpoint"),
    ],
)
def test_mistakes_get_one_line(arguments: str, expected: str, tiny: Path, tmp_path: Path) -> None:
    words = arguments.replace("TRACK", str(tiny)).split()
    if words[0] in ("run", "quickstart"):
        words += ["--out", str(tmp_path)]
    outcome = clbench(*words)
    assert expected in outcome.error
    assert outcome.code == 2
    assert outcome.out == ""
    assert list(tmp_path.rglob("run.yaml")) == [], "a mistake left a run behind"


def test_a_command_without_arguments_shows_its_help() -> None:
    for command in ([], ["leaderboard"], ["mlflow"]):
        shown = clbench(*command)
        assert (shown.code, "Traceback" in shown.err) == (2, False)
        assert "Usage: clbench" in shown.out + shown.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "not valid YAML"),
        ("just text", "the whole file"),
        ("", "the whole file"),
        ("name: x\nversion: 1\n", "Field required"),
        ("colour: red\n", "Field required"),
    ],
)
def test_a_broken_track_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    error = clbench("run", "-m", "sequential", "-t", path).error
    assert expected in error
    assert str(path) in error


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"n_heads": 3}}, "no multiple of n_heads 3"),
        ({"training": {"sequence_length": 1000}}, "larger than model.max_length"),
        ({"training": {"learning_rte": 1}}, "training.learning_rte: Extra inputs"),
        ({"seeds": [0, 0]}, "seeds are repeated"),
        ({"stream": "tinydosc"}, "did you mean 'tinydocs'?"),
        ({"name": "Not A Name"}, "name: String should match"),
    ],
)
def test_a_track_that_does_not_hold_together_is_refused(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    path = write_track(tmp_path / "track.yaml", **changes)  # type: ignore[arg-type]
    assert expected in clbench("run", "-m", "sequential", "-t", path, "-o", tmp_path / "runs").error


def test_an_unknown_suite_is_refused_before_training(tmp_path: Path, tiny: Path) -> None:
    path = write_track(tmp_path / "track.yaml", suites=["heldoot"])
    outcome = clbench("run", "-m", "sequential", "-t", path, "-o", tmp_path / "runs", "--mlflow", "none")
    assert "unknown suite 'heldoot'; did you mean 'heldout'?" in outcome.error
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


# --- every command on a real run


def test_list_and_its_json() -> None:
    shown = clbench("list")
    assert shown.code == 0
    for word in ("sequential", "replay", "frozen", "tinydocs", "heldout", "fraction"):
        assert word in shown.out
    found = json.loads(clbench("list", "--json").out)
    assert set(found) == {"methods", "streams", "suites", "tracks"}
    replay = next(method for method in found["methods"] if method["name"] == "replay")
    assert replay["options"][0]["name"] == "fraction"
    assert replay["needs"] == ["past_data"]
    assert json.loads(clbench("list", "runs", "--runs", "no-such-folder", "--json").out) == {"runs": []}


def test_running_twice_returns_at_once(runs: Path, tiny: Path) -> None:
    store = RunStore(runs / "tiny" / "sequential" / "seed-0")
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    assert results_of(store)["state"] == "done"
    assert store.ledger()["tokens"], "the run has to have trained"
    again = clbench("run", "-m", "sequential", "-t", tiny, "-o", runs, "--mlflow", "none", "--json")
    assert again.code == 0
    assert json.loads(again.out)[0]["label"] == "sequential"
    assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before


def test_runs_are_listed(runs: Path) -> None:
    found = json.loads(clbench("list", "runs", "--runs", runs, "--json").out)["runs"]
    assert sorted(Path(run["name"]).parent.name for run in found) == ["replay", "sequential"]
    assert {run["state"] for run in found} == {"done"}
    assert "4 of 4 rows" in " ".join(clbench("list", "runs", "--runs", runs).out.split())


def test_one_broken_run_does_not_hide_the_others(runs: Path, tmp_path: Path) -> None:
    for name, text in (("a", "track: [not closed"), ("b", "just text"), ("c", "format: 1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(text, encoding="utf-8")
    shutil.copytree(runs / "tiny" / "sequential" / "seed-0", tmp_path / "whole")
    found = json.loads(clbench("list", "runs", "--runs", tmp_path, "--json").out)["runs"]
    assert [run["state"] for run in found] == ["broken", "broken", "broken", "done"]
    assert "not a mapping" in found[1]["about"]
    for command in ("report", "mlflow sync"):
        assert clbench(*command.split(), tmp_path / "a").error


def test_report_and_leaderboard_build(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    made = clbench("report", runs, "--out", page, "--json")
    numbers = json.loads(made.out)
    assert numbers["report"] == str(page)
    first, *others = [summary["label"] for summary in numbers["summaries"]]
    assert [(one["a"], one["b"]) for one in numbers["differences"]] == [(other, first) for other in others]
    assert "sequential" in page.read_text(encoding="utf-8")

    site = clbench("leaderboard", "build", runs, "--out", tmp_path / "site")
    assert site.code == 0
    assert "sequential" in Path(site.out.strip().splitlines()[-1]).read_text(encoding="utf-8")


def test_pack_and_verify_an_entry_and_a_changed_one(
    tmp_path: Path, runs: Path, tinydocs: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs all seeds of a track that is frozen; one changed byte of an entry has to be found."""
    (tmp_path / "tracks").mkdir()
    write_track(tmp_path / "tracks" / "tiny.yaml", stream_sha256=tinydocs.sha256)
    monkeypatch.setattr(registry, "tracks_folder", lambda: tmp_path / "tracks")
    assert clbench("prepare", "tiny").code == 0
    done = clbench("run", "-m", "frozen", "-t", "tiny", "--all-seeds", "-o", tmp_path / "runs", "--mlflow", "none")
    assert done.code == 0, done.err
    packed = clbench("leaderboard", "pack", tmp_path / "runs", "--out", tmp_path / "entries")
    assert packed.code == 0, packed.err
    entry = packed.out.strip()
    assert "declarations" in packed.err
    undeclared = clbench("leaderboard", "verify", entry)
    assert (undeclared.code, undeclared.out.count("declarations: ")) == (2, 3), undeclared.out
    about = json.loads((Path(entry) / "entry.json").read_text(encoding="utf-8"))
    about["declarations"] |= {"authors": ["A. Tester"], "only_track_data": True, "heldout_untouched": True}
    (Path(entry) / "entry.json").write_text(json.dumps(about), encoding="utf-8")
    passed = clbench("leaderboard", "verify", entry, "--json")
    assert (passed.code, json.loads(passed.out)) == (0, {entry: []})

    rows = sorted(Path(entry).rglob("*.parquet"))[0]
    data = bytearray(rows.read_bytes())
    data[len(data) // 2] ^= 1
    rows.write_bytes(data)
    refused = clbench("leaderboard", "verify", entry, "--json")
    assert refused.code == 2
    assert json.loads(refused.out)[entry]
    assert "Traceback" not in refused.err
    assert "seed" in clbench("leaderboard", "pack", runs / "tiny" / "sequential", "--out", tmp_path / "b").error


def test_mlflow_sync_twice_changes_nothing(runs: Path, tmp_path: Path) -> None:
    first = clbench("mlflow", "sync", runs / "tiny" / "sequential", "--root", tmp_path)
    assert first.code == 0, first.err
    second = clbench("mlflow", "sync", runs / "tiny" / "sequential", "--root", tmp_path)
    assert second.code == 0, second.err
    assert (tmp_path / "mlflow.db").is_file()
    reports = list((tmp_path / "mlflow-artifacts").rglob("report.html"))
    assert len(reports) == len(list((runs / "tiny" / "sequential").iterdir()))
    assert "sequential" in reports[0].read_text(encoding="utf-8")


@pytest.mark.slow
def test_quickstart_end_to_end_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every socket beyond this machine is closed by ``no_network``; CLBENCH_OFFLINE says so to the program, too."""
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    outcome = clbench("quickstart", "-t", "tinydocs")
    assert outcome.code == 0, outcome.err
    for word in ("sequential", "replay", "frozen", "leaderboard page: site", "clbench ui --runs runs"):
        assert word in outcome.out, outcome.out
    assert (tmp_path / "site" / "index.html").is_file()
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    for method in ("sequential", "replay", "frozen"):
        store = RunStore(tmp_path / "runs" / "tinydocs" / method / "seed-0")
        assert store.status()["state"] == "done"
        assert store.stages_done() == [0, 1, 2, 3]
    assert str(tmp_path) not in outcome.out, "paths are shown as the user gave them"
