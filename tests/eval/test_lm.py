from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from clbench import home, pretrained
from clbench.errors import ConfigError, NonFiniteError
from clbench.eval._lm import ClbenchLM, Note
from clbench.suite import Checkpoint
from tests.eval.test_heldout import gemma2, gpt2, llama, state_of, word_tokenizer
from tests.eval.test_scorer import checkpoint_of

VOCABULARY, EOS = 64, 0
WORDS = [f"w{i}" for i in range(1, VOCABULARY)]


def text(n: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n).tolist())


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def checkpoint_with(model: torch.nn.Module, tokenizer: Any = None) -> Checkpoint:
    return checkpoint_of(model, tokenizer=tokenizer or word_tokenizer(eos_token="<eos>"), tokenizer_sha256="b")


def stock(checkpoint: Checkpoint, **options: Any) -> HFLM:
    """lm-eval's own, on copies: it changes the model and the tokenizer that it is given."""
    model, tokenizer = copy.deepcopy(checkpoint.model), copy.deepcopy(checkpoint.tokenizer)
    return HFLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 4} | options)


def both(checkpoint: Checkpoint, kind: str, arguments: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
    ours = getattr(ClbenchLM(checkpoint, tokens_per_batch=100), kind)(instances(kind, arguments))
    return ours, getattr(stock(checkpoint), kind)(instances(kind, arguments), disable_tqdm=True)


def letters(*merges: tuple[str, str], bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a letter, but for what merges say: a tokenizer that merges over spaces and boundaries."""
    tokens = ["<s>", "</s>", " ", *"abcdefgh", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    tokenizer.decoder = decoders.Fuse()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# --- equal to lm-eval's own


@pytest.mark.parametrize("make", [llama, gemma2, gpt2])
def test_log_likelihoods_equal_stock(make: Any) -> None:
    """Shared contexts, single contexts, empty ones, spaces at the end, and ones longer than the 16 positions."""
    arguments = [
        (text(n, seed=n), f" {text(k, seed=100 * n + k + choice)}")
        for n, k in itertools.product((1, 5, 9, 14, 40), (1, 2, 6))
        for choice in range(3)
    ]
    arguments += [
        ("", text(3, 7)),
        ("w1 w2  ", "w3"),
        ("w1 w2 ", "w3"),
        ("w1 w2 ", "w4 w5"),
        ("w1", " w1"),
        ("w1", " w1"),
    ]
    ours, theirs = both(checkpoint_with(make()), "loglikelihood", arguments)
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], rtol=0, atol=5e-5)
    assert [g for _, g in ours] == [g for _, g in theirs]


@pytest.mark.parametrize("bos", [False, True])
def test_merging_tokenizers_are_split_as_lm_eval_splits(bos: bool) -> None:
    tokenizer = letters(("a", "b"), ("b", "c"), (" ", "d"), (" d", "e"), bos=bos)
    arguments = [("fa", "bc"), ("fa", "bcd"), ("ga", "h"), ("g ", "de"), ("g ", "dh"), ("", "ab"), ("<s>a", "gg")]
    checkpoint = checkpoint_with(llama(), tokenizer)
    lm = ClbenchLM(checkpoint)
    ours = lm.loglikelihood(instances("loglikelihood", arguments))
    assert [note.is_merged for note in lm.notes] == [True, True, False, False, False, False, False]
    theirs = stock(checkpoint).loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], rtol=0, atol=5e-5)


def test_rolling_equals_stock() -> None:
    ours, theirs = both(checkpoint_with(llama()), "loglikelihood_rolling", [(text(n, n),) for n in (1, 15, 16, 17, 90)])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_equals_stock(make: Any) -> None:
    settings = [
        {"until": ["w3"], "max_gen_toks": 8, "do_sample": False},
        {"until": ["w3 w4", "w5"], "max_gen_toks": 5},
        {"until": [], "max_gen_toks": 3, "temperature": 0.0},
    ]
    arguments = [(text(n, n), settings[n % 3]) for n in (1, 2, 3, 4, 5, 7, 8, 10, 12, 30, 31)]
    checkpoint = checkpoint_with(make())
    ours = ClbenchLM(checkpoint).generate_until(instances("generate_until", arguments))
    # One by one: in a batch lm-eval goes on behind an end-of-text token that only the tokenizer knows of.
    theirs = stock(checkpoint, batch_size=1).generate_until(instances("generate_until", arguments), disable_tqdm=True)
    assert ours == theirs and len(set(ours)) > 5


def test_the_plain_way_is_the_same() -> None:
    checkpoint = checkpoint_with(llama())
    arguments = [(text(n, n), f" {text(4, choice)}") for n in range(2, 14) for choice in range(4)]
    packed, plain = (
        [v for v, _ in ClbenchLM(checkpoint, packed=p).loglikelihood(instances("loglikelihood", arguments))]
        for p in (True, False)
    )
    np.testing.assert_allclose(packed, plain, rtol=0, atol=5e-5)
    assert packed != plain


def prepared_smollm2() -> Path | None:
    """The real model where the developer has prepared it, from before tests hid the cache folder."""
    folder = home.models_folder() / pretrained.model_folder("smollm2-135m").name
    return folder if (folder / "model.json").is_file() else None


SMOLLM2 = prepared_smollm2()


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="run `clbench prepare model:smollm2-135m`")
def test_a_real_model_gives_lm_evals_own_numbers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    checkpoint = checkpoint_with(model, AutoTokenizer.from_pretrained(SMOLLM2))
    capitals = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo"}
    more = {"Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi"}
    asked = [
        (f"Question: What is the capital of {land}? Answer: the city of", f" {city}, of course")
        for land in capitals | more
        for city in list(capitals.values())[:3]
    ]
    ours, theirs = both(checkpoint, "loglikelihood", asked)
    exact = []
    for context, choice in asked:
        n, ids = len(checkpoint.tokenizer.encode(context)), torch.tensor(checkpoint.tokenizer.encode(context + choice))
        with torch.no_grad():
            log_p = model(ids[None, :-1]).logits[0, n - 1 :].double().log_softmax(1)
        exact.append(float(log_p.gather(1, ids[n:, None]).sum()))
    np.testing.assert_allclose([v for v, _ in ours], exact, rtol=0, atol=5e-5)
    # lm-eval's softmax is in float32: over 49,152 tokens it is 2e-5 a token off where torch uses AVX2.
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], rtol=0, atol=2e-4)
    assert [g for _, g in ours] == [g for _, g in theirs]
    text_ = "Rome is the capital of Italy. " * 3
    ours, theirs = both(checkpoint, "loglikelihood_rolling", [(text_,)])
    ids = torch.tensor([0, *checkpoint.tokenizer.encode(text_)])  # 0 is the prefix, <|endoftext|>
    with torch.no_grad():
        log_p = model(ids[None, :-1]).logits[0].double().log_softmax(1)
    assert ours[0] == pytest.approx(float(log_p.gather(1, ids[1:, None]).sum()), abs=5e-5)
    # There, too, lm-eval's softmax is in float32; the model in float64 has -52.393558.
    assert ours[0] == pytest.approx(theirs[0], abs=3e-5 * len(ids))
    written = [
        ("The capital of France is", {"until": ["."], "max_gen_toks": 8}),
        ("1 2 3 4", {"until": ["\n"], "max_gen_toks": 8}),
    ]
    ours, theirs = both(checkpoint, "generate_until", written)
    assert ours == theirs and "Paris" in ours[0]


# --- nothing is disturbed


def test_model_and_tokenizer_are_left_as_they_were() -> None:
    """lm-eval's own class would leave evaluation mode, tied weights and a padding token behind."""
    model = llama(tie_word_embeddings=True, attention_dropout=0.5)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)  # untied behind its back
    model.train()
    tokenizer = word_tokenizer(eos_token="<eos>")
    checkpoint, before = checkpoint_with(model, tokenizer), state_of(model)
    lm = ClbenchLM(checkpoint)
    lm.loglikelihood(instances("loglikelihood", [("w1", " w2")]))
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("w1 w2",)]))
    lm.generate_until(instances("generate_until", [("w1", {"until": [], "max_gen_toks": 3})]))
    lm.generate_until(
        instances("generate_until", [("w1", {"until": [], "max_gen_toks": 3, "do_sample": True, "temperature": 1.0})])
    )
    assert state_of(model) == before
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert tokenizer.pad_token is None and lm.tokenizer.pad_token is not None
    stock_lm = HFLM(pretrained=model, tokenizer=tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training and stock_lm is not None


def test_sampling_has_a_seed_of_its_own() -> None:
    checkpoint = checkpoint_with(llama())
    settings = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(ClbenchLM(checkpoint).generate_until(instances("generate_until", [("w1 w2", settings)] * 3)))
    assert runs[0] == runs[1]
    greedy = ClbenchLM(checkpoint).generate_until(
        instances("generate_until", [("w1 w2", {"until": [], "max_gen_toks": 10})])
    )
    assert greedy[0] not in runs[0]


# --- what a user can get wrong


def test_notes_count_what_was_cut() -> None:
    lm = ClbenchLM(checkpoint_with(llama()))
    lm.loglikelihood(instances("loglikelihood", [("w1 w2", " w3"), (text(20, 1), " w3 w4")]))
    assert lm.notes == [Note(n_tokens=1), Note(n_tokens=2, n_cut_tokens=20 + 2 - 1 - 16)]


def test_mistakes_are_one_line() -> None:
    broken = llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    good, bad = ClbenchLM(checkpoint_with(llama())), ClbenchLM(checkpoint_with(broken))
    many = {"until": [], "max_gen_toks": 16}
    cases: list[tuple[type[Exception], str, Any]] = [
        (ConfigError, "without a tokenizer", lambda: ClbenchLM(replace(checkpoint_with(llama()), tokenizer=None))),
        (ConfigError, "no beginning-of-text", lambda: ClbenchLM(checkpoint_with(llama(), word_tokenizer()))),
        (ConfigError, "no token is left", lambda: good.loglikelihood(instances("loglikelihood", [("w1", "")]))),
        (
            ConfigError,
            "a choice has 17 tokens",
            lambda: good.loglikelihood(instances("loglikelihood", [("w1", f" {text(17, 0)}")])),
        ),
        (ConfigError, "do not fit", lambda: good.generate_until(instances("generate_until", [("w1", many)]))),
        (
            NonFiniteError,
            "w2 w7",
            lambda: bad.loglikelihood(instances("loglikelihood", [("w1", " w2"), ("w2 w7", " w1")])),
        ),
        (
            NonFiniteError,
            "w3 w7",
            lambda: bad.loglikelihood_rolling(instances("loglikelihood_rolling", [("w3 w7 w1",)])),
        ),
        (
            NonFiniteError,
            "w5 w7",
            lambda: bad.generate_until(instances("generate_until", [("w5 w7", {"until": [], "max_gen_toks": 2})])),
        ),
    ]
    for kind, words, act in cases:
        with pytest.raises(kind, match=words) as caught:
            act()
        assert "\n" not in str(caught.value)
