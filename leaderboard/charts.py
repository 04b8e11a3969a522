"""Charts as SVG, made here so that a page needs no script and no library.

Every chart has a ``<title>`` and a ``<desc>``, tells series apart by marker shape as well as colour, and
gives every mark a native tooltip. Colours of text, axes and grid come from the page's style sheet
(classes), so a chart follows the reader's colour scheme. All text is escaped by ``element``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from clbench.leaderboard.colour import OKABE_ITO

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "nabla", "plus", "hexagon")
FONT_WIDTH = 6.6
"""Mean width of a letter of the charts' 12-unit font, for room left to labels; units of the view box."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One mark: a place, intervals where known (ends, not half-widths), and the text of its tooltip."""

    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    note: str = ""
    strong: bool = False
    """Drawn larger, for the one point of a series that matters."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one name; ``index`` chooses colour and shape, the same on every chart of a page."""

    name: str
    points: Sequence[Point]
    index: int
    href: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One part of every bar of a stacked chart; ``index`` chooses its colour."""

    name: str
    values: Sequence[float]
    index: int


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A label, and the ticks where they are not to be chosen here."""

    label: str
    ticks: Sequence[tuple[float, str]] = ()
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a chart draws: maps data onto the view box."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: float = 680
    height: float = 380
    left: float = 62
    right: float = 20
    top: float = 18
    bottom: float = 50

    def x(self, value: float) -> float:
        """Return the horizontal place of a value."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Return the vertical place of a value; large values are at the top."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def element(tag: str, *children: str | Markup, **attributes: object) -> Markup:
    """Return one SVG element, everything escaped; ``class_`` and ``a_b`` become ``class`` and ``a-b``."""
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            parts.append(f' {name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    inner = Markup("").join(escape(child) for child in children)
    return Markup("".join(parts) + ">") + inner + Markup(f"</{tag}>")


def nice_ticks(low: float, high: float, n_wanted: int = 6) -> list[float]:
    """Return round numbers (steps of 1, 2, 2.5 or 5 times a power of ten) inside ``[low, high]``."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    raw = (high - low) / max(n_wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Return a tick's label with as many decimals as the distance between ticks needs."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(value) or 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if len(ticks) > 1 and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    text = f"{value:.{decimals}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def bounds_of(values: Sequence[float], *, zero: bool = False, margin: float = 0.07) -> tuple[float, float]:
    """Return finite bounds around the values with some margin; ``zero`` includes zero."""
    finite = [v for v in values if math.isfinite(v)] + ([0.0] if zero else [])
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = (high - low) * margin or max(abs(high) * margin, 0.01)
    return low - room, high + room


def colour_of(index: int) -> str:
    """Return the colour of a series."""
    return OKABE_ITO[index % len(OKABE_ITO)]


