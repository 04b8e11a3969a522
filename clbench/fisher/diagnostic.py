"""How rank-1 is the Fisher of a model on some text? Gradients of N samples, their Gram matrices, figures and floors.

A sample is one packed row unless the batches say otherwise; its loss is the mean NLL over its targets, so
F = mean_i g_i g_i^T is the empirical Fisher that EWC uses. ``clbench.fisher.gram`` says what each figure means;
``clbench.fisher.samples`` cuts a stream into samples, ``clbench.fisher.subjects`` finds models and text.

The N x N Gram matrices come from all gradients held at once where N x P fits ``memory_bytes`` (exact), in several
passes over the text where it does not and ``projection=None`` asks for exactness, or else from a seeded count sketch of
every gradient: each coordinate is added, with a random sign, to one of k bins. Its inner products are unbiased with a
standard error of at most about ||g_i|| ||g_j|| / sqrt(k); norms, cosines with
the weights and the diagonal stay exact.

Legend: B rows of a batch, S samples of a batch, N samples in all, P coordinates of a parameter, K bins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from clbench import seeds
from clbench.errors import ConfigError
from clbench.fisher import gram as grams
from clbench.fisher.gradients import each_sequence
from clbench.fisher.gram import Gram, Quantity
from clbench.method import Weights

MEMORY_BYTES = 1 << 30
"""Gradients that are held at once, in fp32; more samples or parameters are projected."""
SKETCH_DIMS = 4096
MIN_SAMPLES = 16
CHUNK = 1 << 14
"""Coordinates whose products are summed in one fp64 multiplication."""
Blocks = Literal["none", "kinds", "layers", "both"]
"""Which blocks of parameters are reported beside all of them."""

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
KINDS = (
    ("norms", re.compile(r"norm|(?:^|\.)ln_?\w*(?:\.|$)")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|experts")),
    ("head", re.compile(r"lm_head|embed_out|output_projection")),
    ("embedding", re.compile(r"embed|(?:^|\.)(?:wte|wpe)")),
)
"""Kind -> what its parameters' names hold; the first that fits."""


@dataclass(frozen=True)
class SampleBatch:
    """Whole samples: rows ``[B, T]``, and how their gradients are summed to samples."""

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    weights_SB: torch.Tensor | None = None
    """Sample gradient = sum of the rows' with these weights; None: every row is a sample."""


Batches = Callable[[], Iterable[SampleBatch]] | Sequence[SampleBatch]
"""The same samples every time that it is asked."""


@dataclass(frozen=True)
class Block:
    """The figures of one block of parameters."""

    name: str
    n_parameters: int
    quantities: dict[str, Quantity]

    def value(self, name: str) -> float | None:
        """Return one figure, None where it is not defined or was not measured."""
        return self.quantities[name].value if name in self.quantities else None

    @property
    def mean_is_noise(self) -> bool:
        """Whether the mean gradient cannot be told from noise, or is mostly that: see docs/fisher.md."""
        kappa, c_star = self.quantities["kappa"], self.value("c_star")
        return kappa.p is None or kappa.p > grams.ALPHA or c_star is None or c_star < 1

    def verdict(self) -> str:
        """Return what the figures mean, in one sentence."""
        along, best, diagonal = (self.value(n) for n in ("rank1_error", "best_rank1_error", "diagonal_error"))
        numbers = f"error {_text(along)} along the mean gradient, {_text(best)} along the best single direction"
        if diagonal is not None:
            numbers += f", {_text(diagonal)} of the diagonal (0 is perfect, 1 is nothing)"
        return f"{_rank_words(along, best)}: {numbers}; {self._mean_words()}"

    def _mean_words(self) -> str:
        split, c_star = self.quantities["split_half"], self.value("c_star")
        told = f"split-half cosine {_text(split.value)}, noise reaches {_text(split.null_bound)}"
        if self.quantities["kappa"].p is None or (self.quantities["kappa"].p or 0) > grams.ALPHA:
            return f"the mean gradient is noise ({told})"
        if self.mean_is_noise:
            return f"the mean gradient is mostly noise (cross-fit c* {_text(c_star)} < 1; {told})"
        return f"the mean gradient is no noise ({told})"


