"""Two processes that each hold half of every parameter; writes what they compute. Started by test_quadratic."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from clbench.methods.ewc import Ewc
from clbench.methods.l2_sp import L2Sp
from clbench.methods.rank1_ewc import Rank1Ewc
from tests.methods.quadratic_desk import Desk, gradient_of, numbers, put

SIZES = (14, 6)


def parts(flat: torch.Tensor, rank: int | None) -> torch.Tensor:
    """Return this process's half of each parameter, or everything."""
    if rank is None:
        return flat
    return torch.cat([piece.chunk(2)[rank] for piece in torch.split(flat, [*SIZES])])


def outcome(rank: int | None, reduce: object) -> dict[str, torch.Tensor]:
    """Return residuals, gradients, proximal points and a training step of all three methods, for one shard."""
    module = torch.nn.Module()
    for i, size in enumerate(SIZES):
        n = size if rank is None else size // 2
        module.register_parameter(f"p{i}", torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)))
    desk = Desk(module, reduce=reduce)  # type: ignore[arg-type]
    found: dict[str, torch.Tensor] = {}
    for apply in ("coupled", "prox"):
        rank_one = Rank1Ewc(Rank1Ewc.Options(strength=2.0, unit="lambda", apply=apply))
        ewc = Ewc(Ewc.Options(strength=2.0, apply=apply))
        l2_sp = L2Sp(L2Sp.Options(strength=2.0, apply=apply))
        for k in range(3):
            put(desk, parts(numbers(k, 20), rank))
            terms, held = rank_one._terms(desk.ctx)
            rho_L = torch.tensor([1.0 + k], dtype=torch.float64)
            theta = terms.layout.flat(held)
            rank_one.terms = terms.with_term(parts(numbers(10 + k, 20), rank), rho_L, theta, desk.all_reduce)
            rank_one.stages.append(k)
        split = [p.numel() for _, p in desk.parameters()]
        for name, values in (("fisher", numbers(20, 20).square()), ("anchor", numbers(21, 20))):
            setattr(ewc, name, dict(zip(("p0", "p1"), torch.split(parts(values, rank), split), strict=True)))
        for method in (rank_one, ewc, l2_sp):
            label = f"{type(method).__name__}/{apply}"
            put(desk, parts(numbers(30, 20), rank))
            desk.n_reductions = 0
            gradient = gradient_of(method, desk) + parts(numbers(31, 20), rank)
            theta = parts(numbers(30, 20), rank) - desk.learning_rate * gradient  # a step of SGD on a linear loss
            put(desk, theta)
            method.after_step(desk.ctx)
            assert desk.n_reductions == (1 if method is rank_one else 0)
            found[f"{label}/gradient"] = gradient
            found[f"{label}/after"] = torch.cat([p.detach() for _, p in desk.parameters()])
        terms, held = rank_one._terms(desk.ctx)
        found[f"s/{apply}"] = terms.residuals(held, desk.all_reduce).flatten()
    return found


def main() -> None:
    """Join the group, compute, write the file."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    store = torch.distributed.FileStore(  # type: ignore[attr-defined]
        str(folder / "store"), 2
    )
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)

    def reduce(values: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(values)
        return values

    save_file(outcome(rank, reduce), folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
