from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from clbench.errors import ClbenchError, ConfigError, IntegrityError, NonFiniteError
from clbench.eval._forward import head_is_all, undisturbed
from clbench.eval._windows import rolling_windows
from clbench.eval.heldout import Heldout, measure_plain
from clbench.stream import Stream
from clbench.suite import Checkpoint

VOCABULARY, EOS, CONTEXT = 64, 0, 16
LENGTHS = [[1, 2, 15, 16], [17, 31, 32, 33, 5], [100, 1, 48]]
"""Tokens of the documents of three stages: shorter than, equal to and many times the context."""


def write_stream(folder: Path, stages: list[list[list[int]]], texts: list[list[str]] | None = None) -> Stream:
    """Write a built stream by hand, as clbench/stream.py lays it out; token i is the word ``wi`` in the text."""
    (folder / "tokens").mkdir(parents=True)
    for stage, documents in enumerate(stages):
        packed = np.array([i for ids in documents for i in [*ids, EOS]], dtype=np.uint16)
        packed.tofile(folder / "tokens" / f"heldout-{stage:02d}.bin")
        ends = np.cumsum([0, *(len(ids) + 1 for ids in documents)])
        np.save(folder / "tokens" / f"heldout-{stage:02d}.offsets.npy", ends.astype(np.int64))
        words = texts[stage] if texts else [" ".join(f"w{i}" for i in ids) for ids in documents]
        columns = {
            "id": [f"s{stage}/d{n}" for n in range(len(documents))],
            "text": words,
            "group": [f"group-{stage}"] * len(documents),
            "change": ["new"] * len(documents),
            "n_bytes": [len(text.encode()) for text in words],
        }
        target = folder / "documents" / "split=heldout" / f"stage={stage:02d}"
        target.mkdir(parents=True)
        pq.write_table(pa.table(columns), target / "part-0.parquet")
    manifest = {
        "name": "by-hand",
        "sha256": "0" * 64,
        "tokenizer": {"eos_id": EOS, "vocab_size": VOCABULARY, "dtype": "uint16"},
        "stages": [
            {"index": i, "name": str(i), "start": "2001-01-01", "end": "2001-12-31"} for i in range(len(stages))
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Stream(folder)


def random_documents(lengths: list[list[int]], seed: int = 0) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    return [[rng.integers(1, VOCABULARY, n).tolist() for n in row] for row in lengths]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    return write_stream(tmp_path_factory.mktemp("streams") / "by-hand", random_documents(LENGTHS))


def llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def gemma2(max_position_embeddings: int = CONTEXT) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        max_position_embeddings=max_position_embeddings,
        final_logit_softcapping=3.0,
        initializer_range=0.5,
        pad_token_id=None,
    )
    return Gemma2ForCausalLM(config).eval()


def gpt2(n_positions: int = CONTEXT) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=n_positions, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def checkpoint_of(model: torch.nn.Module, **changes: Any) -> Checkpoint:
    base = Checkpoint(model=model, weights_sha256="a" * 64, device=torch.device("cpu"), autocast_dtype=None)
    return replace(base, **changes)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": EOS, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def plain_values(checkpoint: Checkpoint, documents: list[list[list[int]]], max_length: int = CONTEXT) -> list[float]:
    return [
        measure_plain(checkpoint, np.array(ids), prefix_id=EOS, max_length=max_length)
        for row in documents
        for ids in row
    ]


# --- values


@pytest.mark.parametrize("make", [llama, gemma2, gpt2], ids=["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("max_length", [None, 7])
def test_every_document_equals_the_plain_reference(
    stream: Stream, make: Callable[[], torch.nn.Module], max_length: int | None
) -> None:
    checkpoint = checkpoint_of(make())
    rows = Heldout(stream, Heldout.Options(max_length=max_length, tokens_per_batch=64)).measure(checkpoint)
    expected = plain_values(checkpoint, random_documents(LENGTHS), max_length or CONTEXT)
    np.testing.assert_allclose(rows.value, expected, rtol=0, atol=1e-4)
    assert rows.value.min() > 0.01


def test_rows_say_what_they_are_about(stream: Stream) -> None:
    rows = Heldout(stream).measure(checkpoint_of(llama()))
    assert rows.item == [f"s{s}/d{n}" for s, row in enumerate(LENGTHS) for n in range(len(row))]
    assert rows.stage.tolist() == [0] * 4 + [1] * 5 + [2] * 3
    assert rows.n_tokens.tolist() == [n for row in LENGTHS for n in row]  # the EOS behind a document is not counted
    assert rows.n_bytes.tolist() == [
        len(t.encode()) for s in range(3) for t in stream.documents("heldout", s)["text"].to_pylist()
    ]
    assert rows.group == [f"group-{s}" for s in rows.stage] and set(rows.change) == {"new"}
    assert rows.metric == ["nll_nats"] * 12 and rows.value.dtype == np.float64


def test_a_bigram_table_gives_losses_known_by_hand(tmp_path: Path) -> None:
    """Residual branches of zero leave logits that depend on the token read last and nothing else: a bigram table."""
    size = 8
    table = np.random.default_rng(1).normal(0, 2, (size, size))
    model = llama(vocab_size=size, hidden_size=size, num_hidden_layers=1, rms_norm_eps=1e-12, max_position_embeddings=4)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(torch.tensor(table.T / np.sqrt(size)))  # RMSNorm makes one-hot rows sqrt(size) long
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    documents = [[3], [5, 5, 2], [1, 2, 3, 4, 5, 6, 7, 1, 1]]
    rows = Heldout(write_stream(tmp_path / "s", [documents])).measure(checkpoint_of(model))
    by_hand = [
        -log_p[0, 3],
        -(log_p[0, 5] + log_p[5, 5] + log_p[5, 2]),
        -sum(log_p[a, b] for a, b in zip([0, 1, 2, 3, 4, 5, 6, 7, 1], documents[2], strict=True)),
    ]
    np.testing.assert_allclose(rows.value, by_hand, rtol=0, atol=1e-5)


def test_windows_are_those_of_lm_eval() -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for n in range(1, 40):
        for max_length in (1, 2, 5, 16):
            tokens = list(range(1, n + 1))
            sequence = [0, *tokens]
            theirs = [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=max_length, context_len=1)
            ]
            ours = rolling_windows(n, max_length)
            assert [sequence[s:e] for s, e, _ in ours] == [(c + t)[:-1] for c, t in theirs]
            assert [sequence[e + 1 - k : e + 1] for _, e, k in ours] == [t for _, t in theirs]


def test_documents_equal_lm_eval_rolling_loglikelihood(stream: Stream) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = llama()
    texts = [t for s in range(3) for t in stream.documents("heldout", s)["text"].to_pylist()]
    lm = HFLM(pretrained=model, tokenizer=word_tokenizer(eos_token="<eos>"), batch_size=4, device="cpu")
    requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(t,), idx=0) for t in texts]
    theirs = -np.array(lm.loglikelihood_rolling(requests, disable_tqdm=True))
    np.testing.assert_allclose(Heldout(stream).measure(checkpoint_of(model)).value, theirs, rtol=0, atol=1e-4)


