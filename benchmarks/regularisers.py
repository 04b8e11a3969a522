"""Regularisers beside replay and without it: tune strengths on one track, run the chosen ones on another, judge.

    python -m benchmarks.regularisers tune  --track codedocs-nano-tuning --runs runs --jobs 2
    python -m benchmarks.regularisers final --track codedocs-nano --choices runs/codedocs-nano-tuning.json --runs runs
    python -m benchmarks.regularisers table --choices runs/codedocs-nano-tuning.json runs/codedocs-nano

Arms: {no replay, replay} x ``REGULARISERS``; ``--extra`` adds ``EXTRA_REGULARISERS`` and replay with distillation.

``tune`` runs every arm with the same number of strengths, one a decade (or ``--every`` 2 or 3) over ``N_DECADES``, and
writes the curves of one seed and what follows from them to ``RUNS/TRACK.json``. Units differ between arms, so each has
the middle of its grid (``Regulariser.centre``). The rule, the same for all arms: the strength with the smallest loss of
the last checkpoint, averaged over all periods, nats per token; of equal ones the weakest. A run that diverged counts as
infinitely bad. Flags say where the rule decides little: best at an edge of the grid, ties, no gain over no regulariser.

``final`` runs the chosen strengths for all seeds on the track that is reported; ``table`` prints Markdown (or JSON):
the summaries, paired differences to the arm without regulariser, what it cost, the strength curves, and a verdict for
each ordering published for rank-1 EWC. Runs are those of ``benchmarks.grid``: done ones are left alone, a killed
command goes on when it is given again. The verdicts are counted as in ``benchmarks.orderings``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import grid
from benchmarks.orderings import HELD, NOT_RUN, Finding, Ordering, above_zero, clean, escaped, number
from clbench.errors import ClbenchError, ConfigError, NotFoundError
from clbench.files import write_text
from clbench.registry import load_track, make_method
from clbench.results import knowledge, metrics, stats
from clbench.results.matrix import matrix_of, stage_indices
from clbench.results.store import RunStore, find_runs
from clbench.results.summary import MethodSummary, summarise

FORMAT = 1
RULE = "smallest loss of the last checkpoint, mean over all periods, nats per token; of equal ones the weakest"
N_DECADES = 6
"""A grid spans so many powers of ten, with both ends: seven runs an arm at one strength each, four at every second."""
TIE_NATS = 0.01
"""Two strengths nearer than this are a tie: between three seeds of codedocs-nano the final loss has a standard
deviation of 0.010 (sequential) and 0.005 (replay)."""
PRIMARY = "final"
"""The summary that strengths are chosen by; its differences alone are adjusted for their number (Holm)."""
SHOWN = ("backward", "in_distribution", "forward", "final")
COMPARED = ("final", "backward", "forgetting_first")
FACT_GROUPS = {"kept": "kept, not stated", "updated": "updated"}


# --- arms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regulariser:
    """A method with a strength; ``centre`` is the power of ten in the middle of its grid."""

    name: str
    method: str
    centre: int

    def spec(self, exponent: int) -> str:
        """Return the method with the strength 10**exponent."""
        return f"{self.method}{',' if ':' in self.method else ':'}strength=1e{exponent}"

    def exponents(self, every: int = 1) -> tuple[int, ...]:
        """Return the grid, as powers of ten: one of ``every`` (1, 2, 3 or 6), both ends included."""
        return tuple(range(self.centre - N_DECADES // 2, self.centre + N_DECADES // 2 + 1, every))


DIAGONAL, RANK1 = "diagonal", "rank-1 (c*)"
ONE, RANDOM, WEIGHTS, ISOTROPIC = "rank-1 (c = 1)", "rank-1 (random)", "rank-1 (weights)", "L2-SP"
TOP, PROX = "rank-1 (top)", "rank-1 (prox)"
STEP = -1
"""Centre of the arms whose strength is ``lr lambda rho`` (rank1-ewc:unit=step): from 1e-4 to 1e2, that is from no
effect to far beyond 2, where a penalty is unstable without Adam and clipping."""
LAMBDA = 2
"""Centre of the arms whose strength multiplies the diagonal Fisher, or the isotropic matrix of the same trace."""
REGULARISERS = (
    Regulariser(DIAGONAL, "ewc", LAMBDA),
    Regulariser(RANK1, "rank1-ewc", STEP),
    Regulariser(ONE, "rank1-ewc:scale=one", STEP),
    Regulariser(RANDOM, "rank1-ewc:direction=random", STEP),
    Regulariser(WEIGHTS, "rank1-ewc:direction=weights", STEP),
    Regulariser(ISOTROPIC, "l2-sp:scale=trace", LAMBDA),
)
EXTRA_REGULARISERS = (
    Regulariser(TOP, "rank1-ewc:direction=top", STEP),
    Regulariser(PROX, "rank1-ewc:apply=prox", STEP),
)
NO_REPLAY, REPLAY, KD_REPLAY = "none", "replay", "KD-replay"
COMPANIONS = {NO_REPLAY: "", REPLAY: "replay", KD_REPLAY: "replay + lwf:on=replayed"}


@dataclass(frozen=True)
class Arm:
    """What is beside the regulariser, and which it is; no regulariser is the baseline of its companion."""

    companion: str
    regulariser: Regulariser | None = None

    def spec(self, exponent: int | None = None) -> str:
        """Return the composition, as ``benchmarks.grid`` takes it."""
        own = [] if self.regulariser is None or exponent is None else [self.regulariser.spec(exponent)]
        return " + ".join(filter(None, [COMPANIONS[self.companion], *own])) or "sequential"

    @property
    def baseline(self) -> Arm:
        """The same without the regulariser."""
        return Arm(self.companion)

    def __str__(self) -> str:
        if self.regulariser is None:
            return self.companion
        prefix = "" if self.companion == NO_REPLAY else f"{self.companion} + "
        return f"{prefix}{self.regulariser.name}"


def arms_of(*, extra: bool) -> list[Arm]:
    """Return all arms: baselines first, then the regularisers, each alone and beside replay."""
    companions = [NO_REPLAY, REPLAY, *([KD_REPLAY] if extra else [])]
    found = [Arm(companion) for companion in companions]
    for regulariser in (*REGULARISERS, *(EXTRA_REGULARISERS if extra else ())):
        found += [Arm(NO_REPLAY, regulariser), Arm(REPLAY, regulariser)]
        if extra and regulariser.name == RANK1:
            found.append(Arm(KD_REPLAY, regulariser))
    return found


def arm_named(name: str) -> Arm:
    """Return an arm from its text.

    Raises:
        NotFoundError: there is none of this name.
    """
    for arm in arms_of(extra=True):
        if str(arm) == name:
            return arm
    raise NotFoundError(f"there is no arm {name!r}", mend="tune again with this version of benchmarks.regularisers")


def tuning_specs(arms: Iterable[Arm], every: int = 1) -> list[str]:
    """Return the runs of the sweep: baselines once, everything else at every strength."""
    specs = []
    for arm in arms:
        exponents = [None] if arm.regulariser is None else arm.regulariser.exponents(every)
        specs += [arm.spec(exponent) for exponent in exponents]
    return specs


# --- the choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What an arm came to at every strength, and what follows from that."""

    arm: Arm
    exponents: tuple[int, ...]
    losses: dict[int, float]
    """Exponent -> loss by the rule; infinite where the run diverged, absent where there is no finished run."""
    baseline: float | None
    """The same without the regulariser."""

    @property
    def missing(self) -> tuple[int, ...]:
        """Strengths without a finished run."""
        return tuple(e for e in self.exponents if e not in self.losses)

    @cached_property
    def chosen(self) -> int | None:
        """The strength that the rule takes, as a power of ten; None where every run diverged or none is done."""
        finite = {e: self.losses[e] for e in sorted(self.losses) if math.isfinite(self.losses[e])}
        return min(finite, key=finite.__getitem__, default=None)  # the first, so the weakest, of equal ones

    @property
    def flags(self) -> list[str]:
        """What to know before believing the choice."""
        found = []
        if self.missing:
            found.append(f"not run: {', '.join(f'1e{e}' for e in self.missing)}")
        if diverged := [f"1e{e}" for e in sorted(self.losses) if not math.isfinite(self.losses[e])]:
            found.append(f"diverged: {', '.join(diverged)}")
        if self.chosen is None:
            return [*found, "no strength can be chosen"]
        best = self.losses[self.chosen]
        if self.chosen == self.exponents[0]:
            found.append("best at the weak edge of the grid")
        if self.chosen == self.exponents[-1]:
            found.append("best at the strong edge of the grid")
        near = [e for e, loss in sorted(self.losses.items()) if e != self.chosen and loss - best < TIE_NATS]
        if near:
            found.append(f"tie within {TIE_NATS:g}: {', '.join(f'1e{e}' for e in near)}")
        if self.baseline is not None and self.baseline - best < TIE_NATS:
            found.append(f"gains less than {TIE_NATS:g} over no regulariser")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values; ``spec`` and ``flags`` are there for readers, ``of`` makes them anew."""
        return {
            "arm": str(self.arm),
            "exponents": list(self.exponents),
            "losses": {str(e): clean(loss) for e, loss in sorted(self.losses.items())},
            "baseline": self.baseline,
            "chosen": self.chosen,
            "spec": None if self.chosen is None else self.arm.spec(self.chosen),
            "flags": self.flags,
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Curve:
        """Return the curve that was written so; a loss that is null diverged."""
        losses = {int(e): math.inf if loss is None else float(loss) for e, loss in values["losses"].items()}
        return cls(
            arm=arm_named(values["arm"]),
            exponents=tuple(values["exponents"]),
            losses=losses,
            baseline=values["baseline"],
        )


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The outcome of a sweep: which track and seed, and a curve an arm."""

    track: dict[str, Any]
    """Name, stream and sha256."""
    seed: int
    curves: list[Curve]

    def specs(self) -> list[str]:
        """Return the baselines and every arm at its chosen strength.

        Raises:
            ConfigError: an arm's sweep is not finished, or all of it diverged.
        """
        for curve in self.curves:
            if curve.missing or curve.chosen is None:
                raise ConfigError(
                    f"{curve.arm}: {'; '.join(curve.flags)}",
                    where=f"the sweep on {self.track['name']}",
                    mend="finish `tune`, so that every arm had the same budget",
                )
        baselines = dict.fromkeys(curve.arm.baseline.spec() for curve in self.curves)
        return [*baselines, *(curve.arm.spec(curve.chosen) for curve in self.curves)]

    def write(self, path: Path) -> None:
        """Write JSON."""
        values = {"format": FORMAT, "rule": RULE, "tie_nats": TIE_NATS, "track": self.track, "seed": self.seed}
        values["arms"] = [curve.as_dict() for curve in self.curves]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Choices:
        """Read what ``write`` wrote.

        Raises:
            NotFoundError: there is no such file.
            ConfigError: it is no such file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']}")
            curves = [Curve.of(one) for one in values["arms"]]
            return cls(track=dict(values["track"]), seed=int(values["seed"]), curves=curves)
        except FileNotFoundError:
            raise NotFoundError("the choices are missing", where=path, mend="run `tune` first") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"no choices: {error}", where=path, mend="run `tune` again") from None


Key = tuple[tuple[str, ...], int]
"""Methods and seed."""


def runs_in(folder: Path) -> dict[Key, RunStore]:
    """Return the readable runs below a folder by what they are."""
    found = {}
    for store in find_runs([folder]) if folder.is_dir() else []:
        try:
            config = store.config()
            found[grid.methods_of(str(config.get("command", ""))), int(config["seed"])] = store
        except ClbenchError:
            continue
    return found


def loss_of(store: RunStore | None) -> float | None:
    """Return what the rule compares: infinite if the run diverged, None if there is none or it is not done."""
    if store is None:
        return None
    status = store.status()
    if status["state"] == "failed" and str(status.get("error", "")).startswith("the loss is "):
        return math.inf
    if status["state"] != "done":
        return None
    loss = metrics.final(matrix_of(store)).value
    return math.inf if math.isnan(loss) else loss


def choices_of(track: Mapping[str, Any], folder: Path, arms: Sequence[Arm], seed: int, every: int = 1) -> Choices:
    """Return the choice that the runs in a folder lead to, of one strength in ``every`` decades."""
    runs = runs_in(folder)

    def loss(spec: str) -> float | None:
        return loss_of(runs.get((grid.parts_of(spec), seed)))

    curves = []
    for arm in arms:
        if arm.regulariser is None:
            continue
        tried = {e: loss(arm.spec(e)) for e in arm.regulariser.exponents(every)}
        losses = {e: value for e, value in tried.items() if value is not None}
        baseline = loss(arm.baseline.spec())
        curves.append(Curve(arm=arm, exponents=tuple(tried), losses=losses, baseline=baseline))
    return Choices(track={key: track[key] for key in ("name", "stream", "sha256")}, seed=seed, curves=curves)


# --- the track that is reported ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on the reported track."""

    arm: Arm
    exponent: int | None
    summary: MethodSummary
    facts: dict[str, stats.Interval]
    """Accuracy of the last checkpoint by group of facts; empty where no facts are asked."""

    def per_seed(self, metric: str) -> dict[int, float]:
        """Return a summary by seed."""
        return self.summary.scores[metric].per_seed

    def interval(self, metric: str) -> stats.Interval:
        """Return mean and t-interval over seeds; one seed has none."""
        return stats.t_interval([self.per_seed(metric)[seed] for seed in self.summary.seeds])

    @property
    def flops(self) -> float:
        """All but evaluation."""
        return sum(flops for purpose, flops in self.summary.bill.flops.items() if purpose != "evaluate")


