"""Small built streams written straight from lists of documents, in milliseconds: what transforms are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clbench import packing
from clbench.derive import StreamTransform, write_derived
from clbench.files import sha256_bytes
from clbench.stream import Split, Stream

Doc = tuple[str, str, str]
"""Identity, text, group."""
FIRST_YEAR = 2001


def train_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int = 300) -> Path:
    """Train a byte-level BPE and save it; returns the folder."""
    packing.save_tokenizer(packing.train_tokenizer([list(texts)], vocab_size), folder)
    return folder


def write_stream(
    folder: Path,
    stages: Sequence[dict[Split, list[Doc]]],
    tokenizer: Path,
    *,
    name: str = "written",
    rows_per_part: int = 1000,
    extras: dict[str, bytes] | None = None,
) -> Stream:
    """Write a built stream: stage k is the year 2001 + k; documents stand in the order given."""
    out = folder / "out"
    packing.copy_tokenizer(tokenizer, out / "tokenizer")
    library, facts = packing.open_tokenizer(out / "tokenizer", "of a test")
    entries, contents = [], []
    for k, stage in enumerate(stages):
        year = FIRST_YEAR + k
        entry: dict[str, Any] = {"index": k, "name": str(year), "start": f"{year}-01-01", "end": f"{year}-12-31"}
        content: dict[str, Any] = {}
        for split, documents in stage.items():
            pieces = []
            for first in range(0, len(documents), rows_per_part):
                pieces.append(folder / "pieces" / f"{split}-{k}-{first}")
                part = documents[first : first + rows_per_part]
                tokens = [[*library.encode(text, add_special_tokens=False).ids, facts.eos_id] for _, text, _ in part]
                lengths = np.array([len(ids) for ids in tokens], np.int64)
                writer = packing.PieceWriter(pieces[-1], facts.dtype)
                writer.add(_table(part, f"{year}-06-15"), np.concatenate(tokens).astype(facts.dtype), lengths)
                writer.close()
            counts, changes, digests = packing.join(pieces, out, split=split, stage=k, facts=facts)
            entry |= {split: counts, "changes": entry.get("changes", {}) | {split: changes}}
            content[split] = digests
        entries.append(entry)
        contents.append(content)
    packing.write_extras(extras or {}, out)
    packing.write_manifest(out, about={"name": name}, facts=facts, entries=entries, contents=contents, seconds={})
    return Stream(out)


def _table(documents: Sequence[Doc], date: str) -> Any:
    import pyarrow as pa

    encoded = [text.encode() for _, text, _ in documents]
    return pa.table(
        {
            "id": pa.array([name for name, _, _ in documents], pa.string()),
            "text": pa.array([text for _, text, _ in documents], pa.string()),
            "date": pa.array([date] * len(documents), pa.string()),
            "group": pa.array([group for _, _, group in documents], pa.string()),
            "change": pa.array(["new"] * len(documents), pa.string()),  # no transform may rely on it
            "n_bytes": pa.array([len(data) for data in encoded], pa.int64()),
            "sha256": pa.array([sha256_bytes(data) for data in encoded], pa.string()),
        }
    )


class Silent:
    """A progress bar that shows nothing."""

    def total(self, n: int, /) -> None:
        """Do nothing."""

    def step(self, what: str, /) -> None:
        """Do nothing."""


def derive(transform: StreamTransform, inputs: Sequence[Stream], folder: Path) -> Stream:
    """Write a transform of built streams; every file is checked against the manifest."""
    transform.open(inputs)
    (folder / "out").mkdir(parents=True)
    write_derived(transform, folder / "out", {"name": transform.name}, Silent())
    return Stream(folder / "out", check=True)


@dataclass(frozen=True)
class Read:
    """One document as it stands in a built stream."""

    id: str
    text: str
    date: str
    group: str
    change: str
    n_bytes: int
    n_tokens: int
    sha256: str
    tokens: tuple[int, ...]


def read(stream: Stream, split: Split) -> list[list[Read]]:
    """Return all documents of a split, stage by stage, each with its own slice of the packed tokens."""
    found = []
    for stage in stream.stages():
        packed, offsets = stream.tokens(split, stage.index), stream.offsets(split, stage.index)
        rows = stream.documents(split, stage.index).to_pylist()
        slices = [tuple(packed[a:b].tolist()) for a, b in pairwise(offsets.tolist())]
        found.append([Read(**row, tokens=ids) for row, ids in zip(rows, slices, strict=True)])
    return found
