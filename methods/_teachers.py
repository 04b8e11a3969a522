"""Teachers of distillation: a second model that runs along, or its most probable tokens, kept before the stage.

Both take the teacher at a stage's beginning, say how far the student is from it on one micro-batch, bill their passes
as ``teacher``, and give up what a resumed run needs. Shapes: B rows, T positions, N positions that count, V
vocabulary, K cached tokens of a position, R rows of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from clbench.method import Batch, Context, Weights
from clbench.methods._distillation import divergence, divergence_top_k
from clbench.train.data import IGNORE
from clbench.train.models import holding, load_weights, weights_of

if TYPE_CHECKING:
    from clbench.methods.lwf import Lwf

Wanted = Callable[[Context, Batch], torch.Tensor]
"""Says which positions of a batch count, bool ``[B, T]``."""
CACHE_DTYPE = torch.float16
"""Of cached log-probabilities: rounded to 2^-11 of their size, where bfloat16 has 2^-8."""


class Running:
    """A second model in memory: one forward pass more a step."""

    def __init__(self, options: Lwf.Options) -> None:
        self.options = options
        self.model: torch.nn.Module | None = None
        self.saved: Weights = {}
        """Weights that came from a checkpoint and are in no model yet."""

    def begin(self, ctx: Context, wanted: Wanted) -> None:
        """Take the teacher."""
        self.saved = {}
        self.model = self._make(ctx)

    def _make(self, ctx: Context) -> torch.nn.Module:
        """Return the second model: as the base was, as it was saved, or else as the model is now."""
        model = ctx.second_model()
        weights = ctx.base_weights() if self.options.teacher == "base" else self.saved
        if weights:
            load_weights(model, weights)
        self.saved = {}
        return model

    def divergence(
        self, ctx: Context, batch: Batch, wanted_BT: torch.Tensor, student_NV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divergence, and T times its gradient; the rows without a wanted position are left out."""
        self.model = self.model or self._make(ctx)  # a resumed run has had no begin_stage
        rows_B = wanted_BT.any(1)
        inputs_BT, targets_BT = batch.inputs_BT, batch.targets_BT
        if not bool(rows_B.all()):
            inputs_BT, targets_BT, wanted_BT = inputs_BT[rows_B], targets_BT[rows_B], wanted_BT[rows_B]
        ctx.bill("teacher", flops=ctx.forward_flops(int((targets_BT != IGNORE).sum())))
        low = student_NV.dtype != torch.float32  # the student ran under autocast: so does its teacher
        with torch.autocast(ctx.device.type, dtype=student_NV.dtype if low else None, enabled=low):
            logits_BTV = self.model(input_ids=inputs_BT).logits
        return divergence(student_NV, positions(logits_BTV, wanted_BT), self.options.temperature)

    def tensors(self) -> Weights:
        """Return the teacher's weights; the base's are at hand anyway."""
        if self.model is None or self.options.teacher == "base":
            return dict(self.saved)
        return weights_of(self.model)

    def load(self, tensors: Weights) -> None:
        """Take them back."""
        self.model, self.saved = None, dict(tensors)


class Cached:
    """The k most probable tokens at every position that counts, in training order: 6 k bytes a position.

    They come from one pass over the stage's batches before it begins, in fp32 and with no second model.
    """

    def __init__(self, options: Lwf.Options) -> None:
        self.options = options
        self.load({})

    def begin(self, ctx: Context, wanted: Wanted) -> None:
        """Run the teacher over the whole stage."""
        log_ps, ids, counts = [], [], []
        with self._teaching(ctx), torch.no_grad():
            for batch in ctx.training_batches():
                n_tokens = int((batch.targets_BT != IGNORE).sum())
                ctx.bill("teacher", flops=ctx.forward_flops(n_tokens), n_tokens=n_tokens)
                wanted_BT = wanted(ctx, batch)
                logits_NV = positions(ctx.module(input_ids=batch.inputs_BT).logits, wanted_BT)
                log_p_NV = torch.log_softmax(logits_NV.float() / self.options.temperature, -1)
                top = log_p_NV.topk(min(self.options.top_k, log_p_NV.shape[-1]), dim=-1)
                log_ps.append(top.values.to(CACHE_DTYPE).cpu())
                ids.append(top.indices.to(torch.int32).cpu())
                counts.append(wanted_BT.sum(1).cpu())
        self.load({"log_p_NK": torch.cat(log_ps), "ids_NK": torch.cat(ids), "ends_R": torch.cat(counts).cumsum(0)})

    @contextmanager
    def _teaching(self, ctx: Context) -> Iterator[None]:
        """Let the model be its own teacher for a while."""
        was_training = ctx.module.training
        weights = ctx.base_weights() if self.options.teacher == "base" else weights_of(ctx.module)
        with holding(ctx.module.eval(), weights):
            yield
        ctx.module.train(was_training)

    def divergence(
        self, ctx: Context, batch: Batch, wanted_BT: torch.Tensor, student_NV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divergence of the coarser distributions, and T times its gradient."""
        first, n_rows = batch.first_row, len(batch.inputs_BT)
        begin, end = (int(self.ends_R[row - 1]) if row else 0 for row in (first, first + n_rows))
        log_p_NK, ids_NK = (tensor[begin:end].to(ctx.device) for tensor in (self.log_p_NK, self.ids_NK))
        return divergence_top_k(student_NV, log_p_NK, ids_NK, self.options.temperature)

    def tensors(self) -> Weights:
        """Return the cache."""
        return {"log_p_NK": self.log_p_NK, "ids_NK": self.ids_NK, "ends_R": self.ends_R}

    def load(self, tensors: Weights) -> None:
        """Take it back."""
        self.log_p_NK = tensors.get("log_p_NK", torch.empty(0, 0, dtype=CACHE_DTYPE))
        self.ids_NK = tensors.get("ids_NK", torch.empty(0, 0, dtype=torch.int32))
        self.ends_R = tensors.get("ends_R", torch.empty(0, dtype=torch.int64))
        """Positions up to and with each row of the stage."""


def positions(tensor_BTX: torch.Tensor, wanted_BT: torch.Tensor) -> torch.Tensor:
    """Return the wanted positions, row by row, shape ``[N, X]``; without a copy where all are wanted."""
    flat = tensor_BTX.flatten(0, 1)
    return flat if bool(wanted_BT.all()) else flat.index_select(0, wanted_BT.flatten().nonzero()[:, 0])
