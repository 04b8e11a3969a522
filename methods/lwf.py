"""Learning without Forgetting: keep the next-token distributions close to those of the model before the stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clbench.errors import ConfigError
from clbench.method import Batch, Context, Method, Need, Weights
from clbench.methods._distillation import with_gradient
from clbench.methods._teachers import Cached, Running, positions
from clbench.train.data import IGNORE


class Lwf(Method):
    """Add ``alpha * scale * KL(teacher || student)`` per target token (Li & Hoiem 2016, arXiv 1606.09282, equation 2).

    With ``on=replayed`` and a replay method beside it, this is distillation on replayed text.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of lwf."""

        alpha: float = 1.0
        """Weight of the divergence beside the loss, both in nats per target token of the batch."""
        temperature: float = 2.0
        """T: both distributions are softmax(logits / T)."""
        scaling: Literal["hinton", "none", "tic_lm"] = "hinton"
        """hinton: times T^2, so that T hardly moves the gradient's size. none. tic_lm: divided by the vocabulary."""
        teacher: Literal["previous", "base"] = "previous"
        """The model before this stage, or the one that the run began with."""
        on: Literal["all", "new", "replayed"] = "all"
        """Rows that count, by the stage that their text is from."""
        top_k: int = 0
        """0: a second model runs along. k: its k most probable tokens are kept before each stage, the rest as a sum."""

    needs = frozenset({Need.STAGE_BOUNDARIES, Need.SECOND_MODEL})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)
        source = Need.CURRENT_DATA if self.options.top_k else Need.SECOND_MODEL
        base = {Need.BASE_WEIGHTS} if self.options.teacher == "base" else set()
        self.needs = frozenset({Need.STAGE_BOUNDARIES, source, *base})
        self.teacher = Cached(self.options) if self.options.top_k else Running(self.options)
        self.n_distilled = 0
        """Target tokens of this stage that had a teacher."""

    def begin_stage(self, ctx: Context) -> None:
        """Take the teacher."""
        self.n_distilled = 0
        self.teacher.begin(ctx, self.wanted)

    def wanted(self, ctx: Context, batch: Batch) -> torch.Tensor:
        """Return which positions count, bool ``[B, T]``."""
        wanted_BT = batch.targets_BT != IGNORE
        if self.options.on == "all":
            return wanted_BT
        is_new_B = (batch.source_B == ctx.stage.index).to(wanted_BT.device)
        return wanted_BT & (is_new_B if self.options.on == "new" else ~is_new_B)[:, None]

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> torch.Tensor | None:
        """Return the weighted divergence, summed over the positions that count."""
        wanted_BT = self.wanted(ctx, batch)
        if not bool(wanted_BT.any()):
            return None
        student_NV = positions(logits_BTV, wanted_BT)
        with torch.no_grad():
            value, direction = self.teacher.divergence(ctx, batch, wanted_BT, student_NV)
        self.n_distilled += len(student_NV)
        temperature, n_vocabulary = self.options.temperature, logits_BTV.shape[-1]
        # TiC-LM leaves torch's reduction "mean" on, which divides by tokens and vocabulary, and has no T^2.
        scale = {"hinton": temperature**2, "none": 1.0, "tic_lm": 1 / n_vocabulary}[self.options.scaling]
        weight: float = self.options.alpha * scale
        return weight * with_gradient(student_NV, value, direction, 1 / temperature)

    def end_stage(self, ctx: Context) -> None:
        """Refuse to have done nothing all stage long."""
        if ctx.n_steps and not self.n_distilled:
            raise ConfigError(
                f"lwf:on={self.options.on} met no such row",
                where=f"stage {ctx.stage.index}",
                mend="compose it with a replay method, or take on=all",
            )

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the teacher: begin_stage is not called again where a stage is resumed."""
        return self.teacher.tensors(), {"n_distilled": self.n_distilled}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take it back."""
        self.teacher.load(tensors)
        self.n_distilled = int(values["n_distilled"])


def check(options: Lwf.Options) -> None:
    """Raise ConfigError for numbers that make no sense."""
    if not (math.isfinite(options.alpha) and options.alpha >= 0):
        raise ConfigError(f"lwf:alpha={options.alpha} is no weight", mend="give a number of at least 0")
    if not (math.isfinite(options.temperature) and options.temperature > 0):
        raise ConfigError(f"lwf:temperature={options.temperature} is none", mend="give a number above 0 such as 2")
    if options.top_k < 0:
        raise ConfigError(f"lwf:top_k={options.top_k} is no number of tokens", mend="give 0, or a number such as 32")
