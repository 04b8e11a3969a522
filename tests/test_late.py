from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clbench import build, home, late, registry
from clbench.errors import IntegrityError, NotFoundError
from clbench.files import read_json, write_json
from clbench.stream import Stream
from tests.api_releases import write_manifest

API = "api.jsonl"


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """A built stream of three releases in a cache folder of its own."""
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    target = f"codedocs:manifest={write_manifest(tmp_path)}"
    assert registry.is_stream(target), "an option may be the path of a YAML file"
    return build.build_stream(registry.make_stream_source(target), progress=False)


def kept_file(stream: Stream) -> Path:
    return home.home() / "extras" / f"graphs-{stream.sha256[:12]}" / "v1-api.jsonl"


def test_it_is_made_once_and_outlives_its_sources(stream: Stream) -> None:
    before = stream.sha256, {path: path.read_bytes() for path in stream.folder.rglob("*") if path.is_file()}
    content = late.late_extra(stream, API)
    assert content == late.source_of(stream).late_extra(API)
    shutil.rmtree(home.downloads_folder())
    assert late.late_extra(stream, API) == content
    stream.check()
    after = {path: path.read_bytes() for path in stream.folder.rglob("*") if path.is_file()}
    assert (Stream(stream.folder).sha256, after) == before, "the stream is untouched"


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_broken_file_is_made_again(stream: Stream, damage: bytes | None) -> None:
    content = late.late_extra(stream, API)
    path = kept_file(stream)
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    assert late.late_extra(stream, API) == content
    assert path.read_bytes().endswith(content)


def test_what_is_missing_is_said(stream: Stream) -> None:
    with pytest.raises(NotFoundError, match=r"no questions\.jsonl"):
        late.late_extra(stream, "questions.jsonl")
    archive = home.downloads_folder() / "graphs-2.0.tar.gz"
    archive.write_bytes(b"another file")
    with pytest.raises(IntegrityError, match="not the file that the manifest pins"):
        late.late_extra(stream, API)
    archive.unlink()
    with pytest.raises(NotFoundError, match="clbench prepare"):
        late.late_extra(stream, API)
    assert not kept_file(stream).exists()


def test_a_source_that_is_not_the_streams_any_more_is_refused(stream: Stream, tmp_path: Path) -> None:
    manifest = tmp_path / "graphs.yaml"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace("2008-05-01", "2008-05-02"), encoding="utf-8")
    with pytest.raises(NotFoundError, match="built by other releases, options or code"):
        late.late_extra(stream, API)
    manifest.unlink()
    with pytest.raises(NotFoundError, match="is not found: the stream's manifest is missing"):
        late.late_extra(stream, API)


def test_streams_of_before_are_found_by_their_name(stream: Stream, tinydocs: Stream) -> None:
    assert late.source_of(Stream(stream.folder)).name == "graphs"
    manifest = read_json(stream.folder / "manifest.json")
    del manifest["recipe"]
    write_json(stream.folder / "manifest.json", manifest)
    with pytest.raises(NotFoundError, match="unknown stream 'graphs'"):
        late.late_extra(Stream(stream.folder), API)
    plain = Stream(tinydocs.folder)
    plain.manifest.pop("recipe", None)  # it depends on who built it first
    assert late.source_of(plain).name == "tinydocs"


def test_preparing_builds_fetches_and_makes(stream: Stream, tmp_path: Path) -> None:
    made, path = late.prepare_extra(f"codedocs:manifest={tmp_path / 'graphs.yaml'}", API)
    assert made.sha256 == stream.sha256 and path == kept_file(stream) and path.is_file()
    with pytest.raises(NotFoundError, match=r"stream 'tinydocs' has no api\.jsonl"):
        late.prepare_extra("tinydocs", API)
