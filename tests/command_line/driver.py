"""The real command line inside the test's process: what it printed, and how it ended."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from clbench import registry
from clbench.cli import main
from clbench.results.store import RunStore

TINY = {"base": {"n_tokens": 3000}, "training": {"n_tokens_per_stage": 1500}}
"""Changes to the track ``tinydocs`` that make a base take a second; the same as ``tests.engine.tiny_track``."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line that a user's mistake gets; fails when there is more or less than one."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0]), "something was printed after the error"
        assert "Traceback" not in self.err
        assert self.code in (2, 130)
        return lines[0]


def clbench(*arguments: object) -> Outcome:
    """Run ``clbench ARGUMENTS`` through its entry point; anything but an exit is raised, as a traceback would be."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["clbench", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def write_track(path: Path, *, name: str = "tiny", **changes: Any) -> Path:
    """Write the tiny track, changed, to a file that ``--track`` takes."""
    track = yaml.safe_load(registry.track_path("tinydocs").read_text(encoding="utf-8")) | {"name": name}
    for key, value in (TINY | changes).items():
        track[key] = {**track[key], **TINY.get(key, {}), **value} if key in track and isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(track), encoding="utf-8")
    return path


def results_of(store: RunStore) -> dict[str, Any]:
    """Return what has to be equal, bit for bit, in two runs that are the same."""
    ledger = store.ledger()
    return {
        "state": store.status()["state"],
        "weights": [store.stage_record(stage)["weights_sha256"] for stage in store.stages_done()],
        "rows": [store.rows("heldout", stage).to_pydict() for stage in store.stages_done()],
        "release": sorted(path.parent.name for path in store.folder.glob("release/*/model.safetensors")),
        "tokens": ledger["tokens"],
        "flops": ledger["flops"],
        "stored": ledger["stored_bytes"],
        "steps": [(line["stage"], line["step"], line["loss_nats"], line["grad_norm"]) for line in store.steps()],
        "leftovers": [str(path) for path in store.folder.rglob(".*.tmp")],
    }
