"""A picture of forecasts: runs, fitted laws, what is predicted and what the back-test said. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.files import atomic_path
from clbench.results.forecast import Forecast, Prediction
from clbench.results.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
APART = 0.015
"""Share of the x axis that the marks of two methods at one budget stand apart."""
BEYOND = 0.6
"""How far intervals may widen the y axis to either side, in ranges of what was measured and predicted."""


def draw(found: Sequence[Forecast], path: Path) -> None:
    """Draw a panel a metric: runs as points, laws as lines, dashed where no run is, predictions with their intervals.

    A run that the back-test hid is an open circle, what it said of it a cross. The x axis is tokens a stage, or the
    model's size where that is all that the sweep varies. An interval that would flatten the rest is cut: an arrow with
    its bound stands there.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(one.metric for one in found))
    methods = list(dict.fromkeys(one.method for one in found))
    figure = Figure(figsize=(6.2 * len(metrics), 4.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(metrics)))
    for axes, metric in zip(panels, metrics, strict=True):
        shown = [one for one in found if one.metric == metric]
        of_size = all(one.fit is not None and not one.fit.law.of_tokens for one in shown)
        limits = _limits(shown)
        for one in shown:
            place = methods.index(one.method)
            _panel(axes, one, COLOURS[place % len(COLOURS)], place - (len(methods) - 1) / 2, limits, of_size=of_size)
        axes.set_ylim(*limits)
        axes.set_xscale("log")
        axes.set_xlabel("parameters" if of_size else "tokens a stage")
        axes.set_ylabel("nats per token")
        axes.set_title(METRICS[metric].title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
        reasons = [f"{one.method}: {one.prediction.reason}" for one in shown if one.prediction.reason]
        if reasons:
            axes.text(0.5, 0.02, "\n".join(reasons), transform=axes.transAxes, ha="center", fontsize=8, wrap=True)
    figure.legend(handles=_legend(methods), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().lstrip("."), dpi=150, metadata=None)


def _legend(methods: Sequence[str]) -> list[Any]:
    """Return a handle a method, then what the marks mean."""
    from matplotlib.lines import Line2D

    marks = (("D", "black", "predicted, 95 % interval"), ("o", "white", "run that the back-test hid"))
    colours = [Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o", label=m) for i, m in enumerate(methods)]
    shapes = [Line2D([], [], ls="", color="black", marker=m, mfc=fill, label=said) for m, fill, said in marks]
    return [*colours, *shapes, Line2D([], [], ls="", color="black", marker="x", label="what the back-test said of it")]


def _limits(shown: Sequence[Forecast]) -> tuple[float, float]:
    """Return the ends of the y axis: all values, and of their intervals what does not flatten them."""
    said = [p for one in shown for p in (one.prediction, *one.back_test.predictions) if np.isfinite(p.value)]
    values = [o.value for one in shown for o in one.observations] + [p.value for p in said]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = BEYOND * (high - low) or 0.5
    wide = [bound for p in said for bound in (p.low, p.high) if np.isfinite(bound)]
    low, high = max(low - room, min([low, *wide])), min(high + room, max([high, *wide]))
    return low - 0.06 * (high - low or 1.0), high + 0.06 * (high - low or 1.0)


def _panel(axes: Axes, one: Forecast, colour: str, shift: float, limits: tuple[float, float], *, of_size: bool) -> None:
    """Draw one method into a panel; ``shift`` counts methods from the middle, to hold intervals apart."""

    def place(n_parameters: float, n_tokens: float) -> float:
        return n_parameters if of_size else n_tokens

    x = np.array([place(o.n_parameters, o.n_tokens) for o in one.observations])
    values = np.array([o.value for o in one.observations])
    tested = not one.back_test.reason
    hidden = np.isin([o.n_tokens for o in one.observations], one.back_test.hidden) & tested
    axes.plot(x[~hidden], values[~hidden], "o", color=colour)
    axes.plot(x[hidden], values[hidden], "o", color=colour, mfc="white")
    made = one.prediction
    wanted = place(made.n_parameters, made.n_tokens)
    width = np.log10(max(x.max(), wanted) / x.min()) if len(x) else 0.0
    apart = 10 ** (shift * APART * width)
    for said in one.back_test.predictions if tested else ():
        _mark(axes, said, place(said.n_parameters, said.n_tokens) * apart, colour, "x", limits)
    if one.fit is None:
        return
    for low, high, style in ((x.min(), x.max(), "-"), (x.max(), wanted, "--")):
        line = np.geomspace(low, max(low, high), 100)
        pairs = [(d, one.observations[0].n_tokens) if of_size else (made.n_parameters, d) for d in line.tolist()]
        axes.plot(line, [one.fit.at(n, d) for n, d in pairs], style, color=colour, lw=1)
    _mark(axes, made, wanted * apart, colour, "D", limits)


def _mark(axes: Axes, said: Prediction, x: float, colour: str, marker: str, limits: tuple[float, float]) -> None:
    """Draw a prediction, with its interval where it has one; a bound outside of the axis is an arrow and a number."""
    axes.plot([x], [said.value], marker, color=colour)
    if not (np.isfinite(said.low) and np.isfinite(said.high)):
        return
    low, high = max(said.low, limits[0]), min(said.high, limits[1])
    axes.plot([x, x], [low, high], "-", color=colour, lw=1)
    for bound, end, arrow, align in ((said.low, low, "v", "bottom"), (said.high, high, "^", "top")):
        if bound == end:
            axes.plot([x], [end], "_", color=colour, ms=8)
            continue
        axes.plot([x], [end], arrow, color=colour, ms=6, clip_on=False)
        axes.annotate(f"{bound:.3g}  ", (x, end), ha="right", va=align, fontsize=8, color=colour)
