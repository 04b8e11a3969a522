"""``clbench.probe``: the real loop on a tiny run; cells are made once, resumed, and equal what training alone gives."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clbench import cells, probe, registry
from clbench.base import open_base, open_stream
from clbench.build import stream_folder
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.method import Cosine
from clbench.probe import Options, Probe, grid, probe_run, read_probe_text
from clbench.results.store import RunStore
from clbench.run import hardware_for
from clbench.seeds import derive
from clbench.stream import Stream
from clbench.suite import Checkpoint
from clbench.train import checkpoint as states
from clbench.train.data import IGNORE, DataOrder
from clbench.train.models import weights_of, weights_sha256
from tests.engine import run_tiny, tiny_track

SMALL: dict[str, Any] = {"n_tokens": 600, "n_orders": 2, "rates": ("1", "2"), "n_heldout_tokens": 400}
Tell = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A finished tiny run; tests must not change it."""
    return run_tiny(tmp_path_factory.mktemp("probed"))


@pytest.fixture(scope="module")
def stream(store: RunStore) -> Stream:
    return open_stream(tiny_track())


def text_file(folder: Path, n: int = 60) -> Path:
    """Text of another language than the stream's."""
    rng = np.random.default_rng(0)
    words = ("zq", "xylem", "0x1f", "owl", "}}", "%%")
    lines = [json.dumps({"text": " ".join(rng.choice(words, 30))}) for _ in range(n)]
    path = folder / "unseen.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def bench(store: RunStore, stream: Stream, tmp_path: Path) -> tuple[Probe, Checkpoint]:
    """A probe on text of its own (so that no other test has its cells), and the base."""
    track = tiny_track()
    hardware = hardware_for(track, stream, "cpu")
    options = Options(on=str(text_file(tmp_path)), **SMALL)
    text, _ = read_probe_text(options, stream, 3)
    training = track.training.model_copy(update={"n_tokens_per_stage": 600})
    model = open_base(track, stream, hardware).load()
    one = Checkpoint(model=model, weights_sha256=weights_sha256(model), device=hardware.device, autocast_dtype=None)
    return Probe(text, training, hardware, range(2), ("1", "2")), one


def test_the_grid_is_log_spaced_with_both_ends() -> None:
    assert grid(1) == [0, 1]
    assert grid(8) == [0, 1, 2, 4, 8]
    assert grid(11) == [0, 1, 2, 4, 8, 11]


