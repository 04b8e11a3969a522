"""Time streams from data sets of the model hub, or from a local copy in the hub's layout.

A YAML specification says which data set, at which commit, holds which period; ``clbench prepare`` streams the rows
once through ``datasets``, keeps what the caps and filters allow, and sets it down (``clbench.ingest``). After that
nothing touches the hub. How to write a specification: docs/hub.md. What it may say: ``_hub_options``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clbench import console, home
from clbench.errors import ConfigError, NotFoundError
from clbench.files import digest_of, read_json, sha256_bytes, sha256_file, write_json
from clbench.ingest import Ingest, Ingested, StagePlan, Unit, ingest_folder
from clbench.stream import Document, StageInfo, StreamSource
from clbench.streams import _hub_options as plan
from clbench.streams import _hub_reach as reach
from clbench.streams._hub_rows import Counter, Reader, Rules

VERSION = 1
"""Raise it when the same settings would give other documents."""

Say = Callable[[str, int, int], None]


class Hub(StreamSource):
    """Documents of dated periods, each from a configuration, files or date range of a data set.

    Raises:
        ConfigError: the specification does not hold together; the first problem is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What a specification's ``options`` may say; a period may say all up to ``max_tokens`` for itself."""

        periods: tuple[plan.Period, ...]
        """The stages in order of time: name, start, end (days, inclusive), and what differs from the fields below."""
        dataset: plan.Dataset | None = None
        """Id on the hub (OWNER/NAME), or a folder in the hub's layout (./FOLDER)."""
        revision: plan.Text = ""
        """Commit of 40 digits; anything else is refused unless ``unpinned``."""
        config: str | None = None
        """Configuration of the data set."""
        split: str = "train"
        """Split of the data set."""
        data_files: plan.Texts = ()
        """Patterns of files, instead of those of the configuration."""
        columns: plan.Columns | None = None
        """Which column holds what: text (one or several), id, date, group."""
        filters: plan.Filters = ()
        """Rows to keep, as ``COLUMN OP VALUE``; all have to hold."""
        pieces: int = 1
        """Into how many pieces the files of one place fall; a cut download goes on with the first unfinished one."""
        max_documents: plan.Cap = None
        """The most documents that a period takes from one origin."""
        max_bytes: plan.Cap = None
        """The most UTF-8 bytes of text likewise."""
        max_tokens: plan.Cap = None
        """The most tokens likewise, ends of text included; needs the stream's ``tokenizer``."""
        min_chars: int = 1
        """Shorter texts are left out."""
        max_chars: int | None = None
        """Longer texts are left out."""
        keep: float = 1.0
        """Share of documents that is kept, by a hash of id and ``seed``: the same ids in every period."""
        seed: int = 0
        """Another seed keeps another share."""
        unpinned: bool = False
        """Take what a branch is today; the stream may differ when it is prepared elsewhere or later."""
        local_folder: str = ""
        """Folder with copies of the data sets (FOLDER/OWNER/NAME, or the only one itself), read in place of the hub."""

        def __post_init__(self) -> None:
            """Check what no single field can tell."""
            if not 0.0 < self.keep <= 1.0:
                raise ValueError("keep has to be above 0 and at most 1")
            plan.check_periods(self.periods)
            plan.passes(self.periods, self.defaults())

        def defaults(self) -> plan.Origin:
            """Return what a period inherits."""
            fields = {name: getattr(self, name) for name in plan.Origin.model_fields}
            return plan.Origin(**{**fields, "revision": self.revision or None})

    def stages(self) -> list[StageInfo]:
        """Return the periods."""
        periods: Sequence[plan.Period] = self.options.periods
        return [StageInfo(index=i, name=p.name, start=p.start, end=p.end) for i, p in enumerate(periods)]

    def settings(self) -> dict[str, Any]:
        """Return every period's origins with the identity of their bytes, and the rules that hold for all.

        Raises:
            NotFoundError: a local copy is not there, nor was it ever prepared here.
        """
        options = self.options
        identities = {repr(work.place): self._identity(work.place) for work in self._passes}
        return {
            "version": VERSION,
            "periods": [
                {
                    "name": period.name,
                    "start": period.start,
                    "end": period.end,
                    "sources": [
                        plan.describe(place, caps, identities[repr(place)])
                        for place, caps in plan.resolved(period, options.defaults())
                    ],
                }
                for period in options.periods
            ],
            "min_chars": options.min_chars,
            "max_chars": options.max_chars,
            "keep": options.keep,
            "seed": options.seed,
            "tokenizer": self._tokenizer_identity(),
        }

    def fetch(self) -> None:
        """Bring the documents of all periods here; goes on where an earlier attempt was cut, does nothing when done.

        Raises:
            OfflineError: no hub answers, or the connection was cut.
            ConfigError: no commit is given, or a configuration, split or column does not exist.
            NotFoundError: there is no such data set, revision or folder.
            IntegrityError: a file is damaged.
        """
        address = self.settings()
        folder = self._folder(address)
        if (folder / "manifest.json").is_file():
            return
        units = [unit for work in range(len(self._passes)) for unit in self._units(work)]
        spots = self._spots(folder)
        with Ingest(folder, address=address, units=units) as ingest:
            if ingest.complete() is not None:
                return
            commits = {key: "local copy" if spot.is_local else spot.commit for key, spot in spots.items()}
            write_json(folder / "revisions.json", commits)
            with _bar(self.name, len(units)) as say:
                for number, work in enumerate(self._passes):
                    self._read_pass(ingest, work, self._units(number), spots[work.place.key], say)
            self._finish(ingest, commits)
            self._remember_folders()

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield the documents of a period, in the order in which the data set gave them."""
        for part in range(self.n_parts(stage)):
            yield from self.part(stage, part)

    def n_parts(self, stage: int) -> int:
        """Return the number of parts that a period was set down in."""
        return self._ingested.n_parts(stage)

    def part(self, stage: int, part: int) -> Iterator[Document]:
        """Yield the documents of one part."""
        return self._ingested.documents(stage, part)

    # --- what is where --------------------------------------------------------------------------------------

    @cached_property
    def _passes(self) -> list[plan.Pass]:
        return plan.passes(self.options.periods, self.options.defaults())

    @cached_property
    def _ingested(self) -> Ingested:
        return Ingested(self._folder(self.settings()))

    def _folder(self, address: dict[str, Any]) -> Path:
        return ingest_folder(home.sources_folder(), self.name, address)

    def _units(self, number: int) -> list[str]:
        """Return the names of the units of one pass."""
        place = self._passes[number].place
        return [f"{number:03d} {place} {piece + 1}/{place.pieces}" for piece in range(place.pieces)]

    def _is_alone(self) -> bool:
        return len({work.place.dataset for work in self._passes}) == 1

    def _local_folder(self, place: plan.Place) -> Path | None:
        return reach.local_folder_of(place, self.options.local_folder, alone=self._is_alone())

    @cached_property
    def _local_digests(self) -> dict[str, str]:
        """Digest of the files of every data set that is read from a folder, by data set."""
        found: dict[str, str] = {}
        for work in self._passes:
            if work.place.dataset in found or not (work.place.is_local or self.options.local_folder):
                continue
            try:
                folder = self._local_folder(work.place)
            except NotFoundError:
                # A prepared stream does not need its source any more.
                if not (memory := self._memory(work.place)).is_file():
                    raise
                found[work.place.dataset] = read_json(memory)["files_sha256"]
            else:
                assert folder is not None
                found[work.place.dataset] = reach.files_digest(folder)
        return found

    def _identity(self, place: plan.Place) -> dict[str, str]:
        """Return which bytes a place means."""
        if place.dataset in self._local_digests:
            return {"files_sha256": self._local_digests[place.dataset]}
        return {"revision": place.revision or "main"}

    def _memory(self, place: plan.Place) -> Path:
        """Return where it stands what a local copy held when it was prepared."""
        key = sha256_bytes(f"{Path(self.options.local_folder).absolute()}\x1f{place.dataset}".encode())[:16]
        return home.sources_folder() / "hub-copies" / f"{key}.json"

    def _remember_folders(self) -> None:
        for work in self._passes:
            if (digest := self._local_digests.get(work.place.dataset)) is not None:
                write_json(self._memory(work.place), {"dataset": work.place.dataset, "files_sha256": digest})

    def _spots(self, folder: Path) -> dict[str, reach.Spot]:
        """Return where every data set is read; a branch means what it did when a cut attempt began."""
        path = folder / "revisions.json"
        begun = read_json(path) if path.is_file() else {}
        spots: dict[str, reach.Spot] = {}
        for work in self._passes:
            place = work.place
            if place.key in spots:
                continue
            if (local := self._local_folder(place)) is not None:
                spots[place.key] = reach.Spot(str(local), None)
                continue
            commit = reach.commit_of(place, unpinned=self.options.unpinned)
            spots[place.key] = reach.Spot(place.dataset, begun.get(place.key, commit))
            if not plan.COMMIT.fullmatch(place.revision):
                console.warn(f"{place.dataset} is not pinned: taking commit {spots[place.key].commit}")
        return spots

    # --- reading --------------------------------------------------------------------------------------------

    def _read_pass(self, ingest: Ingest, work: plan.Pass, units: Sequence[str], spot: reach.Spot, say: Say) -> None:
        """Read what is left of one pass."""
        reader = Reader(work, self.options.periods, self._rules())
        for piece, name in enumerate(units):
            if not ingest.is_done(name):
                with ingest.unit(name) as unit:
                    self._read_piece(unit, reader, spot, piece, say)
            reader.restore(ingest.record(name).notes)
            say("", 0, 1)

    def _read_piece(self, unit: Unit, reader: Reader, spot: reach.Spot, piece: int, say: Say) -> None:
        reader.begin()
        if not reader.is_full():
            for table in reach.tables(reader.place, spot, piece):
                reader.read(table, unit)
                say(str(reader.place), sum(slot.taken[0] for slot in reader.slots), 0)
                if reader.is_full():
                    break
        unit.record.notes.update(reader.notes())

    def _finish(self, ingest: Ingest, commits: dict[str, Any]) -> None:
        """Write the manifest: stages, commits, and what every period holds."""
        held = {period.name: self._held(ingest, period.name) for period in self.options.periods}
        for name, found in held.items():
            if not found["documents"]:
                refused = ", ".join(f"{kind}: {r['count']:,}" for kind, r in ingest.refused().items()) or "nothing"
                shutil.rmtree(ingest.folder)  # only another specification gives something else
                raise ConfigError(
                    f"period {name} got no document", where=f"left out in all: {refused}", mend="mend dates or filters"
                )
        stages = [StagePlan(name=p.name, start=p.start, end=p.end, periods=(p.name,)) for p in self.options.periods]
        ingest.finish(stages, {"revisions": commits, "periods": held})

    def _held(self, ingest: Ingest, period: str) -> dict[str, Any]:
        """Return documents, bytes and digest of what was kept of a period."""
        notes = [
            (units[-1], [ingest.record(unit).notes["sha256"][period] for unit in units])
            for number, work in enumerate(self._passes)
            if period in work.periods
            for units in [self._units(number)]
        ]
        taken = [ingest.record(last).notes["taken"][period] for last, _ in notes]
        digests = [digest for _, unit_digests in notes for digest in unit_digests]
        return {
            "documents": sum(t[0] for t in taken),
            "bytes": sum(t[1] for t in taken),
            "sha256": digests[0] if len(digests) == 1 else digest_of(digests),
        }

    def _rules(self) -> Rules:
        options = self.options
        return Rules(
            keep=options.keep,
            seed=options.seed,
            min_chars=max(options.min_chars, 1),
            max_chars=options.max_chars,
            count_tokens=_token_counter(self._tokenizer_folder()) if self._counts_tokens() else None,
        )

    # --- the tokenizer, for caps on tokens ------------------------------------------------------------------

    def _counts_tokens(self) -> bool:
        return any(caps.max_tokens is not None for work in self._passes for caps in work.periods.values())

    def _tokenizer_identity(self) -> str | None:
        if not self._counts_tokens():
            return None
        if self.tokenizer is None:
            raise ConfigError(
                "max_tokens needs a tokenizer to count with: the stream's own is trained later, on stage 0",
                where=self.name,
                mend="write `tokenizer: stream:NAME` or a folder's path beside `options`, or cap by max_bytes",
            )
        if self.tokenizer.startswith("stream:"):
            return self._tokenizer_folder().parent.name
        path = self._tokenizer_folder() / "tokenizer.json"
        if not path.is_file():
            raise NotFoundError("the tokenizer is missing", where=path, mend="name a folder with a tokenizer.json")
        return sha256_file(path)

    def _tokenizer_folder(self) -> Path:
        from clbench.build import stream_folder
        from clbench.registry import make_stream_source

        kind, _, target = str(self.tokenizer).partition(":")
        if kind == "stream":
            return stream_folder(make_stream_source(target)) / "tokenizer"
        return Path(str(self.tokenizer)).expanduser()


def _token_counter(folder: Path) -> Counter:
    """Return what counts the tokens of texts as the builder packs them: each with its end of text."""
    from clbench.encoding import Encoder
    from clbench.packing import open_tokenizer

    tokenizer, facts = open_tokenizer(folder, "")
    encoder = Encoder(tokenizer, eos_id=facts.eos_id, dtype=facts.dtype)
    return lambda texts: [int(n) for n in encoder.encode(texts)[1]]


@contextmanager
def _bar(name: str, n_units: int) -> Iterator[Say]:
    """Yield what shows the documents taken and the units done; silent when stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not console.stderr.is_terminal
    with Progress(*columns, console=console.stderr, disable=hidden, transient=True) as progress:
        task = progress.add_task(f"{name}: starting", total=n_units)

        def say(what: str, n_documents: int, n_done: int) -> None:
            if what:
                progress.update(task, description=f"{name}: {what}, {n_documents:,} documents")
            if n_done:
                progress.advance(task, n_done)

        yield say
