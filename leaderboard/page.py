"""One self-contained HTML page: templates, style, script and the security policy that pins them.

A page makes no network request and runs no script but ours: its content security policy allows exactly the
style and the script whose SHA-256 it names. Templates escape everything; numbers are written by the filters
below, and an undefined value is an en dash that says why, never 0 and never "nan".
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from clbench.leaderboard.colour import heat_css

TEMPLATES = Path(__file__).parent / "templates"
DASH = "–"
MINUS = "−"


def policy_hash(text: str) -> str:
    """Return ``'sha256-…'`` as a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def slug(text: str) -> str:
    """Return a file name for a method or track: letters, digits, dots, dashes; 1 to 80 long."""
    plain = re.sub(r"(?<=\d)/(?=\d)", "of", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain)[:80].strip("-.") or "x"


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Return a decimal with a true minus sign; a dash when undefined."""
    if value is None or not is_number(value):
        return DASH
    text = f"{value:.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def signed(value: float | None, digits: int = 3) -> str:
    """Return a decimal that always carries its sign, for differences."""
    text = number(value, digits)
    return text if text == DASH or text.startswith(MINUS) or not float(text) else f"+{text}"


def scaled(value: float | None, unit: str = "", base: float = 1000.0) -> str:
    """Return three significant digits with a metric prefix: ``1.2 M``, ``3.4 GB``, ``5.6 PFLOP``."""
    if value is None or not is_number(value):
        return DASH
    prefixes, place, size = ("", "k", "M", "G", "T", "P", "E", "Z", "Y"), 0, abs(float(value))
    while size >= base * 0.9995 and place < len(prefixes) - 1:
        size, place = size / base, place + 1
    text = f"{size:.0f}" if (size >= 100 or place == 0) else f"{size:.1f}" if size >= 10 else f"{size:.2f}"
    sign = MINUS if value < 0 and float(text) else ""
    return f"{sign}{text} {prefixes[place]}{unit}".strip()


def duration(seconds: float | None) -> str:
    """Return a time for people: ``8.2 s``, ``4 min 05 s``, ``3 h 20 min``."""
    if seconds is None or not is_number(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min"


def clean(value: Any) -> Any:
    """Return JSON-able data in which every NaN and infinity is None, as JSON has neither."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def json_text(value: Any) -> str:
    """Return indented JSON of cleaned data with sorted keys, the same text for the same data."""
    return json.dumps(clean(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return CSV; undefined is an empty field, text that a spreadsheet would run gets a leading quote."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([csv_field(value) for value in row])
    return buffer.getvalue()


def csv_field(value: Any) -> Any:
    """Return one field of a CSV file."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def undefined(reason: str) -> Markup:
    """Return the dash of an undefined value, with its reason as tooltip and for screen readers."""
    return Markup('<abbr class="na" title="{0}">–<span class="sr"> ({0})</span></abbr>').format(
        escape(reason or "not known")
    )


@cache
def style() -> str:
    """Return the style sheet with the colours of the matrices."""
    return (TEMPLATES / "style.css").read_text(encoding="utf-8") + heat_css()


@cache
def script() -> str:
    """Return the one script."""
    return (TEMPLATES / "script.js").read_text(encoding="utf-8")


@cache
def security_policy() -> str:
    """Return the content security policy of every page."""
    return (
        f"default-src 'none'; style-src {policy_hash(style())}; script-src {policy_hash(script())}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


@cache
def environment() -> Any:
    """Return the Jinja environment: everything is escaped, an unknown name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(number=number, signed=signed, scaled=scaled, duration=duration, clean=clean, slug=slug)
    env.tests["finite"] = is_number
    env.globals.update(
        style=Markup(style()), script=Markup(script()), policy=security_policy(), undefined_value=undefined
    )
    env.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False, "ensure_ascii": True}
    return env


def render(template: str, **context: Any) -> str:
    """Return the page that a template makes of ``context``."""
    return str(environment().get_template(template).render(**context))
