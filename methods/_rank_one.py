"""Estimate the rank-one term of a stage: a direction, and rho, the Fisher's eigenvalue along it.

``F ~ c* mu mu^T = rho u u^T`` with ``u = mu/||mu||`` and ``rho = E[(u.g)^2] = c* ||mu||^2`` (Rank-1 Fisher EWC, eq. 6).
Rounding comes first: rho is measured along the vector as it is stored.

Shapes: P parameters in one flat vector, L blocks with a term of their own, N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from clbench.errors import ConfigError
from clbench.fisher.estimate import mean_gradient, projections, projections_of_batches
from clbench.fisher.gradients import each_sequence
from clbench.method import Batch, Context
from clbench.methods._fisher_rows import bill, halves
from clbench.methods._quadratic import Layout, dots

MAX_GRADIENT_BYTES = 4 * 2**30
"""Most memory for the gradients that the top eigenvector is computed from."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """What is stored, and figures that explain it. Numbers a block are float64 ``[L]``."""

    vector: torch.Tensor
    """Direction of nearly unit length, flat, in the type in which it is stored."""
    rho_L: torch.Tensor
    """Such that ``rho (vector . theta - b)^2`` is the term, whatever the vector's length."""
    moment_L: torch.Tensor
    """E[(u.g)^2] along the direction that was measured, u of length 1."""
    mean_norm_L: torch.Tensor
    """||mu||."""
    split_half: float | None
    """Cosine of the mean gradients of the two halves, where it was to be had for nothing."""

    @property
    def c_star_L(self) -> torch.Tensor:
        """c* of every block; only of meaning along the mean."""
        return self.moment_L / self.mean_norm_L.square()


@dataclass(frozen=True)
class _Seen:
    """What a pass along a direction found."""

    moment_L: torch.Tensor
    trace_L: torch.Tensor | None = None
    mean: torch.Tensor | None = None


def estimate(ctx: Context, stage: int, layout: Layout, batches: Sequence[Batch], options: Any) -> Term:
    """Return the term of rows of one stage at the present weights; see ``rank1_ewc.Rank1Ewc.Options``.

    Raises:
        ConfigError: too few rows, or too many for ``direction=top``.
    """
    first, second = halves(batches) if options.cross_fit else (list(batches), list(batches))
    norm_L, measured = _direction(ctx, layout, first, top=options.direction == "top")
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    measured = measured.to(dtype)
    length_L = _squared(ctx, layout, measured).sqrt()
    seen = _along(ctx, layout, measured, second, options)
    moment_L = seen.moment_L / _or_one(length_L.square())
    if options.scale == "one":
        rho_L = norm_L.square()
    elif options.scale == "trace":
        assert seen.trace_L is not None
        rho_L = ctx.all_reduce(seen.trace_L)
    else:
        rho_L = moment_L
    vector = measured
    if options.direction in ("random", "weights"):
        vector = _control(ctx, stage, layout, options.direction).to(dtype)
        length_L = _squared(ctx, layout, vector).sqrt()
    return Term(
        vector=vector,
        rho_L=rho_L / _or_one(length_L.square()),
        moment_L=moment_L,
        mean_norm_L=norm_L,
        split_half=_split_half(ctx, measured, seen.mean) if options.split_half else None,
    )


def _split_half(ctx: Context, one: torch.Tensor, other: torch.Tensor | None) -> float | None:
    """Return the cosine of the halves' mean gradients."""
    return None if other is None else _cosine(ctx, one, other)


def _cosine(ctx: Context, one: torch.Tensor, other: torch.Tensor) -> float:
    whole = [slice(0, len(one))]
    found = ctx.all_reduce(torch.cat([dots([one, other], other, whole), dots([one], one, whole)]))[:, 0].tolist()
    scale = math.sqrt(found[1] * found[2])
    return found[0] / scale if scale else 0.0


def _or_one(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))


def _squared(ctx: Context, layout: Layout, flat: torch.Tensor) -> torch.Tensor:
    """Return the squared length of each block, float64 ``[L]``."""
    return ctx.all_reduce(torch.cat([dots([flat[p]], flat[p], [slice(0, p.stop - p.start)])[0] for p in layout.parts]))


