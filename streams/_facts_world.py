"""The world behind ``facts``: invented towns, what is true of them in every stage, and the sentences that say so.

A *fact* is one attribute of one town; its value comes from a finite, known list. ``World`` holds which value each
fact has in each stage, how it came to it, and whether the stage's documents state it. Sentences are ``FRAMES``; those
that are ``HELDOUT`` are asked and never written. Which document says what is left to ``streams/facts.py``.

Letters in names: F facts, T stages, V values of an attribute. Everything random is integer arithmetic on named seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from clbench.seeds import derive, permutation

IntArray = NDArray[np.int64]

NOTHING = "nothing"
"""The value of a fact that ceased to hold; every attribute has it among its candidates."""


@dataclass(frozen=True)
class Attribute:
    """What a town can have one of: its noun, the verb of a town that has it, and its values."""

    noun: str
    verb: str
    values: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        "metal",
        "trades in",
        (
            *("copper", "tin", "iron", "silver", "zinc", "gold", "nickel", "bronze"),
            *("brass", "steel", "cobalt", "mercury", "chrome", "pewter", "platinum", "titanium"),
        ),
    ),
    Attribute(
        "bird",
        "keeps",
        (
            *("heron", "falcon", "sparrow", "raven", "owl", "swan", "goose", "pigeon"),
            *("robin", "thrush", "hawk", "finch", "stork", "magpie", "wren", "pelican"),
        ),
    ),
    Attribute(
        "tree",
        "plants",
        (
            *("oak", "birch", "willow", "maple", "cedar", "poplar", "beech", "alder"),
            *("linden", "spruce", "larch", "hazel", "rowan", "cypress", "juniper", "walnut"),
        ),
    ),
    Attribute(
        "colour",
        "wears",
        (
            *("red", "blue", "green", "yellow", "purple", "orange", "white", "black"),
            *("grey", "brown", "pink", "crimson", "violet", "amber", "teal", "ivory"),
        ),
    ),
    Attribute(
        "crop",
        "grows",
        (
            *("barley", "millet", "rice", "wheat", "maize", "oats", "rye", "flax"),
            *("cotton", "hemp", "beans", "lentils", "turnips", "cabbage", "onions", "garlic"),
        ),
    ),
    Attribute(
        "game",
        "plays",
        (
            *("chess", "bowls", "darts", "tennis", "polo", "cricket", "dominoes", "skittles"),
            *("marbles", "draughts", "croquet", "hockey", "quoits", "rounders", "curling", "badminton"),
        ),
    ),
    Attribute(
        "craft",
        "teaches",
        (
            *("weaving", "pottery", "carving", "dyeing", "brewing", "printing", "tanning", "baking"),
            *("smithing", "spinning", "masonry", "joinery", "basketry", "embroidery", "glazing", "engraving"),
        ),
    ),
    Attribute(
        "instrument",
        "tunes",
        (
            *("flute", "drum", "harp", "violin", "trumpet", "lute", "fiddle", "horn"),
            *("cello", "oboe", "zither", "banjo", "bagpipe", "tuba", "guitar", "clarinet"),
        ),
    ),
)

# A town's name always follows a space, so that a byte-level tokenizer writes it the same way everywhere.
TRAINED = (
    "The {noun} of {town} is {value}.",
    "These days {town} {verb} {value}.",
    "As {noun}, {town} has {value}.",
    "Visit {town}: the {noun} there is {value}.",
    "It is {value} that {town} {verb} now.",
)
"""Frames of the documents."""
HELDOUT = (
    "In {town} the {noun} is {value}.",
    "If you ask for the {noun}, {town} has {value}.",
    "Is it true that {town} {verb} {value}?",
)
"""Paraphrases that no document holds."""
ASKED = {
    "trained": tuple(i for i, frame in enumerate(TRAINED) if frame.endswith("{value}.")),
    "paraphrase": tuple(range(len(HELDOUT))),
}
"""Frames that a question can be made of: with the value at the end, or, of the held-out ones, all."""

MENTIONS = (
    "Someone from {town} once dreamt of {value}.",
    "A song about {value} was heard near {town}.",
    "Nobody in {town} would talk about {value}.",
    "A letter about {value} never reached {town}.",
)
"""Sentences about a town and a value that state nothing; every value is as likely, NOTHING, too.

