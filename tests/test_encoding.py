"""Packed tokens are those that the tokenizer gives text by text, however they were come by."""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clbench import encoding
from clbench.encoding import Encoder, encode_batches, word_pattern

EOS = "<|endoftext|>"
CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's what foxes do, they've 12 345 reasons.\n\n    return x + 1\n",
    "def f(a, b):\n\treturn a['key'] + b  # we'll see\r\n" * 3,
    "naïve café — “quotes”, 東京 и Москва, 1234567 times\u00a0more\u2003than  that   ",
]
ODD = [c for c in map(chr, range(0x3100)) if unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf")]
"""What somebody might take for white space."""
# With tokens that span such characters, a cut in the wrong place shows.
CORPUS.append("".join(f"x{c}  y-{c}-  {c}{c} z.{c} " * 3 for c in ODD))
PARTS = [*" \n\t\r'.,([_-=+aAzé東", "  ", "    ", "'s", "'ll", "the", "quick", "12", "٣", "²", "\u00a0", "\u2028"]
PARTS += ["\x1c", "\x85", "\u180e", "\u200b", "e\u0301", "🦊", EOS, "'S", "İ"]


COST_OF_ASKING = encoding.COST_OF_ASKING


@pytest.fixture(autouse=True, scope="module")
def always_by_words() -> Iterator[None]:
    """Take the way by words also for short texts, for which it does not pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "COST_OF_ASKING", 0)
        yield


def bpe(*before: Any, vocab_size: int = 2000, **byte_level: Any) -> Tokenizer:
    """Return a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **byte_level})
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    """Return a tokenizer with some parts replaced."""
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer with an added token of white space, as GPT-NeoX has."""
    tokenizer.add_tokens([AddedToken("  ", normalized=False)])
    return tokenizer


PLAIN = bpe()
BY_WORDS = {
    "gpt2": PLAIN,
    "digits one by one": bpe(pre_tokenizers.Digits(individual_digits=True)),
    "digits together": bpe(pre_tokenizers.Digits(individual_digits=False)),
}
WHOLE = {
    "prefix space": bpe(add_prefix_space=True),
    "no expression": bpe(use_regex=False),
    "normalizer": with_(bpe(), normalizer=normalizers.NFKC()),
    "added token": with_token(bpe()),
    "metaspace": with_(bpe(), pre_tokenizer=pre_tokenizers.Metaspace()),
    "nothing": with_(bpe(), pre_tokenizer=None),
    "punctuation first": bpe(pre_tokenizers.Punctuation()),
}


def expected(tokenizer: Tokenizer, texts: Sequence[str], eos_id: int) -> tuple[list[int], list[int]]:
    """Return tokens and lengths by asking for one text after the other."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    rows = [[*tokenizer.encode(text, add_special_tokens=False).ids, eos_id] for text in texts]
    return [token for row in rows for token in row], [len(row) for row in rows]