def test_batch_size_moves_nothing_and_repeating_not_a_bit(stream: Stream) -> None:
    checkpoint = checkpoint_of(llama())
    suite = Heldout(stream)
    first, again = suite.measure(checkpoint), Heldout(stream).measure(checkpoint)
    assert first.value.tobytes() == again.value.tobytes() == suite.measure(checkpoint).value.tobytes()
    for size in (1, 16, 40, 1000):
        options = Heldout.Options(tokens_per_batch=size)
        np.testing.assert_allclose(Heldout(stream, options).measure(checkpoint).value, first.value, rtol=0, atol=1e-4)


def test_tinydocs_as_built_equals_its_own_tokenizer(tinydocs: Stream) -> None:
    from transformers import AutoTokenizer

    model = llama(vocab_size=tinydocs.vocab_size, max_position_embeddings=32)
    tokenizer = AutoTokenizer.from_pretrained(tinydocs.tokenizer_folder)
    packed = Heldout(tinydocs).measure(checkpoint_of(model))
    encoded = Heldout(tinydocs).measure(checkpoint_of(model, tokenizer=tokenizer, tokenizer_sha256="b"))
    assert packed.n_tokens.tolist() == encoded.n_tokens.tolist()
    assert packed.n_bytes.tolist() == encoded.n_bytes.tolist()
    np.testing.assert_array_equal(packed.value, encoded.value)
    assert set(packed.stage.tolist()) == {s.index for s in tinydocs.stages()}


