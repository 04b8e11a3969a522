"""``hub`` against data sets that lie here in the hub's layout: the call is the one that a hub would get.

What is expected of every stream is worked out again from the rows, by the plainest means, and compared for equality.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer

from clbench import home
from clbench.build import build_stream
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError, OfflineError
from clbench.files import read_json
from clbench.ingest import Ingested
from clbench.registry import make_stream_source, specifications
from clbench.seeds import derive
from clbench.specification import read_specification
from clbench.stream import Document
from clbench.streams import _hub_options as options
from clbench.streams import _hub_reach as reach
from clbench.streams._hub_rows import host_of, moment_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUILT_IN = ("fineweb", "fineweb-small", "news", "stackexchange", "wikipedia")
N_ROWS = 90
Row = dict[str, Any]


def rows_of(year: int, n: int = N_ROWS, *, file: int = 0) -> list[Row]:
    """Return rows as a web data set has them; texts differ in length, in bytes per character and between years."""
    return [
        {
            "text": f"Page {i} of {file} in {year}: " + "déjà vu " * (i % 7) + f"thing {i * 7 % 13}. " * (1 + i % 5),
            "url": f"https://www.site{i % 4}.example/{file}/{i}",
            "date": f"{year}-{1 + i % 12:02d}-{1 + i % 28:02d}T05:48:54Z",
            "language_score": 0.5 + i / 200,
            "language": "de" if i % 9 == 0 else "en",
            "unwanted": "x" * 50,
        }
        for i in range(n)
    ]


def write_dataset(folder: Path, configs: dict[str, list[list[Row]]], *, suffix: str = "parquet") -> Path:
    """Write a data set in the hub's layout: a card whose header names the files of every configuration."""
    entries = []
    for config, files in configs.items():
        (folder / "data" / config).mkdir(parents=True)
        for number, rows in enumerate(files):
            path = folder / "data" / config / f"{number:03d}_00000.{suffix}"
            if suffix == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=25 if len(rows) < 1000 else 1000)
            else:
                pa_rows = pa.Table.from_pylist(rows).to_pandas()
                pa_rows.to_json(path, orient="records", lines=True)
        data_files = [{"split": "train", "path": f"data/{config}/*"}]
        entries.append({"config_name": config, "data_files": data_files})
    header = yaml.safe_dump({"configs": entries}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{header}---\n# made by a test\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three years, one configuration each, of two files."""
    folder = tmp_path_factory.mktemp("copies") / "acme" / "web"
    return write_dataset(folder, {f"Y{y}": [rows_of(y), rows_of(y, file=1)] for y in (2013, 2014, 2015)})


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def years(*names: int) -> list[dict[str, Any]]:
    return [{"name": y, "start": f"{y}-01-01", "end": f"{y}-12-31", "config": f"Y{y}"} for y in names]


def specification(path: Path, **changes: Any) -> str:
    """Write a specification over the data set ``acme/web`` and return its path."""
    overrides = {key: changes.pop(key) for key in ("tokenizer", "name") if key in changes}
    content = {
        "dataset": "acme/web",
        "revision": COMMIT,
        "columns": {"text": "text", "id": "url", "date": "date", "group": "host(url)"},
        "periods": years(2013, 2014),
    } | changes
    whole = {"format": 1, "name": "web", "source": "hub", "vocab_size": 300, "heldout_fraction": 0.25, **overrides}
    target = path / "web.yaml"
    target.write_text(yaml.safe_dump({**whole, "options": content}, sort_keys=False), encoding="utf-8")
    return str(target)


def fetched(spec: str) -> tuple[list[list[Document]], dict[str, Any]]:
    """Fetch, and return the documents of every stage and the ingest's manifest."""
    source = make_stream_source(spec)
    source.fetch()
    (path,) = home.sources_folder().glob("*/manifest.json")
    Ingested(path.parent).check()
    return [list(source.documents(stage.index)) for stage in source.stages()], read_json(path)


def all_rows(year: int) -> list[Row]:
    return rows_of(year) + rows_of(year, file=1)


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


# --- what is kept -------------------------------------------------------------------------------------------


def test_every_period_reads_its_configuration(web: Path, tmp_path: Path) -> None:
    stages, manifest = fetched(specification(tmp_path, local_folder=str(web.parents[1])))
    for stage, year in zip(stages, (2013, 2014), strict=True):
        expected = [
            (r["url"], r["text"], r["date"][:10], f"site{i % N_ROWS % 4}.example") for i, r in enumerate(all_rows(year))
        ]
        assert [(d.id, d.text, d.date, d.group) for d in stage] == expected
    assert {d.change for d in stages[0]} == {"new"}
    assert {d.change for d in stages[1]} == {"changed"}, "the same addresses, other texts"
    assert manifest["report"]["revisions"] == {f"acme/web@{COMMIT}": "local copy"}


@pytest.mark.parametrize("measure", ["max_documents", "max_bytes"])
@pytest.mark.parametrize("cap", [1, 53, 100, 5000, 10**9])
def test_a_cap_takes_documents_until_the_next_would_go_over(web: Path, tmp_path: Path, measure: str, cap: int) -> None:
    size = {"max_documents": lambda row: 1, "max_bytes": lambda row: len(row["text"].encode())}[measure]
    if measure == "max_bytes" and cap == 1:
        cap = size(all_rows(2013)[0])  # the first one exactly
    expected, total = [], 0
    for row in all_rows(2013):
        if total + size(row) > cap:
            break
        total += size(row)
        expected.append(row["text"])
    spec = specification(tmp_path, local_folder=str(web), periods=years(2013), **{measure: cap})
    stages, manifest = fetched(spec)
    assert texts(stages[0]) == expected
    held = manifest["report"]["periods"]["2013"]
    assert held["documents"] == len(expected)
    assert held["bytes"] == sum(len(text.encode()) for text in expected)


def test_a_cap_holds_across_pieces_and_periods_have_their_own(web: Path, tmp_path: Path) -> None:
    periods = years(2013, 2014)
    periods[1]["max_documents"] = 7
    spec = specification(tmp_path, local_folder=str(web), periods=periods, max_documents=N_ROWS + 30, pieces=2)
    stages, _ = fetched(spec)
    assert texts(stages[0]) == [r["text"] for r in all_rows(2013)[: N_ROWS + 30]]
    assert len(stages[1]) == 7


def test_a_cap_on_tokens_counts_as_the_builder_packs(web: Path, tmp_path: Path) -> None:
    folder = build_stream(make_stream_source("tinydocs"), progress=False).tokenizer_folder
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected, total, cap = [], 0, 2000
    for row in all_rows(2013):
        total += len(tokenizer.encode(row["text"], add_special_tokens=False).ids) + 1  # and the end of text
        if total > cap:
            break
        expected.append(row["text"])
    for name in (str(folder), "stream:tinydocs"):
        spec = specification(
            tmp_path,
            local_folder=str(web),
            periods=years(2013),
            max_tokens=cap,
            tokenizer=name,
            name=f"web-{len(name)}",
        )
        source = make_stream_source(spec)
        source.fetch()
        assert texts(list(source.documents(0))) == expected
    with pytest.raises(ConfigError, match="max_tokens needs a tokenizer"):
        make_stream_source(specification(tmp_path, local_folder=str(web), max_tokens=cap)).settings()


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        ("language_score >= 0.75", lambda r: r["language_score"] >= 0.75),
        ("language_score < 0.6", lambda r: r["language_score"] < 0.6),
        ("language == en", lambda r: r["language"] == "en"),
        ("language != en", lambda r: r["language"] != "en"),
        ("language in [de, fr]", lambda r: r["language"] in ("de", "fr")),
        ("language not in [de]", lambda r: r["language"] != "de"),
        ("date > 2013-06-30", lambda r: r["date"] > "2013-06-30"),
    ],
)
def test_filters(web: Path, tmp_path: Path, text: str, keeps: Any) -> None:
    if "date" in text:
        text = "date > '2013-06-30'"  # a bare day is no text in YAML
    stages, manifest = fetched(specification(tmp_path, local_folder=str(web), periods=years(2013), filters=[text]))
    expected = [row["text"] for row in all_rows(2013) if keeps(row)]
    assert 0 < len(expected) < 2 * N_ROWS
    assert texts(stages[0]) == expected
    (refused,) = manifest["refused"].values()
    assert refused["count"] == 2 * N_ROWS - len(expected)


