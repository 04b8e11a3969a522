"""A control for penalties under Adam: plain training with a larger epsilon, as a method given by its file.

    clbench run -t codedocs-nano-tuning -m benchmarks/adam_epsilon.py:AdamEpsilon:epsilon=1e-4

A penalty along one dense direction adds the same small gradient to every weight. Adam divides by the root of the mean
square of all of it, so where the loss's own gradient is rare (rows of seldom tokens) the penalty sets the denominator,
whatever its direction. A larger epsilon does that and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clbench.method import Method

if TYPE_CHECKING:
    import torch


class AdamEpsilon(Method):
    """AdamW with another epsilon; nothing is held."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of AdamEpsilon."""

        epsilon: float = 1e-4
        """Added to the root of the second moment; torch's default is 1e-8."""

    def make_optimizer(
        self, groups: list[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        """Return the loop's optimizer but for epsilon."""
        import torch

        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=self.options.epsilon, fused=True)