Rows = dict[Arm, Row]


def rows_of(choices: Choices, runs: Sequence[RunStore]) -> tuple[Rows, list[str]]:
    """Return the arms whose runs are done, and what is left out."""
    by_methods: dict[tuple[str, ...], list[RunStore]] = {}
    waiting = []
    for store in runs:
        config = store.config()
        if store.status()["state"] == "done" and set(store.stages_done()) >= set(stage_indices(store)):
            by_methods.setdefault(grid.methods_of(str(config.get("command", ""))), []).append(store)
        else:
            waiting.append(f"{config['method']['label']} seed {config['seed']}")
    wanted = {curve.arm.baseline: None for curve in choices.curves} | {c.arm: c.chosen for c in choices.curves}
    rows, notes = {}, [f"not done, left out: {', '.join(waiting)}"] if waiting else []
    for arm, exponent in wanted.items():
        stores = by_methods.get(grid.parts_of(arm.spec(exponent)))
        if stores and (arm.regulariser is None or exponent is not None):
            rows[arm] = Row(arm=arm, exponent=exponent, summary=summarise(stores), facts=facts_of(stores))
        else:
            notes.append(f"no run of {arm}")
    return rows, notes


def facts_of(stores: Sequence[RunStore]) -> dict[str, stats.Interval]:
    """Return how many facts the last checkpoint knows, kept and updated ones, in the words of the documents."""
    from clbench.cli_facts import read_truth

    if "facts" not in stores[0].config()["track"]["suites"]:
        return {}
    return accuracies(stores, read_truth(stores, None, "facts"))


