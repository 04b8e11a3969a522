"""MLflow as a sink: everything it shows is computed from the run folder and can be rebuilt from it.

``plan_of`` turns a run folder into plain data (pure, no MLflow); ``MlflowSink`` makes a tracking store equal
to that plan. Live logging and ``clbench mlflow sync`` are the same code: the engine calls ``safe_sync`` after
every stage.

    experiment  clbench/<track>-v<version>
      run       <method>-s<seed>   a curve per period: bpb/<period>, nats/<period>; step = stage trained
        run     t03-<stage>        train/, perf/, system/; step = optimizer step

Scores are computed in ``clbench.results``. The last part of this file starts MLflow's own page.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import numpy as np

from clbench.errors import BusyError, ClbenchError, ConfigError, IntegrityError, NotFoundError, did_you_mean
from clbench.files import canonical_json, digest_of, read_json, sha256_bytes, sha256_file
from clbench.results import capacity, clemc
from clbench.results.matrix import Matrix, Unit, documents_of
from clbench.results.metrics import backward, forward, in_distribution
from clbench.results.store import RunStore, StageRecord, StepLine
from clbench.results.summary import Score, summarise
from clbench.results.tasks import tasks_of_run

SECTIONS: dict[Unit, str] = {"bits_per_byte": "bpb", "nats_per_token": "nats"}
"""Unit -> first level of the metric names; MLflow's page makes one section of each."""
PLAN_VERSION = 1
"""Part of every mark: a new layout rebuilds what an older clbench logged."""
MAX_BATCH = 1000
"""Metrics in one ``log_batch`` (limit of MLflow's REST API)."""
MAX_BATCH_PARAMS = 100
MAX_PARAM_CHARS = 6000
"""MLflow cuts longer values silently; we cut them first and say so in the value."""
MAX_KEY_CHARS = 250
LOCK_SECONDS = 120.0
NOTE = """One run per method and seed; unfold it for one child run per stage.

- `bpb/<period>` (bits per byte) and `nats/<period>` (nats per token) are the loss on the held-out documents
  of that period. Step = stage just trained, step 0 = the base, so every panel is the retention curve of one
  period: a line that rises after its own stage is forgetting. Lower is better.
- `cl/backward`, `cl/in_distribution`, `cl/forward`: mean loss after that stage on earlier periods, on its own
  and on later ones, nats per token.
- `method/<method>/<name>` is what a method noted about itself in that stage.
- `score/…` (nats per token where they are losses) with `_low` and `_high` (95 % interval; for one run that is
  evaluation noise, not seed noise) and `cost/…` appear when the run is done.
- `acc/<task>`, step = stage, is the score of a task of any suite that has scores, also of suites measured later
  (`clbench evaluate RUN --suite NAME`); higher is better.
- `capacity/clemc_proxy_…`: forgetting cost J above the best of the run and its split, step = stage; `capacity/…`, when
  `clbench capacity` or the track measured it: see docs/capacity.md. `probe/<text>/lost_…`, when `clbench probe` did:
  mean loss on the way less the base's, positive where the checkpoint learns worse.
- `fisher/<block>/<figure>`, step = stage, when `clbench fisher` measured the run: see docs/fisher.md.
- `…/undefined` = 1 marks a figure that is not defined or not finite there.
- Artifacts: the matrix as pictures and CSV, the configuration, the bill, and the report when it was made.

This is a copy. The run folder is the source; `clbench mlflow sync RUN` makes it again."""


# ---------------------------------------------------------------- where to log


def default_uri(runs_root: Path) -> str:
    """Return the URI of the SQLite database ``mlflow.db`` in the folder of all runs."""
    return "sqlite:///" + (runs_root.resolve() / "mlflow.db").as_posix()


def uri_of_mode(mode: str, runs_root: Path) -> str | None:
    """Return the tracking URI that ``--mlflow none|sqlite|URI`` asks for, None for none.

    Raises:
        ConfigError: for anything else, including the file store that MLflow 3 refuses.
    """
    if mode == "none":
        return None
    if mode == "sqlite":
        return default_uri(runs_root)
    scheme = mode.partition(":")[0]
    if "://" in mode and scheme != "file":
        return mode
    hint = "MLflow's file store is retired; use sqlite" if scheme == "file" else did_you_mean(mode, ["none", "sqlite"])
    raise ConfigError(
        f"not an MLflow target: {mode!r}",
        where="--mlflow",
        mend=f"give none, sqlite or a URI such as sqlite:///PATH ({hint})",
    )


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a SQLite URI, None for any other URI."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    if not database or database == ":memory:":
        raise ConfigError("MLflow needs a SQLite file, not a database in memory", where=uri, mend="use sqlite:///PATH")
    return Path(database).resolve()


