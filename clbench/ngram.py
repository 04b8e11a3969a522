"""A small n-gram language model over token ids: how well one period's text predicts another's, in seconds.

Interpolated Witten-Bell (Witten and Bell 1991; Chen and Goodman 1998, §2.6). With ``h`` the last k tokens, ``h'`` the
last k - 1, ``c`` counts and ``T(h)`` the number of different tokens seen after ``h``:

    P_k(w | h) = (c(h w) + T(h) P_{k-1}(w | h')) / (c(h) + T(h)),    P_{-1}(w) = 1 / V

and ``P_k = P_{k-1}`` after an ``h`` that was never seen. It has no constant to tune and sums to one after any context.
It is a yardstick for streams, not a model that anybody should use: which text it is fitted on is left to others.

Tables hold sorted integers. An n-gram's key is ``(number of its context) * V + token``, and its place in the table is
its number as the context of the next level, so any vocabulary and order fit in 64 bits and nothing loops over tokens.

Symbols: n targets, V vocabulary, k context tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """Documents to count or to predict, one after another. Contexts never reach into the document before."""

    previous: Integers
    """The token before each target; the end-of-text token before the first of a document. Shape ``[n]``."""
    targets: Integers
    """Shape ``[n]``."""
    depths: Integers
    """How many tokens of context each target has, the end of text that opens its document counted; ``[n]``."""

    @classmethod
    def of(cls, documents: Iterable[NDArray[Any]], eos_id: int) -> Documents:
        """Return documents given as arrays of token ids."""
        parts = [np.asarray(document) for document in documents if len(document)]
        if not parts:
            empty = np.zeros(0, np.int64)
            return cls(empty, empty, empty)
        targets = np.concatenate(parts).astype(np.int64)
        lengths = np.array([len(part) for part in parts])
        starts = np.cumsum(lengths) - lengths
        previous = np.empty_like(targets)
        previous[1:] = targets[:-1]
        previous[starts] = eos_id
        return cls(previous, targets, np.arange(len(targets)) - np.repeat(starts, lengths) + 1)

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class _Level:
    """What was seen after contexts of one length k >= 1."""

    keys: Integers
    """``context * V + token`` of every n-gram, sorted."""
    counts: Integers
    """How often each was seen, same shape."""
    totals: Integers
    """``c(h)`` by the context's number."""
    types: Integers
    """``T(h)`` by the context's number."""


class NgramModel:
    """Token n-grams of some documents.

    Args:
        documents: what to count.
        vocab_size: V, the number of token ids.
        order: 1 for unigrams, 2 for bigrams …
    """

    def __init__(self, documents: Documents, vocab_size: int, order: int) -> None:
        if order < 1:
            raise ValueError(f"order is {order}")
        self.vocab_size, self.order = vocab_size, order
        self.unigrams: Integers = np.bincount(documents.targets, minlength=vocab_size).astype(np.int64)
        self._levels: list[_Level] = []
        contexts, n_contexts = documents.previous, vocab_size
        for k in range(1, order):
            rows = np.flatnonzero(documents.depths >= k)
            keys, numbers, counts = np.unique(
                contexts[rows] * vocab_size + documents.targets[rows], return_inverse=True, return_counts=True
            )
            owners = keys // vocab_size
            totals = np.bincount(owners, weights=counts, minlength=n_contexts).astype(np.int64)
            types = np.bincount(owners, minlength=n_contexts).astype(np.int64)
            self._levels.append(_Level(keys, counts.astype(np.int64), totals, types))
            contexts, n_contexts = _next_contexts(rows, numbers, len(documents)), len(keys)

    def probabilities(self, documents: Documents) -> NDArray[np.float64]:
        """Return the probability of every target after its context, shape ``[n]``."""
        total, types = int(self.unigrams.sum()), int(np.count_nonzero(self.unigrams))
        if total == 0:
            return np.full(len(documents), 1.0 / self.vocab_size)
        p: NDArray[np.float64] = (self.unigrams[documents.targets] + types / self.vocab_size) / (total + types)
        contexts = documents.previous
        for k, level in enumerate(self._levels, 1):
            rows = np.flatnonzero((documents.depths >= k) & (contexts >= 0))
            mine = contexts[rows]
            keys = mine * self.vocab_size + documents.targets[rows]
            place, found = _look_up(level.keys, keys)
            counts = np.where(found, level.counts[place], 0) if len(level.keys) else np.zeros(len(rows), np.int64)
            seen = level.totals[mine] > 0
            rows_seen, types_k = rows[seen], level.types[mine[seen]]
            p[rows_seen] = (counts[seen] + types_k * p[rows_seen]) / (level.totals[mine[seen]] + types_k)
            contexts = _next_contexts(rows[found], place[found], len(documents))
        return p

    def bits(self, documents: Documents) -> NDArray[np.float64]:
        """Return ``-log2 P`` of every target, shape ``[n]``."""
        return -np.log2(self.probabilities(documents))


def _next_contexts(rows: Integers, numbers: Integers, n: int) -> Integers:
    """Return for every target the number of the n-gram that ends just before it, -1 where there is none."""
    contexts = np.full(n + 1, -1, np.int64)
    contexts[rows + 1] = numbers
    return contexts[:n]


def _look_up(table: Integers, keys: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    """Return where each key would stand in a sorted table, and whether it does."""
    if not len(table):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return place, table[place] == keys
