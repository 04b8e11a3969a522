"""Suite ``heldout``: the loss of every held-out document of every period under a checkpoint.

What is measured is what lm-eval calls ``loglikelihood_rolling``: a prefix token, then windows of at most
``max_length`` tokens that predict every token of the document exactly once, summed. Windows follow each other
with one token of context; the last one of a long document is drawn back to full length and only its tail
counts. The prefix is the end-of-text token that stands before every document in training. The end-of-text
token *after* a document is not scored: other tokenizers have none, and bits per byte must compare.

This file makes that fast and leaves aggregation to ``clbench.results``. Letters in names: W windows of a
batch, T positions, P scored positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError, IntegrityError, NonFiniteError
from clbench.files import digest_of
from clbench.stream import Stream
from clbench.suite import Checkpoint, Rows, Suite

if TYPE_CHECKING:
    import torch

IntArray = NDArray[np.int64]

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}
"""Padded positions in one forward pass; on a CPU the activations should stay in the last-level cache."""
HEAD_CHUNK = {"cpu": 512, "cuda": 4096}
"""Positions whose logits exist at one time: ``[chunk, V]`` floats instead of ``[W, T, V]``."""
ENCODE_CHUNK = 1000
"""Texts given to a tokenizer in one call."""


class Heldout(Suite):
    """Loss in nats of every held-out document of stages 0 to T-1.

    Raises (``measure``):
        ConfigError: the model has too few positions or token ids, or the tokenizer no end-of-text token.
        IntegrityError: the stream holds an empty document, or one that does not end with end-of-text.
        NonFiniteError: a document's loss is NaN or infinite; the document is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What decides the values, but for ``tokens_per_batch``."""

        max_length: int | None = None
        """Tokens in a window; the model's ``max_position_embeddings`` when not given."""
        tokens_per_batch: int | None = None
        """Positions in one forward pass; chosen by device when not given. Less needs less memory."""

    name = "heldout"
    version = 1
    options: Options

    def __init__(self, stream: Stream, options: Options | None = None) -> None:
        super().__init__(stream, options)
        for field in ("max_length", "tokens_per_batch"):
            value = getattr(self.options, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field} must be at least 1, not {value}", where="suite heldout")
        self._corpus: tuple[Any, _Corpus] | None = None
        self._windows: tuple[_Corpus, int, _Windows] | None = None

    def sha256(self) -> str:
        """Return the digest of name, version and ``max_length``.

        ``tokens_per_batch`` stays out: it moves values by rounding only, far below the 1e-4 nats that are
        promised, and a cell must not be measured again because another machine has less memory.
        """
        options = {"max_length": self.options.max_length}
        return digest_of({"name": self.name, "version": self.version, "options": options})

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return one row ``nll_nats`` per held-out document, ordered by stage and then as packed."""
        corpus, windows = self._prepare(checkpoint)
        with undisturbed(checkpoint.model, checkpoint.device):
            nats = window_nats(checkpoint, windows, self.options.tokens_per_batch)
        # Added in the order of the windows, in float64: the same bits every time.
        value = np.zeros(corpus.n_documents, dtype=np.float64)
        np.add.at(value, windows.document, nats[windows.unique_of])
        _check_finite(value, corpus)
        return Rows(
            item=corpus.item,
            stage=corpus.stage,
            metric=["nll_nats"] * corpus.n_documents,
            value=value,
            n_tokens=corpus.n_tokens,
            n_bytes=corpus.n_bytes,
            group=corpus.group,
            change=corpus.change,
        )

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of a forward pass over the windows that are computed, without padding."""
        from clbench.train.models import model_forward_flops

        _, windows = self._prepare(checkpoint)
        lengths, counts = np.unique(windows.n_input, return_counts=True)
        return sum(
            model_forward_flops(checkpoint.model, n_tokens=int(length * count), length=int(length))
            for length, count in zip(lengths, counts, strict=True)
        )

    def _prepare(self, checkpoint: Checkpoint) -> tuple[_Corpus, _Windows]:
        """Return documents and windows; they are kept, as T+1 checkpoints are measured on the same ones."""
        max_length = resolve_max_length(checkpoint.model, self.options.max_length)
        if self._corpus is None or self._corpus[0] is not checkpoint.tokenizer:
            self._corpus = (checkpoint.tokenizer, _read_corpus(self.stream, checkpoint.tokenizer))
        corpus = self._corpus[1]
        _check_vocabulary(checkpoint.model, corpus)
        if self._windows is None or self._windows[0] is not corpus or self._windows[1] != max_length:
            self._windows = (corpus, max_length, _cut(corpus, max_length))
        return corpus, self._windows[2]


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """All held-out documents: one entry a document in each column; ``tokens`` without the prefix."""

    item: list[str]
    stage: IntArray
    group: list[str]
    change: list[str]
    n_bytes: IntArray
    tokens: list[NDArray[np.int32]]
    prefix_id: int

    @property
    def n_documents(self) -> int:
        return len(self.item)

    @property
    def n_tokens(self) -> IntArray:
        return np.array([len(t) for t in self.tokens], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class _Windows:
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


# --- documents and windows


def _read_corpus(stream: Stream, tokenizer: Any) -> _Corpus:
    """Read all held-out documents, as the stream's own tokens or encoded by a foreign tokenizer."""
    item: list[str] = []
    stages: list[int] = []
    group: list[str] = []
    change: list[str] = []
    n_bytes: list[int] = []
    tokens: list[NDArray[np.int32]] = []
    for info in stream.stages():
        columns = ["id", "group", "change", "n_bytes"] + ([] if tokenizer is None else ["text"])
        table = stream.documents("heldout", info.index, columns).to_pydict()
        found = _own_tokens(stream, info.index) if tokenizer is None else _encode(tokenizer, table["text"])
        if len(found) != len(table["id"]):
            raise IntegrityError(
                f"stage {info.index} has {len(table['id'])} held-out documents but tokens of {len(found)}",
                where=stream.folder,
                mend=f"delete the folder and run `clbench prepare {stream.name}`",
            )
        for name, ids in zip(table["id"], found, strict=True):
            if len(ids) == 0:
                raise ConfigError(
                    f"document {name!r} has no tokens, so no loss",
                    where=f"held-out documents of stage {info.index}",
                    mend="leave empty texts out of the stream, or take a tokenizer that keeps all characters",
                )
        item += table["id"]
        stages += [info.index] * len(found)
        group += table["group"]
        change += table["change"]
        n_bytes += table["n_bytes"]
        tokens += found
    return _Corpus(
        item=item,
        stage=np.array(stages, dtype=np.int64),
        group=group,
        change=change,
        n_bytes=np.array(n_bytes, dtype=np.int64),
        tokens=tokens,
        prefix_id=stream.eos_id if tokenizer is None else prefix_token_id(tokenizer),
    )


def _own_tokens(stream: Stream, stage: int) -> list[NDArray[np.int32]]:
    """Return the packed tokens of one stage's held-out documents, each without the EOS that ends it."""
    packed, offsets = stream.tokens("heldout", stage), stream.offsets("heldout", stage)
    if len(offsets) == 1:
        return []
    if not (np.diff(offsets) > 0).all() or not (packed[offsets[1:] - 1] == stream.eos_id).all():
        raise IntegrityError(
            "a packed held-out document does not end with the end-of-text token",
            where=stream.folder / "tokens" / f"heldout-{stage:02d}.bin",
            mend=f"delete the folder and run `clbench prepare {stream.name}`",
        )
    ids = packed.astype(np.int32)
    return [ids[start : end - 1] for start, end in pairwise(offsets)]


def _encode(tokenizer: Any, texts: list[str]) -> list[NDArray[np.int32]]:
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


def _cut(corpus: _Corpus, max_length: int) -> _Windows:
    """Cut all documents into windows and find the equal ones."""
    document: list[int] = []
    unique_of: list[int] = []
    tokens: list[NDArray[np.int32]] = []
    n_scored: list[int] = []
    seen: dict[bytes, int] = {}
    prefix = np.array([corpus.prefix_id], dtype=np.int32)
    for index, ids in enumerate(corpus.tokens):
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
    return _Windows(
        document=np.array(document, dtype=np.int64),
        unique_of=np.array(unique_of, dtype=np.int64),
        tokens=tokens,
        n_input=np.array([len(t) - 1 for t in tokens], dtype=np.int64),
        n_scored=np.array(n_scored, dtype=np.int64),
    )


def batches(n_input: IntArray, tokens_per_batch: int) -> list[IntArray]:
    """Sort windows by length, longest first (lack of memory shows at once), into batches of about equal size.

    Returns:
        Indices of windows, one array a batch; rows x longest row is at most ``tokens_per_batch``, unless
        one row alone is longer.
    """
    order = np.argsort(-n_input, kind="stable")
    found, start = [], 0
    while start < len(order):
        n_rows = max(1, tokens_per_batch // int(n_input[order[start]]))
        found.append(order[start : start + n_rows])
        start += n_rows
    return found


# --- forward passes


def window_nats(checkpoint: Checkpoint, windows: _Windows, tokens_per_batch: int | None) -> NDArray[np.float64]:
    """Return the negative log-likelihood of every distinct window, summed over its scored tokens, ``[U]``."""
    import torch

    device = checkpoint.device
    size = tokens_per_batch or TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
    nats = np.zeros(len(windows.tokens), dtype=np.float64)

    def precision() -> torch.autocast:
        return torch.autocast(device.type, checkpoint.autocast_dtype, enabled=checkpoint.autocast_dtype is not None)

    def score(indices: IntArray) -> NDArray[np.float64]:
        with torch.inference_mode(), precision():  # both are settings of a thread
            batch = _pad(windows, indices, device)
            return _score(checkpoint.model, batch, fast=fast).double().cpu().numpy()

    try:
        with torch.inference_mode(), precision():
            fast = bool(windows.tokens) and head_is_all(checkpoint.model, _probe(windows, device))
        if not fast:  # whole logits [W, T, V] then exist: keep them below a quarter of a gigabyte
            size = min(size, max(1, 2**26 // _vocabulary(checkpoint.model)))
        todo = batches(windows.n_input, size)
        with _progress(int(windows.n_input.sum())) as advance, _workers(device) as pool:
            for indices, nll_P in zip(todo, pool.map(score, todo), strict=True):
                ends = np.cumsum(windows.n_scored[indices])
                nats[indices] = np.add.reduceat(nll_P, ends - windows.n_scored[indices])
                advance(int(windows.n_input[indices].sum()))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the device has too little memory for a batch",
            where=f"suite heldout, {size} tokens per batch",
            mend="choose a smaller tokens_per_batch",
        ) from error
    return nats


@contextmanager
def _workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
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


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Right-padded inputs ``[W, T]``; place in ``W * T`` and target of every scored position, ``[P]``."""

    input_WT: torch.Tensor
    place_P: torch.Tensor
    target_P: torch.Tensor


def _pad(windows: _Windows, indices: IntArray, device: torch.device) -> _Batch:
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
    return _Batch(
        input_WT=torch.from_numpy(input_WT).to(device),
        place_P=torch.from_numpy(np.concatenate(places)).to(device),
        target_P=torch.from_numpy(np.concatenate(targets)).to(device),
    )


def _score(model: Any, batch: _Batch, *, fast: bool) -> torch.Tensor:
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
        nll.append(_nll(chosen if head is None else head(chosen), targets))
    return torch.cat(nll)


def _nll(logits_PV: torch.Tensor, target_P: torch.Tensor) -> torch.Tensor:
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
    does more, and then ``_score`` takes the model's own logits.
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


def _probe(windows: _Windows, device: torch.device, n_positions: int = 16) -> torch.Tensor:
    """Return the first positions of one window, ``[1, T]``, to try a model with."""
    import torch

    longest = int(windows.n_input.argmax())
    n = min(n_positions, int(windows.n_input[longest]))
    return torch.from_numpy(windows.tokens[longest][None, :n].astype(np.int64)).to(device)


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
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, nothing elsewhere; yields a function that advances it by some tokens."""
    from rich.progress import Progress

    from clbench.console import stderr

    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("held-out documents", total=total)
        yield lambda n: progress.advance(task, n)


# --- checks


def resolve_max_length(model: Any, asked: int | None) -> int:
    """Return the window length: as asked, or all positions that the model has."""
    config = model.config.get_text_config()
    has = getattr(config, "max_position_embeddings", None)
    if asked is None and has is None:
        raise ConfigError(
            f"{type(model).__name__} does not say how many positions it has",
            where="suite heldout",
            mend="give max_length",
        )
    if asked is not None and has is not None and asked > has:
        raise ConfigError(
            f"max_length {asked} is more than the model's {has} positions",
            where="suite heldout",
            mend=f"choose at most {has}",
        )
    return int(asked or has or 0)


def _vocabulary(model: Any) -> int:
    """Return how many token ids the model reads."""
    return int(model.get_input_embeddings().weight.shape[0])


def _check_vocabulary(model: Any, corpus: _Corpus) -> None:
    """Refuse token ids that the model has no embedding for."""
    highest = max([corpus.prefix_id, *(int(ids.max()) for ids in corpus.tokens)])
    if highest >= _vocabulary(model):
        raise ConfigError(
            f"token id {highest} is beyond the model's vocabulary of {_vocabulary(model)}",
            where="suite heldout",
            mend="give the checkpoint the tokenizer that it was trained with",
        )


def _check_finite(value: NDArray[np.float64], corpus: _Corpus) -> None:
    """Refuse NaN and infinite losses: no aggregate over them means anything."""
    bad = np.flatnonzero(~np.isfinite(value))
    if len(bad):
        raise NonFiniteError(
            f"loss of document {corpus.item[bad[0]]!r} is {value[bad[0]]}, as of {len(bad)} in {len(value)}",
            where=f"held-out documents of stage {corpus.stage[bad[0]]}",
            mend="look at the checkpoint's weights, and measure with autocast off if they are finite",
        )


def measure_plain(checkpoint: Checkpoint, tokens: NDArray[Any], *, prefix_id: int, max_length: int) -> float:
    """Return the loss of one document in nats, the slow and simple way that ``measure`` must agree with.

    One window at a time, the model's own logits, PyTorch's cross-entropy in float32.
    """
    import torch

    sequence, nats = torch.tensor([prefix_id, *tokens.tolist()], device=checkpoint.device), 0.0
    with undisturbed(checkpoint.model, checkpoint.device), torch.no_grad():
        for start, end, n_scored in rolling_windows(len(tokens), max_length):
            logits = checkpoint.model(sequence[None, start:end]).logits[0, -n_scored:].float()
            targets = sequence[end + 1 - n_scored : end + 1]
            # Summed in float64: 1e-4 of 10,000 nats is below what float32 can hold.
            nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum())
    return nats
