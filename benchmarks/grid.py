"""Run a list of methods and seeds on one track, each as a plain ``clbench run``; start it again and it goes on.

    python -m benchmarks.grid --track codedocs-nano --runs runs --jobs 2
    python -m benchmarks.grid --track T.yaml --runs runs --set shares --set anchors --set distillation
    python -m benchmarks.grid --track T.yaml --runs runs --spec sequential --spec "wsd + replay:fraction=1/t"

Without ``--spec`` and ``--set`` it runs the set ``schedules``: every schedule x {no replay, 1/2, 1/t}. Seed 0 of
everything comes first. Every run is a process of one thread with its own log, ``RUNS/logs/TRACK/METHOD-seed-N.log``.
With ``--fork`` runs start from a process that has imported everything, which saves each of them some seconds.
Runs that are done are left alone, unfinished ones go on from their last checkpoint, failed ones are tried again by the
next start. What the runs say is for ``benchmarks.orderings``. A composition is written with `` + `` between methods.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clbench.errors import ClbenchError, ConfigError
from clbench.registry import load_track
from clbench.results.store import find_runs

SCHEDULES = (
    "cyclic-cosine",
    "cosine-ar",
    "constant",
    "rsqrt:reading=cyclic",
    "rsqrt:reading=branch",
    "schedule-free",
    "wsd",
    "wsd-s",
    "infinite:rewarm=true",
)
REPLAYS = ("", "replay", "replay:fraction=1/t")
NEW_SHARES = ("0.995", "0.99", "0.95", "0.9")
"""New text where 0.5, 1, 5 and 10 % are old (Ibrahim et al., arXiv 2403.08763); 0 and 50 % are in ``schedules``."""
SETS: dict[str, tuple[str, ...]] = {
    "schedules": tuple(" + ".join(filter(None, pair)) for pair in ((s, r) for s in SCHEDULES for r in REPLAYS)),
    "shares": tuple(f"cyclic-cosine + replay:fraction={share}" for share in NEW_SHARES),
    "anchors": ("sequential", "frozen"),
    "distillation": ("lwf:scaling=tic_lm", "lwf"),
}
SINGLE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """One run of the grid."""

    spec: str
    seed: int

    @property
    def methods(self) -> tuple[str, ...]:
        """The parts of the composition, as ``--method`` takes them."""
        return parts_of(self.spec)

    @property
    def slug(self) -> str:
        """A file name."""
        return re.sub(r"[^a-z0-9.]+", "-", str(self).lower()).strip("-")

    def words(self, track: str, runs: Path, device: str) -> list[str]:
        """Return the command of this run."""
        methods = [word for method in self.methods for word in ("--method", method)]
        where = ["--out", str(runs), "--device", device, "--mlflow", "none"]
        return ["run", "--track", track, *methods, "--seed", str(self.seed), *where]

    def __str__(self) -> str:
        return f"{self.spec}, seed {self.seed}"


def parts_of(spec: str) -> tuple[str, ...]:
    """Return the methods of ``A + B``; a plus without spaces is part of an option."""
    parts = tuple(part.strip() for part in spec.split(" + "))
    if not all(parts):
        raise ConfigError(f"spec {spec!r} has an empty part", mend='write "METHOD" or "METHOD + METHOD"')
    return parts


def tasks_of(specs: Iterable[str], seeds: Sequence[int]) -> list[Task]:
    """Return the runs in their order: the first seed of every method, then the second."""
    unique = list(dict.fromkeys(" + ".join(parts_of(spec)) for spec in specs))
    return [Task(spec, seed) for seed in seeds for spec in unique]


def methods_of(command: str) -> tuple[str, ...]:
    """Return the methods that a recorded ``clbench run`` was given."""
    words = shlex.split(command)
    return tuple(word for flag, word in itertools.pairwise(words) if flag in ("-m", "--method"))


def done_tasks(folder: Path) -> set[tuple[tuple[str, ...], int]]:
    """Return (methods, seed) of the runs below a folder that are done; broken ones are not."""
    found = set()
    for store in find_runs([folder]) if folder.is_dir() else []:
        try:
            if store.status()["state"] == "done":
                config = store.config()
                found.add((methods_of(str(config.get("command", ""))), int(config["seed"])))
        except ClbenchError:
            continue
    return found


class Forked:
    """A run in a fork of this process, as ``subprocess.Popen`` has it; before it, this process must start no thread."""

    def __init__(self, words: Sequence[str], output: int) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.argv = ["clbench", *words]
                code = run_cli()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        """Wait for its end."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def run_cli() -> int:
    """Run the command line of ``sys.argv`` in this process; returns its exit code."""
    from clbench.cli import main as clbench_main

    try:
        clbench_main()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return 0


