"""Own documents: planted files of every bad kind with exact counts, and one corpus in every format."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError
from clbench.registry import make_stream_source
from clbench.stream import Document
from clbench.streams import _inputs, _readers, documents
from clbench.streams.documents import Documents

Options = Documents.Options
NAMED = {"text": "text", "date": "date", "id": "id"}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for every test."""
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def row(i: int, year: int, **changes: Any) -> dict[str, Any]:
    return {"id": f"page-{i}", "text": f"Text {i}, “quoted”,\nof {year}.", "date": f"{year}-05-01", **changes}


def corpus(n: int = 40) -> list[dict[str, Any]]:
    """Two years; half of the second year's pages are those of the first, changed or not."""
    first = [row(i, 2010) for i in range(n)]
    second = [row(i, 2011, text=first[i]["text"] + (" More." if i % 4 == 0 else "")) for i in range(0, n, 2)]
    return first + second + [row(i, 2011) for i in range(n, n + n // 2)]


def jsonl(path: Path, rows: list[Any], extra: bytes = b"") -> Path:
    """Write rows (texts and bytes as they are), one a line."""
    lines = [r if isinstance(r, bytes) else r.encode() if isinstance(r, str) else json.dumps(r).encode() for r in rows]
    data = b"\n".join(lines) + b"\n" + extra
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def source(path: Path, **options: Any) -> Documents:
    return Documents(Options(**{"path": str(path), "min_documents": 2, **NAMED, **options}))


def fetched(path: Path, **options: Any) -> Documents:
    made = source(path, **options)
    made.fetch()
    return made


def read(made: Documents) -> list[list[Document]]:
    return [list(made.documents(stage.index)) for stage in made.stages()]


def left_out(made: Documents) -> dict[str, int]:
    return {kind: found["count"] for kind, found in made.report()["left_out"].items()}


def mended(made: Documents) -> dict[str, int]:
    return {kind: found["count"] for kind, found in made.report()["mended"].items()}


# --- formats ---


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_zst(path: Path, rows: list[dict[str, Any]]) -> Path:
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
        file.write("".join(json.dumps(r) + "\n" for r in rows).encode())
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "posts.parquet": write_parquet,
    "groups.parquet": lambda path, rows: write_parquet(path, rows, row_group_size=7),
    "posts.jsonl": jsonl,
    "posts.jsonl.gz": jsonl,
    "posts.jsonl.zst": write_zst,
    "posts.csv": write_csv,
    "semicolon.csv": lambda path, rows: write_csv(path, rows, ";"),
    "posts.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "bom.csv": lambda path, rows: write_csv(path, rows, encoding="utf-8-sig"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_are_the_same_documents_in_every_format(tmp_path: Path, name: str) -> None:
    rows = corpus()
    made = fetched(WRITERS[name](tmp_path / name, rows))
    first, second = read(made)
    assert [(d.id, d.text, d.date, d.change) for d in first] == [
        (r["id"], r["text"], r["date"], "new") for r in rows[:40]
    ]
    kinds = ["changed" if i % 4 == 0 else "unchanged" for i in range(0, 40, 2)] + ["new"] * 20
    assert [(d.id, d.text, d.change) for d in second] == [
        (r["id"], r["text"], kind) for r, kind in zip(rows[40:], kinds, strict=True)
    ]
    assert left_out(made) == mended(made) == {}
    assert made.report()["rows"] == len(rows)
    assert {d.group for d in first} == {"documents"}


def test_other_encodings(tmp_path: Path) -> None:
    rows = [row(i, 2010 + i % 2, text=f"Größe {i} für Müller") for i in range(20)]
    for name, encoding in (("a.csv", "latin-1"), ("b.csv", "utf-16"), ("c.csv", "cp1252")):
        made = fetched(write_csv(tmp_path / name, rows, encoding=encoding), encoding=encoding)
        assert [d.text for stage in read(made) for d in stage] == [r["text"] for y in (0, 1) for r in rows[y::2]]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-16")
    assert len(read(fetched(path, encoding="utf-16"))[0]) == 10
    with pytest.raises(ConfigError, match="UTF-16"):
        fetched(path)
    with pytest.raises(ConfigError, match="no encoding"):
        fetched(path, encoding="klingon")


def test_nested_columns(tmp_path: Path) -> None:
    rows = [{"meta": {"at": f"{2010 + i % 2}-01-01", "who": {"id": i}}, "a.b": f"text {i}"} for i in range(20)]
    rows[3]["meta"] = None  # type: ignore[assignment]
    rows[4]["meta"] = "text"  # type: ignore[assignment]
    options = {"text": "a.b", "date": "meta.at", "id": "meta.who.id"}
    made = fetched(jsonl(tmp_path / "a.jsonl", rows), **options)
    assert left_out(made) == {"missing date": 2}
    assert read(made)[1][0].id == "1"
    rows[4]["meta"] = None  # type: ignore[assignment]
    made = fetched(write_parquet(tmp_path / "a.parquet", rows), **options)
    assert left_out(made) == {"missing date": 2}
    mongo = [{"_id": {"$oid": f"{i:x}"}, "text": "x", "date": {"$date": f"{2010 + i % 2}-01-01"}} for i in range(8)]
    assert [d.id for d in read(fetched(jsonl(tmp_path / "m.jsonl", mongo), id="_id"))[0]] == ["0", "2", "4", "6"]


def test_several_files_and_patterns(tmp_path: Path) -> None:
    rows = corpus()
    folder = tmp_path / "posts"
    (folder / "deep").mkdir(parents=True)
    jsonl(folder / "b.jsonl", rows[40:])
    jsonl(folder / "deep" / "a.jsonl.gz", rows[:40])
    jsonl(folder / ".hidden.jsonl", [row(99, 2010)])
    by_folder = read(fetched(folder))
    assert [len(stage) for stage in by_folder] == [40, 40]
    assert read(fetched(folder / "**" / "*.jsonl*"))[0][0].id == "page-0"
    (folder / "c.csv").write_text("id,text,date\n")
    with pytest.raises(ConfigError, match=r"1 csv, 2 jsonl.*say format"):
        fetched(folder)
    assert [len(stage) for stage in read(fetched(folder, format="jsonl"))] == [40, 40]
    with pytest.raises(NotFoundError, match="no file, folder or pattern"):
        fetched(tmp_path / "nothing.jsonl")
    with pytest.raises(NotFoundError, match="no jsonl file"):
        fetched(folder / "*.csv", format="jsonl")
    (tmp_path / "data.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="say format"):
        fetched(tmp_path / "data.bin")


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    folder = tmp_path / "blog"
    for name, text in {
        "2010/2010-05-01-title.md": "One.",
        "2010/06/title.md": "Two.",
        "2011-07-02.txt": "\ufeffThree.\r\nLine.",
        "news/20111231_x.txt": "Four.",
        "front.md": "---\ntitle: x\ndate: 2011-03-04\n---\nFive.\n",
        "none.md": "--- no front matter\nSix.",
        "bad.txt": b"\xff\xfe\xfa",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    named = {"text": "text", "id": "path", "group": "folder"}
    made = fetched(folder, date="path_date", **named)
    found = {d.id: d for stage in read(made) for d in stage}
    assert {(d.id, d.text, d.date, d.group) for d in found.values()} == {
        ("2010/2010-05-01-title.md", "One.", "2010-05-01", "2010"),
        ("2010/06/title.md", "Two.", "2010-06-01", "2010"),
        ("2011-07-02.txt", "Three.\nLine.", "2011-07-02", "documents"),
        ("news/20111231_x.txt", "Four.", "2011-12-31", "news"),
    }
    assert left_out(made) == {"missing date": 2, "bytes that are not UTF-8, or half a character": 1}
    assert made.report()["left_out"]["missing date"]["first"] == "front.md"
    with pytest.raises(ConfigError, match="6 of 7 rows cannot be used"):
        fetched(folder, date="front.date", **named)
    for i, path in enumerate(sorted(folder.rglob("*.*"))):
        when = datetime(2015 + i % 2, 3, 4, tzinfo=UTC).timestamp()
        os.utime(path, (when, when))
    old = source(folder, date="modified", **named).settings()
    assert [s.name for s in fetched(folder, date="modified", **named).stages()] == ["2015", "2016"]
    os.utime(folder / "none.md", (0, 1_000_000_000))
    assert source(folder, date="modified", **named).settings() != old, "the times are part of what decides"
    assert source(folder, date="path_date", **named).settings() == made.settings()


# --- rows that cannot be used ---

BASE = [row(i, 2010 + i % 2) for i in range(40)]
BAD_JSON: list[tuple[Any, str]] = [
    ('{"id": 1, "text": "x', "line that is not JSON"),
    ("[1, 2]", "line that is no JSON object"),
    (b'{"id": "a", "text": "\xff\xfe", "date": "2010-01-01"}', "bytes that are not UTF-8, or half a character"),
    ('{"id": "a", "text": "half \\ud800", "date": "2010-01-01"}', "bytes that are not UTF-8, or half a character"),
    (row(1, 2010, text=5), "text that is not a string"),
    (row(1, 2010, text=["a"]), "text that is not a string"),
    (row(1, 2010, text=None), "no text"),
    ({"id": "a", "date": "2010-01-01"}, "no text"),
    (row(1, 2010, text=""), "empty text"),
    (row(1, 2010, text=" \n\t\u00a0\u3000\u200b"), "only white space"),
    (row(1, 2010, text="\0\0"), "only white space"),
    (row(1, 2010, date=None), "missing date"),
    (row(1, 2010, date="soon"), "unreadable date"),
    (row(1, 2010, date="2011-02-29"), "unreadable date"),
    (row(1, 2010, date=[2010]), "unreadable date"),
    (row(1, 2010, date="03/04/2010"), "date whose order of day and month is not known"),
    (row(1, 2010, date="1723-01-01"), "date too early"),
    (row(1, 2010, date="9999-12-31"), "date too late"),
    (row(1, 2010, date="1970-01-01T00:00:00Z"), "date 1970-01-01T00:00:00, the zero of computer clocks"),
    (row(1, 2010, id=None), "missing id"),
    (row(1, 2010, id=""), "missing id"),
    (row(1, 2010, id=[1]), "missing id"),
]


def test_every_kind_of_bad_line_is_counted_with_its_number(tmp_path: Path) -> None:
    rows: list[Any] = []
    expected: dict[str, dict[str, Any]] = {}
    for good, (bad, kind) in zip(BASE, BAD_JSON, strict=False):
        rows += [good, "", bad]
        entry = expected.setdefault(kind, {"count": 0, "first": f"a.jsonl line {len(rows)}"})
        entry["count"] += 1
    made = fetched(jsonl(tmp_path / "a.jsonl", [*rows, *BASE[len(BAD_JSON) :]]))
    assert made.report()["left_out"] == expected
    assert made.report()["kept"] == 40 and made.report()["rows"] == 40 + len(BAD_JSON)
    assert sorted(d.id for stage in read(made) for d in stage) == sorted(r["id"] for r in BASE)
    assert made.scan()["left_out"] == expected, "a dry run says the same"


def test_texts_can_be_mended(tmp_path: Path) -> None:
    rows: list[Any] = [*BASE]
    rows.append(b'{"id": "a", "text": "caf\xe9", "date": "2010-01-01"}')
    rows.append('{"id": "b", "text": "half \\ud800", "date": "2010-01-01"}')
    rows.append(row(0, 2010, id="c", text="a\0b\0"))
    rows.append(row(0, 2010, id="d", text="\ufeffstart"))
    made = fetched(jsonl(tmp_path / "a.jsonl", rows), undecodable="replace")
    assert mended(made) == {
        "bytes that are not UTF-8 replaced": 2,
        "NUL characters removed": 1,
        "byte order marks removed": 1,
    }
    found = {d.id: d.text for d in read(made)[0]}
    assert [found[key] for key in "abcd"] == ["caf\ufffd", "half \ufffd", "ab", "start"]


def test_parquet_with_bytes_wrong_types_and_gaps(tmp_path: Path) -> None:
    n = 20
    times = pa.array([1_262_304_000 + i % 2 * 40_000_000 for i in range(n)])
    texts = [b"ok %d" % i for i in range(n)]
    texts[3], texts[5], texts[6] = b"\xff", None, b" "  # type: ignore[call-overload]
    raw = pa.StringArray.from_buffers(n, *pa.array([t or b"" for t in texts]).buffers()[1:])
    table = pa.table(
        {
            "text": pa.array(texts, pa.binary()),
            "unchecked": raw,
            "date": times.cast(pa.timestamp("s")),
            "id": pa.array([float(i) if i != 8 else None for i in range(n)]),
            "numbers": pa.array(range(n)),
            "tags": pa.array([["a"]] * n),
            "kind": pa.array(["x", "y"] * (n // 2)).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    made = fetched(tmp_path / "a.parquet", group="kind")
    assert left_out(made) == {"bytes that are not UTF-8": 1, "no text": 1, "only white space": 1, "missing id": 1}
    assert made.report()["left_out"]["bytes that are not UTF-8"]["first"] == "a.parquet row 4"
    assert {(d.id, d.text, d.group) for d in read(made)[0]} >= {("0", "ok 0", "x"), ("18", "ok 18", "x")}
    made = fetched(tmp_path / "a.parquet", text="unchecked", id="numbers")
    assert left_out(made) == {"bytes that are not UTF-8": 1, "empty text": 1, "only white space": 1}
    made = fetched(tmp_path / "a.parquet", undecodable="replace")
    assert mended(made) == {"bytes that are not UTF-8 replaced": 1}
    with pytest.raises(ConfigError, match="holds list"):
        fetched(tmp_path / "a.parquet", text="tags")
    with pytest.raises(NotFoundError, match=r"no column 'dat'.*did you mean 'date'"):
        fetched(tmp_path / "a.parquet", date="dat")


def test_csv_with_rows_of_another_width(tmp_path: Path) -> None:
    rows = "".join(f'{i},"a ""b"", c\nd",{2010 + i % 2}-01-01\n' for i in range(10))
    path = tmp_path / "a.csv"
    path.write_text("id,text,date\n" + rows + "\n7,short\n8,a,2010-01-01,long\n")
    made = fetched(path)
    assert left_out(made) == {"row with another number of fields than the header": 2}
    assert read(made)[0][0].text == 'a "b", c\nd'
    path.write_text("id,text,date\n" + rows + '9,"never closed,2010-01-01\n')
    with pytest.raises(IntegrityError, match=r"after row 10.*quotation mark"):
        fetched(path)
    path.write_text("id,text,text,date\n" + "1,a,b,2010-01-01\n" * 5)
    with pytest.raises(NotFoundError, match="several columns 'text'"):
        fetched(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="empty"):
        fetched(path)


def test_huge_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_readers, "MAX_BYTES", 3 << 20)
    rows = [*BASE, row(1, 2010, id="big", text="x" * (5 << 19)), row(1, 2010, id="huge", text="x" * (7 << 19))]
    made = fetched(jsonl(tmp_path / "a.jsonl", [*rows, row(1, 2010, id="after")]))
    assert left_out(made) == {"line of more than 3 MB": 1}
    found = {d.id: len(d.text) for d in read(made)[0]}
    assert found["big"] == 5 << 19 and "after" in found
    assert read(fetched(write_csv(tmp_path / "a.csv", rows[:-1])))[0][-1].id == "big"
    with pytest.raises(IntegrityError, match="field larger"):
        fetched(write_csv(tmp_path / "b.csv", rows))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.parquet"])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("csv.gz"):
        plain = write_csv(tmp_path / "plain.csv", corpus(4000))
        path.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        WRITERS["posts" + name[1:]](path, corpus(4000))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - len(data) // 10])
    made = source(path)
    with pytest.raises(IntegrityError, match=f"{name}.*copy it again"):
        made.fetch()
    assert not (made.ingested() / "manifest.json").exists()


def test_json_that_is_no_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(BASE))
    with pytest.raises(ConfigError, match="JSON array"):
        fetched(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="no row can be read"):
        fetched(jsonl(tmp_path / "b.jsonl", []), text=None)


# --- time ---


def test_the_year_is_that_of_utc(tmp_path: Path) -> None:
    rows = [row(i, 2012) for i in range(3)] + [row(i, 2013) for i in range(3, 6)]
    rows += [row(6, 0, date="2012-12-31T23:30:00-05:00"), row(7, 0, date="2013-01-01T01:00:00+02:00")]
    rows += [row(8, 0, date="2012-12-31 23:30:00"), row(9, 0, date="2012-02-29")]
    made = fetched(jsonl(tmp_path / "a.jsonl", rows))
    before, after = ([d.id for d in stage] for stage in read(made))
    assert before == ["page-0", "page-1", "page-2", "page-7", "page-8", "page-9"]
    assert after == ["page-3", "page-4", "page-5", "page-6"]
    assert {d.id: d.date for d in read(made)[1]}["page-6"] == "2013-01-01T04:30:00Z"
    made = fetched(jsonl(tmp_path / "a.jsonl", rows), timezone="America/New_York")
    assert "page-8" in [d.id for d in read(made)[1]], "in New York it is next year in UTC"
    with pytest.raises(ConfigError, match="no time zone"):
        source(tmp_path / "a.jsonl", timezone="Mars/Olympus")


def test_start_end_and_bounds(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(i, 2000 + i) for i in range(20)])
    made = fetched(path, start="2005", end="2015-05-01", every="5")
    assert left_out(made) == {"outside start and end": 9}
    assert made.stages()[0].start == "2005-05-01" and made.stages()[-1].end == "2015-05-01"
    made = fetched(path, earliest="2002-01-01", latest="2018-12-31", every="4")
    assert left_out(made) == {"date too early": 2, "date too late": 1}
    with pytest.raises(ConfigError, match="latest is 'soon'"):
        source(path, latest="soon")


def test_numbers_as_dates_are_not_guessed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(i, 0, date=1_262_304_000 + i * 6_000_000) for i in range(20)])
    with pytest.raises(ConfigError, match=r"look like seconds since 1970.*say dateformat=epoch_s"):
        fetched(path)
    assert [s.name for s in fetched(path, dateformat="epoch_s").stages()] == ["2010", "2011", "2012", "2013"]
    path = jsonl(tmp_path / "b.jsonl", [row(i, 0, date="03/04/2010") for i in range(20)])
    with pytest.raises(ConfigError, match="dmy or mdy"):
        fetched(path)


def test_order_instead_of_dates(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"text {i}", "n": i / 2 if i else 0} for i in range(12)]
    rows += [{"id": "x", "text": "x", "n": None}, {"id": "y", "text": "y", "n": "many"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    made = fetched(path, date=None, order="n", every="3")
    assert [[d.id for d in stage] for stage in read(made)] == [[str(i) for i in range(k, k + 4)] for k in (0, 4, 8)]
    assert [(s.name, s.start) for s in made.stages()][:2] == [("part-01", "2001-01-01"), ("part-02", "2002-01-01")]
    assert {d.date for d in read(made)[1]} == {"2002-01-01"}
    assert left_out(made) == {"missing order": 1, "order that is no number": 1}
    waves = [{"id": str(i), "text": f"text {i}", "n": i % 3 + 9} for i in range(12)]
    made = fetched(jsonl(tmp_path / "b.jsonl", waves), date=None, order="n", every="value")
    assert [s.name for s in made.stages()] == ["9", "10", "11"], "in the order of numbers, not of texts"
    with pytest.raises(ConfigError, match="every is 'year'"):
        source(path, date=None, order="n")


def test_small_periods(tmp_path: Path) -> None:
    sizes = {2010: 5, 2011: 1, 2012: 1, 2013: 6, 2016: 5, 2017: 2}
    rows = [row(i, year, id=f"{year}/{i}") for year, n in sizes.items() for i in range(n)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    made = fetched(path, min_documents=4)
    assert [(s.name, s.start, s.end) for s in made.stages()] == [
        ("2010", "2010-01-01", "2010-12-31"),
        ("2011..2013", "2011-01-01", "2013-12-31"),
        ("2016..2017", "2016-01-01", "2017-12-31"),
    ]
    assert made.report()["merged"] == [["2011", "2012", "2013"], ["2016", "2017"]]
    assert made.report()["empty_periods"] == ["2014", "2015"]
    made = fetched(path, min_documents=4, small="drop")
    assert [s.name for s in made.stages()] == ["2010", "2013", "2016"]
    assert made.report()["dropped_periods"] == {"2011": 1, "2012": 1, "2017": 2}
    with pytest.raises(ConfigError, match=r"3 periods have fewer than 4 documents: 2011 \(1\)"):
        fetched(path, min_documents=4, small="refuse")
    with pytest.raises(ConfigError, match="1 stage is left of 20 documents"):
        fetched(path, min_documents=19)
    assert len(list((path.parent / "home" / "sources").glob("documents-*"))) == 2, "what is refused leaves nothing"


# --- identity ---


def test_versions_of_an_id(tmp_path: Path) -> None:
    def version(identity: str, day: str, text: str) -> dict[str, str]:
        return {"id": identity, "date": day, "text": text}

    rows = [
        version("a", "2010-06-01", "second"),
        version("a", "2010-01-01", "first"),
        version("b", "2010-01-01", "same day, earlier row"),
        version("b", "2010-01-01", "same day, later row"),
        version("c", "2010-02-01", "copy"),
        version("c", "2010-03-01", "copy"),
        version("a", "2011-01-01", "second"),
        version("b", "2012-01-01", "other"),
        version("d", "2011-01-01", "new"),
        version("d", "2012-01-01", "new"),
    ]
    made = fetched(jsonl(tmp_path / "a.jsonl", rows))
    assert [[(d.id, d.text, d.change) for d in stage] for stage in read(made)] == [
        [("a", "second", "new"), ("b", "same day, later row", "new"), ("c", "copy", "new")],
        [("a", "second", "unchanged"), ("d", "new", "new")],
        [("b", "other", "changed"), ("d", "new", "unchanged")],
    ]
    assert [(s["copies"], s["older_versions"]) for s in made.report()["stages"]] == [(1, 2), (0, 0), (0, 0)]


def test_without_ids_equal_texts_are_one_document(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 5}", "date": f"{2010 + i // 10}-01-01"} for i in range(20)]
    made = fetched(jsonl(tmp_path / "a.jsonl", rows), id=None)
    first, second = read(made)
    assert [len(first), len(second)] == [5, 5]
    assert {d.id for d in first} == {d.id for d in second}
    assert {d.change for d in second} == {"unchanged"}
    assert [s["copies"] for s in made.report()["stages"]] == [5, 5]
    again = fetched(jsonl(tmp_path / "b.jsonl", rows[::-1]), id=None)
    assert {d.id for d in read(again)[0]} == {d.id for d in first}, "not the row's number"


# --- guarantees ---


def test_the_content_decides_and_not_where_it_lies(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "a.jsonl", corpus())
    (tmp_path / "elsewhere").mkdir()
    other = jsonl(tmp_path / "elsewhere" / "b.jsonl", corpus())
    first, second = fetched(one), source(other)
    assert first.settings() == second.settings()
    second.fetch()
    assert read(first) == read(second)
    assert source(one, every="month").settings() != first.settings()
    pinned = source(one, sha256=first.input_digest())
    assert pinned.settings() == first.settings()
    jsonl(one, corpus()[1:])
    assert source(one).settings() != first.settings()
    assert read(pinned) == read(first), "what is there needs no files"
    other_pin = source(one, sha256=first.input_digest(), every="month")
    with pytest.raises(IntegrityError, match="not those that this stream was made of"):
        other_pin.fetch()


def test_shares_of_work_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = corpus(200)
    folder = tmp_path / "posts"
    folder.mkdir()
    for i in range(4):
        write_parquet(folder / f"{i}.parquet", rows[i * 75 : (i + 1) * 75], row_group_size=20)
    whole = fetched(folder)
    answer = read(whole)
    assert len(_inputs.pieces(_inputs.find_inputs(str(folder)))) == 1
    for n_bytes in (1, 6000):
        monkeypatch.setattr(_inputs, "PIECE_BYTES", n_bytes)
        shares = _inputs.pieces(_inputs.find_inputs(str(folder)))
        assert len(shares) > 4 or n_bytes > 1
        fresh = source(folder, max_dropped=0.5 + n_bytes / 1e6)
        fresh.fetch()
        assert read(fresh) == answer
    monkeypatch.setattr(_readers, "BATCH_ROWS", 3)
    monkeypatch.setattr(documents, "BUFFER_BYTES", 2000)
    monkeypatch.setattr("clbench.workers.GRACE_SECONDS", 0.0)
    monkeypatch.setenv("CLBENCH_WORKERS", "2")
    fresh = source(folder, max_dropped=0.9)
    fresh.fetch()
    assert read(fresh) == answer


CHILD = """
import sys
from clbench.streams import _inputs
from clbench.streams.documents import Documents
_inputs.PIECE_BYTES = 1
Documents(Documents.Options(path=sys.argv[1], text="text", date="date", id="id")).fetch()
"""


def test_a_kill_and_another_start_equal_one_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "posts"
    folder.mkdir()
    for i in range(6):
        jsonl(folder / f"{i}.jsonl", [row(1000 * i + k, 2010 + k % 3, text="x" * 300 + str(k)) for k in range(4000)])
    monkeypatch.setattr(_inputs, "PIECE_BYTES", 1)
    made = Documents(Options(path=str(folder), **NAMED))
    units = made.ingested() / "units"
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], env={**os.environ, "CLBENCH_WORKERS": "1"})
    deadline = time.monotonic() + 60
    while len(list(units.glob("0*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_done = len(list(units.glob("0*.json")))
    assert 2 <= n_done < 6, "killed in the middle"
    assert not (made.ingested() / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in units.glob("0*.json")}
    made.fetch()
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "what was done is not done again"
    answer = read(made)
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "other"))
    whole = Documents(Options(path=str(folder), **NAMED))
    whole.fetch()
    assert read(whole) == answer
    assert whole.report() == made.report()


def test_from_the_registry(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", corpus())
    made: Any = make_stream_source(f"documents:path={path},text=text,date=date,id=id,min_documents=2")
    assert isinstance(made, Documents) and made.options == source(path).options
    with pytest.raises(ConfigError, match=r"not named.*say text=text, date=date, id=id"):
        make_stream_source(f"documents:path={path}").fetch()
    for wrong in ("every=fortnight", "undecodable=guess", "small=maybe", "min_documents=1", "dateformat=odd"):
        with pytest.raises(ClbenchError):
            make_stream_source(f"documents:path={path},{wrong}")


# --- the guess ---


def test_a_guess_goes_by_names_and_content(tmp_path: Path) -> None:
    rows = [
        {
            "n": i,
            "permalink": f"/p/{i}",
            "subreddit": ["a", "b", "c"][i % 3],
            "title": f"Title {i}",
            "selftext": f"A longer text about {i}, " * 5,
            "created_utc": 1_262_304_000 + i,
            "score": i % 7,
        }
        for i in range(60)
    ]
    found = Documents.survey(Options(path=str(jsonl(tmp_path / "a.jsonl", rows))))
    assert found.guess == {"text": "selftext", "date": "created_utc", "id": "permalink", "group": "subreddit"}
    assert found.layout is not None and found.layout.layout == "epoch_s"
    assert found.examples("title", 2) == ["Title 0", "Title 1"]
    odd = [
        {"a": f"Some text that is long enough for one, {i}.", "b": f"2010-01-{i + 1:02d}", "c": i} for i in range(20)
    ]
    found = Documents.survey(Options(path=str(jsonl(tmp_path / "b.jsonl", odd))))
    assert found.guess == {"text": "a", "date": "b", "id": None, "group": None}
    with pytest.raises(ConfigError, match="no column reads as dates"):
        Documents.survey(Options(path=str(jsonl(tmp_path / "c.jsonl", [{"a": "x" * 50, "c": 5}]))))
    with pytest.raises(ConfigError, match="no column looks like text"):
        Documents.survey(Options(path=str(jsonl(tmp_path / "d.jsonl", [{"a": 1}]))))
    with pytest.raises(NotFoundError, match="no column 'tex'"):
        Documents.survey(Options(path=str(tmp_path / "b.jsonl"), text="tex"))


def test_options_are_one_object_in_many_hands(tmp_path: Path) -> None:
    options = source(jsonl(tmp_path / "a.jsonl", corpus())).options
    assert Documents(replace(options)).settings() == Documents(options).settings()
