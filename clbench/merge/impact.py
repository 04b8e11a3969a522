"""What restoring one layer really does: the direct estimate that the scores of SPEAR-MM are a cheap stand-in for.

For every unit the tuned model with that unit as in the base is measured on general and on domain text: one pair of
evaluations a unit, no training. How well the scores foretell it is their Spearman correlation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clbench.errors import ConfigError
from clbench.merge.front import undefined
from clbench.merge.scores import ranks
from clbench.merge.select import strengths_of
from clbench.method import Weights
from clbench.results.metrics import Value

Loss = Callable[[Weights], float]
"""Weights -> loss, lower is better."""
EPSILON_NATS = 1e-3
"""Added to what restoring costs on the domain: below it, costs count the same."""


@dataclass(frozen=True, kw_only=True)
class Impact:
    """What restoring one unit alone does."""

    unit: str
    general_gain: float
    """Loss on general text of the tuned model less that of the restored one: positive = restoring helps."""
    domain_cost: float
    """Loss on domain text of the restored model less that of the tuned one: positive = restoring hurts."""

    @property
    def value(self) -> float:
        """General gain per domain cost; a cost below 0 counts as none."""
        return self.general_gain / (EPSILON_NATS + max(0.0, self.domain_cost))


def leave_one_restored(
    tuned: Weights,
    base: Weights,
    units: Sequence[str],
    *,
    general: Loss,
    domain: Loss,
    progress: Callable[[str], None] | None = None,
) -> list[Impact]:
    """Return the impact of restoring each unit alone, in the order of the units.

    Args:
        tuned: weights after training; never changed.
        base: weights before it.
        units: dotted paths, see ``scores``.
        general: loss on general text.
        domain: loss on domain text, of other documents than were trained on.
        progress: is told of every unit before it is measured.

    Raises:
        ConfigError: a unit that owns no tensor.
    """
    general_tuned, domain_tuned = general(tuned), domain(tuned)
    found = []
    for unit in units:
        inside = [name for name, s in strengths_of(tuned, [unit], 1.0).items() if s]
        if not inside:
            raise ConfigError(f"unit {unit!r} owns no tensor", mend="take units from scores of the same model")
        if progress is not None:
            progress(unit)
        restored = tuned | {name: base[name] for name in inside}
        found.append(
            Impact(
                unit=unit,
                general_gain=general_tuned - general(restored),
                domain_cost=domain(restored) - domain_tuned,
            )
        )
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> Value:
    """Return Spearman's rank correlation; equal values share the mean of their ranks."""
    if len(first) != len(second):
        raise ConfigError(f"{len(first)} values against {len(second)}", mend="give pairs")
    if len(first) < 3:
        return undefined(f"{len(first)} pairs have no correlation worth the name")
    a, b = ranks(first), ranks(second)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return undefined("all values of one side are equal")
    return Value(np.array(np.corrcoef(a, b)[0, 1]))


def agreement(impacts: Sequence[Impact], scores: Mapping[str, float]) -> Value:
    """Return how well unit scores foretell the impacts: Spearman's rho, 1 = the same order."""
    return spearman([scores[impact.unit] for impact in impacts], [impact.value for impact in impacts])
