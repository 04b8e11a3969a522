"""EWC: hold each weight by its diagonal Fisher information, after Kirkpatrick et al. 2017 (arXiv 1612.00796)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from clbench.errors import ConfigError
from clbench.method import Context, Method, Weights
from clbench.methods import _quadratic as quadratic
from clbench.methods._fisher_rows import bill, needs_of, rows_of


class Ewc(Method):
    """Add ``strength/2 sum_k sum_j F_kj (theta_j - theta*_kj)^2`` over past stages k (equation 3 there, and its 1/2).

    ``F_kj = E[g_j^2]`` over the gradients g of single sequences' mean losses at theta*_k, in eval mode, with the
    labels of the data (the empirical Fisher): not the square of a batch's gradient, which is about 1/batch of it.

    All anchors are in two vectors, exactly: ``sum_k F_k (theta - theta_k)^2 = F (theta - a)^2 + const`` with
    ``F = sum_k F_k`` and ``a = sum_k F_k theta_k / F``. The penalty of avalanche, mammoth and GEM has no 1/2: their
    lambda is half of this strength, besides that their Fisher estimates differ, see docs/regularisers.md.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of ewc."""

        strength: float = 100.0
        """lambda. Sweep it over decades; it depends on model and text, not on the batch size."""
        variant: Literal["separate", "online"] = "separate"
        """separate: every stage at its own anchor. online: F <- gamma F + F_new, all at the latest weights."""
        gamma: float = 1.0
        """online: what is kept of the past stages' Fisher at every stage (Schwarz et al. 2018, arXiv 1805.06370)."""
        apply: Literal["coupled", "prox"] = "coupled"
        """coupled: add the gradient before clipping. prox: exact proximal step after the optimizer's, always stable."""
        rows: int = 256
        """Sequences of each stage that its Fisher is estimated from."""
        rows_per_batch: int = 8
        """Sequences per pass; only memory and time depend on it."""
        params: Literal["all", "no_embed", "no_norms", "matrices"] = "all"
        """Which are held: all; all but embeddings and head; all but norms and biases; only the matrices of layers."""
        base_stage: bool = True
        """Hold what the base learnt from stage 0, too."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        quadratic.check("ewc", self.options, variant=("separate", "online"))
        if not 0 <= self.options.gamma <= 1:
            raise ConfigError(f"ewc:gamma={self.options.gamma} is no share", mend="give a number from 0 to 1")
        self.needs = needs_of(base_stage=self.options.base_stage)
        self.fisher: Weights = {}
        self.anchor: Weights = {}

    def begin_stage(self, ctx: Context) -> None:
        """Estimate the base's Fisher before the first stage."""
        if self.options.base_stage and ctx.stage.index == 1 and not self.fisher:
            self._take_in(ctx, 0)

    def edit_gradients(self, ctx: Context) -> None:
        """Add the penalty's gradient, ``strength F (theta - a)``."""
        if self.options.apply == "coupled" and self.options.strength and self.fisher:
            quadratic.pull(*self._operands(ctx, self.options.strength))

    def after_step(self, ctx: Context) -> None:
        """Take the proximal step, ``theta <- (theta + kappa a)/(1 + kappa)`` with ``kappa = lr strength F``."""
        if self.options.apply == "prox" and self.options.strength and self.fisher:
            quadratic.shrink_to(*self._operands(ctx, ctx.learning_rate * self.options.strength))

    def _operands(self, ctx: Context, strength: float) -> tuple[Any, Any, float, Any]:
        parameters = quadratic.selected(ctx, self.options.params)
        self.fisher, self.anchor = (quadratic.placed(t, parameters) for t in (self.fisher, self.anchor))
        return list(parameters.values()), list(self.anchor.values()), strength, list(self.fisher.values())

    def end_stage(self, ctx: Context) -> None:
        """Note how far the stage went, and estimate its Fisher if another one follows."""
        if self.fisher:
            parameters, anchors, strength, weights = self._operands(ctx, self.options.strength)
            total = ctx.all_reduce(quadratic.quadratic(parameters, anchors, weights))
            ctx.note("penalty", strength / 2 * total.item())
        if ctx.stage.index < ctx.stage.n_stages - 1:
            self._take_in(ctx, ctx.stage.index)

    def _take_in(self, ctx: Context, stage: int) -> None:
        from clbench.fisher.estimate import second_moment

        parameters = quadratic.selected(ctx, self.options.params)
        batches = rows_of(ctx, stage, n_rows=self.options.rows, rows_per_batch=self.options.rows_per_batch)
        new, _, n_sequences = second_moment(ctx.module, batches, names=list(parameters))
        bill(ctx, batches, forwards=3)
        kept = self.options.gamma if self.options.variant == "online" else 1.0
        old, old_anchor = (quadratic.placed(t, parameters) for t in (self.fisher, self.anchor))
        fisher: Weights = {}
        for name, parameter in parameters.items():
            before = old[name] * kept if old else new[name].new_zeros(())
            fisher[name] = before + new[name]
            here = parameter.detach()
            if not old or self.options.variant == "online":
                self.anchor[name] = here.clone()
            else:  # where nothing is known of a weight, its anchor does not matter
                share = new[name] / fisher[name].clamp_min(1e-38)
                self.anchor[name] = old_anchor[name].lerp(here, share)
        self.fisher = fisher
        trace = ctx.all_reduce(quadratic.total(new.values()))
        ctx.note("base_trace" if stage == 0 else "trace", trace.item())
        ctx.note("base_rows" if stage == 0 else "rows", n_sequences)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the two vectors."""
        return {f"{key}/{n}": t for key in ("fisher", "anchor") for n, t in getattr(self, key).items()}, {}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.fisher, self.anchor = (
            {n.removeprefix(key): t.clone() for n, t in tensors.items() if n.startswith(key)}
            for key in ("fisher/", "anchor/")
        )
