"""A package with three releases whose every change is known, for tests of what is asked about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from clbench import home
from tests.streams.test_codedocs import sdist

WORDS = "It does what its name says, which takes a sentence that is long enough to be worth a document of its own."
STAGES = {"2008": "2008-05-01", "2012": "2012-06-01", "2020": "2020-12-31"}
N_FILLERS = 30

CORE: tuple[dict[str, str], ...] = (
    {
        "connect": "a, b",
        "shade": "x, mode='light'",
        "walk": "start, depth=None",
        "relocate": "x",
        "old": "x",
        "gone": "x, size=3",
        "count": "n=1",
    },
    {
        "connect": "a, b, weight=1",
        "shade": 'x, mode=u"dark"',
        "walk": "root, depth=None",
        "old": "x",
        "count": "n=1.0",
    },
    {"connect": "a, b, weight: float = 1", "shade": "x, mode='light'", "walk": "root, depth=None", "count": "n=2"},
)
"""Signatures of module graphs.core in each release."""
MOVED: tuple[dict[str, str], ...] = ({}, {"relocate": "x"}, {"relocate": "x", "born": "y, z=None"})
"""Those of graphs.moves."""


def module(functions: dict[str, str], release: int) -> str:
    """Return a module's source; ``old`` is deprecated in the second release."""
    text = []
    for name, parameters in functions.items():
        first = "Deprecated, use connect()." if name == "old" and release == 1 else f"Work on {name}."
        text.append(f'def {name}({parameters}):\n    """{first} {WORDS} About {name}."""\n')
    return "\n".join(text)


def write_manifest(folder: Path) -> Path:
    """Write three source distributions into the downloads folder, and the manifest that pins them."""
    stages: list[dict[str, Any]] = []
    for release, (year, date) in enumerate(STAGES.items()):
        fillers = {f"filler_{i}": f"value_{i}, limit_{i % 7}={i % 5}" for i in range(N_FILLERS)}
        files: dict[str, str | bytes] = {
            "graphs/core.py": module(CORE[release], release),
            "graphs/moves.py": module(MOVED[release], release),
            "graphs/fillers.py": module(fillers, release),
            "graphs/far/away.py": module({"distant": "x"}, release),
        }
        version = f"{release + 1}.0"
        name = f"graphs-{version}"
        pin = sdist(home.downloads_folder() / f"{name}.tar.gz", files, name)
        one = {"package": "graphs", "version": version, "date": date, "licence": "MIT", **pin}
        stages.append({"name": year, "start": f"{year}-01-01", "end": f"{year}-12-31", "releases": [one]})
    path = folder / "graphs.yaml"
    path.write_text(yaml.safe_dump({"format": 1, "name": "graphs", "stages": stages}), encoding="utf-8")
    return path
