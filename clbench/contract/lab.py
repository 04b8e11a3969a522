"""A small real place for method checks: the generated stream ``tinydocs``, a tiny Llama and the loop itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from clbench import registry
from clbench.base import make_base
from clbench.build import build_stream
from clbench.method import Composed, Method, Stage, Weights
from clbench.results.store import RunStore
from clbench.run import hardware_for, plan_stages
from clbench.stream import Stream
from clbench.suite import Checkpoint
from clbench.track import Track
from clbench.train.ledger import Ledger
from clbench.train.loop import Job, train
from clbench.train.models import copy_weights, holding
from clbench.train.parallel import Hardware

TOKENS_PER_STAGE = 2500  # 5 steps of 8 rows: enough for a resume in the middle, a second a run
BASE_TOKENS = 4000
NEVER = 1e9


class Stopped(Exception):
    """Stands for a kill between two steps."""


@dataclass
class Trace:
    """What a run left behind."""

    releases: dict[int, Weights] = field(default_factory=dict)
    n_steps: dict[int, int] = field(default_factory=dict)
    state: tuple[Weights, list[dict[str, Any]]] = field(default_factory=lambda: ({}, []))
    ledger: dict[str, Any] = field(default_factory=dict)
    grad_norms: dict[tuple[int, int], float] = field(default_factory=dict)
    """(stage, step) -> norm before clipping."""


@dataclass(frozen=True)
class Place:
    """Where a run is stopped: after ``step`` steps of a stage were done, or (None) once the stage is released."""

    stage: int
    step: int | None


@dataclass
class Lab:
    """Stream, base and loop settings that all method checks share; made with ``Lab.build``."""

    folder: Path
    track: Track
    stream: Stream
    hardware: Hardware
    base: torch.nn.Module
    n_runs: int = 0

    @classmethod
    def build(cls, folder: Path) -> Lab:
        """Build stream and base below the present CLBENCH_HOME; runs go to ``folder``."""
        track = registry.load_track("tinydocs")
        track = track.model_copy(
            update={
                "name": "contract",
                "base": track.base.model_copy(update={"n_tokens": BASE_TOKENS}),
                "training": track.training.model_copy(update={"n_tokens_per_stage": TOKENS_PER_STAGE}),
            }
        )
        stream = build_stream(registry.make_stream_source(track.stream), progress=False)
        hardware = hardware_for(track, stream, "cpu")
        return cls(folder, track, stream, hardware, make_base(track, stream, hardware).load())

    @cached_property
    def stages(self) -> list[Stage]:
        """The trained stages, as methods are told about them."""
        return plan_stages(self.track, self.stream)

    @property
    def length(self) -> int:
        """Positions in a row."""
        return self.track.training.sequence_length

    def new_folder(self) -> Path:
        """Return a run folder that was not used."""
        self.n_runs += 1
        return self.folder / f"run-{self.n_runs:03d}"

    def train(
        self,
        methods: Sequence[Method],
        *,
        folder: Path | None = None,
        seed: int = 0,
        n_stages: int | None = None,
        micro_batch_rows: int | None = None,
        checkpoint_seconds: float = NEVER,
        stop: Place | None = None,
        model: torch.nn.Module | None = None,
        on_release: Callable[[Stage, Weights], None] | None = None,
        trace: Trace | None = None,
    ) -> Trace:
        """Run methods through the first stages with the real loop; goes on from what is in ``folder``.

        Raises:
            Stopped: at ``stop``.
        """
        trace = Trace() if trace is None else trace
        method = Composed(methods)
        stages = plan_stages(self.track, self.stream, seed)

        def progress(stage: Stage, done: int, n_steps: int, loss_nats: float) -> None:
            if stop is not None and stop.stage == stage.index and stop.step == done - 1:
                raise Stopped

        def finish_stage(stage: Stage, released: Weights, n_steps: int, ledger: Ledger) -> None:
            if on_release is not None:
                on_release(stage, released)
            trace.releases[stage.index] = copy_weights(released)
            trace.n_steps[stage.index] = n_steps
            if stop is not None and stop.stage == stage.index and stop.step is None:
                raise Stopped

        store = RunStore(folder or self.new_folder())
        ledger = train(
            Job(
                store=store,
                stream=self.stream,
                model=model if model is not None else copy.deepcopy(self.base),
                method=method,
                stages=stages[:n_stages],
                training=self.track.training.model_copy(update={"micro_batch_rows": micro_batch_rows}),
                seed=seed,
                hardware=self.hardware,
                finish_stage=finish_stage,
                progress=progress,
                warn=lambda text: None,
                checkpoint_seconds=checkpoint_seconds,
                log_steps=1,
            )
        )
        tensors, values = method.state_dict()
        trace.state = (copy_weights(tensors), copy.deepcopy(values))
        trace.ledger = ledger.as_dict()
        trace.grad_norms = {(line["stage"], line["step"]): line["grad_norm"] for line in store.steps()}
        return trace

    def interrupted(self, make: Callable[[], Sequence[Method]], places: Sequence[Place]) -> Trace:
        """Run to the end with a stop at each place, every time with new method objects; returns all releases."""
        folder = self.new_folder()
        released: dict[int, Weights] = {}
        for stop in places:
            trace = Trace()
            with suppress(Stopped):  # a method that never trains is not stopped within a stage
                self.train(make(), folder=folder, checkpoint_seconds=0.0, stop=stop, trace=trace)
            released |= trace.releases
        trace = self.train(make(), folder=folder, checkpoint_seconds=0.0)
        trace.releases = released | trace.releases
        return trace

    def matrix_row(self, weights: Weights) -> list[float]:
        """Return the held-out loss of every period under some weights, nats per token."""
        import numpy as np

        model = copy.deepcopy(self.base)
        suite = registry.make_suite("heldout", self.stream)
        with holding(model, weights):
            checkpoint = Checkpoint(
                model=model.eval(), weights_sha256="", device=self.hardware.device, autocast_dtype=None
            )
            rows = suite.measure(checkpoint)
        periods = range(len(self.stream.stages()))
        masks = [rows.stage == period for period in periods]
        return [float(np.sum(rows.value[m]) / np.sum(rows.n_tokens[m])) for m in masks]
