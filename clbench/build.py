"""Build a stream: documents of a source in, Parquet, a tokenizer, packed tokens and a manifest out.

The steps, top to bottom in ``_build``: read and check every stage, split by identity, find duplicates, train
the tokenizer on stage 0, tokenise and write. Layout and columns: ``clbench.stream``. The folder appears in
one rename when it is complete. What a document is, and where it comes from, is left to the source.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from clbench import home
from clbench.duplicates import PARAMETERS, DuplicateIndex, near_duplicates, near_repeats
from clbench.errors import ClbenchError, ConfigError
from clbench.files import (
    atomic_folder,
    canonical_json,
    digest_of,
    exclusive,
    explain_os_errors,
    read_json,
    sha256_bytes,
    sha256_file,
)
from clbench.stream import DOCUMENT_COLUMNS, Change, Document, Split, StageInfo, Stream, StreamSource

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

BUILDER_VERSION = 1
"""Part of every stream's address: raise it whenever the same source would give other bytes."""
FORMAT = 1
EOS = "<|endoftext|>"
EOS_POLICY = "one after every document"
SPLITS: tuple[Split, ...] = get_args(Split)
LOCK_SECONDS = 3600.0
BATCH_DOCUMENTS = 1024
ROW_GROUP_ROWS = 65_536

Step = Callable[[str], None]


def stream_folder(source: StreamSource) -> Path:
    """Return where the built stream of this source lives: its name and a digest of what decides its content.

    Raises:
        ConfigError: the source's name, split or settings cannot be used.
    """
    return _folder(source, _address(source))


def _folder(source: StreamSource, address: str) -> Path:
    """Return the folder of an address."""
    return home.streams_folder() / f"{source.name}-{address[:12]}"


def build_stream(source: StreamSource, *, progress: bool = True) -> Stream:
    """Build a stream, or return it at once if it is already there complete.

    Two processes may ask for the same stream: the second waits for the first. A kill or a full disk leaves no
    folder that looks complete.

    Raises:
        ConfigError: the source breaks its contract (names, dates, an id twice in a stage, an empty stage).
        OfflineError: the source has to fetch something and no network answers.
        BusyError: another process has been building this stream for an hour.
        ClbenchError: the disk is full or the cache folder cannot be written.
    """
    address = _address(source)
    folder = _folder(source, address)
    if (stream := _complete(folder, address)) is not None:
        return stream
    with explain_os_errors(folder):
        lock = exclusive(
            folder.parent / ".locks" / folder.name,
            mend="wait for it to end, or end it",
            timeout_seconds=LOCK_SECONDS,
        )
        with lock:
            if (stream := _complete(folder, address)) is not None:
                return stream
            _remove_leftovers(folder)
            source.fetch()
            with atomic_folder(folder) as temporary, _bar(source.name, enabled=progress) as bar:
                _build(source, temporary, bar)
    return Stream(folder)


