"""A series of oracles: blind to what comes later, token-matched, resumable, and read like a method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import oracle as oracles
from clbench import oracle_series, registry
from clbench.base import make_base, open_stream, train_from_scratch
from clbench.errors import NeedError
from clbench.files import digest_of
from clbench.home import bases_folder
from clbench.results.matrix import matrix_of
from clbench.results.store import RunStore
from clbench.run import hardware_for
from clbench.track import Track
from clbench.train.models import load_model, weights_sha256
from tests.command_line.driver import Outcome, clbench, results_of, write_track

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared track of 4 stages: a base of 3,000 tokens, 1,500 tokens a stage."""
    path = write_track(tmp_path_factory.mktemp("series") / "tiny-series.yaml", name="tiny-series")
    assert clbench("prepare", path).code == 0
    return path


@pytest.fixture(scope="module")
def track(file: Path) -> Track:
    return registry.load_track(str(file))


def ask(file: Path, out: Path, *words: object) -> Outcome:
    return clbench("oracle", file, *words, "--out", out, "--mlflow", "none", "--json")


@pytest.fixture(scope="module")
def every(file: Path) -> RunStore:
    """An oracle of every stage, of the base's seed."""
    done = ask(file, file.parent / "runs", "--series")
    assert done.code == 0, done.err
    return RunStore.open(file.parent / "runs/tiny-series/oracle-series/seed-0")


@pytest.fixture(scope="module")
def some(file: Path) -> RunStore:
    """Oracles of stages 1 and 3, of another seed."""
    done = ask(file, file.parent / "runs", "--cutoff", 3, "--cutoff", 1, "--seed", 1)
    assert done.code == 0, done.err
    return RunStore.open(file.parent / "runs/tiny-series/oracle-series-cutoffs-1-3/seed-1")


def full_address(track: Track, seed: int) -> str:
    """Where full oracles have lain since the first track was frozen."""
    stream = open_stream(track)
    precision = hardware_for(track, stream, "cpu").precision
    parts = {
        "recipe": track.base_sha256(),
        "stream": stream.sha256,
        "n_tokens": 7500,
        "seed": seed,
        "p": precision,
    }
    return f"tiny-series-oracle-{digest_of(parts)[:12]}"


def test_each_oracle_is_matched_to_a_run_at_its_date_in_equal_shares(every: RunStore) -> None:
    tokens = every.ledger()["tokens"]
    assert [sum(tokens[str(cutoff)].values()) for cutoff in range(4)] == [3000, 4500, 6000, 7500]
    for cutoff in range(4):
        shares = tokens[str(cutoff)]
        assert list(shares) == [str(source) for source in range(cutoff + 1)]
        assert max(shares.values()) - min(shares.values()) <= 1


def test_the_bill_and_the_log_are_those_of_all_its_oracles(track: Track, every: RunStore) -> None:
    stream = open_stream(track)
    hardware = hardware_for(track, stream, "cpu")
    alone = [oracles.make_oracle(track, stream, hardware, cutoff=cutoff, seed=0).ledger for cutoff in range(4)]
    bill = every.ledger()
    assert bill["flops"]["train"] == sum(one.flops["train"] for one in alone)
    assert bill["seconds"]["train"] == pytest.approx(sum(one.seconds["train"] for one in alone))
    assert bill["steps"] == {str(cutoff): one.steps[cutoff] for cutoff, one in enumerate(alone)}
    last = {line["stage"]: line["step"] + 1 for line in every.steps()}
    assert last == {cutoff: one.steps[cutoff] for cutoff, one in enumerate(alone)}
    assert last == {cutoff: every.stage_record(cutoff)["n_steps"] for cutoff in range(4)}


def test_a_row_is_the_newest_oracle_of_that_date(track: Track, every: RunStore, some: RunStore) -> None:
    stream = open_stream(track)
    hardware = hardware_for(track, stream, "cpu")
    digests = {
        cutoff: weights_sha256(
            load_model(oracles.make_oracle(track, stream, hardware, cutoff=cutoff, seed=1).model_folder)
        )
        for cutoff in (1, 3)
    }
    assert some.stages_done() == [1, 2, 3]
    rows = [some.stage_record(k)["weights_sha256"] for k in (1, 2, 3)]
    assert rows == [digests[1], digests[1], digests[3]]
    assert [some.stage_record(k)["n_steps"] > 0 for k in (1, 2, 3)] == [True, False, True]
    assert len({every.stage_record(k)["weights_sha256"] for k in range(4)}) == 4
    base = make_base(track, stream, hardware)
    assert every.stage_record(0)["weights_sha256"] == base.weights_sha256  # the same text, recipe and seed


