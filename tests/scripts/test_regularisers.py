"""The sweep of regularisers on run folders that were made up, so that every choice and every figure is known."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks import grid, regularisers
from benchmarks.orderings import HELD, NOT_HELD, NOT_RUN, UNTOLD
from benchmarks.regularisers import (
    DIAGONAL,
    ISOTROPIC,
    NO_REPLAY,
    ONE,
    RANDOM,
    RANK1,
    REPLAY,
    WEIGHTS,
    Arm,
    Choices,
    Curve,
    arm_of,
    arms_of,
)
from clbench import registry
from clbench.errors import ConfigError, NotFoundError
from clbench.results import knowledge
from clbench.results.store import ROWS_SCHEMA, RunStore
from clbench.streams.codedocs_nano import CodeDocsNano
from clbench.streams.codedocs_nano_tuning import CodeDocsNanoTuning
from clbench.streams.facts import TRUTH, Facts
from tests.synthetic_runs import config_dict, track_dict

N_STAGES = 3
FLOOR = [2.0, 3.0, 4.0]
SHARED = {0: 0.0, 1: 0.3, 2: -0.2}
"""What a seed adds to every arm, so that only paired differences can tell arms apart."""
TRACK = track_dict("made-up", n_stages=N_STAGES, n_documents=4, drift=0.1, oracle=True)
TRACK["oracle"] |= {"nats_per_token": FLOOR, "bits_per_byte": FLOOR}
TRACK |= {"suites": ["heldout"], "training": {"n_tokens_per_stage": 1000}}


@pytest.fixture(scope="module", autouse=True)
def _unsynced() -> Iterator[None]:
    """These folders need not survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clbench.files.fsync", lambda path: None)
        yield


def write(
    folder: Path, spec: str, seed: int, lost: float, *, state: str = "done", error: str = "", flops: float = 10.0
) -> RunStore:
    """Write a run: ``FLOOR`` everywhere, and ``lost`` more on every period that was trained before the checkpoint."""
    store = RunStore(folder / grid.Task(spec, seed).slug)
    config = config_dict(TRACK, spec, seed, N_STAGES)
    config["command"] = " ".join(["clbench run", *(f"--method {part}" for part in grid.parts_of(spec))])
    config["method"]["components"] = [{"name": part, "options": {}} for part in grid.parts_of(spec)]
    store.write_config(config)
    for row in range(N_STAGES):
        losses = [FLOOR[i] + (lost if row > i else 0.0) + SHARED[seed] for i in range(N_STAGES)]
        store.write_rows("heldout", row, rows(losses))
        record = {"stage": row, "weights_sha256": "", "cells": {}, "finished": "", "n_steps": 1}
        store.write_stage_record(record)  # type: ignore[arg-type]
    store.write_ledger({"flops": {"train": flops, "evaluate": 99.0}})
    store.write_status(state, **({"error": error} if error else {}))
    return store


def rows(losses: list[float]) -> pa.Table:
    """Two documents of ten tokens a period."""
    lines = [
        (f"doc/{i}-{n}", i, "nll_nats", 10 * loss, 10, 40, "g", "new") for i, loss in enumerate(losses) for n in (0, 1)
    ]
    return pa.table(dict(zip(ROWS_SCHEMA.names, zip(*lines, strict=True), strict=True)), schema=ROWS_SCHEMA)


def curve(losses: Mapping[int, float], *, baseline: float | None = 5.0, name: str = DIAGONAL) -> Curve:
    return Curve(arm=arm_of(name), exponents=tuple(range(1, 8)), losses=dict(losses), baseline=baseline)


# --- arms and budget


def test_every_arm_has_the_same_budget_over_six_decades() -> None:
    arms = [arm for arm in arms_of(extra=True) if arm.regulariser is not None]
    assert {len(regularisers.tuning_specs([arm])) for arm in arms} == {7}
    for arm in arms:
        strengths = [float(spec.rpartition("strength=")[2]) for spec in regularisers.tuning_specs([arm])]
        assert strengths[-1] / strengths[0] == pytest.approx(1e6)
        assert all(b / a == pytest.approx(10) for a, b in itertools.pairwise(strengths))
    assert len(regularisers.tuning_specs(arms_of(extra=False))) == 2 + 2 * 6 * 7
    assert len(set(map(str, arms_of(extra=True)))) == len(arms_of(extra=True))
    assert all(regularisers.arm_named(str(arm)) == arm for arm in arms_of(extra=True))


