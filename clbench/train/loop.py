"""The training loop, top to bottom: stages, steps, seams, checkpoints. Read this first.

What it leaves to others: which rows are in a batch (data), what a method may touch (context), what is written and how
(checkpoint), what a finished stage is measured with (the caller's ``finish_stage``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import psutil
import torch
from torch.nn.functional import cross_entropy

from clbench import seeds
from clbench.errors import NonFiniteError
from clbench.method import Composed, Cosine, Stage, StagePlan, Weights
from clbench.results.store import RunStore, StepLine
from clbench.stream import Stream
from clbench.track import TrainingSpec
from clbench.train import checkpoint
from clbench.train.checkpoint import TrainState
from clbench.train.context import Engine, MethodContext
from clbench.train.data import IGNORE, DataOrder
from clbench.train.ledger import Ledger
from clbench.train.models import copy_weights, load_weights, model_forward_flops, weights_of
from clbench.train.parallel import Hardware


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything the loop needs; only what stands in the run's configuration decides its bits."""

    store: RunStore
    stream: Stream
    model: torch.nn.Module
    """Holds the starting weights."""
    method: Composed
    stages: Sequence[Stage]
    training: TrainingSpec
    seed: int
    hardware: Hardware
    finish_stage: Callable[[Stage, Weights, int, Ledger], None]
    """Gets the release weights of each stage and its number of steps, measures and records them."""
    progress: Callable[[Stage, int, int, float], None]
    """Gets (stage, steps done, steps, loss in nats) after every step."""
    warn: Callable[[str], None]
    checkpoint_seconds: float = 60.0
    log_steps: int = 10


