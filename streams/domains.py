"""``domains``: one domain after another, all its periods together: change that is sudden and not of time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clbench.derive import SPLITS, Taken
from clbench.errors import ConfigError, did_you_mean
from clbench.seeds import permutation
from clbench.stream import Split, StageInfo
from clbench.streams import _arrange

REST = "rest"


class Domains(_arrange.Arrangement):
    """A stage for each group of documents (package, site …), or for several groups together.

    Groups with less than ``min_share`` of the train tokens, or fewer than ``min_heldout`` held-out documents, have no
    stage of their own unless ``order`` names them.
    """

    name = "domains"

    @dataclass(frozen=True, kw_only=True)
    class Options(_arrange.Arrangement.Options):
        """Which groups, in which order."""

        seed: int = 0
        """Decides ``by=random``."""
        order: tuple[str, ...] = ()
        """Groups in their order, such as numpy+django; ``numpy&scipy`` is one stage of two groups."""
        by: Literal["size", "name", "random"] = "size"
        """The order when none is given: by tokens (the largest first), by name, or at random."""
        min_share: float = 0.02
        """Share of the train tokens below which a group joins the rest, when no order is given."""
        min_heldout: int = 10
        """Held-out documents below which it does: a column of few documents is mostly noise."""
        rest: Literal["joined", "left_out"] = "joined"
        """What has no stage of its own: one last stage ``rest``, or left out."""

    def stages(self) -> list[StageInfo]:
        """Return a stage for each domain, with the dates of the periods it appears in."""
        spans = []
        for name, groups in self._domains:
            found = {stage for split in SPLITS for stage in np.unique(self._of(split, groups).stage).tolist()}
            spans.append((name, [info for info in self.periods if info.index in found]))
        return self.following(spans)

    def arranged(self, split: Split) -> list[Taken]:
        """Return each domain's documents in the order of time."""
        return [self._of(split, groups) for _, groups in self._domains]

    def _of(self, split: Split, groups: tuple[str, ...]) -> Taken:
        taken, group = self._groups[split]
        return taken[np.isin(group, groups)]

    @cached_property
    def _groups(self) -> dict[Split, tuple[Taken, NDArray[np.str_]]]:
        """All documents of the periods in the order of time, and the group of each."""
        found = {}
        for split in SPLITS:
            taken = Taken.joined(self.period(split, info) for info in self.periods)
            batches = (self.stream.document_batches(split, info.index, ["group"]) for info in self.periods)
            group = np.array([name for batch in chain(*batches) for name in batch["group"].to_pylist()], np.str_)
            found[split] = taken, group
        return found

    @cached_property
    def _domains(self) -> list[tuple[str, tuple[str, ...]]]:
        """The new stages: name and groups."""
        size = self._sizes()
        if self.options.order:
            named = [self._named(entry, size) for entry in self.options.order]
        else:
            n_heldout = Counter(self._groups["heldout"][1].tolist())
            least, fewest = self.options.min_share * sum(size.values()), max(1, self.options.min_heldout)
            own = [name for name in sorted(size) if n_heldout[name] >= fewest and size[name] >= max(least, 1)]
            named = [(name, (name,)) for name in self._sorted(own, size)]
        groups = [group for _, groups in named for group in groups]
        if twice := sorted({group for group in groups if groups.count(group) > 1}):
            raise ConfigError(f"group {twice[0]!r} is named twice", where=f"option order of {self.name}")
        rest = tuple(sorted(set(size) - set(groups)))
        if rest and self.options.rest == "joined":
            if not all(len(self._of(split, rest)) for split in SPLITS):
                raise ConfigError(
                    f"the rest ({', '.join(rest[:5])}) has no train or no held-out documents",
                    where=self.name,
                    mend="leave it out with rest=left_out, or put it with another group in `order`",
                )
            named.append((REST, rest))
        return named

    def _sizes(self) -> dict[str, int]:
        """Return group -> its train tokens; 0 where it is only held out."""
        size = dict.fromkeys(np.unique(self._groups["heldout"][1]).tolist(), 0)
        taken, group = self._groups["train"]
        names, place = np.unique(group, return_inverse=True)
        tokens = np.zeros(len(names), np.int64)
        np.add.at(tokens, place, self.n_tokens("train", taken))
        return size | dict(zip(names.tolist(), tokens.tolist(), strict=True))

    def _named(self, entry: str, size: dict[str, int]) -> tuple[str, tuple[str, ...]]:
        """Return the stage that an entry of ``order`` asks for."""
        groups = (entry,) if entry in size else tuple(entry.split("&"))
        for group in groups:
            if group not in size:
                raise ConfigError(
                    f"no document is of group {group!r}",
                    where=f"option order of {self.name}",
                    mend=did_you_mean(group, size),
                )
        return entry, groups

    def _sorted(self, names: list[str], size: dict[str, int]) -> list[str]:
        """Return names, sorted, in the order of the option ``by``."""
        if self.options.by == "random":
            return [names[i] for i in permutation(len(names), self.options.seed, type(self).name, "order")]
        return sorted(names, key=lambda name: -size[name]) if self.options.by == "size" else names
