"""``clbench stream build``: the guess and its confirmation, names, dry runs, reports, and a track on the result."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clbench import registry
from clbench.build import stream_folder
from clbench.seeds import generator
from clbench.stream import Stream
from tests.command_line.driver import Outcome, clbench, write_track

WORDS = ["bread oven flour crust yeast", "sail harbour keel anchor tide", "violin bow string tune scale"]
NAMED = ("--text", "body", "--date", "created")
SMALL = ("--heldout-fraction", 0.2, "--vocab-size", 300)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for every test."""
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLBENCH_WORKERS", "1")
    return tmp_path / "home"


def posts(path: Path, n: int = 240, **changes: Any) -> Path:
    """A file of posts over three years, each in words of its own, with two bad rows."""
    draw = generator(0, "posts")
    rows = []
    for i in range(n):
        year, words = i * 3 // n, WORDS[i * 3 // n].split()
        body = " ".join(words[int(k)] for k in draw.integers(0, 5, 60))
        rows.append({"url": f"/p/{i}", "created": f"{2019 + year}-0{i % 9 + 1}-01", "body": f"{i} {body}"} | changes)
    rows += [{"url": "/x", "created": "soon", "body": "x"}, {"url": "/y", "created": "2019-01-01", "body": " "}]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build(path: Path, *arguments: object, name: str = "mine") -> Outcome:
    return clbench("stream", "build", "--from", path, "--name", name, *SMALL, *arguments)


def made(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_the_command_of_the_documentation(tmp_path: Path, own_home: Path) -> None:
    path = posts(tmp_path / "posts.parquet")
    found = made(build(path, *NAMED, "--every", "year", "--json"))
    assert [stage["name"] for stage in found["stages"]] == ["2019", "2020", "2021"]
    report = found["report"]
    assert (report["rows"], report["kept"]) == (242, 240)
    assert report["left_out"] == {
        "only white space": {"count": 1, "first": "posts.parquet row 242"},
        "unreadable date": {"count": 1, "first": "posts.parquet row 241"},
    }
    stream = Stream(Path(found["stream"]), check=True)
    for stage in stream.stages():
        counts = [stream.counts(split, stage.index)["n_documents"] for split in ("train", "heldout")]
        assert counts == [found["stages"][stage.index][split] for split in ("train", "heldout")]
        # Held-out documents are chosen from 80; nothing else may be lost.
        assert 72 <= sum(counts) <= 80 and counts[1] >= 5
    assert stream_folder(registry.make_stream_source("mine")) == stream.folder
    assert (own_home / "specifications" / "mine.yaml").is_file()
    assert "mine" in clbench("list", "streams").out


def test_a_stream_of_ones_own_in_a_track(tmp_path: Path) -> None:
    path = posts(tmp_path / "posts.jsonl")
    made(build(path, *NAMED, "--json"))
    path.unlink()  # what is built needs it no more
    track = write_track(tmp_path / "track.yaml", name="own", stream="mine", training={"sequence_length": 32})
    assert clbench("prepare", track).code == 0
    ran = clbench("run", "-m", "sequential", "-t", track, "-o", tmp_path / "runs", "--mlflow", "none")
    assert ran.code == 0, ran.err
    assert clbench("prepare", "mine").code == 0


def test_prepare_builds_it_again_from_the_files_and_refuses_others(tmp_path: Path, own_home: Path) -> None:
    path = posts(tmp_path / "posts.jsonl")
    first = made(build(path, *NAMED, "--json"))
    for folder in ("streams", "sources"):
        shutil.rmtree(own_home / folder)
    assert clbench("prepare", "mine").code == 0
    assert Stream(Path(first["stream"])).sha256 == first["sha256"]
    shutil.rmtree(own_home / "streams")
    assert clbench("prepare", "mine").code == 0, "from what was set down"
    for folder in ("streams", "sources"):
        shutil.rmtree(own_home / folder)
    posts(path, n=237)
    assert "not those that this stream was made of" in clbench("prepare", "mine").error


def test_a_guess_is_shown_and_refused_without_a_yes(tmp_path: Path, own_home: Path) -> None:
    path = posts(tmp_path / "posts.jsonl")
    refused = build(path)
    assert refused.code == 2
    for shown in ("text   body", "date   created", "id     url", "group  none", "such as 2019-01-01", "UTC"):
        assert shown in refused.err, shown
    command = refused.error.partition("say what you mean: ")[2]
    assert "--text body --date created --id url --group none" in command
    assert not own_home.exists() or not list(own_home.glob("s*/*.yaml"))
    repeated = clbench(*command.split()[1:], "--json")
    assert made(repeated)["options"] == made(build(path, "--yes", "--json"))["options"]
    half = build(path, "--text", "body", name="other")
    assert half.code == 2 and "as given" in half.err


def test_a_person_at_a_terminal_is_asked(tmp_path: Path) -> None:
    path = posts(tmp_path / "posts.jsonl")
    words = ["stream", "build", "--from", str(path), "--name", "mine", *map(str, SMALL)]
    for answer, code in ((b"n\n", 2), (b"y\n", 0)):
        parent, child = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "clbench", *words], stdin=child, stderr=child, stdout=subprocess.DEVNULL
        )
        os.close(child)
        seen = b""
        while b"[y/N]" not in seen:
            seen += os.read(parent, 1024)
        os.write(parent, answer)
        try:
            while data := os.read(parent, 1024):
                seen += data
        except OSError:  # the other end was closed
            pass
        assert process.wait() == code, seen
        os.close(parent)
        assert (b"not confirmed" in seen) == (code == 2)


