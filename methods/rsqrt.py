"""Reciprocal square root with a cooldown, in both readings: as TiC-LM released it, and as one line with branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clbench.method import Context, Method, Need, Stage, StagePlan, Weights
from clbench.methods._schedules import (
    PeakOptions,
    ReciprocalRoot,
    check,
    decay_of,
    peak_and_end,
    policy_of,
    released_aside,
    require,
)

READINGS = ("cyclic", "branch")


class Rsqrt(Method):
    """Warm up, fall with one over the root of the step, and come down to the floor along a line.

    cyclic: every stage starts anew and the next goes on from the cooled weights, as in TiC-LM's released driver.
    branch: one curve over all stages; every release cools in a branch, and training goes on from before it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(PeakOptions):
        """Options of rsqrt."""

        reading: str = "cyclic"
        """cyclic or branch, see above."""
        cooldown: float = 0.2
        """Share of the stage's steps that cool down, above 0 and at most 1 (TiC-LM: 400 of 1887 steps, 0.21)."""
        optimizer: str | None = None
        """carry, reset, reset_first, or track to leave it to others; None: carry with branches, track when cyclic."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)
        reading = self.options.reading
        require(reading in READINGS, f"unknown reading {reading!r}", f"known: {', '.join(READINGS)}")
        self.branches = reading == "branch"
        self.stage_steps: list[int] = []

    def plan(self, stage: Stage) -> StagePlan:
        """Return this stage's part of the curve and its cooldown."""
        options = self.options
        peak, end = peak_and_end(options, stage)
        before = tuple(self.stage_steps[: stage.index - 1]) if self.branches else ()
        line = ReciprocalRoot(
            peak=peak, end=end, warmup_steps=stage.warmup_steps, tail=options.cooldown, steps_before=before
        )
        cooled = decay_of(line, end, shape="linear", fraction=options.cooldown)
        policy = policy_of(options.optimizer or ("carry" if self.branches else "track"))
        return released_aside(stage, cooled, policy) if self.branches else StagePlan(schedule=cooled, optimizer=policy)

    def end_stage(self, ctx: Context) -> None:
        """Remember how long this stage was, for the curve goes on after it."""
        self.stage_steps[ctx.stage.index - 1 :] = [ctx.n_steps]

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the steps of the stages so far."""
        return {}, {"stage_steps": list(self.stage_steps)}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.stage_steps = list(values["stage_steps"])
