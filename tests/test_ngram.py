from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from clbench.ngram import Documents, NgramModel

EOS = 0


class BruteForce:
    """The formula of the module, word for word, with dictionaries and exact fractions."""

    def __init__(self, documents: list[list[int]], vocab_size: int, order: int) -> None:
        self.vocab_size = vocab_size
        self.after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self.order = order
        for document in documents:
            marked = [EOS, *document]
            for i in range(1, len(marked)):
                for k in range(min(order - 1, i) + 1):
                    self.after[tuple(marked[i - k : i])][marked[i]] += 1

    def probability(self, context: tuple[int, ...], word: int) -> Fraction:
        context = context[len(context) - min(self.order - 1, len(context)) :]
        shorter = self.probability(context[1:], word) if context else Fraction(1, self.vocab_size)
        if not (seen := self.after.get(context)):
            return shorter
        return (seen[word] + len(seen) * shorter) / (sum(seen.values()) + len(seen))


def some_documents(seed: int, n: int, vocab_size: int, longest: int = 30) -> list[list[int]]:
    draw = random.Random(seed)
    return [[int(vocab_size * draw.random() ** 3) for _ in range(draw.randrange(1, longest))] + [EOS] for _ in range(n)]


def packed(documents: list[list[int]]) -> Documents:
    return Documents.of([np.array(d, np.uint16) for d in documents], EOS)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_equal_those_of_dictionaries_with_exact_fractions(order: int) -> None:
    vocab_size = 12
    train, test = some_documents(1, 40, vocab_size), some_documents(2, 25, vocab_size)
    brute = BruteForce(train, vocab_size, order)
    expected = [
        float(brute.probability(tuple([EOS, *document][: i + 1]), word))
        for document in test
        for i, word in enumerate(document)
    ]
    got = NgramModel(packed(train), vocab_size, order).probabilities(packed(test))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_probabilities_sum_to_one_after_every_context_seen_or_not() -> None:
    vocab_size, order = 5, 3
    model = NgramModel(packed(some_documents(3, 10, vocab_size, 8)), vocab_size, order)
    for context in itertools.product(range(vocab_size), repeat=3):
        tries = packed([[*context, word] for word in range(vocab_size)])
        last = np.arange(1, vocab_size + 1) * 4 - 1
        assert model.probabilities(tries)[last].sum() == pytest.approx(1.0, abs=1e-12)


def test_unigrams_are_the_closed_form() -> None:
    # 6 tokens of 3 kinds in a vocabulary of 4: (c + 3/4) / (6 + 3)
    model = NgramModel(packed([[1, 1, 1, 2, EOS], [EOS]]), 4, 1)
    got = model.probabilities(packed([[0, 1, 2, 3]]))
    np.testing.assert_allclose(got, [2.75 / 9, 3.75 / 9, 1.75 / 9, 0.75 / 9], rtol=1e-15)
    np.testing.assert_allclose(model.bits(packed([[3]])), [-np.log2(0.75 / 9)])


def test_a_context_never_reaches_into_the_document_before() -> None:
    train = some_documents(4, 30, 6)
    model = NgramModel(packed(train), 6, 4)
    one, two = [1, 2, 3, EOS], [2, 3, 1, EOS]
    together = model.probabilities(packed([one, two]))
    np.testing.assert_array_equal(together[4:], model.probabilities(packed([two])))
    shuffled = NgramModel(packed(train[::-1]), 6, 4)
    np.testing.assert_allclose(shuffled.probabilities(packed([one, two])), together, rtol=1e-15)


def test_large_vocabularies_and_empty_texts() -> None:
    big = 2**18
    model = NgramModel(packed([[5, 7, 5, 7, EOS]]), big, 5)
    seen, unseen = model.probabilities(Documents.of([np.array([5, 7, 5, 7, big - 1])], EOS))[[3, 4]]
    assert seen > 0.4 and 0 < unseen < 1e-4
    empty = NgramModel(packed([]), 8, 3)
    np.testing.assert_array_equal(empty.probabilities(packed([[1, 2]])), [1 / 8, 1 / 8])
    assert len(model.probabilities(packed([]))) == 0
    with pytest.raises(ValueError, match="order"):
        NgramModel(packed([]), 8, 0)
