"""How much will be forgotten, and how well will new text be learnt, with more tokens or a larger model?

Two laws are fitted to a sweep of runs, N parameters and D tokens a stage:

    in-distribution loss   L = E + A N^-alpha + B D^-beta        E, A, B >= 0   (Hoffmann et al. 2022, section 3.3)
    forgetting             F = E + A D^gamma N^-delta            A >= 0

The second is multiplicative as in Bethune et al. 2025 (arXiv 2502.06042, known here from summaries), without data
injection. Given the exponents both are linear, so the exponents alone are searched (variable projection) and the whole
profile over them is kept: intervals are of the profile likelihood, with normal errors of one unknown variance. A
back-test hides the largest budgets and says how wrong the same procedure was. Too small a sweep gives NaN and a reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import optimize, special

from clbench.errors import ConfigError
from clbench.results.matrix import Array, finite_or_none, matrix_of
from clbench.results.metrics import METRICS
from clbench.results.stats import LEVEL
from clbench.results.store import RunStore

LawName = Literal["loss", "forgetting"]
TARGETS: dict[str, LawName] = {"forgetting_first": "forgetting", "in_distribution": "loss"}
"""Metric -> the law that is fitted to it."""
EXPONENTS = (0.02, 3.0)
"""Where exponents are searched; a best one at an end is said to be there."""
GRID = {1: 300, 2: 40}
"""Number of exponents -> points of the grid along each."""
REACHES = (1.25, 1.05, 1.01, 1.002, 1.0004)
"""Factors around the best exponents that are searched again, 15 points along each."""
N_DESIGNS = {1: 60, 2: 200}
"""Points of the profile region that a prediction's interval looks at, at most."""
LEAST = 3
"""Different budgets (or sizes) that an exponent needs."""
PIN = 1e4
"""Weight of the row that holds a prediction to a value, against observations of weight 1."""


@dataclass(frozen=True)
class Observation:
    """One run of a sweep."""

    n_parameters: float
    n_tokens: float
    """Trained in each stage."""
    value: float
    label: str = ""


@dataclass(frozen=True)
class Prediction:
    """A value with its interval for one more run; NaN with a reason where it cannot be told."""

    n_parameters: float
    n_tokens: float
    value: float
    low: float = math.nan
    high: float = math.nan
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        numbers = {name: finite_or_none(getattr(self, name)) for name in ("value", "low", "high")}
        return {"n_parameters": self.n_parameters, "n_tokens": self.n_tokens, **numbers, "reason": self.reason}


@dataclass(frozen=True)
class Law:
    """Which terms of a law a sweep can tell apart."""

    name: LawName
    of_tokens: bool = True
    of_size: bool = False

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents."""
        size, tokens = ("alpha", "beta") if self.name == "loss" else ("delta", "gamma")
        return (*((size,) if self.of_size else ()), *((tokens,) if self.of_tokens else ()))

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the linear coefficients."""
        if self.name == "forgetting":
            return ("E", "A")
        return ("E", *(("A",) if self.of_size else ()), *(("B",) if self.of_tokens else ()))

    def columns(self, exponents: Sequence[float], n_parameters: Array, n_tokens: Array) -> Array:
        """Return the columns that the coefficients multiply, ``[n, n_coefficients]``."""
        by_name = dict(zip(self.exponents, exponents, strict=True))
        one = np.ones_like(n_tokens)
        if self.name == "forgetting":
            power = n_tokens ** by_name.get("gamma", 0.0) * n_parameters ** -by_name.get("delta", 0.0)
            return np.stack([one, power], axis=-1)
        terms = [one]
        if self.of_size:
            terms.append(n_parameters ** -by_name["alpha"])
        if self.of_tokens:
            terms.append(n_tokens ** -by_name["beta"])
        return np.stack(terms, axis=-1)

    def solve(self, columns: Array, values: Array) -> tuple[Array, float]:
        """Return the best coefficients and their sum of squares; E of forgetting may have any sign."""
        if self.name == "forgetting":
            found, residual = optimize.nnls(np.hstack([columns, -columns[:, :1]]), values)
            return np.array([found[0] - found[2], found[1]]), float(residual**2)
        found, residual = optimize.nnls(columns, values)
        return found, float(residual**2)


