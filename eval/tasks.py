"""Suite ``tasks``: lm-eval tasks by name, lm-eval's own or those of a folder, one shard each.

    clbench health MODEL --suite tasks:names=arc_easy+piqa,limit=200
    clbench evaluate RUN --suite tasks:names=ours,include_path=my_tasks

Own tasks need no network; lm-eval's fetch their data from the model hub, once, in ``clbench prepare
suite:tasks:names=…``. What is measured is left to ``_tasks.py``, what is refused to ``_task_files.py``.
See docs/evaluation.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.errors import ConfigError
from clbench.eval._items import tokenizer_part, with_tokenizer
from clbench.files import digest_of
from clbench.stream import Stream
from clbench.suite import Checkpoint, Rows, Suite

WHERE = "suite tasks"


class Tasks(Suite):
    """lm-eval's metrics of every document of the named tasks, and the log-likelihoods behind them.

    Raises (``measure``):
        NotFoundError: an unknown task, or its data is not there.
        OfflineError: a task's data has to be fetched first.
        ConfigError: no tokenizer, a task without documents, or one that is code while ``allow_code`` is not given.
        NonFiniteError: a score is NaN or infinite; the question is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is asked. Each name is a cell of its own, so adding one measures nothing again."""

        names: tuple[str, ...] = ()
        """Tasks, groups or tags of lm-eval, as `arc_easy+piqa`."""
        include_path: str | None = None
        """A folder of task files (YAML); its names come before lm-eval's own."""
        limit: int | None = None
        """First documents of each task; all when not given."""
        num_fewshot: int | None = None
        """Worked examples before each question; each task's own number when not given."""
        allow_code: bool = False
        """Run Python that task files name, on this machine with your rights. Read them first."""
        tokens_per_batch: int | None = None
        """Positions in one forward pass; chosen by device when not given. Less needs less memory."""

    name = "tasks"
    version = 1
    needs_stream = False
    options: Options

    def __init__(self, stream: Stream | None = None, options: Options | None = None) -> None:
        super().__init__(stream, options)
        for field in ("limit", "tokens_per_batch"):
            value = getattr(self.options, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field} must be at least 1, not {value}", where=WHERE)
        if (shots := self.options.num_fewshot) is not None and shots < 0:
            raise ConfigError(f"num_fewshot must be at least 0, not {shots}", where=WHERE)
        if len({*self.options.names}) < len(self.options.names):
            raise ConfigError("a task is named twice", where=WHERE)
        self._loaded: dict[str, list[Any]] = {}
        self._flops: dict[str, float] = {}

    @classmethod
    def prepare(cls, options: Any = None) -> dict[str, Any]:
        """Load the tasks once with the network on, which leaves their data in the hub's cache."""
        from clbench.eval._lm_ready import online

        suite = cls(None, options)
        if not suite.options.names:
            return {}
        with online():
            return {"tasks": {name: sum(len(t.eval_docs) for t in suite._tasks(name)) for name in suite.shards()}}

    def sha256(self) -> str:
        """Return the digest of name, version, ``limit`` and ``num_fewshot``; the tasks are the data's part."""
        options = {"limit": self.options.limit, "num_fewshot": self.options.num_fewshot}
        return digest_of({"name": self.name, "version": self.version, "options": options})

    def data_sha256(self) -> str:
        """Return the digest of all tasks."""
        return digest_of([self.shard_sha256(shard) for shard in self.shards()])

    def shards(self) -> list[str]:
        """Return the names that were given.

        Raises:
            ConfigError: there are none.
        """
        if not self.options.names:
            raise ConfigError("no tasks are named", where=WHERE, mend="write tasks:names=arc_easy+piqa")
        return list(self.options.names)

    def shard_sha256(self, shard: str) -> str:
        """Return the digest of a task's files, its documents, and the stream's tokenizer."""
        from clbench.eval._task_files import documents_sha256, source_sha256

        documents = documents_sha256(self._tasks(shard), self.options.limit)
        return digest_of([source_sha256(shard, self._include_path), documents, tokenizer_part(self.stream)])

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the rows of all tasks; see ``measure_tasks``."""
        return Rows.joined([self.measure_shard(checkpoint, shard) for shard in self.shards()])

    def measure_shard(self, checkpoint: Checkpoint, shard: str) -> Rows:
        """Return the rows of one task, or of all tasks of a group."""
        from clbench.eval._lm import ClbenchLM
        from clbench.eval._tasks import run_tasks

        able = with_tokenizer(checkpoint, self.stream, WHERE)
        lm = ClbenchLM(able, tokens_per_batch=self.options.tokens_per_batch)
        rows = run_tasks(lm, self._tasks(shard), limit=self.options.limit)
        self._flops[shard] = lm.flops()
        return rows

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of the last measurement of all tasks, without padding and generated tokens."""
        return sum(self._flops.get(shard, 0.0) for shard in self.shards())

    def shard_flops(self, checkpoint: Checkpoint, shard: str) -> float:
        """Return the operations of the last measurement of one task."""
        return self._flops.get(shard, 0.0)

    @property
    def _include_path(self) -> Path | None:
        given = self.options.include_path
        return None if given is None else Path(given).expanduser()

    def _tasks(self, shard: str) -> list[Any]:
        """Return the tasks of a name; they are kept, as every checkpoint of a run is asked the same."""
        if shard not in self._loaded:
            from clbench.eval._task_files import load_tasks
            from clbench.eval._tasks import as_task

            found = load_tasks([shard], include_path=self._include_path, allow_code=self.options.allow_code)
            self._loaded[shard] = [as_task(task, num_fewshot=self.options.num_fewshot) for task in found]
        return self._loaded[shard]
