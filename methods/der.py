"""DER++: replay from a buffer together with what the model said when it first met the rows (dark experience replay)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clbench.errors import ConfigError
from clbench.method import Batch, Context, Method, Need, Weights
from clbench.methods._distillation import divergence_top_k, with_gradient
from clbench.methods._logit_buffer import LogitBuffer, told
from clbench.methods._memory import Term, add, at_least, gradient, local_gradients, reached, some
from clbench.methods._teachers import positions
from clbench.train.data import IGNORE


class Der(Method):
    """Train on ``loss + alpha * match(x', z') + beta * loss(x'')`` (Buzzega et al. 2020, arXiv 2004.07211, equation 6).

    x' and x'' are two draws from a reservoir of the rows that this run has trained on, z' the logits when it did.
    ``beta=0`` is DER, ``alpha=0,beta=1`` experience replay.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of der."""

        alpha: float = 0.5
        """Weight of matching the old logits."""
        beta: float = 0.5
        """Weight of the loss on old rows."""
        tokens: int = 100_000
        """Tokens that the buffer holds at most, in whole rows; 8 + 6 top_k bytes each, in every checkpoint."""
        rows: int = 8
        """Rows of each of the two draws a step."""
        match: Literal["logits", "kl"] = "logits"
        """logits: squared difference of centred logits, mean over the kept tokens. kl: KL(then || now), in nats."""
        top_k: int = 32
        """Tokens whose logits are kept at every position, the most probable ones."""
        stage_0: bool = True
        """Whether the text that the base has seen counts as seen; its logits are then the base's."""
        micro_rows: int = 8
        """Rows of one extra pass at most: memory against time."""

    needs = frozenset({Need.PAST_DATA, Need.STAGE_BOUNDARIES})
    keeps_text = True
    """Deletion requests cannot reach into the buffer, so they are not composed with it."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        o = self.options
        at_least("der", 1, tokens=o.tokens, rows=o.rows, top_k=o.top_k, micro_rows=o.micro_rows)
        if not all(math.isfinite(weight) and weight >= 0 for weight in (o.alpha, o.beta)):
            raise ConfigError(f"der:alpha={o.alpha},beta={o.beta} are no weights", mend="give numbers of at least 0")
        if o.match not in ("logits", "kl"):
            raise ConfigError(f"der:match={o.match}", mend="give logits or kl")
        if not o.stage_0:
            self.needs = frozenset({Need.STAGE_BOUNDARIES})
        self.buffer = LogitBuffer(o.tokens)

    def begin_stage(self, ctx: Context) -> None:
        """Let stage 0 pass through the empty buffer: a uniform sample of its rows, with the base's logits."""
        if self.options.stage_0 and not self.buffer.n_seen:
            self._fill(ctx)

    def _fill(self, ctx: Context) -> None:
        n_targets, was_training = 0, ctx.module.training
        ctx.module.eval()
        for batch in ctx.batches(
            0, n_rows=ctx.stage.available_tokens[0], name="stage 0", rows_per_batch=self.options.micro_rows
        ):
            n_rows, length = batch.inputs_BT.shape
            n_held = min(n_rows, self.buffer.capacity(length) - batch.first_row)
            if n_held > 0:
                with torch.no_grad():
                    logits_BTV = ctx.module(input_ids=batch.inputs_BT[:n_held]).logits
                n_targets += int((batch.targets_BT[:n_held] != IGNORE).sum())
                self._keep(batch, logits_BTV, range(batch.first_row, batch.first_row + n_held))
            self.buffer.n_seen += n_rows
        ctx.module.train(was_training)
        ctx.bill("replay_logits", flops=ctx.forward_flops(n_targets), n_tokens=n_targets)
        self.buffer.commit()

    def _keep(self, batch: Batch, logits_BTV: torch.Tensor, places: Sequence[int | None]) -> None:
        """Keep the rows that have a place, for the end of the step."""
        kept = [(b, place) for b, place in enumerate(places) if place is not None]
        if kept:
            values, ids = told(logits_BTV[[b for b, _ in kept]], self.options.top_k, self.options.match)
            for i, (b, place) in enumerate(kept):
                row = {"inputs_RT": batch.inputs_BT[b].int(), "targets_RT": batch.targets_BT[b].int()}
                self.buffer.wait(place, row | {"values_RTK": values[i], "ids_RTK": ids[i]})

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> None:
        """Let the batch's rows pass through the reservoir, with the logits that the loop has computed anyway."""
        n_rows, length = batch.inputs_BT.shape
        seeds = (ctx.seed("reservoir", batch.first_row + b) for b in range(n_rows))
        self._keep(batch, logits_BTV, [self.buffer.offer(length, seed) for seed in seeds])

    def edit_gradients(self, ctx: Context) -> None:
        """Add the gradients of both terms, then let the step's rows enter the buffer."""
        o, parameters = self.options, reached(ctx)
        for name, weight in (("match", o.alpha), ("loss", o.beta)):
            if weight and self.buffer.n_held:
                which = some(self.buffer.n_held, o.rows, ctx.seed(name))
                rows, values, ids = self.buffer.rows(which, ctx.device)
                term = self._match(rows.targets_RT, values, ids) if name == "match" else None
                found, value = gradient(
                    ctx, parameters, rows, micro_rows=o.micro_rows, purpose=f"replay_{name}", term=term
                )
                add(local_gradients(parameters), found, weight)
                ctx.note(f"last_{name}", value)
        self.buffer.commit()
        ctx.note("rows_held", self.buffer.n_held)

    def _match(self, targets_RT: torch.Tensor, values_RTK: torch.Tensor, ids_RTK: torch.Tensor) -> Term:
        """Return the match of old and new logits as a term; its size does not depend on the vocabulary's."""

        def term(which: slice, logits_BTV: torch.Tensor) -> torch.Tensor:
            wanted_BT = targets_RT[which] != IGNORE
            student_NV = positions(logits_BTV, wanted_BT).float()
            then_NK, ids_NK = (positions(part[which], wanted_BT) for part in (values_RTK, ids_RTK))
            if self.options.match == "kl":
                with torch.no_grad():
                    value, direction = divergence_top_k(student_NV, then_NK, ids_NK, 1.0)
                return with_gradient(student_NV, value, direction, 1.0)
            now_NK = student_NV.gather(1, ids_NK.long())
            return (now_NK - now_NK.mean(1, keepdim=True) - then_NK.float()).square().mean(1).sum()

        return term

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the buffer."""
        return self.buffer.tensors(), {"n_seen": self.buffer.n_seen}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take it back."""
        self.buffer.load(tensors, int(values["n_seen"]))
