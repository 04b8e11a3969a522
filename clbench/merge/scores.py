"""How much each weight matrix was worth to the base, and how much training has changed it: the scores behind SPEAR-MM.

A reconstruction: of SPEAR-MM (Kapusuzoglu et al. 2025, arXiv 2511.08500) the names of the two scores are known and what
they are made of, their formulas are not. See docs/spear-mm.md for what is the paper's and what is ours. What is left to
others: which units are restored and how far (``select``), the restoring itself (``kernels``).

A *unit* is a dotted path such as ``model.layers.3``; it owns every tensor below it. Only matrices inside numbered
blocks are scored. Shapes: a matrix is ``[d_out, d_in]`` or its transpose (the scores do not care), S singular values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from clbench.errors import ConfigError, IntegrityError
from clbench.files import atomic_path
from clbench.merge.kernels import mp_median

Array = NDArray[np.float64]
Granularity = Literal["layer", "module", "tensor"]
Measure = Literal["spear", "swci", "svdr", "drift"]
MEASURES: tuple[Measure, ...] = ("spear", "swci", "svdr", "drift")

NO_NOISE = 1e-12
"""Share of a spectrum's energy that noise counts at least: low rank gives a large SNR, not an infinite one."""


# names


def block_depth(name: str) -> int | None:
    """Return how many dotted parts of a tensor's name lead to its block, or None outside the blocks.

    The first number names the block: ``model.layers.3.mlp.up_proj.weight`` (Llama), ``transformer.h.3.…`` (GPT-2) or
    ``gpt_neox.layers.3.…``.
    """
    for depth, part in enumerate(name.split("."), start=1):
        if part.isdecimal():
            return depth
    return None


def kind_of(name: str) -> str | None:
    """Return the module type, among which ranks are taken (``self_attn.q_proj.weight``); experts are of one type."""
    depth = block_depth(name)
    return None if depth is None else ".".join("*" if p.isdecimal() else p for p in name.split(".")[depth:])


def unit_of(name: str, granularity: Granularity) -> str | None:
    """Return the unit that owns a tensor: its block, the block's part (attention, feed-forward), or its own module."""
    depth, parts = block_depth(name), name.split(".")
    if depth is None:
        return None
    return ".".join(parts[: {"layer": depth, "module": depth + 1, "tensor": max(depth, len(parts) - 1)}[granularity]])


def sibling(name: str, block: int) -> str:
    """Return the name of the same tensor in another block."""
    depth, parts = block_depth(name), name.split(".")
    if depth is None:
        raise ConfigError(f"{name} is in no numbered block", mend="choose tensors of blocks")
    return ".".join([*parts[: depth - 1], str(block), *parts[depth:]])


