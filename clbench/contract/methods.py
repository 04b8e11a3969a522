"""The checks of a method: each one function that raises ContractError with what is wrong and how to mend it.

All read the same few runs of the real loop on generated text, made when first asked for and kept in the case.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import safetensors.torch

from clbench import registry
from clbench.contract.guards import moved, random_states
from clbench.contract.lab import Lab, Place, Trace
from clbench.contract.problems import ContractError, NotChecked, describe, is_frozen_dataclass
from clbench.contract.watch import Watched, comparable, json_problems, option_values, watch_passes
from clbench.errors import NeedError
from clbench.listing import docs_of_fields
from clbench.method import Branch, Method, Need, Stage, StagePlan, Weights

MATRIX_TOLERANCE_NATS = 0.01
"""Between one and four micro-batches: rounding moves a loss by about 1e-5 here, a forgotten division by far more."""
GRAD_NORM_TOLERANCE = 0.01
BILLED_SHARE = 0.95
"""FLOPs billed of those seen; the rest is room for padding that is counted differently."""


@dataclass
class MethodCase:
    """One method under test.

    Args:
        lab: where it runs.
        label: how messages call it.
        make: returns a new method object with the options under test.
    """

    lab: Lab
    label: str
    make: Callable[[], Method]
    options_before: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, lab: Lab, spec: str) -> MethodCase:
        """Return the case of ``NAME``, ``file.py[:Class]`` or ``module:Class``, each with ``:option=value`` or not."""
        return cls(lab, spec, lambda: registry.make_method(spec).method)

    @cached_property
    def watched(self) -> tuple[Watched, Trace | None, Exception | None]:
        """The observed run with seed 0, saved after every step: the method's notes, and the trace or the error."""
        model = copy.deepcopy(self.lab.base)
        try:
            inner = self.make()
        except Exception as error:
            raise NotChecked from error
        self.options_before = copy.deepcopy(option_values(inner))
        watched = Watched(inner, model)
        watch_passes(model, watched, self.lab.length)
        try:
            return watched, self.lab.train([watched], model=model, checkpoint_seconds=0.0), None
        except Exception as error:  # reported by one of the checks below
            return watched, None, error

    @property
    def run(self) -> tuple[Watched, Trace]:
        """The observed run, which has to be whole and sound: other runs are compared with it.

        Raises:
            NotChecked: it was not finished, or its plans, states or releases are wrong.
        """
        watched, trace, error = self.watched
        if trace is None or watched.notes.plan or watched.notes.state or watched.notes.release:
            raise NotChecked from error
        return watched, trace

    @property
    def trains(self) -> bool:
        """Whether it took any optimizer step."""
        return sum(self.run[1].n_steps.values()) > 0

    def other_run(self, what: str, methods: Sequence[Method] | None = None, **how: Any) -> Trace:
        """Return another run; whatever stops it is a broken contract, as the first one went through."""
        _ = self.run
        try:
            return self.lab.train(methods or [self.make()], **how)
        except Exception as error:
            raise self.broken(f"{what} stops with {describe(error, type(self.make()))}") from error

    def broken(self, what: str, mend: str | None = None) -> ContractError:
        """Return the error of a broken promise of this method."""
        return ContractError(what, where=self.label, mend=mend)


def check_options(case: MethodCase) -> None:
    """Options are a frozen dataclass with plain defaults, each field documented and fit for ``run.yaml``."""
    try:
        cls = type(case.make())
    except Exception as error:
        raise case.broken(
            f"it cannot be constructed: {describe(error)}", "take one options object in __init__, or define no __init__"
        ) from error
    options: Any = cls.Options
    if not is_frozen_dataclass(options):
        raise case.broken("Options is no frozen dataclass", "write @dataclass(frozen=True, kw_only=True) above it")
    docs = docs_of_fields(options)
    for one in dataclasses.fields(options):
        if one.default is dataclasses.MISSING:
            raise case.broken(f"option {one.name} has no plain default", "give it a number, text, True, False or None")
        if not docs.get(one.name):
            raise case.broken(f"option {one.name} has no help", 'write """What it does, in which unit.""" under it')
        for problem in json_problems(one.default, f"option {one.name}"):
            raise case.broken(problem, "options stand in run.yaml: use numbers, text, True, False or None")
    if not (cls.__doc__ or "").strip():
        raise case.broken("the class has no docstring", "say in one sentence what the method does")