def train(job: Job) -> Ledger:
    """Train through all stages, or go on where a killed run stopped; returns the bill."""
    training, hardware = job.training, job.hardware
    model = job.model.to(hardware.device).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {p: name for name, p in parameters.items()}
    optimizer = make_optimizer(parameters, training, hardware.device)
    start_weights = copy_weights(weights_of(model))
    ledger = Ledger()

    resumed = checkpoint.load_latest(job.store.folder / "checkpoints", job.warn)
    if resumed is not None:
        ledger = Ledger.from_dict(resumed.ledger)
        load_weights(model, resumed.weights)
        checkpoint.load_optimizer_tensors(optimizer, parameters, resumed.optimizer)
        job.method.load_state_dict(resumed.method_tensors, resumed.method_values)
    # Also drops a line that a kill cut in half. Steps are logged 0-based: state.step is the first that is still to do.
    job.store.forget_steps_from(*((resumed.stage, resumed.step) if resumed is not None else (0, 0)))

    engine = Engine(
        stream=job.stream,
        model=model,
        optimizer=optimizer,
        device=hardware.device,
        ledger=ledger,
        seed=job.seed,
        length=training.sequence_length,
        batching=training.batching,
        start_weights=start_weights,
    )
    flops_per_token = 3 * model_forward_flops(model, 1, training.sequence_length)

    def save(stage: Stage, step: int, *, ended: bool) -> None:
        with ledger.timed("checkpoint"):
            method_tensors, method_values = job.method.state_dict()
            ledger.stored_bytes["method_state"] = sum(t.nbytes for t in method_tensors.values())
            ledger.note_memory(hardware.memory_bytes())
            state = TrainState(
                stage=stage.index,
                step=step,
                ended=ended,
                weights=weights_of(model),
                optimizer=checkpoint.optimizer_tensors(optimizer, names),
                method_tensors=method_tensors,
                method_values=method_values,
                ledger=ledger.as_dict(),
            )
            checkpoint.save(job.store.folder / "checkpoints", state)

    for stage in job.stages:
        if resumed is not None and stage.index < resumed.stage:
            continue
        here = resumed if resumed is not None and stage.index == resumed.stage else None
        plan = job.method.plan(stage)
        order = make_order(job, stage, plan)
        schedule = plan.schedule or Cosine(peak=stage.learning_rate, warmup_steps=stage.warmup_steps, floor=stage.floor)
        n_steps = order.n_steps if plan.train else 0
        engine = replace(engine, stream=job.stream.until(stage.index))
        contexts = {
            i: MethodContext(stage=stage, method=method, _engine=engine, n_steps=n_steps)
            for i, method in enumerate(job.method.components)
        }
        if here is None:
            if (plan.optimizer or training.optimizer) == "reset":
                optimizer.state.clear()
            job.method.each("begin_stage", contexts)
        first_step = here.step if here is not None else 0
        n_tokens = sum(ledger.tokens.get(stage.index, {}).values())
        last_save = last_log = time.monotonic()
        tokens_logged = n_tokens

        for step in range(first_step, n_steps):
            started = time.perf_counter()
            learning_rate = schedule(step, n_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            for context in contexts.values():
                context.step, context.learning_rate = step, learning_rate
            torch.manual_seed(seeds.derive(job.seed, "dropout", stage.index, step))

            batches = order.micro_batches(step, micro_rows=training.micro_batch_rows, device=hardware.device)
            n_targets = sum(batch.n_targets for batch in batches)
            loss_nats = 0.0
            for batch in batches:
                with hardware.autocast():
                    logits_BTV = model(input_ids=batch.inputs_BT).logits
                nll = cross_entropy(
                    logits_BTV.float().flatten(0, 1),
                    batch.targets_BT.flatten(),
                    ignore_index=IGNORE,
                    reduction="sum",
                )
                extra = job.method.extra_loss(contexts, batch, logits_BTV)
                torch.autograd.backward((nll if extra is None else nll + extra) / n_targets)
                loss_nats += nll.item() / n_targets
            job.method.each("edit_gradients", contexts)
            grad_norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.clip_norm).item()
            if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
                raise NonFiniteError(
                    f"the loss is {loss_nats}, the gradient norm {grad_norm}",
                    where=f"stage {stage.index}, step {step}",
                    mend="lower the learning rate or the method's strength; the last checkpoint is untouched",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            job.method.each("after_step", contexts)

            for batch in batches:
                ledger.bill_tokens(stage.index, batch.n_targets_by_source)
            ledger.bill_step(stage.index, sum(len(batch.inputs_BT) for batch in batches), learning_rate)
            ledger.bill_flops("train", flops_per_token * n_targets)
            ledger.seconds["train"] = ledger.seconds.get("train", 0.0) + time.perf_counter() - started
            n_tokens += n_targets
            job.progress(stage, step + 1, n_steps, loss_nats)
            now = time.monotonic()
            if (step + 1) % job.log_steps == 0 or step + 1 == n_steps:
                speed = (n_tokens - tokens_logged) / max(now - last_log, 1e-9)
                job.store.append_steps([step_line(stage, step, loss_nats, learning_rate, grad_norm, n_tokens, speed)])
                last_log, tokens_logged = now, n_tokens
            if now - last_save >= job.checkpoint_seconds and step + 1 < n_steps:
                save(stage, step + 1, ended=False)
                last_save = time.monotonic()

        for context in contexts.values():  # also where a resumed run comes straight to the stage's end
            context.step, context.learning_rate = n_steps, schedule(n_steps - 1, n_steps) if n_steps else 0.0
        if here is None or not here.ended:
            job.method.each("end_stage", contexts)
            ledger.stored_bytes["replay_data"] = replay_bytes(job.stream, ledger)
            save(stage, n_steps, ended=True)
        released = job.method.release(contexts, copy_weights(weights_of(model)))
        job.finish_stage(stage, released, n_steps, ledger)
        model.train()
    return ledger


def make_optimizer(
    parameters: dict[str, torch.nn.Parameter], training: TrainingSpec, device: torch.device
) -> torch.optim.Optimizer:
    """Return a fused AdamW; weight decay applies to matrices only."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        fused=device.type in ("cpu", "cuda"),
    )


def make_order(job: Job, stage: Stage, plan: StagePlan) -> DataOrder:
    """Return the rows of one stage under a plan's mixture (all new text by default)."""
    return DataOrder(
        job.stream,
        plan.mixture or {stage.index: 1.0},
        n_tokens=stage.n_tokens,
        length=job.training.sequence_length,
        batch_rows=job.training.batch_rows,
        seed=job.seed,
        stage=stage.index,
        batching=job.training.batching,
        n_steps=job.training.n_steps_per_stage,
    )


def replay_bytes(stream: Stream, ledger: Ledger) -> int:
    """Return the bytes of past text that have to be kept to repeat this run: token files of replayed stages."""
    replayed = {source for stage, row in ledger.tokens.items() for source in row if source < stage}
    return sum(stream.tokens("train", source).nbytes for source in replayed)


def step_line(
    stage: Stage, step: int, loss_nats: float, lr: float, grad_norm: float, n_tokens: int, speed: float
) -> StepLine:
    """Return one line of the training log."""
    return StepLine(
        stage=stage.index,
        step=step,
        loss_nats=loss_nats,
        lr=lr,
        grad_norm=grad_norm,
        n_tokens=n_tokens,
        tokens_per_second=speed,
        memory_bytes=psutil.Process().memory_info().rss,
        cpu_percent=psutil.cpu_percent(),
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