@dataclass(frozen=True)
class Report:
    """The figures of one model on one text; the first block is all parameters."""

    blocks: list[Block]
    n_samples: int
    loss_nats: float
    """Mean over the samples."""
    projection: int | None
    """Dimensions of the projection; None: exact."""
    seed: int
    about: dict[str, Any] = field(default_factory=dict)
    """What was measured: run, stage, text, grouping, weights."""

    @property
    def all(self) -> Block:
        """The block of all parameters."""
        return self.blocks[0]

    @property
    def gram_error(self) -> float:
        """Standard error of a Gram entry from the projection, as a share of the product of the norms."""
        return 0.0 if self.projection is None else self.projection**-0.5

    def verdict(self) -> str:
        """Return the sentence about all parameters."""
        return self.all.verdict()

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return {
            "about": self.about,
            "n_samples": self.n_samples,
            "loss_nats": self.loss_nats,
            "projection": self.projection,
            "gram_error": self.gram_error,
            "seed": self.seed,
            "verdict": self.verdict(),
            "blocks": {
                block.name: {
                    "n_parameters": block.n_parameters,
                    "mean_is_noise": block.mean_is_noise,
                    "quantities": grams.summary_values(block.quantities),
                }
                for block in self.blocks
            },
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Report:
        """Return the report that ``as_dict`` wrote."""
        blocks = [
            Block(name, one["n_parameters"], {n: Quantity(n, **fields) for n, fields in one["quantities"].items()})
            for name, one in value["blocks"].items()
        ]
        kept = {name: value[name] for name in ("n_samples", "loss_nats", "projection", "seed", "about")}
        return cls(blocks, **kept)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _rank_words(along: float | None, best: float | None) -> str:
    """Return the first words of the verdict; an error of 0.5 leaves a quarter of ||F||^2 unexplained."""
    if along is not None and along <= 0.5:
        return "rank-1 along the mean gradient" if along <= 0.2 else "mostly rank-1 along the mean gradient"
    if best is not None and best <= 0.5:
        return "one direction dominates the Fisher, but it is not the mean gradient"
    if along is not None and along < 0.9:
        return "the mean gradient is one of several directions of the Fisher here"
    return "the Fisher here is not rank-1"


def diagnose(
    model: torch.nn.Module,
    batches: Batches,
    *,
    projection: int | Literal["auto"] | None = "auto",
    seed: int = 0,
    blocks: Blocks = "both",
    second_moments: Weights | None = None,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Report:
    """Measure how rank-1 the empirical Fisher of a model is on some samples.

    Args:
        model: takes ``input_ids`` and returns ``logits``; left as it was, also its training mode.
        batches: the samples, the same every time they are asked for (a list, or a function).
        projection: dimensions of the sketch; None: exact, in as many passes as memory asks for; auto: exact in one
            pass where that fits, else 4096.
        seed: of sketch, halves and signs.
        blocks: which blocks are reported beside all parameters.
        second_moments: Adam's second moments by parameter name; adds the cosine of mu with sqrt(v) theta.
        memory_bytes: bound on the gradients held at once.
        progress: told the number of rows after every batch.
        about: what the report says it is about.

    Raises:
        ConfigError: fewer than 16 samples, or none of them has a gradient.
    """
    passes = batches if callable(batches) else lambda: iter(batches)
    n = sum(len(_weights(batch)) for batch in passes())
    if n < MIN_SAMPLES:
        raise ConfigError(f"{n} samples are too few for a Gram matrix", mend=f"give at least {MIN_SAMPLES}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dims = _dims(projection, n, sum(p.numel() for p in parameters.values()), memory_bytes)
    directions = _directions(parameters, second_moments)
    was_training = model.training
    model.eval()
    try:
        if dims is None:
            cells, loss_nats = _exact(model, parameters, passes, n, directions, memory_bytes, progress)
        else:
            cells, loss_nats = _sketched(model, parameters, passes, n, directions, dims, seed, progress)
    finally:
        model.train(was_training)
    found = [
        Block(name, one.n_parameters, grams.measure(one, seed=seed)) for name, one in _unions(cells, blocks).items()
    ]
    return Report(found, n, loss_nats, dims, seed, dict(about or {}))


def _dims(projection: int | Literal["auto"] | None, n: int, n_parameters: int, memory_bytes: int) -> int | None:
    """Return the dimensions of the sketch, None for none."""
    if projection == "auto":
        return None if 4 * n * n_parameters <= memory_bytes else SKETCH_DIMS
    if projection is not None and projection < 2 * MIN_SAMPLES:
        raise ConfigError(f"a projection to {projection} dimensions keeps nothing", mend="give 1000 or more, or none")
    return projection


def _weights(batch: SampleBatch) -> torch.Tensor | range:
    """Return something as long as the batch has samples."""
    return range(len(batch.inputs_BT)) if batch.weights_SB is None else batch.weights_SB


def cell_of(name: str) -> tuple[str, str | None]:
    """Return (kind, layer) of a parameter by its name; the finest block that is kept."""
    layer = LAYER.search(name)
    kind = next((kind for kind, pattern in KINDS if pattern.search(name.rpartition(".")[0] or name)), "other")
    return kind, None if layer is None else f"layer {int(layer[1])}"


def _directions(parameters: Mapping[str, torch.Tensor], moments: Weights | None) -> dict[str, Weights]:
    """Return what the mean gradient is compared with: -theta, and -sqrt(v) theta where Adam's v is at hand.

    At a stationary point of the loss with decay wd the mean gradient is -wd theta (coupled) or about -wd sqrt(v) theta
    (AdamW): a cosine of 1 means that it says nothing but "keep the weights' norm".
    """
    found = {"minus_theta": {name: -p.detach() for name, p in parameters.items()}}
    if moments is not None:
        found["minus_sqrt_v_theta"] = {
            name: -p.detach() * moments[name].to(p.device).sqrt() for name, p in parameters.items() if name in moments
        }
    return found


def _samples(batch: SampleBatch, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradients of samples, ``[S, P]``, from those of rows, ``[B, …]``."""
    flat_BP = gradient.detach().flatten(1).float()
    return flat_BP if batch.weights_SB is None else batch.weights_SB.to(flat_BP) @ flat_BP


@dataclass
class _Cell:
    """Sums of one cell while it is made."""

    n: int
    k_NN: np.ndarray[Any, Any] = field(init=False)
    n_parameters: int = 0
    squared: float = 0.0
    fourth: float = 0.0
    along: dict[str, tuple[np.ndarray[Any, Any], float]] = field(default_factory=dict)
    norms_N: np.ndarray[Any, Any] = field(init=False)
    sketch_NK: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.k_NN, self.norms_N = np.zeros((self.n, self.n)), np.zeros(self.n)

    def add_along(self, name: str, first: int, dots_S: torch.Tensor) -> None:
        """Add g_i . d of some samples."""
        dots_N, norm2 = self.along.setdefault(name, (np.zeros(self.n), 0.0))
        dots_N[first : first + len(dots_S)] += dots_S.double().cpu().numpy()
        self.along[name] = dots_N, norm2

    def add_norm(self, name: str, norm2: float) -> None:
        """Add to ||d||^2."""
        dots_N, before = self.along.setdefault(name, (np.zeros(self.n), 0.0))
        self.along[name] = dots_N, before + norm2

    def gram(self, dims: int | None) -> Gram:
        """Return the finished Gram; with a sketch its diagonal is the exact norms."""
        k_NN, noise_NN = self.k_NN, None
        if self.sketch_NK is not None and dims is not None:
            sketch_NK = self.sketch_NK.double().cpu().numpy()
            k_NN = sketch_NK @ sketch_NK.T
            np.fill_diagonal(k_NN, self.norms_N)
            noise_NN = np.outer(self.norms_N, self.norms_N) / dims
            np.fill_diagonal(noise_NN, 0.0)
        return Gram(k_NN, self.n_parameters, (self.squared, self.fourth), self.along, dims, noise_NN)


def _new_cells(
    parameters: Mapping[str, torch.Tensor], n: int, directions: Mapping[str, Weights]
) -> dict[tuple[str, str | None], _Cell]:
    cells: dict[tuple[str, str | None], _Cell] = {}
    for name, parameter in parameters.items():
        cell = cells.setdefault(cell_of(name), _Cell(n))
        cell.n_parameters += parameter.numel()
        for direction, weights in directions.items():
            if name in weights:
                cell.add_norm(direction, float(weights[name].double().square().sum()))
    return cells


def _exact(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    passes: Callable[[], Iterable[SampleBatch]],
    n: int,
    directions: Mapping[str, Weights],
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> tuple[dict[tuple[str, str | None], Gram], float]:
    """Hold slices of all gradients that fit into memory, as many passes over the text as there are slices."""
    cells, loss = _new_cells(parameters, n, directions), 0.0
    for slices in _slices({name: p.numel() for name, p in parameters.items()}, max(1, memory_bytes // (4 * n))):
        held = {name: torch.empty(n, end - start) for name, (start, end) in slices.items()}
        loss = 0.0
        for first, batch in _numbered(passes()):
            loss += _sum_loss(model, batch, partial(_hold, held, slices, first, batch), list(slices))
            if progress is not None:
                progress(len(batch.inputs_BT))
        for name in list(held):
            start, end = slices[name]
            _take(
                cells[cell_of(name)],
                held.pop(name),
                {d: w[name].flatten()[start:end] for d, w in directions.items() if name in w},
            )
    return {key: cell.gram(None) for key, cell in cells.items()}, loss / n


def _hold(
    held: Weights,
    slices: Mapping[str, tuple[int, int]],
    first: int,
    batch: SampleBatch,
    name: str,
    gradient: torch.Tensor,
) -> None:
    """Keep a slice of one parameter's gradients."""
    start, end = slices[name]
    g_SP = _samples(batch, gradient)[:, start:end]
    held[name][first : first + len(g_SP)] = g_SP.cpu()


def _take(cell: _Cell, g_NP: torch.Tensor, directions: Weights) -> None:
    """Add the held gradients of one parameter, or a slice of it, to its cell."""
    for start in range(0, g_NP.shape[1], CHUNK):
        part_NP = g_NP[:, start : start + CHUNK].double()
        cell.k_NN += (part_NP @ part_NP.T).numpy()
        squares_NP = part_NP.square_()
        cell.squared += float(squares_NP.mean(0).square().sum())
        cell.fourth += float(squares_NP.square_().sum())
    for name, direction in directions.items():
        cell.add_along(name, 0, g_NP @ direction.float().cpu())


def _slices(sizes: Mapping[str, int], n_held: int) -> list[dict[str, tuple[int, int]]]:
    """Cut parameters into passes of at most ``n_held`` coordinates: name -> (first, end) in the flattened parameter."""
    passes: list[dict[str, tuple[int, int]]] = [{}]
    left = n_held
    for name, size in sizes.items():
        start = 0
        while start < size:
            if not left:
                passes.append({})
                left = n_held
            end = min(size, start + left)
            passes[-1][name] = start, end
            left -= end - start
            start = end
    return passes


def _sketched(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    passes: Callable[[], Iterable[SampleBatch]],
    n: int,
    directions: Mapping[str, Weights],
    dims: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> tuple[dict[tuple[str, str | None], Gram], float]:
    """Project every gradient as it comes: one pass, one vector of squares beside the sketches."""
    cells, loss = _new_cells(parameters, n, directions), 0.0
    squares: Weights = {name: torch.zeros(p.numel(), device=p.device) for name, p in parameters.items()}
    for first, batch in _numbered(passes()):

        def visit(name: str, gradient: torch.Tensor, first: int = first, batch: SampleBatch = batch) -> None:
            g_SP, cell = _samples(batch, gradient), cells[cell_of(name)]
            if cell.sketch_NK is None:
                cell.sketch_NK = torch.zeros(n, dims, device=g_SP.device)
            here = slice(first, first + len(g_SP))
            bin_P, sign_P = sketch_of(g_SP.shape[1], dims, seed, name)
            cell.sketch_NK[here].index_add_(1, bin_P.to(g_SP.device), g_SP * sign_P.to(g_SP.device))
            for direction, weights in directions.items():
                if name in weights:
                    cell.add_along(direction, first, g_SP @ weights[name].flatten().float())
            squares_SP = g_SP.square()
            cell.norms_N[here] += squares_SP.sum(1, dtype=torch.float64).cpu().numpy()
            squares[name] += squares_SP.sum(0)
            cell.fourth += float(squares_SP.square_().sum(dtype=torch.float64))

        loss += _sum_loss(model, batch, visit, None)
        if progress is not None:
            progress(len(batch.inputs_BT))
    for name, summed_P in squares.items():
        cells[cell_of(name)].squared += float((summed_P.double() / n).square().sum())
    return {key: cell.gram(dims) for key, cell in cells.items()}, loss / n


def sketch_of(size: int, dims: int, seed: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bin (int64) and the sign (fp32) of every coordinate of one parameter, made anew each time."""
    raw = np.random.Philox(key=seeds.derive(seed, "fisher", "sketch", name)).random_raw(size)
    bins = (raw & np.uint64((1 << 62) - 1)) % np.uint64(dims)
    signs = (raw >> np.uint64(63)).astype(np.float32) * 2 - 1
    return torch.from_numpy(bins.astype(np.int64)), torch.from_numpy(signs)


def _numbered(batches: Iterable[SampleBatch]) -> Iterator[tuple[int, SampleBatch]]:
    """Yield batches with the place of their first sample."""
    first = 0
    for batch in batches:
        yield first, batch
        first += len(_weights(batch))


def _sum_loss(
    model: torch.nn.Module,
    batch: SampleBatch,
    visit: Callable[[str, torch.Tensor], None],
    names: Sequence[str] | None,
) -> float:
    """Visit the per-row gradients of one batch and return the sum of its samples' losses in nats."""
    loss_B = each_sequence(model, batch.inputs_BT, batch.targets_BT, visit, names=names).double().cpu()
    loss_S = loss_B if batch.weights_SB is None else batch.weights_SB.double().cpu() @ loss_B
    return float(loss_S.sum())


def _unions(cells: Mapping[tuple[str, str | None], Gram], blocks: Blocks) -> dict[str, Gram]:
    """Return the Grams that are reported: all parameters, then kinds, layers; none without a gradient."""
    groups: dict[str, list[Gram]] = {"all": list(cells.values())}
    if blocks in ("kinds", "both"):
        for (kind, _), one in cells.items():
            groups.setdefault(kind, []).append(one)
    if blocks in ("layers", "both"):
        numbered = sorted({layer for _, layer in cells if layer}, key=lambda text: int(text.split()[1]))
        for wanted in numbered:
            groups[wanted] = [one for (_, layer), one in cells.items() if layer == wanted]
    found = {name: _sum(parts) for name, parts in groups.items()}
    if not np.trace(found["all"].k_NN) > 0:
        raise ConfigError("no sample has a gradient", mend="give text with targets, and weights that are trained")
    return {name: one for name, one in found.items() if np.trace(one.k_NN) > 0}


def _sum(parts: Sequence[Gram]) -> Gram:
    total = parts[0]
    for one in parts[1:]:
        total = total + one
    return total
