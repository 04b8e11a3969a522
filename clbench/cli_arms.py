"""Arms on the command line: ``clbench stream arms`` (plan, write) and ``clbench arms`` (compare finished runs)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from clbench.arm_set import Mode, PlannedArm
    from clbench.results.arms import ArmComparison, Contrast, Slope
    from clbench.results.stats import Interval

N_RESAMPLES = 2000
"""Bootstrap samples of the documents on the command line: the ends of an interval are then good to two digits."""


# --- plan and write


def make_arms(
    options: Mapping[str, Any],
    *,
    doses: Sequence[float] | None,
    like: str,
    modes: Sequence[str],
    out: Path,
    method: str,
) -> list[PlannedArm]:
    """Write the specifications and tracks of a set of arms, build its streams, and return its plan.

    Raises:
        ConfigError: an option is missing, or a mode is unknown.
    """
    from clbench import arm_set, console, registry
    from clbench.method import Composed

    values = {**options, "name": options["name"] or _name(options["of"], options["junk"])}
    chosen = arm_set.ArmSet(**values if doses is None else {**values, "doses": tuple(doses)})
    template = registry.load_track(_given(like, "--like", "name a track whose model and training the arms have"))
    _given(chosen.of, "--of", "name the clean stream")
    _given(chosen.junk, "--junk", "name the pool of posts")
    composed = Composed([registry.make_method(method).method])
    wanted = _modes(modes)
    streams = [stream for _, stream in arm_set.build_arms(chosen).values()]
    tracks = arm_set.tracks_of(chosen, streams, template, wanted, composed)
    planned = arm_set.plan(tracks, composed, seed=template.seeds[0])
    planned = arm_set.write_arms(planned, out, name=chosen.name, method=method)
    console.say(
        f"{len(planned)} tracks and their manifest, {chosen.name}.json, in {out}; "
        "run `clbench prepare` and `clbench run --track` with each"
    )
    return planned


def _name(of: str, junk: str) -> str:
    """Return the beginning of the arms' names: those of the clean stream and the pool."""
    from clbench import registry

    return "-".join(registry.make_stream_source(target).name for target in (of, junk) if target)


def _given(value: str, option: str, mend: str) -> str:
    from clbench.errors import ConfigError

    if not value:
        raise ConfigError(f"{option} is missing", mend=mend)
    return value


def _modes(names: Sequence[str]) -> list[Mode]:
    from clbench.arm_set import MODES
    from clbench.errors import ConfigError, did_you_mean

    known = {mode.replace("_", "-"): mode for mode in MODES}
    for name in names:
        if name.replace("_", "-") not in known:
            raise ConfigError(f"no batching {name!r}", where="--batching", mend=did_you_mean(name, MODES))
    return [known[name.replace("_", "-")] for name in names]


def plan_arms(tracks: Sequence[str], *, method: str, seed: int | None) -> list[PlannedArm]:
    """Return what tracks, given by name or file, will be shown.

    Raises:
        ConfigError: no track is given.
        NotFoundError: a track is unknown, or its stream is not built.
    """
    from clbench import arm_set, registry
    from clbench.errors import ConfigError
    from clbench.method import Composed

    if not tracks:
        raise ConfigError("there is nothing to show", mend="name tracks, or make arms with --of, --junk and --like")
    composed = Composed([registry.make_method(method).method])
    loaded = [registry.load_track(name) for name in tracks]
    return [arm_set.plan([track], composed, seed=track.seeds[0] if seed is None else seed)[0] for track in loaded]


