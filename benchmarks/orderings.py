"""Did the published orderings hold? Tables and verdicts from run folders, as Markdown or JSON.

    python -m benchmarks.orderings runs/codedocs-nano runs/nano-shuffled > orderings.md

Give the runs of ``benchmarks.grid``: every track gets a table (Backward, In-distribution and Forward regret against its
own oracle, and FLOPs) and one verdict for each ordering of TiC-LM (arXiv 2504.02107) and of the replay table of Ibrahim
et al. (arXiv 2403.08763). An ordering is a list of claims "this number is above 0", where the number is computed per
seed from the arms of that seed, so everything the seed shares cancels. With a 95 % t-interval over seeds a claim

    held                   when the interval lies above 0,
    did not hold           when it lies below 0,
    cannot be told         when it contains 0, or there are fewer than two seeds,
    not run                when an arm is missing.

An ordering held when all its claims held, and did not when one did not. Intervals are not adjusted for their number.
Where the papers say "near", "barely" or "next to nothing", the claim says what that is taken to mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid import SCHEDULES
from clbench.errors import ClbenchError
from clbench.results import metrics, stats
from clbench.results.matrix import Matrix, stage_indices
from clbench.results.slices import slices_of
from clbench.results.store import RunStore, find_runs
from clbench.results.summary import group_runs, summarise

HELD, NOT_HELD, UNTOLD, NOT_RUN = "held", "did not hold", "cannot be told at this scale", "not run"
BACKWARD, ID, FORWARD = "backward", "in_distribution", "forward"
TITLES = {BACKWARD: "Backward", ID: "In-distribution", FORWARD: "Forward"}
SUMMARIES: dict[str, Callable[..., metrics.Value]] = {
    BACKWARD: metrics.backward,
    ID: metrics.in_distribution,
    FORWARD: metrics.forward,
}
SCHEDULE_NAMES = {spec.partition(":")[0] for spec in SCHEDULES}
THREE_DIGITS = 0.0005
"""Two numbers that agree to three digits differ by less."""


# --- arms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One cell of the experiment: a schedule, a share of new text, and whatever else was composed."""

    schedule: str = "cyclic-cosine"
    new: str = "none"
    """``none`` without replay, else replay's ``fraction``, the share of new text."""
    rest: tuple[str, ...] = ()

    def __str__(self) -> str:
        replay = [] if self.new == "none" else [f"replay {self.new}"]
        hidden = bool(self.rest) and self.schedule == "cyclic-cosine"
        return " + ".join([*([] if hidden else [self.schedule]), *self.rest, *replay])


CYCLIC, AR = Arm(), Arm("cosine-ar")
HALF, ONE_OVER_T = Arm(new="1/2"), Arm(new="1/t")
FROZEN = Arm(rest=("frozen",))
SERIES = "oracle-series"
"""The method name of `clbench oracle` with several cutoffs."""


def arm_of(method: Mapping[str, Any]) -> Arm:
    """Return the arm of a run from ``method`` of its run.yaml: the label, and the components with all options."""
    label, components = str(method["label"]), list(method.get("components", []))
    pattern = r"\+".join(rf"{re.escape(str(part['name']))}(?::(.*?))?" for part in components)
    match = re.fullmatch(pattern, label)
    if not components or match is None:
        return Arm(rest=(label,))
    schedule, new, rest = CYCLIC.schedule, "none", []
    for part, changed in zip(components, match.groups(), strict=True):
        name, options = str(part["name"]), dict(part.get("options", {}))
        spec = f"{name}:{changed}" if changed else name
        if name == "rsqrt" and "reading=" not in spec:
            spec = f"rsqrt:reading={options.get('reading')}" + (f",{changed}" if changed else "")
        if name in SCHEDULE_NAMES:
            schedule = spec
        elif name == "replay":
            new = new_share(str(options.get("fraction", "1/2")))
        elif spec != "sequential":
            rest.append(spec)
    return Arm(schedule, new, tuple(rest))


