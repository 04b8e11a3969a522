"""The gradient of every sequence for one use of one parameter, from what went into a module and what came back.

A *call* of a module is its arguments and, later, the gradient of the summed loss with respect to its output. As the
loss of sequence b depends on row b of the output only, row b of that gradient belongs to sequence b. A *rule* turns a
call into the gradient of each sequence: closed forms for Linear, GPT-2's Conv1D, Embedding, LayerNorm and modules that
multiply by a weight (RMSNorm); for any other module, one small backward pass of that module a sequence. A call that no
rule fits is for the caller to treat otherwise (``gradients`` then runs the whole model a sequence at a time).

Shapes: B sequences, S all positions of a sequence, I inputs, O outputs, V vocabulary, H width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from clbench.errors import ConfigError


@dataclass
class Call:
    """One call of a module that owns trained parameters."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: torch.Tensor | None
    """What came out, detached; dropped when no rule needs it. One row may be for all sequences."""
    n_sequences: int
    gradient: torch.Tensor | None = None
    """Of the summed loss with respect to the output, row b of sequence b; None until it arrives."""
    versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Note the state of the inputs, to see a later change in place."""
        self.versions = [(x, x._version) for x in _tensors((*self.arguments, *self.keywords.values()))]

    @property
    def input(self) -> Any:
        """The only or first argument."""
        return self.arguments[0] if self.arguments else next(iter(self.keywords.values()), None)

    def check_unchanged(self) -> None:
        """Refuse to go on when an input is no longer what the module saw."""
        if any(x._version != version for x, version in self.versions):
            raise ConfigError(
                "the model changes activations in place, so gradients of single sequences cannot be taken",
                where=type(self.module).__name__,
                mend="use one row a batch",
            )

    def gradient_BSO(self) -> torch.Tensor:
        """Return the output's gradient with all positions of a sequence in one dimension."""
        assert self.gradient is not None
        return _positions(self.gradient)


def _tensors(values: Any) -> list[torch.Tensor]:
    """Return the tensors among values, tuples and lists looked into."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def _output(call: Call) -> torch.Tensor:
    assert call.output is not None
    return call.output


def _positions(x: torch.Tensor) -> torch.Tensor:
    """[B, ..., H] -> [B, S, H], at least fp32."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return wide.reshape(wide.shape[0], -1, wide.shape[-1])


RUN_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
"""Of a module that cannot run on one sequence."""


class Rule:
    """How a kind of module gives the gradient of each sequence; the base does it by the other methods."""

    def gradient(self, call: Call, name: str) -> torch.Tensor:
        """Return [B, *shape] for the module's own parameter ``name``."""
        raise NotImplementedError

    def add(self, call: Call, name: str, into: torch.Tensor) -> None:
        """Add the gradient of each sequence to [B, *shape]."""
        into += self.gradient(call, name)

    def dot(self, call: Call, name: str, direction: torch.Tensor) -> torch.Tensor:
        """Return direction . gradient of each sequence, float64 [B]."""
        return inner(self.gradient(call, name), direction)


