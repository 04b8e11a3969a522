"""What a built stream holds: sizes, kinds of change, repeats, leakage, drift between stages, sample documents.

``portrait_of`` measures a ``Stream`` once and keeps the result in the cache folder under the stream's digest, so that
looking again is instant. Large stages are read in batches and by samples that are drawn with fixed seeds; the result
says how large every sample was. Showing it is left to ``clbench.listing_stream`` (terminal) and to
``leaderboard/stream_page.py``.

Symbols: T stages; matrices are ``[i][j]`` lists with None where something is undefined.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench import home
from clbench.drift import above_floor, extremes, js_matrix, log_odds, unseen_share
from clbench.duplicates import signatures, words_of
from clbench.errors import ClbenchError, IntegrityError
from clbench.files import digest_of, read_json, write_json
from clbench.leakage import NGRAM_WORDS, HeldOut, Overlap, RepeatCounter, Repeats, Texts
from clbench.ngram import Documents, NgramModel
from clbench.seeds import permutation
from clbench.stream import Split, StageInfo, Stream

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
"""Part of the address of a kept portrait: raise it whenever the same stream would give other figures."""
SEED = 0
BATCH_DOCUMENTS = 512
SPLITS: tuple[Split, ...] = ("train", "heldout")
TOP_GROUPS = 24
TOP_WORDS = 12
MIN_WORD_DOCUMENTS = 3
"""A word in fewer sampled documents is not named as typical, however often it stands there."""
MAX_GROUPS = 100_000
"""Groups counted by name; where a stage has more, the smallest are counted together."""
PERCENTILES = (5, 25, 50, 75, 95)
SAMPLE_CHARACTERS = 2000

Matrix = list[list[float | None]]
Bar = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How much is looked at. What is smaller than its limit is looked at whole."""

    samples: int = 8
    """Documents shown, a stage."""
    drift_tokens: int = 1_000_000
    """Train tokens a stage for the drift matrices; every stage gives as many as the smallest has."""
    predicted_tokens: int = 200_000
    """Held-out tokens a stage that the n-gram models predict."""
    order: int = 3
    """Of the n-gram models. Measured on codedocs-nano: longer ones predict their own stage by 0.03 bits per byte better
    and other stages worse."""
    scan_bytes: int = 512 << 20
    """Train text, all stages together, that is searched for repeats and leakage."""
    heldout_documents: int = 1000
    """Held-out documents a stage that are looked for in train, and counted for their words."""
    heldout_bytes: int = 2 << 20
    """The same, in text."""
    near_documents: int = 20_000
    """Train documents a stage among which near repeats are looked for."""
    word_bytes: int = 2 << 20
    """Train text a stage whose words are counted."""


@dataclass(frozen=True)
class Facts:
    """One split of a stage, all of its documents."""

    n_documents: int
    n_tokens: int
    n_bytes: int
    lengths: dict[str, float]
    """Tokens a document (end of text included): mean, p5, p25, p50, p75, p95, max."""
    length_bins: list[int]
    """Element k: documents of 2^k up to 2^(k+1) - 1 tokens."""
    changes: dict[str, dict[str, int]]
    """Change kind -> documents, tokens."""
    groups: dict[str, dict[str, int]]
    """The same for the stream's largest groups, and under an empty name for all others."""
    n_groups: int
    first_date: str
    last_date: str
    months: dict[str, int]
    """Documents by month, such as 2013-05."""


@dataclass(frozen=True)
class Sample:
    """One document, cut for display."""

    id: str
    date: str
    group: str
    change: str
    n_tokens: int
    text: str
    cut: bool


@dataclass(frozen=True)
class StagePortrait:
    """One stage."""

    index: int
    name: str
    start: str
    end: str
    train: Facts
    heldout: Facts
    repeats: Repeats
    typical: list[str]
    """Words that stand here more than in all other stages, by log-odds."""
    rising: list[str]
    """Words with more weight than in the stage before."""
    falling: list[str]
    samples: list[Sample]


