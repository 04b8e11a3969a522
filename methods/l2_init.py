"""L2 Init: decay towards fresh initial weights instead of zero (Kumar et al. 2023, arXiv 2308.11958)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clbench import seeds
from clbench.method import Context, Method, Weights
from clbench.methods import _averages as averages
from clbench.methods import _pull as pulls
from clbench.methods._fresh import Fresh


class L2Init(Method):
    """Pull weights towards a fresh initialisation with the penalty ``strength/2 ||theta - theta_0||^2``.

    Its gradient is added before clipping and goes through Adam, as in the paper (coupled, unlike weight decay).
    theta_0 is drawn by the model's own initialiser from the run's seed; nothing is stored, as it can be drawn again.
    The paper's theta_0 are the weights that the network itself began with, which nobody knows of a pretrained base.
    With theta_0 = the base it is another method: L2-SP.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of L2Init."""

        strength: float = 1e-3
        """lambda of lambda/2 times the squared distance."""
        variant: str = "initial"
        """initial: one theta_0 for the whole run; resampled: another one every step."""
        norms: bool = False
        """Pull the weights of normalisation layers, too."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        pulls.check_number("l2-init", "strength", self.options.strength)
        averages.check_choice("l2-init", "variant", self.options.variant, ("initial", "resampled"))
        self._fresh = Fresh()
        self._drawn: tuple[int, Weights] | None = None  # (seed, theta_0): no state, drawn again when it is missing

    def edit_gradients(self, ctx: Context) -> None:
        """Add the penalty's gradient."""
        pulls.pull(ctx, self._initial(ctx), self.options.strength)
        if ctx.step == ctx.n_steps - 1:
            ctx.note("penalty", pulls.penalty(ctx, self._initial(ctx), self.options.strength))

    def _initial(self, ctx: Context) -> Weights:
        # No shorter-lived seed is in the name: all stages of a run have the same theta_0.
        seed = ctx.seed("fresh") if self.options.variant == "resampled" else seeds.derive(ctx.stage.seed, "l2_init")
        if self._drawn is None or self._drawn[0] != seed:
            self._drawn = (seed, self._fresh.draw(ctx, seed, norms=self.options.norms))
        return self._drawn[1]

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take nothing back: there is no state."""
