"""Which charts the pages show: scatter, retention curves, training loss. ``charts`` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from clbench.leaderboard import charts
from clbench.leaderboard.page import number
from clbench.leaderboard.view import UNIT_NAMES, UNITS, MethodView, Short, row_name, score_title, stage_names

MAX_LINES = 8
"""Methods on one chart; more cannot be told apart."""


def trade_off(views: Sequence[MethodView], short: Short, prefix: str | None) -> Markup:
    """Return the scatter of plasticity (x: in-distribution) and retention (y: backward); smaller is better.

    ``prefix`` leads from the page to the methods' pages; None makes no links.
    """
    series = []
    for view in views:
        scores = view.summaries[short].scores
        x, y = scores["in_distribution"], scores["backward"]
        if not (math.isfinite(x.value) and math.isfinite(y.value)):
            continue
        note = f"{view.label}: in-distribution {number(x.value)}, backward {number(y.value)} {UNIT_NAMES[short]}"
        point = charts.Point(
            x=x.value,
            y=y.value,
            x_interval=(x.low, x.high) if math.isfinite(x.low + x.high) else None,
            y_interval=(y.low, y.high) if math.isfinite(y.low + y.high) else None,
            note=note,
        )
        href = None if prefix is None else f"{prefix}methods/{view.slug}.html"
        series.append(charts.Series(name=view.label, points=[point], index=view.index, href=href))
    track, unit = views[0].summary.track, UNIT_NAMES[short]
    described = "; ".join(s.points[0].note for s in series)
    return charts.scatter(
        f"tradeoff-{short}",
        "Retention against plasticity",
        f"Each method by in-distribution and backward loss, in {unit}, with 95 % intervals. {described}.",
        series,
        charts.Axis(label=f"Learning the new: {score_title('in_distribution', track).lower()}, {unit}"),
        charts.Axis(label=f"Keeping the old: {score_title('backward', track).lower()}, {unit}"),
        corner="↙ better on both",
    )


def period_curves(view: MethodView, short: Short, name: str) -> Markup:
    """Return one line per period: its loss under each checkpoint, the one just trained on it drawn larger."""
    summary = view.summaries[short]
    matrix = summary.matrices[UNITS[short]]
    names = stage_names(summary)
    series = []
    for place, column in enumerate(matrix.column_stages):
        points = [
            charts.Point(
                x=float(row),
                y=float(matrix.at(row, column)),
                strong=row == column,
                note=f"{names[column]} {row_name(row, names)}: {number(float(matrix.at(row, column)), 4)}",
            )
            for row in matrix.row_stages
            if not matrix.reason(row, column)
        ]
        series.append(charts.Series(name=names[column], points=points, index=place))
    return charts.lines(
        f"{name}-periods-{short}",
        f"{view.label}: loss on each period over the stages",
        f"One line per period, in {UNIT_NAMES[short]}; one that rises after its large marker is forgetting.",
        series,
        checkpoint_axis(view),
        charts.Axis(label=f"Loss, {UNIT_NAMES[short]}"),
    )


def checkpoint_axis(view: MethodView, *, few: bool = False) -> charts.Axis:
    """Return the axis of checkpoints: the base, then every stage."""
    matrix, names = view.summary.matrices["nats_per_token"], stage_names(view.summary)
    stages = sorted({*matrix.row_stages, *(matrix.column_stages if not matrix.row_stages else ())})
    step = max(1, math.ceil(len(stages) / (4 if few else 12)))
    ticks = [(float(k), names[k] if k else "base") for i, k in enumerate(stages) if i % step == 0]
    room = 0.15 if len(stages) > 1 else 0.5
    return charts.Axis(label="Checkpoint: base, then after each stage", ticks=ticks,
                       bounds=(stages[0] - room, stages[-1] + room))  # fmt: skip


def methods_by_period(views: Sequence[MethodView], short: Short, name: str) -> list[tuple[str, Markup]]:
    """Return a small chart per period, one line per method (at most MAX_LINES), all on one scale."""
    shown = views[:MAX_LINES]
    first = shown[0].summaries[short].matrices[UNITS[short]]
    names = stage_names(shown[0].summary)
    every = [float(v) for view in shown for v in view.summaries[short].matrices[UNITS[short]].values.ravel()]
    bounds = charts.bounds_of(every)
    found = []
    for column in first.column_stages:
        series = []
        for view in shown:
            matrix = view.summaries[short].matrices[UNITS[short]]
            points = [
                charts.Point(
                    x=float(row),
                    y=float(matrix.at(row, column)),
                    strong=row == column and row > 0,
                    note=f"{view.label}, {row_name(row, names)}: {number(float(matrix.at(row, column)), 4)}",
                )
                for row in matrix.row_stages
                if not matrix.reason(row, column)
            ]
            series.append(charts.Series(name=view.label, points=points, index=view.index))
        chart = charts.lines(
            f"{name}-period-{column}-{short}",
            f"Loss on period {names[column]} by checkpoint",
            f"One line per method, in {UNIT_NAMES[short]}.",
            series,
            checkpoint_axis(shown[0], few=True),
            charts.Axis(label=f"Loss, {UNIT_NAMES[short]}", bounds=bounds),
            labels=False,
            width=400,
            height=260,
        )
        found.append((names[column], chart))
    return found


def training_loss(view: MethodView, name: str) -> Markup | None:
    """Return the training loss over all stages, one line per seed; None when nothing was logged."""
    longest = 0.0
    series: list[charts.Series] = []
    starts: dict[int, float] = {}
    for place, (run, config) in enumerate(zip(view.runs, view.configs, strict=True)):
        seed, offset = int(config["seed"]), 0.0
        values: list[tuple[float, float]] = []
        stage, last = None, 0.0
        for line in run.steps():
            if line["stage"] != stage:
                offset, stage = offset + last, line["stage"]
                starts.setdefault(stage, offset)
            last = float(line["n_tokens"])
            if math.isfinite(line["loss_nats"]):
                values.append((offset + last, float(line["loss_nats"])))
        points = [charts.Point(x=x, y=y) for x, y in charts.thin(values)]
        longest = max(longest, offset + last)
        series.append(charts.Series(name=f"seed {seed}", points=points, index=place))
    if not any(one.points for one in series):
        return None
    names = stage_names(view.summary)
    scale, unit = (1e9, "billion") if longest >= 2e9 else (1e6, "million") if longest >= 2e6 else (1e3, "thousand")
    x_ticks = [(v * scale, charts.tick_text(v, charts.nice_ticks(0, longest / scale)))
               for v in charts.nice_ticks(0, longest / scale)]  # fmt: skip
    return charts.lines(
        f"{name}-training",
        f"{view.label}: training loss",
        "Mean loss per target token of the batches, over all tokens trained on; dashed lines start a stage.",
        series,
        charts.Axis(label=f"Tokens trained on, {unit}", ticks=x_ticks, bounds=(0.0, longest * 1.01)),
        charts.Axis(label="Training loss, nats per token"),
        boundaries=[(start, names.get(stage, str(stage))) for stage, start in sorted(starts.items())],
        markers=False,
    )
