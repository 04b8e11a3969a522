"""The plasticity probe: how well can this checkpoint still learn something that it has not seen?

Every checkpoint is trained by the real loop (``clbench.train.loop``) on the same small budget of unseen text, with
fresh optimizer state, over several orders of the data and several learning rates; held-out text of the same domain is
measured at log-spaced steps. A probe run is a cell (``clbench.cells``): addressed by weights, text, budget, settings,
order and rate, never made twice, with its bill. What the curves mean is computed in ``clbench.results.probes``.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from clbench import cells, registry
from clbench.audit import track_of
from clbench.base import FromScratch, open_stream
from clbench.build import stream_folder
from clbench.encoding import encode_batches
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import digest_of, exclusive, read_json, write_json
from clbench.home import home
from clbench.method import Composed, Stage
from clbench.packing import open_tokenizer
from clbench.results.probes import BASE, FRESH, Curve, report
from clbench.results.store import RunStore
from clbench.run import hardware_for
from clbench.run_weights import release_of, stages_with_weights
from clbench.seeds import derive
from clbench.stream import Split, StageInfo, Stream, identity_of
from clbench.suite import UNDATED, Checkpoint, Rows, Suite
from clbench.track import TrainingSpec
from clbench.train.loop import Job, train
from clbench.train.models import model_train_flops, weights_sha256
from clbench.train.parallel import Hardware

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
FILE = "probe.json"
POOL = 4
"""Text that orders draw from, in budgets: each sees other documents in another order."""
MIN_DOCUMENTS = 4
"""Held-out documents, at least."""
WARMUP_SHARE = 10
"""The track's warm-up, but at most one step in so many: a probe is short."""
NLL, TRAINED = "probe_nll_nats", "probe_trained_tokens"
"""Metrics of a cell's rows: summed loss of the held-out text after so many steps, and the tokens trained by then."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is probed how; everything here decides the numbers."""

    on: str
    """STREAM@STAGE, or a file or folder of text."""
    n_tokens: int = 30_000
    """Budget of one probe, in target tokens."""
    n_orders: int = 3
    rates: tuple[str, ...] = ("1/3", "1", "3")
    """Multiples of the track's learning rate."""
    n_heldout_tokens: int = 8_000
    threshold_nats: float | None = None
    fresh: bool = True
    """Probe a fresh initialisation, too."""

    def check(self) -> None:
        """Refuse what cannot be probed.

        Raises:
            ConfigError: what, and how to mend it.
        """
        if min(self.n_tokens, self.n_orders, self.n_heldout_tokens) < 1:
            raise ConfigError("a probe without tokens or orders", mend="give --tokens, --orders and --heldout above 0")
        for rate in self.rates:
            if _rate(rate) <= 0:
                raise ConfigError(f"learning rate {rate!r} of the track's", where="--rates", mend="give some above 0")
        if not self.rates or len({_rate(rate) for rate in self.rates}) < len(self.rates):
            raise ConfigError("rates are missing or repeated", where="--rates", mend="give for example 1/3+1+3")


def _rate(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"{text!r} is no learning rate", where="--rates", mend="give multiples, such as 1/3+1+3"
        ) from None


# the text


