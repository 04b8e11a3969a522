"""Documentation of dated Python packages as a stream: a manifest pins the releases of every stage.

Documents are the docstrings of modules, classes and functions and the sections of documentation pages, read
from source distributions without unpacking or executing anything. A document's id is
``package:path:qualified name`` or ``package:path#headings``, without the version, so all its versions share it.

Write a manifest of your own (docs/codedocs.md) and stream it with ``CodeDocs(Path("manifest.yaml"))``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from clbench import home, index
from clbench.archive import iter_members
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import digest_of, sha256_bytes, sha256_file
from clbench.index import PinnedFile
from clbench.stream import Change, Document, StageInfo, StreamSource
from clbench.streams import _docstrings, _pages

EXTRACTION_VERSION = 1
"""Raise it when anything below changes what comes out: it is part of the address of built streams."""
MIN_CHARS = 100
"""A shorter docstring or section says too little to be a document."""
MAX_SIGNATURE_CHARS = 200
MIN_PROSE_CHARS = 80
"""Characters of a page's section, without spaces and markup lines."""
MIN_LETTERS = 0.6
"""Share of letters in those; set by reading what falls below, as is the next."""
MAX_WORD_CHARS = 14
"""Mean length of what stands between spaces on a page."""
LICENCES = frozenset({"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT", "PSF-2.0"})
"""Permissive, that is: the text may be copied, changed and passed on. SPDX names where there is one."""

PAGE_SUFFIXES = frozenset({"rst", "md", "txt"})
_SKIPPED_FOLDER = re.compile(
    r"_?tests?|testing|test_?data|testsuite|fixtures|.*\.egg-info|node_modules|_?vendor(ed)?|third_?party|extern(als?)?",
    re.IGNORECASE,
)
_SKIPPED_PAGE_FOLDER = re.compile(
    r"_build|_sources|locales?|changelogs?|changes|whats[-_]?new|releases?|release[-_]?notes|newsfragments|news"
    r"|licen[cs]es?|requirements|(ca)?certs|includes?|templates?|static|data",
    re.IGNORECASE,
)
_SKIPPED_PAGE = re.compile(
    r"(licen[cs]e|copying|copyright|notice|authors|contributors|credits|thanks|change|history|news|release|whats[-_]?new"
    r"|todo|manifest|sources|requires|requirements|top_level|entry_points|dependency|cmakelists|robots|version"
    r"|migration|upgrad|api_\d|contributing|code[-_]of[-_]conduct|.*certs|.*_(de|es|fr|ja|ko|pt|ru|zh)$).*",
    re.IGNORECASE,
)
_SKIPPED_MODULE = re.compile(
    r"setup|ez_setup|distribute_setup|bootstrap|versioneer|conftest|conf|_version|tests?_.*|.*_test|tests?"
)
_MARKUP_LINE = re.compile(r"^[ \t]*(\.\.([ \t].*)?|:[\w -]+:.*|(\W)\3{2,})$", re.MULTILINE)
"""Directives, their options and rules under headings."""
_NO_LETTER = re.compile(r"[^A-Za-z]+")
_COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")


class Release(pydantic.BaseModel):
    """One pinned source distribution; ``date`` is the day of its upload."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    package: str
    version: str
    date: str = pydantic.Field(pattern=r"^\d{4}-\d\d-\d\d$")
    licence: str
    file: str
    sha256: str
    n_bytes: int

    @pydantic.field_validator("licence")
    @classmethod
    def _permissive(cls, licence: str) -> str:
        if licence not in LICENCES:
            raise ValueError(f"{licence!r} is not one of the permissive licences {', '.join(sorted(LICENCES))}")
        return licence

    def pinned(self) -> PinnedFile:
        """Return what ``clbench.index`` has to fetch."""
        return PinnedFile(project=self.package, filename=self.file, sha256=self.sha256, n_bytes=self.n_bytes)


class Stage(pydantic.BaseModel):
    """One period: its name, first and last day, and the releases that stand for it."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: str
    start: str = pydantic.Field(pattern=r"^\d{4}-\d\d-\d\d$")
    end: str = pydantic.Field(pattern=r"^\d{4}-\d\d-\d\d$")
    releases: tuple[Release, ...] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _dated(self) -> Stage:
        for release in self.releases:
            if not self.start <= release.date <= self.end:
                raise ValueError(f"{release.file} of {release.date} is not in {self.start} to {self.end}")
        if len({release.package for release in self.releases}) < len(self.releases):
            raise ValueError(f"stage {self.name} has two releases of one package")
        return self


