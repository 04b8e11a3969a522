"""Schedule-free AdamW as a torch optimizer (Defazio et al. 2024, arXiv 2405.15682, algorithm 1).

The parameters hold y, where gradients are taken; z stands in the state, and the average x follows from both::

    y_t = (1 - b1) z_t + b1 x_t
    v_t = b2 v_{t-1} + (1 - b2) g_t^2
    z_{t+1} = z_t - rate_t (g_t / (sqrt(v_t) + eps) + decay y_t)
    x_{t+1} = (1 - c) x_t + c z_{t+1},  c = rate_t^2 / sum of rate_i^2 up to t

Moving z is an AdamW step without momentum, so torch's own kernel does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW; all that a resumed run needs stands in ``state`` as tensors.

    Args:
        groups: parameter groups with their ``weight_decay``; ``lr`` may change from step to step (warm-up).
        lr: the learning rate.
        betas: the share b1 of the average in y, above 0 and at most 1, and the decay b2 of the squared gradients.
        form: ``paper`` as above with ``rate_t = lr sqrt(1 - b2^t)`` throughout, as in the authors' package 1.2.7;
            ``package`` as in 1.4.1: Adam's ``sqrt(v_t / (1 - b2^t)) + eps``, and plain lr everywhere else.
        growth: step t counts ``t^growth rate_t^2`` in the average (r in the package; 0 in algorithm 1).
        eps: added to the root of the squared gradients.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        form: str = "paper",
        growth: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "form": form, "growth": growth, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do one step; gradients are left as they are, parameters without one stay where they are."""
        for group in self.param_groups:
            moving: list[torch.Tensor] = [p for p in group["params"] if p.grad is not None]
            if moving:
                self._step(group, moving, [self._state(p) for p in moving])

    def _state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["z"] = parameter.detach().clone()
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)  # where kernels want it
            state["weight_sum"] = torch.zeros((), dtype=torch.float64)
        state["weight_sum"] = state["weight_sum"].cpu()  # the loop loads state beside the parameter
        return state

    def _step(self, group: dict[str, Any], ys: list[torch.Tensor], states: list[dict[str, torch.Tensor]]) -> None:
        beta1, beta2 = group["betas"]
        zs, gradients = [state["z"] for state in states], [p.grad for p in ys if p.grad is not None]
        t = int(states[0]["step"]) + 1
        correction = math.sqrt(1 - beta2**t)
        in_paper = group["form"] == "paper"
        rate = group["lr"] * (correction if in_paper else 1.0)
        weight = t ** group["growth"] * rate**2
        sums = [state["weight_sum"] for state in states]
        torch._foreach_add_(sums, weight)
        c = weight / total if (total := float(sums[0])) > 0 else 0.0

        torch._foreach_lerp_(ys, zs, 1 - 1 / beta1)  # the parameters hold x from here ...
        decay = rate * group["weight_decay"]  # at y: its share of x here, its share of z in the kernel
        if decay:
            torch._foreach_add_(zs, ys, alpha=-decay * beta1 / (1 - decay * (1 - beta1)))
        adamw(
            zs,
            gradients,
            gradients,  # the first moment without momentum is the gradient: read and written as itself
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=ys[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=0.0,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=decay * (1 - beta1) / group["lr"] if decay else 0.0,
            eps=group["eps"] / correction if in_paper else group["eps"],
            maximize=False,
        )
        torch._foreach_lerp_(ys, zs, 1 - beta1 * (1 - c))  # ... to here

    def average(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return x of a parameter, the weights to ship; the parameter itself before its first step."""
        state = self.state.get(parameter)
        if not state:
            return parameter.detach()
        beta1 = self.param_groups[0]["betas"][0]
        return parameter.detach().lerp(state["z"], 1 - 1 / beta1)

    @torch.no_grad()
    def settle(self) -> None:
        """Let y and z be x: what goes on from here goes on from the average."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state.get(parameter):
                    parameter.copy_(self.average(parameter))
                    self.state[parameter]["z"].copy_(parameter)
