"""``codedocs``: documentation of well-known Python packages, year by year from 2008 on, as a stream.

A manifest (``codedocs.yaml``, or one of your own) pins the releases of every stage. Documents are the docstrings of
modules, classes and functions and the sections of documentation pages, read from source distributions without
unpacking or executing anything. A document's id is ``package:path:qualified name`` or ``package:path#headings``,
without the version, so all its versions share it.

``codedocs:packages=numpy`` is the stream of one package. ``codedocs:manifest=FILE.yaml``, which is
``CodeDocs(Path("FILE.yaml"))`` in Python, streams another manifest; how to write one: docs/codedocs.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import yaml

from clbench import console, home, index
from clbench.archive import iter_members
from clbench.errors import ConfigError, IntegrityError, NotFoundError, did_you_mean
from clbench.files import atomic_path, digest_of, sha256_file
from clbench.index import PinnedFile
from clbench.stream import Change, Document, StageInfo, StreamSource
from clbench.streams import _api_records, _docstrings, _pages

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
MAX_LABEL_CHARS = 40
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
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_Digests = dict[int, int]
"""Digest of a document's id -> digest of its text."""
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


class YearlyManifest(pydantic.BaseModel):
    """The short form of a manifest with one stage a year: packages, each with its licence and a line per release.

    A line is ``version date n_bytes sha256 file``, and the licence after it where it is not the package's own.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    class Package(pydantic.BaseModel):
        """One package; releases before ``since`` are another project's, or not wanted."""

        model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

        licence: str
        since: int = 0
        releases: tuple[str, ...] = ()

    format: Literal[2]
    name: str
    years: str = pydantic.Field(pattern=r"^\d{4}-\d{4}$")
    until: str = pydantic.Field(pattern=r"^\d{4}-\d\d-\d\d$")
    """The day on which the last stage ends."""
    packages: dict[str, Package] = pydantic.Field(min_length=1)

    def written_out(self) -> Manifest:
        """Return the manifest in full: stages of years that have a release."""
        releases = [
            _release(name, package.licence, line)
            for name, package in self.packages.items()
            for line in package.releases
        ]
        first, last = map(int, self.years.split("-"))
        stages = []
        for year in range(first, last + 1):
            of_year = tuple(release for release in releases if release.date.startswith(f"{year}-"))
            end = min(f"{year}-12-31", self.until)
            if of_year:
                stages.append(Stage(name=str(year), start=f"{year}-01-01", end=end, releases=of_year))
        if sum(len(stage.releases) for stage in stages) < len(releases):
            raise ValueError(f"a release is not of the years {self.years}")
        return Manifest(format=1, name=self.name, stages=tuple(stages))


def _release(package: str, licence: str, line: str) -> Release:
    fields = line.split()
    if len(fields) not in (5, 6):
        raise ValueError(f"{line!r} is not 'version date n_bytes sha256 file'")
    version, date, n_bytes, sha256, file = fields[:5]
    return Release.model_validate(
        {
            "package": package,
            "version": version,
            "date": date,
            "licence": fields[5] if len(fields) == 6 else licence,
            "file": file,
            "sha256": sha256,
            "n_bytes": n_bytes,
        }
    )


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest of either form.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it is not YAML, or a field is missing, unknown or wrong; says which.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") == 2:
            return YearlyManifest.model_validate(content).written_out()
        return Manifest.model_validate(content)
    except FileNotFoundError:
        raise NotFoundError("the stream's manifest is missing", where=path, mend="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", where=path, mend="mend the manifest") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ConfigError(f"{field}: {first['msg']}", where=path, mend="mend the manifest") from None
    except ValueError as error:
        raise ConfigError(str(error), where=path, mend="mend the manifest") from None