def artifact_root(database: Path) -> Path:
    """Return the folder of the artifacts that belong to a SQLite database: ``mlflow-artifacts`` beside it."""
    return database.parent / f"{database.stem}-artifacts"


def public_uri(uri: str) -> str:
    """Return a URI without the user name and password that it may carry, for messages."""
    return re.sub(r"//[^/@\s]*@", "//", uri)


# ---------------------------------------------------------------- what to log


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True)
class LoggedRun:
    """One MLflow run as the run folder defines it."""

    key: str
    """``parent`` or ``stage-03``: what identifies it among the runs of one ``run_id``."""
    name: str
    tags: dict[str, str]
    points: list[Point]
    """In an order that only grows at its end while the run goes on."""
    start_ms: int
    end_ms: int | None
    status: str
    """FINISHED, FAILED or RUNNING, MLflow's words."""
    params: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SinkPlan:
    """A run folder as MLflow shall show it."""

    experiment: str
    run_id: str
    title: str
    names: dict[int, str]
    """Of the stages, as they stand in metric names."""
    matrices: dict[Unit, Matrix]
    parent: LoggedRun
    children: list[LoggedRun]


@dataclass(frozen=True)
class _Folder:
    """What is read of a run folder, once."""

    store: RunStore
    config: dict[str, Any]
    names: dict[int, str]
    status: dict[str, Any]
    records: dict[int, StageRecord]
    steps: list[StepLine]
    common: dict[str, str]
    """Tags that parent and children share."""

    @classmethod
    def read(cls, store: RunStore) -> _Folder:
        config = store.config()
        try:
            common = {
                "clbench.run_id": str(config["run_id"]),
                "clbench.method": str(config["method"]["label"]),
                "clbench.track": str(config["track"]["name"]),
                "clbench.seed": str(int(config["seed"])),
                "mlflow.source.name": "clbench",
            }
            config["track"]["version"]
            names = period_names(config["stages"])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"run.yaml lacks a field or has a wrong one: {error}", where=store.folder) from None
        if not re.fullmatch(r"[\w.-]{1,128}", common["clbench.run_id"]):
            raise IntegrityError("run_id in run.yaml is not a plain name", where=store.folder)
        records = {stage: store.stage_record(stage) for stage in store.stages_done()}
        return cls(store, config, names, store.status(), records, store.steps(), common)

    @property
    def state(self) -> str:
        return str(self.status.get("state", "absent"))

    def time(self, text: object) -> int:
        """Return UTC ISO-8601 text as milliseconds since 1970."""
        try:
            return round(datetime.fromisoformat(str(text)).timestamp() * 1000)
        except ValueError:
            raise IntegrityError(f"not a time: {text!r:.60}", where=self.store.folder) from None

    def finished(self) -> dict[int, int]:
        """Return when each complete row was finished, in milliseconds since 1970."""
        return {stage: self.time(record["finished"]) for stage, record in self.records.items()}


def plan_of(store: RunStore) -> SinkPlan:
    """Read a run folder, complete or not, into the runs, parameters and points that MLflow shall hold.

    Raises:
        ClbenchError: the folder is broken.
    """
    folder = _Folder.read(store)
    track = folder.config["track"]
    documents = documents_of(store)
    matrices = {unit: documents.matrix(unit, tuple(folder.names)) for unit in SECTIONS}
    title = f"{folder.common['clbench.method']}-s{folder.common['clbench.seed']}"
    children = [_child(folder, stage) for stage in folder.names]
    return SinkPlan(
        experiment=f"clbench/{track['name']}-v{track['version']}",
        run_id=folder.common["clbench.run_id"],
        title=title,
        names=folder.names,
        matrices=matrices,
        parent=_parent(folder, title, matrices),
        children=[child for child in children if child is not None],
    )


