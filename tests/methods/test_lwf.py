"""Distillation: the divergence against its definition, its gradient against finite differences, teachers that stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import kl_div

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Weights
from clbench.methods._distillation import CHUNK_ELEMENTS_CPU, divergence, divergence_top_k, with_gradient
from clbench.methods._teachers import CACHE_DTYPE, Cached, Running
from clbench.methods.lwf import Lwf
from clbench.results.store import RunStore
from clbench.train.checkpoint import load_latest
from clbench.train.data import IGNORE
from clbench.train.models import copy_weights, weights_of
from tests.engine import run_tiny
from tests.train.test_data import stage

V = 24


def logits(seed: int, *shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def reference(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the divergence as torch writes it."""
    return kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="sum", log_target=False
    )


def top(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    found = (teacher / temperature).log_softmax(-1).topk(k, dim=-1)
    return found.values, found.indices.to(torch.int32)


def finite_difference(function: Any, at: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    gradient = torch.empty_like(at)
    for i in range(at.numel()):
        moved = at.clone().view(-1)
        moved[i] += step
        above = function(moved.view_as(at))
        moved[i] -= 2 * step
        gradient.view(-1)[i] = (above - function(moved.view_as(at))) / (2 * step)
    return gradient


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_divergence_and_gradient_are_those_of_autograd_and_of_finite_differences(temperature: float) -> None:
    student, teacher = logits(0, 5, V).requires_grad_(), logits(1, 5, V)
    value, excess = divergence(student.detach(), teacher.clone(), temperature)
    expected = reference(student, teacher, temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(excess / temperature, gradient, rtol=0, atol=1e-14)
    numeric = finite_difference(lambda z: divergence(z, teacher.clone(), temperature)[0], student.detach())
    torch.testing.assert_close(excess / temperature, numeric, rtol=0, atol=1e-8)


def test_in_hintons_form_the_gradient_is_the_temperature_times_the_difference_of_probabilities() -> None:
    temperature, student, teacher = 3.0, logits(0, 5, V).requires_grad_(), logits(1, 5, V)
    value, excess = divergence(student.detach(), teacher.clone(), temperature)
    loss = temperature**2 * with_gradient(student, value, excess, 1 / temperature)
    loss.backward()  # type: ignore[no-untyped-call]
    p_s, p_t = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, temperature * (p_s - p_t), rtol=0, atol=1e-14)


def test_the_backward_pass_is_for_one_use() -> None:
    student = logits(0, 3, V).requires_grad_()
    loss = with_gradient(student, *divergence(student.detach(), logits(1, 3, V), 2.0), 0.5)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError):  # it would scale its gradient twice
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient() -> None:
    student = logits(0, 40, V, scale=8.0, dtype=torch.float32)
    value, excess = divergence(student, student.clone(), 2.0)
    assert value.item() == 0 and not excess.any()
    log_p, ids = top(student, 5, 2.0)
    value, excess = divergence_top_k(student, log_p, ids, 2.0)
    assert abs(value.item()) < 1e-5 and excess.abs().max() < 1e-6


def test_at_high_temperature_it_is_the_squared_distance_of_centred_logits() -> None:
    # T^2 KL -> ||z_s - z_t||^2 / (2 V) with both centred; research notes 2.4: within 2e-4 at T = 1e3.
    temperature, student, teacher = 1e3, logits(0, 1, V, scale=1.0), logits(1, 1, V, scale=1.0)
    value, _ = divergence(student, teacher.clone(), temperature)
    distance = (student - student.mean()) - (teacher - teacher.mean())
    assert temperature**2 * value.item() == pytest.approx((distance**2).sum().item() / (2 * V), rel=2e-4)


def test_low_precision_is_computed_in_fp32_and_chunks_do_not_show() -> None:
    rows = 2 * CHUNK_ELEMENTS_CPU // 4096 + 1
    student, teacher = (logits(seed, rows, 4096, dtype=torch.bfloat16) for seed in (0, 1))
    value, excess = divergence(student, teacher.clone(), 2.0)
    expected = reference(student.double(), teacher.double(), 2.0).item()
    assert excess.dtype == torch.bfloat16 and value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)
    exact = (student.double() / 2).softmax(-1) - (teacher.double() / 2).softmax(-1)
    assert (excess.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    log_p, ids = top(teacher.double(), 4096, 2.0)
    assert divergence_top_k(student, log_p, ids, 2.0)[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, CACHE_DTYPE])
