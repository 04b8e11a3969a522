"""Checkpoints that were trained elsewhere: the same run folder and matrix as a run's, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clbench import console, fanout, registry
from clbench.base import open_stream
from clbench.cells import Cell
from clbench.errors import ConfigError
from clbench.fanout import Failure, Job, Outcome, Request, Subject
from clbench.files import exclusive
from clbench.recorder import Recorder, check_same_weights, conclude, write_row
from clbench.results.store import RunStore, utc_now
from clbench.run import Place, reporting_failure, resolve, start
from clbench.stream import Stream
from clbench.suite import Reference
from clbench.track import Track
from clbench.train.ledger import Ledger
from clbench.train.models import check_checkpoint, load_model, load_tokenizer, n_parameters, weights_sha256
from clbench.train.parallel import Hardware, find_device


def measure_checkpoints(
    track: Track,
    checkpoints: Mapping[int, str],
    *,
    label: str,
    out: Path,
    place: Place,
    n_jobs: int = 1,
    devices: Sequence[str] = (),
) -> tuple[RunStore, list[Failure]]:
    """Measure checkpoints that were trained elsewhere on a track's suites and give them a matrix like any run.

    Args:
        track: whose stream and suites are used; its base is not needed.
        checkpoints: stage -> folder or hub id; stage 0 is the checkpoint before any of the stream's later text.
        label: how they are called in tables.
        out: run folder.
        place: device and sinks.
        n_jobs: worker processes; 1 measures in this one, checkpoint by checkpoint.
        devices: of the workers, in turn; that of ``place`` where none is named.

    Returns:
        the run folder, and the cells that failed: the rows of their checkpoints are not there. In this process the
        first failure is raised instead.

    Raises:
        ConfigError: no checkpoint, or a stage that the stream does not have.
        NotFoundError, IntegrityError: a checkpoint is missing or damaged.
    """
    stream = open_stream(track)
    infos = stream.stages()
    wrong = [k for k in checkpoints if not 0 <= k < len(infos)]
    if wrong or not checkpoints:
        raise ConfigError(
            f"stage {wrong[0]} is not in the stream" if wrong else "no checkpoint was given",
            where=stream.name,
            mend=f"give K=PATH with K from 0 to {len(infos) - 1}",
        )
    device = find_device(place.device)
    hardware = Hardware(device, "fp32")
    tokenizers = {}
    for stage, path in sorted(checkpoints.items()):  # all of them before the first is measured
        check_checkpoint(path)
        tokenizers[stage] = outside_tokenizer(path, stream)
    with exclusive(out, mend="wait for it, or give another folder with --out"):
        loaded = {min(checkpoints): load_model(checkpoints[min(checkpoints)])}
        paths = {str(stage): path for stage, path in sorted(checkpoints.items())}
        components = [{"name": "checkpoints", "target": "", "options": {"paths": paths}}]
        first = loaded[min(checkpoints)]
        facts = {"weights_sha256": weights_sha256(first), "n_parameters": n_parameters(first)}
        del first
        method = {"label": label, "components": components}
        store = start(out, resolve(track, stream, method, 0, facts, hardware, place))
        with reporting_failure(store):
            if n_jobs > 1 or len(devices) > 1:
                del loaded[min(checkpoints)]
                failures = _spread(store, track, stream, checkpoints, hardware, place, n_jobs, devices)
            else:
                _one_by_one(store, track, stream, checkpoints, hardware, place, loaded, tokenizers)
                failures = []
            if not failures:
                store.write_status("done", finished=utc_now())
            else:
                store.write_status("failed", error=str(failures[0]), since=utc_now())
        for sink in place.sinks:
            sink(store)
    return store, failures


def _one_by_one(
    store: RunStore,
    track: Track,
    stream: Stream,
    checkpoints: Mapping[int, str],
    hardware: Hardware,
    place: Place,
    loaded: dict[int, Any],
    tokenizers: Mapping[int, tuple[Any, str]],
) -> None:
    """Measure in this process; the first failure stops it."""
    others: dict[int, Reference] = {}
    for stage, path in sorted(checkpoints.items()):
        console.say(f"stage {stage}: {path}")
        model = (loaded.pop(stage) if stage in loaded else load_model(path)).to(hardware.device).eval()
        suites = [registry.make_suite(spec, stream) for spec in track.suites]
        recorder = Recorder(store, suites, model, stream, hardware, place.sinks, others)
        recorder.record_outside(stage, *tokenizers[stage])
        digest = store.stage_record(stage)["weights_sha256"]
        others[stage] = Reference(weights_sha256=digest, load=partial(load_model, path))
        del model, recorder  # before the next is loaded: one model in memory at a time


def _spread(
    store: RunStore,
    track: Track,
    stream: Stream,
    checkpoints: Mapping[int, str],
    hardware: Hardware,
    place: Place,
    n_jobs: int,
    devices: Sequence[str],
) -> list[Failure]:
    """Measure in worker processes, then write the rows of the checkpoints that have all of theirs."""
    requests = tuple(
        Request(spec=spec, stream=str(stream.folder) if registry.suite_class(spec)[0].needs_stream else "")
        for spec in track.suites
    )
    stages = sorted(checkpoints)
    jobs = [
        Job(
            subject=Subject(
                label=f"stage {stage}",
                path=checkpoints[stage],
                base=checkpoints.get(0, ""),
                previous=checkpoints.get(stage - 1, ""),
            ),
            requests=requests,
        )
        for stage in stages
    ]
    outcome = fanout.measure(jobs, n_jobs=n_jobs, devices=devices or [str(hardware.device)])
    names = [registry.suite_class(spec)[0].name for spec in track.suites]
    for j, stage in enumerate(stages):
        found = _row(outcome, j, names)
        if found is not None:
            check_same_weights(store, stage, outcome.weights_sha256[j])
            if stage not in store.stages_done():
                write_row(store, stage, outcome.weights_sha256[j], found, 0)
            conclude(store, stage, Ledger(), hardware, place.sinks)
    return outcome.failures


def _row(outcome: Outcome, job: int, names: Sequence[str]) -> dict[str, Cell] | None:
    """Return the cells of one checkpoint by suite, None where one of them failed."""
    found = {name: cell for r, name in enumerate(names) if (cell := outcome.cell(job, r)) is not None}
    return found if len(found) == len(names) else None


def outside_tokenizer(path: str, stream: Stream) -> tuple[Any, str]:
    """Return (tokenizer, digest) of a checkpoint; (None, "") when it is the stream's own.

    Raises:
        ConfigError: the checkpoint has no tokenizer that transformers can load.
    """
    return (None, "") if fanout.is_streams_own(path, stream) else load_tokenizer(path)
