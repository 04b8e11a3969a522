"""EMA: ship an exponential moving average of the weights over steps; training itself is unchanged by default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Weights
from clbench.methods import _averages as averages


class Ema(Method):
    """Average the weights over steps, new ones count more, and release the average.

    ``m_t = sum_s d^(t-s) w_s / sum_s d^(t-s)`` over the steps s = 1..t, with w_s the weights after step s. The start
    is corrected as Adam corrects its moments (Kingma & Ba 2015, section 3): the weights before the first step have no
    share, and the first average is w_1. Kept up to date as ``m_t = m_{t-1} + (w_t - m_{t-1}) (1 - d)/(1 - d^t)``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of Ema."""

        decay: float = 0.95
        """Share d of the old average that is kept at every step, from 0 up to (but not) 1."""
        half_life: float | None = None
        """Steps after which a step counts half, instead of decay; below 1 it is that share of a stage's steps."""
        scope: str = "stage"
        """stage: the average begins anew with every stage; run: it goes on."""
        restart: bool = False
        """Let the next stage train on from the average instead of from the last weights."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        averages.check_choice("ema", "scope", self.options.scope, ("stage", "run"))
        if not 0 <= self.options.decay < 1:
            raise ConfigError(f"ema:decay={self.options.decay} is no decay", mend="give a number from 0 to below 1")
        if self.options.half_life is not None and not 0 < self.options.half_life < math.inf:
            raise ConfigError(f"ema:half_life={self.options.half_life} is no time", mend="give a number of steps")
        self.average: Weights = {}
        self.n_steps = 0

    def after_step(self, ctx: Context) -> None:
        """Take the new weights into the average."""
        if ctx.step == 0 and self.options.scope == "stage":
            self.n_steps = 0
        self.n_steps += 1
        share = newest_share(decay_of(self.options, ctx.n_steps), self.n_steps)
        self.average = averages.moved(self.average, ctx, share)

    def end_stage(self, ctx: Context) -> None:
        """Go on from the average where that is asked for."""
        if self.options.restart and self.average:
            averages.put(ctx, self.average)

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the average."""
        return averages.replaced(self, weights, self.average)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the average and how many steps are in it."""
        return dict(self.average), {"n_steps": self.n_steps}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.average = {name: tensor.clone() for name, tensor in tensors.items()}
        self.n_steps = values["n_steps"]


def decay_of(options: Ema.Options, n_steps: int) -> float:
    """Return the decay of a stage with ``n_steps`` steps: ``2^(-1/half-life)`` where a half-life is given."""
    if options.half_life is None:
        return options.decay
    steps = options.half_life * n_steps if options.half_life < 1 else options.half_life
    return float(2.0 ** (-1 / steps))


def newest_share(decay: float, step: int) -> float:
    """Return ``(1 - d)/(1 - d^step)``, the share of the newest weights; step is counted from 1."""
    if decay == 0:
        return 1.0
    return math.expm1(math.log(decay)) / math.expm1(step * math.log(decay))
