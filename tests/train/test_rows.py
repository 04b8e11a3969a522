"""Which rows may be drawn: pools, excluded documents, control rows, and mixtures that change within a stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from clbench import registry
from clbench.base import open_base, open_stream
from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, StagePlan
from clbench.run import hardware_for, plan_stages
from clbench.stream import Stream, identity_of
from clbench.train.data import CONTROL_ROWS, Batching, DataOrder, Draw, Shelf
from clbench.train.rows import RowPlanner
from tests.engine import run_tiny, tiny_track
from tests.train.test_data import table

LENGTH = 16


def order(stream: Stream, mixture: dict[int, float], n_tokens: int = 900, index: int = 2, **more: Any) -> DataOrder:
    draw = Draw(**more)
    return DataOrder(stream, mixture, n_tokens=n_tokens, length=LENGTH, batch_rows=4, seed=0, stage=index, draw=draw)


def first_tokens(found: DataOrder, source: int) -> list[int]:
    """Return the first tokens of the rows from one source, in training order."""
    return [start for s, start, _ in table(found) if s == source]


def test_a_pool_is_what_the_run_drew_first_when_the_stage_was_new(tinydocs: Stream) -> None:
    """Hand-made: the run's own first rows of stage 1, cut where they reach the pool's tokens."""
    when_new = DataOrder(tinydocs, {1: 1.0}, n_tokens=2000, length=LENGTH, batch_rows=4, seed=0, stage=1)
    for n_tokens in (160, 320):
        pooled = order(tinydocs, {1: 0.5, 2: 0.5}, pools={1: n_tokens})
        expected = set(Shelf_first(tinydocs, 1, n_tokens))
        assert set(first_tokens(pooled, 1)) == expected
        assert expected <= {start for _, start, _ in table(when_new)}, "nothing that the run has not drawn"
    assert set(Shelf_first(tinydocs, 1, 160)) < set(Shelf_first(tinydocs, 1, 320))


def Shelf_first(stream: Stream, source: int, n_tokens: int) -> list[int]:
    """Return first tokens of the rows that hold the first ``n_tokens`` targets of a stage's own first pass."""
    in_order = DataOrder(
        stream,
        {source: 1.0},
        n_tokens=n_tokens,
        length=LENGTH,
        batch_rows=4,
        seed=0,
        stage=source,
        draw=Draw(in_sequence=True),
    )
    return first_tokens(in_order, source)


