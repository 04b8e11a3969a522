from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from clbench.cli_facts import facts as facts_command
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError
from clbench.results.knowledge import ANSWERS, STATUSES, Answers, Truth, scores_of, summarise, wilson
from clbench.results.store import ROWS_SCHEMA, RunStore
from tests.synthetic_runs import write_run

VALUES = ("copper", "tin", "iron", "nothing")


def truth_table(histories: dict[str, str], stated: dict[str, str] | None = None) -> Truth:
    """A truth table from letters a stage: c, t, i a value, ``-`` not yet, ``n`` nothing; stated: 1 or 0 a stage."""
    full = {"c": "copper", "t": "tin", "i": "iron", "n": "nothing", "-": None}
    stages = max(len(letters) for letters in histories.values())
    head = {"format": 1, "stages": [str(i) for i in range(stages)], "candidates": {"metal": VALUES}, "n_facts": 9}
    lines: list[dict[str, Any]] = [head]
    for fact, letters in histories.items():
        lines.append(
            {
                "fact": fact,
                "entity": fact,
                "attribute": "metal",
                "value": [full[c] for c in letters],
                "kind": kinds(letters),
                "date": [None] * stages,
                "n_stated": [int(s) for s in (stated or {}).get(fact, "1" * stages)],
                "probes": {"trained": {"frame": "trained-0", "prompt": "The metal is"}},
            }
        )
    return Truth.parse("\n".join(json.dumps(line) for line in lines).encode())


def kinds(letters: str) -> list[str]:
    found = []
    for i, c in enumerate(letters):
        before = letters[i - 1] if i else "-"
        if c == "-":
            found.append("unborn")
        elif c == "n":
            found.append("obsolete")
        elif before == "-":
            found.append("new")
        else:
            found.append("kept" if c == before else "reverted" if c in letters[:i] else "updated")
    return found


def rows_of(truth: Truth, answers: list[set[int]], form: str = "trained") -> pa.Table:
    """Rows of one checkpoint that answers each fact with a set of candidates at the top (several: a tie)."""
    rows = []
    for fact, codes, answer in zip(truth.facts, truth.code.tolist(), answers, strict=True):
        for stage, code in enumerate(codes):
            if code >= 0:
                value = 1 / len(answer) if code in answer else 0.0
                rows.append((fact.fact, stage, f"right:{form}", value, 1, 4, fact.attribute, fact.kind[stage]))
    columns = list(zip(*rows, strict=True))
    return pa.table(dict(zip(ROWS_SCHEMA.names, map(list, columns), strict=True)), schema=ROWS_SCHEMA)


def answers_of(truth: Truth, *letters: str) -> Answers:
    """Answers from one letter a fact and checkpoint, checkpoints 0, 1 …"""
    code = {"c": 0, "t": 1, "i": 2, "n": 3}
    return Answers.of({k: rows_of(truth, [{code[c]} for c in row]) for k, row in enumerate(letters)}, truth)


# One fact per case: its truth, what checkpoints 0, 1 and 2 answer, and what that is after stage 2.
CASES = {
    "kept, and known to the end": ("ccc", "ccc", "known"),
    "learned late": ("ccc", "tic", "known"),
    "was right, and is not although nothing changed": ("ccc", "cct", "forgotten"),
    "was right two checkpoints ago": ("ccc", "cit", "forgotten"),
    "never right": ("ccc", "tit", "never learned"),
    "updated, and the old value stuck": ("cct", "ccc", "stale"),
    "updated one stage ago, never right since": ("ctt", "ccc", "stale"),
    "updated, learned, and back to the old value": ("ctt", "ctc", "relapsed"),
    "updated, learned, and now something else": ("ctt", "cti", "forgotten"),
    "updated, and now neither": ("cct", "cci", "never learned"),
    "knowing what it was before the update is not knowing": ("ctt", "cii", "never learned"),
    "the right answer before it became right is not knowing": ("ctt", "tii", "never learned"),
    "reverted, and the value between stuck": ("ctc", "ctt", "stale"),
    "reverted, known at first and again": ("ctc", "ctc", "known"),
    "reverted, known at first only": ("ctc", "cti", "never learned"),
    "obsolete, and said so": ("ccn", "ccn", "known"),
    "obsolete, and still remembered": ("ccn", "ccc", "stale"),
    "obsolete, learned, and forgotten again": ("cnn", "cnt", "forgotten"),
    "obsolete, learned, and then remembered after all": ("cnn", "cnc", "relapsed"),
    "new, and known": ("--c", "ttc", "known"),
    "new, and not learned": ("--c", "cct", "never learned"),
}


