"""SPEAR-MM: put the layers that training changed most for their worth back towards the base (arXiv 2511.08500).

A reconstruction, see docs/spear-mm.md: the paper's formulas and figures could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clbench.method import Context, Weights
from clbench.methods import _merging as merging
from clbench.methods._averages import check_choice, check_range

NEED_SPECTRA = ("spear", "swci", "svdr", "bottom")


class SpearMm(merging.Merging):
    """Score the layers by spectra and drift, restore the top share q of them with strength s, release that.

    Score of a matrix: ``mix * rank(SNR * drift) + (1 - mix) * rank(singular value drop)``, ranks within its module
    type; of a layer their mean by parameters. ``choose`` has the controls without which a result proves nothing.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(merging.MergeOptions):
        """Options of SpearMm."""

        policy: Literal["conservative", "balanced", "aggressive", "free"] = "balanced"
        """q, s: conservative 0.5, 1 (nearest to the base); balanced 0.3, 0.7; aggressive 0.15, 0.5; free: give both."""
        q: float | None = None
        """Share of the blocks' parameters that is restored, instead of the policy's."""
        s: float | None = None
        """How far they are restored, from 0 (trained) to 1 (base), instead of the policy's."""
        choose: str = "spear"
        """Which first: spear, a part (swci, svdr, drift), or a control (bottom, random, first, last, uniform,
        checkfree).

        checkfree takes the blocks around those of spear in the place of the base.
        """
        mix: float = 0.5
        """Share of SWCI in the score; the rest is SVDR."""
        snr: Literal["calibrated", "spectrum"] = "calibrated"
        """calibrated: energy above the edge of noise over that below; spectrum: Spectrum's formula as it stands."""
        svdr: Literal["drop", "abs"] = "drop"
        """drop: a sum of singular values that grew counts 0; abs: the size of its change counts."""
        granularity: Literal["layer", "module", "tensor"] = "layer"
        """What is restored as one: a block, its attention or feed-forward part, or a single matrix with its bias."""
        interp: Literal["slerp", "lerp"] = "slerp"
        """How matrices are restored; vectors go straight."""
        embeddings: bool = False
        """Restore embeddings, last norm and output layer, too."""
        draw: int = 0
        """random: which draw."""

    def __init__(self, options: Options | None = None) -> None:
        from clbench.merge import select

        super().__init__(options)
        self.policy = select.policy_of(self.options.policy, self.options.q, self.options.s)
        check_choice("spear_mm", "choose", self.options.choose, (*select.CHOICES, "uniform", "checkfree"))
        check_range("spear_mm", "mix", self.options.mix, 0, 1)

    def merge(self, ctx: Context, tuned: Weights, base: Weights) -> Weights:
        """Return the restored tensors; note every layer's strength and score."""
        from clbench.merge import scores, select

        options, by = self.options, self.options.choose
        by = "spear" if by in ("uniform", "checkfree") else by
        # Spectra are computed at every release: what is billed must not depend on whether the run was resumed.
        scorer = scores.Scorer(snr=options.snr, svdr=options.svdr, spectral=by in NEED_SPECTRA)
        found = scorer.score((name, base[name], w1) for name, w1 in tuned.items())
        ctx.bill("merge", flops=scorer.spectra.flops)
        seed = ctx.seed("units", options.draw)
        order = select.order_units(found, by=by, granularity=options.granularity, mix=options.mix, seed=seed)
        names = [score.name for score in found]
        units = order.top(self.policy.q)
        strengths = select.strengths_of(names, units, self.policy.s, outside=options.embeddings)
        if options.choose == "uniform":
            moved = {score.name: score.moved for score in found}
            strengths = dict.fromkeys(names, select.equal_strength(moved, strengths))
        note(ctx, {score.name: score.n_parameters for score in found}, strengths)
        for unit, value in order.scores.items():
            ctx.note(f"score_{unit}", value)
        drops = [score.spectral.svdr > 0 for score in found if score.spectral is not None]
        if drops:  # where no spectrum has shrunk, half of the score says nothing
            ctx.note("svdr_above_0", sum(drops) / len(drops))
        if options.choose == "checkfree":
            return filled(tuned, [name for name in names if strengths[name]], self.policy.s)
        return merging.restored(tuned, base, strengths, options.interp)


def filled(tuned: Weights, lost: list[str], s: float) -> Weights:
    """Return tensors moved by s towards the mean of the nearest blocks that are kept (arXiv 2506.15461); base unused.

    Tensors outside the blocks have no neighbours and stay tuned.
    """
    from clbench.merge import kernels, scores, select

    found: Weights = {}
    for name, near in select.surviving_neighbours(tuned, lost).items():
        below, above = (
            tuned[scores.sibling(name, near[side])] if side in near else None for side in ("below", "above")
        )
        found[name] = kernels.neighbours(tuned[name], below, above, s=s)
    return found


def note(ctx: Context, sizes: dict[str, int], strengths: dict[str, float]) -> None:
    """Note which share of the parameters is restored, and every layer's mean strength."""
    from clbench.merge.scores import unit_of

    layers: dict[str, list[str]] = {}
    for name in sizes:
        if (layer := unit_of(name, "layer")) is not None:
            layers.setdefault(layer, []).append(name)
    ctx.note("restored_share", sum(n for name, n in sizes.items() if strengths[name]) / sum(sizes.values()))
    for layer, names in layers.items():
        mean = sum(strengths[name] * sizes[name] for name in names) / sum(sizes[name] for name in names)
        ctx.note(f"restored_{layer}", mean)
