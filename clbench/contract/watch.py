"""A method under observation: every seam call is passed on, and what it touches is written down.

The checks of ``methods`` read the notes. Nothing here changes a number of the run.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import safetensors.torch
import torch

from clbench.contract.guards import moved, random_states
from clbench.contract.problems import ContractError, describe
from clbench.errors import ClbenchError
from clbench.method import (
    Batch,
    Context,
    Method,
    Need,
    OptimizerPolicy,
    Stage,
    StagePlan,
    Weights,
    check_mixture,
)
from clbench.train.data import IGNORE
from clbench.train.models import copy_weights, model_forward_flops, weights_of

CONTEXT = {name for name in (*vars(Context), *Context.__annotations__) if not name.startswith("_")}
LOOPS_OWN = ("train", "evaluate")
"""Purposes in the ledger that are the engine's."""


class AskedNeeds(frozenset[Need]):
    """Declared needs that remember which of them the engine asked about."""

    asked: set[Need]

    def __contains__(self, need: object) -> bool:
        if isinstance(need, Need):
            self.asked.add(need)
        return super().__contains__(need)


@dataclass
class Notes:
    """What was seen in one run."""

    needs: AskedNeeds
    inside: str = ""
    """The seam that is being called, empty in between."""
    plan: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    release: list[str] = field(default_factory=list)
    manners: list[str] = field(default_factory=list)
    hidden_copies: list[str] = field(default_factory=list)
    bill: list[str] = field(default_factory=list)
    flops_billed: float = 0.0
    flops_seen: dict[str, float] = field(default_factory=dict)
    """Seam -> FLOPs of forward and backward passes that it started, by the ledger's formula."""
    states: list[tuple[Weights, dict[str, Any]]] = field(default_factory=list)
    """Every state that was saved."""
    known_tokens: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    """Address of a batch's inputs -> the tensor and its target tokens; padding costs nothing."""


