"""Texts in, packed tokens out: exactly what the tokenizer says, several times as fast where that can be proved.

Words recur. A byte-level BPE with GPT-2's regular expression never looks across a place where white space begins after
something else, so a text may be cut there into *pieces*; a piece of ASCII falls into *words* by that expression. Both
are looked up, and only a word that was not met lately (or a piece beyond ASCII) is encoded, by the tokenizer itself.
``word_pattern`` says for which tokenizers this is exact; all others encode whole texts. Reading texts and writing
tokens is left to ``clbench.build``.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Packed = tuple[NDArray[Any], NDArray[np.int64]]

PORTION_CHARACTERS = 1 << 20
"""Looked at together: bounds the memory, also of one very long text."""
REMEMBERED = 1 << 18
"""Pieces, and words, kept in each of two generations: about 40 MB a generation."""
REMEMBERED_CHARACTERS = 64
"""Longer ones hardly recur."""

_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""The white space of ByteLevel's regular expression; Python's own notion of it is another."""
_PIECE = re.compile(f"[{_SPACE}]*+[^{_SPACE}]++|[{_SPACE}]++")
_WORD = re.compile(r"'(?:[stdm]|re|ve|ll)| ?[A-Za-z]++| ?[0-9]++| ?[^\sA-Za-z0-9]++|\s+(?!\S)|\s+", re.ASCII)
_WORD_AND_DIGITS = re.compile(
    r"[0-9]++|'(?:[stdm]|re|ve|ll)| ?[A-Za-z]++| ?[^\sA-Za-z0-9]++|\s+(?![^\s0-9])|\s+", re.ASCII
)
_WORD_AND_DIGIT = re.compile(_WORD_AND_DIGITS.pattern.replace("[0-9]++|'", "[0-9]|'"), re.ASCII)
_CUT = re.compile(f"(?<=[^{_SPACE}])(?=[{_SPACE}])")


def encode_batches(
    tokenizer: Tokenizer, batches: Iterable[Sequence[str]], *, eos_id: int, dtype: DTypeLike
) -> Iterator[Packed]:
    """Yield for each batch of texts its packed tokens and the length of every text, both with one EOS after each text.

    A text that reads ``<|endoftext|>`` is encoded as the characters it is, and nothing is added in front. ``batches``
    is read in the calling thread, one batch ahead of what is yielded; the encoding runs in a thread beside it.

    Args:
        tokenizer: is not changed; its truncation, padding and special tokens are ignored.
        batches: texts; a batch, a text and the whole may be empty.
        eos_id: token id that follows every text.
        dtype: unsigned integer type that holds every token id.

    Raises:
        OverflowError: a token id does not fit ``dtype``.
    """
    encoder = Encoder(tokenizer, eos_id=eos_id, dtype=dtype)
    waiting: deque[Future[Packed]] = deque()
    with ThreadPoolExecutor(1, "encode") as thread:
        for texts in batches:
            waiting.append(thread.submit(encoder.encode, texts))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Encoder:
    """Encodes batches of texts; what it has learnt about words it keeps from one batch to the next."""

    def __init__(self, tokenizer: Tokenizer, *, eos_id: int, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._code = self.dtype.char
        self._tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._eos = array(self._code, [eos_id]).tobytes()
        self._word = word_pattern(tokenizer)
        self._words = _Memory(self._ask)
        self._pieces = _Memory(self._by_words)

    def encode(self, texts: Sequence[str]) -> Packed:
        """Return the packed tokens, an EOS after every text, and the length of every text with it."""
        encoded: list[bytes] = []
        lengths = np.zeros(len(texts), np.int64)
        for portion in _portions(texts, cut=self._word is not None):
            parts = [part for _, part, _ in portion]
            tokens = self._ask(parts) if self._word is None else self._pieces.join(map(_PIECE.findall, parts))
            for (index, _, last), part in zip(portion, tokens, strict=True):
                encoded.append(part)
                lengths[index] += len(part)
                if last:
                    encoded.append(self._eos)
        packed = np.frombuffer(b"".join(encoded), self.dtype)
        return packed, lengths // self.dtype.itemsize + 1

    def _ask(self, texts: list[str]) -> list[bytes]:
        """Return the tokens of texts as the tokenizer gives them."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [array(self._code, encoding.ids).tobytes() for encoding in encodings]

    def _by_words(self, pieces: list[str]) -> list[bytes]:
        """Return the tokens of pieces, put together from those of their words; those beyond ASCII are asked for."""
        assert self._word is not None
        plain = [piece for piece in pieces if piece.isascii()]
        other = [piece for piece in pieces if not piece.isascii()]
        found = dict(zip(plain, self._words.join(map(self._word.findall, plain)), strict=True))
        found |= zip(other, self._ask(other), strict=True)
        return [found[piece] for piece in pieces]


class _Memory:
    """Remembers the tokens of strings that were met lately, in two generations, so that it stays small."""

    def __init__(self, ask: Callable[[list[str]], list[bytes]]) -> None:
        self._ask = ask
        self._recent: dict[str, bytes] = {}
        self._older: dict[str, bytes] = {}

    def join(self, texts: Iterable[list[str]]) -> list[bytes]:
        """Return the tokens of texts that are given in parts."""
        texts = list(texts)
        if len(self._recent) >= REMEMBERED:
            self._older, self._recent = self._recent, {}
        known, older = self._recent, self._older
        new = set().union(*texts).difference(known)
        known.update((part, older[part]) for part in new if part in older)
        unknown = [part for part in new if part not in older]
        known.update(zip(unknown, self._ask(unknown), strict=True))
        joined = [b"".join(map(known.__getitem__, parts)) for parts in texts]
        for part in unknown:
            if len(part) > REMEMBERED_CHARACTERS:
                del known[part]
        return joined


def _portions(texts: Sequence[str], *, cut: bool) -> Iterator[list[tuple[int, str, bool]]]:
    """Yield lists of (index of a text, a part of it, whether it is the last part) of about PORTION_CHARACTERS."""
    portion: list[tuple[int, str, bool]] = []
    size = 0
    for index, text in enumerate(texts):
        start = 0
        while (
            cut and len(text) - start > PORTION_CHARACTERS and (place := _CUT.search(text, start + PORTION_CHARACTERS))
        ):
            portion.append((index, text[start : place.start()], False))
            yield portion
            portion, size, start = [], 0, place.start()
        portion.append((index, text[start:] if start else text, True))
        size += len(text) - start
        if size >= PORTION_CHARACTERS:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def word_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return what the words of an ASCII text match if this tokenizer may be asked piece by piece and word by word.

    That is so for ByteLevel with GPT-2's regular expression, with or without ``Digits`` before it, when nothing else
    sees the text earlier: no normalizer, no added token but special ones (plain text here), no dropout.
    """
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    model, first = parts["model"], parts["pre_tokenizer"] or {}
    *before, last = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    if (
        parts["normalizer"] is not None
        or not all(token["special"] for token in parts["added_tokens"])
        or model["type"] != "BPE"
        or model["dropout"]
        or last.get("type") != "ByteLevel"
        or not last["use_regex"]
        or last["add_prefix_space"]
    ):
        return None
    match before:
        case []:
            return _WORD
        case [{"type": "Digits", "individual_digits": bool(single)}]:
            return _WORD_AND_DIGIT if single else _WORD_AND_DIGITS
        case _:
            return None
