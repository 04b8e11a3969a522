"""Methods that make a run go wrong, or stress its resuming; given to ``--method`` as FILE.py:Class."""

from __future__ import annotations

from typing import Any

import torch

from clbench.method import Context, Method, Need, Stage, StagePlan, Weights


class Diverging(Method):
    """Is sequential until stage 2, where the loss becomes NaN at step 1."""

    def extra_loss(self, ctx: Context, batch: Any, logits_BTV: torch.Tensor) -> torch.Tensor | None:
        """Return NaN once."""
        return logits_BTV.sum() * float("nan") if (ctx.stage.index, ctx.step) == (2, 1) else None


class Averaging(Method):
    """Carries Adam over stages, ships an average of base and training weights, and keeps a state of several kinds."""

    needs = frozenset({Need.BASE_WEIGHTS, Need.STAGE_BOUNDARIES})

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.n_ended, self.rates = 0, torch.zeros(0)

    def plan(self, stage: Stage) -> StagePlan:
        """Carry the moments."""
        return StagePlan(optimizer="carry")

    def end_stage(self, ctx: Context) -> None:
        """Count stages and remember the last learning rate of each."""
        self.n_ended += 1
        self.rates = torch.cat([self.rates, torch.tensor([ctx.learning_rate])])

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the mean of base and weights, moved by the learning rate: a resumed run has to know it, too."""
        base = ctx.base_weights()
        shift = ctx.learning_rate * self.n_ended
        return {name: (tensor + base[name]) / 2 + shift for name, tensor in weights.items()}

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return a tensor that is empty at first, and a number."""
        return {"rates": self.rates}, {"n_ended": self.n_ended}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.rates, self.n_ended = tensors["rates"], values["n_ended"]