def _parent(folder: _Folder, name: str, matrices: Mapping[Unit, Matrix]) -> LoggedRun:
    """Return the run of one (track, method, seed)."""
    finished, track = folder.finished(), folder.config["track"]
    starts = [folder.time(line["time"]) for line in folder.steps[:1]] + list(finished.values())[:1]
    if created := folder.config.get("created"):
        starts = [folder.time(created)]
    points = matrix_points(matrices, folder.names, finished, folder.store.ledger())
    status = {"done": "FINISHED", "failed": "FAILED"}.get(folder.state, "RUNNING")
    tags = folder.common | {
        "clbench.kind": "benchmark",
        "clbench.stream": str(track.get("stream", "")),
        "clbench.stream_sha256": str(track.get("stream_sha256", "")),
        "clbench.status": folder.state,
        "mlflow.note.content": _run_note(folder),
    }
    if folder.state == "done" and finished:
        last, at = list(finished.items())[-1]
        scores = summarise([folder.store]).scores
        points += cost_points(folder.store.ledger(), last, at) + score_points(scores, last, at)
        undefined = [score for score in scores.values() if not math.isfinite(score.value)]
        tags |= {f"clbench.undefined.{metric_name(s.name)}": str(s.reason) for s in undefined}
    points += fisher_points(folder.store, finished) + task_points(folder.store, finished)
    if folder.state == "done":  # the best of the run is known only now
        points += capacity_points(folder.store, matrices["nats_per_token"], finished)
        points += probe_points(folder.store, finished)
    return LoggedRun(
        key="parent",
        name=name,
        tags=tags,
        points=points,
        start_ms=min(starts, default=0),
        end_ms=max(finished.values(), default=None),
        status=status,
        params=flatten(folder.config),
    )


def _run_note(folder: _Folder) -> str:
    """Return the description shown at the top of a run's page."""
    lines = [f"Made by `{folder.config.get('command', '')}`"]
    if folder.state == "failed":
        lines.append("Failed: " + str({key: value for key, value in folder.status.items() if key != "state"}))
    return "\n\n".join(lines)[:5000]


def _child(folder: _Folder, stage: int) -> LoggedRun | None:
    """Return the nested run of one stage, None for the base and for what has not begun."""
    record = folder.records.get(stage)
    lines = [line for line in folder.steps if line["stage"] == stage]
    if not lines and (record is None or stage == 0):
        return None
    times = [folder.time(line["time"]) for line in lines]
    tags = folder.common | {"clbench.kind": "stage", "clbench.stage": str(stage)}
    end = None
    if record is not None:
        end = folder.time(record["finished"])
        tags["clbench.weights_sha256"] = record["weights_sha256"]
    unfinished = "FAILED" if folder.state == "failed" else "RUNNING"
    return LoggedRun(
        key=f"stage-{stage:02d}",
        name=f"t{stage:02d}-{folder.names[stage]}",
        tags=tags,
        points=[point for line, at in zip(lines, times, strict=True) for point in step_points(line, at)],
        start_ms=min(times) if times else end or 0,
        end_ms=end,
        status=unfinished if record is None else "FINISHED",
    )


def step_points(line: StepLine, at: int) -> list[Point]:
    """Return the points of one logged optimizer step; ``system/`` keys are named as MLflow names its own."""
    values = {
        "train/loss": line["loss_nats"],
        "train/lr": line["lr"],
        "train/grad_norm": line["grad_norm"],
        "perf/tokens_per_second": line["tokens_per_second"],
        "system/system_memory_usage_megabytes": line["memory_bytes"] / 1e6,
        "system/cpu_utilization_percentage": line["cpu_percent"],
    }
    return [finite_point(key, value, line["step"], at) for key, value in values.items()]


def matrix_points(
    matrices: Mapping[Unit, Matrix], names: Mapping[int, str], finished: Mapping[int, int], ledger: Mapping[str, Any]
) -> list[Point]:
    """Return the matrix row by row: a point per period and unit, the row's means, then what methods noted."""
    points: list[Point] = []
    for row, at in finished.items():
        for unit, section in SECTIONS.items():
            matrix = matrices[unit]
            for column in matrix.column_stages:
                key = f"{section}/{names[column]}"
                points.append(finite_point(key, float(matrix.at(row, column)), row, at))
        for name, mean in row_means(matrices["nats_per_token"], row).items():
            points.append(finite_point(f"cl/{name}", mean, row, at))
        points += note_points(ledger, row, at)
    return points


def row_means(matrix: Matrix, row: int) -> dict[str, float]:
    """Return the mean losses of one checkpoint on earlier periods, its own and later ones, where defined."""
    place = matrix.row_stages.index(row)
    alone = Matrix(matrix.values[[place]], (row,), matrix.column_stages, matrix.unit)
    metrics = {"backward": backward, "in_distribution": in_distribution, "forward": forward}
    means = {name: metric(alone, first_row=0).value for name, metric in metrics.items()}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def score_points(scores: Mapping[str, Score], step: int, at: int) -> list[Point]:
    """Return the scores of a finished run with their intervals; nothing is ever sent as NaN."""
    points: list[Point] = []
    for name, score in scores.items():
        key = f"score/{metric_name(name)}"
        points.append(finite_point(key, score.value, step, at))
        if math.isfinite(score.low) and math.isfinite(score.high):
            points += [Point(f"{key}_low", score.low, step, at), Point(f"{key}_high", score.high, step, at)]
    return points


