"""Tracks: digests that outlive new settings, and what a base depends on."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from clbench import registry
from clbench.track import Track

NANO = "dc90c8d11601e1ec3148e853c5422f069bacd08f24296c3caab8467917e871f5"
NANO_BASE = "e4da12bb64b52492201735a44aad895edef4ae2f78f50b08478fefff40400eb3"
"""Digests of codedocs-nano, version 1, from before tracks knew ``batching``: its entries name the first."""


def with_training(**training: Any) -> Track:
    track = registry.load_track("codedocs-nano")
    return Track.model_validate({**track.model_dump(), "training": {**track.training.model_dump(), **training}})


def test_settings_that_came_later_change_no_digest_at_their_default() -> None:
    for track in (registry.load_track("codedocs-nano"), with_training(batching="packed", n_steps_per_stage=None)):
        assert (track.sha256(), track.base_sha256()) == (NANO, NANO_BASE)
        assert not {"batching", "n_steps_per_stage"} & track.as_dict()["training"].keys()


@pytest.mark.parametrize("training", [{"batching": "rows"}, {"batching": "rows", "n_steps_per_stage": 40}])
def test_batching_is_another_protocol_on_the_same_base(training: dict[str, Any]) -> None:
    track = with_training(**training)
    assert track.sha256() != NANO
    assert track.base_sha256() == NANO_BASE
    assert {k: track.as_dict()["training"][k] for k in training} == training
    assert track.training.of_base() == registry.load_track("codedocs-nano").training
    assert Track.model_validate(track.model_dump()) == track


def test_the_two_row_settings_are_told_apart() -> None:
    digests = {with_training(batching="rows", n_steps_per_stage=n).sha256() for n in (None, 40, 41)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"n_steps_per_stage": 5}, "needs batching: rows"),
        ({"batching": "rows", "n_steps_per_stage": 0}, "greater than 0"),
        ({"batching": "row"}, "'packed' or 'rows'"),
    ],
)
def test_batching_that_cannot_be_is_refused(training: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        with_training(**training)
