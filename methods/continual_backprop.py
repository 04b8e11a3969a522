"""Continual backpropagation: steadily replace the least useful units (Dohare et al. 2024, arXiv 2306.13812)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Weights
from clbench.methods import _averages as averages
from clbench.methods import _pull as pulls
from clbench.methods import _units
from clbench.methods._units import Units
from clbench.methods._utility import Record

if TYPE_CHECKING:
    import torch


class ContinualBackprop(Method):
    """Replace the least useful mature units of feed-forward layers, a small share at every look (algorithm 1).

    Utility is a moving average of ``mean|w_out| mean|h|`` or of ``mean|w_out| mean|h - E h| / mean|w_in|``. Incoming
    weights are drawn again, outgoing ones and Adam's moments become zero; the mean contribution that is lost goes into
    the outgoing bias, where the model has one. The paper looks at every training batch; here a look is a pass of its
    own over rows of the present stage, every few steps, with the averages' decay to the power of the steps.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of ContinualBackprop."""

        rate: float = 1e-4
        """Share of the mature units of a layer that is replaced per optimizer step; what is less than one adds up."""
        maturity: int = 100
        """Optimizer steps for which a new unit is left alone."""
        decay: float = 0.99
        """Decay per optimizer step of the averages."""
        utility: str = "contribution"
        """contribution, or adaptable (divided by the incoming weights, and of what varies alone)."""
        correct: bool | None = None
        """Put what is lost into the outgoing bias; none: where there is one (Llama has none)."""
        steps: int = 10
        """Optimizer steps of a stage from one look to the next."""
        rows: int = 8
        """Sequences of the present stage in a look."""

    needs = frozenset({Need.CURRENT_DATA, Need.OPTIMIZER_MOMENTS})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check_options(self.options)
        self.records: dict[str, Record] = {}
        self.n_replaced = 0

    def after_step(self, ctx: Context) -> None:
        """Look, where that is due, and replace what has become due."""
        options = self.options
        if (ctx.step + 1) % options.steps:
            return
        layers, moments = _units.find(ctx), ctx.optimizer_moments()
        self._check_biases(layers)
        _units.look(ctx, layers, rows=options.rows, seen=self._update)
        for units in layers:
            record = self.records[units.name]
            which_R = record.due(share=options.rate * options.steps, maturity=options.maturity, decay=options.decay)
            if options.correct is not False and units.outgoing.bias is not None:
                # Before anything is forgotten: in the authors' code the running mean is already zero here.
                lost_D = record.expected(options.decay)[which_R] @ units.out_FD[which_R]
                units.outgoing.bias.detach().add_(lost_D)
            _units.replace(ctx, units, which_R, moments)
            record.forget(which_R)
            self.n_replaced += len(which_R)
        ctx.note("replaced_in_run", self.n_replaced)

    def _update(self, units: Units, h_NF: torch.Tensor) -> torch.Tensor:
        """Move the averages of one layer; returns the utility now."""
        if units.name not in self.records:
            self.records[units.name] = Record.empty(h_NF.shape[1])
        record = self.records[units.name]
        record.to(h_NF.device)
        new = 1 - self.options.decay**self.options.steps
        record.age_F += self.options.steps
        record.mean_F.lerp_(h_NF.mean(0), new)
        now_F = units.out_FD.abs().mean(1)
        if self.options.utility == "contribution":
            now_F = now_F * h_NF.abs().mean(0)
        else:
            in_F = sum(w.abs().mean(1) for w in units.in_FD) / len(units.in_FD)
            spread_F = (h_NF - record.expected(self.options.decay)).abs().mean(0)
            now_F = now_F * spread_F / (in_F + 1e-8)
        record.utility_F.lerp_(now_F, new)
        return now_F

    def _check_biases(self, layers: list[Units]) -> None:
        missing = [units.name for units in layers if units.outgoing.bias is None]
        if self.options.correct and missing:
            raise ConfigError(
                f"continual-backprop:correct=true, but {missing[0]} has no bias", mend="leave correct out, or false"
            )

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the averages and ages of all units, and how many were replaced."""
        records = {name: record.tensors() for name, record in self.records.items()}
        return pulls.packed(**records), {"n_replaced": self.n_replaced}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        names = sorted({key.rpartition("/")[0] for key in tensors})
        self.records = {name: Record(**pulls.unpacked(tensors, name)) for name in names}
        self.n_replaced = values["n_replaced"]


def check_options(options: Any) -> None:
    """Raise ConfigError for numbers out of range."""
    name = "continual-backprop"
    averages.check_range(name, "rate", options.rate, 0, 1)
    averages.check_range(name, "maturity", options.maturity, 0)
    averages.check_range(name, "steps", options.steps, 1)
    averages.check_range(name, "rows", options.rows, 1)
    averages.check_choice(name, "utility", options.utility, ("contribution", "adaptable"))
    if not 0 <= options.decay < 1:
        raise ConfigError(f"{name}:decay={options.decay} is out of range", mend="give a number from 0 to below 1")