def shape_of(index: int) -> str:
    """Return the marker shape of a series; it shifts by one where the colours repeat."""
    return SHAPES[(index + index // len(OKABE_ITO)) % len(SHAPES)]


def polygon(x: float, y: float, radius: float, n_corners: int, turn: float) -> str:
    """Return the points of a regular polygon, first corner at ``turn`` of a full turn from the top."""
    angles = [2 * math.pi * (turn + i / n_corners) for i in range(n_corners)]
    return " ".join(f"{x + radius * math.sin(a):.2f},{y - radius * math.cos(a):.2f}" for a in angles)


def marker(x: float, y: float, index: int, *, radius: float = 4.5, note: str = "") -> Markup:
    """Return one marker with its tooltip."""
    shape, colour = shape_of(index), colour_of(index)
    style = {"fill": colour, "class_": "mark"}
    tooltip = [element("title", note)] if note else []
    if shape == "circle":
        return element("circle", *tooltip, cx=x, cy=y, r=radius, **style)
    corners = {
        "square": (4, 0.125),
        "triangle": (3, 0.0),
        "diamond": (4, 0.0),
        "nabla": (3, 0.5),
        "hexagon": (6, 0.0),
    }
    if shape in corners:
        n_corners, turn = corners[shape]
        return element("polygon", *tooltip, points=polygon(x, y, radius * 1.22, n_corners, turn), **style)
    arm, thick = radius * 1.2, radius * 0.42
    outline = [
        (-thick, -arm), (thick, -arm), (thick, -thick), (arm, -thick), (arm, thick), (thick, thick),
        (thick, arm), (-thick, arm), (-thick, thick), (-arm, thick), (-arm, -thick), (-thick, -thick),
    ]  # fmt: skip
    turn45 = math.sqrt(0.5) if shape == "cross" else 0.0
    turned = [(a * turn45 - b * turn45, a * turn45 + b * turn45) if turn45 else (a, b) for a, b in outline]
    return element("polygon", *tooltip, points=" ".join(f"{x + a:.2f},{y + b:.2f}" for a, b in turned), **style)


def axes(frame: Frame, x_axis: Axis, y_axis: Axis) -> Markup:
    """Return grid, tick labels and axis labels."""
    x_values = nice_ticks(frame.x_low, frame.x_high)
    y_values = nice_ticks(frame.y_low, frame.y_high)
    x_ticks = list(x_axis.ticks) or [(v, tick_text(v, x_values)) for v in x_values]
    y_ticks = list(y_axis.ticks) or [(v, tick_text(v, y_values)) for v in y_values]
    floor, parts = frame.height - frame.bottom, []
    for value, text in x_ticks:
        x = frame.x(value)
        parts.append(element("line", x1=x, x2=x, y1=frame.top, y2=floor, class_="grid"))
        parts.append(element("text", text, x=x, y=floor + 17, text_anchor="middle"))
    for value, text in y_ticks:
        y = frame.y(value)
        parts.append(element("line", x1=frame.left, x2=frame.width - frame.right, y1=y, y2=y, class_="grid"))
        parts.append(element("text", text, x=frame.left - 7, y=y + 4, text_anchor="end"))
    middle_x = (frame.left + frame.width - frame.right) / 2
    middle_y = (frame.top + floor) / 2
    parts.append(element("text", x_axis.label, x=middle_x, y=frame.height - 8, text_anchor="middle", class_="label"))
    parts.append(
        element(
            "text", y_axis.label, x=14, y=middle_y, text_anchor="middle", class_="label",
            transform=f"rotate(-90 14 {middle_y:.1f})",
        )
    )  # fmt: skip
    return Markup("").join(parts)


def figure(name: str, title: str, description: str, frame: Frame, *body: Markup, role: str = "img") -> Markup:
    """Return the ``<svg>``; ``name`` makes the ids of its title and description unique on the page.

    ``role`` is ``group`` for charts with links inside: an image hides what it holds from screen readers.
    """
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *body,
        role=role,
        aria_labelledby=f"{name}-title {name}-desc",
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        class_="chart",
    )


def interval_lines(frame: Frame, point: Point, index: int) -> Markup:
    """Return the interval bars of a point."""
    x, y, colour, parts = frame.x(point.x), frame.y(point.y), colour_of(index), []
    if point.x_interval:
        a, b = (frame.x(v) for v in point.x_interval)
        d = f"M{a:.2f} {y:.2f}H{b:.2f}M{a:.2f} {y - 4:.2f}v8M{b:.2f} {y - 4:.2f}v8"
        parts.append(element("path", d=d, stroke=colour, class_="interval"))
    if point.y_interval:
        a, b = (frame.y(v) for v in point.y_interval)
        d = f"M{x:.2f} {a:.2f}V{b:.2f}M{x - 4:.2f} {a:.2f}h8M{x - 4:.2f} {b:.2f}h8"
        parts.append(element("path", d=d, stroke=colour, class_="interval"))
    return Markup("").join(parts)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels at least ``gap`` apart, staying inside ``[low, high]`` where they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, here in itertools.pairwise(order):
        moved[here] = max(moved[here], moved[before] + gap)
    if order and moved[order[-1]] > high:
        moved[order[-1]] = high
        for here, before in zip(reversed(order[:-1]), reversed(order[1:]), strict=False):
            moved[here] = min(moved[here], moved[before] - gap)
    return [max(low, m) for m in moved] if len(places) * gap <= high - low else moved


def all_values(series: Sequence[Series], axis: Literal["x", "y"]) -> list[float]:
    """Return every coordinate and interval end on one axis."""
    values: list[float] = []
    for one in series:
        for point in one.points:
            values.append(getattr(point, axis))
            values.extend(getattr(point, f"{axis}_interval") or ())
    return values


def scatter(
    name: str,
    title: str,
    description: str,
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    corner: str = "",
) -> Markup:
    """Return a scatter plot with interval bars and a label beside every mark.

    ``corner`` is written into the lower left, where small values of both axes meet.
    """
    drawn = [s for s in series if s.points]
    x_low, x_high = x_axis.bounds or bounds_of(all_values(drawn, "x"), margin=0.12)
    y_low, y_high = y_axis.bounds or bounds_of(all_values(drawn, "y"), margin=0.12)
    frame = Frame(x_low=x_low, x_high=x_high, y_low=y_low, y_high=y_high, height=400)
    parts = [axes(frame, x_axis, y_axis)]
    if corner:
        place = {"x": frame.left + 8, "y": frame.height - frame.bottom - 8}
        parts.append(element("text", corner, **place, class_="corner"))
    marks = [(one, point) for one in drawn for point in one.points]
    parts.extend(interval_lines(frame, point, one.index) for one, point in marks)
    labels = spread([frame.y(p.y) - 8 for _, p in marks], 14, frame.top + 10, frame.height - frame.bottom - 4)
    for (one, point), label_y in zip(marks, labels, strict=True):
        x, y = frame.x(point.x), frame.y(point.y)
        mark = marker(x, y, one.index, radius=6.5, note=point.note or one.name)
        text = shorten(one.name, 34)
        left = x + 12 + len(text) * FONT_WIDTH > frame.width - frame.right
        label = element("text", text, x=x - 11 if left else x + 11, y=label_y,
                        text_anchor="end" if left else "start", class_="name")  # fmt: skip
        both = mark + label
        parts.append(element("a", both, href=one.href) if one.href else both)
    role = "group" if any(one.href for one in drawn) else "img"
    return figure(name, title, description, frame, *parts, role=role)


def lines(
    name: str, title: str, description: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis, *,
    boundaries: Sequence[tuple[float, str]] = (), markers: bool = True, labels: bool = True,
    width: float = 680, height: float = 380,
) -> Markup:  # fmt: skip
    """Return a line chart, labelled at the right; ``boundaries`` are dashed verticals with a text."""
    drawn = [s for s in series if s.points]
    x_low, x_high = x_axis.bounds or bounds_of(all_values(drawn, "x"), margin=0.02)
    y_low, y_high = y_axis.bounds or bounds_of(all_values(drawn, "y"))
    room = max((len(shorten(s.name, 22)) for s in drawn), default=0) * FONT_WIDTH + 24 if labels else 20
    limits = {"x_low": x_low, "x_high": x_high, "y_low": y_low, "y_high": y_high}
    frame = Frame(**limits, right=room, width=width, height=height, top=32 if boundaries else 18)
    parts = [axes(frame, x_axis, y_axis)]
    for value, text in boundaries:
        x = frame.x(value)
        parts.append(element("line", x1=x, x2=x, y1=frame.top, y2=frame.height - frame.bottom, class_="boundary"))
        parts.append(element("text", text, x=x + 4, y=frame.top - 6, class_="small"))
    for one in drawn:
        path = "M" + "L".join(f"{frame.x(p.x):.2f} {frame.y(p.y):.2f}" for p in one.points)
        parts.append(element("path", d=path, stroke=colour_of(one.index), class_="line"))
    for one in drawn:
        for point in one.points:
            parts.append(interval_lines(frame, point, one.index))
            if markers:
                radius = 7.0 if point.strong else 4.2
                parts.append(
                    marker(
                        frame.x(point.x),
                        frame.y(point.y),
                        one.index,
                        radius=radius,
                        note=point.note or one.name,
                    )
                )
    if labels:
        parts.append(end_labels(frame, drawn))
    return figure(name, title, description, frame, *parts)


def stacked_bars(
    name: str,
    title: str,
    description: str,
    columns: Sequence[str],
    layers: Sequence[Layer],
    y_axis: Axis,
    *,
    x_label: str = "Stage",
    write: Callable[[float], str] = str,
) -> Markup:
    """Return one bar a column, its layers from the bottom up, named at the right in the order of the bars.

    Args:
        name: unique on the page.
        title: for screen readers, like the description.
        description: what the chart says.
        columns: names under the bars.
        layers: their values have one element a column; zero draws nothing. One layer alone is not named.
        y_axis: its bounds are chosen here unless given.
        x_label: what the columns are.
        write: how a value reads in a tooltip.
    """
    totals = [sum(layer.values[i] for layer in layers) for i in range(len(columns))]
    high = max(totals, default=0.0) * 1.05 or 1.0
    named = layers if len(layers) > 1 else []
    room = max((len(shorten(layer.name, 22)) for layer in named), default=-3) * FONT_WIDTH + 40
    y_low, y_high = y_axis.bounds or (0.0, high)
    frame = Frame(x_low=-0.5, x_high=len(columns) - 0.5, y_low=y_low, y_high=y_high, right=room)
    fits = (frame.width - frame.left - frame.right) / (max(map(len, columns), default=1) * FONT_WIDTH + 8)
    step = max(1, math.ceil(len(columns) / max(1.0, fits)))
    ticks = [(float(i), text) for i, text in enumerate(columns) if i % step == 0]
    parts = [axes(frame, Axis(label=x_label, ticks=ticks), y_axis)]
    width = min(0.78 * (frame.x(1) - frame.x(0)), 72.0)
    for i, column in enumerate(columns):
        base = 0.0
        for layer in layers:
            value = layer.values[i]
            if value <= 0:
                continue
            note = f"{column}, {layer.name}: {write(value)}"
            top = frame.y(base + value)
            place = {"x": frame.x(i) - width / 2, "y": top, "width": width, "height": frame.y(base) - top}
            parts.append(element("rect", element("title", note), **place, fill=colour_of(layer.index), class_="mark"))
            base += value
    x = frame.width - frame.right + 14
    for row, layer in enumerate(reversed(named)):
        y = frame.top + 18.0 * row
        parts.append(element("rect", x=x, y=y, width=12.0, height=12.0, fill=colour_of(layer.index), class_="mark"))
        parts.append(element("text", shorten(layer.name, 22), x=x + 18, y=y + 10, class_="name"))
    return figure(name, title, description, frame, *parts)


def end_labels(frame: Frame, drawn: Sequence[Series]) -> Markup:
    """Return the names of the series at the end of their lines, moved apart and joined by leaders."""
    ends = [frame.y(s.points[-1].y) for s in drawn]
    places = spread(ends, 15, frame.top + 6, frame.height - frame.bottom - 2)
    x = frame.width - frame.right + 12
    parts = []
    for one, end, place in zip(drawn, ends, places, strict=True):
        start = frame.x(one.points[-1].x)
        d = f"M{start + 6:.2f} {end:.2f}L{x - 3:.2f} {place:.2f}"
        parts.append(element("path", d=d, stroke=colour_of(one.index), class_="leader"))
        parts.append(element("text", shorten(one.name, 22), x=x, y=place + 4, class_="name"))
    return Markup("").join(parts)


def shorten(text: str, n_letters: int) -> str:
    """Return the text, cut with an ellipsis where it is longer than ``n_letters``."""
    return text if len(text) <= n_letters else text[: n_letters - 1] + "…"


def legend_marker(index: int) -> Markup:
    """Return the marker of a series as a small picture for tables and legends, hidden from screen readers."""
    body = marker(8.0, 8.0, index, radius=5.0)
    return element("svg", body, viewBox="0 0 16 16", width=14, height=14, aria_hidden="true", class_="key")


def thin(values: Sequence[tuple[float, float]], n_points: int = 240) -> list[tuple[float, float]]:
    """Return at most ``n_points`` means of neighbouring (x, y) pairs: a short line from a long log."""
    size = max(1, math.ceil(len(values) / n_points))
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
