"""The benchmark against avalanche: our side against brute force, the whole where avalanche is installed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import ewc_avalanche
from benchmarks.ewc_avalanche import Collapsed
from clbench.methods import _quadratic as quadratic


def test_collapsed_terms_have_the_gradient_of_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    fishers, anchors = torch.rand(3, 7, generator=generator), torch.randn(3, 7, generator=generator)
    fishers[:, 0] = 0.0  # a weight that nothing is known of
    collapsed = Collapsed()
    for fisher, anchor in zip(fishers, anchors, strict=True):
        collapsed.add([fisher], [anchor])
    theta = torch.nn.Parameter(torch.randn(7, generator=generator))
    theta.grad = torch.zeros(7)
    quadratic.pull([theta], collapsed.anchors, 3.0, collapsed.weights)
    expected = sum(3.0 * f * (theta.detach() - a) for f, a in zip(fishers, anchors, strict=True))
    torch.testing.assert_close(theta.grad, expected, rtol=1e-5, atol=1e-6)


def test_without_avalanche_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "avalanche.training.plugins", None)
    monkeypatch.setitem(sys.modules, "avalanche", None)
    assert ewc_avalanche.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install avalanche-lib" in said


def test_both_hold_alike_where_avalanche_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("avalanche", exc_type=ImportError)
    words = ["--past", "2", "--steps", "2", "--repeats", "1", "--hidden", "16", "--json"]
    assert ewc_avalanche.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["tasks"]["2"]["gradients_differ_by"] < 1e-4
    fisher = found["fisher"]
    assert fisher["avalanche_batch_1"] == pytest.approx(fisher["ours"], rel=1e-4)
    assert fisher["factor"] > 4  # squares of a batch's mean are smaller
