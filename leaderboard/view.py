"""What the pages show, as plain values for the templates: rows, coloured matrices, bills, sentences.

Figures come from ``clbench.results.summary``; nothing is measured or averaged here. Both units are always
prepared, as the reader switches between them on the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from clbench.errors import ConfigError
from clbench.leaderboard.colour import level_of
from clbench.leaderboard.page import clean, number, scaled, signed, slug
from clbench.leaderboard.submission import Entry, VerifiedEntry
from clbench.results import capacity
from clbench.results.capacity import MethodCapacity
from clbench.results.metrics import MAIN, METRICS
from clbench.results.stats import holm
from clbench.results.store import RunStore
from clbench.results.summary import MethodSummary, compare, group_runs, rank, summarise

Short = Literal["nats", "bpb"]
UNITS: dict[Short, Literal["nats_per_token", "bits_per_byte"]] = {
    "nats": "nats_per_token",
    "bpb": "bits_per_byte",
}
UNIT_NAMES: dict[Short, str] = {"nats": "nats per token", "bpb": "bits per byte"}
PRIMARY = "backward"
"""The score that the board ranks by: what was kept of the past."""
DIFFERENCES = ("backward", "in_distribution", "forward", "forgetting_first", "final")


@dataclass(frozen=True, kw_only=True)
class MethodView:
    """One method on one track: its runs, its figures in both units, and how the pages show it."""

    label: str
    slug: str
    index: int
    """Chooses colour and marker, the same on every chart."""
    status: Literal["reported", "checked"]
    runs: list[RunStore]
    configs: list[dict[str, Any]]
    """``run.yaml`` of every run."""
    summaries: Mapping[Short, MethodSummary]
    capacity: MethodCapacity
    """Forgetting cost over stages and the figures of the suite ``capacity``, where they were measured."""
    entry: Entry | None
    date: str
    """When its last stage was finished, ``YYYY-MM-DD``; empty when nothing is."""

    @property
    def summary(self) -> MethodSummary:
        """The figures in nats per token; bills, stages and seeds are the same in both."""
        return self.summaries["nats"]

    @property
    def family(self) -> str:
        """What the board groups by: the names of the method's components."""
        components = self.configs[0]["method"].get("components") or []
        return "+".join(str(c.get("name", "?")) for c in components) or "checkpoints"

    @property
    def search(self) -> str:
        """What the search field of the board looks into."""
        return f"{self.label} {self.family} {self.status} {self.date}"


def method_views(sources: Iterable[RunStore | VerifiedEntry]) -> list[MethodView]:
    """Return the methods of one track, ordered by their primary score; runs with one label are one method.

    Raises:
        ConfigError: the sources are of several tracks.
    """
    sources = list(sources)
    loose = [source for source in sources if isinstance(source, RunStore) and source.stages_done()]
    entries = [source for source in sources if isinstance(source, VerifiedEntry)]
    if not loose and not entries:
        raise ConfigError("no run has a complete row yet", mend="run `clbench run` first, or wait for its first stage")
    found: list[tuple[str, list[RunStore], Entry | None]] = [
        (label, runs, None) for label, runs in (group_runs(loose).items() if loose else ())
    ]
    found += [(one.entry.method.label, one.runs, one.entry) for one in entries]
    views: list[tuple[str, list[RunStore], Entry | None, dict[Short, MethodSummary]]] = []
    for label, runs, entry in found:
        summaries = {short: summarise(runs, unit=unit) for short, unit in UNITS.items()}
        views.append((label, runs, entry, summaries))
    if len({v[3]["nats"].track["sha256"] for v in views}) > 1:
        raise ConfigError("these runs are of several tracks", mend="make one page per track")
    views.sort(key=lambda v: (sort_value(v[3]["nats"]), v[0], v[2].date if v[2] else ""))
    labels = distinct([v[0] for v in views], [v[2].date if v[2] else "" for v in views])
    slugs = distinct([slug(label) for label in labels], [""] * len(labels))
    return [
        MethodView(
            label=labels[i],
            slug=slugs[i],
            index=i,
            status="checked" if entry else "reported",
            runs=runs,
            configs=[run.config() for run in runs],
            summaries={short: replace(s, label=labels[i]) for short, s in summaries.items()},
            capacity=capacity.of_runs(labels[i], str(summaries["nats"].track["name"]), runs),
            entry=entry,
            date=last_date(runs),
        )
        for i, (_, runs, entry, summaries) in enumerate(views)
    ]