def show_plan(planned: Sequence[PlannedArm], *, as_json: bool) -> None:
    """Print what each arm will be shown, and in what they differ."""
    from clbench.arm_set import mode_of, unmatched

    differ = unmatched(planned) if len(planned) > 1 else {}
    if as_json:
        _print_json({"arms": [arm.as_dict() for arm in planned], "unmatched": differ})
        return
    table = _table("arm", "batching", "tokens", "rows", "steps", "sum of lr", "groups, share of tokens")
    for arm in planned:
        n_tokens = arm.total("tokens")
        groups: dict[str, int] = {}
        for stage in arm.stages:
            for group, part in stage.groups.items():
                groups[group] = groups.get(group, 0) + part.tokens
        largest = sorted(groups.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = ", ".join(f"{group} {n / n_tokens:.1%}" for group, n in largest[:3])
        table.add_row(
            arm.track.name,
            mode_of(arm.track),
            *(f"{arm.total(q):,.0f}" for q in ("tokens", "rows", "steps")),
            f"{arm.total('learning_rate_sum'):.4g}",
            shown + (f" and {len(largest) - 3} more" if len(largest) > 3 else ""),
        )
    _print(table)
    if differ:
        named = ",".join(differ)
        typer.echo(f"the arms differ in {', '.join(differ)}: `clbench arms` compares them only with --differ {named}")


# --- compare


def arms(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)],
    differ: Annotated[
        str, typer.Option(help="What may differ: tokens, rows, steps, learning_rate_sum, base, method, settings.")
    ] = "",
    control: Annotated[
        str | None, typer.Option(help="Track of the control arm.", show_default="dose 0, else the first")
    ] = None,
    apart: Annotated[
        str, typer.Option(help="Groups of held-out text that are shown by themselves, a+b.", show_default="the pool's")
    ] = "",
    suite: Annotated[str, typer.Option(help="Suite whose rows are compared.")] = "heldout",
    unit: Annotated[str, typer.Option(help="nats_per_token or bits_per_byte.")] = "nats_per_token",
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap samples of the documents.")] = N_RESAMPLES,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")] = False,
) -> None:
    """Compare arms of an experiment; refused where they were not shown as much, unless the difference is named."""
    from clbench.arm_set import doses_of
    from clbench.errors import ConfigError, did_you_mean
    from clbench.results.arms import compare_arms
    from clbench.results.matrix import Unit
    from clbench.results.store import find_runs

    units: dict[str, Unit] = {"nats_per_token": "nats_per_token", "bits_per_byte": "bits_per_byte"}
    if unit not in units:
        raise ConfigError(f"no unit {unit!r}", where="--unit", mend=did_you_mean(unit, units))
    found = find_runs(runs)
    tracks = {str(run.config()["track"]["name"]): str(run.config()["track"]["stream"]) for run in found}
    by_stream = doses_of(sorted(set(tracks.values())))
    comparison = compare_arms(
        found,
        [name.strip() for name in differ.split(",") if name.strip()],
        control=control,
        doses={track: by_stream[stream] for track, stream in tracks.items() if stream in by_stream},
        apart=apart.split("+") if apart else pool_groups(tracks.values()),
        suite=suite,
        unit=units[unit],
        n_resamples=resamples,
    )
    if as_json:
        _print_json(comparison.as_dict())
    else:
        show_comparison(comparison)


def pool_groups(streams: Any) -> list[str] | None:
    """Return the groups of the pools that these streams take posts from; None where that is not known."""
    from clbench import registry
    from clbench.build import stream_folder
    from clbench.errors import ClbenchError
    from clbench.stream import Stream

    groups: set[str] = set()
    for target in sorted(set(streams)):
        try:
            options = registry.make_stream_source(target).options
            groups |= {options.arm, options.control} - {""}
            pool = Stream(stream_folder(registry.make_stream_source(options.junk)))
            groups |= set(pool.documents("heldout", 0, ["group"])["group"].to_pylist())
        except (ClbenchError, AttributeError):  # no dose, or its pool is no longer here
            continue
    return sorted(groups) or None


def show_comparison(comparison: ArmComparison) -> None:
    """Print a comparison: what was shown, differences after the last stage over all periods, slopes."""
    table = _table("arm", "dose", "seeds", "tokens", "rows", "steps", "sum of lr")
    for arm in comparison.arms:
        totals = {quantity: sum(by.values()) for quantity, by in arm.exposure.items()}
        table.add_row(
            arm.name,
            "-" if arm.dose is None else f"{arm.dose:g}",
            str(len(arm.runs)),
            *("unknown" if math.isnan(totals[q]) else f"{totals[q]:,.0f}" for q in ("tokens", "rows", "steps")),
            "unknown" if math.isnan(totals["learning_rate_sum"]) else f"{totals['learning_rate_sum']:.4g}",
        )
    _print(table)
    if comparison.unmatched:
        typer.echo(f"not matched, as named: {', '.join(comparison.unmatched)}")
    if comparison.n_left_out:
        typer.echo(f"{comparison.n_left_out} held-out documents that not all arms have are left out")
    table = _table("after the last stage", "held-out text", f"{comparison.unit}", "over documents", "over seeds", "g")
    for contrast in comparison.contrasts:
        if contrast.period is None:
            table.add_row(*_contrast_row(contrast))
    _print(table)
    if comparison.slopes:
        table = _table("from dose 0 to 1", "held-out text", f"{comparison.unit}", "over documents", "over runs", "rank")
        for slope in comparison.slopes:
            table.add_row(*_slope_row(slope))
        _print(table)


def _contrast_row(contrast: Contrast) -> list[str]:
    paired = contrast.effects.get("paired")
    g = "" if paired is None or math.isnan(paired.value) else f"{paired.value:+.2f}"
    value = contrast.over_documents.value
    return [
        contrast.what,
        contrast.group,
        f"{value:+.4f}",
        _interval(contrast.over_documents),
        _interval(contrast.over_seeds),
        g,
    ]


def _slope_row(slope: Slope) -> list[str]:
    rank = "" if math.isnan(slope.spearman) else f"{slope.spearman:+.2f}"
    value = slope.over_documents.value
    return [
        f"{slope.n_doses} doses",
        slope.group,
        f"{value:+.4f}",
        _interval(slope.over_documents),
        _interval(slope.over_runs),
        rank,
    ]


def _interval(interval: Interval) -> str:
    if math.isnan(interval.low):
        return "-"
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]"


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 or column.startswith("groups") else "right", no_wrap=i == 0)
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console()
    # Where nobody looks at a terminal no column may be cut: the text is searched, not seen.
    (console if console.is_terminal else Console(width=200)).print(table)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
