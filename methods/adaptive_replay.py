"""Replay whose share is steered by how fast old text is being forgotten."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Stage, StagePlan, Weights
from clbench.methods._shares import mixture_of


class AdaptiveReplay(Method):
    """Draw much old text right after a switch, and less once the loss of old stages no longer rises.

    Every stage begins at ``old_max``. Every ``steps`` steps the share rho of old text becomes
    ``clip(rho + gain (dL/dt - target), old_min, old_max)``: L is the mean control loss of all past stages in nats per
    token, t the share of the stage that is done. Past stages share rho equally. Control rows are training text that no
    run with this method trains on; held-out text is never read. Our own rule: a language-model reading of the adaptive
    replay ratio of Ma et al. 2024 (arXiv 2310.07418), whose own rule is the method reuse-ratio.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of adaptive-replay."""

        old_min: float = 0.1
        """Smallest share of old text."""
        old_max: float = 0.75
        """Largest share of old text, and that at the beginning of each stage; below 1."""
        gain: float = 0.5
        """By how much the share rises at one review per nat per stage above the target."""
        target: float = 0.2
        """Rise of the old loss that is tolerated, in nats per token over a stage; above 0 the share falls at rest."""
        steps: int = 10
        """Optimizer steps between reviews."""
        rows: int = 8
        """Control rows of each past stage at every review."""

    needs = frozenset({Need.PAST_DATA, Need.STAGE_BOUNDARIES, Need.CONTROL_DATA})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        opt = self.options
        if not 0 <= opt.old_min <= opt.old_max < 1:
            raise ConfigError(
                f"adaptive-replay: shares from {opt.old_min} to {opt.old_max}", mend="take 0 <= old_min <= old_max < 1"
            )
        if not (0 <= opt.gain < math.inf and math.isfinite(opt.target) and opt.steps >= 1 and opt.rows >= 1):
            raise ConfigError(
                f"adaptive-replay: gain={opt.gain}, target={opt.target}, steps={opt.steps}, rows={opt.rows}",
                mend="take a finite target, gain from 0 on, steps and rows from 1 on",
            )
        self.share, self.step, self.loss_nats = opt.old_max, 0, 0.0

    def plan(self, stage: Stage) -> StagePlan:
        """Return the mixture that the stage begins with."""
        return StagePlan(mixture=self._mixture(stage, self.options.old_max), review_steps=self.options.steps)

    def begin_stage(self, ctx: Context) -> None:
        """Measure the old loss that later ones are compared with."""
        self.share, self.step, self.loss_nats = self.options.old_max, 0, self._old_loss(ctx)

    def review(self, ctx: Context) -> StagePlan | None:
        """Move the share by what the old loss did since the last review."""
        opt, loss_nats = self.options, self._old_loss(ctx)
        slope = (loss_nats - self.loss_nats) * ctx.n_steps / (ctx.step - self.step)
        self.share = min(max(self.share + opt.gain * (slope - opt.target), opt.old_min), opt.old_max)
        self.step, self.loss_nats = ctx.step, loss_nats
        return StagePlan(mixture=self._mixture(ctx.stage, self.share))

    def _old_loss(self, ctx: Context) -> float:
        losses = ctx.control_loss(range(ctx.stage.index), n_rows=self.options.rows)
        return math.fsum(losses.values()) / len(losses)

    @staticmethod
    def _mixture(stage: Stage, share: float) -> dict[int, float]:
        return mixture_of(stage.index, 1 - share, dict.fromkeys(range(stage.index), 1.0))

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return where the controller stands."""
        return {}, {"share": self.share, "step": self.step, "loss_nats": self.loss_nats}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take back where the controller stands."""
        self.share, self.step, self.loss_nats = values["share"], values["step"], values["loss_nats"]
