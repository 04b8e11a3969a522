"""The page of a stream: everything escaped, nothing from the network, readable in a real browser."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from clbench.leaderboard.stream_page import build_stream_page, extra_bits, heat, periods, stream_page
from clbench.portrait import Parameters, Portrait, portrait_of
from clbench.stream import Stream
from tests.leaderboard import test_browser
from tests.leaderboard.test_browser import CONTRAST, EVERYTHING, Open, without_policy
from tests.written_streams import Page, write_stream

browser, axe, open_page = test_browser.browser, test_browser.axe, test_browser.open_page  # its fixtures, here too

HOSTILE = (
    "</pre></script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '"><svg onload=alert(3)>',
    "{{ 7 * 7 }} {% raw %} &amp; \u202e\x07 ' onmouseover='alert(4)",
)


def text(draw: random.Random, topic: str) -> str:
    return " ".join(f"{topic}{draw.randrange(60)}" for _ in range(draw.randrange(30, 90)))


def hostile_stream(folder: Path, n_stages: int = 3) -> Stream:
    """Documents, ids, groups, and names that try to leave their place on the page."""
    draw = random.Random(0)
    stages = []
    for i in range(n_stages):
        stage = {}
        for split, n in (("train", 12), ("heldout", 4)):
            stage[split] = [
                Page(
                    id=f"{HOSTILE[k % 4]}{split}{i}{k}",
                    text=f"{HOSTILE[k % 4]} {text(draw, 'abcdefghijklmnopqrstuvwxyz'[i])}\n{HOSTILE[(k + 1) % 4]}",
                    group=HOSTILE[k % 3],
                    date=f"{2020 + i}-{k + 1:02d}-01",
                    change=("new", "changed", "unchanged")[k % 3],
                )
                for k in range(n)
            ]
        stages.append(stage)
    names = [f"<b>{2020 + i}</b>" for i in range(n_stages)]
    return write_stream(folder, stages, name="<i>hostile</i>", names=names)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Portrait:
    return portrait_of(hostile_stream(tmp_path_factory.mktemp("streams") / "hostile"), Parameters(drift_tokens=2000))


@pytest.fixture(scope="module")
def shown(found: Portrait, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stream_page(found, tmp_path_factory.mktemp("page") / "stream.html")


def test_nothing_that_came_from_outside_is_markup(shown: Path) -> None:
    html = shown.read_text(encoding="utf-8")
    body = re.sub(r"<script>.*?</script>", "", html[html.index("<body>") :], count=1, flags=re.DOTALL)
    for piece in ("<script", "<img", "<svg onload", "<b>2020</b>", "<i>hostile", "</pre></script>", "' onmouseover='"):
        assert piece not in body, piece
    assert "&lt;img src=x onerror=alert(2)&gt;" in body and "{{ 7 * 7 }}" in body
    assert "style=" not in body and " onerror=alert" not in body.replace("&lt;img src=x onerror=alert", "")


def test_the_page_asks_nobody_for_anything(shown: Path) -> None:
    html = shown.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html) == []
    assert not re.search(r"https?://|@import|url\(", html)
    head = html.split("<style>")[0]
    assert "default-src &#39;none&#39;" in head and "unsafe" not in head


def test_the_page_holds_every_figure(shown: Path, found: Portrait) -> None:
    html = shown.read_text(encoding="utf-8")
    data = re.search(r'href="data:application/json;base64,([^"]+)"', html)
    assert data is not None
    kept = json.loads(base64.b64decode(data[1]))
    assert kept["drift"]["js"]["train"] == found.drift.js["train"]
    for row in found.drift.bits_per_byte:
        for value in row:
            assert f">{value:.2f}</td>" in html
    assert html.count("<details") == len(found.stages)


def test_the_same_portrait_gives_the_same_bytes_and_fewer_samples_less_text(found: Portrait) -> None:
    assert stream_page(found) == stream_page(found)
    assert stream_page(found, samples=1).count("<article") == len(found.stages)
    assert stream_page(found, samples=0).count("<article") == 0


def test_extra_bits_are_over_the_columns_own_model() -> None:
    assert extra_bits([[1.0, 2.5], [3.0, 2.0]]) == [[0.0, 0.5], [2.0, 0.0]]
    assert extra_bits([[None, 2.5], [3.0, 2.0]]) == [[None, 0.5], [None, 0.0]]


def test_heat_spans_the_values_and_frames_the_diagonal() -> None:
    table = heat([[0.0, 1.0], [None, 0.5]], ["a", "b"], ["c", "d"], str, why_none="empty")
    assert [cell.css for row in table.rows for cell in row.cells] == ["s0", "s24", "na-cell", "s12"]
    assert [cell.diagonal for row in table.rows for cell in row.cells] == [True, False, False, True]
    assert table.rows[1].cells[0].text is None and table.rows[1].cells[0].tip == "empty"


def test_dates_are_months_or_years_without_gaps() -> None:
    assert periods(["2020-11", "2021-02"]) == (["2020-11", "2020-12", "2021-01", "2021-02"], False)
    assert periods(["1999-01", "2004-12"]) == (["1999", "2000", "2001", "2002", "2003", "2004"], True)
    assert periods(["2020-05"]) == (["2020-05"], False)


@pytest.mark.parametrize("n_stages", [1, 20])
def test_streams_of_one_and_of_many_stages(n_stages: int, tmp_path: Path) -> None:
    found = portrait_of(hostile_stream(tmp_path / "stream", n_stages), Parameters(drift_tokens=2000))
    html = stream_page(found)
    assert html.count("<details") == n_stages
    shown = re.sub(r"base64,[^\"]+|<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"\bnan\b|\binf\b|>None<", shown)


@pytest.mark.browser
def test_in_a_browser(shown: Path, open_page: Open) -> None:
    page = open_page(shown)
    assert page.get_by_role("heading", level=1).inner_text() == "Stream <i>hostile</i>"
    assert page.locator("img").count() == 0 and page.locator("svg.chart").count() == 4
    header = page.locator("table.board").get_by_role("columnheader", name="tokens per byte")
    header.get_by_role("button").click()
    cells = [float(v) for v in page.locator("table.board tbody td:nth-child(5)").all_inner_texts()]
    assert cells == sorted(cells)
    page.get_by_text("<b>2021</b>", exact=True).last.click()
    assert page.locator("details[open] pre").first.is_visible()
    small = open_page(shown, width=360)
    assert small.evaluate("document.documentElement.scrollWidth") <= 360
    plain = open_page(shown, java_script_enabled=False)
    assert plain.locator("th button:enabled").count() == 0 and plain.locator("table.heat").count() == 8


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "options"), [("light", EVERYTHING), ("dark", CONTRAST)])
def test_accessibility(
    shown: Path,
    browser: Any,
    axe: Path,
    scheme: str,
    options: dict[str, Any],
) -> None:
    with without_policy(browser, shown, scheme, 1280) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.add_script_tag(path=str(axe))
        report = page.evaluate("options => axe.run(options)", options)
    assert [(v["id"], [n["html"][:160] for n in v["nodes"][:3]]) for v in report["violations"]] == []
    assert len(report["passes"]) >= (1 if options is CONTRAST else 15)
