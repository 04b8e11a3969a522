"""The training loop, top to bottom: stages, steps, seams, checkpoints. Read this first.

What it leaves to others: which rows are in a batch (data), what a method may touch (context), what is written and how
(checkpoint), what a finished stage is measured with (the caller's ``finish_stage``).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import psutil
import torch
from torch.nn.functional import cross_entropy

from clbench import seeds
from clbench.errors import ConfigError, NonFiniteError
from clbench.method import Composed, Cosine, Need, OptimizerPolicy, Stage, StagePlan, Weights
from clbench.results.store import RunStore, StepLine
from clbench.stream import Stream
from clbench.track import TrainingSpec
from clbench.train import checkpoint
from clbench.train.branch import Aside, Legs
from clbench.train.checkpoint import TrainState
from clbench.train.context import Engine, MethodContext
from clbench.train.data import IGNORE, DataOrder
from clbench.train.ledger import Ledger
from clbench.train.models import copy_weights, load_weights, model_train_flops, weights_of
from clbench.train.parallel import Hardware, seed_device
from clbench.train.rows import RowPlanner, reviewed


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
    moments: str | None = None
    """``full`` or ``rank1``: write the optimizer's second moments beside every release."""


def train(job: Job) -> Ledger:
    """Train through all stages, or go on where a killed run stopped; returns the bill."""
    training, hardware = job.training, job.hardware
    model = prepare_model(job)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {p: name for name, p in parameters.items()}
    optimizer = make_optimizer(parameters, training, hardware.device, job.method)
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
        batch_rows=training.batch_rows,
        micro_rows=training.micro_batch_rows,
        start_weights=start_weights,
        warn=job.warn,
    )
    planner = RowPlanner(
        stream=job.stream, training=training, seed=job.seed, keeps_control=job.method.needs(Need.CONTROL_DATA)
    )
    flops_per_token = model_train_flops(model, 1, training.sequence_length)

    def save(stage: Stage, done: int, aside: Aside, *, ended: bool) -> None:
        with ledger.timed("checkpoint"):
            method_tensors, method_values = job.method.state_dict()
            ledger.stored_bytes["method_state"] = sum(t.nbytes for t in method_tensors.values())
            ledger.note_memory(hardware.memory_bytes())
            state = TrainState(
                stage=stage.index,
                step=done,
                ended=ended,
                weights=weights_of(model),
                optimizer=checkpoint.optimizer_tensors(optimizer, names),
                method_tensors=method_tensors,
                method_values=method_values,
                ledger=ledger.as_dict(),
                aside=aside.tensors,
                aside_values=aside.values,
            )
            checkpoint.save(job.store.folder / "checkpoints", state)

    for stage in job.stages:
        if resumed is not None and stage.index < resumed.stage:
            continue
        here = resumed if resumed is not None and stage.index == resumed.stage else None
        plan = job.method.plan(stage)
        plan, order = make_order(planner, stage, plan, ledger, here)
        schedule = plan.schedule or Cosine(peak=stage.learning_rate, warmup_steps=stage.warmup_steps, floor=stage.floor)
        legs = Legs.of(plan, order.n_steps)
        engine = replace(engine, stream=job.stream.until(stage.index), draw=planner.draw(plan), order=order)
        contexts = {
            i: MethodContext(stage=stage, method=method, _engine=engine, n_steps=legs.n_steps)
            for i, method in enumerate(job.method.components)
        }
        aside = Aside(here.aside, here.aside_values) if here is not None else Aside()
        if here is None:
            reset_optimizer(optimizer, plan.optimizer or training.optimizer)
            job.method.each("begin_stage", contexts)
        done = here.step if here is not None else 0
        n_tokens = legs.tokens_taken(order, done)
        last_save = last_log = time.monotonic()
        tokens_logged = n_tokens

        while done < legs.total:
            started = time.perf_counter()
            step, on_branch = legs.place(done)
            for context in contexts.values():
                context.step = step
            if plan.review_steps and step and step % plan.review_steps == 0:
                plan = review(planner, job.method, plan, order, contexts, ledger)
                legs = Legs.of(plan, order.n_steps)
            if legs.begins_branch(done):
                aside.put(model, optimizer, names, job.method)
            at = plan.branch.schedule if plan.branch is not None and on_branch else schedule
            learning_rate = at(step, legs.n_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            for context in contexts.values():
                context.learning_rate, context.n_steps = learning_rate, legs.n_steps
            seed_device(seeds.derive(job.seed, "dropout", stage.index, step), hardware.device)

            batches = order.micro_batches(step, micro_rows=training.micro_batch_rows, device=hardware.device)
            n_targets = sum(batch.n_targets for batch in batches)
            nlls: list[torch.Tensor] = []
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
                nlls.append(nll.detach())
            job.method.each("edit_gradients", contexts)
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.clip_norm)
            optimizer.step()
            if job.moments and not any("exp_avg_sq" in state for state in optimizer.state.values()):
                refuse_moments(optimizer)
            optimizer.zero_grad(set_to_none=True)
            # Read late: each read waits for the accelerator. Nothing was saved since.
            loss_nats, grad_norm = sum(nll.item() / n_targets for nll in nlls), norm.item()
            if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
                raise NonFiniteError(
                    f"the loss is {loss_nats}, the gradient norm {grad_norm}",
                    where=f"stage {stage.index}, step {step}",
                    mend="lower the learning rate or the method's strength; the last checkpoint is untouched",
                )
            job.method.each("after_step", contexts)

            done += 1
            n_tokens += n_targets
            purpose = "decay_branch" if on_branch else "train"
            if on_branch:
                ledger.bill_flops(purpose, flops_per_token * n_targets, n_targets)
            else:
                for batch in batches:
                    ledger.bill_tokens(stage.index, batch.n_targets_by_source)
                ledger.bill_step(stage.index, sum(len(batch.inputs_BT) for batch in batches), learning_rate)
                ledger.bill_flops(purpose, flops_per_token * n_targets)
            ledger.seconds[purpose] = ledger.seconds.get(purpose, 0.0) + time.perf_counter() - started
            if legs.ends_branch(done):
                at_the_end(contexts, legs, learning_rate)
                job.method.each("end_stage", contexts)
                released = job.method.release(contexts, copy_weights(weights_of(model)))
                aside.put_back(model, optimizer, parameters, job.method)
                aside.keep_release(released)
            job.progress(stage, done, legs.total, loss_nats)
            now = time.monotonic()
            if done % job.log_steps == 0 or done == legs.total or legs.ends_branch(done):
                speed = (n_tokens - tokens_logged) / max(now - last_log, 1e-9)
                line = step_line(stage, done - 1, loss_nats, learning_rate, grad_norm, n_tokens, speed)
                job.store.append_steps([line])
                last_log, tokens_logged = now, n_tokens
            if now - last_save >= job.checkpoint_seconds and done < legs.total:
                save(stage, done, aside, ended=False)
                last_save = time.monotonic()

        # Also where a resumed run comes straight to the stage's end.
        at_the_end(contexts, legs, schedule(legs.n_steps - 1, legs.n_steps) if legs.n_steps else 0.0)
        if here is None or not here.ended:
            job.method.each("end_stage", contexts)
            note_replay_bytes(job.stream, plan, stage, ledger)
            save(stage, legs.total, aside, ended=True)
        released = aside.release() or job.method.release(contexts, copy_weights(weights_of(model)))
        job.finish_stage(stage, released, legs.n_steps, ledger)
        if job.moments and optimizer.state:
            keep_moments(job, stage, checkpoint.optimizer_tensors(optimizer, names))
        model.train()
    return ledger


