"""A look at the first rows of an input: which columns there are, and which of them are likely text, date, id and group.

It guesses and gives its reasons; to ask the user is left to the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from clbench.errors import ConfigError, NotFoundError, did_you_mean
from clbench.streams import _readers
from clbench.streams._dates import Settled, settle
from clbench.streams._inputs import Inputs

SAMPLE_ROWS = 200
SAMPLE_FILES = 5
ROLES = ("text", "date", "id", "group")
NAMES: dict[str, tuple[str, ...]] = {
    "text": (
        "text", "body", "content", "document", "post", "article", "message", "comment", "selftext", "raw_content",
        "abstract", "markdown", "description", "summary",
    ),
    "date": (
        "date", "created", "created_at", "created_utc", "timestamp", "time", "datetime", "published", "published_at",
        "published_date", "publish_date", "publication_date", "pubdate", "pub_date", "posted", "posted_at", "day",
        "year", "updated", "updated_at", "modified_at", "crawl_date", "front.date", "path_date",
    ),
    "id": ("id", "_id", "doc_id", "document_id", "page_id", "post_id", "uuid", "guid", "doi", "url", "uri", "link",
           "permalink", "path"),
    "group": ("group", "source", "site", "domain", "subreddit", "channel", "community", "category", "forum", "package",
              "section", "feed", "folder"),
}  # fmt: skip
"""Names that speak for a role, the best first; they count with and without the structs around them."""


@dataclass
class Survey:
    """What the first rows say."""

    inputs: Inputs
    n_rows: int
    columns: dict[str, list[Any]]
    """Dotted name -> sampled values."""
    guess: dict[str, str | None] = field(default_factory=dict)
    """Role -> column; None: no column fits."""
    reasons: dict[str, str] = field(default_factory=dict)
    layout: Settled | None = None
    """How the date column reads."""
    separator: str | None = None

    def examples(self, column: str, n: int = 3) -> list[str]:
        """Return some distinct values of a column, shortened to a line."""
        found: dict[str, None] = {}
        for value in self.columns[column]:
            if value is not None and str(value).strip():
                text = " ".join(str(value).split())
                found[text if len(text) <= 60 else text[:57] + "…"] = None
        return list(found)[:n]


def survey(inputs: Inputs, rules: _readers.ReadRules, given: Mapping[str, str | None]) -> Survey:
    """Look at the first rows and guess the roles that are not given.

    Args:
        inputs: the files.
        rules: how their bytes are read.
        given: role -> column (or None: no column) that the user chose; ``order`` stands for a date.

    Raises:
        ConfigError: there are no rows, or a guess is not possible.
        NotFoundError: a given column is not there.
        IntegrityError: a file is damaged.
    """
    rows = sample(inputs, rules)
    if not rows:
        raise ConfigError("no row can be read", where=inputs.path(inputs.files[0]), mend="check file and format")
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = Survey(inputs, len(rows), {name: [row.get(name) for row in rows] for name in names})
    if inputs.format == "csv":
        found.separator = _readers.separator_of(inputs.path(inputs.files[0]), rules)
    for column in given.values():
        if column is not None and column not in found.columns:
            found.columns[column] = []  # a Parquet column of lists, say; the real reading refuses it
            if inputs.format == "parquet" and column in _schema(inputs):
                continue
            mend = did_you_mean(column, names)
            raise NotFoundError(f"no column {column!r} in the first rows", where=inputs.files[0], mend=mend)
    guessers = {"text": _guess_text, "date": _guess_date, "id": _guess_id, "group": _guess_group}
    for role in ROLES:
        if role in given or (role == "date" and "order" in given):
            found.guess[role] = given.get(role)
            continue
        taken = {column for column in (*found.guess.values(), *given.values()) if column}
        open_columns = {name: values for name, values in found.columns.items() if name not in taken}
        found.guess[role], found.reasons[role] = guessers[role](open_columns)
    if (column := found.guess["date"]) is not None:
        found.layout = settle(found.columns[column])
    return found


def _schema(inputs: Inputs) -> list[str]:
    """Return the names of all columns of the first Parquet file."""
    with _readers.open_parquet(inputs.path(inputs.files[0])) as file:
        return list(_readers.leaves(file.schema_arrow))


def sample(inputs: Inputs, rules: _readers.ReadRules) -> list[dict[str, Any]]:
    """Return the first rows of some files, flattened: dotted name -> value."""
    step = max(1, len(inputs.files) // (SAMPLE_ROWS if inputs.format == "text" else SAMPLE_FILES))
    chosen = inputs.files[::step]
    if inputs.format == "text":
        return [_flat(_readers.text_file(inputs.path(n), n, rules)) for n in chosen[:SAMPLE_ROWS]]
    per_file = max(1, SAMPLE_ROWS // min(len(chosen), SAMPLE_FILES))
    return [_flat(row) for name in chosen[:SAMPLE_FILES] for row in islice(_rows(inputs, name, rules), per_file)]


def _rows(inputs: Inputs, name: str, rules: _readers.ReadRules) -> Any:
    """Yield the rows of one file as dictionaries."""
    path = inputs.path(name)
    if inputs.format == "parquet":
        with _readers.open_parquet(path) as file:
            plain = [c for c, kind in _readers.leaves(file.schema_arrow).items() if "list" not in str(kind)]
            if file.metadata.num_rows == 0:
                return
            for batch in file.iter_batches(SAMPLE_ROWS, columns=plain, use_threads=False):
                columns = [_values(column) for column in batch.columns]
                yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))
        return
    with _readers.ByteStream(path) as raw:
        if inputs.format == "jsonl":
            for _, row in _readers.json_rows(path, raw, name, rules, _ignore):
                yield row
        else:
            yield from _readers.csv_dictionaries(path, raw, rules)


def _values(column: Any) -> list[Any]:
    """Return a column's values in Python; what Python cannot hold is None (the real reading counts it)."""
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_value(one) for one in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return bytes(scalar.as_buffer()).decode(errors="replace") if hasattr(scalar, "as_buffer") else None