def test_the_methods_know_all_these_options() -> None:
    """So a sweep of hours does not end at its last arm."""
    for arm in arms_of(extra=True):
        for part in grid.parts_of(arm.spec(-4)):
            registry.make_method(part)
    step = registry.make_method("rank1-ewc").method.options
    assert (step.unit, step.scale, step.direction, step.apply) == ("step", "cstar", "mean", "coupled")


# --- the rule


def test_the_smallest_loss_is_chosen_and_a_plain_minimum_has_no_flag() -> None:
    found = curve({1: 5.0, 2: 4.9, 3: 4.5, 4: 4.2, 5: 4.6, 6: 5.5, 7: 9.0})
    assert (found.chosen, found.flags, found.missing) == (4, [], ())


@pytest.mark.parametrize(
    ("losses", "chosen", "flag"),
    [
        ({1: 4.0, 2: 4.5, 3: 4.6, 4: 4.7, 5: 4.8, 6: 4.9, 7: 5.0}, 1, "best at the weak edge of the grid"),
        ({7: 4.0, 6: 4.5, 5: 4.6, 4: 4.7, 3: 4.8, 2: 4.9, 1: 5.0}, 7, "best at the strong edge of the grid"),
        ({1: 5.0, 2: 4.5, 3: 4.0, 4: 4.0, 5: 4.009, 6: 4.02, 7: 5.0}, 3, "tie within 0.01: 1e4, 1e5"),
        ({1: 5.0, 2: 4.995, 3: 5.1, 4: 5.2, 5: 6.0, 6: 7.0, 7: 8.0}, 2, "gains less than 0.01 over no regulariser"),
        ({1: 5.0, 2: 4.5, 3: 4.0, 4: 4.2, 5: math.inf, 6: math.inf, 7: math.inf}, 3, "diverged: 1e5, 1e6, 1e7"),
        ({1: 5.0, 2: 4.5, 3: 4.0, 4: 4.2}, 3, "not run: 1e5, 1e6, 1e7"),
        (dict.fromkeys(range(1, 8), math.inf), None, "no strength can be chosen"),
        ({}, None, "no strength can be chosen"),
    ],
)
def test_what_the_rule_takes_and_flags(losses: dict[int, float], chosen: int | None, flag: str) -> None:
    found = curve(losses)
    assert found.chosen == chosen
    assert flag in found.flags
    others = {"weak edge", "strong edge"} - set(flag.split(" the ")[-1:])
    assert chosen in (1, 7) or not any(edge in text for text in found.flags for edge in others)


def test_choices_survive_their_file(tmp_path: Path) -> None:
    track = {"name": "t", "stream": "s", "sha256": "0"}
    losses = {1: 5.0, 2: 4.5, 3: 4.0, 4: 4.2, 5: math.inf, 6: math.inf, 7: math.inf}
    choices = Choices(track=track, seed=0, curves=[curve(losses), curve({1: 4.0}, baseline=None, name=ISOTROPIC)])
    choices.write(tmp_path / "c.json")
    assert Choices.read(tmp_path / "c.json") == choices
    assert json.loads((tmp_path / "c.json").read_text())["arms"][0]["spec"] == "ewc:strength=1e3"
    (tmp_path / "bad.json").write_text('{"format": 1, "arms": [{}]}')
    with pytest.raises(ConfigError, match="no choices"):
        Choices.read(tmp_path / "bad.json")
    with pytest.raises(NotFoundError, match="tune"):
        Choices.read(tmp_path / "none.json")


def test_unequal_budgets_are_not_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"diagonal: not run: 1e2, .* same budget"):
        Choices(track={"name": "t"}, seed=0, curves=[curve({1: 4.0})]).specs()


