"""What ``clbench merge`` searches through: for every method a way from the tuned model to the base, point by point.

Most methods are one path, s from 0 (tuned) to 1 (base). ``spear-mm`` has two numbers: how many units, those in front
of an order, are restored, and how far. Which points are looked at, and how good they are, is ``search``'s business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clbench.errors import ConfigError
from clbench.merge.execute import Sources, graft_threshold
from clbench.merge.plan import KEEP, RESTORE, Action, MergePlan, Rule
from clbench.merge.scores import Granularity, block_number
from clbench.merge.select import Ordering, strengths_of, surviving_neighbours, within

SEVERAL = ("task-arithmetic", "ties", "model-stock", "ota")
"""Paths of several experts; their beginning is not the tuned model."""
PATHS = ("wise-ft", "slerp", "dg-hard", "trim", "dare", "breadcrumbs", "graft", "intruders", *SEVERAL)
SOUPS = ("soup", "greedy-soup", "mwa")
METHODS = ("spear-mm", *PATHS, "learned-alpha", *SOUPS)
N_LEVELS = 64
"""Steps of a path, the finest that is looked at."""
GAMMA = 0.01
"""Share of the largest entries that breadcrumbs drops."""
DENSITY = 0.2
"""Share of each expert's change that ties keeps, as its paper does."""


@dataclass(frozen=True)
class Spot:
    """One merge that can be measured."""

    label: str
    plan: MergePlan
    about: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able: q, s, units …"""


TUNED = Spot("tuned", MergePlan(), {"q": 0.0, "s": 0.0})
BASE = Spot("base", MergePlan(RESTORE), {"q": 1.0, "s": 1.0})


class Family(ABC):
    """A method's merges between the same two models."""

    name: str

    @abstractmethod
    def spot(self, q: float | None, s: float) -> Spot:
        """Return the merge at a point; q only where there are units."""


class Path(Family):
    """A method with one number: s, 0 is the tuned model and 1 the base.

    ``trim``, ``dare``, ``breadcrumbs`` and ``graft`` keep the share ``1 - s`` of the change's entries. ``dg-hard`` has
    ``scale = s / (1 - s)``: 1 in the middle; its end is the base. ``intruders`` takes the share s of the intruder
    dimensions away, so its end is not the base.

    Those of SEVERAL merge experts, so their beginning is not the tuned model. ``task-arithmetic``, ``ties`` and
    ``model-stock`` take the share ``1 - s`` of what these methods change in the base (lambda, the scale of the sum of
    all task vectors, of the merged one, of the way to the stock); ``ota`` gives each expert a say in the share
    ``1 - s`` of its entries.

    Args:
        name: one of PATHS.
        sources: what is merged; ``graft`` and ``ota`` need moments.
        seed: of ``dare``.
        density: of ``ties``.
    """

    def __init__(self, name: str, sources: Sources, *, seed: int = 0, density: float = DENSITY) -> None:
        if name not in PATHS:
            raise ValueError(name)
        if name in ("graft", "ota") and sources.moments is None:
            raise ConfigError(f"{name} needs Adam's second moments", mend="give --moments RUN of every expert")
        self.name, self.sources, self.seed, self.density = name, sources, seed, density

    def spot(self, q: float | None, s: float) -> Spot:
        """Return the merge at s.

        Raises:
            ConfigError: a q, which only ``spear-mm`` has, or an s outside 0 to 1.
        """
        if q is not None:
            raise ConfigError(f"{self.name} has no q", mend="give -s alone")
        if not 0 <= s <= 1:
            raise ConfigError(f"s={s} is no strength", mend="give a number from 0 (tuned) to 1 (base)")
        label = f"{self.name} s={s:.3g}"
        if (s == 0 and self.name not in SEVERAL) or (s == 1 and self.name != "intruders"):
            return Spot(label, (BASE if s else TUNED).plan, {"s": s})
        return Spot(label, self._plan(s), {"s": s})

    def _plan(self, s: float) -> MergePlan:
        if self.name == "wise-ft":
            return MergePlan(Action("lerp", {"s": s}))
        if self.name == "slerp":
            return MergePlan(Action("lerp", {"s": s}), (Rule("*", Action("slerp", {"s": s}), "matrices"),))
        if self.name == "dg-hard":
            return MergePlan(Action("dg_hard", {"scale": s / (1 - s)}))
        if self.name == "trim":
            return MergePlan(Action("ties", {"density": 1 - s}))
        if self.name == "dare":
            return MergePlan(Action("dare", {"density": 1 - s, "seed": self.seed}))
        if self.name == "breadcrumbs":
            return MergePlan(Action("breadcrumbs", {"density": 1 - s, "gamma": GAMMA}))
        if self.name == "intruders":
            return self._intruders(1 - s)
        if self.name in SEVERAL:
            return MergePlan(self._several(s))
        return MergePlan(Action("graft", {"threshold": graft_threshold(self.sources, 1 - s)}))

    def _several(self, s: float) -> Action:
        """Return what is done with experts."""
        n = len(self.sources.experts)
        if self.name == "task-arithmetic":
            return Action("task_arithmetic", {"weights": [1 - s] * n})
        if self.name == "ties":
            return Action("ties", {"density": self.density, "weights": [1.0] * n, "scale": 1 - s})
        if self.name == "model-stock":
            return Action("model_stock", {"scale": 1 - s})
        if s == 0:
            return Action("ota")
        return Action("ota", {"thresholds": [graft_threshold(self.sources, 1 - s, expert) for expert in range(n)]})

    def _intruders(self, factor: float) -> MergePlan:
        """Return the plan for the matrices of the blocks, which are what adapters are put on, too."""
        layout = self.sources.tuned.layout.items()
        matrices = [name for name, i in layout if i.is_merged and len(i.shape) == 2 and block_number(name) is not None]
        if not matrices:
            raise ConfigError("no weight matrix in numbered blocks", mend="give a transformer's weights")
        return MergePlan(
            KEEP, tuple(Rule(f"={name}", Action("reduce_intruders", {"factor": factor})) for name in matrices)
        )


