"""Distillation: KL(teacher || student) of next-token distributions, with its gradient in closed form.

What it leaves to others: who the teacher is (``_teachers``), which rows count and how the term is weighted (``lwf``).

Shapes: N positions that count, V vocabulary, K tokens whose probability the teacher told. A divergence returns its
value and its gradient together, so that the several ``[N, V]`` tensors which autograd would keep are never made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

CHUNK_ELEMENTS_CPU = 2**17
"""Logits that each thread works on at a time: as many as stay in its cache."""
CHUNK_ELEMENTS_ELSEWHERE = 2**26


def divergence(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of KL(softmax(z_t/T) || softmax(z_s/T)) in nats, and T times its gradient with respect to z_s.

    That is ``p_s - p_t`` (Hinton et al. 2015, arXiv 1503.02531, equation 2). It is written over the teacher's logits,
    so that no further tensor of this size is needed.
    """
    total = torch.zeros((), dtype=_working(student_NV), device=student_NV.device)
    for rows in _chunks(student_NV):
        a = teacher_NV[rows].to(total.dtype).mul_(1 / temperature)
        b = student_NV[rows].to(total.dtype) * (1 / temperature)
        p_t, p_s = torch.softmax(a, -1), torch.softmax(b, -1)
        gap = _log_normaliser(b, p_s) - _log_normaliser(a, p_t)
        total += (torch.linalg.vecdot(p_t, a.sub_(b)) + gap).sum()
        if teacher_NV.dtype == total.dtype:
            torch.sub(p_s, p_t, out=teacher_NV[rows])
        else:
            teacher_NV[rows] = p_s.sub_(p_t)
    return total, teacher_NV


def divergence_top_k(
    student_NV: torch.Tensor, log_p_NK: torch.Tensor, ids_NK: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same where of the teacher only K log-probabilities (at T) are known; the rest is one bucket.

    With q the student's probabilities and r the bucket of all other tokens, ``sum_k p_k log(p_k/q_k) +
    p_r log(p_r/q_r)``: the divergence of the coarser distributions, so never more than the whole one and equal to
    it for K = V. T times the gradient: ``q_k - p_k`` at the K tokens, ``q_j (1 - p_r/q_r)`` elsewhere.
    """
    total = torch.zeros((), dtype=_working(student_NV), device=student_NV.device)
    gradient_NV = torch.empty_like(student_NV)
    tiny = torch.finfo(total.dtype).tiny
    for rows in _chunks(student_NV):
        b = student_NV[rows].to(total.dtype) * (1 / temperature)
        q, ids = torch.softmax(b, -1), ids_NK[rows].long()
        p_k, p_r = _with_rest(log_p_NK[rows].to(total.dtype).exp(), whole=ids.shape[1] == b.shape[1])
        log_q_k = b.gather(1, ids) - _log_normaliser(b, q)[:, None]
        q_k = q.gather(1, ids)
        q_r = q.scatter_(1, ids, 0.0).sum(-1, keepdim=True).clamp_min(tiny)  # no 1 - sum: nothing would be left of it
        known = torch.xlogy(p_k, p_k) - p_k * log_q_k
        total += known.sum() + (torch.xlogy(p_r, p_r) - torch.xlogy(p_r, q_r)).sum()
        q.mul_(1 - p_r / q_r).scatter_(1, ids, q_k - p_k)
        gradient_NV[rows] = q
    return total, gradient_NV


def _with_rest(p_NK: torch.Tensor, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K probabilities and what is left of 1, shape ``[N, 1]``, made to sum to 1 in spite of their rounding."""
    total = p_NK.sum(-1, keepdim=True)
    rest = torch.zeros_like(total) if whole else (1 - total).clamp_min(0)
    return p_NK / (total + rest), rest


def _working(logits: torch.Tensor) -> torch.dtype:
    """Return the type to compute in: single precision at least."""
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits_NV: torch.Tensor) -> Iterator[slice]:
    n_rows, width = logits_NV.shape
    on_cpu = logits_NV.device.type == "cpu"
    n_elements = CHUNK_ELEMENTS_CPU * torch.get_num_threads() if on_cpu else CHUNK_ELEMENTS_ELSEWHERE
    size = max(1, n_elements // width)
    return (slice(first, first + size) for first in range(0, n_rows, size))


def _log_normaliser(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return log sum exp of each row, read off where the probability is largest (a third of logsumexp's time)."""
    return logits.amax(-1) - probabilities.amax(-1).log()


class _Known(torch.autograd.Function):
    """A scalar whose gradient is known already; backward once only, as it scales that gradient in place."""

    @staticmethod
    def forward(
        ctx: Any, variable: torch.Tensor, value: torch.Tensor, direction: torch.Tensor, factor: float
    ) -> torch.Tensor:
        ctx.save_for_backward(direction)
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return direction.mul_(outer[0] * ctx.factor), None, None, None


def with_gradient(variable: torch.Tensor, value: torch.Tensor, direction: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``value`` as a function of ``variable`` whose gradient is ``factor * direction``."""
    known: torch.Tensor = _Known.apply(variable, value, direction, factor)  # type: ignore[no-untyped-call]
    return known
