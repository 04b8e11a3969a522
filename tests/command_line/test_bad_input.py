"""Input that is damaged, foreign or not there: streams, networks, checkpoints from elsewhere."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clbench import index
from clbench.results.store import RunStore
from tests.command_line.driver import Outcome, clbench, write_track


@pytest.fixture
def own_home(clbench_home: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache folder that a test may damage."""
    home = tmp_path / "home"
    shutil.copytree(clbench_home, home)
    monkeypatch.setenv("CLBENCH_HOME", str(home))
    return home


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "empty"))
    return tmp_path / "empty"


def run(track: Path, out: Path) -> Outcome:
    return clbench("run", "-m", "frozen", "-t", track, "-o", out, "--mlflow", "none")


# --- streams and bases


def test_a_stream_with_one_changed_bit_is_refused_and_the_remedy_works(
    own_home: Path, tiny: Path, tmp_path: Path
) -> None:
    (path,) = own_home.glob("streams/tinydocs-*/tokens/train-01.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    error = run(tiny, tmp_path).error
    assert "not what its manifest says" in error
    assert str(path) in error
    assert f"delete {path.parents[1]} and run `clbench prepare tinydocs`" in error
    assert not list(tmp_path.rglob("run.yaml"))
    shutil.rmtree(path.parents[1])
    assert clbench("prepare", "tinydocs").code == 0
    assert run(tiny, tmp_path).code == 0


def test_a_stream_manifest_that_is_no_json_is_refused(own_home: Path, tiny: Path, tmp_path: Path) -> None:
    (path,) = own_home.glob("streams/tinydocs-*/manifest.json")
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert "not valid JSON" in run(tiny, tmp_path).error


def test_a_track_that_was_frozen_on_another_stream_is_refused(tiny: Path, tmp_path: Path) -> None:
    track = write_track(tmp_path / "track.yaml", stream_sha256="0" * 64)
    for outcome in (run(track, tmp_path), clbench("prepare", track)):
        assert "was frozen on 000000000000" in outcome.error
        assert "docs/tracks.md" in outcome.error


def test_a_changed_base_is_refused(own_home: Path, tiny: Path, tmp_path: Path) -> None:
    for path in own_home.glob("bases/tiny-*/model/model.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    assert "the base is not what was made" in run(tiny, tmp_path).error


@pytest.mark.parametrize("part", ["streams", "bases"])
def test_what_was_not_prepared_is_named_with_the_command(own_home: Path, tiny: Path, tmp_path: Path, part: str) -> None:
    shutil.rmtree(own_home / part)
    assert "run `clbench prepare` with the track's file first" in run(tiny, tmp_path).error
    shutil.rmtree(own_home)
    assert (
        "run `clbench prepare tinydocs` first" in clbench("run", "-m", "frozen", "-t", "tinydocs", "-o", tmp_path).error
    )


def test_row_zero_outside_the_tolerance_is_said(tiny: Path, tmp_path: Path) -> None:
    row0 = {"nats_per_token": [1.0] * 4, "bits_per_byte": [1.0] * 4, "tolerance_nats": 0.01}
    outcome = run(write_track(tmp_path / "track.yaml", row0=row0), tmp_path)
    assert outcome.code == 0
    assert "more than its tolerance 0.01" in outcome.err
    short = {"nats_per_token": [1.0], "bits_per_byte": [1.0], "tolerance_nats": 0.01}
    outcome = run(write_track(tmp_path / "track.yaml", row0=short), tmp_path / "b")
    assert "row0 has 1 losses, the stream 4 stages" in outcome.error


# --- no network


def test_prepare_says_that_the_network_is_switched_off(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    error = clbench("prepare", "codedocs-nano").error
    assert "CLBENCH_OFFLINE forbids the network" in error
    assert "unset CLBENCH_OFFLINE and run `clbench prepare`" in error
    assert not list(empty_home.rglob("manifest.json"))


def test_prepare_says_that_the_index_does_not_answer(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:  # a port that nobody listens at
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}/simple/"
    monkeypatch.setattr("pypi_simple.PYPI_SIMPLE_ENDPOINT", endpoint)
    monkeypatch.setitem(index.fetch.__kwdefaults__, "retry_delays_seconds", (0.01,))
    monkeypatch.delenv("CLBENCH_OFFLINE", raising=False)
    error = clbench("prepare", "codedocs-nano").error
    assert "the package index did not answer" in error
    assert "run again with a network" in error
    assert not list(empty_home.rglob("manifest.json"))
    assert [path.name for path in empty_home.rglob("*") if path.suffix == ".tmp"] == []


def test_a_stream_without_downloads_needs_no_network(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    made = clbench("prepare", "tinydocs", "--json")
    assert made.code == 0, made.err
    (about,) = json.loads(made.out)
    assert about["track"] == "tinydocs"
    assert Path(about["base"]["folder"]).is_relative_to(empty_home)


# --- checkpoints from elsewhere


@pytest.fixture
def checkpoints(runs: Path, tmp_path: Path) -> list[Path]:
    """Two Hugging Face folders that a test may damage: the release weights of stages 1 and 2 of a run."""
    made = []
    for stage in (1, 2):
        made.append(tmp_path / f"checkpoint-{stage}")
        shutil.copytree(runs / "tiny" / "sequential" / "seed-0" / "release" / f"stage-{stage:02d}", made[-1])
    return made


def evaluate(tiny: Path, pairs: Sequence[str], out: Path) -> Outcome:
    return clbench("evaluate", "-t", tiny, "--out", out, "--json", "--checkpoints", *pairs)


def test_outside_checkpoints_get_the_matrix_that_the_run_has(
    tiny: Path, runs: Path, checkpoints: list[Path], tmp_path: Path, clbench_home: Path
) -> None:
    shutil.rmtree(clbench_home / "cells")  # measured, not looked up
    outcome = evaluate(tiny, [f"0={checkpoints[0]}", f"1={checkpoints[1]}"], tmp_path / "mine")
    assert outcome.code == 0, outcome.err
    mine, theirs = RunStore(tmp_path / "mine"), RunStore(runs / "tiny" / "sequential" / "seed-0")
    assert mine.stages_done() == [0, 1]
    assert mine.rows("heldout", 0).equals(theirs.rows("heldout", 1))
    assert mine.rows("heldout", 1).equals(theirs.rows("heldout", 2))
    (about,) = json.loads(outcome.out)
    assert about["label"] == "my-checkpoints"
    again = evaluate(tiny, [f"0={checkpoints[0]}", f"1={checkpoints[1]}"], tmp_path / "mine")
    assert again.code == 0
    page = clbench("report", tmp_path / "mine", "--out", tmp_path / "report.html")
    assert page.code == 0, page.err
    assert "my-checkpoints" in (tmp_path / "report.html").read_text(encoding="utf-8")


def save_foreign(folder: Path, *, vocab_size: int = 300) -> None:
    """Save an untrained model with a byte-level tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from clbench.track import ModelSpec
    from clbench.train.models import make_model, save_model, weights_of

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the value of the name is the name of the value " * 9] * 9, trainer)
    spec = ModelSpec(hidden_size=16, intermediate_size=32, n_layers=1, n_heads=2, max_length=48)
    model = make_model(spec, vocab_size=vocab_size, eos_id=0, seed=0)
    save_model(model, weights_of(model), folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def test_a_checkpoint_with_a_tokenizer_of_its_own_is_read_through_it(tiny: Path, runs: Path, tmp_path: Path) -> None:
    """An untrained model gives every token about 1/V: ln V nats, whatever the text."""
    save_foreign(tmp_path / "foreign")
    from transformers import AutoTokenizer

    n_ids = len(AutoTokenizer.from_pretrained(tmp_path / "foreign"))
    outcome = evaluate(tiny, [f"0={tmp_path / 'foreign'}"], tmp_path / "mine")
    assert outcome.code == 0, outcome.err
    rows = RunStore(tmp_path / "mine").rows("heldout", 0).to_pydict()
    own = RunStore(runs / "tiny" / "sequential" / "seed-0").rows("heldout", 0).to_pydict()
    assert rows["item"] == own["item"]
    assert rows["n_bytes"] == own["n_bytes"]
    assert sum(rows["n_tokens"]) > 1.2 * sum(own["n_tokens"]), "a tokenizer of other text needs more tokens"
    assert n_ids <= 300
    assert sum(rows["value"]) / sum(rows["n_tokens"]) == pytest.approx(math.log(300), abs=0.05)


def test_a_foreign_tokenizer_with_more_ids_than_the_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    save_foreign(tmp_path / "foreign", vocab_size=260)
    assert "beyond the model's vocabulary of 260" in evaluate(tiny, [f"0={tmp_path / 'foreign'}"], tmp_path / "a").error


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}), encoding="utf-8")


def missing_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")


def code_of_its_own(folder: Path) -> None:
    """Asks for code from the folder to be run: it must not be."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config | own), encoding="utf-8")
    (folder / "evil.py").write_text("raise SystemExit('the code of a checkpoint was run')", encoding="utf-8")


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (shutil.rmtree, "checkpoint folder is missing"),
        (no_tokenizer, "no tokenizer beside this checkpoint"),
        (broken_tokenizer, "tokenizer"),
        (cut_weights, "weights are corrupted"),
        (no_weights, "no safetensors file"),
        (pickled_weights, "no safetensors file"),
        (no_config, "cannot be loaded"),
        (other_shape, "cannot be loaded"),
        (missing_layer, "weights are missing, the first is model.layers.2."),
        (code_of_its_own, "cannot be loaded"),
    ],
)
def test_a_checkpoint_that_cannot_be_measured_gets_one_line(
    tiny: Path, checkpoints: list[Path], tmp_path: Path, break_it: Any, expected: str
) -> None:
    break_it(checkpoints[1])
    outcome = evaluate(tiny, [f"0={checkpoints[0]}", f"1={checkpoints[1]}"], tmp_path / "mine")
    assert expected in outcome.error
    assert str(checkpoints[1]) in outcome.error
    assert outcome.out == ""
    if RunStore(tmp_path / "mine").status()["state"] != "absent":
        assert RunStore(tmp_path / "mine").status()["state"] == "failed"


@pytest.mark.parametrize(("stage", "expected"), [("9", "stage 9 is not in the stream"), ("4", "K from 0 to 3")])
def test_a_stage_beyond_the_stream_is_refused(
    tiny: Path, checkpoints: list[Path], tmp_path: Path, stage: str, expected: str
) -> None:
    assert expected in evaluate(tiny, [f"{stage}={checkpoints[0]}"], tmp_path / "mine").error
    assert not (tmp_path / "mine").exists()


def test_other_weights_in_the_same_folder_are_refused(tiny: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    assert evaluate(tiny, [f"0={checkpoints[0]}", f"1={checkpoints[0]}"], tmp_path / "mine").code == 0
    error = evaluate(tiny, [f"0={checkpoints[0]}", f"1={checkpoints[1]}"], tmp_path / "mine").error
    assert "this folder holds another run: method options" in error


def test_a_hub_id_without_a_network_is_one_line(tiny: Path, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set for all tests; a closed network ends at the same place."""
    outcome = evaluate(tiny, ["0=no-such-organisation/no-such-model"], tmp_path / "mine")
    assert "no-such-organisation/no-such-model" in outcome.error
