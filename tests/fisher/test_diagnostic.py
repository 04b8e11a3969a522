"""How rank-1 a Fisher is: closed forms, brute force on small P, and noise that has to look like noise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from clbench.errors import ConfigError
from clbench.fisher import diagnostic, gram
from clbench.fisher.diagnostic import Report, SampleBatch, cell_of, diagnose
from clbench.fisher.gram import Gram, Quantity, measure
from clbench.fisher.samples import Grouping, of_stream, of_text
from clbench.stream import Stream
from clbench.train.data import IGNORE

Floats = NDArray[np.float64]
GENERATOR = np.random.default_rng


def approx(one: float | None, **tolerance: float) -> Any:
    """pytest's, for figures that may be undefined."""
    return one if one is None else pytest.approx(one, **tolerance)


def gram_of(g_NP: Floats, **along: Floats) -> Gram:
    """The Gram of gradients that are at hand, with the sums that it does not hold."""
    diagonal = float((np.mean(g_NP**2, axis=0) ** 2).sum()), float((g_NP**4).sum())
    directions = {name: (g_NP @ d, float(d @ d)) for name, d in along.items()}
    return Gram(g_NP @ g_NP.T, g_NP.shape[1], diagonal, directions)


def value(found: dict[str, Quantity], name: str) -> float:
    one = found[name].value
    assert one is not None, name
    return one


# closed forms


def test_collinear_gradients_are_perfect_in_every_figure() -> None:
    c_N = GENERATOR(0).gamma(2.0, size=200)
    v_P = GENERATOR(1).normal(size=50)
    found = measure(gram_of(np.outer(c_N, v_P), theta=v_P))
    ratio = float(np.mean(c_N**2) / np.mean(c_N) ** 2)
    for name in ("top_share", "effective_rank", "mean_abs_cos", "alignment", "split_half", "cos_theta"):
        if name != "effective_rank":
            assert value(found, name) == pytest.approx(1, abs=1e-9), name
    for name in ("eigen_ratio", "rank1_error_plugin", "best_rank1_error_plugin"):
        assert value(found, name) == pytest.approx(0, abs=1e-7), name
    assert value(found, "c_star_plugin") == pytest.approx(ratio)
    assert value(found, "kappa_plugin") == pytest.approx(1 / ratio)
    assert value(found, "rho_plugin") == pytest.approx(value(found, "trace"))
    assert value(found, "captured") == pytest.approx(1, abs=1e-6)  # u is the same whatever the half
    assert value(found, "effective_rank") == pytest.approx(1, rel=0.02)  # unbiased over the 200 samples
    assert value(found, "c_star_unbiased") == pytest.approx(ratio, rel=0.02)


def test_isotropic_noise_hits_the_floors() -> None:
    n, p = 128, 4000
    found = measure(gram_of(GENERATOR(2).normal(size=(n, p))))
    assert abs(value(found, "kappa")) < 3 * math.sqrt(2 / p) / n
    assert value(found, "kappa_plugin") == pytest.approx(1 / n, rel=0.1)
    assert found["top_share"].floor == pytest.approx((1 + math.sqrt(n / p)) ** 2 / n)
    assert value(found, "top_share") == pytest.approx(found["top_share"].floor, rel=0.05)
    assert value(found, "eigen_ratio") > 0.95
    assert value(found, "effective_rank") == pytest.approx(p, rel=0.1)
    assert value(found, "mean_abs_cos") == pytest.approx(found["mean_abs_cos"].floor, rel=0.3)
    for name in ("rank1_error_plugin", "best_rank1_error_plugin", "diagonal_error_plugin"):
        assert value(found, name) == pytest.approx(found[name].floor, abs=0.01), name
    assert value(found, "rank1_error") > 0.999
    assert value(found, "diagonal_error_plugin") > 0.98  # and yet F is the identity, as the unbiased error sees
    assert value(found, "diagonal_error") < 0.3
    assert value(found, "c_star_plugin") == pytest.approx(1, abs=0.1)  # looks like evidence and is none
    assert value(found, "c_star") == pytest.approx(n / 2 / p, rel=0.2)
    assert found["c_star"].floor == pytest.approx(n / 2 / p, rel=0.1)


