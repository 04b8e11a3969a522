from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM

from clbench import registry
from clbench.errors import ClbenchError, ConfigError, NonFiniteError, NotFoundError, OfflineError
from clbench.eval import _lm_ready
from clbench.eval._lm import ClbenchLM
from clbench.eval._task_files import load_tasks
from clbench.eval._tasks import aggregates, as_task, measure_tasks, run_tasks
from clbench.eval.tasks import Tasks
from clbench.suite import UNDATED, Checkpoint, Rows
from tests.eval.test_heldout import llama, state_of, word_tokenizer
from tests.eval.test_scorer import checkpoint_of

WORDS = [f"w{i}" for i in range(1, 64)]
N = 12


def words(n: int, *seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n).tolist())


def checkpoint() -> Checkpoint:
    model = llama(max_position_embeddings=64)
    return checkpoint_of(model, tokenizer=word_tokenizer(eos_token="<eos>"), tokenizer_sha256="b")


def questions(n: int = N) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{i}",
            "question": words(2 + i % 5, 1, i),
            "choices": [words(1 + (i + c) % 3, 2, i, c) for c in range(2 + i % 3)],
            "gold": i % 2,
            "stage": i // 4,
            "change": "new",
            "text": words(5 + 9 * i, 3, i),
        }
        for i in range(n)
    ]


MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICE: dict[str, Any] = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} w9",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
}
OTHERS: list[dict[str, Any]] = [
    CHOICE | {"task": "shots", "num_fewshot": 2},
    CHOICE
    | {
        "task": "binary",
        "doc_to_choice": ["w5 w6", "w7"],
        "metric_list": [
            {"metric": "mcc"},
            {"metric": "f1"},
            {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
        ],
    },
    CHOICE | {"task": "information", "metric_list": [{"metric": "acc_mutual_info", **MEAN}, {"metric": "acc", **MEAN}]},
    CHOICE
    | {
        "task": "contexts",
        "doc_to_text": "{{gold}}",
        "doc_to_target": "{{question}}",
        "doc_to_choice": "{{[question ~ ' w3', question ~ ' w4 w5']}}",
    },
    {
        "task": "word",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", **MEAN}],
    },
    {
        "task": "texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["w5", "w6"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
        "filter_list": [
            {
                "name": "first",
                "filter": [{"function": "regex", "regex_pattern": "(w1[0-9])"}, {"function": "take_first"}],
            },
            {"name": "all", "filter": [{"function": "take_first"}]},
        ],
    },
]
EVERY = [CHOICE, *OTHERS]


def value_of(rows: Rows, item: str, metric: str) -> float:
    return next(
        v for i, m, v in zip(rows.item, rows.metric, rows.value.tolist(), strict=True) if (i, m) == (item, metric)
    )


def write_task(folder: Path, config: dict[str, Any], docs: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{config['task']}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in (questions() if docs is None else docs)))
    own = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{config['task']}.yaml").write_text(yaml.safe_dump(own | config))
    return folder


@pytest.fixture(autouse=True)
def few_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's manager knows 14,687 names and takes eight seconds; this one knows lm-eval's folder of ARC."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(Path(lm_eval.__file__).parent / "tasks" / "arc"), include_defaults=False)
    manager.include_path = None
    monkeypatch.setattr("clbench.eval._task_files._built_in", lambda: manager)


@pytest.fixture(scope="module")
def measured() -> tuple[list[Any], Rows]:
    tasks = [as_task(config | {"docs": questions()}) for config in EVERY]
    return tasks, run_tasks(ClbenchLM(checkpoint(), tokens_per_batch=300), tasks)


# --- equal to lm-eval


def test_every_kind_of_task_gives_lm_evals_own_figures(measured: tuple[list[Any], Rows]) -> None:
    tasks, rows = measured
    one = checkpoint()
    lm = HFLM(pretrained=copy.deepcopy(one.model), tokenizer=copy.deepcopy(one.tokenizer), batch_size=1, max_length=64)
    again = [as_task(config | {"docs": questions()}) for config in EVERY]
    for task in again:
        task.set_fewshot_seed(1234)  # as simple_evaluate does
    theirs = lm_eval.evaluate(lm, {"tasks": {task.task_name: task for task in again}}, bootstrap_iters=0)
    for task in tasks:
        expected = {
            metric.removesuffix(",none").replace(",", ":"): value
            for metric, value in theirs["results"][task.task_name].items()
            if "," in metric and "stderr" not in metric
        }
        found = aggregates(task, rows)
        assert found.keys() == expected.keys() and found
        for metric, value in expected.items():
            assert found[metric] == pytest.approx(value, rel=1e-5), (task.task_name, metric)
    of_choice = {sample["doc"]["id"]: sample for sample in theirs["samples"]["choice"]}
    assert len({sample["acc"] for sample in of_choice.values()}) == 2
    for name, sample in of_choice.items():
        assert value_of(rows, f"choice/{name}", "acc") == sample["acc"]
        assert value_of(rows, f"choice/{name}", "acc_norm") == sample["acc_norm"]
        scores = np.array([r[0][0] for r in sample["resps"]])
        gold = sample["doc"]["gold"]
        assert value_of(rows, f"choice/{name}", "gold_nats") == pytest.approx(-scores[gold], abs=5e-5)
        by_hand = math.log(np.exp(scores).sum()) - scores[gold]
        assert value_of(rows, f"choice/{name}", "choice_nats") == pytest.approx(by_hand, abs=5e-5)


