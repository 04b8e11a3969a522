"""An audit of a run's ledger that does not use the ledger's counts: which rows it trained on, counted again.

The rows of a stage are a pure function of stream, seed, track and plan (``clbench.train.rows``). So they are made anew
from ``run.yaml``, the built stream and the method's plans, and their tokens are counted by source. What a method
decided while it trained (``Method.review``) cannot be planned again; that is taken from the ledger, and the rows that
follow from it are counted all the same. Deletion requests are checked in the rows themselves, token by token, against
where the deleted documents lie in the stream: not through the code that leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from clbench import registry
from clbench.base import FromScratch, before_the_first_stage, open_stream
from clbench.errors import ClbenchError, ConfigError, IntegrityError
from clbench.exposure import overlaps
from clbench.files import digest_of
from clbench.method import Composed, Method, Need, Stage, StagePlan, check_mixture, tail_steps
from clbench.results.bill import PlanEntry, RunBill, one_line, read_bill
from clbench.results.series import check_cutoffs, tokens_at
from clbench.results.store import RunStore
from clbench.run import plan_stages
from clbench.stream import Stream, identity_of
from clbench.track import Track
from clbench.train.data import DataOrder
from clbench.train.rows import RowPlanner, reviewed


@dataclass(frozen=True, kw_only=True)
class StageCount:
    """One stage counted again."""

    stage: int
    steps: int
    rows: int
    tokens: dict[int, int]
    """Source stage -> target tokens."""
    branch_tokens: int
    """Target tokens of the steps that a decay branch takes once more."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {**vars(self), "tokens": {str(source): n for source, n in self.tokens.items()}}


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """Documents that were not to be drawn any more from a stage on, and what was drawn of them."""

    stage: int
    """The first stage without them."""
    n_documents: int
    """Identities that were asked for."""
    n_found: int
    """Of them, identities that have training text up to the last stage."""
    tokens_before: dict[str, int]
    """``base`` or trained stage -> tokens of them that were read before the request, as input or as target."""
    tokens_after: dict[str, int]
    """Trained stage -> tokens of them that were read afterwards. All 0, or the run broke the request."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit of one run found."""

    stages: list[StageCount]
    deletions: list[Deletion]
    problems: list[str]
    """One line for everything that differs; empty: the ledger is true."""

    @property
    def holds(self) -> bool:
        """Whether the ledger says what the rows say, and nothing deleted was drawn."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "holds": self.holds,
            "problems": self.problems,
            "stages": [one.as_dict() for one in self.stages],
            "deletions": [one.as_dict() for one in self.deletions],
        }


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """The rows of one stage."""

    stage: int
    plan: StagePlan
    order: DataOrder
    stream: Stream


def audit(store: RunStore, stream: Stream | None = None) -> Audit:
    """Count a finished run's rows again and compare them with its ledger.

    A method that is a file of the user's is imported, as the run itself did.

    Args:
        store: the run.
        stream: the one that ``open_stream`` gave for this run's track; None opens it.

    Raises:
        ConfigError: the run is unfinished, was trained elsewhere, or its rows cannot be known.
        NotFoundError, IntegrityError: the stream is not built, or is another one.
    """
    bill = read_bill(store)
    _check_kind(store, bill)
    track = track_of(store)
    stream = stream or open_stream(track)
    problems: list[str] = []
    trained = list(_trained(store, bill, track, stream, problems))
    counts = [_count(one, track) for one in trained]
    deletions = _deletions(trained, track, stream)
    problems += _differences(bill, counts)
    problems += [
        f"stage {stage}: {n:,} tokens were drawn of documents that were to be left out from stage {one.stage} on"
        for one in deletions
        for stage, n in one.tokens_after.items()
        if n
    ]
    return Audit(stages=counts, deletions=deletions, problems=problems)


def _check_kind(store: RunStore, bill: RunBill) -> None:
    if bill.outside:
        raise ConfigError(
            "these checkpoints were trained elsewhere: there is no bill that could be verified", where=store.folder
        )
    if not bill.finished:
        raise ConfigError(
            f"the run is not finished: {bill.n_rows_done} of {len(bill.stages)} rows",
            where=store.folder,
            mend="run its command again first",
        )


def track_of(store: RunStore) -> Track:
    """Return the track that stands in a run's configuration.

    Raises:
        IntegrityError: there is none.
    """
    values = {key: value for key, value in store.config()["track"].items() if key != "sha256"}
    try:
        return Track.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(
            f"run.yaml holds no track: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
            where=store.folder,
            mend="restore the file or run again",
        ) from None


# which rows


def _trained(store: RunStore, bill: RunBill, track: Track, stream: Stream, problems: list[str]) -> Iterator[_Trained]:
    """Yield the rows of every trained stage, from the first on."""
    cutoffs = _cutoffs(bill)
    if cutoffs is not None:
        yield from (_oracle(track, stream, cutoff, bill.seed) for cutoff in cutoffs)
        return
    method = _method(store, bill)
    planner = RowPlanner(
        stream=stream, training=track.training, seed=bill.seed, keeps_control=method.needs(Need.CONTROL_DATA)
    )
    for stage in plan_stages(track, stream, bill.seed):
        plan, entries = _plan(store, method, stage, bill, problems)
        order = planner.rows(stage, plan)
        for entry in entries:
            if entry.step >= order.n_steps:
                problems.append(
                    f"stage {stage.index}: the ledger holds a review at step {entry.step} of {order.n_steps}"
                )
                break
            plan = reviewed(plan, entry.model_dump())
            planner.redraw(stage, plan, order, entry.step)
        if plan.train:
            yield _Trained(stage=stage.index, plan=plan, order=order, stream=stream)


def _cutoffs(bill: RunBill) -> list[int] | None:
    """Return the cutoffs of a series of oracles; None for a method."""
    first = bill.components[0] if bill.components else {}
    if first.get("name") != "oracle-series" or first.get("target"):
        return None
    options = first.get("options")
    cutoffs = options.get("cutoffs") if isinstance(options, dict) else None
    if not isinstance(cutoffs, list) or not all(isinstance(cutoff, int) for cutoff in cutoffs):
        raise IntegrityError("run.yaml does not list the cutoffs of its oracles", mend="restore the file or run again")
    return check_cutoffs(cutoffs, len(bill.stages))


def _oracle(track: Track, stream: Stream, cutoff: int, seed: int) -> _Trained:
    """Return the rows of an oracle, or of the base."""
    past = stream.until(cutoff) if cutoff else before_the_first_stage(stream)
    n_tokens = tokens_at(cutoff, n_initial=track.base.n_tokens, n_per_stage=track.training.n_tokens_per_stage)
    stage = Stage(
        index=cutoff,
        n_stages=cutoff + 1,
        n_tokens=n_tokens,
        available_tokens=(),
        learning_rate=track.base.learning_rate,
        warmup_steps=track.base.warmup_steps,
        floor=track.training.floor,
    )
    plan = FromScratch(dict.fromkeys(range(cutoff + 1), 1 / (cutoff + 1))).plan(stage)
    planner = RowPlanner(stream=past, training=track.training.of_base(), seed=seed)
    return _Trained(stage=cutoff, plan=plan, order=planner.rows(stage, plan), stream=past)


def _method(store: RunStore, bill: RunBill) -> Composed:
    """Return the method that ``run.yaml`` names, if it is still the one that ran."""
    found = []
    for part in bill.components:
        try:
            component = registry.build_component(part["target"], dict(part["options"]))
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"run.yaml names a method without {error}", where=store.folder) from None
        now, then = component.as_dict().get("source_sha256"), part.get("source_sha256")
        if now != then:
            raise ConfigError(
                f"the file of method {component.name!r} is not the one that ran: its plans cannot be made again",
                where=store.folder,
                mend="restore the file as it was",
            )
        found.append(component.method)
    return Composed(found)


def _plan(
    store: RunStore, method: Composed, stage: Stage, bill: RunBill, problems: list[str]
) -> tuple[StagePlan, list[PlanEntry]]:
    """Return what a stage began with, and the reviews that changed it.

    A plan that does not depend on what the method learnt is made again; the rest is taken from the ledger.
    """
    entries = bill.plans.get(stage.index, [])
    plan = _planned(store, method, stage)
    _check_entries(store, stage, entries)
    if not any(map(_depends_on_state, method.components)):
        _check_planned(plan, stage, bill, problems)
    elif entries:
        plan = reviewed(plan, entries[0].model_dump())
    elif bill.tokens.get(stage.index, {}).keys() - {stage.index}:
        raise ConfigError(
            f"the plan of stage {stage.index} depends on what the method learnt, and the ledger does not hold it",
            where=store.folder,
            mend="run it again with this version",
        )
    else:
        plan = replace(plan, mixture=None, pools=None)
    _check_excluded(plan, stage, entries, problems)
    later = entries[1:]
    if any(plan.review_steps is None or entry.step % plan.review_steps for entry in later):
        problems.append(f"stage {stage.index}: the ledger holds reviews at steps where the method makes none")
    return plan, later


def _planned(store: RunStore, method: Composed, stage: Stage) -> StagePlan:
    """Return a method's plan as it is before it has learnt anything."""
    try:
        return method.plan(stage)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(
            f"stage {stage.index} cannot be planned again without what the method learnt "
            f"({type(error).__name__}: {error})",
            where=store.folder,
        ) from None


