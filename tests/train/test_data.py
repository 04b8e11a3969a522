"""Which tokens are trained on: exact budgets, the published replay ledger, order as a pure function."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from clbench import seeds
from clbench.errors import ConfigError
from clbench.method import Cosine, Stage
from clbench.stream import Stream
from clbench.train.data import IGNORE, Batching, DataOrder, allocate
from tests.engine import run_tiny

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


def table(found: DataOrder) -> list[tuple[int, int, int]]:
    """Return (source, first token, targets) of every row in order."""
    return list(zip(found.source.tolist(), found.start.tolist(), found.n_targets.tolist(), strict=True))


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
    for b, (source, start, n) in enumerate(table(rows)[:8]):
        text = tinydocs.tokens("train", source)[start : start + n + 1].astype(np.int64)
        assert batch.inputs_BT[b, :n].tolist() == text[:-1].tolist()
        assert batch.targets_BT[b, :n].tolist() == text[1:].tolist()
        assert (batch.targets_BT[b, n:] == IGNORE).all()


def test_order_is_a_pure_function_of_its_arguments(tinydocs: Stream) -> None:
    first, again = order(tinydocs, {2: 1.0}), order(tinydocs, {2: 1.0})
    assert table(first) == table(again)
    assert table(first) != table(order(tinydocs, {2: 1.0}, seed=1))
    assert not np.array_equal(first.start, order(tinydocs, {2: 1.0}, index=3).start)


def test_one_epoch_sees_every_token_once_and_two_see_it_twice(tinydocs: Stream) -> None:
    available = len(tinydocs.tokens("train", 1)) - 1
    for epochs in (1, 2):
        rows = order(tinydocs, {1: 1.0}, n_tokens=epochs * available, index=1)
        seen = np.zeros(available, dtype=int)
        for _, start, n in table(rows):
            seen[start : start + n] += 1
        assert (seen == epochs).all()


def test_replay_sees_a_prefix_of_the_new_text_that_sequential_sees(tinydocs: Stream) -> None:
    """Paired comparisons: with one seed, both methods read the same new text first."""
    alone = order(tinydocs, {2: 1.0}, n_tokens=2400)
    mixed = order(tinydocs, {0: 0.25, 1: 0.25, 2: 0.5}, n_tokens=2400)
    new = {(start, n) for source, start, n in table(mixed) if source == 2}
    whole = {start: n for _, start, n in table(alone)}
    assert all(start in whole and n <= whole[start] for start, n in new)


def test_an_empty_stage_cannot_be_mixed_in(tinydocs: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinydocs, "tokens", lambda split, index: np.zeros(1, dtype=np.uint16))
    with pytest.raises(ConfigError, match="no training text"):
        order(tinydocs, {2: 1.0})


class Texts:
    """The part of a stream that an order reads: documents of given lengths (EOS included), token i of a stage is i."""

    sha256 = "texts"

    def __init__(self, *lengths: list[int]) -> None:
        self.lengths = lengths

    def tokens(self, split: str, stage: int) -> NDArray[np.uint16]:
        return (np.arange(sum(self.lengths[stage])) + 1000 * stage).astype(np.uint16)

    def offsets(self, split: str, stage: int) -> NDArray[np.int64]:
        return np.cumsum([0, *self.lengths[stage]])


def reference(
    texts: Texts,
    mixture: dict[int, float],
    *,
    budget: int,
    length: int,
    batching: Batching,
    by_rows: bool,
    seed: int,
    stage: int,
) -> list[tuple[int, int, int]]:
    """Return what the rows must be, by loops over documents and rows: the definition, not the speed."""
    key = (texts.sha256, seed, "train", stage)
    rows: list[tuple[int, int, int]] = []
    for source, quota in allocate(budget, mixture).items():
        ends = texts.offsets("train", source).tolist()
        chunks = []
        for first, end in pairwise(ends) if batching == "rows" else [(0, ends[-1])]:
            while end - first > 1:
                n = min(length, end - first - 1)
                chunks.append((source, first, n))
                first += n
        left, epoch = quota, 0
        while left > 0:
            for i in seeds.permutation(len(chunks), *key, source, epoch):
                n = chunks[i][2] if by_rows else min(chunks[i][2], left)
                if left > 0:
                    rows.append((source, chunks[i][1], n))
                left -= 1 if by_rows else n
            epoch += 1
    return [rows[i] for i in seeds.permutation(len(rows), *key, "mix")]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12).map(lambda n: [*n, 2]), min_size=3, max_size=3),
    st.sampled_from(["packed", "rows"]),
    st.sampled_from([{0: 1.0}, {0: 0.5, 2: 0.5}, {0: 0.1, 1: 0.3, 2: 0.6}]),
    st.integers(1, 400),
    st.integers(1, 16),
    st.integers(1, 9),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_batch_is_that_of_the_definition(
    lengths: list[list[int]],
    batching: Batching,
    mixture: dict[int, float],
    budget: int,
    length: int,
    batch_rows: int,
    world_size: int,
    by_rows: bool,
) -> None:
    texts = Texts(*lengths)
    budget = -(-budget // batch_rows) * batch_rows if by_rows else budget
    found = DataOrder(
        cast("Stream", texts),
        mixture,
        n_tokens=budget,
        length=length,
        batch_rows=batch_rows,
        seed=3,
        stage=2,
        batching=batching,
        n_rows=budget if by_rows else None,
    )
    expected = reference(
        texts, mixture, budget=budget, length=length, batching=batching, by_rows=by_rows, seed=3, stage=2
    )
    assert table(found) == expected
    assert found.n_steps == -(-len(expected) // batch_rows)
    assert (len(expected) if by_rows else sum(n for _, _, n in expected)) == budget
    read = []
    for step in range(found.n_steps):
        whole = found.micro_batches(step, micro_rows=None, device=CPU)
        shares = [
            found.micro_batches(step, micro_rows=2, device=CPU, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for name in ("inputs_BT", "targets_BT"):
            dealt = torch.cat([getattr(batch, name) for share in shares for batch in share])
            assert torch.equal(dealt, getattr(whole[0], name))
        n_rows = [sum(len(batch.inputs_BT) for batch in share) for share in shares]
        assert max(n_rows) - min(n_rows) <= 1
        assert sum(batch.n_targets for share in shares for batch in share) == whole[0].n_targets
        read += list(zip(whole[0].inputs_BT.tolist(), whole[0].targets_BT.tolist(), strict=True))
    for (source, start, n), (inputs, targets) in zip(expected, read, strict=True):
        assert inputs == [1000 * source + start + t for t in range(n)] + [0] * (length - n)
        assert targets == [1000 * source + start + t + 1 for t in range(n)] + [IGNORE] * (length - n)


def test_rows_stay_inside_documents_and_an_epoch_holds_every_target_once(tinydocs: Stream) -> None:
    offsets = tinydocs.offsets("train", 1)
    available = int((np.diff(offsets) - 1).sum())
    found = DataOrder(tinydocs, {1: 1.0}, n_tokens=available, length=16, batch_rows=4, seed=0, stage=1, batching="rows")
    seen = np.zeros(offsets[-1], dtype=int)
    for _, start, n in table(found):
        document = np.searchsorted(offsets, start, side="right") - 1
        assert offsets[document] <= start
        assert start + n < offsets[document + 1]
        seen[start + 1 : start + n + 1] += 1
    firsts = np.zeros(offsets[-1], dtype=int)
    firsts[offsets[:-1]] = 1
    assert (seen == 1 - firsts).all()


@pytest.mark.parametrize("batching", ["packed", "rows"])
def test_documents_without_a_target_cannot_be_trained_on(batching: Batching) -> None:
    empty = cast("Stream", Texts([1] if batching == "packed" else [1, 1, 1]))
    with pytest.raises(ConfigError, match="no training text"):
        DataOrder(empty, {0: 1.0}, n_tokens=9, length=4, batch_rows=2, seed=0, stage=0, batching=batching)


@pytest.mark.parametrize("settings_", [{}, {"n_steps_per_stage": 7}])
def test_a_run_in_rows_takes_its_steps_and_bills_what_they_hold(
    tmp_path: Path, tinydocs: Stream, settings_: dict[str, Any]
) -> None:
    """Step-matched: exactly the steps that were asked for, the schedule ends at the last, tokens are what they are."""
    store = run_tiny(tmp_path, batching="rows", **settings_)
    track = store.config()["track"]["training"]
    for index in (1, 2):
        found = DataOrder(
            tinydocs,
            {index: 1.0},
            n_tokens=1500,
            length=track["sequence_length"],
            batch_rows=track["batch_rows"],
            seed=0,
            stage=index,
            batching="rows",
            n_rows=settings_["n_steps_per_stage"] * track["batch_rows"] if settings_ else None,
        )
        lines = [line for line in store.steps() if line["stage"] == index]
        n_steps = settings_.get("n_steps_per_stage") or found.n_steps
        schedule = Cosine(peak=track["learning_rate"], warmup_steps=track["warmup_steps"], floor=track["floor"])
        assert lines[-1]["step"] == n_steps - 1
        assert lines[-1]["lr"] == pytest.approx(schedule(n_steps - 1, n_steps))
        n_tokens = int(found.n_targets.sum())
        assert lines[-1]["n_tokens"] == n_tokens
        assert store.ledger()["tokens"][str(index)] == {str(index): n_tokens}
        assert (n_tokens == 1500) == (not settings_)
