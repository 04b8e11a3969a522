"""Dates as they come in files: Parquet timestamps, ISO and common texts, epochs, years; all to microseconds in UTC.

``read_dates`` takes a column and says, row by row, the time or what is wrong with it. ``settle`` looks at a sample and
says how a column has to be read. The order of day and month is never guessed here. Columns are read at once; only
layouts with names of months go through Python row by row, once per distinct text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from datetime import timezone as timezone_type
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

OK, MISSING, UNPARSABLE, AMBIGUOUS, TOO_EARLY, TOO_LATE, EPOCH_ZERO = range(7)
PROBLEMS = {
    MISSING: "missing date",
    UNPARSABLE: "unreadable date",
    AMBIGUOUS: "date whose order of day and month is not known",
    TOO_EARLY: "date too early",
    TOO_LATE: "date too late",
    EPOCH_ZERO: "date 1970-01-01T00:00:00, the zero of computer clocks",
}
EPOCHS = {"epoch_s": 1_000_000, "epoch_ms": 1_000, "epoch_us": 1, "epoch_ns": -1_000}
"""Microseconds in a unit; negative: units in a microsecond."""
FORMATS = ("text", "dmy", "mdy", "year", "ymd8", *EPOCHS)
DAY_US = 86_400_000_000
LIMIT_DAYS = 3_000_000
"""Days from 1970 beyond which nothing is computed: the year 10183."""
_NOTHING = ("", "na", "n/a", "nan", "nat", "nil", "none", "null", "-", "?", "unknown")
_TIME = (
    r"(?:[T ,]+(?P<H>[0-9]{1,2}):(?P<M>[0-9]{2})(?::(?P<S>[0-9]{2})(?:[.,](?P<f>[0-9]{1,9}))?)?"
    r"\s*(?P<z>[Zz]|UTC|GMT|[+-][0-9]{2}(?::?[0-9]{2})?)?)?\s*$"
)
_ISO = r"^\s*(?P<y>[0-9]{4})(?:[-/.](?P<m>[0-9]{1,2})(?:[-/.](?P<d>[0-9]{1,2}))?)?" + _TIME
_TWO = r"^\s*(?P<a>[0-9]{1,2})[-/. ](?P<b>[0-9]{1,2})[-/. ](?P<y>[0-9]{4}|[0-9]{2})" + _TIME
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_CLOCK = (
    r"(?P<H{0}>\d{{1,2}}):(?P<M{0}>\d\d)(?::(?P<S{0}>\d\d))?(?:\s*(?P<p{0}>[ap])\.?m\.?)?"
    r"(?:\s*(?P<z{0}>Z|UTC|GMT|[+-]\d\d:?\d\d))?"
)
_NAMED = re.compile(
    r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*[\s,]+)?(?:(?P<d1>\d{1,2})(?:st|nd|rd|th)?[\s/.-]+)?"
    rf"(?P<m>{'|'.join(_MONTHS)})[a-z]*[\s,./-]+(?:(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?[\s,]+)?"
    rf"(?:{_CLOCK.format(1)}\s+)?(?P<y>\d{{4}})(?:[\s,:T]+(?:at\s+)?{_CLOCK.format(2)})?",
    re.IGNORECASE,
)
"""1 May 2013, May 1st, 2013 10:00, Wed, 01 May 2013 10:00:00 -0500, Tue May 01 10:00:00 +0000 2013, May 2013."""


@dataclass(frozen=True, kw_only=True)
class DateRules:
    """How a column is read. ``layout`` is one of FORMATS or holds a % (see ``datetime.strptime``)."""

    layout: str
    timezone: str = "UTC"
    earliest_us: int
    latest_us: int
    """Exclusive."""
    epoch_zero: bool = False
    """Take 1970-01-01T00:00:00 for a date."""


Read = tuple[NDArray[np.int64], NDArray[np.uint8]]


def zone(name: str) -> ZoneInfo:
    """Return a time zone.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ConfigError(
            f"no time zone {name!r}", where="timezone", mend="use a name such as UTC or Europe/Berlin"
        ) from None


