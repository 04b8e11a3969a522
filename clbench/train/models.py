"""Models: made from a track's description, loaded from folders, hashed, saved.

Safetensors only. Weights travel as ``{name: tensor}`` with tied weights once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from clbench import seeds
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import atomic_folder, canonical_json, digest_of
from clbench.method import Weights
from clbench.track import ModelSpec
from clbench.train.ledger import forward_flops

VOLATILE_CONFIG = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
)


def make_model(spec: ModelSpec, *, vocab_size: int, eos_id: int, seed: int) -> torch.nn.Module:
    """Return a freshly initialised Llama (tied embeddings, fp32), the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_heads,
        max_position_embeddings=spec.max_length,
        tie_word_embeddings=True,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        pad_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "init"))
        model: torch.nn.Module = LlamaForCausalLM(config)
    return model


def check_checkpoint(folder: Path | str) -> bool:
    """Return whether this is a local checkpoint (else a hub id), after a look that costs no time.

    Raises:
        NotFoundError: neither a folder nor a hub id.
        IntegrityError: the folder holds no safetensors file, or one that is cut off.
    """
    local = Path(folder).is_dir()
    if not local and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)):
        raise NotFoundError(
            "checkpoint folder is missing", where=folder, mend="give a folder or a hub id such as org/name"
        )
    files = sorted(Path(folder).glob("*.safetensors")) if local else []
    if local and not files:
        raise IntegrityError(
            "no safetensors file in this checkpoint", where=folder, mend="save it with save_pretrained"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise IntegrityError(
                f"weights are corrupted: {_first_line(error)}", where=file, mend="copy them again"
            ) from None
    return local


def load_model(folder: Path | str) -> torch.nn.Module:
    """Load a causal language model from a local folder (safetensors) or a hub id, in fp32.

    Raises:
        NotFoundError: no such folder and no such hub id in reach.
        IntegrityError: the folder's weights cannot be read, or do not fit its configuration.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = check_checkpoint(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=local,
            output_loading_info=True,
            trust_remote_code=False,  # left out, it would ask on the terminal whether to run the checkpoint's code
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # JSON errors are ValueErrors
        if not local:
            raise NotFoundError(
                f"the hub did not give {str(folder)!r}: {_first_line(error)}",
                mend="check the id and the network, or give a folder",
            ) from None
        raise IntegrityError(f"checkpoint cannot be loaded: {_first_line(error)}", where=folder) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise IntegrityError(
            f"{len(missing)} weights are missing, the first is {missing[0]}",
            where=folder,
            mend="save the whole model",
        )
    loaded: torch.nn.Module = model
    return loaded


def load_tokenizer(path: Path | str) -> tuple[Any, str]:
    """Return the tokenizer beside a checkpoint, a folder or a hub id, and the digest of what it does.

    Raises:
        ConfigError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=Path(path).is_dir(), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer beside this checkpoint: {_first_line(error)}",
            where=path,
            mend="save it there with tokenizer.save_pretrained",
        ) from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer, digest_of(backend.to_str() if backend is not None else tokenizer.get_vocab())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weights_of(model: torch.nn.Module) -> Weights:
    """Return the parameters and saved buffers by name, detached, tied weights once (no copy)."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    saved = model.state_dict()
    weights |= {name: b for name, b in model.named_buffers() if name in saved}
    return weights


def copy_weights(weights: Weights) -> Weights:
    """Return a copy on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}


def load_weights(model: torch.nn.Module, weights: Weights) -> None:
    """Write weights into a model in place.

    Raises:
        IntegrityError: names or shapes differ; the first is named and nothing is written.
    """
    own = weights_of(model)
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights:
            raise IntegrityError(f"weight {name} stands only in the {'model' if name in own else 'checkpoint'}")
        if own[name].shape != weights[name].shape:
            raise IntegrityError(
                f"weight {name} has shape {tuple(weights[name].shape)}, the model {tuple(own[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


@contextmanager
def holding(model: torch.nn.Module, weights: Weights) -> Iterator[None]:
    """Let a model hold other weights for a while; its own come back, whatever happens."""
    own = copy_weights(weights_of(model))
    same = own.keys() == weights.keys() and all(torch.equal(own[name], weights[name].cpu()) for name in own)
    try:
        if not same:
            load_weights(model, weights)
        yield
    finally:
        if not same:
            load_weights(model, own)


def weights_sha256(model: torch.nn.Module, weights: Weights | None = None) -> str:
    """Return the digest of a model: its configuration without volatile fields, and every weight's name and bytes."""
    config: dict[str, Any] = model.config.to_diff_dict()  # type: ignore[union-attr,operator]
    for key in VOLATILE_CONFIG:
        config.pop(key, None)
    digest = hashlib.sha256(canonical_json(json.loads(json.dumps(config, default=str))).encode())
    for name, tensor in sorted((weights or weights_of(model)).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_file(tensors: Weights, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or the place forbidden, which the library reports as a type of its own.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(on_cpu, path, metadata=metadata)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def save_model(model: torch.nn.Module, weights: Weights, folder: Path, *, tokenizer_folder: Path | None = None) -> None:
    """Write a Hugging Face folder (config, model.safetensors, tokenizer), atomically."""
    with atomic_folder(folder) as temporary:
        model.config.save_pretrained(temporary)  # type: ignore[union-attr,operator]
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        if tokenizer_folder is not None:
            for file in sorted(tokenizer_folder.iterdir()):
                (temporary / file.name).write_bytes(file.read_bytes())


def model_forward_flops(model: torch.nn.Module, n_tokens: int, length: int) -> float:
    """Return the FLOPs of a forward pass of a transformers decoder; see ``ledger.forward_flops``."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    n_matmul = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embeddings.weight:
        n_matmul -= embeddings.weight.numel()
    return forward_flops(
        n_matmul_parameters=n_matmul,
        n_layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        n_tokens=n_tokens,
        length=length,
    )


def model_train_flops(model: torch.nn.Module, n_tokens: int, length: int) -> float:
    """Return the FLOPs of a forward and a backward pass: three times the forward pass when all weights are trained.

    A backward pass computes gradients of activations (as much as the forward pass) and of weights (2 a weight and
    token); frozen weights, as below adapters, have none of the latter.
    """
    frozen = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and not p.requires_grad)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embeddings.weight and not embeddings.weight.requires_grad:
        frozen -= embeddings.weight.numel()
    return 3 * model_forward_flops(model, n_tokens, length) - 2.0 * n_tokens * frozen


def n_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters, tied weights once."""
    return sum(p.numel() for p in model.parameters())
