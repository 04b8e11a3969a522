"""``clbench health``: what a model can do, what it lost against a baseline, and how sure that is. Torch-free itself.

Suites are measured by ``fanout`` (cached, in parallel), their rows read by ``clbench.results.tasks``, and the page is
written by ``clbench.leaderboard.health_page``. What the words mean: docs/health.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clbench import extras, fanout, pretrained, registry, run_weights
from clbench.build import stream_folder
from clbench.errors import ClbenchError, ConfigError, NotFoundError
from clbench.fanout import TEXT_SUITE, Failure, Job, Outcome, Request, Subject
from clbench.files import read_json
from clbench.results import tasks
from clbench.results.matrix import finite_or_none
from clbench.results.stats import Interval
from clbench.results.store import RunStore, utc_now
from clbench.results.tasks import Change, Fate, Retention, Task

DEFAULT_SUITES = ("general:size=small", "longcontext:lengths=LENGTH,n_items=25")
"""Measured where nothing is named, as far as they are prepared."""
DEFAULT_LENGTHS = (1024, 512)
"""LENGTH is the first of these that all models read."""
ROLES = ("model", "baseline", "base")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured against what."""

    model: str
    """A folder, a hub id, ``model:NAME``, or a run: then its last release."""
    baseline: str | None = None
    """What it is compared with, the same forms; of a run, its base where none is named."""
    base: str | None = None
    """The model before any of it: then every task falls into one of four buckets."""
    suites: tuple[str, ...] = ()
    """Specs; DEFAULT_SUITES where neither suites nor texts are named."""
    texts: tuple[str, ...] = ()
    """Files or folders of the user's own text: its loss is a task."""
    text_column: str = "text"
    stream: str | None = None
    """For suites that need one."""
    n_jobs: int = 1
    devices: tuple[str, ...] = ("auto",)


