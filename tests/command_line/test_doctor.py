"""``clbench doctor``: says what is there, and what to do about what is not."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from clbench import doctor
from clbench.doctor import Finding
from tests.command_line.driver import clbench


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_a_whole_machine_is_in_order(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert clbench("prepare", "tinydocs").code == 0
    shown = clbench("doctor", "--json")
    findings = [Finding(**finding) for finding in json.loads(shown.out)]
    assert shown.code == 0, shown.out
    assert {finding.state for finding in findings} <= {"ok", "note", "missing"}
    for finding in findings:
        assert finding.found
        assert finding.remedy or finding.state == "ok", finding
    assert named(findings, "Python").found in sys.version
    assert named(findings, "torch").found.startswith(importlib.metadata.version("torch"))
    assert named(findings, "track tinydocs").state == "ok"
    assert named(findings, "package index").state == "note"
    assert str(tmp_path) in named(findings, "working folder").found
    assert list(tmp_path.iterdir()) == [], "a doctor changes nothing"


def test_the_table_for_people_says_the_same(tiny: Path) -> None:
    shown = clbench("doctor")
    assert shown.code == 0
    for finding in json.loads(clbench("doctor", "--json").out):
        assert finding["name"] in shown.out
    assert "CLBENCH_OFFLINE" in shown.out


@pytest.mark.parametrize(
    ("version", "floor", "older"),
    [
        ("2.13.0+cpu", "2.6", False),
        ("2.5.1", "2.6", True),
        ("5.0", "5", False),
        ("4.57", "5", True),
        ("3.1.5", "3.1.5", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, floor: str, older: bool) -> None:
    assert (doctor._numbers(version) < doctor._numbers(floor)) is older


def test_required_packages_are_those_of_the_project_file() -> None:
    needed = doctor.required_packages()
    assert needed["torch"] == "2.6"
    assert needed["lm-eval"] == "0.4.13"
    assert len(needed) >= 20
    assert "pytest" not in needed


def test_missing_and_old_packages_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pyarrow":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "scipy" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = list(doctor.packages())
    assert {finding.name: finding.remedy for finding in findings if finding.state == "broken"} == {
        "pyarrow": "pip install 'pyarrow>=18'",
        "scipy": "pip install 'scipy>=1.13'",
    }
    assert clbench("doctor").code == 2


def test_an_empty_cache_says_what_prepare_would_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    findings = list(doctor.prepared())
    track = named(findings, "track tinydocs")
    assert (track.state, track.remedy) == ("missing", "`clbench prepare tinydocs`")
    assert "nothing to download" in track.found
    assert not (tmp_path / "home").exists()


def test_a_cache_folder_that_cannot_be_made_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "file" / "home"))
    finding = named(list(doctor.storage()), "cache folder")
    assert finding.state == "broken"
    assert "CLBENCH_HOME" in finding.remedy


def test_precision_is_shown_and_a_broken_record_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path))
    assert "not measured yet" in next(doctor.precision()).found
    record = {"precision": "bf16", "seconds_per_step": {"fp32": 0.3, "bf16": 0.2}, "bf16_gain": 1.5}
    (tmp_path / "precision.json").write_text(json.dumps({"a CPU|x86": record}), encoding="utf-8")
    assert next(doctor.precision()).found == "bf16: bf16 is 1.50 times as fast (0.300 s, 0.200 s) on a CPU"
    (tmp_path / "precision.json").write_text("[1]", encoding="utf-8")
    assert next(doctor.precision()).state == "broken"


def test_a_damaged_database_is_named_but_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_text("no database", encoding="utf-8")
    finding = named(list(doctor.extras()), "MLflow")
    assert finding.state == "missing"
    assert "clbench mlflow sync" in finding.remedy


def test_an_index_that_does_not_answer_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLBENCH_OFFLINE")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("pypi_simple.PYPI_SIMPLE_ENDPOINT", f"{endpoint}/simple/")
    (finding,) = doctor.package_index()
    assert (finding.state, "does not answer" in finding.found) == ("note", True)
    assert "clbench prepare" in finding.remedy


def test_a_check_that_fails_is_a_finding() -> None:
    def strange() -> Any:
        yield doctor._finding("checks", "a", "ok", "fine")
        raise ZeroDivisionError("no")

    first, second = doctor._guarded(strange)
    assert first.state == "ok"
    assert (second.state, second.found) == ("broken", "ZeroDivisionError: no")


def test_a_stream_that_a_track_was_not_frozen_on_is_broken(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench import registry

    tracks = tmp_path / "tracks"
    tracks.mkdir()
    text = registry.track_path("tinydocs").read_text(encoding="utf-8")
    (tracks / "tinydocs.yaml").write_text(f"{text}\nstream_sha256: '{'0' * 64}'\n", encoding="utf-8")
    monkeypatch.setattr(registry, "tracks_folder", lambda: tracks)
    assert named(list(doctor.prepared()), "track tinydocs").state == "broken"
    shutil.rmtree(tracks)
    assert clbench("doctor").code == 0
