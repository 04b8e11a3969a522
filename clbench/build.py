"""Build a stream: documents of a source in, Parquet, a tokenizer, packed tokens and a manifest out.

The steps, top to bottom in ``_build``: read and check the documents, split them by identity, find duplicates, train
the tokenizer on stage 0, tokenise and write, join. Reading and tokenising fall into tasks of some tens of megabytes
that worker processes share (``clbench.workers``); what a task has written stays when a build is cut, and the next
one goes on from there. Files: ``clbench.stream`` (the result), ``clbench.parts`` (between reading and writing).
Streams derived from other streams: ``clbench.derive``. What a document is, is left to the source.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench import console, derive, home, packing, pretrained, registry, workers
from clbench.derive import StreamTransform
from clbench.duplicates import PARAMETERS
from clbench.encoding import encode_batches
from clbench.errors import ClbenchError, ConfigError, NotFoundError
from clbench.files import digest_of, exclusive, explain_os_errors, fsync, read_json, sha256_file
from clbench.packing import FORMAT, SPLITS, PieceWriter, TokenizerFacts
from clbench.parts import HELDOUT, TRAIN, Part, check_once, is_date, read_part
from clbench.splitting import StageSplit, split_stages
from clbench.stream import Split, StageInfo, Stream, StreamSource

if TYPE_CHECKING:
    import pyarrow as pa

BUILDER_VERSION = 1
"""Part of every stream's address: raise it whenever the same source would give other content."""
LOCK_SECONDS = 3600.0
PIECE_BYTES = 64 << 20
"""Text that one task tokenises: small parts of a stage are taken together."""
TALKATIVE_SECONDS = 5.0
"""A build that took longer says how fast it was."""

Step = Callable[[str], None]


def stream_folder(source: StreamSource) -> Path:
    """Return where the built stream of this source lives: its name and a digest of what decides its content.

    Raises:
        ConfigError: the source's name, split or settings cannot be used.
    """
    return _folder(source, _address(source))


def _folder(source: StreamSource, address: str) -> Path:
    """Return the folder of an address."""
    return home.streams_folder() / f"{source.name}-{address[:12]}"


def build_stream(source: StreamSource, *, progress: bool = True, n_workers: int | None = None) -> Stream:
    """Build a stream, or return it at once if it is already there complete.

    Two processes may ask for the same stream: the second waits for the first. A kill or a full disk leaves no
    folder that looks complete; after a kill the next build goes on with what was done.

    Args:
        source: where the documents come from.
        progress: show a bar on a terminal.
        n_workers: processes that read and tokenise, None for what fits this machine; any number gives the same stream.

    Raises:
        ConfigError: the source breaks its contract (names, dates, an id twice in a stage, an empty stage).
        OfflineError: the source has to fetch something and no network answers.
        BusyError: another process has been building this stream for an hour.
        ClbenchError: the disk is full or the cache folder cannot be written.
    """
    address = _address(source)
    folder = _folder(source, address)
    if (stream := _complete(folder, address)) is not None:
        return stream
    with explain_os_errors(folder):
        lock = exclusive(
            folder.parent / ".locks" / folder.name,
            mend="wait for it to end, or end it",
            timeout_seconds=LOCK_SECONDS,
        )
        with lock:
            if (stream := _complete(folder, address)) is not None:
                return stream
            inputs = _inputs(source, progress=progress, n_workers=n_workers)
            if isinstance(source, StreamTransform):
                source.open(inputs)
            source.fetch()
            work = folder.with_name(f".{folder.name}.building.tmp")
            with _kept_unless_refused(work), _bar(source.name, enabled=progress) as bar:
                about = _about(source, address)
                if isinstance(source, StreamTransform):
                    shutil.rmtree(work, ignore_errors=True)
                    (work / "out").mkdir(parents=True)
                    derive.write_derived(source, work / "out", about, bar)
                else:
                    _build(source, work, about, bar, n_workers or workers.default_workers())
                _publish(work / "out", folder)
    return Stream(folder)


