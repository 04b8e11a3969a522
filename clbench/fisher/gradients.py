"""Gradients of single sequences from one forward and one backward pass of a batch.

A sample is one packed sequence (a row of a batch); its loss is the mean negative log-likelihood, in nats, of its
targets (``IGNORE`` left out), so gradients are in nats per token. A row without targets has loss and gradient zero.

Forward hooks keep what went into every module that owns trained parameters; hooks on their outputs get the gradient in
the backward pass, and ``uses`` turns both into the gradient of each sequence. Autograd itself computes no weight
gradients meanwhile, which saves a third of the pass. As soon as the last use of a parameter has its gradient (a tied
embedding is used twice), the parameter is visited and everything kept for it is freed, so the gradients of one
parameter stand in memory at a time: B times its size.

A parameter that is used outside its own module, or a module in which rows may not be sequences (mixtures of experts),
is seen in the forward pass; then the model runs a sequence at a time instead, right but slow. So it is for one row,
and when there are as many rows as positions, as one could be taken for the other.

Everything that is estimated from these gradients stands in ``estimate``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from clbench.errors import ConfigError, NonFiniteError
from clbench.fisher.uses import EMBEDDING, Call, Rule, inner, rule_for
from clbench.method import Weights
from clbench.train.data import IGNORE

Visit = Callable[[str, torch.Tensor], None]
"""Gets a parameter's name and its gradient of every sequence, [B, *shape]; both are freed afterwards."""

BUFFER_ELEMENTS = 2**28
"""Elements of all gradients that the slow path keeps at a time; more takes several passes."""


def each_sequence(
    model: nn.Module,
    inputs_BT: torch.Tensor,
    targets_BT: torch.Tensor,
    visit: Visit,
    *,
    names: Collection[str] | None = None,
) -> torch.Tensor:
    """Visit the gradient of every sequence, parameter by parameter, each once; return loss_B (float64, nats per token).

    Args:
        model: gives ``model(input_ids=...).logits``; it runs in eval mode, and modes, ``requires_grad`` and ``.grad``
            are put back whatever happens.
        inputs_BT: token ids.
        targets_BT: target ids or IGNORE.
        visit: called with a name and a tensor [B, *shape] of at least fp32; may change it, must not keep it.
        names: parameters to visit; all trained ones by default. One that nothing uses has gradient zero.

    Raises:
        ConfigError: a name that the model does not have, or activations that are changed in place.
        NonFiniteError: a loss is NaN or infinite.
    """

    def finish(name: str, parameter: nn.Parameter, uses: Sequence[Use]) -> None:
        visit(name, _materialised(parameter, uses, len(inputs_BT)))

    return _pass(model, inputs_BT, targets_BT, finish, visit, names)


