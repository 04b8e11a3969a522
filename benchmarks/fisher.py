"""What per-sequence gradients cost: one hooked pass of a batch against one backward pass a sequence in a Python loop.

    python -m benchmarks.fisher                               nano model, CPU, one thread
    python -m benchmarks.fisher --clock cpu                   processor seconds: for a machine that is not idle
    python -m benchmarks.fisher --size 135M --device cuda     the shape of SmolLM2-135M

One process, one freshly made model, fp32, the same random rows. Blocks alternate, loop ours loop ours … loop; each of
ours is divided by the mean of the two of the loop around it; one round before is for warming up. Medians of these
ratios with a distribution-free 95 % interval (six pairs at least).

second_moment   the diagonal Fisher (mean of squares, and the mean) of all rows
each_sequence   every gradient is made and dropped; against a loop of backward passes that does the same

First both are run once and their Fishers compared. The loop is what one would write: ``loss.backward()`` for a batch of
one, then ``square.addcmul_(grad, grad)``. A loop has the same multiplications to do as the pass of a batch, whose
weight gradients are products of one sequence each; the pass saves what a call costs besides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from torch.nn.functional import cross_entropy

from benchmarks.methods import Block, alternate, verdict
from clbench.errors import ClbenchError
from clbench.fisher.estimate import second_moment
from clbench.fisher.gradients import each_sequence
from clbench.method import Weights
from clbench.train.parallel import describe, find_device, keep_freed_memory

EXPECTED = 3.0
"""How many times as fast as the loop the pass is expected to be."""
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Size:
    """A Llama and its batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    length: int
    rows: int


SIZES = {
    "nano": Size(64, 192, 3, 2, 2, 4096, 128, 16),  # the base of codedocs-nano
    "135M": Size(576, 1536, 30, 9, 3, 49152, 512, 8),  # SmolLM2-135M
}


@dataclass(frozen=True)
class Rows:
    """A batch."""

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor


@dataclass
class Bench:
    """A model, rows and a clock."""

    model: torch.nn.Module
    batches: list[Rows]
    device: torch.device
    clock: Callable[[], float]

    def timed(self, work: Callable[[], object]) -> Block:
        """Return the seconds of a sequence."""
        begun = self.now()
        work()
        seconds = (self.now() - begun) / sum(len(b.inputs_BT) for b in self.batches)
        return Block(seconds, seconds, [])

    def now(self) -> float:
        """Return the time once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def loop_gradients(self, use: Callable[[str, torch.Tensor], None] = lambda *_: None) -> None:
        """One forward and one backward pass for each sequence."""
        for batch in self.batches:
            for inputs_T, targets_T in zip(batch.inputs_BT, batch.targets_BT, strict=True):
                self.model.zero_grad(set_to_none=True)
                cross_entropy(self.model(input_ids=inputs_T[None]).logits[0], targets_T).backward()
                for name, p in self.model.named_parameters():
                    assert p.grad is not None
                    use(name, p.grad)
        self.model.zero_grad(set_to_none=True)

    def loop_fisher(self) -> Weights:
        """The diagonal Fisher from the loop."""
        squares = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        means = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}

        @torch.no_grad()
        def use(name: str, gradient: torch.Tensor) -> None:
            squares[name].addcmul_(gradient, gradient)
            means[name].add_(gradient)

        self.loop_gradients(use)
        n_sequences = sum(len(b.inputs_BT) for b in self.batches)
        return {name: square.div_(n_sequences) for name, square in squares.items()}

    def our_gradients(self) -> None:
        """Every gradient, made and dropped."""
        for batch in self.batches:
            each_sequence(self.model, batch.inputs_BT, batch.targets_BT, lambda *_: None)

    def our_fisher(self) -> Weights:
        """The diagonal Fisher from ours."""
        return second_moment(self.model, self.batches)[0]


def make_bench(arguments: argparse.Namespace) -> Bench:
    """Return the model and random rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[arguments.size]
    device = find_device(arguments.device)
    length, n_rows = arguments.length or size.length, arguments.rows or size.rows
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        max_position_embeddings=length,
        tie_word_embeddings=not arguments.untied,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device).eval()
    ids = torch.randint(size.vocabulary, (arguments.batches, n_rows, length + 1), device=device)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    return Bench(model, [Rows(each[:, :-1], each[:, 1:]) for each in ids], device, clock)


def disagreement(bench: Bench) -> float:
    """Return the largest difference of the two Fishers over the largest entry, parameter by parameter."""
    loop, ours = bench.loop_fisher(), bench.our_fisher()
    gaps = [float((loop[name] - ours[name]).abs().max() / loop[name].abs().max()) for name in loop]
    return max(gaps)


def compare(
    bench: Bench, loop: Callable[[], object], ours: Callable[[], object], repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return how many times as fast as the loop ours is."""
    ratios, failed, blocks = alternate(partial(bench.timed, loop), {"ours": partial(bench.timed, ours)}, repeats, say)
    if failed:
        raise ClbenchError(failed["ours"])
    median, low, high = ratios["ours"]["step"].summary()
    loop_s = sorted(block.step_seconds for block in blocks)[len(blocks) // 2]
    return {
        "loop_s_a_sequence": loop_s,
        "times_as_fast": 1 / median,
        "low": None if high != high else 1 / high,
        "high": None if low != low else 1 / low,
        "n_pairs": len(ratios["ours"]["step"].values),
        "expected": EXPECTED,
        "verdict": verdict((median, low, high), 1 / EXPECTED),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure."""

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    bench = make_bench(arguments)
    if bench.device.type == "cpu":
        keep_freed_memory()  # as the training loop does
    gap = disagreement(bench)
    if gap > TOLERANCE:
        raise ClbenchError(f"the two Fishers differ by {gap:.1e}")
    rows = bench.batches[0].inputs_BT
    facts = {
        "device": describe(bench.device),
        "n_cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "n_parameters": sum(p.numel() for p in bench.model.parameters()),
        "rows": len(rows),
        "length": rows.shape[1],
        "threads": arguments.threads,
        "clock": arguments.clock,
        "fisher_disagreement": gap,
    }
    if not arguments.json:
        print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    pairs = {
        "second_moment": (bench.loop_fisher, bench.our_fisher),
        "each_sequence": (bench.loop_gradients, bench.our_gradients),
    }
    ratios = {name: compare(bench, *pair, arguments.repeats, say) for name, pair in pairs.items()}
    found: dict[str, Any] = {"facts": facts, "ratios": ratios}
    if bench.device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(bench.device)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano", choices=[*SIZES])
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda …")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, help="of a batch; of the size by default")
    parser.add_argument("--length", type=int, help="of a row; of the size by default")
    parser.add_argument("--batches", type=int, default=1, help="of a block")
    parser.add_argument("--repeats", type=int, default=9, help="pairs")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    try:
        found = run(arguments)
    except ClbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, entry in found["ratios"].items():
        bounds = f"[{entry['low']:.2f}, {entry['high']:.2f}]" if entry["low"] is not None else ""
        print(
            f"{name:14} {entry['times_as_fast']:.2f} {bounds} times as fast as the loop's "
            f"{entry['loop_s_a_sequence'] * 1e3:.2f} ms a sequence, {entry['n_pairs']} pairs; "
            f"expected at least {entry['expected']:.0f}: {entry['verdict']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
