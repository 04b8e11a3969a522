"""Gradients of losses on several periods: their lengths and angles without the noise's share, and first-order changes.

A mean over few sequences is mostly noise: its squared length is too large by the noise's, and a cosine of two such
means too small. So every period's sequences are put in two halves, the same documents always in the same half, and
products are taken *across* halves, G_ij = (a_i . b_j + b_i . a_j) / 2, in which noise is independent. G is unbiased
for the products of the true gradients, also for i = j and where periods share documents. An estimated squared length
may be negative: then the length is not told from zero and cosines are undefined, not 0.

Gradients of all periods and halves are held exactly where they fit ``memory_bytes``, else as count sketches
(``clbench.fisher.diagnostic``), whose products err by about |a| |b| / sqrt(65,536), 0.4 %.

First order: between two checkpoints, L(theta + delta) - L(theta) = g . delta + rest; the rest is what curvature adds.
All losses are means over sequences of the mean over a sequence's targets, in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.capacity.figure import Figure, figure, undefined

if TYPE_CHECKING:
    import torch

    from clbench.fisher.estimate import Batch

Floats = NDArray[np.float64]
MEMORY_BYTES = 1 << 30
SKETCH_DIMS = 1 << 16
PIECE = 1 << 22
"""Numbers that are in float64 at a time."""
HALVES = ("a", "b")


@dataclass
class Halves:
    """Mean gradients of both halves of several texts, exact or sketched."""

    sketch_dims: int | None
    seed: int = 0
    kept: dict[tuple[Any, str], list[torch.Tensor]] = field(default_factory=dict)
    norms: dict[tuple[Any, str], float] = field(default_factory=dict)

    @classmethod
    def for_model(cls, model: Any, n_texts: int, *, memory_bytes: int = MEMORY_BYTES, seed: int = 0) -> Halves:
        """Return empty ones: exact where the gradients of all texts fit in memory."""
        n_bytes = 4 * sum(p.numel() for p in model.parameters()) * len(HALVES) * n_texts
        return cls(None if n_bytes <= memory_bytes else SKETCH_DIMS, seed)

    def add(self, text: Any, half: str, gradient: Mapping[str, torch.Tensor]) -> None:
        """Keep the mean gradient of one half of a text."""
        import torch

        self.norms[text, half] = math.sqrt(sum(float(g.square().sum(dtype=torch.float64)) for g in gradient.values()))
        if self.sketch_dims is None:
            self.kept[text, half] = [g.detach().float().cpu().flatten() for g in gradient.values()]
        else:
            self.kept[text, half] = [self._sketched(gradient, self.sketch_dims)]

    def _sketched(self, gradient: Mapping[str, torch.Tensor], dims: int) -> torch.Tensor:
        import torch

        from clbench.fisher.diagnostic import sketch_of

        total = torch.zeros(dims, dtype=torch.float64)
        for name, g in gradient.items():
            bins, signs = sketch_of(g.numel(), dims, self.seed, name)
            total.index_add_(0, bins, g.detach().cpu().flatten().double() * signs)
        return total

    def dot(self, text: Any, half: str, other: Any, other_half: str) -> float:
        """Return the product of two kept gradients, in float64."""
        pairs = zip(self.kept[text, half], self.kept[other, other_half], strict=True)
        return math.fsum(_dot(one, two) for one, two in pairs)

    def gram(self, texts: Sequence[Any]) -> Floats:
        """Return the unbiased products of the texts' gradients, ``[T, T]``, symmetric."""
        found = np.zeros((len(texts), len(texts)))
        for i, one in enumerate(texts):
            for j, two in enumerate(texts[: i + 1]):
                found[i, j] = found[j, i] = (self.dot(one, "a", two, "b") + self.dot(one, "b", two, "a")) / 2
        return found


