"""Leaderboard entries: packing the runs of one method on one track, and verifying a folder from a stranger.

    <track>/<method>-<yyyymmdd>-<digest>/
        entry.json                     Entry: what it is, who says so, and the SHA-256 of every other file
        README.md                      written for people; nothing is read from it
        seed-0/run.yaml  ledger.json  steps.jsonl  stages/00.json …  rows/heldout-00.parquet …

An entry holds no aggregate: every figure on the board is computed from its rows. ``verify`` treats every
byte as hostile: sizes before contents, schemas before values, no symbolic links, no YAML aliases, no
network, no GPU. What it cannot know (whether the numbers came from an honest run) is what reproducing an
entry is for.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clbench.errors import ClbenchError, ConfigError, SubmissionError
from clbench.files import digest_of, sha256_file, write_json, write_text
from clbench.leaderboard.page import slug
from clbench.results import capacity
from clbench.results.store import ROWS_SCHEMA, RunStore
from clbench.suite import UNDATED

ENTRY_FORMAT = 1
MAX_FILES = 1000
MAX_ENTRY_BYTES = 64 << 20
MAX_BYTES = {".json": 1 << 20, ".yaml": 1 << 18, ".md": 1 << 16, ".jsonl": 4 << 20, ".parquet": 16 << 20}
"""Largest file by kind."""
MAX_ROWS = 500_000
"""Rows of one Parquet file."""
MAX_UNPACKED_BYTES = 256 << 20
"""Uncompressed size that one Parquet file may declare."""
MAX_LETTERS = 2000
"""Of any text in JSON or YAML."""
MAX_ITEM_LETTERS = 600
"""Of a document's name."""
MAX_DEPTH = 12
MAX_YAML_NODES = 20_000
MAX_LOG_LINES = 5000
"""Lines of the training log that ``pack`` keeps, evenly spread."""
MAX_REVIEWS = 1000
"""Plans of one stage, where a method reviews its mixture."""
MAX_BITS_PER_BYTE = 20.0
"""A uniform guess over bytes is 8; anything far above is a broken measurement."""
LABEL = r"[A-Za-z0-9][A-Za-z0-9_.:=/+, \-]{0,199}"
SHA256 = r"[0-9a-f]{64}"
ENTRY_NAME = re.compile(r"(?P<slug>[a-z0-9][a-z0-9.\-]{0,79})-(?P<date>\d{8})-(?P<digest>[0-9a-f]{8})")
EXPECTED_FILE = re.compile(
    r"entry\.json|README\.md|seed-(0|[1-9]\d{0,8})/"
    r"(run\.yaml|ledger\.json|steps\.jsonl|stages/\d{2}\.json|rows/[a-z0-9_-]{1,40}-\d{2}\.parquet)"
)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TrackName(_Model):
    """Which protocol the entry says it followed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    version: int
    sha256: str = Field(pattern=f"^{SHA256}$")


class Declarations(_Model):
    """What only the author can say; shown on the page as said, believed by nobody."""

    authors: list[str] = Field(default=[], max_length=40)
    code: str = Field(default="", max_length=300)
    """Where the method's code is, when it is not one of ours: a https address."""
    tuning: str = Field(default="", max_length=1000)
    """What the hyper-parameters were chosen on."""
    only_track_data: bool = False
    """Nothing but the track's training documents was trained on."""
    heldout_untouched: bool = False
    """Held-out documents were neither trained on nor tuned on."""
    notes: str = Field(default="", max_length=2000)


class EntryMethod(_Model):
    """The method as it stands in every run of the entry."""

    label: str = Field(pattern=f"^{LABEL}$")
    components: list[dict[str, Any]] = Field(max_length=20)


class Entry(_Model):
    """``entry.json``."""

    format: int = Field(ge=ENTRY_FORMAT, le=ENTRY_FORMAT)
    track: TrackName
    method: EntryMethod
    seeds: list[int] = Field(min_length=1, max_length=100)
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    declarations: Declarations
    files: dict[str, str] = Field(max_length=MAX_FILES)


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


class _RunMethod(_Loose):
    label: str = Field(pattern=f"^{LABEL}$")
    components: list[dict[str, Any]] = Field(max_length=20)


class _StageName(_Loose):
    index: int = Field(ge=0, le=99)
    name: str = Field(min_length=1, max_length=60)
    start: str = Field(max_length=40)
    end: str = Field(max_length=40)


class _Run(_Loose):
    format: int = Field(ge=1, le=1)
    run_id: str = Field(max_length=80)
    track: dict[str, Any]
    stages: list[_StageName] = Field(min_length=1, max_length=100)
    method: _RunMethod
    seed: int = Field(ge=0)
    base: dict[str, Any]
    training: dict[str, Any]
    environment: dict[str, Any]
    command: str = Field(max_length=MAX_LETTERS)


