"""``facts``: a generated world with known truth, to tell apart what a model forgets, misses and knows only as it was.

Invented towns have attributes (a metal, a bird …) whose values change from stage to stage. Documents of a stage state
what holds then, among sentences that state nothing; suite ``facts`` asks. Definitions and limits: docs/facts.md.
The world itself is ``_facts_world``; this file spreads its statements over documents, lazily and in parts, and writes
the truth down for whoever asks.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError
from clbench.files import canonical_json
from clbench.seeds import derive
from clbench.stream import Document, StageInfo, StreamSource
from clbench.streams._facts_world import (
    ASKED,
    ATTRIBUTES,
    HELDOUT,
    MENTIONS,
    PROSE,
    TRAINED,
    WORDS,
    IntArray,
    Kind,
    Plan,
    World,
    names,
    rounded,
    sentence,
    shuffled,
)

VERSION = 1
TRUTH = "facts.jsonl"
"""Name of the extra file; JSON lines rather than Parquet, so that its digest depends on no library's version."""
FIRST_YEAR = 2001
CHUNK_DOCUMENTS = 5000
"""Documents that are drawn together: what is in memory at one time. Part of VERSION."""
PART_CHUNKS = 10
HELDOUT_MAX = 2000
"""Held-out documents in a stage, at most: they are made, not found, so none need be thrown away."""
DAY_OF_DOCUMENTS = 90
"""Events have their date in the first ninety days of a year, documents theirs after that."""

Item = TypeVar("Item")
Size = Literal["tiny", "small", "medium", "large"]
SIZES: dict[Size, dict[str, int]] = {
    "tiny": {"n_entities": 60, "n_attributes": 4, "n_values": 9, "n_stages": 5, "exposures": 12, "vocab_size": 768},
    "small": {"n_entities": 1000, "n_attributes": 4, "n_values": 9, "n_stages": 6, "exposures": 15, "vocab_size": 2048},
    "medium": {"n_entities": 20_000, "n_attributes": 5, "n_values": 12, "n_stages": 8, "exposures": 15}
    | {"vocab_size": 4096},
    "large": {"n_entities": 100_000, "n_attributes": 6, "n_values": 15, "n_stages": 10, "exposures": 20}
    | {"vocab_size": 8192},
}
"""What an option that is not given is, by size; ``vocab_size`` is the stream's."""


