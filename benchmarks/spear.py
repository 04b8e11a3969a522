"""SPEAR-MM on finished runs: its three policies and all controls, measured on general and on domain text, over seeds.

    python -m benchmarks.spear --track domain-smollm2 --runs runs/domain-smollm2/sequential --out build/spear
    python -m benchmarks.spear … --suite general:size=small        accuracies, too, of the main arms
    python -m benchmarks.spear --out build/spear --table           the table again, from the JSON alone

For every seed whose run has released its last stage: base, tuned (standard continued pretraining), and for each policy
SPEAR-MM with SLERP and with LERP, random units three times, the lowest scores, drift alone, first and last blocks,
CheckFree's neighbour average, and uniform WiSE-FT at equal mean distance; then SPEAR-MM with the tensors outside the
blocks, random units with these, these alone, and uniform at that distance. Last, every block restored alone, which is
what the scores are to foretell.

Every measurement is kept in ``CLBENCH_HOME/merges`` under the digests of weights, texts and plan: the same command goes
on where it was killed. After each seed ``spear.json`` and ``spear.md`` are written with what there is. Intervals are t
over seeds; a document's noise is smaller and not in them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.errors import ClbenchError, ConfigError, NotFoundError
from clbench.files import read_json, write_json, write_text
from clbench.merge.front import STANDARD_ERRORS, cost_reduction, retention
from clbench.results.stats import Interval, paired_t, t_interval

if TYPE_CHECKING:
    from clbench.merge.families import Spot
    from clbench.merge.job import Result
    from clbench.merge.search import Measured

PAPER = "The paper (Llama-3.1-8B, finance): retention 69.7 % -> 91.2 %, 94 % of the domain gain kept, 90 % less cost."
EMBEDDINGS = ", embeddings"
MAIN = ("spear", "random 1", "uniform", "checkfree", "spear, embeddings", "no units, embeddings")
"""Arms of each policy that answer questions, too, where a suite is given; base and tuned always do."""
RANDOM = tuple(f"random {n}" for n in (1, 2, 3))
AXES = ("general", "domain", "undone", "both")
WORDS = {
    "spear": "SPEAR-MM, SLERP",
    "spear, lerp": "SPEAR-MM, LERP",
    "random": "random blocks (mean of 3)",
    "bottom": "lowest scores",
    "drift": "largest drift",
    "first": "first blocks",
    "last": "last blocks",
    "checkfree": "neighbours' mean (CheckFree)",
    "uniform": "uniform WiSE-FT, equal distance",
    "spear, embeddings": "SPEAR-MM and embeddings",
    "random, embeddings": "random blocks and embeddings (mean of 3)",
    "no units, embeddings": "embeddings alone",
    "uniform, embeddings": "uniform at that distance",
}


@dataclass(frozen=True)
class Arm:
    """One merge of one policy."""

    policy: str
    name: str
    spot: Spot


# --- one seed ---------------------------------------------------------------------------------------------------------


def runs_of(folder: Path, stage: int) -> dict[int, Path]:
    """Return seed -> release folder of the runs below ``folder`` that have released a stage."""
    places = {int(one.name.removeprefix("seed-")): one for one in folder.glob("seed-*") if one.name[5:].isdecimal()}
    found = {seed: place / "release" / f"stage-{stage:02d}" for seed, place in sorted(places.items())}
    return {seed: place for seed, place in found.items() if (place / "model.safetensors").is_file()}


def base_of(run: Path) -> Path:
    """Return the folder of the base that a run started from, by its digest.

    Raises:
        NotFoundError: it is not on this machine any more.
    """
    from clbench.extras import base_with
    from clbench.home import bases_folder
    from clbench.results.store import RunStore

    if (found := base_with(RunStore.open(run).config()["base"]["weights_sha256"])) is not None:
        return found
    raise NotFoundError("the run's base is not here", where=bases_folder(), mend="prepare its track, or give --base")


def prepared(arguments: argparse.Namespace, base: Path, stream: str, stage: int, tuned: Path) -> tuple[Result, Any]:
    """Return scores, texts and opened models of one seed."""
    from clbench.merge import job

    options = job.Options(
        base=base,
        tuned=tuned,
        domain=f"{stream}@{stage}",
        general=arguments.general or f"{stream}@0",
        n_tokens=arguments.tokens,
        device=arguments.device,
        granularity=arguments.granularity,
    )
    return job.prepare(options)


def arms_of(result: Result, seed: int, policies: Sequence[str], embeddings: bool) -> Iterator[Arm]:
    """Yield what is measured of one seed, policy by policy."""
    from clbench.merge.families import Restoring
    from clbench.merge.search import controls
    from clbench.merge.select import POLICIES

    family = result.family
    assert isinstance(family, Restoring)
    for name in policies:
        policy = POLICIES[name]
        chosen = family.spot(policy.q, policy.s)
        yield Arm(name, "spear", chosen)
        for spot in controls(family, chosen, result.scores, result.sources, seed=seed):
            label = spot.label.partition(", s=")[0]
            yield Arm(name, "spear, lerp" if label == "same units, lerp" else label, spot)
        if embeddings:
            wide = Restoring(family.order, family.dimensions, outside=True, granularity=family.granularity)
            chosen = wide.spot(policy.q, policy.s)
            yield Arm(name, "spear, embeddings", chosen)
            for spot in controls(wide, chosen, result.scores, result.sources, seed=seed):
                label = spot.label.partition(", s=")[0]
                if label in (*RANDOM, "uniform"):
                    yield Arm(name, label + EMBEDDINGS, spot)
                elif label == "no units, embeddings":
                    yield Arm(name, label, spot)


def angles(result: Result) -> dict[str, float]:
    """Return how far the matrices of the blocks are from the base: SLERP is LERP where no cosine is below 0.9995."""
    from clbench.merge.kernels import COLLINEAR, cosine

    cosines = []
    for score in result.scores:
        if score.is_matrix:
            sources = result.sources
            cosines.append(cosine(sources.tuned.read(score.name), sources.base.read(score.name)))
            for model in sources.models:
                model.done(score.name)
    drifts = sorted(score.drift for score in result.scores if score.is_matrix)
    return {
        "least_cosine": min(cosines),
        "slerp_is_lerp_share": float(np.mean([one > COLLINEAR for one in cosines])),
        "median_drift": drifts[len(drifts) // 2],
        "largest_drift": drifts[-1],
        "svdr_above_0_share": float(np.mean([s.spectral.svdr > 0 for s in result.scores if s.spectral is not None])),
    }


def measured_seed(arguments: argparse.Namespace, seed: int, result: Result, tokenizer: Any, say: Any) -> dict[str, Any]:
    """Return what one seed's arms lose and keep, as JSON-able values."""
    from clbench.merge import job
    from clbench.merge.families import BASE, TUNED
    from clbench.merge.outcome import Yardstick

    desk = job.open_desk(result, tokenizer, say)
    base, tuned = desk.measure(BASE, "end"), desk.measure(TUNED, "end")
    yardstick = Yardstick(benchmarks=desk.benchmarks, base=base.rows, tuned=tuned.rows)
    found: list[tuple[Arm, Measured]] = [(Arm("", "base", BASE), base), (Arm("", "tuned", TUNED), tuned)]
    straight = angles(result)
    for arm in arms_of(result, seed, arguments.policies, not arguments.no_embeddings):
        if arm.name == "spear, lerp" and straight["slerp_is_lerp_share"] == 1:
            spear = next(one for other, one in found if (other.policy, other.name) == (arm.policy, "spear"))
            found.append((arm, spear))  # to the bit, see kernels.slerp
            continue
        found.append((arm, desk.measure(arm.spot, "walk")))
    standings = yardstick.standings([one.rows for _, one in found])
    arms = [
        {
            "policy": arm.policy,
            "arm": arm.name,
            "plan_sha256": one.spot.plan.sha256,
            **{key: value for key, value in arm.spot.about.items() if key in ("q", "s", "units")},
            "standing": standing.as_dict(),
            "cost": {unit: math.fsum(getattr(one, unit).values()) for unit in ("flops", "seconds")},
        }
        for (arm, one), standing in zip(found, standings, strict=True)
    ]
    return {
        "tuned_sha256": result.weights["tuned"],
        "texts": {side: {"documents": len(t.ids), "tokens": t.n_tokens} for side, t in result.texts.items()},
        "gain": {
            "value": yardstick.gain.value if yardstick.gain.reason is None else None,
            "why": yardstick.gain.reason,
        },
        "drift": straight,
        "scores_bill": result.scores_bill,
        "retraining": vars(result.retraining) if result.retraining is not None else None,
        "arms": arms,
        "layers": result.layers(),
    }


