from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from clbench import index
from clbench.errors import ConfigError, IntegrityError, NotFoundError, OfflineError
from clbench.registry import make_stream_source
from clbench.stream import Document
from clbench.streams import _api_records, _docstrings
from clbench.streams.codedocs import LICENCES, CodeDocs, Manifest, decode, is_prose, is_wanted, read_manifest
from clbench.streams.codedocs_nano import CodeDocsNano
from tests.index_server import IndexServer, index_server

LONG = "It does what its name says, which takes a sentence that is long enough to be worth a document of its own. "

OLD_MODULE = f'''\
# -*- coding: latin-1 -*-
"""The caf\xe9 module. {LONG}"""
print "Python 2"

class Graph(object):
    """A graph. {LONG}"""

    def add(self, node, weight=1):
        """Add a node. {LONG}"""

    class View:
        def only(self):
            """Nested deeply. {LONG}"""

    def short(self):
        """Too short."""

def removed():
    """Will be removed. {LONG}"""
'''
NEW_MODULE = f'''\
"""The café module. {LONG}"""
from __future__ import annotations

class Graph:
    """A graph. {LONG}"""

    def add(self, node: str, *, weight: float = 1.0) -> None:
        """Add a node. {LONG}"""

    class View:
        def only(self):
            """Nested deeply. {LONG}"""

def added(x: int | None = None) -> int:
    """Was added. {LONG}"""
'''
GUIDE = f"Guide\n=====\n\n{LONG}\n\nUse\n---\n\nUse it. {LONG}\n\nLeave\n-----\n\nLeave it. {LONG}\n"