def import_all() -> None:
    """Import what every run imports."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    import clbench.run  # noqa: F401

    torch.set_num_threads(1)
    os.environ.update(SINGLE_THREAD)


@dataclass
class Running:
    """A run in progress."""

    task: Task
    process: subprocess.Popen[bytes] | Forked
    log: Path
    file: IO[bytes]
    started: float


@dataclass
class Grid:
    """Keeps ``jobs`` runs going until all are done."""

    track: str
    runs: Path
    logs: Path
    jobs: int
    device: str
    threads: int
    fork: bool = False

    def run(self, tasks: Sequence[Task]) -> list[Task]:
        """Run all tasks; returns those that failed."""
        queue, running, failed = list(tasks), list[Running](), list[Task]()
        begun, n_done = time.monotonic(), 0
        try:
            while queue or running:
                while queue and len(running) < self.jobs:
                    running.append(self.start(queue.pop(0)))
                time.sleep(POLL_SECONDS)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    one.file.close()
                    n_done += 1
                    if one.process.returncode != 0:
                        failed.append(one.task)
                    left = (time.monotonic() - begun) / n_done * (len(queue) + len(running))
                    print(f"[{n_done}/{len(tasks)}] {report(one)}; about {clock(left)} left", flush=True)
        finally:  # killed or interrupted: a run loses the steps since its last checkpoint
            for one in running:
                one.process.terminate()
            for one in running:
                one.process.wait()
                one.file.close()
        return failed

    def start(self, task: Task) -> Running:
        """Start one run."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{task.slug}.log"
        words = task.words(self.track, self.runs, self.device)
        file = log.open("ab")
        if self.fork:
            return Running(task, Forked(words, file.fileno()), log, file, time.monotonic())
        threads = {name: str(self.threads) if value == "1" else value for name, value in SINGLE_THREAD.items()}
        process = subprocess.Popen(
            [sys.executable, "-m", "clbench", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads},
        )
        return Running(task, process, log, file, time.monotonic())


def report(one: Running) -> str:
    """Return what became of a run, with the last line of its log where it failed."""
    seconds = clock(time.monotonic() - one.started)
    if one.process.returncode == 0:
        return f"{one.task}: done in {seconds}"
    lines = one.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    why = lines[-1] if lines else "it said nothing"
    return f"{one.task}: FAILED after {seconds}, exit code {one.process.returncode}: {why} ({one.log})"


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="codedocs-nano", help="name or YAML file")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--spec", action="append", help='a method, or "METHOD + METHOD"; may be given often')
    parser.add_argument("--set", action="append", choices=list(SETS), help="a list of methods; may be given often")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda …")
    parser.add_argument("--list", action="store_true", help="print the commands of what is missing and stop")
    parser.add_argument("--fork", action="store_true", help="start runs from a process that has imported everything")
    arguments = parser.parse_args(words)
    try:
        track = load_track(arguments.track)
        sets = arguments.set or ([] if arguments.spec else ["schedules"])
        specs = [*(spec for name in sets for spec in SETS[name]), *(arguments.spec or [])]
        tasks = tasks_of(specs, arguments.seeds)
        done = done_tasks(arguments.runs / track.name)
    except ClbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missing = [task for task in tasks if (task.methods, task.seed) not in done]
    print(f"{track.name}: {len(tasks)} runs, {len(tasks) - len(missing)} done, {len(missing)} to do", flush=True)
    if arguments.list:
        for task in missing:
            print(shlex.join(["clbench", *task.words(arguments.track, arguments.runs, arguments.device)]))
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    logs = arguments.runs / "logs" / track.name
    if arguments.fork:
        if arguments.threads != 1 or arguments.device != "cpu" or os.environ.get("OMP_NUM_THREADS") != "1":
            print("error: --fork is for CPU runs of one thread; set OMP_NUM_THREADS=1", file=sys.stderr)
            return 2
        import_all()
    jobs = max(1, arguments.jobs)
    grid = Grid(arguments.track, arguments.runs, logs, jobs, arguments.device, arguments.threads, arguments.fork)
    try:
        failed = grid.run(missing)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    for task in failed:
        print(f"failed: {task}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
