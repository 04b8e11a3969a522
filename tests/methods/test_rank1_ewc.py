"""Rank-1 EWC: its term against gradients taken by hand, its limits in closed form, and runs of the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from clbench.errors import ConfigError
from clbench.fisher.estimate import rank_one
from clbench.method import Method, Need, Weights
from clbench.methods.rank1_ewc import Rank1Ewc
from clbench.results.store import RunStore
from clbench.track import ModelSpec
from clbench.train.checkpoint import load_latest
from clbench.train.models import make_model
from tests.engine import run_tiny
from tests.fisher.gaussian import Gaussian, Rows, draw
from tests.methods.quadratic_desk import Desk, flat, gradient_of, numbers, positive, put, stage_of, values_of

D = 6


def desk_of(n: int = 32, d: int = D, s2: float = 0.5, shift: torch.Tensor | None = None, seed: int = 0) -> Desk:
    """Return a linear model with n samples, away from its optimum."""
    off = numbers(3, d) if shift is None else shift
    return Desk(draw(n, positive(4, d), off, s2, seed))


def after_stage(desk: Desk, stage: int = 1, **options: Any) -> Rank1Ewc:
    """Return a method at the end of a stage, with one term."""
    n = len(cast(Gaussian, desk.module).x_ND)
    method = Rank1Ewc(Rank1Ewc.Options(**({"rows": n, "rows_per_batch": 4, "base_stage": False} | options)))
    desk.stage = stage_of(stage)
    method.end_stage(desk.ctx)
    return method


def gradients(desk: Desk) -> torch.Tensor:
    return cast(Gaussian, desk.module).gradients()


def term(method: Rank1Ewc) -> tuple[torch.Tensor, float, float]:
    """Return the stored (vector, rho, b)."""
    assert method.terms is not None
    return method.terms.vectors[-1].double(), method.terms.rho_KL[-1, 0].item(), method.terms.b_KL[-1, 0].item()


@pytest.mark.parametrize("cross_fit", [True, False])
def test_the_term_is_that_of_gradients_taken_by_hand(cross_fit: bool) -> None:
    desk = desk_of()
    put(desk, numbers(9, D))
    g = gradients(desk)
    method = after_stage(desk, cross_fit=cross_fit)
    a, b = (g[:16], g[16:]) if cross_fit else (g, g)
    mu = a.mean(0)
    c_star = (b @ mu).square().mean() / mu.norm() ** 4
    u, rho, offset = term(method)
    torch.testing.assert_close(u, mu / mu.norm(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rho * torch.outer(u, u), c_star * torch.outer(mu, mu), rtol=1e-5, atol=1e-6)
    assert offset == pytest.approx((u @ numbers(9, D)).item(), rel=1e-12)
    assert desk.notes["c_star"] == pytest.approx(c_star.item(), rel=1e-5)
    assert desk.notes["rho"] == pytest.approx(rho, rel=1e-12)
    assert desk.notes["mean_norm"] == pytest.approx(mu.norm().item(), rel=1e-6)
    cos = torch.nn.functional.cosine_similarity(mu, numbers(9, D), dim=0).item()
    assert desk.notes["cos_theta"] == pytest.approx(cos, rel=1e-5)
    model = cast(Gaussian, desk.module)
    halves = (
        [list(model.batches(4, 0, 16)), list(model.batches(4, 16, 32))] if cross_fit else [[*model.batches(4)], None]
    )
    reference = rank_one(model, cast(Any, halves[0]), halves[1])
    assert reference.rho == pytest.approx(rho, rel=1e-6) and reference.c_star == pytest.approx(c_star.item(), rel=1e-6)


def test_the_penalty_of_the_paper_and_its_gradient() -> None:
    desk = desk_of()
    g = gradients(desk)
    method = after_stage(desk, strength=3.0, unit="lambda", cross_fit=False)
    mu = g.mean(0)
    c_star, delta = (g @ mu).square().mean() / mu.norm() ** 4, numbers(8, D)
    put(desk, delta)  # the model was at zero
    torch.testing.assert_close(gradient_of(method, desk), 3.0 * c_star * (mu @ delta) * mu, rtol=1e-5, atol=1e-6)
    desk.stage = stage_of(4)
    method.end_stage(desk.ctx)  # the last stage: no further term
    assert desk.notes["penalty"] == pytest.approx((1.5 * c_star * (mu @ delta) ** 2).item(), rel=1e-5)
    assert desk.notes["s_1"] == pytest.approx((mu @ delta / mu.norm()).item(), rel=1e-5)
    assert method.stages == [1]


def test_collinear_gradients_are_of_rank_one() -> None:
    v, factor = numbers(1, D), numbers(2, 40) + 2
    desk = Desk(Gaussian(factor[:, None] * v, torch.ones(40, dtype=torch.float64)))
    g = gradients(desk)  # -factor v
    u, rho, _ = term(after_stage(desk, cross_fit=False))
    torch.testing.assert_close(rho * torch.outer(u, u), g.T @ g / 40, rtol=1e-5, atol=1e-6)
    assert desk.notes["c_star"] == pytest.approx((factor.square().mean() / factor.mean() ** 2).item(), rel=1e-5)


def test_c_star_of_a_linear_gaussian_model_in_closed_form() -> None:
    shift, s2, n = numbers(1, 4), 0.5, 40_000  # S = I: c* = 3 + s2/||D||^2, research notes 1.9
    desk = Desk(draw(n, torch.eye(4, dtype=torch.float64), shift, s2, 0))
    after_stage(desk, rows_per_batch=1000)
    assert desk.notes["c_star"] == pytest.approx(3 + s2 / shift.square().sum().item(), rel=0.05)
    assert not desk.warnings


def test_three_ways_to_estimate_agree() -> None:
    # The micro-batch identity holds in the mean: its sampling error here is about 6 %.
    found = {}
    for estimate, rows in (("per_sequence", 1000), ("directional", 1000), ("micro_batch", 4)):
        found[estimate] = term(after_stage(desk_of(6000), estimate=estimate, rows_per_batch=rows))[1]
    assert found["directional"] == pytest.approx(found["per_sequence"], rel=1e-3)
    assert found["micro_batch"] == pytest.approx(found["per_sequence"], rel=0.2)
    g = gradients(desk_of(6000))
    mu = g[:3000].mean(0)
    of_means = (g[3000:].view(-1, 4, D).mean(1) @ mu).square().mean().item() / (mu @ mu).item()
    assert of_means < 0.7 * found["per_sequence"]  # the mean square of batch means is not it
    assert of_means != pytest.approx(found["per_sequence"], rel=0.2)


def test_noise_is_recognised_by_a_cross_fitted_c_star_below_one_and_only_by_it() -> None:
    def c_star(cross_fit: bool) -> tuple[float, list[str]]:
        desk = Desk(draw(64, torch.eye(2000, dtype=torch.float64), torch.zeros(2000, dtype=torch.float64), 1.0, 0))
        after_stage(desk, cross_fit=cross_fit)
        return desk.notes["c_star"], desk.warnings

    fitted, warnings = c_star(True)
    assert fitted < 0.1 and len(warnings) == 1 and "noise" in warnings[0]
    plain, silent = c_star(False)
    assert plain > 0.9 and not silent


def test_scaling_the_loss_scales_rho_and_not_c_star() -> None:
    x, y = numbers(1, 32, D), numbers(2, 32)
    one, three = (Desk(Gaussian(x, y, s2)) for s2 in (1.0, 1 / 3))
    a, b = (term(after_stage(desk)) for desk in (one, three))
    assert b[1] == pytest.approx(9 * a[1], rel=1e-6)
    assert one.notes["c_star"] == pytest.approx(three.notes["c_star"], rel=1e-6)
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("estimate", ["per_sequence", "directional"])
def test_the_term_does_not_depend_on_how_rows_are_batched(estimate: str) -> None:
    found = [term(after_stage(desk_of(), estimate=estimate, rows_per_batch=b)) for b in (1, 4, 16)]
    for vector, rho, _ in found[1:]:
        torch.testing.assert_close(vector, found[0][0], rtol=1e-6, atol=1e-7)
        assert rho == pytest.approx(found[0][1], rel=1e-6 if estimate == "per_sequence" else 1e-3)


def test_other_scales() -> None:
    g = gradients(desk_of())
    mu, b = g[:16].mean(0), g[16:]
    assert term(after_stage(desk_of(), scale="one"))[1] == pytest.approx((mu @ mu).item(), rel=1e-6)
    assert term(after_stage(desk_of(), scale="trace"))[1] == pytest.approx(b.square().sum(1).mean().item(), rel=1e-6)


def test_the_top_direction_is_the_leading_eigenvector() -> None:
    desk = desk_of()
    g = gradients(desk)
    values, vectors = torch.linalg.eigh(g.T @ g / len(g))
    u, rho, _ = term(after_stage(desk, direction="top", cross_fit=False))
    assert abs((u @ vectors[:, -1]).item()) == pytest.approx(1, abs=1e-6)
    assert rho == pytest.approx(values[-1].item(), rel=1e-5)
    assert (u @ g.mean(0)).item() > 0
    held_out = term(after_stage(desk_of(), direction="top"))
    v = torch.linalg.eigh(g[:16].T @ g[:16])[1][:, -1]
    assert held_out[1] == pytest.approx((g[16:] @ v).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("direction", ["random", "weights"])
def test_controls_have_the_same_rho_along_another_direction(direction: str) -> None:
    desk, usual = desk_of(), desk_of()
    for one in (desk, usual):
        put(one, numbers(9, D))
    u, rho, _ = term(after_stage(desk, direction=direction))
    mean, mean_rho, _ = term(after_stage(usual))
    assert rho == pytest.approx(mean_rho, rel=1e-6) and u.norm().item() == pytest.approx(1, rel=1e-6)
    assert abs((u @ mean).item()) < 0.95
    assert abs(desk.notes["cos_theta"]) == pytest.approx(1, rel=1e-6) or direction == "random"
    again = term(after_stage(desk, direction=direction))[0]
    torch.testing.assert_close(u, again, rtol=0, atol=0)
    if direction == "random":
        assert not torch.equal(term(after_stage(desk, stage=2, direction=direction))[0], u)


def test_rounded_directions_have_their_own_rho_and_offset() -> None:
    desk = desk_of()
    put(desk, 100 * numbers(9, D))
    g = gradients(desk)
    method = after_stage(desk, dtype="bf16", strength=1.0, unit="lambda")
    assert method.terms is not None and method.terms.vectors[0].dtype == torch.bfloat16
    v, rho, _ = term(method)
    mu = g[:16].mean(0)
    assert (v - mu / mu.norm()).abs().max() > 1e-5  # rounding shows
    assert rho * (v @ v).item() == pytest.approx((g[16:] @ (v / v.norm())).square().mean().item(), rel=1e-5)
    assert gradient_of(method, desk).abs().max() < 1e-6 * rho  # nothing at the anchor
    delta = numbers(8, D)
    put(desk, 100 * numbers(9, D) + delta)
    torch.testing.assert_close(gradient_of(method, desk), rho * (v @ delta) * v, rtol=1e-5, atol=1e-6)


def test_the_halves_cosine() -> None:
    desk = desk_of()
    g = gradients(desk)
    after_stage(desk, split_half=True)
    expected = torch.nn.functional.cosine_similarity(g[:16].mean(0), g[16:].mean(0), dim=0).item()
    assert desk.notes["split_half"] == pytest.approx(expected, rel=1e-5)


def test_a_direction_for_each_layer() -> None:
    spec = ModelSpec(hidden_size=8, intermediate_size=16, n_layers=2, n_heads=2, max_length=8)
    model = make_model(spec, vocab_size=16, eos_id=0, seed=0)
    ids = torch.randint(0, 16, (6, 9), generator=torch.Generator().manual_seed(0))

    class Rowed(Desk):
        def batches(self, stage: int, *, n_rows: int, name: str, rows_per_batch: int = 1) -> Any:
            yield from (Rows(i[:, :-1], i[:, 1:]) for i in torch.split(ids, rows_per_batch))

    desk = Rowed(model)
    method = Rank1Ewc(Rank1Ewc.Options(per_layer=True, cross_fit=False, rows=6, rows_per_batch=3, base_stage=False))
    method.end_stage(desk.ctx)
    assert method.terms is not None
    names = list(method.terms.layout.block_names)
    assert names == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    for place, block in enumerate(names):
        own = {n: p for n, p in model.named_parameters() if n.startswith(block)}
        rows = []
        for row in ids:
            logits = model(input_ids=row[None, :-1]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, row[1:])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(own.values()))]))
        g = torch.stack(rows).double()
        u = g.mean(0) / g.mean(0).norm()
        found = torch.cat([method.terms.layout.named(method.terms.vectors[0])[n].flatten() for n in own]).double()
        torch.testing.assert_close(found, u, rtol=1e-3, atol=1e-5)
        assert method.terms.rho_KL[0, place].item() == pytest.approx((g @ u).square().mean().item(), rel=1e-3)


def test_in_steps_one_lambda_keeps_the_ratio_of_the_terms() -> None:
    desk = desk_of()
    method = after_stage(desk, strength=0.2)
    put(desk, numbers(9, D))
    desk.stage = stage_of(2)
    method.end_stage(desk.ctx)
    assert method.terms is not None and method.stages == [1, 2]
    largest = method.terms.rho_KL.max().item()
    assert method._lambda(desk.ctx) * largest * 0.1 == pytest.approx(0.2)  # lr is 0.1
    s = torch.stack([v.double() @ flat(desk) for v in method.terms.vectors]) - method.terms.b_KL[:, 0]
    expected = 0.2 / (0.1 * largest) * sum(method.terms.rho_KL[k, 0] * s[k] * method.terms.vectors[k] for k in (0, 1))
    torch.testing.assert_close(gradient_of(method, desk), cast(torch.Tensor, expected).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apply", ["coupled", "prox"])
def test_state_comes_back_and_replaces_what_was_there(apply: str) -> None:
    desk = desk_of()
    method = after_stage(desk, apply=apply)
    put(desk, numbers(9, D))
    desk.stage = stage_of(2)
    method.end_stage(desk.ctx)
    tensors, values = values_of(method)
    assert values == {"stages": [1, 2]}
    used = after_stage(desk_of(seed=5), apply=apply)
    used.load_state_dict(tensors, values)
    again = values_of(used)
    assert again[1] == values and all(torch.equal(again[0][n], t) for n, t in tensors.items())
    assert again[0].keys() == tensors.keys()
    results = []
    for one in (method, used):
        put(desk, numbers(11, D))
        added = gradient_of(one, desk)
        one.after_step(desk.ctx)
        results.append(torch.cat([added, flat(desk)]))
    assert torch.equal(*results)
    assert torch.equal(results[0][D:], numbers(11, D)) == (apply == "coupled")
    n_bytes = sum(t.nbytes for name, t in tensors.items() if name.endswith("layer.weight"))
    assert n_bytes == 2 * 4 * D  # one vector a past stage, and no anchor


def test_the_bill_is_that_of_the_passes() -> None:
    for options, flops in (({}, 96), ({"estimate": "directional"}, None), ({"cross_fit": False}, 192)):
        desk = desk_of()
        after_stage(desk, **options)
        billed = sum(f for f, _ in desk.bills)
        assert billed == flops if flops else 48 + 32 + 8 <= billed <= 48 + 32 + 80


def test_the_base_counts_as_past_before_the_first_stage_only() -> None:
    desk = desk_of()
    method = Rank1Ewc(Rank1Ewc.Options(rows=32))
    assert Need.PAST_DATA in method.needs and Need.PAST_DATA not in Rank1Ewc(Rank1Ewc.Options(base_stage=False)).needs
    for index in (1, 2):
        desk.stage = stage_of(index)
        method.begin_stage(desk.ctx)
    assert desk.asked == [0] and method.stages == [0] and "base_rho" in desk.notes


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": -1.0},
        {"strength": float("nan")},
        {"unit": "nats"},
        {"direction": "down"},
        {"rows": 0},
        {"scale": "trace", "estimate": "directional"},
        {"split_half": True, "cross_fit": False},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        Rank1Ewc(Rank1Ewc.Options(**wrong))


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="cross_fit=false"):
        after_stage(desk_of(), rows=4, rows_per_batch=4)
    with pytest.raises(ConfigError, match="rows_per_batch"):
        after_stage(desk_of(), rows=8, rows_per_batch=4, estimate="micro_batch")


def last_weights(store: RunStore) -> Weights:
    state = load_latest(store.folder / "checkpoints", pytest.fail)
    assert state is not None
    return state.weights


def test_in_runs(tmp_path: Path) -> None:
    rank_one_options: dict[str, Any] = {"rows": 8, "rows_per_batch": 4}
    plain = last_weights(run_tiny(tmp_path / "plain"))
    off = last_weights(run_tiny(tmp_path / "off", [Rank1Ewc(Rank1Ewc.Options(strength=0.0, **rank_one_options))]))
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    methods: list[str | Method] = [
        "replay:fraction=1/2",
        "lwf:on=replayed",
        Rank1Ewc(Rank1Ewc.Options(strength=0.5, **rank_one_options)),
    ]
    store = run_tiny(tmp_path / "all", methods)
    ledger = json.loads((store.folder / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["flops"]["fisher"] > 0 and ledger["flops"]["teacher"] > 0
    notes = ledger["notes"]
    assert {"rho", "c_star", "base_rho", "penalty"} <= {
        key for stage in notes.values() for m in stage.values() for key in m
    }
    moved = last_weights(store)
    assert any(not torch.equal(plain[name], moved[name]) for name in plain)
