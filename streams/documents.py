"""``documents``: any Parquet, JSON lines, CSV or folder of text files with a date (or order) column, as a stream.

``clbench stream build --from FILE`` looks at the columns, shows a guess and makes a specification of it. The rows are
read once and set down by period in bounded memory (``clbench.ingest``); whatever is left out is counted, with the first
place where it happened. How files, dates and periods are read: ``_inputs``, ``_readers``, ``_dates``, ``_periods``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench import console, home
from clbench.errors import ConfigError, IntegrityError
from clbench.files import digest_of
from clbench.ingest import BUFFER_BYTES, Ingest, Ingested, StagePlan, Unit, ingest_folder, text_digests
from clbench.stream import Document, StageInfo, StreamSource
from clbench.streams import _dates, _periods
from clbench.streams._inputs import Inputs, find_inputs, pieces, sha256_of
from clbench.streams._readers import ReadRules, Rows, read_piece
from clbench.streams._survey import Survey, survey
from clbench.workers import default_workers, run_tasks

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
"""Raise it when the same files and options would give other documents."""
MAX_WORKERS = 4
"""Memory is shared out among them: each needs some 200 MB besides its part of the buffer."""
NO_GROUP = "documents"
KEPT = "kept: "
"""Begins the kinds of rows that were mended and kept."""
OUTSIDE = "outside start and end"
_REMOVED = (("NUL characters removed", "\0", r"\x00"), ("byte order marks removed", "\ufeff", r"\x{feff}"))
"""Found by a regular expression: for one character it is twenty times as fast as the search for a text."""
_NO_WHITE_SPACE = r"[^\s\p{Z}\x{feff}\x{200b}]"


class Documents(StreamSource):
    """Your own documents from Parquet, JSON lines, CSV or text files, one stage per period."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """A docstring under each field is its help text."""

        path: str
        """A file, a folder, or a pattern such as posts/*.parquet; .gz and .zst are unpacked."""
        text: str | None = None
        """Column of the text; a dotted path where it is nested (body.content)."""
        date: str | None = None
        """Column of the date. Of text files: path_date, front.KEY or modified."""
        order: str | None = None
        """Column of numbers that order the documents where there is no date, or instead of it."""
        id: str | None = None
        """Column that all versions of one document share; none: equal texts are one document."""
        group: str | None = None
        """Column of the site, author or other origin; none: all are one group."""
        every: str = "year"
        """year, quarter, month, week, day, or a number of equal parts; of an order column also value."""
        dateformat: str | None = None
        """How dates read: dmy, mdy, year, ymd8, epoch_s, epoch_ms, epoch_us, epoch_ns, or a format such as %d.%m.%Y."""
        timezone: str = "UTC"
        """Of times that name no zone. Stages are in UTC."""
        start: str | None = None
        """Leave out what is before this day."""
        end: str | None = None
        """Leave out what is after this day."""
        earliest: str = "1900-01-01"
        """A date before it is an error in the data."""
        latest: str = "2100-12-31"
        """A date after it is an error in the data; `clbench stream build` sets it to the day of the build."""
        epoch_zero: bool = False
        """Take 1970-01-01T00:00:00 for a date, not for an error in the data."""
        min_chars: int = 1
        """Leave out shorter texts."""
        encoding: str = "utf-8"
        """Of JSON lines, CSV and text files."""
        undecodable: str = "drop"
        """What happens to rows with bytes that are not of the encoding: drop, or replace (by U+FFFD)."""
        separator: str | None = None
        """Of CSV: a character, or tab, comma, semicolon, pipe; none: as the first rows say."""
        format: str | None = None
        """parquet, jsonl, csv or text; none: as the names of the files say."""
        small: str = "merge"
        """What happens to a period of fewer documents than min_documents: merge (with the next), drop or refuse."""
        min_documents: int = 50
        """Of a stage, so that it has documents to train on and held-out ones."""
        max_dropped: float = 0.5
        """Refuse the input when a larger share of its rows cannot be used."""
        sha256: str | None = None
        """Digest of the input; where it is given, the built stream is found without the files."""

    name = "documents"

    def __init__(self, options: Documents.Options) -> None:
        super().__init__(options)
        _check(options)
        self._ingested: Ingested | None = None
        self._pinned: str | None = options.sha256

    @staticmethod
    def survey(options: Documents.Options, given: Sequence[str] = ()) -> Survey:
        """Look at the first rows; guess the columns that are neither set nor among ``given``.

        Raises:
            ConfigError, NotFoundError, IntegrityError: the input cannot be used; says why.
        """
        chosen = {
            role: getattr(options, role)
            for role in ("text", "date", "order", "id", "group")
            if getattr(options, role) is not None or role in given
        }
        inputs = find_inputs(options.path, options.format)
        return survey(inputs, _read_rules(options), chosen)

    def settings(self) -> dict[str, Any]:
        """Return the digest of the files and the options; not where the files lie."""
        chosen = {key: value for key, value in asdict(self.options).items() if key not in ("path", "sha256")}
        return {"version": VERSION, "input": self.input_digest(), **chosen}

    def input_digest(self) -> str:
        """Return the digest of the files' content, or the pinned one."""
        if self._pinned is None:
            inputs = find_inputs(self.options.path, self.options.format)
            with _bar("reading the files' digests", _size_of(inputs)) as advance:
                self._pinned = _digest(inputs, self.options, advance)
        return self._pinned

    def fetch(self) -> None:
        """Read the files and set the documents down by period; a file that is done is not read again after a kill.

        Raises:
            ConfigError: columns are not named, too many rows cannot be used, or the periods do not do.
            IntegrityError: a file is damaged, or not the one that ``sha256`` pins.
        """
        folder = self._folder()
        if (folder / "manifest.json").is_file():
            return
        inputs = find_inputs(self.options.path, self.options.format)
        self._check_pin(inputs)
        self._check_named(inputs)
        shares = pieces(inputs)
        with Ingest(folder, address=self.settings(), units=[share["name"] for share in shares]) as ingest:
            if ingest.complete() is not None:
                return
            cuts = self._cuts(inputs, shares)
            self._read(ingest, shares, cuts)
            try:
                self._finish(ingest)
            except ConfigError:
                ingest.discard()
                raise

    def scan(self) -> dict[str, Any]:
        """Read everything and write nothing; return the report that ``fetch`` would leave, stages by row."""
        inputs = find_inputs(self.options.path, self.options.format)
        self._check_named(inputs)
        shares = pieces(inputs)
        cuts = self._cuts(inputs, shares)
        tally = Tally()
        found: Counter[str] = Counter()
        with _bar("reading", _size_of(inputs)) as advance:
            for share in shares:
                for label, rows in documents_of(self.options, inputs, share, cuts, tally, advance):
                    found[label] += rows.num_rows
        report = _report(tally.counts, tally.refused)
        _check_share(report, self.options.max_dropped)
        periods = [_periods.Found(tally.ranges[x][0], x, found[x], *tally.ranges[x][1:]) for x in sorted(found)]
        stages, notes = self._plan(periods)
        rows = [{"name": s.name, "rows": sum(found[label] for label in s.periods)} for s in stages]
        return report | notes | {"stages": rows}

    def report(self) -> dict[str, Any]:
        """Return what was read, kept, mended and left out, and the stages; after ``fetch``."""
        manifest = self._open().manifest
        keys = ("name", "start", "end", "rows", "documents", "new", "changed", "unchanged", "copies", "older_versions")
        return {
            **manifest["report"],
            "stages": [{key: stage[key] for key in keys} for stage in manifest["stages"]],
        }

    def stages(self) -> list[StageInfo]:
        """Return the stages; after ``fetch``."""
        return self._open().stages()

    def n_parts(self, stage: int) -> int:
        """Return into how many parts a stage falls."""
        return self._open().n_parts(stage)

    def part(self, stage: int, part: int) -> Iterator[Document]:
        """Yield the documents of a part, in the order of the files."""
        found = self._open().documents(stage, part)
        if self.options.date is not None:
            return found
        start = self.stages()[stage].start  # what has no date is given its stage's
        return (replace(document, date=start) for document in found)

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield the documents of a stage, in the order of the files."""
        for part in range(self.n_parts(stage)):
            yield from self.part(stage, part)

    def ingested(self) -> Path:
        """Return the folder that holds the documents by period; it may be deleted once the stream is built."""
        return self._folder()

    def _folder(self) -> Path:
        return ingest_folder(home.sources_folder(), "documents", self.settings())

    def _open(self) -> Ingested:
        if self._ingested is None:
            self._ingested = Ingested(self._folder())
        return self._ingested

    def _check_pin(self, inputs: Inputs) -> None:
        """Refuse files that are not the pinned ones."""
        if self.options.sha256 is None:
            return
        with _bar("checking the files", _size_of(inputs)) as advance:
            now = _digest(inputs, self.options, advance)
        if now != self.options.sha256:
            raise IntegrityError(
                "the documents are not those that this stream was made of",
                where=self.options.path,
                mend="bring the old files back, or make a new stream with `clbench stream build`",
            )

    def _check_named(self, inputs: Inputs) -> None:
        """Refuse to guess: say which columns there are, and which would do."""
        options = self.options
        if options.text is not None and (options.date or options.order):
            self._check_numbers(inputs)
            return
        found = self.survey(options)
        missing = [f"{role}={column}" for role, column in found.guess.items() if column and not getattr(options, role)]
        raise ConfigError(
            "the columns of text and date are not named",
            where=options.path,
            mend=f"if this is right, say {', '.join(missing)}; there are {', '.join(found.columns)}",
        )

    def _check_numbers(self, inputs: Inputs) -> None:
        """Refuse to guess what numbers in a date column mean, before a long reading."""
        options = self.options
        if options.date is None or options.dateformat is not None:
            return
        given = {role: getattr(options, role) for role in ("text", "date", "id", "group")}
        found = survey(inputs, _read_rules(options), given)
        if found.layout is not None and found.layout.layout != "text":
            raise ConfigError(
                f"the dates look like {found.layout.words}",
                where=f"column {options.date}, for example {', '.join(found.examples(options.date, 2))}",
                mend=f"if this is right, say dateformat={found.layout.layout}",
            )

    def _cuts(self, inputs: Inputs, shares: Sequence[Mapping[str, Any]]) -> list[int] | None:
        """Return where equal parts are cut; this reads the dates of the whole input once."""
        options = self.options
        if not options.every.isdecimal():
            return None
        values = []
        with _bar("reading dates", _size_of(inputs)) as advance:
            for share in shares:
                values += [micros for micros in moments_of(options, inputs, share, advance) if len(micros)]
        cuts = _periods.cuts_of(np.concatenate(values) if values else np.zeros(0, np.int64), int(options.every))
        return [int(cut) for cut in cuts]

    def _read(self, ingest: Ingest, shares: Sequence[Mapping[str, Any]], cuts: list[int] | None) -> None:
        """Run every share of work that is not done, in several processes if there are several."""
        n_workers = min(default_workers(), MAX_WORKERS, len(shares))
        tasks: list[dict[str, Any]] = [
            {
                "do": f"reading {share['name']}",
                "options": asdict(self.options),
                "folder": str(ingest.folder),
                "address": ingest.address,
                "units": list(ingest.units),
                "share": dict(share),
                "cuts": cuts,
                "buffer_bytes": BUFFER_BYTES // n_workers,
            }
            for share in shares
            if not ingest.is_done(share["name"])
        ]
        sizes: dict[str, int] = {task["share"]["name"]: task["share"]["n_bytes"] for task in tasks}
        with _bar("reading", sum(sizes.values())) as advance:
            in_process: Counter[str] = Counter()

            def run_here(task: dict[str, Any]) -> None:
                def moved(n_bytes: int) -> None:
                    in_process[task["share"]["name"]] += n_bytes
                    advance(n_bytes)

                run_unit(task, moved)

            def done(task: dict[str, Any]) -> None:
                name = task["share"]["name"]
                advance(sizes[name] - in_process[name])

            run_tasks(tasks, run_here, target=f"{__name__}:run_unit", n_workers=n_workers, done=done)

    def _finish(self, ingest: Ingest) -> None:
        """Plan the stages, and let the ingest settle versions and changes."""
        report = _report(ingest.counts(), ingest.refused())
        _check_share(report, self.options.max_dropped)
        ranges = _periods.ranges_of([ingest.record(unit).notes["ranges"] for unit in ingest.units])
        found = [
            _periods.Found(ranges[label][0], label, counts["documents"], *ranges[label][1:])
            for label, counts in ingest.periods().items()
        ]
        stages, notes = self._plan(found)
        self._ingested = ingest.finish(stages, report | notes)

    def _plan(self, found: Sequence[_periods.Found]) -> tuple[list[StagePlan], dict[str, Any]]:
        return _periods.plan_stages(
            found,
            every=self.options.every,
            dated=self.options.date is not None,
            small=self.options.small,
            min_documents=self.options.min_documents,
        )


def _check(options: Documents.Options) -> None:
    """Refuse options that do not hold together."""
    _periods.check_every(options.every, ordered=options.order is not None)
    _dates.zone(options.timezone)
    if options.dateformat is not None:
        _dates.check_layout(options.dateformat)
    _date_rules(options)
    for name, known in (("undecodable", ("drop", "replace")), ("small", ("merge", "drop", "refuse"))):
        if (value := getattr(options, name)) not in known:
            raise ConfigError(f"{name} is {value!r}", mend=f"use {' or '.join(known)}")
    for name, low, high in (("min_chars", 1, 10**9), ("min_documents", 2, 10**9), ("max_dropped", 0, 1)):
        if not low <= (value := getattr(options, name)) <= high:
            raise ConfigError(f"{name} is {value}", mend=f"choose one from {low} to {high}")


def _read_rules(options: Documents.Options) -> ReadRules:
    return ReadRules(encoding=options.encoding, replace=options.undecodable == "replace", separator=options.separator)


def _date_rules(options: Documents.Options) -> _dates.DateRules:
    return _dates.DateRules(
        layout=options.dateformat or "text",
        timezone=options.timezone,
        earliest_us=_periods.micros_of_day(options.earliest, "earliest"),
        latest_us=_periods.micros_of_day(options.latest, "latest", after=True),
        epoch_zero=options.epoch_zero,
    )


def _size_of(inputs: Inputs) -> int:
    return sum(inputs.path(name).stat().st_size for name in inputs.files)


def _digest(inputs: Inputs, options: Documents.Options, advance: Callable[[int], None]) -> str:
    """Return the digest of the files, and of their times where those are the documents' dates."""
    found = sha256_of(inputs, advance)
    if inputs.format == "text" and "modified" in (options.date, options.order):
        return digest_of([found, *(inputs.path(name).stat().st_mtime_ns for name in inputs.files)])
    return found


# --- one share of work ---------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts rows like ``clbench.ingest.Unit`` does, and writes nothing."""

    counts: Counter[str] = field(default_factory=Counter)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def refuse(self, kind: str, n: int = 1, first: str = "") -> None:
        """Count rows that are left out, or mended and kept."""
        if n:
            self.refused.setdefault(kind, {"count": 0, "first": first})["count"] += n

    def seen(self, label: str, key: int, micros: NDArray[np.int64]) -> None:
        """Remember the first and last moment of a period."""
        _, first, last = self.ranges.get(label, (key, int(micros[0]), int(micros[0])))
        self.ranges[label] = (key, min(first, int(micros.min())), max(last, int(micros.max())))
        self.counts["documents"] += len(micros)


def run_unit(task: dict[str, Any], advance: Callable[[int], None] = lambda n_bytes: None) -> None:
    """Read one share of work into its unit of the ingest; in a worker process, or in this one."""
    options = Documents.Options(**task["options"])
    ingest = Ingest(
        Path(task["folder"]), address=task["address"], units=task["units"], buffer_bytes=task["buffer_bytes"]
    )
    inputs = find_inputs(options.path, options.format)
    tally = Tally()
    with ingest.unit(task["share"]["name"]) as unit:
        _fill(unit, documents_of(options, inputs, task["share"], task["cuts"], tally, advance))
        unit.record.refused = tally.refused
        unit.record.notes["ranges"] = {label: list(found) for label, found in sorted(tally.ranges.items())}


def _fill(unit: Unit, found: Iterator[tuple[str, pa.RecordBatch]]) -> None:
    for label, rows in found:
        unit.add(label, rows)


def documents_of(
    options: Documents.Options,
    inputs: Inputs,
    share: Mapping[str, Any],
    cuts: Sequence[int] | None,
    tally: Tally,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Yield (period, documents) of one share of work; rows that cannot be used are counted."""
    import pyarrow as pa

    columns = {role: column for role in ("text", "date", "order", "id", "group") if (column := getattr(options, role))}
    array = None if cuts is None else np.array(cuts, np.int64)
    for rows in read_piece(inputs, share, columns, _read_rules(options), tally.refuse):
        batch, position = _documents(options, rows, tally)
        advance(rows.n_bytes)
        if not batch.num_rows:
            continue
        keys = _periods.keys_of(position, options.every, array)
        for key in np.unique(keys).tolist():
            chosen = np.flatnonzero(keys == key)
            label = _periods.label_of(key, options.every, cuts=cuts is not None)
            one = batch.take(pa.array(chosen))
            tally.seen(label, key, one.column("when").to_numpy())
            yield label, one


def _documents(options: Documents.Options, rows: Rows, tally: Tally) -> tuple[pa.RecordBatch, NDArray[np.int64]]:
    """Return the rows that can be used as documents, and what places them in time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    sieve = _Sieve(rows, tally)
    text = _cleaned(rows.columns["text"], options, sieve)
    micros, position = _placed(rows, options, sieve)
    if "id" in rows.columns:
        sieve.refuse("missing id", _true(pc.equal(pc.utf8_length(rows.columns["id"]), 0), missing=True))
    keep = pa.array(sieve.keep)
    text, micros, position = text.filter(keep), micros[sieve.keep], position[sieve.keep]
    if "id" in rows.columns:
        identity = rows.columns["id"].filter(keep)
    else:
        identity = pa.array([f"text-{digest.hex()[:32]}" for digest in text_digests(text)], pa.string())
    group = rows.columns["group"].filter(keep) if "group" in rows.columns else pa.nulls(len(text), pa.string())
    group = pc.if_else(pc.equal(group, ""), pa.scalar(None, pa.string()), group)
    dates = _dates_as_text(micros) if options.date is not None else pa.array([""] * len(text), pa.string())
    names = ["id", "text", "date", "group", "when"]
    arrays = [identity, text, dates, pc.fill_null(group, NO_GROUP), pa.array(micros)]
    return pa.RecordBatch.from_arrays(arrays, names=names), position


class _Sieve:
    """Which rows of a batch are still wanted; every row is left out for the first reason only."""

    def __init__(self, rows: Rows, tally: Tally) -> None:
        self.rows, self.tally = rows, tally
        self.keep = np.ones(len(rows.numbers), bool)

    def refuse(self, kind: str, bad: NDArray[np.bool_]) -> None:
        """Leave rows out."""
        bad = bad & self.keep
        if bad.any():
            self.tally.refuse(kind, int(bad.sum()), self.rows.where(int(np.flatnonzero(bad)[0])))
            self.keep &= ~bad

    def mended(self, kind: str, rows: NDArray[np.bool_]) -> None:
        """Count rows that are kept, but not as they were."""
        rows = rows & self.keep
        if rows.any():
            self.tally.refuse(KEPT + kind, int(rows.sum()), self.rows.where(int(np.flatnonzero(rows)[0])))


def _true(mask: pa.Array, *, missing: bool) -> NDArray[np.bool_]:
    """Return a mask in numpy; ``missing`` stands for nulls."""
    import pyarrow.compute as pc

    found: NDArray[np.bool_] = pc.fill_null(mask, missing).to_numpy(zero_copy_only=False)
    return found


def _cleaned(text: pa.Array, options: Documents.Options, sieve: _Sieve) -> pa.Array:
    """Return texts without NUL characters and marks of byte order; refuse those that say nothing."""
    import pyarrow.compute as pc

    sieve.refuse("no text", _true(text.is_null(), missing=True))
    sieve.refuse("empty text", _true(pc.equal(pc.binary_length(text), 0), missing=False))
    for kind, character, pattern in _REMOVED:
        found = _true(pc.match_substring_regex(text, pattern), missing=False)
        if found.any():
            sieve.mended(kind, found)
            text = pc.replace_substring(text, character, "")
    blank = ~_true(pc.match_substring_regex(text, _NO_WHITE_SPACE), missing=True)
    sieve.refuse("only white space", blank)
    if options.min_chars > 1:
        short = _true(pc.less(pc.utf8_length(text), options.min_chars), missing=False)
        sieve.refuse(f"text of fewer than {options.min_chars} characters", short)
    return text


def _placed(rows: Rows, options: Documents.Options, sieve: _Sieve) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what orders versions (dates, or else orders) and what the periods are made by (orders, or else dates)."""
    micros = position = np.zeros(len(rows.numbers), np.int64)
    if options.date is not None:
        micros, state = _dates.read_dates(rows.columns["date"], _date_rules(options))
        for kind, words in _dates.PROBLEMS.items():
            sieve.refuse(words, state == kind)
        low = _periods.micros_of_day(options.start, "start") if options.start else None
        high = _periods.micros_of_day(options.end, "end", after=True) if options.end else None
        if low is not None:
            sieve.refuse(OUTSIDE, micros < low)
        if high is not None:
            sieve.refuse(OUTSIDE, micros >= high)
        position = micros
    if options.order is not None:
        position, missing, wrong = _orders(rows.columns["order"], whole=options.every == "value")
        sieve.refuse("missing order", missing)
        sieve.refuse("order that is no number" if options.every != "value" else "order that is no whole number", wrong)
        micros = micros if options.date is not None else position
    return micros, position


ORDER_STEPS = 1_000_000
"""Orders that are not whole numbers are told apart up to a millionth."""


def _orders(column: pa.Array, *, whole: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return orders as integers (in millionths unless they must be whole), which are missing and which no number."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as types

    missing = column.is_null().to_numpy(zero_copy_only=False)
    if not (types.is_integer(column.type) or types.is_floating(column.type)):
        plain = pc.utf8_trim_whitespace(column.cast(pa.string()))
        missing = missing | _true(pc.equal(plain, ""), missing=True)
        number = pc.fill_null(pc.match_substring_regex(plain, r"^[+-]?[0-9]{1,15}(\.[0-9]*)?$"), False)
        column = pc.if_else(number, plain, pa.scalar(None, pa.string())).cast(pa.float64())
    values = column.cast(pa.float64()).fill_null(float("nan")).to_numpy(zero_copy_only=False)
    fine = np.isfinite(values) & (np.abs(values) < 9e12)
    if whole:
        fine &= (values == np.floor(values)) & (values >= 0)
    values = np.where(fine, values, 0.0)
    found = values.astype(np.int64) if whole else np.rint(values * ORDER_STEPS).astype(np.int64)
    return found, missing, ~fine & ~missing


def _dates_as_text(micros: NDArray[np.int64]) -> pa.Array:
    """Return times as ISO-8601 in UTC, midnights as days."""
    import pyarrow as pa
    import pyarrow.compute as pc

    seconds = pa.array(micros // 1_000_000).cast(pa.timestamp("s"))
    days = pc.strftime(seconds, "%Y-%m-%d")
    if not (micros % _dates.DAY_US).any():
        return days
    midnight = pa.array(micros // 1_000_000 % 86_400 == 0)
    return pc.if_else(midnight, days, pc.strftime(seconds, "%Y-%m-%dT%H:%M:%SZ"))


def moments_of(
    options: Documents.Options, inputs: Inputs, share: Mapping[str, Any], advance: Callable[[int], None]
) -> Iterator[NDArray[np.int64]]:
    """Yield what places rows in time, for those where it can be read; texts are not looked at."""
    columns = {role: column for role in ("date", "order") if (column := getattr(options, role))}
    tally = Tally()
    for rows in read_piece(inputs, share, columns, _read_rules(options), tally.refuse):
        sieve = _Sieve(rows, tally)
        _, position = _placed(rows, options, sieve)
        advance(rows.n_bytes)
        yield position[sieve.keep]


# --- reports -------------------------------------------------------------------------------------------------


def _report(counts: Mapping[str, int], refused: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many rows were read, kept and left out, and why."""
    left_out = {kind: dict(found) for kind, found in refused.items() if not kind.startswith(KEPT)}
    mended = {kind.removeprefix(KEPT): dict(found) for kind, found in refused.items() if kind.startswith(KEPT)}
    kept = counts.get("documents", 0)
    order = sorted(left_out, key=lambda kind: (-left_out[kind]["count"], kind))
    return {
        "rows": kept + sum(found["count"] for found in left_out.values()),
        "kept": kept,
        "left_out": {kind: left_out[kind] for kind in order},
        "mended": dict(sorted(mended.items())),
    }


def _check_share(report: Mapping[str, Any], max_dropped: float) -> None:
    """Refuse an input of which too much cannot be used."""
    lost = {kind: found for kind, found in report["left_out"].items() if kind != OUTSIDE}
    n_lost = sum(found["count"] for found in lost.values())
    if not report["kept"] or n_lost > max_dropped * report["rows"]:
        reasons = [f"{found['count']:,} {kind} (first: {found['first']})" for kind, found in report["left_out"].items()]
        raise ConfigError(
            f"{n_lost:,} of {report['rows']:,} rows cannot be used" if report["rows"] else "there are no rows",
            where="; ".join(reasons[:4]) or None,
            mend="choose other columns, mend the data, or raise max_dropped",
        )


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over bytes of input on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console.stderr, disable=not console.stderr.is_terminal, transient=True) as display:
        task = display.add_task(what, total=total)
        yield lambda n_bytes: display.update(task, advance=n_bytes)
