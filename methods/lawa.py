"""LAWA: ship the mean of the latest weights of a stage, taken every few steps (Kaddour 2022, arXiv 2209.14981)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clbench.method import Context, Method, Need, Weights
from clbench.methods import _averages as averages


class Lawa(Method):
    """Release the mean of the last k snapshots of a stage; the last one is the stage's end.

    The paper takes a snapshot at the end of every epoch; here it is every few steps, counted back from the end of the
    stage. A stage's length is known, so the snapshots that will not be among the last k are not taken, and one
    running mean does for a queue of k.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of Lawa."""

        k: int = 5
        """Snapshots in the mean; a stage that is too short for them gives fewer."""
        every: int = 10
        """Steps from one snapshot to the next."""
        restart: bool = False
        """Let the next stage train on from the mean instead of from the last weights."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        averages.check_range("lawa", "k", self.options.k, 1)
        averages.check_range("lawa", "every", self.options.every, 1)
        self.mean: Weights = {}
        self.n_taken = 0

    def after_step(self, ctx: Context) -> None:
        """Take a snapshot where one is due."""
        if ctx.step == 0:
            self.n_taken = 0
        to_go = ctx.n_steps - 1 - ctx.step
        if to_go % self.options.every == 0 and to_go // self.options.every < self.options.k:
            self.n_taken += 1
            self.mean = averages.moved(self.mean, ctx, 1 / self.n_taken)

    def end_stage(self, ctx: Context) -> None:
        """Go on from the mean where that is asked for."""
        if self.options.restart and self.mean:
            averages.put(ctx, self.mean)

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the mean."""
        return averages.replaced(self, weights, self.mean)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the mean and how many snapshots are in it."""
        return dict(self.mean), {"n_taken": self.n_taken}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.mean = {name: tensor.clone() for name, tensor in tensors.items()}
        self.n_taken = values["n_taken"]
