"""``gradual``: periods that fade into each other, instead of one ending where the next begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clbench.derive import Taken
from clbench.errors import ConfigError
from clbench.stream import Split, StageInfo
from clbench.streams import _arrange


class Gradual(_arrange.Arrangement):
    """Each period is cut into ``steps`` stages, and their documents are spread over the neighbours.

    With S = steps, w = width, P periods and K = P S stages, a document of period p goes to stage k with probability

        share[p, k] = 1/S  sum_{j = pS}^{pS + S - 1}  t(k - j) / sum_{m = 0}^{K - 1} t(m - j)

    where t(d) = max(0, w + 1 - |d|), so every document is used once. With w = 0
    nothing mixes; with S = 1 and w = 1 a period in the middle keeps half of its text and gives a quarter to each
    neighbour.
    """

    name = "gradual"

    @dataclass(frozen=True, kw_only=True)
    class Options(_arrange.Arrangement.Options):
        """How slowly."""

        seed: int = 0
        """Another seed deals the documents otherwise."""
        width: int = 1
        """Stages to either side that a stage's documents are spread over; 0: none."""
        steps: int = 1
        """Stages that each period is cut into."""
        heldout: Literal["mixed", "kept"] = "mixed"
        """mixed: dealt like train. kept: every stage measures its own period alone (in all of its steps)."""

    def stages(self) -> list[StageInfo]:
        """Return ``2013``, or ``2013.1``, ``2013.2`` … with several steps; dates span the periods that mix."""
        shares = self._shares()
        spans = []
        for k in range(shares.shape[1]):
            period, step = divmod(k, self.options.steps)
            name = self.periods[period].name + (f".{step + 1}" if self.options.steps > 1 else "")
            spans.append((name, [info for info, share in zip(self.periods, shares[:, k], strict=True) if share > 0]))
        return self.following(spans)

    def arranged(self, split: Split) -> list[Taken]:
        """Deal every period by its shares, and mix what meets in a stage."""
        if split == "heldout" and self.options.heldout == "kept":
            return [self.period(split, info) for info in self.periods for _ in range(self.options.steps)]
        shares = self._shares()
        parts: list[list[Taken]] = [[] for _ in range(shares.shape[1])]
        for p, info in enumerate(self.periods):
            reached = np.flatnonzero(shares[p])
            dealt = self.dealt(split, self.period(split, info), shares[p, reached].tolist(), info.index)
            for k, part in zip(reached.tolist(), dealt, strict=True):
                parts[k].append(part)
        return [self.shuffled(Taken.joined(found), split, "mix", k) for k, found in enumerate(parts)]

    def _shares(self) -> NDArray[np.float64]:
        if self.options.width < 0 or self.options.steps < 1:
            raise ConfigError(
                f"width={self.options.width}, steps={self.options.steps}",
                where=self.name,
                mend="choose a width of at least 0 and at least 1 step",
            )
        return shares(len(self.periods), self.options.steps, self.options.width)


def shares(n_periods: int, steps: int, width: int) -> NDArray[np.float64]:
    """Return which share of a period's tokens goes to each stage, ``[n_periods, n_periods * steps]``."""
    place = np.arange(n_periods * steps)
    kernel = np.maximum(0.0, width + 1.0 - np.abs(place[:, None] - place))
    kernel /= kernel.sum(axis=1, keepdims=True)
    found: NDArray[np.float64] = kernel.reshape(n_periods, steps, -1).mean(axis=1)
    return found
