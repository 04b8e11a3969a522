"""Prepare a track, a stream, a pretrained model or what suites measure on: fetch, build, make the base.

After it, everything works with the network off.
"""

from __future__ import annotations

import time
from typing import Any

from clbench import build, console, pretrained, registry
from clbench.errors import NotFoundError, did_you_mean
from clbench.stream import Stream

EVALS = "evals"
SUITE = "suite:"


def prepare(target: str, *, device: str = "auto", n_workers: int | None = None) -> dict[str, Any]:
    """Prepare a track (its stream and its base), a stream, a pretrained model or a suite; returns what was made.

    Args:
        target: a track or a stream, by name, specification or file; ``model:NAME`` for a pretrained model;
            ``suite:NAME`` for the files that a suite measures on, ``evals`` for those of all suites.
        device: that trains the base.
        n_workers: processes that build a stream; None: as fit this machine.

    Raises:
        NotFoundError: the name is none of these.
        OfflineError: files are missing from the cache and no network answers.
        IntegrityError: a file is not what its manifest pins.
    """
    start = time.perf_counter()
    if target.startswith(pretrained.PREFIX):
        made: dict[str, Any] = {"model": _prepare_model(target.removeprefix(pretrained.PREFIX))}
    elif target == EVALS or target.startswith(SUITE):
        made = {"suites": _prepare_suites(target)}
    elif registry.canonical(target) in registry.track_names():
        made = _prepare_track(target, device, n_workers)
    elif registry.is_stream(target):
        stream = build.build_stream(registry.make_stream_source(target), n_workers=n_workers)
        made = {"stream": _about(stream)}
    elif target.endswith((".yaml", ".yml")):
        made = _prepare_track(target, device, n_workers)
    else:
        models = {f"{pretrained.PREFIX}{name}" for name in pretrained.pins()}
        known = {*registry.track_names(), *registry.stream_names(), *models, EVALS}
        raise NotFoundError(f"unknown track or stream {target!r}", mend=did_you_mean(target, known))
    made["seconds"] = round(time.perf_counter() - start, 1)
    console.say(f"{target} is ready ({made['seconds']} s)")
    return made


def _prepare_track(target: str, device: str, n_workers: int | None) -> dict[str, Any]:
    track = registry.load_track(target)
    stream = build.build_stream(registry.make_stream_source(track.stream), n_workers=n_workers)
    from clbench.base import check_stream, make_base
    from clbench.run import hardware_for

    check_stream(track, stream)
    hardware = hardware_for(track, stream, device)
    origin = f"{track.base.n_tokens:,} tokens of stage 0" if track.model is not None else track.base.pretrained
    console.say(f"base of {track.name}: {origin}, {hardware.precision} on {hardware.device}")
    base = make_base(track, stream, hardware)
    return {
        "track": track.name,
        "stream": _about(stream),
        "base": {"folder": str(base.folder), "weights_sha256": base.weights_sha256},
        "precision": hardware.precision,
    }


def _prepare_model(name: str) -> dict[str, Any]:
    model = pretrained.prepare_model(name)
    told = {key: model.facts[key] for key in ("title", "licence", "n_parameters", "dtype", "tensors_sha256")}
    console.say(
        f"model {name}: {told['n_parameters']:,} parameters in {told['dtype']}, {told['licence']}, {model.folder}"
    )
    return {"name": name, "folder": str(model.folder), **told}


def _prepare_suites(target: str) -> dict[str, Any]:
    specs = registry.names("suites") if target == EVALS else [target.removeprefix(SUITE)]
    found = {}
    for spec in specs:
        suite, options = registry.suite_class(spec)
        if made := suite.prepare(options):
            found[spec] = made
        elif target != EVALS:
            console.say(f"suite {spec} needs nothing beyond its stream")
    return found


def _about(stream: Stream) -> dict[str, Any]:
    n_tokens = sum(stream.counts("train", info.index)["n_tokens"] for info in stream.stages())
    console.say(f"stream {stream.name}: {len(stream.stages())} stages, {n_tokens:,} training tokens in {stream.folder}")
    return {"name": stream.name, "folder": str(stream.folder), "sha256": stream.sha256, "n_tokens": n_tokens}
