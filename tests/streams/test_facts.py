from __future__ import annotations

import hashlib
import itertools
import json
import re
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.build import build_stream
from clbench.errors import ConfigError
from clbench.stream import Document
from clbench.streams import facts as module
from clbench.streams._facts_world import ATTRIBUTES, HELDOUT, TRAINED, names, shuffled
from clbench.streams.facts import Facts

SMALL = {"n_entities": 25, "n_attributes": 3, "n_values": 6, "n_stages": 6, "exposures": 5, "restate": 0.4}


def source(**changes: Any) -> Facts:
    return Facts(Facts.Options(**{**SMALL, **changes}))


def truth_of(facts: Facts) -> list[dict[str, Any]]:
    return [json.loads(line) for line in facts.extras()["facts.jsonl"].decode().splitlines()[1:]]


def trains(document: Document) -> bool:
    """The documented rule of the split, written down once more."""
    return int(hashlib.sha256(document.id.encode()).hexdigest()[:16], 16) / 2**64 >= 0.1


# --- an independent reader of the documents: sentences are matched, nothing of the generator is asked

NOUNS = {"metal": "trades in", "bird": "keeps", "tree": "plants"}
STATEMENTS = [
    re.compile(pattern)
    for noun, verb in NOUNS.items()
    for pattern in (
        rf"^The (?P<noun>{noun}) of (?P<town>[A-Z]\w+) is (?P<value>\w+)\.$",
        rf"^These days (?P<town>[A-Z]\w+) (?P<verb>{verb}) (?P<value>\w+)\.$",
        rf"^As (?P<noun>{noun}), (?P<town>[A-Z]\w+) has (?P<value>\w+)\.$",
        rf"^Visit (?P<town>[A-Z]\w+): the (?P<noun>{noun}) there is (?P<value>\w+)\.$",
        rf"^It is (?P<value>\w+) that (?P<town>[A-Z]\w+) (?P<verb>{verb}) now\.$",
    )
]
NO_STATEMENT = re.compile(
    r"^(Someone from|A song about|Nobody in|A letter about|The \w+ by the|Someone left a|Nobody knew why) "
)


def read(line: str) -> tuple[str, str] | None:
    """``(town/noun, value)`` of a sentence, None for one that states nothing; fails on one that is neither."""
    found = [match for pattern in STATEMENTS if (match := pattern.match(line))]
    if not found:
        assert NO_STATEMENT.match(line), line
        return None
    (match,) = found
    parts = match.groupdict()
    noun = parts.get("noun") or next(n for n, verb in NOUNS.items() if verb == parts["verb"])
    return f"{parts['town']}/{noun}", parts["value"]


def history(stated: list[dict[str, str]], fact: str) -> tuple[list[str | None], list[str]]:
    """Values and kinds of one fact, from what each stage states of it: what is not mentioned stays as it was."""
    values: list[str | None] = []
    kinds: list[str] = []
    for said in stated:
        old = values[-1] if values else None
        new = said.get(fact, old)
        runs = [value for value, _ in itertools.groupby(v for v in values if v is not None)]
        if new is None:
            kinds.append("unborn")
        elif new == "nothing":
            kinds.append("obsolete")
        elif old is None:
            kinds.append("new")
        elif new == old:
            kinds.append("kept")
        elif new in runs:
            assert new == runs[-2], "reverted is back to the value before the present one"
            kinds.append("reverted")
        else:
            kinds.append("updated")
        values.append(new)
    return values, kinds


@pytest.mark.parametrize("seed", [0, 7])
def test_the_documents_say_exactly_what_the_truth_table_says(seed: int) -> None:
    facts = source(seed=seed)
    stated: list[dict[str, str]] = []
    counted: list[Counter[str]] = []
    for stage in facts.stages():
        said: dict[str, str] = {}
        counts: Counter[str] = Counter()
        first_day: dict[str, str] = {}
        for document in facts.documents(stage.index):
            for line in document.text.splitlines():
                if (statement := read(line)) is not None:
                    assert said.setdefault(*statement) == statement[1], "one stage says two things"
                    counts[statement[0]] += trains(document)
                    first_day[statement[0]] = min(document.date, first_day.get(statement[0], "9"))
        stated.append(said)
        counted.append(counts)
        for row in truth_of(facts):
            assert row["date"][stage.index] is None or row["date"][stage.index] < first_day[row["fact"]]
    rows = truth_of(facts)
    assert {fact for said in stated for fact in said} == {row["fact"] for row in rows}
    for row in rows:
        assert (row["value"], row["kind"]) == history(stated, row["fact"])
        assert row["n_stated"] == [counts[row["fact"]] for counts in counted]
        changed = [k in ("new", "updated", "reverted") or (k == "obsolete" != b) for b, k in pairs(row["kind"])]
        assert [date is not None for date in row["date"]] == changed
    assert {k for row in rows for k in row["kind"]} == {"unborn", "new", "kept", "updated", "reverted", "obsolete"}


