"""Dormant units of feed-forward layers by four named rules, counted while a model runs.

A unit is one entry of what goes into a feed-forward layer's last matrix: ``act(gate(x)) * up(x)`` of a gated layer.

dead            sum |h_i| = 0 over the samples (Dohare et al. 2024, permuted MNIST)
dormant_1pct    h_i != 0 on less than 1 % of the samples (Dohare et al. 2024, CIFAR)
redo_TAU        E|h_i| / mean_j E|h_j| <= tau (Sokar et al. 2023, definition 3.1)
fau_TAU         share of (unit, sample) entries *active*: |h_i| > tau mean_j |h_j| for that sample. Ma et al. 2024 count
                ReLU units above 0; gated units are never exactly 0, so active is relative here, as in ReDo

Gated units hit the first two only where weights are zero or underflow. Shapes: N samples, F units.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clbench.capacity.figure import Figure, undefined

if TYPE_CHECKING:
    import torch

OUTPUTS = re.compile(r"(.*\.)?(mlp\.(down_proj|dense_4h_to_h|c_proj|fc2)|(?<!mlp\.)fc2)")
"""Last matrices of feed-forward layers (Llama and its kin, GPT-NeoX, GPT-2, OPT): their inputs are the hidden units."""
REDO_TAUS = (0.01, 0.025, 0.1)
FAU_TAU = 0.1
SELDOM = 0.01
"""Share of the samples on which a unit has to be non-zero not to be dormant by ``dormant_1pct``."""


def output_layers(model: Any) -> dict[str, Any]:
    """Return the last matrices of the feed-forward layers by module name, in order; none in a foreign model."""
    return {name: module for name, module in model.named_modules() if OUTPUTS.fullmatch(name)}


def dormant(size_F: torch.Tensor, tau: float) -> torch.Tensor:
    """Return the places of the units with at most ``tau`` times the layer's mean size."""
    return (size_F <= tau * size_F.mean()).nonzero().flatten()


def active(size_NF: torch.Tensor, tau: float) -> torch.Tensor:
    """Return where units are larger than ``tau`` times their layer's mean for that sample, bool ``[..., F]``.

    A mean per sample does not depend on how samples are put into batches; scaling a layer changes nothing.
    """
    return size_NF > tau * size_NF.mean(-1, keepdim=True)


@dataclass
class Activity:
    """Sums over the samples of one layer: 16 F bytes, whatever their number."""

    n_units: int
    n: int = 0
    size_F: torch.Tensor = field(init=False)
    """Sum of |h|, float64."""
    nonzero_F: torch.Tensor = field(init=False)
    n_active: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing seen."""
        import torch

        self.size_F = torch.zeros(self.n_units, dtype=torch.float64)
        self.nonzero_F = torch.zeros(self.n_units, dtype=torch.int64)

    def add(self, h_NF: torch.Tensor) -> None:
        """Add the units' values of some samples."""
        import torch

        size_NF = h_NF.detach().float().abs()
        self.n += len(size_NF)
        self.size_F += size_NF.sum(0, dtype=torch.float64).cpu()
        self.nonzero_F += size_NF.count_nonzero(0).cpu()
        self.n_active += int(active(size_NF, FAU_TAU).sum())

    def __add__(self, other: Activity) -> Activity:
        """Return the sums over both."""
        both = Activity(self.n_units, self.n + other.n, n_active=self.n_active + other.n_active)
        both.size_F, both.nonzero_F = self.size_F + other.size_F, self.nonzero_F + other.nonzero_F
        return both

    def counts(self) -> dict[str, int]:
        """Return how many units each rule calls dormant, and ``fau``'s active entries, by figure."""
        found = {
            "dead": int((self.size_F == 0).sum()),
            "dormant_1pct": int((self.nonzero_F < SELDOM * self.n).sum()),
        }
        found |= {f"redo_{tau:g}": len(dormant(self.size_F, tau)) for tau in REDO_TAUS}
        return found | {f"fau_{FAU_TAU:g}": self.n_active}


def figures(layers: Sequence[Activity]) -> dict[str, Figure]:
    """Return every rule's share over all units (``fau``: all entries) of some layers by name."""
    names = Activity(1).counts()
    n_units, n_entries = sum(a.n_units for a in layers), sum(a.n_units * a.n for a in layers)
    if not n_entries:
        return dict.fromkeys(names, undefined("no unit was seen"))
    counts = [layer.counts() for layer in layers]
    return {
        name: Figure(sum(one[name] for one in counts) / (n_entries if name.startswith("fau") else n_units))
        for name in names
    }
