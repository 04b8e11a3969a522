"""The page about capacity over stages, in one HTML file: forgetting cost, representation, units, gradients, probes.

What it shows was measured by ``clbench.capacity_report`` and ``clbench.probe``; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from clbench.errors import ConfigError
from clbench.files import write_text
from clbench.leaderboard import charts
from clbench.leaderboard.capacity_parts import MAX_METHODS, cell, data_of, interval_kinds, references, sections
from clbench.leaderboard.page import DASH, number
from clbench.leaderboard.site import page
from clbench.results.capacity import MethodCapacity


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
    return page(
        "capacity.html.j2",
        home=None,
        methods=[{"label": one.label, "index": place} for place, one in enumerate(found)],
        n_hidden=max(0, len(found) - MAX_METHODS),
        references=references(found),
        kinds=interval_kinds(found),
        slopes=[(one.label, cell(one.estimate.per_run["slope"])) for one in found],
        sections=sections(found),
        probes=[
            probe_section(report, f"probe-{i}-{j}")
            for i, one in enumerate(found)
            for j, report in enumerate(one.probes)
        ],
        notes=[f"{one.label}: {note}" for one in found for note in one.notes],
        download=data_of(found),
    )


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