@dataclass(kw_only=True)
class Health:
    """What was found."""

    options: Options
    scores: Mapping[str, Interval]
    """Of the model, by task."""
    tasks: Mapping[str, Task]
    changes: Sequence[Change] = ()
    """Against the baseline."""
    fates: Sequence[Fate] = ()
    """From base over baseline to model."""
    retention: Retention | None = None
    """Of the baseline's scores."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Suites of the default choice that could not be measured, and why."""
    failures: Sequence[Failure] = ()
    bill: Mapping[str, Any] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)
    made: str = ""
    """UTC ISO-8601."""

    @property
    def damaged(self) -> list[Change]:
        """Tasks that are surely worse than the baseline's."""
        return [one for one in self.changes if one.state == "damaged"]

    @property
    def verdict(self) -> str:
        """One sentence."""
        parts = []
        if self.changes:
            parts.append(tasks.sentence(self.changes))
        elif known := {name: one for name, one in self.tasks.items() if math.isfinite(one.chance)}:
            above = [name for name, one in known.items() if self.scores[name].low > one.chance]
            parts.append(f"above chance on {len(above)} of {len(known)} tasks; no baseline was named")
        else:
            parts.append("no baseline was named")
        if self.failures:
            cells = "1 cell" if len(self.failures) == 1 else f"{len(self.failures)} cells"
            parts.append(f"{cells} could not be measured")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values, NaN as None."""
        options = asdict(self.options)
        return {
            "models": {role: options[role] for role in ROLES},
            "verdict": self.verdict,
            "damaged": [one.task for one in self.damaged],
            "tasks": {name: self._task_dict(name) for name in self.scores},
            "effects": {
                name: {"value": finite_or_none(one.value), "reason": one.reason}
                for name, one in (tasks.effects(self.changes) if self.changes else {}).items()
            },
            "retention": None if self.retention is None else self.retention.as_dict(),
            "buckets": {one.task: {"first": one.first, "bucket": one.bucket, "undone": finite_or_none(one.undone),
                                   "p_holm": finite_or_none(one.p_holm)} for one in self.fates},
            "bucket_rates": {name: list(pair) for name, pair in tasks.rates(self.fates).items()} if self.fates else {},
            "skipped": dict(self.skipped),
            "failures": [str(one) for one in self.failures],
            "bill": dict(self.bill),
            "licences": dict(self.licences),
            "made": self.made,
        }  # fmt: skip

    def _task_dict(self, name: str) -> dict[str, Any]:
        task, found = self.tasks[name], {}
        if (change := next((one for one in self.changes if one.task == name), None)) is not None:
            found = {
                "baseline": tasks.interval_dict(change.before),
                "difference": tasks.interval_dict(change.difference.interval),
                "standard_error": finite_or_none(change.difference.error),
                "p": finite_or_none(change.difference.interval.p),
                "p_holm": finite_or_none(change.p_holm),
                "test": change.difference.test,
                "effect_over_items": finite_or_none(change.difference.effect),
                "n_left_out": change.difference.n_left_out,
                "state": change.state,
            }
        return {
            "metric": task.metric,
            "unit": task.unit,
            "better": task.direction,
            "chance": finite_or_none(task.chance),
            "score": tasks.interval_dict(self.scores[name]),
            **found,
        }


def examine(options: Options) -> Health:
    """Measure the models and compare them.

    Raises:
        NotFoundError, IntegrityError: a model, a text or a named suite is not there, not prepared or damaged.
        ConfigError: nothing that could be measured.
    """
    subjects = _subjects(options)
    requests, skipped = choose(options, least_positions(subjects.values()))
    jobs = [Job(subject=subject, requests=tuple(requests)) for subject in subjects.values()]
    outcome = fanout.measure(jobs, n_jobs=options.n_jobs, devices=options.devices)
    found = {role: _tasks(outcome, j, requests) for j, role in enumerate(subjects)}
    licences: dict[str, str] = {}
    for request in requests:
        licences |= request.open().licences()
    health = Health(
        options=options,
        scores={name: tasks.score_of(task) for name, task in found["model"].items()},
        tasks=found["model"],
        skipped=skipped,
        failures=outcome.failures,
        bill=_bill(outcome, requests, list(subjects)),
        licences=licences,
        made=utc_now(),
    )
    if "baseline" in found:
        health.changes = tasks.changes(found["baseline"], found["model"])
        health.retention = tasks.retention(found["baseline"], found["model"])
    if "base" in found:
        health.fates = tasks.buckets(found["base"], found["baseline"], found["model"])
    return health


def _subjects(options: Options) -> dict[str, Subject]:
    """Return the models by role, before anything is measured.

    Raises:
        ConfigError: a base without a baseline.
    """
    if options.base is not None and options.baseline is None:
        raise ConfigError("--base needs --baseline", mend="name the model before the remedy as the baseline")
    found = {"model": find_model(options.model)}
    if options.baseline is not None:
        found["baseline"] = find_model(options.baseline)
    elif (store := _run(options.model)) is not None and store.stages_done()[0] == run_weights.BASE:
        found["baseline"] = extras.subject_of(store, run_weights.BASE)
    if options.base is not None:
        found["base"] = find_model(options.base)
    return found


def _run(text: str) -> RunStore | None:
    """Return the run that a text names, None where it is a model."""
    if not (Path(text) / "run.yaml").is_file():
        return None
    store = RunStore.open(Path(text))
    if not store.stages_done():
        raise ConfigError("this run has no complete row yet", where=text, mend="wait for it, or name a model")
    return store


def find_model(text: str) -> Subject:
    """Return the checkpoint that a text names: a folder, a hub id, ``model:NAME``, or a run's last release.

    Raises:
        NotFoundError: there is none.
        IntegrityError: the folder holds no weights, or cut-off ones.
    """
    from clbench.train.models import check_checkpoint

    if text.startswith(pretrained.PREFIX):
        return Subject(label=text, path=str(pretrained.open_model(text.removeprefix(pretrained.PREFIX)).folder))
    if (store := _run(text)) is not None:
        return extras.subject_of(store, store.stages_done()[-1])
    check_checkpoint(text)
    return Subject(label=text, path=text, weights_sha256=_release_digest(Path(text)))


def _release_digest(folder: Path) -> str:
    """Return the digest that a run notes of a release folder, so that what is measured need not be loaded."""
    folder = folder.resolve()
    stage = folder.name.removeprefix("stage-")
    if folder.parent.name != "release" or not stage.isdecimal():
        return ""
    store = RunStore(folder.parents[1])
    return store.stage_record(int(stage))["weights_sha256"] if int(stage) in store.stages_done() else ""


def least_positions(subjects: Iterable[Subject]) -> int | None:
    """Return how many tokens the model with the fewest positions reads, None where no configuration says."""
    found = []
    for subject in subjects:
        path = Path(subject.path) / "config.json"
        config = read_json(path) if path.is_file() else {}
        has = {**config, **(config.get("text_config") or {})}.get("max_position_embeddings")
        found += [has] if isinstance(has, int) else []
    return min(found, default=None)


def choose(options: Options, n_positions: int | None = None) -> tuple[list[Request], dict[str, str]]:
    """Return what is asked, and which suites of the default choice are left out, and why.

    Args:
        options: what was named.
        n_positions: tokens that all models read; None: not known.

    Raises:
        NotFoundError, ConfigError: a suite or text that was named cannot be measured, or nothing is left.
    """
    stream = ""
    if options.stream is not None:
        folder = stream_folder(registry.make_stream_source(options.stream))
        if not (folder / "manifest.json").is_file():
            mend = f"run `clbench prepare {options.stream}`"
            raise NotFoundError(f"stream {options.stream!r} is not built", where=folder, mend=mend)
        stream = str(folder)
    requests, skipped = [], dict[str, str]()
    for spec in options.suites:
        cls, _ = registry.suite_class(spec)
        if cls.needs_stream and not stream:
            raise ConfigError(f"suite {spec!r} measures on a stream", mend="add --stream NAME")
        requests.append(_checked(Request(spec=spec, stream=stream if cls.needs_stream else "")))
    for place in options.texts:
        requests.append(_checked(Request(spec=TEXT_SUITE, text=place, column=options.text_column)))
    if not options.suites and not options.texts:
        length = next((n for n in DEFAULT_LENGTHS if n_positions is None or n <= n_positions), None)
        for spec in DEFAULT_SUITES:
            if "LENGTH" in spec and length is None:
                least = min(DEFAULT_LENGTHS)
                skipped[spec.partition(":")[0]] = f"a model reads {n_positions} tokens, it begins with {least} here"
                continue
            try:
                requests.append(_checked(Request(spec=spec.replace("LENGTH", str(length)))))
            except ClbenchError as error:
                skipped[spec] = str(error)
    if not requests:
        why = "; ".join(f"{spec}: {reason}" for spec, reason in skipped.items())
        raise ConfigError(f"no suite can be measured: {why}", mend="prepare one, or give --text FILE")
    if len(set(requests)) < len(requests):
        raise ConfigError("a suite or a text is named twice", mend="name each once")
    return requests, skipped


def _checked(request: Request) -> Request:
    """Return a request whose suite can be made and knows what it measures on: it is prepared."""
    suite = request.open()
    for shard in suite.shards():
        suite.shard_sha256(shard)
    return request


def _tasks(outcome: Outcome, job: int, requests: Sequence[Request]) -> dict[str, Task]:
    """Return the tasks of one model; shards that failed are not among them."""
    found = {}
    for r, request in enumerate(requests):
        title = Path(request.text).name if request.text else request.spec.partition(":")[0]
        by_task: dict[str, Task] = {}
        for cell in outcome.shards.get((job, r), {}).values():
            by_task |= tasks.tasks_of(cell.rows, name=title)
        found[request.text or request.spec] = by_task
    return tasks.together(found)


def _bill(outcome: Outcome, requests: Sequence[Request], roles: Sequence[str]) -> dict[str, Any]:
    """Return what measuring cost: of the cells, whenever they were made, and of this call."""
    by_role: dict[str, dict[str, float]] = {}
    for j, role in enumerate(roles):
        cells = [cell for r in range(len(requests)) for cell in outcome.shards.get((j, r), {}).values()]
        by_role[role] = {
            "seconds": sum(cell.seconds for cell in cells),
            "flops": sum(cell.flops for cell in cells),
            "rows": sum(cell.rows.num_rows for cell in cells),
        }
    return {
        "models": by_role,
        "cells_measured": outcome.n_measured,
        "cells_cached": outcome.n_cached,
        "seconds_now": outcome.seconds,
    }
