"""Docstrings of Python source text, of Python 2 and 3 alike, and the same under every interpreter.

``ast`` parses neither the Python 2 of the first ten years nor, under an older interpreter, newer syntax, so what it
finds depends on who runs it. This scanner reads only what it needs: logical lines, their indentation, ``def``
and ``class`` headers, and the string that opens a block. Tests hold it equal to ``ast`` over the standard library.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

TAB_COLUMNS = 8
MAX_COLUMNS = 64
"""Blocks further right are read line by line, so that a file of any shape needs few patterns."""

_STRING = r"""
    \"\"\"[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*(?:\"\"\"|\Z)
  | '''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*(?:'''|\Z)
  | "[^"\\\n]*(?:\\.[^"\\\n]*)*(?:"|(?=\n)|\Z)
  | '[^'\\\n]*(?:\\.[^'\\\n]*)*(?:'|(?=\n)|\Z)
"""
_FLAGS = re.VERBOSE | re.DOTALL
_BREAK = re.compile(rf"{_STRING} | \#[^\n]* | \\\n | [\n()\[\]{{}}:]", _FLAGS)
"""Everything that decides where a logical line or a header ends; what lies between is skipped."""
_DEFINES = r"(?:async[ \t]+def|def|class)[ \t]|@\w"
_PLAIN = rf"""[^()\[\]{{}}"'\#\\\n]++ | {_STRING} | \#[^\n]*+ | \\\n?"""
_BRACKETS = r"(?!)"
for _depth in range(4):
    _BRACKETS = rf"[(\[{{] (?: {_PLAIN} | \n(?!{_DEFINES}) | {_BRACKETS} )*+ [)\]}}]"
_STATEMENT = rf"(?: {_PLAIN} | {_BRACKETS} | [)\]}}] )*+"
_BLANK = r"[ \t\f]*+ (?: \#[^\n]*+ )? \n"
_LINE = re.compile(rf"(?: {_BLANK} )*+ ([ \t\f]*+) ( {_STATEMENT} ) \n", _FLAGS)
"""Blank lines and comments, then the indentation and the text of a logical line with brackets nested no deeper."""
_BODIES: dict[int, re.Pattern[str]] = {}
"""By column, what skips the body of a block: see ``_end_of_body``."""
_SKIPS = re.sub(r"(?:ab?c)*+", "", "aca") == "a"
"""Before Python 3.11.5 possessive repetition of a group matches wrongly (CPython issue 106052). There every line is
read by itself, which gives the same definitions in more time."""
_HEADER = re.compile(r"(?:async[ \t]+)?(def|class)[ \t]+(\w+)")
_DEFINES_AT_MARGIN = re.compile(_DEFINES)
_LITERAL = re.compile(rf"([a-zA-Z]{{0,3}})({_STRING})", _FLAGS)
_BETWEEN = re.compile(r"(?:\s|\\\n|\#[^\n]*)*")
_ESCAPE = re.compile(r"\\(\n|[0-7]{1,3}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}\n]+\}|.)", re.DOTALL)
_SIMPLE_ESCAPES = {"\n": "", "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


@dataclass
class Definition:
    """A module, class or function.

    ``header`` is what stands between the name and the colon; ``docstring`` is None where there is none, else its value
    without the common indentation.
    """

    kind: str
    name: str
    qualname: str
    column: int
    header: str = ""
    docstring: str | None = None
    times_defined: dict[str, int] = field(default_factory=dict, repr=False)
    """How often each name was defined in this scope."""

    @property
    def signature(self) -> str:
        """The header on one line and without comments."""
        return _one_line(self.header)


def definitions(source: str) -> list[Definition]:
    r"""Return the module itself, then every class and function in ``source``, in order.

    A name that its scope defines again is called ``name#2``, ``name#3`` … in qualified names. Lines end in ``\n``.
    """
    module = Definition("module", "", "", column=-1)
    found, scopes = [module], [module]
    waiting: Definition | None = module  # for the first statement of its block
    text, start = source + "\n", 0
    while (logical := _logical_line(text, start)) is not None:
        column, line, start = logical
        if waiting is not None:
            if column > waiting.column:
                waiting.docstring = _docstring(line)
            waiting = None
        while scopes[-1].column >= column:
            scopes.pop()
        if header := _HEADER.match(line):
            waiting = _open(header, line, column, scopes)
            found.append(scopes[-1])
        if waiting is None:
            start = _end_of_body(text, start, scopes[-1].column + 1)
    return found


def _open(header: re.Match[str], line: str, column: int, scopes: list[Definition]) -> Definition | None:
    """Enter a new scope; return it if the first statement of its block is still to come."""
    colon = _header_end(line, header.end())
    new = _define(scopes[-1], header.group(1), header.group(2), column)
    new.header = line[header.end() : colon]
    scopes.append(new)
    body = line[_between_end(line, colon + 1) :]
    if not body:
        return new
    new.docstring = _docstring(body)
    return None


def _define(scope: Definition, kind: str, name: str, column: int) -> Definition:
    times = scope.times_defined[name] = scope.times_defined.get(name, 0) + 1
    unique = name if times == 1 else f"{name}#{times}"
    return Definition(kind, name, f"{scope.qualname}.{unique}" if scope.qualname else unique, column)


def _logical_line(text: str, start: int) -> tuple[int, str, int] | None:
    """Return column, text and end of the next logical line that is neither blank nor a comment; None at the end."""
    while start < len(text):
        if _SKIPS and (line := _LINE.match(text, start)):
            indent, statement = line.groups()
            start = line.end()
        else:
            end = _line_end(text, start)
            if end is None:
                return None
            statement = text[start:end].lstrip(" \t\f")
            indent = text[start : end - len(statement)]
            start = end + 1
        if statement and statement[0] != "#":
            return _column(indent), statement, start
    return None


def _end_of_body(text: str, start: int, column: int) -> int:
    """Return where the first line after ``start`` begins that could end the block or define something in it.

    Lines that start at ``column`` or further right and define nothing are skipped.
    """
    if column >= MAX_COLUMNS or not _SKIPS:
        return start
    if column not in _BODIES:
        indent = rf"[ ]{{{column},}}+ (?! [ \t\f\n\#] | (?: async | def | class ) [ \t] )"
        _BODIES[column] = re.compile(rf"(?: {indent} {_STATEMENT} \n | {_BLANK} )*+", _FLAGS)
    match = _BODIES[column].match(text, start)
    return start if match is None else match.end()


def _line_end(text: str, start: int) -> int | None:
    """Return where the newline stands that ends the logical line from ``start``, however deep its brackets are."""
    depth = 0
    for match in _BREAK.finditer(text, start):
        first = match.group()[0]
        if first in "([{":
            depth += 1
        elif first in ")]}":
            depth = max(0, depth - 1)
        elif first == "\n" and (depth == 0 or _DEFINES_AT_MARGIN.match(text, match.end())):
            return match.start()  # a bracket that was never closed hides no more than one definition
    return None


def _column(indent: str) -> int:
    return len(indent.rpartition("\f")[2].expandtabs(TAB_COLUMNS)) if indent.strip(" ") else len(indent)


def _header_end(line: str, start: int) -> int:
    """Return where the colon of a header stands; the end of the line when it has none."""
    depth = 0
    for match in _BREAK.finditer(line, start):
        first = match.group()[0]
        depth += (first in "([{") - (first in ")]}")
        if first == ":" and depth <= 0:
            return match.start()
    return len(line)


def _one_line(signature: str) -> str:
    """Return a signature without comments and line breaks."""
    bare = _BREAK.sub(lambda m: " " if m.group()[0] in "#\\\n" else m.group(), signature)
    text = " ".join(bare.split())
    return re.sub(r"([(\[{]) | (?=[)\]}])", r"\1", text).replace(",)", ")")


def _between_end(text: str, start: int) -> int:
    """Return where the next thing that is not space, comment or continuation starts."""
    match = _BETWEEN.match(text, start)
    return start if match is None else match.end()


def _docstring(statement: str) -> str | None:
    """Return the value of a statement that consists of string literals only, dedented; else None."""
    while statement.startswith("(") and statement.endswith(")"):
        statement = statement[1:-1].strip()
    value, position = "", 0
    while literal := _LITERAL.match(statement, position):
        prefix = literal.group(1).lower()
        if not set(prefix) <= set("ru"):
            return None  # bytes and formatted strings document nothing
        value += _value(literal.group(2), raw="r" in prefix)
        position = _between_end(statement, literal.end())
    if position == 0 or (position < len(statement) and statement[position] != ";"):
        return None
    return dedent(value)


def _value(literal: str, *, raw: bool) -> str:
    quotes = 3 if literal[:3] in ('"""', "'''") else 1
    end = len(literal) - quotes if literal.endswith(literal[:quotes]) else len(literal)
    body = literal[quotes:end]
    return body if raw or "\\" not in body else _ESCAPE.sub(_unescaped, body)


def _unescaped(match: re.Match[str]) -> str:
    code = match.group(1)
    if code[0] in "01234567":
        return chr(int(code, 8))
    if len(code) > 1:
        if code[0] == "N":
            return _named_character(code[2:-1]) or match.group()
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else match.group()
    if code in "\\'\"":
        return code
    return _SIMPLE_ESCAPES.get(code, match.group())


def _named_character(name: str) -> str | None:
    try:
        return unicodedata.lookup(name)
    except KeyError:
        return None


def dedent(text: str) -> str:
    """Return a docstring's text as PEP 257 reads it, without spaces at line ends."""
    lines = [line.rstrip() for line in text.expandtabs(TAB_COLUMNS).split("\n")]
    indents = [len(line) - len(line.lstrip()) for line in lines[1:] if line]
    margin = min(indents, default=0)
    return "\n".join([lines[0].lstrip(), *(line[margin:] for line in lines[1:])]).strip("\n")
