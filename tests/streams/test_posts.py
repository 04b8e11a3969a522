"""``posts``: thresholds, draws and reports against small pools whose right answer was worked out by hand."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clbench import registry
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.seeds import generator
from clbench.stream import Document
from clbench.streams.posts import Posts, Ruler, key_of
from tests.derived_streams import train_tokenizer

Post = dict[str, Any]


def post(number: int, words: int, likes: int, *, sub: str = "a", **more: Any) -> Post:
    """A post of so many words, two columns of popularity."""
    text = " ".join(f"w{number}x{i}" for i in range(words))
    return {"name": f"p{number}", "body": text, "likes": likes, "replies": 0, "sub": sub, **more}


def write(folder: Path, posts: Sequence[Post], name: str = "posts.jsonl") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in posts), encoding="utf-8")
    return str(path)


def source(path: str | Sequence[str], recipe: str, **options: Any) -> Posts:
    paths = (path,) if isinstance(path, str) else tuple(path)
    defaults: dict[str, Any] = {"length_by": "words", "text": "body", "id": "name"}
    if recipe not in ("length_only", "m2"):
        defaults["popularity"] = ("likes", "replies")
    return Posts(Posts.Options(paths=paths, recipe=recipe, **(defaults | options)))  # type: ignore[arg-type]


def arms(posts: Posts) -> dict[str, list[Document]]:
    """The documents by arm."""
    found: dict[str, list[Document]] = {}
    for document in posts.documents(0):
        found.setdefault(document.group, []).append(document)
    return found


def n_words(documents: Sequence[Document]) -> int:
    return sum(len(document.text.split()) for document in documents)


BOUNDS = [
    post(0, 29, 501),  # junk
    post(1, 30, 501),  # not shorter than 30
    post(2, 29, 500),  # not more popular than 500
    post(3, 101, 0),  # control
    post(4, 100, 0),  # not longer than 100
    post(5, 101, 1),  # not unpopular
    post(6, 5, 300, replies=201),  # junk: the columns are added
]
BOUNDS[6]["replies"] = 201


def test_m1_is_short_and_popular_against_long_and_unpopular(tmp_path: Path) -> None:
    found = arms(source(write(tmp_path, BOUNDS), "m1", match="none"))
    assert {arm: [d.id for d in documents] for arm, documents in found.items()} == {
        "junk": ["p0", "p6"],
        "control": ["p3"],
    }


def test_v1_of_the_paper_takes_popularity_up_to_500(tmp_path: Path) -> None:
    found = arms(source(write(tmp_path, BOUNDS), "m1", match="none", unpopular=500))
    assert [d.id for d in found["control"]] == ["p3", "p5"]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("length_only", {"junk": {0, 2, 6}, "control": {3, 5}}),
        ("popularity_only", {"junk": {0, 1, 6}, "control": {3, 4}}),
    ],
)
def test_ablations_ignore_the_other_half(tmp_path: Path, recipe: str, expected: dict[str, set[int]]) -> None:
    found = arms(source(write(tmp_path, BOUNDS), recipe, match="none"))
    assert {arm: {int(d.id[1:]) for d in documents} for arm, documents in found.items()} == expected


def test_cells_of_length_and_popularity(tmp_path: Path) -> None:
    posts = [post(10 * a + b, words, likes) for a, words in enumerate((3, 120)) for b, likes in enumerate((900, 0))]
    found = arms(source(write(tmp_path, [*posts, post(99, 60, 900)]), "m1_2x2", match="none"))
    assert {arm: [d.id for d in documents] for arm, documents in found.items()} == {
        "short-popular": ["p0"],
        "short-unpopular": ["p1"],
        "long-popular": ["p10"],
        "long-unpopular": ["p11"],
    }


def test_longest_caps_long_posts(tmp_path: Path) -> None:
    posts = [post(0, 5, 900), post(1, 130, 0), post(2, 161, 0)]
    found = arms(source(write(tmp_path, posts), "m1", match="none", longest=160))
    assert [d.id for d in found["control"]] == ["p1"]


def many(n: int = 400) -> list[Post]:
    rng = generator(7, "test_posts")
    posts = []
    for i in range(n):
        popular = bool(rng.integers(2))
        words = int(rng.integers(1, 29) if popular else rng.integers(101, 140))
        posts.append(post(i, words, 900 if popular else 0, sub=f"s{int(rng.integers(9))}"))
    return posts


def test_arms_hold_as_many_words_as_the_smallest_and_the_last_post_is_cut(tmp_path: Path) -> None:
    posts = many()
    total = {
        "junk": sum(len(p["body"].split()) for p in posts if p["likes"]),
        "control": sum(len(p["body"].split()) for p in posts if not p["likes"]),
    }
    made = source(write(tmp_path, posts), "m1")
    found, report = arms(made), made.report()
    assert report["binding"] == "junk"
    assert n_words(found["junk"]) == n_words(found["control"]) == total["junk"]
    whole = {p["name"]: p["body"] for p in posts}
    cut = [d for d in found["control"] if d.text != whole[d.id]]
    assert len(cut) == report["arms"]["control"]["cut"] == 1
    assert whole[cut[0].id].startswith(cut[0].text)
    assert report["arms"]["control"]["eligible_units"] == total["control"]


def test_posts_are_drawn_by_hash_so_a_smaller_draw_begins_a_larger_one(tmp_path: Path) -> None:
    posts = many()
    expected = sorted((p["name"] for p in posts if not p["likes"]), key=lambda name: key_of(name, 3))
    drawn = {}
    for n in (300, 2000):
        made = source(write(tmp_path, posts), "m1", n_units=n, seed=3)
        drawn[n] = {d.id for d in arms(made)["control"]}
        assert drawn[n] == set(expected[: len(drawn[n])])
        assert n_words(arms(made)["control"]) == n
    assert drawn[300] < drawn[2000]


def test_the_draw_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    posts = many()
    one = arms(source(write(tmp_path / "a", posts), "m1", n_units=700))
    other = arms(source(write(tmp_path / "b", posts[::-1]), "m1", n_units=700))
    assert {arm: {(d.id, d.text) for d in found} for arm, found in one.items()} == {
        arm: {(d.id, d.text) for d in found} for arm, found in other.items()
    }


def test_within_matches_words_in_every_community(tmp_path: Path) -> None:
    rng = generator(1, "within")
    posts = [post(i, int(rng.integers(2, 40)), int(rng.integers(0, 1000)), sub=f"s{i % 5}") for i in range(300)] + [
        post(1000 + i, 20, 7, sub="flat") for i in range(20)
    ]
    made = source(write(tmp_path, posts), "within", community="sub")
    found = arms(made)
    by_name = {p["name"]: p for p in posts}
    words: dict[str, Counter[str]] = {arm: Counter() for arm in found}
    for arm, documents in found.items():
        for d in documents:
            words[arm][by_name[d.id]["sub"]] += len(d.text.split())
    assert words["junk"] == words["control"]
    assert set(words["junk"]) == {f"s{i}" for i in range(5)}  # nothing is popular where all are equally so
    for sub in words["junk"]:
        likes = sorted(p["likes"] for p in posts if p["sub"] == sub)
        quarter = len(likes) // 4
        top = [by_name[d.id]["likes"] for d in found["junk"] if by_name[d.id]["sub"] == sub]
        bottom = [by_name[d.id]["likes"] for d in found["control"] if by_name[d.id]["sub"] == sub]
        assert min(top) >= likes[-quarter] > likes[quarter - 1] >= max(bottom)
    shared = made.report()["shared_communities"][0]
    assert (shared["communities"], shared["share_of_posts"]) == (5, {"junk": 1.0, "control": 1.0})


def test_within_takes_whole_communities_up_to_n_units(tmp_path: Path) -> None:
    posts = [post(i, 10, i, sub=f"s{i % 10}") for i in range(400)]
    made = source(write(tmp_path, posts), "within", community="sub", n_units=250)
    found = arms(made)
    assert n_words(found["junk"]) == n_words(found["control"]) == 250  # 100 in each community: 100, 100 and 50
    assert made.report()["arms"]["junk"]["communities"] == 3
    assert made.report()["binding"] == "n_units"


def test_labels_from_a_column_and_from_files(tmp_path: Path) -> None:
    rows = [
        {"body": f"text number {i}", "kind": kind} for i, kind in enumerate(("spam", "bait", "good", "odd", "good"))
    ]
    column = source(
        write(tmp_path, rows), "m2", id="", label="kind", junk_labels=("spam", "bait"), control_labels=("good",)
    )
    assert {arm: len(found) for arm, found in arms(column).items()} == {"junk": 2, "control": 2}
    assert column.report()["left_out"] == {"another label": 1}
    with gzip.open(tmp_path / "bait.gz", "wt") as file:
        file.write("You will not believe this\n\nTen things about cats\n")
    (tmp_path / "news.txt").write_text("Parliament votes on water bill\n", encoding="utf-8")
    files = Posts(
        Posts.Options(
            paths=(f"junk={tmp_path / 'bait.gz'}", f"control={tmp_path / 'news.txt'}"),
            recipe="m2",
            length_by="words",
            match="none",
        )
    )
    assert {arm: [d.text for d in found] for arm, found in arms(files).items()} == {
        "junk": ["You will not believe this", "Ten things about cats"],
        "control": ["Parliament votes on water bill"],
    }


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    posts = [
        post(0, 5, 900),
        post(0, 6, 900),  # the same identity
        post(1, 5, 900) | {"body": "café life"},
        post(2, 5, 900) | {"body": "  "},
        post(3, 5, 900) | {"body": None},
        post(4, 50, 900),
        post(5, 5, 40),
        post(6, 120, 0),
        post(7, 5, 900) | {"body": "broken \ufffd character"},
    ]
    path = write(tmp_path, posts)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write('{"name": "cut off, ')
    report = source(path, "m1", ascii_only=True).report()
    assert report["left_out"] == {
        "same identity": 1,
        "not ASCII": 1,
        "no text": 2,
        "between short and long": 1,
        "neither popular nor unpopular": 1,
        "damaged characters": 1,
        "broken JSON": 1,
    }
    assert report["rows_read"] == 9


def test_type_token_ratio_and_shared_communities(tmp_path: Path) -> None:
    junk = [post(i, 1, 900, sub=f"s{i}") | {"body": "same same other"} for i in range(4)]
    control = [post(10 + i, 120, 0, sub=f"s{2 + i}") for i in range(4)]
    made = source(write(tmp_path, junk + control), "m1", community="sub", match="none")
    report = made.report()
    # Over the first 12 words of each arm: 2 types among the junk, no word twice in the control.
    assert report["words_of_type_token_ratio"] == 12
    assert report["arms"]["junk"]["type_token_ratio"] == 2 / 12
    assert report["arms"]["control"]["type_token_ratio"] == 1.0
    assert report["shared_communities"][0]["communities"] == 2
    assert report["shared_communities"][0]["share_of_posts"] == {"junk": 0.5, "control": 0.5}


def test_length_by_tokens_of_a_folder_with_the_beginning_of_text(tmp_path: Path) -> None:
    folder = train_tokenizer(tmp_path / "tokenizer", ["the cat sat on the mat", "a dog"] * 5, vocab_size=270)
    plain, with_bos = (Ruler(f"tokenizer:{folder}", bos=bos) for bos in (False, True))
    texts = ["the cat sat", "a dog sat on the mat and sang"]
    lengths = plain.lengths([{}, {}], texts)
    assert with_bos.lengths([{}, {}], texts) == [n + 1 for n in lengths]
    for n in range(1, lengths[1]):
        kept, counted = plain.cut(texts[1], n)
        assert texts[1].startswith(kept)
        assert counted == n == plain.lengths([{}], [kept])[0]
    posts = [post(0, 0, 900) | {"body": texts[0]}, post(1, 0, 0) | {"body": texts[1]}]
    options = {"length_by": f"tokenizer:{folder}", "match": "none"}
    with pytest.raises(ConfigError, match="arm control has no posts"):
        source(write(tmp_path, posts), "length_only", short=lengths[0] + 1, long=lengths[1], **options).fetch()
    made = source(write(tmp_path, posts), "length_only", short=lengths[0] + 2, long=lengths[1], bos=True, **options)
    assert {arm: len(found) for arm, found in arms(made).items()} == {"junk": 1, "control": 1}


def test_bytes_never_split_a_character() -> None:
    ruler = Ruler("bytes", bos=False)
    assert ruler.lengths([{}], ["aé"]) == [3]
    assert ruler.cut("aéb", 2) == ("a", 1)
    assert ruler.cut("aéb", 3) == ("aé", 3)


def test_a_column_of_counts_cannot_be_cut(tmp_path: Path) -> None:
    posts = [post(0, 5, 900, n=8), post(1, 5, 0, n=130), post(2, 5, 900, n=7)]
    made = source(write(tmp_path, posts), "m1", length_by="column:n")
    found = arms(made)
    assert len(found["junk"]) == 2
    assert "control" not in found  # 15 of its 130 would be needed
    assert made.report()["arms"]["control"] | {"type_token_ratio": 0} == {
        "posts": 0, "units": 0, "mean_length": 0.0, "bytes": 0, "cut": 1, "type_token_ratio": 0,
        "communities": None, "eligible_posts": 1, "eligible_units": 130,
    }  # fmt: skip


FORMATS = ["posts.jsonl", "posts.jsonl.gz", "posts.jsonl.zst", "posts.csv", "posts.tsv.gz", "posts.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    posts = many(40)
    posts[0]["body"] += ' with a "quote", a comma and\na line'
    expected = list(source(write(tmp_path / "plain", posts), "m1").documents(0))
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(posts), path, row_group_size=7)
    else:
        text = io.StringIO(newline="")
        if "jsonl" in name:
            text.write("".join(json.dumps(one) + "\n" for one in posts))
        else:
            writer = csv.DictWriter(text, posts[0].keys(), delimiter="\t" if "tsv" in name else ",")
            writer.writeheader()
            writer.writerows(posts)
        packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        with pa.output_stream(str(path), compression=packing) as file:
            file.write(text.getvalue().encode())
    assert list(source(str(path), "m1").documents(0)) == expected


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    posts = many(60)
    write(tmp_path / "in" / "b", posts[:30], "2.jsonl")
    write(tmp_path / "in" / "a", posts[30:], "1.jsonl")
    (tmp_path / "in" / "README.md").write_text("not a table", encoding="utf-8")
    made = source(str(tmp_path / "in"), "m1", match="none")
    order = [d.id for d in made.documents(0)]
    assert order == [p["name"] for p in posts[30:] + posts[:30]]


def test_dates_become_utc_days_and_give_the_stage(tmp_path: Path) -> None:
    dated = [post(0, 5, 900, at=1347291686), post(1, 120, 0, at="2012-01-31T23:30:00-02:00")]
    made = source(write(tmp_path, dated), "m1", date="at", match="none")
    assert {d.id: d.date for d in made.documents(0)} == {"p0": "2012-09-10", "p1": "2012-02-01"}
    assert (made.stages()[0].start, made.stages()[0].end) == ("2012-02-01", "2012-09-10")
    undated = source(write(tmp_path, dated), "m1", match="none")
    assert {d.date for d in undated.documents(0)} == {"1970-01-01"}


def test_settings_name_content_not_places(tmp_path: Path) -> None:
    posts = many(30)
    here, there = (source(write(tmp_path / name, posts), "m1").settings() for name in ("here", "there"))
    assert here == there
    assert str(tmp_path) not in json.dumps(here)
    posts[0]["likes"] += 1
    assert source(write(tmp_path / "here", posts), "m1").settings() != here


def test_settings_know_which_file_is_which_label(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"some text of {name}\n", encoding="utf-8")
    both = [
        Posts(
            Posts.Options(
                paths=(f"{one}={tmp_path / 'a.txt'}", f"{two}={tmp_path / 'b.txt'}"), recipe="m2", length_by="words"
            )
        )
        for one, two in (("junk", "control"), ("control", "junk"))
    ]
    assert both[0].settings() != both[1].settings()
    assert {arm: [d.text for d in found] for arm, found in arms(both[1]).items()} == {
        "control": ["some text of a.txt"],
        "junk": ["some text of b.txt"],
    }


def test_another_text_with_an_empty_identity_is_another_post(tmp_path: Path) -> None:
    posts = [post(i, 5, 900) | {"name": ""} for i in range(3)] + [post(9, 120, 0)]
    found = arms(source(write(tmp_path, posts), "m1", match="none"))
    assert len({d.id for d in found["junk"]}) == 3


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        ("m1", {"popularity": ()}, "popularity names no column"),
        ("within", {}, "community names no column"),
        ("m2", {}, "neither a label column nor a file for each label"),
        ("m1", {"length_by": "tokens"}, "length_by is 'tokens'"),
        ("m1", {"unpopular": 600}, "unpopular 600 overlaps popular 500"),
        ("m1", {"short": 200}, "short 200 overlaps long 100"),
        ("m1", {"longest": 90}, "longest is 90"),
        ("m1", {"n_units": 0}, "n_units is 0"),
        ("within", {"community": "sub", "quantile": 0.7}, "quantile is 0.7"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tmp_path: Path, recipe: str, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        source(write(tmp_path, BOUNDS), recipe, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"text": "txt"}, "no column 'txt', but body, likes, name, replies, sub"),
        ({"popularity": ("lieks",)}, "there is no column 'lieks'"),
        ({"length_by": "column:sub"}, "column 'sub' holds no number"),
        ({"date": "sub"}, "'a' is no date"),
        ({"popular": 9999}, "arm junk has no posts among 7 rows"),
    ],
)
def test_columns_that_do_not_fit_are_refused_and_nothing_is_left(
    tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    made = source(write(tmp_path, BOUNDS), "m1", **options)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        made.fetch()
    assert not made.folder.exists()
    assert not list(made.folder.parent.glob(f".{made.folder.name}*.tmp"))


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=re.escape("nowhere.jsonl")):
        source(str(tmp_path / "nowhere.jsonl"), "m1").fetch()
    (tmp_path / "bad.parquet").write_bytes(b"not a table")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not packed")
    for name in ("bad.parquet", "bad.jsonl.gz"):
        with pytest.raises(IntegrityError, match=re.escape(name)):
            source(str(tmp_path / name), "m1").fetch()


def test_the_command_line_spelling(tmp_path: Path) -> None:
    path = write(tmp_path, BOUNDS)
    made = registry.make_stream_source(
        f"posts:paths={path},recipe=m1,length_by=words,text=body,id=name,popularity=likes+replies,match=none"
    )
    assert isinstance(made, Posts)
    assert made.options.popularity == ("likes", "replies")
    assert {arm: len(found) for arm, found in arms(made).items()} == {"junk": 2, "control": 1}


def test_the_report_stands_in_the_stream_as_an_extra(tmp_path: Path) -> None:
    made = source(write(tmp_path, BOUNDS), "m1", match="none")
    assert json.loads(made.extras()["arms.json"]) == made.report()


@pytest.mark.skipif("CLBENCH_SHARED_DATA" not in os.environ, reason="CLBENCH_SHARED_DATA names no folder")
def test_real_cells_and_clickbait() -> None:
    """Counts of the notes: 2 x 2 of Reddit posts (0.4 M tokens a cell), 15,999 clickbait headlines against 16,001."""
    folder = Path(os.environ["CLBENCH_SHARED_DATA"]) / "junk"
    cells = {f"{a}-{b}": f"cell_{a}_{b}.jsonl.gz" for a in ("short", "long") for b in ("popular", "unpopular")}
    report = Posts(
        Posts.Options(
            paths=tuple(str(folder / name) for name in cells.values()),
            recipe="m1_2x2",
            length_by="column:n_tok",
            popularity=("score", "num_comments"),
            unpopular=5,
            id="id",
            match="none",
        )
    ).report()
    assert {arm: found["units"] for arm, found in report["arms"].items()} == {
        "short-popular": 399_998, "short-unpopular": 399_999, "long-popular": 399_929, "long-unpopular": 399_989,
    }  # fmt: skip
    assert report["left_out"] == {}
    files = (f"junk={folder / 'clickbait_data.gz'}", f"control={folder / 'non_clickbait_data.gz'}")
    report = Posts(Posts.Options(paths=files, recipe="m2", length_by="words", match="none")).report()
    assert {arm: found["posts"] for arm, found in report["arms"].items()} == {"junk": 15_999, "control": 16_001}


def test_a_pool_of_many_posts_needs_no_texts_in_memory(tmp_path: Path) -> None:
    """The pool holds numbers only: its arrays for 20,000 posts stay below a megabyte and a half."""
    from clbench.streams.posts import scan

    posts = [post(i, 3, 900) for i in range(20_000)]
    pool, _ = scan(source(write(tmp_path, posts), "m1").options)
    n_bytes = sum(np.asarray(pool.numpy(name)).nbytes for name in ("file", "row", "arm", "length", "community", "key"))
    assert len(pool.key) == 20_000
    assert n_bytes + pool.numpy("popularity").nbytes < 1_500_000
