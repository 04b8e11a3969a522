"""The replay family: published ledgers, exact distributions, closed forms, and rows recomputed from real runs."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench import registry
from clbench.contract.lab import Lab, Place
from clbench.contract.watch import comparable
from clbench.errors import ClbenchError, ConfigError, IntegrityError
from clbench.method import Composed, Context, Method, Need, Stage, StagePlan
from clbench.methods._activity import ActiveUnits
from clbench.methods._shares import equal_quotas, hypergeometric, mixture_of, reservoir
from clbench.methods.adaptive_replay import AdaptiveReplay
from clbench.methods.deletions import Deletions
from clbench.methods.replay import Replay
from clbench.methods.replay_buffer import ReplayBuffer
from clbench.methods.reuse_ratio import ReuseRatio
from clbench.methods.weighted_replay import WeightedReplay
from clbench.results.store import RunStore
from clbench.stream import Stream, identity_of
from clbench.train.data import DataOrder, Shelf, allocate
from clbench.train.ledger import Ledger
from clbench.train.rows import RowPlanner, reviewed
from tests.engine import run_tiny
from tests.train.test_data import stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab(clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("replay"))


@dataclass
class FakeContext:
    """A context with control losses that the test sets."""

    stage: Stage
    step: int = 0
    n_steps: int = 100
    losses: dict[int, float] = field(default_factory=dict)
    drawn: dict[int, int] = field(default_factory=dict)

    def control_loss(self, stages: Sequence[int], *, n_rows: int) -> dict[int, float]:
        return {i: self.losses[i] for i in stages}

    def tokens_drawn(self) -> dict[int, int]:
        return self.drawn


def fake(index: int, **values: Any) -> Any:
    return cast("Context", FakeContext(stage(index), **values))


# --- shares: TiC-LM's replay and its generalisations ---

EQUAL = (
    lambda a: Replay(Replay.Options(fraction=a)),
    lambda a: WeightedReplay(WeightedReplay.Options(fraction=a, gamma=1.0)),
    lambda a: WeightedReplay(WeightedReplay.Options(fraction=a, by="size")),
    lambda a: WeightedReplay(WeightedReplay.Options(fraction=a, by="loss")),
    lambda a: ReplayBuffer(ReplayBuffer.Options(fraction=a, tokens=10**9)),
)


@pytest.mark.parametrize("make", EQUAL)
@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        # TiC-LM, research notes 2.5: tokens of month t in all after 114 months, in units of the month budget B.
        ("1/t", {2: 4.32, 10: 2.49, 30: 1.36, 57: 0.71, 100: 0.14, 114: 0.009}),
        ("1/2", {2: 2.65, 10: 1.74, 30: 1.17, 57: 0.85, 100: 0.57, 114: 0.50}),
    ],
)
def test_ledgers_of_114_plans_match_the_check_vector(
    make: Callable[[str], Method], fraction: str, expected: dict[int, float]
) -> None:
    budget, method, ledger = 1_000_000, make(fraction), Ledger()
    for index in range(1, 114):
        plan = method.plan(stage(index))
        ledger.note_plan(index, 0, plan)
        ledger.bill_tokens(index, allocate(budget, plan.mixture or {}))
    bill = json.loads(json.dumps(ledger.as_dict()))
    assert all(sum(row.values()) == budget for row in bill["tokens"].values())
    for month, units in expected.items():
        column = sum(row.get(str(month - 1), 0) for row in bill["tokens"].values()) / budget
        planned = sum(plans[0]["mixture"].get(str(month - 1), 0) for plans in bill["plans"].values())
        # Month m: its own share, then an equal part of the old share of every later month t.
        alpha = {t: 1 / t if fraction == "1/t" else 0.5 for t in range(2, 115)}
        exact = alpha[month] + sum((1 - alpha[t]) / (t - 1) for t in range(month + 1, 115))
        assert column == pytest.approx(exact, abs=2e-4)
        assert planned == pytest.approx(exact, abs=1e-9)
        assert column == pytest.approx(units, abs=0.006 if units > 0.01 else 0.0005)


def past_shares(options: WeightedReplay.Options, index: int = 4, **of_stage: Any) -> list[float]:
    mixture = WeightedReplay(options).plan(replace(stage(index), **of_stage)).mixture
    assert mixture is not None and math.isclose(sum(mixture.values()), 1.0)
    assert mixture[index] == 0.25 or options.fraction != "1/4"
    return [mixture.get(i, 0.0) / (1 - mixture[index]) for i in range(index)]


def test_weights_are_their_closed_forms() -> None:
    of = WeightedReplay.Options
    assert past_shares(of(fraction="1/4")) == pytest.approx([w / 15 for w in (1, 2, 4, 8)])
    harmonic = [1 / age for age in (4, 3, 2, 1)]
    assert past_shares(of(fraction="1/4", gamma=1, power=1)) == pytest.approx([w / sum(harmonic) for w in harmonic])
    both = [0.9**age * age**-0.5 for age in (4, 3, 2, 1)]
    assert past_shares(of(fraction="1/4", gamma=0.9, power=0.5)) == pytest.approx([w / sum(both) for w in both])
    sizes = (700, 100, 200, 0, 999)
    assert past_shares(of(fraction="1/4", by="size"), available_tokens=sizes) == pytest.approx([0.7, 0.1, 0.2, 0])
    given = of(fraction="1/4", by="weights", weights=(0.0, 3.0, 1.0, 0.0))
    assert past_shares(given, n_stages=5) == pytest.approx([0, 0.75, 0.25, 0])
    assert WeightedReplay(given).plan(replace(stage(1), n_stages=5)).mixture == {1: 1.0}  # nothing old has a weight
    # Ten thousand stages of age and a steep gamma must not overflow or end as 0/0.
    assert past_shares(of(gamma=1e-3), index=500)[-1] == pytest.approx(0.999)
    assert past_shares(of(gamma=1e3), index=500)[0] == pytest.approx(0.999)


def test_loss_weights_follow_what_has_been_forgotten_since_a_stage_ended() -> None:
    method = WeightedReplay(WeightedReplay.Options(by="loss", temperature=0.5, fraction="1/4"))
    assert method.plan(stage(1)).mixture == {0: 0.75, 1: 0.25}
    method.begin_stage(fake(1, losses={0: 2.0}))
    method.end_stage(fake(1, losses={0: 2.6, 1: 1.0}))
    method.begin_stage(fake(2, losses={0: 99.0}))  # the start of the run is measured once
    before = method.plan(stage(2)).mixture
    method.end_stage(fake(2, losses={0: 3.0, 1: 1.7, 2: 0.5}))
    again = WeightedReplay(method.options)
    again.load_state_dict({}, json.loads(json.dumps(method.state_dict()[1])))
    for one in (method, again):
        assert one.plan(stage(2)).mixture == before  # asked again by a run that goes on at the stage's end
        weights = [math.exp((3.0 - 2.0) / 0.5), math.exp((1.7 - 1.0) / 0.5), math.exp(0)]
        mixture = one.plan(stage(3)).mixture
        assert mixture is not None and mixture[3] == 0.25
        assert [mixture[i] for i in range(3)] == pytest.approx([0.75 * w / sum(weights) for w in weights])
    assert before is not None and before[0] == pytest.approx(0.75 * math.exp(1.2) / (math.exp(1.2) + 1))


# --- bounded buffers ---


@pytest.mark.parametrize(
    ("good", "bad", "draws"), [(5, 7, 4), (3, 2, 4), (1, 9, 9), (6, 6, 12), (0, 5, 3), (40, 25, 30)]
)
def test_hypergeometric_is_the_exact_quantile(good: int, bad: int, draws: int) -> None:
    whole, below = math.comb(good + bad, draws), Fraction(0)
    for k in range(min(good, draws) + 1):
        p = Fraction(math.comb(good, k) * math.comb(bad, draws - k), whole)
        if p > 1e-9:
            assert hypergeometric(good, bad, draws, float(below) + 1e-12) == k
            assert hypergeometric(good, bad, draws, float(below + p) - 1e-12) == k
        below += p
    assert below == 1


def test_hypergeometric_of_trillions_is_the_normal_limit() -> None:
    good, bad, draws = 3 * 10**12, 10**12, 10**10
    p = good / (good + bad)
    mean, sd = draws * p, math.sqrt(draws * p * (1 - p) * (1 - draws / (good + bad)))
    for uniform, z in ((0.5, 0.0), (0.8413447460685429, 1.0), (0.022750131948179195, -2.0)):
        assert hypergeometric(good, bad, draws, uniform) == pytest.approx(mean + z * sd, abs=1.0)


def algorithm_r(sizes: tuple[int, ...], n: int) -> Counter[tuple[tuple[int, ...], ...]]:
    """Return what the reservoir holds of each stage after each stage, over all equally likely runs of algorithm R."""
    items = [i for i, size in enumerate(sizes) for _ in range(size)]
    ends = set(np.cumsum(sizes).tolist())
    found: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for places in itertools.product(*(range(j + 1) for j in range(n, len(items)))):
        held, history = items[:n], []
        for j, item in enumerate(items):
            if j >= n and places[j - n] < n:
                held[places[j - n]] = item
            if j + 1 in ends:
                now = held[: j + 1]
                history.append(tuple(now.count(i) for i in range(len(sizes))))
        found[tuple(history)] += 1
    return found


def test_reservoir_counts_have_the_joint_distribution_of_algorithm_r() -> None:
    sizes, n, n_seeds = (3, 2, 1, 2), 3, 3000  # three stages survive the last arrival
    exact = algorithm_r(sizes, n)
    whole = sum(exact.values())
    found: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for seed in range(n_seeds):
        history = [reservoir(sizes[: k + 1], n, seed) for k in range(len(sizes))]
        found[tuple((*counts, *[0] * (len(sizes) - len(counts))) for counts in history)] += 1
    assert set(found) <= set(exact)
    expected = {path: n_seeds * count / whole for path, count in exact.items()}
    statistic = sum((found[path] - e) ** 2 / e for path, e in expected.items())
    degrees = len(exact) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)
    for i, size in enumerate(sizes):  # in expectation every token that was seen alike
        mean = sum(path[-1][i] * count for path, count in found.items()) / n_seeds
        assert mean == pytest.approx(n * size / sum(sizes), abs=0.06)


def one_by_one(seen: Sequence[int], n: int) -> list[int]:
    """Hand out a buffer token by token, round after round, the oldest stage first."""
    held = [0] * len(seen)
    while n and held != list(seen):
        for i in range(len(seen)):
            if n and held[i] < seen[i]:
                held[i], n = held[i] + 1, n - 1
    return held


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), st.integers(1, 60), st.integers(0, 5))
def test_buffers_are_full_nested_and_shared_by_their_rule(seen: list[int], n: int, seed: int) -> None:
    for policy in (equal_quotas, lambda s, m: reservoir(s, m, seed)):
        before: list[int] = []
        for k in range(1, len(seen) + 1):
            held = policy(seen[:k], n)
            assert sum(held) == min(n, sum(seen[:k]))
            assert all(0 <= h <= s for h, s in zip(held, seen, strict=False))
            assert all(now <= was for now, was in zip(held, before, strict=False))  # nothing evicted returns
            before = held
    assert equal_quotas(seen, n) == one_by_one(seen, n)


@pytest.mark.parametrize("policy", ["reservoir", "quota"])
def test_a_buffer_is_drawn_in_proportion_to_what_it_holds(policy: Any) -> None:
    method = ReplayBuffer(ReplayBuffer.Options(fraction="1/4", tokens=6000, policy=policy))
    method.end_stage(fake(1, drawn={0: 700, 1: 900}))
    method.end_stage(fake(2, drawn={0: 400, 1: 300, 2: 25_000}))  # two and a half passes over 10,000 tokens
    seen = (10_000, 900, 10_000)
    expected = equal_quotas(seen, 6000) if policy == "quota" else reservoir(seen, 6000, 7)
    later = replace(stage(3), seed=7)
    plan = method.plan(later)
    assert plan.pools == dict(enumerate(expected)) and sum(expected) == 6000
    mixture = plan.mixture or {}
    assert mixture == pytest.approx({i: 0.75 * h / 6000 for i, h in enumerate(expected)} | {3: 0.25})
    method.end_stage(fake(3, drawn={3: 500}))
    assert method.plan(later) == plan  # asked again at the stage's end
    fresh = ReplayBuffer(method.options)
    fresh.load_state_dict({}, json.loads(json.dumps(method.state_dict()[1])))
    assert fresh.plan(replace(stage(4), seed=7)) == method.plan(replace(stage(4), seed=7))
    other = method.plan(replace(later, seed=8))
    assert (other == plan) == (policy == "quota")  # only the reservoir draws


# --- the controller ---


def controller(index: int = 2, **options: Any) -> tuple[AdaptiveReplay, FakeContext]:
    method = AdaptiveReplay(AdaptiveReplay.Options(**options))
    ctx = FakeContext(stage(index), losses={0: 2.0, 1: 3.0, 2: 99.0})
    method.begin_stage(cast("Context", ctx))
    return method, ctx


def reviews(method: AdaptiveReplay, ctx: FakeContext, rises: Sequence[float]) -> list[float]:
    """Return the shares of old text after reviews every 10 of 100 steps, between which the old loss rises so much."""
    shares = []
    for rise in rises:
        ctx.step += 10
        ctx.losses = {i: loss + rise for i, loss in ctx.losses.items()}
        plan = method.review(cast("Context", ctx))
        assert plan is not None and plan.mixture is not None
        k = ctx.stage.index
        assert [plan.mixture[i] for i in range(k)] == pytest.approx([(1 - plan.mixture[k]) / k] * k)
        shares.append(1 - plan.mixture[k])
    return shares


def test_the_controller_is_its_closed_form_clips_and_starts_high_after_a_switch() -> None:
    method, ctx = controller(old_min=0.1, old_max=0.8, gain=0.5, target=0.2)
    # A rise of r within a tenth of the stage is a slope of 10 r nats per stage.
    found = reviews(method, ctx, [0.0, 0.0, 0.05, 0.02, -0.1, 0.01])
    expected = [0.7, 0.6, 0.75, 0.75, 0.15, 0.1]
    assert found == pytest.approx(expected)
    assert reviews(method, ctx, [0.3]) == pytest.approx([0.8])
    assert reviews(method, ctx, [0.0, 0.0]) == pytest.approx([0.7, 0.6])
    for index in (2, 3):  # what was reached is forgotten at the next switch
        first = method.plan(stage(index))
        assert first.review_steps == 10 and 1 - (first.mixture or {})[index] == pytest.approx(0.8)
    method.begin_stage(fake(3, losses={0: 5.0, 1: 5.0, 2: 5.0}))
    assert method.state_dict()[1] == {"share": 0.8, "step": 0, "loss_nats": 5.0}


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=10))
@settings(max_examples=40, deadline=None)
def test_the_share_never_leaves_its_bounds(rises: list[float]) -> None:
    method, ctx = controller(old_min=0.05, old_max=0.6, gain=3.0)
    assert all(0.05 - 1e-9 <= share <= 0.6 + 1e-9 for share in reviews(method, ctx, rises))


def test_a_controller_goes_on_from_its_state() -> None:
    method, ctx = controller()
    reviews(method, ctx, [0.02, 0.01])
    fresh = AdaptiveReplay(method.options)
    fresh.load_state_dict({}, json.loads(json.dumps(method.state_dict()[1])))
    other = replace(ctx, losses=dict(ctx.losses))
    assert reviews(method, ctx, [0.015]) == reviews(fresh, other, [0.015])


# --- reuse ratio ---


class Signals(ReuseRatio):
    """Takes the fraction of active units from a list."""

    values: Sequence[float] = ()

    def _signal(self, ctx: Context) -> float:
        return self.values[ctx.step // 10 - 1]


def raised(values: Sequence[float], index: int = 1, method: Signals | None = None) -> list[tuple[int, dict[int, int]]]:
    """Return (step, pools) of every review that set a pool, with 40 tokens of new and 24 of old text a step."""
    method = method or Signals(ReuseRatio.Options(threshold=0.001))
    method.values = values
    found = []
    for step in range(10, 10 * len(values) + 1, 10):
        plan = method.review(fake(index, step=step, drawn={0: 24 * step, index: 40 * step}))
        if plan is not None:
            assert plan.mixture is None and plan.pools is not None
            found.append((step, dict(plan.pools)))
    return found


def test_reuse_is_raised_once_at_the_second_equal_check() -> None:
    # 800 new tokens in 20 of 100 steps, 3200 to come, every fourth of them for the first time.
    assert raised([0.5] * 9) == [(20, {1: 800 + 800})]
    assert raised([0.5, 0.6, 0.5, 0.6, 0.5]) == []
    assert raised([0.5, 0.5015, 0.503, 0.5045]) == []
    assert raised([0.5, 0.502, 0.5025, 0.9, 0.9]) == [(30, {1: 1200 + 700})]  # a later change takes nothing back


def test_reuse_stays_raised_and_stages_are_not_compared_with_each_other() -> None:
    method = Signals(ReuseRatio.Options(ratio=5.0))
    assert raised([0.5], method=method) == []
    assert raised([0.5, 0.7], index=2, method=method) == []  # the first check of a stage has none before it
    assert raised([0.5, 0.5], index=3, method=method) == [(20, {3: 800 + 640})]
    fresh = Signals(method.options)
    fresh.load_state_dict({}, json.loads(json.dumps(method.state_dict()[1])))
    for one in (method, fresh):  # all 4000 new tokens are reused five times, whatever the signal
        assert raised([0.1, 0.9, 0.2], index=4, method=one) == [(10, {4: 800})]
    assert raised([0.5] * 3, index=4, method=Signals(ReuseRatio.Options(ratio=1.0))) == [(20, {4: 4000})]


class Mlp(torch.nn.Module):
    """A feed-forward layer with Llama's names."""

    def __init__(self, width: int, n_units: int) -> None:
        super().__init__()
        self.up = torch.nn.Embedding(10, n_units)
        self.down_proj = torch.nn.Linear(n_units, width)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.up(ids_BT))
        return out


