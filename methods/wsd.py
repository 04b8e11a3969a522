"""WSD, warm-up, stable, decay: training goes on from the plateau, releases decay in branches that are thrown away."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Method, Stage, StagePlan
from clbench.methods._schedules import DecayOptions, check, plateau_and_decay, policy_of, released_aside


class Wsd(Method):
    """Hold the peak over all stages; decay for each release alone (MiniCPM, arXiv 2404.06395, section 4).

    The branch sees the stage's last tokens a second time and is billed as ``decay_branch``; the last stage decays
    on the main line, as nothing goes on from it. Tokens for K releases: those of the stages and sum_{k<K} D_k.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(DecayOptions):
        """Options of wsd."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)

    def plan(self, stage: Stage) -> StagePlan:
        """Return the plateau with its branch."""
        _, decayed = plateau_and_decay(self.options, stage)
        return released_aside(stage, decayed, policy_of(self.options.optimizer))
