"""Texts in, packed tokens out: exactly what the tokenizer says, several times as fast where that can be proved.

Words recur. A byte-level BPE with GPT-2's regular expression never looks across a place where white space begins after
something else, so a text may be cut there into *pieces*; a piece of ASCII falls into *words* by that expression. Both
are looked up, and only a word that was not met lately (or a piece beyond ASCII) is encoded, by the tokenizer itself.
Text that hardly repeats itself is noticed and encoded whole.
``word_pattern`` says for which tokenizers this is exact; all others encode whole texts. Reading texts and writing
tokens is left to ``clbench.build``.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Packed = tuple[NDArray[Any], NDArray[np.int64]]

PORTION_CHARACTERS = 1 << 18
"""Looked at together: bounds the memory, also of one very long text."""
REMEMBERED = 1 << 18
"""Pieces, and words, kept in each of two generations: about 40 MB a generation."""
REMEMBERED_CHARACTERS = 64
"""Longer ones hardly recur."""
COST_OF_ASKING = 25
"""Encoding a word by itself takes as long as so many characters of a long text do (measured: 20 to 30)."""
LONGEST_PAUSE = 63
"""Portions of text that hardly repeats itself which are encoded whole before words are tried again."""

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
        self._pieces, self._words = _Memory(), _Memory()
        self._pause = self._paused = 0

    def encode(self, texts: Sequence[str]) -> Packed:
        """Return the packed tokens, an EOS after every text, and the length of every text with it."""
        encoded: list[bytes] = []
        lengths = np.zeros(len(texts), np.int64)
        for portion in _portions(texts, cut=self._word is not None):
            tokens = self._portion([part for _, part, _ in portion])
            for (index, _, last), part in zip(portion, tokens, strict=True):
                encoded.append(part)
                lengths[index] += len(part)
                if last:
                    encoded.append(self._eos)
        packed = np.frombuffer(b"".join(encoded), self.dtype)
        return packed, lengths // self.dtype.itemsize + 1

    def _portion(self, texts: list[str]) -> list[bytes]:
        """Return the tokens of texts, in the way that is likely to be faster."""
        if self._word is None:
            return self._ask(texts)
        if self._paused < self._pause:
            self._paused += 1
            return self._ask(texts)
        tokens = self._by_words(self._word, texts)
        self._pause, self._paused = (min(2 * self._pause + 1, LONGEST_PAUSE) if tokens is None else 0), 0
        return self._ask(texts) if tokens is None else tokens

    def _by_words(self, word: re.Pattern[str], texts: list[str]) -> list[bytes] | None:
        """Return the tokens of texts, put together from those of their pieces; None if that does not pay."""
        pieces = [_PIECE.findall(text) for text in texts]
        unknown = self._pieces.missing(pieces)
        words = {piece: word.findall(piece) if piece.isascii() else [piece] for piece in unknown}
        asked = self._words.missing(words.values())
        if len(asked) * COST_OF_ASKING > sum(map(len, texts)):
            return None
        self._words.learn(asked, self._ask(asked))
        self._pieces.learn(unknown, map(self._words.tokens, words.values()))
        tokens = list(map(self._pieces.tokens, pieces))
        self._words.forget_long(asked)
        self._pieces.forget_long(unknown)
        return tokens

    def _ask(self, texts: list[str]) -> list[bytes]:
        """Return the tokens of texts as the tokenizer gives them."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [array(self._code, encoding.ids).tobytes() for encoding in encodings]


class _Memory:
    """The tokens of strings that were met lately, in two generations, so that it stays small."""

    def __init__(self) -> None:
        self._recent: dict[str, bytes] = {}
        self._older: dict[str, bytes] = {}

    def missing(self, texts: Iterable[list[str]]) -> list[str]:
        """Return the strings among the parts of texts that are not known; those that are known stay so until learnt."""
        if len(self._recent) >= REMEMBERED:
            self._older, self._recent = self._recent, {}
        new = set().union(*texts).difference(self._recent)
        self._recent.update((string, self._older[string]) for string in new if string in self._older)
        return [string for string in new if string not in self._older]

    def learn(self, strings: Iterable[str], tokens: Iterable[bytes]) -> None:
        """Remember the tokens of strings."""
        self._recent.update(zip(strings, tokens, strict=True))

    def tokens(self, parts: list[str]) -> bytes:
        """Return the tokens of known strings, one after another."""
        return b"".join(map(self._recent.__getitem__, parts))

    def forget_long(self, strings: Iterable[str]) -> None:
        """Forget those of some known strings that are too long to keep."""
        for string in strings:
            if len(string) > REMEMBERED_CHARACTERS:
                del self._recent[string]


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
