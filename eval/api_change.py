"""Suite ``api_change``: what a checkpoint holds true of interfaces whose signature or place depends on the version.

Questions are multiple choice, made from the dated releases that a ``codedocs`` stream consists of; every candidate is
scored and compared with the truth of every period, so a stale answer is told from a wrong one on real facts. Facts
and candidates: ``_api_facts``; wording: ``_api_questions``; docs/api-change.md. Signatures come from the stream's
source after the build (``clbench.late``), so no stream and no track changes. What answers add up to is left to
``clbench.results.temporal``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench import late
from clbench.errors import ConfigError
from clbench.eval._api_changes import count_changes
from clbench.eval._api_facts import Fact, Package, facts_of, read
from clbench.eval._api_questions import DATED, PLAIN, PREMISES, answer_text, prompt_of
from clbench.eval._forward import prefix_token_id
from clbench.eval._scorer import Question, choice_nats, encode_question
from clbench.files import digest_of, sha256_bytes
from clbench.stream import Stream, identity_of
from clbench.suite import Checkpoint, Rows, Suite

SIGNATURES = "api.jsonl"
UNNAMED, PREMISE = -1, -2
"""What questions are about that name no version, and those that ask nothing."""
NORMS = ("", "_norm", "_pmi")
"""Endings of metrics: the answer is the candidate whose log-likelihood is highest, is highest a byte, or is raised most
above that behind PREMISES (pointwise mutual information, Holtzman et al. 2021)."""
Array = NDArray[np.float64]


class ApiChange(Suite):
    """What a checkpoint answers about dated facts of Python packages, against the truth of every period.

    Raises (``measure``):
        NotFoundError: the stream is not made of releases, or their files are not on this machine any more.
        ConfigError: the tokenizer cannot tell candidates apart, or no question can be made of this stream.
        NonFiniteError: a score is NaN or infinite; the question is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """How many facts are asked."""

        per_package: int = 24
        """Facts that change, of each package and attribute, at most; of those that never do, a quarter as many."""
        stream: str = ""
        """For `clbench prepare suite:api_change:stream=NAME`: whose questions are made; decides no value."""
        tokens_per_batch: int | None = None
        """Positions in one forward pass; chosen by device when not given. Decides no value."""

    name = "api_change"
    version = 1
    example = "codedocs-nano"
    options: Options

    def __init__(self, stream: Stream, options: Options | None = None) -> None:
        super().__init__(stream, options)
        for name in ("per_package", "tokens_per_batch"):
            if (value := getattr(self.options, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}", where="suite api_change")
        self._work: tuple[Any, list[Question]] | None = None

    @classmethod
    def prepare(cls, options: Options | None = None) -> dict[str, Any]:
        """Build the stream that the options name, fetch its releases if need be, and make its questions."""
        target = (options or cls.Options()).stream
        if not target:
            return {}
        stream, path = late.prepare_extra(target, SIGNATURES)
        suite = cls(stream, options)
        return {"stream": stream.name, "file": str(path), **suite.summary()}

    def sha256(self) -> str:
        """Return the digest of name, version and what decides the questions."""
        return digest_of({"name": self.name, "version": self.version, "per_package": self.options.per_package})

    def data_sha256(self) -> str:
        """Return the digest of the stream and the signatures of its releases."""
        return digest_of({"stream": self.stream.sha256, "signatures": sha256_bytes(self._signatures)})

    @cached_property
    def _signatures(self) -> bytes:
        return late.late_extra(self.stream, SIGNATURES)

    @cached_property
    def packages(self) -> list[Package]:
        """The packages of the stream with everything that they define.

        Raises:
            ConfigError: their stages are not those of the stream.
        """
        stages, packages = read(self._signatures, where=self.stream.folder)
        if stages != tuple(stage.name for stage in self.stream.stages()):
            raise ConfigError(
                "the releases do not stand in the stages of this stream",
                where=f"stream {self.stream.name!r}",
                mend="measure api_change on the stream of releases itself, not on a rearranged one",
            )
        return packages

    @cached_property
    def facts(self) -> list[Fact]:
        """The facts that are asked."""
        facts = facts_of(self.packages, per_package=self.options.per_package)
        if not facts:
            raise ConfigError("its releases document no function to ask about", where=f"stream {self.stream.name!r}")
        return facts

    @cached_property
    def groups(self) -> list[str]:
        """Of each fact its attribute, and whether a document about it trained: ``module, trained``, ``…, heldout``."""
        trained: set[str] = set()
        for stage in self.stream.stages():
            for batch in self.stream.document_batches("train", stage.index, ["id"]):
                trained.update(map(identity_of, batch.column("id").to_pylist()))
        split = {True: "trained", False: "heldout"}
        return [f"{fact.attribute}, {split[not trained.isdisjoint(fact.documents.values())]}" for fact in self.facts]

    def summary(self) -> dict[str, Any]:
        """Return how many questions there are, by kind, period and group, and the changes they are drawn from."""
        names = {stage.index: stage.name for stage in self.stream.stages()}
        kinds = Counter((stage, kind) for fact in self.facts for stage, kind in fact.kinds.items())
        return {
            "n_facts": len(self.facts),
            "n_changing": sum(fact.changes for fact in self.facts),
            "n_questions": sum(about != PREMISE for _, about, _ in self.asked),
            "groups": dict(sorted(Counter(self.groups).items())),
            "kinds": {names[s]: {k: n for (stage, k), n in sorted(kinds.items()) if stage == s} for s in names},
            "changes": {names[stage]: dict(found) for stage, found in count_changes(self.packages).items()},
        }

    @cached_property
    def asked(self) -> list[tuple[int, int, str]]:
        """Of every question, its fact's place, the stage that it asks about (or UNNAMED, PREMISE) and its prompt."""
        return list(_asked(self.facts))

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return rows ``METRIC:FORM`` for every fact and period with a truth, and its chances: docs/api-change.md."""
        questions = self._questions(checkpoint)
        names = [f"question {prompt!r}" for _, _, prompt in self.asked]
        found = choice_nats(checkpoint, questions, tokens_per_batch=self.options.tokens_per_batch, names=names)
        return self._rows([scores for scores, _ in found])

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of a forward pass over contexts and candidates, without padding."""
        from clbench.train.models import model_forward_flops

        sizes = [len(q.context) + sum(len(choice) - 1 for choice in q.choices) for q in self._questions(checkpoint)]
        lengths, counts = np.unique(sizes, return_counts=True)
        return sum(
            model_forward_flops(checkpoint.model, n_tokens=int(length * count), length=int(length))
            for length, count in zip(lengths, counts, strict=True)
        )

    def _questions(self, checkpoint: Checkpoint) -> list[Question]:
        """Return the questions in token ids; they are kept, as every checkpoint of a run is asked the same."""
        if self._work is None or self._work[0] is not checkpoint.tokenizer:
            tokenizer = checkpoint.tokenizer or _own_tokenizer(self.stream)
            self._work = (checkpoint.tokenizer, [_question(tokenizer, self.facts[f], p) for f, _, p in self.asked])
        return self._work[1]

    def _rows(self, scores: Sequence[Array]) -> Rows:
        """Compare every answer with the truth of every period that its question is about."""
        cells: list[tuple[str, int, str, float, str, str]] = []
        premise = {
            place: nats_C for (place, about, _), nats_C in zip(self.asked, scores, strict=True) if about == PREMISE
        }
        for (place, about, _), nats_C in zip(self.asked, scores, strict=True):
            fact, group = self.facts[place], self.groups[place]
            form = PLAIN if about == UNNAMED else DATED
            for stage in () if about == PREMISE else fact.values if about == UNNAMED else (about,):
                values = {f"{name}:{form}": v for name, v in _values(fact, stage, nats_C, premise[place]).items()}
                if about == UNNAMED:
                    values |= _chances(fact, stage)
                cells += [(fact.item, stage, metric, v, group, fact.kinds[stage]) for metric, v in values.items()]
        item, stages, metric, value, groups, change = map(list, zip(*cells, strict=True))
        ones = np.ones(len(cells), np.int64)
        return Rows(
            item=item,
            stage=np.array(stages, np.int64),
            metric=metric,
            value=np.array(value, np.float64),
            n_tokens=ones,
            n_bytes=ones,
            group=groups,
            change=change,
        )


def _asked(facts: Sequence[Fact]) -> Iterator[tuple[int, int, str]]:
    for place, fact in enumerate(facts):
        yield place, PREMISE, PREMISES[fact.attribute]
        yield place, UNNAMED, prompt_of(fact, None)
        for stage, release in sorted(fact.releases.items()):
            yield place, stage, prompt_of(fact, release)


def _own_tokenizer(stream: Stream) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stream.tokenizer_folder)


