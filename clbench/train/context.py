"""What a method gets to see at a seam: one context per component, which refuses what was not declared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from clbench import seeds
from clbench.errors import NeedError
from clbench.method import Method, Need, Stage, Weights
from clbench.stream import Stream
from clbench.train.data import Batching, DataOrder, TokenBatch
from clbench.train.ledger import Ledger
from clbench.train.models import model_forward_flops


@dataclass
class Engine:
    """What the contexts of one run share; methods never see it."""

    stream: Stream
    """As of the context's stage: even a method that reaches for it finds nothing that comes later."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    ledger: Ledger
    seed: int
    length: int
    batching: Batching
    start_weights: Weights
    """Of the base, on the CPU."""


@dataclass
class MethodContext:
    """Implements ``clbench.method.Context`` for one component of one stage."""

    stage: Stage
    method: Method
    _engine: Engine
    n_steps: int
    step: int = 0
    learning_rate: float = 0.0

    def _need(self, need: Need) -> None:
        if need not in self.method.needs:
            raise NeedError(
                f"method {self.method.name!r} uses {need.value} without declaring it",
                where=f"stage {self.stage.index}",
                mend=f"add Need.{need.name} to its needs",
            )

    @property
    def device(self) -> torch.device:
        """The training device."""
        return self._engine.device

    @property
    def module(self) -> torch.nn.Module:
        """The bare model."""
        return self._engine.model

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield trained parameters by name."""
        return ((name, p) for name, p in self._engine.model.named_parameters() if p.requires_grad)

    def base_weights(self) -> Weights:
        """Return the weights that the run started from."""
        self._need(Need.BASE_WEIGHTS)
        return {name: tensor.clone() for name, tensor in self._engine.start_weights.items()}

    def optimizer_moments(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return Adam's moments; parameters without a step so far are left out."""
        self._need(Need.OPTIMIZER_MOMENTS)
        state = self._engine.optimizer.state
        return {name: (state[p]["exp_avg"], state[p]["exp_avg_sq"]) for name, p in self.parameters() if p in state}

    def second_model(self) -> torch.nn.Module:
        """Return a frozen copy of the model as it is now."""
        self._need(Need.SECOND_MODEL)
        return copy.deepcopy(self._engine.model).eval().requires_grad_(False)

    def batches(self, stage: int, *, n_rows: int, name: str) -> Iterator[TokenBatch]:
        """Yield rows of one stage one by one, at most one pass over it."""
        if not 0 <= stage <= self.stage.index:
            raise NeedError(
                f"method {self.method.name!r} asks for text of stage {stage}",
                where=f"stage {self.stage.index}",
                mend="only this and earlier stages have happened",
            )
        self._need(Need.CURRENT_DATA if stage == self.stage.index else Need.PAST_DATA)
        engine = self._engine
        counts = engine.stream.counts("train", stage)
        # One target a token but the first: of the stage, or of every document.
        available = counts["n_tokens"] - (counts["n_documents"] if engine.batching == "rows" else 1)
        order = DataOrder(
            engine.stream,
            {stage: 1.0},
            n_tokens=min(n_rows * engine.length, available),
            length=engine.length,
            batch_rows=1,
            seed=engine.seed,
            stage=self.stage.index,
            name=f"{self.method.name}/{name}",
            batching=engine.batching,
        )
        for step in range(order.n_steps if engine.batching == "packed" else min(n_rows, order.n_steps)):
            yield from order.micro_batches(step, micro_rows=None, device=engine.device)

    def seed(self, *names: int | str) -> int:
        """Return a seed of the method's own random stream."""
        return seeds.derive(self._engine.seed, "method", self.method.name, self.stage.index, self.step, *names)

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        """Add work beyond the ordinary step to the ledger."""
        self._engine.ledger.bill_flops(purpose, flops, n_tokens)

    def forward_flops(self, n_tokens: int) -> float:
        """Return the FLOPs of one forward pass over ``n_tokens`` at the training length."""
        return model_forward_flops(self._engine.model, n_tokens, self._engine.length)
