"""Scores of SPEAR-MM against known laws of random matrices, closed forms, and the invariances that define them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clbench.errors import ConfigError, IntegrityError
from clbench.merge import scores
from clbench.merge.kernels import hard_threshold, mp_median
from clbench.merge.scores import Granularity, Scorer, Spectra, TensorScore
from clbench.method import Weights

KINDS = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def low_rank(rows: int, columns: int, rank: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return gaussian(rows, rank, seed=seed) @ gaussian(rank, columns, seed=seed + 1) * scale


def model(n_layers: int = 4, seed: int = 0) -> Weights:
    """Blocks of structure plus noise, each with another amount of structure, and what stands outside the blocks."""
    weights = {"model.embed_tokens.weight": gaussian(20, 16, seed=seed).float()}
    for layer in range(n_layers):
        weights[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(16) + 0.01 * layer
        for place, kind in enumerate(KINDS):
            shape = {2: (48, 16), 3: (16, 48)}.get(place, (16, 16))
            at = seed + 100 * layer + 10 * place
            structure = low_rank(*shape, 2, seed=at, scale=0.5 + layer)
            weights[f"model.layers.{layer}.{kind}"] = (gaussian(*shape, seed=at + 5) + structure).float()
    return weights


def noisy(weights: Weights, scale: float = 0.05, seed: int = 7, only: str = "") -> Weights:
    return {
        name: w + scale * gaussian(*w.shape, seed=seed + n).to(w.dtype) if only in name else w.clone()
        for n, (name, w) in enumerate(weights.items())
    }


def pairs(w1: Weights, w0: Weights) -> Any:
    return ((name, w0[name], w1[name]) for name in w0)


def scored(w1: Weights, w0: Weights, **options: Any) -> list[TensorScore]:
    return Scorer(**options).score(pairs(w1, w0))


# --- names ---


@pytest.mark.parametrize(
    ("name", "kind", "units"),
    [
        (
            "model.layers.12.mlp.up_proj.weight",
            "mlp.up_proj.weight",
            ("model.layers.12", "model.layers.12.mlp", "model.layers.12.mlp.up_proj"),
        ),
        (
            "transformer.h.1.attn.c_attn.bias",
            "attn.c_attn.bias",
            ("transformer.h.1", "transformer.h.1.attn", "transformer.h.1.attn.c_attn"),
        ),
        (
            "gpt_neox.layers.0.attention.query_key_value.weight",
            "attention.query_key_value.weight",
            ("gpt_neox.layers.0", "gpt_neox.layers.0.attention", "gpt_neox.layers.0.attention.query_key_value"),
        ),
        (
            "model.layers.3.mlp.experts.7.w1.weight",
            "mlp.experts.*.w1.weight",
            ("model.layers.3", "model.layers.3.mlp", "model.layers.3.mlp.experts.7.w1"),
        ),
        ("model.layers.3.scale", "scale", ("model.layers.3", "model.layers.3.scale", "model.layers.3")),
        ("lm_head.weight", None, (None, None, None)),
        ("model.norm2.weight", None, (None, None, None)),
    ],
)
def test_layer_and_type_are_read_from_whole_parts_of_a_name(name: str, kind: str | None, units: Any) -> None:
    assert scores.kind_of(name) == kind
    levels: tuple[Granularity, ...] = ("layer", "module", "tensor")
    assert tuple(scores.unit_of(name, level) for level in levels) == units


def test_block_10_comes_after_block_9() -> None:
    names = [f"h.{i}.w" for i in range(12)]
    assert sorted(sorted(names), key=scores.natural) == names


# --- the law of noise ---


def test_median_of_the_law_of_noise() -> None:
    """Aspect 1 has the closed form t + sin t = pi/2; others from Gavish and Donoho's table of omega / mu (2014)."""
    low, high = 0.0, math.pi
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if t + math.sin(t) < math.pi / 2 else (low, t)
    assert mp_median(1.0) ** 2 == pytest.approx(2 - 2 * math.cos(t), abs=2e-5)
    for beta, known in {0.05: 1.5194, 0.1: 1.6089, 0.5: 2.1711, 1.0: 2.8582}.items():
        assert hard_threshold(beta) / mp_median(beta) == pytest.approx(known, abs=2e-4)


