"""A-GEM: the identities of its projection, what its memory holds, and that no deleted document is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clbench import registry
from clbench.contract.lab import Lab
from clbench.errors import ConfigError
from clbench.method import Context
from clbench.methods.agem import Agem
from clbench.stream import identity_of
from clbench.train.data import Shelf, excluded_documents
from tests.methods.memory_desk import Bigram, Desk, Text, V, edited, gradient, loss, noise


def agem(**options: Any) -> Agem:
    return Agem(Agem.Options(**{"rows": 100, **options}))


def test_an_opposed_gradient_is_projected_on_what_the_memory_allows() -> None:
    desk, method = Desk(), agem()
    r = gradient(desk.module, *(desk.text[i] for i in range(3)))  # all rows of stages 0 to 2
    for seed in range(5):
        g = noise(seed, V, V)
        g -= (1 + (g * r).sum() / (r * r).sum()) * r  # now g.r = -|r|^2
        z = edited(method, desk, g)
        torch.testing.assert_close(z, g + r, rtol=1e-5, atol=1e-6)
        assert abs((z * r).sum()) < 1e-6 * z.norm() * r.norm() and z.norm() <= g.norm()
        torch.testing.assert_close(edited(method, desk, z), z, rtol=0, atol=1e-7)  # once is enough
    assert desk.asked == [0, 1, 2]  # read once, and never the present stage


def test_a_gradient_that_agrees_is_left_alone() -> None:
    desk, method = Desk(), agem()
    g = gradient(desk.module, desk.text[0]) + gradient(desk.module, desk.text[3])
    r = gradient(desk.module, *(desk.text[i] for i in range(3)))
    assert (g * r).sum() > 0
    assert torch.equal(edited(method, desk, g), g)
    assert edited(method, desk, -g).norm() < g.norm()


def test_a_step_along_the_projection_does_not_raise_the_loss_on_the_memory() -> None:
    past = [Text.of(i) for i in range(3)]
    r = gradient(Bigram(), *past)
    g = noise(1, V, V) - 3 * r / r.norm()
    found = {}
    for name, direction in (("g", g), ("z", edited(agem(), Desk(), g))):
        model = Bigram()
        before = loss(model, *past).item()
        with torch.no_grad():
            model.table.sub_(1e-3 * direction)
        found[name] = loss(model, *past).item() - before
    assert found["g"] > 1e-4 and abs(found["z"]) < found["g"] / 50  # second order only


def test_micro_rows_do_not_show_and_every_pass_is_billed_once() -> None:
    found = []
    for micro_rows in (1, 4, 100):
        desk = Desk()
        g = -gradient(desk.module, desk.text[1])
        found.append(edited(agem(micro_rows=micro_rows), desk, g))
        n_tokens = 3 * (4 * 6 + 3)
        assert desk.bills == [("memory_gradient", 3.0 * n_tokens, n_tokens)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


def test_rows_are_drawn_anew_each_step_and_again_after_a_resume() -> None:
    def draws(method: Agem, steps: range) -> list[torch.Tensor]:
        desk, seen = Desk(), []
        for desk.step in steps:
            seen.append(edited(method, desk, -gradient(desk.module, *(desk.text[i] for i in range(3)))))
        return seen

    method = agem(rows=2)
    first = draws(method, range(6))
    assert len({z.norm().item() for z in first}) == 6
    resumed = agem(rows=2)
    draws(resumed, range(2))
    resumed.load_state_dict(*method.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first[3:], draws(resumed, range(3, 6)), strict=True))


def test_the_rate_of_violations_and_the_cosine_are_noted_and_survive() -> None:
    desk, method = Desk(), agem()
    method.begin_stage(desk.ctx)
    r = gradient(desk.module, *(desk.text[i] for i in range(3)))
    for sign in (1.0, -1.0, -1.0):
        edited(method, desk, sign * r)
    other = agem()
    other.load_state_dict(*method.state_dict())
    edited(other, desk, -r)
    other.end_stage(desk.ctx)
    assert desk.notes == {"violation_rate": 0.75, "mean_cosine": pytest.approx(-0.5, rel=1e-6)}
    other.begin_stage(desk.ctx)
    assert other.state_dict()[1] == {"n_steps": 0, "n_violated": 0, "cosine_sum": 0.0}


def test_without_a_past_nothing_is_done() -> None:
    desk = Desk()
    desk.stage = Desk().stage.__class__(**{**vars(desk.stage), "index": 1})
    g = noise(0, V, V)
    assert torch.equal(edited(agem(stage_0=False), desk, g), g) and not desk.asked and not desk.bills
    edited(agem(), desk, g)
    assert desk.asked == [0]


@pytest.mark.parametrize("name", ["rows", "memory_rows", "micro_rows"])
def test_too_few_rows_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"agem:{name}=0 is too small; give at least 1"):
        Agem(Agem.Options(**{name: 0}))


class Watching(Agem):
    """Keeps what it remembers of every stage."""

    def end_stage(self, ctx: Context) -> None:
        super().end_stage(ctx)
        self.__dict__.setdefault("kept", []).append(dict(self.memory.of(ctx)))


def test_no_row_of_a_deleted_document_is_remembered(
    clbench_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lab = Lab.build(tmp_path_factory.mktemp("agem"))
    ids = lab.stream.documents("train", 0, ["id"]).column("id").to_pylist()[::4]
    file = lab.folder / "requests.csv"
    file.write_text("\n".join(["id,from_stage", *(f"{one},2" for one in ids)]), encoding="utf-8")
    method = Watching(Agem.Options(memory_rows=10_000))
    method.name = "agem"
    lab.train([method, registry.make_method(f"deletions:file={file}").method], n_stages=2)
    shelf = Shelf(lab.stream, 0, length=lab.length, seed=0, batching="packed")
    touched = shelf.touches(excluded_documents(lab.stream, 0, frozenset(map(identity_of, ids))))
    tokens = lab.stream.tokens("train", 0)
    deleted, whole = set(), shelf.n_targets == lab.length
    for start in shelf.start[touched & whole].tolist():
        deleted.add(tuple(tokens[start : start + lab.length].tolist()))
    before, after = ({tuple(row) for row in kept[0].inputs_RT.tolist()} for kept in method.__dict__["kept"])
    assert len(deleted) > 5 and deleted <= before and not deleted & after
