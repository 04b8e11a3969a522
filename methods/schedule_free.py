"""Schedule-free AdamW: a constant learning rate and an average in the optimizer instead of a decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Stage, StagePlan, Weights
from clbench.methods import _averages as averages
from clbench.methods._schedules import Plateau, check, warmup_of

if TYPE_CHECKING:
    import torch

    from clbench.methods._schedule_free_optimizer import ScheduleFreeAdamW


class ScheduleFree(Method):
    """Train with schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682) and release its average x.

    In between, the parameters hold y, where gradients are taken: what other components do to the weights in a stage
    they do at y. As in TiC-LM every stage goes on from the average with a fresh optimizer and a new warm-up; with
    ``restart=false`` one optimizer and one average go through the whole run.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of ScheduleFree."""

        peak: float = 1.0
        """The learning rate as a multiple of the track's."""
        beta1: float | None = None
        """Share of the average in the weights where gradients are taken, above 0 to 1; the track's by default."""
        restart: bool = True
        """Begin every stage at the average with a fresh optimizer; false: carry everything on."""
        form: str = "paper"
        """paper: algorithm 1, as in the authors' package 1.2; package: Adam's bias correction, as in 1.4."""
        growth: float = 0.0
        """Step t counts t^growth in the average (r in the package): above 0 new steps count more."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)
        averages.check_choice("schedule-free", "form", self.options.form, ("paper", "package"))
        averages.check_range("schedule-free", "growth", self.options.growth, 0)
        if self.options.beta1 is not None and not 0 < self.options.beta1 <= 1:
            raise ConfigError(f"schedule-free:beta1={self.options.beta1} is no share", mend="give above 0 to 1")
        self.optimizer: ScheduleFreeAdamW | None = None

    def make_optimizer(
        self, groups: list[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        """Return the optimizer; its state is saved by the loop."""
        from clbench.methods._schedule_free_optimizer import ScheduleFreeAdamW

        beta1 = betas[0] if self.options.beta1 is None else self.options.beta1
        options = {"form": self.options.form, "growth": self.options.growth}
        self.optimizer = ScheduleFreeAdamW(groups, lr=learning_rate, betas=(beta1, betas[1]), **options)
        return self.optimizer

    def plan(self, stage: Stage) -> StagePlan:
        """Warm up, then stay; carried on, only the first stage warms up."""
        warmup = warmup_of(stage, rewarm=self.options.restart)
        schedule = Plateau(peak=self.options.peak * stage.learning_rate, warmup_steps=warmup)
        return StagePlan(schedule=schedule, optimizer="reset" if self.options.restart else "carry")

    def end_stage(self, ctx: Context) -> None:
        """Go on from the average where that is asked for."""
        if self.options.restart and self.optimizer is not None:
            self.optimizer.settle()

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the average."""
        if self.optimizer is None:
            return weights
        return averages.replaced(self, weights, {name: self.optimizer.average(p) for name, p in ctx.parameters()})
