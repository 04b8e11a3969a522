"""Finding lm-eval tasks by name: in a folder of YAML files, or among lm-eval's own; and what of a folder is refused.

A task folder is code. YAML may name Python functions beside it (``!function``), metrics that lm-eval does not know are
programs that it fetches, some data readers unpickle, and a task may run what the model writes. All of these are
refused unless they are allowed. Templates are no way around that: they run in Jinja's sandbox (``_lm_ready.py``).

Importing this imports lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager

from clbench.errors import ConfigError, NotFoundError, did_you_mean
from clbench.eval._lm_ready import explained, ready
from clbench.files import digest_of, sha256_file

MEND = "allow_code=true runs it on this machine with your rights: read it first"
PLAIN_TAGS = {"str", "int", "float", "bool", "null", "seq", "map"}
UNPICKLING = ("pandas", "webdataset")
"""Readers of the package datasets that may unpickle what they read."""


def load_tasks(names: Sequence[str], *, include_path: Path | None = None, allow_code: bool = False) -> list[Any]:
    """Return tasks of lm-eval by name; a group's or a tag's are all of its tasks.

    Args:
        names: in the folder, or else among lm-eval's own.
        include_path: a folder of task files.
        allow_code: run Python that tasks of the folder name, programs that they fetch as metrics, and code that a model
            writes where a task runs it.

    Raises:
        NotFoundError: nothing is called so, or a task's data is not there.
        OfflineError: its data has to be fetched.
        ConfigError: the task is code and that is not allowed, or it does not hold together.
    """
    found: dict[str, Any] = {}
    with ready():
        for name in names:
            manager = _manager_of(name, include_path)
            if not allow_code and not _is_built_in(manager):
                _refuse_code(manager, name)
            with explained(name):
                tasks = manager.load([name])["tasks"]
            for task in tasks.values():
                if getattr(task, "UNSAFE_CODE", False) and not allow_code:
                    raise ConfigError("it runs code that the model writes", where=f"task {name}", mend=MEND)
            found |= tasks
    return list(found.values())


def source_sha256(name: str, include_path: Path | None) -> str:
    """Return the digest of a task's files: all of its folder, or lm-eval's version and the name."""
    if include_path is None or _is_built_in(_manager_of(name, include_path)):
        return digest_of({"lm_eval": version("lm_eval"), "task": name})
    files = sorted(p for p in include_path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return digest_of({p.relative_to(include_path).as_posix(): sha256_file(p) for p in files})


def documents_sha256(tasks: Iterable[Any], limit: int | None) -> str:
    """Return the digest of what tasks are asked about: their documents, and those that worked examples come from."""
    return digest_of(
        [
            [
                task.task_name,
                [doc for _, doc in task.doc_iterator(limit=limit)],
                [dict(doc) for doc in task.sampler.df] if task.config.num_fewshot and hasattr(task, "sampler") else [],
            ]
            for task in tasks
        ]
    )


# --- where a name is found


def _manager_of(name: str, include_path: Path | None) -> TaskManager:
    """Return the manager that knows a name: the folder's own, or that of lm-eval, which takes seconds to read."""
    known: list[str] = []
    if include_path is not None:
        if not include_path.is_dir():
            raise NotFoundError("no folder of tasks is there", where=include_path, mend="check include_path")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if name in (known := manager.all_tasks):
            return manager
    if name not in _built_in().task_index:
        raise NotFoundError(f"unknown task {name!r}", mend=did_you_mean(name, known or _built_in().all_tasks))
    return _built_in()


def _is_built_in(manager: TaskManager) -> bool:
    return manager.include_path is None


@cache
def _built_in() -> TaskManager:
    return TaskManager()


# --- what is refused


def _refuse_code(manager: TaskManager, name: str) -> None:
    """Refuse a task of a user's folder, or a group of them, that is code.

    Raises:
        ConfigError: a file names functions, a metric that has to be fetched, or data that is unpickled.
    """
    for path in _files_of(manager, name):
        for what in _code_in(path):
            raise ConfigError(what, where=path, mend=MEND)


def _code_in(path: Path) -> Iterator[str]:
    """Yield what of a YAML file would run code; nothing is made of its tags."""
    text = _read(path)
    for token in yaml.scan(text):
        if isinstance(token, yaml.TagToken) and not (token.value[0] == "!!" and token.value[1] in PLAIN_TAGS):
            yield f"the task names Python functions (`{''.join(part or '' for part in token.value)}`)"
    for key, value in _entries(yaml.compose(text, Loader=yaml.SafeLoader)):
        if key == "hf_evaluate" or (key == "metric" and value not in metric_registry):
            yield (
                f"the metric {value!r} is a program that lm-eval fetches" if key == "metric" else "a metric is fetched"
            )
        if key == "dataset_path" and value in UNPICKLING:
            yield f"its data may be pickled ({value})"


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        for _ in yaml.scan(text):
            pass
        return text
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"it cannot be read: {' '.join(str(error).split())}", where=path) from None


def _entries(node: Any) -> Iterator[tuple[str, str | None]]:
    """Yield every key of every mapping in a document with its value; None for what is no scalar."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), value.value if isinstance(value, yaml.ScalarNode) else None
            yield from _entries(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _entries(value)


def _files_of(manager: TaskManager, name: str) -> list[Path]:
    """Return the files that a task, group or tag is made of, with those that they include."""
    found: dict[Path, None] = {}
    todo: list[Any] = [name]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += [one.get("task"), one.get("group")]
        elif isinstance(one, (list, set)):
            todo += sorted(one, key=str)
        elif isinstance(one, Path) and one not in found:
            found[one] = None
            todo += _included(one)
        elif isinstance(one, str) and (entry := manager.task_index.get(one)) is not None:
            todo += [entry.tags] if entry.yaml_path is None else [entry.yaml_path]
            members = (entry.cfg or {}).get("task")
            todo += members if isinstance(members, list) and entry.yaml_path not in found else []
    return list(found)


def _included(path: Path) -> list[Path]:
    """Return the files that a YAML file includes."""
    found: list[Path] = []
    for key, value in getattr(yaml.compose(_read(path), Loader=yaml.SafeLoader), "value", []):
        if key.value == "include":
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            found += [(path.parent / node.value).resolve() for node in nodes]
    return found
