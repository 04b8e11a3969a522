"""The suite contract: measure one checkpoint, return one row per item.

Aggregates and intervals are computed from rows (``clbench.results``), so a metric can be mended without a GPU.
A suite measures and nothing else: it leaves random states, training mode and caches as it found them.

What a suite asks for beyond its stream (question files, say) it fetches in ``prepare``, which ``clbench prepare
suite:NAME`` calls; nothing else of it touches a network. A suite of several parts names them in ``shards``: each is a
cell of its own, so parts are measured apart, in other processes, and never twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError
from clbench.files import digest_of
from clbench.stream import Stream

if TYPE_CHECKING:
    import torch

UNDATED = -1
"""``stage`` of an item that belongs to no period of a stream."""
WHOLE = ""
"""The only shard of a suite that has no parts."""
UNDEFINED = "undefined: "
"""What ``change`` begins with in a row whose value is NaN; the reason follows."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Other weights of the same kind, for suites that compare; loaded, on the CPU, only by those that do."""

    weights_sha256: str
    load: Callable[[], torch.nn.Module]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a suite measures: a causal language model with its tokenizer.

    ``weights_sha256`` addresses its cells. ``tokenizer`` is None when the model reads the stream's own token ids.
    ``base`` is what the run began with and ``previous`` what it released a stage earlier, where they are at hand.
    """

    model: torch.nn.Module
    weights_sha256: str
    device: torch.device
    autocast_dtype: torch.dtype | None
    tokenizer: Any = None
    tokenizer_sha256: str = ""
    base: Reference | None = None
    previous: Reference | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Measured rows as columns of equal length ``n``: one row per document or question and metric.

    ``item`` names the document, ``stage`` is the period it belongs to (``UNDATED``: none), ``metric`` says what
    ``value`` is (``nll_nats``: summed negative log-likelihood), ``n_tokens`` and ``n_bytes`` are what it is divided by
    (1 where it is a score of one question), ``group`` is the slice it counts in: a package, a task. A value that is not
    defined is NaN, and its ``change`` says why after ``UNDEFINED``.
    """

    item: list[str]
    stage: NDArray[np.int64]
    metric: list[str]
    value: NDArray[np.float64]
    n_tokens: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    group: list[str]
    change: list[str]

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, in their order."""
        columns: dict[str, Any] = {}
        for column in fields(cls):
            values = [getattr(part, column.name) for part in parts]
            if column.name in ("item", "metric", "group", "change"):
                columns[column.name] = [value for one in values for value in one]
            else:
                kind = np.float64 if column.name == "value" else np.int64
                columns[column.name] = np.concatenate([np.zeros(0, dtype=kind), *values])
        return cls(**columns)


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
    needs_stream: bool = True
    """False: it measures any checkpoint that has a tokenizer, also where there is no stream."""
    compares: bool = False
    """True: what it measures also depends on the checkpoint's ``base`` and ``previous``, which its cells then name."""

    def __init__(self, stream: Stream | None = None, options: Any = None) -> None:
        if stream is None and self.needs_stream:
            raise ConfigError("it measures on the text of a stream", where=f"suite {self.name}", mend="name a stream")
        self.stream: Stream = stream  # type: ignore[assignment]  # None only where it is not needed
        self.options = options if options is not None else self.Options()

    def sha256(self) -> str:
        """Return the digest of name, version and options: the suite's part of a cell's address."""
        return digest_of({"name": self.name, "version": self.version, "options": asdict(self.options)})

    def data_sha256(self) -> str:
        """Return the digest of what is measured on: the data's part of a cell's address."""
        return self.stream.sha256

    @classmethod
    def prepare(cls, options: Any = None) -> dict[str, Any]:
        """Fetch what it measures on beyond its stream, and return what was made; done already is quick.

        Raises:
            OfflineError: files are missing from the cache and no network answers.
            IntegrityError: a file is not what its manifest pins.
        """
        return {}

    @classmethod
    def sources(cls) -> list[dict[str, Any]]:
        """Return what it measures on beyond its stream, with ``name``, ``title`` and ``licence`` of each."""
        return []

    def shards(self) -> list[str]:
        """Return the names of the parts that can be measured apart, in the order of their rows."""
        return [WHOLE]

    @abstractmethod
    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Measure one checkpoint: the rows of all shards, joined in their order."""

    def measure_shard(self, checkpoint: Checkpoint, shard: str) -> Rows:
        """Measure one part; a suite with several has to implement it."""
        if shard != WHOLE:
            raise NotImplementedError(f"suite {self.name} names shards and cannot measure one")
        return self.measure(checkpoint)

    def shard_sha256(self, shard: str) -> str:
        """Return the digest of what one part is measured on: the data's part of that cell's address."""
        return self.data_sha256()

    def licences(self) -> dict[str, str]:
        """Return under which licence the texts that it measures on may be used, by part, for reports."""
        return {}

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the floating-point operations of one ``measure``, for the ledger."""
        return 0.0

    def shard_flops(self, checkpoint: Checkpoint, shard: str) -> float:
        """Return the floating-point operations of one ``measure_shard``."""
        return self.flops(checkpoint) / len(self.shards())