def sdist(path: Path, files: dict[str, str | bytes], top: str) -> dict[str, Any]:
    """Write a source distribution; return the fields that pin it."""
    members = {f"{top}/{name}": data if isinstance(data, bytes) else data.encode() for name, data in files.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:bz2" if path.suffix == ".bz2" else "w:gz") as target:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
    data = path.read_bytes()
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "n_bytes": len(data)}


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stream of two packages in two stages whose files lie in the downloads folder."""
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    downloads = tmp_path / "home" / "downloads"
    old = sdist(
        downloads / "graphs-0.1.tar.gz",
        {
            "lib/graphs/core.py": OLD_MODULE.encode("latin-1"),
            "docs/guide.txt": GUIDE,
            "docs/copy/guide.txt": GUIDE,
            "CHANGES.txt": LONG * 3,
            "LICENSE.txt": LONG * 3,
            "tests/test_core.py": OLD_MODULE.encode("latin-1"),
            "setup.py": f'"""{LONG}"""',
        },
        "graphs-0.1",
    )
    new_guide = GUIDE.replace("Leave it.", "Please leave it.").replace("\n", "\r\n")
    new = sdist(
        downloads / "graphs-2.0.zip",
        {"src/graphs/core.py": NEW_MODULE, "docs/guide.txt": new_guide, "graphs.egg-info/SOURCES.txt": LONG},
        "graphs-2.0",
    )
    other = sdist(downloads / "other-1.tar.bz2", {"other.py": f'"""Other. {LONG}"""'}, "other-1")
    stages = [
        ("2008", [("graphs", "0.1", "2008-05-01", old)]),
        ("2020", [("other", "1", "2020-01-02", other), ("graphs", "2.0", "2020-12-31", new)]),
    ]
    content = {
        "format": 1,
        "name": "two-stages",
        "stages": [
            {
                "name": name,
                "start": f"{name}-01-01",
                "end": f"{name}-12-31",
                "releases": [
                    {"package": p, "version": v, "date": d, "licence": "MIT", **pin} for p, v, d, pin in releases
                ],
            }
            for name, releases in stages
        ],
    }
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def by_id(source: CodeDocs, stage: int) -> dict[str, Document]:
    documents = list(source.documents(stage))
    found = {document.id: document for document in documents}
    assert len(found) == len(documents), "ids are unique within a stage"
    return found


OLD_IDS = {
    "graphs:graphs/core.py:",
    "graphs:graphs/core.py:Graph",
    "graphs:graphs/core.py:Graph.add",
    "graphs:graphs/core.py:Graph.View.only",
    "graphs:graphs/core.py:removed",
    "graphs:docs/guide.txt#Guide",
    "graphs:docs/guide.txt#Guide > Use",
    "graphs:docs/guide.txt#Guide > Leave",
}


def test_python_2_release(manifest: Path) -> None:
    documents = by_id(CodeDocs(manifest), 0)
    assert set(documents) == OLD_IDS, "no tests, licences, change logs, set-up scripts, short or repeated texts"
    assert {d.change for d in documents.values()} == {"new"}
    assert {(d.date, d.group) for d in documents.values()} == {("2008-05-01", "graphs")}
    assert documents["graphs:graphs/core.py:"].text.startswith("module graphs.core\n\nThe café module. It does")
    add = documents["graphs:graphs/core.py:Graph.add"].text
    assert add == f"def graphs.core.Graph.add(self, node, weight=1)\n\nAdd a node. {LONG.strip()}"
    assert documents["graphs:graphs/core.py:Graph"].text.startswith("class graphs.core.Graph(object)\n\nA graph.")
    assert documents["graphs:docs/guide.txt#Guide > Use"].text == f"Guide\n\nUse\n---\n\nUse it. {LONG.strip()}"


def test_ids_are_stable_over_versions_and_changes_are_told(manifest: Path) -> None:
    changes = {identity: document.change for identity, document in by_id(CodeDocs(manifest), 1).items()}
    assert changes == {
        "other:other.py:": "new",
        "graphs:graphs/core.py:": "unchanged",
        "graphs:graphs/core.py:Graph": "changed",
        "graphs:graphs/core.py:Graph.add": "changed",
        "graphs:graphs/core.py:Graph.View.only": "unchanged",
        "graphs:graphs/core.py:added": "new",
        "graphs:docs/guide.txt#Guide": "unchanged",
        "graphs:docs/guide.txt#Guide > Use": "unchanged",
        "graphs:docs/guide.txt#Guide > Leave": "changed",
    }


def test_stages_can_be_read_in_any_order_and_again(manifest: Path) -> None:
    source, other = CodeDocs(manifest), CodeDocs(manifest)
    late_first = [list(source.documents(1)), list(source.documents(0)), list(source.documents(1))]
    in_order = [list(other.documents(0)), list(other.documents(1))]
    assert late_first == [in_order[1], in_order[0], in_order[1]]


def test_parts_are_releases_and_make_up_the_documents(manifest: Path) -> None:
    source = CodeDocs(manifest)
    assert [source.n_parts(stage) for stage in (0, 1)] == [1, 2]
    parts = [list(CodeDocs(manifest).part(1, part)) for part in (1, 0)]
    assert [*parts[1], *parts[0]] == list(source.documents(1))
    assert [{d.group for d in part} for part in parts] == [{"graphs"}, {"other"}]


def saved_digests(tmp_path: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted((tmp_path / "home" / "sources").rglob("*.bin"))}


def test_digests_on_disk_spare_reading_a_release_twice(manifest: Path, tmp_path: Path) -> None:
    expected = list(CodeDocs(manifest).documents(1))
    assert len(saved_digests(tmp_path)) == 3, "both releases of the stage and the one before"
    (tmp_path / "home" / "downloads" / "graphs-0.1.tar.gz").unlink()
    assert list(CodeDocs(manifest).documents(1)) == expected, "the old release itself is not needed any more"


@pytest.mark.parametrize("damage", ["a bit", "half", "nothing left", "another release's", "another extraction's"])
def test_digests_that_are_broken_or_stale_are_computed_again(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    expected = list(CodeDocs(manifest).documents(1))
    good = saved_digests(tmp_path)
    if damage == "another extraction's":
        monkeypatch.setattr("clbench.streams.codedocs.EXTRACTION_VERSION", 2)
        list(CodeDocs(manifest).documents(1))
        others = [data for path, data in saved_digests(tmp_path).items() if path not in good]
        monkeypatch.undo()
        monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    for place, (path, data) in enumerate(good.items()):
        planted = {
            "a bit": data[:40] + bytes([data[40] ^ 1]) + data[41:],
            "half": data[: len(data) // 2],
            "nothing left": b"",
            "another release's": [*good.values()][place - 1],
            "another extraction's": others[place] if damage == "another extraction's" else b"",
        }
        path.write_bytes(planted[damage])
    assert list(CodeDocs(manifest).documents(1)) == expected
    repaired = saved_digests(tmp_path)
    changed_back = [path for path in good if repaired[path] == good[path]]
    assert changed_back, "what was found broken was written again"


def test_a_stream_of_some_packages(manifest: Path) -> None:
    whole = CodeDocs(manifest)
    graphs = CodeDocs(CodeDocs.Options(manifest=str(manifest), packages=("Graphs",)))
    other = CodeDocs(CodeDocs.Options(manifest=str(manifest), packages=("other",)))
    both = CodeDocs(CodeDocs.Options(manifest=str(manifest), packages=("other", "graphs")))
    assert [s.name for s in graphs.stages()] == ["2008", "2020"] and graphs.name == "two-stages-graphs"
    assert [(s.index, s.name) for s in other.stages()] == [(0, "2020")], "years without a release are left out"
    assert both.name == "two-stages-graphs-other" and list(both.documents(1)) == list(whole.documents(1))
    assert list(graphs.documents(1)) == [d for d in whole.documents(1) if d.group == "graphs"]
    settings = [source.settings() for source in (whole, graphs, other, both)]
    assert all(a != b for place, a in enumerate(settings) for b in settings[place + 1 :])
    with pytest.raises(NotFoundError, match=r"no package 'grahps'; did you mean 'graphs'\?"):
        CodeDocs(CodeDocs.Options(manifest=str(manifest), packages=("graphs", "grahps")))


def test_options_on_the_command_line(manifest: Path) -> None:
    source = make_stream_source(f"codedocs:manifest={manifest},packages=graphs+other")
    assert source.name == "two-stages-graphs-other"
    assert make_stream_source("codedocs").settings() == CodeDocs().settings()
    numpy = make_stream_source("codedocs:packages=NumPy+scikit_learn")
    assert numpy.name == "codedocs-numpy-scikit-learn" and numpy.stages()[0].name == "2009"
    celery = make_stream_source("codedocs-nano:packages=celery")
    assert celery.name == "codedocs-nano-celery" and len(celery.stages()) == 3
    everything = "+".join({r.package for stage in CodeDocs().manifest.stages for r in stage.releases})
    assert make_stream_source(f"codedocs:packages={everything}").name == "codedocs-42-packages"


TRICKY = [
    "def f(a=(1, [2, {3: ((((4)))))}]), b=2):\n    '''Doc.'''\n    x = (\n  ]\ndef g():\n    'Doc.'\n",
    "class A:\n\t'Tab.'\n        def m(self):\n            'Eight.'\n\x0c\nx = (\nclass B(\n): 'After.'\n",
    "if x:\n  def f(): 'One.'\n  y = \\\n3\n    # comment (\n  def f(\n    a): 'Two.'\n)\n'(' ; def_ = 1\ndef h(:\n",
    '"""Module."""\nasync  def f(x="(", y=\'\'\'\n)\'\'\') -> {((((((1))))))}:\n  # c\n\n  "Doc."\n  "open\n',
    "def f():\n    x = [[[[[[[\n    1]]]]]]]\n    def g():\n        'In.'\n  ) def h(): 'No.'\ndef i():\n    'I'",
    "x = (((((\n" * 50 + "def f(): 'End.'\n" + "\\",
]


def test_fast_reading_of_modules_equals_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With patterns that match nothing every line goes through the plain scanner of brackets and strings."""
    library = Path(subprocess.__file__).parent
    texts = [*TRICKY, *((library / name).read_text("utf-8") for name in ("argparse.py", "typing.py", "datetime.py"))]

    def read() -> list[tuple[str, str, str | None]]:
        found = (d for text in texts for d in _docstrings.definitions(text))
        return [(d.qualname, d.signature, d.docstring) for d in found]

    fast = read()
    monkeypatch.setattr(_docstrings, "_LINE", re.compile("(?!)"))
    monkeypatch.setattr(_docstrings, "MAX_COLUMNS", -1)
    assert read() == fast and len(fast) > 300