def test_filters_hold_together_and_lengths_count_characters(web: Path, tmp_path: Path) -> None:
    spec = specification(
        tmp_path,
        local_folder=str(web),
        periods=years(2013),
        filters=["language == en", "language_score >= 0.6"],
        min_chars=60,
        max_chars=110,
    )
    stages, _ = fetched(spec)
    expected = [
        row["text"]
        for row in all_rows(2013)
        if row["language"] == "en" and row["language_score"] >= 0.6 and 60 <= len(row["text"]) <= 110
    ]
    assert expected and texts(stages[0]) == expected


def test_keep_is_a_hash_of_the_id_so_a_page_is_in_every_period_or_in_none(web: Path, tmp_path: Path) -> None:
    stages, _ = fetched(specification(tmp_path, local_folder=str(web), keep=0.3, seed=5))
    expected = {r["url"] for r in all_rows(2013) if derive(5, "hub", r["url"]) < 0.3 * 2**63}
    assert 30 < len(expected) < 80
    assert [{d.id for d in stage} for stage in stages] == [expected, expected]


def test_rows_of_one_configuration_go_to_the_period_of_their_date(tmp_path: Path) -> None:
    rows = [row for y in (2012, 2013, 2014, 2015) for row in rows_of(y, 40)]
    rows = [rows[i * 37 % len(rows)] for i in range(len(rows))]  # in no order of time
    rows += [dict(rows[0], date="soon", url="u"), dict(rows[0], date=None, url="v"), dict(rows[0], text="", url="w")]
    write_dataset(tmp_path / "posts", {"default": [rows[:70], rows[70:]]})
    periods = [
        {"name": "first", "start": "2013-01-01", "end": "2013-06-30"},
        {"name": "second", "start": "2013-07-01", "end": "2014-12-31", "max_documents": 20},
    ]
    spec = specification(tmp_path, dataset="./posts", revision="", periods=periods)
    stages, manifest = fetched(spec)
    in_time = [r for r in rows if r["text"] and r["date"] and r["date"] != "soon"]
    for stage, period in zip(stages, periods, strict=True):
        inside = [r for r in in_time if period["start"] <= r["date"][:10] <= period["end"]]
        taken = inside[: period.get("max_documents")]
        # One address in two years of one period: the later date counts.
        latest = {r["url"]: max((s for s in taken if s["url"] == r["url"]), key=lambda s: s["date"]) for r in taken}
        assert {d.id: d.text for d in stage} == {url: r["text"] for url, r in latest.items()}
    outside = sum(not "2013-01-01" <= r["date"][:10] <= "2014-12-31" for r in in_time)
    counts = {kind: found["count"] for kind, found in manifest["refused"].items()}
    assert counts == {"date outside the period": outside, "date cannot be read": 1, "no date": 1, "no text": 1}


