"""Hidden units of feed-forward layers: found, watched in a pass of their own, and replaced by fresh ones.

A unit of a gated layer is one entry of ``act(gate(x)) * up(x)``: its incoming weights are a row of each of both
matrices, its outgoing ones a column of the last. The pass is one forward of a few rows in eval mode, billed by itself:
no hook is left in a model, and nothing depends on micro-batches. What is left to others: which units go (``redo``,
``continual_backprop``).

Shapes: N positions that have a target, F units, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from clbench.capacity.units import OUTPUTS
from clbench.errors import ConfigError
from clbench.method import Context
from clbench.methods._fresh import redrawn

if TYPE_CHECKING:
    import torch

INPUTS = ("gate_proj", "up_proj", "dense_h_to_4h", "c_fc", "fc1")
"""First matrices of feed-forward layers, beside the last one in the same module."""
Moments = dict[str, tuple["torch.Tensor", "torch.Tensor"]]


@dataclass(frozen=True)
class Units:
    """The hidden units of one feed-forward layer."""

    name: str
    """Of the last matrix's module."""
    outgoing: Any
    incoming: dict[str, Any]
    """Module name -> module: gate and up, or one alone."""

    @property
    def out_FD(self) -> torch.Tensor:
        """Return the outgoing weights, live, a unit a row."""
        return by_unit(self.outgoing, self.outgoing.weight.detach(), incoming=False)

    @property
    def in_FD(self) -> list[torch.Tensor]:
        """Return the incoming weights, live, a unit a row, without biases."""
        return [by_unit(layer, layer.weight.detach(), incoming=True) for layer in self.incoming.values()]


def by_unit(layer: Any, tensor: torch.Tensor, *, incoming: bool) -> torch.Tensor:
    """Return a view of a weight, or of what has its shape, that has a unit in every row."""
    import torch

    if tensor.ndim == 1:  # a bias of the units
        return tensor
    stored_transposed = not isinstance(layer, torch.nn.Linear)  # transformers' Conv1D
    return tensor.T if stored_transposed == incoming else tensor


def find(ctx: Context) -> list[Units]:
    """Return the units of every feed-forward layer.

    Raises:
        ConfigError: there is none, its matrices are not the usual ones, or they are not trained.
    """
    modules = dict(ctx.module.named_modules())
    found = [_units(modules, name) for name in modules if OUTPUTS.fullmatch(name)]
    trained = {name for name, _ in ctx.parameters()}
    used = [f"{name}.weight" for units in found for name in (units.name, *units.incoming)]
    if not found or any(name not in trained for name in used):
        raise ConfigError(
            "no feed-forward layer whose units could be replaced"
            if not found
            else f"{next(name for name in used if name not in trained)} is not trained",
            where=type(ctx.module).__name__,
            mend="use a plain Llama-type, GPT-NeoX, GPT-2 or OPT model, without adapters",
        )
    return found


def _units(modules: dict[str, Any], name: str) -> Units:
    import torch
    from transformers.pytorch_utils import Conv1D

    parent = name.rpartition(".")[0]
    siblings = {f"{parent}.{own}" if parent else own: own for own in INPUTS}
    incoming = {full: modules[full] for full in siblings if full in modules}
    layers = [modules[name], *incoming.values()]
    if not incoming or any(not isinstance(layer, torch.nn.Linear | Conv1D) for layer in layers):
        raise ConfigError(
            "a feed-forward layer of an unknown kind",
            where=name,
            mend="use a plain Llama-type, GPT-NeoX, GPT-2 or OPT model, without adapters",
        )
    return Units(name, modules[name], incoming)


def look(
    ctx: Context, layers: list[Units], *, rows: int, seen: Callable[[Units, torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Run rows of the present stage through the model once; returns what ``seen`` made of each layer's units.

    Args:
        ctx: with CURRENT_DATA declared.
        layers: from ``find``.
        rows: sequences, other ones at every step.
        seen: gets the values at the positions that have a target, ``[N, F]``, fp32; returns a figure a unit, ``[F]``.
    """
    import torch

    from clbench.train.data import IGNORE

    draw = ctx.batches(ctx.stage.index, n_rows=rows, rows_per_batch=rows, name=f"units-{ctx.step}")
    batch = next(iter(draw))
    kept_BT = batch.targets_BT != IGNORE
    figures: dict[str, torch.Tensor] = {}

    def note(units: Units, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        h = args[0].detach().float()
        figures[units.name] = seen(units, h.reshape(*kept_BT.shape, -1)[kept_BT])

    hooks = [units.outgoing.register_forward_pre_hook(partial(note, units)) for units in layers]
    was_training = ctx.module.training
    try:
        with torch.no_grad():
            ctx.module.eval()(input_ids=batch.inputs_BT)
    finally:
        ctx.module.train(was_training)
        for hook in hooks:
            hook.remove()
    n_tokens = int(kept_BT.sum())
    ctx.bill("units", flops=ctx.forward_flops(n_tokens), n_tokens=n_tokens)
    return [figures[units.name] for units in layers]


def replace(ctx: Context, units: Units, which_R: torch.Tensor, moments: Moments) -> None:
    """Let units begin anew: incoming weights and biases fresh, outgoing weights zero, Adam's moments of these zero."""
    if not len(which_R):
        return
    for name, layer in units.incoming.items():
        fresh: Any = redrawn(ctx.module, layer, ctx.seed("fresh", name))
        for part, parameter in layer.named_parameters(recurse=False):
            rows = by_unit(layer, getattr(fresh, part).detach().to(parameter.device), incoming=True)[which_R]
            put(by_unit(layer, parameter.detach(), incoming=True), which_R, rows)
            for moment in moments.get(f"{name}.{part}", ()):
                put(by_unit(layer, moment, incoming=True), which_R, 0.0)
    put(units.out_FD, which_R, 0.0)
    for moment in moments.get(f"{units.name}.weight", ()):
        put(by_unit(units.outgoing, moment, incoming=False), which_R, 0.0)


def put(rows: torch.Tensor, which_R: torch.Tensor, values: Any) -> None:
    """Write into some rows of a live tensor."""
    rows[which_R] = values