class Manifest(pydantic.BaseModel):
    """A stream of releases, stages in order of time."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    name: str
    stages: tuple[Stage, ...] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Manifest:
        for earlier, later in pairwise(self.stages):
            if later.start <= earlier.end:
                raise ValueError(f"stage {later.name} starts before {earlier.name} ends")
        return self


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it is not YAML, or a field is missing, unknown or wrong; says which.
    """
    try:
        return Manifest.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise NotFoundError("the stream's manifest is missing", where=path, mend="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", where=path, mend="mend the manifest") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ConfigError(f"{field}: {first['msg']}", where=path, mend="mend the manifest") from None


class CodeDocs(StreamSource):
    """The documents of the releases that a manifest pins.

    Args:
        manifest: the YAML file; the stream takes its name from it.

    Raises:
        NotFoundError, ConfigError: see ``read_manifest``.
    """

    def __init__(self, manifest: Path) -> None:
        self.manifest = read_manifest(manifest)
        self.name = self.manifest.name
        self._digests: dict[str, dict[str, str]] = {}
        """Per file of the manifest: document id -> sha256 of its text, once it was read."""

    def stages(self) -> list[StageInfo]:
        """Return the stages of the manifest."""
        return [
            StageInfo(index=i, name=stage.name, start=stage.start, end=stage.end)
            for i, stage in enumerate(self.manifest.stages)
        ]

    def settings(self) -> dict[str, Any]:
        """Return the digest of the manifest's content and the version of the extraction."""
        return {"manifest_sha256": digest_of(self.manifest.model_dump()), "extraction": EXTRACTION_VERSION}

    def files(self) -> list[PinnedFile]:
        """Return every file the stream is made of."""
        return [release.pinned() for stage in self.manifest.stages for release in stage.releases]

    def fetch(self) -> None:
        """Bring the files of all stages into the downloads folder; those that are there are only checked."""
        index.fetch(self.files())

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield the documents of one stage: releases in the manifest's order, each in its archive's order.

        Raises:
            NotFoundError: a file was not fetched.
            IntegrityError: a file is not the pinned one, or its archive is damaged or unsafe.
        """
        for release in self.manifest.stages[stage].releases:
            previous = self._previous(stage, release.package)
            before = None if previous is None else self._digests_of(previous)
            digests: dict[str, str] = {}
            for identity, text in read_release(_path_of(release), release.package):
                digests[identity] = sha256_bytes(text.encode())
                change = _change(digests[identity], None if before is None else before.get(identity))
                yield Document(id=identity, text=text, date=release.date, group=release.package, change=change)
            self._digests[release.file] = digests

    def summary(self) -> list[dict[str, Any]]:
        """Return, per stage, counts of documents by change kind, text bytes, download bytes, packages and licences."""
        return [self._summary_of(i, stage) for i, stage in enumerate(self.manifest.stages)]

    def _summary_of(self, i: int, stage: Stage) -> dict[str, Any]:
        counts = dict.fromkeys(("new", "changed", "unchanged"), 0)
        n_bytes = 0
        for document in self.documents(i):
            counts[document.change] += 1
            n_bytes += len(document.text.encode())
        return {
            "stage": stage.name,
            "documents": counts,
            "n_bytes": n_bytes,
            "download_bytes": sum(release.n_bytes for release in stage.releases),
            "packages": {release.package: release.version for release in stage.releases},
            "licences": sorted({release.licence for release in stage.releases}),
        }

    def _previous(self, stage: int, package: str) -> Release | None:
        """Return the last release of ``package`` in an earlier stage."""
        for earlier in reversed(self.manifest.stages[:stage]):
            for release in earlier.releases:
                if release.package == package:
                    return release
        return None

    def _digests_of(self, release: Release) -> dict[str, str]:
        if release.file not in self._digests:
            documents = read_release(_path_of(release), release.package)
            self._digests[release.file] = {identity: sha256_bytes(text.encode()) for identity, text in documents}
        return self._digests[release.file]


def _path_of(release: Release) -> Path:
    path = home.downloads_folder() / release.file
    if not path.is_file():
        raise NotFoundError("a file of the stream is missing", where=path, mend="run `clbench prepare` first")
    if sha256_file(path) != release.sha256:
        raise IntegrityError("not the file that the manifest pins", where=path, mend="run `clbench prepare` again")
    return path


def _change(digest: str, before: str | None) -> Change:
    if before is None:
        return "new"
    return "unchanged" if digest == before else "changed"


def read_release(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of the documents of one source distribution; a text that it repeats comes once.

    Raises:
        IntegrityError: the archive is damaged or unsafe, see ``clbench.archive``.
    """
    seen: set[str] = set()
    for member in iter_members(path, lambda name: is_wanted(_inner_path(name))):
        inner = _inner_path(member.name)
        extract = _module_documents if inner.endswith(".py") else _page_documents
        for name, head, body in extract(inner, member.data):
            body = _CONTROL.sub("", body).strip()
            if len(body) < MIN_CHARS or body in seen:
                continue
            seen.add(body)
            yield f"{package}:{name}", f"{head}\n\n{body}" if head else body


