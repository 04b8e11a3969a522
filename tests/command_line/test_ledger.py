"""``clbench ledger``: what a run trained on, counted again from its rows; every planted lie is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clbench import audit as audits
from clbench import registry
from clbench.base import open_stream
from clbench.cli_ledger import plan_text, shade, show_tokens
from clbench.method import Composed
from clbench.results.bill import PlanEntry, RunBill, read_bill
from clbench.results.store import RunStore
from clbench.run import plan_stages
from clbench.stream import identity_of
from clbench.train import data
from clbench.train.rows import RowPlanner
from tests.command_line.driver import Outcome, clbench

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
COUNTING = f"{Path(__file__).parent / 'ledger_probes.py'}:Counting"


def trained(tiny: Path, out: Path, *methods: str, seconds: int = 60) -> RunStore:
    """Run a composed method on the tiny track."""
    words = [word for method in methods for word in ("-m", method)]
    place = ["--mlflow", "none", "--checkpoint-seconds", seconds]
    done = clbench("run", *words, "-t", tiny, "-o", out, *place)
    assert done.code == 0, done.err
    (path,) = out.rglob("run.yaml")
    return RunStore.open(path.parent)


def copy_of(store: RunStore, folder: Path) -> Path:
    """Copy what an audit reads."""
    return shutil.copytree(store.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "release"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change a ledger."""
    path = folder / "ledger.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")
    return folder


def verify(folder: Path) -> Outcome:
    return clbench("ledger", folder, "--verify")


def problem(folder: Path) -> str:
    """The one line about a ledger that is not true."""
    found = verify(folder)
    assert found.code == 1
    (line,) = [line for line in found.err.splitlines() if line]
    assert line.startswith("error: ")
    (shown,) = json.loads(clbench("ledger", folder, "--verify", "--json").out)
    assert not shown["audit"]["holds"]
    assert shown["audit"]["problems"]
    return line


@pytest.fixture(scope="module")
def replay(runs: Path) -> RunStore:
    return RunStore.open(runs / "tiny/replay/seed-0")