@pytest.mark.parametrize("shape", [(256, 256), (128, 256), (256, 64), (64, 512)])
@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_noise_has_no_signal_and_rank_8_is_found(shape: tuple[int, int], scale: float) -> None:
    noise = gaussian(*shape, seed=3)
    spectrum = scores.singular_values(noise * scale)
    assert int((spectrum > scores.mp_edge(spectrum, shape)).sum()) <= 1
    assert scores.snr_calibrated(spectrum, shape) < 0.05
    assert scores.mp_edge(spectrum, shape) == pytest.approx(
        scale * (math.sqrt(shape[0]) + math.sqrt(shape[1])), rel=0.03
    )
    both = scores.singular_values((noise + low_rank(*shape, 8, seed=9)) * scale)
    # The rank is small against the sides, or the median itself would move.
    assert scores.n_directions(both, shape) == 8
    assert scores.snr_calibrated(both, shape) > 1


def test_the_literal_formula_calls_noise_signal() -> None:
    """Why it is no default: from about 23 % of a square matrix of noise up to all of one that is 1:4 and thinner."""
    shares = {}
    for shape in ((512, 512), (128, 512)):
        spectrum = scores.singular_values(gaussian(*shape, seed=1))
        shares[shape] = float((spectrum > scores.spectrum_edge(spectrum, shape)).mean())
    assert shares[512, 512] == pytest.approx(0.23, abs=0.06) and shares[128, 512] == 1


def test_literal_formula_by_hand_and_its_jump() -> None:
    spectrum = np.array([10.0, 4.0, 3.0, 2.0, 1.0])
    edge = (4 - 2) / 1.349 * 2  # 2.965
    assert scores.spectrum_edge(spectrum, (5, 5)) == pytest.approx(edge)
    assert scores.snr_spectrum(spectrum, (5, 5)) == pytest.approx((10 + 4 + 3) / (2 + 1) / 10)
    assert scores.snr_spectrum(2 * spectrum, (5, 5)) == pytest.approx(0.5 * 17 / 3 / 10)
    assert scores.snr_spectrum(np.full(5, 3.0), (5, 5)) == pytest.approx(15 / 1 / 3)  # nothing below: noise is 1.0
    assert scores.snr_spectrum(np.zeros(5), (5, 5)) == 0


def test_singular_values_of_the_gram_matrix_are_those_of_the_matrix() -> None:
    for matrix in (gaussian(40, 70), gaussian(70, 40).float(), low_rank(50, 60, 3)):
        found, exact = scores.singular_values(matrix), scores.singular_values(matrix, exact=True)
        assert (np.diff(found) <= 0).all() and found.shape == (min(matrix.shape),)
        assert np.abs(found - exact).max() < 1e-7 * exact[0]
    assert np.allclose(scores.singular_values(torch.diag(torch.tensor([3.0, 0.0, 5.0]))), [5, 3, 0])


def test_scores_do_not_care_for_transposition() -> None:
    """GPT-2 keeps its matrices the other way round."""
    w0, w1 = gaussian(20, 50), gaussian(20, 50, seed=1)
    one, other = (
        Scorer().score([("h.0.c.weight", *both)])[0] for both in ((w0, w1), (w0.T.contiguous(), w1.T.contiguous()))
    )
    assert one.spectral is not None and other.spectral is not None
    assert one.spectral.swci == pytest.approx(other.spectral.swci) and one.spectral.svdr == other.spectral.svdr


# --- one tensor ---


def test_drop_ratio() -> None:
    before, after = np.array([4.0, 2.0, 1.0]), np.array([3.0, 1.5, 9.0])
    assert scores.drop_ratio(before, after, 2) == pytest.approx(1 - 4.5 / 6)
    assert scores.drop_ratio(after, before, 2) == 0
    assert scores.drop_ratio(after, before, 2, size=True) == pytest.approx(6 / 4.5 - 1)
    assert scores.drop_ratio(np.zeros(3), after, 2) == 0


