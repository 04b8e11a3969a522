"""A track with the suite ``capacity``, from ``prepare`` to the board: all commands of entrants and maintainers."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from clbench.files import digest_of, sha256_file
from clbench.leaderboard.page import number
from clbench.results.matrix import matrix_of
from clbench.results.store import RunStore
from tests.command_line.driver import clbench, write_track
from tests.leaderboard import test_browser
from tests.leaderboard.test_browser import CAPACITY, Open, column

browser, open_page = test_browser.browser, test_browser.open_page  # its fixtures, here too
METHODS = ("sequential", "replay")


@dataclass(frozen=True)
class Flow:
    """What the commands left behind."""

    track: Path
    runs: Path
    entries: dict[str, Path]
    """Method -> entry."""
    told: dict[str, Any]
    """Of ``clbench report --json``."""
    report: Path
    site: Path


def ok(*arguments: object) -> str:
    done = clbench(*arguments)
    assert done.code == 0, done.err
    return done.out


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    root = tmp_path_factory.mktemp("flow")
    track = write_track(root / "captiny.yaml", name="captiny", suites=["heldout", "capacity"], seeds=[0])
    ok("prepare", track)
    ok("oracle", track, "--write")  # an entry needs the stream's digest in the track
    entries = {}
    for method in METHODS:
        ok("run", "-m", method, "-t", track, "-o", root / "runs", "--device", "cpu", "--mlflow", "none")
        folder = root / "runs" / "captiny" / method
        declared = ("--author", "A. Author", "--only-track-data", "--heldout-untouched")
        entries[method] = Path(ok("leaderboard", "pack", folder, "-o", root / "entries", *declared).strip())
    told = json.loads(ok("report", root / "runs", "-o", root / "report.html", "--json"))
    ok("leaderboard", "verify", *entries.values(), "--track", track)
    built = ok("leaderboard", "build", "--submissions", root / "entries", "--track", track, "-o", root / "site")
    return Flow(track, root / "runs", entries, told, root / "report.html", Path(built.strip()))


def measured(entry: Path, row: int, group: str, item: str, metric: str) -> float:
    """One value of an entry's rows, read by hand."""
    table = pq.read_table(entry / "seed-0" / "rows" / f"capacity-{row:02d}.parquet", partitioning=None)
    keys = {"group": group, "item": item, "metric": metric, "stage": -1}
    for name, value in keys.items():
        table = table.filter(pc.equal(table[name], value))
    (found,) = table["value"].to_pylist()
    return float(found)


def board_row(page: Path, method: str) -> list[str]:
    """The texts of a method's row in the table of capacity."""
    text = page.read_text(encoding="utf-8").partition('<h2 id="capacity">')[2].partition("</table>")[0]
    rows = [re.sub(r"<svg.*?</svg>|<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", text, re.S)]
    (found,) = [row for row in rows if row[0] == method]
    return [word for word in found[1:] if not word.startswith("±")]


@pytest.mark.parametrize("method", METHODS)
def test_the_board_and_the_report_show_what_the_rows_say(flow: Flow, method: str) -> None:
    entry = flow.entries[method]
    at = matrix_of(RunStore(entry / "seed-0")).at
    steps = [sum(at(k + 1, i) - at(k, i) for i in range(k + 1)) / (k + 1) for k in range(3)]
    drift = measured(entry, 3, "weights", "all", "drift")
    dormant = measured(entry, 3, "units", "all blocks", "redo_0.1")
    rankme = measured(entry, 3, "representation", "final", "rankme_sigma:centred")
    assert drift > 0
    for page in (flow.site, flow.report, flow.site.parent / "methods" / f"{method}.html"):
        row = board_row(page, method)
        assert row[0] == number(sum(steps))
        assert row[3] == number(rankme)
        assert row[-2:] == [number(drift), number(dormant)]
    (told,) = [one for one in flow.told["capacity"] if one["label"] == method]
    assert told["clemc"]["reference"] == "oracle"
    assert told["figures"]["drift"]["3"]["value"] == drift
    assert told["figures"]["cka_base"]["0"]["value"] == pytest.approx(1.0)
    shown = clbench("report", flow.runs, "-o", flow.report.with_name("again.html")).out
    assert "weight drift" in shown
    assert f"0.000 → {drift:.3f}" in shown


