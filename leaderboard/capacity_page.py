"""The page about capacity over stages, in one HTML file: forgetting cost, representation, units, gradients, probes.

What it shows was measured by ``clbench.capacity_report`` and ``clbench.probe``; nothing is measured here.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from clbench.errors import ConfigError
from clbench.files import write_text
from clbench.leaderboard import charts
from clbench.leaderboard.page import DASH, json_text, number
from clbench.leaderboard.site import page
from clbench.results.capacity import COST, COSTS, HEADLINES, MethodCapacity
from clbench.results.stats import Interval

MAX_METHODS = 8
"""Lines of one chart; more cannot be told apart."""
REFERENCES = {
    "oracle": "the track's oracle, whose own noise is left out",
    "best_of_run": "the least loss of any row of the same run",
    "none": "nothing: plain losses",
}


def build_page(found: Sequence[MethodCapacity], out: Path) -> Path:
    """Write one self-contained page and return it.

    Raises:
        ConfigError: no methods.
    """
    if not found:
        raise ConfigError("a page about capacity needs runs", mend="name one run folder or more")
    write_text(out, capacity_page(found))
    return out


def capacity_page(found: Sequence[MethodCapacity]) -> str:
    """Return the page."""
    data = json_text([one.as_dict() for one in found])
    return page(
        "capacity.html.j2",
        home=None,
        methods=[{"label": one.label, "index": place} for place, one in enumerate(found)],
        n_hidden=max(0, len(found) - MAX_METHODS),
        references=sorted({REFERENCES[one.estimate.reference] for one in found}),
        kinds=sorted({i.kind for one in found for v in one.estimate.per_stage.values() for i in v.values()} - {"none"}),
        slopes=[(one.label, cell(one.estimate.per_run["slope"])) for one in found],
        sections=sections(found),
        probes=[
            probe_section(report, f"probe-{i}-{j}")
            for i, one in enumerate(found)
            for j, report in enumerate(one.probes)
        ],
        notes=[f"{one.label}: {note}" for one in found for note in one.notes],
        download="data:application/json;base64," + base64.b64encode(data.encode()).decode(),
    )


def sections(found: Sequence[MethodCapacity]) -> list[dict[str, Any]]:
    """Return name, charts and tables of every section that has a figure."""
    titles: dict[str, dict[str, str]] = {COST: dict(COSTS)}
    for headline in HEADLINES:
        titles.setdefault(headline.section, {})[headline.key] = headline.title
    made = []
    for name, keys in titles.items():
        there = {key: title for key, title in keys.items() if any(_finite(one.values(key)) for one in found)}
        if there:
            made.append(
                {
                    "name": name,
                    "id": name.lower().replace(" ", "-"),
                    "charts": [(title, stage_chart(found, key, title)) for key, title in there.items()],
                    "tables": [stage_table(one, there) for one in found],
                }
            )
    return made


def _finite(values: Mapping[int, Interval]) -> dict[int, Interval]:
    return {row: one for row, one in values.items() if math.isfinite(one.value)}


def stage_chart(found: Sequence[MethodCapacity], key: str, title: str) -> Markup:
    """Return one figure over the stages, a line a method."""
    series, rows = [], dict[int, str]()
    for place, one in enumerate(found[:MAX_METHODS]):
        points = [
            charts.Point(
                x=float(row),
                y=value.value,
                y_interval=(value.low, value.high) if math.isfinite(value.low + value.high) else None,
                note=f"{one.label}, {row_name(one, row)}: {number(value.value, 4)}",
            )
            for row, value in sorted(_finite(one.values(key)).items())
        ]
        rows |= {int(point.x): row_name(one, int(point.x)) for point in points}
        series.append(charts.Series(name=one.label, points=points, index=place))
    step = max(1, math.ceil(len(rows) / 4))
    ticks = [(float(row), name) for i, (row, name) in enumerate(sorted(rows.items())) if i % step == 0]
    room = 0.15 if len(rows) > 1 else 0.5
    return charts.lines(
        f"figure-{key.replace('_', '-')}",
        f"{title} by stage",
        "One line a method; bars are 95 % intervals where there are any.",
        series,
        charts.Axis(label="Checkpoint: base, then after each stage", ticks=ticks,
                    bounds=(min(rows) - room, max(rows) + room)),
        charts.Axis(label=title),
        labels=False,
        width=400,
        height=260,
    )  # fmt: skip


def stage_table(one: MethodCapacity, titles: Mapping[str, str]) -> dict[str, Any]:
    """Return the table of one method: a row a stage."""
    columns = {key: one.values(key) for key in titles}
    rows = sorted({row for values in columns.values() for row in values})
    return {
        "label": one.label,
        "heads": list(titles.values()),
        "rows": [(row_name(one, row), [cell(values.get(row)) for values in columns.values()]) for row in rows],
    }


def row_name(one: MethodCapacity, row: int) -> str:
    """Return what a row is called."""
    return "base" if row == 0 else one.stages.get(row, str(row))


def cell(one: Interval | None) -> dict[str, str | None]:
    """Return text and tooltip of a value, or the reason why there is none."""
    if one is None:
        return {"text": None, "tip": "not measured"}
    if not math.isfinite(one.value):
        return {"text": None, "tip": one.reason or "undefined"}
    if not math.isfinite(one.low + one.high):
        return {"text": number(one.value), "tip": one.reason or ""}
    tip = f"95 %: {number(one.low)} to {number(one.high)}, {one.kind}"
    return {"text": f"{number(one.value)} ± {number((one.high - one.low) / 2)}", "tip": tip}


# probes


def probe_section(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return title, charts and table of one probe."""
    about, models = report["about"], report["models"]
    options, bill = about["options"], about["bill"]
    rates = list(next(iter(models.values()))["curves"])
    return {
        "id": name,
        "title": f"{about['run']} on {options['on']}",
        "note": (
            f"{options['n_tokens']:,} tokens a probe, {options['n_orders']} orders of the data, the track's learning "
            f"rate {about['learning_rate']:g} times {', '.join(rates)}; "
            f"threshold {number(report['threshold_nats'])} nats."
        ),
        "charts": [(f"{rate} times the learning rate", learning_curves(report, rate, f"{name}-{i}"))
                   for i, rate in enumerate(rates)],
        "rows": [_probe_row(who, rate, model) for who, model in models.items() for rate in rates],
        "verdicts": [(who, m["against_base"]["verdict"]) for who, m in models.items() if "against_base" in m],
        "bill": (
            f"{bill['probes']} probes ({bill['cached']} of them measured before), {bill['n_tokens']:,} tokens, "
            f"{bill['flops'] / 1e12:,.2f} TFLOP, {bill['seconds']:,.0f} seconds."
        ),
    }  # fmt: skip