def prepare_model(job: Job) -> torch.nn.Module:
    """Return the model on its device in training mode: a copy with adapters in it where a method attaches some."""
    model = job.model.to(job.hardware.device)
    if any(method.overrides("attach") for method in job.method.components):
        model = copy.deepcopy(model)  # the caller's model is what releases are measured with
        job.method.attach(model, seeds.derive(job.seed, "attach"))
    return model.train()


def refuse_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError: second moments are wanted of an optimizer that keeps none."""
    raise ConfigError(
        f"{type(optimizer).__name__} keeps no second moments",
        where="clbench run --moments",
        mend="leave --moments out, or train with AdamW",
    )


def keep_moments(job: Job, stage: Stage, tensors: Weights) -> None:
    """Write the second moments that a stage has ended with beside its release; after a decay branch the main line's."""
    from clbench.merge import moments  # not on the path of an ordinary run

    form: Any = job.moments
    moments.write(tensors, form, job.store.folder / "release" / f"stage-{stage.index:02d}" / moments.FILE)


def make_optimizer(
    parameters: dict[str, torch.nn.Parameter], training: TrainingSpec, device: torch.device, method: Composed
) -> torch.optim.Optimizer:
    """Return the method's optimizer, or a fused AdamW; weight decay applies to matrices only."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"betas": (training.beta1, training.beta2)}
    own = method.make_optimizer(groups, learning_rate=training.learning_rate, **settings)
    if own is not None:
        return own
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=device.type in ("cpu", "cuda"), **settings)


def reset_optimizer(optimizer: torch.optim.Optimizer, policy: OptimizerPolicy) -> None:
    """Bring the optimizer's state to what a stage begins with."""
    if policy == "reset":
        optimizer.state.clear()
    elif policy == "reset_first":
        for state in optimizer.state.values():
            if "exp_avg" in state:
                state["exp_avg"].zero_()


