"""Replay: the published token ledger, and shares that are none."""

from __future__ import annotations

import pytest

from clbench.errors import ConfigError
from clbench.methods.replay import Replay, new_share
from clbench.train.data import allocate
from tests.train.test_data import stage


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        # TiC-LM, research notes 2.5: cumulative tokens of month t after 114 months, in units of the month budget.
        ("1/t", {2: 4.32, 10: 2.49, 30: 1.36, 57: 0.71, 100: 0.14, 114: 0.009}),
        ("1/2", {2: 2.65, 10: 1.74, 30: 1.17, 57: 0.85, 100: 0.57, 114: 0.50}),
    ],
)
def test_replay_ledger_matches_the_check_vector(fraction: str, expected: dict[int, float]) -> None:
    budget = 1_000_000
    replay = Replay(Replay.Options(fraction=fraction))
    total: dict[int, int] = {}
    for index in range(1, 114):
        mixture = replay.plan(stage(index)).mixture
        assert mixture is not None
        quota = allocate(budget, mixture)
        assert sum(quota.values()) == budget
        for source, n in quota.items():
            total[source] = total.get(source, 0) + n
    for month, units in expected.items():
        assert total[month - 1] / budget == pytest.approx(units, abs=0.006 if units > 0.01 else 0.0005)


@pytest.mark.parametrize("fraction", ["2", "-0.1", "half", "1/0", "", "nan", "inf"])
def test_replay_refuses_what_is_no_share(fraction: str) -> None:
    with pytest.raises(ConfigError, match="no share"):
        new_share(fraction, 3)
