"""Building with several processes, going on after a cut, caps per group, tokenizers of others, extra files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import build, registry, workers
from clbench.build import build_stream, stream_folder
from clbench.errors import ClbenchError, ConfigError, NeedError, NotFoundError
from clbench.parts import identity_hash
from clbench.stream import Stream
from clbench.streams.tinydocs import Tinydocs

ROOT = Path(__file__).resolve().parents[1]
PARTED = '''
"""Documents in parts; `slow` seconds are spent on each part, and every part that is read is noted in a file."""
import os, time
from dataclasses import dataclass
from pathlib import Path
from clbench.errors import IntegrityError
from clbench.stream import Document, StageInfo, StreamSource


class Parted(StreamSource):
    """Generated documents, some of them the same in several parts."""

    name = "parted"
    heldout_fraction = 0.25
    vocab_size = 300

    @dataclass(frozen=True, kw_only=True)
    class Options:
        parts: int = 4
        """Parts a stage."""
        slow: float = 0.0
        """Seconds a part."""
        fail: str = ""
        """How the last part fails: refuse, or die."""
        seed: int = 0
        """Another seed is another stream."""

    def stages(self):
        return [StageInfo(index=i, name=f"s{i}", start=f"201{i}-01-01", end=f"201{i}-12-31") for i in range(3)]

    def settings(self):
        return {"parts": self.options.parts, "seed": self.options.seed}

    def n_parts(self, stage):
        return self.options.parts

    def documents(self, stage):
        for part in range(self.options.parts):
            yield from self.part(stage, part)

    def part(self, stage, part):
        if log := os.environ.get("PARTED_LOG"):
            with Path(log).open("a") as file:
                file.write(f"{stage}-{part} {os.getpid()}\\n")
        time.sleep(self.options.slow)
        if self.options.fail and (stage, part) == (2, self.options.parts - 1):
            if self.options.fail == "die":
                os._exit(9)
            raise IntegrityError("the archive is damaged", where="x.tar.gz", mend="fetch it again")
        for i in range(30):
            mix = (part * 4 + stage) * 31 + i + self.options.seed * 977
            words = " ".join(f"w{pow(mix + 2, k + 2, 1009) % 97}" for k in range(40))
            yield Document(id=f"p{part}-{i}", text=words, date=f"201{stage}-05-01", group=f"g{part % 2}",
                           change="new" if stage == 0 else "changed")
'''


@pytest.fixture
def parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    (tmp_path / "parted.py").write_text(PARTED, encoding="utf-8")
    return str(tmp_path / "parted.py")


def read_parts(log: Path) -> list[tuple[str, str]]:
    return [(part, pid) for part, pid in (line.split() for line in log.read_text().splitlines())]


# --- several processes --------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_stream(
    parted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.0)
    found = {}
    for n in (1, 3):
        monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / f"home{n}"))
        monkeypatch.setenv("PARTED_LOG", str(tmp_path / f"log{n}"))
        stream = build_stream(registry.make_stream_source(parted), progress=False, n_workers=n)
        stream.check()
        found[n] = stream.sha256, stream.manifest["files"], stream.manifest["stages"]
        read = read_parts(tmp_path / f"log{n}")
        assert sorted(part for part, _ in read) == sorted(f"{s}-{p}" for s in range(3) for p in range(4))
        own = {pid for _, pid in read} == {str(os.getpid())}
        assert own == (n == 1), "with one worker all work is done here, with three elsewhere"
    assert found[1] == found[3]


def test_options_reach_the_workers(parted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.0)
    monkeypatch.setenv("PARTED_LOG", str(tmp_path / "log"))
    stream = build_stream(registry.make_stream_source(f"{parted}:parts=2,seed=5"), progress=False, n_workers=2)
    alone = registry.make_stream_source(f"{parted}:parts=2,seed=5")
    texts = {d.text for d in alone.documents(1)}
    built = [*stream.documents("train", 1)["text"].to_pylist(), *stream.documents("heldout", 1)["text"].to_pylist()]
    assert set(built) <= texts and len(built) > 40


@pytest.mark.parametrize(
    ("fail", "kind", "says"),
    [("refuse", "IntegrityError", "the archive is damaged.*fetch it again"), ("die", "ClbenchError", "worker process")],
)
def test_what_goes_wrong_in_a_worker_is_raised_here(
    parted: str, fail: str, kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.0)
    source = registry.make_stream_source(f"{parted}:fail={fail}")
    with pytest.raises(ClbenchError, match=says) as error:
        build_stream(source, progress=False, n_workers=2)
    assert type(error.value).__name__ == kind and "\n" not in str(error.value)
    assert not stream_folder(source).exists()


def test_a_worker_that_would_make_another_source_is_refused(parted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.0)
    source = registry.make_stream_source(parted)
    monkeypatch.setattr(source, "settings", lambda: {"changed": "after it was made"})
    with pytest.raises(ConfigError, match="another source from the same recipe"):
        build_stream(source, progress=False, n_workers=2)


def test_short_work_starts_no_process(parted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_Pool", lambda *_: pytest.fail("a worker was started"))
    build_stream(registry.make_stream_source(parted), progress=False, n_workers=8)


def test_the_number_of_workers_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_WORKERS", "5")
    assert workers.default_workers() == 5
    monkeypatch.setenv("CLBENCH_WORKERS", "many")
    assert 1 <= workers.default_workers() <= workers.MAX_WORKERS


# --- a cut --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_killed_build_goes_on_with_the_parts_that_were_read(
    n_workers: int, parted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    code = f"""
        from clbench import build, registry, workers
        workers.GRACE_SECONDS = 0.0
        build.build_stream(registry.make_stream_source({parted + ":slow=0.1"!r}), n_workers={n_workers})
    """
    environment = os.environ | {"PARTED_LOG": str(log)}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment) as process:
        end = time.monotonic() + 30
        while time.monotonic() < end and (not log.exists() or len(read_parts(log)) < 6):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = [part for part, _ in read_parts(log)]
    assert 6 <= len(before) < 12, "it was killed in the middle"
    time.sleep(0.3)  # orphaned workers have ended by then, see the next test
    log.unlink()
    monkeypatch.setenv("PARTED_LOG", str(log))
    # `slow` changes no document and stands in no setting: the same stream, so the same work folder.
    stream = build_stream(registry.make_stream_source(f"{parted}:slow=0"), progress=False, n_workers=1)
    again = [part for part, _ in read_parts(log)]
    assert len(again) <= 12 - 6 + n_workers, "only what was not finished is read again"
    assert not set(again) & set(before[: -2 * n_workers])
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "fresh"))
    assert build_stream(registry.make_stream_source(parted), progress=False).sha256 == stream.sha256
    assert not list(stream.folder.parent.glob(".*.building.tmp"))


def test_a_worker_ends_in_the_middle_of_its_task_when_its_parent_is_gone() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "clbench.workers", "time:sleep"], cwd=ROOT, stdin=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        worker.stdin.write("600\n")
        worker.stdin.close()
        assert worker.wait(timeout=30) == 0


def test_a_build_cut_while_tokenising_goes_on_there(
    parted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "PIECE_BYTES", 1)  # every part a piece
    real, packed = build._pack, list[str]()

    def pack(task: dict[str, Any]) -> None:
        if len(packed) == 5:
            raise KeyboardInterrupt
        packed.append(task["piece"])
        real(task)

    with monkeypatch.context() as patch:
        patch.setattr(build, "_pack", pack)
        with pytest.raises(KeyboardInterrupt):
            build_stream(registry.make_stream_source(parted), progress=False, n_workers=1)
    seen: list[str] = []
    monkeypatch.setattr(build, "_pack", lambda task: (seen.append(task["piece"]), real(task)))
    monkeypatch.setattr(build, "_read", lambda *_: pytest.fail("a part was read twice"))
    stream = build_stream(registry.make_stream_source(parted), progress=False, n_workers=1)
    assert len(packed) == 5 and len(seen) == 7 and not set(seen) & set(packed)
    monkeypatch.undo()
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "fresh"))
    whole = build_stream(registry.make_stream_source(parted), progress=False)
    assert whole.sha256 == stream.sha256
    assert len(stream.document_files("train", 0)) == 4 and len(whole.document_files("train", 0)) == 1
    assert stream.documents("train", 2).equals(whole.documents("train", 2))
    batches = list(stream.document_batches("train", 2, ["id"], n_rows=7))
    assert max(b.num_rows for b in batches) == 7
    assert [i for b in batches for i in b["id"].to_pylist()] == whole.documents("train", 2)["id"].to_pylist()


def test_an_identity_that_comes_in_two_parts_is_refused(parted: str) -> None:
    text = Path(parted).read_text(encoding="utf-8").replace('id=f"p{part}-{i}"', 'id=f"p{part % 2}-{i}"')
    Path(parted).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"document .p0-0. comes twice in one stage .*stage s0"):
        build_stream(registry.make_stream_source(parted), progress=False)


# --- what the builder is told -------------------------------------------------------------------------------


def test_the_cap_per_group_keeps_the_smallest_hashes_of_every_group(parted: str) -> None:
    source = registry.make_stream_source(parted)
    everything = build_stream(source, progress=False)
    capped = registry.make_stream_source(parted)
    capped.heldout_max_per_group, capped.heldout_max_documents = 4, 7
    stream = build_stream(capped, progress=False)
    assert stream.folder != everything.folder
    for stage in range(3):
        rows = everything.documents("heldout", stage, ["id", "group"]).to_pylist()
        by_hash = sorted(rows, key=lambda row: identity_hash(row["id"]))
        seen: Counter[str] = Counter()
        kept = []
        for row in by_hash:
            seen[row["group"]] += 1
            if seen[row["group"]] <= 4:
                kept.append(row["id"])
        wanted = set(kept[:7])
        assert len(rows) > 8 and len(wanted) == 7
        found = stream.documents("heldout", stage, ["id"])["id"].to_pylist()
        assert found == [row["id"] for row in rows if row["id"] in wanted], "in the source's order"
        assert stream.counts("heldout", stage)["dropped_over_cap"] == len(rows) - 7
        assert stream.counts("train", stage) == everything.counts("train", stage), "what is over the cap never trains"


def test_candidates_beyond_need_are_left_out_and_change_nothing(parted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clbench import splitting

    def build_with(n_candidates: int, per_kept: int) -> tuple[list[str], int]:
        monkeypatch.setattr(splitting, "CANDIDATES", n_candidates)
        monkeypatch.setattr(splitting, "CANDIDATES_PER_KEPT", per_kept)
        source = registry.make_stream_source(parted)
        source.heldout_max_documents = 3
        stream = build_stream(source, progress=False)
        manifest = stream.folder / "manifest.json"
        ids, counts = stream.documents("heldout", 1)["id"].to_pylist(), stream.counts("heldout", 1)
        manifest.unlink()
        return ids, counts["dropped_over_cap"] + counts["dropped_exact"] + counts["dropped_near"]

    assert build_with(10_000, 20) == build_with(0, 4)


def test_another_streams_tokenizer_is_used_as_it_is(parted: str, tmp_path: Path) -> None:
    source = registry.make_stream_source(parted)
    source.tokenizer = "stream:tinydocs"
    stream = build_stream(source, progress=False)
    lender = build_stream(Tinydocs(), progress=False)
    assert stream.manifest["tokenizer"]["sha256"] == lender.manifest["tokenizer"]["sha256"]
    assert (stream.vocab_size, stream.eos_id) == (lender.vocab_size, lender.eos_id)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (stream.tokenizer_folder / name).read_bytes() == (lender.tokenizer_folder / name).read_bytes()
    assert stream.folder != stream_folder(registry.make_stream_source(parted))
    by_folder = registry.make_stream_source(parted)
    by_folder.tokenizer = str(lender.tokenizer_folder)
    assert build_stream(by_folder, progress=False).sha256 == stream.sha256


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "neither `stream:NAME`, `model:NAME` nor a folder"),
        ({"tokenizer.json": "{"}, "not a tokenizer"),
        ({"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'}, "ends a text"),
    ],
)
def test_a_folder_that_holds_no_usable_tokenizer_is_refused(
    files: dict[str, str], says: str, parted: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tok"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    source = registry.make_stream_source(parted)
    source.tokenizer = str(folder)
    with pytest.raises(ClbenchError, match=says):
        build_stream(source, progress=False)


def test_a_tokenizer_of_others_may_name_its_end_of_text(parted: str, tmp_path: Path) -> None:
    folder = tmp_path / "tok"
    folder.mkdir()
    words = {f"w{i}": i for i in range(97)} | {"[UNK]": 97, "[END]": 98}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    template = {"truncation": {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}}
    content = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []} | template
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[END]"}}), encoding="utf-8")
    source = registry.make_stream_source(parted)
    source.tokenizer = str(folder)
    stream = build_stream(source, progress=False)
    text = stream.documents("train", 0)["text"][0].as_py()
    first = stream.tokens("train", 0)[: stream.offsets("train", 0)[1]].tolist()
    assert first == [words[word] for word in text.split()] + [98], "whole, whatever the file says about truncation"


def test_extra_files_are_kept_hashed_and_hidden_from_methods(parted: str) -> None:
    plain = build_stream(registry.make_stream_source(parted), progress=False)
    source = registry.make_stream_source(parted)
    source.extras = lambda: {"truth.json": b"[1]"}  # type: ignore[method-assign]
    source.vocab_size = 301
    stream = build_stream(source, progress=False)
    assert stream.extra("truth.json") == b"[1]"
    stream.check()
    source.extras = lambda: {"truth.json": b"[2]"}  # type: ignore[method-assign]
    (stream.folder / "manifest.json").unlink()
    assert build_stream(source, progress=False).sha256 != stream.sha256
    for name in ("other.json", "../manifest.json"):
        with pytest.raises(NotFoundError, match="holds no"):
            stream.extra(name)
    with pytest.raises(NeedError, match="tells what comes later"):
        stream.until(2).extra("truth.json")
    assert "extras/truth.json" not in plain.manifest["files"]


# --- the past -----------------------------------------------------------------------------------------------


def test_a_stream_as_of_a_stage_gives_nothing_later(tinydocs: Stream) -> None:
    past = tinydocs.until(1)
    assert [info.index for info in past.stages()] == [0, 1]
    assert np.array_equal(past.tokens("train", 1), tinydocs.tokens("train", 1))
    assert past.documents("heldout", 0).equals(tinydocs.documents("heldout", 0))
    for read in (past.tokens, past.offsets, past.counts, past.documents, past.document_files):
        for stage in (2, -1):
            with pytest.raises(NeedError, match="has not happened yet"):
                read("train", stage)
    with pytest.raises(NeedError):
        list(past.document_batches("train", 3))
    with pytest.raises(NeedError):
        past.until(2)
    assert past.until(0).stages() == tinydocs.stages()[:1]
