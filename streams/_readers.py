"""Rows out of Parquet, JSON lines, CSV and folders of text files, in batches of bounded size.

A reader hands on the columns that it is asked for and the number of every row, and counts the rows that it cannot
read (a broken line, bytes in another encoding). What the values mean is left to ``documents`` and ``_dates``.

Column names of a folder of text files: ``text`` (without front matter), ``path``, ``folder`` (the topmost), ``name``,
``path_date`` (2013-05-01-title.md, 2013/05/title.md), ``modified`` and ``front.KEY``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError, IntegrityError, NotFoundError, did_you_mean
from clbench.streams._inputs import Inputs

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 2048
BATCH_BYTES = 4 << 20
MAX_BYTES = 64 << 20
"""Of one document, line or field."""
READ_BYTES = 1 << 20
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_PATH_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)(?:([-_/.]?)(0[1-9]|1[0-2])(?:\2(0[1-9]|[12]\d|3[01]))?)?(?!\d)")

Refuse = Callable[[str, int, str], None]
"""Called with a kind, how many rows, and where the first of them stands."""


@dataclass(frozen=True, kw_only=True)
class ReadRules:
    """How files are read: what their bytes mean."""

    encoding: str = "utf-8"
    replace: bool = False
    """Put U+FFFD where bytes are not of the encoding, and keep the row."""
    separator: str | None = None


@dataclass
class Rows:
    """Some rows of a file: a column per role (text, date …), and the number of every row, from 1."""

    file: str
    unit: str
    """What the numbers count: ``row`` or ``line``; empty where a file is one row."""
    numbers: NDArray[np.int64]
    columns: dict[str, pa.Array]
    n_bytes: int = 0
    """Of input, since the batch before."""
    names: list[str] = field(default_factory=list)
    """Per row where it stands, if ``file`` does not say."""

    def where(self, i: int) -> str:
        """Say where a row stands."""
        return self.names[i] if self.names else f"{self.file} {self.unit} {self.numbers[i]}"


def read_piece(
    inputs: Inputs, piece: Mapping[str, Any], columns: Mapping[str, str], rules: ReadRules, refuse: Refuse
) -> Iterator[Rows]:
    """Yield the rows of a share of work. ``columns`` says which column plays which role.

    Raises:
        ConfigError, NotFoundError: a column is missing, or its type is not one of text.
        IntegrityError: a file is damaged.
    """
    if inputs.format == "text":
        yield from _read_texts(inputs, piece["files"], columns, rules, refuse)
        return
    for name in piece["files"]:
        if inputs.format == "parquet":
            yield from _read_parquet(inputs.path(name), name, piece.get("groups"), columns, rules, refuse)
        elif inputs.format == "jsonl":
            yield from _read_jsonl(inputs.path(name), name, columns, rules, refuse)
        else:
            yield from _read_csv(inputs.path(name), name, columns, rules, refuse)


# --- Parquet -------------------------------------------------------------------------------------------------


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file so that columns are read in pieces.

    Raises:
        IntegrityError: it is none, or it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            yield file
    except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"cannot be read to its end: {' '.join(str(error).split())[:200]}", where=path, mend="make or copy it again"
    )


def _read_parquet(
    path: Path, name: str, groups: list[int] | None, columns: Mapping[str, str], rules: ReadRules, refuse: Refuse
) -> Iterator[Rows]:
    with open_parquet(path) as file:
        schema = file.schema_arrow
        for column in columns.values():
            _check_column(schema, column, path)
        meta = file.metadata
        chosen = list(range(*groups)) if groups else list(range(meta.num_row_groups))
        before = sum(meta.row_group(g).num_rows for g in range(chosen[0])) if chosen else 0
        for group in chosen:
            info = meta.row_group(group)
            size = sum(info.column(c).total_compressed_size for c in range(meta.num_columns))
            plain = sum(info.column(c).total_uncompressed_size for c in range(meta.num_columns))
            n_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * info.num_rows // max(1, plain)))
            wanted = sorted(set(columns.values()))
            for batch in file.iter_batches(n_rows, row_groups=[group], columns=wanted, use_threads=False):
                numbers = np.arange(before + 1, before + 1 + batch.num_rows)
                before += batch.num_rows
                found = {role: _nested(batch, column) for role, column in columns.items()}
                rows = Rows(name, "row", numbers, found, size * batch.num_rows // max(1, info.num_rows))
                yield _decoded(rows, columns, rules, refuse)


def _check_column(schema: pa.Schema, column: str, path: Path) -> None:
    """Refuse a column that is not there."""
    if column not in leaves(schema):
        raise NotFoundError(f"no column {column!r}", where=path, mend=did_you_mean(column, leaves(schema)))


def leaves(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return dotted path -> type of all columns, those inside structs too."""
    import pyarrow.types as types

    found: dict[str, pa.DataType] = {}

    def walk(fields: Any, prefix: str) -> None:
        for one in fields:
            if types.is_struct(one.type):
                walk([one.type.field(i) for i in range(one.type.num_fields)], f"{prefix}{one.name}.")
            else:
                found[prefix + one.name] = one.type

    walk(schema, "")
    return found


