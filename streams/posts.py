"""``posts``: arms for brain-rot controls, made of posts with a popularity column or with labels.

One stage; the *group* of a document is its arm (``junk``, ``control`` …), so that ``dose`` can mix arms into any stream
and every arm has held-out text and losses of its own. The recipes are those of "LLMs Can Get Brain Rot!" (arXiv
2510.13928, v2: control posts have popularity 0; v1 took at most 500) and the controls which that paper lacks:

    m1               junk: short and popular, control: long and unpopular
    m1_2x2           the four cells of length and popularity, so that the two effects can be told apart
    length_only      junk: short, control: long, whatever the popularity
    popularity_only  junk: popular, control: unpopular, whatever the length
    within           junk: top quarter by popularity within its community, control: bottom quarter of the same
                     community, as many units of each: popularity without a change of subject
    m2               junk and control by label

``fetch`` reads the files twice (choose, then copy) and keeps the arms and a report in the cache folder; memory holds a
few dozen bytes for every post that an arm may take, never the texts. How files are read: ``_posts_files``; how posts
are drawn: ``_posts_arms``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clbench import home
from clbench.errors import ConfigError, NotFoundError
from clbench.files import atomic_folder, digest_of, exclusive, read_json, remove_leftovers, sha256_file, write_json
from clbench.stream import Document, StageInfo, StreamSource
from clbench.streams._posts_arms import Drawn, Pool, Rule, draw, shared
from clbench.streams._posts_files import Row, digests, find_files, kind_of, progress, read_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 1
UNDATED = "1970-01-01"
"""The date of posts when no date column is given."""
SCAN_ROWS = 2048
Recipe = Literal["m1", "m1_2x2", "length_only", "popularity_only", "within", "m2"]
ARMS: dict[str, tuple[str, ...]] = {
    "m1_2x2": ("short-popular", "short-unpopular", "long-popular", "long-unpopular"),
}
"""Arms of a recipe; all others have JUNK and CONTROL."""
JUNK, CONTROL = "junk", "control"
BY_LENGTH = ("m1", "m1_2x2", "length_only")
BY_POPULARITY = ("m1", "m1_2x2", "popularity_only", "within")


class Posts(StreamSource):
    """Arms for brain-rot controls, made of posts with a popularity column or with labels.

    Raises (``fetch``, ``settings``):
        ConfigError: options contradict each other, a column is missing, or an arm stays empty.
        NotFoundError: a file is missing.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is read, how long a post is, and which posts are in which arm."""

        paths: tuple[str, ...]
        """JSONL, CSV (both also .gz, .zst) or Parquet files, or folders of them; other files: one post a line. For m2
        also ``junk=FILE+control=FILE``: then the file is the label."""
        recipe: Recipe
        """m1, m1_2x2, length_only, popularity_only, within or m2."""
        length_by: str
        """What length is: ``words``, ``bytes``, ``column:NAME`` (counted before) or ``tokenizer:FOLDER``."""
        bos: bool = False
        """Count a beginning of text with every post, as the paper did (its 30 and 100 are Llama-3 tokens with it)."""
        text: str = "text"
        """Column of the text."""
        popularity: tuple[str, ...] = ()
        """Columns whose sum is the popularity: likes+retweets+replies+quotes, or score+num_comments."""
        label: str = ""
        """Column of the label (m2)."""
        junk_labels: tuple[str, ...] = ("junk",)
        """Labels that make a post junk."""
        control_labels: tuple[str, ...] = ("control",)
        """Labels that make a post control."""
        community: str = ""
        """Column of the community (subreddit, forum): needed by within, reported by all."""
        id: str = ""
        """Column of the post's identity; without one its text is its identity."""
        date: str = ""
        """Column of the date: ISO-8601, or seconds since 1970."""
        short: int = 30
        """Short posts have a length below this."""
        long: int = 100
        """Long posts have a length above this."""
        longest: int | None = None
        """Long posts have at most this length; keeps the ratio of rows between the arms down."""
        popular: float = 500
        """Popular posts have a popularity above this."""
        unpopular: float = 0
        """Unpopular posts have at most this popularity. 0: the paper's v2; 500: its v1."""
        quantile: float = 0.25
        """Share of a community's posts at the top and at the bottom (within)."""
        ascii_only: bool = False
        """Leave out posts with any character beyond ASCII: the paper's filter for English."""
        match: Literal["tokens", "none"] = "tokens"
        """tokens: all arms hold as many units of length as the smallest; the last post is cut. none: all they have."""
        n_units: int | None = None
        """At most so many units of length in each arm."""
        seed: int = 0
        """Another seed draws other posts where there are more than needed."""

    name = "posts"
    heldout_fraction = 0.1

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        check_options(self.options)
        self._settings: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        """Return the options, the version, and the digest of every input file and of the tokenizer that measures."""
        if self._settings is None:
            given = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.options).items()}
            kind, _, where = self.options.length_by.partition(":")
            if kind == "tokenizer":
                given["length_by"] = f"tokenizer:{sha256_file(tokenizer_file(where))}"
            # What the files hold and how they are read decides, not where they lie.
            files = labelled_files(self.options)
            found = zip(files, digests([path for _, path in files]), strict=True)
            given["paths"] = [[label, kind_of(path), digest] for (label, path), digest in found]
            self._settings = {"version": VERSION, "options": given}
        return self._settings

    @property
    def folder(self) -> Path:
        """Where the chosen posts lie on this machine."""
        return home.sources_folder() / f"posts-{digest_of(self.settings())[:12]}"

    def fetch(self) -> None:
        """Choose the posts and keep them; nothing is fetched from a network."""
        if (self.folder / "report.json").is_file():
            return
        lock = self.folder.parent / ".locks" / self.folder.name
        with exclusive(lock, mend="wait for it to end, or end it", timeout_seconds=3600.0):
            if (self.folder / "report.json").is_file():
                return
            remove_leftovers(self.folder.parent)
            pool, counts = scan(self.options)
            drawn = draw(pool, rule_of(self.options))
            with atomic_folder(self.folder) as temporary:
                report = keep(pool, drawn, self.options, temporary / "posts.parquet")
                write_json(temporary / "report.json", report | {"left_out": dict(sorted(counts.items()))})

    def report(self) -> dict[str, Any]:
        """Return what the arms hold and what ran out, see ``describe``."""
        self.fetch()
        found: dict[str, Any] = read_json(self.folder / "report.json")
        return found

    def stages(self) -> list[StageInfo]:
        """Return the one stage."""
        dates = self.report()["dates"]
        return [StageInfo(index=0, name="pool", start=dates[0], end=dates[1])]

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield the chosen posts in the order of the files."""
        import pyarrow.parquet as pq

        self.fetch()
        with pq.ParquetFile(self.folder / "posts.parquet") as file:
            for batch in file.iter_batches(batch_size=SCAN_ROWS):
                for row in batch.to_pylist():
                    yield Document(**row, change="new")

    def extras(self) -> dict[str, bytes]:
        """Return ``arms.json``, the report."""
        return {"arms.json": json.dumps(self.report(), indent=2, sort_keys=True).encode()}


# --- options


def check_options(options: Posts.Options) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: naming the option and how to mend it.
    """
    problems = [
        (options.recipe in BY_POPULARITY and not options.popularity, "popularity names no column", "name them: a+b"),
        (options.recipe == "within" and not options.community, "community names no column", "name it"),
        (
            options.recipe == "m2" and not options.label and not all("=" in p for p in options.paths),
            "m2 has neither a label column nor a file for each label",
            "give label, or paths=junk=FILE+control=FILE",
        ),
        (options.short > options.long + 1, f"short {options.short} overlaps long {options.long}", "short <= long + 1"),
        (
            options.unpopular > options.popular,
            f"unpopular {options.unpopular} overlaps popular {options.popular}",
            "choose unpopular <= popular",
        ),
        (not 0 < options.quantile <= 0.5, f"quantile is {options.quantile}", "choose one in (0, 0.5]"),
        (options.n_units is not None and options.n_units < 1, f"n_units is {options.n_units}", "choose at least 1"),
        (
            not re.fullmatch(r"words|bytes|column:.+|tokenizer:.+", options.length_by),
            f"length_by is {options.length_by!r}",
            "choose words, bytes, column:NAME or tokenizer:FOLDER",
        ),
        (
            options.longest is not None and options.longest <= options.long,
            f"longest is {options.longest}",
            f"choose more than long, {options.long}",
        ),
    ]
    for wrong, what, mend in problems:
        if wrong:
            raise ConfigError(what, where=f"posts, recipe {options.recipe}", mend=mend)


