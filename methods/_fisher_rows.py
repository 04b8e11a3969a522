"""The extra pass over a stage's rows that the Fisher methods share: which rows, and its bill.

Sample = one packed sequence (row); its loss is the mean NLL over its targets. The rows are drawn from the whole stage,
not from its tail, and only from its own text, whatever was replayed beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from clbench.errors import ConfigError
from clbench.method import Batch, Context, Need
from clbench.train.data import IGNORE


def rows_of(ctx: Context, stage: int, *, n_rows: int, rows_per_batch: int) -> list[Batch]:
    """Return micro-batches of a stage's training rows (CURRENT_DATA, or PAST_DATA for an earlier one).

    Raises:
        ConfigError: the stage has no training text.
    """
    if not ctx.stage.available_tokens[stage]:
        raise ConfigError(
            f"stage {stage} has no training text to estimate a Fisher matrix from",
            where=f"stage {ctx.stage.index}",
            mend="give base_stage=false" if stage == 0 else None,
        )
    return list(ctx.batches(stage, n_rows=n_rows, name="fisher", rows_per_batch=rows_per_batch))


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return two disjoint parts with about as many rows each.

    Raises:
        ConfigError: there is one batch only.
    """
    if len(batches) < 2:
        raise ConfigError(
            f"{len(batches)} batch of rows cannot be halved for cross-fitting",
            mend="give more rows, a smaller rows_per_batch, or cross_fit=false",
        )
    n_rows, first = sum(len(batch.inputs_BT) for batch in batches), list(batches)
    second: list[Batch] = []
    while len(first) > 1 and 2 * sum(len(batch.inputs_BT) for batch in second) < n_rows:
        second.insert(0, first.pop())
    return first, second


def bill(ctx: Context, batches: Sequence[Batch], *, forwards: int, passes: int = 1) -> None:
    """Bill passes over batches as ``fisher``; ``forwards`` is 1 for a forward pass, 3 with its backward pass."""
    n_tokens = passes * sum(int((batch.targets_BT != IGNORE).sum()) for batch in batches)
    ctx.bill("fisher", flops=forwards * ctx.forward_flops(n_tokens), n_tokens=n_tokens)


def needs_of(*, base_stage: bool) -> frozenset[Need]:
    """Return what a method needs that estimates at each stage's end, and before the first one if asked to."""
    return frozenset({Need.STAGE_BOUNDARIES, Need.CURRENT_DATA} | ({Need.PAST_DATA} if base_stage else set()))
