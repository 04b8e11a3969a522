"""Learning-rate schedules as small frozen values: warm-up, plateau, reciprocal root, decays of five shapes.

What a stage starts from and what it releases is left to the methods. Steps count as in open_lm, TiC-LM's trainer, and
in Levanter: step s of S from 0, warm-up (s+1)/W, and a tail of D steps passes u = e/D, e = 0..D-1. So a tail's first
step still has the learning rate before it, the floor is what the step after the last would get, and a tail of one
step decays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, get_args

from clbench.errors import ConfigError, did_you_mean
from clbench.method import Branch, OptimizerPolicy, Schedule, Stage, StagePlan, tail_steps

SHAPES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda u, floor: 1 - (1 - floor) * u,
    "cosine": lambda u, floor: floor + (1 - floor) * (1 + math.cos(math.pi * u)) / 2,
    "1-sqrt": lambda u, floor: floor + (1 - floor) * (1 - math.sqrt(u)),  # Hägele et al. 2024, arXiv 2405.18392
    "inverse": lambda u, floor: 1 / (1 + u * (1 / floor - 1)),  # linear in 1/lr: Wen et al. 2024, arXiv 2410.05192
    "exponential": lambda u, floor: floor**u,
}
"""Share of the starting learning rate that is left after a share u of a decay that ends at ``floor``."""
NEVER_ZERO = ("inverse", "exponential")


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Linear warm-up over W steps, then the peak for good: ``lr(s) = peak min(1, (s+1)/W)``."""

    peak: float
    warmup_steps: int
    tail: float = 0.0
    """Share of the stage's last steps that the warm-up has to leave free for a decay."""

    def __call__(self, step: int, n_steps: int) -> float:
        """Return the learning rate of step ``step`` of ``n_steps``."""
        return self.peak * ramp(step, fitting_warmup(self.warmup_steps, n_steps, self.tail))


@dataclass(frozen=True, kw_only=True)
class ReciprocalRoot:
    """Linear warm-up over W steps, then ``lr(g) = end + (peak - end) sqrt(W/g)`` (TiC-LM; Zhai et al. 2022).

    g counts on from the steps of earlier stages, where there are any.
    """

    peak: float
    end: float
    warmup_steps: int
    tail: float
    steps_before: tuple[int, ...] = ()
    """Steps of the earlier stages on the same line."""

    def __call__(self, step: int, n_steps: int) -> float:
        """Return the learning rate of step ``step`` of ``n_steps``."""
        first = self.steps_before[0] if self.steps_before else n_steps
        warmup = fitting_warmup(self.warmup_steps, first, self.tail)
        at = sum(self.steps_before) + step
        if at < warmup:
            return self.peak * ramp(at, warmup)
        scale = max(1, warmup)
        return self.end + (self.peak - self.end) * math.sqrt(scale / max(scale, at))


@dataclass(frozen=True, kw_only=True)
class CooledPlateau:
    """Warm-up over W steps, C steps down from the peak to a constant, then that for good (Ibrahim et al. 2024).

    Along a cosine, or with ``timescale`` t along ``h(u) = 1/sqrt(1 + t u) - 1``, scaled to meet both ends.
    """

    peak: float
    constant: float
    warmup_steps: int
    cooldown: float
    """Share of the stage's steps; cut where warm-up and tail leave fewer."""
    tail: float
    timescale: float | None = None
    """None: cosine."""

    def __call__(self, step: int, n_steps: int) -> float:
        """Return the learning rate of step ``step`` of ``n_steps``."""
        warmup = fitting_warmup(self.warmup_steps, n_steps, self.tail)
        if step < warmup:
            return self.peak * ramp(step, warmup)
        n_cool = min(round(self.cooldown * n_steps), n_steps - tail_steps(self.tail, n_steps) - warmup)
        u = min(1.0, (step - warmup) / n_cool) if n_cool else 1.0
        return self.constant + (self.peak - self.constant) * self.share_above(u)

    def share_above(self, u: float) -> float:
        """Return which share of the way down is left after a share u of the cooldown."""
        if self.timescale is None:
            return (1 + math.cos(math.pi * u)) / 2
        return 1 - (1 / math.sqrt(1 + self.timescale * u) - 1) / (1 / math.sqrt(1 + self.timescale) - 1)


@dataclass(frozen=True, kw_only=True)
class Decay:
    """A line that comes down to ``end`` over the stage's last ``tail_steps(fraction, n_steps)`` steps."""

    line: Schedule
    shape: str
    fraction: float
    end: float

    def __call__(self, step: int, n_steps: int) -> float:
        """Return the learning rate of step ``step`` of ``n_steps``."""
        start = n_steps - tail_steps(self.fraction, n_steps)
        if step < start:
            return self.line(step, n_steps)
        top = self.line(start, n_steps)
        return top * SHAPES[self.shape]((step - start) / (n_steps - start), min(1.0, self.end / top))


