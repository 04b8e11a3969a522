"""Suite ``longcontext``: what a model finds, follows and counts in long text, on generated questions after RULER.

Eleven subtasks at any lengths, filled to the token for the tokenizer that reads them (``_needles.py``); greedy
generation; an answer's score is the share of the references that it has as substrings, in any case. Nothing is
fetched: the haystack is generated, or a text file of the user's. Definitions for people: docs/longcontext.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clbench.errors import ConfigError, NotFoundError, did_you_mean
from clbench.eval._items import (
    Measured,
    chat_wrap,
    check_at_least_one,
    read_text,
    rows_of,
    tokenizer_part,
    with_tokenizer,
)
from clbench.eval._needles import (
    GENERATOR_VERSION,
    SUBTASKS,
    USES_HAYSTACK,
    Filled,
    Haystack,
    Settings,
    make_items,
    noise,
    score,
)
from clbench.files import digest_of
from clbench.suite import Checkpoint, Rows, Suite

if TYPE_CHECKING:
    from clbench.stream import Stream

WHERE = "suite longcontext"
NOISE = "noise"


class LongContext(Suite):
    """The share of hidden things that a checkpoint finds, by subtask and length.

    Raises (``measure``):
        ConfigError: a length is beyond the model's positions or too short for a subtask, or there is no tokenizer.
        NonFiniteError: a logit is NaN or infinite; the item is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is asked. Each (subtask, length) is a cell of its own, so adding one measures nothing again."""

        lengths: tuple[int, ...] = (4096,)
        """Tokens of a prompt and its answer together, as `1024+4096`; RULER's shortest is 4096."""
        n_items: int = 50
        """Questions per subtask and length; RULER asks 500. The first n of a longer series are the same."""
        subtasks: tuple[str, ...] = tuple(SUBTASKS)
        """Which, as `single_number+tracking`; all when not given."""
        haystack: str = NOISE
        """`noise` for generated sentences, or the path of a text file."""
        keys: Literal["word", "number", "uuid"] = "word"
        """What needles are found by."""
        chains: int = 1
        """Chains of assignments in `tracking`; the first is asked."""
        hops: int = 4
        """Assignments in a chain after its first."""
        chat: bool = False
        """Put prompts into the tokenizer's chat template."""
        seed: int = 0
        """Another one makes other items."""

    name = "longcontext"
    version = 1
    needs_stream = False
    options: Options

    def __init__(self, stream: Stream | None = None, options: Options | None = None) -> None:
        super().__init__(stream, options)
        check_at_least_one(self.options, ("n_items", "chains", "hops"), WHERE)
        for subtask in self.options.subtasks:
            if subtask not in SUBTASKS:
                raise NotFoundError(f"unknown subtask {subtask!r}", where=WHERE, mend=did_you_mean(subtask, SUBTASKS))
        for named, values in (("lengths", self.options.lengths), ("subtasks", self.options.subtasks)):
            if not values or len({*values}) < len(values):
                raise ConfigError(f"{named} must be given, each once", where=WHERE)
        self._filled: tuple[Any, dict[str, Filled]] = (None, {})

    def sha256(self) -> str:
        """Return the digest of all options but those that only say which cells there are, and the haystack's path."""
        kept = {k: v for k, v in asdict(self.options).items() if k not in ("lengths", "subtasks", "haystack")}
        return digest_of({"name": self.name, "version": self.version, "options": kept})

    def data_sha256(self) -> str:
        """Return the digest of all parts."""
        return digest_of([self.shard_sha256(shard) for shard in self.shards()])

    def shards(self) -> list[str]:
        """Return ``SUBTASK@LENGTH`` for all of them."""
        return [f"{subtask}@{length}" for length in self.options.lengths for subtask in self.options.subtasks]

    def shard_sha256(self, shard: str) -> str:
        """Return the digest of the generator's version, the part's name, the haystack and the stream's tokenizer."""
        subtask, _ = _parsed(shard)
        haystack = self.haystack.sha256 if subtask in USES_HAYSTACK else ""
        return digest_of([GENERATOR_VERSION, shard, haystack, tokenizer_part(self.stream)])

    @cached_property
    def haystack(self) -> Haystack:
        """The text that needles are hidden in.

        Raises:
            NotFoundError, IntegrityError, ConfigError: the file is missing, not UTF-8, or holds no words.
        """
        if self.options.haystack == NOISE:
            return noise(self.options.seed)
        path = Path(self.options.haystack).expanduser()
        return Haystack.of_text(read_text(path), where=path)

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return one row ``score`` per item, ``group`` SUBTASK@LENGTH."""
        return Rows.joined([self.measure_shard(checkpoint, shard) for shard in self.shards()])

    def measure_shard(self, checkpoint: Checkpoint, shard: str) -> Rows:
        """Return the rows of one subtask at one length."""
        from clbench.eval._scorer import generate

        able, filled = self._items(checkpoint, shard)
        answers = generate(
            able,
            [item.prompt for item in filled.items],
            max_new_tokens=filled.n_generate,
            names=[item.name for item in filled.items],
            too_long="refuse",
        )
        return rows_of(
            Measured(item.name, "score", score(answer, item.references), shard)
            for item, answer in zip(filled.items, answers, strict=True)
        )

    def shard_flops(self, checkpoint: Checkpoint, shard: str) -> float:
        """Return the operations of prompts and answers, as if every answer took all of its room."""
        from clbench.train.models import model_forward_flops

        _, length = _parsed(shard)
        _, filled = self._items(checkpoint, shard)
        n_tokens = sum(item.n_tokens + filled.n_generate for item in filled.items)
        return model_forward_flops(checkpoint.model, n_tokens=n_tokens, length=length)

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of all parts."""
        return sum(self.shard_flops(checkpoint, shard) for shard in self.shards())

    def _items(self, checkpoint: Checkpoint, shard: str) -> tuple[Checkpoint, Filled]:
        """Return the checkpoint with a tokenizer and the items of a part, which are kept for the next checkpoint."""
        subtask, length = _parsed(shard)
        _check_length(checkpoint.model, length)
        able = with_tokenizer(checkpoint, self.stream, WHERE)
        # Checkpoints of a run without a tokenizer all read with the stream's.
        reads = checkpoint.tokenizer if checkpoint.tokenizer is not None else self
        if self._filled[0] is not reads:
            self._filled = (reads, {})
        if shard not in self._filled[1]:
            self._filled[1][shard] = self._fill(able.tokenizer, subtask, length)
        return able, self._filled[1][shard]

    def _fill(self, tokenizer: Any, subtask: str, length: int) -> Filled:
        from clbench.eval._forward import encode_texts

        wrap = chat_wrap(tokenizer, WHERE) if self.options.chat else str
        settings = Settings(
            haystack=self.haystack,
            keys=self.options.keys,
            n_chains=self.options.chains,
            n_hops=self.options.hops,
            seed=self.options.seed,
        )

        def count(text: str) -> int:
            return len(encode_texts(tokenizer, [wrap(text)])[wrap(text)])

        filled = make_items(subtask, length, self.options.n_items, settings, count)
        return replace(filled, items=[replace(item, prompt=wrap(item.prompt)) for item in filled.items])


def _parsed(shard: str) -> tuple[str, int]:
    subtask, _, length = shard.partition("@")
    return subtask, int(length)


def _check_length(model: Any, length: int) -> None:
    """Refuse lengths that the model has no positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(
            f"length {length} is more than the model's {positions} positions",
            where=WHERE,
            mend=f"ask for at most {positions}, as longcontext:lengths={positions}",
        )
