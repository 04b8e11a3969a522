"""The page about one built stream: sizes, changes, repeats, leakage, drift, words, sample documents. One HTML file.

What it shows was measured by ``clbench.portrait``; nothing is measured here. Document text and names of groups come
from outside and are escaped by the templates like everything else.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from clbench.files import write_text
from clbench.leaderboard import charts
from clbench.leaderboard.colour import level_of
from clbench.leaderboard.page import DASH, json_text, number, scaled, signed
from clbench.leaderboard.site import page
from clbench.leaderboard.view import Heat, HeatCell, HeatRow
from clbench.portrait import Facts, Portrait, StagePortrait
from clbench.portrait import Matrix as Values

MAX_LINES = 8
"""Stages in the chart of document lengths; more cannot be told apart."""
GROUP_COLOURS, REST_COLOUR = (0, 1, 2, 3, 4, 5, 7), 6
"""Colours of named groups; grey is for all others together."""
MAX_MONTHS = 48
"""With more months than this, documents are counted by year."""
WIDE = 8
"""With more stages than this, matrices stand one below the other."""
CHANGES = ("unchanged", "changed", "new")
"""From the bottom of a bar to its top."""


@dataclass(frozen=True)
class HeatMap:
    """One coloured table: title, how to read it, what stands down the side and along the top."""

    key: str
    title: str
    note: str
    rows: str
    columns: str
    table: Heat


def build_stream_page(portrait: Portrait, out: Path, *, samples: int | None = None) -> Path:
    """Write one self-contained page about a stream and return it.

    Args:
        portrait: what ``portrait_of`` measured.
        out: the file to write, or a folder that gets ``stream.html``.
        samples: documents shown a stage; None shows all that were kept.
    """
    path = out if out.suffix.lower() in (".html", ".htm") else out / "stream.html"
    write_text(path, stream_page(portrait, samples=samples))
    return path


def stream_page(portrait: Portrait, *, samples: int | None = None) -> str:
    """Return the page."""
    text = base64.b64encode(json_text(portrait.as_dict()).encode()).decode()
    return page(
        "stream.html.j2",
        home=None,
        portrait=portrait,
        facts=facts(portrait),
        sentences=sentences(portrait),
        rows=[stage_row(stage) for stage in portrait.stages],
        charts=[changes_chart(portrait), groups_chart(portrait), lengths_chart(portrait), dates_chart(portrait)],
        groups=group_map(portrait),
        wide=len(portrait.stages) > WIDE,
        drift=drift_maps(portrait),
        leaks=leak_rows(portrait),
        leak_map=leak_map(portrait),
        n_samples=samples,
        download=f"data:application/json;base64,{text}",
    )


def facts(portrait: Portrait) -> list[tuple[str, str]]:
    """Return the few facts under the title."""
    stages = portrait.stages
    train, heldout = [s.train for s in stages], [s.heldout for s in stages]
    return [
        ("stages", str(len(stages))),
        ("dates", f"{stages[0].start} to {stages[-1].end}"),
        ("train documents", f"{sum(f.n_documents for f in train):,}"),
        ("train tokens", scaled(float(sum(f.n_tokens for f in train)))),
        ("train text", scaled(float(sum(f.n_bytes for f in train)), "B")),
        ("held-out documents", f"{sum(f.n_documents for f in heldout):,}"),
        ("held-out tokens", scaled(float(sum(f.n_tokens for f in heldout)))),
        ("vocabulary", f"{portrait.vocab_size:,}"),
        ("sha256", portrait.sha256[:12]),
    ]


def sentences(portrait: Portrait) -> list[str]:
    """Return what a reader should know first, in plain sentences."""
    return [leak_sentence(portrait), overlap_sentence(portrait), repeat_sentence(portrait), *drift_sentences(portrait)]


def leak_sentence(portrait: Portrait) -> str:
    """Say whether a held-out document trains."""
    leakage = portrait.leakage
    n = sum(leakage.n_documents)
    ids, exact, near = (sum(leakage.anywhere[kind]) for kind in ("same_id", "exact", "near"))
    searched = (
        "all train text" if leakage.scanned_share == 1 else f"{percent(leakage.scanned_share)} of the train documents"
    )
    if not ids + exact + near:
        return f"None of {n:,} held-out documents was found again in {searched}: no identity, no copy, no near copy."
    return (
        f"Of {n:,} held-out documents, {ids:,} train under the same identity, {exact:,} are exact and {near:,} near "
        f"copies of train documents ({searched} searched)."
    )


def overlap_sentence(portrait: Portrait) -> str:
    """Say how much held-out text stands in train in shorter runs, which the builder leaves."""
    leakage = portrait.leakage
    words = sum(leakage.n_words)
    covered = sum((s or 0.0) * n for s, n in zip(leakage.covered_anywhere, leakage.n_words, strict=True))
    half, n = sum(leakage.anywhere["half"]), sum(leakage.n_documents)
    if not words:
        return "Too little held-out text to look for shorter overlaps."
    return (
        f"Shorter overlaps stay by design: {percent(covered / words)} of the held-out words stand in a run of "
        f"{leakage.ngram_words} words that train has too; {half:,} of {n:,} documents are covered by half or more."
    )


def repeat_sentence(portrait: Portrait) -> str:
    """Say how much train text recurs."""
    found = [stage.repeats for stage in portrait.stages]
    n = sum(r.n_documents for r in found) or 1
    later = sum(r.from_earlier_stages for r in found)
    within = sum(r.exact for r in found)
    return (
        f"{percent(later / n)} of the train documents repeat one of an earlier stage word by word, "
        f"{percent(within / n, 2)} one of their own stage."
    )


def drift_sentences(portrait: Portrait) -> list[str]:
    """Say how far the stages are apart; nothing for a stream of one stage."""
    js, model = portrait.drift.js["train"], portrait.drift.bits_per_byte
    names = [stage.name for stage in portrait.stages]
    found = [(v, i, j) for i, row in enumerate(js) for j, v in enumerate(row) if j > i and v is not None]
    floors = [v for i, row in enumerate(js) if (v := row[i]) is not None]
    if not found or not floors:
        return []
    far, i, j = max(found)
    near, a, b = min(found)
    text = (
        f"Token frequencies differ by {near:.3f} ({names[a]} and {names[b]}) to {far:.3f} bits "
        f"({names[i]} and {names[j]}); two halves of one stage by {min(floors):.3f} to {max(floors):.3f}."
    )
    extra = [v for row in extra_bits(model) for v in row if v is not None and v != 0.0]
    if not extra:
        return [text]
    return [
        text,
        f"An n-gram model of one stage pays {number(sum(extra) / len(extra), 2)} bits per byte more on another "
        f"stage's text, on average, than that stage's own model does.",
    ]


def stage_row(stage: StagePortrait) -> dict[str, Any]:
    """Return one row of the stage table: figures to sort by, and their text."""
    train, heldout, repeats = stage.train, stage.heldout, stage.repeats
    tokens = max(1, train.n_tokens)
    return {
        "stage": stage,
        "cells": [
            (train.n_documents, f"{train.n_documents:,}"),
            (train.n_tokens, scaled(float(train.n_tokens))),
            (train.n_bytes, scaled(float(train.n_bytes), "B")),
            (tokens / max(1, train.n_bytes), number(tokens / max(1, train.n_bytes))),
            (train.lengths.get("p50", 0), f"{train.lengths.get('p50', 0):,.0f}"),
            (train.lengths.get("mean", 0), f"{train.lengths.get('mean', 0):,.0f}"),
            (train.lengths.get("p95", 0), f"{train.lengths.get('p95', 0):,.0f}"),
            *((share(train, kind, "documents"), percent(share(train, kind, "documents"))) for kind in CHANGES[::-1]),
            (train.n_groups, f"{train.n_groups:,}"),
            (repeats.exact, f"{repeats.exact:,}"),
            (repeats.near, f"{repeats.near:,}"),
            (repeats.from_earlier_stages, f"{repeats.from_earlier_stages:,}"),
            (heldout.n_documents, f"{heldout.n_documents:,}"),
            (heldout.n_tokens, scaled(float(heldout.n_tokens))),
        ],
    }


def share(found: Facts, kind: str, unit: str) -> float:
    """Return the share of one change kind."""
    total = sum(counts[unit] for counts in found.changes.values())
    return found.changes[kind][unit] / total if total else 0.0


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as text."""
    return DASH if value is None else f"{100 * value:.{digits}f}\u00a0%"


