"""Feature alignment: closed forms, signs, invariances, and which of the losses have the teacher as their minimum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from clbench import seeds
from clbench.errors import ConfigError
from clbench.methods import _features
from clbench.methods.proxy_fda import ProxyFda
from clbench.train.data import IGNORE
from tests.methods.memory_desk import Desk, Text

B, D = 12, 7
FDA: dict[str, Any] = {"n_neighbours": 4, "tau": 0.5, "bias": 0.2}


def features(seed: int, n: int = B, width: int = D) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def proxy(student: torch.Tensor, teacher: torch.Tensor, seed: int = 0, **how: Any) -> torch.Tensor:
    options = {**FDA, "n_proxies": 3, "generator": torch.Generator().manual_seed(seed), **how}
    return _features.proxy_fda(student.float(), teacher.float(), **options)


def every_loss(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "point": _features.pointwise(student, teacher),
        "relational": _features.relational(student, teacher),
        "fda": _features.fda(student, teacher, **FDA),
        "proxy_fda": proxy(student, teacher),
    }


def test_a_common_rotation_of_the_students_features_changes_only_the_pointwise_loss() -> None:
    student, teacher = features(0), features(1)
    rotation = torch.linalg.qr(features(2, D, D))[0]
    before, after = every_loss(student, teacher), every_loss(student @ rotation, teacher)
    for kind in ("relational", "fda", "proxy_fda"):
        assert after[kind].item() == pytest.approx(before[kind].item(), rel=1e-6)
    assert abs(after["point"] - before["point"]) > 0.01


def test_the_derivative_to_the_cosine_is_minus_w_over_tau_times_a_sigmoid() -> None:
    for w in (-0.8, -0.1, 0.0, 0.3, 1.0):
        for at in (-0.9, 0.0, 0.4):
            cos = torch.tensor(at, dtype=torch.float64, requires_grad=True)
            value = _features.alignment(cos, torch.tensor(w, dtype=torch.float64), tau=0.5, bias=0.2)
            (slope,) = torch.autograd.grad(value, cos)
            exponent = w * (-at / 0.5 + 0.2)
            assert value.item() == pytest.approx(math.log1p(math.exp(exponent)), rel=1e-12)
            assert slope.item() == pytest.approx(-w / 0.5 / (1 + math.exp(-exponent)), rel=1e-12)
            assert slope.item() * w <= 0  # neighbours are pulled, others pushed


def test_one_pair_has_a_closed_form() -> None:
    angle, now = 0.7, 1.1
    teacher, student = (
        torch.tensor([[1.0, 0.0], [math.cos(a), math.sin(a)]], dtype=torch.float64) for a in (angle, now)
    )
    w = math.cos(angle)
    term = math.log1p(math.exp(w * (-math.cos(now) / 0.5 + 0.2)))
    assert _features.fda(student, 3 * teacher, **{**FDA, "n_neighbours": 1}).item() == pytest.approx(term, rel=1e-12)
    # A convex combination of one neighbour is that neighbour: three more terms of four, all alike.
    assert proxy(student, teacher, n_neighbours=1).item() == pytest.approx(term, rel=1e-6)
    expected = (math.cos(angle) - math.cos(now)) ** 2 / 2
    assert _features.relational(5 * student, teacher).item() == pytest.approx(expected, rel=1e-12)
    moved = 2 * teacher - teacher
    moved[0] += torch.tensor([0.3, 0.4])
    assert _features.pointwise(moved, teacher).item() == pytest.approx(0.5 * 0.5 * 0.25, rel=1e-6)


def test_neighbours_are_the_nearest_and_all_others_may_be() -> None:
    teacher = features(3)
    w, near = _features.neighbour_weights(teacher, 4)
    cosine = _features.cosines(teacher)
    for i in range(B):
        by_hand = sorted((j for j in range(B) if j != i), key=lambda j: -cosine[i, j].item())
        assert near[i].nonzero()[:, 0].tolist() == sorted(by_hand[:4])
        for j in range(B):
            expected = 0.0 if i == j else max(cosine[i, j].item(), 0.0) if near[i, j] else -abs(cosine[i, j].item())
            assert w[i, j].item() == pytest.approx(expected, abs=1e-12)
    for k in (B - 1, B + 5):
        w, near = _features.neighbour_weights(teacher, k)
        assert near.sum() == B * (B - 1) and (w >= 0).all()  # no negatives
        assert torch.isfinite(proxy(features(0), teacher, n_neighbours=k))


def test_the_mean_slope_at_the_teacher_is_that_of_the_notes() -> None:
    # 32 random points in 16 dimensions, K = 6, b = 0: 0.10 at tau 1, 0.61 at tau 0.1 (research notes 5.1).
    for tau, noted in ((1.0, 0.10), (0.1, 0.61)):
        slopes = []
        for seed in range(40):
            x = features(seed, 32, 16)
            w, _ = _features.neighbour_weights(x, 6)
            slope = (w / tau * torch.sigmoid(-w * _features.cosines(x) / tau)).abs()
            slopes.append(slope[_features.others(32, x.device)].mean())
        assert torch.stack(slopes).mean().item() == pytest.approx(noted, abs=0.02)


def test_controls_are_minimal_at_the_teacher_and_fda_is_not() -> None:
    teacher = features(4)
    for kind, loss in every_loss(student := teacher.clone().requires_grad_(), teacher).items():
        (slope,) = torch.autograd.grad(loss, student)
        if kind in ("point", "relational"):
            assert loss.item() == pytest.approx(0, abs=1e-20) and slope.abs().max() < 1e-12
            for seed in range(20):
                assert every_loss(teacher + 0.1 * features(seed), teacher)[kind] > 0
        else:
            assert loss.item() > 0.1 and slope.norm() > 1e-3
            further = every_loss(teacher - 0.1 * slope / slope.norm(), teacher)[kind]
            assert further < loss  # it moves the student away from its teacher


def test_proxies_are_convex_combinations_of_their_own_kind() -> None:
    _, near = _features.neighbour_weights(features(5), 4)
    share = _features.convex(near, 2000, torch.Generator().manual_seed(0))
    assert (share >= 0).all() and not share[(~near)[:, None].expand_as(share)].any()
    torch.testing.assert_close(share.sum(2), torch.ones(B, 2000))
    # Uniform on a simplex of 4 corners: means 1/4, variances 3/80.
    members = share[0][:, near[0]]
    torch.testing.assert_close(members.mean(0), torch.full((4,), 0.25), rtol=0, atol=0.02)
    torch.testing.assert_close(members.var(0), torch.full((4,), 3 / 80), rtol=0.15, atol=0)


def test_proxy_fda_is_the_mean_over_real_pairs_and_proxies_by_loops() -> None:
    student, teacher = features(6).float(), features(7).float()
    w, near = _features.neighbour_weights(teacher, 4)
    apart = _features.others(B, w.device)
    generator = torch.Generator().manual_seed(0)
    shares = [_features.convex(members, 3, generator) for members in (near, apart & ~near)]
    unit, rows = normalize(student, dim=1), []
    for i in range(B):
        pairs = [(unit[i] @ unit[j], w[i, j]) for j in range(B) if j != i]
        for share in shares:
            for a in share[i]:
                mixed = sum(a[j] * unit[j] for j in range(B))
                pairs.append((unit[i] @ mixed / mixed.norm(), sum(a[j] * w[i, j] for j in range(B))))
        terms = [math.log1p(math.exp(float(v) * (0.2 - float(c) / 0.5))) for c, v in pairs]
        rows.append(sum(terms) / (B - 1 + 6))
    assert proxy(student, teacher).item() == pytest.approx(sum(rows) / B, rel=1e-5)


def test_pooling_is_the_mean_over_targets() -> None:
    hidden, wanted = features(0, 6, 4).view(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)]).float()
    torch.testing.assert_close(_features.pooled(hidden, wanted), expected)


def llama_desk() -> Desk:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes))  # type: ignore[arg-type]
    return Desk(model.train(), text={i: Text.of(i, 8) for i in range(3)})


def took(method: ProxyFda, desk: Desk) -> torch.Tensor:
    """Return what one step adds to all gradients, as one vector."""
    for _, p in desk.parameters():
        p.grad = torch.zeros_like(p)
    method.edit_gradients(desk.ctx)
    return torch.cat([p.grad.flatten() for _, p in desk.parameters() if p.grad is not None])


def method_of(**options: Any) -> ProxyFda:
    return ProxyFda(ProxyFda.Options(**{"anchors": 12, "rows": 6, "neighbours": 2, **options}))


def move(desk: Desk) -> None:
    with torch.no_grad():
        for i, (_, p) in enumerate(desk.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


@pytest.mark.parametrize("kind", ["point", "relational", "fda", "proxy_fda"])
def test_the_added_gradient_is_strength_times_that_of_the_loss(kind: Any) -> None:
    desk = llama_desk()
    method = method_of(kind=kind, rows=100, layers="last")
    method.begin_stage(desk.ctx)
    assert set(desk.asked) == {0, 1, 2} and desk.module.training
    at_teacher = took(method, desk)
    assert at_teacher.norm() < 1e-5 if kind in ("point", "relational") else at_teacher.norm() > 1e-2
    assert desk.notes["first_loss"] == pytest.approx(0, abs=1e-9) or kind.endswith("fda")
    move(desk)
    base = desk.module.base_model
    parts = [desk.text[i].part(0, 4) for i in range(3)]
    inputs, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs_BT", "targets_BT"))

    def anchors() -> torch.Tensor:
        hidden = base(input_ids=inputs).last_hidden_state  # type: ignore[operator]
        wanted = (targets != IGNORE).float()[:, :, None]
        return (hidden * wanted).sum(1) / wanted.sum(1)

    student, teacher = anchors() - method.mean_LD[0], method.teacher_LAD[0]
    order = torch.from_numpy(seeds.permutation(12, desk.seed("anchors")))
    how = {"n_neighbours": 2, "tau": 0.1, "bias": 0.0}
    loss = {
        "point": lambda: (student - teacher).square().sum(1).mean() / teacher.square().sum(1).mean() / 2,
        "relational": lambda: _features.relational(student, teacher),
        "fda": lambda: _features.fda(student, teacher, **how),  # type: ignore[arg-type]
        "proxy_fda": lambda: proxy(student[order], teacher[order], desk.seed("proxies"), **how, n_proxies=4),
    }[kind]()
    names = [p for _, p in desk.parameters()]
    found = torch.autograd.grad(loss, names, materialize_grads=True)
    expected = torch.cat([g.flatten() for g in found])
    assert expected.norm() > 1e-2
    torch.testing.assert_close(took(method, desk), expected, rtol=1e-4, atol=1e-6)
    method.options = method_of(kind=kind, rows=100, layers="last", strength=3.0).options
    torch.testing.assert_close(took(method, desk), 3 * expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_stays_comes_back_from_its_state_and_drift_is_noted() -> None:
    desk, method = llama_desk(), method_of()
    method.begin_stage(desk.ctx)
    tensors = {name: tensor.clone() for name, tensor in method.state_dict()[0].items()}
    assert tensors["teacher_LAD"].shape == (2, 12, 16)
    torch.testing.assert_close(tensors["teacher_LAD"].mean(1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    method.end_stage(desk.ctx)
    assert desk.notes["drift_point"] == pytest.approx(0, abs=1e-9)
    move(desk)
    used = method_of()
    used.begin_stage(llama_desk().ctx)
    used.load_state_dict(tensors, {})
    desk.step = 3
    assert torch.equal(took(used, desk), took(method, desk))
    assert all(torch.equal(tensor, method.state_dict()[0][name]) for name, tensor in tensors.items())
    method.end_stage(desk.ctx)
    assert desk.notes["drift_point"] > 0.01 and desk.notes["drift_relational"] > 0.001
    head = 2 * 12 * 16
    assert desk.bills[0] == ("features", 36.0 - head * 36, 36)  # the head is not run


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "mmd"}, {"layers": "all"}, {"tau": 0.0}, {"strength": -1.0}, {"rows": 1}, {"neighbours": 0}],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        ProxyFda(ProxyFda.Options(**wrong))
