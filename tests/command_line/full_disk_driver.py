"""A run on a disk that is really full, then on a larger one, then on one that is read-only; prints JSON.

Runs as its own process inside a mount namespace of its own (``unshare --mount``), so that nothing else sees the disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from clbench.results.store import RunStore
from clbench.train import checkpoint
from tests.command_line.driver import Outcome, clbench, results_of


def mount(folder: Path, options: str) -> None:
    """Mount a memory disk, or change it (``remount``)."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def run(track: str, out: Path) -> Outcome:
    """Run ``sequential`` with a checkpoint after every step."""
    return clbench("run", "-m", "sequential", "-t", track, "-o", out, "--mlflow", "none", "--checkpoint-seconds", 0)


def main(track: str, folder: Path) -> None:
    """Fill the disk at several sizes, so that it ends at several places."""
    torch.set_num_threads(1)
    disk, plain = folder / "disk", folder / "plain"
    disk.mkdir()
    found: dict[str, Any] = {"whole": run(track, plain).code, "sizes": {}}
    store = RunStore(disk / "tiny" / "sequential" / "seed-0")
    for kib in (40, 200, 700, 1500):
        mount(disk, f"size={kib}k")
        full = run(track, disk)
        saved = checkpoint.saved(store.folder / "checkpoints")
        for path in saved:
            checkpoint.load(path)  # raises where one is damaged
        mount(disk, "remount,size=64m")
        again = run(track, disk)
        found["sizes"][kib] = {
            "code": full.code,
            "error": full.error if full.code else "",
            "n_saved": len(saved),
            "code_again": again.code,
            "warnings": again.err,
            "equal": results_of(store) == results_of(RunStore(plain / "tiny" / "sequential" / "seed-0")),
        }
        subprocess.run(["umount", str(disk)], check=True)
    mount(disk, "ro")
    forbidden = run(track, disk)
    found["read_only"] = {"code": forbidden.code, "error": forbidden.error}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
