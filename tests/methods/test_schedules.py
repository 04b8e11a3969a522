"""Schedules against closed forms and published check values, over stages, branches and resumes."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench import registry
from clbench.contract.lab import Lab, Place, Stopped, Trace
from clbench.errors import ClbenchError, ConfigError
from clbench.method import Composed, Cosine, Schedule, Stage, StagePlan, Weights, tail_steps
from clbench.methods._schedules import NEVER_ZERO, SHAPES
from clbench.methods.cosine_ar import autoregressive_peak
from clbench.results.store import RunStore
from clbench.train.checkpoint import load_latest

EVERY_SPEC = [
    "cyclic-cosine:peak=0.5,floor=0",
    "cosine-ar",
    "constant:rewarm=true",
    "rsqrt",
    "rsqrt:reading=branch,cooldown=0.5",
    "wsd:shape=linear,floor=0",
    "wsd:shape=inverse,decay=1",
    "wsd-s:shape=exponential,rewarm=true",
    "wsd-s:shape=cosine",
    "infinite",
    "infinite:cooldown_shape=rsqrt,cooldown=0.9,rewarm=true",
]


def stage(index: int = 1, **changes: Any) -> Stage:
    values: dict[str, Any] = {
        "index": index,
        "n_stages": 6,
        "n_tokens": 1000,
        "available_tokens": (1,) * (index + 1),
        "learning_rate": 1.0,
        "warmup_steps": 10,
        "floor": 0.1,
    }
    return Stage(**(values | changes))


def plan(spec: str, at: Stage) -> StagePlan:
    return registry.make_method(spec).method.plan(at)


def main_line(spec: str, at: Stage) -> Schedule:
    schedule = plan(spec, at).schedule
    assert schedule is not None
    return schedule


def branch(spec: str, at: Stage) -> Schedule:
    found = plan(spec, at).branch
    assert found is not None
    return found.schedule


def rates(schedule: Schedule, n_steps: int) -> list[float]:
    return [schedule(step, n_steps) for step in range(n_steps)]


# --- shapes ---


@pytest.mark.parametrize(
    ("shape", "u", "share"),
    [
        ("linear", 0.5, 0.6),
        ("cosine", 0.5, 0.6),
        ("cosine", 1 / 3, 0.8),
        ("1-sqrt", 0.25, 0.6),
        ("inverse", 0.5, 1 / 3),  # the mean of 1/1 and 1/0.2 is 3
        ("exponential", 0.5, math.sqrt(0.2)),
    ],
)
def test_shapes_at_known_points(shape: str, u: float, share: float) -> None:
    assert SHAPES[shape](u, 0.2) == pytest.approx(share, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.floats(1e-6, 1), st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_shapes_fall_from_one_to_the_floor(shape: str, floor: float, places: list[float]) -> None:
    assert SHAPES[shape](0.0, floor) == pytest.approx(1, rel=1e-12)
    assert SHAPES[shape](1.0, floor) == pytest.approx(floor, rel=1e-9)
    for earlier, later in pairwise(SHAPES[shape](u, floor) for u in sorted(places)):
        assert later <= earlier + 1e-12
        assert floor - 1e-12 <= later <= 1 + 1e-12


def test_the_inverse_shape_is_linear_in_one_over_the_learning_rate() -> None:
    """Levanter's formula: 1/lr goes along a line from 1/peak to 1/end."""
    schedule = branch("wsd:shape=inverse,decay=0.5", stage(learning_rate=3e-4))
    for e in range(20):
        u = e / 20
        assert schedule(20 + e, 40) == pytest.approx(1 / (u / 3e-5 + (1 - u) / 3e-4), rel=1e-12)


# --- cosines ---


def test_cyclic_cosine_is_the_tracks_own_schedule_unless_told_otherwise() -> None:
    own = Cosine(peak=1.0, warmup_steps=10, floor=0.1)
    assert rates(main_line("cyclic-cosine", stage(3)), 74) == rates(own, 74)
    moved = main_line("cyclic-cosine:peak=2,floor=0.5", stage(3))
    assert moved(42, 74) == pytest.approx(1 + 0.5 * (1 + math.cos(math.pi / 2)))
    assert plan("cyclic-cosine", stage()).optimizer is None