def test_a_known_spectrum_and_mean_are_found() -> None:
    """g = mu + sqrt(lambda) z: F = mu mu^T + diag(lambda), so every population figure is known."""
    n, p = 700, 40
    lambdas, mu = np.linspace(0.2, 2.0, p), np.zeros(p)
    mu[3] = 3.0
    found = measure(gram_of(mu + GENERATOR(3).normal(size=(n, p)) * np.sqrt(lambdas)))
    f = np.outer(mu, mu) + np.diag(lambdas)
    trace, norm2 = np.trace(f), float((f**2).sum())
    kappa = 9 / trace
    assert value(found, "kappa") == pytest.approx(kappa, rel=0.05)
    assert value(found, "noise_scale") == pytest.approx(lambdas.sum() / 9, rel=0.05)
    assert value(found, "trace") == pytest.approx(trace, rel=0.05)
    assert value(found, "top_share") == pytest.approx((9 + lambdas[3]) / trace, rel=0.05)
    assert value(found, "effective_rank") == pytest.approx(trace**2 / norm2, rel=0.05)
    c_star = 1 + lambdas[3] / 9
    assert value(found, "c_star_unbiased") == pytest.approx(c_star, rel=0.02)
    assert value(found, "c_star") == pytest.approx(c_star, rel=0.1)
    error = math.sqrt(1 - (9 + lambdas[3]) ** 2 / norm2)
    assert value(found, "rank1_error_unbiased") == pytest.approx(error, rel=0.05)
    assert value(found, "rank1_error") == pytest.approx(error, rel=0.1)
    assert value(found, "best_rank1_error") == pytest.approx(error, rel=0.1)
    assert value(found, "diagonal_error") < 0.15  # F is diagonal
    assert value(found, "alignment") > 0.99


def test_figures_are_those_of_the_fisher_itself() -> None:
    """The identities of notes 1.7, against F written out."""
    n, p = 60, 25
    g = GENERATOR(4).normal(size=(n, p)) * np.linspace(0.1, 2, p) + 0.3
    found = measure(gram_of(g, theta=np.arange(p, dtype=float)))
    f, mu = g.T @ g / n, g.mean(axis=0)
    norm = np.linalg.norm(f)
    c_star = mu @ f @ mu / (mu @ mu) ** 2

    def error(approximation: Floats) -> float:
        return float(np.linalg.norm(f - approximation) / norm)

    values, vectors = np.linalg.eigh(f)
    best = values[-1] * np.outer(vectors[:, -1], vectors[:, -1])
    expected = {
        "c_star_plugin": c_star,
        "rho_plugin": mu @ f @ mu / (mu @ mu),
        "trace": np.trace(f),
        "rank1_error_plugin": error(c_star * np.outer(mu, mu)),
        "best_rank1_error_plugin": error(best),
        "diagonal_error_plugin": error(np.diag(np.diag(f))),
        "top_share": values[-1] / np.trace(f),
        "eigen_ratio": values[-2] / values[-1],
        "alignment": abs(mu @ vectors[:, -1]) / np.linalg.norm(mu),
        "cos_theta": mu @ np.arange(p) / np.linalg.norm(mu) / np.linalg.norm(np.arange(p)),
    }
    for name, one in expected.items():
        assert value(found, name) == pytest.approx(float(one), abs=1e-9), name
    others = [(g.sum(axis=0) - one) / (n - 1) for one in g]
    cosines = [abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(g, others, strict=True)]
    assert value(found, "mean_abs_cos") == pytest.approx(float(np.mean(cosines)), abs=1e-9)
    for scale in (0.9 * c_star, 1.1 * c_star):  # c* is the best scale along mu
        assert error(scale * np.outer(mu, mu)) > value(found, "rank1_error_plugin")