def accuracies(stores: Sequence[RunStore], truth: knowledge.Truth) -> dict[str, stats.Interval]:
    """Return the shares of ``FACT_GROUPS`` that the last checkpoint answers rightly; t over seeds, Wilson for one."""
    form = knowledge.FORMS[0]
    answers = [knowledge.Answers.of_run(store, truth, form) for store in stores]
    last = len(answers[0].checkpoints) - 1
    scores = {name: knowledge.scores_of(answers, "", form, last, group) for name, group in FACT_GROUPS.items()}
    return {name: one.scores["accuracy"] for name, one in scores.items()}


def difference(rows: Rows, high: Arm, low: Arm, metric: str) -> dict[int, float] | None:
    """Return high - low by common seed; None where an arm is missing."""
    if high not in rows or low not in rows:
        return None
    one, other = rows[high].per_seed(metric), rows[low].per_seed(metric)
    return {seed: one[seed] - other[seed] for seed in sorted(set(one) & set(other))}


def to_baseline(rows: Rows, metric: str) -> dict[Arm, stats.Interval]:
    """Return every regulariser minus the same without it, paired by seed."""
    found = {arm: difference(rows, arm, arm.baseline, metric) for arm in rows if arm.regulariser is not None}
    return {arm: stats.t_interval(list(one.values())) for arm, one in found.items() if one}


