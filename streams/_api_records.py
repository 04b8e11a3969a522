"""What the public functions and classes of a package look like in each of its releases: the facts of ``api_change``.

Records are read from source text by the scanner of ``_docstrings``, so Python 2 and 3 give the same under every
interpreter, and nothing is executed. What changed between releases, and what to ask about it, is left to the suite.

The file ``api.jsonl``: a first line with the stages and releases, then a line for every definition that was a document
of the stream in some release, whatever it was in the others:

    {"format": 1, "stages": ["2006-2008", …], "releases": [[0, "Werkzeug", "0.4", "2008-11-23"], …]}
    {"package": "Werkzeug", "name": "werkzeug.http.parse_date", "kind": "def", "qualname": "parse_date",
     "at": [[0, "werkzeug/http.py", "(value)", 1, 0], …]}

``at`` has an entry a release: stage, file, signature (null where the file defines the name several times, differently),
whether it is a document there, whether its docstring says that it is deprecated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from clbench.files import canonical_json
from clbench.streams import _docstrings

API = "api.jsonl"
FORMAT = 1
VERSION = 1
"""Raise it when anything below changes what comes out."""
_NO_API_FOLDER = re.compile(r"docs?|examples?|samples?|benchmarks?|bench|tools?|scripts?|bin|build|demos?|contrib")
"""Top folders whose modules nobody imports."""
_DEPRECATED = re.compile(
    r"^\.\.[ ]deprecated::|(\A|\n\n)[^\w\s]{0,3}deprecated\b(?![ ](param|arg|key|option|alias|in[ ]python))"
    r"|^this[ ]\w+[ ](is|has[ ]been|was)[ ](now[ ])?deprecated\b",
    re.MULTILINE | re.IGNORECASE,
)
"""At the margin of a docstring, so that a note about one parameter does not count."""


@dataclass
class Record:
    """One definition over all releases, by its dotted name."""

    package: str
    name: str
    kind: str
    qualname: str
    at: list[tuple[int, str, str | None, bool, bool]] = field(default_factory=list)

    def line(self) -> str:
        """Return the record's line of the file."""
        entries = [[stage, path, signature, int(doc), int(old)] for stage, path, signature, doc, old in self.at]
        return canonical_json(
            {
                "package": self.package,
                "name": self.name,
                "kind": self.kind,
                "qualname": self.qualname,
                "at": entries,
            }
        )


@dataclass(frozen=True)
class ReleaseText:
    """One release: its stage, package, version and date, and its modules as (file, source text)."""

    stage: int
    package: str
    version: str
    date: str
    modules: Iterable[tuple[str, str]]


def table(stages: Iterable[str], releases: Iterable[ReleaseText], *, min_chars: int) -> bytes:
    """Return the whole file.

    Args:
        stages: names, in order.
        releases: in order of their stages.
        min_chars: of a docstring that is a document.
    """
    heads: list[list[int | str]] = []
    found: dict[tuple[str, str], Record] = {}
    for release in releases:
        heads.append([release.stage, release.package, release.version, release.date])
        for record in _records(release, min_chars):
            known = found.setdefault((record.package, record.name), record)
            if known is not record and known.kind == record.kind:  # a class that became a function: the first stays
                known.at += record.at
    lines = [canonical_json({"format": FORMAT, "stages": list(stages), "releases": heads})]
    lines += [found[key].line() for key in sorted(found) if any(documented for *_, documented, _ in found[key].at)]
    return ("\n".join(lines) + "\n").encode()


def _records(release: ReleaseText, min_chars: int) -> Iterator[Record]:
    """Yield a record for every public name that a release defines, with one entry each."""
    found: dict[str, Record] = {}
    for path, source in release.modules:
        module = dotted(path)
        if module is None:
            continue
        for item in _docstrings.definitions(source):
            qualname = re.sub(r"#\d+", "", item.qualname)
            if item.kind == "module" or not is_public(qualname):
                continue
            text = item.docstring or ""
            signature = item.signature
            entry = (release.stage, path, signature, len(text) >= min_chars, bool(_DEPRECATED.search(text)))
            name = f"{module}.{qualname}"
            known = found.setdefault(name, Record(release.package, name, item.kind, qualname))
            known.at = [entry if not known.at else _both(known.at[0], entry, same=known.kind == item.kind)]
    yield from found.values()


def _both(
    first: tuple[int, str, str | None, bool, bool], second: tuple[int, str, str | None, bool, bool], *, same: bool
) -> tuple[int, str, str | None, bool, bool]:
    """Return the entry of a name that a release defines twice: its signature is known only if both agree."""
    signature = first[2] if same and first[2] == second[2] else None
    return first[0], first[1], signature, first[3], first[4] and second[4]


def dotted(path: str) -> str | None:
    """Return the module that a file is imported as; None for one that nobody imports."""
    parts = path.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts = parts[:-1]
    if not parts or _NO_API_FOLDER.fullmatch(parts[0]) or not all(map(str.isidentifier, parts)):
        return None
    return ".".join(parts) if is_public(".".join(parts)) else None


def is_public(name: str) -> bool:
    """Return whether no part of a dotted name is private; ``__init__`` is how a class is called, so it counts."""
    return all(not part.startswith("_") or part == "__init__" for part in name.split("."))
