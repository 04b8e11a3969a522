"""L2-SP: hold all weights alike, where they started (Li et al. 2018, arXiv 1802.01483). The isotropic control arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from clbench.method import Context, Method, Need, Weights
from clbench.methods import _quadratic as quadratic
from clbench.methods._fisher_rows import bill, needs_of, rows_of


class L2Sp(Method):
    """Add ``strength/2 scale ||theta - anchor||^2`` (equation 2 there, with its 1/2).

    With ``scale=trace`` the scale is ``sum_k E||g||^2 / P`` over past stages k, so that this penalty's matrix and the
    Fisher's of all past stages have the same trace; E||g||^2 is over the gradients of single sequences' mean losses.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of l2-sp."""

        strength: float = 0.01
        """lambda."""
        anchor: Literal["base", "previous"] = "base"
        """The weights that the run began with, or those at the end of the stage before."""
        scale: Literal["one", "trace"] = "one"
        """one: lambda alone. trace: times the mean of the diagonal Fisher of the past stages, from a Fisher pass."""
        apply: Literal["coupled", "prox"] = "coupled"
        """coupled: add the gradient before clipping. prox: exact proximal step after the optimizer's, always stable."""
        params: Literal["all", "no_embed", "no_norms", "matrices"] = "all"
        """Which are held: all; all but embeddings and head; all but norms and biases; only the matrices of layers."""
        rows: int = 256
        """trace: sequences of each stage that it is estimated from."""
        rows_per_batch: int = 8
        """trace: sequences per pass; only memory and time depend on it."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        quadratic.check("l2-sp", self.options, anchor=("base", "previous"), scale=("one", "trace"))
        needs = {Need.STAGE_BOUNDARIES} | ({Need.BASE_WEIGHTS} if self.options.anchor == "base" else set())
        self.needs = frozenset(needs | (needs_of(base_stage=True) if self.options.scale == "trace" else set()))
        self.anchor: Weights = {}
        self.scale = 0.0
        """trace: sum over past stages of E||g||^2 / P."""

    def begin_stage(self, ctx: Context) -> None:
        """Take the anchor; before the first stage, the base's trace."""
        held = quadratic.selected(ctx, self.options.params)
        if self.options.anchor == "previous":
            self.anchor = {name: p.detach().clone() for name, p in held.items()}
        if self.options.scale == "trace" and ctx.stage.index == 1:
            self._add_trace(ctx, 0)

    def edit_gradients(self, ctx: Context) -> None:
        """Add the penalty's gradient."""
        if self.options.apply == "coupled" and self.options.strength:
            held, anchors = self._pair(ctx)
            quadratic.pull(held, anchors, self._strength())

    def after_step(self, ctx: Context) -> None:
        """Take the proximal step."""
        if self.options.apply == "prox" and self.options.strength:
            held, anchors = self._pair(ctx)
            quadratic.shrink_to(held, anchors, ctx.learning_rate * self._strength())

    def end_stage(self, ctx: Context) -> None:
        """Note the penalty, and add this stage's trace if another stage follows."""
        held, anchors = self._pair(ctx)
        distance = ctx.all_reduce(quadratic.quadratic(held, anchors)).item()
        ctx.note("distance", distance**0.5)
        ctx.note("penalty", self._strength() / 2 * distance)
        if self.options.scale == "trace" and ctx.stage.index < ctx.stage.n_stages - 1:
            self._add_trace(ctx, ctx.stage.index)

    def _pair(self, ctx: Context) -> tuple[list[torch.nn.Parameter], list[torch.Tensor]]:
        held = quadratic.selected(ctx, self.options.params)
        anchor = self.anchor or ctx.base_weights()
        self.anchor = quadratic.placed(anchor, held)
        return list(held.values()), list(self.anchor.values())

    def _strength(self) -> float:
        return float(self.options.strength) * (self.scale if self.options.scale == "trace" else 1.0)

    def _add_trace(self, ctx: Context, stage: int) -> None:
        from clbench.fisher.estimate import second_moment

        held = quadratic.selected(ctx, self.options.params)
        batches = rows_of(ctx, stage, n_rows=self.options.rows, rows_per_batch=self.options.rows_per_batch)
        fisher, _, _ = second_moment(ctx.module, batches, names=list(held))
        bill(ctx, batches, forwards=3)
        ones = quadratic.total([f.new_tensor(float(f.numel())) for f in fisher.values()])
        found = ctx.all_reduce(torch.cat([quadratic.total(fisher.values()), ones]))
        self.scale += (found[0] / found[1]).item()
        ctx.note("base_scale" if stage == 0 else "scale", self.scale)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the anchor, unless it is the base, and the scale."""
        return dict(self.anchor) if self.options.anchor == "previous" else {}, {"scale": self.scale}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.anchor = {name: tensor.clone() for name, tensor in tensors.items()}
        self.scale = float(values["scale"])