def test_a_period_of_several_data_sets(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", {"default": [rows_of(2013, 20)]})
    write_dataset(tmp_path / "two", {"default": [rows_of(2013, 30, file=1)]})
    period = {"name": 2013, "start": "2013-01-01", "end": "2013-12-31"}
    sources = [{"dataset": "./one", "max_documents": 5}, {"dataset": "./two", "max_documents": 6}]
    stages, _ = fetched(specification(tmp_path, dataset=None, revision="", periods=[{**period, "sources": sources}]))
    assert texts(stages[0]) == [r["text"] for r in rows_of(2013, 5) + rows_of(2013, 6, file=1)]


def test_several_text_columns_no_id_no_date_and_files_by_pattern(tmp_path: Path) -> None:
    rows = [{"title": f"Title {i}", "body": None if i == 3 else f"Body {i}"} for i in range(9)]
    write_dataset(tmp_path / "plain", {"default": [rows[:5], rows[5:]]})
    period = {"name": "p", "start": "2020-01-01", "end": "2020-01-31", "data_files": "data/default/001*"}
    spec = specification(
        tmp_path, dataset="./plain", revision="", columns={"text": ["title", "body"]}, periods=[period]
    )
    stages, _ = fetched(spec)
    assert texts(stages[0]) == [f"Title {i}\n\nBody {i}" for i in range(5, 9)]
    assert {(d.date, d.group) for d in stages[0]} == {("2020-01-31", "plain")}
    assert len({d.id for d in stages[0]}) == 4


def test_lines_of_json_work_as_parquet_does(web: Path, tmp_path: Path) -> None:
    folder = write_dataset(
        tmp_path / "json" / "acme" / "web", {"Y2013": [rows_of(2013), rows_of(2013, file=1)]}, suffix="jsonl"
    )
    spec = specification(tmp_path, periods=years(2013), filters=["language == en"], local_folder=str(folder))
    as_lines, _ = fetched(spec)
    shutil.rmtree(home.home())
    spec = specification(tmp_path, periods=years(2013), filters=["language == en"], local_folder=str(web))
    as_parquet, _ = fetched(spec)
    # pandas and `datasets` may read the dates of JSON as timestamps: the same moments.
    assert as_lines == as_parquet


@pytest.mark.parametrize(
    ("value", "day"),
    [
        ("2013-05-18T05:48:54Z", "2013-05-18"),
        ("2013-05-18 23:30:00-05:00", "2013-05-19"),
        ("2013-05-18", "2013-05-18"),
        (date(2013, 5, 18), "2013-05-18"),
        (1368856134, "2013-05-18"),
        ("18/05/2013", None),
        ("", None),
        (None, None),
        (True, None),
        (1e300, None),
    ],
)
def test_moments(value: Any, day: str | None) -> None:
    moment = moment_of(value)
    assert (moment and moment.date().isoformat()) == day


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("https://www.A.example:80/x", "a.example"),
        ("http://me:x@[::1]:80/", "[::1]"),
        ("http://[::1", "unknown"),
        ("", "unknown"),
        ("no address", "unknown"),
    ],
)
def test_hosts(address: str, host: str) -> None:
    assert host_of(address) == host