def test_scores_of_a_diagonal_matrix_by_hand() -> None:
    """Two directions far above eight equal ones; training halves the first: drift, SWCI and SVDR in closed form."""
    diagonal = torch.tensor([100.0, 50.0, *[1.0] * 8], dtype=torch.float64)
    w0 = torch.diag(diagonal)
    w1 = w0.clone()
    w1[0, 0] = 40.0
    (score,) = Scorer().score([("layers.0.w", w0, w1)])
    assert score.spectral is not None
    drift, snr = 60 / math.sqrt(12508), 12500 / 8
    assert score.drift == pytest.approx(drift) and score.spectral.n_directions == 2
    assert score.spectral.snr == pytest.approx(snr) and score.spectral.swci == pytest.approx(snr * drift)
    assert score.spectral.svdr == pytest.approx(1 - 90 / 150)


def test_effective_rank_where_nothing_is_above_the_edge() -> None:
    assert scores.n_directions(np.ones(6), (6, 6)) == 6  # exp(log 6), and no value above 2.3
    assert scores.n_directions(np.zeros(6), (6, 6)) == 0


def test_low_rank_and_empty_matrices_have_finite_scores() -> None:
    zero = torch.zeros(8, 8)
    for w0 in (low_rank(30, 30, 2), zero):
        (score,) = Scorer().score([("layers.0.w", w0, w0 + torch.eye(len(w0)))])
        assert score.spectral is not None and math.isfinite(score.spectral.swci)
    assert score.drift == math.inf and score.spectral.snr == 0 == score.spectral.swci


def test_what_cannot_be_scored_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.w"):
        Scorer().score([("layers.0.w", torch.zeros(2, 3), torch.zeros(3, 2))])
    with pytest.raises(IntegrityError, match=r"layers\.0\.w"):
        Scorer().score([("layers.0.w", torch.zeros(2, 3), torch.full((2, 3), math.nan))])
    assert Scorer().score([("layers.0.mask", torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2))]) == []


# --- invariances of a whole model ---


def test_an_unchanged_model_scores_zero() -> None:
    found = scored(model(), model())
    assert all(score.moved == 0 == score.drift for score in found)
    assert all(s.spectral.swci == 0 == s.spectral.svdr for s in found if s.spectral is not None)
    assert set(scores.normalised_ranks(found, "spear").values()) == {0.5}


@pytest.mark.parametrize("options", [{}, {"svdr": "abs"}])
def test_scaling_both_models_changes_no_score(options: dict[str, Any]) -> None:
    w0, w1 = model(), noisy(model())
    for factor in (1 / 1024, 64.0):
        larger = scored({k: w * factor for k, w in w1.items()}, {k: w * factor for k, w in w0.items()}, **options)
        for one, other in zip(scored(w1, w0, **options), larger, strict=True):
            assert one.drift == pytest.approx(other.drift)
            if one.spectral is not None and other.spectral is not None:
                assert one.spectral.swci == pytest.approx(other.spectral.swci, rel=1e-6)
                assert one.spectral.svdr == pytest.approx(other.spectral.svdr, rel=1e-6, abs=1e-12)


def test_order_of_tensors_changes_nothing() -> None:
    w0, w1 = model(), noisy(model())
    backwards = Scorer().score((name, w0[name], w1[name]) for name in reversed(list(w0)))
    assert backwards == scored(w1, w0)


@pytest.mark.parametrize("measure", scores.MEASURES)
def test_shuffled_blocks_have_shuffled_scores(measure: scores.Measure) -> None:
    w0, w1, to = model(5), noisy(model(5)), {0: 3, 1: 0, 2: 4, 3: 1, 4: 2}

    def shuffled(weights: Weights) -> Weights:
        parts = {name: name.split(".") for name in weights}
        return {
            ".".join([*p[:2], str(to[int(p[2])]), *p[3:]]) if p[1] == "layers" else name: weights[name]
            for name, p in parts.items()
        }

    plain, moved = (units_of(a, b, measure) for a, b in ((w1, w0), (shuffled(w1), shuffled(w0))))
    for old, new in to.items():
        assert moved[f"model.layers.{new}"] == pytest.approx(plain[f"model.layers.{old}"])
    assert len(set(plain.values())) > 1


