"""A decay branch: what is put aside while a stage's release is trained beside the main line (``StagePlan.branch``).

On the branch that is the main line's state, which comes back; afterwards it is the release, which waits for the
stage's end. Either stands in every checkpoint, so a kill on the branch costs no more than one elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from clbench.method import Composed, StagePlan, Weights, tail_steps
from clbench.train import checkpoint
from clbench.train.data import DataOrder
from clbench.train.models import copy_weights, load_weights, weights_of


@dataclass(frozen=True)
class Legs:
    """A stage in the order in which its steps are taken: main line to the fork, branch, main line to the end.

    Args:
        n_steps: of the stage.
        n_branch: of them that are taken twice; 0: no branch.
    """

    n_steps: int
    n_branch: int = 0

    @classmethod
    def of(cls, plan: StagePlan, n_steps: int) -> Legs:
        """Return the legs of a stage that has rows for ``n_steps``."""
        if not plan.train:
            return cls(0)
        return cls(n_steps, tail_steps(plan.branch.fraction, n_steps) if plan.branch is not None else 0)

    @property
    def total(self) -> int:
        """Steps that are taken in all."""
        return self.n_steps + self.n_branch

    def place(self, done: int) -> tuple[int, bool]:
        """Return the step of the stage that follows ``done`` taken steps, and whether it lies on the branch."""
        if done < self.n_steps:
            return done, done >= self.n_steps - self.n_branch and self.n_branch > 0
        return done - self.n_branch, False

    def tokens_taken(self, order: DataOrder, done: int) -> int:
        """Return the target tokens of the first ``done`` steps that are taken, those of the branch among them."""
        step = self.place(done)[0]
        rows = order.batch_rows
        main = order.n_targets[: step * rows].sum()
        branch = order.n_targets[(self.n_steps - self.n_branch) * rows :].sum() if done > step else 0
        return int(main + branch)

    def begins_branch(self, done: int) -> bool:
        """Return whether the branch begins after so many steps."""
        return self.n_branch > 0 and done == self.n_steps - self.n_branch

    def ends_branch(self, done: int) -> bool:
        """Return whether the branch ends after so many steps."""
        return self.n_branch > 0 and done == self.n_steps


@dataclass
class Aside:
    """The main line's state while the branch is trained, then the branch's release."""

    tensors: Weights = field(default_factory=dict)
    values: list[dict[str, Any]] = field(default_factory=list)

    def put(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        names: dict[torch.nn.Parameter, str],
        method: Composed,
    ) -> None:
        """Keep the main line's state."""
        method_tensors, method_values = method.state_dict()
        parts = {
            "weights": weights_of(model),
            "optimizer": checkpoint.optimizer_tensors(optimizer, names),
            "method": method_tensors,
        }
        self.tensors = {f"{part}/{name}": t for part, own in parts.items() for name, t in copy_weights(own).items()}
        self.values = method_values

    def put_back(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, torch.nn.Parameter],
        method: Composed,
    ) -> None:
        """Let model, optimizer and method be what they were when the branch began."""
        load_weights(model, self._part("weights"))
        optimizer.state.clear()
        checkpoint.load_optimizer_tensors(optimizer, parameters, self._part("optimizer"))
        method.load_state_dict(self._part("method"), self.values)
        self.tensors, self.values = {}, []

    def keep_release(self, released: Weights) -> None:
        """Keep what the branch releases until the stage ends."""
        self.tensors = {f"release/{name}": tensor for name, tensor in copy_weights(released).items()}

    def release(self) -> Weights | None:
        """Return the branch's release, or None when the stage has none."""
        return self._part("release") or None

    def _part(self, part: str) -> Weights:
        prefix = f"{part}/"
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}
