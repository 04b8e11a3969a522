"""Averages over the checkpoints of one run, with the base among them: uniform, greedy, and weighted by a metric.

Soups are Wortsman et al. 2022 (arXiv 2203.05482), metrics-weighted averages (MWA) arXiv 2504.18580, whose formula could
not be read: here weights are ``m^p`` normalised, ``m = 1 / loss``. The same averages inside a run are the methods
``soup`` and ``mwa``. What a checkpoint is judged by is the sum of its losses on general and on domain text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from clbench.errors import ConfigError, NotFoundError
from clbench.merge.families import BASE, TUNED, Family, Spot
from clbench.merge.plan import Action, MergePlan
from clbench.merge.scores import natural


def checkpoints_of(run: Path) -> list[Path]:
    """Return the model folders of a run, oldest first: its releases, or any subfolders with a model.

    Raises:
        NotFoundError: no such folder.
        ConfigError: fewer than one model in it.
    """
    if not run.is_dir():
        raise NotFoundError("the run is missing", where=run, mend="give a run folder, or one with checkpoint folders")
    inside = run / "release" if (run / "release").is_dir() else run
    found = [one for one in inside.iterdir() if (one / "config.json").is_file() and any(one.glob("*.safetensors"))]
    if not found:
        raise ConfigError("no checkpoints in there", where=inside, mend="give a run that has released a stage")
    return sorted(found, key=lambda one: natural(one.name.replace("-", ".")))


class Soup(Family):
    """Averages of the models: base, tuned (the newest checkpoint) and the others, which are older ones.

    Args:
        name: one of SOUPS.
        labels: of base, tuned and others.
        with_base: whether the base is an ingredient.
        power: p of ``mwa``.
    """

    def __init__(self, name: str, labels: Sequence[str], *, with_base: bool = True, power: float = 4.0) -> None:
        self.name, self.labels, self.with_base, self.power = name, tuple(labels), with_base, power

    @property
    def ingredients(self) -> list[int]:
        """Places of the models that may be averaged."""
        return list(range(0 if self.with_base else 1, len(self.labels)))

    def spot(self, q: float | None, s: float) -> Spot:
        """Refuse: an average has no strength."""
        raise ConfigError(f"{self.name} has no q and no s", mend="leave -q and -s out")

    def of(self, shares: Sequence[float], label: str = "") -> Spot:
        """Return an average as a merge; one model alone is that model."""
        places = [place for place, share in enumerate(shares) if share > 0]
        if places == [0]:
            return BASE
        if places == [1]:
            return TUNED
        told = label or "mean of " + ", ".join(self.labels[place] for place in places)
        total = math.fsum(shares)
        exact = [share / total for share in shares]
        return Spot(told, MergePlan(Action("mean", {"shares": exact})), {"shares": exact})

    def alone(self, place: int) -> Spot:
        """Return one model."""
        return self.of([float(other == place) for other in range(len(self.labels))], self.labels[place])

    def mean(self, places: Sequence[int], label: str = "") -> Spot:
        """Return the plain mean of some models."""
        return self.of([float(place in places) for place in range(len(self.labels))], label)

    def choose(self, loss: Callable[[Spot], float]) -> Spot:
        """Return the average; ``greedy-soup`` and ``mwa`` measure every ingredient for it.

        Greedy: the best first, then each next one if and only if the mean's loss falls; of equal ones the newest.
        """
        if self.name == "soup":
            return self.mean(self.ingredients, f"soup of {len(self.ingredients)}")
        losses = {place: loss(self.alone(place)) for place in self.ingredients}
        if self.name == "mwa":
            if any(not one > 0 for one in losses.values()):
                raise ConfigError("mwa needs losses above 0", mend="measure losses, not accuracies alone")
            logs = {place: -self.power * math.log(one) for place, one in losses.items()}
            top = max(logs.values())
            shares = [math.exp(logs[place] - top) if place in logs else 0.0 for place in range(len(self.labels))]
            return self.of(shares, f"mwa, power {self.power:g}, of {len(losses)}")
        # The base is place 0 and the oldest; tuned is the newest, and the others stand from old to new.
        age = {0: 0, **{place: place - 1 for place in range(2, len(self.labels))}, 1: len(self.labels)}
        best, *others = sorted(losses, key=lambda place: (losses[place], -age[place]))
        picked, lowest = [best], losses[best]
        for place in others:
            found = loss(self.mean([*picked, place]))
            if found < lowest:
                picked, lowest = [*picked, place], found
        return self.mean(sorted(picked), f"greedy soup of {len(picked)} of {len(losses)}: "
                         + ", ".join(self.labels[place] for place in picked))  # fmt: skip
