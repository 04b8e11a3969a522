"""Which model, on which text: finds what ``clbench fisher`` measures in runs and checkpoints, and keeps the reports.

A run is measured stage by stage, its release weights on rows that it trained on; ``fisher.json`` in its folder holds
the reports, and MLflow shows them from there. A measurement is addressed by weights, text and options and made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clbench import registry
from clbench.audit import track_of
from clbench.base import open_stream
from clbench.build import stream_folder
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError
from clbench.files import digest_of, exclusive, read_json, write_json
from clbench.fisher import samples as texts
from clbench.fisher.diagnostic import MEMORY_BYTES, Blocks, Report, diagnose
from clbench.fisher.samples import Grouping, Samples
from clbench.home import home
from clbench.method import Weights
from clbench.results.store import RunStore
from clbench.run_weights import BASE, release_folder, release_of
from clbench.stream import Stream
from clbench.train import checkpoint
from clbench.train.models import check_checkpoint, load_model, weights_of, weights_sha256
from clbench.train.parallel import find_device

FORMAT = 1
FILE = "fisher.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured how; everything here decides the numbers."""

    n: int = 256
    """Samples."""
    grouping: str = "sequence"
    projection: int | Literal["auto"] | None = "auto"
    seed: int = 0
    blocks: Blocks = "both"
    on: str = "own"
    """Runs: own (the stage just trained), next (the one after it), or a stage's number."""
    memory_bytes: int = MEMORY_BYTES

    def period(self, stage: int, n_stages: int) -> int:
        """Return the stage whose text is read.

        Raises:
            ConfigError: the stream has no such stage.
        """
        named = {"own": stage, "next": stage + 1}
        if self.on not in named and not self.on.isdecimal():
            raise ConfigError(f"--on {self.on!r} is no stage", mend="give own, next or a number")
        found = named[self.on] if self.on in named else int(self.on)
        if found >= n_stages:
            what = f"after stage {stage} comes no other" if self.on == "next" else f"stage {found} is not in the stream"
            raise ConfigError(what, where="--on", mend=f"the stream has stages 0 to {n_stages - 1}")
        return found


@dataclass(frozen=True)
class Subject:
    """One model and the samples that it is measured on."""

    model: torch.nn.Module
    samples: Samples
    about: dict[str, Any]
    """With ``weights_sha256`` and ``text``; what they and the options do not say decides nothing."""
    second_moments: Weights | None = None


Progress = Callable[[str, int], Callable[[int], None]]
"""Gets (title, number of rows); returns what is told of every batch's rows."""


def measure(subject: Subject, options: Options, kept: Mapping[str, Any], progress: Progress) -> tuple[str, Report]:
    """Return (address, report): the kept one of the same weights, text and options, or a new one."""
    parts = {k: subject.about[k] for k in ("weights_sha256", "text")}
    decides = asdict(options)
    del decides["on"]  # the text says it
    if options.projection != "auto":
        del decides["memory_bytes"]
    address = digest_of({"format": FORMAT, **parts, **decides, "moments": subject.second_moments is not None})
    if address in kept:
        return address, Report.from_dict(kept[address])
    cached = home() / "fisher" / f"{address}.json"
    if cached.is_file():
        found = Report.from_dict(read_json(cached))
        return address, replace(found, about=subject.about)
    report = diagnose(
        subject.model,
        subject.samples,
        projection=options.projection,
        seed=options.seed,
        blocks=options.blocks,
        second_moments=subject.second_moments,
        memory_bytes=options.memory_bytes,
        progress=progress(title_of(subject.about), subject.samples.n_rows),
        about=subject.about,
    )
    write_json(cached, report.as_dict())
    return address, report


def title_of(about: Mapping[str, Any]) -> str:
    """Return one line about what was measured."""
    if "stage" not in about:
        return str(about["name"])
    weights = "base" if about["stage"] == BASE else f"after stage {about['stage']}"
    return f"{about['name']} · {weights} · on text of {about['period']}"


# runs


