"""What a model knows of facts with a known history: known, forgotten, relapsed, stale or never learned, fact by fact.

A *truth table* says which of its candidate values each fact has in each stage; a suite's rows say, for every checkpoint
k, fact and stage i, whether the model's answer is the truth of stage i (metric ``right:FORM``: 1, 0, or 1/m when m
candidates tie). Nothing else is needed. Definitions, for checkpoint k and a fact that holds or held by then:

- the answer is *right* if it is the truth of stage k, alone at the top (a tie is nobody's answer);
- else *outdated* if it is the truth of an earlier stage;
- else *ahead* if it is the truth of a later stage only: a fact-blind model does so at a known rate, more is leakage;
- else *other*;
- the model *knew* if, at a measured checkpoint j < k since the truth last changed, its answer was right.

=========  ==============  ==================  ======================
 answer:    right           outdated            ahead or other
=========  ==============  ==================  ======================
 knew       known           relapsed            forgotten
 did not    known           stale               never learned
=========  ==============  ==================  ======================

A fact that ceased to hold has the truth "nothing"; who still answers its last value is stale (or relapsed). Facts that
do not hold yet have no status; their answers are ahead or other.

Chance: a model that picks a candidate blindly is right with 1/C, outdated and ahead with the number of such values / C.
``constant`` is what the best fixed answer per attribute scores, knowing the truth table: no model that knows nothing of
the single fact does better.

Letters in names: K checkpoints, F facts, T stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import special

from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.results.matrix import Array, finite_or_none
from clbench.results.stats import LEVEL, NONE, Interval, t_interval
from clbench.results.store import RunStore

Mask = NDArray[np.bool_]

FORMS = ("trained", "paraphrase")
"""Questions in the words of the documents, and in words that no document has."""
ANSWERS = ("right", "outdated", "ahead", "other")
STATUSES = ("known", "relapsed", "forgotten", "stale", "never learned")
GROUPS = ("current", "new", "kept, stated", "kept, not stated", "updated", "reverted", "obsolete", "unborn")
"""Facts by what happened to them in the checkpoint's stage; ``current`` are all that hold."""
OVER_FACTS = "Wilson over facts (evaluation noise)"
UNBORN, OBSOLETE = "unborn", "obsolete"


# --- the truth table


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One question: ``prompt`` and a candidate, with a space between, are a whole statement."""

    frame: str
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact; tuples have one entry a stage.

    ``value`` is None before the fact holds; ``kind`` is unborn, new, kept, updated, reverted or obsolete; ``date`` is
    that of a change; ``n_stated`` counts the training sentences of the stage that state it.
    """

    fact: str
    entity: str
    attribute: str
    value: tuple[str | None, ...]
    kind: tuple[str, ...]
    date: tuple[str | None, ...]
    n_stated: tuple[int, ...]
    probes: dict[str, Probe]


@dataclass(frozen=True)
class Truth:
    """The truth table of a stream: stages by name, candidates by attribute, facts."""

    stages: tuple[str, ...]
    candidates: dict[str, tuple[str, ...]]
    facts: tuple[Fact, ...]
    n_facts: int
    """Of the world; ``facts`` may be a sample."""

    @classmethod
    def parse(cls, content: bytes, where: object = None) -> Truth:
        """Read JSON lines: first stages and candidates, then a line a fact.

        Raises:
            IntegrityError: a line is broken, or facts and stages do not fit together.
        """
        try:
            head, *lines = (json.loads(line) for line in content.decode().splitlines())
            candidates = {name: tuple(values) for name, values in head["candidates"].items()}
            truth = cls(tuple(head["stages"]), candidates, tuple(_fact(line) for line in lines), int(head["n_facts"]))
            for fact in truth.facts:
                _check_fact(fact, len(truth.stages), candidates[fact.attribute])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"the truth table cannot be read: {type(error).__name__} {error}",
                where=where,
                mend="build the stream again",
            ) from None
        return truth

    @cached_property
    def code(self) -> NDArray[np.int64]:
        """Place of each fact's value among its candidates, -1 before it holds; shape ``[F, T]``."""
        place = {name: {value: i for i, value in enumerate(values)} for name, values in self.candidates.items()}
        rows = [[-1 if v is None else place[fact.attribute][v] for v in fact.value] for fact in self.facts]
        return np.array(rows, np.int64).reshape(len(rows), len(self.stages))

    @cached_property
    def n_candidates(self) -> NDArray[np.int64]:
        """Candidates of each fact, ``[F]``."""
        return np.array([len(self.candidates[fact.attribute]) for fact in self.facts], np.int64)

    @cached_property
    def stated(self) -> Mask:
        """Whether a stage's documents state the fact, ``[F, T]``."""
        return np.array([fact.n_stated for fact in self.facts], np.int64).reshape(self.code.shape) > 0

    @cached_property
    def kind(self) -> NDArray[np.str_]:
        """What befell each fact in each stage, ``[F, T]``."""
        return np.array([fact.kind for fact in self.facts], np.str_).reshape(self.code.shape)

    @cached_property
    def expected(self) -> Array:
        """How often a blind pick among the candidates is right, outdated and ahead at each stage, ``[3, T, F]``."""
        counts = np.zeros((3, len(self.stages), len(self.facts)))
        for f, code in enumerate(self.code.tolist()):
            for stage in range(len(self.stages)):
                now = {code[stage]} - {-1}
                before = set(code[:stage]) - now - {-1}
                counts[:, stage, f] = len(now), len(before), len(set(code[stage + 1 :]) - now - before - {-1})
        return counts / self.n_candidates


