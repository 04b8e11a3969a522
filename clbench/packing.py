"""Writes what a built stream consists of: tokenizer, documents, packed tokens, digests and the manifest.

One split of a stage is written in *pieces*, by any number of processes in any order, and joined in order at the end.
The digests are of content (rows, tokens, offsets), so they do not depend on the pieces or on who wrote the Parquet.
Where documents come from and which split they belong to is left to ``clbench.build`` and ``clbench.derive``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError, NotFoundError
from clbench.files import atomic_path, canonical_json, digest_of, read_json, sha256_bytes, sha256_file
from clbench.stream import DOCUMENT_COLUMNS, Change, Split, Stream

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

FORMAT = 1
EOS = "<|endoftext|>"
EOS_POLICY = "one after every document"
SPLITS: tuple[Split, ...] = get_args(Split)
ROW_GROUP_ROWS = 65_536
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_TRAINING_CHARACTERS = 1 << 30
"""Of stage 0's text, that a tokenizer is trained on at most."""


# --- tokenizer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What the manifest and the sidecars say about the tokenizer."""

    kind: str
    sha256: str
    eos_id: int
    vocab_size: int

    @property
    def dtype(self) -> str:
        """The smallest unsigned integer that holds every token id."""
        return "uint16" if self.vocab_size < 1 << 16 else "uint32"

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return asdict(self) | {"dtype": self.dtype, "bos": None, "eos": EOS_POLICY}


def train_tokenizer(batches: Iterable[Sequence[str]], vocab_size: int) -> Tokenizer:
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
    tokenizer.train_from_iterator(_at_most(batches, TOKENIZER_TRAINING_CHARACTERS), trainer)
    return tokenizer


def _at_most(batches: Iterable[Sequence[str]], n_characters: int) -> Iterable[Sequence[str]]:
    for batch in batches:
        yield batch
        n_characters -= sum(map(len, batch))
        if n_characters <= 0:
            return


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that ``AutoTokenizer`` reads, without importing transformers (seconds).

    ``tokenizer.json`` is laid out by our own rules, so its digest does not hang on a library's taste in JSON.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    content = (
        canonical_json(json.loads(tokenizer.to_str())),
        canonical_json(config),
        canonical_json({"eos_token": EOS}),
    )
    for name, text in zip(TOKENIZER_FILES, content, strict=True):
        _write(folder / name, text.encode())


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy somebody's tokenizer: a folder with ``tokenizer.json``, as ``save_pretrained`` writes it.

    Raises:
        NotFoundError: there is no ``tokenizer.json``; slow tokenizers cannot be used.
    """
    if not (source / "tokenizer.json").is_file():
        raise NotFoundError(
            "no tokenizer.json in this folder",
            where=source,
            mend="save the tokenizer in its fast form, or name another",
        )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            _write(folder / name, (source / name).read_bytes())


def open_tokenizer(folder: Path, kind: str) -> tuple[Tokenizer, TokenizerFacts]:
    """Return the tokenizer in a folder, set up for packing, and its facts.

    Raises:
        ConfigError: ``tokenizer.json`` cannot be read, or nothing says which token ends a text.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"not a tokenizer: {error}", where=path, mend="save it again, or name another") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab()
    facts = TokenizerFacts(
        kind=kind,
        sha256=sha256_file(path),
        eos_id=_eos_id(folder, vocabulary),
        vocab_size=max(vocabulary.values()) + 1,
    )
    return tokenizer, facts


def _eos_id(folder: Path, vocabulary: dict[str, int]) -> int:
    """Return the id of the end of text that the folder's files name, or of a well-known one."""
    named = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(folder / file).get("eos_token") if (folder / file).is_file() else None
        named.append(token.get("content") if isinstance(token, dict) else token)
    for token in (*named, EOS, "</s>", "<|end_of_text|>", "<eos>"):
        if token in vocabulary:
            return vocabulary[token]
    raise ConfigError(
        "nothing says which token ends a text", where=folder, mend='add {"eos_token": "…"} to tokenizer_config.json'
    )


# --- pieces -------------------------------------------------------------------------------------------------


