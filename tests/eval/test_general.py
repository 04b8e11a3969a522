"""Suite ``general``: lm-eval's values on hand-written sets, what decides an address, bad input, the real sets."""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from clbench import cells, prepare, pretrained, registry
from clbench.errors import ClbenchError, ConfigError, NotFoundError
from clbench.eval import _lm_ready, _sets
from clbench.eval._tasks import as_task
from clbench.eval.general import General, standard_error
from clbench.listing import listing
from clbench.suite import UNDATED, Checkpoint, Rows
from tests.eval.byte_models import Continuer, checkpoint_of
from tests.eval.set_records import PREPARED, REAL, Made, known, prepare_made, records_of
from tests.eval.test_heldout import llama

SETS = list(REAL.sets)
GENERATED = ["gsm8k", "triviaqa", "nq-open", "squad"]
SMOLLM2 = pretrained.model_folder("smollm2-135m")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The hand-written sets, prepared once."""
    return prepare_made(tmp_path_factory.mktemp("sets"))


@pytest.fixture(autouse=True)
def at_home(prepared: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home with the hand-written sets, offline."""
    known(monkeypatch, prepared.wheel, prepared.home)
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    """A random model that reads bytes."""
    return checkpoint_of(llama(vocab_size=257, max_position_embeddings=4096))


def suite(**options: Any) -> General:
    return General(None, General.Options(**options))


class Knowing(Continuer):
    """A model that continues with a given answer, with what lm-eval asks of a model before it runs it."""

    def __init__(self, answer: str, opening: str) -> None:
        super().__init__(lambda prompt: self.seen.append(prompt) or answer, opening, 8192)  # type: ignore[func-returns-value]
        self.seen: list[str] = []
        self.device, self.config.model_type = torch.device("cpu"), "llama"

    def tie_weights(self) -> None:
        """Nothing is tied."""


def values(rows: Rows) -> dict[str, dict[str, float]]:
    """Metric -> item -> value."""
    found: dict[str, dict[str, float]] = {}
    for item, metric, value in zip(rows.item, rows.metric, rows.value.tolist(), strict=True):
        found.setdefault(metric, {})[item] = value
    return found


