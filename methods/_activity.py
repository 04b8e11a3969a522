"""Fraction of active units of a language model's feed-forward layers, counted while somebody else runs the model.

Shapes: B rows, T positions, F units of a feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from clbench.capacity.units import active, output_layers
from clbench.errors import ConfigError

if TYPE_CHECKING:
    import torch


class ActiveUnits:
    """Counts (unit, token) pairs whose size is more than ``tau`` times the mean over the layer's units for that token.

    Ma et al. 2024 (arXiv 2310.07418) count ReLU units above 0. Gated units are never exactly 0, so "active" is relative
    here, as in ReDo (Sokar et al. 2023): scaling a layer changes nothing. A mean per token does not depend on how rows
    are put into batches. Positions after a row's end are not counted.
    """

    def __init__(self, tau: float) -> None:
        self.tau = tau
        self.n_active = self.n_units = 0
        self._mask_BT: torch.Tensor | None = None

    @property
    def share(self) -> float:
        """Return the fraction of active units over all layers and tokens that passed."""
        return self.n_active / self.n_units

    @contextmanager
    def counting(self, module: torch.nn.Module) -> Iterator[None]:
        """Count in every forward pass of ``module`` within the block.

        Raises:
            ConfigError: no feed-forward layer is found.
        """
        layers = [*output_layers(module).values()]
        if not layers:
            raise ConfigError(
                "no feed-forward layer that active units could be counted in",
                where=type(module).__name__,
                mend="use a Llama-type, GPT-NeoX, GPT-2 or OPT model",
            )
        hooks = [module.register_forward_pre_hook(self._note_rows, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(self._count) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_rows(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BT = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        # Short rows are filled up with 0: a position counts when it, or one after it, holds another token.
        self._mask_BT = ids_BT.ne(0).flip(-1).cumsum(-1).flip(-1) > 0

    def _count(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        size_BTF = args[0].detach().float().abs()
        active_BTF = active(size_BTF, self.tau)
        assert self._mask_BT is not None
        self.n_active += int(active_BTF[self._mask_BT].sum())
        self.n_units += int(self._mask_BT.sum()) * size_BTF.shape[-1]
