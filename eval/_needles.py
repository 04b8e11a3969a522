"""Questions about long text, generated after RULER: needles, variable tracking, common and frequent words.

Subtasks, their parameters and the score follow RULER (Hsieh et al. 2024, arXiv:2404.06654; scripts of NVIDIA/RULER);
words, wording and haystacks are our own, so figures compare between checkpoints and not with published tables. An item
is drawn first (what is hidden, what is asked, which answers are right) and then filled: as many units of haystack as
still fit, counted with the tokenizer that will read it. Everything is a pure function of (seed, subtask, length,
number of the item, tokenizer): the same text on every machine and version of numpy.

Which lengths and how many items is left to ``clbench.eval.longcontext``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TypeVar

import numpy as np

from clbench import seeds
from clbench.errors import ConfigError
from clbench.files import sha256_bytes

T = TypeVar("T")

GENERATOR_VERSION = 1
"""Raise it whenever any generated text changes: it is part of the address of every cell."""
CountTokens = Callable[[str], int]

WORDS = """\
amber ancient bitter bold brave bright brisk broad calm careful clever cloudy cold copper crisp curly damp dark deep
distant dry dusty eager early empty faint fair fancy fast fierce firm flat foggy fresh frozen gentle giant glad
golden grand green grey happy heavy hidden hollow humble icy idle jolly keen large late lazy light little lively
lonely loud lucky marble mellow merry mild misty modest narrow neat noble odd old orange pale patient plain polite
proud purple quick quiet rapid rare red ripe rough round rusty salty sharp shiny short shy silent silver simple
sleepy slow small smooth soft solid sour spare steady steep still stormy strange strong sunny sweet swift tall tame
tender thick thin tidy tiny tired tough vast velvet violet warm weary white wide wild windy wise wooden yellow young

acorn anchor apple arrow badge bakery barn basket beach bell bench bird blanket boat bottle branch bread bridge
broom bucket button cabin camera candle canyon carpet castle cellar chair cherry clock cloud coast coin compass
corner cottage cradle creek cup curtain desert desk door drawer drum eagle engine falcon farm feather fence ferry
field flag flute forest fork fountain fox garden gate glacier glove goat grape hammer harbour hat hill honey hornet
house island ivy jacket jar kettle key kitchen kite ladder lake lamp lantern leaf lemon letter library lion lock
maple market meadow mirror mitten monkey moon mountain needle nest oak ocean orchard otter oven owl paddle paper
parcel path pearl pencil pepper piano pigeon pillow pine planet pocket pond potato prairie puzzle quilt rabbit raft
railway rain ribbon river robin rocket roof rope saddle sail salmon school shelf shell shovel sparrow spoon spring
stable star station stone stove street sunset table tailor teapot temple thread tiger torch tower train trumpet
tulip tunnel turtle umbrella valley village violin wagon walnut waterfall weaver wheel whistle willow window wolf
yard zebra

