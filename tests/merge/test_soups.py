"""Averages over checkpoints against closed forms; where a model's second moments are looked for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clbench.errors import ClbenchError
from clbench.merge import moments
from clbench.merge.execute import merge_weights
from clbench.merge.families import BASE, TUNED, Spot
from clbench.merge.soups import Soup, checkpoints_of
from clbench.method import Weights
from clbench.train.checkpoint import TrainState, save
from tests.merge.models import gaussian, live, make_weights, write_model

CENTRE = gaussian(6, seed=7)
MODELS = [CENTRE + scale * gaussian(6, seed=n) for n, scale in ((1, 0.9), (2, 0.3), (3, 0.5), (4, 2.0))]
"""Base, newest, and two older checkpoints; the loss is the distance from the centre."""
LABELS = ["base", "new", "old 1", "old 2"]
SOURCES = live({"w": MODELS[1]}, {"w": MODELS[0]}, {"w": MODELS[2]}, {"w": MODELS[3]})


def loss(spot: Spot) -> float:
    return float((merge_weights(spot.plan, SOURCES)["w"] - CENTRE).norm())


def shares(spot: Spot) -> list[float]:
    if spot.plan == BASE.plan:
        return [1.0, 0, 0, 0]
    return [0, 1.0, 0, 0] if spot.plan == TUNED.plan else list(spot.about["shares"])


def test_uniform_soups_hold_all_with_and_without_the_base() -> None:
    whole = Soup("soup", LABELS).choose(loss)
    torch.testing.assert_close(merge_weights(whole.plan, SOURCES)["w"], sum(MODELS) / 4)
    assert shares(Soup("soup", LABELS, with_base=False).choose(loss)) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_a_greedy_soup_is_what_the_recipe_gives_and_never_worse_than_the_best() -> None:
    chosen = Soup("greedy-soup", LABELS).choose(loss)
    single = [float((m - CENTRE).norm()) for m in MODELS]
    order = sorted(range(4), key=lambda n: single[n])
    picked, lowest = [order[0]], single[order[0]]
    for n in order[1:]:
        tried = float((sum(MODELS[m] for m in [*picked, n]) / (len(picked) + 1) - CENTRE).norm())
        if tried < lowest:
            picked, lowest = [*picked, n], tried
    assert [n for n, share in enumerate(shares(chosen)) if share > 0] == sorted(picked)
    assert len(picked) > 1
    assert loss(chosen) == pytest.approx(lowest) and lowest < min(single)
    equal = Soup("greedy-soup", LABELS).choose(lambda spot: 1.0)  # a draw: the newest alone
    assert equal.plan == TUNED.plan


def test_mwa_weighs_by_loss_to_a_power() -> None:
    single = [float((m - CENTRE).norm()) for m in MODELS]
    for power in (0.0, 1.0, 4.0):
        found = shares(Soup("mwa", LABELS, power=power).choose(loss))
        raw = [one**-power for one in single]
        assert found == pytest.approx([one / math.fsum(raw) for one in raw])
    assert shares(Soup("mwa", LABELS, power=0.0).choose(loss)) == pytest.approx([0.25] * 4)
    best = shares(Soup("mwa", LABELS, power=4000.0).choose(loss))
    assert best[single.index(min(single))] == pytest.approx(1)
    with pytest.raises(ClbenchError, match="above 0"):
        Soup("mwa", LABELS).choose(lambda spot: 0.0)
    with pytest.raises(ClbenchError, match="no q and no s"):
        Soup("mwa", LABELS).spot(None, 0.5)


def test_checkpoints_are_a_runs_releases_from_old_to_new(tmp_path: Path) -> None:
    for name in ("stage-10", "stage-2", "stage-01"):
        write_model(tmp_path / "run" / "release" / name, make_weights(0))
    (tmp_path / "run" / "release" / "stage-03").mkdir()  # nothing in it
    assert [one.name for one in checkpoints_of(tmp_path / "run")] == ["stage-01", "stage-2", "stage-10"]
    write_model(tmp_path / "plain" / "checkpoint-500", make_weights(0))
    assert [one.name for one in checkpoints_of(tmp_path / "plain")] == ["checkpoint-500"]
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ClbenchError):
            checkpoints_of(place)


# --- moments


def states(run: Path, *stages: int) -> dict[int, Weights]:
    found = {}
    for stage in stages:
        found[stage] = {"exp_avg/w": torch.ones(3, 2), "exp_avg_sq/w": torch.full((3, 2), float(stage))}
        save(run / "checkpoints", TrainState(stage, 9, True, {"w": torch.zeros(3, 2)}, optimizer=found[stage]))
    return found


def test_moments_are_found_in_a_run_by_the_models_stage(tmp_path: Path) -> None:
    run = tmp_path / "run"
    states(run, 2, 3)
    model = run / "release" / "stage-03"
    model.mkdir(parents=True)
    assert moments.find(run, model).parent.name.startswith("003-")
    assert float(moments.open_moments(run, model).read("exp_avg_sq/w")[0, 0]) == 3
    with pytest.raises(ClbenchError, match="keeps the moments of stage 2, 3, and stage-01") as caught:
        moments.find(run, run / "release" / "stage-01")
    assert "--moments full" in str(caught.value)
    moments.write(load_file(moments.find(run, model)), "rank1", model / moments.FILE)
    assert moments.find(run, model) == model / moments.FILE == moments.find(model, model)  # the release's own first
    small = load_file(model / moments.FILE)
    assert set(small) == {"exp_avg_sq_row/w", "exp_avg_sq_column/w"}
    assert small["exp_avg_sq_row/w"].tolist() == [6, 6, 6]


def test_moments_that_are_none_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for place in (run, tmp_path / "nowhere"):
        with pytest.raises(ClbenchError):
            moments.find(place, run)
    save_file({"momentum_buffer/w": torch.ones(2)}, tmp_path / "sgd.safetensors")
    with pytest.raises(ClbenchError, match="momentum_buffer"):
        moments.open_moments(tmp_path / "sgd.safetensors", run)
    with pytest.raises(ClbenchError, match="keeps no second moments: its state has exp_avg"):
        moments.of_optimizer({"exp_avg/w": torch.ones(2)}, "full")
    with pytest.raises(ClbenchError, match="its state is empty"):
        moments.of_optimizer({}, "rank1")