def block_number(name: str) -> int | None:
    """Return which block a tensor is in, None outside the blocks."""
    depth = block_depth(name)
    return None if depth is None else int(name.split(".")[depth - 1])


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key under which block 10 comes after block 9."""
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in name.split("."))


# one spectrum


def aspect(shape: tuple[int, ...]) -> float:
    """Return the smaller side over the larger one."""
    return min(shape) / max(shape)


def mp_edge(singular: Array, shape: tuple[int, ...]) -> float:
    """Return the largest singular value that noise alone would have, ``sigma (1 + sqrt(beta))``.

    ``sigma = median(S) / mp_median(beta)``, noise of a matrix most of whose directions are noise (Gavish &
    Donoho 2014, arXiv 1305.5870, section on unknown noise), and the upper edge of the Marchenko-Pastur law.
    """
    beta = aspect(shape)
    return float(np.median(singular)) / mp_median(beta) * (1 + math.sqrt(beta))


def spectrum_edge(singular: Array, shape: tuple[int, ...]) -> float:
    """Return Spectrum's threshold, ``IQR/1.349 (1 + sqrt(beta))`` (Hartford et al. 2024, arXiv 2406.06623; its code).

    It is no edge of anything: of pure noise it calls 23 % (square) to 100 % (1:4) of the directions signal.
    """
    low, high = np.percentile(singular, [25, 75])
    return float(high - low) / 1.349 * (1 + math.sqrt(aspect(shape)))


def snr_calibrated(singular: Array, shape: tuple[int, ...]) -> float:
    """Return the energy above the edge of noise over the energy below it; about 0 for noise, whatever its scale."""
    energy = singular**2
    total = float(energy.sum())
    if total == 0:
        return 0.0
    above = singular > mp_edge(singular, shape)
    return float(energy[above].sum()) / max(float(energy[~above].sum()), NO_NOISE * total)


def snr_spectrum(singular: Array, shape: tuple[int, ...]) -> float:
    """Return Spectrum's own SNR, ``(sum above / sum below) / S_max``, for ranking within a module type only.

    As there, the sum below is 1.0 where nothing is below. Twice the matrix has half the SNR.
    """
    if not singular.size or singular[0] == 0:
        return 0.0
    above = singular > spectrum_edge(singular, shape)
    noise = float(singular[~above].sum()) if not above.all() else 1.0
    return float(singular[above].sum()) / noise / float(singular[0])


def n_directions(singular: Array, shape: tuple[int, ...]) -> int:
    """Return how many directions carry signal: those above the edge of noise, or else the effective rank.

    The effective rank is ``exp(entropy of S / sum S)`` (Roy & Vetterli 2007), rounded up; 0 of a matrix of zeros.
    """
    above = int((singular > mp_edge(singular, shape)).sum())
    total = float(singular.sum())
    if above or total == 0:
        return above
    share = singular[singular > 0] / total
    return min(len(singular), math.ceil(math.exp(-float((share * np.log(share)).sum()))))


def drop_ratio(before: Array, after: Array, n: int, *, size: bool = False) -> float:
    """Return SVDR, the share of the n largest singular values' sum that is gone.

    A sum that has grown is no drop and counts 0, unless ``size`` asks for the size of the change.
    """
    whole = float(before[:n].sum())
    change = 1 - float(after[:n].sum()) / whole if whole > 0 else 0.0
    return abs(change) if size else max(0.0, change)


def singular_values(matrix: torch.Tensor, *, exact: bool = False) -> Array:
    """Return singular values in descending order, float64, shape ``[min(d_out, d_in)]``.

    Roots of the eigenvalues of the smaller Gram matrix in float64: absolute error about 1e-8 of the largest one, where
    the thresholds here are above 1e-3 of it. ``exact``: by a decomposition, 1.1 (square) to 4 times (1:3) as long.
    """
    wide = matrix.detach().double()
    if not wide.numel():
        return np.zeros(0)
    if exact:
        found = torch.linalg.svdvals(wide)
    else:
        wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
        found = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt().flip(0)
    values: Array = found.cpu().numpy()
    return values


def flops_of(shape: tuple[int, ...]) -> float:
    """Return the FLOPs of ``singular_values``: the Gram matrix, and its reduction to tridiagonal form."""
    small, large = sorted(shape)
    return 2.0 * small * small * large + 4 / 3 * small**3


class Spectra:
    """Singular values that are computed once per content; the base's serve every merge with it.

    Args:
        file: keeps them (safetensors) between processes; ``save`` writes it.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.flops = file, 0.0
        self._known: dict[str, Array] = {}
        if file is not None and file.is_file():
            from safetensors import SafetensorError
            from safetensors.numpy import load_file

            try:
                self._known = load_file(file)
            except (SafetensorError, OSError):
                raise IntegrityError("the kept spectra are corrupted", where=file, mend="delete the file") from None

    def of(self, matrix: torch.Tensor, *, keep: bool = True) -> Array:
        """Return a matrix's singular values; ``flops`` counts what had to be computed."""
        key = content_key(matrix)
        found = self._known.get(key)
        if found is None:
            found = singular_values(matrix)
            self.flops += flops_of(tuple(matrix.shape))
            if keep:
                self._known[key] = found
        return found

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.file is not None:
            from safetensors.numpy import save_file

            with atomic_path(self.file) as temporary:
                save_file(self._known, temporary)


def content_key(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.data)
    return digest.hexdigest()


# tensors


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """What the spectra of a matrix before and after training say."""

    snr: float
    """Of the base's matrix: how much structure there was."""
    swci: float
    """SNR-weighted change intensity, ``snr * drift``."""
    svdr: float
    """Singular value drop ratio, see ``drop_ratio``."""
    n_directions: int


@dataclass(frozen=True, kw_only=True)
class TensorScore:
    """One tensor: how far it moved, and of a scored matrix its spectral scores."""

    name: str
    n_parameters: int
    norm: float
    """Frobenius norm of the base's tensor."""
    moved: float
    """Frobenius norm of the difference."""
    is_matrix: bool
    """Two dimensions and inside a block: it is ranked."""
    spectral: Spectral | None = None

    @property
    def drift(self) -> float:
        """Relative drift rho, ``||W1 - W0|| / ||W0||``; infinite where there was nothing before."""
        return 0.0 if self.moved == 0 else self.moved / self.norm if self.norm > 0 else math.inf

    def value(self, measure: Measure) -> float:
        """Return a score as it is, before ranks are taken (``spear`` is made of ranks and has none)."""
        if measure == "drift":
            return self.drift
        if self.spectral is None or measure == "spear":
            raise ConfigError(f"{self.name} has no {measure}", mend="score with spectra")
        return self.spectral.swci if measure == "swci" else self.spectral.svdr


