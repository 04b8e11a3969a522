from __future__ import annotations

import ast
import sysconfig
import warnings
from pathlib import Path

import pytest

from clbench.streams import _docstrings
from clbench.streams._docstrings import dedent, definitions

PYTHON_2 = '''\
# -*- coding: latin-1 -*-
"""A module
of Python 2."""
import os, sys

print "no function", `os`
exec "x = 1" in {}

class Old:
    u"""An old-style class."""

    def method(self, (a, b), c=0777, *args):
\tur"""Tuple \\parameters and tabs."""
\traise ValueError, "three-argument", None

    class Inner(Old):
        'Inner ' "class."
        def deep(self): "On one line."; return 1

def plain(x,
          y={"a": [1, 2]},  # a comment: with a colon
          z="text: # no comment"):
    # before the docstring

    "Plain\\n\\ttext \\x41\\101 \\q."

if sys:
    def plain(x): """Again."""
async def go(): pass
def nothing():
    x = """not a docstring"""
def number():
    """not""" + "this"
def formatted():
    f"""not this"""
def raw_bytes():
    b"""nor this"""
'''


def found(source: str) -> dict[str, str | None]:
    return {item.qualname: item.docstring for item in definitions(source)}


def test_python_2() -> None:
    assert found(PYTHON_2) == {
        "": "A module\nof Python 2.",
        "Old": "An old-style class.",
        "Old.method": "Tuple \\parameters and tabs.",
        "Old.Inner": "Inner class.",
        "Old.Inner.deep": "On one line.",
        "plain": "Plain\n\ntext AA \\q.".replace("\n\n", "\n"),
        "plain#2": "Again.",
        "go": None,
        "nothing": None,
        "number": None,
        "formatted": None,
        "raw_bytes": None,
    }


def test_signatures_stand_on_one_line_without_comments() -> None:
    signatures = {item.qualname: item.signature for item in definitions(PYTHON_2)}
    assert signatures["Old.method"] == "(self, (a, b), c=0777, *args)"
    assert signatures["plain"] == '(x, y={"a": [1, 2]}, z="text: # no comment")'
    source = "def f[T: (int, str)](\n    x: T,\n    *,\n    y: dict[str, int] = {'a': 1},\n) -> 'a: b':\n    'Doc.'\n"
    [_, item] = definitions(source)
    assert (item.signature, item.docstring) == (
        "[T: (int, str)](x: T, *, y: dict[str, int] = {'a': 1}) -> 'a: b'",
        "Doc.",
    )


@pytest.mark.parametrize(
    "source",
    [
        "def broken(:\n    'Doc.'\ndef next():\n    'Next.'\n",
        "x = (1, 2\ndef next():\n    'Next.'\n",
        "x = '''never closed\ndef next():\n    'Next.'\n",
        'f"{x["a"]}"\ndef next():\n    "Next."\n',
        "",
        "\n\n",
        "class",
        "def f():",
        '"""never closed',
        "\\",
    ],
)
def test_text_that_is_no_python_raises_nothing(source: str) -> None:
    items = found(source)
    if "next" in items:
        assert items["next"] == "Next."


def test_dedent_is_that_of_pep_257() -> None:
    assert dedent("First.\n\n    Indented \n      more\n\n    ") == "First.\n\nIndented\n  more"
    assert dedent("\n    All\n\tthe same\n") == "All\n    the same"


def of_ast(source: str) -> list[tuple[str, str | None]]:
    """The same through ``ast``: independent of the scanner but for the dedenting."""
    items: list[tuple[str, str | None]] = []

    def add(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        text = ast.get_docstring(node, clean=False)
        items.append((name, None if text is None else dedent(text)))

    def visit(node: ast.AST, scope: str, times: dict[str, int]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                times[child.name] = times.get(child.name, 0) + 1
                name = child.name if times[child.name] == 1 else f"{child.name}#{times[child.name]}"
                qualname = f"{scope}.{name}" if scope else name
                add(child, qualname)
                visit(child, qualname, {})
            else:
                visit(child, scope, times)

    tree = ast.parse(source)
    add(tree, "")
    visit(tree, "", {})
    return items


def test_scanner_equals_ast_over_the_standard_library() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(library.glob("*.py"))[::3]  # all of them equal too, but take a minute with packages
    n_documented = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in paths:
            try:
                source = path.read_text(encoding="utf-8").replace("\r\n", "\n")
                expected = of_ast(source)
            except (SyntaxError, UnicodeDecodeError):
                continue
            assert [(item.qualname, item.docstring) for item in definitions(source)] == expected, path
            n_documented += sum(text is not None for _, text in expected)
    assert n_documented > 600


def test_scanner_uses_no_interpreter() -> None:
    """What comes out may not depend on the grammar of the Python that runs it."""
    source = Path(_docstrings.__file__).read_text(encoding="utf-8")
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "re", "unicodedata", "collections.abc", "dataclasses"}
