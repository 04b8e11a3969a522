"""The documentation keeps its promises: links lead somewhere, commands exist, the index is whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.project_tree import ROOT, project_files

PAGES = [p for p in project_files() if p.suffix == ".md" and "submissions" not in p.parts]
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read(path: Path) -> str:
    """The text of a file of the project."""
    return (ROOT / path).read_text("utf-8")


def code(text: str) -> list[str]:
    """The lines of fenced blocks and the pieces of inline code of a page."""
    blocks = [line.strip().removeprefix("$ ") for block in FENCED.findall(text) for line in block.splitlines()]
    return blocks + re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ +(.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def dead_links(path: Path, text: str) -> list[str]:
    """Relative links of a page that lead to no file or no heading."""
    dead = []
    for target in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / path).parent / name if name else ROOT / path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
            dead.append(f"{path}: {target}")
    return dead


def commands(text: str) -> set[tuple[str, ...]]:
    """The (sub)command words that a page's code gives to clbench, at most two of them."""
    found = set()
    for line in code(text):
        if match := re.match(r"(?:\.venv/bin/)?clbench((?: [a-z][a-z-]*){1,2})(?= |$)", line):
            found.add(tuple(match[1].split()))
    return found


def test_the_tools_of_this_file_see_what_they_should() -> None:
    links = "[x](nowhere.md) [y](index.md) [z](index.md#nowhere) [w](https://example.invalid)"
    page = f"# A b, c\n{links}\n```\n$ clbench leaderboard build --out x\n```\n`make no-such`"
    assert dead_links(Path("docs/x.md"), page) == ["docs/x.md: nowhere.md", "docs/x.md: index.md#nowhere"]
    assert commands(page) == {("leaderboard", "build")}
    assert anchors(page) == {"a-b-c"}
    assert [make_targets(line) for line in code(page)] == [[], ["no-such"]]
    assert make_targets("make PYTHON=python3.12 check test") == ["check", "test"]


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path, read(path)) == []


def test_every_page_is_in_the_index() -> None:
    listed = {(ROOT / "docs" / target).resolve() for target in LINK.findall(read(Path("docs/index.md")))}
    pages = {(ROOT / p).resolve() for p in PAGES if p.parts[0] == "docs"}
    assert pages - listed - {ROOT / "docs" / "index.md"} == set()


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(Path("Makefile")), re.MULTILINE))
    texts = {path: read(path) for path in PAGES} | {Path(".ci/run"): f"```\n{read(Path('.ci/run'))}```"}
    named = {(path, name) for path, text in texts.items() for line in code(text) for name in make_targets(line)}
    assert (Path(".ci/run"), "check") in named
    assert {(str(path), name) for path, name in named if name not in targets} == set()


def make_targets(line: str) -> list[str]:
    """The targets that a line of code gives to make."""
    if not (match := re.match(r"make((?: [A-Za-z_]+=\S+)*)((?: [a-z][a-z-]*)+)", line)):
        return []
    return match[2].split()


def test_every_command_named_exists() -> None:
    import typer

    from clbench.cli import app

    group = typer.main.get_command(app)
    unknown = []
    for path in PAGES:
        for words in commands(read(path)):
            here = group
            for word in words:
                known = getattr(here, "commands", None)
                if known is None:
                    break  # an argument
                if word not in known:
                    unknown.append(f"{path}: clbench {' '.join(words)}")
                    break
                here = known[word]
    assert unknown == []


WORKFLOWS = [p for p in project_files() if p.parts[:2] == (".github", "workflows")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_trusts_nothing_that_it_need_not(path: Path) -> None:
    text = read(path)
    flow = yaml.safe_load(text)
    assert "pull_request_target" not in (flow.get("on") or flow[True])  # YAML 1.1 reads `on` as true
    assert flow["permissions"] in ({}, {"contents": "read"})
    assert "secrets." not in text
    for job in flow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert "${{" not in step.get("run", ""), f"{path}: {step['run']!r} puts an expression in a script"


def test_every_method_named_with_options_can_be_made() -> None:
    from clbench import registry
    from clbench.errors import ClbenchError

    n_made, wrong = 0, []
    for path in PAGES:
        for line in re.findall(r"clbench run [^\n`#]*", read(path)):
            for spec in re.findall(r"(?:-m|--method) ([a-z][\w:=/.,+-]*)", line):
                if "file=" in spec or ".py" in spec or spec.endswith(("=", ":")):
                    continue  # a file of the reader's, or a placeholder
                try:
                    registry.make_method(spec)
                    n_made += 1
                except ClbenchError as error:
                    wrong.append(f"{path}: {spec}: {error}")
    assert wrong == []
    assert n_made > 50
