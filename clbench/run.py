"""A run: one (track, method, seed), from its base through every stage to a complete matrix in its folder."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import clbench
from clbench import console, pretrained, registry, seeds
from clbench.base import Base, open_base, open_stream
from clbench.errors import ClbenchError, ConfigError
from clbench.files import exclusive, remove_leftovers
from clbench.method import Composed, Stage
from clbench.recorder import Recorder, Sink
from clbench.registry import Component, label_of
from clbench.results.matrix import from_rows
from clbench.results.store import RunStore, utc_now
from clbench.stream import Stream
from clbench.suite import Reference
from clbench.track import RunConfig, Track, run_id_of
from clbench.train.ledger import Ledger
from clbench.train.loop import Job, train
from clbench.train.models import load_model, make_model
from clbench.train.parallel import Hardware, choose_precision, describe, find_device

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a run happens; nothing here changes its numbers except the device."""

    runs_root: Path = Path("runs")
    device: str = "auto"
    sinks: tuple[Sink, ...] = ()
    checkpoint_seconds: float = 60.0
    command: str = ""
    moments: str | None = None
    """Write the optimizer's second moments beside every release: full, or rank1."""


def slug(text: str) -> str:
    """Return a folder name for a label."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def run_folder(runs_root: Path, track: Track, label: str, seed: int) -> Path:
    """Return the default folder of a run."""
    return runs_root / track.name / slug(label) / f"seed-{seed}"


def hardware_for(track: Track, stream: Stream, device: str) -> Hardware:
    """Return device and precision for a track on this machine."""
    found = find_device(device)
    spec, n_ids = track.model, stream.vocab_size

    def make() -> torch.nn.Module:
        if spec is not None:
            return make_model(spec, vocab_size=n_ids, eos_id=0, seed=0)
        return load_model(pretrained.open_model(str(track.base.pretrained)).folder)

    shape = list(spec.model_dump().values()) if spec is not None else [track.base.pretrained]
    return Hardware(found, choose_precision(found, track.training, shape=shape, vocab_size=n_ids, make=make))


def execute(track: Track, components: Sequence[Component], *, seed: int, place: Place) -> RunStore:
    """Run a method on a track, or go on with a run that was stopped.

    Raises:
        NotFoundError: stream or base were not prepared.
        ConfigError: the folder holds another run.
        BusyError: another process works on this run.
        NonFiniteError: training diverged.
    """
    stream = open_stream(track)
    hardware = hardware_for(track, stream, place.device)
    base = open_base(track, stream, hardware)
    for suite_name in track.suites:
        registry.suite_class(suite_name)
    composed = Composed([component.method for component in components])
    for stage in plan_stages(track, stream, seed)[:1]:
        composed.plan(stage)  # components that cannot be composed are refused before anything is written
    if place.moments is not None:
        check_moments(place.moments, composed)
    label = label_of(components)
    folder = run_folder(place.runs_root, track, label, seed)
    with exclusive(folder, mend="wait for it, or give another folder with --out"):
        method = {"label": label, "components": [component.as_dict() for component in components]}
        store = start(folder, resolve(track, stream, method, seed, base.facts, hardware, place))
        with reporting_failure(store):
            _train_and_measure(track, composed, seed, place, stream, hardware, base, store)
    return store


def check_moments(form: str, method: Composed) -> None:
    """Refuse moments that no merge could use, before anything is written.

    Raises:
        ConfigError: an unknown form, or a method whose trained parameters are not the released weights.
    """
    from clbench.merge.moments import FORMS

    if form not in FORMS:
        raise ConfigError(f"moments of form {form!r} are unknown", mend=f"give {' or '.join(FORMS)}")
    if names := [one.name for one in method.components if one.overrides("attach")]:
        mend = "leave --moments out, or train all weights"
        raise ConfigError(f"with {names[0]} the moments are those of adapters, not of the released weights", mend=mend)


def _train_and_measure(
    track: Track,
    method: Composed,
    seed: int,
    place: Place,
    stream: Stream,
    hardware: Hardware,
    base: Base,
    store: RunStore,
) -> None:
    model = base.load().to(hardware.device)
    suites = [registry.make_suite(name, stream) for name in track.suites]
    title = f"{track.name} · {store.config()['method']['label']} · seed {seed}"
    others = {0: Reference(weights_sha256=base.weights_sha256, load=base.load)}
    recorder = Recorder(store, suites, model, stream, hardware, place.sinks, others)
    stages = plan_stages(track, stream, seed)
    bill = Ledger.from_dict(store.ledger()) if store.ledger() else Ledger()
    recorder.mend_rows(bill)
    if store.stages_done() != [0, *(stage.index for stage in stages)]:
        recorder.record(0, base.weights_sha256, 0, bill)
        check_row_zero(track, store, track.suites[0])
        with console.training_bar(title) as bar:
            bill = train(
                Job(
                    store=store,
                    stream=stream,
                    model=model,
                    method=method,
                    stages=stages,
                    training=track.training,
                    seed=seed,
                    hardware=hardware,
                    finish_stage=recorder.finish_stage,
                    progress=bar,
                    warn=console.warn,
                    checkpoint_seconds=place.checkpoint_seconds,
                    moments=place.moments,
                )
            )
        store.write_ledger(bill.as_dict())
    store.write_status("done", finished=store.stage_record(store.stages_done()[-1])["finished"])
    for sink in place.sinks:
        sink(store)


def plan_stages(track: Track, stream: Stream, seed: int = 0) -> list[Stage]:
    """Return what the methods of a run are told about each trained stage (all but stage 0)."""
    infos = stream.stages()
    available = [stream.counts("train", info.index)["n_tokens"] for info in infos]
    return [
        Stage(
            index=info.index,
            n_stages=len(infos),
            n_tokens=track.training.n_tokens_per_stage,
            available_tokens=tuple(available[: info.index + 1]),
            learning_rate=track.training.learning_rate,
            warmup_steps=track.training.warmup_steps,
            floor=track.training.floor,
            seed=seeds.derive(seed, "plan"),
        )
        for info in infos[1:]
    ]


def resolve(
    track: Track,
    stream: Stream,
    method: dict[str, Any],
    seed: int,
    base: Mapping[str, Any],
    hardware: Hardware,
    place: Place,
) -> RunConfig:
    """Return the full configuration of a run."""
    frozen = {**track.as_dict(), "stream_sha256": stream.sha256}
    short_base = {key: base[key] for key in ("weights_sha256", "n_parameters")}
    return RunConfig(
        run_id=run_id_of(frozen, method, seed, short_base, hardware.precision),
        track=frozen,
        stages=[vars(info) for info in stream.stages()],
        method=method,
        seed=seed,
        base=short_base,
        training={**track.training.model_dump(mode="json"), "precision": hardware.precision},
        environment=environment(hardware),
        created=utc_now(),
        command=place.command or shlex.join(["clbench", *sys.argv[1:]]),
    )


def environment(hardware: Hardware) -> dict[str, Any]:
    """Return what the run computes on; equal bits are promised only where this is equal."""
    import transformers

    return {
        "clbench": clbench.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": describe(hardware.device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "n_threads": torch.get_num_threads(),
        "n_cores": os.cpu_count(),
        "precision": hardware.precision,
    }


def start(folder: Path, config: RunConfig) -> RunStore:
    """Open a run folder for a configuration: a new one, or one that holds the same run.

    Raises:
        ConfigError: the folder holds a run of another configuration; what differs is named.
    """
    store = RunStore(folder)
    remove_leftovers(folder)
    for part in ("stages", "rows", "extras", "checkpoints", "release"):
        remove_leftovers(folder / part)
    if not (folder / "run.yaml").is_file():
        store.write_config(config.model_dump(mode="json"))
    else:
        there = store.config()
        if there.get("run_id") != config.run_id:
            raise ConfigError(
                f"this folder holds another run: {differences(there, config.model_dump(mode='json'))}",
                where=folder,
                mend="give another folder with --out, or delete this one",
            )
        threads = there["environment"]["n_threads"], config.environment["n_threads"]
        if threads[0] != threads[1]:
            console.warn(
                f"the run began with {threads[0]} threads and goes on with {threads[1]}: "
                "the last bits of its results may differ"
            )
    store.write_status("running", since=utc_now(), pid=os.getpid())
    return store


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Name what differs between two configurations, for the error message."""
    parts: dict[str, Callable[[dict[str, Any]], object]] = {
        "track": lambda c: c["track"]["sha256"][:12],
        "stream": lambda c: c["track"]["stream_sha256"][:12],
        "method": lambda c: c["method"]["label"],
        "method options": lambda c: str([part["options"] for part in c["method"]["components"]]),
        "method source": lambda c: [part.get("source_sha256", "")[:12] for part in c["method"]["components"]],
        "seed": lambda c: c["seed"],
        "base": lambda c: c["base"]["weights_sha256"][:12],
        "precision": lambda c: c["environment"]["precision"],
    }
    found = []
    for name, part in parts.items():
        try:
            old, new = part(there), part(here)
        except (KeyError, TypeError):
            return "its run.yaml is of another format"
        if old != new:
            found.append(f"{name} {old} there, {new} now")
    return "; ".join(found) or "its format differs"


