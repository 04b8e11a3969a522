"""The pages in a real Chromium, offline: sorting, filters, units, no script, small screens, accessibility.

Chromium comes from ``CLBENCH_CHROMIUM`` or the PATH, axe-core from ``CLBENCH_AXE`` or the cache of
``scripts/setup-browser``. Without a browser these tests are skipped, or fail with ``CLBENCH_REQUIRE_BROWSER=1``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def missing(what: str) -> None:
    """Skip, or fail where a browser is required."""
    message = f"{what}; run scripts/setup-browser"
    if os.environ.get("CLBENCH_REQUIRE_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = os.environ.get("CLBENCH_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        missing("no Chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture(scope="module")
def axe() -> Path:
    path = Path(os.environ.get("CLBENCH_AXE") or ROOT / ".cache" / "browser" / "axe.min.js")
    if not path.is_file():
        missing("no axe-core")
    return path


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open pages that fail the test on any error, console warning or request that is no local file."""
    troubles: list[str] = []
    contexts = []

    def opened(path: Path, *, hash_: str = "", width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url))
        page.goto(path.as_uri() + hash_)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


BOARD, CAPACITY = "table[data-sort=rank]", "table[data-sortable=capacity]"


def methods(page: Any) -> list[str]:
    return page.locator(f"{BOARD} tbody tr:visible th a").all_inner_texts()


def column(page: Any, place: int, table: str = BOARD) -> list[str]:
    cells = page.locator(f"{table} tbody tr:visible > :nth-child({place})").all_inner_texts()
    return [text.split()[0] for text in cells]


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_sorting_by_keyboard_and_mouse(site: Path, open_page: Open) -> None:
    page = open_page(site)
    assert column(page, 1)[0] == "1"
    header = page.locator(BOARD).get_by_role("columnheader", name="Forgetting")
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    rising = [number(text) for text in column(page, 7)]
    assert rising == sorted(rising)
    assert methods(page)[0] == "frozen"
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert [number(text) for text in column(page, 7)] == rising[::-1]
    assert page.locator(f"{BOARD} th[aria-sort]").count() == 1
    assert "sort=forgetting_first" in unquote(page.url)
    page.locator(BOARD).get_by_role("columnheader", name="Method").get_by_role("button").click()
    assert methods(page) == sorted(methods(page))


def test_filters_count_and_the_hash_brings_them_back(site: Path, open_page: Open) -> None:
    page = open_page(site)
    status = page.get_by_role("status")
    assert status.inner_text() == "3 of 3 methods"
    page.get_by_label("Find").fill("REPLAY")
    assert methods(page) == ["replay:fraction=1/2"]
    assert status.inner_text() == "1 of 3 methods"
    page.get_by_label("Find").fill("")
    page.get_by_label("Status").select_option("checked")
    assert methods(page) == ["sequential"]
    page.get_by_label("Family").select_option("frozen")
    assert methods(page) == []
    assert status.inner_text() == "0 of 3 methods"
    again = open_page(site, hash_="#" + page.url.split("#")[1])
    assert methods(again) == []
    assert again.get_by_label("Family").input_value() == "frozen"
    again.get_by_label("Family").select_option("")
    assert methods(again) == ["sequential"]


def test_the_table_of_capacity_sorts_by_itself_and_obeys_the_filters(site: Path, open_page: Open) -> None:
    page = open_page(site)
    forgetting = [number(text) for text in column(page, 2, CAPACITY)]
    assert forgetting == sorted(forgetting)
    before = methods(page)
    rankme = page.locator(CAPACITY).get_by_role("columnheader", name="RankMe")
    rankme.get_by_role("button").click()
    assert column(page, 5, CAPACITY) == ["41.000", "–", "–"]
    rankme.get_by_role("button").click()
    assert column(page, 5, CAPACITY) == ["41.000", "–", "–"]  # undefined is last either way
    assert (methods(page), page.locator(f"{BOARD} th[aria-sort]").count()) == (before, 1)
    again = open_page(site, hash_="#" + page.url.split("#")[1] + "&family=frozen")
    shown = again.locator(CAPACITY)
    assert shown.get_by_role("columnheader", name="RankMe").get_attribute("aria-sort") == "descending"
    assert shown.locator("tbody tr:visible").count() == 1
    assert again.get_by_role("status").inner_text() == "1 of 3 methods"
    assert shown.locator("tfoot tr:visible").count() == 1