def law_for(name: LawName, observations: Sequence[Observation]) -> tuple[Law | None, str | None]:
    """Return the law that a sweep can carry, or None and why it is too small."""
    budgets = {one.n_tokens for one in observations}
    sizes = {one.n_parameters for one in observations}
    of_tokens, of_size = len(budgets) > 1, len(sizes) > 1
    if not of_tokens and not of_size:
        return None, "all runs have one budget and one model size"
    for several, unlike, what in ((of_tokens, budgets, "budgets"), (of_size, sizes, "model sizes")):
        if several and len(unlike) < LEAST:
            return None, f"{len(unlike)} different {what}: an exponent needs {LEAST}"
    law = Law(name, of_tokens=of_tokens, of_size=of_size)
    n_free = len(law.exponents) + len(law.coefficients)
    if len(observations) <= n_free:
        return None, f"{len(observations)} runs for {n_free} numbers to fit: at least one more is needed"
    return law, None


@dataclass(frozen=True)
class Fit:
    """A fitted law with its profile; N and D are in units of their geometric means inside."""

    law: Law
    observations: tuple[Observation, ...]
    exponents: tuple[float, ...]
    coefficients: Array
    """In the inner units, see ``scales``."""
    sum_of_squares: float
    scales: tuple[float, float]
    grid: Array
    """Searched exponents, ``[G, n_exponents]``."""
    profile: Array
    """Least sum of squares at each, ``[G]``."""

    @property
    def n_free(self) -> int:
        """Numbers that were fitted."""
        return len(self.exponents) + len(self.coefficients)

    @property
    def df(self) -> int:
        """Degrees of freedom that are left."""
        return len(self.observations) - self.n_free

    @property
    def residual_sd(self) -> float:
        """Standard deviation of the residuals."""
        return math.sqrt(self.sum_of_squares / self.df)

    @property
    def limit(self) -> float:
        """The sum of squares that a point of the 95 % profile region may have."""
        t = float(special.stdtrit(self.df, (1 + LEVEL) / 2))
        return self.sum_of_squares * (1 + t**2 / self.df) + 1e-18

    def exponent_intervals(self) -> dict[str, tuple[float, float, float]]:
        """Return exponent -> (value, low, high); an end of EXPONENTS means that the data do not bound it there."""
        inside = self.grid[self.profile <= self.limit]
        return {
            name: (
                self.exponents[i],
                float(min(inside[:, i].min(initial=self.exponents[i]), self.exponents[i])),
                float(max(inside[:, i].max(initial=self.exponents[i]), self.exponents[i])),
            )
            for i, name in enumerate(self.law.exponents)
        }

    def outer_coefficients(self) -> dict[str, float]:
        """Return the coefficients for N in parameters and D in tokens."""
        n, d = self.scales
        by_name = dict(zip(self.law.exponents, self.exponents, strict=True))
        found = dict(zip(self.law.coefficients, map(float, self.coefficients), strict=True))
        if self.law.name == "forgetting":
            found["A"] *= n ** by_name.get("delta", 0.0) * d ** -by_name.get("gamma", 0.0)
        else:
            if "A" in found:
                found["A"] *= n ** by_name["alpha"]
            if "B" in found:
                found["B"] *= d ** by_name["beta"]
        return found

    def at(self, n_parameters: float, n_tokens: float) -> float:
        """Return the fitted value."""
        return float((self._columns(self.exponents, n_parameters, n_tokens) @ self.coefficients)[0])

    def _columns(self, exponents: Sequence[float], n_parameters: float, n_tokens: float) -> Array:
        n, d = self.scales
        return self.law.columns(exponents, np.array([n_parameters / n]), np.array([n_tokens / d]))

    def predict(self, n_parameters: float, n_tokens: float) -> Prediction:
        """Return the value for one more run, with its interval.

        The profile interval of the law's value there, widened by the scatter of a single run: both half-widths are
        added in squares.
        """
        value = self.at(n_parameters, n_tokens)
        own = float(special.stdtrit(self.df, (1 + LEVEL) / 2)) * self.residual_sd
        low, high = (self._bound(n_parameters, n_tokens, value, side) for side in (-1, 1))
        return Prediction(
            n_parameters, n_tokens, value, value - math.hypot(value - low, own), value + math.hypot(high - value, own)
        )

    def _bound(self, n_parameters: float, n_tokens: float, value: float, side: int) -> float:
        """Return how far the law's value there can go on one side before the fit is worse than ``limit``."""
        y = np.array([one.value for one in self.observations])
        region = np.unique(self.grid[self.profile <= self.limit], axis=0)
        region = region[np.unique(np.linspace(0, len(region) - 1, N_DESIGNS[len(self.exponents)]).astype(int))]
        designs = [(self._design(e), self._columns(tuple(e), n_parameters, n_tokens)) for e in region]

        def outside(at: float) -> bool:
            return all(
                self.law.solve(np.vstack([X, PIN * x]), np.append(y, PIN * at))[1] > self.limit for X, x in designs
            )

        step = max(self.residual_sd, 1e-9)
        while not outside(value + side * step) and step < 1e6:
            step *= 2
        if step >= 1e6:
            return side * math.inf
        inner, outer = step / 2 if step > self.residual_sd else 0.0, step
        for _ in range(30):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(value + side * middle) else (middle, outer)
        return value + side * outer

    def _design(self, exponents: Sequence[float]) -> Array:
        return _design(self.law, exponents, self.observations, self.scales)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "law": self.law.name,
            "n_runs": len(self.observations),
            "residual_sd_nats": self.residual_sd,
            "coefficients": self.outer_coefficients(),
            "exponents": {
                name: {
                    "value": value,
                    "low": low,
                    "high": high,
                    "bounded": bool(low > EXPONENTS[0] * 1.001 and high < EXPONENTS[1] * 0.999),
                }
                for name, (value, low, high) in self.exponent_intervals().items()
            },
        }


