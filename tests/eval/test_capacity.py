"""Suite capacity: its rows against a plain forward pass of one document at a time, and what it compares with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clbench import cells
from clbench.errors import ConfigError, NonFiniteError
from clbench.eval.capacity import Capacity, choose_layers, parts_of
from clbench.eval.heldout import Heldout
from clbench.registry import make_suite
from clbench.results.store import RunStore
from clbench.stream import Stream
from clbench.suite import UNDATED, UNDEFINED, Checkpoint, Reference, Rows
from clbench.train.models import weights_sha256
from tests.engine import component, prepare_tiny, tiny_track

LENGTH, SKIP, WIDTH = 48, 4, 16
OPTIONS = Capacity.Options(max_length=LENGTH, skip=SKIP, n_vectors=150)
Floats = np.ndarray[Any, np.dtype[np.float64]]


def llama(stream: Stream, seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": stream.vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def checkpoint_of(model: Any, **changes: Any) -> Checkpoint:
    one = Checkpoint(model=model, weights_sha256=weights_sha256(model), device=torch.device("cpu"), autocast_dtype=None)
    return replace(one, **changes)


def reference_of(model: Any) -> Reference:
    import copy

    return Reference(weights_sha256=weights_sha256(model), load=lambda: copy.deepcopy(model))


def values(rows: Rows, **wanted: Any) -> dict[tuple[str, int, str], float]:
    """(item, stage, metric) -> value, of rows with such a column."""
    keep = [i for i in range(len(rows.item)) if all(getattr(rows, name)[i] == value for name, value in wanted.items())]
    return {(rows.item[i], int(rows.stage[i]), rows.metric[i]): float(rows.value[i]) for i in keep}


@pytest.fixture(scope="module")
def stream(tinydocs: Stream) -> Stream:
    return tinydocs


@pytest.fixture(scope="module")
def model(stream: Stream) -> Any:
    return llama(stream)


@pytest.fixture(scope="module")
def other(stream: Stream) -> Any:
    """Weights near those of ``model``."""
    near = llama(stream)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.05 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return near


@pytest.fixture(scope="module")
def rows(stream: Stream, model: Any, other: Any) -> Rows:
    checkpoint = checkpoint_of(model, base=reference_of(other), previous=reference_of(other))
    return Capacity(stream, replace(OPTIONS, gradients=True, gradient_rows=6)).measure(checkpoint)


def plain_documents(stream: Stream, stage: int) -> Iterator[list[int]]:
    """Yield the documents of a period in the order of the probe, each after the prefix, cut until 150 positions."""
    names = stream.documents("heldout", stage, ["id"]).to_pydict()["id"]
    tokens, offsets = stream.tokens("heldout", stage), stream.offsets("heldout", stage)
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(f"0\x1f{names[i]}".encode()).digest())
    left = 150
    for i in order:
        ids = tokens[offsets[i] : offsets[i + 1] - 1].tolist()[: min(LENGTH, SKIP + left)]
        if len(ids) > SKIP and left > 0:
            yield [stream.eos_id, *ids]
            left -= len(ids) - SKIP


def plain_pass(model: Any, stream: Stream, stage: int) -> tuple[Floats, Floats, Floats]:
    """Vectors after the first block and after the norm, and losses, of every sample of a period."""
    first, final, nats = [], [], []
    for ids in plain_documents(stream, stage):
        inputs = torch.tensor([ids[:-1]])
        with torch.no_grad():
            output = model(inputs, output_hidden_states=True)
        first.append(output.hidden_states[1][0, SKIP:])
        final.append(output.hidden_states[-1][0, SKIP:])
        losses = torch.nn.functional.cross_entropy(output.logits[0], torch.tensor(ids[1:]), reduction="none")
        nats.append(losses[SKIP:])
    found = [torch.cat(parts).double().numpy() for parts in (first, final, nats)]
    return found[0], found[1], found[2]


# --- representation


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_are_those_of_a_plain_pass(stream: Stream, model: Any, rows: Rows, stage: int) -> None:
    first, final, _ = plain_pass(model, stream, stage)
    assert first.shape == (150, WIDTH)
    found = values(rows, group="representation")
    for item, x in (("first", first), ("final", final)):
        for form, matrix in (("uncentred", x), ("centred", x - x.mean(0))):
            sigma = np.linalg.svd(matrix, compute_uv=False)
            for metric, spectrum in (("rankme_sigma", sigma), ("erank_cov", sigma**2)):
                p = spectrum / spectrum.sum() + 1e-7
                expected = math.exp(-np.sum(p * np.log(p)))
                assert found[item, stage, f"{metric}:{form}"] == pytest.approx(expected, rel=1e-5)
            expected = np.sum(sigma**2) / sigma[0] ** 2
            assert found[item, stage, f"stable_rank:{form}"] == pytest.approx(expected, rel=1e-5)
        assert found[item, stage, "n_per_width"] == pytest.approx(150 / WIDTH)


def test_all_periods_together_are_the_samples_of_all(stream: Stream, model: Any, rows: Rows) -> None:
    final = np.concatenate([plain_pass(model, stream, stage)[1] for stage in range(4)])
    sigma = np.linalg.svd(final - final.mean(0), compute_uv=False)
    found = values(rows, group="representation", item="final", stage=UNDATED)
    expected = np.sum(sigma**2) / sigma[0] ** 2
    assert found["final", UNDATED, "stable_rank:centred"] == pytest.approx(expected, rel=1e-5)
    pooled = [n for n, i, s in zip(rows.n_tokens, rows.item, rows.stage, strict=True) if (i, s) == ("final", UNDATED)]
    assert set(pooled) == {600}


def test_layers_are_named_and_counted_once(model: Any) -> None:
    assert choose_layers(model, "first+middle+last+final") == {"first": 0, "middle": 1, "last": 2, "final": None}
    assert choose_layers(model, "2+last+final") == {"block 2": 2, "final": None}
    with pytest.raises(ConfigError, match="no block 3"):
        choose_layers(model, "3")


def test_shifts_against_the_base_are_those_of_a_plain_pass(stream: Stream, model: Any, other: Any, rows: Rows) -> None:
    x, y = plain_pass(model, stream, 1)[1], plain_pass(other, stream, 1)[1]
    found = values(rows, group="base")
    cosines = np.sum(x * y, axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert found["final", 1, "cosine_shift"] == pytest.approx(1 - cosines.mean(), rel=1e-4)
    x, y = x - x.mean(0), y - y.mean(0)
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    nuclear = np.linalg.svd(x.T @ y, compute_uv=False).sum()
    assert found["final", 1, "procrustes"] == pytest.approx(math.sqrt(2 - 2 * nuclear), rel=1e-4)
    assert 0.5 < found["final", 1, "cka_debiased"] < 1


def test_against_itself_nothing_has_moved(stream: Stream, model: Any) -> None:
    same = Reference(weights_sha256=weights_sha256(model), load=lambda: pytest.fail("it is at hand already"))
    found = values(Capacity(stream, OPTIONS).measure(checkpoint_of(model, base=same)))
    assert found["final", 0, "cka_debiased"] == pytest.approx(1, abs=1e-9)
    assert found["final", 0, "procrustes"] == pytest.approx(0, abs=1e-6)
    assert found["final", 0, "cosine_shift"] == pytest.approx(0, abs=1e-9)
    assert found["all", UNDATED, "drift"] == 0
    assert found["base", 0, "magnitude_nats"] == 0 and math.isnan(found["base", 0, "interference"])


def test_without_a_base_what_compares_is_nan_and_says_why(stream: Stream, model: Any, rows: Rows) -> None:
    alone = Capacity(stream, replace(OPTIONS, gradients=True, gradient_rows=6)).measure(checkpoint_of(model))
    assert (alone.item, alone.stage.tolist(), alone.metric) == (rows.item, rows.stage.tolist(), rows.metric)
    told = {(alone.group[i], alone.change[i]) for i in range(len(alone.item)) if alone.change[i].startswith(UNDEFINED)}
    assert ("base", f"{UNDEFINED}the checkpoint has no base to compare with") in told
    assert ("weights", f"{UNDEFINED}the checkpoint has no base to compare with") in told
    assert ("interference", f"{UNDEFINED}the checkpoint has no previous one to compare with") in told
    for one in (alone, rows):
        assert [change.startswith(UNDEFINED) for change in one.change] == np.isnan(one.value).tolist()


def test_a_base_of_another_shape_is_no_base(stream: Stream, model: Any) -> None:
    wide = reference_of(llama(stream, intermediate_size=44))
    found = Capacity(stream, OPTIONS).measure_shard(checkpoint_of(model, base=wide), "weights")
    drift = found.metric.index("drift")
    assert math.isnan(found.value[drift]) and "has shape (40, 16), in the other (44, 16)" in found.change[drift]


def test_too_few_samples_are_told(stream: Stream, model: Any) -> None:
    found = Capacity(stream, replace(OPTIONS, n_vectors=30)).measure_shard(checkpoint_of(model), "activations")
    by_stage = {
        int(found.stage[i]): found.change[i]
        for i in range(len(found.item))
        if found.metric[i] == "erank_cov:centred" and found.item[i] == "final"
    }
    assert by_stage[0] == f"{UNDEFINED}30 samples of width 16, 4 a dimension are wanted"
    assert by_stage[UNDATED] == ""  # 120 samples are enough


# --- units, losses, weights, gradients


def test_planted_dormant_units_are_found_where_they_are(stream: Stream, model: Any) -> None:
    planted = llama(stream)
    with torch.no_grad():
        planted.model.layers[1].mlp.up_proj.weight[:10] = 0
    found = values(Capacity(stream, OPTIONS).measure(checkpoint_of(planted)), group="units")
    for stage in (0, 3, UNDATED):
        assert found["block 1", stage, "dead"] == found["block 1", stage, "dormant_1pct"] == 0.25
        assert found["block 0", stage, "dead"] == 0
        assert found["all blocks", stage, "dead"] == pytest.approx(10 / 120)
        assert found["block 1", stage, "redo_0.01"] >= 0.25


@pytest.mark.parametrize("against", ["base", "previous"])
def test_changes_of_losses_are_those_of_a_plain_pass(
    stream: Stream, model: Any, other: Any, rows: Rows, against: str
) -> None:
    z = plain_pass(model, stream, 2)[2] - plain_pass(other, stream, 2)[2]
    found = values(rows, group="interference")
    assert found[against, 2, "change_nats"] == pytest.approx(z.mean(), abs=1e-6)
    assert found[against, 2, "magnitude_nats"] == pytest.approx(np.abs(z).mean(), rel=1e-5)
    assert found[against, 2, "interference"] == pytest.approx(1 - abs(z.sum()) / np.abs(z).sum(), abs=1e-5)
    sizes = [len(ids) - 1 - SKIP for ids in plain_documents(stream, 2)]
    sums = np.add.reduceat(z, np.cumsum([0, *sizes[:-1]]))
    expected = 1 - math.sqrt(2 / math.pi) * np.linalg.norm(sums) / np.abs(z).sum()
    assert found[against, 2, "interference_null_blocks"] == pytest.approx(expected, abs=1e-5)


def test_weights_and_drift_are_their_definitions(model: Any, other: Any, rows: Rows) -> None:
    found = values(rows, group="weights")
    ours, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]).double() for m in (model, other))
    assert found["all", UNDATED, "mean_abs"] == pytest.approx(ours.abs().mean().item(), rel=1e-6)
    assert found["all", UNDATED, "drift"] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-6)
    up = model.model.layers[1].mlp.up_proj.weight.detach()
    assert found["model.layers.1.mlp.up_proj", UNDATED, "spectral_norm"] == pytest.approx(
        torch.linalg.matrix_norm(up, 2).item(), rel=1e-5
    )
    ups = [found[f"model.layers.{i}.mlp.up_proj", UNDATED, "stable_rank"] for i in range(3)]
    assert found["up_proj", UNDATED, "mean_stable_rank"] == pytest.approx(np.mean(ups))
    kinds = ("embedding", "attention", "mlp", "norms")
    assert sum(found[kind, UNDATED, "drift_share"] for kind in kinds) == pytest.approx(1)
    assert parts_of("model.layers.2.mlp.up_proj.weight") == ["all", "mlp", "block 2"]


def test_gradient_rows_hold_together(rows: Rows, model: Any, other: Any, stream: Stream) -> None:
    found = values(rows, group="gradients")
    for i in range(4):
        for j in range(4):
            assert found[f"period {j}", i, "gradient_dot"] == pytest.approx(found[f"period {i}", j, "gradient_dot"])
        parts = found["previous", i, "first_order_nats"] + found["previous", i, "curvature_nats"]
        assert parts == pytest.approx(found["previous", i, "loss_change_nats"], abs=1e-12)
        assert found["half a", i, "embedding_gradient_norm"] > 0
    texts = {(t, h): _half(stream, t, h) for t in (0, 1) for h in (0, 1)}
    gradient = {key: _plain_gradient(model, ids) for key, ids in texts.items()}
    expected = (gradient[0, 0] @ gradient[1, 1] + gradient[0, 1] @ gradient[1, 0]) / 2
    assert found["period 1", 0, "gradient_dot"] == pytest.approx(expected.item(), rel=1e-4)
    change = [(_plain_loss(model, ids) - _plain_loss(other, ids)) for h in (0, 1) for ids in texts[0, h]]
    assert found["previous", 0, "loss_change_nats"] == pytest.approx(np.mean(change), abs=1e-5)


def _half(stream: Stream, stage: int, half: int) -> list[list[int]]:
    """The first three documents of a period whose hash is even, or odd."""
    names = stream.documents("heldout", stage, ["id"]).to_pydict()["id"]
    tokens, offsets = stream.tokens("heldout", stage), stream.offsets("heldout", stage)
    keys = {i: hashlib.sha256(f"0\x1f{name}".encode()).digest() for i, name in enumerate(names)}
    chosen = [i for i in sorted(keys, key=lambda i: keys[i]) if keys[i][-1] % 2 == half][:3]
    return [[stream.eos_id, *tokens[offsets[i] : offsets[i + 1] - 1].tolist()[:LENGTH]] for i in chosen]


def _loss(model: Any, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids[:-1]])).logits[0, SKIP:]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1 + SKIP :]))


def _plain_loss(model: Any, ids: list[int]) -> float:
    with torch.no_grad():
        return _loss(model, ids).item()


def _plain_gradient(model: Any, texts: list[list[int]]) -> torch.Tensor:
    total = torch.stack([_loss(model, ids) for ids in texts]).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, [*model.parameters()])]).double()


# --- a suite like any other


def test_batch_size_moves_values_by_rounding_only(stream: Stream, model: Any, other: Any) -> None:
    checkpoint = checkpoint_of(model, base=reference_of(other))
    found = [
        Capacity(stream, replace(OPTIONS, tokens_per_batch=size)).measure_shard(checkpoint, "activations")
        for size in (1, 97, 4096)
    ]
    assert {Capacity(stream, replace(OPTIONS, tokens_per_batch=size)).sha256() for size in (1, 97)} == {
        Capacity(stream, OPTIONS).sha256()
    }
    for one in found[1:]:
        assert one.metric == found[0].metric and one.change == found[0].change
        np.testing.assert_allclose(one.value, found[0].value, atol=2e-4, rtol=2e-4)


def test_comparing_leaves_the_model_as_it_was(stream: Stream, other: Any) -> None:
    mine = llama(stream).train()
    mine.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in mine.named_parameters()}
    state, hooks = torch.get_rng_state(), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in mine.modules()]
    suite = Capacity(stream, replace(OPTIONS, gradients=True, gradient_rows=4))
    suite.measure(checkpoint_of(mine, base=reference_of(other), previous=reference_of(other)))
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in mine.modules())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in mine.modules()] == hooks
    for name, p in mine.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None


def test_parts_are_measured_apart_and_joined(stream: Stream, model: Any) -> None:
    suite = Capacity(stream, OPTIONS)
    checkpoint = checkpoint_of(model)
    assert suite.shards() == ["activations", "weights"]
    parts = [suite.measure_shard(checkpoint, shard) for shard in suite.shards()]
    whole = suite.measure(checkpoint)
    assert whole.item == [*parts[0].item, *parts[1].item]
    assert suite.flops(checkpoint) == suite.shard_flops(checkpoint, "activations") > 0


def test_cells_name_the_base_only_of_suites_that_compare(stream: Stream, model: Any, other: Any) -> None:
    alone, beside = checkpoint_of(model), checkpoint_of(model, base=reference_of(other))
    plain, comparing = Heldout(stream), Capacity(stream, OPTIONS)
    assert cells.address_of(plain, alone) == cells.address_of(plain, beside)
    addresses = {cells.address_of(comparing, one, "weights") for one in (alone, beside)}
    addresses.add(cells.address_of(comparing, checkpoint_of(model, previous=reference_of(other)), "weights"))
    assert len(addresses) == 3


def test_a_run_hands_over_its_base_and_the_release_before(tmp_path: Path) -> None:
    from clbench.methods.sequential import Sequential
    from clbench.run import Place, execute

    track = tiny_track().model_copy(update={"suites": ["heldout", "capacity:n_vectors=200"]})
    prepare_tiny(track)
    store: RunStore = execute(
        track, [component(Sequential(), "sequential")], seed=0, place=Place(runs_root=tmp_path, device="cpu")
    )
    drifts, moved = [], []
    for stage in store.stages_done():
        table = store.rows("capacity", stage).to_pylist()
        by_name = {(row["item"], row["stage"], row["metric"]): row for row in table}
        drifts.append(by_name["all", UNDATED, "drift"]["value"])
        moved.append({who: by_name[who, 0, "change_nats"] for who in ("base", "previous")})
    assert drifts[0] == 0 and drifts == sorted(drifts) and drifts[1] > 0.01
    assert "no previous one" in moved[0]["previous"]["change"] and moved[0]["base"]["value"] == 0
    assert moved[1]["previous"]["value"] == moved[1]["base"]["value"] != 0  # the release before is the base
    total = sum(one["previous"]["value"] for one in moved[1:])
    assert total == pytest.approx(moved[-1]["base"]["value"], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "first+top"}, "no layer is called 'top'"),
        ({"layers": ""}, "no layer is called"),
        ({"n_vectors": 3}, "n_vectors must be at least 4, not 3"),
        ({"skip": -1}, "skip must be at least 0"),
        ({"gradient_rows": 1}, "gradient_rows must be at least 2"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1"),
        ({"least_ratio": -1.0}, "least_ratio must not be negative"),
    ],
)
def test_wrong_options_are_refused_at_once(stream: Stream, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Capacity(stream, Capacity.Options(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, "max_length 65 is more than the model's 64 positions"),
        ({"skip": 64}, "skip 64 leaves nothing of 64 positions"),
        ({"layers": "3"}, "no block 3"),
    ],
)
def test_what_the_model_or_the_text_cannot_give_is_told(
    stream: Stream, model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Capacity(stream, Capacity.Options(**options)).measure(checkpoint_of(model))


def test_a_period_of_short_documents_only_is_told(stream: Stream) -> None:
    long = llama(stream, max_position_embeddings=5000)
    with pytest.raises(ConfigError, match="no held-out document of 2001 has more than 4000 tokens"):
        Capacity(stream, Capacity.Options(skip=4000, max_length=4500)).measure(checkpoint_of(long))


def test_broken_weights_are_told(stream: Stream) -> None:
    broken = llama(stream)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="loss is not finite"):
        Capacity(stream, OPTIONS).measure(checkpoint_of(broken))
    assert not broken.model.layers[0]._forward_hooks and not broken.base_model._forward_hooks


def test_options_are_read_from_a_spec(stream: Stream) -> None:
    suite = make_suite("capacity:layers=first+final,gradients=true,n_vectors=64", stream)
    assert suite.options == Capacity.Options(layers="first+final", gradients=True, n_vectors=64)
    assert suite.shards() == ["activations", "weights", "gradients"]
