"""Dated facts about interfaces, from a stream's signatures: what is asked, what was true when, what is never true.

A fact is one thing about one function or class that has one right answer in each release: its ``signature``, the
``parameter`` at one place, the ``default`` of one parameter, the ``module`` it is defined in, its ``status``. A truth
counts in the periods in which a release of its package documents it, so in which the stream's documents state it;
only the status ``removed`` is stated by silence alone. Kinds are those of ``results.knowledge``.

Candidates are all truths that a fact ever has and, up to N_CANDIDATES, answers that are true of something else in the
package: so a stale answer can always be given, and a blind guess is right once in so many. What changed between two
releases is counted in ``_api_changes``, questions are worded in ``_api_questions``.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from clbench.errors import IntegrityError
from clbench.eval._api_signatures import Parameter, Signature, parse
from clbench.seeds import derive

FORMAT = 1
N_CANDIDATES = 4
MAX_SIGNATURE_CHARS = 120
MAX_DEFAULT_CHARS = 30
CONSTANT_SHARE = 4
"""Facts that never change are asked a quarter as often as may be those that do: there are so many."""
ATTRIBUTES = ("signature", "parameter", "default", "module", "status")
AVAILABLE, DEPRECATED, REMOVED = STATUSES = ("available", "deprecated", "removed")
NO_PARAMETER = "none"


@dataclass(frozen=True)
class Release:
    """One release of a package, the only one in its stage."""

    stage: int
    package: str
    version: str
    date: str

    @property
    def label(self) -> str:
        """How questions call it."""
        return f"{self.package} {self.version} ({self.date[:4]})"


@dataclass(frozen=True)
class Entry:
    """What a definition was in one release."""

    path: str
    signature: Signature | None
    documented: bool
    deprecated: bool


@dataclass(frozen=True)
class Definition:
    """A function or class by its dotted name; ``at`` maps stages to what it was then."""

    package: str
    name: str
    kind: str
    qualname: str
    at: Mapping[int, Entry]

    @property
    def module(self) -> str:
        """The module it is defined in."""
        return self.name[: -len(self.qualname) - 1]

    def document(self, stage: int) -> str:
        """Return the id of the stream's document about it in a stage."""
        return f"{self.package}:{self.at[stage].path}:{self.qualname}"


@dataclass(frozen=True)
class Package:
    """A package with its releases, in order, and its definitions."""

    name: str
    releases: tuple[Release, ...]
    definitions: tuple[Definition, ...]

    @cached_property
    def signatures(self) -> list[Signature]:
        """Every signature that there ever was, once, in order of its text."""
        found = {
            str(e.signature): e.signature for d in self.functions for e in d.at.values() if e.signature is not None
        }
        return [found[text] for text in sorted(found)]

    @cached_property
    def functions(self) -> list[Definition]:
        """Functions and methods."""
        return [d for d in self.definitions if d.kind == "def"]

    @cached_property
    def parameter_names(self) -> list[str]:
        """Names of all parameters, in an order that a hash decides."""
        return sorted({bare(p) for s in self.signatures for p in s.named}, key=_draw)

    @cached_property
    def defaults(self) -> list[str]:
        """All defaults, most frequent first."""
        counts = Counter(p.default for s in self.signatures for p in s.named if p.default is not None)
        return [value for value, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]

    @cached_property
    def modules(self) -> list[str]:
        """All modules."""
        return sorted({d.module for d in self.definitions})


def bare(parameter: Parameter) -> str:
    """Return a parameter without its default."""
    return f"{parameter.stars}{parameter.name}"


# --- reading


