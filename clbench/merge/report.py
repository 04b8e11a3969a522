"""The report of ``clbench merge``: one HTML file with the front, the layer map, all points and controls, and the bill.

No script and no network request. Charts and style are those of the leaderboard's pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clbench import __version__, registry

if TYPE_CHECKING:
    from clbench.merge.job import Result

N_HEAT = 25
"""Colours of a ramp in the style sheet."""


def page(result: Result) -> str:
    """Return the report."""
    from markupsafe import Markup

    look = registry.tool("page")
    facts = result.as_dict()
    style = look.style()
    policy = (
        f"default-src 'none'; style-src {look.policy_hash(style)}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    parts = [
        _head(facts),
        *([_front(result, facts), _points(facts)] if facts["points"] else []),
        _controls(facts),
        _layers(facts),
        _bill(facts),
        _method(facts),
    ]
    return str(
        Markup(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="generator" content="clbench {version}"><title>Merge of {tuned} towards {base}</title>'
            '<link rel="icon" href="data:,"><style>{style}</style></head><body>'
            '<header class="bar"><div class="wrap"><span class="brand">cl<i>bench</i></span></div></header>'
            '<main class="wrap">{body}</main><footer><div class="wrap">Made by clbench {version}. '
            "This page is one file without network requests.</div></footer></body></html>\n"
        ).format(
            policy=policy,
            version=__version__,
            style=Markup(style),
            body=Markup("\n").join(part for part in parts if part),
            **facts["models"],
        )
    )


def _head(facts: Mapping[str, Any]) -> Any:
    from markupsafe import Markup

    items = [f"method {facts['method']}"]
    items += [f"keep {100 * facts['keep']:g} % of the base's general score"] if facts["keep"] is not None else []
    items += [f"with {', '.join(facts['experts'])}"] if facts["experts"] else []
    items += [f"suite {', '.join(facts['suites'])}"] if facts["suites"] else []
    items += [f"{name} does not count: {why}" for name, why in facts["left_out"].items()]
    items += ["embeddings, last norm and output layer restored, too"] if facts["restores_outside_blocks"] else []
    for side, text in facts["texts"].items():
        items.append(
            f"{side}: {text['name']}, {text['documents']:,} of {text['of']:,} documents, {text['tokens']:,} tokens"
        )
    listed = Markup("").join(Markup("<li>{}</li>").format(item) for item in items)
    return Markup(
        '<h1>{} towards {}</h1><div class="verdict"><p><strong>{}.</strong></p></div><ul class="facts">{}</ul>'
    ).format(facts["models"]["tuned"], facts["models"]["base"], facts["why"], listed)


def _front(result: Result, facts: Mapping[str, Any]) -> Any:
    """Return the plot of domain gain over general retention."""
    from markupsafe import Markup

    charts = registry.tool("charts")
    groups: dict[str, tuple[int, list[Any]]] = {}
    for point in facts["points"]:
        general, domain = point["standing"]["general"], point["standing"]["domain"]
        if domain["value"] is None:
            continue
        name, index = _series(point)
        strong = name in ("chosen",)
        mark = charts.Point(
            x=100 * general["value"],
            y=100 * domain["value"],
            x_interval=_ends(general) if strong else None,
            y_interval=_ends(domain) if strong else None,
            note=f"{point['label']}: retention {100 * general['value']:.1f} %, gain kept {100 * domain['value']:.1f} %",
            strong=strong,
        )
        groups.setdefault(name, (index, []))[1].append(mark)
    if not groups:
        return Markup("<h2>The front</h2><p>{}.</p>").format(facts["domain_gain"]["reason"])
    # One label a group: names beside every mark would cover the marks.
    series = [
        charts.Series(name=name, points=groups[name][1], index=groups[name][0])
        for name in ("base and tuned", "beaten", "on the front", "controls", "chosen")  # what is drawn last lies on top
        if name in groups
    ]
    drawn = _scatter(charts, series, 100 * (facts["keep"] or math.nan))
    caption = "Upper right is best. Bars: 95 % over documents, of the chosen point. Every mark says what it is."
    return Markup("<h2>The front</h2><figure>{}{}<figcaption>{}</figcaption></figure>").format(
        drawn, _legend(charts, series), caption
    )


def _series(point: Mapping[str, Any]) -> tuple[str, int]:
    """Return the group of a point in the plot, and its colour."""
    if point["chosen"]:
        return "chosen", 1
    if point["role"] == "control":
        return "controls", 3
    if point["role"] == "end":
        return "base and tuned", 6
    return ("on the front", 2) if point["front"] else ("beaten", 0)


def _ends(interval: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = interval["low"], interval["high"]
    return None if low is None or high is None else (100 * low, 100 * high)


def _scatter(charts: Any, series: Sequence[Any], keep: float) -> Any:
    """Return the scatter plot with the wanted retention as a line."""
    xs = [*charts.all_values(series, "x"), *([keep] if math.isfinite(keep) else [])]
    x_low, x_high = charts.bounds_of(xs, margin=0.1)
    y_low, y_high = charts.bounds_of(charts.all_values(series, "y"), margin=0.1)
    frame = charts.Frame(x_low=x_low, x_high=x_high, y_low=y_low, y_high=y_high, height=420)
    axes = charts.axes(frame, charts.Axis(label="general retention, %"), charts.Axis(label="domain gain kept, %"))
    parts = [axes]
    if math.isfinite(keep):
        path = f"M{frame.x(keep):.2f} {frame.top}V{frame.height - frame.bottom}"
        parts.append(charts.element("path", d=path, class_="boundary", stroke="currentColor", stroke_dasharray="4 4"))
        parts.append(charts.element("text", "wanted", x=frame.x(keep) + 4, y=frame.top + 12, class_="corner"))
    for one in series:
        for point in one.points:
            parts.append(charts.interval_lines(frame, point, one.index))
            radius = 8 if point.strong else 5.5
            parts.append(charts.marker(frame.x(point.x), frame.y(point.y), one.index, radius=radius, note=point.note))
    title = "Domain gain kept over general retention"
    return charts.figure("front", title, "One mark a merge; upper right is best.", frame, *parts)


def _legend(charts: Any, series: Sequence[Any]) -> Any:
    from markupsafe import Markup

    entries = (
        Markup("<li>{} {} ({})</li>").format(charts.legend_marker(s.index), s.name, len(s.points)) for s in series
    )
    return Markup('<ul class="facts">{}</ul>').format(Markup("").join(entries))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", *, strong: Sequence[int] = ()) -> Any:
    """Return a table; the first column is text, ``strong`` are the rows in bold."""
    from markupsafe import Markup

    cells = [
        Markup('<th scope="col"{}>{}</th>').format(Markup(' class="t"') if i == 0 else "", h)
        for i, h in enumerate(head)
    ]
    lines = []
    for number, row in enumerate(rows):
        first, *others = (Markup("<strong>{}</strong>").format(c) if number in strong else c for c in row)
        rest = Markup("").join(c if _is_cell(c) else Markup("<td>{}</td>").format(c) for c in others)
        lines.append(Markup('<tr><th scope="row" class="t">{}</th>{}</tr>').format(first, rest))
    body = Markup('<div class="scroll"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>')
    told = Markup("<caption>{}</caption>").format(caption) if caption else ""
    return body.format(told, Markup("").join(cells), Markup("").join(lines))


def _is_cell(cell: Any) -> bool:
    from markupsafe import Markup

    return isinstance(cell, Markup) and cell.startswith("<td")


HEAD = ("", "general retention", "domain gain kept", "forgetting undone", "general, bits/byte (nats/token)",
        "domain, bits/byte (nats/token)", "reaches keep", "GFLOP", "less than retraining")  # fmt: skip


def _head_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of points; accuracies of suites come last."""
    return (*HEAD, *_sets(facts["points"][0]))


