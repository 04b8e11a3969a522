"""``clbench stream show``: tables, JSON and a page of a built stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clbench.stream import Stream
from tests.command_line.driver import clbench
from tests.written_streams import Page, write_stream


def show(*arguments: object) -> str:
    done = clbench("stream", "show", *arguments)
    assert done.code == 0, done.err
    return done.out


def test_a_stream_by_its_name_and_by_its_folder_is_the_same(tinydocs: Stream) -> None:
    by_name, by_folder = show("tinydocs"), show(tinydocs.folder)
    assert by_name == by_folder
    for name in ("2001", "2004"):
        assert name in by_name
    for title in (
        "Stages",
        "Train documents that repeat",
        "Jensen-Shannon",
        "bits per byte",
        "What each stage is about",
    ):
        assert title in by_name
    for stage in range(4):
        assert f"{tinydocs.counts('train', stage)['n_tokens'] / 1000:.3g} k" in by_name


def test_json_is_for_machines(tinydocs: Stream) -> None:
    found = json.loads(show("tinydocs", "--json"))
    assert found["sha256"] == tinydocs.sha256
    assert [stage["train"]["n_tokens"] for stage in found["stages"]] == [
        tinydocs.counts("train", i)["n_tokens"] for i in range(4)
    ]
    fewer = json.loads(show("tinydocs", "--json", "--sample-tokens", 1000))
    assert fewer["drift"]["model_tokens"] == 1000
    assert (
        json.loads(show("tinydocs", "--json", "--samples", 20))["stages"][0]["samples"][:8]
        == found["stages"][0]["samples"]
    )


def test_samples_are_as_many_as_asked(tinydocs: Stream) -> None:
    assert show("tinydocs", "--samples", 0).count("tinydocs/page-") == 0
    assert show("tinydocs", "--samples", 3).count("· tinydocs/page-") == 12


def test_html_writes_a_page(tinydocs: Stream, tmp_path: Path) -> None:
    done = clbench("stream", "show", "tinydocs", "--html", tmp_path / "page.html", "--samples", 2)
    assert done.code == 0 and "page.html" in done.err and done.out == ""
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Stream tinydocs" in page and page.count("<article") == 4 * 5


def test_text_from_outside_cannot_steer_the_terminal(tmp_path: Path) -> None:
    bad = "[red]not markup[/red] \x1b]0;title\x07\x1b[2J end"
    pages = [Page(id=f"p{i}{bad}", text=f"{bad} {i}", group=bad) for i in range(4)]
    write_stream(tmp_path / "bad", [{"train": pages[:2], "heldout": pages[2:]}])
    out = show(tmp_path / "bad", "--samples", 2)
    assert "[red]not markup[/red]" in out
    assert "\x1b" not in out and "\x07" not in out


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tinydox", "unknown stream 'tinydox'; did you mean 'tinydocs'?"),
        ("codedocs-nano", "stream 'codedocs-nano' is not built; run `clbench prepare codedocs-nano`"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(target: str, words: str) -> None:
    assert words in clbench("stream", "show", target).error


def test_a_folder_without_a_stream(tmp_path: Path) -> None:
    assert "no built stream here" in clbench("stream", "show", tmp_path).error
    assert clbench("stream", "show", tmp_path / "nowhere").code == 2
    assert "--sample-tokens" in clbench("stream", "show", "tinydocs", "--sample-tokens", 3).error
