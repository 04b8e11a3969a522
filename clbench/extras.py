"""Further suites for runs that are done: ``clbench evaluate RUN --suite NAME`` measures every release of a run.

Rows go into the run folder beside the run's own, each suite and stage with a record of its own (``extras/``). Stage
records stay as they are, so a run still resumes, packs and verifies as its track says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from clbench import cells, console, fanout, registry
from clbench.audit import track_of
from clbench.base import open_stream
from clbench.cells import Cell
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError
from clbench.fanout import Failure, Job, Outcome, Request, Subject
from clbench.files import read_json
from clbench.home import bases_folder
from clbench.recorder import Sink
from clbench.results.store import ExtraRecord, RunStore, utc_now
from clbench.run_weights import BASE, outside_paths, release_folder


@dataclass
class Measured:
    """What ``measure_extras`` did."""

    outcome: Outcome
    failures: list[Failure] = field(default_factory=list)
    """Of cells, and of checkpoints that are not kept."""


def measure_extras(
    stores: Sequence[RunStore],
    specs: Sequence[str],
    *,
    n_jobs: int = 1,
    devices: Sequence[str] = ("auto",),
    sinks: Sequence[Sink] = (),
) -> Measured:
    """Measure further suites on every complete row of runs, and write their rows into the run folders.

    Of a suite that fails in one part the others are written; the record says which are there.

    Args:
        stores: runs, also ones that still go on: their complete rows are measured.
        specs: suites.
        n_jobs: worker processes, see ``fanout.measure``.
        devices: of the workers.
        sinks: told of every run that got rows.

    Raises:
        ConfigError: a suite is one of the run's own with other options; two specs of one suite.
        NotFoundError: a suite is unknown or not prepared, or needs a stream that is not built.
    """
    jobs, places, missing = [], [], []
    for store in stores:
        requests = requests_of(store, specs)
        for stage in store.stages_done() if requests else []:
            try:
                subject = subject_of(store, stage)
            except NotFoundError as error:
                missing.append(Failure(label_of(store, stage), ", ".join(specs), "", str(error)))
                continue
            jobs.append(Job(subject=subject, requests=tuple(requests.values())))
            places.append((store, stage, tuple(requests)))
    outcome = fanout.measure(jobs, n_jobs=n_jobs, devices=devices)
    changed: dict[Path, RunStore] = {}
    for j, (store, stage, names) in enumerate(places):
        for r, name in enumerate(names):
            found = outcome.shards.get((j, r), {})
            there = {shard: found[shard] for shard in outcome.wanted[j, r] if shard in found}
            if not there:
                continue
            cell = cells.joined(list(there.values()))
            record = ExtraRecord(
                suite=name,
                spec=jobs[j].requests[r].spec,
                stage=stage,
                weights_sha256=jobs[j].subject.weights_sha256,
                cells={shard: one.address for shard, one in there.items()},
                finished=utc_now(),
                evaluation={"flops": cell.flops, "seconds": cell.seconds},
            )
            if _write(store, record, cell):
                changed[store.folder] = store
    for store in changed.values():
        for sink in sinks:
            sink(store)
    return Measured(outcome, [*missing, *outcome.failures])


def _write(store: RunStore, record: ExtraRecord, cell: Cell) -> bool:
    """Write a suite's rows of one stage, then their record; return False where the same are there already."""
    there = store.extra_record(record["suite"], record["stage"])
    if there is not None and there["cells"] == record["cells"]:
        with suppress(ClbenchError):
            store.rows(record["suite"], record["stage"])
            return False
    store.write_rows(record["suite"], record["stage"], cell.rows)
    store.write_extra_record(record)
    return True


def requests_of(store: RunStore, specs: Sequence[str]) -> dict[str, Request]:
    """Return the suites that a run does not have among its own, by name.

    Raises:
        ConfigError: one of the run's own with other options, or a suite twice.
    """
    track, found = track_of(store), dict[str, Request]()
    own = {registry.suite_class(spec)[0].name: spec for spec in track.suites}
    for spec in specs:
        cls, options = registry.suite_class(spec)
        if cls.name in found:
            raise ConfigError(f"suite {cls.name!r} is named twice", mend="measure one after the other")
        if cls.name in own:
            if registry.suite_class(own[cls.name])[1] != options:
                raise ConfigError(
                    f"the run has {own[cls.name]!r} among its own suites, and {spec!r} would take its place",
                    where=store.folder,
                    mend="measure its release folders with `clbench health`",
                )
            console.say(f"{store.folder}: {spec} is one of the run's own suites, there is nothing to do")
            continue
        stream = str(open_stream(track).folder) if cls.needs_stream else ""
        found[cls.name] = Request(spec=spec, stream=stream)
    return found


def label_of(store: RunStore, stage: int) -> str:
    """Return how messages call one row of a run."""
    return f"{store.folder} {'base' if stage == BASE else f'stage {stage}'}"


def subject_of(store: RunStore, stage: int) -> Subject:
    """Return the checkpoint behind one row of a run: its release, the base for row 0, or what was trained elsewhere.

    Raises:
        NotFoundError: it is not kept.
    """
    path = _weights_after(store, stage)
    if not path:
        mend = "run `clbench prepare` where the run was made" if stage == BASE else "run the command in run.yaml again"
        raise NotFoundError("its weights are not kept", where=label_of(store, stage), mend=mend)
    done = store.stages_done()
    return Subject(
        label=label_of(store, stage),
        path=path,
        weights_sha256=store.stage_record(stage)["weights_sha256"],
        base=_weights_after(store, BASE) if BASE in done else "",
        previous=_weights_after(store, stage - 1) if stage - 1 in done else "",
    )


def _weights_after(store: RunStore, stage: int) -> str:
    """Return where the weights of a row lie, empty where they are not kept."""
    if (folder := release_folder(store, stage)).is_dir():
        return str(folder)
    if (path := outside_paths(store).get(stage)) is not None:
        return path
    base = base_with(store.stage_record(stage)["weights_sha256"]) if stage == BASE else None
    return "" if base is None else str(base)


def base_with(digest: str) -> Path | None:
    """Return the base on this machine that has these weights, None where there is none."""
    for path in sorted(bases_folder().glob("*/base.json")):
        try:
            facts = read_json(path)
        except IntegrityError:
            continue
        if isinstance(facts, dict) and facts.get("weights_sha256") == digest:
            return path.parent / "model"
    return None