def arms_of(recipe: str) -> tuple[str, ...]:
    """Return the names of a recipe's arms."""
    return ARMS.get(recipe, (JUNK, CONTROL))


def rule_of(options: Posts.Options) -> Rule:
    """Return how much is drawn of each arm."""
    return Rule(
        arms=arms_of(options.recipe),
        where=f"posts, recipe {options.recipe}",
        within=options.recipe == "within",
        match=options.match == "tokens",
        n_units=options.n_units,
        quantile=options.quantile,
        seed=options.seed,
    )


def labelled_files(options: Posts.Options) -> list[tuple[str, Path]]:
    """Return (label, file) of all input files, in the order given; the label is empty where none was."""
    found = []
    for given in options.paths:
        label, equals, path = given.partition("=") if options.recipe == "m2" else ("", "", given)
        found += [(label if equals else "", file) for file in find_files(Path(path if equals else given).expanduser())]
    return found


def tokenizer_file(folder: str) -> Path:
    """Return the tokenizer.json of a folder, or the file itself."""
    path = Path(folder).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise NotFoundError("the tokenizer is missing", where=path, mend="give a folder that holds tokenizer.json")
    return path


# --- length


class Ruler:
    """Measures and cuts texts in the unit that was asked for."""

    def __init__(self, length_by: str, *, bos: bool) -> None:
        self.kind, _, self.where = length_by.partition(":")
        self.extra = int(bos)
        self.tokenizer: Tokenizer | None = None
        if self.kind == "tokenizer":
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(str(tokenizer_file(self.where)))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()

    def lengths(self, rows: Sequence[Row], texts: Sequence[str]) -> list[int]:
        """Return the length of every post.

        Raises:
            ConfigError: a row has no count in the column that was named.
        """
        if self.kind == "words":
            found = [len(text.split()) for text in texts]
        elif self.kind == "bytes":
            found = [len(text.encode()) for text in texts]
        elif self.tokenizer is not None:
            encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            found = [len(one.ids) for one in encoded]
        else:
            found = [int(number(row, self.where)) for row in rows]
        return [n + self.extra for n in found]

    def cut(self, text: str, n_units: int) -> tuple[str, int]:
        """Return the beginning of a text of ``n_units``, and how long it came out; empty where it cannot be cut.

        Bytes are cut before a character that would be split; a count in a column says nothing about parts of a text.
        """
        n = n_units - self.extra
        if n < 1 or self.kind == "column":
            return "", 0
        if self.kind == "bytes":
            kept = text.encode()[:n].decode(errors="ignore")
            return kept, len(kept.encode()) + self.extra
        if self.kind == "words":
            ends = [match.end() for match in islice(re.finditer(r"\S+", text), n)]
        else:
            assert self.tokenizer is not None
            ends = [end for _, end in self.tokenizer.encode(text, add_special_tokens=False).offsets[:n]]
        kept = text[: ends[-1]] if ends else ""
        return kept, self.lengths([{}], [kept])[0] if kept else 0


