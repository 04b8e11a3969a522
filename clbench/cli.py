"""The command line: thin, and quick to start. Heavy imports live inside the commands.

Exit codes: 0 done, 2 a mistake that the user can mend (one line says how), 130 interrupted; anything else is our bug.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench import __version__
from clbench.cli_arms import arms
from clbench.cli_capacity import COMMANDS as CAPACITY_COMMANDS
from clbench.cli_deceleration import deceleration
from clbench.cli_facts import facts
from clbench.cli_fisher import fisher
from clbench.cli_health import health
from clbench.cli_ledger import ledger, show_series_plan
from clbench.cli_merge import merge
from clbench.cli_results import slices
from clbench.cli_stream import stream_app
from clbench.cli_temporal import temporal
from clbench.errors import ClbenchError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clbench.fanout import Failure
    from clbench.recorder import Sink
    from clbench.results.store import RunStore
    from clbench.run import Place

app = typer.Typer(
    help="Continual pretraining of language models, measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
leaderboard_app = typer.Typer(help="Build the leaderboard page, pack and verify submissions.", no_args_is_help=True)
mlflow_app = typer.Typer(help="Rebuild what MLflow shows from run folders.", no_args_is_help=True)
for results_command in (slices, facts, temporal, arms, ledger, fisher, merge, health, deceleration):
    app.command()(results_command)
for capacity_command in CAPACITY_COMMANDS:
    app.command()(capacity_command)
app.add_typer(stream_app, name="stream")
app.add_typer(leaderboard_app, name="leaderboard")
app.add_typer(mlflow_app, name="mlflow")

UsageError: Any = typer.BadParameter.__base__  # click's; newer typers bring a click of their own
OWN_TRACK = "Track of the entries that does not come with clbench: a YAML file; several are fine."
NANO = "codedocs-nano"
TrackOption = Annotated[
    str, typer.Option("--track", "-t", help="Track: a name (`clbench list tracks`) or a YAML file.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder of all runs.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
JobsOption = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="Worker processes.", show_default="1, or one a device"),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(help="Devices that workers take in turn, as cuda:0,cuda:1.", show_default="that of --device"),
]
MlflowOption = Annotated[str, typer.Option(help="none, sqlite (a file beside the runs) or a tracking URI.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")]
RunsArgument = Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)]


def main() -> None:
    """Run the command line; a ClbenchError becomes one line and exit code 2."""
    # Set before anything imports these libraries: nothing leaves this machine, and no bar of theirs mixes with ours.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(prog_name="clbench", standalone_mode=False)
    except ClbenchError as error:
        print_error(str(error))
        code = 2
    except UsageError as error:
        code = 2
        if "\n" in error.format_message():  # a command without arguments: the message is its help
            error.show()
        else:
            print_error(usage_line(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        print_error("interrupted; the same command goes on from the last checkpoint")
    sys.exit(code if isinstance(code, int) else 0)


def usage_line(error: UsageError) -> str:
    """Return what was wrong with the arguments, and where their help is."""
    command = error.ctx.command_path if error.ctx is not None else "clbench"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"


def print_error(text: str) -> None:
    """Print one error line on stderr."""
    typer.secho(f"error: {' '.join(text.split())}", fg="red", err=True)


def print_json(value: Any) -> None:
    """Print JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Continual pretraining of language models, measured."""


@app.command()
def prepare(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Tracks (stream and base), streams, pretrained models, suites, or evals.", show_default=NANO
        ),
    ] = None,
    device: DeviceOption = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that build a stream.", show_default="as fit this machine")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch, build and train what a track needs: the only command that uses the network.

    A stream may be NAME:option=value,option=value or a YAML specification, see `clbench list streams`. A pretrained
    model is model:NAME; suite:NAME is what a suite measures on, evals that of all suites.
    """
    from clbench import prepare as preparing

    made = [preparing.prepare(target, device=device, n_workers=workers) for target in targets or [NANO]]
    if as_json:
        print_json(made)