def _dot(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return a product in float64, piece by piece."""
    import torch

    pieces = zip(torch.split(one, PIECE), torch.split(two, PIECE), strict=True)
    return math.fsum(float(a.double() @ b.double()) for a, b in pieces)


def length(squared: float) -> Figure:
    """Return a gradient's length from its unbiased squared length."""
    return figure(math.sqrt(squared) if squared > 0 else math.nan, "the gradient is not told from noise")


def cosine(gram_TT: Floats, i: int, j: int) -> Figure:
    """Return the cosine of two texts' gradients from unbiased products; by noise it may be beyond 1."""
    bottom = gram_TT[i, i] * gram_TT[j, j]
    if not (gram_TT[i, i] > 0 and bottom > 0):
        return undefined("a gradient is not told from noise")
    return Figure(float(gram_TT[i, j] / math.sqrt(bottom)))


def interference(gram_TT: Floats, old: Sequence[int], new: int) -> Figure:
    """Return -cos(grad J, grad L_new), J the mean loss of the old texts.

    Positive: a descent step on the new text raises the loss on the old ones, to first order (the normalised weight term
    of CLEMC's author).
    """
    if not len(old):
        return undefined("there is no older text")
    rows = np.asarray(old)
    squared_old, squared_new = float(gram_TT[np.ix_(rows, rows)].mean()), float(gram_TT[new, new])
    if not (squared_old > 0 and squared_new > 0):
        return undefined("a gradient is not told from noise")
    return Figure(-float(gram_TT[rows, new].mean()) / math.sqrt(squared_old * squared_new))


# --- passes through a model


def mean_gradient(model: Any, batches: Iterable[Batch]) -> tuple[dict[str, torch.Tensor], Floats]:
    """Return the mean gradient over sequences, and of each sequence ||d loss / d input embeddings||_F.

    All parameters count; one backward pass a batch. The lengths are of each sequence's own loss and cost nothing more.
    """
    from clbench.fisher.estimate import mean_gradient as of_weights

    names = [name for name, _ in model.named_parameters()]
    with _embedding_gradients(model) as lengths:
        gradient, _ = of_weights(model, batches, names=names)
    return gradient, np.concatenate([np.zeros(0), *lengths])


@contextmanager
def _embedding_gradients(model: Any) -> Iterator[list[Floats]]:
    """Yield a list that gets, in every backward pass, the lengths of the rows' gradients at the input embeddings."""
    found: list[Floats] = []

    def note(gradient_BTD: torch.Tensor) -> None:
        found.append(gradient_BTD.detach().flatten(1).double().norm(dim=1).cpu().numpy())

    def watch(module: Any, args: Any, output_BTD: torch.Tensor) -> None:
        if output_BTD.requires_grad:
            output_BTD.register_hook(note)  # type: ignore[no-untyped-call]

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        yield found
    finally:
        handle.remove()


@dataclass(frozen=True)
class Increment:
    """How the loss of single sequences changed between two checkpoints, and how much of it is of first order; nats."""

    change_B: Floats
    first_order_B: Floats

    @property
    def change_nats(self) -> float:
        """Mean change of the loss."""
        return float(self.change_B.mean())

    @property
    def first_order_nats(self) -> float:
        """Mean of g . (theta_after - theta_before), g at theta_before."""
        return float(self.first_order_B.mean())

    @property
    def curvature_nats(self) -> float:
        """What is left: change - first order, exactly."""
        return self.change_nats - self.first_order_nats


def increment(
    before: Any,
    after: Any,
    batches: Iterable[Batch],
    *,
    step: Mapping[str, torch.Tensor] | None = None,
) -> Increment:
    """Measure one text's increment between two models of the same parameters.

    Args:
        before: where the gradient is taken; one backward pass.
        after: two forward passes in all, one of each model.
        batches: the text.
        step: parameters after less before, where it is at hand already.
    """
    import torch

    from clbench.fisher.gradients import dot_each_sequence, sequence_losses, undisturbed

    delta = step_between(before, after) if step is None else dict(step)
    change: list[Floats] = []
    first: list[Floats] = []
    for batch in batches:
        loss_B, dots_B = dot_each_sequence(before, batch.inputs_BT, batch.targets_BT, delta)
        with undisturbed(after), torch.no_grad():
            later_B = sequence_losses(after, batch.inputs_BT, batch.targets_BT)
        change.append((later_B - loss_B).cpu().numpy())
        first.append(dots_B.cpu().numpy())
    return Increment(np.concatenate([np.zeros(0), *change]), np.concatenate([np.zeros(0), *first]))


def step_between(before: Any, after: Any) -> dict[str, torch.Tensor]:
    """Return theta_after - theta_before of all parameters."""
    there = dict(after.named_parameters())
    return {name: there[name].detach().to(p.device) - p.detach() for name, p in before.named_parameters()}
