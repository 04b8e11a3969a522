from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import zeta
from scipy.stats import kstest

from clbench.errors import ConfigError
from clbench.eval._needles import (
    ADJECTIVES,
    NOUNS,
    SUBTASKS,
    VERBS,
    Draws,
    Haystack,
    Settings,
    largest_fit,
    make_items,
    noise,
    plain_words,
    score,
    zeta_counts,
)
from clbench.files import sha256_bytes

NEEDLE = re.compile(r"The secret (\w+) of ([\w-]+) is ([\w-]+)\.")
COUNTERS: dict[str, Callable[[str], int]] = {
    "bytes": lambda text: len(text.encode()),
    "words": lambda text: len(text.split()),
    "threes": lambda text: 1 + sum(-(-len(word) // 3) for word in re.findall(r"\w+|\W", text)),
}
NEEDLES = [name for name in SUBTASKS if name.startswith(("single", "multi"))]


def settings_of(**changes: object) -> Settings:
    return Settings(haystack=noise(0), **changes)  # type: ignore[arg-type]


# --- every question is solved from its prompt alone, by other means


def solve_needles(prompt: str) -> set[str]:
    context, _, question = prompt.rpartition("Question: ")
    asked = re.search(r"of (.*) in the text above\?", question)
    assert asked is not None
    keys = set(re.split(r", | and ", asked[1]))
    return {value for _, key, value in NEEDLE.findall(context) if key in keys}


@pytest.mark.parametrize("keys", ["word", "number", "uuid"])
@pytest.mark.parametrize("subtask", NEEDLES)
def test_needles_are_where_the_question_says(subtask: str, keys: str) -> None:
    for item in make_items(subtask, 1500, 5, settings_of(keys=keys), COUNTERS["threes"]).items:
        assert solve_needles(item.prompt) == {*item.references}
        assert len(item.references) == (4 if subtask in ("multi_value", "multi_query") else 1)
        n_needles = len(NEEDLE.findall(item.prompt))
        if subtask.startswith("multi_key_"):
            assert n_needles > 10 if keys == "word" and subtask == "multi_key_line" else n_needles > 3
        else:
            assert n_needles == (1 if subtask.startswith("single") else 4)
        for reference in item.references:  # it stands in the prompt once: nothing else gives the answer away
            assert item.prompt.count(reference) == 1


def test_values_are_of_the_kind_that_is_asked() -> None:
    forms = {"word": r"[a-z]+-[a-z]+", "number": r"[1-9]\d{6}", "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
    for kind, form in forms.items():
        for item in make_items(f"single_{kind}", 400, 5, settings_of(keys=kind), COUNTERS["words"]).items:
            assert re.fullmatch(form, item.references[0])
            assert re.search(rf"of {form} in the text above is$", item.prompt)


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2), (2, 7), (1, 1)])
def test_variables_are_followed(chains: int, hops: int) -> None:
    made = make_items("tracking", 900, 5, settings_of(n_chains=chains, n_hops=hops), COUNTERS["words"])
    for item in made.items:
        asked = item.prompt[item.prompt.rindex("The text below") :]  # the worked example stands before
        query = re.search(r"have the value (\d+) in", asked)
        assert query is not None
        value: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", asked):
            value[name] = value.get(source, source)
        assert {name for name, found in value.items() if found == query[1]} == {*item.references}
        assert len(value) == chains * (hops + 1) and len(item.references) == hops + 1


@pytest.mark.parametrize("length", [300, 2000, 6000])
def test_common_words_are_the_most_common(length: int) -> None:
    made = make_items("common_words", length, 3, settings_of(), COUNTERS["words"])
    for item in made.items:
        asked = item.prompt[item.prompt.rindex("Below is") :]
        listed = re.findall(r"\d+\. ([a-z-]+)", asked)
        ranked = Counter(listed).most_common()
        assert {word for word, _ in ranked[:10]} == {*item.references}
        often, seldom = {n for _, n in ranked[:10]}, {n for _, n in ranked[10:]}
        assert (often, seldom) == (
            ({30}, {3}) if length >= 4096 else ({6}, {1}) if item.prompt.count("Below is") == 2 else ({3}, {1})
        )
        for reference in item.references:  # no other word contains it, so it cannot be named by accident
            assert sum(reference in word for word in {*listed}) == 1


