"""Running averages of hidden units: how useful they are, what they give on average, how old they are.

Shapes: F units of a layer, M mature ones, R to be replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Record:
    """What is known of the units of one layer, shapes ``[F]``."""

    utility_F: torch.Tensor
    """Moving average from zero on, as ``mean_F``: to be divided by ``share_F``."""
    mean_F: torch.Tensor
    """Of h."""
    age_F: torch.Tensor
    """Optimizer steps since the unit began, int64."""
    owed: torch.Tensor
    """Units that are to be replaced, with what is less than one, float64 scalar."""

    @classmethod
    def empty(cls, n_units: int) -> Record:
        """Return a record of units that just began."""
        import torch

        zeros_F = torch.zeros(n_units)
        return cls(zeros_F, zeros_F.clone(), zeros_F.long(), torch.zeros((), dtype=torch.float64))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parts by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def to(self, device: torch.device) -> None:
        """Move there what is elsewhere (a resumed run's state is on the CPU)."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.to(device))

    def share_F(self, decay: float) -> torch.Tensor:
        """Return what the weights of the averages sum to: the correction of their beginning at zero."""
        return 1 - decay ** self.age_F.double()

    def expected(self, decay: float) -> torch.Tensor:
        """Return the mean of h."""
        return (self.mean_F / self.share_F(decay)).float()

    def due(self, *, share: float, maturity: int, decay: float) -> torch.Tensor:
        """Return the places of the units to replace now, the least useful first, and count them as paid.

        Args:
            share: of the mature units, to be replaced since the last call; what is less than one unit adds up.
            maturity: steps that a unit has to be older than.
            decay: of the averages.
        """
        mature_M = (self.age_F > maturity).nonzero().flatten()
        self.owed += share * len(mature_M)
        n = min(int(self.owed), len(mature_M))
        self.owed -= n
        utility_M = (self.utility_F / self.share_F(decay))[mature_M]
        return mature_M[utility_M.argsort(stable=True)[:n]]

    def forget(self, which_R: torch.Tensor) -> None:
        """Let units begin anew."""
        for tensor in (self.utility_F, self.mean_F, self.age_F):
            tensor[which_R] = 0