class WatchedContext:
    """Passes on what ``clbench.method.Context`` has and refuses the rest."""

    def __init__(self, context: Any, notes: Notes) -> None:
        object.__setattr__(self, "_context", context)
        object.__setattr__(self, "_notes", notes)

    def __getattr__(self, name: str) -> Any:
        if name in CONTEXT:
            return getattr(self._context, name)
        if name.startswith("__"):
            raise AttributeError(name)
        raise ContractError(
            f"{self._notes.inside} reads ctx.{name}, which is no part of clbench.method.Context",
            mend=f"use what the contract has: {', '.join(sorted(CONTEXT))}",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise ContractError(f"{self._notes.inside} sets ctx.{name}", mend="keep state on the method, in state_dict")

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        """Pass the bill on and add it up."""
        if purpose in LOOPS_OWN:
            self._notes.bill.append(f"bills its own work as {purpose!r}, which is the loop's own purpose")
        if not (math.isfinite(flops) and flops >= 0):
            self._notes.bill.append(f"bills {flops} FLOPs as {purpose!r}")
        self._notes.flops_billed += flops
        self._context.bill(purpose, flops=flops, n_tokens=n_tokens)

    def batches(self, stage: int, *, n_rows: int, name: str, rows_per_batch: int = 1) -> Iterator[Batch]:
        """Pass batches on and remember how many of their tokens are real."""
        for batch in self._context.batches(stage, n_rows=n_rows, name=name, rows_per_batch=rows_per_batch):
            remember(self._notes, batch)
            yield batch

    def training_batches(self) -> Iterator[Batch]:
        """Pass batches on and remember how many of their tokens are real."""
        for batch in self._context.training_batches():
            remember(self._notes, batch)
            yield batch

    def control_loss(self, stages: Sequence[int], *, n_rows: int, weights: Weights | None = None) -> dict[int, float]:
        """Pass the measurement on; it bills itself, so its passes are not the method's to bill."""
        inside, self._notes.inside = self._notes.inside, ""
        try:
            losses: dict[int, float] = self._context.control_loss(stages, n_rows=n_rows, weights=weights)
        finally:
            self._notes.inside = inside
        return losses


def remember(notes: Notes, batch: Batch) -> None:
    """Note how many target tokens a batch holds."""
    n_targets = int((batch.targets_BT != IGNORE).sum())
    notes.known_tokens[batch.inputs_BT.data_ptr()] = (batch.inputs_BT, n_targets)


class Watched(Method):
    """A method whose every call is observed; takes its place in a composition."""

    def __init__(self, inner: Method, model: torch.nn.Module) -> None:
        self.inner, self.model, self.trained = inner, model, model
        self.name, self.options, self.keeps_text = inner.name, inner.options, inner.keeps_text
        self.needs = AskedNeeds(inner.needs)
        self.needs.asked = set()
        self.notes = Notes(self.needs)

    def overrides(self, seam: str) -> bool:
        """Return whether the method itself implements a seam."""
        return self.inner.overrides(seam)

    @contextmanager
    def _watching(self, seam: str, context: Any = None) -> Iterator[Any]:
        """Observe one call; yields the context to hand over."""
        notes = self.notes
        where = seam if context is None else f"{seam}, stage {context.stage.index}, step {context.step}"
        before, training = random_states(), self.trained.training
        notes.inside = seam
        try:
            yield None if context is None else WatchedContext(context, notes)
        finally:
            notes.inside = ""
            notes.known_tokens.clear()
        if libraries := moved(before):
            notes.random.append(f"{where}: {' and '.join(libraries)}")
        if self.trained.training != training:
            notes.manners.append(f"{where} leaves the model in {'train' if self.trained.training else 'eval'} mode")
            self.trained.train(training)

    def plan(self, stage: Stage) -> StagePlan:
        """Plan twice and compare; note what is wrong with the plan."""
        where = f"stage {stage.index}"
        with self._watching("plan"):
            before = comparable(self.inner.state_dict())
            first, second = self.inner.plan(stage), self.inner.plan(stage)
            if comparable(self.inner.state_dict()) != before:
                self.notes.plan.append(f"{where}: plan() changes the method's state")
        if not isinstance(first, StagePlan):
            raise ContractError(f"plan() returns {type(first).__name__}", where=where, mend="return a StagePlan")
        if _plan_values(first) != _plan_values(second):
            self.notes.plan.append(f"{where}: plan() called twice gives two plans")
        self.notes.plan += [f"{where}: {problem}" for problem in _plan_problems(first, stage)]
        return first

    def attach(self, module: torch.nn.Module, seed: int) -> None:
        """Observe ``attach``; from now on the module with the adapters is the one that is trained."""
        with self._watching("attach"):
            self.inner.attach(module, seed)
        self.trained = module

    def make_optimizer(
        self, groups: list[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer | None:
        """Pass the optimizer on."""
        with self._watching("make_optimizer"):
            return self.inner.make_optimizer(groups, learning_rate=learning_rate, betas=betas)

    def review(self, ctx: Context) -> StagePlan | None:
        """Observe ``review`` and note what is wrong with the new plan."""
        with self._watching("review", ctx) as watched:
            plan = self.inner.review(watched)
        if plan is not None and not isinstance(plan, StagePlan):
            raise ContractError(f"review() returns {type(plan).__name__}", mend="return a StagePlan or None")
        if plan is not None:
            where = f"stage {ctx.stage.index}, step {ctx.step}"
            self.notes.plan += [f"{where}: {problem}" for problem in _plan_problems(plan, ctx.stage)]
        return plan

    def begin_stage(self, ctx: Context) -> None:
        """Observe ``begin_stage``."""
        with self._watching("begin_stage", ctx) as watched:
            self.inner.begin_stage(watched)

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> torch.Tensor | None:
        """Observe ``extra_loss``."""
        with self._watching("extra_loss", ctx) as watched:
            remember(self.notes, batch)
            term = self.inner.extra_loss(watched, batch, logits_BTV)
        if term is not None and (not isinstance(term, torch.Tensor) or term.ndim != 0):
            shape = tuple(term.shape) if isinstance(term, torch.Tensor) else type(term).__name__
            raise ContractError(f"extra_loss returns {shape}", mend="return a scalar tensor in nats, summed, or None")
        return term

    def edit_gradients(self, ctx: Context) -> None:
        """Observe ``edit_gradients``."""
        with self._watching("edit_gradients", ctx) as watched:
            self.inner.edit_gradients(watched)

    def after_step(self, ctx: Context) -> None:
        """Observe ``after_step``."""
        with self._watching("after_step", ctx) as watched:
            self.inner.after_step(watched)

    def end_stage(self, ctx: Context) -> None:
        """Observe ``end_stage``."""
        with self._watching("end_stage", ctx) as watched:
            self.inner.end_stage(watched)

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Observe ``release``: training weights must stay, and what is released must fit the model."""
        where, own = f"stage {ctx.stage.index}", weights_of(self.model)
        before = copy_weights(weights_of(self.trained))
        with self._watching("release", ctx) as watched:
            released = self.inner.release(watched, weights)
        if any(not torch.equal(before[name], tensor.cpu()) for name, tensor in weights_of(self.trained).items()):
            self.notes.release.append(f"{where}: release() changes the training weights; change only what it returns")
        self.notes.release += [f"{where}: {problem}" for problem in _release_problems(released, own)]
        return released

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Observe ``state_dict``: note what could not be saved or would not come back equal."""
        with self._watching("state_dict"):
            state = self.inner.state_dict()
        problems = state_problems(state, self.trained)
        self.notes.state += problems
        if not problems:
            self.notes.states.append((copy_weights(state[0]), copy.deepcopy(state[1])))
        return state

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Pass ``load_state_dict`` on."""
        self.inner.load_state_dict(tensors, values)


def comparable(state: Any) -> Any:
    """Return a nested state with tensors as (type, shape, bytes), to be compared with ``==``."""
    if isinstance(state, torch.Tensor):
        flat = state.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return (str(state.dtype), tuple(state.shape), flat.numpy().tobytes())
    if isinstance(state, Mapping):
        return {key: comparable(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [comparable(value) for value in state]
    return state


def _plan_values(plan: StagePlan) -> Any:
    """Return what a plan comes to; schedules are compared by their learning rates."""
    rates = [plan.schedule(step, 7) for step in range(7)] if plan.schedule is not None else None
    branch = (plan.branch.fraction, [plan.branch.schedule(step, 7) for step in range(7)]) if plan.branch else None
    parts = (dict(part) if part is not None else None for part in (plan.mixture, plan.pools))
    return *parts, rates, plan.optimizer, plan.train, branch, plan.excluded, plan.review_steps


def _plan_problems(plan: StagePlan, stage: Stage) -> list[str]:
    problems = []
    if plan.mixture is not None:
        try:
            check_mixture(plan.mixture, stage)
        except ClbenchError as error:
            problems.append(error.what)
        empty = [i for i, share in plan.mixture.items() if share > 0 and not 0 <= i <= stage.index]
        problems += [f"the mixture names stage {i}" for i in empty if not problems]
    policies = (None, *get_args(OptimizerPolicy))
    if plan.optimizer not in policies:
        problems.append(f"the optimizer policy is {plan.optimizer!r}, not one of {policies}")
    if plan.branch is not None and not 0 < plan.branch.fraction <= 1:
        problems.append(f"the branch takes a share of {plan.branch.fraction} of the stage")
    if plan.review_steps is not None and plan.review_steps < 1:
        problems.append(f"reviews every {plan.review_steps} steps")
    for source, n_tokens in (plan.pools or {}).items():
        if not 0 <= source <= stage.index:
            problems.append(f"the pools name stage {source}")
        elif n_tokens < 1:
            problems.append(f"the pool of stage {source} holds {n_tokens} tokens; leave it out of the mixture instead")
    for schedule in (plan.schedule, plan.branch.schedule if plan.branch is not None else None):
        for n_steps in (1, 2, 50) if schedule is not None else ():
            assert schedule is not None
            rates = [schedule(step, n_steps) for step in range(n_steps)]
            if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
                problems.append(f"the schedule gives {min(rates)} as a learning rate in a stage of {n_steps} steps")
                break
    return problems


def _release_problems(released: Any, own: Weights) -> list[str]:
    """Return what keeps released weights from being the model's."""
    if not isinstance(released, dict):
        return [f"release() returns {type(released).__name__}, not a dict of tensors"]
    for name in sorted(own.keys() - released.keys()):
        return [f"the release lacks {name} ({len(own.keys() - released.keys())} of {len(own)} weights are missing)"]
    for name in sorted(released.keys() - own.keys()):
        return [f"the release holds {name}, which the model does not have"]
    for name, tensor in released.items():
        if tensor.shape != own[name].shape:
            return [f"{name} has shape {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}"]
        if tensor.dtype != own[name].dtype:
            return [f"{name} is {tensor.dtype}, in the model {own[name].dtype}"]
        if not bool(torch.isfinite(tensor).all()):
            return [f"{name} holds values that are not finite"]
    return []


def state_problems(state: Any, model: torch.nn.Module) -> list[str]:
    """Return what keeps a state from being saved as safetensors and JSON and coming back the same."""
    if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, dict) for part in state)):
        return ["state_dict() must return (dict of tensors, dict of JSON-able values)"]
    tensors, values = state
    live = {p.data_ptr(): name for name, p in model.named_parameters()}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            return [f"the tensor key {name!r} is not text"]
        if type(tensor) is not torch.Tensor or tensor.requires_grad:
            return [f"tensors[{name!r}] is {type(tensor).__name__}, not a plain detached torch.Tensor"]
        if tensor.numel() and tensor.data_ptr() in live:
            return [f"tensors[{name!r}] is the live parameter {live[tensor.data_ptr()]}, not a copy: clone() it"]
        if tensor.dtype == torch.uint8 and looks_pickled(bytes(tensor.flatten().tolist())):
            return [f"tensors[{name!r}] holds pickled bytes"]
    try:
        safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    except (RuntimeError, ValueError) as error:
        return [f"its tensors cannot be saved as safetensors: {describe(error).splitlines()[0]}"]
    return [f"values{problem}" for problem in json_problems(values)][:1]


