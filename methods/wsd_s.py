"""WSD-S, simplified WSD: every stage holds and decays, the next goes on from the decayed weights at the peak."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Method, Stage, StagePlan
from clbench.methods._schedules import DecayOptions, check, plateau_and_decay, policy_of


class WsdS(Method):
    """Hold the peak and decay within every stage; no token is seen twice (Wen et al. 2024, arXiv 2410.05192).

    With a decay of everything after a warm-up in every stage, along a cosine, it is the cyclic cosine.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(DecayOptions):
        """Options of wsd-s."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)

    def plan(self, stage: Stage) -> StagePlan:
        """Return the plateau that ends in its decay."""
        _, decayed = plateau_and_decay(self.options, stage)
        return StagePlan(schedule=decayed, optimizer=policy_of(self.options.optimizer))
