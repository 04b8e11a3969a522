"""Exact and near duplicates among texts: normalised digests and MinHash over word shingles, in plain numpy.

Used while a stream is built, so that no held-out document was also trained on. Signatures are a pure function
of the text: the same on every machine and numpy version.

Symbols: n texts, q queries, P permutations, B bands of R rows (P = B * R).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
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
_BATCH_PAIRS = 1 << 15  # candidate pairs compared at once: 32 MiB of signatures


def words_of(text: str) -> list[str]:
    """Return what two texts are compared by: lower-cased words, or characters where there is no word."""
    return _WORD.findall(text.lower()) or text.split() or [text]


class _WordHashes(dict[str, int]):
    """64-bit hash of every word met so far; hashing a word once keeps Python out of the inner loop."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


class DuplicateIndex:
    """The distinct normalised texts of a stream, numbered as they were first met, with their signatures."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._hashes = _WordHashes()
        self._signatures: list[NDArray[np.uint32]] = []

    def add(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return the number of each text's normalised form, shape ``[n]``; exact duplicates share one."""
        numbers = np.empty(len(texts), np.int64)
        fresh: list[list[int]] = []
        for i, text in enumerate(texts):
            words = words_of(text)
            key = hashlib.sha256(" ".join(words).encode()).digest()[:16]
            if (number := self._numbers.get(key)) is None:
                number = self._numbers[key] = len(self._numbers)
                fresh.append([self._hashes[word] for word in words])
            numbers[i] = number
        self._signatures.append(signatures(fresh))
        return numbers

    def signatures(self, numbers: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return the signatures of the texts with these numbers, shape ``[len(numbers), P]``."""
        if len(self._signatures) > 1:
            self._signatures = [np.concatenate(self._signatures)]
        rows: NDArray[np.uint32] = self._signatures[0][numbers]
        return rows


def signatures_of(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return the MinHash signatures of some texts, shape ``[n, P]``."""
    hashes = _WordHashes()
    return signatures([[hashes[word] for word in words_of(text)] for text in texts])


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
    words = np.fromiter((w for t in padded for w in t), np.uint64, count=int(lengths.sum()))
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


def near_duplicates(
    queries: NDArray[np.uint32], corpus: NDArray[np.uint32], threshold: float = THRESHOLD
) -> NDArray[np.bool_]:
    """Return which queries have a near duplicate in the corpus by estimated Jaccard, shape ``[q]``."""
    found = np.zeros(len(queries), bool)
    for band in range(BANDS):
        open_ = np.flatnonzero(~found)
        keys = _band_keys(corpus, band)
        order = np.argsort(keys, kind="stable")
        wanted = _band_keys(queries[open_], band)
        left = np.searchsorted(keys, wanted, side="left", sorter=order)
        counts = np.searchsorted(keys, wanted, side="right", sorter=order) - left
        for query, position in _pairs(left, counts):
            match = estimated_jaccard(queries[open_[query]], corpus[order[position]]) >= threshold
            found[open_[query[match]]] = True
    return found


def _pairs(left: NDArray[Any], counts: NDArray[Any]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (query, position) pairs in batches: ``counts[i]`` positions from ``left[i]`` for query i."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _BATCH_PAIRS):
        pair = np.arange(start, min(start + _BATCH_PAIRS, total))
        query = np.searchsorted(ends, pair, side="right")
        yield query, left[query] + pair - (ends[query] - counts[query])


def near_repeats(rows: NDArray[np.uint32], threshold: float = THRESHOLD) -> NDArray[np.bool_]:
    """Return which texts are near an earlier text of the same list, shape ``[n]``.

    Each is compared with its predecessor in every band, so the work is linear and the result a lower bound.
    """
    found = np.zeros(len(rows), bool)
    for band in range(BANDS):
        keys = _band_keys(rows, band)
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        earlier, later = order[same], order[same + 1]
        for start in range(0, len(same), _BATCH_PAIRS):
            part = slice(start, start + _BATCH_PAIRS)
            found[later[part]] |= estimated_jaccard(rows[earlier[part]], rows[later[part]]) >= threshold
    return found
