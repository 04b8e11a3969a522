from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.eval.test_heldout import gemma2, gpt2, llama, state_of, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from clbench.errors import ClbenchError, ConfigError, NonFiniteError
from clbench.eval import _scorer
from clbench.eval._scorer import Question, choice_nats, encode_pairs, encode_question, generate, n_cut, rolling_nats
from clbench.eval.heldout import measure_plain
from clbench.suite import Checkpoint

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


def test_which_model_takes_packed_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    original = _scorer._mask_taken
    monkeypatch.setattr(_scorer, "_mask_taken", lambda *a, **k: taken.append(original(*a, **k)) or taken[-1])
    for make in (long_llama, eager, mistral):
        choice_nats(checkpoint_of(make()), random_questions(40, context=40))
    assert taken == ["bool", "additive", None]
