"""Scores of generated answers that lm-eval has no metric for: SQuAD's exact match and F1.

After the official script (Rajpurkar et al. 2016): answers are lower-cased, punctuation and articles go, runs of spaces
become one.
"""

from __future__ import annotations

import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Return an answer as it is compared."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(NO_PUNCTUATION)).split())


def squad_exact(answer: str, gold: str) -> float:
    """Return 1 where two answers are the same after ``normalised``, else 0."""
    return float(normalised(answer) == normalised(gold))


def squad_f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall over words; of two answers without words, 1 if both are so."""
    found, wanted = normalised(answer).split(), normalised(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    n_shared = (Counter(found) & Counter(wanted)).total()
    return 2 * n_shared / (len(found) + len(wanted))