def check(found: tuple[NDArray[Any], NDArray[np.int64]], tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Hold an encoder's answer to the tokenizer's own."""
    tokens, lengths = expected(tokenizer, texts, eos_id=0)
    assert found[0].tolist() == tokens
    assert found[1].tolist() == lengths


@pytest.mark.parametrize("name", [*BY_WORDS, *WHOLE])
def test_the_way_that_is_taken(name: str) -> None:
    assert (word_pattern((BY_WORDS | WHOLE)[name]) is not None) == (name in BY_WORDS)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), max_size=4), st.sampled_from([*BY_WORDS]))
def test_tokens_are_the_tokenizers_own_by_words(texts: list[str], name: str) -> None:
    check(Encoder(BY_WORDS[name], eos_id=0, dtype="uint16").encode(texts), BY_WORDS[name], texts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=4))
def test_tokens_are_the_tokenizers_own_for_any_text(texts: list[str]) -> None:
    check(Encoder(PLAIN, eos_id=0, dtype="uint16").encode(texts), PLAIN, texts)


@pytest.mark.parametrize("name", WHOLE)
def test_tokens_are_the_tokenizers_own_where_texts_are_encoded_whole(name: str) -> None:
    texts = [*CORPUS, "", *(f"{a}{b} {a}" for a in PARTS[:20] for b in PARTS[20:])]
    check(Encoder(WHOLE[name], eos_id=0, dtype="uint32").encode(texts), WHOLE[name], texts)


@pytest.mark.parametrize("name", BY_WORDS)
def test_every_character_that_might_be_white_space_and_every_pair_of_ascii(name: str) -> None:
    """The places to cut hang on what the tokenizer's expression takes for white space, a letter or a digit."""
    odd = [*ODD, *(c for c in map(chr, range(128, 0x3100)) if unicodedata.category(c) in ("No", "Nl", "Nd"))]
    texts = [t for c in odd for t in (f"x{c}  y", f"x  {c}y", f"-{c}", f"-{c}  -", f"{c}  1", f".{c} {c}{c} 1")]
    ascii_ = list(map(chr, range(128)))
    texts += [f"{a}{b}{c}" for a in ascii_ for b in ascii_ for c in (" ", "a1", "1")]
    check(Encoder(BY_WORDS[name], eos_id=0, dtype="uint16").encode(texts), BY_WORDS[name], texts)


def test_small_portions_and_a_memory_that_overflows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PORTION_CHARACTERS", 40)
    monkeypatch.setattr(encoding, "REMEMBERED", 10)
    monkeypatch.setattr(encoding, "REMEMBERED_CHARACTERS", 4)
    texts = [*CORPUS, "", "x" * 100 + " " + "y" * 100, "\n" * 90, *CORPUS, "a" * 40]
    encoder = Encoder(PLAIN, eos_id=0, dtype="uint16")
    for _ in range(3):
        check(encoder.encode(texts), PLAIN, texts)
        for memory in (encoder._pieces, encoder._words):
            assert len(memory._recent) < 100
            assert max(map(len, memory._recent)) <= 4


def test_fresh_text_is_encoded_whole_and_words_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Watched(Encoder):
        def _ask(self, texts: list[str]) -> list[bytes]:
            asked.append(len(texts))
            return super()._ask(texts)

    monkeypatch.setattr(encoding, "PORTION_CHARACTERS", 2000)
    monkeypatch.setattr(encoding, "COST_OF_ASKING", COST_OF_ASKING)
    encoder = Watched(PLAIN, eos_id=0, dtype="uint16")
    fresh = [" ".join(f"x{i}y{1000 * k + i}" for i in range(200)) for k in range(40)]
    check(encoder.encode(fresh), PLAIN, fresh)
    assert max(asked) < 10  # texts or parts of texts, never hundreds of words
    known = [CORPUS[1] * 20] * 80
    check(encoder.encode(known), PLAIN, known)
    asked.clear()
    check(encoder.encode(known), PLAIN, known)
    assert set(asked) <= {0}  # all of it is known by now


def test_batches_texts_and_everything_may_be_empty() -> None:
    assert list(encode_batches(PLAIN, [], eos_id=0, dtype="uint16")) == []
    none, blank, last = encode_batches(PLAIN, [[], ["", ""], ["the"]], eos_id=7, dtype="uint16")
    assert none[0].dtype == np.uint16
    assert (none[0].tolist(), none[1].tolist()) == ([], [])
    assert (blank[0].tolist(), blank[1].tolist()) == ([7, 7], [1, 1])
    assert last[0].tolist() == expected(PLAIN, ["the"], 7)[0]


def test_a_very_long_text_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is larger than a portion while it is encoded, though the text is twenty of them."""
    asked: list[int] = []

    class Watched(Encoder):
        def _ask(self, texts: list[str]) -> list[bytes]:
            asked.append(sum(map(len, texts)))
            return super()._ask(texts)

    monkeypatch.setattr(encoding, "PORTION_CHARACTERS", 1 << 14)
    line = "".join(CORPUS)
    text = line * (20 * (1 << 14) // len(line))
    check(Watched(PLAIN, eos_id=0, dtype="uint16").encode([text]), PLAIN, [text])
    assert max(asked) <= (1 << 14) + len(line)


def test_the_callers_tokenizer_is_left_alone_and_its_additions_are_ignored() -> None:
    tokenizer = bpe()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    before = tokenizer.to_str()
    texts = [f"the quick {EOS} fox", "a"]
    check(Encoder(tokenizer, eos_id=0, dtype="uint16").encode(texts), PLAIN, texts)
    assert tokenizer.to_str() == before
    assert not tokenizer.encode_special_tokens


def test_ids_that_do_not_fit_are_refused() -> None:
    tokenizer = PLAIN
    with pytest.raises(OverflowError):
        list(encode_batches(tokenizer, [["the quick"]], eos_id=1 << 16, dtype="uint16"))


def test_errors_of_both_threads_surface_and_no_thread_stays() -> None:
    n_threads = threading.active_count()

    def broken() -> Iterator[list[str]]:
        yield ["the"]
        yield ["quick"]
        raise OSError("disk")

    batches = encode_batches(PLAIN, broken(), eos_id=0, dtype="uint16")
    assert len(next(batches)[0]) > 1
    with pytest.raises(OSError, match="disk"):
        next(batches)
    with pytest.raises(TypeError):
        list(encode_batches(PLAIN, [["the"], [None], ["fox"]], eos_id=0, dtype="uint16"))  # type: ignore[list-item]
    left = encode_batches(PLAIN, [["a"]] * 9, eos_id=0, dtype="uint16")
    next(left)
    left.close()
    assert threading.active_count() == n_threads
