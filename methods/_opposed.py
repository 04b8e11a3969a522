"""What A-GEM and GEM share: a memory of every past stage, and counts of how often it opposes the present.

What it leaves to others: what is done with the gradients (``agem``, ``gem``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clbench.method import Context, Method, Need, Weights
from clbench.methods._memory import Memory, at_least
from clbench.methods._projection import Opposition


class Opposed(Method):
    """A method that keeps the gradient from opposing that of past text."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of the memory."""

        rows: int = 8
        """Past rows a step."""
        memory_rows: int = 256
        """Rows kept of each past stage, drawn when a stage begins."""
        stage_0: bool = True
        """Whether the text that the base has seen is past text."""
        micro_rows: int = 8
        """Rows of one extra pass at most: memory against time."""

    needs = frozenset({Need.PAST_DATA, Need.STAGE_BOUNDARIES})

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        o = self.options
        at_least(type(self).__name__.lower(), 1, rows=o.rows, memory_rows=o.memory_rows, micro_rows=o.micro_rows)
        self.memory = Memory(o.memory_rows, stage_0=o.stage_0)
        self.opposition = Opposition()

    def begin_stage(self, ctx: Context) -> None:
        """Begin to count, and draw another memory."""
        self.memory.forget()
        self.opposition = Opposition()

    def end_stage(self, ctx: Context) -> None:
        """Note how often past and present were opposed; the cosine is the mean over constraints."""
        self.opposition.note(ctx)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the counts; the memory is drawn again."""
        return {}, self.opposition.as_dict()

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.memory.forget()
        self.opposition = Opposition.from_dict(values)
