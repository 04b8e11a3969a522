"""How fast do documents become packed tokens, and how fast are packed tokens read back?

    python benchmarks/streams.py                       source files of this Python's standard library
    python benchmarks/streams.py --stream FOLDER       the documents of a built stream, for example codedocs-nano

The same documents, in the same Parquet files, go through

- ``datasets``: load, ``map`` (batched, fast tokenizer, an end-of-text token after each), ``save_to_disk``;
- ``datatrove``: ``ParquetReader`` and ``DocumentTokenizer`` (unshuffled, so that nothing is written twice). Skipped
  when it is missing: ``pip install "datatrove[processing]"``, in an environment of its own, as it brings much along;
- ``clbench``: encode and write tokens, as the two above; the builder's packing step, which besides writes the documents
  and digests of everything; and the whole build, which besides checks every document, splits and looks for duplicates.

Per core means one process with one thread; with several processes only the wall is shown. ``bare`` is
``Tokenizer.encode_batch`` on texts in memory, results thrown away. Runs are interleaved and repeated, medians are
reported; CPU seconds count child processes. *Fresh words* is text in which hardly a word comes twice, the worst case
for ``clbench.encoding``, which remembers words. Random reads are of training batches out of a file of random tokens.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}

import argparse
import importlib.util
import json
import platform
import resource
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench import packing, seeds
from clbench.encoding import encode_batches
from clbench.files import sha256_bytes
from clbench.stream import Document, StageInfo, Stream, StreamSource

N_FILES = 8
COLUMNS = ["id", "text", "date", "group", "change", "n_bytes", "sha256"]
BATCH = 1000
READ_TOKENS = 200_000_000


# --- the text -----------------------------------------------------------------------------------------------


def read_documents(arguments: argparse.Namespace) -> list[Document]:
    """Return documents up to the size that was asked for."""
    documents, left = [], arguments.megabytes * 1e6
    for document in _of_stream(Stream(arguments.stream)) if arguments.stream else _of_standard_library():
        documents.append(document)
        left -= len(document.text.encode())
        if left <= 0:
            break
    return documents


def _of_stream(stream: Stream) -> Iterator[Document]:
    for stage in stream.stages():
        for row in stream.documents("train", stage.index, ["id", "text"]).to_pylist():
            yield Document(
                id=f"{stage.index}/{row['id']}", text=row["text"], date="2000-01-01", group="all", change="new"
            )


def _of_standard_library() -> Iterator[Document]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text and "\ufffd" not in text:
            yield Document(
                id=str(path.relative_to(library)), text=text, date="2000-01-01", group="stdlib", change="new"
            )


def fresh_words(n_bytes: int, *, cyrillic: bool) -> list[str]:
    """Return texts of random words of 3 to 12 letters."""
    letters = np.array([*("абвгдежзийклмнопрстуфхцчшщ" if cyrillic else "abcdefghijklmnopqrstuvwxyz")])
    draw = seeds.generator(0, "fresh")
    texts = []
    while n_bytes > 0:
        words = ["".join(letters[draw.integers(0, 26, n)]) for n in draw.integers(3, 13, 300)]
        texts.append(" ".join(words))
        n_bytes -= len(texts[-1].encode())
    return texts


class Files(StreamSource):
    """The documents in Parquet files, a file a part: for the real builder."""

    def __init__(self, name: str, files: Sequence[Path], tokenizer: Path) -> None:
        super().__init__()
        self.name, self.files, self.tokenizer = name, files, str(tokenizer)
        self.heldout_fraction = 0.02

    def stages(self) -> list[StageInfo]:
        """Return one stage."""
        return [StageInfo(index=0, name="all", start="2000-01-01", end="2000-12-31")]

    def settings(self) -> dict[str, Any]:
        """Return a name: every build here is thrown away."""
        return {"name": self.name}

    def n_parts(self, stage: int) -> int:
        """Return the number of files."""
        return len(self.files)

    def part(self, stage: int, part: int) -> Iterator[Document]:
        """Yield the documents of one file."""
        import pyarrow.parquet as pq

        for row in pq.read_table(self.files[part], columns=COLUMNS[:5]).to_pylist():
            yield Document(**row)

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield all of them."""
        for i in range(len(self.files)):
            yield from self.part(stage, i)


