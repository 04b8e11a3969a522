"""How good a merge is: a judge measures a model, here by its losses on general and on domain documents.

A ``Judge`` returns rows, one an item, of several benchmarks, each on the general or on the domain side: losses of
documents (``LossJudge``), accuracies of a suite's questions (``SuiteJudge``), or both (``JointJudge``). Weights go into
one model that stays in memory; no folder is written for a candidate. What the rows say about retention stands in
``outcome``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clbench import registry
from clbench.build import stream_folder
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import digest_of
from clbench.merge.execute import Sources, merge_folder, run
from clbench.merge.plan import MergePlan
from clbench.stream import Split, StageInfo, Stream
from clbench.suite import Checkpoint, Rows

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

Side = Literal["general", "domain"]
SIDES: tuple[Side, ...] = ("general", "domain")
PIECE_CHARACTERS = 2000
"""A plain text is cut at blank lines into pieces of at least so many characters; each counts as a document."""
PLAIN = (".txt", ".md", ".rst", ".text")
MIN_DOCUMENTS = 8
"""Fewer documents say nothing about the noise of a measurement."""


# --- judges


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One set of items; its score is the sum of values over the sum of tokens (1 a question, for accuracies)."""

    name: str
    side: Side
    lower_is_better: bool = True
    chance: float = 0.0
    """Score of guessing; taken off where higher is better."""


