"""Capacity on pages: a table that sums methods up, charts and tables over stages. Board, reports and its page share it.

What it shows comes from ``clbench.results.capacity``; nothing is measured here.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from clbench.leaderboard import charts
from clbench.leaderboard.page import clean, number
from clbench.leaderboard.view import MethodView
from clbench.results.capacity import COST, COSTS, HEADLINES, MAIN, PER_RUN, MethodCapacity
from clbench.results.stats import Interval

MAX_METHODS = 8
"""Lines of one chart; more cannot be told apart."""
REFERENCES = {
    "oracle": "the track's oracle, whose own noise is left out",
    "best_of_run": "the least loss of any row of the same run",
    "none": "nothing: plain losses",
}
SHOWN = ("cost", "weight_driven", "data_driven", *MAIN)
"""Figures whose course over the stages reports and methods' pages show; ``clbench capacity --html`` has all."""


def references(found: Sequence[MethodCapacity]) -> list[str]:
    """Return what losses are measured from, in words."""
    return sorted({REFERENCES[one.estimate.reference] for one in found})


def interval_kinds(found: Sequence[MethodCapacity]) -> list[str]:
    """Return what the intervals of the forgetting cost vary."""
    return sorted({i.kind for one in found for v in one.estimate.per_stage.values() for i in v.values()} - {"none"})


def data_of(found: Sequence[MethodCapacity]) -> str:
    """Return all figures as a ``data:`` address of JSON, without the white space that would double a page's size."""
    text = json.dumps(clean([one.as_dict() for one in found]), allow_nan=False, separators=(",", ":"))
    return "data:application/json;base64," + base64.b64encode(text.encode()).decode()


# Methods side by side


def overview(views: Sequence[MethodView]) -> dict[str, Any]:
    """Return the table of a board or report: a row a method, what its steps did, figures of the last checkpoint."""
    found = [view.capacity for view in views]
    measured = any(one.measured for one in found)
    shown = dict(MAIN) if measured else {}
    base = next((one for one in found if one.measured), None)
    return {
        "costs": [{"name": key, "title": title, "tip": tip} for key, (title, tip) in PER_RUN.items()],
        "figures": [{"name": key, "title": title, "tip": tip} for key, (title, tip) in shown.items()],
        "rows": [
            {
                "view": view,
                "search": view.search,
                "cells": {key: board_cell(view.capacity.estimate.per_run[key]) for key in PER_RUN}
                | {key: board_cell(view.capacity.figure(key, view.capacity.last)) for key in shown},
            }
            for view in sorted(views, key=forgetting)
        ],
        "base": None if base is None else {key: board_cell(base.figure(key, 0)) for key in shown},
        "references": references(found),
    }


def forgetting(view: MethodView) -> tuple[bool, float]:
    """Return what the table is ordered by: W of all steps together, undefined ones last."""
    value = view.capacity.estimate.per_run["weight_driven_total"].value
    return not math.isfinite(value), value


def board_cell(one: Interval) -> dict[str, str | None]:
    """Return value, half-width, tooltip and sort key, as ``view.score_cell`` does."""
    if not math.isfinite(one.value):
        return {"text": None, "ci": "", "sort": "", "reason": one.reason or "undefined", "tip": ""}
    known = math.isfinite(one.low + one.high)
    return {
        "text": number(one.value),
        "ci": f"±{number((one.high - one.low) / 2)}" if known else "",
        "sort": repr(float(one.value)),
        "reason": "",
        "tip": f"95 % interval {number(one.low)} to {number(one.high)}, {one.kind}, n = {one.n}"
        if known
        else one.reason or "no interval",
    }


# Over stages


def sections(found: Sequence[MethodCapacity], shown: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Return name, charts and tables of every section that has a figure; ``shown`` are their keys, None is all."""
    titles: dict[str, dict[str, str]] = {COST: dict(COSTS)}
    for headline in HEADLINES:
        titles.setdefault(headline.section, {})[headline.key] = headline.title
    made = []
    for name, keys in titles.items():
        wanted = {key: title for key, title in keys.items() if shown is None or key in shown}
        there = {key: title for key, title in wanted.items() if any(_finite(one.values(key)) for one in found)}
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


def course(found: Sequence[MethodCapacity]) -> dict[str, Any]:
    """Return what a report or a method's page shows of the course over the stages."""
    return {
        "sections": sections(found, SHOWN),
        "n_hidden": max(0, len(found) - MAX_METHODS),
        "notes": [f"{one.label}: {note}" for one in found for note in one.notes],
    }


def _finite(values: Mapping[int, Interval]) -> dict[int, Interval]:
    return {row: one for row, one in values.items() if math.isfinite(one.value)}


def stage_chart(found: Sequence[MethodCapacity], key: str, title: str) -> Markup:
    """Return one figure over the stages, a line a method."""
    series, rows = [], {row: row_name(one, row) for one in found for row in one.estimate.stages}
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
        series.append(charts.Series(name=one.label, points=points, index=place))
    flat = all(point.y == 0 for one in series for point in one.points)  # no axis below nothing
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
        charts.Axis(label=title, bounds=(0.0, 1.0) if flat else None),
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
