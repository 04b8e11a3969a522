"""Checkpoints as sources of single tensors, and a writer of shards that keeps one tensor in memory.

A source is a Hugging Face folder (one safetensors file or shards with their index), one safetensors file, or a dict of
live tensors. Pickled weights are refused. ``check_compatible`` names the first difference between sources before
anything is merged. What is computed is ``kernels``' business.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import digest_of, read_json, sha256_file, write_json
from clbench.method import Weights

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MERGED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""What is merged. Anything else (counters, masks, quantised codes) must be equal in all sources and is copied."""
HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
COMPUTED_BY = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "tie_word_embeddings",
    "sliding_window",
)
"""Fields of a configuration that change what equal weights compute."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_merged(self) -> bool:
        """Whether it is of a floating type that can be merged."""
        return self.dtype in MERGED


class TensorSource(ABC):
    """Tensors by name, read one at a time."""

    name: str
    layout: dict[str, TensorInfo]
    folder: Path | None = None

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; not to be written to."""

    def done(self, name: str) -> None:
        """Say that a tensor is not used any more."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration; empty where none lies beside the weights."""
        path = self.folder / "config.json" if self.folder else None
        return dict(read_json(path)) if path and path.is_file() else {}


class LiveSource(TensorSource):
    """Tensors in memory, such as the weights that a method releases."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.name, self.weights = name, weights
        self.layout = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in weights.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor itself."""
        return self.weights[name].detach()


