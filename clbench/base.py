"""Bases: the checkpoint that every method of a track starts from, made once and shared by all runs.

One is trained on stage 0, or it is a pretrained model that ``clbench.pretrained`` brought here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clbench import build, console, pretrained, registry
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.files import (
    atomic_folder,
    digest_of,
    exclusive,
    link_or_copy,
    read_json,
    remove_leftovers,
    sha256_file,
    write_json,
)
from clbench.home import bases_folder
from clbench.method import Composed, Method, Need, Stage, StagePlan
from clbench.results.store import RunStore
from clbench.stream import Stream
from clbench.track import Track
from clbench.train.ledger import Ledger
from clbench.train.loop import Job, train
from clbench.train.models import load_model, make_model, n_parameters, save_model, weights_of, weights_sha256
from clbench.train.parallel import Hardware


class FromScratch(Method):
    """Train once on a fixed mixture: the base's recipe, and the oracle's."""

    name = "from-scratch"
    needs = frozenset({Need.PAST_DATA})

    def __init__(self, mixture: Mapping[int, float]) -> None:
        super().__init__()
        self.mixture = mixture

    def plan(self, stage: Stage) -> StagePlan:
        """Return the fixed mixture."""
        return StagePlan(mixture=self.mixture)


@dataclass(frozen=True)
class Base:
    """A made base on this machine."""

    folder: Path
    facts: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "model"

    @property
    def weights_sha256(self) -> str:
        """Digest of configuration and weights."""
        return str(self.facts["weights_sha256"])

    def load(self) -> torch.nn.Module:
        """Return the model, checked against its digest."""
        model = load_model(self.model_folder)
        if weights_sha256(model) != self.weights_sha256:
            raise IntegrityError(
                "the base is not what was made",
                where=self.folder,
                mend="delete the folder and run `clbench prepare`",
            )
        return model


def open_stream(track: Track) -> Stream:
    """Return the built stream of a track, every file checked.

    Raises:
        NotFoundError: it was not prepared.
        IntegrityError: a file is damaged, or the stream is not the one that the track was frozen on.
    """
    folder = build.stream_folder(registry.make_stream_source(track.stream))
    if not (folder / "manifest.json").is_file():
        raise NotFoundError(
            f"stream {track.stream!r} is not built",
            where=folder,
            mend=f"run {prepare_command(track)} first",
        )
    stream = Stream(folder, check=True)
    check_stream(track, stream)
    return stream


def prepare_command(track: Track) -> str:
    """Return the command that prepares a track, for error messages."""
    builtin = track.name in registry.track_names()
    return f"`clbench prepare {track.name}`" if builtin else "`clbench prepare` with the track's file"


def check_stream(track: Track, stream: Stream) -> None:
    """Raise IntegrityError unless the stream is the one that the track was frozen on."""
    if track.stream_sha256 is not None and stream.sha256 != track.stream_sha256:
        raise IntegrityError(
            f"stream {stream.name!r} has digest {stream.sha256[:12]}, "
            f"track {track.name!r} was frozen on {track.stream_sha256[:12]}",
            where=stream.folder,
            mend="its runs would not be comparable; see docs/tracks.md, 'When digests differ'",
        )


def base_folder(track: Track, stream: Stream, precision: str) -> Path:
    """Return where the base of a track lies on this machine."""
    address = digest_of({"base": track.base_sha256(), "stream": stream.base_sha256, "precision": precision})
    # Another track may have made it: arms of an experiment differ after stage 0 only, and start from one base.
    made = sorted(bases_folder().glob(f"*-{address[:12]}/base.json"))
    return made[0].parent if made else bases_folder() / f"{track.name}-{address[:12]}"


def open_base(track: Track, stream: Stream, hardware: Hardware) -> Base:
    """Return a base that ``prepare`` made."""
    folder = base_folder(track, stream, hardware.precision)
    if not (folder / "base.json").is_file():
        raise NotFoundError(
            f"the base of track {track.name!r} is not made",
            where=folder,
            mend=f"run {prepare_command(track)} first",
        )
    return Base(folder, read_json(folder / "base.json"))


def make_base(track: Track, stream: Stream, hardware: Hardware) -> Base:
    """Make the base of a track, or return it when it is there; goes on after a kill."""
    folder = base_folder(track, stream, hardware.precision)
    with exclusive(folder, mend="wait until it has made the base"):
        if (folder / "base.json").is_file():
            return Base(folder, read_json(folder / "base.json"))
        remove_leftovers(folder)
        make = _base_from_scratch if track.base.pretrained is None else _base_from_pretrained
        model, ledger, n_steps = make(track, stream, hardware, folder)
        facts = {
            "track": track.name,
            "base_sha256": track.base_sha256(),
            "stream_sha256": stream.base_sha256,
            "weights_sha256": weights_sha256(model),
            "n_parameters": n_parameters(model),
            "n_steps": n_steps,
            "ledger": ledger.as_dict(),
        }
        if track.base.pretrained is not None:
            facts["pretrained"] = track.base.pretrained
        write_json(folder / "base.json", facts)
        shutil.rmtree(folder / "work" / "checkpoints", ignore_errors=True)
        return Base(folder, facts)


def _base_from_scratch(
    track: Track, stream: Stream, hardware: Hardware, folder: Path
) -> tuple[torch.nn.Module, Ledger, int]:
    """Train the base on stage 0 and save it; returns (model, bill, steps)."""
    model, ledger, n_steps = train_from_scratch(
        track,
        before_the_first_stage(stream),
        hardware,
        work=folder / "work",
        title=f"base of {track.name}",
        mixture={0: 1.0},
        n_tokens=track.base.n_tokens,
        seed=track.base.seed,
    )
    save_model(model, weights_of(model), folder / "model", tokenizer_folder=stream.tokenizer_folder)
    return model, ledger, n_steps


def _base_from_pretrained(
    track: Track, stream: Stream, hardware: Hardware, folder: Path
) -> tuple[torch.nn.Module, Ledger, int]:
    """Lay a prepared model's files out as a base, with as many positions as the track uses; nothing is trained.

    Raises:
        NotFoundError: the model is not prepared.
        ConfigError: the stream was tokenised with another tokenizer, or the model has fewer positions.
    """
    prepared = pretrained.open_model(str(track.base.pretrained))
    tokenizer = prepared.folder / "tokenizer.json"
    if sha256_file(tokenizer) != stream.manifest["tokenizer"]["sha256"]:
        raise ConfigError(
            f"stream {stream.name!r} was not tokenised with the tokenizer of {prepared.name!r}",
            where=f"track {track.name}",
            mend=f"build it from a specification with `tokenizer: {pretrained.PREFIX}{prepared.name}`",
        )
    config = read_json(prepared.folder / "config.json")
    positions = config["max_position_embeddings"]
    wanted = track.base.max_length or positions
    if max(wanted, track.training.sequence_length) > positions:
        raise ConfigError(
            f"model {prepared.name!r} has {positions} positions",
            where=f"track {track.name}",
            mend="shorten base.max_length and training.sequence_length",
        )
    with atomic_folder(folder / "model") as temporary:
        for file in prepared.facts["files"].keys() - {"config.json"}:
            link_or_copy(prepared.folder / file, temporary / file)
        write_json(temporary / "config.json", {**config, "max_position_embeddings": wanted})
    return load_model(folder / "model").eval(), Ledger(), 0


def check_recipe(track: Track) -> None:
    """Raise ConfigError for a track whose base was pretrained elsewhere: there is no recipe to train an oracle with."""
    if track.model is None:
        raise ConfigError(
            f"its base is {track.base.pretrained}, pretrained elsewhere: it has no oracle",
            where=f"track {track.name}",
            mend="take a track that trains its own base",
        )


def before_the_first_stage(stream: Stream) -> Stream:
    """Return stage 0 alone, under the digest that decides its order: equal stages 0 make equal bases."""
    past = stream.until(0)
    past.sha256 = stream.base_sha256
    return past


def train_from_scratch(
    track: Track,
    stream: Stream,
    hardware: Hardware,
    *,
    work: Path,
    title: str,
    mixture: Mapping[int, float],
    n_tokens: int,
    seed: int,
) -> tuple[torch.nn.Module, Ledger, int]:
    """Train a fresh model on a mixture of stages with the base's recipe; returns (model, bill, steps).

    ``work`` holds its checkpoints: a killed training goes on from there.
    """
    assert track.model is not None, "callers check with `check_recipe`"
    index = max(mixture)
    stage = Stage(
        index=index,
        n_stages=len(stream.stages()),
        n_tokens=n_tokens,
        available_tokens=tuple(stream.counts("train", i)["n_tokens"] for i in range(index + 1)),
        learning_rate=track.base.learning_rate,
        warmup_steps=track.base.warmup_steps,
        floor=track.training.floor,
    )
    model = make_model(track.model, vocab_size=stream.vocab_size, eos_id=stream.eos_id, seed=seed)
    steps: list[int] = []
    with console.training_bar(title) as bar:
        ledger = train(
            Job(
                store=RunStore(work),
                stream=stream,
                model=model,
                method=Composed([FromScratch(mixture)]),
                stages=[stage],
                training=track.training.of_base(),
                seed=seed,
                hardware=hardware,
                finish_stage=lambda stage, weights, n_steps, ledger: steps.append(n_steps),
                progress=bar,
                warn=console.warn,
            )
        )
    return model.eval(), ledger, steps[0]