def new_share(fraction: str) -> str:
    """Return one spelling of replay's share of new text; ``none`` where all of it is."""
    if fraction.replace(" ", "") == "1/t":
        return "1/t"
    share = Fraction(fraction).limit_denominator(10_000)
    return "none" if share == 1 else str(share)


# --- what was measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one arm came to on one track."""

    arm: Arm
    label: str
    values: dict[str, dict[int, float]]
    """Summary -> seed -> nats per token; regret where the track has an oracle."""
    losses: dict[str, dict[int, float]]
    """The same without the oracle."""
    diagonal: dict[int, list[float]] = field(default_factory=dict)
    """Seed -> loss of each checkpoint on its own period, k = 1, 2 …"""
    flops: dict[str, float] = field(default_factory=dict)
    """Purpose -> mean over seeds, evaluation left out."""
    stores: tuple[RunStore, ...] = field(default=(), repr=False)

    @property
    def seeds(self) -> list[int]:
        """The seeds that were measured."""
        return sorted(self.values[BACKWARD])


Outcomes = dict[Arm, Outcome]


@dataclass(frozen=True, kw_only=True)
class TrackOutcomes:
    """All arms of one track."""

    track: dict[str, Any]
    regret: bool
    outcomes: Outcomes
    notes: list[str]


def read_tracks(runs: Sequence[RunStore], *, first_column: int) -> list[TrackOutcomes]:
    """Return the arms of every track; runs without all their rows are left out and named."""
    by_track: dict[str, list[RunStore]] = {}
    waiting: dict[str, list[str]] = {}
    for store in runs:
        config = store.config()
        name = str(config["track"]["sha256"])
        if set(store.stages_done()) >= set(stage_indices(store)):
            by_track.setdefault(name, []).append(store)
        else:
            waiting.setdefault(name, []).append(f"{config['method']['label']} seed {config['seed']}")
    return [read_track(stores, waiting.get(name, []), first_column) for name, stores in by_track.items()]


def read_track(stores: Sequence[RunStore], waiting: Sequence[str], first_column: int) -> TrackOutcomes:
    """Return the arms of one track; of two labels for one arm the one with more seeds is taken."""
    outcomes: Outcomes = {}
    notes = [f"not done, left out: {', '.join(waiting)}"] if waiting else []
    track: dict[str, Any] = {}
    for group in group_runs(stores).values():
        outcome, track = outcome_of(group, first_column)
        known = outcomes.get(outcome.arm)
        if known is not None:
            dropped = min(known, outcome, key=lambda one: len(one.seeds))
            notes.append(f"{known.label} and {outcome.label} are the same arm; {dropped.label} is left out")
            outcome = outcome if dropped is known else known
        outcomes[outcome.arm] = outcome
    return TrackOutcomes(track=track, regret=bool(track.get("oracle")), outcomes=outcomes, notes=notes)


def outcome_of(group: Sequence[RunStore], first_column: int) -> tuple[Outcome, dict[str, Any]]:
    """Return what the seeds of one method came to, and their track."""
    summary = summarise(group)
    columns = [int(stage["index"]) for stage in summary.stages]
    oracle = summary.oracle["nats_per_token"]
    matrices = {seed: one.matrix("nats_per_token", columns) for seed, one in summary.documents.items()}
    found: dict[str, dict[str, dict[int, float]]] = {"values": {}, "losses": {}}
    for name, metric in SUMMARIES.items():
        for kind, normaliser in (("values", oracle), ("losses", None)):
            found[kind][name] = {
                seed: metric(matrix, normaliser, first_column=first_column).value for seed, matrix in matrices.items()
            }
    outcome = Outcome(
        arm=arm_of(group[0].config()["method"]),
        label=summary.label,
        diagonal={seed: diagonal_of(matrix) for seed, matrix in matrices.items()},
        flops={purpose: n for purpose, n in summary.bill.flops.items() if purpose != "evaluate"},
        stores=tuple(group),
        **found,
    )
    return outcome, summary.track


