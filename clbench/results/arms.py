"""Arms of an experiment compared: the same base and method, another text or another way to batch it.

A difference of losses says something about the *text* only where the arms were shown as much: tokens, rows, optimizer
steps and summed learning rate have to agree, or the caller names what does not. Junk minus control and control minus
base always come together: continued training on the control text already costs. Formulas: docs/junk.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from clbench.errors import ConfigError, did_you_mean
from clbench.results.matrix import Array, Documents, Unit, documents_from_rows, finite_or_none
from clbench.results.stats import (
    LEVEL,
    N_RESAMPLES,
    Effect,
    Interval,
    bootstrap_interval,
    paired_t,
    resample,
    t_interval,
)
from clbench.results.store import RunStore

TOLERANCE = {"tokens": 0.0, "rows": 0.01, "steps": 0.01, "learning_rate_sum": 0.01}
"""Relative difference up to which arms count as matched. Tokens are exact; where the short last row of a text falls
moves the others by one or two."""
SAME = ("base", "method", "settings")
"""What arms also have to share, unless it is named."""
QUANTITIES = (*TOLERANCE, *SAME)
ALL = "all groups"
OTHER = "other text"
ARM_SETTINGS = {"batching", "n_steps_per_stage", "n_tokens_per_stage"}
"""Training settings that an arm may vary: what they change is compared by its effect, as rows, steps and tokens."""


@dataclass(frozen=True)
class Arm:
    """The finished runs of one track and method, one a seed."""

    name: str
    runs: Mapping[int, RunStore]
    exposure: Mapping[str, Mapping[int, float]]
    """Quantity -> trained stage -> value, mean over seeds; NaN where no ledger says."""
    same: Mapping[str, str]
    """What has to be equal: digests and labels."""
    dose: float | None = None
    """Share of junk."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        exposure = {q: {str(k): finite_or_none(v) for k, v in by.items()} for q, by in self.exposure.items()}
        return {"name": self.name, "dose": self.dose, "seeds": sorted(self.runs), "exposure": exposure}


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One difference of losses after the last stage, for one group of held-out documents of one period.

    ``over_seeds`` varies with training (two seeds or more), ``over_documents`` with the held-out documents alone.
    """

    what: str
    """``ARM - CONTROL`` or ``CONTROL - base``."""
    group: str
    period: int | None
    """Stage of the held-out documents; None: all periods."""
    row: int
    over_seeds: Interval
    over_documents: Interval
    effects: Mapping[str, Effect] = field(default_factory=dict)
    """Standardised over seeds, see ``paired_g``; for differences between arms."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            **{name: getattr(self, name) for name in ("what", "group", "period", "row")},
            **{name: _plain(getattr(self, name)) for name in ("over_seeds", "over_documents")},
            "effects": {name: _plain(effect) for name, effect in self.effects.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Loss after the last stage against the dose, least squares: nats (or bits) from dose 0 to dose 1."""

    group: str
    row: int
    n_doses: int
    over_runs: Interval
    """t with n - 2 degrees of freedom; every run is a point."""
    over_documents: Interval
    spearman: float
    """Rank correlation of dose and mean loss; its sign says whether losses rise."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            **{name: getattr(self, name) for name in ("group", "row", "n_doses")},
            **{name: _plain(getattr(self, name)) for name in ("over_runs", "over_documents")},
            "spearman": finite_or_none(self.spearman),
        }


