"""Colours, charts and number formats, against answers worked out elsewhere."""

from __future__ import annotations

import itertools
import json
import math
from xml.etree import ElementTree

import pytest

from clbench.leaderboard import charts, colour, page


def test_contrast_of_known_pairs() -> None:
    assert colour.contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert colour.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # WebAIM's example: just fails


@pytest.mark.parametrize("stops", [*colour.SEQUENTIAL.values(), *colour.DIVERGING.values()])
def test_text_is_readable_on_every_step_of_every_ramp(stops: tuple[str, ...]) -> None:
    steps = colour.ramp(stops)
    assert len(steps) == colour.N_LEVELS
    assert (steps[0], steps[-1]) == (stops[0], stops[-1])
    assert all(colour.contrast(step, colour.text_on(step)) >= 4.5 for step in steps)


def test_levels_span_the_ramp() -> None:
    assert colour.level_of(0.0, 0.0, 1.0) == 0
    assert colour.level_of(1.0, 0.0, 1.0) == colour.N_LEVELS - 1
    assert colour.level_of(0.0, -1.0, 1.0) == colour.N_LEVELS // 2
    assert colour.level_of(3.0, 3.0, 3.0) == colour.N_LEVELS // 2


def test_ticks_are_round_and_inside() -> None:
    assert charts.nice_ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.nice_ticks(2.38, 3.15, 6) == [2.4, 2.6, 2.8, 3.0]
    assert charts.tick_text(0.25, [0.0, 0.25, 0.5]) == "0.25"
    assert charts.tick_text(-0.1, [-0.1, 0.0, 0.1]) == "−0.1"


def test_labels_move_apart_but_stay_inside() -> None:
    moved = charts.spread([10.0, 11.0, 99.0, 98.0], 15.0, 0.0, 100.0)
    ordered = sorted(moved)
    assert all(b - a >= 15.0 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= 0.0
    assert ordered[-1] <= 100.0
    assert moved[3] < moved[2], "order is kept"


def test_points_are_drawn_where_they_belong() -> None:
    frame = charts.Frame(
        x_low=0, x_high=10, y_low=0, y_high=1, width=120, height=70, left=10, right=10, top=5, bottom=15
    )
    assert (frame.x(0), frame.x(5), frame.x(10)) == (10, 60, 110)
    assert (frame.y(0), frame.y(1)) == (55, 5)


def test_a_chart_is_xml_with_title_and_escaped_names() -> None:
    evil = "</text><script>alert(1)</script>"
    series = [charts.Series(name=evil, points=[charts.Point(x=1.0, y=2.0, y_interval=(1.5, 2.5))], index=0)]
    for draw in (charts.scatter, charts.lines):
        svg = draw("c", "Title & more", "What it shows", series, charts.Axis(label="x"), charts.Axis(label="y"))
        root = ElementTree.fromstring(svg)
        assert root[0].tag == "title"
        assert root[0].text == "Title & more"
        assert root[1].tag == "desc"
        assert root.get("aria-labelledby") == "c-title c-desc"
        assert not list(root.iter("script"))
        assert "style=" not in svg, "the security policy allows no style attributes"


def test_every_shape_is_drawn_and_pairs_of_shape_and_colour_are_unique() -> None:
    pairs = {(charts.shape_of(i), charts.colour_of(i)) for i in range(24)}
    assert len(pairs) == 24
    assert {charts.shape_of(i) for i in range(8)} == set(charts.SHAPES)
    for i in range(8):
        ElementTree.fromstring(charts.marker(0.0, 0.0, i))


def test_thin_keeps_the_mean() -> None:
    values = [(float(i), float(i % 2)) for i in range(1000)]
    short = charts.thin(values, 100)
    assert len(short) == 100
    assert all(y == 0.5 for _, y in short)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (-0.0004, "0.000"), (-1.25, "−1.250"), (math.nan, "–"), (None, "–"), (math.inf, "–")],
)
def test_number(value: float | None, text: str) -> None:
    assert page.number(value) == text


def test_signed_scaled_duration() -> None:
    assert [page.signed(v) for v in (0.5, -0.5, 0.0)] == ["+0.500", "−0.500", "0.000"]
    assert [page.scaled(v, "B") for v in (0, 512, 1000, 999_600, 1.5e9, 12.34e6)] == [
        "0 B", "512 B", "1.00 kB", "1.00 MB", "1.50 GB", "12.3 MB",
    ]  # fmt: skip
    assert [page.duration(s) for s in (8.2, 59.96, 65, 3599.7, 12_000)] == [
        "8.2 s", "60.0 s", "1 min 05 s", "60 min 00 s", "3 h 20 min",
    ]  # fmt: skip


def test_json_and_csv_have_no_nan_and_no_formula() -> None:
    text = page.json_text({"a": math.nan, "b": [1.0, math.inf], "c": {1: -0.5}})
    assert json.loads(text) == {"a": None, "b": [1.0, None], "c": {"1": -0.5}}
    assert page.csv_text(["m", "x"], [["=HYPERLINK(1)", math.nan], ["ok", 2.5]]) == "m,x\n'=HYPERLINK(1),\nok,2.5\n"


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("replay:fraction=1/2", "replay-fraction-1of2"),
        ("../../etc", "etc"),
        ("<b>", "b"),
        ("…", "x"),
        ("A+b", "a-b"),
    ],
)
def test_slug(label: str, name: str) -> None:
    assert page.slug(label) == name


def test_reasons_are_escaped() -> None:
    assert "<script>" not in page.undefined('"><script>')
