"""Tables for people about one built stream: what ``clbench stream show`` prints. ``clbench.portrait`` measures it."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from clbench.portrait import Matrix, Portrait, Sample

DASH = "–"
SAMPLE_LINES = 12
UNCUT = 240
"""Columns where nobody sees them: in a file or a pipe."""


def show_stream(portrait: Portrait, *, samples: int) -> None:
    """Print a stream: stages, repeats, leakage, drift, words and some documents."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=UNCUT)
    names = [stage.name for stage in portrait.stages]
    drift, leakage = portrait.drift, portrait.leakage
    console.print(
        Text(f"{portrait.name} · {len(names)} stages · vocabulary {portrait.vocab_size:,} · {portrait.sha256[:12]}"),
        style="bold",
    )
    parts: list[Table | _Matrix] = [
        _stages(portrait),
        _changes(portrait),
        _repeats(portrait),
        _leakage(portrait),
        _Matrix(
            f"Overlap: held-out (rows) in train (columns), % of words in a shared run of {leakage.ngram_words}",
            leakage.covered, names, lambda v: f"{100 * v:.1f}",
        ),
        _Matrix(
            f"Jensen-Shannon divergence of train tokens, bits; diagonal: two halves of one stage, "
            f"{drift.js_tokens['train']:,} tokens each",
            drift.js["train"], names, lambda v: f"{v:.3f}",
        ),
        _Matrix(
            f"n-gram model (order {portrait.parameters.order}, {drift.model_tokens:,} tokens): trained on (rows), "
            "bits per byte on held-out of (columns)",
            drift.bits_per_byte, names, lambda v: f"{v:.2f}",
        ),
        _Matrix(
            "Held-out words (columns) never seen in the train text sampled up to a stage (rows), %",
            drift.unseen_words, names, lambda v: f"{100 * v:.1f}",
        ),
        _words(portrait),
    ]  # fmt: skip
    for part in parts:
        console.print()
        console.print(part)
    for stage in portrait.stages:
        for sample in stage.samples[:samples]:
            console.print()
            console.print(_sample(stage.name, sample), soft_wrap=True)


def _table(title: str | None, columns: Sequence[str]) -> Table:
    """Return an empty table: the first column to the left, figures to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def _cell(text: str) -> Text:
    """Return text that came from outside as it is: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _short(n: float) -> str:
    """Return three digits with a prefix, to fit eighty columns: 612 k, 2.07 M."""
    units = ["", " k", " M", " G", " T"]
    while n >= 999.5 and len(units) > 1:
        n /= 1000
        del units[0]
    return f"{n:.3g}{units[0]}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f} %"


def _stages(portrait: Portrait) -> Table:
    columns = ("stage", "dates", "train docs", "tokens", "bytes", "tok/byte", "median", "p95")
    table = _table("Stages", columns)
    for stage in portrait.stages:
        train = stage.train
        table.add_row(
            _cell(stage.name),
            f"{stage.start[:7]} … {stage.end[:7]}",
            f"{train.n_documents:,}",
            *map(_short, (train.n_tokens, train.n_bytes)),
            f"{train.n_tokens / max(1, train.n_bytes):.3f}",
            *(f"{train.lengths.get(key, 0):,.0f}" for key in ("p50", "p95")),
        )
    table.caption = "median and p95: tokens a train document"
    table.caption_justify = "left"
    return table


def _changes(portrait: Portrait) -> Table:
    kinds = ("new", "changed", "unchanged")
    heads = ("stage", *kinds, "largest group", "groups", "held-out", "tokens")
    table = _table("Change kinds (shares of train tokens), groups, held-out", heads)
    for stage in portrait.stages:
        train, heldout = stage.train, stage.heldout
        shares = [train.changes[kind]["tokens"] / max(1, train.n_tokens) for kind in kinds]
        largest = max(portrait.groups, key=lambda name: train.groups[name]["tokens"], default="")
        table.add_row(
            _cell(stage.name),
            *map(_percent, shares),
            _cell(largest[:24]),
            f"{train.n_groups:,}",
            f"{heldout.n_documents:,}",
            _short(heldout.n_tokens),
        )
    return table


