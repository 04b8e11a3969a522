"""What a context gives to methods with a memory, around the smallest language model; shared by their tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy

from clbench import seeds
from clbench.method import Context, Stage
from clbench.train.data import IGNORE
from tests.train.test_data import stage

V, T = 12, 6


class Bigram(torch.nn.Module):
    """Logits of the next token from this one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@dataclass
class Text:
    """Rows of one stage; the last is half as long."""

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    source_B: torch.Tensor
    first_row: int = 0

    @classmethod
    def of(cls, source: int, n_rows: int = 5) -> Text:
        generator = torch.Generator().manual_seed(100 + source)
        inputs = torch.randint(0, V, (n_rows, T), generator=generator)
        targets = torch.randint(0, V, (n_rows, T), generator=generator)
        targets[-1, T // 2 :] = IGNORE
        return cls(inputs, targets, torch.full((n_rows,), source))

    def part(self, first: int, n: int) -> Text:
        pick = slice(first, first + n)
        return Text(self.inputs_BT[pick], self.targets_BT[pick], self.source_B[pick], self.first_row + first)


@dataclass
class Desk:
    """A context."""

    module: torch.nn.Module = field(default_factory=Bigram)
    stage: Stage = field(default_factory=lambda: stage(3))
    text: dict[int, Text] = field(default_factory=lambda: {i: Text.of(i) for i in range(4)})
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    step: int = 0
    bills: list[tuple[str, float, int]] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    """Stages whose text was asked for."""

    @property
    def ctx(self) -> Context:
        return cast(Context, self)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.module.named_parameters()

    def batches(self, stage: int, *, n_rows: int, name: str, rows_per_batch: int = 1) -> Iterator[Text]:
        self.asked.append(stage)
        text, n = self.text[stage], min(n_rows, len(self.text[stage].inputs_BT))
        return (text.part(first, min(rows_per_batch, n - first)) for first in range(0, n, rows_per_batch))

    def seed(self, *names: int | str) -> int:
        return seeds.derive(0, self.stage.index, self.step, *names)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        assert values.dtype == torch.float64
        return values

    def forward_flops(self, n_tokens: int) -> float:
        return float(n_tokens)

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        self.bills.append((purpose, flops, n_tokens))

    def note(self, name: str, value: float) -> None:
        self.notes[name] = value


def loss(model: torch.nn.Module, *texts: Text) -> torch.Tensor:
    """Return the mean loss per target token of all rows together."""
    inputs, targets = (torch.cat([getattr(text, part) for text in texts]) for part in ("inputs_BT", "targets_BT"))
    return cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def gradient(model: torch.nn.Module, *texts: Text) -> torch.Tensor:
    """Return its gradient with respect to the table."""
    return torch.autograd.grad(loss(model, *texts), cast(Bigram, model).table)[0]


def edited(method: Any, desk: Desk, g: torch.Tensor) -> torch.Tensor:
    """Return what a method makes of a gradient."""
    table = cast(Bigram, desk.module).table
    table.grad = g.clone()
    method.edit_gradients(desk.ctx)
    assert table.grad is not None
    return table.grad.clone()


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
