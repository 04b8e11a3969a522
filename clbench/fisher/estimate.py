"""Estimates from gradients of single sequences: mean gradient, diagonal Fisher, rank-one Fisher and its scale c*.

F = E[g g^T] is the uncentred empirical Fisher: g is the gradient of one packed sequence's mean loss with respect to the
data's own targets. Squares of a batch's mean gradient are not it (they are smaller by about the batch's size).

Rank one (Rank-1 Fisher EWC, arXiv 2509.23593, eq. 6): F ~ c* mu mu^T, mu = E[g], c* = E[(mu.g)^2] / ||mu||^4. Kept as
rho u u^T with u = mu / ||mu|| and rho = E[(u.g)^2] = c* ||mu||^2, the same matrix, in which nothing over- or underflows
when mu is tiny.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from clbench.errors import ClbenchError, ConfigError
from clbench.fisher.gradients import (
    check_finite,
    chosen_parameters,
    dot_each_sequence,
    each_sequence,
    sequence_losses,
    undisturbed,
)
from clbench.fisher.uses import inner
from clbench.method import Weights

How = Literal["per_sequence", "directional"]
LINEARITY_TOLERANCE = 0.05
"""Largest relative difference of the directional derivatives at step e and e/2."""
LOSS_CHANGE_NATS = (1e-3, 1e-2)
"""The typical change of a sequence's loss that a step is chosen for."""
SMALLEST_CHANGE_NATS = 1e-4
"""Below this, rounding of fp32 losses shows."""

SMALL_ELEMENTS = 2**15
"""Of a parameter whose rows are squared all at once, as calling costs more than memory."""


class Batch(Protocol):
    """What is needed of a batch (``TokenBatch`` has it)."""

    @property
    def inputs_BT(self) -> torch.Tensor:
        """Token ids."""
        ...

    @property
    def targets_BT(self) -> torch.Tensor:
        """Targets or IGNORE."""
        ...


Batches = Iterable[Batch] | Callable[[], Iterable[Batch]]
"""Batches, or a function that gives them anew each time (for what goes over them twice)."""


class LinearityError(ClbenchError):
    """Losses along a direction are not linear at the step that was used."""


def _iterate(batches: Batches) -> Iterable[Batch]:
    return batches() if callable(batches) else batches


def mean_gradient(model: nn.Module, batches: Batches, *, names: Collection[str] | None = None) -> tuple[Weights, int]:
    """Return the mean over sequences of their gradients (fp32, or the model's own if wider) and how many there were.

    One ordinary backward pass a batch; the result does not depend on how rows are batched.

    Raises:
        ConfigError: no rows, or an unknown name.
    """
    parameters = chosen_parameters(model, names)
    total, n_sequences = _zeros(parameters), 0
    with undisturbed(model, parameters.values()):
        for batch in _iterate(batches):
            for sum_, gradient in zip(total.values(), _summed_gradient(model, batch, parameters), strict=True):
                if gradient is not None:
                    sum_ += gradient
            n_sequences += len(batch.inputs_BT)
    _check_rows(n_sequences)
    return {name: sum_ / n_sequences for name, sum_ in total.items()}, n_sequences


def second_moment(
    model: nn.Module, batches: Batches, *, names: Collection[str] | None = None
) -> tuple[Weights, Weights, int]:
    """Return (mean of g^2 for each coordinate: the diagonal Fisher; mean of g; number of sequences).

    Raises:
        ConfigError: no rows, or an unknown name.
    """
    parameters = chosen_parameters(model, names)
    squares, total, n_sequences = _zeros(parameters), _zeros(parameters), 0

    def visit(name: str, gradient: torch.Tensor) -> None:
        total[name] += gradient.sum(0)
        if gradient.is_cuda or gradient[0].numel() < SMALL_ELEMENTS:
            squares[name] += gradient.square_().sum(0)
            return
        for row in gradient:  # a row at a time stays in a processor's cache
            squares[name].addcmul_(row, row)

    for batch in _iterate(batches):
        each_sequence(model, batch.inputs_BT, batch.targets_BT, visit, names=names)
        n_sequences += len(batch.inputs_BT)
    _check_rows(n_sequences)
    for name in parameters:
        squares[name] /= n_sequences
        total[name] /= n_sequences
    return squares, total, n_sequences


def projections(
    model: nn.Module,
    batches: Batches,
    direction: Weights,
    *,
    how: How = "per_sequence",
    step: float | None = None,
) -> torch.Tensor:
    """Return direction . g of each sequence, float64 [n] on the CPU.

    Args:
        model: see ``gradients.each_sequence``.
        batches: rows in the order of the result.
        direction: by parameter name; parameters that it leaves out do not count.
        how: ``per_sequence`` from one backward pass a batch; ``directional`` from two forward passes at
            theta +- step u (u the direction scaled to length 1) and no backward pass, exact to O(step^2).
        step: length of the step in weight space; chosen on the first batch when None, so that losses typically
            change by 1e-3 to 1e-2 nats.

    Raises:
        LinearityError: ``directional``, and on the first batch the derivatives at half the step differ by more than
            ``LINEARITY_TOLERANCE``; a chosen step is made smaller before.
        ConfigError: no rows, or an unknown name.
    """
    if how == "per_sequence":
        found = [dot_each_sequence(model, b.inputs_BT, b.targets_BT, direction)[1] for b in _iterate(batches)]
    elif how == "directional":
        found = _directional(model, _iterate(batches), direction, step)
    else:
        raise ConfigError(f"unknown way to project: {how!r}", mend="per_sequence or directional")
    _check_rows(len(found))
    return torch.cat(found).cpu()