@pytest.mark.parametrize(("history", "answers", "status"), CASES.values(), ids=CASES)
def test_each_class_is_told_apart(history: str, answers: str, status: str) -> None:
    found = answers_of(truth_table({"x": history}), *answers)
    assert STATUSES[found.status[2, 0]] == status


def test_answers_ahead_of_time_are_seen() -> None:
    found = answers_of(truth_table({"later": "cct", "unborn": "--t", "again": "ctc"}), "ttt", "ctc", "ttc")
    names = [[ANSWERS[a] for a in row] for row in found.answer]
    # Before its stage a value is ahead; one that held before and will again is outdated, not ahead.
    assert names == [["ahead", "ahead", "ahead"], ["right", "ahead", "outdated"], ["right", "right", "right"]]
    assert found.status[0].tolist() == [4, -1, 4]


def slow(
    truth: Truth, top: list[list[set[int]]], checkpoints: list[int], k: int, f: int
) -> tuple[str, str | None, int]:
    """The decision table once more, one fact at a time, from the answers themselves."""
    code, stage = truth.code[f].tolist(), checkpoints[k]
    now, answer = code[stage], top[k][f]

    def says(c: int) -> bool:
        return c >= 0 and answer == {c}

    if now >= 0 and says(now):
        kind = "right"
    elif any(says(c) for c in code[:stage]):
        kind = "outdated"
    elif any(says(c) for c in code[stage + 1 :]):
        kind = "ahead"
    else:
        kind = "other"
    stated = [i for i in range(stage + 1) if truth.facts[f].n_stated[i]]
    lag = stage - stated[-1] if stated else -1
    if now < 0:
        return kind, None, lag
    knew = False
    for j in range(k - 1, -1, -1):
        if any(c != now for c in code[checkpoints[j] : stage + 1]):
            break
        knew |= top[j][f] == {now}
    if kind == "right":
        return kind, "known", lag
    if knew:
        return kind, "relapsed" if kind == "outdated" else "forgotten", lag
    return kind, "stale" if kind == "outdated" else "never learned", lag


def random_world(seed: int, n_facts: int = 40, n_stages: int = 5) -> tuple[Truth, np.random.Generator]:
    rng = np.random.default_rng(seed)
    histories, stated = {}, {}
    for f in range(n_facts):
        birth = int(rng.integers(0, n_stages))
        end = int(rng.integers(birth + 1, n_stages + 3))
        letters = [str(rng.choice(list("cti"))) if rng.random() < 0.5 else "" for _ in range(n_stages)]
        filled, last = "", str(rng.choice(list("cti")))
        for i in range(n_stages):
            last = letters[i] or last
            filled += "-" if i < birth else "n" if i >= end else last
        histories[f"f{f:02d}"] = filled
        stated[f"f{f:02d}"] = "".join("1" if c != "-" and rng.random() < 0.5 else "0" for c in filled)
    return truth_table(histories, stated), rng


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("checkpoints", [[0, 1, 2, 3, 4], [0, 2, 4], [3]])
def test_the_decision_table_against_one_fact_at_a_time(seed: int, checkpoints: list[int]) -> None:
    truth, rng = random_world(seed)
    top = [[set(rng.permutation(4)[: 1 + (rng.random() < 0.15)].tolist()) for _ in truth.facts] for _ in checkpoints]
    found = Answers.of({stage: rows_of(truth, row) for stage, row in zip(checkpoints, top, strict=True)}, truth)
    seen = set()
    for k, f in itertools.product(range(len(checkpoints)), range(len(truth.facts))):
        kind, status, lag = slow(truth, top, checkpoints, k, f)
        assert (ANSWERS[found.answer[k, f]], found.lag[k, f]) == (kind, lag)
        assert found.status[k, f] == (-1 if status is None else STATUSES.index(status))
        seen.add(status)
    assert len(checkpoints) < 5 or seen == {None, *STATUSES}
    table = found.trajectories().to_pylist()
    assert len(table) == len(checkpoints) * len(truth.facts)
    assert [row["status"] for row in table[: len(truth.facts)]] == [
        None if s < 0 else STATUSES[s] for s in found.status[0]
    ]