def _sets(point: Mapping[str, Any]) -> list[str]:
    return [name for name in point["standing"]["scores"] if name not in ("general", "domain")]


def _row(point: Mapping[str, Any]) -> list[str]:
    standing = point["standing"]
    scores = standing["scores"]
    reduction = point["cost_reduction"]["flops"]
    return [
        point["label"],
        interval(standing["general"]),
        interval(standing["domain"]),
        percent(standing["recovered"]),
        *(_score(scores.get(side)) for side in ("general", "domain")),
        percent(standing["keeps"]),
        f"{point['cost']['flops'] / 1e9:,.1f}",
        percent(reduction),
        *(_score(scores[name]) for name in _sets(point)),
    ]


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    if "score" in score:
        return percent(score["score"])
    bits, nats = score["bits_per_byte"], score["nats_per_token"]
    return "–" if bits is None else f"{bits:.3f} ({nats:.3f})"


def percent(value: float | None) -> str:
    """Return a share in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(one: Mapping[str, Any]) -> str:
    """Return a share with its interval."""
    if one["value"] is None:
        return "–"
    bounds = (
        "" if one["low"] is None or one["high"] is None else f" ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
    )
    return f"{100 * one['value']:.1f} %{bounds}"


def _points(facts: Mapping[str, Any]) -> Any:
    from markupsafe import Markup

    points = [point for point in facts["points"] if point["role"] != "control"]
    points.sort(key=lambda point: -point["standing"]["general"]["value"])
    rows = []
    for point in points:
        mark = "chosen: " if point["chosen"] else "front: " if point["front"] else ""
        rows.append([mark + point["label"], *_row(point)[1:]])
    note = "In brackets: 95 % over documents, evaluation noise of these weights; another training run varies more."
    strong = [i for i, point in enumerate(points) if point["chosen"]]
    return Markup("<h2>Points</h2>{}").format(table(_head_of(facts), rows, note, strong=strong))


def _controls(facts: Mapping[str, Any]) -> Any:
    from markupsafe import Markup

    found = [point for point in facts["points"] if point["role"] == "control"]
    if not found:
        return ""
    chosen = [point for point in facts["points"] if point["chosen"]]
    note = "At the chosen share and strength. Scores that do not beat random units, and uniform, prove nothing."
    return Markup("<h2>Controls</h2>{}").format(
        table(_head_of(facts), [_row(p) for p in [*chosen, *found]], note, strong=[0])
    )


def _layers(facts: Mapping[str, Any]) -> Any:
    """Return the map of units: score, strength, and what restoring each alone does."""
    from markupsafe import Markup

    layers = facts["layers"]
    if not layers:
        return ""
    columns = [name for name in ("score", "strength", "general_gain", "domain_cost") if layers[0][name] is not None]
    words = {
        "score": "score",
        "strength": "restored by",
        "general_gain": "alone: general loss falls, nats",
        "domain_cost": "alone: domain loss rises, nats",
    }
    rows = []
    for layer in layers:
        cells = [_heat(layer[name], [one[name] for one in layers]) for name in columns]
        rows.append([layer["unit"], str(layer["place"]), f"{layer['n_parameters']:,}", *cells])
    note = "Units in the order of the model; darker is more."
    found = [
        Markup("<h2>Layer map</h2>{}").format(
            table(["", "place", "parameters", *(words[c] for c in columns)], rows, note)
        )
    ]
    if facts["agreement"]:
        lines = [
            [by, "–" if one["rho"] is None else f"{one['rho']:+.2f}", one["reason"] or ""]
            for by, one in facts["agreement"].items()
        ]
        title = "Do the scores foretell it? Spearman's rho with general gain per domain cost, unit by unit"
        found.append(Markup("<h3>{}</h3>{}").format(title, table(["score", "rho", ""], lines)))
    return Markup("").join(found)


def _heat(value: float, column: Sequence[float]) -> Any:
    from markupsafe import Markup

    low, high = min(column), max(column)
    level = round((value - low) / (high - low) * (N_HEAT - 1)) if high > low else 0
    return Markup('<td class="s{}">{}</td>').format(level, f"{value:.3f}")


def _bill(facts: Mapping[str, Any]) -> Any:
    from markupsafe import Markup

    bill = facts["bill"]
    rows = [["scores", "–", "–", _gflop(bill["scores"]["flops"]), f"{bill['scores']['seconds']:.1f}"]]
    if learning := bill.get("learning"):
        cost = [_gflop(learning["flops"]), f"{learning['seconds']:.1f}"]
        rows.append(["learning shares", "–", f"{learning['tokens']:,}", *cost])
    for name in ("search", "controls", "impact"):
        if (one := bill.get(name)) and one["evaluations"]:
            flops, seconds = (math.fsum(one[unit].values()) for unit in ("flops", "seconds"))
            rows.append([name, str(one["evaluations"]), f"{one['tokens']:,}", _gflop(flops), f"{seconds:.1f}"])
    parts = [Markup("<h2>Bill</h2>{}").format(table(["", "evaluations", "tokens", "GFLOP", "seconds"], rows))]
    if retraining := bill.get("retraining"):
        less = {unit: percent(bill[f"cost_reduction_{unit}"]) for unit in ("flops", "seconds")}
        told = (
            f"Training the tuned model cost {_gflop(retraining['flops'])} GFLOP and {retraining['seconds']:,.0f} "
            f"seconds for {retraining['n_tokens']:,} tokens. Retraining for each of the {bill['n_points']} points "
            f"would cost that every time; scores and search cost {less['flops']} less in FLOPs, "
            f"{less['seconds']} in seconds."
        )
        parts.append(Markup("<p>{}</p>").format(told))
    return Markup("").join(parts)


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:,.1f}"


def _method(facts: Mapping[str, Any]) -> Any:
    from markupsafe import Markup

    told = (
        "General retention: loss of the base over loss of the merge, on the same documents, by token or by byte; it is "
        "not cut off at 100 %. Domain gain kept: (base − merge) / (base − tuned) of the domain losses, undefined where "
        "training gained less than two standard errors. Forgetting undone: (tuned − merge) / (tuned − base) of the "
        "general losses. An accuracy's retention is the share of what was above chance; where the base is not surely "
        "above it, the set does not count. The mean is over all that count. The choice was made on these same "
        "documents, so expect a little less elsewhere."
    )
    return Markup('<h2>What the figures mean</h2><p class="note">{}</p>').format(told)