def _inputs(source: StreamSource, *, progress: bool, n_workers: int | None) -> list[Stream]:
    """Build the streams that a source is made of: a transform's inputs; another stream's or a model's tokenizer."""
    build = partial(build_stream, progress=progress, n_workers=n_workers)
    if isinstance(source, StreamTransform):
        return [build(registry.make_stream_source(target)) for target in source.sources()]
    if (lender := _tokenizer_lender(source)) is not None:
        build(lender)
    elif (model := _pretrained(source)) is not None:
        pretrained.prepare_model(model)
    return []


def _tokenizer_lender(source: StreamSource) -> StreamSource | None:
    """Return the stream whose tokenizer a source uses, if it says ``stream:NAME``."""
    kind, _, target = (source.tokenizer or "").partition(":")
    return registry.make_stream_source(target) if kind == "stream" else None


def _pretrained(source: StreamSource) -> str | None:
    """Return the pretrained model whose tokenizer a source uses, if it says ``model:NAME``."""
    found = source.tokenizer or ""
    return found.removeprefix(pretrained.PREFIX) if found.startswith(pretrained.PREFIX) else None


@contextmanager
def _kept_unless_refused(work: Path) -> Iterator[None]:
    """Keep the work folder of a build that was cut; remove that of one that is done or that cannot be done."""
    try:
        with explain_os_errors(work):
            yield
    except ClbenchError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _publish(out: Path, folder: Path) -> None:
    """Give the finished folder its name in one rename."""
    for file in sorted(out.rglob("*")):
        fsync(file)
    shutil.rmtree(folder, ignore_errors=True)  # incomplete, or it would have been returned
    out.replace(folder)
    fsync(folder.parent)


def _address(source: StreamSource) -> str:
    """Return the digest of everything that decides the content of the built stream."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", source.name):
        raise ConfigError(
            "a stream's name may hold a-z, 0-9, '_', '-' and '.'", where=repr(source.name), mend="rename it"
        )
    if not 0.0 < source.heldout_fraction < 1.0:
        raise ConfigError(
            f"heldout_fraction is {source.heldout_fraction}",
            where=source.name,
            mend="choose one between 0 and 1",
        )
    for setting in ("heldout_max_documents", "heldout_max_per_group"):
        if (value := getattr(source, setting)) is not None and value < 1:
            raise ConfigError(f"{setting} is {value}", where=source.name, mend="choose at least 1")
    if source.vocab_size < 257:
        raise ConfigError(
            f"vocab_size is {source.vocab_size}",
            where=source.name,
            mend="choose at least 257: 256 bytes and the end of text",
        )
    try:
        return digest_of(_settings(source) | {"builder": BUILDER_VERSION, "duplicates": PARAMETERS})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"settings() is not JSON-able: {error}",
            where=source.name,
            mend="return numbers, text, lists and dicts",
        ) from None


def _settings(source: StreamSource) -> dict[str, Any]:
    """Return the settings that decide the content, as they stand in the manifest."""
    settings: dict[str, Any] = {"name": source.name, "source": source.settings()}
    if isinstance(source, StreamTransform):
        return settings  # the split and the tokenizer are those of its inputs
    settings |= {
        "heldout_fraction": source.heldout_fraction,
        "heldout_max_documents": source.heldout_max_documents,
        "vocab_size": source.vocab_size,
    }
    if source.heldout_max_per_group is not None:
        settings["heldout_max_per_group"] = source.heldout_max_per_group
    if source.tokenizer is not None:
        settings["tokenizer"] = _tokenizer_identity(source)
    return settings


def _tokenizer_identity(source: StreamSource) -> str:
    """Return what decides a tokenizer that is not trained here: the address of what lends it, or its file's digest."""
    if (lender := _tokenizer_lender(source)) is not None:
        return _address(lender)
    if (model := _pretrained(source)) is not None:
        return pretrained.pin(model).sha256_of_source()
    path = Path(str(source.tokenizer)).expanduser() / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(
            f"tokenizer {source.tokenizer!r} is neither `stream:NAME`, `model:NAME` nor a folder with a tokenizer.json",
            where=source.name,
            mend="save it with save_pretrained and name the folder",
        )
    return sha256_file(path)


