from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import portrait
from clbench.errors import IntegrityError
from clbench.portrait import Facts, Parameters, Portrait, kept_path, portrait_of
from clbench.stream import Stream
from tests.written_streams import Page, StagePages, write_stream

SMALL = Parameters(drift_tokens=4000, predicted_tokens=2000)


def sentence(draw: random.Random, topic: str, n: int) -> str:
    return " ".join(f"{topic}{int(200 * draw.random() ** 2)}x" for _ in range(n))


def pages(draw: random.Random, stage: int, topic: str, n: int, split: str) -> list[Page]:
    return [
        Page(
            id=f"{split}/{stage}/{i}",
            text=sentence(draw, topic, draw.randrange(20, 120)),
            date=f"{2020 + stage}-{i % 12 + 1:02d}-05",
            group=draw.choice(["alpha", "beta", f"only{stage}"]),
            change=draw.choice(["new", "changed", "unchanged"]),
        )
        for i in range(n)
    ]


def some_stages(seed: int = 0, topics: str = "aab") -> list[StagePages]:
    """Stages that write with the words of their topic; the first two have the same one."""
    draw = random.Random(seed)
    return [
        {split: pages(draw, i, topic, n, split) for split, n in (("train", 60), ("heldout", 20))}
        for i, topic in enumerate(topics)
    ]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    return write_stream(tmp_path / "stream", some_stages())


def figures(found: Portrait) -> dict[str, Any]:
    """Everything but how long it took."""
    return {key: value for key, value in found.as_dict().items() if key != "seconds"}


def test_counts_are_those_of_the_pages(stream: Stream) -> None:
    found = portrait_of(stream, SMALL)
    stages = some_stages()
    assert set(found.groups) == {"alpha", "beta", "only0", "only1", "only2"}
    for stage, shown in zip(stages, found.stages, strict=True):
        for split in ("train", "heldout"):
            check_facts(list(stage[split]), getattr(shown, split))


