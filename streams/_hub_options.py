"""What a specification of a hub stream may say, checked before anything is fetched, and the plan that follows from it.

Periods name data sets; several periods that read the same files of one data set share a *pass* over them, and each row
goes to the period that its date falls in. Reading is left to ``_hub_rows`` and ``_hub_reach``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
DATASET = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
HOST_OF = re.compile(r"host\((?P<column>[^()]+)\)")
FILTER = re.compile(r"(?P<column>[\w.-]+)\s*(?P<op>==|!=|<=|>=|<|>|\bnot in\b|\bin\b)\s*(?P<value>.+)", re.DOTALL)
LOCAL = ("/", "./", "../", "~")


def _several(value: Any) -> Any:
    """Take one text for a list of one."""
    return (value,) if isinstance(value, str) else value


def _text(value: Any) -> Any:
    """Undo what YAML makes of ``name: 2013`` and ``start: 2013-05-01``."""
    if isinstance(value, datetime | bool):
        return value
    return value.isoformat() if isinstance(value, date) else str(value) if isinstance(value, int) else value


def _day(value: str) -> str:
    """Return a day as ``2013-05-01``."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        raise ValueError(f"{value!r} is not a day such as 2013-05-01")
    return date.fromisoformat(value).isoformat()


def _label(value: str) -> str:
    if not LABEL.fullmatch(value):
        raise ValueError(f"{value!r} may hold letters, digits, '-', '_' and '.' only")
    return value


def _dataset(value: str) -> str:
    if not value.startswith(LOCAL) and not DATASET.fullmatch(value):
        raise ValueError(f"{value!r} is neither an id such as OWNER/NAME nor a folder (./FOLDER)")
    return value


class Filter(NamedTuple):
    """Rows are kept whose ``column`` compares so with ``value``; a missing value is never kept."""

    column: str
    op: str
    value: Any


def read_filter(text: str) -> Filter:
    """Read ``language_score >= 0.8`` or ``kind in [1, 2]``: a column, an operator, a number, a text or a list.

    Raises:
        ValueError: it cannot be read so.
    """
    match = FILTER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"filter {text!r} cannot be read; write COLUMN OP VALUE with OP one of == != < <= > >= in")
    try:
        value = yaml.safe_load(match["value"])
    except yaml.YAMLError:
        raise ValueError(f"the value of filter {text!r} cannot be read") from None
    op = match["op"]
    plain = (str, int, float, bool)
    is_list = isinstance(value, list) and value and all(isinstance(item, plain) for item in value)
    if not (is_list if op in ("in", "not in") else isinstance(value, plain)):
        wanted = "a list such as [1, 2]" if op in ("in", "not in") else "a number or a text"
        raise ValueError(f"the value of filter {text!r} is not {wanted}")
    return Filter(match["column"], op, value)


