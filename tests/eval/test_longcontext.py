from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clbench import registry
from clbench.cells import address_of
from clbench.contract.lab import Lab
from clbench.contract.suites import SUITE_CHECKS, SuiteCase
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError
from clbench.eval.longcontext import LongContext
from clbench.stream import Stream
from clbench.suite import UNDATED
from clbench.train.parallel import Hardware
from tests.eval.byte_models import Continuer, Rule, byte_tokenizer, checkpoint_of

OPENING = "in the text above is"


def suite_of(stream: Stream | None = None, **changes: Any) -> LongContext:
    options = {"lengths": (700,), "n_items": 3, "subtasks": ("single_number",), **changes}
    return LongContext(stream, LongContext.Options(**options))


def reader(prompt: str) -> str:
    """Answers a question about a needle by looking it up."""
    key = re.findall(r"number of ([\w-]+) in the text above is$", prompt)[0]
    return f" {re.findall(rf'number of {key} is ([0-9]+)', prompt)[0]}."


def small_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=1500, eos_token_id=0, **sizes))
    with torch.no_grad():  # a fresh model is nearly uniform: spread its answers
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model


def test_a_model_that_reads_is_right_and_one_that_is_silent_is_not() -> None:
    able = suite_of().measure(checkpoint_of(Continuer(reader, OPENING)))
    assert able.value.tolist() == [1.0] * 3 and able.metric == ["score"] * 3
    assert able.group == ["single_number@700"] * 3 and set(able.stage.tolist()) == {UNDATED}
    assert able.item == [f"single_number@700/000{n}" for n in range(3)]
    silent = suite_of().measure(checkpoint_of(Rule(lambda text: "")))
    assert silent.value.tolist() == [0.0] * 3


def test_parts_of_an_answer_count() -> None:
    """A model that names the first needle that it meets finds one of four values."""
    first = Continuer(lambda prompt: " " + re.findall(r" is ([0-9]+)\.", prompt)[0], "in the text above are")
    rows = suite_of(subtasks=("multi_value", "multi_query"), lengths=(1200,)).measure(checkpoint_of(first))
    assert rows.value.tolist() == [0.25] * 6
    assert rows.group == ["multi_value@1200"] * 3 + ["multi_query@1200"] * 3


def test_a_real_model_answers_the_same_twice_and_reads_no_more_than_it_can() -> None:
    suite, checkpoint = (
        suite_of(lengths=(700, 1000), subtasks=("single_number", "tracking")),
        checkpoint_of(small_llama()),
    )
    rows = suite.measure(checkpoint)
    assert suite.shards() == ["single_number@700", "tracking@700", "single_number@1000", "tracking@1000"]
    assert len(rows.item) == 12 and set(rows.value.tolist()) <= {0.0, 0.2, 0.4, 1.0}
    assert suite.measure(checkpoint).value.tolist() == rows.value.tolist()
    assert suite.flops(checkpoint) > suite.shard_flops(checkpoint, "tracking@700") > 0
    with pytest.raises(
        ConfigError, match=r"length 2000 is more than the model's 1500 positions .*; ask for at most 1500"
    ):
        suite_of(lengths=(2000,)).measure(checkpoint)


@pytest.mark.parametrize("check", SUITE_CHECKS, ids=lambda check: check.__name__)
def test_the_contract(check: Any, tinydocs: Stream, tmp_path: Path) -> None:
    hardware = Hardware(torch.device("cpu"), "fp32")
    config = LlamaConfig(
        vocab_size=tinydocs.vocab_size,
        max_position_embeddings=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    lab = Lab(tmp_path, registry.load_track("tinydocs"), tinydocs, hardware, LlamaForCausalLM(config))

    def make(options: Any) -> LongContext:
        return LongContext(tinydocs, options or suite_of(subtasks=("tracking",), lengths=(400,), n_items=2).options)

    check(SuiteCase(lab, "longcontext", make))


def test_what_changes_the_questions_changes_the_address(tmp_path: Path, tinydocs: Stream) -> None:
    checkpoint = checkpoint_of(small_llama())

    def addresses(stream: Stream | None = None, **changes: Any) -> dict[str, str]:
        suite = suite_of(stream, **changes)
        return {shard: address_of(suite, checkpoint, shard) for shard in suite.shards()}

    base = addresses()["single_number@700"]
    more = addresses(lengths=(900, 700), subtasks=("tracking", "single_number"))
    assert more["single_number@700"] == base and len({*more.values()}) == 4
    text = tmp_path / "text.txt"
    text.write_text("One sentence. Another sentence.")
    seen = {base}
    for changes in ({"n_items": 4}, {"keys": "uuid"}, {"chat": True}, {"seed": 1}, {"haystack": str(text)}):
        seen.add(addresses(**changes)["single_number@700"])
    text.write_text("One sentence. Another sentence!")
    seen.add(addresses(haystack=str(text))["single_number@700"])
    seen.add(addresses(tinydocs)["single_number@700"])
    assert len(seen) == 8
    (tmp_path / "copy.txt").write_text(text.read_text())  # the bytes count, not where they lie
    assert addresses(haystack=str(tmp_path / "copy.txt")) == addresses(haystack=str(text))


def test_chat_templates_are_used_and_counted() -> None:
    tokenizer = byte_tokenizer()
    seen: list[str] = []

    def answer(prompt: str) -> str:
        seen.append(prompt)
        return ""

    checkpoint = checkpoint_of(Continuer(answer, OPENING), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no chat template"):
        suite_of(chat=True).measure(checkpoint)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    suite_of(chat=True).measure(checkpoint)
    prompt = max(seen, key=len)
    assert re.fullmatch(r"(?s)<user>The text below.*\?<assistant>The secret number of \S+ in the text above is", prompt)
    assert 690 < len(prompt) + 128 <= 700


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"unknown subtask 'traking'.*did you mean 'tracking'"):
        suite_of(subtasks=("traking",))
    for changes in ({"n_items": 0}, {"hops": 0}, {"lengths": ()}, {"lengths": (512, 512)}, {"subtasks": ()}):
        with pytest.raises(ConfigError):
            suite_of(**changes)
    checkpoint = checkpoint_of(small_llama())
    with pytest.raises(ConfigError, match="at least"):
        suite_of(lengths=(0,)).measure(checkpoint)
    with pytest.raises(ConfigError, match="no tokenizer"):
        suite_of().measure(checkpoint_of(small_llama(), tokenizer=None))
    with pytest.raises(NotFoundError, match="file is missing"):
        suite_of(haystack=str(tmp_path / "nothing.txt")).measure(checkpoint)
    (tmp_path / "latin.txt").write_bytes("Ein schöner Satz.".encode("latin-1"))
    with pytest.raises(IntegrityError, match="not UTF-8 at byte 7"):
        suite_of(haystack=str(tmp_path / "latin.txt")).measure(checkpoint)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="no words"):
        suite_of(haystack=str(tmp_path / "empty.txt")).measure(checkpoint)
    for spec in ("longcontext:lengths=many", "longcontext:keys=vowels", "longcontext:size=small"):
        with pytest.raises(ClbenchError):
            registry.make_suite(spec)
    made: Any = registry.make_suite("longcontext:lengths=512+1024,subtasks=tracking+single_word,n_items=7")
    assert made.shards() == ["tracking@512", "single_word@512", "tracking@1024", "single_word@1024"]
