"""Cells of many checkpoints under many suites, over processes or devices: resumable, and nothing is measured twice.

A task names a checkpoint's path, a suite and a shard. Whoever takes it loads the model there and keeps it while shards
of that checkpoint are left; what it measures lies in the cache (``clbench.cells``), so a kill loses one cell. A cell
that fails is named and the rest goes on. Processes are ``clbench.workers``, fed one task at a time by a thread each.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench import cells, console, registry
from clbench.cells import Cell
from clbench.errors import BusyError, ClbenchError, ConfigError, IntegrityError
from clbench.files import sha256_file
from clbench.suite import Checkpoint, Reference, Suite

if TYPE_CHECKING:
    import torch

    from clbench.stream import Stream

TARGET = "clbench.fanout:run_task"
MAX_ATTEMPTS = 2
"""A cell that ended so many workers is given up."""
TEXT_BYTES = 100_000
"""Of a user's own text, as many as are measured."""
TEXT_SUITE = "heldout"
"""Measures losses of documents."""


# --- what is measured


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint: where it lies, and how messages call it."""

    label: str
    path: str
    """A folder or a hub id."""
    weights_sha256: str = ""
    """What it has to be; empty where nobody knows yet."""
    base: str = ""
    """Where the weights lie that the run began with, for suites that compare; empty: not at hand."""
    previous: str = ""
    """The same of what was released a stage earlier."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A suite, and what it reads besides its own files."""

    spec: str
    stream: str = ""
    """Folder of a built stream."""
    text: str = ""
    """A user's text in the place of a stream: a file or a folder, see ``clbench.merge.evaluate.read_text``."""
    column: str = "text"

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.spec} of {self.text}" if self.text else self.spec

    def open(self) -> Suite:
        """Return the suite.

        Raises:
            NotFoundError: no such suite, stream or text, or the suite was not prepared.
            ConfigError: an option that is wrong, or a suite that needs a stream and has none.
        """
        return registry.make_suite(self.spec, self._stream())

    def _stream(self) -> Stream | None:
        from clbench.stream import Stream

        if self.text:
            return user_text(self.text, self.column)
        return Stream(Path(self.stream)) if self.stream else None