def projections_of_batches(model: nn.Module, batches: Batches, direction: Weights) -> tuple[torch.Tensor, int]:
    """Return direction . mean gradient of each micro-batch (float64, CPU) and the rows of a micro-batch, b.

    For the micro-batch identity (``c_star_of_batches``). Batches with fewer rows than the first are left out.

    Raises:
        ConfigError: no rows, or an unknown name.
    """
    parameters = chosen_parameters(model, list(direction))
    found: list[torch.Tensor] = []
    n_rows = 0
    with undisturbed(model, parameters.values()):
        for batch in _iterate(batches):
            n_rows = n_rows or len(batch.inputs_BT)
            if len(batch.inputs_BT) != n_rows:
                continue
            gradients = zip(parameters, _summed_gradient(model, batch, parameters), strict=True)
            dots = [inner(g.unsqueeze(0), direction[name]) for name, g in gradients if g is not None]
            found.append(sum(dots, torch.zeros(1, dtype=torch.float64, device=batch.inputs_BT.device)) / n_rows)
    _check_rows(len(found))
    return torch.cat(found).cpu(), n_rows


def c_star_of_batches(projections_N: torch.Tensor, n_rows: int, mean_norm: float) -> float:
    """Return c* from projections of micro-batch means on u = mu/||mu||: c* = 1 + b (c*_b - 1).

    c*_b = E[(u.g_b)^2] / ||mu||^2 over batches of b independent rows; rows must be shuffled, as packed neighbours of
    one document are not independent.
    """
    of_batches = projections_N.double().square().mean().item() / mean_norm**2
    return 1 + n_rows * (of_batches - 1)


# --- rank one ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankOne:
    """A Fisher of rank one: rho u u^T = c* mu mu^T."""

    direction: Weights
    """u = mu / ||mu||."""
    rho: float
    """E[(u.g)^2]: the matrix's one eigenvalue."""
    c_star: float
    """rho / ||mu||^2, at least 1 in truth; NaN when mu is zero."""
    mean_norm: float
    """||mu||."""
    n_sequences: int
    """That rho is from."""
    cross_fitted: bool
    """Whether mu and rho are from different sequences; else c* is about 1 even for pure noise."""
    trace: float | None
    """E||g||^2, the trace of F; None with ``directional``."""

    @property
    def is_noise(self) -> bool:
        """Whether the direction is no better than noise: a cross-fitted c* below 1 breaks c* >= 1.

        For pure noise a cross-fitted c* tends to n_sequences / n_parameters. In-sample estimates cannot tell.
        """
        return not self.c_star >= 1


def rank_one(
    model: nn.Module,
    batches_a: Batches,
    batches_b: Batches | None,
    *,
    how: How = "per_sequence",
    names: Collection[str] | None = None,
) -> RankOne:
    """Return the rank-one Fisher along the mean gradient: mu from A, rho from B.

    Args:
        model: see ``gradients.each_sequence``.
        batches_a: rows for mu.
        batches_b: other rows for rho (cross-fit); None takes A again, which then must be a function or a list.
        how: see ``projections``; ``per_sequence`` also gives the trace.
        names: parameters; all trained ones by default.

    Raises:
        ConfigError: no rows, an unknown name, or an iterator that would be gone over twice.
        LinearityError: see ``projections``.
    """
    second = batches_a if batches_b is None else batches_b
    if batches_b is None and isinstance(batches_a, Iterator):
        raise ConfigError("without rows of their own, c* goes over the batches twice", mend="pass a function or a list")
    direction, _ = mean_gradient(model, batches_a, names=names)
    mean_norm = norm(direction)
    for part in direction.values():
        part /= mean_norm or 1.0
    trace = None
    if how == "per_sequence":
        dots_N, trace = _dots_and_trace(model, second, direction)
    else:
        dots_N = projections(model, second, direction, how=how)
    rho = dots_N.square().mean().item()
    return RankOne(
        direction=direction,
        rho=rho,
        c_star=rho / mean_norm**2 if mean_norm else math.nan,
        mean_norm=mean_norm,
        n_sequences=len(dots_N),
        cross_fitted=batches_b is not None,
        trace=trace,
    )


def norm(weights: Weights) -> float:
    """Return the length of all parts together, summed in float64."""
    return math.sqrt(sum(part.square().sum(dtype=torch.float64).item() for part in weights.values()))


