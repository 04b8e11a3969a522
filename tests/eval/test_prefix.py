from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clbench.eval import _generate, _prefix, _scorer
from clbench.eval._prefix import LEAST, OVERHEAD, Group, plan
from clbench.eval._scorer import Question, choice_nats, generate
from tests.eval.test_heldout import gemma2, gpt2
from tests.eval.test_scorer import (
    VOCABULARY,
    by_hand,
    checkpoint_of,
    eager,
    long_llama,
    mistral,
    reads,
    words,
    written_by_hand,
)


def rows_of(*token_lists: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    rows = [np.array(ids, np.int32) for ids in token_lists]
    return rows, np.array([len(row) - 1 for row in rows], np.int64)


def computed(groups: list[Group], rows: list[np.ndarray]) -> int:
    """Positions that go through the model."""
    return sum(g.n_shared + sum(len(rows[r]) - g.n_shared for r in g.rows) for g in groups)


# --- which rows share what


def test_rows_of_one_beginning_share_all_of_it() -> None:
    start = list(range(100, 200))
    rows, most = rows_of(*([*start, n, n + 1] for n in range(5)))
    assert plan(rows, most) == [Group(n_shared=100, rows=[0, 1, 2, 3, 4])]


def test_two_subjects_share_two_beginnings_and_the_rest_nothing() -> None:
    intro, one, other = list(range(40)), [50] * 80, [60] * 90
    rows, most = rows_of(
        [*intro, *one, 1], [7] * 30, [*intro, *other, 2], [*intro, *one, 3], [*intro, *other, 4], [8] * 300
    )
    found = plan(rows, most)
    assert found == [
        Group(n_shared=120, rows=[0, 3]),
        Group(n_shared=130, rows=[2, 4]),
        Group(n_shared=0, rows=[1, 5]),
    ]


def test_a_common_instruction_is_shared_by_those_whose_examples_differ() -> None:
    intro = list(range(200))
    rows, most = rows_of(*([*intro, n, 9, 9] for n in range(4)), [*intro, *[5] * 500, 1], [*intro, *[5] * 500, 2])
    assert plan(rows, most) == [Group(n_shared=200, rows=[0, 1, 2, 3]), Group(n_shared=700, rows=[4, 5])]


def test_what_is_shared_ends_before_the_last_token_of_a_context() -> None:
    """From that token the first one of a choice is predicted, so a row computes it."""
    rows, _ = rows_of([1] * 100, [1] * 120, [1] * 90)
    assert plan(rows, np.array([99, 70, 89])) == [Group(n_shared=70, rows=[0, 1, 2])]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 130), st.integers(0, 2), st.integers(1, 90)), max_size=9))
def test_every_row_is_once_in_a_group_that_is_worth_it(shapes: list[tuple[int, int, int, int]]) -> None:
    rows, most = rows_of(*([a] * n + [b] * m for a, n, b, m in shapes))
    groups = plan(rows, most)
    assert sorted(r for g in groups for r in g.rows) == list(range(len(rows)))
    for group in groups:
        starts = {tuple(rows[r][: group.n_shared]) for r in group.rows}
        assert len(starts) == 1 and all(group.n_shared <= most[r] for r in group.rows)
        if group.n_shared:
            assert group.n_shared >= LEAST and group.n_shared * (len(group.rows) - 1) > OVERHEAD
    assert computed(groups, rows) <= sum(map(len, rows))


# --- scores behind a beginning


