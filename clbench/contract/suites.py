"""The checks of a suite: rows of the right form, the same every time, and a checkpoint left as it was."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from clbench import registry
from clbench.build import build_stream
from clbench.cells import table_of
from clbench.contract.guards import moved, no_network, random_states
from clbench.contract.lab import Lab
from clbench.contract.problems import ContractError, NotChecked, describe, is_frozen_dataclass
from clbench.contract.watch import comparable
from clbench.errors import ClbenchError
from clbench.listing import docs_of_fields
from clbench.suite import UNDATED, UNDEFINED, Checkpoint, Rows, Suite
from clbench.train.models import make_model, weights_sha256

ROUNDING_NATS = 1e-4
"""What an option may move values by without changing the suite's digest."""


@dataclass
class SuiteCase:
    """One suite under test.

    Args:
        lab: whose stream and base it measures.
        label: how messages call it.
        make: returns a new suite; None means default options.
    """

    lab: Lab
    label: str
    make: Callable[[Any], Suite]

    @classmethod
    def of(cls, lab: Lab, spec: str) -> SuiteCase:
        """Return the case of ``NAME``, ``file.py[:Class]`` or ``module:Class``."""
        suite = registry.load_class("suites", spec)
        if suite.example is not None:
            stream = build_stream(registry.make_stream_source(suite.example), progress=False)
            assert lab.track.model is not None  # tinydocs trains its base
            base = make_model(lab.track.model, vocab_size=stream.vocab_size, eos_id=stream.eos_id, seed=0)
            lab = dataclasses.replace(lab, stream=stream, base=base)
        return cls(lab, spec, lambda options: suite(lab.stream, options))

    def checkpoint(self, *, training: bool = True, use_cache: bool = True) -> Checkpoint:
        """Return the lab's base with its switches as asked for."""
        model: Any = copy.deepcopy(self.lab.base).train(training)
        model.config.use_cache = use_cache
        return Checkpoint(
            model=model, weights_sha256=weights_sha256(model), device=self.lab.hardware.device, autocast_dtype=None
        )

    @cached_property
    def rows(self) -> Rows:
        """Rows of the base under default options.

        Raises:
            NotChecked: measuring fails; ``check_measures`` says how.
        """
        try:
            return self.make(None).measure(self.checkpoint())
        except Exception as error:
            raise NotChecked from error

    def broken(self, what: str, mend: str | None = None) -> ContractError:
        """Return the error of a broken promise of this suite."""
        return ContractError(what, where=self.label, mend=mend)


def check_options(case: SuiteCase) -> None:
    """It has a name, and options that are a frozen dataclass with defaults, each field documented."""
    try:
        suite = case.make(None)
    except Exception as error:
        raise case.broken(f"it cannot be constructed: {describe(error)}", "take (stream, options=None)") from error
    options: Any = type(suite).Options
    if not is_frozen_dataclass(options):
        raise case.broken("Options is no frozen dataclass", "write @dataclass(frozen=True, kw_only=True) above it")
    docs = docs_of_fields(options)
    for one in dataclasses.fields(options):
        if not docs.get(one.name):
            raise case.broken(f"option {one.name} has no help", 'write """What it does, in which unit.""" under it')
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", getattr(suite, "name", "")):
        raise case.broken("its name is missing or not of a-z, 0-9, - and _", "set the class attribute name")


def check_measures(case: SuiteCase) -> None:
    """Measuring goes through, without a network."""
    with no_network() as tried:
        try:
            case.make(None).measure(case.checkpoint())
        except Exception as error:
            raise case.broken(f"measure() stops with {describe(error, type(case.make(None)))}") from error
    if tried:
        raise case.broken(f"measure() tried the network: {tried[0]}", "only `clbench prepare` downloads")


def check_rows(case: SuiteCase) -> None:
    """Rows are columns of one length and the right type; an item stands once per metric and stage, in known stages."""
    rows = case.rows
    lengths = {one.name: len(getattr(rows, one.name)) for one in dataclasses.fields(rows)}
    if len(set(lengths.values())) != 1 or not lengths["item"]:
        raise case.broken(f"columns have lengths {lengths}", "return one entry a row in each, and at least one row")
    try:
        table_of(rows)
    except (TypeError, ValueError) as error:
        raise case.broken(f"the rows do not fit the schema: {describe(error).splitlines()[0]}") from error
    keys = list(zip(rows.item, rows.metric, rows.stage.tolist(), strict=True))
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise case.broken(f"{twice} stands in several rows", "one row per item, metric and stage")
    n_stages = len(case.lab.stream.stages())
    if rows.stage.min() < UNDATED or rows.stage.max() >= n_stages:
        raise case.broken(
            f"stages run from {rows.stage.min()} to {rows.stage.max()}",
            f"the stream has 0 to {n_stages - 1}; undated items are {UNDATED}",
        )
    for name in ("value", "n_tokens", "n_bytes"):
        column = np.asarray(getattr(rows, name), dtype=np.float64)
        if name == "value":  # NaN with a reason is an answer
            said = np.array([change.startswith(UNDEFINED) for change in rows.change])
            column = column[~(said & np.isnan(column))]
        if not np.isfinite(column).all() or (name != "value" and column.min() < 0):
            raise case.broken(
                f"column {name} holds values that are negative or not finite",
                f"raise, leave such rows out, or say why in change: '{UNDEFINED}...'",
            )


