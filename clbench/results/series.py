"""What a series of oracles costs: pure counting of training tokens, as TiC-LM counts compute.

An oracle is trained from scratch on everything up to its cutoff, with as many tokens as a continual run has seen by
then. A new one every time the model has to be fresh is what continual training is to replace, so the two bills are set
side by side. The unit is training tokens at one model size: no evaluation, no seconds, no storage. Nothing is trained
here, see ``clbench.oracle_series``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clbench.errors import ConfigError


def tokens_at(cutoff: int, *, n_initial: int, n_per_stage: int) -> int:
    """Return what a continual run has trained on after a stage, and hence what the oracle of that date gets.

    Args:
        cutoff: the stage; 0 is the base.
        n_initial: tokens of the base.
        n_per_stage: tokens of every stage after it.
    """
    return n_initial + cutoff * n_per_stage


def newest_cutoff(cutoffs: Iterable[int], stage: int) -> int | None:
    """Return the cutoff of the newest oracle that there is after a stage; None before the first."""
    return max((cutoff for cutoff in cutoffs if cutoff <= stage), default=None)


def check_cutoffs(cutoffs: Sequence[int], n_stages: int) -> list[int]:
    """Return the cutoffs of a series in order; all stages where none is given.

    Raises:
        ConfigError: a stage that the stream does not have, or one that is named twice.
    """
    wrong = [cutoff for cutoff in cutoffs if not 0 <= cutoff < n_stages]
    if wrong:
        raise ConfigError(
            f"stage {wrong[0]} is not in the stream", where="--cutoff", mend=f"give stages from 0 to {n_stages - 1}"
        )
    if len(set(cutoffs)) < len(cutoffs):
        raise ConfigError("a cutoff is given twice", where="--cutoff", mend="give every stage once")
    return sorted(cutoffs) or list(range(n_stages))


@dataclass(frozen=True, kw_only=True)
class SeriesPlan:
    """The bill of a series of oracles beside that of one continual run."""

    n_tokens: dict[int, int]
    """Cutoff -> tokens of its oracle."""
    continual_tokens: int
    """Tokens of the continual run, its base included."""

    @property
    def series_tokens(self) -> int:
        """Tokens of all oracles."""
        return sum(self.n_tokens.values())

    @property
    def ratio(self) -> float:
        """How many times the continual run the series costs (TiC-LM: 2.6)."""
        return self.series_tokens / self.continual_tokens

    @property
    def saving(self) -> float:
        """Which share of the series' tokens the continual run saves (TiC-LM: 62 %); negative when it costs more."""
        return 1 - self.continual_tokens / self.series_tokens

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        oracles = [
            {"cutoff": cutoff, "n_tokens": n, "n_tokens_per_stage": n / (cutoff + 1)}
            for cutoff, n in self.n_tokens.items()
        ]
        return {
            "oracles": oracles,
            "series_tokens": self.series_tokens,
            "continual_tokens": self.continual_tokens,
            "ratio": self.ratio,
            "saving": self.saving,
        }


def plan_series(
    cutoffs: Sequence[int], *, n_stages: int, n_initial: int, n_per_stage: int, continual_tokens: int | None = None
) -> SeriesPlan:
    """Return the bill of a series.

    Args:
        cutoffs: of the oracles; none means every stage.
        n_stages: stages of the stream, the base's own included.
        n_initial: tokens of the base.
        n_per_stage: tokens of every later stage in the run that the oracles are matched to.
        continual_tokens: tokens of the run to compare with; by default that same run through all stages.

    Raises:
        ConfigError: a cutoff cannot be used, or a run of no tokens.
    """
    chosen = check_cutoffs(cutoffs, n_stages)
    if continual_tokens is not None and continual_tokens < 1:
        raise ConfigError(f"a continual run of {continual_tokens} tokens", mend="give --continual-tokens above 0")
    sizes = {"n_initial": n_initial, "n_per_stage": n_per_stage}
    return SeriesPlan(
        n_tokens={cutoff: tokens_at(cutoff, **sizes) for cutoff in chosen},
        continual_tokens=continual_tokens or tokens_at(n_stages - 1, **sizes),
    )
