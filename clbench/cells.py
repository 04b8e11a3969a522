"""Cells: one (checkpoint, suite, data) measurement, addressed by content, never made twice.

Full matrices are quadratic in the number of stages and runs share checkpoints (the base, a method that never
updates), so the cache is part of the design. A cell is a Parquet file of rows and a JSON file that is written last.
Whoever measures one holds its lock: other processes wait, then find it made. ``fanout`` spreads cells over processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import pyarrow as pa

from clbench.errors import BusyError, IntegrityError, NotFoundError
from clbench.files import digest_of, explain_os_errors, read_json, write_json
from clbench.home import cells_folder
from clbench.results.store import ROWS_SCHEMA, read_rows, write_rows
from clbench.suite import WHOLE, Checkpoint, Rows, Suite

if TYPE_CHECKING:
    import torch

FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """A measurement and what it cost when it was made."""

    address: str
    rows: pa.Table
    flops: float
    seconds: float
    cached: bool


def address_of(suite: Suite, checkpoint: Checkpoint, shard: str = WHOLE) -> str:
    """Return the address of a measurement: everything that its values depend on."""
    others = {"base": checkpoint.base, "previous": checkpoint.previous}
    return address(
        suite,
        weights_sha256=checkpoint.weights_sha256,
        tokenizer_sha256=checkpoint.tokenizer_sha256,
        autocast_dtype=checkpoint.autocast_dtype,
        shard=shard,
        others={name: other.weights_sha256 for name, other in others.items() if other is not None},
    )


def address(
    suite: Suite,
    *,
    weights_sha256: str,
    tokenizer_sha256: str,
    autocast_dtype: torch.dtype | None = None,
    shard: str = WHOLE,
    others: Mapping[str, str] | None = None,
) -> str:
    """Return the address of a measurement of a model that need not be loaded.

    ``others`` are the digests of ``base`` and ``previous``, which count where the suite compares.
    """
    parts: dict[str, Any] = {
        "format": FORMAT,
        "weights": weights_sha256,
        "tokenizer": tokenizer_sha256,
        "precision": str(autocast_dtype),
        "suite": suite.sha256(),
        "data": suite.shard_sha256(shard),
        **({"shard": shard} if shard != WHOLE else {}),
    }
    if suite.compares:
        parts |= others or {}
    return digest_of(parts)


def measure(suite: Suite, checkpoint: Checkpoint) -> Cell:
    """Return what a checkpoint has under a suite, each shard from the cache or measured now, as one."""
    return joined([measure_shard(suite, checkpoint, shard) for shard in suite.shards()])


def joined(found: Sequence[Cell]) -> Cell:
    """Return the cells of all shards of a suite, in their order, as one."""
    if len(found) == 1:
        return found[0]
    return Cell(
        digest_of([cell.address for cell in found]),
        pa.concat_tables([cell.rows for cell in found]),
        sum(cell.flops for cell in found),
        sum(cell.seconds for cell in found),
        cached=all(cell.cached for cell in found),
    )


def is_there(suite: Suite, checkpoint: Checkpoint, shard: str = WHOLE) -> bool:
    """Say whether a shard of a checkpoint is in the cache."""
    return _paths(address_of(suite, checkpoint, shard))[1].is_file()


def measure_shard(suite: Suite, checkpoint: Checkpoint, shard: str = WHOLE, *, wait: bool = True) -> Cell:
    """Return the cell of a checkpoint under a shard of a suite, from the cache or measured now.

    Raises:
        BusyError: another process measures it at this moment, and ``wait`` is False.
    """
    name = address_of(suite, checkpoint, shard)
    if (found := stored(name)) is not None:
        return found
    with _locked(name, wait=wait):
        if (found := stored(name)) is not None:  # made while we waited
            return found
        start = time.perf_counter()
        rows = table_of(suite.measure_shard(checkpoint, shard))
        seconds, flops = time.perf_counter() - start, suite.shard_flops(checkpoint, shard)
        rows_path, cost_path = _paths(name)
        write_rows(rows_path, rows)
        write_json(cost_path, {"suite": suite.name, "shard": shard, "flops": flops, "seconds": seconds})
    return Cell(name, rows, flops, seconds, cached=False)


def stored(name: str) -> Cell | None:
    """Return the cell at an address, None where there is none or it is damaged: then it is to be measured again."""
    rows_path, cost_path = _paths(name)
    if not cost_path.is_file():
        return None
    try:
        cost: dict[str, Any] = read_json(cost_path)
        return Cell(name, read_rows(rows_path), cost["flops"], cost["seconds"], cached=True)
    except (IntegrityError, NotFoundError, KeyError, TypeError):
        cost_path.unlink(missing_ok=True)
        return None


@contextmanager
def _locked(name: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a cell; the operating system releases it when its holder dies.

    The file goes when the cell is made. Who waited for it then finds the cell, whatever file stands there by now; after
    a failure it stays, so that those who wait go on one by one.
    """
    path = cells_folder() / "locks" / f"{name}.lock"
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise BusyError("another process measures this cell", where=name[:12], mend="wait for it") from None
    try:
        yield
        path.unlink(missing_ok=True)
    finally:
        lock.release()


def _paths(address: str) -> tuple[Path, Path]:
    folder = cells_folder() / address[:2]
    return folder / f"{address}.parquet", folder / f"{address}.json"


def table_of(rows: Rows) -> pa.Table:
    """Return rows as a table of schema ROWS_SCHEMA."""
    return pa.table({name: getattr(rows, name) for name in ROWS_SCHEMA.names}, schema=ROWS_SCHEMA)
