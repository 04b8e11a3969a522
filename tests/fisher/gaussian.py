"""A linear-Gaussian model behind the interface of a language model: its Fisher is known in closed form.

y = x . w* + e, x ~ N(0, S), e ~ N(0, s2); the loss of a sample is (y - x . w)^2 / (2 s2) at w = w* + D. A "token id" is
the number of a sample. Two logits (-h, log(1 - exp(-h))) have log-sum-exp 0, so cross-entropy with target 0 is h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn


@dataclass
class Rows:
    """A batch."""

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor


class Gaussian(nn.Module):
    """Samples [N, d] and a linear layer, in float64."""

    def __init__(self, x_ND: torch.Tensor, residuals_N: torch.Tensor, s2: float = 1.0) -> None:
        super().__init__()
        self.x_ND = x_ND
        self.s2 = s2
        self.layer = nn.Linear(x_ND.shape[1], 1, bias=False, dtype=x_ND.dtype)
        torch.nn.init.zeros_(self.layer.weight)
        self.y_N = residuals_N  # so that w = 0 has these residuals

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        residual_BT = self.y_N[input_ids] - self.layer(self.x_ND[input_ids]).squeeze(-1)
        h = residual_BT.square() / (2 * self.s2)
        return SimpleNamespace(logits=torch.stack((-h, torch.log(-torch.expm1(-h))), -1))

    def batches(self, n_rows: int, start: int = 0, end: int | None = None) -> Iterator[Rows]:
        """Yield samples start..end in order."""
        for ids in torch.arange(start, len(self.x_ND) if end is None else end).split(n_rows):
            yield Rows(ids.unsqueeze(1), torch.zeros_like(ids).unsqueeze(1))

    def gradients(self) -> torch.Tensor:
        """Every sample's gradient, [N, d], by hand: -(y - x.w) x / s2."""
        residual_N = self.y_N - self.x_ND @ self.layer.weight.detach()[0]
        return -residual_N.unsqueeze(1) * self.x_ND / self.s2


def draw(n: int, covariance: torch.Tensor, shift: torch.Tensor, s2: float, seed: int) -> Gaussian:
    """Draw a model at w* + shift: the residual is e - x . shift."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.linalg.cholesky(covariance)
    x_ND = torch.randn(n, len(covariance), generator=generator, dtype=torch.float64) @ half.T
    noise_N = torch.randn(n, generator=generator, dtype=torch.float64) * s2**0.5
    return Gaussian(x_ND, noise_N - x_ND @ shift, s2)