def adjusted(differences: Mapping[Arm, stats.Interval]) -> dict[Arm, float]:
    """Return Holm's adjusted p-values over all regularisers of the table."""
    return dict(zip(differences, stats.holm([one.p for one in differences.values()]), strict=True))


# --- what was published -----------------------------------------------------------------------------------------------


def arm_of(name: str, companion: str = NO_REPLAY) -> Arm:
    """Return the arm of a regulariser by name."""
    known = {one.name: one for one in (*REGULARISERS, *EXTRA_REGULARISERS)}
    return Arm(companion, known[name])


def greater(rows: Rows, high: Arm, low: Arm, metric: str) -> Finding:
    """Return the verdict on "arm ``high`` has the larger ``metric``"."""
    lacking = ", ".join(str(arm) for arm in (high, low) if arm not in rows)
    claim = f"{metrics.METRICS[metric].title}: {high} > {low}"
    return above_zero(claim, difference(rows, high, low, metric), missing=f"no run of {lacking}")


def orderings_of(rows: Rows) -> list[Ordering]:
    """Return the orderings of the rank-1 EWC paper's tables, and of our controls.

    Its average FID stands for our final loss, its average forgetting for ours (last minus first).
    """
    best, none, replay = arm_of(RANK1, REPLAY), Arm(NO_REPLAY), Arm(REPLAY)
    others = [none, arm_of(DIAGONAL), arm_of(RANK1), replay, arm_of(DIAGONAL, REPLAY)]

    def ordering(source: str, text: str, *claims: tuple[Arm, Arm, str]) -> Ordering:
        return Ordering(source=source, text=text, findings=[greater(rows, *claim) for claim in claims])

    lost = "forgetting_first"
    return [
        ordering(
            "paper 1",
            "Rank-1 + replay is best of none, diagonal and rank-1, without replay and with it.",
            *((arm, best, PRIMARY) for arm in others),
        ),
        ordering(
            "paper 2", "Rank-1 + replay is better than replay alone.", (replay, best, PRIMARY), (replay, best, lost)
        ),
        ordering(
            "paper 3", "Rank-1 alone forgets more than the diagonal alone.", (arm_of(RANK1), arm_of(DIAGONAL), lost)
        ),
        ordering(
            "paper 4",
            "The diagonal alone is better than no regulariser.",
            (none, arm_of(DIAGONAL), PRIMARY),
            (none, arm_of(DIAGONAL), lost),
        ),
        ordering(
            "paper 5", "Diagonal + replay is worse than replay alone.", (arm_of(DIAGONAL, REPLAY), replay, PRIMARY)
        ),
        ordering(
            "paper 6",
            "The mean gradient is a better direction than the top eigenvector, with replay.",
            (arm_of(TOP, REPLAY), best, PRIMARY),
        ),
        ordering(
            "controls",
            "With replay, the mean gradient with c* is better than every control.",
            *((arm_of(name, REPLAY), best, PRIMARY) for name in (ONE, RANDOM, WEIGHTS, ISOTROPIC)),
        ),
    ]


