"""A picture of forecasts: the runs, the fitted laws, and what is predicted. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clbench.files import atomic_path
from clbench.results.forecast import Forecast

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(found: Sequence[Forecast], path: Path) -> None:
    """Draw a panel a metric: runs as points, laws as lines, predictions with their intervals, hidden runs ringed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(one.metric for one in found))
    methods = list(dict.fromkeys(one.method for one in found))
    figure = Figure(figsize=(6.2 * len(metrics), 4.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(metrics)))
    for axes, metric in zip(panels, metrics, strict=True):
        for one in found:
            if one.metric == metric:
                _panel(axes, one, COLOURS[methods.index(one.method) % len(COLOURS)])
        axes.set_xscale("log")
        axes.set_xlabel("tokens a stage")
        axes.set_ylabel("nats per token")
        axes.set_title(metric.replace("_", " "), fontsize=10)
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().lstrip("."), dpi=150, metadata=None)


def _panel(axes: object, one: Forecast, colour: str) -> None:
    """Draw one method into a panel."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    tokens = np.array([o.n_tokens for o in one.observations])
    axes.plot(tokens, [o.value for o in one.observations], "o", color=colour, label=one.method)
    hidden = np.isin(tokens, one.back_test.hidden)
    if hidden.any() and not one.back_test.reason:
        values = np.array([o.value for o in one.observations])
        axes.plot(tokens[hidden], values[hidden], "o", ms=11, mfc="none", mec=colour)
        guessed = one.back_test.predictions
        axes.plot([p.n_tokens for p in guessed], [p.value for p in guessed], "x", color=colour)
    if one.fit is None:
        return
    made = one.prediction
    x = np.geomspace(tokens.min(), max(made.n_tokens, tokens.max()), 200)
    axes.plot(x, [one.fit.at(made.n_parameters, float(d)) for d in x], color=colour, lw=1)
    if np.isfinite(made.low) and np.isfinite(made.high):
        axes.errorbar(
            [made.n_tokens],
            [made.value],
            [[made.value - made.low], [made.high - made.value]],
            fmt="D",
            color=colour,
            capsize=4,
        )