def _readable(filters: tuple[str, ...] | None) -> tuple[str, ...] | None:
    for text in filters or ():
        read_filter(text)
    return filters


Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]
Filters = Annotated[tuple[str, ...] | None, BeforeValidator(_several), AfterValidator(_readable)]
Text = Annotated[str, BeforeValidator(_text)]
Day = Annotated[Text, AfterValidator(_day)]
Dataset = Annotated[str, AfterValidator(_dataset)]
Cap = Annotated[int | None, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(_Strict):
    """Which columns hold what."""

    text: Texts = Field(min_length=1)
    """One column, or several whose texts are joined by an empty line."""
    id: str | None = None
    """Identity over time (an address, a title); without it the text itself is the identity."""
    date: str | None = None
    """ISO-8601 text, a timestamp, or seconds since 1970; without it every document has the period's last day."""
    group: str | None = None
    """A column, or ``host(COLUMN)`` for the host of an address; without it the data set's name."""

    def needed(self) -> tuple[str, ...]:
        """Return the columns that have to be read."""
        host = HOST_OF.fullmatch(self.group or "")
        group = host["column"] if host else self.group
        return tuple(dict.fromkeys(name for name in (*self.text, self.id, self.date, group) if name))


class Origin(_Strict):
    """Where the rows of a period come from; what is left out is the period's, then the stream's."""

    dataset: Dataset | None = None
    revision: Text | None = None
    config: Text | None = None
    split: str | None = None
    data_files: Texts | None = None
    columns: Columns | None = None
    filters: Filters = None
    pieces: int | None = Field(default=None, ge=1)
    max_documents: Cap = None
    max_bytes: Cap = None
    max_tokens: Cap = None


class Period(Origin):
    """One stage: a name, its days (inclusive), and its origin, or several ``sources``."""

    name: Annotated[Text, AfterValidator(_label)]
    start: Day
    end: Day
    sources: tuple[Origin, ...] = ()

    @model_validator(mode="after")
    def _in_order(self) -> Period:
        if self.start > self.end:
            raise ValueError(f"period {self.name} ends before it starts")
        return self


class Caps(NamedTuple):
    """The most that one period takes from one origin; None: no bound."""

    max_documents: int | None
    max_bytes: int | None
    max_tokens: int | None


@dataclass(frozen=True)
class Place:
    """Files of one data set at one revision and how their rows are read: what one pass goes over."""

    dataset: str
    revision: str
    config: str | None
    split: str
    data_files: tuple[str, ...]
    columns: Columns
    filters: tuple[str, ...]
    pieces: int

    @property
    def is_local(self) -> bool:
        """Whether the data set is named by its folder."""
        return self.dataset.startswith(LOCAL)

    @property
    def key(self) -> str:
        """Name of the data set at its revision."""
        return f"{self.dataset}@{self.revision}" if self.revision else self.dataset

    def __str__(self) -> str:
        return " ".join(part for part in (self.dataset, self.config, *self.data_files) if part)


@dataclass(frozen=True)
class Pass:
    """One place and the periods that take rows from it, with what each may take."""

    place: Place
    periods: dict[str, Caps]


def resolved(period: Period, defaults: Origin) -> list[tuple[Place, Caps]]:
    """Return the places a period takes rows from, every field filled in.

    Raises:
        ValueError: no data set or no text column is given.
    """
    return [_place(period.name, chain) for chain in _chains(period, defaults)]


def _chains(period: Period, defaults: Origin) -> list[tuple[Origin, ...]]:
    return [(source, period, defaults) for source in period.sources] or [(period, defaults)]


def _place(period: str, chain: Sequence[Origin]) -> tuple[Place, Caps]:
    """Take every field from the first of the chain that gives it."""

    def first(field: str, otherwise: Any) -> Any:
        return next((value for origin in chain if (value := getattr(origin, field)) is not None), otherwise)

    dataset, columns = first("dataset", None), first("columns", None)
    if dataset is None or columns is None:
        raise ValueError(f"period {period} has no {'dataset' if dataset is None else 'columns'}")
    # A revision, a configuration and files belong to the data set that they stand beside; another one inherits none.
    own = [origin for i, origin in enumerate(chain) if _dataset_of(chain[i:]) == dataset]
    place = Place(
        dataset=dataset,
        revision=next((origin.revision for origin in own if origin.revision), ""),
        config=next((origin.config for origin in own if origin.config is not None), None),
        split=first("split", "train"),
        data_files=next((origin.data_files for origin in own if origin.data_files), ()),
        columns=columns,
        filters=first("filters", ()),
        pieces=first("pieces", 1),
    )
    return place, Caps(first("max_documents", None), first("max_bytes", None), first("max_tokens", None))


def _dataset_of(chain: Sequence[Origin]) -> str | None:
    return next((origin.dataset for origin in chain if origin.dataset is not None), None)


def passes(periods: Sequence[Period], defaults: Origin) -> list[Pass]:
    """Return every distinct place once, in the order in which periods name them.

    Raises:
        ValueError: two periods take from one place that has no date column, or one period takes from it twice.
    """
    found: dict[str, Pass] = {}
    for period in periods:
        for place, caps in resolved(period, defaults):
            known = found.setdefault(repr(place), Pass(place, {}))
            if known.periods and place.columns.date is None:
                raise ValueError(
                    f"periods {next(iter(known.periods))} and {period.name} read the same rows of {place}, and no date "
                    "column tells them apart"
                )
            if period.name in known.periods:
                raise ValueError(f"period {period.name} names {place} twice")
            known.periods[period.name] = caps
    return list(found.values())


def check_periods(periods: Sequence[Period]) -> None:
    """Refuse periods that repeat a name, go back in time or overlap.

    Raises:
        ValueError: says which.
    """
    if not periods:
        raise ValueError("a stream needs at least one period")
    for earlier, later in pairwise(periods):
        if later.start <= earlier.end:
            raise ValueError(f"period {later.name} starts before {earlier.name} ends")
    names = [period.name for period in periods]
    if len(set(names)) < len(names):
        raise ValueError("two periods have one name")


def describe(origin: Place, caps: Caps, identity: Mapping[str, str]) -> dict[str, Any]:
    """Return what of an origin decides documents; ``identity`` says which bytes: a revision, or files' digest."""
    return {
        "dataset": origin.dataset.rstrip("/").rpartition("/")[2] if origin.is_local else origin.dataset,
        **identity,
        "config": origin.config,
        "split": origin.split,
        "data_files": list(origin.data_files),
        "columns": origin.columns.model_dump(mode="json"),
        "filters": list(origin.filters),
        "pieces": origin.pieces,
        **caps._asdict(),
    }