@dataclass(frozen=True)
class Leakage:
    """Held-out documents found in train; matrices are held-out stage × train stage."""

    n_documents: list[int]
    """Held-out documents looked for, by stage."""
    n_words: list[int]
    """Their words."""
    scanned_share: float
    """Share of train documents searched (the same identities in every stage); below 1 all counts are lower bounds."""
    same_id: list[list[int]]
    exact: list[list[int]]
    near: list[list[int]]
    touched: list[list[int]]
    """Documents with at least one run of ``ngram_words`` words that stands in train."""
    covered: Matrix
    """Share of held-out words inside such a run."""
    anywhere: dict[str, list[int]]
    """same_id, exact, near, touched, half (documents half covered or more) against train of all stages together."""
    covered_anywhere: list[float | None]
    ngram_words: int = NGRAM_WORDS


@dataclass(frozen=True)
class Drift:
    """How far apart the stages are."""

    js_tokens: dict[str, int]
    """Split -> tokens in each of the two halves that a stage gives."""
    js: dict[str, Matrix]
    """Split -> Jensen-Shannon divergence of token frequencies, bits; on the diagonal the noise floor."""
    js_above_floor: dict[str, Matrix]
    model_tokens: int
    """Train tokens of every n-gram model."""
    predicted_tokens: list[int]
    """Held-out tokens predicted, by stage."""
    bits_per_byte: Matrix
    """``[i][j]``: a model of train stage i on held-out stage j."""
    unseen_words: Matrix
    """``[i][j]``: share of held-out words of stage j that stand in no train sample of stages 0 … i."""
    word_documents: list[int]
    """Train documents whose words were counted, by stage."""


@dataclass(frozen=True)
class Portrait:
    """Everything measured; ``as_dict`` is JSON."""

    name: str
    sha256: str
    version: int
    parameters: Parameters
    vocab_size: int
    groups: list[str]
    """The largest groups of the stages: first those that are the largest of a stage, then the second largest …"""
    stages: list[StagePortrait]
    leakage: Leakage
    drift: Drift
    seconds: float = field(default=0.0)
    """What measuring took."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON-able data."""
        return asdict(self)


def portrait_of(stream: Stream, parameters: Parameters | None = None, *, progress: bool = True) -> Portrait:
    """Measure a stream, or return what was measured before with the same parameters.

    Raises:
        IntegrityError: a file of the stream is missing or damaged.
    """
    parameters = parameters or Parameters()
    path = kept_path(stream, parameters)
    if (kept := _read(path)) is not None:
        return replace(kept, name=stream.name)
    from pyarrow import ArrowException

    try:
        portrait = _measure(stream, parameters, progress=progress)
    except (OSError, ArrowException) as error:
        raise _damaged(stream, str(error)) from error
    with suppress(ClbenchError):  # a cache folder that cannot be written costs the next look some time, nothing else
        write_json(path, portrait.as_dict())
    return portrait


def _damaged(stream: Stream, why: str) -> IntegrityError:
    """Return the error about a file of the stream."""
    return IntegrityError(
        f"the stream cannot be read: {' '.join(why.split())}",
        where=stream.folder,
        mend=f"delete the folder and run `clbench prepare {stream.name}`",
    )


def kept_path(stream: Stream, parameters: Parameters) -> Path:
    """Return where the portrait of this stream's content is kept."""
    seen = {"version": VERSION, "parameters": asdict(parameters), "n_stages": len(stream.stages())}
    key = digest_of(seen)
    return home.home() / "portraits" / f"{stream.sha256[:24]}-{key[:12]}.json"