def _repeats(portrait: Portrait) -> Table:
    table = _table("Train documents that repeat", ("stage", "looked at", "exactly", "nearly (≥)", "an earlier stage"))
    for stage in portrait.stages:
        found = stage.repeats
        counts = (found.n_documents, found.exact, found.near, found.from_earlier_stages)
        table.add_row(_cell(stage.name), *(f"{n:,}" for n in counts))
    return table


def _leakage(portrait: Portrait) -> Table:
    leakage = portrait.leakage
    kinds = ("same_id", "exact", "near", "touched", "half")
    heads = ("same id", "exact", "near", "run shared", "half covered", "words covered")
    table = _table("Held-out documents found in train of any stage", ("stage", "looked for", *heads))
    for i, stage in enumerate(portrait.stages):
        cells = []
        for kind in kinds:
            n = leakage.anywhere[kind][i]
            cells.append(Text(f"{n:,}", style="red" if n and kind in ("same_id", "exact", "near") else ""))
        covered = _percent(leakage.covered_anywhere[i])
        table.add_row(_cell(stage.name), f"{leakage.n_documents[i]:,}", *cells, covered)
    if leakage.scanned_share < 1:
        share = _percent(leakage.scanned_share)
        table.caption = f"{share} of the train documents were searched: all counts are lower bounds"
        table.caption_justify = "left"
    return table


@dataclass(frozen=True)
class _Matrix:
    """A matrix whose figures are coloured from low to high; cut into several tables where the terminal is narrow."""

    title: str
    values: Matrix
    names: Sequence[str]
    write: Callable[[float], str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first = max(map(len, self.names)) + 2
        n = max(1, (options.max_width - first) // max(7, first))
        for start in range(0, len(self.names), n):
            yield Text("" if start else self.title, style="bold")
            yield self._columns(slice(start, start + n))

    def _columns(self, shown: slice) -> Table:
        table = _table(None, ("", *(_cell(name).plain for name in self.names[shown])))
        finite = [v for row in self.values for v in row if v is not None] or [0.0]
        low, high = min(finite), max(finite)
        for name, row in zip(self.names, self.values, strict=True):
            cells = [Text(DASH) if v is None else Text(self.write(v), style=_heat(v, low, high)) for v in row[shown]]
            table.add_row(_cell(name), *cells)
        return table


def _heat(value: float, low: float, high: float) -> str:
    """Return a colour from green (low) to red (high) that reads on dark and light."""
    place = (value - low) / (high - low) if high > low else 0.0
    red, green, blue = colorsys.hsv_to_rgb((1 - place) * 0.38, 0.75, 0.72)
    return f"rgb({round(red * 255)},{round(green * 255)},{round(blue * 255)})"


def _words(portrait: Portrait) -> Table:
    table = Table(title="What each stage is about", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("stage", "typical", "rising", "falling"):
        table.add_column(column, overflow="fold")
    for stage in portrait.stages:
        table.add_row(
            _cell(stage.name), *(_cell(", ".join(w[:8]) or DASH) for w in (stage.typical, stage.rising, stage.falling))
        )
    return table


def _sample(stage: str, sample: Sample) -> Text:
    """Return the first lines of a document."""
    head = f"{stage} · {sample.id} · {sample.group} · {sample.date} · {sample.change} · {sample.n_tokens:,} tokens"
    lines = sample.text.splitlines()
    body = [_cell(f"    {line.expandtabs(4)}") for line in lines[:SAMPLE_LINES]]
    rest = [Text("    …", style="dim")] if sample.cut or len(lines) > SAMPLE_LINES else []
    title = _cell(head)
    title.stylize("bold")
    return Text("\n").join([title, *body, *rest])
