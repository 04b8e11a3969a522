"""Proxy-FDA and its controls: hold distances, angles or neighbourhoods of the hidden states of old text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clbench.errors import ConfigError
from clbench.method import Context, Method, Need, Weights
from clbench.methods import _features
from clbench.methods._memory import Rows, add, at_least, local_gradients, reached, read, some
from clbench.train.data import IGNORE

KINDS = ("point", "relational", "fda", "proxy_fda")


class ProxyFda(Method):
    """Add ``strength`` times a loss between a student's and its teacher's features of anchors (arXiv 2505.24088).

    The teacher is the model before the stage: its features of the anchors, rows of past stages, are kept and no second
    model is. point and relational are halves of squares, so that ``strength`` is lambda of lambda/2.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of proxy-fda."""

        kind: Literal["point", "relational", "fda", "proxy_fda"] = "proxy_fda"
        """What is held: each feature, all angles, neighbourhoods, or neighbourhoods with proxies."""
        strength: float = 1.0
        """lambda, beside the loss in nats per token."""
        anchors: int = 128
        """Rows in all, equally many of each past stage, stage 0 among them; drawn when a stage begins."""
        rows: int = 16
        """Anchors a step: all pairs of these are compared."""
        neighbours: int = 4
        """K: the nearest among the anchors of a step, by the teacher."""
        tau: float = 0.1
        """Temperature of the cosines."""
        bias: float = 0.0
        """b, added to -cos/tau."""
        proxies: int = 4
        """Proxies of the neighbours, and of the others, of each anchor."""
        layers: Literal["both", "last", "middle"] = "both"
        """Hidden states after the final norm, those in the middle of the depth, or the mean of both losses."""

    needs = frozenset({Need.PAST_DATA, Need.STAGE_BOUNDARIES})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        check(self.options)
        self.anchors: Rows | None = None
        self.teacher_LAD = torch.empty(0)
        """The teacher's features of the anchors, less their mean, by layer."""
        self.mean_LD = torch.empty(0)

    def begin_stage(self, ctx: Context) -> None:
        """Draw the anchors and keep what the model makes of them."""
        self.anchors = None
        raw_LAD = self._all_features(ctx)
        self.mean_LD = raw_LAD.mean(1)
        self.teacher_LAD = raw_LAD - self.mean_LD[:, None]

    def _rows(self, ctx: Context) -> Rows:
        """Return the anchors' text, drawn again where a run was resumed."""
        if self.anchors is None:
            n, past = self.options.anchors, range(ctx.stage.index)
            shares = [n // len(past) + (stage < n % len(past)) for stage in past]
            self.anchors = Rows.joined([read(ctx, i, share, "anchors") for i, share in enumerate(shares) if share])
        return self.anchors

    def _features(self, ctx: Context, rows: Rows, *, backward: bool) -> torch.Tensor:
        """Return mean-pooled hidden states by layer, ``[L, B, D]``; the output head is neither run nor billed."""
        model: Any = ctx.module
        hidden = model.base_model(input_ids=rows.inputs_RT, output_hidden_states=True, use_cache=False).hidden_states
        wanted = {"last": (-1,), "middle": (len(hidden) // 2,), "both": (len(hidden) // 2, -1)}[self.options.layers]
        n, head = rows.n_targets, 2.0 * model.get_input_embeddings().weight.numel()
        ctx.bill("features", flops=(3 if backward else 1) * (ctx.forward_flops(n) - head * n), n_tokens=n)
        return torch.stack([_features.pooled(hidden[i], rows.targets_RT != IGNORE) for i in wanted])

    def _all_features(self, ctx: Context) -> torch.Tensor:
        """Return the present model's features of all anchors, in eval mode."""
        rows, was_training = self._rows(ctx), ctx.module.training
        ctx.module.eval()
        with torch.no_grad():
            passes = [self._features(ctx, rows[which], backward=False) for which in rows.passes(self.options.rows)]
        ctx.module.train(was_training)
        return torch.cat(passes, 1)

    def edit_gradients(self, ctx: Context) -> None:
        """Add the gradient of the loss on some anchors."""
        rows, parameters = self._rows(ctx), reached(ctx)
        which = some(len(rows), self.options.rows, ctx.seed("anchors")).to(ctx.device)
        self._to(ctx.device)
        student_LBD = self._features(ctx, rows[which], backward=True) - self.mean_LD[:, None]
        loss = self._loss(student_LBD, self.teacher_LAD[:, which], ctx.seed("proxies"))
        if ctx.step == 0:
            ctx.note("first_loss", loss.item())
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        add(local_gradients(parameters), found, self.options.strength)

    def _to(self, device: torch.device) -> None:
        """Have the teacher where the student is: a checkpoint brings it back on the CPU."""
        self.teacher_LAD, self.mean_LD = self.teacher_LAD.to(device), self.mean_LD.to(device)

    def _loss(self, student_LBD: torch.Tensor, teacher_LBD: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the mean of the layers' losses."""
        o, generator = self.options, torch.Generator().manual_seed(seed)
        near = {"n_neighbours": o.neighbours, "tau": o.tau, "bias": o.bias}
        losses = []
        for x_BD, t_BD in zip(student_LBD, teacher_LBD, strict=True):
            if o.kind == "point":
                losses.append(_features.pointwise(x_BD, t_BD))
            elif o.kind == "relational":
                losses.append(_features.relational(x_BD, t_BD))
            elif o.kind == "fda":
                losses.append(_features.fda(x_BD, t_BD, **near))
            else:
                losses.append(_features.proxy_fda(x_BD, t_BD, **near, n_proxies=o.proxies, generator=generator))
        return torch.stack(losses).mean()

    def end_stage(self, ctx: Context) -> None:
        """Note how far the features of all anchors have moved, in the same units whatever was held."""
        self._to(ctx.device)
        student_LAD = self._all_features(ctx) - self.mean_LD[:, None]
        layers = list(zip(student_LAD, self.teacher_LAD, strict=True))
        for name, measure in (("drift_point", _features.pointwise), ("drift_relational", _features.relational)):
            ctx.note(name, sum(measure(x, t).item() for x, t in layers) / len(layers))

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        """Return the teacher's features; the anchors' text is drawn again."""
        return {"teacher_LAD": self.teacher_LAD, "mean_LD": self.mean_LD}, {}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        """Take them back."""
        self.anchors, self.teacher_LAD, self.mean_LD = None, tensors["teacher_LAD"], tensors["mean_LD"]


def check(options: ProxyFda.Options) -> None:
    """Raise ConfigError for options that make no sense."""
    o = options
    at_least("proxy-fda", 1, neighbours=o.neighbours, proxies=o.proxies)
    at_least("proxy-fda", 2, rows=o.rows, anchors=o.anchors)
    for name, allowed in (("kind", KINDS), ("layers", ("both", "last", "middle"))):
        if getattr(o, name) not in allowed:
            raise ConfigError(f"proxy-fda:{name}={getattr(o, name)}", mend=f"give one of {', '.join(allowed)}")
    if not (math.isfinite(o.strength) and o.strength >= 0 and math.isfinite(o.bias)):
        raise ConfigError(f"proxy-fda:strength={o.strength},bias={o.bias}", mend="give finite numbers, no strength < 0")
    if not (math.isfinite(o.tau) and o.tau > 0):
        raise ConfigError(f"proxy-fda:tau={o.tau} is none", mend="give a number above 0 such as 0.1")
