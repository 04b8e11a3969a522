"""Where and how much the fall of a loss slows down: a power law with one smooth break, fitted with honest intervals.

    log L(t) = log b - c0 log t - c1 f log(1 + (t/d)^(1/f))

falls as t^-c0 long before the break at t = d and as t^-(c0+c1) long after it; f says how smooth the break is. Derived
(zero-sum learning, mirandrom/zsl): ``t_d`` = d, ``loss_d_nats`` = b d^-c0, where the two power laws meet, and
``rate_d`` = c0 + c1, the slope after the break.

Given d and f the rest is linear, so the search has two dimensions (variable projection) and starts from a grid: no
guess of slopes, no local minimum by bad luck. Intervals are profile likelihoods, which need not be symmetric and say
"unbounded" where data do not bound a side. The break is looked for inside the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clbench.capacity.figure import Figure, undefined
from clbench.errors import ConfigError
from clbench.results.store import RunStore

Floats = NDArray[np.float64]
Name = Literal["t_d", "loss_d_nats", "rate_d"]

DROPPED = 100.0
"""First steps that the source leaves out."""
FEWEST_POINTS = 8
"""Five parameters want some points more."""
SMOOTHNESS = (0.02, 3.0)
"""Bounds of f: below a sharp corner, above no break that could be seen."""
STARTS = (12, 6)
"""Grid over log d and log f."""
N_REFINED = 3
LEVEL = 0.95


def thinned(t_N: Floats, loss_N: Floats, *, first: float = DROPPED) -> tuple[Floats, Floats]:
    """Return a curve for the fit: means over the window [t/1.2, t], at about logarithmic steps, from ``first`` on.

    As in the source: a point every tenth of the present decade's start, every 1,000 at most, so that late steps do not
    outweigh early ones.

    Args:
        t_N: steps (or tokens in any unit), rising.
        loss_N: losses in nats.
        first: points up to here are dropped; lower it for short stages.
    """
    kept_t, kept_loss = [], []
    sums = np.concatenate([[0.0], np.cumsum(loss_N)])
    due = -math.inf
    for place, t in enumerate(t_N):
        if t <= first or t < due:
            continue
        start = int(np.searchsorted(t_N, t / 1.2))
        kept_t.append(t)
        kept_loss.append((sums[place + 1] - sums[start]) / (place + 1 - start))
        due = t + min(1000.0, 10.0 ** math.floor(math.log10(t)) / 10)
    return np.array(kept_t, dtype=np.float64), np.array(kept_loss, dtype=np.float64)


@dataclass(frozen=True)
class Deceleration:
    """A fitted curve."""

    log_b: float
    c0: float
    c1: float
    d: float
    f: float
    rsle: float
    """sqrt(mean (log fit - log L)^2)."""
    t_last: float
    intervals: dict[str, tuple[float, float]]
    """95 % of t_d, loss_d_nats and rate_d; infinite where the data do not bound a side."""

    @property
    def t_d(self) -> float:
        """Where the fall slows down, in the unit of t."""
        return self.d

    @property
    def loss_d_nats(self) -> float:
        """The loss at which the two power laws meet."""
        return math.exp(self.log_b - self.c0 * math.log(self.d))

    @property
    def rate_d(self) -> float:
        """The slope after the break: loss falls as t^-rate."""
        return self.c0 + self.c1

    def loss_at(self, t: Floats | float) -> Floats:
        """Return the curve at some t, nats."""
        x = np.log(np.asarray(t, dtype=np.float64))
        value: Floats = np.exp(self.log_b - self.c0 * x - self.c1 * _bend(x, math.log(self.d), math.log(self.f)))
        return value

    def far_loss_at(self, t: Floats | float) -> Floats:
        """Return the limit far behind the break, loss_d (t / t_d)^-rate: what the source predicts final losses with."""
        value: Floats = self.loss_d_nats * (np.asarray(t, dtype=np.float64) / self.t_d) ** -self.rate_d
        return value

    def figures(self) -> dict[str, Figure]:
        """Return the derived figures by name, bounds with ``_low`` and ``_high``."""
        found = {name: Figure(getattr(self, name)) for name in ("t_d", "loss_d_nats", "rate_d", "rsle", "c0", "c1")}
        for name, bounds in self.intervals.items():
            for side, bound in zip(("low", "high"), bounds, strict=True):
                known = math.isfinite(bound)
                found[f"{name}_{side}"] = Figure(bound) if known else undefined("the data do not bound it")
        return found


def fit(t_N: Floats, loss_N: Floats, *, intervals: bool = True) -> Deceleration:
    """Fit the curve by least squares of log losses.

    Args:
        t_N: steps or tokens since the start, positive and rising.
        loss_N: losses in nats, positive.
        intervals: False leaves them out, which is many times as fast.

    Raises:
        ConfigError: fewer than 8 points, or values that have no logarithm.
    """
    t, loss = np.asarray(t_N, dtype=np.float64), np.asarray(loss_N, dtype=np.float64)
    if t.shape != loss.shape or t.ndim != 1 or len(t) < FEWEST_POINTS:
        raise ConfigError(
            f"{t.size} times and {loss.size} losses cannot be fitted",
            where="loss deceleration",
            mend=f"give at least {FEWEST_POINTS} of each",
        )
    if not (np.isfinite(t) & np.isfinite(loss) & (t > 0) & (loss > 0)).all() or not (np.diff(t) > 0).all():
        raise ConfigError(
            "times have to be positive and rising, losses positive",
            where="loss deceleration",
            mend="leave the first step and losses that are not finite out",
        )
    problem = _Problem(np.log(t), np.log(loss))
    best = problem.minimise(problem.free)
    (log_b, c0, c1), (log_d, log_f) = problem.free(best.place)[1], best.place
    found = Deceleration(
        float(log_b),
        float(c0),
        float(c1),
        math.exp(log_d),
        math.exp(log_f),
        math.sqrt(best.sse / len(t)),
        float(t[-1]),
        {},
    )
    return _with_intervals(found, problem, best) if intervals else found


def _bend(x: Floats, log_d: float, log_f: float) -> Floats:
    """Return f log(1 + (t/d)^(1/f))."""
    f = math.exp(log_f)
    value: Floats = f * np.logaddexp(0.0, (x - log_d) / f)
    return value


@dataclass(frozen=True)
class StageFit:
    """The fit of one stage's training loss, or why there is none."""

    stage: int
    n_steps: int
    n_points: int
    """Of the thinned curve."""
    first: float
    """Steps up to here are left out."""
    fit: Deceleration | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-able form; what is not defined is null beside its reason."""
        facts = {name: getattr(self, name) for name in ("stage", "n_steps", "n_points", "first", "reason")}
        figures = {} if self.fit is None else self.fit.figures()
        return facts | {
            "figures": {
                name: {"value": one.value if not one.reason else None, "reason": one.reason}
                for name, one in figures.items()
            }
        }


def of_stages(store: RunStore, *, first: float | None = None) -> list[StageFit]:
    """Fit the training loss of every stage of a run against the steps since the stage began.

    Args:
        store: the run; its log has a line every few steps.
        first: steps at the start of a stage to leave out, where a loss jumps and recovers; None: 100, or a twentieth of
            the stage where that is less.
    """
    curves: dict[int, list[tuple[float, float]]] = {}
    for line in store.steps():
        curves.setdefault(line["stage"], []).append((line["step"] + 1.0, line["loss_nats"]))
    found = []
    for stage, points in sorted(curves.items()):
        t, loss = np.array(points, dtype=np.float64).T
        left_out = min(DROPPED, t[-1] / 20) if first is None else first
        kept_t, kept_loss = thinned(t, loss, first=left_out)
        facts = (stage, int(t[-1]), len(kept_t), float(left_out))
        try:
            found.append(StageFit(*facts, fit(kept_t, kept_loss)))
        except ConfigError:
            why = f"{len(kept_t)} points are left, {FEWEST_POINTS} are wanted"
            found.append(StageFit(*facts, None, why))
    return found


Linear = Callable[[Floats], tuple[Floats, Floats]]
"""(log d, log f) -> (residuals, linear parameters)."""


@dataclass(frozen=True)
class _Minimum:
    place: Floats
    sse: float


@dataclass(frozen=True)
class _Problem:
    """Data in logarithms, and least squares over what is linear."""

    x_N: Floats
    y_N: Floats

    @property
    def bounds(self) -> tuple[Floats, Floats]:
        """Of (log d, log f): the break inside the data."""
        low, high = np.log(SMOOTHNESS)
        return np.array([self.x_N[0], low]), np.array([self.x_N[-1], high])

    def free(self, place: Floats) -> tuple[Floats, Floats]:
        """All of log b, c0 and c1 are free."""
        x, bend = self.x_N, _bend(self.x_N, *place)
        return _solve(np.stack([np.ones_like(x), -x, -bend], axis=1), self.y_N)

    def with_rate(self, rate: float) -> Linear:
        """c0 + c1 is held."""

        def linear(place: Floats) -> tuple[Floats, Floats]:
            bend = _bend(self.x_N, *place)
            return _solve(np.stack([np.ones_like(bend), bend - self.x_N], axis=1), self.y_N + rate * bend)

        return linear

    def with_loss(self, log_loss: float) -> Linear:
        """The logarithm of loss_d is held."""

        def linear(place: Floats) -> tuple[Floats, Floats]:
            bend = _bend(self.x_N, *place)
            return _solve(np.stack([place[0] - self.x_N, -bend], axis=1), self.y_N - log_loss)

        return linear

    def minimise(self, linear: Linear, *, near: Floats | None = None, log_d: float | None = None) -> _Minimum:
        """Return the best (log d, log f): from a grid, or, coarser, from a place near it; ``log_d`` holds the break."""
        low, high = self.bounds
        if log_d is not None:
            low, high = low[1:], high[1:]

        def whole(place: Floats) -> Floats:
            return place if log_d is None else np.array([log_d, place[0]])

        if near is not None:
            starts = [near[2 - len(low) :]]
        else:
            axes = (np.linspace(a, b, n + 2)[1:-1] for a, b, n in zip(low, high, STARTS, strict=True))
            points = np.stack([one.ravel() for one in np.meshgrid(*axes)], axis=1)
            sse = [float(np.sum(linear(p)[0] ** 2)) for p in points]
            starts = [points[i] for i in np.argsort(sse)[:N_REFINED]]
        found = (self._refined(linear, whole, s, (low, high), fine=near is None) for s in starts)
        return min(found, key=lambda one: one.sse)

    def _refined(
        self,
        linear: Linear,
        whole: Callable[[Floats], Floats],
        start: Floats,
        bounds: tuple[Floats, Floats],
        *,
        fine: bool,
    ) -> _Minimum:
        from scipy.optimize import least_squares

        inside = np.clip(start, bounds[0] + 1e-9, bounds[1] - 1e-9)
        jac, tolerance = ("3-point", 1e-15) if fine else ("2-point", 1e-7)
        found = least_squares(
            lambda p: linear(whole(p))[0], inside, jac=jac, bounds=bounds, xtol=tolerance, ftol=tolerance, gtol=None
        )
        return _Minimum(whole(found.x), float(2 * found.cost))


def _solve(columns_NP: Floats, y_N: Floats) -> tuple[Floats, Floats]:
    """Return residuals and coefficients of a least-squares problem."""
    coefficients = np.linalg.lstsq(columns_NP, y_N, rcond=None)[0].astype(np.float64)
    return columns_NP @ coefficients - y_N, coefficients


def _with_intervals(found: Deceleration, problem: _Problem, best: _Minimum) -> Deceleration:
    """Add profile-likelihood intervals: values whose best fit has an SSE within the F-bound of the least."""
    from dataclasses import replace

    from scipy.stats import f as f_distribution

    n_free = len(problem.x_N) - 5
    floor = len(problem.x_N) * (4 * np.finfo(float).eps) ** 2  # noiseless: rounding
    limit = max(best.sse, floor) * (1 + float(f_distribution.ppf(LEVEL, 1, n_free)) / n_free)

    def profile(held: Callable[[float], _Minimum]) -> Callable[[float], float]:
        return lambda value: held(value).sse - limit

    of_break = profile(lambda v: problem.minimise(problem.free, near=best.place, log_d=v))
    of_loss = profile(lambda v: problem.minimise(problem.with_loss(v), near=best.place))
    of_rate = profile(lambda v: problem.minimise(problem.with_rate(v), near=best.place))
    ends = (float(problem.x_N[0]), float(problem.x_N[-1]))
    bounds_d = _crossings(of_break, math.log(found.d), 0.05, ends)
    bounds_l = _crossings(of_loss, math.log(found.loss_d_nats), 0.01)
    bounds_r = _crossings(of_rate, found.rate_d, 0.01)
    return replace(found, intervals={"t_d": _exp(*bounds_d), "loss_d_nats": _exp(*bounds_l), "rate_d": bounds_r})


def _exp(low: float, high: float) -> tuple[float, float]:
    """Return bounds of a value from those of its logarithm; a side without a bound stays so."""
    return (math.exp(low) if math.isfinite(low) else low, math.exp(high) if math.isfinite(high) else high)


def _crossings(
    excess: Callable[[float], float], centre: float, step: float, ends: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float]:
    """Return where a profile leaves its limit on both sides of its minimum; infinite where it does not."""
    from scipy.optimize import brentq

    found = []
    for sign, end in ((-1, ends[0]), (1, ends[1])):
        inner, size = centre, step
        for _ in range(12):
            outer = centre + sign * size
            outer = max(outer, end) if sign < 0 else min(outer, end)
            if excess(outer) > 0:
                found.append(float(brentq(excess, inner, outer, xtol=1e-3 * step)) if excess(inner) <= 0 else centre)
                break
            if outer == end:
                found.append(sign * math.inf)
                break
            inner, size = outer, 2 * size
        else:
            found.append(sign * math.inf)
    return found[0], found[1]
