"""Rank-1 EWC: hold the weights along the mean gradient of each past stage (Rank-1 Fisher EWC, arXiv 2509.23593)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clbench.errors import ConfigError
from clbench.method import Context, Method, Weights
from clbench.methods import _quadratic as quadratic
from clbench.methods._fisher_rows import needs_of, rows_of

WORDS = {
    "unit": ("step", "lambda"),
    "scale": ("cstar", "one", "trace"),
    "direction": ("mean", "top", "random", "weights"),
    "estimate": ("per_sequence", "micro_batch", "directional"),
    "dtype": ("fp32", "bf16"),
}


class Rank1Ewc(Method):
    """Add ``lambda/2 sum_k c*_k (mu_k . (theta - theta*_k))^2``, one term for each past stage (equation 6 there).

    mu_k is the mean over sequences of the gradient of a sequence's mean loss at theta*_k, and ``c* = E[(mu.g)^2] /
    ||mu||^4``. Kept as ``rho_k (u_k.theta - b_k)^2`` with ``u = mu/||mu||``, ``rho = c* ||mu||^2``, ``b = u.theta*``:
    one vector and two numbers a stage, no anchor. Labels are the data's; with labels drawn from the model mu is 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of rank1-ewc."""

        strength: float = 1e-3
        """In the unit below: lr lambda rho (sweep 1e-5 to 1; plain descent is stable below 2), or lambda itself."""
        unit: Literal["step", "lambda"] = "step"
        """step: lambda = strength/(lr max_k rho_k), lr the track's peak: one lambda, so terms keep their ratios."""
        scale: Literal["cstar", "one", "trace"] = "cstar"
        """cstar: the paper's. one: c = 1. trace: rho = E||g||^2, the trace of the whole Fisher."""
        direction: Literal["mean", "top", "random", "weights"] = "mean"
        """mean gradient; top eigenvector of E[g g^T]; controls with the mean gradient's rho: random, theta*."""
        apply: Literal["coupled", "prox"] = "coupled"
        """coupled: add the gradient before clipping, as in the paper. prox: exact proximal step, always stable."""
        estimate: Literal["per_sequence", "micro_batch", "directional"] = "per_sequence"
        """How rho is: squared projections of gradients; spread of micro-batches; two forward passes along mu."""
        cross_fit: bool = True
        """mu from half of the rows, rho from the other half. Otherwise c* is about 1 even where mu is pure noise."""
        rows: int = 256
        """Sequences of each stage to estimate from, both halves together."""
        rows_per_batch: int = 8
        """Sequences per pass, and the micro-batch of estimate=micro_batch."""
        params: Literal["all", "no_embed", "no_norms", "matrices"] = "all"
        """Which are held: all; all but embeddings and head; all but norms and biases; only the matrices of layers."""
        per_layer: bool = False
        """One direction and rho for each layer instead of one for the model."""
        base_stage: bool = True
        """Hold what the base learnt from stage 0, too."""
        dtype: Literal["fp32", "bf16"] = "fp32"
        """Type of the stored directions; rho and b are those of the rounded ones."""
        split_half: bool = False
        """Also note the cosine of the two halves' mean gradients; it takes a slower pass."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        quadratic.check("rank1-ewc", self.options, **WORDS)
        if self.options.scale == "trace" and self.options.estimate != "per_sequence":
            raise ConfigError("rank1-ewc:scale=trace needs each gradient", mend="give estimate=per_sequence")
        if self.options.split_half and not (self.options.cross_fit and self.options.estimate == "per_sequence"):
            raise ConfigError(
                "rank1-ewc:split_half=true needs halves", mend="give cross_fit=true,estimate=per_sequence"
            )
        self.needs = needs_of(base_stage=self.options.base_stage)
        self.stages: list[int] = []
        self.saved: Weights = {}  # what load_state_dict got, until a context tells where it belongs
        self.terms: quadratic.Directions | None = None

    def begin_stage(self, ctx: Context) -> None:
        """Estimate the base's term before the first stage."""
        if self.options.base_stage and ctx.stage.index == 1 and not self.stages:
            self._take_in(ctx, 0)

    def edit_gradients(self, ctx: Context) -> None:
        """Add the penalty's gradient, ``lambda sum_k rho_k s_k u_k`` with ``s_k = u_k.theta - b_k``."""
        if self.options.apply == "coupled" and self.options.strength and self.stages:
            terms, held = self._terms(ctx)
            s_KL = terms.residuals(held, ctx.all_reduce)
            targets = [held[name].grad for name in terms.layout.names]
            terms.add_to(targets, terms.coupled(s_KL, self._lambda(ctx)))

    def after_step(self, ctx: Context) -> None:
        """Take the proximal step of all terms at once."""
        if self.options.apply == "prox" and self.options.strength and self.stages:
            terms, held = self._terms(ctx)
            s_KL = terms.residuals(held, ctx.all_reduce)
            targets = [held[name].detach() for name in terms.layout.names]
            terms.add_to(targets, terms.proximal(s_KL, ctx.learning_rate * self._lambda(ctx)))

    def end_stage(self, ctx: Context) -> None:
        """Note how far the stage went along the directions, and estimate its own if another stage follows."""
        if self.stages:
            terms, held = self._terms(ctx)
            s_KL = terms.residuals(held, ctx.all_reduce)
            ctx.note("penalty", terms.value(s_KL, self._lambda(ctx)).item())
            ctx.note("lambda", self._lambda(ctx))
            for stage, s_L in zip(self.stages, s_KL, strict=True):
                ctx.note(f"s_{stage}", s_L.item() if len(s_L) == 1 else s_L.norm().item())
        if ctx.stage.index < ctx.stage.n_stages - 1:
            self._take_in(ctx, ctx.stage.index)

    def _lambda(self, ctx: Context) -> float:
        assert self.terms is not None
        if self.options.unit == "lambda":
            return float(self.options.strength)
        return float(self.options.strength / (ctx.stage.learning_rate * (self.terms.largest_rho or math.inf)))

    def _terms(self, ctx: Context) -> tuple[quadratic.Directions, dict[str, torch.nn.Parameter]]:
        """Return the terms on the device and the parameters that they hold."""
        held = quadratic.selected(ctx, self.options.params)
        if self.terms is None:
            layout = quadratic.Layout.of(held, per_layer=self.options.per_layer)
            self.terms = quadratic.Directions.unpacked(layout, self.saved, self.stages, ctx.device)
            self.saved = {}
        return self.terms, held

    def _take_in(self, ctx: Context, stage: int) -> None:
        from clbench.methods._rank_one import cosine, estimate

        opt, (terms, held) = self.options, self._terms(ctx)
        batches = rows_of(ctx, stage, n_rows=opt.rows, rows_per_batch=opt.rows_per_batch)
        term = estimate(ctx, stage, terms.layout, batches, opt)
        self.terms = terms.with_term(term.vector, term.rho_L, terms.layout.flat(held), ctx.all_reduce)
        self.stages = [*self.stages, stage]
        figures = {"rho": term.rho_L.max().item(), "mean_norm": term.mean_norm_L.norm().item()}
        figures["cos_theta"] = cosine(ctx, terms.layout, held, term.vector)
        c_star = term.c_star_L.min().item()
        if opt.direction != "top":
            figures["c_star"] = c_star
        if term.split_half is not None:
            figures["split_half"] = term.split_half
        for name, value in figures.items():
            ctx.note(f"base_{name}" if stage == 0 else name, value)
        if opt.cross_fit and opt.direction == "mean" and not c_star >= 1:
            where = "of the base" if stage == 0 else "of this stage"
            ctx.warn(
                f"the mean gradient {where} is noise: cross-fit c* = {c_star:.3g}, at least 1 in truth; more rows?"
            )

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the directions by parameter name, and their numbers."""
        tensors = self.terms.packed(self.stages) if self.terms is not None else dict(self.saved)
        return tensors, {"stages": list(self.stages)}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.saved = {name: tensor.clone() for name, tensor in tensors.items()}
        self.stages, self.terms = list(values["stages"]), None
