"""Commands that cut results into parts: thin, like ``clbench.cli``; heavy imports live inside the commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from clbench.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

    from clbench.results.matrix import Unit
    from clbench.results.slices import By, Slice
    from clbench.results.summary import Score

SliceBy = Literal["group", "change"]
SliceUnit = Literal["nats_per_token", "bits_per_byte"]


def slices(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)],
    by: Annotated[str, typer.Option(help="group (package, site) or change (new, changed, unchanged).")] = "group",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Scores to show.", show_default="backward, in_distribution, forward"),
    ] = None,
    unit: Annotated[str, typer.Option(help="nats_per_token or bits_per_byte.")] = "nats_per_token",
    suite: Annotated[str, typer.Option(help="Whose rows are cut.")] = "heldout",
    oracle: Annotated[
        list[Path] | None,
        typer.Option(help="Runs whose last checkpoint is the oracle: shows regrets too.", show_default=False),
    ] = None,
    min_documents: Annotated[int, typer.Option(min=1, help="Periods with fewer documents are left out.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Show the scores of each group or change kind by itself, methods side by side."""
    from clbench.results.slices import SUMMARIES, slices_of
    from clbench.results.store import find_runs
    from clbench.results.summary import group_runs

    for name, value, known in (("--by", by, get_args(SliceBy)), ("--unit", unit, get_args(SliceUnit))):
        if value not in known:
            raise ConfigError(f"{name} {value!r} is not one of {', '.join(known)}", mend=did_you_mean(value, known))
    stores = find_runs(runs)
    if not stores:
        raise ConfigError("no run in these folders", where=", ".join(map(str, runs)), mend="run `clbench run` first")
    cut = [
        slices_of(
            group,
            cast("By", by),
            metrics=metric or SUMMARIES,
            suite=suite,
            unit=cast("Unit", unit),
            oracle=find_runs(oracle or []),
            min_documents=min_documents,
        )
        for group in group_runs(stores).values()
    ]
    if as_json:
        found = [one.as_dict() for of_method in cut for one in of_method]
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show_slices(cut, metric or SUMMARIES, unit)


def show_slices(cut: Sequence[Sequence[Slice]], metrics: Sequence[str], unit: str) -> None:
    """Print a table a score: one row a slice, one column a method; then what is left out, and why.

    Args:
        cut: per method, its slices.
        metrics: which scores.
        unit: of the losses, for the caption.
    """
    from rich.console import Console

    from clbench.results.metrics import METRICS

    console = Console()
    console.print(f"{unit.replace('_', ' ')}, documents of each {cut[0][0].by} by themselves", style="italic")
    for name in metrics:
        title = METRICS[name].title
        console.print(_table(title, cut, [{one.name: one.scores[name] for one in each} for each in cut]))
        regrets = [{one.name: one.regrets[name] for one in each if name in one.regrets} for each in cut]
        if any(regrets):
            console.print(_table(f"{title}, regret against the oracle", cut, regrets))
    scores = [score for each in cut for one in each for score in one.scores.values()]
    if kinds := sorted({score.interval for score in scores} - {"none"}):
        console.print(f"Intervals: 95 %, {' / '.join(kinds)}.", style="dim", soft_wrap=True)
    for one in cut[0]:
        if reasons := _reasons(one):
            console.print(f"{one.name}: {'; '.join(reasons)}", style="dim", markup=False, soft_wrap=True)


def _table(title: str, cut: Sequence[Sequence[Slice]], scores: Sequence[Mapping[str, Score]]) -> Table:
    """Return one score of every slice (rows) and method (columns)."""
    from rich.table import Table

    from clbench.listing import interval

    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("documents", justify="right")
    for each in cut:
        table.add_column(each[0].label, justify="right", overflow="fold")
    for one in cut[0]:
        cells = [interval(of_method[one.name]) if one.name in of_method else "–" for of_method in scores]
        table.add_row(one.name, f"{one.n_documents:,}", *cells)
    return table


def _reasons(one: Slice) -> list[str]:
    """Return why scores of a slice are not numbers, and which of its periods are left out."""
    from clbench.results.slices import NO_DOCUMENTS

    reasons = sorted({score.reason for score in one.scores.values() if score.reason})
    few = [str(stage) for stage, reason in one.left_out.items() if reason != NO_DOCUMENTS]
    return [*reasons, *([f"too few documents in period {', '.join(few)}"] if few else [])]
