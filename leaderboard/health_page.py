"""The page of ``clbench health``: verdict, differences as a chart, every task, effect sizes, buckets, bill. One file.

What it shows was computed by ``clbench.health``; nothing is measured here. Names come from outside and are escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from clbench.fanout import told
from clbench.files import write_text
from clbench.leaderboard import charts
from clbench.leaderboard.page import DASH, duration, json_text, number, scaled, signed
from clbench.leaderboard.site import page
from clbench.results import tasks
from clbench.results.stats import Effect, Interval
from clbench.results.tasks import Change, Fate

if TYPE_CHECKING:
    from clbench.health import Health

STATES = {"damaged": ("worse", "damaged"), "improved": ("better", "improved"), "unchanged": ("", "unchanged"),
          "changed": ("", "changed"), "undecided": ("", "not tested")}  # fmt: skip
"""Class and word of a state."""
COLOURS = {"damaged": 5, "improved": 2, "unchanged": 6, "changed": 0, "undecided": 6}
"""Series of the chart; grey is for what is not sure."""
EFFECTS = {
    "paper": ("g, as the junk paper has it", "mean / SD of the differences, times 1 - 3 / (4 N - 9)"),
    "d_z": ("d_z", "mean / SD of the differences, times J(N - 1)"),
    "d_av": ("d_av", "mean of the differences / mean of the two SDs, times J(N - 1)"),
}
BUCKETS = {"healed": "was damaged and got better again", "preserved": "was improved and kept it",
           "undamaged": "was unchanged and is"}  # fmt: skip
ROW_HEIGHT = 24.0


def build_health_page(health: Health, out: Path) -> Path:
    """Write one self-contained page about a check-up and return it.

    Args:
        health: what ``clbench.health.examine`` found.
        out: the file to write, or a folder that gets ``health.html``.
    """
    path = out if out.suffix.lower() in (".html", ".htm") else out / "health.html"
    write_text(path, health_page(health))
    return path


def health_page(health: Health) -> str:
    """Return the page."""
    text = base64.b64encode(json_text(health.as_dict()).encode()).decode()
    return page(
        "health.html.j2",
        home=None,
        model=health.options.model,
        baseline=health.options.baseline or ("its base" if health.changes else ""),
        base=health.options.base or "",
        verdict=health.verdict,
        facts=facts(health),
        rows=[task_row(health, name) for name in health.scores],
        compared=bool(health.changes),
        chart=differences_chart(health.changes),
        effects=effect_rows(tasks.effects(health.changes)) if health.changes else [],
        retention=retention_rows(health),
        fates=[fate_row(one) for one in health.fates],
        rates=rate_rows(health.fates),
        skipped=sorted(health.skipped.items()),
        failures=told(health.failures),
        bill=bill_rows(health.bill),
        licences=sorted(health.licences.items()),
        download=f"data:application/json;base64,{text}",
    )


def facts(health: Health) -> list[tuple[str, str]]:
    """Return the few facts under the title."""
    n_items = sum(task.n for task in health.tasks.values())
    found = [("tasks", str(len(health.scores))), ("items", f"{n_items:,}")]
    if health.changes:
        found += [("damaged", str(len(health.damaged))),
                  ("improved", str(sum(one.state == "improved" for one in health.changes)))]  # fmt: skip
    if health.retention is not None and math.isfinite(health.retention.corrected.value):
        found.append(("retained, chance taken off", share(health.retention.corrected)))
    return [*found, ("measured", health.made)]


def share(one: Interval) -> str:
    """Return a share in percent with its interval."""
    if not math.isfinite(one.value):
        return DASH
    ends = f" ({100 * one.low:.1f}–{100 * one.high:.1f})" if math.isfinite(one.low + one.high) else ""
    return f"{100 * one.value:.1f} %{ends}"


def cell(one: Interval, *, sign: bool = False) -> dict[str, Any]:
    """Return what the template's ``value`` shows of an interval."""
    write = signed if sign else number
    if not math.isfinite(one.value):
        return {"text": None, "reason": one.reason or "not measured", "ci": "", "tip": ""}
    ends = f"{write(one.low)} to {write(one.high)}" if math.isfinite(one.low + one.high) else ""
    return {"text": write(one.value), "ci": ends, "tip": f"{one.kind}, {one.n:,} items", "reason": ""}


