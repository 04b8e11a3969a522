"""The command ``clbench merge``: put a base's weights back into a model, as far as a wanted retention needs. Thin.

What is done stands in ``clbench.merge.job``, what the figures mean in docs/merge-command.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from clbench.merge.job import Options, Result
    from clbench.merge.search import Measured


def merge(
    base: Annotated[Path, typer.Option(help="Folder of the model before training.", show_default=False)],
    tuned: Annotated[
        Path | None, typer.Option(help="Folder of the model after training.", show_default="--checkpoints' newest")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="spear-mm, wise-ft, slerp, dg-hard, trim, dare, breadcrumbs, graft, intruders, learned-alpha; "
            "of several experts task-arithmetic, ties, model-stock, ota; of checkpoints soup, greedy-soup, mwa.",
        ),
    ] = "spear-mm",
    expert: Annotated[
        list[Path] | None,
        typer.Option(
            "--expert",
            help="Methods of experts, learned-alpha: another tuned model; several are given one by one.",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Soups: a run folder; its releases are averaged, with the base.", show_default=False),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="Text like the training's, held out: txt, jsonl, csv, a folder, STREAM@STAGE.", show_default=False
        ),
    ] = None,
    general: Annotated[
        str | None, typer.Option(help="Text of what the base knew, in the same forms.", show_default=False)
    ] = None,
    keep: Annotated[float, typer.Option(help="Wanted share of the base's general score.")] = 0.95,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the chosen model.", show_default="none is written")
    ] = None,
    q: Annotated[
        float | None, typer.Option("-q", help="Fixed point: share that is restored.", show_default=False)
    ] = None,
    s: Annotated[
        float | None,
        typer.Option("-s", help="Fixed point: strength, 0 tuned to 1 base; no search.", show_default=False),
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Merges that a search may measure.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text that are measured.")] = 20_000,
    controls: Annotated[
        bool, typer.Option("--controls", help="Measure random units, uniform and others, too.")
    ] = False,
    impact: Annotated[bool, typer.Option("--impact", help="Measure every unit restored alone, too.")] = False,
    choose: Annotated[str, typer.Option(help="spear-mm: which units first, as its option of that name.")] = "spear",
    granularity: Annotated[str, typer.Option(help="spear-mm: layer, module or tensor.")] = "layer",
    strength: Annotated[
        list[float] | None, typer.Option(help="spear-mm: strengths to search.", show_default="1, 0.7, 0.4")
    ] = None,
    interp: Annotated[str, typer.Option(help="spear-mm: slerp or lerp, of matrices.")] = "slerp",
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="spear-mm: restore embeddings, last norm and output layer, too.")
    ] = False,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="A suite of questions for the general side, such as general:size=small.", show_default=False),
    ] = None,
    density: Annotated[float, typer.Option(help="ties: share of each model's change that is kept.")] = 0.2,
    moments: Annotated[
        list[Path] | None,
        typer.Option(
            help="graft, ota: Adam's second moments of tuned and each expert: a run, a release or a file.",
            show_default=False,
        ),
    ] = None,
    mix: Annotated[float, typer.Option(help="learned-alpha: share of general text in what it learns on.")] = 0.5,
    learn_tokens: Annotated[int, typer.Option(min=1, help="learned-alpha: tokens of each text, none measured.")] = 8192,
    learn_steps: Annotated[int, typer.Option(min=1, help="learned-alpha: steps of Adam.")] = 20,
    power: Annotated[float, typer.Option(help="mwa: weights are loss to the power of minus this.")] = 4.0,
    no_base: Annotated[bool, typer.Option("--no-base", help="Soups: leave the base out.")] = False,
    ledger: Annotated[
        Path | None,
        typer.Option(help="The tuned run's ledger.json, to compare the cost.", show_default="beside RUN/release"),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of jsonl and csv files.")] = "text",
    report: Annotated[
        Path | None, typer.Option(help="HTML report, also without --out.", show_default="OUT/report.html")
    ] = None,
    export_mergekit: Annotated[
        Path | None, typer.Option(help="mergekit YAML of the choice.", show_default=False)
    ] = None,
    freeze_list: Annotated[
        Path | None, typer.Option(help="spear-mm: YAML of the chosen units, for `freeze`.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of dare and of random controls.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, score and say what it would cost.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Undo forgetting: restore as much of the base as a wanted retention needs, and keep the most domain gain.

    Exit code 1: no merge keeps so much; nothing is written.

    Example: clbench merge --base BASE --tuned RUN/release/stage-05 --domain mine.jsonl --general old.jsonl -o merged
    """
    from clbench.merge import job

    tuned, experts = _models(tuned, expert, checkpoints)
    options = job.Options(
        base=base,
        tuned=tuned,
        method=method.replace("_", "-"),
        domain=domain,
        general=general,
        keep=keep,
        out=out,
        q=q,
        s=s,
        n_evaluations=evaluations,
        n_tokens=tokens,
        text_column=text_column,
        controls=controls,
        impact=impact,
        choose=choose,
        granularity=cast(Any, granularity),
        **({"strengths": tuple(strength)} if strength else {}),
        interp=interp,
        embeddings=embeddings,
        experts=experts,
        density=density,
        moments=tuple(moments or ()),
        suites=tuple(suite or ()),
        mix=mix,
        n_learn_tokens=learn_tokens,
        n_learn_steps=learn_steps,
        power=power,
        soup_base=not no_base,
        ledger=ledger,
        seed=seed,
        device=device,
        mergekit=export_mergekit,
        freeze=freeze_list,
    )
    if dry_run:
        forecast = job.forecast(options)
        _json(forecast) if as_json else show_forecast(forecast)
        return
    result = job.merge(options, tell=_teller(options))
    if result.chosen is not None:
        job.write(result, report=report)
    _json(result.as_dict()) if as_json else show(result)
    if result.chosen is None:
        raise typer.Exit(1)
    if out is None and not as_json:
        typer.echo("No model was written; give --out FOLDER.")