def fisher_points(store: RunStore, finished: Mapping[int, int]) -> list[Point]:
    """Return what ``clbench fisher`` wrote into the run folder about packed rows of each stage's own text.

    Figures that are not defined are left out. Where a stage was measured with several options, the last one counts.
    """
    path = store.folder / "fisher.json"
    if not path.is_file():
        return []
    points: dict[tuple[int, str], Point] = {}
    try:
        for report in read_json(path)["reports"].values():
            about = report["about"]
            stage = int(about["stage"])
            if about["period"] != stage or about["grouping"] != "sequence" or stage not in finished:
                continue
            for block, figures in report["blocks"].items():
                for name, figure in figures["quantities"].items():
                    if figure["value"] is not None:
                        key = f"fisher/{metric_name(block)}/{metric_name(name)}"
                        points[stage, key] = finite_point(key, float(figure["value"]), stage, finished[stage])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"the Fisher reports lack a field or have a wrong one: {error}",
            where=path,
            mend="delete it and run `clbench fisher` again",
        ) from None
    return list(points.values())


def task_points(store: RunStore, finished: Mapping[int, int]) -> list[Point]:
    """Return the score of every task at every stage; losses have curves of their own."""
    points: list[Point] = []
    for stage, found in tasks_of_run(store).items():
        for name, task in found.items():
            points.append(finite_point(f"acc/{metric_name(name)}", task.score, stage, finished[stage]))
    return points


def capacity_points(store: RunStore, matrix: Matrix, finished: Mapping[int, int]) -> list[Point]:
    """Return the forgetting cost of every stage and its split, and the figures of the suite ``capacity`` that are kept.

    Figures that are not defined are left out.
    """
    points: list[Point] = []
    rows = [k for k in matrix.row_stages if k in finished and np.all(np.isfinite(matrix.at(k, k)))]
    if rows:
        found = clemc.capacity_of(clemc.excess(matrix, clemc.choose_reference(None)))
        for name, get in clemc.PER_STAGE.items():
            places = found.stages[1:] if name in clemc.STEPS else found.stages
            for row, value in zip(places, get(found).tolist(), strict=True):
                if row in finished and math.isfinite(value):
                    points.append(Point(f"capacity/{clemc.NAME}_{name}", value, row, finished[row]))
    for row, figures in capacity.kept_headlines(store).items():
        for name, value in figures.items():
            if row in finished and value is not None:
                points.append(finite_point(f"capacity/{metric_name(name)}", float(value), row, finished[row]))
    return points


def probe_points(store: RunStore, finished: Mapping[int, int]) -> list[Point]:
    """Return what ``clbench probe`` wrote into the run folder: loss of plasticity by text and rate."""
    path, points = store.folder / "probe.json", dict[tuple[int, str], Point]()
    if not path.is_file():
        return []
    try:
        for report in read_json(path)["reports"]:
            text = metric_name(str(report["about"]["options"]["on"]))[:100]
            for name, model in report["models"].items():
                kind, _, number = name.partition(" ")
                if kind != "stage" or int(number) not in finished or "against_base" not in model:
                    continue
                lost = model["against_base"]
                values = {"best_rate": lost["at_best"], **{f"rate_{k}": one for k, one in lost["by_rate"].items()}}
                for rate, one in values.items():
                    if one["value"] is not None:
                        key, row = f"probe/{text}/lost_{metric_name(rate)}", int(number)
                        points[row, key] = finite_point(key, float(one["value"]), row, finished[row])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"the probe reports lack a field or have a wrong one: {error}",
            where=path,
            mend="delete it and run `clbench probe` again",
        ) from None
    return list(points.values())