def test_cross_fitted_figures_are_those_of_two_halves() -> None:
    n, p = 40, 12
    g = GENERATOR(5).normal(size=(n, p)) + 0.4
    found = measure(gram_of(g), seed=7)
    cosines, c_stars, rhos = [], [], []
    for half in gram._halves(n, 7):
        for a in (half, ~half):
            mu, q = g[a].mean(axis=0), g[~a] @ g[a].mean(axis=0)
            rhos.append(np.mean(q**2) / (mu @ mu))
            c_stars.append(rhos[-1] / (mu @ mu))
        other = g[~half].mean(axis=0)
        cosines.append(mu @ g[half].mean(axis=0) / np.linalg.norm(mu) / np.linalg.norm(g[half].mean(axis=0)))
        assert np.array_equal(mu, other)
    assert value(found, "split_half") == pytest.approx(np.mean(cosines), abs=1e-9)
    assert value(found, "c_star") == pytest.approx(np.mean(c_stars), abs=1e-9)
    assert value(found, "rho") == pytest.approx(np.mean(rhos), abs=1e-9)
    assert all(half.sum() == n // 2 for half in gram._halves(n, 7))


def test_unbiased_figures_are_means_over_distinct_samples() -> None:
    n, p = 9, 4
    g = GENERATOR(6).normal(size=(n, p)) + 1.0
    k = g @ g.T
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    triples = [(i, j, m) for i, j in pairs for m in range(n) if m not in (i, j)]
    mu2, mu_f_mu = np.mean([k[i, j] for i, j in pairs]), np.mean([k[i, m] * k[j, m] for i, j, m in triples])
    f2 = np.mean([k[i, j] ** 2 for i, j in pairs])
    diagonal = np.mean([(g[i] ** 2) @ (g[j] ** 2) for i, j in pairs])
    found = measure(gram_of(g))
    assert value(found, "kappa") == pytest.approx(mu2 / np.mean(np.diag(k)), abs=1e-9)
    assert value(found, "c_star_unbiased") == pytest.approx(mu_f_mu / mu2**2, abs=1e-9)
    assert value(found, "diagonal_error") == pytest.approx(math.sqrt(max(0.0, 1 - diagonal / f2)), abs=1e-9)
    assert value(found, "effective_rank") == pytest.approx(np.mean(np.diag(k)) ** 2 / f2, abs=1e-9)


# the null


def test_random_signs_leave_the_fisher_and_make_the_mean_noise() -> None:
    g = GENERATOR(8).normal(size=(80, 300)) * np.linspace(0.2, 3, 300) + 0.5
    signs = np.where(GENERATOR(10).random(80) < 0.5, -1.0, 1.0)[:, None]
    real, flipped = measure(gram_of(g)), measure(gram_of(g * signs))
    for name in ("trace", "top_share", "eigen_ratio", "effective_rank", "diagonal_error", "best_rank1_error_plugin"):
        assert value(real, name) == pytest.approx(value(flipped, name), rel=1e-9), name
    for name in ("kappa", "split_half", "mean_abs_cos", "captured"):
        assert real[name].p == pytest.approx(1 / 61)
        bound, p = real[name].null_bound, flipped[name].p
        assert bound is not None and p is not None
        assert value(flipped, name) < bound < value(real, name)
        assert p > gram.ALPHA


def test_the_null_is_calibrated() -> None:
    """Without a mean, p is uniform: it is at most 0.05 about one time in twenty."""
    low: dict[str, int] = {}
    n_trials = 30
    for trial in range(n_trials):
        g = GENERATOR(100 + trial).normal(size=(24, 200)) * np.linspace(0.1, 2, 200)
        found = measure(gram_of(g, theta=np.ones(200)), seed=trial)
        for name in ("kappa", "split_half", "mean_abs_cos", "alignment", "cos_theta"):
            p = found[name].p
            assert p is not None
            low[name] = low.get(name, 0) + (p <= 0.1)
    assert all(0 < count <= 9 for count in low.values()), low  # 3 expected, standard deviation 2


# models


class Softmax(nn.Module):
    """Softmax regression whose "tokens" choose rows of features: one position, one target."""

    def __init__(self, x_NF: torch.Tensor, n_classes: int) -> None:
        super().__init__()
        self.x_NF = x_NF
        self.linear = nn.Linear(x_NF.shape[1], n_classes, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.linear(self.x_NF[input_ids]))


def softmax_problem(weight_decay: float) -> tuple[Softmax, list[SampleBatch], Floats]:
    """Features, labels of a noisy teacher, and the weights at the regularised optimum; gradients by hand."""
    torch.manual_seed(0)
    n, n_features, n_classes = 600, 10, 5
    x_NF = torch.randn(n, n_features, dtype=torch.float64)
    y_N = torch.distributions.Categorical(
        logits=x_NF @ torch.randn(n_features, n_classes, dtype=torch.float64)
    ).sample()
    model = Softmax(x_NF, n_classes).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.linear(x_NF), y_N)
        loss = loss + weight_decay / 2 * model.linear.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    model.zero_grad()
    with torch.no_grad():
        wrong_NC = model.linear(x_NF).softmax(1) - nn.functional.one_hot(y_N, n_classes)
    g_NP = torch.einsum("nc,nf->ncf", wrong_NC, x_NF).flatten(1).numpy()
    batches = [SampleBatch(i[:, None], y_N[i][:, None]) for i in torch.arange(n).split(100)]
    return model, batches, g_NP