def test_curves_are_read_from_runs(tmp_path: Path) -> None:
    arms = [Arm(NO_REPLAY), arm_of(DIAGONAL)]
    assert arms[1].regulariser is not None
    first, second, third, fourth, *_ = arms[1].regulariser.exponents()
    write(tmp_path, "sequential", 0, 0.9)
    write(tmp_path, arms[1].spec(first), 0, 0.6)
    write(tmp_path, arms[1].spec(second), 0, 0.3)
    write(tmp_path, arms[1].spec(second), 1, -9.0)  # another seed has no say
    write(tmp_path, arms[1].spec(third), 0, 0.0, state="failed", error="the loss is nan, the gradient norm inf")
    write(tmp_path, arms[1].spec(fourth), 0, 0.0, state="failed", error="disk is full")
    (found,) = regularisers.choices_of(TRACK, tmp_path, arms, 0).curves
    # the last row: two past periods of three have lost
    assert found.losses == pytest.approx({first: 3.0 + 0.4, second: 3.0 + 0.2, third: math.inf})
    assert found.baseline == pytest.approx(3.0 + 0.6)
    assert found.chosen == second and fourth in found.missing


def test_a_coarser_grid_has_both_ends_and_the_same_budget_for_all(tmp_path: Path) -> None:
    grids = {arm.regulariser.exponents(2) for arm in arms_of(extra=True) if arm.regulariser is not None}
    assert {len(grid) for grid in grids} == {4} and {grid[-1] - grid[0] for grid in grids} == {6}
    arms = [Arm(NO_REPLAY), arm_of(DIAGONAL)]
    assert regularisers.tuning_specs(arms, 2) == ["sequential", *(f"ewc:strength=1e{e}" for e in (-1, 1, 3, 5))]
    (found,) = regularisers.choices_of(TRACK, tmp_path, arms, 0, 2).curves
    assert found.missing == (-1, 1, 3, 5)


# --- tables


LOST = {
    Arm(NO_REPLAY): 0.9,
    Arm(REPLAY): 0.5,
    arm_of(DIAGONAL): 0.6,
    arm_of(RANK1): 0.7,
    arm_of(DIAGONAL, REPLAY): 0.55,
    arm_of(RANK1, REPLAY): 0.2,
    arm_of(ONE, REPLAY): 0.25,
    arm_of(RANDOM, REPLAY): 0.5,
    arm_of(WEIGHTS, REPLAY): 0.5,
    arm_of(ISOTROPIC, REPLAY): 0.4,
}
"""A world in which the paper is right."""


def final_runs(
    folder: Path, lost: Mapping[Arm, float], *, jitter: float, seeds: tuple[int, ...] = (0, 1, 2)
) -> Choices:
    """Write the runs of the reported track; ``jitter`` is what arms have to themselves, by seed."""
    curves = []
    for place, (arm, value) in enumerate(lost.items()):
        exponent = None
        if arm.regulariser is not None:
            exponent = arm.regulariser.centre
            losses = {e: 4.0 + abs(e - exponent) for e in arm.regulariser.exponents()}
            curves.append(Curve(arm=arm, exponents=arm.regulariser.exponents(), losses=losses, baseline=4.5))
        for seed in seeds:
            own = jitter * ((7 * seed * (place + 1) + seed * seed * place) % 11 - 5) / 5
            write(folder, arm.spec(exponent), seed, value + own, flops=10.0 + place)
    return Choices(track={"name": "tuned", "stream": "other", "sha256": ""}, seed=0, curves=curves)


def read(folder: Path, choices: Choices) -> regularisers.Rows:
    return regularisers.rows_of(choices, regularisers.find_runs([folder]))[0]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Choices]:
    folder = tmp_path_factory.mktemp("published")
    return folder, final_runs(folder, LOST, jitter=0.001)


