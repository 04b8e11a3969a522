"""Tracks and run configurations: one YAML, no layers.

A track is a frozen protocol. Its digest covers what decides the numbers; what is derived from it (oracle, row 0)
and what describes it do not change it. A run configuration is a track, a method and a seed, fully resolved.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from clbench.files import digest_of

RUN_FORMAT = 1
ADDED_LATER = ("batching", "n_steps_per_stage")
"""Training settings that tracks were frozen without; at their default they stand in no digest and in no dump."""
BASE_INDEPENDENT = {"n_tokens_per_stage", "optimizer", *ADDED_LATER}
"""Training settings that do not touch the base: it is trained once, packed, and all arms start from it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Frozen):
    """A Llama-type decoder, initialised at random for the base of a track."""

    architecture: Literal["llama"] = "llama"
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    max_length: int = Field(gt=1)
    """Positions; held-out documents are read in windows of this length."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSpec:
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of n_heads {self.n_heads}")
        return self


class BaseSpec(_Frozen):
    """Where the base comes from: trained on stage 0 (tokens, learning rate, warm-up), or pretrained elsewhere."""

    n_tokens: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    seed: int = 0
    pretrained: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")
    """A model that ``clbench prepare model:NAME`` makes; the stream's tokenizer must be its own."""
    max_length: int | None = Field(default=None, gt=1)
    """Of a pretrained model: the positions that are used, all its own if None; see ``ModelSpec.max_length``."""

    @model_validator(mode="after")
    def _one_origin(self) -> BaseSpec:
        if self.pretrained is None:
            missing = {"n_tokens", "learning_rate", "warmup_steps"} - self.model_fields_set
            if missing or not self.n_tokens or not self.learning_rate:
                raise ValueError(
                    "a base that is trained here needs n_tokens and learning_rate above 0, and warmup_steps"
                )
            if self.max_length is not None:
                raise ValueError(
                    "max_length is for pretrained models; of a base that is trained here it stands in model"
                )
        elif extra := sorted(self.model_fields_set - {"pretrained", "max_length"}):
            raise ValueError(f"a pretrained base is not trained here: leave out {', '.join(extra)}")
        return self

    @model_serializer(mode="wrap")
    def _of_this_origin(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        pretrained = {"pretrained", "max_length"}
        return {k: v for k, v in values.items() if (k in pretrained) == (self.pretrained is not None)}


class TrainingSpec(_Frozen):
    """How every stage is trained, unless the method's plan says otherwise."""

    n_tokens_per_stage: int = Field(gt=0)
    """Target tokens, exactly, whatever the mixture."""
    sequence_length: int = Field(gt=1)
    batch_rows: int = Field(gt=0)
    """Sequences per optimizer step."""
    batching: Literal["packed", "rows"] = "packed"
    """packed: full rows cut from the packed text. rows: one document a row, so short documents take more steps."""
    n_steps_per_stage: int | None = Field(default=None, gt=0)
    """With rows: exactly so many optimizer steps a stage, whatever tokens they hold; None: n_tokens_per_stage."""
    micro_batch_rows: int | None = None
    """Sequences per forward pass; None means the whole batch. Changes memory, not the gradient beyond rounding."""
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    floor: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = Field(default=1.0, gt=0)
    optimizer: Literal["reset", "carry"] = "reset"
    """Adam's moments at a stage's start. reset: TiC-LM."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where it was measured to be faster on this machine."""

    @model_validator(mode="after")
    def _steps_need_rows(self) -> TrainingSpec:
        if self.n_steps_per_stage is not None and self.batching != "rows":
            raise ValueError("n_steps_per_stage needs batching: rows; packed, equal tokens are equal steps already")
        return self

    @model_serializer(mode="wrap")
    def _without_late_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        fields = type(self).model_fields
        return {k: v for k, v in values.items() if k not in ADDED_LATER or v != fields[k].default}

    def of_base(self) -> TrainingSpec:
        """Return the settings that a base is trained with: packed, so that arms in any batching share it."""
        return self.model_copy(update={"batching": "packed", "n_steps_per_stage": None})


class OracleLosses(_Frozen):
    """Losses of joint training from scratch at the run's token count, frozen so that nobody trains it again."""

    n_tokens: int
    seeds: list[int]
    nats_per_token: list[float]
    """Per stage, mean over seeds."""
    bits_per_byte: list[float]
    command: str
    date: str


class RowZero(_Frozen):
    """Losses of the base, as measured when the track was frozen, and how far another machine's may lie."""

    nats_per_token: list[float]
    bits_per_byte: list[float]
    tolerance_nats: float = Field(gt=0)


class Track(_Frozen):
    """A frozen protocol."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    version: int = 1
    description: str = ""
    stream: str
    stream_sha256: str | None = None
    """Digest of the built stream; None while a track is being designed."""
    model: ModelSpec | None = None
    """What is trained from scratch; None where the base is a pretrained model."""
    base: BaseSpec
    training: TrainingSpec
    suites: list[str] = Field(min_length=1)
    """The first one's losses are those of oracle and row 0."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """A leaderboard entry has exactly these."""
    oracle: OracleLosses | None = None
    row0: RowZero | None = None

    @model_validator(mode="after")
    def _lengths_fit(self) -> Track:
        if (self.model is None) == (self.base.pretrained is None):
            raise ValueError("give either model, for a base that is trained here, or base.pretrained")
        spec, place = (self.base, "base") if self.model is None else (self.model, "model")
        if spec.max_length is not None and self.training.sequence_length > spec.max_length:
            raise ValueError(f"training.sequence_length is larger than {place}.max_length")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds are repeated")
        return self

    def sha256(self) -> str:
        """Return the digest of the protocol, without description, oracle and row 0."""
        return digest_of(self.model_dump(mode="json", exclude={"description", "oracle", "row0"}))

    def base_sha256(self) -> str:
        """Return the digest of what decides the base besides the built stream: model, recipe, optimizer settings."""
        if self.base.pretrained is not None:
            return digest_of({"base": self.base.model_dump(mode="json")})
        training = self.training.model_dump(mode="json", exclude=BASE_INDEPENDENT)
        parts = self.model_dump(mode="json", include={"model", "base"})
        return digest_of({"training": training, **parts})

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-able form that stands in ``run.yaml``, with its digest."""
        return {**self.model_dump(mode="json"), "sha256": self.sha256()}


class RunConfig(_Frozen):
    """What stands in ``run.yaml``: everything that decides a run, and what it ran on."""

    format: int = RUN_FORMAT
    run_id: str
    """Digest of track, method, seed and base."""
    track: dict[str, Any]
    stages: list[dict[str, Any]]
    method: dict[str, Any]
    seed: int
    base: dict[str, Any]
    training: dict[str, Any]
    """The resolved settings: the track's, with the precision that was chosen."""
    environment: dict[str, Any]
    created: str
    command: str


def run_id_of(track: dict[str, Any], method: dict[str, Any], seed: int, base: dict[str, Any], precision: str) -> str:
    """Return the identity of a run: equal ids are the same run, to be resumed; others must not share a folder."""
    parts = {
        "track": track["sha256"],
        "components": method["components"],
        "seed": seed,
        "base": base["weights_sha256"],
        "precision": precision,
    }
    return digest_of(parts)[:16]