def test_rows_say_what_they_are_about(measured: tuple[list[Any], Rows]) -> None:
    _, rows = measured
    at = [i for i, group in enumerate(rows.group) if group == "choice"]
    assert [rows.item[i] for i in at[:5]] == ["choice/q0"] * 5
    assert [rows.metric[i] for i in at[:5]] == ["acc", "acc_norm", "chance", "gold_nats", "choice_nats"]
    assert rows.stage[at].tolist() == [d["stage"] for d in questions() for _ in range(5)]
    assert {rows.change[i] for i in at} == {"new"} and set(rows.n_tokens[at].tolist()) == {1}
    for doc in questions():
        assert value_of(rows, f"choice/{doc['id']}", "chance") == 1 / len(doc["choices"])
    place = next(i for i in at if rows.metric[i] == "gold_nats" and rows.item[i] == "choice/q1")
    assert rows.n_bytes[place] == len(f" {questions()[1]['choices'][1]}".encode())
    text = next(i for i, m in enumerate(rows.metric) if m == "nll_nats" and rows.item[i] == "texts/q4")
    assert (rows.n_tokens[text], rows.n_bytes[text]) == (41, len(questions()[4]["text"].encode()))


def test_documents_without_names_are_numbered_and_undated() -> None:
    docs = [{k: v for k, v in doc.items() if k not in ("id", "stage", "change")} for doc in questions(4)]
    rows = measure_tasks(checkpoint(), [CHOICE | {"docs": docs}], limit=3)
    assert sorted(set(rows.item)) == ["choice/0", "choice/1", "choice/2"] and set(rows.stage.tolist()) == {UNDATED}
    twice = [doc | {"id": "same"} for doc in docs]
    assert measure_tasks(checkpoint(), [CHOICE | {"docs": twice}], limit=3).item == rows.item


def test_a_task_asked_again_has_the_same_worked_examples() -> None:
    """lm-eval's sampler goes on where it stopped: a second checkpoint would get other examples."""
    task, lm = as_task(OTHERS[0] | {"docs": questions()}), ClbenchLM(checkpoint())
    first, again = run_tasks(lm, [task]), run_tasks(lm, [task])
    assert first.value.tolist() == again.value.tolist()
    other = measure_tasks(checkpoint(), [CHOICE | {"docs": questions()}], num_fewshot=2)
    assert other.value.tolist() == first.value.tolist()
    with pytest.raises(ConfigError, match="without worked examples on purpose"):
        measure_tasks(checkpoint(), [CHOICE | {"docs": questions(), "num_fewshot": 0}], num_fewshot=2)


def test_what_was_cut_or_merged_is_said() -> None:
    long = questions(3)
    long[1]["question"] = words(80, 9)
    rows = measure_tasks(checkpoint(), [CHOICE | {"docs": long}])
    cut = {i: v for i, m, v in zip(rows.item, rows.metric, rows.value.tolist(), strict=True) if m == "n_cut_tokens"}
    # The question and "w9" are 81 tokens; each choice of k tokens leaves room for 64 - k + 1 of them.
    by_hand = sum(81 + len(choice.split()) - 1 - 64 for choice in long[1]["choices"])
    assert cut == {"choice/q1": by_hand}


def test_nothing_global_is_moved() -> None:
    import datasets
    import datasets.config
    from lm_eval import utils

    one = checkpoint()
    one.model.train()
    before = state_of(one.model)
    held = (utils.apply_template, datasets.config.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled())
    measure_tasks(one, [config | {"docs": questions(3)} for config in EVERY])
    assert state_of(one.model) == before and one.tokenizer.pad_token is None
    assert held == (utils.apply_template, datasets.config.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled())


