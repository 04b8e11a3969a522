"""The bounded-memory writer against a plain Python model of what it should keep."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clbench import ingest as engine
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError
from clbench.ingest import Ingest, Ingested, StagePlan, text_hashes
from clbench.parts import identity_hash
from clbench.seeds import generator

STAGES = [StagePlan(name=str(y), start=f"{y}-01-01", end=f"{y}-12-31", periods=(str(y),)) for y in (2010, 2011, 2012)]
UNITS = ("first", "second")

Row = dict[str, Any]


def rows_of(n: int = 300) -> list[tuple[str, str, Row]]:
    """(unit, period, row): 40 ids over three years, versions in no order, some texts equal, some times equal."""
    draw = generator(0, "test-ingest")
    found = []
    for i in range(n):
        year = int(draw.integers(2010, 2013))
        text = f"text {int(draw.integers(0, 3))} " * int(draw.integers(1, 3))
        row = {
            "id": f"page-{int(draw.integers(0, 40))}",
            "text": text,
            "date": f"{year}-01-01",
            "group": "g",
            "when": int(draw.integers(0, 4)),
            "likes": i,
        }
        found.append((UNITS[i * 2 // n], str(year), row))
    return found


def expected(rows: list[tuple[str, str, Row]]) -> list[list[tuple[Any, ...]]]:
    """Per stage (id, text, likes, change), in the order of the rows: the model."""
    before: dict[str, str] = {}
    stages = []
    for stage in STAGES:
        mine = [row for _, period, row in rows if period == stage.name]
        winners: dict[str, Row] = {}
        for row in mine:  # the greatest ``when``, of equal ones the last
            old = winners.get(row["id"])
            if old is None or row["when"] >= old["when"]:
                winners[row["id"]] = row
        kept = []
        for row in mine:
            if winners[row["id"]] is row:
                old_text = before.get(row["id"])
                change = "new" if old_text is None else "unchanged" if old_text == row["text"] else "changed"
                kept.append((row["id"], row["text"], row["likes"], change))
        before |= {identity: row["text"] for identity, row in winners.items()}
        stages.append(kept)
    return stages


def written(folder: Path, rows: list[tuple[str, str, Row]], batch: int = 7, **limits: int) -> Ingested:
    """Write rows in batches."""
    with Ingest(folder, address={}, units=UNITS, extra={"likes": "integer"}, **limits) as work:
        for name in UNITS:
            if work.is_done(name):
                continue
            with work.unit(name) as unit:
                mine = [(period, row) for of, period, row in rows if of == name]
                for start in range(0, len(mine), batch):
                    for period in ("2012", "2010", "2011"):
                        unit.add_rows(period, [row for p, row in mine[start : start + batch] if p == period])
        return work.finish(STAGES, {"note": 1})


def contents(found: Ingested) -> list[list[tuple[Any, ...]]]:
    """Per stage what is read."""
    return [
        [
            (row["id"], row["text"], row["likes"], row["change"])
            for part in range(found.n_parts(stage.index))
            for batch in found.batches(stage.index, part)
            for row in batch.to_pylist()
        ]
        for stage in found.stages()
    ]


def test_versions_changes_and_order_are_those_of_the_model(tmp_path: Path) -> None:
    rows = rows_of()
    found = written(tmp_path / "a", rows)
    assert contents(found) == expected(rows)
    for stage, model in zip(found.manifest["stages"], expected(rows), strict=True):
        kinds = [row[3] for row in model]
        assert [stage[k] for k in ("new", "changed", "unchanged")] == [
            kinds.count(k) for k in ("new", "changed", "unchanged")
        ]
        assert stage["rows"] == len(model) + stage["copies"] + stage["older_versions"]
    assert sum(s["copies"] for s in found.manifest["stages"]) > 5
    assert [s.name for s in found.stages()] == ["2010", "2011", "2012"]


@pytest.mark.parametrize(
    ("batch", "limits"),
    [(1, {}), (100, {}), (7, {"buffer_bytes": 1000}), (3, {"part_bytes": 300}), (50, {"buffer_bytes": 1})],
)
def test_neither_batches_nor_memory_change_what_is_read(tmp_path: Path, batch: int, limits: dict[str, int]) -> None:
    rows = rows_of()
    found = written(tmp_path / "a", rows, batch, **limits)
    assert contents(found) == expected(rows)
    if limits:
        assert sum(found.n_parts(s.index) for s in found.stages()) > 6


def test_the_same_input_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (written(tmp_path / name, rows_of(), buffer_bytes=2000) for name in "ab")
    assert first.manifest == second.manifest


def test_ids_in_ranges_of_their_hashes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUCKET_ROWS", 23)
    assert contents(written(tmp_path / "a", rows_of())) == expected(rows_of())


def test_periods_join_into_a_stage(tmp_path: Path) -> None:
    rows = rows_of()
    with Ingest(tmp_path / "a", address={}, units=("u",)) as work:
        with work.unit("u") as unit:
            for _, period, row in rows:
                unit.add_rows(period, [row])
        counts = work.periods()
        done = work.finish([StagePlan(name="all", start="2010-01-01", end="2012-12-31", periods=("2010", "2012"))])
    assert {p: c["documents"] for p, c in counts.items()} == {
        s.name: len(model) for s, model in zip(STAGES, expected(rows), strict=True)
    }
    ids = [d.id for part in range(done.n_parts(0)) for d in done.documents(0, part)]
    assert sorted(ids) == sorted({row["id"] for _, period, row in rows if period != "2011"})


def test_a_cut_unit_is_done_again_and_a_finished_one_is_not(tmp_path: Path) -> None:
    rows = rows_of()
    whole = written(tmp_path / "whole", rows, buffer_bytes=1500)
    folder = tmp_path / "cut"

    class Cut(Exception):
        pass

    with (
        pytest.raises(Cut),
        Ingest(folder, address={}, units=UNITS, extra={"likes": "integer"}, buffer_bytes=1500) as work,
    ):
        for name in UNITS:
            with work.unit(name) as unit:
                for i, (of, period, row) in enumerate(rows):
                    if of == name:
                        unit.add_rows(period, [row])
                    if name == "second" and i == 290:
                        raise Cut
    assert list(folder.glob("period=*/part-0001-*")), "the cut unit had written parts"
    assert not (folder / "manifest.json").exists()
    with pytest.raises(NotFoundError):
        Ingested(folder)
    before = {p: p.stat().st_mtime_ns for p in folder.glob("period=*/part-0000-*")}
    found = written(folder, rows, 1, buffer_bytes=1500)
    assert contents(found) == contents(whole)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("period=*/part-0000-*")} == before
    found.check()


def test_other_units_in_the_folder_are_begun_anew(tmp_path: Path) -> None:
    with Ingest(tmp_path / "a", address={}, units=("old",)) as work, work.unit("old") as unit:
        unit.add_rows("2010", [{"id": "x", "text": "x", "date": "2010-01-01", "group": "g"}])
    found = written(tmp_path / "a", rows_of())
    assert contents(found) == expected(rows_of())


def test_what_is_refused_is_counted_over_units(tmp_path: Path) -> None:
    row = {"id": "x", "text": "x", "date": "2010-01-01", "group": "g"}
    with Ingest(tmp_path / "a", address={}, units=UNITS) as work:
        for name in UNITS:
            with work.unit(name) as unit:
                unit.add_rows("2010", [row])
                unit.refuse("empty", 2, first=f"{name} row 3")
                unit.refuse("empty", 1, first="later")
                unit.refuse("other", 0, first="never")
                unit.count("seen", 5)
        done = work.finish(STAGES[:1])
    assert done.manifest["refused"] == {"empty": {"count": 6, "first": "first row 3"}}
    assert done.manifest["counts"] == {"documents": 2, "seen": 10}


def test_damage_is_found(tmp_path: Path) -> None:
    found = written(tmp_path / "a", rows_of())
    path = found.folder / found.manifest["stages"][1]["parts"][0]["path"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="damaged"):
        found.check()
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        list(found.batches(1, 0))


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one name"):
        Ingest(tmp_path / "a", address={}, units=("u", "u"))
    with Ingest(tmp_path / "a", address={}, units=UNITS) as work:
        with pytest.raises(ConfigError, match="was not ingested"):
            work.finish(STAGES[:1])
        with work.unit("first") as unit:
            with pytest.raises(ConfigError, match="label"):
                unit.add_rows("../up", [{"id": "x", "text": "x", "date": "2010-01-01", "group": "g"}])
            with pytest.raises(ConfigError, match="without date, group"):
                unit.add("2010", pa.RecordBatch.from_pydict({"id": ["x"], "text": ["x"]}))
        with work.unit("second"):
            pass
        with pytest.raises(ConfigError, match="stage 2010 has no documents"):
            work.finish(STAGES[:1])


def test_a_full_disk_is_one_line_and_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a real full disk is checked by ``tests/command_line/test_stream_build.py``."""
    import pyarrow.parquet as pq

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(ClbenchError, match="disk is full"):
            written(tmp_path / "a", rows_of())
    assert not (tmp_path / "a" / "manifest.json").exists()
    assert contents(written(tmp_path / "a", rows_of())) == expected(rows_of())


def test_hashes_are_those_that_split() -> None:
    texts = ["", "a", "page/1", "ü" * 1000]
    array = pa.array(["x", *texts, "y"]).slice(1, 4)
    assert text_hashes(array).tolist() == [identity_hash(text) for text in texts]
    assert text_hashes(array).dtype == np.uint64