def _nested(batch: pa.RecordBatch, column: str) -> pa.Array:
    """Return a column by its dotted path (a name that holds a dot comes first)."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    if column in batch.schema.names:
        found = batch.column(column)
    else:
        first = next(name for name in batch.schema.names if column.startswith(f"{name}."))
        found = batch.column(first)
        for part in column.removeprefix(f"{first}.").split("."):
            found = pc.struct_field(found, part)
    return found.dictionary_decode() if types.is_dictionary(found.type) else found


def _decoded(rows: Rows, columns: Mapping[str, str], rules: ReadRules, refuse: Refuse) -> Rows:
    """Return rows whose text, id and group are valid strings; those with other bytes are left out."""
    import pyarrow as pa

    bad = np.zeros(len(rows.numbers), bool)
    for role in ("text", "id", "group"):
        if role in columns:
            rows.columns[role], wrong = _strings(rows.columns[role], columns[role], rows.file, rules)
            bad |= wrong
    if bad.any():
        first = rows.where(int(np.flatnonzero(bad)[0]))
        if rules.replace:
            refuse("kept: bytes that are not UTF-8 replaced", int(bad.sum()), first)
            return rows
        refuse("bytes that are not UTF-8", int(bad.sum()), first)
        keep = pa.array(~bad)
        rows.columns = {role: column.filter(keep) for role, column in rows.columns.items()}
        rows.numbers = rows.numbers[~bad]
    return rows


def _strings(column: pa.Array, name: str, file: str, rules: ReadRules) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Return a column as strings, and which of them were not valid UTF-8."""
    import pyarrow as pa
    import pyarrow.types as types

    kind = column.type
    wrong = np.zeros(len(column), bool)
    if types.is_null(kind) or types.is_integer(kind):
        return column.cast(pa.string()), wrong
    if types.is_floating(kind):  # whole numbers with gaps come as floats from pandas
        return pa.array([_plain(value) for value in column.to_pylist()], pa.string()), wrong
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        try:
            column = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ConfigError(
                f"column {name!r} holds {kind}, not text", where=file, mend="choose another column"
            ) from None
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string()), wrong  # this checks that it is UTF-8, reading a string column does not
    except pa.ArrowInvalid:
        pass
    texts: list[str | None] = []
    for i, value in enumerate(raw.to_pylist()):
        text = None if value is None else value.decode(errors="replace")
        texts.append(text)
        wrong[i] = text is not None and text.encode() != value
    return pa.array(texts, pa.string()), wrong


# --- streams of bytes ----------------------------------------------------------------------------------------


