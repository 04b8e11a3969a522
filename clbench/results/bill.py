"""What one run's ledger says, by source period: tokens, shares, budgets, passes, and what came on top.

Read from ``run.yaml`` and ``ledger.json`` alone and checked for form, as both may come from a stranger; whether the
bill is true is for ``clbench.audit`` to find out. Means over seeds for tables of methods stand in ``summary``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from clbench.errors import IntegrityError
from clbench.results.store import RunStore

MAX_COUNT = 10**18
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0, le=9999)]
Purpose = Annotated[str, Field(max_length=100)]
Shape = TypeVar("Shape", bound=BaseModel)


class PlanEntry(BaseModel):
    """What a stage was drawn from, from one of its steps on (``clbench.train.ledger.Ledger.note_plan``)."""

    step: Count
    mixture: dict[Index, Annotated[float, Field(ge=0, le=1)]]
    pools: dict[Index, Count] = {}
    n_excluded: Count = 0
    excluded_sha256: Annotated[str, Field(max_length=64)] = ""


class _Stage(BaseModel):
    index: Index
    name: Annotated[str, Field(max_length=200)]


class _Method(BaseModel):
    label: Annotated[str, Field(max_length=1000)]
    components: list[dict[str, Any]]


class _Config(BaseModel):
    track: dict[str, Any]
    stages: list[_Stage]
    method: _Method
    seed: int
    training: dict[str, Any] = {}


class _Ledger(BaseModel):
    tokens: dict[Index, dict[Index, Count]] = {}
    steps: dict[Index, Count] = {}
    rows: dict[Index, Count] = {}
    extra_tokens: dict[Purpose, Count] = {}
    flops: dict[Purpose, Amount] = {}
    seconds: dict[Purpose, Amount] = {}
    stored_bytes: dict[Purpose, Amount] = {}
    peak_memory_bytes: Amount = 0
    plans: dict[Index, list[PlanEntry]] = {}


@dataclass(frozen=True, kw_only=True)
class RunBill:
    """The bill of one run."""

    label: str
    seed: int
    track: str
    components: list[dict[str, Any]]
    stages: dict[int, str]
    """Stage -> name."""
    n_rows_done: int
    """Complete rows of the matrix."""
    tokens: dict[int, dict[int, int]]
    """Trained stage -> source stage -> target tokens."""
    budget: int | None
    """Target tokens of a stage; None where the track does not fix them."""
    base_tokens: int | None
    """What the base had seen of stage 0 before the run; not part of the bill."""
    steps: dict[int, int] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    """Trained stage -> sequences."""
    extra_tokens: dict[str, int] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stored_bytes: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: float = 0
    plans: dict[int, list[PlanEntry]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How the run is called in tables."""
        return f"{self.label} · seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether every stage has its row."""
        return self.n_rows_done == len(self.stages)

    @property
    def outside(self) -> bool:
        """Whether the checkpoints were trained elsewhere, so that nothing is known of what they cost."""
        return any(part.get("name") == "checkpoints" and not part.get("target") for part in self.components)

    @property
    def n_tokens(self) -> int:
        """Target tokens of all stages."""
        return sum(self.totals().values())

    def totals(self) -> dict[int, int]:
        """Return trained stage -> target tokens."""
        return {stage: sum(sources.values()) for stage, sources in self.tokens.items()}

    def shares(self) -> dict[int, dict[int, float]]:
        """Return trained stage -> source stage -> share of the stage's tokens."""
        return {
            stage: {source: n / total for source, n in self.tokens[stage].items()}
            for stage, total in self.totals().items()
            if total
        }

    def by_source(self) -> dict[int, int]:
        """Return source stage -> target tokens over the whole run; every stage is there."""
        found = dict.fromkeys(self.stages, 0)
        for sources in self.tokens.values():
            for source, n in sources.items():
                found[source] = found.get(source, 0) + n
        return found

    def unit(self) -> float | None:
        """Return a stage's budget B: the track's, or the mean of the trained stages; None without any."""
        totals = [total for total in self.totals().values() if total]
        return self.budget or (sum(totals) / len(totals) if totals else None)

    def in_budgets(self) -> dict[int, float]:
        """Return source stage -> tokens in units of B; with equal replay of t stages the sum of B/t (TiC-LM)."""
        unit = self.unit()
        return {source: n / unit for source, n in self.by_source().items()} if unit else {}

    def passes(self, available: Mapping[int, int]) -> dict[int, float]:
        """Return source stage -> how often this run went over its text.

        Args:
            available: source stage -> training tokens that there are.
        """
        return {source: n / available[source] for source, n in self.by_source().items() if available.get(source)}

    def reviews(self) -> dict[int, list[PlanEntry]]:
        """Return the stages whose mixture changed, was bounded by pools, or left documents out."""
        return {
            stage: plans
            for stage, plans in self.plans.items()
            if len(plans) > 1 or any(entry.pools or entry.n_excluded for entry in plans)
        }

    def as_dict(self, available: Mapping[int, int] | None = None) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "label": self.label,
            "seed": self.seed,
            "track": self.track,
            "finished": self.finished,
            "outside": self.outside,
            "stages": _keyed(self.stages),
            "budget_tokens": self.unit(),
            "base_tokens": self.base_tokens,
            "n_tokens": self.n_tokens,
            "tokens": {str(stage): _keyed(sources) for stage, sources in self.tokens.items()},
            "shares": {str(stage): _keyed(sources) for stage, sources in self.shares().items()},
            "tokens_by_source": _keyed(self.by_source()),
            "budgets_by_source": _keyed(self.in_budgets()),
            "passes_by_source": None if available is None else _keyed(self.passes(available)),
            "steps": _keyed(self.steps),
            "extra_tokens": self.extra_tokens,
            "flops": self.flops,
            "seconds": self.seconds,
            "stored_bytes": self.stored_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "plans": {
                str(stage): [entry.model_dump(mode="json", exclude_defaults=True) for entry in plans]
                for stage, plans in self.plans.items()
            },
        }


