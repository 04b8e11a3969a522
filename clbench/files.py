"""Files that are either whole or absent: atomic writes, digests, locks and canonical JSON.

Everything clbench writes goes through here, so that a kill or a full disk leaves the previous state in place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from clbench.errors import BusyError, ClbenchError, IntegrityError, NotFoundError

CHUNK_BYTES = 1 << 20


def sha256_bytes(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text, hence equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value's canonical text."""
    return sha256_bytes(canonical_json(value).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken file is a ClbenchError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError("file is missing", where=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"file is not valid JSON: {error}", where=path) from None


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a forbidden folder or a file in the way into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ClbenchError(
                "the disk is full, nothing was half-written", where=path, mend="free some space and run again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ClbenchError(
                "this place cannot be written",
                where=path,
                mend="choose another folder or mend its permissions",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise ClbenchError(
                f"a {'folder' if error.errno == errno.EISDIR else 'file'} is in the way",
                where=error.filename or path,
                mend="choose another place, or move it away",
            ) from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that is synced and renamed onto it on success, removed on failure."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with explain_os_errors(path):
            yield temporary
            fsync(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented for readers; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` in one rename on success.

    An existing ``path`` is replaced; on failure it stays as it was and nothing else is left behind.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        with explain_os_errors(path):
            yield temporary
            for file in sorted(temporary.rglob("*")):
                fsync(file)
            temporary.chmod(0o755)
            if path.exists():
                old = path.with_name(f".{path.name}.old.tmp")
                shutil.rmtree(old, ignore_errors=True)
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                temporary.replace(path)
            fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links; neither is written to later."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders that a killed process left in ``folder`` (hold its lock)."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path, *, mend: str, timeout_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of ``folder``; raise BusyError when another process has it.

    The operating system releases the lock when its holder dies, so a kill needs no clean-up.
    """
    try:
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(folder / ".lock", timeout=timeout_seconds)
            lock.acquire()
    except filelock.Timeout:
        raise BusyError("another process is working here", where=folder, mend=mend) from None
    try:
        yield
    finally:
        lock.release()
