from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from clbench.drift import above_floor, extremes, js_bits, js_matrix, log_odds, unseen_share


def counts(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def entropy(*p: float) -> float:
    return -sum(x * math.log2(x) for x in p if x)


@pytest.mark.parametrize(
    ("a", "b", "bits"),
    [
        (counts(3, 5, 0), counts(30, 50, 0), 0.0),
        (counts(4, 0), counts(0, 9), 1.0),
        (counts(7, 0), counts(5, 5), entropy(0.75, 0.25) - 0.5),  # 0.3113
        (counts(1, 3), counts(3, 1), 1.0 - entropy(0.25, 0.75)),  # 0.1887
    ],
)
def test_closed_forms_of_the_divergence(a: np.ndarray, b: np.ndarray, bits: float) -> None:
    assert js_bits(a, b) == pytest.approx(bits, abs=1e-12)
    assert js_bits(b, a) == pytest.approx(bits, abs=1e-12)


def test_an_empty_text_has_no_divergence() -> None:
    assert math.isnan(js_bits(counts(0, 0), counts(1, 2)))


def test_the_diagonal_is_the_noise_that_the_other_entries_carry_too() -> None:
    draw = np.random.default_rng(0)
    p = draw.dirichlet(np.ones(2000))
    q = np.roll(p, 1000)
    halves = [(draw.multinomial(4000, x), draw.multinomial(4000, x)) for x in (p, p, q)]
    matrix = js_matrix(halves)
    assert (matrix == matrix.T).all()
    assert matrix[0, 0] == js_bits(*halves[0])
    assert matrix[0, 1] > 0.05, "plain estimates of equal distributions are far from zero"
    corrected = above_floor(matrix)
    assert abs(corrected[0, 1]) < 0.01
    truth = js_bits(p, q)
    assert corrected[0, 2] > truth / 2 and matrix[0, 2] > truth
    assert (np.diag(corrected) == 0).all()


def test_log_odds_are_those_of_the_paper_word_by_word() -> None:
    here, there = Counter(apple=8, tree=5, the=40), Counter(tree=6, the=55, car=12)
    background = here + there
    alpha = {w: 50 * n / sum(background.values()) for w, n in background.items()}

    def side(y: Counter[str], w: str) -> tuple[float, float]:
        top = y[w] + alpha[w]
        return math.log(top / (sum(y.values()) + 50 - top)), 1 / top

    got = log_odds(here, there, background, prior=50)
    assert set(got) == set(background)
    for word in background:
        (a, va), (b, vb) = side(here, word), side(there, word)
        assert got[word] == pytest.approx((a - b) / math.sqrt(va + vb), rel=1e-12)
    assert got["apple"] > 0 > got["car"] and abs(got["the"]) < abs(got["car"])
    assert extremes(got, 1) == (["apple"], ["car"])


def test_log_odds_of_equal_texts_and_of_no_text() -> None:
    text = Counter(a=3, b=5)
    assert set(log_odds(text, text, text).values()) == {0.0}
    assert extremes(log_odds(text, text, text), 3) == ([], [])
    assert log_odds(Counter(), text, text) == {}


def test_a_prior_keeps_rare_words_near_zero() -> None:
    draw = random.Random(0)
    common = Counter({f"w{i}": 50 + draw.randrange(5) for i in range(100)})
    here, there = common + Counter(once=1, often=60), common + Counter(often=20)
    scores = log_odds(here, there, here + there)
    assert scores["often"] > 2 * scores["once"] > 0


def test_unseen_words_are_counted_as_they_run() -> None:
    assert unseen_share(Counter(a=3, b=1), {"b"}) == 0.75
    assert math.isnan(unseen_share(Counter(), {"b"}))
