"""One run's bill: TiC-LM's check vector, shares and passes by hand, and ledgers that are not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from clbench.errors import IntegrityError
from clbench.method import Stage
from clbench.methods.replay import Replay
from clbench.results.bill import of_equal_tokens, read_bill
from clbench.results.store import RunStore
from clbench.train.data import allocate
from tests.synthetic_runs import write_run

BUDGET = 1_000_000
# Tokens per month after month 114 in units of a month's budget, the first month's pretraining left out (TiC-LM).
CHECK = {
    "1/t": {2: 4.32, 10: 2.49, 30: 1.36, 57: 0.71, 100: 0.14, 114: 0.009},
    "1/2": {2: 2.65, 10: 1.74, 30: 1.17, 57: 0.85, 100: 0.57, 114: 0.50},
}


def stage_of(index: int, n_stages: int) -> Stage:
    return Stage(
        index=index,
        n_stages=n_stages,
        n_tokens=BUDGET,
        available_tokens=(BUDGET,) * (index + 1),
        learning_rate=1e-3,
        warmup_steps=0,
        floor=0.1,
    )


def write_ledger(folder: Path, ledger: dict[str, Any], n_stages: int, **training: Any) -> RunStore:
    """Write the two files that a bill is read from."""
    store = RunStore(folder)
    stages = [{"index": i, "name": f"m{i}"} for i in range(n_stages)]
    method = {"label": "m", "components": [{"name": "m", "target": "m", "options": {}}]}
    store.write_config(
        {
            "run_id": "x",
            "track": {"name": "t", "sha256": "0"},
            "stages": stages,
            "method": method,
            "seed": 0,
            "training": training,
        }
    )
    store.write_ledger(ledger)
    return store


@pytest.mark.parametrize("fraction", CHECK)
def test_replay_serves_old_months_as_tic_lm_says(fraction: str, tmp_path: Path) -> None:
    method, n_stages = Replay(Replay.Options(fraction=fraction)), 114
    tokens = {}
    for index in range(1, n_stages):
        mixture = method.plan(stage_of(index, n_stages)).mixture
        assert mixture is not None
        tokens[str(index)] = {str(source): n for source, n in allocate(BUDGET, mixture).items()}
    store = write_ledger(tmp_path, {"tokens": tokens}, n_stages, n_tokens_per_stage=BUDGET)
    found = read_bill(store).in_budgets()
    for month, wanted in CHECK[fraction].items():  # months count from 1, stages from 0
        assert found[month - 1] == pytest.approx(wanted, abs=0.005)
    assert sum(found.values()) == pytest.approx(113)
    if fraction == "1/t":
        assert found[1] == pytest.approx(math.fsum(1 / t for t in range(2, 115)), abs=1e-4)


def test_shares_budgets_and_passes_by_hand(tmp_path: Path) -> None:
    tokens = {"1": {"0": 25, "1": 75}, "2": {"0": 10, "1": 10, "2": 80}}
    bill = read_bill(write_ledger(tmp_path, {"tokens": tokens}, 3, n_tokens_per_stage=100))
    assert bill.shares() == {1: {0: 0.25, 1: 0.75}, 2: {0: 0.1, 1: 0.1, 2: 0.8}}
    assert bill.by_source() == {0: 35, 1: 85, 2: 80}
    assert bill.in_budgets() == {0: 0.35, 1: 0.85, 2: 0.8}
    assert bill.passes({0: 70, 1: 17, 2: 80}) == {0: 0.5, 1: 5.0, 2: 1.0}
    assert bill.passes({1: 17}) == {1: 5.0}  # nothing is known of the others
    assert bill.n_tokens == 200


def test_where_steps_are_fixed_the_unit_is_the_mean_stage(tmp_path: Path) -> None:
    tokens = {"1": {"1": 90}, "2": {"2": 110}}
    store = write_ledger(tmp_path, {"tokens": tokens}, 3, n_tokens_per_stage=7, n_steps_per_stage=4)
    bill = read_bill(store)
    assert bill.budget is None
    assert bill.unit() == 100
    assert bill.in_budgets() == {0: 0.0, 1: 0.9, 2: 1.1}


def test_only_stages_whose_plan_is_more_than_a_mixture_are_reviews(tmp_path: Path) -> None:
    plain = {"step": 0, "mixture": {"0": 0.5, "1": 0.5}}
    plans = {
        "1": [plain],
        "2": [plain, {**plain, "step": 5}],
        "3": [{**plain, "pools": {"0": 9}}],
        "4": [{**plain, "n_excluded": 2, "excluded_sha256": "ab"}],
    }
    bill = read_bill(write_ledger(tmp_path, {"plans": plans}, 5))
    assert list(bill.reviews()) == [2, 3, 4]
    assert bill.as_dict()["plans"] == plans


def test_seeds_of_equal_tokens_share_a_table(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{seed}", method="replay:fraction=1/2", seed=seed) for seed in range(3)]
    runs.append(write_run(tmp_path / "other", method="sequential"))
    value = runs[2].ledger()
    value["tokens"]["3"]["0"] += 1
    runs[2].write_ledger(value)
    groups = of_equal_tokens([read_bill(run) for run in runs])
    assert [[bill.name for bill in group] for group in groups] == [
        ["replay:fraction=1/2 · seed 0", "replay:fraction=1/2 · seed 1"],
        ["replay:fraction=1/2 · seed 2"],
        ["sequential · seed 0"],
    ]


@pytest.mark.parametrize(
    "ledger",
    [
        {"tokens": 5},
        {"tokens": {"a": {}}},
        {"tokens": {"1": {"1": -1}}},
        {"tokens": {"1": {"1": 10**400}}},
        {"tokens": {"1": {"1": "many"}}},
        {"tokens": {"77": {"1": 1}}},
        {"tokens": {"1": {"77": 1}}},
        {"plans": {"77": [{"step": 0, "mixture": {"0": 1}}]}},
        {"flops": {"train": -1}},
        {"flops": {"x" * 101: 1}},
        {"seconds": {"train": None}},
        {"plans": {"1": {"step": 0}}},
        {"plans": {"1": [{"step": 0, "mixture": {"0": 7}}]}},
        {"plans": {"1": [{"step": -1, "mixture": {}}]}},
        {"peak_memory_bytes": "much"},
    ],
)
def test_a_garbled_ledger_is_one_line(ledger: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as error:
        read_bill(write_ledger(tmp_path, ledger, 3))
    assert "ledger.json" in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("text", ['{"seconds": {"train": NaN}}', '{"flops": {"train": 1e999}}'])
def test_numbers_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    store = write_ledger(tmp_path, {}, 3)
    (tmp_path / "ledger.json").write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"ledger\.json"):
        read_bill(store)


def test_names_that_would_act_on_a_terminal_do_not(tmp_path: Path) -> None:
    store = write_run(tmp_path)
    config = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))
    config["method"]["label"] = "\x1b]0;owned\x07[red]x"
    config["stages"][0]["name"] = "a\nb"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    bill = read_bill(store)
    assert bill.label == "?]0;owned?[red]x"
    assert bill.stages[0] == "a?b"
    assert json.dumps(bill.as_dict())
