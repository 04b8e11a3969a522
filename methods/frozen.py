"""Never update: the base model, measured at every stage. The other baseline."""

from __future__ import annotations

from clbench.method import Method, Stage, StagePlan


class Frozen(Method):
    """Take no step at any stage."""

    def plan(self, stage: Stage) -> StagePlan:
        """Ask for no training."""
        return StagePlan(train=False)
