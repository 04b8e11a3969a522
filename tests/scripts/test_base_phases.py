"""``benchmarks/base_phases.py``: turning points by hand, and the trace of a base that is trained in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.base_phases import phases, steps_of, trace
from clbench.base import open_base, open_stream
from clbench.run import hardware_for
from tests.command_line.driver import write_track
from tests.engine import prepare_tiny, tiny_track


def test_steps_are_log_spaced_with_both_ends() -> None:
    assert steps_of(10) == [0, 1, 2, 3, 4, 6, 8, 10]
    assert steps_of(1) == [0, 1]


def test_turning_points_by_hand() -> None:
    found = phases([0, 1, 2, 4, 8, 16], [10.0, 6.0, 4.0, 8.0, 12.0, 9.0])
    assert (found["minimum_at_step"], found["maximum_at_step"]) == (2, 8)
    assert (found["collapse"], found["expansion"], found["compression"]) == pytest.approx((-0.6, 2.0, -0.25))
    # The start is higher than anything later, as it is where a random net's features have full rank.
    deep = phases([0, 1, 2, 4, 8, 16], [60.0, 59.0, 7.0, 30.0, 47.0, 40.0])
    assert (deep["minimum_at_step"], deep["maximum_at_step"]) == (2, 8)
    assert deep["compression"] == pytest.approx(40 / 47 - 1)
    falling = phases([0, 1, 2], [3.0, 2.0, 1.0])
    assert (falling["expansion"], falling["compression"]) == (0.0, pytest.approx(1 / 3 - 1))
    rising = phases([0, 1, 2], [1.0, 2.0, 3.0])
    assert (rising["collapse"], rising["compression"]) == (0.0, 0.0)
    assert rising["expansion"] == pytest.approx(2.0)


def test_the_trace_ends_at_the_base_itself(tmp_path: Path) -> None:
    track = tiny_track()
    prepare_tiny(track)
    found = trace(str(write_track(tmp_path / "tiny.yaml")))
    stream = open_stream(track)
    base = open_base(track, stream, hardware_for(track, stream, "cpu"))
    assert found[0]["step"] == 0
    assert found[-1]["step"] == base.facts["n_steps"]
    assert found[-1]["heldout_nats"] < found[0]["heldout_nats"]
