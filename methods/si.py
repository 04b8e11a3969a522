"""Synaptic Intelligence: hold weights by what they contributed on the way (Zenke et al. 2017, arXiv 1703.04200)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clbench.method import Context, Method, Need, Weights
from clbench.methods import _pull as pulls


class SI(Method):
    """Hold each weight by what its path took off the loss (Zenke et al. 2017, arXiv 1703.04200).

    Penalty ``strength/2 sum_j Omega_j (theta_j - anchor_j)^2``; the paper's c is strength / 2 (equation 4). Every step
    ``omega_j -= g_j (theta_after - theta_before)_j`` (equation 3) with g the gradient of the batch before clipping and
    the displacement as it was, whatever the optimizer; at a stage's end ``Omega_j += omega_j / (Delta_j^2 + xi)`` with
    Delta the displacement over the stage (equation 5). The anchor is the stage's start. g should be free of other
    penalties, and is what this component finds: put it before methods that edit gradients.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of SI."""

        strength: float = 1.0
        """lambda of lambda/2 times the quadratic."""
        xi: float = 1e-3
        """Damping: a weight that moved much less than its square root is held by omega / xi."""
        clamp: bool = True
        """Count a stage's path sum below 0 as 0; otherwise it keeps its sign and pushes the weight away."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        pulls.check_number("si", "strength", self.options.strength)
        pulls.check_number("si", "xi", self.options.xi, above=0)
        self.path: Weights = {}
        self.importance: Weights = {}
        self.anchor: Weights = {}
        self._before: dict[str, tuple[Any, Any]] = {}  # (weight, gradient), within one step

    def begin_stage(self, ctx: Context) -> None:
        """Take the anchor and begin a path."""
        self.anchor, self.path = pulls.copied(ctx), pulls.zeros(ctx)
        self.importance = self.importance or pulls.zeros(ctx)

    def edit_gradients(self, ctx: Context) -> None:
        """Keep the loss's gradient, then add the penalty's."""
        self._before = {
            name: (p.detach().clone(), p.grad.detach().clone()) for name, p in ctx.parameters() if p.grad is not None
        }
        pulls.pull(ctx, self.anchor, self.options.strength, self.importance)

    def after_step(self, ctx: Context) -> None:
        """Add the step to the path sums."""
        for name, p in ctx.parameters():
            if name in self._before:
                before, gradient = self._before[name]
                pulls.beside(self.path, name, p).sub_(gradient * (p.detach() - before))
        self._before = {}

    def end_stage(self, ctx: Context) -> None:
        """Turn the stage's path sums into importance, and note what they explain."""
        import torch

        ctx.note("penalty", pulls.penalty(ctx, self.anchor, self.options.strength, self.importance))
        figures = torch.zeros(4, dtype=torch.float64, device=ctx.device)
        for name, p in ctx.parameters():
            path = pulls.beside(self.path, name, p)
            square = (p.detach() - pulls.beside(self.anchor, name, p)).square()
            gained = (path.clamp(min=0) if self.options.clamp else path) / (square + self.options.xi)
            self.importance[name] = pulls.beside(self.importance, name, p) + gained
            parts = [path.double().sum(), path.clamp(max=0).double().sum(), square.double().sum()]
            figures += torch.stack([*parts, parts[0].new_tensor(float(p.numel()))])
        path_sum, below_0, squares, n = ctx.all_reduce(figures).tolist()
        ctx.note("path_sum", path_sum)
        ctx.note("path_sum_below_0", below_0)
        ctx.note("displacement_rms", (squares / n) ** 0.5)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return path sums, importance and anchor."""
        return pulls.packed(path=self.path, importance=self.importance, anchor=self.anchor), {}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        parts = (pulls.unpacked(tensors, part) for part in ("path", "importance", "anchor"))
        self.path, self.importance, self.anchor = parts
        self._before = {}