class OneLayer(torch.nn.Module):
    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.mlp = Mlp(2, hidden.shape[1])
        self.mlp.up.weight.data = hidden

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(input_ids)
        return out


def active(hidden: torch.Tensor, ids: list[list[int]], tau: float = 0.1) -> float:
    model, units = OneLayer(hidden), ActiveUnits(tau)
    with units.counting(model):
        model(input_ids=torch.tensor(ids))
    model(input_ids=torch.tensor(ids))  # outside: not counted
    assert not model._forward_pre_hooks and not model.mlp.down_proj._forward_pre_hooks
    return units.share


def test_active_units_are_those_that_stand_out() -> None:
    hidden = torch.zeros(10, 4)
    hidden[1], hidden[2] = torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([4.0, 0.0, 0.09, 0.11])
    assert active(hidden, [[1, 1]]) == 1.0  # equal activity
    assert active(hidden, [[2]]) == 2 / 4  # the mean is 1.05: 4.0 and 0.11 lie above a tenth of it
    assert active(hidden, [[1, 2]]) == 6 / 8
    assert (
        active(hidden, [[1, 2], [2, 0]]) == active(hidden, [[1, 2, 2]]) == 8 / 12
    )  # what fills up a row is not counted
    assert active(hidden, [[1, 0, 2]]) == 6 / 12  # a 0 within a row is
    assert active(1000 * hidden, [[1, 2]]) == active(1e-3 * hidden, [[1, 2]]) == 6 / 8
    with pytest.raises(ConfigError, match="no feed-forward layer"), ActiveUnits(0.1).counting(torch.nn.Linear(2, 2)):
        pass


