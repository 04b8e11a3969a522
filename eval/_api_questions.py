"""How ``api_change`` words its questions: a prompt that an answer completes, with and without the release.

``plain`` questions name no version: whoever has learnt a newer release and forgotten nothing answers with its truth.
``dated`` ones say of which release and year the answer has to be true, and are asked once a release.
"""

from __future__ import annotations

from clbench.eval._api_facts import Fact, Release

PLAIN, DATED = FORMS = ("plain", "dated")
PREMISES = {
    "signature": "def f",
    "parameter": "the parameters of the function are `a`, then",
    "default": "the default value of the parameter is",
    "module": "the function is defined in module",
    "status": "the function is",
}
"""The same wordings about nothing in particular: how likely an answer is before it is known what was asked."""
KINDS = {"def": "function", "class": "class"}


def prompt_of(fact: Fact, release: Release | None) -> str:
    """Return the prompt of a fact, about one release or about none; ``answer_text`` goes right behind it."""
    name, rest = fact.subject[0], fact.subject[1:]
    if fact.attribute == "signature":  # as the documents write it
        return f"def {name}" if release is None else f"# {release.label}\ndef {name}"
    start = "" if release is None else f"In {release.label}: "
    if fact.attribute == "parameter":
        said = ", ".join(f"`{parameter}`" for parameter in rest)
        return start + (f"the parameters of {name} are {said}, then" if rest else f"the first parameter of {name} is")
    if fact.attribute == "default":
        return f"{start}the default value of parameter `{rest[0]}` of {name} is"
    if fact.attribute == "module":
        return f"{start}the {KINDS[rest[0]]} {name} of {fact.package} is defined in module"
    return f"{start}the {KINDS[rest[0]]} {name} is"


def answer_text(fact: Fact, answer: str) -> str:
    """Return an answer as it stands behind the prompt."""
    return answer if fact.attribute == "signature" else f" {answer}"
