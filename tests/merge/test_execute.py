"""Folders and live weights: what is refused, what is written, and that it is all or nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError
from clbench.merge import execute, kernels, tensors
from clbench.merge.execute import (
    PLAN_FILE,
    Sources,
    compress_moments,
    graft_threshold,
    merge_folder,
    merge_weights,
    remove_stale,
)
from clbench.merge.plan import KEEP, RESTORE, Action, MergePlan, Rule
from clbench.merge.tensors import ShardWriter, TensorInfo, check_compatible, open_source
from clbench.method import Weights
from clbench.train.checkpoint import TrainState, save
from tests.merge.models import everything, gaussian, live, make_weights, write_model

BASE = make_weights(0)
TUNED = make_weights(1, like=BASE)
SLERP = Action("slerp", {"s": 0.4})
PLAN = MergePlan(KEEP, (Rule("layers.1", SLERP, "matrices"), Rule("layers.1", Action("lerp", {"s": 0.4})),
                        Rule("layers.2", RESTORE)))  # fmt: skip


def folders(tmp_path: Path, tuned: Weights = TUNED, base: Weights = BASE, shards: tuple[int, int] = (1, 1)) -> Sources:
    return Sources(
        tuned=open_source(write_model(tmp_path / "tuned", tuned, n_shards=shards[0])),
        base=open_source(write_model(tmp_path / "base", base, n_shards=shards[1])),
    )


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def written(folder: Path) -> Weights:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# --- what comes out ---


@pytest.mark.parametrize(("tuned", "base", "shard_bytes"), [(1, 1, 5 * 10**9), (3, 1, 10**9), (2, 4, 600), (1, 2, 1)])
def test_folders_and_live_weights_give_the_same_bits_whatever_the_shards(
    tmp_path: Path, tuned: int, base: int, shard_bytes: int
) -> None:
    sources = folders(tmp_path, shards=(tuned, base))
    merge_folder(PLAN, sources, tmp_path / "out", shard_bytes=shard_bytes)
    wanted = merge_weights(PLAN, live(TUNED, BASE))
    assert equal(written(tmp_path / "out"), wanted)
    assert equal(everything(open_source(tmp_path / "out")), wanted)
    largest = max(tensor.nbytes for tensor in TUNED.values())
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.stat().st_size <= max(shard_bytes, largest) + 4096


def test_only_what_was_selected_moves() -> None:
    merged = merge_weights(PLAN, live(TUNED, BASE))
    for name, tensor in merged.items():
        layer = name.split(".")[2] if "layers" in name else None
        if layer == "1":
            kernel = kernels.slerp if tensor.ndim > 1 else kernels.lerp
            assert torch.equal(tensor, kernel(TUNED[name], BASE[name], 0.4)) and not torch.equal(tensor, TUNED[name])
        else:
            assert torch.equal(tensor, (BASE if layer == "2" else TUNED)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_empty_plan_is_the_tuned_model_and_full_restoration_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_weights(0, dtype=dtype)
    tuned = make_weights(1, like=base, dtype=dtype)
    sources = folders(tmp_path, tuned, base)
    for plan, wanted in (
        (MergePlan(), tuned),
        (MergePlan(RESTORE), base),
        (MergePlan(Action("slerp", {"s": 1})), base),
    ):
        merge_folder(plan, sources, tmp_path / "out", overwrite=True)
        assert equal(written(tmp_path / "out"), wanted)


def test_equal_models_stay_what_they_are() -> None:
    for action in (SLERP, Action("dare", {"density": 0.1, "seed": 0}), Action("dg_hard", {"min_numel": 1})):
        assert equal(merge_weights(MergePlan(action), live(TUNED, TUNED)), TUNED)


def test_configuration_and_tokenizer_are_the_tuned_models_and_nothing_else_comes_along(tmp_path: Path) -> None:
    sources = folders(tmp_path)
    for name in ("README.md", "modeling_own.py", "optimizer.pt", "training_args.bin", "LICENSE"):
        (tmp_path / "tuned" / name).write_text(name)
    (tmp_path / "base" / "chat_template.jinja").write_text("base's own")
    merge_folder(PLAN, sources, tmp_path / "out")
    names = {"config.json", "generation_config.json", "tokenizer.json", "LICENSE"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"model.safetensors", PLAN_FILE}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes()


def test_the_note_says_what_was_done_and_digests_do_not_depend_on_shards(tmp_path: Path) -> None:
    one = merge_folder(PLAN, folders(tmp_path / "1"), tmp_path / "1" / "out")
    two = merge_folder(PLAN, folders(tmp_path / "2", shards=(3, 2)), tmp_path / "2" / "out")
    assert one == two == json.loads((tmp_path / "1" / "out" / PLAN_FILE).read_text())
    assert MergePlan.from_dict(one["plan"]) == PLAN
    assert one["inputs"]["tuned"]["weights_sha256"] != one["inputs"]["base"]["weights_sha256"]
    changed = TUNED | {"model.norm.weight": TUNED["model.norm.weight"] + 1}
    other = merge_folder(PLAN, folders(tmp_path / "3", changed), tmp_path / "3" / "out")
    assert other["inputs"]["tuned"]["weights_sha256"] != one["inputs"]["tuned"]["weights_sha256"]
    assert other["inputs"]["base"] == one["inputs"]["base"]
    assert str(tmp_path) not in json.dumps(one)


def test_dare_draws_by_tensor_name_and_seed() -> None:
    plan = MergePlan(Action("dare", {"density": 0.5, "seed": 3}))
    one = merge_weights(plan, live(TUNED, BASE))
    backwards = merge_weights(plan, live(dict(reversed(TUNED.items())), BASE))
    assert equal(dict(sorted(one.items())), dict(sorted(backwards.items())))
    other = merge_weights(MergePlan(Action("dare", {"density": 0.5, "seed": 4})), live(TUNED, BASE))
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_several_experts() -> None:
    other = make_weights(2, like=BASE)
    for action, wanted in (
        (Action("model_stock"), lambda n: kernels.model_stock(TUNED[n], BASE[n], [other[n]])),
        (Action("nuslerp", {"t": 0.3}), lambda n: kernels.nuslerp(TUNED[n], BASE[n], other[n], 0.3)),
    ):
        merged = merge_weights(MergePlan(action), live(TUNED, BASE, other))
        assert all(torch.equal(merged[n], wanted(n)) for n in merged if TUNED[n].is_floating_point())
        with pytest.raises(ConfigError, match="another tuned model"):
            merge_weights(MergePlan(action), live(TUNED, BASE))
    with pytest.raises(ConfigError, match="1 weights for 2 models"):
        merge_weights(MergePlan(Action("task_arithmetic", {"weights": [1.0]})), live(TUNED, BASE, other))


def test_tied_weights_are_merged_once_even_where_both_are_stored(tmp_path: Path) -> None:
    def stored_twice(weights: Weights) -> Weights:
        return weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}

    sources = folders(tmp_path, stored_twice(TUNED), stored_twice(BASE))
    plan = MergePlan(KEEP, (Rule("embed_tokens", Action("dare", {"density": 0.5, "seed": 0})),))
    note = merge_folder(plan, sources, tmp_path / "out")
    merged = written(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], TUNED["model.embed_tokens.weight"])
    assert note["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    merge_folder(MergePlan(SLERP), folders(tmp_path / "untied"), tmp_path / "untied" / "out")
    assert "lm_head.weight" not in written(tmp_path / "untied" / "out")


def test_a_head_that_is_tied_by_name_only_is_refused(tmp_path: Path) -> None:
    tuned = TUNED | {"lm_head.weight": TUNED["model.embed_tokens.weight"] + 1}
    base = BASE | {"lm_head.weight": BASE["model.embed_tokens.weight"].clone()}
    with pytest.raises(ConfigError, match=r"lm_head\.weight of tuned is tied"):
        merge_folder(PLAN, folders(tmp_path, tuned, base), tmp_path / "out")


# --- what is refused ---


def without(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "model.layers.3.norm.weight"), "3.norm.weight is in tuned and not in base"),
        (lambda w: w | {"extra.weight": torch.zeros(2)}, "extra.weight is in base and not in tuned"),
        (lambda w: w | {"lm_head.weight": torch.zeros(11, 6)}, "lm_head.weight .* tied"),
        (lambda w: w | {"model.embed_tokens.weight": torch.zeros(12, 6)}, r"tokens.weight has shape \(11, 6\)"),
        (lambda w: w | {"model.norm.weight": w["model.norm.weight"].half()}, "model.norm.weight is float32"),
        (lambda w: w | {"model.position_ids": torch.arange(1, 8)}, r"model.position_ids \(int64\) differs"),
        (lambda w: w | {"model.mask": torch.tensor([True, True, True])}, r"model.mask \(bool\) differs"),
    ],
)  # fmt: skip
def test_every_mismatch_names_its_tensor_before_anything_is_written(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_weights(PLAN, live(TUNED, change(BASE)))
    with pytest.raises(ConfigError, match=message):
        merge_folder(PLAN, folders(tmp_path, base=change(BASE)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ({"num_attention_heads": 4}, {}, "num_attention_heads is 2 in tuned and 4"),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "rope"),
        ({}, {"model": {"type": "BPE", "vocab": {"b": 0, "a": 1}, "merges": ["a b"]}}, "tokenizers differ"),
        ({}, {"added_tokens": [{"id": 2, "content": "<x>"}]}, "tokenizers differ"),
    ],
)
def test_models_that_compute_otherwise_or_read_otherwise_are_refused(
    tmp_path: Path, config: dict, tokenizer: dict, message: str
) -> None:
    tuned = open_source(write_model(tmp_path / "tuned", TUNED, config={"rope_theta": 1e4}))
    base = open_source(write_model(tmp_path / "base", BASE, config=config, tokenizer=tokenizer))
    with pytest.raises(ConfigError, match=message):
        check_compatible([tuned, base])


def test_old_and_new_spellings_are_one_model(tmp_path: Path) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float32", "head_dim": None}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float32", "head_dim": 3}
    merges = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}, "padding": {"length": 4}}
    tuned = open_source(write_model(tmp_path / "tuned", TUNED, config=new, tokenizer=merges))
    check_compatible([tuned, open_source(write_model(tmp_path / "base", BASE, config=old))])


def test_mixed_types_are_merged_where_that_is_allowed() -> None:
    base = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in BASE.items()}
    merged = merge_weights(MergePlan(SLERP), live(TUNED, base), mixed_dtypes=True)
    assert merged["model.norm.weight"].dtype == torch.float32
    with pytest.raises(ConfigError, match="allow mixed types"):
        merge_weights(MergePlan(SLERP), live(TUNED, base))


def test_places_that_are_taken_or_read_from_are_refused(tmp_path: Path) -> None:
    sources = folders(tmp_path)
    (tmp_path / "out").mkdir()
    merge_folder(PLAN, sources, tmp_path / "out")  # an empty folder is free
    with pytest.raises(ConfigError, match="something already"):
        merge_folder(PLAN, sources, tmp_path / "out")
    for out in (tmp_path / "tuned", tmp_path / "base", tmp_path):
        with pytest.raises(ConfigError, match="is read from there"):
            merge_folder(PLAN, sources, out, overwrite=True)


# --- broken inputs ---


def test_pickles_adapters_and_missing_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="missing"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(IntegrityError, match="pickled weights are not read"):
        open_source(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="adapter"):
        open_source(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_file({"b": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(IntegrityError, match="no index"):
        open_source(tmp_path)


def test_damaged_files_and_indexes_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", TUNED, n_shards=2)
    index = json.loads((folder / tensors.INDEX).read_text())
    shard = folder / "model-00001-of-00002.safetensors"

    def fails(message: str, changed: dict[str, str]) -> None:
        (folder / tensors.INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(IntegrityError, match=message):
            open_source(folder)

    places = index["weight_map"]
    fails("points outside", places | {"model.norm.weight": "../elsewhere.safetensors"})
    fails("shard x.safetensors is missing", places | {"model.norm.weight": "x.safetensors"})
    fails("disagree about tensor ghost", places | {"ghost": shard.name})
    fails("disagree about tensor model.norm", without(places, "model.norm.weight"))
    fails("maps no weights", {})
    shard.write_bytes(shard.read_bytes()[:-3])
    fails("corrupted", places)


# --- the writer ---


def test_shards_are_read_by_the_library_also_with_mixed_types_and_empty_tensors(tmp_path: Path) -> None:
    mixed = {
        "bool": torch.tensor([True]),
        "byte": torch.zeros(3, dtype=torch.uint8),
        "f64": gaussian(3, seed=0).double(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "bf16": gaussian(5, seed=1).bfloat16(),
    }
    layout = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in mixed.items()}
    writer = ShardWriter(tmp_path, layout)
    for name in writer.order:
        writer.write(name, mixed[name])
    writer.close()
    assert equal(load_file(tmp_path / "model.safetensors"), mixed)
    source = open_source(tmp_path)
    assert equal(everything(source), mixed)
    assert source._places["bool"][0] == 0 and all(
        place % layout[name].dtype.itemsize == 0 for name, (_, place) in source._places.items()
    )


def test_the_writer_refuses_another_order_and_a_missing_end(tmp_path: Path) -> None:
    layout = {name: TensorInfo(torch.float32, (2,)) for name in "ab"}
    writer = ShardWriter(tmp_path, layout)
    with pytest.raises(ValueError, match="expected a"):
        writer.write("b", torch.zeros(2))
    writer = ShardWriter(tmp_path, layout)
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="were not written"):
        writer.close()
    writer.abort()


def test_tensors_at_odd_places_are_read(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                         "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}).encode()  # fmt: skip
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert open_source(tmp_path).read("b").tolist() == [1.5, -2.0]


def test_memory_given_back_can_be_read_again(tmp_path: Path) -> None:
    weights = {"a": gaussian(300, 300, seed=0), "b": gaussian(300, 300, seed=1)}
    source = open_source(write_model(tmp_path / "m", weights))
    for _ in range(2):
        for name, tensor in weights.items():
            assert torch.equal(source.read(name), tensor)
            source.done(name)


# --- all or nothing ---


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sources = folders(tmp_path)
    monkeypatch.setattr(execute.ShardWriter, "write", full)
    with pytest.raises(ClbenchError, match="disk is full"):
        merge_folder(PLAN, sources, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_kill_leaves_no_output_and_the_next_merge_cleans_up(tmp_path: Path) -> None:
    sources = folders(tmp_path)
    code = f"""
        import time
        from pathlib import Path
        from clbench.merge import execute
        from clbench.merge.plan import MergePlan
        from clbench.merge.tensors import open_source
        here = Path({str(tmp_path)!r})
        sources = execute.Sources(tuned=open_source(here / "tuned"), base=open_source(here / "base"))
        def slow(done, total):
            print("begun", flush=True)
            time.sleep(60)
        execute.merge_folder(MergePlan(), sources, here / "out", progress=slow)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    [left] = tmp_path.glob(".out.*.tmp")
    assert not (tmp_path / "out").exists()
    remove_stale(tmp_path / "out")
    assert left.exists()  # another process may be writing it
    old = time.time() - 2 * execute.STALE_SECONDS
    for path in (*left.rglob("*"), left):
        os.utime(path, (old, old))
    merge_folder(PLAN, sources, tmp_path / "out")
    assert not left.exists() and (tmp_path / "out" / PLAN_FILE).exists()


