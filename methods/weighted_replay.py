"""Replay that prefers some past stages: the recent, the large, the forgotten, or those that you name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Stage, StagePlan, Weights
from clbench.methods._shares import mixture_of, new_share, softmax


class WeightedReplay(Method):
    """Train each stage on new text and on earlier stages i in proportion to a weight w_i.

    With a = k - i the age of stage i while stage k is trained: age ``w = gamma^a a^-power``; size ``w = tokens of the
    stage``; loss ``w = exp(rise / temperature)``, where the rise is the control loss of stage i at the end of stage
    k - 1 minus that at the end of stage i itself; weights ``w`` as given. TiC-LM's replay is age with gamma 1, power 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of weighted-replay."""

        fraction: str = "1/2"
        """Share of NEW text, alpha_t: a number such as 1/2 or 0.25, or 1/t."""
        by: Literal["age", "size", "loss", "weights"] = "age"
        """What a past stage's weight depends on."""
        gamma: float = 0.5
        """age: factor per stage of age; below 1 recent stages are drawn more."""
        power: float = 0.0
        """age: the weight also falls as age to the minus this."""
        temperature: float = 0.25
        """loss: nats per token of rise that make a stage e times as likely."""
        rows: int = 16
        """loss: control rows of each stage, measured at the end of every stage."""
        weights: tuple[float, ...] | None = None
        """weights: one for each stage from stage 0 on, such as 4+2+1+1; where all past ones are 0, all text is new."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        opt = self.options
        new_share(opt.fraction, 2, method="weighted-replay")
        wrong = {
            f"by={opt.by}": opt.by not in ("age", "size", "loss", "weights"),
            f"gamma={opt.gamma}": not (0 < opt.gamma < math.inf),
            f"power={opt.power}": not math.isfinite(opt.power),
            f"temperature={opt.temperature}": not (0 < opt.temperature < math.inf),
            f"rows={opt.rows}": opt.rows < 1,
            f"weights={opt.weights}": (opt.weights is None) == (opt.by == "weights")
            or any(not 0 <= w < math.inf for w in opt.weights or ()),
        }
        for option in (name for name, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(f"weighted-replay:{option} cannot be used", mend="see `clbench list methods`")
        needs = {Need.PAST_DATA, Need.STAGE_BOUNDARIES}
        self.needs = frozenset(needs | {Need.CONTROL_DATA} if opt.by == "loss" else needs)
        self.losses: dict[int, dict[int, float]] = {}
        """Stage at whose end it was measured (0: before the first) -> stage -> nats per token."""

    def plan(self, stage: Stage) -> StagePlan:
        """Return the mixture of this stage."""
        new = new_share(self.options.fraction, stage.index + 1)
        return StagePlan(mixture=mixture_of(stage.index, new, self.weights_of(stage)))

    def weights_of(self, stage: Stage) -> dict[int, float]:
        """Return past stage -> its weight while ``stage`` is trained."""
        opt, past = self.options, range(stage.index)
        if opt.by == "size":
            return {i: float(stage.available_tokens[i]) for i in past}
        if opt.by == "weights":
            if len(opt.weights) < stage.n_stages - 1:
                raise ConfigError(
                    f"weighted-replay:weights has {len(opt.weights)} for {stage.n_stages - 1} stages that become past",
                    mend="give one for every stage but the last, from stage 0 on, such as 4+2+1",
                )
            return {i: float(opt.weights[i]) for i in past}
        if opt.by == "loss":
            return softmax({i: self.rise(i, stage.index) / opt.temperature for i in past})
        age = {i: stage.index - i for i in past}
        return softmax({i: a * math.log(opt.gamma) - opt.power * math.log(a) for i, a in age.items()})

    def rise(self, i: int, index: int) -> float:
        """Return by how many nats per token the loss of stage i has risen from its own end to the start of another."""
        return self.losses.get(index - 1, {}).get(i, 0.0) - self.losses.get(i, {}).get(i, 0.0)

    def begin_stage(self, ctx: Context) -> None:
        """Measure the base: for stage 0 its end is the start of the run."""
        if self.options.by == "loss" and not self.losses:
            self.losses[0] = ctx.control_loss([0], n_rows=self.options.rows)

    def end_stage(self, ctx: Context) -> None:
        """Measure how well each stage is remembered."""
        if self.options.by == "loss":
            k = ctx.stage.index
            self.losses[k] = ctx.control_loss(range(k + 1), n_rows=self.options.rows)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the control losses."""
        return {}, {"losses": {str(k): {str(i): x for i, x in row.items()} for k, row in self.losses.items()}}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take back the control losses."""
        self.losses = {int(k): {int(i): x for i, x in row.items()} for k, row in values["losses"].items()}