def learning_curves(report: Mapping[str, Any], rate: str, name: str) -> Markup:
    """Return the mean learning curves of all models at one learning rate."""
    series = []
    for place, (who, model) in enumerate(list(report["models"].items())[:MAX_METHODS]):
        curve = model["curves"][rate]
        points = [
            charts.Point(x=float(x), y=float(y), note=f"{who}, after {x:,.0f} tokens: {number(y)}")
            for x, y in zip(curve["tokens"], curve["loss_nats"], strict=True)
        ]
        series.append(charts.Series(name=who, points=points, index=place))
    return charts.lines(
        name,
        f"Held-out loss of the probe at {rate} times the learning rate",
        "Means over orders; one line a checkpoint.",
        series,
        charts.Axis(label="Tokens trained on by the probe"),
        charts.Axis(label="Loss, nats per token"),
    )


def _probe_row(who: str, rate: str, model: Mapping[str, Any]) -> dict[str, Any]:
    figures = model["figures"][rate]
    lost = model.get("against_base", {}).get("by_rate", {}).get(rate)
    keys = ("start", "final", "drop", "area", "tokens_to")
    digits = {"tokens_to": 0}
    return {
        "who": who,
        "rate": rate + (" (best)" if rate == model["best_rate"] else ""),
        "cells": [*(_kept(figures[key], digits.get(key, 3)) for key in keys), _kept(lost, 3)],
    }


def _kept(one: Mapping[str, Any] | None, digits: int) -> dict[str, str | None]:
    """Return text and tooltip of a value that stands as JSON."""
    if one is None:
        return {"text": None, "tip": "the base itself"}
    if one["value"] is None:
        return {"text": None, "tip": one["reason"] or "undefined"}
    half = DASH if one["low"] is None else number((one["high"] - one["low"]) / 2, digits)
    return {"text": f"{number(one['value'], digits)} ± {half}", "tip": one["reason"] or one["interval"]}
