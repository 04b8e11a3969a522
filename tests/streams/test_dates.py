"""Dates of all kinds against answers written down by hand or computed by ``datetime``."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest

from clbench.errors import ConfigError
from clbench.seeds import permutation
from clbench.streams import _dates
from clbench.streams._dates import AMBIGUOUS, EPOCH_ZERO, MISSING, OK, TOO_EARLY, TOO_LATE, UNPARSABLE, DateRules
from clbench.streams._periods import bounds, cuts_of, keys_of, label_of

DAY = 86_400_000_000


def rules(layout: str = "text", **changes: Any) -> DateRules:
    return DateRules(layout=layout, earliest_us=-70 * 365 * DAY, latest_us=130 * 365 * DAY, **changes)


def read(values: list[Any], given: DateRules, kind: pa.DataType | None = None) -> list[datetime | int]:
    """Times, or states other than OK."""
    micros, state = _dates.read_dates(pa.array(values, kind), given)
    start = datetime(1970, 1, 1, tzinfo=UTC)
    return [start + timedelta(microseconds=int(m)) if s == OK else int(s) for m, s in zip(micros, state, strict=True)]


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2013-05-01", utc(2013, 5, 1)),
        (" 2013/5/1 ", utc(2013, 5, 1)),
        ("2013-05", utc(2013, 5, 1)),
        ("2013", utc(2013, 1, 1)),
        ("20130501", utc(2013, 5, 1)),
        ("2013-05-01T10:20:30Z", utc(2013, 5, 1, 10, 20, 30)),
        ("2013-05-01 10:20", utc(2013, 5, 1, 10, 20)),
        ("2013-05-01 10:20:30.123456789+00:00", utc(2013, 5, 1, 10, 20, 30, 123456)),
        ("2013-12-31T23:30:00-05:00", utc(2014, 1, 1, 4, 30)),
        ("2014-01-01 00:30 +0530", utc(2013, 12, 31, 19, 0)),
        ("2012-02-29", utc(2012, 2, 29)),
        ("2000-02-29", utc(2000, 2, 29)),
        ("2013-02-29", UNPARSABLE),
        ("1900-02-29", UNPARSABLE),
        ("2013-13-01", UNPARSABLE),
        ("2013-00-01", UNPARSABLE),
        ("2013-05-01T24:00:00", UNPARSABLE),
        ("1 May 2013", utc(2013, 5, 1)),
        ("May 1st, 2013", utc(2013, 5, 1)),
        ("Wednesday, 1 May 2013 10:20", utc(2013, 5, 1, 10, 20)),
        ("Wed, 01 May 2013 10:20:30 -0500", utc(2013, 5, 1, 15, 20, 30)),
        ("Wed May 01 10:20:30 +0000 2013", utc(2013, 5, 1, 10, 20, 30)),
        ("May 1, 2013 at 12:05 AM", utc(2013, 5, 1, 0, 5)),
        ("May 1, 2013 12:05 pm", utc(2013, 5, 1, 12, 5)),
        ("31 Apr 2013", UNPARSABLE),
        ("03/04/2020", AMBIGUOUS),
        ("13.04.2020", AMBIGUOUS),
        ("", MISSING),
        ("  ", MISSING),
        ("N/A", MISSING),
        (None, MISSING),
        ("soon", UNPARSABLE),
        ("0001-01-01", TOO_EARLY),
        ("9999-12-31", TOO_LATE),
        ("1970-01-01T00:00:00Z", EPOCH_ZERO),
        ("1970-01-01", utc(1970, 1, 1)),
    ],
)
def test_a_text(text: str, answer: datetime | int) -> None:
    assert read([text], rules()) == [answer]
    assert read(["2013-05-01", text, None], rules())[1] == answer, "beside others"


def test_day_and_month_stand_as_they_are_told_to() -> None:
    values = ["03/04/2020", "31-12-99 23:30", "04.13.2020", "03/04/2020 10:00+02:00"]
    dmy = [utc(2020, 4, 3), utc(1999, 12, 31, 23, 30), UNPARSABLE, utc(2020, 4, 3, 8)]
    mdy = [utc(2020, 3, 4), UNPARSABLE, utc(2020, 4, 13), utc(2020, 3, 4, 8)]
    assert read(values, rules("dmy")) == dmy
    assert read(values, rules("mdy")) == mdy


@pytest.mark.parametrize("name", ["Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Auckland"])
def test_times_without_a_zone_are_in_the_zone_that_is_named(name: str) -> None:
    """Every hour of two years, the changes of the clock in between, against ``zoneinfo``."""
    local = [datetime(2013, 1, 1) + timedelta(hours=7 * i) for i in range(2500)]
    answer = [moment.replace(tzinfo=ZoneInfo(name)).astimezone(UTC) for moment in local]
    exists = [a.astimezone(ZoneInfo(name)).replace(tzinfo=None) == m for a, m in zip(answer, local, strict=True)]
    for found in (
        read([m.isoformat() for m in local], rules(timezone=name)),
        read(local, rules(timezone=name), pa.timestamp("ms")),
    ):
        assert [f for f, e in zip(found, exists, strict=True) if e] == [
            a for a, e in zip(answer, exists, strict=True) if e
        ]
    assert read(["2013-07-01"], rules(timezone=name)) == [utc(2013, 7, 1)], "a day is a day"
    assert read([date(2013, 7, 1)], rules(timezone=name)) == [utc(2013, 7, 1)]
    assert read(["2013-07-01T10:00Z"], rules(timezone=name)) == [utc(2013, 7, 1, 10)]


def test_an_hour_that_the_clock_shows_twice_is_the_first_and_one_it_skips_is_the_next() -> None:
    values = ["2013-10-27 02:30:00", "2013-03-31 02:30:00"]
    assert read(values, rules(timezone="Europe/Berlin")) == [utc(2013, 10, 27, 0, 30), utc(2013, 3, 31, 1, 0)]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_every_unit_and_zone(unit: str) -> None:
    moment = datetime(2013, 12, 31, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
    zoned = pa.timestamp(unit, tz="America/New_York")
    assert read([moment, None], rules(), zoned) == [utc(2014, 1, 1, 4, 30), MISSING]
    assert read([datetime(2013, 5, 1, 10)], rules(), pa.timestamp(unit)) == [utc(2013, 5, 1, 10)]
    assert read([datetime(1970, 1, 1)], rules(), pa.timestamp(unit)) == [EPOCH_ZERO]
    assert read([datetime(1970, 1, 1)], rules(epoch_zero=True), pa.timestamp(unit)) == [utc(1970, 1, 1)]


def test_timestamps_out_of_every_range_do_not_wrap_around() -> None:
    assert read([2**62, -(2**62)], rules(), pa.timestamp("s")) == [TOO_LATE, TOO_EARLY]


@pytest.mark.parametrize(
    ("layout", "per_second"), [("epoch_s", 1), ("epoch_ms", 10**3), ("epoch_us", 10**6), ("epoch_ns", 10**9)]
)
def test_epochs(layout: str, per_second: int) -> None:
    values = [1_367_402_400 * per_second, 0, None, -per_second, 2**62]
    answer = [utc(2013, 5, 1, 10), EPOCH_ZERO, MISSING, utc(1969, 12, 31, 23, 59, 59), TOO_LATE]
    assert read(values, rules(layout)) == answer
    assert read([None if v is None else str(v) for v in values], rules(layout)) == answer
    assert _dates.settle(values[:1] * 3).layout == layout  # type: ignore[union-attr]
    assert read(["x", "1e5"], rules(layout)) == [UNPARSABLE, UNPARSABLE]


def test_numbers_of_other_kinds() -> None:
    assert read([1_367_402_400.5, float("nan")], rules("epoch_s")) == [utc(2013, 5, 1, 10, 0, 0, 500_000), MISSING]
    assert read([2013, 0, 5], rules("year")) == [utc(2013, 1, 1), UNPARSABLE, TOO_EARLY]
    assert read([20120229, 20130229], rules("ymd8")) == [utc(2012, 2, 29), UNPARSABLE]
    assert read(["1.5.2013 10h", "x"], rules("%d.%m.%Y %Hh")) == [utc(2013, 5, 1, 10), UNPARSABLE]
    with pytest.raises(ConfigError, match="how to read them is not said"):
        read([1_367_402_400], rules())


def test_what_a_sample_settles() -> None:
    def layout(values: list[Any]) -> str | None:
        found = _dates.settle(values)
        return None if found is None else found.layout

    assert layout(["2013-05-01", None, "2013-05-02T10:00Z"]) == "text"
    assert layout(["2013", "2014"]) == layout([2013, 2014]) == "year"
    assert layout([20130501, 20140501]) == "ymd8"
    assert layout(["a", "b", "2013-05-01"]) is None
    assert layout([1, 2, 3]) is None
    assert layout([]) is None
    assert layout(["31/12/2013", "01/02/2013"]) == "dmy"
    assert layout(["12/31/2013", "01/02/2013"]) == "mdy"
    for undecided in (["03/04/2020"], ["31/12/2013", "12/31/2013"]):
        with pytest.raises(ConfigError, match="dmy or mdy"):
            layout(undecided)


@pytest.mark.parametrize("every", ["year", "quarter", "month", "week", "day"])
def test_periods_of_the_calendar(every: str) -> None:
    """Each day lies in its period, periods touch, and labels sort as they follow."""
    days = np.arange(-800, 20_000, 3)
    keys = keys_of(days * DAY + DAY - 1, every, None)
    assert (keys == keys_of(days * DAY, every, None)).all()
    for day, key in zip(days.tolist()[::50], keys.tolist()[::50], strict=True):
        first, last = bounds(key, every)
        when = date(1970, 1, 1) + timedelta(day)
        assert first <= when <= last
        assert bounds(key + 1, every)[0] == last + timedelta(1)
        label = label_of(key, every, cuts=False)
        assert label < label_of(key + 1, every, cuts=False)
        if every == "week":
            assert label == when.strftime("%G-W%V")
        if every in ("year", "month", "day"):
            assert label == when.strftime({"year": "%Y", "month": "%Y-%m", "day": "%Y-%m-%d"}[every])


def test_equal_parts_are_equal() -> None:
    values = permutation(1003, 0, "test-dates")
    cuts = cuts_of(values, 4)
    counts = np.bincount(keys_of(values, "4", cuts))
    assert counts.max() - counts.min() <= 1
    with pytest.raises(ConfigError, match="too many are equal"):
        cuts_of(np.array([1, 1, 1, 2], np.int64), 3)
