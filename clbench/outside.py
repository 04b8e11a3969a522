"""Checkpoints that were trained elsewhere: the same run folder and matrix as a run's, no training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from clbench import console, registry
from clbench.base import open_stream
from clbench.errors import ConfigError
from clbench.files import digest_of, exclusive, sha256_file
from clbench.recorder import Recorder
from clbench.results.store import RunStore, utc_now
from clbench.run import Place, reporting_failure, resolve, start
from clbench.stream import Stream
from clbench.suite import Reference
from clbench.track import Track
from clbench.train.models import check_checkpoint, load_model, n_parameters, weights_sha256
from clbench.train.parallel import Hardware, find_device


def measure_checkpoints(
    track: Track, checkpoints: Mapping[int, str], *, label: str, out: Path, place: Place
) -> RunStore:
    """Measure checkpoints that were trained elsewhere on a track's suites and give them a matrix like any run.

    Args:
        track: whose stream and suites are used; its base is not needed.
        checkpoints: stage -> folder or hub id; stage 0 is the checkpoint before any of the stream's later text.
        label: how they are called in tables.
        out: run folder.
        place: device and sinks.

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
        others: dict[int, Reference] = {}
        method = {"label": label, "components": components}
        store = start(out, resolve(track, stream, method, 0, facts, hardware, place))
        with reporting_failure(store):
            for stage, path in sorted(checkpoints.items()):
                console.say(f"stage {stage}: {path}")
                model = (loaded.pop(stage) if stage in loaded else load_model(path)).to(device).eval()
                suites = [registry.make_suite(name, stream) for name in track.suites]
                recorder = Recorder(store, suites, model, stream, hardware, place.sinks, others)
                recorder.record_outside(stage, *tokenizers[stage])
                digest = store.stage_record(stage)["weights_sha256"]
                others[stage] = Reference(weights_sha256=digest, load=partial(load_model, path))
                del model, recorder  # before the next is loaded: one model in memory at a time
            store.write_status("done", finished=utc_now())
        for sink in place.sinks:
            sink(store)
    return store


def outside_tokenizer(path: str, stream: Stream) -> tuple[Any, str]:
    """Return (tokenizer, digest) of a checkpoint; (None, "") when it is the stream's own.

    Raises:
        ConfigError: the checkpoint has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    own = stream.tokenizer_folder / "tokenizer.json"
    theirs = Path(path) / "tokenizer.json"
    if theirs.is_file() and sha256_file(theirs) == sha256_file(own):
        return None, ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=Path(path).is_dir(), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer beside this checkpoint: {str(error).splitlines()[0]}",
            where=path,
            mend="save it there with tokenizer.save_pretrained",
        ) from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer, digest_of(backend.to_str() if backend is not None else tokenizer.get_vocab())
