"""Documents cut into windows that predict every token once, and their losses: rolling log-likelihood, made fast.

The windows are lm-eval's (``loglikelihood_rolling``). Equal windows are computed once, windows are sorted by length,
and the head is applied to scored positions only. Letters in names: W windows of a batch, T positions, P scored
positions, V vocabulary, D hidden width, U distinct windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError
from clbench.eval._forward import (
    HEAD_CHUNK,
    TOKENS_PER_BATCH,
    IntArray,
    batches,
    head_is_all,
    nll_of,
    precision,
    progress,
    vocabulary_size,
    workers,
)
from clbench.suite import Checkpoint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of all documents; equal ones (unchanged documents of later periods) are computed once.

    ``document[w]`` and ``unique_of[w]`` say whose window w is and which distinct window it equals. Of a
    distinct window u, ``tokens[u]`` holds ``n_input[u] + 1`` ids: the inputs and, shifted by one, the
    targets, of which the last ``n_scored[u]`` count.
    """

    document: IntArray
    unique_of: IntArray
    tokens: list[NDArray[np.int32]]
    n_input: IntArray
    n_scored: IntArray


def rolling_windows(n_tokens: int, max_length: int) -> list[tuple[int, int, int]]:
    """Cut a document of ``n_tokens`` into windows that predict every token once.

    Returns:
        ``(start, end, n_scored)`` over the sequence ``[prefix, token 0, token 1, …]``: inputs are
        ``[start, end)``, targets ``[start + 1, end + 1)``, and the last ``n_scored`` targets count. The same
        windows as in lm-eval 0.4.13, ``make_disjoint_window`` over ``get_rolling_token_windows``: there, too,
        the last window of a long document keeps all the context that fits.
    """
    windows, predicted = [], 0
    while predicted < n_tokens:
        n_scored = min(n_tokens - predicted, max_length)
        predicted += n_scored
        windows.append((max(0, predicted - max_length), predicted, n_scored))
    return windows


def cut_windows(documents: Iterable[NDArray[np.int32]], *, prefix_id: int, max_length: int) -> Windows:
    """Cut all documents (token ids without the prefix) into windows and find the equal ones."""
    document: list[int] = []
    unique_of: list[int] = []
    tokens: list[NDArray[np.int32]] = []
    n_scored: list[int] = []
    seen: dict[bytes, int] = {}
    prefix = np.array([prefix_id], dtype=np.int32)
    for index, ids in enumerate(documents):
        sequence = np.concatenate([prefix, ids])
        for start, end, n in rolling_windows(len(ids), max_length):
            window = sequence[start : end + 1]
            key = hashlib.blake2b(n.to_bytes(8, "little") + window.tobytes(), digest_size=16).digest()
            if key not in seen:
                seen[key] = len(tokens)
                tokens.append(window)
                n_scored.append(n)
            document.append(index)
            unique_of.append(seen[key])
    return Windows(
        document=np.array(document, dtype=np.int64),
        unique_of=np.array(unique_of, dtype=np.int64),
        tokens=tokens,
        n_input=np.array([len(t) - 1 for t in tokens], dtype=np.int64),
        n_scored=np.array(n_scored, dtype=np.int64),
    )


def document_nats(windows: Windows, nats: NDArray[np.float64], n_documents: int) -> NDArray[np.float64]:
    """Return the loss of every document, ``[n_documents]``, from those of the distinct windows, ``[U]``."""
    # Added in the order of the windows, in float64: the same bits every time.
    value = np.zeros(n_documents, dtype=np.float64)
    np.add.at(value, windows.document, nats[windows.unique_of])
    return value


# --- forward passes