# --- output -----------------------------------------------------------------------------------------------------------


def table_of(rows: Rows, choices: Choices) -> list[dict[str, Any]]:
    """Return one JSON-able row an arm; differences are to the same without the regulariser."""
    differences = {metric: to_baseline(rows, metric) for metric in COMPARED}
    holm = adjusted(differences[PRIMARY])
    flags = {curve.arm: curve.flags for curve in choices.curves}
    unit = rows[Arm(NO_REPLAY)].flops if Arm(NO_REPLAY) in rows else math.nan
    return [
        {
            "arm": str(arm),
            "companion": arm.companion,
            "strength": None if row.exponent is None else f"1e{row.exponent}",
            "flags": flags.get(arm, []),
            "seeds": row.summary.seeds,
            "scores": {metric: jsonable(row.interval(metric)) for metric in (*SHOWN, "forgetting_first")},
            "differences": {m: jsonable(found[arm]) for m, found in differences.items() if arm in found},
            "p_holm": clean(holm.get(arm, math.nan)),
            "flops": clean(row.flops / unit if unit else math.nan),
            "facts": {name: jsonable(one) for name, one in row.facts.items()},
        }
        for arm, row in rows.items()
    ]


def jsonable(interval: stats.Interval) -> dict[str, Any]:
    """Return an interval with None for NaN."""
    return {key: clean(value) for key, value in asdict(interval).items()}


