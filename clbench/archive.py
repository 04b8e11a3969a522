"""Archives that came from outside, read member by member in memory: nothing is unpacked or executed.

Only regular files come out. A path that leaves the archive, an archive that ends early or is damaged, and one
that unpacks to far more than it weighs are refused with the archive's name.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from clbench.errors import ConfigError, IntegrityError

CHUNK_BYTES = 1 << 16
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError,
    RuntimeError, ValueError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an archive may unpack to; far above any documentation, far below what hurts."""

    member_bytes: int = 32 << 20
    """Largest member that is read; a larger one is refused if wanted."""
    total_bytes: int = 1 << 30
    """All members together, unpacked, wanted or not."""
    n_members: int = 50_000
    ratio: int = 100
    """Unpacked bytes per archive byte, counted above the first ``ratio_free_bytes``."""
    ratio_free_bytes: int = 16 << 20

    def allowed_bytes(self, archive_bytes: int) -> int:
        """Return how many bytes an archive of this size may unpack to."""
        return min(self.total_bytes, self.ratio_free_bytes + self.ratio * archive_bytes)


@dataclass(frozen=True)
class Member:
    """One regular file of an archive: its path with ``/`` and without a leading ``./``, and its bytes."""

    name: str
    data: bytes


def iter_members(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, limits: Limits | None = None
) -> Iterator[Member]:
    """Yield the regular files of a .tar.gz, .tgz, .tar.bz2, .tar.xz or .zip archive, in the archive's order.

    Args:
        path: the archive.
        wanted: says by name which members to yield; the others are not kept in memory.
        limits: caps on sizes, number and compression ratio.

    Raises:
        IntegrityError: the archive is damaged or ends early, a path is absolute or has ``..``, or a cap is
            passed.
        ConfigError: the file's name has none of the endings above.
    """
    limits = limits or Limits()
    if path.name.endswith((".zip", ".whl")):
        return _iter_zip(path, wanted, limits)
    if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        return _iter_tar(path, wanted, limits)
    raise ConfigError(
        "no archive of a kind that can be read", where=path, mend="use .tar.gz, .tar.bz2, .tar.xz or .zip"
    )


def _refuse(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"archive refused: {why}", where=path, mend="check where it comes from, delete it, fetch again"
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a damaged archive raises into one IntegrityError that names it."""
    try:
        yield
    except _DAMAGED as error:
        raise _refuse(path, f"truncated or damaged ({type(error).__name__}: {error})") from error


def _safe_name(path: Path, name: str) -> str:
    """Return a member's path in normal form; refuse one that could leave the folder it is unpacked to."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    drive = len(name) > 1 and name[1] == ":" and name[0].isalpha()
    if name.startswith("/") or drive or ".." in parts or "\\" in name or "\0" in name:
        raise _refuse(path, f"the member path {name[:80]!r} leaves the archive")
    return "/".join(parts)


class _Metered:
    """The unpacked bytes of a tar archive as a stream that refuses to give more than is allowed."""

    def __init__(self, path: Path, raw: IO[bytes], allowed_bytes: int) -> None:
        self.path, self.raw, self.left_bytes = path, raw, allowed_bytes

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        """Return at most ``size`` unpacked bytes."""
        with _naming(self.path):
            data = self.raw.read(min(size, CHUNK_BYTES))
        self.left_bytes -= len(data)
        if self.left_bytes < 0:
            raise _refuse(self.path, "it unpacks to far more than it weighs")
        return data


def _open_compressed(path: Path) -> IO[bytes]:
    openers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".tgz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    return cast("IO[bytes]", openers[path.suffix](path, "rb"))


def _iter_tar(path: Path, wanted: Callable[[str], bool], limits: Limits) -> Iterator[Member]:
    with _open_compressed(path) as raw:
        stream = _Metered(path, raw, limits.allowed_bytes(path.stat().st_size))
        with _naming(path):
            archive = tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|", errors="replace")  # noqa: SIM115
        n_members = 0
        with archive:
            while (info := _next_member(path, archive)) is not None:
                n_members += 1
                if n_members > limits.n_members:
                    raise _refuse(path, f"it has more than {limits.n_members} members")
                name = _safe_name(path, info.name)
                if not info.isreg() or not wanted(name):
                    continue
                _check_size(path, name, info.size, limits)
                with _naming(path):
                    file = archive.extractfile(info)
                    data = b"" if file is None else file.read()
                if len(data) != info.size:
                    raise _refuse(path, f"the member {name[:80]!r} ends early")
                yield Member(name, data)
        while stream.read():
            pass  # to the end, so that the checksum over everything is compared


def _next_member(path: Path, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    with _naming(path):
        return archive.next()


def _check_size(path: Path, name: str, n_bytes: int, limits: Limits) -> None:
    if n_bytes > limits.member_bytes:
        raise _refuse(path, f"the member {name[:80]!r} has {n_bytes} bytes, more than {limits.member_bytes}")


def _iter_zip(path: Path, wanted: Callable[[str], bool], limits: Limits) -> Iterator[Member]:
    left_bytes = limits.allowed_bytes(path.stat().st_size)
    with _naming(path):
        archive = zipfile.ZipFile(path)
    with archive:
        infos = archive.infolist()
        if len(infos) > limits.n_members:
            raise _refuse(path, f"it has more than {limits.n_members} members")
        for info in infos:
            name = _safe_name(path, info.filename)
            mode = info.external_attr >> 16
            if info.is_dir() or (stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
                continue
            left_bytes -= info.file_size
            if left_bytes < 0:
                raise _refuse(path, "it unpacks to far more than it weighs")
            if wanted(name):
                _check_size(path, name, info.file_size, limits)
                yield Member(name, _read_zip_member(path, archive, info))


def _read_zip_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes; one that unpacks to another size than it declares is refused."""
    with _naming(path), archive.open(info) as file:
        data = file.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise _refuse(path, f"the member {info.filename[:80]!r} is not as large as it says")
    return data
