"""The method contract: a continual-learning algorithm as a few optional seams that the loop calls.

Readable in five minutes. A method overrides what it uses of::

    attach(module)         put adapters into the model
    make_optimizer(...)    another optimizer than AdamW
    plan(stage)            mixture over stages, learning-rate schedule, optimizer policy
    begin_stage(ctx)       take an anchor, freeze a teacher
    review(ctx)            another mixture for what is left of the stage
    extra_loss(ctx, ...)   a term that needs autograd
    edit_gradients(ctx)    closed-form edit of the gradients, once per optimizer step, before clipping
    after_step(ctx)        proximal step, averaging, shrink-and-perturb
    end_stage(ctx)         estimate a Fisher, store an anchor
    release(ctx)           the weights to measure and ship, when they are not the training weights

It never sees the trainer, a distributed wrapper, or data it did not ask for: what it touches must stand in
``needs``, and ``Context`` refuses the rest. Its state is plain tensors and JSON. What it computes beyond the ordinary
step it bills with ``ctx.bill``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

from clbench.errors import ConfigError, NeedError

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]
"""Parameter name -> tensor, as in ``module.named_parameters()`` (tied weights once)."""


class Need(StrEnum):
    """What a method may touch beyond the current batch; undeclared needs are refused."""

    PAST_DATA = "past_data"
    """Training tokens of earlier stages (through the mixture or ``ctx.batches``)."""
    CURRENT_DATA = "current_data"
    """Training tokens of this stage besides the batches that the loop hands out (a Fisher pass)."""
    BASE_WEIGHTS = "base_weights"
    """The weights that the run started from."""
    OPTIMIZER_MOMENTS = "optimizer_moments"
    """Adam's moving averages."""
    STAGE_BOUNDARIES = "stage_boundaries"
    """To be told when a stage begins and ends."""
    SECOND_MODEL = "second_model"
    """A second copy of the model in memory (a teacher)."""
    CONTROL_DATA = "control_data"
    """Losses on rows of training text that are kept back from training (``ctx.control_loss``), to steer by."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a method is told about the stage it plans: places and sizes, never text."""

    index: int
    """1-based among the trained stages, as stage 0 is what the base saw."""
    n_stages: int
    """Stages of the stream, stage 0 included."""
    n_tokens: int
    """Target tokens that this stage trains on, whatever the mixture."""
    available_tokens: tuple[int, ...]
    """Training tokens that exist per stage 0..index."""
    learning_rate: float
    """The track's peak learning rate."""
    warmup_steps: int
    """The track's warm-up."""
    floor: float
    """The track's final learning rate, as a share of the peak."""
    seed: int = 0
    """The same for all stages of a run: for what a plan draws at random."""


class Schedule(Protocol):
    """Learning rate of one stage: ``schedule(step, n_steps)`` for step 0..n_steps-1."""

    def __call__(self, step: int, n_steps: int) -> float:
        """Return the learning rate of one optimizer step."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up over W steps, then a cosine from the peak to the floor (TiC-LM's cyclic cosine).

    ``lr(s) = peak (s+1)/W`` for s < W, else ``end + (peak - end)/2 (1 + cos(pi (s-W)/(S-W)))``, ``end = floor * peak``.
    """

    peak: float
    warmup_steps: int
    floor: float

    def __call__(self, step: int, n_steps: int) -> float:
        """Return the learning rate of step ``step`` of ``n_steps``."""
        warmup = min(self.warmup_steps, n_steps - 1)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        end = self.floor * self.peak
        progress = (step - warmup) / max(1, n_steps - warmup)
        return end + 0.5 * (self.peak - end) * (1 + math.cos(math.pi * progress))


def tail_steps(fraction: float, n_steps: int) -> int:
    """Return how many of a stage's steps its last ``fraction`` is: at least one, at most all."""
    return min(n_steps, max(1, round(fraction * n_steps)))


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A release that is trained on the side: the stage's last steps twice, once decaying for it, once to go on from.

    The loop leaves the main line ``tail_steps(fraction, n_steps)`` steps before the stage's end, trains these steps
    under ``schedule``, ends the stage there (``end_stage``, ``release``), puts everything back, and trains the same
    rows on the main line. So release and resume weights have both seen every token of the stage once, and what the
    branch cost stands in the ledger as ``decay_branch`` (WSD: Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4).
    """

    schedule: Schedule
    """In steps of the stage, like the main line's; only its last ones are asked for."""
    fraction: float
    """Share of the stage's steps."""


