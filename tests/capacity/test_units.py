"""Dormant units: planted ones, in sums and in the gated layers of a real model."""

from __future__ import annotations

import math

import pytest
import torch

from clbench.capacity import units
from clbench.capacity.units import Activity


def activity_of(h_NF: torch.Tensor, *, batch: int = 10**9) -> Activity:
    found = Activity(h_NF.shape[1])
    for part in h_NF.split(min(batch, len(h_NF))):
        found.add(part)
    return found


def shares(h_NF: torch.Tensor) -> dict[str, float]:
    return {name: one.value for name, one in units.figures([activity_of(h_NF)]).items()}


def test_every_rule_counts_the_units_that_were_planted_for_it() -> None:
    h = torch.ones(1000, 10)
    h[:, 0] = 0  # dead: counts by every rule
    h[:, 1] = 0
    h[:9, 1] = 90.0  # non-zero on 0.9 % of the samples, but with a mean of 0.81
    h[:, 2] = -0.008  # at about 0.01 of the layer's mean
    h[:, 3] = 0.018
    h[:, 4] = 0.07
    mean = h.abs().mean(0).mean().item()
    assert 0.5 < mean < 1
    found = shares(h)
    assert found["dead"] == pytest.approx(1 / 10)
    assert found["dormant_1pct"] == pytest.approx(2 / 10)
    h[:, 2], h[:, 3], h[:, 4] = 0.0095 * mean, 0.02 * mean, 0.09 * mean
    found = shares(h)
    assert [found[f"redo_{tau}"] for tau in ("0.01", "0.025", "0.1")] == pytest.approx([0.2, 0.3, 0.4])


def test_exactly_one_percent_is_not_less_than_one_percent() -> None:
    h = torch.zeros(200, 2)
    h[:, 0] = 1
    h[:2, 1] = 1
    assert shares(h)["dormant_1pct"] == 0
    h[1, 1] = 0
    assert shares(h)["dormant_1pct"] == 0.5


def test_equal_activity_has_no_dormant_unit_and_scale_changes_nothing() -> None:
    even = shares(torch.full((20, 8), -3.0))
    assert {name: value for name, value in even.items() if value} == {"fau_0.1": 1.0}
    h = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) ** 5
    assert shares(h) == shares(64 * h)


def test_active_entries_are_those_above_a_tenth_of_their_samples_mean() -> None:
    h = torch.tensor([[1.0, 0.04, -1.0], [10.0, 1.2, 1.0], [0.0, 0.0, 0.0]])
    # means 0.68, 4.07 and 0: thresholds 0.068, 0.407 and 0
    assert shares(h)["fau_0.1"] == pytest.approx((2 + 3 + 0) / 9)


def test_batches_add_up_and_layers_are_weighted_by_their_units() -> None:
    h = torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    h[:, :3] = 0
    whole = units.figures([activity_of(h)])
    assert units.figures([activity_of(h, batch=7)]) == whole
    assert units.figures([activity_of(h[:20]) + activity_of(h[20:])]) == whole
    wide = torch.ones(60, 36)
    assert units.figures([activity_of(h), activity_of(wide)])["dead"].value == pytest.approx(3 / 48)
    assert math.isnan(units.figures([])["dead"].value) and units.figures([])["dead"].reason == "no unit was seen"


def test_gated_layers_are_watched_where_gate_and_up_are_multiplied() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    layers = units.output_layers(model)
    assert list(layers) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:6] = 0  # gate * up is zero, whatever the gate says
        model.model.layers[1].mlp.gate_proj.weight[:3] *= 1e-4
    seen: list[Activity] = []
    for layer in layers.values():
        one = Activity(24)
        seen.append(one)
        layer.register_forward_pre_hook(lambda _, args, one=one: one.add(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=torch.arange(48).reshape(3, 16))
    by_layer = [units.figures([one]) for one in seen]
    assert [f["dead"].value for f in by_layer] == [0.25, 0]
    assert [f["redo_0.01"].value for f in by_layer] == [0.25, 0.125]
