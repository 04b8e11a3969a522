"""``domain-smollm2``: one package's documentation as a domain, that of others as general text."""

from __future__ import annotations

from pathlib import Path

from clbench.streams import codedocs as _codedocs


class DomainSmolLM2(_codedocs.CodeDocs):
    """The stream of ``domain_smollm2.yaml``, or of a manifest of your own, in SmolLM2's tokens; docs/pretrained.md.

    Stage 0 is general text, held out to see what is kept (and there for methods that replay); stage 1 is the domain.
    """

    name = "domain-smollm2"
    tokenizer = "model:smollm2-135m"
    # A pass over the held-out documents takes minutes on a CPU with 135 million parameters.
    heldout_max_documents = 100
    heldout_max_per_group = None

    def manifest_path(self) -> Path:
        """Return where the manifest is."""
        given: str = self.options.manifest
        return Path(given).expanduser() if given else Path(__file__).with_suffix(".yaml")
