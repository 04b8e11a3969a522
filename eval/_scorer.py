"""How likely a model holds each answer to a question: what multiple choice, ranking and preference are made of.

A question is a context and its choices, all in token ids; a choice's score is the summed log-probability of its tokens
after the context, as lm-eval defines it. Three things make it fast: the output head is applied where a choice's
token is predicted and nowhere else; all choices of a question stand in one row behind one copy of the context
(``packed``), each seeing the context and itself through a 4-D mask, at the positions that it would have alone; what
many questions begin with, as worked examples, is computed once (``_prefix``); rows are sorted by length. What a
model can take of this is found out by trying, on a longest row; ``packed=False`` is the plain way, one row a choice.

Also here: how texts become questions (``encode_question``), whole documents (``rolling_nats``) and greedy generation
(``generate``). Tasks and metrics are left to ``_lm.py`` and ``_tasks.py``. Letters in names: W rows of a batch,
T positions, P places whose logits are needed, E scored tokens, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from clbench.errors import ConfigError, NonFiniteError
from clbench.eval._forward import (
    HEAD_CHUNK,
    TOKENS_PER_BATCH,
    IntArray,
    batches,
    encode_texts,
    head_is_all,
    precision,
    prefix_token_id,
    progress,
    resolve_max_length,
    undisturbed,
    vocabulary_size,
    workers,
)
from clbench.eval._generate import generate
from clbench.eval._prefix import Beginning, Group, plan
from clbench.eval._windows import cut_windows, document_nats, window_nats
from clbench.suite import Checkpoint

if TYPE_CHECKING:
    import torch

__all__ = [
    "Encoded",
    "Question",
    "choice_nats",
    "encode_pairs",
    "encode_question",
    "generate",
    "n_cut",
    "rolling_nats",
]

Mask = Literal["bool", "additive"]
MASKS: dict[str, tuple[Mask, Mask]] = {"cpu": ("additive", "bool"), "cuda": ("bool", "additive")}
"""Which is tried first. On a CPU torch makes a boolean mask an additive one anew in every layer."""
Found = TypeVar("Found")
WHERE = "scoring of choices"
HEAD_FLOATS = 2**19
"""Logits that exist at one time on a CPU: they should stay near the processor."""
HEAD_ROWS = 128
"""But no fewer rows than these, or reading the head's weights takes longer than multiplying with them."""
TRY_FROM = 8
"""Rows with several choices from which on it pays to try whether the model takes them."""


@dataclass(frozen=True)
class Question:
    """Token ids of a context (not empty; the prefix token is part of it) and of its choices (none is empty)."""

    context: tuple[int, ...] | list[int]
    choices: list[list[int]]


# --- from texts to questions


@dataclass(frozen=True)
class Encoded:
    """A context and what follows it, in token ids."""

    context: list[int]
    continuation: list[int]
    is_merged: bool
    """The tokenizer merges over the boundary: the two parts together are not the tokens of the text."""


