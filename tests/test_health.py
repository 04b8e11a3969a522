"""Check-ups: models whose answers are known, verdict, buckets, exit codes, the page, and bad input."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clbench import cells, health
from clbench.cli import app
from clbench.errors import ConfigError, NotFoundError
from clbench.fanout import Failure, Subject, told
from clbench.health import Options, examine
from clbench.leaderboard.health_page import build_health_page, health_page
from tests import probe_suite
from tests.test_fanout import make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"), {"base": 36, "tuned": 16, "healed": 34})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(autouse=True)
def own_cells(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of cells for the tests of this file."""
    monkeypatch.setattr(cells, "cells_folder", lambda: place / "cells")


def probe(place: Path) -> str:
    return f"{probe_suite.__file__}:Probe:place={place}"


def test_a_damaged_model_is_found_out(models: dict[str, str], place: Path, tmp_path: Path) -> None:
    found = examine(Options(model=models["tuned"], baseline=models["base"], suites=(probe(place),)))
    assert found.verdict == "damaged on 1 of 3 tasks: task-a (-0.500)"
    facts = found.as_dict()
    assert facts["tasks"]["task-a"]["p"] == pytest.approx(2 * 0.5**20)  # 20 questions got worse, none better
    assert facts["tasks"]["task-a"]["p_holm"] == pytest.approx(3 * 2 * 0.5**20)
    assert facts["tasks"]["task-b"]["state"] == "unchanged"
    assert facts["damaged"] == ["task-a"]
    chance_off = ((0.4 - 0.25) / (0.9 - 0.25) + 1 + 1) / 3
    assert facts["retention"]["corrected"]["value"] == pytest.approx(chance_off)
    assert facts["licences"] == {"probe": "CC0-1.0 <b>"}
    assert facts["bill"]["models"]["model"]["flops"] == 3e6
    path = build_health_page(found, tmp_path)
    assert path.name == "health.html"
    text = path.read_text(encoding="utf-8")
    assert "damaged on 1 of 3 tasks" in text
    assert "CC0-1.0 &lt;b&gt;" in text


def test_alone_a_model_is_held_against_chance(models: dict[str, str], place: Path) -> None:
    found = examine(Options(model=models["tuned"], suites=(probe(place),)))
    assert found.verdict == "above chance on 3 of 3 tasks; no baseline was named"
    assert found.changes == ()
    assert "Differences to the baseline" not in health_page(found)


def test_a_healed_model_is_in_its_buckets(models: dict[str, str], place: Path) -> None:
    found = examine(
        Options(model=models["healed"], baseline=models["tuned"], base=models["base"], suites=(probe(place),))
    )
    assert {one.task: one.bucket for one in found.fates} == {
        "task-a": "healed",
        "task-b": "undamaged",
        "task-c": "undamaged",
    }
    assert found.as_dict()["buckets"]["task-a"]["undone"] == pytest.approx(0.9)
    assert found.as_dict()["bucket_rates"] == {"healed": [1, 1], "preserved": [0, 0], "undamaged": [2, 2]}
    assert "improved on 1: task-a (+0.450)" in found.verdict
    assert "Four buckets" in health_page(found)


def test_own_text_is_a_task(models: dict[str, str], tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"body": f"Document {i} about a number {i * i}."}) + "\n" for i in range(12)))
    found = examine(Options(model=models["base"], baseline=models["tuned"], texts=(str(mine),), text_column="body"))
    assert list(found.scores) == ["mine.jsonl"]
    task = found.tasks["mine.jsonl"]
    assert (task.n, task.unit, task.direction) == (12, "bits per byte", "lower")
    assert 0 < found.scores["mine.jsonl"].value < 20
    assert found.failures == []
    assert "mine.jsonl" in health_page(found)


# the page


