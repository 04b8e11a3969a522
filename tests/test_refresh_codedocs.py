from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clbench.streams.codedocs import read_manifest
from tests.index_server import IndexServer, index_server
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


YEARLY = """\
format: 2
name: tiny
years: 2008-2009
until: '2009-12-31'
packages:
  graphs: {licence: MIT}
  late: {licence: MIT, since: 2014}
"""
LINES = "It says what it does in a sentence that is long enough to be a document by itself, number {} of version {}."
RELEASES = {
    "graphs-0.1.tar.gz": ("0.1", "2008-05-01", "License: MIT"),
    "graphs-0.2b1.tar.gz": ("0.2b1", "2008-12-01", "License: MIT"),  # not final
    "graphs-0.3.zip": ("0.3", "2009-03-01", "License: MIT"),  # larger than the next
    "graphs-0.3.tar.gz": ("0.3", "2009-03-02", "License: MIT"),
    "graphs-0.4.tar.gz": ("0.4", "2009-06-01", "License: MIT"),  # withdrawn
    "graphs-0.1.1.tar.gz": ("0.1.1", "2010-01-01", "License: MIT"),  # a late fix of an old branch
    "graphs-1.0.tar.gz": ("1.0", "2011-01-01", "Classifier: License :: OSI Approved :: GNU LGPL"),
    "graphs-1.1.tar.gz": ("1.1", "2012-01-01", "License: MIT"),  # damaged
    "graphs-1.2.tar.gz": ("1.2", "2013-01-01", "License: MIT"),  # next to nothing in it
    "graphs-1.9.tar.gz": ("1.9", "2014-01-05", "License: MIT"),
    "graphs-2.0.tar.gz": ("2.0", "2014-02-01", "License: Apache 2"),
    "graphs-3.0.tar.gz": ("3.0", "2015-01-01", "License: BSD"),
    "late-1.tar.gz": ("1", "2013-01-01", "License: MIT"),  # another project of that name
    "late-2.tar.gz": ("2", "2014-01-01", ""),
}


def offer(server: IndexServer, folder: Path) -> None:
    """Put RELEASES on the index, with what is wrong with some of them."""
    for name, (version, _, said) in RELEASES.items():
        n_documents = 3 if version == "1.2" else 25
        code = "".join(f'def f{i}():\n    """{LINES.format(i, version)}"""\n' for i in range(n_documents))
        padding = "#" * 5000 if name.endswith(".zip") else ""
        top = name.removesuffix(".tar.gz").removesuffix(".zip")
        about = f"Metadata-Version: 1.0\nName: {top}\n{said}\n"
        sdist(folder / name, {"PKG-INFO": about, f"{top.partition('-')[0]}.py": code, "x.txt": padding}, top)
        data = (folder / name).read_bytes()
        server.add(name.partition("-")[0], name, data[:-20] if version == "1.1" else data)
    server.uploaded = {name: release[:2] for name, release in RELEASES.items()}
    plain = server.about

    def about_with_withdrawn(project: str) -> tuple[str, bytes] | None:
        answer = plain(project)
        if answer is None:
            return None
        content = json.loads(answer[1])
        for file in content["releases"].get("0.4", []):
            file["yanked"] = True
        return answer[0], json.dumps(content).encode()

    server.about = about_with_withdrawn  # type: ignore[method-assign]


def run_script(server: IndexServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments, "--endpoint", server.endpoint]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPT.parents[1])


def test_a_list_of_packages_becomes_a_yearly_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    manifest = tmp_path / "tiny.yaml"
    manifest.write_text(YEARLY, encoding="utf-8")
    with index_server() as server:
        offer(server, tmp_path)
        done = run_script(server, "--years", "2008-2015", "--until", "2014-12-31", str(manifest))
        assert done.returncode == 0, done.stderr
        found = [(s.name, [(r.file, r.licence) for r in s.releases]) for s in read_manifest(manifest).stages]
        assert found == [
            ("2008", [("graphs-0.1.tar.gz", "MIT")]),
            ("2009", [("graphs-0.3.tar.gz", "MIT")]),
            ("2014", [("graphs-2.0.tar.gz", "Apache-2.0"), ("late-2.tar.gz", "MIT")]),
        ]
        left_out = [line for line in done.stderr.splitlines() if line.startswith("left out: ")]
        assert [re.search(r"LGPL|refused|3 documents", line) is not None for line in left_out] == [True] * 3
        first = manifest.read_text(encoding="utf-8")
        assert run_script(server, "--until", "2014-12-31", str(manifest)).returncode == 0
        assert manifest.read_text(encoding="utf-8") == first, "the same again"

        for path in (tmp_path / "home" / "downloads").glob("*.gz"):
            path.unlink()
        server.asked.clear()
        assert run_script(server, "--until", "2015-12-31", str(manifest)).returncode == 0
        later = read_manifest(manifest).stages
        assert [r.file for r in later[-1].releases] == ["graphs-3.0.tar.gz"] and later[-1].end == "2015-12-31"
        assert server.asked["/files/graphs-3.0.tar.gz"] == 1
        assert server.asked["/files/graphs-0.1.tar.gz"] == 0, "what is pinned is not fetched again"


def test_a_yearly_manifest_that_cannot_be_made_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    manifest = tmp_path / "tiny.yaml"
    manifest.write_text(YEARLY.replace("graphs", "grahps"), encoding="utf-8")
    with index_server() as server:
        offer(server, tmp_path)
        done = run_script(server, str(manifest))
    assert done.returncode == 2 and "grahps" in done.stderr and "Traceback" not in done.stderr
    assert manifest.read_text(encoding="utf-8") == YEARLY.replace("graphs", "grahps")
