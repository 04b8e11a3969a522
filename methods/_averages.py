"""What the averaging methods share: means of the trained weights, their loss, and putting one in place.

Every method that uses it copies weights in ``after_step`` or ``end_stage`` and never in ``release``, which is called
again after a resume and inside a decay branch. An average holds the trained parameters only; the rest of a model
(frozen parameters, buffers) is that of the released weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

from clbench.errors import ConfigError
from clbench.method import Context, Method, Weights


def moved(average: Weights, ctx: Context, share: float) -> Weights:
    """Return ``average + share (weights - average)`` with the weights as they are now; ``average`` is overwritten.

    With share 1 it is a copy of the weights, whatever ``average`` is; with share 1/n at the n-th call their mean.
    """
    import torch

    live = {name: parameter.detach() for name, parameter in ctx.parameters()}
    if share >= 1:
        return {name: tensor.float().clone() for name, tensor in live.items()}
    old = [average[name].to(tensor.device) for name, tensor in live.items()]
    # Equal types are not copied by float(); narrow weights are averaged in fp32.
    torch._foreach_lerp_(old, [tensor.float() for tensor in live.values()], share)
    return dict(zip(live, old, strict=True))


def mean_of(ingredients: Sequence[Weights], shares: Sequence[float] | None = None) -> Weights:
    """Return the weighted mean, summed in float64, in the type of the first; equal shares by default.

    One ingredient comes back as it is, to the bit.
    """
    given = [1 / len(ingredients)] * len(ingredients) if shares is None else shares
    total = math.fsum(given)
    mean: Weights = {}
    for name, first in ingredients[0].items():
        terms = [one[name].double() * (share / total) for one, share in zip(ingredients, given, strict=True)]
        mean[name] = reduce(add, terms).to(first.dtype)
    return mean


def snapshot(ctx: Context) -> Weights:
    """Return a copy of the trained weights in the computer's memory."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in ctx.parameters()}


def put(ctx: Context, average: Weights) -> None:
    """Let training go on from an average."""
    for name, parameter in ctx.parameters():
        parameter.detach().copy_(average[name])


def replaced(method: Method, weights: Weights, average: Weights) -> Weights:
    """Return released weights with an average (a copy of it) in the place of what was trained.

    Raises:
        ConfigError: a component before has already merged the adapters that were averaged.
    """
    if missing := sorted(average.keys() - weights.keys()):
        raise ConfigError(
            f"method {method.name!r} averages {missing[0]}, which the released model no longer has",
            mend=f"put it before the method with adapters: -m {method.name} -m lora",
        )
    return weights | {name: tensor.to(weights[name], copy=True) for name, tensor in average.items()}


def control_loss(ctx: Context, average: Weights, *, stages: str, n_rows: int) -> float:
    """Return the mean over stages of the loss of an average on kept-back rows, nats per token (CONTROL_DATA).

    ``stages`` is ``seen`` (the base's stage 0 up to this one, each counts the same) or ``current``.
    """
    from clbench.train.models import weights_of

    measured = [ctx.stage.index] if stages == "current" else list(range(ctx.stage.index + 1))
    whole = weights_of(ctx.module) | average
    return math.fsum(ctx.control_loss(measured, n_rows=n_rows, weights=whole).values()) / len(measured)


def check_choice(method: str, option: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError unless an option is one of the words it may be."""
    if value not in choices:
        raise ConfigError(f"{method}:{option}={value} is unknown", mend=f"give {' or '.join(choices)}")


def check_range(method: str, option: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless an option is None, or finite and within bounds."""
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        mend = f"give {low} or more" if high == math.inf else f"give a number from {low} to {high}"
        raise ConfigError(f"{method}:{option}={value} is out of range", mend=mend)


def check_rows(method: str, n_rows: int) -> None:
    """Raise ConfigError unless so many control rows can be asked for."""
    from clbench.train.data import CONTROL_ROWS

    check_range(method, "rows", n_rows, 1, CONTROL_ROWS)


def drop_oldest(shelf: dict[int, Weights], n_kept: int | None) -> None:
    """Leave the newest ingredients on a shelf, and the base, which stands under 0."""
    newest_first = sorted((key for key in shelf if key), reverse=True)
    for key in newest_first[n_kept:] if n_kept else []:
        del shelf[key]


def packed(mean: Weights, shelf: dict[int, Weights]) -> Weights:
    """Return a mean and its ingredients as one set of tensors, for ``state_dict``."""
    parts = {"mean": mean} | {str(key): weights for key, weights in shelf.items()}
    return {f"{part}/{name}": tensor for part, weights in parts.items() for name, tensor in weights.items()}


def unpacked(tensors: Weights) -> tuple[Weights, dict[int, Weights]]:
    """Return a copy of what ``packed`` packed."""
    parts: dict[str, Weights] = {"mean": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor.clone()
    mean = parts.pop("mean")
    return mean, {int(part): weights for part, weights in parts.items()}
