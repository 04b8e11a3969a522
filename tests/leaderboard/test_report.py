"""The report of one run or several: one file, plain sentences, the same figures as the board."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from clbench.errors import ClbenchError, ConfigError
from clbench.leaderboard.page import number
from clbench.leaderboard.report import build_report
from clbench.results.matrix import matrix_of
from clbench.results.store import RunStore
from clbench.results.summary import summarise
from tests.leaderboard.conftest import SHAPE
from tests.synthetic_runs import write_run


def test_one_run_is_one_file_that_says_what_was_forgotten(runs: dict[str, list[RunStore]], tmp_path: Path) -> None:
    run = runs["sequential"][0]
    path = build_report([run], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] == [path.name]
    text = path.read_text(encoding="utf-8")
    forgetting = summarise([run]).scores["forgetting_first"]
    assert f"forgot {forgetting.value:.3f}" in text
    # the period longest ago is forgotten most: 0.6 (1 - exp(i - k)), tests/synthetic_runs.py
    assert "most on 2010" in text
    assert run.config()["command"] in text


def test_several_methods_are_compared_pairwise(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert re.search(r"less forgetting than sequential", text)
    assert "Keeping the old against learning the new" in text


def test_downloads_are_inside(report: Path, runs: dict[str, list[RunStore]]) -> None:
    found = re.findall(r'href="data:application/json;base64,([^"]+)"', report.read_text(encoding="utf-8"))
    values = [json.loads(base64.b64decode(one)) for one in found]
    labels = {one["nats_per_token"]["label"] for one in values if isinstance(one, dict)}
    (capacity,) = [one for one in values if isinstance(one, list)]
    assert {one["label"] for one in capacity} == labels
    assert labels == {"sequential", "replay:fraction=1/2"}


def test_capacity_stands_beside_what_it_is_worth(report: Path, runs: dict[str, list[RunStore]]) -> None:
    text = report.read_text(encoding="utf-8").partition('<h2 id="capacity">')[2].partition('<h2 id="words">')[0]
    assert "positive: forgetting" in text
    rows = [
        re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", text.partition("</table>")[0], re.S)
    ]
    table = {row[0]: row[1:] for row in rows}
    for method in ("sequential", "replay:fraction=1/2"):
        totals = []
        for run in runs[method]:
            at = matrix_of(run).at
            totals.append(at(1, 0) - at(0, 0) + ((at(2, 0) - at(1, 0)) + (at(2, 1) - at(1, 1))) / 2)
        assert table[method][0] == number(sum(totals) / 3)
    assert float(table["sequential"][0]) > float(table["replay:fraction=1/2"][0])
    assert table["replay:fraction=1/2"][6:8] == ["41.000", "±4.968"]  # t(2) = 4.303 times s = 2 over root 3
    assert table["sequential"][6:9] == ["–", "(not", "measured)"]
    assert table["the"][:2] == ["base", "39.000"]
    assert "RankMe (singular values) by stage" in text
    assert "CKA with the base by stage" not in text  # undefined in every row
    assert "CLEMC" not in text and "FEMC" not in text  # sums that rise by construction


def test_runs_of_two_tracks_are_refused(tmp_path: Path) -> None:
    two = [write_run(tmp_path / t, track=t, **SHAPE) for t in ("alpha", "beta")]
    with pytest.raises(ClbenchError, match="track"):
        build_report(two, tmp_path / "report.html")
    with pytest.raises(ConfigError, match="needs runs"):
        build_report([], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="no run has a complete row"):
        build_report([write_run(tmp_path / "early", n_rows=0, **SHAPE)], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
