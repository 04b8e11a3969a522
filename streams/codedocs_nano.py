"""``codedocs-nano``: twenty years of Python documentation in six stages, each led by the libraries of its time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clbench.streams import codedocs as _codedocs


class CodeDocsNano(_codedocs.CodeDocs):
    """The stream of ``codedocs_nano.yaml``, see docs/codedocs.md."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Which releases."""

        packages: tuple[str, ...] = ()
        """Only these packages (a+b), in the stages in which one of them has a release; all if empty."""

    name = "codedocs-nano"
    heldout_max_documents = 100
    heldout_max_per_group = None
    vocab_size = 4096

    def manifest_path(self) -> Path:
        """Return where the manifest is."""
        return Path(__file__).with_suffix(".yaml")