def read(content: bytes, where: object = None) -> tuple[tuple[str, ...], list[Package]]:
    """Return the stages' names and the packages of a stream's ``api.jsonl``.

    Raises:
        IntegrityError: it is not such a file.
    """
    try:
        head, *lines = (json.loads(line) for line in content.decode().splitlines())
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}")
        releases: dict[str, list[Release]] = defaultdict(list)
        for stage, package, version, date in head["releases"]:
            releases[package].append(Release(int(stage), str(package), str(version), str(date)))
        definitions: dict[str, list[Definition]] = defaultdict(list)
        for line in lines:
            definitions[line["package"]].append(_definition(line))
        packages = [
            Package(name, tuple(sorted(found, key=lambda r: r.stage)), tuple(definitions[name]))
            for name, found in sorted(releases.items())
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"the signatures cannot be read: {type(error).__name__} {error}",
            where=where,
            mend="delete the folder extras of the cache",
        ) from None
    return tuple(head["stages"]), packages


def _definition(line: Mapping[str, Any]) -> Definition:
    at = {
        int(stage): Entry(path, None if text is None else parse(text), bool(documented), bool(deprecated))
        for stage, path, text, documented, deprecated in line["at"]
    }
    return Definition(line["package"], line["name"], line["kind"], line["qualname"], at)


