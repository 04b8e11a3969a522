"""Which rows of a data set become documents of which period: filters, dates, a share by hash, and exact caps.

Rows come in the order of the data set and are judged one after another, so the outcome hangs on nothing but them. A
period's cap is a prefix: documents are taken until the next one would go over a cap. Where rows come from is left to
``_hub_reach``; what is written where, to ``clbench.ingest``.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.errors import ConfigError, did_you_mean
from clbench.ingest import Unit
from clbench.seeds import derive
from clbench.streams._hub_options import HOST_OF, Caps, Columns, Filter, Pass, Period, read_filter

if TYPE_CHECKING:
    import pyarrow as pa

Counter = Callable[[Sequence[str]], Sequence[int]]
UNKNOWN = "unknown"
ADDRESS = re.compile(r"\s*[A-Za-z][\w+.-]*://(?:[^/?#@]*@)?(\[[^\]/]+\]|[^\[\]/?#:@\s]+)")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for all periods of a stream."""

    keep: float = 1.0
    """Share of the ids that are kept, by a hash of the id and the seed."""
    seed: int = 0
    min_chars: int = 1
    max_chars: int | None = None
    count_tokens: Counter | None = None
    """Tokens of every text with its end of text; only where a cap on tokens asks for it."""


@dataclass
class Slot:
    """One period of a pass, how much of it is there, and whether another document would go over a cap."""

    period: Period
    caps: Caps
    taken: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Documents, bytes, tokens."""
    is_full: bool = False

    def state(self) -> list[int]:
        """Return what ``restore`` takes."""
        return [*self.taken, int(self.is_full)]

    def restore(self, state: Sequence[int]) -> None:
        """Go on where an earlier unit of the same pass ended."""
        *self.taken, is_full = state
        self.is_full = bool(is_full)


@dataclass
class Row:
    """A row that passed every rule."""

    id: str
    text: str
    date: str
    group: str
    when: int


class Reader:
    """Turns tables of one pass into documents of a unit of an ingest."""

    def __init__(self, work: Pass, periods: Sequence[Period], rules: Rules) -> None:
        self.place, self.rules = work.place, rules
        self.filters = [read_filter(text) for text in work.place.filters]
        self.slots = [Slot(p, work.periods[p.name]) for p in periods if p.name in work.periods]
        self._starts = [slot.period.start for slot in self.slots]
        self._digests: dict[str, Any] = {}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Go on after an earlier piece of the same pass, whose notes these are."""
        for slot in self.slots:
            slot.restore(notes["taken"][slot.period.name])

    def is_full(self) -> bool:
        """Whether no period takes another document."""
        return all(slot.is_full for slot in self.slots)

    def begin(self) -> None:
        """Start a unit."""
        self._digests = {slot.period.name: hashlib.sha256() for slot in self.slots}

    def notes(self) -> dict[str, Any]:
        """Return what is remembered of a unit: how much the periods hold now, and the SHA-256 of what it gave each."""
        return {
            "taken": {slot.period.name: slot.state() for slot in self.slots},
            "sha256": {name: digest.hexdigest() for name, digest in self._digests.items()},
        }

    def read(self, table: pa.Table, unit: Unit) -> None:
        """Add the documents of the next rows to a unit.

        Raises:
            ConfigError: a column is missing, or cannot be compared with what a filter says.
        """
        check_columns(table.column_names, self.place.columns, self.filters, str(self.place))
        unit.count("rows read", table.num_rows)
        for wanted in self.filters:
            before = table.num_rows
            table = _filtered(table, wanted, str(self.place))
            unit.refuse(f"filter {wanted.column} {wanted.op} {wanted.value}", before - table.num_rows)
        found: dict[int, list[Row]] = {}
        for index, row in self._rows(table, unit):
            found.setdefault(index, []).append(row)
        for index in sorted(found):
            self._take(self.slots[index], found[index], unit)

    def _take(self, slot: Slot, rows: list[Row], unit: Unit) -> None:
        """Add as many of the rows as the caps allow."""
        if slot.is_full:
            return
        rows = rows[: self._n_within(slot, rows)]
        digest = self._digests[slot.period.name]
        for row in rows:
            text = row.text.encode()
            digest.update(f"{row.id}\x1f{row.date}\x1f{row.group}\x1f{len(text)}\x1f".encode() + text)
        unit.add_rows(slot.period.name, [vars(row) for row in rows])

    def _n_within(self, slot: Slot, rows: list[Row]) -> int:
        """Return how many rows fit under every cap, and note what the slot holds then."""
        sizes = [np.ones(len(rows), np.int64), np.array([len(row.text.encode()) for row in rows], np.int64)]
        if slot.caps.max_tokens is not None and self.rules.count_tokens is not None:
            sizes.append(np.asarray(self.rules.count_tokens([row.text for row in rows]), np.int64))
        n = len(rows)
        for taken, size, cap in zip(slot.taken, sizes, _caps(slot.caps), strict=False):
            if cap is not None:
                n = min(n, int(np.searchsorted(taken + np.cumsum(size), cap, side="right")))
        for measure, size in enumerate(sizes):
            slot.taken[measure] += int(size[:n].sum())
        reached = any(cap is not None and taken >= cap for taken, cap in zip(slot.taken, _caps(slot.caps), strict=True))
        slot.is_full = n < len(rows) or reached
        return n

    def _rows(self, table: pa.Table, unit: Unit) -> Iterator[tuple[int, Row]]:
        """Yield the slot and the row of everything that passes; count what does not."""
        columns, rules = self.place.columns, self.rules
        values = {name: table.column(name).to_pylist() for name in columns.needed()}
        dataset = self.place.dataset.rstrip("/").rpartition("/")[2]
        group_of = _group_reader(columns.group, dataset)
        for i in range(table.num_rows):
            text = joined([values[name][i] for name in columns.text])
            if not rules.min_chars <= len(text) <= (rules.max_chars or len(text)):
                unit.refuse("no text" if not text else "too short" if len(text) < rules.min_chars else "too long")
                continue
            identity = _identity(values[columns.id][i] if columns.id else None, text, has_column=bool(columns.id))
            if not identity:
                unit.refuse("no id")
                continue
            if rules.keep < 1.0 and derive(rules.seed, "hub", identity) >= rules.keep * 2.0**63:
                unit.count("left out by keep")
                continue
            index, day, when = self._slot(values[columns.date][i] if columns.date else None, unit)
            if index is not None:
                group = group_of(values, i)
                yield index, Row(id=identity, text=text, date=day, group=group, when=when)

    def _slot(self, value: Any, unit: Unit) -> tuple[int | None, str, int]:
        """Return which period a date belongs to, the day, and seconds since 1970."""
        if self.place.columns.date is None:
            return 0, self.slots[0].period.end, 0
        moment = moment_of(value)
        if moment is None:
            unit.refuse("no date" if value is None or value == "" else "date cannot be read", first=repr(value)[:80])
            return None, "", 0
        day = moment.date().isoformat()
        index = bisect_right(self._starts, day) - 1
        if index < 0 or day > self.slots[index].period.end:
            unit.refuse("date outside the period", first=day)
            return None, day, 0
        return index, day, int(moment.timestamp())


