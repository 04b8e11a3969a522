"""Greedy generation with a model's cache: many prompts at once, each as if it were alone.

Prompts are padded on the left, masked, and counted from their own first token, so that a continuation does not depend
on its neighbours (up to rounding, which decides only where two tokens are equally likely). What many prompts begin
with, as worked examples, is computed once (``_prefix``). Finished rows leave the batch. Whether a model can be run so
is found out by trying: one whose padded or cached states differ from plain ones runs prompts of one length together, or
without a cache. Letters: W rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clbench.errors import ConfigError, NonFiniteError
from clbench.eval._forward import (
    encode_texts,
    head_is_all,
    precision,
    prefix_token_id,
    progress,
    resolve_max_length,
    undisturbed,
    vocabulary_size,
)
from clbench.eval._prefix import Beginning, Group, plan
from clbench.suite import Checkpoint

if TYPE_CHECKING:
    import torch

BATCH_ROWS = {"cpu": 16, "cuda": 64}
"""Prompts that are continued side by side."""
WHERE = "generation"


def generate(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_rows: int | None = None,
    max_length: int | None = None,
    too_long: Literal["cut", "refuse"] = "cut",
    names: Sequence[str] | None = None,
    cached: bool = True,
    tally: Counter[tuple[int, int]] | None = None,
) -> list[str]:
    """Return the most likely continuation of every prompt, token by token, up to a stop.

    Args:
        checkpoint: the model and its tokenizer. Nothing of them is changed.
        prompts: texts, encoded as lm-eval does; an empty one is the tokenizer's prefix token.
        max_new_tokens: tokens after which a continuation ends in any case.
        stop: texts before which a continuation ends; end-of-text tokens end it, too.
        batch_rows: prompts side by side; chosen by device when not given.
        max_length: tokens that the model reads at most, prompt and continuation; its positions when not given.
        too_long: what becomes of a prompt without room behind it: ``cut`` from the left as lm-eval does, or an error.
        names: what to call each prompt in an error; its number when not given.
        cached: False computes the whole text again for every token: the plain way that the cache must agree with.
        tally: counts, where given, prompts that went through the model by (positions computed, positions seen).

    Returns:
        The continuations without what ended them, special tokens left out, in the order of the prompts.

    Raises:
        ConfigError: no tokenizer; ``max_new_tokens`` is less than 1 or leaves no room for a prompt; a prompt is too
            long and ``too_long`` is ``refuse``; token ids are beyond the model's vocabulary.
        NonFiniteError: a logit is NaN or infinite; the prompt is named.
    """
    if not prompts:
        return []
    called = names if names is not None else [f"prompt {number}" for number in range(len(prompts))]
    ids = _encoded(
        checkpoint, prompts, called, _room(checkpoint, max_new_tokens, max_length), refuse=too_long == "refuse"
    )
    found: list[str] = [""] * len(prompts)
    writer = _Writer(checkpoint, tuple(stop), max_new_tokens)
    with undisturbed(checkpoint.model, checkpoint.device):
        way = _way(checkpoint, ids) if cached else _Way(head_is_all=False, padded=False, cached=False)
        n_rows = batch_rows or BATCH_ROWS.get(checkpoint.device.type, BATCH_ROWS["cuda"])
        groups = _groups(checkpoint, ids, way)
        with progress("generation", len(prompts)) as advance:
            for group in groups:
                start = _begin(checkpoint, ids, group)
                for batch in _batches(ids, group.rows, n_rows, way):
                    texts = writer.write([ids[n] for n in batch], [called[n] for n in batch], way, start)
                    for n, text in zip(batch, texts, strict=True):
                        found[n] = text
                    advance(len(batch))
    if tally is not None:
        for group in groups:
            tally.update([(group.n_shared, group.n_shared)] if group.n_shared else [])
            tally.update((len(ids[n]) - group.n_shared, len(ids[n])) for n in group.rows)
    return found


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How a model can be run: logits as head on hidden states, prompts padded on the left, with a cache."""

    head_is_all: bool
    padded: bool
    cached: bool


def _batches(ids: list[list[int]], some: list[int], n_rows: int, way: _Way) -> list[list[int]]:
    """Return some prompts' numbers, batch by batch, longest first; of one length each where padding is no way."""
    order = sorted(some, key=lambda n: (-len(ids[n]), n))
    groups = [order] if way.padded else [list(same) for _, same in groupby(order, key=lambda n: len(ids[n]))]
    return [group[start : start + n_rows] for group in groups for start in range(0, len(group), n_rows)]


