"""Documentation pages in reStructuredText, Markdown or plain text, split at their headings.

A section is known by its headings, not by its place, so it keeps its name when a later version of the page gains or
loses others. Splitting looks at nothing but the text: the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_CHARS = 8000
"""A section that is longer is split at deeper headings, and where it has none between paragraphs."""
SPLIT_LEVEL = 2
"""Sections of this level and above are always documents of their own."""

_UNDERLINE = re.compile(r"([=\-`:'\"~^_*+#<>.])\1{2,}\s*")
_MARKDOWN_HEADING = re.compile(r"(#{1,6})[ \t]+(.*?)[ \t#]*")
_FENCE = re.compile(r"[ \t]*(```|~~~)")


@dataclass(frozen=True)
class Heading:
    """A heading: its first line, its level from 1, its text."""

    line: int
    level: int
    title: str


@dataclass(frozen=True)
class Section:
    """A part of a page: the headings it stands under, joined with `` > ``, and its text."""

    path: str
    text: str


def sections(text: str, *, markdown: bool) -> list[Section]:
    """Return the parts of a page in order; their paths are unique within it."""
    lines = [line.rstrip() for line in text.expandtabs(8).split("\n")]
    headings = list(_markdown_headings(lines) if markdown else _underlined_headings(lines))
    title = headings[0].title if headings else ""
    times: dict[str, int] = {}
    found = []
    for path, body in _split(lines, headings, 0, len(lines), SPLIT_LEVEL, ()):
        name = " > ".join(path)
        times[name] = times.get(name, 0) + 1
        if times[name] > 1:
            name = f"{name}#{times[name]}"
        context = f"{title}\n\n" if title and len(path) > 1 else ""
        found.append(Section(name, context + body))
    return found


def _split(
    lines: list[str], headings: list[Heading], start: int, end: int, level: int, above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (headings, text) of the parts of ``lines[start:end]``, split at headings down to ``level``."""
    cuts = [h for h in headings if start <= h.line < end and h.level <= level]
    bounds = [start, *(h.line for h in cuts), end]
    trail: list[Heading] = []
    for heading, first, last in zip([None, *cuts], bounds, bounds[1:], strict=False):
        if heading is not None:
            trail = [*(h for h in trail if h.level < heading.level), heading]
        path = (*above, *(h.title for h in trail))
        body = "\n".join(lines[first:last]).strip("\n")
        if len(body) <= MAX_CHARS:
            if body:
                yield path, body
        elif any(first < h.line < last for h in headings):
            deeper = [h for h in headings if first < h.line < last]
            yield from _split(lines, deeper, first, last, min(h.level for h in deeper), path)
        else:
            yield from ((path, piece) for piece in split_long(body))


def split_long(text: str) -> list[str]:
    """Return ``text`` in pieces of at most ``MAX_CHARS``, cut between paragraphs, else lines, else anywhere."""
    pieces = []
    while len(text) > MAX_CHARS:
        cut = max(text.rfind("\n\n", 1, MAX_CHARS), 0) or max(text.rfind("\n", 1, MAX_CHARS), 0) or MAX_CHARS
        pieces.append(text[:cut])
        text = text[cut:].strip("\n")
    return [*pieces, text] if text else pieces


def _underlined_headings(lines: list[str]) -> Iterator[Heading]:
    """Yield reStructuredText headings; levels count in the order in which the styles of a page appear."""
    styles: list[str] = []
    for i in range(len(lines) - 1):
        title, under = lines[i], lines[i + 1]
        if not title or (title[0] == " " and not _has_overline(lines, i)) or not _UNDERLINE.fullmatch(under):
            continue
        if len(under) + 2 < len(title.strip()) or _UNDERLINE.fullmatch(title):
            continue
        over = _has_overline(lines, i)
        style = under[0] * (2 if over else 1)
        if style not in styles:
            styles.append(style)
        yield Heading(i - 1 if over else i, styles.index(style) + 1, " ".join(title.split()))


def _has_overline(lines: list[str], i: int) -> bool:
    return i > 0 and bool(_UNDERLINE.fullmatch(lines[i - 1])) and lines[i - 1][:3] == lines[i + 1][:3]


def _markdown_headings(lines: list[str]) -> Iterator[Heading]:
    """Yield the ``#`` headings outside of fenced code."""
    fence = ""
    for i, line in enumerate(lines):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark.group(1)
        elif mark and mark.group(1) == fence:
            fence = ""
        elif not fence and (heading := _MARKDOWN_HEADING.fullmatch(line)):
            yield Heading(i, len(heading.group(1)), heading.group(2))
