"""Learned shares: how much of each model every layer takes, trained on a little text while all weights stay frozen.

The idea of LoRA soups (CAT, arXiv 2410.13025) on whole models: one number a layer and model, their softmax mixes the
models, and the loss on a small mix of text is all that is trained on. With base and tuned model alone it is a WiSE-FT
whose alpha differs from layer to layer. Numbers start equal (the paper's code draws them from a normal distribution).

The weights of a mix are linear in the shares, so their gradient needs no graph through the merge:
``dL/da_k = sum over the layer's tensors of <dL/dW, W_k>``. Which text is learnt on is the caller's business: never that
which is measured afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from clbench.errors import ConfigError, NonFiniteError
from clbench.merge.kernels import mean
from clbench.merge.plan import KEEP, RESTORE, Action, MergePlan, Rule
from clbench.merge.scores import natural, unit_of

Read = Callable[[str], torch.Tensor]
Portion = tuple[float, torch.Tensor, torch.Tensor]
"""Weight in the loss, inputs and targets ``[B, T]`` (-100: no target)."""
IGNORE = -100
N_STEPS, LEARNING_RATE, MIX = 20, 0.2, 0.5


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """Shares and how they came about."""

    shares: Mapping[str, tuple[float, ...]]
    """Unit -> share of each model, in the order of the ends; sums to 1."""
    losses_nats: list[float] = field(default_factory=list)
    """Of the mix of text, before every step."""
    n_tokens: int = 0


def units_of(names: Sequence[str]) -> dict[str, str]:
    """Return tensor name -> what shares its number: its block, or outside the blocks the tensor alone."""
    return {name: unit_of(name, "layer") or name for name in names}


def learn_shares(
    model: torch.nn.Module,
    ends: Sequence[Read],
    batches: Callable[[int], Sequence[Portion]],
    *,
    n_steps: int = N_STEPS,
    learning_rate: float = LEARNING_RATE,
    progress: Callable[[int, float], None] | None = None,
) -> Learnt:
    """Return the shares of each end that make the loss small; the model's own weights come back afterwards.

    Args:
        model: a causal language model of the ends' make, whose trainable parameters are mixed.
        ends: what reads a tensor of each model: base, tuned and others.
        batches: step -> what is learnt on; weights of one step sum to 1.
        n_steps: of Adam.
        learning_rate: of the numbers whose softmax the shares are.
        progress: is told (step, loss in nats) after every step.

    Raises:
        ConfigError: fewer than two ends, or no text.
        NonFiniteError: the loss is no number.
    """
    if len(ends) < 2 or n_steps < 1:
        raise ConfigError(f"{len(ends)} models and {n_steps} steps teach nothing", mend="give two models and a step")
    parameters = dict(model.named_parameters())
    units = units_of(list(parameters))
    numbers = {unit: torch.zeros(len(ends), requires_grad=True) for unit in sorted(set(units.values()), key=natural)}
    optimizer = torch.optim.Adam(list(numbers.values()), lr=learning_rate)
    losses, n_tokens = list[float](), 0
    with _own_weights(model), torch.enable_grad():
        for step in range(n_steps):
            shares = {unit: torch.softmax(z.detach().double(), 0) for unit, z in numbers.items()}
            _fill(parameters, units, ends, shares)
            loss, count = _backward(model, batches(step))
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss is {loss}", where=f"learning shares, step {step}", mend="look at both models"
                )
            slopes = _slopes(parameters, units, ends)
            for unit, z in numbers.items():
                share, slope = shares[unit], slopes[unit]
                z.grad = (share * (slope - torch.dot(share, slope))).to(z.dtype)  # through the softmax
            optimizer.step()
            losses.append(loss)
            n_tokens += count
            if progress is not None:
                progress(step, loss)
    found = {unit: tuple(torch.softmax(z.detach().double(), 0).tolist()) for unit, z in numbers.items()}
    return Learnt(shares=found, losses_nats=losses, n_tokens=n_tokens)


@contextmanager
def _own_weights(model: torch.nn.Module) -> Iterator[None]:
    """Put the model's weights, mode and gradients back afterwards."""
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    gradients, training = {name: p.grad for name, p in model.named_parameters()}, model.training
    try:
        model.eval()
        model.zero_grad(set_to_none=True)
        yield
    finally:
        model.train(training)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
                parameter.grad = gradients[name]