def period_names(stages: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Return the name of every stage as one level of a metric name, unique."""
    names: dict[int, str] = {}
    for stage in stages:
        index, name = int(stage["index"]), metric_name(str(stage["name"]))[:100]
        names[index] = f"{name}-{index:02d}" if name in names.values() else name
    return names


def cost_points(ledger: Mapping[str, Any], step: int, at: int) -> list[Point]:
    """Return the bill of a finished run; nothing for checkpoints made elsewhere, whose ledger is empty."""
    values: dict[str, float] = {}
    if tokens := ledger.get("tokens"):
        values["cost/tokens"] = sum(n for sources in tokens.values() for n in sources.values())
    for purpose, flop in ledger.get("flops", {}).items():
        values[f"cost/{metric_name(purpose)}_flop"] = flop
    if seconds := ledger.get("seconds"):
        values["cost/seconds"] = sum(seconds.values())
    if "peak_memory_bytes" in ledger:
        values["cost/peak_memory_bytes"] = ledger["peak_memory_bytes"]
    return [finite_point(key, value, step, at) for key, value in values.items()]


def note_points(ledger: Mapping[str, Any], stage: int, at: int) -> list[Point]:
    """Return what methods noted about themselves in one stage."""
    points: list[Point] = []
    for method, noted in ledger.get("notes", {}).get(str(stage), {}).items():
        for name, value in noted.items():
            key = f"method/{metric_name(method)}/{metric_name(name)}"
            points.append(finite_point(key, math.nan if value is None else float(value), stage, at))
    return points


def finite_point(key: str, value: float, step: int, time_ms: int) -> Point:
    """Return a point, or ``<key>/undefined`` = 1: MLflow would store inf as 1.8e308."""
    if math.isfinite(value):
        return Point(key, float(value), step, time_ms)
    return Point(f"{key}/undefined", 1.0, step, time_ms)


def metric_name(text: str) -> str:
    """Return text as one level of a metric or parameter name: MLflow takes letters, digits and ``_-.: ``."""
    return re.sub(r"[^\w\-.: ]", "_", text).strip() or "_"


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a nested configuration as MLflow parameters: dotted keys, lists as JSON, limits kept."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
            return
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if len(text) > MAX_PARAM_CHARS:
            tail = f" … cut, {len(text)} characters, sha256 {sha256_bytes(text.encode())}"
            text = text[: MAX_PARAM_CHARS - len(tail)] + tail
        flat[metric_name(prefix)[:MAX_KEY_CHARS]] = text

    walk("", config)
    return flat


# ---------------------------------------------------------------- the sink


def quiet_mlflow() -> None:
    """Set what MLflow reads from the environment before it is imported: no telemetry, short retries.

    What the user set about retries and logging stays.
    """
    os.environ.update(_silence())
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # 7 by default: a dead server would hold a run for minutes
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)


def _silence() -> dict[str, str]:
    """Return the environment that keeps MLflow from talking to anyone but its store."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_AGENT_HINT": "true",
        "MLFLOW_MODEL_CATALOG_URI": "",
    }