def test_no_oracle_can_read_what_comes_after_its_cutoff(
    track: Track, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[int, Any] = {}

    class Enough(Exception):
        pass

    def catch(track: Track, stream: Any, *args: Any, mixture: dict[int, float], **kwargs: Any) -> None:
        given[max(mixture)] = stream, mixture
        raise Enough

    monkeypatch.setattr(oracles, "train_from_scratch", catch)
    stream = open_stream(track)
    for cutoff in range(4):
        with pytest.raises(Enough):
            oracles.make_oracle(track, stream, hardware_for(track, stream, "cpu"), cutoff=cutoff, seed=77)
        seen, mixture = given[cutoff]
        assert mixture == dict.fromkeys(range(cutoff + 1), 1 / (cutoff + 1))
        assert len(seen.tokens("train", cutoff)) > 0
        if cutoff < 3:
            with pytest.raises(NeedError, match="has not happened yet"):
                seen.tokens("train", cutoff + 1)


def test_the_full_oracle_is_the_one_that_tracks_are_frozen_on(
    file: Path, track: Track, every: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (bases_folder() / full_address(track, 0) / "oracle.json").is_file()

    def never(job: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("clbench.base.train", never)
    frozen = clbench("oracle", file, "--json")
    assert frozen.code == 0, frozen.err
    losses = json.loads(frozen.out)["oracle"]["nats_per_token"]
    assert matrix_of(every).values[3] == pytest.approx(losses, abs=1e-5)


def test_the_full_oracle_has_the_bits_of_training_on_the_whole_stream(
    track: Track, every: RunStore, tmp_path: Path
) -> None:
    stream = open_stream(track)
    hardware = hardware_for(track, stream, "cpu")
    mixture = dict.fromkeys(range(4), 1 / 4)
    parts: dict[str, Any] = {"work": tmp_path, "title": "", "mixture": mixture, "n_tokens": 7500, "seed": 0}
    model, _, _ = train_from_scratch(track, stream, hardware, **parts)
    assert weights_sha256(model) == every.stage_record(3)["weights_sha256"]


def test_it_reads_like_a_method(every: RunStore, file: Path, tmp_path: Path) -> None:
    shown = ask(file, file.parent / "runs", "--series")  # asking again trains and changes nothing
    (summary,) = json.loads(shown.out)
    values = matrix_of(every).values
    below, above = np.tril_indices(4, -1), np.triu_indices(4, 1)
    rows = below[0] > 0
    assert summary["label"] == "oracle-series"
    assert summary["complete"]
    assert summary["scores"]["backward"]["value"] == pytest.approx(values[below[0][rows], below[1][rows]].mean())
    later = above[0] > 0
    assert summary["scores"]["forward"]["value"] == pytest.approx(values[above[0][later], above[1][later]].mean())
    assert summary["bill"]["n_tokens"] == 3000 + 4500 + 6000 + 7500
    assert clbench("report", every.folder, "--out", tmp_path / "r.html").code == 0
    assert "oracle-series" in (tmp_path / "r.html").read_text(encoding="utf-8")
    verified = clbench("ledger", every.folder, "--verify", "--json")
    assert verified.code == 0, verified.err
    assert json.loads(verified.out)[0]["audit"]["holds"]


def test_a_killed_or_damaged_series_goes_on(file: Path, every: RunStore, tmp_path: Path) -> None:
    real = oracle_series.make_oracle

    def killed(*args: Any, cutoff: int, **kwargs: Any) -> Any:
        if cutoff == 2:
            raise KeyboardInterrupt
        return real(*args, cutoff=cutoff, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle_series, "make_oracle", killed)
        assert ask(file, tmp_path, "--series").code == 130
    store = RunStore.open(tmp_path / "tiny-series/oracle-series/seed-0")
    assert store.status()["state"] == "stopped"
    assert store.stages_done() == [0, 1]
    (store.folder / "rows/heldout-01.parquet").write_bytes(b"damaged")
    assert ask(file, tmp_path, "--series").code == 0
    whole, again = results_of(every), results_of(store)
    assert whole == again


def test_a_series_with_other_cutoffs_or_seeds_is_another_run(file: Path, some: RunStore, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-series/oracle-series-cutoffs-1-3/seed-1"
    shutil.copytree(some.folder, folder)
    config = (folder / "run.yaml").read_text(encoding="utf-8")
    (folder / "run.yaml").write_text(config.replace(some.config()["run_id"], "0" * 16), encoding="utf-8")
    assert "holds another run" in ask(file, tmp_path, "--cutoff", 1, "--cutoff", 3, "--seed", 1).error


def test_the_plan_is_a_table_and_trains_and_builds_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "empty"))
    plan = clbench("oracle", file, "--plan", "--cutoff", 0, "--cutoff", 3, "--continual-tokens", 4000, "--json")
    found = json.loads(plan.out)
    assert [(one["cutoff"], one["n_tokens"]) for one in found["oracles"]] == [(0, 3000), (3, 7500)]
    assert (found["series_tokens"], found["continual_tokens"]) == (10500, 4000)
    assert found["ratio"] == pytest.approx(10500 / 4000)
    shown = clbench("oracle", file, "--plan")
    assert shown.code == 0
    assert "21,000" in shown.out
    assert "2.80 times" in shown.out
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--series", "--write"], "--write freezes the full oracle only"),
        (["--plan", "--write"], "--write freezes the full oracle only"),
        (["--continual-tokens", 5], "--continual-tokens is for --plan"),
        (["--plan", "--continual-tokens", 0], "a continual run of 0 tokens"),
        (["--cutoff", 4], "stage 4 is not in the stream"),
        (["--cutoff", 1, "--cutoff", 1], "a cutoff is given twice"),
        (["--plan", "--cutoff", -1], "stage -1 is not in the stream"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    file: Path, words: list[object], message: str, tmp_path: Path
) -> None:
    assert message in clbench("oracle", file, *words, "--out", tmp_path / "out", "--mlflow", "none").error
    assert not (tmp_path / "out").exists()
