"""What the merging methods share: the weights they merge with, how far they moved, what they note and bill.

They act on the release alone: training goes on from its own weights, and no text is read. What is left to others: which
tensors are merged how (``spear_mm``, ``wise_ft``, ``dg_hard``, ``task_vector``), the arithmetic (``clbench.merge``).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Weights

FLOPS_PER_ELEMENT = 8.0
"""Of one elementwise kernel: two products and a sum, and for SLERP the three sums of its angle."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What every merging method has."""

    towards: Literal["base", "previous"] = "base"
    """base: the weights the run started from; previous: those that this stage began to train from."""


class Merging(Method):
    """Releases a merge of the stage's weights with older ones; options are MergeOptions and more."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        from_base = self.options.towards == "base"
        self.needs = frozenset({Need.STAGE_BOUNDARIES} | ({Need.BASE_WEIGHTS} if from_base else set()))
        self.origin: Weights = {}
        """The weights at the stage's start, where they are merged with."""

    @abstractmethod
    def merge(self, ctx: Context, tuned: Weights, base: Weights) -> Weights:
        """Return merged tensors; those that are left out stay tuned. Neither argument is changed."""

    def begin_stage(self, ctx: Context) -> None:
        """Keep the weights that the stage begins from, where they are merged with.

        Not in ``release``: that is called again after a resume, and on a decay branch, whose state is dropped.
        """
        from clbench.train.models import copy_weights, weights_of

        if self.options.towards == "previous":
            self.origin = copy_weights(weights_of(ctx.module))

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the merge, and note how far it is from both ends."""
        older = ctx.base_weights() if self.options.towards == "base" else self.origin
        base = matching(self, weights, older)
        merged = weights | self.merge(ctx, weights, base)
        ctx.bill("merge", flops=FLOPS_PER_ELEMENT * sum(tensor.numel() for tensor in weights.values()))
        trained = distance(weights, base)
        for name, other in (("moved_from_tuned", weights), ("distance_to_base", base)):
            ctx.note(name, distance(merged, other) / trained if trained else math.nan)
        return merged

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the weights at the stage's start."""
        return dict(self.origin), {}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.origin = {name: tensor.clone() for name, tensor in tensors.items()}


def matching(method: Method, weights: Weights, older: Weights) -> Weights:
    """Return older weights under the names, and on the device, of what is released.

    A run with adapters starts from matrices beside adapters that are zero, so the base is there without them.

    Raises:
        ConfigError: the names differ for another reason.
    """
    from clbench.methods import _adapters

    if weights.keys() != older.keys() and method.options.towards == "base":
        older = _adapters.merged(older, 0.0)
    factors = {name for name in weights if name.endswith((_adapters.A, _adapters.B))}  # no two models' factors mix
    if differing := sorted(factors or weights.keys() ^ older.keys()):
        raise ConfigError(
            f"method {method.name!r} cannot merge {differing[0]}, which is not in both plain models",
            mend=f"put it last, as -m lora -m {method.name}, and with adapters merge towards the base",
        )
    return {name: older[name].to(tensor.device) for name, tensor in weights.items()}


def distance(first: Weights, second: Weights) -> float:
    """Return the Euclidean distance of two models over all floating-point tensors."""
    squares = (
        float((tensor.double() - second[name].double()).square().sum())
        for name, tensor in first.items()
        if tensor.is_floating_point()
    )
    return math.sqrt(math.fsum(squares))


def restored(tuned: Weights, base: Weights, strengths: dict[str, float], interp: str) -> Weights:
    """Return the tensors with a strength above 0, moved so far towards the base: matrices by SLERP or LERP.

    Vectors always go straight: the angle of a norm's gains or of a bias means nothing.
    """
    from clbench.merge import kernels

    found: Weights = {}
    for name, s in strengths.items():
        if s > 0 and tuned[name].is_floating_point():
            kernel = kernels.slerp if interp == "slerp" and tuned[name].ndim >= 2 else kernels.lerp
            found[name] = kernel(tuned[name], base[name], s)
    return found
