from __future__ import annotations

import json
import math
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
from clbench.eval.persona import TRAITS, Persona
from clbench.stream import Stream
from clbench.suite import UNDATED, Rows
from clbench.train.parallel import Hardware
from tests.eval.byte_models import Rule, byte_tokenizer, checkpoint_of

KEYS = {"openness": [" Yes", " No", " Yes", " No"], "neuroticism": [" No", " No", " Yes"]}
"""The matching answer of every statement."""


def record(trait: str, place: int, matching: str) -> dict[str, Any]:
    other = {" Yes": " No", " No": " Yes"}[matching]
    return {
        "question": f'Would you say that?\n"{trait} {place}"',
        "statement": f"{trait} {place}",
        "label_confidence": 0.9,
        "answer_matching_behavior": matching,
        "answer_not_matching_behavior": other,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for trait, keys in KEYS.items():
        lines = [json.dumps(record(trait, n, key)) for n, key in enumerate(keys)]
        (tmp_path / f"{trait}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def suite_of(folder: Path | None, stream: Stream | None = None, **changes: Any) -> Persona:
    given = None if folder is None else str(folder)
    return Persona(stream, Persona.Options(**{"folder": given, "traits": tuple(KEYS), **changes}))


def column(rows: Rows, metric: str) -> dict[str, float]:
    columns = zip(rows.item, rows.metric, rows.value.tolist(), strict=True)
    return {item: value for item, name, value in columns if name == metric}


def small_llama(vocab_size: int = 257) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=200, **sizes))


def favours(answer: str) -> Rule:
    """A model that goes on with one answer after every question, by 10 nats a letter over each other byte."""

    def next_of(text: str) -> str | None:
        written = text.rpartition('"')[2]
        return answer[len(written)] if answer.startswith(written) and written != answer else None

    return Rule(next_of)


@pytest.mark.parametrize("answer", [" Yes", " No"])
def test_a_model_of_one_answer_matches_exactly_the_statements_of_that_key(folder: Path, answer: str) -> None:
    rows = suite_of(folder).measure(checkpoint_of(favours(answer)))
    keys = {f"{trait}/{n:04d}": key for trait, all_keys in KEYS.items() for n, key in enumerate(all_keys)}
    assert column(rows, "matches_trait") == {item: float(key == answer) for item, key in keys.items()}
    assert set(column(rows, "says_yes").values()) == {float(answer == " Yes")}
    assert set(column(rows, "chance").values()) == {0.5} and set(rows.stage.tolist()) == {UNDATED}
    assert rows.group == [item.split("/")[0] for item in rows.item]
    # By hand: log p of a favoured byte is 10 - ln(e^10 + 256), of another one -ln(e^10 + 256), of any where nothing
    # is favoured -ln 257. Yes has three letters behind the space, No two; they part after the space.
    hot, cold, flat = 10 - math.log(math.exp(10) + 256), -math.log(math.exp(10) + 256), -math.log(257)
    lead = 3 * hot - (cold + flat) if answer == " Yes" else 2 * hot - (cold + 2 * flat)
    for item, p in column(rows, "p_matches_trait").items():
        sign = 1 if keys[item] == answer else -1
        assert math.log(p) - math.log1p(-p) == pytest.approx(sign * lead, rel=1e-3) if p not in (0, 1) else True


def test_an_answer_is_scored_by_its_own_tokens(folder: Path) -> None:
    """Nothing is favoured: each byte costs ln 257, so the shorter No leads by one of them."""
    rows = suite_of(folder).measure(checkpoint_of(Rule(lambda text: None)))
    assert set(column(rows, "says_yes").values()) == {0.0}
    p_no = 1 / (1 + 1 / 257)
    for item, p in column(rows, "p_matches_trait").items():
        trait, place = item.split("/")
        assert p == pytest.approx(p_no if KEYS[trait][int(place)] == " No" else 1 - p_no, rel=1e-4)