YEARLY = """\
format: 2
name: two-stages
years: 2008-2021
until: '2020-12-31'
packages:
  other:
    licence: MIT
    releases:
    - 1 2020-01-02 {other}
  graphs:
    licence: MIT
    releases:
    - 0.1 2008-05-01 {old}
    - 2.0 2020-12-31 {new}
"""


def yearly(manifest: Path) -> tuple[Path, str]:
    """Write the yearly form of the manifest."""
    releases = [r for stage in read_manifest(manifest).stages for r in stage.releases]
    pins = {f"{r.package}-{r.version}": f"{r.n_bytes} {r.sha256} {r.file}" for r in releases}
    text = YEARLY.format(other=pins["other-1"], old=pins["graphs-0.1"], new=pins["graphs-2.0"])
    path = manifest.with_name("yearly.yaml")
    path.write_text(text, encoding="utf-8")
    return path, text


def test_the_yearly_form_says_the_same(manifest: Path) -> None:
    path, text = yearly(manifest)
    assert read_manifest(path) == read_manifest(manifest)
    assert CodeDocs(path).settings() == CodeDocs(manifest).settings()
    path.write_text(text.replace("-2.0.zip", "-2.0.zip PSF-2.0"), encoding="utf-8")
    assert [r.licence for r in read_manifest(path).stages[1].releases] == ["MIT", "PSF-2.0"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("licence: MIT", "licence: GPL-3.0", "GPL-3.0"),
        ("2008-05-01", "2007-05-01", "not of the years"),
        ("2020-12-31 ", "2021-01-02 ", "2021-01-02 is not in"),
        ("- 2.0 ", "- 2.0 x y ", "is not 'version date"),
        ("2.0 2020-12-31", "2.0 2008-12-31", "two releases of one package"),
        ("licence: MIT", "license: MIT", "licen"),
    ],
)
def test_a_wrong_yearly_manifest_is_one_clear_line(manifest: Path, old: str, new: str, said: str) -> None:
    path, text = yearly(manifest)
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value) and "yearly.yaml" in str(caught.value)