def test_the_signal_of_a_real_model_is_the_definition(lab: Lab) -> None:
    found: list[float] = []

    class Asks(ReuseRatio):
        def review(self, ctx: Context) -> None:
            found.append(self._signal(ctx))
            own: list[torch.Tensor] = []
            layers = [layer.mlp for layer in cast("Any", ctx.module).model.layers]
            hooks = [
                one.register_forward_pre_hook(lambda mlp, args: own.append(hidden(mlp, args[0]))) for one in layers
            ]
            before = bill[-1]
            ctx.control_loss([1], n_rows=2)
            for hook in hooks:
                hook.remove()
            size = torch.cat([h.flatten(0, 1) for h in own]).abs()
            found.append(float((size > 0.1 * size.mean(1, keepdim=True)).double().mean()))
            assert before == bill[-1]

    def hidden(mlp: Any, x_BTD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = mlp.act_fn(mlp.gate_proj(x_BTD)) * mlp.up_proj(x_BTD)
        return out

    bill = [0]
    asks = Asks(Asks.Options(rows=2, steps=4))
    asks.name = "asks"
    trace = lab.train([asks], n_stages=1)
    assert found[0] == pytest.approx(found[1], abs=1e-12) and 0.5 < found[0] < 1
    assert trace.ledger["extra_tokens"] == {"control": 4 * lab.length}  # both passes, and nothing is free


# --- real runs, whose rows are drawn again and compared with what the model was shown ---


class Spy(Method):
    """Keeps what the model is shown."""

    name = "spy"

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, int, torch.Tensor, list[int]]] = []

    def extra_loss(self, ctx: Context, batch: Any, logits_BTV: torch.Tensor) -> None:
        self.shown.append((ctx.stage.index, batch.first_row, batch.inputs_BT.clone(), batch.source_B.tolist()))


