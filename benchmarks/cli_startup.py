"""How long `clbench --help` takes from a cold interpreter, and which of its imports cost most.

    .venv/bin/python benchmarks/cli_startup.py [--runs 15] [--command "list"]

Prints the median, best and worst wall time, and the slowest imports of one run. The aim for `--help`
is under 0.6 s on two cores. A test holds what may not be imported; time is measured only here: on a busy
machine a test of it would lie.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import time

START = "from clbench.cli import main; main()"


def seconds_of(words: list[str]) -> float:
    """Wall time of one start in a fresh interpreter, output thrown away."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", START, *words], check=True, capture_output=True)
    return time.perf_counter() - begun


def slowest_imports(words: list[str], n: int) -> list[tuple[float, str]]:
    """(cumulative milliseconds, module) of the n imports that cost most, by Python's own count."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", START, *words], check=True, capture_output=True, text=True
    )
    rows = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)$", done.stderr, re.MULTILINE)
    return sorted(((int(us) / 1e3, name) for us, name in rows), reverse=True)[:n]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=15, help="measured starts, after one that warms the disk cache")
    parser.add_argument("--command", default="--help", help="what to give to clbench")
    options = parser.parse_args()
    words = shlex.split(options.command)
    seconds_of(words)
    times = [seconds_of(words) for _ in range(options.runs)]
    print(
        f"clbench {options.command}: median {statistics.median(times):.3f} s, "
        f"best {min(times):.3f} s, worst {max(times):.3f} s of {options.runs}"
    )
    for milliseconds, name in slowest_imports(words, 12):
        print(f"  {milliseconds:8.1f} ms  {name}")


if __name__ == "__main__":
    main()