@pytest.mark.parametrize(
    ("i", "peak"),
    [(0, 3.0e-4), (1, 1.65e-4), (2, 9.75e-5), (3, 6.95e-5), (5, 4.81e-5), (10, 3.55e-5), (20, 3.15e-5), (50, 3.03e-5)],
)
def test_autoregressive_peaks_are_those_of_tic_lm(i: int, peak: float) -> None:
    """Research notes 2.2: eta_0 = 3e-4, eta_end = 3e-5."""
    schedule = main_line("cosine-ar", stage(i + 1, n_stages=114, learning_rate=3e-4, warmup_steps=50))
    assert schedule(50, 1887) == pytest.approx(peak, rel=2e-3)
    assert schedule(49, 1887) == pytest.approx(schedule(50, 1887), rel=1e-12)
    assert schedule(1886, 1887) == pytest.approx(3e-5, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 120), st.integers(1, 100), st.integers(1, 2000))
def test_the_closed_form_of_the_peak_is_the_released_construction(i: int, warmup: int, rest: int) -> None:
    """A cosine over everything up to this stage's end, with i+1 warm-ups, at step i S + W of it."""
    n_steps = warmup + rest
    imagined = Cosine(peak=3e-4, warmup_steps=(i + 1) * warmup, floor=0.1)
    assert autoregressive_peak(i, 3e-4, 3e-5) == pytest.approx(imagined(i * n_steps + warmup, (i + 1) * n_steps))


# --- constant ---


def test_constant_warms_up_once_and_stays() -> None:
    assert rates(main_line("constant:peak=2", stage()), 20) == [2 * min(10, s + 1) / 10 for s in range(20)]
    assert rates(main_line("constant:peak=2", stage(2)), 20) == [2.0] * 20
    assert rates(main_line("constant:rewarm=true", stage(2)), 20)[:3] == [0.1, 0.2, 0.3]


# --- reciprocal root ---

TIC: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 50, "floor": 0.03, "n_stages": 114}
COOLDOWN = 400 / 1887


@pytest.mark.parametrize(("step", "rate"), [(100, 7.2e-4), (1000, 2.5e-4), (1487, 2.1e-4)])
def test_rsqrt_has_the_learning_rates_of_tic_lm(step: int, rate: float) -> None:
    """Research notes 2.3: eta_max = 1e-3, W = 50, 400 of 1887 steps of cooldown."""
    for index in (1, 7):
        schedule = main_line(f"rsqrt:cooldown={COOLDOWN}", stage(index, **TIC))
        assert schedule(step, 1887) == pytest.approx(rate, abs=5e-6)
        assert schedule(step, 1887) == pytest.approx(3e-5 + 9.7e-4 * math.sqrt(50 / step), rel=1e-12)


def test_rsqrt_cools_along_a_line_to_the_floor() -> None:
    schedule = main_line(f"rsqrt:cooldown={COOLDOWN}", stage(**TIC))
    top = 3e-5 + 9.7e-4 * math.sqrt(50 / 1487)
    assert [schedule(1487 + e, 1887) for e in (0, 100, 200, 399)] == pytest.approx(
        [3e-5 + (top - 3e-5) * (1 - e / 400) for e in (0, 100, 200, 399)], rel=1e-12
    )
    assert schedule(24, 1887) == pytest.approx(5e-4)
    assert rates(schedule, 1887)[49:51] == pytest.approx([1e-3, 1e-3])