def check_layout(layout: str) -> None:
    """Refuse a layout that nobody can read.

    Raises:
        ConfigError: it is neither one of FORMATS nor a format of ``strptime``.
    """
    if layout not in FORMATS and "%" not in layout:
        raise ConfigError(f"dateformat is {layout!r}", mend=f"use {', '.join(FORMATS)} or a format such as %d.%m.%Y")


def read_dates(column: pa.Array, rules: DateRules) -> Read:
    """Return microseconds since 1970 in UTC, shape ``[n]``, and what each row is (OK or a key of PROBLEMS)."""
    import pyarrow as pa
    import pyarrow.types as types

    kind = column.type
    if types.is_null(kind):
        micros, state = np.zeros(len(column), np.int64), np.full(len(column), MISSING, np.uint8)
        return micros, state
    if types.is_timestamp(kind):
        micros, state, exact = _timestamps(column, rules)
    elif types.is_date(kind):
        days = column.cast(pa.date32()).cast(pa.int32()).fill_null(0).to_numpy(zero_copy_only=False)
        micros, state = days.astype(np.int64) * DAY_US, _missing(column)
        exact = np.zeros(len(column), bool)
    elif types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        micros, state, exact = _numbers(column, rules)
    else:
        micros, state, exact = _texts(column.cast(pa.string()), rules)
    good = state == OK
    state[good & (micros < rules.earliest_us)] = TOO_EARLY
    state[good & (micros >= rules.latest_us)] = TOO_LATE
    if not rules.epoch_zero:
        state[good & exact & (micros == 0)] = EPOCH_ZERO
    return micros, state


def _missing(column: pa.Array) -> NDArray[np.uint8]:
    return np.where(column.is_null().to_numpy(zero_copy_only=False), MISSING, OK).astype(np.uint8)


