"""What the shapes of change share: whole documents of one stream, dealt to new stages by shares of tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from clbench.derive import SPLITS, Taken
from clbench.derive import StreamTransform as _StreamTransform
from clbench.errors import ConfigError
from clbench.seeds import permutation
from clbench.stream import Split, StageInfo, Stream


class Arrangement(_StreamTransform):
    """A transform of one stream that leaves its first stages where they are and arranges the others.

    Subclasses give ``stages`` and ``arranged``. A *period* is a stage of the input.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of every shape."""

        of: str
        """The stream to arrange: a name, NAME:option=value, a YAML specification or a Python file."""
        first: int = 1
        """Stages before this one stay as they are: 1 keeps stage 0, so that the base is the same; 0 arranges all."""

    @property
    def stream(self) -> Stream:
        """The input."""
        return self.inputs[0]

    @property
    def kept(self) -> list[StageInfo]:
        """The stages that stay."""
        return self.stream.stages()[: self._first()]

    @property
    def periods(self) -> list[StageInfo]:
        """The stages that are arranged, with their places in the input."""
        return self.stream.stages()[self._first() :]

    def _first(self) -> int:
        first, n = self.options.first, len(self.stream.stages())
        if not 0 <= first < n:
            raise ConfigError(f"first={first}, but {self.stream.name} has stages 0 to {n - 1}", where=self.name)
        return int(first)

    def extras(self) -> dict[str, bytes]:
        """Return nothing: what the input's extra files say of a stage is not so of the new ones."""
        return {}

    @abstractmethod
    def arranged(self, split: Split) -> list[Taken]:
        """Return the documents of each new stage that follows the kept ones."""

    def take(self, split: Split, stage: int) -> Taken:
        """Return the documents of a new stage."""
        return self._all[split][stage]

    @cached_property
    def _all(self) -> dict[Split, list[Taken]]:
        return {split: [*(self.period(split, info) for info in self.kept), *self.arranged(split)] for split in SPLITS}

    def period(self, split: Split, info: StageInfo) -> Taken:
        """Return all documents of a stage of the input."""
        return Taken.of(info.index, np.arange(self.stream.counts(split, info.index)["n_documents"]))

    def n_tokens(self, split: Split, taken: Taken) -> NDArray[np.int64]:
        """Return the tokens of each document, ``[n]``."""
        lengths = np.zeros(len(taken), np.int64)
        for stage in np.unique(taken.stage).tolist():
            here = taken.stage == stage
            lengths[here] = np.diff(self.stream.offsets(split, stage))[taken.row[here]]
        return lengths

    def shuffled(self, taken: Taken, *names: int | str) -> Taken:
        """Return documents in an order that the option ``seed`` and the names decide."""
        return taken[permutation(len(taken), self.options.seed, type(self).name, *names)]

    def dealt(self, split: Split, taken: Taken, shares: Sequence[float], *names: int | str) -> list[Taken]:
        """Deal documents at random to parts with these shares of their tokens, see ``deal``."""
        mixed = self.shuffled(taken, split, *names)
        cuts = deal(self.n_tokens(split, mixed), shares)
        return [mixed[start:end] for start, end in pairwise(cuts)]

    def following(self, spans: Sequence[tuple[str, Sequence[StageInfo]]]) -> list[StageInfo]:
        """Return all new stages: the kept ones, then one for each name and the periods that its documents come from."""
        return self.kept + [
            StageInfo(
                index=len(self.kept) + i,
                name=name,
                start=min(info.start for info in infos),
                end=max(info.end for info in infos),
            )
            for i, (name, infos) in enumerate(spans)
        ]


def deal(lengths: NDArray[np.int64], shares: Sequence[float]) -> list[int]:
    """Cut documents in order into parts with these shares of the tokens; returns the cuts, ``[n_parts + 1]``.

    Every cut is the one nearest to its target, at most half a document off, so a part differs from its target by less
    than its longest neighbour. A part with a share gets a document while there are enough.
    """
    wanted = np.asarray(shares, np.float64)
    targets = np.cumsum(wanted)[:-1] / wanted.sum() * int(lengths.sum())
    middles = np.cumsum(lengths) - lengths / 2
    cuts = [0, *np.searchsorted(middles, targets).tolist(), len(lengths)]
    least = (wanted > 0).astype(int).tolist()
    if len(lengths) >= sum(least):
        for i in range(1, len(cuts) - 1):
            cuts[i] = max(cuts[i], cuts[i - 1] + least[i - 1])
        for i in range(len(cuts) - 2, 0, -1):
            cuts[i] = min(cuts[i], cuts[i + 1] - least[i])
    return cuts