def _models(tuned: Path | None, expert: list[Path] | None, checkpoints: Path | None) -> tuple[Path, tuple[Path, ...]]:
    """Return the tuned model and the others; of a run the newest checkpoint and the older ones."""
    from clbench.errors import ConfigError
    from clbench.merge.soups import checkpoints_of

    if checkpoints is None:
        if tuned is None:
            raise ConfigError("there is no tuned model", mend="give --tuned FOLDER, or --checkpoints RUN for a soup")
        return tuned, tuple(expert or ())
    if tuned is not None or expert:
        raise ConfigError("--checkpoints brings its own models", mend="leave --tuned and --expert out")
    *older, newest = checkpoints_of(checkpoints)
    return newest, tuple(older)


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _teller(options: Options) -> Any:
    """Return what says one line a measurement, on stderr."""
    from clbench import console

    count = 0

    def tell(one: Measured) -> None:
        nonlocal count
        count += 1
        seconds = sum(one.seconds.values())
        of = f" of at most {options.n_evaluations + 2}" if one.role in ("end", "walk") and not options.is_fixed else ""
        console.say(f"{count}{of}: {one.spot.label} ({seconds:.1f} s)")

    return tell


# printing


def show(result: Result) -> None:
    """Print the points, what was chosen and the bill."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    facts = result.as_dict()
    if facts["points"]:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("%", overflow="fold")
        for name in ("general retention", "domain gain kept", "undone"):
            table.add_column(name, justify="right", no_wrap=True)
        names = list(facts["points"][0]["standing"]["scores"])
        for name in names:
            table.add_column(name, justify="right", overflow="fold", min_width=min(8, len(name)))
        table.add_column("", no_wrap=True)
        for point in facts["points"]:
            standing = point["standing"]
            role = "chosen" if point["chosen"] else "front" if point["front"] else point["role"].replace("walk", "")
            shares = [_share(standing["general"]), _share(standing["domain"]), _share({"value": standing["recovered"]})]
            scores = [_score(standing["scores"][name]) for name in names]
            table.add_row(point["label"], *shares, *scores, role)
        console.print(table)
        console.print(
            "general and domain: bits per byte (in --json nats per token, too); of suites: accuracy", style="dim"
        )
    for name, why in facts["left_out"].items():
        console.print(f"{name} does not count: {why}", style="dim", soft_wrap=True)
    for by, one in facts["agreement"].items():
        rho = "undefined: " + one["reason"] if one["rho"] is None else f"{one['rho']:+.2f}"
        console.print(f"Spearman of {by} with each unit's own effect: {rho}", soft_wrap=True)
    console.print(f"{result.why}.", style="bold", soft_wrap=True)
    if facts["points"]:
        console.print(_bill(facts["bill"]), style="dim", soft_wrap=True)
    if result.chosen is not None and result.options.out is not None:
        console.print(str(result.options.out), soft_wrap=True)


def _share(one: dict[str, Any]) -> str:
    """Return a share in percent with its interval, where it has a width."""
    if one["value"] is None:
        return "–"
    low, high = one.get("low"), one.get("high")
    bounds = "" if low is None or high is None or low == high else f" ({100 * low:.1f}-{100 * high:.1f})"
    return f"{100 * one['value']:.1f}{bounds}"


def _score(score: dict[str, float]) -> str:
    """Return bits per byte, or an accuracy."""
    if "score" in score:
        return f"{100 * score['score']:.1f} %"
    return f"{score['bits_per_byte']:.3f}"


def _bill(bill: dict[str, Any]) -> str:
    total, search = bill["search_total"], bill["search"]
    cost = f"{total['flops'] / 1e9:,.1f} GFLOP, {total['seconds']:.1f} s"
    line = f"{search['evaluations']} evaluations, {search['tokens']:,} tokens, {cost}"
    if learning := bill.get("learning"):
        falls = learning["losses_nats"]
        line += f"; of these {learning['tokens']:,} tokens of learning (loss {falls[0]:.3f} to {falls[-1]:.3f} nats)"
    if (less := bill.get("cost_reduction_flops")) is not None:
        line += f"; {100 * less:.1f} % fewer FLOPs than retraining for each of {bill['n_points']} points"
    return line


def show_forecast(found: dict[str, Any]) -> None:
    """Print what a search would look at, and the most it would cost."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    for layer in sorted(found["layers"], key=lambda one: one["place"]):
        score = "" if layer["score"] is None else f"score {layer['score']:.3f}"
        console.print(f"{layer['place']:3}  {layer['unit']}  {layer['n_parameters']:,} parameters  {score}")
    for side, text in found.get("texts", {}).items():
        console.print(f"{side}: {text['documents']:,} of {text['of']:,} documents, {text['tokens']:,} tokens")
    if most := found.get("at_most"):
        console.print(
            f"at most {most['evaluations']} evaluations, {most['tokens']:,} tokens, {most['flops'] / 1e9:,.1f} GFLOP"
        )
    if retraining := found.get("retraining"):
        console.print(f"training took {retraining['n_tokens']:,} tokens and {retraining['flops'] / 1e9:,.1f} GFLOP")
    console.print("dry run: nothing was measured or written", style="dim")
