"""Intruder dimensions: planted ones are found and shrunk, and on a LoRA the result is PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch

from clbench.errors import ConfigError
from clbench.merge import kernels as k
from clbench.merge.execute import merge_weights
from clbench.merge.families import Path as PathFamily
from tests.merge.models import gaussian, live


def orthonormal(n: int, r: int, seed: int) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(gaussian(n, r, seed=seed).double())[0]
    return q


def planted(size: float = 9.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A base of rank 6, and a direction at right angles to all of it that training has added."""
    left, right = orthonormal(20, 7, 1), orthonormal(12, 7, 2)
    values = torch.tensor([8.0, 7, 6, 5, 4, 3], dtype=torch.float64)
    base = (left[:, :6] * values) @ right[:, :6].T
    new = size * torch.outer(left[:, 6], right[:, 6])
    return base, base + new, new


def test_a_planted_direction_is_the_only_intruder_and_shrinks_by_the_factor() -> None:
    base, tuned, new = planted()
    found, (_, values, _) = k.intruders(tuned, base)
    assert found == [0] and float(values[0]) == pytest.approx(9)
    for factor in (0.75, 0.5, 0.0):
        torch.testing.assert_close(k.reduce_intruders(tuned, base, factor=factor), base + factor * new)
    assert torch.equal(k.reduce_intruders(tuned, base, factor=1.0), tuned)  # 1 removes nothing
    assert torch.equal(k.reduce_intruders(tuned, base, top_k=10, epsilon=0.0), tuned)  # nothing is below 0
    small = planted(size=1.0)  # the seventh direction: not among the first three
    assert torch.equal(k.reduce_intruders(small[1], small[0], top_k=3), small[1])
    assert k.intruders(small[1], small[0], top_k=7)[0] == [6]
    assert k.intruders(tuned, torch.zeros_like(base))[0] == list(range(7))  # nothing was there before


def test_a_move_along_the_bases_own_directions_is_no_intruder() -> None:
    base, _, _ = planted()
    assert torch.equal(k.reduce_intruders(1.5 * base, base), 1.5 * base)
    assert torch.equal(k.reduce_intruders(base, base), base)
    vector = gaussian(5, seed=3)
    assert torch.equal(k.reduce_intruders(vector, vector + 1), vector)


def test_a_rank_cuts_the_change_again() -> None:
    base, tuned, new = planted()
    cut = k.reduce_intruders(tuned, base, factor=0.5, rank=1)
    torch.testing.assert_close(cut, base + 0.5 * new)
    assert int(torch.linalg.matrix_rank(cut - base, tol=1e-8)) == 1


@pytest.mark.parametrize("options", [{"factor": 1.5}, {"epsilon": -0.1}, {"top_k": 0}, {"rank": 0}])
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        k.reduce_intruders(*planted()[:2], **options)  # type: ignore[arg-type]


def test_the_result_on_a_lora_is_pefts() -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False), torch.nn.Linear(16, 24, bias=False))
    rank, scale = 3, 2.0
    config = peft.LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=["0", "1"], bias="none")
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(1.5 * gaussian(*parameter.shape, seed=len(name)))
    merged = {n: layer.get_base_layer().weight + layer.get_delta_weight("default")
              for n, layer in enumerate(model.base_model.model)}  # fmt: skip
    reduce_intruder_dimension(model, mitigation_lambda=0.6, logging_sink=None)
    n_found = 0
    for n, layer in enumerate(model.base_model.model):
        base, tuned = plain[n].weight.detach(), merged[n].detach()
        n_found += len(k.intruders(tuned, base)[0])
        ours = k.reduce_intruders(tuned, base, factor=0.6, rank=rank)
        theirs = (layer.get_base_layer().weight + layer.get_delta_weight("intruder_reduced")).detach()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (ours - tuned).abs().max() > 0.01
    assert n_found > 0


def test_the_path_touches_matrices_of_blocks_alone_and_ends_without_intruders() -> None:
    base, tuned, _ = planted()
    weights = {"embed.weight": base, "layers.0.up.weight": base, "layers.0.norm.weight": base[0]}
    moved = {"embed.weight": tuned, "layers.0.up.weight": tuned, "layers.0.norm.weight": tuned[0]}
    sources = live(moved, weights)
    family = PathFamily("intruders", sources)
    assert family.spot(None, 0.0).plan.rules == ()
    end = merge_weights(family.spot(None, 1.0).plan, sources)
    torch.testing.assert_close(end["layers.0.up.weight"], base)
    assert torch.equal(end["embed.weight"], tuned) and torch.equal(end["layers.0.norm.weight"], tuned[0])
