"""How do the figures of the suite ``capacity`` move while a base is trained?

    python -m benchmarks.base_phases codedocs-nano

Trains the track's base anew with its own recipe, in memory, and measures the model at about log-spaced steps: held-out
loss of stage 0 on the suite's text, RankMe, effective rank and alpha-ReQ after the final norm, and dormant units. Three
phases are reported for large models (Li et al. 2025, "Tracing the representation geometry of language models from
pretraining to post-training"): a collapse while the learning rate warms up, an expansion, and a compression. ``phases``
says where ranks turn here; it decides nothing about large models. Nothing of the track's base is read or replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from clbench import registry
from clbench.base import FromScratch, before_the_first_stage, open_stream
from clbench.method import Composed, Stage
from clbench.results.capacity import HEADLINES, Figures, Headline
from clbench.results.store import RunStore
from clbench.run import hardware_for
from clbench.suite import UNDATED, Checkpoint
from clbench.train.loop import Job, train
from clbench.train.models import make_model, weights_sha256

SHOWN = ("rankme", "erank", "alpha_req", "stable_rank", "dormant")
"""Headlines, all at stage 0's text alone: the only text that the base trains on."""


def steps_of(n_steps: int, per_octave: int = 2) -> list[int]:
    """Return 0, about ``per_octave`` steps an octave, and the last."""
    found = {round(2 ** (i / per_octave)) for i in range(per_octave * 40)}
    return [0, *sorted(step for step in found if step < n_steps), n_steps]


def measured(suite: Any, checkpoint: Checkpoint, period: int) -> dict[str, float]:
    """Return the figures of one checkpoint on one period."""
    from clbench.cells import table_of

    figures = Figures(table_of(suite.measure_shard(checkpoint, "activations")))
    chosen: dict[str, Headline] = {one.key: one for one in HEADLINES}
    found = {key: figures.get(chosen[key].group, chosen[key].item, period, chosen[key].metric).value for key in SHOWN}
    return found | {
        "alpha_req_r2": figures.get("representation", "final", period, "alpha_req_r2:centred").value,
        "rankme_all": figures.get("representation", "final", UNDATED, "rankme_sigma:centred").value,
    }


def trace(name: str, *, seed: int | None = None, device: str = "cpu", folder: str = "") -> list[dict[str, float]]:
    """Train a base and return its figures at every measured step."""
    import tempfile
    from pathlib import Path

    track = registry.load_track(name)
    stream = open_stream(track)
    hardware = hardware_for(track, stream, device)
    assert track.model is not None, "a pretrained base has no training to follow"
    root = track.base.seed if seed is None else seed
    model = make_model(track.model, vocab_size=stream.vocab_size, eos_id=stream.eos_id, seed=root)
    heldout = registry.make_suite("heldout", stream)
    suite = registry.make_suite("capacity", stream)
    found: list[dict[str, float]] = []

    def look(stage: Stage, done: int, total: int, loss_nats: float) -> None:
        if done not in steps_of(total):
            return
        start = time.perf_counter()
        one = Checkpoint(model=model, weights_sha256=weights_sha256(model), device=hardware.device, autocast_dtype=None)
        rows = heldout.measure(one) if done in (0, total) else None
        own = None if rows is None else rows.stage == 0
        loss = float("nan") if rows is None else float(rows.value[own].sum() / rows.n_tokens[own].sum())
        found.append({"step": done, "train_nats": loss_nats, "heldout_nats": loss, **measured(suite, one, 0)})
        print(f"step {done}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as work:
        stage = Stage(
            index=0,
            n_stages=len(stream.stages()),
            n_tokens=track.base.n_tokens,
            available_tokens=(stream.counts("train", 0)["n_tokens"],),
            learning_rate=track.base.learning_rate,
            warmup_steps=track.base.warmup_steps,
            floor=track.training.floor,
        )
        job = Job(
            store=RunStore(Path(folder or work)),
            stream=before_the_first_stage(stream),
            model=model,
            method=Composed([FromScratch({0: 1.0})]),
            stages=[stage],
            training=track.training.of_base(),
            seed=root,
            hardware=hardware,
            finish_stage=lambda *_: None,
            progress=look,
            warn=print,
            checkpoint_seconds=3600.0,
        )
        look(stage, 0, _n_steps(job, stage), float("nan"))
        train(job)
    return found


def _n_steps(job: Job, stage: Stage) -> int:
    """Return a number of steps for the look before training; its exact value plays no part there."""
    return -(-stage.n_tokens // (job.training.sequence_length * job.training.batch_rows))


def phases(steps: Sequence[float], ranks: Sequence[float]) -> dict[str, Any]:
    """Return where a rank turns: both ends of its largest rise, as a factor; without a rise, its start.

    ``collapse``, ``expansion`` and ``compression`` are changes as shares of the value before; 0 where there is none.
    """
    values = np.asarray(ranks, dtype=np.float64)
    peaks = np.maximum.accumulate(values[::-1])[::-1]  # the largest value from each place on
    low = int(np.argmax(peaks / values))
    high = low + int(np.argmax(values[low:]))
    return {
        "minimum_at_step": steps[low],
        "maximum_at_step": steps[high],
        "collapse": float(values[low] / values[0] - 1),
        "expansion": float(values[high] / values[low] - 1),
        "compression": float(values[-1] / values[high] - 1),
    }


def main() -> None:
    """Print the figures as JSON and, on stderr, as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", help="a track whose base is trained here")
    parser.add_argument("--seed", type=int, help="of weights and order; the track's own by default")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    found = trace(arguments.track, seed=arguments.seed, device=arguments.device)
    names = ("step", "train_nats", *SHOWN, "alpha_req_r2", "rankme_all")
    print("  ".join(f"{name:>12}" for name in names), file=sys.stderr)
    for one in found:
        print("  ".join(f"{one[name]:12.3f}" for name in names), file=sys.stderr)
    steps = [one["step"] for one in found]
    turned = {name: phases(steps, [one[name] for one in found]) for name in ("rankme", "erank", "rankme_all")}
    kept = [{k: None if v != v else v for k, v in one.items()} for one in found]
    print(json.dumps({"figures": kept, "phases": turned}, indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