def _to_stderr(line: str) -> None:
    """Print one warning."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(line, style="yellow", markup=False, highlight=False)


class MlflowSink:
    """Makes one MLflow tracking store show run folders.

    Uses ``MlflowClient`` with explicit run ids, never MLflow's active run: a user's own code keeps it.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str | None = None,
        warn: Callable[[str], None] = _to_stderr,
        make_report: Callable[[RunStore], Path] | None = None,
    ) -> None:
        """Remember the target; nothing is imported or opened yet.

        Args:
            uri: tracking URI: ``sqlite:///PATH`` or a server.
            experiment: name of the experiment; ``clbench/<track>-v<version>`` unless given.
            warn: takes the one line that ``safe_sync`` says when MLflow fails.
            make_report: writes the report of a finished run, which is then attached.
        """
        self._make_report = make_report
        self.uri, self.experiment = uri, experiment
        self._warn, self._warned = warn, False
        self._client: Any = None

    def safe_sync(self, store: RunStore, report: Path | None = None) -> str | None:
        """Sync, but never raise: a broken sink must not break a run. Warns once; later calls try again."""
        try:
            return self.sync(store, report)
        except Exception as error:
            if not self._warned:
                self._warned = True
                what = error.what if isinstance(error, ClbenchError) else f"{type(error).__name__}: {_one_line(error)}"
                self._warn(
                    f"MLflow does not show this run: {_one_line(what)}; the run goes on and loses nothing, "
                    f"`clbench mlflow sync {store.folder}` shows it later"
                )
            return None

    def sync(self, store: RunStore, report: Path | None = None) -> str:
        """Make MLflow equal to the run folder and return MLflow's id of the parent run.

        Idempotent and incremental: only points after the mark of the last sync are sent. Where the folder no
        longer begins with what was logged (a resumed run wrote its last steps again), that MLflow run is
        deleted and made anew, for MLflow cannot take a point back.

        Args:
            store: the run folder, complete or not.
            report: a self-contained page to attach as ``report.html``.

        Raises:
            ClbenchError: the run folder is broken, or MLflow refuses, in one line.
        """
        plan = plan_of(store)
        try:
            with self._lock(store):
                client = self._connect()
                experiment_id = self._experiment_id(client, self.experiment or plan.experiment)
                if report is None and self._make_report is not None and store.status()["state"] == "done":
                    report = self._make_report(store)
                return _sync_runs(client, experiment_id, plan, store, report)
        except ClbenchError:
            raise
        except Exception as error:
            uri = public_uri(self.uri)
            raise ClbenchError(f"MLflow failed: {_one_line(error)}", where=uri, mend=_remedy(error, uri)) from error

    @contextlib.contextmanager
    def _lock(self, store: RunStore) -> Iterator[None]:
        """Let one process at a time write: a database created by two at once breaks, so would a run."""
        database = sqlite_path(self.uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            path = database.with_name(f".{database.name}.lock")
        elif os.access(store.folder, os.W_OK):
            path = store.folder / ".mlflow.lock"
        else:  # a read-only folder, which no engine is writing
            yield
            return
        lock = filelock.FileLock(path, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise BusyError(
                "another process holds the MLflow lock", where=path, mend="try again when it is done"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _connect(self) -> Any:
        """Return the client; makes a missing SQLite database, whole or not at all. Hold the lock."""
        quiet_mlflow()
        from mlflow import MlflowClient

        database = sqlite_path(self.uri)
        if database is not None and not database.exists():
            self._client = None
            temporary = database.with_name(f".{database.name}.new.tmp")
            temporary.unlink(missing_ok=True)
            MlflowClient(tracking_uri=f"sqlite:///{temporary.as_posix()}").search_experiments(max_results=1)
            temporary.replace(database)
        if self._client is None:
            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _experiment_id(self, client: Any, name: str) -> str:
        """Return the id of an experiment, made with a note and a place for artifacts if it is missing."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is None:
            database = sqlite_path(self.uri)  # by default MLflow would put artifacts below the current folder
            location = None if database is None else artifact_root(database).as_uri()
            try:
                return str(client.create_experiment(name, location, tags={"mlflow.note.content": NOTE}))
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def _one_line(error: object) -> str:
    """Return the gist of an error without line breaks or passwords."""
    text = public_uri(" ".join(str(error).split()))
    return text if len(text) <= 300 else text[:300] + " …"


def _remedy(error: Exception, uri: str) -> str:
    """Return what to do about an error of MLflow's."""
    text = str(error)
    if "out-of-date database schema" in text:
        return f"run `mlflow db upgrade {uri}`"
    if "unable to open database" in text or isinstance(error, PermissionError):
        return "choose a folder that can be written, or --mlflow none"
    return "check the URI and that its server answers, or use --mlflow sqlite"


@dataclass(frozen=True)
class Mark:
    """What of a LoggedRun is in MLflow, kept there as tag ``clbench.mark``.

    ``target`` and ``digest`` are written before the points ``written..target`` are sent, ``written`` after.
    After a kill in between they are sent again: MLflow stores an equal (key, value, step, time) once.
    """

    params: str
    written: int
    target: int
    digest: str

    TAG = "clbench.mark"

    @classmethod
    def parse(cls, text: str | None) -> Mark | None:
        """Return the mark of another version, or none at all, as None."""
        try:
            fields = json.loads(text or "null")
            return cls(**fields["mark"]) if fields["version"] == PLAN_VERSION else None
        except (ValueError, TypeError, KeyError):
            return None

    def text(self) -> str:
        """Return the tag's value."""
        fields = {
            "params": self.params,
            "written": self.written,
            "target": self.target,
            "digest": self.digest,
        }
        return canonical_json({"version": PLAN_VERSION, "mark": fields})

    def fits(self, run: LoggedRun) -> bool:
        """Return whether everything logged, or begun to be, is the beginning of ``run``."""
        return (
            self.params == digest_of(run.params)
            and self.target <= len(run.points)
            and self.digest == digest_of_points(run.points[: self.target])
        )


def digest_of_points(points: Sequence[Point]) -> str:
    """Return a digest of points in their order."""
    return sha256_bytes("\n".join(f"{p.key}\t{p.value!r}\t{p.step}\t{p.time_ms}" for p in points).encode())


def _sync_runs(client: Any, experiment_id: str, plan: SinkPlan, store: RunStore, report: Path | None) -> str:
    """Bring the parent, its children and its artifacts up to date; drop what the folder does not know."""
    present: dict[str, Any] = {}
    for run in _search(client, experiment_id, plan.run_id):
        key = run.data.tags.get("clbench.key", "")
        if key in present or key not in {"parent", *(child.key for child in plan.children)}:
            client.delete_run(run.info.run_id)
        else:
            present[key] = run
    parent_id = _bring(client, experiment_id, plan.parent, present.get("parent"), {})
    for child in plan.children:
        _bring(client, experiment_id, child, present.get(child.key), {"mlflow.parentRunId": parent_id})
    _attach(client, parent_id, plan, store, report)
    return parent_id


def _search(client: Any, experiment_id: str, run_id: str) -> list[Any]:
    """Return all MLflow runs, parent and children, of one run folder, oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            f"tags.`clbench.run_id` = '{run_id}'",
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            return found


def _bring(client: Any, experiment_id: str, run: LoggedRun, found: Any, links: dict[str, str]) -> str:
    """Make one MLflow run equal to ``run`` and return its id."""
    from mlflow.entities import RunTag

    mark = Mark.parse(found.data.tags.get(Mark.TAG)) if found else None
    if found and (mark is None or not mark.fits(run)):
        client.delete_run(found.info.run_id)
        found = mark = None
    tags = run.tags | links | {"clbench.key": run.key}
    if found is None:
        created = client.create_run(experiment_id, start_time=run.start_ms, tags=tags, run_name=run.name)
        run_id, known = str(created.info.run_id), dict(tags)
        status = "RUNNING"
    else:
        run_id, known, status = str(found.info.run_id), found.data.tags, found.info.status
    if mark is None:
        _log_params(client, run_id, run.params)
        mark = Mark(digest_of(run.params), 0, 0, digest_of_points([]))
        client.set_tag(run_id, Mark.TAG, mark.text())
    changed = [RunTag(key, value) for key, value in tags.items() if known.get(key) != value]
    if changed:
        client.log_batch(run_id, tags=changed)
    _log_points(client, run_id, run, mark)
    if status != run.status:
        if run.status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, run.status, run.end_ms)
    return run_id


def _log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Log write-once parameters in batches that MLflow takes."""
    from mlflow.entities import Param

    entries = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entries), MAX_BATCH_PARAMS):
        client.log_batch(run_id, params=entries[start : start + MAX_BATCH_PARAMS])


def _log_points(client: Any, run_id: str, run: LoggedRun, mark: Mark) -> None:
    """Send the points after the mark and move it."""
    from mlflow.entities import Metric

    target = len(run.points)
    if mark.written == target and mark.target == target:
        return
    digest = digest_of_points(run.points)
    client.set_tag(run_id, Mark.TAG, Mark(mark.params, mark.written, target, digest).text())
    for start in range(mark.written, target, MAX_BATCH):
        batch = run.points[start : min(start + MAX_BATCH, target)]
        client.log_batch(run_id, metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in batch])
    client.set_tag(run_id, Mark.TAG, Mark(mark.params, target, target, digest).text())


