"""Streams made of other streams: what a transform chooses, and the engine that writes the choice down.

A *transform* (content, in ``streams/``) says which documents of its built input streams stand in which new stage, and
in which order; see ``StreamTransform``. Texts and tokens are gathered from the inputs and never made again, so held-out
documents stay held-out and budgets are exact. How a stream is laid out is left to ``clbench.packing``.
"""

from __future__ import annotations

import hashlib
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench import packing
from clbench.duplicates import NearIndex, fingerprints
from clbench.errors import ConfigError
from clbench.files import sha256_bytes
from clbench.stream import DOCUMENT_COLUMNS, Change, Document, Split, StageInfo, Stream, StreamSource, identity_of

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

IntArray = NDArray[np.int64]
Hashes = NDArray[np.uint64]
SPLITS: tuple[Split, ...] = get_args(Split)
CHANGES: tuple[Change, ...] = get_args(Change)
TEXT_COLUMNS = [name for name in DOCUMENT_COLUMNS if name not in ("change", "n_tokens")]
CHUNK_TOKENS = 1 << 24
"""Tokens gathered at once, with their texts: about 60 MB, a part of the written stream."""
BATCH_ROWS = 4096


# --- what a transform is ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """The documents of one split of a new stage, in packed order; arrays of int64, shape ``[n]``.

    A document may come once in a split of a stage; in several stages it may come again.
    """

    input: IntArray
    """Which input stream."""
    stage: IntArray
    """Which stage of it."""
    row: IntArray
    """Which document of the same split of that stage, in packed order."""
    n_tokens: IntArray
    """0: the whole document. Else it is cut to so many tokens, its end of text included: at least 2."""

    @classmethod
    def of(cls, stage: ArrayLike, row: ArrayLike, *, input: ArrayLike = 0, n_tokens: ArrayLike = 0) -> Taken:
        """Return documents given by arrays or numbers, which are broadcast against each other."""
        columns = np.broadcast_arrays(*(np.asarray(column, np.int64) for column in (input, stage, row, n_tokens)))
        return cls(*(np.atleast_1d(column).copy() for column in columns))

    @classmethod
    def joined(cls, parts: Iterable[Taken]) -> Taken:
        """Return several choices one after another; none gives an empty one."""
        parts = list(parts)
        empty = [np.zeros(0, np.int64)]
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts] or empty) for f in fields(cls)))

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, chosen: Any) -> Taken:
        """Return the documents of a slice, a mask or an array of places."""
        return Taken(*(getattr(self, f.name)[chosen] for f in fields(self)))


class StreamTransform(StreamSource):
    """A source whose documents are those of built streams, in another order, share or selection.

    Subclasses give ``stages`` and ``take``, and raise ``version`` whenever the same options would choose other
    documents. Both are called after ``open`` and are pure functions of the options and the inputs. The split is that of
    the inputs: ``take("train", k)`` can only name train documents.

    All inputs must have the tokenizer of the first (``tokenizer: stream:NAME`` in a specification gives them one).
    """

    version: int = 1

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """A docstring under each field is its help text."""

        of: str
        """The stream to transform: a name, NAME:option=value, a YAML specification or a Python file."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        from clbench.registry import make_stream_source

        self.inputs: list[Stream] = []
        """The built input streams, in the order of ``sources()``; empty before ``open``."""
        self.name = f"{make_stream_source(self.sources()[0]).name}.{type(self).name}"

    def sources(self) -> list[str]:
        """Return the names of the input streams; the first gives tokenizer and extras."""
        return [self.options.of]

    def open(self, inputs: Sequence[Stream]) -> None:
        """Take the built input streams, in the order of ``sources()``.

        Raises:
            ConfigError: they do not share one tokenizer, or a setting is asked for that only a built stream has.
        """
        first = inputs[0]
        for other in inputs[1:]:
            if other.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
                raise ConfigError(
                    f"streams {first.name!r} and {other.name!r} have different tokenizers",
                    where=self.name,
                    mend=f"build {other.name!r} from a specification with `tokenizer: stream:{first.name}`",
                )
        if given := sorted(set((self.recipe or {}).get("overrides", ())) - {"name"}):
            raise ConfigError(
                f"{', '.join(given)} cannot be set here: a stream made of others has their split and tokenizer",
                where=self.name,
                mend="set it in the specification of the input stream",
            )
        self.inputs = list(inputs)
        for name in [name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)]:
            del vars(self)[name]  # what was worked out from other inputs

    def fetch(self) -> None:
        """Build the input streams, if they are not open yet; needs what they need."""
        from clbench.build import build_stream
        from clbench.registry import make_stream_source

        if not self.inputs:
            self.open([build_stream(make_stream_source(target)) for target in self.sources()])

    def settings(self) -> dict[str, Any]:
        """Return the options and the version of the transform; the builder adds the addresses of the inputs."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.options).items()}
        return {"transform": type(self).name, "version": self.version, "options": options}

    @abstractmethod
    def stages(self) -> list[StageInfo]:
        """Return the new stages in order, stage 0 first; their dates span the periods that they hold."""

    @abstractmethod
    def take(self, split: Split, stage: int) -> Taken:
        """Return which documents of this split of the inputs make up this split of a new stage, in packed order."""

    @cached_property
    def _plan(self) -> _Plan:
        return _Plan.of(self)

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield the documents of a new stage as they are written: train, then held-out."""
        for split in SPLITS:
            for table, _, _ in self._plan.chunks(split, stage):
                for row in table.select(list(DOCUMENT_COLUMNS[:5])).to_pylist():
                    yield Document(**row)

    def extras(self) -> dict[str, bytes]:
        """Return the extras of the first input."""
        first = self.inputs[0]
        names = [name.removeprefix("extras/") for name in first.manifest["files"] if name.startswith("extras/")]
        return {name: first.extra(name) for name in sorted(names)}


