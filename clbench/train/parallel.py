"""Device and precision: what this process computes on, found through accelerate, measured where it matters."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clbench.errors import ConfigError
from clbench.files import exclusive, read_json, write_json
from clbench.home import home
from clbench.track import TrainingSpec

GAIN_TO_SWITCH = 1.1
"""bf16 autocast is used when it is at least this many times faster: below that its rounding buys nothing."""
LONG_STEP_SECONDS = 5.0
"""Where one precision takes so long and twice as long as the other, its first step decides: warm-up is little of it."""


@dataclass(frozen=True)
class Hardware:
    """What a run computes on. ``autocast_dtype`` None means plain fp32."""

    device: torch.device
    precision: str
    """fp32 or bf16."""

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The autocast type of the training forward pass."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def autocast(self) -> torch.autocast:
        """Return the context of a training forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def memory_bytes(self) -> int:
        """Return the accelerator's peak allocation, 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def find_device(wanted: str = "auto") -> torch.device:
    """Return the device that accelerate finds, or the one asked for (auto, cpu, cuda, cuda:1 …).

    Raises:
        ConfigError: the device is not there.
    """
    keep_freed_memory()
    if wanted == "auto":
        from accelerate import PartialState

        found: torch.device = PartialState().device
        return found
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # fails where nothing can be computed, as on "meta"
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {wanted!r} cannot be used: {str(error).splitlines()[0]}",
            mend="`clbench doctor` lists what is there",
        ) from None
    return device


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of giving each back to the kernel.

    On a CPU every step frees and asks again for logits of tens of megabytes, and faulting those pages in anew
    takes a good part of a step (benchmarks/allocator.py measures it). Elsewhere than on glibc this does nothing.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def describe(device: torch.device) -> str:
    """Return a readable name of the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def choose_precision(
    device: torch.device,
    training: TrainingSpec,
    *,
    shape: Sequence[object],
    vocab_size: int,
    make: Callable[[], torch.nn.Module],
) -> str:
    """Return the precision of a track on this device; ``auto`` is measured once per machine and recorded.

    The record is ``precision.json`` in the cache folder; delete it to measure again.

    Args:
        device: that computes.
        training: whose precision, batch and length are meant.
        shape: what tells one model from another in the record.
        vocab_size: token ids.
        make: returns a model of that shape; only called to measure.
    """
    if training.precision != "auto":
        return training.precision
    # Not the number of threads: `prepare` may have others than `run`, and a base of each precision is another base.
    name = f"{platform.machine()} CPU" if device.type == "cpu" else describe(device)
    key = "|".join(
        [
            name,
            platform.processor() or platform.machine(),
            torch.__version__,
            *map(str, shape),
            str(vocab_size),
            str(training.batch_rows),
            str(training.sequence_length),
        ]
    )
    path = home() / "precision.json"
    with exclusive(home() / "precision.d", mend="wait for it", timeout_seconds=120):
        records: dict[str, Any] = read_json(path) if path.is_file() else {}
        if key not in records:
            seconds = measure_precisions(device, make(), training, vocab_size)
            gain = seconds["fp32"] / seconds["bf16"]
            records[key] = {
                "precision": "bf16" if gain >= GAIN_TO_SWITCH else "fp32",
                "seconds_per_step": seconds,
                "bf16_gain": gain,
            }
            write_json(path, records)
    return str(records[key]["precision"])


def measure_precisions(
    device: torch.device, model: torch.nn.Module, training: TrainingSpec, vocab_size: int, n_steps: int = 3
) -> dict[str, float]:
    """Return the median seconds of a training step in fp32 and under bf16 autocast, after one warm-up each.

    On a CPU two rows suffice: without bf16 instructions a step takes ten times as long, and this would, too.
    """
    model = model.to(device)
    rows = training.micro_batch_rows or training.batch_rows
    shape = (rows if device.type != "cpu" else min(2, rows), training.sequence_length)
    tokens_BT = torch.arange(shape[0] * shape[1], device=device).reshape(shape) % vocab_size
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(1 + n_steps):
        for precision, measured in times.items():
            start = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                logits_BTV = model(input_ids=tokens_BT).logits
            loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten())
            torch.autograd.backward(loss)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            measured.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
        slowest, fastest = (choose(measured[-1] for measured in times.values()) for choose in (max, min))
        if slowest > max(LONG_STEP_SECONDS, 2 * fastest):
            break
    return {precision: statistics.median(measured[1:] or measured) for precision, measured in times.items()}


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a small tensor over the processes of the default group; itself where there is no group."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def seed_device(seed: int, device: torch.device) -> None:
    """Seed what a forward pass draws from; ``torch.manual_seed`` formats a stack trace each time without a GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