def test_a_pool_smaller_than_its_share_is_repeated_and_the_budget_stays_exact(tinydocs: Stream) -> None:
    found = order(tinydocs, {0: 0.5, 2: 0.5}, n_tokens=901, pools={0: 100})
    assert int(found.n_targets.sum()) == 901
    starts = first_tokens(found, 0)
    assert len(set(starts)) == -(-100 // LENGTH) and len(starts) > 3 * len(set(starts))


@pytest.mark.parametrize("batching", ["packed", "rows"])
def test_no_row_touches_a_token_of_an_excluded_document(tinydocs: Stream, batching: Batching) -> None:
    ids = tinydocs.documents("train", 1, ["id"])["id"].to_pylist()
    gone = frozenset(identity_of(one) for one in ids[::5])
    assert len(gone) >= 3
    whole, found = (
        DataOrder(
            tinydocs,
            {1: 1.0},
            n_tokens=3000,
            length=LENGTH,
            batch_rows=4,
            seed=0,
            stage=1,
            batching=batching,
            draw=Draw(excluded=excluded),
        )
        for excluded in (frozenset[str](), gone)
    )
    offsets = tinydocs.offsets("train", 1)
    forbidden = np.zeros(offsets[-1], dtype=bool)
    for i, one in enumerate(ids):
        if identity_of(one) in gone:
            forbidden[offsets[i] : offsets[i + 1]] = True
    touched = lambda rows: [bool(forbidden[start : start + n + 1].any()) for _, start, n in table(rows)]  # noqa: E731
    assert any(touched(whole)) and not any(touched(found))
    assert int(found.n_targets.sum()) == 3000
    # Everything else stays, in the same order within the first pass: an exclusion moves nothing but what it takes out.
    kept = [row for row, bad in zip(table(whole), touched(whole), strict=True) if not bad]
    assert len(set(kept) & set(table(found))) > 0.5 * len(kept)


def test_a_stage_of_excluded_documents_alone_is_refused(tinydocs: Stream) -> None:
    everything = frozenset(identity_of(one) for one in tinydocs.documents("train", 0, ["id"])["id"].to_pylist())
    with pytest.raises(ConfigError, match="stage 0 has no training text that may be drawn"):
        order(tinydocs, {0: 0.5, 2: 0.5}, excluded=everything)


def test_control_rows_never_train_and_are_no_heldout_text(tinydocs: Stream) -> None:
    shelf = Shelf(tinydocs, 1, length=LENGTH, seed=0, batching="packed")
    control = set(shelf.start[shelf.control()].tolist())
    assert len(control) == min(CONTROL_ROWS, len(shelf.start) // 10) > 10
    passes = order(tinydocs, {1: 1.0}, n_tokens=20_000, keeps_control=True)
    drawn = set(first_tokens(passes, 1))
    assert not drawn & control and drawn | control == set(shelf.start.tolist())
    assert drawn & control == set() and set(first_tokens(order(tinydocs, {1: 1.0}, n_tokens=20_000), 1)) > drawn


class Control(Method):
    """Measures control losses after the first step of every stage."""

    needs = frozenset({Need.CONTROL_DATA})
    found: list[dict[int, float]]

    def after_step(self, ctx: Context) -> None:
        if ctx.step == 0:
            stages = range(ctx.stage.index + 1)
            before = {name: p.detach().clone() for name, p in ctx.parameters()}
            zeros = {name: torch.zeros_like(p) for name, p in ctx.parameters()}
            assert ctx.control_loss([0], n_rows=8, weights=zeros)[0] == pytest.approx(
                np.log(ctx.module.config.vocab_size)
            )  # type: ignore
            assert all(torch.equal(before[name], p) for name, p in ctx.parameters())
            assert ctx.module.training
            self.found.append(ctx.control_loss(list(stages), n_rows=8))
            self.brute = {stage: brute_force(ctx, stage) for stage in stages}


def brute_force(ctx: Any, stage: int) -> float:
    """Return the mean loss over the last chunks of the stage's own order, one row at a time."""
    stream, track = ctx._engine.stream, tiny_track()
    length = track.training.sequence_length
    whole = DataOrder(
        stream,
        {stage: 1.0},
        n_tokens=stream.counts("train", stage)["n_tokens"] - 1,
        length=length,
        batch_rows=1,
        seed=0,
        stage=stage,
        draw=Draw(in_sequence=True),
    )
    n_control = min(CONTROL_ROWS, len(whole.start) // 10)
    rows = table(whole)[len(whole.start) - n_control :][:8]
    nats, n_tokens = 0.0, 0
    with torch.no_grad():
        for _, start, n in rows:
            text = torch.from_numpy(np.asarray(stream.tokens("train", stage))[start : start + n + 1].astype(np.int64))
            logits = ctx.module(input_ids=text[None, :-1]).logits[0]
            nats += cross_entropy(logits, text[1:], reduction="sum").item()
            n_tokens += n
    return nats / n_tokens


def test_control_losses_are_those_of_the_rows_that_were_kept_back(tmp_path: Path) -> None:
    probe = Control()
    probe.found = []
    store = run_tiny(tmp_path, [probe])
    assert probe.found[-1] == pytest.approx(probe.brute, rel=1e-5)
    bill = store.ledger()
    n_stages = len(probe.found)
    assert bill["extra_tokens"]["control"] >= 8 * 16 * n_stages and bill["flops"]["control"] > 0


class Steers(Method):
    """Trains on new text alone, then on old text alone, then half and half."""

    needs = frozenset({Need.PAST_DATA})

    def plan(self, stage: Any) -> StagePlan:
        return StagePlan(mixture={stage.index: 1.0}, review_steps=2)

    def review(self, ctx: Context) -> StagePlan | None:
        new, old = ctx.stage.index, 0
        if ctx.step == 2:
            return StagePlan(mixture={old: 1.0}, pools={old: 100})
        return StagePlan(mixture={old: 0.5, new: 0.5}) if ctx.step == 4 else None


def test_reviews_change_the_mixture_keep_the_budget_and_stand_in_the_ledger(tmp_path: Path) -> None:
    store = run_tiny(tmp_path, [Steers()], batch_rows=4)
    bill = store.ledger()
    length = tiny_track().training.sequence_length
    for stage in ("1", "2"):
        assert sum(bill["tokens"][stage].values()) == 1500
        steps = [entry["step"] for entry in bill["plans"][stage]]
        assert steps == [0, 2, 4]
        start, first, second = bill["plans"][stage]
        assert start == {"step": 0, "mixture": {stage: 1.0}}
        assert first["mixture"] == {"0": 1.0} and first["pools"] == {"0": 100}
        assert second["pools"] == {"0": 100}, "a review without pools leaves them"
        left = 1500 - 4 * 4 * length
        assert bill["tokens"][stage]["0"] == pytest.approx(2 * 4 * length + left / 2, abs=1)


def test_redrawn_rows_go_on_where_each_source_stands(tinydocs: Stream) -> None:
    """After a review nothing is drawn twice before everything was drawn once."""
    track = tiny_track(batch_rows=4, sequence_length=LENGTH, n_tokens_per_stage=1500)
    planner = RowPlanner(stream=tinydocs, training=track.training, seed=0)
    stage = plan_stages(track, tinydocs)[1]
    plan = StagePlan(mixture={2: 1.0}, review_steps=3)
    found = planner.rows(stage, plan)
    before = table(found)
    planner.redraw(stage, replace(plan, mixture={1: 0.5, 2: 0.5}), found, 3)
    planner.redraw(stage, replace(plan, mixture={1: 0.25, 2: 0.75}), found, 6)
    assert table(found)[:12] == before[:12]
    assert int(found.n_targets.sum()) == 1500
    for source in (1, 2):
        starts = first_tokens(found, source)
        assert len(starts) == len(set(starts)), "no row twice"
        assert starts == Shelf_first_pass(tinydocs, source, stage.index)[: len(starts)]
    assert found.drawn(3) == ({2: 12}, {2: 12 * LENGTH})


def Shelf_first_pass(stream: Stream, source: int, index: int) -> list[int]:
    shelf = Shelf(stream, source, length=LENGTH, seed=0, batching="packed")
    key = (stream.sha256, 0, "train", index, source)
    start, _ = shelf.choose(len(shelf.start), key, free=None, skip=0, count_rows=True)
    return start.tolist()  # type: ignore[no-any-return]


def test_a_smaller_pool_of_the_current_stage_repeats_what_was_drawn(tinydocs: Stream) -> None:
    """The reuse ratio's primitive: from the review on new rows up to the pool's end, then the pool again."""
    track = tiny_track(batch_rows=4, sequence_length=LENGTH, n_tokens_per_stage=1600)
    planner = RowPlanner(stream=tinydocs, training=track.training, seed=0)
    stage = plan_stages(track, tinydocs)[0]
    plan = StagePlan(mixture={1: 1.0}, review_steps=5)
    found = planner.rows(stage, plan)
    drawn = first_tokens(found, 1)[:20]
    planner.redraw(stage, replace(plan, pools={1: 30 * LENGTH}), found, 5)
    starts = first_tokens(found, 1)
    assert starts[:20] == drawn and len(set(starts[:30])) == 30
    assert set(starts) == set(starts[:30]) and len(starts) == 100


def test_nothing_of_this_moves_a_run_that_does_not_use_it(tinydocs: Stream) -> None:
    plain = DataOrder(tinydocs, {0: 0.5, 2: 0.5}, n_tokens=900, length=LENGTH, batch_rows=4, seed=0, stage=2)
    assert table(order(tinydocs, {0: 0.5, 2: 0.5})) == table(plain)
    assert sorted(table(order(tinydocs, {2: 1.0}, in_sequence=True))) == sorted(table(order(tinydocs, {2: 1.0})))


def test_the_base_of_the_tiny_track_is_there(tmp_path: Path) -> None:
    """The helpers above read the engine's own stream: it has to be the one that runs use."""
    run_tiny(tmp_path)
    track = tiny_track()
    stream = open_stream(track)
    assert open_base(track, stream, hardware_for(track, stream, "cpu")).weights_sha256
    assert registry.load_track("tinydocs").stream == track.stream