admire answer arrange borrow build carry catch chase choose clean climb collect count cover cross deliver draw drop
enter fetch fill find finish fold follow gather greet grow guard guide handle hang help hold keep launch lead learn
leave lift like listen load mark measure mend move need notice open order paint pass pick plant polish pour pull
push reach read rest return row save search sell send shape share sing sort stack start steer stop store sweep teach
throw touch trade travel turn visit wait walk wash watch water weigh wrap write
"""
"""Adjectives, nouns, verbs."""
ADJECTIVES, NOUNS, VERBS = (tuple(part.split()) for part in WORDS.split("\n\n"))
NOISE_SENTENCES = 3000
"""Sentences of generated haystack; longer items go round."""


PUNCTUATION = ".,;:!?()[]\"'"
WALK_BACK = 60
"""Words that a needle goes back to stand at the start of a sentence; a text without sentences has it where it falls."""
GENERATE = {"needle": 128, "tracking": 30, "common_words": 120, "frequent_words": 50}
"""Tokens kept free for the answer, as in RULER; more where a tokenizer needs more to write it."""
ANSWER_SLACK = 1.25
FIRST_STEP = 8
MOST_UNITS_PER_TOKEN = 100
"""A tokenizer that counts fewer tokens for more and more units does not keep the text."""
N_NEEDLES = 4
"""Keys, values or queries of the subtasks of several, as in RULER."""
N_COMMON = 10
N_FREQUENT = 3
ZETA_2 = math.pi**2 / 6  # RULER's exponent is 2
WORDS_PER_TOKEN_OF_VOCABULARY = 50  # RULER: a vocabulary of length // 50 coded words


class Draws:
    """Random choices from one named stream; raw Philox numbers, which numpy promises to keep."""

    def __init__(self, *names: int | str) -> None:
        self._bits = np.random.Philox(key=seeds.derive("longcontext", *names))

    def below(self, n: int) -> int:
        """Return a number in ``range(n)``: 64 bits modulo n, a bias below 2^-40 for every n used here."""
        return int(self._bits.random_raw()) % n

    def fraction(self) -> float:
        """Return a number in [0, 1)."""
        return (int(self._bits.random_raw()) >> 11) / (1 << 53)

    def one(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.below(len(options))]

    def several(self, options: Sequence[T], k: int) -> list[T]:
        """Return k different options in random order."""
        places = np.argsort(self._bits.random_raw(len(options)), kind="stable")[:k]
        return [options[int(place)] for place in places]

    def letters(self, alphabet: str, n: int) -> str:
        """Return n letters of an alphabet."""
        return "".join(self.one(alphabet) for _ in range(n))

    def new(self, draw: Callable[[Draws], str], seen: set[str]) -> str:
        """Return what was not drawn before, and note it."""
        while (value := draw(self)) in seen:
            pass
        seen.add(value)
        return value


# --- what is hidden


@cache
def plain_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words that stand inside no other one, so that naming one never counts as naming another."""
    every = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    return tuple(word for word in words if not any(word in other for other in every if other != word))


def draw_word(draws: Draws) -> str:
    """Return an adjective and a noun with a hyphen between."""
    return f"{draws.one(plain_words(ADJECTIVES))}-{draws.one(plain_words(NOUNS))}"


def draw_number(draws: Draws) -> str:
    """Return seven digits, as in RULER."""
    return str(1_000_000 + draws.below(9_000_000))


def draw_uuid(draws: Draws) -> str:
    """Return a random UUID (version 4)."""
    import uuid

    high, low = draws.below(1 << 63), draws.below(1 << 63)
    return str(uuid.UUID(int=(high << 64) | low, version=4))


DRAW: dict[str, Callable[[Draws], str]] = {"word": draw_word, "number": draw_number, "uuid": draw_uuid}
KINDS = tuple(DRAW)


# --- haystacks


