"""Replay from a buffer of bounded size: what does not fit is evicted and never comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Stage, StagePlan, Weights
from clbench.methods._shares import equal_quotas, mixture_of, new_share, reservoir


class ReplayBuffer(Method):
    """Train each stage on new text and on what a bounded buffer holds of all earlier stages.

    The new text that was trained on (of stage 0: all of it) goes into the buffer when its stage has ended. Of each
    stage it holds a prefix of the order in which it was drawn when it was new, so what leaves does not return. Past
    stages are drawn in proportion to what is held of them: with the reservoir, all past text that was seen alike.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of replay-buffer."""

        fraction: str = "1/2"
        """Share of NEW text, alpha_t: a number such as 1/2 or 0.25, or 1/t."""
        tokens: int = 1_000_000
        """Tokens that the buffer holds at most; what is held of a stage is rounded up to a whole row."""
        policy: Literal["reservoir", "quota"] = "reservoir"
        """reservoir: a uniform sample of all past text. quota: equally much of each past stage."""

    needs = frozenset({Need.PAST_DATA, Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        new_share(self.options.fraction, 2, method="replay-buffer")
        if self.options.tokens < 1:
            raise ConfigError(
                f"replay-buffer:tokens={self.options.tokens} holds nothing",
                mend="give at least 1, or use the method sequential",
            )
        if self.options.policy not in ("reservoir", "quota"):
            raise ConfigError(f"replay-buffer:policy={self.options.policy}", mend="give reservoir or quota")
        self.seen: dict[int, int] = {}

    def held(self, stage: Stage) -> dict[int, int]:
        """Return past stage -> tokens in the buffer while ``stage`` is trained."""
        # A stage that this run has not trained, stage 0 foremost, counts as seen in full.
        seen = [self.seen.get(i, stage.available_tokens[i]) for i in range(stage.index)]
        if self.options.policy == "quota":
            return dict(enumerate(equal_quotas(seen, self.options.tokens)))
        return dict(enumerate(reservoir(seen, self.options.tokens, stage.seed)))

    def plan(self, stage: Stage) -> StagePlan:
        """Return mixture and pools of this stage."""
        held = {i: n for i, n in self.held(stage).items() if n}
        new = new_share(self.options.fraction, stage.index + 1)
        return StagePlan(mixture=mixture_of(stage.index, new, held), pools=held)

    def end_stage(self, ctx: Context) -> None:
        """Note how much of the new text was seen: it goes into the buffer of the next stage."""
        k = ctx.stage.index
        # A second pass over the same text brings nothing new.
        self.seen[k] = min(ctx.tokens_drawn().get(k, 0), ctx.stage.available_tokens[k])

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return how much was seen."""
        return {}, {"seen": {str(i): n for i, n in self.seen.items()}}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take back how much was seen."""
        self.seen = {int(i): n for i, n in values["seen"].items()}