def write_parquet(documents: list[Document], folder: Path) -> list[Path]:
    """Write the documents into N_FILES files of about equal size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    ends = np.cumsum([len(d.text) for d in documents])
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, N_FILES) / N_FILES)
    paths = []
    for i, rows in enumerate(np.split(np.arange(len(documents)), cuts)):
        columns = {n: [getattr(documents[r], n) for r in rows] for n in COLUMNS[:5]}
        texts = [text.encode() for text in columns["text"]]
        columns |= {"n_bytes": list(map(len, texts)), "sha256": list(map(sha256_bytes, texts))}
        paths.append(folder / f"{i}.parquet")
        pq.write_table(pa.table(columns), paths[-1], compression="zstd")
    return paths


# --- the contestants ----------------------------------------------------------------------------------------


class Contest:
    """One vocabulary: its tokenizer, the files, and every way from documents to packed tokens."""

    def __init__(self, documents: list[Document], files: list[Path], vocab_size: int, folder: Path) -> None:
        self.files, self.place, self.vocab_size = files, folder, vocab_size
        self.texts = [d.text for d in documents]
        self.tokenizer_folder = folder / f"tokenizer-{vocab_size}"
        packing.save_tokenizer(packing.train_tokenizer([self.texts], vocab_size), self.tokenizer_folder)
        self.tokenizer, self.facts = packing.open_tokenizer(self.tokenizer_folder, "trained here")
        self.n_built = 0

    def bare(self, texts: list[str] | None = None) -> None:
        """Encode and throw away."""
        texts = texts or self.texts
        for i in range(0, len(texts), BATCH):
            self.tokenizer.encode_batch(texts[i : i + BATCH], add_special_tokens=False)

    def encode(self, texts: list[str] | None = None) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Texts in memory to packed tokens in memory."""
        texts = texts or self.texts
        batches = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
        return list(encode_batches(self.tokenizer, batches, eos_id=self.facts.eos_id, dtype=self.facts.dtype))

    def tokens_only(self, out: Path) -> NDArray[Any]:
        """Parquet to a file of tokens and one of lengths."""
        import pyarrow.parquet as pq

        def batches() -> Iterator[list[str]]:
            for path in self.files:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=BATCH, columns=["text"]):
                        yield batch["text"].to_pylist()

        out.mkdir()
        with (out / "tokens.bin").open("wb") as tokens_file, (out / "lengths.bin").open("wb") as lengths_file:
            for tokens, lengths in encode_batches(
                self.tokenizer, batches(), eos_id=self.facts.eos_id, dtype=self.facts.dtype
            ):
                tokens_file.write(tokens.tobytes())
                lengths_file.write(lengths.tobytes())
        return np.fromfile(out / "tokens.bin", self.facts.dtype)

    def packing_step(self, out: Path) -> None:
        """Parquet to documents, tokens, offsets and digests, as the builder's workers do it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        writer = packing.PieceWriter(out / "pieces" / "0", self.facts.dtype)
        waiting: deque[pa.Table] = deque()

        def batches() -> Iterator[list[str]]:
            for path in self.files:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=BATCH, columns=COLUMNS):
                        waiting.append(pa.Table.from_batches([batch]))
                        yield batch["text"].to_pylist()

        for tokens, lengths in encode_batches(
            self.tokenizer, batches(), eos_id=self.facts.eos_id, dtype=self.facts.dtype
        ):
            writer.add(waiting.popleft(), tokens, lengths)
        writer.close()
        (out / "stream").mkdir()
        packing.join([out / "pieces" / "0"], out / "stream", split="train", stage=0, facts=self.facts)

    def build(self, out: Path, n_processes: int = 1) -> None:
        """Build a stream with the real builder."""
        from clbench.build import build_stream

        self.n_built += 1
        os.environ["CLBENCH_HOME"] = str(out)
        source = Files(f"bench-{self.vocab_size}-{self.n_built}", self.files, self.tokenizer_folder)
        build_stream(source, progress=False, n_workers=n_processes)

    def datasets(self, out: Path, n_processes: int = 1) -> int:
        """Load, map, save; returns the number of tokens."""
        import datasets
        import transformers

        datasets.disable_progress_bars()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.tokenizer_folder, model_max_length=1 << 40)
        eos = self.facts.eos_id

        def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
            return {"input_ids": [[*row, eos] for row in ids]}

        files = [str(path) for path in self.files]
        found = datasets.Dataset.from_parquet(files, cache_dir=str(out / "cache"))
        found = found.map(
            tokenise,
            batched=True,
            batch_size=BATCH,
            remove_columns=found.column_names,
            num_proc=n_processes if n_processes > 1 else None,
            load_from_cache_file=False,
            keep_in_memory=False,
        )
        found.save_to_disk(str(out / "saved"), num_proc=n_processes if n_processes > 1 else None)
        return sum(len(chunk.values) for chunk in found.data.column("input_ids").chunks)

    def datatrove(self, out: Path, n_processes: int = 1) -> int:
        """Run the tokenizer pipeline, a task a file; returns the number of tokens."""
        import loguru
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.readers import ParquetReader
        from datatrove.pipeline.tokens import DocumentTokenizer

        loguru.logger.remove()
        tokenise = DocumentTokenizer(
            str(out / "tokens"),
            tokenizer_name_or_path=str(self.tokenizer_folder / "tokenizer.json"),
            eos_token=packing.EOS,
            shuffle_documents=False,
        )
        executor = LocalPipelineExecutor(
            pipeline=[ParquetReader(str(self.files[0].parent)), tokenise],
            tasks=len(self.files) if n_processes > 1 else 1,
            workers=n_processes,
            logging_dir=str(out / "logs"),
        )
        executor.run()
        return sum(p.stat().st_size for p in (out / "tokens").glob("*.ds")) // np.dtype(self.facts.dtype).itemsize


# --- measuring ----------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Return the processor seconds of this process and of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Times:
    """Seconds on the wall and processor seconds of named runs."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.results: dict[str, Any] = {}

    def run(self, name: str, function: Callable[[], Any]) -> None:
        """Time one run."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        self.results[name] = function()
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(name, []).append(cpu_seconds() - cpu)

    def median(self, name: str, kind: str = "wall") -> float:
        """Return the median seconds of a name."""
        return statistics.median(getattr(self, kind)[name])


def in_new_folder(function: Callable[[Path], Any], root: Path) -> Any:
    """Call a function with a folder that is deleted afterwards."""
    out = Path(tempfile.mkdtemp(dir=root))
    shutil.rmtree(out)
    try:
        return function(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def compare(contest: Contest, arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Time every way with one vocabulary, per core and with all cores."""
    times, n = Times(), arguments.processes
    ways: dict[str, Callable[[Path], Any]] = {
        "bare encode_batch": lambda out: contest.bare(),
        "clbench, in memory": lambda out: contest.encode(),
        "clbench, tokens only": contest.tokens_only,
        "clbench, packing step": contest.packing_step,
        "clbench, whole build": contest.build,
        "datasets": contest.datasets,
    }
    if n > 1:
        ways[f"clbench, {n} processes"] = partial(contest.build, n_processes=n)
        ways[f"datasets, {n} processes"] = partial(contest.datasets, n_processes=n)
    if importlib.util.find_spec("datatrove") is None:
        print('datatrove is not installed, its part is skipped: pip install "datatrove[processing]"')
    else:
        ways["datatrove"] = contest.datatrove
        if n > 1:
            ways[f"datatrove, {n} processes"] = partial(contest.datatrove, n_processes=n)
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            times.run(name, lambda way=way: in_new_folder(way, root))
    expected = np.concatenate([tokens for tokens, _ in times.results["clbench, in memory"]])
    assert np.array_equal(expected, times.results["clbench, tokens only"])
    n_bytes = sum(len(text.encode()) for text in contest.texts)
    print(f"\nvocabulary {contest.vocab_size}: {len(expected):,} tokens")
    print_times(times, n_bytes, len(expected))
    for name in ways:
        if name.startswith("data") and times.results[name] != len(expected):
            print(f"{name} made {times.results[name]:,} tokens")
    return {
        "wall_s": times.wall,
        "cpu_s": times.cpu,
        "n_tokens": len(expected),
        "ratios": ratios(times),
        "worst_case": worst_case(contest, arguments),
    }


