"""The board's pages: right figures, escaped text, a policy that fits, the same bytes for the same runs."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from clbench.errors import ConfigError
from clbench.leaderboard import view
from clbench.leaderboard.page import number
from clbench.leaderboard.site import build_site
from clbench.leaderboard.submission import pack
from clbench.results.store import RunStore
from tests.leaderboard.conftest import DECLARED, METHODS, SHAPE
from tests.synthetic_runs import pooled, write_run

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Tree(HTMLParser):
    """Checks that tags nest, and collects ids, links, tags and the text of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def parse(path: Path) -> Tree:
    tree = Tree()
    tree.feed(path.read_text(encoding="utf-8"))
    assert tree.stack == []
    return tree


def embedded(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def all_pages(site: Path) -> list[Path]:
    return sorted(site.parent.rglob("*.html"))


def test_pages_are_well_formed_and_their_links_lead_somewhere(site: Path, report: Path) -> None:
    assert len(all_pages(site)) == 1 + len(METHODS)
    for page in [*all_pages(site), report]:
        tree = parse(page)
        assert len(tree.ids) == len(set(tree.ids)), page
        assert "style" not in tree.attributes, "inline styles are blocked by the policy"
        assert not [a for a in tree.attributes if a.startswith("on")]
        for link in tree.links:
            if link.startswith("#"):
                assert link[1:] in tree.ids, (page, link)
            elif not link.startswith("data:"):
                assert ":" not in link, "only relative links"
                assert (page.parent / link.split("#")[0]).is_file(), (page, link)


def test_policy_names_exactly_the_style_and_the_script(site: Path, report: Path) -> None:
    for page in [*all_pages(site), report]:
        text = page.read_text(encoding="utf-8")
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for tag, directive in (("style", "style-src"), ("script", "script-src")):
            body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)[1]
            digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
            assert f"{directive} 'sha256-{digest}'" in policy


def test_same_runs_give_the_same_bytes(runs: dict[str, list[RunStore]], site: Path, tmp_path: Path) -> None:
    again = [build_site(runs["frozen"], tmp_path / name).index for name in ("one", "two")]
    one, two = ({p.relative_to(i.parent): p.read_bytes() for p in i.parent.rglob("*") if p.is_file()} for i in again)
    assert one == two
    assert len(one) > 5


def test_the_matrix_on_the_page_is_that_of_the_rows(runs: dict[str, list[RunStore]], site: Path) -> None:
    table = site.parent / "data" / "sequential" / "matrix-nats_per_token.csv"
    with table.open(encoding="utf-8", newline="") as file:
        found = list(csv.reader(file))
    assert [row[0] for row in found[1:]] == ["base", "after 2011", "after 2012"]
    page = (site.parent / "methods" / "sequential.html").read_text(encoding="utf-8")
    for row in range(3):
        seeds = [pooled(run.rows("heldout", row), 3)["nats_per_token"] for run in runs["sequential"]]
        for column in range(3):
            expected = sum(values[column] for values in seeds) / 3
            assert float(found[row + 1][column + 1]) == pytest.approx(expected, rel=1e-9)
            assert f">{number(expected)}<" in page


def test_raw_files_are_copied_whole(runs: dict[str, list[RunStore]], site: Path) -> None:
    for seed, run in enumerate(runs["replay:fraction=1/2"]):
        copy = site.parent / "data" / "replay-fraction-1of2" / f"seed-{seed}"
        assert pq.read_table(copy / "heldout-02.parquet", partitioning=None).equals(run.rows("heldout", 2))
        assert yaml.safe_load((copy / "run.yaml").read_text())["seed"] == seed


