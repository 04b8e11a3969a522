"""Named random streams from one root seed; nothing in clbench draws from a global generator.

``derive(0, "data", stage)`` is a pure function, the same on every machine and version, so nothing random has to
be stored to resume. Permutations use the raw Philox stream, which numpy promises to keep.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive(root: int | str, *names: int | str) -> int:
    """Return a 63-bit seed for the stream called ``names`` under ``root``."""
    text = "\x1f".join(str(part) for part in (root, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(root: int | str, *names: int | str) -> np.random.Generator:
    """Return a numpy generator for the named stream."""
    return np.random.Generator(np.random.Philox(key=derive(root, *names)))


def permutation(n: int, root: int | str, *names: int | str) -> NDArray[np.int64]:
    """Return a permutation of ``range(n)`` that is stable over numpy versions, shape ``[n]``."""
    raw = np.random.Philox(key=derive(root, *names)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64)