def questions_behind(n_shared: int, n: int = 24, *, seed: int = 0) -> list[Question]:
    """Questions with the same ``n_shared`` first tokens, some of them of a second kind."""
    rng = np.random.default_rng(seed)

    def tokens(least: int, most: int) -> list[int]:
        return rng.integers(1, VOCABULARY, rng.integers(least, most + 1)).tolist()

    starts = [tokens(n_shared, n_shared), tokens(n_shared, n_shared)]
    return [
        Question([*starts[k % 3 == 0], *tokens(1, 9)], [tokens(1, 4) for _ in range(rng.integers(1, 5))])
        for k in range(n)
    ]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the beginnings that are used to score."""
    found: list[int] = []
    score, write = _scorer._begin, _generate._begin

    def spy(checkpoint: Any, rows: Any, group: Group) -> Any:
        start = (write if isinstance(rows, list) else score)(checkpoint, rows, group)
        found.append(0 if start is None else start.n_shared)
        return start

    monkeypatch.setattr(_scorer, "_begin", spy)
    monkeypatch.setattr(_generate, "_begin", spy)
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("make", "is_shared"),
    [
        (long_llama, True),
        (eager, True),
        (lambda: gpt2(128), True),
        (mistral, False),
        (lambda: gemma2(128), False),
    ],
)
def test_scores_behind_a_shared_beginning_equal_those_of_whole_texts(
    make: Callable[[], torch.nn.Module], is_shared: bool, packed: bool, begun: list[int]
) -> None:
    model = make()
    questions = questions_behind(LEAST + 14)
    found = choice_nats(checkpoint_of(model), questions, packed=packed, tokens_per_batch=200)
    for question, (nats, greedy) in zip(questions, found, strict=True):
        expected, top = by_hand(model, question)
        np.testing.assert_allclose(nats, expected, rtol=0, atol=5e-5)
        assert greedy.tolist() == top
    assert (begun != [0]) == is_shared


@pytest.mark.parametrize(
    ("make", "is_shared"), [(long_llama, True), (eager, True), (lambda: gpt2(128), True), (mistral, False)]
)
def test_prompts_behind_a_shared_beginning_are_continued_as_each_alone(
    make: Callable[[], torch.nn.Module], is_shared: bool, begun: list[int]
) -> None:
    checkpoint, tally = reads(make()), Counter[tuple[int, int]]()
    prompts = [words(question.context) for question in questions_behind(LEAST + 14, 14)]
    found = generate(checkpoint, prompts, max_new_tokens=8, batch_rows=5, tally=tally)
    assert found == [words(written_by_hand(checkpoint, prompt, 8, 128)) for prompt in prompts]
    assert (begun != [0]) == is_shared
    n_tokens = sum(len(prompt.split()) for prompt in prompts)
    n_shared = sum(n for n in begun)
    assert sum(seen * n for (_, seen), n in tally.items()) == n_tokens + n_shared
    assert sum(new * n for (new, _), n in tally.items()) <= n_tokens - (46 * (8 + 4) if is_shared else 0)


def test_a_model_whose_cached_states_are_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch, begun: list[int]) -> None:
    def wrong(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self._kept = [(keys * 1.01, values) for keys, values in self._kept]

    original = _prefix.Beginning.__init__
    monkeypatch.setattr(_prefix.Beginning, "__init__", wrong)
    model, questions = long_llama(), questions_behind(50)
    found = choice_nats(checkpoint_of(model), questions)
    np.testing.assert_allclose(found[3][0], by_hand(model, questions[3])[0], rtol=0, atol=5e-5)
    assert begun == [0]


def test_what_went_through_the_model_is_counted() -> None:
    start, tally = [3] * 60, Counter[tuple[int, int]]()
    questions = [Question([*start, 4, n], [[1], [2, 3, 4]]) for n in range(10)]
    checkpoint = checkpoint_of(long_llama())
    choice_nats(checkpoint, questions, tally=tally)
    assert tally == {(61, 61): 1, (1 + 2, 61 + 1 + 2): 10}
    tally.clear()
    choice_nats(checkpoint, questions, tally=tally, shared=False)
    assert tally == {(64, 64): 10}


def test_many_rows_read_one_beginning_without_keeping_a_copy() -> None:
    model, ids = long_llama(), np.arange(1, 41, dtype=np.int32)
    with torch.inference_mode():
        start = _prefix.Beginning(model, ids, torch.device("cpu"))
        cache = next(iter(start.arguments().values()))
        new = torch.tensor([[5, 6], [7, 8], [5, 6]])
        behind = model.base_model(
            input_ids=new, position_ids=torch.tensor([[40, 41]] * 3), use_cache=False, **start.arguments()
        ).last_hidden_state
        whole = model.base_model(input_ids=torch.tensor([[*range(1, 41), 7, 8]])).last_hidden_state
    torch.testing.assert_close(behind[1], whole[0, -2:], rtol=0, atol=1e-5)
    assert torch.equal(behind[0], behind[2]) and cache.layers[0].keys.shape[0] == 1