def task_row(health: Health, name: str) -> dict[str, Any]:
    """Return one row of the table."""
    task = health.tasks[name]
    row: dict[str, Any] = {
        "name": name,
        "unit": task.unit,
        "better": {"higher": "higher", "lower": "lower", "either": DASH}[task.direction],
        "n": f"{task.n:,}",
        "score": cell(health.scores[name]),
        "chance": number(task.chance),
        "change": None,
    }
    if (change := next((one for one in health.changes if one.task == name), None)) is not None:
        css, word = STATES[change.state]
        row["change"] = {
            "before": cell(change.before),
            "difference": cell(change.difference.interval, sign=True),
            "errors": signed(change.difference.n_errors, 1),
            "effect": signed(change.difference.effect, 2),
            "p": probability(change.difference.interval.p),
            "p_holm": probability(change.p_holm),
            "test": change.difference.test,
            "css": css,
            "word": word,
        }
    return row


def probability(p: float) -> str:
    """Return a p-value for people."""
    if not math.isfinite(p):
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def differences_chart(found: Sequence[Change]) -> Markup | None:
    """Return the differences of all scores where higher is better, one row a task; None without any."""
    drawn = [one for one in found if one.direction == "higher" and math.isfinite(one.difference.value)]
    if not drawn:
        return None
    values = [v for one in drawn for v in (one.difference.interval.low, one.difference.interval.high)]
    low, high = charts.bounds_of([100 * v for v in values], zero=True)
    height = ROW_HEIGHT * len(drawn) + 70
    left = min(190.0, 24 + charts.FONT_WIDTH * max(len(charts.shorten(one.task, 26)) for one in drawn))
    frame = charts.Frame(x_low=low, x_high=high, y_low=len(drawn) - 0.4, y_high=-0.6, left=left, height=height)
    ticks = [(float(row), charts.shorten(one.task, 26)) for row, one in enumerate(drawn)]
    parts = [
        charts.axes(frame, charts.Axis(label="difference to the baseline, points"), charts.Axis(label="", ticks=ticks))
    ]
    x = frame.x(0.0)
    parts.append(charts.element("line", x1=x, x2=x, y1=frame.top, y2=frame.height - frame.bottom, class_="boundary"))
    for row, one in enumerate(drawn):
        interval = one.difference.interval
        note = f"{one.task}: {signed(100 * interval.value, 1)} points, {STATES[one.state][1]}"
        point = charts.Point(x=100 * interval.value, y=float(row), note=note,
                             x_interval=(100 * interval.low, 100 * interval.high))  # fmt: skip
        index = COLOURS[one.state]
        parts.append(charts.interval_lines(frame, point, index))
        parts.append(charts.marker(frame.x(point.x), frame.y(point.y), index, radius=5.5, note=note))
    described = "Difference of every task's score to the baseline's, in points, with 95 % intervals over items."
    return charts.figure("differences", "Differences to the baseline", described, frame, *parts)


def effect_rows(found: Mapping[str, Effect]) -> list[dict[str, str]]:
    """Return the effect sizes over tasks."""
    return [
        {"name": title, "formula": formula, "value": signed(found[key].value, 2), "reason": found[key].reason or ""}
        for key, (title, formula) in EFFECTS.items()
    ]


def retention_rows(health: Health) -> list[dict[str, str]]:
    """Return the retention of every task, and the means."""
    if health.retention is None:
        return []
    rows = [
        {"name": name, "plain": percent(one.plain), "corrected": percent(one.corrected), "reason": one.reason or ""}
        for name, one in health.retention.by_task.items()
    ]
    mean = {"name": "mean", "plain": share(health.retention.plain), "corrected": share(health.retention.corrected)}
    return [*rows, {**mean, "reason": health.retention.corrected.reason or ""}]


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else DASH


def fate_row(one: Fate) -> dict[str, str]:
    """Return one task's way from base over baseline to model."""
    return {
        "task": one.task,
        "first": STATES[one.first][1],
        "training": signed(one.training.difference.value),
        "afterwards": signed(one.afterwards.value),
        "p": probability(one.p_holm),
        "bucket": one.bucket,
        "css": {"damaged": "worse", "undecided": ""}.get(one.bucket, "better"),
        "undone": percent(one.undone),
    }


def rate_rows(fates: Sequence[Fate]) -> list[tuple[str, str]]:
    """Return how many tasks of those that could reached each bucket."""
    return [
        (f"{name} ({BUCKETS[name]})", f"{reached} of {of}") for name, (reached, of) in tasks.rates(fates).items()
    ] if fates else []  # fmt: skip


def bill_rows(bill: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what measuring cost."""
    rows = []
    for role, one in bill["models"].items():
        cost = f"{duration(one['seconds'])}, {scaled(one['flops'], 'FLOP')}, {one['rows']:,.0f} rows"
        rows.append((f"the {role}'s cells", cost))
    rows.append(("cells", f"{bill['cells_measured']} measured now, {bill['cells_cached']} from the cache"))
    return [*rows, ("this call", duration(bill["seconds_now"]))]