# --- writing ------------------------------------------------------------------------------------------------


class Bar(Protocol):
    """A progress bar in steps."""

    def total(self, n: int, /) -> None:
        """Say how many steps there are."""

    def step(self, what: str, /) -> None:
        """Begin a step."""


def write_derived(source: StreamTransform, folder: Path, about: dict[str, Any], bar: Bar) -> None:
    """Write an opened transform's stream into an empty folder, the manifest last.

    Args:
        source: the transform; its inputs are open.
        folder: of the stream; pieces are set down beside it, in ``pieces``.
        about: what the manifest says about the source.
        bar: shows what is being done.

    Raises:
        ConfigError: the transform names a document that is not there, or twice in a stage, or leaves a stage empty.
    """
    start = time.perf_counter()
    bar.total(2 + len(source.stages()))
    bar.step("choosing documents")
    plan = source._plan
    facts = packing.tokenizer_of(source.inputs[0], folder / "tokenizer")
    entries, contents = [], []
    for info in source.stages():
        bar.step(f"writing stage {info.name}")
        entry: dict[str, Any] = asdict(info) | {"changes": {}}
        content: dict[str, Any] = {}
        for split in SPLITS:
            pieces = _write_pieces(plan, split, info.index, folder.parent / "pieces", facts.dtype)
            counts, changes, digests = packing.join(pieces, folder, split=split, stage=info.index, facts=facts)
            entry[split] = counts | plan.counted[split][info.index]
            entry["changes"][split] = changes
            content[split] = digests
        entries.append(entry)
        contents.append(content)
    packing.write_extras(source.extras(), folder)
    about = about | {"inputs": [_about_input(one, i, plan) for i, one in enumerate(source.inputs)]}
    first = source.inputs[0]
    if contents[0]["train"] == first.manifest["contents"][0]["train"]:
        about |= {"base_sha256": first.base_sha256}  # what trains the base is the same: arms start from one base
    seconds = {"derive": round(time.perf_counter() - start, 2)}
    packing.write_manifest(folder, about=about, facts=facts, entries=entries, contents=contents, seconds=seconds)


def _about_input(stream: Stream, place: int, plan: _Plan) -> dict[str, Any]:
    """Return what the manifest says about an input: which one, and how much of it stands in no new stage."""
    left_out = {}
    for split in SPLITS:
        joined = Taken.joined(plan.taken[split])
        used = joined[joined.input == place]
        stages = range(len(stream.stages()))
        lengths = {stage: np.diff(stream.offsets(split, stage)) for stage in stages}
        unused = {stage: np.ones(len(lengths[stage]), bool) for stage in stages}
        for stage in stages:
            unused[stage][used.row[used.stage == stage]] = False
        left_out[split] = {
            "n_documents": sum(int(unused[stage].sum()) for stage in stages),
            "n_tokens": sum(int(lengths[stage][unused[stage]].sum()) for stage in stages),
        }
    return {"name": stream.name, "sha256": stream.sha256, "left_out": left_out}


