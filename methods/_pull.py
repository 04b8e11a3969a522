"""A pull towards an anchor by name: ``strength/2 sum_j importance_j (theta_j - anchor_j)^2``, added to gradients.

Every term is a coordinate's own, so it works on a shard of the parameters as on all of them. What is left to others:
the arithmetic (``_quadratic``), and where importance and anchor come from (``si``, ``mas``, ``l2_init``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from clbench.errors import ConfigError
from clbench.method import Context, Weights
from clbench.methods import _quadratic as quadratic

if TYPE_CHECKING:
    import torch


def copied(ctx: Context) -> Weights:
    """Return a copy of the trained parameters as they are now, where they are."""
    return {name: parameter.detach().clone() for name, parameter in ctx.parameters()}


def zeros(ctx: Context) -> Weights:
    """Return a zero for every trained coordinate, in fp32."""
    import torch

    return {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in ctx.parameters()}


def beside(weights: Weights, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor on its parameter's device; it moves there once (a resumed run's state is on the CPU)."""
    weights[name] = weights[name].to(parameter.device)
    return weights[name]


def pull(ctx: Context, anchor: Weights, strength: float, importance: Weights | None = None) -> None:
    """Add ``strength * importance * (theta - anchor)`` to the gradients of the parameters that have an anchor."""
    parameters, anchors, weights = _operands(ctx, anchor, importance)
    quadratic.pull(parameters, anchors, strength, weights)


def penalty(ctx: Context, anchor: Weights, strength: float, importance: Weights | None = None) -> float:
    """Return ``strength/2 sum_j importance_j (theta_j - anchor_j)^2`` in nats, over all shards."""
    parameters, anchors, weights = _operands(ctx, anchor, importance)
    if not parameters:
        return 0.0
    return strength / 2 * float(ctx.all_reduce(quadratic.quadratic(parameters, anchors, weights)))


def _operands(ctx: Context, anchor: Weights, importance: Weights | None) -> tuple[Any, Any, Any]:
    held = {name: p for name, p in ctx.parameters() if name in anchor}
    anchors = [beside(anchor, name, p) for name, p in held.items()]
    weights = None if importance is None else [beside(importance, name, p) for name, p in held.items()]
    return list(held.values()), anchors, weights


def packed(**parts: Weights) -> Weights:
    """Return several sets of weights as one, for ``state_dict``."""
    return {f"{part}/{name}": tensor for part, weights in parts.items() for name, tensor in weights.items()}


def unpacked(tensors: Weights, part: str) -> Weights:
    """Return a copy of one of the sets that were packed."""
    prefix = f"{part}/"
    return {key.removeprefix(prefix): tensor.clone() for key, tensor in tensors.items() if key.startswith(prefix)}


def check_number(method: str, option: str, value: float, *, above: float | None = None) -> None:
    """Raise ConfigError unless a number is finite and 0 or more, or above a bound."""
    if not (math.isfinite(value) and (value >= 0 if above is None else value > above)):
        mend = "give 0 or more" if above is None else f"give a number above {above:g}"
        raise ConfigError(f"{method}:{option}={value} is out of range", mend=mend)
