"""Exact and near duplicates among texts: normalised digests and MinHash over word shingles, in plain numpy.

Used while a stream is built, so that no held-out document was also trained on. Signatures are a pure function
of the text: the same on every machine and numpy version.

Symbols: n texts, q queries, P permutations, B bands of R rows (P = B * R).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.seeds import derive

SHINGLE_WORDS = 5
PERMUTATIONS = 128
BANDS = 32  # of 4 rows: a pair with Jaccard 0.8 fails to become a candidate once in 2e7
ROWS = PERMUTATIONS // BANDS
THRESHOLD = 0.8
SEED = 0

PARAMETERS = {
    "exact": "sha256 of the lower-cased words joined by one space",
    "near": "MinHash over word shingles",
    "shingle_words": SHINGLE_WORDS,
    "permutations": PERMUTATIONS,
    "bands": BANDS,
    "threshold_jaccard": THRESHOLD,
    "seed": SEED,
}
"""What a manifest says about how duplicates were found."""

_WORD = re.compile(r"\w+")
_BATCH_WORDS = 1 << 15  # shingles hashed at once: fits the second-level cache
_REMEMBERED_WORDS = 1 << 19  # some 60 MB
_BATCH_PAIRS = 1 << 15  # candidate pairs compared at once: 32 MiB of signatures


def words_of(text: str) -> list[str]:
    """Return what two texts are compared by: lower-cased words, or characters where there is no word."""
    return _WORD.findall(text.lower()) or text.split() or [text]


class _WordHashes(dict[str, int]):
    """64-bit hashes of words met lately; hashing a word once keeps Python out of the inner loop."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value

    def of(self, words: Sequence[str]) -> list[int]:
        """Return the hashes of the words of one text."""
        if len(self) > _REMEMBERED_WORDS:
            self.clear()
        return list(map(self.__getitem__, words))


_HASHES = _WordHashes()