def ramp(step: int, warmup_steps: int) -> float:
    """Return the share of the peak that a linear warm-up has reached."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def fitting_warmup(warmup_steps: int, n_steps: int, tail: float = 0.0) -> int:
    """Return the warm-up, cut so that a decay over the share ``tail`` starts from the peak, at least one step."""
    return min(warmup_steps, n_steps - tail_steps(tail, n_steps))


@dataclass(frozen=True, kw_only=True)
class PeakOptions:
    """Where a schedule's learning rates lie."""

    peak: float = 1.0
    """Peak learning rate as a multiple of the track's."""
    floor: float | None = None
    """Final learning rate as a share of the peak, 0 to 1; None is the track's."""


@dataclass(frozen=True, kw_only=True)
class DecayOptions(PeakOptions):
    """A plateau and its decay."""

    shape: str = "1-sqrt"
    """How it decays: linear, cosine, 1-sqrt, inverse or exponential; the last two need a floor above 0."""
    decay: float = 0.1
    """Share of the stage's steps that decay, above 0 and at most 1."""
    rewarm: bool = False
    """Whether every stage warms up, not only the first."""
    optimizer: str = "carry"
    """Adam's state at a stage's start: carry, reset, reset_first, or track to leave it to others."""


def check(options: Any) -> None:
    """Raise ConfigError for what no schedule can use; options that are not there are not asked for."""
    require(0 < options.peak < math.inf, f"peak={options.peak} is no multiple", "give a number above 0, such as 1")
    floor = getattr(options, "floor", None)
    require(floor is None or 0 <= floor <= 1, f"floor={floor} is no share of the peak", "give a number from 0 to 1")
    for name in ("decay", "cooldown"):
        share = getattr(options, name, 0.5)
        require(0 < share <= 1, f"{name}={share} is no share of a stage", "give a number above 0, at most 1")
    shape = getattr(options, "shape", "linear")
    require(shape in SHAPES, f"unknown decay shape {shape!r}", did_you_mean(shape, SHAPES))
    check_reaches(shape, floor)
    policy_of(getattr(options, "optimizer", None))


def check_reaches(shape: str, floor: float | None) -> None:
    """Raise ConfigError when a shape never comes down to its floor, 0."""
    require(
        shape not in NEVER_ZERO or floor != 0,
        f"a decay of shape {shape} never reaches floor 0",
        "give a floor above 0, or the shape linear, cosine or 1-sqrt",
    )


def require(condition: bool, what: str, mend: str) -> None:
    """Raise ConfigError unless a condition holds."""
    if not condition:
        raise ConfigError(what, mend=mend)


def policy_of(text: str | None) -> OptimizerPolicy | None:
    """Return the optimizer policy that an option names; ``track`` is None, which leaves it open."""
    known = (*get_args(OptimizerPolicy), "track")
    require(text is None or text in known, f"unknown optimizer policy {text!r}", f"known: {', '.join(known)}")
    return None if text == "track" else cast("OptimizerPolicy | None", text)


def peak_and_end(options: PeakOptions, stage: Stage) -> tuple[float, float]:
    """Return the peak and the final learning rate of a stage."""
    peak = options.peak * stage.learning_rate
    return peak, peak * floor_of(options, stage)


def floor_of(options: PeakOptions, stage: Stage) -> float:
    """Return the final learning rate as a share of the peak."""
    return stage.floor if options.floor is None else options.floor


def warmup_of(stage: Stage, *, rewarm: bool) -> int:
    """Return the warm-up of a stage: the track's in the first one, or in all."""
    return stage.warmup_steps if rewarm or stage.index == 1 else 0


def decay_of(line: Schedule, end: float, *, shape: str, fraction: float) -> Decay:
    """Return the decay of a line.

    Raises:
        ConfigError: the track's floor is 0, which the shape never reaches.
    """
    check_reaches(shape, end)
    return Decay(line=line, shape=shape, fraction=fraction, end=end)


def plateau_and_decay(options: DecayOptions, stage: Stage) -> tuple[Plateau, Decay]:
    """Return the plateau of a stage and the same with its decay, equal up to where the decay begins."""
    peak, end = peak_and_end(options, stage)
    line = Plateau(peak=peak, warmup_steps=warmup_of(stage, rewarm=options.rewarm), tail=options.decay)
    return line, decay_of(line, end, shape=options.shape, fraction=options.decay)


def released_aside(stage: Stage, decayed: Decay, optimizer: OptimizerPolicy | None) -> StagePlan:
    """Return the plan of a line that goes on over stages while every release decays in a branch.

    Nothing goes on from the last stage, so there the line itself decays and no branch is paid for.
    """
    if stage.index == stage.n_stages - 1:
        return StagePlan(schedule=decayed, optimizer=optimizer)
    branch = Branch(schedule=decayed, fraction=decayed.fraction)
    return StagePlan(schedule=decayed.line, branch=branch, optimizer=optimizer)