@dataclass(frozen=True, kw_only=True)
class ArmComparison:
    """What comparing arms gave."""

    arms: Sequence[Arm]
    control: str
    unit: Unit
    unmatched: Mapping[str, Mapping[str, float | str]]
    """Quantity that differs, as named -> arm -> value (numbers: total over the stages)."""
    contrasts: Sequence[Contrast]
    slopes: Sequence[Slope]
    n_documents: int
    n_left_out: int
    """Held-out documents that not all arms have."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "control": self.control,
            "unit": self.unit,
            "arms": [arm.as_dict() for arm in self.arms],
            "unmatched": {q: {a: _number(v) for a, v in by.items()} for q, by in self.unmatched.items()},
            "contrasts": [contrast.as_dict() for contrast in self.contrasts],
            "slopes": [slope.as_dict() for slope in self.slopes],
            "n_documents": self.n_documents,
            "n_left_out": self.n_left_out,
        }


def _number(value: float | str) -> float | str | None:
    return value if isinstance(value, str) else finite_or_none(value)


def _plain(value: Interval | Effect) -> dict[str, Any]:
    return {k: finite_or_none(v) if isinstance(v, float) else v for k, v in vars(value).items()}


def compare_arms(
    runs: Sequence[RunStore],
    differ: Sequence[str] = (),
    *,
    control: str | None = None,
    doses: Mapping[str, float] | None = None,
    apart: Sequence[str] | None = None,
    suite: str = "heldout",
    unit: Unit = "nats_per_token",
    n_resamples: int = N_RESAMPLES,
) -> ArmComparison:
    """Compare arms with their control, and the control with the base.

    Args:
        runs: finished runs of two tracks or more; runs of one track and method are one arm.
        differ: quantities (QUANTITIES) that may differ.
        control: name of the control's track; by default the arm of dose 0, else the first.
        doses: track name -> share of junk, for the slope.
        apart: groups of held-out documents that are shown by themselves, all others together; None: every group.
        suite: whose rows.
        unit: of the losses.
        n_resamples: bootstrap samples of the documents.

    Raises:
        ConfigError: there are not two arms, a run is unfinished, or arms differ in what was not named: then the message
            gives quantity, arms and values.
    """
    if unknown := [name for name in differ if name not in QUANTITIES]:
        raise ConfigError(f"no quantity {unknown[0]!r}", where="differ", mend=did_you_mean(unknown[0], QUANTITIES))
    arms = arms_of(runs, doses or {})
    unmatched = differences_in_exposure(arms)
    refuse({name: by for name, by in unmatched.items() if name not in differ})
    first = next((arm for arm in arms if arm.dose == 0), arms[0]).name if control is None else control
    if first not in {arm.name for arm in arms}:
        raise ConfigError(
            f"no arm is called {first!r}", where="control", mend=did_you_mean(first, [arm.name for arm in arms])
        )
    losses = _Losses.of(arms, suite, apart)
    contrasts, slopes = [], []
    for group in losses.groups:
        for period in (None, *losses.periods(group)):
            cell = _Cell.of(losses, arms, group, period, unit, n_resamples)
            contrasts += _contrasts(cell, arms, first, group, period, losses.row)
            if period is None and (slope := _slope(cell, arms, group, losses.row)) is not None:
                slopes.append(slope)
    return ArmComparison(
        arms=arms,
        control=first,
        unit=unit,
        unmatched=unmatched,
        contrasts=contrasts,
        slopes=slopes,
        n_documents=losses.n_documents,
        n_left_out=losses.n_left_out,
    )


# --- arms and what they were shown


def arms_of(runs: Sequence[RunStore], doses: Mapping[str, float]) -> list[Arm]:
    """Return the arms of these runs, in the order of their first run.

    Raises:
        ConfigError: there are fewer than two, a seed comes twice, or two tracks have one name.
    """
    found: dict[tuple[str, str], dict[int, RunStore]] = {}
    digests: dict[tuple[str, str], str] = {}
    for run in runs:
        config = run.config()
        key = (str(config["track"]["name"]), str(config["method"]["label"]))
        digest = f"{config['track']['sha256']}{config['track'].get('stream_sha256')}"
        if digests.setdefault(key, digest) != digest:
            raise ConfigError(f"two tracks are called {key[0]!r}", where=run.folder, mend="give each arm its own name")
        if found.setdefault(key, {}).setdefault(int(config["seed"]), run) is not run:
            raise ConfigError(f"seed {config['seed']} of arm {key[0]!r} comes twice", where=run.folder)
        if (state := run.status()["state"]) not in ("done", "absent"):
            raise ConfigError(f"the run is {state}", where=run.folder, mend="finish it first")
    if len(found) < 2:
        raise ConfigError(f"{len(found)} arm cannot be compared", mend="give the runs of two tracks or more")
    names = [track for track, _ in found]
    arms = []
    for (track, label), by_seed in found.items():
        name = track if names.count(track) == 1 else f"{track} {label}"
        arms.append(
            Arm(
                name=name,
                runs=dict(sorted(by_seed.items())),
                exposure=_exposure(list(by_seed.values())),
                same=_identities(next(iter(by_seed.values()))),
                dose=doses.get(track),
            )
        )
    return arms


def _identities(run: RunStore) -> dict[str, str]:
    """Return what arms have to share besides quantities."""
    config = run.config()
    return {
        "base": str(config.get("base", {}).get("weights_sha256"))[:12],
        "method": str(config["method"]["label"]),
        "settings": settings_text(config.get("training", {})),
    }


def settings_text(training: Mapping[str, Any]) -> str:
    """Return the training settings that all arms have to share, to be compared and shown."""
    return ", ".join(f"{k}={v}" for k, v in sorted(training.items()) if k not in ARM_SETTINGS)


def _exposure(runs: Sequence[RunStore]) -> dict[str, dict[int, float]]:
    """Return what an arm was shown by its ledgers, mean over seeds."""
    stages = sorted({stage for run in runs for stage in run.stages_done() if stage > 0})
    ledgers = [run.ledger() for run in runs]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    def of(quantity: str, stage: int) -> list[float]:
        if quantity == "tokens":
            return [float(sum(found.get("tokens", {}).get(str(stage), {}).values())) for found in ledgers if found]
        named = [found.get(quantity) for found in ledgers]
        # A method that does not train has no steps: then the ledger names the quantity, but no stage.
        return [float(by.get(str(stage), 0.0)) for by in named if by is not None]

    return {
        quantity: {
            stage: mean(of(quantity, stage)) if len(of(quantity, stage)) == len(runs) else math.nan for stage in stages
        }
        for quantity in TOLERANCE
    }


def differences_in_exposure(arms: Sequence[Arm]) -> dict[str, dict[str, float | str]]:
    """Return every quantity in which arms differ, with each arm's value: totals for numbers.

    Numbers are compared stage by stage. What no ledger says is unknown, and unknown is not equal.
    """
    found: dict[str, dict[str, float | str]] = {}
    for quantity, tolerance in TOLERANCE.items():
        by_stage = [arm.exposure[quantity] for arm in arms]
        stages = set().union(*by_stage)
        matched = all(_close([by.get(stage, 0.0) for by in by_stage], tolerance) for stage in stages)
        if not matched:
            found[quantity] = {arm.name: float(sum(arm.exposure[quantity].values())) for arm in arms}
    for name in SAME:
        if len({arm.same[name] for arm in arms}) > 1:
            found[name] = {arm.name: arm.same[name] for arm in arms}
    return found


def _close(values: Sequence[float], tolerance: float) -> bool:
    if not all(math.isfinite(value) for value in values):
        return False
    return max(values) - min(values) <= tolerance * max(abs(value) for value in values)


def refuse(unmatched: Mapping[str, Mapping[str, float | str]]) -> None:
    """Raise ConfigError if there is anything in which arms differ.

    Raises:
        ConfigError: naming quantities, arms and values.
    """
    if not unmatched:
        return
    parts = [
        f"{quantity} ({', '.join(f'{arm} {_shown(value)}' for arm, value in by.items())})"
        for quantity, by in unmatched.items()
    ]
    raise ConfigError(
        f"the arms differ in {'; '.join(parts)}",
        mend=f"match them (batching: packed, or rows with n_steps_per_stage), or name the difference with "
        f"--differ {','.join(unmatched)}",
    )


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "unknown"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


# --- losses


@dataclass(frozen=True)
class _Losses:
    """The held-out documents that all runs have: losses of row 0 and of the last row, ``[2, D]`` for each run."""

    documents: Mapping[str, Mapping[int, Documents]]
    """Arm -> seed -> documents, aligned over all runs."""
    group: NDArray[np.str_]
    groups: Sequence[str]
    row: int
    n_left_out: int

    @property
    def one(self) -> Documents:
        return next(iter(next(iter(self.documents.values())).values()))

    @property
    def n_documents(self) -> int:
        return self.one.n

    @classmethod
    def of(cls, arms: Sequence[Arm], suite: str, apart: Sequence[str] | None) -> _Losses:
        rows = {arm.name: {seed: _rows(run, suite) for seed, run in arm.runs.items()} for arm in arms}
        lasts = {last for by_seed in rows.values() for _, last, _ in by_seed.values()}
        if len(lasts) > 1:
            raise ConfigError(f"the runs end after stages {sorted(lasts)}", mend="finish all of them")
        all_documents = [found for by_seed in rows.values() for found, _, _ in by_seed.values()]
        keys = [_keys(found) for found in all_documents]
        common = set(keys[0]).intersection(*keys[1:])
        n_all = len(set().union(*keys))
        if not common:
            raise ConfigError("the runs share no held-out documents", mend="measure them on streams of one pool")
        groups = {
            key: name for by_seed in rows.values() for _, _, names in by_seed.values() for key, name in names.items()
        }
        shown = sorted(set(groups.values())) if apart is None else [*apart, OTHER]
        kept = sorted(common)
        name = np.array([groups[key] if groups[key] in shown else OTHER for key in kept], dtype=np.str_)
        present = [one for one in shown if (name == one).any()]
        return cls(
            {
                arm: {s: _aligned(found, common) for s, (found, _, _) in by_seed.items()}
                for arm, by_seed in rows.items()
            },
            name,
            [ALL, *present] if len(present) > 1 else [ALL],
            lasts.pop(),
            n_all - len(common),
        )

    def mask(self, group: str, period: int | None) -> NDArray[np.bool_]:
        """Return which documents belong to a cell."""
        chosen = np.ones(self.n_documents, bool) if group == ALL else self.group == group
        return chosen if period is None else chosen & (self.one.stage == period)

    def periods(self, group: str) -> list[int]:
        """Return the periods that have documents of a group."""
        return [int(stage) for stage in np.unique(self.one.stage[self.mask(group, None)])]


def _rows(run: RunStore, suite: str) -> tuple[Documents, int, dict[tuple[int, str], str]]:
    """Return the documents of row 0 and of the last row, that row, and the group of each document."""
    done = run.stages_done()
    if len(done) < 2 or done[0] != 0:
        raise ConfigError("the run has no base and no trained stage to compare", where=run.folder, mend="finish it")
    tables = {stage: run.rows(suite, stage) for stage in (0, done[-1])}
    table = tables[0]
    keys = zip(table["stage"].to_pylist(), table["item"].to_pylist(), strict=True)
    return documents_from_rows(tables), done[-1], dict(zip(keys, table["group"].to_pylist(), strict=True))


def _keys(documents: Documents) -> list[tuple[int, str]]:
    return list(zip(documents.stage.tolist(), documents.item.tolist(), strict=True))


def _aligned(documents: Documents, common: set[tuple[int, str]]) -> Documents:
    """Return the documents that all runs have, in their common order (stage, item)."""
    keys = _keys(documents)
    order = sorted((key, place) for place, key in enumerate(keys) if key in common)
    return _chosen(documents, np.array([place for _, place in order], np.int64))


def _chosen(documents: Documents, chosen: NDArray[Any]) -> Documents:
    return replace(
        documents,
        value=documents.value[:, chosen],
        **{name: getattr(documents, name)[chosen] for name in ("stage", "item", "n_tokens", "n_bytes")},
    )


@dataclass(frozen=True)
class _Cell:
    """Losses of all arms on one group of documents of one period (or of all)."""

    by_seed: Mapping[str, Mapping[int, Array]]
    """Arm -> seed -> loss of row 0 and of the last row, ``[2]``."""
    resampled: Mapping[str, Array]
    """Arm -> the same for the mean over seeds, on resampled documents, ``[B, 2]``."""
    n_documents: int

    @classmethod
    def of(
        cls, losses: _Losses, arms: Sequence[Arm], group: str, period: int | None, unit: Unit, n_resamples: int
    ) -> _Cell:
        mask = losses.mask(group, period)
        by_seed, means = {}, []
        for arm in arms:
            # One column: all documents of the cell together, whatever their period.
            found = {
                seed: replace(chosen, stage=np.zeros(chosen.n, np.int64))
                for seed, chosen in ((s, _chosen(d, mask)) for s, d in losses.documents[arm.name].items())
            }
            by_seed[arm.name] = {seed: documents.matrix(unit).values[:, 0] for seed, documents in found.items()}
            mean = np.mean([documents.value for documents in found.values()], axis=0)
            means.append(replace(next(iter(found.values())), value=mean))
        matrices = resample(means, unit, [0], n_resamples=n_resamples, root="arms")
        resampled = {arm.name: matrix.values[:, :, 0] for arm, matrix in zip(arms, matrices, strict=True)}
        return cls(by_seed, resampled, int(mask.sum()))

    def mean(self, arm: str) -> Array:
        """Return the losses of an arm, mean over seeds, ``[2]``."""
        mean: Array = np.mean(list(self.by_seed[arm].values()), axis=0)
        return mean


def _contrasts(
    cell: _Cell, arms: Sequence[Arm], control: str, group: str, period: int | None, row: int
) -> list[Contrast]:
    """Return control minus base, and every other arm minus control."""
    base = {seed: values[0] for seed, values in cell.by_seed[control].items()}
    after = {seed: values[1] for seed, values in cell.by_seed[control].items()}
    seeds = sorted(after)
    found = [
        Contrast(
            what=f"{control} - base",
            group=group,
            period=period,
            row=row,
            over_seeds=t_interval([after[s] - base[s] for s in seeds]),
            over_documents=_over_documents(
                cell.mean(control)[1] - cell.mean(control)[0],
                cell.resampled[control][:, 1] - cell.resampled[control][:, 0],
                cell.n_documents,
            ),
        )
    ]
    for arm in arms:
        if arm.name == control:
            continue
        common = sorted(set(arm.runs) & set(after))
        mine, theirs = [cell.by_seed[arm.name][s][1] for s in common], [after[s] for s in common]
        found.append(
            Contrast(
                what=f"{arm.name} - {control}",
                group=group,
                period=period,
                row=row,
                over_seeds=paired_t(mine, theirs),
                over_documents=_over_documents(
                    cell.mean(arm.name)[1] - cell.mean(control)[1],
                    cell.resampled[arm.name][:, 1] - cell.resampled[control][:, 1],
                    cell.n_documents,
                ),
                effects=paired_g(mine, theirs),
            )
        )
    return found


def _over_documents(value: float, resamples: Array, n_documents: int) -> Interval:
    return bootstrap_interval(float(value), resamples, n_documents)


# --- doses


def _slope(cell: _Cell, arms: Sequence[Arm], group: str, row: int) -> Slope | None:
    """Return the slope over the arms that have a dose; None with fewer than three doses."""
    dosed = [(arm.name, arm.dose) for arm in arms if arm.dose is not None]
    n_doses = len({dose for _, dose in dosed})
    if n_doses < 3:
        return None
    points = [(dose, values[1]) for name, dose in dosed for values in cell.by_seed[name].values()]
    means = np.array([cell.mean(name)[1] for name, _ in dosed])
    doses = np.array([dose for _, dose in dosed])
    resampled = np.stack([cell.resampled[name][:, 1] for name, _ in dosed], axis=1)
    return Slope(
        group=group,
        row=row,
        n_doses=n_doses,
        over_runs=slope_interval([dose for dose, _ in points], [loss for _, loss in points]),
        over_documents=bootstrap_interval(slope(doses, means), slope(doses, resampled), cell.n_documents),
        spearman=spearman(doses, means),
    )


def slope(x: ArrayLike, y: ArrayLike) -> Any:
    """Return the least-squares slope of y on x: ``sum (x - mx)(y - my) / sum (x - mx)^2``; y may be ``[B, n]``."""
    at, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centred = at - at.mean()
    return values @ centred / (centred @ centred)


def slope_interval(x: ArrayLike, y: ArrayLike, level: float = LEVEL) -> Interval:
    """Return the least-squares slope with ``t(n - 2) s / sqrt(sum (x - mx)^2)``, s from the residuals."""
    at, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, value = len(at), float(slope(x, y))
    if n < 3:
        return Interval(value, n=n, reason="two points lie on a line: nothing tells how exact it is")
    centred = at - at.mean()
    residuals = values - values.mean() - value * centred
    error = math.sqrt(float(residuals @ residuals) / (n - 2) / float(centred @ centred))
    half = float(special.stdtrit(n - 2, (1 + level) / 2)) * error
    p = float(2 * special.stdtr(n - 2, -abs(value) / error)) if error > 0 else math.nan
    return Interval(value, value - half, value + half, n, "t over runs", p)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return the rank correlation; NaN where one side does not vary. Ties share their mean rank."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (x, y)]
    first, second = (r - r.mean() for r in ranks)
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale > 0 else math.nan


def _ranks(values: Array) -> Array:
    less = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    ranks: Array = less + (equal + 1) / 2
    return ranks


# --- effect sizes


def paired_g(junk: ArrayLike, control: ArrayLike) -> dict[str, Effect]:
    """Return Hedges' g of paired values both ways: mean(d) / sd(d, ddof = 1), times a factor J for small n.

    ``paper``: J = 1 - 3 / (4 n - 9), as the junk paper's figure has it (n = 4 models: 4/7); below n = 4 it is no factor
    between 0 and 1, so undefined. ``paired``: J = 1 - 3 / (4 (n - 1) - 1), n - 1 degrees of freedom, from n = 3.
    Neither knows how large a difference is: they say how alike the pairs are.
    """
    d = np.asarray(junk, np.float64) - np.asarray(control, np.float64)
    n = len(d)
    spread = float(d.std(ddof=1)) if n > 1 else 0.0

    def effect(factor: float, least: int) -> Effect:
        if n < least:
            return Effect(math.nan, df=max(0, n - 1), reason=f"fewer than {least} pairs")
        if spread == 0:
            return Effect(math.nan, df=n - 1, reason="no variance")
        return Effect(factor * float(d.mean()) / spread, df=n - 1)

    return {
        "paper": effect(1 - 3 / (4 * n - 9), 4),
        "paired": effect(1 - 3 / (4 * (n - 1) - 1), 3),
    }
