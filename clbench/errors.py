"""Errors for people: what went wrong, where, and how to mend it, in one line.

The command line prints ``str(error)`` without a traceback and exits with code 2. Everything a user can
cause is a ``ClbenchError``; anything else is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClbenchError(Exception):
    """A mistake that its user can mend.

    Args:
        what: what is wrong.
        where: the file, option, stage or step it was found at.
        mend: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: object = None, mend: str | None = None) -> None:
        self.what, self.where, self.mend = what, where, mend
        line = what if where is None else f"{what} ({where})"
        super().__init__(line if mend is None else f"{line}; {mend}")


class ConfigError(ClbenchError):
    """An option, a track or a run configuration that does not hold together."""


class NotFoundError(ClbenchError):
    """A name that nothing is registered under, or a file that is not there."""


class IntegrityError(ClbenchError):
    """Bytes that are not what their manifest says: truncated, corrupted, or made by something else."""


class OfflineError(ClbenchError):
    """Something has to be fetched and no network answered."""


class BusyError(ClbenchError):
    """Another process holds the lock of this folder."""


class NonFiniteError(ClbenchError):
    """The loss or the gradient norm is NaN or infinite."""


class NeedError(ClbenchError):
    """A method touched something it had not declared in its needs."""


class SubmissionError(ClbenchError):
    """A leaderboard entry that does not pass verification."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the near misses, or else the whole list."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"known: {', '.join(names) or 'none'}"
