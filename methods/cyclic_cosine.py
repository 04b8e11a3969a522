"""Cyclic cosine: warm-up and a whole cosine in every stage (TiC-LM); the track's schedule with options."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Cosine, Method, Stage, StagePlan
from clbench.methods._schedules import PeakOptions, check, floor_of


class CyclicCosine(Method):
    """Warm up to the same peak in every stage and decay along a cosine to the floor.

    ``lr(s) = end + (peak - end)/2 (1 + cos(pi (s-W)/(S-W)))`` after W steps of warm-up (TiC-LM, open_lm's scheduler).
    With its default options it is what ``sequential`` does.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(PeakOptions):
        """Options of cyclic-cosine."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)

    def plan(self, stage: Stage) -> StagePlan:
        """Return the cosine of this stage."""
        peak = self.options.peak * stage.learning_rate
        floor = floor_of(self.options, stage)
        return StagePlan(schedule=Cosine(peak=peak, warmup_steps=stage.warmup_steps, floor=floor))
