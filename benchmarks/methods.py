"""What a method costs: its step time over ``sequential``, and our loop against Hugging Face ``Trainer``.

    python -m benchmarks.methods                                every method, nano model, CPU, one thread
    python -m benchmarks.methods --trainer                      our loop against transformers.Trainer
    python -m benchmarks.methods --size 135M --device cuda      on a GPU: bf16, rows of 1024 tokens
    python -m benchmarks.methods --clock cpu                    processor seconds: for a machine that is not idle
    python -m benchmarks.methods --past 5 --method rank1-ewc    with terms of five past stages: the base's and four more

One process, one model, the same batches. A block is a short job of the real loop (``clbench.train.loop.train``, one
stage of ``--steps`` steps). Blocks of ``sequential`` and of the methods alternate, A B A C A … A; each is divided by
the mean of the two of ``sequential`` around it. Medians of these paired ratios, with a distribution-free 95 % interval
(six pairs at least). A first round is for warming up and not counted, nor are the first steps of a block.

The block is stage ``--past``, so that a method has as many past stages to hold, the base's among them. It goes through
the stages before once, ``--past-steps`` steps each, untimed and through the same loop; every block of it is resumed
from there, as a killed run would be. ``sequential`` does the same.

step   seconds from the end of a block's first steps to its last, a step: what the seams in the step cost
stage  seconds of the whole job, a step of its main line, saving left out: also what is done before and after the steps
       (a teacher's pass over all rows, a Fisher pass, decay branches, release), so it depends on ``--steps``
seams  1 + seconds in ``edit_gradients`` and ``after_step`` over the step's other seconds, all in one block: finer than
       the ratio on a machine that is not idle, but blind to what a method costs elsewhere (caches, ``extra_loss``).
       CPU only: on an accelerator it would measure launches
state  bytes of ``state_dict`` at the block's end, in vectors (4 bytes a parameter)

``sequential`` over itself shows the noise. Against ``Trainer``: the same start, rows, optimizer (our fused AdamW with
our groups), schedule, clipping and precision; no evaluation, saving, logging or data workers on either side; losses
must agree. ``--profile`` prints where the time of our loop goes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from benchmarks.grid import SCHEDULES, parts_of
from clbench import registry
from clbench.base import open_base, open_stream
from clbench.errors import ClbenchError, ConfigError
from clbench.method import Composed, Context, Cosine, Method, Stage, StagePlan
from clbench.registry import load_track
from clbench.results.store import RunStore
from clbench.run import plan_stages
from clbench.stream import Stream
from clbench.track import ModelSpec, TrainingSpec
from clbench.train.checkpoint import TrainState
from clbench.train.ledger import Ledger
from clbench.train.loop import Job, make_optimizer, train
from clbench.train.models import copy_weights, load_weights, make_model, weights_of
from clbench.train.parallel import Hardware, describe, find_device
from clbench.train.rows import RowPlanner

METHODS = (
    "sequential",
    "replay",
    "replay:fraction=1/t",
    *SCHEDULES,
    "optimizer-state",
    "ema",
    "lawa",
    "soup",
    "mwa",
    "lwf",
    "lwf:scaling=tic_lm",
    "lwf:top_k=32",
    "lora",
    "o-lora",
    "replay-buffer",
    "weighted-replay",
    "adaptive-replay",
    "reuse-ratio",
    "deletions",
    "rank1-ewc",
    "rank1-ewc:apply=prox",
    "ewc",
    "l2-sp",
    "si",
    "mas",
    "agem",
    "gem",
    "der",
    "proxy-fda",
    "l2-init",
    "shrink-perturb",
    "redo",
    "continual-backprop",
)
LIMITS = {"replay": ("step", 1.01), **{spec.partition(":")[0]: ("step", 1.01) for spec in SCHEDULES}} | {
    "ema": ("step", 1.03),
    "rank1-ewc": ("step", 1.02),
    "ewc": ("step", 1.05),
    "lwf": ("stage", 1.40),  # with cached logits the teacher runs before the first step
}
"""What is expected of a method: which ratio, and how large at most."""
STATE_LIMITS = {"rank1-ewc": (1.0, 0.0), "ewc": (0.0, 2.0)}
"""Vectors that a method may keep at most: for each past stage, and besides."""
STATE_SLACK = 1.001
"""For the few numbers that stand beside the vectors."""
TRAINER_LIMITS = {"cpu": 1.0, "cuda": 1.1}
"""How many times as fast as Trainer the loop is expected to be."""


@dataclass(frozen=True)
class Size:
    """A Llama and its batch; vocabulary 0 is the stream's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    rows: int


