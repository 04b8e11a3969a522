"""Stream specifications: a stream described in one small YAML file instead of a Python class.

It names a source (``documents``, ``hub``, a combinator …), its options, and how the builder splits and tokenises.
Built-in ones stand in ``streams/``, those of ``clbench stream build --name`` in the cache folder; others by their path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clbench import home
from clbench.errors import ConfigError, NotFoundError
from clbench.files import write_text


class StreamSpecification(BaseModel):
    """What a stream is made of; a setting that is left out is the source's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    description: str = ""
    source: str
    """A stream source: a name (`clbench list streams`), FILE.py:Class or module:Class."""
    options: dict[str, Any] = Field(default_factory=dict)
    heldout_fraction: float | None = Field(default=None, gt=0, lt=1)
    heldout_max_documents: int | None = Field(default=None, ge=1)
    heldout_max_per_group: int | None = Field(default=None, ge=1)
    vocab_size: int | None = Field(default=None, ge=257)
    tokenizer: str | None = None

    def overrides(self) -> dict[str, Any]:
        """Return the builder's settings that are given here, by attribute of StreamSource."""
        fields = ("heldout_fraction", "heldout_max_documents", "heldout_max_per_group", "vocab_size", "tokenizer")
        return {field: value for field in fields if (value := getattr(self, field)) is not None}

    def text(self) -> str:
        """Return the YAML text; what is left out stays out."""
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_defaults=True) | {"format": self.format},
            sort_keys=False,
            allow_unicode=True,
            width=110,
        )


def read_specification(path: Path) -> StreamSpecification:
    """Read and check a specification.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it is not YAML, or a field is missing, unknown or wrong; the first problem is named.
    """
    try:
        return StreamSpecification.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise NotFoundError("the stream's specification is missing", where=path, mend="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", where=path) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ConfigError(f"{where}: {first['msg']}", where=path, mend="see docs/streams.md") from None


def save_specification(specification: StreamSpecification) -> Path:
    """Write a specification where its name finds it; returns the file."""
    path = home.specifications_folder() / f"{specification.name}.yaml"
    write_text(path, specification.text())
    return path


def saved_specifications() -> dict[str, Path]:
    """Return name -> file of the specifications in the cache folder."""
    return {path.stem: path for path in sorted(home.specifications_folder().glob("*.yaml"))}