def test_hostile_hash_does_nothing(site: Path, open_page: Open) -> None:
    page = open_page(site, hash_="#sort=__proto__,x&search=%3Cimg+src=x+onerror=alert(1)%3E&family=nope&unit=zzz")
    assert page.get_by_label("Family").input_value() == ""
    assert page.locator("img").count() == 0
    assert page.locator(f"{BOARD} th[aria-sort]").count() == 1


def test_units_switch_tables_charts_and_sorting(site: Path, open_page: Open) -> None:
    for script in (True, False):
        page = open_page(site, java_script_enabled=script)
        before = column(page, 4)
        assert page.locator("#tradeoff-nats-title").count() == 1
        page.get_by_text("bits per byte").first.click()
        after = column(page, 4)
        assert all(number(b) < number(a) for a, b in zip(before, after, strict=True) if number(a) > 0)
        visible = page.locator("svg.chart:visible")
        assert {one.get_attribute("aria-labelledby").split("-title")[0][-3:] for one in visible.all()} == {"bpb"}
    page = open_page(site.parent / "methods" / "sequential.html", hash_="#unit=bpb")
    assert page.get_by_role("radio", name="bits per byte").is_checked()
    assert page.locator(".heat:visible").count() == 4


def test_everything_is_there_without_script(site: Path, open_page: Open) -> None:
    page = open_page(site, java_script_enabled=False)
    assert len(methods(page)) == 3
    assert page.get_by_label("Find").is_hidden()
    assert page.locator("th button:enabled").count() == 0
    assert page.locator("svg.chart:visible").count() == 4
    page.get_by_role("link", name="frozen").first.click()
    assert page.get_by_role("heading", level=1).inner_text() == "frozen"


def test_links_lead_to_a_method_and_back(site: Path, open_page: Open) -> None:
    page = open_page(site)
    page.get_by_role("rowheader", name="sequential").first.get_by_role("link").click()
    assert page.get_by_role("heading", level=1).inner_text() == "sequential"
    assert page.locator(".heat:visible").first.locator("td").count() == 9
    page.get_by_role("link", name="Track synthetic").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Track synthetic"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_are_coloured_and_stay_readable(site: Path, open_page: Open, scheme: str) -> None:
    page = open_page(site.parent / "methods" / "sequential.html", color_scheme=scheme)
    colours = (
        page.locator(".heat")
        .first.locator("td")
        .evaluate_all("cells => cells.map(c => getComputedStyle(c).backgroundColor)")
    )
    assert len(set(colours)) > 3
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, body[4:-1].split(","))) > 380) == (scheme == "light")


def test_small_screens_and_print(site: Path, report: Path, open_page: Open) -> None:
    for path in (site, site.parent / "methods" / "sequential.html", report):
        page = open_page(path, width=360)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.emulate_media(media="print")
        assert page.locator(".controls").first.is_hidden()
        assert len(page.pdf(format="A4")) > 20_000


def test_copy_button(site: Path, open_page: Open) -> None:
    page = open_page(site.parent / "methods" / "sequential.html")
    button = page.get_by_role("button", name="Copy the command of seed 1")
    button.click()
    page.get_by_role("button", name="Copied").or_(page.get_by_role("button", name="Selected")).wait_for(timeout=2000)


@pytest.fixture
def pages(site: Path, report: Path) -> dict[str, Path]:
    return {"site": site, "method": site.parent / "methods" / "sequential.html", "report": report}


@contextmanager
def without_policy(browser: Any, path: Path, scheme: str, width: int) -> Iterator[Any]:
    """A page whose policy lets the test's own script in; everything else is unchanged."""
    context = browser.new_context(
        bypass_csp=True, offline=True, color_scheme=scheme, viewport={"width": width, "height": 900}
    )
    page = context.new_page()
    page.goto(path.as_uri())
    yield page
    context.close()


EVERYTHING = {"runOnly": AXE_TAGS}
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}


@pytest.mark.parametrize(
    ("name", "scheme", "width", "options"),
    [
        ("site", "light", 1280, EVERYTHING),
        ("method", "light", 360, EVERYTHING),
        ("report", "light", 1280, EVERYTHING),
        ("site", "dark", 1280, CONTRAST),
        ("method", "dark", 1280, CONTRAST),
    ],
)
def test_accessibility_scan(
    pages: dict[str, Path], browser: Any, axe: Path, name: str, scheme: str, width: int, options: dict[str, Any]
) -> None:
    with without_policy(browser, pages[name], scheme, width) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.add_script_tag(path=str(axe))
        found = page.evaluate("options => axe.run(options)", options)
    assert [(v["id"], [n["html"][:160] for n in v["nodes"][:3]]) for v in found["violations"]] == []
    assert len(found["passes"]) >= (1 if options is CONTRAST else 15)
