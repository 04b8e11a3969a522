"""Periods of time: which one a moment falls into, what it is called, when it begins and ends.

A period has a label that sorts as its dates do: 2013, 2013-Q2, 2013-05, 2013-W18, 2013-05-01; or, for equal parts and
values of an order column, a number. Joining periods that are too small into stages is done here too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError
from clbench.ingest import StagePlan
from clbench.streams._dates import DAY_US

CALENDAR = ("year", "quarter", "month", "week", "day")
MAX_STAGES = 500
MAX_PARTS = 100
FIRST_INVENTED_YEAR = 2001
"""Stages of an order column have no dates; they are given one year each, as in ``tinydocs``."""
_EPOCH = date(1970, 1, 1)


def check_every(every: str, *, ordered: bool) -> None:
    """Refuse what is neither a period of the calendar nor a number of parts (or ``value``, of an order column).

    Raises:
        ConfigError: says what there is.
    """
    parts = every.isdecimal() and 2 <= int(every) <= MAX_PARTS
    if not (parts or (ordered and every == "value") or (not ordered and every in CALENDAR)):
        known = "value" if ordered else ", ".join(CALENDAR)
        raise ConfigError(f"every is {every!r}", mend=f"use {known}, or a number of equal parts from 2 to {MAX_PARTS}")


def keys_of(micros: NDArray[np.int64], every: str, cuts: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return the number of the period of every moment, shape ``[n]``."""
    if cuts is not None:
        return np.searchsorted(cuts, micros, side="right").astype(np.int64)
    if every == "value":
        return micros
    days = micros // DAY_US
    if every == "day":
        return days
    if every == "week":
        return (days + 3) // 7  # 1 January 1970 was a Thursday; weeks begin on Monday
    months = days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
    return months // {"year": 12, "quarter": 3, "month": 1}[every]


def label_of(key: int, every: str, *, cuts: bool) -> str:
    """Return the label of a period."""
    if cuts:
        return f"part-{key + 1:02d}"
    if every == "value":
        return str(key)
    first, _ = bounds(key, every)
    if every == "week":
        year, week, _ = first.isocalendar()
        return f"{year}-W{week:02d}"
    return {
        "year": f"{first.year:04d}",
        "quarter": f"{first.year:04d}-Q{(first.month + 2) // 3}",
        "month": f"{first.year:04d}-{first.month:02d}",
        "day": first.isoformat(),
    }[every]


