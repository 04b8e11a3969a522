"""The checks of a stream source: documents, stages, splits, and that only ``fetch`` uses the network."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from clbench import registry
from clbench.build import build_stream
from clbench.contract.guards import moved, no_network, random_states
from clbench.contract.problems import ContractError, NotChecked, describe
from clbench.derive import StreamTransform
from clbench.errors import ClbenchError
from clbench.files import canonical_json
from clbench.stream import Document, StageInfo, Stream, StreamSource

PASS_SECONDS = 1800


@dataclass
class StreamCase:
    """One stream source under test.

    Args:
        label: how messages call it.
        make: returns a new source.
        target: what another process finds it by; None leaves that process out.
    """

    label: str
    make: Callable[[], StreamSource]
    target: str | None = None

    @classmethod
    def of(cls, spec: str) -> StreamCase:
        """Return the case of ``NAME``, ``file.py[:Class]`` or ``module:Class``."""
        return cls(spec, lambda: registry.make_stream_source(spec), spec)

    @cached_property
    def source(self) -> StreamSource:
        """A source after ``fetch``."""
        try:
            source = self.make()
            source.fetch()
        except Exception as error:
            raise NotChecked from error
        return source

    @cached_property
    def first_pass(self) -> tuple[dict[int, str], list[str]]:
        """Digests of all documents by stage, read without a network, and the addresses that were tried."""
        source = self.source
        with no_network() as tried:
            try:
                digests = digests_of(source)
            except Exception as error:
                raise self.broken(f"documents() stops with {describe(error, type(source))}") from error
        return digests, tried

    @cached_property
    def stream(self) -> Stream:
        """The built stream."""
        try:
            return build_stream(self.source, progress=False)
        except ClbenchError as error:
            raise self.broken(error.what, error.mend) from error

    def broken(self, what: str, mend: str | None = None) -> ContractError:
        """Return the error of a broken promise of this source."""
        return ContractError(what, where=self.label, mend=mend)


def digests_of(source: StreamSource) -> dict[int, str]:
    """Return stage -> digest of its documents in order; an id that comes twice in a stage is refused."""
    digests = {}
    for stage in source.stages():
        digest, seen = hashlib.sha256(), set()
        for document in source.documents(stage.index):
            if document.id in seen:
                raise ContractError(
                    f"document {document.id!r} comes twice in stage {stage.index}", mend="ids are unique in a stage"
                )
            seen.add(document.id)
            digest.update(canonical_json(_fields(document)).encode("utf-8", "surrogatepass"))
        digests[stage.index] = digest.hexdigest()
    return digests


def _fields(document: Document) -> list[str]:
    return [document.id, document.text, document.date, document.group, document.change]


def check_source(case: StreamCase) -> None:
    """It is built without arguments, has a name and JSON-able settings that are the same every time."""
    try:
        source, again = case.make(), case.make()
        settings = source.settings()
        same = canonical_json(settings) == canonical_json(again.settings())
    except Exception as error:
        raise case.broken(f"it cannot be used: {describe(error)}", "a source is built without arguments") from error
    if not same:
        raise case.broken("settings() differ between two sources", "return only what decides the documents")
    if settings != json.loads(json.dumps(settings)):
        raise case.broken("settings() does not come back from JSON as it was", "return numbers, text, lists and dicts")
    if not (type(source).__doc__ or "").strip():
        raise case.broken("the class has no docstring", "say in one sentence what text this is")


def check_fetches(case: StreamCase) -> None:
    """``fetch`` brings what is needed onto this machine, and may be called again."""
    try:
        source = case.make()
        source.fetch()
        source.fetch()
    except Exception as error:
        raise case.broken(f"fetch() stops with {describe(error)}") from error


def check_stages(case: StreamCase) -> None:
    """Stages are numbered 0, 1, 2 … and, unless the stream is made of another one, follow each other in time."""
    stages: list[StageInfo] = case.source.stages()
    if not stages or [stage.index for stage in stages] != list(range(len(stages))):
        raise case.broken(f"stages are numbered {[s.index for s in stages]}", "number them 0, 1, 2 …")
    if isinstance(case.source, StreamTransform):
        return  # another order of time may be what it is for
    for before, after in itertools.pairwise(stages):
        if not before.start <= before.end < after.start <= after.end:
            raise case.broken(
                f"stage {after.index} ({after.start} to {after.end}) does not follow "
                f"stage {before.index} ({before.start} to {before.end})",
                "periods must not overlap and must stand in time order",
            )


def check_documents(case: StreamCase) -> None:
    """Documents have ids of their own within a stage, are dated in their stage, and only known ids recur."""
    _ = case.first_pass
    if isinstance(case.source, StreamTransform):
        return  # dates are those of the input, change kinds are the engine's
    last: dict[str, set[str]] = {}  # group -> ids of the stage before in which it appeared
    known: set[str] = set()
    for stage in case.source.stages():
        ids: dict[str, set[str]] = {}
        for document in case.source.documents(stage.index):
            if not stage.start <= document.date[: len(stage.start)] <= stage.end:
                raise case.broken(
                    f"document {document.id!r} of stage {stage.index} is dated {document.date}, "
                    f"outside {stage.start} to {stage.end}",
                    "give the date on which this version was published",
                )
            if document.id in last.get(document.group, set()) and document.change == "new":
                raise case.broken(
                    f"document {document.id!r} of stage {stage.index} is called new and came before",
                    "new is what the group's stage before did not have",
                )
            if document.id not in known and document.change != "new" and stage.index:
                raise case.broken(
                    f"document {document.id!r} of stage {stage.index} is called {document.change} and is new"
                )
            ids.setdefault(document.group, set()).add(document.id)
        last |= ids
        known |= set().union(*ids.values())


def check_parts(case: StreamCase) -> None:
    """The parts of a stage, read in any order, are its documents."""
    source, whole = case.source, case.first_pass[0]
    for stage in source.stages():
        parts = [list(source.part(stage.index, i)) for i in reversed(range(source.n_parts(stage.index)))]
        digest = hashlib.sha256()
        for document in itertools.chain.from_iterable(reversed(parts)):
            digest.update(canonical_json(_fields(document)).encode("utf-8", "surrogatepass"))
        if digest.hexdigest() != whole[stage.index]:
            raise case.broken(
                f"the {len(parts)} parts of stage {stage.index} are not its documents",
                "part(stage, i) for i in order must yield what documents(stage) yields, whatever was read before",
            )


def check_offline(case: StreamCase) -> None:
    """Nothing but ``fetch`` uses the network, even where the error is swallowed."""
    tried = case.first_pass[1]
    if tried:
        raise case.broken(f"documents() or stages() tried the network: {tried[0]}", "download in fetch()")


def check_deterministic(case: StreamCase) -> None:
    """Two passes give the same documents in the same order, also in another process with another hash seed."""
    before = random_states()
    first, second = case.first_pass[0], digests_of(case.source)
    if libraries := moved(before):
        raise case.broken(
            f"documents() uses the global random state of {' and '.join(libraries)}",
            "draw from clbench.seeds.generator",
        )
    _expect_same(case, first, second, "a second pass over documents() gives other documents")
    if case.target is not None:
        other = {int(k): v for k, v in json.loads(_other_process(case, case.target)).items()}
        _expect_same(
            case,
            first,
            other,
            "another process gives other documents",
            "sort what comes from sets, dicts of sets and folders",
        )


def _expect_same(
    case: StreamCase,
    one: dict[int, str],
    other: dict[int, str],
    what: str,
    mend: str = "depend on nothing but settings()",
) -> None:
    for stage, digest in one.items():
        if other.get(stage) != digest:
            raise case.broken(f"{what} in stage {stage}", mend)


def _other_process(case: StreamCase, target: str) -> str:
    """Return the digests that a fresh interpreter prints, its strings hashed with another seed."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    paths = os.pathsep.join(path or "." for path in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "clbench.contract.streams", target],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=PASS_SECONDS,
    )
    if done.returncode:
        raise case.broken(
            f"it does not work in another process: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
        )
    return done.stdout.splitlines()[-1]


def check_builds(case: StreamCase) -> None:
    """It builds, and every stage has training and held-out text after duplicates were dropped."""
    _ = case.source
    stream = case.stream
    stream.check()
    for stage, split in _parts(stream):
        if not stream.counts(split, stage)["n_documents"]:  # type: ignore[arg-type]
            raise case.broken(
                f"stage {stage} has no {split} documents",
                "give more documents, another heldout_fraction, or fewer duplicates",
            )


def _parts(stream: Stream) -> Iterator[tuple[int, str]]:
    return ((stage.index, split) for stage in stream.stages() for split in ("train", "heldout"))


STREAM_CHECKS: tuple[Callable[[StreamCase], None], ...] = (
    check_source,
    check_fetches,
    check_stages,
    check_documents,
    check_parts,
    check_offline,
    check_deterministic,
    check_builds,
)


def main() -> None:
    """Print the digests of the source that the command line names."""
    case = StreamCase.of(sys.argv[1])
    source = case.source
    with no_network():
        sys.stdout.write("\n" + json.dumps(digests_of(source)) + "\n")


if __name__ == "__main__":
    main()
