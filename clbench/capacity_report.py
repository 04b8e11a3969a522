"""Brings together what is known about the capacity of runs: the suite ``capacity`` through cells, clemc, probes.

Every checkpoint of every run is measured once; figures are computed in ``clbench.results.capacity``, the page is made
by ``clbench.leaderboard.capacity_page``. Several runs of one method are its seeds; methods of several tracks may stand
side by side, as long as each has its own matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from clbench import cells, probe, registry
from clbench.audit import track_of
from clbench.base import open_stream
from clbench.errors import ClbenchError, ConfigError
from clbench.files import exclusive, write_json
from clbench.results import clemc
from clbench.results.capacity import FILE, FORMAT, SUITE, MethodCapacity, headlines_of, headlines_of_run, of_runs
from clbench.results.matrix import Matrix, finite_or_none, matrix_of, stage_indices
from clbench.results.predictors import RunFigures
from clbench.results.store import RunStore
from clbench.run_weights import BASE, release_of, stages_with_weights
from clbench.suite import Checkpoint, Reference, Suite
from clbench.train.parallel import find_device

Tell = Callable[[str, int, int], None]
"""Gets (what, checkpoints done, checkpoints in all)."""


def gather(
    runs: Sequence[RunStore],
    *,
    measure: bool = True,
    gradients: bool = False,
    keep: bool = True,
    device: str = "auto",
    tell: Tell = lambda what, done, total: None,
) -> list[MethodCapacity]:
    """Return what is known about the capacity of runs, a method (on a track) each.

    Args:
        runs: run folders; those of one method and track are its seeds.
        measure: measure what is missing; False shows what is there.
        gradients: the gradients of every period, too: two backward passes each.
        keep: write each run's figures into its folder, for MLflow and for later.
        device: auto, cpu, cuda …
        tell: is told what is measured.

    Raises:
        ConfigError: no runs, or a method has a seed twice.
        NotFoundError, IntegrityError: no row is complete, or a stream or weights are damaged.
    """
    groups = _grouped(runs)
    stores = [store for group in groups.values() for store in group]
    tables, notes = _measured(stores, gradients=gradients, keep=keep, device=device, tell=tell) if measure else ({}, {})
    several = len({track for track, _ in groups}) > 1
    return [
        of_runs(
            f"{label} · {track}" if several else label,
            track,
            group,
            measured=tables,
            notes=notes,
            probes=[report for store in group for report in probe.kept_reports(store)],
        )
        for (track, label), group in groups.items()
    ]


Tables = dict[str, dict[int, pa.Table]]
"""Run folder -> row -> rows of the suite."""


def _measured(
    stores: Sequence[RunStore], *, gradients: bool, keep: bool, device: str, tell: Tell
) -> tuple[Tables, dict[str, list[str]]]:
    """Return the rows of every checkpoint whose weights are here, and what could not be measured, by run folder."""
    todo = {id(store): _weights_here(store) for store in stores}
    n_done, total = 0, sum(map(len, todo.values()))
    tables: Tables = {}
    notes: dict[str, list[str]] = {}
    suites: dict[str, Suite] = {}
    for store in stores:
        name = str(store.folder)
        stream = str(store.config()["track"].get("stream_sha256"))
        for stage in todo[id(store)]:
            if stream not in suites:  # it keeps the text that it has read
                suites[stream] = _suite(store, gradients=gradients)
            suite = suites[stream]
            tell(f"{store.config()['method']['label']}, stage {stage}", n_done, total)
            try:
                tables.setdefault(name, {})[stage] = measure_stage(store, stage, suite, device)
            except ConfigError as error:  # this model or text cannot be measured so; its matrix still can be read
                notes.setdefault(name, []).append(f"stage {stage}: {error.what}")
            n_done += 1
        if keep and name in tables:
            keep_headlines(store, tables[name])
    tell("", total, total)
    return tables, notes


def _grouped(runs: Sequence[RunStore]) -> dict[tuple[str, str], list[RunStore]]:
    """Return (track, method label) -> runs, seeds ascending."""
    if not runs:
        raise ConfigError("no run in these folders", mend="run `clbench run` first")
    groups: dict[tuple[str, str], dict[int, RunStore]] = {}
    for store in runs:
        config = store.config()
        group = groups.setdefault((str(config["track"].get("name", "?")), str(config["method"]["label"])), {})
        seed = int(config["seed"])
        if seed in group:
            raise ConfigError(
                f"two runs of {config['method']['label']} with seed {seed}: {group[seed].folder}",
                where=store.folder,
                mend="leave one of them out",
            )
        group[seed] = store
    return {key: [group[seed] for seed in sorted(group)] for key, group in groups.items()}


def _weights_here(store: RunStore) -> list[int]:
    """Return the stages that can be measured; none for a run whose weights are gone."""
    try:
        return stages_with_weights(store)
    except ConfigError:
        return []


def _suite(store: RunStore, *, gradients: bool) -> Suite:
    stream = open_stream(track_of(store))
    return registry.make_suite(f"{SUITE}:gradients=true" if gradients else SUITE, stream)


def measure_stage(store: RunStore, stage: int, suite: Suite, device: str) -> pa.Table:
    """Return the rows of the suite under the release weights after a stage, from the cache or measured now."""
    stream = suite.stream
    release = release_of(store, stage, stream, device)
    place = find_device(device)
    here = _weights_here(store)
    # What it is compared with: as the recorder of a run has it, so that both have the same cells.
    others = {k: _reference(store, k, suite, device) for k in {BASE, stage - 1} if k in here}
    checkpoint = Checkpoint(
        model=release.model.to(place).eval(),
        weights_sha256=release.weights_sha256,
        device=place,
        autocast_dtype=None,
        tokenizer=release.tokenizer,
        tokenizer_sha256=release.tokenizer_sha256,
        base=others.get(BASE),
        previous=others.get(stage - 1),
    )
    return cells.measure(suite, checkpoint).rows


def _reference(store: RunStore, stage: int, suite: Suite, device: str) -> Reference:
    return Reference(
        weights_sha256=store.stage_record(stage)["weights_sha256"],
        load=partial(_load, store, stage, suite, device),
    )


def _load(store: RunStore, stage: int, suite: Suite, device: str) -> Any:
    return release_of(store, stage, suite.stream, device).model


def keep_headlines(store: RunStore, tables: Mapping[int, pa.Table]) -> None:
    """Write a run's figures into its folder.

    Raises:
        ClbenchError: the folder cannot be written.
    """
    stages = {
        str(stage): {key: finite_or_none(one.value) for key, one in headlines_of(rows, stage).items()}
        for stage, rows in tables.items()
    }
    try:
        with exclusive(store.folder, mend="wait until the run has ended", timeout_seconds=30):
            write_json(store.folder / FILE, {"format": FORMAT, "stages": stages})
    except ClbenchError as error:
        raise ConfigError(
            error.what, where=store.folder, mend="give --no-keep: nothing is then written there"
        ) from None


# all runs of a store


def figures_of_runs(
    runs: Sequence[RunStore],
    *,
    measure: bool = True,
    gradients: bool = False,
    keep: bool = True,
    device: str = "auto",
    tell: Tell = lambda what, done, total: None,
) -> list[RunFigures]:
    """Return what ``clbench.results.predictors`` compares: every finished run by itself, seeds and methods apart.

    Besides the headlines every row has figures of the loss matrix: its losses on its own and on later periods, and the
    forgetting of the step that led to it.
    """
    finished = [store for store in runs if store.stages_done() == list(stage_indices(store))]
    tables, _ = _measured(finished, gradients=gradients, keep=keep, device=device, tell=tell) if measure else ({}, {})
    found: list[RunFigures] = []
    for store in finished:
        config, matrix = store.config(), matrix_of(store)
        figures = {row: _of_matrix(matrix, row) for row in matrix.row_stages}
        for row, values in headlines_of_run(store, tables.get(str(store.folder))).items():
            figures.setdefault(row, {}).update({key: one.value for key, one in values.items()})
        split = clemc.capacity_of(matrix)  # W does not depend on a reference
        for row, value in zip(split.stages[1:], split.weight_driven.tolist(), strict=True):
            figures[row]["weight_driven"] = value
        track, method = str(config["track"].get("name", "?")), str(config["method"]["label"])
        found.append(RunFigures(track, method, int(config["seed"]), matrix, figures))
    return found


def _of_matrix(matrix: Matrix, row: int) -> dict[str, float]:
    """Return the mean losses of one row on its own period and on later ones."""
    later = [float(matrix.at(row, i)) for i in matrix.column_stages if i > row]
    own = float(matrix.at(row, row)) if row in matrix.column_stages else float("nan")
    return {"loss_own": own, "loss_later": float(np.mean(later)) if later else float("nan")}
