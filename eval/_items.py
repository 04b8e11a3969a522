"""What suites without a stream share: a tokenizer for a checkpoint, question files read line by line, rows of items.

Scoring is left to ``_scorer.py``, what an item is to the suites.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench import seeds
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import sha256_file
from clbench.suite import UNDATED, Checkpoint, Rows

if TYPE_CHECKING:
    from clbench.stream import Stream

ANSWER = "\nAnswer:"
"""Ends a prompt's question; what stands behind it is the opening of the answer."""


def with_tokenizer(checkpoint: Checkpoint, stream: Stream | None, where: str) -> Checkpoint:
    """Return a checkpoint that has a tokenizer: its own, else that of the stream that it was trained on.

    Raises:
        ConfigError: there is neither.
    """
    if checkpoint.tokenizer is not None:
        return checkpoint
    if stream is None:
        raise ConfigError(
            "the checkpoint has no tokenizer and there is no stream to take one from",
            where=where,
            mend="save the tokenizer beside the model, or name the stream that it was trained on",
        )
    from clbench.train.models import load_tokenizer

    return replace(checkpoint, tokenizer=load_tokenizer(stream.tokenizer_folder)[0])


def tokenizer_part(stream: Stream | None) -> str:
    """Return the part of a data digest that is a stream's tokenizer, which reads for checkpoints without their own."""
    return "" if stream is None else sha256_file(stream.tokenizer_folder / "tokenizer.json")


def chat_wrap(tokenizer: Any, where: str) -> Callable[[str], str]:
    """Return what puts a prompt into the tokenizer's chat template, as a user's turn.

    What stands behind the last ``ANSWER`` of a prompt opens the assistant's turn.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template", where=where, mend="leave chat out, or give an instruction-tuned model"
        )

    def wrap(prompt: str) -> str:
        question, answer, opening = prompt.rpartition(ANSWER)
        turn = [{"role": "user", "content": question if answer else prompt}]
        text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return text + (opening.lstrip() if answer else "")

    return wrap


# --- question files


def given_path(option: str, value: str | None, where: str) -> Path:
    """Return the file or folder of an option.

    Raises:
        ConfigError: the option was not given.
        NotFoundError: nothing is there.
    """
    if not value:
        raise ConfigError(f"option {option} is missing", where=where, mend=f"give {where.split()[-1]}:{option}=PATH")
    path = Path(value).expanduser()
    if not path.exists():
        raise NotFoundError("nothing is there", where=path, mend=f"mend option {option} of {where}")
    return path


def read_jsonl(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Read a JSONL file (gzip where its name ends with .gz) whose records have certain fields of certain types.

    Raises:
        NotFoundError: there is no such file.
        IntegrityError: it is not UTF-8, a line is no JSON object, or a field is missing or of another type (file and
            line are named); or it has no records.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # texts may hold other separators of lines
        if not line.strip():
            continue
        at = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError:
            raise IntegrityError("not a line of JSON", where=at, mend="give one JSON object a line") from None
        if not isinstance(record, dict):
            raise IntegrityError("not a JSON object", where=at, mend="give one JSON object a line")
        for name, kind in fields.items():
            if not isinstance(record.get(name), kind):
                what = "is missing" if name not in record else f"is not of type {kind.__name__}"
                raise IntegrityError(f"field {name!r} {what}", where=at, mend=f"its fields are {', '.join(fields)}")
        records.append({**record, "line": number})
    if not records:
        raise IntegrityError("the file has no records", where=path)
    return records


def read_text(path: Path) -> str:
    """Return the text of a file, which may be gzipped if its name ends with .gz.

    Raises:
        NotFoundError: there is no such file.
        IntegrityError: it cannot be read, is a damaged gzip file, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except FileNotFoundError:
        raise NotFoundError("file is missing", where=path, mend="check the path") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise IntegrityError("damaged gzip file", where=path, mend="fetch it again") from None
    except UnicodeDecodeError as error:
        raise IntegrityError(f"not UTF-8 at byte {error.start}", where=path, mend="convert it to UTF-8") from None
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", where=path, mend="give a readable file") from None


def chosen(n: int, n_items: int | None, *names: str) -> list[int]:
    """Return which of n records are asked, in the order of the file: all, or ``n_items`` of a fixed shuffle.

    Smaller choices are part of larger ones.
    """
    if n_items is None or n_items >= n:
        return list(range(n))
    return sorted(seeds.permutation(n, "items", *names)[:n_items].tolist())


def check_at_least_one(options: Any, fields: Iterable[str], where: str) -> None:
    """Refuse counts below 1."""
    for field in fields:
        value = getattr(options, field)
        if value is not None and value < 1:
            raise ConfigError(f"{field} must be at least 1, not {value}", where=where)


# --- rows


@dataclass(frozen=True)
class Measured:
    """One value of one question."""

    item: str
    metric: str
    value: float
    group: str


def rows_of(measured: Iterable[Measured]) -> Rows:
    """Return undated rows, each the score of one question (``n_tokens`` and ``n_bytes`` are 1)."""
    entries = list(measured)
    ones = np.ones(len(entries), np.int64)
    return Rows(
        item=[entry.item for entry in entries],
        stage=np.full(len(entries), UNDATED, np.int64),
        metric=[entry.metric for entry in entries],
        value=np.array([entry.value for entry in entries], np.float64),
        n_tokens=ones,
        n_bytes=ones.copy(),
        group=[entry.group for entry in entries],
        change=[""] * len(entries),
    )