def test_all_tokens_cached_is_the_whole_divergence(dtype: torch.dtype) -> None:
    student, teacher = logits(0, 6, V), logits(1, 6, V)
    log_p, ids = top(teacher, V, 2.0)
    value, excess = divergence_top_k(student, log_p.to(dtype), ids, 2.0)
    expected, expected_excess = divergence(student, teacher.clone(), 2.0)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-3
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(excess, expected_excess, rtol=0, atol=tolerance)


def test_top_k_and_the_rest_are_the_divergence_of_coarser_distributions() -> None:
    temperature, k, student, teacher = 2.0, 3, logits(0, 4, V), logits(1, 4, V)
    log_p, ids = top(teacher, k, temperature)
    value, excess = divergence_top_k(student, log_p, ids, temperature)
    expected = 0.0
    for n in range(4):  # by hand, token by token
        p, q = (teacher[n] / temperature).softmax(-1), (student[n] / temperature).softmax(-1)
        kept = ids[n].tolist()
        rest = [j for j in range(V) if j not in kept]
        pairs = [(p[j].item(), q[j].item()) for j in kept] + [(p[rest].sum().item(), q[rest].sum().item())]
        expected += sum(a * torch.tensor(a / b).double().log().item() for a, b in pairs)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert value.item() < divergence(student, teacher.clone(), temperature)[0].item()
    numeric = finite_difference(lambda z: divergence_top_k(z, log_p, ids, temperature)[0], student)
    torch.testing.assert_close(excess / temperature, numeric, rtol=0, atol=1e-8)


def test_a_student_that_is_sure_of_the_kept_tokens_has_finite_values() -> None:
    student = torch.zeros(1, V)
    student[0, 0] = 300.0  # the rest is below the smallest float
    value, excess = divergence_top_k(student, *top(torch.zeros(1, V), 2, 1.0), 1.0)
    assert bool(torch.isfinite(value)) and bool(torch.isfinite(excess).all())


class Bigram(torch.nn.Module):
    """Logits of the next token from this one: the smallest thing with the interface of a language model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(logits(seed, V, V, dtype=torch.float32))
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor) -> Any:
        self.seen.append(input_ids)
        return type("Output", (), {"logits": self.table[input_ids]})


@dataclass
class Rows:
    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    source_B: torch.Tensor
    first_row: int = 0


@dataclass
class Desk:
    """What a context gives to lwf, around any model."""

    module: torch.nn.Module
    rows: Rows
    stage: Any = field(default_factory=lambda: stage(2))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    n_steps: int = 1
    bills: list[tuple[float, int]] = field(default_factory=list)
    base: Weights = field(default_factory=dict)

    def second_model(self) -> torch.nn.Module:
        return copy.deepcopy(self.module).eval().requires_grad_(False)

    def base_weights(self) -> Weights:
        return copy_weights(self.base)

    def training_batches(self) -> Iterator[Rows]:
        yield from (part(self.rows, b, 2) for b in range(0, len(self.rows.inputs_BT), 2))

    def forward_flops(self, n_tokens: int) -> float:
        return float(n_tokens)

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        assert purpose == "teacher"
        self.bills.append((flops, n_tokens))


def part(rows: Rows, first: int, n: int) -> Rows:
    pick = slice(first, first + n)
    return Rows(rows.inputs_BT[pick], rows.targets_BT[pick], rows.source_B[pick], first)


def some_rows() -> Rows:
    """Return four rows of six positions, of stages 2, 0, 1 and 2; the last is half as long."""
    inputs = torch.randint(0, V, (4, 6), generator=torch.Generator().manual_seed(5))
    targets = inputs.roll(-1, 1)
    targets[3, 3:] = IGNORE
    return Rows(inputs, targets, torch.tensor([2, 0, 1, 2]))


def desk_after_a_step() -> tuple[Desk, Bigram]:
    """Return a desk whose model will have moved from its teacher, and that teacher."""
    model = Bigram(0)
    return Desk(model, some_rows()), copy.deepcopy(model)


def distil(method: Lwf, desk: Desk, rows: Rows) -> tuple[float, torch.Tensor]:
    """Return the term and its gradient with respect to the model's table."""
    model = cast(Bigram, desk.module)
    model.zero_grad()
    term = method.extra_loss(cast(Context, desk), rows, model(input_ids=rows.inputs_BT).logits)
    if term is None:
        return 0.0, torch.zeros_like(model.table)
    term.backward()  # type: ignore[no-untyped-call]
    assert model.table.grad is not None
    return term.item(), model.table.grad.clone()