def _address(source: StreamSource) -> str:
    """Return the digest of everything that decides the content of the built stream."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", source.name):
        raise ConfigError(
            "a stream's name may hold a-z, 0-9, '_', '-' and '.'", where=repr(source.name), mend="rename it"
        )
    if not 0.0 < source.heldout_fraction < 1.0:
        raise ConfigError(
            f"heldout_fraction is {source.heldout_fraction}",
            where=source.name,
            mend="choose one between 0 and 1",
        )
    if source.heldout_max_documents is not None and source.heldout_max_documents < 1:
        raise ConfigError(
            f"heldout_max_documents is {source.heldout_max_documents}",
            where=source.name,
            mend="choose at least 1",
        )
    if source.vocab_size < 257:
        raise ConfigError(
            f"vocab_size is {source.vocab_size}",
            where=source.name,
            mend="choose at least 257: 256 bytes and the end of text",
        )
    try:
        return digest_of(_settings(source) | {"builder": BUILDER_VERSION, "duplicates": PARAMETERS})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"settings() is not JSON-able: {error}",
            where=source.name,
            mend="return numbers, text, lists and dicts",
        ) from None


def _settings(source: StreamSource) -> dict[str, Any]:
    """Return the settings that decide the content, as they stand in the manifest."""
    return {
        "name": source.name,
        "source": source.settings(),
        "heldout_fraction": source.heldout_fraction,
        "heldout_max_documents": source.heldout_max_documents,
        "vocab_size": source.vocab_size,
    }


def _complete(folder: Path, address: str) -> Stream | None:
    """Return the stream if a complete one with this address is there."""
    try:
        manifest = read_json(folder / "manifest.json")
    except ClbenchError:
        return None
    fits = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return Stream(folder) if fits and manifest.get("address") == address else None


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed build of this stream left beside its folder (the lock is held)."""
    for path in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _build(source: StreamSource, folder: Path, bar: Bar) -> None:
    """Write the whole stream into an empty folder, the manifest last."""
    stages = _checked_stages(source)
    bar.total(2 * len(stages) + 2)
    scratch = folder / "scratch"
    scratch.mkdir()
    index = DuplicateIndex()
    read = []
    for stage in stages:
        bar.step(f"reading stage {stage.name}")
        read.append(_read_stage(source, stage, index, scratch))
    bar.step("comparing train and held-out")
    _drop_duplicates(read, index, source.heldout_max_documents)
    bar.step("training the tokenizer on stage 0")
    tokenizer = _train_tokenizer(_kept_texts(read[0], "train"), source.vocab_size)
    about = _save_tokenizer(tokenizer, folder / "tokenizer")
    entries, contents = [], []
    for stage_read in read:
        bar.step(f"tokenising stage {stage_read.stage.name}")
        entry, content = _write_stage(stage_read, tokenizer, about, folder)
        entries.append(entry)
        contents.append(content)
    shutil.rmtree(scratch)
    _write_manifest(source, folder, about, entries, contents)


# --- reading ------------------------------------------------------------------------------------------------


@dataclass
class _Read:
    """One stage between reading and writing. The rows stand in ``path``; arrays have one element per row."""

    stage: StageInfo
    path: Path
    id_hash: NDArray[np.uint64]
    heldout: NDArray[np.bool_]
    number: NDArray[np.int64]
    """Of the normalised text in the DuplicateIndex."""
    keep: NDArray[np.bool_]
    extra: dict[Split, dict[str, int]] = field(default_factory=dict)
    """Counts of duplicates for the manifest."""

    def kept(self, split: Split) -> NDArray[np.bool_]:
        """Return the mask of the rows that this split ends up with."""
        return self.keep & (self.heldout if split == "heldout" else ~self.heldout)


def _checked_stages(source: StreamSource) -> list[StageInfo]:
    """Return the source's stages; they must be numbered in order, each with its own name and real dates."""
    stages = source.stages()
    if not stages or [s.index for s in stages] != list(range(len(stages))):
        raise ConfigError(
            f"stages are numbered {[s.index for s in stages]}",
            where=source.name,
            mend="number them 0, 1, 2 …",
        )
    if len({s.name for s in stages}) < len(stages):
        raise ConfigError("two stages have the same name", where=source.name, mend="give each its own")
    for stage in stages:
        if not (_is_date(stage.start) and _is_date(stage.end) and stage.start <= stage.end):
            raise ConfigError(
                f"the dates {stage.start!r} to {stage.end!r} are not a period",
                where=f"{source.name} stage {stage.name}",
                mend="write them as 2013-05-01, the earlier one first",
            )
    return stages


def _is_date(text: str) -> bool:
    """Tell whether a text starts with an ISO-8601 date that exists."""
    try:
        date.fromisoformat(text[:10])
    except ValueError:
        return False
    return True