def check_deterministic(case: SuiteCase) -> None:
    """Two measurements of one checkpoint are equal to the bit, with a new suite object, too."""
    rows = case.rows
    suite = case.make(None)
    for again in (suite.measure(case.checkpoint()), suite.measure(case.checkpoint(training=False))):
        if not _identical(again, rows):
            raise case.broken("measuring twice gives other rows", "call model.eval(), fix order and seeds")


def _identical(one: Rows, other: Rows) -> bool:
    """Return whether two measurements are the same to the bit; NaN is like NaN."""
    tables = [table_of(dataclasses.replace(rows, value=np.nan_to_num(rows.value, nan=0.0))) for rows in (one, other)]
    return tables[0].equals(tables[1]) and np.array_equal(np.isnan(one.value), np.isnan(other.value))


def check_leaves(case: SuiteCase) -> None:
    """Random states, training mode, gradients, parameters and ``use_cache`` are left as they were."""
    _ = case.rows
    for training, use_cache in ((True, True), (False, False)):
        checkpoint = case.checkpoint(training=training, use_cache=use_cache)
        model: Any = checkpoint.model
        frozen = next(model.parameters())
        frozen.requires_grad_(False)
        before, states = _switches(model), random_states()
        case.make(None).measure(checkpoint)
        if libraries := moved(states):
            raise case.broken(
                f"it moves the global random state of {' and '.join(libraries)}",
                "measure inside torch.random.fork_rng()",
            )
        for what, value in _switches(model).items():
            if value != before[what]:
                raise case.broken(f"it changes {what}", "put it back, also after an error")


def _switches(model: Any) -> dict[str, Any]:
    """Return what measuring must leave alone."""
    parameters = dict(model.named_parameters())
    return {
        "the training mode": {name: module.training for name, module in model.named_modules()},
        "the parameters": comparable(model.state_dict()),
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name: p.grad is None for name, p in parameters.items()},
        "use_cache": (model.config.use_cache, model.generation_config.use_cache if model.can_generate() else None),
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def check_sha256(case: SuiteCase) -> None:
    """The digest is stable, and changes with every option that changes what is measured."""
    suite = case.make(None)
    for name, call in (("sha256", suite.sha256), ("data_sha256", suite.data_sha256)):
        first, second = call(), getattr(case.make(None), name)()
        if first != second or not re.fullmatch(r"[0-9a-f]{64}", first):
            raise case.broken(f"{name}() gives {first[:12]!r}, then {second[:12]!r}", "return one SHA-256 in hex")
    for options in _other_options(suite):
        try:
            other = case.make(options)
            rows = None if other.sha256() != suite.sha256() else other.measure(case.checkpoint())
        except ClbenchError:
            continue  # not a value that it takes
        if rows is not None and not _close(rows, case.rows):
            raise case.broken(
                f"{options} gives other rows and the same sha256()",
                "hash every option that changes values, or raise version",
            )


def _other_options(suite: Suite) -> list[Any]:
    """Return option objects that differ from the defaults in one field each, as far as its type tells one."""
    defaults = suite.options
    others: list[Any] = []
    for one in dataclasses.fields(defaults):
        value = getattr(defaults, one.name)
        tries: list[Any] = []
        if isinstance(value, bool):
            tries = [not value]
        elif isinstance(value, int):
            tries = [value + 1, max(1, value // 2)]
        elif isinstance(value, float):
            tries = [value * 2 + 1, value / 2]
        elif value is None and "int" in str(one.type):
            tries = [16]
        others += [dataclasses.replace(defaults, **{one.name: changed}) for changed in tries if changed != value]
    return others


def _close(one: Rows, other: Rows) -> bool:
    """Return whether two measurements are the same rows, but for rounding."""
    same = (one.item, one.metric, one.stage.tolist()) == (other.item, other.metric, other.stage.tolist())
    counts = same and np.array_equal(one.n_tokens, other.n_tokens) and np.array_equal(one.n_bytes, other.n_bytes)
    return bool(counts and np.allclose(one.value, other.value, rtol=0, atol=ROUNDING_NATS, equal_nan=True))


SUITE_CHECKS: tuple[Callable[[SuiteCase], None], ...] = (
    check_options,
    check_measures,
    check_rows,
    check_deterministic,
    check_leaves,
    check_sha256,
)
