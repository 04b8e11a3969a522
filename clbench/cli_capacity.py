"""The commands ``capacity``, ``probe``, ``forecast`` and ``predictors``: thin; heavy imports live inside them.

What is measured stands in ``clbench.capacity_report`` and ``clbench.probe``, what is computed in ``clbench.results``,
what the figures mean in docs/capacity.md, docs/plasticity-probe.md and docs/forecast.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from clbench.results.capacity import MethodCapacity
    from clbench.results.forecast import Forecast
    from clbench.results.predictors import Predictor
    from clbench.results.stats import Interval
    from clbench.results.store import RunStore

RunsArgument = Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")]
KeepOption = Annotated[
    bool, typer.Option("--keep/--no-keep", help="Write the figures into the run folders, for MLflow and for later.")
]
MlflowOption = Annotated[
    str, typer.Option(help="auto (the database of all runs, if there is one), none, sqlite or a tracking URI.")
]
PICTURES = (".png", ".svg", ".pdf")
N_SHOWN = 8
"""Predictors of a view in the table; --json has all."""


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _stores(runs: Sequence[Path]) -> list[RunStore]:
    from clbench.results.store import find_runs

    stores = find_runs(runs)
    if not stores:
        raise ConfigError("no run in these folders", where=", ".join(map(str, runs)), mend="run `clbench run` first")
    return stores


@contextmanager
def _teller(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows how far a measurement is: a bar on a terminal, nothing elsewhere."""
    from rich.progress import Progress

    from clbench.console import stderr

    with Progress(console=stderr, disable=quiet or not stderr.is_terminal, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)


def _sync(stores: Sequence[RunStore], mode: str) -> None:
    """Bring MLflow up to date where the runs are tracked."""
    from clbench.cli_fisher import tracking_uri

    for store in stores:
        if (uri := tracking_uri(store, mode)) is not None:
            from clbench.tracking import MlflowSink

            MlflowSink(uri).safe_sync(store)


# capacity


def capacity(
    runs: RunsArgument,
    html: Annotated[
        Path | None, typer.Option(help="Write a page of its own, such as report.html.", show_default=False)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure checkpoints that were not measured yet.")
    ] = True,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Gradients of every period, too: first-order parts, opposition.")
    ] = False,
    keep: KeepOption = True,
    device: DeviceOption = "auto",
    mlflow: MlflowOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say what the checkpoints of runs can still represent and hold, stage by stage, methods side by side.

    Example: clbench capacity runs/codedocs-nano/sequential runs/codedocs-nano/replay --html capacity.html
    """
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise ConfigError("this is no page", where=html, mend="end its name in .html")
    stores = _stores(runs)
    from clbench import registry
    from clbench.capacity_report import gather

    with _teller() as tell:
        found = gather(stores, measure=measure, gradients=gradients, keep=keep, device=device, tell=tell)
    if keep and measure:
        _sync(stores, mlflow)
    if html is not None:
        registry.tool("capacity_page").build_page(found, html)
    if as_json:
        _json([one.as_dict() for one in found])
    else:
        show_capacity(found)
        if html is not None:
            typer.echo(str(html))


def show_capacity(found: Sequence[MethodCapacity]) -> None:
    """Print a table a method and section: one row a stage."""
    from clbench.results.capacity import COST, COSTS, HEADLINES, SHORT_COSTS

    console, costs = _console(), {key: COSTS[key] for key in SHORT_COSTS}
    for one in found:
        seeds = f"{len(one.seeds)} seeds" if len(one.seeds) > 1 else f"seed {one.seeds[0]}"
        reference = {"oracle": "the oracle", "best_of_run": "the best of the run"}.get(
            one.estimate.reference, "nothing"
        )
        console.print(f"{one.label}, {seeds}", style="bold", soft_wrap=True)
        console.print(_stage_table(one, f"{COST}, nats per token above {reference}", costs))
        for section in dict.fromkeys(headline.section for headline in HEADLINES):
            titles = {h.key: h.title for h in HEADLINES if h.section == section and _is_there(one.values(h.key))}
            if titles:
                console.print(_stage_table(one, section, titles))
        slope = one.estimate.per_run["slope"]
        console.print(f"slope of J: {_number(slope)} nats a stage", soft_wrap=True)
        for note in one.notes:
            console.print(note, style="dim", soft_wrap=True)
        for report in one.probes:
            show_probe(report, console)
        console.print()
    kinds = sorted({i.kind for one in found for v in one.estimate.per_stage.values() for i in v.values()} - {"none"})
    if kinds:
        console.print(f"± is half of a 95 % interval: {' / '.join(kinds)}.", style="dim", soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def _is_there(values: Mapping[int, Interval]) -> bool:
    return any(one.value == one.value for one in values.values())  # NaN is not itself


def _stage_table(one: MethodCapacity, title: str, titles: Mapping[str, str]) -> Table:
    """Return one row a stage, one column a figure."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    columns = {key: one.values(key) for key in titles}
    for words in titles.values():
        table.add_column(words, justify="right", overflow="fold")
    for row in sorted({row for values in columns.values() for row in values}):
        name = "base" if row == 0 else one.stages.get(row, str(row))
        table.add_row(name, *(_number(values.get(row)) for values in columns.values()))
    return table


