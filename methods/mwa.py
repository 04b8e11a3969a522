"""MWA, metrics-weighted averaging (arXiv 2504.18580): checkpoints count by their loss or by their age.

A reconstruction: the paper's formula could not be read, only that the weights come from training loss or step count and
one penalty factor that does not hang on the number of checkpoints. Here they are ``w_i = m_i^p / sum_j m_j^p`` with
``m = 1/loss`` or ``m = step``: p = 0 is the uniform soup, large p the best checkpoint, and units cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clbench.method import Context, Method, Need, Weights
from clbench.methods import _averages as averages


class Mwa(Method):
    """Release the weighted mean of checkpoints of this stage, or of the ends of the stages so far.

    The loss is that of each checkpoint on the same kept-back rows, measured at the stage's end: losses of the batches
    that each one happened to train on would differ by the batch.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of Mwa."""

        metric: str = "loss"
        """m_i: 1 over the loss on kept-back rows (loss), or the number of steps done (step)."""
        power: float = 4.0
        """p, the penalty factor, from 0 (uniform) up; the reconstruction's grid is 0, 1, 2, 4, 8."""
        of: str = "steps"
        """steps: checkpoints within the stage, as in the paper; stages: the ends of the run's stages."""
        every: int = 10
        """steps: from one checkpoint to the next, counted back from the stage's end."""
        last: int = 5
        """How many of the newest checkpoints are kept and averaged."""
        control: str = "current"
        """loss: on rows of the newest stage (current), or of all stages so far, each counts the same (seen)."""
        rows: int = 16
        """loss: kept-back rows of each stage, at most 64."""
        restart: bool = False
        """Let the next stage train on from the average instead of from the last weights."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        averages.check_choice("mwa", "metric", self.options.metric, ("loss", "step"))
        averages.check_choice("mwa", "of", self.options.of, ("steps", "stages"))
        averages.check_choice("mwa", "control", self.options.control, ("seen", "current"))
        for option in ("every", "last"):
            averages.check_range("mwa", option, getattr(self.options, option), 1)
        averages.check_rows("mwa", self.options.rows)
        averages.check_range("mwa", "power", self.options.power, 0)
        measures = {Need.CONTROL_DATA} if self.options.metric == "loss" else set()
        self.needs = frozenset({Need.STAGE_BOUNDARIES} | measures)
        self.n_steps = 0  # of this stage, or of the run where checkpoints are stage ends
        self.shelf: dict[int, Weights] = {}  # steps done -> checkpoint
        self.shares: list[float] = []
        self.mean: Weights = {}

    def after_step(self, ctx: Context) -> None:
        """Keep a checkpoint where one is due."""
        if ctx.step == 0 and self.options.of == "steps":
            self.n_steps, self.shelf = 0, {}
        self.n_steps += 1
        to_go = ctx.n_steps - 1 - ctx.step
        due = to_go % self.options.every == 0 and to_go // self.options.every < self.options.last
        if due and self.options.of == "steps":
            self.shelf[self.n_steps] = averages.snapshot(ctx)

    def end_stage(self, ctx: Context) -> None:
        """Measure the checkpoints and average them."""
        if not self.n_steps:
            return
        if self.options.of == "stages":
            self.shelf[self.n_steps] = averages.snapshot(ctx)
            averages.drop_oldest(self.shelf, self.options.last)
        metrics = [float(step) if self.options.metric == "step" else 1 / self._loss(ctx, step) for step in self.shelf]
        self.shares = shares_of(metrics, self.options.power)
        self.mean = averages.mean_of(list(self.shelf.values()), self.shares)
        if self.options.restart:
            averages.put(ctx, self.mean)

    def _loss(self, ctx: Context, step: int) -> float:
        options = self.options
        return averages.control_loss(ctx, self.shelf[step], stages=options.control, n_rows=options.rows)

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the average."""
        return averages.replaced(self, weights, self.mean)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return average and checkpoints, and the share of each at the last stage's end."""
        values = {"n_steps": self.n_steps, "shelf": list(self.shelf), "shares": list(self.shares)}
        return averages.packed(self.mean, self.shelf), values

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.mean, shelf = averages.unpacked(tensors)
        self.shelf = {step: shelf[step] for step in values["shelf"]}
        self.n_steps, self.shares = values["n_steps"], list(values["shares"])


def shares_of(metrics: Sequence[float], power: float) -> list[float]:
    """Return ``softmax(power log m)``, which is ``m^power`` normalised without overflow; metrics are above 0."""
    logs = [power * math.log(metric) for metric in metrics]
    powers = [math.exp(log - max(logs)) for log in logs]
    return [one / math.fsum(powers) for one in powers]
