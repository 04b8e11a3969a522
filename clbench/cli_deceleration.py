"""The command ``deceleration``: where the loss of each stage slows down; thin, heavy imports live inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clbench.errors import ConfigError

if TYPE_CHECKING:
    from clbench.capacity.deceleration import StageFit

TITLES = {"t_d": "break at step", "loss_d_nats": "loss there", "rate_d": "rate after"}


def deceleration(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)],
    first: Annotated[
        float | None,
        typer.Option(
            help="Steps at the start of a stage to leave out (100, or a twentieth of it).", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Say where the training loss of each stage slows down, and to which rate.

    A power law with one smooth break is fitted to the logged losses of every stage; a rate that falls from stage to
    stage at equal steps is a sign of lost plasticity. Example: clbench deceleration runs/codedocs-nano/sequential
    """
    if first is not None and first < 0:
        raise ConfigError(f"{first:g} steps cannot be left out", where="--first", mend="give 0 or more")
    from clbench.results.store import find_runs

    stores = find_runs(runs)
    if not stores:
        raise ConfigError("no run in these folders", where=", ".join(map(str, runs)), mend="run `clbench run` first")
    from clbench.capacity.deceleration import of_stages

    found = {str(store.folder): of_stages(store, first=first) for store in stores}
    if as_json:
        stages = {name: [one.as_dict() for one in fits] for name, fits in found.items()}
        typer.echo(json.dumps(stages, indent=2, ensure_ascii=False, allow_nan=False))
        return
    for name, fits in found.items():
        show(name, fits)


def show(name: str, fits: list[StageFit]) -> None:
    """Print a row a stage."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    stdout = Console(markup=False, highlight=False, emoji=False)
    stdout.print(name, style="bold", soft_wrap=True)
    if not fits:
        stdout.print("no step was logged", style="dim")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("stage", "steps", "points", *TITLES.values(), "misfit"):
        table.add_column(title, justify="right")
    for one in fits:
        facts = (str(one.stage), str(one.n_steps), str(one.n_points))
        if one.fit is None:
            table.add_row(*facts, one.reason)
            continue
        cells = [f"{getattr(one.fit, key):.3g} ({_bounds(*one.fit.intervals[key])})" for key in TITLES]
        table.add_row(*facts, *cells, f"{one.fit.rsle:.3f}")
    stdout.print(table)
    stdout.print("( ) 95 % by profile likelihood; … where the losses do not bound a side", style="dim", soft_wrap=True)


def _bounds(low: float, high: float) -> str:
    return ", ".join("…" if abs(bound) == float("inf") else f"{bound:.3g}" for bound in (low, high))
