"""Soups: ship the mean of the run's stage-end weights, all of them or a greedy choice (Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clbench.method import Context, Method, Need, Weights
from clbench.methods import _averages as averages


class Soup(Method):
    """Release a uniform or greedy soup (arXiv 2203.05482, recipe 1) of the weights at the ends of the stages so far.

    Greedy: sort by loss on kept-back rows, begin with the best, add the next one if and only if the soup's loss
    falls, and measure all again at every stage. Of stage 0 the base has seen the kept-back rows, which flatters it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of Soup."""

        kind: str = "uniform"
        """uniform: all ingredients; greedy: those that lower the loss on kept-back rows."""
        base: bool = False
        """Put the base in, too, as the ingredient of stage 0."""
        last: int | None = None
        """Keep the ends of so many stages at most (the base not counted); memory grows with it."""
        control: str = "seen"
        """greedy: judge by all stages so far, each counts the same (seen), or by the newest one (current)."""
        rows: int = 16
        """greedy: kept-back rows of each stage to judge by, at most 64."""
        restart: bool = False
        """Let the next stage train on from the soup instead of from the last weights."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        averages.check_choice("soup", "kind", self.options.kind, ("uniform", "greedy"))
        averages.check_choice("soup", "control", self.options.control, ("seen", "current"))
        averages.check_range("soup", "last", self.options.last, 1)
        averages.check_rows("soup", self.options.rows)
        used = {Need.STAGE_BOUNDARIES: True, Need.BASE_WEIGHTS: self.options.base}
        used[Need.CONTROL_DATA] = self.options.kind == "greedy"
        self.needs = frozenset(need for need, is_used in used.items() if is_used)
        self.mean: Weights = {}
        self.picked: list[int] = []
        self.shelf: dict[int, Weights] = {}  # stage -> its end; stays empty where a running mean does

    def end_stage(self, ctx: Context) -> None:
        """Take this stage's end in and make the soup."""
        if self.options.base and not self.picked:
            base = ctx.base_weights()
            self.mean = {name: base[name] for name, _ in ctx.parameters()}
            self.picked, self.shelf = [0], {0: self.mean}
        if self.options.kind == "uniform" and self.options.last is None:
            self.picked, self.shelf = [*self.picked, ctx.stage.index], {}
            self.mean = averages.moved(self.mean, ctx, 1 / len(self.picked))
        else:
            self.shelf[ctx.stage.index] = averages.snapshot(ctx)
            averages.drop_oldest(self.shelf, self.options.last)
            self.picked = self._greedy(ctx) if self.options.kind == "greedy" else sorted(self.shelf)
            self.mean = mix(self.shelf, self.picked)
        if self.options.restart:
            averages.put(ctx, self.mean)

    def _greedy(self, ctx: Context) -> list[int]:
        def loss(weights: Weights) -> float:
            return averages.control_loss(ctx, weights, stages=self.options.control, n_rows=self.options.rows)

        return greedy(self.shelf, loss)

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the soup."""
        return averages.replaced(self, weights, self.mean)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the soup, what it is made from, and its ingredients in the order in which they went in."""
        return averages.packed(self.mean, self.shelf), {"picked": list(self.picked)}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.mean, self.shelf = averages.unpacked(tensors)
        self.picked = list(values["picked"])


def mix(shelf: dict[int, Weights], stages: Sequence[int]) -> Weights:
    """Return the mean of some ingredients, whatever their order."""
    return averages.mean_of([shelf[stage] for stage in sorted(stages)])


def greedy(shelf: dict[int, Weights], loss: Callable[[Weights], float]) -> list[int]:
    """Return the stages of a greedy soup in the order in which they went in; of equal ones the newest is first."""
    losses = {stage: loss(weights) for stage, weights in shelf.items()}
    best, *others = sorted(shelf, key=lambda stage: (losses[stage], -stage))
    picked, lowest = [best], losses[best]
    for stage in others:
        found = loss(mix(shelf, [*picked, stage]))
        if found < lowest:
            picked, lowest = [*picked, stage], found
    return picked