def _fact(line: Mapping[str, Any]) -> Fact:
    sequences = {name: tuple(line[name]) for name in ("value", "kind", "date", "n_stated")}
    probes = {form: Probe(**probe) for form, probe in line["probes"].items()}
    return Fact(
        fact=str(line["fact"]),
        entity=str(line["entity"]),
        attribute=str(line["attribute"]),
        probes=probes,
        **sequences,
    )


def _check_fact(fact: Fact, n_stages: int, candidates: Sequence[str]) -> None:
    lengths = {len(fact.value), len(fact.kind), len(fact.date), len(fact.n_stated)}
    if lengths != {n_stages} or not {v for v in fact.value if v is not None} <= set(candidates):
        raise ValueError(f"fact {fact.fact!r} does not fit the stages or candidates")


# --- answers, from rows


@dataclass(frozen=True)
class Answers:
    """``right[k, f, i]``: whether checkpoint k answers fact f with the truth of stage i (NaN: it has none there)."""

    truth: Truth
    checkpoints: tuple[int, ...]
    right: Array

    @classmethod
    def of(cls, rows: Mapping[int, pa.Table], truth: Truth, form: str = FORMS[0]) -> Answers:
        """Align the rows of several checkpoints with the truth table.

        Raises:
            IntegrityError: a fact that was to be asked is missing, unknown, or there twice.
        """
        place = {fact.fact: i for i, fact in enumerate(truth.facts)}
        right = np.full((len(rows), *truth.code.shape), np.nan)
        for k, (stage, table) in enumerate(sorted(rows.items())):
            table = table.filter(pc.equal(table["metric"], f"right:{form}"))
            items, stages = table["item"].to_pylist(), table["stage"].to_numpy()
            if not set(items) <= place.keys() or len(items) != (truth.code >= 0).sum():
                raise IntegrityError(
                    f"the rows after stage {stage} do not ask the facts of the truth table",
                    mend="take the truth table of the stream that the run was measured on",
                )
            right[k, [place[item] for item in items], stages] = table["value"].to_numpy()
        if not np.array_equal(np.isnan(right), np.broadcast_to(truth.code < 0, right.shape)):
            raise IntegrityError("a fact is asked twice or about a stage where it does not hold", mend="measure again")
        return cls(truth, tuple(sorted(rows)), right)

    @classmethod
    def of_run(cls, store: RunStore, truth: Truth, form: str = FORMS[0], *, suite: str = "facts") -> Answers:
        """Align the complete rows of a run.

        Raises:
            NotFoundError: no row is complete, or this suite was not measured.
        """
        done = store.stages_done()
        if not done:
            raise NotFoundError("no row of the matrix is complete yet", where=store.folder, mend="run it first")
        return cls.of({stage: store.rows(suite, stage) for stage in done}, truth, form)

    # What each checkpoint makes of each fact, shape [K, F].

    @cached_property
    def here(self) -> NDArray[np.int64]:
        """The checkpoints' stages, ``[K]``."""
        return np.array(self.checkpoints, np.int64)

    @cached_property
    def born(self) -> Mask:
        """Whether the fact holds or held by the checkpoint's stage."""
        return self.truth.code[:, self.here].T >= 0

    @cached_property
    def score(self) -> Array:
        """How right the answer is now: 1, 0, or 1/m in a tie; NaN for the unborn."""
        picked: Array = np.stack([self.right[k, :, stage] for k, stage in enumerate(self.here)])
        return picked

    @cached_property
    def answer(self) -> NDArray[np.int64]:
        """Place in ANSWERS."""
        matches, t = self.right == 1, np.arange(len(self.truth.stages))
        before = (matches & (t < self.here[:, None])[:, None, :]).any(axis=2)
        after = (matches & (t > self.here[:, None])[:, None, :]).any(axis=2)
        return np.select([self.score == 1, before, after], [0, 1, 2], 3)

    @cached_property
    def since(self) -> NDArray[np.int64]:
        """The stage in which the present truth came to hold."""
        code = self.truth.code
        changed = np.diff(code, axis=1, prepend=-1) != 0
        last = np.maximum.accumulate(np.where(changed, np.arange(code.shape[1]), 0), axis=1)
        return last[:, self.here].T

    @cached_property
    def knew(self) -> Mask:
        """Whether an earlier checkpoint since then was right."""
        knew = np.zeros(self.score.shape, np.bool_)
        for k in range(len(self.here)):
            for j in range(k):
                knew[k] |= (self.here[j] >= self.since[k]) & (self.score[j] == 1)
        return knew

    @cached_property
    def status(self) -> NDArray[np.int64]:
        """Place in STATUSES; -1 for the unborn."""
        right, outdated = self.answer == 0, self.answer == 1
        table = [~self.born, right, self.knew & outdated, self.knew, outdated]
        return np.select(table, [-1, 0, 1, 2, 3], 4)

    @cached_property
    def lag(self) -> NDArray[np.int64]:
        """Stages since the fact was last stated; -1 for the unborn."""
        t = np.arange(len(self.truth.stages))
        last = np.maximum.accumulate(np.where(self.truth.stated, t, -1), axis=1)[:, self.here].T
        return np.where(last >= 0, self.here[:, None] - last, -1)

    def members(self, k: int, group: str) -> Mask:
        """Return which facts belong to one of GROUPS, or to ``lag N``, at the k-th checkpoint; shape ``[F]``."""
        stage = self.checkpoints[k]
        kind = self.truth.kind[:, stage]
        found: Mask = kind == group
        if group == "current" or group.startswith("lag "):
            found = ~np.isin(kind, (UNBORN, OBSOLETE))
        if group.startswith("lag "):
            found &= self.lag[k] == int(group.removeprefix("lag "))
        if group.startswith("kept"):
            found = (kind == "kept") & (self.truth.stated[:, stage] == (group == "kept, stated"))
        return found

    def trajectories(self) -> pa.Table:
        """Return one row per fact and checkpoint: what happened to it, what was answered, what that makes it."""
        facts, n_facts = self.truth.facts, len(self.truth.facts)
        columns: dict[str, list[Any]] = {
            "fact": [fact.fact for fact in facts] * len(self.checkpoints),
            "attribute": [fact.attribute for fact in facts] * len(self.checkpoints),
            "checkpoint": np.repeat(self.here, n_facts).tolist(),
            "kind": [fact.kind[stage] for stage in self.checkpoints for fact in facts],
            "truth": [fact.value[stage] for stage in self.checkpoints for fact in facts],
            "stages_since_stated": [None if lag < 0 else lag for lag in self.lag.ravel().tolist()],
            "answer": [ANSWERS[a] for a in self.answer.ravel().tolist()],
            "status": [None if s < 0 else STATUSES[s] for s in self.status.ravel().tolist()],
        }
        return pa.table(columns)