class Learned(Family):
    """Shares that a little text has taught, see ``learn``: s = 1/2 is as learnt, 0 has no base and 1 is the base.

    Args:
        shares: unit -> share of base, tuned and others.
    """

    name = "learned-alpha"

    def __init__(self, shares: Mapping[str, Sequence[float]]) -> None:
        self.shares = shares

    def spot(self, q: float | None, s: float) -> Spot:
        """Return the merge at s.

        Raises:
            ConfigError: a q, or an s outside 0 to 1.
        """
        from clbench.merge.learn import moved_shares, plan_of

        if q is not None or not 0 <= s <= 1:
            raise ConfigError(f"{self.name} has no point q={q}, s={s}", mend="give -s alone, from 0 to 1")
        n_ends = len(next(iter(self.shares.values())))
        if s == 1 or (s == 0 and n_ends == 2):
            return Spot(f"{self.name} s={s:.3g}", (BASE if s else TUNED).plan, {"s": s})
        moved = moved_shares(self.shares, s)
        return Spot(f"{self.name} s={s:.3g}", plan_of(moved, n_ends), {"s": s, "shares": moved})


class Restoring(Family):
    """SPEAR-MM: the units in front of an order move s of the way to the base, everything else stays tuned.

    Args:
        order: the units, those to be restored first in front.
        dimensions: tensor name -> number of dimensions, of all tensors that can be merged.
        interp: ``slerp`` or ``lerp``, of matrices; vectors go straight.
        outside: restore embeddings, last norm and output layer, too.
        granularity: what the order's units are.
        name: how the order is called in labels.
    """

    def __init__(
        self,
        order: Ordering,
        dimensions: Mapping[str, int],
        *,
        interp: str = "slerp",
        outside: bool = False,
        granularity: Granularity = "layer",
        name: str = "spear-mm",
    ) -> None:
        self.name, self.order, self.dimensions = name, order, dimensions
        self.interp, self.outside, self.granularity = interp, outside, granularity
        total = sum(order.sizes.values())
        shares, reached = [0.0], 0
        for unit in order.units:
            reached += order.sizes[unit]
            shares.append(reached / total)
        self.shares = shares
        """Share of the blocks' parameters in the first 0, 1, 2 … units."""

    def spot(self, q: float | None, s: float) -> Spot:
        """Return the merge of the units whose share is nearest to q.

        Raises:
            ConfigError: no q, or a share outside 0 to 1.
        """
        if q is None or not 0 <= q <= 1 or not 0 <= s <= 1:
            raise ConfigError(f"{self.name} needs q and s from 0 to 1, not {q} and {s}", mend="give -q and -s")
        return self.first(len(self.order.top(q)), s)

    def with_order(self, order: Ordering, *, interp: str | None = None) -> Restoring:
        """Return the same with another order, or another way of restoring matrices."""
        return Restoring(
            order,
            self.dimensions,
            interp=interp or self.interp,
            outside=self.outside,
            granularity=self.granularity,
        )

    def first(self, n: int, s: float) -> Spot:
        """Return the merge of the first n units."""
        units, about = self.order.units[:n], {"q": self.shares[n], "s": s, "units": list(self.order.units[:n])}
        if not units or s == 0:
            return Spot(f"{self.name} q=0", TUNED.plan, {"q": 0.0, "s": 0.0, "units": []})
        return Spot(f"{self.name} q={self.shares[n]:.3g} s={s:.3g}", self.plan(units, s), about)

    def strengths(self, units: Sequence[str], s: float) -> dict[str, float]:
        """Return tensor name -> strength."""
        return strengths_of(self.dimensions, units, s, outside=self.outside)

    def plan(self, units: Sequence[str], s: float) -> MergePlan:
        """Return the plan; one rule for a unit's matrices and one for its vectors, or one for both where they agree."""
        rules: list[Rule] = []
        for unit in units:
            inside = [name for name in self.dimensions if within(name, unit)]
            rules += self._rules(unit, inside, s)
        if self.outside:
            loose = [name for name, strength in self.strengths((), s).items() if strength]
            rules += [rule for name in loose for rule in self._rules(f"={name}", [name], s)]
        plan = MergePlan(KEEP, tuple(rules))
        wanted = {name for name, strength in self.strengths(units, s).items() if strength}
        if {name for name, n in self.dimensions.items() if plan.action(name, n) != KEEP} != wanted:
            # A unit's path also stands inside another tensor's name (two towers): say every name in full.
            exact = [rule for name in sorted(wanted) for rule in self._rules(f"={name}", [name], s)]
            plan = MergePlan(KEEP, tuple(exact))
        return plan

    def checkfree(self, units: Sequence[str], s: float) -> MergePlan | None:
        """Return the control that takes the blocks around the units in the place of the base; None: none are left."""
        lost = [name for name, strength in strengths_of(self.dimensions, units, 1.0).items() if strength]
        near = surviving_neighbours(self.dimensions, lost)
        if not near or s == 0:
            return None
        return MergePlan(
            KEEP, tuple(Rule(f"={name}", Action("neighbours", {"s": s, **blocks})) for name, blocks in near.items())
        )

    def _rules(self, select: str, names: Sequence[str], s: float) -> list[Rule]:
        if s == 1:
            return [Rule(select, RESTORE)]
        line = Action("lerp", {"s": s})
        matrices = any(self.dimensions[name] >= 2 for name in names)
        vectors = any(self.dimensions[name] < 2 for name in names)
        if self.interp == "lerp" or not matrices:
            return [Rule(select, line)]
        curve = Action("slerp", {"s": s})
        return [Rule(select, curve, "matrices"), *([Rule(select, line, "vectors")] if vectors else [])]


def plan_of_strength(s: float) -> MergePlan:
    """Return the control that moves everything straight by one strength."""
    if s <= 0 or s >= 1:
        return (BASE if s >= 1 else TUNED).plan
    return MergePlan(Action("lerp", {"s": s}))
