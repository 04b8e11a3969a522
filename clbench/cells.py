"""Cells: one (checkpoint, suite, data) measurement, addressed by content, never made twice.

Full matrices are quadratic in the number of stages and runs share checkpoints (the base, a method that never
updates), so the cache is part of the design. A cell is a Parquet file of rows and a JSON file that is written last.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from clbench.errors import IntegrityError, NotFoundError
from clbench.files import digest_of, read_json, write_json
from clbench.home import cells_folder
from clbench.results.store import ROWS_SCHEMA, read_rows, write_rows
from clbench.suite import WHOLE, Checkpoint, Rows, Suite

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
    parts: dict[str, Any] = {
        "format": FORMAT,
        "weights": checkpoint.weights_sha256,
        "tokenizer": checkpoint.tokenizer_sha256,
        "precision": str(checkpoint.autocast_dtype),
        "suite": suite.sha256(),
        "data": suite.shard_sha256(shard),
        **({"shard": shard} if shard != WHOLE else {}),
    }
    if suite.compares:
        others = {"base": checkpoint.base, "previous": checkpoint.previous}
        parts |= {name: other.weights_sha256 for name, other in others.items() if other is not None}
    return digest_of(parts)


def measure(suite: Suite, checkpoint: Checkpoint) -> Cell:
    """Return what a checkpoint has under a suite, each shard from the cache or measured now, as one."""
    found = [measure_shard(suite, checkpoint, shard) for shard in suite.shards()]
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


def measure_shard(suite: Suite, checkpoint: Checkpoint, shard: str = WHOLE) -> Cell:
    """Return the cell of a checkpoint under a shard of a suite, from the cache or measured now."""
    address = address_of(suite, checkpoint, shard)
    rows_path, cost_path = _paths(address)
    if cost_path.is_file():
        try:
            cost: dict[str, Any] = read_json(cost_path)
            return Cell(address, read_rows(rows_path), cost["flops"], cost["seconds"], cached=True)
        except (IntegrityError, NotFoundError, KeyError, TypeError):
            cost_path.unlink(missing_ok=True)
    start = time.perf_counter()
    rows = table_of(suite.measure_shard(checkpoint, shard))
    seconds, flops = time.perf_counter() - start, suite.shard_flops(checkpoint, shard)
    write_rows(rows_path, rows)
    write_json(cost_path, {"suite": suite.name, "shard": shard, "flops": flops, "seconds": seconds})
    return Cell(address, rows, flops, seconds, cached=False)


def _paths(address: str) -> tuple[Path, Path]:
    folder = cells_folder() / address[:2]
    return folder / f"{address}.parquet", folder / f"{address}.json"


def table_of(rows: Rows) -> pa.Table:
    """Return rows as a table of schema ROWS_SCHEMA."""
    return pa.table({name: getattr(rows, name) for name in ROWS_SCHEMA.names}, schema=ROWS_SCHEMA)
