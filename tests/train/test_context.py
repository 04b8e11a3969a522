"""What a context gives a method besides its batches: rows for extra passes, notes, sums over shards, warnings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need
from clbench.results.store import RunStore
from clbench.tracking import plan_of
from clbench.train.ledger import Ledger
from clbench.train.parallel import sum_over_processes
from tests.engine import run_tiny


class Reader(Method):
    """Reads the same rows in batches of several sizes, notes figures and warns."""

    needs = frozenset({Need.STAGE_BOUNDARIES, Need.PAST_DATA, Need.CURRENT_DATA})

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.sums: list[torch.Tensor] = []

    def end_stage(self, ctx: Context) -> None:
        for size in (1, 3, 100):
            batches = list(ctx.batches(0, n_rows=7, name="fisher", rows_per_batch=size))
            assert all(len(batch.inputs_BT) <= size for batch in batches)
            self.read[ctx.stage.index, size] = [
                torch.cat([batch.inputs_BT for batch in batches]),
                torch.cat([batch.targets_BT for batch in batches]),
            ]
        self.sums.append(ctx.all_reduce(torch.tensor([1.5, -2.0], dtype=torch.float64)))
        ctx.note("size", 1.0)
        ctx.note("size", ctx.stage.index + 0.5)
        ctx.note("angle", math.nan)
        if ctx.stage.index == 1:
            ctx.warn("the direction is noise")


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, RunStore]:
    method = Reader()
    return method, run_tiny(tmp_path_factory.mktemp("reading"), [method])


def test_rows_do_not_depend_on_how_many_come_at_a_time(reading: tuple[Reader, RunStore]) -> None:
    read = reading[0].read
    stages = {stage for stage, _ in read}
    assert len(stages) > 1
    for stage in stages:
        one_by_one = read[stage, 1]
        assert len(one_by_one[0]) == 7
        for size in (3, 100):
            assert all(map(torch.equal, read[stage, size], one_by_one))


def test_one_process_holds_everything(reading: tuple[Reader, RunStore]) -> None:
    assert all(found.tolist() == [1.5, -2.0] for found in reading[0].sums)


def test_notes_stand_in_the_ledger_and_in_mlflow(reading: tuple[Reader, RunStore]) -> None:
    store = reading[1]
    notes = store.ledger()["notes"]
    assert notes["2"] == {"reader": {"size": 2.5, "angle": None}}
    points = {(p.key, p.step): p.value for p in plan_of(store).parent.points}
    assert points["method/reader/size", 1] == 1.5
    assert points["method/reader/angle/undefined", 1] == 1.0
    assert ("method/reader/angle", 1) not in points
    assert Ledger.from_dict(store.ledger()).as_dict()["notes"] == notes


def test_a_warning_names_method_and_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_tiny(tmp_path, [Reader()])
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("reader, stage 1: the direction is noise") == 1


def test_no_rows_are_no_request(tmp_path: Path) -> None:
    class Asks(Reader):
        def end_stage(self, ctx: Context) -> None:
            next(ctx.batches(0, n_rows=1, name="x", rows_per_batch=0))

    with pytest.raises(ConfigError, match="at least one row"):
        run_tiny(tmp_path, [Asks()])


class Steering(Reader):
    """Keeps control rows back and asks for every row of a stage."""

    needs = frozenset({*Reader.needs, Need.CONTROL_DATA})

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[int] = []

    def end_stage(self, ctx: Context) -> None:
        rows = [b.inputs_BT[0].tolist() for b in ctx.batches(ctx.stage.index, n_rows=10_000, name="all")]
        assert len({tuple(row) for row in rows}) == len(rows)
        self.drawn.append(len(rows))


def test_extra_passes_see_each_row_once_and_no_control_rows(tmp_path: Path) -> None:
    plain, steering = Steering(), Steering()
    plain.needs = Reader.needs
    run_tiny(tmp_path / "a", [plain])
    run_tiny(tmp_path / "b", [steering])
    assert all(0 < n < m for n, m in zip(steering.drawn, plain.drawn, strict=True))
    assert all(m - n == min(64, m // 10) for n, m in zip(steering.drawn, plain.drawn, strict=True))


def test_a_method_that_keeps_text_is_not_composed_with_deletions(tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("id\nanything\n")
    with pytest.raises(ConfigError, match="'der' keeps text of its own"):
        run_tiny(tmp_path, [f"deletions:file={names}", "der"])


def summing(rank: int, folder: str) -> None:
    """One of two processes: sum what both hold."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = torch.tensor([1.0, 10.0], dtype=torch.float64) * (rank + 1)
    found = sum_over_processes(own)
    assert found.tolist() == [3.0, 30.0]
    assert own.tolist() == [rank + 1.0, 10.0 * (rank + 1)]
    dist.destroy_process_group()


def test_two_processes_sum_their_shares(tmp_path: Path) -> None:
    arguments: Any = (str(tmp_path),)
    mp.spawn(summing, args=arguments, nprocs=2)  # raises when a process fails