def _check_entries(store: RunStore, stage: Stage, entries: Sequence[PlanEntry]) -> None:
    """Refuse what no run writes, before it is acted on."""
    steps = [entry.step for entry in entries]
    whole = not steps or (steps[0] == 0 and all(a < b for a, b in pairwise(steps)))
    try:
        for entry in entries:
            check_mixture(entry.mixture, stage)
    except ConfigError as error:
        whole, why = False, error.what
    else:
        why = f"it changed at steps {steps}"
    if not whole:
        raise IntegrityError(
            f"ledger.json holds no plan of stage {stage.index}: {why}",
            where=store.folder,
            mend="restore the file or run again",
        )


def _depends_on_state(method: Method) -> bool:
    return method.overrides("plan") and method.overrides("state_dict")


def _check_planned(plan: StagePlan, stage: Stage, bill: RunBill, problems: list[str]) -> None:
    """Compare a plan that was made again with the ledger's, where the run wrote its plans down."""
    if not bill.plans:
        return  # runs before plans were written, and runs of new text alone
    wanted = dict(plan.mixture or {stage.index: 1.0}), dict(plan.pools or {})
    there = [entry for entry in bill.plans.get(stage.index, []) if not entry.step]
    given = (there[0].mixture, there[0].pools) if there else ({stage.index: 1.0}, {})
    if plan.train and wanted != given:
        problems.append(
            f"stage {stage.index}: the ledger says that it was drawn from {given[0]}, the method plans {wanted[0]}"
        )