# --- chance


def best_constant(truth: Truth, stage: int, members: Mask) -> float:
    """Return the share that the best fixed answer per attribute gets right; NaN where nothing holds."""
    found: dict[str, dict[int, int]] = {}
    for f in np.flatnonzero(members & (truth.code[:, stage] >= 0)):
        here = found.setdefault(truth.facts[f].attribute, {})
        here[int(truth.code[f, stage])] = here.get(int(truth.code[f, stage]), 0) + 1
    total = sum(sum(here.values()) for here in found.values())
    return sum(max(here.values()) for here in found.values()) / total if total else math.nan


# --- scores of a group


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """What a method's checkpoint makes of one group of facts; shares are of the group's ``n`` facts."""

    label: str
    form: str
    checkpoint: int
    group: str
    n: int
    chance: float
    """Of accuracy."""
    constant: float
    """Accuracy of the best fixed answer per attribute."""
    chance_outdated: float
    chance_ahead: float
    scores: dict[str, Interval]
    """accuracy (ties share), corrected = (accuracy - chance)/(1 - chance), outdated, ahead, and every status."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, NaN as None."""
        flat = {key: finite_or_none(v) if isinstance(v, float) else v for key, v in asdict(self).items()}
        scores = {
            name: {key: finite_or_none(v) if isinstance(v, float) else v for key, v in asdict(one).items()}
            for name, one in self.scores.items()
        }
        return {**flat, "scores": scores}