OptimizerPolicy = Literal["carry", "reset", "reset_first"]
"""Adam's state at a stage's start: kept, dropped, or kept without the first moments (the momentum)."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a method wants for one stage; None leaves it to the other components or to the track."""

    mixture: Mapping[int, float] | None = None
    """Stage -> share of the token budget (of the rows, where the track fixes the steps).

    Shares sum to 1, no stage is after the current one.
    """
    schedule: Schedule | None = None
    optimizer: OptimizerPolicy | None = None
    """Adam's moments at the stage's start; the track's default is reset, as in TiC-LM."""
    train: bool = True
    """False: the stage takes no optimizer step at all."""
    branch: Branch | None = None
    """Release weights that are trained apart from the weights that training goes on from."""
    pools: Mapping[int, int] | None = None
    """Stage -> how many of its tokens may be drawn, rounded up to a whole row; stages that are missing have no bound.

    The pool of a stage is what this run drew first when that stage was new, so a smaller one is part of a larger one.
    """
    excluded: frozenset[str] = frozenset()
    """Identities of documents (see ``clbench.stream.identity_of``) no token of which may be drawn from any stage."""
    review_steps: int | None = None
    """Ask ``review`` before every so many steps; rows are then drawn in the order of their pools."""


class Batch(Protocol):
    """One micro-batch of B rows and T positions."""

    @property
    def inputs_BT(self) -> torch.Tensor:
        """Token ids, int64."""
        ...

    @property
    def targets_BT(self) -> torch.Tensor:
        """The token after each input, int64; -100 where there is no target."""
        ...

    @property
    def source_B(self) -> torch.Tensor:
        """Stage that each row's text is from, int64."""
        ...

    @property
    def first_row(self) -> int:
        """Place of the batch's first row among the rows of the stage, in training order."""
        ...


