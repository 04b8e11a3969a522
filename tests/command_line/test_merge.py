"""``clbench merge``: real checkpoints of a real run through the command line; one line for every mistake."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clbench.merge import tensors
from clbench.merge.evaluate import LossJudge, draw, load_tokenizer, read_text
from clbench.merge.execute import Sources, merge_weights
from clbench.merge.plan import Action, MergePlan
from clbench.merge.tensors import open_source
from clbench.suite import Checkpoint
from clbench.train.models import load_model, save_model, weights_of
from tests.command_line.driver import Outcome, clbench

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TEXTS = ("--domain", "tinydocs@3", "--general", "tinydocs@0", "--tokens", 3000, "--device", "cpu")
WORDS = ("zq", "xylem", "0x1f", "7", "}}", "KWARG", "%%", "owl")


@pytest.fixture(scope="session")
def forgetful(tiny: Path, clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, what 30 steps on quite another language made of it, and held-out text of that language."""
    folder = tmp_path_factory.mktemp("forgetful")
    (base,) = clbench_home.glob("bases/tiny-*/model")
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, 60)) for _ in range(60)]
    (folder / "domain.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents[40:]))
    model, tokenizer = load_model(base).train(), load_tokenizer(base)
    rows = torch.tensor([tokenizer(one, add_special_tokens=False)["input_ids"][:60] for one in documents[:40]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(30):
        batch = rows[step % 5 :: 5]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, weights_of(model), folder / "tuned", tokenizer_folder=None)
    for file in base.glob("*token*"):
        shutil.copy(file, folder / "tuned")
    return base, folder / "tuned", folder / "domain.jsonl"


@pytest.fixture
def models(runs: Path, clbench_home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of a base and of what a run made of it, which a test may damage."""
    (base,) = clbench_home.glob("bases/tiny-*/model")
    (tuned,) = runs.glob("tiny/sequential/seed-0/release/stage-03")
    return shutil.copytree(base, tmp_path / "base"), shutil.copytree(tuned, tmp_path / "tuned")


def merge(models: tuple[Path, Path], *arguments: object) -> Outcome:
    return clbench("merge", "--base", models[0], "--tuned", models[1], *arguments)


def found(outcome: Outcome, code: int = 0) -> dict[str, Any]:
    assert outcome.code == code, outcome.err
    facts: dict[str, Any] = json.loads(outcome.out)
    return facts


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- what is written


def test_a_search_writes_a_model_that_has_the_losses_it_was_chosen_for(
    forgetful: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out, keep = tmp_path / "merged", 0.95
    texts = ("--domain", forgetful[2], *TEXTS[2:])
    facts = found(merge(forgetful[:2], *texts, "-m", "wise-ft", "--keep", keep, "--out", out, "--json"))
    assert facts == json.loads((out / "points.json").read_text())
    (chosen,) = [point for point in facts["points"] if point["chosen"]]
    (tuned,) = [point for point in facts["points"] if point["label"] == "tuned"]
    assert tuned["standing"]["general"]["value"] < keep <= chosen["standing"]["general"]["value"]
    assert 0 < chosen["standing"]["domain"]["value"] < 1
    assert chosen["plan_sha256"] == json.loads((out / "merge_plan.json").read_text())["plan_sha256"]
    others = [p for p in facts["points"] if p["standing"]["general"]["value"] >= keep]
    assert chosen["standing"]["domain"]["value"] == max(p["standing"]["domain"]["value"] for p in others)
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors", ".html"}

    # The folder, loaded as any other, measured anew.
    tokenizer = load_tokenizer(out)
    texts = [draw(read_text(name, "general"), tokenizer, 3000) for name in ("tinydocs@0", str(forgetful[2]))]
    judge = LossJudge(*texts, tokenizer)
    checkpoint = Checkpoint(
        model=load_model(out).eval(),
        weights_sha256="",
        device=torch.device("cpu"),
        autocast_dtype=None,
        tokenizer=tokenizer,
    )
    rows = judge.measure(checkpoint)
    for place, side in enumerate(("general", "domain")):
        here = rows.stage == place
        nats = rows.value[here].sum() / rows.n_tokens[here].sum()
        assert chosen["standing"]["scores"][side]["nats_per_token"] == pytest.approx(nats, rel=1e-12)

    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert str(tmp_path) not in page + (out / "points.json").read_text() + (out / "merge_plan.json").read_text()


def test_the_same_search_measures_nothing_twice_and_another_wish_little(
    forgetful: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    arguments = ("--domain", forgetful[2], *TEXTS[2:], "-m", "slerp", "--json")
    first = found(merge(forgetful[:2], *arguments, "--keep", 0.95, "--out", tmp_path / "a"))
    second = found(merge(forgetful[:2], *arguments, "--keep", 0.95, "--out", tmp_path / "b"))
    other = found(merge(forgetful[:2], *arguments, "--keep", 0.9))
    assert other["bill"]["measured_now"] < other["bill"]["search"]["evaluations"]
    assert first["bill"]["measured_now"] > 2
    assert second["bill"].pop("measured_now") == 0
    first["bill"].pop("measured_now")
    for one in (first, second):  # scores are computed again: other seconds
        one["bill"].pop("scores"), one["bill"].pop("search_total")
    assert [p["standing"] for p in first["points"]] == [p["standing"] for p in second["points"]]
    assert first["bill"]["search"] == second["bill"]["search"]
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_fixed_point_needs_no_text_and_measures_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    done = merge(models, "-m", "wise_ft", "-s", 0.25, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "nothing was measured" in done.out
    sources = Sources(tuned=open_source(models[1]), base=open_source(models[0]))
    exact = merge_weights(MergePlan(Action("lerp", {"s": 0.25})), sources)
    written = weights(tmp_path / "out")
    assert exact.keys() == written.keys()
    assert all(torch.equal(exact[name], written[name]) for name in exact)


def test_spear_with_controls_impact_and_exports(models: tuple[Path, Path], tmp_path: Path) -> None:
    out, frozen, kit, page = (tmp_path / name for name in ("out", "freeze.yaml", "kit.yaml", "page.html"))
    extras = ("--controls", "--impact", "--freeze-list", frozen, "--export-mergekit", kit, "--report", page)
    facts = found(merge(models, *TEXTS, "-q", 0.5, "-s", 0.7, *extras, "--out", out, "--json"))
    units = [layer["unit"] for layer in facts["layers"] if layer["strength"]]
    assert yaml.safe_load(frozen.read_text())["frozen_modules"] == sorted(units)
    assert yaml.safe_load(kit.read_text())["merge_method"] == "slerp"
    labels = [point["label"] for point in facts["points"] if point["role"] == "control"]
    for wanted in ("random 1", "random 2", "random 3", "bottom", "drift", "first", "last", "same units, lerp"):
        assert wanted in labels
    assert any(label.startswith("uniform") for label in labels)
    assert set(facts["agreement"]) == {"spear", "swci", "svdr", "drift"}
    assert all(layer["general_gain"] is not None for layer in facts["layers"])
    for words in ("Layer map", "Controls", "Bill", "Spearman"):
        assert words in page.read_text()
    base, tuned, merged = weights(models[0]), weights(models[1]), weights(out)
    for name, tensor in merged.items():
        inside = any(name.startswith(f"{unit}.") for unit in units)
        assert torch.equal(tensor, tuned[name]) != (inside and not torch.equal(base[name], tuned[name]))


def test_the_bill_is_beside_that_of_the_run(runs: Path, models: tuple[Path, Path]) -> None:
    ledger = json.loads((runs / "tiny/sequential/seed-0/ledger.json").read_text())
    (tuned,) = runs.glob("tiny/sequential/seed-0/release/stage-03")
    arguments = (*TEXTS, "-m", "wise-ft", "-s", 0.5, "--json")
    facts = found(clbench("merge", "--base", models[0], "--tuned", tuned, *arguments))
    assert facts["bill"]["retraining"]["flops"] == pytest.approx(ledger["flops"]["train"])
    assert facts["bill"]["retraining"]["n_tokens"] == sum(n for k in ledger["tokens"].values() for n in k.values())
    spent = facts["bill"]["search_total"]["flops"]
    assert facts["bill"]["cost_reduction_flops"] == pytest.approx(1 - spent / ledger["flops"]["train"])
    named = found(merge(models, *arguments, "--ledger", runs / "tiny/sequential/seed-0/ledger.json"))
    assert named["bill"]["retraining"] == facts["bill"]["retraining"]
    assert "retraining" not in found(merge(models, *arguments))["bill"]


def test_a_dry_run_says_what_it_would_cost_and_does_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    facts = found(merge(models, *TEXTS, "--dry-run", "--out", tmp_path / "out", "--json"))
    assert facts["at_most"]["evaluations"] == 18
    assert facts["at_most"]["flops"] > 0
    assert not (tmp_path / "out").exists()
    assert "dry run" in merge(models, *TEXTS, "--dry-run").out


def test_a_text_file_is_measured_as_well_as_a_stream(models: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "old.jsonl"
    documents = read_text("tinydocs@0", "general").documents
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    facts = found(merge(models, *TEXTS[:2], "--general", text, *TEXTS[4:], "-m", "slerp", "-s", 0.5, "--json"))
    assert facts["texts"]["general"]["name"] == "old.jsonl"
    assert np.isfinite(facts["points"][-1]["standing"]["general"]["value"])


# --- where nothing can be chosen


def test_where_nothing_keeps_enough_one_line_says_the_best_and_nothing_is_written(
    forgetful: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    texts = ("--domain", forgetful[2], *TEXTS[2:])
    places = ("--out", out, "--report", page, "--freeze-list", tmp_path / "list.yaml")
    # Embeddings stay tuned, so even all blocks restored are not the base.
    done = merge(forgetful[:2], *texts, "--keep", 1, *places)
    assert done.code == 1, done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("nothing keeps 100.0 % of the base")]
    assert re.search(r"the most is \d+\.\d % \(.*domain gain kept", line)
    assert "--embeddings" in line
    assert not list(tmp_path.iterdir())
    facts = found(merge(forgetful[:2], *texts, "--keep", 1, "--json"), code=1)
    assert facts["chosen"] is None


def test_without_a_domain_gain_nothing_is_searched(forgetful: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, _ = forgetful
    same = ("--domain", "tinydocs@0", *TEXTS[2:])  # what it unlearnt is no gain
    done = merge((base, tuned), *same, "--out", tmp_path / "out")
    assert done.code == 1
    assert "there is no domain gain to keep: training made the domain score worse" in done.out
    assert not (tmp_path / "out").exists()


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*TEXTS, "--keep", 1.5), "--keep 1.5 is no share"),
        ((*TEXTS, "--keep", 0), "--keep 0 is no share"),
        ((), "--domain and --general"),
        (TEXTS[:2], "both --domain and --general"),
        ((*TEXTS, "-m", "wise"), "there is no method 'wise'"),
        ((*TEXTS, "-m", "wise-ft", "-q", 0.5, "-s", 1), "wise-ft has no q"),
        (("-s", 0.5), "-q and -s"),
        (("-q", 0.5, "-s", 2), "-s 2 is no share"),
        (("-q", 0.5, "-s", 1, "--controls"), "controls are measured"),
        ((*TEXTS, "-m", "graft"), "--moments"),
        ((*TEXTS, "-m", "dg-hard", "--export-mergekit", "x.yaml"), "mergekit has no dg-hard"),
        ((*TEXTS, "-m", "slerp", "--freeze-list", "x.yaml"), "--method spear-mm"),
        ((*TEXTS, "--choose", "sper"), "order 'sper' is unknown"),
        ((*TEXTS[:3], "tinydocs@9"), "stage 9 is not in the stream"),
        ((*TEXTS[:3], "nothing.txt"), "the general text is not there"),
        ((*TEXTS, "--ledger", "nothing.json"), "file is missing"),
    ],
)
def test_mistakes_get_one_line(models: tuple[Path, Path], arguments: tuple[object, ...], words: str) -> None:
    assert words in merge(models, *arguments).error


def test_models_that_do_not_fit_are_refused_before_anything_is_written(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = models
    out = tmp_path / "out"
    fixed = ("-m", "wise-ft", "-s", 0.5, "--out", out)
    assert "model folder is missing" in merge((tmp_path / "none", base), *fixed).error
    kept = (base / "tokenizer.json").read_text()
    tokenizer = json.loads(kept)
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    a, b = vocabulary[-2:]
    tokenizer["model"]["vocab"][a], tokenizer["model"]["vocab"][b] = len(vocabulary) - 1, len(vocabulary) - 2
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizers differ" in merge(models, *fixed).error
    (base / "tokenizer.json").write_text(kept)
    one = dict(weights(base))
    first = next(name for name in one if "layers.0" in name)
    del one[first]
    save_file(one, base / "model.safetensors", metadata={"format": "pt"})
    assert f"tensor {first} is in tuned tuned and not in base base" in merge(models, *fixed).error
    (base / "model.safetensors").write_bytes(b"x" * 100)
    assert "corrupted" in merge(models, *fixed).error
    assert not out.exists()


def test_a_folder_that_is_taken_is_left_alone(models: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert "there is something already" in merge(models, "-m", "slerp", "-s", 0.5, "--out", out).error
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = tensors.ShardWriter.write

    def full(self: tensors.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if "layers.1" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(tensors.ShardWriter, "write", full)
    error = merge(models, "-m", "wise-ft", "-s", 0.5, "--out", tmp_path / "deep" / "out").error
    assert "disk is full" in error
    assert not list((tmp_path / "deep").iterdir())


# --- several models, and questions


def test_a_soup_of_a_run_is_the_mean_of_its_releases_and_the_base(
    runs: Path, clbench_home: Path, tmp_path: Path
) -> None:
    (base,) = clbench_home.glob("bases/tiny-*/model")
    (run,) = runs.glob("tiny/sequential")
    (run,) = run.glob("seed-0")
    out = tmp_path / "soup"
    done = clbench("merge", "--base", base, "--checkpoints", run, "-m", "soup", "--out", out)
    assert done.code == 0, done.err
    models = [weights(base), *(weights(one) for one in sorted((run / "release").iterdir()))]
    for name, tensor in weights(out).items():
        wanted = sum(model[name].double() for model in models) / len(models)
        torch.testing.assert_close(tensor, wanted.float())
    roles = json.loads((out / "merge_plan.json").read_text())["inputs"]
    assert list(roles) == ["tuned", "base", *(f"other_{n}" for n in range(1, len(models) - 1))]
    alone = {role: one["weights_sha256"] for role, one in roles.items()}
    assert len(set(alone.values())) == len(models)


def test_graft_and_ota_find_the_moments_of_a_run(runs: Path, clbench_home: Path, tmp_path: Path) -> None:
    (base,) = clbench_home.glob("bases/tiny-*/model")
    (run,) = runs.glob("tiny/sequential/seed-0")
    tuned = run / "release" / "stage-03"
    pair = ("--base", base, "--tuned", tuned, "-s", 0.5)
    for method, out in (("graft", tmp_path / "graft"), ("ota", tmp_path / "ota")):
        done = clbench("merge", *pair, "-m", method, "--moments", run, "--out", out)
        assert done.code == 0, done.err
    one, two = weights(tmp_path / "graft"), weights(tmp_path / "ota")
    assert all(torch.equal(one[name], two[name]) for name in one)  # one expert is a graft
    ends = (weights(tuned), weights(base))
    moved = {name: torch.stack([one[name] == end[name] for end in ends]) for name in one}
    assert all(bool(where.any(0).all()) for where in moved.values())
    n_tuned = sum(int((one[name] == ends[0][name]).sum()) for name in one)
    assert n_tuned == pytest.approx(0.5 * sum(w.numel() for w in one.values()), rel=0.02)
    known = json.loads((tmp_path / "graft" / "merge_plan.json").read_text())["inputs"]
    sources = {role: open_source(place) for role, place in (("tuned", tuned), ("base", base))}
    for role, source in sources.items():
        digests = {name: tensors.tensor_sha256(source.read(name)) for name in source.layout}
        assert known[role]["weights_sha256"] == tensors.layout_sha256(source, digests)


def by_definition(method: str, base: torch.Tensor, experts: list[torch.Tensor], s: float) -> torch.Tensor:
    """One tensor by the papers' formulas, in float64 and entry by entry where that matters."""
    w0 = base.double()
    changes = [expert.double() - w0 for expert in experts]
    if method == "task-arithmetic":
        return w0 + (1 - s) * sum(changes)
    if method == "model-stock":
        (a, b), n = changes, 2
        cos = float((a * b).sum() / a.norm() / b.norm())
        t = n * cos / (1 + (n - 1) * cos)
        return w0 + (1 - s) * t * (a + b) / 2
    kept = []
    for change in changes:  # ties: the largest half of each, signs by their sum, then the mean of those that agree
        order = sorted(range(change.numel()), key=lambda i: -abs(float(change.flatten()[i])))
        mask = torch.zeros(change.numel(), dtype=torch.bool)
        mask[order[: max(1, change.numel() // 2)]] = True
        kept.append(change.flatten() * mask)
    merged = [
        sum(agree) / len(agree) if (agree := [x for x in pair if x and (x > 0) == (sum(pair) >= 0)]) else 0.0
        for pair in zip(*(change.tolist() for change in kept), strict=True)
    ]
    return w0 + (1 - s) * torch.tensor(merged, dtype=torch.float64).reshape(w0.shape)


@pytest.mark.parametrize("s", [0.0, 0.4])
@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "model-stock"])
def test_experts_are_merged_as_their_papers_say(
    runs: Path, clbench_home: Path, tmp_path: Path, method: str, s: float
) -> None:
    (base,) = clbench_home.glob("bases/tiny-*/model")
    release = next(runs.glob("tiny/sequential/seed-0")) / "release"
    one, two = release / "stage-03", release / "stage-01"
    models = ("--base", base, "--tuned", one, "--expert", two, "--density", 0.5)
    done = clbench("merge", *models, "-m", method, "-s", s, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    w0, w1, w2 = (weights(place) for place in (base, one, two))
    for name, merged in weights(tmp_path / "out").items():
        wanted = by_definition(method, w0[name], [w1[name], w2[name]], s)
        torch.testing.assert_close(merged.double(), wanted, rtol=1e-4, atol=1e-6)
    inputs = json.loads((tmp_path / "out" / "merge_plan.json").read_text())["inputs"]
    assert list(inputs) == ["tuned", "base", "other_1"]


def test_experts_are_searched_from_their_merge_to_the_base_and_exported(
    forgetful: tuple[Path, Path, Path], runs: Path, tmp_path: Path
) -> None:
    expert = next(runs.glob("tiny/sequential/seed-0")) / "release" / "stage-01"
    texts = ("--domain", forgetful[2], "--general", "tinydocs@0", "--tokens", 400, "--device", "cpu")
    config = tmp_path / "merge.yml"
    facts = found(
        merge(
            forgetful[:2], *texts, "--expert", expert, "-m", "ties", "-s", 0.25, "--export-mergekit", config, "--json"
        )
    )
    assert facts["chosen"] == "ties s=0.25" and facts["experts"] == [expert.name]
    exported = yaml.safe_load(config.read_text())
    assert exported["merge_method"] == "ties" and exported["parameters"] == {"normalize": True, "lambda": 0.75}
    assert [one["model"] for one in exported["models"]] == list(map(str, (forgetful[0], forgetful[1], expert)))
    assert [one["parameters"]["density"] for one in exported["models"][1:]] == [0.2, 0.2]
    searched = found(merge(forgetful[:2], *texts, "--expert", expert, "-m", "task-arithmetic", "--keep", 0.9, "--json"))
    labels = {point["label"]: point["standing"]["general"]["value"] for point in searched["points"]}
    assert "task-arithmetic s=0" in labels and len(labels) > 3  # what the experts make is measured before the path
    assert labels[searched["chosen"]] >= 0.9


QUIZ = '''
import numpy as np
from clbench.suite import Rows, Suite


class Quiz(Suite):
    """Forty questions that every model gets right, and forty that are guessed."""

    needs_stream = False

    def data_sha256(self):
        return "quiz"

    def measure(self, checkpoint):
        groups = ["known"] * 40 + ["guessed"] * 40
        ones = np.ones(160, dtype=np.int64)
        right = [1.0] * 40 + [float(i % 2) for i in range(40)]
        return Rows(item=[f"{g}/{i}" for i, g in enumerate(groups)] * 2, stage=-ones,
                    metric=["acc"] * 80 + ["chance"] * 80, value=np.array(right + [0.5] * 80), n_tokens=ones,
                    n_bytes=ones, group=groups * 2, change=[""] * 160)
'''


def test_a_suite_stands_beside_the_losses_and_alpha_is_learnt_on_other_documents(
    forgetful: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "quiz.py").write_text(QUIZ)
    texts = ("--domain", forgetful[2], "--general", "tinydocs@0", "--tokens", 400, "--device", "cpu")
    small = ("--learn-tokens", 300, "--learn-steps", 2, "--suite", f"{tmp_path / 'quiz.py'}:Quiz")
    out = tmp_path / "out"
    facts = found(merge(forgetful[:2], *texts, *small, "-m", "learned-alpha", "-s", 0.5, "--out", out, "--json"))
    (chosen,) = [point for point in facts["points"] if point["chosen"]]
    scores = chosen["standing"]["scores"]
    assert (scores["known"], scores["guessed"]) == ({"score": 1.0}, {"score": 0.5})
    assert list(facts["left_out"]) == ["guessed"]
    general = scores["general"]["nats_per_token"]
    base = next(p for p in facts["points"] if p["label"] == "base")["standing"]["scores"]["general"]["nats_per_token"]
    assert chosen["standing"]["general"]["value"] == pytest.approx((base / general + 1) / 2)
    learning = facts["bill"]["learning"]
    assert learning["losses_nats"] and learning["flops"] > 0
    assert facts["bill"]["search_total"]["flops"] > learning["flops"]
    assert {side: text["sha256"] for side, text in learning["texts"].items()} != {
        side: text["sha256"] for side, text in facts["texts"].items()
    }
    page = (out / "report.html").read_text()
    assert "guessed does not count" in page and "learning shares" in page
    shares = {layer["unit"]: layer["strength"] for layer in facts["layers"]}
    base_weights, tuned = weights(forgetful[0]), weights(forgetful[1])
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = torch.lerp(tuned[name], base_weights[name], round(shares["model.layers.0"], 8))
    torch.testing.assert_close(weights(out)[name], wanted)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("-m", "graft", "-s", 0.5), "second moments of 1 models"),
        (("-m", "ota", "-s", 0.5), "second moments of 1 models"),
        (("-m", "wise-ft", "-s", 0.5, "--moments", "RUN"), "leave them out"),
        (("-m", "graft", "-s", 0.5, "--moments", "nowhere"), "moments are missing"),
        (("-m", "wise-ft", "-s", 0.5, "--expert", "RUN"), "one tuned model"),
        (("-m", "ties", "-s", 0.5), "--method trim"),
        (("-m", "model-stock", "-s", 0.5), "--method wise-ft"),
        (("-m", "ties", "-s", 0.5, "--expert", "RUN", "--density", 0), "is no share"),
        (("-m", "model-stock", "-s", 0.5, "--expert", "RUN", "--export-mergekit", "x.yml"), "give -s 0"),
        (("-m", "soup", "-s", 0.5), "no strength"),
        (("-m", "learned-alpha", "-s", 0.5), "reads text"),
        (("-m", "greedy-soup"), "reads text"),
        (("-m", "soup", "--checkpoints", "RUN"), "brings its own models"),
        (("-m", "wise-ft", "-s", 0.5, "--suite", "heldout"), "beside texts"),
        (("-m", "wise-ft", *TEXTS, "--suite", "heldout"), "name a stream"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    models: tuple[Path, Path], tmp_path: Path, arguments: tuple[object, ...], match: str
) -> None:
    out = tmp_path / "out"
    done = merge(models, *(models[1].parent if one == "RUN" else one for one in arguments), "--out", out)
    assert done.code == 2
    assert done.err.count("\n") == 1 and match in done.err
    assert not out.exists()
    if match == "brings its own models":
        none = clbench("merge", "--base", models[0])
        assert none.code == 2 and "no tuned model" in none.err
