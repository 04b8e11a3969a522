"""LoRA: train low-rank adapters beside frozen weights, and ship them merged. Full fine-tuning stays the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clbench.method import Stage, StagePlan
from clbench.methods._adapters import Adapted, AdapterOptions


class Lora(Adapted):
    """Train ``(alpha/r) B A`` beside frozen weight matrices (Hu et al. 2021, arXiv 2106.09685).

    Embeddings, norms and the output layer are never trained.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(AdapterOptions):
        """Options of lora."""

        scope: Literal["run", "stage"] = "run"
        """run: one adapter for all stages. stage: each stage's is merged before the next, which begins a new one."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self.begins_anew = self.options.scope == "stage"

    def plan(self, stage: Stage) -> StagePlan:
        """Drop the optimizer's state where it is that of adapters that are gone."""
        return StagePlan(optimizer="reset" if self.begins_anew else None)
