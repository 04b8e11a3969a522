"""lm-eval tasks measured document by document: its prompts, filters and metrics, our scorer, one row a metric.

``measure_tasks`` takes task objects of lm-eval, or their configurations as dicts with the documents in memory. Where
tasks come from is left to ``_task_files.py``, what the rows add up to to ``clbench.results``; ``aggregates`` gives
lm-eval's own figures back from them. lm-eval's request cache (its key knows nothing of the data) and its reseeding
are not used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError
from clbench.suite import UNDATED, Checkpoint, Rows

if TYPE_CHECKING:
    from clbench.eval._lm import ClbenchLM

FEWSHOT_SEED = 1234
"""lm-eval's own: which worked examples stand before a question decides its score."""
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
TaskSpec = Any
"""A task of lm-eval, or its configuration as a dict; ``docs`` (a list of records) is then its only split."""


def measure_tasks(
    checkpoint: Checkpoint,
    tasks: Sequence[TaskSpec],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    tokens_per_batch: int | None = None,
    batch_rows: int | None = None,
    max_length: int | None = None,
    packed: bool = True,
) -> Rows:
    """Measure a checkpoint on tasks; all requests of one kind are scored together.

    Args:
        checkpoint: the model with its tokenizer.
        tasks: see ``TaskSpec``.
        limit: first documents of each task that are measured; all when not given.
        num_fewshot: worked examples before each question; each task's own number when not given.
        tokens_per_batch: positions in one forward pass; chosen by device when not given.
        batch_rows: prompts that are continued side by side; chosen by device when not given.
        max_length: tokens that the model reads at most; its positions when not given.
        packed: False scores one row a choice, the plain way.

    Returns:
        Rows in the order of tasks and documents. ``item`` is ``TASK/ID`` (the document's ``id``, or else its number),
        ``group`` the task, ``stage`` and ``change`` are the document's where it has such fields. Metrics are lm-eval's
        for one document, ``METRIC:FILTER`` where a task has several filters, ``METRIC:PLACE`` where its aggregation
        takes several numbers of a document. Besides: ``chance``, ``gold_nats`` (negative log-likelihood of the right
        answer), ``choice_nats`` (the same among the choices), ``nll_nats`` of whole texts, and ``n_cut_tokens`` and
        ``merged`` of the requests that were cut or merged (``Note``).

    Raises:
        ConfigError: a task has no documents, a template does not fit a document, or a request cannot be scored.
        NonFiniteError: a score is NaN or infinite; the question is named.
    """
    from clbench.eval._lm import ClbenchLM
    from clbench.eval._lm_ready import ready

    with ready():
        lm = ClbenchLM(
            checkpoint,
            tokens_per_batch=tokens_per_batch,
            batch_rows=batch_rows,
            max_length=max_length,
            packed=packed,
        )
        return run_tasks(lm, [as_task(spec, num_fewshot=num_fewshot) for spec in tasks], limit=limit)


def run_tasks(lm: ClbenchLM, tasks: Sequence[Any], *, limit: int | None = None) -> Rows:
    """Return the rows of tasks that ``as_task`` made, under a model that is there already; see ``measure_tasks``."""
    from clbench.eval._lm_ready import ready

    with ready():
        asked = [_Asked(task, limit) for task in tasks]
        _answer(lm, [instance for one in asked for instance in one.instances])
        return Rows.joined([one.rows() for one in asked])


def as_task(spec: TaskSpec, *, num_fewshot: int | None = None) -> Any:
    """Return a task object, ready to be asked.

    Raises:
        ConfigError: the configuration does not hold together, or has no documents.
    """
    from lm_eval.api.task import Task

    task = spec if isinstance(spec, Task) else _made(dict(spec))
    if num_fewshot is not None:
        if task.config.num_fewshot == 0 and num_fewshot > 0:
            raise ConfigError(
                "it is asked without worked examples on purpose",
                where=f"task {task.task_name}",
                mend="leave num_fewshot out",
            )
        task.set_config(key="num_fewshot", value=num_fewshot)
    return task


