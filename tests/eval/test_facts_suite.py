from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clbench import registry
from clbench.build import build_stream
from clbench.contract.lab import Lab
from clbench.contract.suites import SUITE_CHECKS, SuiteCase
from clbench.errors import ConfigError, NonFiniteError, NotFoundError
from clbench.eval.facts import Facts as FactsSuite
from clbench.eval.facts import make_work
from clbench.results.knowledge import Truth
from clbench.stream import Stream
from clbench.streams.facts import Facts
from clbench.suite import Checkpoint, Rows
from clbench.train.models import make_model
from clbench.train.parallel import Hardware


@pytest.fixture(scope="module")
def stream(clbench_home: Path) -> Stream:
    """42 facts, each with 6 candidates, in 4 stages."""
    options = Facts.Options(n_entities=14, n_attributes=3, n_values=5, n_stages=4, exposures=5)
    return build_stream(Facts(options), progress=False)


@pytest.fixture(scope="module")
def truth(stream: Stream) -> Truth:
    return Truth.parse(stream.extra("facts.jsonl"))


@pytest.fixture(scope="module")
def llama(stream: Stream) -> torch.nn.Module:
    spec = registry.load_track("tinydocs").model
    model = make_model(spec, vocab_size=stream.vocab_size, eos_id=stream.eos_id, seed=0)
    with torch.no_grad():  # a fresh model is nearly uniform: spread its answers
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model


class Table(torch.nn.Module):
    """A causal "model" that is a rule: ``logits_of(tokens so far)`` returns what it makes of them, [V]."""

    def __init__(self, vocab_size: int, logits_of: Any) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 1)
        self.logits_of = logits_of
        config: Any = SimpleNamespace(max_position_embeddings=64)
        config.get_text_config = lambda: config
        self.config = config

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        rows = input_ids.tolist()
        logits = [[self.logits_of(tuple(row[: t + 1])) for t in range(len(row))] for row in rows]
        return SimpleNamespace(logits=torch.stack([torch.stack(row) for row in logits]))


def checkpoint_of(model: torch.nn.Module, **changes: Any) -> Checkpoint:
    base = Checkpoint(model=model, weights_sha256="a" * 64, device=torch.device("cpu"), autocast_dtype=None)
    return replace(base, **changes)


@cache
def own_tokenizer(stream: Stream) -> Tokenizer:
    return Tokenizer.from_file(str(stream.tokenizer_folder / "tokenizer.json"))


def encode(stream: Stream, text: str) -> list[int]:
    return own_tokenizer(stream).encode(text).ids


def oracle(stream: Stream, truth: Truth, stage: int, form: str) -> Table:
    """A model that continues every question of one form with the truth of one stage, by 10 nats over all else."""
    following: dict[tuple[int, ...], int] = {}
    for fact in truth.facts:
        value = fact.value[stage] or "nothing"
        ids = [stream.eos_id, *encode(stream, f"{fact.probes[form].prompt} {value}")]
        following |= {tuple(ids[:n]): ids[n] for n in range(4, len(ids))}

    def logits_of(context: tuple[int, ...]) -> torch.Tensor:
        logits = torch.zeros(stream.vocab_size)
        if context in following:
            logits[following[context]] = 10.0
        return logits

    return Table(stream.vocab_size, logits_of)


def column(rows: Rows, metric: str) -> dict[tuple[str, int], float]:
    found = zip(rows.item, rows.stage.tolist(), rows.metric, rows.value.tolist(), strict=True)
    return {(item, stage): value for item, stage, name, value in found if name == metric}


