"""A method that counts for itself what it is shown; given to ``--method`` as FILE.py:Class."""

from __future__ import annotations

from typing import Any

import torch

from clbench.method import Context, Method, Weights


class Counting(Method):
    """Counts target tokens by trained stage and source, batch by batch, and reports them as its state."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.counts: dict[str, int] = {}

    def extra_loss(self, ctx: Context, batch: Any, logits_BTV: torch.Tensor) -> None:
        """Count one micro-batch, row by row."""
        for source, targets_T in zip(batch.source_B.tolist(), batch.targets_BT.tolist(), strict=True):
            key = f"{ctx.stage.index} {source}"
            self.counts[key] = self.counts.get(key, 0) + sum(target >= 0 for target in targets_T)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the counts."""
        return {}, {"counts": self.counts}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take the counts back."""
        self.counts = values["counts"]