def _write_pieces(plan: _Plan, split: Split, stage: int, folder: Path, dtype: str) -> list[Path]:
    """Write one split of a stage, a piece for every chunk; returns the pieces in order."""
    pieces = []
    for i, (table, tokens, lengths) in enumerate(plan.chunks(split, stage)):
        pieces.append(folder / f"{split}-{stage:02d}-{i:04d}")
        writer = packing.PieceWriter(pieces[-1], dtype)
        ends = np.cumsum(lengths)
        for first in range(0, len(lengths), BATCH_ROWS):
            rows = slice(first, first + BATCH_ROWS)
            begin, end = ends[first] - lengths[first], ends[rows][-1]
            writer.add(table.slice(first, BATCH_ROWS), tokens[begin:end], lengths[rows])
        writer.close()
    return pieces


# --- what is written: the choice, checked and completed -----------------------------------------------------


@dataclass
class _Plan:
    """What a transform took, without what must not stand there, and how its documents look in their new place."""

    inputs: Sequence[Stream]
    taken: dict[Split, list[Taken]]
    change: dict[Split, list[IntArray]] = field(default_factory=dict)
    """Change kind in the new order, as a place in ``CHANGES``, ``[n]`` per stage."""
    version: dict[Split, list[IntArray]] = field(default_factory=dict)
    """1 for the first document of its identity in its stage, 2 for the next …, ``[n]`` per stage."""
    counted: dict[Split, list[dict[str, int]]] = field(default_factory=dict)
    """What was dropped and what repeats, per stage, for the manifest."""

    @classmethod
    def of(cls, source: StreamTransform) -> _Plan:
        """Ask the transform for every stage, check its answers and complete them.

        Raises:
            ConfigError: see ``write_derived``.
        """
        from clbench.build import checked_stages

        infos = checked_stages(source)
        facts = _Facts(source.inputs)
        taken = {split: [source.take(split, info.index) for info in infos] for split in SPLITS}
        for split, info in ((split, info) for info in infos for split in SPLITS):
            _check(taken[split][info.index], source.inputs, split, f"{source.name} stage {info.name}")
        plan = cls(source.inputs, taken, counted={split: [{} for _ in infos] for split in SPLITS})
        plan._drop_heldout_from_train(facts)
        plan._drop_copies_from_heldout()
        for split, info in ((split, info) for info in infos for split in SPLITS):
            if not len(plan.taken[split][info.index]):
                raise ConfigError(
                    f"stage {info.name} has no {split} documents", where=source.name, mend="choose other options"
                )
        for split in SPLITS:
            plan._place(split, facts)
        return plan

    def _keep(self, split: Split, stage: int, kept: NDArray[np.bool_], counts: dict[str, int]) -> None:
        self.taken[split][stage] = self.taken[split][stage][kept]
        self.counted[split][stage] |= counts

    def _drop_heldout_from_train(self, facts: _Facts) -> None:
        """Drop from train every identity that is held out anywhere: of several inputs, one may train on it."""
        heldout = np.unique(np.concatenate([facts.of("heldout", taken).identity for taken in self.taken["heldout"]]))
        for stage, taken in enumerate(self.taken["train"]):
            leaks = np.isin(facts.of("train", taken).identity, heldout)
            self._keep("train", stage, ~leaks, {"dropped_held_out_elsewhere": int(leaks.sum())})

    def _drop_copies_from_heldout(self) -> None:
        """Drop from held-out what another input trains on, exactly or nearly, or what a cut document has become.

        Within one input the builder did so already. Compared is with *all* train documents of the other inputs, so that
        held-out does not depend on how much of them is taken: doses of one mixture are measured on the same documents.
        """
        queries, corpus = Taken.joined(self.taken["heldout"]), Taken.joined(self.taken["train"])
        asked = set(np.unique(queries.input).tolist())
        parts = [_whole(one, i, "train") for i, one in enumerate(self.inputs) if asked - {i}]
        parts.append(corpus if queries.n_tokens.any() else corpus[_is_cut(self.inputs, "train", corpus)])
        exact = near = np.zeros(len(queries), bool)
        if any(map(len, parts)):
            exact, near = _copies(self.inputs, queries, Taken.joined(parts))
        ends = np.cumsum([len(taken) for taken in self.taken["heldout"]])[:-1]
        for stage, (is_exact, is_near) in enumerate(zip(np.split(exact, ends), np.split(near, ends), strict=True)):
            counts = {"dropped_exact": int(is_exact.sum()), "dropped_near": int((is_near & ~is_exact).sum())}
            self._keep("heldout", stage, ~(is_exact | is_near), counts)

    def _place(self, split: Split, facts: _Facts) -> None:
        """Compare every stage with the stages before it in the new order.

        A document is *unchanged* if an earlier stage has its identity with the same text, *changed* if it only has
        the identity, else *new*.
        """
        identities, texts, pairs = (np.zeros(0, np.uint64) for _ in range(3))
        self.change[split], self.version[split] = [], []
        for stage, taken in enumerate(self.taken[split]):
            here = facts.of(split, taken)
            pair = _paired(here.identity, here.text)
            known, same = np.isin(here.identity, identities), np.isin(pair, pairs)
            new, changed, unchanged = (CHANGES.index(kind) for kind in ("new", "changed", "unchanged"))
            self.change[split].append(np.where(same, unchanged, np.where(known, changed, new)))
            self.version[split].append(_occurrences(here.identity))
            self.counted[split][stage] |= {"repeated_exact": len(taken) - len(np.unique(here.text))}
            if split == "train":
                self.counted[split][stage] |= {"repeated_from_earlier_stage": int(np.isin(here.text, texts).sum())}
            identities, texts = np.union1d(identities, here.identity), np.union1d(texts, here.text)
            pairs = np.union1d(pairs, pair)

    def chunks(self, split: Split, stage: int) -> Iterator[tuple[pa.Table, NDArray[Any], IntArray]]:
        """Yield the documents of one split of a new stage in order: table, tokens ``[n_tokens]``, lengths ``[n]``."""
        import pyarrow as pa

        taken = self.taken[split][stage]
        for rows in _chunks(self.inputs, split, taken):
            table, tokens, lengths = _gather(self.inputs, split, taken[rows])
            names = [identity_of(name) for name in table["id"].to_pylist()]
            marks = ["" if k == 1 else f"@@{k}" for k in self.version[split][stage][rows].tolist()]
            ids = pa.array([name + mark for name, mark in zip(names, marks, strict=True)], pa.string())
            change = pa.array([CHANGES[kind] for kind in self.change[split][stage][rows].tolist()], pa.string())
            table = table.set_column(table.column_names.index("id"), "id", ids).append_column("change", change)
            yield table, tokens, lengths


