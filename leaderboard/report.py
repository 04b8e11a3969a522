"""The report that an engineer reads after a run: one HTML file for one run or several to compare."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clbench.errors import ConfigError
from clbench.files import write_text
from clbench.leaderboard import capacity_parts, figures, view
from clbench.leaderboard.page import csv_text, json_text
from clbench.leaderboard.site import board_data, method_parts, page
from clbench.leaderboard.view import UNITS, MethodView
from clbench.results.metrics import MAIN
from clbench.results.store import RunStore


def build_report(runs: Sequence[RunStore], out: Path) -> Path:
    """Write one self-contained page about the runs of one track and return it.

    Runs of one method with different seeds are averaged; several methods are compared.

    Args:
        runs: run folders with at least one measured row.
        out: the file to write, or a folder that gets ``report.html``.

    Raises:
        ConfigError: no runs, or runs of several tracks.
    """
    if not runs:
        raise ConfigError("a report needs runs", mend="name one run folder or more")
    path = out if out.suffix.lower() in (".html", ".htm") else out / "report.html"
    views = view.method_views(runs)
    write_text(path, report_page(views))
    return path


def report_page(views: Sequence[MethodView]) -> str:
    """Return the report."""
    track = {"description": "", "oracle": None, **views[0].summary.track}
    rows = view.board_rows(views, "")
    compared = len(views) > 1
    return page(
        "report.html.j2",
        home=None,
        track=track,
        facts=view.facts(views),
        verdict=view.verdict(views),
        caveat=view.caveat(views),
        views=views,
        rows=rows,
        main=view.columns_of(MAIN, track),
        stages=view.stage_heads(views[0].summary),
        tradeoff={short: figures.trade_off(views, short, None) for short in UNITS} if compared else {},
        periods={short: figures.methods_by_period(views, short, "report") for short in UNITS} if compared else {},
        max_lines=figures.MAX_LINES,
        capacity=capacity_parts.overview(views),
        course=capacity_parts.course([one.capacity for one in views]),
        capacity_download=capacity_parts.data_of([one.capacity for one in views]),
        sections=[section(one, f"method-{place}") for place, one in enumerate(views, 1)],
        unfinished=view.unfinished_lines(views),
        data=board_data(views, rows),
    )


def section(one: MethodView, name: str) -> dict[str, Any]:
    """Return what the report says about one method; its downloads are inside the page."""
    downloads = [
        (f"matrix-{unit}.csv", data_address("text/csv", csv_text(*view.matrix_csv(one, short))))
        for short, unit in UNITS.items()
    ]
    summary = {unit: one.summaries[short].as_dict() for short, unit in UNITS.items()}
    downloads.append(("summary.json", data_address("application/json", json_text(summary))))
    return {"id": name, "downloads": downloads, **method_parts(one, name)}


def data_address(kind: str, text: str) -> str:
    """Return a ``data:`` address that holds the text itself."""
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"
