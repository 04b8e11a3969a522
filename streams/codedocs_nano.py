"""``codedocs-nano``: twenty years of Python documentation in six stages, each led by the libraries of its time."""

from __future__ import annotations

from pathlib import Path

from clbench.streams import codedocs as _codedocs


class CodeDocsNano(_codedocs.CodeDocs):
    """The stream of ``codedocs_nano.yaml``, see docs/codedocs.md."""

    name = "codedocs-nano"
    heldout_max_documents = 100

    def __init__(self) -> None:
        super().__init__(Path(__file__).with_suffix(".yaml"))
