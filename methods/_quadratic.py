"""What quadratic penalties share: which parameters, exact dots, closed-form gradients and proximal steps.

A penalty is ``lambda/2`` times a quadratic form of the weights: of rank one per past stage (``Directions``), or
diagonal (``pull`` and ``shrink_to``). Everything is local to the shards of the parameters that this process holds, but
for the dots, which go through one all-reduce. What it leaves to others: where the form comes from (``_rank_one``,
``_fisher_rows``).

Shapes: P parameters in one flat vector, K past stages, L blocks of parameters with a term of their own (one for all
as a rule), N sequences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

from clbench.errors import ConfigError
from clbench.method import Context, Weights

PARAMS = ("all", "no_embed", "no_norms", "matrices")
"""Which parameters a penalty holds: all; none of embeddings and output head; none with fewer than two dimensions
(norms, biases); neither."""
APPLY = ("coupled", "prox")
"""How it acts: its gradient is added to the loss's before clipping, or a proximal step follows the optimizer's."""
CHUNK_ELEMENTS_CPU = 2**17
CHUNK_ELEMENTS_ELSEWHERE = 2**24
"""Elements that are in double precision at a time."""

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a small float64 tensor over the processes that share the parameters."""


def selected(ctx: Context, params: str) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters that a penalty holds, by name, in the model's order; see ``PARAMS``.

    Raises:
        ConfigError: none is left.
    """
    if params == "all":
        return dict(ctx.parameters())
    module = ctx.module
    n_dimensions = {name: p.ndim for name, p in module.named_parameters()}
    embedding = _embeddings(module) if params != "no_norms" else set()
    found = {
        name: p
        for name, p in ctx.parameters()
        if name not in embedding and (params == "no_embed" or n_dimensions[name] >= 2)
    }
    if not found:
        raise ConfigError(f"params={params} leaves nothing to hold", mend="give params=all")
    return found


def _embeddings(module: torch.nn.Module) -> set[str]:
    """Return the names of embeddings and of the output head (tied to them or not)."""
    tables = [m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    tables += [p for p in head.parameters()] if head is not None else []
    return {name for name, p in module.named_parameters() if any(p is table for table in tables)}


def block_of(name: str) -> str:
    """Return the block of a parameter: its layer (``model.layers.3``), or the module it is in where there is none."""
    layer = re.match(r"(.*?\.\d+)\.", name)
    return layer[1] if layer else name.rpartition(".")[0] or name


@dataclass(frozen=True)
class Layout:
    """Where the parameters stand in a flat vector: block by block."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    blocks: tuple[str, ...]
    """Block of every name; names of one block stand together."""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], *, per_layer: bool = False) -> Layout:
        """Return the layout of tensors: one block, or one for every layer."""
        block = {name: block_of(name) if per_layer else "all" for name in tensors}
        place = {b: i for i, b in enumerate(dict.fromkeys(block.values()))}
        names = sorted(tensors, key=lambda name: place[block[name]])  # stable
        return cls(tuple(names), tuple(tensors[n].shape for n in names), tuple(block[n] for n in names))

    @cached_property
    def block_names(self) -> tuple[str, ...]:
        """The blocks in order."""
        return tuple(dict.fromkeys(self.blocks))

    @cached_property
    def groups(self) -> list[slice]:
        """Places of each block among the names."""
        ends = accumulate(self.blocks.count(block) for block in self.block_names)
        return [slice(*pair) for pair in pairwise([0, *ends])]

    @cached_property
    def parts(self) -> list[slice]:
        """Places of each block in the flat vector."""
        ends = [0, *accumulate(shape.numel() for shape in self.shapes)]
        return [slice(ends[group.start], ends[group.stop]) for group in self.groups]

    @cached_property
    def slices(self) -> list[slice]:
        """Place of each name in the flat vector."""
        return [slice(*pair) for pair in pairwise([0, *accumulate(shape.numel() for shape in self.shapes)])]

    def flat(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return tensors as one new vector."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return a vector as one tensor for every name, without copying."""
        return [flat[place].view(shape) for place, shape in zip(self.slices, self.shapes, strict=True)]

    def named(self, flat: torch.Tensor) -> Weights:
        """Return a vector as tensors by name, without copying."""
        return dict(zip(self.names, self.views(flat), strict=True))


def dots(vectors: Sequence[torch.Tensor], other: torch.Tensor, parts: Sequence[slice]) -> torch.Tensor:
    """Return the dot of each vector with ``other`` in every part, float64 ``[K, L]``, of this process's shard.

    In double precision, products included: u . theta - b is the difference of two numbers about 1e4 times as large
    early in a stage, where single precision leaves nothing of it.
    """
    size = CHUNK_ELEMENTS_CPU if other.device.type == "cpu" else CHUNK_ELEMENTS_ELSEWHERE
    sums = torch.zeros(len(vectors), len(parts), dtype=torch.float64, device=other.device)
    # Two buffers for all chunks: new memory for each would cost more than the products.
    lefts, rights = torch.empty(2, min(size, len(other)), dtype=torch.float64, device=other.device)
    for i_part, part in enumerate(parts):
        for first in range(part.start, part.stop, size):
            chunk = slice(first, min(first + size, part.stop))
            left, right = lefts[: chunk.stop - first], rights[: chunk.stop - first].copy_(other[chunk])
            for k, vector in enumerate(vectors):
                sums[k, i_part] += torch.dot(left.copy_(vector[chunk]), right)
    return sums


@dataclass
class Directions:
    """The form ``sum_kl rho_kl (u_kl . theta_l - b_kl)^2``: one vector and two numbers for each stage and block.

    The vectors may be rounded (bf16) and of any length; ``rho`` and ``b`` are those of the vector as it is stored.
    """

    layout: Layout
    vectors: list[torch.Tensor] = field(default_factory=list)
    rho_KL: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    b_KL: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    gram_LKK: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.float64))

    def __post_init__(self) -> None:
        """Cut the vectors into views, once; a step would spend as much on cutting as on adding."""
        self._views = [self.layout.views(vector) for vector in self.vectors]
        self.largest_rho = self.rho_KL.max().item() if self.vectors else 0.0

    def with_term(self, vector: torch.Tensor, rho_L: torch.Tensor, theta: torch.Tensor, reduce: Reduce) -> Directions:
        """Return these and one more term, whose minimum is at ``theta``."""
        vectors, k = [*self.vectors, vector], len(self.vectors)
        found = reduce(torch.cat([dots([vector], theta, self.layout.parts), dots(vectors, vector, self.layout.parts)]))
        gram_LKK = found.new_zeros(len(self.layout.parts), k + 1, k + 1)
        gram_LKK[:, :k, :k] = self.gram_LKK.to(found.device) if k else 0
        gram_LKK[:, k, :] = gram_LKK[:, :, k] = found[1:].T
        rho_KL = torch.cat([self.rho_KL.to(found.device).view(k, -1), rho_L.to(found)[None]]) if k else rho_L[None]
        b_KL = torch.cat([self.b_KL.to(found.device), found[:1]]) if k else found[:1]
        return Directions(self.layout, vectors, rho_KL.to(found), b_KL, gram_LKK)

    def packed(self, stages: Sequence[int]) -> Weights:
        """Return everything as tensors by stage and name, for ``state_dict``."""
        tensors: Weights = {}
        for k, (stage, vector) in enumerate(zip(stages, self.vectors, strict=True)):
            tensors |= {f"{stage}/{name}": view for name, view in self.layout.named(vector).items()}
            tensors |= {f"rho/{stage}": self.rho_KL[k].clone(), f"b/{stage}": self.b_KL[k].clone()}
        return tensors | ({"gram": self.gram_LKK} if self.vectors else {})

    @classmethod
    def unpacked(cls, layout: Layout, tensors: Weights, stages: Sequence[int], device: torch.device) -> Directions:
        """Return what ``packed`` packed; nothing without stages."""
        if not stages:
            return cls(layout)
        vectors = [layout.flat({n: tensors[f"{stage}/{n}"] for n in layout.names}).to(device) for stage in stages]
        rho_KL, b_KL = (torch.stack([tensors[f"{key}/{stage}"] for stage in stages]).to(device) for key in ("rho", "b"))
        return cls(layout, vectors, rho_KL, b_KL, tensors["gram"].to(device))

    def residuals(self, parameters: Mapping[str, torch.Tensor], reduce: Reduce) -> torch.Tensor:
        """Return s = u . theta - b, float64 ``[K, L]``: one all-reduce."""
        return reduce(dots(self.vectors, self.layout.flat(parameters), self.layout.parts)) - self.b_KL

    def value(self, s_KL: torch.Tensor, strength: float) -> torch.Tensor:
        """Return the penalty ``strength/2 sum rho s^2``."""
        return strength / 2 * (self.rho_KL * s_KL.square()).sum()

    def coupled(self, s_KL: torch.Tensor, strength: float) -> torch.Tensor:
        """Return the coefficients of the vectors in the penalty's gradient, ``strength rho s``."""
        return strength * self.rho_KL * s_KL

    def proximal(self, s_KL: torch.Tensor, strength: float) -> torch.Tensor:
        """Return the coefficients of the vectors in the step from theta to the proximal point, with sign.

        ``argmin_x ||x - theta||^2/2 + strength/2 sum_k rho_k (u_k . x - b_k)^2``: by Woodbury
        ``x = theta - U^T D (I + D G D)^-1 D s`` with ``D = diag(sqrt(strength rho))`` and the Gram matrix
        ``G = U U^T``. The K x K matrix has eigenvalues of at least 1, so no strength makes it unstable.
        """
        root_LK = (strength * self.rho_KL).sqrt().T
        system_LKK = root_LK[:, :, None] * self.gram_LKK * root_LK[:, None, :]
        system_LKK.diagonal(dim1=1, dim2=2).add_(1.0)
        factor_LKK, _ = torch.linalg.cholesky_ex(system_LKK)
        solved_LK = torch.cholesky_solve((root_LK * s_KL.T)[..., None], factor_LKK)[..., 0]
        return -(root_LK * solved_LK).T

    def add_to(self, targets: Sequence[torch.Tensor | None], coefficients_KL: torch.Tensor) -> None:
        """Add ``sum_k c_k u_k`` to one tensor for every name, in place; those that are None are left out."""
        if coefficients_KL.device.type == "cpu":
            for views, c_L in zip(self._views, coefficients_KL.tolist(), strict=True):
                for group, c in zip(self.layout.groups, c_L, strict=True):
                    _axpy(targets[group], views[group], c)
            return
        # Reading the numbers would make the step wait for the accelerator.
        _axpy(targets, self.layout.views(self.combined(coefficients_KL)), 1.0)

    def combined(self, coefficients_KL: torch.Tensor) -> torch.Tensor:
        """Return ``sum_k c_k u_k``, flat, without reading a number."""
        first = self.vectors[0]
        total = first.new_zeros(first.numel(), dtype=torch.promote_types(first.dtype, torch.float32))
        for vector, c_L in zip(self.vectors, coefficients_KL.to(total).unbind(), strict=True):
            for part, c in zip(self.layout.parts, c_L.unbind(), strict=True):
                total[part].addcmul_(vector[part].to(total), c)
        return total


