"""``dose``: exact totals, nested doses, one held-out for all; on small streams written straight from lists."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench import registry, seeds
from clbench.build import build_stream
from clbench.derive import Taken
from clbench.errors import ConfigError
from clbench.specification import StreamSpecification, save_specification
from clbench.stream import Stream
from clbench.streams.dose import POOL, STREAM, Dose, cut_to, deal
from tests.derived_streams import Doc, Read, derive, read, train_tokenizer, write_stream

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")
DOSES = (0.0, 0.2, 0.5, 0.8, 1.0)


def documents(name: str, n: int, group: str) -> list[Doc]:
    """Texts of 1 to 30 random words with a number each, so that no two are near copies."""
    rng = seeds.generator(5, "dose-test", name, group)
    return [
        (
            f"{name}/{group}/{i}",
            " ".join(f"{WORDS[k]}{rng.integers(100)}" for k in rng.integers(0, 12, 1 + i % 30)),
            group,
        )
        for i in range(n)
    ]


@dataclass(frozen=True)
class Inputs:
    """A clean stream of three stages and a pool of two arms, with one tokenizer."""

    clean: Stream
    pool: Stream

    def dose(self, dose: float, **options: Any) -> Dose:
        """An opened transform of the two."""
        transform = Dose(Dose.Options(of="tinydocs", junk="tinydocs", dose=dose, **options))
        transform.open([self.clean, self.pool])
        return transform


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("dose")
    clean = [{"train": documents(f"s{k}", 60, "docs"), "heldout": documents(f"h{k}", 6, "docs")} for k in range(3)]
    posts = {
        "train": [*documents("post", 300, "junk"), *documents("post", 300, "control")],
        "heldout": [*documents("held", 5, "junk"), *documents("held", 5, "control")],
    }
    texts = [text for _, text, _ in clean[0]["train"]]
    tokenizer = train_tokenizer(folder / "tokenizer", texts)
    return Inputs(
        write_stream(folder / "clean", clean, tokenizer, name="clean"),  # type: ignore[arg-type]
        write_stream(folder / "pool", [posts], tokenizer, name="pool"),  # type: ignore[list-item]
    )


def tokens_by(taken: Taken, inputs: Inputs) -> dict[str, int]:
    """Tokens of a stage by where they come from: own, or an arm of the pool."""
    found: dict[str, int] = {}
    groups = inputs.pool.documents("train", 0, ["group"])["group"].to_pylist()
    for i, stage, row, kept in zip(taken.input, taken.stage, taken.row, taken.n_tokens, strict=True):
        offsets = (inputs.clean if i == STREAM else inputs.pool).offsets("train", int(stage))
        name = "own" if i == STREAM else groups[row]
        found[name] = found.get(name, 0) + int(kept or offsets[row + 1] - offsets[row])
    return found


@pytest.mark.parametrize("control", ["", "control"])
@pytest.mark.parametrize("dose", [*DOSES, 0.333, 0.003])
def test_totals_are_exact_to_the_token(inputs: Inputs, dose: float, control: str) -> None:
    transform = inputs.dose(dose, control=control, n_tokens=None if not control else 900)
    for stage in (1, 2):
        own = inputs.clean.counts("train", stage)["n_tokens"]
        total = 900 if control else own
        wanted = round(dose * total)
        expected = {"junk": wanted, control or "own": total - wanted}
        assert tokens_by(transform.take("train", stage), inputs) == {k: v for k, v in expected.items() if v}


def test_stage_0_is_the_clean_streams(inputs: Inputs) -> None:
    taken = inputs.dose(1.0).take("train", 0)
    assert set(taken.input.tolist()) == {STREAM}
    assert taken.row.tolist() == list(range(60))
    assert not taken.n_tokens.any()


def keys(taken: Taken, input: int | None = None) -> list[tuple[int, int, int]]:
    found = zip(taken.input.tolist(), taken.stage.tolist(), taken.row.tolist(), strict=True)
    return [key for key in found if input is None or key[0] == input]


@pytest.mark.parametrize("control", ["", "control"])
def test_doses_are_nested_and_in_one_order(inputs: Inputs, control: str) -> None:
    by_dose = {dose: inputs.dose(dose, control=control, n_tokens=1000) for dose in DOSES}
    for stage in (1, 2):
        for low, high in itertools.pairwise(DOSES):
            a, b = by_dose[low].take("train", stage), by_dose[high].take("train", stage)
            groups = inputs.pool.documents("train", 0, ["group"])["group"].to_pylist()
            junk = [{k for k in keys(t) if k[0] == POOL and groups[k[2]] == "junk"} for t in (a, b)]
            rest = [set(keys(t)) - junk[i] for i, t in enumerate((a, b))]
            assert junk[0] < junk[1]
            assert rest[0] > rest[1]
            common = set(keys(a)) & set(keys(b))
            assert [k for k in keys(a) if k in common] == [k for k in keys(b) if k in common]


def test_no_post_stands_in_two_stages(inputs: Inputs) -> None:
    transform = inputs.dose(0.6, control="control", n_tokens=1200)
    first, second = (set(keys(transform.take("train", stage), POOL)) for stage in (1, 2))
    assert first
    assert second
    assert not first & second


def test_junk_and_rest_are_mixed_evenly(inputs: Inputs) -> None:
    taken = inputs.dose(0.5, control="control", n_tokens=2000).take("train", 1)
    groups = np.array(inputs.pool.documents("train", 0, ["group"])["group"].to_pylist())
    is_junk = groups[taken.row] == "junk"
    halves = np.array_split(is_junk, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.25
    assert 0.3 < (is_junk[1:] != is_junk[:-1]).mean() < 0.7


def test_held_out_is_the_same_at_every_dose(inputs: Inputs, tmp_path: Path) -> None:
    found = []
    for i, dose in enumerate((0.0, 0.5, 1.0)):
        stream = derive(
            inputs.dose(dose, control="control", n_tokens=600), [inputs.clean, inputs.pool], tmp_path / str(i)
        )
        found.append([[(d.id, d.text, d.group) for d in stage] for stage in read(stream, "heldout")])
    assert found[0] == found[1] == found[2]
    assert [len(stage) for stage in found[0]] == [6, 16, 16]
    assert {group for _, _, group in found[0][1]} == {"docs", "junk", "control"}


def test_the_written_stream_holds_what_was_taken(inputs: Inputs, tmp_path: Path) -> None:
    transform = inputs.dose(0.5, control="control", n_tokens=777)
    stream = derive(transform, [inputs.clean, inputs.pool], tmp_path / "out")
    source = {d.id: d for d in [*itertools.chain(*read(inputs.clean, "train")), *read(inputs.pool, "train")[0]]}
    eos = stream.eos_id
    for stage in (1, 2):
        assert stream.counts("train", stage)["n_tokens"] == 777
        cut = 0
        for document in read(stream, "train")[stage]:
            whole: Read = source[document.id]
            assert document.tokens[-1] == eos
            assert document.tokens[:-1] == whole.tokens[: len(document.tokens) - 1]
            cut += document.tokens != whole.tokens
        assert cut <= 3  # one a side, and one more where a single token was missing
    assert stream.base_sha256 == inputs.clean.sha256 != stream.sha256


def test_only_named_stages_are_dosed(inputs: Inputs) -> None:
    transform = inputs.dose(1.0, at=(1,))
    assert set(transform.take("train", 1).input.tolist()) == {POOL}
    clean = transform.take("train", 2)
    assert set(clean.input.tolist()) == {STREAM}
    assert len(clean) == 60
    assert len(transform.take("heldout", 2)) == 16


def test_stages_can_be_left_out_and_their_dates_take_in_the_posts(inputs: Inputs) -> None:
    infos = inputs.dose(0.5, stages=1, control="control", n_tokens=500).stages()
    assert [info.name for info in infos] == ["2001", "2002"]
    assert (infos[0].start, infos[0].end) == ("2001-01-01", "2001-12-31")
    assert (infos[1].start, infos[1].end) == ("2001-01-01", "2002-12-31")


def test_a_pool_that_is_too_small_is_refused_with_what_it_has(inputs: Inputs) -> None:
    groups = np.array(inputs.pool.documents("train", 0, ["group"])["group"].to_pylist())
    lengths = np.diff(inputs.pool.offsets("train", 0))
    there = int(lengths[groups == "junk"].sum())
    with pytest.raises(ConfigError, match=f"arm junk, stage 1 of pool has {there:,} train tokens of {there + 1:,}"):
        inputs.dose(1.0, n_tokens=there + 1, stages=1).take("train", 1)
    assert tokens_by(inputs.dose(1.0, n_tokens=there, stages=1).take("train", 1), inputs) == {"junk": there}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dose": 1.2}, "dose is 1.2"),
        ({"dose": 0.5, "arm": "jnuk"}, "has no arm 'jnuk'.*did you mean 'junk'"),
        ({"dose": 0.5, "control": "contrl"}, "did you mean 'control'"),
        ({"dose": 0.5, "at": (3,)}, "stage 3 cannot be dosed"),
        ({"dose": 0.5, "at": (0,)}, "stage 0 cannot be dosed"),
        ({"dose": 0.5, "stages": 3}, "stages=3, but 2 follow stage 0"),
        ({"dose": 0.5, "n_tokens": 3}, "n_tokens is 3"),
    ],
)
def test_impossible_options_are_refused(inputs: Inputs, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        transform = inputs.dose(**options)
        transform.stages()
        transform.take("train", 1)


def test_a_pool_with_stages_is_refused(inputs: Inputs) -> None:
    transform = Dose(Dose.Options(of="tinydocs", junk="tinydocs", dose=0.5))
    transform.open([inputs.clean, inputs.clean])
    with pytest.raises(ConfigError, match="a pool of posts has one"):
        transform.take("train", 1)


def test_a_dose_through_specifications_and_the_builder(tmp_path: Path) -> None:
    """The whole way: posts in a file, a pool with the stream's tokenizer, a dose by name."""
    rng = seeds.generator(3, "posts")
    with (tmp_path / "posts.jsonl").open("w", encoding="utf-8") as file:
        for i in range(300):
            n, likes = (5, 900) if i % 2 else (110, 0)
            text = " ".join(f"{WORDS[k]}{rng.integers(1000)}" for k in rng.integers(0, 12, n))
            file.write(json.dumps({"text": text, "likes": likes}) + "\n")
    save_specification(
        StreamSpecification(
            name="test-pool",
            source="posts",
            options={
                "paths": [str(tmp_path / "posts.jsonl")],
                "recipe": "m1",
                "length_by": "words",
                "popularity": ["likes"],
            },
            tokenizer="stream:tinydocs",
        )
    )
    made = registry.make_stream_source(
        "dose:of=tinydocs,junk=test-pool,dose=0.25,control=control,n_tokens=400,stages=2"
    )
    stream = build_stream(made, progress=False)
    assert stream.name == "tinydocs.dose"
    assert [stream.counts("train", k)["n_tokens"] for k in (1, 2)] == [400, 400]
    groups = stream.documents("train", 1, ["group", "n_tokens"]).to_pylist()
    assert sum(row["n_tokens"] for row in groups if row["group"] == "junk") == 100


