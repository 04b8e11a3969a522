"""Schedule-free AdamW against algorithm 1 in float64 and against its authors' package, alone and in real runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clbench import registry
from clbench.contract.lab import Lab, Place, Trace
from clbench.errors import ConfigError
from clbench.method import Method, Weights
from clbench.methods._schedule_free_optimizer import ScheduleFreeAdamW
from clbench.methods.schedule_free import ScheduleFree
from clbench.train.models import copy_weights, weights_of
from tests.methods.test_schedules import stage

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def lab(clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("schedule-free"))


def make(spec: str) -> ScheduleFree:
    method = registry.make_method(spec).method
    assert isinstance(method, ScheduleFree)
    return method


@dataclass
class Algorithm1:
    """Line by line as in arXiv 2405.15682, one parameter in float64; ``package`` as its code since 1.3."""

    x: Array
    betas: tuple[float, float]
    decay: float = 0.0
    form: str = "paper"
    growth: float = 0.0
    eps: float = 1e-8
    z: Array = field(init=False)
    v: Array = field(init=False)
    t: int = 0
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.z, self.v = self.x.copy(), np.zeros_like(self.x)

    @property
    def y(self) -> Array:
        return (1 - self.betas[0]) * self.z + self.betas[0] * self.x

    def step(self, g: Array, lr: float) -> None:
        self.t += 1
        y, b2 = self.y, self.betas[1]
        self.v = b2 * self.v + (1 - b2) * g**2
        if self.form == "paper":
            rate = lr * math.sqrt(1 - b2**self.t)
            self.z = self.z - rate * g / (np.sqrt(self.v) + self.eps) - rate * self.decay * y
        else:
            rate = lr
            self.z = self.z - rate * (g / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps) + self.decay * y)
        self.rates.append(self.t**self.growth * rate**2)
        c = self.rates[-1] / sum(self.rates)
        self.x = (1 - c) * self.x + c * self.z


def problem(seed: int = 0, n: int = 60) -> tuple[Array, list[Array], list[float]]:
    """A start, the minima of n noisy quadratics, and learning rates with a warm-up."""
    random = np.random.default_rng(seed)
    targets = [random.normal(1.0, 0.5, size=7) for _ in range(n)]
    return random.normal(size=7), targets, [0.1 * min(1.0, (t + 1) / 8) for t in range(n)]


@pytest.mark.parametrize("form", ["paper", "package"])
@pytest.mark.parametrize(
    ("decay", "growth", "beta1", "eps"), [(0.0, 0.0, 0.9, 1e-8), (0.3, 1.5, 0.6, 0.1), (0.1, 0, 1, 1e-3)]
)
def test_the_optimizer_is_algorithm_1(form: str, decay: float, growth: float, beta1: float, eps: float) -> None:
    start, targets, rates = problem()
    settings: dict[str, Any] = {"betas": (beta1, 0.95), "form": form, "growth": growth, "eps": eps}
    literal = Algorithm1(start, decay=decay, **settings)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = ScheduleFreeAdamW([{"params": [parameter], "weight_decay": decay}], lr=1.0, **settings)
    assert torch.equal(optimizer.average(parameter), parameter.detach())
    for target, rate in zip(targets, rates, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), literal.y, rtol=1e-11, atol=1e-12)
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = parameter.detach() - torch.from_numpy(target)
        gradient = parameter.grad.clone()
        literal.step(literal.y - target, rate)
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)
        np.testing.assert_allclose(optimizer.average(parameter).numpy(), literal.x, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[parameter]["z"].numpy(), literal.z, rtol=1e-11, atol=1e-12)
    assert abs(float(literal.x.mean()) - float(np.mean(targets))) < 0.6


def test_a_constant_rate_makes_a_plain_mean_and_growth_favours_the_new() -> None:
    """With b2 = 0 and no decay z walks in known steps of lr against the gradient's sign; x is the mean of z."""
    for growth in (0.0, 2.0):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        group = [{"params": [parameter], "weight_decay": 0.0}]
        optimizer = ScheduleFreeAdamW(group, lr=0.25, betas=(0.9, 0.0), form="package", growth=growth, eps=0.0)
        for _ in range(10):
            parameter.grad = -torch.ones(1, dtype=torch.float64)
            optimizer.step()
        shares = np.arange(1, 11) ** growth
        assert optimizer.state[parameter]["z"].item() == pytest.approx(2.5)
        assert optimizer.average(parameter).item() == pytest.approx(0.25 * np.average(np.arange(1, 11), weights=shares))