def _design(
    law: Law, exponents: Sequence[float], observations: Sequence[Observation], scales: tuple[float, float]
) -> Array:
    n = np.array([one.n_parameters for one in observations]) / scales[0]
    d = np.array([one.n_tokens for one in observations]) / scales[1]
    return law.columns(exponents, n, d)


def fit(law: Law, observations: Sequence[Observation]) -> Fit:
    """Fit a law by variable projection: a grid over the exponents, then a finer search from its best point."""
    y = np.array([one.value for one in observations])
    scales = tuple(
        float(np.exp(np.mean(np.log([getattr(one, name) for one in observations]))))
        for name in ("n_parameters", "n_tokens")
    )
    assert len(scales) == 2

    def sum_of_squares(exponents: Sequence[float]) -> float:
        return law.solve(_design(law, exponents, observations, scales), y)[1]

    axis = np.geomspace(*EXPONENTS, GRID[len(law.exponents)])
    coarse = np.array(list(itertools.product(axis, repeat=len(law.exponents))))
    start = coarse[int(np.argmin([sum_of_squares(one) for one in coarse]))]
    found = optimize.minimize(
        lambda logs: sum_of_squares(np.exp(np.clip(logs, *np.log(EXPONENTS)))),
        np.log(start),
        method="Nelder-Mead",
        options={"xatol": 1e-6, "fatol": 1e-16, "maxiter": 400},
    )
    best = np.exp(np.clip(found.x, *np.log(EXPONENTS)))
    # Finer and finer around the best point, so that a narrow profile is seen, too.
    around = [
        best * np.array(list(itertools.product(np.geomspace(1 / reach, reach, 15), repeat=len(best))))
        for reach in REACHES
    ]
    grid = np.vstack([coarse, np.clip(np.vstack(around), *EXPONENTS), best[None]])
    coefficients, least = law.solve(_design(law, best, observations, scales), y)
    return Fit(
        law=law,
        observations=tuple(observations),
        exponents=tuple(float(one) for one in best),
        coefficients=coefficients,
        sum_of_squares=least,
        scales=scales,
        grid=grid,
        profile=np.array([sum_of_squares(one) for one in grid]),
    )


