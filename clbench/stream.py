"""The stream contract: dated documents in stages, and the built stream that everything else reads.

A *source* (content, in ``streams/``) yields documents; ``clbench.build`` turns it once into Parquet, packed tokens
and a manifest; a *Stream* reads that folder. Sources may use the network while they are built, streams never do.

Layout of a built stream (every file but the manifest is listed there with its sha256; the manifest is written last):

    manifest.json                                        see Manifest
    documents/split=train/stage=00/part-0.parquet …      columns DOCUMENT_COLUMNS; the parts are read in order
    documents/split=heldout/stage=00/part-0.parquet
    tokenizer/                                           loadable by transformers.AutoTokenizer
    tokens/train-00.bin  train-00.offsets.npy            uint16 or uint32 token ids, document starts (int64, n+1)
    tokens/train-00.json                                 what the two hold: tokenizer, counts, type, EOS policy
    tokens/heldout-00.bin ...                            every document is followed by one EOS
    extras/NAME                                          what a suite of this stream needs besides, see ``extras``
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from clbench.errors import IntegrityError, NeedError, NotFoundError
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


_VERSION_MARK = re.compile(r"@@\d+$")


def identity_of(document_id: str) -> str:
    """Return the identity over time: an id without the ``@@2`` that tells versions apart which meet in one stage."""
    return _VERSION_MARK.sub("", document_id)


class StreamSource(ABC):
    """What a file in ``streams/`` provides; the class is found by the file's name, see ``clbench.registry``.

    ``settings`` are hashed into the address of the built stream: whatever changes the documents belongs in them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """A docstring under each field is its help text."""

    name: str
    heldout_fraction: float = 0.1
    """Share of document identities (by hash of the id) that never train."""
    heldout_max_documents: int | None = None
    """Per stage; the identities with the smallest hashes are kept."""
    heldout_max_per_group: int | None = None
    """Per stage and group, likewise, so that every group has a matrix of its own."""
    vocab_size: int = 4096
    """Of the byte-level BPE that is trained on stage 0."""
    tokenizer: str | None = None
    """A tokenizer to use instead: ``stream:NAME`` (that of another built stream), ``model:NAME`` (a pretrained
    model's, see ``clbench prepare``), or a folder with tokenizer.json."""
    recipe: Mapping[str, Any] | None = None
    """What the registry made this source from, so that worker processes can make it again; None: no workers."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

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

    def n_parts(self, stage: int) -> int:
        """Return into how many parts a stage falls; parts are read in parallel and are what a cut build resumes at."""
        return 1

    def part(self, stage: int, part: int) -> Iterator[Document]:
        """Yield one part; the parts one after another are ``documents(stage)``."""
        return self.documents(stage)

    def extras(self) -> dict[str, bytes]:
        """Return files, by name, that a suite of this stream needs besides: questions with known answers, say."""
        return {}

    def late_extras(self) -> Mapping[str, int]:
        """Return the files that can be made after the build, each with the version of what makes it.

        They are no part of the built stream and of no digest of it, so a suite may ask more of a stream than was
        thought of when it was built. ``clbench.late`` makes and keeps them.
        """
        return {}

    def late_extra(self, name: str) -> bytes:
        """Return such a file, made from what ``fetch`` brought and without a network; the same on every machine.

        Raises:
            NotFoundError: this stream has none of this name, or what it is made from is not there.
        """
        raise NotFoundError(f"stream {self.name!r} has no {name}", mend="measure it on a stream that has")


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
        self.base_sha256: str = self.manifest.get("base_sha256", self.sha256)
        """Digest of the stream whose stage 0 this is. A transform that leaves stage 0 as it was shares its base."""
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
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = self.document_files(split, stage)
        return pa.concat_tables([pq.read_table(path, columns=columns, partitioning=None) for path in parts])

    def document_batches(
        self, split: Split, stage: int, columns: list[str] | None = None, *, n_rows: int = 1024
    ) -> Iterator[pa.RecordBatch]:
        """Yield the same documents in batches of at most ``n_rows``: bounded memory for stages of any size."""
        import pyarrow.parquet as pq

        for path in self.document_files(split, stage):
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=n_rows, columns=columns)

    def document_files(self, split: Split, stage: int) -> list[Path]:
        """Return the Parquet files of one split of a stage, in order."""
        folder = self.folder / "documents" / f"split={split}" / f"stage={stage:02d}"
        return sorted(folder.glob("part-*.parquet"), key=lambda path: int(path.stem.removeprefix("part-")))

    def extra(self, name: str) -> bytes:
        """Return the content of a file that the source gave besides its documents.

        Raises:
            NotFoundError: the stream has no such file.
        """
        path = self.folder / "extras" / name
        if not re.fullmatch(r"[\w.-]+", name) or f"extras/{name}" not in self.manifest["files"]:
            raise NotFoundError(
                f"stream {self.name!r} holds no {name}", where=self.folder, mend="measure it on a stream that has it"
            )
        return path.read_bytes()

    def until(self, stage: int) -> Stream:
        """Return this stream as it looks when ``stage`` is the newest: what comes later cannot be read."""
        return _Past(self, stage)


class _Past(Stream):
    """A stream whose stages after ``last`` have not happened yet."""

    def __init__(self, stream: Stream, last: int) -> None:
        self.folder, self.manifest, self.name, self.sha256 = stream.folder, stream.manifest, stream.name, stream.sha256
        self.base_sha256 = stream.base_sha256
        self.last = last
        self.manifest = {**stream.manifest, "stages": stream.manifest["stages"][: last + 1]}

    def _past(self, stage: int) -> None:
        if not 0 <= stage <= self.last:
            raise NeedError(
                f"stage {stage} of stream {self.name!r} has not happened yet",
                where=f"stage {self.last}",
                mend="read this and earlier stages only",
            )

    def counts(self, split: Split, stage: int) -> dict[str, int]:
        self._past(stage)
        return super().counts(split, stage)

    def tokens(self, split: Split, stage: int) -> NDArray[np.unsignedinteger[Any]]:
        self._past(stage)
        return super().tokens(split, stage)

    def offsets(self, split: Split, stage: int) -> NDArray[np.int64]:
        self._past(stage)
        return super().offsets(split, stage)

    def document_files(self, split: Split, stage: int) -> list[Path]:
        self._past(stage)
        return super().document_files(split, stage)

    def extra(self, name: str) -> bytes:
        raise NeedError(
            f"extra file {name!r} of stream {self.name!r} tells what comes later",
            where=f"stage {self.last}",
            mend="methods learn from documents only",
        )

    def until(self, stage: int) -> Stream:
        self._past(stage)
        return super().until(stage)
