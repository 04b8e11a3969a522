"""Merging kernels: pure functions on single tensors.

``w1`` is the tuned tensor, ``w0`` the base's, ``d = w1 - w0``. Arithmetic is fp32 (float64 where an input is), with one
cast to the type of ``w1`` at the end; inputs are never changed. ``s`` in [0, 1] is the restoration strength: 0 gives
``w1`` and 1 gives ``w0``, both by copy. Written from the formulas of the papers named. Which tensor gets which kernel
is ``plan``'s business, reading and writing are ``tensors``' and ``execute``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import torch

from clbench.errors import ConfigError

COLLINEAR = 0.9995
"""SLERP is LERP where |cos| is larger, as in mergekit: at angles below 0.0316 rad, or that near to pi."""
BLOCK = 1 << 15
"""Elements worked on at a time on a CPU: they stay in its cache, and torch starts no threads for so few."""
DEVICE_BLOCK = 1 << 26


def working_type(*tensors: torch.Tensor) -> torch.dtype:
    """Return float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def blocks(w1: torch.Tensor, w0: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (where, part of w1, part of w0) of the flattened tensors, in the working type."""
    work, step = working_type(w1, w0), BLOCK if w1.device.type == "cpu" else DEVICE_BLOCK
    flat_1, flat_0 = w1.reshape(-1), w0.reshape(-1)
    for start in range(0, w1.numel(), step):
        where = slice(start, start + step)
        yield where, flat_1[where].to(work), flat_0[where].to(work)


def delta(w1: torch.Tensor, w0: torch.Tensor) -> torch.Tensor:
    """Return w1 - w0 in the working type."""
    work = working_type(w1, w0)
    return w1.to(work) - w0.to(work)


def _added(w0: torch.Tensor, change: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (w0.to(change.dtype) + change).to(like.dtype)


def _copied(source: torch.Tensor, like: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return (torch.empty_like(like, memory_format=torch.contiguous_format) if out is None else out).copy_(source)


def _in_unit(name: str, value: float, *, extrapolate: bool = False) -> None:
    if not math.isfinite(value) or not (extrapolate or 0 <= value <= 1):
        raise ConfigError(f"{name}={value} is out of range", mend="give a number from 0 to 1")


# --- two points -------------------------------------------------------------------------------------------------------


def lerp(
    w1: torch.Tensor, w0: torch.Tensor, s: float, *, extrapolate: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return (1 - s) w1 + s w0: WiSE-FT (arXiv 2109.01903) with alpha = 1 - s.

    Args:
        w1: tuned.
        w0: base.
        s: restoration strength.
        extrapolate: allow s outside [0, 1].
        out: a contiguous tensor like w1 to write to.
    """
    _in_unit("s", s, extrapolate=extrapolate)
    if s in (0, 1):
        return _copied(w0 if s else w1, w1, out)
    return _by_blocks(w1, w0, lambda x, y: torch.lerp(x, y, s), out)  # exact where w1 is w0


def slerp(
    w1: torch.Tensor, w0: torch.Tensor, s: float, *, extrapolate: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return sin((1-s) a)/sin a * w1 + sin(s a)/sin a * w0, where a is the angle between the flattened tensors.

    LERP instead where |cos a| > 0.9995 (nearly the same or nearly opposite direction) and where either tensor is
    zero; so on most continued pretraining SLERP is LERP. Arguments as in ``lerp``.
    """
    _in_unit("s", s, extrapolate=extrapolate)
    if s in (0, 1):
        return _copied(w0 if s else w1, w1, out)
    cos = cosine(w1, w0)
    if not abs(cos) <= COLLINEAR:  # NaN, too
        return lerp(w1, w0, s, extrapolate=extrapolate, out=out)
    angle = math.acos(cos)
    a, b = math.sin((1 - s) * angle) / math.sin(angle), math.sin(s * angle) / math.sin(angle)
    return _by_blocks(w1, w0, lambda x, y: torch.add(x * a, y, alpha=b), out)


def _by_blocks(
    w1: torch.Tensor,
    w0: torch.Tensor,
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Return what ``combine`` makes of each block; it must not change them, they may be parts of the inputs."""
    result = torch.empty_like(w1, memory_format=torch.contiguous_format) if out is None else out
    flat = result.reshape(-1)
    for where, x, y in blocks(w1, w0):
        flat[where] = combine(x, y)
    return result


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the cosine between two flattened tensors, NaN if either is zero; sums of blocks in float64."""
    dot = aa = bb = 0.0
    for _, x, y in blocks(a, b):
        dot, aa, bb = dot + float(torch.dot(x, y)), aa + float(torch.dot(x, x)), bb + float(torch.dot(y, y))
    return dot / math.sqrt(aa) / math.sqrt(bb) if aa > 0 and bb > 0 else math.nan


# --- one task vector: change d and add it to the base again -----------------------------------------------------------


def task_arithmetic(
    w1: torch.Tensor, w0: torch.Tensor, others: Sequence[torch.Tensor] = (), *, weights: Sequence[float]
) -> torch.Tensor:
    """Return w0 + sum_i weight_i d_i (arXiv 2212.04089); one model with weight 1 - s is ``lerp``.

    Args:
        w1: tuned.
        w0: base.
        others: other models that started from the base.
        weights: of w1 and the others.
    """
    terms = [weight * delta(one, w0) for one, weight in zip((w1, *others), weights, strict=True)]
    return _added(w0, sum(terms[1:], terms[0]), w1)


def nuslerp(w1: torch.Tensor, w0: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    """Return w0 + SLERP(d_1, d_other; t): the curved path between task vectors; t = 0 gives w1, t = 1 the other.

    Flattened; falls back to LERP where ``slerp`` does.
    """
    _in_unit("t", t)
    if t in (0, 1):
        return _copied(other if t else w1, w1, None)
    return _added(w0, slerp(delta(w1, w0), delta(other, w0), t), w1)


def keep_top(magnitude: torch.Tensor, n: int) -> torch.Tensor:
    """Return a mask of exactly the n largest entries; of equal ones the first in memory order."""
    total, flat = magnitude.numel(), magnitude.reshape(-1)
    if n <= 0 or n >= total:
        return torch.full_like(magnitude, n > 0, dtype=torch.bool)
    bound = torch.kthvalue(flat, total - n + 1).values
    mask = flat > bound
    missing = n - int(mask.sum())
    mask[(flat == bound).nonzero()[:missing, 0]] = True
    return mask.reshape(magnitude.shape)


def n_kept(density: float, n: int) -> int:
    """Return how many of n entries a density keeps: rounded down, at least one unless it is 0."""
    _in_unit("density", density)
    return max(1, int(density * n)) if density > 0 and n else 0


def trim(change: torch.Tensor, density: float) -> torch.Tensor:
    """Return a task vector with all but its largest entries set to 0."""
    kept = n_kept(density, change.numel())
    return change if kept >= change.numel() else change * keep_top(change.abs(), kept)


def ties(
    w1: torch.Tensor,
    w0: torch.Tensor,
    others: Sequence[torch.Tensor] = (),
    *,
    density: float,
    weights: Sequence[float] = (1.0,),
    scale: float = 1.0,
    normalize: bool = True,
) -> torch.Tensor:
    """Return TIES (arXiv 2306.01708): trim, elect the sign of the weighted sum (0 is +), average what agrees.

    With one model the election does nothing and ``normalize`` cancels its weight: w0 + scale * trim(d).

    Args:
        w1: tuned.
        w0: base.
        others: other models that started from the base.
        density: the share of each task vector that is kept.
        weights: of w1 and the others.
        scale: lambda.
        normalize: divide by the weights that agree at an entry.
    """
    if len(weights) != 1 + len(others):
        raise ConfigError(f"ties has {len(weights)} weights for {1 + len(others)} models", mend="give one a model")
    if not others and density == scale == 1 and (normalize or weights[0] == 1) and weights[0] != 0:
        return w1.clone()
    total = torch.zeros_like(w0, dtype=working_type(w1, w0, *others))
    for term, _ in _trimmed(w1, w0, others, density, weights):
        total += term
    positive, total, share = total >= 0, torch.zeros_like(total), torch.zeros_like(total)
    for term, weight in _trimmed(w1, w0, others, density, weights):
        agrees = (term != 0) & ((term > 0) == positive)
        total += term * agrees
        share += weight * agrees
    if normalize:
        total /= torch.where(share.abs() < 1e-8, 1.0, share)
    return _added(w0, scale * total, w1)


def _trimmed(
    w1: torch.Tensor, w0: torch.Tensor, others: Sequence[torch.Tensor], density: float, weights: Sequence[float]
) -> Iterator[tuple[torch.Tensor, float]]:
    for one, weight in zip((w1, *others), weights, strict=True):
        yield weight * trim(delta(one, w0), density), weight


def dare(w1: torch.Tensor, w0: torch.Tensor, *, density: float, seed: int, rescale: str = "inverse") -> torch.Tensor:
    """Return w0 + m d / density with a random mask m that keeps an entry with that probability (arXiv 2311.03099).

    Its mean over seeds is w1.

    Args:
        w1: tuned.
        w0: base.
        density: probability that an entry is kept; the paper's drop rate is 1 - density.
        seed: of the mask, which is drawn on the CPU and so is the same on every device.
        rescale: ``inverse`` (1/density), ``l1`` (keeps sum |d|, as mergekit does) or ``none``.
    """
    _in_unit("density", density)
    if rescale not in ("inverse", "l1", "none"):
        raise ConfigError(f"rescale={rescale!r} is unknown", mend="give inverse, l1 or none")
    if density == 1:
        return w1.clone()
    change = delta(w1, w0)
    drawn = torch.rand(change.shape, generator=torch.Generator().manual_seed(seed))
    kept = change * (drawn < density).to(change.device)
    before, after = float(change.abs().sum()), float(kept.abs().sum())
    factors = {"none": 1.0, "inverse": 1 / density if density else 0.0, "l1": before / after if after else 1.0}
    return _added(w0, kept * factors[rescale], w1)


def breadcrumbs(w1: torch.Tensor, w0: torch.Tensor, *, density: float, gamma: float = 0.01) -> torch.Tensor:
    """Return w0 + d without its largest entries and without the smallest (arXiv 2312.06795).

    The largest gamma are dropped first, then the smallest until the density remains; gamma gives way where both do
    not fit. Nothing is rescaled. A tensor so small that gamma is less than one entry loses no large one.
    """
    _in_unit("gamma", gamma)
    change = delta(w1, w0)
    total = change.numel()
    kept = n_kept(density, total)
    if kept >= total:
        return w1.clone()
    top = min(int(gamma * total), total - kept)
    magnitude = change.abs()
    mask = keep_top(magnitude, top + kept) & ~keep_top(magnitude, top)
    return _added(w0, change * mask, w1)


# --- several experts --------------------------------------------------------------------------------------------------


def model_stock(
    w1: torch.Tensor, w0: torch.Tensor, others: Sequence[torch.Tensor], *, scale: float = 1.0
) -> torch.Tensor:
    """Return w0 + scale t (mean(w_i) - w0), t = N c / (1 + (N-1) c) (arXiv 2403.19522; there the scale is 1).

    c is the mean cosine between the N task vectors. t is 0 for orthogonal and 1 for parallel ones. Where it has no
    value (zero vectors, c = -1/(N-1)): the base.
    """
    if not others:
        raise ConfigError("model stock needs at least two tuned models", mend="give another model, or use lerp")
    changes = [delta(one, w0) for one in (w1, *others)]
    n = len(changes)
    cosines = [cosine(changes[i], changes[j]) for i in range(n) for j in range(i)]
    c = math.fsum(cosines) / len(cosines)
    bottom = 1 + (n - 1) * c
    if math.isnan(c) or abs(bottom) < 1e-6:
        return w0.to(w1.dtype, copy=True)
    return _added(w0, sum(changes[1:], changes[0]) * (scale * c / bottom), w1)


def mean(
    w1: torch.Tensor, w0: torch.Tensor, others: Sequence[torch.Tensor] = (), *, shares: Sequence[float]
) -> torch.Tensor:
    """Return the weighted mean of base, tuned and other models, summed in float64: soups, and learned shares.

    A model that has all of the weight comes back by copy.

    Args:
        w1: tuned.
        w0: base.
        others: other models.
        shares: of w0, w1 and the others; not negative, in any unit.
    """
    models = (w0, w1, *others)
    if len(shares) != len(models) or not all(math.isfinite(one) and one >= 0 for one in shares) or sum(shares) <= 0:
        raise ConfigError(f"shares={list(shares)} for {len(models)} models", mend="give base, tuned and each other one")
    chosen = [(model, share) for model, share in zip(models, shares, strict=True) if share > 0]
    if len(chosen) == 1:
        return chosen[0][0].to(w1.dtype, copy=True)
    total = math.fsum(share for _, share in chosen)
    summed = torch.zeros_like(w1, dtype=torch.float64)
    for model, share in chosen:
        summed.add_(model.double(), alpha=share / total)
    return summed.to(w1.dtype)


# --- no base at all -----------------------------------------------------------------------------------------------


def neighbours(
    w1: torch.Tensor,
    below: torch.Tensor | None,
    above: torch.Tensor | None,
    *,
    s: float = 1.0,
    weights: Sequence[float] = (1.0, 1.0),
) -> torch.Tensor:
    """Return w1 moved by s towards the weighted mean of the blocks around it: CheckFree (arXiv 2506.15461).

    CheckFree fills a lost block so and then trains on; here nothing is trained, so it is a negative control: what a
    merge without a base does. Its weights are the neighbours' last gradient norms; equal ones where none is known.

    Args:
        w1: tuned.
        below: the same tensor of the block before, None at the first block.
        above: of the block after, None at the last block; a lone neighbour is copied, as in CheckFree+.
        s: 1 replaces the tensor.
        weights: of below and above, not negative.
    """
    _in_unit("s", s)
    if len(weights) != 2 or not all(math.isfinite(one) and one >= 0 for one in weights):
        raise ConfigError(f"weights={list(weights)} are no two weights", mend="give two numbers of 0 or more")
    pairs = [(one, weight) for one, weight in zip((below, above), weights, strict=True) if one is not None]
    total = math.fsum(weight for _, weight in pairs)
    if total <= 0:
        raise ConfigError("no neighbour has a weight", mend="leave a block out, or give weights above 0")
    if len(pairs) == 2 and pairs[1][1] > 0:
        (first, _), (second, weight) = pairs
        between = lerp(first.to(working_type(first)), second.to(working_type(second)), weight / total)
        return lerp(w1, between, s)
    return lerp(w1, pairs[0][0], s)


# --- singular values --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def mp_median(beta: float) -> float:
    """Return mu, the root of the median of the Marchenko-Pastur law of aspect ratio beta in (0, 1], variance 1.

    The median singular value of an m x n matrix of noise of scale sigma is mu * sigma * sqrt(max(m, n)).
    """
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = middle - half cos(phi): the density loses its square roots, at beta = 1 its pole, too.
    phi = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (math.pi / 200_000)
    x = (low + high) / 2 - (high - low) / 2 * torch.cos(phi)
    mass = torch.cumsum(torch.sin(phi) ** 2 / x, 0)
    return math.sqrt(float(x[int(torch.searchsorted(mass, mass[-1] / 2))]))


def hard_threshold(beta: float) -> float:
    """Return sqrt(2(b+1) + 8b / (b+1 + sqrt(b^2+14b+1))): omega, 4/sqrt(3) at b = 1 (Gavish and Donoho 2014)."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))


def dg_hard(w1: torch.Tensor, w0: torch.Tensor, *, scale: float = 1.0, min_numel: int = 1024) -> torch.Tensor:
    """Return w0 + d without the singular values of d that noise explains (DG-Hard, arXiv 2605.20296).

    Kept is S > scale * omega(beta) * median(S) / mu(beta). Vectors, small tensors and those whose SVD fails stay
    tuned. So does a d of low rank, such as a merged LoRA: its median is 0 and nothing counts as noise.

    Args:
        w1: tuned.
        w0: base.
        scale: of the threshold; 0 gives w1.
        min_numel: tensors with fewer elements stay tuned.
    """
    if w1.ndim != 2 or w1.numel() < max(min_numel, 1):
        return w1.clone()
    try:
        left, values, right = torch.linalg.svd(delta(w1, w0), full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return w1.clone()
    kept = int((values > scale * noise_edge(values, w1.shape)).sum())
    rounding = values[0] * torch.finfo(values.dtype).eps * max(w1.shape)
    if kept == len(values) or values[kept] <= rounding:  # nothing would be cut
        return w1.clone()
    return _added(w0, (left[:, :kept] * values[:kept]) @ right[:kept], w1)


def intruders(
    w1: torch.Tensor, w0: torch.Tensor, *, top_k: int = 10, epsilon: float = 0.5
) -> tuple[list[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return which of the leading singular directions of a tuned matrix the base does not have, and the tuned SVD.

    Intruder dimensions (Shuttleworth et al. 2024, arXiv 2410.21228): of the ``top_k`` left singular vectors of w1
    those whose largest ``|cosine|`` with any left singular vector of w0 is below ``epsilon``. Vectors of
    singular values that are 0 but for rounding do not count: they point anywhere.

    Args:
        w1: tuned, ``[d_out, d_in]``.
        w0: base.
        top_k: how many directions are looked at.
        epsilon: the higher, the more count as intruders.

    Returns:
        Their places, and (U, S, Vh) of w1 in the working type.
    """
    work = working_type(w1, w0)
    before, sizes, _ = torch.linalg.svd(w0.to(work), full_matrices=False)
    left, values, right = torch.linalg.svd(w1.to(work), full_matrices=False)
    rounding = torch.finfo(work).eps * max(w1.shape)  # what has no size is no direction, on neither side
    cosines = (left[:, :top_k].T @ before).abs() * (sizes > sizes[0] * rounding)
    nearest, there = cosines.amax(dim=1), values[:top_k] > values[0] * rounding
    return [int(place) for place in ((nearest < epsilon) & there).nonzero()[:, 0]], (left, values, right)


def reduce_intruders(
    w1: torch.Tensor,
    w0: torch.Tensor,
    *,
    factor: float = 0.75,
    top_k: int = 10,
    epsilon: float = 0.5,
    rank: int | None = None,
) -> torch.Tensor:
    """Return w1 with its intruder dimensions multiplied by ``factor``; see ``intruders``.

    ``w1 + (factor - 1) sum of sigma u v^T`` over the intruders, as PEFT's ``reduce_intruder_dimension`` does with its
    ``mitigation_lambda``: 1 removes nothing and 0 everything. (Its docstring says that a higher value removes more,
    its arithmetic does the opposite.) Without intruders, and for tensors that are no matrices, w1 comes back by copy.

    Args:
        w1: tuned.
        w0: base.
        factor: what is left of an intruder, from 0 to 1.
        top_k: how many leading directions are looked at.
        epsilon: cosine below which one is an intruder.
        rank: of the change; where it was a low-rank adapter its result is cut to that rank again, as PEFT does.
    """
    _in_unit("factor", factor)
    _in_unit("epsilon", epsilon)
    if top_k < 1 or (rank is not None and rank < 1):
        raise ConfigError(f"top_k={top_k} and rank={rank} are no counts", mend="give 1 or more")
    if w1.ndim != 2 or not w1.numel() or factor == 1 or torch.equal(w1, w0.to(w1.dtype)):
        return w1.clone()
    try:
        found, (left, values, right) = intruders(w1, w0, top_k=top_k, epsilon=epsilon)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return w1.clone()
    if not found:
        return w1.clone()
    taken = (left[:, found] * values[found]) @ right[found]
    reduced = w1.to(taken.dtype) + (factor - 1) * taken
    if rank is None:
        return reduced.to(w1.dtype)
    side, size, other = torch.linalg.svd(reduced - w0.to(taken.dtype), full_matrices=False)
    return _added(w0, (side[:, :rank] * size[:rank]) @ other[:rank], w1)


def noise_edge(values: torch.Tensor, shape: Sequence[int]) -> float:
    """Return the optimal hard threshold of a matrix of unknown noise, omega(beta) median(S) / mu(beta)."""
    beta = min(shape) / max(shape)
    return hard_threshold(beta) * float(torch.quantile(values.double(), 0.5)) / mp_median(beta)


# --- Adam's second moments --------------------------------------------------------------------------------------------


def moment_factors(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row and column sums of a matrix of second moments: m + n numbers in place of m n (Adafactor)."""
    return moment.float().sum(1), moment.float().sum(0)


def moment_from_factors(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Return row x column / total: exact for rank 1, and with the same row and column sums always."""
    total = row.double().sum()
    return (torch.outer(row.double(), column.double()) / (total if total > 0 else 1.0)).float()


def saliency(w1: torch.Tensor, w0: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return v d^2 in float64: what undoing each change costs, by Adam's second moments v (arXiv 2509.11167)."""
    return moment.double() * delta(w1, w0).double().square()  # 1e-11 * 1e-8 * ... nears fp32's end


def graft(
    w1: torch.Tensor,
    w0: torch.Tensor,
    moment: torch.Tensor,
    *,
    threshold: float | None = None,
    density: float | None = None,
) -> torch.Tensor:
    """Return w0 + m d with m = [v d^2 >= threshold]: Fast Fisher Grafting of one expert (arXiv 2509.11167).

    Entries are tuned's or the base's, by copy.

    Args:
        w1: tuned.
        w0: base.
        moment: v, Adam's exp_avg_sq of this tensor, or what ``moment_from_factors`` makes of its sums.
        threshold: of the saliency; ``threshold_of_density`` finds it for a whole model.
        density: instead, the share of this tensor that stays tuned.
    """
    importance = saliency(w1, w0, moment)
    if threshold is not None and density is None:
        mask = importance >= threshold
    elif density is not None and threshold is None:
        mask = keep_top(importance, n_kept(density, importance.numel()))
    else:
        raise ConfigError("graft takes a threshold or a density", mend="give one of them")
    return torch.where(mask, w1, w0.to(w1.dtype))


def ota(
    w1: torch.Tensor,
    w0: torch.Tensor,
    others: Sequence[torch.Tensor] = (),
    *,
    moments: Sequence[torch.Tensor],
    power: float = 0.5,
    floor: float = 1e-12,
    thresholds: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    fallback: str = "base",
) -> torch.Tensor:
    """Return w0 + sum a m d / sum a m over experts: OTA merging with Fast Fisher Grafting masks (arXiv 2509.11167).

    ``a = c v^power + floor mean(c v^power)`` says how sure an expert is of an entry (v: its Adam's second moments), and
    ``m = [v d^2 >= threshold]`` whether it has a say at all. Arithmetic is float64; an entry that one expert alone has
    a say in is that expert's by copy, one that nobody has is the base's. So one expert is ``graft``: a cancels.

    Args:
        w1: the first expert.
        w0: base.
        others: further experts.
        moments: v of each expert, or what ``moment_from_factors`` makes of its sums.
        power: of v; 1/2 in the paper, 0 weighs all alike.
        floor: keeps weights above 0, as a share of their mean over the tensor: a fixed one would drown small v.
        thresholds: of the saliency, one an expert; none: no masks.
        densities: instead, the share of each expert's tensor that has a say.
        scales: c, one an expert; 1 by default.
        fallback: what an entry is that all experts are masked out of: ``base``, or the plain ``mean`` of the experts.
    """
    experts = (w1, *others)
    _check_ota(len(experts), moments, thresholds, densities, scales, fallback)
    masks = [
        _has_a_say(n, one, w0, v, thresholds, densities)
        for n, (one, v) in enumerate(zip(experts, moments, strict=True))
    ]
    count = torch.stack(masks).sum(0)
    top = torch.zeros_like(w0, dtype=torch.float64)
    bottom = torch.zeros_like(top)
    for n, (one, v, mask) in enumerate(zip(experts, moments, masks, strict=True)):
        weight = (1.0 if scales is None else scales[n]) * v.double() ** power
        weight = (weight + max(floor * float(weight.mean()), torch.finfo(torch.float64).tiny)) * mask
        top += weight * (one.double() - w0.double())
        bottom += weight
    changed = w0.double() + top / torch.where(count > 0, bottom, 1.0)
    result = changed.to(w1.dtype)
    for one, mask in zip(experts, masks, strict=True):
        result = torch.where(mask & (count == 1), one.to(w1.dtype), result)
    if fallback == "mean":
        return torch.where(count == 0, mean(w1, w0, others, shares=[0.0, *[1.0] * len(experts)]), result)
    return torch.where(count == 0, w0.to(w1.dtype), result)


def _check_ota(
    n: int,
    moments: Sequence[torch.Tensor],
    thresholds: Sequence[float] | None,
    densities: Sequence[float] | None,
    scales: Sequence[float] | None,
    fallback: str,
) -> None:
    given = {"moments": moments, "thresholds": thresholds, "densities": densities, "scales": scales}
    for name, values in given.items():
        if values is not None and len(values) != n:
            raise ConfigError(f"ota has {len(values)} {name} for {n} experts", mend="give one an expert")
    if thresholds is not None and densities is not None:
        raise ConfigError("ota takes thresholds or densities", mend="give one of them")
    if scales is not None and not all(math.isfinite(one) and one > 0 for one in scales):
        raise ConfigError(f"scales={list(scales)} are no weights", mend="give numbers above 0")
    if fallback not in ("base", "mean"):
        raise ConfigError(f"fallback={fallback!r} is unknown", mend="give base or mean")


def _has_a_say(
    n: int,
    one: torch.Tensor,
    w0: torch.Tensor,
    moment: torch.Tensor,
    thresholds: Sequence[float] | None,
    densities: Sequence[float] | None,
) -> torch.Tensor:
    if thresholds is not None:
        return saliency(one, w0, moment) >= thresholds[n]
    if densities is not None:
        importance = saliency(one, w0, moment)
        return keep_top(importance, n_kept(densities[n], importance.numel()))
    return torch.ones_like(w0, dtype=torch.bool)


def threshold_of_density(stream: Callable[[], Iterable[torch.Tensor]], density: float) -> float:
    """Return the largest threshold that at least this share of all values reaches; exact, one tensor in memory.

    Bits of non-negative floats sort as whole numbers: four passes narrow the answer down by 16 bits each.

    Args:
        stream: yields the values (not negative) of the whole model, the same at every call.
        density: the share; 0 gives infinity.
    """
    _in_unit("density", density)
    prefix, wanted = 0, -1
    for shift in (48, 32, 16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        n_values = 0
        for values in stream():
            bits = values.detach().cpu().double().reshape(-1).view(torch.int64)
            n_values += bits.numel()
            if shift < 48:
                bits = bits[(bits >> (shift + 16)) == prefix]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        if wanted < 0:
            wanted = n_kept(density, n_values)
        if wanted == 0:
            return math.inf
        reached = counts.flip(0).cumsum(0)  # how many lie at this value or above
        place = int(torch.searchsorted(reached, wanted))
        wanted -= int(reached[place - 1]) if place else 0
        prefix = (prefix << 16) | (0xFFFF - place)
    return float(torch.tensor(prefix, dtype=torch.int64).view(torch.float64))
