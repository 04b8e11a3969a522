"""Where clbench keeps what it fetched, built and measured: one cache folder, ``CLBENCH_HOME``.

Everything in it can be made again; run folders, which cannot, live where the user says.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return the cache folder: ``$CLBENCH_HOME``, or ``clbench`` in the user's cache folder."""
    if explicit := os.environ.get("CLBENCH_HOME"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clbench"


def downloads_folder() -> Path:
    """Files from the package index, by name, each checked against its manifest's sha256."""
    return home() / "downloads"


def streams_folder() -> Path:
    """Built streams, one folder per name and source digest."""
    return home() / "streams"


def specifications_folder() -> Path:
    """Stream specifications that ``clbench stream build`` made, by name."""
    return home() / "specifications"


def sources_folder() -> Path:
    """Documents that were brought here to build streams from (from files, from the hub), one folder per source."""
    return home() / "sources"


def bases_folder() -> Path:
    """Base checkpoints, one folder per track and digest."""
    return home() / "bases"


def models_folder() -> Path:
    """Pretrained models that ``clbench prepare model:NAME`` converted, one folder per name and digest."""
    return home() / "models"


def evals_folder() -> Path:
    """Question sets that ``clbench prepare evals`` fetched, one folder per collection and digest."""
    return home() / "evals"


def cells_folder() -> Path:
    """Measured cells, addressed by (weights, suite, data)."""
    return home() / "cells"
