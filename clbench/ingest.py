"""Dated documents that came from outside, set down once by period: in bounded memory, whole or resumable.

A source brings documents in any order (the rows of a 10 GB file are not sorted by date). ``Ingest`` keeps a buffer
per period, writes Parquet parts of bounded size when memory is used up, and goes on after a kill with the first *unit*
(an input file, a share of one, a month of a hub data set) that is not finished. ``finish`` joins periods into stages,
settles which row of an id counts and how it changed, and writes the manifest, last. ``Ingested`` reads the folder.

    period=2013/part-0000-0000.parquet ...     COLUMNS, extra columns and INDEX_COLUMNS; named by unit and number
    units/0000.json                            what a finished unit wrote and refused
    verdicts/00.npy                            per row of a stage: superseded, new, changed or unchanged
    manifest.json                              stages, parts with rows, bytes and sha256, report; its presence: complete

What a row means, what is refused and where periods begin is left to the source (``documents``, ``hub``).
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import (
    atomic_path,
    digest_of,
    exclusive,
    explain_os_errors,
    fsync,
    read_json,
    sha256_bytes,
    sha256_file,
    write_json,
)
from clbench.stream import Change, Document, StageInfo

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
COLUMNS = ("id", "text", "date", "group")
INDEX_COLUMNS = ("when", "id_hash", "text_hash")
"""What ``finish`` reads of every row: what orders versions, and 64 bits of the SHA-256 of id and text."""
VERDICTS: tuple[str, ...] = ("superseded", "new", "changed", "unchanged")
BUFFER_BYTES = 256 << 20
PART_BYTES = 64 << 20
BUCKET_ROWS = 4 << 20
"""Index rows that are sorted at once in ``finish``: about 60 bytes each."""
ROW_GROUP_ROWS = 8192
LOCK_SECONDS = 3600.0
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

ExtraType = Literal["text", "number", "integer"]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage to be: its name, its dates (inclusive) and the periods that it is made of, in order."""

    name: str
    start: str
    end: str
    periods: tuple[str, ...]


@dataclass
class UnitRecord:
    """What one unit wrote and refused, as ``units/0000.json`` holds it."""

    name: str
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Per part: period, path, rows, bytes (of text), sha256."""
    counts: Counter[str] = field(default_factory=Counter)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> how many (``count``) and the ``first`` one."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Whatever else the source wants to know about a finished unit."""


def ingest_folder(root: Path, name: str, address: Mapping[str, Any]) -> Path:
    """Return the folder of an ingest: ``NAME-DIGEST`` under ``root``."""
    return root / f"{name}-{digest_of(dict(address))[:12]}"