@pytest.fixture(scope="module")
def decayed() -> tuple[Report, Floats, Floats]:
    model, batches, g_NP = softmax_problem(1e-2)
    theta = model.linear.weight.detach().flatten().numpy().copy()
    return diagnose(model, batches), g_NP, theta


def test_softmax_regression_says_do_not_change_the_norm(decayed: tuple[Report, Floats, Floats]) -> None:
    """Notes 0.3: at the optimum with decay mu = -wd theta, and rank 1 is worth nothing; the diagonal is."""
    report, g_NP, theta = decayed
    assert g_NP.mean(axis=0) == pytest.approx(-1e-2 * theta, abs=1e-6)
    assert report.all.value("cos_minus_theta") == pytest.approx(1, abs=1e-4)
    along, diagonal = report.all.value("rank1_error_plugin"), report.all.value("diagonal_error_plugin")
    assert along is not None and diagonal is not None
    assert along > 0.95 > 0.7 > diagonal
    assert report.verdict().startswith("the Fisher here is not rank-1")


def test_a_model_gives_what_its_gradients_by_hand_give(decayed: tuple[Report, Floats, Floats]) -> None:
    report, g_NP, theta = decayed
    by_hand = measure(gram_of(g_NP, minus_theta=-theta))
    assert report.n_samples == 600
    for name, one in by_hand.items():
        found = report.all.quantities[name]
        assert found.value == approx(one.value, rel=1e-3, abs=1e-6), name
        assert found.floor == approx(one.floor, rel=1e-3), name
        assert found.null_bound == approx(one.null_bound, rel=1e-3, abs=1e-6), name


def test_without_decay_the_mean_is_not_defined_at_the_optimum() -> None:
    model, batches, _ = softmax_problem(0.0)
    report = diagnose(model, batches)
    kappa = report.all.value("kappa_plugin")
    assert kappa is not None and kappa < 1e-9
    assert report.all.mean_is_noise
    assert "the mean gradient is noise" in report.verdict()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


def rows(n: int, length: int = 12) -> list[SampleBatch]:
    tokens = torch.randint(60, (n, length + 1), generator=torch.Generator().manual_seed(1))
    return [SampleBatch(part[:, :-1], part[:, 1:]) for part in tokens.split(8)]


def test_blocks_add_up_and_have_their_own_gradients(llama: nn.Module) -> None:
    report = diagnose(llama, rows(32))
    blocks = {block.name: block for block in report.blocks}
    assert list(blocks) == ["all", "embedding", "attention", "mlp", "norms", "layer 0", "layer 1"]
    total = sum(p.numel() for p in llama.parameters())
    assert blocks["all"].n_parameters == total == sum(blocks[k].n_parameters for k in list(blocks)[1:5])
    traces = {name: block.value("trace") or 0.0 for name, block in blocks.items()}
    assert traces["all"] == pytest.approx(sum(traces[k] for k in ("embedding", "attention", "mlp", "norms")))
    batch = rows(32)[0]
    g_NP = []
    for part in rows(32):
        for inputs, targets in zip(part.inputs_BT, part.targets_BT, strict=True):
            loss = nn.functional.cross_entropy(llama(input_ids=inputs[None]).logits[0], targets)
            parameters = [p for name, p in llama.named_parameters() if ".layers.1." in name]
            g_NP.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double().numpy())
    by_hand = measure(gram_of(np.stack(g_NP)))
    for name in ("kappa", "rank1_error_plugin", "diagonal_error", "split_half", "c_star", "top_share"):
        assert blocks["layer 1"].value(name) == pytest.approx(value(by_hand, name), rel=1e-3, abs=1e-5), name
    assert batch.inputs_BT.shape == (8, 12)
    assert llama.training and all(p.grad is None for p in llama.parameters())


