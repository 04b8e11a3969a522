"""``shuffled``: the control that says how much of "forgetting" is time. The same documents, in no order of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clbench.derive import Taken
from clbench.stream import Split, StageInfo
from clbench.streams import _arrange


class Shuffled(_arrange.Arrangement):
    """Every document of the periods goes to a stage drawn at random; each stage keeps its number of tokens.

    A document lands in stage k with probability N_k / N: the stage's tokens among those of all that are shuffled. So
    every stage holds the same mixture of periods, and nothing drifts.
    """

    name = "shuffled"

    @dataclass(frozen=True, kw_only=True)
    class Options(_arrange.Arrangement.Options):
        """Which stages, and what is measured."""

        seed: int = 0
        """Another seed is another shuffle."""
        heldout: Literal["shuffled", "kept"] = "shuffled"
        """shuffled: dealt like train, so that every column measures the mixture. kept: columns stay periods."""

    def stages(self) -> list[StageInfo]:
        """Return ``mix-1``, ``mix-2`` …, each from the first day to the last; held-out that is kept keeps its names."""
        kept = self.options.heldout == "kept"
        return self.following([(p.name if kept else f"mix-{p.index}", self.periods) for p in self.periods])

    def arranged(self, split: Split) -> list[Taken]:
        """Deal all documents of the periods."""
        parts = [self.period(split, info) for info in self.periods]
        if split == "heldout" and self.options.heldout == "kept":
            return parts
        shares = [float(self.n_tokens(split, part).sum()) for part in parts]
        return self.dealt(split, Taken.joined(parts), shares)
