"""Arms through the command line: made, planned, trained, and compared or refused; all of it real and tiny."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from clbench import cli_arms, registry
from clbench.errors import ClbenchError
from clbench.results.store import RunStore
from clbench.seeds import generator
from clbench.specification import StreamSpecification, save_specification
from tests.command_line.driver import clbench, write_track

MODES = ("packed", "rows", "step_matched")
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


@dataclass(frozen=True)
class Made:
    """Arms that ``clbench stream arms`` wrote: their plan and their tracks by name."""

    plan: dict[str, Any]
    tracks: dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("arms")
    rng = generator(11, "cli-posts")
    with (folder / "posts.jsonl").open("w", encoding="utf-8") as file:
        for i in range(600):
            n, likes = (5, 900) if i % 20 else (110, 0)
            text = " ".join(f"{WORDS[k]}{rng.integers(50)}" for k in rng.integers(0, 8, n))
            file.write(json.dumps({"text": text, "likes": likes}) + "\n")
    save_specification(
        StreamSpecification(
            name="cli-pool",
            source="posts",
            options={
                "paths": [str(folder / "posts.jsonl")],
                "recipe": "m1",
                "length_by": "words",
                "popularity": ["likes"],
            },
            tokenizer="stream:tinydocs",
            heldout_fraction=0.25,
            heldout_max_per_group=5,
        )
    )
    done = clbench(
        *("stream", "arms", "--of", "tinydocs", "--junk", "cli-pool", "--name", "tiny-arms", "--stages", 1),
        *("--like", write_track(folder / "like.yaml"), "--n-tokens", 1200, "-o", folder / "out", "--json"),
        *("--dose", 0, "--dose", 0.5, "--dose", 1),
        *(part for mode in MODES for part in ("--batching", mode)),
    )
    assert done.code == 0, done.err
    tracks = {path.stem: path for path in (folder / "out").glob("*.yaml")}
    return Made(json.loads(done.out), tracks)


def arm(made: Made, name: str) -> dict[str, Any]:
    [found] = [one for one in made.plan["arms"] if one["track"] == name]
    stage: dict[str, Any] = found["stages"][0]
    return stage


def test_every_dose_and_batching_has_a_track(made: Made) -> None:
    doses = ("tiny-arms-0", "tiny-arms-junk-50", "tiny-arms-junk-100")
    assert set(made.tracks) == {f"{dose}-{mode.replace('_', '-')}" for dose in doses for mode in MODES}
    assert len({registry.load_track(str(path)).base_sha256() for path in made.tracks.values()}) == 1
    named = {registry.load_track(str(path)).stream for path in made.tracks.values()}
    assert named == set(doses)  # specifications are found by name


def test_packed_arms_match_in_everything_and_rows_only_in_tokens(made: Made) -> None:
    packed, rows, matched = (
        [arm(made, f"tiny-arms-{dose}-{mode}") for dose in ("0", "junk-50", "junk-100")]
        for mode in ("packed", "rows", "step-matched")
    )
    for quantity in ("tokens", "rows", "steps", "learning_rate_sum"):
        assert len({one[quantity] for one in packed}) == 1
    assert {one["tokens"] for one in rows} == {packed[0]["tokens"]}
    assert rows[0]["steps"] < rows[1]["steps"] < rows[2]["steps"]
    assert {one["steps"] for one in matched} == {rows[0]["steps"]}
    assert len({one["learning_rate_sum"] for one in matched}) == 1
    assert matched[0]["tokens"] > matched[1]["tokens"] > matched[2]["tokens"]


def test_groups_add_up_to_the_stage(made: Made) -> None:
    for one in made.plan["arms"]:
        stage = one["stages"][0]
        parts = stage["groups"].values()
        assert sum(part["tokens"] for part in parts) == stage["tokens"]
        assert sum(part["learning_rate_sum"] for part in parts) == pytest.approx(stage["learning_rate_sum"])
        assert max(part["rows"] for part in parts) <= stage["rows"] <= sum(part["rows"] for part in parts)
    assert set(arm(made, "tiny-arms-junk-100-packed")["groups"]) == {"junk"}
    share = arm(made, "tiny-arms-junk-50-packed")["groups"]["junk"]["tokens"]
    assert abs(share / arm(made, "tiny-arms-junk-50-packed")["tokens"] - 0.5) < 0.1


def test_the_manifest_beside_the_tracks_says_the_same(made: Made) -> None:
    path = next(iter(made.tracks.values())).parent / "tiny-arms.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert manifest["unmatched"] == made.plan["unmatched"] != {}
    kept = [{key: value for key, value in one.items() if key != "stream_sha256"} for one in manifest["arms"]]
    assert kept == made.plan["arms"]
    digests = {one["stream"]: one["stream_sha256"] for one in manifest["arms"]}
    assert len(set(digests.values())) == 3, "one a dose"


def test_the_plan_of_written_tracks_is_the_same(made: Made) -> None:
    names = ("tiny-arms-0-rows", "tiny-arms-junk-100-rows")
    shown = clbench("stream", "arms", *(made.tracks[name] for name in names), "--json")
    assert shown.code == 0, shown.err
    plan = json.loads(shown.out)
    assert [one["stages"][0] for one in plan["arms"]] == [arm(made, name) for name in names]
    assert set(plan["unmatched"]) == {"rows", "steps", "learning_rate_sum"}
    table = clbench("stream", "arms", *(made.tracks[name] for name in names)).out
    assert "tiny-arms-junk-100-rows" in table
    assert "--differ rows,steps,learning_rate_sum" in table


@pytest.fixture(scope="module")
def runs(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunStore]:
    """Finished runs of three arms."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name in ("0-packed", "junk-100-packed", "junk-100-rows"):
        track = f"tiny-arms-{name}"
        assert clbench("prepare", made.tracks[track]).code == 0
        done = clbench("run", "-t", made.tracks[track], "-m", "sequential", "-o", folder, "--mlflow", "none")
        assert done.code == 0, done.err
        found[name] = RunStore(folder / track / "sequential" / "seed-0")
    return found


