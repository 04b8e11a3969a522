"""How a stage's tokens are shared out over stages, and what a bounded buffer holds: pure functions.

Methods of the replay family turn these into plans. Stages are counted from 0 here; t = index + 1 in the papers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from clbench import seeds
from clbench.errors import ConfigError


def new_share(fraction: str, t: int, *, method: str = "replay") -> Fraction:
    """Return alpha_t, the share of new text at stage t (1-based).

    Raises:
        ConfigError: the option is not a number in [0, 1] or ``1/t``.
    """
    text = fraction.replace(" ", "")
    try:
        share = Fraction(1, t) if text == "1/t" else Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 <= share <= 1:
        raise ConfigError(
            f"{method}:fraction={fraction} is no share",
            mend="give a number between 0 and 1 such as 1/2, or 1/t",
        )
    return share


def mixture_of(index: int, new: Fraction | float, weights: Mapping[int, float]) -> dict[int, float]:
    """Return the mixture of stage ``index``: ``new`` of its own text, the rest in proportion to weights of past stages.

    Where no past stage has any weight, all of it is new.
    """
    total = math.fsum(weights.values())
    if not total or new == 1:
        return {index: 1.0}
    old = float(1 - new)
    return {i: old * weight / total for i, weight in sorted(weights.items()) if weight} | {index: float(new)}


def softmax(logits: Mapping[int, float]) -> dict[int, float]:
    """Return weights ``exp(logit)``, scaled so that the largest is 1."""
    top = max(logits.values())
    return {i: math.exp(logit - top) for i, logit in logits.items()}


def equal_quotas(seen: Sequence[int], n_tokens: int) -> list[int]:
    """Return how much of each stage a buffer of ``n_tokens`` holds with one quota for all.

    What small stages leave free goes to the others, so that ``min(n_tokens, sum(seen))`` is held. Tokens that are left
    over go to the oldest: so what is held of a stage never grows when one more stage comes.
    """
    level, left = 0, n_tokens
    for place, n in enumerate(sorted(seen)):
        if left < (n - level) * (len(seen) - place):
            level += left // (len(seen) - place)
            break
        left -= (n - level) * (len(seen) - place)
        level = n
    held = [min(n, level) for n in seen]
    left = n_tokens - sum(held)
    for i, n in enumerate(seen):
        if left and n > level:
            held[i], left = held[i] + 1, left - 1
    return held


def reservoir(seen: Sequence[int], n_tokens: int, seed: int) -> list[int]:
    """Return how many tokens of each stage a reservoir holds when these many have passed, one stage after another.

    A reservoir (Vitter 1985, algorithm R) is at any time a uniform sample without replacement of all that has passed,
    and what was evicted does not return. When n tokens come after N, the new sample of size s holds
    Hypergeometric(n, N, s) of the new ones; the others are a uniform sample of what was held.
    """
    held: tuple[int, ...] = ()
    for arrival, n_new in enumerate(seen):
        held = _arrive(held, sum(seen[:arrival]), n_new, n_tokens, seed)
    return list(held)


@lru_cache(maxsize=1024)
def _arrive(held: tuple[int, ...], n_old: int, n_new: int, n_tokens: int, seed: int) -> tuple[int, ...]:
    """Return what a reservoir holds when one more stage has passed."""
    size, arrival = min(n_tokens, n_old + n_new), len(held)
    taken = hypergeometric(n_new, n_old, size, _uniform(seed, arrival, arrival))
    kept, left, rest = [], size - taken, sum(held)
    for i, n in enumerate(held):
        rest -= n
        kept.append(hypergeometric(n, rest, left, _uniform(seed, arrival, i)))
        left -= kept[-1]
    return (*kept, taken)


def _uniform(seed: int, arrival: int, stage: int) -> float:
    return seeds.derive(seed, "reservoir", arrival, stage) / 2.0**63


def hypergeometric(n_good: int, n_bad: int, n_draws: int, uniform: float) -> int:
    """Return the quantile at ``uniform`` of the good ones among ``n_draws`` from ``n_good + n_bad``, no replacement.

    By products of neighbouring probabilities from the mode out to ten standard deviations: only additions,
    multiplications and divisions in a fixed order, so that every machine and numpy version gives the same number, and
    no bound on the population, which numpy's own generator has (10^9).
    """
    low, high = max(0, n_draws - n_bad), min(n_good, n_draws)
    if low == high:
        return low
    total = n_good + n_bad
    share = n_good / total
    reach = 10 + math.ceil(10 * math.sqrt(n_draws * share * (1 - share) * (total - n_draws) / max(1, total - 1)))
    mode = min(high, max(low, (n_draws + 1) * (n_good + 1) // (total + 2)))
    up = np.arange(mode, min(high, mode + reach), dtype=np.float64)
    down = np.arange(mode, max(low, mode - reach), -1, dtype=np.float64)
    spare = float(n_bad - n_draws)
    rising = np.cumprod((n_good - up) * (n_draws - up) / ((up + 1) * (spare + up + 1)))
    falling = np.cumprod(down * (spare + down) / ((n_good - down + 1) * (n_draws - down + 1)))
    below = np.cumsum(np.concatenate([falling[::-1], [1.0], rising]))
    return mode - len(down) + int(np.searchsorted(below[:-1], uniform * below[-1], side="right"))