def print_times(times: Times, n_bytes: int, n_tokens: int) -> None:
    """Print a table."""
    print(f"{'':26}{'wall s':>8}{'spread':>16}{'CPU s':>8}{'MB/s':>8}{'M tokens/s':>12}   (per CPU second)")
    for name, walls in times.wall.items():
        wall, spread = times.median(name), f"{min(walls):.2f} to {max(walls):.2f}"
        seconds = wall if "processes" in name else times.median(name, "cpu")
        cpu = "" if "processes" in name else f"{seconds:.2f}"  # a pool's processor seconds are not all to be had
        print(f"{name:26}{wall:8.2f}{spread:>16}{cpu:>8}{n_bytes / seconds / 1e6:8.1f}{n_tokens / seconds / 1e6:12.2f}")


def ratios(times: Times) -> dict[str, float]:
    """Return how many times as fast as the others, per core, in CPU seconds; and print it."""
    others = [name for name in ("datasets", "datatrove") if name in times.cpu]
    found = {}
    for ours in ("clbench, tokens only", "clbench, packing step", "clbench, whole build"):
        if ours in times.cpu:
            for kind in ("cpu", "wall"):
                best = min(times.median(name, kind) for name in others)
                found[f"faster of datasets and datatrove / {ours}, {kind}"] = best / times.median(ours, kind)
    for ours in ("clbench, in memory", "clbench, tokens only"):
        for kind in ("cpu", "wall"):
            found[f"bare encode_batch / {ours}, {kind}"] = times.median("bare encode_batch", kind) / times.median(
                ours, kind
            )
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f}")
    return found