def test_chance_is_the_mean_over_all_blind_answers() -> None:
    truth, _ = random_world(3)
    sums = np.zeros((5, 3, len(truth.facts)))
    for answer in range(4):
        found = Answers.of({k: rows_of(truth, [{answer}] * len(truth.facts)) for k in range(5)}, truth)
        for place in range(3):
            sums[:, place] += found.answer == place
    assert np.allclose(sums.transpose(1, 0, 2) / 4, truth.expected)


def test_a_blind_model_scores_chance_and_a_constant_one_the_constant() -> None:
    truth, _ = random_world(4)
    tied = Answers.of({2: rows_of(truth, [{0, 1, 2, 3}] * len(truth.facts))}, truth)
    score = scores_of([tied], "x", "trained", 0, "current")
    assert score.chance == 0.25
    assert score.scores["accuracy"].value == 0.25
    assert score.scores["corrected"].value == pytest.approx(0, abs=1e-12)
    assert score.scores["known"].value == 0 and score.scores["never learned"].value == 1
    shares = []
    for answer in range(4):
        constant = Answers.of({2: rows_of(truth, [{answer}] * len(truth.facts))}, truth)
        shares.append(scores_of([constant], "x", "trained", 0, "current").scores["accuracy"].value)
    assert score.constant == max(shares) > 0.25


def test_groups_divide_the_facts() -> None:
    truth, rng = random_world(5)
    found = Answers.of({3: rows_of(truth, [{int(rng.integers(4))} for _ in truth.facts])}, truth)
    names = ("new", "kept, stated", "kept, not stated", "updated", "reverted")
    parts = np.array([found.members(0, name) for name in names])
    assert np.array_equal(parts.sum(axis=0), found.members(0, "current"))
    lags = np.array([found.members(0, f"lag {lag}") for lag in range(-1, 4)])
    assert np.array_equal(lags.sum(axis=0), found.members(0, "current"))
    rest = found.members(0, "obsolete").astype(int) + found.members(0, "unborn")
    assert np.array_equal(rest + found.members(0, "current"), np.ones(len(truth.facts)))


@pytest.mark.parametrize(("share", "n"), [(0.5, 10), (0.0, 20), (1.0, 7), (0.93, 200)])
def test_wilsons_bounds_are_where_the_score_test_turns(share: float, n: int) -> None:
    one, z = wilson(share, n), scipy_stats.norm.ppf(0.975)
    for bound in (one.low, one.high):
        assert bound in (0, 1) or (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-12)
    assert one.low <= share <= one.high
    assert math.isnan(wilson(math.nan, 0).value)


# --- files and the command


def run_with(folder: Path, truth: Truth, letters: list[str], **options: Any) -> RunStore:
    store = write_run(folder, n_stages=len(truth.stages), n_documents=4, n_rows=len(letters), **options)
    code = {"c": 0, "t": 1, "i": 2, "n": 3}
    for k, row in enumerate(letters):
        answers = [{code[c]} for c in row]
        tables = [rows_of(truth, answers, form) for form in ("trained", "paraphrase")]
        store.write_rows("facts", k, pa.concat_tables(tables))
    return store