def made(spec: str) -> Method:
    return registry.make_method(spec).method


def rows_of(
    lab: Lab, methods: Sequence[Method], excluded: Callable[[int], frozenset[str]] = lambda k: frozenset()
) -> tuple[dict[int, DataOrder], dict[str, Any]]:
    """Train, draw the rows of every stage again from the ledger's plans, and hold them against what was shown."""
    spy = Spy()
    bill = lab.train([*methods, spy]).ledger
    composed = Composed(methods)
    planner = RowPlanner(
        stream=lab.stream, training=lab.track.training, seed=0, keeps_control=composed.needs(Need.CONTROL_DATA)
    )
    steps = [m.options.steps for m in methods if m.overrides("review")]
    orders = {}
    for one in lab.stages:
        entries = bill["plans"].get(str(one.index), [{"step": 0}])
        assert entries[0]["step"] == 0
        plan = reviewed(StagePlan(review_steps=steps[0] if steps else None, excluded=excluded(one.index)), entries[0])
        order = planner.rows(one, plan)
        for entry in entries[1:]:
            planner.redraw(one, reviewed(plan, entry), order, entry["step"])
        orders[one.index] = order
        drawn = {str(source): n for source, n in order.drawn(order.n_steps)[1].items()}
        assert drawn == bill["tokens"][str(one.index)]
    n_rows = Counter[int]()
    for k, first, inputs_BT, sources in spy.shown:
        for b, source in enumerate(sources):
            start, n = int(orders[k].start[first + b]), int(orders[k].n_targets[first + b])
            text = lab.stream.tokens("train", source)[start : start + n].astype(np.int64)
            assert orders[k].source[first + b] == source and inputs_BT[b, :n].tolist() == text.tolist()
            n_rows[k] += 1
    assert n_rows == {k: len(order.start) for k, order in orders.items()}
    return orders, bill


