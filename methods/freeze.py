"""Freeze: train with some modules held as they are, by name or from a list that ``clbench.merge.select`` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.errors import ConfigError
from clbench.method import Method

if TYPE_CHECKING:
    import torch


class Freeze(Method):
    """Leave chosen modules untrained from the first step on, as Spectrum does (arXiv 2406.06623)."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of Freeze."""

        modules: str = "embed_tokens"
        """Whole dotted parts of names, several with +: layers.0+layers.1 is blocks 0 and 1, and not block 10."""
        file: str | None = None
        """A freeze list (YAML or JSON) instead."""

    def attach(self, module: torch.nn.Module, seed: int) -> None:
        """Switch the gradients of the chosen parameters off.

        Raises:
            ConfigError: a name that the model does not have, or nothing left to train.
        """
        from clbench.merge.select import read_freeze_list

        options = self.options
        wanted = read_freeze_list(Path(options.file).expanduser()) if options.file else options.modules.split("+")
        parameters = dict(module.named_parameters())
        for part in wanted:
            frozen = [p for name, p in parameters.items() if f".{part}." in f".{name}."]
            if not frozen:
                raise ConfigError(f"the model has no {part!r} to freeze", mend="give whole parts of its names")
            for parameter in frozen:
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in parameters.values()):
            raise ConfigError("all parameters are frozen", mend="take method frozen, or freeze less")