def number(row: Row, column: str) -> float:
    """Return the number in a column of a row.

    Raises:
        ConfigError: it holds none.
    """
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError):
        has = ", ".join(sorted(map(str, row)))
        what = f"column {column!r} holds no number" if column in row else f"there is no column {column!r}"
        raise ConfigError(what, where=f"a row with the columns {has}", mend="name the right column") from None


# --- choosing


def scan(options: Posts.Options) -> tuple[Pool, Counter[str]]:
    """Read all files once and return the posts that an arm may take, and how many were left out by reason."""
    pool, counts, seen = Pool(), Counter[str](), set[int]()
    ruler = Ruler(options.length_by, bos=options.bos)
    for place, (label, path) in enumerate(labelled_files(options)):
        rows = enumerate(read_rows(path, counts))
        with progress(f"reading {path.name}") as advance:
            while batch := list(islice(rows, SCAN_ROWS)):
                pool.n_rows += len(batch)
                wanted = [one for one in batch if _is_wanted(one[1], options, label, seen, counts, path)]
                _add(pool, place, wanted, options, label, ruler, counts)
                advance(len(batch))
    return pool, counts


def _is_wanted(row: Row, options: Posts.Options, label: str, seen: set[int], counts: Counter[str], path: Path) -> bool:
    """Tell whether an arm may take this row whatever its length, and count why not."""
    if options.text not in row:
        has = ", ".join(sorted(map(str, row)))
        raise ConfigError(f"there is no column {options.text!r}, but {has}", where=path, mend="name the text's column")
    text = row[options.text]
    if not isinstance(text, str) or not text.strip():
        reason = "no text"
    elif "\ufffd" in text or any("\ud800" <= c <= "\udfff" for c in text):
        reason = "damaged characters"
    elif options.ascii_only and not text.isascii():
        reason = "not ASCII"
    elif options.recipe in ("m1", "m1_2x2", "popularity_only") and _by_popularity(row, options) is None:
        reason = "neither popular nor unpopular"
    elif options.recipe == "m2" and _by_label(row, options, label) is None:
        reason = "another label"
    elif options.recipe == "within" and row.get(options.community) in (None, ""):
        reason = "no community"
    elif (identity := key_of(identity_of(row, options), 0)) in seen:
        reason = "same identity"
    else:
        seen.add(identity)
        return True
    counts[reason] += 1
    return False