def check_constructs(case: MethodCase) -> None:
    """It is built from its default options alone, and building it draws no random number."""
    before = random_states()
    try:
        method = case.make()
        default = type(method)()
    except Exception as error:
        raise case.broken(
            f"it cannot be constructed: {describe(error)}", "every option needs a default that works"
        ) from error
    if libraries := moved(before):
        raise case.broken(f"building it uses the global random state of {' and '.join(libraries)}", RANDOM_MEND)
    if not isinstance(method.needs, frozenset) or not all(isinstance(need, Need) for need in method.needs):
        raise case.broken("needs is no frozenset of Need", "write needs = frozenset({Need.PAST_DATA})")
    if type(default.options) is not type(method).Options:
        raise case.broken("self.options is no Options object", "call super().__init__(options)")


def check_plan(case: MethodCase) -> None:
    """``plan`` is pure, mixes only what has happened, in shares that sum to 1; budgets are met to the token."""
    watched, trace, error = case.watched
    if watched.notes.plan:
        raise case.broken(watched.notes.plan[0], "plan() must be a pure function of options, state and stage")
    if trace is None:
        raise NotChecked from error
    for stage in case.lab.stages:
        spent = sum(trace.ledger["tokens"].get(str(stage.index), {}).values())
        if spent != (stage.n_tokens if trace.n_steps[stage.index] else 0):
            raise case.broken(f"stage {stage.index} trained on {spent} tokens, not {stage.n_tokens}")


def check_needs(case: MethodCase) -> None:
    """What it touches is declared, and what is declared was used."""
    watched, trace, error = case.watched
    if isinstance(error, NeedError):
        raise case.broken(error.what, error.mend) from error
    if watched.notes.hidden_copies:
        raise case.broken(
            f"{watched.notes.hidden_copies[0]} runs a copy of the model that it made itself",
            "get it from ctx.second_model() and declare Need.SECOND_MODEL",
        )
    if trace is None:
        raise NotChecked from error
    unused = sorted(need.name for need in watched.needs - watched.notes.needs.asked)
    if unused:
        raise case.broken(
            f"it declares {' and '.join(unused)} and never used it in a run over {len(case.lab.stages)} stages",
            "drop it; if only some options need it, set self.needs in __init__ and check with those options",
        )


def check_context(case: MethodCase) -> None:
    """It touches only what the contract of ``Context`` has, and leaves the model in training mode."""
    watched, trace, error = case.watched
    if isinstance(error, ContractError):
        raise case.broken(error.what, error.mend) from error
    if watched.notes.manners:
        raise case.broken(watched.notes.manners[0], "put the mode back")
    if trace is None:
        raise NotChecked from error