@dataclass(frozen=True)
class Haystack:
    """A text that needles are hidden in: its words, and which of them start a sentence.

    Args:
        words: at least one; items start at a sentence of their own and go round at the end.
        starts: places in ``words`` where sentences start; the first is 0.
        sha256: digest of the text, or of what generated it.
    """

    words: tuple[str, ...]
    starts: tuple[int, ...]
    sha256: str
    _is_start: frozenset[int] = field(init=False, repr=False, compare=False)
    vocabulary: frozenset[str] = field(init=False, repr=False, compare=False)
    """Its different words in small letters, without punctuation around them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_is_start", frozenset(self.starts))
        bare = frozenset(word.strip(PUNCTUATION).lower() for word in {*self.words})
        object.__setattr__(self, "vocabulary", bare)

    @classmethod
    def of_text(cls, text: str, where: object = None) -> Haystack:
        """Return a text as a haystack; runs of blanks and line breaks become one space.

        Raises:
            ConfigError: the text has no words.
        """
        sentences = [words for part in re.split(r"(?<=[.!?])\s+", text) if (words := part.split())]
        if not sentences:
            raise ConfigError("the haystack holds no words", where=where, mend="give a text file with some prose")
        starts = [0]
        for sentence in sentences[:-1]:
            starts.append(starts[-1] + len(sentence))
        return cls(tuple(w for sentence in sentences for w in sentence), tuple(starts), sha256_bytes(text.encode()))

    def context(self, start: int, n_words: int, hidden: Sequence[tuple[float, str]]) -> str:
        """Return n words from a place on with sentences hidden in them, each at its depth in [0, 1), in their order."""
        cuts = [self._sentence_start(start, int(depth * (n_words + 1))) for depth, _ in hidden]
        parts: list[str] = []
        for (left, right), sentence in zip(pairwise([0, *cuts]), (text for _, text in hidden), strict=True):
            parts += [*self._slice(start + left, right - left), sentence]
        last = cuts[-1] if cuts else 0
        return " ".join([*parts, *self._slice(start + last, n_words - last)])

    def _sentence_start(self, start: int, place: int) -> int:
        for back in range(min(place, WALK_BACK) + 1):
            if (start + place - back) % len(self.words) in self._is_start:
                return place - back
        return place

    def _slice(self, start: int, n: int) -> list[str]:
        """Return n words from a place on, going round at the end."""
        size = len(self.words)
        first = start % size
        whole = list(self.words[first : first + n])
        while len(whole) < n:
            whole += self.words[: n - len(whole)]
        return whole


@cache
def noise(seed: int) -> Haystack:
    """Return the generated haystack: plain sentences about nothing, without digits and without the needles' words."""
    draws = Draws(seed, "noise")
    forms = (
        "The {a} {n} stood near the {b} {m}.",
        "Nobody had seen the {n} behind the {a} {m}.",
        "It was a {a} day and the {n} was {b}.",
        "They walked past the {n}, then past the {m}.",
        "A {a} {n} is not the same as a {b} {m}.",
        "Some said that the {m} had always been {a}.",
        "Later the {n} looked {a} and the {m} looked {b}.",
        "We left the {a} {n} where it was.",
        "Between the {n} and the {m} there was a {a} wall.",
        "Most of the time the {n} was {a}.",
        "Here we go, from the {n} to the {m} and back again.",
        "The {m} was {a}, the {n} was {b}, and that was all.",
    )
    sentences = []
    for _ in range(NOISE_SENTENCES):
        (a, b), (n, m) = draws.several(ADJECTIVES, 2), draws.several(NOUNS, 2)
        sentence = draws.one(forms).format(a=a, b=b, n=n, m=m)
        sentences.append(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence))
    return Haystack.of_text(" ".join(sentences))


# --- items


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What items are made of, beyond subtask, length and number."""

    haystack: Haystack
    keys: str = "word"
    n_chains: int = 1
    n_hops: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An item before it is filled: ``build(n)`` is its prompt with n units of haystack, from ``least`` units on.

    ``answer`` is how the references look written out, for the room that generating them takes.
    """

    references: tuple[str, ...]
    answer: str
    build: Callable[[int], str]
    least: int = 0


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: the prompt, the texts that a right answer has, and the prompt's tokens as counted."""

    name: str
    prompt: str
    references: tuple[str, ...]
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class Filled:
    """All items of one subtask at one length. Prompt and ``n_generate`` tokens together are ``length`` at most."""

    items: list[Item]
    n_generate: int


def make_items(subtask: str, length: int, n_items: int, settings: Settings, count: CountTokens) -> Filled:
    """Generate the items of a subtask at a length.

    Args:
        subtask: one of ``SUBTASKS``.
        length: tokens of a prompt and of the room for its answer.
        n_items: how many; the first n of a longer series are the same.
        settings: haystack, kinds, chains, seed.
        count: tokens of a prompt as the model reads it, special tokens included.

    Raises:
        ConfigError: the shortest form of the question is longer; the least length is named.
    """
    tiers = [
        [SUBTASKS[subtask](Draws(settings.seed, subtask, length, i), settings, length, tier) for i in range(n_items)]
        for tier in range(N_TIERS.get(subtask, 1))
    ]
    kept = GENERATE.get(subtask, GENERATE["needle"])
    for drafts in tiers:
        n_generate = max(kept, *(math.ceil(ANSWER_SLACK * count(draft.answer)) for draft in drafts))
        least = max(count(draft.build(draft.least)) for draft in drafts)
        if least + n_generate <= length:
            break
    else:
        raise ConfigError(
            f"{subtask} takes at least {least + n_generate} tokens with this tokenizer, not {length}",
            where="suite longcontext",
            mend="ask for a longer length, or leave this subtask out",
        )
    items = []
    for number, draft in enumerate(drafts):
        n = largest_fit(lambda n, draft=draft: count(draft.build(n)), length - n_generate, draft.least)  # type: ignore[misc]
        prompt = draft.build(n)
        name = f"{subtask}@{length}/{number:04d}"
        items.append(Item(name=name, prompt=prompt, references=draft.references, n_tokens=count(prompt)))
    return Filled(items=items, n_generate=n_generate)


