from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from clbench.errors import ClbenchError, ConfigError, NonFiniteError
from clbench.eval import _generate, _scorer
from clbench.eval._scorer import Question, choice_nats, encode_pairs, encode_question, generate, n_cut, rolling_nats
from clbench.eval.heldout import measure_plain
from clbench.suite import Checkpoint
from tests.eval.test_heldout import gemma2, gpt2, llama, state_of, word_tokenizer

VOCABULARY, EOS = 64, 0


def checkpoint_of(model: torch.nn.Module, **changes: Any) -> Checkpoint:
    base = Checkpoint(model=model, weights_sha256="a" * 64, device=torch.device("cpu"), autocast_dtype=None)
    return replace(base, **changes)


def random_questions(n: int, *, context: int = 20, choice: int = 6, seed: int = 0) -> list[Question]:
    """Questions of mixed shapes: some choices of one token, some equal, contexts of 1 to ``context`` tokens."""
    rng = np.random.default_rng(seed)

    def tokens(most: int) -> list[int]:
        return rng.integers(1, VOCABULARY, rng.integers(1, most + 1)).tolist()

    found = [Question(tokens(context), [tokens(choice) for _ in range(rng.integers(1, 6))]) for _ in range(n - 1)]
    return [*found, Question([5, 6], [[7], [7, 8], [7], [9]])]


def by_hand(model: torch.nn.Module, question: Question, limit: int = 10**6) -> tuple[list[float], list[bool]]:
    """One choice at a time, the model's own logits in float64 from the softmax on."""
    scores, greedy = [], []
    for choice in question.choices:
        ids = torch.tensor([*question.context, *choice])[-limit - 1 :]
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0, -len(choice) :].double()
        target = torch.tensor(choice)
        scores.append(float(logits.log_softmax(1)[torch.arange(len(choice)), target].sum()))
        greedy.append(bool((logits.argmax(1) == target).all()))
    return scores, greedy


