"""The command ``clbench fisher``: how rank-1 the Fisher of a run's weights or of a checkpoint is. Thin.

What is measured stands in ``clbench.fisher.subjects``, what the figures mean in docs/fisher.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from clbench.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from clbench.fisher.diagnostic import Block, Report
    from clbench.fisher.subjects import Options, Progress
    from clbench.results.store import RunStore

SHOWN = {
    "rank1_error": "rank-1 error, along mu",
    "best_rank1_error": "rank-1 error, best direction",
    "diagonal_error": "diagonal error",
    "captured": "share of the trace along mu",
    "top_share": "share of the top eigenvalue",
    "eigen_ratio": "second / top eigenvalue",
    "effective_rank": "effective rank",
    "kappa": "collinearity kappa",
    "noise_scale": "noise scale B, samples",
    "split_half": "split-half cosine of mu",
    "mean_abs_cos": "mean |cos(g, mu)|",
    "alignment": "|cos(mu, top eigenvector)|",
    "c_star": "c*, cross-fitted",
    "c_star_plugin": "c*, in-sample",
    "rho": "rho, cross-fitted",
    "trace": "trace",
    "cos_minus_theta": "cos(mu, -theta)",
    "cos_minus_sqrt_v_theta": "cos(mu, -sqrt(v) theta)",
}
"""Quantities in the table, and their names there; --json has all."""
BLOCK_COLUMNS = {
    "rank1_error": "rank-1",
    "best_rank1_error": "best",
    "diagonal_error": "diag",
    "kappa": "kappa",
    "split_half": "split",
    "c_star": "c*",
    "cos_minus_theta": "cos -θ",
}
PICTURES = (".png", ".svg", ".html", ".htm")


def fisher(
    target: Annotated[
        str,
        typer.Argument(
            help="A run folder (its release weights, stage by stage) or a checkpoint (a folder or a hub id).",
            show_default=False,
        ),
    ],
    stage: Annotated[
        list[int] | None,
        typer.Option(
            help="Run: after which stages; 0 is the base. Checkpoint: the stage whose text is read.",
            show_default="all trained ones; of a checkpoint 0",
        ),
    ] = None,
    on: Annotated[
        str, typer.Option(help="Run: text of the stage just trained (own), of the one after it (next), or a number.")
    ] = "own",
    rows: Annotated[int, typer.Option(min=16, help="Samples.")] = 256,
    group: Annotated[
        str, typer.Option(help="What a sample is: sequence (a packed row), document, or a piece of so many tokens.")
    ] = "sequence",
    projection: Annotated[
        str, typer.Option(help="none (exact), a number of dimensions, or auto: exact where it fits into memory.")
    ] = "auto",
    blocks: Annotated[
        str, typer.Option(help="Blocks of parameters besides all: none, kinds, layers or both.")
    ] = "both",
    seed: Annotated[int, typer.Option(help="Of the choice of samples, of halves, signs and projection.")] = 0,
    track: Annotated[
        str | None, typer.Option("--track", "-t", help="Checkpoint: text of a track's stream.", show_default=False)
    ] = None,
    stream: Annotated[str | None, typer.Option(help="Checkpoint: text of a stream.", show_default=False)] = None,
    text: Annotated[Path | None, typer.Option(help="Checkpoint: a UTF-8 text file.", show_default=False)] = None,
    memory: Annotated[float, typer.Option(min=0.01, help="GiB of gradients that are held at once.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="Picture: .png, .svg or .html.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    mlflow: Annotated[
        str, typer.Option(help="Run: auto (the database of all runs, if there is one), none, sqlite or a tracking URI.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Say how rank-1 the Fisher is here: per parameter block, every figure beside what noise would give.

    Nothing is measured twice: reports of a run stand in its fisher.json, and MLflow shows them.
    """
    _check(blocks, plot, rows)
    folder = Path(target)
    from clbench.fisher.subjects import Options

    options = Options(
        n=rows,
        grouping=group,
        projection=_projection(projection),
        seed=seed,
        blocks=cast(Any, blocks),
        on=on,
        memory_bytes=int(memory * 2**30),
    )
    if (folder / "run.yaml").is_file():
        if given := [name for name, one in (("--track", track), ("--stream", stream), ("--text", text)) if one]:
            raise ConfigError(f"{given[0]} is for checkpoints; a run has its own stream", mend="use --on STAGE")
        reports = _of_run(folder, stage, options, device, mlflow)
    else:
        reports = [_of_checkpoint(target, stage, options, device, track, stream, text)]
    if plot is not None:
        from clbench.fisher.plot import draw

        draw(reports, plot)
    if as_json:
        typer.echo(json.dumps([one.as_dict() for one in reports], indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(reports)


def _check(blocks: str, plot: Path | None, rows: int) -> None:
    """Refuse bad options before anything is loaded."""
    if blocks not in ("none", "kinds", "layers", "both"):
        raise ConfigError(f"there are no blocks {blocks!r}", mend="choose none, kinds, layers or both")
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise ConfigError("this is no picture", where=plot, mend=f"end its name in {', '.join(PICTURES[:3])}")


def _projection(text: str) -> int | Literal["auto"] | None:
    """Return what ``--projection`` asks for."""
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigError(f"not a projection: {text!r}", where="--projection", mend="give auto, none or a number")


def _of_run(folder: Path, stages: list[int] | None, options: Options, device: str, mlflow: str) -> list[Report]:
    """Measure a run, and bring MLflow up to date where the run is tracked."""
    from clbench import tracking
    from clbench.fisher.subjects import measure_run
    from clbench.results.store import RunStore

    store = RunStore.open(folder)
    uri = tracking_uri(store, mlflow)
    with _bars() as progress:
        reports = measure_run(store, stages, options, device=device, progress=progress)
    if uri is not None:
        tracking.MlflowSink(uri).safe_sync(store)
    return reports


def tracking_uri(store: RunStore, mode: str) -> str | None:
    """Return where a run is tracked: ``auto`` is the database of all runs above its folder, if there is one."""
    from clbench import tracking

    parents = store.folder.resolve().parents
    root = parents[2] if len(parents) > 2 else parents[0]  # RUNS/TRACK/METHOD/seed-0
    if mode != "auto":
        return tracking.uri_of_mode(mode, root)
    return tracking.default_uri(root) if (root / "mlflow.db").is_file() else None


def _of_checkpoint(
    target: str,
    stages: list[int] | None,
    options: Options,
    device: str,
    track: str | None,
    stream: str | None,
    text: Path | None,
) -> Report:
    from clbench.fisher.subjects import measure_checkpoint

    if stages and len(stages) > 1:
        raise ConfigError("a checkpoint is measured on one stage", mend="give --stage once")
    if options.on != "own":
        raise ConfigError("--on is for runs", mend="give --stage K: the stage whose text is read")
    with _bars() as progress:
        return measure_checkpoint(
            target,
            options,
            track=track,
            stream=stream,
            text=text,
            stage=stages[0] if stages else None,
            device=device,
            progress=progress,
        )


@contextmanager
def _bars() -> Iterator[Progress]:
    """Yield what makes a bar a measurement; silent when stderr is no terminal."""
    from rich.progress import Progress as Bars

    from clbench.console import stderr

    with Bars(console=stderr, disable=not stderr.is_terminal, transient=True) as bars:

        def begin(title: str, n_rows: int) -> Callable[[int], None]:
            task = bars.add_task(title, total=n_rows)
            return lambda n: bars.advance(task, n)

        yield begin


# printing


def show(reports: Sequence[Report]) -> None:
    """Print every report: its verdict, the table of all parameters, and a line a block."""
    from rich.console import Console

    from clbench.fisher.subjects import title_of

    console = Console(markup=False, highlight=False, emoji=False)
    for report in reports:
        console.print(title_of(report.about), style="bold", soft_wrap=True)
        how = "exact" if report.projection is None else f"projected to {report.projection:,} dimensions"
        size = f"{report.n_samples} samples by {report.about['grouping']}, {report.loss_nats:.3f} nats per token"
        error = f", Gram error up to {report.gram_error:.3f} of the norms" if report.projection else ""
        console.print(f"{size}; {how}{error}", style="dim", soft_wrap=True)
        console.print(_table(report.all))
        if len(report.blocks) > 1:
            console.print(_blocks(report.blocks))
        console.print(f"{report.verdict()}.", soft_wrap=True)
        console.print()
    told = "noise: expected where there is nothing; reaches: 95% of random signs of the gradients. See docs/fisher.md"
    console.print(told, style="dim", soft_wrap=True)


def _table(block: Block) -> Table:
    """Return the table of one block; it fits 80 columns."""
    from rich.table import Table

    title = f"{block.name}, {block.n_parameters:,} parameters"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("quantity", no_wrap=True)
    for name in ("value", "noise", "reaches", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, words in SHOWN.items():
        if one := block.quantities.get(name):
            p = "" if one.p is None else f"{one.p:.2f}"
            table.add_row(words, number(one.value), number(one.floor, ""), number(one.null_bound, ""), p)
    return table


def _blocks(blocks: Sequence[Block]) -> Table:
    """Return one line a block."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("block", no_wrap=True)
    table.add_column("numbers", justify="right", no_wrap=True)
    for words in BLOCK_COLUMNS.values():
        table.add_column(words, justify="right", no_wrap=True)
    table.add_column("mu", no_wrap=True)
    for block in blocks:
        cells = ["–" if (one := block.value(name)) is None else f"{one:.3f}" for name in BLOCK_COLUMNS]
        table.add_row(block.name, f"{block.n_parameters:,}", *cells, "noise" if block.mean_is_noise else "")
    return table


def number(value: float | None, nothing: str = "–") -> str:
    """Return a figure with three or four digits."""
    if value is None:
        return nothing
    if value == 0 or 0.0995 <= abs(value) < 10:
        return f"{value:.3f}"
    if 10 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1 else f"{value:.1e}"