def test_long_lists_have_enough_words() -> None:
    """At 40,000 tokens some 3,000 words are needed, more than the plain ones."""
    item = make_items("common_words", 40_000, 1, settings_of(), COUNTERS["words"]).items[0]
    listed = re.findall(r"\d+\. ([a-z-]+)", item.prompt[item.prompt.rindex("Below is") :])
    assert len({*listed}) > 3000 and item.n_tokens > 39_800
    assert {word for word, _ in Counter(listed).most_common(10)} == {*item.references}


@pytest.mark.parametrize("length", [300, 1000, 5000])
def test_frequent_words_follow_zeta(length: int) -> None:
    for item in make_items("frequent_words", length, 3, settings_of(), COUNTERS["words"]).items:
        text = item.prompt.split("\n\n")[1].split()
        counts = Counter(text)
        ranked = [word for word, _ in counts.most_common() if word != "...."]
        assert ranked[:3] == list(item.references) and counts[ranked[2]] > counts[ranked[3]]
        n = next(n for n in range(10, 20_000) if sum(zeta_counts(n, max(8, length // 50))) == len(text))
        share = [counts[word] / n for word in ("....", *ranked[:3])]
        assert share == pytest.approx([k**-2 / zeta(2) for k in (1, 2, 3, 4)], abs=1.01 / n)


# --- lengths


@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("subtask", SUBTASKS)
def test_items_fill_their_length_and_never_pass_it(subtask: str, counter: str) -> None:
    count = COUNTERS[counter]
    unit = {"multi_key_line": 60, "multi_key_uuid": 110}.get(subtask, 45 if subtask == "common_words" else 30)
    for length in (1201, 1999):
        made = make_items(subtask, length, 3, settings_of(), count)
        for item in made.items:
            assert item.n_tokens == count(item.prompt)
            assert length - unit < item.n_tokens + made.n_generate <= length
            longest = max(map(count, (" ".join(item.references), *item.references)))
            assert made.n_generate >= longest


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-2, 9), min_size=30, max_size=300), st.integers(0, 400), st.integers(0, 20))
def test_largest_fit_is_a_step_over_the_budget(steps: list[int], budget: int, least: int) -> None:
    """Counts that grow unevenly and even fall now and then, as those of a tokenizer that merges."""
    heights = np.concatenate([np.cumsum(steps), np.cumsum(steps)[-1] + np.arange(1, 4000)])

    def n_tokens(n: int) -> int:
        return int(heights[n])

    if n_tokens(least) > budget:
        return
    n = largest_fit(n_tokens, budget, least)
    assert n >= least and n_tokens(n) <= budget < n_tokens(n + 1)


def test_few_calls_are_enough() -> None:
    calls: list[int] = []

    def n_tokens(n: int) -> int:
        calls.append(n)
        return 57 + 3 * n + n % 7

    assert abs(largest_fit(n_tokens, 100_000, 0) - 33_313) < 5
    assert len(calls) < 20


def test_a_length_that_is_too_short_is_refused_with_the_least() -> None:
    with pytest.raises(ConfigError, match=r"takes at least (\d+) tokens .*, not 40") as caught:
        make_items("tracking", 40, 3, settings_of(), COUNTERS["words"])
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    assert "\n" not in str(caught.value)
    make_items("tracking", least, 3, settings_of(), COUNTERS["words"])
    with pytest.raises(ConfigError):
        make_items("tracking", least - 1, 3, settings_of(), COUNTERS["words"])


def test_a_tokenizer_that_counts_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="next to no tokens"):
        make_items("single_number", 300, 1, settings_of(), lambda text: 1)


# --- the same everywhere, and different where it should be

DIGESTS = {
    "single_word": "c506ab48edf8",
    "single_number": "241def6a6fc0",
    "single_uuid": "95adac9f8b15",
    "multi_key": "fca796a16182",
    "multi_key_line": "773608878f63",
    "multi_key_uuid": "0daec976c08c",
    "multi_value": "f78cfc46ed3f",
    "multi_query": "239c273bffb9",
    "tracking": "8dcba0867ccc",
    "common_words": "0bf6562e74ad",
    "frequent_words": "e685bceb0efb",
}


