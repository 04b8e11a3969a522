"""What changed in a package from one release to the next: the changes that make yesterday's answer wrong.

Counted over public functions and classes that one of the two releases documents. A parameter that goes while another
comes at its place, with the same default, was renamed; a function or class that goes while one of its name comes in
another module of the package has moved.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from clbench.eval._api_facts import Definition, Package, bare
from clbench.eval._api_signatures import Parameter, Signature

CHANGES = (
    "added",
    "removed",
    "moved",
    "deprecated",
    "parameter added",
    "parameter removed",
    "parameter renamed",
    "parameters reordered",
    "default changed",
)


def count_changes(packages: Iterable[Package]) -> dict[int, Counter[str]]:
    """Return, per stage, how often each of CHANGES came with a release of that stage."""
    found: dict[int, Counter[str]] = defaultdict(Counter)
    for package in packages:
        for before, after in pairwise(release.stage for release in package.releases):
            found[after] += Counter(_changes(package, before, after))
    return dict(sorted(found.items()))


def _changes(package: Package, before: int, after: int) -> Iterator[str]:
    """Yield every change of a package between the releases of two stages."""
    gone: dict[str, int] = defaultdict(int)
    come: dict[str, int] = defaultdict(int)
    for definition in package.definitions:
        old, new = definition.at.get(before), definition.at.get(after)
        if old is not None and new is not None and (old.documented or new.documented):
            yield from _changed(definition, before, after)
        elif old is not None and new is None and old.documented:
            gone[definition.qualname] += 1
        elif new is not None and old is None and new.documented:
            come[definition.qualname] += 1
    for qualname in sorted(gone.keys() | come.keys()):
        moved = min(gone[qualname], come[qualname])
        yield from ["moved"] * moved
        yield from ["removed"] * (gone[qualname] - moved) + ["added"] * (come[qualname] - moved)


def _changed(definition: Definition, before: int, after: int) -> Iterator[str]:
    """Yield what changed about one definition that both releases have."""
    old, new = definition.at[before], definition.at[after]
    if new.deprecated and not old.deprecated:
        yield "deprecated"
    if definition.kind == "def" and old.signature is not None and new.signature is not None:
        yield from signature_changes(old.signature, new.signature)


def signature_changes(old: Signature, new: Signature) -> Iterator[str]:
    """Yield the changes from one parameter list to another."""
    was, now = {bare(p): p for p in old.named}, {bare(p): p for p in new.named}
    removed, added = [name for name in was if name not in now], [name for name in now if name not in was]
    for name in list(removed):
        place = list(was).index(name)
        there = list(now)[place] if place < len(now) else ""
        if there in added and _same_kind(was[name], now[there]):
            removed.remove(name)
            added.remove(there)
            yield "parameter renamed"
    yield from ["parameter removed"] * len(removed) + ["parameter added"] * len(added)
    common = [name for name in was if name in now]
    if common != [name for name in now if name in was]:
        yield "parameters reordered"
    for name in common:
        if was[name].default is not None and now[name].default is not None and was[name].default != now[name].default:
            yield "default changed"


def _same_kind(old: Parameter, new: Parameter) -> bool:
    return (old.stars, old.default) == (new.stars, new.default)
