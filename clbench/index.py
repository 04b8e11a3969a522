"""Files of the Python package index, pinned by sha256: fetched once, checked, never half there.

A file stands under its final name only when it is complete and its digest is right, so whatever is there is
never fetched again. What is in the files is left to ``clbench.archive``.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from clbench import home
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError, OfflineError
from clbench.files import atomic_path, exclusive, remove_leftovers, sha256_file

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage, PyPISimple
    from requests import HTTPError
    from rich.progress import Progress, TaskID

N_THREADS = 4
RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Pauses between attempts; there is one attempt more than there are pauses."""
MAX_RETRY_AFTER_SECONDS = 30.0
TIMEOUT_SECONDS = (6.0, 60.0)
"""To connect, and between two pieces of an answer."""
LOCK_TIMEOUT_SECONDS = 1800.0
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """One file of the index: what it is called and which bytes it must have.

    Raises:
        ConfigError: a name with a folder in it, a digest that is none, or a size below 1.
    """

    project: str
    filename: str
    sha256: str
    n_bytes: int

    def __post_init__(self) -> None:
        wrong = None
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+!-]*", self.filename):
            wrong = "this is not a plain file name"
        elif not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            wrong = "sha256 has to be 64 hexadecimal digits"
        elif self.n_bytes < 1:
            wrong = "n_bytes has to be at least 1"
        if wrong:
            raise ConfigError(wrong, where=self.filename, mend="mend the manifest")


def is_offline() -> bool:
    """Return whether ``CLBENCH_OFFLINE`` forbids the network."""
    return os.environ.get("CLBENCH_OFFLINE", "").strip().lower() not in ("", "0", "false", "no")


def missing(files: Sequence[PinnedFile], folder: Path | None = None) -> list[PinnedFile]:
    """Return those of ``files`` that are not complete in ``folder``, by default the downloads folder."""
    folder = folder or home.downloads_folder()
    return [file for file in files if not _is_complete(file, folder / file.filename)]


def fetch(
    files: Sequence[PinnedFile],
    *,
    folder: Path | None = None,
    endpoint: str | None = None,
    retry_delays_seconds: Sequence[float] = RETRY_DELAYS_SECONDS,
) -> dict[str, Path]:
    """Bring ``files`` into ``folder`` and return the path of each by file name.

    Args:
        files: what has to be there; files that are there already are only checked.
        folder: where to; the downloads folder of ``CLBENCH_HOME`` by default.
        endpoint: base address of a simple repository (PEP 503 or 691); that of ``pypi-simple`` by default.
        retry_delays_seconds: pauses before the second, third, … attempt at one request.

    Raises:
        OfflineError: something is missing, and the index does not answer or ``CLBENCH_OFFLINE`` is set.
        IntegrityError: the index has other bytes than the manifest says.
        NotFoundError: the index does not have the file.
    """
    folder = folder or home.downloads_folder()
    if wanted := missing(files, folder):
        _forbid_if_offline(wanted, folder)
        with exclusive(folder, mend="wait until the other download ends", timeout_seconds=LOCK_TIMEOUT_SECONDS):
            remove_leftovers(folder)
            wanted = missing(wanted, folder)  # another process may have fetched them while this one waited
            _fetch_all(wanted, folder, endpoint, tuple(retry_delays_seconds))
    return {file.filename: folder / file.filename for file in files}