def _check(taken: Taken, inputs: Sequence[Stream], split: Split, where: str) -> None:
    """Refuse references to documents that are not there, that come twice, or that cannot be cut so."""
    problem = None
    for i, stage in _places(taken, check=True):
        if not (0 <= i < len(inputs) and 0 <= stage < len(inputs[i].stages())):
            raise ConfigError(f"there is no stage {stage} of input {i}", where=where, mend="mend take()")
        offsets = inputs[i].offsets(split, stage)
        here = (taken.input == i) & (taken.stage == stage)
        row, n_tokens = taken.row[here], taken.n_tokens[here]
        if row.min() < 0 or row.max() >= len(offsets) - 1:
            problem = f"names rows {row.min()} to {row.max()} of {len(offsets) - 1}"
        elif len(np.unique(row)) < len(row):
            problem = "names a document twice"
        elif ((n_tokens != 0) & ((n_tokens < 2) | (n_tokens > np.diff(offsets)[row]))).any():
            problem = "cuts a document to fewer than 2 tokens, or to more than it has"
        if problem:
            raise ConfigError(
                f"take() {problem} (stage {stage} of {inputs[i].name})", where=f"{where}, {split}", mend="mend take()"
            )


def _places(taken: Taken, *, check: bool = False) -> list[tuple[int, int]]:
    """Return the pairs of input and stage that documents come from, sorted."""
    if check and len({len(getattr(taken, f.name)) for f in fields(taken)}) > 1:
        raise ConfigError("the arrays of Taken differ in length", mend="make them with Taken.of")
    pairs = np.unique(np.stack([taken.input, taken.stage], axis=1), axis=0)
    return [(int(i), int(stage)) for i, stage in pairs]


def _whole(stream: Stream, place: int, split: Split) -> Taken:
    """Return all documents of a split of an input."""
    return Taken.joined(
        Taken.of(info.index, np.arange(stream.counts(split, info.index)["n_documents"]), input=place)
        for info in stream.stages()
    )


