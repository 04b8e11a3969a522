"""``clbench stream build`` on a disk that is really full at several places, then on a larger one; prints JSON.

Runs as its own process inside a mount namespace of its own (``unshare --mount``), so that nothing else sees the disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.command_line.driver import Outcome, clbench


def mount(folder: Path, options: str) -> None:
    """Mount a memory disk, or change it (``remount``); not the other driver's, which loads torch."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def build(path: str, home: Path) -> Outcome:
    """Build the stream in a cache folder of its own."""
    os.environ["CLBENCH_HOME"] = str(home)
    named = ("--text", "text", "--date", "date", "--name", "mine")
    return clbench("stream", "build", "--from", path, *named, "--vocab-size", 300, "--json")


def main(path: str, folder: Path) -> None:
    """Fill the disk at several sizes, so that it ends in the ingest and in the build."""
    disk = folder / "disk"
    disk.mkdir()
    whole = build(path, folder / "plain")
    found: dict[str, Any] = {"whole": whole.code, "sizes": {}}
    for kib in (100, 420):
        mount(disk, f"size={kib}k")
        full = build(path, disk)
        found["sizes"][kib] = {
            "code": full.code,
            "error": full.error if full.code else "",
            "ingested": bool(list(disk.glob("sources/*/manifest.json"))),
            "streams": [str(p) for p in disk.glob("streams/*/manifest.json")],
            "saved": [str(p) for p in disk.glob("specifications/*")],
        }
        mount(disk, "remount,size=64m")
        again = build(path, disk)
        equal = again.code == 0 and json.loads(again.out)["sha256"] == json.loads(whole.out)["sha256"]
        found["sizes"][kib] |= {"code_again": again.code, "equal": equal, "again": again.err[-500:]}
        subprocess.run(["umount", str(disk)], check=True)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
