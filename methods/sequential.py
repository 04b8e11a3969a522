"""Plain sequential training: every stage on its own text, with the track's cyclic cosine. The baseline."""

from __future__ import annotations

from clbench.method import Method


class Sequential(Method):
    """Train on each stage in turn and do nothing about the past."""