def _ignore(kind: str, n: int, first: str) -> None:
    """Leave counting to the real reading."""


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> value; a dictionary of one value ({"$date": …}) stays what it is."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict) and not (len(value) == 1 and next(iter(value)).startswith("$")):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            value = next(iter(value.values())) if isinstance(value, dict) else value
            flat[f"{prefix}{key}"] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return flat


def _rank(role: str, column: str) -> int:
    """Return how well a column's name fits a role: 0 is best, the number of names: not at all."""
    known = NAMES[role]
    whole = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()
    last = whole.rpartition(".")[2]
    return min((known.index(name) for name in (whole, last) if name in known), default=len(known))


def _texts(values: Sequence[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str) and value.strip()]


def _guess_text(columns: Mapping[str, Sequence[Any]]) -> tuple[str, str]:
    """The column of that name, of several the longest; else the longest texts."""
    length = {}
    for name, values in columns.items():
        texts = _texts(values)
        if texts and len(texts) >= 0.5 * len(values):
            length[name] = sum(map(len, texts)) / len(texts)
    named = [name for name in length if _rank("text", name) < len(NAMES["text"])]
    long = [name for name in length if length[name] >= 40]
    if not (chosen := [name for name in named if name in long] or long or named):
        raise ConfigError("no column looks like text", mend=f"say which: {', '.join(columns) or 'there are none'}")
    best = max(chosen, key=lambda name: length[name])
    return best, f"{'its name, and ' if best in named else ''}{length[best]:,.0f} characters on average"


def _guess_date(columns: Mapping[str, Sequence[Any]]) -> tuple[str, str]:
    """The best name among the columns that read as dates; else the one that reads best."""
    found: list[tuple[int, float, str, Settled]] = []
    undecided: ConfigError | None = None
    for name, values in columns.items():
        rank = _rank("date", name)
        named = rank < len(NAMES["date"])
        try:
            settled = settle(values)
        except ConfigError as error:
            undecided = error if named else undecided
            continue
        # Numbers in a column of another name may be anything.
        if settled is not None and settled.share >= (0.8 if named else 0.95) and (named or settled.layout == "text"):
            found.append((rank, -settled.share, name, settled))
    found = [one for one in found if one[2] != "modified"]
    if not found:
        raise undecided or ConfigError("no column reads as dates", mend=f"say --date or --order: {', '.join(columns)}")
    rank, _, best, settled = min(found, key=lambda one: one[:3])
    reason = "its name, and " if rank < len(NAMES["date"]) else ""
    return best, f"{reason}{settled.share:.0%} of the values read as {settled.words}"


def _guess_id(columns: Mapping[str, Sequence[Any]]) -> tuple[str | None, str]:
    """A column of that name that is nearly always there."""
    named = sorted((_rank("id", name), name) for name in columns if _rank("id", name) < len(NAMES["id"]))
    for _, name in named:
        values = [value for value in columns[name] if value is not None and str(value).strip()]
        if len(values) >= 0.95 * len(columns[name]) and len(set(map(str, values))) >= 0.2 * len(values):
            return name, "its name"
    return None, "no column of such a name; equal texts are one document"


def _guess_group(columns: Mapping[str, Sequence[Any]]) -> tuple[str | None, str]:
    """A column of that name with few values."""
    named = sorted((_rank("group", name), name) for name in columns if _rank("group", name) < len(NAMES["group"]))
    for _, name in named:
        values = [str(value) for value in columns[name] if value is not None and str(value).strip()]
        if values and 1 < len(set(values)) <= max(2, len(values) // 2):
            return name, f"its name, and {len(set(values))} values in the sample"
    return None, "no column of such a name with few values"
