"""Files of posts, row by row, in an order that is the same on every machine: what ``posts`` reads.

By its last suffixes a file is JSONL, CSV or Parquet; anything else is text with one post a line. ``.gz`` and ``.zst``
are unpacked. Which rows count, and as what, is left to ``posts``.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import sha256_file

Row = dict[str, Any]
PACKED = {".gz": "gzip", ".zst": "zstd"}
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
BATCH_ROWS = 2048
CSV_FIELD_BYTES = 1 << 27


def find_files(path: Path) -> list[Path]:
    """Return a file, or the tables below a folder by their relative names; what begins with a dot is left out.

    Raises:
        NotFoundError: it is missing, or the folder holds no table.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise NotFoundError("posts are missing", where=path, mend="give a file or a folder")
    found = [
        file
        for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
        if file.is_file()
        and kind_of(file) != ""
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise NotFoundError("the folder holds no JSONL, CSV or Parquet file", where=path, mend="name the files")
    return found


def kind_of(path: Path) -> str:
    """Return the table suffix of a file name without what packs it; empty for other text."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in PACKED else path.suffix
    return suffix.lower() if suffix.lower() in TABLES else ""


def digests(paths: list[Path]) -> list[str]:
    """Return the SHA-256 of every file, in order."""
    return [sha256_file(path) for path in paths]


def read_rows(path: Path, counts: Counter[str]) -> Iterator[Row]:
    """Yield every row of a file; broken JSON lines are left out and counted.

    Text that is not UTF-8 holds U+FFFD where it was damaged. Lines of plain text have the one column ``text``; empty
    lines are no rows.

    Raises:
        IntegrityError: the file is not what its name says.
    """
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path)
            return
        with _lines(path) as lines:
            if kind in (".csv", ".tsv"):
                csv.field_size_limit(CSV_FIELD_BYTES)
                yield from csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",")
            elif kind:
                yield from _json_lines(lines, path, counts)
            else:
                yield from ({"text": line.rstrip("\r\n")} for line in lines if line.strip())
    except (OSError, csv.Error) as error:
        raise IntegrityError(
            f"cannot be read: {' '.join(str(error).split())}", where=path, mend="check that the file is whole"
        ) from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise IntegrityError(f"is no Parquet file: {error}", where=path) from None


def _json_lines(lines: io.TextIOBase, path: Path, counts: Counter[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            counts["broken JSON"] += 1
            continue
        if not isinstance(row, dict):
            raise ConfigError("a line holds no JSON object", where=f"{path}, line {number}", mend="write one a post")
        yield row


@contextmanager
def _lines(path: Path) -> Iterator[io.TextIOBase]:
    """Yield the text of a file, unpacked."""
    import pyarrow as pa

    packed = PACKED.get(path.suffix.lower())
    with pa.input_stream(str(path), compression=packed) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int], None]]:
    """Show rows as they go by on a terminal, nothing elsewhere; yields a function that counts some more."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from clbench.console import stderr

    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda n: bar.advance(task, n)