def test_items_are_the_same_on_every_machine() -> None:
    found = {
        subtask: "".join(i.prompt for i in make_items(subtask, 600, 2, settings_of(), COUNTERS["words"]).items)
        for subtask in SUBTASKS
    }
    assert {name: sha256_bytes(prompts.encode())[:12] for name, prompts in found.items()} == DIGESTS


def test_fewer_items_are_the_first_of_more_and_seeds_differ() -> None:
    few, more = (make_items("single_number", 500, n, settings_of(), COUNTERS["words"]).items for n in (3, 6))
    assert more[:3] == few and len({item.prompt for item in more}) == 6
    other = make_items("single_number", 500, 3, settings_of(seed=1), COUNTERS["words"]).items
    assert not {item.references for item in other} & {item.references for item in few}


def test_depths_are_even() -> None:
    items = make_items("single_number", 400, 200, settings_of(), COUNTERS["words"]).items
    depths = []
    for item in items:
        context = item.prompt.split("\n\n")[1]
        depths.append(len(context.split("The secret")[0].split()) / len(context.split()))
    assert kstest(depths, "uniform").pvalue > 0.01


# --- haystacks and score


def test_a_text_of_the_users_is_the_haystack() -> None:
    text = "Call me Ann. Some years ago,\n never mind how long!  It was long. " * 3 + "Is this the end? Yes"
    haystack = Haystack.of_text(text)
    assert " ".join(haystack.words) == " ".join(text.split())
    starts = [haystack.words[place] for place in haystack.starts]
    assert starts == ["Call", "Some", "It"] * 3 + ["Is", "Yes"]
    hidden = haystack.context(0, 5, [(0.0, "A."), (0.5, "B."), (0.99, "C.")])
    assert hidden == "A. Call me Ann. B. C. Some years"
    around = haystack.context(len(haystack.words) - 1, 4, [])
    assert around == "Yes Call me Ann."
    made = make_items("multi_key", 400, 2, Settings(haystack=haystack), COUNTERS["words"])
    assert all(solve_needles(item.prompt) == {*item.references} for item in made.items)


def test_a_value_that_the_text_has_is_never_hidden() -> None:
    drawn = Draws(0, "single_number", 400, 0)
    plain = Settings(haystack=Haystack.of_text("No numbers here. None at all."))
    value = make_items("single_number", 400, 1, plain, COUNTERS["words"]).items[0].references[0]
    spoiled = Settings(haystack=Haystack.of_text(f"No {value}, here. None at all."))
    assert make_items("single_number", 400, 1, spoiled, COUNTERS["words"]).items[0].references[0] != value
    assert drawn.below(5) in range(5)


def test_a_text_without_sentences_still_hides_needles() -> None:
    haystack = Haystack.of_text("word " * 2000)
    items = make_items("single_number", 1500, 40, Settings(haystack=haystack), COUNTERS["words"]).items
    depths = [item.prompt.split("The secret")[0].count("word") / 1360 for item in items]
    assert kstest(depths, "uniform").pvalue > 0.001
    with pytest.raises(ConfigError, match="no words"):
        Haystack.of_text(" \n\t")


def test_noise_holds_no_answer() -> None:
    text = " ".join(noise(0).words)
    assert not re.search(r"\d|secret|VAR|-", text)
    assert noise(1).sha256 != noise(0).sha256


def test_no_plain_word_stands_in_another_word() -> None:
    every = {*ADJECTIVES, *NOUNS, *VERBS}
    for word in (*plain_words(ADJECTIVES), *plain_words(NOUNS), *plain_words(VERBS)):
        assert [other for other in every if word in other] == [word]
    assert "old" not in plain_words(ADJECTIVES) and "row" not in plain_words(VERBS)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("It is 123.", ["123"], 1.0),
        ("It is 124.", ["123"], 0.0),
        ("abc, DEF", ["ABC", "def", "ghi", "jkl"], 0.5),
        ("", ["a"], 0.0),
        ("12345", ["234"], 1.0),  # substrings, as RULER has it
    ],
)
def test_score_is_the_share_of_references_found(answer: str, references: list[str], expected: float) -> None:
    assert score(answer, references) == expected