class _Record(_Loose):
    stage: int = Field(ge=0, le=99)
    weights_sha256: str = Field(pattern=f"^{SHA256}$")
    cells: dict[str, str] = Field(max_length=40)
    finished: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}T[0-9:.+Z\-]{5,25}$")
    n_steps: int = Field(ge=0)


class _PlanShape(_Loose):
    step: int = Field(ge=0)
    mixture: dict[int, float] = Field(min_length=1, max_length=100)
    pools: dict[int, int] = Field(default={}, max_length=100)
    n_excluded: int = Field(default=0, ge=0)
    excluded_sha256: str = Field(default="", max_length=64)


class _LedgerShape(_Loose):
    tokens: dict[int, dict[int, int]] = {}
    extra_tokens: dict[str, int] = {}
    plans: dict[int, Annotated[list[_PlanShape], Field(max_length=MAX_REVIEWS)]] = {}
    flops: dict[str, float] = {}
    seconds: dict[str, float] = {}
    peak_memory_bytes: int = Field(default=0, ge=0)
    stored_bytes: dict[str, float] = {}


class _Step(_Loose):
    stage: int = Field(ge=0, le=99)
    step: int = Field(ge=0)
    loss_nats: float
    n_tokens: int = Field(ge=0)


# Packing


def pack(runs: Sequence[RunStore], out: Path, *, declarations: Mapping[str, Any] | None = None) -> Path:
    """Write the entry of one method's finished runs and return its folder.

    Args:
        runs: one finished run per seed, all of one method on one track.
        out: the submissions folder; the entry goes to ``out/<track>/<method>-<date>-<digest>``.
        declarations: fields of ``Declarations``; the author may also fill them in ``entry.json`` later. An
            entry of the same runs that is there already is left as it is, with what its author declared.

    Raises:
        SubmissionError: the runs do not make one entry, or one of them is unfinished.
    """
    configs = [run.config() for run in runs]
    check_one_entry(runs, configs)
    order = sorted(range(len(runs)), key=lambda i: configs[i]["seed"])
    first, track = configs[order[0]], configs[order[0]]["track"]
    n_stages = len(first["stages"])
    date = max(run.stage_record(k)["finished"] for run in runs for k in range(n_stages))[:10]
    stem = f"{slug(first['method']['label'])}-{date.replace('-', '')}"
    try:
        declared = Declarations.model_validate(dict(declarations or {}))
    except ValidationError as error:
        raise SubmissionError(first_problem("declarations", error)) from None
    home: Path = out / track["name"]
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".", suffix=".tmp") as temporary:
        folder = Path(temporary) / "entry"
        for i in order:
            copy_run(runs[i], folder / f"seed-{configs[i]['seed']}", n_stages)
        files = digests(folder)
        entry = Entry(
            format=ENTRY_FORMAT,
            track=TrackName(name=track["name"], version=track["version"], sha256=track["sha256"]),
            method=EntryMethod(label=first["method"]["label"], components=first["method"]["components"]),
            seeds=[configs[i]["seed"] for i in order],
            date=date,
            declarations=declared,
            files=files,
        )
        write_json(folder / "entry.json", entry.model_dump(mode="json"))
        write_text(folder / "README.md", readme(entry, first["command"]))
        final = home / f"{stem}-{digest_of(files)[:8]}"
        if not final.exists():
            folder.rename(final)
    return final