def identity_hash(document_id: str) -> int:
    """Return 64 bits of the SHA-256 of an identity; they decide its split in every stage of every stream."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big")


def _read_stage(source: StreamSource, stage: StageInfo, index: DuplicateIndex, scratch: Path) -> _Read:
    """Read and check the documents of one stage and set them down in a scratch file."""
    documents = []
    seen: set[str] = set()
    for document in source.documents(stage.index):
        _check_document(document, seen, f"{source.name} stage {stage.name}")
        seen.add(document.id)
        documents.append(document)
    id_hash = np.array([identity_hash(d.id) for d in documents], np.uint64)
    path = scratch / f"{stage.index:02d}.parquet"
    _write_parquet(_table(documents), path)
    return _Read(
        stage=stage,
        path=path,
        id_hash=id_hash,
        heldout=id_hash < np.uint64(int(source.heldout_fraction * 2.0**64)),
        number=index.add([d.text for d in documents]),
        keep=np.ones(len(documents), bool),
    )


def _check_document(document: Document, seen: set[str], where: str) -> None:
    """Refuse a document that breaks the contract, saying which."""
    problem = None
    if not document.id or document.id in seen:
        problem = "comes twice in one stage" if document.id else "has an empty id"
    elif not document.text:
        problem = "has no text"
    elif document.change not in get_args(Change):
        problem = f"has the change kind {document.change!r}, not one of {', '.join(get_args(Change))}"
    elif not _is_date(document.date):
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


def _table(documents: list[Document]) -> pa.Table:
    """Return documents as a table with DOCUMENT_COLUMNS but ``n_tokens``."""
    import pyarrow as pa

    encoded = [d.text.encode() for d in documents]
    columns = {name: pa.array([getattr(d, name) for d in documents], pa.string()) for name in DOCUMENT_COLUMNS[:5]}
    columns["n_bytes"] = pa.array([len(e) for e in encoded], pa.int64())
    columns["sha256"] = pa.array([sha256_bytes(e) for e in encoded], pa.string())
    return pa.table(columns)


def _write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table the same way every time."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=3,
        version="2.6",
        data_page_version="1.0",
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=["date", "group", "change"],
        write_statistics=True,
        store_schema=False,
    )


def _kept_table(read: _Read, split: Split) -> pa.Table:
    """Return the rows of one split of a stage, in the source's order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(read.path, partitioning=None).filter(pa.array(read.kept(split)))


def _kept_texts(read: _Read, split: Split) -> list[str]:
    """Return the texts of one split of a stage."""
    texts: list[str] = _kept_table(read, split)["text"].to_pylist()
    return texts


# --- duplicates ---------------------------------------------------------------------------------------------


def _drop_duplicates(stages: list[_Read], index: DuplicateIndex, heldout_max: int | None) -> None:
    """Drop from held-out what any stage trains on, exactly or nearly, then cap it; count what repeats."""
    trained = np.unique(np.concatenate([s.number[~s.heldout] for s in stages]))
    asked = np.setdiff1d(np.concatenate([s.number[s.heldout] for s in stages]), trained)
    near = asked[near_duplicates(index.signatures(asked), index.signatures(trained))]
    earlier = np.zeros(0, np.int64)
    for stage in stages:
        exact_rows = stage.heldout & np.isin(stage.number, trained)
        near_rows = stage.heldout & np.isin(stage.number, near)
        stage.keep &= ~(exact_rows | near_rows)
        n_capped = _cap(stage, heldout_max)
        stage.extra["heldout"] = {
            "dropped_exact": int(exact_rows.sum()),
            "dropped_near": int(near_rows.sum()),
            "dropped_over_cap": n_capped,
        } | _repeats(stage, "heldout", index)
        stage.extra["train"] = _repeats(stage, "train", index) | {
            "repeated_from_earlier_stage": int(np.isin(stage.number[~stage.heldout], earlier).sum())
        }
        earlier = np.union1d(earlier, stage.number[~stage.heldout])


