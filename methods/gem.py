"""GEM: a step may not raise the loss on any past stage, to first order; one constraint a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clbench.errors import ConfigError
from clbench.method import Context
from clbench.methods._memory import add, gradient, local_gradients, reached, some
from clbench.methods._opposed import Opposed
from clbench.methods._projection import cosine, gram, nearest


class Gem(Opposed):
    """Train on the z nearest to g with ``G z >= 0`` (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, equations 8 to 11).

    A row of G is the gradient of the mean loss on ``rows`` rows of one past stage's memory, drawn anew each step. Only
    where some constraint is violated is anything done. With one past stage, margin 0 and ridge 0 this is A-GEM.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Opposed.Options):
        """Options of gem."""

        rows: int = 4
        """Rows of each past stage a step."""
        margin: float = 0.5
        """Least weight of every memory gradient where a constraint is violated (the authors' 0.5); 0: nearest z."""
        ridge: float = 1e-3
        """Added to the quadratic's diagonal, in units of the memory gradients' mean squared norm."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        o = self.options
        if not all(math.isfinite(value) and value >= 0 for value in (o.margin, o.ridge)):
            raise ConfigError(f"gem:margin={o.margin},ridge={o.ridge}", mend="give numbers of at least 0")

    def edit_gradients(self, ctx: Context) -> None:
        """Move the gradient to the nearest one that raises no past stage's loss."""
        o, parameters = self.options, reached(ctx)
        g, memories = local_gradients(parameters), []
        for stage, rows in self.memory.of(ctx).items():
            rows = rows[some(len(rows), o.rows, ctx.seed("rows", stage)).to(ctx.device)]
            memories.append(gradient(ctx, parameters, rows, micro_rows=o.micro_rows, purpose="memory_gradient")[0])
        if not memories:
            return
        dots = ctx.all_reduce(gram([g, *memories])).cpu().numpy()
        violated = bool((dots[0, 1:] < 0).any())
        cosines = [cosine(dots, 0, i) for i in range(1, len(dots))]
        self.opposition.count(sum(cosines) / len(cosines), violated=violated)
        if violated:
            for weight, memory in zip(
                nearest(dots[1:, 1:], dots[0, 1:], margin=o.margin, ridge=o.ridge), memories, strict=True
            ):
                add(g, memory, float(weight))