def wilson(share: float, n: int, level: float = LEVEL) -> Interval:
    """Return a share with Wilson's score interval; facts are the units, so it is evaluation noise.

    centre = (p + z²/2n) / (1 + z²/n), half width = z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n).
    """
    if n == 0:
        return Interval(math.nan, reason="no fact is in this group")
    z = float(special.ndtri((1 + level) / 2))
    centre, scale = (share + z * z / (2 * n)) / (1 + z * z / n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n, OVER_FACTS)


def scores_of(runs: Sequence[Answers], label: str, form: str, k: int, group: str) -> GroupScore:
    """Return the scores of a group at the k-th checkpoint: over seeds where there are several, else over facts."""
    first = runs[0]
    stage, members = first.checkpoints[k], first.members(k, group)
    n, expected = int(members.sum()), first.truth.expected[:, stage, members]
    chance = dict(zip(ANSWERS, expected.mean(axis=1).tolist() if n else [math.nan] * 3, strict=False))
    shares = [_shares(answers, k, members) for answers in runs]
    scores = {name: _interval([one[name] for one in shares], n) for name in shares[0]}
    if group == UNBORN:
        scores = {"ahead": scores["ahead"]}
    else:
        scores["corrected"] = _corrected(scores["accuracy"], chance["right"])
    return GroupScore(
        label=label,
        form=form,
        checkpoint=stage,
        group=group,
        n=n,
        chance=chance["right"] if group != UNBORN else math.nan,
        constant=best_constant(first.truth, stage, members),
        chance_outdated=chance["outdated"],
        chance_ahead=chance["ahead"],
        scores=scores,
    )


def _shares(answers: Answers, k: int, members: Mask) -> dict[str, float]:
    """Return the plain shares of one run."""
    n = int(members.sum())
    if n == 0:
        return dict.fromkeys(("accuracy", "outdated", "ahead", *STATUSES), math.nan)
    shares = {"accuracy": float(answers.score[k, members].mean())}
    shares |= {
        name: float((answers.answer[k, members] == ANSWERS.index(name)).mean()) for name in ("outdated", "ahead")
    }
    return shares | {name: float((answers.status[k, members] == place).mean()) for place, name in enumerate(STATUSES)}


def _interval(values: Sequence[float], n: int) -> Interval:
    if n == 0 or len(values) == 1:
        return wilson(values[0], n)
    return t_interval(values)


def _corrected(accuracy: Interval, chance: float) -> Interval:
    """Return (accuracy - chance) / (1 - chance), its bounds moved along."""
    if not chance < 1:
        return Interval(math.nan, n=accuracy.n, kind=NONE, reason=accuracy.reason or "there is one candidate")
    value, low, high = ((x - chance) / (1 - chance) for x in (accuracy.value, accuracy.low, accuracy.high))
    return Interval(value, low, high, accuracy.n, accuracy.kind, reason=accuracy.reason)


def summarise(
    runs: Mapping[str, Sequence[RunStore]],
    truth: Truth,
    *,
    suite: str = "facts",
    forms: Iterable[str] = FORMS,
) -> list[GroupScore]:
    """Return every group's scores at every checkpoint of every method, and by stages since a fact was last stated.

    Args:
        runs: label -> one store per seed, all with the same rows.
        truth: of the stream that they were measured on.
        suite: whose rows.
        forms: of FORMS.

    Raises:
        ConfigError: the seeds of a method have different rows.
    """
    found = []
    for label, stores in runs.items():
        for form in forms:
            answers = [Answers.of_run(store, truth, form, suite=suite) for store in stores]
            if len({one.checkpoints for one in answers}) > 1:
                raise ConfigError(f"the seeds of {label} have different rows", mend="finish all seeds first")
            for k, stage in enumerate(answers[0].checkpoints):
                groups = [*GROUPS, *(f"lag {lag}" for lag in range(stage + 1))]
                found += [scores_of(answers, label, form, k, group) for group in groups]
    return found