def test_days_and_months_are_confirmed_even_if_the_column_is_named(tmp_path: Path) -> None:
    path = posts(tmp_path / "posts.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()][:240]
    for i, row in enumerate(rows):
        row["created"] = f"{i % 12 + 1:02d}/{i % 28 + 1:02d}/{2019 + i * 3 // 240}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    refused = build(path, *NAMED)
    assert refused.code == 2 and "--dateformat mdy" in refused.error
    assert made(build(path, *NAMED, "--yes", "--json"))["options"]["dateformat"] == "mdy"
    told = build(path, *NAMED, "--dateformat", "dmy", "--json", name="other")
    assert told.code == 2 and "of 240 rows cannot be used" in told.error
    for row in rows:
        row["created"] = "01/02/" + row["created"][-4:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "dmy or mdy" in build(path, *NAMED, name="other").error


def test_units_of_numbers_are_said_and_kept(tmp_path: Path) -> None:
    path = posts(tmp_path / "posts.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()][:240]
    for i, row in enumerate(rows):
        row["created"] = 1_550_000_000_000 + i * 86_400_000 * 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = build(path, *NAMED, "--json")
    assert made(done)["options"]["dateformat"] == "epoch_ms"
    assert "milliseconds since 1970" in done.err


def test_a_dry_run_reports_and_writes_nothing(tmp_path: Path, own_home: Path) -> None:
    done = build(posts(tmp_path / "posts.parquet"), "--dry-run")
    assert done.code == 0
    assert "242 rows read, 240 kept" in done.out and "1 unreadable date (first: posts.parquet row 241)" in done.out
    assert "nothing was written" in done.out
    assert not own_home.exists()


def test_names(tmp_path: Path, own_home: Path) -> None:
    path = posts(tmp_path / "posts.jsonl")
    first = made(build(path, *NAMED, "--json"))
    assert made(build(path, *NAMED, "--json"))["sha256"] == first["sha256"], "the same again is no quarrel"
    moved = tmp_path / "moved"
    moved.mkdir()
    assert made(build(path.rename(moved / "posts.jsonl"), *NAMED, "--json"))["sha256"] == first["sha256"]
    path = moved / "posts.jsonl"
    refused = build(path, *NAMED, "--id", "url")
    assert "another one already" in refused.error and "--replace" in refused.error
    assert registry.make_stream_source("mine").settings()["id"] is None
    copy = tmp_path / "copy.yaml"
    other = made(build(path, *NAMED, "--id", "url", "--replace", "--json", "--out", copy))
    assert other["sha256"] != first["sha256"]
    assert yaml.safe_load(copy.read_text(encoding="utf-8"))["options"]["id"] == "url"
    assert stream_folder(registry.make_stream_source(str(copy))) == Path(other["stream"])
    assert "a stream or a track already" in build(path, *NAMED, name="tinydocs").error
    assert "cannot be the name" in build(path, *NAMED, name="../up").error


def test_the_day_of_the_first_build_stays(tmp_path: Path, own_home: Path) -> None:
    path = posts(tmp_path / "posts.jsonl")
    first = made(build(path, *NAMED, "--latest", "2021-12-31", "--json"))
    again = made(build(path, *NAMED, "--json"))
    assert again["options"]["latest"] == "2021-12-31" and again["stream"] == first["stream"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--every", "fortnight"), "every is 'fortnight'"),
        (("--timezone", "Mars"), "no time zone"),
        (("--text", "bodi"), "did you mean 'body'"),
        (("--date", "url"), "does not read as dates"),
        (("--min-documents", 200), "1 stage is left of 240 documents"),
        (("--tokenizer", "stream:nothing"), "nothing"),
        (("--vocab-size", 5), "vocab_size"),
        (("--heldout-fraction", 2), "heldout_fraction"),
        (("--format", "xml"), "format is 'xml'"),
    ],
)
def test_a_mistake_is_one_line_and_saves_nothing(
    tmp_path: Path, own_home: Path, arguments: tuple[object, ...], words: str
) -> None:
    path = posts(tmp_path / "posts.jsonl")
    named = [part for pair in ("text body", "date created") for part in (f"--{pair.split()[0]}", pair.split()[1])]
    refused = build(path, *named, *arguments)
    assert refused.code == 2 and words in refused.error
    assert not list(own_home.glob("specifications/*")) and not list(own_home.glob("streams/*/manifest.json"))


def test_on_a_full_disk_nothing_is_half_written(tmp_path: Path) -> None:
    unshare = ["unshare", "--map-root-user", "--mount"]
    trial = [*unshare, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a disk of its own")
    draw = generator(0, "full")
    rows = [
        {"text": draw.bytes(800).hex(), "date": f"{2019 + i % 2}-01-01"} for i in range(300)
    ]  # a quarter of a megabyte, however it is packed
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "tests.command_line.full_disk_build_driver", str(path), str(tmp_path)],
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
        assert "disk is full" in size["error"], size
        assert size["streams"] == size["saved"] == [], size
        assert size["code_again"] == 0 and size["equal"], size
    assert {size["ingested"] for size in found["sizes"].values()} == {True, False}, "the disk ended at one place only"
