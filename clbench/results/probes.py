"""What a plasticity probe says: figures of learning curves, and checkpoints compared with the base. Pure functions.

A probe trains every checkpoint on the same small budget of text that none of them has seen, with fresh optimizer
state, over several orders of the data and several learning rates (``clbench.probe``). Here the unit of replication is
the order of the data; all models share it, so differences are paired. Losses are nats per token, lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clbench.errors import ConfigError
from clbench.results import stats
from clbench.results.clemc import interval_dict
from clbench.results.matrix import Array
from clbench.results.metrics import Value
from clbench.results.stats import Interval

FIGURES = ("start", "final", "drop", "area")
BASE = "base"
FRESH = "fresh"


@dataclass(frozen=True)
class Curve:
    """Held-out loss of one probe over its budget: ``tokens`` from 0 on, ascending, ``loss_nats`` beside it, ``[S]``."""

    tokens: Array
    loss_nats: Array

    def __post_init__(self) -> None:
        """Check that it is a curve.

        Raises:
            ConfigError: fewer than two points, not ascending from 0, or no finite loss.
        """
        n = len(self.tokens)
        if n < 2 or len(self.loss_nats) != n or self.tokens[0] != 0 or np.any(np.diff(self.tokens) <= 0):
            raise ConfigError("a learning curve has two points or more, from 0 tokens on", mend="probe again")
        if not np.all(np.isfinite(self.loss_nats)):
            raise ConfigError("a probe's loss is not finite", mend="lower the learning rate")

    @property
    def start(self) -> float:
        """Loss before the first step."""
        return float(self.loss_nats[0])

    @property
    def final(self) -> float:
        """Loss when the budget is spent."""
        return float(self.loss_nats[-1])

    @property
    def drop(self) -> float:
        """How much was learnt, start minus final."""
        return self.start - self.final

    @property
    def area(self) -> float:
        """Area under the curve divided by the budget: the mean loss on the way, by trapezoids over tokens."""
        return float(np.trapezoid(self.loss_nats, self.tokens) / self.tokens[-1])

    def tokens_to(self, threshold: float) -> Value:
        """Return the tokens until the loss is at most ``threshold``, linear between points; NaN if it never is."""
        reached = np.flatnonzero(self.loss_nats <= threshold)
        if not len(reached):
            return Value(np.array(math.nan), f"the budget ends at {self.final:.3f} nats, above {threshold:.3f}")
        place = int(reached[0])
        if place == 0:
            return Value(np.array(0.0))
        high, low = self.loss_nats[place - 1], self.loss_nats[place]
        share = (high - threshold) / (high - low)
        before, after = self.tokens[place - 1], self.tokens[place]
        return Value(np.array(before + share * (after - before)))


Curves = Mapping[str, Mapping[int, Curve]]
"""Rate (``1/3``) -> order -> curve, of one model."""


@dataclass(frozen=True)
class Loss:
    """Loss of plasticity of one model: its area minus the base's, paired by order. Positive: it learns worse."""

    by_rate: Mapping[str, Interval]
    at_best: Interval
    """Each model at its own best learning rate, chosen on these same orders."""
    best_rate: str
    best_rate_of_base: str

    @property
    def verdict(self) -> str:
        """Say in words what holds over the learning rates."""
        rates = list(self.by_rate)
        lost = [rate for rate in rates if self.by_rate[rate].low > 0]
        if any(math.isnan(one.low) for one in (*self.by_rate.values(), self.at_best)):
            return "not told: no interval (give two orders or more)"
        if self.at_best.low > 0 and len(lost) == len(rates):
            return "loss of plasticity at every rate and at the best"
        if self.at_best.low > 0:
            return f"loss of plasticity at the best rates; at equal rates only at {', '.join(lost) or 'none'}"
        if lost:
            return f"an effect of the learning rate: lost at {', '.join(lost)}, not at the best rates"
        return "learns better than the base" if self.at_best.high < 0 else "no loss of plasticity can be told"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "by_rate": {rate: interval_dict(one) for rate, one in self.by_rate.items()},
            "at_best": interval_dict(self.at_best),
            "best_rate": self.best_rate,
            "best_rate_of_base": self.best_rate_of_base,
            "verdict": self.verdict,
        }


