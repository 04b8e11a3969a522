"""WiSE-FT: release a point on the line from base to trained weights (Wortsman et al. 2022, arXiv 2109.01903)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clbench.method import Context, Weights
from clbench.methods import _merging as merging
from clbench.methods._averages import check_range


class WiseFt(merging.Merging):
    """Release ``(1 - alpha) W0 + alpha W1`` of all weights; training itself is unchanged.

    With one base and one trained model, task arithmetic with weight alpha is the same.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(merging.MergeOptions):
        """Options of WiseFt."""

        alpha: float = 0.5
        """Share of the trained weights: 1 releases them, 0 the base's, both to the bit."""
        interp: Literal["lerp", "slerp"] = "lerp"
        """lerp: the straight line; slerp: an arc for every matrix, the same up to drifts of about 3 %."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check_range("wise_ft", "alpha", self.options.alpha, 0, 1)

    def merge(self, ctx: Context, tuned: Weights, base: Weights) -> Weights:
        """Return all weights on the line."""
        strengths = dict.fromkeys(tuned, 1 - self.options.alpha)
        return merging.restored(tuned, base, strengths, self.options.interp)
