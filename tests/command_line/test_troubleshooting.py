"""The lines that the troubleshooting page explains are lines that the program can say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
VARIABLE = re.compile(r"…|(?<!\w)'[^']*'|\b[NMX]\b|\d+|\bnan\b|\bloss is\b")


def quoted_lines() -> list[str]:
    """Return what stands in backquotes in the first column of the tables."""
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| ") and "the line says" not in line]
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]


def said() -> list[str]:
    """Return the constant text of every string of the engine and the content, formatted values as ``…``."""
    texts = []
    for folder in ("clbench", "eval", "methods", "streams", "leaderboard"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


@pytest.fixture(scope="module")
def everything_said() -> str:
    return "\n".join(said())


@pytest.mark.parametrize("quote", [quote for quote in quoted_lines() if not quote.startswith("--")])
def test_the_program_says_so(quote: str, everything_said: str) -> None:
    """Three words in a row at least, as names and numbers may stand anywhere between."""
    words = max((piece.strip(" ;:,()").split() for piece in VARIABLE.split(quote)), key=len)
    windows = [" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))]
    assert any(len(window) >= 10 and window in everything_said for window in windows), windows
