"""How a broken contract is reported: what, where, how to mend it; one check reports one problem."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clbench.errors import ClbenchError

Case = TypeVar("Case")


class ContractError(ClbenchError):
    """What was checked does not keep its contract."""


class NotChecked(Exception):
    """A check could not be made, because what another check reports stands in its way."""


def name_of(check: Callable[..., Any]) -> str:
    """Return the name of a check: that of its function, without ``check_``."""
    return check.__name__.removeprefix("check_")


def is_frozen_dataclass(cls: type) -> bool:
    """Return whether a class is a dataclass whose objects cannot be changed."""
    parameters = getattr(cls, "__dataclass_params__", None)
    return bool(parameters is not None and parameters.frozen)


def problems_of(case: Case, checks: Sequence[Callable[[Case], None]]) -> dict[str, str]:
    """Return check -> problem for every check that a case does not pass."""
    found = {}
    for check in checks:
        try:
            check(case)
        except NotChecked:
            continue
        except ContractError as error:
            found[name_of(check)] = str(error)
    return found


def describe(error: BaseException, cls: type | None = None) -> str:
    """Return an exception in one line, with the last line of the author's own file that it passed through."""
    line = " ".join(str(error).split()) or "no message"
    text = line if isinstance(error, ClbenchError) else f"{type(error).__name__}: {line}"
    frames = traceback.extract_tb(error.__traceback__)
    try:
        own = inspect.getsourcefile(cls) if cls is not None else None
    except TypeError:
        own = None
    for frame in reversed(frames):
        if own is None or Path(frame.filename) == Path(own):
            return f"{text} [{Path(frame.filename).name}:{frame.lineno}]"
    return text
