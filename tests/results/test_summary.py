"""Summaries, comparisons and ranks of whole run folders."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.results import summary as module
from clbench.results.store import RunStore, find_runs
from clbench.results.summary import compare, group_runs, rank, summarise
from tests.synthetic_runs import FORGETTING, pooled, write_run

REPLAY = "replay:fraction=1/2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[RunStore]]:
    folder = tmp_path_factory.mktemp("runs")
    for place, method in enumerate(FORGETTING):
        for seed in range(3):
            write_run(folder / str(place) / f"seed-{seed}", method=method, seed=seed)
    return group_runs(find_runs([folder]))


def test_groups_are_methods_with_seeds_in_order(runs: dict[str, list[RunStore]]) -> None:
    assert list(runs) == list(FORGETTING)
    assert [store.config()["seed"] for store in runs["sequential"]] == [0, 1, 2]


def test_scores_over_seeds(runs: dict[str, list[RunStore]]) -> None:
    summary = summarise(runs["sequential"])
    track = runs["sequential"][0].config()["track"]
    backward = []
    for store in runs["sequential"]:
        losses = [pooled(store.rows("heldout", row), 4)["nats_per_token"] for row in range(4)]
        regrets = [losses[k][i] - track["oracle"]["nats_per_token"][i] for k in range(4) for i in range(k)]
        backward.append(sum(regrets) / 6)
    score = summary.scores["backward"]
    assert list(score.per_seed.values()) == pytest.approx(backward)
    assert score.value == pytest.approx(np.mean(backward))
    half = 4.302653 * np.std(backward, ddof=1) / math.sqrt(3)  # t(0.975, 2)
    assert (score.low, score.high) == pytest.approx((score.value - half, score.value + half))
    assert (score.interval, score.n, score.regret, score.unit) == ("t over seeds", 3, True, "nats_per_token")
    assert summary.complete
    np.testing.assert_allclose(summary.matrices["bits_per_byte"].values.shape, (4, 4))


def test_bits_per_byte_and_no_oracle(tmp_path: Path) -> None:
    summary = summarise([write_run(tmp_path, oracle=False)], unit="bits_per_byte")
    matrix = summary.matrices["bits_per_byte"].values
    score = summary.scores["in_distribution"]
    assert score.value == pytest.approx(np.diag(matrix)[1:].mean())
    assert (score.unit, score.regret) == ("bits_per_byte", False)
    assert summary.scores["intransigence"].reason == "the track has no oracle"
    assert summary.scores["retention"].unit == "ratio"


def test_one_seed_is_evaluation_noise(runs: dict[str, list[RunStore]]) -> None:
    score = summarise(runs["sequential"][:1]).scores["forgetting_first"]
    assert score.interval == "bootstrap over documents (evaluation noise)"
    assert score.n == 160
    assert score.low < score.value < score.high
    assert score.high - score.low < 0.1


def test_frozen_has_no_variance_between_seeds(runs: dict[str, list[RunStore]]) -> None:
    score = summarise(runs["frozen"]).scores["forgetting_first"]
    assert score.value == 0.0
    assert math.isnan(score.low)
    assert score.interval == "none"
    assert score.reason == "no variance between 3 seeds"


def test_replay_forgets_less(runs: dict[str, list[RunStore]]) -> None:
    comparison = compare(summarise(runs[REPLAY]), summarise(runs["sequential"]))
    difference = comparison.scores["forgetting_first"]
    assert (comparison.seeds, difference.n, difference.interval) == ([0, 1, 2], 3, "t over seeds")
    assert difference.high < 0
    assert difference.better == "a"
    assert comparison.scores["retention"].low > 0
    assert comparison.scores["retention"].better == "a"
    assert comparison.scores["bwt"].value == pytest.approx(-difference.value)


def test_comparison_over_documents_with_one_common_seed(runs: dict[str, list[RunStore]]) -> None:
    a, b = summarise(runs[REPLAY][:2]), summarise(runs["sequential"][1:])
    comparison = compare(a, b, ["backward"])
    difference = comparison.scores["backward"]
    assert comparison.seeds == [1]
    assert difference.interval == "bootstrap over documents (evaluation noise)"
    assert difference.value == pytest.approx(a.scores["backward"].per_seed[1] - b.scores["backward"].per_seed[1])
    alone = summarise(runs["sequential"][1:2]).scores["backward"]
    assert difference.high - difference.low < 0.8 * (alone.high - alone.low), "pairing narrows"


def test_comparisons_that_cannot_be_made(runs: dict[str, list[RunStore]], tmp_path: Path) -> None:
    sequential = summarise(runs["sequential"][:2])
    assert compare(sequential, summarise(runs[REPLAY][2:])).scores["final"].reason == "no common seed"
    part = summarise([write_run(tmp_path / "part", method=REPLAY, n_rows=3, state="running")])
    assert compare(sequential, part).scores["final"].reason == "the two have different rows"
    with pytest.raises(ConfigError, match="differ in track"):
        compare(sequential, summarise(runs[REPLAY], unit="bits_per_byte"))
    with pytest.raises(NotFoundError, match="did you mean 'backward'"):
        compare(sequential, sequential, ["bakward"])


def test_ranks(runs: dict[str, list[RunStore]]) -> None:
    ranks = rank([summarise(stores) for stores in runs.values()])
    assert [(r.best, r.worst) for r in ranks["forgetting_first"].values()] == [(3, 3), (2, 2), (1, 1)]
    assert (ranks["in_distribution"]["frozen"].best, ranks["in_distribution"]["frozen"].worst) == (3, 3)
    assert ranks["in_distribution"]["sequential"] == module.stats.RankRange(1, 2)


def test_single_runs_are_not_ranked(runs: dict[str, list[RunStore]]) -> None:
    ranks = rank([summarise(stores[:1]) for stores in runs.values()], ["backward"])["backward"]
    assert {(r.best, r.worst) for r in ranks.values()} == {(1, 3)}
    assert "one seed" in (ranks["frozen"].reason or "")


def test_bill_is_the_mean_of_the_runs(runs: dict[str, list[RunStore]]) -> None:
    bill = summarise(runs[REPLAY]).bill
    assert bill.tokens[2] == {0: 50_000, 1: 50_000, 2: 100_000}
    assert bill.tokens[3] == {0: 33_333, 1: 33_333, 2: 33_333, 3: 100_001}
    assert bill.n_tokens == 600_000
    assert bill.stored_bytes["replay_data"] == 800_000
    assert summarise(runs["frozen"]).bill.n_tokens == 0


def test_no_ledger_is_not_free(tmp_path: Path) -> None:
    store = write_run(tmp_path, method="checkpoints")
    (store.folder / "ledger.json").unlink()
    bill = summarise([store]).bill
    assert math.isnan(bill.n_tokens) and math.isnan(bill.total_flops)
    assert bill.as_dict()["n_tokens"] is None


def test_as_dict_is_strict_json(runs: dict[str, list[RunStore]]) -> None:
    summaries = [summarise(stores) for stores in runs.values()]
    for value in (*summaries, compare(*summaries[:2])):
        text = json.dumps(value.as_dict(), allow_nan=False)
        assert json.loads(text) == value.as_dict()
    assert summaries[2].as_dict()["scores"]["backward"]["low"] is None


def test_unfinished_seeds_are_left_out_and_named(tmp_path: Path) -> None:
    done = write_run(tmp_path / "0", seed=0)
    part = write_run(tmp_path / "1", seed=1, n_rows=2, state="running")
    summary = summarise([part, done])
    assert summary.seeds == [0]
    assert summary.left_out == {1: "has rows [0, 1] where others have [0, 1, 2, 3]"}
    assert not summary.complete
    alone = summarise([part])
    assert alone.missing_rows == [2, 3]
    assert alone.scores["forgetting_first"].value > 0
    with pytest.raises(NotFoundError, match="no row"):
        summarise([write_run(tmp_path / "2", n_rows=0)])


def test_what_cannot_be_mixed(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    other_track = write_run(tmp_path / "b", seed=1, track="other")
    with pytest.raises(ConfigError, match="runs of different tracks cannot be mixed: synthetic"):
        group_runs([a, other_track])
    with pytest.raises(ConfigError, match="different tracks"):
        summarise([a, other_track])
    with pytest.raises(ConfigError, match="different methods"):
        summarise([a, write_run(tmp_path / "c", method="frozen", seed=1)])
    with pytest.raises(ConfigError, match="two runs of sequential with seed 0"):
        group_runs([a, write_run(tmp_path / "d")])
    with pytest.raises(ConfigError, match="no runs"):
        summarise([])


def test_broken_run_folders(tmp_path: Path) -> None:
    store = write_run(tmp_path)
    config = store.config()
    for key in ("track", "method", "seed", "stages"):
        store.write_config({name: value for name, value in config.items() if name != key})
        with pytest.raises(IntegrityError, match=key):
            summarise([store])
    short = {**config["track"], "oracle": {"nats_per_token": [1.0], "bits_per_byte": [1.0]}}
    store.write_config({**config, "track": short})
    with pytest.raises(IntegrityError, match="oracle has 1 losses for 4 stages"):
        summarise([store])
    store.write_config(config)
    for ledger in ({"tokens": [1]}, {"flops": {"train": "many"}}, {"tokens": {"one": {"0": 1}}}):
        store.write_ledger(ledger)
        with pytest.raises(IntegrityError, match=r"ledger\.json"):
            summarise([store])


def test_results_import_no_deep_learning() -> None:
    names = "matrix, metrics, stats, store, summary"
    heavy = "{'torch', 'transformers', 'mlflow', 'lm_eval', 'matplotlib'}"
    code = f"import sys; from clbench.results import {names}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
