"""Memory Aware Synapses: hold weights that the outputs are sensitive to (Aljundi et al. 2018, arXiv 1711.09601)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clbench.method import Batch, Context, Method, Weights
from clbench.methods import _averages as averages
from clbench.methods import _pull as pulls
from clbench.methods._fisher_rows import bill, needs_of, rows_of

if TYPE_CHECKING:
    import torch


class MAS(Method):
    """Hold each weight by how much the outputs' size depends on it (Aljundi et al. 2018, arXiv 1711.09601).

    Penalty ``strength/2 sum_j Omega_j (theta_j - anchor_j)^2``; the paper's lambda is strength / 2 (equation 4).
    ``Omega_j = E_x |d (mean over positions of ||f(x)||^2) / d theta_j|`` (equations 2, 3), x one packed sequence: the
    absolute value is taken per sequence, one backward pass each, in eval mode at the stage's end. No label is read.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of MAS."""

        strength: float = 1.0
        """lambda of lambda/2 times the quadratic."""
        output: str = "centred_logits"
        """centred_logits (minus their mean over the vocabulary), logits, or hidden (the last hidden state)."""
        alpha: float | None = None
        """Importance becomes alpha old + (1 - alpha) new; none: the mean over the stages so far."""
        rows: int = 64
        """Sequences of each stage that the expectation is taken over."""
        base_stage: bool = True
        """Hold what the base does on stage 0, too."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        pulls.check_number("mas", "strength", self.options.strength)
        averages.check_choice("mas", "output", self.options.output, ("centred_logits", "logits", "hidden"))
        averages.check_range("mas", "alpha", self.options.alpha, 0, 1)
        averages.check_range("mas", "rows", self.options.rows, 1)
        self.needs = needs_of(base_stage=self.options.base_stage)
        self.importance: Weights = {}
        self.anchor: Weights = {}
        self.n_stages = 0

    def begin_stage(self, ctx: Context) -> None:
        """Measure the base's importance before the first stage."""
        if self.options.base_stage and ctx.stage.index == 1 and not self.n_stages:
            self._take_in(ctx, 0)

    def edit_gradients(self, ctx: Context) -> None:
        """Add the penalty's gradient."""
        pulls.pull(ctx, self.anchor, self.options.strength, self.importance)

    def end_stage(self, ctx: Context) -> None:
        """Note the penalty, and measure the importance if another stage follows."""
        ctx.note("penalty", pulls.penalty(ctx, self.anchor, self.options.strength, self.importance))
        if ctx.stage.index < ctx.stage.n_stages - 1:
            self._take_in(ctx, ctx.stage.index)

    def _take_in(self, ctx: Context, stage: int) -> None:
        found = self._measure(ctx, stage)
        if self.n_stages:
            alpha = self.n_stages / (self.n_stages + 1) if self.options.alpha is None else self.options.alpha
            for name, tensor in found.items():
                tensor.mul_(1 - alpha).add_(pulls.beside(self.importance, name, tensor), alpha=alpha)
        self.importance, self.anchor, self.n_stages = found, pulls.copied(ctx), self.n_stages + 1

    def _measure(self, ctx: Context, stage: int) -> Weights:
        """Return the mean over sequences of the absolute gradient."""
        totals, batches = pulls.zeros(ctx), rows_of(ctx, stage, n_rows=self.options.rows, rows_per_batch=1)
        was_training = ctx.module.training
        ctx.module.eval()
        try:
            for batch in batches:
                add_sensitivity(ctx, batch, self.options.output, totals)
        finally:
            ctx.module.train(was_training)
        bill(ctx, batches, forwards=3)
        return {name: total / len(batches) for name, total in totals.items()}

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return importance, anchor, and how many stages are in them."""
        return pulls.packed(importance=self.importance, anchor=self.anchor), {"n_stages": self.n_stages}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.importance, self.anchor = (pulls.unpacked(tensors, part) for part in ("importance", "anchor"))
        self.n_stages = values["n_stages"]


def add_sensitivity(ctx: Context, batch: Batch, output: str, totals: Weights) -> None:
    """Add the absolute gradient of one sequence's mean squared output to ``totals``."""
    import torch

    parameters = dict(ctx.parameters())
    square_T = output_TD(ctx.module, batch, output).square().sum(-1)
    gradients = torch.autograd.grad(square_T.mean(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            totals[name] += gradient.abs()


def output_TD(module: torch.nn.Module, batch: Batch, output: str) -> torch.Tensor:
    """Return the outputs of a one-sequence batch at the positions that have a target."""
    from clbench.train.data import IGNORE

    kept_BT = batch.targets_BT != IGNORE
    if output == "hidden":
        hidden: torch.Tensor = module(input_ids=batch.inputs_BT, output_hidden_states=True).hidden_states[-1]
        return hidden.float()[kept_BT]
    logits_TV: torch.Tensor = module(input_ids=batch.inputs_BT).logits.float()[kept_BT]
    return logits_TV - logits_TV.mean(-1, keepdim=True) if output == "centred_logits" else logits_TV
