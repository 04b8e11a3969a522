from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clbench.streams.codedocs import read_manifest
from tests.index_server import index_server
from tests.streams.test_codedocs import sdist

SCRIPT = Path(__file__).parents[1] / "dev" / "refresh_codedocs.py"
PLAN = """\
format: 1
name: tiny
stages:
- name: '2008'
  start: '2008-01-01'
  end: '2008-12-31'
  releases:
  - {package: graphs, version: '0.1'LICENCE}
"""


def refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, licence: str = "") -> tuple[Path, str]:
    """Refresh a one-release plan whose PKG-INFO says ``said``; return the manifest and what came on stderr."""
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    manifest = tmp_path / "tiny.yaml"
    manifest.write_text(PLAN.replace("LICENCE", licence), encoding="utf-8")
    path = tmp_path / "graphs-0.1.tar.gz"
    sdist(path, {"PKG-INFO": f"Metadata-Version: 1.0\nName: graphs\n{said}\n"}, "graphs-0.1")
    with index_server() as server:
        server.add("graphs", path.name, path.read_bytes())
        server.add("graphs", "graphs-0.1.zip", path.read_bytes() * 2)
        server.uploaded = {path.name: ("0.1", "2008-05-01"), "graphs-0.1.zip": ("0.1", "2008-05-02")}
        command = [sys.executable, str(SCRIPT), str(manifest), "--endpoint", server.endpoint]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPT.parents[1])
    assert "Traceback" not in done.stderr
    return manifest, done.stderr if done.returncode else ""


def test_a_plan_becomes_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _ = refresh(tmp_path, monkeypatch, "License: MIT/X11")
    [release] = read_manifest(manifest).stages[0].releases
    assert (release.file, release.date, release.licence) == ("graphs-0.1.tar.gz", "2008-05-01", "MIT")
    manifest, _ = refresh(
        tmp_path, monkeypatch, "Classifier: License :: OSI Approved :: BSD License", ", licence: BSD-2-Clause"
    )
    assert read_manifest(manifest).stages[0].releases[0].licence == "BSD-2-Clause"


@pytest.mark.parametrize("licence", ["", ", licence: MIT"])
def test_a_release_that_says_it_is_copyleft_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, licence: str
) -> None:
    said = "License: LGPL\nClassifier: License :: OSI Approved :: MIT License"
    manifest, error = refresh(tmp_path, monkeypatch, said, licence)
    assert "LGPL" in error
    assert manifest.read_text(encoding="utf-8") == PLAN.replace("LICENCE", licence), "left as it was"
