"""A constant learning rate over all stages: what the schedules with a plateau are without a decay."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Method, Stage, StagePlan
from clbench.methods._schedules import Plateau, check, policy_of, warmup_of


class Constant(Method):
    """Warm up once, hold the peak for good, and release the weights as they are."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of constant."""

        peak: float = 1.0
        """The learning rate as a multiple of the track's."""
        rewarm: bool = False
        """Whether every stage warms up, not only the first."""
        optimizer: str = "carry"
        """Adam's state at a stage's start: carry, reset, reset_first, or track to leave it to others."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)

    def plan(self, stage: Stage) -> StagePlan:
        """Return the plateau."""
        options = self.options
        warmup = warmup_of(stage, rewarm=options.rewarm)
        line = Plateau(peak=options.peak * stage.learning_rate, warmup_steps=warmup)
        return StagePlan(schedule=line, optimizer=policy_of(options.optimizer))
