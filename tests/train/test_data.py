"""Which tokens are trained on: exact budgets, the published replay ledger, order as a pure function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clbench.errors import ConfigError
from clbench.method import Stage
from clbench.stream import Stream
from clbench.train.data import IGNORE, DataOrder, allocate

CPU = torch.device("cpu")


def stage(index: int, n_tokens: int = 1000) -> Stage:
    return Stage(
        index=index,
        n_stages=200,
        n_tokens=n_tokens,
        available_tokens=(10_000,) * (index + 1),
        learning_rate=1e-3,
        warmup_steps=10,
        floor=0.1,
    )


@given(st.integers(1, 10**7), st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_allocation_is_exact_and_off_by_less_than_one_token(n_tokens: int, weights: list[int]) -> None:
    shares = {i: weight / sum(weights) for i, weight in enumerate(weights)}
    quota = allocate(n_tokens, shares)
    assert sum(quota.values()) == n_tokens
    assert all(abs(quota.get(i, 0) - n_tokens * share) < 1 + 1e-6 for i, share in shares.items())


def order(stream: Stream, mixture: dict[int, float], n_tokens: int = 2777, seed: int = 0, index: int = 2) -> DataOrder:
    return DataOrder(stream, mixture, n_tokens=n_tokens, length=48, batch_rows=8, seed=seed, stage=index)


def test_budget_is_exact_to_the_token_and_batches_hold_the_streams_text(tinydocs: Stream) -> None:
    rows = order(tinydocs, {0: 0.25, 2: 0.75})
    counted: dict[int, int] = {}
    for step in range(rows.n_steps):
        for batch in rows.micro_batches(step, micro_rows=3, device=CPU):
            assert batch.inputs_BT.shape == batch.targets_BT.shape
            assert len(batch.inputs_BT) <= 3
            assert int((batch.targets_BT != IGNORE).sum()) == batch.n_targets
            for source, n in batch.n_targets_by_source.items():
                counted[source] = counted.get(source, 0) + n
    assert counted == {0: 694, 2: 2083}
    batch = rows.micro_batches(0, micro_rows=None, device=CPU)[0]
    for b, (source, start, n) in enumerate(rows.rows[:8].tolist()):
        text = tinydocs.tokens("train", source)[start : start + n + 1].astype(np.int64)
        assert batch.inputs_BT[b, :n].tolist() == text[:-1].tolist()
        assert batch.targets_BT[b, :n].tolist() == text[1:].tolist()
        assert (batch.targets_BT[b, n:] == IGNORE).all()


def test_order_is_a_pure_function_of_its_arguments(tinydocs: Stream) -> None:
    first, again = order(tinydocs, {2: 1.0}), order(tinydocs, {2: 1.0})
    assert np.array_equal(first.rows, again.rows)
    assert not np.array_equal(first.rows, order(tinydocs, {2: 1.0}, seed=1).rows)
    assert not np.array_equal(first.rows[:, 1], order(tinydocs, {2: 1.0}, index=3).rows[:, 1])


def test_one_epoch_sees_every_token_once_and_two_see_it_twice(tinydocs: Stream) -> None:
    available = len(tinydocs.tokens("train", 1)) - 1
    for epochs in (1, 2):
        rows = order(tinydocs, {1: 1.0}, n_tokens=epochs * available, index=1).rows
        seen = np.zeros(available, dtype=int)
        for _, start, n in rows.tolist():
            seen[start : start + n] += 1
        assert (seen == epochs).all()


def test_replay_sees_a_prefix_of_the_new_text_that_sequential_sees(tinydocs: Stream) -> None:
    """Paired comparisons: with one seed, both methods read the same new text first."""
    alone = order(tinydocs, {2: 1.0}, n_tokens=2400)
    mixed = order(tinydocs, {0: 0.25, 1: 0.25, 2: 0.5}, n_tokens=2400)
    new = {(start, n) for source, start, n in mixed.rows.tolist() if source == 2}
    whole = {start: n for _, start, n in alone.rows.tolist()}
    assert all(start in whole and n <= whole[start] for start, n in new)


def test_an_empty_stage_cannot_be_mixed_in(tinydocs: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinydocs, "tokens", lambda split, index: np.zeros(1, dtype=np.uint16))
    with pytest.raises(ConfigError, match="no training text"):
        order(tinydocs, {2: 1.0})
