"""Fresh initialisations of any causal language model, drawn by the model's own initialiser.

The initialiser is the ``_init_weights`` that every transformers model has. Draws are made on the CPU, so that they are
the same on every device, and leave the global random state as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clbench.errors import ConfigError
from clbench.method import Context, Weights

if TYPE_CHECKING:
    import torch


class Fresh:
    """Draws initialisations of one architecture; keeps a model of it on the CPU, which is no state."""

    def __init__(self) -> None:
        self._model: torch.nn.Module | None = None

    def draw(self, ctx: Context, seed: int, *, norms: bool) -> Weights:
        """Return new weights for the trained parameters; the next draw overwrites them.

        Args:
            ctx: names the model and its trained parameters.
            seed: the same seed gives the same weights.
            norms: with the weights and biases of normalisation layers, which have a fixed initial value.

        Raises:
            ConfigError: the model cannot draw, or has parameters that its architecture has not, as adapters.
        """
        import torch

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if self._model is None:
                self._model = type(ctx.module)(_config(ctx.module))
            torch.manual_seed(seed)  # afterwards: building a model draws, too
            self._model.apply(_initialiser(self._model))
        fresh = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        trained = [name for name, _ in ctx.parameters()]
        if missing := [name for name in trained if name not in fresh]:
            raise ConfigError(
                f"{missing[0]} has no initialisation of its own", mend="do not compose this method with adapters"
            )
        left_out = set() if norms else norm_names(ctx.module)
        return {name: fresh[name] for name in trained if name not in left_out}


def redrawn(module: torch.nn.Module, layer: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Return a copy of one layer, on the CPU, as the model initialises it."""
    import torch

    initialise = _initialiser(module)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = bare(layer)
        initialise(fresh)
    return fresh


def bare(layer: Any) -> torch.nn.Module:
    """Return a new layer of a linear layer's type and size, without its hooks, on the CPU."""
    import torch

    if isinstance(layer, torch.nn.Linear):
        return torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    conv: torch.nn.Module = type(layer)(layer.nf, layer.nx)  # transformers' Conv1D
    return conv


def norm_names(module: torch.nn.Module) -> set[str]:
    """Return the parameters of normalisation layers, which are told by their class."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if "norm" in type(layer).__name__.lower()
        for name, _ in layer.named_parameters(recurse=False)
    }


def _config(module: Any) -> Any:
    return module.config


def _initialiser(module: Any) -> Any:
    if not hasattr(module, "_init_weights"):
        raise ConfigError(
            f"{type(module).__name__} has no initialiser", mend="use a model with _init_weights, as transformers' have"
        )
    return module._init_weights
