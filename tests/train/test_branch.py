"""Decay branches: what is released, what goes on, what it costs, and a kill at any step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.contract.lab import Lab, Place, Trace
from clbench.errors import ConfigError
from clbench.method import Branch, Composed, Context, Method, Need, StagePlan, Weights, tail_steps
from clbench.train.branch import Legs
from clbench.train.data import DataOrder
from tests.engine import component, run_tiny
from tests.train.test_data import stage


@dataclass(frozen=True)
class Flat:
    """A constant learning rate, halved over the last steps."""

    rate: float = 0.002
    tail: float = 0.0

    def __call__(self, step: int, n_steps: int) -> float:
        return self.rate / 2 if self.tail and step >= n_steps - tail_steps(self.tail, n_steps) else self.rate


class Branching(Method):
    """A plateau that releases a branch of 40 % of each stage, and counts its own steps in its state."""

    needs = frozenset({Need.STAGE_BOUNDARIES})

    def __init__(self, *, branch: bool = True, tail: float = 0.4) -> None:
        super().__init__()
        self.branch, self.tail = branch, tail
        self.steps = torch.zeros(1, dtype=torch.int64)
        self.ended: list[int] = []

    def plan(self, stage: Any) -> StagePlan:
        branch = Branch(schedule=Flat(tail=self.tail), fraction=self.tail) if self.branch else None
        return StagePlan(schedule=Flat(), branch=branch, optimizer="carry")

    def after_step(self, ctx: Context) -> None:
        self.steps += 1

    def end_stage(self, ctx: Context) -> None:
        assert ctx.step == ctx.n_steps
        self.ended.append(ctx.stage.index)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        return {"steps": self.steps.clone()}, {"ended": list(self.ended)}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        self.steps, self.ended = tensors["steps"].clone(), list(values["ended"])


class Decays(Branching):
    """The same decay on the main line."""

    def plan(self, stage: Any) -> StagePlan:
        return StagePlan(schedule=Flat(tail=self.tail), optimizer="carry")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("lab"))


def named(*methods: Method) -> list[Method]:
    return [component(method, type(method).__name__.lower()).method for method in methods]


@pytest.fixture(scope="module")
def branched(lab: Lab) -> Trace:
    return lab.train(named(Branching()))


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_release_is_the_main_line_decayed_and_training_goes_on_from_the_plateau(lab: Lab, branched: Trace) -> None:
    decayed = lab.train(named(Decays()), n_stages=1)
    plateau = lab.train(named(Branching(branch=False)))
    assert equal(branched.releases[1], decayed.releases[1]), "in the first stage a branch is a decay on the main line"
    assert not equal(branched.releases[1], plateau.releases[1])
    # What goes on is the plateau: method state and every token of a run without branches.
    assert torch.equal(branched.state[0]["0.steps"], plateau.state[0]["0.steps"])
    assert branched.state[1] == plateau.state[1]
    assert branched.ledger["tokens"] == plateau.ledger["tokens"]
    assert branched.ledger["flops"]["train"] == plateau.ledger["flops"]["train"]
    assert branched.n_steps == plateau.n_steps


def test_resume_weights_are_those_of_the_plateau(lab: Lab) -> None:
    """Two runs that differ in their branches alone go on alike: the second stage's plateau releases are equal."""

    class Later(Branching):
        def plan(self, stage: Any) -> StagePlan:
            plan = super().plan(stage)
            return plan if stage.index == 1 else StagePlan(schedule=plan.schedule, optimizer="carry")

    one = lab.train(named(Later()), n_stages=2)
    other = lab.train(named(Branching(branch=False)), n_stages=2)
    assert equal(one.releases[2], other.releases[2])
    assert not equal(one.releases[1], other.releases[1])


def test_branch_tokens_and_flops_are_billed_as_such(lab: Lab, branched: Trace) -> None:
    billed = 0
    for index, n_steps in branched.n_steps.items():
        rows = DataOrder(
            lab.stream, {index: 1.0}, n_tokens=2500, length=lab.length, batch_rows=8, seed=0, stage=index
        ).n_targets
        billed += int(rows[(n_steps - tail_steps(0.4, n_steps)) * 8 :].sum())
    assert branched.ledger["extra_tokens"] == {"decay_branch": billed}
    share = branched.ledger["flops"]["decay_branch"] / branched.ledger["flops"]["train"]
    assert share == pytest.approx(billed / (2500 * len(branched.n_steps)))


def test_a_run_that_is_cut_before_on_and_after_the_branch_ends_with_the_same_bits(lab: Lab, branched: Trace) -> None:
    n_steps, n_branch = branched.n_steps[1], tail_steps(0.4, branched.n_steps[1])
    assert n_branch >= 2
    fork = n_steps - n_branch
    places = [Place(1, fork - 1), Place(1, fork), Place(1, n_steps - 1), Place(1, n_steps), Place(2, fork)]
    resumed = lab.interrupted(lambda: named(Branching()), [*places, Place(2, None), Place(3, n_steps + n_branch - 1)])
    for index, weights in branched.releases.items():
        assert equal(weights, resumed.releases[index]), index
    assert resumed.ledger["extra_tokens"] == branched.ledger["extra_tokens"]
    assert resumed.ledger["flops"] == branched.ledger["flops"]
    assert torch.equal(resumed.state[0]["0.steps"], branched.state[0]["0.steps"])


def test_the_log_shows_the_branch(tmp_path: Path) -> None:
    lines = [line for line in run_tiny(tmp_path, [Branching()], batch_rows=4).steps() if line["stage"] == 1]
    n_steps = 1500 // (4 * 64) + 1
    n_branch = tail_steps(0.4, n_steps)
    assert lines[-1]["step"] == n_steps + n_branch - 1
    assert any(line["step"] == n_steps - 1 and line["lr"] == 0.001 for line in lines), "the branch's last step"
    assert lines[-1]["n_tokens"] == 1500 + 1500 - (n_steps - n_branch) * 4 * 64


def test_legs_by_hand() -> None:
    legs = Legs(5, 2)
    assert [legs.place(done) for done in range(legs.total)] == [
        (0, False),
        (1, False),
        (2, False),
        (3, True),
        (4, True),
        (3, False),
        (4, False),
    ]
    assert [done for done in range(8) if legs.begins_branch(done)] == [3]
    assert [done for done in range(8) if legs.ends_branch(done)] == [5]
    assert [Legs(3).place(done) for done in range(3)] == [(0, False), (1, False), (2, False)]
    assert tail_steps(0.1, 3) == 1 and tail_steps(1.0, 3) == 3 and tail_steps(0.5, 8) == 4


def test_a_branch_and_reviews_are_refused_together() -> None:
    class Reviews(Method):
        def plan(self, stage: Any) -> StagePlan:
            return StagePlan(review_steps=2)

    with pytest.raises(ConfigError, match="a branch and reviews"):
        Composed(named(Branching(), Reviews())).plan(stage(1))