def test_stages_settings_and_summary(manifest: Path) -> None:
    source = CodeDocs(manifest)
    assert [(s.index, s.name, s.start, s.end) for s in source.stages()] == [
        (0, "2008", "2008-01-01", "2008-12-31"),
        (1, "2020", "2020-01-01", "2020-12-31"),
    ]
    before = source.settings()
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text("# a comment changes nothing\n" + text, encoding="utf-8")
    assert CodeDocs(manifest).settings() == before
    manifest.write_text(text.replace("2008-05-01", "2008-05-02"), encoding="utf-8")
    assert CodeDocs(manifest).settings() != before
    first, second = source.summary()
    assert first["documents"] == {"new": 8, "changed": 0, "unchanged": 0}
    assert second["documents"] == {"new": 2, "changed": 3, "unchanged": 4}
    assert second["packages"] == {"other": "1", "graphs": "2.0"} and second["licences"] == ["MIT"]
    assert first["n_bytes"] == sum(len(d.text.encode()) for d in source.documents(0))


def test_fetch_then_read_without_a_network(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = tmp_path / "home" / "downloads"
    source = CodeDocs(manifest)
    with index_server() as server:
        offer_and_remove(server, source, downloads)
        with pytest.raises(NotFoundError, match="clbench prepare"):
            list(source.documents(0))
        monkeypatch.setenv("CLBENCH_OFFLINE", "1")
        with pytest.raises(OfflineError, match=r"graphs-0\.1"):
            source.fetch()
        monkeypatch.delenv("CLBENCH_OFFLINE")
        index.fetch(source.files(), endpoint=server.endpoint)
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    source.fetch()
    assert set(by_id(source, 0)) == OLD_IDS


def offer_and_remove(server: IndexServer, source: CodeDocs, downloads: Path) -> None:
    for pin in source.files():
        assert server.add(pin.project, pin.filename, (downloads / pin.filename).read_bytes()) == pin
        (downloads / pin.filename).unlink()


def test_a_file_that_changed_after_it_was_fetched_is_named(manifest: Path, tmp_path: Path) -> None:
    path = tmp_path / "home" / "downloads" / "graphs-0.1.tar.gz"
    sdist(path, {"graphs.py": f'"""Something else. {LONG}"""'}, "graphs-0.1")
    with pytest.raises(IntegrityError, match=r"pins.*graphs-0\.1\.tar\.gz"):
        list(CodeDocs(manifest).documents(0))


def test_a_release_that_is_pinned_truncated_is_named(manifest: Path, tmp_path: Path) -> None:
    path = tmp_path / "home" / "downloads" / "graphs-0.1.tar.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    text = manifest.read_text(encoding="utf-8")
    pinned = [hashlib.sha256(data).hexdigest() for data in (whole, whole[:-300])]
    manifest.write_text(text.replace(*pinned), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"truncated.*graphs-0\.1\.tar\.gz"):
        list(CodeDocs(manifest).documents(0))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("licence: MIT", "licence: GPL-3.0", "GPL-3.0"),
        ("2008-05-01", "2009-05-01", "2009-05-01"),
        ("format: 1", "format: 3", "format"),
        ("format: 1", "format: 2", "years"),
        ("version:", "versoin:", "versoin|version"),
        ("name: two-stages", "nam: [", "not YAML"),
        ("start: '2020-01-01'", "start: '2008-01-01'", "starts before|is not in"),
        ("package: other", "package: graphs", "two releases"),
    ],
)
def test_a_wrong_manifest_is_one_clear_line(manifest: Path, old: str, new: str, said: str) -> None:
    text = manifest.read_text(encoding="utf-8")
    assert old in text
    manifest.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        CodeDocs(manifest)
    assert "\n" not in str(caught.value) and "manifest.yaml" in str(caught.value)
    with pytest.raises(NotFoundError):
        read_manifest(manifest.with_name("absent.yaml"))


