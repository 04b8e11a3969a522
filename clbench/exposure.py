"""What an arm is shown: tokens, rows, optimizer steps and summed learning rate, per stage and group of documents.

Computed before training from stream, track and method, through the same order and schedule as the loop. Equal tokens
are not equal exposure: one post a row, short posts make several times the optimizer steps of long ones, each with a
learning rate of its own. What a run really did stands in its ledger; ``clbench.results.arms`` compares runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.method import Composed, Cosine, Need
from clbench.stream import Stream
from clbench.track import Track

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GroupExposure:
    """The part of one group of documents in a stage."""

    tokens: int
    """Target tokens."""
    rows: int
    """Rows that hold any of its text."""
    steps: int
    """Optimizer steps whose batch holds any of its text."""
    learning_rate_sum: float
    """Learning rates of the steps, each times the group's share of the step's target tokens; groups add up."""


@dataclass(frozen=True, kw_only=True)
class StageExposure:
    """What one stage of a run trains on."""

    stage: int
    tokens: int
    rows: int
    steps: int
    learning_rate_sum: float
    groups: Mapping[str, GroupExposure]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)


def exposure(track: Track, stream: Stream, method: Composed, *, seed: int) -> list[StageExposure]:
    """Return what every trained stage of a run will be shown; nothing is trained.

    Raises:
        ConfigError: the method's plan does not hold together.
    """
    from clbench.run import plan_stages

    return [_of_stage(track, stream, method, stage, seed) for stage in plan_stages(track, stream, seed)]


def _of_stage(track: Track, stream: Stream, method: Composed, stage: Any, seed: int) -> StageExposure:
    from clbench.train.rows import RowPlanner

    plan = method.plan(stage)
    # The loop's own function, so that what is planned cannot differ from what is done.
    keeps_control = method.needs(Need.CONTROL_DATA)
    planner = RowPlanner(stream=stream, training=track.training, seed=seed, keeps_control=keeps_control)
    order = planner.rows(stage, plan)
    schedule = plan.schedule or Cosine(peak=stage.learning_rate, warmup_steps=stage.warmup_steps, floor=stage.floor)
    n_steps = order.n_steps if plan.train else 0
    rates = np.array([schedule(step, n_steps) for step in range(n_steps)])
    n_rows = len(order.start) if n_steps else 0
    rows = np.stack([order.source, order.start, order.n_targets], axis=1)[:n_rows].astype(np.int64)
    return StageExposure(
        stage=stage.index,
        tokens=int(rows[:, 2].sum()),
        rows=n_rows,
        steps=n_steps,
        learning_rate_sum=running_sum(rates),
        groups=by_group(stream, rows, np.arange(n_rows) // track.training.batch_rows, rates),
    )


def running_sum(rates: NDArray[np.float64]) -> float:
    """Return the sum as the loop forms it: one step after another, so that the last bit agrees with the ledger."""
    total = 0.0
    for rate in rates.tolist():
        total += rate
    return total


def by_group(stream: Stream, rows: IntArray, step: IntArray, rates: NDArray[np.float64]) -> dict[str, GroupExposure]:
    """Return what each group of documents has in these rows.

    Args:
        stream: the built stream.
        rows: source stage, place of the first input and number of targets, ``[n_rows, 3]``.
        step: the optimizer step of each row, ``[n_rows]``.
        rates: learning rate of each step, ``[n_steps]``.
    """
    names: list[str] = []
    found: list[IntArray] = []
    for source in np.unique(rows[:, 0]).tolist():
        here = np.flatnonzero(rows[:, 0] == source)
        row, document, tokens = overlaps(rows[here, 1], rows[here, 2], stream.offsets("train", source))
        groups = stream.documents("train", source, ["group"])["group"].to_pylist()
        known = {name: place for place, name in enumerate(names)}
        places = np.array([known.setdefault(name, len(known)) for name in groups], np.int64)
        names = list(known)
        found.append(np.stack([here[row], places[document], tokens]))
    if not found:
        return {}
    row, group, tokens = np.concatenate(found, axis=1)
    step_tokens = np.bincount(step, rows[:, 2], minlength=len(rates))
    weights = rates[step[row]] * tokens / step_tokens[step[row]]
    return {
        names[g]: GroupExposure(
            tokens=int(tokens[group == g].sum()),
            rows=len(np.unique(row[group == g])),
            steps=len(np.unique(step[row[group == g]])),
            learning_rate_sum=float(weights[group == g].sum()),
        )
        for g in sorted(np.unique(group).tolist(), key=lambda g: names[g])
    }


def overlaps(first: IntArray, n_targets: IntArray, offsets: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Return which rows hold how many tokens of which documents: (row, document, tokens), each ``[n_pairs]``.

    The targets of a row are the tokens ``first + 1`` to ``first + n_targets``; ``offsets`` say where documents begin.
    """
    start, end = first + 1, first + 1 + n_targets
    lowest = np.searchsorted(offsets, start, side="right") - 1
    n_documents = np.searchsorted(offsets, end - 1, side="right") - lowest
    row = np.repeat(np.arange(len(first)), n_documents)
    document = np.arange(len(row)) - np.repeat(np.cumsum(n_documents) - n_documents, n_documents) + lowest[row]
    tokens = np.minimum(offsets[document + 1], end[row]) - np.maximum(offsets[document], start[row])
    held = tokens > 0
    return row[held], document[held], tokens[held]
