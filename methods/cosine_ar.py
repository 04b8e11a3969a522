"""Cyclic cosine with autoregressive peaks: each is read off a cosine that ends with its stage (TiC-LM)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clbench.method import Cosine, Method, Stage, StagePlan
from clbench.methods._schedules import PeakOptions, check, peak_and_end


class CosineAr(Method):
    """Cyclic cosine whose peak falls from stage to stage, towards the floor.

    The chain begins at the first trained stage, i = 0; what made the base is no part of it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(PeakOptions):
        """Options of cosine-ar; ``peak`` is the first stage's, the floor a share of it."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)

    def plan(self, stage: Stage) -> StagePlan:
        """Return the cosine of this stage."""
        first, end = peak_and_end(self.options, stage)
        peak = autoregressive_peak(stage.index - 1, first, end)
        return StagePlan(schedule=Cosine(peak=peak, warmup_steps=stage.warmup_steps, floor=end / peak))


def autoregressive_peak(i: int, first: float, end: float) -> float:
    """Return the peak of the i-th trained stage, ``end + (first - end)/2 (1 + cos(pi i/(i+1)))``.

    Closed form of the meta-schedule in TiC-LM's released code, whatever the steps and the warm-up of a stage.
    """
    return end + 0.5 * (first - end) * (1 + math.cos(math.pi * i / (i + 1)))