def check_state(case: MethodCase) -> None:
    """State is plain tensors and JSON, holds no pickled object, and comes back equal from its files."""
    watched, trace, error = case.watched
    if watched.notes.state:
        raise case.broken(
            f"state_dict(): {watched.notes.state[0]}",
            "return tensors and JSON-able values, and rebuild objects in load_state_dict",
        )
    if trace is None:
        raise NotChecked from error
    for tensors, values in watched.notes.states[:: max(1, len(watched.notes.states) // 4)]:
        fresh = case.make()
        try:
            fresh.load_state_dict(
                safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(values))
            )
            again = fresh.state_dict()
        except Exception as problem:
            raise case.broken(f"its own state cannot be loaded: {describe(problem, type(fresh))}") from problem
        if comparable(again) != comparable((tensors, values)):
            key = _first_difference(again, (tensors, values))
            raise case.broken(
                f"load_state_dict() then state_dict() gives another state: {key} differs",
                "take back everything that was saved",
            )


def check_runs(case: MethodCase) -> None:
    """A whole run goes through; errors that another check reports are left to it."""
    watched, trace, error = case.watched
    notes = watched.notes
    elsewhere = isinstance(error, NeedError | ContractError) or notes.plan or notes.state or notes.release
    if trace is None and not elsewhere:
        assert error is not None
        raise case.broken(f"the run stops with {describe(error, type(watched.inner))}") from error
    if option_values(watched.inner) != case.options_before:
        raise case.broken("it changes its own options while it runs", "copy what changes to an attribute of its own")


def check_billing(case: MethodCase) -> None:
    """Every forward and backward pass beyond the ordinary ones is covered by ``ctx.bill``."""
    notes = case.run[0].notes
    if notes.bill:
        raise case.broken(
            f"it {notes.bill[0]}", "bill finite FLOPs under a purpose of its own: teacher, fisher, merge …"
        )
    seen = sum(notes.flops_seen.values())
    if notes.flops_billed < BILLED_SHARE * seen:
        worst = max(notes.flops_seen, key=lambda seam: notes.flops_seen[seam])
        raise case.broken(
            f"beyond the ordinary step it ran model passes of {seen:.3g} FLOPs, most in {worst}, "
            f"and billed {notes.flops_billed:.3g}",
            "call ctx.bill(purpose, flops=ctx.forward_flops(n_tokens)) for every forward pass, "
            "three times that if a backward pass follows",
        )


RANDOM_MEND = "draw from torch.Generator().manual_seed(ctx.seed('what for')) and pass generator=…"


def check_random(case: MethodCase) -> None:
    """No seam touches the global random states of torch, numpy or Python."""
    watched, trace, error = case.watched
    if watched.notes.random:
        raise case.broken(f"it uses a global random state ({watched.notes.random[0]})", RANDOM_MEND)
    if trace is None:
        raise NotChecked from error


def check_release(case: MethodCase) -> None:
    """What is released has the model's names, shapes and types, is finite, and leaves the training weights alone."""
    watched, trace, error = case.watched
    if watched.notes.release:
        raise case.broken(
            watched.notes.release[0], "start from dict(weights) and replace tensors by tensors of the same shape"
        )
    if trace is None:
        raise NotChecked from error


def check_same_seed(case: MethodCase) -> None:
    """The same seed gives the same bits."""
    trace = case.run[1]
    _expect_equal(case, trace, case.other_run("a second run"), "the same seed twice gives different runs", RANDOM_MEND)


def check_other_seed(case: MethodCase) -> None:
    """Another seed gives another run, unless the method never trains."""
    trace = case.run[1]
    other = case.other_run("a run with another seed", seed=1, n_stages=1)
    if case.trains and comparable(other.releases[1]) == comparable(trace.releases[1]):
        raise case.broken("seeds 0 and 1 give the same run", "seed nothing with a constant; use ctx.seed(…)")


def check_resume(case: MethodCase) -> None:
    """A run that was stopped within stages and after a release ends with the bits of one that was not."""
    trace = case.run[1]
    middle = {stage: n // 2 for stage, n in trace.n_steps.items()}
    places = [Place(1, middle[1]), Place(1, None), Place(2, middle[2]), Place(3, 1)]
    try:
        resumed = case.lab.interrupted(lambda: [case.make()], places)
    except Exception as error:
        raise case.broken(f"a resumed run stops with {describe(error, type(case.make()))}") from error
    _expect_equal(
        case,
        trace,
        resumed,
        "a run that was stopped and resumed differs from one that was not",
        "return everything that later steps depend on from state_dict() and take it back in load_state_dict()",
    )


@dataclass(frozen=True)
class _Flat:
    """A constant learning rate."""

    rate: float

    def __call__(self, step: int, n_steps: int) -> float:
        return self.rate


class _Branching(Method):
    """Hold the learning rate; release every stage but the last from a branch, or none."""

    name = "branching"

    def __init__(self, *, branch: bool) -> None:
        super().__init__()
        self.branch = branch

    def plan(self, stage: Stage) -> StagePlan:
        line = _Flat(stage.learning_rate / 2)
        branches = self.branch and stage.index < stage.n_stages - 1
        return StagePlan(schedule=line, branch=Branch(schedule=line, fraction=0.4) if branches else None)


def check_rewind(case: MethodCase) -> None:
    """Beside decay branches of another component its main line goes on as it does without them.

    Not asked of a method that sets the schedule itself, or reviews its mixture: these do not compose with a branch.
    """
    _ = case.run
    plans = [case.make().plan(stage) for stage in case.lab.stages[:1]]
    if any(plan.schedule is not None or plan.review_steps is not None or not plan.train for plan in plans):
        return
    one, other = (
        case.other_run("a run with decay branches", [case.make(), _Branching(branch=branch)])
        for branch in (False, True)
    )
    last = max(one.releases)
    gap = _largest_gap(one.releases[last], other.releases[last])
    if gap is not None or comparable(one.state) != comparable(other.state):
        what = "its state" if gap is None else f"the last weights, {gap}"
        raise case.broken(
            f"decay branches, which are put back, change {what}",
            "load_state_dict() has to overwrite all of the method's own state, also on a method that has run",
        )


def check_accumulation(case: MethodCase) -> None:
    """One micro-batch or four a step: the same gradient and the same matrix, but for rounding."""
    trace = case.run[1]
    rows = case.lab.track.training.batch_rows // 4
    split = case.other_run("a run with four micro-batches a step", micro_batch_rows=rows)
    mend = "extra_loss must return the sum over the micro-batch's target tokens, not their mean"
    for place, norm in trace.grad_norms.items():
        other = split.grad_norms[place]
        if place[1] == 0 and abs(other - norm) > GRAD_NORM_TOLERANCE * max(norm, 1e-9):
            raise case.broken(
                f"the first gradient norm of stage {place[0]} is {norm:.4g}, with four micro-batches {other:.4g}",
                mend,
            )
    last = max(trace.releases)
    one, four = (case.lab.matrix_row(run.releases[last]) for run in (trace, split))
    gap = max(abs(a - b) for a, b in zip(one, four, strict=True))
    if not gap <= MATRIX_TOLERANCE_NATS:
        raise case.broken(f"with four micro-batches row {last} of the matrix moves by {gap:.3g} nats", mend)


def check_composes(case: MethodCase) -> None:
    """Beside a component that does nothing it gives the same bits, in either order."""
    trace = case.run[1]
    for first in (True, False):
        other = registry.make_method("sequential").method
        methods = [case.make(), other] if first else [other, case.make()]
        composed = case.other_run("composed with sequential it", methods, n_stages=2)
        for stage, weights in composed.releases.items():
            if comparable(weights) != comparable(trace.releases[stage]):
                raise case.broken(
                    f"composed with sequential, which does nothing, it gives another release of stage {stage}",
                    "depend on nothing but ctx, options and own state",
                )


METHOD_CHECKS: tuple[Callable[[MethodCase], None], ...] = (
    check_options,
    check_constructs,
    check_runs,
    check_plan,
    check_needs,
    check_context,
    check_state,
    check_billing,
    check_random,
    check_release,
    check_same_seed,
    check_other_seed,
    check_resume,
    check_rewind,
    check_accumulation,
    check_composes,
)


def _expect_equal(case: MethodCase, one: Trace, other: Trace, what: str, mend: str) -> None:
    """Compare releases, state and bill of two whole runs, bit for bit."""
    for stage, weights in one.releases.items():
        gap = _largest_gap(weights, other.releases[stage])
        if gap is not None:
            raise case.broken(f"{what}: weights after stage {stage} differ, {gap}", mend)
    if comparable(one.state) != comparable(other.state):
        raise case.broken(f"{what}: its state at the end differs", mend)
    for part in ("tokens", "extra_tokens", "flops"):
        if one.ledger[part] != other.ledger[part]:
            raise case.broken(f"{what}: the ledger's {part} are {other.ledger[part]}, not {one.ledger[part]}", mend)


def _largest_gap(one: Weights, other: Weights) -> str | None:
    """Return where two sets of weights differ most, or None when they are equal to the bit."""
    if comparable(one) == comparable(other):
        return None
    gaps = {
        name: float((one[name].double() - other[name].double()).abs().max()) if name in other else float("inf")
        for name in one
    }
    name = max(gaps, key=lambda key: gaps[key])
    return f"most in {name}, by {gaps[name]:.3g}"


def _first_difference(one: Any, other: Any) -> str:
    """Return the key of a state in which two states differ first."""
    for place, part in enumerate(("tensors", "values")):
        keys = sorted({*one[place], *other[place]}, key=str)
        for key in keys:
            if key not in one[place] or key not in other[place]:
                return f"{part}[{key!r}]"
            if comparable(one[place][key]) != comparable(other[place][key]):
                return f"{part}[{key!r}]"
    return "its order"