class _Writer:
    """Continues one batch at a time."""

    def __init__(self, checkpoint: Checkpoint, stop: tuple[str, ...], max_new_tokens: int) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        self.stop = tuple(text for text in stop if text)
        self.max_new_tokens = max_new_tokens
        self.end_ids = _end_ids(checkpoint)

    def write(self, ids: list[list[int]], names: list[str], way: _Way, start: Beginning | None) -> list[str]:
        """Return the continuations of one batch of prompts, all of them with the given beginning."""
        import torch

        written: list[list[int]] = [[] for _ in ids]
        alive = list(range(len(ids)))
        with torch.inference_mode(), precision(self.checkpoint):
            runner = _Runner(self.checkpoint, way, ids, start)
            for _ in range(self.max_new_tokens):
                logits_WV = runner.logits()
                _check_finite(logits_WV, [names[row] for row in alive])
                chosen = logits_WV.argmax(1).tolist()
                going = []
                for place, (row, token) in enumerate(zip(alive, chosen, strict=True)):
                    if token in self.end_ids:
                        continue
                    written[row].append(token)
                    if not self._is_stopped(written[row]):
                        going.append(place)
                if not going:
                    break
                alive = [alive[place] for place in going]
                runner.advance(going, [chosen[place] for place in going])
        return [self._text(tokens) for tokens in written]

    def _is_stopped(self, tokens: list[int]) -> bool:
        if not self.stop:
            return False
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return any(end in text for end in self.stop)

    def _text(self, tokens: list[int]) -> str:
        """Return what was written up to the first stop, which may be a special token that the text leaves out."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for end in self.stop:
            text = text.split(end)[0]
        return text


class _Runner:
    """Logits of the next token of every living row, with or without a cache."""

    def __init__(self, checkpoint: Checkpoint, way: _Way, ids: list[list[int]], start: Beginning | None) -> None:
        import torch

        self.model: Any = checkpoint.model
        self.way, self.device = way, checkpoint.device
        self.cache: Any = None
        self.cache_name = ""
        self.n_cached = 0
        """Columns whose keys and values the cache holds."""
        if start is not None:
            self.cache_name, self.cache = start.grown(len(ids))
            self.n_cached = start.n_shared
        n, width = self.n_cached, max(len(row) for row in ids)
        rows = [[*row[:n], *[0] * (width - len(row)), *row[n:]] for row in ids]
        self.input_WT = torch.tensor(rows, device=self.device)
        mask = [[1] * n + [0] * (width - len(row)) + [1] * (len(row) - n) for row in ids]
        self.mask_WT = torch.tensor(mask, device=self.device)

    def logits(self) -> torch.Tensor:
        """Return float32 ``[W, V]``."""
        states = self.states()
        head = self.model.get_output_embeddings() if self.way.head_is_all else None
        return (states if head is None else head(states)).float()

    def states(self) -> torch.Tensor:
        """Return the last hidden state (or logits) of every row, ``[W, D or V]``."""
        n_new = self.input_WT.shape[1] - self.n_cached
        arguments: dict[str, Any] = {"input_ids": self.input_WT[:, -n_new:]}
        if not bool(self.mask_WT.all()):
            arguments["attention_mask"] = self.mask_WT
            arguments["position_ids"] = (self.mask_WT.cumsum(1) - 1).clamp_(min=0)[:, -n_new:]
        if self.cache is not None:
            arguments[self.cache_name] = self.cache
        run = self.model.base_model if self.way.head_is_all else self.model
        output = run(**arguments, use_cache=self.way.cached, return_dict=True)
        if self.way.cached:
            # transformers 5.24 renamed it, inputs and outputs alike
            self.cache_name = "cache" if "cache" in output else "past_key_values"
            self.cache = getattr(output, self.cache_name)
            self.n_cached = self.input_WT.shape[1]
        states: torch.Tensor = (output.last_hidden_state if self.way.head_is_all else output.logits)[:, -1]
        return states

    def advance(self, places: list[int], tokens: list[int]) -> None:
        """Keep the rows at ``places`` and add a token to each."""
        import torch

        if len(places) < len(self.input_WT):
            at = torch.tensor(places, device=self.device)
            self.input_WT, self.mask_WT = self.input_WT[at], self.mask_WT[at]
            if self.cache is not None:
                self.cache.batch_select_indices(at)
        new = torch.tensor(tokens, device=self.device)[:, None]
        self.input_WT = torch.cat([self.input_WT, new], 1)
        self.mask_WT = torch.cat([self.mask_WT, torch.ones_like(new)], 1)


# --- what a model takes


def _way(checkpoint: Checkpoint, ids: list[list[int]]) -> _Way:
    """Find out how a model can be run, on the longest and the shortest prompt.

    Two tokens of the shortest are computed alone and without a cache; a way is taken where its states are near those.
    """
    import torch

    longest, shortest = max(ids, key=len), min(ids, key=len)
    probe = torch.tensor([longest[:16]], device=checkpoint.device)
    with torch.inference_mode():
        fast = head_is_all(checkpoint.model, probe)
        plain = _two_states(checkpoint, _Way(head_is_all=fast, padded=False, cached=False), [shortest])
        for padded, cached in ((True, True), (False, True), (True, False)):
            way = _Way(head_is_all=fast, padded=padded, cached=cached)
            try:
                found = _two_states(checkpoint, way, [longest, shortest] if padded else [shortest])
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError):
                continue
            if all(_near(a[-1], b[-1]) for a, b in zip(found, plain, strict=True)):
                return way
    return _Way(head_is_all=fast, padded=False, cached=False)


def _groups(checkpoint: Checkpoint, ids: list[list[int]], way: _Way) -> list[Group]:
    """Return which prompts begin alike, where the model is found to go on from kept keys and values as from text."""
    import torch

    alone = [Group(n_shared=0, rows=list(range(len(ids))))]
    if not (way.padded and way.cached):
        return alone
    groups = plan([np.array(row, np.int32) for row in ids], np.array([len(row) - 1 for row in ids], np.int64))
    if not any(group.n_shared for group in groups):
        return alone
    widest = max(groups, key=lambda group: group.n_shared)
    rows = sorted(widest.rows, key=lambda n: -len(ids[n]))
    longest, shortest = ids[rows[0]], ids[rows[-1]]
    with torch.inference_mode():
        plain = _two_states(checkpoint, replace(way, padded=False, cached=False), [shortest])
        try:
            start = Beginning(checkpoint.model, np.array(shortest[: widest.n_shared], np.int32), checkpoint.device)
            found = _two_states(checkpoint, way, [longest, shortest], start)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError):
            return alone
    return groups if all(_near(a[-1], b[-1]) for a, b in zip(found, plain, strict=True)) else alone


def _begin(checkpoint: Checkpoint, ids: list[list[int]], group: Group) -> Beginning | None:
    """Compute what the prompts of a group begin with."""
    import torch

    if not group.n_shared:
        return None
    tokens = np.array(ids[group.rows[0]][: group.n_shared], np.int32)
    with torch.inference_mode(), precision(checkpoint):
        return Beginning(checkpoint.model, tokens, checkpoint.device)


def _two_states(
    checkpoint: Checkpoint, way: _Way, ids: list[list[int]], start: Beginning | None = None
) -> list[torch.Tensor]:
    """Return the states after the prompts, and after one more token (the last one again), of the last row only."""
    runner = _Runner(checkpoint, way, ids, start)
    first = runner.states()
    if way.cached and not hasattr(runner.cache, "batch_select_indices"):
        raise NotImplementedError("no cache whose rows can be dropped")
    runner.advance([len(ids) - 1], [ids[-1][-1]])
    return [first, runner.states()]


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    near = 1e-4 if b.element_size() >= 4 else 3e-2
    return bool((a - b).abs().max() <= near * b.abs().max())


# --- what goes in


def _room(checkpoint: Checkpoint, max_new_tokens: int, max_length: int | None) -> int:
    """Return how many tokens a prompt may have."""
    if checkpoint.tokenizer is None:
        raise ConfigError("a checkpoint without a tokenizer reads no prompts", where=WHERE, mend="give it one")
    limit = resolve_max_length(checkpoint.model, max_length, where=WHERE)
    if not 1 <= max_new_tokens < limit:
        raise ConfigError(
            f"{max_new_tokens} new tokens and a prompt do not fit into the {limit} tokens that the model reads",
            where=WHERE,
            mend=f"ask for 1 to {limit - 1}",
        )
    return limit - max_new_tokens


def _encoded(
    checkpoint: Checkpoint, prompts: Sequence[str], names: Sequence[str], room: int, *, refuse: bool
) -> list[list[int]]:
    """Return the token ids of every prompt, cut from the left."""
    tokenizer, found = checkpoint.tokenizer, []
    ids_of = encode_texts(tokenizer, prompts)
    for prompt, name in zip(prompts, names, strict=True):
        ids = ids_of[prompt] or [prefix_token_id(tokenizer)]
        if refuse and len(ids) > room:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, there is room for {room}",
                where=name,
                mend="take a model with more positions, ask for fewer new tokens, or let it be cut from the left",
            )
        found.append(ids[-room:])
    if (highest := max(map(max, found))) >= (size := vocabulary_size(checkpoint.model)):
        raise ConfigError(
            f"token id {highest} is beyond the model's vocabulary of {size}",
            where=WHERE,
            mend="give the checkpoint the tokenizer that it was trained with",
        )
    return found


def _end_ids(checkpoint: Checkpoint) -> set[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's own settings."""
    settings = getattr(checkpoint.model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    ids = [checkpoint.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {int(i) for i in ids if i is not None}


def _check_finite(logits_WV: torch.Tensor, names: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(logits_WV.amax(1).cpu().numpy()))
    if len(bad):
        raise NonFiniteError(
            "the logits of the next token are not finite",
            where=names[int(bad[0])],
            mend="look at the checkpoint's weights, and measure with autocast off if they are finite",
        )
