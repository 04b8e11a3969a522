"""Looks at this machine and says what is there, what is missing and what to do about it.

Nothing is changed: no download, no training, no folder made. The network is asked for one small page and for nothing
when ``CLBENCH_OFFLINE`` is set. What a finding means for a run is left to the commands themselves.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import clbench
from clbench import home
from clbench.errors import ClbenchError

State = Literal["ok", "note", "missing", "broken"]
MIN_PYTHON = (3, 11)
LITTLE_DISK_BYTES = 2_000_000_000
LITTLE_MEMORY_BYTES = 2_000_000_000
TIMEOUT_SECONDS = (3.0, 5.0)
"""To connect, and to wait for an answer: a doctor does not keep anyone waiting."""
PROBED_PROJECT = "pypi-simple"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    group: str
    """Heading it stands under: software, hardware, storage, prepared, reach, extras, checks."""
    name: str
    state: State
    """ok; note: works, but know this; missing: some commands cannot work; broken: nothing can be relied on."""
    found: str
    remedy: str = ""
    """What to do, as an instruction; empty when there is nothing to do."""


def examine() -> list[Finding]:
    """Return the findings, in the order in which people should read them; takes a few seconds.

    A check that fails itself is a finding, too, never a traceback.
    """
    with ThreadPoolExecutor(2) as pool:  # both wait for a network, if there is one
        reach = [pool.submit(_guarded, check) for check in (package_index, model_hub)]
        local = (software, packages, hardware, precision, storage, prepared)
        found = [finding for check in local for finding in _guarded(check)]
        found += [finding for future in reach for finding in future.result()]
        return found + _guarded(extras)


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Return the findings of one check; a mistake or an error in it becomes one of them."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except ClbenchError as error:
        found.append(_finding("checks", check.__name__, "broken", error.what, error.mend or str(error.where or "")))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        found.append(_finding("checks", check.__name__, "broken", text, "report this: the check itself failed"))
    return found


def _finding(group: str, name: str, state: State, found: str, remedy: str = "") -> Finding:
    return Finding(group=group, name=name, state=state, found=found, remedy=remedy)


# --- software


def software() -> Iterator[Finding]:
    """Python and clbench."""
    version = platform.python_version()
    wanted = ".".join(map(str, MIN_PYTHON))
    if sys.version_info >= MIN_PYTHON:
        yield _finding("software", "Python", "ok", version)
    else:
        yield _finding("software", "Python", "broken", version, f"install Python {wanted} or newer")
    try:
        importlib.metadata.version("clbench")
        yield _finding("software", "clbench", "ok", clbench.__version__)
    except importlib.metadata.PackageNotFoundError:
        yield _finding(
            "software",
            "clbench",
            "note",
            f"{clbench.__version__}, run from its source folder",
            "`pip install -e .` there, for the command `clbench` and for plug-ins",
        )


def packages() -> Iterator[Finding]:
    """Required packages against the floors of the project file; only metadata are read, nothing is imported."""
    floors = required_packages()
    wrong = 0
    for name, floor in floors.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong += 1
            yield _finding("software", name, "broken", "not installed", f"pip install '{name}>={floor}'")
            continue
        if _numbers(version) < _numbers(floor):
            wrong += 1
            yield _finding(
                "software", name, "broken", f"{version}, older than {floor}", f"pip install '{name}>={floor}'"
            )
    if not floors:
        yield _finding(
            "software", "packages", "note", "clbench is not installed, its needs are unknown", "pip install -e ."
        )
    elif not wrong:
        yield _finding("software", "packages", "ok", f"all {len(floors)} required packages, none older than its floor")


def required_packages() -> dict[str, str]:
    """Return required package -> lowest version, from the installed metadata or else the project file beside us."""
    try:
        lines = importlib.metadata.requires("clbench") or []
    except importlib.metadata.PackageNotFoundError:
        import tomllib

        project = Path(clbench.__file__).parents[1] / "pyproject.toml"
        if not project.is_file():
            return {}
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = (
        re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\w.]+))?", line.partition(";")[0].strip())
        for line in lines
        if "extra ==" not in line
    )
    return {match[1]: match[2] or "0" for match in found if match is not None}


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version: ``2.13.0+cpu`` is (2, 13, 0); trailing zeros do not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# --- hardware


def hardware() -> Iterator[Finding]:
    """Torch, the CPU, memory and accelerators."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield _finding("hardware", "torch", "ok", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")
    yield _cpu(torch)
    yield _memory()
    if not torch.cuda.is_available():
        if torch.version.cuda:
            yield _finding(
                "hardware",
                "GPU",
                "note",
                "none in reach of this CUDA build",
                "check the driver with nvidia-smi, or ignore this",
            )
        elif Path("/proc/driver/nvidia").exists():
            yield _finding(
                "hardware", "GPU", "note", "there is one, but torch is a CPU build", "install torch's CUDA build"
            )
        else:
            yield _finding("hardware", "GPU", "ok", "none; the small tracks do not need one")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        about = f"{torch.cuda.get_device_name(index)}, {_size(free)} of {_size(total)} free"
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield _finding("hardware", f"cuda:{index}", "ok", about + (", bf16" if bf16 else ", no bf16"))


