"""What keeping freed memory buys a CPU training step: run it, it starts itself with and without and prints the ratio.

    python benchmarks/allocator.py [--repeats 5]

Each run is a process of its own, because the setting cannot be taken back; runs alternate; CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time


def measure(keep: bool, n_steps: int = 6) -> float:
    """Return the median CPU seconds of a training step of the model of codedocs-nano."""
    import torch

    from clbench.registry import load_track
    from clbench.train.models import make_model
    from clbench.train.parallel import keep_freed_memory

    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    track = load_track("codedocs-nano")
    model = make_model(track.model, vocab_size=4096, eos_id=0, seed=0)
    tokens_BT = torch.randint(0, 4096, (track.training.batch_rows, track.training.sequence_length))
    seconds = []
    for _ in range(1 + n_steps):
        start = time.process_time()
        logits_BTV = model(input_ids=tokens_BT).logits
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
        model.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Run both settings in turn and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", choices=["kept", "returned"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options.one == "kept"))
        return
    seconds: dict[str, list[float]] = {"kept": [], "returned": []}
    for _ in range(options.repeats):
        for setting, found in seconds.items():
            command = [sys.executable, __file__, "--one", setting]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(float(done.stdout.split()[-1]))
    medians = {setting: statistics.median(found) for setting, found in seconds.items()}
    print(f"{platform.machine()}, {platform.platform()}, one thread, {options.repeats} runs each")
    for setting, median in medians.items():
        print(f"freed memory {setting:9s} {median * 1e3:8.1f} ms CPU a step")
    print(f"ratio {medians['returned'] / medians['kept']:.2f}")


if __name__ == "__main__":
    main()