def sort_value(summary: MethodSummary) -> float:
    """Return the primary score, infinity where it is undefined."""
    value = summary.scores[PRIMARY].value
    return value if math.isfinite(value) else math.inf


def distinct(names: Sequence[str], details: Sequence[str]) -> list[str]:
    """Return the names, told apart by a detail or else a number where several are the same."""
    taken: set[str] = set()
    result = []
    for name, detail in zip(names, details, strict=True):
        new = f"{name} ({detail})" if names.count(name) > 1 and detail else name
        n = 2
        while new in taken:
            new = f"{name}-{n}"
            n += 1
        taken.add(new)
        result.append(new)
    return result


def last_date(runs: Sequence[RunStore]) -> str:
    """Return the day on which the last stage of the runs was finished."""
    return max((run.stage_record(k)["finished"] for run in runs for k in run.stages_done()), default="")[:10]


# Scores


def score_title(name: str, track: Mapping[str, Any]) -> str:
    """Return a column's title; with an oracle the losses are regrets against it."""
    metric = METRICS[name]
    return f"{metric.title} {'regret' if track.get('oracle') else 'loss'}" if metric.regret else metric.title


def score_cell(score: Any, *, difference: bool = False) -> dict[str, Any]:
    """Return value, half-width and tooltip of a Score or a Difference as texts, and the number to sort by."""
    if not math.isfinite(score.value):
        return {
            "text": None,
            "ci": "",
            "sort": "",
            "reason": score.reason or "not known",
            "tip": "",
            "tone": "",
        }
    write = signed if difference else number
    known = math.isfinite(score.low) and math.isfinite(score.high)
    half = max(score.high - score.value, score.value - score.low) if known else math.nan
    if known:
        tip = f"95 % interval {write(score.low)} to {write(score.high)}, {score.interval}, n = {score.n}"
    else:
        tip = score.reason or "no interval"
    return {
        "text": write(score.value),
        "ci": f"±{number(half)}" if known else "",
        "sort": repr(float(score.value)),
        "reason": "",
        "tip": tip,
        "sure": known and (score.low > 0 or score.high < 0),
        "tone": {"a": "better", "b": "worse", None: ""}[score.better] if difference else "",
    }


def in_both(views: MethodView, name: str) -> dict[Short, dict[str, Any]]:
    """Return a score's cell in both units."""
    return {short: score_cell(views.summaries[short].scores[name]) for short in UNITS}


def board_rows(views: Sequence[MethodView], prefix: str) -> list[dict[str, Any]]:
    """Return the rows of the board; ``prefix`` leads from the board to the methods' pages."""
    ranges = {short: rank([v.summaries[short] for v in views], [PRIMARY]) for short in UNITS}
    rows = []
    for view in views:
        bill = view.summary.bill
        billed = bool(view.runs[0].ledger())
        rows.append(
            {
                "view": view,
                "href": f"{prefix}methods/{view.slug}.html",
                "rank": {short: rank_cell(ranges[short][PRIMARY][view.label]) for short in UNITS},
                "scores": {name: in_both(view, name) for name in MAIN},
                "n_seeds": len(view.summary.seeds),
                "bill": bill if billed else None,
                "search": view.search,
            }
        )
    return rows


def rank_cell(found: Any) -> dict[str, str]:
    """Return a rank range as text (``1``, ``2–4``), its sort key, and which pair could not be tested."""
    text = str(found.best) if found.best == found.worst else f"{found.best}–{found.worst}"
    return {"text": text, "sort": repr((found.best + found.worst) / 2), "tip": found.reason or ""}


def reference_of(views: Sequence[MethodView]) -> MethodView:
    """Return what differences are taken to: ``sequential`` if it is there, else the first method."""
    return next((v for v in views if v.family == "sequential"), views[0])


