"""Replay: part of every stage's token budget goes to earlier stages, shared equally among them (TiC-LM)."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Method, Need, Stage, StagePlan
from clbench.methods._shares import new_share


class Replay(Method):
    """Train each stage on new text and on text of all earlier stages.

    With t the stage's number counted from 1 (the base's text is t = 1), a share alpha_t of the budget is new and each
    of the t - 1 earlier stages gets (1 - alpha_t)/(t - 1), whatever its size or age.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of replay."""

        fraction: str = "1/2"
        """Share of NEW text, alpha_t: a number such as 1/2 or 0.25, or 1/t (every stage seen gets the same)."""

    needs = frozenset({Need.PAST_DATA})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        new_share(self.options.fraction, 2)

    def plan(self, stage: Stage) -> StagePlan:
        """Return the mixture of this stage."""
        t = stage.index + 1
        new = new_share(self.options.fraction, t)
        old = (1 - new) / (t - 1)
        return StagePlan(mixture={i: float(old) for i in range(stage.index)} | {stage.index: float(new)})
