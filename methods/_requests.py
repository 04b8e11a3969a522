"""Reads files of deletion requests; what they mean is left to the method ``deletions``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clbench.errors import ConfigError, NotFoundError
from clbench.files import sha256_bytes
from clbench.stream import identity_of

COLUMNS = "a column id and perhaps from_stage"


def read_requests(path: Path) -> tuple[dict[str, int], str]:
    """Return the identity of every document -> first stage without it, and the file's sha256.

    Where a document stands twice, the earlier stage holds.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it is neither CSV nor JSONL, lacks the column ``id``, or has a line that cannot be used.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise ConfigError("deletion requests are .csv or .jsonl", where=path, mend=f"give such a file with {COLUMNS}")
    if not path.is_file():
        raise NotFoundError("file of deletion requests is missing", where=path, mend="mend deletions:file=")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8: {error.reason}", where=path, mend="save it as UTF-8") from None
    found: dict[str, int] = {}
    for line, row in _csv_rows(text, path) if path.suffix == ".csv" else _json_rows(text, path):
        identity, first = _request(row, f"{path}, line {line}")
        found[identity] = min(first, found.get(identity, first))
    if not found:
        raise ConfigError("no deletion request in this file", where=path, mend="leave the method deletions out")
    return found, sha256_bytes(content)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if "id" not in (reader.fieldnames or ()):
            raise ConfigError(
                f"no column id; columns: {reader.fieldnames or 'none'}", where=path, mend=f"give {COLUMNS}"
            )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(
            f"not CSV: {error}", where=f"{path}, line {reader.reader.line_num}", mend="mend the line"
        ) from None


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not JSON: {error.msg}", where=f"{path}, line {i}", mend="mend the line") from None
        if not isinstance(row, dict) or "id" not in row:
            raise ConfigError("no id", where=f"{path}, line {i}", mend='write {"id": "...", "from_stage": 2}')
        yield i, row


def _request(row: dict[str, Any], where: str) -> tuple[str, int]:
    """Return identity and first stage of one request."""
    identity, first = row["id"], row.get("from_stage")
    if not isinstance(identity, str) or not identity.strip():
        raise ConfigError(f"{identity!r} is no document id", where=where, mend="give the id as text")
    if first is None or first == "":
        return identity_of(identity.strip()), 1
    try:
        stage = int(str(first))
    except ValueError:
        stage = 0
    if stage < 1:
        raise ConfigError(
            f"from_stage is {first!r}",
            where=where,
            mend="give a stage's number from 1 on (the base was trained on stage 0 already), or nothing",
        )
    return identity_of(identity.strip()), stage
