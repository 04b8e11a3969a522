"""Shrink and perturb: shrink the weights and add fresh initial ones (Ash & Adams 2020, arXiv 1910.08475)."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Context, Method, Need
from clbench.methods import _averages as averages
from clbench.methods import _pull as pulls
from clbench.methods._fresh import Fresh


class ShrinkPerturb(Method):
    """Shrink the weights and add fresh initial ones, after every step or before every stage.

    ``theta <- (1 - shrink) theta + perturb * fresh initialisation``. Before every stage is the paper's own form, for
    every time that training begins on more data; its lambda is 1 - shrink, and its noise is Gaussian with a scale of
    its own. After every step is the form that Dohare et al. 2024 and Kumar et al. 2023 compare with.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of ShrinkPerturb."""

        when: str = "step"
        """step: after every optimizer step; stage: before every stage."""
        shrink: float = 1e-4
        """Share of every weight that is taken away."""
        perturb: float = 1e-4
        """Scale of the fresh initialisation that is added."""
        norms: bool = False
        """Shrink the weights of normalisation layers, too, whose fresh values are not random but 1."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        averages.check_choice("shrink-perturb", "when", self.options.when, ("step", "stage"))
        averages.check_range("shrink-perturb", "shrink", self.options.shrink, 0, 1)
        pulls.check_number("shrink-perturb", "perturb", self.options.perturb)
        self._fresh = Fresh()

    def begin_stage(self, ctx: Context) -> None:
        """Shrink and perturb once, where that is asked for."""
        if self.options.when == "stage":
            self._apply(ctx)

    def after_step(self, ctx: Context) -> None:
        """Shrink and perturb after a step, where that is asked for."""
        if self.options.when == "step":
            self._apply(ctx)

    def _apply(self, ctx: Context) -> None:
        fresh = self._fresh.draw(ctx, ctx.seed("fresh"), norms=self.options.norms)
        for name, parameter in ctx.parameters():
            if name in fresh:
                weights = parameter.detach()
                weights.mul_(1 - self.options.shrink).add_(fresh[name].to(weights.device), alpha=self.options.perturb)
