"""Which units are restored towards the base and how far: policies (q, s), the controls beside them, and freeze lists.

Units and scores come from ``scores``; the restoring is done by ``kernels``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clbench import seeds
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import write_text
from clbench.merge.scores import (
    MEASURES,
    Granularity,
    Measure,
    TensorScore,
    block_number,
    natural,
    normalised_ranks,
    sibling,
    unit_of,
    unit_scores,
)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How much is restored.

    Raises:
        ConfigError: a share that is none.
    """

    q: float
    """Share of the blocks' parameters that is restored."""
    s: float
    """How far: 0 keeps the tuned weights, 1 gives the base's."""

    def __post_init__(self) -> None:
        """Check the shares."""
        for name in ("q", "s"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is no share", mend="give a number from 0 to 1")


POLICIES = {
    "conservative": Policy(q=0.5, s=1.0),
    "balanced": Policy(q=0.3, s=0.7),
    "aggressive": Policy(q=0.15, s=0.5),
}
"""The paper's names; its figures and which way they point are unknown. Here conservative is nearest to the base."""

CONTROLS = ("bottom", "random", "first", "last")
CHOICES = (*MEASURES, *CONTROLS)


def policy_of(name: str, q: float | None = None, s: float | None = None) -> Policy:
    """Return a named policy, with q or s of one's own; ``free`` needs both.

    Raises:
        ConfigError: no such name, or ``free`` without q and s.
    """
    if name == "free":
        if q is None or s is None:
            raise ConfigError("policy free has no q and s", mend="give both, such as q=0.25,s=0.8")
        return Policy(q=q, s=s)
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} is unknown", mend=f"give {', '.join(POLICIES)} or free")
    preset = POLICIES[name]
    return Policy(q=preset.q if q is None else q, s=preset.s if s is None else s)


def grid(shares: Iterable[float], strengths: Iterable[float]) -> list[Policy]:
    """Return the policies of a grid; all that restore nothing are one."""
    strengths = list(strengths)
    found = {(q, s) if q > 0 and s > 0 else (0.0, 0.0) for q in shares for s in strengths}
    return [Policy(q=q, s=s) for q, s in sorted(found)]


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """All units, those to be restored first in front; any share of them is a part of any larger share."""

    units: tuple[str, ...]
    sizes: Mapping[str, int]
    """Unit -> parameters of its scored matrices."""
    scores: Mapping[str, float]
    """Unit -> score; empty where the order is not by score."""

    def top(self, q: float) -> tuple[str, ...]:
        """Return the units in front whose share of the parameters comes nearest to q; at least one where q > 0."""
        if q <= 0:
            return ()
        total = sum(self.sizes.values())
        best, n_best, reached = math.inf, 1, 0
        for n, unit in enumerate(self.units, start=1):
            reached += self.sizes[unit]
            off = abs(reached - q * total)
            if off <= best + 1e-9 * total:  # of two that are as near, the larger
                best, n_best = off, n
        return self.units[:n_best]


def order_units(
    scores: Sequence[TensorScore],
    *,
    by: str = "spear",
    granularity: Granularity = "layer",
    mix: float = 0.5,
    seed: int = 0,
) -> Ordering:
    """Return the units in the order in which they are restored.

    Args:
        scores: of all tensors.
        by: a measure (the highest first), or a control: ``bottom`` (``spear``'s lowest first), ``random`` (by seed),
            ``first`` or ``last`` (by depth).
        granularity: what a unit is.
        mix: share of SWCI in ``spear``.
        seed: of ``random``.

    Raises:
        ConfigError: an unknown order, or no matrix inside numbered blocks.
    """
    if by not in CHOICES:
        raise ConfigError(f"order {by!r} is unknown", mend=f"give {', '.join(CHOICES)}")
    counts = {score.name: score.n_parameters for score in scores}
    flat = {score.name: 0.0 for score in scores if score.is_matrix}
    sizes: dict[str, int] = {}
    for name in sorted(flat, key=natural):
        unit = unit_of(name, granularity)
        assert unit is not None
        sizes[unit] = sizes.get(unit, 0) + counts[name]
    if not sizes:
        raise ConfigError("no weight matrix in numbered blocks", mend="give a transformer's weights")
    units = list(sizes)
    if by in ("random", "first", "last"):
        orders = {
            "first": units,
            "last": units[::-1],
            "random": [units[i] for i in seeds.permutation(len(units), seed)],
        }
        return Ordering(units=tuple(orders[by]), sizes=sizes, scores={})
    measure: Measure = next((known for known in MEASURES if known == by), "spear")
    found = unit_scores(normalised_ranks(scores, measure, mix=mix), counts, granularity)
    sign = 1 if by == "bottom" else -1
    units.sort(key=lambda unit: (sign * found[unit], natural(unit)))
    return Ordering(units=tuple(units), sizes=sizes, scores=found)