# --- facts


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One question with its answer in each release.

    ``subject`` is what the wording needs (names), ``values`` and ``kinds`` map the stages in which there is a truth to
    it and to what befell it, ``documents`` to the id of the document that states it, None where none does.
    """

    item: str
    package: str
    attribute: str
    subject: tuple[str, ...]
    values: dict[int, str]
    documents: dict[int, str | None]
    releases: dict[int, Release]
    candidates: tuple[str, ...] = ()
    pool: Callable[[], Iterator[str]] = field(default=lambda: iter(()), repr=False, compare=False)
    """Answers that are true of something else, the best first."""

    @property
    def changes(self) -> bool:
        """Whether there are several truths."""
        return len(set(self.values.values())) > 1

    @cached_property
    def kinds(self) -> dict[int, str]:
        """What befell the fact in each stage with a truth: new, kept, updated, reverted or obsolete."""
        found: dict[int, str] = {}
        seen: list[str] = []
        for stage in sorted(self.values):
            value = self.values[stage]
            if self.attribute == "status" and value == REMOVED:
                found[stage] = "obsolete"
            elif not seen:
                found[stage] = "new"
            elif value == seen[-1]:
                found[stage] = "kept"
            else:
                found[stage] = "reverted" if value in seen else "updated"
            seen.append(value)
        return found


def facts_of(packages: Sequence[Package], *, per_package: int) -> list[Fact]:
    """Return the facts to ask: of each package and attribute at most ``per_package`` that change, and some that do not.

    Which ones is decided by a hash of their names, so that a release more changes the choice little.
    """
    found = []
    for package in packages:
        for attribute in ATTRIBUTES:
            drafts = sorted(_DRAFTS[attribute](package), key=lambda fact: (_draw(fact.item), fact.item))
            changing = [fact for fact in drafts if fact.changes][:per_package]
            constant = [fact for fact in drafts if not fact.changes][: max(1, per_package // CONSTANT_SHARE)]
            chosen = (_with_candidates(fact) for fact in [*changing, *constant])
            found += sorted((f for f in chosen if len(f.candidates) > 1), key=lambda fact: fact.item)
    return found


@lru_cache(maxsize=100_000)
def _draw(*names: str) -> int:
    return derive(0, "api_change", *names)


def _with_candidates(fact: Fact) -> Fact:
    """Return a fact with its truths and as many other answers as make N_CANDIDATES, in alphabetical order."""
    truths = set(fact.values.values())
    others: list[str] = []
    for answer in fact.pool():
        if len(truths) + len(others) >= N_CANDIDATES:
            break
        if answer not in truths and answer not in others:
            others.append(answer)
    return replace(fact, candidates=tuple(sorted([*truths, *others])))


def _fact(
    package: Package,
    definition: Definition,
    attribute: str,
    values: Mapping[int, str | None],
    pool: Callable[[], Iterator[str]],
    *subject: str,
    detail: str = "",
) -> Iterator[Fact]:
    """Yield the fact, unless it has no truth; without a document in a stage there is none but of a removal."""
    true = {stage: value for stage, value in values.items() if value is not None}
    if true:
        yield Fact(
            item="/".join([package.name, definition.name, attribute, *([detail] if detail else [])]),
            package=package.name,
            attribute=attribute,
            subject=(definition.name, *subject),
            values=true,
            documents={stage: _document(definition, stage) for stage in true},
            releases={release.stage: release for release in package.releases if release.stage in true},
            pool=pool,
        )


def _document(definition: Definition, stage: int) -> str | None:
    entry = definition.at.get(stage)
    return definition.document(stage) if entry is not None and entry.documented else None


def _signed(definition: Definition) -> dict[int, Signature]:
    """Return the signatures of a function in the stages in which it is documented."""
    at = definition.at.items()
    return {stage: e.signature for stage, e in at if e.documented and e.signature is not None}


# signatures, parameters, defaults


def _signatures(package: Package) -> Iterator[Fact]:
    for definition in package.functions:
        signed = _signed(definition)
        texts = {stage: str(s) for stage, s in signed.items()}
        if any(s.named for s in signed.values()) and max(map(len, texts.values())) <= MAX_SIGNATURE_CHARS:
            yield from _fact(package, definition, "signature", texts, _other_signatures(package, signed[max(signed)]))


def _other_signatures(package: Package, like: Signature) -> Callable[[], Iterator[str]]:
    """Return signatures of the package, those of about as many parameters and as much text first."""

    def pool() -> Iterator[str]:
        length, first = len(str(like)), like.parameters[:1]

        def distance(other: Signature) -> tuple[int, int, int]:
            n = abs(len(other.parameters) - len(like.parameters))
            return (int(other.parameters[:1] != first), n + abs(len(str(other)) - length) // 8, _draw(str(other)))

        usable = [s for s in package.signatures if s.named and len(str(s)) <= MAX_SIGNATURE_CHARS]
        yield from map(str, sorted(usable, key=distance))

    return pool


def _parameters(package: Package) -> Iterator[Fact]:
    """Yield which parameter stands at one place: behind what all versions have in common, else anywhere."""
    for definition in package.functions:
        lists = {stage: [bare(p) for p in signature.named] for stage, signature in _signed(definition).items()}
        if not any(lists.values()) or any(NO_PARAMETER in names for names in lists.values()):
            continue
        place = _common_prefix(list(lists.values()))
        if place == min(map(len, lists.values())) == max(map(len, lists.values())):
            place = _draw(definition.name, "place") % place
        values = {stage: names[place] if place < len(names) else NO_PARAMETER for stage, names in lists.items()}
        before, detail = next(iter(lists.values()))[:place], str(place + 1)
        pool = _other_parameters(package, lists, place)
        yield from _fact(package, definition, "parameter", values, pool, *before, detail=detail)


def _common_prefix(lists: Sequence[Sequence[str]]) -> int:
    """Return how many first entries all lists share."""
    n = 0
    while all(len(names) > n and names[n] == lists[0][n] for names in lists):
        n += 1
    return n


def _other_parameters(package: Package, lists: Mapping[int, Sequence[str]], place: int) -> Callable[[], Iterator[str]]:
    """Return first what stands further on in the function itself, then parameters of others."""

    def pool() -> Iterator[str]:
        yield from dict.fromkeys(name for stage in sorted(lists, reverse=True) for name in lists[stage][place + 1 :])
        own = {name for names in lists.values() for name in names}
        others = [name for name in package.parameter_names if name not in own]
        start = _draw(*sorted(own)) % max(1, len(others))
        yield from others[start:] + others[:start]

    return pool


def _defaults(package: Package) -> Iterator[Fact]:
    """Yield the defaults that change, and one of every other function."""
    for definition in package.functions:
        values: dict[str, dict[int, str | None]] = defaultdict(dict)
        for stage, signature in _signed(definition).items():
            for parameter in signature.named:
                if parameter.default is not None and len(parameter.default) <= MAX_DEFAULT_CHARS:
                    values[parameter.name][stage] = parameter.default
        changing = sorted(name for name, found in values.items() if len(set(found.values())) > 1)
        drawn = sorted(values, key=lambda name: _draw(definition.name, name))[:1]
        for name in changing or drawn:
            truths = {value for value in values[name].values() if value is not None}
            if len({number(value) for value in truths}) == len(truths):  # 1 became 1.0: no change, and no constant
                pool = _other_defaults(package, truths)
                yield from _fact(package, definition, "default", values[name], pool, name, detail=name)


def number(text: str) -> float | str:
    """Return the number that a text writes, or the text: ``1`` and ``1.0`` are no two answers."""
    try:
        return float(text)
    except ValueError:
        return text


def _other_defaults(package: Package, truths: Iterable[str]) -> Callable[[], Iterator[str]]:
    """Return the package's defaults, the most frequent first; a number is there once, however it is written."""

    def pool() -> Iterator[str]:
        seen = {number(truth) for truth in truths}
        for default in package.defaults:
            if len(default) <= MAX_DEFAULT_CHARS and number(default) not in seen:
                seen.add(number(default))
                yield default

    return pool


