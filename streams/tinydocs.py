"""``tinydocs``: a small generated stream for tests, ``clbench doctor`` and first steps; no download.

Every stage writes with invented words of its own (its topic) around the same sentence patterns, so the text
drifts and a small model forgets. From stage 1 on a quarter of the documents recur unchanged and a quarter
recur changed. It says nothing about real text: measure on a real stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clbench.errors import ConfigError
from clbench.seeds import derive, permutation
from clbench.stream import Change, Document, StageInfo, StreamSource

VERSION = 1
FIRST_YEAR = 2001
WORDS_PER_TOPIC = 48
SYLLABLES_PER_TOPIC = 12
ONSETS = (*"bdfghklmnprstvwz", "br", "ch", "dr", "gl", "pr", "qu", "sh", "sk", "st", "tr")
VOWELS = ("a", "ai", "e", "ea", "i", "o", "oo", "ou", "u")
CODAS = ("l", "m", "n", "nd", "r", "rk", "s", "st", "x")
PATTERNS = (
    "The {} of a {} is read before the {} is called.",
    "Use {} when every {} has a {} of its own.",
    "Each {} returns one {} and keeps the {} as it was.",
    "If the {} is missing, {} raises an error and names the {}.",
    "Since this release {} replaces {}, which still accepts a {}.",
    "A {} may be shared between one {} and another {}.",
    "See also {}, {} and the notes about {}.",
    "By default the {} waits for {} until the {} is closed.",
)

_Pages = dict[int, tuple[tuple[int, ...], Change]]


class Tinydocs(StreamSource):
    """Generated documents over stage-specific vocabularies.

    Raises:
        ConfigError: fewer than one stage or fewer than twenty documents in a stage.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is generated."""

        n_stages: int = 4
        """Stages, one invented year each."""
        documents_per_stage: int = 60
        """Documents in every stage, train and held-out together."""
        seed: int = 0
        """Another seed is another stream."""

    name = "tinydocs"
    heldout_fraction = 0.2
    vocab_size = 512

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        n_stages, documents_per_stage = self.options.n_stages, self.options.documents_per_stage
        if n_stages < 1 or documents_per_stage < 20:
            raise ConfigError(
                "tinydocs needs at least 1 stage and 20 documents in each",
                where=f"n_stages={n_stages}, documents_per_stage={documents_per_stage}",
                mend="raise them",
            )
        self.n_stages, self.documents_per_stage, self.seed = n_stages, documents_per_stage, self.options.seed

    def stages(self) -> list[StageInfo]:
        """Return one invented year per stage."""
        years = range(FIRST_YEAR, FIRST_YEAR + self.n_stages)
        return [
            StageInfo(index=i, name=str(year), start=f"{year}-01-01", end=f"{year}-12-31")
            for i, year in enumerate(years)
        ]

    def settings(self) -> dict[str, Any]:
        """Return the options and the version of the generator."""
        return {
            "version": VERSION,
            "n_stages": self.n_stages,
            "documents_per_stage": self.documents_per_stage,
            "seed": self.seed,
        }

    def documents(self, stage: int) -> Iterator[Document]:
        """Yield the documents of a stage: recurring ones first, then new ones."""
        topics = [self._topic(k) for k in range(stage + 1)]
        for page, (revisions, change) in self._pages(stage).items():
            yield Document(
                id=f"tinydocs/page-{page:05d}",
                text=self._text(page, revisions, topics),
                date=f"{FIRST_YEAR + stage}-{page % 12 + 1:02d}-{page % 28 + 1:02d}",
                group=f"group-{page % 5}",
                change=change,
            )

    def _pages(self, stage: int) -> _Pages:
        """Return the pages of a stage: the stages that wrote each (created, then revised), and its change."""
        n, quarter = self.documents_per_stage, self.documents_per_stage // 4
        pages: _Pages = {page: ((0,), "new") for page in range(n)}
        for k in range(1, stage + 1):
            before = list(pages)
            chosen = [before[i] for i in permutation(n, self.seed, "tinydocs", "recur", k)[: 2 * quarter]]
            kept: _Pages = {p: (pages[p][0], "unchanged") for p in chosen[:quarter]}
            kept |= {p: ((*pages[p][0], k), "changed") for p in chosen[quarter:]}
            pages = kept | {p: ((k,), "new") for p in range(k * n, (k + 1) * n - len(kept))}
        return pages

    def _text(self, page: int, revisions: tuple[int, ...], topics: list[list[str]]) -> str:
        """Return a page: heading and sentences of its first stage, and a paragraph for every revision."""
        heading, *rest = self._sentences(page, revisions[0], topics, 5, 13)
        paragraphs = [f"Page {page}: {heading}", " ".join(rest)]
        paragraphs += [" ".join(self._sentences(page, stage, topics, 2, 5)) for stage in revisions[1:]]
        return "\n\n".join(paragraphs) + "\n"

    def _sentences(self, page: int, stage: int, topics: list[list[str]], low: int, high: int) -> list[str]:
        """Return between ``low`` and ``high - 1`` sentences about the stage's topic."""
        count, *draws = _uniform(1 + 4 * high, self.seed, "tinydocs", "page", page, stage)
        sentences = []
        for i in range(low + int(count * (high - low))):
            pattern, *words = draws[4 * i : 4 * i + 4]
            # A skewed choice, as in language: the square of a uniform number picks early words more often.
            sentences.append(_pick(PATTERNS, pattern).format(*(_pick(topics[stage], word * word) for word in words)))
        return sentences

    def _topic(self, stage: int) -> list[str]:
        """Return the invented words of a stage, short ones first, made of the stage's own syllables."""
        draws = _uniform(3 * SYLLABLES_PER_TOPIC, self.seed, "tinydocs", "syllables", stage)
        syllables = [
            _pick(ONSETS, a) + _pick(VOWELS, b) + _pick(CODAS, c)
            for a, b, c in zip(draws[::3], draws[1::3], draws[2::3], strict=True)
        ]
        draws = _uniform(3 * WORDS_PER_TOPIC, self.seed, "tinydocs", "topic", stage)
        words = [draws[3 * i : 3 * i + (2 if i < WORDS_PER_TOPIC // 2 else 3)] for i in range(WORDS_PER_TOPIC)]
        return ["".join(_pick(syllables, draw) for draw in word) for word in words]


def _uniform(n: int, root: int, *names: int | str) -> list[float]:
    """Return ``n`` numbers in [0, 1) from the raw Philox stream, the only one numpy promises to keep."""
    raw = np.random.Philox(key=derive(root, *names)).random_raw(n)
    return [float(x) for x in (raw >> np.uint64(11)) * 2.0**-53]


def _pick(items: Sequence[str], uniform: float) -> str:
    """Return the item at a place in [0, 1)."""
    return items[int(len(items) * uniform)]
