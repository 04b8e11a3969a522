"""Tables for people: what there is, and what runs came to."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from clbench import registry
from clbench.errors import ClbenchError, NotFoundError, did_you_mean
from clbench.results.store import RunStore, find_runs
from clbench.specification import read_specification

if TYPE_CHECKING:
    from clbench.results.capacity import MethodCapacity
    from clbench.results.stats import Interval
    from clbench.results.summary import Comparison, Difference, MethodSummary, Score
    from clbench.results.tasks import StageTable

KINDS = ("methods", "streams", "suites", "tracks")
FEW_STAGES = 3
"""With more stages, tables of scores show no intervals."""
FIRST_COLUMN, METHOD_COLUMN = 19, 25
"""Characters of a score's name, and of ``value [low, high]``, with their borders."""


def listing(kind: str | None, runs: Path, *, name: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return kind -> entries with ``name``, ``about`` and, but for tracks, ``options``; or only one of them.

    Raises:
        NotFoundError: there is no such kind, or none of this name.
    """
    if kind is None:
        return {one: _entries(one) for one in KINDS}
    if kind not in (*KINDS, "runs"):
        raise NotFoundError(f"unknown kind {kind!r}", mend=did_you_mean(kind, (*KINDS, "runs")))
    entries = _runs(runs) if kind == "runs" else _entries(kind)
    if name is not None:
        known = [entry["name"] for entry in entries]
        entries = [entry for entry in entries if registry.canonical(entry["name"]) == registry.canonical(name)]
        if not entries:
            raise NotFoundError(f"unknown {kind.rstrip('s')} {name!r}", mend=did_you_mean(name, known))
    return {kind: entries}


def _entries(kind: str) -> list[dict[str, Any]]:
    if kind == "tracks":
        tracks = [registry.load_track(name) for name in registry.track_names()]
        return [{"name": t.name, "about": t.description, "version": t.version, "stream": t.stream} for t in tracks]
    entries = []
    if kind == "streams":
        found = registry.specifications()
        specified = {name: read_specification(path) for name, path in found.items()}
        entries = [{"name": name, "about": one.description or f"of {one.source}"} for name, one in specified.items()]
    for name in registry.names(kind):  # type: ignore[arg-type]
        cls = registry.load_class(kind, name)  # type: ignore[arg-type]
        entry: dict[str, Any] = {"name": name, "about": first_sentence(cls)}
        entry["options"] = [
            {
                "name": f.name,
                "type": str(f.type),
                "default": None if f.default is dataclasses.MISSING else f.default,
                "required": f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING,
                "help": docs_of_fields(cls.Options).get(f.name, ""),
            }
            for f in dataclasses.fields(cls.Options)
        ]
        if kind == "methods":
            entry["needs"] = sorted(cls.needs)
        if kind == "suites":
            entry["sources"] = cls.sources()
        entries.append(entry)
    return sorted(entries, key=lambda entry: str(entry["name"]))


def first_sentence(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def docs_of_fields(options: type) -> dict[str, str]:
    """Return the docstring under each field of an options class and its bases; the source is read, nothing is run."""
    classes = [cls for cls in reversed(options.__mro__) if dataclasses.is_dataclass(cls)]
    return {name: text for cls in classes for name, text in _own_docs(cls).items()}


def _own_docs(options: type) -> dict[str, str]:
    import ast
    import textwrap

    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(options)))
    except (OSError, TypeError, SyntaxError):
        return {}
    docs: dict[str, str] = {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for field, after in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


def _runs(root: Path) -> list[dict[str, Any]]:
    return [_run(store) for store in find_runs([root])] if root.exists() else []


def _run(store: RunStore) -> dict[str, Any]:
    """Return one run's entry; a folder that cannot be read is an entry, too, so that it does not hide the others."""
    entry = {"name": str(store.folder), "run_id": None}
    try:
        config, status = store.config(), store.status()
        stages = f"{len(store.stages_done())} of {len(config['stages'])} rows"
        about = [config["track"]["name"], config["method"]["label"], f"seed {config['seed']}"]
        about = [*about, f"{status['state']}, {stages}", *([status["error"]] if "error" in status else [])]
        return {**entry, "about": " · ".join(about), "state": status["state"], "run_id": config["run_id"]}
    except ClbenchError as error:
        return {**entry, "about": f"broken: {' '.join(error.what.split())}", "state": "broken"}
    except (KeyError, TypeError) as error:
        return {**entry, "about": f"broken: run.yaml or status.json lacks {error}", "state": "broken"}


def show(found: dict[str, list[dict[str, Any]]], *, in_full: bool = False) -> None:
    """Print a listing: one line an entry, or everything that is known about it."""
    console = Console()
    for kind, entries in found.items():
        table = Table(
            title=kind,
            title_justify="left",
            show_header=False,
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        for entry in entries:
            about = entry["about"] if in_full or kind == "runs" else _sentence(entry["about"])
            table.add_row(entry["name"], about)
            options = entry.get("options", [])
            if options and not in_full:
                names = ", ".join(option["name"] for option in options)
                table.add_row("", _shortened(f"options: {names}"), style="dim")
            for option in options if in_full else []:
                value = "(required)" if option["required"] else option["default"]
                table.add_row("", f"{option['name']}={value}  {option['help']}", style="dim")
            for source in entry.get("sources", []) if in_full else []:
                table.add_row("", f"{source['name']}  {source['title']}, {source['licence']}", style="dim")
        if not entries:
            table.add_row("none", "")
        console.print(table)
        console.print()


def _sentence(text: str) -> str:
    """Return the first sentence of a description."""
    return re.split(r"(?<=\.)(?<! al\.)\s|(?<=[a-z]):\s", text, maxsplit=1)[0]


def _shortened(text: str, n_characters: int = 90) -> str:
    return text if len(text) <= n_characters else text[: text.rfind(",", 0, n_characters)] + " …"


def show_summaries(summaries: Sequence[MethodSummary]) -> None:
    """Print one column a method with its main scores, as many as fit, and how each differs from the first."""
    from clbench.results.summary import MAIN, compare

    if not summaries:
        return
    console = Console()
    first = summaries[0]
    against = (
        "regret against the oracle" if first.oracle[first.unit] is not None else "plain losses: the track has no oracle"
    )
    console.print(f"{first.track['name']} · {first.unit.replace('_', ' ')} · {against}", style="italic")
    columns = max(1, (console.width - FIRST_COLUMN) // METHOD_COLUMN)
    for start in range(0, len(summaries), columns):
        console.print(_scores_of(summaries[start : start + columns]))
    kinds = {one.scores[name].interval for one in summaries for name in MAIN} - {"none"}
    if kinds:
        console.print(f"Intervals: 95 %, {' / '.join(sorted(kinds))}.", style="dim", soft_wrap=True)
    comparisons = [compare(other, first) for other in summaries[1:]]
    for start in range(0, len(comparisons), columns):
        console.print(_differences_of(comparisons[start : start + columns]))


def show_capacity(found: Sequence[MethodCapacity]) -> None:
    """Print one column a method: what weights and new periods did to the forgetting cost, figures of base and last row.

    Figures of the suite ``capacity`` are shown where some method has them.
    """
    from clbench.results.capacity import MAIN, PER_RUN

    console = Console()
    reference = {"oracle": "the oracle", "best_of_run": "the best of the run"}[found[0].estimate.reference]
    measured = any(one.measured for one in found)
    columns = max(1, (console.width - FIRST_COLUMN) // METHOD_COLUMN)
    for start in range(0, len(found), columns):
        shown = found[start : start + columns]
        table = Table(title=f"Capacity: forgetting cost J, nats per token above {reference}", title_justify="left")
        table.add_column("")
        for one in shown:
            table.add_column(one.label, justify="right", overflow="fold")
        for key, (title, _) in PER_RUN.items():
            table.add_row(title, *(interval(one.estimate.per_run[key]) for one in shown))
        for key, (title, _) in MAIN.items() if measured else ():
            table.add_row(title, *(_from_base(one, key) for one in shown))
        console.print(table)
    if measured:
        console.print("Base → after the last stage; see `clbench capacity`.", style="dim", soft_wrap=True)


def _from_base(one: MethodCapacity, key: str) -> str:
    """Return a figure of the base and of the last row."""
    base, last = (one.figure(key, row).value for row in (0, one.last))
    return " → ".join(f"{value:.3f}" if math.isfinite(value) else "–" for value in (base, last))


def _differences_of(comparisons: Sequence[Comparison]) -> Table:
    """Return a table of paired differences to one method: the same seeds, the same documents."""
    from clbench.results.metrics import METRICS
    from clbench.results.summary import MAIN

    table = Table()
    table.add_column(f"minus {comparisons[0].b}")
    for one in comparisons:
        table.add_column(one.a, justify="right", overflow="fold")
    for name in MAIN:
        table.add_row(METRICS[name].title, *(interval(one.scores[name]) for one in comparisons))
    return table


def _scores_of(summaries: Sequence[MethodSummary]) -> Table:
    """Return a table with one row a score and one column a method."""
    from clbench.results.metrics import METRICS
    from clbench.results.summary import MAIN

    table = Table()
    table.add_column("")
    for one in summaries:
        table.add_column(one.label, justify="right", overflow="fold")
    table.add_row("seeds", *(str(len(one.seeds)) for one in summaries))
    for name in MAIN:
        table.add_row(METRICS[name].title, *(interval(one.scores[name]) for one in summaries))
    table.add_row("tokens", *(f"{one.bill.n_tokens:,.0f}" for one in summaries))
    if any(one.bill.overhead > 0 for one in summaries):
        table.add_row(
            "FLOPs besides", *(f"{one.bill.overhead:+.0%}" if one.bill.overhead else "–" for one in summaries)
        )
    table.add_row("seconds", *(f"{one.bill.total_seconds:,.0f}" for one in summaries))
    return table


def interval(score: Score | Difference | Interval) -> str:
    """Return ``value [low, high]``, or a dash where it is undefined."""
    if not math.isfinite(score.value):
        return "–"
    if not (math.isfinite(score.low) and math.isfinite(score.high)):
        return f"{score.value:.3f}"
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def show_stage_table(title: str, table: StageTable) -> None:
    """Print the scores of a run by task and stage, and what every stage retains of the base's."""
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(title, style="italic", soft_wrap=True)
    if not table.scores:
        console.print("its suites have no scores by task", style="dim")
        return
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    words = [word for task in ("task", "retained,", *table.scores) for word in task.split()]
    grid.add_column("task", overflow="fold", min_width=min(24, max(map(len, words))))
    for stage, name in table.stages.items():
        grid.add_column(f"{stage} {name}" if stage else name, justify="right")
    plain = len(table.stages) > FEW_STAGES
    for task, by_stage in table.scores.items():
        grid.add_row(task, *(_score(by_stage.get(stage), plain=plain) for stage in table.stages))
    if table.retention:
        kept = [table.retention.get(stage) for stage in table.stages]
        grid.add_section()
        for title, name in (("retained", "corrected"), ("retained, plain", "plain")):
            shares = [None if one is None else getattr(one, name) for one in kept]
            grid.add_row(title, *(_score(share, plain=plain) for share in shares))
    console.print(grid)
    told = "Intervals, 95 % over items, are in --json." if plain else "Intervals: 95 % over items, evaluation noise."
    console.print(f"Retained: of the base's scores, mean over tasks, chance taken off. {told}", style="dim")


def _score(one: Interval | None, *, plain: bool) -> str:
    if one is None or not math.isfinite(one.value):
        return "–"
    bounds = f" [{one.low:.3f}, {one.high:.3f}]" if math.isfinite(one.low + one.high) and not plain else ""
    return f"{one.value:.3f}{bounds}"