def difference_rows(views: Sequence[MethodView]) -> list[dict[str, Any]]:
    """Return paired differences of every method to the reference, with Holm's adjustment of the primary p."""
    reference = reference_of(views)
    others = [v for v in views if v is not reference]
    compared = {
        v.label: {s: compare(v.summaries[s], reference.summaries[s], DIFFERENCES) for s in UNITS} for v in others
    }
    adjusted = holm([compared[v.label]["nats"].scores[PRIMARY].p for v in others])
    rows = []
    for view, p in zip(others, adjusted, strict=True):
        cells = {
            name: {s: score_cell(compared[view.label][s].scores[name], difference=True) for s in UNITS}
            for name in DIFFERENCES
        }
        rows.append({"view": view, "cells": cells, "p": p})
    return rows


# Matrices


@dataclass(frozen=True)
class HeatCell:
    """One cell: text, class of its colour, tooltip, and whether its row was just trained on its column."""

    text: str | None
    css: str
    tip: str
    diagonal: bool


@dataclass(frozen=True)
class HeatRow:
    """One checkpoint."""

    name: str
    detail: str
    cells: list[HeatCell]


@dataclass(frozen=True)
class Heat:
    """One coloured table in one unit."""

    rows: list[HeatRow]
    low: str
    high: str


@dataclass(frozen=True)
class MatrixView:
    """One way to look at a matrix: title, how to read it, and a table per unit."""

    key: str
    title: str
    note: str
    tables: dict[Short, Heat]
    diverging: bool


KINDS = (
    ("loss", "Loss", "Loss of each checkpoint on each period. Framed: the period just trained on.", False),
    (
        "learnt",
        "Forgetting",
        "Loss minus the loss right after that period was trained. Orange: forgotten; blue: better.",
        True,
    ),
    ("base", "Against the base", "Loss minus the base's. Blue: the stream helped; orange: it hurt.", True),
)
"""Ways to look at a matrix: key, title, how to read it, whether its colours diverge around zero."""


def matrix_views(view: MethodView) -> list[MatrixView]:
    """Return the matrix as losses, and as differences to just after training, to the base, to the oracle."""
    kinds = list(KINDS)
    if view.summary.oracle["nats_per_token"] is not None:
        note = "Loss minus the oracle's, which was trained once on all stages together (not a floor)."
        kinds.append(("regret", "Regret", note, True))
    return [
        MatrixView(key, title, note, {s: heat_table(view, s, key, diverging) for s in UNITS}, diverging)
        for key, title, note, diverging in kinds
    ]


def reference_loss(view: MethodView, short: Short, kind: str, row: int, column: int) -> tuple[float, str]:
    """Return what is subtracted in one cell, NaN with the reason where it is undefined."""
    matrix = view.summaries[short].matrices[UNITS[short]]
    if kind == "loss":
        return 0.0, ""
    if kind == "regret":
        oracle = view.summaries[short].oracle[UNITS[short]]
        return (math.nan, "no oracle") if oracle is None else (float(oracle[matrix.column_stages.index(column)]), "")
    other = 0 if kind == "base" else column
    if kind == "learnt" and row < column:
        return math.nan, "this period was not trained on yet"
    reason = matrix.reason(other, column)
    return (math.nan, reason) if reason else (float(matrix.at(other, column)), "")