def within(name: str, unit: str) -> bool:
    """Return whether a tensor belongs to a unit, by whole parts of its name."""
    return name == unit or name.startswith(f"{unit}.")


def strengths_of(names: Iterable[str], units: Iterable[str], s: float, *, outside: bool = False) -> dict[str, float]:
    """Return tensor name -> restoration strength: s in the units, exactly 0 elsewhere.

    Args:
        names: of all tensors.
        units: to be restored.
        s: how far.
        outside: with the tensors outside the blocks (embeddings, last norm, output layer).
    """
    chosen = set(units)
    found = {}
    for name in names:
        owners = (unit_of(name, granularity) for granularity in ("layer", "module", "tensor"))
        inside = not chosen.isdisjoint({name, *owners})
        found[name] = s if inside or (outside and unit_of(name, "layer") is None) else 0.0
    return found


def surviving_neighbours(names: Iterable[str], chosen: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return chosen tensor -> the nearest blocks ``below`` and ``above`` that have it and are not chosen themselves.

    One of the two is missing at the ends. A tensor that every block has lost is left out: nothing can replace it.
    """
    lost, places = set(chosen), dict[str, list[int]]()
    numbers = {name: block_number(name) for name in names}
    for name, number in numbers.items():
        if number is not None and name not in lost:
            places.setdefault(sibling(name, 0), []).append(number)
    found = {}
    for name in sorted(lost, key=natural):
        number = numbers.get(name)
        if number is None:
            continue
        around = places.get(sibling(name, 0), [])
        low, high = [n for n in around if n < number], [n for n in around if n > number]
        if low or high:
            found[name] = ({"below": max(low)} if low else {}) | ({"above": min(high)} if high else {})
    return found


def equal_strength(moved: Mapping[str, float], strengths: Mapping[str, float]) -> float:
    """Return the one strength that, given to all tensors, restores as much as ``strengths`` do.

    ``sum s_p ||D_p|| / sum ||D_p||`` over all tensors p: then the mean distance to the base, ``(1 - s_p) ||D_p||``, and
    the mean distance to the tuned weights, ``s_p ||D_p||``, both are those of the selection. WiSE-FT's alpha is 1 less
    this. Exact for straight lines; SLERP differs by about an eighth of the angle.

    Args:
        moved: tensor name -> ``||D_p||``, the norm of its change by training.
        strengths: tensor name -> s_p.
    """
    total = math.fsum(moved.values())
    return math.fsum(strengths[name] * norm for name, norm in moved.items()) / total if total > 0 else 0.0


# freeze lists


def freeze_list(names: Sequence[str], units: Iterable[str], **about: Any) -> dict[str, Any]:
    """Return the units as modules to freeze in a next run, with everything else as Spectrum's list of what to train.

    Args:
        names: of all parameters.
        units: to freeze.
        about: JSON-able values that say where the list is from.
    """
    frozen = sorted(units, key=natural)
    held = strengths_of(names, frozen, 1.0)
    free = sorted((name for name in names if not held[name]), key=natural)
    unfrozen = [f"^{re.escape(name)}$" for name in free]
    return {"format": 1, **about, "frozen_modules": frozen, "unfrozen_parameters": unfrozen}


def write_freeze_list(path: Path, document: Mapping[str, Any]) -> None:
    """Write a list as YAML, or as JSON where the file's name ends so."""
    as_json = path.suffix == ".json"
    write_text(
        path, json.dumps(document, indent=2) + "\n" if as_json else yaml.safe_dump(dict(document), sort_keys=False)
    )


def read_freeze_list(path: Path) -> list[str]:
    """Return the modules that a list freezes.

    Raises:
        NotFoundError: no such file.
        IntegrityError: it is no such list.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML, too
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError("the freeze list is missing", where=path, mend="give a YAML or JSON file") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    modules = found.get("frozen_modules") if isinstance(found, dict) else None
    if not isinstance(modules, list) or not all(isinstance(module, str) and module for module in modules):
        raise IntegrityError("no list of frozen_modules", where=path, mend="write frozen_modules: [model.layers.3, …]")
    return modules
