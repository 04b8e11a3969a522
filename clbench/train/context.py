"""What a method gets to see at a seam: one context per component, which refuses what was not declared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from clbench import console, seeds
from clbench.errors import ConfigError, NeedError
from clbench.method import Method, Need, Stage, Weights
from clbench.stream import Stream
from clbench.train.data import CONTROL_ROWS, IGNORE, Batching, DataOrder, Draw, Shelf, TokenBatch
from clbench.train.ledger import Ledger
from clbench.train.models import holding, model_forward_flops
from clbench.train.parallel import sum_over_processes


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
    batch_rows: int
    micro_rows: int | None
    start_weights: Weights
    """Of the base, on the CPU."""
    draw: Draw = field(default_factory=Draw)
    """What may be drawn in this stage."""
    order: DataOrder | None = None
    """The rows of this stage."""
    sharded: bool = False
    """Whether every process holds only a shard of each parameter."""
    warn: Callable[[str], None] = console.warn


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
        if any("exp_avg" not in kept for kept in state.values()):
            raise ConfigError(
                f"method {self.method.name!r} needs Adam's moments, which this optimizer does not keep",
                mend="compose it with AdamW, the default",
            )
        return {name: (state[p]["exp_avg"], state[p]["exp_avg_sq"]) for name, p in self.parameters() if p in state}

    def second_model(self) -> torch.nn.Module:
        """Return a frozen copy of the model as it is now."""
        self._need(Need.SECOND_MODEL)
        return copy.deepcopy(self._engine.model).eval().requires_grad_(False)

    def _happened(self, stage: int) -> None:
        if not 0 <= stage <= self.stage.index:
            raise NeedError(
                f"method {self.method.name!r} asks for text of stage {stage}",
                where=f"stage {self.stage.index}",
                mend="only this and earlier stages have happened",
            )

    def batches(self, stage: int, *, n_rows: int, name: str, rows_per_batch: int = 1) -> Iterator[TokenBatch]:
        """Yield rows of one stage, at most one pass over it; nothing excluded or kept back."""
        if n_rows < 1 or rows_per_batch < 1:
            raise ConfigError(f"{n_rows} rows, {rows_per_batch} at a time", mend="ask for at least one row")
        self._happened(stage)
        self._need(Need.CURRENT_DATA if stage == self.stage.index else Need.PAST_DATA)
        engine = self._engine
        draw = Draw(excluded=engine.draw.excluded, keeps_control=engine.draw.keeps_control)
        shelf = Shelf(engine.stream, stage, length=engine.length, seed=engine.seed, batching=engine.batching)
        free = shelf.free(draw)
        available = int((shelf.n_targets if free is None else shelf.n_targets[free]).sum(dtype="int64"))
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
            draw=draw,
        )
        n_found = len(order.start) if engine.batching == "packed" else min(n_rows, len(order.start))
        for first in range(0, n_found, rows_per_batch):
            yield order.read(slice(first, min(first + rows_per_batch, n_found)), engine.device)

    def training_batches(self) -> Iterator[TokenBatch]:
        """Yield the batches that this stage will train on, before it does."""
        self._need(Need.CURRENT_DATA)
        order = self._order
        if self._engine.draw.in_sequence:
            raise ConfigError(
                f"method {self.method.name!r} asks for the stage's batches, which a review may change",
                where=f"stage {self.stage.index}",
                mend="do not compose it with a method that reviews its mixture",
            )
        for step in range(self.n_steps):
            yield from order.micro_batches(step, micro_rows=self._engine.micro_rows, device=self._engine.device)

    def tokens_drawn(self) -> dict[int, int]:
        """Return the target tokens that this stage has trained on so far, by source."""
        return self._order.drawn(self.step)[1]

    @property
    def _order(self) -> DataOrder:
        assert self._engine.order is not None
        return self._engine.order

    def control_loss(self, stages: Sequence[int], *, n_rows: int, weights: Weights | None = None) -> dict[int, float]:
        """Return the loss on rows that are kept back from training, in nats per token, by stage."""
        self._need(Need.CONTROL_DATA)
        if not 1 <= n_rows <= CONTROL_ROWS:
            raise ConfigError(f"{n_rows} control rows of a stage", mend=f"ask for 1 to {CONTROL_ROWS}")
        for stage in stages:
            self._happened(stage)
        model = self._engine.model
        was_training = model.training
        try:
            model.eval()
            with torch.no_grad(), holding(model, weights) if weights is not None else nullcontext():
                return {stage: self._control_loss(stage, n_rows) for stage in stages}
        finally:
            model.train(was_training)

    def _control_loss(self, stage: int, n_rows: int) -> float:
        engine = self._engine
        shelf = Shelf(engine.stream, stage, length=engine.length, seed=engine.seed, batching=engine.batching)
        nats, n_tokens = 0.0, 0
        for batch in shelf.control_batches(engine.draw, n_rows, engine.batch_rows, engine.device):
            logits_BTV = engine.model(input_ids=batch.inputs_BT).logits
            targets = batch.targets_BT.flatten()
            nats += cross_entropy(
                logits_BTV.float().flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"
            ).item()
            n_tokens += batch.n_targets
        if not n_tokens:
            raise ConfigError(
                f"stage {stage} is too small to keep control rows back", mend="use a method that needs no control data"
            )
        self.bill("control", flops=self.forward_flops(n_tokens), n_tokens=n_tokens)
        return nats / n_tokens

    def seed(self, *names: int | str) -> int:
        """Return a seed of the method's own random stream."""
        return seeds.derive(self._engine.seed, "method", self.method.name, self.stage.index, self.step, *names)

    def bill(self, purpose: str, *, flops: float, n_tokens: int = 0) -> None:
        """Add work beyond the ordinary step to the ledger."""
        self._engine.ledger.bill_flops(purpose, flops, n_tokens)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the processes that hold a shard of the parameters each."""
        return sum_over_processes(values) if self._engine.sharded else values

    def note(self, name: str, value: float) -> None:
        """Write down a figure about the method in this stage."""
        self._engine.ledger.note_figure(self.stage.index, self.method.name, name, value)

    def warn(self, text: str) -> None:
        """Tell the user."""
        self._engine.warn(f"{self.method.name}, stage {self.stage.index}: {text}")

    def forward_flops(self, n_tokens: int) -> float:
        """Return the FLOPs of one forward pass over ``n_tokens`` at the training length."""
        return model_forward_flops(self._engine.model, n_tokens, self._engine.length)