# Charts


def changes_chart(portrait: Portrait) -> tuple[str, str, Markup]:
    """Return heading, caption and chart of train tokens by change kind."""
    layers = [
        charts.Layer(name=kind, values=[float(s.train.changes[kind]["tokens"]) for s in portrait.stages], index=i)
        for i, kind in enumerate(CHANGES)
    ]
    chart = charts.stacked_bars(
        "changes",
        "Train tokens by change kind",
        "One bar a stage; unchanged, changed and new tokens from the bottom up.",
        [stage.name for stage in portrait.stages],
        layers,
        tokens_axis(layers),
        write=scaled,
    )
    return (
        "Train tokens by change kind",
        "New, changed and unchanged against the version of the page seen before.",
        chart,
    )


def groups_chart(portrait: Portrait) -> tuple[str, str, Markup]:
    """Return heading, caption and chart of train tokens by group."""
    stages = portrait.stages
    layers = [
        charts.Layer(name=name, values=[float(s.train.groups[name]["tokens"]) for s in stages], index=index)
        for name, index in zip(portrait.groups, GROUP_COLOURS, strict=False)
    ]
    rest = [float(s.train.n_tokens) - sum(one.values[i] for one in layers) for i, s in enumerate(stages)]
    if max(rest) > 0:
        layers.append(charts.Layer(name="all others", values=rest, index=REST_COLOUR))
    chart = charts.stacked_bars(
        "groups",
        "Train tokens by group",
        "One bar a stage; the largest groups of the stages, then all others on top.",
        [stage.name for stage in stages],
        layers,
        tokens_axis(layers),
        write=scaled,
    )
    return "Train tokens by group", "The largest groups of the stages.", chart