def test_rsqrt_with_branches_is_one_curve_over_stages_of_any_length() -> None:
    method = registry.make_method("rsqrt:reading=branch,cooldown=0.25").method
    lengths = [40, 60, 20]
    for index, n_steps in enumerate(lengths, start=1):
        method.load_state_dict({}, {"stage_steps": lengths[: index - 1]})
        found = method.plan(stage(index))
        assert found.schedule is not None and found.branch is not None
        assert found.optimizer == "carry"
        before = sum(lengths[: index - 1])
        for step in range(n_steps):
            g = before + step
            line = (g + 1) / 10 if g < 10 else 0.1 + 0.9 * math.sqrt(10 / g)
            assert found.schedule(step, n_steps) == pytest.approx(line, rel=1e-12)
        start = n_steps - n_steps // 4
        top = 0.1 + 0.9 * math.sqrt(10 / (before + start))
        half = found.branch.schedule(start + n_steps // 8, n_steps)
        assert half == pytest.approx(0.1 + (top - 0.1) * (1 - (n_steps // 8) / (n_steps // 4)), rel=1e-12)


def test_rsqrt_plans_an_ended_stage_as_it_was() -> None:
    """A run that is resumed at a stage's end asks for the plan of that stage again."""
    method = registry.make_method("rsqrt:reading=branch").method
    found = []
    for lengths in ([40], [40, 60]):
        method.load_state_dict({}, {"stage_steps": lengths})
        schedule = method.plan(stage(2)).schedule
        assert schedule is not None
        found.append(rates(schedule, 60))
    assert found[0] == found[1]


# --- WSD and WSD-S ---


def test_wsd_holds_the_peak_and_decays_aside_until_the_last_stage_decays_itself() -> None:
    spec = "wsd:shape=linear,decay=0.25"
    assert rates(main_line(spec, stage()), 40) == [min(1.0, (s + 1) / 10) for s in range(40)]
    decayed = [1.0] * 30 + [1 - 0.9 * e / 10 for e in range(10)]
    for index in range(2, 5):
        assert rates(main_line(spec, stage(index)), 40) == [1.0] * 40
        assert rates(branch(spec, stage(index)), 40) == pytest.approx(decayed, rel=1e-12)
    assert plan(spec, stage(5)).branch is None
    assert rates(main_line(spec, stage(5)), 40) == pytest.approx(decayed, rel=1e-12)
    assert {plan(spec, stage(index)).optimizer for index in range(1, 6)} == {"carry"}
    assert plan("wsd:optimizer=track", stage()).optimizer is None


def test_wsd_s_has_levanters_cycles() -> None:
    """Levanter's own cases: cycles that end at 300 and 700, a decay of a tenth of each, no second warm-up."""
    for index, n_steps in ((1, 300), (2, 400)):
        schedule = main_line("wsd-s:shape=cosine", stage(index, learning_rate=1e-3, warmup_steps=0))
        start = n_steps - n_steps // 10
        assert schedule(0, n_steps) == schedule(start - 1, n_steps) == pytest.approx(1e-3)
        assert schedule(start + 1, n_steps) < 1e-3
        middle = schedule(start + n_steps // 20, n_steps)
        assert middle == pytest.approx(5.5e-4, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(2, 200))
def test_wsd_s_that_decays_all_along_a_cosine_is_the_cyclic_cosine(warmup: int, rest: int) -> None:
    n_steps = warmup + rest
    at = stage(4, warmup_steps=warmup)
    cycle = main_line(f"wsd-s:shape=cosine,rewarm=true,decay={rest / n_steps}", at)
    assert rates(cycle, n_steps) == pytest.approx(rates(main_line("cyclic-cosine", at), n_steps), rel=1e-12)


def test_tokens_for_all_releases_of_the_published_example() -> None:
    """Checkpoints at 50, 100 and 200 B tokens, each decayed over a tenth of all tokens so far: 215 B and 200 B."""
    steps_per_b = 10
    total = dict.fromkeys(("wsd", "wsd-s"), 0)
    for name in total:
        reached = 0
        for index, target in enumerate((50, 100, 200), start=1):
            n_steps = (target - reached) * steps_per_b
            decay = 0.1 * target * steps_per_b / n_steps
            found = plan(f"{name}:decay={decay}", stage(index, n_stages=4))
            total[name] += n_steps + (tail_steps(found.branch.fraction, n_steps) if found.branch else 0)
            reached = target
    assert total == {"wsd": 215 * steps_per_b, "wsd-s": 200 * steps_per_b}


# --- infinite ---


@pytest.mark.parametrize("shape", ["cosine", "rsqrt"])
def test_infinite_cools_to_its_constant_and_anneals_exponentially(shape: str) -> None:
    spec = f"infinite:constant=0.4,cooldown=0.5,cooldown_shape={shape},timescale=3,decay=0.2"
    schedule, annealed = main_line(spec, stage()), branch(spec, stage())
    assert rates(schedule, 100)[:11] == pytest.approx([0.1 * (s + 1) for s in range(10)] + [1.0])
    for e in (0, 10, 25, 50):
        u = e / 50
        h = (1 / math.sqrt(1 + 3 * u) - 1) / (1 / math.sqrt(4) - 1)
        expected = 0.4 + 0.3 * (1 + math.cos(math.pi * u)) if shape == "cosine" else 1 - 0.6 * h
        assert schedule(10 + e, 100) == pytest.approx(expected, rel=1e-12)
    assert rates(schedule, 100)[60:] == pytest.approx([0.4] * 40)
    assert rates(annealed, 100)[80:] == pytest.approx([0.4 * 0.25 ** (e / 20) for e in range(20)])


def test_infinite_warms_up_again_only_when_asked_to() -> None:
    assert rates(main_line("infinite:constant=0.4", stage(3)), 50) == [0.4] * 50
    first = rates(main_line("infinite:constant=0.4", stage(1)), 50)
    assert rates(main_line("infinite:constant=0.4,rewarm=true", stage(3)), 50) == first
    last = rates(main_line("infinite:constant=0.4,decay=0.2", stage(5)), 50)
    assert last == pytest.approx([0.4] * 40 + [0.4 * 0.25 ** (e / 10) for e in range(10)])


def test_infinite_has_cooled_down_where_its_annealing_begins() -> None:
    """Warm-up, cooldown and annealing are longer than a stage: the cooldown is cut, here to 22 of 32 steps."""
    schedule = main_line("infinite:constant=0.4,cooldown=0.8,decay=0.2", stage())
    assert schedule(21, 40) == pytest.approx(0.7)
    assert schedule(31, 40) > 0.4
    assert schedule(32, 40) == pytest.approx(0.4, rel=1e-12)


# --- every schedule ---


@pytest.mark.parametrize("spec", EVERY_SPEC)
@settings(max_examples=25, deadline=None)
@given(n_steps=st.integers(1, 60), warmup=st.sampled_from([0, 1, 5, 1000]), index=st.integers(1, 5))
def test_any_stage_can_be_scheduled(spec: str, n_steps: int, warmup: int, index: int) -> None:
    """One step, two steps, a warm-up longer than the stage: learning rates stay between floor 0 and the peak."""
    found = plan(spec, stage(index, warmup_steps=warmup))
    assert found.schedule is not None
    line = rates(found.schedule, n_steps)
    assert all(0 < rate <= 1 + 1e-12 for rate in line)
    if found.branch is not None:
        aside, fork = rates(found.branch.schedule, n_steps), n_steps - tail_steps(found.branch.fraction, n_steps)
        assert aside[: fork + 1] == line[: fork + 1], "a branch leaves the main line where it begins, not before"
        assert all(0 < decayed <= held + 1e-12 for decayed, held in zip(aside, line, strict=True))


@pytest.mark.parametrize("spec", ["cyclic-cosine", "cosine-ar", "rsqrt", "wsd", "wsd-s", "infinite", "constant"])
def test_a_higher_peak_scales_the_whole_curve_and_a_floor_is_a_share_of_it(spec: str) -> None:
    low, high = main_line(f"{spec}:peak=1", stage(5)), main_line(f"{spec}:peak=2.5", stage(5))
    assert rates(high, 30) == pytest.approx([2.5 * rate for rate in rates(low, 30)], rel=1e-12)
    if spec != "constant":
        assert rates(main_line(f"{spec}:floor=0.5", stage(5, floor=0.0)), 30) == pytest.approx(
            rates(main_line(spec, stage(5, floor=0.5)), 30), rel=1e-12
        )
        assert rates(main_line(f"{spec}:floor=0.5", stage(5)), 30) != pytest.approx(rates(low, 30), rel=1e-3)


@pytest.mark.parametrize("spec", [spec for spec in EVERY_SPEC if spec.startswith("wsd")])
def test_a_warmup_that_is_too_long_still_reaches_the_peak(spec: str) -> None:
    found = plan(spec, stage(1, warmup_steps=1000))
    decayed = found.branch.schedule if found.branch else found.schedule
    assert decayed is not None
    assert max(rates(decayed, 20)) == 1.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("constant:peak=0", "peak=0.0 is no multiple.*give a number above 0"),
        ("cyclic-cosine:peak=nan", "peak=nan"),
        ("cosine-ar:peak=inf", "peak=inf"),
        ("cyclic-cosine:floor=1.5", "floor=1.5 is no share"),
        ("wsd:floor=-0.1", "floor=-0.1"),
        ("wsd:decay=0", "decay=0.0 is no share of a stage"),
        ("wsd-s:decay=1.1", "decay=1.1"),
        ("wsd:shape=1-sqr", "unknown decay shape '1-sqr'.*did you mean '1-sqrt'"),
        ("wsd:shape=inverse,floor=0", "inverse never reaches floor 0"),
        ("wsd-s:shape=exponential,floor=0", "exponential never reaches floor 0"),
        ("wsd:optimizer=keep", "unknown optimizer policy 'keep'.*carry, reset, reset_first, track"),
        ("rsqrt:reading=both", "unknown reading 'both'.*cyclic, branch"),
        ("rsqrt:cooldown=0", "cooldown=0.0"),
        ("infinite:floor=0", "never reaches floor 0"),
        ("infinite:cooldown=0.95", "longer than a stage"),
        ("infinite:cooldown_shape=linear", "unknown cooldown shape"),
        ("infinite:timescale=0", "timescale=0.0"),
        ("optimizer-state:policy=drop", "unknown optimizer policy 'drop'"),
        ("optimizer-state:policy=track", "leaves it open"),
        ("wsd:rewarm=perhaps", "rewarm"),
    ],
)
def test_bad_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.make_method(spec)


@pytest.mark.parametrize("shape", NEVER_ZERO)
def test_a_track_whose_floor_is_zero_refuses_shapes_that_never_reach_it(shape: str) -> None:
    with pytest.raises(ConfigError, match="never reaches floor 0"):
        plan(f"wsd:shape={shape}", stage(floor=0.0))
    assert plan("wsd:shape=linear", stage(floor=0.0)).branch is not None


def test_a_constant_below_the_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="not between floor and peak"):
        plan("infinite:constant=0.05", stage())


def test_optimizer_state_composes_with_schedules_that_leave_it_open() -> None:
    def merged(*specs: str) -> StagePlan:
        return Composed([registry.make_method(spec).method for spec in specs]).plan(stage(2))

    for policy in ("carry", "reset", "reset_first"):
        for schedule in ("cosine-ar", "wsd:optimizer=track", "rsqrt"):
            assert merged(schedule, f"optimizer-state:policy={policy}").optimizer == policy
    with pytest.raises(ClbenchError, match="both set the optimizer"):
        merged("wsd", "optimizer-state")


# --- in real runs ---


@pytest.fixture(scope="module")
def lab(clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("schedules"))


def run(lab: Lab, spec: str, places: list[Place] | None = None, n_stages: int | None = None) -> tuple[Trace, Path]:
    """Train with a method, stopped and resumed at some places; returns what came out and the run's folder."""
    folder = lab.new_folder()
    released: dict[int, Weights] = {}
    for stop in places or []:
        trace = Trace()
        with pytest.raises(Stopped):
            lab.train(
                [registry.make_method(spec).method], folder=folder, checkpoint_seconds=0.0, stop=stop, trace=trace
            )
        released |= trace.releases
    method = registry.make_method(spec).method
    trace = lab.train([method], folder=folder, checkpoint_seconds=0.0, n_stages=n_stages)
    trace.releases = released | trace.releases
    return trace, folder


def logged(folder: Path) -> dict[int, list[float]]:
    """Return stage -> learning rates of all steps that were taken, as logged."""
    found: dict[int, list[float]] = {}
    for line in RunStore(folder).steps():
        taken = found.setdefault(line["stage"], [])
        assert line["step"] == len(taken)
        taken.append(line["lr"])
    return found


def closed_form(spec: str, at: Stage) -> list[float]:
    """Return the learning rates of the lab's stages of 5 steps, branch included, written out by hand."""
    peak, end, W, n = at.learning_rate, at.learning_rate * at.floor, at.warmup_steps, 5
    if spec == "cosine-ar":
        top = end + 0.5 * (peak - end) * (1 + math.cos(math.pi * (at.index - 1) / at.index))
        W = min(W, n - 1)
        return [
            top * (s + 1) / W if s < W else end + 0.5 * (top - end) * (1 + math.cos(math.pi * (s - W) / (n - W)))
            for s in range(n)
        ]
    W, last = min(W, 3), at.index == at.n_stages - 1
    if spec == "wsd:decay=0.4":
        line = [peak * (s + 1) / W if at.index == 1 and s < W else peak for s in range(n)]
    else:
        line = [
            peak * (g + 1) / W if g < W else end + (peak - end) * math.sqrt(W / g)
            for g in range((at.index - 1) * n, at.index * n)
        ]
    left = 1 - math.sqrt(0.5) if spec.startswith("wsd") else 0.5
    decayed = [line[3], end + (line[3] - end) * left]
    return line[:3] + decayed + ([] if last else line[3:])


@pytest.mark.parametrize("spec", ["cosine-ar", "wsd:decay=0.4", "rsqrt:reading=branch,cooldown=0.4"])
def test_a_stopped_and_resumed_run_logs_the_closed_form(lab: Lab, spec: str) -> None:
    # In a stage with a branch 7 steps are taken: 3 and 4 on the branch, 5 and 6 back on the main line.
    places = [Place(1, 2), Place(1, 4), Place(1, None), Place(2, 3), Place(3, 1)]
    _, folder = run(lab, spec, places)
    found = logged(folder)
    assert sorted(found) == [at.index for at in lab.stages]
    for at in lab.stages:
        assert found[at.index] == pytest.approx(closed_form(spec, at), rel=1e-12)


def test_wsd_releases_first_what_wsd_s_releases_and_pays_for_its_branches(lab: Lab) -> None:
    wsd, _ = run(lab, "wsd:decay=0.4")
    wsd_s, folder = run(lab, "wsd-s:decay=0.4")
    assert all(torch.equal(tensor, wsd_s.releases[1][name]) for name, tensor in wsd.releases[1].items())
    assert any(not torch.equal(tensor, wsd_s.releases[2][name]) for name, tensor in wsd.releases[2].items())
    n_tokens = [at.n_tokens for at in lab.stages]
    for trace in (wsd, wsd_s):
        assert [sum(row.values()) for row in trace.ledger["tokens"].values()] == n_tokens
    # Two of five steps are taken twice, in every stage but the last.
    seen = {(line["stage"], line["step"]): line["n_tokens"] for line in RunStore(folder).steps()}
    aside = sum(seen[at.index, 4] - seen[at.index, 2] for at in lab.stages[:-1])
    assert aside > 0
    assert wsd.ledger["extra_tokens"] == {"decay_branch": aside}
    assert wsd_s.ledger["extra_tokens"] == {}
    per_token = wsd_s.ledger["flops"]["train"] / sum(n_tokens)
    assert wsd.ledger["flops"]["decay_branch"] == pytest.approx(per_token * aside)
    assert wsd.ledger["flops"]["train"] == pytest.approx(wsd_s.ledger["flops"]["train"])


def test_the_main_line_of_wsd_is_the_constant_schedule_that_no_branch_touches(lab: Lab) -> None:
    """Before the last stage, what training goes on from never saw a decay: weights, moments and step counts."""
    training = lab.track.training.model_copy(update={"warmup_steps": 2})  # that leaves room for both decay steps
    track = lab.track.model_copy(update={"training": training})
    place = Lab(lab.folder / "short", track, lab.stream, lab.hardware, lab.base)

    def resume_state(spec: str) -> dict[str, torch.Tensor]:
        folder = place.new_folder()
        place.train([registry.make_method(spec).method], folder=folder, n_stages=2)
        state = load_latest(folder / "checkpoints", lambda text: None)
        assert state is not None and state.ended
        return state.weights | {f"optimizer/{name}": tensor for name, tensor in state.optimizer.items()}

    held, aside = resume_state("constant"), resume_state("wsd:decay=0.4,floor=0")
    assert held.keys() == aside.keys()
    assert all(torch.equal(tensor, aside[name]) for name, tensor in held.items())