def _read(path: Path) -> Portrait | None:
    """Return a kept portrait; one that cannot be read is made again."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Portrait).validate_python(read_json(path))
    except (ClbenchError, ValidationError, OSError):
        return None


def _measure(stream: Stream, parameters: Parameters, *, progress: bool) -> Portrait:
    """Measure everything, one bar over all of it."""
    start = time.perf_counter()
    stages = stream.stages()
    n_bytes = sum(stream.counts("train", info.index)["n_bytes"] for info in stages)
    share = min(1.0, parameters.scan_bytes / max(1, n_bytes))
    with _bar(stream.name, total=len(stages) * 3 + 2, enabled=progress) as advance:
        tallies = [{split: _tally(stream, split, info.index) for split in SPLITS} for info in stages]
        groups = _top_groups([one["train"].groups for one in tallies])
        advance(1)
        scan = _Scan(stream, parameters, share)
        read = []
        for info in stages:
            read.append(scan.stage(info.index))
            advance(1)
        leakage = _leakage(scan, [one.overlap for one in read])
        words = _words(read, scan)
        drift = _drift(stream, parameters, words, advance)
        advance(1)
    parts = [_stage_portrait(info, tallies[i], groups, read[i], words.by_stage[i]) for i, info in enumerate(stages)]
    return Portrait(
        name=stream.name,
        sha256=stream.sha256,
        version=VERSION,
        parameters=parameters,
        vocab_size=stream.vocab_size,
        groups=groups,
        stages=parts,
        leakage=leakage,
        drift=drift,
        seconds=round(time.perf_counter() - start, 2),
    )


@contextmanager
def _bar(name: str, *, total: int, enabled: bool) -> Iterator[Bar]:
    """Show a bar on a terminal; yield the function that moves it on."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from clbench.console import stderr

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not (enabled and stderr.is_terminal), transient=True) as progress:
        task = progress.add_task(f"looking at {name}", total=total)
        yield lambda n: progress.advance(task, n)


# --- all documents: counts ------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Counts over all documents of one split of a stage, from the narrow columns."""

    n_documents: int
    n_tokens: int
    n_bytes: int
    changes: dict[str, list[int]]
    groups: dict[str, list[int]]
    """Name -> documents, tokens; the empty name holds those that were too many to name."""
    months: Counter[str]
    first_date: str
    last_date: str
    lengths: dict[str, float]
    length_bins: list[int]


def _tally(stream: Stream, split: Split, stage: int) -> _Tally:
    """Count one split of a stage."""
    changes: dict[str, list[int]] = {kind: [0, 0] for kind in ("new", "changed", "unchanged")}
    groups: dict[str, list[int]] = {}
    months: Counter[str] = Counter()
    dates: list[str] = []
    for batch in stream.document_batches(split, stage, ["date", "group", "change", "n_tokens"], n_rows=65_536):
        n_tokens = batch.column("n_tokens").to_numpy(zero_copy_only=False)
        _add(changes, batch.column("change"), n_tokens)
        _add(groups, batch.column("group"), n_tokens)
        _prune(groups)
        days = batch.column("date").to_pylist()
        months.update(day[:7] for day in days)
        dates = [min(days + dates[:1]), max(days + dates[1:])]
    counts = stream.counts(split, stage)
    try:
        lengths = np.diff(stream.offsets(split, stage))
    except ValueError as error:  # what numpy says of a file that is cut
        raise _damaged(stream, str(error)) from error
    n_found = sum(n for n, _ in changes.values())
    if not n_found == len(lengths) == counts["n_documents"]:
        raise _damaged(stream, f"{split} of stage {stage} has {n_found} documents, not {counts['n_documents']}")
    if not len(stream.tokens(split, stage)) == lengths.sum() == counts["n_tokens"]:
        raise _damaged(stream, f"{split} of stage {stage} has not its {counts['n_tokens']} tokens")
    return _Tally(
        n_documents=counts["n_documents"],
        n_tokens=counts["n_tokens"],
        n_bytes=counts["n_bytes"],
        changes=changes,
        groups=groups,
        months=months,
        first_date=dates[0] if dates else "",
        last_date=dates[1] if dates else "",
        lengths=_percentiles(lengths),
        length_bins=np.bincount(np.log2(np.maximum(lengths, 1)).astype(np.int64)).tolist() if len(lengths) else [],
    )