class CodeDocs(StreamSource):
    """The documents of the releases that a manifest pins.

    Args:
        options: a manifest's path stands for the options with that manifest.

    Raises:
        NotFoundError: the manifest is missing, or it has no package of a name that is asked for.
        ConfigError: see ``read_manifest``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Which releases."""

        manifest: str = ""
        """YAML file that pins the releases; the built-in one if empty. The stream takes its name from it."""
        packages: tuple[str, ...] = ()
        """Only these packages (a+b), in the stages in which one of them has a release; all if empty."""

    name = "codedocs"
    heldout_max_per_group: int | None = 24
    vocab_size = 16384

    def __init__(self, options: Options | Path | None = None) -> None:
        super().__init__(self.Options(manifest=str(options)) if isinstance(options, Path) else options)
        self.manifest = read_manifest(self.manifest_path())
        if self.options.packages:
            self.manifest = _only(self.manifest, self.options.packages)
            # A stream of one package is small: fewer words to learn, and documents enough for narrow intervals.
            self.heldout_max_documents, self.heldout_max_per_group, self.vocab_size = None, 100, 4096
        self.name = self.manifest.name

    def manifest_path(self) -> Path:
        """Return where the manifest is."""
        given: str = self.options.manifest
        return Path(given).expanduser() if given else Path(__file__).with_suffix(".yaml")

    def stages(self) -> list[StageInfo]:
        """Return the stages of the manifest."""
        return [
            StageInfo(index=i, name=stage.name, start=stage.start, end=stage.end)
            for i, stage in enumerate(self.manifest.stages)
        ]

    def settings(self) -> dict[str, Any]:
        """Return the digest of the releases' pins and the version of the extraction."""
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
        for part in range(self.n_parts(stage)):
            yield from self.part(stage, part)

    def n_parts(self, stage: int) -> int:
        """Return the number of releases: each is read by itself."""
        return len(self.manifest.stages[stage].releases)

    def part(self, stage: int, part: int) -> Iterator[Document]:
        """Yield the documents of one release; see ``documents``."""
        release = self.manifest.stages[stage].releases[part]
        previous = self._previous(stage, release.package)
        before: _Digests = {} if previous is None else _digests_of(previous)
        now: _Digests = {}
        for identity, text in read_release(_path_of(release), release.package):
            key, digest = _digest(identity), _digest(text)
            now[key] = digest
            change = _change(digest, before.get(key))
            yield Document(id=identity, text=text, date=release.date, group=release.package, change=change)
        _save_digests(release, now)

    def late_extras(self) -> dict[str, int]:
        """Return the file of signatures that suite ``api_change`` asks about, see ``_api_records``."""
        return {_api_records.API: _api_records.VERSION}

    def late_extra(self, name: str) -> bytes:
        """Read all releases once more, for the signatures of what they define."""
        if name != _api_records.API:
            return super().late_extra(name)
        from rich.progress import track

        pins = [(i, release) for i, stage in enumerate(self.manifest.stages) for release in stage.releases]
        bar = track(pins, "signatures", console=console.stderr, transient=True, disable=not console.stderr.is_terminal)
        releases = (
            _api_records.ReleaseText(i, release.package, release.version, release.date, _modules(_path_of(release)))
            for i, release in bar
        )
        return _api_records.table([stage.name for stage in self.manifest.stages], releases, min_chars=MIN_CHARS)

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


def _only(manifest: Manifest, wanted: Sequence[str]) -> Manifest:
    """Return the manifest of some packages; its name says which, and stages without any of them are gone.

    Raises:
        NotFoundError: the manifest has no such package; near misses are suggested.
    """
    known = {_canonical(r.package): r.package for stage in manifest.stages for r in stage.releases}
    for name in wanted:
        if _canonical(name) not in known:
            raise NotFoundError(
                f"stream {manifest.name!r} has no package {name!r}", mend=did_you_mean(_canonical(name), known)
            )
    chosen = {_canonical(name) for name in wanted}
    stages = [
        stage.model_copy(update={"releases": tuple(r for r in stage.releases if _canonical(r.package) in chosen)})
        for stage in manifest.stages
    ]
    label = "-".join(sorted(chosen))
    if len(label) > MAX_LABEL_CHARS:
        label = f"{len(chosen)}-packages"
    return Manifest(
        format=1, name=f"{manifest.name}-{label}", stages=tuple(stage for stage in stages if stage.releases)
    )


def _canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


# digests of documents: what tells changed from unchanged without reading the release before again


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _digests_of(release: Release) -> _Digests:
    """Return the digests of a release: those that whoever read it last left on disk, else it is read again."""
    digests = _load_digests(release)
    if digests is None:
        documents = read_release(_path_of(release), release.package)
        digests = {_digest(identity): _digest(text) for identity, text in documents}
        _save_digests(release, digests)
    return digests


def _digests_path(release: Release) -> tuple[Path, str]:
    """Return where a release's digests lie, and what their place stands for."""
    address = digest_of({"sha256": release.sha256, "package": release.package, "extraction": EXTRACTION_VERSION})
    return home.sources_folder() / "codedocs-digests" / address[:2] / f"{address}.bin", address


def _save_digests(release: Release, digests: _Digests) -> None:
    """Write pairs of 64-bit digests under a sum that also covers their address."""
    path, address = _digests_path(release)
    if path.is_file():
        return
    pairs = np.array([list(digests), list(digests.values())], dtype="<u8").tobytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(hashlib.sha256(address.encode() + pairs).digest() + pairs)


def _load_digests(release: Release) -> _Digests | None:
    """Return a release's digests; None if they are not there. Broken or misplaced ones are deleted."""
    path, address = _digests_path(release)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(address.encode() + data[32:]).digest() != data[:32]:
        path.unlink(missing_ok=True)
        return None
    keys, values = np.frombuffer(data[32:], dtype="<u8").reshape(2, -1).tolist()
    return dict(zip(keys, values, strict=True))


def _path_of(release: Release) -> Path:
    path = home.downloads_folder() / release.file
    if not path.is_file():
        raise NotFoundError("a file of the stream is missing", where=path, mend="run `clbench prepare` first")
    if sha256_file(path) != release.sha256:
        raise IntegrityError("not the file that the manifest pins", where=path, mend="run `clbench prepare` again")
    return path


def _change(digest: int, before: int | None) -> Change:
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


def _modules(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the modules that may hold documents."""
    for member in iter_members(path, lambda name: name.endswith(".py") and is_wanted(_inner_path(name))):
        yield _inner_path(member.name), decode(member.data, python=True)


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
    letters = len("".join(words).encode("ascii", "ignore").translate(None, _NO_LETTERS))
    return n_chars >= MIN_PROSE_CHARS and letters >= MIN_LETTERS * n_chars and n_chars <= MAX_WORD_CHARS * len(words)
