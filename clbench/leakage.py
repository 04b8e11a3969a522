"""Held-out text found again in train, and train text that repeats: recomputed from the texts of a built stream.

The builder drops near copies from held-out while it builds; nothing here asks what it dropped. Besides the exact and
the near copies that it acts on, this counts what it does not: the words of a held-out document that stand in train as
part of a run of ``NGRAM_WORDS`` equal words. Train documents pass by in batches, so memory does not grow with train but
for eight bytes a document. Which documents are looked at is left to ``clbench.portrait``.

Symbols: D held-out documents, P permutations of MinHash, T stages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clbench.duplicates import near_duplicates, near_repeats, signatures, words_of

NGRAM_WORDS = 13
"""Length of a run of words that counts as overlap (as in the contamination analysis of GPT-3, Brown et al. 2020)."""
NEAR_BATCH = 8192
"""Train documents compared with held-out at once: 4 MiB of signatures."""
_KNOWN_WORDS = 1 << 20
"""Hashes of words that are kept; beyond that they are computed again. About 150 MB at most."""
_FILTER_BITS = 22


class _WordHashes(dict[str, int]):
    """64-bit hash of every word met lately."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        value = self[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return value


_hashes = _WordHashes()  # remembers a pure function, so sharing it changes nothing


@dataclass(frozen=True)
class Texts:
    """Some texts as hashes of their normalised words."""

    ids: list[str]
    words: list[list[int]]
    """Never empty: a text without words is one of its characters."""
    keys: NDArray[np.uint64]
    """Equal for texts of equal words, shape ``[n]``."""

    @classmethod
    def of(cls, ids: Sequence[str], words: Sequence[Sequence[str]]) -> Texts:
        """Return texts given as their words (``duplicates.words_of``)."""
        keys = [int.from_bytes(hashlib.blake2b(" ".join(w).encode(), digest_size=8).digest(), "little") for w in words]
        return cls(list(ids), [[_hashes[word] for word in one] for one in words], np.array(keys, np.uint64))

    @classmethod
    def of_texts(cls, ids: Sequence[str], texts: Sequence[str]) -> Texts:
        """Return texts."""
        return cls.of(ids, [words_of(text) for text in texts])

    def __add__(self, other: Texts) -> Texts:
        return Texts(self.ids + other.ids, self.words + other.words, np.concatenate([self.keys, other.keys]))

    def __len__(self) -> int:
        return len(self.ids)


def word_runs(words: Sequence[Sequence[int]], n: int = NGRAM_WORDS) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hash of every run of n words inside a text, and where it starts in the texts' joined words."""
    lengths = np.array([len(one) for one in words], np.int64)
    flat = np.fromiter((word for one in words for word in one), np.uint64, count=int(lengths.sum()))
    if len(flat) < n:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes = np.zeros(len(flat) - n + 1, np.uint64)
    for offset in range(n):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += flat[offset : offset + len(hashes)]
    ends = np.repeat(np.cumsum(lengths), lengths)[: len(hashes)]
    inside = np.flatnonzero(np.arange(len(hashes)) + n <= ends)
    found: NDArray[np.uint64] = hashes[inside] ^ (hashes[inside] >> np.uint64(29))
    return found, inside


@dataclass(frozen=True)
class Overlap:
    """What one train stage, or all of them, shares with the held-out documents; one element a document ``[D]``."""

    same_id: NDArray[np.bool_]
    """Its identity trains."""
    exact: NDArray[np.bool_]
    """Its words, in their order, are those of a train document."""
    near: NDArray[np.bool_]
    """Estimated Jaccard similarity of word shingles to a train document of at least 0.8; exact copies included."""
    covered_words: NDArray[np.int64]
    """Words inside a run of NGRAM_WORDS words that stands in train."""


