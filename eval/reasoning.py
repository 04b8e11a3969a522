"""Suite ``reasoning``: school arithmetic in words (GSM8K), and why wrong answers are wrong, by rules alone.

Worked examples of our own, greedy generation, the final number by lm-eval's two extractions, and for wrong answers the
labels of ``_forensics.py``. Questions come from what `clbench prepare suite:general` fetched, or from a file of the
user's. Definitions for people: docs/reasoning.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from clbench.errors import ConfigError, IntegrityError
from clbench.eval._forensics import FAILURES, INVALID, examine, extract, is_match
from clbench.eval._items import (
    ANSWER,
    Measured,
    chat_wrap,
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
    from clbench.stream import Stream

WHERE = "suite reasoning"
GROUP = "gsm8k"
SET = "gsm8k"
SHOTS = (
    (
        "A baker puts 6 rolls into each of 8 bags and keeps 5 rolls for herself. How many rolls did she bake?",
        "The bags hold 6 * 8 = 48 rolls.\nWith her own she baked 48 + 5 = 53 rolls.\n#### 53",
    ),
    (
        "Tom reads 12 pages a day. His book has 300 pages and he has read for 9 days. How many pages are left?",
        "Tom has read 12 * 9 = 108 pages.\nThat leaves 300 - 108 = 192 pages.\n#### 192",
    ),
    (
        "A ticket costs $14 for adults and half as much for children. What do 2 adults and 3 children pay?",
        "A child's ticket costs 14 / 2 = $7.\nTwo adults pay 2 * 14 = $28.\nThree children pay 3 * 7 = $21.\n"
        "Together they pay 28 + 21 = $49.\n#### 49",
    ),
    (
        "Mia has 40 stamps. She gives 25% of them to Leo and then buys 18 more. How many stamps does she have now?",
        "Mia gives 40 * 25 / 100 = 10 stamps to Leo.\nThen she has 40 - 10 = 30 stamps.\n"
        "After buying more she has 30 + 18 = 48 stamps.\n#### 48",
    ),
)
"""Question and worked answer, written for this file in the form of GSM8K's solutions."""
STOP = ("Question:",)  # lm-eval's; end-of-text tokens stop, too
INSTRUCTION = 'Solve the problem step by step. End with a line "#### " and the number.\n\n'
"""Stands before the prompt in a chat, which has no reason to go on with a list of examples."""


@dataclass(frozen=True)
class Problem:
    """A question with its worked solution, which ends with ``#### NUMBER``."""

    name: str
    question: str
    solution: str


