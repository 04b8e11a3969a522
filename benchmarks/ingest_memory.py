"""Memory and speed of taking in one's own documents: N GB of generated rows, read in a process of its own.

    python benchmarks/ingest_memory.py --gb 1 --format parquet
    python benchmarks/ingest_memory.py --gb 10 --format jsonl.gz --folder /big/disk

The rows are deterministic: texts of about 1 kB in words of Zipf frequency, dates over ten years in no order, a tenth of
the ids again in a later version. From ``--repeat`` MB on the texts come again under other ids and dates, so that making
10 GB takes less time than reading them (not with ``--build``, which would find duplicates). Peak memory is the largest
sum of resident memory over the process and its workers, sampled every 50 ms. ``--build`` builds the stream as well.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clbench.seeds import generator

ROWS = 16_384
WORDS = 30_000
WORDS_PER_ROW = 150
FIRST_SECOND, SECONDS = 1_262_304_000, 315_532_800  # 2010 to the end of 2019
SAMPLE_SECONDS = 0.05


def vocabulary() -> pa.Array:
    """Invented words, the short ones first."""
    numbers = generator(0, "ingest", "words")
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = np.clip(2 + np.arange(WORDS) // 2500, 2, 12)
    return pa.array(["".join(letters[numbers.integers(0, 26, n)]) for n in lengths])


def text_of(draw: np.random.Generator, words: pa.Array) -> pa.Array:
    """Return texts in words of Zipf frequency."""
    lengths = np.clip(draw.lognormal(np.log(WORDS_PER_ROW), 0.6, ROWS), 5, 5000).astype(np.int64)
    # The cube of a uniform number picks early words more often, as in language.
    chosen = (draw.random(int(lengths.sum())) ** 3 * WORDS).astype(np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, words.take(pa.array(chosen))), " ")


def tables(n_bytes: int, repeat_bytes: int) -> Iterator[pa.Table]:
    """Yield tables of rows until their texts have ``n_bytes``; after ``repeat_bytes`` the first texts come again."""
    words, done, first = vocabulary(), 0, 0
    texts: list[pa.Array] = []
    while done < n_bytes:
        draw = generator(0, "ingest", "rows", first)
        if done < repeat_bytes:
            texts.append(text_of(draw, words))
        text = texts[first // ROWS % len(texts)]
        ids = np.arange(first, first + ROWS)
        ids = np.where(draw.random(ROWS) < 0.1, ids // 2, ids)
        seconds = FIRST_SECOND + draw.integers(0, SECONDS, ROWS)
        date = pa.array(seconds).cast(pa.timestamp("s", tz="UTC"))
        names = ["url", "body", "created", "site"]
        site = pc.binary_join_element_wise("site", pa.array(ids % 50).cast(pa.string()), "-")
        url = pc.binary_join_element_wise("page", pa.array(ids).cast(pa.string()), "/")
        done += pc.sum(pc.binary_length(text)).as_py()
        first += ROWS
        yield pa.table([url, text, date, site], names=names)


def write(path: Path, n_bytes: int, repeat_bytes: int = 1 << 62) -> dict[str, int]:
    """Write the file; returns rows and bytes of text."""
    rows = n_text = 0
    if path.suffix == ".parquet":
        writer = None
        for table in tables(n_bytes, repeat_bytes):
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1)
            writer.write_table(table)
            rows, n_text = rows + table.num_rows, n_text + pc.sum(pc.binary_length(table["body"])).as_py()
        assert writer is not None
        writer.close()
        return {"rows": rows, "text_bytes": n_text}
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") if path.suffix == ".gz" else path.open("w") as file:
        for table in tables(n_bytes, repeat_bytes):
            dates = pc.strftime(table["created"], "%Y-%m-%dT%H:%M:%SZ")
            for row in table.set_column(2, "created", dates).to_pylist():
                file.write(json.dumps(row) + "\n")
            rows, n_text = rows + table.num_rows, n_text + pc.sum(pc.binary_length(table["body"])).as_py()
    return {"rows": rows, "text_bytes": n_text}


def child(path: str, every: str, *, build: bool) -> None:
    """What is measured: take the documents in, and build the stream if that is asked for."""
    from clbench.build import build_stream
    from clbench.streams.documents import Documents

    options = Documents.Options(path=path, text="body", date="created", id="url", group="site", every=every)
    source = Documents(options)
    times = {}
    start = time.perf_counter()
    source.settings()
    times["digest"] = time.perf_counter() - start
    source.fetch()
    times["ingest"] = time.perf_counter() - start
    if build:
        source.recipe = {"target": "documents", "options": vars(options), "overrides": {}}
        build_stream(source, progress=False)
        times["build"] = time.perf_counter() - start
    report = source.report()
    cpu = sum(os.times()[:4])
    print(json.dumps({"times": times, "cpu": cpu, "kept": report["kept"], "stages": len(report["stages"])}))


def measure(command: list[str], home: Path) -> dict[str, Any]:
    """Run a command; return what it printed and the largest memory of its processes together."""
    environment = os.environ | {"CLBENCH_HOME": str(home)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for one in [watched, *_children(watched)]:
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, total)
        time.sleep(SAMPLE_SECONDS)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(process.returncode)
    return {**json.loads(process.stdout.read()), "peak_memory_bytes": peak}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    """Make the input, measure, print one JSON object, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="of text")
    parser.add_argument("--format", choices=("parquet", "jsonl", "jsonl.gz"), default="parquet")
    parser.add_argument("--repeat", type=float, default=500.0, help="MB of text after which it comes again")
    parser.add_argument("--every", default="year")
    parser.add_argument("--build", action="store_true", help="build the stream too")
    parser.add_argument("--folder", type=Path, default=None, help="where the generated files may lie")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child, chosen.every, build=chosen.build)
        return
    place = Path(tempfile.mkdtemp(dir=chosen.folder, prefix="clbench-ingest-"))
    try:
        path = place / f"posts.{chosen.format}"
        made = write(path, int(chosen.gb * 1e9), 1 << 62 if chosen.build else int(chosen.repeat * 1e6))
        command = [sys.executable, __file__, "--child", str(path), "--every", chosen.every]
        found = measure([*command, *(["--build"] if chosen.build else [])], place / "home")
        seconds = found["times"]["ingest"] - found["times"]["digest"]
        print(
            json.dumps(
                {
                    "format": chosen.format,
                    **made,
                    "file_bytes": path.stat().st_size,
                    **found,
                    "ingest_text_mb_per_second": made["text_bytes"] / 1e6 / seconds,
                    "load_average": os.getloadavg()[0],
                },
                indent=2,
            )
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
