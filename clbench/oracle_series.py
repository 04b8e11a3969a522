"""The oracle series: retraining from scratch at several dates, written as a run so that it reads like a method.

Row k of its matrix is the newest oracle whose cutoff is not after stage k, as in TiC-LM; before the first cutoff there
is none. Its bill holds the tokens of all its oracles, each under the stage of its cutoff. The oracles themselves lie in
the cache, see ``clbench.oracle``: they are shared by all series, and the last is the one that a track is frozen on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clbench import console, registry
from clbench.base import check_recipe, make_base, open_stream
from clbench.build import stream_folder
from clbench.errors import ClbenchError
from clbench.files import exclusive
from clbench.oracle import Oracle, make_oracle
from clbench.recorder import Recorder
from clbench.results.series import check_cutoffs, newest_cutoff, plan_series
from clbench.results.store import RunStore, utc_now
from clbench.run import Place, hardware_for, reporting_failure, resolve, run_folder, start
from clbench.stream import StageInfo, Stream
from clbench.track import Track
from clbench.train.ledger import BY_STAGE, Ledger
from clbench.train.models import load_model, weights_sha256
from clbench.train.parallel import Hardware

LABEL = "oracle-series"


def label_of_series(cutoffs: Sequence[int], n_stages: int) -> str:
    """Return how a series is called in tables: with its cutoffs, unless every stage is one."""
    named = "" if len(cutoffs) == n_stages else ":cutoffs=" + "+".join(map(str, cutoffs))
    return LABEL + named


def stages_of(track: Track) -> list[StageInfo]:
    """Return the stages of a track's stream, which need not be built."""
    source = registry.make_stream_source(track.stream)
    folder = stream_folder(source)
    return Stream(folder).stages() if (folder / "manifest.json").is_file() else source.stages()


def compute_table(track: Track, cutoffs: Sequence[int], *, continual_tokens: int | None = None) -> dict[str, Any]:
    """Return what a series of a track's oracles would cost, JSON-able; nothing is trained.

    Raises:
        ConfigError: a cutoff cannot be used.
    """
    check_recipe(track)
    infos = stages_of(track)
    plan = plan_series(
        cutoffs,
        n_stages=len(infos),
        n_initial=track.base.n_tokens,
        n_per_stage=track.training.n_tokens_per_stage,
        continual_tokens=continual_tokens,
    )
    found = plan.as_dict()
    for oracle in found["oracles"]:
        oracle["stage"] = infos[oracle["cutoff"]].name
    return {"track": track.name, **found}


def run_series(track: Track, *, cutoffs: Sequence[int], seed: int, place: Place) -> RunStore:
    """Train the oracles of a series, or take them from the cache, and give them a matrix like any run.

    Run it again to go on after a kill.

    Args:
        track: whose stream, recipe, budget and suites are used.
        cutoffs: stages after which an oracle is trained; none means every stage.
        seed: of the oracles.
        place: device, folder of all runs, sinks.

    Raises:
        NotFoundError: the stream is not built.
        ConfigError: a cutoff cannot be used, or the folder holds another run.
        BusyError: another process works on this run.
    """
    check_recipe(track)
    stream = open_stream(track)
    n_stages = len(stream.stages())
    chosen = check_cutoffs(cutoffs, n_stages)
    hardware = hardware_for(track, stream, place.device)
    for name in track.suites:
        registry.suite_class(name)
    base = make_base(track, stream, hardware)
    label = label_of_series(chosen, n_stages)
    method = {"label": label, "components": [{"name": LABEL, "target": "", "options": {"cutoffs": chosen}}]}
    folder = run_folder(place.runs_root, track, label, seed)
    with exclusive(folder, mend="wait for it, or give another folder with --out"):
        store = start(folder, resolve(track, stream, method, seed, base.facts, hardware, place))
        with reporting_failure(store):
            _train_and_measure(track, stream, hardware, chosen, seed, store, place)
            store.write_status("done", finished=utc_now())
        for sink in place.sinks:
            sink(store)
    return store


def _train_and_measure(
    track: Track, stream: Stream, hardware: Hardware, cutoffs: list[int], seed: int, store: RunStore, place: Place
) -> None:
    bill = Ledger()
    store.forget_steps_from(0, 0)  # written again, oracle by oracle
    rows = {stage: newest_cutoff(cutoffs, stage) for stage in range(len(stream.stages()))}
    for cutoff in cutoffs:
        console.say(f"seed {seed}: oracle of stage {cutoff}")
        oracle = make_oracle(track, stream, hardware, cutoff=cutoff, seed=seed)
        model = load_model(oracle.model_folder).to(hardware.device).eval()
        suites = [registry.make_suite(name, stream) for name in track.suites]
        recorder = Recorder(store, suites, model, stream, hardware, place.sinks)
        n_steps = _bill(bill, oracle, store)
        digest = weights_sha256(model)
        for stage in (k for k, newest in rows.items() if newest == cutoff):
            again = not _is_whole(store, track.suites, stage, digest)
            recorder.record(stage, digest, n_steps if stage == cutoff else 0, bill, again=again)


def _bill(bill: Ledger, oracle: Oracle, store: RunStore) -> int:
    """Add an oracle's bill and log to the series'; returns its optimizer steps."""
    add_bill(bill, oracle.ledger)
    log = oracle.log()
    store.append_steps(log)
    return log[-1]["step"] + 1 if log else 0


def add_bill(bill: Ledger, other: Ledger) -> None:
    """Add the bill of a training with stages of its own; what has to be stored is the most that any needs."""
    for name in ("tokens", "plans", *BY_STAGE):
        getattr(bill, name).update(getattr(other, name))
    for name in ("extra_tokens", "flops", "seconds"):
        sums = getattr(bill, name)
        for purpose, value in getattr(other, name).items():
            sums[purpose] = sums.get(purpose, 0) + value
    for purpose, value in other.stored_bytes.items():
        bill.stored_bytes[purpose] = max(value, bill.stored_bytes.get(purpose, 0))
    bill.peak_memory_bytes = max(bill.peak_memory_bytes, other.peak_memory_bytes)


def _is_whole(store: RunStore, suites: Sequence[str], stage: int, digest: str) -> bool:
    """Return whether a row is there, readable, and measured with these weights."""
    if stage not in store.stages_done():
        return False
    try:
        for name in suites:
            store.rows(name, stage)
        return bool(store.stage_record(stage)["weights_sha256"] == digest)
    except (ClbenchError, KeyError):
        return False
