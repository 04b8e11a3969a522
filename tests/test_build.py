from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clbench.build import build_stream, stream_folder
from clbench.errors import ClbenchError, ConfigError
from clbench.registry import load_class
from clbench.stream import DOCUMENT_COLUMNS, Change, Document, StageInfo, Stream, StreamSource
from clbench.streams.tinydocs import Tinydocs

ROOT = Path(__file__).resolve().parents[1]


def is_heldout(document_id: str, fraction: float = 0.2) -> bool:
    """The split rule once more, written another way: the first 16 hexadecimal digits as a fraction of 1."""
    return int(hashlib.sha256(document_id.encode()).hexdigest()[:16], 16) / 16**16 < fraction


def ids(prefix: str, *, heldout: bool, n: int) -> list[str]:
    """n identities that fall on the wanted side."""
    found: list[str] = []
    for i in range(10_000):
        name = f"{prefix}-{i}"
        if is_heldout(name) == heldout and len(found) < n:
            found.append(name)
    return found


def document(id: str, text: str, change: Change = "new") -> Document:
    return Document(id=id, text=text, date="2013-05-01", group="g", change=change)


def prose(key: str, n_words: int = 80) -> str:
    """Text of its own for every key: no five words in a row are ever shared."""
    return " ".join(f"{key}{i}" if i % 3 else "word" for i in range(n_words))


class Listed(StreamSource):
    """A source of given documents, with some that fill both splits of every stage."""

    name = "listed"
    heldout_fraction = 0.2
    vocab_size = 400

    def __init__(self, *stages: list[Document], filler: bool = True) -> None:
        self.lists = list(stages)
        if filler:
            names = [*ids("filler", heldout=False, n=4), *ids("filler", heldout=True, n=2)]
            self.lists = [
                [*given, *(document(f"{i}", prose(f"{i}s{k}")) for i in names)] for k, given in enumerate(stages)
            ]
        self.n_fetched = 0

    def stages(self) -> list[StageInfo]:
        return [StageInfo(index=i, name=f"s{i}", start="2013-01-01", end="2013-12-31") for i in range(len(self.lists))]

    def settings(self) -> dict[str, Any]:
        return {"texts": [[(d.id, ascii(d.text), d.change) for d in stage] for stage in self.lists]}

    def fetch(self) -> None:
        self.n_fetched += 1

    def documents(self, stage: int) -> Iterator[Document]:
        yield from self.lists[stage]


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def column(stream: Stream, split: Any, stage: int, name: str) -> list[Any]:
    values: list[Any] = stream.documents(split, stage, [name])[name].to_pylist()
    return values


def everything_in(home: Path) -> list[str]:
    """Files and folders below the cache folder, but for locks."""
    return sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if ".locks" not in p.parts)


# --- split --------------------------------------------------------------------------------------------------