def _about(source: StreamSource, address: str) -> dict[str, Any]:
    """Return what the manifest says about where a stream comes from."""
    settings = _settings(source)
    return {
        "name": source.name,
        "address": address,
        "builder": BUILDER_VERSION,
        "settings": settings,
        "duplicates": PARAMETERS,
        "recipe": _plain_recipe(source),
    }


def _plain_recipe(source: StreamSource) -> Any:
    """Return how to make the source again, for ``clbench.late``; None where its options are no plain values."""
    try:
        return json.loads(json.dumps(None if source.recipe is None else dict(source.recipe), allow_nan=False))
    except (TypeError, ValueError):
        return None


def _complete(folder: Path, address: str) -> Stream | None:
    """Return the stream if a complete one with this address is there."""
    try:
        manifest = read_json(folder / "manifest.json")
    except ClbenchError:
        return None
    fits = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return Stream(folder) if fits and manifest.get("address") == address else None


# --- the whole build ----------------------------------------------------------------------------------------


def _build(source: StreamSource, work: Path, about: dict[str, Any], bar: Bar, n_workers: int) -> None:
    """Write the whole stream into ``work / "out"``, the manifest last; ``work`` may hold what was done before a cut."""
    clock = _Clock()
    stages = checked_stages(source)
    parts = [Part(work, stage.index, i) for stage in stages for i in range(source.n_parts(stage.index))]
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    bar.total(2 * len(parts) + 2)
    _read_all(source, stages, parts, work, bar, n_workers)
    clock.lap("read")
    bar.step("comparing train and held-out")
    held = [StageSplit(info, [part for part in parts if part.stage == info.index]) for info in stages]
    split_stages(held, source)
    _check_filled(held)
    clock.lap("compare")
    bar.step("preparing the tokenizer")
    facts = _make_tokenizer(source, held[0], out / "tokenizer")
    clock.lap("tokenizer")
    pieces = _pack_all(held, out / "tokenizer", facts, work, bar, n_workers)
    clock.lap("pack")
    entries, contents = [], []
    for stage in held:
        entry, content = _join_stage(stage, pieces[stage.info.index], work, facts)
        entries.append(entry)
        contents.append(content)
    packing.write_extras(source.extras(), out)
    packing.write_manifest(out, about=about, facts=facts, entries=entries, contents=contents, seconds=clock.seconds)
    _say_throughput(source.name, sum(part.counts["n_bytes"] for part in parts), clock, n_workers)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 2), now


def _say_throughput(name: str, n_bytes: int, clock: _Clock, n_workers: int) -> None:
    total = sum(clock.seconds.values())
    if total < TALKATIVE_SECONDS:
        return
    rates = ", ".join(f"{phase} {n_bytes / 1e6 / s:.1f}" for phase, s in clock.seconds.items() if s > 0)
    console.say(
        f"{name}: {n_bytes / 1e6:,.0f} MB of text in {total:,.0f} s (MB/s with up to {n_workers} processes: {rates})"
    )


def checked_stages(source: StreamSource) -> list[StageInfo]:
    """Return the source's stages; they must be numbered in order, each with its own name and real dates."""
    stages = source.stages()
    if not stages or [s.index for s in stages] != list(range(len(stages))):
        raise ConfigError(
            f"stages are numbered {[s.index for s in stages]}",
            where=source.name,
            mend="number them 0, 1, 2 …",
        )
    if len({s.name for s in stages}) < len(stages):
        raise ConfigError("two stages have the same name", where=source.name, mend="give each its own")
    for stage in stages:
        if not (is_date(stage.start) and is_date(stage.end) and stage.start <= stage.end):
            raise ConfigError(
                f"the dates {stage.start!r} to {stage.end!r} are not a period",
                where=f"{source.name} stage {stage.name}",
                mend="write them as 2013-05-01, the earlier one first",
            )
    return stages


# --- tasks, in this process or in workers -------------------------------------------------------------------


def run_task(task: workers.Task) -> None:
    """Run one task in a worker process; the source is made again from its recipe."""
    with explain_os_errors(Path(task["work"])):
        if task["do"] == "read":
            _read(task, _source_again(json.dumps(task["recipe"]), task["settings_sha256"]))
        else:
            _pack(task)