class ByteStream(io.RawIOBase):
    """A file's bytes, unpacked; knows how far it is in the packed ones."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        packed = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        self.path, self._file = path, pa.OSFile(str(path), "rb")
        # Decompressing is by far the largest read; Arrow's streams check that they end where they should.
        self._stream = self._file if packed is None else pa.CompressedInputStream(self._file, packed)
        self._told = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except OSError as error:
            raise _damaged(self.path, error) from None

    def progress(self) -> int:
        """Return how many bytes of the file were taken since the last call."""
        if self.closed:
            return 0
        now = int(self._file.tell())
        before, self._told = self._told, now
        return now - before

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()


def _lines(path: Path, raw: ByteStream, refuse: Refuse, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) without its end; a line of more than MAX_BYTES is counted and skipped."""
    number, size, skipping = 1, 0, False
    waiting: list[bytes] = []
    buffer = bytearray(READ_BYTES)
    while n := raw.readinto(buffer):
        *whole, rest = bytes(memoryview(buffer)[:n]).split(b"\n")
        for line in whole:
            if not skipping:
                yield number, b"".join([*waiting, line]) if waiting else line
            waiting, size, skipping = [], 0, False
            number += 1
        if not skipping and rest:
            waiting.append(rest)
            size += len(rest)
        if size > MAX_BYTES:
            refuse(f"line of more than {MAX_BYTES >> 20} MB", 1, f"{name} line {number}")
            waiting, size, skipping = [], 0, True
    if waiting:
        yield number, b"".join(waiting)


class _Collector:
    """Python values of rows, until there are enough for a batch."""

    def __init__(self, file: str, unit: str, columns: Mapping[str, str], rules: ReadRules, refuse: Refuse) -> None:
        self.file, self.unit, self.columns, self.rules, self.refuse = file, unit, columns, rules, refuse
        self.values: dict[str, list[Any]] = {role: [] for role in columns}
        self.numbers: list[int] = []
        self.names: list[str] = []
        self.size = 0

    def add(self, number: int, values: Mapping[str, Any], name: str = "") -> bool:
        """Take one row, given by role; tells whether it is time for a batch."""
        where = name or f"{self.file} {self.unit} {number}"
        if "text" in values and not (values["text"] is None or isinstance(values["text"], str)):
            self.refuse("text that is not a string", 1, where)
            return False
        row = {role: _plain(values[role]) if role in ("id", "group") else values[role] for role in self.columns}
        replaced = False
        for role, value in row.items():
            if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
                row[role] = _mended(value, self.rules.encoding)
                replaced = True
        if replaced:
            if not self.rules.replace:
                self.refuse(f"bytes that are not {self.rules.encoding.upper()}, or half a character", 1, where)
                return False
            self.refuse(f"kept: bytes that are not {self.rules.encoding.upper()} replaced", 1, where)
        text = row.get("text") or ""
        if len(text) > MAX_BYTES:
            self.refuse(f"text of more than {MAX_BYTES >> 20} MB", 1, where)
            return False
        for role, value in row.items():
            self.values[role].append(value)
        self.numbers.append(number)
        self.names.append(name)
        self.size += len(text)
        return len(self.numbers) >= BATCH_ROWS or self.size >= BATCH_BYTES

    def rows(self, n_bytes: int) -> Rows:
        """Return what was taken, and begin anew."""
        import pyarrow as pa

        found = {
            role: pa.array(values, pa.string()) if role in ("text", "id", "group") else any_array(values)
            for role, values in self.values.items()
        }
        names = self.names if self.names and self.names[0] else []
        rows = Rows(self.file, self.unit, np.array(self.numbers, np.int64), found, n_bytes, names)
        self.values = {role: [] for role in self.columns}
        self.numbers, self.names, self.size = [], [], 0
        return rows


def _plain(value: Any) -> str | None:
    """Return an id or a group as text; None where it is neither text nor a whole number."""
    if isinstance(value, dict) and len(value) == 1:  # {"$oid": …}
        value = next(iter(value.values()))
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None if value != value else str(value)
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _mended(text: str, encoding: str) -> str:
    """Return a text with U+FFFD for bytes of another encoding and for halves of characters."""
    try:
        return text.encode(encoding, "surrogateescape").decode(encoding, "replace")
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)


def any_array(values: list[Any]) -> pa.Array:
    """Return values as an array: all numbers, or else all texts."""
    import pyarrow as pa

    values = [next(iter(v.values())) if isinstance(v, dict) and len(v) == 1 else v for v in values]  # {"$date": …}
    if all(v is None for v in values):
        return pa.nulls(len(values))
    if all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values):
        try:
            whole = all(v is None or isinstance(v, int) for v in values)
            return pa.array(values, pa.int64() if whole else pa.float64())
        except (pa.ArrowInvalid, OverflowError):
            pass
    return pa.array([None if v is None else _as_text(v) for v in values], pa.string())


