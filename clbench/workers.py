"""Runs the tasks of a build: in this process at first and, when there is much to do, in worker processes.

A task and its result are small JSON values; what is large goes through files. A worker is ``python -m
clbench.workers``, fed line by line: no fork (the threads of pyarrow and tokenizers would not survive it), and a
caller's script needs no ``__main__`` guard. Results come in the order of the tasks, whatever the number of workers.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from clbench import errors
from clbench.errors import ClbenchError

GRACE_SECONDS = 2.0
"""Work that is done by then needs no workers: starting one costs about a second."""
MAX_WORKERS = 32
WORKER_MEMORY_BYTES = 700_000_000
"""What one worker may need: documents of 64 MB as Python objects, their tokens, libraries."""

Task = dict[str, Any]


def default_workers() -> int:
    """Return how many processes to use: ``CLBENCH_WORKERS``, or one a core as far as the free memory goes."""
    import psutil

    if (given := os.environ.get("CLBENCH_WORKERS", "")).isdecimal():
        return max(1, int(given))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_memory = int(psutil.virtual_memory().available // WORKER_MEMORY_BYTES)
    return max(1, min(cores, MAX_WORKERS, by_memory))


def run_tasks(
    tasks: Sequence[Task],
    function: Callable[[Task], Any],
    *,
    target: str | None,
    n_workers: int,
    done: Callable[[Task], None] = lambda task: None,
) -> list[Any]:
    """Run every task and return the results in the order of the tasks.

    Args:
        tasks: JSON-able.
        function: runs one task in this process.
        target: ``module:function`` that runs one in another process; None when that cannot be.
        n_workers: processes to use at most.
        done: called after each task, in any order.

    Raises:
        ClbenchError: as the task raised it, or that a worker died.
    """
    results: list[Any] = [None] * len(tasks)
    start, first = time.monotonic(), 0
    alone = target is None or n_workers < 2
    while first < len(tasks) and (alone or time.monotonic() - start < GRACE_SECONDS or first == len(tasks) - 1):
        results[first] = function(tasks[first])
        done(tasks[first])
        first += 1
    if first < len(tasks) and target is not None:
        _Pool(target, tasks, results, first, done).run(min(n_workers, len(tasks) - first))
    return results


class _Pool:
    """Worker processes that share the tasks from ``first`` on; one thread feeds each."""

    def __init__(
        self, target: str, tasks: Sequence[Task], results: list[Any], first: int, done: Callable[[Task], None]
    ) -> None:
        self.target, self.tasks, self.results, self.next, self.done = target, tasks, results, first, done
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.processes: list[subprocess.Popen[str]] = []

    def run(self, n_workers: int) -> None:
        """Run all tasks; end every worker before returning, however it ends."""
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "clbench.workers", self.target]
        threads: list[threading.Thread] = []
        try:
            for _ in range(n_workers):
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
                )
                self.processes.append(process)
                threads.append(threading.Thread(target=self._feed, args=(process,), daemon=True))
                threads[-1].start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # short, so that Ctrl-C is heard
        finally:
            for process in self.processes:
                process.kill()
                process.communicate()
        if self.errors:
            raise self.errors[0]

    def _feed(self, process: subprocess.Popen[str]) -> None:
        while (place := self._take()) is not None:
            try:
                self.results[place] = _ask(process, self.tasks[place])
                with self.lock:
                    self.done(self.tasks[place])
            except BaseException as error:  # the main thread raises the first one
                with self.lock:
                    self.errors.append(error)

    def _take(self) -> int | None:
        with self.lock:
            if self.errors or self.next >= len(self.tasks):
                return None
            self.next += 1
            return self.next - 1


def _ask(process: subprocess.Popen[str], task: Task) -> Any:
    """Have a worker run one task; raise what it raised."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise ClbenchError(
            f"a worker process died (exit code {process.wait()})",
            where=f"task {task.get('do', '')}",
            mend="if memory was short, set CLBENCH_WORKERS=1; then run again: what is done stays done",
        )
    answer = json.loads(line)
    if "error" in answer:
        found = answer["error"]
        kind = getattr(errors, found["type"], ClbenchError)
        raise kind(found["what"], where=found["where"], mend=found["mend"])
    return answer["result"]


def main() -> None:
    """Run tasks from stdin until it ends; one line of JSON answers each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends its workers
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a source prints must not mix with the answers
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while True:
        try:
            answer: dict[str, Any] = {"result": function(json.loads(lines.get()))}
        except ClbenchError as error:
            where = None if error.where is None else str(error.where)
            found = {"type": type(error).__name__, "what": error.what, "where": where, "mend": error.mend}
            answer = {"error": found}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(lines: queue.SimpleQueue[str]) -> None:
    """Pass tasks on; end the process at once when the parent is gone, so that the next build finds nobody writing."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