# --- grafting ---


def moments_of(weights: Weights) -> Weights:
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    return {f"exp_avg_sq/{n}": gaussian(*t.shape, seed=i).square() for i, (n, t) in enumerate(floats.items())}


def test_a_density_over_the_whole_model_is_exact() -> None:
    sources = live(TUNED, BASE, moments=moments_of(TUNED))
    threshold = graft_threshold(sources, 0.3)
    merged = merge_weights(MergePlan(Action("graft", {"threshold": threshold})), sources)
    floats = [name for name in TUNED if TUNED[name].is_floating_point()]
    n_tuned = sum(int((merged[name] == TUNED[name]).sum()) for name in floats)
    assert n_tuned == math.floor(0.3 * sum(TUNED[name].numel() for name in floats))
    assert all(bool(((merged[n] == TUNED[n]) | (merged[n] == BASE[n])).all()) for n in floats)


def test_moments_come_from_a_resume_state_whole_or_as_sums(tmp_path: Path) -> None:
    moments = moments_of(TUNED)
    weights = {name: tensor for name, tensor in TUNED.items() if tensor.is_floating_point()}
    state = save(tmp_path, TrainState(1, 1, True, weights, optimizer=moments))
    plan = MergePlan(Action("graft", {"density": 0.5}))
    whole = Sources(
        tuned=open_source(TUNED), base=open_source(BASE), moments=open_source(state / "optimizer.safetensors")
    )
    assert equal(merge_weights(plan, whole), merge_weights(plan, live(TUNED, BASE, moments=moments)))
    small = compress_moments(moments)
    assert sum(t.numel() for t in small.values()) < 0.5 * sum(t.numel() for t in moments.values())
    name = "model.layers.0.mlp.up_proj.weight"
    merged = merge_weights(plan, live(TUNED, BASE, moments=small))[name]
    wanted = kernels.moment_from_factors(*kernels.moment_factors(moments[f"exp_avg_sq/{name}"]))
    assert torch.equal(merged, kernels.graft(TUNED[name], BASE[name], wanted, density=0.5))


def test_missing_or_foreign_moments_are_refused() -> None:
    plan, moments = MergePlan(Action("graft", {"density": 0.5})), moments_of(TUNED)
    name = "exp_avg_sq/model.norm.weight"
    with pytest.raises(ConfigError, match="needs Adam"):
        merge_weights(plan, live(TUNED, BASE))
    with pytest.raises(ConfigError, match=r"no second moments of model\.norm\.weight"):
        merge_weights(plan, live(TUNED, BASE, moments=without(moments, name)))
    with pytest.raises(ConfigError, match="have shape"):
        merge_weights(plan, live(TUNED, BASE, moments=moments | {name: torch.zeros(7)}))