@dataclass(frozen=True)
class BackTest:
    """How wrong the procedure was on budgets that it did not see."""

    hidden: tuple[float, ...]
    """Budgets, in tokens a stage."""
    reach: float
    """Largest hidden budget divided by the largest that was fitted."""
    predictions: tuple[Prediction, ...]
    measured: tuple[float, ...]
    error: float
    """Mean of |predicted - measured|, nats."""
    error_of_no_change: float
    """The same for predicting what the largest fitted budget had."""
    covered: float
    """Share of the hidden runs inside their 95 % interval."""
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "hidden_n_tokens": list(self.hidden),
            "reach": finite_or_none(self.reach),
            "runs": [
                {**one.as_dict(), "measured": measured}
                for one, measured in zip(self.predictions, self.measured, strict=True)
            ],
            "error_nats": finite_or_none(self.error),
            "error_of_no_change_nats": finite_or_none(self.error_of_no_change),
            "covered": finite_or_none(self.covered),
            "reason": self.reason,
        }


def back_test(name: LawName, observations: Sequence[Observation], n_hidden: int = 1) -> BackTest:
    """Hide the ``n_hidden`` largest budgets, fit the rest, and compare."""
    budgets = sorted({one.n_tokens for one in observations})
    hidden = tuple(budgets[-n_hidden:])
    kept = [one for one in observations if one.n_tokens not in hidden]
    nothing = BackTest(hidden, math.nan, (), (), math.nan, math.nan, math.nan)
    if len(budgets) <= n_hidden:
        return replace(nothing, reason=f"{len(budgets)} budgets, of which {n_hidden} are to be hidden")
    law, reason = law_for(name, kept)
    if law is None:
        return replace(nothing, reason=f"without the largest budgets: {reason}")
    fitted = fit(law, kept)
    tested = [one for one in observations if one.n_tokens in hidden]
    found = [fitted.predict(one.n_parameters, one.n_tokens) for one in tested]
    last = [one for one in kept if one.n_tokens == max(other.n_tokens for other in kept)]

    def unchanged(one: Observation) -> float:
        alike = [other.value for other in last if other.n_parameters == one.n_parameters]
        return float(np.mean(alike or [other.value for other in last]))

    return BackTest(
        hidden=hidden,
        reach=hidden[-1] / last[0].n_tokens,
        predictions=tuple(found),
        measured=tuple(one.value for one in tested),
        error=float(np.mean([abs(p.value - one.value) for p, one in zip(found, tested, strict=True)])),
        error_of_no_change=float(np.mean([abs(unchanged(one) - one.value) for one in tested])),
        covered=float(np.mean([p.low <= one.value <= p.high for p, one in zip(found, tested, strict=True)])),
    )


# runs