def accuracies(arguments: argparse.Namespace, seed: int, result: Result, tokenizer: Any, say: Any) -> dict[str, Any]:
    """Return accuracy by set of base, tuned and the main arms; retention over the sets that the base surely knows."""
    from clbench.merge import job
    from clbench.merge.evaluate import SuiteJudge
    from clbench.merge.families import BASE, TUNED

    desk = job.open_desk(result, tokenizer, None).beside(SuiteJudge(arguments.suite), tell=say)
    arms = [Arm("", "base", BASE), Arm("", "tuned", TUNED)]
    arms += [arm for arm in arms_of(result, seed, arguments.policies, not arguments.no_embeddings) if arm.name in MAIN]
    table = []
    base: dict[str, float] = {}
    for arm in arms:
        rows = desk.measure(arm.spot, "walk").rows
        scores = {b.name: float(rows.value[rows.stage == c].mean()) for c, b in enumerate(desk.benchmarks)}
        n = {b.name: int((rows.stage == c).sum()) for c, b in enumerate(desk.benchmarks)}
        base = base or scores
        known = {
            b.name: b.chance
            for b in desk.benchmarks
            if base[b.name] - b.chance > STANDARD_ERRORS * math.sqrt(base[b.name] * (1 - base[b.name]) / n[b.name])
        }
        kept = [retention(scores[name], base[name], chance=chance).value for name, chance in known.items()]
        mean = math.fsum(kept) / len(kept) if kept else math.nan
        table.append({"policy": arm.policy, "arm": arm.name, "scores": scores, "n": n, "known": sorted(known),
                      "retention": mean if math.isfinite(mean) else None})  # fmt: skip
    return {"suite": arguments.suite, "chance": {b.name: b.chance for b in desk.benchmarks}, "arms": table}


