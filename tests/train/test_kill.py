"""kill -9 anywhere, run again: bit-identical to the run that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.kill_driver import TRAPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kills")
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kill_driver", str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def test_the_uninterrupted_run_is_complete(outcomes: dict[str, Any]) -> None:
    whole = outcomes["uninterrupted"]
    assert whole["state"] == "done"
    assert whole["killed_by"] == 0
    assert len(set(whole["weights"])) == len(whole["rows"]) == 4
    assert len(whole["release"]) == 3
    assert whole["tokens"]["3"] == {"0": 250, "1": 250, "2": 250, "3": 750}


@pytest.mark.parametrize("where", list(TRAPS))
def test_killed_and_resumed_is_bit_identical(outcomes: dict[str, Any], where: str) -> None:
    whole, killed = dict(outcomes["uninterrupted"]), dict(outcomes[where])
    assert killed.pop("killed_by") == signal.SIGKILL, "the trap did not spring: the test proves nothing"
    whole.pop("killed_by")
    # Seconds differ, and so may the log lines that the kill lost; every line that is there is the same.
    steps, whole_steps = killed.pop("steps"), whole.pop("steps")
    assert killed == whole
    assert {tuple(line) for line in steps} <= {tuple(line) for line in whole_steps}
    assert {line[0] for line in steps} == {1, 2, 3}
    assert len(steps) == len({(line[0], line[1]) for line in steps})