def _fill(
    parameters: Mapping[str, torch.nn.Parameter],
    units: Mapping[str, str],
    ends: Sequence[Read],
    shares: Mapping[str, torch.Tensor],
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            base, tuned, *others = (read(name) for read in ends)
            parameter.copy_(mean(tuned, base, others, shares=shares[units[name]].tolist()))
            parameter.grad = None


def _backward(model: torch.nn.Module, batches: Sequence[Portion]) -> tuple[float, int]:
    """Add the gradient of the weighted mean losses up; returns (loss in nats, target tokens)."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for weight, inputs_BT, targets_BT in batches:
        inputs_BT, targets_BT = inputs_BT.to(device), targets_BT.to(device)
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        loss = cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE)
        torch.autograd.backward(weight * loss)
        total += weight * float(loss.detach())
        count += int((targets_BT != IGNORE).sum())
    if not count:
        raise ConfigError("there is no text to learn shares on", mend="give more text")
    return total, count


def _slopes(
    parameters: Mapping[str, torch.nn.Parameter], units: Mapping[str, str], ends: Sequence[Read]
) -> dict[str, torch.Tensor]:
    """Return unit -> dL/dshare of every end, less that of the first: a constant does not pass through a softmax."""
    slopes = {unit: torch.zeros(len(ends), dtype=torch.float64) for unit in units.values()}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        first, *others = (read(name) for read in ends)
        gradient = parameter.grad.detach().float()
        for place, other in enumerate(others, start=1):
            change = other.to(gradient.device).float() - first.to(gradient.device).float()
            slopes[units[name]][place] += float((gradient * change).sum(dtype=torch.float64))
    return slopes


def portions(texts: Mapping[Any, Any], tokenizer: Any, *, length: int, mix: float, n_steps: int) -> list[list[Portion]]:
    """Return what each step learns on: windows of general text (weight ``mix``) and of domain text, dealt in turn.

    Args:
        texts: ``general`` and ``domain`` (``evaluate.Text``).
        tokenizer: of the models.
        length: tokens in a window at most; a document's first windows come first.
        mix: weight of general text in the loss.
        n_steps: how many steps; short texts come around again.
    """
    dealt: list[list[Portion]] = [[] for _ in range(n_steps)]
    for side, weight in (("general", mix), ("domain", 1 - mix)):
        windows = [
            ids[start : start + length + 1]
            for ids in (
                tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"] for d in texts[side].documents
            )
            for start in range(0, len(ids), length)
            if len(ids) - start > 1
        ]
        if not windows:
            raise ConfigError(f"the {side} text has no two tokens in a row", mend="give more text")
        each = max(1, len(windows) // n_steps)
        for step in range(n_steps):
            rows = [torch.tensor(windows[(step * each + n) % len(windows)]) for n in range(each)]
            total = sum(len(row) - 1 for row in rows)
            # One window at a time: no padding, and logits of one window in memory.
            dealt[step] += [(weight * (len(r) - 1) / total, r[None, :-1], r[None, 1:]) for r in rows]
    return dealt


# --- from shares to merges ------------------------------------------------------------------------------------------


def moved_shares(shares: Mapping[str, Sequence[float]], s: float) -> dict[str, tuple[float, ...]]:
    """Return shares on a path through the learnt ones: s = 0 has no base, 1/2 is as learnt, 1 is the base alone.

    Below 1/2 the base's share is scaled down and the others' up; above, the base's grows to 1.
    """
    found = {}
    for unit, (base, *others) in shares.items():
        wanted = base * 2 * s if s <= 0.5 else base + (1 - base) * (2 * s - 1)
        rest = math.fsum(others)
        scaled = [one / rest * (1 - wanted) for one in others] if rest > 0 else [1 - wanted, *[0.0] * (len(others) - 1)]
        found[unit] = (wanted, *scaled)
    return found


def plan_of(shares: Mapping[str, Sequence[float]], n_ends: int) -> MergePlan:
    """Return the plan that mixes every unit by its shares; a share of 1 is a copy."""
    rules = []
    for unit, own in sorted(shares.items(), key=lambda item: -item[0].count(".")):  # a path may end in another's
        select = unit if any(part.isdecimal() for part in unit.split(".")) else f"={unit}"
        if own[0] == 1:
            action = RESTORE
        elif n_ends == 2:
            action = KEEP if own[0] == 0 else Action("lerp", {"s": round(own[0], 8)})
        else:
            action = Action("mean", {"shares": [round(one, 8) for one in own]})
        rules.append(Rule(select, action))
    return MergePlan(KEEP, tuple(rules))
