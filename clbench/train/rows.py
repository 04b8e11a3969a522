"""From a stage's plan to the rows that it trains on: budget, mixture, pools, reviews. The loop and audits share it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from clbench.method import Stage, StagePlan
from clbench.stream import Stream
from clbench.track import TrainingSpec
from clbench.train.data import DataOrder, Draw


@dataclass(frozen=True, kw_only=True)
class RowPlanner:
    """What decides the rows of a run besides its plans.

    Args:
        stream: the built stream.
        training: the track's settings.
        seed: the run's seed.
        keeps_control: whether control rows are kept back (``Need.CONTROL_DATA``).
    """

    stream: Stream
    training: TrainingSpec
    seed: int
    keeps_control: bool = False

    def draw(self, plan: StagePlan) -> Draw:
        """Return what a plan lets be drawn."""
        return Draw(
            pools=plan.pools or {},
            excluded=plan.excluded,
            keeps_control=self.keeps_control,
            in_sequence=plan.review_steps is not None,
        )

    def rows(self, stage: Stage, plan: StagePlan) -> DataOrder:
        """Return all rows of a stage under its plan; the new stage alone when the plan names no mixture."""
        return self._rows(stage, plan, self.draw(plan), used=0)

    def redraw(self, stage: Stage, plan: StagePlan, order: DataOrder, step: int) -> None:
        """Draw the rows from a step on anew, in place: each source goes on where it stands, the budget stays."""
        rows, tokens = order.drawn(step)
        used = sum((tokens if self.training.n_steps_per_stage is None else rows).values())
        order.then(step, self._rows(stage, plan, replace(self.draw(plan), drawn=rows), used=used))

    def _rows(self, stage: Stage, plan: StagePlan, draw: Draw, *, used: int) -> DataOrder:
        training = self.training
        n_steps = training.n_steps_per_stage
        return DataOrder(
            self.stream,
            plan.mixture or {stage.index: 1.0},
            n_tokens=stage.n_tokens - used,
            length=training.sequence_length,
            batch_rows=training.batch_rows,
            seed=self.seed,
            stage=stage.index,
            batching=training.batching,
            n_rows=None if n_steps is None else n_steps * training.batch_rows - used,
            draw=draw,
        )


def reviewed(plan: StagePlan, entry: dict[str, Any]) -> StagePlan:
    """Return a plan with what a review made of it, as the ledger holds it (``Ledger.note_plan``)."""
    mixture, pools = ({int(i): n for i, n in entry.get(part, {}).items()} for part in ("mixture", "pools"))
    return replace(plan, mixture=mixture, pools=pools or None)