def diagonal_of(matrix: Matrix) -> list[float]:
    """Return the loss of every trained checkpoint on its own period."""
    return [float(matrix.at(k, k)) for k in matrix.row_stages if k >= 1 and k in matrix.column_stages]


# --- claims -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One claim, "this number is above 0", and what the runs say."""

    claim: str
    verdict: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n_seeds: int = 0
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """A published ordering and its verdict."""

    source: str
    text: str
    findings: list[Finding]

    @property
    def verdict(self) -> str:
        """``held`` when every claim that was run did, ``did not hold`` when one did not."""
        verdicts = {finding.verdict for finding in self.findings} - {NOT_RUN}
        for verdict in (NOT_HELD, UNTOLD, HELD):
            if verdict in verdicts:
                return verdict
        return NOT_RUN

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        findings = [{k: clean(v) for k, v in asdict(finding).items()} for finding in self.findings]
        return {"source": self.source, "text": self.text, "verdict": self.verdict, "claims": findings}


def above_zero(claim: str, per_seed: Mapping[int, float] | None, *, missing: str = "") -> Finding:
    """Return the verdict on a number that is claimed to be above 0, one value a seed; None where an arm is missing."""
    if not per_seed:
        return Finding(claim=claim, verdict=NOT_RUN, reason=missing or "an arm has no run")
    values = [per_seed[seed] for seed in sorted(per_seed)]
    interval = stats.t_interval(values)
    low, high = interval.low, interval.high
    if len(values) > 1 and math.isnan(low) and not math.isnan(interval.value):
        low = high = interval.value  # no seed differs from another: a point
    verdict = HELD if low > 0 else NOT_HELD if high < 0 else UNTOLD
    return Finding(
        claim=claim,
        verdict=verdict,
        value=interval.value,
        low=low,
        high=high,
        n_seeds=len(values),
        reason=interval.reason,
    )


def combined(
    outcomes: Outcomes, terms: Mapping[Arm, float], metric: str, *, kind: str = "values"
) -> dict[int, float] | None:
    """Return sum of factor * summary over arms, per common seed; None where an arm is missing."""
    if any(arm not in outcomes for arm in terms):
        return None
    tables = {arm: getattr(outcomes[arm], kind)[metric] for arm in terms}
    seeds = set.intersection(*(set(table) for table in tables.values()))
    return {seed: sum(factor * tables[arm][seed] for arm, factor in terms.items()) for seed in seeds}


def greater(outcomes: Outcomes, high: Arm, low: Arm, metric: str) -> Finding:
    """Return the verdict on "arm ``high`` has the larger loss"."""
    lacking = ", ".join(str(arm) for arm in (high, low) if arm not in outcomes)
    return above_zero(
        f"{TITLES[metric]}: {high} > {low}",
        combined(outcomes, {high: 1, low: -1}, metric),
        missing=f"no run of {lacking}",
    )


def equal(outcomes: Outcomes, a: Arm, b: Arm, metric: str, *, claimed: bool) -> Finding:
    """Return the verdict on "the two agree to three digits" (or on "they do not")."""
    claim = f"{TITLES[metric]}: |{a} - {b}| {'<' if claimed else '>'} {THREE_DIGITS}"
    differences = combined(outcomes, {a: 1, b: -1}, metric)
    gap = above_zero(claim, differences, missing=f"no run of {a} or of {b}")
    if gap.verdict == NOT_RUN or math.isnan(gap.low):
        return gap
    within = gap.low > -THREE_DIGITS and gap.high < THREE_DIGITS
    outside = gap.low > THREE_DIGITS or gap.high < -THREE_DIGITS
    verdict = UNTOLD if not (within or outside) else HELD if within == claimed else NOT_HELD
    return Finding(**{**asdict(gap), "verdict": verdict})


# --- TiC-LM's orderings -----------------------------------------------------------------------------------------------


def trained(outcomes: Outcomes) -> Outcomes:
    """Return the arms that train on the stream and are no oracle."""
    return {arm: one for arm, one in outcomes.items() if arm != FROZEN and not (arm.rest and named(arm, SERIES))}


