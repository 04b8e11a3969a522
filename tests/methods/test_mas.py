"""MAS against closed forms: 2 and 4/pi of the identity map, the batch's absolute value as the planted bug."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.contract.lab import Lab
from clbench.errors import ConfigError
from clbench.methods.mas import MAS, add_sensitivity, output_TD
from clbench.train.data import IGNORE

D, N = 3, 2000


class Linear(torch.nn.Module):
    """Token i is a Gaussian vector x_i; the logits are W x_i."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x_ND", torch.randn(N, D, generator=torch.Generator().manual_seed(0)))
        self.weight = torch.nn.Parameter(torch.eye(D))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = self.x_ND[input_ids] @ self.weight.T  # type: ignore[index]
        return SimpleNamespace(logits=logits, hidden_states=(None, 3 * logits))


class Bench:
    """A context around a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.device = module, torch.device("cpu")

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self.module.named_parameters()


def batch(ids: list[int], padding: int = 0) -> Any:
    inputs = torch.tensor([ids + [0] * padding])
    targets = torch.tensor([[1] * len(ids) + [IGNORE] * padding])
    return SimpleNamespace(inputs_BT=inputs, targets_BT=targets)


def importance(output: str, rows: list[list[int]]) -> torch.Tensor:
    ctx = Bench(Linear())
    totals = {"weight": torch.zeros(D, D)}
    for ids in rows:
        add_sensitivity(ctx, batch(ids), output, totals)  # type: ignore[arg-type]
    return totals["weight"] / len(rows)


def test_identity_map_of_gaussians_has_2_and_4_over_pi() -> None:
    found = importance("logits", [[i] for i in range(N)])
    expected = torch.full((D, D), 4 / math.pi).fill_diagonal_(2.0)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)
    x = Linear().x_ND  # and exactly, sample by sample
    exact = torch.einsum("ni,nj->nij", 2 * x, x).abs().mean(0)  # type: ignore[arg-type,operator]
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_the_absolute_value_of_a_batch_would_lose_the_off_diagonal() -> None:
    """The planted bug: one 'sequence' of all samples has the batch's mean gradient, 2 I."""
    wrong = importance("logits", [list(range(N))])
    assert float(wrong.diagonal().mean()) == pytest.approx(2, rel=0.05)
    assert float((wrong - wrong.diagonal().diag()).abs().max()) < 0.1


def test_outputs() -> None:
    """Centred logits have mean 0; positions without a target do not count; hidden is the last hidden state."""
    module = Linear()
    raw = output_TD(module, batch([5, 6]), "logits")
    centred = output_TD(module, batch([5, 6], padding=3), "centred_logits")
    torch.testing.assert_close(centred, raw - raw.mean(-1, keepdim=True))
    assert centred.shape == (2, D) and float(centred.detach().mean(-1).abs().max()) < 1e-6
    torch.testing.assert_close(output_TD(module, batch([5, 6]), "hidden"), 3 * raw)


def test_a_common_offset_of_the_logits_changes_centred_importance_not_at_all() -> None:
    module, shifted = Linear(), Linear()
    shifted.x_ND = module.x_ND
    original = shifted.forward
    shifted.forward = lambda input_ids, **kw: SimpleNamespace(logits=original(input_ids).logits + 100.0)  # type: ignore[method-assign,assignment]
    found = []
    for one in (module, shifted):
        totals = {"weight": torch.zeros(D, D)}
        add_sensitivity(Bench(one), batch([1, 2, 3]), "centred_logits", totals)  # type: ignore[arg-type]
        found.append(totals["weight"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def lab(clbench_home: Any, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("mas"))


def run(lab: Lab, **options: Any) -> tuple[MAS, Any]:
    method = MAS(MAS.Options(rows=3, **options))
    method.name = "mas"
    return method, lab.train([method])


def test_mean_over_stages_and_moving_average(lab: Lab) -> None:
    """At strength 0 the weights are the same whatever alpha: the importances are means of the same measurements."""
    (last, trace), (mean, _), (half, _) = (run(lab, strength=0.0, alpha=a) for a in (0.0, None, 0.5))
    assert mean.n_stages == 3  # the base, stages 1 and 2; after the last stage nothing would use it
    assert trace.ledger["extra_tokens"]["fisher"] == 3 * 3 * lab.length
    name = "model.layers.0.mlp.up_proj.weight"
    third = last.importance[name]
    # mean = (a + b + c)/3, half = a/4 + b/4 + c/2: 3 mean - 4 half = -c
    torch.testing.assert_close(4 * half.importance[name] - 3 * mean.importance[name], third, rtol=1e-3, atol=1e-6)


def test_it_holds(lab: Lab) -> None:
    def distance(strength: float) -> float:
        _, trace = run(lab, strength=strength)
        assert trace.ledger["notes"]["3"]["mas"]["penalty"] >= 0
        one, three = trace.releases[1], trace.releases[3]
        return sum(float((one[n] - three[n]).square().sum()) for n in one)

    assert distance(1e3) < 0.7 * distance(0.0)


@pytest.mark.parametrize(
    "options", [{"strength": -1.0}, {"output": "loss"}, {"alpha": 1.5}, {"alpha": -0.1}, {"rows": 0}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="; give "):
        MAS(MAS.Options(**options))
