"""One figure: a number, or NaN and why."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A finite number without a reason, or NaN with one."""

    value: float
    reason: str = ""

    def __post_init__(self) -> None:
        """Hold the two apart.

        Raises:
            ValueError: a number that is not finite has no reason, or a finite one has.
        """
        if math.isfinite(self.value) == bool(self.reason):
            raise ValueError(f"{self.value} with the reason {self.reason!r}")


def undefined(reason: str) -> Figure:
    """Return NaN and why."""
    return Figure(math.nan, reason)


def figure(value: float, reason: str) -> Figure:
    """Return a number where it is finite, else NaN and the reason."""
    return Figure(float(value)) if math.isfinite(value) else undefined(reason)