# --- the way ------------------------------------------------------------------------------------------------


def test_a_hub_and_a_folder_get_the_same_call(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    real = datasets.load_dataset

    def spy(path: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(((path, *args), kwargs))
        return real(str(web), *args, **{**kwargs, "revision": None})

    monkeypatch.setattr(datasets, "load_dataset", spy)
    columns = options.Columns(text=("text",), id="url")
    place = options.Place("acme/web", COMMIT, "Y2013", "train", (), columns, ("language == en",), 1)
    read = {
        spot: [table.to_pydict() for table in reach.tables(place, spot, 0)]
        for spot in (reach.Spot(str(web), None), reach.Spot("acme/web", COMMIT))
    }
    (local, local_options), (remote, remote_options) = calls
    assert (local, remote) == ((str(web), "Y2013"), ("acme/web", "Y2013"))
    assert local_options.pop("revision") is None and remote_options.pop("revision") == COMMIT
    assert (
        local_options == remote_options == {"split": "train", "streaming": True, "columns": ["text", "url", "language"]}
    )
    first, second = read.values()
    assert first == second and first[0].keys() == {"text", "url", "language"}, "nothing else is read"
    assert [text for table in first for text in table["text"]] == [r["text"] for r in all_rows(2013)]


def test_a_cut_connection_goes_on_with_the_next_period_at_the_same_commit(
    web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    real, broken = datasets.load_dataset, {"Y2014"}

    def hub(path: str, config: str, *, revision: str, **kwargs: Any) -> Any:
        asked.append((config, revision))
        if config in broken:
            raise ConnectionResetError(104, "reset by peer")
        return real(str(web), config, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(reach, "_ask_for_commit", lambda place: COMMIT)
    spec = specification(tmp_path, revision="main", unpinned=True)
    with pytest.raises(OfflineError, match=r"connection to the model hub was cut.*run the same command again"):
        make_stream_source(spec).fetch()
    broken.clear()
    monkeypatch.setattr(reach, "_ask_for_commit", lambda place: COMMIT[::-1])  # main has moved on meanwhile
    stages, manifest = fetched(spec)
    assert asked == [("Y2013", COMMIT), ("Y2014", COMMIT), ("Y2014", COMMIT)]
    assert manifest["report"]["revisions"] == {"acme/web@main": COMMIT}
    assert [len(stage) for stage in stages] == [2 * N_ROWS, 2 * N_ROWS]


def test_built_twice_it_is_the_same_and_needs_no_source_any_more(web: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(web, tmp_path / "copy")
    spec = specification(tmp_path, local_folder=str(copy), periods=years(2013, 2014, 2015), max_bytes=6000)
    first = build_stream(make_stream_source(spec), progress=False)
    first.check()
    shutil.rmtree(copy)
    again = build_stream(make_stream_source(spec), progress=False)
    assert again.folder == first.folder
    shutil.rmtree(home.home())
    with pytest.raises(NotFoundError, match="no local copy"):
        build_stream(make_stream_source(spec), progress=False)
    moved = shutil.copytree(web, tmp_path / "elsewhere" / "acme" / "web")
    spec = specification(tmp_path, local_folder=str(moved.parents[1]), periods=years(2013, 2014, 2015), max_bytes=6000)
    elsewhere = build_stream(make_stream_source(spec), progress=False)
    assert (elsewhere.folder, elsewhere.sha256) == (first.folder, first.sha256), "the path decides nothing"


def test_other_bytes_of_a_local_copy_are_another_stream(web: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(web, tmp_path / "copy")
    spec = specification(tmp_path, local_folder=str(copy))
    before = make_stream_source(spec).settings()
    assert make_stream_source(spec).settings() == before
    pq.write_table(pa.Table.from_pylist(rows_of(2013, N_ROWS - 1)), copy / "data" / "Y2013" / "000_00000.parquet")
    assert make_stream_source(spec).settings() != before


def test_a_kill_in_mid_period_costs_that_period_only(tmp_path: Path) -> None:
    sizes = {2013: 300, 2014: 6_000}  # the second is still being read when the kill comes
    write_dataset(tmp_path / "big", {f"Y{y}": [rows_of(y, n, file=f) for f in (0, 1)] for y, n in sizes.items()})
    spec = specification(tmp_path, dataset="./big", revision="", keep=0.9)
    code = f"from clbench.registry import make_stream_source as m; m({spec!r}).fetch()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (records := [*home.sources_folder().glob("web-*/units/0000.json")]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = records[0].parents[1]
    assert not (folder / "manifest.json").exists() and not (folder / "units" / "0001.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (records[0], *folder.glob("period=2013/*.parquet"))}
    assert len(finished) > 1
    make_stream_source(spec).fetch()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished period is not fetched again"
    manifest = read_json(folder / "manifest.json")
    assert sorted(p.name for p in folder.glob("period=*/*")) == sorted(
        Path(part["path"]).name for stage in manifest["stages"] for part in stage["parts"]
    )
    shutil.rmtree(home.home())
    make_stream_source(spec).fetch()
    assert read_json(folder / "manifest.json") == manifest
    kept = {
        y: sum(derive(0, "hub", r["url"]) < 0.9 * 2**63 for f in (0, 1) for r in rows_of(y, n, file=f))
        for y, n in sizes.items()
    }
    assert {int(y): found["documents"] for y, found in manifest["report"]["periods"].items()} == kept


# --- what goes wrong ----------------------------------------------------------------------------------------


def refusal(spec: str) -> str:
    """Return the one line that fetching ends with; nothing may be left that looks complete."""
    with pytest.raises(ClbenchError) as caught:
        make_stream_source(spec).fetch()
    assert "\n" not in str(caught.value)
    assert not [*home.sources_folder().glob("*/manifest.json")]
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": {"text": "txt", "id": "url"}}, "there is no column 'txt'.*did you mean 'text'"),
        ({"filters": ["langage == en"]}, "there is no column 'langage'.*did you mean 'language'"),
        ({"filters": ["language >= 3"]}, "holds string, which cannot be compared with 3"),
        ({"split": "trian"}, "there is no split 'trian'.*did you mean 'train'"),
        ({"periods": [{**years(2013)[0], "config": "Y2031"}]}, "no configuration 'Y2031'.*did you mean .*'Y2013'"),
        ({"periods": [{**years(2013)[0], "config": None}]}, "several configurations.*Y2013, Y2014, Y2015"),
        ({"data_files": "data/nowhere/*.parquet"}, "no data files are found"),
        ({"periods": [{**years(2013)[0], "config": "Y2014"}]}, "period 2013 got no document.*outside the period: 180"),
    ],
)
def test_mistakes_are_one_line(web: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert re.search(said, refusal(specification(tmp_path, local_folder=str(web), **changes)))
    assert not [*home.sources_folder().glob("*/period=*/*")], "nothing half-written"


def test_a_damaged_file_is_named_as_damage(web: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(web, tmp_path / "copy")
    damaged = copy / "data" / "Y2014" / "000_00000.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(IntegrityError, match="cannot be read"):
        make_stream_source(specification(tmp_path, local_folder=str(copy))).fetch()


def test_programs_are_not_run(web: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(web, tmp_path / "web")
    (copy / "web.py").write_text("raise SystemExit('it ran')")
    assert "foreign programs are not run" in refusal(specification(tmp_path, local_folder=str(copy)))


def test_a_folder_that_an_id_would_mean_by_accident(tmp_path: Path) -> None:
    (tmp_path / "acme" / "web").mkdir(parents=True)
    assert "a folder called acme/web lies here" in refusal(specification(tmp_path))


@pytest.mark.parametrize("revision", ["", "main", "v1.4.0", COMMIT[:12]])
def test_a_stream_needs_a_commit(tmp_path: Path, revision: str) -> None:
    said = refusal(specification(tmp_path, revision=revision))
    assert "a frozen stream needs a commit" in said and "`unpinned: true`" in said
    assert "forbids the network" in refusal(specification(tmp_path, revision=revision, unpinned=True))


def prepared(target: str, **environment: str) -> tuple[str, int, float]:
    """Run ``clbench prepare`` and return what it said, its exit code and the seconds it took."""
    forbidding = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}
    base = {key: value for key, value in os.environ.items() if key not in forbidding}
    base["PYTHONPATH"] = str(Path(__file__).parents[2])
    start = time.monotonic()
    command = [sys.executable, "-m", "clbench", "prepare", target]
    done = subprocess.run(command, env={**base, **environment}, capture_output=True, text=True, timeout=60)
    return done.stderr.strip(), done.returncode, time.monotonic() - start


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "no model hub answers"),
        ({"CLBENCH_OFFLINE": "1"}, "CLBENCH_OFFLINE forbids the network"),
    ],
)
def test_offline_is_one_quick_line(environment: dict[str, str], said: str) -> None:
    line, code, seconds = prepared("fineweb-small", **environment)
    assert code == 2 and len(line.splitlines()) == 1, line
    assert line.startswith("error: ") and said in line
    assert "HuggingFaceFW/fineweb" in line and "HF_ENDPOINT" in line and "local_folder" in line
    assert seconds < 12, "1.6 s on a free machine; the libraries' own retries alone would take 23 s"


def _hub_answer(status: int) -> Any:
    """Return an HTTP answer of the library that the hub's client uses, whichever it is."""
    from huggingface_hub.errors import HfHubHTTPError

    http = sys.modules[HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]
    return http.Response(status, request=http.Request("GET", "http://127.0.0.1/api"))


def _library_errors() -> dict[str, tuple[Exception, type[ClbenchError], str]]:
    from huggingface_hub import errors

    answer = _hub_answer(404)
    return {
        "cut": (aiohttp.ClientPayloadError("not all of it came"), OfflineError, "connection to the model hub was cut"),
        "timeout": (TimeoutError("read"), OfflineError, "was cut"),
        "reset": (ConnectionResetError(104, "reset"), OfflineError, "run the same command again"),
        "gated": (errors.GatedRepoError("gated", response=answer), NotFoundError, "asked for access"),
        "missing": (errors.RepositoryNotFoundError("none", response=answer), NotFoundError, "no data set 'acme/web'"),
        "revision": (errors.RevisionNotFoundError("none", response=answer), NotFoundError, "no revision"),
        "busy": (
            errors.HfHubHTTPError("503 Server Error", response=_hub_answer(503)),
            OfflineError,
            "hub refuses: 503",
        ),
        "damage": (pa.ArrowInvalid("Parquet magic bytes not found"), IntegrityError, "cannot be read"),
    }


@pytest.mark.parametrize("case", ["cut", "timeout", "reset", "gated", "missing", "revision", "busy", "damage"])
def test_what_the_libraries_raise_in_words(case: str) -> None:
    raised, kind, said = _library_errors()[case]
    place = options.Place("acme/web", COMMIT, "Y2013", "train", (), options.Columns(text=("text",)), (), 1)
    with pytest.raises(kind, match=said), reach.explained(place, reach.Spot("acme/web", COMMIT)):
        raise raised


def test_what_is_not_understood_is_not_hidden() -> None:
    place = options.Place("acme/web", COMMIT, None, "train", (), options.Columns(text=("text",)), (), 1)
    with pytest.raises(ZeroDivisionError), reach.explained(place):
        raise ZeroDivisionError


# --- specifications -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"periods": []}, "at least one period"),
        ({"periods": [*years(2014), *years(2013)]}, "period 2013 starts before 2014 ends"),
        ({"periods": [{**years(2013)[0], "end": "2012-01-01"}]}, "ends before it starts"),
        ({"periods": [{**years(2013)[0], "start": "2013"}]}, "not a day such as"),
        ({"periods": [{**years(2013)[0], "name": "a/b"}]}, "letters, digits"),
        ({"periods": [{**years(2013)[0], "confg": "x"}]}, "confg.*Extra inputs"),
        ({"columns": None}, "period 2013 has no columns"),
        ({"dataset": None}, "period 2013 has no dataset"),
        ({"dataset": "a/b/c"}, "neither an id"),
        (
            {
                "columns": {"text": "text", "date": None},
                "periods": [{**p, "config": "Y2013"} for p in years(2013, 2014)],
            },
            "read the same rows",
        ),
        ({"filters": ["language ~ en"]}, "cannot be read"),
        ({"filters": ["language in en"]}, "not a list"),
        ({"filters": ["__import__('os')"]}, "cannot be read"),
        ({"keep": 0}, "keep has to be above 0"),
        ({"max_bytes": 0}, "greater than or equal to 1"),
        ({"max_byte": 1}, "no option 'max_byte'.*did you mean 'max_bytes'"),
    ],
)
def test_specifications_that_do_not_hold_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_stream_source(specification(tmp_path, **changes))


def test_another_data_set_inherits_neither_revision_nor_configuration_nor_files() -> None:
    columns = options.Columns(text=("text",))
    defaults = options.Origin(
        dataset="a/one", revision=COMMIT, config="x", data_files=("f",), columns=columns, split="s"
    )
    sources = [{}, {"config": "y"}, {"dataset": "b/two"}, {"dataset": "b/two", "config": "z"}]
    period = options.Period(name="p", start="2020-01-01", end="2020-12-31", config="w", sources=sources)
    places = [place for place, _ in options.resolved(period, defaults)]
    assert [(p.dataset, p.revision, p.config, p.data_files) for p in places] == [
        ("a/one", COMMIT, "w", ("f",)),
        ("a/one", COMMIT, "y", ("f",)),
        ("b/two", "", None, ()),
        ("b/two", "", "z", ()),
    ]
    assert {p.split for p in places} == {"s"} and {p.columns for p in places} == {columns}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_specifications_are_pinned_ordered_and_say_what_they_are(name: str) -> None:
    path = specifications()[name]
    assert path.stem.replace("_", "-") == name
    read = read_specification(path)
    assert re.search(r"verified: (yes|no, )", read.description) and "icen" in read.description
    source: Any = make_stream_source(name)
    stages = source.stages()
    assert [stage.name for stage in stages] == list(dict.fromkeys(stage.name for stage in stages))
    for earlier, later in pairwise(stages):
        assert date.fromisoformat(later.start) == date.fromisoformat(earlier.end) + timedelta(days=1), later.name
    for work in source._passes:
        assert re.fullmatch("[0-9a-f]{40}", work.place.revision), "every commit is pinned"
        assert all(caps.max_bytes or name == "news" for caps in work.periods.values())
    assert source.settings() == make_stream_source(name).settings()


def test_dumps_of_the_web_lie_in_their_periods() -> None:
    for name in ("fineweb", "fineweb-small"):
        for period in make_stream_source(name).options.periods:
            assert period.config == f"CC-MAIN-{period.name}"
            year, week = map(int, period.name.split("-"))
            # A dump is named after a week of its crawl, which takes days to weeks, and months in the early years.
            assert date.fromisoformat(period.start) + timedelta(28) <= date.fromisocalendar(year, week, 1)
            assert date.fromisocalendar(year, week, 7) + timedelta(60) <= date.fromisoformat(period.end)


def test_the_commented_specification_of_the_docs_holds_together(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text("utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "x.yaml").write_text(block, encoding="utf-8")
        source: Any = make_stream_source(str(tmp_path / "x.yaml"))
    described = set(yaml.safe_load(block)["options"])
    known = {field.name for field in dataclasses.fields(source.Options)}
    assert described == known, "every option, and none that is not there"