def worst_case(contest: Contest, arguments: argparse.Namespace) -> dict[str, float]:
    """Compare with the bare tokenizer on text that hardly repeats a word."""
    found = {}
    for name, cyrillic in (("fresh words", False), ("fresh Cyrillic words", True)):
        texts, times = fresh_words(int(arguments.megabytes * 1e6), cyrillic=cyrillic), Times()
        for _ in range(arguments.repeats):
            times.run("bare", lambda texts=texts: contest.bare(texts))
            times.run("ours", lambda texts=texts: contest.encode(texts))
        found[name] = times.median("bare", "cpu") / times.median("ours", "cpu")
        print(f"bare encode_batch / clbench, in memory, {name}, cpu: {found[name]:.2f}")
    return found


# --- random reads -------------------------------------------------------------------------------------------


class RandomTokens(Stream):
    """A stream of random tokens in one stage, with documents of 2 to 1500 tokens; only what an order reads is there."""

    def __init__(self, folder: Path, n_tokens: int) -> None:
        draw = seeds.generator(0, "tokens")
        self.folder, self.sha256 = folder, "random"
        draw.integers(0, 1 << 15, n_tokens, dtype=np.uint16).tofile(folder / "tokens.bin")
        lengths = np.exp(draw.normal(5.5, 1.0, n_tokens // 200)).clip(2, 1500).astype(np.int64)
        ends = np.cumsum(lengths)
        self._offsets = np.concatenate([[0], ends[ends < n_tokens], [n_tokens]])

    def tokens(self, split: str, stage: int) -> NDArray[Any]:
        """Return the tokens, memory-mapped."""
        return np.memmap(self.folder / "tokens.bin", dtype=np.uint16, mode="r")

    def offsets(self, split: str, stage: int) -> NDArray[np.int64]:
        """Return where documents start."""
        return self._offsets


def random_reads(folder: Path, n_tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return target tokens a second (one core) of training batches, by batching, row length and rows."""
    import torch

    from clbench.train.data import DataOrder
    from clbench.train.parallel import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    stream, device = RandomTokens(folder, n_tokens), torch.device("cpu")
    print(f"\nrandom batches out of {n_tokens:,} tokens: millions a CPU second (positions with padding in brackets)")
    found: dict[str, dict[str, float]] = {}
    for batching in ("packed", "rows"):
        for length in (256, 1024, 2048):
            for batch_rows in (8, 64, 256):
                order = DataOrder(
                    stream,
                    {0: 1.0},
                    n_tokens=n_tokens // 4,
                    length=length,
                    batch_rows=batch_rows,
                    seed=0,
                    stage=0,
                    batching=batching,
                )
                n_steps = min(order.n_steps - 1, max(4, 20_000_000 // (length * batch_rows)))
                rates = []
                for _ in range(repeats):
                    cpu, n_targets = time.process_time(), 0
                    for step in range(n_steps):
                        (batch,) = order.micro_batches(step, micro_rows=None, device=device)
                        n_targets += batch.n_targets
                    rates.append(n_targets / (time.process_time() - cpu))
                share = n_targets / (n_steps * batch_rows * length)
                name = f"{batching}, {length} x {batch_rows}"
                found[name] = {"targets": statistics.median(rates), "positions": statistics.median(rates) / share}
                print(f"{name:22}{found[name]['targets'] / 1e6:8.0f} ({found[name]['positions'] / 1e6:.0f})")
    return found


# --- main ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the comparison and print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", type=Path, help="folder of a built stream")
    parser.add_argument("--megabytes", type=float, default=15.0, help="text to use at most")
    parser.add_argument("--vocab-sizes", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--read-tokens", type=int, default=READ_TOKENS, help="0 leaves the random reads out")
    arguments = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    versions = {name: version_of(name) for name in ("tokenizers", "datasets", "transformers", "datatrove", "numpy")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    result: dict[str, Any] = {"versions": versions, "argv": sys.argv[1:]}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if arguments.vocab_sizes:
            documents = read_documents(arguments)
            files = write_parquet(documents, root / "documents")
            n_bytes = sum(len(d.text.encode()) for d in documents)
            print(f"{len(documents):,} documents, {n_bytes / 1e6:.1f} MB of text")
            for size in arguments.vocab_sizes:
                result[f"vocabulary {size}"] = compare(Contest(documents, files, size, root), arguments, root)
        if arguments.read_tokens:
            result["random reads"] = random_reads(root, arguments.read_tokens, arguments.repeats)
    print(json.dumps(result))


def version_of(package: str) -> str | None:
    """Return an installed version, None where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return what the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


if __name__ == "__main__":
    main()