def encode_question(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and of what follows it, split where lm-eval splits; see ``encode_pairs``."""
    found = encode_pairs(tokenizer, [(context, continuation)])[0]
    return found.context, found.continuation


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    """Return contexts and continuations in token ids, split where lm-eval splits.

    Spaces at the end of the context go to the continuation; both are encoded as one text, and what is behind as many
    tokens as the context has alone is the continuation. Where the tokenizer merges over the boundary the two
    parts are then *not* the text (``is_merged``): that, too, is as in lm-eval. An empty context is the prefix
    token, unless the continuation starts with it; so is one of spaces only, which lm-eval cannot read.

    Raises:
        ConfigError: a continuation has no tokens of its own: it is empty, or swallowed by the context's last token.
    """
    moved = [(kept := context.rstrip(), context[len(kept) :] + continuation) for context, continuation in pairs]
    ids_of = encode_texts(tokenizer, (text for kept, rest in moved if kept for text in (kept, kept + rest)))
    prefix, found = prefix_token_id(tokenizer), []
    for kept, rest in moved:
        if kept:
            start, whole = ids_of[kept], ids_of[kept + rest]
        else:
            start, whole = [prefix], list(tokenizer.encode(rest, add_special_tokens=False))
            whole = whole if whole[:1] == start else start + whole
        if len(whole) <= len(start):
            raise ConfigError(
                f"no token is left for the continuation {rest[:40]!r}",
                where=f"behind the context {kept[-40:]!r}",
                mend="take a tokenizer that keeps all characters, or leave the item out",
            )
        found.append(Encoded(start, whole[len(start) :], whole[: len(start)] != start))
    return found


# --- what is computed


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows that are computed and what is read off them.

    Row r has token ids ``tokens[r]``, each at its ``positions[r]`` and of ``segments[r]``: 0 is the context, k the k-th
    choice of the row; a row without choices of more than one token (``is_packed[r]`` False) needs no mask. Entry e
    adds the log-probability of ``target[e]`` behind place ``place[e]`` of ``row[e]`` to choice ``choice[e]``,
    counted through all questions. Entries are in the order of their rows.
    """

    tokens: list[NDArray[np.int32]]
    positions: list[NDArray[np.int32]]
    segments: list[NDArray[np.int32]]
    is_packed: NDArray[np.bool_]
    row: IntArray
    place: IntArray
    target: IntArray
    choice: IntArray

    @property
    def n_input(self) -> IntArray:
        return np.array([len(ids) for ids in self.tokens], np.int64)

    @property
    def n_context(self) -> IntArray:
        return np.array([np.count_nonzero(segments == 0) for segments in self.segments], np.int64)


class _Layout:
    """Collects rows and entries, question by question."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.tokens: list[NDArray[np.int32]] = []
        self.positions: list[NDArray[np.int32]] = []
        self.segments: list[NDArray[np.int32]] = []
        self.entries: list[tuple[int, int, int, int]] = []
        self.n_choices = 0

    def add(self, question: Question, *, packed: bool) -> None:
        """Lay one question out in as few rows as the model's positions allow."""
        context = list(question.context)
        group: list[tuple[int, list[int]]] = []
        length = len(context)
        for number, choice in enumerate(question.choices, self.n_choices):
            if len(context) + len(choice) - 1 > self.max_length:  # lm-eval cuts each choice's context apart
                self._row(context[len(context) + len(choice) - 1 - self.max_length :], [(number, choice)])
                continue
            fits = length + len(choice) - 1 <= self.max_length and (packed or len(choice) == 1 or not group)
            if group and not fits:
                self._row(context, group)
                group, length = [], len(context)
            group.append((number, choice))
            length += len(choice) - 1
        if group:
            self._row(context, group)
        self.n_choices += len(question.choices)

    def _row(self, context: list[int], group: list[tuple[int, list[int]]]) -> None:
        row, ids, n = len(self.tokens), list(context), len(context)
        positions, segments = list(range(n)), [0] * n
        for segment, (number, choice) in enumerate(group, 1):
            start = len(ids)
            places = [n - 1, *range(start, start + len(choice) - 1)]
            self.entries += [(row, place, token, number) for place, token in zip(places, choice, strict=True)]
            ids += choice[:-1]
            positions += range(n, n + len(choice) - 1)
            segments += [segment] * (len(choice) - 1)
        self.tokens.append(np.array(ids, np.int32))
        self.positions.append(np.array(positions, np.int32))
        self.segments.append(np.array(segments, np.int32))

    def rows(self) -> _Rows:
        row, place, target, choice = np.array(self.entries, np.int64).reshape(-1, 4).T.copy()
        return _Rows(
            tokens=self.tokens,
            positions=self.positions,
            segments=self.segments,
            is_packed=np.array([len(set(s[s > 0].tolist())) > 1 for s in self.segments], np.bool_),
            row=row,
            place=place,
            target=target,
            choice=choice,
        )


def n_cut(questions: Sequence[Question], max_length: int) -> IntArray:
    """Return how many first tokens of each question's context are cut for its longest choice, ``[Q]``."""
    whole = [len(q.context) + max(len(c) for c in q.choices) - 1 for q in questions]
    return np.maximum(np.array(whole, np.int64) - max_length, 0)


# --- scoring


def choice_nats(
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    *,
    tokens_per_batch: int | None = None,
    max_length: int | None = None,
    packed: bool = True,
    shared: bool = True,
    too_long: Literal["cut", "refuse"] = "cut",
    names: Sequence[str] | None = None,
    tally: Counter[tuple[int, int]] | None = None,
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return what a model thinks of every question's choices.

    Args:
        checkpoint: the model; its tokenizer is not used. Nothing of it is changed.
        questions: contexts and choices in token ids.
        tokens_per_batch: positions in one forward pass; chosen by device when not given.
        max_length: tokens that the model reads at most; its ``max_position_embeddings`` when not given.
        packed: False is the plain way, one row a choice, that the packed one must agree with.
        shared: False computes what several questions begin with for each of them.
        too_long: what becomes of a context that does not fit with a choice: ``cut`` from the left as lm-eval does
            (``n_cut`` counts), or an error.
        names: what to call each question in an error; its number when not given.
        tally: counts, where given, rows that went through the model by (positions computed, positions seen).

    Returns:
        For each question ``(log_likelihood_nats, is_greedy)``, each ``[n_choices]``: the summed log-probability of the
        choice's tokens (natural logarithm, at most 0), and whether each of them is the model's first choice.

    Raises:
        ConfigError: a context, a choice or a question is empty, a choice alone is longer than the model reads, token
            ids are beyond its vocabulary, or a context is too long and ``too_long`` is ``refuse``.
        NonFiniteError: a score is NaN or infinite; the question is named.
    """
    if not questions:
        return []
    limit = resolve_max_length(checkpoint.model, max_length, where=WHERE)
    called = names if names is not None else [f"question {number}" for number in range(len(questions))]
    _check_questions(questions, called, limit, refuse=too_long == "refuse")
    _check_vocabulary(checkpoint.model, questions)
    with undisturbed(checkpoint.model, checkpoint.device):
        work = _work(checkpoint, questions, limit, tokens_per_batch, packed=packed, shared=shared)
        nats, greedy = _score_all(checkpoint, work)
    ends = np.cumsum([len(q.choices) for q in questions])[:-1]
    found = list(zip(np.split(nats, ends), np.split(greedy, ends), strict=True))
    _check_finite(found, called)
    if tally is not None:
        tally.update(work.sizes())
    return found


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Rows, and how a model is given them: ``size`` positions in one pass, the mask of packed rows, ``fast`` heads."""

    rows: _Rows
    groups: list[Group]
    size: int
    mask: Mask | None
    fast: bool

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Yield the positions computed and seen of every row, and of every beginning."""
        n_input = self.rows.n_input.tolist()
        for group in self.groups:
            if group.n_shared:
                yield group.n_shared, group.n_shared
            yield from ((n_input[row] - group.n_shared, n_input[row]) for row in group.rows)


def _work(
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    limit: int,
    tokens_per_batch: int | None,
    *,
    packed: bool,
    shared: bool,
) -> _Work:
    """Lay questions out and find out what the model takes."""
    import torch

    device, model = checkpoint.device, checkpoint.model
    size = tokens_per_batch or TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
    rows, mask = _laid_out(questions, limit, packed=packed), None
    with torch.inference_mode(), precision(checkpoint):
        first = rows.tokens[int(rows.n_input.argmax())][None, :16].astype(np.int64)
        fast = head_is_all(model, torch.from_numpy(first).to(device))
    groups = _groups(checkpoint, rows, fast=fast, shared=shared)
    if rows.is_packed.sum() >= TRY_FROM:
        packed_rows = np.flatnonzero(rows.is_packed)
        longest = int(packed_rows[rows.n_input[packed_rows].argmax()])
        group = next(group for group in groups if longest in group.rows)
        length = len(rows.tokens[longest])
        mask = _tried(
            checkpoint, ("mask", fast), length, lambda: _mask_taken(checkpoint, rows, longest, group, fast=fast)
        )
    if mask is None and rows.is_packed.any():
        rows = _laid_out(questions, limit, packed=False)
        groups = _groups(checkpoint, rows, fast=fast, shared=shared)
    if not fast:  # whole logits [W, T, V] then exist: keep them below a quarter of a gigabyte
        size = min(size, max(1, 2**26 // vocabulary_size(model)))
    return _Work(rows=rows, groups=groups, size=size, mask=mask, fast=fast)


def _groups(checkpoint: Checkpoint, rows: _Rows, *, fast: bool, shared: bool) -> list[Group]:
    """Return which rows begin alike, where the model is found to take rows behind a beginning."""
    groups = plan(rows.tokens, rows.n_context - 1) if shared else []
    widest = max((group for group in groups if group.n_shared), key=lambda group: group.n_shared, default=None)
    if widest is not None:
        longest = max(widest.rows, key=lambda row: len(rows.tokens[row]))
        row = _unpacked(rows, longest)
        if _tried(
            checkpoint,
            ("beginning", fast),
            len(row.tokens[0]),
            lambda: _beginning_taken(checkpoint, row, widest.n_shared, fast=fast),
        ):
            return groups
    return [Group(n_shared=0, rows=list(range(len(rows.tokens))))]


def _laid_out(questions: Sequence[Question], limit: int, *, packed: bool) -> _Rows:
    layout = _Layout(limit)
    for question in questions:
        layout.add(question, packed=packed)
    return layout.rows()


def _score_all(checkpoint: Checkpoint, work: _Work) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Score batches side by side; what each adds is added in the order of the batches, so bits repeat."""
    import torch

    rows, n_input = work.rows, work.rows.n_input
    n_choices = int(rows.choice.max()) + 1
    nats, greedy = np.zeros(n_choices, np.float64), np.ones(n_choices, np.bool_)
    first_entry = np.searchsorted(rows.row, np.arange(len(rows.tokens) + 1))

    def score(batch: IntArray, start: Beginning | None) -> tuple[IntArray, NDArray[np.float64], NDArray[np.bool_]]:
        entries = np.concatenate([np.arange(first_entry[r], first_entry[r + 1]) for r in batch])
        with torch.inference_mode(), precision(checkpoint):  # both are settings of a thread
            states_ND = _forward(
                checkpoint.model, rows, batch, checkpoint.device, work.mask, fast=work.fast, start=start
            )
            n_shared = 0 if start is None else start.n_shared
            return entries, *_read(checkpoint.model, states_ND, rows, batch, entries, n_shared, fast=work.fast)

    try:
        with progress("questions", int(n_input.sum())) as advance, workers(checkpoint.device) as pool:
            for group in work.groups:
                start = _begin(checkpoint, rows, group)
                todo = list(_batches_of(rows, group, work.size, checkpoint.device))
                scored = pool.map(score, todo, repeat(start))
                for batch, (entries, log_p, top) in zip(todo, scored, strict=True):
                    np.add.at(nats, rows.choice[entries], log_p)
                    np.logical_and.at(greedy, rows.choice[entries], top)
                    advance(int(n_input[batch].sum()))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the device has too little memory for a batch",
            where=f"{WHERE}, {work.size} tokens per batch",
            mend="choose a smaller tokens_per_batch",
        ) from error
    return nats, greedy


def _begin(checkpoint: Checkpoint, rows: _Rows, group: Group) -> Beginning | None:
    """Compute what the rows of a group begin with."""
    import torch

    if not group.n_shared:
        return None
    with torch.inference_mode(), precision(checkpoint):
        return Beginning(checkpoint.model, rows.tokens[group.rows[0]][: group.n_shared], checkpoint.device)


def _batches_of(rows: _Rows, group: Group, size: int, device: torch.device) -> Iterator[IntArray]:
    """Yield batches of a group's rows, packed ones first, then by length, longest first.

    What they begin with is not computed again but read again: a quarter of a position, for the size of a batch.
    """
    chosen = np.array(group.rows, np.int64)
    for kind in (True, False):
        some = chosen[rows.is_packed[chosen] == kind]
        lengths = rows.n_input[some] - group.n_shared + group.n_shared // 4
        yield from (some[batch] for batch in batches(lengths, size, device))


def _forward(
    model: Any,
    rows: _Rows,
    batch: IntArray,
    device: torch.device,
    mask: Mask | None,
    *,
    fast: bool,
    start: Beginning | None = None,
) -> torch.Tensor:
    """Run one batch of right-padded rows behind their beginning; return hidden states (fast) or logits of the rest.

    Rows without a mask need none for the padding either: causal attention never looks right. Shape ``[W * T, D or V]``.
    """
    import torch

    cut = 0 if start is None else start.n_shared
    width = max(len(rows.tokens[r]) for r in batch) - cut
    input_WT, position_WT = np.zeros((2, len(batch), width), np.int64)
    segment_WT = np.full((len(batch), width), -1, np.int64)
    for w, r in enumerate(batch):
        n = len(rows.tokens[r]) - cut
        input_WT[w, :n], position_WT[w, :n] = rows.tokens[r][cut:], rows.positions[r][cut:]
        segment_WT[w, :n] = rows.segments[r][cut:]
    arguments: dict[str, Any] = {"input_ids": torch.from_numpy(input_WT).to(device)}
    if start is not None:
        arguments |= start.arguments()
    if start is not None or rows.is_packed[batch].any():
        arguments["position_ids"] = torch.from_numpy(position_WT).to(device)
    if rows.is_packed[batch].any():
        arguments["attention_mask"] = _mask_of(torch.from_numpy(segment_WT).to(device), cut, mask, model)
    run = model.base_model if fast else model
    output = run(**arguments, use_cache=False, return_dict=True)
    states: torch.Tensor = output.last_hidden_state if fast else output.logits
    return states.flatten(0, 1)


def _mask_of(segment_WT: torch.Tensor, n_shared: int, mask: Mask | None, model: Any) -> torch.Tensor:
    """Return the 4-D mask ``[W, 1, T, n_shared + T]``: a place sees, of what is before it, context and own segment."""
    import torch

    width = segment_WT.shape[1]
    shared = (segment_WT[:, None, :] == 0) | (segment_WT[:, None, :] == segment_WT[:, :, None])
    seen = shared & torch.ones(width, width, dtype=torch.bool, device=segment_WT.device).tril()
    seen = torch.nn.functional.pad(seen, (n_shared, 0), value=True)[:, None]
    if mask == "bool":
        return seen
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(seen.shape, dtype=kind, device=seen.device).masked_fill_(~seen, torch.finfo(kind).min)


def _read(
    model: Any,
    states_ND: torch.Tensor,
    rows: _Rows,
    batch: IntArray,
    entries: IntArray,
    n_shared: int,
    *,
    fast: bool,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the log-probability of each entry's target and whether it is on top, ``[E]`` each.

    The head is applied once to every distinct place, some places at a time.
    """
    import torch

    device, width = states_ND.device, states_ND.shape[0] // len(batch)
    row_at = {int(r): w for w, r in enumerate(batch)}
    places = np.array([row_at[int(r)] * width for r in rows.row[entries]], np.int64) + rows.place[entries] - n_shared
    unique, inverse = np.unique(places, return_inverse=True)
    head = model.get_output_embeddings() if fast else None
    chunk = HEAD_CHUNK.get(device.type, HEAD_CHUNK["cuda"])
    if device.type == "cpu":
        chunk = min(chunk, max(HEAD_ROWS, HEAD_FLOATS // vocabulary_size(model)))
    log_p, top = np.zeros(len(entries), np.float64), np.zeros(len(entries), np.bool_)
    for start in range(0, len(unique), chunk):
        chosen = states_ND.index_select(0, torch.from_numpy(unique[start : start + chunk]).to(device))
        logits_PV = (chosen if head is None else head(chosen)).float()
        here = np.flatnonzero((inverse >= start) & (inverse < start + chunk))
        at = torch.from_numpy(inverse[here] - start).to(device)
        target = torch.from_numpy(rows.target[entries[here]]).to(device)
        found, is_top = _log_p(logits_PV, at, target)
        log_p[here], top[here] = found.double().cpu().numpy(), is_top.cpu().numpy()
    return log_p, top


def _log_p(logits_PV: torch.Tensor, at_E: torch.Tensor, target_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets' log-probabilities in float32 and whether each is the first of the most likely tokens.

    Overwrites ``logits_PV``.
    """
    logits_E = logits_PV[at_E, target_E]
    peak_P = logits_PV.amax(1)
    is_top = logits_E == peak_P[at_E]
    if bool(is_top.any()):  # several tokens may be equal there: the first of them counts, as argmax has it
        is_top[is_top.clone()] = logits_PV[at_E[is_top]].argmax(1) == target_E[is_top]
    total_P = logits_PV.sub_(peak_P[:, None]).exp_().sum(1).log_().add_(peak_P)
    return logits_E - total_P[at_E], is_top


# --- what a model takes


_known: WeakKeyDictionary[Any, dict[Any, tuple[int, Any]]] = WeakKeyDictionary()
"""Model -> what was tried -> the length of row that it was tried on, and what was found."""


def _tried(checkpoint: Checkpoint, what: tuple[Any, ...], length: int, attempt: Callable[[], Found]) -> Found:
    """Return what an attempt finds, or found before: what a model takes, it takes at lesser lengths, too."""
    config = checkpoint.model.config
    key = (*what, getattr(config, "_attn_implementation", None), checkpoint.device.type)
    known = _known.setdefault(checkpoint.model, {})
    tried_on, taken = known.get(key, (0, True))
    if length > tried_on if taken else length < tried_on:
        known[key] = (length, attempt())
    found: Found = known[key][1]
    return found


def _beginning_taken(checkpoint: Checkpoint, rows: _Rows, n_shared: int, *, fast: bool) -> bool:
    """Say whether a model computes a row behind its beginning as it does the whole row."""
    import torch

    first, device = np.array([0]), checkpoint.device
    with torch.inference_mode():
        try:
            start = Beginning(checkpoint.model, rows.tokens[0][:n_shared], device)
            found = _forward(checkpoint.model, rows, first, device, None, fast=fast, start=start)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
            return False
        whole = _forward(checkpoint.model, rows, first, device, None, fast=fast)
    gap, scale = (found - whole[n_shared:]).abs().max(), whole.abs().max()
    return bool(gap <= _near(found) * scale)


def _mask_taken(checkpoint: Checkpoint, rows: _Rows, row: int, group: Group, *, fast: bool) -> Mask | None:
    """Find out whether, and with which mask, a model computes packed rows as it computes each choice alone.

    Tried on one row, behind what its group shares, without autocast: states at all places must be near those of plain
    rows (a model that ignores positions or slides a window over them differs), and those of other choices must not
    change by a bit when one choice's tokens do (a model that ignores the mask, or adds a boolean one, leaks).
    """
    import torch

    model, device = checkpoint.model, checkpoint.device
    plain, other = _unpacked(rows, row), _changed(rows, row, vocabulary_size(model))
    segment = rows.segments[row][group.n_shared :]
    with torch.inference_mode():
        start = Beginning(model, rows.tokens[row][: group.n_shared], device) if group.n_shared else None
        expected = [
            _forward(model, plain, np.array([r]), device, None, fast=fast, start=start)
            for r in range(len(plain.tokens))
        ]
        for kind in MASKS.get(device.type, MASKS["cuda"]):
            try:
                found = _forward(model, rows, np.array([row]), device, kind, fast=fast, start=start)
                moved = _forward(model, other, np.array([0]), device, kind, fast=fast, start=start)
            except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
                continue
            if _agree(found, expected, segment) and _keeps(found, moved, segment):
                return kind
    return None


def _unpacked(rows: _Rows, row: int) -> _Rows:
    """Return the choices of one packed row in a row each; any other row as it is."""
    segment, tokens = rows.segments[row], rows.tokens[row]
    found = [tokens[(segment == 0) | (segment == k)] for k in np.unique(segment[segment > 0])] or [tokens]
    return _bare(
        found,
        [np.arange(len(ids), dtype=np.int32) for ids in found],
        [np.zeros(len(ids), np.int32) for ids in found],
        is_packed=False,
    )


def _changed(rows: _Rows, row: int, n_vocabulary: int) -> _Rows:
    """Return one packed row with other tokens in the first segment of its choices."""
    segment, tokens = rows.segments[row], rows.tokens[row].copy()
    first = segment == segment[segment > 0].min()
    tokens[first] = (tokens[first] + 1) % n_vocabulary
    return _bare([tokens], [rows.positions[row]], [segment], is_packed=True)


def _bare(
    tokens: list[NDArray[np.int32]],
    positions: list[NDArray[np.int32]],
    segments: list[NDArray[np.int32]],
    *,
    is_packed: bool,
) -> _Rows:
    """Return rows that nothing is read off."""
    none = np.zeros(0, np.int64)
    return _Rows(
        tokens=tokens,
        positions=positions,
        segments=segments,
        is_packed=np.full(len(tokens), is_packed, np.bool_),
        row=none,
        place=none,
        target=none,
        choice=none,
    )


def _agree(found: torch.Tensor, expected: list[torch.Tensor], segment: NDArray[np.int32]) -> bool:
    """Say whether states of a packed row are those of its plain rows, but for rounding."""
    import torch

    for k, alone in zip(np.unique(segment[segment > 0]), expected, strict=True):
        places = torch.from_numpy(np.flatnonzero((segment == 0) | (segment == k))).to(found.device)
        gap, scale = (found[places] - alone).abs().max(), alone.abs().max()
        if not bool(gap <= _near(found) * scale):
            return False
    return True


def _near(states: torch.Tensor) -> float:
    """Return how much of the largest state rounding may change."""
    import torch

    return 1e-4 if states.dtype == torch.float32 else 3e-2


def _keeps(found: torch.Tensor, moved: torch.Tensor, segment: NDArray[np.int32]) -> bool:
    """Say whether states outside the first choice are the same bits whatever stands in it, and those inside are not."""
    import torch

    first = torch.from_numpy(segment == segment[segment > 0].min()).to(found.device)
    return torch.equal(found[~first], moved[~first]) and not torch.equal(found[first], moved[first])


# --- whole documents


def rolling_nats(
    checkpoint: Checkpoint,
    token_lists: Sequence[Sequence[int]],
    *,
    prefix_id: int,
    tokens_per_batch: int | None = None,
    max_length: int | None = None,
    names: Sequence[str] | None = None,
) -> NDArray[np.float64]:
    """Return the log-likelihood of whole documents in nats, ``[n_documents]``, as lm-eval's ``loglikelihood_rolling``.

    Every token is predicted once, from ``prefix_id`` and the tokens before it in its window; see ``rolling_windows``.
    A document without tokens has 0.

    Raises:
        ConfigError: token ids are beyond the model's vocabulary.
        NonFiniteError: a document's loss is NaN or infinite; it is named.
    """
    limit = resolve_max_length(checkpoint.model, max_length, where="rolling log-likelihood")
    called = names if names is not None else [f"document {number}" for number in range(len(token_lists))]
    documents = [np.asarray(ids, np.int32) for ids in token_lists]
    _check_ids(checkpoint.model, max([prefix_id, *(int(ids.max()) for ids in documents if len(ids))]))
    windows = cut_windows(documents, prefix_id=prefix_id, max_length=limit)
    if not windows.tokens:
        return np.zeros(len(documents), np.float64)
    with undisturbed(checkpoint.model, checkpoint.device):
        nats = window_nats(checkpoint, windows, tokens_per_batch, what="rolling log-likelihood")
    value = -document_nats(windows, nats, len(documents))
    for name, one in zip(called, value, strict=True):
        if not np.isfinite(one):
            raise _not_finite(one, name)
    return value


# --- checks


def _check_questions(questions: Sequence[Question], names: Sequence[str], limit: int, *, refuse: bool) -> None:
    """Refuse what has no score: nothing to score, nothing to score it after, or more than the model reads."""
    for question, name in zip(questions, names, strict=True):
        if not question.choices or not all(question.choices):
            what = "no choice" if not question.choices else "a choice without tokens"
            raise ConfigError(f"{what}, so no score", where=name, mend="leave the item out")
        if not question.context:
            raise ConfigError("a context without tokens", where=name, mend="start it with the tokenizer's prefix token")
        longest = max(len(choice) for choice in question.choices)
        if longest > limit:
            raise ConfigError(
                f"a choice has {longest} tokens, the model reads {limit}",
                where=name,
                mend="take a model with more positions, or leave the item out",
            )
        if refuse and len(question.context) + longest - 1 > limit:
            raise ConfigError(
                f"context and choice have {len(question.context) + longest} tokens, the model reads {limit}",
                where=name,
                mend="take a model with more positions, or let the context be cut from the left",
            )


def _check_vocabulary(model: Any, questions: Sequence[Question]) -> None:
    _check_ids(model, max(max(max(q.context), *(max(c) for c in q.choices)) for q in questions))


def _check_ids(model: Any, highest: int) -> None:
    """Refuse token ids that the model has no embedding for."""
    if highest >= (size := vocabulary_size(model)):
        raise ConfigError(
            f"token id {highest} is beyond the model's vocabulary of {size}",
            where=WHERE,
            mend="give the checkpoint the tokenizer that it was trained with",
        )


def _check_finite(found: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]], names: Sequence[str]) -> None:
    """Refuse NaN and infinite scores: no answer can be read off them."""
    for (nats, _), name in zip(found, names, strict=True):
        if not np.isfinite(nats).all():
            raise _not_finite(nats[~np.isfinite(nats)][0], name)


def _not_finite(value: float, name: str) -> NonFiniteError:
    return NonFiniteError(
        f"a log-likelihood is {value}",
        where=name,
        mend="look at the checkpoint's weights, and measure with autocast off if they are finite",
    )