@pytest.fixture
def truth() -> Truth:
    return truth_table({"a": "cct", "b": "ccc", "d": "ccn", "e": "-tt"})


def test_seeds_are_averaged_with_an_interval_over_seeds(tmp_path: Path, truth: Truth) -> None:
    one = run_with(tmp_path / "0", truth, ["cccc", "ccct", "tcnt"], seed=0)
    other = run_with(tmp_path / "1", truth, ["cccc", "ccct", "tint"], seed=1)
    scores = summarise({"m": [one, other]}, truth, forms=["trained"])
    last = next(s for s in scores if (s.checkpoint, s.group) == (2, "current"))
    assert last.scores["accuracy"].value == pytest.approx((1 + 2 / 3) / 2)
    assert last.scores["accuracy"].kind == "t over seeds"
    assert last.scores["forgotten"].value == pytest.approx(1 / 6)
    run_with(tmp_path / "2", truth, ["cccc"], seed=2)
    with pytest.raises(ConfigError, match="different rows"):
        summarise({"m": [one, RunStore(tmp_path / "2")]}, truth)


def test_rows_of_another_world_are_refused(tmp_path: Path, truth: Truth) -> None:
    store = run_with(tmp_path / "0", truth, ["cccc"])
    with pytest.raises(IntegrityError, match="truth table"):
        Answers.of_run(store, truth_table({"a": "cct", "b": "ccc"}))
    with pytest.raises(IntegrityError, match=r"does not hold|do not ask"):
        Answers.of_run(store, truth_table({"a": "cct", "b": "ccc", "d": "-cn", "e": "ttt"}))
    with pytest.raises(NotFoundError):
        Answers.of_run(write_run(tmp_path / "1", n_rows=1), truth)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"stages": ["0"], "candidates": {}, "n_facts": 1}\n{"fact": 1}'])
def test_a_broken_truth_table_is_one_line(content: bytes) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        Truth.parse(content)


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(facts_command)
    world = truth_table({"a": "cct", "b": "ccc", "d": "ccn", "e": "-tt"})
    lines = [{"stages": list(world.stages), "candidates": {"metal": VALUES}, "n_facts": 4}]
    for fact in world.facts:
        lines.append({**vars(fact), "probes": {"trained": {"frame": "f", "prompt": "p"}}})
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    run_with(tmp_path / "runs" / "0", world, ["cccc", "ccct", "ccct"], seed=0)
    words = [str(tmp_path / "runs"), "--truth", str(tmp_path / "facts.jsonl")]
    extra = ["--plot", str(tmp_path / "p.png"), "--trajectories", str(tmp_path / "t.parquet")]
    shown = CliRunner().invoke(app, [*words, *extra])
    assert shown.exit_code == 0, shown.output
    assert "0.67" in shown.output and max(map(len, shown.output.splitlines()[:-2])) <= 80
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    table = pq.read_table(tmp_path / "t.parquet").to_pylist()
    last = {row["fact"]: row["status"] for row in table if row["checkpoint"] == 2}
    assert last == {"a": "stale", "b": "known", "d": "stale", "e": "known"}
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert {(one["form"], one["checkpoint"]) for one in told} == set(
        itertools.product(("trained", "paraphrase"), range(3))
    )
    obsolete = next(one for one in told if (one["checkpoint"], one["group"]) == (2, "obsolete"))
    assert (obsolete["n"], obsolete["chance"], obsolete["scores"]["stale"]["value"]) == (1, 0.25, 1.0)
    for wrong in (["--form", "x"], ["--checkpoint", "7"], ["--truth", str(tmp_path / "none")]):
        assert isinstance(CliRunner().invoke(app, [*words, *wrong]).exception, ClbenchError)