@pytest.mark.parametrize(("stage", "form"), [(0, "trained"), (3, "trained"), (2, "paraphrase")])
def test_a_model_that_knows_one_stage_is_right_about_exactly_that(
    stream: Stream, truth: Truth, stage: int, form: str
) -> None:
    rows = FactsSuite(stream).measure(checkpoint_of(oracle(stream, truth, stage, form)))
    right, choice, plain = (column(rows, f"{m}:{form}") for m in ("right", "choice_nats", "answer_nats"))
    expected = {
        (fact.fact, i): float(value == (fact.value[stage] or "nothing"))
        for fact in truth.facts
        for i, value in enumerate(fact.value)
        if value is not None
    }
    assert right == expected and {*expected.values()} == {0.0, 1.0}
    for key in (key for key in right if key[1] == stage):  # every candidate is one token, so there is a closed form
        assert plain[key] == pytest.approx(math.log(math.exp(10) + stream.vocab_size - 1) - 10, abs=1e-5)
        assert choice[key] == pytest.approx(math.log(math.exp(10) + 5) - 10, abs=1e-5)
    about = dict(
        zip(zip(rows.item, rows.stage.tolist(), strict=True), zip(rows.group, rows.change, strict=True), strict=True)
    )
    for fact in truth.facts:
        for i, kind in enumerate(fact.kind):
            assert about.get((fact.fact, i)) == (None if kind == "unborn" else (fact.attribute, kind))


