"""The page about capacity: what it shows, nothing that is not a number, everything escaped, no network."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.errors import ConfigError
from clbench.leaderboard.capacity_page import build_page, capacity_page
from clbench.results import probes
from clbench.results.capacity import MethodCapacity
from clbench.results.clemc import Reference, estimate
from clbench.results.matrix import Documents
from clbench.results.probes import Curve
from clbench.results.stats import Interval, t_interval
from tests.leaderboard import test_browser
from tests.leaderboard.test_browser import EVERYTHING, Open, without_policy

browser, axe, open_page = test_browser.browser, test_browser.axe, test_browser.open_page  # its fixtures, here too
HOSTILE = "</script><script>alert(1)</script> {{ 7 * 7 }} & \" onload='x'"


def documents(seed: int, n_stages: int = 3, n: int = 6) -> Documents:
    rng = np.random.default_rng(seed)
    stage = np.repeat(np.arange(n_stages), n)
    return Documents(
        value=rng.uniform(2, 4, (n_stages, n_stages * n)),
        row_stages=tuple(range(n_stages)),
        stage=stage,
        item=np.array([f"d{i}" for i in range(n_stages * n)]),
        n_tokens=np.ones(n_stages * n, dtype=np.int64),
        n_bytes=np.ones(n_stages * n, dtype=np.int64),
    )


def probe_report(name: str) -> dict[str, Any]:
    def curves(shift: float) -> dict[str, dict[int, Curve]]:
        tokens = np.array([0.0, 10, 20])
        return {r: {o: Curve(tokens, np.array([5.0, 4, 3 + 0.1 * o]) + shift) for o in range(2)} for r in ("1/3", "1")}

    bill = {"probes": 8, "cached": 3, "n_tokens": 160, "flops": 1e12, "seconds": 4.0}
    options = {"on": name, "n_tokens": 20, "n_orders": 2}
    about = {"run": name, "options": options, "bill": bill, "learning_rate": 0.006}
    return {"about": about, **probes.report({"base": curves(0.0), "stage 1": curves(1.5)})}


def method(label: str, seeds: int = 2, **changes: Any) -> MethodCapacity:
    facts: dict[str, Any] = {
        "label": label,
        "track": "t",
        "seeds": tuple(range(seeds)),
        "stages": {0: "2006", 1: "2007", 2: "2008"},
        "estimate": estimate(
            {s: documents(s) for s in range(seeds)}, (0, 1, 2), Reference("best_of_run"), n_resamples=50
        ),
        "headlines": {
            "rankme": {row: t_interval([40 + row, 41.5 + row]) for row in range(3)},
            "interference_old": {0: Interval(math.nan, reason="no such period"), 1: t_interval([0.5, 0.6])},
        },
    }
    return MethodCapacity(**(facts | changes))


def test_a_page_shows_every_figure_there_is_and_reasons_for_the_rest() -> None:
    text = capacity_page([method("sequential", probes=(probe_report("words"),)), method("replay", seeds=1)])
    for words in ("Forgetting cost", "RankMe (singular values)", "interference D", "Plasticity probe: words on words"):
        assert words in text
    assert "40.750 ± " in text  # the mean of 40 and 41.5
    assert "no such period" in text
    assert "alpha-ReQ by stage" not in text  # nobody measured it
    assert "not told: no interval" in text  # two orders that do not vary
    assert not re.search(r"(?<![a-z])(nan|inf|None)(?![a-z])", re.sub(r"base64,[\w+/=]*", "", text))
    assert "t over seeds" in text
    assert "bootstrap over documents" in text


def test_the_download_holds_the_same_numbers() -> None:
    one = method("sequential")
    (data,) = re.findall(r"data:application/json;base64,([\w+/=]+)", capacity_page([one]))
    found = json.loads(base64.b64decode(data))
    assert found[0]["clemc"]["per_stage"]["weight_driven"] == json.loads(
        json.dumps(one.as_dict()["clemc"]["per_stage"]["weight_driven"])
    )
    assert found[0]["figures"]["interference_old"]["0"]["reason"] == "no such period"


def test_everything_from_outside_is_escaped() -> None:
    stages = {0: HOSTILE, 1: HOSTILE, 2: HOSTILE}
    text = capacity_page([method(HOSTILE, stages=stages, notes=(HOSTILE,), probes=(probe_report(HOSTILE),))])
    assert "<script>alert(1)" not in text
    assert "49" not in re.findall(r"<title>(.*?)</title>", text)[0]
    assert text.count("<script") == 1


def test_nothing_to_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs runs"):
        build_page([], tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.browser
def test_in_a_browser(tmp_path: Path, browser: Any, open_page: Open, axe: Path) -> None:
    page = build_page([method("sequential", probes=(probe_report("words"),)), method("replay")], tmp_path / "c.html")
    shown = open_page(page)
    assert shown.locator("svg.chart").count() >= 8
    assert shown.locator("h2").first.inner_text() == "Forgetting cost"
    assert open_page(page, width=360).evaluate("document.documentElement.scrollWidth") <= 360
    with without_policy(browser, page, "light", 1280) as bare:
        bare.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        bare.add_script_tag(path=str(axe))
        report = bare.evaluate("options => axe.run(options)", EVERYTHING)
    assert [(v["id"], [n["html"][:160] for n in v["nodes"][:3]]) for v in report["violations"]] == []
