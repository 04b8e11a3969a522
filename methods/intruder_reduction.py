"""Intruder reduction: shrink the leading directions of trained matrices that the base does not have (arXiv 2410.21228).

What PEFT's ``reduce_intruder_dimension`` does to a LoRA, here for full fine-tunes, too: of the leading left singular
vectors of a trained matrix those that resemble none of the base's are multiplied by ``factor``. No text is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Context, Weights
from clbench.methods import _merging as merging
from clbench.methods._averages import check_range


class IntruderReduction(merging.Merging):
    """Release the weights with their intruder dimensions made smaller; put it after ``lora`` where there is one.

    Matrices in the blocks alone: embeddings and output layer stay as they are, as with adapters.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(merging.MergeOptions):
        """Options of IntruderReduction."""

        factor: float = 0.75
        """What is left of an intruder: 1 removes nothing, 0 all of it. PEFT's mitigation_lambda, whose text has it
        the other way round."""
        top_k: int = 10
        """How many leading directions of each matrix are looked at."""
        epsilon: float = 0.5
        """A direction is an intruder where its largest |cosine| with those of the base is below this."""
        rank: int | None = None
        """With adapters: cut the changed update to this rank again, as PEFT does; give the adapter's own."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check_range("intruder_reduction", "factor", self.options.factor, 0, 1)
        check_range("intruder_reduction", "epsilon", self.options.epsilon, 0, 1)
        check_range("intruder_reduction", "top_k", self.options.top_k, 1)
        check_range("intruder_reduction", "rank", self.options.rank, 1)

    def merge(self, ctx: Context, tuned: Weights, base: Weights) -> Weights:
        """Return the matrices with less of their intruders; note how many there were."""
        import torch

        from clbench.merge import kernels
        from clbench.merge.scores import block_depth

        options, found, n_intruders, n_matrices = self.options, Weights(), 0, 0
        chosen = [name for name, w in tuned.items() if w.ndim == 2 and block_depth(name) is not None]
        moved = [name for name in chosen if not torch.equal(tuned[name], base[name])]
        # Two thin SVDs of an [m, n] matrix, m <= n, and a third where the rank is cut: 14 m^2 n + 8 m^3 each.
        n_svd = 2 if options.rank is None else 3
        sides = [sorted(tuned[name].shape) for name in moved]
        ctx.bill("merge", flops=n_svd * sum(14.0 * m * m * n + 8.0 * m**3 for m, n in sides))
        for name in moved:
            there, _ = kernels.intruders(tuned[name], base[name], top_k=options.top_k, epsilon=options.epsilon)
            n_intruders, n_matrices = n_intruders + len(there), n_matrices + bool(there)
            if there:
                found[name] = kernels.reduce_intruders(
                    tuned[name],
                    base[name],
                    factor=options.factor,
                    top_k=options.top_k,
                    epsilon=options.epsilon,
                    rank=options.rank,
                )
        ctx.note("intruders", n_intruders)
        ctx.note("matrices_with_intruders", n_matrices)
        return found
