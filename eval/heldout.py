"""Suite ``heldout``: the loss of every held-out document of every period under a checkpoint.

What is measured is what lm-eval calls ``loglikelihood_rolling``: a prefix token, then windows of at most
``max_length`` tokens that predict every token of the document exactly once, summed. Windows follow each other
with one token of context; the last one of a long document is drawn back to full length and only its tail
counts. The prefix is the end-of-text token that stands before every document in training. The end-of-text
token *after* a document is not scored: other tokenizers have none, and bits per byte must compare.

``clbench.eval._windows`` makes that fast; aggregation is left to ``clbench.results``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError, IntegrityError, NonFiniteError
from clbench.eval._forward import (
    IntArray,
    encode,
    prefix_token_id,
    resolve_max_length,
    undisturbed,
    vocabulary_size,
)
from clbench.eval._windows import Windows, cut_windows, document_nats, rolling_windows, window_nats
from clbench.files import digest_of
from clbench.stream import Stream
from clbench.suite import Checkpoint, Rows, Suite


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
        self._corpus: tuple[Any, Corpus] | None = None
        self._windows: tuple[Corpus, int, Windows] | None = None

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
            nats = window_nats(checkpoint, windows, self.options.tokens_per_batch, what="suite heldout")
        value = document_nats(windows, nats, corpus.n_documents)
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

    def _prepare(self, checkpoint: Checkpoint) -> tuple[Corpus, Windows]:
        """Return documents and windows; they are kept, as T+1 checkpoints are measured on the same ones."""
        max_length = resolve_max_length(checkpoint.model, self.options.max_length, where="suite heldout")
        if self._corpus is None or self._corpus[0] is not checkpoint.tokenizer:
            self._corpus = (checkpoint.tokenizer, read_corpus(self.stream, checkpoint.tokenizer))
        corpus = self._corpus[1]
        _check_vocabulary(checkpoint.model, corpus)
        if self._windows is None or self._windows[0] is not corpus or self._windows[1] != max_length:
            self._windows = (
                corpus,
                max_length,
                cut_windows(corpus.tokens, prefix_id=corpus.prefix_id, max_length=max_length),
            )
        return corpus, self._windows[2]


@dataclass(frozen=True, kw_only=True)
class Corpus:
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
        """How many documents there are."""
        return len(self.item)

    @property
    def n_tokens(self) -> IntArray:
        """Tokens of every document."""
        return np.array([len(t) for t in self.tokens], dtype=np.int64)


# --- documents and windows


def read_corpus(stream: Stream, tokenizer: Any) -> Corpus:
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
        found = _own_tokens(stream, info.index) if tokenizer is None else encode(tokenizer, table["text"])
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
    return Corpus(
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


# --- checks


def _check_vocabulary(model: Any, corpus: Corpus) -> None:
    """Refuse token ids that the model has no embedding for."""
    highest = max([corpus.prefix_id, *(int(ids.max()) for ids in corpus.tokens)])
    if highest >= vocabulary_size(model):
        raise ConfigError(
            f"token id {highest} is beyond the model's vocabulary of {vocabulary_size(model)}",
            where="suite heldout",
            mend="give the checkpoint the tokenizer that it was trained with",
        )


def _check_finite(value: NDArray[np.float64], corpus: Corpus) -> None:
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
