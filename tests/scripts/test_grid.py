"""Runs of ``benchmarks.grid --fork``: exit codes, output and signals as of a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In a process of its own: pytest has threads, and what has threads must not fork.
DRIVER = """
import sys, tempfile
from benchmarks.grid import Forked
codes, texts = [], []
for words in (["--version"], ["run", "--track", "no-such-track", "--method", "sequential"]):
    with tempfile.TemporaryFile() as file:
        forked = Forked(words, file.fileno())
        codes.append(forked.wait())
        assert forked.poll() == codes[-1]
        file.seek(0)
        texts.append(file.read().decode())
print(codes)
print(texts[0].strip())
print(texts[1].strip())
"""


def test_a_forked_run_has_the_exit_code_and_the_output_of_the_command() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    codes, version, error = done.stdout.strip().splitlines()[:3]
    assert codes == "[0, 2]"
    assert version.startswith("clbench ")
    assert "unknown track 'no-such-track'" in error
