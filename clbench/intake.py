"""From somebody's files to a stream under a name: look, guess, show, ask, build, save the specification.

The work behind ``clbench stream build``. What stands in the files is read by the source ``documents``; a guess is
always shown, and confirmed by a person, by ``--yes``, or by giving the command that stands in the refusal.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from clbench import build, console, registry
from clbench.errors import ConfigError
from clbench.files import write_text
from clbench.specification import StreamSpecification, read_specification, save_specification, saved_specifications
from clbench.stream import Stream

SOURCE = "documents"
ROLES = ("text", "date", "order", "id", "group")
NO_COLUMN = "none"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for. ``options`` holds those of the source that were given, as texts or numbers."""

    name: str
    options: dict[str, Any]
    settings: dict[str, Any]
    """Of the builder: heldout_fraction, vocab_size … that were given."""
    yes: bool = False
    replace: bool = False
    dry_run: bool = False
    copy: Path | None = None
    """A further place for the specification."""


def take_in(request: Request) -> dict[str, Any]:
    """Make a stream of files, and save its specification under a name.

    Returns:
        What was made, for machines: name, columns, report and, but for a dry run, the stream's folder and digest.

    Raises:
        ConfigError: the name is taken, an option is wrong, or a guess was not confirmed.
        NotFoundError, IntegrityError: the input cannot be used.
    """
    _check_name(request.name)
    options, confirm = _propose(request)
    if confirm and not request.dry_run:
        _confirm(request, options)
    cls = registry.load_class("streams", SOURCE)
    made: dict[str, Any] = {"name": request.name, "options": options}
    if request.dry_run:
        return made | {"report": cls(cls.Options(**options)).scan(), "dry_run": True}
    options["sha256"] = cls(cls.Options(**options)).input_digest()
    specification = _specification(request, options)
    _check_taken(specification, replace=request.replace)
    source: Any = registry.source_of(specification)
    stream = build.build_stream(source)
    path = save_specification(specification)
    if request.copy is not None:
        write_text(request.copy, specification.text())
    made |= {"specification": str(path), "stream": str(stream.folder), "sha256": stream.sha256}
    if (kept := _report_of(source)) is not None:
        made["report"] = kept
    return made | {"stages": _sizes(stream)}


def _report_of(source: Any) -> dict[str, Any] | None:
    """Return the source's report; None where the documents that were set down are deleted again."""
    if not (source.ingested() / "manifest.json").is_file():
        return None
    report: dict[str, Any] = source.report()
    return report


def _sizes(stream: Stream) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "start": stage.start,
            "end": stage.end,
            "train": stream.counts("train", stage.index)["n_documents"],
            "heldout": stream.counts("heldout", stage.index)["n_documents"],
            "train_tokens": stream.counts("train", stage.index)["n_tokens"],
        }
        for stage in stream.stages()
    ]


def _check_name(name: str) -> None:
    """Refuse a name that cannot be one, or that means a stream or track that comes with clbench."""
    try:
        StreamSpecification(name=name, source=SOURCE)
    except ValidationError:
        raise ConfigError(
            f"{name!r} cannot be the name of a stream", mend="use a-z, 0-9, '.', '_' and '-', 64 at most"
        ) from None
    own = {registry.canonical(one) for one in saved_specifications()}
    if registry.canonical(name) in {*registry.stream_names(), *registry.track_names()} - own:
        raise ConfigError(f"{name!r} is a stream or a track already", mend="choose another name")


# --- the guess -----------------------------------------------------------------------------------------------


def _propose(request: Request) -> tuple[dict[str, Any], bool]:
    """Return the options in full, and whether somebody has to confirm them; shows what was found."""
    cls = registry.load_class("streams", SOURCE)
    options: dict[str, Any] = {
        key: None if value == NO_COLUMN and key in ROLES else value for key, value in request.options.items()
    }
    given = [role for role in ROLES if role in options]
    named = "text" in given and ("date" in given or "order" in given)
    if named:  # then what is left out is none, and that is no guess
        given += [role for role in ("id", "group") if role not in given]
    found = cls.survey(cls.Options(**options), given)
    hints = cls.survey(cls.Options(**options), [role for role in ROLES if role in options]) if named else found
    options |= {role: column for role, column in found.guess.items() if column is not None}
    options["path"] = str(Path(options["path"]).expanduser().absolute())
    options["format"] = found.inputs.format
    if found.separator is not None:
        options.setdefault("separator", {"\t": "tab"}.get(found.separator, found.separator))
    sure = _settle_dates(found, options)
    options.setdefault("latest", _latest(request.name))
    _show_guess(found, hints, options, given=[role for role in ROLES if role in request.options])
    return {key: value for key, value in options.items() if value is not None}, not (named and sure)


def _settle_dates(found: Any, options: dict[str, Any]) -> bool:
    """Say how dates are read; returns whether nobody has to confirm that."""
    if options.get("date") is None or "dateformat" in options:
        return True
    if found.layout is None:
        raise ConfigError(
            f"column {options['date']!r} does not read as dates",
            where=f"for example {', '.join(map(repr, found.examples(options['date']))) or 'nothing'}",
            mend="choose another column, or say --dateformat",
        )
    if found.layout.layout != "text":
        options["dateformat"] = found.layout.layout
    return bool(found.layout.sure)


def _latest(name: str) -> str:
    """Return the day after which dates are errors: today, or that of an earlier build under this name."""
    path = saved_specifications().get(name)
    known = read_specification(path).options.get("latest") if path is not None else None
    return str(known or datetime.now(UTC).date().isoformat())