def units_of(w1: Weights, w0: Weights, measure: scores.Measure, granularity: Granularity = "layer") -> dict[str, float]:
    found = scored(w1, w0)
    sizes = {score.name: score.n_parameters for score in found}
    return scores.unit_scores(scores.normalised_ranks(found, measure), sizes, granularity)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_noise_in_one_block_alone_puts_it_on_top_by_drift(block: int) -> None:
    w0 = model()
    found = units_of(noisy(w0, only=f"layers.{block}."), w0, "drift")
    assert max(found, key=lambda unit: found[unit]) == f"model.layers.{block}"
    assert found[f"model.layers.{block}"] == 1


def test_ranks_are_within_a_type_and_share_ties() -> None:
    assert scores.ranks([5.0, 1.0, 5.0, 0.0]).tolist() == [2.5, 1, 2.5, 0]
    found = [
        TensorScore(name=name, n_parameters=4, norm=1.0, moved=moved, is_matrix=True)
        for name, moved in {
            "l.0.a": 100.0,
            "l.1.a": 300.0,
            "l.2.a": 200.0,
            "l.0.b": 2.0,
            "l.1.b": 1.0,
            "l.0.c": 9.0,
        }.items()
    ]
    ranked = scores.normalised_ranks(found, "drift")
    assert ranked == {"l.0.a": 0, "l.1.a": 1, "l.2.a": 0.5, "l.0.b": 1, "l.1.b": 0, "l.0.c": 0.5}


def test_spear_mixes_the_ranks_of_its_two_parts() -> None:
    found = scored(noisy(model()), model(), svdr="abs")
    swci, svdr = (scores.normalised_ranks(found, m) for m in ("swci", "svdr"))  # type: ignore[arg-type]
    assert swci != svdr
    mixed = scores.normalised_ranks(found, "spear", mix=0.25)
    assert mixed == {name: pytest.approx(0.25 * swci[name] + 0.75 * svdr[name]) for name in swci}


def test_layer_scores_are_weighted_by_parameters() -> None:
    ranked, sizes = {"l.0.a.w": 1.0, "l.0.b.w": 0.0, "l.1.a.w": 0.5}, {"l.0.a.w": 30, "l.0.b.w": 10, "l.1.a.w": 7}
    assert scores.unit_scores(ranked, sizes, "layer") == {"l.0": 0.75, "l.1": 0.5}
    assert scores.unit_scores(ranked, sizes, "module") == {"l.0.a": 1.0, "l.0.b": 0.0, "l.1.a": 0.5}


# --- spectra that are kept ---


def test_kept_spectra_are_found_by_content_and_a_changed_matrix_is_not(tmp_path: Path) -> None:
    file, w0, w1 = tmp_path / "spectra.safetensors", model(), noisy(model())
    first = Spectra(file)
    expected = scored(w1, w0, spectra=first)
    first.save()
    again = Spectra(file)
    assert scored(w1, w0, spectra=again) == expected
    # Only the tuned matrices were computed, and only the base's are kept.
    assert again.flops == pytest.approx(first.flops / 2) and again.flops > 0
    changed = {name: w + 1e-3 for name, w in w0.items()}
    assert scored(w1, changed, spectra=again) == scored(w1, changed)
    file.write_bytes(b"not a file")
    with pytest.raises(IntegrityError, match="delete"):
        Spectra(file)


def test_drift_alone_needs_no_spectra() -> None:
    spectra = Spectra()
    found = scored(noisy(model()), model(), spectral=False, spectra=spectra)
    assert spectra.flops == 0 and all(score.spectral is None for score in found)
    assert scores.normalised_ranks(found, "drift")
    with pytest.raises(ConfigError, match="spectra"):
        scores.normalised_ranks(found, "swci")