def test_a_track_that_is_not_built_in_has_to_be_named(flow: Flow, tmp_path: Path) -> None:
    told = clbench("leaderboard", "verify", flow.entries["replay"])
    assert told.code == 2
    assert "unknown track 'captiny'" in told.out
    built = clbench("leaderboard", "build", "--submissions", flow.entries["replay"].parents[1], "-o", tmp_path / "site")
    assert "2 entries were refused" in built.error
    assert not (tmp_path / "site").exists()


def reseal(entry: Path) -> Path:
    """Give a tampered entry right digests and the right name, as an attacker would."""
    value = json.loads((entry / "entry.json").read_text())
    value["files"] = {name: sha256_file(entry / name) for name in value["files"]}
    (entry / "entry.json").write_text(json.dumps(value))
    return entry.rename(entry.with_name(f"{entry.name.rsplit('-', 1)[0]}-{digest_of(value['files'])[:8]}"))


@pytest.mark.parametrize(
    ("metric", "value", "says"),
    [
        ("drift", 1e300, "drift is 1e+300, which is outside of 0 to 1e+09"),
        ("redo_0.1", -0.5, "redo_0.1 is -0.5, which is outside of 0 to 1"),
        ("rankme_sigma:centred", -3.0, "rankme_sigma:centred is -3"),
        ("rankme_sigma:centred", float("nan"), "a value is NaN or infinite"),  # no reason is given
    ],
)
def test_figures_that_nobody_can_measure_are_refused(
    flow: Flow, tmp_path: Path, metric: str, value: float, says: str
) -> None:
    entry = flow.entries["replay"]
    copy = Path(shutil.copytree(entry, tmp_path / "captiny" / entry.name))
    path = copy / "seed-0" / "rows" / "capacity-03.parquet"
    table = pq.read_table(path, partitioning=None)
    values = [
        value if m == metric else v for m, v in zip(*(table[n].to_pylist() for n in ("metric", "value")), strict=True)
    ]
    pq.write_table(table.set_column(3, "value", pa.array(values)), path)
    told = clbench("leaderboard", "verify", reseal(copy), "--track", flow.track)
    assert told.code == 2
    assert says in told.out


def test_rows_of_capacity_that_are_missing_are_named(flow: Flow, tmp_path: Path) -> None:
    entry = flow.entries["replay"]
    copy = Path(shutil.copytree(entry, tmp_path / "captiny" / entry.name))
    (copy / "seed-0" / "rows" / "capacity-02.parquet").unlink()
    told = clbench("leaderboard", "verify", copy, "--track", flow.track)
    assert "capacity-02.parquet: is listed in entry.json but missing" in told.out


def test_a_track_without_its_streams_digest_says_how_to_freeze_it(flow: Flow, tmp_path: Path) -> None:
    loose = yaml.safe_load(flow.track.read_text(encoding="utf-8")) | {"stream_sha256": None}
    (tmp_path / "captiny.yaml").write_text(yaml.safe_dump(loose), encoding="utf-8")
    told = clbench("leaderboard", "verify", flow.entries["replay"], "--track", tmp_path / "captiny.yaml")
    assert told.code == 2
    assert "freeze it with `clbench oracle TRACK --write`" in told.out


@pytest.mark.browser
def test_in_a_browser(flow: Flow, open_page: Open) -> None:
    page = open_page(flow.site)
    page.locator(CAPACITY).get_by_role("columnheader", name="weight drift").get_by_role("button").click()
    drifts = [measured(flow.entries[method], 3, "weights", "all", "drift") for method in METHODS]
    assert column(page, 9, CAPACITY) == [number(one) for one in sorted(drifts)]
    page.locator(CAPACITY).get_by_role("link", name="replay").click()
    assert page.locator("#capacity").is_visible()
    assert page.locator("svg.chart[aria-labelledby^=figure-]").count() == 9
    assert (
        page.locator("svg.chart[aria-labelledby^=figure-rankme] circle").count()
        + page.locator("svg.chart[aria-labelledby^=figure-rankme] polygon").count()
        == 4
    )  # a point a checkpoint