# --- the suite: tasks in a folder


def test_a_folder_of_tasks_is_measured_shard_by_shard(tmp_path: Path, measured: tuple[list[Any], Rows]) -> None:
    for config in (CHOICE, OTHERS[4]):
        write_task(tmp_path / "own", config)
    suite = registry.make_suite(f"tasks:names=choice+word,include_path={tmp_path / 'own'}")
    assert suite.shards() == ["choice", "word"] and not suite.needs_stream
    rows = suite.measure(checkpoint())
    expected = [
        v for v, group in zip(measured[1].value.tolist(), measured[1].group, strict=True) if group in ("choice", "word")
    ]
    np.testing.assert_allclose(rows.value, expected, rtol=0, atol=5e-5)
    parts = Rows.joined([suite.measure_shard(checkpoint(), shard) for shard in suite.shards()])
    assert parts.value.tolist() == rows.value.tolist()
    assert suite.shard_flops(checkpoint(), "word") > 0
    assert suite.flops(checkpoint()) == sum(suite.shard_flops(checkpoint(), s) for s in suite.shards())


def test_addresses_depend_on_documents_files_and_options(tmp_path: Path) -> None:
    """lm-eval's own request cache has only the task's name for a key."""
    folder = write_task(tmp_path / "own", CHOICE)

    def suite(**changes: Any) -> Tasks:
        return Tasks(None, Tasks.Options(names=("choice",), include_path=str(folder), **changes))

    first = suite()
    assert suite(tokens_per_batch=9, allow_code=True).sha256() == first.sha256() != suite(limit=3).sha256()
    before = first.shard_sha256("choice")
    assert suite().shard_sha256("choice") == before == suite(allow_code=True).shard_sha256("choice")
    write_task(folder, CHOICE, [doc | {"gold": 0} for doc in questions()])
    changed = suite().shard_sha256("choice")
    write_task(folder, CHOICE | {"doc_to_text": "{{question}}"})
    assert len({before, changed, suite().shard_sha256("choice")}) == 3


def test_groups_are_all_of_their_tasks(tmp_path: Path) -> None:
    for config in (CHOICE, OTHERS[4]):
        write_task(tmp_path, config)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [choice, word]\n")
    rows = Tasks(None, Tasks.Options(names=("both",), include_path=str(tmp_path), limit=2)).measure(checkpoint())
    assert sorted(set(rows.group)) == ["choice", "word"]


# --- code


CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef same(docs):\n    return docs\n"


@pytest.mark.parametrize(
    "lines",
    [
        "process_docs: !function code.same\n",
        "include: base.yaml\n",
        "process_docs: !<!function> code.same\n",
        "%TAG !! !func\n---\n{own}process_docs: !!tion code.same\n",
    ],
)
def test_yaml_with_code_runs_only_when_that_is_allowed(tmp_path: Path, lines: str) -> None:
    folder = write_task(tmp_path / "own", CHOICE)
    own = (folder / "choice.yaml").read_text()
    (folder / "code.py").write_text(CODE)
    (tmp_path / "own" / "base.yaml").write_text("process_docs: !function code.same\n")
    (folder / "choice.yaml").write_text(lines.format(own=own) if "{own}" in lines else own + lines)
    with pytest.raises(
        ConfigError, match=r"Python functions.*allow_code=true runs it on this machine with your rights"
    ):
        Tasks(None, Tasks.Options(names=("choice",), include_path=str(folder))).measure(checkpoint())
    assert not (folder / "ran").exists()
    rows = Tasks(None, Tasks.Options(names=("choice",), include_path=str(folder), allow_code=True)).measure(
        checkpoint()
    )
    assert (folder / "ran").exists() and len(set(rows.item)) == N


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric_list": [{"metric": "./evil.py"}]}, "a program that lm-eval fetches"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "a metric is fetched"),
        ({"dataset_path": "pandas"}, "may be pickled"),
        ({"unsafe_code": True}, "code that the model writes"),
    ],
)
def test_other_ways_to_run_code_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = write_task(tmp_path, CHOICE | change)
    with pytest.raises(ConfigError, match=words):
        load_tasks(["choice"], include_path=folder)


