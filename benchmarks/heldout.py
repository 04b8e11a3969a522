"""How much faster is suite ``heldout`` than lm-eval's stock ``loglikelihood_rolling``?

    python benchmarks/heldout.py                       docstrings of this Python's standard library
    python benchmarks/heldout.py --stream FOLDER       a built stream, for example codedocs-nano

Same process, same documents, same model (a random Llama: speed does not depend on what it knows), float32 in
both. lm-eval is given every batch size in ``--batch-sizes`` and judged by its best. Runs are interleaved and
repeated, medians are reported: seconds on the wall and processor seconds of all threads. Both sides are timed
from documents to losses: lm-eval tokenises text, the suite reads packed tokens; neither loads the model.
"matrix products" is the time of the model's matrix multiplications alone, in the suite's batches: no float32
scorer that runs the model on every token can be faster.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "LMEVAL_LOG_LEVEL": "ERROR"}

import numpy as np

from clbench.stream import Document, StageInfo, Stream, StreamSource
from clbench.suite import Checkpoint

N_STAGES = 3


class StandardLibrary(StreamSource):
    """Docstrings of the standard library's modules, classes and functions, dealt to stages by module."""

    name = "stdlib-docstrings"
    heldout_fraction = 0.1

    def stages(self) -> list[StageInfo]:
        """Return stages that mean nothing: there is one Python here."""
        days = [f"2000-01-{1 + i:02d}" for i in range(N_STAGES)]
        return [StageInfo(index=i, name=day, start=day, end=day) for i, day in enumerate(days)]

    def settings(self) -> dict[str, Any]:
        """Return the version whose library is read."""
        return {"python": platform.python_version()}

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield docstrings; nothing is executed."""
        library = Path(sysconfig.get_path("stdlib"))
        modules = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts and "test" not in str(p))
        for path in modules[stage::N_STAGES]:
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for number, node in enumerate(ast.walk(tree)):
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                if text and len(text) >= 100:
                    name, day = f"{path.relative_to(library)}:{number}", self.stages()[stage].start
                    yield Document(id=name, text=text, date=day, group="stdlib", change="new")


class Sample(Stream):
    """Every k-th held-out document of a built stream, at most ``n`` a stage."""

    def __init__(self, folder: Path, n: int) -> None:
        super().__init__(folder)
        self.n = n

    def _chosen(self, stage: int) -> np.ndarray:
        count = len(super().offsets("heldout", stage)) - 1
        return np.arange(count)[:: -(-count // self.n)]

    def documents(self, split: Any, stage: int, columns: list[str] | None = None) -> Any:
        """Return the chosen documents."""
        return super().documents(split, stage, columns).take(self._chosen(stage))

    def tokens(self, split: Any, stage: int) -> Any:
        """Return the tokens of the chosen documents, packed again."""
        tokens, offsets = super().tokens(split, stage), super().offsets(split, stage)
        return np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in self._chosen(stage)])

    def offsets(self, split: Any, stage: int) -> Any:
        """Return where the chosen documents start."""
        return np.cumsum([0, *np.diff(super().offsets(split, stage))[self._chosen(stage)]])


def make_model(vocab_size: int, hidden: int, layers: int, context: int, eos_id: int) -> Any:
    """Return a random Llama with tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
    )
    return LlamaForCausalLM(config).eval()


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return a result, the seconds on the wall and the processor seconds it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Run the comparison and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", type=Path, help="folder of a built stream")
    parser.add_argument("--documents", type=int, default=100, help="held-out documents a stage")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--device", default="cpu", help="cpu, cuda …")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tokens-per-batch", type=int, nargs="+", default=[0], help="0 is the suite's own choice")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, open_stream(arguments, Path(folder)))


def open_stream(arguments: argparse.Namespace, folder: Path) -> Stream:
    """Return the stream that was asked for, or build the docstrings of the standard library."""
    if arguments.stream is not None:
        return Sample(arguments.stream, arguments.documents)
    from clbench.build import build_stream

    os.environ["CLBENCH_HOME"] = str(folder)
    source = StandardLibrary()
    source.heldout_max_documents = arguments.documents
    return build_stream(source, progress=False)


