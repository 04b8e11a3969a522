from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clbench import files, registry
from clbench.derive import StreamTransform
from clbench.errors import ConfigError
from clbench.stream import Split, Stream, identity_of
from clbench.streams._arrange import deal
from clbench.streams.gradual import shares
from tests.derived_streams import Doc, Read, derive, read, train_tokenizer, write_stream

SPLITS: tuple[Split, Split] = ("train", "heldout")
PROPERTY = settings(
    max_examples=2, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "shuffled": ("shuffled", {}),
    "shuffled, held-out kept": ("shuffled", {"heldout": "kept", "seed": 3}),
    "shuffled from stage 0": ("shuffled", {"first": 0}),
    "reversed": ("reversed-time", {}),
    "reversed from stage 0": ("reversed-time", {"first": 0}),
    "domains": ("domains", {"min_heldout": 1}),
    "domains at random": ("domains", {"min_heldout": 1, "by": "random", "first": 0}),
    "gradual": ("gradual", {}),
    "gradual in steps": ("gradual", {"steps": 2, "width": 3}),
    "recurring": ("recurring", {}),
    "recurring, repeated": ("recurring", {"repeat": True, "cycles": 3}),
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of tiny streams are written here; that files outlive a power cut is tested elsewhere."""
    monkeypatch.setattr(files, "fsync", lambda path: None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["page 1 version 2 alpha beta gamma delta"])


def make(shape: str, **options: Any) -> StreamTransform:
    cls = registry.load_class("streams", shape)
    made: StreamTransform = cls(cls.Options(of="tinydocs", **options))
    return made


def world(folder: Path, tokenizer: Path, n_stages: int, n_pages: int, seed: int) -> Stream:
    """Write pages that come, go and change: page p is held out if 3 divides p, and of group p modulo 2."""
    rng = np.random.default_rng(seed)
    version = np.zeros(n_pages, int)
    stages: list[dict[Split, list[Doc]]] = []
    for _ in range(n_stages):
        version += rng.random(n_pages) < 0.3
        present = rng.permutation([p for p in range(n_pages) if p < 12 or rng.random() < 0.5]).tolist()
        stage: dict[Split, list[Doc]] = {"train": [], "heldout": []}
        for p in present:
            words = np.random.default_rng([p, int(version[p])]).choice(["alpha", "beta", "gamma", "delta"], 1 + p % 9)
            text = f"page {p} version {version[p]} " + " ".join(words)
            stage["train" if p % 3 else "heldout"].append((f"p{p}", text, f"group-{p % 2}"))
        stages.append(stage)
    return write_stream(folder, stages, tokenizer)


def even(folder: Path, tokenizer: Path, n_stages: int, n_documents: int) -> Stream:
    """Write stages of equally long documents; every tenth is held out."""
    stages: list[dict[Split, list[Doc]]] = []
    for k in range(n_stages):
        texts = [(f"{k}/{i:03d}", f"{k}{i:03d}", f"g{i // 10 % 4}") for i in range(n_documents)]  # digits: no merges
        stages.append(
            {"train": [t for t in texts if t[0][-1] != "0"], "heldout": [t for t in texts if t[0][-1] == "0"]}
        )
    return write_stream(folder, stages, tokenizer)


def flat(stages: list[list[Read]]) -> list[Read]:
    return [document for stage in stages for document in stage]


def names(stream: Stream) -> list[str]:
    return [info.name for info in stream.stages()]


def change_by_brute_force(stages: list[list[Read]]) -> list[list[str]]:
    """Look through all earlier stages for every single document."""
    found = []
    for k, stage in enumerate(stages):
        before = [(identity_of(d.id), d.text) for d in flat(stages[:k])]
        kinds = []
        for document in stage:
            versions = [text for identity, text in before if identity == identity_of(document.id)]
            kinds.append("unchanged" if document.text in versions else "changed" if versions else "new")
        found.append(kinds)
    return found


def assert_guarantees(source: Stream, made: Stream, *, again: dict[Split, bool]) -> None:
    """What no shape may break; ``again``: documents of a split may stand in several new stages."""
    made.check()
    before, after = {s: read(source, s) for s in SPLITS}, {s: read(made, s) for s in SPLITS}
    sides = [{identity_of(document.id) for document in flat(after[s])} for s in SPLITS]
    assert not sides[0] & sides[1]
    tokens = {(s, d.sha256): d.tokens for s in SPLITS for d in flat(before[s])}
    for split in SPLITS:
        old = Counter((identity_of(d.id), d.sha256, d.text, d.date, d.group) for d in flat(before[split]))
        new = Counter((identity_of(d.id), d.sha256, d.text, d.date, d.group) for d in flat(after[split]))
        assert set(new) == set(old)
        assert again[split] or new == old
        if not again[split]:
            n_tokens = [sum(m.counts(split, k)["n_tokens"] for k in range(len(m.stages()))) for m in (source, made)]
            assert n_tokens[0] == n_tokens[1]
        for k, stage in enumerate(after[split]):
            assert all(d.tokens == tokens[split, d.sha256] for d in stage)
            assert len({d.id for d in stage}) == len(stage)  # results know a document by its stage and id
            assert made.counts(split, k)["n_documents"] == len(stage)
            assert made.counts(split, k)["n_tokens"] == sum(len(d.tokens) for d in stage)
            assert made.counts(split, k)["n_bytes"] == sum(d.n_bytes for d in stage)
            info = made.stages()[k]
            assert all(info.start <= d.date <= info.end for d in stage)
        assert [[d.change for d in stage] for stage in after[split]] == change_by_brute_force(after[split])


@pytest.mark.parametrize("shape", SHAPES)
@PROPERTY
@given(n_stages=st.integers(3, 5), n_pages=st.integers(12, 40), seed=st.integers(0, 99))
def test_every_shape_keeps_the_guarantees(tokenizer: Path, shape: str, n_stages: int, n_pages: int, seed: int) -> None:
    name, options = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        source = world(Path(folder) / "in", tokenizer, n_stages, n_pages, seed)
        made = derive(make(name, **options), [source], Path(folder) / "made")
        again: dict[Split, bool] = {"train": "repeat" in options, "heldout": name == "recurring"}
        assert_guarantees(source, made, again=again)
        if options.get("first", 1):
            for split in SPLITS:
                assert source.tokens(split, 0).tobytes() == made.tokens(split, 0).tobytes()
            assert names(made)[0] == names(source)[0]
        # Equal stages 0 share a base: it is trained once, in one order.
        same = made.manifest["contents"][0]["train"] == source.manifest["contents"][0]["train"]
        assert made.base_sha256 == (source.sha256 if same else made.sha256)
        assert same or not options.get("first", 1)


@PROPERTY
@given(seed=st.integers(0, 99), order=st.permutations(["shuffled", "reversed-time", "gradual"]))
def test_shapes_of_shapes_keep_them_too(tokenizer: Path, seed: int, order: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = made = world(Path(folder) / "in", tokenizer, 4, 20, seed)
        for name in order:
            made = derive(make(name), [made], Path(folder) / name)
        assert_guarantees(source, made, again={"train": False, "heldout": False})


@pytest.mark.parametrize(
    ("name", "options"),
    [("shuffled", {}), ("gradual", {}), ("recurring", {}), ("domains", {"by": "random", "min_heldout": 1})],
)
def test_the_seed_decides_the_content(tmp_path: Path, tokenizer: Path, name: str, options: dict[str, Any]) -> None:
    source = even(tmp_path / "in", tokenizer, 3, 60)
    made = [
        derive(make(name, seed=seed, **options), [source], tmp_path / str(i)).sha256 for i, seed in enumerate((5, 5, 6))
    ]
    assert made[0] == made[1] != made[2]


# --- dealing


@pytest.mark.parametrize("parts", [(1.0, 1.0), (3.0, 1.0, 2.0), (0.25, 0.5, 0.0, 0.25)])
def test_documents_are_cut_where_the_target_is_nearest(parts: tuple[float, ...]) -> None:
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 50, 100)
        sums = [int(lengths[:i].sum()) for i in range(101)]
        cuts = deal(lengths, parts)
        assert cuts[0] == 0 and cuts[-1] == 100 and len(cuts) == len(parts) + 1
        for i, cut in enumerate(cuts[1:-1]):
            target = sums[-1] * sum(parts[: i + 1]) / sum(parts)
            assert abs(sums[cut] - target) == min(abs(total - target) for total in sums)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    parts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
)
def test_no_part_is_empty_while_there_are_documents(lengths: list[int], parts: list[int]) -> None:
    cuts = deal(np.array(lengths), [float(part) for part in parts])
    assert cuts[0] == 0 and cuts[-1] == len(lengths) and cuts == sorted(cuts)
    sizes = [b - a for a, b in pairwise(cuts)]
    if len(lengths) >= sum(part > 0 for part in parts):
        assert all(size > 0 for size, part in zip(sizes, parts, strict=True) if part)


def test_a_part_that_is_smaller_than_a_document_still_gets_one() -> None:
    assert deal(np.array([100, 1, 1, 100]), [1.0, 200.0, 1.0]) == [0, 1, 3, 4]
    assert deal(np.array([5, 5]), [1.0, 0.0, 1.0]) == [0, 1, 1, 2]


# --- shuffled


def mixing(source: Stream, made: Stream) -> np.ndarray:
    """Return how many train documents of each period (rows) are in each stage (columns), stage 0 left out."""
    dates = [[int(d.date[:4]) - 2001 for d in stage] for stage in read(made, "train")]
    counts = [np.bincount(years, minlength=len(source.stages())) for years in dates]
    return np.stack(counts, axis=1)[1:, 1:]


def chi_square(table: np.ndarray) -> float:
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


def test_a_shuffled_stream_mixes_periods_evenly(tmp_path: Path, tokenizer: Path) -> None:
    source = even(tmp_path / "in", tokenizer, 6, 200)
    tables = [mixing(source, derive(make("shuffled", seed=s), [source], tmp_path / str(s))) for s in range(3)]
    # 5 x 5 table with both margins given: 16 degrees of freedom, exceeded once in 1,000 at 39.25 and at 3.94 below.
    assert all(3.94 < chi_square(table) < 39.25 for table in tables)
    assert all((table.sum(axis=0) == 180).all() and (table.sum(axis=1) == 180).all() for table in tables)
    gradual = mixing(source, derive(make("gradual"), [source], tmp_path / "gradual"))
    assert chi_square(gradual) > 500  # the same test sees what is not shuffled


def test_a_shuffled_stage_keeps_its_tokens_to_within_a_document(tmp_path: Path, tokenizer: Path) -> None:
    source = world(tmp_path / "in", tokenizer, 5, 60, 7)
    made = derive(make("shuffled"), [source], tmp_path / "made")
    for split in SPLITS:
        longest = max(len(d.tokens) for d in flat(read(source, split)))
        for k in range(5):
            assert abs(made.counts(split, k)["n_tokens"] - source.counts(split, k)["n_tokens"]) <= longest
    assert names(made) == ["2001", "mix-1", "mix-2", "mix-3", "mix-4"]
    assert {(i.start, i.end) for i in made.stages()[1:]} == {("2002-01-01", "2005-12-31")}


def test_held_out_documents_can_stay_in_their_periods(tmp_path: Path, tokenizer: Path) -> None:
    source = world(tmp_path / "in", tokenizer, 4, 30, 1)
    made = derive(make("shuffled", heldout="kept"), [source], tmp_path / "made")
    assert [[d.tokens for d in s] for s in read(made, "heldout")] == [
        [d.tokens for d in s] for s in read(source, "heldout")
    ]
    assert names(made) == names(source)
    assert {d.date[:4] for d in read(made, "train")[1]} == {"2002", "2003", "2004"}


# --- reversed


def test_reversed_time_goes_backwards(tmp_path: Path, tokenizer: Path) -> None:
    source = world(tmp_path / "in", tokenizer, 4, 20, 2)
    for first, order in ((1, [0, 3, 2, 1]), (0, [3, 2, 1, 0]), (3, [0, 1, 2, 3])):
        made = derive(make("reversed-time", first=first), [source], tmp_path / f"first-{first}")
        for k, period in enumerate(order):
            assert source.tokens("train", period).tobytes() == made.tokens("train", k).tobytes()
        infos = [(i.name, i.start, i.end) for i in source.stages()]
        assert [(i.name, i.start, i.end) for i in made.stages()] == [infos[period] for period in order]


def test_first_must_be_a_stage(tmp_path: Path, tokenizer: Path) -> None:
    source = world(tmp_path / "in", tokenizer, 3, 12, 0)
    for first in (-1, 3):
        with pytest.raises(ConfigError, match=f"first={first}, but written has stages 0 to 2"):
            derive(make("shuffled", first=first), [source], tmp_path / f"made{first}")


# --- domains


def groups(folder: Path, tokenizer: Path) -> Stream:
    """Three periods of groups big (8 of train), mid (4), low (2) and, never held out, odd (1)."""
    sizes = {"big": 8, "mid": 4, "low": 2, "odd": 1}
    stages: list[dict[Split, list[Doc]]] = []
    for k in range(3):
        train = [(f"{g}{k}{i}", f"{g} {k} {i} alpha", g) for g, n in sizes.items() for i in range(n)]
        stages.append({"train": train, "heldout": [(f"{g}h{k}", f"{g} {k} held", g) for g in ("mid", "low", "big")]})
    return write_stream(folder, stages, tokenizer)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_heldout": 1}, ["big", "mid", "low", "rest"]),
        ({"min_heldout": 1, "by": "name"}, ["big", "low", "mid", "rest"]),
        ({"min_heldout": 1, "min_share": 0.2}, ["big", "mid", "rest"]),
        ({"min_heldout": 3}, ["rest"]),
        ({"order": ("low", "big&odd"), "rest": "left_out"}, ["low", "big&odd"]),
        ({"order": ("odd&mid",)}, ["odd&mid", "rest"]),
    ],
)
def test_a_stage_holds_one_domain(
    tmp_path: Path, tokenizer: Path, options: dict[str, Any], expected: list[str]
) -> None:
    source = groups(tmp_path / "in", tokenizer)
    if expected[-1] == "rest" and "odd" in options.get("order", ("odd",)) and len(expected) == 4:
        with pytest.raises(ConfigError, match=r"the rest \(odd\) has no train or no held-out.*rest=left_out"):
            derive(make("domains", **options), [source], tmp_path / "refused")
        options, expected = options | {"rest": "left_out"}, expected[:-1]
    made = derive(make("domains", **options), [source], tmp_path / "made")
    assert names(made) == ["2001", *expected]
    for split in SPLITS:
        own = {g for name in expected if name != "rest" for g in name.split("&")}
        for name, stage in zip(expected, read(made, split)[1:], strict=True):
            wanted = [
                d.text
                for period in read(source, split)[1:]
                for d in period
                if d.group in name.split("&") or (name == "rest" and d.group not in own)
            ]
            assert [d.text for d in stage] == wanted  # both periods, in the order of time
        missing = {"big", "mid", "low", "odd"} - own if "rest" not in expected else set()
        left_out = [d for period in read(source, split)[1:] for d in period if d.group in missing]
        counted = made.manifest["inputs"][0]["left_out"][split]
        assert counted == {"n_documents": len(left_out), "n_tokens": sum(len(d.tokens) for d in left_out)}


def test_groups_that_are_not_there_or_twice_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = groups(tmp_path / "in", tokenizer)
    with pytest.raises(ConfigError, match=r"no document is of group 'bigg'.*did you mean 'big'"):
        derive(make("domains", order=("bigg",)), [source], tmp_path / "a")
    with pytest.raises(ConfigError, match="group 'big' is named twice"):
        derive(make("domains", order=("big", "mid&big")), [source], tmp_path / "b")


# --- gradual


@pytest.mark.parametrize(("n_periods", "steps", "width"), [(1, 1, 1), (4, 1, 0), (5, 1, 1), (3, 4, 2), (3, 2, 9)])
def test_shares_follow_the_formula(n_periods: int, steps: int, width: int) -> None:
    n = n_periods * steps

    def t(d: int) -> int:
        return max(0, width + 1 - abs(d))

    found = shares(n_periods, steps, width)
    for p in range(n_periods):
        for k in range(n):
            parts = [t(k - j) / sum(t(m - j) for m in range(n)) for j in range(p * steps, (p + 1) * steps)]
            assert found[p, k] == pytest.approx(sum(parts) / steps)
    assert found.sum(axis=1) == pytest.approx(1)
    if (n_periods, steps, width) == (5, 1, 1):
        assert found[2].tolist() == [0, 0.25, 0.5, 0.25, 0]


def test_a_gradual_stream_mixes_by_its_shares(tmp_path: Path, tokenizer: Path) -> None:
    source = even(tmp_path / "in", tokenizer, 5, 200)
    for steps, width in ((1, 1), (2, 2)):
        made = derive(make("gradual", steps=steps, width=width), [source], tmp_path / f"{steps}")
        expected = 180 * shares(4, steps, width)
        assert np.abs(mixing(source, made) - expected).max() <= 1  # of 180 documents, whole ones
    assert names(made) == ["2001"] + [f"{2002 + p}.{s}" for p in range(4) for s in (1, 2)]
    assert (made.stages()[1].start, made.stages()[1].end) == ("2002-01-01", "2003-12-31")


def test_width_0_changes_nothing_and_kept_held_out_is_pure(tmp_path: Path, tokenizer: Path) -> None:
    source = even(tmp_path / "in", tokenizer, 4, 40)
    same = derive(make("gradual", width=0), [source], tmp_path / "same")
    for k in range(4):
        assert {d.id for d in read(same, "train")[k]} == {d.id for d in read(source, "train")[k]}
    kept = derive(make("gradual", heldout="kept", steps=2), [source], tmp_path / "kept")
    ids = [[d.id for d in stage] for stage in read(source, "heldout")]
    assert [[d.id for d in stage] for stage in read(kept, "heldout")] == [ids[0], *(i for i in ids[1:] for _ in "12")]
    for options in ({"width": -1}, {"steps": 0}):
        with pytest.raises(ConfigError, match="choose a width of at least 0 and at least 1 step"):
            derive(make("gradual", **options), [source], tmp_path / str(options))


# --- recurring


def test_a_period_that_comes_back_trains_on_its_other_half(tmp_path: Path, tokenizer: Path) -> None:
    source = even(tmp_path / "in", tokenizer, 3, 100)
    made = derive(make("recurring", cycles=3), [source], tmp_path / "made")
    assert names(made) == [
        "2001", "2002", "2003", "2002 again", "2003 again", "2002 again 2", "2003 again 2",
    ]  # fmt: skip
    train, heldout = read(made, "train"), read(made, "heldout")
    for period, stages in ((1, (1, 3, 5)), (2, (2, 4, 6))):
        parts = [{d.id for d in train[k]} for k in stages]
        assert set.union(*parts) == {d.id for d in read(source, "train")[period]}
        assert [len(part) for part in parts] == [30, 30, 30]
        assert len({tuple((d.id, d.tokens) for d in heldout[k]) for k in stages}) == 1
    assert {d.change for d in heldout[3]} == {"unchanged"} and {d.change for d in train[3]} == {"new"}


def test_a_repeated_period_trains_on_the_same_again(tmp_path: Path, tokenizer: Path) -> None:
    source = even(tmp_path / "in", tokenizer, 3, 40)
    made = derive(make("recurring", repeat=True), [source], tmp_path / "made")
    assert made.tokens("train", 1).tobytes() == made.tokens("train", 3).tobytes() == source.tokens("train", 1).tobytes()
    assert [s["train"].get("repeated_from_earlier_stage") for s in made.manifest["stages"]] == [0, 0, 0, 36, 36]


def test_a_sequence_names_the_periods(tmp_path: Path, tokenizer: Path) -> None:
    source = even(tmp_path / "in", tokenizer, 4, 40)
    made = derive(make("recurring", sequence=("2004", "2002", "2004")), [source], tmp_path / "made")
    assert names(made) == ["2001", "2004", "2002", "2004 again"]
    assert [len(stage) for stage in read(made, "train")] == [36, 18, 36, 18]
    assert made.manifest["inputs"][0]["left_out"]["train"]["n_documents"] == 36
    with pytest.raises(ConfigError, match=r"there is no period '2020'.*option sequence"):
        derive(make("recurring", sequence=("2020",)), [source], tmp_path / "refused")
    with pytest.raises(ConfigError, match="cycles=0"):
        derive(make("recurring", cycles=0), [source], tmp_path / "none")