def test_table_holds_what_was_put_in(published: tuple[Path, Choices]) -> None:
    rows = read(*published)
    table = {row["arm"]: row for row in regularisers.table_of(rows, published[1])}
    seeds = sum(SHARED.values()) / 3
    for place, (arm, lost) in enumerate(LOST.items()):
        row = table[str(arm)]
        assert row["scores"]["backward"]["value"] == pytest.approx(lost + seeds, abs=2e-3)  # regret: the floor is gone
        assert row["scores"]["in_distribution"]["value"] == pytest.approx(seeds)
        assert row["scores"]["final"]["value"] == pytest.approx(3 + 2 / 3 * lost + seeds, abs=2e-3)
        assert row["scores"]["forgetting_first"]["value"] == pytest.approx(lost, abs=2e-3)  # the seed's part cancels
        assert row["flops"] == pytest.approx((10 + place) / 10)  # evaluation is left out
        if arm.regulariser is None:
            assert row["differences"] == {} and row["strength"] is None
        else:
            gap = lost - LOST[arm.baseline]
            assert row["differences"]["final"]["value"] == pytest.approx(2 / 3 * gap, abs=2e-3)
            assert row["differences"]["backward"]["value"] == pytest.approx(gap, abs=2e-3)
    assert table["none"]["scores"]["final"]["high"] - table["none"]["scores"]["final"]["low"] > 1  # unpaired: nothing
    far = table["replay + rank-1 (c*)"]
    assert far["differences"]["final"]["high"] < 0 and far["p_holm"] < 0.01
    same = table["replay + rank-1 (random)"]
    assert same["p_holm"] > 0.05 > far["p_holm"]


def test_p_is_adjusted_over_all_arms_of_the_table(published: tuple[Path, Choices]) -> None:
    rows = read(*published)
    plain = {arm: one.p for arm, one in regularisers.to_baseline(rows, "final").items()}
    found = regularisers.adjusted(regularisers.to_baseline(rows, "final"))
    smallest = min(plain, key=plain.__getitem__)
    assert len(plain) == 8 and found[smallest] == pytest.approx(8 * plain[smallest])
    assert all(found[arm] >= plain[arm] for arm in plain)


def test_everything_published_holds_where_it_is_true(published: tuple[Path, Choices]) -> None:
    found = {one.source: one.verdict for one in regularisers.orderings_of(read(*published))}
    assert found.pop("paper 6") == NOT_RUN  # no arm of the top eigenvector
    assert set(found.values()) == {HELD} and len(found) == 6


def test_nothing_holds_in_the_opposite_world(tmp_path: Path) -> None:
    choices = final_runs(tmp_path, {arm: 1 - lost for arm, lost in LOST.items()}, jitter=0.001)
    found = {one.source: one.verdict for one in regularisers.orderings_of(read(tmp_path, choices))}
    assert found.pop("paper 6") == NOT_RUN
    assert set(found.values()) == {NOT_HELD}


def test_noise_and_single_seeds_tell_nothing(tmp_path: Path) -> None:
    noisy = final_runs(tmp_path / "noisy", LOST, jitter=3.0)
    found = {one.source: one for one in regularisers.orderings_of(read(tmp_path / "noisy", noisy))}
    assert found["paper 1"].verdict == UNTOLD
    single = final_runs(tmp_path / "single", LOST, jitter=0.0, seeds=(0,))
    rows = read(tmp_path / "single", single)
    assert {one.verdict for one in regularisers.orderings_of(rows)} == {UNTOLD, NOT_RUN}
    assert all(row["p_holm"] is None for row in regularisers.table_of(rows, single))


def test_a_run_at_another_strength_is_no_run_of_the_arm(published: tuple[Path, Choices], tmp_path: Path) -> None:
    arm = arm_of(RANK1)
    assert arm.regulariser is not None
    choices = final_runs(tmp_path, {Arm(NO_REPLAY): 0.9}, jitter=0.0)
    write(tmp_path, arm.spec(arm.regulariser.centre + 1), 0, 0.0)
    one = next(curve for curve in published[1].curves if curve.arm == arm)
    wanted = Choices(track=choices.track, seed=0, curves=[one])
    rows, notes = regularisers.rows_of(wanted, regularisers.find_runs([tmp_path]))
    assert list(rows) == [Arm(NO_REPLAY)] and notes == ["no run of rank-1 (c*)"]