def check_facts(mine: list[Page], facts: Facts) -> None:
    lengths = [len(page.text.split()) + 1 for page in mine]
    assert (facts.n_documents, facts.n_tokens) == (len(mine), sum(lengths))
    assert facts.n_bytes == sum(len(page.text) for page in mine)
    assert facts.lengths["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.01)
    assert facts.lengths["p50"] == pytest.approx(float(np.median(lengths)))
    assert facts.lengths["max"] == max(lengths)
    assert facts.length_bins == [sum(2**k <= n < 2 ** (k + 1) for n in lengths) for k in range(len(facts.length_bins))]
    assert sum(facts.length_bins) == len(mine)
    for kind, counts in facts.changes.items():
        chosen = [n for page, n in zip(mine, lengths, strict=True) if page.change == kind]
        assert counts == {"documents": len(chosen), "tokens": sum(chosen)}
    for name, counts in facts.groups.items():
        chosen = [n for page, n in zip(mine, lengths, strict=True) if page.group == name]
        assert counts == {"documents": len(chosen), "tokens": sum(chosen)}
    assert facts.n_groups == len({page.group for page in mine})
    assert facts.months == Counter(page.date[:7] for page in mine)
    assert (facts.first_date, facts.last_date) == (min(p.date for p in mine), max(p.date for p in mine))


def test_stages_with_the_same_topic_are_as_close_as_halves_of_one(stream: Stream) -> None:
    drift = portrait_of(stream, SMALL).drift
    for split in ("train", "heldout"):
        js, above = drift.js[split], drift.js_above_floor[split]
        assert js[0][2] == js[2][0] == pytest.approx(1.0 - 0.5 * share_of_eos(drift.js_tokens[split]), abs=0.05)
        assert abs(above[0][1]) < 0.04 < above[0][2]
    bits = drift.bits_per_byte
    assert all(bits[i][i] is not None for i in range(3))
    assert bits[0][2] > 1.4 * bits[2][2] and bits[1][0] == pytest.approx(bits[0][0], rel=0.1)
    assert drift.unseen_words[1][2] == 1.0 and drift.unseen_words[2][2] < 0.1
    assert drift.model_tokens == SMALL.drift_tokens


def test_bits_per_byte_of_unigrams_are_the_closed_form(stream: Stream) -> None:
    found = portrait_of(stream, dataclasses.replace(SMALL, drift_tokens=10**6, predicted_tokens=10**6, order=1)).drift
    sizes = [len(stream.tokens("train", i)) for i in range(3)]
    small, v = int(np.argmin(sizes)), stream.vocab_size
    assert found.model_tokens == sizes[small]
    counts = Counter(stream.tokens("train", small).tolist())
    for j in range(3):
        p = [(counts[w] + len(counts) / v) / (sizes[small] + len(counts)) for w in stream.tokens("heldout", j).tolist()]
        expected = -sum(map(math.log2, p)) / stream.counts("heldout", j)["n_bytes"]
        assert found.bits_per_byte[small][j] == pytest.approx(expected, abs=1e-6)
        assert found.predicted_tokens[j] == len(p)


def share_of_eos(n_tokens: int) -> float:
    """End-of-text tokens are the only ones that two topics share; about one in 70."""
    return 2 / 70 if n_tokens else 0.0


def test_words_say_what_a_stage_is_about(stream: Stream) -> None:
    stages = portrait_of(stream, SMALL).stages
    assert stages[2].typical and all(word.startswith("b") for word in [*stages[2].typical, *stages[2].rising])
    assert stages[2].falling and all(word.startswith("a") for word in stages[2].falling)
    assert stages[0].rising == stages[0].falling == []


def test_planted_leaks_stand_in_the_row_and_column_where_they_were_planted(tmp_path: Path) -> None:
    stages = some_stages(topics="abc")
    draw = random.Random(9)
    train, heldout = [list(s["train"]) for s in stages], [list(s["heldout"]) for s in stages]
    long = sentence(draw, "q", 100)
    heldout[1][0] = Page(id="held", text=long)
    train[2][5] = Page(id="copy", text=long.upper().replace(" ", ",\n"))
    heldout[0][3] = Page(id="same", text=sentence(draw, "r", 50))
    train[0][7] = Page(id="same", text=sentence(draw, "s", 50))
    shared = sentence(draw, "t", 30)
    heldout[2][1] = Page(id="part", text=f"{shared} {sentence(draw, 'u', 70)}")
    train[1][1] = Page(id="whole", text=f"{sentence(draw, 'v', 200)} {shared}")
    train[2][6], train[2][7] = train[0][0], dataclasses.replace(train[2][5], id="twice")
    planted = [{"train": t, "heldout": h} for t, h in zip(train, heldout, strict=True)]
    found = portrait_of(write_stream(tmp_path / "planted", planted), SMALL)
    leakage = found.leakage
    assert leakage.exact == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert leakage.near == leakage.exact
    assert leakage.same_id == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert leakage.touched == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert leakage.covered[2][1] == pytest.approx(30 / leakage.n_words[2], abs=1e-6)
    assert leakage.anywhere["half"] == [0, 1, 0] and leakage.anywhere["touched"] == [0, 1, 1]
    assert leakage.n_documents == [20, 20, 20] and leakage.scanned_share == 1.0
    assert [s.repeats.exact for s in found.stages] == [0, 0, 1]
    assert [s.repeats.from_earlier_stages for s in found.stages] == [0, 0, 1]


def test_a_stream_that_the_builder_made_has_no_copies_of_held_out_in_train(tinydocs: Stream) -> None:
    found = portrait_of(tinydocs, SMALL)
    for kind in ("same_id", "exact", "near"):
        assert sum(found.leakage.anywhere[kind]) == 0
    for stage, shown in zip(tinydocs.manifest["stages"], found.stages, strict=True):
        assert shown.repeats.exact == stage["train"]["repeated_exact"]
        assert shown.repeats.from_earlier_stages == stage["train"]["repeated_from_earlier_stage"]
    bits = found.drift.bits_per_byte
    assert all(min(row[j] for row in bits) == bits[j][j] for j in range(len(bits)))


def test_the_same_content_gives_the_same_figures_however_it_lies_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = portrait_of(write_stream(tmp_path / "one", some_stages()), SMALL)
    monkeypatch.setattr(portrait, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(portrait, "_read", lambda path: None)
    other = portrait_of(write_stream(tmp_path / "other", some_stages(), n_parts=4), SMALL)
    assert figures(one) == figures(other)


def test_a_larger_sample_holds_the_smaller_one(stream: Stream) -> None:
    few, more = (
        portrait_of(stream, dataclasses.replace(SMALL, samples=k)).stages[0].samples for k in (3, 9)
    )  # fmt: skip
    assert more[:3] == few
    chances = [portrait.chance(sample.id) for sample in more]
    assert chances == sorted(chances)
    rest = {page.id for page in some_stages()[0]["train"]} - {sample.id for sample in more}
    assert max(chances) < min(map(portrait.chance, rest))


def test_samples_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portrait, "SAMPLE_CHARACTERS", 300)
    samples = portrait_of(write_stream(tmp_path / "s", some_stages()), SMALL).stages[0].samples
    texts = {page.id: page.text for page in some_stages()[0]["train"]}
    assert {sample.cut for sample in samples} == {True, False}
    for sample in samples:
        assert sample.text == texts[sample.id][:300] and sample.cut == (len(texts[sample.id]) > 300)


def test_a_large_stream_is_searched_by_a_sample_that_is_stated(stream: Stream) -> None:
    n_bytes = sum(stream.counts("train", i)["n_bytes"] for i in range(3))
    found = portrait_of(stream, dataclasses.replace(SMALL, scan_bytes=n_bytes // 2, heldout_documents=5))
    assert found.leakage.scanned_share == pytest.approx(0.5, abs=0.001)
    assert found.leakage.n_documents == [5, 5, 5]
    for stage, shown in zip(some_stages(), found.stages, strict=True):
        chosen = [page.id for page in stage["train"] if portrait.chance(page.id) < 0.5]
        assert shown.repeats.n_documents == pytest.approx(len(chosen), abs=1)
        assert {sample.id for sample in shown.samples} <= set(chosen)


def test_held_out_samples_stay_within_their_bytes(stream: Stream) -> None:
    found = portrait_of(stream, dataclasses.replace(SMALL, heldout_bytes=1000))
    assert all(1 <= n < 10 for n in found.leakage.n_documents)
    assert all(n * 4 <= 1000 for n in found.leakage.n_words)


def test_documents_are_read_in_batches_only(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Stream.document_batches
    rows_of_text: list[int] = []

    def watched(self: Stream, split: Any, stage: int, columns: Any = None, *, n_rows: int = 1024) -> Iterator[Any]:
        for batch in read(self, split, stage, columns, n_rows=n_rows):
            if "text" in columns:
                rows_of_text.append(len(batch))
            yield batch

    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("a whole stage was read")

    monkeypatch.setattr(portrait, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(Stream, "document_batches", watched)
    monkeypatch.setattr(Stream, "documents", refused)
    portrait_of(stream, SMALL)
    assert max(rows_of_text) == 16 and sum(rows_of_text) == 3 * 80


def test_groups_are_counted_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portrait, "MAX_GROUPS", 20)
    many = [Page(id=f"p{i}", text=f"word{i} and more", group=f"g{i:03d}") for i in range(100)]
    big = [Page(id=f"q{i}", text=" ".join(["long"] * 50), group="big") for i in range(3)]
    held = [Page(id="h1", text="held out"), Page(id="h2", text="held as well")]
    found = portrait_of(write_stream(tmp_path / "many", [{"train": [*many, *big], "heldout": held}]), SMALL)
    facts = found.stages[0].train
    assert facts.groups["big"] == {"documents": 3, "tokens": 153}
    assert sum(counts["tokens"] for counts in facts.groups.values()) == facts.n_tokens
    assert facts.n_groups <= 21


def test_tiny_stages_have_gaps_not_wrong_figures(tmp_path: Path) -> None:
    one = [Page(id="a", text="a single page")]
    found = portrait_of(write_stream(tmp_path / "tiny", [{"train": one, "heldout": [Page(id="b", text="other")]}]))
    assert found.drift.js["train"] == [[None]]
    assert found.drift.bits_per_byte[0][0] > 0
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_second_look_measures_nothing(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    first = portrait_of(stream, SMALL)
    kept = kept_path(stream, SMALL)
    assert kept.is_file() and kept_path(stream, Parameters()) != kept

    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(portrait, "_measure", refused)
        assert portrait_of(stream, SMALL) == first
    kept.write_text("{", encoding="utf-8")
    assert figures(portrait_of(stream, SMALL)) == figures(first)
    kept.write_text('{"name": "x"}', encoding="utf-8")
    assert figures(portrait_of(stream, SMALL)) == figures(first)


def test_a_cache_folder_that_cannot_be_written_does_not_matter(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "file"))
    assert portrait_of(stream, SMALL).name == "written"


def test_a_damaged_stream_is_named(stream: Stream) -> None:
    path = stream.document_files("train", 1)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(IntegrityError, match=r"cannot be read.*clbench prepare written"):
        portrait_of(stream, SMALL)
    path.unlink()
    with pytest.raises(IntegrityError, match="train of stage 1 has 0 documents, not 60"):
        portrait_of(stream, SMALL)


@pytest.mark.parametrize("name", ["train-01.bin", "train-01.offsets.npy"])
@pytest.mark.parametrize("cut", [True, False])
def test_damaged_tokens_are_named(stream: Stream, name: str, cut: bool) -> None:
    path = stream.folder / "tokens" / name
    if cut:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        portrait_of(stream, SMALL)


def test_a_stream_as_of_an_earlier_stage_has_a_portrait_of_its_own(stream: Stream) -> None:
    whole = portrait_of(stream, SMALL)
    past = portrait_of(stream.until(1), SMALL)
    assert (len(whole.stages), len(past.stages), len(past.drift.bits_per_byte)) == (3, 2, 2)
