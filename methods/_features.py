"""Losses between the features that a student and its teacher give to the same anchors: pure functions.

What it leaves to others: where features come from and how a loss is weighted (``proxy_fda``). Shapes: B anchors, D
width of a feature, L layers, P proxies of each sort. Features are less the teacher's mean over all anchors, without
which hidden states all point one way. Weights w are the teacher's, so they carry no gradient.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize, softplus


def pooled(hidden_BTD: torch.Tensor, wanted_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean hidden state over the wanted positions of each row, fp32, shape ``[B, D]``."""
    weight_BT = wanted_BT / wanted_BT.sum(1, keepdim=True).clamp_min(1)
    return torch.einsum("btd,bt->bd", hidden_BTD.float(), weight_BT)


def cosines(features_BD: torch.Tensor) -> torch.Tensor:
    """Return the cosines of all pairs, shape ``[B, B]``."""
    unit_BD = normalize(features_BD, dim=1)
    return unit_BD @ unit_BD.T


def others(n: int, device: torch.device) -> torch.Tensor:
    """Return which pairs are of two different anchors, bool ``[n, n]``."""
    return ~torch.eye(n, dtype=torch.bool, device=device)


def pointwise(student_BD: torch.Tensor, teacher_BD: torch.Tensor) -> torch.Tensor:
    """Return ``1/2 mean_i |x_i - x^_i|^2 / mean_i |x^_i|^2``: half the share of the teacher's spread that has moved.

    LDIFS (Mukhoti et al. 2023, arXiv 2308.13320) has the distance alone; the division makes layers alike.
    """
    moved = (student_BD - teacher_BD).square().sum(1).mean()
    return moved / (2 * teacher_BD.square().sum(1).mean().clamp_min(torch.finfo(moved.dtype).tiny))


def relational(student_BD: torch.Tensor, teacher_BD: torch.Tensor) -> torch.Tensor:
    """Return ``1/2 mean_{i != j} (cos(x_i, x_j) - cos(x^_i, x^_j))^2``; its minimum is the teacher's geometry."""
    gap_BB = cosines(student_BD) - cosines(teacher_BD)
    return gap_BB[others(len(gap_BB), gap_BB.device)].square().mean() / 2


def neighbour_weights(teacher_BD: torch.Tensor, n_neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``w``, and which pairs are neighbours, ``[B, B]`` each; nobody is its own.

    With c the teacher's cosine, ``w_ij = max(c, 0)`` where j is one of the K nearest of i, ``-|c|`` elsewhere: a
    neighbour is never pushed away and a stranger never pulled.
    """
    cosine_BB = cosines(teacher_BD)
    n = len(cosine_BB)
    apart_BB = others(n, cosine_BB.device)
    nearest = cosine_BB.masked_fill(~apart_BB, -torch.inf).topk(min(n_neighbours, n - 1), dim=1).indices
    near_BB = torch.zeros_like(apart_BB).scatter_(1, nearest, True)
    w_BB = torch.where(near_BB, cosine_BB.clamp_min(0), -cosine_BB.abs())
    return w_BB * apart_BB, near_BB


def alignment(cosine: torch.Tensor, w: torch.Tensor, *, tau: float, bias: float) -> torch.Tensor:
    """Return ``log(1 + exp(w (-cos/tau + b)))`` pair by pair; its derivative to cos is ``-w/tau sigmoid(...)``."""
    return softplus(w * (bias - cosine / tau))


def fda(
    student_BD: torch.Tensor, teacher_BD: torch.Tensor, *, n_neighbours: int, tau: float, bias: float
) -> torch.Tensor:
    """Return feature distribution alignment, ``mean_i 1/(B-1) sum_{j != i}`` of ``alignment`` (Proxy-FDA, 2505.24088).

    Not minimal at student = teacher: neighbours are pulled together beyond what they were.
    """
    w_BB, _ = neighbour_weights(teacher_BD, n_neighbours)
    terms_BB = alignment(cosines(student_BD), w_BB, tau=tau, bias=bias)
    return terms_BB[others(len(terms_BB), terms_BB.device)].mean()


def proxy_fda(
    student_BD: torch.Tensor,
    teacher_BD: torch.Tensor,
    *,
    n_neighbours: int,
    tau: float,
    bias: float,
    n_proxies: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return FDA with P proxies beside the neighbours of each anchor and P beside the others: ``1/(B-1+P+P)`` a row.

    Ours in place of the paper's learnt generator: a proxy is a convex combination, drawn uniformly, of the student's
    unit features of these anchors, and its w is theirs, combined alike. An empty set has no proxies.
    """
    w_BB, near_BB = neighbour_weights(teacher_BD, n_neighbours)
    apart_BB = others(len(w_BB), w_BB.device)
    unit_BD = normalize(student_BD, dim=1)
    terms = alignment(unit_BD @ unit_BD.T, w_BB, tau=tau, bias=bias).masked_fill(~apart_BB, 0).sum(1)
    n_terms = apart_BB.sum(1)
    for members_BB in (near_BB, apart_BB & ~near_BB):
        if not bool(members_BB.any()):
            continue
        share_BPB = convex(members_BB, n_proxies, generator)
        proxies_BPD = normalize(share_BPB @ unit_BD, dim=2)
        cosine_BP = torch.einsum("bd,bpd->bp", unit_BD, proxies_BPD)
        w_BP = torch.einsum("bpj,bj->bp", share_BPB, w_BB)
        terms = terms + alignment(cosine_BP, w_BP, tau=tau, bias=bias).sum(1)
        n_terms = n_terms + n_proxies
    return (terms / n_terms).mean()


def convex(members_BB: torch.Tensor, n_proxies: int, generator: torch.Generator) -> torch.Tensor:
    """Return weights of convex combinations of each row's members, uniform on their simplex, shape ``[B, P, B]``."""
    n = len(members_BB)
    draws = torch.empty(n, n_proxies, n, dtype=torch.float64).exponential_(generator=generator)
    draws = draws.to(members_BB.device, torch.float32) * members_BB[:, None]
    return draws / draws.sum(2, keepdim=True)
