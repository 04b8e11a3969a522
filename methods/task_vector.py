"""Task vectors made sparse: release the base plus a part of the entries of training's change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clbench.method import Context, Weights
from clbench.methods import _merging as merging
from clbench.methods._averages import check_range

PRESETS = {"trim": 0.2, "dare": 0.1, "breadcrumbs": 0.85}


class TaskVector(merging.Merging):
    """Release ``W0 + scale * sparse(W1 - W0)``, tensor by tensor, with one of three ways to choose entries.

    trim keeps the largest ones: all that is left of TIES (arXiv 2306.01708) with one model, as its election of signs
    has nobody to outvote. dare keeps random ones and divides by the density, so its mean is W1 (arXiv 2311.03099).
    breadcrumbs also drops the share gamma that is largest (arXiv 2312.06795), which trim would keep first.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(merging.MergeOptions):
        """Options of TaskVector."""

        kind: Literal["trim", "dare", "breadcrumbs"] = "trim"
        """Which entries are kept: the largest, random ones, or all but the largest and the smallest."""
        density: float | None = None
        """Share of the entries that is kept; none: the paper's, 0.2 (trim), 0.1 (dare), 0.85 (breadcrumbs)."""
        scale: float = 1.0
        """Factor of what is kept."""
        gamma: float = 0.01
        """breadcrumbs: share of the entries that is dropped as too large."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check_range("task_vector", "density", self.options.density, 0, 1)
        check_range("task_vector", "scale", self.options.scale, 0)
        check_range("task_vector", "gamma", self.options.gamma, 0, 1)

    def merge(self, ctx: Context, tuned: Weights, base: Weights) -> Weights:
        """Return all weights with their changes made sparse."""
        import torch

        from clbench.merge import kernels

        options = self.options
        density = PRESETS[options.kind] if options.density is None else options.density

        def sparse(name: str, w1: torch.Tensor, w0: torch.Tensor) -> torch.Tensor:
            if options.kind == "dare":
                return kernels.dare(w1, w0, density=density, seed=ctx.seed("dare", name))
            if options.kind == "breadcrumbs":
                return kernels.breadcrumbs(w1, w0, density=density, gamma=options.gamma)
            return kernels.ties(w1, w0, density=density)

        found = {name: sparse(name, w, base[name]) for name, w in tuned.items() if w.is_floating_point()}
        if options.scale != 1:
            weights = [options.scale]
            found = {name: kernels.task_arithmetic(w, base[name], weights=weights) for name, w in found.items()}
        return found