def test_data_is_offered_three_ways_and_agrees(site: Path) -> None:
    data = json.loads((site.parent / "data" / "data.json").read_text())
    assert embedded(site) == data
    with (site.parent / "data" / "table.csv").open(encoding="utf-8", newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert set(table) == set(METHODS) == {m["label"] for m in data["methods"]}
    for method in data["methods"]:
        score = method["scores"]["bits_per_byte"]["backward"]
        assert float(table[method["label"]]["backward_bits_per_byte"]) == pytest.approx(score["value"])
    assert {m["label"]: m["status"] for m in data["methods"]} == {
        "sequential": "checked", "replay:fraction=1/2": "reported", "frozen": "reported",
    }  # fmt: skip


def test_capacity_is_shown_where_it_was_measured_and_a_dash_elsewhere(site: Path) -> None:
    methods = {one["label"]: one for one in json.loads((site.parent / "data" / "data.json").read_text())["methods"]}
    replay = methods["replay:fraction=1/2"]["capacity"]["figures"]
    assert [replay[row]["rankme"]["value"] for row in ("0", "2")] == [39.0, 41.0]  # of 39 thrice, and of 39, 41, 43
    assert methods["frozen"]["capacity"]["figures"] == {}
    assert methods["frozen"]["capacity"]["per_run"]["weight_driven_total"]["value"] == 0.0
    with (site.parent / "data" / "table.csv").open(encoding="utf-8", newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert [table[name]["rankme"] for name in ("replay:fraction=1/2", "frozen", "sequential")] == ["41.0", "", ""]
    assert float(table["sequential"]["weight_driven_total"]) > 0.3
    text = site.read_text(encoding="utf-8").partition('<h2 id="capacity">')[2].partition('<h2 id="words">')[0]
    assert "41.000" in text
    assert text.count("not measured") == 2 * (6 + 6 + 4 + 4)  # the base has those of replay; each reason stands twice
    assert "<i>" not in text
    assert "&lt;i&gt;too few&lt;/i&gt; samples" in text
    page = (site.parent / "methods" / "replay-fraction-1of2.html").read_text(encoding="utf-8")
    assert "RankMe (singular values) by stage" in page
    kept = json.loads((site.parent / "data" / "replay-fraction-1of2" / "capacity.json").read_text())
    assert kept["figures"]["rankme"]["1"]["value"] == 40.0


def test_replay_is_said_to_forget_less_and_the_bill_is_right(site: Path) -> None:
    assert "not what another seed would give" not in site.read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>|\s+", " ", site.read_text(encoding="utf-8").split('id="board"')[0])
    assert re.search(r"sequential\s+forgot 0\.\d+", text)
    assert re.search(r"replay:fraction=1/2\s+forgot .* less forgetting than sequential", text)
    assert re.search(r"frozen\s+was never trained", text)
    page = (site.parent / "methods" / "replay-fraction-1of2.html").read_text(encoding="utf-8")
    # stage 2 of fraction=1/2 at 200 k tokens: 50 k from each of the two earlier stages, 100 k of its own
    assert re.search(r"2012</th><td>50\.0 k</td><td>50\.0 k</td><td>100 k</td><td><b>200 k</b>", page)


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    evil = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>{{7*7}}'
    runs = [write_run(tmp_path / f"seed-{seed}", method="sequential", seed=seed, **SHAPE) for seed in range(2)]
    for run in runs:
        config = run.config()
        config["method"]["label"] = config["track"]["description"] = config["command"] = evil
        config["stages"][1]["name"] = config["environment"]["python"] = evil
        run.write_config(config)
    index = build_site(runs, tmp_path / "site").index
    for page in all_pages(index):
        tree, text = parse(page), page.read_text(encoding="utf-8")
        assert "img" not in tree.tags
        assert "alert(2)</script>" not in text
        assert tree.tags.count("script") <= 2
        assert "49" not in re.findall(r"<h1>(.*?)</h1>", text, re.S)[0]


def test_unfinished_runs_are_named_and_undefined_is_a_dash(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", n_rows=1, state="running", oracle=False, **SHAPE)
    index = build_site([run], tmp_path / "site").index
    text = index.read_text(encoding="utf-8")
    assert "no checkpoint measured after 2011, 2012" in text
    assert not re.search(r">\s*(nan|NaN|None|inf)\b", text)
    assert embedded(index)["methods"][0]["scores"]["nats_per_token"]["backward"]["value"] is None
    assert "has no verdict yet" in text


def test_one_seed_has_document_noise_and_no_rank_of_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / m, method=m, **SHAPE) for m in ("sequential", "frozen")]
    index = build_site(runs, tmp_path / "site").index
    assert {m["rank"]["nats_per_token"] for m in embedded(index)["methods"]} == {"1–2"}
    text = index.read_text(encoding="utf-8")
    assert "evaluation noise" in text
    assert "not what another seed would give" in text


def test_two_tracks_get_a_page_each(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / t, track=t, **SHAPE) for t in ("alpha", "beta")]
    index = build_site(runs, tmp_path / "site").index
    assert {"alpha/index.html", "beta/index.html"} <= set(parse(index).links)
    for name in ("alpha", "beta"):
        links = parse(index.parent / name / "index.html").links
        assert all(
            (index.parent / name / link.split("#")[0]).is_file()
            for link in links
            if link[0] != "#" and link != "data:,"
        )


def test_checkpoints_without_a_bill_show_dashes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **SHAPE)
    (run.folder / "ledger.json").unlink()
    (run.folder / "steps.jsonl").unlink()
    config = run.config()
    config["method"] = {"label": "my checkpoints", "components": []}
    run.write_config(config)
    index = build_site([run], tmp_path / "site").index
    assert "no bill" in index.read_text(encoding="utf-8")
    assert "No training log" in (index.parent / "methods" / "my-checkpoints.html").read_text(encoding="utf-8")


def test_a_folder_with_other_things_is_left_alone(runs: dict[str, list[RunStore]], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        build_site(runs["frozen"], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="no runs"):
        (tmp_path / "none").mkdir()
        build_site([], tmp_path / "site", submissions=tmp_path / "none")
    build_site(runs["frozen"], tmp_path / "site")
    build_site(runs["sequential"], tmp_path / "site")
    assert [p.name for p in (tmp_path / "site" / "methods").iterdir()] == ["sequential.html"]


def test_a_submissions_folder_is_verified_and_what_fails_is_said(
    runs: dict[str, list[RunStore]], tmp_path: Path
) -> None:
    bad = pack(runs["sequential"], tmp_path / "submissions", declarations=DECLARED)
    built = build_site(runs["frozen"], tmp_path / "site", submissions=tmp_path / "submissions")
    assert [line.split(": ")[0] for line in built.rejected] == [f"synthetic/{bad.name}"]
    assert "unknown track" in built.rejected[0]
    assert [m["label"] for m in embedded(built.index)["methods"]] == ["frozen"]
    with pytest.raises(ConfigError, match="no such folder"):
        build_site(runs["frozen"], tmp_path / "site", submissions=tmp_path / "nowhere")


def test_same_labels_are_told_apart() -> None:
    assert view.distinct(["a", "a", "b"], ["2026-01-01", "", ""]) == ["a (2026-01-01)", "a", "b"]
    assert view.distinct(["a", "a"], ["", ""]) == ["a", "a-2"]


def test_without_runs_the_built_in_entries_are_verified_and_shown(tmp_path: Path) -> None:
    site = build_site([], tmp_path / "site")
    assert site.rejected == []
    shown = {path.stem for path in (tmp_path / "site" / "methods").glob("*.html")}
    assert {"sequential", "replay", "frozen"} <= shown
