"""Suite ``facts``: every fact of a generated world is asked at every checkpoint, about every stage's truth at once.

A question is a prompt and a list of candidates ("The metal of Brako is" + " copper", " tin" …); the answer is the
candidate with the highest likelihood. Prompt and candidate are tokenised as one text. A candidate's score is the sum of
the log-probabilities of its text's tokens from the first place on where *any* candidate's text leaves the prompt's
tokens: where a tokenizer merges over the boundary, all candidates are scored from the same, earlier place.

Stream and truth table: docs/facts.md. What the answers add up to is left to ``clbench.results.knowledge``.
Letters in names: Q questions, C candidates, W rows of a batch, T positions, P scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError, NonFiniteError
from clbench.eval._forward import HEAD_CHUNK, TOKENS_PER_BATCH, batches, head_is_all, prefix_token_id, undisturbed
from clbench.files import digest_of, sha256_bytes
from clbench.results.knowledge import Truth
from clbench.stream import Stream
from clbench.suite import Checkpoint, Rows, Suite

if TYPE_CHECKING:
    import torch

IntArray = NDArray[np.int64]
TRUTH = "facts.jsonl"
ENCODE_CHUNK = 10_000
METRICS = ("right", "choice_nats", "answer_nats")
"""Whether the truth is on top (1, 0, or 1/m among m that tie); its nats among the candidates, and its plain nats."""


class Facts(Suite):
    """What a checkpoint answers about every fact, against the truth of every stage in which it has one.

    Raises (``measure``):
        NotFoundError: the stream has no truth table.
        ConfigError: the tokenizer cannot tell candidates apart, or a question is longer than the model reads.
        NonFiniteError: a score is NaN or infinite; the question is named.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Nothing here decides the values."""

        tokens_per_batch: int | None = None
        """Positions in one forward pass; chosen by device when not given. Less needs less memory."""

    name = "facts"
    version = 1
    example = "facts:n_entities=14,n_attributes=3,n_values=5,n_stages=4,exposures=5"
    options: Options

    def __init__(self, stream: Stream, options: Options | None = None) -> None:
        super().__init__(stream, options)
        if (size := self.options.tokens_per_batch) is not None and size < 1:
            raise ConfigError(f"tokens_per_batch must be at least 1, not {size}", where="suite facts")
        self._work: tuple[Any, _Work] | None = None

    def sha256(self) -> str:
        """Return the digest of name and version; ``tokens_per_batch`` moves values by rounding only."""
        return digest_of({"name": self.name, "version": self.version})

    def data_sha256(self) -> str:
        """Return the digest of the stream and its truth table."""
        return digest_of({"stream": self.stream.sha256, "truth": sha256_bytes(self.stream.extra(TRUTH))})

    @cached_property
    def truth(self) -> Truth:
        """The stream's truth table."""
        truth = Truth.parse(self.stream.extra(TRUTH), where=self.stream.folder)
        names = tuple(stage.name for stage in self.stream.stages())
        if truth.stages != names:
            raise ConfigError(
                f"the truth table is about stages {', '.join(truth.stages)}, the stream has {', '.join(names)}",
                where=f"stream {self.stream.name!r}",
                mend="measure facts on the generated stream itself, not on a rearranged one",
            )
        return truth

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return rows ``METRIC:FORM`` for every fact and stage with a truth; ``change`` is what befell it then."""
        work = self._prepare(checkpoint)
        with undisturbed(checkpoint.model, checkpoint.device):
            nats = candidate_nats(checkpoint, work, self.options.tokens_per_batch)
        return self._rows(work, nats)

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of a forward pass over the inputs that are computed, without padding."""
        from clbench.train.models import model_forward_flops

        lengths, counts = np.unique(self._prepare(checkpoint).n_input, return_counts=True)
        return sum(
            model_forward_flops(checkpoint.model, n_tokens=int(length * count), length=int(length))
            for length, count in zip(lengths, counts, strict=True)
        )

    def _prepare(self, checkpoint: Checkpoint) -> _Work:
        """Return questions and inputs; they are kept, as every checkpoint of a run is asked the same."""
        if self._work is None or self._work[0] is not checkpoint.tokenizer:
            self._work = (checkpoint.tokenizer, make_work(self.stream, self.truth, checkpoint.tokenizer))
        _check_fits(checkpoint.model, self._work[1])
        return self._work[1]

    def _rows(self, work: _Work, nats: Sequence[NDArray[np.float64]]) -> Rows:
        """Compare every answer with the truth of every stage."""
        columns: dict[str, list[Any]] = {name: [] for name in ("item", "stage", "metric", "value", "group", "change")}
        lengths: list[tuple[int, int]] = []
        for question, scores in zip(work.questions, nats, strict=True):
            fact, codes = self.truth.facts[question.fact], self.truth.code[question.fact].tolist()
            values = question_values(scores)
            for stage, code in enumerate(codes):
                if code < 0:
                    continue
                for metric in METRICS:
                    row = (fact.fact, stage, f"{metric}:{question.form}", values[metric][code])
                    for name, cell in zip(columns, (*row, fact.attribute, fact.kind[stage]), strict=True):
                        columns[name].append(cell)
                    answer = self.truth.candidates[fact.attribute][code]
                    lengths.append((question.n_scored[code], len(f" {answer}".encode())))
        return Rows(
            item=columns["item"],
            stage=np.array(columns["stage"], np.int64),
            metric=columns["metric"],
            value=np.array(columns["value"], np.float64),
            n_tokens=np.array([n for n, _ in lengths], np.int64),
            n_bytes=np.array([n for _, n in lengths], np.int64),
            group=columns["group"],
            change=columns["change"],
        )