def window_nats(
    checkpoint: Checkpoint, windows: Windows, tokens_per_batch: int | None, *, what: str
) -> NDArray[np.float64]:
    """Return the negative log-likelihood of every distinct window, summed over its scored tokens, ``[U]``."""
    import torch

    device = checkpoint.device
    size = tokens_per_batch or TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
    nats = np.zeros(len(windows.tokens), dtype=np.float64)

    def score(indices: IntArray) -> NDArray[np.float64]:
        with torch.inference_mode(), precision(checkpoint):  # both are settings of a thread
            batch = pad_windows(windows, indices, device)
            return token_nats(checkpoint.model, batch, fast=fast).double().cpu().numpy()

    try:
        with torch.inference_mode(), precision(checkpoint):
            fast = bool(windows.tokens) and head_is_all(checkpoint.model, short_input(windows, device))
        if not fast:  # whole logits [W, T, V] then exist: keep them below a quarter of a gigabyte
            size = min(size, max(1, 2**26 // vocabulary_size(checkpoint.model)))
        todo = batches(windows.n_input, size, device)
        with progress(what, int(windows.n_input.sum())) as advance, workers(device) as pool:
            for indices, nll_P in zip(todo, pool.map(score, todo), strict=True):
                ends = np.cumsum(windows.n_scored[indices])
                nats[indices] = np.add.reduceat(nll_P, ends - windows.n_scored[indices])
                advance(int(windows.n_input[indices].sum()))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the device has too little memory for a batch",
            where=f"{what}, {size} tokens per batch",
            mend="choose a smaller tokens_per_batch",
        ) from error
    return nats


@dataclass(frozen=True, kw_only=True)
class WindowBatch:
    """Right-padded inputs ``[W, T]``; place in ``W * T`` and target of every scored position, ``[P]``."""

    input_WT: torch.Tensor
    place_P: torch.Tensor
    target_P: torch.Tensor


def pad_windows(windows: Windows, indices: IntArray, device: torch.device) -> WindowBatch:
    """Lay windows out in one batch, scored positions in the order of the windows.

    Causal attention never looks right, so padding needs no mask; without one the attention kernels keep their
    fast causal path.
    """
    import torch

    n_positions = int(windows.n_input[indices].max())
    input_WT = np.zeros((len(indices), n_positions), dtype=np.int64)
    places, targets = [], []
    for row, index in enumerate(indices):
        tokens, n, k = windows.tokens[index], int(windows.n_input[index]), int(windows.n_scored[index])
        input_WT[row, :n] = tokens[:n]
        places.append(np.arange(row * n_positions + n - k, row * n_positions + n, dtype=np.int64))
        targets.append(tokens[n + 1 - k :].astype(np.int64))
    return WindowBatch(
        input_WT=torch.from_numpy(input_WT).to(device),
        place_P=torch.from_numpy(np.concatenate(places)).to(device),
        target_P=torch.from_numpy(np.concatenate(targets)).to(device),
    )


def token_nats(model: Any, batch: WindowBatch, *, fast: bool) -> torch.Tensor:
    """Return the negative log-likelihood of every scored position in nats, float32 ``[P]``.

    Fast: hidden states of scored positions only, the head in chunks. Otherwise the model's own logits.
    """
    import torch

    if fast:
        hidden_WTD = model.base_model(input_ids=batch.input_WT, use_cache=False, return_dict=True).last_hidden_state
        head, rows = model.get_output_embeddings(), hidden_WTD.flatten(0, 1)
    else:
        logits_WTV = model(input_ids=batch.input_WT, use_cache=False, return_dict=True).logits
        head, rows = None, logits_WTV.flatten(0, 1)
    chunk = HEAD_CHUNK.get(rows.device.type, HEAD_CHUNK["cuda"])
    nll = []
    for places, targets in zip(torch.split(batch.place_P, chunk), torch.split(batch.target_P, chunk), strict=True):
        chosen = rows.index_select(0, places)
        nll.append(nll_of(chosen if head is None else head(chosen), targets))
    return torch.cat(nll)


def short_input(windows: Windows, device: torch.device, n_positions: int = 16) -> torch.Tensor:
    """Return the first positions of one window, ``[1, T]``, to try a model with."""
    import torch

    longest = int(windows.n_input.argmax())
    n = min(n_positions, int(windows.n_input[longest]))
    return torch.from_numpy(windows.tokens[longest][None, :n].astype(np.int64)).to(device)