def test_commands_print_and_draw(
    published: tuple[Path, Choices], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, choices = published
    choices.write(tmp_path / "c.json")
    words = ["table", "--choices", str(tmp_path / "c.json"), str(folder)]
    assert regularisers.main([*words, "--plot", str(tmp_path / "c.svg")]) == 0
    text = capsys.readouterr().out
    assert "| replay + rank-1 (c*) | 1e-1 | 3 |" in text and "**held**" in text and "**4.000**" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ") and "1e-1 |" in line}) <= 2
    assert "rank-1 (c = 1)" in (tmp_path / "c.svg").read_text()
    assert regularisers.main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {row["arm"] for row in values["table"]} == set(map(str, LOST))
    assert regularisers.main(["table", "--choices", str(tmp_path / "c.json"), str(tmp_path)]) == 2


def test_strengths_are_not_chosen_on_what_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = Choices(track={"name": "x", "stream": "codedocs-nano", "sha256": ""}, seed=0, curves=[])
    choices.write(tmp_path / "c.json")
    assert regularisers.main(["final", "--track", "codedocs-nano", "--choices", str(tmp_path / "c.json")]) == 2
    assert "codedocs-nano-tuning" in capsys.readouterr().err


def test_tune_lists_every_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "--track", "codedocs-nano-tuning", "--runs", str(tmp_path), "--list"]
    assert regularisers.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clbench run")]
    assert len(lines) == len(set(lines)) == 86 and all("--seed 0" in line for line in lines)
    assert not list(tmp_path.iterdir())
    assert regularisers.main([*words, "--arm", "replay + L2-SP"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clbench run")]
    assert len(lines) == 8 and all("--method replay" in line for line in lines)


def test_facts_are_counted_in_their_groups(tmp_path: Path) -> None:
    source = Facts(Facts.Options(n_entities=20, n_stages=3))
    truth = knowledge.Truth.parse(source.extras()[TRUTH])
    stores = [answered(tmp_path / str(seed), truth) for seed in range(2)]
    found = regularisers.accuracies(stores, truth)
    assert found["kept"].value == 1 and found["updated"].value == 0


def answered(folder: Path, truth: knowledge.Truth) -> RunStore:
    """Write a run that forgets nothing and is always late: after stage k it answers what was true in stage k - 1."""
    store = RunStore(folder)
    for k in range(3):
        lines = [
            (one.fact, stage, "right:trained", float(value == one.value[max(k - 1, 0)]), 1, 1, "", kind)
            for one in truth.facts
            for stage, (value, kind) in enumerate(zip(one.value, one.kind, strict=True))
            if value is not None
        ]
        table = pa.table(dict(zip(ROWS_SCHEMA.names, zip(*lines, strict=True), strict=True)), schema=ROWS_SCHEMA)
        store.write_rows("facts", k, table)
        record = {"stage": k, "weights_sha256": "", "cells": {}, "finished": "", "n_steps": 1}
        store.write_stage_record(record)  # type: ignore[arg-type]
    return store


# --- the tuning tracks


def track(name: str) -> dict[str, Any]:
    return registry.load_track(name).model_dump(exclude={"name", "description", "stream", "stream_sha256", "seeds"})


@pytest.mark.parametrize("name", ["codedocs-nano", "facts-tiny"])
def test_tuning_tracks_differ_in_text_alone(name: str) -> None:
    derived = {"oracle", "row0"}
    here, there = ({k: v for k, v in track(n).items() if k not in derived} for n in (name, f"{name}-tuning"))
    assert here == there
    assert registry.load_track(name).stream != registry.load_track(f"{name}-tuning").stream
    assert registry.load_track(f"{name}-tuning").row0 is not None


def test_nothing_of_codedocs_nano_is_tuned_on() -> None:
    tuned, reported = CodeDocsNanoTuning().manifest, CodeDocsNano().manifest
    packages = [{r.package.lower() for stage in one.stages for r in stage.releases} for one in (tuned, reported)]
    assert not packages[0] & packages[1]
    assert not {r.sha256 for s in tuned.stages for r in s.releases} & {
        r.sha256 for s in reported.stages for r in s.releases
    }
    assert tuned.name == CodeDocsNanoTuning.name == "codedocs-nano-tuning" and len(tuned.stages) == 4
    worlds = [registry.make_stream_source(registry.load_track(n).stream) for n in ("facts-tiny", "facts-tiny-tuning")]
    seeds, years = zip(*((world.options.seed, len(world.stages())) for world in worlds), strict=True)  # type: ignore[attr-defined]
    assert seeds == (0, 1) and years == (5, 4)
