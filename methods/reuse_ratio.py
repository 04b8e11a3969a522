"""Adaptive RR: new text is passed over once while the model adapts, and several times once its units have settled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Stage, StagePlan, Weights
from clbench.methods._activity import ActiveUnits


class ReuseRatio(Method):
    """Raise the reuse of new text once, for good, when a plasticity signal is stable (Ma et al. 2024).

    In the paper (arXiv 2310.07418) the replay ratio is the number of updates per environment step of a reinforcement
    learner: how often data is reused, not how much of it is old. It goes from 0.5 to 2 when the fraction of active
    units of the critic moved by at most 0.001 between two checks. Here all draws of new text are first draws until
    then, and one in ``ratio`` of those after it: the pool of new text ends there, and further draws repeat it. The
    signal is the fraction of active units of the feed-forward layers on control rows of the new stage.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of reuse-ratio."""

        ratio: float = 4.0
        """Passes over new text after the change (0.5 to 2 in the paper is a factor of 4)."""
        threshold: float = 0.001
        """Largest change of the fraction of active units between two checks that counts as stable."""
        steps: int = 10
        """Optimizer steps between checks."""
        rows: int = 16
        """Control rows of the new stage at every check."""
        tau: float = 0.1
        """A unit is active on a token when it is larger than this times the mean of its layer."""

    needs = frozenset({Need.CONTROL_DATA})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        opt = self.options
        if not (1 <= opt.ratio < math.inf and opt.threshold >= 0 and opt.steps >= 1 and opt.rows >= 1 and opt.tau >= 0):
            raise ConfigError(
                f"reuse-ratio: ratio={opt.ratio}, threshold={opt.threshold}, steps={opt.steps}, rows={opt.rows}, "
                f"tau={opt.tau}",
                mend="take ratio, steps and rows from 1 on, threshold and tau from 0 on",
            )
        self.last: tuple[int, float] | None = None
        """Stage and value of the last check."""
        self.raised_in: int | None = None
        """Stage in which the reuse was raised."""

    def plan(self, stage: Stage) -> StagePlan:
        """Return that this stage is to be reviewed."""
        return StagePlan(review_steps=self.options.steps)

    def review(self, ctx: Context) -> StagePlan | None:
        """Check the signal, and bound the pool of new text where the reuse is raised."""
        k = ctx.stage.index
        if self.raised_in is None:
            if not self._settled(k, self._signal(ctx)):
                return None
            self.raised_in = k
        elif ctx.step > self.options.steps:
            return None  # the stage's pool stands
        drawn = ctx.tokens_drawn().get(k, 0)
        # The mixture may be another component's: what is still to come is taken to go on as it went so far.
        left = drawn * (ctx.n_steps - ctx.step) / ctx.step
        once = drawn if self.raised_in == k else 0  # in later stages all of it is reused
        pool = once + (drawn + left - once) / self.options.ratio
        return StagePlan(pools={k: max(drawn, math.ceil(pool), 1)})

    def _settled(self, stage: int, signal: float) -> bool:
        """Return whether the signal moved little since the check before it in the same stage, and remember it."""
        before, self.last = self.last, (stage, signal)
        return before is not None and before[0] == stage and abs(signal - before[1]) <= self.options.threshold

    def _signal(self, ctx: Context) -> float:
        units = ActiveUnits(self.options.tau)
        with units.counting(ctx.module):
            ctx.control_loss([ctx.stage.index], n_rows=self.options.rows)  # bills its passes
        return units.share

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the last check and where the reuse was raised."""
        return {}, {"last": list(self.last) if self.last is not None else None, "raised_in": self.raised_in}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take back the last check and where the reuse was raised."""
        self.last = (values["last"][0], values["last"][1]) if values["last"] is not None else None
        self.raised_in = values["raised_in"]
