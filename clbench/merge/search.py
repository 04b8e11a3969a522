"""The search for the merge that keeps a wanted share of the general score and most of the domain gain.

A method is a path (or, for SPEAR-MM, a path a strength) along which general retention rises and domain gain falls.
So the wanted point is bracketed by halving: a few evaluations, not a grid. Nothing relies on it: what is picked is the
best of everything that was measured. Evaluations are kept by content (weights, text, plan), so a killed search goes on
where it was and another ``keep`` costs little. Texts and models are ``evaluate``'s business, figures ``outcome``'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clbench import seeds
from clbench.errors import IntegrityError, NotFoundError
from clbench.files import digest_of, read_json, write_json
from clbench.merge.evaluate import Bench, Benchmark, Judge
from clbench.merge.execute import Sources
from clbench.merge.families import BASE, N_LEVELS, TUNED, Family, Restoring, Spot, plan_of_strength
from clbench.merge.families import Path as PathFamily
from clbench.merge.front import Point, pick
from clbench.merge.impact import Impact, agreement
from clbench.merge.outcome import Yardstick
from clbench.merge.scores import MEASURES, TensorScore
from clbench.merge.select import equal_strength, order_units
from clbench.method import Weights
from clbench.results.metrics import Value
from clbench.suite import Rows

Role = Literal["end", "walk", "control", "impact"]
STRENGTHS = (1.0, 0.7, 0.4)
"""How far units are restored, where the search has no other wish."""
CLOSE = 0.002
"""A point whose retention is above the wanted one by less is near enough."""
TOPS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the units that are tried from above: restoring all of them may keep less than restoring some."""
N_RANDOM = 3
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One merge and what was measured of it."""

    spot: Spot
    role: Role
    rows: Rows
    """One an item, see ``Judge.read``."""
    n_tokens: int
    flops: Mapping[str, float]
    """evaluate, merge: of a fresh measurement, whether this one was kept or not."""
    seconds: Mapping[str, float]


Report = Callable[[Measured], None]


class OutOfBudgetError(Exception):
    """The evaluations that may be spent are spent; the search ends with what it has."""


class Desk:
    """Measures merges, each once: what lies in the folder is not measured again.

    Args:
        sources: tuned and base.
        judge: what is measured.
        open_bench: loads the model, when something really has to be measured.
        address: digest of the inputs: weights and moments.
        folder: where measurements are kept.
        tell: is told of every measurement.
    """

    def __init__(
        self,
        sources: Sources,
        judge: Judge,
        open_bench: Callable[[], Bench],
        *,
        address: str,
        folder: Path,
        tell: Report | None = None,
    ) -> None:
        self.sources, self.judge, self.folder, self.tell = sources, judge, folder, tell
        self.inputs, self.address = address, digest_of([FORMAT, address, judge.sha256])
        self.found: dict[str, Measured] = {}
        self.benchmarks: tuple[Benchmark, ...] = judge.benchmarks
        """What is measured; where a suite decides it, known after the first measurement."""
        self.n_fresh = 0
        """How many were measured by this process, and not found in the folder."""
        self._open_bench = open_bench
        self._bench: Bench | None = None

    def beside(self, judge: Judge, *, tell: Report | None = None) -> Desk:
        """Return a desk that measures the same merges by another judge."""
        return Desk(self.sources, judge, self._open_bench, address=self.inputs, folder=self.folder, tell=tell)

    def measure(self, spot: Spot, role: Role) -> Measured:
        """Return the measurement of a merge."""
        key = spot.plan.sha256
        if key in self.found:
            return self.found[key]
        found = self._kept(spot, role, key) or self._fresh(spot, role, key)
        self.found[key] = found
        if self.tell:
            self.tell(found)
        return found

    def _file(self, key: str) -> Path:
        return self.folder / self.address[:24] / f"{key[:40]}.json"

    def _kept(self, spot: Spot, role: Role, key: str) -> Measured | None:
        with suppress(NotFoundError, IntegrityError, KeyError, TypeError):  # what cannot be read is measured again
            kept = read_json(self._file(key))
            if kept["plan_sha256"] == key and kept["address"] == self.address:
                rows = Rows(**{name: _column(name, value) for name, value in kept["rows"].items()})
                costs = {name: kept[name] for name in COSTS}
                return Measured(spot=spot, role=role, rows=self._items(rows), **costs)
        return None

    def _items(self, raw: Rows) -> Rows:
        self.benchmarks, items = self.judge.read(raw)
        return items

    def _fresh(self, spot: Spot, role: Role, key: str) -> Measured:
        self._bench = self._bench or self._open_bench()
        start = time.perf_counter()
        with self._bench.holding(spot.plan) as checkpoint:
            merged = time.perf_counter()
            rows = self.judge.measure(checkpoint)
            n_tokens, flops = self.judge.cost(checkpoint)
        self.n_fresh += 1
        found = Measured(
            spot=spot,
            role=role,
            rows=self._items(rows),
            n_tokens=n_tokens,
            flops={"merge": merge_flops(spot, self.sources), "evaluate": flops},
            seconds={"merge": merged - start, "evaluate": time.perf_counter() - merged},
        )
        columns = {name: np.asarray(value).tolist() for name, value in asdict(rows).items()}
        costs = {name: getattr(found, name) for name in COSTS}
        write_json(self._file(key), {"plan_sha256": key, "address": self.address, **costs, "rows": columns})
        return found

    def bill(self, roles: Sequence[Role]) -> dict[str, Any]:
        """Return evaluations, tokens, FLOPs and seconds of the measurements with these roles."""
        chosen = [one for one in self.found.values() if one.role in roles]
        return {
            "evaluations": len(chosen),
            "tokens": sum(one.n_tokens for one in chosen),
            "flops": {part: math.fsum(one.flops[part] for one in chosen) for part in ("merge", "evaluate")},
            "seconds": {part: math.fsum(one.seconds[part] for one in chosen) for part in ("merge", "evaluate")},
        }


COSTS = ("n_tokens", "flops", "seconds")


def _column(name: str, value: list[Any]) -> Any:
    if name in ("stage", "n_tokens", "n_bytes"):
        return np.array(value, dtype=np.int64)
    return np.array(value, dtype=np.float64) if name == "value" else value


def merge_flops(spot: Spot, sources: Sources) -> float:
    """Return the FLOPs of a merge: 8 an element that is moved, an SVD or two a matrix for dg_hard and intruders."""
    total = 0.0
    for name, info in sources.tuned.layout.items():
        kernel = spot.plan.action(name, len(info.shape)).kernel
        if not info.is_merged or kernel in ("keep", "restore"):
            continue
        total += 8.0 * math.prod(info.shape)
        if kernel in ("dg_hard", "reduce_intruders") and len(info.shape) == 2:
            small, large = sorted(info.shape)
            total += (2 if kernel == "reduce_intruders" else 1) * (14.0 * small * small * large + 8.0 * small**3)
    return total


# --- the walk


@dataclass(kw_only=True)
class Walk:
    """A search within a number of evaluations; base and tuned are measured besides.

    Args:
        desk: measures.
        family: what is searched.
        keep: the wanted share of the base's general score.
        n_evaluations: how many merges may be measured; what is already kept counts, too, so that a search that was
            cut off ends as if it had not been.
        strengths: of SPEAR-MM.
    """

    desk: Desk
    family: Family
    keep: float
    n_evaluations: int = 16
    strengths: Sequence[float] = STRENGTHS
    yardstick: Yardstick = field(init=False)
    walked: list[Measured] = field(default_factory=list)
    exhausted: bool = False
    """The evaluations did not suffice to bracket the wanted point."""

    def __post_init__(self) -> None:
        """Measure both ends."""
        base, tuned = self.desk.measure(BASE, "end"), self.desk.measure(TUNED, "end")
        self.yardstick = Yardstick(benchmarks=self.desk.benchmarks, base=base.rows, tuned=tuned.rows)
        self.walked.append(tuned)

    def run(self) -> Measured | None:
        """Search, and return the pick; None where nothing keeps so much and any gain."""
        if self.yardstick.gain.reason is None and not self._keeps(self.walked[0]):
            try:
                if isinstance(self.family, Restoring):
                    self._surface(self.family)
                else:
                    family = self.family
                    first = family.spot(None, 0.0)
                    if first.plan.sha256 != TUNED.plan.sha256 and self._keeps(self._measure(first)):
                        return self.best()  # experts together keep enough as they are
                    self.bracket(0, N_LEVELS, lambda level: family.spot(None, level / N_LEVELS))
            except OutOfBudgetError:
                self.exhausted = True
        return self.best()

    def best(self) -> Measured | None:
        """Return the merge with the most domain gain, above 0, of those that keep the wanted share."""
        points = [Point(self.retention(one), self.gain(one), one) for one in self.walked if self.gain(one) > 0]
        found = pick(points, keep=self.keep)
        return found.what if found else None

    def retention(self, one: Measured) -> float:
        """Return general retention."""
        return self.yardstick.retention(one.rows)

    def gain(self, one: Measured) -> float:
        """Return the kept domain gain, NaN where it is undefined."""
        return self.yardstick.kept_gain(one.rows).value

    def visit(self, spot: Spot) -> Measured:
        """Return the measurement of a merge that is no step of a search; the base stays out of the walk."""
        found = self.desk.measure(spot, "walk")
        if spot.plan.sha256 not in {BASE.plan.sha256, *(one.spot.plan.sha256 for one in self.walked)}:
            self.walked.append(found)
        return found

    def _keeps(self, one: Measured) -> bool:
        return self.retention(one) >= self.keep

    def _measure(self, spot: Spot) -> Measured:
        known = {one.spot.plan.sha256: one for one in self.walked}
        if spot.plan.sha256 in known:
            return known[spot.plan.sha256]
        is_end = spot.plan.sha256 == BASE.plan.sha256
        if not is_end and len(self.walked) > self.n_evaluations:  # the tuned model stands in the list, too
            raise OutOfBudgetError
        found = self.desk.measure(spot, "walk")
        if not is_end:
            self.walked.append(found)
        return found

    def bracket(self, low: int, high: int, spot: Callable[[int], Spot]) -> int | None:
        """Return the lowest level above ``low`` that keeps enough, by halving; None where not even ``high`` does.

        ``low`` is taken not to keep enough.
        """
        if high <= low:
            return None
        if not self._keeps(self._measure(spot(high))):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            found = self._measure(spot(middle))
            if self._keeps(found):
                high = middle
                if self.retention(found) - self.keep < CLOSE:
                    break
            else:
                low = middle
        return high

    def _surface(self, family: Restoring) -> None:
        """Bracket the number of units at every strength, strongest first, then the strength at the best number.

        Less strength needs more units, and where no number of units suffices no weaker strength does.
        """
        n_units, low, edges = len(family.order.units), 0, list[tuple[int, float]]()
        tops = sorted({max(1, round(n_units * share)) for share in TOPS}, reverse=True)
        for s in sorted(self.strengths, reverse=True):
            n = next((n for top in tops if (n := self.bracket(low, top, partial(family.first, s=s))) is not None), None)
            if n is None:
                break
            edges.append((n, s))
            low, tops = n - 1, [top for top in tops if top >= n]
        best = self.best()
        at_best = [edge for edge in edges if best and best.spot.plan == family.first(*edge).plan]
        for n, s in at_best or edges[-1:]:  # no best: all units at full strength are the base, and no gain is left
            self._strength(family, n, s)

    def _strength(self, family: Restoring, n: int, s: float) -> None:
        """Bracket the strength between s, which keeps enough, and the next weaker one, at a number of units."""
        weaker = max((other for other in self.strengths if other < s), default=0.0)
        steps = max(1, round((s - weaker) * N_LEVELS))

        def spot(step: int) -> Spot:
            return family.first(n, s if step == steps else round(weaker + (s - weaker) * step / steps, 4))

        self.bracket(0, steps, spot)


# --- controls


def controls(
    family: Family, chosen: Spot, scores: Sequence[TensorScore], sources: Sources, *, seed: int = 0
) -> list[Spot]:
    """Return what a pick has to be compared with, without which it proves nothing.

    SPEAR-MM: random units three times, the lowest scores, the largest drift, first and last units, all of about
    equal restored share; where what lies outside the units is restored, too, that alone; LERP for SLERP; the same
    units moved towards the blocks around them in the place of the base (CheckFree, a negative control: no base, and
    no training afterwards); and uniform WiSE-FT at equal mean distance from the tuned model, which is the control of
    every other method, too.
    """
    found: list[Spot] = []
    if isinstance(family, Restoring) and chosen.about.get("units"):
        q, s = chosen.about["q"], chosen.about["s"]
        orders = (*["random"] * N_RANDOM, "bottom", "drift", "first", "last") if q < 1 else ()  # all in any order
        for by in orders:
            draw = sum(one.label.startswith("random") for one in found)
            draw_seed = seeds.derive(seed, "units", draw)
            order = order_units(scores, by=by, granularity=family.granularity, seed=draw_seed)
            spot = family.with_order(order).spot(q, s)
            found.append(Spot(f"random {draw + 1}" if by == "random" else by, spot.plan, spot.about))
        if family.outside:
            found.append(Spot("no units, embeddings", family.plan((), s), {"q": 0.0, "s": s, "units": []}))
        if family.interp == "slerp" and s < 1:
            line = family.with_order(family.order, interp="lerp").plan(chosen.about["units"], s)
            found.append(Spot("same units, lerp", line, chosen.about))
        if (plan := family.checkfree(chosen.about["units"], s)) is not None:
            found.append(Spot("checkfree", plan, chosen.about))
    if family.name != "wise-ft":
        s = equal_distance(chosen, sources, scores, family)
        found.append(Spot(f"uniform, s={s:.3g}", plan_of_strength(s), {"s": s}))
    elif 0 < chosen.about["s"] < 1:
        curve = PathFamily("slerp", sources).spot(None, chosen.about["s"])
        found.append(Spot("slerp, same s", curve.plan, curve.about))
    return found


def equal_distance(chosen: Spot, sources: Sources, scores: Sequence[TensorScore], family: Family) -> float:
    """Return the strength of uniform WiSE-FT at which all tensors together are as far from the tuned ones as here."""
    moved = {score.name: score.moved for score in scores}
    if isinstance(family, Restoring):
        return equal_strength(moved, family.strengths(chosen.about["units"], chosen.about["s"]))
    from clbench.merge.execute import run

    tuned: Weights = {name: sources.tuned.read(name) for name in moved}
    far = math.fsum(
        float((tensor.double() - tuned[name].double()).norm())
        for name, tensor in run(chosen.plan, sources)
        if name in moved
    )
    total = math.fsum(moved.values())
    return min(1.0, far / total) if total else 0.0


# --- leave one layer restored


def impacts(desk: Desk, family: Restoring, yardstick: Yardstick) -> list[Impact]:
    """Restore every unit alone and return what that does: one evaluation a unit, in the order of the units."""
    inside = Restoring(family.order, family.dimensions)  # no embeddings: one unit, nothing else
    general, domain = yardstick.losses(yardstick.tuned)
    found = []
    for unit in family.order.units:
        one = desk.measure(Spot(f"{unit} alone", inside.plan([unit], 1.0), {"units": [unit], "s": 1.0}), "impact")
        here = yardstick.losses(one.rows)
        found.append(Impact(unit=unit, general_gain=general - here[0], domain_cost=here[1] - domain))
    return found


def agreements(found: Sequence[Impact], scores: Sequence[TensorScore], family: Restoring) -> dict[str, Value]:
    """Return measure -> Spearman's rho between unit scores and impacts; 1: the same order."""
    orders = {by: order_units(scores, by=by, granularity=family.granularity) for by in MEASURES}
    return {by: agreement(found, order.scores) for by, order in orders.items()}