def _axpy(targets: Sequence[torch.Tensor | None], vectors: Sequence[torch.Tensor], c: float) -> None:
    pairs = [(target, vector) for target, vector in zip(targets, vectors, strict=True) if target is not None]
    if pairs:
        torch._foreach_add_([target for target, _ in pairs], [vector for _, vector in pairs], alpha=c)


def pull(
    parameters: Sequence[torch.nn.Parameter],
    anchors: Sequence[torch.Tensor],
    strength: float,
    weights: Sequence[torch.Tensor] | None = None,
) -> None:
    """Add the gradient of ``strength/2 sum_j F_j (theta_j - a_j)^2`` to ``.grad``; F is 1 without ``weights``."""
    held = [i for i, p in enumerate(parameters) if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not held:
        return
    away = torch._foreach_sub([parameters[i].detach() for i in held], [anchors[i] for i in held])
    if weights is None:
        torch._foreach_add_(gradients, away, alpha=strength)
    else:
        torch._foreach_addcmul_(gradients, away, [weights[i] for i in held], value=strength)


def shrink_to(
    parameters: Sequence[torch.Tensor],
    anchors: Sequence[torch.Tensor],
    strength: float,
    weights: Sequence[torch.Tensor] | None = None,
) -> None:
    """Take the proximal step of the same in place: ``theta <- (theta + kappa a)/(1 + kappa)``, ``kappa = strength F``.

    ``strength`` has the learning rate in it. As ``theta + kappa/(1 + kappa) (a - theta)``, stable for any kappa.
    """
    values = [p.detach() for p in parameters]
    if weights is None:
        torch._foreach_lerp_(values, list(anchors), strength / (1 + strength))
        return
    share = torch._foreach_mul(list(weights), strength)
    below = torch._foreach_add(share, 1.0)
    torch._foreach_div_(share, below)
    torch._foreach_lerp_(values, list(anchors), share)


def quadratic(
    parameters: Iterable[torch.Tensor], anchors: Iterable[torch.Tensor], weights: Iterable[torch.Tensor] | None = None
) -> torch.Tensor:
    """Return ``sum_j F_j (theta_j - a_j)^2`` of this process's shard, float64 ``[1]``."""
    away = [(p.detach() - a).double().square() for p, a in zip(parameters, anchors, strict=True)]
    terms = away if weights is None else [d * f.double() for d, f in zip(away, weights, strict=True)]
    return torch.stack([term.sum() for term in terms]).sum()[None]


def total(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of all elements of this process's shard, float64 ``[1]``."""
    return torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors]).sum()[None]


def placed(tensors: Weights, parameters: Mapping[str, torch.Tensor]) -> Weights:
    """Return state tensors in the parameters' order on their device; without copying where they are there already."""
    return {name: tensors[name].to(p.device) for name, p in parameters.items()} if tensors else {}


def check(method: str, options: Any, **words: Sequence[str]) -> None:
    """Raise ConfigError unless the options that these methods share, and those with given ``words``, can be used."""
    if not (math.isfinite(options.strength) and options.strength >= 0):
        raise ConfigError(f"{method}:strength={options.strength} is no strength", mend="give a number of at least 0")
    for name, choices in ({"params": PARAMS, "apply": APPLY} | words).items():
        if getattr(options, name) not in choices:
            raise ConfigError(f"{method}:{name}={getattr(options, name)} is unknown", mend=f"give {', '.join(choices)}")
    for name in ("rows", "rows_per_batch"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{method}:{name}={getattr(options, name)}", mend="give at least 1")