def largest_fit(n_tokens: Callable[[int], int], budget: int, least: int) -> int:
    """Return an n from ``least`` on with ``n_tokens(n) <= budget < n_tokens(n + 1)``, in few calls.

    Token counts grow about evenly with n, so places are guessed on a line and halved in between. Nothing hangs on
    their being monotone.

    Raises:
        ConfigError: a tokenizer counts no tokens for more and more text.
    """
    low, low_tokens = least, n_tokens(least)
    high = least + FIRST_STEP
    while (high_tokens := n_tokens(high)) <= budget:
        if high > MOST_UNITS_PER_TOKEN * (budget + least + 1):
            raise ConfigError("the tokenizer counts next to no tokens for a text", where="suite longcontext")
        per_token = (high - low) / max(1, high_tokens - low_tokens)
        low, low_tokens, high = high, high_tokens, high + FIRST_STEP + math.ceil(per_token * (budget - high_tokens))
    for turn in range(1_000):
        if high - low <= 1:
            break
        guess = (low + high) // 2
        if turn % 3 != 2 and high_tokens > low_tokens:
            guess = low + (budget - low_tokens) * (high - low) // (high_tokens - low_tokens)
            guess = min(max(guess, low + 1), high - 1)
        tokens = n_tokens(guess)
        if tokens <= budget:
            low, low_tokens = guess, tokens
        else:
            high, high_tokens = guess, tokens
    return low


def score(answer: str, references: Sequence[str]) -> float:
    """Return the share of references that an answer has as substrings, in any case (RULER's ``string_match_all``)."""
    found = answer.lower()
    return sum(reference.lower() in found for reference in references) / len(references)


# --- needles


