"""Whole sets of arms: the specifications and tracks of every dose and batching, and what each arm would be shown.

An arm is a stream of ``dose`` and a track on it. All arms of a set have one base, one budget and one learning rate;
they differ in the text (dose, arm of the pool) and in how it is batched:

    packed        full rows across documents: equal tokens are equal steps
    rows          one document a row, as the junk paper trained: short posts take many more steps
    step_matched  rows, but every arm takes the steps of the arm that has the fewest; tokens then differ

``clbench stream arms`` is the command; runs of the tracks are compared by ``clbench.results.arms``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from clbench import registry
from clbench.errors import ClbenchError, ConfigError
from clbench.exposure import StageExposure, exposure
from clbench.files import write_json, write_text
from clbench.method import Composed
from clbench.results.arms import Arm, differences_in_exposure, settings_text
from clbench.specification import StreamSpecification, save_specification
from clbench.stream import Stream
from clbench.track import Track

Mode = Literal["packed", "rows", "step_matched"]
MODES: tuple[Mode, ...] = ("packed", "rows", "step_matched")
DOSES = (0.0, 0.2, 0.5, 0.8, 1.0)
"""Of the junk paper."""


@dataclass(frozen=True, kw_only=True)
class ArmSet:
    """What a set of arms is made of.

    ``arms`` are arms of the pool: each stands at every dose but 0, and dose 0 once for all. Without ``control`` the
    rest of a stage is its own text.
    """

    name: str
    of: str
    junk: str
    arms: tuple[str, ...] = ("junk",)
    control: str = "control"
    doses: tuple[float, ...] = DOSES
    n_tokens: int | None = None
    stages: int | None = None
    epochs: int = 1
    seed: int = 0

    def specifications(self) -> dict[float, dict[str, StreamSpecification]]:
        """Return dose -> arm of the pool -> specification of the stream.

        Raises:
            ConfigError: there are not two arms, or a dose is no share.
        """
        if wrong := [dose for dose in self.doses if not 0 <= dose <= 1]:
            raise ConfigError(f"dose is {wrong[0]}", where=self.name, mend="choose shares from 0 to 1")
        doses = sorted(set(self.doses))
        found = {dose: {a: self._one(a, dose) for a in (self.arms[:1] if dose == 0 else self.arms)} for dose in doses}
        if sum(map(len, found.values())) < 2:
            raise ConfigError("one arm cannot be compared", where=self.name, mend="give two doses or two arms")
        return found

    def _one(self, arm: str, dose: float) -> StreamSpecification:
        options: dict[str, Any] = {
            "of": _found_from_anywhere(self.of),
            "junk": _found_from_anywhere(self.junk),
            "dose": dose,
            "arm": arm,
            "control": self.control,
            "n_tokens": self.n_tokens,
            "stages": self.stages,
            "seed": self.seed,
        }
        percent = f"{100 * dose:g}".replace(".", "-")
        rest = self.control or "the stream's own text"
        return StreamSpecification(
            name=f"{self.name}-{percent}" if dose == 0 else f"{self.name}-{arm}-{percent}",
            description=f"{100 * dose:g} % {arm}, the rest {rest}, after stage 0 of {self.of}.",
            source="dose",
            options={key: value for key, value in options.items() if value not in (None, "")},
        )


def _found_from_anywhere(target: str) -> str:
    """Return a stream's name as it is, and a file as an absolute path."""
    path = Path(target).expanduser()
    return str(path.resolve()) if path.suffix in (".yaml", ".yml") and path.is_file() else target


@dataclass(frozen=True)
class PlannedArm:
    """One arm: its track, and what it will be shown."""

    track: Track
    stages: Sequence[StageExposure]
    path: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "track": self.track.name,
            "path": None if self.path is None else str(self.path),
            "stream": self.track.stream,
            "batching": mode_of(self.track),
            "stages": [stage.as_dict() for stage in self.stages],
        }

    def total(self, quantity: str) -> float:
        """Return a quantity summed over the stages."""
        return float(sum(getattr(stage, quantity) for stage in self.stages))


def mode_of(track: Track) -> Mode:
    """Return how a track batches."""
    if track.training.batching == "packed":
        return "packed"
    return "rows" if track.training.n_steps_per_stage is None else "step_matched"