def move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(logits(9, *parameter.shape, scale=0.5, dtype=torch.float32))


@pytest.mark.parametrize("top_k", [0, V])
@pytest.mark.parametrize(("on", "counted"), [("all", [0, 1, 2, 3]), ("new", [0, 3]), ("replayed", [1, 2])])
def test_the_term_is_the_divergence_at_targets_of_the_rows_that_count(on: str, counted: list[int], top_k: int) -> None:
    desk, teacher = desk_after_a_step()
    method = Lwf(Lwf.Options(alpha=0.7, temperature=2.0, on=on, top_k=top_k))  # type: ignore[arg-type]
    method.begin_stage(cast(Context, desk))
    move(desk.module)
    rows = desk.rows
    wanted = (rows.targets_BT != IGNORE) & torch.isin(torch.arange(4), torch.tensor(counted))[:, None]
    student_NV = desk.module(rows.inputs_BT).logits[wanted]
    expected = 0.7 * 4 * reference(student_NV, teacher(rows.inputs_BT).logits[wanted].detach(), 2.0)
    (gradient,) = torch.autograd.grad(expected, cast(Bigram, desk.module).table)
    value, found = distil(method, desk, rows)
    tolerance = 1e-5 if not top_k else 5e-3
    assert value == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(found, gradient, rtol=0, atol=tolerance)
    n_passed = int((rows.targets_BT[counted] != IGNORE).sum())  # the cache is made of whole batches
    assert sum(flops for flops, _ in desk.bills) == (n_passed if not top_k else 21)


@pytest.mark.parametrize("top_k", [0, 4])
def test_micro_batches_do_not_show(top_k: int) -> None:
    desk, _ = desk_after_a_step()
    method = Lwf(Lwf.Options(top_k=top_k))
    method.begin_stage(cast(Context, desk))
    move(desk.module)
    value, gradient = distil(method, desk, desk.rows)
    parts = [distil(method, desk, part(desk.rows, first, n)) for first, n in ((0, 1), (1, 2), (3, 1))]
    assert sum(one for one, _ in parts) == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(sum(one for _, one in parts), gradient, rtol=0, atol=1e-5)


def test_the_scalings_differ_by_the_squared_temperature_and_by_the_vocabulary() -> None:
    found = {}
    for scaling in ("none", "hinton", "tic_lm"):
        desk, _ = desk_after_a_step()
        method = Lwf(Lwf.Options(scaling=scaling, temperature=3.0))  # type: ignore[arg-type]
        method.begin_stage(cast(Context, desk))
        move(desk.module)
        found[scaling] = distil(method, desk, desk.rows)
    for scaling, ratio in (("hinton", 9.0), ("tic_lm", 1 / V)):
        assert found[scaling][0] / found["none"][0] == pytest.approx(ratio, rel=1e-6)
        torch.testing.assert_close(found[scaling][1], ratio * found["none"][1])


def test_tic_lm_is_torchs_mean_over_all_elements() -> None:
    desk, teacher = desk_after_a_step()
    method = Lwf(Lwf.Options(scaling="tic_lm"))
    method.begin_stage(cast(Context, desk))
    move(desk.module)
    rows = part(desk.rows, 0, 3)  # whole rows: all positions count
    student, taught = desk.module(rows.inputs_BT).logits / 2, teacher(rows.inputs_BT).logits / 2
    mean = kl_div(student.log_softmax(-1), taught.softmax(-1), reduction="none").mean()  # torch's "mean" so far
    assert distil(method, desk, rows)[0] / 18 == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.parametrize("top_k", [0, V])
def test_the_base_can_be_the_teacher(top_k: int) -> None:
    desk, _ = desk_after_a_step()
    base = Bigram(7)
    desk.base = copy_weights(weights_of(base))
    method = Lwf(Lwf.Options(teacher="base", scaling="none", top_k=top_k))
    before = desk.module.training, copy_weights(weights_of(desk.module))
    method.begin_stage(cast(Context, desk))
    assert desk.module.training == before[0] and torch.equal(before[1]["table"], weights_of(desk.module)["table"])
    wanted = desk.rows.targets_BT != IGNORE
    both = (model(desk.rows.inputs_BT).logits[wanted].detach() for model in (desk.module, base))
    assert distil(method, desk, desk.rows)[0] == pytest.approx(
        reference(*both, 2.0).item(), rel=5e-3 if top_k else 1e-5
    )


