"""DG-Hard: release the base plus what of training's change is no noise, by its singular values (arXiv 2605.20296)."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.method import Context, Weights
from clbench.methods import _merging as merging
from clbench.methods._averages import check_range


class DgHard(merging.Merging):
    """Cut the singular values of every matrix's change that noise explains; vectors keep their change.

    Kept is ``S > scale * omega(beta) * median(S) / mu(beta)``, the optimal hard threshold of Gavish & Donoho 2014. A
    change of low rank, such as a LoRA's, has no noise by this measure and is kept whole.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(merging.MergeOptions):
        """Options of DgHard."""

        scale: float = 1.0
        """Factor of the threshold; 0 keeps every change."""
        min_numel: int = 1024
        """Matrices with fewer weights keep their change."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check_range("dg_hard", "scale", self.options.scale, 0)
        check_range("dg_hard", "min_numel", self.options.min_numel, 1)

    def merge(self, ctx: Context, tuned: Weights, base: Weights) -> Weights:
        """Return the matrices with their changes cut."""
        from clbench.merge import kernels

        large = [name for name, w in tuned.items() if w.ndim == 2 and w.numel() >= self.options.min_numel]
        # A thin SVD of an [m, n] matrix, m <= n, with both sides of vectors: about 14 m^2 n + 8 m^3 (Golub & Van Loan).
        sides = [sorted(tuned[name].shape) for name in large]
        ctx.bill("merge", flops=sum(14.0 * m * m * n + 8.0 * m**3 for m, n in sides))
        options = self.options
        return {
            name: kernels.dg_hard(tuned[name], base[name], scale=options.scale, min_numel=options.min_numel)
            for name in large
        }