def pairs(kinds: list[str]) -> list[tuple[str, str]]:
    return list(zip(["", *kinds], kinds, strict=False))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), restate=st.sampled_from([0.0, 0.4, 1.0]))
def test_paraphrases_are_never_written(seed: int, restate: float) -> None:
    facts = source(seed=seed, restate=restate)
    text = "\n".join(d.text for s in facts.stages() for d in facts.documents(s.index))
    town = "[A-Z][a-z]+"
    for frame, about in itertools.product(HELDOUT, ATTRIBUTES):
        pattern = re.escape(frame).replace(r"\{town\}", town).replace(r"\{value\}", r"\w+")
        pattern = pattern.replace(r"\{noun\}", about.noun).replace(r"\{verb\}", re.escape(about.verb))
        assert not re.search(pattern, text)
    for row in truth_of(facts):
        assert row["probes"]["paraphrase"]["prompt"] not in text
        assert row["probes"]["paraphrase"]["frame"].startswith("paraphrase-")


def test_every_question_in_trained_words_was_trained() -> None:
    facts = source()
    said = [{x for d in facts.documents(s.index) if trains(d) for x in d.text.splitlines()} for s in facts.stages()]
    n = 0
    for row in truth_of(facts):
        for stage, n_stated in enumerate(row["n_stated"]):
            sentence = f"{row['probes']['trained']['prompt']} {row['value'][stage]}."
            assert (sentence in said[stage]) == (n_stated > 0)
            n += n_stated > 0
    assert n > 100


def test_the_shares_are_exact() -> None:
    options = {"n_entities": 211, "new": 0.03, "updated": 0.11, "reverted": 0.07, "obsolete": 0.05, "restate": 0.3}
    facts = source(**options)
    kinds = np.array([row["kind"] for row in truth_of(facts)])
    stated = np.array([row["n_stated"] for row in truth_of(facts)])
    assert len(kinds) == 633
    changed_before = 0
    for stage in range(6):
        count = Counter(kinds[:, stage].tolist())
        assert count["new"] == (round(0.03 * 633) if stage else 633 - 5 * round(0.03 * 633))
        if stage == 0:
            continue
        held = int((~np.isin(kinds[:, stage - 1], ["unborn", "obsolete"])).sum())
        gone = int((kinds[:, stage - 1] == "obsolete").sum())
        assert count["updated"] == int(0.11 * held + 0.5)
        assert count["obsolete"] == gone + int(0.05 * held + 0.5)
        # Only a fact that has changed can go back; from stage 2 on there are enough of them here.
        assert count["reverted"] == (int(0.07 * held + 0.5) if changed_before else 0)
        assert int((stated[kinds[:, stage] == "kept", stage] > 0).sum()) == int(0.3 * count["kept"] + 0.5)
        changed_before += count["updated"]
    assert set(np.unique(stated)) == {0, 5}


def test_obsolete_facts_are_mentioned_once_and_never_again() -> None:
    for row in truth_of(source(restate=1.0)):
        gone = [i for i, kind in enumerate(row["kind"]) if kind == "obsolete"]
        assert [row["n_stated"][i] > 0 for i in gone] == [i == gone[0] for i in gone]
        assert [row["value"][i] for i in gone] == ["nothing"] * len(gone)


def test_another_day_the_same_documents() -> None:
    digest = hashlib.sha256()
    facts = source()
    for stage in facts.stages():
        for document in source().documents(stage.index):
            digest.update(repr(document).encode())
    digest.update(facts.extras()["facts.jsonl"])
    assert digest.hexdigest() == GOLDEN
    assert [d.text for d in source(seed=1).documents(0)] != [d.text for d in facts.documents(0)]


GOLDEN = "cfb38e1f280ff03239349e3dcf29b22e8a3f50d7b78e0f6e8d9e685a2ce5fc70"
"""Of the world SMALL on the machine where it was first made; another value on another machine is a bug."""