def _caps(caps: Caps) -> tuple[int | None, ...]:
    return caps.max_documents, caps.max_bytes, caps.max_tokens


def joined(texts: Sequence[Any]) -> str:
    """Return the texts of a row, those that are there, joined by an empty line."""
    return "\n\n".join(str(text) for text in texts if text)


def _identity(value: Any, text: str, *, has_column: bool) -> str:
    if has_column:
        return "" if value is None else str(value)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _group_reader(group: str | None, dataset: str) -> Callable[[Mapping[str, list[Any]], int], str]:
    """Return what reads the group of row i."""
    if group is None:
        return lambda values, i: dataset
    if host := HOST_OF.fullmatch(group):
        column = host["column"]
        return lambda values, i: host_of(str(values[column][i] or ""))
    return lambda values, i: str(values[group][i] or "") or UNKNOWN


def host_of(address: str) -> str:
    """Return the host of a web address in small letters, without ``www.``."""
    host = ADDRESS.match(address)
    return host[1].lower().removeprefix("www.") if host else UNKNOWN


def moment_of(value: Any) -> datetime | None:
    """Return a moment in UTC from ISO-8601 text, a date, a timestamp or seconds since 1970; None: it is none of them.

    What names no time zone is taken as UTC.
    """
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = datetime.fromtimestamp(value, UTC)
        if isinstance(value, datetime):
            return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, date):
            return datetime(value.year, value.month, value.day, tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        pass
    return None


def check_columns(names: Sequence[str], columns: Columns, filters: Sequence[Filter], where: str) -> None:
    """Refuse a data set that lacks a column.

    Raises:
        ConfigError: names the near misses.
    """
    for name in (*columns.needed(), *(wanted.column for wanted in filters)):
        if name not in names:
            raise ConfigError(f"there is no column {name!r}", where=where, mend=did_you_mean(name, names))


def _filtered(table: pa.Table, wanted: Filter, where: str) -> pa.Table:
    """Return the rows that a filter keeps."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(wanted.column)
    compare = {
        "==": pc.equal,
        "!=": pc.not_equal,
        "<": pc.less,
        "<=": pc.less_equal,
        ">": pc.greater,
        ">=": pc.greater_equal,
    }
    try:
        if wanted.op in ("in", "not in"):
            mask = pc.is_in(column, value_set=pa.array(wanted.value, column.type))
            if wanted.op == "not in":
                mask = pc.and_(pc.invert(mask), pc.is_valid(column))
        else:
            mask = compare[wanted.op](column, pa.scalar(wanted.value))
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        raise ConfigError(
            f"column {wanted.column!r} holds {column.type}, which cannot be compared with {wanted.value!r}",
            where=where,
            mend="mend the filter",
        ) from None
    return table.filter(mask)
