from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clbench import registry
from clbench.cells import address_of
from clbench.contract.lab import Lab
from clbench.contract.suites import SUITE_CHECKS, SuiteCase
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.eval._forensics import FAILURES, equations, examine, extract
from clbench.eval.reasoning import SHOTS, Reasoning, prompt_of
from clbench.stream import Stream
from clbench.suite import UNDATED, Rows
from clbench.train.parallel import Hardware
from tests.eval.byte_models import Continuer, byte_tokenizer, checkpoint_of

PROBLEMS = {
    "Ann has 3 bags of 4 eggs and eats 2. How many are left?": "3 * 4 = <<3*4=12>>12\n12 - 2 = <<12-2=10>>10\n#### 10",
    "A book costs $8. What do 5 cost?": "5 * 8 = $<<5*8=40>>40\n#### 40",
    "Bob ran 2 miles on 3 days and 1 mile on one. How far?": "2 * 3 = <<2*3=6>>6\n6 + 1 = <<6+1=7>>7\n#### 7",
    "Half of 30 children swim. How many do not?": "30 / 2 = <<30/2=15>>15\n30 - 15 = <<30-15=15>>15\n#### 15",
}
ANSWERS = dict(
    zip(
        PROBLEMS,
        (
            " She has 3 * 4 = 12 eggs.\nThen 12 - 2 = 10 are left.\n#### 10",
            " They cost $40",
            " He ran 2 * 3 = 7 miles.\nIn all 7 + 1 = 8 miles.\n#### 8",
            " Half is 30 / 2 = 15.\nThe others are 30 + 15 = 45.\n#### 45",
        ),
        strict=True,
    )
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "problems.jsonl", [{"question": q, "answer": a} for q, a in PROBLEMS.items()])


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def suite_of(file: Path, stream: Stream | None = None, **changes: Any) -> Reasoning:
    return Reasoning(stream, Reasoning.Options(file=str(file), **changes))


def writer(prompt: str) -> str:
    """Answers each problem as above, whatever stands before its question."""
    return ANSWERS[prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")]


def column(rows: Rows, metric: str) -> list[float]:
    return [v for v, m in zip(rows.value.tolist(), rows.metric, strict=True) if m == metric]


def small_llama(vocab_size: int = 257) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=2000, **sizes))


def test_answers_are_marked_and_failures_labelled(file: Path) -> None:
    rows = suite_of(file).measure(checkpoint_of(Continuer(writer, "\nAnswer:")))
    assert column(rows, "exact_match:flexible-extract") == [1, 1, 0, 0]
    assert column(rows, "exact_match:strict-match") == [1, 0, 0, 0]  # the second has no ####
    expected = {"wrong_arithmetic": [0, 0, 1, 0], "wrong_logic": [0, 0, 0, 1]}
    for label in FAILURES:
        assert column(rows, f"failure_{label}") == expected.get(label, [0, 0, 0, 0])
    assert column(rows, "equations") == [2, 0, 2, 2] and column(rows, "equations_wrong") == [0, 0, 1, 0]
    assert set(rows.group) == {"gsm8k"} and set(rows.stage.tolist()) == {UNDATED}
    assert sorted({*rows.item}) == [f"gsm8k/000{n}" for n in range(4)]


def test_worked_examples_are_right_and_in_the_form_that_is_asked_for() -> None:
    for question, worked in SHOTS:
        stated = equations(worked)
        assert stated and all(equation.holds for equation in stated)
        assert stated[-1].right == int(extract(worked, strict=True))
        assert extract(worked, strict=True) == extract(worked, strict=False)
        assert examine(worked, worked, is_right=False).failures == {"wrong_logic"}  # right arithmetic, told it is wrong
        assert question not in PROBLEMS
    assert prompt_of("Why?", 0) == "Question: Why?\nAnswer:"
    assert prompt_of("Why?", 4).count("####") == 4 and prompt_of("Why?", 4).endswith(
        "#### 48\n\nQuestion: Why?\nAnswer:"
    )


