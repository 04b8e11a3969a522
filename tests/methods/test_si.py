"""SI against closed forms: the quadratic, the loss that a path explains, and the real loop with clipping."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.contract.lab import Lab
from clbench.errors import ConfigError
from clbench.method import Context, Method
from clbench.methods.si import SI
from clbench.train.data import IGNORE


class Line:
    """A context with one weight vector, driven by the test's own gradients and steps."""

    def __init__(self, start: torch.Tensor) -> None:
        self.parameter = torch.nn.Parameter(start.clone())
        self.device, self.stage, self.step = start.device, SimpleNamespace(index=1, n_stages=9), 0
        self.notes: dict[str, float] = {}

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield "w", self.parameter

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def note(self, name: str, value: float) -> None:
        self.notes[name] = value

    def descend(self, method: Method, gradient: Any, *, rate: float, n_steps: int) -> None:
        """Plain gradient descent of gradient(w) plus what the method adds."""
        for _ in range(n_steps):
            self.parameter.grad = gradient(self.parameter.detach()).clone()
            method.edit_gradients(self)  # type: ignore[arg-type]
            assert self.parameter.grad is not None
            self.parameter.data.sub_(rate * self.parameter.grad)
            method.after_step(self)  # type: ignore[arg-type]
            self.parameter.grad = None


def make(**options: Any) -> SI:
    return SI(SI.Options(**options))


H = torch.tensor([0.3, 1.0, 2.5, 8.0])


def test_importance_of_a_quadratic_is_h_over_2_minus_rate_h() -> None:
    """Gradient descent with rate eta on h/2 w^2 to the end: omega = h Delta^2 / (2 - eta h)."""
    method, line, rate = make(strength=0.0, xi=1e-12), Line(torch.tensor([1.0, -2.0, 0.7, 1.5])), 0.1
    method.begin_stage(line)  # type: ignore[arg-type]
    line.descend(method, lambda w: H * w, rate=rate, n_steps=600)
    method.end_stage(line)  # type: ignore[arg-type]
    torch.testing.assert_close(method.importance["w"], H / (2 - rate * H), rtol=2e-5, atol=0)
    assert line.notes["displacement_rms"] == pytest.approx(
        float(torch.tensor([1.0, -2.0, 0.7, 1.5]).square().mean() ** 0.5)
    )


def test_in_the_limit_of_small_steps_c_of_1_is_the_loss_itself() -> None:
    """The paper's c = 1 is strength 2: the penalty is then h/2 (w - w*)^2, also for a second quadratic's optimum."""
    first, second = torch.tensor([1.0, -2.0, 0.7, 1.5]), torch.tensor([0.5, 3.0, -1.0, 1.0])
    method, line = make(strength=2.0, xi=1e-12), Line(torch.zeros(4))
    method.begin_stage(line)  # type: ignore[arg-type]
    line.descend(method, lambda w: H * (w - first), rate=0.005, n_steps=5000)
    method.end_stage(line)  # type: ignore[arg-type]
    method.begin_stage(line)  # type: ignore[arg-type]
    line.descend(method, lambda w: w - second, rate=0.05, n_steps=500)
    both = (H * first + second) / (H + 1)
    torch.testing.assert_close(line.parameter.detach(), both, rtol=0.02, atol=0.02)
    method.end_stage(line)  # type: ignore[arg-type]
    assert line.notes["penalty"] == pytest.approx(float((H / 2 * (both - first).square()).sum()), rel=0.02)


def test_the_gradient_in_the_path_is_that_of_the_loss_alone() -> None:
    """A strong pull is on: -sum g.dw with g of the loss is the loss's drop, with the penalty in g it is not."""
    method, line = make(strength=50.0), Line(torch.zeros(4))
    method.importance = {"w": torch.ones(4)}
    method.begin_stage(line)  # type: ignore[arg-type]
    line.descend(method, lambda w: H * (w - 1), rate=1e-4, n_steps=1500)
    w = line.parameter.detach()
    drop = float((H / 2).sum() - (H / 2 * (w - 1).square()).sum())
    assert float(method.path["w"].sum()) == pytest.approx(drop, rel=0.01)
    assert drop > 0.03


def test_negative_paths_are_clamped_or_kept() -> None:
    for clamp, expected in ((True, 0.0), (False, -1 / (1 + 1e-3))):
        method, line = make(clamp=clamp), Line(torch.zeros(1))
        method.begin_stage(line)  # type: ignore[arg-type]
        line.parameter.grad = torch.ones(1)
        method.edit_gradients(line)  # type: ignore[arg-type]
        line.parameter.data.add_(1.0)  # uphill, as momentum may go
        method.after_step(line)  # type: ignore[arg-type]
        method.end_stage(line)  # type: ignore[arg-type]
        assert float(method.importance["w"]) == pytest.approx(expected, rel=1e-6)
        assert line.notes["path_sum_below_0"] == -1.0


@pytest.fixture(scope="module")
def lab(clbench_home: Any, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("si"))


class Losses(Method):
    """Adds the drop of each step's own batch loss, measured before and after the step."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = 0.0
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extra_loss(self, ctx: Context, batch: Any, logits_BTV: torch.Tensor) -> None:
        self.rows.append((batch.inputs_BT, batch.targets_BT))
        self.drop += float(loss_of(logits_BTV.detach(), batch.targets_BT))

    def after_step(self, ctx: Context) -> None:
        with torch.no_grad():
            for inputs_BT, targets_BT in self.rows:
                self.drop -= float(loss_of(ctx.module(input_ids=inputs_BT).logits, targets_BT))
        self.rows = []


def loss_of(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE)


def test_under_adam_and_clipping_the_path_sums_to_the_drop_of_the_loss(lab: Lab) -> None:
    """At a small rate, with a clip far below the gradient's norm: a path of clipped gradients would be too short."""
    small = lab.track.training.model_copy(update={"learning_rate": 2e-5, "clip_norm": 0.01})
    track = lab.track.model_copy(update={"training": small})
    si, losses = make(strength=0.0), Losses()
    si.name, losses.name = "si", "losses"
    trace = Lab(lab.folder / "small", track, lab.stream, lab.hardware, lab.base).train([losses, si], n_stages=1)
    assert min(trace.grad_norms.values()) > 0.5
    assert sum(float(p.sum()) for p in si.path.values()) == pytest.approx(losses.drop, rel=0.02)
    assert trace.ledger["notes"]["1"]["si"]["path_sum"] == pytest.approx(losses.drop, rel=0.02)


def test_strength_0_is_plain_training_to_the_bit_and_a_strong_one_holds(lab: Lab) -> None:
    def run(*methods: Method) -> dict[str, torch.Tensor]:
        for method in methods:
            method.name = method.name or "si"
        return lab.train(list(methods), n_stages=2).releases[2]

    plain, none, strong = run(Method()), run(make(strength=0.0)), run(make(strength=1e4))
    assert all(torch.equal(plain[name], none[name]) for name in plain)
    start = lab.train([Method()], n_stages=1).releases[1]
    moved = [sum(float((w[n] - start[n]).square().sum()) for n in start) for w in (plain, strong)]
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"strength": float("nan")}, {"xi": 0.0}, {"xi": float("inf")}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        make(**options)