def spans(order: DataOrder, source: int) -> list[tuple[int, int]]:
    """Return first and last token (the last target) of every row from one source, in training order."""
    mine = order.source == source
    return [(int(s), int(s + n)) for s, n in zip(order.start[mine], order.n_targets[mine], strict=True)]


def shelf(lab: Lab, source: int) -> Shelf:
    return Shelf(lab.stream, source, length=lab.length, seed=0, batching="packed")


@pytest.mark.parametrize("policy", ["reservoir", "quota"])
def test_what_a_buffer_evicts_is_never_drawn_again(lab: Lab, policy: str) -> None:
    method = made(f"replay-buffer:tokens=1500,policy={policy}")
    orders, bill = rows_of(lab, [method])
    for source in range(3):
        one = shelf(lab, source)
        first = one.start[one.first_order()].tolist()
        before, places = math.inf, []
        for k in range(source + 1, 4):
            pool = bill["plans"][str(k)][0]["pools"][str(source)]
            starts = {start for start, _ in spans(orders[k], source)}
            n_rows = 1 + max(first.index(start) for start in starts)
            assert n_rows <= -(-pool // lab.length) + 1 < len(first) and pool <= before
            before = pool
            places.append(n_rows)
        assert starts  # the last stage still draws it
        if source:
            own = {start for start, _ in spans(orders[source], source)}
            assert starts <= own  # only what this run has seen is held
    assert 0 < bill["stored_bytes"]["replay_data"] <= 1500 * lab.stream.tokens("train", 0).dtype.itemsize


def test_reviews_stand_in_the_ledger_and_control_rows_are_not_trained_on(lab: Lab) -> None:
    orders, bill = rows_of(lab, [made("adaptive-replay:steps=2,rows=4,old_max=0.6,gain=2")])
    for k, order in orders.items():
        plans = bill["plans"][str(k)]
        assert [plan["step"] for plan in plans] == [0, 2, 4]
        assert 1 - plans[0]["mixture"][str(k)] == pytest.approx(0.6)
        assert len({round(plan["mixture"][str(k)], 9) for plan in plans}) > 1  # it was moved
        for source in range(k + 1):
            one = shelf(lab, source)
            kept_back = set(one.start[one.control()].tolist())
            assert kept_back and not kept_back & {start for start, _ in spans(order, source)}
    expected = sum(
        k * 3 * 4 * lab.length for k in (1, 2, 3)
    )  # stage k: its k past stages, at the start and two reviews
    assert expected - 3 * 3 * 4 * lab.length <= bill["extra_tokens"]["control"] <= expected


def test_a_raised_ratio_repeats_a_pool_of_new_text_and_nothing_else_is_drawn(lab: Lab) -> None:
    orders, bill = rows_of(lab, [made("reuse-ratio:steps=1,rows=4,threshold=1,ratio=3"), made("replay")])
    once, _ = rows_of(lab, [made("reuse-ratio:steps=1,rows=4,threshold=0"), made("replay")])
    pools = {k: [(p["step"], p["pools"][k]) for p in plans if "pools" in p] for k, plans in bill["plans"].items()}
    assert [step for step, _ in pools["1"]] == [2] and [step for step, _ in pools["2"]] == [1]
    for k, order in orders.items():
        drawn = [start for start, _ in spans(order, k)]
        distinct, limit = set(drawn), pools[str(k)][0][1]
        assert len(distinct) == -(-limit // lab.length) < len(drawn)
        assert max(Counter(drawn).values()) > 1
        alone = [start for start, _ in spans(once[k], k)]
        assert len(set(alone)) == len(alone)  # never settled: one pass
        assert alone[: len(distinct)] == drawn[: len(distinct)]  # the pool is what one pass draws first


@pytest.mark.parametrize("spec", ["adaptive-replay:steps=2,rows=4", "reuse-ratio:steps=2,rows=4,threshold=1"])
def test_a_reviewed_stage_that_is_stopped_in_the_middle_ends_the_same(lab: Lab, spec: str) -> None:
    whole = lab.train([made(spec)])
    resumed = lab.interrupted(lambda: [made(spec)], [Place(1, 1), Place(2, 2), Place(2, 3), Place(3, None)])
    assert comparable(resumed.releases[3]) == comparable(whole.releases[3])
    assert resumed.ledger["plans"] == whole.ledger["plans"] and resumed.ledger["tokens"] == whole.ledger["tokens"]
    assert comparable(resumed.state) == comparable(whole.state)


# --- deletion requests ---


def ids_of(stream: Stream, index: int) -> list[str]:
    ids: list[str] = stream.documents("train", index, ["id"]).column("id").to_pylist()
    return ids


def touching(lab: Lab, order: DataOrder, identities: set[str]) -> int:
    """Return how many rows hold a token of some documents, by loops over documents and rows."""
    found = 0
    for source in range(4):
        offsets = lab.stream.offsets("train", source).tolist()
        for i, one in enumerate(ids_of(lab.stream, source)):
            if identity_of(one) in identities:
                found += sum(a < offsets[i + 1] and offsets[i] <= b for a, b in spans(order, source))
    return found


OTHERS: tuple[list[str], ...] = (
    [],
    ["replay-buffer:tokens=1500"],
    ["weighted-replay:by=loss,rows=2", "constant"],
    ["adaptive-replay:steps=2,rows=2"],
    ["reuse-ratio:steps=2,rows=2,threshold=1", "replay"],
)


@pytest.mark.parametrize("others", OTHERS, ids=lambda specs: "+".join(specs) or "alone")
def test_no_token_of_a_deleted_document_is_drawn(lab: Lab, tmp_path: Path, others: list[str]) -> None:
    early = {ids_of(lab.stream, 0)[5], *ids_of(lab.stream, 1)[:4]}
    late = {*ids_of(lab.stream, 0)[10:20], *ids_of(lab.stream, 1)[10:20], *ids_of(lab.stream, 2)[::3]} - early
    lines = ["id,from_stage", *(f"{one}," for one in sorted(early)), *(f"{one},3" for one in sorted(late))]
    file = tmp_path / "requests.csv"
    file.write_text("\n".join(lines), encoding="utf-8")

    def excluded(k: int) -> frozenset[str]:
        return frozenset(early | late if k >= 3 else early)

    orders, bill = rows_of(lab, [made(f"deletions:file={file}"), *map(made, others)], excluded)
    assert [touching(lab, orders[k], set(excluded(k))) for k in (1, 2, 3)] == [0, 0, 0]
    assert touching(lab, orders[2], late) > 0  # asked for later: still drawn before
    counts = [plans[0]["n_excluded"] for _, plans in sorted(bill["plans"].items())]
    assert counts == [len(early), len(early), len(early | late)]
    if others == OTHERS[1]:
        without, _ = rows_of(lab, [made(one) for one in others])
        assert touching(lab, without[3], early | late) > 0  # the same run without requests does draw them


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_requests_are_read_from_csv_and_jsonl(tmp_path: Path) -> None:
    table = written(tmp_path / "a.csv", '\ufeffid,who,from_stage\r\na@@2,x,3\r\n"b,c",y,\r\na,z,2\r\n')
    lines = written(
        tmp_path / "b.jsonl", '{"id": "a", "from_stage": 2}\n\n{"id": "b,c"}\n{"id": "a@@7", "from_stage": "3"}'
    )
    for file in (table, lines):
        method = Deletions(Deletions.Options(file=str(file)))
        assert method.from_stage == {"a": 2, "b,c": 1}  # the earlier request holds, for all versions
        assert method.plan(stage(1)) == StagePlan(excluded=frozenset({"b,c"}))
        assert method.plan(stage(2)).excluded == method.plan(stage(9)).excluded == {"a", "b,c"}
    again = registry.build_component("deletions", registry.make_method(f"deletions:file={table}").as_dict()["options"])
    assert again.as_dict() == registry.make_method(f"deletions:file={table}").as_dict()
    written(table, "id\na\n")
    with pytest.raises(IntegrityError, match="have changed: sha256"):
        registry.build_component("deletions", again.as_dict()["options"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "missing"),
        ("a.txt", "id\na", "are .csv or .jsonl"),
        ("a.csv", "document\na", r"no column id; columns: \['document'\]"),
        ("a.csv", "", "no column id; columns: none"),
        ("a.csv", "id\n", "no deletion request"),
        ("a.csv", 'id\n"a', "not CSV.*line 2"),
        ("a.csv", "id,from_stage\na,soon", r"from_stage is 'soon' \(.*line 2\)"),
        ("a.csv", "id,from_stage\na,1\nb,0", r"from_stage is '0' \(.*line 3\)"),
        ("a.csv", "id,from_stage\na,1.5", "from_stage is '1.5'"),
        ("a.csv", "id,from_stage\n,1", "'' is no document id"),
        ("a.csv", b"id\n\xff", "not UTF-8"),
        ("a.jsonl", '{"id": "a"}\n{"id"', r"not JSON: .* \(.*line 2\)"),
        ("a.jsonl", '["a"]', "no id"),
        ("a.jsonl", '{"id": 3}', "3 is no document id"),
        ("a.jsonl", '{"id": "a", "from_stage": true}', "from_stage is True"),
        ("a.csv", "id,from_stage\na,4", r"'a' holds from stage 4, the last one is 3"),
    ],
)
def test_requests_that_cannot_be_used_are_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if content is not None:
        written(tmp_path / name, content)
    with pytest.raises(ClbenchError, match=message) as caught:
        Deletions(Deletions.Options(file=str(tmp_path / name))).plan(replace(stage(1), n_stages=4))
    assert str(tmp_path / name) in str(caught.value) and "; " in str(caught.value) and "\n" not in str(caught.value)


def test_deletions_without_a_file_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a file; write deletions:file=requests\.csv"):
        run_tiny(tmp_path, ["deletions"])
    assert list(tmp_path.iterdir()) == []


# --- a whole run, and options that are refused ---


def test_a_run_holds_its_options_and_its_ledger_is_its_plan(tmp_path: Path) -> None:
    store: RunStore = run_tiny(tmp_path, ["weighted-replay:by=weights,weights=1+0+3"])
    options = store.config()["method"]["components"][0]["options"]
    assert options["weights"] == [1.0, 0.0, 3.0]
    bill = store.ledger()
    assert bill["tokens"] == {
        "1": {"0": 750, "1": 750},
        "2": {"0": 750, "2": 750},
        "3": {"0": 187, "2": 563, "3": 750},
    }
    assert {k: plans[0]["mixture"] for k, plans in bill["plans"].items()} == {
        "1": {"0": 0.5, "1": 0.5},
        "2": {"0": 0.5, "2": 0.5},
        "3": {"0": 0.125, "2": 0.375, "3": 0.5},
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("replay-buffer:tokens=0", "holds nothing"),
        ("replay-buffer:policy=fifo", "policy"),
        ("replay-buffer:fraction=2", "replay-buffer:fraction=2 is no share"),
        ("weighted-replay:by=date", "by"),
        ("weighted-replay:gamma=0", "gamma=0.0 cannot be used"),
        ("weighted-replay:by=loss,temperature=0", "temperature=0.0"),
        ("weighted-replay:by=weights", "weights=None"),
        ("weighted-replay:weights=1+2", r"weights=\(1.0, 2.0\)"),
        ("weighted-replay:by=weights,weights=1+-2", "cannot be used"),
        ("adaptive-replay:old_min=0.5,old_max=0.4", "0.5 to 0.4"),
        ("adaptive-replay:old_max=1", "0.1 to 1.0"),
        ("adaptive-replay:steps=0", "steps=0"),
        ("reuse-ratio:ratio=0.5", "ratio=0.5"),
        ("reuse-ratio:threshold=-1", "threshold=-1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(spec)
    assert "; " in str(caught.value)


def test_too_few_weights_are_refused_at_the_first_stage() -> None:
    with pytest.raises(ConfigError, match="has 2 for 3 stages that become past"):
        made("weighted-replay:by=weights,weights=1+2").plan(replace(stage(1), n_stages=4))


def test_shares_that_nobody_gets_are_new() -> None:
    assert mixture_of(2, Fraction(1, 2), {0: 0.0, 1: 0.0}) == mixture_of(2, 1, {0: 1.0}) == {2: 1.0}
