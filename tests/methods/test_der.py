"""DER++: a uniform reservoir, both terms against their definitions, experience replay as a case of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch.nn.functional import kl_div

from clbench import seeds
from clbench.errors import ConfigError
from clbench.method import Need
from clbench.methods._logit_buffer import LogitBuffer, told
from clbench.methods.der import Der
from clbench.train.data import IGNORE
from tests.methods.memory_desk import Bigram, Desk, T, Text, V, edited, gradient, noise


def held_after(n_rows: int, capacity: int, root: int, *, skewed: bool = False) -> list[int]:
    """Return which rows a reservoir holds; ``skewed`` lets the newest in too seldom."""
    buffer, places = LogitBuffer(capacity * T), {}
    for row in range(n_rows):
        seed = seeds.derive(root, row)
        place = buffer.offer(T, seed if not skewed else seed % (2 * row + 2))
        if skewed and row >= capacity:
            place = place if seed % 8 else None
        if place is not None:
            places[place] = row
    assert sorted(places) == list(range(min(n_rows, capacity)))
    return list(places.values())


def test_every_row_is_held_equally_often() -> None:
    def p_value(*, skewed: bool) -> float:
        counts = torch.zeros(30)
        for root in range(1500):
            counts[held_after(30, 6, root, skewed=skewed)] += 1
        return float(chisquare(counts.numpy()).pvalue)

    assert counts_of_pairs() > 1e-3
    assert p_value(skewed=False) > 1e-3
    assert p_value(skewed=True) < 1e-12  # the test can fail


def counts_of_pairs() -> float:
    """Return the p-value of all pairs being held together equally often: the sample is one without replacement."""
    pairs = [(a, b) for a in range(6) for b in range(a)]
    counts = dict.fromkeys(pairs, 0)
    for root in range(3000):
        high, low = sorted(held_after(6, 2, root), reverse=True)
        counts[high, low] += 1
    return float(chisquare(list(counts.values())).pvalue)


def der(**options: Any) -> Der:
    return Der(Der.Options(**{"rows": 100, "tokens": 6 * 100, "top_k": V, "stage_0": False, **options}))


def step(method: Der, desk: Desk, text: Text, n_micro: int = 1) -> torch.Tensor:
    """Take a step on a text as the loop does; returns the edited gradient."""
    n = -(-len(text.inputs_BT) // n_micro)
    for first in range(0, len(text.inputs_BT), n):
        part = text.part(first, n)
        method.extra_loss(desk.ctx, part, desk.module(part.inputs_BT).logits)
    z = edited(method, desk, gradient(desk.module, text))
    desk.step += 1
    return z


def move(desk: Desk) -> None:
    with torch.no_grad():
        desk.module.table.add_(noise(9, V, V))  # type: ignore[operator]


def test_with_alpha_0_and_beta_1_it_is_experience_replay() -> None:
    desk, method = Desk(), der(alpha=0.0, beta=1.0)
    first, second, third = (Text.of(i) for i in (1, 2, 3))
    assert torch.equal(step(method, desk, first), gradient(desk.module, first))  # nothing was met before
    move(desk)
    torch.testing.assert_close(
        step(method, desk, second), gradient(desk.module, second) + gradient(desk.module, first), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        step(method, desk, third),
        gradient(desk.module, third) + gradient(desk.module, first, second),
        rtol=1e-5,
        atol=1e-7,
    )
    assert desk.bills == [("replay_loss", 3.0 * n, n) for n in (27, 54)]


@pytest.mark.parametrize("match", ["logits", "kl"])
def test_the_match_is_its_definition_and_vanishes_where_nothing_has_moved(match: Any) -> None:
    desk, method = Desk(), der(alpha=0.7, beta=0.0, match=match)
    old, new = Text.of(1), Text.of(2)
    step(method, desk, old)
    then = desk.module(old.inputs_BT).logits.detach().clone()
    plain = gradient(desk.module, new)
    state = method.state_dict()
    torch.testing.assert_close(step(method, desk, new), plain, rtol=0, atol=2e-3)  # values are kept in fp16
    method.load_state_dict(*state)
    move(desk)
    wanted = old.targets_BT != IGNORE
    z, z_then = desk.module(old.inputs_BT).logits[wanted], then[wanted]
    if match == "kl":
        expected = kl_div(z.log_softmax(-1), z_then.softmax(-1), reduction="sum") / 27
    else:
        centred = [x - x.mean(-1, keepdim=True) for x in (z, z_then)]
        expected = (centred[0] - centred[1]).square().mean(-1).sum() / 27
    (extra,) = torch.autograd.grad(0.7 * expected, desk.module.table)  # type: ignore[arg-type]
    assert extra.norm() > 0.05
    z_gradient = step(method, desk, new)
    torch.testing.assert_close(z_gradient, gradient(desk.module, new) + extra, rtol=0, atol=2e-3)
    assert desk.notes["last_match"] == pytest.approx(expected.item(), rel=5e-3)
    assert {purpose for purpose, _, _ in desk.bills} == {"replay_match"}


def test_the_match_of_logits_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    values, ids = told(noise(0, 2, 3, V), 4, "logits")
    wider = torch.cat([noise(0, 2, 3, V), torch.full((2, 3, 50), -30.0)], dim=-1)
    more, same = told(wider, 4, "logits")
    assert torch.equal(values, more) and torch.equal(ids, same)
    assert values.dtype == torch.float16 and ids.dtype == torch.int32
    torch.testing.assert_close(values.float().mean(-1), torch.zeros(2, 3), rtol=0, atol=1e-3)
    log_p, _ = told(noise(0, 2, 3, V), V, "kl")
    torch.testing.assert_close(log_p.float().exp().sum(-1), torch.ones(2, 3), rtol=0, atol=2e-3)


def test_the_two_terms_are_drawn_independently_and_new_each_step() -> None:
    desk, method = Desk(), der(alpha=0.0, beta=1.0, rows=1)
    step(method, desk, Text.of(1))
    draws = [step(method, desk, Text.of(2)) - gradient(desk.module, Text.of(2)) for _ in range(20)]
    each = [gradient(desk.module, Text.of(1).part(b, 1)) for b in range(5)]
    found = {min(range(5), key=lambda b: float((draw - each[b]).norm())) for draw in draws[:1]}
    assert len(found) == 1 and len({round(draw.norm().item(), 5) for draw in draws}) > 4
    assert all(seeds.derive(0, 3, s, "match") != seeds.derive(0, 3, s, "loss") for s in range(5))


def test_micro_batches_do_not_show_in_the_buffer() -> None:
    states = []
    for n_micro in (1, 4):
        desk, method = Desk(), der(tokens=6 * 7, top_k=3)
        for i in range(6):
            step(method, desk, Text.of(i, 8), n_micro)
        states.append(method.state_dict())
    assert states[0][1] == states[1][1] == {"n_seen": 48}
    for name, tensor in states[0][0].items():
        assert torch.equal(tensor, states[1][0][name]) and len(tensor) == 7
    assert sum(part.nbytes for part in states[0][0].values()) == 7 * T * (8 + 6 * 3)


def test_a_buffer_goes_on_from_its_state_on_a_method_that_has_run() -> None:
    desk, method = Desk(), der(tokens=6 * 7)
    for i in range(3):
        step(method, desk, Text.of(i, 8))
    tensors, values = method.state_dict()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    used, elsewhere = der(tokens=6 * 7), Desk(Bigram(5))
    step(used, elsewhere, Text.of(7, 8))
    used.extra_loss(elsewhere.ctx, Text.of(8), elsewhere.module(Text.of(8).inputs_BT).logits)  # waiting rows go too
    used.load_state_dict(tensors, values)
    other = Desk(step=desk.step)
    for i in range(3, 6):
        assert torch.equal(step(method, desk, Text.of(i, 8)), step(used, other, Text.of(i, 8)))
    assert all(torch.equal(a, used.state_dict()[0][name]) for name, a in method.state_dict()[0].items())


def test_stage_0_counts_as_seen_in_full_with_the_logits_of_the_base() -> None:
    desk = Desk(text={0: Text.of(0, 40)})
    method = der(stage_0=True, tokens=6 * 7)
    method.begin_stage(desk.ctx)
    assert method.buffer.n_seen == 40 and method.buffer.n_held == 7 and desk.module.training
    rows, values, ids = method.buffer.rows(torch.arange(7), desk.device)
    expected = told(desk.module(rows.inputs_RT).logits, V, "logits")
    assert torch.equal(values, expected[0]) and torch.equal(ids, expected[1])
    whole = {tuple(row) for row in desk.text[0].inputs_BT.tolist()}
    assert {tuple(row) for row in rows.inputs_RT.tolist()} <= whole
    assert desk.bills == [("replay_logits", 42.0, 42)]
    method.begin_stage(desk.ctx)  # once
    assert desk.asked == [0]
    assert Need.PAST_DATA in method.needs and Need.PAST_DATA not in der().needs


def test_without_weights_nothing_is_run() -> None:
    desk, method = Desk(), der(alpha=0.0, beta=0.0)
    for _ in range(2):
        assert torch.equal(step(method, desk, Text.of(1)), gradient(desk.module, Text.of(1)))
    assert not desk.bills


@pytest.mark.parametrize(
    "wrong", [{"alpha": -1.0}, {"beta": float("inf")}, {"match": "mse"}, {"tokens": 0}, {"top_k": 0}, {"rows": 0}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        Der(Der.Options(**wrong))