def _inner_path(name: str) -> str:
    """Return a member's path without the folder that names the version, nor ``src`` or ``lib`` above a package."""
    _top, _, inner = name.partition("/")
    first, _, rest = inner.partition("/")
    return rest if first in ("src", "lib") and rest else inner


def is_wanted(inner: str) -> bool:
    """Return whether a file may hold documents: a module or a page that is no test, licence, change log or data."""
    *folders, file = inner.split("/")
    stem, _, suffix = file.rpartition(".")
    if not stem or stem.startswith(".") or any(_SKIPPED_FOLDER.fullmatch(folder) for folder in folders):
        return False
    if suffix == "py":
        return not _SKIPPED_MODULE.fullmatch(stem)
    if suffix not in PAGE_SUFFIXES or any(_SKIPPED_PAGE_FOLDER.fullmatch(folder) for folder in folders):
        return False
    return not _SKIPPED_PAGE.fullmatch(stem)


def decode(data: bytes, *, python: bool) -> str:
    """Return text with plain line ends: the declared encoding, else UTF-8, else Latin-1, which takes any bytes."""
    declared = [m.group(1).decode() for line in data.split(b"\n", 2)[:2] if (m := _COOKIE.match(line))]
    for encoding in [*(declared[:1] if python else []), "utf-8", "latin-1"]:
        try:
            text = data.decode(encoding)
        except (UnicodeError, LookupError):
            continue
        return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    raise AssertionError("Latin-1 decodes everything")


def _module_documents(inner: str, data: bytes) -> Iterator[tuple[str, str, str]]:
    """Yield (name, head line, docstring) of what one module defines."""
    dotted = inner.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for item in _docstrings.definitions(decode(data, python=True)):
        if item.docstring is None:
            continue
        for part, text in enumerate(_pages.split_long(item.docstring), start=1):
            name = f"{inner}:{item.qualname}" + (f"~{part}" if part > 1 else "")
            yield name, _head(item, dotted), text


def _head(item: _docstrings.Definition, dotted: str) -> str:
    """Return the line above a docstring: what it documents, with its signature unless that is very long."""
    if item.kind == "module":
        return f"module {dotted}"
    scope = item.qualname.rpartition(".")[0]
    name = ".".join(part for part in (dotted, re.sub(r"#\d+", "", scope), item.name) if part)
    signature = item.signature if len(item.signature) <= MAX_SIGNATURE_CHARS else "(...)"
    return f"{item.kind} {name}{signature}"


def _page_documents(inner: str, data: bytes) -> Iterator[tuple[str, str, str]]:
    """Yield (name, no head line, text) of the sections of a page that reads like prose."""
    text = decode(data, python=False)
    for section in _pages.sections(text, markdown=inner.endswith(".md")):
        if is_prose(section.text):
            yield f"{inner}#{section.path}" if section.path else inner, "", section.text


def is_prose(text: str) -> bool:
    """Return whether a text says something itself, and not mostly in tables, numbers, markup or keys."""
    words = _MARKUP_LINE.sub("", text).split()
    n_chars = sum(map(len, words))
    letters = len(_NO_LETTER.sub("", "".join(words)))
    return n_chars >= MIN_PROSE_CHARS and letters >= MIN_LETTERS * n_chars and n_chars <= MAX_WORD_CHARS * len(words)