def test_a_template_is_filled_in_once_for_a_document_and_again_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import utils

    doc: dict[str, Any] = {"q": "one", "c": ["a", "b"]}
    made: list[str] = []
    compiled = _lm_ready._compiled
    monkeypatch.setattr(_lm_ready, "_compiled", lambda template: made.append(template) or compiled(template))

    def told(template: str = "{{ q }} {{ c[0] }}") -> tuple[str, int]:
        return str(utils.apply_template(template, doc)), len(made)

    with _lm_ready.ready():
        assert [told(), told()] == [("one a", 1), ("one a", 1)]
        assert [told("{{ q }}"), told()] == [("one", 2), ("one a", 2)]
        doc["c"][0] = "z"  # inside of it, too
        assert [told(), told()] == [("one z", 3), ("one z", 3)]
        doc["c"] = np.arange(3)  # nobody can say cheaply whether this has changed
        assert [told(), told()] == [("one 0", 4), ("one 0", 5)]
    with _lm_ready.ready():
        doc["c"] = ["z", "b"]
        assert told() == ("one z", 6)  # nothing is kept


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ConfigError, match=r"template.*unsafe"):
        measure_tasks(checkpoint(), [CHOICE | {"docs": questions(), "doc_to_text": escape}])


# --- what a user can get wrong


def test_a_model_that_returns_nan_is_named(tmp_path: Path) -> None:
    broken = checkpoint()
    with torch.no_grad():
        broken.model.model.embed_tokens.weight[9] = float("nan")
    with pytest.raises(NonFiniteError, match="the question that ends with"):
        measure_tasks(broken, [CHOICE | {"docs": questions()}])


def test_lm_evals_own_task_without_data_is_told_in_one_line() -> None:
    with pytest.raises(OfflineError, match=r"its data is not on this machine.*clbench prepare suite:tasks"):
        load_tasks(["arc_easy"])
    with pytest.raises(NotFoundError, match=r"unknown task 'arc_esay'; did you mean 'arc_easy'"):
        load_tasks(["arc_esay"])


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    one, folder = checkpoint(), write_task(tmp_path / "own", CHOICE)
    empty = write_task(tmp_path / "empty", CHOICE, [])
    moved = write_task(tmp_path / "moved", CHOICE)
    (moved / "choice.jsonl").unlink()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "torn.yaml").write_text("task: torn\noutput_type: [")
    swallowed = CHOICE | {"docs": [{"question": "w1", "choices": ["w2", end], "gold": 0} for end in ("w3", "")]}
    hollow = CHOICE | {"docs": [{"question": "w1", "choices": ["w2", ""], "gold": 0}]}
    bare = replace(one, tokenizer=None)

    def tasks(folder: Path, *names: str) -> Tasks:
        return Tasks(None, Tasks.Options(names=names, include_path=str(folder)))

    cases: list[tuple[type[ClbenchError], str, Any]] = [
        (ConfigError, "no documents to measure", lambda: measure_tasks(one, [CHOICE | {"docs": []}])),
        (ConfigError, "no documents to measure", lambda: tasks(empty, "choice").measure(one)),
        (NotFoundError, "its data is not there", lambda: tasks(moved, "choice").measure(one)),
        (NotFoundError, "no folder of tasks", lambda: tasks(tmp_path / "nowhere", "choice").measure(one)),
        (NotFoundError, "did you mean 'choice'", lambda: tasks(folder, "choise").measure(one)),
        (ConfigError, "no tasks are named", lambda: tasks(folder).measure(one)),
        (ConfigError, "named twice", lambda: tasks(folder, "choice", "choice")),
        (ConfigError, "limit must be at least 1", lambda: Tasks(None, Tasks.Options(names=("a",), limit=0))),
        (
            ConfigError,
            "does not fit a document",
            lambda: measure_tasks(one, [CHOICE | {"docs": questions(), "doc_to_text": "{{none.such}}"}]),
        ),
        (
            ConfigError,
            "output_type",
            lambda: measure_tasks(one, [CHOICE | {"docs": questions(), "output_type": "guess"}]),
        ),
        (ConfigError, "no token is left", lambda: measure_tasks(one, [swallowed])),
        (ConfigError, "lm-eval cannot use it: IndexError", lambda: measure_tasks(one, [hollow])),
        (ConfigError, "no tokenizer", lambda: tasks(folder, "choice").measure(bare)),
        (ConfigError, "without a tokenizer", lambda: measure_tasks(bare, [CHOICE | {"docs": questions()}])),
    ]
    for kind, words_, act in cases:
        with pytest.raises(kind, match=words_) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_network_is_off_but_for_prepare() -> None:
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_OFFLINE
    with _lm_ready.ready():
        assert constants.HF_HUB_OFFLINE is True
    with _lm_ready.online(), _lm_ready.ready():
        assert before == constants.HF_HUB_OFFLINE
    assert before == constants.HF_HUB_OFFLINE
    assert Tasks.prepare() == {}
