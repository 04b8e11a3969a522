"""lm-eval kept quick, quiet and away from the network, and what it throws told in one line.

Importing this imports lm-eval.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import datasets
import datasets.config
import datasets.exceptions
import huggingface_hub.constants
import jinja2
import numpy as np
from huggingface_hub import errors as hub
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils

from clbench.errors import ClbenchError, ConfigError, NotFoundError, OfflineError

AWAY = (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, hub.HfHubHTTPError, ConnectionError)
BROKEN = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
    datasets.exceptions.DatasetsError,
)
"""What lm-eval throws about a task that does not hold together."""
_online: list[bool] = []


@contextmanager
def ready() -> Iterator[None]:
    """Run lm-eval with compiled templates in a sandbox, without its chatter, and without a network; then as before."""
    with ExitStack() as stack:
        for one in (_kept_states(), _compiled_templates(), quiet(), _offline()):
            stack.enter_context(one)
        yield


@contextmanager
def online() -> Iterator[None]:
    """Let tasks fetch their data inside ``ready``: what ``prepare`` does and nothing else."""
    _online.append(True)
    try:
        yield
    finally:
        _online.pop()


@contextmanager
def _kept_states() -> Iterator[None]:
    """Give Python's and numpy's global random states back: the package datasets draws from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # that is what is kept
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _compiled_templates() -> Iterator[None]:
    """Compile every template once, in Jinja's sandbox, and fill it in once for every document.

    lm-eval compiles it anew for every field of every document, and asks for a document's choices several times, for
    a worked example before every question.
    """
    original = utils.apply_template
    filled: dict[tuple[str, bytes], str] = {}

    def apply_template(template: str, doc: dict[str, Any]) -> str:
        try:
            key = template, hashlib.blake2b(json.dumps(doc).encode(), digest_size=16).digest()
        except (TypeError, ValueError):  # arrays, objects: nobody can say whether they have changed
            return _compiled(template).render(**doc)
        if key not in filled:
            filled[key] = _compiled(template).render(**doc)
        return filled[key]

    utils.apply_template = apply_template
    try:
        yield
    finally:
        utils.apply_template = original


@cache
def _compiled(template: str) -> jinja2.Template:
    return _sandbox().from_string(template)


@cache
def _sandbox() -> SandboxedEnvironment:
    """Return an environment that renders as lm-eval's own does."""
    theirs = utils.env
    env = SandboxedEnvironment(undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline)
    env.filters |= theirs.filters
    return env


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and progress bars of lm-eval and its data readers to themselves."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the hub's packages to what they have on this machine."""
    holders: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        if not _online:
            for holder in holders:
                holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what lm-eval and its data readers throw about a task into one line for people."""
    where = f"task {name}"
    try:
        yield
    except ClbenchError:
        raise
    except AWAY as error:
        raise OfflineError(
            f"its data is not on this machine: {_first_line(error)}",
            where=where,
            mend="run `clbench prepare suite:tasks:names=NAME` where a model hub is in reach",
        ) from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise NotFoundError(
            f"its data is not there: {_first_line(error)}", where=where, mend="check dataset_path and data_files"
        ) from error
    except jinja2.TemplateError as error:
        raise ConfigError(f"a template does not fit a document: {_first_line(error)}", where=where) from error
    except BROKEN as error:
        if isinstance(error, StopIteration) or "size 0" in str(error):  # an empty file, an empty split
            raise no_documents(name) from error
        what = f"lm-eval cannot use it: {type(error).__name__}: {_first_line(error)}"
        raise ConfigError(what, where=where, mend="check its configuration") from error


def no_documents(name: str) -> ConfigError:
    """Return the error about a task without anything to measure."""
    return ConfigError("it has no documents to measure", where=f"task {name}", mend="look at its data and its split")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