def _show_guess(found: Any, hints: Any, options: dict[str, Any], given: list[str]) -> None:
    """Show files, columns with examples, and how dates are read, on stderr."""
    inputs = found.inputs
    files = inputs.files[0] if len(inputs.files) == 1 else f"{len(inputs.files):,} files"
    console.say(f"{files} ({inputs.format}); columns: {', '.join(found.columns)}")
    width = max(len(str(options.get(role))) for role in ROLES)
    for role in ROLES:
        column = options.get(role)
        if role == "order" and column is None:
            continue
        reason = "as given" if role in given else found.reasons.get(role, "not given")
        console.say(f"  {role:6} {column or NO_COLUMN:{width}}  {reason}")
        if column:
            console.say(f"  {'':6} {'':{width}}  such as {' · '.join(found.examples(column, 2))}")
    if options.get("date") is not None:
        said = found.layout.words if found.layout is not None else "dates"
        if options.get("dateformat"):
            said = f"{said} ({options['dateformat']})"
        console.say(f"dates are read as {said}; times that name no zone are in {options.get('timezone', 'UTC')}")
        console.say(f"dates after {options['latest']} are taken for errors")
    for role in ("id", "group"):
        if options.get(role) is None and role not in given and hints.guess.get(role):
            console.say(f"hint: --{role} {hints.guess[role]} may be what you want")


def _confirm(request: Request, options: dict[str, Any]) -> None:
    """Have a person confirm the guess."""
    if request.yes:
        return
    command = _command(request, options)
    if not (sys.stdin.isatty() and console.stderr.is_terminal):
        raise ConfigError("the guess above has to be confirmed", mend=f"add --yes, or say what you mean: {command}")
    console.stderr.print("Is this right? [y/N] ", end="", markup=False)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("the guess was not confirmed", mend=f"say what you mean: {command}")


def _command(request: Request, options: dict[str, Any]) -> str:
    """Return the command that asks for exactly these columns."""
    words = ["clbench", "stream", "build", "--from", str(request.options["path"])]
    keys = [*ROLES, *(key for key in request.options if key not in (*ROLES, "path"))]
    keys += [key for key in ("dateformat", "separator") if key in options and key not in keys]
    for key in keys:
        if key == "order" and options.get(key) is None:
            continue
        value = options.get(key)
        value = NO_COLUMN if value is None and key in ROLES else value
        flag = f"--{key.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    for key, value in request.settings.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--name", request.name])


# --- the specification ---------------------------------------------------------------------------------------


def _specification(request: Request, options: dict[str, Any]) -> StreamSpecification:
    """Return the specification of the stream; options at their defaults are left out."""
    cls = registry.load_class("streams", SOURCE)
    defaults = {field.name: field.default for field in fields(cls.Options)}
    chosen = {key: options[key] for key in defaults if key in options and options[key] != defaults[key]}
    try:
        return StreamSpecification(name=request.name, source=SOURCE, options=chosen, **request.settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", mend="see --help") from None


def _check_taken(specification: StreamSpecification, *, replace: bool) -> None:
    """Refuse to put another stream under a name that is in use; where the files lie does not count."""
    path = saved_specifications().get(specification.name)
    if path is None or replace:
        return
    before = read_specification(path)
    if _without_path(before) != _without_path(specification):
        raise ConfigError(
            f"stream {specification.name!r} is another one already",
            where=path,
            mend="choose another --name, or add --replace",
        )


def _without_path(specification: StreamSpecification) -> dict[str, Any]:
    found = specification.model_dump()
    found["options"] = {key: value for key, value in found["options"].items() if key != "path"}
    return found


# --- the report ----------------------------------------------------------------------------------------------


HEADINGS = {
    "documents": "docs",
    "unchanged": "same",
    "older_versions": "older",
    "heldout": "held out",
    "train_tokens": "tokens",
}
"""Short enough for a row on a terminal of 80 columns."""


def show(made: dict[str, Any]) -> None:
    """Print what was read, left out and made, for people."""
    out = Console(highlight=False)
    if (report := made.get("report")) is not None:
        out.print(f"{report['rows']:,} rows read, {report['kept']:,} kept", markup=False)
        for word, kinds in (("left out", report["left_out"]), ("kept", report["mended"])):
            for kind, found in kinds.items():
                out.print(
                    f"  {word}: {found['count']:,} {kind} (first: {found['first']})", markup=False, soft_wrap=True
                )
        for names in report["merged"]:
            out.print(f"  too small alone, now one stage: {', '.join(names)}", markup=False, soft_wrap=True)
        for name, n in report["dropped_periods"].items():
            out.print(f"  left out: period {name} with {n} documents", markup=False)
        if report["empty_periods"]:
            out.print(f"  no documents in: {', '.join(report['empty_periods'])}", markup=False, soft_wrap=True)
    _show_stages(out, made)
    if made.get("dry_run"):
        out.print("nothing was written")
        return
    out.print(f"stream {made['name']}: {made['stream']}", markup=False, soft_wrap=True)
    out.print(f"specification: {made['specification']}", markup=False, soft_wrap=True)


def _show_stages(out: Console, made: dict[str, Any]) -> None:
    """Print a row a stage: what was read, and what was built of it."""
    read = {stage["name"]: stage for stage in made.get("report", {}).get("stages", [])}
    built = {stage["name"]: stage for stage in made.get("stages", [])}
    columns = ["rows", "documents", "new", "changed", "unchanged", "copies", "older_versions"]
    columns += ["train", "heldout", "train_tokens"]
    rows = [read.get(name, {}) | built.get(name, {}) for name in (built or read)]
    shown = [column for column in columns if any(column in row for row in rows)]
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for column in shown:
        table.add_column(HEADINGS.get(column, column), justify="right")
    for row in rows:
        table.add_row(row["name"], *(f"{row[column]:,}" if column in row else "" for column in shown))
    out.print(table, markup=False) if rows else None