class Ingest:
    """Writes one folder. Use it as a context: it holds the folder's lock, and removes what a kill left half-done.

    Args:
        folder: see ``ingest_folder``; another address belongs into another folder.
        address: everything that decides the documents, JSON-able; it stands in the manifest.
        units: names of the pieces of work, in order; the order decides the order of documents.
        extra: further columns and their types, for sources that need them (a popularity count, a label).
        buffer_bytes: text that may wait in memory.
        part_bytes: text of one part.

    Raises:
        BusyError: another process has been writing here for an hour.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: Mapping[str, Any],
        units: Sequence[str],
        extra: Mapping[str, ExtraType] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        if len(set(units)) < len(units):
            raise ConfigError("two units of an ingest have one name", where=folder, mend="give each its own")
        self.folder, self.address, self.units = folder, dict(address), tuple(units)
        self.extra, self.buffer_bytes, self.part_bytes = dict(extra or {}), buffer_bytes, part_bytes
        self._context = ExitStack()

    def __enter__(self) -> Self:
        lock = self.folder.parent / ".locks" / self.folder.name
        mend = "wait for it to end, or end it"
        self._context.enter_context(exclusive(lock, mend=mend, timeout_seconds=LOCK_SECONDS))
        try:
            self._begin()
        except BaseException:
            self._context.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.close()

    def complete(self) -> Ingested | None:
        """Return the finished ingest if there is one."""
        return Ingested(self.folder) if (self.folder / "manifest.json").is_file() else None

    def is_done(self, unit: str) -> bool:
        """Tell whether a unit was finished, now or before a kill."""
        return self._record_path(unit).is_file()

    @contextmanager
    def unit(self, name: str) -> Iterator[Unit]:
        """Yield what a unit's documents are added to; it counts as finished when the block ends without an error.

        Several processes may each work at a unit of their own, under one lock holder; give each a share of the buffer.
        """
        index = self.units.index(name)
        self._remove_parts(index)
        unit = Unit(self, index)
        yield unit
        unit.flush()
        for part in unit.record.parts:
            fsync(self.folder / part["path"])
        write_json(self._record_path(name), vars(unit.record))

    def record(self, unit: str) -> UnitRecord:
        """Return what a finished unit wrote and refused."""
        found = read_json(self._record_path(unit))
        return UnitRecord(**{**found, "counts": Counter(found["counts"])})

    def periods(self) -> dict[str, dict[str, int]]:
        """Return, per period in order of its label, ``rows``, ``bytes`` and ``documents`` (distinct ids)."""
        parts = self._parts()
        found = {}
        for period in sorted(parts):
            rows = sum(part["rows"] for part in parts[period])
            verdicts = _judge([[self.folder / part["path"] for part in parts[period]]], [rows])[0]
            found[period] = {
                "rows": rows,
                "bytes": sum(part["bytes"] for part in parts[period]),
                "documents": int(np.count_nonzero(verdicts[0])),
            }
        return found

    def finish(self, stages: Sequence[StagePlan], report: Mapping[str, Any] | None = None) -> Ingested:
        """Join periods into stages, decide every row's verdict, and write the manifest.

        Of several rows of one id in a stage the one with the greatest ``when`` counts, of equal ones the last. Its
        change kind compares its text with the last stage before that has the id. Periods in no stage are left out.

        Raises:
            ConfigError: a unit is not finished, or a stage has no rows.
        """
        if open_units := [unit for unit in self.units if not self.is_done(unit)]:
            raise ConfigError(f"unit {open_units[0]} was not ingested", where=self.folder, mend="ingest every unit")
        by_period = self._parts()
        parts = [[part for period in stage.periods for part in by_period.get(period, [])] for stage in stages]
        for stage, found in zip(stages, parts, strict=True):
            if not found:
                raise ConfigError(f"stage {stage.name} has no documents", where=self.folder, mend="leave it out")
        rows = [sum(part["rows"] for part in found) for found in parts]
        verdicts, copies = _judge([[self.folder / part["path"] for part in found] for found in parts], rows)
        entries = [
            self._stage_entry(index, stage, parts[index], verdicts[index], copies[index])
            for index, stage in enumerate(stages)
        ]
        manifest = {
            "format": FORMAT,
            "address": self.address,
            "extra": self.extra,
            "stages": entries,
            "refused": self.refused(),
            "counts": dict(self.counts()),
            "report": dict(report or {}),
        }
        write_json(self.folder / "manifest.json", manifest)
        return Ingested(self.folder)

    def discard(self) -> None:
        """Delete what was written, where a source finds that its input cannot be used."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def counts(self) -> Counter[str]:
        """Return what the finished units counted."""
        return sum((self.record(unit).counts for unit in self.units if self.is_done(unit)), Counter[str]())

    def refused(self) -> dict[str, dict[str, Any]]:
        """Return kind -> ``count`` and ``first`` over all finished units."""
        total: dict[str, dict[str, Any]] = {}
        for unit in self.units:
            if not self.is_done(unit):
                continue
            for kind, found in self.record(unit).refused.items():
                before = total.setdefault(kind, {"count": 0, "first": found["first"]})
                before["count"] += found["count"]
        return dict(sorted(total.items()))

    def _begin(self) -> None:
        """Make the folder and remove the parts of units that were cut; begin anew where the units are others."""
        if self.complete() is not None:
            return
        with explain_os_errors(self.folder):
            (self.folder / "units").mkdir(parents=True, exist_ok=True)
        plan = {
            "format": FORMAT,
            "address": self.address,
            "units": list(self.units),
            "extra": self.extra,
            "part_bytes": self.part_bytes,
        }
        path = self.folder / "units" / "plan.json"
        if path.is_file() and read_json(path) != plan:  # the same content in other files: units cannot be taken over
            self.discard()
        write_json(path, plan)
        for leftover in (*self.folder.rglob(".*.tmp"),):
            leftover.unlink(missing_ok=True)
        for unit, name in enumerate(self.units):
            if not self.is_done(name):
                self._remove_parts(unit)

    def _remove_parts(self, unit: int) -> None:
        for path in self.folder.glob(f"period=*/part-{unit:04d}-*.parquet"):
            path.unlink()

    def _record_path(self, unit: str) -> Path:
        return self.folder / "units" / f"{self.units.index(unit):04d}.json"

    def _parts(self) -> dict[str, list[dict[str, Any]]]:
        """Return period -> parts of all finished units, in order."""
        found: dict[str, list[dict[str, Any]]] = {}
        for unit in self.units:
            for part in self.record(unit).parts if self.is_done(unit) else []:
                found.setdefault(part["period"], []).append(part)
        return found

    def _stage_entry(
        self,
        index: int,
        stage: StagePlan,
        parts: list[dict[str, Any]],
        verdicts: NDArray[np.uint8],
        n_copies: int,
    ) -> dict[str, Any]:
        """Write a stage's verdicts and return its manifest entry."""
        path = self.folder / "verdicts" / f"{index:02d}.npy"
        content = BytesIO()
        np.lib.format.write_array(content, verdicts, version=(1, 0), allow_pickle=False)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content.getvalue())
        counts = np.bincount(verdicts, minlength=len(VERDICTS))
        return {
            "index": index,
            "name": stage.name,
            "start": stage.start,
            "end": stage.end,
            "periods": list(stage.periods),
            "rows": len(verdicts),
            "documents": int(counts[1:].sum()),
            **{name: int(count) for name, count in zip(VERDICTS[1:], counts[1:], strict=True)},
            "copies": n_copies,
            "older_versions": int(counts[0]) - n_copies,
            "parts": [{k: part[k] for k in ("path", "rows", "bytes", "sha256")} for part in parts],
            "verdicts": {"path": f"verdicts/{index:02d}.npy", "sha256": sha256_bytes(content.getvalue())},
        }