class HeldOut:
    """The held-out documents that are looked for, all stages together.

    Call ``train`` with every batch of a train stage, then ``end_stage``, which says what that stage shares with them.
    """

    def __init__(self, texts: Texts) -> None:
        self._keys = texts.keys
        self.n_words = np.array([len(one) for one in texts.words], np.int64)
        """Words of each document, shape ``[D]``."""
        self._signatures = signatures(texts.words) if len(texts) else np.zeros((0, 0), np.uint32)
        self._ids: dict[str, list[int]] = {}
        for place, one in enumerate(texts.ids):
            self._ids.setdefault(one, []).append(place)
        runs, self._starts = word_runs(texts.words)
        self._runs: NDArray[np.uint64]
        self._runs, self._run_of_start = np.unique(runs, return_inverse=True)
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[self._slot(self._runs)] = True
        self._runs_anywhere = np.zeros(len(self._runs), bool)
        self._anywhere = np.zeros((3, len(texts)), bool)  # same id, exact, near
        self._begin()

    def _begin(self) -> None:
        n = len(self._keys)
        self._same_id, self._exact, self._near = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
        self._runs_here = np.zeros(len(self._runs), bool)
        self._waiting: list[NDArray[np.uint32]] = []

    @staticmethod
    def _slot(runs: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return runs >> np.uint64(64 - _FILTER_BITS)

    def train(self, batch: Texts, signatures_NP: NDArray[np.uint32]) -> None:
        """Look at some train documents of the current stage, with their signatures."""
        for one in batch.ids:
            for place in self._ids.get(one, ()):
                self._same_id[place] = True
        self._exact |= np.isin(self._keys, batch.keys)
        runs, _ = word_runs(batch.words)
        runs = runs[self._filter[self._slot(runs)]]
        if len(self._runs) and len(runs):
            at = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
            self._runs_here[at[self._runs[at] == runs]] = True
        self._waiting.append(signatures_NP)
        if sum(map(len, self._waiting)) >= NEAR_BATCH:
            self._compare()

    def _compare(self) -> None:
        """Compare the signatures that wait with those of the held-out documents not found yet."""
        if self._waiting and len(self._keys):
            rest = np.flatnonzero(~self._near)
            self._near[rest] = near_duplicates(self._signatures[rest], np.concatenate(self._waiting))
        self._waiting = []

    def end_stage(self) -> Overlap:
        """Return what the stage whose documents passed by shares with each held-out document."""
        self._compare()
        self._runs_anywhere |= self._runs_here
        self._anywhere |= np.stack([self._same_id, self._exact, self._near])
        found = Overlap(self._same_id, self._exact, self._near, self._covered(self._runs_here))
        self._begin()
        return found

    def everywhere(self) -> Overlap:
        """Return the same for all stages together; a run of words may stand in any of them."""
        same_id, exact, near = self._anywhere
        return Overlap(same_id, exact, near, self._covered(self._runs_anywhere))

    def _covered(self, found: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return how many words of each document lie in a run that was found."""
        total = int(self.n_words.sum())
        edges = np.zeros(total + NGRAM_WORDS + 1, np.int64)
        starts = self._starts[found[self._run_of_start]] if len(self._starts) else self._starts
        edges[starts] += 1  # every start comes once
        edges[starts + NGRAM_WORDS] -= 1
        inside = np.concatenate([[0], np.cumsum(np.cumsum(edges)[:total] > 0)])
        ends = np.cumsum(self.n_words)
        covered: NDArray[np.int64] = inside[ends] - inside[ends - self.n_words]
        return covered


@dataclass(frozen=True)
class Repeats:
    """Documents of one train stage that repeat others; counts."""

    n_documents: int
    """Looked at."""
    exact: int
    """Equal words to an earlier document of the same stage."""
    near: int
    """Near an earlier document of the same stage and not equal to one; a lower bound, among ``n_near_documents``."""
    n_near_documents: int
    from_earlier_stages: int
    """Equal words to a document of an earlier stage."""


class RepeatCounter:
    """Counts repeats in train stages that pass by one after another; keeps eight bytes for every distinct text."""

    def __init__(self, near_documents: int) -> None:
        self.near_documents = near_documents
        """Documents a stage among which near repeats are looked for: 512 bytes each."""
        self._earlier = np.zeros(0, np.uint64)
        self._begin()

    def _begin(self) -> None:
        self._keys: list[NDArray[np.uint64]] = []
        self._rows: list[NDArray[np.uint32]] = []
        self._n_rows = 0

    def train(self, batch: Texts, signatures_NP: NDArray[np.uint32]) -> None:
        """Look at some documents of the current stage."""
        self._keys.append(batch.keys)
        rows = signatures_NP[: max(0, self.near_documents - self._n_rows)]
        self._rows.append(rows)
        self._n_rows += len(rows)

    def end_stage(self) -> Repeats:
        """Return the counts of the stage whose documents passed by."""
        keys = np.concatenate([*self._keys, np.zeros(0, np.uint64)])
        distinct = np.unique(keys)
        near = 0
        if self._n_rows:
            _, first = np.unique(keys[: self._n_rows], return_index=True)
            near = int(near_repeats(np.concatenate(self._rows)[np.sort(first)]).sum())
        found = Repeats(
            n_documents=len(keys),
            exact=len(keys) - len(distinct),
            near=near,
            n_near_documents=self._n_rows,
            from_earlier_stages=int(np.isin(keys, self._earlier).sum()),
        )
        self._earlier = np.union1d(self._earlier, distinct)
        self._begin()
        return found