def _made(config: dict[str, Any]) -> Any:
    """Return a task from its configuration; lm-eval edits what it is given, so it gets a copy."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    from clbench.eval._lm_ready import explained, no_documents

    name = str(config.get("task", "without a name"))
    docs = config.pop("docs", None)
    config = copy.deepcopy(config)
    with explained(name):
        if docs is not None:
            if not (records := list(docs)):
                raise no_documents(name)
            data = {"test": datasets.Dataset.from_list(records)}
            config = {"test_split": "test", **config, "custom_dataset": lambda **_: data}
        return ConfigurableTask(config=config)


# --- asking


class _Asked:
    """One task with the requests of its documents, and their answers once there are any."""

    def __init__(self, task: Any, limit: int | None) -> None:
        from clbench.eval._lm_ready import explained, no_documents

        self.task, self.name = task, str(task.task_name)
        with explained(self.name):
            if len(task.eval_docs) == 0:
                raise no_documents(self.name)
            task.set_fewshot_seed(FEWSHOT_SEED)  # here: the sampler goes on where it stopped
            self.docs = list(task.doc_iterator(limit=limit))
            self.ids = _ids(task, [doc for _, doc in self.docs])
            self.by_doc = [self._requests(number, doc) for number, doc in self.docs]
        self.instances = [instance for some in self.by_doc for instance in some]
        task._instances = self.instances

    def _requests(self, number: int, doc: dict[str, Any]) -> list[Any]:
        task = self.task
        context = task.fewshot_context(
            doc, num_fewshot=task.config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(doc)
        )
        made = task.construct_requests(
            doc=doc, ctx=context, metadata=(self.name, number, task.config.repeats), apply_chat_template=False
        )
        return made if isinstance(made, list) else [made]

    def rows(self) -> Rows:
        """Return the rows of all documents; the requests have been answered."""
        from clbench.eval._lm_ready import explained

        self.task.apply_filters()
        filters = list(self.instances[0].filtered_resps)
        found = _RowList(self.name)
        for (_, doc), name, requests in zip(self.docs, self.ids, self.by_doc, strict=True):
            found.begin(doc, name)
            for form in filters:
                with explained(f"{self.name}, document {name}"):
                    values = self.task.process_results(doc, [request.filtered_resps[form] for request in requests])
                for metric, value in values.items():
                    found.metric(metric if len(filters) == 1 else f"{metric}:{form}", value, self._aggregation(metric))
            self._add_scores(found, doc, requests)
        return found.rows()

    def _aggregation(self, metric: str) -> Callable[[list[Any]], float] | None:
        found: Callable[[list[Any]], float] | None = self.task.aggregation().get(metric)
        return found

    def _add_scores(self, found: _RowList, doc: dict[str, Any], requests: list[Any]) -> None:
        """Add what the answers say beyond lm-eval's metrics, and what happened to the requests."""
        kind = self.task.OUTPUT_TYPE
        if kind == "multiple_choice":
            found.choices(*_choices_of(self.task, doc, requests))
        elif kind == "loglikelihood":
            found.add("gold_nats", -requests[0].resps[0][0], n_bytes=len(str(requests[0].args[1]).encode()))
        elif kind == "loglikelihood_rolling":
            text = requests[0].args[0]
            n_tokens = requests[0].clbench_note.n_tokens
            found.add("nll_nats", -requests[0].resps[0], n_tokens=n_tokens, n_bytes=len(text.encode()))
        notes = [request.clbench_note for request in requests]
        if (n_cut := sum(note.n_cut_tokens for note in notes)) > 0:
            found.add("n_cut_tokens", n_cut)
        if (n_merged := sum(note.is_merged for note in notes)) > 0:
            found.add("merged", n_merged)


def _answer(lm: ClbenchLM, instances: list[Any]) -> None:
    """Have all requests answered, those of one kind together."""
    kinds: dict[str, list[Any]] = {}
    for instance in instances:
        kinds.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
    for kind, requests in kinds.items():
        if kind not in KINDS:
            raise ConfigError(f"requests of kind {kind!r} cannot be scored", where=f"task {requests[0].task_name}")
        answers = getattr(lm, kind)(requests)
        for request, answer, note in zip(requests, answers, lm.notes, strict=True):
            request.resps.append(answer)
            request.clbench_note = note


def _ids(task: Any, docs: list[dict[str, Any]]) -> list[str]:
    """Return the names of documents: their own where each has one and no two the same, else their numbers."""
    import datasets

    own, whole = [], task.eval_docs
    if docs and "id" in docs[0]:
        own = list(whole["id"]) if isinstance(whole, datasets.Dataset) else [doc.get("id") for doc in whole]
    if own and all(isinstance(one, (str, int)) for one in own) and len({str(one) for one in own}) == len(own):
        return [str(doc["id"]) for doc in docs]
    return [str(number) for number in range(len(docs))]