def build_arms(chosen: ArmSet) -> dict[str, tuple[StreamSpecification, Stream]]:
    """Save the specifications by name, build their streams, and return both by name."""
    from clbench.build import build_stream

    found = {}
    for by_arm in chosen.specifications().values():
        for specification in by_arm.values():
            registry.source_of(specification)  # refuses what cannot be before a file is written
            save_specification(specification)
            stream = build_stream(registry.make_stream_source(specification.name))
            found[specification.name] = (specification, stream)
    return found


def tracks_of(
    chosen: ArmSet, streams: Sequence[Stream], template: Track, modes: Sequence[Mode], method: Composed
) -> list[Track]:
    """Return the tracks of a set of arms: one for every stream and mode.

    A stage trains on as many targets as every arm has in every mode, times the epochs, so that no arm sees a post more
    often than another: one document a row leaves the first token of each document without a prediction.
    """
    n_targets = min(available(stream, info.index) for stream in streams for info in stream.stages()[1:])
    shared: dict[str, Any] = {"n_tokens_per_stage": chosen.epochs * n_targets, "n_steps_per_stage": None}
    tracks = []
    for mode in modes:
        training = template.training.model_copy(update=shared | {"batching": "packed" if mode == "packed" else "rows"})
        arms = [_track(template, stream, mode, training) for stream in streams]
        if mode == "step_matched":
            fewest = min(
                stage.steps
                for track, stream in zip(arms, streams, strict=True)
                for stage in exposure(track, stream, method, seed=track.seeds[0])
            )
            matched = training.model_copy(update={"n_steps_per_stage": fewest})
            arms = [_track(template, stream, mode, matched) for stream in streams]
        tracks += arms
    return tracks


def available(stream: Stream, stage: int) -> int:
    """Return the targets that a stage has with one document a row: every token but each document's first."""
    counts = stream.counts("train", stage)
    return counts["n_tokens"] - counts["n_documents"]


def _track(template: Track, stream: Stream, mode: Mode, training: Any) -> Track:
    return template.model_copy(
        update={
            "name": f"{stream.name}-{mode.replace('_', '-')}".replace(".", "-").replace("_", "-")[:64],
            "description": f"Arm of a comparison; {mode}.",
            "stream": stream.name,
            "stream_sha256": stream.sha256,
            "training": training,
            "oracle": None,
            "row0": None,
        }
    )


def write_track(track: Track, folder: Path) -> Path:
    """Write a track as YAML; returns the file."""
    path = folder / f"{track.name}.yaml"
    values = track.model_dump(mode="json", exclude_none=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110))
    return path


def plan(tracks: Sequence[Track], method: Composed, *, seed: int) -> list[PlannedArm]:
    """Return what each track will be shown under a method; their streams have to be built."""
    from clbench.base import open_stream

    return [PlannedArm(track, exposure(track, open_stream(track), method, seed=seed)) for track in tracks]


def unmatched(planned: Sequence[PlannedArm]) -> dict[str, dict[str, float | str]]:
    """Return in what the arms of a plan differ, as ``compare_arms`` would find it."""
    quantities = ("tokens", "rows", "steps", "learning_rate_sum")
    arms = [
        Arm(
            name=arm.track.name,
            runs={},
            exposure={q: {stage.stage: float(getattr(stage, q)) for stage in arm.stages} for q in quantities},
            same={
                "base": arm.track.base_sha256()[:12],
                "method": "",
                "settings": settings_text(arm.track.training.model_dump(mode="json")),
            },
        )
        for arm in planned
    ]
    return differences_in_exposure(arms)


def write_arms(planned: Sequence[PlannedArm], folder: Path, *, name: str, method: str) -> list[PlannedArm]:
    """Write the tracks of a plan into a folder and, last, its manifest ``NAME.json``; return the plan with paths.

    The manifest holds tokens, rows, steps and summed learning rate of every arm per stage and group, and what differs.
    """
    written = [replace(arm, path=write_track(arm.track, folder)) for arm in planned]
    arms = [arm.as_dict() | {"stream_sha256": arm.track.stream_sha256} for arm in written]
    write_json(folder / f"{name}.json", {"method": method, "arms": arms, "unmatched": unmatched(written)})
    return written


def doses_of(tracks: Sequence[str]) -> dict[str, float]:
    """Return, for streams by name or specification that are doses, the share of junk; others are left out."""
    found = {}
    for target in tracks:
        try:
            options = registry.make_stream_source(target).options
        except ClbenchError:  # a stream that is no longer here has no known dose
            continue
        if isinstance(dose := getattr(options, "dose", None), int | float):
            found[target] = float(dose)
    return found
