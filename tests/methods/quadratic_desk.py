"""A context around any model, for tests of quadratic penalties: it counts, and sums over processes if there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from clbench import seeds
from clbench.method import Context, Method, Stage, Weights
from tests.fisher.gaussian import Gaussian, Rows


def stage_of(index: int, n_stages: int = 5, learning_rate: float = 0.1) -> Stage:
    return Stage(
        index=index,
        n_stages=n_stages,
        n_tokens=100,
        available_tokens=(100,) * n_stages,
        learning_rate=learning_rate,
        warmup_steps=1,
        floor=1.0,
    )


@dataclass
class Desk:
    """What a context gives to a penalty. Rows of a stage are consecutive samples of a Gaussian model."""

    module: torch.nn.Module
    stage: Stage = field(default_factory=lambda: stage_of(1))
    learning_rate: float = 0.1
    step: int = 0
    n_steps: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    notes: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bills: list[tuple[float, int]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    n_reductions: int = 0

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def base_weights(self) -> Weights:
        return {name: torch.zeros_like(p) for name, p in self.module.named_parameters()}

    def batches(self, stage: int, *, n_rows: int, name: str, rows_per_batch: int = 1) -> Iterator[Rows]:
        assert name == "fisher"
        self.asked.append(stage)
        return cast(Gaussian, self.module).batches(rows_per_batch, 0, n_rows)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        self.n_reductions += 1
        assert values.dtype == torch.float64
        return self.reduce(values)

    def note(self, name: str, value: float) -> None:
        assert isinstance(value, int | float)
        self.notes[name] = value

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        assert purpose == "fisher"
        self.bills.append((flops, n_tokens))

    def forward_flops(self, n_tokens: int) -> float:
        return float(n_tokens)

    def seed(self, *names: int | str) -> int:
        return seeds.derive(0, *names)

    @property
    def ctx(self) -> Context:
        return cast(Context, self)


def gradient_of(method: Method, desk: Desk) -> torch.Tensor:
    """Return what edit_gradients adds, flat, in the parameters' order."""
    for _, p in desk.parameters():
        p.grad = torch.zeros_like(p)
    method.edit_gradients(desk.ctx)
    found = torch.cat([cast(torch.Tensor, p.grad).flatten() for _, p in desk.parameters()])
    desk.module.zero_grad()
    return found


def put(desk: Desk, values: torch.Tensor) -> None:
    """Overwrite the parameters by a flat vector."""
    parameters = [p for _, p in desk.parameters()]
    pieces = torch.split(values, [p.numel() for p in parameters])
    with torch.no_grad():
        for p, piece in zip(parameters, pieces, strict=True):
            p.copy_(piece.view_as(p))


def flat(desk: Desk) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in desk.parameters()]).clone()


def finite_difference(function: Callable[[torch.Tensor], float], at: torch.Tensor, step: float = 1e-4) -> torch.Tensor:
    """Return the gradient from central differences (exact for quadratics but for rounding)."""
    found = torch.empty_like(at)
    for i in range(at.numel()):
        shift = torch.zeros_like(at)
        shift[i] = step
        found[i] = (function(at + shift) - function(at - shift)) / (2 * step)
    return found


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed: int, n: int) -> torch.Tensor:
    """Return a symmetric matrix with eigenvalues of at least 1."""
    root = numbers(seed, n, n)
    return root @ root.T / n + torch.eye(n, dtype=torch.float64)


def values_of(method: Any) -> tuple[Weights, dict[str, Any]]:
    tensors, values = method.state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items()}, values
