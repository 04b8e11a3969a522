from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import derive as engine
from clbench import files, registry
from clbench.derive import StreamTransform, Taken
from clbench.duplicates import estimated_jaccard, signatures_of
from clbench.errors import ClbenchError, ConfigError, NotFoundError
from clbench.files import sha256_bytes
from clbench.stream import Split, StageInfo, Stream, identity_of
from tests.derived_streams import Doc, derive, read, train_tokenizer, write_stream

LOREM = (
    "The handler of a request is called before the response of the server is read, and every header has a value of its "
    "own which the proxy keeps as it was until the connection is closed by one of both sides or the timer runs out."
)


class Hand(StreamTransform):
    """A transform whose choice a test writes by hand: (split, stage) -> Taken."""

    name = "hand"

    def __init__(self, choice: Mapping[tuple[Split, int], Taken]) -> None:
        super().__init__(self.Options(of="tinydocs"))
        self.choice = choice

    def stages(self) -> list[StageInfo]:
        n = 1 + max(stage for _, stage in self.choice)
        return [StageInfo(index=k, name=f"s{k}", start="2001-01-01", end="2009-12-31") for k in range(n)]

    def take(self, split: Split, stage: int) -> Taken:
        return self.choice[split, stage]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of tiny streams are written here; that files outlive a power cut is tested elsewhere."""
    monkeypatch.setattr(files, "fsync", lambda path: None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), [LOREM])


def two_stages(folder: Path, tokenizer: Path, **given: Any) -> Stream:
    """Pages a, b (train) and h, i (held-out); a and h come again changed, b unchanged; c and j are new."""
    first: dict[Split, list[Doc]] = {
        "train": [("a", "alpha one", "g"), ("b", "beta", "g")],
        "heldout": [("h", "eta one", "g"), ("i", "iota", "k")],
    }
    second: dict[Split, list[Doc]] = {
        "train": [("b", "beta", "g"), ("a", "alpha two", "g"), ("c", "gamma", "k")],
        "heldout": [("j", "jot", "k"), ("h", "eta two", "g")],
    }
    return write_stream(folder, [first, second], tokenizer, **given)


HELDOUT = {("heldout", 0): Taken.of(0, [0, 1])}


def texts(stream: Stream, split: Split) -> list[list[str]]:
    return [[document.text for document in stage] for stage in read(stream, split)]


# --- Taken


def test_taken_broadcasts_joins_and_selects() -> None:
    a, b = Taken.of(1, [4, 2]), Taken.of([0, 1, 0], [7, 8, 9], input=[1, 0, 1], n_tokens=5)
    joined = Taken.joined([a, b])
    assert len(joined) == 5 and len(Taken.joined([])) == 0
    assert [column.tolist() for column in (joined.input, joined.stage, joined.row, joined.n_tokens)] == [
        [0, 0, 1, 0, 1],
        [1, 1, 0, 1, 0],
        [4, 2, 7, 8, 9],
        [0, 0, 5, 5, 5],
    ]
    assert joined[joined.row > 7].row.tolist() == [8, 9] and joined[1:2].row.tolist() == [2]
    assert all(column.dtype == np.int64 for column in (a.input, a.stage, a.row, a.n_tokens))


# --- what is written


def test_documents_are_gathered_in_the_order_taken_with_their_tokens(tmp_path: Path, tokenizer: Path) -> None:
    stream = two_stages(tmp_path / "in", tokenizer, rows_per_part=1)
    choice = {("train", 0): Taken.of([1, 0, 1], [2, 1, 1]), ("train", 1): Taken.of([0, 1], [0, 0])}
    made = derive(Hand(choice | HELDOUT | {("heldout", 1): Taken.of(1, [1])}), [stream], tmp_path / "made")
    assert texts(made, "train") == [["gamma", "beta", "alpha two"], ["alpha one", "beta"]]
    assert texts(made, "heldout") == [["eta one", "iota"], ["eta two"]]
    tokens = {d.text: d.tokens for split in ("train", "heldout") for stage in read(stream, split) for d in stage}
    for stage in read(made, "train") + read(made, "heldout"):
        for document in stage:
            assert document.tokens == tokens[document.text] and document.tokens[-1] == made.eos_id
            assert document.n_tokens == len(document.tokens)
    assert made.manifest["tokenizer"]["sha256"] == stream.manifest["tokenizer"]["sha256"]
    assert made.manifest["stages"][0]["train"]["n_tokens"] == sum(
        len(tokens[t]) for t in ("gamma", "beta", "alpha two")
    )


def test_change_kinds_follow_the_new_order(tmp_path: Path, tokenizer: Path) -> None:
    stream = two_stages(tmp_path / "in", tokenizer)
    # alpha two, then alpha one and alpha two again: the last is known word for word, though not from the stage before.
    choice = {
        ("train", 0): Taken.of(1, [1, 2]),
        ("train", 1): Taken.of(0, [0, 1]),
        ("train", 2): Taken.of([1, 1, 1], [0, 1, 2]),
        ("heldout", 0): Taken.of(1, [1]),
        ("heldout", 1): Taken.of(0, [1]),
        ("heldout", 2): Taken.of(0, [0]),
    }
    made = derive(Hand(choice), [stream], tmp_path / "made")
    assert [[d.change for d in stage] for stage in read(made, "train")] == [
        ["new", "new"],
        ["changed", "new"],
        ["unchanged", "unchanged", "unchanged"],
    ]
    assert [[d.change for d in stage] for stage in read(made, "heldout")] == [["new"], ["new"], ["changed"]]
    assert made.manifest["stages"][1]["changes"]["train"] == {"new": 1, "changed": 1, "unchanged": 0}
    assert [s["train"]["repeated_from_earlier_stage"] for s in made.manifest["stages"]] == [0, 0, 3]


def test_versions_that_meet_in_a_stage_keep_their_identity_and_get_ids_of_their_own(
    tmp_path: Path, tokenizer: Path
) -> None:
    stream = two_stages(tmp_path / "in", tokenizer)
    choice = {("train", 0): Taken.of([0, 1, 0, 1], [0, 0, 1, 1]), ("heldout", 0): Taken.of([0, 1], [0, 1])}
    made = derive(Hand(choice), [stream], tmp_path / "made")
    assert [d.id for d in read(made, "train")[0]] == ["a", "b", "b@@2", "a@@2"]
    assert [d.id for d in read(made, "heldout")[0]] == ["h", "h@@2"]
    assert [identity_of(name) for name in ("a", "a@@2", "a@2", "x@@12")] == ["a", "a", "a@2", "x"]
    # A stream made of that one names versions anew: alone in its stage, the second is the page itself.
    choice = {("train", 0): Taken.of(0, [3]), ("train", 1): Taken.of(0, [0, 2]), ("heldout", 0): Taken.of(0, [1])}
    again = derive(Hand(choice | {("heldout", 1): Taken.of(0, [0])}), [made], tmp_path / "again")
    assert [[(d.id, d.text, d.change) for d in stage] for stage in read(again, "train")] == [
        [("a", "alpha two", "new")],
        [("a", "alpha one", "changed"), ("b", "beta", "new")],
    ]
    assert [[(d.id, d.change) for d in stage] for stage in read(again, "heldout")] == [
        [("h", "new")],
        [("h", "changed")],
    ]


@pytest.mark.parametrize("text", [LOREM, "naïve façade déjà vu", "日本語の文書です", "a🙂b🙂c🙂"])
def test_a_cut_document_has_exactly_its_tokens_and_the_text_they_stand_for(
    tmp_path: Path, tokenizer: Path, text: str
) -> None:
    stage: dict[Split, list[Doc]] = {"train": [("a", text, "g"), ("b", "whole", "g")], "heldout": [("h", "held", "g")]}
    stream = write_stream(tmp_path / "in", [stage], tokenizer)
    full = read(stream, "train")[0][0].tokens
    for n in {2, 3, 4, 5, len(full) - 1, len(full)}:
        choice = {("train", 0): Taken.of(0, [0, 1], n_tokens=[n, 0]), ("heldout", 0): Taken.of(0, [0])}
        made = derive(Hand(choice), [stream], tmp_path / f"made-{n}")
        document, whole = read(made, "train")[0]
        assert document.tokens == (full if n == len(full) else (*full[: n - 1], made.eos_id))
        assert whole.text == "whole" and whole.tokens == read(stream, "train")[0][1].tokens
        assert document.n_bytes == len(document.text.encode())
        assert document.sha256 == sha256_bytes(document.text.encode())
        assert made.counts("train", 0)["n_tokens"] == n + len(whole.tokens)
        # What the tokens stand for: as many whole characters as their bytes hold.
        from tokenizers import Tokenizer

        library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        longest = max(
            (text[:k] for k in range(len(text) + 1) if library.decode(full[: n - 1]).startswith(text[:k])), key=len
        )
        assert document.text == (longest or "\ufffd")


def test_a_cut_text_is_compared_as_it_is_cut(tmp_path: Path, tokenizer: Path) -> None:
    pages: list[dict[Split, list[Doc]]] = [
        {"train": [("a", LOREM + end, "g")], "heldout": [("h", f"held {end}", "g")]} for end in (" One.", " Two.")
    ]
    stream = write_stream(tmp_path / "in", pages, tokenizer)
    cut = {(0, 0): 20, (1, 1): 20, (2, 0): 0, (3, 1): 19}  # new stage and stage -> tokens
    choice: dict[tuple[Split, int], Taken] = {}
    for (new, stage), n in cut.items():
        choice |= {("train", new): Taken.of(stage, [0], n_tokens=n), ("heldout", new): Taken.of(0, [0])}
    made = derive(Hand(choice), [stream], tmp_path / "made")
    assert [stage[0].change for stage in read(made, "train")] == ["new", "unchanged", "changed", "changed"]
    assert len({stage[0].text for stage in read(made, "train")}) == 3


def test_extras_are_those_of_the_first_input(tmp_path: Path, tokenizer: Path) -> None:
    first = two_stages(tmp_path / "a", tokenizer, extras={"facts.json": b"{}"})
    second = two_stages(tmp_path / "b", tokenizer, extras={"other": b"x"})
    made = derive(Hand({("train", 0): Taken.of(0, [0]), **HELDOUT}), [first, second], tmp_path / "made")
    assert made.extra("facts.json") == b"{}" and "extras/other" not in made.manifest["files"]


def test_the_manifest_names_the_inputs_and_counts_what_was_left_out(tmp_path: Path, tokenizer: Path) -> None:
    stream = two_stages(tmp_path / "in", tokenizer)
    made = derive(Hand({("train", 0): Taken.of([0, 1], [1, 1]), **HELDOUT}), [stream], tmp_path / "made")
    lengths = {(d.id, k): len(d.tokens) for k, stage in enumerate(read(stream, "train")) for d in stage}
    heldout = sum(len(d.tokens) for d in read(stream, "heldout")[1])
    (entry,) = made.manifest["inputs"]
    assert (entry["name"], entry["sha256"]) == ("written", stream.sha256)
    assert entry["left_out"] == {
        "train": {"n_documents": 3, "n_tokens": lengths["a", 0] + lengths["b", 1] + lengths["c", 1]},
        "heldout": {"n_documents": 2, "n_tokens": heldout},
    }


def test_chunks_pieces_and_parts_do_not_change_the_content(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents: dict[Split, list[Doc]] = {
        "train": [(f"p{i}", f"page {i} " + "word " * (i % 7), f"g{i % 3}") for i in range(40)],
        "heldout": [(f"q{i}", f"other {i}", "g0") for i in range(9)],
    }
    one = write_stream(tmp_path / "one", [documents, documents], tokenizer)
    many = write_stream(tmp_path / "many", [documents, documents], tokenizer, rows_per_part=3)
    rows = np.random.default_rng(0).permutation(80)
    choice = {("train", 0): Taken.of(rows // 40, rows % 40), ("heldout", 0): Taken.of(1, [8, 0, 4])}
    whole = derive(Hand(choice), [one], tmp_path / "whole")
    monkeypatch.setattr(engine, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(engine, "BATCH_ROWS", 2)
    pieces = derive(Hand(choice), [many], tmp_path / "pieces")
    assert whole.sha256 == pieces.sha256
    n_tokens = whole.counts("train", 0)["n_tokens"]
    assert n_tokens / 100 <= len(pieces.document_files("train", 0)) < n_tokens / 50
    assert len(whole.document_files("train", 0)) == 1
    assert [d.id for d in read(pieces, "train")[0][:2]] == [f"p{i % 40}" for i in rows[:2]]


def test_documents_are_what_is_written(tmp_path: Path, tokenizer: Path) -> None:
    stream = two_stages(tmp_path / "in", tokenizer)
    transform = Hand({("train", 0): Taken.of([1, 0], [1, 0]), **HELDOUT})
    made = derive(transform, [stream], tmp_path / "made")
    written = [(d.id, d.text, d.date, d.group, d.change) for s in ("train", "heldout") for d in read(made, s)[0]]
    assert [(d.id, d.text, d.date, d.group, d.change) for d in transform.documents(0)] == written


# --- several inputs


def test_an_identity_that_is_held_out_in_one_input_trains_in_none(tmp_path: Path, tokenizer: Path) -> None:
    first = two_stages(tmp_path / "a", tokenizer)
    stage: dict[Split, list[Doc]] = {"train": [("h@@2", LOREM, "g"), ("z", "zeta", "g")], "heldout": [("y", "y", "g")]}
    second = write_stream(tmp_path / "b", [stage], tokenizer)
    choice = {
        ("train", 0): Taken.joined([Taken.of(0, [0, 1]), Taken.of(0, [0, 1], input=1)]),
        ("train", 1): Taken.of(0, [0, 1], input=1),
        ("heldout", 0): Taken.of(0, [1]),
        ("heldout", 1): Taken.of(0, [0]),  # h: held out only later, trained nowhere
    }
    made = derive(Hand(choice), [first, second], tmp_path / "made")
    assert texts(made, "train") == [["alpha one", "beta", "zeta"], ["zeta"]]
    assert [s["train"]["dropped_held_out_elsewhere"] for s in made.manifest["stages"]] == [1, 1]
    assert made.manifest["inputs"][1]["left_out"]["train"]["n_documents"] == 1


def test_copies_across_inputs_are_dropped_from_held_out(tmp_path: Path, tokenizer: Path) -> None:
    words = LOREM.split()
    near = " ".join(["Other", *words[1:]])
    far = " ".join(reversed(words))
    similar = estimated_jaccard(*signatures_of([LOREM, near]))
    assert 0.8 < similar < 1  # the planted pair is one that the builder would call near
    a: dict[Split, list[Doc]] = {"train": [("t", LOREM, "g")], "heldout": [("h", "held out", "g")]}
    b: dict[Split, list[Doc]] = {
        "train": [("u", "held out", "g")],  # the exact text of h, under another id
        "heldout": [("x", LOREM.upper(), "g"), ("n", near, "g"), ("f", far, "g")],
    }
    inputs = [write_stream(tmp_path / name, [stage], tokenizer, name=name) for name, stage in (("a", a), ("b", b))]
    choice = {
        ("train", 0): Taken.of(0, [0, 0], input=[0, 1]),
        ("heldout", 0): Taken.of(0, [0, 0, 1, 2], input=[0, 1, 1, 1]),
    }
    made = derive(Hand(choice), inputs, tmp_path / "made")
    assert texts(made, "heldout") == [[far]]
    counts = made.manifest["stages"][0]["heldout"]
    assert (counts["dropped_exact"], counts["dropped_near"]) == (2, 1)
    # The same held-out documents however little of the other input is taken: doses stay comparable.
    less = {("train", 0): Taken.of(0, [0]), ("heldout", 0): choice["heldout", 0]}
    assert texts(derive(Hand(less), inputs, tmp_path / "less"), "heldout") == [[far]]


def test_a_train_document_that_is_cut_to_a_held_out_text_drops_that_one(tmp_path: Path, tokenizer: Path) -> None:
    stage: dict[Split, list[Doc]] = {
        "train": [("t", LOREM + " And much more that was not there before.", "g")],
        "heldout": [("h", LOREM, "g"), ("i", "else", "g")],
    }
    stream = write_stream(tmp_path / "in", [stage], tokenizer)
    n = len(read(stream, "heldout")[0][0].tokens)
    choice = {("train", 0): Taken.of(0, [0], n_tokens=n), ("heldout", 0): Taken.of(0, [0, 1])}
    made = derive(Hand(choice), [stream], tmp_path / "made")
    assert texts(made, "train") == [[LOREM]] and texts(made, "heldout") == [["else"]]


def test_inputs_with_other_tokenizers_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    other = train_tokenizer(tmp_path / "tokenizer", ["entirely other words"] * 9, 280)
    inputs = [two_stages(tmp_path / "a", tokenizer), two_stages(tmp_path / "b", other, name="foreign")]
    with pytest.raises(
        ConfigError, match=r"'written' and 'foreign' have different tokenizers.*tokenizer: stream:written"
    ):
        Hand({}).open(inputs)


# --- refusals


@pytest.mark.parametrize(
    ("taken", "problem"),
    [
        (Taken.of(0, [0, 2]), "names rows 0 to 2 of 2"),
        (Taken.of(0, [-1]), "names rows -1 to -1 of 2"),
        (Taken.of(2, [0]), "no stage 2 of input 0"),
        (Taken.of(0, [0], input=1), "no stage 0 of input 1"),
        (Taken.of(0, [0, 1, 0]), "names a document twice"),
        (Taken.of(0, [0], n_tokens=1), "fewer than 2 tokens"),
        (Taken.of(0, [0], n_tokens=1000), "more than it has"),
        (Taken.of(0, []), "has no train documents"),
        (Taken(*(np.zeros(n, np.int64) for n in (1, 1, 2, 1))), "differ in length"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(tmp_path: Path, tokenizer: Path, taken: Taken, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        derive(Hand({("train", 0): taken, **HELDOUT}), [two_stages(tmp_path / "in", tokenizer)], tmp_path / "made")
    assert not (tmp_path / "made" / "out" / "manifest.json").exists()


def test_a_specification_cannot_split_a_transform_anew(tmp_path: Path, tinydocs: Stream) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("format: 1\nname: mine\nsource: shuffled\noptions: {of: tinydocs}\nheldout_fraction: 0.5\n")
    source = registry.make_stream_source(str(path))
    with pytest.raises(ConfigError, match=r"heldout_fraction cannot be set here.*specification of the input"):
        source.open([tinydocs])


def test_an_unknown_input_is_an_error_at_once() -> None:
    with pytest.raises(NotFoundError, match=r"unknown stream 'tinydogs'.*did you mean 'tinydocs'"):
        registry.make_stream_source("shuffled:of=tinydogs")
    with pytest.raises(ClbenchError, match="of: Field required"):
        registry.make_stream_source("shuffled")


# --- through the builder


def test_a_transform_is_built_by_name_and_composes(tmp_path: Path, tinydocs: Stream) -> None:
    from clbench.build import build_stream, stream_folder

    made = build_stream(registry.make_stream_source("reversed_time:of=shuffled:of=tinydocs"), progress=False)
    assert made.name == "tinydocs.shuffled.reversed-time"
    assert [info.name for info in made.stages()] == ["2001", "mix-3", "mix-2", "mix-1"]
    shuffled = build_stream(registry.make_stream_source("shuffled:of=tinydocs"), progress=False)
    assert [e["sha256"] for e in made.manifest["inputs"]] == [shuffled.sha256]
    assert [d.tokens for d in read(made, "train")[1]] == [d.tokens for d in read(shuffled, "train")[3]]
    made.check()
    # A specification that says the same gives the same content; another seed has another address.
    path = tmp_path / "mine.yaml"
    path.write_text("format: 1\nname: mine\nsource: reversed-time\noptions: {of: 'shuffled:of=tinydocs'}\n")
    assert build_stream(registry.make_stream_source(str(path)), progress=False).sha256 == made.sha256
    folders = {stream_folder(registry.make_stream_source(f"shuffled:of=tinydocs,seed={s}")) for s in (0, 1)}
    assert len(folders) == 2


def test_settings_come_back_from_json() -> None:
    settings = registry.make_stream_source("recurring:of=tinydocs,sequence=2002+2003+2002").settings()
    assert settings == json.loads(json.dumps(settings))
    assert settings["options"]["sequence"] == ["2002", "2003", "2002"] and settings["options"]["cycles"] == 2