def shown(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Return a value with its interval, a dash where there is none."""
    if interval is None:
        return "–"
    return number(*(math.nan if interval[key] is None else interval[key] for key in ("value", "low", "high")), digits)


def markdown(rows: Rows, notes: Sequence[str], choices: Choices) -> str:
    """Return tables, curves and verdicts of the reported track."""
    track = next(iter(rows.values())).summary.track
    table, orderings = table_of(rows, choices), orderings_of(rows)
    lines = [
        f"## {track['name']}, strengths chosen on {choices.track['name']}",
        "",
        f"Nats per token, {'regret' if track.get('oracle') else 'loss'} (final: loss); mean and 95 % t-interval over "
        "seeds. Differences: paired by seed, to the same without the regulariser; p of the final loss after Holm over "
        f"{sum(row['strength'] is not None for row in table)} arms. FLOPs: in units of sequential training, evaluation "
        "left out.",
        "",
        *_main_table(table),
        "",
        *_facts_table(table),
        *curves_table(choices),
        "",
        "| ordering | verdict | claims that held |",
        "|---|---|---|",
        *(_ordering_line(one) for one in orderings),
        "",
        "| | claim (a number above 0, by seed) | number | seeds | verdict |",
        "|---|---|---|---|---|",
        *(_finding_line(one.source, finding) for one in orderings for finding in one.findings),
        "",
        *(f"* {note}" for note in notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _main_table(table: Sequence[Mapping[str, Any]]) -> list[str]:
    titles = [metrics.METRICS[metric].title for metric in SHOWN]
    heads = ["arm", "strength", "seeds", *titles, "Δ final", "p", "Δ Backward", "FLOPs"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in table:
        p, flops = row["p_holm"], row["flops"]
        cells = [
            escaped(row["arm"]),
            (row["strength"] or "–") + (" (edge)" if any("edge" in flag for flag in row["flags"]) else ""),
            str(len(row["seeds"])),
            *(shown(row["scores"][metric]) for metric in SHOWN),
            shown(row["differences"].get("final")),
            "–" if p is None else f"{p:.3f}",
            shown(row["differences"].get("backward")),
            "–" if flops is None else f"{flops:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _facts_table(table: Sequence[Mapping[str, Any]]) -> list[str]:
    if not any(row["facts"] for row in table):
        return []
    names = list(FACT_GROUPS)
    lines = [
        "Share of facts that the last checkpoint answers rightly (those kept but not stated again; those updated):",
        "",
    ]
    lines += [f"| arm | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {row['arm']} | {' | '.join(shown(row['facts'].get(name), 2) for name in names)} |" for row in table]
    return [*lines, ""]


def curves_table(choices: Choices) -> list[str]:
    """Return the strength curves as Markdown; the first strength of a row is the weakest of its grid."""
    grids = {tuple(e - curve.exponents[0] for e in curve.exponents) for curve in choices.curves}
    steps = max(grids, key=len, default=())
    lines = [
        f"Curves on {choices.track['name']}, seed {choices.seed}: {RULE}.",
        "",
        f"| arm | weakest | none | {' | '.join(f'x 1e{k}' for k in steps)} | flags |",
        "|---" * (len(steps) + 4) + "|",
    ]
    for curve in choices.curves:
        cells = [_curve_cell(curve, exponent) for exponent in curve.exponents]
        baseline = "–" if curve.baseline is None else f"{curve.baseline:.3f}"
        lines.append(
            f"| {curve.arm} | 1e{curve.exponents[0]} | {baseline} | {' | '.join(cells)} | {'; '.join(curve.flags)} |"
        )
    return lines


def _curve_cell(curve: Curve, exponent: int) -> str:
    loss = curve.losses.get(exponent)
    text = "–" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.3f}"
    return f"**{text}**" if exponent == curve.chosen else text


def _ordering_line(one: Ordering) -> str:
    run = [finding for finding in one.findings if finding.verdict != NOT_RUN]
    held = sum(finding.verdict == HELD for finding in run)
    part = f", {len(one.findings) - len(run)} not run" if len(run) < len(one.findings) else ""
    return f"| {one.source}. {one.text} | **{one.verdict}** | {held} of {len(run)}{part} |"


def _finding_line(source: str, one: Finding) -> str:
    why = f" ({one.reason})" if one.reason else ""
    value = number(one.value, one.low, one.high, 4)
    return f"| {source} | {escaped(one.claim)} | {value} | {one.n_seeds} | {one.verdict}{why} |"


def draw(choices: Choices, path: Path) -> None:
    """Draw the strength curves, a panel for every companion; the horizontal line is the arm without regulariser."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    from clbench.files import atomic_path

    companions = list(dict.fromkeys(curve.arm.companion for curve in choices.curves))
    figure = Figure(figsize=(1.5 + 4.2 * len(companions), 4.2), layout="constrained")
    panels = figure.subplots(1, len(companions), squeeze=False)[0]
    for panel, companion in zip(panels, companions, strict=True):
        for curve, marker in zip((c for c in choices.curves if c.arm.companion == companion), "osD^v*PX", strict=False):
            assert curve.arm.regulariser is not None
            points = [(e, loss) for e, loss in sorted(curve.losses.items()) if math.isfinite(loss)]
            centre = curve.arm.regulariser.centre
            x = [e - centre for e, _ in points]
            label = f"{curve.arm.regulariser.name}, 0 is 1e{centre}"
            panel.plot(x, [loss for _, loss in points], marker=marker, markersize=4, label=label)
            if curve.baseline is not None:
                panel.axhline(curve.baseline, color="black", linestyle=":", linewidth=1)
        panel.set(title=companion, xlabel="decades from the middle of the grid", ylabel="final loss, nats per token")
        panel.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{choices.track['name']}, seed {choices.seed}")
    with atomic_path(path) as temporary, mpl.rc_context({"svg.hashsalt": "clbench"}):
        kind = path.suffix.lstrip(".") or "svg"
        figure.savefig(temporary, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


# --- commands ---------------------------------------------------------------------------------------------------------


def run_grid(arguments: argparse.Namespace, specs: Sequence[str], seeds: Sequence[int]) -> int:
    """Run specs with ``benchmarks.grid``; refuses unknown methods and options before the first run."""
    for part in dict.fromkeys(part for spec in specs for part in grid.parts_of(spec)):
        make_method(part)
    words = ["--track", arguments.track, "--runs", str(arguments.runs), "--device", arguments.device]
    words += ["--jobs", str(arguments.jobs), "--threads", str(arguments.threads), "--seeds", *map(str, seeds)]
    words += [word for spec in specs for word in ("--spec", spec)]
    flags = [f"--{flag}" for flag in ("list", "fork") if getattr(arguments, flag)]
    return grid.main([*words, *flags])


def tune(arguments: argparse.Namespace) -> int:
    """Sweep the strengths and write the choices."""
    arms = arms_of(extra=arguments.extra)
    if arguments.arm:
        named = [arm_named(name) for name in arguments.arm]
        arms = list(dict.fromkeys([*(arm.baseline for arm in named), *named]))
    track = load_track(arguments.track)
    code = 0 if arguments.no_runs else run_grid(arguments, tuning_specs(arms, arguments.every), [arguments.seed])
    if arguments.list or code == 130:
        return code
    choices = choices_of(track.as_dict(), arguments.runs / track.name, arms, arguments.seed, arguments.every)
    path = arguments.choices or arguments.runs / f"{track.name}.json"
    choices.write(path)
    print("\n".join(curves_table(choices)))
    print(f"\nwritten: {path}")
    unfinished = any(curve.missing for curve in choices.curves)
    return 1 if unfinished else 0  # a run that diverged is an outcome, not a failure


def final(arguments: argparse.Namespace) -> int:
    """Run the chosen strengths on the track that is reported."""
    choices, track = Choices.read(arguments.choices), load_track(arguments.track)
    if track.stream == choices.track["stream"]:
        raise ConfigError(
            f"strengths were chosen on the stream of {track.name}",
            where=arguments.choices,
            mend="tune on another track, such as codedocs-nano-tuning for codedocs-nano",
        )
    return run_grid(arguments, choices.specs(), arguments.seeds)


def table(arguments: argparse.Namespace) -> int:
    """Print the tables."""
    choices = Choices.read(arguments.choices)
    rows, notes = rows_of(choices, find_runs(arguments.folders))
    if arguments.plot:
        draw(choices, arguments.plot)
    if not rows:
        raise NotFoundError("no arm of the choices has a finished run here", mend="run `final` first")
    if arguments.json:
        values = {
            "track": next(iter(rows.values())).summary.track["name"],
            "tuned_on": choices.track,
            "table": table_of(rows, choices),
            "curves": [curve.as_dict() for curve in choices.curves],
            "orderings": [one.as_dict() for one in orderings_of(rows)],
            "notes": notes,
        }
        print(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(markdown(rows, notes, choices), end="")
    return 0


def parser_of() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sweep = commands.add_parser("tune", help="sweep the strengths and choose")
    sweep.set_defaults(run=tune)
    sweep.add_argument("--seed", type=int, default=0)
    sweep.add_argument("--every", type=int, default=1, choices=(1, 2, 3), help="decades from strength to strength")
    sweep.add_argument("--extra", action="store_true", help="also the top eigenvector, prox, and KD-replay")
    sweep.add_argument("--arm", action="append", help='only this arm ("replay + L2-SP") and its baseline; often')
    sweep.add_argument("--choices", type=Path, help="file to write; RUNS/TRACK.json")
    sweep.add_argument("--no-runs", action="store_true", help="only choose, from the runs that are there")
    chosen = commands.add_parser("final", help="run the chosen strengths on the reported track")
    chosen.set_defaults(run=final)
    chosen.add_argument("--choices", type=Path, required=True, help="what `tune` wrote")
    chosen.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for one in (sweep, chosen):
        one.add_argument("--track", required=True, help="name or YAML file")
        one.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
        one.add_argument("--jobs", type=int, default=1, help="runs at a time")
        one.add_argument("--threads", type=int, default=1, help="of each run")
        one.add_argument("--device", default="cpu", help="auto, cpu, cuda …")
        one.add_argument("--list", action="store_true", help="print the commands of what is missing and stop")
        one.add_argument("--fork", action="store_true", help="start runs from a process that has imported everything")
    shown_table = commands.add_parser("table", help="print tables, curves and verdicts")
    shown_table.set_defaults(run=table)
    shown_table.add_argument(
        "folders", type=Path, nargs="+", metavar="RUNS", help="folders of the reported track's runs"
    )
    shown_table.add_argument("--choices", type=Path, required=True, help="what `tune` wrote")
    shown_table.add_argument("--plot", type=Path, help="picture of the strength curves (.svg or .png)")
    shown_table.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = parser_of().parse_args(words)
    try:
        code: int = arguments.run(arguments)
    except ClbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