def _listed(names: Sequence[str]) -> str:
    """Return names as "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _needle(kind: str, key: str, value: str) -> str:
    return f"The secret {kind} of {key} is {value}."


def _ask(context: str, kind: str, keys: Sequence[str], n_answers: int) -> str:
    """Return context, question and the opening of the answer, which ends where the answer starts."""
    several = n_answers > 1
    things, verb = f"secret {kind}{'s' if several else ''}", "are" if several else "is"
    about = f"the {things} of {_listed(keys)} in the text above"
    intro = f"The text below hides {'some' if several else 'a'} {things}. Remember {'them' if several else 'it'}."
    question = f"What {verb} {'all ' if several else ''}{about}?"
    return f"{intro}\n\n{context}\n\nQuestion: {question}\nAnswer: {about[0].upper()}{about[1:]} {verb}"


def _needles(
    draws: Draws, settings: Settings, kind: str, *, n_keys: int = 1, n_values: int = 1, n_queries: int = 1
) -> Draft:
    """Return a question about needles in a haystack of text: the first ``n_queries`` of the keys are asked."""
    haystack = settings.haystack
    seen = {*haystack.vocabulary}
    keys = [draws.new(DRAW[settings.keys], seen) for _ in range(n_keys)]
    values = [draws.new(DRAW[kind], seen) for _ in range(n_keys * n_values)]
    pairs = [(keys[place // n_values], value) for place, value in enumerate(values)]
    start = draws.one(haystack.starts)
    depths = sorted(draws.fraction() for _ in pairs)
    hidden = list(zip(depths, (_needle(kind, k, v) for k, v in draws.several(pairs, len(pairs))), strict=True))
    references = tuple(values[: n_queries * n_values])

    def build(n: int) -> str:
        return _ask(haystack.context(start, n, hidden), kind, keys[:n_queries], len(references))

    return Draft(references=references, answer=_listed(references), build=build)


def _lines(draws: Draws, kind: str, key_kind: str) -> Draft:
    """Return a question about one needle in a haystack that is made of needles, one a line."""
    seen: set[str] = set()
    key, value = draws.new(DRAW[key_kind], seen), draws.new(DRAW[kind], seen)
    depth, others = draws.fraction(), list[str]()

    def build(n: int) -> str:
        while len(others) < n:  # the first n are the same whatever was asked for before
            others.append(_needle(kind, draws.new(DRAW[key_kind], seen), draws.new(DRAW[kind], seen)))
        at = int(depth * (n + 1))
        lines = [*others[:at], _needle(kind, key, value), *others[at:n]]
        return _ask("\n".join(lines), kind, [key], 1)

    return Draft(references=(value,), answer=value, build=build)


# --- variables


def _chain(names: Sequence[str], value: str) -> list[str]:
    """Return the assignments of a chain: the first name gets the value, each other the one before it."""
    return [f"VAR {names[0]} = {value}.", *(f"VAR {new} = VAR {old}." for old, new in pairwise(names))]


def _ask_variables(context: str, value: str, n: int) -> str:
    return (
        f"The text below hides assignments of variables. Follow them.\n\n{context}\n\n"
        f"Question: Which variables have the value {value} in the text above?\n"
        f"Answer: These {n} variables have the value {value}:"
    )


def _tracking(draws: Draws, settings: Settings, length: int, tier: int) -> Draft:
    """Return variable tracking: chains of assignments in a haystack; all names of the first chain are asked.

    Tier 0 shows a short worked example first (RULER does), tier 1 does not.
    """
    haystack, seen, n_names = settings.haystack, set[str](), settings.n_hops + 1

    def hide(n_letters: int, n_chains: int) -> tuple[list[str], str, list[tuple[float, str]]]:
        capitals = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        numbers: set[str] = set()
        chains = [
            [draws.new(lambda d: d.letters(capitals, n_letters), seen) for _ in range(n_names)] for _ in range(n_chains)
        ]
        values = [draws.new(lambda d: str(10_000 + d.below(90_000)), numbers) for _ in chains]
        hidden = []
        for names, value in zip(chains, values, strict=True):
            depths = sorted(draws.fraction() for _ in names)
            hidden += list(zip(depths, _chain(names, value), strict=True))
        return chains[0], values[0], sorted(hidden, key=lambda one: one[0])

    names, value, hidden = hide(5, settings.n_chains)
    start = draws.one(haystack.starts)
    example = ""
    if tier == 0:
        few, other, shown = hide(3, 1)
        text = haystack.context(draws.one(haystack.starts), 8 * n_names, shown)
        example = f"{_ask_variables(text, other, n_names)} {' '.join(few)}\n\n"

    def build(n: int) -> str:
        return example + _ask_variables(haystack.context(start, n, hidden), value, n_names)

    return Draft(references=tuple(names), answer=f" {' '.join(names)}", build=build)


# --- words that are counted


@cache
def _pool(n: int) -> tuple[str, ...]:
    """Return a pool of at least n words of one kind: plain ones, or pairs where those are too few."""
    single = tuple(dict.fromkeys((*plain_words(ADJECTIVES), *plain_words(NOUNS), *plain_words(VERBS))))
    if n <= len(single):
        return single
    return tuple(f"{a}-{b}" for a in plain_words(ADJECTIVES) for b in plain_words(NOUNS))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def _ask_common(words: Sequence[str]) -> str:
    return (
        "Below is a numbered list of words. Some of them stand in it more often than others. Remember those.\n\n"
        f"{_numbered(words)}\n\nQuestion: Which are the {N_COMMON} most common words of the list?\n"
        f"Answer: The {N_COMMON} most common words of the list are:"
    )


def _common_words(draws: Draws, settings: Settings, length: int, tier: int) -> Draft:
    """Return common words: ten of them stand ``often`` times in a list, n others ``seldom`` times.

    Tier 0 is RULER's (30 and 3 from 4,096 tokens on, 6 and 1 below, with a worked example), tier 1 takes 3 and 1
    and shows no example.
    """
    often, seldom = (30, 3) if length >= 4096 and tier == 0 else (6, 1) if tier == 0 else (3, 1)
    n_most = length // (2 * seldom)  # a numbered word takes two tokens at the least
    pool = _pool(N_COMMON + n_most)
    shuffled = draws.several(pool, len(pool))
    common, others = shuffled[:N_COMMON], shuffled[N_COMMON:]
    example = ""
    if tier == 0:
        n_other, more, less = (30, 10, 3) if length >= 4096 else (10, 3, 1)
        some = draws.several(pool, N_COMMON + n_other)
        listed = some[:N_COMMON] * more + some[N_COMMON:] * less
        example = f"{_ask_common(draws.several(listed, len(listed)))} {_numbered(some[:N_COMMON])}\n\n"
    order = draws.below(1 << 40)

    def build(n: int) -> str:
        listed = common * often + others[:n] * seldom
        return example + _ask_common(Draws(order, n).several(listed, len(listed)))

    return Draft(references=tuple(common), answer=f" {_numbered(common)}", build=build, least=N_COMMON)


def zeta_counts(n: int, size: int) -> list[int]:
    """Return how often the word of each rank stands in a text of about n words: ``floor(n rank^-2 / zeta(2))``."""
    return [int(n / (rank * rank * ZETA_2)) for rank in range(1, size + 1)]


def _least_apart() -> int:
    """Return from which n on the last word that is asked for stands more often than the one after it, for every n."""
    last, after = (1 / (rank * rank * ZETA_2) for rank in (N_FREQUENT + 1, N_FREQUENT + 2))
    return math.ceil(1 / (last - after))


def _frequent_words(draws: Draws, settings: Settings, length: int, tier: int) -> Draft:
    """Return frequent words: coded words with zeta-distributed counts; rank 1 is dots, ranks 2 to 4 are asked."""
    seen: set[str] = set()
    size = max(N_FREQUENT + 5, length // WORDS_PER_TOKEN_OF_VOCABULARY)
    coded = [draws.new(lambda d: d.letters("abcdefghijklmnopqrstuvwxyz", 6), seen) for _ in range(size)]
    coded[0] = "...."
    order = draws.below(1 << 40)

    def build(n: int) -> str:
        listed = [word for word, times in zip(coded, zeta_counts(n, size), strict=True) for _ in range(times)]
        text = " ".join(Draws(order, n).several(listed, len(listed)))
        return (
            f"The text below is coded. Count how often each coded word stands in it; dots do not count.\n\n{text}\n\n"
            f"Question: Which are the {N_FREQUENT} most frequent coded words of the text? Do not explain.\n"
            f"Answer: The {N_FREQUENT} most frequent coded words are:"
        )

    asked = tuple(coded[1 : 1 + N_FREQUENT])
    return Draft(references=asked, answer=f" {_listed(asked)}", build=build, least=_least_apart())


# --- the table

Make = Callable[[Draws, Settings, int, int], Draft]


def _of(kind: str, **numbers: int) -> Make:
    return lambda draws, settings, length, tier: _needles(draws, settings, kind, **numbers)


SUBTASKS: dict[str, Make] = {
    "single_word": _of("word"),
    "single_number": _of("number"),
    "single_uuid": _of("uuid"),
    "multi_key": _of("number", n_keys=N_NEEDLES),
    "multi_key_line": lambda draws, settings, length, tier: _lines(draws, "number", settings.keys),
    "multi_key_uuid": lambda draws, settings, length, tier: _lines(draws, "uuid", "uuid"),
    "multi_value": _of("number", n_values=N_NEEDLES),
    "multi_query": _of("number", n_keys=N_NEEDLES, n_queries=N_NEEDLES),
    "tracking": _tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
N_TIERS = {"tracking": 2, "common_words": 2}
"""Forms of a subtask from RULER's on to shorter ones; the first that fits is taken, the same for all items."""
USES_HAYSTACK = frozenset(SUBTASKS) - {"multi_key_line", "multi_key_uuid", "common_words", "frequent_words"}