@lru_cache(maxsize=1)
def _source_again(recipe: str, settings_sha256: str) -> StreamSource:
    source = registry.source_from_recipe(json.loads(recipe))
    if digest_of(source.settings()) != settings_sha256:
        raise ConfigError(
            "a worker process made another source from the same recipe",
            where=source.name,
            mend="set options through the registry, or CLBENCH_WORKERS=1",
        )
    return source


def _read_all(
    source: StreamSource, stages: Sequence[StageInfo], parts: Sequence[Part], work: Path, bar: Bar, n_workers: int
) -> None:
    """Read every part that was not read before the build was cut."""
    names = {stage.index: stage.name for stage in stages}
    common: workers.Task = {"do": "read", "work": str(work)}
    parallel = source.recipe is not None and n_workers > 1
    if parallel:
        common |= {"recipe": dict(source.recipe or {}), "settings_sha256": digest_of(source.settings())}
    tasks: list[workers.Task] = []
    for part in parts:
        if part.is_read:
            bar.step(f"stage {names[part.stage]} was read before")
        else:
            where = f"{source.name} stage {names[part.stage]}"
            tasks.append(common | {"stage": part.stage, "part": part.number, "where": where})
    workers.run_tasks(
        tasks,
        lambda task: _read(task, source),
        target="clbench.build:run_task" if parallel else None,
        n_workers=n_workers,
        done=lambda task: bar.step(f"reading stage {names[task['stage']]}"),
    )
    for stage in stages:
        own = [part for part in parts if part.stage == stage.index]
        check_once(own, f"{source.name} stage {stage.name}")


def _read(task: workers.Task, source: StreamSource) -> None:
    part = Part(Path(task["work"]), task["stage"], task["part"])
    read_part(part, source.part(part.stage, part.number), where=task["where"])


def _make_tokenizer(source: StreamSource, first: StageSplit, folder: Path) -> TokenizerFacts:
    """Put the tokenizer into the stream's folder: somebody's, or one trained on the train documents of stage 0."""
    if (lender := _tokenizer_lender(source)) is not None:
        packing.copy_tokenizer(Stream(stream_folder(lender)).tokenizer_folder, folder)
        kind = f"that of stream {lender.name}"
    elif (model := _pretrained(source)) is not None:
        packing.copy_tokenizer(pretrained.open_model(model).folder, folder)
        kind = f"that of model {model}"
    elif source.tokenizer is not None:
        packing.copy_tokenizer(Path(source.tokenizer).expanduser(), folder)
        kind = f"the one in {Path(source.tokenizer).name}"
    else:
        packing.save_tokenizer(packing.train_tokenizer(_train_texts(first), source.vocab_size), folder)
        kind = "byte-level BPE trained on the train documents of stage 0"
    return packing.open_tokenizer(folder, kind)[1]


def _train_texts(stage: StageSplit) -> Iterator[list[str]]:
    for part in stage.parts:
        for table, sides in part.tables(["text"]):
            yield [text for text, side in zip(table["text"].to_pylist(), sides, strict=True) if side == TRAIN]


def _pack_all(
    stages: Sequence[StageSplit], tokenizer: Path, facts: TokenizerFacts, work: Path, bar: Bar, n_workers: int
) -> dict[int, list[str]]:
    """Tokenise and write every piece; returns stage -> names of its pieces, in order."""
    names = {stage.info.index: stage.info.name for stage in stages}
    common = {
        "do": "pack",
        "work": str(work),
        "tokenizer": str(tokenizer),
        "eos_id": facts.eos_id,
        "dtype": facts.dtype,
    }
    pieces: dict[int, list[str]] = {}
    tasks: list[workers.Task] = []
    for stage in stages:
        here = pieces[stage.info.index] = []
        for parts in _piecewise(stage.parts):
            here.append(f"{parts[0].stage:02d}-{parts[0].number:04d}")
            about = {"stage": parts[0].stage, "parts": [part.number for part in parts], "piece": here[-1]}
            if not all(packing.is_written(_piece(work, split, here[-1])) for split in SPLITS):
                tasks.append(common | about)
            else:
                for _ in parts:
                    bar.step(f"stage {stage.info.name} was tokenised before")

    def done(task: workers.Task) -> None:
        for _ in task["parts"]:
            bar.step(f"tokenising stage {names[task['stage']]}")

    workers.run_tasks(tasks, _pack, target="clbench.build:run_task", n_workers=n_workers, done=done)
    return pieces


