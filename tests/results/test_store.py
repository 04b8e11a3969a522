"""Round trips and damage of the run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from clbench.errors import IntegrityError, NotFoundError
from clbench.results.store import RunStore, find_runs, read_rows
from tests.synthetic_runs import rows_table, step_lines, write_run

SHAPE = {
    "method": "sequential",
    "seed": 0,
    "n_stages": 4,
    "n_documents": 40,
    "drift": 0.15,
    "forgetting": 0.6,
}


def test_round_trip(tmp_path: Path) -> None:
    store = RunStore.open(write_run(tmp_path / "run").folder)
    assert store.config()["method"]["label"] == "sequential"
    assert store.status() == {"state": "done"}
    assert store.stages_done() == [0, 1, 2, 3]
    assert store.stage_record(2)["n_steps"] == 20
    assert store.rows("heldout", 2).equals(rows_table(2, **SHAPE).combine_chunks())
    assert store.steps() == [line for stage in (1, 2, 3) for line in step_lines("sequential", 0, stage)]
    assert store.ledger()["tokens"]["3"] == {"3": 200_000}


def test_same_run_same_bytes(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    files = sorted(path.relative_to(first.folder) for path in first.folder.rglob("*") if path.is_file())
    assert len(files) == 12
    for name in files:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name
    other = write_run(tmp_path / "c", seed=1)
    assert not other.rows("heldout", 1).equals(first.rows("heldout", 1))
    assert other.rows("heldout", 0).equals(first.rows("heldout", 0)), "the base is the same for all seeds"


def test_missing_and_broken_configuration(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"run\.yaml is missing"):
        RunStore.open(tmp_path)
    store = write_run(tmp_path / "run")
    path = store.folder / "run.yaml"
    for text in ("track: [unclosed", "- a\n- list\n", "a: !!python/object/apply:os.getcwd []"):
        path.write_text(text)
        with pytest.raises(IntegrityError, match=r"run\.yaml"):
            store.config()
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(IntegrityError, match=r"run\.yaml"):
        store.config()


def test_damaged_rows(tmp_path: Path) -> None:
    store = write_run(tmp_path)
    path = store.folder / "rows" / "heldout-01.parquet"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"PAR1", whole[:-100] + bytes(92) + whole[-8:]):
        path.write_bytes(broken)
        with pytest.raises(IntegrityError, match="rows cannot be read"):
            store.rows("heldout", 1)
    path.unlink()
    with pytest.raises(NotFoundError, match="rows are missing"):
        read_rows(path)


def test_rows_with_flipped_bytes_never_crash(tmp_path: Path) -> None:
    store = write_run(tmp_path)
    path = store.folder / "rows" / "heldout-01.parquet"
    whole = path.read_bytes()
    refused = 0
    for place in range(4, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            store.rows("heldout", 1)
        except IntegrityError:
            refused += 1
    assert refused > 5


def test_half_a_line_in_the_log(tmp_path: Path) -> None:
    store = write_run(tmp_path)
    lines = store.steps()
    path = store.folder / "steps.jsonl"
    path.write_text(path.read_text()[:-30])
    assert store.steps() == lines[:-1]
    store.forget_steps_from(2, 6)
    assert store.steps() == lines[:25]
    store.append_steps(lines[25:])
    assert store.steps() == lines


def test_find_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "b" / "seed-0", n_stages=1)
    write_run(tmp_path / "a" / "seed-0", n_stages=1)
    write_run(tmp_path / ".old.tmp" / "seed-0", n_stages=1)
    write_run(tmp_path / "mlflow-artifacts" / "0123" / "artifacts", n_stages=1)
    found = find_runs([tmp_path, tmp_path / "a"])
    assert [store.folder for store in found] == [tmp_path / "a" / "seed-0", tmp_path / "b" / "seed-0"]
    with pytest.raises(NotFoundError, match="folder is missing"):
        find_runs([tmp_path / "nowhere"])