def measure_run(
    store: RunStore, stages: list[int] | None, options: Options, *, device: str, progress: Progress
) -> list[Report]:
    """Measure stages of a run and write the reports into its folder.

    Args:
        store: the run.
        stages: 0 is the base; None: all that were trained and have release weights here.
        options: what is measured how.
        device: auto, cpu, cuda …
        progress: see ``Progress``.

    Raises:
        ConfigError: no such stage, too few rows, or the weights are not kept.
        NotFoundError, IntegrityError: the stream is not built, or weights are damaged.
    """
    track = track_of(store)
    stream = open_stream(track)
    wanted = _stages(store, stages, options, len(stream.stages()))
    grouping = Grouping.parse(options.grouping)
    place = find_device(device)
    kept, reports = kept_reports(store), []
    for stage in wanted:
        period = options.period(stage, len(stream.stages()))
        release = release_of(store, stage, stream, device)
        if release.tokenizer is not None:
            raise ConfigError("these checkpoints have a tokenizer of their own", where=store.folder,
                              mend="measure them one by one: `clbench fisher CHECKPOINT --text FILE`")  # fmt: skip
        model, digest = release.model, release.weights_sha256
        drawn = _drawn(store, period)
        samples = texts.of_stream(
            stream,
            period,
            n=options.n,
            length=track.training.sequence_length,
            grouping=grouping,
            seed=options.seed,
            run_seed=int(store.config()["seed"]),
            batching=track.training.batching,
            n_drawn_tokens=drawn,
            device=place,
        )
        about = {
            "name": f"{store.config()['method']['label']}-s{store.config()['seed']}",
            "stage": stage,
            "period": period,
            "period_name": stream.stages()[period].name,
            "grouping": str(grouping),
            "weights_sha256": digest,
            "text": _text_address(stream, period, samples, drawn, store.config()["seed"], track.training.batching),
        }
        subject = Subject(model.to(place), samples, about, second_moments(store, stage, model))
        address, report = measure(subject, options, kept, progress)
        kept[address] = report.as_dict()
        reports.append(report)
    keep_reports(store, kept)
    return reports


def _stages(store: RunStore, given: list[int] | None, options: Options, n_stages: int) -> list[int]:
    done = store.stages_done()
    if given:
        for stage in given:
            if stage not in done:
                there = f"{done[0]} to {done[-1]}" if done else "none"
                raise ConfigError(f"no row after stage {stage}", where=store.folder, mend=f"finished stages: {there}")
        return given
    last = n_stages - 1 if options.on == "next" else n_stages
    found = [stage for stage in done if BASE < stage < last and release_folder(store, stage).is_dir()]
    if not found:
        raise ConfigError(
            "no finished stage with release weights here", where=store.folder, mend="give --stage, or finish the run"
        )
    return found


def _drawn(store: RunStore, period: int) -> int | None:
    """Return how many tokens of a period the run drew when it was new; None for text it saw all of, or none."""
    tokens = store.ledger().get("tokens", {})
    drawn = tokens.get(str(period), {}).get(str(period)) if period != BASE else None
    return int(drawn) if drawn else None


def second_moments(store: RunStore, stage: int, model: torch.nn.Module) -> Weights | None:
    """Return Adam's second moments at a stage's end, where its resume state is kept and its weights were released."""
    found = sorted((store.folder / "checkpoints").glob(f"{stage:03d}-*-1"))
    if not found:
        return None
    try:
        state = checkpoint.load(found[-1])
    except ClbenchError:
        return None  # only a cosine is lost; the run itself says what to do about it
    own = weights_of(model)
    same = own.keys() == state.weights.keys() and all(torch.equal(own[n], state.weights[n]) for n in own)
    kept = {key.partition("/")[2]: v for key, v in state.optimizer.items() if key.startswith("exp_avg_sq/")}
    return kept if same and kept else None


def _text_address(stream: Stream, stage: int, samples: Samples, *more: Any) -> str:
    """Return a digest of the text that samples are chosen from."""
    return digest_of([stream.sha256, stage, samples.length, *more])


def kept_reports(store: RunStore) -> dict[str, Any]:
    """Return address -> report from a run's folder."""
    path = store.folder / FILE
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("reports"), dict):
        raise IntegrityError("this is no file of Fisher reports", where=path, mend="delete it and measure again")
    reports: dict[str, Any] = value["reports"]
    return reports


