"""How far apart the texts of two periods are: Jensen-Shannon divergence, log-odds of words, vocabulary turnover.

Pure functions of counts. Which documents are counted, and what is made of the figures, is left to ``clbench.portrait``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRIOR_WORDS = 1000.0
"""alpha_0 of ``log_odds``: the prior weighs as much as a text of so many words."""

Counts = NDArray[np.int64]


def js_bits(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the Jensen-Shannon divergence of two count vectors in bits, in [0, 1]; NaN when one is empty.

    ``JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2`` (Lin 1991) of the relative frequencies. It is 0 for equal and
    1 for disjoint distributions. Estimated from counts it is biased upwards: compare it with ``floor`` below.
    """
    if not (a.sum() and b.sum()):
        return float("nan")
    p, q = a / a.sum(), b / b.sum()
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log2(p / m), 0.0) + np.where(q > 0, q * np.log2(q / m), 0.0)
    return float(min(max(0.5 * terms.sum(), 0.0), 1.0))


def js_matrix(halves: Sequence[tuple[Counts, Counts]]) -> NDArray[np.float64]:
    """Return the divergence between every two stages, shape ``[T, T]``, each given as two random halves.

    All halves hold the same number of tokens, so all entries carry the same kind of noise. Off the diagonal: the
    mean over the four pairs of halves. On the diagonal: the two halves of one stage, which is what two samples of the
    *same* text come to at this size, the noise floor of its row and column.
    """
    n = len(halves)
    out = np.empty((n, n))
    for i in range(n):
        out[i, i] = js_bits(*halves[i])
        for j in range(i):
            out[i, j] = out[j, i] = np.mean([js_bits(a, b) for a in halves[i] for b in halves[j]])
    return out


def above_floor(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``JS(i, j) - (JS(i, i) + JS(j, j)) / 2``: what is left of a divergence when noise is taken off.

    Zero on the diagonal; a value near zero or below says that the two stages cannot be told apart at this size.
    """
    floor = np.diag(matrix)
    return matrix - (floor[:, None] + floor[None, :]) / 2


def log_odds(
    here: Mapping[str, int], there: Mapping[str, int], background: Mapping[str, int], *, prior: float = PRIOR_WORDS
) -> dict[str, float]:
    """Return word -> z-score of its log-odds ratio between two texts, with an informative Dirichlet prior.

    Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16 and 22. With ``y`` the count of a word, ``n`` that
    of all words and ``alpha = prior * its share of the background``:

        delta = log((y + alpha) / (n + prior - y - alpha)) here, minus the same there
        z = delta / sqrt(1 / (y_here + alpha) + 1 / (y_there + alpha))

    Positive: more of it here. The prior keeps words that were hardly seen near zero.
    """
    words = [w for w, count in background.items() if count > 0 and (here.get(w, 0) or there.get(w, 0))]
    total = sum(background.values())
    if not words or not sum(here.values()) or not sum(there.values()):
        return {}
    alpha = prior * np.array([background[w] for w in words], float) / total
    sides = []
    for counts in (here, there):
        y = np.array([counts.get(w, 0) for w in words], float) + alpha
        sides.append((np.log(y) - np.log(sum(counts.values()) + prior - y), 1.0 / y))
    z = (sides[0][0] - sides[1][0]) / np.sqrt(sides[0][1] + sides[1][1])
    return dict(zip(words, z.tolist(), strict=True))


def extremes(scores: Mapping[str, float], k: int) -> tuple[list[str], list[str]]:
    """Return the k words with the largest positive and the k with the most negative scores; ties by alphabet."""
    ordered = sorted(scores, key=lambda word: (-scores[word], word))
    high = [word for word in ordered[:k] if scores[word] > 0]
    low = [word for word in ordered[::-1][:k] if scores[word] < 0]
    return high, low


def unseen_share(measured: Mapping[str, int], seen: set[str]) -> float:
    """Return the share of running words that are not in ``seen``; NaN of an empty text."""
    total = sum(measured.values())
    return sum(count for word, count in measured.items() if word not in seen) / total if total else float("nan")
