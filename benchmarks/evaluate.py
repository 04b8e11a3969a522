"""How much faster is our scorer than lm-eval's stock ``HFLM``, and what is lost outside the model?

    python benchmarks/evaluate.py                                  a random tiny model on real question sets
    python benchmarks/evaluate.py --model smollm2-135m --questions 20 --documents 8
    python benchmarks/evaluate.py --matrix codedocs-nano           the 6 x 6 held-out matrix of a track, too

Same process, same model, same requests, float32 in both, turn by turn. Multiple choice: the requests that lm-eval
itself makes of the sets of suite ``general`` (``clbench prepare suite:general``), or of made-up questions with
``--sets made-up``. Rolling perplexity: held-out documents of ``--track``. lm-eval gets every batch size of
``--batch-sizes`` and is judged by its best; beside it stands batch 1, which is its default. Both sides are timed from
texts to log-likelihoods. CPU seconds are trustworthy on a busy machine and say nothing of several threads; wall
seconds (``--clock wall``) want a quiet one. "Outside" is the share of the time of a whole task (prompts,
tokens, scores, metrics, rows) that is not spent in the model or its head.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "LMEVAL_LOG_LEVEL": "ERROR"}

import numpy as np

from clbench import registry, seeds
from clbench.base import open_stream
from clbench.suite import Checkpoint


def make_checkpoint(name: str, device: str) -> tuple[Checkpoint, str]:
    """Return a prepared pretrained model, or a random Llama of 4 layers of 128 with the tokenizer of codedocs-nano."""
    import torch
    import transformers

    on = torch.device(device)
    if name != "tiny":
        from clbench.pretrained import open_model

        folder = open_model(name).folder
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(on)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            open_stream(registry.load_track("codedocs-nano")).tokenizer_folder
        )
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = transformers.LlamaForCausalLM(config).eval().to(on)
    n = sum(p.numel() for p in model.parameters())
    title = f"{name}, {n:,} parameters, vocabulary {model.config.vocab_size}, float32"
    return Checkpoint(
        model=model, weights_sha256="", device=on, autocast_dtype=None, tokenizer=tokenizer, tokenizer_sha256="-"
    ), title


def configuration(name: str, n: int, shots: int) -> dict[str, Any]:
    """Return a task of suite ``general``, or one of made-up questions of HellaSwag's lengths."""
    if name != "made-up":
        from clbench.eval import _sets

        asked, examples = _sets.open_set(name).apart(shots)
        return _sets.task_config(name, asked.chosen(n), examples)
    words = ["the", "of", "a", "to", "in", "is", "on", "by", "it", "or", "be", "at", "we", "if", "do", "no", "he", "up"]
    rng = seeds.generator(0, "benchmark", n)
    docs = [
        {"q": " ".join(rng.choice(words, 45)), "c": [" ".join(rng.choice(words, 25)) for _ in range(4)], "a": 0}
        for _ in range(n)
    ]
    return {
        "task": name,
        "docs": docs,
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "doc_to_choice": "{{c}}",
    }


def requests_of(config: dict[str, Any]) -> list[Any]:
    """Return the requests that lm-eval makes of a task."""
    from clbench.eval._lm_ready import ready
    from clbench.eval._tasks import as_task

    with ready():
        task = as_task(config)
        task.build_all_requests(rank=0, world_size=1)
    return list(task.instances)


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return a result, the seconds on the wall and the processor seconds it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


