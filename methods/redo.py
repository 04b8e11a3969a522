"""ReDo: recycle dormant units of feed-forward layers (Sokar et al. 2023, arXiv 2302.12902)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clbench.capacity.units import dormant
from clbench.method import Context, Method, Need, Weights
from clbench.methods import _averages as averages
from clbench.methods import _pull as pulls
from clbench.methods import _units


class Redo(Method):
    """Begin dormant units of feed-forward layers anew, every so many steps (Sokar et al. 2023, algorithm 1).

    Dormant is a unit with ``E|h_i| / mean_j E|h_j| <= tau`` (definition 3.1) over rows of the present stage; h is what
    goes into the layer's last matrix. Incoming weights are drawn again, outgoing ones and Adam's moments become zero.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of Redo."""

        tau: float = 0.025
        """A unit is dormant at so much of its layer's mean activity, or less; 0: only when it is never active."""
        steps: int = 20
        """Optimizer steps of a stage from one look to the next."""
        rows: int = 8
        """Sequences of the present stage in a look."""

    needs = frozenset({Need.CURRENT_DATA, Need.OPTIMIZER_MOMENTS})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        pulls.check_number("redo", "tau", self.options.tau)
        averages.check_range("redo", "steps", self.options.steps, 1)
        averages.check_range("redo", "rows", self.options.rows, 1)
        self.n_replaced = 0

    def after_step(self, ctx: Context) -> None:
        """Look, where that is due, and begin dormant units anew."""
        if (ctx.step + 1) % self.options.steps:
            return
        layers, moments = _units.find(ctx), ctx.optimizer_moments()
        n_dormant = n_units = 0
        sizes = _units.look(ctx, layers, rows=self.options.rows, seen=lambda _, h_NF: h_NF.abs().mean(0))
        for units, size_F in zip(layers, sizes, strict=True):
            dormant_R = dormant(size_F, self.options.tau)
            _units.replace(ctx, units, dormant_R, moments)
            n_dormant += len(dormant_R)
            n_units += len(size_F)
        self.n_replaced += n_dormant
        ctx.note("dormant_share", n_dormant / n_units)
        ctx.note("replaced_in_run", self.n_replaced)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return how many units were replaced."""
        return {}, {"n_replaced": self.n_replaced}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take it back."""
        self.n_replaced = values["n_replaced"]