def test_a_chat_asks_for_steps(file: Path) -> None:
    seen: set[str] = set()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"

    def answer(prompt: str) -> str:
        seen.add(prompt)
        return " 10"

    checkpoint = checkpoint_of(Continuer(answer, "<assistant>"), tokenizer=tokenizer)
    suite_of(file, chat=True, shots=0).measure(checkpoint)
    prompt = max(seen, key=len)
    assert prompt.startswith("<user>Solve the problem step by step.") and prompt.endswith("?<assistant>")
    with pytest.raises(ConfigError, match="no chat template"):
        suite_of(file, chat=True).measure(checkpoint_of(small_llama()))


@pytest.mark.parametrize("check", SUITE_CHECKS, ids=lambda check: check.__name__)
def test_the_contract(check: Any, tinydocs: Stream, tmp_path: Path, file: Path) -> None:
    lab = Lab(
        tmp_path,
        registry.load_track("tinydocs"),
        tinydocs,
        Hardware(torch.device("cpu"), "fp32"),
        small_llama(tinydocs.vocab_size),
    )
    default = suite_of(file, max_new_tokens=4, shots=1).options
    check(SuiteCase(lab, "reasoning", lambda options: Reasoning(tinydocs, options or default)))


def test_what_is_asked_is_what_is_addressed(file: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(small_llama())
    base = address_of(suite_of(file), checkpoint)
    copy = write(tmp_path / "copy.jsonl", [json.loads(line) for line in file.read_text().splitlines()])
    assert address_of(suite_of(copy), checkpoint) == base == address_of(suite_of(file, n_items=4), checkpoint)
    others = [suite_of(file, **c) for c in ({"n_items": 2}, {"shots": 3}, {"chat": True}, {"max_new_tokens": 9})]
    write(copy, [{"question": "What?", "answer": "#### 3"}])
    assert len({address_of(suite, checkpoint) for suite in (*others, suite_of(copy), suite_of(file))}) == 6
    few, more = suite_of(file, n_items=2).problems, suite_of(file, n_items=3).problems
    assert len(few) == 2 and {*few} < {*more} < {*suite_of(file).problems}


def test_bad_files_are_named_by_line(file: Path, tmp_path: Path) -> None:
    lines = file.read_text().splitlines()
    for broken, message in (
        ("{", r"not a line of JSON .*problems.jsonl:3"),
        ("[1]", r"not a JSON object .*:3"),
        ('{"question": "x"}', r"field 'answer' is missing .*:3"),
        ('{"question": 1, "answer": "#### 1"}', r"field 'question' is not of type str .*:3"),
        ('{"question": "x", "answer": "three"}', r"does not end with '#### NUMBER' .*:3"),
    ):
        file.write_text("\n".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(IntegrityError, match=message) as caught:
            suite_of(file).measure(checkpoint_of(small_llama()))
        assert "\n" not in str(caught.value)
    file.write_text("\n\n")
    with pytest.raises(IntegrityError, match="no records"):
        suite_of(file).data_sha256()
    with pytest.raises(NotFoundError, match="nothing is there"):
        suite_of(tmp_path / "none.jsonl").data_sha256()
    with pytest.raises(IntegrityError, match="cannot be read"):
        suite_of(tmp_path).data_sha256()
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError, match="not UTF-8"):
        suite_of(file).data_sha256()
    for changes in ({"shots": 5}, {"shots": -1}, {"n_items": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError):
            suite_of(file, **changes)


def test_without_a_file_the_prepared_set_is_asked_for() -> None:
    with pytest.raises(NotFoundError, match="clbench prepare"):
        Reasoning().measure(checkpoint_of(small_llama()))


def test_a_problem_that_does_not_fit_is_refused(file: Path) -> None:
    model: Any = small_llama()
    model.config.max_position_embeddings = 400
    with pytest.raises(ConfigError, match=r"prompt has .*gsm8k/000"):
        suite_of(file).measure(checkpoint_of(model))