# ---------------------------------------------------------------- artifacts


def _attach(client: Any, parent_id: str, plan: SinkPlan, store: RunStore, report: Path | None) -> None:
    """Send the artifacts that changed; tag ``clbench.artifacts`` remembers the digest of each."""
    table = matrix_csv(plan.matrices, plan.names)
    wanted = {"matrix": digest_of([table, plan.title, PLAN_VERSION])} if plan.parent.points else {}
    files = {"run.yaml": store.folder / "run.yaml", "ledger.json": store.folder / "ledger.json"}
    if report is not None:
        files["report.html"] = report
    wanted |= {name: sha256_file(path) for name, path in files.items() if path.is_file() or name == "report.html"}
    known = json.loads(client.get_run(parent_id).data.tags.get("clbench.artifacts", "{}"))
    changed = {name for name, digest in wanted.items() if known.get(name) != digest}
    if not changed:
        return
    with tempfile.TemporaryDirectory(prefix="clbench-") as name:
        folder = Path(name)
        if "matrix" in changed:
            (folder / "matrix.csv").write_text(table, encoding="utf-8")
            for unit, matrix in plan.matrices.items():
                draw_matrix(
                    matrix,
                    plan.names,
                    f"{plan.title}, {unit.replace('_', ' ')}",
                    folder / f"matrix-{unit}.png",
                )
        for file in changed - {"matrix"}:
            shutil.copyfile(files[file], folder / file)
        client.log_artifacts(parent_id, str(folder))
    client.set_tag(parent_id, "clbench.artifacts", canonical_json(known | wanted))