def test_all_versions_of_a_document_fall_on_the_side_that_its_identity_says(tinydocs: Stream) -> None:
    sides: dict[str, set[str]] = {}
    for stage in tinydocs.stages():
        for split in ("train", "heldout"):
            for id in column(tinydocs, split, stage.index, "id"):
                sides.setdefault(id, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert {id for id, side in sides.items() if side == {"heldout"}} == {id for id in sides if is_heldout(id)}
    assert 0.1 < sum(is_heldout(id) for id in sides) / len(sides) < 0.3


def test_the_cap_keeps_the_smallest_hashes_and_the_rest_does_not_train(empty_home: Path) -> None:
    names = ids("capped", heldout=True, n=9)
    source = Listed([document(i, prose(i)) for i in names], filler=True)
    source.heldout_max_documents = 5
    stream = build_stream(source)
    everyone = [d.id for d in source.lists[0] if is_heldout(d.id)]
    smallest = set(sorted(everyone, key=lambda i: hashlib.sha256(i.encode()).hexdigest())[:5])
    assert column(stream, "heldout", 0, "id") == [i for i in everyone if i in smallest], "in the source's order"
    assert stream.counts("heldout", 0)["dropped_over_cap"] == len(everyone) - 5
    assert not set(everyone) & set(column(stream, "train", 0, "id"))


# --- duplicates ---------------------------------------------------------------------------------------------


def test_copies_of_train_text_of_any_stage_are_dropped_from_heldout_and_counted(empty_home: Path) -> None:
    trained = ids("trained", heldout=False, n=3)
    held = ids("held", heldout=True, n=6)
    long = prose("long", 400)
    stages = [
        [
            document(trained[0], prose("early")),
            document(held[0], prose("late").upper() + "!"),  # exact but for case and punctuation; trains in stage 2
            document(held[1], prose("kept")),
        ],
        [
            document(trained[1], long),
            document(held[2], prose("early").replace(" ", "\n")),  # trained in stage 0
            document(held[3], long.replace("long100", "another").replace("long301", "another")),  # near
        ],
        [
            document(trained[2], prose("late")),
            document(held[4], " ".join(long.split()[:200] + prose("other", 200).split())),  # half of it: no duplicate
            document(held[5], prose("early") + " and one more"),  # near: 2 of 78 shingles are new
        ],
    ]
    stream = build_stream(Listed(*stages))
    kept = [set(column(stream, "heldout", k, "id")) & set(held) for k in range(3)]
    assert kept == [{held[1]}, set(), {held[4]}]
    dropped = [[stream.counts("heldout", k)[f"dropped_{kind}"] for k in range(3)] for kind in ("exact", "near")]
    assert dropped == [[1, 1, 0], [0, 1, 1]]
    assert [stream.counts("train", k)["n_documents"] for k in range(3)] == [5, 5, 5], "train keeps everything"
    assert stream.manifest["duplicates"]["threshold_jaccard"] == 0.8


def test_repeats_within_train_are_counted_and_kept(empty_home: Path) -> None:
    names = ids("repeat", heldout=False, n=5)
    long = prose("long", 400)
    first = [
        document(names[0], prose("a")),
        document(names[1], prose("a").title()),
        document(names[2], long),
        document(names[3], long + " end"),
    ]
    second = [document(names[0], prose("a"), "unchanged"), document(names[4], prose("b"))]
    stream = build_stream(Listed(first, second))
    counted = ("repeated_exact", "repeated_near", "repeated_from_earlier_stage")
    assert [stream.counts("train", 0)[c] for c in counted] == [1, 1, 0]
    assert [stream.counts("train", 1)[c] for c in counted] == [0, 0, 1]
    assert stream.counts("train", 0)["n_documents"] == 8
    assert stream.manifest["stages"][1]["changes"]["train"] == {"new": 5, "changed": 0, "unchanged": 1}


# --- tokens -------------------------------------------------------------------------------------------------


def test_autotokenizer_loads_the_tokenizer_and_gives_the_packed_tokens(tinydocs: Stream) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tinydocs.tokenizer_folder)
    assert tokenizer.eos_token_id == tinydocs.eos_id
    assert len(tokenizer) == tinydocs.vocab_size
    offsets = tinydocs.offsets("heldout", 2)
    for i, text in enumerate(column(tinydocs, "heldout", 2, "text")):
        packed = tinydocs.tokens("heldout", 2)[offsets[i] : offsets[i + 1]].tolist()
        assert tokenizer(text)["input_ids"] == packed[:-1]
        assert tokenizer.decode(packed[:-1]) == text


def test_any_text_survives_and_a_written_eos_does_not_end_a_document(empty_home: Path) -> None:
    from tokenizers import Tokenizer

    texts = ["naïve ☃ 漢字\r\n\ttab \x00 \u2028", "before <|endoftext|> after", "   ", "\ufeff e\u0301"]
    names = ids("odd", heldout=False, n=len(texts))
    stream = build_stream(Listed([document(i, t) for i, t in zip(names, texts, strict=True)]))
    tokenizer = Tokenizer.from_file(str(stream.tokenizer_folder / "tokenizer.json"))
    tokens, offsets = stream.tokens("train", 0), stream.offsets("train", 0)
    assert (tokens == stream.eos_id).sum() == stream.counts("train", 0)["n_documents"]
    for i, text in enumerate(texts):
        packed = tokens[offsets[i] : offsets[i + 1]].tolist()
        assert packed[-1] == stream.eos_id
        assert tokenizer.decode(packed[:-1], skip_special_tokens=False) == text
    assert stream.documents("train", 0)["text"].to_pylist()[: len(texts)] == texts


