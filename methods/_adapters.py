"""Low-rank adapters through ``peft``: put in, begun anew, and merged into the plain model's weights.

Only plain LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3): ``W + (alpha/r) B A``, A drawn as ``torch.nn.Linear``
draws, B zero, no bias, no rank-stabilised scale, no DoRA. What is left to others: when adapters begin anew and what
is added to their gradients (``lora``, ``o_lora``).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clbench.errors import ConfigError, IntegrityError
from clbench.method import Context, Method, Need, Weights

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
A, B, BASE = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight", ".base_layer"


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What every adapter has."""

    r: int = 8
    """Rank of the update of each matrix, by each adapter."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    target: str = "all"
    """all linear layers of the decoder, or names such as q_proj+v_proj."""


class Adapted(Method):
    """What methods with adapters share; their options are AdapterOptions and more."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self, options: AdapterOptions | None = None) -> None:
        super().__init__(options)
        check_options(type(self).__name__.lower(), self.options)

    begins_anew = True
    """Whether every stage has an adapter of its own."""

    def attach(self, module: torch.nn.Module, seed: int) -> None:
        """Put one adapter beside each chosen layer and freeze everything else."""
        options = self.options
        inject(module, rank=options.r, alpha=options.alpha, dropout=options.dropout, target=options.target, seed=seed)

    def begin_stage(self, ctx: Context) -> None:
        """Merge the last stage's adapters into the frozen weights and begin new ones, where that is asked for.

        Not at the last stage's end: what averages factors has to find them beside the weights that they belong to.
        """
        if self.begins_anew and ctx.stage.index > 1:
            self.before_merge(ctx)
            fold(ctx.module, seed=ctx.seed("adapter"))
            ctx.bill("merge", flops=merge_flops(ctx.module))

    def before_merge(self, ctx: Context) -> None:
        """Take what is needed of adapters that are about to be merged."""

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the plain model's weights, with the adapters in them."""
        if self.begins_anew and (name := moved(ctx.module, weights)):
            raise ConfigError(
                f"{name} was averaged, and adapters of different stages have no average",
                where=f"method {self.name!r}",
                mend="average with lora:scope=run, or not at all",
            )
        ctx.bill("merge", flops=merge_flops(ctx.module))
        return merged(weights, self.options.alpha / self.options.r)


def check_options(method: str, options: Any) -> None:
    """Raise ConfigError for options that make no adapter, or when ``peft`` is not installed."""
    if options.r < 1:
        raise ConfigError(f"{method}:r={options.r} is no rank", mend="give a number of at least 1 such as 8")
    if not (math.isfinite(options.alpha) and options.alpha > 0):
        raise ConfigError(f"{method}:alpha={options.alpha} is no scale", mend="give a number above 0 such as 16")
    if not 0 <= options.dropout < 1:
        raise ConfigError(f"{method}:dropout={options.dropout} is no share", mend="give a number from 0 to below 1")
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"method {method!r} needs the package peft", mend="install it: pip install peft")


def inject(module: torch.nn.Module, *, rank: int, alpha: float, dropout: float, target: str, seed: int) -> None:
    """Put LoRA layers into a model in place; afterwards only their factors are trainable.

    Raises:
        ConfigError: the model has adapters already, or none of the layers that ``target`` names.
        IntegrityError: peft made another kind of adapter than was asked for.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    if any(True for _ in layers(module)):
        raise ConfigError("the model has adapters already", mend="compose at most one of lora and o-lora")
    scale: Any = alpha  # declared as a whole number there, and only divided by r
    config = LoraConfig(
        r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=chosen(module, target), bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for name, layer in layers(module):
        # A variant would be merged by another formula than ours.
        if layer.lora_variant or any(layer.lora_bias.values()) or layer.scaling[ADAPTER] != alpha / rank:
            raise IntegrityError("peft made no plain LoRA layer", where=name, mend="install peft 0.21")


def chosen(module: torch.nn.Module, target: str) -> list[str]:
    """Return the full names of the linear layers that ``all`` or names such as ``q_proj+v_proj`` mean.

    The output layer is never one of them: in most models it is the embedding, too.
    """
    import torch

    find_head: Any = getattr(module, "get_output_embeddings", lambda: None)
    head = find_head()
    linear = [name for name, m in module.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    known = sorted({name.rpartition(".")[2] for name in linear})
    wanted = known if target == "all" else target.split("+")
    if missing := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"the model has no linear layer {missing[0]!r}", mend=f"give all, or some of {'+'.join(known)}"
        )
    found = [name for name in linear if name.rpartition(".")[2] in wanted]
    if not found:
        raise ConfigError("the model has no linear layer to put an adapter on", mend="use another method")
    return found


def layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A, shape ``[r, d_in]``, and B, shape ``[d_out, r]``, of a layer: the live parameters."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def merged(weights: Weights, scale: float) -> Weights:
    """Return the plain model's weights: ``W + scale B A`` under W's own name, everything else as it is."""
    plain: Weights = {}
    for name, tensor in weights.items():
        stem = name.removesuffix(f"{BASE}.weight")
        if name.endswith((A, B)):
            continue
        if stem != name:
            tensor = with_product(tensor, weights[stem + A], weights[stem + B], scale)
        plain[name.replace(f"{BASE}.", ".")] = tensor
    return plain


def with_product(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``W + scale B A``, computed in fp32 at least and rounded once."""
    import torch

    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)


def fold(module: torch.nn.Module, *, seed: int) -> None:
    """Merge the adapters into the frozen weights in place, and begin new ones, which change nothing yet."""
    import torch

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, layer in layers(module):
            weight, (a, b) = layer.base_layer.weight, factors(layer)
            weight.copy_(with_product(weight, a, b, layer.scaling[ADAPTER]))
            fresh = torch.empty(a.shape)  # on the CPU: the same numbers on every device
            torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
            a.copy_(fresh)
            b.zero_()


def moved(module: torch.nn.Module, weights: Weights) -> str | None:
    """Return the name of a factor in ``weights`` that is not the model's own, or None."""
    for stem, layer in layers(module):
        for name, live in zip((stem + A, stem + B), factors(layer), strict=True):
            if name in weights and not bool((weights[name].to(live.device) == live).all()):
                return name
    return None


def merge_flops(module: torch.nn.Module) -> float:
    """Return the FLOPs of all products B A."""
    return sum(2.0 * b.shape[0] * a.numel() for a, b in (factors(layer) for _, layer in layers(module)))
