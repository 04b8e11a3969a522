"""A-GEM: a step may not raise the loss on past text, to first order; its gradient is projected where it would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clbench.method import Context, Method, Need, Weights
from clbench.methods._memory import Memory, Rows, add, at_least, gradient, local_gradients, reached, some
from clbench.methods._projection import Opposition, cosine, gram


class Agem(Method):
    """Where ``g.r < 0``, train on ``g - (g.r / |r|^2) r`` (Chaudhry et al. 2019, arXiv 1812.00420, equation 11).

    g is the gradient of the step, r the gradient of the mean loss on ``rows`` rows of all past stages' memories
    together, drawn anew each step. The condition is on gradients: AdamW's step is not along z, nor is it clipped.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of agem."""

        rows: int = 8
        """Past rows a step."""
        memory_rows: int = 256
        """Rows kept of each past stage, drawn when a stage begins."""
        stage_0: bool = True
        """Whether the text that the base has seen is past text."""
        micro_rows: int = 8
        """Rows of one extra pass at most: memory against time."""

    needs = frozenset({Need.PAST_DATA, Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        o = self.options
        at_least("agem", 1, rows=o.rows, memory_rows=o.memory_rows, micro_rows=o.micro_rows)
        self.memory = Memory(o.memory_rows, stage_0=o.stage_0)
        self.opposition = Opposition()

    def begin_stage(self, ctx: Context) -> None:
        """Begin to count, and draw another memory."""
        self.memory.forget()
        self.opposition = Opposition()

    def edit_gradients(self, ctx: Context) -> None:
        """Project the gradient where it would raise the loss on the past rows."""
        past = self.memory.of(ctx)
        if not past:
            return
        pool = Rows.joined(list(past.values()))
        rows = pool[some(len(pool), self.options.rows, ctx.seed("rows")).to(ctx.device)]
        parameters = reached(ctx)
        g = local_gradients(parameters)
        r, _ = gradient(ctx, parameters, rows, micro_rows=self.options.micro_rows, purpose="memory_gradient")
        dots = ctx.all_reduce(gram([g, r])).cpu().numpy()
        violated = bool(dots[0, 1] < 0)
        self.opposition.count(cosine(dots, 0, 1), violated=violated)
        if violated:
            add(g, r, -dots[0, 1] / dots[1, 1])

    def end_stage(self, ctx: Context) -> None:
        """Note how often past and present were opposed."""
        self.opposition.note(ctx)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the counts; the memory is drawn again."""
        return {}, self.opposition.as_dict()

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.memory.forget()
        self.opposition = Opposition.from_dict(values)