@pytest.mark.parametrize("top_k", [0, 4])
def test_the_teacher_stays_while_the_student_moves_and_comes_back_from_its_state(top_k: int) -> None:
    desk, _ = desk_after_a_step()
    method = Lwf(Lwf.Options(top_k=top_k))
    method.begin_stage(cast(Context, desk))
    tensors, values = method.state_dict()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    move(desk.module)
    value, gradient = distil(method, desk, desk.rows)
    assert value > 0
    after = method.state_dict()[0]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    used = Lwf(Lwf.Options(top_k=top_k))  # has had another teacher: nothing of it may stay
    used.begin_stage(cast(Context, Desk(Bigram(3), desk.rows)))
    used.load_state_dict(before, values)
    again, gradient_again = distil(used, desk, desk.rows)
    assert again == value and torch.equal(gradient_again, gradient)
    if top_k:
        n_bytes = sum(tensor.nbytes for name, tensor in before.items() if name != "ends_R")
        assert n_bytes == 6 * top_k * 21  # 6 bytes a token kept and position


def test_needs_are_those_of_the_options_and_the_cache_runs_no_second_model() -> None:
    assert Lwf().needs == {Need.STAGE_BOUNDARIES, Need.SECOND_MODEL}
    assert Lwf(Lwf.Options(top_k=3)).needs == {Need.STAGE_BOUNDARIES, Need.CURRENT_DATA}
    assert Need.BASE_WEIGHTS in Lwf(Lwf.Options(teacher="base")).needs
    assert isinstance(Lwf().teacher, Running) and isinstance(Lwf(Lwf.Options(top_k=3)).teacher, Cached)


@pytest.mark.parametrize(
    "wrong", [{"alpha": -1.0}, {"alpha": float("nan")}, {"temperature": 0.0}, {"temperature": -2.0}, {"top_k": -1}]
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        Lwf(Lwf.Options(**wrong))


def test_distilling_on_replayed_rows_without_replay_is_refused() -> None:
    desk, _ = desk_after_a_step()
    desk.rows.source_B[:] = 2
    method = Lwf(Lwf.Options(on="replayed"))
    method.begin_stage(cast(Context, desk))
    assert distil(method, desk, desk.rows)[0] == 0 and not desk.bills
    with pytest.raises(ConfigError, match="replay"):
        method.end_stage(cast(Context, desk))


def last_weights(store: RunStore) -> Weights:
    """Return the training weights after the last stage."""
    state = load_latest(store.folder / "checkpoints", pytest.fail)
    assert state is not None
    return state.weights


def distance(one: Weights, other: Weights) -> float:
    return sum((one[name] - other[name]).double().pow(2).sum().item() for name in one) ** 0.5


def test_in_a_run_tic_lms_scaling_is_next_to_nothing_and_hintons_is_not(tmp_path: Path) -> None:
    plain, tic_lm, hinton = (
        last_weights(run_tiny(tmp_path / str(i), [method]))
        for i, method in enumerate(["sequential", "lwf:scaling=tic_lm", "lwf"])
    )
    assert distance(plain, tic_lm) < 0.05 * distance(plain, hinton)
    assert distance(plain, tic_lm) > 0


class Stop(Exception):
    pass


class Stopper(Method):
    """Stops a run after some steps, as a kill would."""

    needs = frozenset({Need.STAGE_BOUNDARIES})
    at: tuple[int, int] | None = None

    def edit_gradients(self, ctx: Context) -> None:
        if (ctx.stage.index, ctx.step) == Stopper.at:
            raise Stop


@pytest.mark.parametrize("methods", [["lwf"], ["replay", "lwf:on=replayed,top_k=8"]])
def test_a_stage_that_is_stopped_in_the_middle_ends_with_the_same_bits(
    methods: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_tiny(tmp_path / "whole", [*methods, Stopper()])
    monkeypatch.setattr(Stopper, "at", (2, 2))
    with pytest.raises(Stop):
        run_tiny(tmp_path / "stopped", [*methods, Stopper()])
    monkeypatch.setattr(Stopper, "at", None)
    resumed = run_tiny(tmp_path / "stopped", [*methods, Stopper()])
    assert distance(last_weights(whole), last_weights(resumed)) == 0
    assert whole.ledger()["flops"]["teacher"] == resumed.ledger()["flops"]["teacher"] > 0
