"""The suite contract: measure one checkpoint, return one row per item.

Aggregates and intervals are computed from rows (``clbench.results``), so a metric can be mended without a GPU.
A suite measures and nothing else: it leaves random states, training mode and caches as it found them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.files import digest_of
from clbench.stream import Stream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a suite measures: a causal language model with its tokenizer.

    ``weights_sha256`` addresses its cells. ``tokenizer`` is None when the model reads the stream's own token ids.
    """

    model: torch.nn.Module
    weights_sha256: str
    device: torch.device
    autocast_dtype: torch.dtype | None
    tokenizer: Any = None
    tokenizer_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Measured rows as columns of equal length ``n``: one row per document or question.

    ``item`` names the document, ``stage`` is the period it belongs to, ``metric`` says what ``value`` is (``nll_nats``:
    summed negative log-likelihood), ``n_tokens`` and ``n_bytes`` are what it is divided by.
    """

    item: list[str]
    stage: NDArray[np.int64]
    metric: list[str]
    value: NDArray[np.float64]
    n_tokens: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    group: list[str]
    change: list[str]


class Suite(ABC):
    """What a file in ``eval/`` provides; options are a frozen dataclass beside it."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """No options."""

    name: str
    version: int = 1
    """Raise it whenever the measured values change: old cells are then measured again."""
    example: str | None = None
    """A small stream to try it on, for a suite that needs extra files of its stream and cannot measure any other."""

    def __init__(self, stream: Stream, options: Any = None) -> None:
        self.stream = stream
        self.options = options if options is not None else self.Options()

    def sha256(self) -> str:
        """Return the digest of name, version and options: the suite's part of a cell's address."""
        return digest_of({"name": self.name, "version": self.version, "options": asdict(self.options)})

    def data_sha256(self) -> str:
        """Return the digest of what is measured on: the data's part of a cell's address."""
        return self.stream.sha256

    @abstractmethod
    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Measure one checkpoint."""

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the floating-point operations of one ``measure``, for the ledger."""
        return 0.0