def user_text(place: str, column: str = "text", *, n_bytes: int = TEXT_BYTES) -> Stream:
    """Return documents of a user's text as a stream of one stage: whole ones, drawn by their ids, about so many bytes.

    Raises:
        NotFoundError, ConfigError, IntegrityError: as ``read_text``.
    """
    from clbench.merge.evaluate import MIN_DOCUMENTS, Text, TextStream, read_text

    found = read_text(place, "general", column=column)
    order = sorted(range(len(found.ids)), key=lambda i: hashlib.sha256(found.ids[i].encode()).digest())
    chosen, total = list[int](), 0
    for at in order:
        if total >= n_bytes and len(chosen) >= MIN_DOCUMENTS:
            break
        chosen.append(at)
        total += len(found.documents[at].encode())
    chosen.sort()
    return TextStream(
        Text(
            name=Path(place).name,
            ids=[found.ids[i] for i in chosen],
            documents=[found.documents[i] for i in chosen],
            n_found=found.n_found,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint and all that is asked of it."""

    subject: Subject
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured."""

    subject: str
    request: str
    shard: str
    why: str

    def __str__(self) -> str:
        part = f" · {self.shard}" if self.shard else ""
        return f"{self.subject} · {self.request}{part}: {self.why}"


def told(failures: Iterable[Failure]) -> list[str]:
    """Return a line a failure, and one for all cells of a checkpoint and a suite that failed for the same reason."""
    alike: dict[Failure, list[str]] = {}
    for one in failures:
        alike.setdefault(replace(one, shard=""), []).append(one.shard)
    return [str(replace(one, shard=", ".join(filter(None, shards)))) for one, shards in alike.items()]


@dataclass
class Outcome:
    """What came of it, by (place of the job, place of its request)."""

    shards: dict[tuple[int, int], dict[str, Cell]] = field(default_factory=dict)
    """Cells by shard, in the suite's order."""
    wanted: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    """All shards that there are."""
    weights_sha256: dict[int, str] = field(default_factory=dict)
    """Digests of the checkpoints that were loaded, by job."""
    failures: list[Failure] = field(default_factory=list)
    n_measured: int = 0
    n_cached: int = 0
    seconds: float = 0.0
    """On the clock, loading included."""

    def cell(self, job: int, request: int) -> Cell | None:
        """Return all shards of a suite as one, None where one of them failed."""
        found, wanted = self.shards.get((job, request), {}), self.wanted[job, request]
        return cells.joined([found[shard] for shard in wanted]) if set(wanted) <= set(found) else None


# --- one process


class Bench:
    """Measures tasks in this process; holds one model, and every suite that it was asked for."""

    def __init__(self, device: str = "auto") -> None:
        self.device_name = device
        self._suites: dict[Request, Suite] = {}
        self._held: tuple[str, torch.nn.Module, str] | None = None
        self._tokenizers: dict[str, tuple[Any, str]] = {}
        self._digests: dict[str, str] = {}

    def suite(self, request: Request) -> Suite:
        """Return a suite, made once: it keeps what it read."""
        if request not in self._suites:
            self._suites[request] = request.open()
        return self._suites[request]

    def tokenizer(self, suite: Suite, path: str) -> tuple[Any, str]:
        """Return (tokenizer, digest) that a suite reads a checkpoint with; (None, "") for the stream's own tokens.

        Raises:
            ConfigError: there is no tokenizer beside the checkpoint.
        """
        from clbench.train.models import load_tokenizer

        if suite.needs_stream and is_streams_own(path, suite.stream):
            return None, ""
        if path not in self._tokenizers:
            self._tokenizers[path] = load_tokenizer(path)
        return self._tokenizers[path]

    def peek(self, subject: Subject, request: Request, shard: str) -> Cell | None:
        """Return a cell that is made already, without loading the model; None where nobody knows."""
        if not subject.weights_sha256:
            return None
        suite = self.suite(request)
        if suite.compares:  # what it is compared with has to be loaded to know its digest
            return None
        digest = self.tokenizer(suite, subject.path)[1]
        return cells.stored(
            cells.address(suite, weights_sha256=subject.weights_sha256, tokenizer_sha256=digest, shard=shard)
        )

    def reference(self, suite: Suite, path: str) -> Reference | None:
        """Return other weights for a suite that compares; None where it does not, or where there are none."""
        from clbench.train.models import load_model, weights_sha256

        if not (suite.compares and path):
            return None
        if path not in self._digests:
            self._digests[path] = weights_sha256(load_model(path))
        return Reference(weights_sha256=self._digests[path], load=partial(load_model, path))

    def measure(self, subject: Subject, request: Request, shard: str, *, wait: bool) -> tuple[Cell, str]:
        """Return (cell, digest of the weights), from the cache or measured now.

        Raises:
            BusyError: another process measures it, and ``wait`` is False.
            IntegrityError: the checkpoint is damaged, or not the one that was meant.
            ClbenchError: whatever the suite says.
        """
        from clbench.train.parallel import find_device

        if (found := self.peek(subject, request, shard)) is not None:
            return found, subject.weights_sha256
        suite, device = self.suite(request), find_device(self.device_name)
        tokenizer, tokenizer_sha256 = self.tokenizer(suite, subject.path)
        model, digest = self._model(subject.path, device)
        if subject.weights_sha256 not in ("", digest):
            raise IntegrityError(
                "these are not the weights that the run measured",
                where=subject.path,
                mend="run the command in run.yaml again",
            )
        checkpoint = Checkpoint(
            model=model,
            weights_sha256=digest,
            device=device,
            autocast_dtype=None,
            tokenizer=tokenizer,
            tokenizer_sha256=tokenizer_sha256,
            base=self.reference(suite, subject.base),
            previous=self.reference(suite, subject.previous),
        )
        return cells.measure_shard(suite, checkpoint, shard, wait=wait), digest

    def _model(self, path: str, device: torch.device) -> tuple[torch.nn.Module, str]:
        from clbench.train.models import load_model, weights_sha256

        if self._held is None or self._held[0] != path:
            self._held = None  # one model in memory at a time
            model = load_model(path)
            digest = weights_sha256(model)
            self._held = (path, model.to(device).eval(), digest)
        return self._held[1], self._held[2]

    def answer(self, subject: Subject, request: Request, shard: str, *, wait: bool) -> dict[str, Any]:
        """Return what ``measure`` did as JSON-able values; whatever goes wrong becomes ``failed``."""
        try:
            cell, digest = self.measure(subject, request, shard, wait=wait)
        except BusyError:
            return {"busy": True}
        except ClbenchError as error:
            return {"failed": str(error), "broken": False}
        except Exception as error:  # a suite's defect, or a device's: it costs this cell, not the others
            lines = str(error).strip().splitlines() or [""]
            return {"failed": f"{type(error).__name__}: {lines[0]}", "broken": True}
        return {"address": cell.address, "cached": cell.cached, "weights_sha256": digest}


def is_streams_own(path: str, stream: Stream) -> bool:
    """Return whether a checkpoint has the tokenizer that its stream was packed with."""
    own, theirs = stream.folder / "tokenizer" / "tokenizer.json", Path(path) / "tokenizer.json"
    return own.is_file() and theirs.is_file() and sha256_file(theirs) == sha256_file(own)


@cache
def _bench(device: str) -> Bench:
    """Return the bench of a worker process."""
    if device == "cpu":
        import torch

        torch.set_num_threads(1)
    return Bench(device)


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task in a worker process (``clbench.workers``)."""
    subject, request = Subject(**task["subject"]), Request(**task["request"])
    return _bench(task["device"]).answer(subject, request, task["shard"], wait=task["wait"])


# --- all of them


@dataclass(frozen=True, kw_only=True)
class _Task:
    job: int
    request: int
    shard: str
    wait: bool = False
    n_deaths: int = 0


Tell = Callable[[int, int, str], None]
"""Told (cells done, cells in all, what was done) after every cell."""


def measure(jobs: Sequence[Job], *, n_jobs: int = 1, devices: Sequence[str] = ("auto",)) -> Outcome:
    """Measure every shard of every suite on every checkpoint.

    Args:
        jobs: checkpoints and what is asked of them, in this order.
        n_jobs: worker processes; 1 measures in this one. On the CPU each worker has one thread.
        devices: workers take them in turn.

    Returns:
        cells and failures; a cell that failed stops nothing else.

    Raises:
        NotFoundError, ConfigError: a suite cannot be made, before anything is measured.
        KeyboardInterrupt: all workers are ended; what they had finished stays in the cache.
    """
    start = time.perf_counter()
    run = _Run(jobs, Bench(devices[0]))
    if run.queue.n_left:
        with console.counting_bar("cells", run.n_tasks, run.n_tasks - run.queue.n_left) as run.tell:
            if n_jobs == 1 and len(devices) == 1:
                run.here()
            else:
                run.spread(max(1, min(n_jobs, run.queue.n_left)), devices)
    run.outcome.seconds = time.perf_counter() - start
    return run.outcome


class _Queue:
    """Tasks by job. A worker stays with its job while it has tasks, then takes the job that fewest others work on."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self.lock = threading.Lock()
        self.by_job: dict[int, deque[_Task]] = {}
        for task in tasks:
            self.by_job.setdefault(task.job, deque()).append(task)
        self.workers: dict[int, int] = {}

    @property
    def n_left(self) -> int:
        return sum(map(len, self.by_job.values()))

    def take(self, current: int | None) -> _Task | None:
        with self.lock:
            open_ = [job for job, tasks in self.by_job.items() if tasks]
            if not open_:
                return None
            job = current
            if job not in open_:
                if current is not None:
                    self.workers[current] -= 1
                job = min(open_, key=lambda one: (self.workers.get(one, 0), -len(self.by_job[one]), one))
                self.workers[job] = self.workers.get(job, 0) + 1
            assert job is not None
            return self.by_job[job].popleft()

    def put_back(self, task: _Task) -> None:
        with self.lock:
            self.by_job[task.job].append(task)


class _Run:
    """One call of ``measure``: the queue, and what came of it so far."""

    def __init__(self, jobs: Sequence[Job], bench: Bench) -> None:
        self.jobs, self.bench, self.outcome = jobs, bench, Outcome()
        self.lock = threading.Lock()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.stopped = False
        self.tell: Tell = lambda done, total, text: None
        tasks, self.n_tasks, self.n_done = [], 0, 0
        for j, job in enumerate(jobs):
            for r, request in enumerate(job.requests):
                shards = tuple(bench.suite(request).shards())
                self.outcome.wanted[j, r] = shards
                self.n_tasks += len(shards)
                for shard in shards:
                    task = _Task(job=j, request=r, shard=shard)
                    if not self._is_made(task):
                        tasks.append(task)
        self.queue = _Queue(tasks)

    def _is_made(self, task: _Task) -> bool:
        """Take a cell from the cache where its address is known; what is wrong comes to light when it is measured."""
        job = self.jobs[task.job]
        try:
            found = self.bench.peek(job.subject, job.requests[task.request], task.shard)
        except ClbenchError:
            return False
        if found is not None:
            self._keep(task, found)
        return found is not None

    def _keep(self, task: _Task, cell: Cell) -> None:
        self.outcome.shards.setdefault((task.job, task.request), {})[task.shard] = cell
        self.outcome.n_cached += cell.cached
        self.outcome.n_measured += not cell.cached
        self.n_done += 1

    def here(self) -> None:
        """Measure in this process."""
        current = None
        while (task := self.queue.take(current)) is not None:
            current, job = task.job, self.jobs[task.job]
            self.settle(task, self.bench.answer(job.subject, job.requests[task.request], task.shard, wait=task.wait))

    def settle(self, task: _Task, answer: dict[str, Any] | None) -> None:
        """Note what a task answered; None: the worker died."""
        if answer is None and task.n_deaths + 1 < MAX_ATTEMPTS:
            self.queue.put_back(replace(task, n_deaths=task.n_deaths + 1))
            return
        if answer is not None and answer.get("busy"):
            self.queue.put_back(replace(task, wait=True))  # when all else is done
            return
        job = self.jobs[task.job]
        request = job.requests[task.request]
        answer = answer or {"failed": f"its worker process died {MAX_ATTEMPTS} times; memory may be short"}
        with self.lock:
            cell = cells.stored(answer["address"]) if "address" in answer else None
            if cell is None:
                why = answer.get("failed", "its cell cannot be read again")
                failure = Failure(job.subject.label, request.label, task.shard, why)
                self.outcome.failures.append(failure)
                self.n_done += 1
                text = f"failed: {failure}"
            else:
                self.outcome.weights_sha256[task.job] = answer["weights_sha256"]
                self._keep(task, replace(cell, cached=answer["cached"]))
                text = " · ".join(part for part in (job.subject.label, request.label, task.shard) if part)
            self.tell(self.n_done, self.n_tasks, text)

    # workers

    def spread(self, n_workers: int, devices: Sequence[str]) -> None:
        """Measure in worker processes; end every one of them before returning, however it ends."""
        threads = [
            threading.Thread(target=self._serve, args=(number, devices[number % len(devices)]), daemon=True)
            for number in range(n_workers)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # short, so that Ctrl-C is heard
        finally:
            self.stopped = True
            for process in list(self.processes.values()):
                _end(process)

    def _serve(self, number: int, device: str) -> None:
        """Feed one worker, and its successors where it dies."""
        current = None
        while not self.stopped and (task := self.queue.take(current)) is not None:
            current = task.job
            answer = self._ask(number, device, task)
            if self.stopped:
                return
            # A device that failed once fails at everything from then on.
            if answer is None or (answer.get("broken") and device.startswith("cuda")):
                _end(self.processes.pop(number))
            self.settle(task, answer)

    def _ask(self, number: int, device: str, task: _Task) -> dict[str, Any] | None:
        """Have a worker run one task; None where it died."""
        if number not in self.processes:
            self.processes[number] = _start(device)
        process, job = self.processes[number], self.jobs[task.job]
        assert process.stdin is not None and process.stdout is not None
        message = {
            "subject": asdict(job.subject),
            "request": asdict(job.requests[task.request]),
            "shard": task.shard,
            "wait": task.wait,
            "device": device,
        }
        line = ""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer["result"] if "result" in answer else {"failed": answer["error"]["what"], "broken": True}


def _start(device: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "clbench.workers", TARGET]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def devices_of(text: str | None, *, fallback: str = "auto") -> list[str]:
    """Return the devices of ``cuda:0,cuda:1``, resolved on this machine.

    Raises:
        ConfigError: no such device.
    """
    from clbench.train.parallel import find_device

    names = [name.strip() for name in (text or fallback).split(",")]
    if not all(names):
        raise ConfigError(f"{text!r} names no devices", where="--devices", mend="write cuda:0,cuda:1")
    return [str(find_device(name)) for name in names]
