"""A-GEM: a step may not raise the loss on past text, to first order; its gradient is projected where it would."""

from __future__ import annotations

from clbench.method import Context
from clbench.methods._memory import Rows, add, gradient, local_gradients, reached, some
from clbench.methods._opposed import Opposed
from clbench.methods._projection import cosine, gram


class Agem(Opposed):
    """Where ``g.r < 0``, train on ``g - (g.r / |r|^2) r`` (Chaudhry et al. 2019, arXiv 1812.00420, equation 11).

    g is the gradient of the step, r the gradient of the mean loss on ``rows`` rows of all past stages' memories
    together, drawn anew each step. The condition is on gradients: AdamW's step is not along z, nor is it clipped.
    """

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