def test_several_passes_are_one_pass(llama: nn.Module) -> None:
    once = diagnose(llama, rows(24), projection=None)
    assert len(diagnostic._slices({"a": 5, "b": 4, "c": 1}, 3)) == 4
    in_passes = diagnose(llama, rows(24), projection=None, memory_bytes=4 * 24 * 1500)
    for a, b in zip(once.blocks, in_passes.blocks, strict=True):
        for name in a.quantities:
            assert a.value(name) == approx(b.value(name), rel=1e-5, abs=1e-7), (a.name, name)


def test_a_sketch_is_within_its_error(llama: nn.Module) -> None:
    exact, sketched = diagnose(llama, rows(64)), diagnose(llama, rows(64), projection=512)
    assert exact.gram_error == 0
    assert sketched.gram_error == pytest.approx(512**-0.5)
    a, b = exact.all, sketched.all
    assert a.value("trace") == pytest.approx(b.value("trace"), rel=1e-5)
    assert a.value("kappa") == pytest.approx(b.value("kappa"), abs=512**-0.5)
    assert a.value("effective_rank") == pytest.approx(b.value("effective_rank"), rel=0.35)  # 1 / 680 beside 1 / 512
    for name in ("rank1_error", "diagonal_error", "alignment", "split_half"):
        assert a.value(name) == pytest.approx(b.value(name), abs=0.15), name
    again = diagnose(llama, rows(64), projection=512)
    assert again.as_dict() == sketched.as_dict()
    assert diagnose(llama, rows(64), projection=512, seed=1).all.value("kappa") != b.value("kappa")


def test_sketched_inner_products_are_unbiased_with_the_stated_error() -> None:
    x, y = GENERATOR(11).normal(size=(2, 3000))
    errors = []
    for seed in range(120):
        bins, signs = diagnostic.sketch_of(3000, 256, seed, "w")
        sketch = torch.zeros(2, 256, dtype=torch.float64)
        sketch.index_add_(1, bins, torch.from_numpy(np.stack([x, y])) * signs)
        errors.append(float(sketch[0] @ sketch[1]) - x @ y)
    stated = np.linalg.norm(x) * np.linalg.norm(y) / 16
    assert abs(np.mean(errors)) < 4 * stated / math.sqrt(120)
    assert np.std(errors) == pytest.approx(stated, rel=0.2)


def test_samples_of_several_rows_have_the_mean_gradient_of_their_tokens(llama: nn.Module) -> None:
    tokens = np.random.default_rng(3).integers(0, 60, 4000).astype(np.uint16)
    whole = of_text(tokens, n=20, length=12, grouping=Grouping("sequence"), seed=0)
    (first, *_) = list(whole())
    k = int((first.targets_BT[0] != IGNORE).sum())
    assert k == 12 and first.weights_SB is None
    merged = [
        SampleBatch(b.inputs_BT, b.targets_BT, torch.kron(torch.eye(len(b.inputs_BT) // 2), torch.full((1, 2), 0.5)))
        for b in rows(64)
    ]
    report = diagnose(llama, merged)
    assert report.n_samples == 32
    g = []
    for b in rows(64):
        for i in range(0, len(b.inputs_BT), 2):
            logits = llama(input_ids=b.inputs_BT[i : i + 2]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), b.targets_BT[i : i + 2].flatten())
            parts = torch.autograd.grad(loss, list(llama.parameters()))
            g.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    assert report.all.value("c_star") == pytest.approx(value(measure(gram_of(np.stack(g))), "c_star"), rel=1e-3)


def test_adams_moments_give_the_second_cosine(llama: nn.Module) -> None:
    moments = {name: torch.ones_like(p) * 4 for name, p in llama.named_parameters()}
    found = diagnose(llama, rows(16), second_moments=moments).all
    assert found.value("cos_minus_sqrt_v_theta") == pytest.approx(found.value("cos_minus_theta"), abs=1e-6)


def test_reports_survive_json(llama: nn.Module) -> None:
    import json

    report = diagnose(llama, rows(16), about={"name": "x"})
    assert Report.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False))) == report


