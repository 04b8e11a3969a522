"""ReDo on planted units, against activities computed by hand, on four architectures and in the real loop."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.capacity.units import dormant
from clbench.contract.lab import Lab
from clbench.errors import ConfigError
from clbench.methods import _units
from clbench.methods.redo import Redo
from clbench.train.data import IGNORE
from tests.methods.test_l2_init import Bench, gpt2, llama, neox, opt

DOWN = "model.layers.0.mlp.down_proj"


class Place(Bench):
    """A context with rows to look at and Adam's moments, all 1."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.moments = {n: (torch.ones_like(p), torch.ones_like(p)) for n, p in self.parameters()}
        self.n_looks, self.flops = 0, 0.0
        ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0))
        targets = ids.clone()
        targets[3, 5:] = IGNORE  # a short row
        self.batch = SimpleNamespace(inputs_BT=ids, targets_BT=targets)

    def batches(self, stage: int, *, n_rows: int, name: str, rows_per_batch: int) -> Iterator[Any]:
        self.n_looks += 1
        yield self.batch

    def optimizer_moments(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return self.moments

    def forward_flops(self, n_tokens: int) -> float:
        return 10.0 * n_tokens

    def bill(self, purpose: str, *, flops: float, n_tokens: int) -> None:
        assert purpose == "units" and n_tokens == 3 * 12 + 5
        self.flops += flops

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.module.eval()(input_ids=self.batch.inputs_BT).logits
        self.module.train()
        return found

    def state(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.parameters()}


def make(**options: Any) -> Redo:
    return Redo(Redo.Options(**{"steps": 1, **options}))


def layer_of(ctx: Place) -> _units.Units:
    return _units.find(ctx)[0]  # type: ignore[arg-type]


def test_the_rule() -> None:
    size = torch.tensor([0.0, 0.1, 1.0, 2.9])  # mean 1
    assert dormant(size, 0.0).tolist() == [0]
    assert dormant(size, 0.1).tolist() == dormant(1e6 * size, 0.1).tolist() == [0, 1]
    assert dormant(torch.full((5,), 0.3), 0.99).tolist() == []
    assert dormant(torch.full((5,), 0.3), 1.0).tolist() == [0, 1, 2, 3, 4]
    assert dormant(torch.zeros(3), 0.0).tolist() == [0, 1, 2]


def test_activity_is_that_of_gate_times_up_at_positions_with_a_target() -> None:
    ctx = Place(llama())
    mlp: Any = ctx.module.get_submodule("model.layers.0.mlp")
    inputs: list[torch.Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    ctx.logits()
    hook.remove()
    h = torch.nn.functional.silu(inputs[0] @ mlp.gate_proj.weight.T) * (inputs[0] @ mlp.up_proj.weight.T)
    rows = torch.cat([h[:3].flatten(0, 1), h[3, :5]])
    found = _units.look(ctx, _units.find(ctx), rows=4, seen=lambda _, h_NF: h_NF.abs().mean(0))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], rows.abs().mean(0), rtol=1e-5, atol=1e-9)
    assert ctx.flops == 10.0 * 41
    assert ctx.module.training


@pytest.mark.parametrize("make_model", [llama, gpt2, opt, neox])
def test_a_dead_unit_and_nothing_else_begins_anew(make_model: Any) -> None:
    """Its incoming weights are spread as new ones are, outgoing ones and moments 0; the function stays to the bit."""
    ctx, dead = Place(make_model()), 17
    units = layer_of(ctx)
    with torch.no_grad():
        for layer in units.incoming.values():
            _units.by_unit(layer, layer.weight, incoming=True)[dead] = 0.0
            if layer.bias is not None:
                layer.bias[dead] = -1e4 if "fc1" not in next(iter(units.incoming)) else -1.0
    before, logits, addresses = ctx.state(), ctx.logits(), [m.data_ptr() for pair in ctx.moments.values() for m in pair]
    redo = make(tau=0.0)
    redo.after_step(ctx)  # type: ignore[arg-type]
    assert redo.n_replaced == ctx.notes["replaced_in_run"] == 1
    assert ctx.notes["dormant_share"] == pytest.approx(1 / sum(len(u.out_FD) for u in _units.find(ctx)))  # type: ignore[arg-type]
    assert torch.equal(ctx.logits(), logits)
    fresh_F = [w[dead] for w in units.in_FD]
    assert all(0.012 < float(row.std()) < 0.03 for row in fresh_F) and not bool(units.out_FD[dead].any())
    if len(fresh_F) == 2:
        assert not torch.equal(*fresh_F)
    # Everything else is as it was, and the moments are the live tensors.
    touched = {f"{name}.{part}" for name in units.incoming for part in ("weight", "bias")} | {f"{units.name}.weight"}
    assert [m.data_ptr() for pair in ctx.moments.values() for m in pair] == addresses
    for name, p in ctx.parameters():
        layer = ctx.module.get_submodule(name.rpartition(".")[0])
        ours = name in touched
        rows = (
            [
                _units.by_unit(layer, t, incoming=name.rpartition(".")[0] in units.incoming)
                for t in (p.detach(), before[name], *ctx.moments[name])
            ]
            if ours
            else [p.detach(), before[name], *ctx.moments[name]]
        )
        others = torch.arange(len(rows[0])) != (dead if ours else -1)
        assert torch.equal(rows[0][others], rows[1][others])
        for moment in rows[2:]:
            assert bool((moment[others] == 1).all()) and (not ours or not bool(moment[dead].any()))


def test_hooks_do_not_stay_even_when_the_pass_fails() -> None:
    ctx = Place(llama())
    ctx.batch.inputs_BT = ctx.batch.inputs_BT + 1000  # no such tokens
    with pytest.raises(IndexError):
        make().after_step(ctx)  # type: ignore[arg-type]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in ctx.module.modules())
    assert ctx.module.training


def test_it_looks_every_so_many_steps() -> None:
    ctx, redo = Place(llama()), make(steps=3, tau=0.0)
    for ctx.step in range(8):
        redo.after_step(ctx)  # type: ignore[arg-type]
    assert ctx.n_looks == 2


@pytest.fixture(scope="module")
def lab(clbench_home: Any, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("redo"))


def test_in_the_loop_it_counts_and_trains_on(lab: Lab) -> None:
    redo = make(steps=2, tau=0.6)
    redo.name = "redo"
    trace = lab.train([redo], n_stages=2)
    notes = trace.ledger["notes"]
    assert redo.n_replaced == notes["2"]["redo"]["replaced_in_run"] > notes["1"]["redo"]["replaced_in_run"] > 0
    assert 0 < notes["2"]["redo"]["dormant_share"] < 1
    n_looks = sum(n // 2 for n in trace.n_steps.values())
    assert trace.ledger["extra_tokens"]["units"] == pytest.approx(8 * lab.length * n_looks, rel=0.05)  # short rows


def test_adapters_and_unknown_layers_are_refused() -> None:
    ctx = Place(llama())
    ctx.module.get_submodule(DOWN).requires_grad_(False)
    with pytest.raises(ConfigError, match="not trained"):
        make().after_step(ctx)  # type: ignore[arg-type]
    ctx = Place(llama())
    mlp: Any = ctx.module.get_submodule("model.layers.0.mlp")
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj)
    with pytest.raises(ConfigError, match="unknown kind"):
        make().after_step(ctx)  # type: ignore[arg-type]
    mlp.fc = mlp.down_proj
    del mlp.down_proj
    with pytest.raises(ConfigError, match="no feed-forward layer"):
        make().after_step(ctx)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"tau": -0.1}, {"steps": 0}, {"rows": 0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="; give "):
        make(**options)
