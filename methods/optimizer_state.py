"""What Adam remembers from one stage to the next, a factor to compose with schedules that leave it open."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Method, Stage, StagePlan
from clbench.methods._schedules import policy_of, require


class OptimizerState(Method):
    """Carry, reset or partly reset the optimizer's state at every stage's start."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of optimizer-state."""

        policy: str = "carry"
        """carry: both moments stay. reset: both go, as in TiC-LM. reset_first: the momentum goes, the scale stays."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        policy = self.options.policy
        require(
            policy_of(policy) is not None, f"policy={policy} leaves it open, too", "give carry, reset or reset_first"
        )

    def plan(self, stage: Stage) -> StagePlan:
        """Ask for the policy."""
        return StagePlan(optimizer=policy_of(self.options.policy))