def test_what_cannot_be_measured_is_refused(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="8 samples are too few"):
        diagnose(llama, rows(8))
    with pytest.raises(ConfigError, match="keeps nothing"):
        diagnose(llama, rows(16), projection=3)
    empty = [SampleBatch(b.inputs_BT, torch.full_like(b.targets_BT, IGNORE)) for b in rows(16)]
    with pytest.raises(ConfigError, match="no sample has a gradient"):
        diagnose(llama, empty)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("model.embed_tokens.weight", ("embedding", None)),
        ("model.layers.12.self_attn.q_proj.weight", ("attention", "layer 12")),
        ("model.layers.0.post_attention_layernorm.weight", ("norms", "layer 0")),
        ("model.layers.3.mlp.down_proj.weight", ("mlp", "layer 3")),
        ("model.norm.weight", ("norms", None)),
        ("lm_head.weight", ("head", None)),
        ("transformer.h.1.ln_1.weight", ("norms", "layer 1")),
        ("transformer.h.1.attn.c_attn.weight", ("attention", "layer 1")),
        ("transformer.wte.weight", ("embedding", None)),
        ("linear.weight", ("other", None)),
    ],
)
def test_blocks_are_known_by_name(name: str, cell: tuple[str, str | None]) -> None:
    assert cell_of(name) == cell


# samples


def test_groupings_of_a_stream(tinydocs: Stream) -> None:
    tokens, offsets = tinydocs.tokens("train", 1), tinydocs.offsets("train", 1)

    def samples(grouping: str, **more: Any) -> Any:
        return of_stream(tinydocs, 1, n=16, length=32, grouping=Grouping.parse(grouping), seed=0, **more)

    for batch in samples("sequence")():
        assert (batch.inputs_BT[:, 1:] == batch.targets_BT[:, :-1]).all()
    blocks = list(samples("8")())
    assert all(((b.targets_BT != IGNORE).sum(1) == 8).all() for b in blocks)
    assert len({int((b.targets_BT[i] != IGNORE).int().argmax()) for b in blocks for i in range(len(b.targets_BT))}) > 1
    documents = samples("document")
    assert len(documents) == 16
    for starts, k in zip(documents.starts, documents.n_targets, strict=True):
        place = int(np.searchsorted(offsets, starts[0], side="right")) - 1
        assert starts[0] == offsets[place]
        assert k.sum() == min(int(offsets[place + 1] - offsets[place]) - 1, 8 * 32)
    for batch in documents():
        if batch.weights_SB is not None:
            assert batch.weights_SB.sum(1).numpy() == pytest.approx(1)
    assert len(tokens) > 0


def test_held_in_rows_are_those_that_the_run_drew(tinydocs: Stream) -> None:
    from clbench.train.data import DataOrder

    order = DataOrder(tinydocs, {2: 1.0}, n_tokens=700, length=32, batch_rows=4, seed=5, stage=2)
    drawn = {int(start) for start in order.start}
    for seed in range(3):
        chosen = of_stream(
            tinydocs, 2, n=20, length=32, grouping=Grouping("sequence"), seed=seed, run_seed=5, n_drawn_tokens=700
        )
        assert {int(starts[0]) for starts in chosen.starts} <= drawn
    with pytest.raises(ConfigError, match="samples by sequence, 30 wanted"):
        of_stream(tinydocs, 2, n=30, length=32, grouping=Grouping("sequence"), seed=0, run_seed=5, n_drawn_tokens=700)


def test_a_grouping_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no grouping 'words'"):
        Grouping.parse("words")
