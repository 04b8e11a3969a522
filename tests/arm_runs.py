"""Run folders of arms whose losses and exposure are known, without training: for tests of ``clbench.results.arms``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clbench.files import digest_of
from clbench.results.store import ROWS_SCHEMA, RunStore, StageRecord
from clbench.seeds import generator

N_DOCUMENTS = 30
"""Held-out documents a period and group."""
BILL: dict[str, Any] = {
    "tokens": {"1": {"1": 1000}},
    "steps": {"1": 10},
    "rows": {"1": 160},
    "learning_rate_sum": {"1": 0.05},
}


def write_arm(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    loss: Mapping[str, float],
    base: Mapping[str, float],
    bill: Mapping[str, Any] | None = None,
    base_sha256: str = "b" * 64,
    noise: float = 0.0,
    drop: int = 0,
    state: str = "done",
    training: Mapping[str, Any] | None = None,
) -> RunStore:
    """Write a run of one trained stage.

    Args:
        folder: of the run.
        name: of its track.
        seed: of the run.
        loss: group -> nats per token after stage 1.
        base: group -> nats per token of the base.
        bill: what of BILL is another.
        base_sha256: digest of the base.
        noise: standard deviation between documents, the same for row 0 and row 1 and for all runs.
        drop: documents left out of each group.
        state: of the run.
        training: settings in run.yaml.
    """
    store = RunStore(folder)
    track = {
        "name": name,
        "stream": f"stream-{name}",
        "stream_sha256": digest_of(name),
        "sha256": digest_of(["t", name]),
    }
    store.write_config(
        {
            "run_id": digest_of([name, seed]),
            "track": track,
            "stages": [{"index": 0}, {"index": 1}],
            "method": {"label": "sequential", "components": []},
            "seed": seed,
            "base": {"weights_sha256": base_sha256},
            "training": {"learning_rate": 0.01, "batching": "packed", **(training or {})},
        }
    )
    for row, losses in enumerate((base, loss)):
        store.write_rows("heldout", row, _rows(losses, noise, drop))
        record: StageRecord = {"stage": row, "weights_sha256": "", "cells": {}, "finished": "", "n_steps": 10 * row}
        store.write_stage_record(record)
    ledger = {**BILL, **(bill or {})}
    store.write_ledger({key: value for key, value in ledger.items() if value is not None})
    store.write_status(state)
    return store


def _rows(losses: Mapping[str, float], noise: float, drop: int) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in ROWS_SCHEMA.names}
    for period in (0, 1):
        for group, level in losses.items():
            rng = generator("arm_runs", group, period)
            n_tokens = rng.integers(10, 90, N_DOCUMENTS)
            values = (level + noise * rng.standard_normal(N_DOCUMENTS)) * n_tokens
            for i in range(drop, N_DOCUMENTS):
                columns["item"].append(f"{group}/{period}-{i}")
                columns["stage"].append(period)
                columns["metric"].append("nll_nats")
                columns["value"].append(float(values[i]))
                columns["n_tokens"].append(int(n_tokens[i]))
                columns["n_bytes"].append(4 * int(n_tokens[i]))
                columns["group"].append(group)
                columns["change"].append("new")
    return pa.table({name: np.array(values) for name, values in columns.items()}, schema=ROWS_SCHEMA)
