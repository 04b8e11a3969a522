"""Which files an input is made of: a file, a folder or a pattern; their format, digest and shares of work.

What stands in them is left to ``_readers``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clbench import home
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import digest_of, read_json, sha256_file, write_json

Format = Literal["parquet", "jsonl", "csv", "text"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, Format] = {
    **dict.fromkeys(("parquet", "pq"), "parquet"),
    **dict.fromkeys(("jsonl", "ndjson", "json"), "jsonl"),
    **dict.fromkeys(("csv", "tsv", "tab"), "csv"),
    **dict.fromkeys(("txt", "text", "md", "markdown", "rst"), "text"),
}
PACKED = (".gz", ".zst")
PIECE_BYTES = 256 << 20
"""A share of work: resumed as a whole, run by one process."""
PIECE_FILES = 2000


@dataclass(frozen=True)
class Inputs:
    """The files of an input, by their paths relative to ``root``, sorted."""

    root: Path
    files: tuple[str, ...]
    format: Format

    def path(self, name: str) -> Path:
        """Return where a file lies."""
        return self.root / name


def find_inputs(path: str, format_: str | None = None) -> Inputs:
    """Return the files behind a path.

    Raises:
        NotFoundError: there is no such file, or none that can be read.
        ConfigError: the format is not known, or a folder holds files of several formats.
    """
    if format_ is not None and format_ not in FORMATS:
        raise ConfigError(f"format is {format_!r}", mend=f"use one of {', '.join(FORMATS)}")
    place = Path(path).expanduser()
    if place.is_file():
        found = format_of(place.name) if format_ is None else format_
        if found is None:
            raise ConfigError("the file's name does not tell its format", where=place, mend="say format")
        return Inputs(place.parent.resolve(), (place.name,), found)
    if place.is_dir():
        root, paths = place, sorted(place.rglob("*"))
    elif re.search(r"[*?\[]", path):
        root, paths = _glob(place)
    else:
        raise NotFoundError("no file, folder or pattern that matches", where=path, mend="check the path")
    names = [p.relative_to(root).as_posix() for p in paths if p.is_file()]
    names = sorted(name for name in names if not re.search(r"(^|/)[._]", name))
    return _of_one_format(root.resolve(), names, format_)


def _glob(pattern: Path) -> tuple[Path, list[Path]]:
    """Return the folder above the first wildcard, and what matches below it."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    root = Path(*parts[:first]) if first else Path()
    return root, list(root.glob(str(Path(*parts[first:]))))


def _of_one_format(root: Path, names: Sequence[str], format_: str | None) -> Inputs:
    """Return the files of the format that is asked for, or of the only one that there is."""
    found = Counter(kind for name in names if (kind := format_of(name)) is not None)
    if format_ is None:
        if len(found) > 1:
            listed = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
            raise ConfigError(f"files of several formats: {listed}", where=root, mend="say format")
        format_ = next(iter(found), None)
    chosen = [name for name in names if format_of(name) == format_]
    if not chosen or format_ is None:
        raise NotFoundError(
            f"no {format_ or 'parquet, jsonl, csv or text'} file here", where=root, mend="check the path and format"
        )
    return Inputs(root, tuple(chosen), format_)  # type: ignore[arg-type]


def format_of(name: str) -> Format | None:
    """Return the format that a file's name tells: ``posts.jsonl.gz`` is jsonl."""
    for packed in PACKED:
        name = name.removesuffix(packed)
    return SUFFIXES.get(name.rpartition(".")[2].lower())


def sha256_of(inputs: Inputs, progress: Any = None) -> str:
    """Return a digest over the content of all files, and their relative paths if there are several.

    Digests of files that have not changed since (by size and time of change) are remembered in the cache folder.
    """
    memory = home.sources_folder() / "digests" / f"{digest_of([str(inputs.root), *inputs.files])[:24]}.json"
    try:
        known = read_json(memory)
    except (IntegrityError, NotFoundError):
        known = {}
    found: dict[str, list[Any]] = {}
    for name in inputs.files:
        path = inputs.path(name)
        state = path.stat()
        now = [state.st_size, state.st_mtime_ns]
        before = known.get(name)
        found[name] = before if before and before[:2] == now else [*now, sha256_file(path)]
        if progress is not None:
            progress(state.st_size)
    if found != known:
        write_json(memory, found)
    if len(found) == 1 and inputs.format != "text":
        return str(next(iter(found.values()))[2])
    return digest_of(sorted((name, entry[2]) for name, entry in found.items()))


def pieces(inputs: Inputs) -> list[dict[str, Any]]:
    """Return the shares of work, JSON-able: ``name``, ``files``, ``n_bytes``; for a large Parquet file, ``groups``."""
    found: list[dict[str, Any]] = []
    files: list[str] = []
    n_bytes = 0

    def close() -> None:
        nonlocal files, n_bytes
        if files:
            name = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
            found.append({"name": name, "files": files, "n_bytes": n_bytes})
        files, n_bytes = [], 0

    for name in inputs.files:
        size = inputs.path(name).stat().st_size
        if inputs.format == "parquet" and size > PIECE_BYTES:
            close()
            found.extend(_groups(inputs, name))
            continue
        if n_bytes + size > PIECE_BYTES or len(files) >= PIECE_FILES:
            close()
        files.append(name)
        n_bytes += size
    close()
    return found


def _groups(inputs: Inputs, name: str) -> list[dict[str, Any]]:
    """Return shares of one large Parquet file, in whole row groups."""
    from clbench.streams._readers import open_parquet

    shares: list[dict[str, Any]] = []
    with open_parquet(inputs.path(name)) as file:
        meta = file.metadata
        sizes = [
            sum(meta.row_group(g).column(c).total_compressed_size for c in range(meta.num_columns))
            for g in range(meta.num_row_groups)
        ]
    first, n_bytes = 0, 0
    for group, size in enumerate(sizes):
        n_bytes += size
        if n_bytes >= PIECE_BYTES or group == len(sizes) - 1:
            shares.append(
                {
                    "name": f"{name} row groups {first} to {group}",
                    "files": [name],
                    "n_bytes": n_bytes,
                    "groups": [first, group + 1],
                }
            )
            first, n_bytes = group + 1, 0
    return shares
