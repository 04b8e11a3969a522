"""Parts: the documents of a source as the builder sets them down, checked and fingerprinted, a file a part.

A part of a stage is the unit of reading, of parallel work and of resuming. In the work folder it is ``read/SS-PPPP``
with ``.parquet`` (the documents), ``.id`` ``.group`` ``.key`` (uint64, one a document: hashes of identity, group and
normalised text), ``.sig`` (uint32 ``[n, P]``: MinHash), ``.json`` (counts; written last, so that it means complete) and
later ``.side`` (uint8: TRAIN, HELDOUT or DROPPED, decided by ``clbench.splitting``).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from clbench.duplicates import PERMUTATIONS, fingerprints
from clbench.errors import ConfigError
from clbench.files import atomic_path, read_json, sha256_bytes
from clbench.packing import PARQUET
from clbench.stream import DOCUMENT_COLUMNS, Change, Document

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 4 << 20
TRAIN, HELDOUT, DROPPED = 0, 1, 2
_KINDS = frozenset(get_args(Change))


@dataclass(frozen=True)
class Part:
    """The files of one part in a work folder."""

    work: Path
    stage: int
    number: int

    def file(self, suffix: str) -> Path:
        """Return the file of this part with a suffix such as ``.id``."""
        return self.work / "read" / f"{self.stage:02d}-{self.number:04d}{suffix}"

    @property
    def is_read(self) -> bool:
        """Whether the part is complete."""
        return self.file(".json").is_file()

    @cached_property
    def counts(self) -> dict[str, int]:
        """``n_documents`` and ``n_bytes`` of text."""
        counts: dict[str, int] = read_json(self.file(".json"))
        return counts

    def hashes(self, suffix: str) -> NDArray[np.uint64]:
        """Return ``.id``, ``.group`` or ``.key``, shape ``[n]``."""
        return np.fromfile(self.file(suffix), "<u8")

    def signatures(self) -> NDArray[np.uint32]:
        """Return the MinHash signatures, memory-mapped, shape ``[n, P]``."""
        if not self.counts["n_documents"]:
            return np.zeros((0, PERMUTATIONS), np.uint32)
        return np.memmap(self.file(".sig"), dtype="<u4", mode="r", shape=(self.counts["n_documents"], PERMUTATIONS))

    def sides(self) -> NDArray[np.uint8]:
        """Return where each document ended up, shape ``[n]``."""
        return np.fromfile(self.file(".side"), np.uint8)

    def tables(self, columns: list[str] | None = None) -> Iterator[tuple[pa.Table, NDArray[np.uint8]]]:
        """Yield the documents in batches, with their sides."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        sides, start = self.sides(), 0
        if not len(sides):
            return
        with pq.ParquetFile(self.file(".parquet")) as file:
            for batch in file.iter_batches(batch_size=BATCH_DOCUMENTS, columns=columns):
                yield pa.Table.from_batches([batch]), sides[start : start + batch.num_rows]
                start += batch.num_rows


def identity_hash(document_id: str) -> int:
    """Return 64 bits of the SHA-256 of an identity; they decide its split in every stage of every stream."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big")


def read_part(part: Part, documents: Iterable[Document], *, where: str) -> None:
    """Check the documents of one part and set them down.

    Raises:
        ConfigError: a document breaks the contract; says which and how.
    """
    import pyarrow.parquet as pq

    part.file("").parent.mkdir(parents=True, exist_ok=True)
    counts = Counter({"n_documents": 0, "n_bytes": 0})
    with ExitStack() as stack:
        arrays = {s: stack.enter_context(part.file(s).open("wb")) for s in (".id", ".group", ".key", ".sig")}
        parquet: Any = None
        for batch in _batches(documents):
            for document in batch:
                check_document(document, where)
            table = _table(batch)
            if parquet is None:
                parquet = stack.enter_context(pq.ParquetWriter(part.file(".parquet"), table.schema, **PARQUET))
            parquet.write_table(table)
            keys, signatures = fingerprints([document.text for document in batch])
            arrays[".id"].write(_hashes(document.id for document in batch).tobytes())
            arrays[".group"].write(_hashes(document.group for document in batch).tobytes())
            arrays[".key"].write(keys.astype("<u8", copy=False).tobytes())
            arrays[".sig"].write(signatures.astype("<u4", copy=False).tobytes())
            counts["n_documents"] += len(batch)
            counts["n_bytes"] += sum(table["n_bytes"].to_pylist())
    with atomic_path(part.file(".json")) as temporary:
        temporary.write_text(json.dumps(dict(counts)), encoding="utf-8")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or n_characters > BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _hashes(names: Iterable[str]) -> NDArray[np.uint64]:
    return np.array([identity_hash(name) for name in names], "<u8")


def check_document(document: Document, where: str) -> None:
    """Refuse a document that breaks the contract, saying which."""
    problem = None
    if not document.id:
        problem = "has an empty id"
    elif not document.text:
        problem = "has no text"
    elif document.change not in _KINDS:
        problem = f"has the change kind {document.change!r}, not one of {', '.join(get_args(Change))}"
    elif not is_date(document.date):
        problem = f"has the date {document.date!r}, not one such as 2013-05-01"
    else:
        try:
            f"{document.id}{document.text}{document.group}".encode()
        except UnicodeEncodeError:
            problem = "holds a lone surrogate, which is not text"
    if problem:
        raise ConfigError(
            f"document {document.id!r} {problem}", where=where, mend="mend the source or leave it out there"
        )


def check_once(parts: list[Part], where: str) -> None:
    """Refuse an identity that comes twice in the parts of one stage."""
    hashes = np.concatenate([part.hashes(".id") for part in parts])
    unique, counts = np.unique(hashes, return_counts=True)
    twice = set(unique[counts > 1].tolist())
    if not twice:
        return
    seen: set[str] = set()
    for name in _ids(parts):
        if identity_hash(name) in twice:
            if name in seen:
                raise ConfigError(
                    f"document {name!r} comes twice in one stage",
                    where=where,
                    mend="mend the source or leave it out there",
                )
            seen.add(name)


def _ids(parts: list[Part]) -> Iterator[str]:
    import pyarrow.parquet as pq

    for part in parts:
        if part.counts["n_documents"]:
            with pq.ParquetFile(part.file(".parquet")) as file:
                for batch in file.iter_batches(columns=["id"]):
                    yield from batch["id"].to_pylist()


def is_date(text: str) -> bool:
    """Tell whether a text starts with an ISO-8601 date that exists."""
    try:
        date.fromisoformat(text[:10])
    except ValueError:
        return False
    return True


def _table(documents: list[Document]) -> pa.Table:
    """Return documents as a table with DOCUMENT_COLUMNS but ``n_tokens``."""
    import pyarrow as pa

    encoded = [d.text.encode() for d in documents]
    columns = {name: pa.array([getattr(d, name) for d in documents], pa.string()) for name in DOCUMENT_COLUMNS[:5]}
    columns["n_bytes"] = pa.array([len(e) for e in encoded], pa.int64())
    columns["sha256"] = pa.array([sha256_bytes(e) for e in encoded], pa.string())
    return pa.table(columns)
