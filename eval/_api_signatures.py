"""Parameter lists, read from the text of a signature: names, kinds and defaults, without annotations.

Python's own parser is not asked: half the releases are Python 2, which it does not read, and what it reads of newer
ones depends on the interpreter. Tests hold this reader equal to ``ast`` over the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_TEXT = r"""\"{3}(?:\\.|.)*?\"{3} | '{3}(?:\\.|.)*?'{3} | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'"""
_TOKEN = re.compile(rf"{_TEXT} | [()\[\]{{}}] | , | [=<>!:]=+ | ->? | = | : | \blambda\b", re.VERBOSE | re.DOTALL)
_NAME = re.compile(r"(\*{0,2})\s*([^\W\d]\w*)\s*")
_PLAIN_TEXT = re.compile(r"""[uU]?(\"{3}|'{3}|["'])([^"'\\]*)\1""")


@dataclass(frozen=True)
class Parameter:
    """One parameter; ``stars`` is ``*`` or ``**`` where it takes what is left, ``default`` None where it has none."""

    name: str
    stars: str = ""
    default: str | None = None

    def __str__(self) -> str:
        """Write it as it stands in a signature without annotations."""
        return f"{self.stars}{self.name}" + ("" if self.default is None else f"={self.default}")


@dataclass(frozen=True)
class Signature:
    """A parameter list; ``*`` and ``/`` alone stand as parameters of that name."""

    parameters: tuple[Parameter, ...]

    def __str__(self) -> str:
        """Write it without annotations: equal texts are equal interfaces."""
        return f"({', '.join(map(str, self.parameters))})"

    @property
    def named(self) -> tuple[Parameter, ...]:
        """The parameters that a caller gives: without markers, ``self`` and ``cls``."""
        real = tuple(p for p in self.parameters if p.name not in ("*", "/"))
        return real[1:] if real and real[0].name in ("self", "cls") and not real[0].stars else real


def parse(text: str) -> Signature | None:
    """Return the parameters of ``(a, b: int = 1, *, c) -> None``; None for what is no such list.

    Parameters that are unpacked where they stand (Python 2's ``def f(a, (b, c))``) have no name, so None, too.
    """
    pieces = _pieces(text)
    found = [] if pieces is None else [_parameter(piece) for piece in pieces]
    if pieces is None or None in found:
        return None
    return Signature(tuple(p for p in found if p is not None))


def _pieces(text: str) -> list[str] | None:
    """Return what stands between the commas of the first round bracket, behind type parameters if there are any."""
    start = text.find("(", _end_of_bracket(text, 0) if text.startswith("[") else 0)
    if start < 0 or text[:start].strip() not in ("", text[: _end_of_bracket(text, 0)].strip()):
        return None
    end = _end_of_bracket(text, start)
    if end <= start:
        return None
    cuts = [start, *_commas(text, start + 1, end - 1), end - 1]
    pieces = [text[a + 1 : b].strip() for a, b in pairwise(cuts)]
    return pieces[:-1] if not pieces[-1] else pieces


def _commas(text: str, start: int, end: int) -> Iterator[int]:
    """Yield where commas stand between parameters: in no bracket, and not among a lambda's own parameters."""
    n_lambdas = 0
    for place, token in _top_level(text, start, end):
        if token == "lambda":
            n_lambdas += 1
        elif token == ":":
            n_lambdas = max(0, n_lambdas - 1)
        elif token == "," and not n_lambdas:
            yield place


def _end_of_bracket(text: str, start: int) -> int:
    """Return where the bracket that opens at ``start`` ends; 0 if it does not."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        depth += (match.group() in "([{") - (match.group() in ")]}")
        if depth == 0:
            return match.end()
    return 0


def _top_level(text: str, start: int, end: int) -> list[tuple[int, str]]:
    """Return the tokens between two places that stand in no bracket."""
    depth, found = 0, []
    for match in _TOKEN.finditer(text, start, end):
        token = match.group()
        if depth == 0:
            found.append((match.start(), token))
        depth += (token in "([{") - (token in ")]}")
    return found


def _parameter(piece: str) -> Parameter | None:
    if piece in ("*", "/"):
        return Parameter(piece)
    head = _NAME.match(piece)
    if head is None:
        return None
    rest, place = piece[head.end() :], None
    if rest[:1] == ":":
        place = next((place for place, token in _top_level(rest, 1, len(rest)) if token == "="), None)
    elif rest[:1] == "=" and rest[:2] != "==":
        place = 0
    elif rest:
        return None
    default = None if place is None else normal_default(rest[place + 1 :])
    return Parameter(head.group(2), head.group(1), default)


def normal_default(text: str) -> str:
    """Return a default with plain texts in single quotes: another quote, or Python 2's ``u``, is no other interface."""
    stripped = " ".join(text.split())
    plain = _PLAIN_TEXT.fullmatch(stripped)
    return stripped if plain is None else f"'{plain.group(2)}'"