def _unit(ctx: Context, layout: Layout, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (lengths ``[L]``, vector whose blocks have length 1); a block of zeros stays one."""
    norm_L = _squared(ctx, layout, flat).sqrt()
    for part, norm in zip(layout.parts, _or_one(norm_L).tolist(), strict=True):
        flat[part] /= norm
    return norm_L, flat


def _direction(ctx: Context, layout: Layout, batches: list[Batch], *, top: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (||mu|| ``[L]``, unit direction): along the mean gradient, or the top eigenvector of E[g g^T]."""
    if top:
        gradients_NP = _gradients(ctx, layout, batches)
        mean = gradients_NP.mean(0)
    else:
        mean = layout.flat(mean_gradient(ctx.module, batches, names=list(layout.names))[0])
    bill(ctx, batches, forwards=3)
    norm_L, mean = _unit(ctx, layout, mean)
    if not top:
        return norm_L, mean
    found = torch.zeros_like(mean)
    for part in layout.parts:
        block_NQ = gradients_NP[:, part]
        gram_NN = torch.zeros(len(block_NQ), len(block_NQ), dtype=torch.float64, device=ctx.device)
        for chunk in torch.split(block_NQ, 2**16, dim=1):
            gram_NN += chunk.double() @ chunk.double().T
        weights_N = torch.linalg.eigh(ctx.all_reduce(gram_NN))[1][:, -1]
        vector = weights_N.to(block_NQ) @ block_NQ
        found[part] = vector * (1.0 if (vector @ mean[part]).item() >= 0 else -1.0)  # its sign is nobody's choice
    return norm_L, _unit(ctx, layout, found)[1]


def _gradients(ctx: Context, layout: Layout, batches: list[Batch]) -> torch.Tensor:
    """Return the gradients of all sequences, ``[N, P]``."""
    n, p = sum(len(batch.inputs_BT) for batch in batches), layout.parts[-1].stop
    if n * p * 4 > MAX_GRADIENT_BYTES:
        raise ConfigError(
            f"direction=top would keep {n} gradients of {p} parameters in memory",
            mend=f"give rows={max(2, MAX_GRADIENT_BYTES // (4 * p))} or less, or direction=mean",
        )
    gradients_NP = torch.zeros(n, p, device=ctx.device)
    place = dict(zip(layout.names, layout.slices, strict=True))
    done = 0
    for batch in batches:
        rows = slice(done, done + len(batch.inputs_BT))

        def visit(name: str, gradient: torch.Tensor, rows: slice = rows) -> None:
            gradients_NP[rows, place[name]] = gradient.flatten(1).float()

        each_sequence(ctx.module, batch.inputs_BT, batch.targets_BT, visit, names=list(layout.names))
        done = rows.stop
    return gradients_NP


def _along(ctx: Context, layout: Layout, vector: torch.Tensor, batches: list[Batch], options: Any) -> _Seen:
    """Return E[(v.g)^2] of every block, by one of three estimates that agree."""
    parts = layout.parts
    if options.estimate == "per_sequence" and (len(parts) > 1 or options.scale == "trace" or options.split_half):
        bill(ctx, batches, forwards=3)
        return _by_gradients(ctx, layout, vector, batches)
    moments = []
    for group, part in zip(layout.groups, parts, strict=True):
        views = layout.views(vector.float())[group]
        direction = dict(zip(layout.names[group], views, strict=True))
        if not bool(vector[part].any()):
            moments.append(0.0)
            continue
        if options.estimate == "micro_batch":
            moments.append(_of_micro_batches(*projections_of_batches(ctx.module, batches, direction)))
            bill(ctx, batches, forwards=3)
            continue
        if options.estimate == "directional":
            with _counted(ctx.module) as calls:
                q_N = projections(ctx.module, batches, direction, how="directional")
            bill(ctx, batches, forwards=1, passes=2)
            bill(ctx, batches[:1], forwards=1, passes=len(calls) - 2 * len(batches))  # to find the step
        else:
            q_N = projections(ctx.module, batches, direction)
            bill(ctx, batches, forwards=3)
        moments.append(q_N.square().mean().item())
    return _Seen(torch.tensor(moments, dtype=torch.float64, device=ctx.device))


@contextmanager
def _counted(module: torch.nn.Module) -> Iterator[list[None]]:
    """Give a list that grows by one with every forward pass."""
    calls: list[None] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def _of_micro_batches(means_M: torch.Tensor, n_rows: int) -> float:
    """Return E[(u.g)^2] from ``m = u . (mean gradient of b rows)``: ``E[m^2] + (b - 1) Var[m]``, without bias.

    That is the identity c* = 1 + b (c*_b - 1) with ``E[u.g]^2`` taken from the same micro-batches.
    """
    if len(means_M) < 2:
        raise ConfigError("one micro-batch of rows shows no spread", mend="give more rows or a smaller rows_per_batch")
    return (means_M.square().mean() + (n_rows - 1) * means_M.var()).item()


def _by_gradients(ctx: Context, layout: Layout, vector: torch.Tensor, batches: list[Batch]) -> _Seen:
    """Return the moment, the trace and the mean gradient from one pass that makes every sequence's gradient."""
    direction = layout.named(vector.float())
    block = {name: layout.block_names.index(b) for name, b in zip(layout.names, layout.blocks, strict=True)}
    sums = {name: torch.zeros_like(u) for name, u in direction.items()}
    trace_L = torch.zeros(len(layout.parts), dtype=torch.float64, device=ctx.device)
    squares_L, n = torch.zeros_like(trace_L), 0
    for batch in batches:
        q_LB = trace_L.new_zeros(len(trace_L), len(batch.inputs_BT))

        def visit(name: str, gradient: torch.Tensor, q_LB: torch.Tensor = q_LB) -> None:
            for i, row in enumerate(gradient.flatten(1)):
                u = direction[name].flatten()
                q_LB[block[name], i] += torch.dot(row.float(), u).double()
                trace_L[block[name]] += torch.dot(row, row).double()
            sums[name] += gradient.sum(0)

        each_sequence(ctx.module, batch.inputs_BT, batch.targets_BT, visit, names=list(direction))
        squares_L += q_LB.square().sum(1)
        n += len(batch.inputs_BT)
    return _Seen(squares_L / n, trace_L / n, layout.flat(sums) / n)


def _control(ctx: Context, stage: int, layout: Layout, direction: str) -> torch.Tensor:
    """Return a unit vector that has nothing to do with the gradients: random, or along the weights themselves."""
    parameters = dict(ctx.parameters())
    if direction == "weights":
        return _unit(ctx, layout, layout.flat(parameters))[1]
    drawn = {}
    for name in layout.names:
        generator = torch.Generator().manual_seed(ctx.seed("direction", stage, name))
        drawn[name] = torch.randn(parameters[name].shape, generator=generator).to(ctx.device)
    return _unit(ctx, layout, layout.flat(drawn))[1]


def cosine(ctx: Context, layout: Layout, held: Mapping[str, torch.Tensor], vector: torch.Tensor) -> float:
    """Return the cosine of a vector with the weights: -1 or 1 means that it only measures their norm."""
    return _cosine(ctx, vector, layout.flat(held))
