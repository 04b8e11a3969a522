"""A built stream written by hand, past the builder: so that a test can plant what the builder would drop.

Tokens are words: every distinct word has an id, 0 ends a document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clbench.files import digest_of, sha256_bytes
from clbench.stream import DOCUMENT_COLUMNS, Stream

EOS = 0


@dataclass(frozen=True, kw_only=True)
class Page:
    """One document of a written stream."""

    id: str
    text: str
    date: str = "2020-01-01"
    group: str = "wiki"
    change: str = "new"


StagePages = dict[str, Sequence[Page]]
"""Split -> pages."""


def write_stream(
    folder: Path, stages: Sequence[StagePages], *, name: str = "written", n_parts: int = 1, names: Sequence[str] = ()
) -> Stream:
    """Write a stream whose stages hold these pages; ``n_parts`` Parquet files a split must make no difference."""
    ids: dict[str, int] = {}
    (folder / "tokens").mkdir(parents=True)
    entries = []
    for index, stage in enumerate(stages):
        entry: dict[str, Any] = {
            "index": index,
            "name": names[index] if names else str(2020 + index),
            "start": f"{2020 + index}-01-01",
            "end": f"{2020 + index}-12-31",
        }
        for split in ("train", "heldout"):
            entry[split] = write_split(folder, split, index, stage[split], ids, n_parts)
        entries.append(entry)
    manifest = {
        "name": name,
        "sha256": digest_of([[{k: [vars(p) for p in v] for k, v in s.items()} for s in stages], list(names)]),
        "tokenizer": {"eos_id": EOS, "vocab_size": len(ids) + 1, "dtype": "uint16"},
        "stages": entries,
        "files": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return Stream(folder)


def write_split(
    folder: Path, split: str, stage: int, pages: Sequence[Page], ids: dict[str, int], n_parts: int
) -> dict[str, int]:
    """Write documents, tokens and offsets of one split and return its counts."""
    tokens = [[ids.setdefault(word, len(ids) + 1) for word in page.text.split()] + [EOS] for page in pages]
    rows = [
        {
            **vars(page),
            "n_bytes": len(page.text.encode()),
            "n_tokens": len(mine),
            "sha256": sha256_bytes(page.text.encode()),
        }
        for page, mine in zip(pages, tokens, strict=True)
    ]
    where = folder / "documents" / f"split={split}" / f"stage={stage:02d}"
    where.mkdir(parents=True)
    size = -(-len(rows) // n_parts)
    for part in range(n_parts):
        columns = {key: [row[key] for row in rows[part * size : (part + 1) * size]] for key in DOCUMENT_COLUMNS}
        pq.write_table(pa.table(columns), where / f"part-{part}.parquet")
    flat = [token for mine in tokens for token in mine]
    np.array(flat, "<u2").tofile(folder / "tokens" / f"{split}-{stage:02d}.bin")
    offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int64)
    np.save(folder / "tokens" / f"{split}-{stage:02d}.offsets.npy", offsets)
    return {"n_documents": len(rows), "n_tokens": len(flat), "n_bytes": sum(row["n_bytes"] for row in rows)}
