"""The compute of a series of oracles against TiC-LM's published figures, and the rule for its rows."""

from __future__ import annotations

import itertools

import pytest

from clbench.errors import ConfigError
from clbench.results.series import newest_cutoff, plan_series

INITIAL = 111_837_286_400
"""Tokens of TiC-LM's first month, and of the 113 months after it together, in the 220 B setting."""
CONTINUAL_440B = 335_511_859_200
"""Of the later months together in what the paper calls 440 B."""
N_MONTHS = 113
CUTOFFS = [0, 10, 29, 53, 77, 98, 113]
"""Months up to 201305, 201501, 201701, 201901, 202101, 202301 and 202407."""


def test_the_series_of_tic_lm_costs_1159_billion_tokens_and_26_times_a_continual_run() -> None:
    plan = plan_series(
        CUTOFFS,
        n_stages=N_MONTHS + 1,
        n_initial=INITIAL,
        n_per_stage=INITIAL // N_MONTHS,
        continual_tokens=INITIAL + CONTINUAL_440B,
    )
    assert plan.series_tokens == pytest.approx(1159e9, abs=0.5e9)  # published as 1.16 T
    assert plan.n_tokens[113] == pytest.approx(2 * INITIAL, rel=1e-6)  # matched to the 220 B run
    assert plan.continual_tokens == pytest.approx(447e9, abs=0.5e9)
    assert plan.ratio == pytest.approx(2.59, abs=0.005)
    rounded = plan_series([0], n_stages=1, n_initial=1160, n_per_stage=1, continual_tokens=440)
    assert (round(rounded.ratio, 1), round(rounded.saving, 2)) == (2.6, 0.62)  # "2.6x", "62 % less"


def test_a_budget_of_exactly_110_billion_does_not_give_the_published_sum() -> None:
    plan = plan_series(CUTOFFS, n_stages=114, n_initial=113 * 10**9, n_per_stage=10**9)
    assert plan.series_tokens == 7 * 113 * 10**9 + 380 * 10**9  # by hand: 380 = sum of the cutoffs
    assert plan.series_tokens * 110 / 113 == pytest.approx(1140e9, abs=0.5e9)


def test_without_cutoffs_every_stage_has_its_oracle_and_the_run_is_the_tracks() -> None:
    plan = plan_series([], n_stages=4, n_initial=3000, n_per_stage=1500)
    assert plan.n_tokens == {0: 3000, 1: 4500, 2: 6000, 3: 7500}
    assert plan.continual_tokens == 7500
    assert plan.ratio == pytest.approx(21000 / 7500)
    assert plan.as_dict()["oracles"][2] == {"cutoff": 2, "n_tokens": 6000, "n_tokens_per_stage": 2000.0}


def test_a_run_dearer_than_the_series_saves_less_than_nothing() -> None:
    assert plan_series([0], n_stages=4, n_initial=3000, n_per_stage=1500).saving == pytest.approx(-1.5)


@pytest.mark.parametrize("cutoffs", list(itertools.chain(*(itertools.combinations(range(4), n) for n in range(1, 5)))))
def test_a_row_is_the_newest_oracle_that_is_not_of_the_future(cutoffs: tuple[int, ...]) -> None:
    for stage in range(4):
        past = [cutoff for cutoff in cutoffs if cutoff <= stage]
        assert newest_cutoff(cutoffs, stage) == (sorted(past)[-1] if past else None)


@pytest.mark.parametrize(
    ("cutoffs", "tokens", "message"),
    [
        ([4], None, "stage 4 is not in the stream"),
        ([-1], None, "stage -1 is not in the stream"),
        ([1, 1], None, "given twice"),
        ([1], 0, "a continual run of 0 tokens"),
    ],
)
def test_what_is_no_series_is_refused(cutoffs: list[int], tokens: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_series(cutoffs, n_stages=4, n_initial=3000, n_per_stage=1500, continual_tokens=tokens)
