"""Late extras: files that a suite asks of a stream after it was built, made from what the stream was built from.

A built stream is frozen by its digest, and a suite may be thought of later. So such a file is no part of the stream:
it is made when it is first asked for, by the stream's source (``StreamSource.late_extra``), and kept under
``extras/STREAM-DIGEST/`` of the cache folder under a sum of its own. Only ``prepare_extra`` uses the network.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from clbench import build, home, registry
from clbench.errors import ClbenchError, IntegrityError, NotFoundError
from clbench.files import atomic_path, exclusive
from clbench.stream import Stream, StreamSource

DIGEST_CHARS = 64
LOCK_SECONDS = 3600.0


def source_of(stream: Stream) -> StreamSource:
    """Return the source that a built stream was made by.

    Raises:
        NotFoundError: it cannot be made again, or it would build another stream now.
    """
    recipe = stream.manifest.get("recipe")
    try:
        # Streams that were built before manifests had a recipe are found by their name.
        source = registry.make_stream_source(stream.name) if recipe is None else registry.source_from_recipe(recipe)
        same = build.stream_folder(source).name == f"{stream.name}-{stream.manifest['address'][:12]}"
    except ClbenchError as error:
        raise NotFoundError(
            f"what stream {stream.name!r} was built by is not found: {error.what}",
            where=stream.folder,
            mend="delete the folder and run `clbench prepare` for the stream again",
        ) from None
    if not same:
        raise NotFoundError(
            f"stream {stream.name!r} was built by other releases, options or code than are here now",
            where=stream.folder,
            mend="run `clbench prepare` for the stream again and measure on that",
        )
    return source


def late_extra(stream: Stream, name: str) -> bytes:
    """Return a late extra of a built stream: from the cache, or made now.

    Raises:
        NotFoundError: the stream's source has none of this name, or what it is made from is not on this machine.
        IntegrityError: a file it is made from is not the pinned one.
    """
    return _kept(stream, source_of(stream), name)


def prepare_extra(target: str, name: str) -> tuple[Stream, Path]:
    """Build a stream if need be, fetch what a late extra is made from, make it; return the stream and the file.

    Raises:
        NotFoundError: no stream is called so, or it has no such extra.
        OfflineError: files are missing and no network answers.
    """
    source = registry.make_stream_source(target)
    if name not in source.late_extras():
        source.late_extra(name)  # says so
    stream = build.build_stream(source)
    path = _path(stream, source, name)
    if not path.is_file():
        source.fetch()
    _kept(stream, source, name)
    return stream, path


def _path(stream: Stream, source: StreamSource, name: str) -> Path:
    version = source.late_extras()[name]
    return home.home() / "extras" / f"{stream.name}-{stream.sha256[:12]}" / f"v{version}-{name}"


def _kept(stream: Stream, source: StreamSource, name: str) -> bytes:
    """Return the file from the cache if it is there whole; else make it, one process at a time."""
    if name not in source.late_extras():
        return source.late_extra(name)  # says that there is none
    path = _path(stream, source, name)
    if (content := _read(path, stream)) is not None:
        return content
    with exclusive(path.parent / ".locks" / name, mend="wait for it to end", timeout_seconds=LOCK_SECONDS):
        if (content := _read(path, stream)) is None:
            content = source.late_extra(name)
            with atomic_path(path) as temporary:
                temporary.write_bytes(_sum(content, stream) + content)
    return content


def _sum(content: bytes, stream: Stream) -> bytes:
    """Return the line that stands before a kept file: a digest of its stream and its content."""
    return hashlib.sha256(stream.sha256.encode() + content).hexdigest().encode() + b"\n"


def _read(path: Path, stream: Stream) -> bytes | None:
    """Return a kept file; None where there is none, or a broken one, which is made again."""
    try:
        kept = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", where=path, mend="delete it") from None
    content = kept[DIGEST_CHARS + 1 :]
    return content if kept[: DIGEST_CHARS + 1] == _sum(content, stream) else None