def _dots_and_trace(model: nn.Module, batches: Batches, direction: Weights) -> tuple[torch.Tensor, float]:
    """Return direction . g of each sequence and the mean of ||g||^2."""
    found: list[torch.Tensor] = []
    squares = 0.0
    for batch in _iterate(batches):
        sums_2B = torch.zeros(2, len(batch.inputs_BT), dtype=torch.float64, device=batch.inputs_BT.device)

        def visit(name: str, gradient: torch.Tensor, sums_2B: torch.Tensor = sums_2B) -> None:
            sums_2B[0] += inner(gradient, direction[name])
            sums_2B[1] += gradient.square_().flatten(1).sum(1, dtype=torch.float64)

        each_sequence(model, batch.inputs_BT, batch.targets_BT, visit, names=list(direction))
        found.append(sums_2B[0])
        squares += sums_2B[1].sum().item()
    _check_rows(len(found))
    dots_N = torch.cat(found).cpu()
    return dots_N, squares / len(dots_N)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _zeros(parameters: dict[str, nn.Parameter]) -> Weights:
    """Return accumulators of at least fp32."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        for name, p in parameters.items()
    }


def _check_rows(n_rows: int) -> None:
    if not n_rows:
        raise ConfigError("a Fisher pass got no rows", mend="ask for more rows, or a larger stage")


def _summed_gradient(
    model: nn.Module, batch: Batch, parameters: dict[str, nn.Parameter]
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradient of the sum of the sequences' losses."""
    loss_B = sequence_losses(model, batch.inputs_BT, batch.targets_BT)
    check_finite(loss_B)
    return torch.autograd.grad(loss_B.sum(), [*parameters.values()], allow_unused=True)


class _Line:
    """A model on the line theta + e u."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], direction: Weights) -> None:
        self.model, self.parameters = model, parameters
        self.length = norm(direction)
        self.direction = direction
        self.own = {name: p.detach().clone() for name, p in parameters.items()}

    def losses(self, batch: Batch, e: float) -> torch.Tensor:
        """Return the losses of the batch's sequences at e, float64 [B]."""
        for name, p in self.parameters.items():
            p.copy_(self.own[name]).add_(self.direction[name].to(p.dtype), alpha=e / self.length)
        return sequence_losses(self.model, batch.inputs_BT, batch.targets_BT)

    def derivatives(self, batch: Batch, e: float) -> torch.Tensor:
        """Return the central difference along u."""
        return (self.losses(batch, e) - self.losses(batch, -e)) / (2 * e)


@contextmanager
def _line(model: nn.Module, direction: Weights) -> Iterator[_Line]:
    """Give a line to move on; the weights come back bit for bit."""
    parameters = chosen_parameters(model, list(direction))
    with undisturbed(model), torch.no_grad():
        line = _Line(model, parameters, direction)
        try:
            yield line
        finally:
            for name, p in parameters.items():
                p.copy_(line.own[name])


def _directional(
    model: nn.Module, batches: Iterable[Batch], direction: Weights, step: float | None
) -> list[torch.Tensor]:
    """Return direction . g of each sequence from central differences, batch by batch."""
    found: list[torch.Tensor] = []
    with _line(model, direction) as line:
        for batch in batches:
            if not line.length:
                found.append(torch.zeros(len(batch.inputs_BT), dtype=torch.float64))
                continue
            if not found:
                step = _linear_step(line, batch, step)
            assert step is not None
            losses_B = line.derivatives(batch, step)
            check_finite(losses_B)
            found.append(losses_B * line.length)
    return found


def _linear_step(line: _Line, batch: Batch, step: float | None) -> float:
    """Return the given step if it is linear there, else a chosen one."""
    e = _typical_step(line, batch) if step is None else step
    while True:
        at_half = line.derivatives(batch, e / 2)
        at_full = line.derivatives(batch, e)
        off = ((at_full - at_half).norm() / at_half.norm().clamp(min=1e-30)).item()
        if off <= LINEARITY_TOLERANCE:
            return e
        if step is not None or (at_full.abs().mean() * e).item() < 4 * SMALLEST_CHANGE_NATS:
            raise LinearityError(
                f"losses are not linear along the direction: derivatives at step {e:.3g} and its half differ by"
                f" {off:.1%}, more than {LINEARITY_TOLERANCE:.0%}",
                mend="give a smaller step, or project with how=per_sequence",
            )
        e /= 4


def _typical_step(line: _Line, batch: Batch) -> float:
    """Return a step at which the batch's losses change by 1e-3 to 1e-2 nats on average."""
    low, high = LOSS_CHANGE_NATS
    scale = norm(line.own) or 1.0
    e = 1e-3 * scale
    for _ in range(12):
        change = (line.derivatives(batch, e).abs().mean() * e).item()
        if low <= change <= high:
            return e
        factor = math.sqrt(low * high) / change if change > 0 else 10.0  # NaN: far too large a step
        e = min(e * min(max(factor, 0.01), 10.0), 0.1 * scale)
    return e