def grid_of(outcomes: Outcomes) -> Outcomes:
    """Return schedule x replay alone."""
    return {arm: one for arm, one in outcomes.items() if not arm.rest}


def never_updated(outcomes: Outcomes) -> Ordering:
    """1. Never updated is worst."""
    findings = []
    for metric in SUMMARIES:
        others = trained(outcomes)
        worst = max(others, key=lambda arm: np.mean(list(others[arm].values[metric].values())), default=None)
        if worst is None or FROZEN not in outcomes:
            findings.append(above_zero(f"{TITLES[metric]}: frozen > every other", None, missing="no run of frozen"))
        else:
            findings.append(greater(outcomes, FROZEN, worst, metric))
    return Ordering(
        source="TiC-LM 1",
        text="The model that is never updated is worst on all three summaries (compared with the worst other arm).",
        findings=findings,
    )


def backward_order(outcomes: Outcomes) -> Ordering:
    """2. Backward: cyclic > AR > any replay; replay 1/2 + AR near the oracle series."""
    replays = [Arm(schedule, new) for schedule in (CYCLIC.schedule, AR.schedule) for new in ("1/2", "1/t")]
    best = Arm(AR.schedule, "1/2")
    # The oracle itself has regret 0: it stands in where no series of oracles was run.
    series = under_cyclic(outcomes, SERIES)[:1]
    terms = {CYCLIC: 1.0, best: -2.0} | dict.fromkeys(series, 1.0)
    target = str(series[0]) if series else "the oracle (regret 0; no series was run)"
    near = above_zero(
        f"Backward: {best} is nearer to {target} than to {CYCLIC}",
        combined(outcomes, terms, BACKWARD),
        missing=f"no run of {best} or of {CYCLIC}",
    )
    return Ordering(
        source="TiC-LM 2",
        text="Backward: cyclic cosine without replay > + AR > any replay; replay 1/2 + AR is near the oracle series.",
        findings=[
            greater(outcomes, CYCLIC, AR, BACKWARD),
            *(greater(outcomes, AR, replay, BACKWARD) for replay in replays),
            near,
        ],
    )


def in_distribution_order(outcomes: Outcomes) -> Ordering:
    """3. In-distribution: the reverse, and 1/t worsens with t."""
    slopes = None
    if CYCLIC in outcomes and ONE_OVER_T in outcomes:
        plain, replay = outcomes[CYCLIC].diagonal, outcomes[ONE_OVER_T].diagonal
        slopes = {seed: slope(np.subtract(replay[seed], plain[seed])) for seed in set(plain) & set(replay)}
    return Ordering(
        source="TiC-LM 3",
        text="In-distribution: the reverse. Cyclic cosine is best, AR and replay raise it, 1/t most and more with t.",
        findings=[
            greater(outcomes, AR, CYCLIC, ID),
            greater(outcomes, HALF, CYCLIC, ID),
            greater(outcomes, ONE_OVER_T, CYCLIC, ID),
            greater(outcomes, ONE_OVER_T, HALF, ID),
            above_zero(f"In-distribution: {ONE_OVER_T} - {CYCLIC} rises with the stage (slope, nats a stage)", slopes),
        ],
    )


