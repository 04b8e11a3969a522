from __future__ import annotations

import random

import numpy as np
import pytest

from clbench.duplicates import (
    PERMUTATIONS,
    SHINGLE_WORDS,
    NearIndex,
    estimated_jaccard,
    fingerprints,
    near_duplicates,
    near_repeats,
    signatures_of,
    words_of,
)


def exact_jaccard(a: str, b: str) -> float:
    """Jaccard similarity of the sets of word shingles, by the definition."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}

    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y)


def some_text(draw: random.Random, n_words: int) -> str:
    return " ".join(f"w{draw.randrange(500)}" for _ in range(n_words))


def with_words_replaced(text: str, share: float, draw: random.Random) -> str:
    return " ".join(f"x{draw.randrange(10**6)}" if draw.random() < share else w for w in text.split())


def test_the_estimate_is_as_close_to_the_true_jaccard_as_theory_says() -> None:
    draw = random.Random(1)
    originals = [some_text(draw, draw.randrange(50, 400)) for _ in range(400)]
    copies = [with_words_replaced(t, draw.choice([0.0, 0.01, 0.03, 0.1, 0.3]), draw) for t in originals]
    truth = np.array([exact_jaccard(a, b) for a, b in zip(originals, copies, strict=True)])
    errors = estimated_jaccard(signatures_of(originals), signatures_of(copies)) - truth
    expected = np.sqrt(np.mean(truth * (1 - truth)) / PERMUTATIONS)  # about 0.03
    assert np.sqrt(np.mean(errors**2)) < 1.3 * expected
    assert abs(errors.mean()) < 4 * expected / np.sqrt(len(errors))  # not biased
    assert errors[truth == 1.0].size > 20 and not errors[truth == 1.0].any()


def test_a_signature_depends_on_the_text_alone_not_on_its_neighbours() -> None:
    draw = random.Random(2)
    texts = [some_text(draw, n) for n in (3, 400, 1, 5, 70_000, 6, 20)]
    together = signatures_of(texts)
    assert all((signatures_of([text])[0] == row).all() for text, row in zip(texts, together, strict=True))


def test_signatures_are_the_same_for_ever() -> None:
    # A change here changes which documents are dropped from every stream: raise BUILDER_VERSION with it.
    text = "the quick brown fox jumps over the lazy dog"
    assert signatures_of([text])[0, :3].tolist() == [841658923, 1006914307, 67572537]


def test_exact_duplicates_ignore_case_spaces_and_punctuation_and_nothing_else() -> None:
    keys, _ = fingerprints(["One, two.", "one   TWO", "two one", "one two three"])
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 3
    assert fingerprints(["ONE two"])[0][0] == keys[0], "also from another call"


def test_texts_without_words_are_compared_by_their_characters() -> None:
    assert words_of("+ - *") != words_of("/ / /")
    assert len(set(fingerprints(["+ - *", "/ / /", "   ", "\n"])[0].tolist())) == 4


def test_near_duplicates_finds_the_planted_ones_and_no_others() -> None:
    draw = random.Random(3)
    corpus = [some_text(draw, 300) for _ in range(500)]
    near = [with_words_replaced(corpus[i], 0.005, draw) for i in range(100)]
    truth = np.array([exact_jaccard(a, b) for a, b in zip(near, corpus[:100], strict=True)])
    far = [with_words_replaced(corpus[i], 0.10, draw) for i in range(100)]  # Jaccard about 0.4
    found = near_duplicates(signatures_of(near + far), signatures_of(corpus))
    assert found[:100][truth > 0.92].all() and (truth > 0.92).sum() > 50
    assert not found[100:].any()


def test_near_duplicates_agrees_with_comparing_every_pair() -> None:
    draw = random.Random(4)
    base = [some_text(draw, 60) for _ in range(40)]
    corpus = signatures_of([with_words_replaced(base[i % 40], 0.02, draw) for i in range(300)])
    queries = signatures_of([with_words_replaced(b, 0.02, draw) for b in base])
    brute = np.array([(estimated_jaccard(q[None], corpus) >= 0.8).any() for q in queries])
    assert 0 < brute.sum() < len(brute)
    assert (near_duplicates(queries, corpus) == brute).all()
    index = NearIndex(queries)
    for start in range(0, len(corpus), 7):
        index.meet(corpus[start : start + 7])
    assert (index.found == brute).all(), "in whatever pieces the corpus comes"


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_compare_is_no_duplicate(n: int) -> None:
    rows = signatures_of(["some words that stand here"] * n)
    empty = signatures_of([])
    assert near_duplicates(rows, empty).tolist() == [False] * n
    assert near_duplicates(empty, rows).tolist() == []
    assert near_repeats(rows).tolist() == [False] * n


def test_near_repeats_marks_the_later_one() -> None:
    draw = random.Random(5)
    texts = [some_text(draw, 400) for _ in range(20)]
    texts.append(texts[7] + " one more word")
    assert np.flatnonzero(near_repeats(signatures_of(texts))).tolist() == [20]


def test_near_repeats_over_pieces_and_rows_is_that_over_the_chosen_rows_at_once() -> None:
    draw = random.Random(6)
    base = [some_text(draw, 60) for _ in range(30)]
    every = signatures_of([with_words_replaced(base[i % 30], 0.02, draw) for i in range(200)])
    chosen = np.flatnonzero(np.arange(200) % 3 != 1)
    pieces = [every[:90], every[90:91], every[91:]]
    rows = [chosen[chosen < 90], chosen[chosen == 90] - 90, chosen[chosen > 90] - 91]
    whole = near_repeats(every[chosen])
    assert 0 < whole.sum() < len(whole)
    assert (near_repeats(*pieces, rows=rows) == whole).all()
