"""What many rows begin with, computed once: worked examples and instructions before the questions of a set.

``plan`` finds rows with equal beginnings that are worth it; ``Beginning`` holds the keys and values of one, which any
number of rows go on from: in passes that read them and keep nothing, or with a cache that grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

LEAST = 32
"""Tokens from which on a common beginning is looked at."""
OVERHEAD = 64
"""What one more forward pass costs, in positions."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows whose first ``n_shared`` tokens are equal; 0 for those that share nothing."""

    n_shared: int
    rows: list[int]


def plan(tokens: Sequence[NDArray[np.int32]], most: NDArray[np.int64]) -> list[Group]:
    """Group rows so that the fewest positions are computed.

    Args:
        tokens: the token ids of every row.
        most: how many first tokens of each row may be shared.

    Returns:
        Every row in one group; each group with ``n_shared`` above 0 has at least two rows, and the last group is of
        those that share nothing (where there are any).
    """
    _, groups, alone = _best(tokens, most, list(range(len(tokens))), 0)
    groups.sort(key=lambda group: group.rows[0])
    return groups + ([Group(n_shared=0, rows=sorted(alone))] if alone else [])


def _best(
    tokens: Sequence[NDArray[np.int32]], most: NDArray[np.int64], rows: list[int], start: int
) -> tuple[int, list[Group], list[int]]:
    """Return the positions saved, groups, and rows that share nothing, of rows with ``start`` equal first tokens.

    Either all of them share what they have in common, or those that go on alike for ``LEAST`` tokens share more, and
    only the rest that.
    """
    if len(rows) < 2:
        return 0, [], rows
    n_shared = _common(tokens, rows, start, int(most[rows].min()))
    saved = 0
    groups: list[Group] = []
    rest: list[int] = []
    for part in _parts(tokens, rows, n_shared, most):
        more, found, left = _best(tokens, most, part, n_shared)
        saved, groups, rest = saved + more, groups + found, rest + left
    if n_shared >= LEAST and n_shared * (len(rest) - 1) > OVERHEAD:
        saved += n_shared * (len(rest) - 1) - OVERHEAD
        groups, rest = [*groups, Group(n_shared=n_shared, rows=sorted(rest))], []
    together = n_shared * (len(rows) - 1) - OVERHEAD if n_shared >= LEAST else 0
    if together > 0 and together >= saved:
        return together, [Group(n_shared=n_shared, rows=rows)], []
    return saved, groups, rest


def _common(tokens: Sequence[NDArray[np.int32]], rows: Sequence[int], start: int, most: int) -> int:
    """Return how many first tokens rows have in common, ``most`` at most; the first ``start`` are known to be."""
    first, end = tokens[rows[0]], most
    for row in rows[1:]:
        if end <= start:
            return end
        differs = np.flatnonzero(first[start:end] != tokens[row][start:end])
        end = start + int(differs[0]) if len(differs) else end
    return end


def _parts(
    tokens: Sequence[NDArray[np.int32]], rows: Iterable[int], start: int, most: NDArray[np.int64]
) -> list[list[int]]:
    """Return rows by the ``LEAST`` tokens behind their first ``start``; one that may not share as many is alone."""
    found: dict[bytes | int, list[int]] = {}
    for row in rows:
        key = tokens[row][start : start + LEAST].tobytes() if most[row] >= start + LEAST else row
        found.setdefault(key, []).append(row)
    return list(found.values())


# --- keys and values


class Beginning:
    """The keys and values of a beginning, ``[1, heads, n_shared, d]`` a layer, read by any number of rows at once.

    Raises:
        TypeError: the model keeps something else than all keys and values (a sliding window, a state).
    """

    def __init__(self, model: Any, tokens: NDArray[np.int32], device: torch.device) -> None:
        import torch

        base = getattr(model, "base_model", model)
        ids_1T = torch.from_numpy(tokens[None].astype(np.int64)).to(device)
        output = base(input_ids=ids_1T, use_cache=True, return_dict=True)
        self._name = "cache" if "cache" in output else "past_key_values"  # newer models call it the former
        layers = getattr(output[self._name], "layers", None)
        if not layers or {type(layer).__name__ for layer in layers} != {"DynamicLayer"}:
            raise TypeError("this model's cache is not one of keys and values of all positions")
        self.n_shared = len(tokens)
        self._kept = [(layer.keys, layer.values) for layer in layers]

    def arguments(self) -> dict[str, Any]:
        """Return what one forward pass takes to read the beginning."""
        from transformers.cache_utils import Cache

        layer = _reader()
        return {self._name: Cache(layers=[layer(keys, values) for keys, values in self._kept])}

    def grown(self, n_rows: int) -> tuple[str, Any]:
        """Return what a model calls its cache, and one for ``n_rows`` rows that has the beginning and can grow."""
        from transformers.cache_utils import Cache, DynamicLayer

        layers = [DynamicLayer() for _ in self._kept]
        for layer, (keys, values) in zip(layers, self._kept, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys.expand(n_rows, -1, -1, -1), values.expand(n_rows, -1, -1, -1)
        return self._name, Cache(layers=layers)


@cache
def _reader() -> Any:
    """Return a cache layer that hands out kept and new keys and values, and keeps nothing new."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class Reader(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            n = key_states.shape[0]
            return (
                torch.cat([self.keys.expand(n, -1, -1, -1), key_states], dim=-2),
                torch.cat([self.values.expand(n, -1, -1, -1), value_states], dim=-2),
            )

    return Reader
