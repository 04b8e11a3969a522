"""Golden numbers: a change either keeps them or replaces them on purpose and says so in the changelog.

    python -m tests.train.test_golden > tests/train/golden.json      replaces them

Digests and counts are compared for equality, floats to TOLERANCES: ten times what they moved with other kernels
(ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2), which stand in for another processor.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from clbench.results.matrix import matrix_of
from tests.engine import run_tiny

TOLERANCES = {"train_loss_nats": 1e-4, "grad_norm": 1e-3, "matrix_nats_per_token": 1e-4}
GOLDEN = Path(__file__).with_name("golden.json")


def found(folder: Path) -> dict[str, Any]:
    """Run the tiny track and return what must not change by accident."""
    numbers: dict[str, Any] = {}
    for spec in ("sequential", "replay:fraction=1/2"):
        store = run_tiny(folder, [spec])
        numbers["stream_sha256"] = store.config()["track"]["stream_sha256"]
        numbers[spec] = {
            "tokens": store.ledger()["tokens"],
            "flops": store.ledger()["flops"],
            "train_loss_nats": [round(line["loss_nats"], 6) for line in store.steps()],
            "grad_norm": [round(line["grad_norm"], 6) for line in store.steps()],
            "matrix_nats_per_token": matrix_of(store).values.round(6).tolist(),
        }
    return numbers


def test_numbers_are_those_of_the_golden_file(tmp_path: Path) -> None:
    golden, now = json.loads(GOLDEN.read_text(encoding="utf-8")), found(tmp_path)
    assert now["stream_sha256"] == golden["stream_sha256"]
    for spec in ("sequential", "replay:fraction=1/2"):
        assert now[spec]["tokens"] == golden[spec]["tokens"]
        assert now[spec]["flops"] == golden[spec]["flops"]
        for name, atol in TOLERANCES.items():
            np.testing.assert_allclose(now[spec][name], golden[spec][name], rtol=0, atol=atol, err_msg=f"{spec} {name}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sys.stdout.write(json.dumps(found(Path(place)), indent=1) + "\n")
