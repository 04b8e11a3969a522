"""Commands that show bills: ``clbench ledger`` and the table of ``clbench oracle --plan``. Thin, like ``clbench.cli``.

Heavy imports live inside the functions. What comes from a run folder is printed as it is, never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.errors import ClbenchError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from clbench.audit import Audit
    from clbench.results.bill import PlanEntry, RunBill
    from clbench.results.store import RunStore

SHADES = " ░▒▓█"
"""Shares of a stage's tokens, darker is more; the lightest is nothing at all."""
RUN_COLUMN = 20
"""Characters that a run's column takes in the table of costs."""
MAX_LISTED = 8
"""Sources of a mixture that are listed one by one."""


def ledger(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Count the rows again from run.yaml and the stream; exit code 1 on a lie.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Show what runs trained on, by source period, and what they cost; with --verify, whether that is true."""
    from clbench.results.bill import of_equal_tokens, read_bill
    from clbench.results.store import find_runs

    stores = find_runs(runs)
    if not stores:
        raise ConfigError("no run in these folders", where=", ".join(map(str, runs)), mend="run `clbench run` first")
    bills = [read_bill(store) for store in stores]
    audits, refused = _audited(stores) if verify else ({}, {})
    available = [available_tokens(store, trusted=verify) for store in stores]
    if as_json:
        found = [
            {
                "folder": str(store.folder),
                **bill.as_dict(there),
                **(_audit_as_dict(str(store.folder), audits, refused) if verify else {}),
            }
            for store, bill, there in zip(stores, bills, available, strict=True)
        ]
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for group in of_equal_tokens(bills):
            show_tokens(group, available[bills.index(group[0])])
        show_costs(bills)
        for store, bill in zip(stores, bills, strict=True):
            if found_by := audits.get(str(store.folder)):
                show_audit(bill, found_by)
    _end(dict(zip(map(str, (store.folder for store in stores)), bills, strict=True)), audits, refused)


def available_tokens(store: RunStore, *, trusted: bool = False) -> dict[int, int] | None:
    """Return source stage -> training tokens of a run's stream; None where it is not built here, or is another.

    A stream that is a file is looked at in ``trusted`` runs only: it would be imported.
    """
    from clbench import registry
    from clbench.build import stream_folder
    from clbench.stream import Stream

    track = store.config()["track"]
    target = str(track.get("stream"))
    try:
        if not (trusted or registry.canonical(target.partition(":")[0]) in registry.stream_names()):
            return None
        stream = Stream(stream_folder(registry.make_stream_source(target)))
    except ClbenchError:
        return None
    if stream.sha256 != track.get("stream_sha256"):
        return None
    return {info.index: stream.counts("train", info.index)["n_tokens"] for info in stream.stages()}


def _audited(stores: Sequence[RunStore]) -> tuple[dict[str, Audit], dict[str, ClbenchError]]:
    from clbench.audit import audit_all

    audits, refused = audit_all(stores)
    if len(stores) == 1:
        for error in refused.values():
            raise error
    return audits, refused


def _audit_as_dict(folder: str, audits: Mapping[str, Audit], refused: Mapping[str, ClbenchError]) -> dict[str, Any]:
    """Return the audit, or why there is none."""
    if folder in refused:
        return {"audit": None, "not_verified": str(refused[folder])}
    return {"audit": audits[folder].as_dict(), "not_verified": None}


def _end(bills: Mapping[str, RunBill], audits: Mapping[str, Audit], refused: Mapping[str, ClbenchError]) -> None:
    """Exit with 1 when a ledger is not true, with 2 when one could not be verified."""
    from clbench.results.bill import one_line

    false = {folder: found for folder, found in audits.items() if not found.holds}
    for folder, found in false.items():
        more = f" (and {len(found.problems) - 1} more; --json lists them)" if len(found.problems) > 1 else ""
        typer.secho(f"error: {bills[folder].name}: {one_line(found.problems[0])}{more}", fg="red", err=True)
    if false:
        raise typer.Exit(1)
    for error in list(refused.values())[:1]:
        raise ConfigError(f"{len(refused)} of {len(bills)} runs cannot be verified: {error}")


# printing


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def _table(*columns: str, title: str = "") -> Table:
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    return table


def show_tokens(group: Sequence[RunBill], available: Mapping[int, int] | None) -> None:
    """Print where the target tokens of runs came from; all of the group trained on the same numbers of tokens."""
    console, bill = _console(), group[0]
    seeds = ", ".join(str(one.seed) for one in group)
    console.print(f"{bill.track} · {bill.label} · seed{'s' if len(group) > 1 else ''} {seeds}", style="bold")
    if bill.outside:
        console.print("Trained elsewhere: nothing is known of what it cost.\n")
        return
    if not bill.finished:
        console.print(f"Not finished: {bill.n_rows_done} of {len(bill.stages)} rows.", style="yellow")
    if bill.n_tokens:
        console.print(_by_stage(bill, console.width))
    console.print(_by_source(bill, available))
    notes = (
        []
        if available is not None
        else ["passes need the built stream of the run's track; of one that is a file, --verify"]
    )
    if bill.base_tokens and 0 in bill.stages and 0 not in bill.tokens:
        notes.append(f"the base had seen {bill.base_tokens:,} tokens of stage 0 before")
    for note in notes:
        console.print(note, style="dim", soft_wrap=True)
    for stage, plans in bill.reviews().items():
        for entry in plans:
            console.print(f"stage {stage} from step {entry.step}: {plan_text(entry, stage)}", soft_wrap=True)
    console.print()


def _by_stage(bill: RunBill, width: int) -> Table:
    """Return trained stages x source stages: tokens and shares, or shares alone, or only shades, as they fit."""
    sources, shares, totals = sorted(bill.stages), bill.shares(), bill.totals()
    columns = [str(source) for source in sources]
    for what in ("target tokens", "share of target tokens"):
        cells = {stage: _cells(bill.tokens[stage], row, sources, what) for stage, row in shares.items()}
        if sum(3 + max(map(len, column)) for column in zip(columns, *cells.values(), strict=True)) + 45 <= width:
            title = f"{what} by source stage"
            break
    else:
        title, columns, cells = "target tokens", [], {stage: [] for stage in shares}
    n_merged = -(-len(sources) // max(10, width - 45))  # source stages that one shade stands for
    merged = f", {n_merged} a sign" if n_merged > 1 else ""
    table = _table("trained", *columns, "total", "by source" + merged, title=title)
    table.columns[-1].justify = "left"
    for stage, row in shares.items():
        shades = "".join(
            shade(max(row.get(source, 0.0) for source in sources[first : first + n_merged]))
            for first in range(0, len(sources), n_merged)
        )
        table.add_row(f"{stage} {bill.stages[stage]}", *cells[stage], f"{totals[stage]:,}", shades)
    return table


def _cells(tokens: Mapping[int, int], shares: Mapping[int, float], sources: Sequence[int], what: str) -> list[str]:
    """Return one trained stage's cells; ``what`` is the table's kind."""
    texts = {source: f"{share:.0%}" for source, share in shares.items() if share}
    if what == "target tokens":
        texts = {source: f"{tokens[source]:,} {text}" for source, text in texts.items()}
    return [texts.get(source, "") for source in sources]


def shade(share: float) -> str:
    """Return one character for a share of a stage's tokens: a blank for none, the darkest from three quarters on."""
    return SHADES[0] if share <= 0 else SHADES[1 + min(3, int(share * 4))]


def _by_source(bill: RunBill, available: Mapping[int, int] | None) -> Table:
    """Return what the whole run drew from every source stage."""
    unit, budgets = bill.unit(), bill.in_budgets()
    title = "the whole run" + (f"; B = {unit:,.0f} tokens" if unit else "")
    table = _table("source", "target tokens", "share", "in B", "passes", "", title=title)
    table.columns[-1].justify = "left"
    by_source, passes = bill.by_source(), bill.passes(available or {})
    most = max(by_source.values(), default=0)
    for source, n in by_source.items():
        table.add_row(
            f"{source} {bill.stages.get(source, '')}",
            f"{n:,}",
            f"{n / bill.n_tokens:.1%}" if bill.n_tokens else "–",
            f"{budgets[source]:.3g}" if source in budgets else "–",
            f"{passes[source]:.3g}" if source in passes else "–",
            "█" * round(16 * n / most) if most else "",
        )
    return table


def plan_text(entry: PlanEntry, stage: int) -> str:
    """Return what a stage was drawn from since a step, in words."""
    mixture = {source: share for source, share in entry.mixture.items() if share > 0}
    if len(mixture) <= MAX_LISTED:
        text = ", ".join(f"{share:.1%} of {source}" for source, share in sorted(mixture.items()))
    else:
        old = [share for source, share in mixture.items() if source != stage]
        text = f"{mixture.get(stage, 0):.1%} new, {len(old)} old stages {min(old):.2%} to {max(old):.2%} each"
    if entry.pools:
        text += f"; pools of {sum(entry.pools.values()):,} tokens in {_n(len(entry.pools), 'stage')}"
    return text + (f"; {_n(entry.n_excluded, 'document')} left out" if entry.n_excluded else "")


def _n(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def show_costs(bills: Sequence[RunBill]) -> None:
    """Print tokens, work, time and storage by purpose, one column a run, as many side by side as fit."""
    console = _console()
    n_columns = max(1, (console.width - 2 * RUN_COLUMN) // RUN_COLUMN)
    for start in range(0, len(bills), n_columns):
        here = bills[start : start + n_columns]
        table = _table("cost", *(bill.name for bill in here))
        for name, values in costs_of(here).items():
            table.add_row(name, *values)
        console.print(table)


def costs_of(bills: Sequence[RunBill]) -> dict[str, list[str]]:
    """Return row name -> one text a run."""
    from clbench.results.bill import one_line

    rows = {"target tokens": [f"{bill.n_tokens:,}" for bill in bills]}
    rows["steps"] = [f"{sum(bill.steps.values()):,}" if bill.steps else "–" for bill in bills]
    for field, unit, pattern in (
        ("extra_tokens", "extra tokens", "{:,.0f}"),
        ("flops", "FLOPs", "{:.3g}"),
        ("seconds", "seconds", "{:,.1f}"),
        ("stored_bytes", "bytes kept", "{:,.0f}"),
    ):
        parts: list[Mapping[str, float]] = [getattr(bill, field) for bill in bills]
        for purpose in sorted({purpose for part in parts for purpose in part}):
            rows[f"{unit}, {one_line(purpose)}"] = [
                pattern.format(part[purpose]) if purpose in part else "–" for part in parts
            ]
        if any(parts):
            rows[f"{unit}, all"] = [pattern.format(sum(part.values())) for part in parts]
    rows["peak memory, MB"] = [f"{bill.peak_memory_bytes / 1e6:,.0f}" for bill in bills]
    return rows


def show_audit(bill: RunBill, found: Audit) -> None:
    """Print what an audit counted, and what was drawn of deleted documents."""
    from clbench.audit import summary_line

    console = _console()
    if found.holds:
        console.print(f"{bill.name}: {summary_line(found)}", style="green", soft_wrap=True)
    for one in found.deletions:
        base, run = one.tokens_before["base"], sum(one.tokens_before.values()) - one.tokens_before["base"]
        console.print(
            f"{bill.name}: deletion of {_n(one.n_documents, 'document')} from stage {one.stage} on "
            f"({one.n_found:,} have training text): drawn before {run:,} tokens, by the base {base:,}; "
            f"drawn after {sum(one.tokens_after.values()):,}",
            soft_wrap=True,
        )


def show_series_plan(found: Mapping[str, Any]) -> None:
    """Print what a series of oracles would cost (``clbench.oracle_series.compute_table``)."""
    console = _console()
    table = _table("oracle to", "tokens", "of each stage", title=f"{found['track']}: retraining from scratch, tokens")
    for one in found["oracles"]:
        table.add_row(f"{one['cutoff']} {one['stage']}", f"{one['n_tokens']:,}", f"{one['n_tokens_per_stage']:,.0f}")
    table.add_section()
    table.add_row("all oracles", f"{found['series_tokens']:,}", "")
    table.add_row("one continual run", f"{found['continual_tokens']:,}", "")
    console.print(table)
    less = f"{found['saving']:.0%} less" if found["saving"] >= 0 else f"{-found['saving']:.0%} more"
    console.print(f"The series costs {found['ratio']:.2f} times the continual run, which takes {less}.")
