"""Learned alpha: release a WiSE-FT whose share of the base every layer has learnt on a little text (arXiv 2410.13025).

The weights of both models stay frozen; one number a layer is trained on a mix of stage 0's text and this stage's. The
paper does so for adapters (CAT, LoRA soups); with a base and one trained model it is a layer-wise WiSE-FT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clbench.errors import ConfigError
from clbench.method import Batch, Context, Need, Weights
from clbench.methods import _adapters
from clbench.methods import _merging as merging
from clbench.methods._averages import check_range

if TYPE_CHECKING:
    import torch


class LearnedAlpha(merging.Merging):
    """Learn how much of the base each layer takes, at the stage's end, on training text; release that mixture.

    Held-out text, which is measured, is not read. Training goes on from its own weights.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(merging.MergeOptions):
        """Options of LearnedAlpha."""

        mix: float = 0.5
        """Weight of stage 0's text in the loss; the rest is this stage's."""
        steps: int = 20
        """Steps of Adam on the numbers."""
        rows: int = 2
        """Rows of each of the two texts in a step."""
        learning_rate: float = 0.2
        """Of the numbers, whose sigmoid the shares are; they start at 1/2."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self.needs |= {Need.PAST_DATA, Need.CURRENT_DATA}
        check_range("learned_alpha", "mix", self.options.mix, 0, 1)
        check_range("learned_alpha", "learning_rate", self.options.learning_rate, 0)
        for option in ("steps", "rows"):
            check_range("learned_alpha", option, getattr(self.options, option), 1)
        self.shares: dict[str, list[float]] = {}

    def end_stage(self, ctx: Context) -> None:
        """Learn the shares.

        Raises:
            ConfigError: the model has adapters, whose factors no share could mix.
        """
        from clbench.merge.learn import learn_shares
        from clbench.train.models import copy_weights, weights_of

        if any(name.endswith((_adapters.A, _adapters.B)) for name, _ in ctx.module.named_parameters()):
            raise ConfigError("learned-alpha cannot mix adapters", mend="train all weights, or take wise-ft after lora")
        base = ctx.base_weights() if self.options.towards == "base" else self.origin
        tuned = copy_weights(weights_of(ctx.module))
        dealt = list(self._deal(ctx))
        found = learn_shares(
            ctx.module,
            [base.__getitem__, tuned.__getitem__],
            lambda step: dealt[step],
            n_steps=self.options.steps,
            learning_rate=self.options.learning_rate,
        )
        self.shares = {unit: list(own) for unit, own in found.shares.items()}
        ctx.bill("merge", flops=3 * ctx.forward_flops(found.n_tokens), n_tokens=found.n_tokens)
        for name, value in (("loss_before", found.losses_nats[0]), ("loss_after", found.losses_nats[-1])):
            ctx.note(name, value)
        for unit, own in found.shares.items():
            ctx.note(f"restored_{unit}", own[0])

    def _deal(self, ctx: Context) -> Iterator[list[tuple[float, torch.Tensor, torch.Tensor]]]:
        """Yield what each step learns on; rows that run out come around again."""
        options, sides = self.options, list[tuple[float, list[Batch]]]()
        for weight, stage in ((options.mix, 0), (1 - options.mix, ctx.stage.index)):
            wanted = options.steps * options.rows
            rows = list(ctx.batches(stage, n_rows=wanted, name="alpha", rows_per_batch=options.rows)) if weight else []
            sides += [(weight, rows)] if rows else []
        total = sum(weight for weight, _ in sides)
        for step in range(options.steps):
            chosen = [(weight / total, rows[step % len(rows)]) for weight, rows in sides]
            yield [(weight, batch.inputs_BT, batch.targets_BT) for weight, batch in chosen]

    def merge(self, ctx: Context, tuned: Weights, base: Weights) -> Weights:
        """Return every layer on its own place of the line."""
        from clbench.merge import kernels
        from clbench.merge.learn import units_of

        if not self.shares:  # a stage that trained nothing has learnt nothing
            return {}
        units = units_of(list(tuned))
        floating = {name: w for name, w in tuned.items() if w.is_floating_point() and units[name] in self.shares}
        return {name: kernels.lerp(w, base[name], self.shares[units[name]][0]) for name, w in floating.items()}

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the weights at the stage's start, and the shares."""
        return dict(self.origin), {"shares": self.shares}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(tensors, values)
        self.shares = {unit: list(own) for unit, own in values["shares"].items()}
