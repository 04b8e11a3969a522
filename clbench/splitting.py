"""Decides which documents train and which are held out, over all stages of a stream.

The identity's hash decides the side; held-out documents that any stage trains on, exactly or nearly, are dropped, and
what is over a cap. Nothing is read but hashes and signatures, so the memory is some 40 bytes a document and 0.8 kB a
held-out candidate. Repeats in train stay and are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clbench.duplicates import PERMUTATIONS, NearIndex, near_repeats
from clbench.parts import DROPPED, HELDOUT, TRAIN, Part
from clbench.stream import Split, StageInfo, StreamSource

CANDIDATES, CANDIDATES_PER_KEPT = 10_000, 20
"""Where held-out documents are capped, so many (or so many times the cap) are compared with what trains."""
_SIDES: dict[Split, int] = {"train": TRAIN, "heldout": HELDOUT}


@dataclass
class StageSplit:
    """One stage: its parts as one list of n documents."""

    info: StageInfo
    parts: list[Part]
    counts: dict[Split, dict[str, int]] = field(default_factory=dict)
    """Duplicates and drops, for the manifest."""

    def __post_init__(self) -> None:
        self.id_hash = np.concatenate([part.hashes(".id") for part in self.parts])
        self.key = np.concatenate([part.hashes(".key") for part in self.parts])
        self.starts: NDArray[np.int64] = np.cumsum([0, *(part.counts["n_documents"] for part in self.parts)])
        self.side: NDArray[np.uint8] = np.full(len(self.key), TRAIN, np.uint8)

    def rows(self, side: int) -> NDArray[np.int64]:
        """Return the places of the documents on one side."""
        return np.flatnonzero(self.side == side)

    def by_part(self, places: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return ascending places as rows within each part."""
        cuts = np.searchsorted(places, self.starts)
        bounds = zip(self.starts[:-1], cuts[:-1], cuts[1:], strict=True)
        return [places[low:high] - start for start, low, high in bounds]

    def signatures(self, places: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return the signatures at ascending places, shape ``[len(places), P]``."""
        pieces = [part.signatures()[rows] for part, rows in zip(self.parts, self.by_part(places), strict=True)]
        return np.concatenate([np.zeros((0, PERMUTATIONS), np.uint32), *pieces])


def split_stages(stages: Sequence[StageSplit], source: StreamSource) -> None:
    """Set ``side`` and ``counts`` of every stage, and write each part's ``.side``."""
    for stage in stages:
        stage.side[stage.id_hash < np.uint64(int(source.heldout_fraction * 2.0**64))] = HELDOUT
    beyond = [_drop_beyond_candidates(stage, source) for stage in stages]
    _drop_duplicates(stages)
    for stage, n_beyond in zip(stages, beyond, strict=True):
        stage.counts["heldout"]["dropped_over_cap"] = n_beyond + _cap(stage, source)
    _count_repeats(stages)
    for stage in stages:
        for part, low, high in zip(stage.parts, stage.starts[:-1], stage.starts[1:], strict=True):
            part.file(".side").write_bytes(stage.side[low:high].tobytes())


def _groups(stage: StageSplit) -> NDArray[np.uint64]:
    return np.concatenate([part.hashes(".group") for part in stage.parts])


def _keep_smallest(stage: StageSplit, *, per_group: int | None, in_all: int | None) -> int:
    """Drop held-out documents beyond the smallest identity hashes of a group, then of the stage; return how many."""
    rows = stage.rows(HELDOUT)
    order = rows[np.argsort(stage.id_hash[rows], kind="stable")]
    kept = order
    if per_group is not None:
        group = _groups(stage)[kept]
        by_group = np.argsort(group, kind="stable")
        sorted_groups = group[by_group]
        rank = np.arange(len(kept)) - np.searchsorted(sorted_groups, sorted_groups, side="left")
        kept = kept[np.sort(by_group[rank < per_group])]
    if in_all is not None:
        kept = kept[:in_all]
    stage.side[np.setdiff1d(rows, kept)] = DROPPED
    return len(rows) - len(kept)


def _drop_beyond_candidates(stage: StageSplit, source: StreamSource) -> int:
    """Drop held-out documents that a cap would drop whatever duplicates are found: they need not be compared."""
    in_all, per_group = source.heldout_max_documents, source.heldout_max_per_group
    if (in_all is None and per_group is None) or len(stage.rows(HELDOUT)) <= CANDIDATES:
        return 0
    return _keep_smallest(
        stage,
        per_group=None if per_group is None else CANDIDATES_PER_KEPT * per_group,
        in_all=None if in_all is None else max(CANDIDATES, CANDIDATES_PER_KEPT * in_all),
    )


def _cap(stage: StageSplit, source: StreamSource) -> int:
    """Keep the held-out documents with the smallest identity hashes; return how many went (none trains)."""
    return _keep_smallest(stage, per_group=source.heldout_max_per_group, in_all=source.heldout_max_documents)


def _drop_duplicates(stages: Sequence[StageSplit]) -> None:
    """Drop from held-out what any stage trains on, exactly or nearly."""
    trained = np.unique(np.concatenate([stage.key[stage.rows(TRAIN)] for stage in stages]))
    for stage in stages:
        rows = stage.rows(HELDOUT)
        exact = rows[np.isin(stage.key[rows], trained, kind="sort")]
        stage.side[exact] = DROPPED
        stage.counts["heldout"] = {"dropped_exact": len(exact), "dropped_near": 0}
    queries = [stage.rows(HELDOUT) for stage in stages]
    index = NearIndex(np.concatenate([stage.signatures(q) for stage, q in zip(stages, queries, strict=True)]))
    for stage in stages:
        for part, rows in zip(stage.parts, stage.by_part(stage.rows(TRAIN)), strict=True):
            index.meet(part.signatures()[rows])
    ends = np.cumsum([len(q) for q in queries])
    for stage, rows, found in zip(stages, queries, np.split(index.found, ends[:-1]), strict=True):
        stage.side[rows[found]] = DROPPED
        stage.counts["heldout"]["dropped_near"] = int(found.sum())


def _count_repeats(stages: Sequence[StageSplit]) -> None:
    """Count per stage and split what repeats an earlier text of the stage, and what trained in an earlier stage."""
    earlier: NDArray[np.uint64] = np.zeros(0, np.uint64)
    for stage in stages:
        for name, side in _SIDES.items():
            stage.counts[name] = stage.counts.get(name, {}) | _repeats(stage, side)
        keys = stage.key[stage.rows(TRAIN)]
        stage.counts["train"]["repeated_from_earlier_stage"] = int(np.isin(keys, earlier, kind="sort").sum())
        earlier = np.union1d(earlier, keys)


def _repeats(stage: StageSplit, side: int) -> dict[str, int]:
    """Count the documents of a side that repeat an earlier one of the same stage (another identity)."""
    rows = stage.rows(side)
    _, first = np.unique(stage.key[rows], return_index=True)
    distinct = rows[np.sort(first)]
    near = near_repeats(*(part.signatures() for part in stage.parts), rows=stage.by_part(distinct))
    return {"repeated_exact": len(rows) - len(distinct), "repeated_near": int(near.sum())}
