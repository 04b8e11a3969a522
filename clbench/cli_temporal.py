"""The command ``clbench temporal``: dated items of a suite by stage and period. Thin; definitions: results.temporal."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clbench.errors import ClbenchError, NotFoundError

if TYPE_CHECKING:
    from rich.table import Table

    from clbench.results.stats import Interval
    from clbench.results.store import RunStore
    from clbench.results.temporal import Sheet, Temporal

VALUES = ("score", "corrected", "stale")


def temporal(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)],
    suite: Annotated[str, typer.Option(help="Whose dated items.")] = "api_change",
    metric: Annotated[
        str | None, typer.Option(help="What items are read by, as acc:plain.", show_default="by suite")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Only items of these groups; * stands for anything.", show_default=False)
    ] = None,
    value: Annotated[str, typer.Option(help="In the matrix: score, corrected (for chance) or stale.")] = "score",
    kind: Annotated[str, typer.Option(help="In the matrix: all, or what befell the items (updated …).")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Show a suite's dated items by stage and period: kept, updated, obsolete, new, and how stale answers are.

    Example: clbench temporal runs/codedocs-nano/sequential --suite api_change --group '*, trained'
    """
    import json

    from clbench.errors import ConfigError, did_you_mean
    from clbench.results.store import find_runs
    from clbench.results.summary import group_runs
    from clbench.results.temporal import temporal as read

    if value not in VALUES:
        raise ConfigError(f"there is no value {value!r}", mend=did_you_mean(value, VALUES))
    stores = find_runs(runs)
    if not stores:
        raise NotFoundError("no run in these folders", where=", ".join(map(str, runs)), mend="run `clbench run` first")
    chances = chances_of_truth(stores, suite)
    found = [read(g, suite=suite, metric=metric, group=group, chances=chances) for g in group_runs(stores).values()]
    if as_json:
        typer.echo(json.dumps([one.as_dict() for one in found], indent=2, ensure_ascii=False, allow_nan=False))
        return
    for one in found:
        if kind not in one.sheets:
            raise NotFoundError(f"{one.label} has no items of kind {kind!r}", mend=did_you_mean(kind, one.sheets))
        show(one, value, kind)


def chances_of_truth(stores: Sequence[RunStore], suite: str) -> dict[tuple[int, str], tuple[float, float]] | None:
    """Return the chance of every fact of a truth table to be answered right and stale; None without such a table."""
    from clbench.cli_facts import read_truth

    try:
        truth = read_truth(stores, None, suite)
    except ClbenchError:
        return None
    names = [fact.fact for fact in truth.facts]
    return {
        (stage, name): (float(truth.expected[0, stage, f]), float(truth.expected[1, stage, f]))
        for f, name in enumerate(names)
        for stage in range(len(truth.stages))
    }


def show(found: Temporal, value: str, kind: str) -> None:
    """Print one method: the matrix of one value and kind, then every kind's present, past and future."""
    from rich.console import Console

    console = Console(highlight=False)
    asked = "" if found.group is None else f", {found.group}"
    seeds = "1 seed" if found.n_seeds == 1 else f"{found.n_seeds} seeds"
    title = f"{found.label} ({seeds}): {value} of {found.suite} by {found.metric}{asked}"
    console.print(f"{title}, {kind} items", style="italic", markup=False, soft_wrap=True)
    console.print(_matrix(found, found.sheets[kind], value))
    console.print()
    console.print(_kinds(found))
    cells = [one for sheet in found.sheets.values() for row in sheet.score for one in row]
    ways = sorted({cell.kind for cell in cells if cell.kind != "none"})
    told = (
        f"95% intervals: {', '.join(ways) or 'none'}. present: row k, period k; past: earlier periods; stale: answers "
    )
    console.print(f"{told}that were true before. Definitions: docs/api-change.md", style="dim", soft_wrap=True)
    console.print()


def _matrix(found: Temporal, sheet: Sheet, value: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("after stage")
    for column in sheet.column_stages:
        table.add_column(found.stages.get(column, str(column)), justify="right", no_wrap=True)
    cells = getattr(sheet, value)
    for row, line in zip(sheet.row_stages, cells, strict=True):
        table.add_row(found.stages.get(row, str(row)), *(_number(cell.value) for cell in line))
    chance = {"score": sheet.chance, "stale": sheet.chance_stale}.get(value)
    if chance is not None and any(isfinite(one) for one in chance):
        table.add_row("chance", *map(_number, chance), style="dim")
    table.add_row("items", *map(str, sheet.n_items), style="dim")
    return table


def _kinds(found: Temporal) -> Table:
    """Return the table of all kinds: present and past score with intervals, corrected, stale now and before."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("items", no_wrap=True)
    for name in ("n", "present", "corr.", "past", "stale now", "unread", "guess"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, sheet in found.sheets.items():
        now, past = sheet.times["present"], sheet.times["past"]
        table.add_row(
            name,
            str(sum(sheet.n_items)),
            _bounded(now["score"]),
            _number(now["corrected"].value),
            _bounded(past["score"]),
            _bounded(now["stale"]),
            _number(sheet.times["future"]["stale"].value),
            _number(_present_chance(sheet)),
        )
    return table


def _present_chance(sheet: Sheet) -> float:
    """Return the chance of a stale answer, over the periods whose own checkpoint is there."""
    own = [c for c, p in zip(sheet.chance_stale, sheet.column_stages, strict=True) if p in sheet.row_stages]
    return sum(own) / len(own) if own else float("nan")


def _number(value: float) -> str:
    return f"{value:.2f}" if isfinite(value) else "-"


def _bounded(one: Interval) -> str:
    """Return a value with its bounds, as short as can be: 0.36 [.33 .39]."""
    if not isfinite(one.low):
        return _number(one.value)
    low, high = (
        f"{bound:.2f}".replace("0.", ".", 1) if 0 <= bound < 1 else f"{bound:.2f}" for bound in (one.low, one.high)
    )
    return f"{_number(one.value)} [{low} {high}]"
