"""The bill of a run: tokens by source stage, FLOPs by purpose, seconds, peak memory, bytes kept.

Two methods at the same token count can differ several times in work; nothing a method does beyond the ordinary step
is free. Counts are exact and survive a resume; seconds and memory are measured.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from clbench.files import digest_of
from clbench.method import StagePlan

BY_STAGE = ("steps", "rows", "learning_rate_sum")
"""What is billed once per optimizer step; arms of an experiment are compared by it, see clbench.results.arms."""


def forward_flops(*, n_matmul_parameters: int, n_layers: int, width: int, n_tokens: int, length: int) -> float:
    """Return the FLOPs of one forward pass: ``tokens (2 N + 2 layers length width)``.

    N counts the weights of matrix products, the output head included, the embedding look-up not. A causal token
    attends to length/2 others on average, at 2 multiply-adds (scores and values) of ``width`` each. A backward pass
    costs twice as much (Kaplan et al. 2020, section 2.1; attention added).
    """
    return float(n_tokens) * (2.0 * n_matmul_parameters + 2.0 * n_layers * length * width)


@dataclass
class Ledger:
    """The running bill; ``as_dict`` is what stands in ``ledger.json``."""

    tokens: dict[int, dict[int, int]] = field(default_factory=dict)
    """Trained stage -> source stage -> target tokens."""
    steps: dict[int, int] = field(default_factory=dict)
    """Trained stage -> optimizer steps."""
    rows: dict[int, int] = field(default_factory=dict)
    """Trained stage -> sequences; one document a row, they are documents."""
    learning_rate_sum: dict[int, float] = field(default_factory=dict)
    """Trained stage -> learning rates of its steps, added one after another."""
    extra_tokens: dict[str, int] = field(default_factory=dict)
    """Purpose -> tokens seen outside the ordinary step."""
    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Matrix row -> flops and seconds of measuring it; flops are those of a fresh measurement, cached or not."""
    peak_memory_bytes: int = 0
    stored_bytes: dict[str, int] = field(default_factory=dict)
    plans: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Trained stage -> what was drawn from since which step, where it was not the new stage alone (``note_plan``)."""
    notes: dict[int, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    """Trained stage -> method -> figures that it noted about itself; they explain a result and cost nothing."""

    def note_plan(self, stage: int, step: int, plan: StagePlan) -> None:
        """Write down what rows of a stage are drawn from, from a step on.

        Not written: all rows of the new stage alone, without exclusions, for good.
        """
        mixture, pools, documents = plan.mixture or {stage: 1.0}, plan.pools or {}, sorted(plan.excluded)
        if plan.review_steps or pools or documents or dict(mixture) != {stage: 1.0}:
            entry: dict[str, Any] = {"step": step, "mixture": {str(i): share for i, share in sorted(mixture.items())}}
            if pools:
                entry["pools"] = {str(i): n for i, n in sorted(pools.items())}
            if documents:
                entry |= {"n_excluded": len(documents), "excluded_sha256": digest_of(documents)}
            self.plans.setdefault(stage, []).append(entry)

    def note_figure(self, stage: int, method: str, name: str, value: float) -> None:
        """Write down what a method says about itself in a stage; the last value counts, an undefined one is None."""
        noted = self.notes.setdefault(stage, {}).setdefault(method, {})
        noted[name] = float(value) if math.isfinite(value) else None

    def bill_tokens(self, stage: int, by_source: dict[int, int]) -> None:
        """Add the target tokens of one batch."""
        row = self.tokens.setdefault(stage, {})
        for source, n in by_source.items():
            row[source] = row.get(source, 0) + n

    def bill_step(self, stage: int, n_rows: int, learning_rate: float) -> None:
        """Add one optimizer step."""
        self.steps[stage] = self.steps.get(stage, 0) + 1
        self.rows[stage] = self.rows.get(stage, 0) + n_rows
        self.learning_rate_sum[stage] = self.learning_rate_sum.get(stage, 0.0) + learning_rate

    def bill_flops(self, purpose: str, flops: float, n_tokens: int = 0) -> None:
        """Add work under a purpose; tokens only for work outside the ordinary step."""
        self.flops[purpose] = self.flops.get(purpose, 0.0) + flops
        if n_tokens:
            self.extra_tokens[purpose] = self.extra_tokens.get(purpose, 0) + n_tokens

    @contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        """Add the wall-clock seconds of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - start

    def note_memory(self, accelerator_bytes: int = 0) -> None:
        """Raise the peak to this process's resident memory, or to the accelerator's allocation where there is one."""
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.peak_memory_bytes = max(self.peak_memory_bytes, accelerator_bytes or resident)

    def as_dict(self) -> dict[str, Any]:
        """Return the bill with JSON keys; evaluation is summed into ``flops`` and ``seconds``."""
        evaluated = {part: sum(cost[part] for cost in self.evaluations.values()) for part in ("flops", "seconds")}
        return {
            "tokens": {str(k): {str(s): n for s, n in sorted(row.items())} for k, row in sorted(self.tokens.items())},
            **{name: {str(k): n for k, n in sorted(getattr(self, name).items())} for name in BY_STAGE},
            "extra_tokens": dict(sorted(self.extra_tokens.items())),
            "flops": {**dict(sorted(self.flops.items())), "evaluate": evaluated["flops"]},
            "seconds": {**dict(sorted(self.seconds.items())), "evaluate": evaluated["seconds"]},
            "evaluations": {str(k): cost for k, cost in sorted(self.evaluations.items())},
            "peak_memory_bytes": self.peak_memory_bytes,
            "stored_bytes": dict(sorted(self.stored_bytes.items())),
            **({"plans": {str(k): plans for k, plans in sorted(self.plans.items())}} if self.plans else {}),
            **({"notes": {str(k): notes for k, notes in sorted(self.notes.items())}} if self.notes else {}),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Ledger:
        """Return the bill that ``as_dict`` wrote."""
        return cls(
            tokens={int(k): {int(s): n for s, n in row.items()} for k, row in value["tokens"].items()},
            # Runs begun before these were counted have none of them.
            **{name: {int(k): n for k, n in value.get(name, {}).items()} for name in BY_STAGE},
            extra_tokens=dict(value["extra_tokens"]),
            flops={k: v for k, v in value["flops"].items() if k != "evaluate"},
            seconds={k: v for k, v in value["seconds"].items() if k != "evaluate"},
            evaluations={int(k): dict(cost) for k, cost in value["evaluations"].items()},
            peak_memory_bytes=value["peak_memory_bytes"],
            stored_bytes=dict(value["stored_bytes"]),
            plans={int(k): list(plans) for k, plans in value.get("plans", {}).items()},
            notes={int(k): {m: dict(own) for m, own in notes.items()} for k, notes in value.get("notes", {}).items()},
        )
