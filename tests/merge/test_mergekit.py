"""Our kernels against mergekit's, where it is installed: ``pip install "clbench[mergekit]"``.

Left out, because theirs is known to differ: NuSLERP of nearly parallel task vectors (they use LERP only for exactly
parallel ones), SLERP of a zero tensor (theirs is sin(t pi/2) b), DARE with 1/p (they match the L1 norm).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.merge import kernels as k
from clbench.merge.execute import merge_weights
from clbench.merge.plan import KEEP, RESTORE, Action, MergePlan, Rule, to_mergekit_yaml
from clbench.merge.tensors import open_source
from clbench.method import Weights
from tests.merge.models import everything, gaussian, live

mergekit = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit >= 0.1.5 is an optional extra")

BASE = gaussian(48, 40, seed=0)
MODELS = [BASE + gaussian(48, 40, seed=i, scale=0.3) for i in (1, 2, 3)]
W1, W2, W3 = MODELS


def theirs(method: str, tensors: list[torch.Tensor], **parameters: Any) -> torch.Tensor:
    """Merge with the first tensor as the base, unless there is none."""
    base = None if method == "linear" else 0
    result: torch.Tensor = mergekit.merge_tensors(tensors, method, parameters=parameters, base_index=base)
    return result


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("s", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("drift", [1e-4, 0.02, 0.5, 3.0])
def test_slerp_and_linear(s: float, drift: float) -> None:
    tuned = BASE + drift * (W1 - BASE)
    near(k.slerp(tuned, BASE, s), theirs("slerp", [tuned, BASE], t=s))
    near(k.lerp(tuned, BASE, s), theirs("linear", [tuned, BASE], weight=[1 - s, s], normalize=True))
    near(k.slerp(tuned, -tuned, s), theirs("slerp", [tuned, -tuned], t=s))


def test_nuslerp() -> None:
    near(k.nuslerp(W1, BASE, W2, 0.3), theirs("nuslerp", [BASE, W1, W2], weight=[0.7, 0.3]))


def test_task_arithmetic() -> None:
    got = k.task_arithmetic(W1, BASE, [W2], weights=[0.3, 0.6])
    near(got, theirs("task_arithmetic", [BASE, W1, W2], weight=[0.3, 0.6]))


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(density: float, normalize: bool) -> None:
    weights = [0.5, 1.0, 0.8]
    got = k.ties(W1, BASE, [W2, W3], density=density, weights=weights, normalize=normalize)
    near(got, theirs("ties", [BASE, *MODELS], weight=[*weights], density=density, normalize=normalize))


@pytest.mark.parametrize(("density", "gamma"), [(0.8, 0.05), (0.9, 0.01), (0.5, 0.6)])
def test_breadcrumbs(density: float, gamma: float) -> None:
    got = k.breadcrumbs(W1, BASE, density=density, gamma=gamma)
    near(got, theirs("breadcrumbs", [BASE, W1], weight=[1.0], density=density, gamma=gamma, normalize=False))


def test_model_stock() -> None:
    near(k.model_stock(W1, BASE, [W2, W3]), theirs("model_stock", [BASE, *MODELS]))


def test_dare_has_the_same_mean_and_the_same_l1_norm() -> None:
    torch.manual_seed(0)
    other = theirs("dare_linear", [BASE, W1], weight=[1.0], density=0.5) - BASE
    ours = k.dare(W1, BASE, density=0.5, seed=0, rescale="l1") - BASE
    whole = float((W1 - BASE).abs().sum())
    assert float(other.abs().sum()) == pytest.approx(whole, rel=1e-4)
    assert float(ours.abs().sum()) == pytest.approx(whole, rel=1e-4)


# --- whole models through our export ---


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights, Weights]:
    """Two tiny Llamas of 12 blocks in folders."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("pair")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=12, num_attention_heads=2
    )
    both = []
    for seed, name in enumerate(("tuned", "base")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        both.append(everything(open_source(folder / name)))
    return folder, *both


STRENGTHS = MergePlan(
    KEEP, (Rule("layers.1", Action("slerp", {"s": 0.7})), Rule("layers.11.mlp", RESTORE), Rule("embed_tokens", RESTORE))
)


@pytest.mark.parametrize(
    "plan",
    [STRENGTHS, MergePlan(Action("lerp", {"s": 0.3})), MergePlan(Action("ties", {"density": 0.3, "scale": 0.5}))],
    ids=["slerp", "linear", "ties"],
)
def test_an_exported_plan_gives_the_same_model(pair: tuple[Path, Weights, Weights], plan: MergePlan) -> None:
    folder, tuned, base = pair
    dimensions = {name: tensor.ndim for name, tensor in tuned.items()}
    out = folder / plan.sha256[:8]
    names = {"tuned": str(folder / "tuned"), "base": str(folder / "base")}
    (folder / "merge.yml").write_text(to_mergekit_yaml(plan, dimensions, **names))
    start = "from mergekit.scripts.run_yaml import main; main()"
    command = [sys.executable, "-c", start, str(folder / "merge.yml"), str(out), "--no-copy-tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted, got = merge_weights(plan, live(tuned, base)), everything(open_source(out))
    assert got.keys() == wanted.keys(), json.dumps(sorted(got.keys() ^ wanted.keys()))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-6, msg=name)
