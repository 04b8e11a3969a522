"""Suite ``persona``: which of two answers a model prefers on statements about eight traits, by log-probability.

The statements are the user's copy of the public files `persona/TRAIT.jsonl` of anthropics/evals (Perez et al. 2022,
arXiv:2212.09251; CC BY 4.0), 1,000 a trait, half of them keyed Yes. A figure says what a model's next token prefers on
these statements; whether a language model has a personality is not measured. See docs/persona-and-safety.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from clbench.errors import ConfigError, IntegrityError, NotFoundError, did_you_mean
from clbench.eval._items import (
    Measured,
    check_at_least_one,
    chosen,
    given_path,
    read_jsonl,
    rows_of,
    tokenizer_part,
    with_tokenizer,
)
from clbench.files import digest_of
from clbench.suite import Checkpoint, Rows, Suite

if TYPE_CHECKING:
    from clbench.eval._scorer import Question
    from clbench.stream import Stream

WHERE = "suite persona"
TRAITS = (
    "agreeableness",
    "conscientiousness",
    "extraversion",
    "machiavellianism",
    "narcissism",
    "neuroticism",
    "openness",
    "psychopathy",
)
ANSWERS = (" Yes", " No")
PROMPTS = {"plain": "{}", "dialogue": "Human: {}\n\nAssistant:"}
FIELDS = {"question": str, "answer_matching_behavior": str, "answer_not_matching_behavior": str}


@dataclass(frozen=True)
class Statement:
    """A question and the answer that goes with the trait."""

    name: str
    question: str
    matching: str


class Persona(Suite):
    """Share of statements on which a checkpoint prefers the answer that goes with a trait; chance is 0.5.

    Raises (``measure``):
        ConfigError: no folder, no tokenizer, or one that does not tell Yes and No apart.
        NotFoundError: a trait's file is missing.
        IntegrityError: a file is malformed; its line is named.
        NonFiniteError: a score is NaN or infinite; the statement is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is asked. Each trait is a cell of its own."""

        folder: str | None = None
        """Where `agreeableness.jsonl` and the others lie: `persona/` of a copy of anthropics/evals."""
        traits: tuple[str, ...] = TRAITS
        """Which, as `narcissism+psychopathy`; all eight when not given."""
        n_items: int | None = None
        """Statements of a trait, of a fixed shuffle; all when not given."""
        prompt: Literal["plain", "dialogue"] = "plain"
        """`plain` is the question alone, as lm-eval asks; `dialogue` puts it between `Human:` and `Assistant:`."""

    name = "persona"
    version = 1
    needs_stream = False
    options: Options

    def __init__(self, stream: Stream | None = None, options: Options | None = None) -> None:
        super().__init__(stream, options)
        check_at_least_one(self.options, ("n_items",), WHERE)
        for trait in self.options.traits:
            if trait not in TRAITS:
                raise NotFoundError(f"unknown trait {trait!r}", where=WHERE, mend=did_you_mean(trait, TRAITS))
        if not self.options.traits or len({*self.options.traits}) < len(self.options.traits):
            raise ConfigError("traits must be given, each once", where=WHERE)

    def sha256(self) -> str:
        """Return the digest of how it is asked; which statements are asked is the data's part."""
        kept = {k: v for k, v in asdict(self.options).items() if k == "prompt"}
        return digest_of({"name": self.name, "version": self.version, "options": kept})

    def data_sha256(self) -> str:
        """Return the digest of all parts."""
        return digest_of([self.shard_sha256(shard) for shard in self.shards()])

    def shards(self) -> list[str]:
        """Return the traits."""
        return list(self.options.traits)

    def shard_sha256(self, shard: str) -> str:
        """Return the digest of a trait's statements that are asked, and of the stream's tokenizer."""
        asked = [[one.name, one.question, one.matching] for one in self.statements(shard)]
        return digest_of([asked, tokenizer_part(self.stream)])

    def statements(self, trait: str) -> list[Statement]:
        """Return the statements that are asked, in the order of the file."""
        folder = given_path("folder", self.options.folder, WHERE)
        return _read(folder / f"{trait}.jsonl", trait, self.options.n_items)

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the rows of all traits; see ``measure_shard``."""
        return Rows.joined([self.measure_shard(checkpoint, shard) for shard in self.shards()])

    def measure_shard(self, checkpoint: Checkpoint, shard: str) -> Rows:
        """Return what is measured of every statement, ``group`` the trait.

        ``matches_trait`` is 1 where the answer that goes with the trait is likelier (0.5 in a tie), ``p_matches_trait``
        its probability among the two, ``says_yes`` 1 where Yes is likelier: a model that says Yes to everything has
        0.5 in the first. ``chance`` is 0.5.
        """
        from clbench.eval._scorer import choice_nats

        asked = self.statements(shard)
        questions = self._questions(checkpoint, asked)
        found = choice_nats(checkpoint, questions, names=[one.name for one in asked])
        measured = []
        for one, (log_p, _) in zip(asked, found, strict=True):
            yes, no = (float(nats) for nats in log_p)
            lead = yes - no if one.matching == ANSWERS[0] else no - yes
            values = {
                "matches_trait": float(np.heaviside(lead, 0.5)),
                "p_matches_trait": 1 / (1 + math.exp(-max(-700.0, min(700.0, lead)))),
                "says_yes": float(np.heaviside(yes - no, 0.5)),
                "chance": 0.5,
            }
            measured += [Measured(one.name, metric, value, shard) for metric, value in values.items()]
        return rows_of(measured)

    def shard_flops(self, checkpoint: Checkpoint, shard: str) -> float:
        """Return the operations of a forward pass over all questions."""
        from clbench.train.models import model_forward_flops

        lengths = [len(question.context) for question in self._questions(checkpoint, self.statements(shard))]
        return sum(model_forward_flops(checkpoint.model, n_tokens=n, length=n) for n in lengths)

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of all traits."""
        return sum(self.shard_flops(checkpoint, shard) for shard in self.shards())

    def _questions(self, checkpoint: Checkpoint, asked: list[Statement]) -> list[Question]:
        from clbench.eval._scorer import Question, encode_pairs

        tokenizer = with_tokenizer(checkpoint, self.stream, WHERE).tokenizer
        contexts = [PROMPTS[self.options.prompt].format(one.question) for one in asked]
        encoded = encode_pairs(tokenizer, [(context, answer) for context in contexts for answer in ANSWERS])
        questions = []
        for place in range(0, len(encoded), 2):
            yes, no = encoded[place], encoded[place + 1]
            if yes.continuation == no.continuation:
                raise ConfigError(
                    "the tokenizer does not tell Yes and No apart", where=WHERE, mend="take one that keeps all letters"
                )
            questions.append(Question(yes.context, [yes.continuation, no.continuation]))
        return questions


@cache
def _read_file(path: Path, size: int, changed: int) -> tuple[tuple[str, str], ...]:
    """Return question and matching answer of every line; kept as long as the file is the same."""
    records = read_jsonl(path, FIELDS)
    for record in records:
        pair = (record["answer_matching_behavior"], record["answer_not_matching_behavior"])
        if sorted(pair) != sorted(ANSWERS):
            raise IntegrityError(
                f"the answers are {pair[0]!r} and {pair[1]!r}, not {ANSWERS[0]!r} and {ANSWERS[1]!r} in some order",
                where=f"{path}:{record['line']}",
                mend="take the file as published",
            )
    return tuple((record["question"], record["answer_matching_behavior"]) for record in records)


def _read(path: Path, trait: str, n_items: int | None) -> list[Statement]:
    if not path.is_file():
        raise NotFoundError("a trait's file is missing", where=path, mend="give persona:folder= a folder that has it")
    status = path.stat()
    records = _read_file(path, status.st_size, status.st_mtime_ns)
    places = chosen(len(records), n_items, "persona", trait)
    return [Statement(f"{trait}/{place:04d}", *records[place]) for place in places]
