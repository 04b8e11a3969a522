"""Deletion requests: from some stage on, no token of the documents that a file names is drawn again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from clbench.errors import ConfigError, IntegrityError
from clbench.method import Method, Stage, StagePlan
from clbench.methods._requests import read_requests

DIGITS = 16


class Deletions(Method):
    """Leave documents out of all training, new or replayed, from the stage on in which their deletion is asked for.

    Composes with every method, as it sets no mixture. A row that holds any token of such a document is not drawn. What
    the model has learnt from it before stays learnt: this is no unlearning.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of deletions."""

        file: str = ""
        """CSV or JSONL with a column ``id`` (document) and perhaps ``from_stage`` (a number from 1 on; else 1)."""
        sha256: str = ""
        """First 16 digits of the file's sha256; filled in when empty, and another file is refused."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self.from_stage: dict[str, int] = {}
        """Identity of a document -> first stage that may not draw it."""
        if not self.options.file:
            return  # said by plan(): every method can be made from its defaults
        path = Path(self.options.file).expanduser()
        self.from_stage, digest = read_requests(path)
        if self.options.sha256 and self.options.sha256[:DIGITS] != digest[:DIGITS]:
            raise IntegrityError(
                f"the deletion requests have changed: sha256 {digest[:DIGITS]}, not {self.options.sha256[:DIGITS]}",
                where=path,
                mend="bring the old file back, or start another run without sha256=",
            )
        self.options = replace(self.options, sha256=digest[:DIGITS])

    def plan(self, stage: Stage) -> StagePlan:
        """Return the documents that this stage may not draw.

        Raises:
            ConfigError: there is no file, or a request holds from a stage that the stream does not have.
        """
        if not self.options.file:
            raise ConfigError("deletions needs a file", mend="write deletions:file=requests.csv")
        for identity, first in self.from_stage.items():
            if first >= stage.n_stages:
                raise ConfigError(
                    f"the deletion of {identity!r} holds from stage {first}, the last one is {stage.n_stages - 1}",
                    where=self.options.file,
                    mend=f"give a stage from 1 to {stage.n_stages - 1}",
                )
        return StagePlan(excluded=frozenset(i for i, first in self.from_stage.items() if first <= stage.index))