def impacts(arguments: argparse.Namespace, result: Result, tokenizer: Any, say: Any) -> dict[str, Any]:
    """Return what each block does when it alone is restored, on fewer tokens, and how well scores foretell it."""
    from dataclasses import replace

    from clbench.merge import job, search
    from clbench.merge.evaluate import SIDES, draw, read_text
    from clbench.merge.families import BASE, TUNED, Restoring
    from clbench.merge.outcome import Yardstick

    places = {side: getattr(result.options, side) for side in SIDES}
    texts: Any = {
        side: draw(read_text(place, side), tokenizer, arguments.impact_tokens) for side, place in places.items()
    }
    short = replace(result, texts=texts)
    desk = job.open_desk(short, tokenizer, say)
    base, tuned = desk.measure(BASE, "end"), desk.measure(TUNED, "end")
    yardstick = Yardstick(benchmarks=desk.benchmarks, base=base.rows, tuned=tuned.rows)
    family = result.family
    assert isinstance(family, Restoring)
    found = search.impacts(desk, family, yardstick)
    rhos = search.agreements(found, result.scores, family)
    return {
        "tokens": {side: text.n_tokens for side, text in texts.items()},
        "units": [vars(one) for one in found],
        "rho": {by: {"value": _number(one.value), "why": one.reason} for by, one in rhos.items()},
        "cost": {unit: math.fsum(desk.bill(["end", "impact"])[unit].values()) for unit in ("flops", "seconds")},
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- over seeds -------------------------------------------------------------------------------------------------------


def figures(point: Mapping[str, Any]) -> dict[str, float]:
    """Return the four figures of an arm; ``both`` is forgetting undone + gain kept: above 1 beats a straight trade."""
    standing = point["standing"]
    values = {"general": standing["general"]["value"], "domain": standing["domain"]["value"]}
    values["undone"] = standing["recovered"]
    numbers = {key: math.nan if value is None else float(value) for key, value in values.items()}
    numbers["both"] = numbers["undone"] + numbers["domain"]
    for side in ("general", "domain"):
        score = standing["scores"][side]
        numbers[f"{side}_bits"], numbers[f"{side}_nats"] = score["bits_per_byte"], score["nats_per_token"]
    return numbers


def collected(seeds: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Return (policy, arm) -> figure -> values in the order of the seeds; random draws as their mean, too."""
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in seeds.values():
        here = {(point["policy"], point["arm"]): figures(point) for point in one["arms"]}
        for policy in dict.fromkeys(policy for policy, _ in here):
            for kind in ("", EMBEDDINGS):
                draws = [here.pop((policy, name + kind)) for name in RANDOM if (policy, name + kind) in here]
                if draws:
                    mean = {key: math.fsum(draw[key] for draw in draws) / len(draws) for key in draws[0]}
                    here[policy, f"random{kind}"] = mean
        for key, values in here.items():
            for name, value in values.items():
                table.setdefault(key, {}).setdefault(name, []).append(value)
    whole = {key: values for key, values in table.items() if len(values["general"]) == len(seeds)}
    policies, arms = list(dict.fromkeys(policy for policy, _ in table)), ["base", "tuned", *WORDS]
    return dict(sorted(whole.items(), key=lambda item: (policies.index(item[0][0]), arms.index(item[0][1]))))


def summary(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Return intervals over seeds of every arm, of SPEAR-MM less each control, of the agreements and of the cost."""
    table = collected(seeds)
    arms = [
        {"policy": policy, "arm": arm, **{name: _interval(t_interval(v)) for name, v in values.items()}}
        for (policy, arm), values in table.items()
    ]
    pairs = []
    for (policy, arm), values in table.items():
        kind = EMBEDDINGS if arm.endswith(EMBEDDINGS) else ""
        wanted = [a for p, a in table if p == policy and a.endswith(EMBEDDINGS) == bool(kind) and a != arm]
        if arm == f"spear{kind}":
            pairs += [
                {"policy": policy, "arm": arm, "less": other,
                 **{axis: _interval(paired_t(values[axis], table[policy, other][axis])) for axis in AXES}}
                for other in wanted
            ]  # fmt: skip
    return {"arms": arms, "differences": pairs, "rho": _rhos(seeds), "cost": _costs(seeds), "accuracy": _known(seeds)}


def _interval(found: Interval) -> dict[str, Any]:
    bounds = {"value": found.value, "low": found.low, "high": found.high, "p": found.p}
    return {**{key: _number(value) for key, value in bounds.items()}, "n": found.n, "why": found.reason}


def _rhos(seeds: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for one in seeds.values():
        for by, rho in (one.get("impact") or {"rho": {}})["rho"].items():
            found.setdefault(by, []).append(math.nan if rho["value"] is None else rho["value"])
    return {by: _interval(t_interval(values)) for by, values in found.items()}


def _costs(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cost of SPEAR-MM's front (scores, both ends, one merge and evaluation a policy) against retraining."""
    found: dict[str, list[float]] = {}
    for one in seeds.values():
        if one["retraining"] is None:
            continue
        front = [point for point in one["arms"] if point["arm"] == "spear"]
        ends = [point for point in one["arms"] if not point["policy"]]
        for unit in ("flops", "seconds"):
            spent = one["scores_bill"][unit] + math.fsum(point["cost"][unit] for point in [*front, *ends])
            less = cost_reduction(spent, len(front) * one["retraining"][unit])
            found.setdefault(f"less_{unit}", []).append(less.value)
            found.setdefault(f"front_{unit}", []).append(spent)
            found.setdefault(f"retraining_{unit}_a_point", []).append(one["retraining"][unit])
    return {name: _interval(t_interval(values)) for name, values in found.items()}


def _known(seeds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return accuracies and their retention by arm."""
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in seeds.values():
        for arm in (one.get("accuracy") or {"arms": []})["arms"]:
            own = table.setdefault((arm["policy"], arm["arm"]), {})
            own.setdefault("retention", []).append(math.nan if arm["retention"] is None else arm["retention"])
            for name, value in arm["scores"].items():
                own.setdefault(name, []).append(value)
    return [
        {"policy": policy, "arm": arm, **{name: _interval(t_interval(values)) for name, values in own.items()}}
        for (policy, arm), own in table.items()
    ]


# --- the page ---------------------------------------------------------------------------------------------------------


def share(one: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """Return a share in percent with its interval."""
    if one is None or one["value"] is None:
        return "–"
    spec = "+.1f" if sign else ".1f"
    bounds = "" if one["low"] is None else f" [{100 * one['low']:{spec}}, {100 * one['high']:{spec}}]"
    return f"{100 * one['value']:{spec}}{bounds}"


def plain(one: Mapping[str, Any], digits: int = 3) -> str:
    """Return a number with its interval."""
    if one["value"] is None:
        return "–"
    bounds = "" if one["low"] is None else f" [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"
    return f"{one['value']:.{digits}f}{bounds}"


def page(found: Mapping[str, Any]) -> str:
    """Return the Markdown report."""
    whole, seeds = found["summary"], found["seeds"]
    texts = next(iter(seeds.values()))["texts"].items()
    measured = ", ".join(f"{side} {t['documents']} documents, {t['tokens']:,} tokens" for side, t in texts)
    lines = [
        f"# SPEAR-MM on {found['facts']['track']}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
        "",
        f"{measured}; t-intervals (95 %) over seeds.",
        PAPER,
        "",
        *_arms_table(whole["arms"]),
        "",
        "## SPEAR-MM less each control, same seeds (percentage points)",
        "",
        "| policy | SPEAR-MM less | general retention | domain gain kept | undone | undone + kept |",
        "|---|---|---|---|---|---|",
        *(
            f"| {one['policy']}{EMBEDDINGS if one['arm'].endswith(EMBEDDINGS) else ''} | {WORDS[one['less']]} | "
            + " | ".join(share(one[axis], sign=True) for axis in AXES)
            + " |"
            for one in whole["differences"]
        ),
        "",
        *_drift_lines(seeds),
        *_rho_lines(whole["rho"]),
        *_cost_lines(whole["cost"]),
        *_accuracy_lines(whole["accuracy"]),
    ]
    return "\n".join(lines) + "\n"


def _arms_table(arms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    axes = ["general retention %", "domain gain kept %", "forgetting undone %"]
    sides = [f"{side} bits/byte (nats/token)" for side in ("general", "domain")]
    yield f"| {' | '.join(['policy', 'merge', *axes, *sides])} |"
    yield "|---|---|---|---|---|---|---|"
    for arm in arms:
        name = WORDS.get(arm["arm"], {"base": "base", "tuned": "standard continued pretraining"}.get(arm["arm"], ""))
        bits = [
            f"{plain(arm[f'{side}_bits'], 4)} ({arm[f'{side}_nats']['value']:.3f})" for side in ("general", "domain")
        ]
        cells = [arm["policy"] or "–", name, *(share(arm[axis]) for axis in AXES[:3]), *bits]
        yield f"| {' | '.join(cells)} |"


def _drift_lines(seeds: Mapping[str, Any]) -> Iterator[str]:
    drifts = [one["drift"] for one in seeds.values()]
    least = min(one["least_cosine"] for one in drifts)
    straight = 100 * math.fsum(one["slerp_is_lerp_share"] for one in drifts) / len(drifts)
    shrunk = 100 * math.fsum(one["svdr_above_0_share"] for one in drifts) / len(drifts)
    median = 100 * math.fsum(one["median_drift"] for one in drifts) / len(drifts)
    yield (
        f"Median drift of a matrix {median:.2f} %, least cosine {least:.6f}: SLERP is LERP, to the bit, for "
        f"{straight:.0f} % of the matrices. SVDR is above 0 for {shrunk:.0f} % of them."
    )
    for seed, one in seeds.items():
        if one["gain"]["why"] is not None:
            yield f"Seed {seed}: {one['gain']['why']}."
    yield ""


def _rho_lines(rhos: Mapping[str, Any]) -> Iterator[str]:
    if rhos:
        yield "Spearman's rho of scores with what each block alone does when restored (general gain per domain cost):"
        yield ", ".join(f"{by} {plain(one, 2)}" for by, one in rhos.items()) + "."
        yield ""


def _cost_lines(cost: Mapping[str, Any]) -> Iterator[str]:
    if cost:
        of = {name: one["value"] for name, one in cost.items()}
        yield (
            f"Cost of the front (scores, both ends, a merge and an evaluation a policy): "
            f"{of['front_flops'] / 1e12:.1f} TFLOP, {of['front_seconds']:.0f} s. Training once more for a point: "
            f"{of['retraining_flops_a_point'] / 1e12:.1f} TFLOP, {of['retraining_seconds_a_point']:.0f} s. "
            f"Less in FLOPs: {share(cost['less_flops'])} %, in seconds: {share(cost['less_seconds'])} %."
        )
        yield ""


def _accuracy_lines(arms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if arms:
        sets = [name for name in arms[0] if name not in ("policy", "arm", "retention")]
        yield "## Accuracies"
        yield ""
        yield f"| policy | merge | retention % (above chance, of what the base knows) | {' | '.join(sets)} |"
        yield "|---|---|---|" + "---|" * len(sets)
        for arm in arms:
            name = WORDS.get(arm["arm"], {"tuned": "standard continued pretraining"}.get(arm["arm"], arm["arm"]))
            cells = [arm["policy"] or "–", name, share(arm["retention"]), *(share(arm[s]) for s in sets)]
            yield f"| {' | '.join(cells)} |"


# --- the command ------------------------------------------------------------------------------------------------------


def teller(seed: int) -> Any:
    """Return what says one line a measurement."""
    begun, count = time.monotonic(), 0

    def tell(one: Measured) -> None:
        nonlocal count
        count += 1
        took, so_far = sum(one.seconds.values()), time.monotonic() - begun
        line = f"seed {seed}, {count}: {one.spot.label} (measured in {took:.1f} s; {so_far:.0f} s so far)"
        print(line, file=sys.stderr, flush=True)

    return tell


def write(out: Path, found: dict[str, Any]) -> None:
    """Write the JSON and the page."""
    found["summary"] = summary(found["seeds"])
    write_json(out / "spear.json", found)
    write_text(out / "spear.md", page(found))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every seed that is there, the arms of all before the blocks of any."""
    from clbench import registry
    from clbench.base import open_stream

    track = registry.load_track(arguments.track)
    stream = track.stream
    stage = len(open_stream(track).stages()) - 1 if arguments.stage is None else arguments.stage
    runs = runs_of(arguments.runs, stage)
    wanted = {seed: place for seed, place in runs.items() if not arguments.seeds or seed in arguments.seeds}
    if not wanted:
        raise ConfigError(f"no seed has released stage {stage}", where=arguments.runs, mend="wait, or give --stage")
    facts = {"track": arguments.track, "stage": stage, "tokens": arguments.tokens, "granularity": arguments.granularity}
    found: dict[str, Any] = {"format": 1, "facts": facts, "seeds": {}}
    kept: dict[int, tuple[Result, Any]] = {}
    for seed, tuned in wanted.items():
        base = arguments.base or base_of(tuned.parents[1])
        kept[seed] = prepared(arguments, base, stream, stage, tuned)
        found["seeds"][str(seed)] = measured_seed(arguments, seed, *kept[seed], teller(seed))
        kept[seed][0].let_go()  # half a gigabyte a seed
        write(arguments.out, found)
    for part, function in (("impact", impacts), ("accuracy", accuracies)):
        if (part == "impact" and arguments.no_impact) or (part == "accuracy" and not arguments.suite):
            continue
        for seed in wanted:
            more = (arguments, *kept[seed]) if part == "impact" else (arguments, seed, *kept[seed])
            found["seeds"][str(seed)][part] = function(*more, teller(seed))  # type: ignore[operator]
            kept[seed][0].let_go()
            write(arguments.out, found)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure or print again; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="domain-smollm2")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/domain-smollm2/sequential"), help="with seed-0, seed-1 …"
    )
    parser.add_argument("--general", help="text that the base knew, as `clbench merge` takes it; the stream's stage 0")
    parser.add_argument("--base", type=Path, help="the base's folder; that of the run by default")
    parser.add_argument("--stage", type=int, help="whose release; the last by default")
    parser.add_argument("--seeds", type=int, nargs="*", help="those that are there by default")
    parser.add_argument("--tokens", type=int, default=10_000, help="measured tokens of each side")
    parser.add_argument("--impact-tokens", type=int, default=4_000, help="the same for blocks that are restored alone")
    parser.add_argument("--policies", nargs="*", default=["conservative", "balanced", "aggressive"])
    parser.add_argument("--granularity", default="layer", choices=["layer", "module", "tensor"])
    parser.add_argument("--suite", help="a suite of questions, such as general:size=small")
    parser.add_argument("--no-impact", action="store_true", help="no blocks restored alone")
    parser.add_argument("--no-embeddings", action="store_true", help="no arms that restore embeddings, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("build/spear"))
    parser.add_argument("--table", action="store_true", help="print the page of what was measured before")
    arguments = parser.parse_args(words)
    try:
        found = read_json(arguments.out / "spear.json") if arguments.table else measure(arguments)
    except ClbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.table:
        write(arguments.out, found)
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