class Context(Protocol):
    """What the loop hands to a seam. Everything a need guards raises NeedError when it was not declared."""

    stage: Stage
    step: int
    """Optimizer step of this stage, 0-based; the number of steps at ``end_stage``."""
    n_steps: int
    learning_rate: float

    @property
    def device(self) -> torch.device:
        """The training device."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """The bare causal language model (never a wrapper)."""
        ...

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the trained parameters by name, tied weights once."""
        ...

    def base_weights(self) -> Weights:
        """Return the weights the run started from, on the CPU (BASE_WEIGHTS)."""
        ...

    def optimizer_moments(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return Adam's (first, second) moments by parameter name (OPTIMIZER_MOMENTS)."""
        ...

    def second_model(self) -> torch.nn.Module:
        """Return a frozen copy of the model as it is now, in eval mode (SECOND_MODEL)."""
        ...

    def batches(self, stage: int, *, n_rows: int, name: str, rows_per_batch: int = 1) -> Iterator[Batch]:
        """Yield training rows of one stage for an extra pass, at most all of them (PAST_DATA or CURRENT_DATA).

        ``name`` makes the draw independent of the training order; ``rows_per_batch`` changes neither the rows nor
        their order. The tokens are billed by the caller.
        """
        ...

    def training_batches(self) -> Iterator[Batch]:
        """Yield the batches that this stage will train on, in order, before it does (CURRENT_DATA).

        Raises:
            ConfigError: the plan asks for reviews, so nobody knows them yet.
        """
        ...

    def tokens_drawn(self) -> dict[int, int]:
        """Return source stage -> target tokens that this stage has trained on so far."""
        ...

    def control_loss(self, stages: Sequence[int], *, n_rows: int, weights: Weights | None = None) -> dict[int, float]:
        """Return the loss on rows of past and present stages that are kept back from training (CONTROL_DATA).

        Args:
            stages: none after the current one. Of stage 0 the base has seen all rows.
            n_rows: rows of each stage, at most ``CONTROL_ROWS``.
            weights: measured instead of the present ones, which come back.

        Returns:
            Stage -> nats per token, in eval mode; billed as ``control``.
        """
        ...

    def seed(self, *names: int | str) -> int:
        """Return a seed for the method's own random stream, derived from run, stage, step and names."""
        ...

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        """Add work beyond the ordinary step to the ledger (teacher, fisher, decay_branch, merge …)."""
        ...

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a small float64 tensor over the processes that each hold a shard of the parameters.

        ``parameters`` yields local shards: a dot product over the model is one such sum. One process: ``values``.
        """
        ...

    def note(self, name: str, value: float) -> None:
        """Write down a figure that explains the method's doing in this stage; the last value counts.

        It stands in ``ledger.json`` and in MLflow as ``method/<method>/<name>``, at the stage.
        """
        ...

    def warn(self, text: str) -> None:
        """Tell the user, in one line; method and stage are put before it."""
        ...

    def forward_flops(self, n_tokens: int) -> float:
        """Return the FLOPs of one forward pass over ``n_tokens``; a backward pass costs twice that."""
        ...


class Method:
    """A continual-learning method; subclass it in one file, the file's name is the method's name."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """A docstring under each field is its help text."""

    needs: frozenset[Need] = frozenset()
    keeps_text: bool = False
    """Whether its state holds training text or what can be read back from it, where deletions cannot reach."""
    name: str = ""
    """Set by the registry."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    def attach(self, module: torch.nn.Module, seed: int) -> None:
        """Put adapters into a model in place, before anything else; called again when a run is resumed.

        Parameters that need no gradient are not trained. ``release`` has to give back the model's own weight names.
        """

    def make_optimizer(
        self, groups: list[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer | None:
        """Return the optimizer of parameter groups (each with its ``weight_decay``), or None for AdamW.

        The loop sets ``lr`` of every group before every step, and saves the tensors in its ``state`` of each parameter.
        """
        return None

    def plan(self, stage: Stage) -> StagePlan:
        """Return what this method wants for one stage.

        A function of the options, the stage and state that does not change within a stage: a resumed run asks again.
        """
        return StagePlan()

    def begin_stage(self, ctx: Context) -> None:
        """Prepare for a stage (STAGE_BOUNDARIES)."""

    def review(self, ctx: Context) -> StagePlan | None:
        """Return a plan whose mixture and pools hold from this step on, or None to leave them; see ``review_steps``."""
        return None

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> torch.Tensor | None:
        """Return a term per target token, summed over the micro-batch in nats; the loop divides it like the loss."""
        return None

    def edit_gradients(self, ctx: Context) -> None:
        """Edit ``parameter.grad`` in place: the mean-loss gradient of the whole batch, before clipping."""

    def after_step(self, ctx: Context) -> None:
        """Act on the parameters after an optimizer step."""

    def end_stage(self, ctx: Context) -> None:
        """Finish a stage (STAGE_BOUNDARIES)."""

    def release(self, ctx: Context, weights: Weights) -> Weights:
        """Return the weights to measure and ship; ``weights`` are what the component before released."""
        return weights

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return (tensors, JSON-able values) that a resumed run needs."""
        return {}, {}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned, also on a method that has run: nothing of its own state may stay."""

    def overrides(self, seam: str) -> bool:
        """Return whether this method implements a seam."""
        return getattr(type(self), seam) is not getattr(Method, seam)


def option_fields(method: type[Method]) -> dict[str, Any]:
    """Return the option names of a method class with their defaults."""
    return {field.name: field.default for field in fields(method.Options)}


class Composed:
    """Several methods as one: plans merge, penalties add, releases chain in order.

    Raises:
        ConfigError: two components set the same part of one stage's plan, or the optimizer.
        NeedError: a component implements a stage seam without declaring STAGE_BOUNDARIES.
    """

    def __init__(self, components: Sequence[Method]) -> None:
        self.components = list(components)
        for method in self.components:
            at_boundaries = [seam for seam in ("begin_stage", "end_stage") if method.overrides(seam)]
            if at_boundaries and Need.STAGE_BOUNDARIES not in method.needs:
                raise NeedError(
                    f"method {method.name!r} implements {' and '.join(at_boundaries)}",
                    mend="declare needs = frozenset({Need.STAGE_BOUNDARIES})",
                )

    def needs(self, need: Need) -> bool:
        """Return whether any component declares a need."""
        return any(need in method.needs for method in self.components)

    def attach(self, module: torch.nn.Module, seed: int) -> bool:
        """Let the components put their adapters into a model; returns whether any did."""
        attaching = [method for method in self.components if method.overrides("attach")]
        for method in attaching:
            method.attach(module, seed)
        return bool(attaching)

    def make_optimizer(
        self, groups: list[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer | None:
        """Return the optimizer of the one component that makes one, or None."""
        owners = [method for method in self.components if method.overrides("make_optimizer")]
        if len(owners) > 1:
            names = " and ".join(repr(method.name) for method in owners)
            raise ConfigError(f"methods {names} both make the optimizer", mend="compose at most one of them")
        return owners[0].make_optimizer(groups, learning_rate=learning_rate, betas=betas) if owners else None

    def plan(self, stage: Stage) -> StagePlan:
        """Merge the components' plans and check the mixture against their needs."""
        return self._merge([(method, method.plan(stage)) for method in self.components], stage)

    def review(self, contexts: Mapping[int, Context], stage: Stage) -> StagePlan | None:
        """Merge what the components that review want from now on, or return None."""
        found = [
            (method, method.review(contexts[i]))
            for i, method in enumerate(self.components)
            if method.overrides("review")
        ]
        plans = [(method, plan) for method, plan in found if plan is not None]
        return self._merge(plans, stage) if plans else None

    def _merge(self, plans: list[tuple[Method, StagePlan]], stage: Stage) -> StagePlan:
        mixture = self._only(plans, "mixture")
        if mixture is not None:
            check_mixture(mixture, stage)
            owner = next(method for method, plan in plans if plan.mixture is not None)
            past = [i for i, share in mixture.items() if i < stage.index and share > 0]
            if past and Need.PAST_DATA not in owner.needs:
                raise NeedError(
                    f"method {owner.name!r} mixes in past stages {past} without declaring past_data",
                    where=f"stage {stage.index}",
                    mend="declare needs = frozenset({Need.PAST_DATA})",
                )
        merged = StagePlan(
            mixture=mixture,
            schedule=self._only(plans, "schedule"),
            optimizer=self._only(plans, "optimizer"),
            train=all(plan.train for _, plan in plans),
            branch=self._only(plans, "branch"),
            pools=self._pools(plans),
            excluded=frozenset[str]().union(*(plan.excluded for _, plan in plans)),
            review_steps=self._only(plans, "review_steps"),
        )
        keeper = next((method.name for method in self.components if method.keeps_text), None)
        if merged.excluded and keeper is not None:
            raise ConfigError(
                f"method {keeper!r} keeps text of its own, which deletions cannot reach",
                mend="replay with a method that draws anew, such as replay-buffer",
            )
        if merged.branch is not None and merged.review_steps is not None:
            raise ConfigError(
                "a branch and reviews cannot be composed: the branch's rows have to be known before",
                mend="take a schedule without a branch, such as wsd-s",
            )
        return merged

    @staticmethod
    def _pools(plans: list[tuple[Method, StagePlan]]) -> dict[int, int] | None:
        """Return the pools of all components; a stage that two of them bound is refused."""
        merged: dict[int, int] = {}
        for method, plan in plans:
            if twice := sorted(merged.keys() & (plan.pools or {}).keys()):
                raise ConfigError(
                    f"method {method.name!r} bounds stage {twice[0]}, as another one does", mend="drop one"
                )
            merged |= plan.pools or {}
        return merged or None

    @staticmethod
    def _only(plans: list[tuple[Method, StagePlan]], part: str) -> Any:
        owners = [(method.name, getattr(plan, part)) for method, plan in plans if getattr(plan, part) is not None]
        if len(owners) > 1:
            names = " and ".join(repr(name) for name, _ in owners)
            what = part.replace("_", " ")
            raise ConfigError(f"methods {names} both set the {what}", mend="compose at most one of them")
        return owners[0][1] if owners else None

    def extra_loss(
        self, contexts: Mapping[int, Context], batch: Batch, logits_BTV: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the sum of the components' terms, or None."""
        terms = [m.extra_loss(contexts[i], batch, logits_BTV) for i, m in enumerate(self.components)]
        present = [term for term in terms if term is not None]
        return sum(present[1:], start=present[0]) if present else None

    def each(self, seam: str, contexts: Mapping[int, Context]) -> None:
        """Call a seam that returns nothing on every component that implements it, in order."""
        for i, method in enumerate(self.components):
            if method.overrides(seam):
                call: Callable[[Context], None] = getattr(method, seam)
                call(contexts[i])

    def release(self, contexts: Mapping[int, Context], weights: Weights) -> Weights:
        """Chain the components' releases."""
        for i, method in enumerate(self.components):
            weights = method.release(contexts[i], weights)
        return weights

    def state_dict(self) -> tuple[Weights, list[dict[str, Any]]]:
        """Return all tensors, prefixed by the component's place, and one JSON object a component."""
        tensors: Weights = {}
        values: list[dict[str, Any]] = []
        for i, method in enumerate(self.components):
            own_tensors, own_values = method.state_dict()
            tensors |= {f"{i}.{key}": tensor for key, tensor in own_tensors.items()}
            values.append(own_values)
        return tensors, values

    def load_state_dict(self, tensors: Weights, values: list[dict[str, Any]]) -> None:
        """Hand each component what it had saved."""
        for i, method in enumerate(self.components):
            prefix = f"{i}."
            own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            method.load_state_dict(own, values[i])


def check_mixture(mixture: Mapping[int, float], stage: Stage) -> None:
    """Raise ConfigError unless the shares are a distribution over stages 0..stage.index."""
    where = f"stage {stage.index}"
    if any(i > stage.index or i < 0 for i in mixture):
        raise ConfigError(
            f"the mixture {dict(mixture)} names a stage that has not happened yet",
            where=where,
            mend="mix past stages only",
        )
    if any(not 0 <= share <= 1 for share in mixture.values()) or not math.isclose(
        sum(mixture.values()), 1.0, rel_tol=0, abs_tol=1e-9
    ):
        raise ConfigError(
            f"the shares of the mixture {dict(mixture)} do not sum to 1", where=where, mend="normalise them"
        )