def _copies(inputs: Sequence[Stream], queries: Taken, corpus: Taken) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which held-out documents are exact, and which near duplicates of some train documents, each ``[q]``."""
    found = [fingerprints(texts) for texts in _texts(inputs, "heldout", queries)]
    keys = np.concatenate([key for key, _ in found])
    index = NearIndex(np.concatenate([signature for _, signature in found]))
    exact = np.zeros(len(keys), bool)
    columns = np.stack([getattr(corpus, f.name) for f in fields(corpus)], axis=1)
    _, once = np.unique(columns, axis=0, return_index=True)  # what comes in several stages is compared once
    for texts in _texts(inputs, "train", corpus[np.sort(once)]):
        key, signature = fingerprints(texts)
        exact |= np.isin(keys, key)
        index.meet(signature)
    return exact, index.found


def _texts(inputs: Sequence[Stream], split: Split, taken: Taken) -> Iterator[list[str]]:
    """Yield texts, cut where they are cut, in batches."""
    for rows in _chunks(inputs, split, taken):
        table = _gather(inputs, split, taken[rows])[0]
        for first in range(0, table.num_rows, BATCH_ROWS):
            yield table["text"].slice(first, BATCH_ROWS).to_pylist()


# --- facts about documents, without their texts -------------------------------------------------------------


@dataclass(frozen=True)
class _Hashed:
    """64-bit hashes of the identities and of the texts of some documents, ``[n]``."""

    identity: Hashes
    text: Hashes


class _Facts:
    """Hashes of identities and texts, read once for every split of every stage of the inputs: 16 bytes a document."""

    def __init__(self, inputs: Sequence[Stream]) -> None:
        self.inputs = inputs
        self._read: dict[tuple[Split, int, int], _Hashed] = {}

    def of(self, split: Split, taken: Taken) -> _Hashed:
        """Return the hashes of what was taken, ``[n]``; a cut text is another text than the whole one."""
        identity, text = np.zeros(len(taken), np.uint64), np.zeros(len(taken), np.uint64)
        for i, stage in _places(taken):
            here = (taken.input == i) & (taken.stage == stage)
            if (split, i, stage) not in self._read:
                self._read[split, i, stage] = _hashed(self.inputs[i], split, stage)
            read = self._read[split, i, stage]
            identity[here], text[here] = read.identity[taken.row[here]], read.text[taken.row[here]]
        cut = np.flatnonzero(_is_cut(self.inputs, split, taken))
        for place, tokens in zip(cut, _slices(self.inputs, split, taken[cut]), strict=True):
            text[place] = _hash(tokens[:-1].tobytes())
        return _Hashed(identity, text)


def _hashed(stream: Stream, split: Split, stage: int) -> _Hashed:
    identity: list[int] = []
    text: list[int] = []
    for batch in stream.document_batches(split, stage, ["id", "sha256"], n_rows=65_536):
        identity += [_hash(identity_of(name).encode()) for name in batch["id"].to_pylist()]
        text += [int(digest[:16], 16) for digest in batch["sha256"].to_pylist()]
    return _Hashed(np.array(identity, np.uint64), np.array(text, np.uint64))


def _hash(data: bytes) -> int:
    """Return 64 bits of a SHA-256: ten million documents share one with probability 3e-6."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _paired(a: Hashes, b: Hashes) -> Hashes:
    """Return one hash of two."""
    mixed = a * np.uint64(0x9E3779B97F4A7C15) + b
    mixed ^= mixed >> np.uint64(29)
    return mixed * np.uint64(0xBF58476D1CE4E5B9)


def _occurrences(values: Hashes) -> IntArray:
    """Return how many times each value has come so far, itself included, ``[n]``."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([np.ones(1, bool), ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.append(starts, len(values)))
    count = np.empty(len(values), np.int64)
    count[order] = np.arange(len(values)) - np.repeat(starts, lengths) + 1
    return count


# --- gathering ----------------------------------------------------------------------------------------------


def _lengths(inputs: Sequence[Stream], split: Split, taken: Taken) -> tuple[IntArray, IntArray]:
    """Return where each document starts in its stage's tokens, and how many tokens of it are used, each ``[n]``."""
    start, length = np.zeros(len(taken), np.int64), taken.n_tokens.copy()
    for i, stage in _places(taken):
        here = (taken.input == i) & (taken.stage == stage)
        offsets = inputs[i].offsets(split, stage)
        start[here] = offsets[taken.row[here]]
        whole = np.diff(offsets)[taken.row[here]]
        length[here] = np.where(taken.n_tokens[here] == 0, whole, taken.n_tokens[here])
    return start, length


