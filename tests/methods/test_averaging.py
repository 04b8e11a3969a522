"""EMA, LAWA, soups and MWA against closed forms and against float64 sums over weights captured after every step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench import registry
from clbench.contract.lab import Lab, Place, Trace
from clbench.errors import ClbenchError, ConfigError
from clbench.method import Context, Method, Need, Weights, tail_steps
from clbench.methods import _averages as averages
from clbench.methods.ema import Ema, decay_of, newest_share
from clbench.methods.mwa import shares_of
from clbench.methods.soup import greedy
from clbench.train.models import copy_weights, weights_of

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def lab(clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("averaging"))


def make(spec: str) -> Method:
    return registry.make_method(spec).method


# --- on known trajectories ---


class Line:
    """A context whose one weight is what the test says."""

    def __init__(self, n_steps: int = 1) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.stage, self.step, self.n_steps = SimpleNamespace(index=1), 0, n_steps

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield "w", self.parameter

    def walk(self, method: Method, values: Sequence[float]) -> float:
        """Let the weight take values, one a step of the stage, and return what is released."""
        self.n_steps = len(values)
        for self.step, value in enumerate(values):
            self.parameter.data.fill_(value)
            method.after_step(self)  # type: ignore[arg-type]
        self.step = self.n_steps
        method.end_stage(self)  # type: ignore[arg-type]
        return float(method.release(self, {"w": self.parameter.detach()})["w"][0])  # type: ignore[arg-type]


@pytest.mark.parametrize("d", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_ema_of_a_straight_line_is_its_closed_form(d: float, n: int) -> None:
    """w_t = t: (1-d)/(1-d^n) sum_t d^(n-t) t = n - sum_j j d^j (1-d)/(1-d^n)."""
    lag = d * (1 - n * d ** (n - 1) + (n - 1) * d**n) / (1 - d) / (1 - d**n)
    found = Line().walk(Ema(Ema.Options(decay=d)), range(1, n + 1))
    assert found == pytest.approx(n - lag, rel=1e-5)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=20), st.floats(0, 0.9999))
def test_ema_is_the_normalised_sum_and_its_start_has_no_share(values: list[float], d: float) -> None:
    weights = np.array([d ** (len(values) - 1 - s) for s in range(len(values))])
    found = Line().walk(Ema(Ema.Options(decay=d)), values)
    assert found == pytest.approx(float(weights @ values / weights.sum()), abs=1e-4)


def test_ema_begins_anew_or_goes_on() -> None:
    first, second = [8.0, 4.0, 2.0], [1.0, 3.0]
    for scope, seen in (("stage", second), ("run", first + second)):
        ema, line = Ema(Ema.Options(decay=0.5, scope=scope)), Line()
        line.walk(ema, first)
        shares = 0.5 ** np.arange(len(seen))[::-1]
        assert line.walk(ema, second) == pytest.approx(float(shares @ seen / shares.sum()), rel=1e-6)


def test_ema_half_life_halves() -> None:
    assert decay_of(Ema.Options(half_life=8), 100) ** 8 == pytest.approx(0.5)
    assert decay_of(Ema.Options(half_life=0.25), 100) ** 25 == pytest.approx(0.5)
    assert newest_share(0.0, 7) == 1
    assert [newest_share(0.9, t) for t in (1, 2)] == pytest.approx([1, 0.1 / 0.19])


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 7))
def test_lawa_window(n: int, k: int, every: int) -> None:
    """w_t = t: the mean of n, n - every, n - 2 every, ... as far as the stage and k go."""
    taken = [t for t in (n - j * every for j in range(k)) if t >= 1]
    lawa, line = make(f"lawa:k={k},every={every}"), Line()
    line.walk(lawa, [1e3] * 5)  # a stage before leaves no trace
    assert line.walk(lawa, range(1, n + 1)) == pytest.approx(np.mean(taken), rel=1e-5)


@pytest.mark.parametrize("spec", ["ema:restart=true", "lawa:k=2,every=1,restart=true"])
def test_restart_goes_on_from_the_average(spec: str) -> None:
    line = Line()
    released = line.walk(make(spec), [1.0, 2.0, 4.0])
    assert released != 4 and line.parameter.tolist() == [released] * 2
    line.walk(make(spec.replace("true", "false")), [1.0, 2.0, 4.0])
    assert line.parameter.tolist() == [4.0, 4.0]


# --- weights of MWA ---

METRICS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(METRICS, st.floats(0, 50))
def test_shares_sum_to_one_and_grow_with_the_metric(metrics: list[float], power: float) -> None:
    shares = shares_of(metrics, power)
    assert sum(shares) == pytest.approx(1, rel=1e-12) and min(shares) >= 0
    for (m, share), (other_m, other) in itertools.combinations(zip(metrics, shares, strict=True), 2):
        assert (m - other_m) * (share - other) >= -1e-12
    direct = np.array(metrics) ** np.float64(min(power, 20))
    assert shares_of(metrics, min(power, 20)) == pytest.approx(direct / direct.sum(), rel=1e-9, abs=1e-15)


@given(METRICS, st.floats(0, 20), st.floats(1e-3, 1e3))
def test_shares_do_not_hang_on_the_unit(metrics: list[float], power: float, unit: float) -> None:
    assert shares_of([unit * m for m in metrics], power) == pytest.approx(
        shares_of(metrics, power), rel=1e-9, abs=1e-12
    )


def test_shares_at_the_ends() -> None:
    assert shares_of([0.3, 5.0, 1.0], 0) == [1 / 3] * 3
    assert shares_of([2.0] * 4, 7) == [0.25] * 4
    assert shares_of([0.01], 8) == [1.0]
    assert shares_of([1.0, 1.1, 1.05], 1e5) == [0.0, 1.0, 0.0]
    assert shares_of([1.0, 2.0], 1) == pytest.approx([1 / 3, 2 / 3])


# --- means and greedy soups ---


def vectors(n: int, size: int = 5, seed: int = 0) -> dict[int, Weights]:
    drawn = torch.randn(n, size, generator=torch.Generator().manual_seed(seed))
    return {i: {"a": row[:2].clone(), "b": row[2:].clone()} for i, row in enumerate(drawn)}


def test_a_mean_is_the_mean_whatever_the_order_and_one_alone_is_itself() -> None:
    shelf = vectors(5)
    direct = np.mean([w["b"].double().numpy() for w in shelf.values()], axis=0)
    for order in itertools.permutations(shelf.values()):
        mean = averages.mean_of(order)
        assert mean["b"].dtype == torch.float32
        torch.testing.assert_close(mean["b"].double(), torch.from_numpy(direct), rtol=1e-7, atol=1e-8)
    assert torch.equal(averages.mean_of([shelf[2]], [0.125])["a"], shelf[2]["a"])
    weighted = averages.mean_of([shelf[0], shelf[1]], [3, 1])["a"]
    torch.testing.assert_close(weighted, 0.75 * shelf[0]["a"] + 0.25 * shelf[1]["a"])


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_greedy_soup_against_a_literal_one(n: int, seed: int) -> None:
    """Recipe 1 of the paper in float64 on numpy vectors, judged by the distance from a point."""
    shelf = vectors(n, seed=seed)

    def loss(vector: np.ndarray[Any, Any]) -> float:
        return float(np.square(vector - 0.2).sum())

    flat = {i: torch.cat([w["a"], w["b"]]).double().numpy() for i, w in shelf.items()}
    soup: list[int] = []
    for i in sorted(flat, key=lambda i: loss(flat[i])):
        if not soup or loss(np.mean([flat[j] for j in [*soup, i]], 0)) < loss(np.mean([flat[j] for j in soup], 0)):
            soup.append(i)
    found = greedy(shelf, lambda w: loss(torch.cat([w["a"], w["b"]]).double().numpy()))
    assert found == soup
    assert loss(np.mean([flat[j] for j in found], 0)) <= min(loss(v) for v in flat.values())


def test_greedy_ties_go_to_the_newest_and_equal_is_not_better() -> None:
    shelf = vectors(4)
    assert greedy(shelf, lambda weights: 1.0) == [3]
    assert greedy(dict(reversed(shelf.items())), lambda weights: 1.0) == [3]


# --- in the real loop ---


class Captured(Method):
    """Writes down the weights after every step, at every end and at every beginning; a rewound branch stays in it."""

    needs = frozenset({Need.STAGE_BOUNDARIES, Need.CONTROL_DATA})

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, list[Weights]] = {}
        self.ends: dict[int, list[Weights]] = {}
        self.begins: dict[int, Weights] = {}
        self.losses: dict[int, dict[str, float]] = {}
        self.measured: dict[int, list[int]] = {}

    def begin_stage(self, ctx: Context) -> None:
        self.begins[ctx.stage.index] = copy_weights(weights_of(ctx.module))

    def after_step(self, ctx: Context) -> None:
        self.steps.setdefault(ctx.stage.index, []).append(copy_weights(weights_of(ctx.module)))

    def end_stage(self, ctx: Context) -> None:
        self.ends.setdefault(ctx.stage.index, []).append(copy_weights(weights_of(ctx.module)))
        if ctx.stage.index in self.measured:
            measured = self.measured[ctx.stage.index]
            kept = {str(k): ends[-1] for k, ends in self.ends.items()}
            loss = lambda w: np.mean(list(ctx.control_loss(measured, n_rows=2, weights=w).values()))  # noqa: E731
            self.losses[ctx.stage.index] = {name: float(loss(w)) for name, w in kept.items()}


def run(lab: Lab, specs: Sequence[str], **how: Any) -> tuple[Captured, Trace, list[Method]]:
    """Run methods with a witness before them, who sees the weights before any method goes on from an average."""
    captured, methods = Captured(), [make(spec) for spec in specs]
    captured.measured = how.pop("measured", {})
    return captured, lab.train([captured, *methods], **how), methods


def direct(ingredients: Sequence[Weights], shares: Sequence[float] | None = None) -> Weights:
    """The mean in float64, by numpy."""
    return {
        name: torch.from_numpy(np.average([w[name].double().numpy() for w in ingredients], axis=0, weights=shares))
        for name in ingredients[0]
    }


def assert_close(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), **CLOSE)


def ema_of(trajectory: Sequence[Weights], d: float) -> Weights:
    return direct(trajectory, [d ** (len(trajectory) - 1 - s) for s in range(len(trajectory))])


def test_one_run_with_ema_in_it_against_direct_sums(lab: Lab) -> None:
    captured, trace, _ = run(lab, ["ema:decay=0.7"], n_stages=2)
    for k, trajectory in captured.steps.items():
        assert len(trajectory) == trace.n_steps[k] >= 4
        assert_close(trace.releases[k], ema_of(trajectory, 0.7))
        assert not torch.equal(*(w["model.norm.weight"] for w in (trace.releases[k], trajectory[-1])))
    # Training went on from the last weights, not from what was released.
    assert all(torch.equal(tensor, captured.steps[1][-1][name]) for name, tensor in captured.begins[2].items())


def test_an_average_over_the_run_to_restart_from(lab: Lab) -> None:
    captured, trace, _ = run(lab, ["ema:decay=0.7,scope=run,restart=true"], n_stages=2)
    assert_close(trace.releases[2], ema_of(captured.steps[1] + captured.steps[2], 0.7))
    assert all(torch.equal(tensor, trace.releases[1][name]) for name, tensor in captured.begins[2].items())


def test_lawa_beside_replay(lab: Lab) -> None:
    captured, trace, _ = run(lab, ["replay", "lawa:k=2,every=2"], n_stages=2)
    for k, trajectory in captured.steps.items():
        assert_close(trace.releases[k], direct([trajectory[-1], trajectory[-3]]))


def test_uniform_soups(lab: Lab) -> None:
    base = copy_weights(weights_of(lab.base))
    captured, trace, (soup,) = run(lab, ["soup:base=true"])
    ends = [base, *(captured.ends[k][-1] for k in (1, 2, 3))]
    for k in (1, 2, 3):
        assert_close(trace.releases[k], direct(ends[: k + 1]))
    assert soup.state_dict()[1] == {"picked": [0, 1, 2, 3]}
    captured, trace, (soup,) = run(lab, ["soup:last=2"])
    assert_close(trace.releases[3], direct([captured.ends[2][-1], captured.ends[3][-1]]))
    assert soup.state_dict()[1] == {"picked": [2, 3]}
    assert {key.split("/")[0] for key in soup.state_dict()[0]} == {"mean", "2", "3"}


def test_greedy_soup_is_no_worse_than_the_best_ingredient(lab: Lab) -> None:
    """Judged by another component on the same kept-back rows; the bill is 2k - 1 measurements of every stage seen."""

    class Judge(Method):
        """Measures what the components before it released."""

        needs = frozenset({Need.CONTROL_DATA})
        found: float

        def release(self, ctx: Context, weights: Weights) -> Weights:
            self.found = float(
                np.mean(list(ctx.control_loss(range(ctx.stage.index + 1), n_rows=2, weights=weights).values()))
            )
            return weights

    captured, soup, judge = Captured(), make("soup:kind=greedy,rows=2"), Judge()
    captured.measured = {2: [0, 1, 2]}
    trace = lab.train([captured, soup, judge], n_stages=2)
    assert judge.found <= min(captured.losses[2].values()) + 1e-6
    picked = soup.state_dict()[1]["picked"]
    best = min(captured.losses[2], key=lambda k: captured.losses[2][k])
    assert picked[0] == int(best) and set(picked) <= {1, 2}
    assert_close(trace.releases[2], direct([captured.ends[k][-1] for k in picked]))
    alone = lab.train([make("soup:kind=greedy,rows=2")], n_stages=2)
    assert alone.ledger["extra_tokens"]["control"] == lab.length * 2 * (1 * 2 + 3 * 3)


def test_mwa_weighs_stage_ends_by_their_loss(lab: Lab) -> None:
    captured, trace, (mwa,) = run(lab, ["mwa:of=stages,power=8,rows=2"], n_stages=2, measured={1: [1], 2: [2]})
    losses = np.array([captured.losses[2][k] for k in ("1", "2")])
    shares = losses**-8.0 / np.sum(losses**-8.0)
    assert mwa.state_dict()[1]["shares"] == pytest.approx(shares.tolist(), rel=1e-6)
    assert abs(shares[0] - 0.5) > 0.01
    assert_close(trace.releases[2], direct([captured.ends[k][-1] for k in (1, 2)], shares.tolist()))
    assert_close(trace.releases[1], captured.ends[1][-1])


def test_mwa_weighs_checkpoints_of_a_stage_by_their_age(lab: Lab) -> None:
    captured, trace, (mwa,) = run(lab, ["mwa:metric=step,power=1,every=2,last=2"], n_stages=2)
    n = trace.n_steps[2]
    assert_close(trace.releases[2], direct([captured.steps[2][n - 3], captured.steps[2][n - 1]], [n - 2, n]))
    assert mwa.needs == {Need.STAGE_BOUNDARIES}


def test_beside_wsd_the_branch_is_averaged_and_the_main_line_knows_nothing_of_it(lab: Lab) -> None:
    """Released is the average over main line and branch; a run-wide average goes on over the main line alone."""
    specs = ["wsd:decay=0.5", "ema:decay=0.7,scope=run", "soup"]
    captured, trace, _ = run(lab, specs[:2], n_stages=2)
    n = trace.n_steps[1]
    d = tail_steps(0.5, n)
    assert len(captured.steps[1]) == n + d
    branch, main = captured.steps[1][:n], captured.steps[1][: n - d] + captured.steps[1][n:]
    assert_close(trace.releases[1], ema_of(branch, 0.7))
    again, soups, (_, soup) = run(lab, [specs[0], specs[2]], n_stages=2)
    decayed, plateau = again.ends[1]
    assert_close(soups.releases[1], decayed)
    second = again.ends[2][0]
    assert_close(soups.releases[2], direct([plateau, second]))
    assert soup.state_dict()[1] == {"picked": [1, 2]}
    assert len(captured.steps[2]) == len(again.steps[2])
    first_of_two = captured.steps[2] if len(captured.ends[2]) == 1 else captured.steps[2][:n]
    assert_close(trace.releases[2], ema_of(main + first_of_two, 0.7))


def test_stopped_in_a_branch_and_after_it_the_bits_are_the_same(lab: Lab) -> None:
    specs = ["wsd:decay=0.5", "ema:scope=run", "soup:kind=greedy,rows=2,last=2"]
    make_all = lambda: [make(spec) for spec in specs]  # noqa: E731
    whole = lab.train(make_all())
    n = whole.n_steps[1]
    resumed = lab.interrupted(make_all, [Place(1, n - 1), Place(1, n), Place(1, None), Place(2, 2)])
    for k, weights in whole.releases.items():
        assert all(torch.equal(tensor, resumed.releases[k][name]) for name, tensor in weights.items())
    assert resumed.state[1] == whole.state[1]
    assert all(torch.equal(tensor, resumed.state[0][key]) for key, tensor in whole.state[0].items())
    assert resumed.ledger["flops"] == whole.ledger["flops"]


def test_rewinding_takes_everything_back() -> None:
    """The state is put back after a branch into a method that has gone on."""
    for spec in ("ema", "lawa:k=9,every=1", "mwa:metric=step,every=1"):
        method, line = make(spec), Line()
        line.walk(method, [1.0, 2.0])
        tensors, values = method.state_dict()
        tensors, values = copy_weights(tensors), copy.deepcopy(values)
        line.walk(method, [5.0, 6.0, 7.0])
        method.load_state_dict(tensors, values)
        again = method.state_dict()
        assert again[1] == values and all(torch.equal(again[0][k], t) for k, t in tensors.items())
        assert again[0].keys() == tensors.keys()
        line.n_steps, line.step = 3, 2
        line.parameter.data.fill_(9.0)
        method.after_step(line)  # type: ignore[arg-type]
        assert all(t.max() < 9 for t in tensors.values())  # what was loaded is a copy


# --- bad options ---


@pytest.mark.parametrize(
    "spec",
    [
        "ema:decay=1",
        "ema:decay=-0.1",
        "ema:half_life=0",
        "ema:half_life=nan",
        "ema:scope=epoch",
        "lawa:k=0",
        "lawa:every=0",
        "soup:kind=tomato",
        "soup:last=0",
        "soup:rows=65",
        "soup:control=all",
        "mwa:metric=accuracy",
        "mwa:power=-1",
        "mwa:power=inf",
        "mwa:of=epochs",
        "mwa:rows=0",
    ],
)
def test_bad_options_are_refused_with_a_way_out(spec: str) -> None:
    with pytest.raises(ConfigError, match="; give "):
        make(spec)


def test_averaged_adapters_have_to_be_merged_afterwards() -> None:
    ema, line = make("ema"), Line()
    line.walk(ema, [1.0])
    with pytest.raises(ClbenchError, match="put it before the method with adapters"):
        ema.release(line, {"other": torch.zeros(1)})  # type: ignore[arg-type]
