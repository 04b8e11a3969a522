"""The stream contract: dated documents in stages, and the built stream that everything else reads.

A *source* (content, in ``streams/``) yields documents; ``clbench.build`` turns it once into Parquet, packed tokens
and a manifest; a *Stream* reads that folder. Sources may use the network while they are built, streams never do.

Layout of a built stream (every file but the manifest is listed there with its sha256; the manifest is written last):

    manifest.json                                        see Manifest
    documents/split=train/stage=00/part-0.parquet        columns DOCUMENT_COLUMNS
    documents/split=heldout/stage=00/part-0.parquet
    tokenizer/                                           loadable by transformers.AutoTokenizer
    tokens/train-00.bin  train-00.offsets.npy            uint16 or uint32 token ids, document starts (int64, n+1)
    tokens/train-00.json                                 what the two hold: tokenizer, counts, type, EOS policy
    tokens/heldout-00.bin ...                            every document is followed by one EOS
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from clbench.errors import IntegrityError, NotFoundError
from clbench.files import read_json, sha256_file

if TYPE_CHECKING:
    import pyarrow as pa

Split = Literal["train", "heldout"]
Change = Literal["new", "changed", "unchanged"]
DOCUMENT_COLUMNS = ("id", "text", "date", "group", "change", "n_bytes", "n_tokens", "sha256")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text.

    ``id`` is the identity over time (all versions of one page share it) and decides the split;
    ``date`` is UTC ISO-8601 (``2013-05-01``); ``group`` is the package, site or source. ``change`` compares with the
    last stage before that has documents of this group.
    """

    id: str
    text: str
    date: str
    group: str
    change: Change


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """One step of a stream: its place, a short name such as ``2013``, and the dates it covers (inclusive)."""

    index: int
    name: str
    start: str
    end: str


class StreamSource(ABC):
    """What a file in ``streams/`` provides; the class is found by the file's name, see ``clbench.registry``.

    ``settings`` are hashed into the address of the built stream: whatever changes the documents belongs in them.
    """

    name: str
    heldout_fraction: float = 0.1
    """Share of document identities (by hash of the id) that never train."""
    heldout_max_documents: int | None = None
    """Per stage; the identities with the smallest hashes are kept."""
    vocab_size: int = 4096
    """Of the byte-level BPE that is trained on stage 0."""

    @abstractmethod
    def stages(self) -> list[StageInfo]:
        """Return the stages in order, stage 0 first."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return everything that decides the documents, as JSON-able values."""

    def fetch(self) -> None:
        """Bring what ``documents`` reads onto this machine; the only place that may use the network."""

    @abstractmethod
    def documents(self, stage: int) -> Iterator[Document]:
        """Yield the documents of one stage, in an order that is the same on every machine."""


class Stream:
    """A built stream, read-only.

    Raises:
        NotFoundError: no complete stream is there (no manifest).
        IntegrityError: a file's digest differs from the manifest (only with ``check=True``).
    """

    def __init__(self, folder: Path, *, check: bool = False) -> None:
        self.folder = folder
        if not (folder / "manifest.json").is_file():
            raise NotFoundError("no complete stream here", where=folder, mend="run `clbench prepare` first")
        self.manifest: dict[str, Any] = read_json(folder / "manifest.json")
        self.name: str = self.manifest["name"]
        self.sha256: str = self.manifest["sha256"]
        """Digest over the content: stage dates, document rows, tokens, offsets and the tokenizer."""
        if check:
            self.check()

    def check(self) -> None:
        """Compare every file with the manifest."""
        for name, expected in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or sha256_file(path) != expected:
                raise IntegrityError(
                    "a file of the stream is missing or not what its manifest says",
                    where=path,
                    mend=f"delete {self.folder} and run `clbench prepare {self.name}`",
                )

    def stages(self) -> list[StageInfo]:
        """Return the stages in order."""
        return [StageInfo(**{k: s[k] for k in ("index", "name", "start", "end")}) for s in self.manifest["stages"]]

    @property
    def eos_id(self) -> int:
        """Token id that follows every document."""
        return int(self.manifest["tokenizer"]["eos_id"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def tokenizer_folder(self) -> Path:
        """Folder that ``transformers.AutoTokenizer.from_pretrained`` loads."""
        return self.folder / "tokenizer"

    def counts(self, split: Split, stage: int) -> dict[str, int]:
        """Return ``n_documents``, ``n_tokens`` (EOS included) and ``n_bytes`` (UTF-8 text) of one split of a stage."""
        counts: dict[str, int] = self.manifest["stages"][stage][split]
        return counts

    def tokens(self, split: Split, stage: int) -> NDArray[np.unsignedinteger[Any]]:
        """Return the packed tokens of one split of a stage, memory-mapped, shape ``[n_tokens]``."""
        return np.memmap(
            self.folder / "tokens" / f"{split}-{stage:02d}.bin",
            mode="r",
            dtype=self.manifest["tokenizer"]["dtype"],
        )

    def offsets(self, split: Split, stage: int) -> NDArray[np.int64]:
        """Return where each document starts in ``tokens``, and the end of the last; shape ``[n_documents + 1]``."""
        offsets: NDArray[np.int64] = np.load(self.folder / "tokens" / f"{split}-{stage:02d}.offsets.npy")
        return offsets

    def documents(self, split: Split, stage: int, columns: list[str] | None = None) -> pa.Table:
        """Return the documents of one split of a stage in packed order, with DOCUMENT_COLUMNS or some of them."""
        import pyarrow.parquet as pq

        folder = self.folder / "documents" / f"split={split}" / f"stage={stage:02d}"
        return pq.read_table(folder / "part-0.parquet", columns=columns, partitioning=None)