def fingerprints(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Return what texts are compared by: a key of the normalised text ``[n]`` and the MinHash signature ``[n, P]``.

    Equal keys mean exact duplicates: 64 bits of a SHA-256, which among ten million texts collide once in 4e5 streams.
    """
    keys = np.empty(len(texts), np.uint64)
    words_of_texts: list[list[int]] = []
    for i, text in enumerate(texts):
        words = words_of(text)
        keys[i] = int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "little")
        words_of_texts.append(_HASHES.of(words))
    return keys, signatures(words_of_texts)


def signatures_of(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return the MinHash signatures of some texts, shape ``[n, P]``."""
    return signatures([_HASHES.of(words_of(text)) for text in texts])


def estimated_jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return the estimated Jaccard similarity of paired rows; standard error ``sqrt(J (1 - J) / P)``."""
    estimate: NDArray[np.float64] = np.mean(a == b, axis=-1)
    return estimate


def signatures(texts: Sequence[Sequence[int]]) -> NDArray[np.uint32]:
    """Return MinHash signatures of texts given as 64-bit word hashes, shape ``[n, P]``.

    A text shorter than a shingle is padded to one. Permutation i is ``a_i x + b_i`` modulo 2^64, ``a_i`` odd
    (the product has to wrap around, or the estimate is wrong), of which the upper 32 bits are kept.
    """
    out = np.empty((len(texts), PERMUTATIONS), np.uint32)
    raw = np.random.Philox(key=derive(SEED, "minhash")).random_raw(2 * PERMUTATIONS)
    multipliers, offsets = raw[:PERMUTATIONS] | np.uint64(1), raw[PERMUTATIONS:]
    for start, end in _batches([len(t) for t in texts]):
        shingles, first = _shingles(texts[start:end])
        buffer = np.empty_like(shingles)
        for i in range(PERMUTATIONS):
            np.multiply(shingles, multipliers[i], out=buffer)
            np.add(buffer, offsets[i], out=buffer)
            out[start:end, i] = np.minimum.reduceat(buffer, first) >> np.uint64(32)
    return out


def _batches(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ranges of neighbouring texts with about ``_BATCH_WORDS`` words."""
    start, words = 0, 0
    for i, length in enumerate(lengths):
        words += length
        if words >= _BATCH_WORDS:
            yield start, i + 1
            start, words = i + 1, 0
    if start < len(lengths):
        yield start, len(lengths)


def _shingles(texts: Sequence[Sequence[int]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes of all shingles, text after text, and where each text's first one stands."""
    padded = [[*t, *[0] * (SHINGLE_WORDS - len(t))] if len(t) < SHINGLE_WORDS else t for t in texts]
    lengths = np.array([len(t) for t in padded], np.int64)
    words = np.fromiter(chain.from_iterable(padded), np.uint64, count=int(lengths.sum()))
    hashes = np.zeros(len(words) - SHINGLE_WORDS + 1, np.uint64)
    for offset in range(SHINGLE_WORDS):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += words[offset : offset + len(hashes)]
    ends = np.cumsum(lengths)
    inside = np.ones(len(words), bool)  # False where a shingle would reach into the next text
    for offset in range(1, SHINGLE_WORDS):
        inside[ends - offset] = False
    counts = lengths - SHINGLE_WORDS + 1
    return _mix(hashes[inside[: len(hashes)]]), np.cumsum(counts) - counts


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every input bit over all output bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _band_keys(rows: NDArray[np.uint32], band: int) -> NDArray[np.uint64]:
    """Return one 64-bit key per signature for a band, shape ``[n]``; a collision only costs a comparison."""
    keys = np.zeros(len(rows), np.uint64)
    for column in range(band * ROWS, (band + 1) * ROWS):
        keys = _mix(keys * np.uint64(0x9E3779B97F4A7C15) + rows[:, column])
    return keys


class NearIndex:
    """Queries that wait for a near duplicate; the corpus comes by in pieces of any size and is not kept.

    Args:
        queries: signatures, shape ``[q, P]``.
        threshold: estimated Jaccard from which a pair counts.
    """

    def __init__(self, queries: NDArray[np.uint32], threshold: float = THRESHOLD) -> None:
        self.queries, self.threshold = queries, threshold
        self.found: NDArray[np.bool_] = np.zeros(len(queries), bool)
        """Which queries have met a near duplicate, shape ``[q]``."""
        self._sort()

    def _sort(self) -> None:
        self._open = np.flatnonzero(~self.found)
        self._bands = []
        for band in range(BANDS):
            keys = _band_keys(self.queries[self._open], band)
            order = np.argsort(keys, kind="stable")
            self._bands.append((keys[order], self._open[order]))

    def meet(self, corpus: NDArray[np.uint32]) -> None:
        """Compare every open query with some texts of the corpus, shape ``[n, P]``."""
        if not len(self._open) or not len(corpus):
            return
        for band, (keys, query) in enumerate(self._bands):
            wanted = _band_keys(corpus, band)
            left = np.searchsorted(keys, wanted, side="left")
            counts = np.searchsorted(keys, wanted, side="right") - left
            for text, position in _pairs(left, counts):
                still = ~self.found[query[position]]
                a, b = query[position[still]], text[still]
                match = estimated_jaccard(self.queries[a], corpus[b]) >= self.threshold
                self.found[a[match]] = True
        if 2 * int(self.found[self._open].sum()) > len(self._open):
            self._sort()  # those that were found need not be looked up again


def near_duplicates(
    queries: NDArray[np.uint32], corpus: NDArray[np.uint32], threshold: float = THRESHOLD
) -> NDArray[np.bool_]:
    """Return which queries have a near duplicate in the corpus by estimated Jaccard, shape ``[q]``."""
    index = NearIndex(queries, threshold)
    index.meet(corpus)
    return index.found


def _pairs(left: NDArray[Any], counts: NDArray[Any]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (text, position) pairs in batches: ``counts[i]`` positions from ``left[i]`` for text i."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _BATCH_PAIRS):
        pair = np.arange(start, min(start + _BATCH_PAIRS, total))
        text = np.searchsorted(ends, pair, side="right")
        yield text, left[text] + pair - (ends[text] - counts[text])


def near_repeats(
    *pieces: NDArray[np.uint32], rows: Sequence[NDArray[np.int64]] | None = None, threshold: float = THRESHOLD
) -> NDArray[np.bool_]:
    """Return which texts are near an earlier text of the same list, shape ``[n]``.

    Each is compared with its predecessor in every band, so the work is linear and the result a lower bound.

    Args:
        pieces: signatures, shape ``[n_i, P]`` each, one piece after another; they may be memory-mapped, as only the
            keys of one band are in memory at a time.
        rows: which rows of each piece belong to the list; None means all.
        threshold: estimated Jaccard from which a pair counts.
    """
    chosen = [np.arange(len(piece)) for piece in pieces] if rows is None else rows
    starts = np.cumsum([0, *map(len, chosen)])
    found = np.zeros(int(starts[-1]), bool)
    for band in range(BANDS):
        keys = np.concatenate([_band_keys(piece[at], band) for piece, at in zip(pieces, chosen, strict=True)])
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        for start in range(0, len(same), _BATCH_PAIRS):
            earlier, later = order[same[start : start + _BATCH_PAIRS]], order[same[start : start + _BATCH_PAIRS] + 1]
            a, b = (_at(pieces, chosen, starts, places) for places in (earlier, later))
            found[later] |= estimated_jaccard(a, b) >= threshold
    return found


def _at(
    pieces: Sequence[NDArray[np.uint32]],
    rows: Sequence[NDArray[np.int64]],
    starts: NDArray[np.int64],
    places: NDArray[np.int64],
) -> NDArray[np.uint32]:
    """Return the signatures at some places of the list, shape ``[len(places), P]``."""
    out = np.empty((len(places), PERMUTATIONS), np.uint32)
    piece = np.searchsorted(starts, places, side="right") - 1
    for i in np.unique(piece):
        here = piece == i
        out[here] = pieces[i][rows[i][places[here] - starts[i]]]
    return out