def _check_excluded(plan: StagePlan, stage: Stage, entries: Sequence[PlanEntry], problems: list[str]) -> None:
    documents = sorted(plan.excluded)
    digest = digest_of(documents) if documents else ""
    if not plan.train:
        return
    for n, given in {(entry.n_excluded, entry.excluded_sha256) for entry in entries} or {(0, "")}:
        if (n, given) != (len(documents), digest):
            problems.append(
                f"stage {stage.index}: the ledger says that {n:,} documents were left out "
                f"({one_line(given[:12]) or 'none'}), the method names {len(documents):,} ({digest[:12] or 'none'})"
            )


# counting


def _count(one: _Trained, track: Track) -> StageCount:
    order = one.order
    n_branch = tail_steps(one.plan.branch.fraction, order.n_steps) if one.plan.branch is not None else 0
    on_branch = slice((order.n_steps - n_branch) * track.training.batch_rows, None) if n_branch else slice(0, 0)
    return StageCount(
        stage=one.stage,
        steps=order.n_steps,
        rows=len(order.start),
        tokens={s: int(order.n_targets[order.source == s].sum()) for s in sorted(set(order.source.tolist()))},
        branch_tokens=int(order.n_targets[on_branch].sum()),
    )


def _differences(bill: RunBill, counts: Sequence[StageCount]) -> list[str]:
    """Return a line for each number in which the ledger differs from the count."""
    found = []
    counted = {one.stage: one for one in counts}
    for stage in sorted(counted.keys() | bill.tokens.keys()):
        tokens = counted[stage].tokens if stage in counted else {}
        billed = bill.tokens.get(stage, {})
        for source in sorted(tokens.keys() | billed.keys()):
            if tokens.get(source, 0) != billed.get(source, 0):
                found.append(
                    f"stage {stage}: the ledger bills {billed.get(source, 0):,} target tokens of stage {source}, "
                    f"its rows hold {tokens.get(source, 0):,}"
                )
    for name in ("steps", "rows"):
        there: Mapping[int, int] = getattr(bill, name)
        for stage in sorted(there):  # runs before these were counted have none
            n = getattr(counted[stage], name) if stage in counted else 0
            if n != there[stage]:
                found.append(f"stage {stage}: the ledger bills {there[stage]:,} {name}, there are {n:,}")
    branch, billed_branch = sum(one.branch_tokens for one in counts), bill.extra_tokens.get("decay_branch", 0)
    if branch != billed_branch:
        found.append(f"the ledger bills {billed_branch:,} tokens of decay branches, their rows hold {branch:,}")
    return found