def test_bf16_autocast_stays_near_and_is_used(stream: Stream) -> None:
    exact = Heldout(stream).measure(checkpoint_of(llama())).value
    rough = Heldout(stream).measure(checkpoint_of(llama(), autocast_dtype=torch.bfloat16)).value
    assert 1e-4 < np.abs(rough - exact).max() / exact.max() < 0.05


# --- a tokenizer that is not the stream's


def test_foreign_tokenizer_counts_bytes_of_the_text_and_starts_from_its_bos(tmp_path: Path) -> None:
    texts = [["naïve café", "日本語 text"], ["plain ascii"]]
    letters = sorted({c for row in texts for t in row for c in t})
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    foreign = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    stream = write_stream(tmp_path / "s", [[[9], [9]], [[9]]], texts)
    checkpoint = checkpoint_of(llama(), tokenizer=foreign, tokenizer_sha256="c")
    rows = Heldout(stream).measure(checkpoint)
    flat = [t for row in texts for t in row]
    assert rows.n_bytes.tolist() == [12, 14, 11]
    assert rows.n_tokens.tolist() == [len(t) for t in flat]
    ids = [np.array([letters.index(c) + 2 for c in t]) for t in flat]
    expected = [measure_plain(checkpoint, i, prefix_id=0, max_length=CONTEXT) for i in ids]
    np.testing.assert_allclose(rows.value, expected, rtol=0, atol=1e-4)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    shifted = Heldout(stream).measure(checkpoint_of(llama(), tokenizer=other, tokenizer_sha256="d"))
    expected = [measure_plain(checkpoint, i, prefix_id=1, max_length=CONTEXT) for i in ids]
    np.testing.assert_allclose(shifted.value, expected, rtol=0, atol=1e-4)


# --- which path, what it costs


def test_capped_logits_take_the_plain_path_and_the_cap_matters() -> None:
    ids = torch.arange(1, 11)[None]
    assert head_is_all(llama(), ids) and head_is_all(gpt2(), ids)
    model = gemma2()
    assert not head_is_all(model, ids)
    with torch.no_grad():
        uncapped = model.lm_head(model.model(ids).last_hidden_state)
        assert (uncapped - model(ids).logits).abs().max() > 1


def test_equal_documents_are_computed_once_and_get_equal_losses(tmp_path: Path) -> None:
    stage = random_documents([[3, 40, 9]])[0]
    checkpoint = checkpoint_of(llama())
    once = Heldout(write_stream(tmp_path / "once", [stage]))
    thrice = Heldout(write_stream(tmp_path / "thrice", [stage, stage[::-1], stage]))
    value = thrice.measure(checkpoint).value.reshape(3, 3)
    assert value[0].tolist() == value[1][::-1].tolist() == value[2].tolist() == once.measure(checkpoint).value.tolist()
    assert thrice.flops(checkpoint) == once.flops(checkpoint)