def _cap(stage: _Read, heldout_max: int | None) -> int:
    """Keep the held-out documents with the smallest identity hashes; return how many went (none trains)."""
    rows = np.flatnonzero(stage.kept("heldout"))
    if heldout_max is None or len(rows) <= heldout_max:
        return 0
    surplus = rows[np.argsort(stage.id_hash[rows], kind="stable")[heldout_max:]]
    stage.keep[surplus] = False
    return len(surplus)


def _repeats(stage: _Read, split: Split, index: DuplicateIndex) -> dict[str, int]:
    """Count the kept documents of a split that repeat an earlier one of the same stage (another identity)."""
    numbers = stage.number[stage.kept(split)]
    unique, first = np.unique(numbers, return_index=True)
    unique = unique[np.argsort(first)]
    return {
        "repeated_exact": len(numbers) - len(unique),
        "repeated_near": int(near_repeats(index.signatures(unique)).sum()),
    }


# --- tokenizer ----------------------------------------------------------------------------------------------


def _train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; every byte is in its alphabet, so any text is encoded without loss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class _About:
    """What the manifest and the sidecars say about the tokenizer."""

    sha256: str
    eos_id: int
    vocab_size: int

    @property
    def dtype(self) -> str:
        """The smallest unsigned integer that holds every token id."""
        return "uint16" if self.vocab_size < 1 << 16 else "uint32"


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> _About:
    """Write the files that ``AutoTokenizer`` reads, without importing transformers (seconds).

    ``tokenizer.json`` is laid out by our own rules, so its digest does not hang on a library's taste in JSON.
    """
    folder.mkdir()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    content = canonical_json(json.loads(tokenizer.to_str()))
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(canonical_json(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(canonical_json({"eos_token": EOS}), encoding="utf-8")
    eos_id = tokenizer.encode(EOS, add_special_tokens=False).ids[0]
    return _About(sha256_bytes(content.encode()), eos_id, tokenizer.get_vocab_size())


def _encode(tokenizer: Tokenizer, texts: list[str], about: _About) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the packed tokens ``[n_tokens]`` with an EOS after every text, and the offsets ``[n + 1]``.

    The text ``<|endoftext|>`` inside a document is encoded as the characters it is, never as the end of one.
    """
    tokenizer.encode_special_tokens = True
    parts: list[NDArray[Any]] = []
    lengths: list[int] = []
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH_DOCUMENTS]):
            parts.append(np.array([*encoding.ids, about.eos_id], about.dtype))
            lengths.append(len(parts[-1]))
    return np.concatenate(parts), np.cumsum([0, *lengths], dtype=np.int64)


# --- writing ------------------------------------------------------------------------------------------------


def _write_stage(
    read: _Read, tokenizer: Tokenizer, about: _About, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write both splits of a stage; return its manifest entry and the digests of its content."""
    entry: dict[str, Any] = asdict(read.stage)
    changes: dict[str, dict[str, int]] = {}
    content: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        table = _kept_table(read, split)
        if not table.num_rows:
            raise ConfigError(
                f"stage {read.stage.name} has no {split} documents",
                where=f"{int(read.heldout.sum())} of {len(read.keep)} documents are held out, "
                f"{int((~read.keep).sum())} of them dropped",
                mend="give it more documents, or change heldout_fraction",
            )
        counts, digests = _write_split(table, f"{split}-{read.stage.index:02d}", split, tokenizer, about, folder)
        entry[split] = counts | read.extra[split]
        content[split] = digests
        found = Counter(table["change"].to_pylist())
        changes[split] = {kind: found[kind] for kind in get_args(Change)}
    return entry | {"changes": changes}, content


def _write_split(
    table: pa.Table, stem: str, split: Split, tokenizer: Tokenizer, about: _About, folder: Path
) -> tuple[dict[str, int], dict[str, str]]:
    """Write Parquet, packed tokens, offsets and sidecar; return counts and content digests."""
    import pyarrow as pa

    tokens, offsets = _encode(tokenizer, table["text"].to_pylist(), about)
    table = table.append_column("n_tokens", pa.array(np.diff(offsets))).select(list(DOCUMENT_COLUMNS))
    stage = stem.rpartition("-")[2]
    _write_parquet(table, folder / "documents" / f"split={split}" / f"stage={stage}" / "part-0.parquet")
    counts = {
        "n_documents": table.num_rows,
        "n_tokens": len(tokens),
        "n_bytes": sum(table["n_bytes"].to_pylist()),
    }
    sidecar = counts | {"dtype": about.dtype, "tokenizer_sha256": about.sha256, "eos": EOS_POLICY}
    place = folder / "tokens"
    place.mkdir(exist_ok=True)
    # Plain writes: numpy's tofile and save lose the errno that says the disk is full.
    (place / f"{stem}.bin").write_bytes(_little_endian(tokens))
    (place / f"{stem}.offsets.npy").write_bytes(_npy(offsets))
    (place / f"{stem}.json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
    digests = {
        "documents": _documents_digest(table),
        "tokens": sha256_bytes(_little_endian(tokens)),
        "offsets": sha256_bytes(_little_endian(offsets)),
    }
    return counts, digests


def _little_endian(array: NDArray[Any]) -> bytes:
    """Return the bytes of an integer array as every machine should store them."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _npy(array: NDArray[Any]) -> bytes:
    """Return an array as the content of a ``.npy`` file."""
    from io import BytesIO

    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _documents_digest(table: pa.Table) -> str:
    """Return a digest of the rows (texts by their own digest), whatever wrote the Parquet file."""
    digest = hashlib.sha256()
    columns = [name for name in DOCUMENT_COLUMNS if name != "text"]
    for row in table.select(columns).to_pylist():
        digest.update((canonical_json([row[name] for name in columns]) + "\n").encode())
    return digest.hexdigest()


def _write_manifest(
    source: StreamSource,
    folder: Path,
    about: _About,
    entries: list[dict[str, Any]],
    contents: list[dict[str, Any]],
) -> None:
    """Write the manifest, the last file: it lists all others."""
    infos = [{k: e[k] for k in ("index", "name", "start", "end")} for e in entries]
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "name": source.name,
        "sha256": digest_of({"format": FORMAT, "tokenizer": about.sha256, "stages": infos, "contents": contents}),
        "address": _address(source),
        "builder": BUILDER_VERSION,
        "settings": _settings(source),
        "duplicates": PARAMETERS,
        "tokenizer": {
            "kind": "byte-level BPE trained on the train documents of stage 0",
            "sha256": about.sha256,
            "eos_id": about.eos_id,
            "vocab_size": about.vocab_size,
            "dtype": about.dtype,
            "bos": None,
            "eos": EOS_POLICY,
        },
        "stages": entries,
        "contents": contents,
        "files": {p.relative_to(folder).as_posix(): sha256_file(p) for p in paths},
        "built_with": _built_with(),
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _built_with() -> dict[str, str]:
    """Return the versions that wrote the files; they are no part of any digest."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {name: version(name) for name in ("numpy", "pyarrow", "tokenizers")}


# --- progress -----------------------------------------------------------------------------------------------


@dataclass
class Bar:
    """A progress bar in steps of unequal length; both functions do nothing when it is off."""

    total: Callable[[int], None]
    step: Step


@contextmanager
def _bar(name: str, *, enabled: bool) -> Iterator[Bar]:
    """Show a bar on stderr when that is a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield Bar(total=lambda _: None, step=lambda _: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(f"{name}: starting", total=None)
        started = False

        def step(what: str) -> None:
            nonlocal started
            display.update(task, description=f"{name}: {what}", advance=1 if started else 0)
            started = True

        yield Bar(total=lambda n: display.update(task, total=n), step=step)