@app.command()
def run(
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            "-m",
            help="NAME or NAME:option=value,option=value; several compose.",
            show_default=False,
        ),
    ],
    track: TrackOption = NANO,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; several run in turn.", show_default="0")] = None,
    all_seeds: Annotated[bool, typer.Option(help="Run every seed of the track, as a submission needs.")] = False,
    out: OutOption = Path("runs"),
    device: DeviceOption = "auto",
    mlflow: MlflowOption = "sqlite",
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between resume states.")] = 60.0,
    moments: Annotated[
        str | None,
        typer.Option(
            help="Write Adam's second moments beside every release, for `clbench merge`: full, or rank1.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a method through a track and measure every stage; run it again to go on after a kill."""
    from clbench import registry
    from clbench import run as running

    loaded = registry.load_track(track)
    stores = []
    for one in loaded.seeds if all_seeds else seed or [0]:
        components = [registry.make_method(spec) for spec in method]
        words = ["clbench", "run", "--track", track, *(w for m in method for w in ("--method", m)), "--seed", str(one)]
        words += ["--moments", moments] if moments else []
        place = _place(out, device, mlflow, checkpoint_seconds=checkpoint_seconds, command=shlex.join(words))
        place = replace(place, moments=moments)
        stores.append(running.execute(loaded, components, seed=one, place=place))
    _show(stores, as_json=as_json)


@app.command()
def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN | K=CHECKPOINT]...", help="Run folders, or checkpoints.", show_default=False),
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            help="K=CHECKPOINT K=CHECKPOINT …: your model after stage K, a folder or a hub id.",
            show_default=False,
        ),
    ] = None,
    track: TrackOption = NANO,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", "-s", help="A further suite, NAME or NAME:option=value.", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option(help="What these checkpoints are called in tables.")] = "my-checkpoints",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder.", show_default="runs/TRACK/NAME/seed-0")
    ] = None,
    jobs: JobsOption = None,
    devices: DevicesOption = None,
    device: DeviceOption = "auto",
    mlflow: MlflowOption = "none",
    as_json: JsonOption = False,
) -> None:
    """Give checkpoints that were trained elsewhere a matrix like any run's, or measure further suites on runs.

    Example: clbench evaluate --checkpoints 0=ckpt/base 1=ckpt/2012 2=ckpt/2016

    Example: clbench evaluate runs/codedocs-nano/sequential/seed-0 --suite general:size=small --jobs 2

    Exit code 1: a cell failed; it is named, the others are measured, and the same command tries it again.
    """
    from clbench import fanout, outside, registry
    from clbench import run as running

    places = fanout.devices_of(devices, fallback=device)
    n_jobs = jobs or len(places)
    runs = [text for text in targets or [] if "=" not in text and Path(text).is_dir()]
    if runs:
        if len(runs) < len(targets or []) or checkpoints or out is not None:
            raise ConfigError("runs and checkpoints cannot be measured at once", mend="give one of them")
        _evaluate_runs(runs, suite or [], n_jobs, places, mlflow, as_json=as_json)
        return
    loaded = registry.load_track(track)
    folder = out or Path("runs") / loaded.name / running.slug(name) / "seed-0"
    place = _place(folder.parent, device, mlflow)
    given = _checkpoint_pairs([*(checkpoints or []), *(targets or [])])
    store, failures = outside.measure_checkpoints(
        loaded, given, label=name, out=folder, place=place, n_jobs=n_jobs, devices=places
    )
    if suite:
        failures += _measure_extras([store], suite, n_jobs, places, place.sinks)
    if 0 in store.stages_done() or not failures:
        _show([store], as_json=as_json)
    _name_failures(failures)


def _evaluate_runs(
    folders: Sequence[str], suites: Sequence[str], n_jobs: int, devices: Sequence[str], mlflow: str, *, as_json: bool
) -> None:
    """Measure further suites on runs and print their scores by stage."""
    from clbench.results.store import find_runs

    if not suites:
        raise ConfigError("no suite was named", mend="give --suite NAME; `clbench list suites` shows them")
    stores = find_runs(Path(folder) for folder in folders)
    if not stores:
        raise ConfigError("no run in these folders", where=", ".join(folders), mend="run `clbench run` first")
    sinks = _place(_root_of(stores[0].folder), "auto", mlflow).sinks
    failures = _measure_extras(stores, suites, n_jobs, devices, sinks)
    _show_tasks(stores, failures, as_json=as_json)
    _name_failures(failures)


def _show_tasks(stores: Sequence[RunStore], failures: Sequence[Failure] = (), *, as_json: bool) -> None:
    """Print the score of every task at every stage."""
    from clbench import listing
    from clbench.results import tasks

    tables = {str(store.folder): tasks.stage_table(store) for store in stores}
    if as_json:
        print_json({"runs": {name: table.as_dict() for name, table in tables.items()},
                    "failures": [str(one) for one in failures]})  # fmt: skip
    else:
        for folder, table in tables.items():
            listing.show_stage_table(folder, table)