def _choices_of(
    task: Any, doc: dict[str, Any], requests: list[Any]
) -> tuple[NDArray[np.float64], list[int], list[int]]:
    """Return the choices' log-likelihoods, the numbers of the right ones, and the bytes of every choice's text."""
    n = len(task.doc_to_choice(doc))
    scores = np.array([request.resps[0][0] for request in requests[:n]], np.float64)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        choices = task.doc_to_choice(doc)
        gold = choices.index(gold) if gold in choices else -1
    golds = [int(one) for one in (gold if isinstance(gold, list) else [gold]) if isinstance(one, (int, np.integer))]
    n_bytes = [len(str(request.args[1]).encode()) for request in requests[:n]]
    return scores, [one for one in golds if 0 <= one < n], n_bytes


class _RowList:
    """Rows of one task, document by document."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.columns: dict[str, Any] = {
            name: [] for name in ("item", "stage", "metric", "value", "n_tokens", "n_bytes", "group", "change")
        }

    def begin(self, doc: dict[str, Any], name: str) -> None:
        """Go on with another document."""
        stage, change = doc.get("stage"), doc.get("change")
        self.item = f"{self.task}/{name}"
        self.stage = int(stage) if isinstance(stage, (int, np.integer)) else UNDATED
        self.change = change if isinstance(change, str) else ""

    def add(self, metric: str, value: float, *, n_tokens: int = 1, n_bytes: int = 1) -> None:
        """Add one row."""
        row = (self.item, self.stage, metric, float(value), n_tokens, n_bytes, self.task, self.change)
        for column, cell in zip(self.columns.values(), row, strict=True):
            column.append(cell)

    def metric(self, name: str, value: Any, aggregation: Callable[[list[Any]], float] | None) -> None:
        """Add what lm-eval's metric says of the document: a number, or the numbers that its aggregation takes."""
        places = list(_flat(value))
        numbers = [(place, number) for place, number in places if number is not None]
        if len(numbers) == len(places):
            for place, number in numbers:
                self.add(f"{name}:{place}" if place else name, number)
        elif aggregation is not None:  # texts, as of BLEU: no row can hold them, so they count document by document
            self.add(f"{name}:document", float(aggregation([value])))

    def choices(self, scores: NDArray[np.float64], golds: list[int], n_bytes: list[int]) -> None:
        """Add what guessing would score, and the negative log-likelihood of the right answer, plain and among all."""
        self.add("chance", max(1, len(golds)) / len(scores))
        if golds:
            best = max(golds, key=lambda gold: scores[gold])
            total = float(np.log(np.exp(scores - scores.max()).sum()) + scores.max())
            of_gold = float(np.log(np.exp(scores[golds] - scores[best]).sum()) + scores[best])
            self.add("gold_nats", -float(scores[best]), n_bytes=n_bytes[best])
            self.add("choice_nats", total - of_gold)

    def rows(self) -> Rows:
        """Return them."""
        columns = dict(self.columns)
        for name in ("stage", "n_tokens", "n_bytes"):
            columns[name] = np.array(columns[name], np.int64)
        columns["value"] = np.array(columns["value"], np.float64)
        return Rows(**columns)


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield the numbers in a metric's value with where they stand in it; None for what is no number."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            yield from _flat(one, f"{place}.{number}" if place else str(number))
    elif isinstance(value, (bool, int, float, np.number, np.bool_)):
        yield place, float(value)
    else:
        yield place, None


# --- lm-eval's own figures


def aggregates(task: Any, rows: Rows) -> dict[str, float]:
    """Return lm-eval's figures of a task, ``METRIC`` or ``METRIC:FILTER``, from its rows.

    Metrics that an aggregation takes as texts (BLEU) are left out: rows hold them document by document only.
    """
    values: dict[str, dict[str, dict[str, float]]] = {}
    forms = [f.name for f in task._filters] if hasattr(task, "_filters") else ["none"]
    known = [m if len(forms) == 1 else f"{m}:{form}" for m in task.aggregation() for form in forms]
    for item, metric, value, group in zip(rows.item, rows.metric, rows.value.tolist(), rows.group, strict=True):
        if group != task.task_name:
            continue
        for name in known:
            if metric == name or (metric.startswith(f"{name}:") and metric.removeprefix(f"{name}:")[0].isdigit()):
                values.setdefault(name, {}).setdefault(item, {})[metric[len(name) + 1 :]] = value
    return {
        name: float(task.aggregation()[name.partition(":")[0]]([_nested(places) for places in found.values()]))
        for name, found in values.items()
    }


def _nested(places: dict[str, float]) -> Any:
    """Undo ``_flat``."""
    if "" in places:  # right answers are numbers of classes
        return int(places[""]) if places[""].is_integer() else places[""]
    heads = sorted({int(place.partition(".")[0]) for place in places})
    return tuple(
        _nested({p.partition(".")[2]: v for p, v in places.items() if int(p.partition(".")[0]) == head})
        for head in heads
    )