def test_a_probe_is_plain_adamw_on_its_own_rows(bench: tuple[Probe, Checkpoint]) -> None:
    suite, one = bench
    curve = probe.curve_of(cells.table_of(suite.measure_shard(one, "order=1,rate=2")))

    # The same by hand: fresh AdamW at twice the rate, constant after its warm-up, on the order's rows.
    spec = suite.training
    order = DataOrder(suite.stream, {0: 1.0}, n_tokens=600, length=spec.sequence_length, batch_rows=spec.batch_rows,
                      seed=derive("probe", 1), stage=0)  # fmt: skip
    model = copy.deepcopy(one.model).train()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(spec.beta1, spec.beta2))
    schedule = Cosine(peak=2 * spec.learning_rate, warmup_steps=min(spec.warmup_steps, order.n_steps // 10), floor=1.0)
    for step in range(order.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, order.n_steps)
        (batch,) = order.micro_batches(step, micro_rows=None, device=torch.device("cpu"))
        logits = model(input_ids=batch.inputs_BT).logits.float().flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch.targets_BT.flatten(), ignore_index=IGNORE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    for place, weights in ((0, one.model), (-1, model)):
        rows = suite.heldout.measure(
            Checkpoint(model=weights, weights_sha256="", device=one.device, autocast_dtype=None)
        )
        assert curve.loss_nats[place] == pytest.approx(rows.value.sum() / rows.n_tokens.sum(), abs=1e-4)
    assert curve.tokens[-1] == 600
    assert len(curve.tokens) == len(grid(order.n_steps))
    assert curve.final < curve.start - 0.05  # a base that has not seen this text learns some of it


def test_a_probe_leaves_the_checkpoint_as_it_was(bench: tuple[Probe, Checkpoint]) -> None:
    suite, one = bench
    before, mode = {name: w.clone() for name, w in weights_of(one.model).items()}, one.model.training
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    suite.measure_shard(one, "order=0,rate=1")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(w, before[name]) for name, w in weights_of(one.model).items())
    assert one.model.training == mode


def test_a_probe_that_was_killed_goes_on_and_ends_the_same(
    bench: tuple[Probe, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, one = bench
    whole = suite.measure_shard(one, "order=0,rate=1")
    real, saves, steps = states.save, list[int](), list[int]()

    def save_then_die(folder: Path, state: states.TrainState) -> Path:
        saves.append(state.step)
        real(folder, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(states, "save", save_then_die)
    real_train = probe.train
    monkeypatch.setattr(probe, "train", lambda job: real_train(type(job)(**{**vars(job), "checkpoint_seconds": 0.0})))
    with pytest.raises(KeyboardInterrupt):
        suite.measure_shard(one, "order=0,rate=1")
    monkeypatch.setattr(states, "save", real)

    def counting(job: Any) -> Any:
        look = job.progress
        return real_train(
            type(job)(**{**vars(job), "progress": lambda s, done, n, x: (steps.append(done), look(s, done, n, x))})
        )

    monkeypatch.setattr(probe, "train", counting)
    again = suite.measure_shard(one, "order=0,rate=1")
    assert saves == [1]
    assert steps[0] == 2  # the first step was not made twice
    assert again.value.tolist() == whole.value.tolist()


def test_cells_depend_on_all_that_decides_them(bench: tuple[Probe, Checkpoint]) -> None:
    suite, one = bench
    addresses = {cells.address_of(suite, one, shard) for shard in suite.shards()}
    assert len(addresses) == 4
    longer = Probe(
        suite.stream, suite.training.model_copy(update={"n_tokens_per_stage": 700}), suite.hardware, [0], ["1"]
    )
    assert cells.address_of(longer, one, "order=0,rate=1") not in addresses
    more = Probe(suite.stream, suite.training, suite.hardware, range(5), ("1", "2", "5"))
    assert addresses <= {cells.address_of(more, one, shard) for shard in more.shards()}  # orders are added, not redone
    assert probe.shard_of(0, "2/6") == probe.shard_of(0, "1/3")


def test_a_run_is_probed_against_base_and_fresh_and_nothing_twice(store: RunStore, tmp_path: Path) -> None:
    options = Options(on=str(text_file(tmp_path)), **SMALL)
    told: Tell = []
    found = probe_run(store, [1, 3], options, device="cpu", tell=lambda *one: told.append(one))
    assert list(found["models"]) == ["base", "fresh", "stage 1", "stage 3"]
    assert len(told) == 4 * 4 + 1
    bill = found["about"]["bill"]
    assert (bill["probes"], bill["n_tokens"]) == (16, 16 * 600)
    assert bill["flops"] > 0
    stage = found["models"]["stage 3"]
    assert set(stage["figures"]["1"]) == {"start", "final", "drop", "area", "tokens_to"}
    assert stage["against_base"]["by_rate"]["2"]["interval"] == "t over seeds"
    fresh, base = (found["models"][name]["figures"]["1"]["start"]["value"] for name in ("fresh", "base"))
    assert fresh == pytest.approx(np.log(probe.open_stream(tiny_track()).vocab_size), abs=0.3)  # knows nothing
    assert base != pytest.approx(fresh, abs=0.05)
    again = probe_run(store, [1, 3], options, device="cpu", tell=lambda *_: None)
    assert again["about"]["bill"]["cached"] == 16
    assert again["models"] == found["models"]


def test_reports_stay_in_the_run_folder_one_for_each_kind(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    one = {"about": {"text": {"name": "a"}, "options": {"n_tokens": 1}}, "models": 1}
    other = {"about": {"text": {"name": "b"}, "options": {"n_tokens": 1}}, "models": 2}
    probe.keep_report(store, one)
    probe.keep_report(store, other)
    probe.keep_report(store, {**one, "models": 3})
    assert [kept["models"] for kept in probe.kept_reports(store)] == [2, 3]
    (tmp_path / probe.FILE).write_text("[]")
    with pytest.raises(IntegrityError, match="no file of probe reports"):
        probe.kept_reports(store)


# text


def test_text_of_a_later_stage_is_unseen_and_of_an_earlier_one_is_refused(stream: Stream) -> None:
    options = Options(on="tinydocs@3", **{**SMALL, "n_tokens": 200})
    text, facts = read_probe_text(options, stream, 2)
    train = set(text.documents("train", 0)["id"].to_pylist())
    assert train <= set(stream.documents("train", 3, ["id"])["id"].to_pylist())
    assert not train & set(text.documents("heldout", 0)["id"].to_pylist())
    seen = {t for k in range(3) for t in stream.documents("train", k, ["text"])["text"].to_pylist()}
    assert not seen & set(text.documents("train", 0)["text"].to_pylist())
    assert facts["n_documents_left_out"] > 0  # tinydocs repeats unchanged pages
    with pytest.raises(ConfigError, match="has trained on stage 2"):
        read_probe_text(Options(on="tinydocs@2", **SMALL), stream, 2)


def test_text_in_the_token_ids_of_the_run_is_what_the_stream_holds(stream: Stream) -> None:
    """Retokenised with the same tokenizer, documents have the tokens that the stream packed."""
    text, _ = read_probe_text(Options(on="tinydocs@3", **{**SMALL, "n_tokens": 200}), stream, 2)
    offsets, packed = stream.offsets("train", 3), stream.tokens("train", 3)
    ids = stream.documents("train", 3, ["id"])["id"].to_pylist()
    for place, name in enumerate(text.documents("train", 0)["id"].to_pylist()):
        mine = text.tokens("train", 0)[slice(*text.offsets("train", 0)[place : place + 2])]
        there = ids.index(name)
        np.testing.assert_array_equal(mine, packed[offsets[there] : offsets[there + 1]])


@pytest.mark.parametrize(
    ("on", "changes", "kind", "says"),
    [
        ("nowhere.txt", {}, NotFoundError, "not there"),
        ("tinydocs@9", {}, ConfigError, "stage 9 is not in the stream"),
        ("tinydocs@x", {}, ConfigError, "no stage of a stream"),
        ("tiny@0", {}, NotFoundError, "tiny"),
        ("tinydocs@3", {"n_tokens": 10**6}, ConfigError, "for a budget of 1,000,000"),
    ],
)
def test_text_that_cannot_be_used(
    stream: Stream, on: str, changes: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        read_probe_text(Options(on=on, **{**SMALL, **changes}), stream, 2)


@pytest.mark.parametrize(
    "changes", [{"rates": ("x",)}, {"rates": ("0",)}, {"rates": ("1", "2/2")}, {"rates": ()}, {"n_orders": 0}]
)
def test_options_that_cannot_be_used(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Options(on="x", **{**SMALL, **changes}).check()


def test_an_unbuilt_stream_names_the_command(stream: Stream) -> None:
    assert not stream_folder(registry.make_stream_source("codedocs-nano")).is_dir()
    with pytest.raises(NotFoundError, match="clbench prepare codedocs-nano"):
        read_probe_text(Options(on="codedocs-nano@1", **SMALL), stream, 2)
