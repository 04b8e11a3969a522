"""A picture of Fisher reports: figures over stages with their noise, and blocks beside each other. Needs matplotlib."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clbench.files import atomic_path
from clbench.fisher.diagnostic import Report
from clbench.fisher.subjects import title_of

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
ERRORS = {
    "rank1_error": "rank-1, along mu",
    "best_rank1_error": "rank-1, best direction",
    "diagonal_error": "diagonal",
}
MEANS = {"split_half": "split-half cosine of mu", "alignment": "|cos(mu, u1)|", "mean_abs_cos": "mean |cos(g, mu)|"}
SHARES = {"kappa": "collinearity kappa", "top_share": "top eigenvalue's share", "captured": "share along mu"}


def draw(reports: Sequence[Report], path: Path) -> None:
    """Draw reports into a .png, .svg or .html file: a column of points a report, then the blocks of the last one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 7), layout="constrained")
    upper, lower = figure.subplots(2, 3)
    names = [_label(report) for report in reports]
    whole = [report.all for report in reports]
    blocks = reports[-1].blocks
    for row, columns, labels in ((upper, whole, names), (lower, blocks, [block.name for block in blocks])):
        for axes, series in zip(row, (ERRORS, MEANS, SHARES), strict=True):
            _panel(axes, columns, labels, series)
    for axes, title in zip(
        upper, ("relative error of F (0 perfect, 1 nothing)", "the mean gradient", "shares of the trace"), strict=True
    ):
        axes.set_title(title, fontsize=10)
    upper[0].set_ylabel("all parameters")
    lower[0].set_ylabel(f"blocks, {names[-1]}")
    figure.suptitle(f"{reports[-1].about['name']}: {reports[-1].n_samples} samples; hollow: noise", fontsize=11)
    with atomic_path(path) as temporary:
        _save(figure, temporary, path.suffix.lower().lstrip("."), title_of(reports[-1].about))


def _label(report: Report) -> str:
    about = report.about
    return f"{about['stage']} on {about['period']}" if "stage" in about else str(about.get("period_name", "text"))


def _panel(axes: Any, columns: Sequence[Any], labels: Sequence[str], series: dict[str, str]) -> None:
    """Draw figures as filled points, and what noise reaches (or else its floor) as hollow ones."""
    for i, (name, words) in enumerate(series.items()):
        places = [place + 0.16 * (i - 1) for place in range(len(columns))]
        found = [block.quantities.get(name) for block in columns]
        values = [None if one is None else one.value for one in found]
        noise = [None if one is None else (one.floor if one.null_bound is None else one.null_bound) for one in found]
        if name == "diagonal_error":  # isotropic noise *is* diagonal: its 0 is no bound
            noise = []
        for heights, face, label in ((values, COLOURS[i], words), (noise, "none", None)):
            known = [(x, y) for x, y in zip(places, heights, strict=False) if y is not None]
            axes.scatter(
                *zip(*known, strict=True), s=34, color=COLOURS[i], facecolor=face, label=label
            ) if known else None
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=30 if len(labels) > 6 else 0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    if set(series) != set(ERRORS):
        axes.axhline(0, color="grey", linewidth=0.6)


def _save(figure: Any, path: Path, kind: str, title: str) -> None:
    if kind not in ("html", "htm"):
        figure.savefig(path, format=kind, dpi=130)
        return
    text = io.StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    path.write_text(f"{page}<body>{svg[svg.index('<svg') :]}</body></html>\n", encoding="utf-8")
