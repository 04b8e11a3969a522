"""Infinite schedule: warm-up, cooldown to a constant for good; releases anneal in branches (Ibrahim et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Method, Stage, StagePlan
from clbench.methods._schedules import (
    CooledPlateau,
    PeakOptions,
    Plateau,
    check,
    decay_of,
    peak_and_end,
    policy_of,
    released_aside,
    require,
)

COOLDOWNS = ("cosine", "rsqrt")


class Infinite(Method):
    """Cool down to a learning rate that training can keep, and anneal for each release alone.

    arXiv 2403.08763: from the peak to the constant over the cooldown, along a cosine or ``1/sqrt(1 + timescale u)``;
    then constant; a release falls as ``constant (end/constant)^u``. The last stage anneals on the main line.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(PeakOptions):
        """Options of infinite."""

        constant: float = 0.5
        """The constant learning rate as a share of the peak, from the floor to 1."""
        cooldown: float = 0.5
        """Share of a stage's steps from the peak down to the constant."""
        cooldown_shape: str = "cosine"
        """cosine or rsqrt."""
        timescale: float = 10.0
        """How steeply rsqrt begins, above 0."""
        decay: float = 0.1
        """Share of a stage's steps that anneal for its release; with the cooldown at most 1."""
        rewarm: bool = False
        """Whether every stage warms up to the peak and cools down again, not only the first."""
        optimizer: str = "carry"
        """Adam's state at a stage's start: carry, reset, reset_first, or track to leave it to others."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        own = self.options
        check(own)
        require(own.floor != 0, "an exponential annealing never reaches floor 0", "give a floor above 0")
        require(
            own.cooldown_shape in COOLDOWNS,
            f"unknown cooldown shape {own.cooldown_shape!r}",
            f"known: {', '.join(COOLDOWNS)}",
        )
        require(0 < own.timescale < 1e9, f"timescale={own.timescale} is no steepness", "give a number above 0")
        require(own.cooldown + own.decay <= 1, "cooldown and decay are longer than a stage", "lower one of them")

    def plan(self, stage: Stage) -> StagePlan:
        """Return this stage's part of the line, and its annealing."""
        own = self.options
        peak, end = peak_and_end(own, stage)
        constant = own.constant * peak
        require(end <= constant <= peak, f"constant={own.constant} is not between floor and peak", "move it there")
        line: CooledPlateau | Plateau = Plateau(peak=constant, warmup_steps=0)
        if own.rewarm or stage.index == 1:
            line = CooledPlateau(
                peak=peak,
                constant=constant,
                warmup_steps=stage.warmup_steps,
                cooldown=own.cooldown,
                tail=own.decay,
                timescale=own.timescale if own.cooldown_shape == "rsqrt" else None,
            )
        annealed = decay_of(line, end, shape="exponential", fraction=own.decay)
        return released_aside(stage, annealed, policy_of(own.optimizer))