def test_a_model_that_cannot_choose_scores_chance_exactly(stream: Stream, truth: Truth) -> None:
    model = Table(stream.vocab_size, lambda context: torch.zeros(stream.vocab_size))
    rows = FactsSuite(stream).measure(checkpoint_of(model))
    assert {n for question in make_work(stream, truth, None).questions for n in question.n_scored} == {1}
    for form in ("trained", "paraphrase"):
        assert set(column(rows, f"right:{form}").values()) == {1 / 6}
        assert list(column(rows, f"choice_nats:{form}").values()) == pytest.approx(
            [math.log(6)] * (len(rows.item) // 6)
        )


def test_a_model_that_guesses_is_within_the_binomial_bounds_of_chance(stream: Stream) -> None:
    def logits_of(context: tuple[int, ...]) -> torch.Tensor:
        seed = hash(context) % 2**31
        return torch.rand(stream.vocab_size, generator=torch.Generator().manual_seed(seed))

    rows = FactsSuite(stream).measure(checkpoint_of(Table(stream.vocab_size, logits_of)))
    for form in ("trained", "paraphrase"):
        values = [value for (_, stage), value in column(rows, f"right:{form}").items() if stage == 3]
        low, high = binom.interval(1 - 1e-6, len(values), 1 / 6)
        assert len(values) == 42 and low <= sum(values) <= high


# --- tokens at the boundary, against a scorer that takes one candidate at a time


def slow_scores(model: Any, prefix: int, encoder: Any, prompt: str, candidates: tuple[str, ...]) -> list[float]:
    """Sums of log-probabilities from where the first completion leaves the prompt, one forward pass a candidate."""
    whole = [encoder(f"{prompt} {candidate}") for candidate in candidates]
    start = 0
    while start < len(encoder(prompt)) and len({ids[start] for ids in [encoder(prompt), *whole]}) == 1:
        start += 1
    scores = []
    with torch.no_grad():
        for ids in whole:
            logits = model(input_ids=torch.tensor([[prefix, *ids]])).logits[0].double()
            logp = logits.log_softmax(-1)
            scores.append(-sum(float(logp[place, ids[place]]) for place in range(start, len(ids))))
    return scores


def crossing_tokenizer(truth: Truth) -> PreTrainedTokenizerFast:
    """A BPE without word boundaries: its tokens run across the space between prompt and answer."""
    texts = [
        f"{probe.prompt} {c}."
        for f in truth.facts
        for probe in f.probes.values()
        for c in truth.candidates[f.attribute]
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("own", [True, False])
def test_scores_equal_those_of_one_candidate_at_a_time(
    stream: Stream, truth: Truth, llama: torch.nn.Module, own: bool
) -> None:
    tokenizer = None if own else crossing_tokenizer(truth)
    rows = FactsSuite(stream).measure(checkpoint_of(llama, tokenizer=tokenizer, tokenizer_sha256="x"))
    backend = own_tokenizer(stream) if own else tokenizer.backend_tokenizer
    prefix = stream.eos_id if own else tokenizer.eos_token_id
    answers = {m: column(rows, m) for m in dict.fromkeys(rows.metric)}
    n_crossing = 0
    for place, fact in enumerate(truth.facts[::3]):
        candidates, form = truth.candidates[fact.attribute], ("trained", "paraphrase")[place % 2]
        prompt = fact.probes[form].prompt
        scores = slow_scores(llama, prefix, lambda text: backend.encode(text).ids, prompt, candidates)
        ids = backend.encode(prompt).ids
        n_crossing += any(backend.encode(f"{prompt} {c}").ids[: len(ids)] != ids for c in candidates)
        for stage, value in enumerate(fact.value):
            if value is None:
                continue
            code, key = candidates.index(value), (fact.fact, stage)
            assert answers[f"answer_nats:{form}"][key] == pytest.approx(scores[code], abs=2e-4)
            total = -math.log(sum(math.exp(-s) for s in scores))
            assert answers[f"choice_nats:{form}"][key] == pytest.approx(scores[code] - total, abs=4e-4)
            assert answers[f"right:{form}"][key] == float(scores[code] == min(scores))
    assert (n_crossing == 0) if own else (n_crossing > 3)


def test_less_memory_gives_the_same_rows(stream: Stream, llama: torch.nn.Module) -> None:
    whole = FactsSuite(stream).measure(checkpoint_of(llama))
    small = FactsSuite(stream, FactsSuite.Options(tokens_per_batch=16)).measure(checkpoint_of(llama))
    assert (small.item, small.metric) == (whole.item, whole.metric)
    assert np.allclose(small.value, whole.value, atol=1e-4)
    assert FactsSuite(stream).sha256() == FactsSuite(stream, FactsSuite.Options(tokens_per_batch=16)).sha256()


def test_counts_are_those_of_the_answer(stream: Stream, truth: Truth, llama: torch.nn.Module) -> None:
    rows = FactsSuite(stream).measure(checkpoint_of(llama))
    values = {(fact.fact, i): value for fact in truth.facts for i, value in enumerate(fact.value)}
    for item, stage, n_tokens, n_bytes in zip(rows.item, rows.stage, rows.n_tokens, rows.n_bytes, strict=True):
        answer = f" {values[item, int(stage)]}"
        assert n_bytes == len(answer) and n_tokens == len(encode(stream, f"is{answer}")) - len(encode(stream, "is"))


# --- the suite's promises and its errors


@pytest.mark.parametrize("check", SUITE_CHECKS, ids=lambda check: check.__name__)
def test_the_contract(check: Any, stream: Stream, llama: torch.nn.Module, tmp_path: Path) -> None:
    hardware = Hardware(torch.device("cpu"), "fp32")
    lab = Lab(tmp_path, registry.load_track("tinydocs"), stream, hardware, llama)
    check(SuiteCase(lab, "facts", lambda options: FactsSuite(stream, options)))


def test_a_stream_without_truth_is_refused(tinydocs: Stream, llama: torch.nn.Module) -> None:
    with pytest.raises(NotFoundError, match=r"facts\.jsonl"):
        FactsSuite(tinydocs).measure(checkpoint_of(llama))


def test_what_cannot_be_measured_is_said(stream: Stream, truth: Truth, llama: torch.nn.Module) -> None:
    short = Table(stream.vocab_size, lambda context: torch.zeros(stream.vocab_size))
    short.config.max_position_embeddings = 4
    with pytest.raises(ConfigError, match="the model reads 4"):
        FactsSuite(stream).measure(checkpoint_of(short))
    with pytest.raises(ConfigError, match="beyond the model's vocabulary"):
        FactsSuite(stream).measure(checkpoint_of(Table(300, lambda context: torch.zeros(300))))
    words = Tokenizer(models.WordLevel({"<eos>": 0, "is": 1}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    blind = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    with pytest.raises(ConfigError, match="does not tell the answers"):
        FactsSuite(stream).measure(checkpoint_of(llama, tokenizer=blind, tokenizer_sha256="x"))
    broken = Table(stream.vocab_size, lambda context: torch.full((stream.vocab_size,), math.nan))
    with pytest.raises(NonFiniteError, match=r"nan .suite facts, .Is it true|nan .suite facts, .\w+"):
        FactsSuite(stream).measure(checkpoint_of(broken))
    with pytest.raises(ConfigError):
        FactsSuite(stream, FactsSuite.Options(tokens_per_batch=0))
