"""Entries: what is packed verifies; every way of tampering that we could think of is named in one line."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clbench.errors import SubmissionError
from clbench.files import digest_of, sha256_file
from clbench.leaderboard import submission
from clbench.leaderboard.submission import MAX_LOG_LINES, pack, read_submissions, verify
from clbench.results.store import ROWS_SCHEMA, RunStore
from clbench.suite import UNDATED
from clbench.track import Track
from tests.leaderboard.conftest import DECLARED, SHAPE, known_track
from tests.synthetic_runs import write_run

Tamper = Callable[[Path], Any]


@pytest.fixture(scope="module")
def packed(runs: dict[str, list[RunStore]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(runs["sequential"], tmp_path_factory.mktemp("packed"), declarations=DECLARED)


@pytest.fixture
def entry(packed: Path, tmp_path: Path) -> Iterator[Path]:
    copy = tmp_path / packed.parent.name / packed.name
    shutil.copytree(packed, copy)
    yield copy


@pytest.fixture(scope="module")
def track(runs: dict[str, list[RunStore]]) -> dict[str, Any]:
    return known_track(runs["sequential"][0])


def reseal(entry: Path) -> Path:
    """Give a tampered entry right digests and the right name, as an attacker would; return its new place."""
    value = json.loads((entry / "entry.json").read_text())
    value["files"] = {
        p.relative_to(entry).as_posix(): sha256_file(p)
        for p in sorted(entry.rglob("*"))
        if p.is_file() and p.name not in ("entry.json", "README.md")
    }
    (entry / "entry.json").write_text(json.dumps(value))
    stem = entry.name.rsplit("-", 1)[0]
    return entry.rename(entry.with_name(f"{stem}-{digest_of(value['files'])[:8]}"))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_rows(path: Path, change: Callable[[dict[str, list[Any]]], Any]) -> None:
    columns = pq.read_table(path, partitioning=None).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=ROWS_SCHEMA), path)


def edit_yaml(path: Path, change: Callable[[Any], Any]) -> None:
    value = yaml.safe_load(path.read_text())
    change(value)
    path.write_text(yaml.safe_dump(value))


LAST = "seed-1/rows/heldout-02.parquet"
BUDGET = 200_000


def in_entry(change: Callable[[Any], Any]) -> Tamper:
    return lambda entry: edit_json(entry / "entry.json", change)


def in_ledger(change: Callable[[Any], Any]) -> Tamper:
    return lambda entry: edit_json(entry / "seed-1" / "ledger.json", change)


def in_plans(entries: Any) -> Tamper:
    """Write plans of stage 1 into a ledger."""
    return in_ledger(lambda value: value.update(plans={"1": entries}))


def in_stage(change: Callable[[Any], Any]) -> Tamper:
    return lambda entry: edit_json(entry / "seed-1" / "stages" / "02.json", change)


def in_run(change: Callable[[Any], Any]) -> Tamper:
    return lambda entry: edit_yaml(entry / "seed-1" / "run.yaml", change)


def in_rows(change: Callable[[dict[str, list[Any]]], Any]) -> Tamper:
    return lambda entry: edit_rows(entry / LAST, change)


def as_entry(text: str) -> Tamper:
    return lambda entry: (entry / "entry.json").write_text(text)


def as_run(text: str) -> Tamper:
    return lambda entry: (entry / "seed-1" / "run.yaml").write_text(text)


def set_first(column: str, value: Any) -> Tamper:
    return in_rows(lambda columns: columns[column].__setitem__(0, value))


def add_file(name: str, text: str = "a: 1") -> Tamper:
    def tamper(entry: Path) -> None:
        (entry / name).parent.mkdir(parents=True, exist_ok=True)
        (entry / name).write_text(text)

    return tamper


def readme_is_a_link(entry: Path) -> None:
    (entry / "README.md").unlink()
    (entry / "README.md").symlink_to("/etc/passwd")


def stage_as_int32(entry: Path) -> None:
    types = [(f.name, pa.int32() if f.name == "stage" else f.type) for f in ROWS_SCHEMA]
    pq.write_table(pq.read_table(entry / LAST, partitioning=None).cast(pa.schema(types)), entry / LAST)


def test_what_is_packed_verifies(packed: Path, track: dict[str, Any]) -> None:
    assert verify(packed, track=track) == []
    assert packed.parent.name == "synthetic"
    assert packed.name.startswith("sequential-20260103-")
    value = json.loads((packed / "entry.json").read_text())
    assert value["seeds"] == [0, 1, 2]
    assert "seed-2/rows/heldout-02.parquet" in value["files"]


def test_a_suite_of_questions_is_packed_and_verifies_by_its_spec(tmp_path: Path) -> None:
    """Scores have no losses a period and items of no period; the spec in the track has options, the rows a name."""
    runs = [write_run(tmp_path / f"seed-{seed}", seed=seed, **SHAPE) for seed in range(3)]
    question = {"item": "q", "stage": UNDATED, "metric": "acc", "value": 1.0, "n_tokens": 1, "n_bytes": 1}
    rows = pa.Table.from_pylist([{**question, "group": "quiz", "change": ""}], schema=ROWS_SCHEMA)
    for run in runs:
        for stage in run.stages_done():
            run.write_rows("facts", stage, rows)
            record = run.stage_record(stage)
            run.write_stage_record({**record, "cells": {**record["cells"], "facts": "0" * 64}})
    known = {**known_track(runs[0]), "suites": ["heldout", "facts:tokens_per_batch=8"]}
    entry = pack(runs, tmp_path / "entries", declarations=DECLARED)
    assert verify(entry, track=known) == []
    assert any("has cells of" in line for line in verify(entry, track=known_track(runs[0])))
    dated = {**known, "suites": ["facts", "heldout"]}  # the first suite is the matrix: losses on every period
    assert any("no document of period 0" in line for line in verify(entry, track=dated))


def test_packing_again_changes_nothing(packed: Path, runs: dict[str, list[RunStore]]) -> None:
    before = {p: p.read_bytes() for p in packed.rglob("*") if p.is_file()}
    assert pack(runs["sequential"], packed.parent.parent) == packed
    assert {p: p.read_bytes() for p in packed.rglob("*") if p.is_file()} == before
    assert [p.name for p in packed.parent.iterdir()] == [packed.name]


def test_frozen_and_replay_pass_too(runs: dict[str, list[RunStore]], track: dict[str, Any], tmp_path: Path) -> None:
    for method in ("frozen", "replay:fraction=1/2"):
        assert verify(pack(runs[method], tmp_path, declarations=DECLARED), track=track) == []


def test_plans_pass_and_too_many_are_left_out(
    runs: dict[str, list[RunStore]], track: dict[str, Any], tmp_path: Path
) -> None:
    entry = {"step": 0, "mixture": {"0": 0.5, "1": 0.5}, "pools": {"0": 1000}, "n_excluded": 3}
    for name, plans in (("few", {"1": [entry]}), ("many", {"1": [{**entry, "step": k} for k in range(5000)]})):
        copies = []
        for run in runs["replay:fraction=1/2"]:
            folder = shutil.copytree(run.folder, tmp_path / name / "runs" / run.folder.name)
            edit_json(folder / "ledger.json", lambda value, plans=plans: value.update(plans=plans))
            copies.append(RunStore(folder))
        packed = pack(copies, tmp_path / name / "entries", declarations=DECLARED)
        assert verify(packed, track=track) == []
        kept = json.loads((packed / "seed-1/ledger.json").read_text(encoding="utf-8"))
        assert kept.get("plans") == (plans if name == "few" else None)
        assert kept["tokens"] == copies[1].ledger()["tokens"]


def test_a_long_log_is_thinned_to_its_ends() -> None:
    lines = submission.thinned(list(range(12_345)), MAX_LOG_LINES)
    assert (len(lines), lines[0], lines[-1]) == (MAX_LOG_LINES, 0, 12_344)
    assert lines == sorted(set(lines))


def test_unfinished_or_mixed_runs_are_not_packed(runs: dict[str, list[RunStore]], tmp_path: Path) -> None:
    early = write_run(tmp_path / "early", seed=2, n_rows=2, **SHAPE)
    for chosen, message in (
        ([*runs["sequential"][:2], early], "stages .2. are not finished"),
        (runs["sequential"][:2], "asks for seeds"),
        ([*runs["sequential"][:2], runs["frozen"][2]], "several methods"),
        ([runs["sequential"][0]] * 3, "twice"),
        ([], "needs runs"),
    ):
        with pytest.raises(SubmissionError, match=message):
            pack(chosen, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_declarations_have_to_be_filled_in(
    runs: dict[str, list[RunStore]], track: dict[str, Any], tmp_path: Path
) -> None:
    problems = verify(pack(runs["sequential"], tmp_path), track=track)
    assert [p.split(": ")[1].split(" ")[0] for p in problems] == [
        "authors",
        "only_track_data",
        "heldout_untouched",
    ]


# Tampering that the digests alone find


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda e: (e / LAST).write_bytes(b"x"), "its SHA-256 is not the one"),
        (lambda e: (e / LAST).unlink(), "listed in entry.json but missing"),
        (add_file("evil.py"), "does not belong into an entry"),
        (add_file("seed-1/rows/x.html"), "does not belong"),
        (add_file("seed-01/run.yaml"), "does not belong"),
        (add_file("seed-9/run.yaml"), "is not in entry.json"),
        (readme_is_a_link, "is a link"),
        (lambda e: (e / "seed-3").symlink_to(e.parent), "is a link"),
        (lambda e: os.mkfifo(e / "seed-1" / "steps.json"), "no ordinary file"),
        (lambda e: (e / "README.md").write_bytes(b"x" * (1 << 17)), "at most 65536 are allowed"),
        (lambda e: (e / "entry.json").unlink(), "is missing"),
        (as_entry("{" * 100_000), "not valid JSON"),
        (as_entry("[" * 100_000), "not valid JSON"),
        (as_entry('{"format": NaN}'), "NaN is not JSON"),
        (as_entry('{"format": ' + "9" * 10_000 + "}"), "not valid JSON"),
        (as_entry("[]"), "entry.json"),
        (lambda e: (e / "entry.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
        (in_entry(lambda v: v.update(score=1.0)), "Extra inputs are not permitted"),
        (in_entry(lambda v: v["method"].update(label="<b>")), "method.label"),
        (in_entry(lambda v: v["files"].update({"../../x": "0"})), "../../x: is listed"),
        (in_entry(lambda v: v["track"].update(name="../up")), "track.name"),
        (in_entry(lambda v: v.update(date="2026-13-99x")), "date"),
        (in_entry(lambda v: v.update(date="2025-01-01")), "has to be named"),
        (in_entry(lambda v: v["declarations"].update(notes="a‮b")), "U+202E"),
        (in_entry(lambda v: v["declarations"].update(code="javascript:1")), "https"),
        (in_entry(lambda v: v["declarations"].update(authors=["x" * 5000])), "5000 letters"),
        (in_entry(lambda v: v["seeds"].append(3)), "[3] are not among the track's seeds"),
        (in_entry(lambda v: v["track"].update(sha256="0" * 64)), "run again on"),
    ],
)
def test_files_and_names(entry: Path, track: dict[str, Any], tamper: Tamper, message: str) -> None:
    tamper(entry)
    expect(verify(entry, track=track), message)


def expect(problems: list[str], message: str) -> None:
    assert any(message in line for line in problems), problems
    assert all(line.isprintable() and len(line) <= 400 for line in problems)


def test_reasons_for_nan_may_differ_between_checkpoints() -> None:
    one, other, changed = (
        pa.table({"metric": ["a", "b"], "change": change})
        for change in (["undefined: too few", "new"], ["", "new"], ["undefined: too few", "changed"])
    )
    assert submission.without_reasons(one).equals(submission.without_reasons(other))
    assert not submission.without_reasons(one).equals(submission.without_reasons(changed))


# Tampering with right digests


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (set_first("value", math.nan), "NaN or infinite"),
        (set_first("value", math.inf), "NaN or infinite"),
        # a figure of another suite may be NaN with a reason; a loss may not
        (
            in_rows(lambda c: c.update(value=[math.nan, *c["value"][1:]], change=["undefined: x", *c["change"][1:]])),
            "below zero",
        ),
        (set_first("value", None), "empty fields"),
        (set_first("value", -1.0), "below zero"),
        (set_first("value", 1e9), "are believable"),
        (set_first("n_tokens", 0), "without tokens"),
        (set_first("n_tokens", 77), "same documents"),
        (set_first("stage", 9), "documents of stages [9]"),
        (in_rows(lambda c: [col.pop(0) for col in c.values()]), "same documents"),
        (in_rows(lambda c: [col.append(col[0]) for col in c.values()]), "there twice"),
        (in_rows(lambda c: [col.__delitem__(slice(0, 12)) for col in c.values()]), "of period 0"),
        (set_first("item", "x" * 10_000), "10000 letters"),
        (
            lambda e: edit_rows(
                e / "seed-0/rows/heldout-00.parquet", lambda c: c.update(value=[v * 0.97 for v in c["value"]])
            ),
            "another base",
        ),
        (
            lambda e: shutil.copyfile(e / "seed-0/rows/heldout-02.parquet", e / LAST),
            "repeats the numbers of seed 0",
        ),
        (lambda e: (e / LAST).write_bytes(b"PAR1" + b"\0" * 64 + b"PAR1"), "not readable Parquet"),
        (lambda e: (e / LAST).write_bytes((e / LAST).read_bytes()[:-40]), "not readable Parquet"),
        (lambda e: pq.write_table(pa.table({"a": [1]}), e / LAST), "columns are not those"),
        (stage_as_int32, "column types are not those"),
        (lambda e: (e / LAST).rename(e / "seed-1/rows/other-02.parquet"), "is missing: a cell"),
        (lambda e: (e / "seed-1/stages/02.json").unlink(), "seed-1/stages/02.json: is missing"),
        (
            lambda e: shutil.copyfile(e / "seed-1/stages/02.json", e / "seed-1/stages/03.json"),
            "no stage of this track",
        ),
        (in_stage(lambda v: v.update(stage=1)), "says stage 1"),
        (in_stage(lambda v: v.update(finished="<i>now</i>")), "finished"),
        (in_run(lambda v: v.update(seed=0)), "seed is 0, expected 1"),
        (in_run(lambda v: v["method"].update(label="other")), "method.label is"),
        (in_run(lambda v: v["track"].update(stream_sha256="0")), "stream_sha256 is"),
        # what regrets are measured from, which the track's digest leaves out
        (in_run(lambda v: v["track"]["oracle"].update(nats_per_token=[9.0, 9.0, 9.0])), "oracle is not the track's"),
        (in_run(lambda v: v["track"].pop("oracle")), "oracle is not the track's"),
        (in_run(lambda v: v["stages"].pop()), "2 stages, the track has 3"),
        (in_run(lambda v: v["stages"][0].update(name="x" * 99)), "at most 60"),
        (as_run("a: &a [1]\nb: [*a, *a]\n"), "aliases are not allowed"),
        (as_run("[" * 5000), "too deep"),
        (as_run("[" + "x," * 21_000 + "]"), "too many values"),
        (as_run("!!python/object/apply:os.system ['true']"), "not valid YAML"),
        (in_ledger(lambda v: v["tokens"]["1"].update({"1": 199_999})), "the budget is"),
        (in_ledger(lambda v: v["tokens"].update({"1": {"2": 200_000}})), "later stage"),
        (in_ledger(lambda v: v["tokens"].update({"7": {}})), "no trained stage"),
        (in_ledger(lambda v: v["flops"].update(train=-1)), "negative part"),
        (in_ledger(lambda v: v["flops"].clear()), "no FLOPs billed"),
        (in_ledger(lambda v: v.clear()), "is empty"),
        (in_plans([{"step": 0, "mixture": {"2": 1.0}}]), "later stage's text"),
        (in_plans([{"step": 0, "mixture": {"-1": 1.0}}]), "later stage's text"),
        (in_plans([{"step": 0, "mixture": {"0": 0.5}}]), "no distribution"),
        (in_plans([{"step": 0, "mixture": {"0": 2.0, "1": -1.0}}]), "no distribution"),
        (in_plans([{"step": 4, "mixture": {"0": 1.0}}, {"step": 4, "mixture": {"0": 1.0}}]), "not in order"),
        (in_plans([{"step": 0, "mixture": {"0": 1.0}, "pools": {"0": -5}}]), "negative pool"),
        (in_plans([{"step": -1, "mixture": {"0": 1.0}}]), "greater than or equal to 0"),
        (in_plans([{"step": 0, "mixture": {"0": 1.0}, "n_excluded": -3}]), "greater than or equal to 0"),
        (in_plans([{"step": k, "mixture": {"0": 1.0}} for k in range(1001)]), "at most 1000"),
        (in_plans([{"step": 0}]), "mixture: Field required"),
        (in_plans([7]), "valid dictionary"),
        (in_plans({"step": 0}), "valid list"),
        (in_ledger(lambda v: v.update(plans={"9": [{"step": 0, "mixture": {"0": 1.0}}]})), "no trained stage"),
        (in_ledger(lambda v: v.update(plans=[1])), "valid dictionary"),
        (in_ledger(lambda v: v.update(extra_tokens={"teacher": -1})), "extra_tokens has a negative part"),
        (lambda e: (e / "seed-1/ledger.json").write_text('{"seconds": {"train": 1e999}}'), "NaN or infinite"),
        (lambda e: (e / "seed-1/ledger.json").unlink(), "seed-1/ledger.json: is missing"),
        (lambda e: (e / "seed-1/steps.jsonl").write_text("{}\n"), "line 1: stage"),
        (lambda e: (e / "seed-1/steps.jsonl").write_text("[" * 5000), "not valid JSON"),
        (lambda e: (e / "seed-1/steps.jsonl").write_text("{}\n" * 6000), "6000 lines"),
    ],
)
def test_contents(entry: Path, track: dict[str, Any], tamper: Tamper, message: str) -> None:
    tamper(entry)
    expect(verify(reseal(entry), track=track), message)


def test_a_parquet_bomb_is_refused_by_its_metadata(entry: Path, track: dict[str, Any], monkeypatch: Any) -> None:
    rows = pq.read_table(entry / LAST, partitioning=None).slice(0, 1)
    huge = pa.concat_tables([rows] * 1000).combine_chunks()
    with pq.ParquetWriter(entry / LAST, ROWS_SCHEMA, compression="zstd") as writer:
        for _ in range(600):
            writer.write_table(huge)
    assert (entry / LAST).stat().st_size < submission.MAX_BYTES[".parquet"]
    real = pq.ParquetFile.read

    def read(self: pq.ParquetFile) -> pa.Table:
        assert self.metadata.num_rows < 600_000, "the columns were read"
        return real(self)

    monkeypatch.setattr(pq.ParquetFile, "read", read)
    assert any("600000 rows, at most 500000" in p for p in verify(reseal(entry), track=track))


def test_one_long_text_repeated_in_a_dictionary_is_never_unfolded(entry: Path, track: dict[str, Any]) -> None:
    table = pq.read_table(entry / LAST, partitioning=None)
    n = 400_000  # times 500 kB would be 200 GB as plain strings
    columns = {f.name: pa.array([table[f.name][0].as_py()] * n, f.type) for f in ROWS_SCHEMA if f.name != "item"}
    items = pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), pa.array(["x" * 500_000]))
    folded = pa.table({f.name: items if f.name == "item" else columns[f.name] for f in ROWS_SCHEMA})
    pq.write_table(folded, entry / LAST, store_schema=False)
    expect(verify(reseal(entry), track=track), "item holds a text of 500000 letters")


def test_missing_and_extra_seeds(entry: Path, track: dict[str, Any]) -> None:
    assert any("also asks for [3]" in p for p in verify(entry, track={**track, "seeds": [0, 1, 2, 3]}))
    shutil.rmtree(entry / "seed-2")
    edit_json(entry / "entry.json", lambda v: v["seeds"].remove(2))
    expect(verify(reseal(entry), track=track), "the track also asks for [2]")


def test_an_unknown_track_and_a_wrong_folder(entry: Path, track: dict[str, Any]) -> None:
    expect(verify(entry), "unknown track 'synthetic'")
    moved = entry.rename(entry.parent.parent / entry.name)
    expect(verify(moved, track=track), "has to lie in a folder synthetic")
    assert verify(moved / "nowhere", track=track) == ["nowhere: is not a folder"]


def test_a_foreign_method_has_to_say_where_its_code_is(tmp_path: Path, track: dict[str, Any]) -> None:
    runs = [write_run(tmp_path / f"{seed}", method="mine", seed=seed, **SHAPE) for seed in range(3)]
    expect(verify(pack(runs, tmp_path / "a", declarations=DECLARED), track=track), "mine is no built-in method")
    said = {**DECLARED, "code": "https://example.org/mine"}
    assert verify(pack(runs, tmp_path / "b", declarations=said), track=track) == []


def test_a_file_named_like_a_built_in_method_is_foreign(tmp_path: Path, track: dict[str, Any]) -> None:
    runs = [write_run(tmp_path / f"{seed}", seed=seed, **SHAPE) for seed in range(3)]
    for run in runs:
        config = run.config()
        config["method"]["components"][0]["target"] = "mine/sequential.py"
        run.write_config(config)
    expect(verify(pack(runs, tmp_path / "a", declarations=DECLARED), track=track), "mine/sequential.py is no built-in")


def test_a_real_track_is_accepted_as_such(packed: Path) -> None:
    model = {"hidden_size": 8, "intermediate_size": 16, "n_layers": 1, "n_heads": 1, "max_length": 16}
    base = {"n_tokens": 10, "learning_rate": 0.1, "warmup_steps": 0}
    steps = {"sequence_length": 16, "batch_rows": 1, "learning_rate": 0.1, "warmup_steps": 0}
    training = {"n_tokens_per_stage": 200_000, **steps}
    track = Track.model_validate(
        {
            "name": "synthetic",
            "stream": "synthetic",
            "model": model,
            "base": base,
            "training": training,
            "suites": ["heldout"],
        }
    )
    problems = verify(packed, track=track)
    assert problems
    ours = ("digest", "track.sha256", "track.stream_sha256", "track.oracle")
    assert all(any(word in p for word in ours) for p in problems), problems


def test_a_folder_of_entries_is_sorted_into_good_and_bad(packed: Path, track: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "synthetic" / packed.name)
    (tmp_path / "synthetic" / "junk").mkdir()
    (tmp_path / "synthetic" / "link").symlink_to(packed)
    (tmp_path / "synthetic" / ".hidden.tmp").mkdir()
    found = read_submissions(tmp_path, find=lambda _: track)
    assert [one.folder.name for one in found.accepted] == [packed.name]
    assert sorted(found.rejected) == ["synthetic/junk", "synthetic/link"]
    assert all(found.rejected.values())