def _keyed(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}


def read_bill(store: RunStore) -> RunBill:
    """Return the bill of a run.

    Raises:
        NotFoundError: this is no run.
        IntegrityError: ``run.yaml`` or ``ledger.json`` does not have its form.
    """
    config = _parsed(_Config, store.config(), store, "run.yaml")
    ledger = _parsed(_Ledger, store.ledger(), store, "ledger.json")
    stages = {stage.index: stage.name for stage in sorted(config.stages, key=lambda stage: stage.index)}
    odd = {s for sources in ledger.tokens.values() for s in sources} | {*ledger.tokens, *ledger.plans}
    if unknown := sorted(odd - set(stages)):
        raise IntegrityError(
            f"ledger.json names stage {unknown[0]}, which the run does not have",
            where=store.folder,
            mend="restore the file or run again",
        )
    # A track that fixes its steps lets the tokens of a stage vary.
    budget = None if config.training.get("n_steps_per_stage") else config.training.get("n_tokens_per_stage")
    base = config.track.get("base")
    base_tokens = base.get("n_tokens") if isinstance(base, dict) else None
    return RunBill(
        label=one_line(config.method.label),
        seed=config.seed,
        track=one_line(str(config.track.get("name", "?"))),
        components=config.method.components,
        stages={index: one_line(name) for index, name in stages.items()},
        n_rows_done=len(set(store.stages_done()) & set(stages)),
        tokens={stage: dict(sorted(sources.items())) for stage, sources in sorted(ledger.tokens.items())},
        budget=budget if _is_count(budget) else None,
        base_tokens=base_tokens if _is_count(base_tokens) else None,
        steps=dict(sorted(ledger.steps.items())),
        rows=dict(sorted(ledger.rows.items())),
        extra_tokens=ledger.extra_tokens,
        flops=ledger.flops,
        seconds=ledger.seconds,
        stored_bytes=ledger.stored_bytes,
        peak_memory_bytes=ledger.peak_memory_bytes,
        plans=dict(sorted(ledger.plans.items())),
    )


def _parsed(shape: type[Shape], value: Any, store: RunStore, name: str) -> Shape:
    try:
        return shape.model_validate(value)
    except (ValidationError, RecursionError) as error:
        what = "it is nested too deeply"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False)[0]
            what = f"{'.'.join(str(part) for part in first['loc']) or 'the whole file'}: {first['msg']}"
        raise IntegrityError(
            f"{name} does not have its form: {one_line(what)}",
            where=store.folder,
            mend="restore the file or run again",
        ) from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_COUNT


def one_line(text: str) -> str:
    """Return text that a terminal prints as it is: no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def of_equal_tokens(bills: Sequence[RunBill]) -> list[list[RunBill]]:
    """Return the bills in groups that one table can show: one method on one track, the same tokens and plans."""
    groups: list[list[RunBill]] = []
    for bill in bills:
        for group in groups:
            first = group[0]
            if (first.label, first.track, first.stages, first.tokens, first.plans) == (
                bill.label,
                bill.track,
                bill.stages,
                bill.tokens,
                bill.plans,
            ):
                group.append(bill)
                break
        else:
            groups.append([bill])
    return groups
