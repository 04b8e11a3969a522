"""The grid and the orderings, on run folders whose matrices were made up so that every answer is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks import grid, orderings
from benchmarks.orderings import AR, BACKWARD, CYCLIC, FORWARD, FROZEN, HALF, HELD, ID, NOT_HELD, NOT_RUN, UNTOLD, Arm
from clbench.errors import ConfigError
from clbench.results.store import ROWS_SCHEMA, RunStore
from tests.synthetic_runs import config_dict, track_dict

N_STAGES = 4
FLOOR = [2.0, 3.0, 2.5, 3.5]
"""Loss of the oracle per period: a regret is what a method adds."""
SHARED = {0: 0.0, 1: 0.08, 2: -0.05}
"""What a seed adds to every arm: far more than the arms differ, so that only paired differences can tell."""
JITTER = {0: 0.001, 1: -0.001, 2: 0.0}
"""What a seed adds to one arm and not to another."""
GROUPS = ("slow", "fast")


@pytest.fixture(scope="module", autouse=True)
def _unsynced() -> Iterator[None]:
    """These folders need not survive a power cut: a thousand waits for the disk less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clbench.files.fsync", lambda path: None)
        yield


@dataclass(frozen=True)
class World:
    """Regrets of one method: Backward, In-distribution (plus ``slope`` a stage) and Forward."""

    backward: float
    own: float
    forward: float
    slope: float = 0.0
    fast: float = 0.0
    """Added to Backward of the documents of group ``fast``, taken from those of ``slow``."""


def write(root: Path, label: str, world: World, *, components: Any = None, jitter: float = 1.0, **kwargs: Any) -> None:
    for number, seed in enumerate(kwargs.pop("seeds", (0, 1, 2))):
        noise = SHARED[seed] + jitter * JITTER[seed]
        write_one(root / label.replace("/", "-") / str(number), label, world, seed, components, noise, **kwargs)


def write_one(
    folder: Path,
    label: str,
    world: World,
    seed: int,
    components: Any,
    noise: float,
    *,
    budget: int = 1000,
    n_rows: int = N_STAGES,
    flops: Mapping[str, float] | None = None,
) -> None:
    store = RunStore(folder)
    track = TRACK | {"sha256": f"{budget:064d}", "training": {"n_tokens_per_stage": budget, "clip_norm": 1.0}}
    config = config_dict(track, label, seed, N_STAGES)
    parts = [part.partition(":") for part in label.split("+")]
    guessed = [{"name": name, "options": dict(o.split("=") for o in rest.split(",") if o)} for name, _, rest in parts]
    config["method"]["components"] = components or guessed
    store.write_config(config)
    for row in range(n_rows):
        store.write_rows("heldout", row, rows(row, world, noise))
        record = {"stage": row, "weights_sha256": "", "cells": {}, "finished": "", "n_steps": 1}
        store.write_stage_record(record)  # type: ignore[arg-type]
    store.write_ledger({"flops": {"train": 10.0, "evaluate": 99.0, **(flops or {})}})
    store.write_status("done")


TRACK = track_dict("made-up", n_stages=N_STAGES, n_documents=4, drift=0.1, oracle=True)
TRACK["oracle"] |= {"nats_per_token": FLOOR, "bits_per_byte": FLOOR}


def rows(row: int, world: World, noise: float) -> pa.Table:
    """Five documents of ten tokens for each group and period, all with the same loss a token."""
    columns: dict[str, list[Any]] = {name: [] for name in ROWS_SCHEMA.names}
    for period in range(N_STAGES):
        for group in GROUPS:
            extra = world.backward if row > period else world.forward
            if row == period:
                extra = world.own + world.slope * row
            if row > period:
                extra += world.fast if group == "fast" else -world.fast
            for number in range(5):
                loss = FLOOR[period] + extra + noise
                line = (f"{group}/{number}", period, "nll_nats", 10 * loss, 10, 40, group, "new")
                for name, value in zip(columns, line, strict=True):
                    columns[name].append(value)
    return pa.table(columns, schema=ROWS_SCHEMA)


def read(root: Path, **kwargs: Any) -> orderings.TrackOutcomes:
    (found,) = orderings.read_tracks(orderings.find_runs([root]), first_column=kwargs.get("first_column", 0))
    return found