def dates_chart(portrait: Portrait) -> tuple[str, str, Markup]:
    """Return heading, caption and chart of train documents by date."""
    months: Counter[str] = Counter()
    for stage in portrait.stages:
        months.update(stage.train.months)
    columns, by_year = periods(months)
    counts: Counter[str] = Counter()
    for month, n in months.items():
        counts[month[:4] if by_year else month] += n
    layer = charts.Layer(name="documents", values=[float(counts[one]) for one in columns], index=0)
    chart = charts.stacked_bars(
        "dates",
        "Train documents by date",
        f"One bar a {'year' if by_year else 'month'}.",
        columns,
        [layer],
        charts.Axis(label="Train documents"),
        x_label="Year" if by_year else "Month",
        write=lambda n: f"{n:,.0f}",
    )
    return "Train documents by date", "Dates of the documents themselves, whatever stage they stand in.", chart


def periods(months: Iterable[str]) -> tuple[list[str], bool]:
    """Return all months from the first to the last or, where they are many, all years, and whether they are years."""
    found = [(int(month[:4]), int(month[5:7])) for month in months] or [(1970, 1)]
    (year, month), (last_year, last_month) = min(found), max(found)
    if 12 * (last_year - year) + last_month - month >= MAX_MONTHS:
        return [f"{y:04d}" for y in range(year, last_year + 1)], True
    return [f"{m // 12:04d}-{m % 12 + 1:02d}" for m in range(12 * year + month - 1, 12 * last_year + last_month)], False