def _piecewise(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yield neighbouring parts of a stage, together at most PIECE_BYTES of text unless one alone has more."""
    taken: list[Part] = []
    for part in parts:
        if taken and sum(p.counts["n_bytes"] for p in taken) + part.counts["n_bytes"] > PIECE_BYTES:
            yield taken
            taken = []
        taken.append(part)
    if taken:
        yield taken


def _piece(work: Path, split: Split, name: str) -> Path:
    return work / "pieces" / f"{split}-{name}"


def _pack(task: workers.Task) -> None:
    """Tokenise some parts of a stage and write them as one piece of either split."""
    tokenizer, _ = _tokenizer_at(task["tokenizer"])
    work = Path(task["work"])
    writers = {split: PieceWriter(_piece(work, split, task["piece"]), task["dtype"]) for split in SPLITS}
    waiting: deque[tuple[Split, pa.Table]] = deque()

    def texts() -> Iterator[list[str]]:
        for number in task["parts"]:
            for table, sides in Part(work, task["stage"], number).tables():
                for split, side in zip(SPLITS, (TRAIN, HELDOUT), strict=True):
                    if (rows := np.flatnonzero(sides == side)).size:
                        waiting.append((split, table.take(rows)))
                        yield waiting[-1][1]["text"].to_pylist()

    for tokens, lengths in encode_batches(tokenizer, texts(), eos_id=task["eos_id"], dtype=task["dtype"]):
        split, table = waiting.popleft()
        writers[split].add(table, tokens, lengths)
    for writer in writers.values():
        writer.close()


@lru_cache(maxsize=1)
def _tokenizer_at(folder: str) -> tuple[Any, TokenizerFacts]:
    return packing.open_tokenizer(Path(folder), "")


def _join_stage(
    stage: StageSplit, pieces: Sequence[str], work: Path, facts: TokenizerFacts
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Join the pieces of a stage; return its manifest entry and the digests of its content."""
    entry: dict[str, Any] = asdict(stage.info)
    changes: dict[str, dict[str, int]] = {}
    content: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        paths = [_piece(work, split, name) for name in pieces]
        counts, changes[split], content[split] = packing.join(
            paths, work / "out", split=split, stage=stage.info.index, facts=facts
        )
        entry[split] = counts | stage.counts[split]
    return entry | {"changes": changes}, content


def _check_filled(stages: Sequence[StageSplit]) -> None:
    """Refuse a stage without train or without held-out documents."""
    for stage in stages:
        for split, side in zip(SPLITS, (TRAIN, HELDOUT), strict=True):
            if not len(stage.rows(side)):
                n_dropped = sum(stage.counts["heldout"][f"dropped_{kind}"] for kind in ("exact", "near", "over_cap"))
                n_heldout = n_dropped + len(stage.rows(HELDOUT))
                raise ConfigError(
                    f"stage {stage.info.name} has no {split} documents",
                    where=f"{n_heldout} of {len(stage.side)} documents are held out, {n_dropped} of them dropped",
                    mend="give it more documents, or change heldout_fraction",
                )


# --- progress -----------------------------------------------------------------------------------------------


@dataclass
class Bar:
    """A progress bar in steps of unequal length; both functions do nothing when it is off."""

    total: Callable[[int], None]
    step: Step


@contextmanager
def _bar(name: str, *, enabled: bool) -> Iterator[Bar]:
    """Show a bar on stderr when that is a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield Bar(total=lambda _: None, step=lambda _: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(f"{name}: starting", total=None)
        started = False

        def step(what: str) -> None:
            nonlocal started
            display.update(task, description=f"{name}: {what}", advance=1 if started else 0)
            started = True

        yield Bar(total=lambda n: display.update(task, total=n), step=step)