def _question(tokenizer: Any, fact: Fact, prompt: str) -> Question:
    """Tokenise one question, behind the token that stands before every document in training.

    Raises:
        ConfigError: two candidates have the same tokens.
    """
    start = tokenizer.decode(prefix_token_id(tokenizer))
    pairs = [encode_question(tokenizer, start + prompt, answer_text(fact, answer)) for answer in fact.candidates]
    choices = [choice for _, choice in pairs]
    if len(set(map(tuple, choices))) < len(choices):
        raise ConfigError(
            f"the tokenizer does not tell the answers to {prompt!r} apart",
            where="suite api_change",
            mend="take a tokenizer that keeps all characters",
        )
    return Question(pairs[0][0], choices)


def _older(fact: Fact, stage: int) -> set[str]:
    """Return what was true before and is not any more."""
    return {value for earlier, value in fact.values.items() if earlier < stage} - {fact.values[stage]}


def _values(fact: Fact, stage: int, nats_C: Array, premise_C: Array) -> dict[str, float]:
    """Return each metric's value in one period; answers that tie for the first place share it.

    ``acc`` and ``outdated`` say whether the first place has the truth or an older one, ``choice_nats`` is the
    negative log-probability of the truth among the candidates. ``nats_C`` are log-likelihoods of the candidates behind
    the question, ``premise_C`` behind the premise.
    """
    truth = fact.candidates.index(fact.values[stage])
    older = [answer in _older(fact, stage) for answer in fact.candidates]
    n_bytes = np.array([len(answer_text(fact, answer).encode()) for answer in fact.candidates])
    found: dict[str, float] = {}
    for ending, scores in zip(NORMS, (nats_C, nats_C / n_bytes, nats_C - premise_C), strict=True):
        best = scores == scores.max()
        found[f"acc{ending}"] = float(best[truth] / best.sum())
        found[f"outdated{ending}"] = float(best[older].sum() / best.sum())
    peak = nats_C.max()
    found["choice_nats"] = float(np.log(np.exp(nats_C - peak).sum()) + peak - nats_C[truth])
    return found


def _chances(fact: Fact, stage: int) -> dict[str, float]:
    """Return how often a blind pick is right, and outdated."""
    n = len(fact.candidates)
    return {"chance": 1 / n, "chance_outdated": len(_older(fact, stage)) / n}