class PieceWriter:
    """Writes one piece of one split of a stage; only after ``close`` does it count.

    Args:
        path: without a suffix; ``.parquet``, ``.bin``, ``.lengths``, ``.rows`` and, last, ``.json`` are added.
        dtype: of the tokens, see ``TokenizerFacts``.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype).newbyteorder("<")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._parquet: Any = None
        self._files = {suffix: _beside(path, suffix).open("wb") for suffix in (".bin", ".lengths", ".rows")}
        self._counts = Counter({"n_documents": 0, "n_tokens": 0, "n_bytes": 0})
        self._changes: Counter[str] = Counter()

    def add(self, table: pa.Table, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Append documents (DOCUMENT_COLUMNS but ``n_tokens``) and their tokens, EOS included; lengths ``[n]``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = table.append_column("n_tokens", pa.array(lengths)).select(list(DOCUMENT_COLUMNS))
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(_beside(self.path, ".parquet"), table.schema, **PARQUET)
        self._parquet.write_table(table, row_group_size=ROW_GROUP_ROWS)
        self._files[".bin"].write(tokens.astype(self.dtype, copy=False).tobytes())
        self._files[".lengths"].write(lengths.astype("<i8", copy=False).tobytes())
        self._files[".rows"].write(_row_lines(table))
        self._counts["n_documents"] += table.num_rows
        self._counts["n_tokens"] += len(tokens)
        self._counts["n_bytes"] += sum(table["n_bytes"].to_pylist())
        self._changes.update(table["change"].to_pylist())

    def close(self) -> None:
        """Finish the piece: its ``.json`` is written last."""
        for file in self._files.values():
            file.close()
        if self._parquet is not None:
            self._parquet.close()
        found = {"counts": dict(self._counts), "changes": dict(self._changes)}
        with atomic_path(_beside(self.path, ".json")) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")


PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "version": "2.6",
    "data_page_version": "1.0",
    "use_dictionary": ["date", "group", "change"],
    "write_statistics": True,
    "store_schema": False,
}
"""How every Parquet file is written, so that equal rows give equal files."""


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _write(path: Path, data: bytes) -> None:
    """Write plainly (numpy's tofile and save lose the errno that says the disk is full)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _row_lines(table: pa.Table) -> bytes:
    """Return what the digest of documents is taken of: one canonical line a row, texts by their own digest."""
    columns = [name for name in DOCUMENT_COLUMNS if name != "text"]
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    return "".join(canonical_json(list(row)) + "\n" for row in rows).encode()


def is_written(path: Path) -> bool:
    """Return whether a piece is complete."""
    return _beside(path, ".json").is_file()


def join(
    pieces: Sequence[Path], folder: Path, *, split: Split, stage: int, facts: TokenizerFacts
) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """Put the pieces of one split of a stage together in the stream's folder; the pieces stay as they are.

    Returns:
        Counts, documents per change kind, and digests of content.

    Raises:
        ConfigError: the split has no documents.
    """
    found = [read_json(_beside(piece, ".json")) for piece in pieces]
    counts = sum((Counter(one["counts"]) for one in found), Counter())
    changes = sum((Counter(one["changes"]) for one in found), Counter())
    full = [piece for piece, one in zip(pieces, found, strict=True) if one["counts"]["n_documents"]]
    place = folder / "documents" / f"split={split}" / f"stage={stage:02d}"
    place.mkdir(parents=True, exist_ok=True)
    for i, piece in enumerate(full):
        _link(_beside(piece, ".parquet"), place / f"part-{i}.parquet")
    lengths = [np.frombuffer(_beside(piece, ".lengths").read_bytes(), "<i8") for piece in full]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths or [np.zeros(0, np.int64)]))])
    stem = folder / "tokens" / f"{split}-{stage:02d}"
    stem.parent.mkdir(exist_ok=True)
    tokens_sha256 = _concatenate([_beside(piece, ".bin") for piece in full], _beside(stem, ".bin"))
    _write(_beside(stem, ".offsets.npy"), _npy(offsets))
    totals = {name: counts[name] for name in ("n_documents", "n_tokens", "n_bytes")}
    sidecar = totals | {"dtype": facts.dtype, "tokenizer_sha256": facts.sha256, "eos": EOS_POLICY}
    _write(_beside(stem, ".json"), (json.dumps(sidecar, indent=2) + "\n").encode())
    digests = {
        "documents": _concatenate([_beside(piece, ".rows") for piece in full], None),
        "tokens": tokens_sha256,
        "offsets": sha256_bytes(offsets.astype("<i8", copy=False).tobytes()),
    }
    return totals, {kind: changes[kind] for kind in get_args(Change)}, digests


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system knows no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _concatenate(sources: Sequence[Path], target: Path | None) -> str:
    """Write files one after another into ``target``; returns the SHA-256 of their bytes."""
    digest = hashlib.sha256()
    with (target or Path(os.devnull)).open("wb") as out:
        for source in sources:
            with source.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
    return digest.hexdigest()


def _npy(array: NDArray[Any]) -> bytes:
    """Return an array as the content of a ``.npy`` file."""
    from io import BytesIO

    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


# --- manifest -----------------------------------------------------------------------------------------------


def write_extras(extras: dict[str, bytes], folder: Path) -> None:
    """Write the files that a source gives besides its documents."""
    for name, data in extras.items():
        _write(folder / "extras" / name, data)


def write_manifest(
    folder: Path,
    *,
    about: dict[str, Any],
    facts: TokenizerFacts,
    entries: list[dict[str, Any]],
    contents: list[dict[str, Any]],
    seconds: dict[str, float],
) -> None:
    """Write the manifest, the last file: it lists all others.

    Args:
        folder: of the stream.
        about: name, address, builder, settings, duplicates, and what else describes this stream.
        facts: of the tokenizer.
        entries: one a stage, with its counts.
        contents: one a stage, the digests of what is in it.
        seconds: what building it took; in no digest.
    """
    infos = [{k: e[k] for k in ("index", "name", "start", "end")} for e in entries]
    files = {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    content = {"format": FORMAT, "tokenizer": facts.sha256, "stages": infos, "contents": contents}
    if extras := {name: digest for name, digest in files.items() if name.startswith("extras/")}:
        content["extras"] = extras
    manifest = {
        "format": FORMAT,
        "name": about["name"],
        "sha256": digest_of(content),
        **about,
        "tokenizer": facts.as_dict(),
        "stages": entries,
        "contents": contents,
        "files": files,
        "built_with": _built_with() | {"seconds": seconds},
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _built_with() -> dict[str, Any]:
    """Return the versions that wrote the files; they are no part of any digest."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {name: version(name) for name in ("numpy", "pyarrow", "tokenizers")}


def tokenizer_of(stream: Stream, folder: Path) -> TokenizerFacts:
    """Copy the tokenizer of a built stream into another's folder; returns its facts."""
    copy_tokenizer(stream.tokenizer_folder, folder)
    return open_tokenizer(folder, f"that of stream {stream.name}")[1]