def inner(gradient: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Return the dot of every row of [B, *shape] with a tensor of that shape, float64 [B]."""
    return (gradient * direction).flatten(1).sum(1, dtype=torch.float64)


class LinearRule(Rule):
    """y = x W^T + b: the gradient of sequence b is D_b^T X_b."""

    transposed = False
    """Whether the weight is [I, O] (GPT-2's Conv1D)."""

    def gradient(self, call: Call, name: str) -> torch.Tensor:
        """Return one product a sequence."""
        D_BSO = call.gradient_BSO()
        if name == "bias":
            return D_BSO.sum(1)
        X_BSI = _positions(call.input.detach())
        return X_BSI.mT @ D_BSO if self.transposed else D_BSO.mT @ X_BSI

    def dot(self, call: Call, name: str, direction: torch.Tensor) -> torch.Tensor:
        """Return sum_s d_bs . (U x_bs), which needs no gradient of single sequences."""
        D_BSO = call.gradient_BSO()
        if name == "bias":
            return (D_BSO @ direction.to(D_BSO.dtype)).sum(1, dtype=torch.float64)
        U = direction.to(D_BSO.dtype)
        moved_BSO = _positions(call.input.detach()) @ (U if self.transposed else U.mT)
        return (D_BSO * moved_BSO).sum((1, 2), dtype=torch.float64)


class Conv1DRule(LinearRule):
    """GPT-2's Conv1D: a Linear whose weight stands the other way round."""

    transposed = True


class EmbeddingRule(Rule):
    """y = W[i]: the rows of the output's gradient go to the rows that were looked up."""

    def _rows(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids [B, S] and their gradients [B, S, H]."""
        D_BSH = call.gradient_BSO()
        ids_BS = call.input.reshape(call.input.shape[0], -1).expand(call.n_sequences, -1)
        padding = call.module.padding_idx
        return ids_BS, D_BSH if padding is None else D_BSH * (ids_BS != padding).unsqueeze(-1)

    def gradient(self, call: Call, name: str) -> torch.Tensor:
        """Return the rows added up, one table a sequence."""
        weight: Any = call.module.weight
        D_BSH = call.gradient_BSO()
        tables_BVH = D_BSH.new_zeros(call.n_sequences, *weight.shape)
        self.add(call, name, tables_BVH)
        return tables_BVH

    def add(self, call: Call, name: str, into: torch.Tensor) -> None:
        """Add the rows to [B, V, H]."""
        ids_BS, D_BSH = self._rows(call)
        n_words = into.shape[1]
        first_B1 = torch.arange(call.n_sequences, device=ids_BS.device).unsqueeze(1) * n_words
        into.view(-1, into.shape[-1]).index_add_(0, (ids_BS + first_B1).flatten(), D_BSH.flatten(0, 1))

    def dot(self, call: Call, name: str, direction: torch.Tensor) -> torch.Tensor:
        """Return sum_s d_bs . U[i_bs]."""
        ids_BS, D_BSH = self._rows(call)
        return (D_BSH * direction.to(D_BSH.dtype)[ids_BS]).sum((1, 2), dtype=torch.float64)


class LayerNormRule(Rule):
    """y = w x^ + b with x^ the normalised input."""

    def gradient(self, call: Call, name: str) -> torch.Tensor:
        """Return sum_s d x^, or sum_s d for the bias."""
        D_BSH = call.gradient_BSO()
        if name == "bias":
            return D_BSH.sum(1)
        module: Any = call.module
        normal = F.layer_norm(call.input.detach(), module.normalized_shape, None, None, module.eps)
        return (D_BSH * _positions(normal)).sum(1)


class ScaleRule(Rule):
    """y = w f(x), any f without w (RMSNorm): f = y / w."""

    def gradient(self, call: Call, name: str) -> torch.Tensor:
        """Return sum_s d f(x)."""
        return (call.gradient_BSO() * _positions(self._factor(call))).sum(1)

    def _factor(self, call: Call) -> torch.Tensor:
        """Return f(x): from what came out, or where a weight is nearly zero, from another run with other weights."""
        weight = _weight(call)
        if bool(weight.abs().min() > 1e-3 * weight.abs().max()):
            return _output(call) / weight
        probe_H = _probe(weight)
        with torch.no_grad():
            output: torch.Tensor = torch.func.functional_call(
                call.module, {"weight": probe_H}, call.arguments, call.keywords
            )
        return output / probe_H

    def fits(self, call: Call) -> bool:
        """Whether the first sequence's output is w f(x), with f from other weights, so that this is no tautology."""
        output = _output(call)
        if [*call.module._parameters] != ["weight"]:
            return False
        weight = _weight(call)
        if weight.ndim != 1 or output.shape[-1:] != weight.shape or not output[0].any():
            return False
        probe_H = _probe(weight)
        try:
            with torch.no_grad():
                factor = ANY.run(call, {"weight": probe_H}, 0) / probe_H
        except RUN_ERRORS:
            return False
        return close(factor * weight, output[:1])


def _weight(call: Call) -> torch.Tensor:
    weight = call.module._parameters["weight"]
    assert weight is not None
    return weight.detach()


def _probe(weight: torch.Tensor) -> torch.Tensor:
    """Return other weights: far from zero, and no two the same."""
    return torch.linspace(1.0, 2.0, len(weight), device=weight.device, dtype=weight.dtype)


class AnyRule(Rule):
    """Any module that treats sequences apart: one backward pass of the module a sequence."""

    def gradient(self, call: Call, name: str) -> torch.Tensor:
        """Return the vector-Jacobian product of each sequence."""
        assert call.gradient is not None
        rows = [self._row(call, name, b, call.gradient[b : b + 1]) for b in range(call.n_sequences)]
        stacked = torch.stack(rows)
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32))

    def _row(self, call: Call, name: str, b: int, gradient: torch.Tensor) -> torch.Tensor:
        own: nn.Parameter = call.module._parameters[name]  # type: ignore[assignment]
        weight = own.detach().clone().requires_grad_()
        with torch.enable_grad():
            output = self.run(call, {name: weight}, b)
            if not close(output.detach(), _output(call)[b : b + 1]):
                raise ConfigError(
                    "a module does not treat sequences apart, so their gradients cannot be taken",
                    where=type(call.module).__name__,
                    mend="use one row a batch",
                )
            (found,) = torch.autograd.grad(output, weight, gradient, allow_unused=True)
        return torch.zeros_like(own) if found is None else found.detach()

    def run(self, call: Call, weights: dict[str, torch.Tensor], b: int) -> torch.Tensor:
        """Return the module's output for sequence b alone."""

        def row(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(row(each) for each in value)
            if isinstance(value, torch.Tensor):
                batched = value.ndim > 0 and value.shape[0] == call.n_sequences
                return (value[b : b + 1] if batched else value).detach()
            return value

        keywords = {key: row(value) for key, value in call.keywords.items()}
        output: torch.Tensor = torch.func.functional_call(call.module, weights, row(call.arguments), keywords)
        return output

    def fits(self, call: Call) -> bool:
        """Whether the first and the last sequence alone give what they gave in the batch."""
        output = _output(call)
        if len(output) != call.n_sequences:
            return False
        try:
            with torch.no_grad():
                ends = (0, call.n_sequences - 1)
                return all(close(self.run(call, {}, b), output[b : b + 1]) for b in ends)
        except RUN_ERRORS:
            return False


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs agree but for rounding."""
    if a.shape != b.shape:
        return False
    tolerance = 1e-9 if b.dtype == torch.float64 else 1e-4 if b.dtype == torch.float32 else 3e-2
    return not b.numel() or bool((a - b).abs().max() <= tolerance * b.abs().max())


LINEAR, CONV1D, EMBEDDING, LAYER_NORM, SCALE, ANY = (
    LinearRule(),
    Conv1DRule(),
    EmbeddingRule(),
    LayerNormRule(),
    ScaleRule(),
    AnyRule(),
)


def known_rule(module: nn.Module) -> Rule | None:
    """Return the closed form of a module by its forward function, which a subclass or a wrapper may have replaced."""
    if "forward" in vars(module):
        return None
    forward: Callable[..., Any] = type(module).forward
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and forward is transformers.Conv1D.forward:
        return CONV1D
    if forward is nn.Linear.forward:
        return LINEAR
    if forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1:  # type: ignore[arg-type]
        return LAYER_NORM
    if forward is nn.Embedding.forward:
        return EMBEDDING
    return None


def rule_for(call: Call, n_positions: int) -> Rule | None:
    """Return the rule of a call, or None when it is not certain that rows are sequences.

    Two-dimensional inputs of sequences with several positions are not: positions of all sequences may be mixed there
    (experts), and their number may be B by accident.
    """
    x, module = call.input, call.module
    if not isinstance(x, torch.Tensor) or x.ndim < 2:
        return None
    rule = known_rule(module)
    if rule is EMBEDDING:
        plain = module.max_norm is None and not module.scale_grad_by_freq
        call.output = None
        return rule if plain and x.shape[0] in (1, call.n_sequences) else None
    if x.shape[0] != call.n_sequences or (x.ndim == 2 and n_positions > 1 and x.is_floating_point()):
        return None
    if rule is not None:
        call.output = None  # a head's logits, for one, are not to stay
        return rule
    return SCALE if SCALE.fits(call) else ANY if ANY.fits(call) else None