def tokens_axis(layers: Sequence[charts.Layer]) -> charts.Axis:
    """Return an axis of tokens from zero to above the highest bar."""
    high = max((sum(column) for column in zip(*(one.values for one in layers), strict=True)), default=0.0) or 1.0
    ticks = [(value, scaled(value)) for value in charts.nice_ticks(0.0, high * 1.05)]
    return charts.Axis(label="Train tokens", ticks=ticks, bounds=(0.0, high * 1.05))


def lengths_chart(portrait: Portrait) -> tuple[str, str, Markup]:
    """Return heading, caption and chart of document lengths, a line a stage."""
    stages = portrait.stages
    n = min(MAX_LINES, len(stages))
    chosen = sorted({round(k * (len(stages) - 1) / max(1, n - 1)) for k in range(n)})
    longest = max((len(stages[i].train.length_bins) for i in chosen), default=1)
    series = []
    for place, i in enumerate(chosen):
        bins, total = stages[i].train.length_bins, max(1, stages[i].train.n_documents)
        points = [
            charts.Point(x=k + 0.5, y=100 * m / total, note=f"{stages[i].name}, {octave(k)}: {percent(m / total)}")
            for k, m in enumerate([*bins, *[0] * (longest - len(bins))])
        ]
        series.append(charts.Series(name=stages[i].name, points=points, index=place))
    step = max(1, math.ceil(longest / 10))
    ticks = [(float(k), f"{2**k:,}") for k in range(0, longest + 1, step)]
    chart = charts.lines(
        "lengths",
        "Document lengths",
        "Share of train documents by length in tokens, each step twice as long as the one before; one line a stage.",
        series,
        charts.Axis(label="Tokens in a document", ticks=ticks, bounds=(0.0, float(longest))),
        charts.Axis(label="Share of documents, %"),
    )
    caption = "" if n == len(stages) else f"{len(chosen)} of {len(stages)} stages, evenly spaced."
    return "Document lengths", caption, chart


def octave(k: int) -> str:
    """Return which lengths a bin of the length distribution holds."""
    return f"{2**k:,} to {2 ** (k + 1) - 1:,} tokens"


# Matrices


def heat(
    values: Values,
    row_names: Sequence[str],
    column_names: Sequence[str],
    write: Callable[[float], str],
    *,
    why_none: str = "undefined",
    framed: bool = True,
) -> Heat:
    """Return a coloured table; colours span its values, and the diagonal is framed unless told otherwise."""
    finite = [v for row in values for v in row if v is not None] or [0.0]
    low, high = min(finite), max(finite)
    rows = []
    for i, (name, row) in enumerate(zip(row_names, values, strict=True)):
        cells = []
        for j, value in enumerate(row):
            if value is None:
                cells.append(HeatCell(None, "na-cell", why_none, framed and i == j))
            else:
                tip = f"{name}, {column_names[j]}: {value:.4f}"
                cells.append(HeatCell(write(value), f"s{level_of(value, low, high)}", tip, framed and i == j))
        rows.append(HeatRow(name, "", cells))
    return Heat(rows, write(low), write(high))


def extra_bits(matrix: Values) -> Values:
    """Return ``B[i][j] - B[j][j]``: what a model of another stage costs over the stage's own."""
    own = [row[i] for i, row in enumerate(matrix)]
    return [
        [None if v is None or (o := own[j]) is None else round(v - o, 6) for j, v in enumerate(row)] for row in matrix
    ]


