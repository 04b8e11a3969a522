"""What merging costs: SLERP of two checkpoints against ``mergekit-yaml`` and against copying the files.

    python -m benchmarks.merge                     two checkpoints of 135 M parameters (bf16, random, 0.27 GB each)
    python -m benchmarks.merge --size 1b           two of 1.24 B parameters (2.5 GB each; needs 18 GB of disk)
    python -m benchmarks.merge --no-hash           ours without the digests of the inputs in merge_plan.json

Every turn is a process of its own: ours, mergekit (where it is installed: ``pip install "clbench[mergekit]"``), and a
copy of both inputs with ``shutil.copy``, synced to the disk as our result is. Turns alternate; the first round warms
the page cache and is not counted. Wall time is that of the whole process, imports included; beside it stands the work
alone, without starting Python and importing torch, measured inside ours and the copy, and the processor time of the
process, which says more on a busy machine. Peak memory is the largest resident set of the process (``ru_maxrss``).
mergekit does not sync and writes no digests. Results are compared: all tensors within one rounding of bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from clbench.merge.tensors import CODES, ShardWriter, TensorInfo, open_source

STRENGTH = 0.4
EXPECTED = {"times as fast as mergekit": 2.0, "of mergekit's peak memory": 0.5, "of the time of copying": 1.5}
OURS = """
import os, sys, time
from pathlib import Path
import torch
from clbench.merge.execute import Sources, merge_folder
from clbench.merge.plan import Action, MergePlan
from clbench.merge.tensors import open_source
begun = time.perf_counter()
tuned, base, out, s, hashed = sys.argv[1:]
sources = Sources(tuned=open_source(tuned), base=open_source(base))
merge_folder(MergePlan(Action("slerp", {"s": float(s)})), sources, Path(out), hash_inputs=hashed == "True")
print(time.perf_counter() - begun)
"""
COPY = """
import os, shutil, sys, time
from pathlib import Path
begun = time.perf_counter()
*folders, out = map(Path, sys.argv[1:])
for number, folder in enumerate(folders):
    (out / str(number)).mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        copied = shutil.copy(file, out / str(number) / file.name)
        handle = os.open(copied, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
print(time.perf_counter() - begun)
"""

# A process inherits the peak of the one that starts it, so a small one has to.
LAUNCH = """
import json, os, subprocess, sys, time
begun = time.perf_counter()
with open(sys.argv[1], "wb") as output:
    process = subprocess.Popen(sys.argv[2:], stdout=output, stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(process.pid, 0)
code = process.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps({"wall": time.perf_counter() - begun, "peak": usage.ru_maxrss, "code": code,
                  "cpu": usage.ru_utime + usage.ru_stime}))
"""


@dataclass(frozen=True)
class Size:
    """A Llama with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2, 512),
    "135m": Size(576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
    "1b": Size(2048, 8192, 16, 32, 8, 128256),  # Llama-3.2-1B
}


@dataclass(frozen=True)
class Turn:
    """One process."""

    wall_seconds: float
    work_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


# --- inputs -----------------------------------------------------------------------------------------------------------


def layout_of(size: Size) -> dict[str, TensorInfo]:
    """Return names and shapes as transformers saves them, in bf16."""
    narrow = size.hidden // size.heads * size.key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{norm}_layernorm.weight": (size.hidden,) for norm in ("input", "post_attention")}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (size.intermediate, size.hidden) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (size.hidden, size.intermediate)
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (narrow, size.hidden) for name in "kv"}
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (size.hidden, size.hidden) for name in "qo"}
    shapes["model.norm.weight"] = (size.hidden,)
    return {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}


def write_pair(size: Size, folder: Path) -> tuple[Path, Path]:
    """Write two random checkpoints at an angle of about 45 degrees, so that SLERP is SLERP; returns (tuned, base)."""
    layout, places = layout_of(size), (folder / "tuned", folder / "base")
    writers = []
    for place in places:
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config_of(size)))
        writers.append(ShardWriter(place, layout))
    generator = torch.Generator().manual_seed(0)
    for name in writers[0].order:
        base = torch.randn(layout[name].shape, generator=generator).mul_(0.02)
        tuned = torch.randn(layout[name].shape, generator=generator).mul_(0.02).add_(base)
        for writer, tensor in zip(writers, (tuned, base), strict=True):
            writer.write(name, tensor.bfloat16())
    for writer in writers:
        writer.close()
    return places


def config_of(size: Size) -> dict[str, Any]:
    """Return the configuration that mergekit reads names from."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


# --- turns ------------------------------------------------------------------------------------------------------------


def timed(command: Sequence[str], log: Path) -> Turn:
    """Run a process to its end and return what it took.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    launcher = [sys.executable, "-S", "-c", LAUNCH, str(log), *command]
    found = json.loads(subprocess.run(launcher, env=environment(), check=True, capture_output=True).stdout)
    text = log.read_text(errors="replace").strip()
    if found["code"]:
        raise RuntimeError(f"{command[0]} failed:\n{text[-2000:]}")
    last = text.splitlines()[-1] if text else ""
    work = float(last) if last.replace(".", "", 1).isdigit() else float("nan")
    return Turn(found["wall"], work, found["cpu"], found["peak"] * (1 if sys.platform == "darwin" else 1024))