def check_one_entry(runs: Sequence[RunStore], configs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse runs that do not belong together or are not finished."""
    if not runs:
        raise SubmissionError("an entry needs runs", mend="name the run folders of one method, one per seed")
    for what, values in (
        ("methods", {c["method"]["label"] for c in configs}),
        ("tracks", {f"{c['track']['name']} {c['track']['sha256'][:12]}" for c in configs}),
    ):
        if len(values) > 1:
            raise SubmissionError(f"runs of several {what}: {', '.join(sorted(values))}", mend="pack one at a time")
    seeds = [c["seed"] for c in configs]
    if len(set(seeds)) < len(seeds):
        raise SubmissionError(f"a seed is there twice: {sorted(seeds)}", mend="give one run folder per seed")
    wanted = configs[0]["track"].get("seeds")
    if wanted is not None and set(seeds) != set(wanted):
        raise SubmissionError(
            f"the track asks for seeds {sorted(wanted)}, these runs are seeds {sorted(seeds)}",
            mend="run the missing seeds and leave out the others",
        )
    for run, config in zip(runs, configs, strict=True):
        missing = sorted({s["index"] for s in config["stages"]} - set(run.stages_done()))
        if missing:
            raise SubmissionError(
                f"stages {missing} are not finished",
                where=run.folder,
                mend="run the command in its run.yaml again",
            )


def copy_run(run: RunStore, folder: Path, n_stages: int) -> None:
    """Copy what an entry keeps of one run; a long training log is thinned evenly."""
    target = RunStore(folder)
    write_text(folder / "run.yaml", (run.folder / "run.yaml").read_text(encoding="utf-8"))
    target.write_ledger(within_size(run.ledger()))
    for stage in range(n_stages):
        record = run.stage_record(stage)
        for suite in record["cells"]:
            target.write_rows(suite, stage, run.rows(suite, stage))
        target.write_stage_record(record)
    target.append_steps(thinned(run.steps(), MAX_LOG_LINES))


def within_size(ledger: dict[str, Any]) -> dict[str, Any]:
    """Return a bill that fits into an entry: without its plans where they are too long, as no figure needs them."""
    longest = max((len(plans) for plans in ledger.get("plans", {}).values()), default=0)
    n_bytes = len(json.dumps(ledger, indent=2, ensure_ascii=False).encode())
    if longest <= MAX_REVIEWS and n_bytes < MAX_BYTES[".json"]:
        return ledger
    return {name: part for name, part in ledger.items() if name != "plans"}


def thinned(lines: Sequence[Any], n_kept: int) -> list[Any]:
    """Return at most ``n_kept`` of the lines, evenly spread, the first and the last among them."""
    if len(lines) <= n_kept:
        return list(lines)
    return [lines[round(i * (len(lines) - 1) / (n_kept - 1))] for i in range(n_kept)]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of an entry but ``entry.json`` and ``README.md``, by relative path."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name: sha256_file(folder / name) for name in files if name not in ("entry.json", "README.md")}


def readme(entry: Entry, command: str) -> str:
    """Return the README of an entry."""
    seeds = ", ".join(str(s) for s in entry.seeds)
    return (
        f"# {entry.method.label} on {entry.track.name}\n\n"
        f"Seeds {seeds}, finished {entry.date}. Raw rows per document are in `seed-*/rows/`; every figure\n"
        "on the leaderboard is computed from them. Fill `declarations` in `entry.json` before you submit.\n\n"
        f"Made by, with each seed in turn:\n\n    {command}\n"
    )


# Verifying


@dataclass
class Problems:
    """Collects one clear line per problem."""

    lines: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """Note a problem; the text is made safe to print on one line."""
        self.lines.append(one_line(f"{where}: {what}"))

    def check(self, holds: bool, where: str, what: str) -> bool:
        """Note a problem unless ``holds``; return ``holds``."""
        if not holds:
            self.add(where, what)
        return holds


def one_line(text: str) -> str:
    """Return text without control characters or line breaks, at most 400 letters."""
    safe = "".join(c if c.isprintable() else "?" for c in text)
    return safe if len(safe) <= 400 else safe[:399] + "…"


def verify(folder: Path, *, track: Any = None) -> list[str]:
    """Return what is wrong with an entry, one line each; an empty list means that it may go on the board.

    Args:
        folder: the entry.
        track: a ``clbench.track.Track`` or its ``as_dict()``; None finds a built-in track by name.
    """
    problems = Problems()
    names = check_files(folder, problems)
    if problems.lines:
        return problems.lines
    entry = read_entry(folder, problems)
    if entry is None:
        return problems.lines
    check_entry(folder, entry, names, problems)
    known = find_track(entry, track, problems)
    if known is None or problems.lines:
        return problems.lines
    check_protocol(entry, known, problems)
    measured = {seed: check_run(folder / f"seed-{seed}", seed, entry, known, problems) for seed in entry.seeds}
    if not problems.lines:
        check_together(measured, known, problems)
    return problems.lines


def check_files(folder: Path, problems: Problems) -> set[str]:
    """Look at names, kinds and sizes only; return the relative paths of the files."""
    if not folder.is_dir() or folder.is_symlink():
        problems.add(folder.name, "is not a folder")
        return set()
    names: set[str] = set()
    total = 0
    for path in walk(folder):
        name = path.relative_to(folder).as_posix()
        if len(names) > MAX_FILES:
            problems.add(folder.name, f"more than {MAX_FILES} files")
            return names
        if path.is_symlink() or not path.is_file():
            problems.add(name, "is a link or no ordinary file")
            continue
        if not problems.check(bool(EXPECTED_FILE.fullmatch(name)), name, "does not belong into an entry"):
            continue
        size, cap = path.stat().st_size, MAX_BYTES[path.suffix]
        problems.check(size <= cap, name, f"{size} bytes, at most {cap} are allowed")
        names.add(name)
        total += size
    problems.check(total <= MAX_ENTRY_BYTES, folder.name, f"{total} bytes, at most {MAX_ENTRY_BYTES} are allowed")
    problems.check("entry.json" in names, "entry.json", "is missing; make entries with `clbench leaderboard pack`")
    return names


def walk(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder but plain folders, without following links."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from walk(path)
        else:
            yield path


def read_entry(folder: Path, problems: Problems) -> Entry | None:
    """Return the parsed ``entry.json``, None when it is not one."""
    value = read_capped_json(folder, "entry.json", problems)
    if value is None:
        return None
    entry: Entry | None = parse(Entry, value, "entry.json", problems)
    return entry


def parse(model: type[Any], value: Any, where: str, problems: Problems) -> Any:
    """Return a value as a pydantic model, None with a problem when it does not fit."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems.add(*first_problem(where, error).split(": ", 1))
    except RecursionError:
        problems.add(where, "is nested too deeply")
    return None


def first_problem(where: str, error: ValidationError) -> str:
    """Return the first thing that pydantic found, as one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole file"
    return f"{where}: {place}: {first['msg']}"


def refuse_constant(name: str) -> float:
    """Refuse NaN and infinity, which JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def read_capped_json(folder: Path, name: str, problems: Problems) -> Any:
    """Return parsed JSON whose texts and depth are within limits, None with a problem otherwise."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=refuse_constant)
    except FileNotFoundError:
        problems.add(name, "is missing")
        return None
    except (ValueError, RecursionError) as error:
        problems.add(name, f"is not valid JSON: {error}")
        return None
    return value if within_limits(value, name, problems) else None


def read_capped_yaml(folder: Path, name: str, problems: Problems) -> Any:
    """Return parsed YAML without aliases, tags or deep nesting, None with a problem otherwise."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
        depth = n_nodes = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases are not allowed")
            n_nodes += isinstance(event, yaml.NodeEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or n_nodes > MAX_YAML_NODES:
                raise ValueError("too deep or too many values")
        value = yaml.safe_load(text)
    except FileNotFoundError:
        problems.add(name, "is missing")
        return None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.add(name, f"is not valid YAML: {error}")
        return None
    return value if within_limits(value, name, problems) else None


def within_limits(value: Any, where: str, problems: Problems) -> bool:
    """Check depth, finiteness, and every text's length and characters."""
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        here, depth = pending.pop()
        if depth > MAX_DEPTH:
            return problems.check(False, where, f"is nested deeper than {MAX_DEPTH}")
        if isinstance(here, Mapping):
            pending.extend((part, depth + 1) for pair in here.items() for part in pair)
        elif isinstance(here, list):
            pending.extend((part, depth + 1) for part in here)
        elif isinstance(here, str):
            if len(here) > MAX_LETTERS:
                return problems.check(False, where, f"a text of {len(here)} letters, at most {MAX_LETTERS} are allowed")
            if odd := next((c for c in here if is_odd(c)), None):
                return problems.check(False, where, f"the character U+{ord(odd):04X} is not allowed")
        elif isinstance(here, float) and not math.isfinite(here):
            return problems.check(False, where, "a number is NaN or infinite")
    return True


def is_odd(character: str) -> bool:
    """Return whether a character is invisible or reorders text: control, format, surrogate, private use."""
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co")


def check_entry(folder: Path, entry: Entry, names: set[str], problems: Problems) -> None:
    """Check the folder's name, the digests and the declarations."""
    match = ENTRY_NAME.fullmatch(folder.name)
    wanted = f"{slug(entry.method.label)}-{entry.date.replace('-', '')}-{digest_of(entry.files)[:8]}"
    problems.check(match is not None and folder.name == wanted, folder.name, f"the folder has to be named {wanted}")
    problems.check(
        folder.parent.name == entry.track.name,
        folder.name,
        f"the folder has to lie in a folder {entry.track.name}",
    )
    seeds = set(entry.seeds)
    problems.check(len(seeds) == len(entry.seeds), "entry.json", "seeds are repeated")
    listed = names - {"entry.json", "README.md"}
    for name in sorted(set(entry.files) ^ listed):
        problems.add(name, "is listed in entry.json but missing" if name in entry.files else "is not in entry.json")
    for name in sorted(set(entry.files) & listed):
        problems.check(
            sha256_file(folder / name) == entry.files[name], name, "its SHA-256 is not the one in entry.json"
        )
        problems.check(int(name[5:].split("/")[0]) in seeds, name, "belongs to a seed that entry.json does not name")
    declared = entry.declarations
    where = "entry.json declarations"
    problems.check(any(a.strip() for a in declared.authors), where, "authors is empty; say who submits this")
    problems.check(declared.only_track_data, where, "only_track_data is false; the board compares nothing else")
    problems.check(declared.heldout_untouched, where, "heldout_untouched is false; such numbers cannot be listed")
    problems.check(
        declared.code == "" or re.fullmatch(r"https://[\w./~%#?=&+\-]+", declared.code) is not None,
        where, "code has to be a https address",
    )  # fmt: skip
    ours = {path.stem for path in (Path(__file__).parent.parent / "methods").glob("[a-z]*.py")}
    targets = [str(c.get("target", c.get("name"))) for c in entry.method.components]
    foreign = [target for target in targets if target.replace("-", "_") not in ours]
    problems.check(
        bool(declared.code) or not foreign,
        where,
        f"code is empty, but {', '.join(foreign)} is no built-in method",
    )


def find_track(entry: Entry, track: Any, problems: Problems) -> dict[str, Any] | None:
    """Return the track as a mapping with its digest, None with a problem when it is not known."""
    if track is None:
        from clbench.registry import load_track

        try:
            track = load_track(entry.track.name)
        except ClbenchError as error:
            problems.add("entry.json track", str(error))
            return None
    known: dict[str, Any] = dict(track) if isinstance(track, Mapping) else track.as_dict()
    return known


def check_protocol(entry: Entry, track: Mapping[str, Any], problems: Problems) -> None:
    """Compare what the entry followed with the track as we know it."""
    where = "entry.json track"
    problems.check(entry.track.name == track["name"], where, f"is {entry.track.name}, not {track['name']}")
    problems.check(
        (entry.track.version, entry.track.sha256) == (track["version"], track["sha256"]), where,
        f"version {entry.track.version}, digest {entry.track.sha256[:12]}; ours is {track['version']}, "
        f"{track['sha256'][:12]}: run again on the present track",
    )  # fmt: skip
    missing, extra = (
        sorted(set(track["seeds"]) - set(entry.seeds)),
        sorted(set(entry.seeds) - set(track["seeds"])),
    )
    problems.check(not missing, "entry.json seeds", f"the track also asks for {missing}")
    problems.check(not extra, "entry.json seeds", f"{extra} are not among the track's seeds")


@dataclass(frozen=True)
class Measured:
    """What one seed brought: its held-out tables by row, and the tokens it trained on."""

    n_stages: int
    tables: dict[str, list[Any]]
    """Suite -> one table per matrix row."""
    n_trained: int


def check_run(folder: Path, seed: int, entry: Entry, track: Mapping[str, Any], problems: Problems) -> Measured | None:
    """Check one seed's files; None when its rows cannot be compared."""
    where = folder.name
    value = read_capped_yaml(folder.parent, f"{where}/run.yaml", problems)
    run: _Run | None = None if value is None else parse(_Run, value, f"{where}/run.yaml", problems)
    if run is None:
        return None
    check_config(run, seed, entry, track, f"{where}/run.yaml", problems)
    n_stages = len(run.stages)
    suites = suite_names(track.get("suites") or ["heldout"])
    check_records(folder, n_stages, suites, problems)
    n_trained = check_ledger(folder, n_stages, run, track, problems)
    check_steps(folder, track, problems)
    tables: dict[str, list[Any]] = {}
    for suite in suites:
        tables[suite] = [
            check_rows(
                folder.parent,
                f"{where}/rows/{suite}-{stage:02d}.parquet",
                n_stages,
                problems,
                is_matrix=suite == suites[0],
            )
            for stage in range(n_stages)
        ]
        if suite == capacity.SUITE:
            for stage, table in enumerate(tables[suite]):
                check_capacity(table, f"{where}/rows/{suite}-{stage:02d}.parquet", problems)
    wanted = {f"{suite}-{stage:02d}.parquet" for suite in suites for stage in range(n_stages)}
    for path in sorted((folder / "rows").glob("*")):
        problems.check(path.name in wanted, f"{where}/rows/{path.name}", "is no cell of this track")
    whole = all(table is not None for rows in tables.values() for table in rows)
    return Measured(n_stages, tables, n_trained) if whole else None


def suite_names(specs: Sequence[str]) -> list[str]:
    """Return the names that rows of a track's suites are filed under; ``general:size=small`` is ``general``."""
    from clbench.registry import suite_class

    return [str(suite_class(spec)[0].name) for spec in specs]


def check_config(run: _Run, seed: int, entry: Entry, track: Mapping[str, Any], where: str, problems: Problems) -> None:
    """Compare one resolved configuration with the entry and the track."""
    for what, given, wanted in (
        ("seed", run.seed, seed),
        ("method.label", run.method.label, entry.method.label),
        ("method.components", run.method.components, entry.method.components),
        ("track.name", run.track.get("name"), track["name"]),
        ("track.version", run.track.get("version"), track["version"]),
        ("track.sha256", run.track.get("sha256"), track["sha256"]),
        ("stages", [stage.index for stage in run.stages], list(range(len(run.stages)))),
    ):
        problems.check(given == wanted, where, f"{what} is {given!r}, expected {wanted!r}")
    known, given = track.get("stream_sha256"), run.track.get("stream_sha256")
    mend = "" if known else "; the track has none: freeze it with `clbench oracle TRACK --write`, then run again"
    problems.check(given == known, where, f"track.stream_sha256 is {given!r}, expected {known!r}{mend}")
    # The digest of a track leaves out its oracle, which regrets are measured from.
    same = (run.track.get("oracle") or None) == (track.get("oracle") or None)
    problems.check(same, where, "track.oracle is not the track's: run again on the present track")
    n_wanted = len((track.get("row0") or {}).get("nats_per_token", run.stages))
    problems.check(len(run.stages) == n_wanted, where, f"{len(run.stages)} stages, the track has {n_wanted}")


def check_records(folder: Path, n_stages: int, suites: Sequence[str], problems: Problems) -> None:
    """Check that every stage has its record, and no other stage."""
    wanted = {f"{stage:02d}.json" for stage in range(n_stages)}
    found = {path.name for path in (folder / "stages").glob("*")}
    for name in sorted(wanted ^ found):
        problems.add(f"{folder.name}/stages/{name}", "is missing" if name in wanted else "is no stage of this track")
    for name in sorted(wanted & found):
        where = f"{folder.name}/stages/{name}"
        value = read_capped_json(folder.parent, where, problems)
        record: _Record | None = None if value is None else parse(_Record, value, where, problems)
        if record is not None:
            problems.check(record.stage == int(name[:2]), where, f"says stage {record.stage}")
            problems.check(set(record.cells) == set(suites), where, f"has cells of {sorted(record.cells)}")


def check_ledger(folder: Path, n_stages: int, run: _Run, track: Mapping[str, Any], problems: Problems) -> int:
    """Check the bill against the track's budget; return the tokens trained on.

    Every stage trains the budget exactly, or nothing at all (a method that never updates). Checkpoints made
    elsewhere have no components and may have no bill.
    """
    where = f"{folder.name}/ledger.json"
    value = read_capped_json(folder.parent, where, problems)
    ledger: _LedgerShape | None = None if value is None else parse(_LedgerShape, value, where, problems)
    if ledger is None or (not value and not run.method.components):
        return 0
    problems.check(bool(value), where, "is empty")
    sums: Mapping[str, Mapping[Any, float]] = {
        "flops": ledger.flops, "seconds": ledger.seconds, "stored_bytes": ledger.stored_bytes,
        "extra_tokens": ledger.extra_tokens,
    }  # fmt: skip
    for name, parts in sums.items():
        problems.check(all(v >= 0 for v in parts.values()), where, f"{name} has a negative part")
    budget = budget_of(track)
    for stage, sources in sorted(ledger.tokens.items()):
        total = sum(sources.values())
        problems.check(0 < stage < n_stages, where, f"tokens of stage {stage}, which is no trained stage")
        problems.check(all(0 <= s <= stage for s in sources), where, f"stage {stage} trained on a later stage's text")
        problems.check(all(n >= 0 for n in sources.values()), where, f"stage {stage} has a negative token count")
        problems.check(
            budget == math.inf or total in (0, budget),
            where,
            f"stage {stage} trained {total} tokens, the budget is {budget}",
        )
    check_plans(ledger, n_stages, where, problems)
    n_trained = sum(sum(sources.values()) for sources in ledger.tokens.values())
    problems.check(n_trained == 0 or ledger.flops.get("train", 0) > 0, where, "tokens were trained but no FLOPs billed")
    return n_trained


def check_plans(ledger: _LedgerShape, n_stages: int, where: str, problems: Problems) -> None:
    """Check that what stages were drawn from could be: shares of stages that had happened, from ascending steps."""
    for stage, plans in sorted(ledger.plans.items()):
        if not problems.check(0 < stage < n_stages, where, f"plans of stage {stage}, which is no trained stage"):
            return
        steps = [plan.step for plan in plans]
        problems.check(steps == sorted(set(steps)), where, f"plans of stage {stage} are not in order")
        for plan in plans:
            sources = {*plan.mixture, *plan.pools}
            problems.check(all(0 <= s <= stage for s in sources), where, f"stage {stage} plans a later stage's text")
            whole = all(0 <= share <= 1 for share in plan.mixture.values())
            whole = whole and math.isclose(sum(plan.mixture.values()), 1, abs_tol=1e-6)
            problems.check(whole, where, f"the shares that stage {stage} plans are no distribution")
            problems.check(all(n >= 0 for n in plan.pools.values()), where, f"stage {stage} plans a negative pool")


def budget_of(track: Mapping[str, Any]) -> float:
    """Return the tokens of a stage; infinite where the track fixes its steps instead, or says nothing."""
    training = track.get("training") or {}
    found = None if training.get("n_steps_per_stage") else training.get("n_tokens_per_stage")
    return math.inf if found is None else found


def check_steps(folder: Path, track: Mapping[str, Any], problems: Problems) -> None:
    """Check the training log, where there is one."""
    name, path = f"{folder.name}/steps.jsonl", folder / "steps.jsonl"
    if not path.is_file():
        return
    budget = budget_of(track)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        problems.add(name, "is not UTF-8")
        return
    problems.check(len(lines) <= MAX_LOG_LINES, name, f"{len(lines)} lines, at most {MAX_LOG_LINES} are allowed")
    for number, text in enumerate(lines[:MAX_LOG_LINES], 1):
        where = f"{name} line {number}"
        try:
            value = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            problems.add(where, f"is not valid JSON: {error}")
            return
        step: _Step | None = parse(_Step, value, where, problems) if within_limits(value, where, problems) else None
        if step is None or not problems.check(step.n_tokens <= budget, where, f"{step.n_tokens} tokens in one stage"):
            return


def check_rows(folder: Path, name: str, n_stages: int, problems: Problems, *, is_matrix: bool = True) -> Any:
    """Return the sorted rows of one checkpoint, None with a problem when they cannot be used.

    ``is_matrix``: they are the track's first suite, losses on every period.
    """
    if not (folder / name).is_file():
        problems.add(name, "is missing: a cell of the matrix was not measured")
        return None
    table = read_capped_rows(folder / name, name, problems)
    if table is None:
        return None
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from clbench.suite import UNDEFINED

    if any(table[column].null_count for column in table.column_names):
        problems.add(name, "has empty fields")
        return None
    texts = [c for c in table.column_names if pa.types.is_string(ROWS_SCHEMA.field(c).type)]
    for column in texts:
        for chunk in table[column].chunks:
            longest = pc.max(pc.utf8_length(chunk.dictionary)).as_py() or 0
            if not problems.check(longest <= MAX_ITEM_LETTERS, name, f"{column} holds a text of {longest} letters"):
                return None
    table = table.cast(ROWS_SCHEMA).sort_by([("metric", "ascending"), ("stage", "ascending"), ("item", "ascending")])
    keys = table.select(["metric", "stage", "item"])
    if keys.group_by(keys.column_names).aggregate([]).num_rows < table.num_rows:
        problems.add(name, "a document is there twice")
        return None
    values, n_tokens, n_bytes = (table[c].to_numpy() for c in ("value", "n_tokens", "n_bytes"))
    said = pc.starts_with(table["change"], UNDEFINED).to_numpy() & np.isnan(values)  # NaN with a reason is an answer
    if not problems.check(bool((np.isfinite(values) | said).all()), name, "a value is NaN or infinite"):
        return None
    problems.check(bool((n_tokens > 0).all() and (n_bytes > 0).all()), name, "a document without tokens or bytes")
    losses = table.filter(pc.equal(table["metric"], "nll_nats"))
    problems.check(bool((losses["value"].to_numpy() >= 0).all()), name, "a negative log-likelihood is below zero")
    for stage, _, bits in cells(losses, n_stages) if is_matrix else []:  # another suite's items may have no period
        problems.check(bits is not None, name, f"no document of period {stage}")
        problems.check(
            bits is None or bits < MAX_BITS_PER_BYTE, name,
            f"{bits or 0:.1f} bits per byte on period {stage}, at most {MAX_BITS_PER_BYTE:g} are believable",
        )  # fmt: skip
    outside = set(pc.unique(table["stage"]).to_pylist()) - set(range(n_stages)) - (set() if is_matrix else {UNDATED})
    problems.check(not outside, name, f"documents of stages {sorted(outside)}, which the track does not have")
    return table


def check_capacity(table: Any, name: str, problems: Problems) -> None:
    """Check that figures of the suite ``capacity`` lie where their definitions allow them; None is no table."""
    if table is None:
        return
    for metric, value in zip(table["metric"].to_pylist(), table["value"].to_pylist(), strict=True):
        low, high = capacity.RANGES.get(metric.partition(":")[0], (-math.inf, math.inf))
        if not problems.check(
            math.isnan(value) or low <= value <= high,
            name,
            f"{metric} is {value:g}, which is outside of {low:g} to {high:g}",
        ):
            return


def read_capped_rows(path: Path, name: str, problems: Problems) -> Any:
    """Return a Parquet table of ROWS_SCHEMA, its texts as dictionaries so that a repeated text costs nothing.

    Size and schema are taken from the metadata before any column is read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [field.name for field in ROWS_SCHEMA if pa.types.is_string(field.type)]
    try:
        metadata = pq.read_metadata(path)
        if not believable(metadata, name, problems):
            return None
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            table = file.read()
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        problems.add(name, f"is not readable Parquet: {error}")
        return None
    plain = {f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in table.schema}
    fits = pa.schema(list(plain.items())).equals(ROWS_SCHEMA)
    return table if problems.check(fits, name, "its column types are not those of rows") else None


def believable(metadata: Any, name: str, problems: Problems) -> bool:
    """Check what a Parquet file says about itself: columns, rows, row groups, unpacked size."""
    groups = [metadata.row_group(i) for i in range(min(metadata.num_row_groups, 1001))]
    unpacked = sum(g.column(c).total_uncompressed_size for g in groups for c in range(g.num_columns))
    n_rows = max(metadata.num_rows, sum(g.num_rows for g in groups))
    columns = metadata.schema.to_arrow_schema().names
    for holds, what in (
        (columns == ROWS_SCHEMA.names, "its columns are not those of rows"),
        (n_rows <= MAX_ROWS, f"{n_rows} rows, at most {MAX_ROWS} are allowed"),
        (len(groups) <= 1000, "more than 1000 row groups"),
        (0 <= unpacked <= MAX_UNPACKED_BYTES, f"{unpacked} bytes when unpacked"),
    ):
        if not problems.check(holds, name, what):
            return False
    return True


def cells(losses: Any, n_stages: int) -> list[tuple[int, float | None, float | None]]:
    """Return (period, nats per token, bits per byte) of one checkpoint, None without documents."""
    import numpy as np

    stage = losses["stage"].to_numpy()
    found: list[tuple[int, float | None, float | None]] = []
    for period in range(n_stages):
        here = stage == period
        nats, tokens, n_bytes = (float(np.sum(losses[c].to_numpy()[here])) for c in ("value", "n_tokens", "n_bytes"))
        found.append(
            (period, nats / tokens, nats / math.log(2) / n_bytes) if tokens and n_bytes else (period, None, None)
        )
    return found


def without_reasons(table: Any) -> Any:
    """Return rows whose ``change`` is empty where it says why a value is NaN, which may differ by checkpoint."""
    import pyarrow.compute as pc

    from clbench.suite import UNDEFINED

    change = pc.if_else(pc.starts_with(table["change"], UNDEFINED), "", table["change"])
    return table.set_column(table.column_names.index("change"), "change", change)


def check_together(measured: Mapping[int, Measured | None], track: Mapping[str, Any], problems: Problems) -> None:
    """Compare rows and seeds with each other, and row 0 with the track's."""
    reference: dict[str, Any] = {}
    last: dict[Any, int] = {}
    identity = ["metric", "stage", "item", "n_tokens", "n_bytes", "group", "change"]
    for seed, run in measured.items():
        if run is None:
            continue
        for suite, tables in run.tables.items():
            for stage, table in enumerate(tables):
                documents = without_reasons(table).select(identity)
                same = documents.equals(reference.setdefault(suite, documents))
                where = f"seed-{seed}/rows/{suite}-{stage:02d}.parquet"
                problems.check(same, where, "does not hold the same documents as the first row of the first seed")
        check_row_zero(seed, run, track, problems)
        rows = tuple(run.tables["heldout"][-1]["value"].to_pylist()) if "heldout" in run.tables else None
        if run.n_trained and rows is not None:
            twin = last.setdefault(rows, seed)
            problems.check(twin == seed, f"seed-{seed}", f"repeats the numbers of seed {twin} to the last bit")


def check_row_zero(seed: int, run: Measured, track: Mapping[str, Any], problems: Problems) -> None:
    """Compare the base's losses with the track's: another base, tokenizer or harness shows here."""
    import pyarrow.compute as pc

    row0, table = track.get("row0"), run.tables.get("heldout", [None])[0]
    if not row0 or table is None:
        return
    losses = table.filter(pc.equal(table["metric"], "nll_nats"))
    for (period, nats, _), wanted in zip(cells(losses, run.n_stages), row0["nats_per_token"], strict=False):
        if nats is not None:
            problems.check(
                abs(nats - wanted) <= row0["tolerance_nats"], f"seed-{seed} row 0",
                f"{nats:.4f} nats per token on period {period}, the track's base has {wanted:.4f} "
                f"± {row0['tolerance_nats']:g}: another base, tokenizer or stream",
            )  # fmt: skip


# Reading a folder of entries


@dataclass(frozen=True)
class VerifiedEntry:
    """An entry that passed, with its runs."""

    folder: Path
    entry: Entry
    runs: list[RunStore]


@dataclass(frozen=True)
class Submissions:
    """What a submissions folder holds."""

    accepted: list[VerifiedEntry]
    rejected: dict[str, list[str]]
    """``track/entry`` -> its problems."""


def finder(tracks: Sequence[Any]) -> Callable[[str], Any]:
    """Return what finds a ``clbench.track.Track`` by name among those given; None, a built-in one, for others."""
    return {track.name: track for track in tracks}.get


def read_submissions(folder: Path, *, find: Callable[[str], Any] | None = None) -> Submissions:
    """Verify every entry below ``folder/<track>/``.

    Args:
        folder: the submissions folder.
        find: returns the track of a name; None instead of it, or from it, finds built-in tracks.
    """
    accepted, rejected = [], {}
    for path in sorted(p for p in folder.glob("*/*") if not p.name.startswith(".") and (p.is_dir() or p.is_symlink())):
        name = f"{one_line(path.parent.name)}/{one_line(path.name)}"
        try:
            problems = verify(path, track=find(path.parent.name) if find else None)
        except (ClbenchError, OSError) as error:
            problems = [one_line(str(error))]
        if problems:
            rejected[name] = problems
            continue
        entry = Entry.model_validate_json((path / "entry.json").read_text(encoding="utf-8"))
        accepted.append(VerifiedEntry(path, entry, [RunStore(path / f"seed-{seed}") for seed in sorted(entry.seeds)]))
    return Submissions(accepted, rejected)


def require_folder(folder: Path) -> Path:
    """Return the folder, or say that there is none."""
    if not folder.is_dir():
        raise ConfigError("no such folder", where=folder, mend="give the folder that holds <track>/<entry>")
    return folder
