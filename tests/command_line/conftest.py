"""A prepared track and finished runs, made once through the command line itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line.driver import clbench, write_track


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a prepared track: 4 stages, 1,500 tokens each, 3 optimizer steps a stage."""
    path = write_track(tmp_path_factory.mktemp("tracks") / "tiny.yaml")
    prepared = clbench("prepare", path)
    assert prepared.code == 0, prepared.err
    return path


@pytest.fixture(scope="session")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs of ``sequential`` and ``replay``, seed 0; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("sequential", "replay"):
        done = clbench("run", "-m", method, "-t", tiny, "-o", folder, "--mlflow", "none", "--checkpoint-seconds", 0)
        assert done.code == 0, done.err
    return folder