def verdicts(found: Iterable[orderings.Ordering]) -> dict[str, str]:
    return {one.source: one.verdict for one in found}


PUBLISHED = {
    "cyclic-cosine": World(0.50, 0.10, 0.600),
    "cosine-ar": World(0.30, 0.12, 0.605),
    "rsqrt:reading=cyclic": World(0.40, 0.11, 0.603),
    "rsqrt:reading=branch": World(0.41, 0.11, 0.603),
    "schedule-free": World(0.42, 0.11, 0.603),
    "cyclic-cosine+replay": World(0.10, 0.20, 0.610, fast=0.5),
    "cyclic-cosine+replay:fraction=1/t": World(0.08, 0.30, 0.620, slope=0.05),
    "cosine-ar+replay": World(0.04, 0.22, 0.612),
    "cosine-ar+replay:fraction=1/t": World(0.05, 0.33, 0.622, slope=0.05),
    "frozen": World(0.90, 1.00, 1.100),
    "lwf:scaling=tic_lm": World(0.5001, 0.1001, 0.6001),
    "lwf": World(0.40, 0.15, 0.62),
    "cyclic-cosine+replay:fraction=0.99": World(0.30, 0.105, 0.600),
    "cyclic-cosine+replay:fraction=0.9": World(0.20, 0.13, 0.600),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> orderings.TrackOutcomes:
    """A world in which the papers are right."""
    root = tmp_path_factory.mktemp("published")
    for number, (label, world) in enumerate(PUBLISHED.items()):
        write(root, label, world, jitter=0.01 if "tic_lm" in label else 0.1 * number)
    return read(root)


@pytest.fixture(scope="module")
def upside_down(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The opposite world: every regret has the other sign."""
    root = tmp_path_factory.mktemp("upside")
    for number, (label, world) in enumerate(PUBLISHED.items()):
        opposite = World(-world.backward, -world.own, -100 * world.forward, -world.slope)
        write(root, label, opposite, jitter=0.1 * number)
    return root


def test_table_holds_the_regrets_that_were_put_in(published: orderings.TrackOutcomes) -> None:
    here = published
    table = {row["label"]: row for row in orderings.table_rows(here)}
    seeds = sum(SHARED.values()) / 3
    for label, world in PUBLISHED.items():
        row = table[label]
        assert row[BACKWARD].value == pytest.approx(world.backward + seeds, abs=1e-9)
        assert row[ID].value == pytest.approx(world.own + 2 * world.slope + seeds, abs=1e-9)  # stages 1, 2, 3
        assert row[FORWARD].value == pytest.approx(world.forward + seeds, abs=1e-9)
    names = [row["label"] for row in orderings.table_rows(here)]
    assert names.index("cyclic-cosine") == 0 and names.index("cosine-ar") < names.index("schedule-free")
    assert names.index("schedule-free") < names.index("frozen")


def test_everything_published_holds_where_it_is_true(published: orderings.TrackOutcomes) -> None:
    found = orderings.orderings_of(published)
    expected = dict.fromkeys((f"TiC-LM {n}" for n in range(1, 10)), HELD) | {"TiC-LM 6": NOT_RUN, "TiC-LM 9": NOT_RUN}
    # Ibrahim 3: 1 % old text saves 0.2 and costs 0.005; 10 % saves 0.3 and costs 0.03, but that is not asked.
    assert verdicts(found) == expected | {"Ibrahim 1": HELD, "Ibrahim 2": HELD, "Ibrahim 3": HELD}
    by_name = {one.source: one for one in found}
    near = by_name["TiC-LM 2"].findings[-1]
    assert near.value == pytest.approx(0.50 - 2 * 0.04 - sum(SHARED.values()) / 3, abs=1e-3)
    rising = by_name["TiC-LM 3"].findings[-1]
    assert rising.value == pytest.approx(0.05, abs=1e-9)


def test_near_is_measured_from_the_oracle_series_where_there_is_one(tmp_path: Path) -> None:
    cutoffs = [{"name": "oracle-series", "options": {"cutoffs": [0, 2, 3]}}]
    write(tmp_path, "sequential", World(0.5, 0.1, 0.6))
    write(tmp_path, "cosine-ar+replay", World(0.2, 0.1, 0.6))
    write(tmp_path, "frozen", World(0.9, 0.9, 0.9))
    assert orderings.backward_order(read(tmp_path).outcomes).findings[-1].value == pytest.approx(0.09, abs=1e-9)
    write(tmp_path, "oracle-series:cutoffs=0+2+3", World(-0.2, 2.0, 2.0), components=cutoffs)
    outcomes = read(tmp_path).outcomes
    near = orderings.backward_order(outcomes).findings[-1]  # 0.3 from cyclic cosine, 0.4 from the series
    assert (near.value, near.verdict) == (pytest.approx(-0.1, abs=1e-9), NOT_HELD)
    assert orderings.never_updated(outcomes).verdict == HELD  # an oracle is no method that forgot to update


def test_nothing_holds_in_the_opposite_world(upside_down: Path) -> None:
    found = verdicts(orderings.orderings_of(read(upside_down)))
    false = ("TiC-LM 1", "TiC-LM 2", "TiC-LM 3", "TiC-LM 4", "TiC-LM 7", "TiC-LM 8", "Ibrahim 1", "Ibrahim 2")
    assert {found[name] for name in false} == {NOT_HELD}


def test_only_pairing_tells_these_arms_apart(published: orderings.TrackOutcomes) -> None:
    here = published
    rsqrt = Arm("rsqrt:reading=cyclic")
    one, other = (orderings.stats.t_interval(list(here.outcomes[a].values[BACKWARD].values())) for a in (rsqrt, AR))
    assert one.low < other.value < one.high and other.low < one.value < other.high
    assert orderings.greater(here.outcomes, rsqrt, AR, BACKWARD).verdict == HELD


@pytest.mark.parametrize(
    ("values", "verdict", "bounds"),
    [
        # mean 2, standard deviation 1: half-width 4.302653 / sqrt 3
        ([1.0, 2.0, 3.0], UNTOLD, (2 - 2.4841377, 2 + 2.4841377)),
        ([2.0, 2.1, 1.9], HELD, (2 - 0.24841377, 2 + 0.24841377)),
        ([-2.0, -2.1, -1.9], NOT_HELD, (-2 - 0.24841377, -2 + 0.24841377)),
        ([0.5], UNTOLD, (math.nan, math.nan)),
        ([0.5, 0.5], HELD, (0.5, 0.5)),
        ([0.0, 0.0, 0.0], UNTOLD, (0.0, 0.0)),
    ],
)
def test_verdict_of_a_number(values: list[float], verdict: str, bounds: tuple[float, float]) -> None:
    found = orderings.above_zero("x", dict(enumerate(values)))
    assert found.verdict == verdict
    assert (found.low, found.high) == pytest.approx(bounds, abs=1e-6, nan_ok=True)
    assert orderings.above_zero("x", None).verdict == NOT_RUN


def test_lwf_is_told_apart_to_three_digits(published: orderings.TrackOutcomes) -> None:
    outcomes = published.outcomes
    as_released, right = Arm(rest=("lwf:scaling=tic_lm",)), Arm(rest=("lwf",))
    assert orderings.equal(outcomes, as_released, CYCLIC, BACKWARD, claimed=True).verdict == HELD
    assert orderings.equal(outcomes, right, CYCLIC, BACKWARD, claimed=True).verdict == NOT_HELD
    assert orderings.equal(outcomes, right, CYCLIC, BACKWARD, claimed=False).verdict == HELD


def test_a_ordering_with_one_false_claim_did_not_hold(tmp_path: Path) -> None:
    write(tmp_path, "sequential", World(0.5, 0.1, 0.6))
    write(tmp_path, "frozen", World(0.4, 0.9, 0.9))  # Backward better than training: as on codedocs-nano
    found = orderings.never_updated(read(tmp_path).outcomes)
    assert [one.verdict for one in found.findings] == [NOT_HELD, HELD, HELD]
    assert found.verdict == NOT_HELD


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    for label, world in (("sequential", World(0.5, 0.1, 0.6)), ("replay", World(0.1, 0.2, 0.6))):
        write(tmp_path, label, world, seeds=(0,))
    here = read(tmp_path)
    found = orderings.greater(here.outcomes, CYCLIC, HALF, BACKWARD)
    assert (found.verdict, found.n_seeds) == (UNTOLD, 1) and "one seed" in str(found.reason)


def test_reversal_on_one_package_is_found_and_named(published: orderings.TrackOutcomes, tmp_path: Path) -> None:
    finding = orderings.reversal(published.outcomes).findings[1]
    # replay: 0.10 + 0.5 on fast, 0.10 - 0.5 on slow, against 0.50 without
    assert finding.value == pytest.approx(0.10, abs=1e-3) and "fast" in str(finding.reason)
    write(tmp_path, "sequential", World(0.5, 0.1, 0.6))
    write(tmp_path, "replay", World(0.1, 0.2, 0.6))
    assert orderings.reversal(read(tmp_path).outcomes).findings[1].verdict == NOT_HELD


def test_a_larger_budget_is_found_by_its_track(tmp_path: Path) -> None:
    for budget, plain, replay in (
        (1000, World(0.5, 0.1, 0.6), World(0.2, 0.2, 0.6)),
        (3000, World(0.7, 0.0, 0.6), World(0.1, 0.1, 0.6)),
    ):
        write(tmp_path / str(budget), "sequential", plain, budget=budget)
        write(tmp_path / str(budget), "replay", replay, budget=budget)
    tracks = orderings.read_tracks(orderings.find_runs([tmp_path]), first_column=0)
    small, large = sorted(tracks, key=lambda one: one.track["training"]["n_tokens_per_stage"])
    assert orderings.larger_of(small, tracks) is large and orderings.larger_of(large, tracks) is None
    found = orderings.larger_budget(small, large)
    assert [one.value for one in found.findings] == pytest.approx([0.2, 0.1, 0.1, 0.1], abs=1e-9)
    assert found.verdict == HELD
    assert orderings.larger_budget(small, None).verdict == NOT_RUN


def test_without_the_base_period_as_in_the_paper(tmp_path: Path) -> None:
    write(tmp_path, "sequential", World(0.5, 0.1, 0.6, fast=0.0))
    matrix = read(tmp_path, first_column=1).outcomes[CYCLIC].losses[BACKWARD]
    # cells (2,1), (3,1), (3,2) instead of all six
    for seed, value in matrix.items():
        assert value == pytest.approx((3.0 + 3.0 + 2.5) / 3 + 0.5 + SHARED[seed] + JITTER[seed], abs=1e-9)


@pytest.mark.parametrize(
    ("label", "components", "arm"),
    [
        ("sequential", [("sequential", {})], CYCLIC),
        ("cyclic-cosine", [("cyclic-cosine", {"peak": 1.0})], CYCLIC),
        ("replay", [("replay", {"fraction": "1/2"})], HALF),
        ("replay:fraction=0.5", [("replay", {"fraction": "0.5"})], HALF),
        ("replay:fraction=1", [("replay", {"fraction": "1"})], CYCLIC),
        (
            "wsd+replay:fraction=1/t",
            [("wsd", {"shape": "linear"}), ("replay", {"fraction": "1/t"})],
            Arm("wsd", "1/t"),
        ),
        ("replay+wsd", [("replay", {"fraction": "1/2"}), ("wsd", {})], Arm("wsd", "1/2")),
        ("rsqrt", [("rsqrt", {"reading": "branch"})], Arm("rsqrt:reading=branch")),
        ("rsqrt:reading=cyclic", [("rsqrt", {"reading": "cyclic"})], Arm("rsqrt:reading=cyclic")),
        ("rsqrt:peak=0.5", [("rsqrt", {"reading": "cyclic", "peak": 0.5})], Arm("rsqrt:reading=cyclic,peak=0.5")),
        ("cyclic-cosine:peak=0.5", [("cyclic-cosine", {"peak": 0.5})], Arm("cyclic-cosine:peak=0.5")),
        ("ema:decay=1e+20+replay", [("ema", {}), ("replay", {})], Arm(new="1/2", rest=("ema:decay=1e+20",))),
        ("frozen", [("frozen", {})], FROZEN),
        ("my-checkpoints", [], Arm(rest=("my-checkpoints",))),
    ],
)
def test_arm_of_a_label(label: str, components: list[tuple[str, dict[str, Any]]], arm: Arm) -> None:
    parts = [{"name": name, "options": options} for name, options in components]
    assert orderings.arm_of({"label": label, "components": parts}) == arm


def test_flops_stand_in_units_of_sequential(tmp_path: Path) -> None:
    write(tmp_path, "sequential", World(0.5, 0.1, 0.6))
    write(tmp_path, "wsd", World(0.5, 0.1, 0.6), flops={"decay_branch": 1.0})
    write(tmp_path, "lwf", World(0.5, 0.1, 0.6), flops={"teacher": 3.0, "control": 0.5})
    table = {row["label"]: row["flops"] for row in orderings.table_rows(read(tmp_path))}
    assert table["sequential"] == {"train": 1.0, "branch": 0.0, "other": 0.0, "total": 1.0}
    assert table["wsd"] == pytest.approx({"train": 1.0, "branch": 0.1, "other": 0.0, "total": 1.1})
    assert table["lwf"] == pytest.approx({"train": 1.0, "branch": 0.0, "other": 0.35, "total": 1.35})


def test_page_and_json_name_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "sequential", World(0.5, 0.1, 0.6))
    write(tmp_path, "cyclic-cosine", World(0.5, 0.1, 0.6), seeds=(0,))
    write(tmp_path, "replay", World(0.1, 0.2, 0.6), n_rows=2)
    assert orderings.main([str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "| cyclic-cosine | none | 3 | 0.51" in page and "not done, left out: replay seed 0" in page
    assert "are the same arm; cyclic-cosine is left out" in page
    assert orderings.main([str(tmp_path), "--json"]) == 0
    (track,) = json.loads(capsys.readouterr().out)
    assert track["orderings"][0]["verdict"] == NOT_RUN and track["table"][0]["arm"]["schedule"] == "cyclic-cosine"
    assert orderings.main([str(tmp_path / "replay")]) == 2
    assert orderings.main([str(tmp_path / "nowhere")]) == 2


# the driver


def test_grid_is_the_issue_s_and_seed_0_comes_first() -> None:
    tasks = grid.tasks_of(grid.SETS["schedules"], [0, 1, 2])
    assert len(tasks) == 9 * 3 * 3 and [task.seed for task in tasks] == [0] * 27 + [1] * 27 + [2] * 27
    assert tasks[2].methods == ("cyclic-cosine", "replay:fraction=1/t")
    assert len({task.methods for task in tasks}) == 27
    with pytest.raises(ConfigError, match="empty part"):
        grid.tasks_of(["wsd + "], [0])
    assert grid.parts_of("replay-buffer:sizes=1+2 + wsd") == ("replay-buffer:sizes=1+2", "wsd")


def test_finished_runs_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tinydocs" / "a"
    for name, state, seed in (("done", "done", 0), ("dead", "failed", 1)):
        write_one(folder / name, "wsd+replay", World(0, 0, 0), seed, None, 0.0, n_rows=1)
        store = RunStore(folder / name)
        command = f"clbench run --track t --method wsd --method replay --seed {seed}"
        store.write_config(store.config() | {"command": command})
        store.write_status(state)
    assert grid.main(["--track", "tinydocs", "--runs", str(tmp_path), "--spec", "wsd + replay", "--list"]) == 0
    out = capsys.readouterr().out
    assert "3 runs, 1 done, 2 to do" in out and "--seed 0" not in out and "--seed 1" in out
    assert grid.main(["--track", "nowhere"]) == 2


@dataclass(frozen=True)
class Quick(grid.Task):
    """A run that is over at once."""

    def words(self, track: str, runs: Path, device: str) -> list[str]:
        return ["--version"] if self.spec == "good" else ["--no-such-option"]


def test_a_failed_run_stops_no_other_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = grid.Grid("tinydocs", tmp_path, tmp_path / "logs", jobs=2, device="cpu", threads=1)
    tasks = [Quick("bad", 0), Quick("good", 0), Quick("good", 1)]
    assert runner.run(tasks) == tasks[:1]
    out = capsys.readouterr().out
    assert "bad, seed 0: FAILED" in out and "no-such-option" in out and "[3/3]" in out
    assert (tmp_path / "logs" / "good-seed-1.log").read_text().startswith("clbench ")
