"""The commands of ``clbench stream``: thin, like ``clbench.cli``; heavy imports live inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from clbench.stream import Stream

stream_app = typer.Typer(
    help="Make streams of your own documents, look at streams, compare arms.", no_args_is_help=True
)


@stream_app.command()
def show(
    stream: Annotated[str, typer.Argument(help="Name with options, specification file, or folder of a built stream.")],
    html: Annotated[
        Path | None, typer.Option(help="Write one page with plots to this file.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Sample documents a stage; the page shows at least 5.")] = 1,
    sample_tokens: Annotated[
        int, typer.Option(min=1000, help="Train tokens a stage for the drift matrices, at most.")
    ] = 1_000_000,
) -> None:
    """Look at a built stream: sizes, changes, repeats, leakage, drift between stages, sample documents."""
    from clbench import console, registry
    from clbench.listing_stream import show_stream
    from clbench.portrait import Parameters, portrait_of

    defaults = Parameters()
    parameters = Parameters(drift_tokens=sample_tokens, samples=max(samples, defaults.samples))
    portrait = portrait_of(_built(stream), parameters)
    if html is not None:
        path = registry.tool("stream_page").build_stream_page(portrait, html, samples=max(samples, 5))
        console.say(f"page: {path}")
    if as_json:
        typer.echo(json.dumps(portrait.as_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    elif html is None:
        show_stream(portrait, samples=samples)


@stream_app.command("build")
def build_own(
    path: Annotated[
        str, typer.Option("--from", help="File, folder or pattern: Parquet, JSON lines, CSV, text files; .gz, .zst.")
    ],
    name: Annotated[str, typer.Option(help="What the stream is called from now on.")],
    text: Annotated[str | None, typer.Option(help="Column of the text; a.b where nested.")] = None,
    date: Annotated[str | None, typer.Option(help="Column of the date.")] = None,
    order: Annotated[str | None, typer.Option(help="Column of numbers that order the documents.")] = None,
    identity: Annotated[str | None, typer.Option("--id", help="Column of the identity, or none.")] = None,
    group: Annotated[str | None, typer.Option(help="Column of the site or other origin, or none.")] = None,
    every: Annotated[
        str | None,
        typer.Option(
            help="year, quarter, month, week, day, or N equal parts; value (with --order).", show_default="year"
        ),
    ] = None,
    dateformat: Annotated[
        str | None, typer.Option(help="dmy, mdy, year, ymd8, epoch_s, epoch_ms …, or such as %d.%m.%Y.")
    ] = None,
    timezone: Annotated[str | None, typer.Option(help="Of times that name no zone.", show_default="UTC")] = None,
    start: Annotated[str | None, typer.Option(help="First day.")] = None,
    end: Annotated[str | None, typer.Option(help="Last day.")] = None,
    earliest: Annotated[str | None, typer.Option(help="Dates before it are errors.", show_default="1900-01-01")] = None,
    latest: Annotated[str | None, typer.Option(help="Dates after it are errors.", show_default="today")] = None,
    epoch_zero: Annotated[bool, typer.Option("--epoch-zero", help="1970-01-01T00:00:00 is a date.")] = False,
    min_chars: Annotated[int | None, typer.Option(help="Leave out shorter texts.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of JSON lines, CSV, text files.", show_default="utf-8")] = None,
    undecodable: Annotated[
        str | None, typer.Option(help="Rows with other bytes: drop or replace.", show_default="drop")
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Of CSV: a character, or tab.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="parquet, jsonl, csv or text.")] = None,
    small: Annotated[
        str | None, typer.Option(help="Periods of too few documents: merge, drop or refuse.", show_default="merge")
    ] = None,
    min_documents: Annotated[int | None, typer.Option(help="Of a stage.", show_default="50")] = None,
    max_dropped: Annotated[
        float | None, typer.Option(help="Refuse the input when more of its rows cannot be used.", show_default="0.5")
    ] = None,
    heldout_fraction: Annotated[
        float | None, typer.Option(help="Share of documents that never train.", show_default="0.1")
    ] = None,
    heldout_max_documents: Annotated[int | None, typer.Option(help="Held-out documents of a stage at most.")] = None,
    heldout_max_per_group: Annotated[int | None, typer.Option(help="Likewise of a stage and group.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Of the tokenizer trained on stage 0.", show_default="4096")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Another one: stream:NAME, model:NAME, or a folder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the specification here, too.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="The guessed columns are right.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Give the name to this stream if it has another.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and report; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Make a stream of your own documents: shows the columns, asks where it guessed, builds, saves it under a name."""
    given = locals()
    from clbench import intake

    own = ["text", "date", "order", "group", "every", "dateformat", "timezone", "start", "end", "earliest", "latest"]
    own += ["min_chars", "encoding", "undecodable", "separator", "small", "min_documents", "max_dropped"]
    options = {"path": path, "id": identity, "format": format_, "epoch_zero": epoch_zero or None}
    options |= {key: given[key] for key in own}
    of_builder = ("heldout_fraction", "heldout_max_documents", "heldout_max_per_group", "vocab_size", "tokenizer")
    request = intake.Request(
        name=name,
        options={key: value for key, value in options.items() if value is not None},
        settings={key: value for key in of_builder if (value := given[key]) is not None},
        yes=yes,
        replace=replace,
        dry_run=dry_run,
        copy=out,
    )
    made = intake.take_in(request)
    if as_json:
        typer.echo(json.dumps(made, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        intake.show(made)


def _built(target: str) -> Stream:
    """Return a built stream by its folder, or by what ``clbench prepare`` takes; nothing is built here.

    Raises:
        NotFoundError: there is no such stream, or it is not built.
    """
    from clbench import registry
    from clbench.build import stream_folder
    from clbench.errors import NotFoundError, did_you_mean
    from clbench.stream import Stream

    folder = Path(target).expanduser()
    if (folder / "manifest.json").is_file():
        return Stream(folder)
    if folder.is_dir() and ("/" in target or not registry.is_stream(target)):
        raise NotFoundError("no built stream here", where=folder, mend="name the folder that holds its manifest.json")
    if not registry.is_stream(target):
        raise NotFoundError(f"unknown stream {target!r}", mend=did_you_mean(target, registry.stream_names()))
    folder = stream_folder(registry.make_stream_source(target))
    if not (folder / "manifest.json").is_file():
        raise NotFoundError(f"stream {target!r} is not built", mend=f"run `clbench prepare {target}`")
    return Stream(folder)


@stream_app.command()
def arms(
    tracks: Annotated[
        list[str] | None, typer.Argument(help="Tracks, by name or file: show what each will be shown.")
    ] = None,
    of: Annotated[str, typer.Option(help="Clean stream: make arms of it instead.", show_default=False)] = "",
    junk: Annotated[str, typer.Option(help="Pool of posts (see `posts`), with the clean stream's tokenizer.")] = "",
    like: Annotated[str, typer.Option(help="Track whose model, base and training the arms have.")] = "",
    name: Annotated[str, typer.Option(help="Beginning of the arms' names.", show_default="STREAM-POOL")] = "",
    arm: Annotated[
        list[str] | None, typer.Option(help="Arms of the pool; several are fine.", show_default="junk")
    ] = None,
    control: Annotated[
        str, typer.Option(help="Arm that the rest is taken from; none: the stage's own text.")
    ] = "control",
    dose: Annotated[
        list[float] | None, typer.Option(help="Shares of junk.", show_default="0, 0.2, 0.5, 0.8, 1")
    ] = None,
    batching: Annotated[
        list[str] | None, typer.Option(help="packed, rows or step_matched; several are fine.", show_default="packed")
    ] = None,
    n_tokens: Annotated[int | None, typer.Option(help="Train tokens of a dosed stage.", show_default="all")] = None,
    stages: Annotated[int | None, typer.Option(help="Stages after stage 0.", show_default="all")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over a stage.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the arms' tracks.")] = Path("arms"),
    method: Annotated[str, typer.Option("--method", "-m", help="Method whose plan decides what is shown.")] = (
        "sequential"
    ),
    seed: Annotated[int | None, typer.Option(help="Seed of the order.", show_default="the track's first")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Show what arms of an experiment will be shown; or make arms: streams and tracks of every dose and batching."""
    from clbench.cli_arms import make_arms, plan_arms, show_plan

    if of or junk:
        chosen = {
            "name": name,
            "of": of,
            "junk": junk,
            "arms": tuple(arm or ["junk"]),
            "control": "" if control == "none" else control,
            "n_tokens": n_tokens,
            "stages": stages,
            "epochs": epochs,
        }
        planned = make_arms(chosen, doses=dose, like=like, modes=batching or ["packed"], out=out, method=method)
    else:
        planned = plan_arms(tracks or [], method=method, seed=seed)
    show_plan(planned, as_json=as_json)