@pytest.mark.parametrize(
    ("data", "python", "text"),
    [
        ("# coding: koi8-r\n# Привет".encode("koi8-r"), True, "# coding: koi8-r\n# Привет"),
        ("#!/bin/x\n# vim: set fileencoding=cp1252 :\n“".encode("cp1252"), True, None),
        ("é".encode(), True, "é"),
        ("é".encode("latin-1"), True, "é"),
        (b"# coding: no-such-codec\n\xe9", True, "# coding: no-such-codec\né"),
        (b"# coding: utf-8\n\xe9", True, "# coding: utf-8\né"),
        (b"# coding: koi8-r\n\xe9", False, "# coding: koi8-r\né"),
        (b"\xef\xbb\xbfa\r\nb\rc\n", False, "a\nb\nc\n"),
    ],
)
def test_decoding(data: bytes, python: bool, text: str | None) -> None:
    assert decode(data, python=python) == (data.decode("cp1252") if text is None else text)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("pkg/core.py", True), ("docs/intro.rst", True), ("README.md", True), ("doc/build/orm.rst", True),
        ("pkg/data/loader.py", True), ("pkg/tests/test_core.py", False), ("pkg/test_core.py", False),
        ("setup.py", False), ("CHANGELOG.rst", False), ("docs/whats-new.rst", False), ("docs/changelog/a.rst", False),
        ("pkg.egg-info/SOURCES.txt", False), ("requirements/dev.txt", False), ("requirements.txt", False),
        ("pkg/_vendor/six.py", False), ("pkg/logo.png", False), ("pkg/cacerts.txt", False), ("LICENSE", False),
        ("pkg/._core.py", False), ("docs/tutorial_de.txt", False), ("pkg/testing/tools.py", False),
    ],
)  # fmt: skip
def test_which_files_may_hold_documents(name: str, wanted: bool) -> None:
    assert is_wanted(name) is wanted