def test_the_prompt_is_the_question_or_a_dialogue(folder: Path) -> None:
    seen: set[str] = set()

    def next_of(text: str) -> str | None:
        seen.add(text)
        return None

    for prompt in ("plain", "dialogue"):
        seen.clear()
        suite_of(folder, traits=("openness",), prompt=prompt).measure(checkpoint_of(Rule(next_of)))
        asked = 'Would you say that?\n"openness 0"'
        expected = asked if prompt == "plain" else f"Human: {asked}\n\nAssistant:"
        assert f"{expected} N" in seen and not any(text.startswith("H") for text in seen if prompt == "plain")


@pytest.mark.parametrize("check", SUITE_CHECKS, ids=lambda check: check.__name__)
def test_the_contract(check: Any, tinydocs: Stream, tmp_path: Path, folder: Path) -> None:
    model, hardware = small_llama(tinydocs.vocab_size), Hardware(torch.device("cpu"), "fp32")
    lab = Lab(tmp_path, registry.load_track("tinydocs"), tinydocs, hardware, model)
    default = suite_of(folder).options
    check(SuiteCase(lab, "persona", lambda options: Persona(tinydocs, options or default)))


def test_cells_are_addressed_by_what_is_asked(folder: Path) -> None:
    checkpoint = checkpoint_of(small_llama())

    def addresses(**changes: Any) -> dict[str, str]:
        suite = suite_of(folder, **changes)
        return {shard: address_of(suite, checkpoint, shard) for shard in suite.shards()}

    base = addresses()
    assert list(base) == list(KEYS) and addresses(traits=("openness",)) == {"openness": base["openness"]}
    assert addresses(n_items=4)["openness"] == base["openness"] != addresses(n_items=3)["openness"]
    assert addresses(prompt="dialogue")["openness"] != base["openness"]
    path = folder / "openness.jsonl"
    path.write_text(path.read_text().replace("openness 3", "openness three"))
    assert addresses()["openness"] != base["openness"] and addresses()["neuroticism"] == base["neuroticism"]
    suite = suite_of(folder)
    assert suite.flops(checkpoint) > suite.shard_flops(checkpoint, "openness") > 0
    assert tuple(registry.make_suite(f"persona:folder={folder}").shards()) == TRAITS


def test_bad_files_are_named_by_line(folder: Path) -> None:
    checkpoint = checkpoint_of(small_llama())
    path = folder / "openness.jsonl"
    good = path.read_text().splitlines()
    broken = {
        "not JSON": r"not a line of JSON .*openness.jsonl:2",
        '{"question": "x"}': r"field 'answer_matching_behavior' is missing .*:2",
        json.dumps(record("openness", 1, " Yes") | {"answer_matching_behavior": "Yes"}): r"'Yes' and ' No', not .*:2",
        json.dumps(record("openness", 1, " Yes") | {"answer_not_matching_behavior": " Yes"}): r"' Yes' and ' Yes'.*:2",
    }
    for line, message in broken.items():
        path.write_text("\n".join([good[0], line, *good[2:]]))
        with pytest.raises(IntegrityError, match=message) as caught:
            suite_of(folder).measure(checkpoint)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(NotFoundError, match=r"a trait's file is missing .*openness.jsonl"):
        suite_of(folder).measure(checkpoint)
    with pytest.raises(NotFoundError, match="nothing is there"):
        suite_of(folder / "none").measure(checkpoint)
    with pytest.raises(ConfigError, match=r"option folder is missing .*give persona:folder=PATH"):
        suite_of(None).data_sha256()
    with pytest.raises(NotFoundError, match=r"unknown trait 'openess'.*did you mean 'openness'"):
        suite_of(folder, traits=("openess",))
    for changes in ({"n_items": 0}, {"traits": ()}, {"traits": ("openness", "openness")}):
        with pytest.raises(ConfigError):
            suite_of(folder, **changes)


def test_a_tokenizer_that_reads_yes_and_no_alike_is_refused(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    blind = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    with pytest.raises(ConfigError, match="does not tell Yes and No apart"):
        suite_of(folder).measure(checkpoint_of(small_llama(), tokenizer=blind))
    assert byte_tokenizer().encode(" Yes") != byte_tokenizer().encode(" No")