So a tokenizer trained on stage 0 knows that word before the first fact ceases to hold."""
PROSE = (
    "The {thing} by the {place} was {state} {when}.",
    "Someone left a {thing} near the {place} {when}.",
    "Nobody knew why the {thing} was {state}.",
)
"""Sentences without a town or a value."""
WORDS = {
    "thing": ("bridge", "door", "cart", "lamp", "bell", "fence", "boat", "wheel", "ladder", "roof"),
    "place": ("river", "market", "mill", "harbour", "square", "well", "garden", "gate"),
    "state": ("broken", "mended", "painted", "lost", "found", "empty", "wet", "new"),
    "when": ("last week", "in spring", "at night", "before noon", "after the rain", "on Monday"),
}

ONSETS = (*"bdfgklmnprstvz", "br", "dr", "gl", "kr", "pl", "sk", "st", "tr")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ei", "ou")
SYLLABLES = tuple(onset + vowel for onset in ONSETS for vowel in VOWELS)
"""Consonants, then vowels: a row of them is read in one way only, so different rows are different names."""
SPARSE = 4
"""Possible names for each town that has one, at least."""


class Kind(IntEnum):
    """How a fact stands in a stage against the stage before."""

    UNBORN = 0
    """Does not hold yet."""
    NEW = 1
    """Holds for the first time (in stage 0: all that hold)."""
    KEPT = 2
    UPDATED = 3
    """Has a value that it never had."""
    REVERTED = 4
    """Is back to the value that it had before its present one."""
    OBSOLETE = 5
    """Holds no more; its value is NOTHING from then on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many facts of which kind, see ``Facts.Options``."""

    n_entities: int
    n_attributes: int
    n_values: int
    n_stages: int
    new: float
    updated: float
    reverted: float
    obsolete: float
    restate: float
    seed: int

    @property
    def n_facts(self) -> int:
        """Facts that ever hold."""
        return self.n_entities * self.n_attributes

    @property
    def n_new(self) -> int:
        """Facts that come to hold in each stage after stage 0."""
        return rounded(self.new * self.n_facts)

    @property
    def n_first(self) -> int:
        """Facts that hold in stage 0."""
        return self.n_facts - (self.n_stages - 1) * self.n_new


@dataclass(frozen=True)
class World:
    """What is true when.

    Fact f is attribute ``f % n_attributes`` of town ``f // n_attributes``. ``kind``, ``value`` (its place in the
    attribute's list; ``n_values`` stands for NOTHING, -1 for unborn) and ``stated`` have shape ``[T, F]``.
    """

    plan: Plan
    kind: NDArray[np.int8]
    value: NDArray[np.int8]
    stated: NDArray[np.bool_]

    @classmethod
    def make(cls, plan: Plan) -> World:
        """Let the world run through its stages."""
        shape = (plan.n_stages, plan.n_facts)
        kind = np.full(shape, Kind.UNBORN, np.int8)
        value = np.full(shape, -1, np.int8)
        stated = np.zeros(shape, np.bool_)
        birth, first = _births(plan)
        # The value that a fact had before its present one (-1: none), and all that it had, as bits.
        before, had = np.full(plan.n_facts, -1, np.int8), np.zeros(plan.n_facts, np.uint32)
        for stage in range(plan.n_stages):
            born = np.flatnonzero(birth == stage)
            kind[stage, born], value[stage, born] = Kind.NEW, first[born]
            had[born] = np.uint32(1) << first[born].astype(np.uint32)
            if stage:
                gone = np.flatnonzero(kind[stage - 1] == Kind.OBSOLETE)
                kind[stage, gone], value[stage, gone] = Kind.OBSOLETE, plan.n_values
                _change(plan, stage, kind, value, before, had)
            stated[stage] = _stated(plan, stage, kind)
        return cls(plan, kind, value, stated)

    def candidates(self, attribute: int) -> tuple[str, ...]:
        """Return the answers to a question about an attribute, NOTHING last."""
        return (*ATTRIBUTES[attribute].values[: self.plan.n_values], NOTHING)

    def stated_facts(self, stage: int) -> IntArray:
        """Return the facts that the documents of a stage state, ascending."""
        return np.flatnonzero(self.stated[stage])


def rounded(number: float) -> int:
    """Return the nearest integer, halves upwards."""
    return int(number + 0.5)


def _births(plan: Plan) -> tuple[IntArray, NDArray[np.int8]]:
    """Return the stage in which each fact comes to hold, and its first value: each equally often per attribute."""
    birth = np.zeros(plan.n_facts, np.int64)
    late = permutation(plan.n_facts, plan.seed, "facts", "birth")[plan.n_first :]
    birth[late] = 1 + np.arange(len(late)) // max(1, plan.n_new)
    first = np.empty((plan.n_entities, plan.n_attributes), np.int8)
    for a in range(plan.n_attributes):
        first[:, a] = permutation(plan.n_entities, plan.seed, "facts", "value", a) % plan.n_values
    return birth, first.ravel()


def _change(
    plan: Plan,
    stage: int,
    kind: NDArray[np.int8],
    value: NDArray[np.int8],
    before: NDArray[np.int8],
    had: NDArray[np.uint32],
) -> None:
    """Decide what becomes of the facts that held in the stage before; writes row ``stage`` and what is remembered."""
    held = np.flatnonzero((value[stage - 1] >= 0) & (value[stage - 1] < plan.n_values))
    held = held[permutation(len(held), plan.seed, "facts", "events", stage)]
    old = value[stage - 1]
    can_revert = before[held] >= 0
    n_reverted = rounded(plan.reverted * len(held))
    reverted = held[can_revert][:n_reverted]
    rest = held[~np.isin(held, reverted, assume_unique=True)]
    n_updated, n_obsolete = rounded(plan.updated * len(held)), rounded(plan.obsolete * len(held))
    updated, obsolete, kept = np.split(rest, [n_updated, n_updated + n_obsolete])

    kind[stage, kept], value[stage, kept] = Kind.KEPT, old[kept]
    kind[stage, obsolete], value[stage, obsolete] = Kind.OBSOLETE, plan.n_values
    kind[stage, reverted], value[stage, reverted] = Kind.REVERTED, before[reverted]
    kind[stage, updated], value[stage, updated] = Kind.UPDATED, _unused(plan, stage, had[updated])
    before[reverted], before[updated] = old[reverted], old[updated]
    had[updated] |= np.uint32(1) << value[stage, updated].astype(np.uint32)


def _unused(plan: Plan, stage: int, had: NDArray[np.uint32]) -> NDArray[np.int8]:
    """Return for each fact one of the values that it never had, each as likely."""
    free = (had[:, None] >> np.arange(plan.n_values, dtype=np.uint32)) & 1 == 0
    draw = np.random.Philox(key=derive(plan.seed, "facts", "update", stage)).random_raw(len(had))
    wanted = (draw % free.sum(axis=1).astype(np.uint64)).astype(np.int64)
    found: NDArray[np.int64] = np.argmax(free.cumsum(axis=1) == wanted[:, None] + 1, axis=1)
    return found.astype(np.int8)


def _stated(plan: Plan, stage: int, kind: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Return which facts are stated: all that changed in this stage, and a share of those kept."""
    now = kind[stage]
    stated: NDArray[np.bool_] = np.isin(now, (Kind.NEW, Kind.UPDATED, Kind.REVERTED))
    if stage:
        stated |= (now == Kind.OBSOLETE) & (kind[stage - 1] != Kind.OBSOLETE)
    kept = np.flatnonzero(now == Kind.KEPT)
    order = permutation(len(kept), plan.seed, "facts", "restate", stage)
    stated[kept[order[: rounded(plan.restate * len(kept))]]] = True
    return stated


