"""lm-eval's Hugging Face model with our scorer underneath: its tasks and metrics, its numbers, several times as fast.

Give a ``ClbenchLM`` to anything that takes an lm-eval model. It runs a live model and leaves it as it was: lm-eval's
own class puts a model in evaluation mode, ties its weights and gives its tokenizer a padding token; here these
happen to a copy, or are taken back. Log-likelihoods are lm-eval's up to rounding (5e-5, tested); generation that
is not greedy is left to lm-eval, with a seed of its own.

Importing this imports lm-eval.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from clbench import seeds
from clbench.errors import ConfigError
from clbench.eval._forward import encode_texts, prefix_token_id, resolve_max_length, undisturbed
from clbench.eval._lm_ready import quiet
from clbench.eval._scorer import Question, choice_nats, encode_pairs, generate, rolling_nats
from clbench.eval._windows import rolling_windows
from clbench.suite import Checkpoint
from clbench.train.models import model_forward_flops

GREEDY = {"until", "max_gen_toks", "do_sample", "temperature"}
"""Settings of generation that our own knows; with any other, lm-eval generates."""


@dataclass(frozen=True)
class Note:
    """What happened to a request on its way to the model."""

    n_tokens: int = 0
    """Tokens that were scored."""
    n_cut_tokens: int = 0
    """First tokens of the context or prompt that did not fit and were cut, as lm-eval cuts them."""
    is_merged: bool = False
    """The tokenizer merges over the boundary, so that the scored tokens are not those of the text."""


class ClbenchLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """An lm-eval model on a checkpoint.

    Args:
        checkpoint: a live model with its tokenizer; ``autocast_dtype`` is the precision of its forward passes.
        tokens_per_batch: positions in one forward pass; chosen by device when not given.
        max_length: tokens that the model reads at most; its positions when not given.
        batch_rows: prompts that are continued side by side; chosen by device when not given.
        packed: False scores one row a choice, the plain way.

    Raises:
        ConfigError: the checkpoint has no tokenizer, or the tokenizer no token to start from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
        batch_rows: int | None = None,
        packed: bool = True,
    ) -> None:
        if checkpoint.tokenizer is None:
            raise ConfigError(
                "a checkpoint without a tokenizer cannot read tasks", where="lm-eval", mend="give it its tokenizer"
            )
        prefix_token_id(checkpoint.tokenizer)  # refuses one that has none
        model: Any = checkpoint.model
        limit = resolve_max_length(model, max_length, where="lm-eval")
        with undisturbed(model, checkpoint.device), quiet():
            model.tie_weights = _nothing  # an attribute of this object, so it is taken back
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(checkpoint.tokenizer),
                max_length=limit,
                mixed_precision_dtype=checkpoint.autocast_dtype,
                batch_size=batch_rows or 16,
            )
        self.checkpoint = replace(checkpoint, tokenizer=self.tokenizer)
        self.tokens_per_batch, self.batch_rows, self.packed = tokens_per_batch, batch_rows, packed
        self.notes: list[Note] = []
        """One a request of the last call."""
        self.n_input: Counter[tuple[int, int]] = Counter()
        """Rows without padding that went through the model so far, by (positions computed, positions seen)."""

    def flops(self) -> float:
        """Return the floating-point operations of everything scored so far, padding and generated tokens left out."""
        return sum(
            model_forward_flops(self.checkpoint.model, n_tokens=n * count, length=length)
            for (n, length), count in self.n_input.items()
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return ``(log-likelihood in nats, is greedy)`` for each (context, continuation), encoded all at once."""
        pairs = [request.args for request in requests]
        encoded = encode_pairs(self.tokenizer, pairs)
        found = self._loglikelihood_tokens(
            [(pair, one.context, one.continuation) for pair, one in zip(pairs, encoded, strict=True)]
        )
        self.notes = [
            Note(
                len(one.continuation),
                max(0, len(one.context) + len(one.continuation) - 1 - self.max_length),
                one.is_merged,
            )
            for one in encoded
        ]
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations; those of one context become one question."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, _) in enumerate(requests):
            places.setdefault(tuple(context), []).append(place)
        questions = [Question(context, [requests[p][2] for p in found]) for context, found in places.items()]
        names = [_name_of(requests[found[0]][0]) for found in places.values()]
        scored = choice_nats(
            self.checkpoint,
            questions,
            tokens_per_batch=self.tokens_per_batch,
            max_length=self.max_length,
            packed=self.packed,
            names=names,
            tally=self.n_input,
        )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for found, (nats, greedy) in zip(places.values(), scored, strict=True):
            for place, value, top in zip(found, nats.tolist(), greedy.tolist(), strict=True):
                results[place] = (value, top)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts in nats."""
        texts = [request.args[0] for request in requests]
        ids_of = encode_texts(self.tokenizer, texts)
        self.notes = [Note(len(ids_of[text])) for text in texts]
        self.n_input.update(
            (end - start, end - start)
            for text in texts
            for start, end, _ in rolling_windows(len(ids_of[text]), self.max_length)
        )
        return list(
            rolling_nats(
                self.checkpoint,
                [ids_of[text] for text in texts],
                prefix_id=self.prefix_token_id,
                tokens_per_batch=self.tokens_per_batch,
                max_length=self.max_length,
                names=[f"the text {text[:60]!r}" for text in texts],
            ).tolist()
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of every prompt; requests of equal settings go together."""
        found: list[str] = [""] * len(requests)
        ids_of = encode_texts(self.tokenizer, [request.args[0] for request in requests])
        self.notes = [Note(0, max(0, len(ids_of[r.args[0]]) - self._room(r.args[1]))) for r in requests]
        groups: list[tuple[dict[str, Any], list[int]]] = []
        for place, request in enumerate(requests):
            settings = request.args[1]
            same = next((places for known, places in groups if known == settings), None)
            if same is None:
                groups.append((settings, [place]))
            else:
                same.append(place)
        for settings, places in groups:
            texts = self._generate([requests[p] for p in places], settings)
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found

    def _room(self, settings: dict[str, Any]) -> int:
        """Return how many tokens a prompt may have."""
        return int(self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"])

    def _generate(self, requests: list[Any], settings: dict[str, Any]) -> list[str]:
        known = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        if set(known) > GREEDY or known.get("do_sample") or known.get("temperature"):
            return self._generate_as_lm_eval(requests, settings)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        prompts = [request.args[0] for request in requests]
        return generate(
            self.checkpoint,
            prompts,
            max_new_tokens=known["max_gen_toks"],
            stop=handle_stop_sequences(known["until"], eos=end),
            batch_rows=self.batch_rows,
            max_length=self.max_length,
            names=[f"the prompt that ends with {prompt[-60:]!r}" for prompt in prompts],
            tally=self.n_input,
        )

    def _generate_as_lm_eval(self, requests: list[Any], settings: dict[str, Any]) -> list[str]:
        """Let lm-eval generate (sampling, beams), from a seed of its own; the random states come back."""
        import torch

        ids_of = encode_texts(self.tokenizer, [request.args[0] for request in requests])
        self.n_input.update((len(ids_of[request.args[0]]),) * 2 for request in requests)
        with undisturbed(self.model, self.checkpoint.device), torch.inference_mode():
            torch.manual_seed(seeds.derive(0, "generate", repr(sorted(settings.items(), key=str))) % 2**63)
            texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts


def _name_of(pair: Any) -> str:
    """Return what to call a question in an error: the end of its text."""
    if isinstance(pair, tuple) and pair and isinstance(pair[0], str):
        return f"the question that ends with {pair[0][-60:]!r}"
    return "a question"


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for what must not happen."""