class Reasoning(Suite):
    """Right or wrong on problems of GSM8K, and by which rules the wrong ones fail.

    Raises (``measure``):
        NotFoundError: the set is not prepared and no file was given.
        IntegrityError: the file is not what it should be; its line is named.
        ConfigError: there is no tokenizer, or a prompt does not fit into the model.
        NonFiniteError: a logit is NaN or infinite; the problem is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is asked, and how."""

        n_items: int | None = 200
        """Problems, of a fixed shuffle; smaller choices are part of larger ones. 1319 or more asks all."""
        file: str | None = None
        """JSONL with `question` and `answer` as in GSM8K; what `clbench prepare suite:reasoning` fetched otherwise."""
        shots: int = 4
        """Worked examples before a question, 0 to 4; written for this suite, none is from GSM8K."""
        max_new_tokens: int = 256
        """Tokens after which an answer ends in any case."""
        chat: bool = False
        """Put prompts into the tokenizer's chat template, with an instruction before them."""

    name = "reasoning"
    version = 1
    needs_stream = False
    options: Options

    def __init__(self, stream: Stream | None = None, options: Options | None = None) -> None:
        super().__init__(stream, options)
        check_at_least_one(self.options, ("n_items", "max_new_tokens"), WHERE)
        if not 0 <= self.options.shots <= len(SHOTS):
            raise ConfigError(f"shots must be 0 to {len(SHOTS)}, not {self.options.shots}", where=WHERE)

    @classmethod
    def prepare(cls, options: Options | None = None) -> dict[str, Any]:
        """Fetch GSM8K, together with the other sets of suite ``general``; nothing where a file is given."""
        from clbench.eval._sets import prepare_sets

        return {} if options is not None and options.file else prepare_sets()

    def sha256(self) -> str:
        """Return the digest of all options but the file's path and the number of problems, which the data's has."""
        kept = {k: v for k, v in asdict(self.options).items() if k not in ("file", "n_items")}
        return digest_of({"name": self.name, "version": self.version, "options": kept})

    def data_sha256(self) -> str:
        """Return the digest of the problems that are asked, of worked examples, and of the stream's tokenizer."""
        asked = [[one.name, one.question, one.solution] for one in self.problems]
        return digest_of([asked, SHOTS, INSTRUCTION, tokenizer_part(self.stream)])

    @cached_property
    def problems(self) -> list[Problem]:
        """The problems that are asked, in the order of the file."""
        if self.options.file is not None:
            path = given_path("file", self.options.file, WHERE)
            records = read_jsonl(path, {"question": str, "answer": str})
        else:
            from clbench.eval._sets import open_set

            path, records = None, open_set(SET).records
        found = []
        for place in chosen(len(records), self.options.n_items, SET):
            record = records[place]
            if extract(record["answer"], strict=True) == INVALID:
                where = WHERE if path is None else f"{path}:{record['line']}"
                raise IntegrityError("the answer does not end with '#### NUMBER'", where=where, mend="mend the file")
            found.append(Problem(f"{GROUP}/{place:04d}", record["question"], record["answer"]))
        return found

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return for every problem ``exact_match`` by two extractions, one row per kind of failure, and its equations.

        ``failure_X`` is 1 where the answer is wrong by the flexible extraction and X is why, else 0; several may be 1.
        ``equations`` and ``equations_wrong`` count what the answer states, right or wrong.
        """
        from clbench.eval._scorer import generate

        able, prompts = self._prompts(checkpoint)
        names = [problem.name for problem in self.problems]
        answers = generate(
            able,
            prompts,
            max_new_tokens=self.options.max_new_tokens,
            stop=STOP,
            names=names,
            too_long="refuse",
        )
        return rows_of(
            row
            for problem, answer in zip(self.problems, answers, strict=True)
            for row in rows_of_answer(problem, answer)
        )

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of prompts and answers, as if each answer took all its room and nothing were shared."""
        from clbench.eval._forward import encode_texts
        from clbench.train.models import model_forward_flops

        able, prompts = self._prompts(checkpoint)
        lengths = [len(ids) + self.options.max_new_tokens for ids in encode_texts(able.tokenizer, prompts).values()]
        return sum(model_forward_flops(checkpoint.model, n_tokens=n, length=n) for n in lengths)

    def _prompts(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        able = with_tokenizer(checkpoint, self.stream, WHERE)
        prompts = [prompt_of(problem.question, self.options.shots) for problem in self.problems]
        if self.options.chat:
            wrap = chat_wrap(able.tokenizer, WHERE)
            prompts = [wrap(INSTRUCTION + prompt) for prompt in prompts]
        return able, prompts


def prompt_of(question: str, n_shots: int) -> str:
    """Return the worked examples and the question, up to where the answer starts."""
    shown = "".join(f"Question: {asked}{ANSWER} {worked}\n\n" for asked, worked in SHOTS[:n_shots])
    return f"{shown}Question: {question}{ANSWER}"


def rows_of_answer(problem: Problem, answer: str) -> Iterator[Measured]:
    """Yield what is measured of one answer."""
    matches = {
        "strict-match": is_match(extract(answer, strict=True), problem.solution),
        "flexible-extract": is_match(extract(answer, strict=False), problem.solution),
    }
    found = examine(answer, problem.solution, is_right=matches["flexible-extract"])
    values = {
        **{f"exact_match:{name}": float(right) for name, right in matches.items()},
        **{f"failure_{label}": float(label in found.failures) for label in FAILURES},
        "equations": float(found.n_equations),
        "equations_wrong": float(found.n_wrong),
    }
    yield from (Measured(problem.name, metric, value, GROUP) for metric, value in values.items())