def _as_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return value.isoformat() if isinstance(value, (date, datetime)) else str(value)


# --- JSON lines ----------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, name: str, columns: Mapping[str, str], rules: ReadRules, refuse: Refuse) -> Iterator[Rows]:
    collector = _Collector(name, "line", columns, rules, refuse)
    paths = {role: column.split(".") for role, column in columns.items()}
    with ByteStream(path) as raw:
        for number, row in json_rows(path, raw, name, rules, refuse):
            if collector.add(number, {role: _dotted(row, columns[role], parts) for role, parts in paths.items()}):
                yield collector.rows(raw.progress())
        yield collector.rows(raw.progress())


def json_rows(
    path: Path, raw: ByteStream, name: str, rules: ReadRules, refuse: Refuse
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object); lines that are none are counted."""
    plain = rules.encoding.lower().replace("-", "").replace("_", "") in ("utf8", "ascii", "utf8sig")
    lines = _lines(path, raw, refuse, name) if plain else _text_lines(raw, rules)
    for number, line in lines:
        try:
            text = line if isinstance(line, str) else line.decode()
        except UnicodeDecodeError:
            text = line.decode(errors="surrogateescape")  # type: ignore[union-attr]
        if number == 1:
            text = text.removeprefix("\ufeff")
            _check_start(path, text)
        if not text or text.isspace():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            refuse("line that is not JSON", 1, f"{name} line {number}")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            refuse("line that is no JSON object", 1, f"{name} line {number}")


def _text_lines(raw: ByteStream, rules: ReadRules) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a file in an encoding whose line ends are not plain bytes."""
    yield from enumerate(_text_stream(raw, rules, newline="\n"), start=1)


def _check_start(path: Path, text: str) -> None:
    if text.startswith("["):
        raise ConfigError("a JSON array, not one object a line", where=path, mend="write every object on its own line")
    if "\x00" in text[:4] or text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise ConfigError("this looks like UTF-16", where=path, mend="say encoding utf-16")


def _dotted(row: Mapping[str, Any], column: str, parts: list[str]) -> Any:
    """Return a field by its dotted path; None where it is missing."""
    if column in row:
        return row[column]
    value: Any = row
    for part in parts:
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


# --- CSV -----------------------------------------------------------------------------------------------------


def _text_stream(raw: ByteStream, rules: ReadRules, newline: str) -> io.TextIOWrapper:
    """Return decoded text; bytes of another encoding become lone surrogates, which ``_Collector`` counts."""
    plain = rules.encoding.lower().replace("-", "").replace("_", "") == "utf8"
    try:
        return io.TextIOWrapper(
            io.BufferedReader(raw, READ_BYTES),
            encoding="utf-8-sig" if plain else rules.encoding,
            errors="surrogateescape",
            newline=newline,
        )
    except LookupError:
        raise ConfigError(f"no encoding {rules.encoding!r}", where="encoding", mend="say utf-8, latin-1 …") from None


def _read_csv(path: Path, name: str, columns: Mapping[str, str], rules: ReadRules, refuse: Refuse) -> Iterator[Rows]:
    collector = _Collector(name, "row", columns, rules, refuse)
    with ByteStream(path) as raw, _text_stream(raw, rules, newline="") as stream:
        for number, row in _csv_rows(path, stream, name, columns, rules, refuse):
            if collector.add(number, row):
                yield collector.rows(raw.progress())
        yield collector.rows(raw.progress())