def slope(values: np.ndarray) -> float:
    """Return the least-squares slope of values over their places."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 1 else math.nan


def between(outcomes: Outcomes, arms: Sequence[Arm]) -> list[Finding]:
    """4 and 6. These arms lie between cyclic cosine and AR on Backward."""
    return [
        finding
        for arm in arms
        for finding in (greater(outcomes, CYCLIC, arm, BACKWARD), greater(outcomes, arm, AR, BACKWARD))
    ]


def other_schedules(outcomes: Outcomes) -> Ordering:
    """4. Rsqrt and schedule-free."""
    return Ordering(
        source="TiC-LM 4",
        text="Backward: reciprocal square root and schedule-free lie between cyclic cosine and + AR.",
        findings=between(outcomes, [Arm(s) for s in SCHEDULES if s.startswith(("rsqrt", "schedule-free"))]),
    )


def elastic(outcomes: Outcomes) -> Ordering:
    """6. EWC."""
    text = "Backward: EWC lies between cyclic cosine and + AR."
    findings = between(outcomes, under_cyclic(outcomes, "ewc"))
    return Ordering(source="TiC-LM 6", text=text, findings=findings or not_run("no run of ewc"))


def under_cyclic(outcomes: Outcomes, name: str) -> list[Arm]:
    """Return the arms that are one method, whatever its options, under cyclic cosine and nothing else."""
    return [arm for arm in outcomes if arm.rest and arm == Arm(rest=arm.rest[:1]) and named(arm, name)]


def named(arm: Arm, name: str) -> bool:
    """Return whether the first method besides schedule and replay is called so."""
    return arm.rest[0].partition(":")[0] == name


def not_run(why: str) -> list[Finding]:
    """Return what stands where an arm or a track is missing, so that its absence is plain."""
    return [above_zero("", None, missing=why)]


def distillation(outcomes: Outcomes) -> Ordering:
    """5. LwF as TiC-LM released it is cyclic cosine; with the right KL it is not."""
    arms = under_cyclic(outcomes, "lwf")
    findings = [equal(outcomes, arm, CYCLIC, m, claimed="tic" in arm.rest[0]) for arm in arms for m in SUMMARIES]
    return Ordering(
        source="TiC-LM 5",
        text="LwF as released is cyclic cosine to three digits; with the KL summed over the vocabulary it does not.",
        findings=findings or not_run("no run of lwf"),
    )


def forward_spread(outcomes: Outcomes) -> Ordering:
    """7. Forward barely separates methods."""
    arms = grid_of(outcomes)
    spreads = {metric: spread(arms, metric) for metric in (BACKWARD, FORWARD)}
    gaps = {seed: spreads[BACKWARD][seed] / 2 - spreads[FORWARD][seed] for seed in spreads[BACKWARD]}
    return Ordering(
        source="TiC-LM 7",
        text="Forward barely separates methods (in the paper its range is 0.4 of Backward's).",
        findings=[
            above_zero(
                f"half the range of Backward > the range of Forward, over {len(arms)} arms",
                gaps if len(arms) > 1 else None,
                missing="fewer than two arms",
            )
        ],
    )


def spread(outcomes: Outcomes, metric: str) -> dict[int, float]:
    """Return largest minus smallest summary over the arms, per seed that all have."""
    tables = [one.values[metric] for one in outcomes.values()]
    seeds = set.intersection(*(set(table) for table in tables)) if tables else set()
    return {seed: float(np.ptp([table[seed] for table in tables])) for seed in seeds}


def reversal(outcomes: Outcomes) -> Ordering:
    """8. Replay reverses sign on fast-changing domains."""
    text = "Replay 1/2 makes Backward worse on some domain (package) while it makes it better on the whole."
    if not (CYCLIC in outcomes and HALF in outcomes):
        findings = not_run(f"no run of {HALF} or of {CYCLIC}")
    else:
        tables = [by_group(outcomes[arm].stores) for arm in (HALF, CYCLIC)]
        findings = [greater(outcomes, CYCLIC, HALF, BACKWARD), reversed_somewhere(*tables)]
    return Ordering(source="TiC-LM 8", text=text, findings=findings)


def by_group(stores: Sequence[RunStore]) -> dict[str, dict[int, float]]:
    """Return package -> seed -> Backward loss on its documents; packages where it is undefined are left out."""
    found = {one.name: one.scores[BACKWARD].per_seed for one in slices_of(stores, "group", metrics=(BACKWARD,))}
    return {name: values for name, values in found.items() if all(map(math.isfinite, values.values()))}


def reversed_somewhere(replay: Mapping[str, Mapping[int, float]], plain: Mapping[str, Mapping[int, float]]) -> Finding:
    """Return the verdict on "replay - none is above 0 for some group": Holm over groups, since the best is picked."""
    names = sorted(set(replay) & set(plain))
    intervals = {}
    for name in names:
        seeds = sorted(set(replay[name]) & set(plain[name]))
        intervals[name] = stats.paired_t([replay[name][s] for s in seeds], [plain[name][s] for s in seeds])
    claim = f"Backward: replay > none in at least one of {len(names)} packages (Holm over packages)"
    if not names:
        return above_zero(claim, None, missing="no package has a Backward")
    adjusted = dict(zip(names, stats.holm([p_of(intervals[name]) for name in names]), strict=True))
    top = max(names, key=lambda name: intervals[name].value)
    risen = [name for name in names if adjusted[name] < 0.05 and intervals[name].value > 0]
    fallen = [name for name in names if adjusted[name] < 0.05 and intervals[name].value < 0]
    shown = intervals[risen[0] if risen and top not in risen else top]
    return Finding(
        claim=claim,
        verdict=HELD if risen else NOT_HELD if len(fallen) == len(names) else UNTOLD,
        value=shown.value,
        low=shown.low,
        high=shown.high,
        n_seeds=shown.n,
        reason=f"shown: {top}, the largest; above 0: {', '.join(risen) or 'none'}; below 0: {len(fallen)}",
    )


def p_of(interval: stats.Interval) -> float:
    """Return the p-value of zero; differences that are the same in every seed leave no doubt."""
    if interval.n > 1 and math.isnan(interval.p) and math.isfinite(interval.value):
        return 1.0 if interval.value == 0 else 0.0
    return interval.p


def larger_budget(small: TrackOutcomes, large: TrackOutcomes | None) -> Ordering:
    """9. A larger continual budget; the two tracks differ in nothing else."""
    text = "A larger budget makes Backward worse and In-distribution better without replay, with replay both better"
    if large is None:
        return Ordering(source="TiC-LM 9", text=f"{text}.", findings=not_run("no track with a larger budget"))
    budgets = [one.track["training"]["n_tokens_per_stage"] for one in (small, large)]

    def difference(arm: Arm, metric: str, sign: float) -> Finding:
        claim = f"{TITLES[metric]}, {arm}: {'larger' if sign > 0 else 'smaller'} with {budgets[1]:,} tokens a stage"
        if arm not in small.outcomes or arm not in large.outcomes:
            return above_zero(claim, None, missing=f"no run of {arm} on both tracks")
        before, after = small.outcomes[arm].losses[metric], large.outcomes[arm].losses[metric]
        return above_zero(claim, {seed: sign * (after[seed] - before[seed]) for seed in set(before) & set(after)})

    return Ordering(
        source="TiC-LM 9",
        text=f"{text} ({budgets[0]:,} to {budgets[1]:,} tokens a stage; losses, so one normaliser for both).",
        findings=[
            difference(CYCLIC, BACKWARD, 1),
            difference(CYCLIC, ID, -1),
            difference(HALF, BACKWARD, -1),
            difference(HALF, ID, -1),
        ],
    )


# --- Ibrahim's replay table -------------------------------------------------------------------------------------------


def shares_of(outcomes: Outcomes) -> list[tuple[float, Arm]]:
    """Return (share of old text, arm) of the constant shares under cyclic cosine, ascending."""
    arms = [arm for arm in outcomes if arm == Arm(new=arm.new) and arm.new != "1/t"]
    return sorted((0.0 if arm.new == "none" else float(1 - Fraction(arm.new)), arm) for arm in arms)


def replay_table(outcomes: Outcomes) -> list[Ordering]:
    """Old text better and new text worse with every step of the replay share; small shares cost next to nothing."""
    shares = shares_of(outcomes)
    steps = list(itertools.pairwise(shares))
    small = [(share, arm) for share, arm in shares if 0 < share <= 0.05]
    cheap = []
    for share, arm in small:
        fall = combined(outcomes, {CYCLIC: 1, arm: -1}, BACKWARD)
        rise = combined(outcomes, {arm: 1, CYCLIC: -1}, ID)
        claim = f"{share:.1%} old: a tenth of the fall of Backward > the rise of In-distribution"
        cost = {seed: fall[seed] / 10 - rise[seed] for seed in fall} if fall and rise else None
        cheap.append(above_zero(claim, cost, missing=f"no run of {CYCLIC}"))
    none = not_run("fewer than two shares of replay")

    def monotone(metric: str, *, falls: bool) -> list[Finding]:
        found = []
        for (low, a), (high, b) in steps:
            terms = {a: 1.0, b: -1.0} if falls else {a: -1.0, b: 1.0}
            claim = f"{TITLES[metric]} {'falls' if falls else 'rises'} from {low:.1%} to {high:.1%} old"
            found.append(above_zero(claim, combined(outcomes, terms, metric)))
        return found or none

    return [
        Ordering(
            source="Ibrahim 1",
            text="Loss on old text falls with every step of the replay share.",
            findings=monotone(BACKWARD, falls=True),
        ),
        Ordering(
            source="Ibrahim 2",
            text="Loss on new text rises with every step of the replay share.",
            findings=monotone(ID, falls=False),
        ),
        Ordering(
            source="Ibrahim 3",
            text="Shares up to 5 % cost next to nothing on new text: less than a tenth of what they save on old text.",
            findings=cheap or none,
        ),
    ]


def orderings_of(here: TrackOutcomes, larger: TrackOutcomes | None = None) -> list[Ordering]:
    """Return all orderings of one track; ``larger`` is the same track with a larger budget."""
    outcomes = here.outcomes
    return [
        never_updated(outcomes),
        backward_order(outcomes),
        in_distribution_order(outcomes),
        other_schedules(outcomes),
        distillation(outcomes),
        elastic(outcomes),
        forward_spread(outcomes),
        reversal(outcomes),
        larger_budget(here, larger),
        *replay_table(outcomes),
    ]


def larger_of(here: TrackOutcomes, tracks: Sequence[TrackOutcomes]) -> TrackOutcomes | None:
    """Return the track that differs from this one in nothing but a larger budget a stage, the smallest such."""

    def protocol(one: TrackOutcomes) -> dict[str, Any]:
        own = ("name", "version", "description", "sha256", "oracle", "row0", "training")
        training = {k: v for k, v in one.track.get("training", {}).items() if k != "n_tokens_per_stage"}
        return {k: v for k, v in one.track.items() if k not in own} | {"training": training}

    def budget(one: TrackOutcomes) -> int:
        return int(one.track.get("training", {}).get("n_tokens_per_stage", 0))

    found = [one for one in tracks if budget(one) > budget(here) and protocol(one) == protocol(here)]
    return min(found, key=budget, default=None)


# --- output -----------------------------------------------------------------------------------------------------------


def flops_parts(outcome: Outcome, unit: float) -> dict[str, float]:
    """Return training, decay branches and everything else, in units of sequential training."""
    names = {"train": "train", "decay_branch": "branch"}
    parts = {"train": 0.0, "branch": 0.0, "other": 0.0}
    for purpose, flops in outcome.flops.items():
        parts[names.get(purpose, "other")] += flops / unit
    return parts


def table_rows(here: TrackOutcomes) -> list[dict[str, Any]]:
    """Return one row an arm: the grid in its order, then the rest."""
    names = [spec.partition(":")[0] for spec in SCHEDULES]
    arms = sorted(
        here.outcomes,
        key=lambda a: (a.rest, names.index(a.schedule.partition(":")[0]), a.schedule, share_key(a.new)),
    )
    trained = sorted(one.flops["train"] for one in here.outcomes.values() if one.flops.get("train"))
    unit = trained[len(trained) // 2] if trained else 1.0  # every arm trains on the same tokens
    rows = []
    for arm in arms:
        one = here.outcomes[arm]
        scores = {metric: stats.t_interval([one.values[metric][seed] for seed in one.seeds]) for metric in SUMMARIES}
        parts = flops_parts(one, unit)
        rows.append(
            {
                "arm": arm,
                "label": one.label,
                "seeds": one.seeds,
                **scores,
                "flops": {**parts, "total": sum(parts.values())},
                "flops_sequential": unit,
            }
        )
    return rows


def share_key(new: str) -> float:
    """Return the place of a share of new text: none, then ever less of it, 1/t last."""
    return 0.0 if new == "none" else 2.0 if new == "1/t" else float(1 - Fraction(new))


def number(value: float, low: float = math.nan, high: float = math.nan, digits: int = 3) -> str:
    """Return a value with its interval."""
    bounds = "" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return ("–" if math.isnan(value) else f"{value:.{digits}f}") + bounds


def markdown(here: TrackOutcomes, orderings: Sequence[Ordering]) -> str:
    """Return the table and the verdicts of one track."""
    what = "regret against the track's oracle" if here.regret else "loss; the track has no oracle"
    lines = [
        f"## {here.track['name']}",
        "",
        f"Nats per token, {what}; mean and 95 % t-interval over seeds. FLOPs in units of sequential training: "
        "training + decay branches + other, evaluation left out.",
        "",
        "| schedule | replay (new text) | seeds | Backward | In-distribution | Forward | FLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table_rows(here):
        arm, flops = row["arm"], row["flops"]
        shown = [number(i.value, i.low, i.high) for i in (row[metric] for metric in SUMMARIES)]
        cost = f"{flops['train']:.2f} + {flops['branch']:.2f} + {flops['other']:.2f} = {flops['total']:.2f}"
        name = str(Arm(arm.schedule, rest=arm.rest))
        lines.append(f"| {name} | {arm.new} | {len(row['seeds'])} | {' | '.join(shown)} | {cost} |")
    lines += ["", "| ordering | verdict | claims that held |", "|---|---|---|"]
    for one in orderings:
        run = [f for f in one.findings if f.verdict != NOT_RUN]
        held = sum(f.verdict == HELD for f in run)
        part = f", {len(one.findings) - len(run)} not run" if 0 < len(run) < len(one.findings) else ""
        lines.append(f"| {one.source}. {one.text} | **{one.verdict}** | {held} of {len(run)}{part} |")
    lines += ["", "| | claim (a number above 0, by seed) | number | seeds | verdict |", "|---|---|---|---|---|"]
    for one in orderings:
        for f in one.findings:
            why = f" ({f.reason})" if f.reason else ""
            shown_number = number(f.value, f.low, f.high, 4)
            lines.append(f"| {one.source} | {escaped(f.claim)} | {shown_number} | {f.n_seeds} | {f.verdict}{why} |")
    lines += ["", *(f"* {note}" for note in here.notes)]
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str) -> str:
    """Return text that a Markdown table takes."""
    return text.replace("|", "\\|")


def as_dict(here: TrackOutcomes, orderings: Sequence[Ordering]) -> dict[str, Any]:
    """Return JSON-able values of one track."""
    table = []
    for row in table_rows(here):
        scores = {m: {k: clean(v) for k, v in asdict(row[m]).items()} for m in SUMMARIES}
        table.append({**row, "arm": asdict(row["arm"]), **scores})
    return {
        "track": here.track["name"],
        "regret": here.regret,
        "table": table,
        "orderings": [one.as_dict() for one in orderings],
        "notes": here.notes,
    }


def clean(value: Any) -> Any:
    """Return None for NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or folders that hold runs, of any tracks")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--first-column", type=int, default=0, help="1 leaves out the base's own period, as TiC-LM's summaries do"
    )
    arguments = parser.parse_args(words)
    try:
        tracks = read_tracks(find_runs(arguments.runs), first_column=arguments.first_column)
        found = [(one, orderings_of(one, larger_of(one, tracks))) for one in tracks]
    except ClbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not found:
        print("error: no run in these folders has all its rows; run `python -m benchmarks.grid` first", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps([as_dict(*one) for one in found], indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(markdown(*one) for one in found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
