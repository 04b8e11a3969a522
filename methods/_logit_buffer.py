"""A reservoir of rows with the most probable tokens that the model named when it met them (DER's buffer).

What it leaves to others: what is done with the rows (``der``). Shapes: R rows, T positions, K tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch

from clbench.method import Weights
from clbench.methods._memory import Rows
from clbench.methods._teachers import CACHE_DTYPE

Match = Literal["logits", "kl"]
PARTS = ("inputs_RT", "targets_RT", "values_RTK", "ids_RTK")


def told(logits_BTV: torch.Tensor, top_k: int, match: Match) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and ids of the K most probable tokens, ``[B, T, K]`` each: 6 K bytes a token.

    For ``logits`` the values are logits less their mean over the K tokens, for ``kl`` they are log-probabilities.
    """
    logits_BTV = logits_BTV.detach().float()
    top = logits_BTV.topk(min(top_k, logits_BTV.shape[-1]), dim=-1)
    less = top.values.mean(-1, keepdim=True) if match == "logits" else logits_BTV.logsumexp(-1, keepdim=True)
    return (top.values - less).to(CACHE_DTYPE), top.indices.to(torch.int32)


class LogitBuffer:
    """At any time a uniform sample without replacement of all rows that have passed (Vitter 1985, algorithm R).

    Rows that passed in a step enter when the step is over, so what is drawn in it was met before.

    Args:
        n_tokens: that it holds at most, in whole rows of T; one row at least.
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.n_seen = 0
        """Rows that have passed."""
        self.n_held = 0
        self.parts: Weights = {}
        """As many rows as fit; the first ``n_held`` are filled."""
        self.waiting: list[tuple[int, Weights]] = []
        """(place, row) of this step."""

    def capacity(self, length: int) -> int:
        """Return how many rows of this length fit."""
        return max(1, self.n_tokens // length)

    def offer(self, length: int, seed: int) -> int | None:
        """Let one row pass; returns the place that it gets, or None."""
        n, self.n_seen = self.n_seen, self.n_seen + 1
        place = n if n < self.capacity(length) else seed % (n + 1)
        return place if place < self.capacity(length) else None

    def wait(self, place: int, row: Weights) -> None:
        """Keep a row's parts for the end of the step."""
        self.waiting.append((place, {name: part.cpu().clone() for name, part in row.items()}))

    def commit(self) -> None:
        """Let the waiting rows enter, in the order in which they passed."""
        for place, row in self.waiting:
            if not self.parts:
                n = self.capacity(len(row["inputs_RT"]))
                self.parts = {name: part.new_empty((n, *part.shape)) for name, part in row.items()}
            for name, part in row.items():
                self.parts[name][place] = part
            self.n_held = max(self.n_held, place + 1)
        self.waiting = []

    def rows(self, which: torch.Tensor, device: torch.device) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """Return held rows, and the values and ids beside them."""
        inputs, targets, values, ids = (self.parts[name][which].to(device) for name in PARTS)
        return Rows(inputs.long(), targets.long()), values, ids

    def tensors(self) -> Weights:
        """Return what is held."""
        return {name: part[: self.n_held] for name, part in self.parts.items()}

    def load(self, tensors: Weights, n_seen: int) -> None:
        """Take it back, and nothing besides."""
        self.n_seen, self.n_held, self.parts, self.waiting = n_seen, 0, {}, []
        for place in range(len(tensors["inputs_RT"]) if tensors else 0):
            self.wait(place, {name: part[place] for name, part in tensors.items()})
        self.commit()