def _csv_rows(
    path: Path, stream: io.TextIOWrapper, name: str, columns: Mapping[str, str], rules: ReadRules, refuse: Refuse
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, values by role); rows with another number of fields than the header are counted."""
    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(stream, delimiter=separator_of(path, rules), strict=True)
    number = 0
    try:
        header = next(reader, [])
        places = {role: _place(header, column, path) for role, column in columns.items()}
        for number, row in enumerate(reader, start=1):
            if len(row) == len(header):
                yield number, {role: row[place] for role, place in places.items()}
            elif row:
                refuse("row with another number of fields than the header", 1, f"{name} row {number}")
    except (csv.Error, UnicodeError) as error:
        raise IntegrityError(
            f"cannot be read after row {number}: {error}",
            where=path,
            mend="a quotation mark may not be closed, or the separator or encoding is another one",
        ) from None


def csv_dictionaries(path: Path, raw: ByteStream, rules: ReadRules) -> Iterator[dict[str, str]]:
    """Yield whole rows by name; those of another length are left out."""
    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(_text_stream(raw, rules, newline=""), delimiter=separator_of(path, rules))
    header = next(reader, [])
    try:
        for row in reader:
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True))
    except (csv.Error, UnicodeError):
        return  # the real reading says what is wrong, and where


def _place(header: list[str], column: str, path: Path) -> int:
    if header.count(column) != 1:
        problem = "no column" if column not in header else "several columns"
        raise NotFoundError(f"{problem} {column!r}", where=path, mend=did_you_mean(column, header))
    return header.index(column)


def separator_of(path: Path, rules: ReadRules) -> str:
    """Return the separator that is given, or the one that cuts the first rows into equally many fields."""
    if rules.separator is not None:
        names = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "\\t": "\t"}
        chosen = names.get(rules.separator, rules.separator)
        if len(chosen) != 1:
            raise ConfigError(f"separator is {rules.separator!r}", mend="give one character, or tab")
        return chosen
    with ByteStream(path) as raw, _text_stream(raw, rules, newline="") as stream:
        start = stream.read(1 << 18)
    if not start.strip():
        raise ConfigError("the file is empty", where=path, mend="give a header and rows")
    best, most = ",", 1
    csv.field_size_limit(MAX_BYTES)
    for candidate in (",", "\t", ";", "|"):
        rows = []
        try:
            for row in csv.reader(io.StringIO(start), delimiter=candidate):
                rows.append(len(row))
        except csv.Error:
            continue
        rows = rows[:-1] or rows  # the last one may be cut
        width = rows[0] if rows else 0
        if width > most and sum(n == width for n in rows) >= 0.9 * len(rows):
            best, most = candidate, width
    return best


# --- folders of text files -----------------------------------------------------------------------------------


def _read_texts(
    inputs: Inputs, names: list[str], columns: Mapping[str, str], rules: ReadRules, refuse: Refuse
) -> Iterator[Rows]:
    collector = _Collector("", "", columns, rules, refuse)
    n_bytes = 0
    for number, name in enumerate(names, start=1):
        path = inputs.path(name)
        size = path.stat().st_size
        n_bytes += size
        if size > MAX_BYTES:
            refuse(f"text of more than {MAX_BYTES >> 20} MB", 1, name)
            continue
        row = text_file(path, name, rules)
        if collector.add(number, {role: _dotted(row, c, c.split(".")) for role, c in columns.items()}, name):
            yield collector.rows(n_bytes)
            n_bytes = 0
    yield collector.rows(n_bytes)


def text_file(path: Path, name: str, rules: ReadRules) -> dict[str, Any]:
    """Return what a text file says as a row, see the top of this module."""
    with ByteStream(path) as raw, _text_stream(raw, rules, newline="") as stream:
        text = stream.read()
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    front: dict[str, Any] = {}
    if (match := _FRONT.match(text)) is not None:
        front = _front_matter(match.group(1))
        text = text[match.end() :] if front else text
    return {
        "text": text,
        "path": name,
        "name": Path(name).name,
        "folder": name.split("/")[0] if "/" in name else "",
        "path_date": path_date(name),
        "modified": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(),
        "front": front,
    }


def _front_matter(block: str) -> dict[str, Any]:
    """Return the keys of a YAML block at the top of a file; nothing if it is not one."""
    import yaml

    try:
        found = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def path_date(name: str) -> str | None:
    """Return the most exact date in a path: a day, a month or a year; the last of equally exact ones."""
    found = [m for m in _PATH_DATE.finditer(name)]
    if not found:
        return None
    best = max(found, key=lambda m: (sum(m.group(g) is not None for g in (3, 4)), m.start()))
    return "-".join(part for part in (best.group(1), best.group(3), best.group(4)) if part)