def test_what_reads_like_prose() -> None:
    assert is_prose(LONG)
    assert is_prose(f"Use\n===\n\n{LONG}\n\n    >>> x = {{'a': 1}}\n")
    assert not is_prose("Graphs\n------\n" + ".. autofunction:: a.b.c\n   :members:\n" * 20), "a list of names"
    assert not is_prose("\n".join(f"{i} {i * 7}.5 {i * 3}" for i in range(200))), "a table of numbers"
    assert not is_prose("\n".join("MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQ" * 1 for _ in range(20))), "a key"


def test_the_full_manifest_keeps_its_promises() -> None:
    source = CodeDocs()
    stages = source.manifest.stages
    releases = [release for stage in stages for release in stage.releases]
    assert source.name == CodeDocs.name == "codedocs"
    assert [stage.name for stage in stages] == [str(year) for year in range(2008, 2027)]
    assert len({release.package for release in releases}) >= 40 and len(releases) >= 550
    assert min(len(stage.releases) for stage in stages) >= 10
    assert {release.licence for release in releases} <= LICENCES
    assert sum(pin.n_bytes for pin in source.files()) < 3e9
    assert len({release.file for release in releases}) == len({r.sha256 for r in releases}) == len(releases)
    path = Path(__file__).parents[2] / "streams" / "codedocs.yaml"
    assert path.stat().st_size < 100_000, "the wheel ships it"


def test_the_shipped_manifest_keeps_its_promises() -> None:
    source = CodeDocsNano()
    manifest: Manifest = source.manifest
    assert source.name == CodeDocsNano.name == manifest.name == "codedocs-nano"
    assert len(manifest.stages) == 6 and manifest.stages[0].start >= "2006" and manifest.stages[-1].end >= "2026"
    assert sum(pin.n_bytes for pin in source.files()) <= 60e6
    packages = [{release.package for release in stage.releases} for stage in manifest.stages]
    assert all(a & b for a, b in pairwise(packages)), "neighbours share a library"
    assert all(len(b - a) >= 2 for a, b in pairwise(packages)), "every stage has new leaders"
    assert not packages[0] & packages[-1], "the ends of the stream have nothing in common"


def test_nothing_in_an_archive_is_executed_or_unpacked(manifest: Path, tmp_path: Path) -> None:
    """The same in a process of its own: what it prints, writes and imports."""
    code = (
        "import sys, pathlib; from clbench.streams.codedocs import CodeDocs\n"
        "source = CodeDocs(pathlib.Path(sys.argv[1])); n = sum(1 for i in (0, 1) for d in source.documents(i))\n"
        "sys.stdout.write(f'{n} ' + str([m for m in sys.modules if 'graphs' in m or m == 'torch']))"
    )
    before = {path for path in tmp_path.rglob("*")}
    digests = tmp_path / "home" / "sources"
    done = subprocess.run([sys.executable, "-c", code, str(manifest)], capture_output=True, text=True, check=True)
    assert done.stdout == "17 []" and done.stderr == ""
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(digests)}
    assert after == before, "digests of what was read, and nothing else"
    assert {path.suffix for path in digests.rglob("*") if path.is_file()} == {".bin"}


# --- signatures for suite api_change