def _is_cut(inputs: Sequence[Stream], split: Split, taken: Taken) -> NDArray[np.bool_]:
    """Return which documents lose tokens, ``[n]``."""
    if not taken.n_tokens.any():
        return np.zeros(len(taken), bool)
    whole = Taken(taken.input, taken.stage, taken.row, np.zeros_like(taken.n_tokens))
    cut: NDArray[np.bool_] = _lengths(inputs, split, taken)[1] < _lengths(inputs, split, whole)[1]
    return cut


def _chunks(inputs: Sequence[Stream], split: Split, taken: Taken) -> Iterator[slice]:
    """Yield neighbouring documents with about CHUNK_TOKENS tokens."""
    ends = np.cumsum(_lengths(inputs, split, taken)[1])
    first = 0
    while first < len(taken):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + CHUNK_TOKENS, side="right")))
        yield slice(first, last)
        first = last


def _slices(inputs: Sequence[Stream], split: Split, taken: Taken) -> list[NDArray[Any]]:
    """Return the tokens of each document, views of the inputs' files; a cut one still lacks its end of text."""
    start, length = _lengths(inputs, split, taken)
    tokens = {place: inputs[place[0]].tokens(split, place[1]) for place in _places(taken)}
    rows = zip(taken.input.tolist(), taken.stage.tolist(), start.tolist(), length.tolist(), strict=True)
    return [tokens[i, stage][begin : begin + n] for i, stage, begin, n in rows]


def _gather(inputs: Sequence[Stream], split: Split, taken: Taken) -> tuple[pa.Table, NDArray[Any], IntArray]:
    """Return a table with TEXT_COLUMNS, the packed tokens and the length of every document, in the order taken.

    Stages are read row group by row group, and only those row groups that something is taken from.
    """
    import pyarrow as pa

    slices = _slices(inputs, split, taken)
    lengths = np.array([len(one) for one in slices], np.int64)
    tokens = np.asarray(np.concatenate(slices))  # no memmap
    tables, places = [], []
    for i, stage in _places(taken):
        here = np.flatnonzero((taken.input == i) & (taken.stage == stage))
        here = here[np.argsort(taken.row[here])]
        tables.append(_rows(inputs[i], split, stage, taken.row[here]))
        places.append(here)
    table = pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(places))))
    cut = _is_cut(inputs, split, taken)
    if cut.any():
        tokens[np.cumsum(lengths)[cut] - 1] = inputs[0].eos_id
        table = _with_cut_texts(table, tokens, lengths, cut, _tokenizer(inputs[0]))
    return table, tokens, lengths


def _rows(stream: Stream, split: Split, stage: int, rows: IntArray) -> pa.Table:
    """Return the documents with these row numbers, which ascend."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found, first = [], 0
    for path in stream.document_files(split, stage):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)]
                if len(wanted):
                    found.append(file.read_row_group(group, columns=TEXT_COLUMNS).take(pa.array(wanted - first)))
                first = last
    return pa.concat_tables(found).select(TEXT_COLUMNS)


def _tokenizer(stream: Stream) -> Tokenizer:
    return packing.open_tokenizer(stream.tokenizer_folder, "")[0]


def _with_cut_texts(
    table: pa.Table, tokens: NDArray[Any], lengths: IntArray, cut: NDArray[np.bool_], tokenizer: Tokenizer
) -> pa.Table:
    """Return the table with the texts of cut documents as long as their tokens."""
    import pyarrow as pa

    columns = {name: table[name].to_pylist() for name in ("text", "n_bytes", "sha256")}
    ends = np.cumsum(lengths)
    for place in np.flatnonzero(cut).tolist():
        ids = tokens[ends[place] - lengths[place] : ends[place] - 1].tolist()
        text = _prefix(tokenizer.decode(ids, skip_special_tokens=False), columns["text"][place])
        encoded = text.encode()
        columns["text"][place], columns["n_bytes"][place] = text, len(encoded)
        columns["sha256"][place] = sha256_bytes(encoded)
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    return table


def _prefix(decoded: str, text: str) -> str:
    """Return the text of a document's first tokens; they may end within a character, which is left out then."""
    if text.startswith(decoded):
        return decoded
    whole = decoded.rstrip("\ufffd")
    return whole if whole and text.startswith(whole) else decoded