def mistral() -> MistralForCausalLM:
    """A window of five tokens slides over the context."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return MistralForCausalLM(config).eval()


def eager() -> torch.nn.Module:
    model = llama(max_position_embeddings=128)
    model.set_attn_implementation("eager")
    return model


def long_llama() -> torch.nn.Module:
    return llama(max_position_embeddings=128)


# --- choices


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("make", [long_llama, eager, mistral, gemma2, gpt2])
def test_every_choice_equals_one_forward_pass_of_its_own(make: Callable[[], torch.nn.Module], packed: bool) -> None:
    model = make()
    questions = random_questions(40, context=10 if model.config.max_position_embeddings < 128 else 40)
    found = choice_nats(checkpoint_of(model), questions, packed=packed, tokens_per_batch=200)
    for question, (nats, greedy) in zip(questions, found, strict=True):
        expected, top = by_hand(model, question)
        np.testing.assert_allclose(nats, expected, rtol=0, atol=5e-5)
        assert greedy.tolist() == top and nats.dtype == np.float64


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", ["additive", "additive", None]), ("cuda", ["bool", "additive", None])]
)
def test_which_model_takes_packed_rows_is_found_out(
    device: str, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_scorer.MASKS, "cpu", _scorer.MASKS[device])
    taken: list[Any] = []
    original = _scorer._mask_taken
    monkeypatch.setattr(_scorer, "_mask_taken", lambda *a, **k: taken.append(original(*a, **k)) or taken[-1])
    for make in (long_llama, eager, mistral):
        model, questions = make(), random_questions(40, context=40)
        for question, (nats, _) in zip(questions, choice_nats(checkpoint_of(model), questions), strict=True):
            np.testing.assert_allclose(nats, by_hand(model, question)[0], rtol=0, atol=5e-5)
    assert taken == expected


def test_few_questions_take_the_plain_way_and_agree() -> None:
    """Below eight rows it does not pay to try; the numbers are the same ones."""
    checkpoint, questions = checkpoint_of(long_llama()), random_questions(30)
    together = choice_nats(checkpoint, questions)
    for question, (nats, greedy) in zip(questions, together, strict=True):
        alone = choice_nats(checkpoint, [question])[0]
        np.testing.assert_allclose(alone[0], nats, rtol=0, atol=5e-5)
        assert alone[1].tolist() == greedy.tolist()


def test_contexts_that_do_not_fit_are_cut_from_the_left_choice_by_choice() -> None:
    model, limit = llama(max_position_embeddings=16), 16
    questions = [
        *random_questions(20, context=40, choice=10, seed=3),
        Question([1] * 16, [[2], [3], [4, 5], list(range(16))]),
    ]
    found = choice_nats(checkpoint_of(model), questions)
    for question, (nats, _) in zip(questions, found, strict=True):
        np.testing.assert_allclose(nats, by_hand(model, question, limit)[0], rtol=0, atol=5e-5)
    by_count = [max(0, len(q.context) + max(map(len, q.choices)) - 1 - limit) for q in questions]
    assert n_cut(questions, limit).tolist() == by_count and max(by_count) > 20
    shorter = choice_nats(checkpoint_of(model), questions, max_length=11 + 5)
    assert [n.tolist() for n, _ in shorter] == [n.tolist() for n, _ in found]


def test_a_row_holds_no_more_choices_than_the_model_has_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    widest = []
    original = _scorer._forward

    def spy(model: Any, rows: Any, batch: Any, *rest: Any, **more: Any) -> Any:
        widest.append(max(len(rows.tokens[r]) for r in batch))
        return original(model, rows, batch, *rest, **more)

    monkeypatch.setattr(_scorer, "_forward", spy)
    question = Question([1, 2, 3], [[4, 5, 6, 7, n] for n in range(1, 20)])
    model = llama(max_position_embeddings=16)
    found = choice_nats(checkpoint_of(model), [question] * 10)
    assert max(widest) <= 16
    np.testing.assert_allclose(found[0][0], by_hand(model, question)[0], rtol=0, atol=5e-5)


def test_ties_are_broken_as_argmax_breaks_them() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    nats, greedy = choice_nats(checkpoint_of(model), [Question([1], [[0], [1], [0, 0], [0, 3]])])[0]
    np.testing.assert_allclose(nats, -np.log(64) * np.array([1, 1, 2, 2]), rtol=1e-6)
    assert greedy.tolist() == [True, False, True, False]


def test_equal_bits_and_nothing_disturbed() -> None:
    model = long_llama().train()
    model.model.layers[1].eval()
    checkpoint, before = checkpoint_of(model), state_of(model)
    questions = random_questions(30)
    first, again = choice_nats(checkpoint, questions), choice_nats(checkpoint, questions)
    assert [n.tobytes() for n, _ in first] == [n.tobytes() for n, _ in again]
    assert state_of(model) == before
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_bf16_stays_near() -> None:
    questions = random_questions(30)
    exact = choice_nats(checkpoint_of(long_llama()), questions)
    rough = choice_nats(checkpoint_of(long_llama(), autocast_dtype=torch.bfloat16), questions)
    gaps = np.concatenate([np.abs(a - b) for (a, _), (b, _) in zip(exact, rough, strict=True)])
    assert 1e-3 < gaps.max() < 2


# --- texts


def letters(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    tokens = ["<s>", " ", *"abcdef", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_questions_are_split_where_lm_eval_splits() -> None:
    tokenizer = letters(("a", "b"), (" ", "c"))
    token = tokenizer.get_vocab()
    cases = {
        ("fa", "cd"): ([token["f"], token["a"]], [token["c"], token["d"]], False),
        ("f ", "cd"): ([token["f"]], [token[" c"], token["d"]], False),
        ("fa", "bcd"): ([token["f"], token["a"]], [token["c"], token["d"]], True),
        ("", "ab"): ([token["<s>"]], [token["ab"]], False),
        ("  ", "a"): ([token["<s>"]], [token[" "], token[" "], token["a"]], False),
        ("", "<s>a"): ([token["<s>"]], [token["a"]], False),
    }
    for (context, continuation), (start, rest, is_merged) in cases.items():
        found = encode_pairs(tokenizer, [(context, continuation)])[0]
        assert (found.context, found.continuation, found.is_merged) == (start, rest, is_merged)
        assert encode_question(tokenizer, context, continuation) == (start, rest)
    with pytest.raises(ConfigError, match="no token is left"):
        encode_question(tokenizer, "fa", "b")  # "ab" is one token: nothing is behind it


# --- whole documents


def test_rolling_equals_the_plain_reference() -> None:
    rng, checkpoint = np.random.default_rng(0), checkpoint_of(llama())
    documents = [rng.integers(1, VOCABULARY, n).tolist() for n in (1, 15, 16, 17, 100, 15)]
    found = rolling_nats(checkpoint, [*documents, []], prefix_id=EOS, tokens_per_batch=50)
    expected = [-measure_plain(checkpoint, np.array(ids), prefix_id=EOS, max_length=16) for ids in documents]
    np.testing.assert_allclose(found, [*expected, 0.0], rtol=0, atol=1e-4)
    assert rolling_nats(checkpoint, [], prefix_id=EOS).tolist() == []


# --- generation


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def reads(model: torch.nn.Module, **changes: Any) -> Checkpoint:
    return checkpoint_of(model, tokenizer=word_tokenizer(eos_token="<eos>"), tokenizer_sha256="b", **changes)


def written_by_hand(checkpoint: Checkpoint, prompt: str, n: int, limit: int) -> list[int]:
    """One token after another, the whole text computed each time."""
    ids = checkpoint.tokenizer.encode(prompt)[-(limit - n) :]
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(checkpoint.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            return ids[start:-1]
    return ids[start:]


@pytest.mark.parametrize("make", [long_llama, eager, mistral, gemma2, gpt2])
def test_many_prompts_at_once_are_continued_as_each_alone(make: Callable[[], torch.nn.Module]) -> None:
    checkpoint, rng = reads(make()), np.random.default_rng(5)
    limit = checkpoint.model.config.max_position_embeddings
    prompts = [words(rng.integers(1, VOCABULARY, n).tolist()) for n in (1, 2, 3, 3, 5, 8, 13, 20, 40, 60)]
    expected = [words(written_by_hand(checkpoint, prompt, 8, limit)) for prompt in prompts]
    for rows in (1, 4, 16):
        assert generate(checkpoint, prompts, max_new_tokens=8, batch_rows=rows) == expected
    assert generate(checkpoint, prompts[:3], max_new_tokens=8, cached=False) == expected[:3]
    assert len(set(expected)) > 5


def test_generation_ends_at_a_stop_and_leaves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, rng = reads(long_llama()), np.random.default_rng(6)
    prompts = [words(rng.integers(1, VOCABULARY, n).tolist()) for n in (4, 6, 7, 9)]
    free = generate(checkpoint, prompts, max_new_tokens=10)
    stop = free[0].split()[2]  # the third word of the first
    rows_alive: list[int] = []
    original = _generate._Runner.advance

    def spy(self: Any, places: list[int], tokens: list[int]) -> None:
        rows_alive.append(len(places))
        original(self, places, tokens)

    monkeypatch.setattr(_generate._Runner, "advance", spy)
    stopped = generate(checkpoint, prompts, max_new_tokens=10, stop=[f"{stop} ", stop])
    assert stopped == [text.split(stop)[0] for text in free]
    assert min(rows_alive[6:]) < 4  # the first six are of finding out what the model takes


def test_a_model_without_a_cache_is_run_without_one() -> None:
    model = long_llama()
    checkpoint, prompts = reads(model), ["w1 w2 w3", "w4"]
    expected = generate(checkpoint, prompts, max_new_tokens=5)
    original = model.model.forward
    model.model.forward = lambda *a, **k: original(*a, **k | {"use_cache": False})
    assert generate(checkpoint, prompts, max_new_tokens=5) == expected


def test_generation_disturbs_nothing() -> None:
    model = long_llama().train()
    before = state_of(model)
    generate(reads(model), ["w1 w2", ""], max_new_tokens=3)
    assert state_of(model) == before


# --- what a user can get wrong


def test_mistakes_are_one_line() -> None:
    model, broken = llama(), llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    good, bad, names = checkpoint_of(model), reads(broken), ["first", "second"]
    two = [Question([1], [[2], [3]]), Question([1, 7], [[2], [3]])]
    long, longer = [Question([1] * 16, [[2, 3]])], [Question([1], [[2] * 17])]
    room = {"max_new_tokens": 10, "too_long": "refuse"}
    cases: list[tuple[type[ClbenchError], str, Any]] = [
        (NonFiniteError, "second", lambda: choice_nats(bad, two, names=names)),
        (NonFiniteError, "question 1", lambda: choice_nats(bad, two)),
        (NonFiniteError, "document 1", lambda: rolling_nats(bad, [[1, 2], [7, 1]], prefix_id=EOS)),
        (NonFiniteError, "prompt 1", lambda: generate(bad, ["w1", "w7"], max_new_tokens=2)),
        (ConfigError, "no choice", lambda: choice_nats(good, [Question([1], [])])),
        (ConfigError, "a choice without tokens", lambda: choice_nats(good, [Question([1], [[2], []])])),
        (ConfigError, "a context without tokens", lambda: choice_nats(good, [Question([], [[2]])])),
        (ConfigError, "a choice has 17 tokens, the model reads 16", lambda: choice_nats(good, longer)),
        (ConfigError, "have 18 tokens, the model reads 16", lambda: choice_nats(good, long, too_long="refuse")),
        (ConfigError, "more than the model's 16", lambda: choice_nats(good, long, max_length=17)),
        (ConfigError, "beyond the model's vocabulary of 64", lambda: choice_nats(good, [Question([64], [[2]])])),
        (ConfigError, "beyond the model's vocabulary of 64", lambda: rolling_nats(good, [[64]], prefix_id=EOS)),
        (ConfigError, "without a tokenizer", lambda: generate(good, ["w1"], max_new_tokens=2)),
        (ConfigError, "do not fit", lambda: generate(bad, ["w1"], max_new_tokens=16)),
        (
            ConfigError,
            "there is room for 6",
            lambda: generate(bad, [words([1] * 9)], **room),
        ),
    ]
    for kind, said, act in cases:
        with pytest.raises(kind, match=said) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert choice_nats(good, []) == [] and generate(bad, [], max_new_tokens=2) == []