def records(source: CodeDocs) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    head, *lines = map(json.loads, source.late_extra("api.jsonl").decode().splitlines())
    return head, {line["name"]: line for line in lines}


def test_signatures_of_all_releases_by_dotted_name(manifest: Path) -> None:
    head, found = records(CodeDocs(manifest))
    assert head["stages"] == ["2008", "2020"]
    assert head["releases"] == [
        [0, "graphs", "0.1", "2008-05-01"], [1, "other", "1", "2020-01-02"], [1, "graphs", "2.0", "2020-12-31"],
    ]  # fmt: skip
    path = "graphs/core.py"
    assert found["graphs.core.Graph.add"] == {
        "package": "graphs", "name": "graphs.core.Graph.add", "kind": "def", "qualname": "Graph.add",
        "at": [[0, path, "(self, node, weight=1)", 1, 0],
               [1, path, "(self, node: str, *, weight: float = 1.0) -> None", 1, 0]],
    }  # fmt: skip
    assert [entry[0] for entry in found["graphs.core.removed"]["at"]] == [0]
    assert [entry[0] for entry in found["graphs.core.added"]["at"]] == [1]
    assert "graphs.core.Graph.short" not in found, "in no release a document"


def test_every_signature_with_a_document_is_one_of_the_streams(manifest: Path) -> None:
    source = CodeDocs(manifest)
    for stage in (0, 1):
        heads = {d.text.partition("\n")[0] for d in source.documents(stage)}
        for name, line in records(source)[1].items():
            for at, _path, signature, documented, _deprecated in line["at"]:
                assert at != stage or not documented or f"{line['kind']} {name}{signature}" in heads


def test_other_late_extras_are_refused(manifest: Path) -> None:
    with pytest.raises(NotFoundError, match=r"stream .two-stages. has no questions\.jsonl"):
        CodeDocs(manifest).late_extra("questions.jsonl")


@pytest.mark.parametrize(
    ("docstring", "deprecated"),
    [
        ("Deprecated: use other().", True),
        ("Do it.\n\n.. deprecated:: 1.2\n   Use other.", True),
        ("Do it.\n\nDEPRECATED.", True),
        ("Do it.\n\n*[Deprecated]* use other", True),
        ("Do it.\nThis function is now deprecated, use other.", True),
        ("Do it the way that the\ndeprecated other one did.", False),
        ("Do it.\n\nParameters\n----------\nx : int\n    .. deprecated:: 1.2\n", False),
        ("Do it.\n\nnames\n  Deprecated. A list.", False),
        ("Deprecated arguments are ignored.", False),
        ("Mark what follows as deprecated.", False),
    ],
)
def test_what_says_that_a_definition_is_deprecated(docstring: str, deprecated: bool) -> None:
    source = f'def f(x):\n    """{docstring}"""\n'
    release = _api_records.ReleaseText(0, "p", "1", "2020-01-01", [("p/m.py", source)])
    _, line = _api_records.table(["2020"], [release], min_chars=1).decode().splitlines()
    assert json.loads(line)["at"] == [[0, "p/m.py", "(x)", 1, int(deprecated)]]


def test_names_defined_twice_private_ones_and_scripts() -> None:
    text = "'a docstring'"
    source = f"""
def same(a): {text}
def same(a): {text}
def other(a): {text}
def other(a, b): {text}
def _private(a): {text}
class C:
    {text}
    def __init__(self, x): {text}
    def __call__(self): {text}
"""
    files = [("p/__init__.py", source), ("docs/make.py", source), ("p/_hidden.py", source), ("p/2to3.py", source)]
    release = _api_records.ReleaseText(0, "p", "1", "2020-01-01", files)
    lines = _api_records.table(["2020"], [release], min_chars=1).decode().splitlines()[1:]
    found = {line["name"]: line["at"][0][2] for line in map(json.loads, lines)}
    assert found == {"p.same": "(a)", "p.other": None, "p.C": "", "p.C.__init__": "(self, x)"}
