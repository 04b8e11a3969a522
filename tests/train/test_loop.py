"""The loop: seams, gradients, schedules, the bill, and what stops it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.errors import ConfigError, NeedError, NonFiniteError
from clbench.method import Composed, Context, Cosine, Method, Need, StagePlan, Weights
from clbench.methods.replay import Replay
from clbench.methods.sequential import Sequential
from clbench.results.matrix import matrix_of
from clbench.train.data import IGNORE
from clbench.train.ledger import Ledger, forward_flops
from clbench.train.models import load_model
from tests.engine import component, run_tiny
from tests.train.test_data import stage


def test_cosine_is_the_published_formula() -> None:
    peak, warmup, floor, n = 3e-4, 50, 0.1, 1887
    schedule = Cosine(peak=peak, warmup_steps=warmup, floor=floor)
    assert schedule(0, n) == pytest.approx(peak / 50)
    assert schedule(49, n) == pytest.approx(peak)
    assert schedule(50, n) == pytest.approx(peak)
    middle = 50 + (n - 50) / 2
    assert schedule(int(middle), n) == pytest.approx((peak + 0.1 * peak) / 2, rel=2e-3)
    assert schedule(n, n) == pytest.approx(3e-5)


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_cosine_survives_stages_shorter_than_its_warm_up(n_steps: int) -> None:
    schedule = Cosine(peak=1.0, warmup_steps=50, floor=0.0)
    rates = [schedule(step, n_steps) for step in range(n_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] == pytest.approx(1.0)


class Probe(Method):
    """Writes down every call of every seam."""

    needs = frozenset(
        {Need.STAGE_BOUNDARIES, Need.BASE_WEIGHTS, Need.OPTIMIZER_MOMENTS, Need.CURRENT_DATA, Need.PAST_DATA}
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []
        self.tokens = 0

    def begin_stage(self, ctx: Context) -> None:
        self.calls.append(("begin", ctx.stage.index, ctx.step))

    def extra_loss(self, ctx: Context, batch: Any, logits_BTV: torch.Tensor) -> None:
        assert logits_BTV.shape[:2] == batch.targets_BT.shape
        self.tokens += int((batch.targets_BT != IGNORE).sum())

    def edit_gradients(self, ctx: Context) -> None:
        assert all(p.grad is not None for _, p in ctx.parameters())
        self.calls.append(("edit", ctx.stage.index, ctx.step))

    def after_step(self, ctx: Context) -> None:
        moments = ctx.optimizer_moments()
        assert set(moments) == {name for name, _ in ctx.parameters()}
        self.calls.append(("after", ctx.stage.index, ctx.step))

    def end_stage(self, ctx: Context) -> None:
        rows = list(ctx.batches(ctx.stage.index, n_rows=2, name="fisher"))
        assert sum(batch.n_targets for batch in rows) == 128  # type: ignore[attr-defined]
        assert len(list(ctx.batches(0, n_rows=1, name="past"))) == 1
        with pytest.raises(NeedError, match="only this and earlier"):
            list(ctx.batches(ctx.stage.index + 1, n_rows=1, name="future"))
        drift = sum(float((p.detach() - ctx.base_weights()[name]).abs().sum()) for name, p in ctx.parameters())
        assert drift > 0
        ctx.bill("fisher", flops=ctx.forward_flops(128) * 3, n_tokens=128)
        self.calls.append(("end", ctx.stage.index, ctx.step))


def test_every_seam_is_called_in_order_and_billed(tmp_path: Path) -> None:
    probe = Probe()
    store = run_tiny(tmp_path, [probe])
    ledger = store.ledger()
    for index in (1, 2, 3):
        calls = [call for call in probe.calls if call[1] == index]
        n_steps = store.stage_record(index)["n_steps"]
        assert calls[0] == ("begin", index, 0)
        assert calls[-1] == ("end", index, n_steps)
        assert calls[1:-1] == [(what, index, step) for step in range(n_steps) for what in ("edit", "after")]
    assert probe.tokens == 3 * 1500
    assert ledger["tokens"] == {str(k): {str(k): 1500} for k in (1, 2, 3)}
    assert ledger["extra_tokens"] == {"fisher": 384}
    assert ledger["flops"]["fisher"] == pytest.approx(ledger["flops"]["train"] * 384 / 4500)
    assert ledger["flops"]["evaluate"] > 0
    assert ledger["seconds"]["train"] > 0
    assert ledger["peak_memory_bytes"] > 50e6


def test_replay_bills_its_sources_and_the_text_it_keeps(tmp_path: Path) -> None:
    ledger = run_tiny(tmp_path, ["replay:fraction=1/2"]).ledger()
    assert ledger["tokens"]["3"] == {"0": 250, "1": 250, "2": 250, "3": 750}
    assert ledger["stored_bytes"]["replay_data"] > 0
    assert run_tiny(tmp_path, ["sequential"]).ledger()["stored_bytes"]["replay_data"] == 0


def test_same_seed_same_bits_other_seed_other_run(tmp_path: Path) -> None:
    first = run_tiny(tmp_path / "a", seed=0)
    again = run_tiny(tmp_path / "b", seed=0)
    others = [run_tiny(tmp_path / "c", seed=seed) for seed in (1, 2)]
    digests = [store.stage_record(3)["weights_sha256"] for store in (first, again, *others)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert (first.folder / "rows/heldout-03.parquet").read_bytes() == (
        again.folder / "rows/heldout-03.parquet"
    ).read_bytes()


def test_frozen_keeps_the_base_and_is_never_measured_twice(tmp_path: Path) -> None:
    store = run_tiny(tmp_path, ["frozen"])
    records = [store.stage_record(k) for k in store.stages_done()]
    assert len({record["weights_sha256"] for record in records}) == 1
    assert len({record["cells"]["heldout"] for record in records}) == 1
    assert store.ledger()["tokens"] == {}
    values = matrix_of(store).values
    assert (values == values[0]).all()


def test_micro_batches_do_not_change_the_run(tmp_path: Path) -> None:
    whole = matrix_of(run_tiny(tmp_path / "1")).values
    parts = matrix_of(run_tiny(tmp_path / "2", micro_batch_rows=2)).values
    assert parts == pytest.approx(whole, abs=2e-4)
    assert not (parts == whole).all()


class WeightDecayAsLoss(Method):
    """An extra term whose gradient is known: strength times each parameter, per target token."""

    def extra_loss(self, ctx: Context, batch: Any, logits_BTV: torch.Tensor) -> torch.Tensor:
        half = sum(0.5 * (p**2).sum() for _, p in ctx.parameters())
        return 1000.0 * half * (batch.targets_BT != IGNORE).sum()  # type: ignore[no-any-return]


class GradientCheck(Method):
    """Checks that the gradient is dominated by 1000 p, whatever the number of micro-batches."""

    seen = 0

    def edit_gradients(self, ctx: Context) -> None:
        name, parameter = next(iter(ctx.parameters()))
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, 1000 * parameter.detach(), atol=0.5, rtol=1e-2), name
        type(self).seen += 1


@pytest.mark.parametrize("micro", [None, 2])
def test_extra_loss_is_a_mean_over_target_tokens(tmp_path: Path, micro: int | None) -> None:
    GradientCheck.seen = 0
    run_tiny(tmp_path, [WeightDecayAsLoss(), GradientCheck()], micro_batch_rows=micro)
    assert GradientCheck.seen > 3


class Diverges(Method):
    """Poisons the gradient at one step."""

    def edit_gradients(self, ctx: Context) -> None:
        if ctx.stage.index == 2 and ctx.step == 2:
            next(iter(ctx.parameters()))[1].grad.fill_(math.nan)  # type: ignore[union-attr]


def test_non_finite_stops_with_stage_and_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"gradient norm nan \(stage 2, step 2\); lower the learning rate"):
        run_tiny(tmp_path, [Diverges()])
    folder = tmp_path / "tiny/diverges/seed-0"
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert sorted(path.name for path in (folder / "checkpoints").glob("[0-9]*"))[-1] == "002-00000002-0"
    assert not (folder / "stages/02.json").exists()


def test_a_diverging_learning_rate_is_caught(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        run_tiny(tmp_path, learning_rate=1e30, warmup_steps=0)


class Averages(Method):
    """Releases the mean of base and training weights."""

    needs = frozenset({Need.BASE_WEIGHTS})

    def release(self, ctx: Context, weights: Weights) -> Weights:
        return {name: (tensor + ctx.base_weights()[name]) / 2 for name, tensor in weights.items()}


class Doubles(Method):
    """Doubles what the component before released."""

    def release(self, ctx: Context, weights: Weights) -> Weights:
        return {name: 2 * tensor for name, tensor in weights.items()}


def test_release_chains_in_order_and_does_not_touch_training(tmp_path: Path) -> None:
    plain = run_tiny(tmp_path / "plain")
    chained = run_tiny(tmp_path / "chained", [Averages(), Doubles()])
    name = "model.norm.weight"
    base = dict(load_model(_base_folder()).named_parameters())[name]
    for k in (1, 3):
        trained = dict(load_model(plain.folder / f"release/stage-{k:02d}").named_parameters())[name]
        released = dict(load_model(chained.folder / f"release/stage-{k:02d}").named_parameters())[name]
        assert torch.allclose(released, trained + base, atol=1e-6)


def _base_folder() -> Path:
    from clbench.base import open_base, open_stream
    from clbench.run import hardware_for
    from tests.engine import tiny_track

    track = tiny_track()
    stream = open_stream(track)
    return open_base(track, stream, hardware_for(track, stream, "cpu")).model_folder


class Peeks(Method):
    """Mixes in past text without saying so."""

    def plan(self, stage: Any) -> StagePlan:
        return StagePlan(mixture={0: 0.5, stage.index: 0.5})


class FromTheFuture(Replay):
    """Asks for text that has not been written."""

    def plan(self, stage: Any) -> StagePlan:
        return StagePlan(mixture={stage.index: 0.5, stage.index + 1: 0.5})


def test_undeclared_past_and_future_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NeedError, match="past_data"):
        run_tiny(tmp_path, [Peeks()])
    with pytest.raises(ConfigError, match="not happened yet"):
        run_tiny(tmp_path, [FromTheFuture()])


def test_composition_refuses_two_mixtures_and_undeclared_boundaries() -> None:
    two = Composed([component(Replay()).method, component(Replay()).method])
    with pytest.raises(ConfigError, match="both set the mixture"):
        two.plan(stage(2))

    class Silent(Method):
        def begin_stage(self, ctx: Context) -> None:
            pass

    with pytest.raises(NeedError, match="begin_stage"):
        Composed([Silent()])
    assert Composed([Sequential(), Replay()]).plan(stage(1)).mixture == {0: 0.5, 1: 0.5}


@pytest.mark.parametrize("mixture", [{1: 0.5}, {0: -0.5, 1: 1.5}, {0: math.nan, 1: 1.0}])
def test_mixtures_must_be_distributions(mixture: dict[int, float]) -> None:
    class Mixes(Replay):
        def plan(self, stage: Any) -> StagePlan:
            return StagePlan(mixture=mixture)

    with pytest.raises(ConfigError, match="sum to 1"):
        Composed([Mixes()]).plan(stage(1))


def test_needs_guard_every_access(tmp_path: Path) -> None:
    refused: list[str] = []

    class Greedy(Method):
        def after_step(self, ctx: Context) -> None:
            for ask in (
                ctx.base_weights,
                ctx.optimizer_moments,
                ctx.second_model,
                lambda: list(ctx.batches(ctx.stage.index, n_rows=1, name="x")),
                lambda: list(ctx.batches(0, n_rows=1, name="x")),
                lambda: ctx.control_loss([0], n_rows=1),
                lambda: list(ctx.training_batches()),
            ):
                with pytest.raises(NeedError, match="without declaring it") as caught:
                    ask()  # type: ignore[operator]
                refused.append(caught.value.what)

    run_tiny(tmp_path, [Greedy()])
    assert {text.split(" uses ")[1].split()[0] for text in refused} == {need.value for need in Need} - {
        "stage_boundaries"
    }


def test_flops_formula_by_hand() -> None:
    # 10 tokens, 1000 matrix weights, 2 layers, width 8, length 16: 10 (2000 + 2*2*16*8)
    assert forward_flops(n_matmul_parameters=1000, n_layers=2, width=8, n_tokens=10, length=16) == 10 * (2000 + 512)


def test_ledger_round_trip() -> None:
    ledger = Ledger()
    ledger.bill_tokens(1, {0: 5, 1: 7})
    ledger.bill_tokens(1, {1: 1})
    ledger.bill_flops("fisher", 3.0, n_tokens=4)
    ledger.evaluations[0] = {"flops": 2.0, "seconds": 1.0}
    again = Ledger.from_dict(json.loads(json.dumps(ledger.as_dict())))
    assert again == ledger
    assert again.as_dict()["tokens"] == {"1": {"0": 5, "1": 8}}
    assert again.as_dict()["flops"] == {"fisher": 3.0, "evaluate": 2.0}


def test_stage_is_immutable() -> None:
    assert replace(stage(1), n_tokens=5).n_tokens == 5
    with pytest.raises(AttributeError):
        stage(1).n_tokens = 3  # type: ignore[misc]
