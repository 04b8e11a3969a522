"""Rows of text kept at hand, and gradients of passes over them beside the step's own.

What it leaves to others: what the gradients are for (``agem``, ``gem``, ``der``, ``proxy_fda``). The passes run in the
model's present mode and in the parameters' own precision, without autocast. Shapes: R rows, B of them in one pass,
T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from clbench import seeds
from clbench.errors import ConfigError
from clbench.method import Context
from clbench.train.data import IGNORE


@dataclass(frozen=True)
class Rows:
    """Rows of text: int64, shape ``[R, T]``."""

    inputs_RT: torch.Tensor
    targets_RT: torch.Tensor

    @classmethod
    def joined(cls, several: Sequence[Rows]) -> Rows:
        """Return all rows of several sets, one set after another."""
        return cls(torch.cat([rows.inputs_RT for rows in several]), torch.cat([rows.targets_RT for rows in several]))

    def __len__(self) -> int:
        return len(self.inputs_RT)

    def __getitem__(self, which: slice | torch.Tensor) -> Rows:
        return Rows(self.inputs_RT[which], self.targets_RT[which])

    @property
    def n_targets(self) -> int:
        """Target tokens."""
        return int((self.targets_RT != IGNORE).sum())

    def passes(self, micro_rows: int) -> Iterator[slice]:
        """Yield slices of at most ``micro_rows`` rows."""
        return (slice(first, first + micro_rows) for first in range(0, len(self), micro_rows))


def read(ctx: Context, stage: int, n_rows: int, name: str) -> Rows:
    """Return up to ``n_rows`` rows of a stage: without documents that are excluded from this stage on."""
    found = ctx.batches(stage, n_rows=n_rows, name=name, rows_per_batch=64)
    return Rows.joined([Rows(batch.inputs_BT, batch.targets_BT) for batch in found])


def some(n: int, n_wanted: int, seed: int) -> torch.Tensor:
    """Return places of ``n_wanted`` rows out of ``n``, without replacement, or of all that there are."""
    return torch.from_numpy(seeds.permutation(n, seed)[:n_wanted])


class Memory:
    """Rows of every past stage, drawn anew when a stage first asks for them.

    They are a pure function of run and stage, so no text is saved: a resumed run draws the same, and documents
    that are excluded from some stage on are in no later memory.

    Args:
        n_rows: of each stage.
        stage_0: whether the base's own stage is among them.
    """

    def __init__(self, n_rows: int, *, stage_0: bool) -> None:
        self.n_rows, self.first = n_rows, 0 if stage_0 else 1
        self.forget()

    def forget(self) -> None:
        """Drop the rows."""
        self._stage, self._rows = 0, dict[int, Rows]()

    def of(self, ctx: Context) -> dict[int, Rows]:
        """Return past stage -> its rows."""
        now = ctx.stage.index
        if self._stage != now:
            self._stage = now
            self._rows = {past: read(ctx, past, self.n_rows, "memory") for past in range(self.first, now)}
        return self._rows


def reached(ctx: Context) -> list[torch.nn.Parameter]:
    """Return the trained parameters that have a gradient."""
    return [p for _, p in ctx.parameters() if p.grad is not None]


def local_gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return their gradients, to be edited in place."""
    return [p.grad for p in parameters if p.grad is not None]


def add(gradients: Sequence[torch.Tensor], others: Sequence[torch.Tensor], factor: float) -> None:
    """Add ``factor`` times other gradients, in place."""
    for gradient, other in zip(gradients, others, strict=True):
        gradient.add_(other, alpha=factor)


Term = Callable[[slice, torch.Tensor], torch.Tensor]
"""(rows of a pass, its logits ``[B, T, V]``) -> a term summed over the pass's target tokens."""


def nll_of(rows: Rows) -> Term:
    """Return the negative log-likelihood of the rows' targets as a term, in nats."""

    def term(which: slice, logits_BTV: torch.Tensor) -> torch.Tensor:
        targets = rows.targets_RT[which].flatten()
        return cross_entropy(logits_BTV.float().flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")

    return term


def gradient(
    ctx: Context,
    parameters: Sequence[torch.nn.Parameter],
    rows: Rows,
    *,
    micro_rows: int,
    purpose: str,
    term: Term | None = None,
) -> tuple[list[torch.Tensor], float]:
    """Return the gradient of a term per target token (the loss, where none is given), and its value.

    ``parameter.grad`` is not touched. Passes of at most ``micro_rows`` rows are billed under ``purpose``.
    """
    term, n_targets, value = term or nll_of(rows), rows.n_targets, 0.0
    total: list[torch.Tensor] = []
    for which in rows.passes(micro_rows):
        part = term(which, ctx.module(input_ids=rows.inputs_RT[which]).logits) / n_targets
        found = torch.autograd.grad(part, list(parameters), materialize_grads=True)
        if total:
            add(total, found, 1.0)
        else:
            total = list(found)
        value += part.item()
    ctx.bill(purpose, flops=3 * ctx.forward_flops(n_targets), n_tokens=n_targets)
    return total, value


def at_least(method: str, least: int, **options: int) -> None:
    """Raise ConfigError for a whole number that is too small."""
    for name, value in options.items():
        if value < least:
            raise ConfigError(f"{method}:{name}={value} is too small", mend=f"give at least {least}")
