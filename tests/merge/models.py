"""Small checkpoints for the tests of merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clbench.merge.execute import Sources
from clbench.merge.tensors import INDEX, TensorSource, open_source
from clbench.method import Weights

CONFIG = {"model_type": "llama", "num_hidden_layers": 12, "num_attention_heads": 2, "tie_word_embeddings": True}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "added_tokens": []}


def gaussian(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_weights(seed: int, *, like: Weights | None = None, drift: float = 0.5, dtype: Any = torch.float32) -> Weights:
    """Weights of a model of 12 blocks; ``like``: those of a model that was trained on from there."""
    shapes = {"model.embed_tokens.weight": (11, 6), "model.norm.weight": (6,)}
    for layer in range(12):
        shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (8, 6), f"model.layers.{layer}.norm.weight": (6,)}
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        fresh = gaussian(*shape, seed=1000 * seed + number)
        weights[name] = (fresh if like is None else like[name].float() + drift * fresh).to(dtype)
    weights["model.position_ids"] = torch.arange(7)
    weights["model.mask"] = torch.tensor([True, False, True])
    return weights


def write_model(
    folder: Path, weights: Weights, *, n_shards: int = 1, config: Any = None, tokenizer: Any = None
) -> Path:
    """A Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, **(tokenizer or {})}))
    if n_shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {name: f"model-{i % n_shards + 1:05d}-of-{n_shards:05d}.safetensors" for i, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in weights.items() if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return folder


def live(tuned: Weights, base: Weights, *others: Weights, moments: Weights | None = None) -> Sources:
    return Sources(
        tuned=open_source(tuned, "tuned"),
        base=open_source(base, "base"),
        others=tuple(open_source(other, f"other {n}") for n, other in enumerate(others)),
        moments=open_source(moments, "moments") if moments else None,
    )


def everything(source: TensorSource) -> Weights:
    return {name: source.read(name).clone() for name in source.layout}