def test_flops_count_windows_without_padding(tmp_path: Path) -> None:
    model = llama()
    width, kv, hidden, layers = 32, 16, 64, 2
    weights = layers * (2 * width * width + 2 * width * kv + 3 * width * hidden) + width * VOCABULARY
    suite = Heldout(write_stream(tmp_path / "s", [[[1] * 3, [2] * 20]]))
    by_hand = sum(2 * n * weights + 2 * layers * n * n * width for n in (3, 16, 16))  # 20 = 16 + 4, drawn back to 16
    assert suite.flops(checkpoint_of(model)) == by_hand


def test_the_address_depends_on_what_decides_values(stream: Stream) -> None:
    plain = Heldout(stream).sha256()
    assert Heldout(stream, Heldout.Options(tokens_per_batch=64)).sha256() == plain
    assert Heldout(stream, Heldout.Options(max_length=8)).sha256() != plain


# --- nothing is disturbed


def state_of(model: torch.nn.Module) -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        [m.training for m in model.modules()],
        model.config.to_dict(),
        {name: b.tolist() for name, b in model.named_buffers()},
        sorted(name for m in model.modules() for name in vars(m)),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_states_are_left_as_they_were(stream: Stream, fails: bool) -> None:
    model = llama(attention_dropout=0.5, use_cache=True).train()
    model.model.layers[1].eval()  # a mixed state must come back mixed
    if fails:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    before = state_of(model)
    if fails:
        with pytest.raises(NonFiniteError):
            Heldout(stream).measure(checkpoint_of(model))
    else:
        Heldout(stream).measure(checkpoint_of(model))
    assert state_of(model) == before
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_what_a_module_keeps_is_taken_back() -> None:
    model = llama()
    rotary = model.model.rotary_emb
    table, drawn = rotary.inv_freq, torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"), undisturbed(model, torch.device("cpu")):
        rotary.register_buffer("inv_freq", torch.zeros(1))
        rotary.kept = torch.rand(3)
        raise RuntimeError("on purpose")
    assert rotary.inv_freq is table and not hasattr(rotary, "kept")
    assert torch.equal(torch.get_rng_state(), drawn)


# --- what a user can get wrong


def test_the_document_with_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    stream = write_stream(tmp_path / "s", [[[1, 2, 3]], [[4, 5], [1, 7, 2]]])
    with pytest.raises(NonFiniteError, match=r"s1/d1.*stage 1"):
        Heldout(stream).measure(checkpoint_of(model))


def test_mistakes_are_one_line(stream: Stream, tmp_path: Path) -> None:
    empty = write_stream(tmp_path / "empty", [[[1, 2], []]])
    broken = write_stream(tmp_path / "broken", [[[1, 2], [3]]])
    packed = np.fromfile(broken.folder / "tokens" / "heldout-00.bin", dtype=np.uint16)
    packed[2] = 5
    packed.tofile(broken.folder / "tokens" / "heldout-00.bin")
    nameless = checkpoint_of(llama(), tokenizer=word_tokenizer(), tokenizer_sha256="e")
    short = Heldout.Options(max_length=CONTEXT + 1)
    cases: list[tuple[type[ClbenchError], str, Callable[[], Any]]] = [
        (
            ConfigError,
            "more than the model's 16",
            lambda: Heldout(stream, short).measure(checkpoint_of(llama())),
        ),
        (ConfigError, "at least 1", lambda: Heldout(stream, Heldout.Options(max_length=0))),
        (
            ConfigError,
            "beyond the model's vocabulary of 8",
            lambda: Heldout(stream).measure(checkpoint_of(llama(vocab_size=8))),
        ),
        (ConfigError, "'s0/d1' has no tokens", lambda: Heldout(empty).measure(checkpoint_of(llama()))),
        (IntegrityError, "end-of-text", lambda: Heldout(broken).measure(checkpoint_of(llama()))),
        (ConfigError, "no beginning-of-text or end-of-text", lambda: Heldout(stream).measure(nameless)),
    ]
    for kind, words, act in cases:
        with pytest.raises(kind, match=words) as caught:
            act()
        assert "\n" not in str(caught.value)