SIZES = {
    "1M": Size(128, 384, 3, 4, 0, 256, 8),
    "10M": Size(320, 864, 7, 5, 0, 512, 8),
    "135M": Size(576, 1536, 27, 9, 49152, 1024, 8),
}
"""Besides ``nano``, the track's own model and batch. 135M: width, vocabulary and size of SmolLM2-135M, plain heads."""


@dataclass(frozen=True)
class Block:
    """One short job."""

    step_seconds: float
    stage_seconds: float
    losses: list[float]
    seam_seconds: float = 0.0
    """Of a step, in its two seams."""
    state_bytes: int = 0
    """Of the method, after the last step."""

    @property
    def seams(self) -> float:
        """What a step takes over what it takes outside of its seams."""
        return self.step_seconds / (self.step_seconds - self.seam_seconds)


class Clocked(Composed):
    """Methods whose seams in the step are timed."""

    def __init__(self, components: Sequence[Method], clock: Callable[[], float]) -> None:
        super().__init__(components)
        self.clock, self.seconds = clock, 0.0

    def each(self, seam: str, contexts: Mapping[int, Context]) -> None:
        """Call a seam, and add its time where it stands in the step."""
        if seam not in ("edit_gradients", "after_step"):
            return super().each(seam, contexts)
        begun = self.clock()
        super().each(seam, contexts)
        self.seconds += self.clock() - begun


@dataclass
class Bench:
    """One model, one stage of one stream with those before it, and a clock."""

    stream: Stream
    model: torch.nn.Module
    training: TrainingSpec
    past: Sequence[Stage]
    """The stages before, of few steps; every method goes through them once."""
    stage: Stage
    hardware: Hardware
    folder: Path
    n_steps: int
    warm_steps: int
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        """Keep what every block starts from."""
        self.start = copy_weights(weights_of(self.model))
        self.lived: dict[str, TrainState | None] = {}

    def now(self) -> float:
        """Return the time once the device has done its work."""
        if self.hardware.device.type == "cuda":
            torch.cuda.synchronize(self.hardware.device)
        return self.clock()

    def ours(self, spec: str) -> Block:
        """Run one block of a method through the loop, from where the past stages left it."""
        if spec not in self.lived:
            self.lived[spec] = self.live(spec)
        times: list[float] = []
        losses: list[float] = []
        seams: list[float] = []
        method = self.method(spec)
        state_bytes = 0

        def progress(stage: Stage, done: int, total: int, loss_nats: float) -> None:
            nonlocal state_bytes
            times.append(self.now() if done in (self.warm_steps, total) else math.nan)
            losses.append(loss_nats)
            seams.append(method.seconds)
            if done == total:
                state_bytes = sum(t.nbytes for t in method.state_dict()[0].values())

        with without_disk(lambda state: None, self.lived[spec]):
            begun = self.now()
            ledger = self.run(method, [self.stage], progress)
            seconds = self.now() - begun - ledger.seconds.get("checkpoint", 0.0)
        return Block(self.per_step(times), seconds / self.n_steps, losses, self.per_step(seams), state_bytes)

    def live(self, spec: str) -> TrainState | None:
        """Take a method through the past stages; returns what a run resumes from, None where there are none."""
        ends: dict[int, TrainState] = {}
        with without_disk(lambda state: ends.update({0: state})):
            if self.past:
                self.run(self.method(spec), self.past, lambda *_: None)
        return copied(ends[0]) if ends else None

    def method(self, spec: str) -> Clocked:
        """Return a method by its words, new."""
        return Clocked([registry.make_method(part).method for part in parts_of(spec)], self.clock)

    def run(self, method: Composed, stages: Sequence[Stage], progress: Callable[..., None]) -> Ledger:
        """Train through stages from the start's weights; nothing stays on the disk."""
        load_weights(self.model, self.start)
        job = Job(
            store=RunStore(self.folder / "run"),
            stream=self.stream,
            model=self.model,
            method=method,
            stages=stages,
            training=self.training,
            seed=0,
            hardware=self.hardware,
            finish_stage=lambda *_: None,
            progress=progress,
            warn=lambda _: None,
            checkpoint_seconds=math.inf,
            log_steps=10**9,
        )
        try:
            return train(job)
        finally:
            shutil.rmtree(self.folder / "run", ignore_errors=True)
            self.model.zero_grad(set_to_none=True)

    def per_step(self, times: Sequence[float]) -> float:
        """Return the seconds of a step after the first ones; ``times`` are the ends of all steps."""
        return (times[-1] - times[self.warm_steps - 1]) / (len(times) - self.warm_steps)

    def trainer(self) -> Block:
        """Run the same block through ``transformers.Trainer``."""
        load_weights(self.model, self.start)
        model = copy.deepcopy(self.model)  # accelerate wraps what it is given
        losses: list[torch.Tensor] = []
        times = [math.nan] * self.n_steps
        trainer = make_trainer(self, model, losses, times)
        begun = self.now()
        trainer.train()
        stage = (self.now() - begun) / self.n_steps
        return Block(self.per_step(times), stage, [float(loss) for loss in losses])


