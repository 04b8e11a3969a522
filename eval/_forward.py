"""What every suite that runs a model forward shares: batches, the head on chosen positions only, nothing disturbed.

Letters in names: W rows of a batch, T positions, P scored positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError
from clbench.suite import Checkpoint

if TYPE_CHECKING:
    import torch

IntArray = NDArray[np.int64]

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}
"""Padded positions in one forward pass; on a CPU the activations should stay in the last-level cache."""
HEAD_CHUNK = {"cpu": 512, "cuda": 4096}
"""Positions whose logits exist at one time: ``[chunk, V]`` floats instead of ``[W, T, V]``."""
PADDING = {"cpu": 32, "cuda": 4096}
"""Positions of padding from which on another forward pass is cheaper."""
ENCODE_CHUNK = 1000
"""Texts given to a tokenizer in one call."""


# --- tokens


def encode(tokenizer: Any, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Encode texts with a Hugging Face tokenizer, adding no special tokens."""
    encoded: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), ENCODE_CHUNK):
        chunk = texts[start : start + ENCODE_CHUNK]
        # verbose=False: texts longer than the model are expected here and cut into windows.
        output = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        encoded += [np.array(ids, dtype=np.int32) for ids in output["input_ids"]]
    return encoded


def prefix_token_id(tokenizer: Any) -> int:
    """Return what a first token is predicted from: beginning-of-text, else end-of-text, as lm-eval does."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ConfigError(
        "the tokenizer has no beginning-of-text or end-of-text token to predict a first token from",
        where=getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
        mend="set its `eos_token`",
    )


def encode_texts(tokenizer: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """Return the token ids of every distinct text, as lm-eval encodes them one by one.

    That is with the tokenizer's own special tokens, unless the text starts with its prefix token already.
    """
    prefix = tokenizer.decode(prefix_token_id(tokenizer))
    found: dict[str, list[int]] = {}
    distinct = iter(dict.fromkeys(texts))
    while chunk := list(islice(distinct, ENCODE_CHUNK)):
        for special in (True, False):
            if some := [text for text in chunk if text.startswith(prefix) is not special]:
                output = tokenizer(some, add_special_tokens=special, return_attention_mask=False, verbose=False)
                found |= zip(some, output["input_ids"], strict=True)
    return found


def batches(n_input: IntArray, tokens_per_batch: int, device: torch.device) -> list[IntArray]:
    """Sort rows by length, longest first (lack of memory shows at once), into batches of about equal size.

    Returns:
        Indices of rows, one array a batch; rows x longest row is at most ``tokens_per_batch``, unless one row alone is
        longer, and at most ``PADDING`` more than the rows' own positions.
    """
    padding = PADDING.get(device.type, PADDING["cuda"])
    order = np.argsort(-n_input, kind="stable")
    lengths, found, start = n_input[order], [], 0
    while start < len(order):
        longest = int(lengths[start])
        rows = lengths[start : start + max(1, tokens_per_batch // longest)]
        end = start + int(np.searchsorted(np.cumsum(longest - rows), padding, side="right"))
        found.append(order[start:end])
        start = end
    return found


# --- forward passes


def precision(checkpoint: Checkpoint) -> torch.autocast:
    """Return the autocast of a checkpoint; it is a setting of the thread that enters it."""
    import torch

    return torch.autocast(
        checkpoint.device.type, checkpoint.autocast_dtype, enabled=checkpoint.autocast_dtype is not None
    )


@contextmanager
def workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool that scores batches side by side: on a CPU as many as torch has threads, each on one thread.

    A small model's operations are too short to share among threads; whole batches are not. The bits are those of
    one thread, whatever their number.
    """
    import torch

    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        n_workers = n_threads if device.type == "cpu" else 1
        with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(n_threads)


def nll_of(logits_PV: torch.Tensor, target_P: torch.Tensor) -> torch.Tensor:
    """Return ``logsumexp(logits) - logits[target]`` in float32, ``[P]``; overwrites ``logits_PV``."""
    logits_PV = logits_PV.float()
    target = logits_PV.gather(1, target_P[:, None]).squeeze(1)
    peak = logits_PV.amax(1, keepdim=True)
    total = logits_PV.sub_(peak).exp_().sum(1)
    return total.log_().add_(peak.squeeze(1)).sub_(target)


def head_is_all(model: Any, input_WT: torch.Tensor) -> bool:
    """Say whether the logits are the output embedding applied to the last hidden states, and nothing more.

    Some models cap (Gemma), scale (Granite, Cohere) or mix their logits. They are told apart not by name but
    by trying: the same operations on the same inputs give the same bits, so a difference means that the model
    does more, and then the caller takes the model's own logits.
    """
    import torch

    base, head = getattr(model, "base_model", model), getattr(model, "get_output_embeddings", lambda: None)()
    if base is model or head is None:
        return False
    hidden = getattr(base(input_ids=input_WT, use_cache=False, return_dict=True), "last_hidden_state", None)
    if hidden is None or hidden.ndim != 3:
        return False
    logits = model(input_ids=input_WT, use_cache=False, return_dict=True).logits
    return torch.equal(head(hidden).float(), logits.float())


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model in evaluation mode; afterwards give back its mode, buffers, caches and the random states.

    Modules may keep things while they run (rotary tables, say). Made in inference mode these would break
    training later, so every module's attributes and buffers are put back as they were, also after an error.
    """
    import torch

    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module, attributes, buffers in kept:
                for name in set(vars(module)) - set(attributes):
                    del vars(module)[name]
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, nothing elsewhere; yields a function that advances it by some tokens."""
    from rich.progress import Progress

    from clbench.console import stderr

    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


# --- checks


def resolve_max_length(model: Any, asked: int | None, *, where: str) -> int:
    """Return the window length: as asked, or all positions that the model has."""
    config = model.config.get_text_config()
    has = getattr(config, "max_position_embeddings", None)
    if asked is None and has is None:
        raise ConfigError(
            f"{type(model).__name__} does not say how many positions it has",
            where=where,
            mend="give max_length",
        )
    if asked is not None and has is not None and asked > has:
        raise ConfigError(
            f"max_length {asked} is more than the model's {has} positions",
            where=where,
            mend=f"choose at most {has}",
        )
    return int(asked or has or 0)


def vocabulary_size(model: Any) -> int:
    """Return how many token ids the model reads."""
    return int(model.get_input_embeddings().weight.shape[0])
