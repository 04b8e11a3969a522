from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest

from clbench.duplicates import signatures
from clbench.leakage import NGRAM_WORDS, HeldOut, Overlap, RepeatCounter, Repeats, Texts, word_runs


def words(draw: random.Random, n: int, kinds: int = 5000) -> list[str]:
    return [f"w{draw.randrange(kinds)}" for _ in range(n)]


def glued(parts: Iterable[list[str]]) -> list[str]:
    return [word for part in parts for word in part]


def texts(*parts: list[str] | str, prefix: str = "t") -> Texts:
    joined = [part if isinstance(part, str) else " ".join(part) for part in parts]
    return Texts.of_texts([f"{prefix}{i}" for i in range(len(joined))], joined)


def look(heldout: HeldOut, batch: Texts) -> None:
    heldout.train(batch, signatures(batch.words))


def covered_by_brute_force(heldout: list[list[str]], train: list[list[str]]) -> list[int]:
    """Words inside a run that train has, by the definition, with sets of tuples."""
    known = {tuple(t[i : i + NGRAM_WORDS]) for t in train for i in range(len(t) - NGRAM_WORDS + 1)}
    found = []
    for one in heldout:
        inside: set[int] = set()
        for i in range(len(one) - NGRAM_WORDS + 1):
            if tuple(one[i : i + NGRAM_WORDS]) in known:
                inside |= set(range(i, i + NGRAM_WORDS))
        found.append(len(inside))
    return found


def test_planted_copies_are_counted_each_by_its_kind() -> None:
    draw = random.Random(1)
    pages = [words(draw, 200) for _ in range(5)]
    near = [*pages[1][:100], "changed", *pages[1][101:]]
    loud = ". ".join(word.upper() for word in pages[0])  # the same words
    shared = [*words(draw, 60), *pages[2][50:70], *words(draw, 60)]
    too_short = [*words(draw, 60), *pages[3][10 : 10 + NGRAM_WORDS - 1], *words(draw, 60)]
    heldout = HeldOut(texts(*pages, prefix="held"))
    look(heldout, texts(loud, near, words(draw, 50)))
    first = heldout.end_stage()
    look(heldout, Texts.of_texts(["held4", "x"], ["something else altogether", " ".join(shared)]))
    look(heldout, texts(too_short))
    second = heldout.end_stage()
    assert first.exact.tolist() == [True, False, False, False, False]
    assert first.near.tolist() == [True, True, False, False, False]
    assert first.covered_words.tolist() == [200, 199, 0, 0, 0]
    assert second.same_id.tolist() == [False, False, False, False, True]
    assert not second.exact.any() and not second.near.any() and not first.same_id.any()
    assert second.covered_words.tolist() == [0, 0, 20, 0, 0]
    both = heldout.everywhere()
    assert both.exact.sum() == 1 and both.near.sum() == 2 and both.same_id.sum() == 1
    assert both.covered_words.tolist() == [200, 199, 20, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_overlap_is_what_sets_of_tuples_say(seed: int) -> None:
    draw = random.Random(seed)
    train = [words(draw, draw.randrange(1, 200), 3) for _ in range(20)]
    pool = [words(draw, 40, 60) for _ in range(10)]
    train += [glued(draw.choice(pool) for _ in range(3)) for _ in range(10)]
    held = [glued(draw.choice([*pool, words(draw, 9, 60)]) for _ in range(4)) for _ in range(30)]
    held += [words(draw, n) for n in (1, 12, 13)]
    heldout = HeldOut(texts(*held))
    stages = [train[:15], train[15:]]
    found: list[Overlap] = []
    for stage in stages:
        for one in stage:
            look(heldout, texts(one))
        found.append(heldout.end_stage())
    for stage, overlap in zip(stages, found, strict=True):
        assert overlap.covered_words.tolist() == covered_by_brute_force(held, stage)
    everywhere = covered_by_brute_force(held, train)
    assert heldout.everywhere().covered_words.tolist() == everywhere
    assert sum(everywhere) > 100 and 0 in everywhere
    assert heldout.n_words.tolist() == [len(one) for one in held]


def test_runs_never_reach_into_the_next_text() -> None:
    rows = [[1] * 12, [2] * 13, [3] * 30]
    _, starts = word_runs(rows)
    assert starts.tolist() == [12, *range(25, 43)]
    assert [len(part) for part in word_runs([[1, 2]])] == [0, 0]
    assert [len(part) for part in word_runs([])] == [0, 0]


def test_nothing_held_out_and_nothing_trained() -> None:
    empty = HeldOut(texts())
    look(empty, texts("some words"))
    assert len(empty.end_stage().exact) == 0
    lonely = HeldOut(texts("some words"))
    assert lonely.end_stage().covered_words.tolist() == [0]


def test_repeats_within_a_stage_and_from_earlier_ones() -> None:
    draw = random.Random(2)
    pages = [words(draw, 150) for _ in range(6)]
    near = [*pages[1][:-1], "other"]
    counter = RepeatCounter(near_documents=100)
    for batch in (texts(*pages[:3]), texts(pages[0], near)):
        counter.train(batch, signatures(batch.words))
    assert counter.end_stage() == Repeats(n_documents=5, exact=1, near=1, n_near_documents=5, from_earlier_stages=0)
    batch = texts(pages[0], pages[4], near, pages[0])
    counter.train(batch, signatures(batch.words))
    found = counter.end_stage()
    assert (found.exact, found.near, found.from_earlier_stages) == (1, 0, 3)
    assert counter.end_stage() == Repeats(0, 0, 0, 0, 0)


def test_near_repeats_are_looked_for_among_so_many_documents_only() -> None:
    draw = random.Random(3)
    page = words(draw, 150)
    counter = RepeatCounter(near_documents=2)
    batch = texts(page, words(draw, 100), [*page[:-1], "other"])
    counter.train(batch, signatures(batch.words))
    found = counter.end_stage()
    assert (found.near, found.n_near_documents, found.n_documents) == (0, 2, 3)


def test_hashes_are_the_same_for_ever() -> None:
    one = texts("The quick, brown fox").keys
    assert one.dtype == np.uint64
    assert one[0] == texts("the QUICK brown; fox!").keys[0] != texts("the quick fox brown").keys[0]