def make_order(
    planner: RowPlanner, stage: Stage, plan: StagePlan, ledger: Ledger, here: TrainState | None
) -> tuple[StagePlan, DataOrder]:
    """Return the plan and the rows of one stage, with the reviews that a resumed stage has had."""
    order = planner.rows(stage, plan)
    if here is None:
        if plan.train:
            ledger.note_plan(stage.index, 0, plan)
        return plan, order
    for entry in ledger.plans.get(stage.index, []):
        if entry["step"]:
            plan = reviewed(plan, entry)
            planner.redraw(stage, plan, order, entry["step"])
    return plan, order


def review(
    planner: RowPlanner,
    method: Composed,
    plan: StagePlan,
    order: DataOrder,
    contexts: Mapping[int, MethodContext],
    ledger: Ledger,
) -> StagePlan:
    """Ask the method what the rest of the stage is to be drawn from; returns the plan that holds from now on."""
    stage, step = contexts[0].stage, contexts[0].step
    wanted = method.review(contexts, stage)
    if wanted is None:
        return plan
    pools = {**(plan.pools or {}), **(wanted.pools or {})}
    plan = replace(plan, mixture=wanted.mixture or plan.mixture, pools=pools or None)
    planner.redraw(stage, plan, order, step)
    ledger.note_plan(stage.index, step, plan)
    return plan


def at_the_end(contexts: Mapping[int, MethodContext], legs: Legs, learning_rate: float) -> None:
    """Let the contexts stand at the stage's end."""
    for context in contexts.values():
        context.step, context.learning_rate = legs.n_steps, learning_rate


def note_replay_bytes(stream: Stream, plan: StagePlan, stage: Stage, ledger: Ledger) -> None:
    """Bill the bytes of past text that have to be kept to repeat this run: token files of replayed stages, or pools."""
    pools = plan.pools or {}
    replayed = {source for trained, row in ledger.tokens.items() for source in row if source < trained}
    kept = 0
    for source in replayed if not pools else (plan.mixture or {}):
        if source < stage.index:
            tokens = stream.tokens("train", source)
            kept += min(len(tokens), pools.get(source, len(tokens))) * tokens.dtype.itemsize
    ledger.stored_bytes["replay_data"] = max(kept, ledger.stored_bytes.get("replay_data", 0))


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
