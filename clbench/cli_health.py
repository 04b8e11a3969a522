"""The command ``clbench health``: a check-up of one model, against another one, as a table and a page. Thin.

What is measured stands in ``clbench.health``, what the figures mean in docs/health.md.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from clbench.health import Health


def health(
    model: Annotated[str, typer.Argument(help="A model's folder, a hub id, model:NAME, or a run.", show_default=False)],
    baseline: Annotated[
        str | None, typer.Option(help="Model to compare with; of a run, its base.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Model before the baseline: sorts tasks into four buckets.", show_default=False),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", "-s", help="NAME or NAME:option=value.", show_default="general, longcontext, small"),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Your own text, its loss is a task: txt, jsonl, csv, a folder.", show_default=False),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of jsonl and csv files.")] = "text",
    stream: Annotated[
        str | None, typer.Option(help="Built stream, for suites that measure on one.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML report to write.")] = Path("health.html"),
    fail_on_damage: Annotated[
        bool, typer.Option("--fail-on-damage", help="Exit code 1 where a task is surely worse than the baseline's.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Worker processes.", show_default="1, or one a device")
    ] = None,
    devices: Annotated[str, typer.Option(help="auto, cpu, or several that workers take in turn: cuda:0,cuda:1.")] = (
        "auto"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Check a model's abilities, say what it lost against another one and how sure that is, and write a page.

    Example: clbench health runs/mine/stage-03 --baseline model:smollm2-135m --text mine.jsonl --fail-on-damage

    Exit code 1: a cell could not be measured (it is named), or with --fail-on-damage: a task is damaged.
    """
    from clbench import fanout, registry
    from clbench import health as checkups

    places = fanout.devices_of(devices)
    found = checkups.examine(
        checkups.Options(
            model=model,
            baseline=baseline,
            base=base,
            suites=tuple(suite or ()),
            texts=tuple(text or ()),
            text_column=text_column,
            stream=stream,
            n_jobs=jobs or len(places),
            devices=tuple(places),
        )
    )
    path = registry.tool("health_page").build_health_page(found, out)
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "report": str(path)}, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(found)
        typer.echo(str(path))
    for failure in fanout.told(found.failures):
        typer.secho(f"error: {failure}", fg="red", err=True)
    if found.failures or (fail_on_damage and found.damaged):
        raise typer.Exit(1)


# printing


def show(found: Health) -> None:
    """Print every task, the verdict and the bill."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold", min_width=12)
    heads = ["score", "chance", *(["baseline", "difference", "p, Holm"] if found.changes else [])]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    changes = {one.task: one for one in found.changes}
    for name, score in found.scores.items():
        row = [number(score.value) + ("" if found.changes else bounds(score)), number(found.tasks[name].chance)]
        state = ""
        if found.changes:
            change = changes.get(name)
            row += ["–"] * 3 if change is None else [
                number(change.before.value),
                number(change.difference.value, sign="+") + bounds(change.difference.interval, sign="+"),
                probability(change.p_holm),
            ]  # fmt: skip
            state = "not in the baseline" if change is None else "" if change.state == "unchanged" else change.state
        unit = f" ({found.tasks[name].unit})" if found.tasks[name].direction == "lower" else ""
        table.add_row(name + unit, *row, state)
    console.print(table)
    for line in notes(found):
        console.print(line, style="dim", soft_wrap=True)
    console.print(f"{found.verdict}.", style="bold", soft_wrap=True)


def notes(found: Health) -> list[str]:
    """Return the lines between table and verdict: retention, buckets, effect sizes, what was left out, the bill."""
    from clbench.results import tasks

    lines = []
    if found.retention is not None and math.isfinite(found.retention.corrected.value):
        kept = found.retention.corrected
        lines.append(
            f"retention of the baseline's scores, chance taken off: {100 * kept.value:.1f} % "
            f"({100 * kept.low:.1f}-{100 * kept.high:.1f}), mean of {kept.n} of {len(found.retention.by_task)} tasks"
        )
    if found.changes:
        effects = {name: one for name, one in tasks.effects(found.changes).items() if math.isfinite(one.value)}
        if effects:
            named = {"paper": "g of the junk paper", "d_z": "d_z", "d_av": "d_av"}
            told = ", ".join(f"{named[name]} {one.value:+.2f}" for name, one in effects.items())
            lines.append(f"effect sizes over tasks: {told}")
    if found.fates:
        told = ", ".join(f"{name} {reached} of {of}" for name, (reached, of) in tasks.rates(found.fates).items())
        lines.append(f"buckets: {told}")
    lines += [f"left out: {spec}: {why}" for spec, why in found.skipped.items()]
    bill: Any = found.bill
    total = sum(one["flops"] for one in bill["models"].values())
    lines.append(
        f"{bill['cells_measured']} cells measured, {bill['cells_cached']} were there; {total / 1e12:,.2f} TFLOP, "
        f"{bill['seconds_now']:.1f} s now"
    )
    return lines


def number(value: float, *, sign: str = "") -> str:
    """Return three decimals, a dash where undefined."""
    return f"{value:{sign}.3f}" if math.isfinite(value) else "–"


def probability(p: float) -> str:
    """Return a p-value, a dash where undefined."""
    return "<0.001" if p < 0.001 else number(p)


def bounds(one: Any, *, sign: str = "") -> str:
    """Return an interval in brackets, nothing where there is none."""
    return f" [{one.low:{sign}.3f}, {one.high:{sign}.3f}]" if math.isfinite(one.low + one.high) else ""
