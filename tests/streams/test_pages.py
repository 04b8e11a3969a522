from __future__ import annotations

from clbench.streams._pages import MAX_CHARS, sections, split_long

RST = """\
=====
Title
=====

Intro.

First
=====

One.

Deeper
------

Two.

======  ======
a       table
======  ======

Second
======

    Not a heading
    -------------

Three.

----

First
=====

Again.
"""


def parts(text: str, *, markdown: bool = False) -> dict[str, str]:
    return {section.path: section.text for section in sections(text, markdown=markdown)}


def test_rst_is_split_at_its_two_upper_levels() -> None:
    found = parts(RST)
    assert list(found) == ["Title", "Title > First", "Title > Second", "Title > First#2"]
    assert found["Title"] == "=====\nTitle\n=====\n\nIntro."
    assert found["Title > First"].startswith("Title\n\nFirst\n=====\n\nOne.\n\nDeeper\n------\n\nTwo.")
    assert "Not a heading" in found["Title > Second"]


def test_markdown_ignores_fences() -> None:
    text = "# Title\n\nIntro.\n\n```sh\n# a comment\n```\n\n## One ##\n\ntext\n\n### Deep\n\ntext\n\n## Two\n\nx\n"
    found = parts(text, markdown=True)
    assert list(found) == ["Title", "Title > One", "Title > Two"]
    assert "# a comment" in found["Title"] and "### Deep" in found["Title > One"]


def test_a_page_without_headings_is_one_section() -> None:
    assert parts("Just text.\n\nMore.") == {"": "Just text.\n\nMore."}
    assert parts("  \n\n") == {}


def test_a_section_keeps_its_name_when_others_come_and_grow() -> None:
    later = RST.replace("One.", "One. " * 3).replace(
        "First\n=====\n\nOne", "Newcomer\n========\n\nText.\n\nFirst\n=====\n\nOne"
    )
    before, after = parts(RST), parts(later)
    assert set(before) < set(after) and "Title > Newcomer" in after
    assert before["Title > Second"] == after["Title > Second"]


def test_a_long_section_is_split_at_deeper_headings_and_then_between_paragraphs() -> None:
    paragraphs = "\n\n".join(f"Paragraph {i}. " + "word " * 100 for i in range(40))
    text = RST.replace("Two.", "Two.\n\n" + paragraphs)
    found = parts(text)
    assert "Title > First > Deeper" in found and "Title > First > Deeper#2" in found
    assert all(len(part) <= MAX_CHARS + 100 for part in found.values())
    assert sum(part.count("Paragraph ") for part in found.values()) == 40


def test_pieces_of_a_long_text_lose_nothing_but_blank_lines() -> None:
    for text in ("x" * (3 * MAX_CHARS + 5), "line\n" * MAX_CHARS, ("a " * 500 + "\n\n") * 60):
        pieces = split_long(text)
        assert all(0 < len(piece) <= MAX_CHARS for piece in pieces)
        assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    assert split_long("") == []
