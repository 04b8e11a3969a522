"""The benchmark of methods: pairing and verdicts on made-up times, and one real round through the loop and Trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.methods import Block, alternate, check_agreement, median_interval, verdict
from clbench.errors import ConfigError
from clbench.prepare import prepare
from clbench.registry import track_path


@pytest.mark.parametrize(
    ("n", "place"),
    # 2 P(Binomial(n, 1/2) < k): n = 6, k = 1: 2/64 = 0.031; n = 8: k = 2 would be 0.070; n = 9, k = 2: 20/512 = 0.039
    [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6)],
)
def test_interval_of_the_median(n: int, place: int) -> None:
    values = [float((7 * i) % n) for i in range(n)] if n % 7 else [float(i) for i in range(n)]
    assert median_interval(values) == (place - 1, n - place)


def test_five_pairs_give_no_interval() -> None:
    assert all(map(math.isnan, median_interval([1.0] * 5)))


def test_ratios_are_to_the_blocks_on_both_sides() -> None:
    clock = {"drift": 0.0}

    def block(factor: float) -> Block:
        clock["drift"] += 1.0  # the machine gets slower, by as much from block to block
        return Block(factor * clock["drift"], 3 * factor * clock["drift"], [])

    def broken() -> Block:
        raise ConfigError("no such method")

    runs = {"same": lambda: block(1.0), "broken": broken, "dear": lambda: block(1.4)}
    ratios, failed, blocks = alternate(lambda: block(1.0), runs, 3, lambda text: None)
    # A linear drift cancels: each block lies in the middle of its two neighbours.
    assert ratios["same"]["step"].values == pytest.approx([1.0] * 3)
    assert ratios["dear"]["stage"].values == pytest.approx([1.4] * 3)
    assert list(failed) == ["broken"] and "broken" not in ratios
    assert len(blocks) == 6


def test_losses_of_other_work_are_refused() -> None:
    assert check_agreement([3.0, 2.0], [3.0, 2.0005], 1e-3) == pytest.approx(5e-4)
    for ours, theirs in (([3.0, 2.0], [3.0, 2.01]), ([3.0], [3.0, 2.0]), ([3.0], [math.nan])):
        with pytest.raises(ConfigError, match="not the same work"):
            check_agreement(ours, theirs, 1e-3)


def test_verdict_by_the_interval() -> None:
    assert verdict((1.0, 0.99, 1.005), 1.01) == "met"
    assert verdict((1.0, 0.99, 1.02), 1.01) == "cannot be told"
    assert verdict((1.05, 1.02, 1.1), 1.01) == "not met"
    assert verdict((1.0, math.nan, math.nan), 1.01).startswith("met by the median")


@pytest.fixture(scope="module")
def short(clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a benchmark that takes seconds, on a track whose base is next to untrained."""
    track = tmp_path_factory.mktemp("track") / "short.yaml"
    text = track_path("tinydocs").read_text(encoding="utf-8")
    track.write_text(text.replace("n_tokens: 20000", "n_tokens: 1000"), encoding="utf-8")
    prepare(str(track), device="cpu")
    return ["--track", str(track), "--steps", "3", "--warm-steps", "1", "--repeats", "1", "--json"]


def test_trainer_does_the_same_work_as_the_loop(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main([*short, "--trainer"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainer"]["largest_loss_difference_nats"] < 1e-5
    assert found["trainer"]["trainer_over_ours"]["step"]["median"] > 0
    assert found["gpu"] == "not measured"


def test_a_round_of_methods_through_the_loop(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for name in ("replay", "sequential", "nonsense") for word in ("--method", name)]
    assert methods.main([*short, *words]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert set(found["ratios"]) == {"replay", "sequential"} and "unknown method" in found["skipped"]["nonsense"]
    assert found["ratios"]["replay"]["limit"] == 1.01 and found["sequential"]["step_s"] > 0


def test_a_method_holds_its_past_stages_in_the_block(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = ("rank1-ewc:rows=4,rows_per_batch=1", "ewc:rows=4", "l2-sp", "sequential")
    words = [*[word for name in names for word in ("--method", name)], "--past-steps", "1", "--rows", "2"]
    vectors = {}
    for n_past in (1, 2):
        assert methods.main([*short, *words, "--past", str(n_past)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["facts"]["past_stages"] == n_past and found["facts"]["rows"] == 2
        vectors[n_past] = [found["methods"]["ratios"][name]["state_vectors"] for name in names]
        # Each has a seam to go through, but for the last.
        seams = [found["methods"]["ratios"][name]["seams"]["median"] for name in names]
        assert min(seams[:3]) > 1 > seams[3] - 0.01
    # Research notes: one vector for each past stage; two in all; the base is kept anyway; nothing.
    assert vectors[1] == pytest.approx([1, 2, 0, 0], rel=0.02)
    assert vectors[2] == pytest.approx([2, 2, 0, 0], rel=0.02)


def test_more_past_stages_than_the_stream_has_are_refused(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main([*short, "--past", "99"]) == 2
    assert "the stream has" in capsys.readouterr().err


def test_the_vectors_of_a_state_are_judged() -> None:
    assert methods.judged_state("rank1-ewc", 5, 5.0001) == {"state_limit": 5, "state_verdict": "met"}
    assert methods.judged_state("rank1-ewc", 4, 5.0)["state_verdict"] == "not met"
    assert methods.judged_state("ewc", 5, 2.5) == {"state_limit": 2, "state_verdict": "not met"}