def compare(arguments: argparse.Namespace, stream: Stream) -> None:
    """Time both on one stream and print what came out."""
    import lm_eval
    import torch
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from clbench.eval.heldout import Heldout

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    model = make_model(stream.vocab_size, arguments.hidden, arguments.layers, arguments.context, stream.eos_id)
    model = model.to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stream.tokenizer_folder)
    texts = [t for s in stream.stages() for t in stream.documents("heldout", s.index, ["text"])["text"].to_pylist()]
    requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in texts]
    checkpoint = Checkpoint(model=model, weights_sha256="", device=device, autocast_dtype=None)

    def ours(size: int) -> Any:
        return Heldout(stream, Heldout.Options(tokens_per_batch=size or None)).measure(checkpoint)

    def stock(size: int) -> Any:
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=size,
            prefix_token_id=stream.eos_id,
            add_bos_token=False,
        )
        return lm.loglikelihood_rolling(requests, disable_tqdm=True)

    variants: dict[str, Callable[[], Any]] = {}
    for size in arguments.tokens_per_batch:
        variants[f"heldout{f', {size} tokens' if size else ''}"] = lambda size=size: ours(size)
    for size in arguments.batch_sizes:
        variants[f"lm-eval, batch {size}"] = lambda size=size: stock(size)

    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        ours(0)  # the first kernels are loaded outside the measurement
        stock(arguments.batch_sizes[-1])
    batches = batch_shapes(Heldout(stream), checkpoint)
    variants["matrix products"] = lambda: multiply(model, batches)

    walls: dict[str, list[float]] = {name: [] for name in variants}
    cpus: dict[str, list[float]] = {name: [] for name in variants}
    results = {}
    for _ in range(arguments.repeats):
        for name, run in variants.items():
            results[name], wall, cpu = timed(run)
            walls[name].append(wall)
            cpus[name].append(cpu)

    suite = Heldout(stream)
    corpus, windows = suite._prepare(checkpoint)
    rows = ours(0)
    n_tokens, n_windows = rows.n_tokens, len(windows.document)
    reference = -np.array(results[f"lm-eval, batch {arguments.batch_sizes[0]}"])
    wall_of = {name: statistics.median(v) for name, v in walls.items()}
    cpu_of = {name: statistics.median(v) for name, v in cpus.items()}
    our_name = min((n for n in variants if n.startswith("heldout")), key=wall_of.__getitem__)
    best_wall = min((n for n in variants if n.startswith("lm-eval")), key=wall_of.__getitem__)
    best_cpu = min((n for n in variants if n.startswith("lm-eval")), key=cpu_of.__getitem__)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    print(f"{name}, {arguments.threads} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"lm-eval {lm_eval.__version__}"
    )
    print(
        f"Llama, {sum(p.numel() for p in model.parameters()):,} parameters, width {arguments.hidden}, "
        f"{arguments.layers} layers, vocabulary {stream.vocab_size}, context {arguments.context}, float32"
    )
    distinct = int(windows.n_scored.sum())
    print(
        f"stream {stream.name}: {corpus.n_documents} documents, {n_tokens.sum():,} tokens, "
        f"median {np.median(n_tokens):.0f}, longest {n_tokens.max()}; {n_windows} windows, "
        f"{len(windows.tokens)} distinct with {distinct / n_tokens.sum():.0%} of the tokens"
    )
    print(f"\n{'':24}{'wall s':>9}{'CPU s':>9}{'wall us/token':>15}{'CPU us/token':>14}")
    for name in variants:
        per_token = 1e6 / n_tokens.sum()
        print(
            f"{name:24}{wall_of[name]:9.2f}{cpu_of[name]:9.2f}"
            f"{wall_of[name] * per_token:15.1f}{cpu_of[name] * per_token:14.1f}"
        )
    ratio = {"wall": wall_of[best_wall] / wall_of[our_name], "cpu": cpu_of[best_cpu] / cpu_of[our_name]}
    print(f"\nlm-eval at its best / heldout: {ratio['wall']:.2f} on the wall, {ratio['cpu']:.2f} in CPU seconds")
    floor = wall_of[best_wall] / wall_of["matrix products"], cpu_of[best_cpu] / cpu_of["matrix products"]
    print(f"lm-eval at its best / matrix products: {floor[0]:.2f} on the wall, {floor[1]:.2f} in CPU seconds")
    print(f"largest difference of a document's loss: {np.abs(rows.value - reference).max():.1e} nats")
    print(json.dumps({"wall_s": walls, "cpu_s": cpus, "ratio": ratio, "argv": sys.argv[1:]}))


def batch_shapes(suite: Any, checkpoint: Checkpoint) -> list[int]:
    """Return how many positions each batch of the suite has, padding included."""
    from clbench.eval import _forward

    _, windows = suite._prepare(checkpoint)
    found = _forward.batches(windows.n_input, _forward.TOKENS_PER_BATCH[checkpoint.device.type])
    return [len(b) * int(windows.n_input[b].max()) for b in found]


def multiply(model: Any, n_positions: list[int]) -> None:
    """Do the model's matrix products on as many rows, head included, and nothing else."""
    import torch

    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    on = weights[0].device
    inputs = {w.shape[1]: torch.randn(max(n_positions), w.shape[1], device=on) for w in weights}
    outputs = {w.shape[0]: torch.empty(max(n_positions), w.shape[0], device=on) for w in weights}
    with torch.inference_mode():
        for n in n_positions:
            for weight in weights:
                torch.mm(inputs[weight.shape[1]][:n], weight.T, out=outputs[weight.shape[0]][:n])
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def processor() -> str:
    """Return what the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


if __name__ == "__main__":
    main()