def matrix_csv(matrices: Mapping[Unit, Matrix], names: Mapping[int, str]) -> str:
    """Return the matrix as CSV, a line per cell; an undefined cell is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after_stage", "after_stage_name", "period", "period_name", *matrices])
    shape = next(iter(matrices.values()))
    for row in shape.row_stages:
        for column in shape.column_stages:
            cells = [float(matrix.at(row, column)) for matrix in matrices.values()]
            values = [repr(cell) if math.isfinite(cell) else "" for cell in cells]
            writer.writerow([row, names.get(row, ""), column, names[column], *values])
    return text.getvalue()


def draw_matrix(matrix: Matrix, names: Mapping[int, str], title: str, path: Path) -> None:
    """Draw the matrix as a heat map with its numbers; light is a low loss, bold the stage's own period."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_rows, n_columns = matrix.values.shape
    figure = Figure(figsize=(min(2.5 + 0.8 * n_columns, 20), min(1.5 + 0.5 * n_rows, 16)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(matrix.values, cmap="viridis_r", aspect="auto")
    finite = matrix.values[np.isfinite(matrix.values)]
    middle = (finite.min() + finite.max()) / 2 if finite.size else 0.0
    axes.set_facecolor("lightgrey")
    axes.set_xticks(range(n_columns), [names[c] for c in matrix.column_stages], rotation=45, ha="right")
    rows = ["base" if r == 0 else f"after {names.get(r, r)}" for r in matrix.row_stages]
    axes.set_yticks(range(n_rows), rows)
    axes.set(title=title, xlabel="held-out period", ylabel="weights")
    figure.colorbar(image, ax=axes, label=f"{matrix.unit.replace('_', ' ')} (lower is better)")
    for y, row in enumerate(matrix.row_stages):
        for x, column in enumerate(matrix.column_stages):
            value = float(matrix.at(row, column))
            dark = math.isfinite(value) and value > middle
            text = f"{value:.3f}" if math.isfinite(value) else "–"
            weight = "bold" if row == column else "normal"
            size = max(4.0, 9.0 - 0.2 * max(0, max(n_columns - 20, n_rows - 25)))
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                fontsize=size,
                weight=weight,
                color="white" if dark else "black",
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font lacks
        figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- MLflow's page


class Ui:
    """A running MLflow page. Leave the ``with`` block, or call ``stop``, to end it."""

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None) -> None:
        self.url, self._process = url, process

    def __enter__(self) -> Ui:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self) -> None:
        """Wait until the page ends, Ctrl-C, a hang-up or SIGTERM, then stop it. Only in the main thread."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        try:
            if self._process is not None:
                self._process.wait()
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def stop(self) -> None:
        """End the server and its workers; they get five seconds to do so themselves."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        self._process = None


def open_ui(uri: str, host: str = "127.0.0.1", port: int = 5000, *, timeout_seconds: float = 120.0) -> Ui:
    """Start MLflow's page on a tracking store and return once it answers; a server's own URI needs no start.

    The page speaks to nobody: telemetry, the model catalogue and MLflow's job runner are off.

    Args:
        uri: tracking URI.
        host: interface to listen on. Anything but this machine's own exposes a service without a password.
        port: port to listen on, 0 for any free one.
        timeout_seconds: how long to wait for the first answer.

    Raises:
        ClbenchError: nothing to show, the port is taken, or the server does not come up.
    """
    if urlsplit(uri).scheme in ("http", "https"):
        return Ui(uri, None)
    database = sqlite_path(uri)
    if database is not None and not database.is_file():
        raise NotFoundError(
            "there is no MLflow database yet",
            where=database,
            mend="run `clbench run` or `clbench mlflow sync` first",
        )
    port = _free_port(host, port)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    if database is not None:
        command += ["--artifacts-destination", artifact_root(database).as_uri()]
    environment = os.environ | _silence() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
        ui = Ui(f"http://{host}:{port}", process)
        try:
            _wait_for_page(host, port, process, timeout_seconds)
        except BaseException as error:
            ui.stop()
            if not isinstance(error, TimeoutError | ChildProcessError):
                raise
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ClbenchError(
                f"MLflow's page did not start: {error}",
                where=_one_line(" ".join(said)),
                mend="try another --port",
            ) from None
    return ui


def _free_port(host: str, port: int) -> int:
    """Return a port that can be listened on, ``port`` itself unless it is 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ClbenchError(
                f"cannot listen: {error}",
                where=f"{host}:{port}",
                mend="choose another --port, or 0 for any free one",
            ) from None
        return int(probe.getsockname()[1])


def _wait_for_page(host: str, port: int, process: subprocess.Popen[bytes], timeout_seconds: float) -> None:
    """Wait until the server answers its health check.

    Raises:
        ChildProcessError: it ended.
        TimeoutError: it did not answer in time.
    """
    from rich.console import Console

    deadline = time.monotonic() + timeout_seconds
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    with Console(stderr=True).status("MLflow's page is starting, about 20 seconds"):
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ChildProcessError(f"it ended with code {process.returncode}")
            connection = http.client.HTTPConnection(target, port, timeout=5)  # direct: no proxy for our own machine
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.25)
    raise TimeoutError(f"no answer for {timeout_seconds:.0f} seconds")
