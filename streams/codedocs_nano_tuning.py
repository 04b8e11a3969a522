"""``codedocs-nano-tuning``: ``codedocs-nano`` from other packages, to choose hyper-parameters on."""

from __future__ import annotations

from pathlib import Path

from clbench.streams import codedocs_nano as _codedocs_nano


class CodeDocsNanoTuning(_codedocs_nano.CodeDocsNano):
    """The stream of ``codedocs_nano_tuning.yaml``, see docs/codedocs.md."""

    name = "codedocs-nano-tuning"

    def manifest_path(self) -> Path:
        """Return where the manifest is."""
        return Path(__file__).with_suffix(".yaml")