def _is_complete(file: PinnedFile, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == file.n_bytes and sha256_file(path) == file.sha256


def _forbid_if_offline(wanted: Sequence[PinnedFile], folder: Path) -> None:
    if is_offline():
        raise OfflineError(
            f"{len(wanted)} file(s), {sum(f.n_bytes for f in wanted) / 1e6:.1f} MB, have to be fetched "
            "and CLBENCH_OFFLINE forbids the network",
            where=_names(wanted),
            mend=f"unset CLBENCH_OFFLINE and run `clbench prepare`, {_or_copy(folder)}",
        )


def _names(files: Sequence[PinnedFile]) -> str:
    return ", ".join(file.filename for file in files[:3]) + (", …" if len(files) > 3 else "")


def _or_copy(folder: Path) -> str:
    return f"or copy them into {folder} from a machine that has them"


def _fetch_all(files: Sequence[PinnedFile], folder: Path, endpoint: str | None, delays: tuple[float, ...]) -> None:
    """Fetch several projects' files at the same time; the first error stops the others and is raised."""
    by_project: dict[str, list[PinnedFile]] = {}
    for file in files:
        by_project.setdefault(file.project, []).append(file)
    with _progress_bar() as progress, ThreadPoolExecutor(N_THREADS) as pool:
        task = progress.add_task("fetching", total=sum(file.n_bytes for file in files))
        fetcher = _Fetcher(folder, endpoint, delays, threading.Event(), progress, task)
        futures = [pool.submit(fetcher.fetch_project, name, group) for name, group in by_project.items()]
        try:
            errors = [future.exception() for future in futures]
        except BaseException:  # Ctrl-C: let the threads end soon
            fetcher.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    causes = [error for error in errors if error is not None]
    if causes:
        raise next((error for error in causes if not isinstance(error, _Stopped)), causes[0])


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class _Truncated(Exception):
    """The connection ended before all bytes had come."""


class _Stopped(Exception):
    """Another download failed, or the user pressed Ctrl-C."""


@dataclass(frozen=True)
class _Fetcher:
    """Downloads one project's files at a time; each thread has a connection of its own."""

    folder: Path
    endpoint: str | None
    delays: tuple[float, ...]
    stop: threading.Event
    progress: Progress
    task: TaskID

    def fetch_project(self, project: str, files: Sequence[PinnedFile]) -> None:
        """Look the project up once and download its files; stop the other threads on an error."""
        from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple

        try:
            with PyPISimple(self.endpoint or PYPI_SIMPLE_ENDPOINT) as client:
                packages = self.patiently(files, lambda: _look_up(client, project))
                for file in files:
                    if file.filename not in packages:
                        raise _not_there(file)
                    self.fetch_file(client, packages[file.filename], file)
        except BaseException:
            self.stop.set()
            raise

    def fetch_file(self, client: PyPISimple, package: DistributionPackage, file: PinnedFile) -> None:
        """Download one file, as often as it takes."""
        self.patiently([file], lambda: self._download(client, package, file))

    def _download(self, client: PyPISimple, package: DistributionPackage, file: PinnedFile) -> None:
        """Download one file under a temporary name, check it, then give it its name."""
        with atomic_path(self.folder / file.filename) as temporary, _Meter(self, file) as meter:
            client.download_package(
                package,
                temporary,
                verify=False,  # the manifest's digest decides, not the page's
                keep_on_error=True,  # atomic_path removes it
                progress=lambda _n_bytes: meter,
                timeout=TIMEOUT_SECONDS,
                headers={"Accept-Encoding": "identity"},
            )
            if meter.n_bytes < file.n_bytes:
                raise _Truncated(f"{meter.n_bytes} of {file.n_bytes} bytes came")
            if (found := sha256_file(temporary)) != file.sha256:
                raise _wrong_bytes(file, f"its sha256 is {found[:16]}…, not {file.sha256[:16]}…")

    def patiently(self, files: Sequence[PinnedFile], action: Callable[[], T]) -> T:
        """Return what ``action`` returns; try again after a pause as long as only the network is to blame."""
        from pypi_simple import NoSuchProjectError, UnsupportedContentTypeError
        from requests import HTTPError, RequestException

        for pause_seconds in (*self.delays, None):
            if self.stop.is_set():
                raise _Stopped
            try:
                return action()
            except NoSuchProjectError:
                raise _not_there(files[0]) from None
            except HTTPError as error:
                status = -1 if error.response is None else error.response.status_code
                if status in (404, 410):
                    raise _not_there(files[0]) from error
                if pause_seconds is None or status not in RETRIED_STATUSES:
                    raise self._no_answer(files, f"answered with status {status}") from error
                pause_seconds = max(pause_seconds, _retry_after_seconds(error))
            except (RequestException, _Truncated, UnsupportedContentTypeError) as error:
                if pause_seconds is None:
                    raise self._no_answer(files, f"did not answer ({_brief(error)})") from error
            if self.stop.wait(pause_seconds):
                raise _Stopped
        raise AssertionError("the last attempt returns or raises")

    def _no_answer(self, files: Sequence[PinnedFile], what: str) -> OfflineError:
        return OfflineError(
            f"the package index {what}",
            where=_names(files),
            mend=f"run again with a network, {_or_copy(self.folder)}",
        )


class _Meter:
    """Counts the bytes of one download; ends it when too many come or when another download failed.

    It is entered twice, by us and by ``pypi_simple``; only our exit decides whether the bytes count.
    """

    def __init__(self, fetcher: _Fetcher, file: PinnedFile) -> None:
        self.fetcher, self.file, self.n_bytes, self.depth = fetcher, file, 0, 0

    def __enter__(self) -> _Meter:
        self.depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.depth -= 1
        if self.depth == 0 and kind is not None:
            self.fetcher.progress.advance(self.fetcher.task, -self.n_bytes)

    def update(self, increment: int) -> None:
        """Take note of ``increment`` more bytes."""
        if self.fetcher.stop.is_set():
            raise _Stopped
        self.n_bytes += increment
        if self.n_bytes > self.file.n_bytes:
            raise _wrong_bytes(self.file, f"it is longer than {self.file.n_bytes} bytes")
        self.fetcher.progress.advance(self.fetcher.task, increment)


def _look_up(client: PyPISimple, project: str) -> dict[str, DistributionPackage]:
    page = client.get_project_page(project, timeout=TIMEOUT_SECONDS)
    return {package.filename: package for package in page.packages}


def _retry_after_seconds(error: HTTPError) -> float:
    """Return the pause that a server asks for, at most ``MAX_RETRY_AFTER_SECONDS``."""
    header = "" if error.response is None else error.response.headers.get("Retry-After", "")
    return min(float(header), MAX_RETRY_AFTER_SECONDS) if header.isdecimal() else 0.0


def _brief(error: Exception) -> str:
    """Return the innermost reason of a network error, in one short line."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:120]}"


def _not_there(file: PinnedFile) -> ClbenchError:
    return NotFoundError(
        f"the package index has no such file of {file.project}",
        where=file.filename,
        mend="mend the manifest, or use an index that keeps old releases",
    )


def _wrong_bytes(file: PinnedFile, how: str) -> IntegrityError:
    return IntegrityError(
        f"the package index has another file than the manifest pins: {how}",
        where=file.filename,
        mend="do not use it; check the index you are connected to and the manifest",
    )