class Unit:
    """Takes the documents of one unit; made by ``Ingest.unit``."""

    def __init__(self, ingest: Ingest, index: int) -> None:
        self.ingest, self.index = ingest, index
        self.record = UnitRecord(name=ingest.units[index])
        self._waiting: dict[str, list[pa.RecordBatch]] = {}
        self._bytes: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()

    def add(self, period: str, rows: pa.RecordBatch) -> None:
        """Add documents of one period: COLUMNS (text, ISO-8601 dates), the extra columns, and perhaps ``when`` (int64).

        The batch must own its memory: pass a ``take`` or ``filter`` of a larger one, not a slice.

        Raises:
            ConfigError: the period's label cannot be a folder's name, or a column is missing.
        """
        if not rows.num_rows:
            return
        if not _LABEL.fullmatch(period):
            raise ConfigError(f"{period!r} cannot be a period's label", mend="use letters, digits, '-', '_' and '.'")
        batch = _indexed(rows, self.ingest.extra)
        self._waiting.setdefault(period, []).append(batch)
        self._bytes[period] += batch.nbytes
        self.record.counts["documents"] += batch.num_rows
        while self._bytes[period] >= self.ingest.part_bytes:
            self._write(period)
        while self._bytes.total() > self.ingest.buffer_bytes:
            # The largest goes first, the earlier of equal ones: fewest parts, and the same ones every time.
            self._write(max(sorted(self._bytes), key=lambda label: self._bytes[label]))

    def add_rows(self, period: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add documents given as dictionaries; for sources that filter row by row."""
        import pyarrow as pa

        names = [*COLUMNS, *self.ingest.extra, *(["when"] if rows and "when" in rows[0] else [])]
        types = _types(self.ingest.extra)
        arrays = [pa.array([row[name] for row in rows], types[name]) for name in names]
        self.add(period, pa.RecordBatch.from_arrays(arrays, names=names))

    def refuse(self, kind: str, n: int = 1, *, first: str = "") -> None:
        """Count rows that were left out, with where the first of them stands."""
        if n:
            self.record.refused.setdefault(kind, {"count": 0, "first": first})["count"] += n

    def count(self, what: str, n: int = 1) -> None:
        """Count anything else."""
        self.record.counts[what] += n

    def flush(self) -> None:
        """Write everything that waits."""
        for period in sorted(self._waiting):
            while self._bytes[period]:
                self._write(period)

    def _write(self, period: str) -> None:
        """Write one part: what waits for a period, up to the size of a part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        waiting, size = self._waiting[period], 0
        take = 0
        while take < len(waiting) and size < self.ingest.part_bytes:
            size += waiting[take].nbytes
            take += 1
        table = pa.Table.from_batches(waiting[:take])
        del waiting[:take]
        self._bytes[period] -= size
        if not self._bytes[period]:
            del self._waiting[period], self._bytes[period]
        name = f"period={period}/part-{self.index:04d}-{self._numbers[period]:04d}.parquet"
        self._numbers[period] += 1
        path = self.ingest.folder / name
        with explain_os_errors(path):
            path.parent.mkdir(exist_ok=True)
            pq.write_table(
                table,
                path,
                compression="zstd",
                compression_level=1,
                row_group_size=ROW_GROUP_ROWS,
                use_dictionary=["group"],
                write_statistics=False,
                store_schema=False,
            )
        self.record.parts.append(
            {
                "period": period,
                "path": name,
                "rows": table.num_rows,
                "bytes": _text_bytes(table.column("text")),
                "sha256": sha256_file(path),
            }
        )


class Ingested:
    """A finished ingest, read-only.

    Raises:
        NotFoundError: there is none in this folder.
        IntegrityError: it has another format.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "manifest.json"
        if not path.is_file():
            raise NotFoundError("no complete ingest here", where=folder, mend="prepare the stream again")
        self.folder = folder
        self.manifest: dict[str, Any] = read_json(path)
        if self.manifest.get("format") != FORMAT:
            raise IntegrityError("made by another version of clbench", where=path, mend=f"delete {folder}")
        self.extra: tuple[str, ...] = tuple(self.manifest["extra"])

    def stages(self) -> list[StageInfo]:
        """Return the stages in order."""
        return [StageInfo(**{k: s[k] for k in ("index", "name", "start", "end")}) for s in self.manifest["stages"]]

    def n_parts(self, stage: int) -> int:
        """Return the number of parts of a stage."""
        return len(self.manifest["stages"][stage]["parts"])

    def batches(self, stage: int, part: int) -> Iterator[pa.RecordBatch]:
        """Yield a part's documents in batches: COLUMNS, ``change`` and the extra columns; superseded rows left out.

        Raises:
            IntegrityError: a file is missing or has another number of rows than the manifest says.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        entry = self.manifest["stages"][stage]
        starts = [0, *accumulate(p["rows"] for p in entry["parts"])]
        verdicts = np.load(self.folder / entry["verdicts"]["path"], mmap_mode="r", allow_pickle=False)
        verdicts = verdicts[starts[part] : starts[part + 1]]
        kinds = pa.array(VERDICTS)
        path = self.folder / entry["parts"][part]["path"]
        if not path.is_file():
            raise IntegrityError("a part of the ingest is missing", where=path, mend=f"delete {self.folder}")
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != len(verdicts):
                raise IntegrityError("not the part that its manifest lists", where=path, mend=f"delete {self.folder}")
            at = 0
            for batch in file.iter_batches(batch_size=1024, columns=[*COLUMNS, *self.extra]):
                found = np.asarray(verdicts[at : at + batch.num_rows])
                at += batch.num_rows
                yield batch.append_column("change", kinds.take(pa.array(found))).filter(pa.array(found > 0))

    def documents(self, stage: int, part: int) -> Iterator[Document]:
        """Yield a part's documents."""
        for batch in self.batches(stage, part):
            columns = [batch.column(name).to_pylist() for name in (*COLUMNS, "change")]
            for identity, text, date, group, change in zip(*columns, strict=True):
                kind: Change = change
                yield Document(id=identity, text=text, date=date, group=group, change=kind)

    def check(self) -> None:
        """Compare every file with its sha256.

        Raises:
            IntegrityError: one is missing or differs.
        """
        for stage in self.manifest["stages"]:
            for file in (*stage["parts"], stage["verdicts"]):
                path = self.folder / file["path"]
                if not path.is_file() or sha256_file(path) != file["sha256"]:
                    raise IntegrityError(
                        "a file of the ingest is missing or damaged",
                        where=path,
                        mend=f"delete {self.folder} and prepare the stream again",
                    )

    def remove(self) -> None:
        """Delete the folder: a built stream does not need it."""
        (self.folder / "manifest.json").unlink()
        shutil.rmtree(self.folder)


def _types(extra: Mapping[str, ExtraType]) -> dict[str, pa.DataType]:
    """Return the type of every column that a part may have."""
    import pyarrow as pa

    of = {"text": pa.string(), "number": pa.float64(), "integer": pa.int64()}
    return {
        **dict.fromkeys(COLUMNS, pa.string()),
        **{name: of[kind] for name, kind in extra.items()},
        "when": pa.int64(),
    }


def _indexed(rows: pa.RecordBatch, extra: Mapping[str, ExtraType]) -> pa.RecordBatch:
    """Return rows with the columns of a part, in order, each of its type."""
    import pyarrow as pa

    missing = {*COLUMNS, *extra} - set(rows.schema.names)
    if missing:
        raise ConfigError(f"documents come without {', '.join(sorted(missing))}", mend="add the column")
    types = _types(extra)
    names = [*COLUMNS, *extra]
    arrays = [rows.column(name).cast(types[name]) for name in names]
    has_when = "when" in rows.schema.names
    arrays.append(rows.column("when").cast(pa.int64()) if has_when else pa.array(np.zeros(rows.num_rows, np.int64)))
    arrays += [pa.array(text_hashes(rows.column(name).cast(pa.string()))) for name in ("id", "text")]
    return pa.RecordBatch.from_arrays(arrays, names=[*names, *INDEX_COLUMNS])


def text_digests(texts: pa.Array) -> list[bytes]:
    """Return the SHA-256 of the UTF-8 bytes of every text, read where they lie in memory."""
    offsets, data = _buffers(texts)
    sha256 = hashlib.sha256
    return [sha256(data[a:b]).digest() for a, b in pairwise(offsets)]


def text_hashes(texts: pa.Array) -> NDArray[np.uint64]:
    """Return the first 64 bits of those digests, shape ``[n]``; of an id they are ``clbench.parts.identity_hash``."""
    joined = b"".join(digest[:8] for digest in text_digests(texts))
    return np.frombuffer(joined, ">u8").astype(np.uint64)


def _buffers(texts: pa.Array) -> tuple[list[int], memoryview]:
    """Return where every text begins and ends, and the bytes, of a string array without nulls."""
    _, offsets, data = texts.buffers()
    first = np.frombuffer(offsets, np.int32, count=len(texts) + 1, offset=4 * texts.offset)
    return first.tolist(), memoryview(data) if data is not None else memoryview(b"")


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Return the UTF-8 bytes of a column."""
    import pyarrow.compute as pc

    return int(pc.sum(pc.binary_length(column)).as_py() or 0)


def _judge(stages: Sequence[Sequence[Path]], rows: Sequence[int]) -> tuple[list[NDArray[np.uint8]], list[int]]:
    """Return every row's verdict per stage (see VERDICTS), and per stage how many superseded rows repeat the text.

    Ids are taken in ranges of their hashes, so that memory does not grow with the number of documents.
    """
    starts = [0, *accumulate(rows)]
    verdicts = np.zeros(starts[-1], np.uint8)
    copies = np.zeros(len(stages), np.int64)
    n_buckets = max(1, math.ceil(starts[-1] / BUCKET_ROWS))
    edges = [(bucket << 64) // n_buckets for bucket in range(n_buckets + 1)]
    for low, high in pairwise(edges):
        row, stage, when, identity, text = _index_rows(stages, starts, low, high)
        if not len(row):
            continue
        order = np.lexsort((row, when, stage, identity))
        row, stage, identity, text = row[order], stage[order], identity[order], text[order]
        same = identity[1:] == identity[:-1]
        counts = np.append(~(same & (stage[1:] == stage[:-1])), True)  # the last row of an id in a stage
        at = np.flatnonzero(counts)
        known = np.append(False, identity[at[1:]] == identity[at[:-1]])
        equal = np.append(False, text[at[1:]] == text[at[:-1]])
        verdicts[row[at]] = np.where(known, np.where(equal, 3, 2), 1)
        lost = np.flatnonzero(~counts)
        winner = at[np.searchsorted(at, lost)]
        copies += np.bincount(stage[lost[text[lost] == text[winner]]], minlength=len(stages))
    return [verdicts[a:b] for a, b in pairwise(starts)], copies.tolist()


def _index_rows(
    stages: Sequence[Sequence[Path]], starts: Sequence[int], low: int, high: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Return number, stage, when, id hash and text hash of the rows whose id hash lies in ``[low, high)``."""
    import pyarrow.parquet as pq

    found: list[tuple[NDArray[Any], ...]] = []
    for stage, paths in enumerate(stages):
        at = starts[stage]
        for path in paths:
            table = pq.read_table(path, columns=list(INDEX_COLUMNS), partitioning=None, use_threads=False)
            when, identity, text = (table.column(name).to_numpy() for name in INDEX_COLUMNS)
            row = np.arange(at, at + len(when), dtype=np.int64)
            at += len(when)
            mask = (identity >= np.uint64(low)) & (identity <= np.uint64(high - 1))
            found.append((row[mask], np.full(int(mask.sum()), stage, np.int32), when[mask], identity[mask], text[mask]))
    row, of, when, identity, text = (np.concatenate(column) for column in zip(*found, strict=True))
    return row, of, when, identity, text