class ProbeText(Stream):
    """Text of one domain, in memory, in the token ids of a run: one stage with train and held-out documents.

    Args:
        name: what it is called.
        texts: per split, (identity, text) in their order.
        tokenizer_folder: of the run's stream.
    """

    def __init__(self, name: str, texts: Mapping[Split, Sequence[tuple[str, str]]], tokenizer_folder: Path) -> None:
        tokenizer, facts = open_tokenizer(tokenizer_folder, "")
        self.folder, self.name, self._texts = Path("probe"), name, texts
        self.manifest = {"tokenizer": facts.as_dict()}
        self._tokens: dict[str, NDArray[Any]] = {}
        self._offsets: dict[str, NDArray[np.int64]] = {}
        for split, documents in texts.items():
            packed = encode_batches(
                tokenizer, [[text for _, text in documents]], eos_id=facts.eos_id, dtype=facts.dtype
            )
            ((tokens, lengths),) = list(packed)
            self._tokens[split] = tokens
            self._offsets[split] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        digest = hashlib.sha256(facts.sha256.encode())
        for split in sorted(texts):
            for identity, text in texts[split]:
                digest.update(f"{split} {len(identity)} {identity} {len(text)} {text}".encode())
        self.sha256 = self.base_sha256 = digest.hexdigest()

    def stages(self) -> list[StageInfo]:
        """Return the one stage."""
        return [StageInfo(index=0, name=self.name, start="", end="")]

    def counts(self, split: Split, stage: int) -> dict[str, int]:
        """Return the sizes of a split."""
        return {
            "n_documents": len(self._texts[split]),
            "n_tokens": len(self._tokens[split]),
            "n_bytes": sum(len(text.encode()) for _, text in self._texts[split]),
        }

    def tokens(self, split: Split, stage: int) -> NDArray[np.unsignedinteger[Any]]:
        """Return the packed tokens of a split."""
        return self._tokens[split]

    def offsets(self, split: Split, stage: int) -> NDArray[np.int64]:
        """Return where each document starts."""
        return self._offsets[split]

    def documents(self, split: Split, stage: int, columns: list[str] | None = None) -> pa.Table:
        """Return the documents as a built stream would, without dates."""
        import pyarrow as pa

        found = self._texts[split]
        table = pa.table(
            {
                "id": [identity for identity, _ in found],
                "text": [text for _, text in found],
                "group": [self.name] * len(found),
                "change": ["new"] * len(found),
                "n_bytes": [len(text.encode()) for _, text in found],
            }
        )
        return table.select(columns) if columns else table

    def until(self, stage: int) -> Stream:
        """Return itself: there is no later stage."""
        return self


def read_probe_text(options: Options, stream: Stream, last_stage: int) -> tuple[ProbeText, dict[str, Any]]:
    """Return the probe's text and what is said about it.

    Documents come in the order of a hash of their identities, until there is enough of each split. Those that stand
    word for word in the run's training text up to ``last_stage`` are left out.

    Raises:
        NotFoundError: no such text or stream.
        ConfigError: text that the run has trained on, or too little of it.
    """
    found = _of_stream(options.on, stream, last_stage) if "@" in options.on else _of_path(options.on)
    seen = _seen(stream, last_stage)
    fresh = {
        split: [one for one in documents if hashlib.sha256(one[1].encode()).hexdigest() not in seen]
        for split, documents in found.items()
    }
    n_seen = sum(len(found[split]) - len(fresh[split]) for split in found)
    tokenizer, _ = open_tokenizer(stream.tokenizer_folder, "")
    wanted: dict[Split, int] = {"train": POOL * options.n_tokens, "heldout": options.n_heldout_tokens}
    chosen = {split: _first(fresh[split], tokenizer, n) for split, n in wanted.items()}
    text = ProbeText(options.on, chosen, stream.tokenizer_folder)
    n_train = text.counts("train", 0)["n_tokens"]
    if n_train <= options.n_tokens:
        raise ConfigError(
            f"{n_train:,} tokens of unseen text for a budget of {options.n_tokens:,}",
            where=options.on,
            mend="lower --tokens, or give more text",
        )
    if len(chosen["heldout"]) < MIN_DOCUMENTS:
        raise ConfigError(
            f"{len(chosen['heldout'])} held-out documents to measure on",
            where=options.on,
            mend=f"give text of {MIN_DOCUMENTS} held-out documents or more",
        )
    facts = {"name": options.on, "sha256": text.sha256, "n_documents_left_out": n_seen}
    return text, facts | {split: text.counts(split, 0) for split in wanted}


