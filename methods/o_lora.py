"""O-LoRA: one adapter a stage, kept apart from the input directions of the adapters of earlier stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from clbench.errors import ConfigError
from clbench.method import Context, Stage, StagePlan, Weights
from clbench.methods._adapters import Adapted, AdapterOptions, factors, layers


class OLora(Adapted):
    """Add ``lambda1 sum |A_new A_old^T| + lambda2 sum ||P||`` to the loss (Wang et al. 2023, arXiv 2310.14152).

    The first sum is over layers, earlier stages and entries, without squares, as in the authors' code (equation 7 of
    the paper has them squared); the second over the new factors P, with their Frobenius norms. Earlier adapters are
    merged into the frozen weights.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(AdapterOptions):
        """Options of o-lora."""

        lambda1: float = 0.5
        """Strength of the orthogonality, in nats per unit of the entries' absolute sum."""
        lambda2: float = 0.0
        """Strength of the norms, in nats per unit."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        for name in ("lambda1", "lambda2"):
            value = getattr(self.options, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"o-lora:{name}={value} is no strength", mend="give a number of at least 0")
        self.old: Weights = {}
        """Layer -> the A of all earlier stages below one another, shape ``[stages * r, d_in]``."""

    def plan(self, stage: Stage) -> StagePlan:
        """Drop the optimizer's state: it is that of adapters that are gone."""
        return StagePlan(optimizer="reset")

    def before_merge(self, ctx: Context) -> None:
        """Keep the A of the stage that has ended."""
        for name, layer in layers(ctx.module):
            new = factors(layer)[0].detach().clone()
            self.old[name] = torch.cat([self.old[name].to(new), new]) if name in self.old else new

    def edit_gradients(self, ctx: Context) -> None:
        """Add the penalty's gradient; zero where an entry or a norm is zero, which is a subgradient there."""
        for name, layer in layers(ctx.module):
            a, b = factors(layer)
            if name in self.old and self.options.lambda1:
                _add(a, orthogonality_gradient(a.detach(), self.old[name].to(a)), self.options.lambda1)
            for factor in (a, b) if self.options.lambda2 else ():
                norm = factor.detach().norm().clamp_min(torch.finfo(factor.dtype).tiny)
                _add(factor, factor.detach() / norm, self.options.lambda2)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the factors of earlier stages."""
        return dict(self.old), {}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.old = dict(tensors)


def orthogonality(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return ``sum |A_new A_old^T|``, the sum of the entries' absolute values."""
    return (new @ old.T).abs().sum()


def orthogonality_gradient(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return its gradient with respect to A_new: ``sign(A_new A_old^T) A_old``."""
    return (new @ old.T).sign() @ old


def _add(parameter: torch.nn.Parameter | torch.Tensor, gradient: torch.Tensor, strength: float) -> None:
    """Add to a parameter's gradient."""
    parameter.grad = strength * gradient if parameter.grad is None else parameter.grad.add_(gradient, alpha=strength)
