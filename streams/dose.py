"""``dose``: a stream whose later stages are junk to a share, at a fixed total of tokens.

``dose:of=STREAM,junk=POOL,dose=0.5``: in every stage after stage 0 half of the train tokens are posts of the pool's
arm ``junk``; the rest is the stage's own text, or posts of another arm (``control=control``). A *pool* is a stream of
one stage whose groups are arms, see ``posts``; give it the tokenizer of the stream (``tokenizer: stream:NAME``).

- Totals are exact to the token: of each side the last document is cut.
- Doses are nested: every side has one order in which its documents are taken, whatever the dose, so that the junk of
  0.2 begins the junk of 0.5, and in the stage documents stand in one common order. Curves over doses are smooth.
- Held-out is the same at every dose: the stream's own, and in every stage after 0 that of all arms of the pool.
- Nothing is repeated: no post stands in two stages, and a pool that is too small is refused with what it has.

Whether arms may be compared (tokens, rows, steps, learning rates) is told by ``clbench.exposure``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clbench.derive import StreamTransform as _StreamTransform
from clbench.derive import Taken
from clbench.errors import ConfigError, did_you_mean
from clbench.seeds import permutation
from clbench.stream import Split, StageInfo

IntArray = NDArray[np.int64]
STREAM, POOL = 0, 1
"""Places of the two inputs."""


class Dose(_StreamTransform):
    """A share of junk in every stage after stage 0, at a fixed total of tokens.

    Raises (``stages``, ``take``):
        ConfigError: the share or a stage is impossible, an arm is unknown, or there are too few tokens.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is mixed, and how much of it."""

        of: str
        """The clean stream: a name or a YAML specification."""
        junk: str
        """The pool of posts, likewise: one stage, its groups are arms (see `posts`)."""
        dose: float
        """Share of junk in the train tokens of a stage, 0 to 1."""
        arm: str = "junk"
        """Arm of the pool that is the junk."""
        control: str = ""
        """Arm of the pool that the rest is taken from; empty: the stage's own text."""
        n_tokens: int | None = None
        """Train tokens of a dosed stage; None: as many as the clean stage has."""
        at: tuple[int, ...] = ()
        """Stages that are dosed, others keep their text; empty: all after stage 0."""
        stages: int | None = None
        """Stages after stage 0 that are kept; None: all."""
        seed: int = 0
        """Another seed draws and orders other documents."""

    name = "dose"

    def sources(self) -> list[str]:
        """Return the clean stream and the pool."""
        return [self.options.of, self.options.junk]

    def stages(self) -> list[StageInfo]:
        """Return the clean stream's stages; the dates of dosed ones take in those of the pool."""
        kept = self.inputs[STREAM].stages()
        if self.options.stages is not None:
            if not 1 <= self.options.stages < len(kept):
                raise ConfigError(
                    f"stages={self.options.stages}, but {len(kept) - 1} follow stage 0",
                    where=self.name,
                    mend=f"choose 1 to {len(kept) - 1}",
                )
            kept = kept[: self.options.stages + 1]
        pool = self.inputs[POOL].stages()[0]
        dosed = set(self.dosed)
        return [
            StageInfo(
                index=info.index,
                name=info.name,
                start=min(info.start, pool.start) if info.index in dosed else info.start,
                end=max(info.end, pool.end) if info.index in dosed else info.end,
            )
            for info in kept
        ]

    @property
    def n_stages(self) -> int:
        """Stages of the new stream."""
        there = len(self.inputs[STREAM].stages())
        return there if self.options.stages is None else self.options.stages + 1

    @cached_property
    def dosed(self) -> list[int]:
        """The stages that are dosed.

        Raises:
            ConfigError: the dose is no share, or a stage cannot be dosed.
        """
        if not 0 <= self.options.dose <= 1:
            raise ConfigError(f"dose is {self.options.dose}", where=self.name, mend="choose a share from 0 to 1")
        chosen = list(self.options.at) or list(range(1, self.n_stages))
        if wrong := [stage for stage in chosen if not 1 <= stage < self.n_stages]:
            raise ConfigError(
                f"stage {wrong[0]} cannot be dosed", where=self.name, mend=f"choose among 1 to {self.n_stages - 1}"
            )
        return sorted(set(chosen))

    def total(self, stage: int) -> int:
        """Return the train tokens of a dosed stage."""
        own = self.inputs[STREAM].counts("train", stage)["n_tokens"]
        total: int = own if self.options.n_tokens is None else self.options.n_tokens
        if total < 4:
            raise ConfigError(f"n_tokens is {total}", where=self.name, mend="choose more: two documents have 4")
        return total

    def n_junk(self, stage: int) -> int:
        """Return the junk tokens of a dosed stage; a single token cannot be a document, so 1 becomes 0 or 2."""
        total = self.total(stage)
        wanted: int = round(self.options.dose * total)
        if wanted == 1:
            return 2
        return wanted - 1 if total - wanted == 1 else wanted

    def take(self, split: Split, stage: int) -> Taken:
        """Return the documents of a stage, held-out as it is and train as dosed."""
        own = Taken.of(stage, np.arange(self.inputs[STREAM].counts(split, stage)["n_documents"]), input=STREAM)
        if split == "heldout":
            n_posts = self.inputs[POOL].counts("heldout", 0)["n_documents"]
            return Taken.joined([own, Taken.of(0, np.arange(n_posts), input=POOL)]) if stage else own
        return self._dosed(stage) if stage in self.dosed else own

    def _dosed(self, stage: int) -> Taken:
        """Return junk and rest of a dosed stage, cut to the token, in an order that no dose changes."""
        n_junk = self.n_junk(stage)
        n_rest = self.total(stage) - n_junk
        junk = self._posts(self.options.arm, stage, n_junk)
        if self.options.control:
            rest = self._posts(self.options.control, stage, n_rest)
        else:
            lengths = np.diff(self.inputs[STREAM].offsets("train", stage))
            order = permutation(len(lengths), self.options.seed, "dose", "own", stage)
            rest = self._cut(STREAM, stage, order, lengths[order], n_rest, what=f"stage {stage}")
        both = Taken.joined([junk, rest])
        return both[np.argsort(self._places(stage, both), kind="stable")]

    def _posts(self, arm: str, stage: int, n_tokens: int) -> Taken:
        """Return the first posts of an arm's share for a stage that hold ``n_tokens``."""
        rows = self._shares(arm)[stage]
        return self._cut(POOL, 0, rows, self._lengths[rows], n_tokens, what=f"arm {arm}, stage {stage}")

    def _cut(self, input: int, stage: int, order: IntArray, lengths: IntArray, n_tokens: int, *, what: str) -> Taken:
        """Return the first documents of an order that hold exactly ``n_tokens``; the last is cut.

        Raises:
            ConfigError: there are not so many.
        """
        if int(lengths.sum()) < n_tokens:
            n_there = int(lengths.sum())
            name = self.inputs[input].name
            raise ConfigError(
                f"{what} of {name} has {n_there:,} train tokens of {n_tokens:,}, and nothing is repeated silently",
                where=self.name,
                mend="give n_tokens (of a stage), fewer stages, or more posts",
            )
        kept = cut_to(lengths, n_tokens)
        return Taken.of(
            stage, order[: len(kept)], input=input, n_tokens=np.where(kept == lengths[: len(kept)], 0, kept)
        )

    @cached_property
    def _lengths(self) -> IntArray:
        """Tokens of the pool's train documents, ``[n]``."""
        return np.diff(self.inputs[POOL].offsets("train", 0))

    @cached_property
    def _groups(self) -> NDArray[np.str_]:
        """Arms of the pool's train documents, ``[n]``."""
        pool = self.inputs[POOL]
        if len(pool.stages()) != 1:
            raise ConfigError(
                f"{pool.name} has {len(pool.stages())} stages", where=self.name, mend="a pool of posts has one"
            )
        groups: NDArray[np.str_] = np.array(pool.documents("train", 0, ["group"])["group"].to_pylist(), dtype=np.str_)
        return groups

    def _shares(self, arm: str) -> dict[int, IntArray]:
        """Return the documents of an arm dealt out to the dosed stages, in the order in which they are taken."""
        rows = np.flatnonzero(self._groups == arm)
        if not len(rows):
            known = sorted(set(self._groups.tolist()))
            name = self.inputs[POOL].name
            raise ConfigError(f"pool {name} has no arm {arm!r}", where=self.name, mend=did_you_mean(arm, known))
        rows = rows[permutation(len(rows), self.options.seed, "dose", "posts", arm)]
        dealt = deal(self._lengths[rows], [self.total(stage) for stage in self.dosed])
        return {stage: rows[dealt == i] for i, stage in enumerate(self.dosed)}

    def _places(self, stage: int, taken: Taken) -> NDArray[np.float64]:
        """Return a number for every document that orders a stage, the same at every dose."""
        places = np.zeros(len(taken))
        for input in (STREAM, POOL):
            n = self.inputs[input].counts("train", stage if input == STREAM else 0)["n_documents"]
            rank = np.argsort(permutation(n, self.options.seed, "dose", "order", stage, input))
            # Ranks of both inputs on one scale from 0 to 1, so that they mix evenly whatever their numbers.
            here = taken.input == input
            places[here] = (rank[taken.row[here]] + 0.5) / n
        return places