def _of_stream(place: str, stream: Stream, last_stage: int) -> dict[Split, list[tuple[str, str]]]:
    """Return the documents of ``STREAM@STAGE``."""
    name, _, number = place.rpartition("@")
    if not name or not number.isdecimal():
        raise ConfigError(f"{place!r} is no stage of a stream", where="--on", mend="give STREAM@STAGE or a text file")
    folder = stream_folder(registry.make_stream_source(name))
    if not (folder / "manifest.json").is_file():
        raise NotFoundError(f"stream {name!r} is not built", where=folder, mend=f"run `clbench prepare {name}`")
    other, stage = Stream(folder, check=True), int(number)
    if stage >= len(other.stages()):
        raise ConfigError(
            f"stage {stage} is not in the stream", where=place, mend=f"give a stage up to {len(other.stages()) - 1}"
        )
    if other.sha256 == stream.sha256 and stage <= last_stage:
        raise ConfigError(
            f"the run has trained on stage {stage} of its own stream",
            where="--on",
            mend="give a later stage and earlier --stages, or another stream",
        )
    found: dict[Split, list[tuple[str, str]]] = {}
    for split in ("train", "heldout"):
        table = other.documents(split, stage, ["id", "text"])
        found[split] = list(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    return found


def _of_path(place: str) -> dict[Split, list[tuple[str, str]]]:
    """Return the documents of a file or folder; every fifth, by a hash of its identity, is held out."""
    from clbench.merge.evaluate import read_text

    text = read_text(place, "domain")
    found: dict[Split, list[tuple[str, str]]] = {"train": [], "heldout": []}
    for identity, document in zip(text.ids, text.documents, strict=True):
        found["heldout" if _hash(identity) % 5 == 0 else "train"].append((identity, document))
    return found


def _hash(identity: str) -> int:
    return derive("probe", identity_of(identity))


def _seen(stream: Stream, last_stage: int) -> set[str]:
    """Return the digests of the texts that a run trained on."""
    return {
        digest
        for stage in range(last_stage + 1)
        for batch in stream.document_batches("train", stage, ["sha256"])
        for digest in batch.column("sha256").to_pylist()
    }


def _first(documents: Iterable[tuple[str, str]], tokenizer: Any, n_tokens: int) -> list[tuple[str, str]]:
    """Return documents, by a hash of their identities, until there are so many tokens and MIN_DOCUMENTS."""
    chosen, total = list[tuple[str, str]](), 0
    for one in sorted(documents, key=lambda one: _hash(one[0])):
        if total >= n_tokens and len(chosen) >= MIN_DOCUMENTS:
            break
        if n := len(tokenizer.encode(one[1], add_special_tokens=False).ids):
            chosen.append(one)
            total += n + 1
    return chosen


# one probe


class Probe(Suite):
    """Probes of one text as a suite; a shard is an order of the data and a multiple of the learning rate.

    Args:
        text: what is trained and measured on.
        training: settings; its ``n_tokens_per_stage`` is the budget, its learning rate what rates multiply.
        hardware: the probe trains in its precision.
        orders: of the data, by number.
        rates: multiples of the learning rate.
    """

    name = "probe"
    version = 1

    def __init__(
        self, text: Stream, training: TrainingSpec, hardware: Hardware, orders: Sequence[int], rates: Sequence[str]
    ) -> None:
        super().__init__(text)
        self.training, self.hardware, self.orders, self.rates = training, hardware, orders, rates
        self.heldout = registry.load_class("suites", "heldout")(text)

    def sha256(self) -> str:
        """Return the digest of all that decides a curve but for text, order and rate."""
        training = self.training.model_dump(mode="json")
        return digest_of({"name": self.name, "version": self.version, "training": training, "warmup": WARMUP_SHARE})

    def shards(self) -> list[str]:
        """Return ``order=0,rate=1/3`` and so on."""
        return [shard_of(order, rate) for rate in self.rates for order in self.orders]

    def shard_sha256(self, shard: str) -> str:
        """Return the digest of text, order and rate."""
        return digest_of([self.data_sha256(), shard])

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the rows of all orders and rates."""
        return Rows.joined([self.measure_shard(checkpoint, shard) for shard in self.shards()])

    def measure_shard(self, checkpoint: Checkpoint, shard: str) -> Rows:
        """Train a copy on one order at one rate; goes on where it was killed. Two rows a measured step."""
        order, rate = (value.partition("=")[2] for value in shard.split(","))
        work = home() / "probes" / cells.address_of(self, checkpoint, shard)
        devices = [checkpoint.device] if checkpoint.device.type == "cuda" else []
        with exclusive(work, mend="wait until it has probed this checkpoint"), torch.random.fork_rng(devices=devices):
            measured = _train_measuring(self, checkpoint, int(order), _rate(rate), work)
            shutil.rmtree(work / "checkpoints", ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        steps = sorted(measured)
        n_tokens, n_bytes = (sum(measured[steps[0]][name]) for name in ("n_tokens", "n_bytes"))
        value = [v for step in steps for v in (measured[step]["nll_nats"], measured[step]["trained"])]
        return Rows(
            item=[f"step-{step:06d}" for step in steps for _ in (0, 1)],
            stage=np.full(2 * len(steps), UNDATED, dtype=np.int64),
            metric=[NLL, TRAINED] * len(steps),
            value=np.array(value, dtype=np.float64),
            n_tokens=np.array([n_tokens, 1] * len(steps), dtype=np.int64),
            n_bytes=np.array([n_bytes, 1] * len(steps), dtype=np.int64),
            group=[shard] * (2 * len(steps)),
            change=[""] * (2 * len(steps)),
        )

    def shard_flops(self, checkpoint: Checkpoint, shard: str) -> float:
        """Return the operations of training on the budget and of every measurement on the way."""
        length, n_tokens = self.training.sequence_length, self.training.n_tokens_per_stage
        n_steps = -(-n_tokens // (length * self.training.batch_rows))
        measurements = len(grid(n_steps)) * float(self.heldout.flops(checkpoint))
        return model_train_flops(checkpoint.model, n_tokens, length) + measurements

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of all orders and rates."""
        return self.shard_flops(checkpoint, "") * len(self.shards())


def shard_of(order: int, rate: str) -> str:
    """Return the name of one order and rate; ``2/6`` and ``1/3`` are one rate."""
    return f"order={order},rate={_rate(rate)}"


def grid(n_steps: int) -> list[int]:
    """Return the steps after which is measured: 0, the powers of two below ``n_steps``, and ``n_steps``."""
    powers = [2**i for i in range(n_steps.bit_length()) if 2**i < n_steps]
    return [0, *powers, n_steps]


def _train_measuring(
    probe: Probe, checkpoint: Checkpoint, order: int, rate: Fraction, work: Path
) -> dict[int, dict[str, Any]]:
    """Return step -> what was measured after it; what was measured before a kill is kept in ``curve.json``."""
    path, training = work / "curve.json", probe.training
    measured: dict[int, dict[str, Any]] = {int(k): v for k, v in (read_json(path) if path.is_file() else {}).items()}
    peak = float(training.learning_rate * rate)
    n_available = probe.stream.counts("train", 0)["n_tokens"]
    n_steps = -(-training.n_tokens_per_stage // (training.sequence_length * training.batch_rows))
    stage = Stage(
        index=0,
        n_stages=1,
        n_tokens=training.n_tokens_per_stage,
        available_tokens=(n_available,),
        learning_rate=peak,
        warmup_steps=min(training.warmup_steps, n_steps // WARMUP_SHARE),
        floor=1.0,  # constant after the warm-up: a point of the curve does not depend on how long the probe is
    )
    model = copy.deepcopy(checkpoint.model).to(probe.hardware.device)

    def look(stage: Stage, done: int, total: int, loss_nats: float) -> None:
        if done in grid(total):
            now = Checkpoint(model=model, weights_sha256="", device=probe.hardware.device, autocast_dtype=None)
            rows: Rows = probe.heldout.measure(now)
            trained = min(done * training.sequence_length * training.batch_rows, training.n_tokens_per_stage)
            measured[done] = {
                "nll_nats": float(rows.value.sum()),
                "trained": trained,
                "n_tokens": rows.n_tokens.tolist(),
                "n_bytes": rows.n_bytes.tolist(),
            }
            write_json(path, {str(step): one for step, one in measured.items()})

    if 0 not in measured:
        look(stage, 0, n_steps, float("nan"))
    train(
        Job(
            store=RunStore(work),
            stream=probe.stream,
            model=model,
            method=Composed([FromScratch({0: 1.0})]),
            stages=[stage],
            training=training.model_copy(update={"learning_rate": peak}),
            seed=derive("probe", order),
            hardware=probe.hardware,
            finish_stage=lambda *_: None,
            progress=look,
            warn=lambda text: None,
            checkpoint_seconds=60.0,
        )
    )
    return measured


def curve_of(rows: pa.Table) -> Curve:
    """Return the learning curve of one cell's rows."""
    columns = {name: rows[name].to_pylist() for name in ("item", "metric", "value", "n_tokens")}
    found: dict[str, dict[str, float]] = {}
    for item, metric, value, n in zip(*columns.values(), strict=True):
        found.setdefault(item, {})[metric] = value / n
    points = [found[item] for item in sorted(found)]
    return Curve(np.array([one[TRAINED] for one in points]), np.array([one[NLL] for one in points]))


# a run


def probe_run(
    store: RunStore,
    stages: Sequence[int] | None,
    options: Options,
    *,
    device: str,
    tell: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Probe checkpoints of a run, the base among them, and return the report (``clbench.results.probes.report``).

    Args:
        store: the run.
        stages: after which stages; None: all whose weights are here.
        options: what is probed how.
        device: auto, cpu, cuda …
        tell: gets (what, probes done, probes in all) before each.

    Raises:
        ConfigError: options, stages or text that cannot be used.
        NotFoundError, IntegrityError: weights, base or stream are missing or damaged.
    """
    options.check()
    track = track_of(store)
    stream = open_stream(track)
    wanted = stages_with_weights(store, stages)
    text, facts = read_probe_text(options, stream, max(wanted))
    hardware = hardware_for(track, stream, device)
    settings = {"n_tokens_per_stage": options.n_tokens, "floor": 1.0, "precision": hardware.precision}
    training = track.training.of_base().model_copy(update=settings)
    probe = Probe(text, training, hardware, range(options.n_orders), options.rates)
    subjects = _subjects(store, wanted, stream, device, fresh=options.fresh)
    shards, curves, bill = probe.shards(), dict[str, dict[str, dict[int, Curve]]](), _Bill()
    n_done = 0
    for name, load in subjects.items():
        checkpoint = load(hardware)
        mine = curves.setdefault(name, {rate: {} for rate in options.rates})
        for rate in options.rates:
            for order in range(options.n_orders):
                tell(f"{name}, rate {rate}, order {order}", n_done, len(subjects) * len(shards))
                cell = cells.measure_shard(probe, checkpoint, shard_of(order, rate))
                mine[rate][order] = curve_of(cell.rows)
                bill.add(cell, options.n_tokens)
                n_done += 1
    tell("", n_done, n_done)
    about = {
        "run": f"{store.config()['method']['label']}-s{store.config()['seed']}",
        "run_id": store.config()["run_id"],
        "stages": wanted,
        "text": facts,
        "options": asdict(options),
        "learning_rate": training.learning_rate,
        "precision": hardware.precision,
        "bill": vars(bill),
    }
    return {"about": about, **report(curves, threshold=options.threshold_nats)}


@dataclass
class _Bill:
    """What the probes cost when they were made, cached or not."""

    probes: int = 0
    cached: int = 0
    n_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, cell: cells.Cell, n_tokens: int) -> None:
        """Add one probe."""
        self.probes += 1
        self.cached += cell.cached
        self.n_tokens += n_tokens
        self.flops += cell.flops
        self.seconds += cell.seconds


def _subjects(
    store: RunStore, stages: Sequence[int], stream: Stream, device: str, *, fresh: bool
) -> dict[str, Callable[[Hardware], Checkpoint]]:
    """Return name -> what loads it: the base first, a fresh initialisation where wanted, then the stages."""

    def of_stage(stage: int) -> Callable[[Hardware], Checkpoint]:
        def load(hardware: Hardware) -> Checkpoint:
            release = release_of(store, stage, stream, device)
            if release.tokenizer is not None:
                raise ConfigError(
                    "these checkpoints have a tokenizer of their own", where=store.folder, mend="probe runs of clbench"
                )
            return _checkpoint(release.model, release.weights_sha256, hardware)

        return load

    def initial(hardware: Hardware) -> Checkpoint:
        model = fresh_model(release_of(store, stages[-1], stream, device).model)
        return _checkpoint(model, weights_sha256(model), hardware)

    found = {BASE: of_stage(0), **({FRESH: initial} if fresh else {})}
    return found | {f"stage {stage}": of_stage(stage) for stage in stages if stage}


def _checkpoint(model: torch.nn.Module, digest: str, hardware: Hardware) -> Checkpoint:
    return Checkpoint(
        model=model.to(hardware.device),
        weights_sha256=digest,
        device=hardware.device,
        autocast_dtype=hardware.autocast_dtype,  # of the training: what a probe measures depends on it
    )


def fresh_model(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Return a model of the same kind and shape with fresh weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "probe", "init"))
        made: torch.nn.Module = type(model)(copy.deepcopy(model.config))
    return made


# reports in the run folder


def kept_reports(store: RunStore) -> list[dict[str, Any]]:
    """Return the probe reports in a run's folder, oldest first.

    Raises:
        IntegrityError: the file is no such thing.
    """
    path = store.folder / FILE
    if not path.is_file():
        return []
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("reports"), list):
        raise IntegrityError("this is no file of probe reports", where=path, mend="delete it and probe again")
    reports: list[dict[str, Any]] = value["reports"]
    return reports


def keep_report(store: RunStore, report: Mapping[str, Any]) -> None:
    """Write a report into a run's folder; one of the same text and options takes the place of the old one."""
    with exclusive(store.folder, mend="wait until the run has ended", timeout_seconds=30):
        alike = ("text", "options")
        others = [
            one for one in kept_reports(store) if any(one["about"][part] != report["about"][part] for part in alike)
        ]
        write_json(store.folder / FILE, {"format": FORMAT, "reports": [*others, dict(report)]})