@pytest.fixture(scope="module")
def adaptive(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A run whose mixture changed within its stages."""
    return trained(tiny, tmp_path_factory.mktemp("adaptive"), "adaptive-replay:steps=1")


# what is counted


def test_the_audit_counts_what_the_model_was_shown(tiny: Path, tmp_path: Path) -> None:
    store = trained(tiny, tmp_path, "replay:fraction=1/4", COUNTING, seconds=0)
    text = json.dumps(json.loads(max(store.folder.glob("checkpoints/*/state.json")).read_text()))
    shown: dict[str, int] = json.loads("{" + text.split('"counts": {')[1].split("}")[0] + "}")
    found = audits.audit(store)
    assert found.holds
    assert {f"{one.stage} {s}": n for one in found.stages for s, n in one.tokens.items()} == shown
    assert sum(shown.values()) == 3 * 1500


def test_runs_side_by_side_are_verified(runs: Path) -> None:
    shown = clbench("ledger", runs, "--verify")
    assert shown.code == 0, shown.err
    assert shown.out.count("verified: 4,500 target tokens") == 2
    found = {one["label"]: one for one in json.loads(clbench("ledger", runs, "--verify", "--json").out)}
    assert found["replay"]["tokens"]["2"] == {"0": 375, "1": 375, "2": 750}
    assert found["replay"]["budgets_by_source"] == pytest.approx(
        {"0": 1 / 2 + 1 / 4 + 1 / 6, "1": 1 / 2 + 1 / 4 + 1 / 6, "2": 1 / 2 + 1 / 6, "3": 1 / 2}, abs=1e-3
    )
    assert found["sequential"]["passes_by_source"]["0"] == 0
    stream = open_stream(registry.load_track("tinydocs"))
    assert found["sequential"]["passes_by_source"]["2"] == 1500 / stream.counts("train", 2)["n_tokens"]
    assert all(one["audit"]["holds"] and one["base_tokens"] == 3000 for one in found.values())


def test_branches_and_stages_without_training_are_verified(tiny: Path, tmp_path: Path) -> None:
    branch = trained(tiny, tmp_path / "a", "wsd")
    assert branch.ledger()["extra_tokens"]["decay_branch"] > 0
    assert verify(branch.folder).code == 0
    lie = edit(copy_of(branch, tmp_path / "lie"), lambda value: value["extra_tokens"].update(decay_branch=0))
    assert "bills 0 tokens of decay branches" in problem(lie)
    frozen = trained(tiny, tmp_path / "b", "frozen")
    assert "verified: 0 target tokens" in verify(frozen.folder).out


def test_reviews_are_shown_and_followed(adaptive: RunStore) -> None:
    shown = verify(adaptive.folder)
    assert shown.code == 0, shown.err
    assert "stage 2 from step 0: 37.5% of 0, 37.5% of 1, 25.0% of 2" in shown.out
    assert "stage 3 from step 2: " in shown.out
    assert adaptive.ledger()["extra_tokens"]["control"] > 0
    assert "extra tokens, control" in shown.out


def test_a_reuse_ratio_that_changed_on_the_way_is_followed(tiny: Path, tmp_path: Path) -> None:
    store = trained(tiny, tmp_path, "reuse-ratio:steps=1,threshold=1")  # any change of the signal counts as stable
    steps = [[entry["step"] for entry in plan] for plan in store.ledger()["plans"].values()]
    assert all(step[0] == 0 and len(step) > 1 for step in steps)
    assert verify(store.folder).code == 0


def test_runs_from_before_plans_were_written_are_planned_again(replay: RunStore, tmp_path: Path) -> None:
    def age(value: dict[str, Any]) -> None:
        for name in ("plans", "steps", "rows", "learning_rate_sum"):
            del value[name]

    assert verify(edit(copy_of(replay, tmp_path / "old"), age)).code == 0


# planted lies


def move(value: dict[str, Any]) -> None:
    value["tokens"]["3"]["3"] += 10
    value["tokens"]["3"]["0"] -= 10


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "moved": (move, "stage 3: the ledger bills 240 target tokens of stage 0, its rows hold 250"),
    "fewer": (lambda v: v["tokens"]["1"].update({"1": 7}), "stage 1: the ledger bills 7 target tokens of stage 1"),
    "hidden": (lambda v: v["tokens"]["2"].pop("0"), "bills 0 target tokens of stage 0, its rows hold 375"),
    "no stage": (lambda v: v["tokens"].pop("2"), "stage 2: the ledger bills 0 target tokens"),
    "base": (lambda v: v["tokens"].update({"0": {"0": 5}}), "stage 0: the ledger bills 5 target tokens"),
    "steps": (lambda v: v["steps"].update({"1": 1}), "stage 1: the ledger bills 1 steps"),
    "rows": (lambda v: v["rows"].update({"3": 9999}), "stage 3: the ledger bills 9,999 rows"),
    "branch": (lambda v: v["extra_tokens"].update(decay_branch=5), "the ledger bills 5 tokens of decay branches"),
    "plan": (lambda v: v["plans"]["2"][0].update(mixture={"2": 1.0}), "stage 2: the ledger says that it was drawn"),
    "excluded": (lambda v: v["plans"]["2"][0].update(n_excluded=4), "4 documents were left out"),
    "review": (
        lambda v: v["plans"]["2"].append({"step": 1, "mixture": {"0": 1.0}}),
        "stage 2: the ledger holds reviews at steps where the method makes none",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_ledger_that_lies_is_found_out(name: str, replay: RunStore, tmp_path: Path) -> None:
    change, message = LIES[name]
    assert message in problem(edit(copy_of(replay, tmp_path / "lie"), change))


def test_a_review_that_lies_is_found_out(adaptive: RunStore, tmp_path: Path) -> None:
    def lie(value: dict[str, Any]) -> None:
        value["plans"]["3"][1]["mixture"] = {"3": 1.0}

    assert "stage 3: the ledger bills" in problem(edit(copy_of(adaptive, tmp_path / "lie"), lie))

    def late(value: dict[str, Any]) -> None:
        value["plans"]["3"][-1]["step"] = 99

    assert "a review at step 99 of" in problem(edit(copy_of(adaptive, tmp_path / "late"), late))


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "future": lambda v: v["plans"]["2"][0].update(mixture={"3": 1.0}),
    "no stream": lambda v: v["plans"]["2"][0].update(mixture={"99": 1.0}),
    "shares": lambda v: v["plans"]["2"][0].update(mixture={"0": 0.2}),
    "order": lambda v: v["plans"]["2"].reverse(),
    "first": lambda v: v["plans"]["2"].pop(0),
    "number": lambda v: v["plans"].update({"2": [{"step": "x", "mixture": {}}]}),
    "no plans": lambda v: v.pop("plans"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_plans_that_no_run_writes_are_refused(name: str, adaptive: RunStore, tmp_path: Path) -> None:
    folder = edit(copy_of(adaptive, tmp_path / "hostile"), HOSTILE[name])
    wanted = "the ledger does not hold it" if name == "no plans" else "ledger.json"
    assert wanted in verify(folder).error


# deletion


def requests_of(tiny: Path, path: Path) -> dict[str, int]:
    """Write requests: some documents of stage 0 from stage 2 on, some of stage 2 from stage 3 on."""
    stream = open_stream(registry.load_track(str(tiny)))
    chosen = {}
    for stage, first in ((0, 2), (2, 3)):
        ids = stream.documents("train", stage, ["id"])["id"].to_pylist()
        chosen |= {identity_of(name): first for name in ids[::8] if identity_of(name) not in chosen}
    path.write_text("id,from_stage\n" + "".join(f"{name},{first}\n" for name, first in chosen.items()))
    return chosen


def tokens_read(store: RunStore, tiny: Path, wanted: set[str], methods: list[str]) -> dict[int, int]:
    """Count by hand: every token of every row, and whose it is."""
    track = registry.load_track(str(tiny))
    stream = open_stream(track)
    method = Composed([registry.make_method(spec).method for spec in methods])
    planner = RowPlanner(stream=stream, training=track.training, seed=0)
    found = {}
    for stage in plan_stages(track, stream, 0):
        order, n = planner.rows(stage, method.plan(stage)), 0
        for source, start, targets in zip(
            order.source.tolist(), order.start.tolist(), order.n_targets.tolist(), strict=True
        ):
            offsets = stream.offsets("train", source).tolist()
            ids = stream.documents("train", source, ["id"])["id"].to_pylist()
            owner = [name for name, a, b in zip(ids, offsets[:-1], offsets[1:], strict=True) for _ in range(b - a)]
            n += sum(identity_of(name) in wanted for name in owner[start : start + targets + 1])
        found[stage.index] = n
    return found


def test_deleted_documents_are_counted_before_and_never_after(tiny: Path, tmp_path: Path) -> None:
    chosen = requests_of(tiny, tmp_path / "requests.csv")
    methods = ["replay", f"deletions:file={tmp_path / 'requests.csv'}"]
    store = trained(tiny, tmp_path / "runs", *methods)
    found = audits.audit(store)
    assert found.holds, found.problems
    assert [(one.stage, one.n_documents) for one in found.deletions] == [
        (2, sum(first == 2 for first in chosen.values())),
        (3, sum(first == 3 for first in chosen.values())),
    ]
    for one in found.deletions:
        wanted = {name for name, first in chosen.items() if first == one.stage}
        by_hand = tokens_read(store, tiny, wanted, methods)
        assert {int(s): n for s, n in one.tokens_before.items() if s != "base"} == {
            stage: n for stage, n in by_hand.items() if stage < one.stage
        }
        assert set(one.tokens_after.values()) == {0}
        assert {stage: n for stage, n in by_hand.items() if stage >= one.stage} == {
            int(stage): 0 for stage in one.tokens_after
        }
    assert sum(found.deletions[0].tokens_before.values()) > found.deletions[0].tokens_before["base"] > 0
    shown = verify(store.folder)
    assert "from stage 2 on" in shown.out
    assert "drawn after 0" in " ".join(shown.out.split())
    (tmp_path / "requests.csv").write_text("id\nother\n")
    assert "the deletion requests have changed" in verify(store.folder).error


def test_an_engine_that_forgets_a_request_is_found_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests_of(tiny, tmp_path / "requests.csv")
    # A planted bug, in the run and in the audit: bill and rows agree, yet the documents are in the rows.
    monkeypatch.setattr(data.Shelf, "free", lambda self, draw: None)
    store = trained(tiny, tmp_path / "runs", "replay", f"deletions:file={tmp_path / 'requests.csv'}")
    assert "tokens were drawn of documents that were to be left out from stage 2 on" in problem(store.folder)


# what cannot be verified, and what is no run


def test_bad_input_is_one_line(tiny: Path, replay: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "folder is missing" in verify(tmp_path / "none").error
    (tmp_path / "empty").mkdir()
    assert "no run in these folders" in verify(tmp_path / "empty").error
    unfinished = copy_of(replay, tmp_path / "unfinished")
    (unfinished / "stages/03.json").unlink()
    assert "not finished: 3 of 4 rows" in verify(unfinished).error
    assert "Not finished: 3 of 4 rows" in clbench("ledger", unfinished).out
    other = copy_of(replay, tmp_path / "other")
    text = (other / "run.yaml").read_text(encoding="utf-8")
    digest = replay.config()["track"]["stream_sha256"]
    (other / "run.yaml").write_text(text.replace(digest, "f" * 64), encoding="utf-8")
    assert "was frozen on ffffffffffff" in verify(other).error
    assert "passes need the built stream" in clbench("ledger", other).out
    broken = edit(copy_of(replay, tmp_path / "broken"), lambda value: value.update(tokens=[]))
    assert "ledger.json does not have its form" in clbench("ledger", broken).error
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    assert "is not built" in verify(replay.folder).error
    assert clbench("ledger", replay.folder).code == 0


def test_checkpoints_made_elsewhere_have_no_bill(tiny: Path, replay: RunStore, tmp_path: Path) -> None:
    out = tmp_path / "outside"
    given = f"1={replay.folder / 'release/stage-01'}"
    assert clbench("evaluate", "--checkpoints", given, "-t", tiny, "-o", out).code == 0
    assert "trained elsewhere" in verify(out).error
    assert "Trained elsewhere" in clbench("ledger", out).out
    both = clbench("ledger", out, replay.folder, "--verify")
    assert "1 of 2 runs cannot be verified" in both.error
    assert "verified: 4,500" in both.out
    lie = edit(copy_of(replay, tmp_path / "lie"), move)
    assert clbench("ledger", out, lie, "--verify").code == 1  # a lie outweighs what cannot be known


def test_a_method_whose_file_was_changed_cannot_be_planned_again(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = "from clbench.method import Method\n\n\nclass Mine(Method):\n    '''Mine.'''\n"
    file.write_text(text, encoding="utf-8")
    store = trained(tiny, tmp_path / "runs", f"{file}:Mine")
    assert verify(store.folder).code == 0
    file.write_text(text + "# changed\n", encoding="utf-8")
    assert "is not the one that ran" in verify(store.folder).error


@pytest.mark.parametrize("name", ["target: adaptive-replay", "options: {}"])
def test_a_run_of_a_method_that_is_not_there_is_one_line(name: str, replay: RunStore, tmp_path: Path) -> None:
    folder = copy_of(replay, tmp_path / "copy")
    config = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    for part in (config["method"]["components"][0],):
        part.update(target="nothing-like-it") if name.startswith("target") else part.pop("options")
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert verify(folder).error


def test_reading_a_strangers_bill_runs_none_of_their_code(replay: RunStore, tmp_path: Path) -> None:
    mark, code = tmp_path / "ran", tmp_path / "stream.py"
    code.write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n", encoding="utf-8")
    folder = copy_of(replay, tmp_path / "copy")
    config = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    config["track"]["stream"] = config["method"]["components"][0]["target"] = str(code)
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert clbench("ledger", folder).code == 0
    assert not mark.exists()


# printing


def test_wide_streams_fall_back_to_shares_and_then_to_shades(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    n = 114
    tokens = {k: dict.fromkeys(range(k + 1), 1000) for k in range(1, n)}
    bill = RunBill(
        label="wide",
        seed=0,
        track="t",
        components=[],
        stages={i: str(i) for i in range(n)},
        n_rows_done=n,
        tokens=tokens,
        budget=1000,
        base_tokens=None,
    )
    show_tokens([bill], None)
    out = capsys.readouterr().out
    assert "113" in out
    (last,) = [line for line in out.splitlines() if line.startswith("│ 113") and "░" in line]
    assert last.count("░") == 29  # of 80 characters 35 are left for 114 stages: 4 a sign
    assert plan_text(PlanEntry(step=0, mixture={i: 1 / n for i in range(n)}), 113) == (
        "0.9% new, 113 old stages 0.88% to 0.88% each"
    )


def test_a_shade_grows_with_the_share() -> None:
    assert [shade(share) for share in (0, 0.01, 0.25, 0.5, 0.75, 1)] == list(" ░▒▓██")


def test_reading_a_bill_changes_nothing(replay: RunStore) -> None:
    before = {path: path.read_bytes() for path in replay.folder.rglob("*") if path.is_file()}
    read_bill(replay)
    assert verify(replay.folder).code == 0
    assert {path: path.read_bytes() for path in replay.folder.rglob("*") if path.is_file()} == before
