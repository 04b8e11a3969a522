"""Which posts an arm takes: thresholds and labels come in as a pool of numbers, places and lengths go out.

Posts are drawn by a hash of their identity, so that a draw depends neither on the order of the files nor on the
machine, and a smaller draw is the beginning of a larger one. Texts are not seen here: see ``posts``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError
from clbench.seeds import permutation

IntArray = NDArray[np.int64]
Chosen = tuple[IntArray, IntArray]
"""Places in the pool, and how many units of each are kept."""


@dataclass
class Pool:
    """The posts that an arm may take: one element a post in every array."""

    file: array[int] = field(default_factory=lambda: array("i"))
    row: array[int] = field(default_factory=lambda: array("q"))
    arm: array[int] = field(default_factory=lambda: array("b"))
    """Place in ``arms_of``; -1: not yet known (within)."""
    length: array[int] = field(default_factory=lambda: array("q"))
    popularity: array[float] = field(default_factory=lambda: array("d"))
    community: array[int] = field(default_factory=lambda: array("i"))
    key: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of the identity and the seed: the order in which posts are drawn."""
    communities: dict[str, int] = field(default_factory=dict)
    n_rows: int = 0

    def numpy(self, name: str) -> NDArray[Any]:
        """Return a column as an array."""
        column = getattr(self, name)
        return np.frombuffer(column, dtype=column.typecode) if len(column) else np.zeros(0, column.typecode)


@dataclass(frozen=True)
class Drawn:
    """What was drawn: places in the pool in the order of the files, and how many units of each are kept."""

    place: IntArray
    arm: IntArray
    n_units: IntArray
    eligible: dict[str, dict[str, int]]
    """Arm -> posts and units that it could have taken."""
    binding: str | None
    """The arm that ran out first, or ``n_units``."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How much is drawn.

    ``within``: the arms are top and bottom of every community. ``match``: as many units in every arm; else all they
    have, at most ``n_units``.
    """

    arms: tuple[str, ...]
    where: str
    within: bool = False
    match: bool = True
    n_units: int | None = None
    quantile: float = 0.25
    seed: int = 0


def draw(pool: Pool, rule: Rule) -> Drawn:
    """Draw posts by their hash until every arm has as much as asked; the last post is cut.

    Raises:
        ConfigError: an arm has no posts.
    """
    length = pool.numpy("length").astype(np.int64)
    arm = quartiles(pool, rule.quantile) if rule.within else pool.numpy("arm").astype(np.int64)
    order = np.argsort(pool.numpy("key"), kind="stable")
    eligible = {
        name: {"posts": int((arm == a).sum()), "units": int(length[arm == a].sum())} for a, name in enumerate(rule.arms)
    }
    if empty := [name for name, found in eligible.items() if not found["posts"]]:
        raise ConfigError(
            f"arm {empty[0]} has no posts among {pool.n_rows:,} rows",
            where=rule.where,
            mend="loosen the thresholds (short, long, popular, unpopular), or bring more posts",
        )
    if rule.within:
        chosen, binding = _within(pool, arm, length, order, rule)
    else:
        budget, binding = _budget({name: found["units"] for name, found in eligible.items()}, rule)
        chosen = [first_units(order[arm[order] == a], length, budget) for a in range(len(rule.arms))]
    place = np.concatenate([places for places, _ in chosen])
    units = np.concatenate([kept for _, kept in chosen])
    by_file = np.argsort(place, kind="stable")
    return Drawn(place[by_file], arm[place[by_file]], units[by_file], eligible, binding)


def _budget(units: dict[str, int], rule: Rule) -> tuple[int | None, str | None]:
    """Return how many units each arm may hold, and what bound them."""
    smallest = min(units, key=lambda name: (units[name], name))
    if not rule.match:
        return rule.n_units, None
    if rule.n_units is not None and rule.n_units <= units[smallest]:
        return rule.n_units, "n_units"
    return units[smallest], smallest


def first_units(order: IntArray, length: IntArray, budget: int | None) -> Chosen:
    """Return the first posts of an order that hold ``budget`` units (all without one), and units kept of each."""
    kept = length[order]
    if budget is None:
        return order, kept
    before = np.cumsum(kept) - kept
    order, kept, before = order[before < budget], kept[before < budget], before[before < budget]
    return order, np.minimum(kept, budget - before)


def quartiles(pool: Pool, quantile: float) -> IntArray:
    """Return the arm of every post within its community: 0 top, 1 bottom, -1 between.

    The bottom holds the ``quantile`` of the community's posts with the lowest popularity, and those as popular as the
    last of them; the top likewise. A community where the two would meet is left out: popularity tells nothing there.
    """
    community, popularity = pool.numpy("community"), pool.numpy("popularity")
    arm = np.full(len(community), -1, np.int64)
    order = np.lexsort((popularity, community))
    starts = np.flatnonzero(np.diff(community[order], prepend=-1)).tolist()
    for begin, end in zip(starts, [*starts[1:], len(order)], strict=True):
        members = order[begin:end]
        values = popularity[members]
        limit = max(1, int(quantile * len(members)))
        low, high = values[limit - 1], values[-limit]
        if low < high:
            arm[members[values <= low]] = 1
            arm[members[values >= high]] = 0
    return arm


def _within(
    pool: Pool, arm: IntArray, length: IntArray, order: IntArray, rule: Rule
) -> tuple[list[Chosen], str | None]:
    """Draw as many units of top and bottom from every community; ``n_units`` takes whole communities at random."""
    community = pool.numpy("community")
    n = len(pool.communities)
    totals = np.stack([np.bincount(community[arm == a], length[arm == a], minlength=n) for a in (0, 1)]).astype(int)
    budget = totals.min(axis=0)
    binding = "communities"
    if rule.n_units is not None:
        mixed = permutation(n, rule.seed, "posts", "communities")
        before = np.cumsum(budget[mixed]) - budget[mixed]
        budget[mixed] = np.clip(rule.n_units - before, 0, budget[mixed])
        binding = "n_units" if int(budget.sum()) == rule.n_units else binding
    by_community = order[np.argsort(community[order], kind="stable")]  # the draw's order within each
    chosen: list[Chosen] = []
    for a in (0, 1):
        mine = by_community[arm[by_community] == a]
        starts = np.flatnonzero(np.diff(community[mine], prepend=-1)).tolist()
        parts = [
            first_units(mine[i:j], length, int(budget[community[mine[i]]]))
            for i, j in zip(starts, [*starts[1:], len(mine)], strict=True)
        ]
        chosen.append((np.concatenate([p for p, _ in parts]), np.concatenate([k for _, k in parts])))
    return chosen, binding


def shared(communities: NDArray[Any], arm: IntArray, arms: Iterable[str]) -> list[dict[str, Any]]:
    """Return, per pair of arms, how many communities both draw from and which share of each arm's posts that is.

    Where arms draw from different communities a difference between them may be one of subject: the confound.
    """
    names = list(arms)
    pairs = []
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            both = np.intersect1d(communities[arm == a], communities[arm == b])
            shares = {names[c]: float(np.isin(communities[arm == c], both).mean()) for c in (a, b)}
            pairs.append({"arms": [names[a], names[b]], "communities": len(both), "share_of_posts": shares})
    return pairs