def question_values(nats_C: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return each metric's value for every candidate, were it the truth."""
    best = nats_C == nats_C.min()
    total = np.log(np.exp(nats_C.min() - nats_C).sum()) - nats_C.min()
    return {"right": best / best.sum(), "choice_nats": nats_C + total, "answer_nats": nats_C}


# --- questions and what has to be computed for them


@dataclass(frozen=True)
class Question:
    """One question about one fact (by its place in the truth table) and the scored tokens of each candidate."""

    fact: int
    form: str
    prompt: str
    n_scored: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Inputs and what is read off them.

    Entry e adds the negative log-probability of token ``target[e]`` after position ``position[e]`` of input
    ``row[e]`` to candidate ``candidate[e]``, counted through all questions. Entries are in the order of their inputs.
    """

    questions: list[Question]
    inputs: list[NDArray[np.int32]]
    row: IntArray
    position: IntArray
    target: IntArray
    candidate: IntArray

    @property
    def n_input(self) -> IntArray:
        return np.array([len(ids) for ids in self.inputs], np.int64)


def make_work(stream: Stream, truth: Truth, tokenizer: Any) -> _Work:
    """Tokenise all questions with the stream's tokenizer (None) or another one, and find the distinct inputs."""
    prefix = stream.eos_id if tokenizer is None else prefix_token_id(tokenizer)
    asked = [(f, form, probe.prompt) for f, fact in enumerate(truth.facts) for form, probe in fact.probes.items()]
    candidates = [truth.candidates[truth.facts[f].attribute] for f, _, _ in asked]
    texts = (
        t for (_, _, prompt), c in zip(asked, candidates, strict=True) for t in (prompt, *(f"{prompt} {x}" for x in c))
    )
    encoded = _encode(stream, tokenizer, texts)
    questions: list[Question] = []
    inputs: list[NDArray[np.int32]] = []
    entries: list[tuple[int, int, int, int]] = []
    n_candidates = 0
    for (f, form, prompt), choices in zip(asked, candidates, strict=True):
        ids, *whole = (next(encoded) for _ in range(1 + len(choices)))
        start = _split_point(ids, whole, prompt)
        rows, read = _inputs_of(prefix, whole, start)
        entries += [(len(inputs) + row, position, target, n_candidates + c) for row, position, target, c in read]
        inputs += rows
        n_candidates += len(choices)
        questions.append(Question(f, form, prompt, tuple(len(w) - start for w in whole)))
    row, position, target, candidate = np.array(sorted(entries), np.int64).reshape(-1, 4).T.copy()
    return _Work(questions=questions, inputs=inputs, row=row, position=position, target=target, candidate=candidate)


def _encode(stream: Stream, tokenizer: Any, texts: Iterator[str]) -> Iterator[list[int]]:
    """Yield the token ids of texts, no special tokens added."""
    import itertools

    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(stream.tokenizer_folder / "tokenizer.json")) if tokenizer is None else None
    while chunk := list(itertools.islice(texts, ENCODE_CHUNK)):
        if own is not None:
            yield from (encoding.ids for encoding in own.encode_batch(chunk, add_special_tokens=False))
        else:
            yield from tokenizer(chunk, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def _split_point(prompt_ids: list[int], whole: list[list[int]], prompt: str) -> int:
    """Return how many first tokens the prompt and all its completions share.

    Raises:
        ConfigError: two completions have the same tokens, or one has none of its own.
    """
    start = len(prompt_ids)
    for ids in whole:
        same = (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b)
        start = min(start, next(same, min(len(prompt_ids), len(ids))))
    if len({tuple(ids) for ids in whole}) < len(whole) or any(len(ids) <= start for ids in whole):
        raise ConfigError(
            f"the tokenizer does not tell the answers to {prompt!r} apart",
            where="suite facts",
            mend="take a tokenizer that keeps all characters",
        )
    return start


def _inputs_of(
    prefix: int, whole: list[list[int]], start: int
) -> tuple[list[NDArray[np.int32]], list[tuple[int, int, int, int]]]:
    """Return the inputs that one question needs, and its entries (input, position, target, candidate).

    Position p of an input ``[prefix, token 0, token 1 …]`` predicts token p. Candidates of one token share one input.
    """
    rows: list[NDArray[np.int32]] = []
    row_of: dict[tuple[int, ...], int] = {}
    for ids in sorted({tuple(ids[:-1]) for ids in whole}, key=lambda ids: (-len(ids), ids)):
        if ids not in row_of:
            row_of |= {ids[:n]: len(rows) for n in range(start, len(ids) + 1) if ids[:n] not in row_of}
            rows.append(np.array([prefix, *ids], np.int32))
    read = [
        (row_of[tuple(ids[:place])], place, ids[place], c)
        for c, ids in enumerate(whole)
        for place in range(start, len(ids))
    ]
    return rows, read


# --- forward passes


def candidate_nats(checkpoint: Checkpoint, work: _Work, tokens_per_batch: int | None) -> list[NDArray[np.float64]]:
    """Return the negative log-likelihood of every question's candidates in nats, a list of arrays ``[C]``."""
    import torch

    from clbench.console import stderr

    device = checkpoint.device
    size = tokens_per_batch or TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
    n_candidates = [len(question.n_scored) for question in work.questions]
    nats = np.zeros(sum(n_candidates), np.float64)
    first_entry = np.searchsorted(work.row, np.arange(len(work.inputs) + 1))
    n_input = work.n_input

    from rich.progress import track

    with (
        torch.inference_mode(),
        torch.autocast(device.type, checkpoint.autocast_dtype, enabled=checkpoint.autocast_dtype is not None),
    ):
        probe = torch.from_numpy(work.inputs[int(n_input.argmax())][None].astype(np.int64)).to(device)
        fast = head_is_all(checkpoint.model, probe)
        todo = batches(n_input, size, device)
        for rows in track(todo, "facts", console=stderr, transient=True, disable=not stderr.is_terminal):
            entries = np.concatenate([np.arange(first_entry[r], first_entry[r + 1]) for r in rows])
            nll = _score(checkpoint.model, work, rows, entries, device, fast=fast)
            np.add.at(nats, work.candidate[entries], nll)
    found = np.split(nats, np.cumsum(n_candidates)[:-1])
    _check_finite(work, found)
    return found


def _score(
    model: Any, work: _Work, rows: IntArray, entries: IntArray, device: torch.device, *, fast: bool
) -> NDArray[np.float64]:
    """Return the negative log-probability of each entry's target, from one forward pass over right-padded rows."""
    import torch

    width = max(len(work.inputs[r]) for r in rows)
    input_WT = np.zeros((len(rows), width), np.int64)
    for w, r in enumerate(rows):
        input_WT[w, : len(work.inputs[r])] = work.inputs[r]
    place_of_row = {int(r): w for w, r in enumerate(rows)}
    places = np.array([place_of_row[int(r)] * width for r in work.row[entries]]) + work.position[entries]
    unique, inverse = np.unique(places, return_inverse=True)

    inputs = torch.from_numpy(input_WT).to(device)
    if fast:
        hidden_WTD = model.base_model(input_ids=inputs, use_cache=False, return_dict=True).last_hidden_state
        head, states = model.get_output_embeddings(), hidden_WTD.flatten(0, 1)
    else:
        head, states = None, model(input_ids=inputs, use_cache=False, return_dict=True).logits.flatten(0, 1)
    nll = np.zeros(len(entries), np.float64)
    chunk = HEAD_CHUNK.get(device.type, HEAD_CHUNK["cuda"])
    for start in range(0, len(unique), chunk):
        chosen = states.index_select(0, torch.from_numpy(unique[start : start + chunk]).to(device))
        logits_PV = (chosen if head is None else head(chosen)).float()
        here = np.flatnonzero((inverse >= start) & (inverse < start + chunk))
        at = torch.from_numpy(inverse[here] - start).to(device)
        target = torch.from_numpy(work.target[entries[here]]).to(device)
        nll[here] = (logits_PV.logsumexp(1)[at] - logits_PV[at, target]).double().cpu().numpy()
    return nll


# --- checks


def _check_fits(model: Any, work: _Work) -> None:
    """Refuse questions that the model has no positions or no embeddings for."""
    longest, positions = (
        int(work.n_input.max()),
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    if positions is not None and longest > positions:
        raise ConfigError(
            f"a question has {longest} tokens, the model reads {positions}",
            where="suite facts",
            mend="take a model with more positions or a tokenizer with longer tokens",
        )
    highest = max(int(work.target.max()), *(int(ids.max()) for ids in work.inputs))
    if highest >= (size := int(model.get_input_embeddings().weight.shape[0])):
        raise ConfigError(
            f"token id {highest} is beyond the model's vocabulary of {size}",
            where="suite facts",
            mend="give the checkpoint the tokenizer that it was trained with",
        )


def _check_finite(work: _Work, found: Sequence[NDArray[np.float64]]) -> None:
    """Refuse NaN and infinite scores: no answer can be read off them."""
    for question, nats in zip(work.questions, found, strict=True):
        if not np.isfinite(nats).all():
            raise NonFiniteError(
                f"an answer's score is {nats[~np.isfinite(nats)][0]}",
                where=f"suite facts, {question.prompt!r}",
                mend="look at the checkpoint's weights, and measure with autocast off if they are finite",
            )