def _root_of(run: Path) -> Path:
    """Return the folder of all runs that a run lies in as ``ROOT/TRACK/METHOD/seed-N``, else the run's parent."""
    parents = run.resolve().parents
    return parents[2] if run.name.startswith("seed-") and len(parents) > 2 else parents[0]


def _measure_extras(
    stores: Sequence[RunStore], suites: Sequence[str], n_jobs: int, devices: Sequence[str], sinks: Sequence[Sink]
) -> list[Failure]:
    from clbench import console, extras

    found = extras.measure_extras(stores, suites, n_jobs=n_jobs, devices=devices, sinks=sinks)
    outcome = found.outcome
    console.say(f"{outcome.n_measured} cells measured, {outcome.n_cached} were there, {outcome.seconds:.0f} s")
    return found.failures


def _name_failures(failures: Sequence[Failure]) -> None:
    """Name all cells that failed, and end with exit code 1."""
    from clbench.fanout import told

    for line in told(failures):
        print_error(line)
    if failures:
        raise typer.Exit(1)


@app.command()
def oracle(
    track: Annotated[str, typer.Argument(help="Track: a name or a YAML file.")] = NANO,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; their losses are averaged.", show_default="0")] = None,
    write: Annotated[
        bool, typer.Option(help="Write oracle, row 0 and the stream's digest into the track's file.")
    ] = False,
    series: Annotated[bool, typer.Option("--series", help="One oracle for every stage, written as a run.")] = False,
    cutoff: Annotated[
        list[int] | None,
        typer.Option(help="A series of oracles after these stages only; several are fine.", show_default=False),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print what the series would cost, in tokens.")] = False,
    continual_tokens: Annotated[
        int | None,
        typer.Option(help="With --plan: tokens of the run to compare with.", show_default="base and all stages"),
    ] = None,
    out: OutOption = Path("runs"),
    device: DeviceOption = "auto",
    mlflow: MlflowOption = "sqlite",
    as_json: JsonOption = False,
) -> None:
    """Train the oracle of a track (joint, from scratch, token-matched) and show or freeze its losses per period.

    With --series or --cutoff: oracles of several dates, in a run folder that reads like a method's.
    """
    from clbench import oracle as oracles
    from clbench import oracle_series, registry

    if write and (series or cutoff or plan):
        raise ConfigError("--write freezes the full oracle only", mend="leave out --series, --cutoff and --plan")
    if continual_tokens is not None and not plan:
        raise ConfigError("--continual-tokens is for --plan", mend="add --plan")
    if plan:
        table = oracle_series.compute_table(registry.load_track(track), cutoff or [], continual_tokens=continual_tokens)
        print_json(table) if as_json else show_series_plan(table)
    elif series or cutoff:
        loaded, stores = registry.load_track(track), []
        for one in seed or [0]:
            words = ["clbench", "oracle", track, *(w for c in cutoff or [] for w in ("--cutoff", str(c)))]
            command = shlex.join([*words, *([] if cutoff else ["--series"]), "--seed", str(one)])
            place = _place(out, device, mlflow, command=command)
            stores.append(oracle_series.run_series(loaded, cutoffs=cutoff or [], seed=one, place=place))
        _show(stores, as_json=as_json)
    else:
        frozen = oracles.train_oracle(track, seeds=seed or [0], device=device, write=write)
        print_json(frozen) if as_json else _print_oracle(frozen)


@app.command()
def report(
    runs: RunsArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained page about one run or several side by side."""
    from clbench import listing, registry
    from clbench.results import capacity, summary
    from clbench.results.store import find_runs

    stores = find_runs(runs)
    if not stores:
        raise ConfigError("no run in these folders", where=", ".join(map(str, runs)), mend="run `clbench run` first")
    path = registry.tool("report").build_report(stores, out)
    begun = [store for store in stores if store.stages_done()]
    track = str(begun[0].config()["track"].get("name", "?"))
    found = [capacity.of_runs(label, track, group) for label, group in summary.group_runs(begun).items()]
    if as_json:
        print_json({"report": str(path), **_numbers(stores), "capacity": [one.as_dict() for one in found]})
    else:
        _show(stores, as_json=False)
        listing.show_capacity(found)
        typer.echo(str(path))


@leaderboard_app.command("build")
def leaderboard_build(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders to show besides the submissions.")] = None,
    submissions: Annotated[
        Path | None,
        typer.Option(help="Folder of packed entries.", show_default="the built-in ones where no runs are given"),
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option("--track", "-t", help=OWN_TRACK, show_default="built-in ones")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the site.")] = Path("site"),
) -> None:
    """Write the leaderboard: an index and a page a method, self-contained HTML that works from a file."""
    from clbench import console, registry
    from clbench.results.store import find_runs

    stores = find_runs(runs or [])
    tracks = [registry.load_track(one) for one in track or []]
    site = registry.tool("site").build_site(stores, out, submissions=submissions, tracks=tracks)
    for problem in site.rejected:
        console.warn(problem)
    typer.echo(str(site.index))


@leaderboard_app.command("pack")
def leaderboard_pack(
    runs: RunsArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the entries.")] = Path("submissions"),
    author: Annotated[list[str] | None, typer.Option(help="Who submits; several are fine.")] = None,
    code: Annotated[str, typer.Option(help="https address of the method's code, unless it is built in.")] = "",
    tuning: Annotated[str, typer.Option(help="What the hyper-parameters were chosen on.")] = "",
    notes: Annotated[str, typer.Option(help="Anything a reader should know.")] = "",
    only_track_data: Annotated[
        bool, typer.Option("--only-track-data", help="I declare: no text but the track's trained.")
    ] = False,
    heldout_untouched: Annotated[
        bool, typer.Option("--heldout-untouched", help="I declare: held-out text neither trained nor tuned.")
    ] = False,
) -> None:
    """Pack the runs of one method into an entry folder for a pull request."""
    from clbench import console, registry
    from clbench.results.store import find_runs

    declarations = {
        "authors": author or [],
        "code": code,
        "tuning": tuning,
        "notes": notes,
        "only_track_data": only_track_data,
        "heldout_untouched": heldout_untouched,
    }
    entry = registry.tool("submission").pack(find_runs(runs), out, declarations=declarations)
    console.say(f"check it with `clbench leaderboard verify {entry}`; declarations can be mended in its entry.json")
    typer.echo(str(entry))


@leaderboard_app.command("verify")
def leaderboard_verify(
    entries: Annotated[list[Path], typer.Argument(help="Entry folders.", show_default=False)],
    track: Annotated[
        list[str] | None, typer.Option("--track", "-t", help=OWN_TRACK, show_default="built-in ones")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check entries: schema, digests, protocol, every number recomputed. Exit code 2 when one fails."""
    from clbench import registry

    submission = registry.tool("submission")
    find = submission.finder([registry.load_track(one) for one in track or []])
    found = {str(entry): submission.verify(entry, track=find(entry.resolve().parent.name)) for entry in entries}
    if as_json:
        print_json(found)
    else:
        for entry, problems in found.items():
            typer.echo(f"{entry}: {'passed' if not problems else f'{len(problems)} problems'}")
            for problem in problems:
                typer.echo(f"  {problem}")
    if any(found.values()):
        raise typer.Exit(2)


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="methods, streams, suites, tracks or runs.", show_default="all but runs"),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One of them, with all its options.", show_default=False)] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List what there is in one line each; with a name, its description and its options."""
    from clbench import listing

    found = listing.listing(kind, runs, name=name)
    if as_json:
        print_json(found)
    else:
        listing.show(found, in_full=name is not None)


@app.command()
def ui(
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    uri: Annotated[str | None, typer.Option(help="Tracking URI.", show_default="RUNS/mlflow.db")] = None,
    host: str = "127.0.0.1",
    port: int = 5000,
) -> None:
    """Open the MLflow UI on this machine until Ctrl-C."""
    from clbench import tracking

    page = tracking.open_ui(uri or tracking.default_uri(runs), host=host, port=port)
    with page:
        typer.echo(f"MLflow UI: {page.url}   (Ctrl-C stops it)")
        page.wait()


@mlflow_app.command("sync")
def mlflow_sync(
    runs: RunsArgument,
    uri: Annotated[str | None, typer.Option(help="Tracking URI.", show_default="runs/mlflow.db")] = None,
    root: Annotated[Path, typer.Option(help="Folder of all runs, where the default database lies.")] = Path("runs"),
) -> None:
    """Bring MLflow up to date with run folders; doing it twice changes nothing."""
    from clbench import tracking
    from clbench.results.store import find_runs

    sink = tracking.MlflowSink(uri or tracking.default_uri(root), make_report=_report_in_folder)
    for store in find_runs(runs):
        typer.echo(f"{store.folder}: {sink.sync(store)}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what hardware, packages, cache and network there are, and what to do about what is missing."""
    from clbench import doctor as doctors

    findings = doctors.examine()
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        doctors.show(findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(2)


@app.command()
def quickstart(
    out: OutOption = Path("runs"),
    site: Annotated[Path, typer.Option(help="Folder of the leaderboard page.")] = Path("site"),
    track: TrackOption = NANO,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.", show_default="0")] = None,
    device: DeviceOption = "auto",
    mlflow: MlflowOption = "sqlite",
) -> None:
    """Prepare a track, run sequential, replay and frozen, and build the page: the main job in one command."""
    from clbench import console, registry
    from clbench import prepare as preparing
    from clbench import run as running

    loaded = registry.load_track(track)
    preparing.prepare(track, device=device)
    stores = []
    for spec in ("sequential", "replay:fraction=1/2", "frozen"):
        for one in seed or [0]:
            console.say(f"running {spec}, seed {one}")
            place = _place(out, device, mlflow, command=f"clbench run --track {track} --method {spec} --seed {one}")
            stores.append(running.execute(loaded, [registry.make_method(spec)], seed=one, place=place))
    _show(stores, as_json=False)
    built = registry.tool("site").build_site(stores, site)
    typer.echo(f"\nleaderboard page: {built.index}")
    typer.echo(f"run folders:      {out / loaded.name}")
    if mlflow == "sqlite":
        typer.echo(f"MLflow UI:        clbench ui --runs {out}")


def _place(out: Path, device: str, mlflow: str, *, checkpoint_seconds: float = 60.0, command: str = "") -> Place:
    from clbench.run import Place

    sinks: tuple[Sink, ...] = ()
    if mlflow != "none":
        from clbench import tracking

        uri = tracking.uri_of_mode(mlflow, out)
        sinks = (tracking.MlflowSink(uri, make_report=_report_in_folder).safe_sync,) if uri else ()
    return Place(runs_root=out, device=device, sinks=sinks, checkpoint_seconds=checkpoint_seconds, command=command)


def _report_in_folder(store: RunStore) -> Path:
    """Write the report of one run into its folder, for MLflow to attach."""
    from clbench import registry

    path: Path = registry.tool("report").build_report([store], store.folder / "report.html")
    return path


def _checkpoint_pairs(texts: Sequence[str]) -> dict[int, str]:
    pairs: dict[int, str] = {}
    for text in texts:
        stage, equals, path = text.partition("=")
        if not equals or not stage.isdigit() or not path:
            raise ConfigError(f"{text!r} is no checkpoint", mend="write STAGE=FOLDER, for example 0=checkpoints/base")
        if int(stage) in pairs:
            raise ConfigError(f"stage {stage} is given twice", mend="give one checkpoint a stage")
        pairs[int(stage)] = path
    return pairs


def _show(stores: Sequence[RunStore], *, as_json: bool) -> None:
    """Print the summaries of runs; of those whose track measures no losses the scores of their tasks."""
    from clbench import listing
    from clbench.results import summary

    if without := [store for store in stores if "heldout" not in store.suites()]:
        _show_tasks(without, as_json=as_json)
        stores = [store for store in stores if store not in without]
    if not stores:
        return
    summaries = [summary.summarise(group) for group in summary.group_runs(stores).values()]
    if as_json:
        print_json([{**s.as_dict(), "folders": [str(r.folder) for r in stores]} for s in summaries])
    else:
        listing.show_summaries(summaries)


def _numbers(stores: Sequence[RunStore]) -> dict[str, Any]:
    """Return every method's summary, and its paired differences to the first method, for machines."""
    from clbench.results import summary

    summaries = [summary.summarise(group) for group in summary.group_runs(stores).values()]
    differences = [summary.compare(other, summaries[0]).as_dict() for other in summaries[1:]]
    return {"summaries": [one.as_dict() for one in summaries], "differences": differences}


def _print_oracle(frozen: dict[str, Any]) -> None:
    import yaml

    typer.echo(yaml.safe_dump(frozen, sort_keys=False, default_flow_style=None, width=110))