def test_what_was_planned_is_what_the_ledger_says(made: Made, runs: dict[str, RunStore]) -> None:
    for name, run in runs.items():
        planned, ledger = arm(made, f"tiny-arms-{name}"), run.ledger()
        assert sum(ledger["tokens"]["1"].values()) == planned["tokens"]
        for quantity in ("rows", "steps", "learning_rate_sum"):
            assert ledger[quantity]["1"] == planned[quantity]


def test_all_arms_start_from_one_base(runs: dict[str, RunStore]) -> None:
    assert len({run.config()["base"]["weights_sha256"] for run in runs.values()}) == 1
    first = next(iter(runs.values())).rows("heldout", 0)
    assert all(run.rows("heldout", 0).equals(first) for run in runs.values())


def compare(*arguments: object) -> str:
    """Run ``clbench arms`` and return what it printed; raises its ClbenchError."""
    app = typer.Typer()
    app.command()(cli_arms.arms)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, ClbenchError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_matched_arms_are_compared(runs: dict[str, RunStore]) -> None:
    two = [runs["0-packed"].folder, runs["junk-100-packed"].folder]
    found = json.loads(compare(*two, "--json", "--resamples", 200))
    assert found["control"] == "tiny-arms-0-packed"  # dose 0, found through the stream's name
    assert found["unmatched"] == {}
    groups = {one["group"] for one in found["contrasts"]}
    assert groups == {"all groups", "control", "junk", "other text"}
    table = compare(*two, "--resamples", 200)
    assert "tiny-arms-junk-100-packed - tiny-arms-0-packed" in table
    assert "tiny-arms-0-packed - base" in table


def test_unmatched_arms_are_refused_until_the_difference_is_named(runs: dict[str, RunStore]) -> None:
    two = [runs["0-packed"].folder, runs["junk-100-rows"].folder]
    with pytest.raises(ClbenchError, match=r"the arms differ in rows .*--differ rows,steps,learning_rate_sum"):
        compare(*two)
    shown = compare(*two, "--differ", "rows,steps,learning_rate_sum", "--resamples", 200)
    assert "not matched, as named: rows, steps, learning_rate_sum" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "there is nothing to show"),
        (("--of", "tinydocs"), "--like is missing"),
        (("--of", "tinydocs", "--like", "tinydocs"), "--junk is missing"),
        (("--of", "tinydocs", "--junk", "cli-pool", "--like", "tinydocs", "--batching", "row"), "no batching 'row'"),
        (("--of", "tinydocs", "--junk", "cli-pool", "--like", "tinydocs", "--dose", "1.5"), "dose is 1.5"),
        (("--of", "tinydocs", "--junk", "cli-pool", "--like", "tinydocs", "--dose", "1"), "one arm cannot be compared"),
        (("tinydosc",), "did you mean 'tinydocs'"),
    ],
)
def test_mistakes_get_one_line(made: Made, arguments: tuple[str, ...], expected: str) -> None:
    shown = clbench("stream", "arms", *arguments)
    assert shown.code == 2
    assert expected in shown.error
