"""What tables, pages and MLflow show of a method: its scores with intervals, its mean matrix and its bill.

Everything is computed from run folders (rows and ledgers), nothing is believed. ``summarise`` takes the runs
of one method on one track, ``compare`` two summaries, ``rank`` several. ``as_dict`` gives JSON-able values,
NaN as None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from clbench.errors import ConfigError, IntegrityError, NotFoundError, did_you_mean
from clbench.results import stats
from clbench.results.matrix import (
    Array,
    Documents,
    Matrix,
    Unit,
    documents_of,
    finite_or_none,
    mean_of,
    stage_indices,
)
from clbench.results.metrics import MAIN, METRICS, Metric
from clbench.results.stats import RankRange
from clbench.results.store import RunStore

__all__ = [
    "MAIN",
    "METRICS",
    "Bill",
    "Comparison",
    "Difference",
    "MethodSummary",
    "RankRange",
    "Score",
    "compare",
    "group_runs",
    "rank",
    "scores_of",
    "summarise",
]

UNITS: tuple[Unit, ...] = ("nats_per_token", "bits_per_byte")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one method; ``value`` is the mean over seeds."""

    name: str
    value: float
    low: float
    high: float
    interval: str
    """``t over seeds``, ``bootstrap over documents (evaluation noise)`` or ``none``."""
    n: int
    """Seeds, or documents for the bootstrap."""
    reason: str | None
    """Why the value or its interval is NaN."""
    unit: str
    """``nats_per_token``, ``bits_per_byte`` or ``ratio``."""
    direction: Literal["lower", "higher"]
    """Which way is better."""
    regret: bool
    """Whether the oracle was subtracted."""
    per_seed: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return _jsonable(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of method a minus that of method b."""

    name: str
    value: float
    low: float
    high: float
    interval: str
    n: int
    """Common seeds, or documents for the bootstrap."""
    p: float
    """Two-sided, not adjusted for the number of comparisons."""
    reason: str | None
    unit: str
    direction: Literal["lower", "higher"]

    @property
    def better(self) -> Literal["a", "b"] | None:
        """Which method is better where the interval leaves out zero, else None."""
        if not (self.low > 0 or self.high < 0):
            return None
        return "a" if (self.high < 0) == (self.direction == "lower") else "b"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return _jsonable({**asdict(self), "better": self.better})


@dataclass(frozen=True)
class Bill:
    """What one run cost: means over the ``n_runs`` runs with a ledger, for memory the maximum."""

    n_runs: int
    tokens: dict[int, dict[int, float]]
    """Stage trained -> source stage -> tokens."""
    flops: dict[str, float]
    """Purpose -> floating-point operations."""
    seconds: dict[str, float]
    peak_memory_bytes: float
    stored_bytes: dict[str, float]

    @property
    def n_tokens(self) -> float:
        """Tokens trained on."""
        return self._total(n for sources in self.tokens.values() for n in sources.values())

    @property
    def total_flops(self) -> float:
        """Floating-point operations of all purposes."""
        return self._total(self.flops.values())

    @property
    def overhead(self) -> float:
        """FLOPs of teachers, branches, control passes and the like, as a share of those of the ordinary steps."""
        train = self.flops.get("train", 0.0)
        return self._total(n for purpose, n in self.flops.items() if purpose not in ("train", "evaluate")) / (
            train or math.nan
        )

    @property
    def total_seconds(self) -> float:
        """Seconds of all purposes."""
        return self._total(self.seconds.values())

    @property
    def total_stored_bytes(self) -> float:
        """Bytes that the method had to keep."""
        return self._total(self.stored_bytes.values())

    def _total(self, values: Iterable[float]) -> float:
        return float(sum(values)) if self.n_runs else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, totals included."""
        totals = {
            "n_tokens": self.n_tokens,
            "total_flops": self.total_flops,
            "total_seconds": self.total_seconds,
            "total_stored_bytes": self.total_stored_bytes,
        }
        return _jsonable({**asdict(self), **totals})


@dataclass(frozen=True)
class MethodSummary:
    """The runs of one method on one track, summed up."""

    label: str
    track: dict[str, Any]
    stages: list[dict[str, Any]]
    seeds: list[int]
    """The seeds that were averaged."""
    suite: str
    unit: Unit
    """Of the scores."""
    matrices: dict[Unit, Matrix]
    """Means over seeds."""
    oracle: dict[Unit, Array | None]
    """Loss per period, shape ``[C]``."""
    scores: dict[str, Score]
    """By name, all of METRICS."""
    bill: Bill
    missing_rows: list[int]
    """Stages without a row: the run is unfinished, or some checkpoints were not given."""
    left_out: dict[int, str]
    """Seed -> why it was not averaged."""
    commands: dict[int, str]
    """Seed -> command that reproduces its run."""
    documents: dict[int, Documents] = field(repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether every stage has its row and no seed was left out."""
        return not self.missing_rows and not self.left_out

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, everything but the documents."""
        return {
            "label": self.label,
            "track": {key: self.track.get(key) for key in ("name", "version", "sha256", "stream", "stream_sha256")},
            "stages": self.stages,
            "seeds": self.seeds,
            "suite": self.suite,
            "unit": self.unit,
            "complete": self.complete,
            "missing_rows": self.missing_rows,
            "left_out": {str(seed): reason for seed, reason in self.left_out.items()},
            "matrices": {unit: matrix.as_dict() for unit, matrix in self.matrices.items()},
            "oracle": {
                unit: None if vector is None else [finite_or_none(v) for v in vector]
                for unit, vector in self.oracle.items()
            },
            "scores": {name: score.as_dict() for name, score in self.scores.items()},
            "bill": self.bill.as_dict(),
            "commands": {str(seed): command for seed, command in self.commands.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Method a minus method b, score by score."""

    a: str
    b: str
    seeds: list[int]
    """Common seeds."""
    scores: dict[str, Difference]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        scores = {name: score.as_dict() for name, score in self.scores.items()}
        return {"a": self.a, "b": self.b, "seeds": self.seeds, "scores": scores}


def _jsonable(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the mapping with string keys, also nested, and None for NaN and infinity."""
    return {
        str(key): _jsonable(value)
        if isinstance(value, Mapping)
        else finite_or_none(value)
        if isinstance(value, float)
        else value
        for key, value in values.items()
    }


# reading runs


@dataclass(frozen=True)
class _Run:
    """One run's facts from run.yaml."""

    store: RunStore
    label: str
    method: dict[str, Any]
    seed: int
    track: dict[str, Any]
    stages: list[dict[str, Any]]
    command: str

    @classmethod
    def read(cls, store: RunStore) -> _Run:
        config = store.config()
        try:
            return cls(
                store=store,
                label=str(config["method"]["label"]),
                method=dict(config["method"]),
                seed=int(config["seed"]),
                track={"name": "?", **config["track"], "sha256": str(config["track"]["sha256"])},
                stages=[dict(stage) for stage in config["stages"]],
                command=str(config.get("command", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"run.yaml lacks or garbles {error}", where=store.folder, mend="restore the file or run again"
            ) from None


def group_runs(runs: Sequence[RunStore]) -> dict[str, list[RunStore]]:
    """Return the runs by method label, in the order of their first appearance, seeds ascending.

    Raises:
        ConfigError: the runs are of different tracks, or a method has a seed twice.
    """
    read = [_Run.read(store) for store in runs]
    _check_one_track(read)
    groups: dict[str, list[_Run]] = {}
    for run in read:
        groups.setdefault(run.label, []).append(run)
    for group in groups.values():
        _check_seeds(group)
    return {label: [run.store for run in sorted(group, key=lambda run: run.seed)] for label, group in groups.items()}


def _check_one_track(runs: Sequence[_Run]) -> None:
    for run in runs[1:]:
        if run.track["sha256"] != runs[0].track["sha256"]:
            raise ConfigError(
                f"runs of different tracks cannot be mixed: {runs[0].track['name']} "
                f"({runs[0].track['sha256'][:12]}) and {run.track['name']} ({run.track['sha256'][:12]})",
                where=run.store.folder,
                mend="give the runs of one track and version",
            )


def _check_seeds(runs: Sequence[_Run]) -> None:
    seen: dict[int, _Run] = {}
    for run in runs:
        if run.seed in seen:
            raise ConfigError(
                f"two runs of {run.label} with seed {run.seed}: {seen[run.seed].store.folder}",
                where=run.store.folder,
                mend="leave one of them out",
            )
        seen[run.seed] = run


# one method


def summarise(runs: Sequence[RunStore], *, suite: str = "heldout", unit: Unit = "nats_per_token") -> MethodSummary:
    """Sum up the runs of one method on one track.

    Several seeds give t-intervals over seeds; one seed gives a bootstrap over documents, labelled so. Seeds
    with fewer rows than the others are left out and named in ``left_out``.

    Args:
        runs: one per seed.
        suite: whose rows are the matrix.
        unit: of the scores; matrices come in both units.

    Raises:
        ConfigError: no run, several methods, several tracks, or a seed twice.
        NotFoundError: no matrix row is complete.
        IntegrityError: a file is broken.
    """
    if not runs:
        raise ConfigError("no runs to sum up", mend="give at least one run folder")
    read = sorted((_Run.read(store) for store in runs), key=lambda run: run.seed)
    _check_one_track(read)
    _check_seeds(read)
    first = read[0]
    if odd := next((run for run in read if run.method != first.method), None):
        raise ConfigError(
            f"runs of different methods cannot be averaged: {first.label} and {odd.label}",
            where=odd.store.folder,
            mend="sum up each method by itself",
        )
    kept, left_out = _with_most_rows(read)
    columns = stage_indices(first.store)
    documents = {run.seed: documents_of(run.store, suite) for run in kept}
    per_seed = {u: {seed: d.matrix(u, columns) for seed, d in documents.items()} for u in (*UNITS, unit)}
    oracle = {u: _oracle(first, u, len(columns)) for u in (*UNITS, unit)}
    return MethodSummary(
        label=first.label,
        track=first.track,
        stages=first.stages,
        seeds=[run.seed for run in kept],
        suite=suite,
        unit=unit,
        matrices={u: mean_of(list(matrices.values())) for u, matrices in per_seed.items()},
        oracle=oracle,
        scores=scores_of(per_seed[unit], documents, oracle[unit]),
        bill=_bill([run.store for run in kept]),
        missing_rows=[stage for stage in columns if stage not in kept[0].store.stages_done()],
        left_out=left_out,
        commands={run.seed: run.command for run in kept},
        documents=documents,
    )


def _with_most_rows(runs: Sequence[_Run]) -> tuple[list[_Run], dict[int, str]]:
    """Return the runs with the most rows, and why each other one is left out."""
    rows = {run.seed: tuple(run.store.stages_done()) for run in runs}
    most = max(rows.values(), key=len)
    if not most:
        raise NotFoundError("no row of the matrix is complete yet", where=runs[0].store.folder, mend="run it first")
    left_out = {
        seed: f"has rows {list(done)} where others have {list(most)}" for seed, done in rows.items() if done != most
    }
    return [run for run in runs if run.seed not in left_out], left_out


def _oracle(run: _Run, unit: Unit, n_columns: int) -> Array | None:
    """Return the frozen oracle losses of the track, ``[C]``, or None."""
    oracle = run.track.get("oracle")
    if not oracle or oracle.get(unit) is None:
        return None
    vector = np.asarray(oracle[unit], dtype=np.float64)
    if vector.shape != (n_columns,):
        raise IntegrityError(
            f"the track's oracle has {vector.size} losses for {n_columns} stages",
            where=run.store.folder,
            mend="restore run.yaml or run again",
        )
    return vector


def scores_of(
    matrices: dict[int, Matrix],
    documents: dict[int, Documents],
    oracle: Array | None,
    names: Sequence[str] = tuple(METRICS),
) -> dict[str, Score]:
    """Return metrics with their intervals: t over seeds, or for one seed the bootstrap over documents.

    Args:
        matrices: per seed.
        documents: per seed, what the matrices were computed from.
        oracle: loss per period, shape ``[C]``; without it losses are plain.
        names: of METRICS.
    """
    resampled = None
    if len(matrices) == 1:
        ((seed, matrix),) = matrices.items()
        (resampled,) = stats.resample([documents[seed]], matrix.unit, matrix.column_stages)
    return {name: _score(METRICS[name], matrices, documents, oracle, resampled) for name in names}


def _score(
    metric: Metric,
    matrices: dict[int, Matrix],
    documents: dict[int, Documents],
    oracle: Array | None,
    resampled: Matrix | None,
) -> Score:
    values = {seed: metric.compute(matrix, oracle) for seed, matrix in matrices.items()}
    per_seed = {seed: value.value for seed, value in values.items()}
    undefined = next((value.reason for value in values.values() if value.reason), None)
    if undefined:
        interval = stats.Interval(math.nan, n=len(values), reason=undefined)
    elif resampled is not None:
        ((seed, value),) = per_seed.items()
        interval = stats.bootstrap_interval(value, metric.compute(resampled, oracle).array, documents[seed].n)
    else:
        interval = stats.t_interval(list(per_seed.values()))
    return Score(
        name=metric.name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        interval=interval.kind,
        n=interval.n,
        reason=interval.reason,
        unit=_unit(metric, matrices),
        direction=metric.direction,
        regret=metric.regret and oracle is not None,
        per_seed=per_seed,
    )


def _unit(metric: Metric, matrices: dict[int, Matrix]) -> str:
    return "ratio" if metric.unit == "ratio" else next(iter(matrices.values())).unit


def _bill(stores: Sequence[RunStore]) -> Bill:
    """Return the mean bill of the runs that have a ledger."""
    ledgers = [ledger for store in stores if (ledger := _checked_ledger(store))]
    stages = {int(stage) for ledger in ledgers for stage in ledger.get("tokens", {})}
    return Bill(
        n_runs=len(ledgers),
        tokens={
            stage: {
                int(source): mean
                for source, mean in _means([ledger.get("tokens", {}).get(str(stage), {}) for ledger in ledgers]).items()
            }
            for stage in sorted(stages)
        },
        flops=_means([ledger.get("flops", {}) for ledger in ledgers]),
        seconds=_means([ledger.get("seconds", {}) for ledger in ledgers]),
        peak_memory_bytes=max(
            (float(ledger.get("peak_memory_bytes", math.nan)) for ledger in ledgers), default=math.nan
        ),
        stored_bytes=_means([ledger.get("stored_bytes", {}) for ledger in ledgers]),
    )


def _checked_ledger(store: RunStore) -> dict[str, Any]:
    """Return the ledger if its parts are mappings of finite numbers.

    Raises:
        IntegrityError: they are not.
    """
    ledger = store.ledger()
    parts = [ledger.get(name, {}) for name in ("flops", "seconds", "stored_bytes")]
    tokens = ledger.get("tokens", {})
    parts += list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    numbers = [n for part in parts if isinstance(part, dict) for n in part.values()]
    numbers.append(ledger.get("peak_memory_bytes", 0))
    whole = all(isinstance(part, dict) for part in parts) and all(
        isinstance(n, int | float) and math.isfinite(n) for n in numbers
    )
    stages = [key for part in (tokens, *tokens.values()) for key in part] if whole else []
    if not (whole and all(str(key).isdecimal() for key in stages)):
        raise IntegrityError(
            "ledger.json does not have its form", where=store.folder, mend="restore the file or run again"
        )
    return ledger


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each key; a ledger that lacks a key paid nothing for it."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(float(part.get(key, 0)) for part in parts) / len(parts) for key in keys}


# several methods


def compare(a: MethodSummary, b: MethodSummary, names: Sequence[str] | None = None) -> Comparison:
    """Return a - b for each score, paired by seed.

    Two or more common seeds give a t-interval of the per-seed differences; one gives a bootstrap over the
    same resampled documents for both, labelled evaluation noise.

    Args:
        a: one method.
        b: another, on the same track, suite and unit.
        names: scores; all of METRICS unless given.

    Raises:
        ConfigError: tracks, suites or units differ.
        ClbenchError: one common seed, and the two were measured on different documents.
        NotFoundError: an unknown score.
    """
    return _compare(a, b, tuple(METRICS) if names is None else names, documents=True)


def _compare(a: MethodSummary, b: MethodSummary, names: Sequence[str], *, documents: bool) -> Comparison:
    if (a.track["sha256"], a.suite, a.unit) != (b.track["sha256"], b.suite, b.unit):
        raise ConfigError(
            f"{a.label} and {b.label} differ in track, suite or unit",
            mend="compare methods of one track, summed up with the same suite and unit",
        )
    if unknown := next((name for name in names if name not in METRICS), None):
        raise NotFoundError(f"unknown score {unknown!r}", mend=did_you_mean(unknown, METRICS))
    seeds = sorted(set(a.seeds) & set(b.seeds))
    resampled = _resampled_pair(a, b, seeds[0]) if documents and len(seeds) == 1 else None
    return Comparison(
        a.label, b.label, seeds, {name: _difference(METRICS[name], a, b, seeds, resampled) for name in names}
    )


def _resampled_pair(a: MethodSummary, b: MethodSummary, seed: int) -> tuple[Matrix, Matrix]:
    columns = a.matrices[a.unit].column_stages
    one, other = stats.resample([a.documents[seed], b.documents[seed]], a.unit, columns)
    return one, other


def _difference(
    metric: Metric,
    a: MethodSummary,
    b: MethodSummary,
    seeds: list[int],
    resampled: tuple[Matrix, Matrix] | None,
) -> Difference:
    interval = _difference_interval(metric, a, b, seeds, resampled)
    return Difference(
        name=metric.name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        interval=interval.kind,
        n=interval.n,
        p=interval.p,
        reason=interval.reason,
        unit=a.scores[metric.name].unit,
        direction=metric.direction,
    )


def _difference_interval(
    metric: Metric,
    a: MethodSummary,
    b: MethodSummary,
    seeds: list[int],
    resampled: tuple[Matrix, Matrix] | None,
) -> stats.Interval:
    if not seeds:
        return stats.Interval(math.nan, reason="no common seed")
    if a.matrices[a.unit].row_stages != b.matrices[b.unit].row_stages:
        return stats.Interval(math.nan, n=len(seeds), reason="the two have different rows")
    score_a, score_b = a.scores[metric.name], b.scores[metric.name]
    for label, score in ((a.label, score_a), (b.label, score_b)):
        if math.isnan(score.value):
            return stats.Interval(math.nan, n=len(seeds), reason=f"{label}: {score.reason}")
    first, second = [score_a.per_seed[s] for s in seeds], [score_b.per_seed[s] for s in seeds]
    if resampled is None:
        return stats.paired_t(first, second)
    oracle = a.oracle[a.unit]
    drawn = [metric.compute(matrix, oracle).array for matrix in resampled]
    return stats.bootstrap_interval(first[0] - second[0], drawn[0] - drawn[1], a.documents[seeds[0]].n)


def rank(summaries: Sequence[MethodSummary], names: Sequence[str] | None = None) -> dict[str, dict[str, RankRange]]:
    """Return score name -> method label -> range of ranks, from Holm-corrected paired t-tests over seeds.

    Pairs with one common seed decide nothing, so single runs are not ranked.

    Args:
        summaries: one per method, of one track.
        names: scores; MAIN unless given.

    Raises:
        ConfigError: tracks, suites or units differ, or a label comes twice.
    """
    labels = [summary.label for summary in summaries]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"a method comes twice: {', '.join(labels)}", mend="give one summary per method")
    names = MAIN if names is None else names
    pairs = [_compare(a, b, names, documents=False) for a, b in itertools.combinations(summaries, 2)]
    return {
        name: stats.rank_ranges(
            labels,
            {(pair.a, pair.b): _interval(pair.scores[name]) for pair in pairs},
            direction=METRICS[name].direction,
        )
        for name in names
    }


def _interval(difference: Difference) -> stats.Interval:
    d = difference
    return stats.Interval(d.value, d.low, d.high, d.n, d.interval, d.p, d.reason)
