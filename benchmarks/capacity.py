"""What suite ``capacity`` costs: its parts against one held-out evaluation of the same checkpoint.

    python -m benchmarks.capacity                                   codedocs-nano, CPU, one thread
    python -m benchmarks.capacity --track domain-smollm2 --cold --documents 8     a real model, once, on some text
    python -m benchmarks.capacity --track domain-smollm2 --operations   what it would run through the model
    python -m benchmarks.capacity --clock cpu                       processor seconds: for a machine that is not idle

One process. The checkpoint is the track's base with noise, its base is the base, its previous one has other noise: both
have to be loaded and run, as in the middle of a run. Blocks alternate, heldout capacity heldout … heldout; each of
capacity is divided by the mean of the two of heldout around it. A first round, which also reads the text, is for
warming up. Medians of these ratios with a distribution-free 95 % interval (six pairs at least).

--cold measures everything once, in this order, text reading included: for a large model on a small machine. --documents
takes some held-out documents of a period only. Then the ratio says little, as the suite reads the beginnings of few
documents and held-out evaluation all of all; the tokens that each ran through models are printed to scale by.

activations and weights are what the suite does when nothing is asked for, and their sum is judged: at most 1. gradients
is the optional part; it is shown beside them and not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from benchmarks.heldout import Sample
from benchmarks.methods import median_interval, verdict
from clbench import registry
from clbench.base import open_base, open_stream
from clbench.errors import ClbenchError
from clbench.run import hardware_for
from clbench.stream import Stream
from clbench.suite import Checkpoint, Reference, Suite
from clbench.train.models import n_parameters, weights_sha256
from clbench.train.parallel import describe

LIMIT = 1.0
"""Held-out evaluations that the suite may cost, the optional part left out."""
DEFAULT = ("activations", "weights")
Measured = tuple[dict[str, list[float]], dict[str, list[float]]]
"""Ratios and seconds by part."""


def noisy(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Add noise of a hundredth of every parameter's spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1:
                p.add_(0.01 * p.std().cpu() * torch.randn(p.shape, generator=generator))
    return model


def checkpoint_of(track_name: str, device: str, n_documents: int | None) -> tuple[Checkpoint, Any]:
    """Return a checkpoint with a base and a previous one, and its stream."""
    track = registry.load_track(track_name)
    stream = open_stream(track)
    hardware = hardware_for(track, stream, device)
    base = open_base(track, stream, hardware)
    if n_documents is not None:
        stream = Sample(stream.folder, n_documents)
    model, before = noisy(base.load(), 1), noisy(base.load(), 2)
    checkpoint = Checkpoint(
        model=model.to(hardware.device),
        weights_sha256=weights_sha256(model),
        device=hardware.device,
        autocast_dtype=None,
        base=Reference(weights_sha256=base.weights_sha256, load=base.load),
        previous=Reference(weights_sha256=weights_sha256(before), load=lambda: noisy(base.load(), 2)),
    )
    return checkpoint, stream


def operations(track_name: str) -> dict[str, float]:
    """Return the operations of held-out evaluation and of the suite, from shapes alone: no weights, nothing is run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    track = registry.load_track(track_name)
    stream = open_stream(track)
    config = AutoConfig.from_pretrained(open_base(track, stream, hardware_for(track, stream, "cpu")).model_folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    others = [Reference(weights_sha256=name, load=lambda: model) for name in ("base", "previous")]
    checkpoint = Checkpoint(
        model=model,
        weights_sha256="now",
        device=torch.device("cpu"),
        autocast_dtype=None,
        base=others[0],
        previous=others[1],
    )
    capacity: Suite = registry.make_suite("capacity:gradients=true", stream)
    heldout = registry.make_suite("heldout", stream).flops(checkpoint)
    return {"heldout": heldout} | {shard: capacity.shard_flops(checkpoint, shard) for shard in capacity.shards()}


def n_tokens_of(stream: Stream) -> int:
    """Return the tokens of the held-out text."""
    return sum(int(stream.offsets("heldout", info.index)[-1]) for info in stream.stages())


def timed(run: Callable[[], object], clock: str) -> float:
    """Return the seconds that a call takes."""
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - start


def alternate(
    heldout: Callable[[], float], parts: Mapping[str, Callable[[], float]], repeats: int, say: Callable[[str], None]
) -> Measured:
    """Return ratio by round and seconds by round of every part, and of their default sum."""
    ratios: dict[str, list[float]] = {name: [] for name in (*parts, "default")}
    seconds: dict[str, list[float]] = {name: [] for name in (*parts, "heldout")}
    before = heldout()
    for number in range(repeats + 1):
        found = {name: run() for name, run in parts.items()}
        after = heldout()
        if number:
            around = (before + after) / 2
            seconds["heldout"].append(after)
            for name, value in found.items():
                ratios[name].append(value / around)
                seconds[name].append(value)
            ratios["default"].append(sum(found[name] for name in DEFAULT) / around)
        before = after
        say(f"round {number} of {repeats}")
    return ratios, seconds


def once(heldout: Callable[[], float], parts: Mapping[str, Callable[[], float]]) -> Measured:
    """Return the same from one measurement each."""
    seconds = {"heldout": heldout()} | {name: part() for name, part in parts.items()}
    shares = {name: value / seconds["heldout"] for name, value in seconds.items() if name != "heldout"}
    shares["default"] = sum(shares[name] for name in DEFAULT)
    return {name: [value] for name, value in shares.items()}, {name: [value] for name, value in seconds.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""

    def say(text: str) -> None:
        if not arguments.json:
            print(text, file=sys.stderr, flush=True)

    checkpoint, stream = checkpoint_of(arguments.track, arguments.device, arguments.documents)
    spec = "capacity:gradients=true" if arguments.gradients else "capacity"
    capacity: Suite = registry.make_suite(spec, stream)
    heldout: Suite = registry.make_suite("heldout", stream)

    def part(shard: str) -> Callable[[], float]:
        return lambda: timed(lambda: capacity.measure_shard(checkpoint, shard), arguments.clock)

    def whole() -> float:
        return timed(lambda: heldout.measure(checkpoint), arguments.clock)

    parts = {shard: part(shard) for shard in capacity.shards()}
    ratios, seconds = once(whole, parts) if arguments.cold else alternate(whole, parts, arguments.repeats, say)
    summaries = {name: (statistics.median(values), *median_interval(values)) for name, values in ratios.items()}
    flops = {shard: capacity.shard_flops(checkpoint, shard) for shard in capacity.shards()}
    return {
        "facts": {
            "track": arguments.track,
            "device": describe(checkpoint.device),
            "n_cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "n_parameters": n_parameters(checkpoint.model),
            "threads": arguments.threads,
            "clock": arguments.clock,
            "n_pairs": 0 if arguments.cold else arguments.repeats,
            "n_documents": arguments.documents or "all",
            "heldout_tokens": n_tokens_of(stream),
            "heldout_flops": heldout.flops(checkpoint),
            "capacity_flops": flops,
        },
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": summaries,
        "verdict": verdict(summaries["default"], LIMIT),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="codedocs-nano", help="prepared; whose stream and base are used")
    parser.add_argument("--device", default="cpu", help="cpu, cuda …")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6, help="pairs")
    parser.add_argument("--no-gradients", dest="gradients", action="store_false", help="leave the optional part out")
    parser.add_argument("--operations", action="store_true", help="count operations instead, nothing is run")
    parser.add_argument("--documents", type=int, help="held-out documents of a period; all by default")
    parser.add_argument("--cold", action="store_true", help="measure once, without pairs and warming up")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    if arguments.repeats < 1:
        parser.error("give at least 1 repeat")
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.operations:
            found = operations(arguments.track)
            for name, flops in found.items():
                print(f"{name:12} {flops:.3g} operations, {flops / found['heldout']:.2f} held-out evaluations")
            return 0
        found = run(arguments)
    except ClbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(", ".join(f"{key} {value}" for key, value in found["facts"].items()))
    print(f"heldout      {found['seconds']['heldout']:.2f} s")
    for name, (median, low, high) in found["ratios"].items():
        taken = f"{found['seconds'][name]:.2f} s, " if name in found["seconds"] else ""
        bounds = "" if low != low else f" [{low:.2f}, {high:.2f}]"
        print(f"{name:12} {taken}{median:.2f}{bounds} held-out evaluations")
    print(f"activations and weights within {LIMIT:g} held-out evaluation: {found['verdict']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