class FileSource(TensorSource):
    """Safetensors files, mapped into memory: what is read of them can be given back."""

    def __init__(self, files: Sequence[Path], name: str, *, prefix: str = "", folder: Path | None = None) -> None:
        self.name, self.folder, self.files = name, folder, list(files)
        self.layout = {}
        self._maps: list[mmap.mmap] = []
        self._places: dict[str, tuple[int, int]] = {}  # name -> file, first byte
        for number, file in enumerate(files):
            entries, begin = _header(file)
            with file.open("rb") as opened:
                self._maps.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
            ordered = sorted(entries.items(), key=lambda item: int(item[1]["data_offsets"][0]))
            for key, entry in ordered:
                if not key.startswith(prefix):
                    continue
                short = key.removeprefix(prefix)
                if short in self.layout:
                    raise IntegrityError(f"tensor {key} stands in two files", where=file)
                self.layout[short] = TensorInfo(_dtype(entry["dtype"], key, file), tuple(entry["shape"]))
                self._places[short] = number, begin + int(entry["data_offsets"][0])

    def read(self, name: str) -> torch.Tensor:
        """Return a view of the file."""
        info, (number, begin) = self.layout[name], self._places[name]
        if not info.n_bytes:
            return torch.empty(info.shape, dtype=info.dtype)
        mapped, n_values = self._maps[number], math.prod(info.shape)
        if begin % info.dtype.itemsize:  # a file written by hand
            raw = torch.frombuffer(bytearray(mapped[begin : begin + info.n_bytes]), dtype=info.dtype)
        else:
            raw = torch.frombuffer(mapped, dtype=info.dtype, count=n_values, offset=begin)
        return raw.reshape(info.shape)

    def done(self, name: str) -> None:
        """Give the memory of a tensor back; its pages can be read again."""
        info, (number, begin) = self.layout[name], self._places[name]
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        n_whole = (begin + info.n_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if n_whole > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[number].madvise(mmap.MADV_DONTNEED, first, n_whole)


def open_source(
    place: Path | str | Weights | TensorSource, name: str | None = None, *, prefix: str = ""
) -> TensorSource:
    """Return a source of tensors.

    Args:
        place: a checkpoint folder, a safetensors file, tensors by name, or a source.
        name: what messages call it; the folder's name by default.
        prefix: take only tensors whose name begins so, and cut it off: ``exp_avg_sq/`` of a resume state.

    Raises:
        NotFoundError: no such place.
        IntegrityError: no safetensors there, or damaged ones.
    """
    if isinstance(place, TensorSource):
        return place
    if isinstance(place, Mapping):
        cut = {key.removeprefix(prefix): tensor for key, tensor in place.items() if key.startswith(prefix)}
        return LiveSource(cut, name or "live weights")
    path = Path(place)
    if path.is_file():
        return FileSource([path], name or path.name, prefix=prefix)
    if not path.is_dir():
        raise NotFoundError("checkpoint folder is missing", where=path, mend="give a folder with safetensors")
    return FileSource(_weight_files(path), name or path.name, prefix=prefix, folder=path)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 and not (folder / "adapter_config.json").is_file():
        return files
    if files:
        adapter = (folder / "adapter_config.json").is_file()
        what = "an adapter is not a whole model" if adapter else "several safetensors files and no index"
        mend = "merge it into its base first" if adapter else f"add {INDEX}, or save with save_pretrained"
        raise IntegrityError(what, where=folder, mend=mend)
    pickled = [path for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    what = "pickled weights are not read" if pickled else "no safetensors file in this checkpoint"
    raise IntegrityError(what, where=folder, mend="save it with save_pretrained, which writes safetensors")


def _indexed(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise IntegrityError("the index maps no weights", where=folder / INDEX, mend="copy it again")
    files = []
    for name in sorted(set(map(str, places.values()))):
        if Path(name).name != name:
            raise IntegrityError(f"the index points outside its folder: {name}", where=folder / INDEX)
        if not (folder / name).is_file():
            raise IntegrityError(f"shard {name} is missing", where=folder, mend="copy it again")
        files.append(folder / name)
    found = {key: file.name for file in files for key in _header(file)[0]}
    for key in sorted(found.keys() | places.keys()):
        if found.get(key) != places.get(key):
            raise IntegrityError(f"index and shards disagree about tensor {key}", where=folder, mend="copy it again")
    return files


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the entries of a safetensors file, which the library has checked, and where its data begin."""
    try:
        with safe_open(file, framework="pt"), file.open("rb") as opened:  # checks sizes, bounds and overlaps
            n_header = int.from_bytes(opened.read(8), "little")
            entries: dict[str, Any] = json.loads(opened.read(n_header))
    except (SafetensorError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntegrityError(f"weights are corrupted: {reason}", where=file, mend="copy them again") from None
    entries.pop("__metadata__", None)
    return entries, 8 + n_header


def _dtype(code: str, key: str, file: Path) -> torch.dtype:
    if code not in DTYPES:
        raise IntegrityError(f"tensor {key} is of type {code}, which is not read", where=file, mend="save another type")
    return DTYPES[code]


# --- what must agree --------------------------------------------------------------------------------------------------


def check_compatible(sources: Sequence[TensorSource], *, mixed_dtypes: bool = False) -> dict[str, str]:
    """Refuse sources that cannot be merged; the first one is the tuned model that the others are compared with.

    Args:
        sources: tuned, base and other models.
        mixed_dtypes: allow tensors of different floating types; the result has the tuned model's.

    Returns:
        Names stored twice because their weights are tied -> the name under which they are merged.

    Raises:
        ConfigError: names, shapes, types, tied weights, configurations, tokenizers or integer buffers differ; the
            message names the tensor and the model.
    """
    tuned, *others = sources
    for other in others:
        _check_layout(tuned, other, mixed_dtypes)
        _check_config(tuned, other)
        _check_tokenizer(tuned, other)
        _check_buffers(tuned, other)
    return _tied(sources)


def _refuse(what: str, tuned: TensorSource, other: TensorSource, mend: str) -> ConfigError:
    return ConfigError(f"{what}: {tuned.name} and {other.name} cannot be merged", mend=mend)


def _check_layout(tuned: TensorSource, other: TensorSource, mixed_dtypes: bool) -> None:
    for key in sorted(tuned.layout.keys() ^ other.layout.keys()):
        owner, lacks = (tuned, other) if key in tuned.layout else (other, tuned)
        tied = " (are its embeddings tied?)" if key in HEADS else ""
        raise _refuse(
            f"tensor {key} is in {owner.name} and not in {lacks.name}{tied}", tuned, other, "give two of one make"
        )
    for key, info in tuned.layout.items():
        theirs = other.layout[key]
        if info.shape != theirs.shape:
            what = f"tensor {key} has shape {info.shape} in {tuned.name} and {theirs.shape} in {other.name}"
            raise _refuse(what, tuned, other, "nothing is cut or padded; give models of equal size and vocabulary")
        if info.dtype != theirs.dtype and not (mixed_dtypes and info.is_merged and theirs.is_merged):
            what = f"tensor {key} is {_short(info)} in {tuned.name} and {_short(theirs)} in {other.name}"
            raise _refuse(what, tuned, other, "save both in one type, or allow mixed types")


def _short(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _check_config(tuned: TensorSource, other: TensorSource) -> None:
    ours, theirs = tuned.config, other.config
    pairs = {key: (ours[key], theirs[key]) for key in COMPUTED_BY if key in ours and key in theirs}
    if ours and theirs:
        pairs |= {f"rope {key}": (_rope(ours).get(key), _rope(theirs).get(key)) for key in _rope(ours) | _rope(theirs)}
    for key, (a, b) in pairs.items():
        if a != b and a is not None and b is not None:
            raise _refuse(
                f"config.json: {key} is {a} in {tuned.name} and {b} in {other.name}", tuned, other, "compare them"
            )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings, which older configurations spell otherwise; nested ones are compared as they are."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    given["rope_type"] = given.pop("type", given.get("rope_type", "default"))
    given.setdefault("rope_theta", config.get("rope_theta"))
    return given


def _check_tokenizer(tuned: TensorSource, other: TensorSource) -> None:
    ours, theirs = tokenizer_sha256(tuned.folder), tokenizer_sha256(other.folder)
    if ours and theirs and ours != theirs:
        raise _refuse("their tokenizers differ", tuned, other, "equal ids must mean equal text in both")


def tokenizer_sha256(folder: Path | None) -> str | None:
    """Return a digest of which text gets which ids, or None where no tokenizer lies in the folder.

    Settings of padding, truncation and chat, and the spelling of the file, do not count.
    """
    if folder is None:
        return None
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json")
        model = dict(whole.get("model") or {})
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
        added = [(token.get("id"), token.get("content")) for token in whole.get("added_tokens") or []]
        parts = {"kind": model.get("type"), "vocab": model.get("vocab"), "merges": merges, "added": added}
        return digest_of(parts | {key: whole.get(key) for key in ("normalizer", "pre_tokenizer")})
    files = [folder / name for name in ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")]
    digests = {file.name: sha256_file(file) for file in files if file.is_file()}
    return digest_of(digests) if digests else None


def _check_buffers(tuned: TensorSource, other: TensorSource) -> None:
    for key, info in tuned.layout.items():
        if not info.is_merged and not torch.equal(as_bytes(tuned.read(key)), as_bytes(other.read(key))):
            what = f"tensor {key} ({_short(info)}) differs, and such values are copied, never merged"
            raise _refuse(what, tuned, other, "give models that agree in it")


def _tied(sources: Sequence[TensorSource]) -> dict[str, str]:
    """Return heads that are stored although they are tied, with their twins."""
    tuned = sources[0]
    if not tuned.config.get("tie_word_embeddings"):
        return {}
    return {head: _twin(head, sources) for head in HEADS if head in tuned.layout}


def _twin(head: str, sources: Sequence[TensorSource]) -> str:
    tuned = sources[0]
    for key, info in tuned.layout.items():
        fits = key != head and info == tuned.layout[head]
        if fits and all(torch.equal(as_bytes(one.read(head)), as_bytes(one.read(key))) for one in sources):
            return key
    raise ConfigError(
        f"tensor {head} of {tuned.name} is tied by config.json, and equals no other tensor in every model",
        mend="set tie_word_embeddings to false in a copy, or save the models again",
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, shape ``[n_bytes]``, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor for writing and hashing."""
    return memoryview(as_bytes(tensor).numpy())  # type: ignore[arg-type]


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes."""
    return hashlib.sha256(raw(tensor)).hexdigest()


def layout_sha256(source: TensorSource, digests: Mapping[str, str]) -> str:
    """Return the digest of a model from those of its tensors: the same however it is cut into shards."""
    return digest_of(
        {key: [_short(source.layout[key]), source.layout[key].shape, digests[key]] for key in source.layout}
    )


# --- writing ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes safetensors shards of bounded size, tensor by tensor in the planned order, into a folder.

    Types and shapes are known beforehand, so headers go first and nothing is held back. The index comes last. Give
    it a folder of ``clbench.files.atomic_folder``: it is not complete before ``close``.

    Args:
        folder: where to write.
        layout: all tensors that will come.
        shard_bytes: the largest size of a shard; a larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, layout: Mapping[str, TensorInfo], *, shard_bytes: int = 5_000_000_000) -> None:
        self.folder, self.layout = folder, layout
        self.shards = list(_cut(layout, shard_bytes))
        self.file: IO[bytes] | None = None
        self._waiting = [(number, name) for number, names in enumerate(self.shards) for name in names]
        self._waiting.reverse()
        self._open = -1

    @property
    def order(self) -> list[str]:
        """The names in the order in which they are to be written."""
        return [name for names in self.shards for name in names]

    def shard_name(self, number: int) -> str:
        """Return the file name of a shard, as Hugging Face has it."""
        n = len(self.shards)
        return "model.safetensors" if n == 1 else f"model-{number + 1:05d}-of-{n:05d}.safetensors"

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor."""
        number, expected = self._waiting.pop()
        if name != expected or TensorInfo(tensor.dtype, tuple(tensor.shape)) != self.layout[name]:
            raise ValueError(f"expected {expected} {self.layout[expected]}, got {name} {tensor.dtype} {tensor.shape}")
        if number != self._open:
            self._begin(number)
        assert self.file is not None
        left = raw(tensor)
        while left:  # one system call writes 2 GiB at most
            left = left[self.file.write(left) :]

    def _begin(self, number: int) -> None:
        self._end()
        self._open = number
        # Without a buffer: tensors are large, and what is written leaves for the disk while the next is computed.
        self.file = (self.folder / self.shard_name(number)).open("wb", buffering=0)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name in self.shards[number]:
            info = self.layout[name]
            place = [begin, begin + info.n_bytes]
            entries[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": place}
            begin = place[1]
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self.file.write(len(header).to_bytes(8, "little") + header)

    def _end(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def close(self) -> None:
        """Write the index of several shards; raises ValueError when tensors are missing."""
        if self._waiting:
            raise ValueError(f"{len(self._waiting)} tensors were not written, the next is {self._waiting[-1][1]}")
        if not self.shards:
            raise ValueError("there are no tensors to write")
        self._end()
        if len(self.shards) > 1:
            size = sum(info.n_bytes for info in self.layout.values())
            places = {name: self.shard_name(number) for number, names in enumerate(self.shards) for name in names}
            write_json(
                self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            )

    def abort(self) -> None:
        """Let go of the open file."""
        self._end()


def _cut(layout: Mapping[str, TensorInfo], shard_bytes: int) -> Iterable[list[str]]:
    """Yield the names of each shard; within one, wide types first, so that all lie at multiples of their width."""
    shard: list[str] = []
    size = 0
    for name, info in layout.items():
        if shard and size + info.n_bytes > shard_bytes:
            yield _aligned(shard, layout)
            shard, size = [], 0
        shard.append(name)
        size += info.n_bytes
    if shard:
        yield _aligned(shard, layout)


def _aligned(names: list[str], layout: Mapping[str, TensorInfo]) -> list[str]:
    return sorted(names, key=lambda name: -layout[name].dtype.itemsize)


COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
    "LICENSE*",
    "NOTICE*",
    "sentencepiece*.model",
    "preprocessor_config.json",
    "processor_config.json",
)


def beside_the_weights(folder: Path) -> Iterator[Path]:
    """Yield the configuration, tokenizer and licence files of a model folder; no code, no model card."""
    found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    yield from sorted(found)