class Judge(ABC):
    """Says how good a model is; the same model always gets the same rows."""

    benchmarks: tuple[Benchmark, ...]
    """At least one a side; those of the domain all lower_is_better or none."""
    sha256: str
    """Digest of whatever decides the values."""

    @abstractmethod
    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the raw rows of all items, which are kept."""

    def read(self, rows: Rows) -> tuple[tuple[Benchmark, ...], Rows]:
        """Return the benchmarks that raw rows are of, and one row an item: ``stage`` is its benchmark's place."""
        return self.benchmarks, rows

    @abstractmethod
    def cost(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Return (tokens, FLOPs) of one ``measure``."""


class LossJudge(Judge):
    """Losses of documents, by the suite ``heldout``: every token is predicted once, in windows of the model's length.

    Args:
        general: text that the base knew.
        domain: text like that of the training, of other documents than were trained on.
        tokenizer: of the models.
        max_length: tokens in a window; the model's own where None, and 2,048 at most.
    """

    def __init__(self, general: Text, domain: Text, tokenizer: Any, *, max_length: int | None = None) -> None:
        self.benchmarks = (Benchmark(name="general", side="general"), Benchmark(name="domain", side="domain"))
        self.texts, self.tokenizer, self.max_length = {"general": general, "domain": domain}, tokenizer, max_length
        suite = registry.load_class("suites", "heldout")
        self.suite: Any = suite(TextStream(general, domain), suite.Options(max_length=max_length))
        self.sha256 = digest_of([self.suite.sha256(), general.sha256, domain.sha256])

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the losses in nats of all documents, general ones first."""
        rows: Rows = self.suite.measure(checkpoint)
        return rows

    def cost(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Return (tokens, FLOPs) of one measurement."""
        return sum(text.n_tokens for text in self.texts.values()), float(self.suite.flops(checkpoint))


class SuiteJudge(Judge):
    """Accuracies of a suite's questions: every group of rows of metric ``acc`` is a benchmark of its own.

    Which groups there are, and how often guessing is right (rows of metric ``chance``), the suite's rows say.

    Args:
        spec: a suite as ``clbench.registry.make_suite`` reads it, one that needs no stream.
        side: where its benchmarks count.
    """

    ACCURACY, CHANCE = "acc", "chance"

    def __init__(self, spec: str, *, side: Side = "general") -> None:
        self.spec, self.side, self.benchmarks = spec, side, ()
        self.suite = registry.make_suite(spec)
        self.sha256 = digest_of([side, self.suite.sha256(), self.suite.data_sha256()])

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the suite's rows."""
        return self.suite.measure(checkpoint)

    def read(self, rows: Rows) -> tuple[tuple[Benchmark, ...], Rows]:
        """Return a benchmark a group, in the order of their first rows, and its questions.

        Raises:
            ConfigError: the suite measures no accuracy.
        """
        groups = list(dict.fromkeys(g for g, metric in zip(rows.group, rows.metric, strict=True) if metric == "acc"))
        if not groups:
            found = ", ".join(sorted(set(rows.metric))) or "nothing"
            raise ConfigError(
                f"its rows have no metric {self.ACCURACY}, they have {found}",
                where=f"suite {self.spec}",
                mend="give a suite of questions",
            )
        chances: dict[str, list[float]] = {group: [] for group in groups}
        for group, metric, value in zip(rows.group, rows.metric, rows.value, strict=True):
            if metric == self.CHANCE and group in chances:
                chances[group].append(float(value))
        benchmarks = tuple(
            Benchmark(
                name=group,
                side=self.side,
                lower_is_better=False,
                chance=sum(chances[group]) / len(chances[group]) if chances[group] else 0.0,
            )
            for group in groups
        )
        place = {group: number for number, group in enumerate(groups)}
        items = _chosen(rows, [metric == self.ACCURACY for metric in rows.metric])
        return benchmarks, replace(items, stage=np.array([place[g] for g in items.group], dtype=np.int64))

    def cost(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Return (0, FLOPs): a suite does not say how many tokens its questions have."""
        return 0, float(self.suite.flops(checkpoint))


class JointJudge(Judge):
    """Several judges as one: the benchmarks of all, in their order."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        self.judges = tuple(judges)
        self.benchmarks = ()
        self.sha256 = digest_of([judge.sha256 for judge in judges])

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the raw rows of all; ``change`` says whose they are."""
        parts = [judge.measure(checkpoint) for judge in self.judges]
        return Rows.joined([replace(part, change=[str(n)] * len(part.item)) for n, part in enumerate(parts)])

    def read(self, rows: Rows) -> tuple[tuple[Benchmark, ...], Rows]:
        """Return the benchmarks of all judges and their items."""
        benchmarks: list[Benchmark] = []
        parts = []
        for number, judge in enumerate(self.judges):
            own, items = judge.read(_chosen(rows, [owner == str(number) for owner in rows.change]))
            parts.append(replace(items, stage=items.stage + len(benchmarks)))
            benchmarks += own
        if twice := sorted({one.name for one in benchmarks if [b.name for b in benchmarks].count(one.name) > 1}):
            raise ConfigError(f"two benchmarks are called {twice[0]!r}", mend="give each suite once")
        return tuple(benchmarks), Rows.joined(parts)

    def cost(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Return the sum of (tokens, FLOPs)."""
        costs = [judge.cost(checkpoint) for judge in self.judges]
        return sum(n for n, _ in costs), sum(flops for _, flops in costs)


def _chosen(rows: Rows, wanted: Sequence[bool]) -> Rows:
    """Return some of the rows."""
    places = np.flatnonzero(np.asarray(wanted, dtype=bool))
    columns: dict[str, Any] = {
        name: value[places] if isinstance(value, np.ndarray) else [value[i] for i in places]
        for name, value in vars(rows).items()
    }
    return Rows(**columns)


class TextStream(Stream):
    """Texts in the place of a stream's held-out documents, one a stage."""

    def __init__(self, *texts: Text) -> None:
        self.texts, self.folder, self.name = texts, Path("texts"), "texts"
        self.sha256 = self.base_sha256 = digest_of([text.sha256 for text in texts])
        self.manifest = {}

    def stages(self) -> list[StageInfo]:
        """Return one stage a text."""
        return [StageInfo(index=i, name=text.name, start="", end="") for i, text in enumerate(self.texts)]

    def documents(self, split: Split, stage: int, columns: list[str] | None = None) -> pa.Table:
        """Return the documents of one text, whatever the split."""
        import pyarrow as pa

        text = self.texts[stage]
        table = pa.table(
            {
                "id": text.ids,
                "group": [""] * len(text.ids),
                "change": ["new"] * len(text.ids),
                "n_bytes": [len(one.encode()) for one in text.documents],
                "text": text.documents,
            }
        )
        return table.select(columns) if columns else table


# --- texts


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents to measure on."""

    name: str
    ids: list[str]
    documents: list[str]
    n_tokens: int = 0
    n_found: int = 0
    """Documents of the source, of which these were drawn."""
    sha256: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Compute the digest of ids and texts."""
        digest = hashlib.sha256()
        for name, text in zip(self.ids, self.documents, strict=True):
            digest.update(f"{len(name)} {name} {len(text)} {text}".encode())
        object.__setattr__(self, "sha256", digest.hexdigest())


def read_text(place: str, side: Side, *, column: str = "text") -> Text:
    """Return the documents of a file, a folder of plain texts, or the held-out ones of a stage (``STREAM@STAGE``).

    Plain text is cut into pieces at blank lines, JSON lines and CSV have a document a line.

    Raises:
        ConfigError: no documents, too few, or a stage that the stream does not have.
        NotFoundError: no such file or stream.
        IntegrityError: lines that cannot be read.
    """
    path, (stream, _, stage) = Path(place).expanduser(), place.rpartition("@")
    if path.exists():
        found = list(_of_path(path, column))
    elif stream and stage.isdecimal():
        found = _of_stream(stream, int(stage), side)
    else:
        mend = "give a file (txt, jsonl, csv), a folder of texts, or STREAM@STAGE"
        raise NotFoundError(f"the {side} text is not there", where=place, mend=mend)
    found = [(name, text) for name, text in found if text.strip()]
    if len(found) < MIN_DOCUMENTS:
        what = f"the {side} text has {len(found)} documents" if found else f"the {side} text is empty"
        raise ConfigError(what, where=place, mend=f"give {MIN_DOCUMENTS} documents or more, to see the noise, too")
    return Text(name=place, ids=[name for name, _ in found], documents=[text for _, text in found], n_found=len(found))


def draw(
    text: Text, tokenizer: Any, n_tokens: int, *, without: Collection[str] = (), least: int = MIN_DOCUMENTS
) -> Text:
    """Return documents in an order that their ids decide, until there are so many tokens; counted by a tokenizer.

    Args:
        text: to draw from.
        tokenizer: counts.
        n_tokens: how many are wanted.
        without: ids of documents that are not drawn.
        least: documents that are needed, whatever their length.

    Raises:
        ConfigError: the first documents are so long that there are too few.
    """
    taken = set(without)
    free = [i for i, name in enumerate(text.ids) if name not in taken]
    order = sorted(free, key=lambda i: hashlib.sha256(text.ids[i].encode()).digest())
    chosen, total = list[int](), 0
    for place in order:
        if total >= n_tokens and len(chosen) >= least:
            break
        n = len(tokenizer(text.documents[place], add_special_tokens=False, verbose=False)["input_ids"])
        if n:  # what a tokenizer makes nothing of has no loss
            chosen.append(place)
            total += n
    if len(chosen) < least:
        beside = " beside those that are measured" if without else ""
        what = f"{len(chosen)} documents have tokens{beside}, {least} {'is' if least == 1 else 'are'} needed"
        raise ConfigError(what, where=text.name, mend="give more text" + (", or fewer --tokens" if without else ""))
    chosen.sort()
    return Text(
        name=text.name,
        ids=[text.ids[i] for i in chosen],
        documents=[text.documents[i] for i in chosen],
        n_tokens=total,
        n_found=text.n_found,
    )


def _of_path(path: Path, column: str) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        for file in sorted(one for one in path.rglob("*") if one.suffix.lower() in PLAIN and one.is_file()):
            yield file.relative_to(path).as_posix(), _read(file)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(_read(path).splitlines(), start=1):
            if line.strip():
                yield f"line {number}", _field(_json(line, path, number), column, path, number)
    elif path.suffix.lower() in (".csv", ".tsv"):
        tab = "\t" if path.suffix.lower() == ".tsv" else ","
        lines = csv.DictReader(_read(path).splitlines(keepends=True), delimiter=tab)
        for number, row in enumerate(lines, start=2):
            yield f"row {number}", _field(row, column, path, number)
    else:
        yield from _pieces(_read(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise IntegrityError("text is not UTF-8", where=path, mend="convert it, or give another file") from None
    except OSError as error:
        raise NotFoundError(f"text cannot be read: {error.strerror}", where=path, mend="give a UTF-8 file") from None


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise IntegrityError(f"line {number} is no JSON: {error}", where=path, mend="mend the line") from None


def _field(row: Any, column: str, path: Path, number: int) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise ConfigError(f"line {number} has no text column {column!r}", where=path, mend="give --text-column NAME")
    return value


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Yield pieces of whole paragraphs, each of PIECE_CHARACTERS or more but for the last."""
    piece, number = list[str](), 1
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= PIECE_CHARACTERS:
            yield f"piece {number}", "\n\n".join(piece)
            piece, number = [], number + 1
    yield f"piece {number}", "\n\n".join(piece)


def _of_stream(name: str, stage: int, side: Side) -> list[tuple[str, str]]:
    folder = stream_folder(registry.make_stream_source(name))
    if not (folder / "manifest.json").is_file():
        raise NotFoundError(f"stream {name!r} is not built", where=folder, mend=f"run `clbench prepare {name}`")
    stream = Stream(folder, check=True)
    n_stages = len(stream.stages())
    if stage >= n_stages:
        raise ConfigError(f"stage {stage} is not in the stream", where=f"{side} text {name}@{stage}",
                          mend=f"give {name}@0 to {name}@{n_stages - 1}")  # fmt: skip
    table = stream.documents("heldout", stage, ["id", "text"]).to_pydict()
    return list(zip(table["id"], table["text"], strict=True))


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer beside a model.

    Raises:
        ConfigError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = f"no tokenizer beside this model: {str(error).splitlines()[0]}"
        raise ConfigError(what, where=folder, mend="save it there with tokenizer.save_pretrained") from None


# --- one model for all candidates


class Bench:
    """A model in memory that gets the weights of plan after plan.

    Args:
        sources: opened folders.
        device: where it is measured.
        tokenizer: of the models.
    """

    def __init__(self, sources: Sources, device: torch.device, tokenizer: Any) -> None:
        from clbench.train.models import load_model, weights_of

        assert sources.tuned.folder is not None
        self.sources, self.device, self.tokenizer = sources, device, tokenizer
        model = load_model(sources.tuned.folder)
        names, layout = weights_of(model), sources.tuned.layout
        self.in_place = all(name in layout and layout[name].shape == tuple(w.shape) for name, w in names.items())
        """False: transformers names or shapes this model's weights otherwise than its files do."""
        self.model = model.to(device).eval()

    @contextmanager
    def holding(self, plan: MergePlan) -> Iterator[Checkpoint]:
        """Yield the merged model; what it held before is overwritten."""
        from clbench.train.models import load_model

        if self.in_place:
            self._write(plan)
            yield self.checkpoint(self.model, plan)
            return
        with tempfile.TemporaryDirectory() as place:  # so it is written once and loaded as any other
            merge_folder(plan, self.sources, Path(place) / "model", hash_inputs=False)
            model = load_model(Path(place) / "model").to(self.device).eval()
        yield self.checkpoint(model, plan)

    def _write(self, plan: MergePlan) -> None:
        import torch

        from clbench.train.models import weights_of

        own = weights_of(self.model)
        with torch.no_grad():
            for name, tensor in run(plan, self.sources):
                if name in own:  # a tied head is its twin
                    own[name].copy_(tensor)

    def checkpoint(self, model: torch.nn.Module, plan: MergePlan) -> Checkpoint:
        """Return what a judge measures."""
        return Checkpoint(
            model=model,
            weights_sha256=plan.sha256,
            device=self.device,
            autocast_dtype=None,
            tokenizer=self.tokenizer,
            tokenizer_sha256="",
        )