@contextmanager
def without_disk(save: Callable[[TrainState], None], resumed: TrainState | None = None) -> Iterator[None]:
    """Let a run save to a function and find what it is to resume from: the disk's time is the same for every method."""
    with mock.patch.multiple(
        "clbench.train.loop.checkpoint",
        save=lambda folder, state: save(state),
        load_latest=lambda *_: None if resumed is None else copied(resumed),
    ):
        yield


def copied(state: TrainState) -> TrainState:
    """Return a state whose tensors are its own, for a run goes on in those it is given; without its past's seconds."""
    return replace(
        state,
        weights=copy_weights(state.weights),
        optimizer=copy_weights(state.optimizer),
        method_tensors=copy_weights(state.method_tensors),
        aside=copy_weights(state.aside),
        ledger=copy.deepcopy(state.ledger) | {"seconds": {}},
    )


# --- Trainer ----------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows of the stage in our order, tokenised and cut before."""

    def __init__(self, bench: Bench) -> None:
        planner = RowPlanner(stream=bench.stream, training=bench.training, seed=0)
        order = planner.rows(bench.stage, StagePlan())
        cpu = torch.device("cpu")
        batches = [b for s in range(order.n_steps) for b in order.micro_batches(s, micro_rows=None, device=cpu)]
        self.rows = [
            {"input_ids": inputs_T, "labels": targets_T, "shift_labels": targets_T}  # targets stand one to the left
            for batch in batches
            for inputs_T, targets_T in zip(batch.inputs_BT, batch.targets_BT, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def make_trainer(bench: Bench, model: torch.nn.Module, losses: list[torch.Tensor], times: list[float]) -> Any:
    """Return a Trainer with our optimizer and schedule that notes losses, and the time after the steps that count."""
    import transformers

    transformers.logging.set_verbosity_error()
    training, device = bench.training, bench.hardware.device
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters, training, device, Composed([]))
    cosine = Cosine(peak=bench.stage.learning_rate, warmup_steps=bench.stage.warmup_steps, floor=bench.stage.floor)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(min(step, bench.n_steps - 1), bench.n_steps) / training.learning_rate
    )

    class Noting(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (bench.warm_steps, bench.n_steps):
                times[state.global_step - 1] = bench.now()

    arguments = transformers.TrainingArguments(
        output_dir=str(bench.folder / "trainer"),
        max_steps=bench.n_steps,
        per_device_train_batch_size=training.batch_rows,
        max_grad_norm=training.clip_norm,
        bf16=bench.hardware.precision == "bf16",
        use_cpu=device.type == "cpu",
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
    )
    trainer = Noting(
        model=model, args=arguments, train_dataset=Rows(bench), optimizers=(optimizer, schedule), callbacks=[Clock()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def check_agreement(ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> float:
    """Return the largest difference of two loss curves; they must be of the same work.

    Raises:
        ConfigError: they differ by more than the tolerance, or in length.
    """
    gap = max((abs(a - b) for a, b in zip(ours, theirs, strict=False)), default=math.inf)
    if len(ours) != len(theirs) or not gap <= tolerance:
        raise ConfigError(f"not the same work: {len(ours)} and {len(theirs)} losses, up to {gap:.2g} nats apart")
    return gap


# --- pairing ----------------------------------------------------------------------------------------------------------


@dataclass
class Ratio:
    """Ratios of one kind, one a pair."""

    values: list[float] = field(default_factory=list)

    def summary(self) -> tuple[float, float, float]:
        """Return the median and its interval."""
        return statistics.median(self.values), *median_interval(self.values)


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the order statistics between which the median lies with at least this probability; NaN below six values.

    P(the k-th smallest lies above the median) = P(Binomial(n, 1/2) < k).
    """
    ordered, n = sorted(values), len(values)
    below, k = 0.0, 0
    while k < n and 2 * (below + math.comb(n, k) / 2**n) <= 1 - level:
        below += math.comb(n, k) / 2**n
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (math.nan, math.nan)


def alternate(
    a: Callable[[], Block],
    others: Mapping[str, Callable[[], Block]],
    repeats: int,
    say: Callable[[str], None],
    seen: Callable[[str, Block], None] = lambda name, block: None,
) -> tuple[dict[str, dict[str, Ratio]], dict[str, str], list[Block]]:
    """Run A B A C A … ``repeats`` times after one to warm up; returns ratios to A, what failed, and A's blocks.

    ``seen`` gets every block of the others that counts.
    """
    ratios = {name: {"step": Ratio(), "stage": Ratio()} for name in others}
    failed: dict[str, str] = {}
    blocks: list[Block] = []
    for number in range(repeats + 1):
        before = a()
        for name, run in others.items():
            if name in failed:
                continue
            try:
                block = run()
            except ClbenchError as error:
                failed[name] = str(error)
                ratios.pop(name)
                continue
            after = a()
            if number:
                blocks.append(after)
                seen(name, block)
                for kind, ratio in ratios[name].items():
                    attribute = f"{kind}_seconds"
                    around = (getattr(before, attribute) + getattr(after, attribute)) / 2
                    ratio.values.append(getattr(block, attribute) / around)
            before = after
        say(f"round {number} of {repeats}")
    return ratios, failed, blocks


def verdict(summary: tuple[float, float, float], limit: float) -> str:
    """Return whether a ratio is at most its limit, by its interval."""
    median, low, high = summary
    if math.isnan(low):
        return f"{'met' if median <= limit else 'not met'} by the median (too few pairs for an interval)"
    return "met" if high <= limit else "not met" if low > limit else "cannot be told"


# --- what is run ------------------------------------------------------------------------------------------------------


def make_bench(arguments: argparse.Namespace, folder: Path) -> Bench:
    """Return the model, the stages and the clock that were asked for."""
    track = load_track(arguments.track)
    stream = open_stream(track)
    hardware = Hardware(find_device(arguments.device), "fp32")
    if arguments.precision == "bf16" or (arguments.precision == "auto" and hardware.device.type == "cuda"):
        hardware = Hardware(hardware.device, "bf16")
    training = track.training
    if arguments.size == "nano":
        model = open_base(track, stream, Hardware(hardware.device, "fp32")).load()
    else:
        size = SIZES[arguments.size]
        spec = ModelSpec(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            n_layers=size.layers,
            n_heads=size.heads,
            max_length=max(size.length, arguments.length or 0),
        )
        model = make_model(spec, vocab_size=size.vocabulary or stream.vocab_size, eos_id=stream.eos_id, seed=0)
        training = training.model_copy(update={"sequence_length": size.length, "batch_rows": size.rows})
    rows, length = arguments.rows or training.batch_rows, arguments.length or training.sequence_length
    training = training.model_copy(update={"sequence_length": length, "batch_rows": rows, "micro_batch_rows": None})
    stages = plan_stages(track, stream)
    if arguments.past > len(stages):
        raise ConfigError(f"--past {arguments.past}: the stream has {len(stages)} stages after the base's")
    past = [replace(stage, n_tokens=arguments.past_steps * rows * length) for stage in stages[: arguments.past - 1]]
    return Bench(
        stream=stream,
        model=model.to(hardware.device),
        training=training,
        past=past,
        stage=replace(stages[arguments.past - 1], n_tokens=arguments.steps * rows * length),
        hardware=hardware,
        folder=folder,
        n_steps=arguments.steps,
        warm_steps=min(arguments.warm_steps, arguments.steps - 1),
        clock=time.process_time if arguments.clock == "cpu" else time.perf_counter,
    )


def compare_methods(bench: Bench, specs: Sequence[str], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the ratios of all methods to sequential, and what each keeps."""
    runs = {spec: partial(bench.ours, spec) for spec in dict.fromkeys(specs)}
    own: dict[str, list[Block]] = {spec: [] for spec in runs}
    sequential = partial(bench.ours, "sequential")
    ratios, failed, blocks = alternate(sequential, runs, repeats, say, lambda name, block: own[name].append(block))
    n_parameters = sum(p.numel() for p in bench.model.parameters())
    found = {}
    for name, kinds in ratios.items():
        entry: dict[str, Any] = {kind: described(ratio) for kind, ratio in kinds.items()}
        if bench.hardware.device.type == "cpu":
            entry["seams"] = described(Ratio([block.seams for block in own[name]]))
        state_bytes = own[name][-1].state_bytes
        entry |= {"state_bytes": state_bytes, "state_vectors": state_bytes / 4 / n_parameters}
        method = parts_of(name)[0].partition(":")[0]
        kind, limit = LIMITS.get(method, ("step", math.nan))
        if not math.isnan(limit):
            entry |= {"limit": limit, "judged_by": kind, "verdict": verdict(kinds[kind].summary(), limit)}
        if method in STATE_LIMITS:
            entry |= judged_state(method, bench.stage.index, entry["state_vectors"])
        found[name] = entry
    return {"sequential": seconds_of(blocks), "ratios": found, "skipped": failed}


def judged_state(method: str, n_past: int, n_vectors: float) -> dict[str, Any]:
    """Return how many vectors a method may keep, and whether it keeps no more."""
    each, besides = STATE_LIMITS[method]
    limit = each * n_past + besides
    return {"state_limit": limit, "state_verdict": "met" if n_vectors <= limit * STATE_SLACK else "not met"}


def compare_trainer(bench: Bench, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return Trainer's time over ours, after a check that both did the same work."""
    tolerance = 1e-3 if bench.hardware.precision == "fp32" else 3e-2
    gap = check_agreement(bench.ours("sequential").losses, bench.trainer().losses, tolerance)
    ratios, failed, blocks = alternate(lambda: bench.ours("sequential"), {"trainer": bench.trainer}, repeats, say)
    if failed:
        raise ConfigError(failed["trainer"])
    median, low, high = ratios["trainer"]["step"].summary()
    limit = TRAINER_LIMITS[bench.hardware.device.type]
    inverse = (1 / median, 1 / high, 1 / low)  # ours over theirs, to be at most 1 / limit
    return {
        "ours": seconds_of(blocks),
        "trainer_over_ours": {kind: described(ratio) for kind, ratio in ratios["trainer"].items()},
        "largest_loss_difference_nats": gap,
        "limit": limit,
        "verdict": verdict(inverse, 1 / limit),
    }


def described(ratio: Ratio) -> dict[str, Any]:
    """Return JSON-able values of a ratio."""
    median, low, high = ratio.summary()
    bounds = {"low": low, "high": high} if not math.isnan(low) else {"low": None, "high": None}
    return {"median": median, **bounds, "n_pairs": len(ratio.values)}


def seconds_of(blocks: Sequence[Block]) -> dict[str, float]:
    """Return the median seconds of our plain loop."""
    return {f"{kind}_s": statistics.median(getattr(b, f"{kind}_seconds") for b in blocks) for kind in ("step", "stage")}


def profile(bench: Bench) -> str:
    """Return where the time of our loop goes: operators, then Python functions."""
    import cProfile
    import io
    import pstats

    bench.ours("sequential")
    with torch.profiler.profile() as record:
        bench.ours("sequential")
    key = "self_device_time_total" if bench.hardware.device.type == "cuda" else "self_cpu_time_total"
    operators = record.key_averages().table(sort_by=key, row_limit=20)
    python, text = cProfile.Profile(), io.StringIO()
    python.runcall(bench.ours, "sequential")
    pstats.Stats(python, stream=text).sort_stats("tottime").print_stats(25)
    return f"{operators}\n{text.getvalue()}"


# --- output -----------------------------------------------------------------------------------------------------------


def shown(ratio: dict[str, Any]) -> str:
    """Return a ratio with its interval."""
    bounds = f"[{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio["low"] is not None else ""
    return f"{ratio['median']:6.3f} {bounds:16}"


def print_methods(found: dict[str, Any]) -> None:
    """Print the table of methods."""
    base = found["sequential"]
    print(f"sequential: {base['step_s'] * 1e3:.2f} ms a step; a stage {base['stage_s'] * 1e3:.2f} ms a step")
    width = max([28, *(len(name) + 2 for name in found["ratios"])])
    print(f"{'over sequential':{width}}{'step':24}{'stage':24}{'seams':24}{'state':10}pairs  expected")
    for name, entry in found["ratios"].items():
        expected = (
            [f"{entry['judged_by']} at most {entry['limit']:.2f}: {entry['verdict']}"] if "limit" in entry else []
        )
        if "state_limit" in entry:
            expected += [f"state at most {entry['state_limit']:.0f} vectors: {entry['state_verdict']}"]
        seams = shown(entry["seams"]) if "seams" in entry else ""
        pairs, state = entry["step"]["n_pairs"], f"{entry['state_vectors']:.2f}"
        figures = f"{shown(entry['step']):24}{shown(entry['stage']):24}{seams:24}{state:10}{pairs:5d}"
        print(f"{name:{width}}{figures}  {'; '.join(expected)}")
    for name, why in found["skipped"].items():
        print(f"{name:28}skipped: {why}")


def print_trainer(found: dict[str, Any]) -> None:
    """Print the comparison with Trainer."""
    print(f"our loop: {found['ours']['step_s'] * 1e3:.2f} ms a step")
    print(f"losses of both agree to {found['largest_loss_difference_nats']:.1e} nats at every step")
    for kind, ratio in found["trainer_over_ours"].items():
        print(f"Trainer / ours, {kind:6} {shown(ratio)} {ratio['n_pairs']} pairs")
    print(f"expected: step at least {found['limit']:.1f}: {found['verdict']}")


def facts_of(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on."""
    import transformers

    return {
        "device": describe(bench.hardware.device),
        "n_cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "n_parameters": sum(p.numel() for p in bench.model.parameters()),
        "rows": bench.training.batch_rows,
        "length": bench.training.sequence_length,
        "precision": bench.hardware.precision,
        "past_stages": bench.stage.index,
        "clock": arguments.clock,
        "steps": bench.n_steps,
        "warm_steps": bench.warm_steps,
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure what was asked for."""
    bench = make_bench(arguments, folder)
    facts = facts_of(bench, arguments)
    quiet = arguments.json

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    if not quiet:
        print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    if arguments.profile:
        print(profile(bench))
        return {"facts": facts}
    found: dict[str, Any] = {"facts": facts}
    if arguments.trainer:
        found["trainer"] = compare_trainer(bench, arguments.repeats, say)
    else:
        found["methods"] = compare_methods(bench, arguments.method or METHODS, arguments.repeats, say)
    if bench.hardware.device.type == "cpu":
        found["gpu"] = "not measured"
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="codedocs-nano", help="whose stream, batch and base are used")
    parser.add_argument("--size", default="nano", choices=["nano", *SIZES])
    parser.add_argument("--device", default="cpu", help="cpu, cuda …")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", action="append", help='"METHOD + METHOD"; may be given often; all by default')
    parser.add_argument("--trainer", action="store_true", help="compare with transformers.Trainer instead")
    parser.add_argument("--profile", action="store_true", help="print where the time of our loop goes instead")
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--warm-steps", type=int, default=3, help="of a block that are not counted")
    parser.add_argument("--past", type=int, default=1, help="past stages that methods hold, the base's among them")
    parser.add_argument("--past-steps", type=int, default=2, help="of each stage before the block's")
    parser.add_argument("--rows", type=int, help="of a batch; the track's or the size's by default")
    parser.add_argument("--length", type=int, help="of a row, in tokens; the track's or the size's by default")
    parser.add_argument("--repeats", type=int, default=9, help="pairs")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    if arguments.steps < 2 or arguments.warm_steps < 1 or arguments.repeats < 1:
        parser.error("give at least 2 steps, 1 warm step and 1 repeat")
    least = (arguments.past, arguments.past_steps, *(n for n in (arguments.rows, arguments.length) if n is not None))
    if min(least) < 1:
        parser.error("give at least 1 past stage, past step, row and token")
    torch.set_num_threads(arguments.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = run(arguments, Path(folder))
    except ClbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    if "methods" in found:
        print_methods(found["methods"])
    if "trainer" in found:
        print_trainer(found["trainer"])
    if "gpu" in found:
        print(f"GPU: {found['gpu']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