def test_the_tokenizer_has_seen_nothing_but_stage_0_train(empty_home: Path) -> None:
    train, held = ids("t", heldout=False, n=1), ids("h", heldout=True, n=1)

    def build(in_train: str, in_heldout: str, later: str) -> Stream:
        first = [document(train[0], in_train), document(held[0], in_heldout)]
        return build_stream(Listed(first, [document(train[0], later, "changed")]))

    def vocabulary(stream: Stream) -> set[str]:
        vocab: dict[str, int] = json.loads((stream.tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"]
        return set(vocab)

    stream = build("zebrafish " * 50, "quagga " * 50, "okapi " * 50)
    assert "zebrafish" in vocabulary(stream) or "Ġzebrafish" in vocabulary(stream)
    assert not {"quagga", "Ġquagga", "okapi", "Ġokapi"} & vocabulary(stream)
    other = build("zebrafish " * 50, "tapir " * 50, "gnu " * 50)
    assert other.manifest["tokenizer"] == stream.manifest["tokenizer"]
    assert other.sha256 != stream.sha256


def test_a_large_vocabulary_is_stored_in_four_bytes(empty_home: Path) -> None:
    from clbench.packing import TokenizerFacts

    def dtype(n: int) -> str:
        return TokenizerFacts(kind="", sha256="", eos_id=0, vocab_size=n).dtype

    assert (dtype((1 << 16) - 1), dtype(1 << 16)) == ("uint16", "uint32")


# --- address and digest -------------------------------------------------------------------------------------


def test_the_same_source_gives_the_same_digest_in_another_process_and_home(tinydocs: Stream, tmp_path: Path) -> None:
    code = """
        from clbench.build import build_stream
        from clbench.streams.tinydocs import Tinydocs
        print(build_stream(Tinydocs()).sha256)
    """
    environment = {"CLBENCH_HOME": str(tmp_path), "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true"}
    assert run(code, environment).stdout.strip() == tinydocs.sha256
    (again,) = (tmp_path / "streams").glob("tinydocs-*")
    assert again.name == tinydocs.folder.name
    assert json.loads((again / "manifest.json").read_text())["files"] == tinydocs.manifest["files"]


def test_tinydocs_is_the_same_for_ever(tinydocs: Stream) -> None:
    # Text and split only: tokens may follow the tokenizers library. On purpose? Raise VERSION.
    digest = hashlib.sha256()
    for stage in range(4):
        for split in ("train", "heldout"):
            for text in column(tinydocs, split, stage, "text"):
                digest.update(text.encode())
    assert digest.hexdigest() == "ad55da605b5a8bcf2ee0d7e8a7fa26fbd381db4cce0881ade8f8810cae9c658c"


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("heldout_fraction", 0.3),
        ("heldout_max_documents", 5),
        ("vocab_size", 300),
        ("name", "other"),
        ("seed", 1),
    ],
)
def test_a_changed_setting_is_another_folder(attribute: str, value: Any) -> None:
    source = Tinydocs()
    setattr(source, attribute, value)
    assert stream_folder(source).name != stream_folder(Tinydocs()).name
    assert stream_folder(Tinydocs()) == stream_folder(Tinydocs())


def test_a_complete_stream_is_returned_at_once(empty_home: Path) -> None:
    source = Listed([])
    first = build_stream(source)
    stamp = first.folder.stat().st_mtime_ns
    source.documents = lambda stage: pytest.fail("read again")  # type: ignore[method-assign]
    started = time.perf_counter()
    assert build_stream(source).sha256 == first.sha256
    assert time.perf_counter() - started < 0.2
    assert (source.n_fetched, first.folder.stat().st_mtime_ns) == (1, stamp)