def environment() -> dict[str, str]:
    """Return an environment without a network; threads are the caller's choice by OMP_NUM_THREADS."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}


def mergekit_config(tuned: Path, base: Path) -> str:
    """Return SLERP from tuned to base as mergekit has it; JSON is YAML."""
    models = [{"model": str(tuned)}, {"model": str(base)}]
    whole = {"merge_method": "slerp", "base_model": str(tuned), "models": models, "parameters": {"t": STRENGTH}}
    return json.dumps(whole | {"dtype": "bfloat16"})


def commands(tuned: Path, base: Path, folder: Path, hashed: bool) -> dict[str, list[str]]:
    """Return the command of each contestant; each writes to a folder of its name."""
    found = {
        "clbench": [
            sys.executable,
            "-c",
            OURS,
            str(tuned),
            str(base),
            str(folder / "clbench"),
            str(STRENGTH),
            str(hashed),
        ],
        "copy": [sys.executable, "-c", COPY, str(tuned), str(base), str(folder / "copy")],
    }
    if util.find_spec("mergekit"):
        (folder / "merge.yml").write_text(mergekit_config(tuned, base))
        start = "from mergekit.scripts.run_yaml import main; main()"  # what mergekit-yaml runs
        found["mergekit"] = [
            sys.executable,
            "-c",
            start,
            str(folder / "merge.yml"),
            str(folder / "mergekit"),
            "--no-copy-tokenizer",
        ]
    return found


def measure(runs: Mapping[str, list[str]], folder: Path, repeats: int) -> dict[str, list[Turn]]:
    """Let the contestants take turns; the results of the last round stay."""
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, command in runs.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            turn = timed(command, folder / f"{name}.log")
            if number:
                turns[name].append(turn)
            if name == "copy":
                shutil.rmtree(folder / name)
    return turns


def check_results(folder: Path) -> float:
    """Return the largest difference between our result and mergekit's, in steps of bf16 at that size.

    Raises:
        RuntimeError: they are not the same merge.
    """
    ours, theirs = open_source(folder / "clbench"), open_source(folder / "mergekit")
    names = ours.layout.keys() & theirs.layout.keys()
    if not names or len(names) != len(ours.layout):
        raise RuntimeError("the results have other tensors")
    worst = 0.0
    for name in names:
        a, b = ours.read(name).float(), theirs.read(name).float()
        step = torch.maximum(a.abs(), b.abs()) * 2**-7 + float(a.abs().max()) * 1e-6  # fp32 rounds, too
        worst = max(worst, float(((a - b).abs() / step).max()))
        ours.done(name)
        theirs.done(name)
    if worst > 1.01:
        raise RuntimeError(f"the results differ by {worst:.2f} steps of bf16")
    return worst


# --- output -----------------------------------------------------------------------------------------------------------


def summary(turns: Mapping[str, list[Turn]]) -> dict[str, Any]:
    """Return medians, and ours over the others."""
    medians = {
        name: {key: statistics.median(getattr(turn, key) for turn in found) for key in Turn.__dataclass_fields__}
        for name, found in turns.items()
    }
    ours, copy = medians["clbench"], medians["copy"]
    ratios = {"of the time of copying": ours["wall_seconds"] / copy["wall_seconds"]}
    ratios["of the time of copying, work alone"] = ours["work_seconds"] / copy["work_seconds"]
    if "mergekit" in medians:
        theirs = medians["mergekit"]
        ratios["times as fast as mergekit"] = theirs["wall_seconds"] / ours["wall_seconds"]
        ratios["of mergekit's peak memory"] = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    return {"medians": medians, "ratios": ratios}


def met(name: str, value: float) -> str:
    """Return whether a ratio is as expected."""
    limit = EXPECTED[name.partition(",")[0]]
    fine = value >= limit if name.startswith("times") else value <= limit
    return f"{'at least' if name.startswith('times') else 'at most'} {limit}: {'met' if fine else 'not met'}"


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(", ".join(f"{key} {value}" for key, value in found["facts"].items()))
    print(f"{'':10}{'wall s':>10}{'work s':>10}{'cpu s':>10}{'peak MB':>10}")
    for name, row in found["medians"].items():
        seconds = "".join(f"{row[f'{key}_seconds']:10.2f}" for key in ("wall", "work", "cpu"))
        print(f"{name:10}{seconds}{row['peak_memory_bytes'] / 1e6:10.0f}")
    for name, value in found["ratios"].items():
        print(f"clbench: {value:.2f} {name} ({met(name, value)})")
    if "mergekit" not in found["medians"]:
        print("mergekit: not installed, not measured")


def facts_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on."""
    installed = util.find_spec("mergekit") is not None
    layout = layout_of(SIZES[arguments.size])
    return {
        "size": arguments.size,
        "gigabytes_each": round(sum(info.n_bytes for info in layout.values()) / 1e9, 2),
        "type": CODES[torch.bfloat16],
        "n_cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mergekit": metadata.version("mergekit") if installed else None,
        "hash_inputs": not arguments.no_hash,
        "rounds": arguments.repeats,
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure what was asked for."""
    tuned, base = write_pair(SIZES[arguments.size], folder)
    turns = measure(commands(tuned, base, folder, not arguments.no_hash), folder, arguments.repeats)
    found = {"facts": facts_of(arguments), **summary(turns)}
    if "mergekit" in turns:
        found["largest_difference_in_bf16_steps"] = check_results(folder)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="135m", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    parser.add_argument("--no-hash", action="store_true", help="ours without digests of the inputs")
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder; the system's place by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    needed = 6 * sum(info.n_bytes for info in layout_of(SIZES[arguments.size]).values())
    if shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free < 1.2 * needed:
        print(f"error: needs {1.2 * needed / 1e9:.0f} GB of free disk; give --folder", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = run(arguments, Path(folder))
    print(json.dumps(found, indent=2)) if arguments.json else show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