def _by_popularity(row: Row, options: Posts.Options) -> str | None:
    """Return popular or unpopular; None between the two."""
    value = sum(number(row, column) for column in options.popularity)
    return "popular" if value > options.popular else "unpopular" if value <= options.unpopular else None


def _by_label(row: Row, options: Posts.Options, label: str) -> str | None:
    """Return the arm that the label of a row, or of its file, stands for."""
    value = label or str(row.get(options.label, ""))
    if label and label in (JUNK, CONTROL):
        return label
    return JUNK if value in options.junk_labels else CONTROL if value in options.control_labels else None


def identity_of(row: Row, options: Posts.Options) -> str:
    """Return the identity of a post, which also decides whether it is held out."""
    if options.id:
        return str(row[options.id]) if row.get(options.id) not in (None, "") else f"sha256:{_hash(row, options)}"
    return f"sha256:{_hash(row, options)}"


def _hash(row: Row, options: Posts.Options) -> str:
    return hashlib.sha256(str(row[options.text]).encode()).hexdigest()[:24]


def key_of(identity: str, seed: int) -> int:
    """Return 64 bits that order posts at random, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{identity}".encode()).digest()[:8], "big")


def _add(
    pool: Pool,
    file: int,
    rows: list[tuple[int, Row]],
    options: Posts.Options,
    label: str,
    ruler: Ruler,
    counts: Counter[str],
) -> None:
    """Put the rows that an arm may take into the pool."""
    arms = arms_of(options.recipe)
    lengths = ruler.lengths([row for _, row in rows], [row[options.text] for _, row in rows])
    for (place, row), length in zip(rows, lengths, strict=True):
        arm = arm_of(row, length, options, label)
        if arm is None:
            counts["between short and long" if options.recipe in BY_LENGTH else "between arms"] += 1
            continue
        pool.file.append(file)
        pool.row.append(place)
        pool.arm.append(arms.index(arm) if arm else -1)
        pool.length.append(length)
        pool.popularity.append(sum(number(row, column) for column in options.popularity))
        community = str(row.get(options.community, "")) if options.community else ""
        pool.community.append(pool.communities.setdefault(community, len(pool.communities)))
        pool.key.append(key_of(identity_of(row, options), options.seed))


def arm_of(row: Row, length: int, options: Posts.Options, label: str) -> str | None:
    """Return the arm of a post: None for no arm, empty where only its community decides."""
    if options.recipe == "within":
        return ""
    if options.recipe == "m2":
        return _by_label(row, options, label)
    is_long = length > options.long and (options.longest is None or length <= options.longest)
    size = "short" if length < options.short else "long" if is_long else None
    if options.recipe == "length_only":
        return {"short": JUNK, "long": CONTROL, None: None}[size]
    popularity = _by_popularity(row, options)
    if options.recipe == "popularity_only":
        return {"popular": JUNK, "unpopular": CONTROL, None: None}[popularity]
    if options.recipe == "m1_2x2":
        return None if size is None or popularity is None else f"{size}-{popularity}"
    return {("short", "popular"): JUNK, ("long", "unpopular"): CONTROL}.get((size or "", popularity or ""))


# --- keeping


def keep(pool: Pool, drawn: Drawn, options: Posts.Options, path: Path) -> dict[str, Any]:
    """Copy the drawn posts into one Parquet file and return the report."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in ("id", "text", "date", "group")])
    arms = arms_of(options.recipe)
    measured = _Measured(arms)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        documents = _drawn_documents(pool, drawn, options, measured)
        while batch := list(islice(documents, SCAN_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
    return describe(pool, drawn, options, measured)


@dataclass
class _Measured:
    """What is known of the arms only while their texts go by."""

    arms: tuple[str, ...]
    dates: set[str] = field(default_factory=set)
    posts: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    n_bytes: Counter[str] = field(default_factory=Counter)
    n_cut: Counter[str] = field(default_factory=Counter)
    words: dict[str, list[str]] = field(default_factory=dict)
    """The words of the first posts of every arm, in the order of the files, for the type-token ratio."""


WORDS_OF_RATIO = 200_000
"""Words that a type-token ratio is taken over, at most: it falls with their number, so all arms get as many."""


def _drawn_documents(pool: Pool, drawn: Drawn, options: Posts.Options, measured: _Measured) -> Iterator[dict[str, str]]:
    """Read the files again and yield the drawn posts; posts that were to be cut are."""
    ruler = Ruler(options.length_by, bos=options.bos)
    file, row = pool.numpy("file")[drawn.place], pool.numpy("row")[drawn.place]
    length = pool.numpy("length")[drawn.place]
    for place, (_, path) in enumerate(labelled_files(options)):
        here = np.flatnonzero(file == place)
        wanted = dict(zip(row[here].tolist(), here.tolist(), strict=True))
        with progress(f"copying from {path.name}") as advance:
            for number_, found in enumerate(read_rows(path, Counter())):
                if (at := wanted.get(number_)) is not None:
                    text, n_units = str(found[options.text]), int(drawn.n_units[at])
                    arm = measured.arms[int(drawn.arm[at])]
                    if n_units < length[at]:
                        text, n_units = ruler.cut(text, n_units)
                        measured.n_cut[arm] += 1
                    if text:
                        yield _document(found, text, n_units, arm, options, measured)
                advance(1)


def _document(
    row: Row, text: str, n_units: int, arm: str, options: Posts.Options, measured: _Measured
) -> dict[str, str]:
    """Return one document, counted."""
    date = date_of(row, options.date)
    measured.dates.add(date)
    measured.posts[arm] += 1
    measured.units[arm] += n_units
    measured.n_bytes[arm] += len(text.encode())
    words = measured.words.setdefault(arm, [])
    if len(words) < WORDS_OF_RATIO:
        words += re.findall(r"\w+", text.lower())
    return {"id": identity_of(row, options), "text": text, "date": date, "group": arm}


def date_of(row: Row, column: str) -> str:
    """Return the UTC date of a row; UNDATED without a column.

    Raises:
        ConfigError: the column holds no date.
    """
    if not column:
        return UNDATED
    value = row.get(column)
    try:
        if isinstance(value, datetime):
            return _utc_day(value)
        if isinstance(value, str) and not re.fullmatch(r"\d{9,}(\.\d*)?", value):
            return _utc_day(datetime.fromisoformat(value))
        return datetime.fromtimestamp(float(value), UTC).date().isoformat()  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        raise ConfigError(
            f"{value!r} is no date", where=f"column {column!r}", mend="name a column of ISO dates or seconds since 1970"
        ) from None


def _utc_day(moment: datetime) -> str:
    """Return the day; a moment without a zone is UTC already."""
    return (moment.astimezone(UTC) if moment.tzinfo else moment).date().isoformat()


def describe(pool: Pool, drawn: Drawn, options: Posts.Options, measured: _Measured) -> dict[str, Any]:
    """Return the report: what every arm holds, what the arms share, and what ran out."""
    n_words = min((len(words) for words in measured.words.values()), default=0)
    n_words = min(n_words, WORDS_OF_RATIO)
    communities = pool.numpy("community")[drawn.place]
    arms = {}
    for a, arm in enumerate(measured.arms):
        own = communities[drawn.arm == a]
        arms[arm] = {
            "posts": measured.posts[arm],
            "units": measured.units[arm],
            "mean_length": measured.units[arm] / max(1, measured.posts[arm]),
            "bytes": measured.n_bytes[arm],
            "cut": measured.n_cut[arm],
            "type_token_ratio": len(set(measured.words.get(arm, [])[:n_words])) / max(1, n_words),
            "communities": len(np.unique(own)) if options.community else None,
            "eligible_posts": drawn.eligible[arm]["posts"],
            "eligible_units": drawn.eligible[arm]["units"],
        }
    return {
        "recipe": options.recipe,
        "length_by": options.length_by.partition(":")[0],
        "rows_read": pool.n_rows,
        "arms": arms,
        "binding": drawn.binding,
        "words_of_type_token_ratio": n_words,
        "shared_communities": shared(communities, drawn.arm, measured.arms) if options.community else None,
        "dates": [min(measured.dates), max(measured.dates)],
    }