def _number(one: Interval | None) -> str:
    """Return a figure with half of its interval, where it has one."""
    from clbench.cli_fisher import number

    if one is None or one.value != one.value:
        return "–"
    half = (one.high - one.low) / 2
    return number(one.value) + (f" ± {half:.2g}" if half == half else "")


# probe


def probe(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    on: Annotated[
        str,
        typer.Option(help="Text that no checkpoint has seen: STREAM@STAGE, a file or a folder.", show_default=False),
    ],
    stages: Annotated[
        str | None,
        typer.Option(help="After which stages, such as 1,3; the base always.", show_default="all with weights"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Budget of one probe.")] = 30_000,
    orders: Annotated[int, typer.Option(help="Orders of the data; what intervals are over.")] = 3,
    rates: Annotated[str, typer.Option(help="Multiples of the track's learning rate.")] = "1/3+1+3",
    heldout: Annotated[int, typer.Option(help="Tokens of held-out text that the curves are measured on.")] = 8_000,
    threshold: Annotated[
        float | None,
        typer.Option(help="Loss to be reached, nats per token.", show_default="half of the base's drop"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh/--no-fresh", help="Probe a fresh initialisation, too.")] = True,
    keep: KeepOption = True,
    device: DeviceOption = "auto",
    mlflow: MlflowOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say how well checkpoints still learn unseen text: short trainings from each, against base and fresh weights.

    Example: clbench probe runs/codedocs-nano/sequential/seed-0 --on codedocs-nano-tuning@1 --stages 1,3,5
    """
    from clbench.results.store import RunStore

    store = RunStore.open(run)
    wanted = _stage_numbers(stages)
    from clbench import probe as probing

    options = probing.Options(
        on=on,
        n_tokens=tokens,
        n_orders=orders,
        rates=tuple(rates.split("+")),
        n_heldout_tokens=heldout,
        threshold_nats=threshold,
        fresh=fresh,
    )
    with _teller() as tell:
        report = probing.probe_run(store, wanted, options, device=device, tell=tell)
    if keep:
        probing.keep_report(store, report)
        _sync([store], mlflow)
    _json(report) if as_json else show_probe(report, _console())


def _stage_numbers(text: str | None) -> list[int] | None:
    """Return the stages of ``1,3,5``."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"{text!r} are no stages", where="--stages", mend="give numbers such as 0,1,3")
    return sorted({int(part) for part in parts})


def show_probe(report: Mapping[str, Any], console: Console) -> None:
    """Print a probe's figures, a line a model and rate, then what they say."""
    from rich.table import Table

    about = report["about"]
    bill, options = about["bill"], about["options"]
    console.print(
        f"{about['run']} probed on {options['on']}: {options['n_tokens']:,} tokens, {options['n_orders']} orders",
        style="bold",
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("weights", no_wrap=True)
    for name in ("rate", "start", "final", "area", f"tokens to {report['threshold_nats']:.2f}", "area - base's"):
        table.add_column(name, justify="right", overflow="fold")
    for name, model in report["models"].items():
        for rate, figures in model["figures"].items():
            lost = model.get("against_base", {}).get("by_rate", {}).get(rate)
            mark = "*" if rate == model["best_rate"] else ""
            cells = [_value(figures[key]) for key in ("start", "final", "area")]
            table.add_row(name, rate + mark, *cells, _value(figures["tokens_to"], digits=0), _value(lost))
    console.print(table)
    for name, model in report["models"].items():
        if "against_base" in model:
            best = _value(model["against_base"]["at_best"])
            console.print(f"{name}: {model['against_base']['verdict']} (at the best rates {best})", soft_wrap=True)
    cost = f"{bill['n_tokens']:,} tokens, {bill['flops'] / 1e12:,.2f} TFLOP, {bill['seconds']:,.0f} s"
    console.print(
        f"{bill['probes']} probes, {bill['cached']} from the cache: {cost}. Nats per token; * the best rate.",
        style="dim",
        soft_wrap=True,
    )


def _value(one: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Return a JSON-able value with half of its interval."""
    if one is None or one["value"] is None:
        return "–"
    half = "" if one["low"] is None else f" ± {(one['high'] - one['low']) / 2:,.{digits}f}"
    return f"{one['value']:,.{digits}f}{half}"


# forecast


def forecast(
    runs: RunsArgument,
    at: Annotated[str, typer.Option(help="Budget: 10x (times the largest measured) or tokens a stage.")] = "10x",
    parameters: Annotated[float | None, typer.Option(help="Model size.", show_default="the largest measured")] = None,
    hide: Annotated[int, typer.Option(min=1, help="Largest budgets that the back-test hides.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Picture: .png, .svg or .pdf.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how much would be forgotten and how well new text learnt with more tokens, from a sweep of runs.

    Example: clbench forecast runs/sweep-* --at 10x. A back-test says how wrong such a forecast was.
    """
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise ConfigError("this is no picture", where=plot, mend=f"end its name in {', '.join(PICTURES)}")
    from clbench.results.forecast import forecasts, wanted_tokens

    wanted_tokens(at, 1.0)
    if parameters is not None and not parameters > 0:
        raise ConfigError("a model without parameters", where="--parameters", mend="give a number above 0")
    found, left_out = forecasts(_stores(runs), at, n_parameters=parameters, n_hidden=hide)
    if not found:
        reasons = "; ".join(sorted(set(left_out.values())))
        raise ConfigError(f"no run can be used: {reasons}", mend="give finished runs of a method that trains")
    if plot is not None:
        from clbench.forecast_plot import draw

        draw(found, plot)
    if as_json:
        _json({"forecasts": [one.as_dict() for one in found], "left_out": left_out})
    else:
        show_forecasts(found, left_out)


def show_forecasts(found: Sequence[Forecast], left_out: Mapping[str, str]) -> None:
    """Print every forecast with its law and its back-test."""
    console = _console()
    for one in found:
        made, budgets = one.prediction, sorted({o.n_tokens for o in one.observations})
        sizes = sorted({o.n_parameters for o in one.observations})
        console.print(f"{one.method}: {one.metric.replace('_', ' ')}", style="bold", soft_wrap=True)
        console.print(
            f"  {_count(one.observations, 'run')}, {_count(budgets, 'budget')}, {_count(sizes, 'model size')}",
            style="dim",
            soft_wrap=True,
        )
        if made.reason:
            console.print(f"  no forecast: {made.reason}", soft_wrap=True)
        else:
            console.print(
                f"  at {made.n_tokens:,.0f} tokens a stage ({one.reach:g} times the largest): "
                f"{made.value:.3f} [{made.low:.3f}, {made.high:.3f}] nats per token",
                soft_wrap=True,
            )
        if one.fit is not None:
            facts = one.fit.as_dict()
            for name, e in facts["exponents"].items():
                bound = "" if e["bounded"] else ": not bounded by these runs"
                console.print(f"  {name} {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]{bound}", soft_wrap=True)
        test = one.back_test
        if test.reason:
            console.print(f"  no back-test: {test.reason}", soft_wrap=True)
        else:
            console.print(
                f"  back-test, {test.reach:g} times beyond what it saw: wrong by {test.error:.3f} nats "
                f"(no change: {test.error_of_no_change:.3f}), {100 * test.covered:.0f} % inside the interval",
                soft_wrap=True,
            )
    for folder, reason in left_out.items():
        console.print(f"left out: {folder}: {reason}", style="dim", soft_wrap=True)


def _count(things: Sequence[object], name: str) -> str:
    """Return how many there are: ``1 budget``, ``2 budgets``."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


# predictors


def predictors(
    runs: RunsArgument,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure checkpoints that were not measured yet.")
    ] = True,
    gradients: Annotated[bool, typer.Option("--gradients", help="Gradients of every period, too.")] = False,
    keep: KeepOption = True,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say which figure of a checkpoint goes with forgetting, over all runs: rank correlations with intervals.

    Example: clbench predictors runs/codedocs-nano. One unit is a method; its seeds are averaged.
    """
    stores = _stores(runs)
    from clbench.capacity_report import figures_of_runs
    from clbench.results.predictors import predictors as ranked

    with _teller() as tell:
        found = ranked(
            figures_of_runs(stores, measure=measure, gradients=gradients, keep=keep, device=device, tell=tell)
        )
    _json([one.as_dict() for one in found]) if as_json else show_predictors(found)


def show_predictors(found: Sequence[Predictor]) -> None:
    """Print the strongest figures of every view."""
    from rich.table import Table

    from clbench.results.capacity import HEADLINES

    console, titles = _console(), {h.key: h.title for h in HEADLINES}
    said = {
        "early": "after the first trained stage, against what is lost after it",
        "last": "after the last stage, against all forgetting (goes with it, does not predict)",
        "change": "last less base, against all forgetting (likewise)",
    }
    for view, words in said.items():
        mine = [one for one in found if one.view == view]
        table = Table(title=words, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("figure", "rho", "95 % interval", "p of the largest", "methods", "runs"):
            table.add_column(name, justify="left" if name == "figure" else "right", overflow="fold")
        for one in mine[:N_SHOWN]:
            if one.rho == one.rho:
                interval = "–" if one.low != one.low else f"[{one.low:+.2f}, {one.high:+.2f}]"
                p = "–" if one.p_max != one.p_max else f"{one.p_max:.3f}"
                title = titles.get(one.name, one.name.replace("_", " "))
                table.add_row(title, f"{one.rho:+.2f}", interval, p, str(one.n_methods), str(one.n_runs))
        console.print(table)
    missing = sorted({f"{one.name}: {one.reason}" for one in found if one.reason})
    for line in missing[:N_SHOWN]:
        console.print(line, style="dim", soft_wrap=True)


COMMANDS = (capacity, probe, forecast, predictors)