def best_rate(curves: Curves) -> str:
    """Return the learning rate with the least mean area over orders; the first of equals."""
    return min(curves, key=lambda rate: float(np.mean([one.area for one in curves[rate].values()])))


def default_threshold(base: Curves) -> float:
    """Return the loss at which the base, at its best rate, has made half of its drop (means over orders)."""
    at_best = base[best_rate(base)].values()
    return float(np.mean([(one.start + one.final) / 2 for one in at_best]))


def loss_of_plasticity(model: Curves, base: Curves) -> Loss:
    """Return how much worse a model learns than the base, at every rate and at each one's best rate.

    Raises:
        ConfigError: they were not probed with the same rates and orders.
    """
    if {r: set(c) for r, c in model.items()} != {r: set(c) for r, c in base.items()}:
        raise ConfigError("the two were not probed alike", mend="probe both with the same rates and orders")
    own, theirs = best_rate(model), best_rate(base)
    return Loss(
        by_rate={rate: _paired(model[rate], base[rate]) for rate in model},
        at_best=_paired(model[own], base[theirs]),
        best_rate=own,
        best_rate_of_base=theirs,
    )


def _paired(model: Mapping[int, Curve], base: Mapping[int, Curve]) -> Interval:
    orders = sorted(model)
    return stats.paired_t([model[o].area for o in orders], [base[o].area for o in orders])


def figures(curves: Curves, threshold: float) -> dict[str, dict[str, Interval]]:
    """Return rate -> figure -> t-interval over orders; ``tokens_to`` is the tokens to the threshold."""
    found = {}
    for rate, by_order in curves.items():
        each = [by_order[order] for order in sorted(by_order)]
        found[rate] = {name: stats.t_interval([getattr(one, name) for one in each]) for name in FIGURES}
        reached = [one.tokens_to(threshold) for one in each]
        failed = next((one.reason for one in reached if one.reason), None)
        found[rate]["tokens_to"] = (
            Interval(math.nan, n=len(each), reason=failed) if failed else stats.t_interval([v.value for v in reached])
        )
    return found


def mean_curve(curves: Iterable[Curve]) -> Curve:
    """Return the mean over orders, which share the same tokens.

    Raises:
        ConfigError: they do not.
    """
    each = list(curves)
    if any(not np.array_equal(one.tokens, each[0].tokens) for one in each):
        raise ConfigError("these curves were measured after different tokens", mend="probe again")
    return Curve(each[0].tokens, np.mean([one.loss_nats for one in each], axis=0))


def report(models: Mapping[str, Curves], *, threshold: float | None = None) -> dict[str, Any]:
    """Return all figures as JSON-able values.

    Args:
        models: name -> curves; ``base`` must be there, ``fresh`` may be.
        threshold: loss in nats per token; ``default_threshold`` when not given.
    """
    base = models[BASE]
    level = default_threshold(base) if threshold is None else threshold
    found: dict[str, Any] = {}
    for name, curves in models.items():
        means = {rate: mean_curve(by_order.values()) for rate, by_order in curves.items()}
        found[name] = {
            "figures": {
                rate: {figure: interval_dict(one) for figure, one in values.items()}
                for rate, values in figures(curves, level).items()
            },
            "curves": {
                rate: {"tokens": mean.tokens.tolist(), "loss_nats": mean.loss_nats.tolist()}
                for rate, mean in means.items()
            },
            "best_rate": best_rate(curves),
        }
        for other in (BASE, FRESH):
            if other in models and other != name:
                found[name][f"against_{other}"] = loss_of_plasticity(curves, models[other]).as_dict()
    return {"threshold_nats": level, "models": found}


def orders_of(curves: Curves) -> Sequence[int]:
    """Return the data orders that were probed."""
    return sorted(next(iter(curves.values())))