def _timestamps(column: pa.Array, rules: DateRules) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    """Read a column of timestamps of any unit; without a zone they are in the zone of the rules."""
    import pyarrow as pa

    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
    state = _missing(column)
    ticks = column.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    far = np.abs(ticks // per_second) > LIMIT_DAYS * 86_400
    late = far & (ticks > 0)
    ticks = np.where(far, 0, ticks)
    micros = ticks // (per_second // 10**6) if per_second > 10**6 else ticks * (10**6 // per_second)
    if column.type.tz is None:
        micros = _to_utc(micros, rules.timezone)
    state[far & (state == OK)] = TOO_EARLY
    state[late & (state == TOO_EARLY)] = TOO_LATE
    return micros, state, ~far


def _to_utc(micros: NDArray[np.int64], timezone: str) -> NDArray[np.int64]:
    """Return the UTC times of local clock times; a time that a clock shows twice is the earlier one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if timezone == "UTC":
        return micros
    local = pa.array(micros).cast(pa.timestamp("us"))
    known = pc.assume_timezone(local, timezone, ambiguous="earliest", nonexistent="latest")
    utc: NDArray[np.int64] = known.cast(pa.int64()).to_numpy(zero_copy_only=False)
    return utc


def _numbers(column: pa.Array, rules: DateRules) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    """Read a column of numbers as the layout says: an epoch, a year, or eight digits."""
    import pyarrow as pa
    import pyarrow.types as types

    state = _missing(column)
    if types.is_integer(column.type):
        values = column.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    else:
        floats = column.cast(pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False)
        state[np.isnan(floats) & (state == OK)] = MISSING
        floats = np.nan_to_num(floats, nan=0.0, posinf=1e18, neginf=-1e18)
        if (scale := EPOCHS.get(rules.layout)) is not None and scale > 1:  # keep fractions of a second
            limit = LIMIT_DAYS * DAY_US * 2.0
            return _epoch(np.clip(floats * scale, -limit, limit).astype(np.int64), 1, state)
        values = np.clip(floats, -9e18, 9e18).astype(np.int64)
    if (scale := EPOCHS.get(rules.layout)) is not None:
        return _epoch(values, scale, state)
    one = np.ones(len(values), np.int64)
    if rules.layout == "year":
        micros, fine = _civil(values, one, one)
    elif rules.layout == "ymd8":
        micros, fine = _civil(values // 10_000, values // 100 % 100, values % 100)
    else:
        raise ConfigError(
            "dates are numbers, and how to read them is not said",
            where="dateformat",
            mend="say year, ymd8, epoch_s, epoch_ms, epoch_us or epoch_ns",
        )
    state[~fine & (state == OK)] = UNPARSABLE
    return micros, state, np.zeros(len(values), bool)


def _epoch(
    values: NDArray[np.int64], scale: int, state: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    limit = LIMIT_DAYS * DAY_US // scale if scale > 0 else LIMIT_DAYS * DAY_US
    micros = values // -scale if scale < 0 else np.clip(values, -limit, limit) * scale
    return np.clip(micros, -LIMIT_DAYS * DAY_US, LIMIT_DAYS * DAY_US), state, np.ones(len(values), bool)


def _civil(
    year: NDArray[np.int64], month: NDArray[np.int64], day: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return midnights in microseconds, and which of the days exist."""
    fine = (year >= 1) & (year <= 9999) & (month >= 1) & (month <= 12) & (day >= 1)
    year, month, day = (np.where(fine, x, 1) for x in (year, month, day))
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    lengths = ((months + 1).astype("datetime64[D]") - months.astype("datetime64[D]")).astype(np.int64)
    fine &= day <= lengths
    days = months.astype("datetime64[D]").astype(np.int64) + day - 1
    return days * DAY_US, fine


def _texts(column: pa.Array, rules: DateRules) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    """Read a column of texts as the layout says."""
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = pc.ascii_lower(pc.utf8_trim_whitespace(column))
    nothing = pc.or_kleene(pc.is_null(plain), pc.is_in(plain, value_set=pa.array(_NOTHING)))
    absent = nothing.fill_null(True).to_numpy(zero_copy_only=False)
    if rules.layout in EPOCHS or rules.layout in ("year", "ymd8"):
        number = pc.match_substring_regex(plain, r"^[+-]?[0-9]{1,19}(\.[0-9]*)?$").fill_null(False)
        values = pc.if_else(number, plain, pa.scalar(None, pa.string()))
        whole = not pc.any(pc.match_substring(values, "."), min_count=0).as_py()
        try:
            numbers = values.cast(pa.int64() if whole else pa.float64())
        except pa.ArrowInvalid:  # nineteen digits that are more than an int64
            numbers = values.cast(pa.float64())
        micros, state, exact = _numbers(numbers, rules)
        state[~number.to_numpy(zero_copy_only=False)] = UNPARSABLE
    elif "%" in rules.layout:
        micros, state, exact = _row_by_row(column, lambda text: _by_format(text, rules.layout, rules.timezone))
    elif rules.layout in ("dmy", "mdy"):
        micros, state, exact = _by_pattern(column, _TWO, rules)
    else:
        micros, state, exact = _by_pattern(column, _ISO, rules)
        if (rest := np.flatnonzero((state == UNPARSABLE) & ~absent)).size:
            found = _row_by_row(column.take(pa.array(rest)), lambda text: _by_trial(text, rules.timezone))
            micros[rest], state[rest], exact[rest] = found
    state[absent] = MISSING
    return micros, state, exact


def _by_pattern(
    column: pa.Array, pattern: str, rules: DateRules
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    """Read texts that one regular expression takes apart."""
    import pyarrow.compute as pc

    parts = pc.extract_regex(column, pattern)
    matched = parts.is_valid().to_numpy(zero_copy_only=False)

    def number(name: str, default: int) -> NDArray[np.int64]:
        return _integers(pc.struct_field(parts, name), default)

    year = number("y", 1)
    if pattern is _TWO:
        short = pc.equal(pc.utf8_length(pc.struct_field(parts, "y")), 2).fill_null(False)
        year += np.where(short.to_numpy(zero_copy_only=False), np.where(year < 69, 2000, 1900), 0)  # as POSIX does
        first, second = number("a", 1), number("b", 1)
        month, day = (second, first) if rules.layout == "dmy" else (first, second)
    else:
        month, day = number("m", 1), number("d", 1)
    micros, fine = _civil(year, month, day)
    hour, minute, second = number("H", 0), number("M", 0), number("S", 0)
    fine &= (hour < 24) & (minute < 60) & (second < 61)
    has_time = pc.struct_field(parts, "H")
    timed = pc.not_equal(has_time, "").fill_null(False).to_numpy(zero_copy_only=False)
    fraction = pc.utf8_slice_codeunits(pc.utf8_rpad(pc.struct_field(parts, "f"), 6, "0"), 0, 6)
    micros = micros + (hour * 3600 + minute * 60 + second) * 1_000_000 + _integers(fraction, 0)
    zones = pc.struct_field(parts, "z")
    zoned = pc.not_equal(zones, "").fill_null(False).to_numpy(zero_copy_only=False)
    micros -= np.where(zoned, _offsets(zones), 0)
    local = matched & fine & timed & ~zoned
    if local.any():
        micros[local] = _to_utc(micros[local], rules.timezone)
    state = np.where(matched & fine, OK, UNPARSABLE).astype(np.uint8)
    return micros, state, timed


def _integers(texts: pa.Array, default: int) -> NDArray[np.int64]:
    """Return texts of digits as integers; ``default`` where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    digits = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    values: NDArray[np.int64] = digits.cast(pa.int64()).fill_null(default).to_numpy(zero_copy_only=False)
    return values.copy()


def _offsets(zones: pa.Array) -> NDArray[np.int64]:
    """Return how far zones such as +05:30 are ahead of UTC, in microseconds; 0 for names of UTC."""
    import pyarrow.compute as pc

    parts = pc.extract_regex(zones, r"^(?P<s>[+-])(?P<h>[0-9]{2}):?(?P<m>[0-9]{0,2})$")
    minutes = 60 * _integers(pc.struct_field(parts, "h"), 0) + _integers(pc.struct_field(parts, "m"), 0)
    behind = pc.equal(pc.struct_field(parts, "s"), "-").fill_null(False).to_numpy(zero_copy_only=False)
    return np.where(behind, -minutes, minutes) * 60_000_000


_Found = tuple[int, int, bool]
"""Microseconds, state, and whether a time of day was given."""


def _row_by_row(
    column: pa.Array, read: Callable[[str], _Found]
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    found = [(0, MISSING, False) if text is None else read(text) for text in column.to_pylist()]
    micros, state, exact = zip(*found, strict=True) if found else ((), (), ())
    return np.array(micros, np.int64), np.array(state, np.uint8), np.array(exact, bool)


@lru_cache(65_536)
def _by_format(text: str, layout: str, timezone: str) -> _Found:
    """Read one text by a format of ``strptime``."""
    try:
        moment = datetime.strptime(text.strip(), layout)
    except ValueError:
        return 0, UNPARSABLE, False
    return _micros_of(moment, timezone, timed=re.search(r"%[HIXcsT]", layout) is not None)


@lru_cache(65_536)
def _by_trial(text: str, timezone: str) -> _Found:
    """Read one text in a common layout: compact ISO, mail headers, names of months."""
    if re.match(_TWO, text):
        return 0, AMBIGUOUS, False
    text = text.strip()
    if (named := _NAMED.fullmatch(text)) is not None:
        return _by_name(named, timezone)
    if re.fullmatch(r"\d{8}(T\d{4,6}([.,]\d+)?(Z|[+-]\d\d:?(\d\d)?)?)?", text):
        try:
            return _micros_of(datetime.fromisoformat(text), timezone, timed="T" in text)
        except ValueError:
            pass
    return 0, UNPARSABLE, False


def _by_name(match: re.Match[str], timezone: str) -> _Found:
    """Read a date with the name of its month."""
    month = _MONTHS.index(match["m"].lower()) + 1
    if match["d1"] and match["d2"]:
        return 0, UNPARSABLE, False
    clock = "1" if match["H1"] else "2"
    hour = int(match[f"H{clock}"] or 0)
    if half := match[f"p{clock}"]:
        hour = hour % 12 + (12 if half in "pP" else 0) if 1 <= hour <= 12 else 24
    sign = match[f"z{clock}"]
    try:
        moment = datetime(
            int(match["y"]),
            month,
            int(match["d1"] or match["d2"] or 1),
            hour,
            int(match[f"M{clock}"] or 0),
            int(match[f"S{clock}"] or 0),
            tzinfo=None if sign is None else _fixed(sign),
        )
    except ValueError:
        return 0, UNPARSABLE, False
    return _micros_of(moment, timezone, timed=match[f"H{clock}"] is not None)


def _fixed(sign: str) -> timezone_type:
    """Return the zone of a text such as UTC or +0530."""
    if not sign[1:2].isdigit():
        return UTC
    minutes = int(sign[1:3]) * 60 + int(sign[-2:])
    return timezone_type(timedelta(minutes=-minutes if sign[0] == "-" else minutes))


def _micros_of(moment: datetime, timezone: str, *, timed: bool) -> _Found:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone(timezone) if timed else UTC)
    try:
        since = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    except OverflowError:
        return 0, UNPARSABLE, timed
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds, OK, timed


@dataclass(frozen=True, kw_only=True)
class Settled:
    """How a column of dates reads: its layout, in words, and whether somebody has to confirm it."""

    layout: str
    words: str
    share: float
    """Of the values that are there, how many can be read so."""
    sure: bool = True


def settle(values: Sequence[Any]) -> Settled | None:
    """Say how a sample of values reads as dates; None when it does not.

    Raises:
        ConfigError: days and months stand in an order that the sample does not settle.
    """
    given = [v for v in values if v is not None and str(v).strip().lower() not in _NOTHING]
    if not given:
        return None
    numbers = [_number(v) for v in given]
    if sum(n is not None for n in numbers) >= 0.9 * len(given):
        return _settle_numbers(sorted(n for n in numbers if n is not None), len(given))
    if any(isinstance(v, (bool, dict, list)) for v in given):
        return None
    texts = [v if isinstance(v, str) else v.isoformat() if hasattr(v, "isoformat") else str(v) for v in given]
    two = [match for text in texts if (match := re.match(_TWO, text))]
    if len(two) >= 0.5 * len(texts):
        return _settle_order(two, len(texts))
    rules = DateRules(layout="text", earliest_us=-(10**18), latest_us=10**18, epoch_zero=True)
    import pyarrow as pa

    _, state = read_dates(pa.array(texts, pa.string()), rules)
    share = float(np.mean(state == OK))
    return Settled(layout="text", words="written dates", share=share) if share >= 0.5 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,19}(\.\d*)?\s*", value):
        return float(value)
    return None


def _settle_numbers(numbers: list[float], n_given: int) -> Settled | None:
    """Say what numbers mean by the size of most of them."""
    middle = abs(numbers[len(numbers) // 2])
    share = len(numbers) / n_given
    if all(n == int(n) for n in numbers):
        if sum(1000 <= n <= 2999 for n in numbers) >= 0.9 * len(numbers):
            return Settled(layout="year", words="years", share=share)
        if sum(_is_ymd8(n) for n in numbers) >= 0.9 * len(numbers):
            return Settled(layout="ymd8", words="days as eight digits", share=share)
    for unit, low, words in (
        ("epoch_ns", 1e17, "nanoseconds"),
        ("epoch_us", 1e14, "microseconds"),
        ("epoch_ms", 1e11, "milliseconds"),
        ("epoch_s", 1e8, "seconds"),
    ):
        if middle >= low:
            return Settled(layout=unit, words=f"{words} since 1970, by their size", share=share)
    return None


def _is_ymd8(number: float) -> bool:
    year, month, day = int(number) // 10_000, int(number) // 100 % 100, int(number) % 100
    return 1000 <= year <= 2999 and 1 <= month <= 12 and 1 <= day <= 31


def _settle_order(matches: list[re.Match[str]], n_given: int) -> Settled:
    """Say whether the day or the month stands first, if a value above 12 tells."""
    first = any(int(m["a"]) > 12 for m in matches)
    second = any(int(m["b"]) > 12 for m in matches)
    example = matches[0].string.strip()
    if first == second:
        raise ConfigError(
            f"{example!r} may be day/month or month/day, and no sampled value tells",
            where="dateformat",
            mend="say dateformat dmy or mdy",
        )
    layout, words = ("dmy", "day, month, year") if first else ("mdy", "month, day, year")
    telling = next(m.string.strip() for m in matches if int(m["a" if first else "b"]) > 12)
    return Settled(layout=layout, words=f"{words} (as {telling!r} shows)", share=len(matches) / n_given, sure=False)