def drift_maps(portrait: Portrait) -> list[HeatMap]:
    """Return the matrices of drift."""
    drift = portrait.drift
    names = [stage.name for stage in portrait.stages]
    sizes = {split: scaled(float(n)) for split, n in drift.js_tokens.items()}
    none = "too few documents or tokens"
    order = portrait.parameters.order

    def js_map(split: str, title: str) -> HeatMap:
        note = (
            "Jensen-Shannon divergence of token frequencies in bits, 0 (the same) to 1 (nothing in common), of samples "
            f"of {sizes[split]} tokens. Framed: two halves of one stage, the noise of a sample of this size."
        )
        table = heat(drift.js[split], names, names, number, why_none=none)
        return HeatMap(f"js-{split}", title, note, "Stage", "stage", table)

    bits_note = (
        f"Rows: an n-gram model (order {order}, {scaled(float(drift.model_tokens))} train tokens of one stage). "
        "Columns: the held-out text that it predicts. Framed: its own stage."
    )
    n_words = scaled(float(min(drift.word_documents, default=0)))

    def square(key: str, title: str, note: str, rows: str, values: Values, write: Callable[[float], str]) -> HeatMap:
        return HeatMap(key, title, note, rows, "held-out text of", heat(values, names, names, write, why_none=none))

    above = "The same, minus the mean noise of the two stages: about zero where they cannot be told apart."
    unseen_note = (
        "Share of the held-out words of a period that stand in no train text sampled up to a stage "
        f"(at least {n_words} train documents of each)."
    )
    return [
        js_map("train", "Token frequencies, train"),
        HeatMap("js-above", "Token frequencies, train, above the noise", above, "Stage", "stage",
                heat(drift.js_above_floor["train"], names, names, number, why_none=none)),
        js_map("heldout", "Token frequencies, held-out"),
        square("unseen", "Words not seen before, %", unseen_note, "Up to", percents(drift.unseen_words), percent_cell),
        square("bits", "n-gram model, bits per byte", bits_note, "Model of", drift.bits_per_byte,
               lambda v: number(v, 2)),
        square("extra", "n-gram model, extra bits per byte", "The same, minus the bits of the column's own model.",
               "Model of", extra_bits(drift.bits_per_byte), lambda v: signed(v, 2)),
    ]  # fmt: skip


def percent_cell(value: float) -> str:
    """Return a cell of a table in per cent."""
    return number(value, 1)


def percents(matrix: Values) -> Values:
    """Return shares in per cent."""
    return [[None if v is None else 100 * v for v in row] for row in matrix]


def group_map(portrait: Portrait) -> HeatMap:
    """Return the groups' shares of every stage."""
    stages = portrait.stages

    def shares(name: str) -> list[float | None]:
        counts = [s.train.groups[name]["tokens"] for s in stages]
        return [100 * n / s.train.n_tokens if n else None for n, s in zip(counts, stages, strict=True)]

    def middle(name: str) -> float:
        found = [v or 0.0 for v in shares(name)]
        return sum(i * v for i, v in enumerate(found)) / (sum(found) or 1.0)

    names = sorted(portrait.groups, key=middle)
    table = heat(
        [shares(name) for name in names],
        names,
        [s.name for s in stages],
        percent_cell,
        why_none="not in this stage",
        framed=False,
    )
    note = f"The {len(names)} largest groups of the stages, the early ones first."
    return HeatMap("groups", "Share of a stage's train tokens by group, %", note, "Group", "stage", table)


def leak_map(portrait: Portrait) -> HeatMap:
    """Return the matrix of overlaps of held-out stages with train stages."""
    names = [stage.name for stage in portrait.stages]
    n = portrait.leakage.ngram_words
    note = (
        f"Share of held-out words inside a run of {n} words that stands in the train text of a stage too, in per cent."
    )
    table = heat(percents(portrait.leakage.covered), names, names, percent_cell, why_none="no held-out words")
    return HeatMap("covered", "Overlap by stage, %", note, "Held-out of", "train text of", table)


def leak_rows(portrait: Portrait) -> list[dict[str, Any]]:
    """Return one row a held-out stage: how much of it stands in train of any stage."""
    leakage = portrait.leakage
    kinds = ("same_id", "exact", "near", "touched", "half")
    return [
        {
            "name": stage.name,
            "n": leakage.n_documents[i],
            "of": stage.heldout.n_documents,
            "cells": [leakage.anywhere[kind][i] for kind in kinds],
            "covered": percent(leakage.covered_anywhere[i]),
        }
        for i, stage in enumerate(portrait.stages)
    ]