class Pieces(HTMLParser):
    """What a page refers to, and its tags' balance."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [str(values[name]) for name in ("href", "src") if values.get(name)]
        self.ids += [str(values["id"])] if values.get("id") else []
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_whole_file(models: dict[str, str], place: Path) -> None:
    found = examine(
        Options(model=models["healed"], baseline=models["tuned"], base=models["base"], suites=(probe(place),))
    )
    text = health_page(found)
    pieces = Pieces()
    pieces.feed(text)
    assert pieces.open == []
    assert len(pieces.ids) == len(set(pieces.ids))
    assert all(link.startswith(("#", "data:")) for link in pieces.links)
    assert {link[1:] for link in pieces.links if link.startswith("#")} <= set(pieces.ids)
    assert "default-src 'none'" in html.unescape(text)
    assert not re.search(
        r"\bnan\b|\bNone\b|inf\b", re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.S)
    )


# the command


@dataclass
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


def clbench(*words: object) -> Outcome:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def check(models: Sequence[object], place: Path, tmp_path: Path, *more: object) -> Outcome:
    return clbench("health", *models, "--suite", probe(place), "--out", tmp_path / "page.html", *more)


def test_exit_codes_for_a_pipeline(models: dict[str, str], place: Path, tmp_path: Path) -> None:
    against = [models["tuned"], "--baseline", models["base"]]
    plain = check(against, place, tmp_path)
    assert plain.code == 0
    assert "damaged on 1 of 3 tasks: task-a (-0.500)." in plain.out
    assert "3 were there" in plain.out or "6 were there" in plain.out or "0 were there" in plain.out
    assert check(against, place, tmp_path, "--fail-on-damage").code == 1
    assert check([models["base"], "--baseline", models["tuned"]], place, tmp_path, "--fail-on-damage").code == 0
    assert (tmp_path / "page.html").is_file()
    asked = check(against, place, tmp_path, "--json")
    facts: dict[str, Any] = json.loads(asked.out)
    assert facts["damaged"] == ["task-a"]
    assert facts["report"] == str(tmp_path / "page.html")


def test_a_cell_that_fails_is_named_and_the_page_is_written(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "cells_folder", lambda: tmp_path / "cells")
    (tmp_path / "crash-b").touch()
    outcome = check([models["tuned"], "--baseline", models["base"]], tmp_path, tmp_path)
    assert outcome.code == 1
    assert "ValueError: a defect" in outcome.err
    assert "2 cells could not be measured" in outcome.out
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What could not be measured" in text
    assert "task-c" in text


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        ({"model": "no/such/folder"}, NotFoundError, "checkpoint folder is missing"),
        ({"model": "model:no-such"}, NotFoundError, "unknown pretrained model"),
        ({"suites": ("heldout",)}, ConfigError, "measures on a stream"),
        ({"suites": ("no-such",)}, NotFoundError, "unknown suite"),
        ({"suites": ("heldout",), "stream": "no-such"}, NotFoundError, "unknown stream"),
        ({"texts": ("no-such.jsonl",)}, NotFoundError, "text is not there"),
        ({"base": "x"}, ConfigError, "--base needs --baseline"),
    ],
)
def test_bad_input_is_said(
    models: dict[str, str], change: dict[str, Any], kind: type[Exception], expected: str
) -> None:
    with pytest.raises(kind, match=expected):
        examine(Options(**{"model": models["base"], **change}))


@pytest.mark.parametrize(
    ("positions", "spec"),
    [(None, "1024"), (2048, "1024"), (1024, "1024"), (1023, "512"), (512, "512"), (511, None)],
)
def test_the_default_lengths_are_those_that_the_models_read(
    models: dict[str, str], positions: int | None, spec: str | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(health, "DEFAULT_SUITES", ("longcontext:lengths=LENGTH,n_items=25",))
    if spec is None:
        with pytest.raises(ConfigError, match="no suite can be measured: longcontext: a model reads 511 tokens"):
            health.choose(Options(model=models["base"]), positions)
    else:
        requests, skipped = health.choose(Options(model=models["base"]), positions)
        assert [one.spec for one in requests] == [f"longcontext:lengths={spec},n_items=25"] and not skipped


def test_the_fewest_positions_count(tmp_path: Path) -> None:
    subjects = []
    configs = [
        {"max_position_embeddings": 700, "text_config": None},
        {"text_config": {"max_position_embeddings": 600}},
        {},
    ]
    for number, config in enumerate(configs):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "config.json").write_text(json.dumps(config))
        subjects.append(Subject(label="m", path=str(tmp_path / f"{number}")))
    assert health.least_positions([*subjects, Subject(label="hub", path="some/model")]) == 600
    assert health.least_positions(subjects[2:]) is None


def test_equal_failures_are_one_line() -> None:
    failures = [Failure("m", "s", shard, why) for shard, why in (("a", "x"), ("b", "y"), ("c", "x"))]
    assert told([*failures, Failure("n", "s", "", "x")]) == ["m · s · a, c: x", "m · s · b: y", "n · s: x"]


def test_what_is_not_prepared_is_left_out_with_its_reason(models: dict[str, str], monkeypatch: Any) -> None:
    monkeypatch.setattr(health, "DEFAULT_SUITES", ("no-such-suite",))
    with pytest.raises(ConfigError, match="no suite can be measured: no-such-suite: unknown suite"):
        examine(Options(model=models["base"]))
    with pytest.raises(ConfigError, match="named twice"):
        examine(Options(model=models["base"], suites=(probe(Path("x")), probe(Path("x")))))