class InModel:
    """Seconds spent in a model's layers and its head: of the processor, or of a device until its work is done."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        model = checkpoint.model
        self.seconds, self.depth, self.start, self.device = 0.0, 0, 0.0, checkpoint.device
        self.parts = [model, model.base_model, model.get_output_embeddings()]

    def now(self) -> float:
        """Return seconds on the clock, after what the device has to do."""
        if self.device.type == "cpu":
            return time.process_time()
        import torch

        torch.accelerator.synchronize(self.device)  # a pass is only begun when it returns
        return time.perf_counter()

    def _enter(self, *_: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            self.start = self.now()

    def _leave(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += self.now() - self.start

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what happens inside; one thread only."""
        hooks = [p.register_forward_pre_hook(self._enter) for p in self.parts]
        hooks += [p.register_forward_hook(self._leave) for p in self.parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def compare(
    variants: dict[str, Callable[[], Any]], repeats: int, clock: str
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Run all variants in turn, ``repeats`` times; return their results, and seconds by the clock."""
    results: dict[str, Any] = {}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats):
        order = list(variants) if turn % 2 == 0 else list(variants)[::-1]
        for name in order:
            results[name], wall, seconds = timed(variants[name])
            taken[name].append(wall if clock == "wall" else seconds)
            print(f"  turn {turn}: {name}: {seconds:.2f} CPU s, {wall:.2f} s on the wall", file=sys.stderr)
    return results, taken


def report(title: str, taken: dict[str, list[float]], gap: float, clock: str) -> dict[str, Any]:
    """Print a table and return how often ours fit into lm-eval at its best and at batch 1: median turn, and range."""
    unit = "s on the wall" if clock == "wall" else "CPU s"
    print(f"\n### {title}\n\n| | {unit}, median | range |\n|---|---|---|")
    for name, values in taken.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |")
    stock = [name for name in taken if name.startswith("lm-eval")]
    best = min(stock, key=lambda name: statistics.median(taken[name]))
    found: dict[str, Any] = {"best": best, "clock": clock, "seconds": taken, "largest_gap_nats": gap, "ratio": {}}
    for name in [name for name in taken if name not in stock]:
        for other in dict.fromkeys([best, *(one for one in stock if one.endswith("batch 1"))]):
            ratios = [b / a for a, b in zip(taken[name], taken[other], strict=True)]
            found["ratio"][f"{other} / {name}"] = [statistics.median(ratios), min(ratios), max(ratios)]
            what = "lm-eval at its best" if other == best else "lm-eval at its default"
            print(f"\n{other} ({what}) / {name}: ", end="")
            print(f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"\nlargest difference of a log-likelihood: {gap:.1e} nats")
    return found


def count(arguments: argparse.Namespace, checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Print how many positions go through the layers and through the head: what no clock of a busy machine can say.

    lm-eval puts every position through the head, and computes continuations of one token of one context once.
    Operations are those of matrix products with weights: where these bound the time, their ratio bounds the gain.
    """
    import torch

    from clbench.eval import _forward, _scorer
    from clbench.eval._prefix import plan
    from clbench.eval._scorer import Question, encode_pairs

    requests = requests_of(configuration(name, arguments.questions, arguments.shots))
    encoded = encode_pairs(checkpoint.tokenizer, [request.args for request in requests])
    choices: dict[tuple[int, ...], list[list[int]]] = {}
    for one in encoded:
        choices.setdefault(tuple(one.context), []).append(one.continuation)
    rows = _scorer._laid_out([Question(c, some) for c, some in choices.items()], 1 << 20, packed=True)
    size = _forward.TOKENS_PER_BATCH["cpu"]
    groups = plan(rows.tokens, rows.n_context - 1)
    ours = sum(group.n_shared for group in groups)
    for group in groups:
        todo = _scorer._batches_of(rows, group, size, torch.device("cpu"))
        ours += sum(len(b) * (int(rows.n_input[b].max()) - group.n_shared) for b in todo)
    head = len(set(zip(rows.row.tolist(), rows.place.tolist(), strict=True)))
    lengths = sorted((len(ids) for ids in {tuple(e.context + e.continuation[:-1]) for e in encoded}), reverse=True)
    stock = {
        n: sum(len(lengths[i : i + n]) * lengths[i] for i in range(0, len(lengths), n)) for n in arguments.batch_sizes
    }
    least = min(stock.values())
    print(f"\n{name}, {arguments.questions} questions: ", end="")
    print(f"positions through the layers {ours:,}, through the head {head:,}; ", end="")
    print(f"lm-eval {least:,} through both: {least / ours:.2f} and {least / head:.1f} times as many; ", end="")
    in_head = checkpoint.model.get_output_embeddings().weight.numel()
    in_layers = sum(p.numel() for p in checkpoint.model.base_model.parameters() if p.ndim == 2)
    in_layers -= checkpoint.model.get_input_embeddings().weight.numel()
    ratio = least * (in_layers + in_head) / (ours * in_layers + head * in_head)
    print(f"{ratio:.2f} times the operations")
    return {"layers": ours, "head": head, "lm-eval": stock, "operations_ratio": ratio}


def multiple_choice(arguments: argparse.Namespace, checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Compare on one set of questions."""
    from lm_eval.models.huggingface import HFLM

    from clbench.eval._lm import ClbenchLM

    requests = requests_of(configuration(name, arguments.questions, arguments.shots))

    def stock(size: int) -> Any:
        lm = HFLM(pretrained=checkpoint.model, tokenizer=copy.deepcopy(checkpoint.tokenizer), batch_size=size)
        return lm.loglikelihood(requests, disable_tqdm=True)

    variants: dict[str, Callable[[], Any]] = {
        "packed": lambda: ClbenchLM(checkpoint).loglikelihood(requests),
        "one row a choice": lambda: ClbenchLM(checkpoint, packed=False).loglikelihood(requests),
    }
    for size in arguments.batch_sizes:
        variants[f"lm-eval, batch {size}"] = lambda size=size: stock(size)
    results, taken = compare(variants, arguments.repeats, arguments.clock)
    values = {n: np.array([v for v, _ in found]) for n, found in results.items()}
    gap = float(np.abs(values["packed"] - values[f"lm-eval, batch {arguments.batch_sizes[0]}"]).max())
    return report(f"{name}: {arguments.questions} questions, {len(requests)} requests", taken, gap, arguments.clock)


def rolling(arguments: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Compare on whole documents."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from clbench.eval._lm import ClbenchLM

    stream = open_stream(registry.load_track(arguments.track))
    texts = [t for s in stream.stages() for t in stream.documents("heldout", s.index, ["text"])["text"].to_pylist()]
    texts = texts[:: max(1, len(texts) // arguments.documents)][: arguments.documents]
    requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(t,), idx=0) for t in texts]

    def stock(size: int) -> Any:
        lm = HFLM(pretrained=checkpoint.model, tokenizer=copy.deepcopy(checkpoint.tokenizer), batch_size=size)
        return lm.loglikelihood_rolling(requests, disable_tqdm=True)

    variants: dict[str, Callable[[], Any]] = {"ours": lambda: ClbenchLM(checkpoint).loglikelihood_rolling(requests)}
    for size in arguments.batch_sizes:
        variants[f"lm-eval, batch {size}"] = lambda size=size: stock(size)
    results, taken = compare(variants, arguments.repeats, arguments.clock)
    gap = float(np.abs(np.array(results["ours"]) - results[f"lm-eval, batch {arguments.batch_sizes[0]}"]).max())
    return report(f"rolling: {len(texts)} documents of {arguments.track}", taken, gap, arguments.clock)


def outside(arguments: argparse.Namespace, checkpoint: Checkpoint, name: str) -> dict[str, float]:
    """Return the share of a whole task's time that is not spent in the model."""
    from clbench.eval._lm import ClbenchLM
    from clbench.eval._lm_ready import ready
    from clbench.eval._tasks import as_task, run_tasks

    with ready():
        task = as_task(configuration(name, arguments.questions, arguments.shots))
    lm, inside = ClbenchLM(checkpoint), InModel(checkpoint)
    run_tasks(lm, [task])
    with inside.counted():
        start = inside.now()
        run_tasks(lm, [task])
        seconds = inside.now() - start
    share = 1 - inside.seconds / seconds
    print(f"\n{name}, whole task: {seconds:.2f} s, of which **{share:.1%}** outside the model and its head")
    return {"seconds": seconds, "share": share}


def matrix(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the full held-out matrix of a track: as many models of its size as it has periods, all its documents."""
    import torch

    from clbench.eval.heldout import Heldout
    from clbench.train.models import make_model

    track = registry.load_track(arguments.matrix)
    stream = open_stream(track)
    suite, n = Heldout(stream), len(stream.stages())
    print(f"\n### {n} x {n} matrix of {arguments.matrix}, {torch.get_num_threads()} threads\n")
    walls, cpus = [], []
    for seed in range(n):
        model = make_model(track.model, vocab_size=stream.vocab_size, eos_id=stream.eos_id, seed=seed)
        checkpoint = Checkpoint(model=model, weights_sha256="", device=torch.device("cpu"), autocast_dtype=None)
        rows, wall, cpu = timed(lambda checkpoint=checkpoint: suite.measure(checkpoint))
        walls.append(wall)
        cpus.append(cpu)
    print(f"{rows.n_tokens.sum():,} tokens a row: {sum(walls):.1f} s on the wall, {sum(cpus):.1f} CPU s for {n} rows")
    return {"wall_s": walls, "cpu_s": cpus}


def main() -> None:
    """Run the comparisons; Markdown tables, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a prepared pretrained model")
    parser.add_argument(
        "--sets", nargs="*", default=["arc-easy", "hellaswag"], help="sets of suite general, or made-up"
    )
    parser.add_argument("--questions", type=int, default=100, help="of each set")
    parser.add_argument("--shots", type=int, default=0, help="worked examples before each question")
    parser.add_argument("--documents", type=int, default=40, help="whole texts; 0 leaves rolling perplexity out")
    parser.add_argument("--track", default="codedocs-nano", help="whose held-out documents are read")
    parser.add_argument("--matrix", help="a track whose full matrix is timed")
    parser.add_argument("--device", default="cpu", help="cpu, cuda …")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], help="what the tables count; cpu where --device is")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="of lm-eval")
    parser.add_argument("--count", action="store_true", help="count positions, time nothing")
    arguments = parser.parse_args()
    arguments.clock = arguments.clock or ("cpu" if arguments.device == "cpu" else "wall")

    import lm_eval
    import torch
    import transformers

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    checkpoint, title = make_checkpoint(arguments.model, arguments.device)
    print(
        f"{processor()}, {arguments.threads} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ", end=""
    )
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, ",
        end="",
    )
    print(f"lm-eval {lm_eval.__version__}\n\n{title}")
    found: dict[str, Any] = {"argv": sys.argv[1:]}
    for name in arguments.sets:
        found[f"{name}, positions"] = count(arguments, checkpoint, name)
        if arguments.count:
            continue
        found[name] = multiple_choice(arguments, checkpoint, name)
        found[f"{name}, outside"] = outside(arguments, checkpoint, name)
    if arguments.documents and not arguments.count:
        found["rolling"] = rolling(arguments, checkpoint)
    if arguments.matrix:
        found["matrix"] = matrix(arguments)
    print(f"\n{json.dumps(found)}")


def processor() -> str:
    """Return what the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


if __name__ == "__main__":
    main()