def _cpu(torch: Any) -> Finding:
    """Name, cores and the vector instructions that torch uses; bf16 pays only where the CPU has it built in."""
    flags = _cpu_flags()
    bf16 = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = _cpu_name()
    capability = torch.backends.cpu.get_cpu_capability()
    about = f"{name}, {usable} of {os.cpu_count()} cores usable, {capability}"
    return _finding(
        "hardware", "CPU", "ok", f"{about}, bf16 by {', '.join(bf16)}" if bf16 else f"{about}, no bf16 instructions"
    )


def _cpuinfo(keys: tuple[str, ...]) -> str:
    """Return the first value of one of these keys in Linux' list of processors, or an empty text."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cpu_name() -> str:
    return _cpuinfo(("model name",)) or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpuinfo(("flags", "Features")).split())


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    about = f"{_size(memory.available)} of {_size(memory.total)} free"
    if memory.available < LITTLE_MEMORY_BYTES:
        return _finding("hardware", "memory", "note", about, "end other programs: a small track needs about 2 GB")
    return _finding("hardware", "memory", "ok", about)


def precision() -> Iterator[Finding]:
    """What was measured about bf16 on this machine, see ``clbench.train.parallel.choose_precision``."""
    from clbench.files import read_json

    path = home.home() / "precision.json"
    if not path.is_file():
        yield _finding("hardware", "precision", "ok", "not measured yet; the first `clbench prepare` does it")
        return
    try:
        for key, record in read_json(path).items():
            seconds = record["seconds_per_step"]
            about = (
                f"bf16 is {record['bf16_gain']:.2f} times as fast ({seconds['fp32']:.3f} s, {seconds['bf16']:.3f} s)"
            )
            yield _finding("hardware", "precision", "ok", f"{record['precision']}: {about} on {key.partition('|')[0]}")
    except (ClbenchError, KeyError, TypeError, AttributeError, ValueError):
        yield _finding(
            "hardware", "precision", "broken", f"{path} cannot be read", "delete the file: it is measured again"
        )


# --- storage


def storage() -> Iterator[Finding]:
    """The cache folder and the working folder: writable, and how much room."""
    cache = home.home()
    chosen = "CLBENCH_HOME" if os.environ.get("CLBENCH_HOME") else "default"
    yield _place("cache folder", cache, f"{cache} ({chosen})", "set CLBENCH_HOME to a folder that you may write")
    yield _place("working folder", Path.cwd(), str(Path.cwd()), "go to a folder that you may write, or use --out")


def _place(name: str, folder: Path, about: str, remedy: str) -> Finding:
    """Say whether a folder, or the parent in which it would be made, can be written, and its free room."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        return _finding("storage", name, "broken", f"{about}: {error.strerror}", remedy)
    about = f"{about}, {_size(free)} free"
    if free < LITTLE_DISK_BYTES:
        return _finding("storage", name, "note", about, f"free some space: {_size(LITTLE_DISK_BYTES)} are comfortable")
    return _finding("storage", name, "ok", about)


# --- what is prepared


def prepared() -> Iterator[Finding]:
    """Each built-in track: its stream and base, or what ``clbench prepare`` would still do; then the cache's parts."""
    from clbench import registry

    for name in registry.track_names():
        try:
            yield _track(name)
        except ClbenchError as error:
            yield _finding("prepared", f"track {name}", "broken", error.what, error.mend or "")
    for name, folder in (
        ("downloads", home.downloads_folder()),
        ("streams", home.streams_folder()),
        ("bases", home.bases_folder()),
        ("cells", home.cells_folder()),
    ):
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        yield _finding("prepared", name, "ok", f"{len(files)} files, {_size(sum(p.stat().st_size for p in files))}")