@contextmanager
def reporting_failure(store: RunStore) -> Iterator[None]:
    """Write why a run stopped into its status, when the disk lets us."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        why = str(error) if isinstance(error, ClbenchError) else f"{type(error).__name__}: {error}"
        with suppress(ClbenchError, OSError):  # a full disk must not hide what was raised
            store.write_status(
                "stopped" if stopped else "failed", error="interrupted" if stopped else why, since=utc_now()
            )
        raise


def check_row_zero(track: Track, store: RunStore, suite: str) -> None:
    """Say so when the base's losses lie outside the track's tolerance: such runs are not comparable."""
    if track.row0 is None:
        return
    if len(track.row0.nats_per_token) != len(store.config()["stages"]):
        raise ConfigError(
            f"row0 has {len(track.row0.nats_per_token)} losses, the stream {len(store.config()['stages'])} stages",
            where=f"track {track.name}",
            mend="make it again with `clbench oracle --write`",
        )
    row = from_rows({0: store.rows(suite, 0)}, unit="nats_per_token").values[0]
    gap = max(abs(a - b) for a, b in zip(row.tolist(), track.row0.nats_per_token, strict=True))
    if not gap <= track.row0.tolerance_nats:
        console.warn(
            f"the base's losses lie up to {gap:.3f} nats per token from the track's row 0, more than its tolerance "
            f"{track.row0.tolerance_nats}: a submission of this run would be refused"
        )