def bounds(key: int, every: str) -> tuple[date, date]:
    """Return the first and the last day of a period of the calendar."""
    if every == "day":
        return _EPOCH + timedelta(key), _EPOCH + timedelta(key)
    if every == "week":
        monday = _EPOCH + timedelta(7 * key - 3)
        return monday, monday + timedelta(6)
    n = {"year": 12, "quarter": 3, "month": 1}[every]
    first, after = n * key, n * (key + 1)
    return date(1970 + first // 12, first % 12 + 1, 1), date(1970 + after // 12, after % 12 + 1, 1) - timedelta(1)


def cuts_of(values: NDArray[np.int64], n_parts: int) -> NDArray[np.int64]:
    """Return the first value of every part but the first, so that parts are as equal as equal values allow.

    Raises:
        ConfigError: there are fewer distinct values than parts.
    """
    values = np.sort(values)
    cuts = np.unique(values[[len(values) * k // n_parts for k in range(1, n_parts)]]) if len(values) else values
    cuts = cuts[cuts > values[0]] if len(values) else cuts
    if len(cuts) < n_parts - 1:
        raise ConfigError(
            f"the dates or orders do not fall into {n_parts} parts: too many are equal", mend="ask for fewer parts"
        )
    return cuts


@dataclass(frozen=True)
class Found:
    """One period that has documents: its number, label, documents, and its first and last moment."""

    key: int
    label: str
    documents: int
    first_us: int
    last_us: int


def plan_stages(
    found: Sequence[Found], *, every: str, dated: bool, small: str, min_documents: int
) -> tuple[list[StagePlan], dict[str, Any]]:
    """Join periods into stages; returns them, and what has to be said about it.

    Raises:
        ConfigError: too few or too many stages, or a stage is too small and that was to be refused.
    """
    found = sorted(found, key=lambda period: period.key)
    too_small = [period for period in found if period.documents < min_documents]
    if too_small and small == "refuse":
        names = ", ".join(f"{p.label} ({p.documents})" for p in too_small[:10])
        raise ConfigError(
            f"{len(too_small)} periods have fewer than {min_documents} documents: {names}",
            mend="choose longer periods, a smaller min_documents, or small merge or drop",
        )
    if small == "drop":
        found = [period for period in found if period.documents >= min_documents]
    groups = _merged(found, min_documents)
    if len(groups) < 2:
        total = sum(period.documents for period in found)
        raise ConfigError(
            f"{len(groups)} stage is left of {total} documents" if groups else "no stage is left",
            mend="choose shorter periods, a number of parts, or a smaller min_documents",
        )
    if len(groups) > MAX_STAGES:
        raise ConfigError(f"{len(groups)} stages are more than {MAX_STAGES}", mend="choose longer periods")
    notes = {
        "merged": [[period.label for period in group] for group in groups if len(group) > 1],
        "dropped_periods": {p.label: p.documents for p in too_small} if small == "drop" else {},
        "empty_periods": _gaps(found, every),
    }
    return [_stage(index, group, every, dated=dated) for index, group in enumerate(groups)], notes


def _merged(found: Sequence[Found], min_documents: int) -> list[list[Found]]:
    """Join every period that is too small with the next ones, the last with the one before."""
    groups: list[list[Found]] = [[]]
    for period in found:
        if sum(p.documents for p in groups[-1]) >= min_documents:
            groups.append([])
        groups[-1].append(period)
    if len(groups) > 1 and sum(p.documents for p in groups[-1]) < min_documents:
        groups[-2].extend(groups.pop())
    return [group for group in groups if group]


def _gaps(found: Sequence[Found], every: str) -> list[str]:
    """Return the labels of periods of the calendar between others that have no document (at most 100)."""
    if every not in CALENDAR or not found:
        return []
    present = {period.key for period in found}
    missing = (key for key in range(found[0].key, found[-1].key) if key not in present)
    return [label_of(key, every, cuts=False) for key, _ in zip(missing, range(100), strict=False)]


def _stage(index: int, group: Sequence[Found], every: str, *, dated: bool) -> StagePlan:
    name = group[0].label if len(group) == 1 else f"{group[0].label}..{group[-1].label}"
    if not dated:
        year = FIRST_INVENTED_YEAR + index
        start, end = f"{year}-01-01", f"{year}-12-31"
    elif every in CALENDAR:
        start, end = bounds(group[0].key, every)[0].isoformat(), bounds(group[-1].key, every)[1].isoformat()
    else:
        start = day_of(min(p.first_us for p in group))
        end = day_of(max(p.last_us for p in group))
    return StagePlan(name=name, start=start, end=end, periods=tuple(period.label for period in group))


def day_of(micros: int) -> str:
    """Return the day of a moment in UTC."""
    return str(np.datetime64(micros // DAY_US, "D"))


def micros_of_day(text: str, option: str, *, after: bool = False) -> int:
    """Return when a day of an option begins, or ends with ``after``, in microseconds.

    Raises:
        ConfigError: it is not a day such as 2013-05-01.
    """
    try:
        if not re.fullmatch(r"\d{4}(-\d\d(-\d\d)?)?", text):
            raise ValueError
        year, month, day = (int(part) for part in (f"{text}-01-01")[:10].split("-"))
        first = date(year, month, day)
        last = first
        if after and len(text) == 4:
            last = date(year, 12, 31)
        elif after and len(text) == 7:
            last = date(year + month // 12, month % 12 + 1, 1) - timedelta(1)
    except ValueError:
        raise ConfigError(f"{option} is {text!r}", mend="write a day such as 2013-05-01") from None
    return ((last if after else first) - _EPOCH).days * DAY_US + (DAY_US if after else 0)


def ranges_of(records: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, tuple[int, int, int]]:
    """Join the (key, first, last) of every label over units."""
    total: dict[str, tuple[int, int, int]] = {}
    for record in records:
        for label, (key, first, last) in record.items():
            before = total.get(label, (key, first, last))
            total[label] = (key, min(first, before[1]), max(last, before[2]))
    return total