def cut_to(lengths: IntArray, n_tokens: int) -> IntArray:
    """Return how many tokens are kept of each of the first documents so that they sum to ``n_tokens`` exactly.

    No document is cut to one token (its end of text): where one is missing, an earlier document gives one up.

    Args:
        lengths: at least 2 each, at least ``n_tokens`` together.
        n_tokens: 0, or at least 2.
    """
    ends = np.cumsum(lengths)
    n = int(np.searchsorted(ends, n_tokens, side="left")) + 1 if n_tokens else 0
    kept = lengths[:n].copy()
    if n:
        kept[-1] -= ends[n - 1] - n_tokens
    if n and kept[-1] == 1:
        donors = np.flatnonzero(kept[:-1] >= 3)
        if not len(donors):
            raise ConfigError(
                f"documents of 2 tokens cannot add up to {n_tokens}", mend="choose other n_tokens or another dose"
            )
        kept[donors[-1]] -= 1
        kept[-1] = 2
    return kept


def deal(lengths: IntArray, quotas: Sequence[int]) -> IntArray:
    """Deal documents, in order, each to the stage that has the least of its quota so far; returns stages, ``[n]``.

    So the stages fill up side by side, and which stage gets a document does not depend on how much each will take.
    """
    filled = [0.0] * len(quotas)
    stages = np.empty(len(lengths), np.int64)
    for i, length in enumerate(lengths.tolist()):
        stage = filled.index(min(filled))
        stages[i] = stage
        filled[stage] += length / quotas[stage]
    return stages
