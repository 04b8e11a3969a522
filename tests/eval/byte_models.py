"""A tokenizer of bytes and causal "models" that are rules on the text so far, for tests with answers of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clbench.suite import Checkpoint

END = "<end>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; token 0 is the end of text."""
    vocabulary = {END: 0} | {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


class Rule(torch.nn.Module):
    """A causal "model" that favours one next byte: ``next_of(text so far)``, an empty string for the end of text.

    It leads by ``lead`` nats over every other byte; None favours nothing.
    """

    def __init__(self, next_of: Callable[[str], str | None], n_positions: int = 4096, lead: float = 10.0) -> None:
        super().__init__()
        self.tokenizer = byte_tokenizer()
        self.embedding = torch.nn.Embedding(257, 1)
        self.next_of, self.lead = next_of, lead
        config: Any = SimpleNamespace(max_position_embeddings=n_positions, num_hidden_layers=1, hidden_size=1)
        config.get_text_config = lambda: config
        self.config = config

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        keep = torch.ones_like(input_ids) if attention_mask is None or attention_mask.ndim != 2 else attention_mask
        logits = torch.zeros(*input_ids.shape, 257)
        for row, (ids, seen) in enumerate(zip(input_ids, keep, strict=True)):
            for place in range(len(ids)):
                text = self.tokenizer.decode(ids[: place + 1][seen[: place + 1].bool()], skip_special_tokens=True)
                chosen = self.next_of(text)
                if chosen is not None:
                    token = self.tokenizer.encode(chosen[:1], add_special_tokens=False)[0] if chosen else 0
                    logits[row, place, token] = self.lead
        return SimpleNamespace(logits=logits)


class Continuer(Rule):
    """A model that continues the text with what ``answer_of(prompt)`` says, then ends it; it reads the last place only.

    ``prompt`` is all up to the last ``opening``, which has to stand in every prompt.
    """

    def __init__(self, answer_of: Callable[[str], str], opening: str, n_positions: int = 4096) -> None:
        super().__init__(lambda text: None, n_positions)
        self.answer_of, self.opening = answer_of, opening

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, 257)
        for row, (ids, seen) in enumerate(zip(input_ids, keep, strict=True)):
            text = self.tokenizer.decode(ids[seen.bool()], skip_special_tokens=True)
            start = text.rindex(self.opening) + len(self.opening) if self.opening in text else len(text)
            prompt, written = text[:start], text[start:]
            answer = self.answer_of(prompt)
            rest = answer[len(written) :] if answer.startswith(written) else ""
            token = self.tokenizer.encode(rest[:1], add_special_tokens=False)[0] if rest else 0
            logits[row, -1, token] = 10.0
        return SimpleNamespace(logits=logits)


def checkpoint_of(model: torch.nn.Module, **changes: Any) -> Checkpoint:
    """A checkpoint that reads bytes."""
    base = Checkpoint(
        model=model,
        weights_sha256="a" * 64,
        device=torch.device("cpu"),
        autocast_dtype=None,
        tokenizer=byte_tokenizer(),
        tokenizer_sha256="b" * 64,
    )
    return replace(base, **changes)