def test_a_part_needs_no_other_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_DOCUMENTS", 10)
    whole = list(source().documents(2))
    assert source().n_parts(2) == 1 + (len(whole) > 100)
    monkeypatch.setattr(module, "PART_CHUNKS", 2)
    n_parts = source().n_parts(2)
    assert n_parts == -(-len(whole) // 20) > 3
    backwards = [list(source().part(2, part)) for part in reversed(range(n_parts))]
    assert [d for part in reversed(backwards) for d in part] == whole
    assert len({d.id for d in whole}) == len(whole)


@pytest.fixture(scope="module")
def large() -> Facts:
    facts = Facts(Facts.Options(size="large"))
    assert facts.world.kind.shape == (10, 600_000)
    return facts


def test_presets_count_without_making_documents(large: Facts) -> None:
    totals = {}
    for facts in (*(Facts(Facts.Options(size=size)) for size in ("tiny", "small", "medium")), large):
        counts = [facts.counts(stage) for stage in range(facts.plan.n_stages)]
        totals[facts.plan.n_entities] = sum(c.n_documents for c in counts)
        for stage, count in enumerate(counts):
            exposures = facts.options.exposures * int(facts.world.stated[stage].sum())
            assert count.n_statement_train == -(-exposures // 4)
            assert count.n_train == count.n_statement_train + int(count.n_statement_train / 4 + 0.5)
            asked = min(2000, int(count.n_train / 9 + 0.5))
            assert count.n_documents - count.n_train == asked
    assert totals[60] < 3000 < totals[1000] < 100_000 < totals[20_000] < 2_000_000
    assert totals[100_000] > 10_000_000


def test_a_part_of_a_large_world_stays_small_in_memory(large: Facts) -> None:
    assert large.n_parts(3) > 20
    tracemalloc.start()
    part = large.part(3, 11)
    documents = list(itertools.islice(part, 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(documents) == 1000 and peak < 60e6


def test_the_built_stream_is_split_as_planned() -> None:
    facts = source()
    stream = build_stream(facts, progress=False)
    for stage in facts.stages():
        counts, there = facts.counts(stage.index), stream.manifest["stages"][stage.index]
        assert there["train"]["n_documents"] == counts.n_train
        dropped = sum(v for k, v in there["heldout"].items() if k.startswith("dropped"))
        assert there["heldout"]["n_documents"] + dropped == counts.n_documents - counts.n_train
    assert stream.extra("facts.jsonl") == facts.extras()["facts.jsonl"]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 99))
def test_shuffling_without_memory_is_a_permutation(n: int, seed: int) -> None:
    found = shuffled(np.arange(n), n, seed, "test")
    assert np.array_equal(np.sort(found), np.arange(n))
    picked = np.arange(0, n, 7)
    assert np.array_equal(shuffled(picked, n, seed, "test"), found[picked])


def test_shuffling_spreads() -> None:
    found = shuffled(np.arange(100_000), 100_000, 0, "test")
    assert abs(np.corrcoef(np.arange(100_000), found)[0, 1]) < 0.02
    assert not np.array_equal(found, shuffled(np.arange(100_000), 100_000, 1, "test"))


def test_words_are_unambiguous() -> None:
    towns = names(np.arange(40_000), 40_000, 0)
    values = [value for about in ATTRIBUTES for value in about.values] + ["nothing"]
    assert len(set(towns)) == 40_000
    assert len(set(values)) == len(values)
    assert not any(a != b and b.startswith(a) for a, b in itertools.product(values, values))
    assert all(len(about.values) == 16 for about in ATTRIBUTES)
    assert not {town.lower() for town in towns} & {*values, *(about.noun for about in ATTRIBUTES)}
    assert not set(TRAINED) & set(HELDOUT)
    # A town's name follows a space everywhere, so that a byte-level tokenizer writes it in one way.
    assert all(" {town}" in frame for frame in (*TRAINED, *HELDOUT))


def test_a_sample_of_facts_is_asked() -> None:
    whole, part = truth_of(source()), truth_of(source(probed=10))
    assert len(whole) == 75 and len(part) == 10
    assert {row["fact"] for row in part} < {row["fact"] for row in whole}


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_values": 5},
        {"n_attributes": 9},
        {"n_stages": 1},
        {"updated": 0.6, "obsolete": 0.5},
        {"new": 0.3},
        {"restate": 1.5},
        {"distractor_documents": 1.0},
        {"exposures": 0},
    ],
)
def test_options_that_leave_no_world_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        source(**wrong)