# deletion


def _deletions(trained: Sequence[_Trained], track: Track, stream: Stream) -> list[Deletion]:
    """Return the deletion requests of a run and what was read of their documents."""
    requests: dict[int, frozenset[str]] = {}
    known: frozenset[str] = frozenset()
    for one in trained:
        if new := one.plan.excluded - known:
            requests[one.stage] = new
            known |= new
    if not requests:
        return []
    base = _oracle(track, stream, 0, track.base.seed)
    ids = {info.index: _identities(stream, info.index) for info in stream.stages()}
    found = []
    for stage, wanted in requests.items():
        where = {source: np.flatnonzero([name in wanted for name in names]) for source, names in ids.items()}
        before = {"base": _tokens_read(base, where)}
        before |= {str(one.stage): _tokens_read(one, where) for one in trained if one.stage < stage}
        after = {str(one.stage): _tokens_read(one, where) for one in trained if one.stage >= stage}
        found.append(
            Deletion(
                stage=stage,
                n_documents=len(wanted),
                n_found=len(wanted & {name for names in ids.values() for name in names}),
                tokens_before=before,
                tokens_after=after,
            )
        )
    return found


def _identities(stream: Stream, stage: int) -> list[str]:
    return [identity_of(name) for name in stream.documents("train", stage, ["id"])["id"].to_pylist()]


def _tokens_read(one: _Trained, where: Mapping[int, NDArray[np.int64]]) -> int:
    """Return how many tokens of some documents the rows hold: as first input, or as targets."""
    total = 0
    for source in sorted(set(one.order.source.tolist())):
        here = one.order.source == source
        first, n_targets = one.order.start[here], one.order.n_targets[here].astype(np.int64)
        # Tokens first to first + n_targets are read: one more than there are targets.
        _, document, tokens = overlaps(first - 1, n_targets + 1, one.stream.offsets("train", source))
        total += int(tokens[np.isin(document, where[source])].sum())
    return total


def summary_line(found: Audit) -> str:
    """Return what an audit that holds has counted, in one line."""
    n_tokens = sum(sum(one.tokens.values()) for one in found.stages)
    return (
        f"verified: {n_tokens:,} target tokens in {sum(one.rows for one in found.stages):,} rows and "
        f"{sum(one.steps for one in found.stages):,} steps of {len(found.stages)} stages, counted again"
    )


def audit_all(stores: Sequence[RunStore]) -> tuple[dict[str, Audit], dict[str, ClbenchError]]:
    """Return folder -> audit, and folder -> why it cannot be audited; every stream is opened and checked once."""
    audits: dict[str, Audit] = {}
    refused: dict[str, ClbenchError] = {}
    streams: dict[tuple[str, str | None], Stream] = {}
    for store in stores:
        try:
            _check_kind(store, read_bill(store))
            track = track_of(store)
            key = track.stream, track.stream_sha256
            stream = streams[key] = streams.get(key) or open_stream(track)
            audits[str(store.folder)] = audit(store, stream)
        except ClbenchError as error:
            refused[str(store.folder)] = error
    return audits, refused