def test_settled_at_the_average_it_stays_there_to_the_bit() -> None:
    start, targets, _ = problem(n=9)
    parameter = torch.nn.Parameter(torch.from_numpy(start).float())
    optimizer = ScheduleFreeAdamW([{"params": [parameter]}], lr=0.1, betas=(0.9, 0.95))
    for target in targets:
        parameter.grad = parameter.detach() - torch.from_numpy(target).float()
        optimizer.step()
    average = optimizer.average(parameter)
    assert not torch.equal(average, parameter.detach())
    optimizer.settle()
    assert torch.equal(parameter.detach(), average) and torch.equal(optimizer.average(parameter), average)


@pytest.mark.parametrize("restart", [True, False])
def test_the_authors_package_gives_the_same_over_three_stages(restart: bool) -> None:
    package = pytest.importorskip("schedulefree")
    start, targets, rates = problem(seed=3, n=20)
    ours = [torch.nn.Parameter(torch.from_numpy(start.copy())) for _ in range(2)]
    theirs = [torch.nn.Parameter(torch.from_numpy(start.copy())) for _ in range(2)]
    groups = lambda ps: [{"params": [p], "weight_decay": wd} for p, wd in zip(ps, (0.2, 0.0), strict=True)]  # noqa: E731
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95)}
    mine = ScheduleFreeAdamW(groups(ours), form="package", growth=0.5, **settings)
    reference = package.AdamWScheduleFree(groups(theirs), warmup_steps=8, r=0.5, **settings)
    for k in range(3):
        for target, rate in zip(targets, rates if restart or k == 0 else [0.1] * 20, strict=True):
            reference.train()
            for group in mine.param_groups:
                group["lr"] = rate
            for p, q in zip(ours, theirs, strict=True):
                p.grad, q.grad = p.detach() - torch.from_numpy(target), q.detach() - torch.from_numpy(target)
            mine.step()
            reference.step()
        released = [mine.average(p) for p in ours]
        reference.eval()
        for average, p in zip(released, theirs, strict=True):
            torch.testing.assert_close(average, p.detach(), rtol=1e-11, atol=1e-12)
        if restart:
            mine.settle()
            mine.state.clear()
            reference = package.AdamWScheduleFree(groups(theirs), warmup_steps=8, r=0.5, **settings)


# --- in the real loop ---


class Seen(ScheduleFree):
    """Writes down rate, decay, gradient and weights of every parameter as they enter each step."""

    def make_optimizer(self, groups: list[dict[str, Any]], **how: Any) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer(groups, **how)
        self.seen: list[tuple[float, list[Array], list[Array]]] = []
        self.parameters = [p for group in groups for p in group["params"]]
        self.decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: self.note())
        return optimizer

    def note(self) -> None:
        assert self.optimizer is not None
        gradients = [p.grad.double().numpy().copy() for p in self.parameters if p.grad is not None]
        weights = [p.detach().double().numpy().copy() for p in self.parameters]
        self.seen.append((self.optimizer.param_groups[0]["lr"], gradients, weights))


def names_of(lab: Lab, seen: Seen) -> list[str]:
    """The names of the noted parameters: matrices first, as the loop groups them."""
    named = copy_weights(weights_of(lab.base))
    names = [n for n, w in named.items() if w.ndim >= 2] + [n for n, w in named.items() if w.ndim < 2]
    assert [named[n].shape for n in names] == [p.shape for p in seen.parameters]
    return names