def test_a_folder_without_its_manifest_or_with_a_broken_one_is_built_again(empty_home: Path) -> None:
    stream = build_stream(Listed([]))
    for spoil in (Path.unlink, lambda path: path.write_text("{"), lambda path: path.write_text("[]")):
        spoil(stream.folder / "manifest.json")
        again = build_stream(Listed([]))
        again.check()
        assert again.sha256 == stream.sha256


def test_the_manifest_lists_every_file_and_the_counts_add_up(tinydocs: Stream) -> None:
    files = {p.relative_to(tinydocs.folder).as_posix() for p in tinydocs.folder.rglob("*") if p.is_file()}
    assert set(tinydocs.manifest["files"]) == files - {"manifest.json"}
    tinydocs.check()
    for stage in tinydocs.manifest["stages"]:
        for split in ("train", "heldout"):
            table = tinydocs.documents(split, stage["index"])
            assert tuple(table.column_names) == DOCUMENT_COLUMNS
            texts = table["text"].to_pylist()
            counts = stage[split]
            assert counts["n_documents"] == len(texts) == sum(stage["changes"][split].values())
            assert counts["n_bytes"] == sum(len(t.encode()) for t in texts) == sum(table["n_bytes"].to_pylist())
            assert counts["n_tokens"] == len(tinydocs.tokens(split, stage["index"]))
            assert table["sha256"].to_pylist() == [hashlib.sha256(t.encode()).hexdigest() for t in texts]
            sidecar = json.loads((tinydocs.folder / f"tokens/{split}-{stage['index']:02d}.json").read_text())
            assert {k: sidecar[k] for k in ("n_documents", "n_tokens", "n_bytes")}.items() <= counts.items()
            assert sidecar["tokenizer_sha256"] == tinydocs.manifest["files"]["tokenizer/tokenizer.json"]
    assert sum(stage["changes"]["train"]["changed"] for stage in tinydocs.manifest["stages"]) > 20


def test_the_worked_example_of_the_documentation_builds(empty_home: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "streams.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "class Wiki" in block]
    (tmp_path / "wiki.py").write_text(code, encoding="utf-8")
    pages = [
        {
            "url": f"page-{i}",
            "date": f"{year}-06-01",
            "text": prose(f"p{i}{'v2' if i % 2 and year > 2021 else ''}"),
        }
        for year in (2021, 2022, 2023)
        for i in range(60)
    ]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pages), encoding="utf-8")
    wiki = load_class("streams", f"{tmp_path / 'wiki.py'}:Wiki")
    stream = build_stream(wiki(tmp_path / "pages.jsonl"))
    changes = [stage["changes"] for stage in stream.manifest["stages"]]
    totals = [{kind: c["train"][kind] + c["heldout"][kind] for kind in c["train"]} for c in changes]
    assert totals == [
        {"new": 60, "changed": 0, "unchanged": 0},
        {"new": 0, "changed": 30, "unchanged": 30},
        {"new": 0, "changed": 0, "unchanged": 60},
    ]


# --- bad sources --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([document("same", "a"), document("same", "b")], "comes twice"),
        ([document("", "a")], "empty id"),
        ([document("x", "")], "no text"),
        ([document("x", "a", "renamed")], "'renamed'"),  # type: ignore[arg-type]
        ([Document(id="x", text="a", date="last year", group="g", change="new")], "'last year'"),
        ([document("x", "\ud800")], "surrogate"),
    ],
)
def test_a_document_that_breaks_the_contract_is_named(bad: list[Document], says: str, empty_home: Path) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        build_stream(Listed([], bad))
    assert "stage s1" in str(error.value) and "\n" not in str(error.value)
    assert everything_in(empty_home) == ["streams"]


