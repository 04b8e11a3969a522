"""The command ``clbench facts``: what runs know of a generated world's facts. Thin; definitions: results.knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.errors import ConfigError, IntegrityError, NotFoundError

if TYPE_CHECKING:
    from rich.table import Table

    from clbench.results.knowledge import GroupScore, Truth
    from clbench.results.store import RunStore

COLUMNS = {"forgotten": "forgot", "relapsed": "relaps", "stale": "stale", "never learned": "never"}
"""Statuses in the table, and their headings."""
COLOURS = ("#2a9d8f", "#e9c46a", "#e76f51", "#9b5de5", "#adb5bd")
"""Of the statuses, in their order."""


def facts(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)],
    form: Annotated[str, typer.Option(help="Questions as the documents put them (trained) or not (paraphrase).")] = (
        "trained"
    ),
    checkpoint: Annotated[int | None, typer.Option(help="After which stage.", show_default="the last one")] = None,
    suite: Annotated[str, typer.Option(help="The suite that asked.")] = "facts",
    truth: Annotated[
        Path | None, typer.Option(help="The stream's facts.jsonl, where the stream is not built on this machine.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of every method's shares over checkpoints.")] = None,
    trajectories: Annotated[
        Path | None, typer.Option(help="Parquet file: every run, fact and checkpoint in a row.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Say which facts a run knows, forgot, holds in an old version or never learned, against chance."""
    import json

    from clbench.results import knowledge
    from clbench.results.store import find_runs
    from clbench.results.summary import group_runs

    if form not in knowledge.FORMS:
        raise ConfigError(f"there is no form {form!r}", mend=f"choose {' or '.join(knowledge.FORMS)}")
    stores = find_runs(runs)
    if not stores:
        raise NotFoundError("no run in these folders", where=", ".join(map(str, runs)), mend="run `clbench run` first")
    groups = group_runs(stores)
    table = read_truth(stores, truth, suite)
    scores = knowledge.summarise(groups, table, suite=suite, forms=knowledge.FORMS if as_json else (form,))
    if trajectories is not None:
        write_trajectories(groups, table, form, suite, trajectories)
    if plot is not None:
        draw(scores, form, plot)
    if as_json:
        typer.echo(json.dumps([score.as_dict() for score in scores], indent=2, allow_nan=False))
    else:
        _show(scores, checkpoint)


def read_truth(stores: Sequence[RunStore], file: Path | None, suite: str) -> Truth:
    """Return the truth table of the stream that the runs were measured on.

    Raises:
        NotFoundError: neither file nor built stream is there, or the stream has no truth table.
        IntegrityError: the built stream is not the one that the runs used.
    """
    from clbench.results.knowledge import Truth

    if file is not None:
        if not file.is_file():
            raise NotFoundError("the truth table is missing", where=file)
        return Truth.parse(file.read_bytes(), where=file)
    from clbench import build, registry
    from clbench.stream import Stream

    track: dict[str, Any] = stores[0].config()["track"]
    stream = Stream(build.stream_folder(registry.make_stream_source(track["stream"])))
    if stream.sha256 != track["stream_sha256"]:
        raise IntegrityError(
            f"the built stream has digest {stream.sha256[:12]}, the runs used {track['stream_sha256'][:12]}",
            where=stream.folder,
            mend="give the truth table of their stream with --truth",
        )
    return Truth.parse(stream.extra(f"{suite}.jsonl"), where=stream.folder)


def write_trajectories(groups: dict[str, list[RunStore]], truth: Truth, form: str, suite: str, path: Path) -> None:
    """Write one row per run, fact and checkpoint."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clbench.files import atomic_path
    from clbench.results.knowledge import Answers

    tables = []
    for label, stores in groups.items():
        for store in stores:
            table = Answers.of_run(store, truth, form, suite=suite).trajectories()
            for name, value in (("seed", int(store.config()["seed"])), ("method", label)):
                table = table.add_column(0, name, pa.array([value] * table.num_rows))
            tables.append(table)
    with atomic_path(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)


def draw(scores: Sequence[GroupScore], form: str, path: Path) -> None:
    """Draw one panel a method: shares of the facts that hold, by status, over checkpoints, with chance."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    from clbench.files import atomic_path
    from clbench.results.knowledge import STATUSES

    current = [score for score in scores if score.group == "current" and score.form == form]
    labels = list(dict.fromkeys(score.label for score in current))
    figure = Figure(figsize=(1.5 + 3.2 * len(labels), 3.6), layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for panel, label in zip(panels, labels, strict=True):
        mine = [score for score in current if score.label == label]
        x = [score.checkpoint for score in mine]
        bottom = [0.0] * len(mine)
        for status, colour in zip(STATUSES, COLOURS, strict=True):
            heights = [score.scores[status].value for score in mine]
            panel.bar(x, heights, bottom=bottom, color=colour, width=0.9, label=status)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        panel.plot(x, [score.chance for score in mine], color="black", linestyle=":", label="chance of known")
        panel.set(title=label, xlabel="after stage", xticks=x, ylim=(0, 1))
    panels[0].set_ylabel(f"share of the facts that hold ({form})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)


def _show(scores: Sequence[GroupScore], checkpoint: int | None) -> None:
    """Print a table a method."""
    from rich.console import Console

    console = Console(highlight=False)
    known = sorted({score.checkpoint for score in scores})
    if checkpoint is not None and checkpoint not in known:
        raise ConfigError(f"no row after stage {checkpoint}", mend=f"choose one of {', '.join(map(str, known))}")
    for label in dict.fromkeys(score.label for score in scores):
        last = checkpoint if checkpoint is not None else max(s.checkpoint for s in scores if s.label == label)
        mine = [s for s in scores if s.label == label and s.checkpoint == last and s.n]
        if mine:
            console.print(_table(mine, f"{label}, after stage {last}, {mine[0].form} questions"))
            for score in (s for s in mine if s.group == "unborn"):
                told = f"{score.n} facts do not hold yet: answered ahead of time {_cell(score, 'ahead')}"
                console.print(f"{told}, by chance {score.chance_ahead:.2f}", style="dim")
            console.print()
    kind = next((i.kind for s in scores for i in s.scores.values() if i.kind != "none"), "none")
    told = f"95% intervals: {kind}. lag N: last stated N stages ago. Definitions: docs/facts.md"
    console.print(told, style="dim", markup=False, soft_wrap=True)


def _table(scores: Sequence[GroupScore], title: str) -> Table:
    """Return the table of one checkpoint; it fits 80 columns."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("facts", no_wrap=True)
    for name in ("n", "accuracy", *COLUMNS.values(), "chance", "const"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in scores:
        if score.group != "unborn":
            cells = [_cell(score, name) for name in ("accuracy", *COLUMNS)]
            table.add_row(score.group, str(score.n), *cells, f"{score.chance:.2f}", f"{score.constant:.2f}")
    return table


def _cell(score: GroupScore, name: str) -> str:
    """Return a value, accuracy with its interval."""
    one = score.scores[name]
    bounds = f" [{one.low:.2f}, {one.high:.2f}]" if name == "accuracy" and isfinite(one.low) else ""
    return f"{one.value:.2f}{bounds}"