@dataclass(kw_only=True)
class Scorer:
    """Scores pairs of tensors; holds the options and the base's spectra."""

    snr: Literal["calibrated", "spectrum"] = "calibrated"
    svdr: Literal["drop", "abs"] = "drop"
    spectral: bool = True
    """False: drift alone, which needs no spectra and costs next to nothing."""
    spectra: Spectra = field(default_factory=Spectra)

    def score(self, pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> list[TensorScore]:
        """Return the scores of (name, base's tensor, tuned tensor), one pair in memory at a time, in natural order.

        Tensors that are not floating point are left out.

        Raises:
            ConfigError: shapes differ.
            IntegrityError: values that are not finite.
        """
        found = [self._score(name, w0, w1) for name, w0, w1 in pairs if w0.is_floating_point()]
        return sorted(found, key=lambda score: natural(score.name))

    def _score(self, name: str, w0: torch.Tensor, w1: torch.Tensor) -> TensorScore:
        if w0.shape != w1.shape:
            raise ConfigError(
                f"shapes {tuple(w0.shape)} and {tuple(w1.shape)}", where=name, mend="merge like with like"
            )
        norm = float(w0.double().norm())
        moved = float((w1.double() - w0.double()).norm())
        if not (math.isfinite(norm) and math.isfinite(moved)):
            raise IntegrityError("holds values that are not finite", where=name, mend="use a checkpoint that is whole")
        is_matrix = w0.ndim == 2 and block_depth(name) is not None and w0.numel() > 0
        plain = TensorScore(name=name, n_parameters=w0.numel(), norm=norm, moved=moved, is_matrix=is_matrix)
        if not (is_matrix and self.spectral):
            return plain
        return TensorScore(**{**vars(plain), "spectral": self._spectral(w0, w1, plain.drift)})

    def _spectral(self, w0: torch.Tensor, w1: torch.Tensor, drift: float) -> Spectral:
        shape = tuple(w0.shape)
        before = self.spectra.of(w0)
        after = before if drift == 0 else self.spectra.of(w1, keep=False)
        snr = (snr_calibrated if self.snr == "calibrated" else snr_spectrum)(before, shape)
        n = n_directions(before, shape)
        svdr = drop_ratio(before, after, n, size=self.svdr == "abs")
        return Spectral(snr=snr, swci=snr * drift if snr > 0 else 0.0, svdr=svdr, n_directions=n)


# ranks


def ranks(values: Iterable[float]) -> Array:
    """Return ranks from 0 (smallest) to n - 1; equal values share the mean of their ranks."""
    from scipy.stats import rankdata

    found: Array = rankdata(np.fromiter(values, dtype=np.float64)) - 1
    return found


def normalised_ranks(scores: Iterable[TensorScore], measure: Measure, *, mix: float = 0.5) -> dict[str, float]:
    """Return matrix name -> its place among the matrices of its type, from 0 (lowest) to 1.

    ``spear`` is ``mix * rank(SWCI) + (1 - mix) * rank(SVDR)``. A type that occurs once has nothing to be compared with
    and gets 1/2, as do values that are all equal.
    """
    if measure == "spear":
        matrices = [score for score in scores if score.is_matrix]
        swci, svdr = normalised_ranks(matrices, "swci"), normalised_ranks(matrices, "svdr")
        return {name: mix * swci[name] + (1 - mix) * svdr[name] for name in swci}
    types: dict[str, list[TensorScore]] = {}
    for score in scores:
        if score.is_matrix:
            types.setdefault(kind_of(score.name) or "", []).append(score)
    found: dict[str, float] = {}
    for several in types.values():
        n = len(several)
        places = ranks(score.value(measure) for score in several) / (n - 1) if n > 1 else [0.5]
        found |= {score.name: float(place) for score, place in zip(several, places, strict=True)}
    return found


def unit_scores(ranked: Mapping[str, float], sizes: Mapping[str, int], granularity: Granularity) -> dict[str, float]:
    """Return unit -> the mean of its matrices' ranks, weighted by their numbers of parameters, in natural order.

    Args:
        ranked: matrix name -> rank.
        sizes: tensor name -> number of parameters.
        granularity: what a unit is.
    """
    parts: dict[str, list[tuple[float, int]]] = {}
    for name in sorted(ranked, key=natural):
        unit = unit_of(name, granularity)
        assert unit is not None
        parts.setdefault(unit, []).append((ranked[name], sizes[name]))
    return {unit: math.fsum(r * n for r, n in own) / sum(n for _, n in own) for unit, own in parts.items()}
