"""What measured rows say about merges: retention, kept domain gain, and how sure that is. No torch.

Definitions are those of ``front``: retention of a loss is base over after, of an accuracy the share of what was above
chance; the mean over general benchmarks. Kept gain is the merge's gain over the base as a share of the tuned model's.
Intervals: documents are drawn again, the same ones for all models, so they are evaluation noise of these weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.errors import ConfigError
from clbench.merge.front import STANDARD_ERRORS, domain_gain_retention, retention, undefined
from clbench.results.matrix import Array, Documents
from clbench.results.metrics import Value
from clbench.results.stats import Interval, bootstrap_interval, resample
from clbench.suite import Rows

if TYPE_CHECKING:
    from clbench.merge.evaluate import Benchmark

N_RESAMPLES = 2000
SIDES = ("general", "domain")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where one model stands between base and tuned."""

    general: Interval
    """Retention."""
    domain: Interval
    """Kept share of the domain gain; NaN with a reason where training gained nothing."""
    scores: Mapping[str, Mapping[str, float]]
    """Benchmark -> nats_per_token and bits_per_byte, or score."""
    recovered: float
    """Share of what training cost on the general side that is undone; NaN where it cost nothing."""
    keeps: float = math.nan
    """Share of the resamples in which the wanted retention is reached."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values; NaN is None."""
        found: dict[str, Any] = _without_nan(asdict(self))
        return found


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(kw_only=True)
class Yardstick:
    """Compares models with the base and the tuned one, all measured by one judge.

    Args:
        benchmarks: in the order of the rows' ``stage``.
        base: rows of the base.
        tuned: rows of the tuned model.
    """

    benchmarks: Sequence[Benchmark]
    base: Rows
    tuned: Rows
    n_resamples: int = N_RESAMPLES
    gain: Value = field(init=False)
    """What training gained on the domain (positive is better), or NaN and why it cannot be shared out."""
    gain_error: float = field(init=False)
    """Its standard error over documents."""
    left_out: dict[str, str] = field(init=False, default_factory=dict)
    """General benchmark -> why it has no retention: nothing is lost of what the base did not know."""

    def __post_init__(self) -> None:
        """Measure the gain of training."""
        for side in ("general", "domain"):
            directions = {one.lower_is_better for one in self.benchmarks if one.side == side}
            if not directions or (side == "domain" and len(directions) > 1):
                raise ConfigError(f"no benchmark, or both kinds, on the {side} side", mend="give losses or accuracies")
        found, drawn = self._tables([self.base, self.tuned])
        self._leave_out(found[0], drawn[:, 0])
        score, scores = self._domain(found), self._domain(drawn)
        self.gain_error = float((scores[:, 1] - scores[:, 0]).std(ddof=1))
        gain = float(score[1] - score[0])
        self.gain = Value(np.array(gain))
        if gain < STANDARD_ERRORS * self.gain_error or gain <= 0:
            what = "made the domain score worse" if gain < 0 else "gained nothing sure on the domain"
            self.gain = undefined(f"training {what}: {gain:+.4g}, standard error {self.gain_error:.2g}")

    def _leave_out(self, base: Array, drawn: Array) -> None:
        """Leave accuracies out of the general mean where the base's is not surely above chance.

        Args:
            base: its scores, ``[C]``.
            drawn: on resampled items, ``[B, C]``.

        Raises:
            ConfigError: no general benchmark is left.
        """
        for c, one in enumerate(self.benchmarks):
            error = float(drawn[:, c].std(ddof=1))
            if one.side == "general" and not one.lower_is_better and base[c] - one.chance < STANDARD_ERRORS * error:
                what = (
                    f"the base's {base[c]:.3g} is not two standard errors ({error:.2g}) above chance {one.chance:.3g}"
                )
                self.left_out[one.name] = what
        if not self._counting:
            raise ConfigError(
                f"no general benchmark is left: {next(iter(self.left_out.values()))}", mend="give general text, too"
            )

    @property
    def _counting(self) -> list[tuple[int, Benchmark]]:
        """The general benchmarks that count, with their places."""
        return [
            (c, one) for c, one in enumerate(self.benchmarks) if one.side == "general" and one.name not in self.left_out
        ]

    def _tables(self, models: Sequence[Rows]) -> tuple[Array, Array]:
        """Return scores by model and benchmark, ``[R, C]``, and on resampled documents, ``[B, R, C]``."""
        documents = _documents(models)
        columns = range(len(self.benchmarks))
        drawn = resample([documents], "nats_per_token", columns, n_resamples=self.n_resamples, root="merge")[0]
        return documents.matrix("nats_per_token", columns).values, drawn.values

    def _domain(self, table: Array) -> Array:
        """Return the mean domain score, larger is better, of ``[..., C]``."""
        here = [c for c, one in enumerate(self.benchmarks) if one.side == "domain"]
        sign = -1.0 if self.benchmarks[here[0]].lower_is_better else 1.0
        score: Array = sign * table[..., here].mean(-1)
        return score

    def _general(self, table: Array) -> Array:
        """Return the mean retention of every model, the first is the base; ``[..., R, C]`` -> ``[..., R]``."""
        parts = []
        for c, one in self._counting:
            after, base = table[..., c], table[..., :1, c]
            with np.errstate(divide="ignore", invalid="ignore"):
                kept = base / after if one.lower_is_better else (after - one.chance) / (base - one.chance)
            parts.append(np.where(np.isfinite(kept), kept, np.nan))
        mean: Array = np.mean(parts, axis=0)
        return mean

    def retention(self, rows: Rows) -> float:
        """Return general retention alone, for the search."""
        table = _documents([self.base, rows]).matrix("nats_per_token", range(len(self.benchmarks))).values
        found = [
            retention(table[1, c], table[0, c], chance=one.chance, lower_is_better=one.lower_is_better).value
            for c, one in self._counting
        ]
        return math.fsum(found) / len(found)

    def losses(self, rows: Rows) -> tuple[float, float]:
        """Return the mean loss of the general and of the domain side; where a side has none, minus the mean score."""
        table = _documents([rows]).matrix("nats_per_token", range(len(self.benchmarks))).values[0]
        found = []
        for side in SIDES:
            here = [(c, one.lower_is_better) for c, one in enumerate(self.benchmarks) if one.side == side]
            losses = [table[c] for c, is_loss in here if is_loss]
            found.append(float(np.mean(losses) if losses else -np.mean([table[c] for c, _ in here])))
        return found[0], found[1]

    def kept_gain(self, rows: Rows) -> Value:
        """Return the kept domain gain alone."""
        if self.gain.reason is not None:
            return self.gain
        table = _documents([self.base, self.tuned, rows]).matrix("nats_per_token", range(len(self.benchmarks))).values
        base, tuned, merged = (float(x) for x in self._domain(table))
        return domain_gain_retention(merged, base, tuned, standard_error=self.gain_error)

    def standings(self, models: Sequence[Rows], *, keep: float = math.nan) -> list[Standing]:
        """Return where models stand, all on the same resamples."""
        found, drawn = self._tables([self.base, self.tuned, *models])
        general, generals = self._general(found), self._general(drawn)
        domains = self._domain(drawn)
        gains = (domains - domains[:, :1]) / (domains[:, 1:2] - domains[:, :1])
        n = [int((self.base.stage == c).sum()) for c in range(len(self.benchmarks))]
        n_side = [sum(k for k, one in zip(n, self.benchmarks, strict=True) if one.side == s) for s in SIDES]
        standings = []
        for r, rows in enumerate(models, start=2):
            kept = self.kept_gain(rows)
            standings.append(
                Standing(
                    general=bootstrap_interval(float(general[r]), generals[:, r], n_side[0]),
                    domain=Interval(math.nan, n=n_side[1], reason=kept.reason)
                    if kept.reason is not None
                    else bootstrap_interval(kept.value, gains[:, r], n_side[1]),
                    scores=self._scores(rows, found[r]),
                    recovered=self._recovered(found, r),
                    keeps=float((generals[:, r] >= keep).mean()) if math.isfinite(keep) else math.nan,
                )
            )
        return standings

    def _recovered(self, table: Array, r: int) -> float:
        """Return the mean of ``(tuned - merged) / (tuned - base)`` of what was lost on the general side, or NaN."""
        shares = []
        for c, one in self._counting:
            base, tuned, merged = table[0, c], table[1, c], table[r, c]
            lost = (tuned - base) if one.lower_is_better else (base - tuned)
            if lost > 1e-3 * abs(base):
                shares.append((tuned - merged) / (tuned - base))
        return math.fsum(shares) / len(shares) if shares else math.nan

    def _scores(self, rows: Rows, per_token: Array) -> dict[str, dict[str, float]]:
        found = {}
        for c, one in enumerate(self.benchmarks):
            if not one.lower_is_better:
                found[one.name] = {"score": float(per_token[c])}
                continue
            here = rows.stage == c
            n_bytes = float(rows.n_bytes[here].sum())
            bits = float(rows.value[here].sum()) / math.log(2) / n_bytes if n_bytes else math.nan
            found[one.name] = {"nats_per_token": float(per_token[c]), "bits_per_byte": bits}
        return found


def _documents(models: Sequence[Rows]) -> Documents:
    """Return the rows of several models, aligned; items of one benchmark are not versions of another's."""
    first = models[0]
    for other in models[1:]:
        if other.item != first.item or not np.array_equal(other.stage, first.stage):
            raise ValueError("models were measured on different items")
    return Documents(
        value=np.stack([one.value for one in models]),
        row_stages=tuple(range(len(models))),
        stage=first.stage,
        item=np.array([f"{stage}:{item}" for stage, item in zip(first.stage, first.item, strict=True)]),
        n_tokens=first.n_tokens,
        n_bytes=first.n_bytes,
    )