def test_a_stage_without_heldout_documents_is_refused(empty_home: Path) -> None:
    with pytest.raises(ConfigError, match="stage s0 has no heldout documents"):
        build_stream(Listed([document(i, prose(i)) for i in ids("t", heldout=False, n=9)], filler=False))
    assert everything_in(empty_home) == ["streams"]


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("name", "../escape", "name"),
        ("name", "", "name"),
        ("heldout_fraction", 0.0, "between 0 and 1"),
        ("heldout_max_documents", 0, "at least 1"),
        ("vocab_size", 256, "at least 257"),
        ("settings", lambda: {"when": object()}, "JSON-able"),
        ("stages", lambda: [], "number them"),
        (
            "stages",
            lambda: [StageInfo(index=1, name="a", start="2013-01-01", end="2013-01-02")],
            "number them",
        ),
        (
            "stages",
            lambda: [StageInfo(index=0, name="a", start="2014-01-01", end="2013-01-02")],
            "not a period",
        ),
        ("stages", lambda: [StageInfo(index=0, name="a", start="2013-13-01", end="2014")], "not a period"),
    ],
)
def test_a_source_that_breaks_the_contract_is_refused(attribute: str, value: Any, says: str, empty_home: Path) -> None:
    source = Listed([])
    setattr(source, attribute, value)
    with pytest.raises(ConfigError, match=says):
        build_stream(source)


# --- kill, full disk, two at once ---------------------------------------------------------------------------


def run(code: str, environment: dict[str, str], *prefix: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("place", ["build.split_stages", "packing.write_manifest"])
def test_a_kill_leaves_nothing_that_looks_complete(place: str, empty_home: Path) -> None:
    code = f"""
        import time
        import clbench.build
        from clbench.streams.tinydocs import Tinydocs
        def stop(*_, **__):
            print("here", flush=True)
            time.sleep(60)
        clbench.{place} = stop
        clbench.build.build_stream(Tinydocs())
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        process.kill()
    folder = stream_folder(Tinydocs())
    assert not folder.exists()
    assert list(folder.parent.glob(f".{folder.name}.*.tmp")), "the killed build had written something"
    build_stream(Tinydocs()).check()
    assert {p.name for p in folder.parent.iterdir()} == {folder.name, ".locks"}


def test_two_processes_build_a_stream_once(empty_home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
        from pathlib import Path
        from clbench.build import build_stream
        from clbench.streams.tinydocs import Tinydocs
        class Logged(Tinydocs):
            def documents(self, stage):
                with Path({str(log)!r}).open("a") as file:
                    file.write("read\\n")
                return super().documents(stage)
        print(build_stream(Logged()).sha256)
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert len(outputs) == 1 and len(outputs.pop().strip()) == 64
    assert log.read_text() == "read\n" * 4


@pytest.mark.parametrize("fatal_write", [1, 20])
def test_a_disk_that_fills_up_leaves_nothing_and_says_so(
    fatal_write: int, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_written = 0

    def failing(real: Any) -> Any:
        def write(self: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal n_written
            n_written += 1
            if n_written == fatal_write:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, *args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing(Path.write_bytes))
        patch.setattr(Path, "write_text", failing(Path.write_text))
        with pytest.raises(ClbenchError, match="disk is full") as error:
            build_stream(Tinydocs())
    assert n_written == fatal_write and "\n" not in str(error.value)
    assert everything_in(empty_home) == ["streams"]
    build_stream(Tinydocs()).check()


@pytest.mark.parametrize("kib", [8, 160])
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1) to mount a small disk")
def test_a_real_full_disk_is_one_clear_line(kib: int, tmp_path: Path) -> None:
    code = """
        import os
        from pathlib import Path
        from clbench.build import build_stream
        from clbench.errors import ClbenchError
        from clbench.streams.tinydocs import Tinydocs
        try:
            build_stream(Tinydocs())
        except ClbenchError as error:
            print(error)
        print([p.name for p in Path(os.environ["CLBENCH_HOME"], "streams").iterdir() if p.name != ".locks"])
    """
    mount = f'mount -t tmpfs -o size={kib}k tmpfs "$CLBENCH_HOME" && exec "$@"'
    private = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if run("", {"CLBENCH_HOME": str(tmp_path)}, *private).returncode:
        pytest.skip("this machine does not let a user mount a disk of their own")
    done = run(code, {"CLBENCH_HOME": str(tmp_path)}, *private)
    assert done.returncode == 0, done.stderr
    line, left = done.stdout.splitlines()
    assert line.startswith("the disk is full, nothing was half-written") and left == "[]"