def follow(lab: Lab, seen: Seen, n_steps: Sequence[int], *, restart: bool, form: str) -> list[Weights]:
    """Run algorithm 1 in float64 along the gradients that were seen; returns x at every stage's end."""
    names, starts = names_of(lab, seen), copy_weights(weights_of(lab.base))
    betas = (lab.track.training.beta1, lab.track.training.beta2)

    def fresh(xs: Sequence[Array]) -> list[Algorithm1]:
        return [Algorithm1(x, betas, decay, form) for x, decay in zip(xs, seen.decays, strict=True)]

    lines, released, notes = fresh([starts[n].double().numpy() for n in names]), [], iter(seen.seen)
    for n in n_steps:
        for _ in range(n):
            rate, gradients, weights = next(notes)
            for line, gradient, weight in zip(lines, gradients, weights, strict=True):
                np.testing.assert_allclose(weight, line.y, rtol=1e-4, atol=2e-6)
                line.step(gradient, rate)
        released.append({name: torch.from_numpy(line.x) for name, line in zip(names, lines, strict=True)})
        if restart:
            lines = fresh([line.x for line in lines])
    assert next(notes, None) is None
    return released


@pytest.mark.parametrize(
    ("options", "micro_batch_rows"),
    [({"restart": True}, None), ({"restart": False, "form": "package"}, 2)],
)
def test_three_stages_of_a_real_run_are_algorithm_1(
    lab: Lab, options: dict[str, Any], micro_batch_rows: int | None
) -> None:
    seen = Seen(ScheduleFree.Options(peak=0.5, **options))
    trace = lab.train([seen], micro_batch_rows=micro_batch_rows)
    full = {"restart": True, "form": "paper"} | options
    expected = follow(lab, seen, list(trace.n_steps.values()), **full)
    for k, weights in trace.releases.items():
        for name, tensor in weights.items():
            np.testing.assert_allclose(tensor.double().numpy(), expected[k - 1][name].numpy(), rtol=1e-4, atol=2e-6)
    rates = [rate for rate, _, _ in seen.seen]
    peak = 0.5 * lab.track.training.learning_rate
    ramp = [peak * min(1.0, (s + 1) / 4) for s in range(trace.n_steps[1])]  # 5 steps leave 4 for the warm-up
    assert rates == pytest.approx(ramp * 3 if full["restart"] else ramp + [peak] * (len(rates) - len(ramp)))


def test_a_resumed_run_has_the_same_bits(lab: Lab) -> None:
    spec = "schedule-free:restart=false,growth=1"
    whole: Trace = lab.train([make(spec)])
    resumed = lab.interrupted(lambda: [make(spec)], [Place(1, 2), Place(2, None), Place(3, 1)])
    for k, weights in whole.releases.items():
        assert all(torch.equal(tensor, resumed.releases[k][name]) for name, tensor in weights.items())


def test_restarting_and_carrying_on_part_after_the_first_stage(lab: Lab) -> None:
    one, other = (lab.train([make(f"schedule-free:restart={flag}")], n_stages=2).releases for flag in ("true", "false"))
    name = "model.embed_tokens.weight"
    assert torch.equal(one[1][name], other[1][name])
    assert not torch.equal(one[2][name], other[2][name])


def test_beside_a_method_that_never_trains_the_base_is_released(lab: Lab) -> None:
    methods: list[Method] = [make("schedule-free"), registry.make_method("frozen").method]
    released = lab.train(methods, n_stages=1).releases[1]
    assert all(torch.equal(tensor, released[name]) for name, tensor in copy_weights(weights_of(lab.base)).items())


def test_two_schedules_are_refused(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="both set the schedule"):
        lab.train([make("schedule-free"), registry.make_method("constant").method])


def test_only_the_first_stage_warms_up_when_everything_is_carried_on() -> None:
    for restart, first in ((True, 0.1), (False, 1.0)):
        method = ScheduleFree(ScheduleFree.Options(restart=restart))
        schedules = [method.plan(stage(k)).schedule for k in (1, 2)]
        assert [schedule(0, 50) for schedule in schedules if schedule] == pytest.approx([0.1, first])
        assert [schedule(49, 50) for schedule in schedules if schedule] == [1, 1]


@pytest.mark.parametrize("option", ["peak=0", "beta1=0", "beta1=1.1", "form=pakage", "growth=-1", "growth=nan"])
def test_bad_options_are_refused_with_a_way_out(option: str) -> None:
    with pytest.raises(ConfigError, match="; give "):
        make(f"schedule-free:{option}")