def _track(name: str) -> Finding:
    from clbench import build, index, registry
    from clbench.stream import Stream

    track = registry.load_track(name)
    source = registry.make_stream_source(track.stream)
    folder = build.stream_folder(source)
    label, prepare = f"track {name}", f"`clbench prepare {name}`"
    if not (folder / "manifest.json").is_file():
        wanted = index.missing(getattr(source, "files", list)())
        n_bytes = sum(file.n_bytes for file in wanted)
        if not wanted:
            return _finding("prepared", label, "missing", "not built; nothing to download", prepare)
        return _finding(
            "prepared", label, "missing", f"{len(wanted)} files to fetch, {_size(n_bytes)}; then built here", prepare
        )
    stream = Stream(folder)
    if track.stream_sha256 not in (None, stream.sha256):
        return _finding(
            "prepared",
            label,
            "broken",
            f"the stream's digest is {stream.sha256[:12]}, not {track.stream_sha256[:12]}",
            f"delete {folder} and run {prepare}",
        )
    if not list(home.bases_folder().glob(f"{name}-*/base.json")):
        return _finding("prepared", label, "missing", "stream built, its base is not made", prepare)
    return _finding("prepared", label, "ok", f"{len(stream.stages())} stages, base made; works without a network")


# --- reach


def package_index() -> Iterator[Finding]:
    """Whether the package index answers: only ``clbench prepare`` needs it."""
    from clbench import index

    if index.is_offline():
        yield _finding(
            "reach", "package index", "note", "CLBENCH_OFFLINE forbids the network", "unset it for `clbench prepare`"
        )
        return
    from pypi_simple import PyPISimple
    from requests import RequestException

    try:
        with PyPISimple() as client:
            client.get_project_page(PROBED_PROJECT, timeout=TIMEOUT_SECONDS)
    except (RequestException, OSError, ValueError) as error:
        yield _finding(
            "reach",
            "package index",
            "note",
            f"does not answer ({type(error).__name__})",
            "only `clbench prepare` needs it: connect, or copy the cache folder from elsewhere",
        )
        return
    yield _finding("reach", "package index", "ok", "answers")


def model_hub() -> Iterator[Finding]:
    """Whether a model hub answers: only hub ids need one."""
    from clbench import index

    remedy = "only hub ids need it; folders of checkpoints do not"
    if index.is_offline() or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield _finding("reach", "model hub", "note", "switched off by CLBENCH_OFFLINE or HF_HUB_OFFLINE", remedy)
        return
    import requests
    from huggingface_hub import constants

    try:
        requests.head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except requests.RequestException as error:
        yield _finding("reach", "model hub", "note", f"does not answer ({type(error).__name__})", remedy)
        return
    yield _finding("reach", "model hub", "ok", "answers")


# --- extras


def extras() -> Iterator[Finding]:
    """MLflow and its database, a browser for the tests of the pages, and a compiler, which nothing needs."""
    yield _mlflow_database(Path("runs") / "mlflow.db")
    if importlib.util.find_spec("playwright") is None and not _browser():
        yield _finding("extras", "browser", "note", "none", "only the tests of the pages want one: `make browser`")
    else:
        yield _finding("extras", "browser", "ok", _browser() or "playwright is installed")
    yield _finding("extras", "compiler", "ok", "not needed: nothing is compiled here")


def _mlflow_database(path: Path) -> Finding:
    """Say whether the database of ./runs can be read; a run never depends on it."""
    if not path.is_file():
        return _finding("extras", "MLflow", "ok", f"no database at {path} yet; the first run makes it")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=2)) as connection:
            (n_runs,) = connection.execute("select count(*) from runs").fetchone()
    except sqlite3.Error as error:
        remedy = f"move {path} away and run `clbench mlflow sync runs`: it is rebuilt from the run folders"
        return _finding("extras", "MLflow", "missing", f"{path} cannot be read ({error})", remedy)
    return _finding(
        "extras", "MLflow", "ok", f"{path}: {n_runs} runs, {_size(path.stat().st_size)}; `clbench ui` shows them"
    )


def _browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), "")


# --- for people


def _size(n_bytes: float) -> str:
    """Return a size in decimal units: 61.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


MARKS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "missing": ("○", "yellow"), "broken": ("✗", "red")}


def show(findings: list[Finding]) -> None:
    """Print the findings as a table, what to do under each, and one line of summary."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    group = ""
    for finding in findings:
        mark, colour = MARKS[finding.state]
        text = Text(finding.found)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style=colour)
        heading = finding.group if finding.group != group else ""
        if heading and group:
            table.add_section()
        group = finding.group
        table.add_row(Text(heading, style="bold"), Text(mark, style=colour), Text(finding.name), text)
    console.print(table)
    console.print(summary(findings), soft_wrap=True)


def summary(findings: list[Finding]) -> str:
    """Return one line: what stands in the way."""
    broken = [finding.name for finding in findings if finding.state == "broken"]
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if broken:
        return f"Broken: {', '.join(broken)}. Mend these first."
    if missing:
        return f"Nothing is broken. Not there yet: {', '.join(missing)}."
    return "Everything is in place."