class Facts(StreamSource):
    """A generated world with known truth: facts that are kept, updated, reverted, obsolete and new.

    Raises:
        ConfigError: options that leave no such world; which and why is said.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How large the world is and how it changes; shares are exact, to the fact."""

        size: Size = "tiny"
        """Preset for the options that are not given: tiny, small, medium or large (millions of documents)."""
        n_entities: int | None = None
        """Towns."""
        n_attributes: int | None = None
        """Facts a town has, 1 to 8."""
        n_values: int | None = None
        """Values of each attribute, from n_stages to 16; a question has one candidate more, `nothing`."""
        n_stages: int | None = None
        """Stages, one invented year each."""
        exposures: int | None = None
        """Training sentences in a stage that state one fact."""
        new: float = 0.04
        """Share of all facts that come to hold in each stage after stage 0."""
        updated: float = 0.12
        """Share of the facts that held in the stage before which get a value they never had."""
        reverted: float = 0.06
        """Share of them that go back to the value before the present one (none can in stage 1)."""
        obsolete: float = 0.06
        """Share of them that cease to hold: the stage says so, and no later one mentions them."""
        restate: float = 0.3
        """Share of the facts kept that a stage states again."""
        statements: int = 4
        """Statements in a document."""
        distractor_sentences: float = 0.3
        """Share of the sentences of such a document that state nothing."""
        distractor_documents: float = 0.2
        """Share of the documents that state nothing at all."""
        probed: int = 5000
        """Facts that the suite asks, at most; a sample of fixed size, drawn by the seed."""
        seed: int = 0
        """Another seed is another world."""

    name = "facts"
    heldout_fraction = 0.1
    options: Options

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        preset = dict(SIZES[self.options.size])
        self.vocab_size = preset.pop("vocab_size")
        given = {key: getattr(self.options, key) for key in preset if getattr(self.options, key) is not None}
        self.options = replace(self.options, **preset | given)
        self.plan = Plan(**{field.name: getattr(self.options, field.name) for field in fields(Plan)})
        _check(self.options, self.plan)

    def stages(self) -> list[StageInfo]:
        """Return one invented year per stage."""
        years = range(FIRST_YEAR, FIRST_YEAR + self.plan.n_stages)
        return [
            StageInfo(index=i, name=str(year), start=f"{year}-01-01", end=f"{year}-12-31")
            for i, year in enumerate(years)
        ]

    def settings(self) -> dict[str, Any]:
        """Return the resolved options and the version of the generator."""
        options = {key: value for key, value in asdict(self.options).items() if key != "size"}
        return {"version": VERSION, **options, "heldout_fraction": self.heldout_fraction}

    @cached_property
    def world(self) -> World:
        """What is true when; made once, about 30 bytes a fact and stage at its peak."""
        return World.make(self.plan)

    # --- documents

    def counts(self, stage: int) -> Counts:
        """Return how many documents of which role a stage has, without making any."""
        return Counts.of(self.options, len(self.world.stated_facts(stage)), self.heldout_fraction)

    def n_parts(self, stage: int) -> int:
        """Return the number of parts of PART_CHUNKS chunks."""
        return -(-self.counts(stage).n_documents // (PART_CHUNKS * CHUNK_DOCUMENTS))

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield the documents of a stage, roles mixed."""
        return itertools.chain.from_iterable(self.part(stage, part) for part in range(self.n_parts(stage)))

    def part(self, stage: int, part: int) -> Iterator[Document]:
        """Yield one part; it is made from its number alone."""
        counts = self.counts(stage)
        chunks = range(part * PART_CHUNKS, min((part + 1) * PART_CHUNKS, -(-counts.n_documents // CHUNK_DOCUMENTS)))
        return itertools.chain.from_iterable(self._chunk(stage, chunk, counts) for chunk in chunks)

    def _chunk(self, stage: int, chunk: int, counts: Counts) -> Iterator[Document]:
        """Yield CHUNK_DOCUMENTS documents, or what is left of them."""
        seed, first = self.options.seed, chunk * CHUNK_DOCUMENTS
        serials = np.arange(first, min(first + CHUNK_DOCUMENTS, counts.n_documents))
        roles = shuffled(serials, counts.n_documents, seed, "facts", "roles", stage)
        draws = _Draws.of(len(serials), counts.n_sentences, seed, "facts", "text", stage, chunk)
        pages = self._pages(stage, counts, roles, draws)
        year, heldout, states = FIRST_YEAR + stage, counts.is_heldout(roles).tolist(), counts.states(roles).tolist()
        for i, lines in enumerate(pages):
            yield Document(
                id=self._identity(f"facts/{year}/{serials[i]:07d}", heldout=heldout[i]),
                text="\n".join(lines) + "\n",
                date=_date(year, DAY_OF_DOCUMENTS + int(draws.day[i] * (365 - DAY_OF_DOCUMENTS))),
                group="statements" if states[i] else "prose",
                change="new",
            )

    def _identity(self, stem: str, *, heldout: bool) -> str:
        """Return the first ``stem-0``, ``stem-1`` … whose hash puts the document where it was planned.

        So every statement that is meant to train does, and the shares are exact; the split is still by hash alone.
        """
        edge = int(self.heldout_fraction * 2.0**64)
        for attempt in itertools.count():
            if (split_hash(name := f"{stem}-{attempt}") < edge) == heldout:
                break
        return name

    def _pages(self, stage: int, counts: Counts, roles: IntArray, draws: _Draws) -> Iterator[list[str]]:
        """Yield the lines of each document: its statements and distractors, mixed."""
        fact, frame = self._statements(stage, counts, roles, draws)
        n_fillers = np.where(counts.states(roles), counts.n_sentences - self.options.statements, counts.n_sentences)
        said, filled = self._said(stage, fact, frame), self._fillers(draws, n_fillers)
        order = np.argsort(draws.order, axis=1, kind="stable").tolist()
        for places, n_said, n_filled in zip(order, (fact >= 0).sum(axis=1).tolist(), n_fillers.tolist(), strict=True):
            page = [*itertools.islice(said, n_said), *itertools.islice(filled, n_filled)]
            yield [page[place] for place in places if place < len(page)]

    def _statements(self, stage: int, counts: Counts, roles: IntArray, draws: _Draws) -> tuple[IntArray, IntArray]:
        """Return fact and frame of every statement of some documents, shape ``[n, statements]``; fact -1: no statement.

        Training documents share out ``exposures`` statements of each stated fact, its frames taken in turn; held-out
        ones state facts drawn at random, in frames drawn at random.
        """
        options, stated = self.options, self.world.stated_facts(stage)
        n_statements = len(stated) * int(options.exposures or 0)
        slot = roles[:, None] * options.statements + np.arange(options.statements)
        fact, frame = np.full(slot.shape, -1, np.int64), np.zeros(slot.shape, np.int64)
        trains = (roles < counts.n_statement_train)[:, None] & (slot < n_statements)
        turn = shuffled(slot[trains], n_statements, options.seed, "facts", "statements", stage)
        exposure = turn % int(options.exposures or 1)
        fact[trains] = stated[turn // int(options.exposures or 1)]
        frame[trains] = (exposure + fact[trains]) % len(TRAINED)
        asks = counts.states(roles) & counts.is_heldout(roles)
        fact[asks] = stated[(draws.fact[asks] * len(stated)).astype(np.int64)][:, : options.statements]
        frame[asks] = (draws.frame[asks] * len(TRAINED)).astype(np.int64)[:, : options.statements]
        return fact, frame

    def _said(self, stage: int, fact: IntArray, frame: IntArray) -> Iterator[str]:
        """Yield the sentences of statements, row by row."""
        facts, frames = fact[fact >= 0], frame[fact >= 0].tolist()
        n_attributes = self.plan.n_attributes
        towns = names(facts // n_attributes, self.plan.n_entities, self.plan.seed)
        values = self.world.value[stage, facts].tolist()
        candidates = [self.world.candidates(a) for a in range(n_attributes)]
        for a, town, value, number in zip((facts % n_attributes).tolist(), towns, values, frames, strict=True):
            yield sentence(TRAINED[number], a, town, candidates[a][value])

    def _fillers(self, draws: _Draws, n_fillers: IntArray) -> Iterator[str]:
        """Yield sentences that state nothing, row by row: half name a town and a value, half neither."""
        drawn = draws.filler[np.arange(draws.filler.shape[1]) < n_fillers[:, None]]
        towns = names((drawn[:, 1] * self.plan.n_entities).astype(np.int64), self.plan.n_entities, self.plan.seed)
        candidates = [self.world.candidates(a) for a in range(self.plan.n_attributes)]
        for (half, a, b, c, d, e), town in zip(drawn.tolist(), towns, strict=True):
            if half < 0.5:
                yield _pick(MENTIONS, d).format(town=town, value=_pick(_pick(candidates, b), c))
            else:
                words = zip(WORDS.items(), (a, b, c, d), strict=True)
                yield _pick(PROSE, e).format(**{kind: _pick(choices, draw) for (kind, choices), draw in words})

    # --- truth

    def extras(self) -> dict[str, bytes]:
        """Return the truth of the probed facts and the questions about them, as JSON lines."""
        plan, world = self.plan, self.world
        n_probed = min(self.options.probed, plan.n_facts)
        facts = np.sort(shuffled(np.arange(n_probed), plan.n_facts, plan.seed, "facts", "probed"))
        head = {
            "format": 1,
            "stages": [stage.name for stage in self.stages()],
            "n_facts": plan.n_facts,
            "candidates": {ATTRIBUTES[a].noun: list(world.candidates(a)) for a in range(plan.n_attributes)},
        }
        towns = names(facts // plan.n_attributes, plan.n_entities, plan.seed)
        lines = [canonical_json(head)]
        lines += [canonical_json(self._truth(int(f), town)) for f, town in zip(facts, towns, strict=True)]
        return {TRUTH: ("\n".join(lines) + "\n").encode()}

    def _truth(self, fact: int, town: str) -> dict[str, Any]:
        """Return everything about one fact: one entry a stage in ``value``, ``kind``, ``date`` and ``n_stated``."""
        world, a = self.world, fact % self.plan.n_attributes
        candidates = world.candidates(a)
        values, kinds = world.value[:, fact].tolist(), [Kind(k) for k in world.kind[:, fact].tolist()]
        return {
            "fact": f"{town}/{ATTRIBUTES[a].noun}",
            "entity": town,
            "attribute": ATTRIBUTES[a].noun,
            "value": [None if v < 0 else candidates[v] for v in values],
            "kind": [kind.name.lower() for kind in kinds],
            "date": [self._event_date(fact, stage, kinds) for stage in range(len(kinds))],
            "n_stated": (world.stated[:, fact] * int(self.options.exposures or 0)).tolist(),
            "probes": {form: self._probe(form, fact, a, town) for form in ASKED},
        }

    def _event_date(self, fact: int, stage: int, kinds: Sequence[Kind]) -> str | None:
        """Return the date on which a fact changed in a stage, None if it did not."""
        lasting = (
            kinds[stage] in (Kind.UNBORN, Kind.KEPT) or kinds[max(stage, 1) - 1 : stage + 1] == [Kind.OBSOLETE] * 2
        )
        day = derive(self.plan.seed, "facts", "date", stage, fact) % DAY_OF_DOCUMENTS
        return None if lasting else _date(FIRST_YEAR + stage, day)

    def _probe(self, form: str, fact: int, attribute: int, town: str) -> dict[str, str]:
        """Return the question of one form: one of its frames, by the seed, up to the value."""
        frames = TRAINED if form == "trained" else HELDOUT
        number = ASKED[form][derive(self.plan.seed, "facts", "probe", form, fact) % len(ASKED[form])]
        prompt = sentence(frames[number].partition("{value}")[0].rstrip(), attribute, town, "")
        return {"frame": f"{form}-{number}", "prompt": prompt}


@dataclass(frozen=True)
class Counts:
    """Documents of a stage; roles are numbered in the order of the first four fields."""

    n_statement_train: int
    n_prose_train: int
    n_statement_heldout: int
    n_prose_heldout: int
    n_sentences: int
    """In each document."""

    @classmethod
    def of(cls, options: Facts.Options, n_stated: int, heldout_fraction: float) -> Counts:
        """Return the counts of a stage that states ``n_stated`` facts."""
        n_statement = -(-n_stated * int(options.exposures or 0) // options.statements)
        n_prose = rounded(n_statement * options.distractor_documents / (1 - options.distractor_documents))
        n_heldout = min(HELDOUT_MAX, rounded((n_statement + n_prose) * heldout_fraction / (1 - heldout_fraction)))
        n_asking = max(1, rounded(n_heldout * n_statement / (n_statement + n_prose)))
        n_sentences = rounded(options.statements / (1 - options.distractor_sentences))
        return cls(n_statement, n_prose, n_asking, max(0, n_heldout - n_asking), n_sentences)

    @property
    def n_train(self) -> int:
        """Documents that train."""
        return self.n_statement_train + self.n_prose_train

    @property
    def n_documents(self) -> int:
        """Documents of both splits."""
        return self.n_train + self.n_statement_heldout + self.n_prose_heldout

    def is_heldout(self, roles: IntArray) -> NDArray[np.bool_]:
        """Return which roles are held out."""
        held: NDArray[np.bool_] = roles >= self.n_train
        return held

    def states(self, roles: IntArray) -> NDArray[np.bool_]:
        """Return which roles state facts."""
        last = self.n_train + self.n_statement_heldout
        stating: NDArray[np.bool_] = (roles < self.n_statement_train) | ((roles >= self.n_train) & (roles < last))
        return stating


@dataclass(frozen=True)
class _Draws:
    """Uniform numbers in [0, 1) for n documents of S sentences."""

    day: NDArray[np.float64]
    order: NDArray[np.float64]
    fact: NDArray[np.float64]
    frame: NDArray[np.float64]
    filler: NDArray[np.float64]
    """``[n, S, 6]``."""

    @classmethod
    def of(cls, n: int, n_sentences: int, root: int, *names: int | str) -> _Draws:
        """Draw from the raw Philox stream, the only one numpy promises to keep."""
        raw = np.random.Philox(key=derive(root, *names)).random_raw(n * (1 + 9 * n_sentences))
        uniform = ((raw >> np.uint64(11)) * 2.0**-53).reshape(n, -1)
        day, order, fact, frame, filler = np.split(uniform, 1 + n_sentences * np.arange(4), axis=1)
        return cls(day[:, 0], order, fact, frame, filler.reshape(n, n_sentences, 6))


def split_hash(document_id: str) -> int:
    """Return the 64 bits that decide a document's split, as docs/streams.md promises."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big")


def _pick(items: Sequence[Item], uniform: float) -> Item:
    """Return the item at a place in [0, 1)."""
    return items[int(len(items) * uniform)]


def _date(year: int, day: int) -> str:
    """Return the date of a day of a year, counted from 0."""
    return (datetime.date(year, 1, 1) + datetime.timedelta(days=day)).isoformat()


def _check(options: Facts.Options, plan: Plan) -> None:
    """Refuse options that leave no world."""
    ranges: dict[str, tuple[float, float]] = {
        "n_entities": (1, 10**8),
        "n_attributes": (1, len(ATTRIBUTES)),
        "n_values": (plan.n_stages, len(ATTRIBUTES[0].values)),
        "n_stages": (2, len(ATTRIBUTES[0].values)),
        "exposures": (1, 10**6),
        "statements": (1, 100),
        "probed": (1, 10**7),
        **dict.fromkeys(("new", "updated", "reverted", "obsolete", "restate"), (0, 1)),
        **dict.fromkeys(("distractor_sentences", "distractor_documents"), (0, 0.9)),
    }
    for name, (low, high) in ranges.items():
        if not low <= getattr(options, name) <= high:
            raise ConfigError(f"{name} is {getattr(options, name)}", where="facts", mend=f"choose {low} to {high}")
    if options.updated + options.reverted + options.obsolete > 1:
        raise ConfigError("updated, reverted and obsolete add up to more than 1", where="facts", mend="lower them")
    if plan.n_first < 1:
        raise ConfigError(
            f"new={options.new} in {plan.n_stages - 1} stages leaves no fact for stage 0",
            where="facts",
            mend="lower it",
        )