def dot_each_sequence(
    model: nn.Module, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, direction: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss_B and direction . gradient of every sequence, both float64 [B], over the direction's parameters.

    Linear and embedding layers need no gradients of single sequences for it: D_b^T X_b . U = sum_s d_bs . (U x_bs).
    """
    dots_B = torch.zeros(len(inputs_BT), dtype=torch.float64, device=inputs_BT.device)

    def finish(name: str, parameter: nn.Parameter, uses: Sequence[Use]) -> None:
        for use in uses:
            dots_B.add_(use.rule.dot(use.call, use.local_name, direction[name]))

    def visit(name: str, gradient: torch.Tensor) -> None:
        dots_B.add_(inner(gradient, direction[name]))

    loss_B = _pass(model, inputs_BT, targets_BT, finish, visit, list(direction))
    return loss_B, dots_B


def sequence_losses(model: nn.Module, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of every row's targets, float64 [B]; zero for a row without."""
    logits_BTV = model(input_ids=inputs_BT).logits
    if logits_BTV.dtype not in (torch.float32, torch.float64):
        logits_BTV = logits_BTV.float()
    nats_BT: torch.Tensor = _CrossEntropy.apply(logits_BTV, targets_BT)  # type: ignore[no-untyped-call]
    n_targets_B = (targets_BT != IGNORE).sum(1).clamp(min=1)
    return nats_BT.sum(1, dtype=torch.float64) / n_targets_B


class _CrossEntropy(torch.autograd.Function):
    """Negative log-likelihood of every target, with one tensor of the logits' size where PyTorch makes three.

    The gradient, softmax minus one-hot, is made of the log-probabilities in place: one backward pass only. At a small
    model's size these tensors, each of fresh pages, take as long as the model.
    """

    @staticmethod
    def forward(ctx: Any, logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        log_p_BTV = logits_BTV.log_softmax(-1)
        counts_BT = targets_BT != IGNORE
        ids_BT1 = (targets_BT * counts_BT).unsqueeze(-1)
        ctx.kept = (log_p_BTV, counts_BT, ids_BT1) if ctx.needs_input_grad[0] else None
        return -log_p_BTV.gather(-1, ids_BT1).squeeze(-1) * counts_BT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.kept is None:
            raise RuntimeError("a second backward pass: the first has used up what was kept")
        (log_p_BTV, counts_BT, ids_BT1), ctx.kept = ctx.kept, None
        weight_BT1 = (gradients[0] * counts_BT).unsqueeze(-1)
        p_BTV = log_p_BTV.exp_().mul_(weight_BT1)
        return p_BTV.scatter_add_(-1, ids_BT1, -weight_BT1), None


def chosen_parameters(model: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """Return parameters by name, all trained ones by default.

    Raises:
        ConfigError: an unknown name, or none at all.
    """
    own = dict(model.named_parameters())
    if names is None:
        names = [name for name, p in own.items() if p.requires_grad]
    wanted = set(names)
    if unknown := sorted(wanted - own.keys()):
        raise ConfigError(f"the model has no parameter {unknown[0]}", mend="use names as in named_parameters()")
    if not wanted:
        raise ConfigError("no parameter is trained", mend="leave some parameters trainable")
    return {name: p for name, p in own.items() if name in wanted}


@contextmanager
def undisturbed(model: nn.Module, trained: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Eval mode, gradients for ``trained`` only; modes and ``requires_grad`` come back whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in trained}
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, required in flags:
            p.requires_grad_(required)


# --- the pass ---------------------------------------------------------------------------------------------------------


@dataclass
class Use:
    """One use of a parameter."""

    call: Call
    local_name: str
    rule: Rule


Finish = Callable[[str, nn.Parameter, Sequence[Use]], None]


def _materialised(parameter: nn.Parameter, uses: Sequence[Use], n_sequences: int) -> torch.Tensor:
    """Return the gradient of every sequence, summed over all uses."""
    total: torch.Tensor | None = None
    for use in sorted(uses, key=lambda use: use.rule is EMBEDDING):  # a head's product first, rows are added to it
        if total is None:
            total = use.rule.gradient(use.call, use.local_name)
        else:
            use.rule.add(use.call, use.local_name, total)
    if total is None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        total = parameter.new_zeros(n_sequences, *parameter.shape, dtype=dtype)
    return total


def _pass(
    model: nn.Module,
    inputs_BT: torch.Tensor,
    targets_BT: torch.Tensor,
    finish: Finish,
    visit: Visit,
    names: Collection[str] | None,
) -> torch.Tensor:
    """Run a batch through the hooks and ``finish``, or a sequence at a time and ``visit`` where hooks cannot tell."""
    parameters = chosen_parameters(model, names)
    n_sequences, n_positions = inputs_BT.shape
    if n_sequences > 1 and n_sequences != n_positions:
        with undisturbed(model), Recording(model, parameters, n_sequences, n_positions, finish) as recording:
            loss_B = recording.forward(inputs_BT, targets_BT)
            if recording.reason is None:
                recording.backward(loss_B)
                return loss_B.detach()
            del loss_B
    with undisturbed(model, parameters.values()):
        return _one_by_one(model, inputs_BT, targets_BT, parameters, visit)


def check_finite(loss_B: torch.Tensor) -> None:
    """Stop at a loss that is NaN or infinite.

    Raises:
        NonFiniteError: there is one.
    """
    if not bool(torch.isfinite(loss_B).all()):
        raise NonFiniteError("the loss of a sequence is not finite in a Fisher pass", mend="lower the learning rate")


def _one_by_one(
    model: nn.Module,
    inputs_BT: torch.Tensor,
    targets_BT: torch.Tensor,
    parameters: dict[str, nn.Parameter],
    visit: Visit,
) -> torch.Tensor:
    """One backward pass a sequence, and several of them when the gradients of all would not fit in memory."""
    losses: list[torch.Tensor] = []
    for group in _groups(parameters, len(inputs_BT)):
        losses, rows = [], []
        for b in range(len(inputs_BT)):
            loss_1 = sequence_losses(model, inputs_BT[b : b + 1], targets_BT[b : b + 1])
            check_finite(loss_1)
            rows.append(torch.autograd.grad(loss_1.sum(), [*group.values()], allow_unused=True))
            losses.append(loss_1.detach())
        for place, (name, p) in enumerate(group.items()):
            dtype = torch.promote_types(p.dtype, torch.float32)
            gradients = [row[place] if row[place] is not None else torch.zeros_like(p) for row in rows]
            visit(name, torch.stack(gradients).to(dtype))
    return torch.cat(losses)


def _groups(parameters: dict[str, nn.Parameter], n_sequences: int) -> Iterator[dict[str, nn.Parameter]]:
    """Yield parameters in groups whose gradients of single sequences fit the buffer, one at least."""
    group: dict[str, nn.Parameter] = {}
    for name, p in parameters.items():
        if group and n_sequences * (p.numel() + sum(q.numel() for q in group.values())) > BUFFER_ELEMENTS:
            yield group
            group = {}
        group[name] = p
    yield group


class _ForeignUse(TorchFunctionMode):
    """Notes a parameter that is used while no module that owns it runs: its gradient would be missed."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, *kwargs.values()) if kwargs else args:
            each = value if isinstance(value, (tuple, list)) else (value,)
            if any(type(x) is not torch.Tensor and isinstance(x, torch.Tensor) for x in each):
                self.recording.look_at(each, result)
        return result


@dataclass
class Recording:
    """Hooks on a model for one forward and one backward pass."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    n_sequences: int
    n_positions: int
    finish: Finish
    reason: str | None = None
    """Why gradients of single sequences cannot be told from this pass."""
    running: list[nn.Module] = field(default_factory=list)
    active: bool = False
    uses: dict[str, list[Use]] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    """Uses whose gradient has not arrived, by parameter."""
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find the owners of the parameters; a tied one has several."""
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.uses = {name: [] for name in self.parameters}
        self.missing = dict.fromkeys(self.parameters, 0)

    def owned(self, module: nn.Module) -> dict[str, str]:
        """Return the module's own wanted parameters: local name -> name in the model."""
        own = module._parameters.items()
        return {local: self.names[id(p)] for local, p in own if p is not None and id(p) in self.names}

    def __enter__(self) -> Recording:
        """Put the hooks in."""
        for module in self.model.modules():
            if self.owned(module):
                self.handles.append(module.register_forward_pre_hook(self._enter))
                self.handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks out and drop what was kept."""
        for handle in self.handles:
            handle.remove()
        self.uses.clear()

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Return loss_B with its graph."""
        self.active = True
        with _ForeignUse(self):
            loss_B = sequence_losses(self.model, inputs_BT, targets_BT)
        self.active = False
        check_finite(loss_B)
        return loss_B

    def backward(self, loss_B: torch.Tensor) -> None:
        """Finish every parameter: most in the backward pass, those without a path to the loss after it."""
        if loss_B.requires_grad:
            torch.autograd.backward(loss_B.sum())
        with torch.no_grad():
            for name in [*self.uses]:
                self._finish(name)

    def look_at(self, values: Sequence[Any], result: Any) -> None:
        """Note a wanted parameter among the arguments of a function that is not its module's."""
        if not self.active or not isinstance(result, (torch.Tensor, tuple, list)):
            return  # its data type or size was asked for
        for value in values:
            name = self.names.get(id(value))
            if name is not None and not any(p is value for module in self.running for p in module._parameters.values()):
                self.reason = f"{name} is used outside its module"

    def _enter(self, module: nn.Module, _: Any) -> None:
        if self.active:
            self.running.append(module)

    def _leave(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        """Keep a call and wait for its output's gradient."""
        if not self.active or self.reason is not None:
            return None
        self.active = False  # rules may run the module again
        try:
            return self._keep(module, arguments, keywords, output)
        finally:
            self.active = True
            self.running.pop()

    def _keep(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        kind = type(module).__name__
        if not isinstance(output, torch.Tensor) or output.ndim < 2 or not output.is_floating_point():
            self.reason = f"{kind} gives no tensor with a row a sequence"
            return None
        call = Call(module, arguments, keywords, output.detach(), self.n_sequences)
        rule = rule_for(call, self.n_positions)
        if rule is None:
            self.reason = f"rows of {kind} may not be sequences"
            return None
        if len(output) == 1:  # one row for all sequences, such as places: a row of its own gradient for each
            output = output.expand(self.n_sequences, *output.shape[1:])
        if not output.requires_grad:
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        owned = self.owned(module)
        for local, name in owned.items():
            self.uses[name].append(Use(call, local, rule))
            self.missing[name] += 1
        kept: torch.Tensor = output
        kept.register_hook(partial(self._arrived, call, [*owned.values()]))  # type: ignore[no-untyped-call]
        return kept

    def _arrived(self, call: Call, names: Sequence[str], gradient: torch.Tensor) -> None:
        """Take an output's gradient; visit the parameters for which it was the last."""
        with torch.no_grad():
            call.check_unchanged()
            call.gradient = gradient.detach()
            for name in names:
                self.missing[name] -= 1
                if not self.missing[name]:
                    self._finish(name)

    def _finish(self, name: str) -> None:
        uses = [use for use in self.uses.pop(name) if use.call.gradient is not None]
        self.finish(name, self.parameters[name], uses)
