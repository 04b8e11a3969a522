"""Matrix rows: release weights are measured once, saved, and declared complete in the run folder.

Suites that were named later go beside them: ``clbench.extras``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clbench import cells, console
from clbench.cells import Cell
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.method import Stage, Weights
from clbench.results.store import RunStore, StageRecord, utc_now
from clbench.stream import Stream
from clbench.suite import Checkpoint, Reference, Suite
from clbench.train.ledger import Ledger
from clbench.train.models import holding, load_model, load_tokenizer, save_model, weights_of, weights_sha256
from clbench.train.parallel import Hardware

Sink = Callable[[RunStore], object]
"""Called after every complete matrix row; must not raise."""


@dataclass
class Recorder:
    """Measures release weights and writes complete matrix rows."""

    store: RunStore
    suites: Sequence[Suite]
    model: torch.nn.Module
    stream: Stream
    hardware: Hardware
    sinks: tuple[Sink, ...] = ()
    others: dict[int, Reference] = field(default_factory=dict)
    """Weights of stages that are not in the run folder, 0 the base, for suites that compare."""
    _tokenizer: tuple[Any, str] | None = field(default=None, init=False, repr=False)

    def finish_stage(self, stage: Stage, released: Weights, n_steps: int, ledger: Ledger) -> None:
        """Measure the release weights of a stage, save them, and declare the row complete.

        A row that is there already is kept, unless other weights stand behind it (a run that lost its checkpoints and
        trained anew on another number of threads).
        """
        done = stage.index in self.store.stages_done()
        with holding(self.model, released):
            digest = weights_sha256(self.model)
            fresh = not done or self.store.stage_record(stage.index)["weights_sha256"] != digest
            if fresh:
                save_model(
                    self.model,
                    weights_of(self.model),
                    self._release_folder(stage.index),
                    tokenizer_folder=self.stream.tokenizer_folder,
                )
            self.record(stage.index, digest, n_steps, ledger, again=fresh)

    def mend_rows(self, ledger: Ledger) -> None:
        """Measure rows again that were lost or damaged, from the release weights in the run folder.

        Raises:
            NotFoundError, IntegrityError: the release weights are lost or damaged, too.
        """
        for stage in self.store.stages_done():
            try:
                for suite in self.suites:
                    self.store.rows(suite.name, stage)
            except (NotFoundError, IntegrityError) as error:
                console.warn(f"{error.what} ({error.where}); measuring stage {stage} again")
                there = self.store.stage_record(stage)
                released = load_model(self._release_folder(stage)) if stage else self.model
                with holding(self.model, weights_of(released)):
                    if weights_sha256(self.model) != there["weights_sha256"]:
                        raise IntegrityError(
                            "release weights are not those that were measured",
                            where=self._release_folder(stage),
                            mend="delete the run folder and run again",
                        ) from None
                    self.record(stage, there["weights_sha256"], there["n_steps"], ledger, again=True)

    def _release_folder(self, stage: int) -> Path:
        return self.store.folder / "release" / f"stage-{stage:02d}"

    def _weights_after(self, stage: int) -> Reference | None:
        """Return the release weights of a stage, where they were measured and are still kept."""
        if stage in self.others:
            return self.others[stage]
        folder = self._release_folder(stage)
        if stage not in self.store.stages_done() or not folder.is_dir():
            return None
        return Reference(
            weights_sha256=self.store.stage_record(stage)["weights_sha256"], load=partial(load_model, folder)
        )

    def record(
        self,
        stage: int,
        digest: str,
        n_steps: int,
        ledger: Ledger,
        *,
        tokenizer: Any = None,
        tokenizer_sha256: str = "",
        again: bool = False,
    ) -> None:
        """Measure the model as it is and write row ``stage``; nothing is measured twice, unless ``again``."""
        if again or stage not in self.store.stages_done():
            found = {}
            for suite in self.suites:
                own = (tokenizer, tokenizer_sha256) if tokenizer is not None else self._tokenizer_for(suite)
                checkpoint = Checkpoint(
                    model=self.model,
                    weights_sha256=digest,
                    device=self.hardware.device,
                    autocast_dtype=None,
                    tokenizer=own[0],
                    tokenizer_sha256=own[1],
                    base=self._weights_after(0),
                    previous=self._weights_after(stage - 1),
                )
                found[suite.name] = cells.measure(suite, checkpoint)
            write_row(self.store, stage, digest, found, n_steps)
        conclude(self.store, stage, ledger, self.hardware, self.sinks)

    def _tokenizer_for(self, suite: Suite) -> tuple[Any, str]:
        """Return what a suite reads a model of the stream's own tokens with: a suite of the stream has the ids."""
        if suite.needs_stream:
            return None, ""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.stream.tokenizer_folder)
        return self._tokenizer

    def record_outside(self, stage: int, tokenizer: Any, tokenizer_sha256: str) -> None:
        """Measure a checkpoint that was trained elsewhere.

        Raises:
            ConfigError: this row was measured with other weights.
        """
        digest = weights_sha256(self.model)
        check_same_weights(self.store, stage, digest)
        self.record(stage, digest, 0, Ledger(), tokenizer=tokenizer, tokenizer_sha256=tokenizer_sha256)


def conclude(store: RunStore, stage: int, ledger: Ledger, hardware: Hardware, sinks: Sequence[Sink]) -> None:
    """Bill a complete row and tell the sinks."""
    for done in store.stages_done():
        cost = store.stage_record(done).get("evaluation")
        if cost is not None and done <= stage:
            ledger.evaluations[done] = cost
    ledger.note_memory(hardware.memory_bytes())
    store.write_ledger(ledger.as_dict())
    for sink in sinks:
        sink(store)


def check_same_weights(store: RunStore, stage: int, digest: str) -> None:
    """Raise ConfigError where a row was measured with other weights."""
    if stage in store.stages_done() and store.stage_record(stage)["weights_sha256"] != digest:
        raise ConfigError(
            f"stage {stage} of this folder was measured with other weights",
            where=store.folder,
            mend="give another folder with --out",
        )


def write_row(store: RunStore, stage: int, digest: str, found: Mapping[str, Cell], n_steps: int) -> None:
    """Write the rows of all suites, then the record that declares a stage complete."""
    for name, cell in found.items():
        store.write_rows(name, stage, cell.rows)
    store.write_stage_record(
        StageRecord(
            stage=stage,
            weights_sha256=digest,
            cells={name: cell.address for name, cell in found.items()},
            finished=utc_now(),
            n_steps=n_steps,
            evaluation={
                "flops": sum(cell.flops for cell in found.values()),
                "seconds": sum(cell.seconds for cell in found.values()),
            },
        )
    )
