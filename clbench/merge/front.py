"""The trade-off after merging: retention, kept domain gain, the Pareto front, and picking a point of it. No torch.

Undefined is NaN with a reason, never 0. Retention is not cut off at 1: a merge may be better than the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from clbench.errors import ConfigError
from clbench.results.metrics import Value

T = TypeVar("T")
STANDARD_ERRORS = 2.0
"""A domain gain smaller than this many standard errors cannot be shared out."""


def undefined(reason: str) -> Value:
    """Return NaN and why."""
    return Value(np.array(np.nan), reason)


def retention(after: float, base: float, *, chance: float = 0.0, lower_is_better: bool = False) -> Value:
    """Return which share of the base's score is left, ``(after - chance) / (base - chance)``.

    With chance 0 it is the plain ratio, which is what the paper's example shows (80 % -> 55 % is 69.5 %). It flatters
    multiple choice, where chance cannot be lost. For losses and perplexities: ``base / after``.
    """
    if not (math.isfinite(after) and math.isfinite(base)):
        return undefined("a score is missing")
    if lower_is_better:
        return Value(np.array(base / after)) if after > 0 else undefined(f"a loss of {after}")
    if base <= chance:
        return undefined(f"the base's score {base:.4g} is not above chance {chance:.4g}")
    return Value(np.array((after - chance) / (base - chance)))


def mean_retention(
    after: Mapping[str, float], base: Mapping[str, float], chance: Mapping[str, float] | None = None
) -> Value:
    """Return the unweighted mean of the benchmarks' retentions; undefined as soon as one of them is.

    Raises:
        ConfigError: other benchmarks after than before, or none.
    """
    if after.keys() != base.keys() or not base:
        raise ConfigError(f"benchmarks {sorted(after)} against {sorted(base)}", mend="measure the same on both")
    found = {name: retention(after[name], base[name], chance=(chance or {}).get(name, 0.0)) for name in sorted(base)}
    for name, value in found.items():
        if value.reason is not None:
            return undefined(f"{name}: {value.reason}")
    return Value(np.array(math.fsum(value.value for value in found.values()) / len(found)))


def domain_gain_retention(merged: float, base: float, tuned: float, *, standard_error: float) -> Value:
    """Return which share of training's gain on the domain is left, ``(merged - base) / (tuned - base)``.

    The same for scores and losses. Undefined where the gain is below two standard errors: a ratio of noise.
    """
    gain = tuned - base
    if not all(math.isfinite(x) for x in (merged, base, tuned, standard_error)):
        return undefined("a score is missing")
    if gain == 0 or abs(gain) < STANDARD_ERRORS * standard_error:
        return undefined(f"training changed the domain score by {gain:.4g}, its standard error is {standard_error:.4g}")
    return Value(np.array((merged - base) / gain))


def cost_reduction(spent: float, retraining: float) -> Value:
    """Return ``1 - spent / retraining``: scores, merges and evaluations against training again for the same point.

    Both in one unit, FLOPs or seconds.
    """
    return Value(np.array(1 - spent / retraining)) if retraining > 0 else undefined("retraining costs nothing")


@dataclass(frozen=True)
class Point(Generic[T]):
    """One merged model: larger is better in both."""

    general: float
    """General retention."""
    domain: float
    """Kept share of the domain gain."""
    what: T
    """What was merged how."""


def front(points: Sequence[Point[T]]) -> list[Point[T]]:
    """Return the points that no other one beats: is at least as good in both and better in one.

    Sorted by general retention, best first; equal points all stay; points with NaN are never on it.
    """
    sound = [p for p in points if math.isfinite(p.general) and math.isfinite(p.domain)]
    sound.sort(key=lambda p: (-p.general, -p.domain))
    found: list[Point[T]] = []
    for point in sound:
        best = found[-1] if found else None
        if best is None or point.domain > best.domain or (point.general, point.domain) == (best.general, best.domain):
            found.append(point)
    return found


def pick(points: Sequence[Point[T]], *, keep: float = 0.95) -> Point[T] | None:
    """Return the point with the most domain gain among those that keep a share of the base's general score.

    Of equal ones the one with more retention, then the first; None where no point keeps so much.
    """
    kept = [p for p in front(points) if p.general >= keep]
    return max(kept, key=lambda p: (p.domain, p.general)) if kept else None