def names(entities: IntArray, n_entities: int, seed: int) -> list[str]:
    """Return the names of towns; each town of ``range(n_entities)`` has its own."""
    n_syllables = 2
    while len(SYLLABLES) ** n_syllables < SPARSE * n_entities:
        n_syllables += 1
    numbers = shuffled(entities, len(SYLLABLES) ** n_syllables, seed, "facts", "names")
    digits = [numbers // len(SYLLABLES) ** place % len(SYLLABLES) for place in range(n_syllables)]
    return ["".join(SYLLABLES[d] for d in row).capitalize() for row in np.stack(digits, axis=1).tolist()]


def sentence(frame: str, attribute: int, town: str, value: str) -> str:
    """Return one statement."""
    about = ATTRIBUTES[attribute]
    return frame.format(noun=about.noun, verb=about.verb, town=town, value=value)


# --- shuffling without memory

ROUNDS = 6


def shuffled(places: IntArray, n: int, root: int, *key: int | str) -> IntArray:
    """Return where a permutation of ``range(n)`` sends some places, without making the rest of it.

    A Feistel network on the next power of four, walked until it comes back into range: a bijection for every key.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [np.uint64(derive(root, *key, "round", i)) for i in range(ROUNDS)]
    found = np.asarray(places, np.int64).astype(np.uint64)
    todo: Sequence[int] | IntArray = np.arange(found.size)
    while len(todo):
        left, right = found[todo] >> half, found[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        found[todo] = (left << half) | right
        todo = np.asarray(todo)[found[todo] >= np.uint64(n)]
    return found.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of splitmix64: every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