def json_problems(value: Any, path: str = "") -> Iterator[str]:
    """Yield where a value would not come back from JSON as it was."""
    if isinstance(value, str):
        if value.startswith("gASV") or looks_pickled(value.encode("latin-1", "replace")):
            yield f"{path} holds a pickled object"
    elif isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                yield f"{path} has the key {key!r}, which JSON would turn into text"
            yield from json_problems(part, f"{path}[{key!r}]")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from json_problems(part, f"{path}[{i}]")
    elif isinstance(value, bytes | bytearray):
        kind = "a pickled object" if looks_pickled(bytes(value)) else "bytes"
        yield f"{path} holds {kind}, not JSON-able values"
    elif not (value is None or isinstance(value, bool | int | float)):
        yield f"{path} holds {type(value).__name__}, which JSON does not give back"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {json.dumps(value)}, which JSON has no word for"


def looks_pickled(data: bytes) -> bool:
    """Return whether bytes begin and end as a pickle of protocol 2 to 5 does."""
    return len(data) > 3 and data[0] == 0x80 and data[1] in (2, 3, 4, 5) and data.rstrip(b"\0")[-1:] == b"."


def watch_passes(model: torch.nn.Module, watched: Watched, length: int) -> None:
    """Count what every forward and backward pass that a seam starts costs, copies of the model included.

    FLOPs are those of the ledger's formula, so a method that bills ``ctx.forward_flops`` of its tokens has billed all.
    """
    notes = watched.notes
    body: Any = model.base_model
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head = 2.0 * embedding.weight.numel()
    depth = [0]

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        depth[0] += 1

    def after(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        depth[0] -= 1
        if depth[0] or not notes.inside:
            return
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            inputs = kwargs["inputs_embeds"][..., 0]
        n_tokens = _n_tokens(notes, inputs)
        flops = model_forward_flops(model, n_tokens, length)
        if not hasattr(output, "logits"):
            flops -= head * n_tokens
        own = (model, body, watched.trained, watched.trained.base_model)
        if not any(module is one for one in own) and Need.SECOND_MODEL not in notes.needs.asked:
            notes.hidden_copies.append(notes.inside)
        _count(notes, notes.inside, flops)
        out = output.logits if hasattr(output, "logits") else output[0]
        if out.requires_grad:
            seam = notes.inside
            out.register_hook(lambda gradient: _count(notes, f"{seam} (backward)", 2 * flops))

    for module in (model, body):
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True, always_call=True)


def _n_tokens(notes: Notes, inputs: torch.Tensor) -> int:
    """Return the target tokens of a batch that was handed out, or the size of any other input."""
    try:
        return notes.known_tokens[inputs.data_ptr()][1]
    except (KeyError, RuntimeError):  # RuntimeError: inside vmap a tensor has no address
        return inputs.numel()


def _count(notes: Notes, seam: str, flops: float) -> None:
    notes.flops_seen[seam] = notes.flops_seen.get(seam, 0.0) + flops


def option_values(method: Method) -> dict[str, Any]:
    """Return the options of a method as a dict, empty when they are no dataclass."""
    try:
        return asdict(method.options)
    except TypeError:
        return {}