# --- cutting and dealing


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=30), share=st.floats(0, 1))
def test_cut_to_keeps_a_prefix_of_exactly_so_many_tokens(lengths: list[int], share: float) -> None:
    there = np.array(lengths, np.int64)
    wanted = round(share * sum(lengths))
    if wanted == 1:
        return
    if wanted % 2 and all(length == 2 for length in lengths):
        with pytest.raises(ConfigError):
            cut_to(there, wanted)
        return
    try:
        kept = cut_to(there, wanted)
    except ConfigError:  # only where every document before the last one taken is of two tokens
        n = int(np.searchsorted(np.cumsum(there), wanted)) + 1
        assert wanted % 2
        assert set(lengths[: n - 1]) <= {2}
        return
    assert kept.sum() == wanted
    assert (kept <= there[: len(kept)]).all()
    assert (kept >= 2).all()
    assert (kept < there[: len(kept)]).sum() <= 2


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 50), min_size=20, max_size=200),
    quotas=st.lists(st.integers(5, 500), min_size=1, max_size=6),
)
def test_dealt_documents_fill_all_stages_side_by_side(lengths: list[int], quotas: list[int]) -> None:
    stage = deal(np.array(lengths, np.int64), quotas)
    filled = [0.0] * len(quotas)
    for k, length in zip(stage.tolist(), lengths, strict=True):
        assert filled[k] == min(filled)
        filled[k] += length / quotas[k]
    assert deal(np.array(lengths[:15], np.int64), quotas).tolist() == stage[:15].tolist()