def heat_table(view: MethodView, short: Short, kind: str, diverging: bool) -> Heat:
    """Return one coloured table; colours span all values, diverging ones symmetrically around zero."""
    summary = view.summaries[short]
    matrix = summary.matrices[UNITS[short]]
    names = stage_names(summary)
    values: dict[tuple[int, int], tuple[float, str]] = {}
    for row in matrix.row_stages:
        for column in matrix.column_stages:
            minus, why = reference_loss(view, short, kind, row, column)
            reason = matrix.reason(row, column) or why
            values[row, column] = (math.nan if reason else float(matrix.at(row, column)) - minus, reason)
    finite = [value for value, _ in values.values() if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    write = signed if diverging else number
    rows = []
    for row in matrix.row_stages:
        cells = []
        for column in matrix.column_stages:
            value, reason = values[row, column]
            where = f"{row_name(row, names)}, on {names[column]}"
            if not math.isfinite(value):
                cells.append(HeatCell(None, "na-cell", reason, row == column))
                continue
            css = f"{'d' if diverging else 's'}{level_of(value, low, high)}"
            tip = f"{where}: {write(value, 4)} {UNIT_NAMES[short]}"
            cells.append(HeatCell(write(value), css, tip, row == column))
        rows.append(HeatRow(row_name(row, names), "" if row else "before the stream", cells))
    return Heat(rows, write(low), write(high))


def stage_names(summary: MethodSummary) -> dict[int, str]:
    """Return the short name of every stage."""
    return {int(stage["index"]): str(stage["name"]) for stage in summary.stages}


def row_name(row: int, names: Mapping[int, str]) -> str:
    """Return what a matrix row is called."""
    return f"after {names[row]}" if row else "base"


def matrix_csv(view: MethodView, short: Short) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of a matrix for a CSV file; undefined cells are None."""
    summary = view.summaries[short]
    matrix = summary.matrices[UNITS[short]]
    names = stage_names(summary)
    rows = [
        [row_name(row, names), *clean([float(matrix.at(row, c)) for c in matrix.column_stages])]
        for row in matrix.row_stages
    ]
    return ["checkpoint", *(names[c] for c in matrix.column_stages)], rows


# Bills, facts, sentences


def bill_view(view: MethodView) -> dict[str, Any] | None:
    """Return the bill as the page shows it: one row per trained stage; None when nothing was billed."""
    if not view.runs[0].ledger():
        return None
    summary, bill = view.summary, view.summary.bill
    names = stage_names(summary)
    columns = sorted(names)
    rows = []
    for stage in (s for s in columns if s > 0 or bill.tokens.get(s)):
        sources = bill.tokens.get(stage, {})
        rows.append(
            {
                "name": names[stage],
                "cells": [sources.get(c, 0) if c <= stage else None for c in columns],
                "total": sum(sources.values()),
            }
        )
    return {"columns": [names[c] for c in columns], "rows": rows, "bill": bill}


def facts(views: Sequence[MethodView]) -> list[tuple[str, str]]:
    """Return the few facts that stand under a page's title."""
    summary = views[0].summary
    config = views[0].configs[0]
    stages = summary.stages
    found = [("stages", str(len(stages)))]
    if stages:
        found.append(("dates", f"{stages[0]['start'][:7]} to {stages[-1]['end'][:7]}"))
    training = config.get("training") or {}
    budget = training.get("n_tokens_per_stage") or training.get("tokens_per_stage")
    if budget:
        found.append(("tokens a stage", scaled(float(budget))))
    if n_parameters := (config.get("base") or {}).get("n_parameters"):
        found.append(("model", f"{scaled(float(n_parameters))} parameters"))
    found.append(("stream", str(summary.track.get("stream", ""))))
    found.append(("version", str(summary.track.get("version", ""))))
    return found


def pairs(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as flat (name, text) pairs."""
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in pairs(part, f"{prefix}{key}.")]
    text = ", ".join(str(v) for v in value) if isinstance(value, list) else "–" if value is None else str(value)
    return [(prefix.rstrip("."), text)]


@dataclass(frozen=True)
class Sentence:
    """A method's name, its marker, and what is said about it."""

    label: str
    index: int
    text: str


def verdict(views: Sequence[MethodView]) -> list[Sentence]:
    """Return a plain sentence per method: what it forgot, compared with the reference, at what price."""
    reference = reference_of(views)
    ordered = [reference, *(v for v in views if v is not reference)]
    return [Sentence(v.label, v.index, say(v, reference)) for v in ordered]


def caveat(views: Sequence[MethodView]) -> str:
    """Return what a reader has to know about the intervals in the sentences."""
    if all(len(view.summary.seeds) > 1 for view in views):
        return "± is half of a 95 % interval over seeds."
    return (
        "± is half of a 95 % interval. With one seed it covers only which documents were measured, "
        "not what another seed would give: run the track's other seeds before you conclude."
    )


def say(view: MethodView, reference: MethodView) -> str:
    """Return the sentence of one method."""
    summary = view.summary
    score = summary.scores["forgetting_first"]
    if not math.isfinite(score.value):
        return f"has no verdict yet: {score.reason or 'too few stages are measured'}."
    if view.family == "frozen" or (summary.bill.n_tokens == 0 and view.runs[0].ledger()):
        text = "was never trained on the stream, so it forgot nothing and learnt nothing"
    elif score.value > 0:
        text = f"forgot {amount(score)} nats per token of past periods by the end{most_forgotten(view)}"
    else:
        text = f"forgot nothing on average: past periods ended {number(-score.value)} nats per token better"
    if view is reference:
        return text + "."
    comparison = compare(summary, reference.summary, ("forgetting_first", "in_distribution"))
    forgot, learnt = comparison.scores["forgetting_first"], comparison.scores["in_distribution"]
    parts = [
        versus(forgot, reference.label, "forgetting", "less forgetting", "more forgetting"),
        versus(learnt, reference.label, "new text", "better on new text", "worse on new text"),
    ]
    return "; ".join([text, *(part for part in parts if part)]) + price(view, reference) + "."


def amount(score: Any) -> str:
    """Return a score with its half-width, where it has one."""
    cell = score_cell(score)
    return "\u00a0".join(part for part in (cell["text"], cell["ci"].replace("±", "±\u00a0")) if part)


def most_forgotten(view: MethodView) -> str:
    """Return which period was forgotten most by the last checkpoint."""
    matrix = view.summary.matrices["nats_per_token"]
    last = matrix.row_stages[-1]
    lost = {
        column: float(matrix.at(last, column) - matrix.at(column, column))
        for column in matrix.column_stages
        if column < last and not matrix.reason(last, column) and not matrix.reason(column, column)
    }
    if not lost:
        return ""
    worst = max(lost, key=lambda column: lost[column])
    return f", most on {stage_names(view.summary)[worst]} ({signed(lost[worst])})"


def versus(difference: Any, reference: str, what: str, lower: str, higher: str) -> str:
    """Return one comparison in words; where the interval includes zero, it says that nothing is sure."""
    if not math.isfinite(difference.value):
        return ""
    cell = score_cell(difference, difference=True)
    half = cell["ci"].replace("±", "±\u00a0")
    if half and not cell["sure"]:
        return f"no sure difference to {reference} on {what} ({cell['text']}\u00a0{half})"
    word = lower if difference.value < 0 else higher
    doubt = "" if half else " (no interval)"
    return f"{number(abs(difference.value))}\u00a0{half}".strip() + f" {word} than {reference}{doubt}"


def price(view: MethodView, reference: MethodView) -> str:
    """Return how the bill compares with the reference's."""
    mine, other = view.summary.bill, reference.summary.bill
    ours, theirs = mine.flops.get("train", 0.0), other.flops.get("train", 0.0)
    if not ours or not theirs:
        return ""
    same = math.isclose(ours, theirs, rel_tol=0.005)
    work = "the same training FLOPs" if same else f"{ours / theirs:.2f} times the training FLOPs"
    stored = f" and {scaled(mine.total_stored_bytes, 'B')} stored" if mine.total_stored_bytes else ""
    return f"; at {work}{stored}"


def score_rows(view: MethodView) -> list[dict[str, Any]]:
    """Return every score with its definition, for the page of one method."""
    rows = []
    for name, metric in METRICS.items():
        seeds = {
            short: ", ".join(f"{seed}: {number(value)}" for seed, value in summary.scores[name].per_seed.items())
            for short, summary in view.summaries.items()
        }
        rows.append(
            {
                "title": score_title(name, view.summary.track),
                "cells": in_both(view, name),
                "better": f"{metric.direction}",
                "seeds": seeds,
                "description": metric.description,
                "formula": metric.formula,
            }
        )
    return rows


def stage_heads(summary: MethodSummary) -> list[dict[str, str]]:
    """Return name and dates of every period, for the heads of a matrix."""
    heads = []
    for stage in summary.stages:
        name, start, end = str(stage["name"]), str(stage["start"])[:7], str(stage["end"])[:7]
        heads.append({"name": name, "dates": f"{start} – {end}"})
    return heads


def unfinished_lines(views: Sequence[MethodView]) -> list[str]:
    """Return what is missing from the figures, one line per method."""
    lines = []
    for view in views:
        names = stage_names(view.summary)
        if view.summary.missing_rows:
            missing = ", ".join(names.get(k, str(k)) for k in view.summary.missing_rows)
            lines.append(f"{view.label}: no checkpoint measured after {missing}; its figures cover the others.")
        lines += [f"{view.label}: seed {seed} is left out, it {why}." for seed, why in view.summary.left_out.items()]
    return lines


def columns_of(names: Iterable[str], track: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return title, description and direction of scores, for the heads of tables."""
    return [
        {
            "name": name,
            "title": score_title(name, track),
            "description": METRICS[name].description,
            "direction": METRICS[name].direction,
        }
        for name in names
    ]
