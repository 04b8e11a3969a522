"""A small, real run for tests of the engine: generated stream, tiny Llama, the track's own code path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clbench import registry
from clbench.base import make_base, open_stream
from clbench.build import build_stream
from clbench.method import Method
from clbench.registry import Component
from clbench.results.store import RunStore
from clbench.run import Place, execute, hardware_for
from clbench.track import Track


def tiny_track(**training: Any) -> Track:
    """The self-test track with a base that takes a second."""
    track = registry.load_track("tinydocs")
    return track.model_copy(
        update={
            "name": "tiny",
            "base": track.base.model_copy(update={"n_tokens": 3000}),
            "training": track.training.model_copy(update={"n_tokens_per_stage": 1500, **training}),
        }
    )


def prepare_tiny(track: Track) -> None:
    """Build the stream and make the base."""
    stream = build_stream(registry.make_stream_source(track.stream), progress=False)
    assert open_stream(track).sha256 == stream.sha256
    make_base(track, stream, hardware_for(track, stream, "cpu"))


def component(method: Method, name: str = "probe") -> Component:
    """Wrap a method object as the registry would."""
    method.name = name
    return Component(name=name, target=name, method=method)


def run_tiny(
    root: Path,
    methods: Sequence[str | Method] = ("sequential",),
    *,
    seed: int = 0,
    place: dict[str, Any] | None = None,
    **training: Any,
) -> RunStore:
    """Run methods (names or objects) on the tiny track under ``root``."""
    track = tiny_track(**training)
    prepare_tiny(track)
    components = [
        registry.make_method(m) if isinstance(m, str) else component(m, type(m).__name__.lower()) for m in methods
    ]
    where = Place(runs_root=root, device="cpu", checkpoint_seconds=0.0, **(place or {}))
    return execute(track, components, seed=seed, place=where)
