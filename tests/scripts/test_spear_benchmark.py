"""The proof script of SPEAR-MM: its tables against figures worked out by hand, and its messages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import spear


def arm(policy: str, name: str, general: float, domain: float | None, undone: float | None, flops: float = 1.0) -> Any:
    scores = {side: {"bits_per_byte": 1.0, "nats_per_token": 2.0} for side in ("general", "domain")}
    standing = {"general": {"value": general}, "domain": {"value": domain}, "recovered": undone, "scores": scores}
    return {
        "policy": policy,
        "arm": name,
        "standing": standing,
        "cost": {"flops": flops, "seconds": flops},
    }


def seed(shift: float) -> Any:
    """A seed on which SPEAR-MM keeps shift more of the general score than the mean of the random draws."""
    return {
        "texts": {side: {"documents": 8, "tokens": 1000} for side in ("general", "domain")},
        "gain": {"value": 0.5, "why": None},
        "drift": dict.fromkeys(
            ("least_cosine", "slerp_is_lerp_share", "median_drift", "largest_drift", "svdr_above_0_share"), 0.5
        ),
        "scores_bill": {"flops": 4.0, "seconds": 4.0},
        "retraining": {"flops": 100.0, "seconds": 50.0, "n_tokens": 7},
        "arms": [
            arm("", "base", 1.0, 0.0, 1.0),
            arm("", "tuned", 0.8, 1.0, 0.0),
            arm("balanced", "spear", 0.9 + shift, 0.7, 0.5, flops=10.0),
            *(arm("balanced", f"random {n}", 0.9 + d, 0.6, 0.5) for n, d in ((1, -0.1), (2, 0.0), (3, 0.1))),
            arm("balanced", "uniform", 0.95, 0.7, None),
            arm("balanced", "spear, embeddings", 0.97 + shift, 0.8, 0.5),
            *(arm("balanced", f"random {n}, embeddings", 0.9 + d, 0.8, 0.5) for n, d in ((1, -0.1), (2, 0.1))),
            arm("balanced", "no units, embeddings", 0.98, 0.9, 0.5),
        ],
        "impact": {"rho": {"spear": {"value": 0.5 + shift, "why": None}, "svdr": {"value": None, "why": "equal"}}},
    }


def test_differences_are_paired_by_seed_and_intervals_are_those_of_t() -> None:
    found = spear.summary({"0": seed(0.01), "1": seed(0.02), "2": seed(0.06)})
    pair = next(one for one in found["differences"] if one["less"] == "random")
    values = [0.01, 0.02, 0.06]
    mean = sum(values) / 3
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)
    assert pair["general"]["value"] == pytest.approx(mean)
    assert pair["general"]["low"] == pytest.approx(mean - 4.302653 * error, abs=1e-6)  # t(2) at 0.975
    assert pair["domain"]["value"] == pytest.approx(0.1)
    uniform = next(one for one in found["differences"] if one["less"] == "uniform")
    assert uniform["undone"]["value"] is None  # undefined in a seed, so undefined
    wide = {one["less"]: one["general"]["value"] for one in found["differences"] if one["arm"] == "spear, embeddings"}
    assert wide == pytest.approx({"random, embeddings": 0.07 + mean, "no units, embeddings": mean - 0.01})
    assert found["rho"]["spear"]["value"] == pytest.approx(0.5 + mean)
    assert found["rho"]["svdr"]["value"] is None


def test_the_front_costs_scores_ends_and_its_points_against_training_once_a_point() -> None:
    cost = spear.summary({"0": seed(0.0)})["cost"]
    assert cost["front_flops"]["value"] == 4 + 10 + 2  # one policy
    assert cost["less_flops"]["value"] == pytest.approx(1 - 16 / 100)
    assert cost["less_seconds"]["value"] == pytest.approx(1 - 16 / 50)


def test_arms_that_a_seed_lacks_are_left_out_and_the_page_names_the_rest(tmp_path: Path, capsys: Any) -> None:
    short = seed(0.0)
    short["arms"] = [one for one in short["arms"] if one["arm"] != "uniform"]
    seeds = {"0": seed(0.0), "1": short}
    spear.write(tmp_path, {"format": 1, "facts": {"track": "t"}, "seeds": seeds})
    text = (tmp_path / "spear.md").read_text()
    assert "uniform" not in text
    assert "random blocks (mean of 3) | 90.0" in text
    assert "| balanced, embeddings | embeddings alone | -1.0" in text
    assert json.loads((tmp_path / "spear.json").read_text())["seeds"] == seeds
    assert spear.main(["--out", str(tmp_path), "--table"]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


def test_what_is_missing_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert spear.main(["--out", str(tmp_path), "--table"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "spear.json" in said


def test_only_seeds_whose_release_is_whole_are_found(tmp_path: Path) -> None:
    for name in ("seed-2", "seed-0", "seed-x"):
        (tmp_path / name / "release" / "stage-01").mkdir(parents=True)
    for name in ("seed-2", "seed-x"):
        (tmp_path / name / "release" / "stage-01" / "model.safetensors").write_bytes(b"")
    assert list(spear.runs_of(tmp_path, 1)) == [2]