def stock_values(checkpoint: Checkpoint, name: str, records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The same from lm-eval's own evaluator and its own model, on copies: it changes what it is given."""
    model, tokenizer = copy.deepcopy(checkpoint.model), copy.deepcopy(checkpoint.tokenizer)
    task = as_task(_sets.task_config(name, records))
    with _lm_ready.quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
        samples = evaluator.evaluate(lm, {name: task}, log_samples=True, bootstrap_iters=0)["samples"][name]
    forms = {sample["filter"] for sample in samples}
    found: dict[str, dict[str, float]] = {}
    for sample in samples:
        item = f"{name}/{records[sample['doc_id']]['id']}"
        for metric in sample["metrics"]:
            called = metric if len(forms) == 1 else f"{metric}:{sample['filter']}"
            found.setdefault(called, {})[item] = float(sample[metric])
    return found


def check_equal(ours: dict[str, dict[str, float]], stock: dict[str, dict[str, float]]) -> None:
    for metric, expected in stock.items():
        if metric == "perplexity":  # a log-likelihood before it is aggregated
            assert ours[metric] == pytest.approx(expected, abs=5e-4)
        else:
            assert ours[metric] == expected


# --- values


@pytest.mark.parametrize("name", [name for name in SETS if name != "gsm8k"])
def test_a_set_has_the_values_of_stock_lm_eval(tiny: Checkpoint, name: str) -> None:
    rows = suite(sets=(name,)).measure(tiny)
    check_equal(values(rows), stock_values(tiny, name, records_of(name)))
    assert set(rows.group) == {name}
    assert set(rows.stage.tolist()) == {UNDATED}
    assert set(rows.n_tokens.tolist()) == {1}
    assert {item for item in rows.item} == {f"{name}/{record['id']}" for record in records_of(name)}


@pytest.mark.parametrize(
    ("name", "chance"), [("arc-easy", [1 / 2, 1 / 3]), ("commonsense-qa", [1 / 5]), ("winogrande", [1 / 2] * 2)]
)
def test_chance_is_one_in_the_choices(tiny: Checkpoint, name: str, chance: list[float]) -> None:
    assert list(values(suite(sets=(name,)).measure(tiny))["chance"].values()) == pytest.approx(chance)


ANSWERS = {
    "gsm8k": (
        "Two and two is 4. The answer is 4.",
        "A:",
        {"exact_match:strict-match": 1, "exact_match:flexible-extract": 1},
    ),
    "triviaqa": (" the CORK!\nQuestion", "Answer:", {"exact_match": 1}),
    "squad": (" a cork\nTitle", "Answer:", {"exact_match": 1, "f1": 1}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_model_that_knows_the_answer_is_right(name: str) -> None:
    answer, opening, expected = ANSWERS[name]
    knowing = checkpoint_of(Knowing(answer, opening))
    assert {m: list(v.values()) for m, v in values(suite(sets=(name,)).measure(knowing)).items()} == {
        metric: [value] for metric, value in expected.items()
    }


def test_a_second_filter_is_told_apart() -> None:
    """The number is there, the sentence that the strict filter looks for is not."""
    knowing = checkpoint_of(Knowing("It is 4", "A:"))
    found = values(suite(sets=("gsm8k",)).measure(knowing))
    assert found["exact_match:strict-match"] == {"gsm8k/0": 0}
    assert found["exact_match:flexible-extract"] == {"gsm8k/0": 1}


def test_the_eight_examples_stand_before_the_question() -> None:
    model = Knowing("4", "A:")
    suite(sets=("gsm8k",)).measure(checkpoint_of(model))
    assert model.seen[0].count("Q: ") == 9
    assert model.seen[0].endswith("Q: Two corks and two corks?\nA:")


def test_a_worked_example_is_before_each_question_and_is_not_asked(tiny: Checkpoint) -> None:
    one, other = records_of("arc-easy")
    example, asked = sorted((one, other), key=lambda r: hashlib.sha256(f"arc-easy/{r['id']}".encode()).digest())[::-1]
    rows = suite(sets=("arc-easy",), shots=1).measure(tiny)
    assert set(rows.item) == {f"arc-easy/{asked['id']}"}
    plain = values(suite(sets=("arc-easy",)).measure(tiny))
    assert values(rows)["gold_nats"] != {item: plain["gold_nats"][item] for item in set(rows.item)}
    assert example["id"] not in str(rows.item)


def test_parts_joined_are_the_whole_and_nothing_is_left_behind(tiny: Checkpoint) -> None:
    both = suite(sets=("piqa", "copa"))
    tiny.model.train()
    before = torch.get_rng_state()
    whole = both.measure(tiny)
    parts = Rows.joined([both.measure_shard(tiny, shard) for shard in both.shards()])
    assert whole.item == parts.item
    assert np.array_equal(whole.value, parts.value)
    assert tiny.model.training
    assert torch.equal(before, torch.get_rng_state())
    assert both.shard_flops(tiny, "piqa") > 0
    tiny.model.eval()


# --- addresses


def test_sets_and_their_order_do_not_move_an_address(tiny: Checkpoint) -> None:
    one, three = suite(sets=("piqa",)), suite(sets=("copa", "piqa", "arc-easy"))
    assert three.shards() == ["arc-easy", "piqa", "copa"]
    assert cells.address_of(one, tiny, "piqa") == cells.address_of(three, tiny, "piqa")
    assert one.data_sha256() != three.data_sha256()
    assert suite().shards() == SETS


def test_what_changes_values_changes_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_it = suite(sets=("piqa",))
    assert suite(sets=("piqa",), n_items=1).shard_sha256("piqa") != all_of_it.shard_sha256("piqa")
    assert suite(sets=("piqa",), n_items=2).shard_sha256("piqa") == all_of_it.shard_sha256("piqa")  # there are two
    before = all_of_it.shard_sha256("piqa")
    assert suite(sets=("piqa",), shots=1).shard_sha256("piqa") != before
    for name in ("gsm8k", "lambada"):  # these keep what they have
        assert suite(sets=(name,), shots=1).shard_sha256(name) == suite(sets=(name,)).shard_sha256(name)
    changed = _sets.pin("piqa").model_copy(update={"task": {**_sets.pin("piqa").task, "doc_to_text": "{{goal}}"}})
    monkeypatch.setitem(_sets.collection().sets, "piqa", changed)
    assert all_of_it.shard_sha256("piqa") != before


def test_a_cell_is_measured_once(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "cells_folder", lambda: tmp_path)
    first = cells.measure(suite(sets=("piqa",)), tiny)
    assert (first.cached, cells.measure(suite(sets=("piqa", "copa")), tiny).cached) == (False, False)
    assert cells.measure(suite(sets=("copa", "piqa")), tiny).cached


def test_the_registry_makes_it() -> None:
    made = registry.make_suite("general:size=small,sets=arc-easy+piqa")
    assert made.shards() == ["arc-easy", "piqa"]
    assert isinstance(made, General)
    assert [made.n_items(shard) for shard in made.shards()] == [2, 2]  # all there are


def test_sizes_are_those_of_the_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sets, "collection", lambda: REAL)
    for name, one in REAL.sets.items():
        assert suite(sets=(name,)).n_items(name) == one.n_small <= one.n_items
        assert suite(sets=(name,), size="full").n_items(name) == one.n_items
        assert suite(sets=(name,), size="full", n_items=7).n_items(name) == 7


# --- preparing


def test_prepare_tells_the_licences(capsys: pytest.CaptureFixture[str]) -> None:
    made = prepare.prepare("suite:general")["suites"]["general"]
    told = capsys.readouterr().err
    for name, one in REAL.sets.items():
        assert made["sets"][name]["licence"] == one.licence
        assert re.search(rf"set {name}: \d+ questions? .*{re.escape(one.licence)}", told)


def test_the_list_tells_them_too() -> None:
    (entry,) = listing("suites", Path("runs"), name="general")["suites"]
    assert {one["name"]: one["licence"] for one in entry["sources"]} == {k: v.licence for k, v in REAL.sets.items()}
    assert [one["name"] for one in entry["options"]] == ["size", "sets", "n_items", "shots", "tokens_per_batch"]


# --- bad input


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sets": ("arc-hard",)}, NotFoundError, "did you mean 'arc-easy'"),
        ({"sets": ("piqa", "piqa")}, ConfigError, "each once"),
        ({"sets": ()}, ConfigError, "each once"),
        ({"n_items": 0}, ConfigError, "n_items must be at least 1, not 0"),
        ({"shots": -1}, ConfigError, "shots must be 0 to 32, not -1"),
        ({"tokens_per_batch": 0}, ConfigError, "tokens_per_batch must be at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], kind: type[ClbenchError], message: str) -> None:
    with pytest.raises(kind, match=message):
        suite(**options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("general:size=huge", "option size"),
        ("general:set=piqa", "did you mean 'sets'"),
        ("general:n_items=x", "n_items"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.make_suite(spec)


def test_sets_that_are_not_there_are_asked_for(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path))
    with pytest.raises(NotFoundError, match=r"not prepared .*run `clbench prepare evals`"):
        suite(sets=("piqa",)).measure(tiny)


def test_a_checkpoint_without_a_tokenizer_is_refused(tiny: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        suite(sets=("piqa",)).measure(replace(tiny, tokenizer=None))


def test_a_model_of_nan_is_refused_by_name(tiny: Checkpoint) -> None:
    broken = copy.deepcopy(tiny.model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ClbenchError, match="nan"):
        suite(sets=("copa",)).measure(replace(tiny, model=broken))


# --- what stands in the documentation


def test_the_page_has_every_set_with_its_licence() -> None:
    page = (Path(__file__).parents[2] / "docs" / "general.md").read_text(encoding="utf-8")
    for name, one in REAL.sets.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        for told in (one.title, one.split, f"{one.n_items:,}", str(one.n_small), one.licence):
            assert told in row, (name, told)
        assert ("(reported)" in row) is not one.licence_read


def test_the_standard_error_of_a_share() -> None:
    """Against its definition: the standard deviation of the mean of n coins, by adding up the binomial law."""
    from math import comb, sqrt

    n, p = 20, 0.3
    law = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    assert standard_error(p, n) == pytest.approx(sqrt(sum(w * (k / n - p) ** 2 for k, w in enumerate(law))))


# --- the real sets under the real model


@pytest.mark.slow
@pytest.mark.skipif(
    PREPARED is None or not (SMOLLM2 / "model.json").is_file(),
    reason="run `clbench prepare evals` and `clbench prepare model:smollm2-135m` to have this test",
)
@pytest.mark.parametrize("name", ["arc-easy", "winogrande", "lambada"])
def test_the_real_model_has_the_values_of_stock_lm_eval(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from clbench.train.models import load_model

    assert PREPARED is not None
    monkeypatch.setattr(_sets, "collection", lambda: REAL)
    monkeypatch.setenv("CLBENCH_HOME", str(PREPARED))
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2, local_files_only=True)
    real = checkpoint_of(load_model(SMOLLM2), tokenizer=tokenizer)
    rows = suite(sets=(name,), n_items=4).measure(real)
    check_equal(values(rows), stock_values(real, name, _sets.open_set(name).chosen(4)))