def keep_reports(store: RunStore, reports: Mapping[str, Any]) -> None:
    """Write address -> report into a run's folder, with those that another process wrote meanwhile."""
    with exclusive(store.folder, mend="wait until the run has ended", timeout_seconds=30):
        write_json(store.folder / FILE, {"format": FORMAT, "reports": {**kept_reports(store), **reports}})


# checkpoints


def measure_checkpoint(
    path: str,
    options: Options,
    *,
    track: str | None,
    stream: str | None,
    text: Path | None,
    stage: int | None,
    device: str,
    progress: Progress,
) -> Report:
    """Measure one checkpoint on the training text of a stream's stage, or on a text file.

    Raises:
        ConfigError: not exactly one text, another tokenizer than the stream's, or too few rows.
        NotFoundError, IntegrityError: checkpoint, stream or file are missing or damaged.
    """
    check_checkpoint(path)  # first: a mistyped run folder is no checkpoint without a text
    if sum(one is not None for one in (track, stream, text)) != 1:
        raise ConfigError("a checkpoint needs one text to be measured on", mend="give --track, --stream or --text")
    grouping, place = Grouping.parse(options.grouping), find_device(device)
    about: dict[str, Any] = {"name": path, "grouping": str(grouping)}
    if text is not None:
        about["text"], make = _of_file(path, text, options, grouping, place)
    else:
        about_text, make = _of_stream(path, track, stream, stage, options, grouping, place)
        about |= about_text
    samples = make()
    model = load_model(path).to(place)
    about["weights_sha256"] = weights_sha256(model)
    return measure(Subject(model, samples, about), options, {}, progress)[1]


def _of_file(
    path: str, text: Path, options: Options, grouping: Grouping, place: torch.device
) -> tuple[str, Callable[[], Samples]]:
    """Return the digest of a text file, and its samples under the checkpoint's own tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"text cannot be read: {error}", where=text, mend="give a UTF-8 file") from None
    local = Path(path).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer beside this checkpoint: {str(error).splitlines()[0]}",
            where=path,
            mend="save it there with tokenizer.save_pretrained",
        ) from None
    tokens = np.asarray(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    length = min(512, int(getattr(config.get_text_config(), "max_position_embeddings", 512)))
    address = digest_of([tokens.tolist(), length])
    return address, lambda: texts.of_text(
        tokens, n=options.n, length=length, grouping=grouping, seed=options.seed, device=place, where=text
    )


def _of_stream(
    path: str,
    track: str | None,
    name: str | None,
    stage: int | None,
    options: Options,
    grouping: Grouping,
    place: torch.device,
) -> tuple[dict[str, Any], Callable[[], Samples]]:
    """Return what is said about a stream's stage, and its samples."""
    from clbench.outside import outside_tokenizer

    if track is not None:
        loaded = registry.load_track(track)
        stream, length = open_stream(loaded), loaded.training.sequence_length
        batching = loaded.training.batching
    else:
        folder = stream_folder(registry.make_stream_source(str(name)))
        if not (folder / "manifest.json").is_file():
            raise NotFoundError(f"stream {name!r} is not built", where=folder, mend=f"run `clbench prepare {name}`")
        stream, length, batching = Stream(folder, check=True), 128, "packed"
    if outside_tokenizer(path, stream)[0] is not None:
        raise ConfigError(
            f"this checkpoint has another tokenizer than stream {stream.name!r}", where=path, mend="give --text FILE"
        )
    period = stage if stage is not None else BASE
    if not 0 <= period < len(stream.stages()):
        raise ConfigError(
            f"stage {period} is not in the stream",
            where=stream.name,
            mend=f"the stream has stages 0 to {len(stream.stages()) - 1}",
        )
    make: Callable[[], Samples] = lambda: texts.of_stream(  # noqa: E731
        stream,
        period,
        n=options.n,
        length=length,
        grouping=grouping,
        seed=options.seed,
        batching=batching,
        device=place,
    )
    about = {"period": period, "period_name": stream.stages()[period].name}
    return about | {"text": digest_of([stream.sha256, period, length, batching])}, make