# where it is, and whether


def _modules(package: Package) -> Iterator[Fact]:
    """Yield in which module a function or class of a name that nothing else has is defined."""
    found: dict[str, list[Definition]] = defaultdict(list)
    for definition in package.definitions:
        if "." not in definition.qualname:
            found[definition.qualname].append(definition)
    for qualname, homes in found.items():
        stages = [stage for one in homes for stage in one.at]
        if len(set(stages)) < len(stages) or len({one.kind for one in homes}) > 1:
            continue  # two of this name in one release
        first = min(homes, key=lambda one: min(one.at))
        values = {stage: one.module for one in homes for stage, e in one.at.items() if e.documented}
        documents: dict[int, str | None] = {
            stage: one.document(stage) for one in homes for stage in one.at if stage in values
        }
        for fact in _fact(package, first, "module", values, _other_modules(package, values), first.kind):
            item = f"{package.name}/{qualname}/module"
            yield replace(fact, item=item, subject=(qualname, first.kind), documents=documents)


def _other_modules(package: Package, values: Mapping[int, str]) -> Callable[[], Iterator[str]]:
    """Return other modules, those that share most of their name first."""

    def pool() -> Iterator[str]:
        truth = values[max(values)].split(".")

        def distance(module: str) -> tuple[int, int]:
            return -_common_prefix([truth, module.split(".")]), _draw(".".join(truth), module)

        yield from sorted(package.modules, key=distance)

    return pool


def _statuses(package: Package) -> Iterator[Fact]:
    """Yield what has become of a function or class; what moved elsewhere in the package is not asked."""
    if len(package.releases) < 2:
        return
    homes: dict[tuple[str, int], set[str]] = defaultdict(set)
    for definition in package.definitions:
        for stage in definition.at:
            homes[definition.qualname, stage].add(definition.module)
    for definition in package.definitions:
        values: dict[int, str | None] = {}
        moved = False
        for release in package.releases:
            stage, entry = release.stage, definition.at.get(release.stage)
            if entry is not None:
                values[stage] = (DEPRECATED if entry.deprecated else AVAILABLE) if entry.documented else None
            elif any(value is not None for value in values.values()):
                values[stage] = REMOVED
                moved |= bool(homes[definition.qualname, stage])
        if not moved:
            yield from _fact(package, definition, "status", values, lambda: iter(STATUSES), definition.kind)


_DRAFTS: dict[str, Callable[[Package], Iterator[Fact]]] = {
    "signature": _signatures,
    "parameter": _parameters,
    "default": _defaults,
    "module": _modules,
    "status": _statuses,
}