@dataclass(frozen=True)
class Forecast:
    """What is said about one method and one metric."""

    method: str
    metric: str
    observations: tuple[Observation, ...]
    prediction: Prediction
    fit: Fit | None
    back_test: BackTest
    reach: float
    """Wanted budget divided by the largest measured one."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "method": self.method,
            "metric": self.metric,
            "prediction": self.prediction.as_dict(),
            "reach": self.reach,
            "fit": None if self.fit is None else self.fit.as_dict(),
            "back_test": self.back_test.as_dict(),
            "runs": [vars(one) for one in self.observations],
        }


def wanted_tokens(at: str, largest: float) -> float:
    """Return the budget that ``10x`` (times the largest measured) or ``3e6`` (tokens a stage) asks for.

    Raises:
        ConfigError: it is neither, or not above 0.
    """
    try:
        value = float(at.removesuffix("x")) * (largest if at.endswith("x") else 1.0)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{at!r} is no budget", where="--at", mend="give a multiple such as 10x, or tokens a stage")
    return value


def observe(runs: Iterable[RunStore]) -> tuple[dict[str, list[tuple[RunStore, Observation]]], dict[str, str]]:
    """Return method -> (run, N and D), and folder -> why a run is left out.

    Raises:
        ConfigError: the runs are of several streams: their losses do not compare.
    """
    found: dict[str, list[tuple[RunStore, Observation]]] = {}
    left_out: dict[str, str] = {}
    streams: dict[str, str] = {}
    for store in runs:
        config = store.config()
        streams.setdefault(str(config["track"].get("stream_sha256")), str(store.folder))
        trained = [stage["index"] for stage in config["stages"] if stage["index"] > 0]
        if store.stages_done() != [0, *trained]:
            left_out[str(store.folder)] = "not every stage has its row"
            continue
        tokens = store.ledger().get("tokens", {})
        total = sum(n for sources in tokens.values() for n in sources.values())
        if not total:
            left_out[str(store.folder)] = "trained on no tokens, or has no bill"
            continue
        size = float(config["base"]["n_parameters"])
        one = Observation(size, total / len(trained), math.nan, f"seed {config['seed']}")
        found.setdefault(str(config["method"]["label"]), []).append((store, one))
    if len(streams) > 1:
        raise ConfigError(
            "these runs are of different streams, so their losses do not compare",
            where=" and ".join(list(streams.values())[:2]),
            mend="give runs of one stream",
        )
    return found, left_out


def forecasts(
    runs: Iterable[RunStore], at: str, *, n_parameters: float | None = None, n_hidden: int = 1
) -> tuple[list[Forecast], dict[str, str]]:
    """Return a forecast for every method and metric, and why runs are left out.

    Args:
        runs: a sweep: runs of a method that differ in tokens a stage, in model size, or in both.
        at: ``10x`` or tokens a stage.
        n_parameters: size that is asked for; the largest one measured when not given.
        n_hidden: budgets that the back-test hides.
    """
    by_method, left_out = observe(runs)
    found = []
    for method, pairs in by_method.items():
        for metric, name in TARGETS.items():
            values = [(METRICS[metric].compute(matrix_of(store), None).value, one) for store, one in pairs]
            finite = (replace(one, value=value) for value, one in values if math.isfinite(value))
            observations = sorted(finite, key=lambda one: (one.n_parameters, one.n_tokens))
            found.append(_forecast(method, metric, name, observations, at, n_parameters, n_hidden))
    return found, left_out


def _forecast(
    method: str,
    metric: str,
    name: LawName,
    observations: Sequence[Observation],
    at: str,
    n_parameters: float | None,
    n_hidden: int,
) -> Forecast:
    largest = max((one.n_tokens for one in observations), default=math.nan)
    size = n_parameters or max((one.n_parameters for one in observations), default=math.nan)
    wanted = wanted_tokens(at, largest) if observations else math.nan
    law, reason = law_for(name, observations)
    if law is not None and not law.of_size and n_parameters not in (None, observations[0].n_parameters):
        law, reason = None, "all runs have one model size: nothing is known about another"
    fitted = None if law is None else fit(law, observations)
    return Forecast(
        method=method,
        metric=metric,
        observations=tuple(observations),
        prediction=Prediction(size, wanted, math.nan, reason=reason)
        if fitted is None
        else fitted.predict(size, wanted),
        fit=fitted,
        back_test=back_test(name, observations, n_hidden),
        reach=wanted / largest,
    )