def _add(counts: dict[str, list[int]], column: pa.Array, n_tokens: NDArray[Any]) -> None:
    """Add documents and tokens of a batch by the values of a column."""
    coded = column.dictionary_encode()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    names = coded.dictionary.to_pylist()
    documents = np.bincount(codes, minlength=len(names))
    tokens = np.bincount(codes, weights=n_tokens, minlength=len(names))
    for name, n, m in zip(names, documents, tokens, strict=True):
        entry = counts.setdefault(name, [0, 0])
        entry[0] += int(n)
        entry[1] += int(m)


def _prune(groups: dict[str, list[int]]) -> None:
    """Keep memory bounded where there are millions of groups: put the smaller half under the empty name."""
    if len(groups) <= MAX_GROUPS:
        return
    rest = groups.setdefault("", [0, 0])
    for name in sorted(groups, key=lambda g: (-groups[g][1], g))[MAX_GROUPS // 2 :]:
        if name:
            n, m = groups.pop(name)
            rest[0] += n
            rest[1] += m


def _percentiles(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Return mean, percentiles and maximum."""
    if not len(lengths):
        return {}
    found = {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(lengths, PERCENTILES), strict=True)}
    return {"mean": round(float(lengths.mean()), 2), **found, "max": float(lengths.max())}


def _top_groups(stages: list[dict[str, list[int]]]) -> list[str]:
    """Return groups by their best place in any stage, then by their largest share of one, then by name."""
    best: dict[str, tuple[int, float]] = {}
    for groups in stages:
        total = sum(tokens for _, tokens in groups.values()) or 1
        ordered = sorted((name for name in groups if name), key=lambda name: (-groups[name][1], name))
        for place, name in enumerate(ordered[:TOP_GROUPS]):
            best[name] = min(best.get(name, (place, 0.0)), (place, -groups[name][1] / total))
    return sorted(best, key=lambda name: (best[name], name))[:TOP_GROUPS]


def _facts(tally: _Tally, groups: list[str]) -> Facts:
    """Return a tally with the groups outside the stream's largest put together."""
    shown = {name: tally.groups.get(name, [0, 0]) for name in groups}
    rest = [value for name, value in tally.groups.items() if name not in shown]
    shown[""] = [sum(n for n, _ in rest), sum(m for _, m in rest)]
    return Facts(
        n_documents=tally.n_documents,
        n_tokens=tally.n_tokens,
        n_bytes=tally.n_bytes,
        lengths=tally.lengths,
        length_bins=tally.length_bins,
        changes={kind: {"documents": n, "tokens": m} for kind, (n, m) in tally.changes.items()},
        groups={name: {"documents": n, "tokens": m} for name, (n, m) in shown.items()},
        n_groups=len(tally.groups),
        first_date=tally.first_date,
        last_date=tally.last_date,
        months=dict(sorted(tally.months.items())),
    )


# --- texts: repeats, leakage, words, samples ------------------------------------------------------------------


def chance(document_id: str) -> float:
    """Return a number in [0, 1) that the identity alone decides: a sample holds the smallest ones."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, person=b"portrait").digest()
    return int.from_bytes(digest, "big") / 2.0**64


@dataclass
class _Read:
    """What reading the train texts of one stage gave."""

    overlap: Overlap
    repeats: Repeats
    words: Counter[str]
    spread: Counter[str]
    """Word -> documents that hold it."""
    word_documents: int
    samples: list[Sample]


class _Scan:
    """Reads texts: the held-out sample once, then train stage after stage."""

    def __init__(self, stream: Stream, parameters: Parameters, share: float) -> None:
        self.stream, self.parameters, self.share = stream, parameters, share
        self.heldout_words: list[Counter[str]] = []
        self.stage_of: list[int] = []
        """Stage of every held-out document that is looked for."""
        self.n_heldout: list[int] = []
        texts = Texts.of([], [])
        for info in stream.stages():
            here = self._heldout(info.index)
            texts += Texts.of([one for one, _ in here], [words for _, words in here])
            self.stage_of += [info.index] * len(here)
            self.n_heldout.append(len(here))
            self.heldout_words.append(Counter(word for _, words in here for word in words))
        self.heldout = HeldOut(texts)
        self.repeats = RepeatCounter(parameters.near_documents)
        self.word_share = self._word_share()

    def _heldout(self, stage: int) -> list[tuple[str, list[str]]]:
        """Return id and words of the held-out documents with the smallest ``chance``, within both limits."""
        narrow = [
            (chance(one), n)
            for batch in self.stream.document_batches("heldout", stage, ["id", "n_bytes"], n_rows=65_536)
            for one, n in zip(batch.column("id").to_pylist(), batch.column("n_bytes").to_pylist(), strict=True)
        ]
        last, n_bytes = -1.0, 0
        for place, (value, n) in enumerate(sorted(narrow)[: self.parameters.heldout_documents]):
            n_bytes += n
            if place and n_bytes > self.parameters.heldout_bytes:
                break
            last = value
        return [
            (one, words_of(text))
            for batch in self.stream.document_batches("heldout", stage, ["id", "text"], n_rows=BATCH_DOCUMENTS)
            for one, text in zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True)
            if chance(one) <= last
        ]

    def _word_share(self) -> list[float]:
        """Return the share of each stage's documents whose words are counted: about as much text from every stage."""
        sizes = [max(1, self.stream.counts("train", info.index)["n_bytes"]) for info in self.stream.stages()]
        wanted = min([self.parameters.word_bytes, *sizes])
        return [min(self.share, wanted / size) for size in sizes]

    def stage(self, stage: int) -> _Read:
        """Read the train texts of one stage."""
        words: Counter[str] = Counter()
        spread: Counter[str] = Counter()
        samples: list[tuple[float, str, Sample]] = []
        n_word_documents = 0
        columns = ["id", "text", "date", "group", "change", "n_tokens"]
        for batch in self.stream.document_batches("train", stage, columns, n_rows=BATCH_DOCUMENTS):
            rows = [(chance(one["id"]), one) for one in batch.to_pylist()]
            rows = [(value, one) for value, one in rows if value < self.share]
            of_rows = [words_of(one["text"]) for _, one in rows]
            texts = Texts.of([one["id"] for _, one in rows], of_rows)
            rows_NP = signatures(texts.words)
            self.heldout.train(texts, rows_NP)
            self.repeats.train(texts, rows_NP)
            for (value, one), mine in zip(rows, of_rows, strict=True):
                _keep_smallest(samples, value, one, self.parameters.samples)
                if value < self.word_share[stage]:
                    words.update(mine)
                    spread.update(set(mine))
                    n_word_documents += 1
        found = [one for _, _, one in sorted(samples, key=lambda entry: -entry[0])]
        return _Read(self.heldout.end_stage(), self.repeats.end_stage(), words, spread, n_word_documents, found)


def _keep_smallest(heap: list[tuple[float, str, Sample]], value: float, row: dict[str, Any], k: int) -> None:
    """Keep the k documents of the smallest ``chance``."""
    if k == 0 or (len(heap) == k and -value <= heap[0][0]):
        return
    text = row["text"]
    shown = text[:SAMPLE_CHARACTERS]
    sample = Sample(  # ids come once a stage, so samples themselves are never compared
        **{name: row[name] for name in ("id", "date", "group", "change", "n_tokens")}, text=shown, cut=shown != text
    )
    (heapq.heappush if len(heap) < k else heapq.heapreplace)(heap, (-value, sample.id, sample))


def _leakage(scan: _Scan, found: list[Overlap]) -> Leakage:
    """Return the tables of held-out stage against train stage."""
    stage_of, n_stages = np.array(scan.stage_of, np.int64), len(found)
    n_words = np.bincount(stage_of, weights=scan.heldout.n_words, minlength=n_stages)

    def by_stage(flags: NDArray[Any]) -> list[int]:
        return [int(n) for n in np.bincount(stage_of, weights=flags, minlength=n_stages)]

    def table(of: Callable[[Overlap], NDArray[Any]]) -> list[list[int]]:
        columns = [by_stage(of(one)) for one in found]
        return [[column[i] for column in columns] for i in range(n_stages)]

    def shares(counts: list[int]) -> list[float | None]:
        return [_rounded(n / m) if m else None for n, m in zip(counts, n_words, strict=True)]

    everywhere = scan.heldout.everywhere()
    covered = [shares(by_stage(one.covered_words)) for one in found]
    return Leakage(
        n_documents=scan.n_heldout,
        n_words=[int(n) for n in n_words],
        scanned_share=_rounded(scan.share) or 0.0,
        same_id=table(lambda one: one.same_id),
        exact=table(lambda one: one.exact),
        near=table(lambda one: one.near),
        touched=table(lambda one: one.covered_words > 0),
        covered=[[column[i] for column in covered] for i in range(n_stages)],
        anywhere={
            "same_id": by_stage(everywhere.same_id),
            "exact": by_stage(everywhere.exact),
            "near": by_stage(everywhere.near),
            "touched": by_stage(everywhere.covered_words > 0),
            "half": by_stage(2 * everywhere.covered_words >= scan.heldout.n_words),
        },
        covered_anywhere=shares(by_stage(everywhere.covered_words)),
    )


@dataclass(frozen=True)
class _Words:
    by_stage: list[dict[str, list[str]]]
    """typical, rising, falling."""
    unseen: Matrix
    documents: list[int]
    """Train documents whose words were counted, by stage."""


def _words(read: list[_Read], scan: _Scan) -> _Words:
    """Return the words that tell the stages apart, and how many held-out words earlier train text lacks."""
    everything: Counter[str] = Counter()
    spread: Counter[str] = Counter()
    for one in read:
        everything.update(one.words)
        spread.update(one.spread)
    background = {w: n for w, n in everything.items() if spread[w] >= MIN_WORD_DOCUMENTS and _is_word(w)}
    by_stage, seen, unseen = [], set[str](), []
    for i, one in enumerate(read):
        others = everything - one.words
        typical, _ = extremes(log_odds(one.words, others, background), TOP_WORDS)
        rising, falling = extremes(log_odds(one.words, read[i - 1].words, background) if i else {}, TOP_WORDS)
        by_stage.append({"typical": typical, "rising": rising, "falling": falling})
        seen |= one.words.keys()
        unseen.append([_rounded(unseen_share(counts, seen)) for counts in scan.heldout_words])
    return _Words(by_stage, unseen, [one.word_documents for one in read])


def _is_word(word: str) -> bool:
    """Whether it is worth naming: longer than a letter, and not only digits and underscores."""
    return len(word) > 1 and any(c.isalpha() for c in word)


# --- tokens: drift --------------------------------------------------------------------------------------------


def _drift(stream: Stream, parameters: Parameters, words: _Words, advance: Bar) -> Drift:
    """Return the drift matrices; every stage gives samples of the same size."""
    stages = [info.index for info in stream.stages()]
    js_tokens: dict[str, int] = {}
    js: dict[str, Matrix] = {}
    above: dict[str, Matrix] = {}
    for split in SPLITS:
        js_tokens[split], matrix = _js(stream, split, stages, parameters.drift_tokens)
        js[split], above[split] = _listed(matrix), _listed(above_floor(matrix))
    advance(len(stages))
    n_tokens = min([parameters.drift_tokens, *(stream.counts("train", i)["n_tokens"] for i in stages)])
    predicted, n_bytes = zip(*(_predicted(stream, i, parameters.predicted_tokens) for i in stages), strict=True)
    matrix = np.empty((len(stages), len(stages)))
    for i in stages:
        parts = _cut(_documents(stream, "train", i), n_tokens)
        model = NgramModel(Documents.of(parts, stream.eos_id), stream.vocab_size, parameters.order)
        for j in stages:
            matrix[i, j] = model.bits(predicted[j]).sum() / n_bytes[j] if n_bytes[j] else math.nan
        advance(1)
    return Drift(
        js_tokens=js_tokens,
        js=js,
        js_above_floor=above,
        model_tokens=n_tokens,
        predicted_tokens=[len(one) for one in predicted],
        bits_per_byte=_listed(matrix),
        unseen_words=words.unseen,
        word_documents=words.documents,
    )


def _documents(
    stream: Stream, split: Split, stage: int, rows: NDArray[np.int64] | None = None
) -> Iterator[NDArray[Any]]:
    """Yield the tokens of documents, by default of all in the order in which this stage is sampled."""
    offsets, tokens = stream.offsets(split, stage), stream.tokens(split, stage)
    for row in _order(stream, split, stage) if rows is None else rows:
        yield tokens[offsets[row] : offsets[row + 1]]


def _order(stream: Stream, split: Split, stage: int) -> NDArray[np.int64]:
    """Return the documents of a stage in the order in which they are sampled."""
    return permutation(stream.counts(split, stage)["n_documents"], SEED, "portrait", split, stage)


def _cut(documents: Iterator[NDArray[Any]], n_tokens: int) -> list[NDArray[Any]]:
    """Return documents of exactly ``n_tokens`` tokens together (fewer where there are no more), the last one cut."""
    found: list[NDArray[Any]] = []
    for document in documents:
        if n_tokens <= 0:
            break
        found.append(document[:n_tokens])
        n_tokens -= len(found[-1])
    return found


def _js(stream: Stream, split: Split, stages: list[int], limit: int) -> tuple[int, NDArray[np.float64]]:
    """Return the tokens in every half and the divergences of one split."""
    sizes = [limit // 2]
    for stage in stages:
        order, lengths = _order(stream, split, stage), np.diff(stream.offsets(split, stage))
        if len(order) > 1:  # one document has no halves: its stage gets no figures, the others do
            sizes += [int(lengths[order[::2]].sum()), int(lengths[order[1::2]].sum())]
    n_tokens = min(sizes) if len(sizes) > 1 else 0
    halves = [(_half(stream, split, stage, 0, n_tokens), _half(stream, split, stage, 1, n_tokens)) for stage in stages]
    return n_tokens, js_matrix(halves)


def _half(stream: Stream, split: Split, stage: int, which: int, n_tokens: int) -> NDArray[np.int64]:
    """Return the token counts of ``n_tokens`` tokens of every other document, in the order of sampling."""
    order = _order(stream, split, stage)
    if len(order) < 2:
        return np.zeros(stream.vocab_size, np.int64)
    tokens = [np.zeros(0, np.int64), *_cut(_documents(stream, split, stage, order[which::2]), n_tokens)]
    return np.bincount(np.concatenate(tokens).astype(np.int64), minlength=stream.vocab_size)


def _predicted(stream: Stream, stage: int, limit: int) -> tuple[Documents, int]:
    """Return whole held-out documents of about ``limit`` tokens, and the bytes of their text."""
    batches = stream.document_batches("heldout", stage, ["n_bytes"], n_rows=65_536)
    n_bytes = np.concatenate([batch.column("n_bytes").to_numpy(zero_copy_only=False) for batch in batches])
    lengths, order = np.diff(stream.offsets("heldout", stage)), _order(stream, "heldout", stage)
    fits = np.cumsum(lengths[order]) <= limit
    fits[:1] = True
    rows = order[fits]
    return Documents.of(_documents(stream, "heldout", stage, rows), stream.eos_id), int(n_bytes[rows].sum())


def _listed(matrix: NDArray[np.float64]) -> Matrix:
    """Return a matrix for JSON: None for NaN."""
    return [[_rounded(float(value)) for value in row] for row in matrix]


def _rounded(value: float) -> float | None:
    """Return a figure with six decimals, the same on every machine; None for NaN."""
    return None if math.isnan(value) else round(value, 6)


def _stage_portrait(
    info: StageInfo, tallies: dict[Split, _Tally], groups: list[str], read: _Read, words: dict[str, list[str]]
) -> StagePortrait:
    """Return one stage's part."""
    return StagePortrait(
        index=info.index,
        name=info.name,
        start=info.start,
        end=info.end,
        train=_facts(tallies["train"], groups),
        heldout=_facts(tallies["heldout"], groups),
        repeats=read.repeats,
        samples=read.samples,
        **words,
    )
