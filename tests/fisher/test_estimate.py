"""Fisher estimates against closed forms, brute force and each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clbench.errors import ConfigError
from clbench.fisher.estimate import (
    LinearityError,
    c_star_of_batches,
    mean_gradient,
    norm,
    projections,
    projections_of_batches,
    rank_one,
    second_moment,
)
from tests.fisher.gaussian import Gaussian, Rows, draw
from tests.fisher.test_gradients import brute_force, llama, made, rows

WEIGHT = "layer.weight"
COVARIANCE = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
SHIFT = torch.tensor([0.7, -0.4, 0.5], dtype=torch.float64)
S2, N = 1.5, 40_000


@pytest.fixture(scope="module")
def model() -> Gaussian:
    return draw(N, COVARIANCE, SHIFT, S2, seed=0)


def closed_forms(s2: float = S2) -> tuple[torch.Tensor, torch.Tensor, float]:
    """mu, the empirical Fisher's diagonal and c* (Isserlis; research notes 1.9)."""
    a = COVARIANCE @ SHIFT
    q = s2 + SHIFT @ a
    diagonal = (q * COVARIANCE.diagonal() + 2 * a**2) / s2**2
    c_star = 2 + q * (a @ COVARIANCE @ a) / (a @ a) ** 2
    return a / s2, diagonal, float(c_star)


def test_diagonal_fisher_of_a_gaussian_model_is_the_closed_form(model: Gaussian) -> None:
    fisher, mean, n = second_moment(model, model.batches(1000))
    mu, diagonal, _ = closed_forms()
    assert n == N
    # sampling error: the fourth power of Gaussians is heavy, about 1 % of each entry here
    torch.testing.assert_close(fisher[WEIGHT][0], diagonal, rtol=0.05, atol=0)
    torch.testing.assert_close(mean[WEIGHT][0], mu, rtol=0.05, atol=0.01)
    torch.testing.assert_close(fisher[WEIGHT][0], model.gradients().square().mean(0), rtol=1e-10, atol=0)


def test_at_the_optimum_it_is_the_true_fisher() -> None:
    at_optimum = draw(N, COVARIANCE, torch.zeros(3).double(), S2, seed=1)
    fisher, mean, _ = second_moment(at_optimum, at_optimum.batches(1000))
    torch.testing.assert_close(fisher[WEIGHT][0], COVARIANCE.diagonal() / S2, rtol=0.05, atol=0)
    assert mean[WEIGHT].norm() < 0.02


def test_the_square_of_a_batch_mean_gradient_is_not_the_fisher() -> None:
    """The wrong estimator in common use, written out: off by the batch's size where mu is zero, ours is right."""
    n_rows, n = 8, 4000
    at_optimum = draw(n, COVARIANCE, torch.zeros(3).double(), S2, seed=2)
    wrong = torch.zeros(3).double()
    for batch in at_optimum.batches(n_rows):
        gradient, _ = mean_gradient(at_optimum, [batch])
        wrong += gradient[WEIGHT][0] ** 2 / (n / n_rows)
    truth = COVARIANCE.diagonal() / S2
    right = second_moment(at_optimum, at_optimum.batches(n_rows))[0][WEIGHT][0]
    torch.testing.assert_close(right, truth, rtol=0.1, atol=0)
    torch.testing.assert_close(truth / wrong, torch.full((3,), float(n_rows)).double(), rtol=0.2, atol=0)


def test_c_star_of_a_gaussian_model_is_the_closed_form_by_all_three_routes(model: Gaussian) -> None:
    mu, _, c_star = closed_forms()
    half = N // 2
    found = rank_one(model, model.batches(1000, 0, half), model.batches(1000, half))
    assert found.c_star == pytest.approx(c_star, rel=0.05)
    assert found.mean_norm == pytest.approx(float(mu.norm()), rel=0.03)
    assert found.cross_fitted and not found.is_noise and found.n_sequences == half
    by_steps = rank_one(model, model.batches(1000, 0, half), model.batches(1000, half), how="directional")
    assert by_steps.c_star == pytest.approx(found.c_star, rel=1e-6)  # quadratic losses: exact
    assert by_steps.trace is None
    means, n_rows = projections_of_batches(model, model.batches(4, half, half + 6000), found.direction)
    assert n_rows == 4
    of_batches = c_star_of_batches(means, n_rows, found.mean_norm)
    assert of_batches == pytest.approx(c_star, rel=0.2)  # 1500 batches


def test_rank_one_is_the_rayleigh_quotient_and_the_best_scale(model: Gaussian) -> None:
    g = model.gradients()
    fisher, mu = g.T @ g / N, g.mean(0)
    found = rank_one(model, lambda: model.batches(1000), None)
    assert not found.cross_fitted
    assert found.rho == pytest.approx(float(mu @ fisher @ mu / (mu @ mu)), rel=1e-9)
    assert found.trace == pytest.approx(float(fisher.trace()), rel=1e-9)
    torch.testing.assert_close(found.direction[WEIGHT][0], mu / mu.norm())
    outer = torch.outer(mu, mu)
    assert found.c_star == pytest.approx(float((fisher * outer).sum() / (outer * outer).sum()), rel=1e-9)


def test_collinear_gradients_make_the_fisher_exactly_of_rank_one() -> None:
    generator = torch.Generator().manual_seed(0)
    scale_N = torch.rand(200, generator=generator, dtype=torch.float64) + 0.5
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    model = Gaussian(scale_N.unsqueeze(1) * v, -torch.ones(200).double())  # g = c(x) v, c = scale
    found = rank_one(model, lambda: model.batches(50), None)
    assert found.c_star == pytest.approx(float(scale_N.square().mean() / scale_N.mean() ** 2), rel=1e-12)
    u = found.direction[WEIGHT][0]
    g = model.gradients()
    torch.testing.assert_close(found.rho * torch.outer(u, u), g.T @ g / 200, rtol=1e-10, atol=1e-12)
    assert found.trace == pytest.approx(found.rho)  # kappa = ||mu||^2 / E||g||^2 = 1 / c*


def test_white_noise_is_called_noise_by_cross_fit_only() -> None:
    n, width = 128, 4000
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(n, width, generator=generator, dtype=torch.float64)
    model = Gaussian(x_ND, 2.0 * torch.randint(2, (n,), generator=generator).double() - 1)  # g = +-x: Gaussian
    crossed = rank_one(model, model.batches(32, 0, n // 2), model.batches(32, n // 2))
    assert crossed.c_star == pytest.approx(n / 2 / width, rel=0.5) and crossed.is_noise
    in_sample = rank_one(model, lambda: model.batches(32), None)
    assert in_sample.c_star == pytest.approx(1, abs=0.1)


class Scaled(nn.Module):
    """A model whose losses are ``factor`` times larger: log-probabilities of the one target, and their complement."""

    def __init__(self, model: Gaussian, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, input_ids: torch.Tensor) -> object:
        output = self.model(input_ids)
        h = -output.logits[..., 0] * self.factor
        output.logits = torch.stack((-h, torch.log(-torch.expm1(-h))), -1)
        return output


def test_c_star_does_not_see_the_scale_of_the_loss_and_rho_its_square(model: Gaussian) -> None:
    one = rank_one(model, model.batches(1000, 0, 4000), model.batches(1000, 4000, 8000))
    three = rank_one(Scaled(model, 3.0), model.batches(1000, 0, 4000), model.batches(1000, 4000, 8000))
    assert three.c_star == pytest.approx(one.c_star, rel=1e-10)
    assert three.rho == pytest.approx(9 * one.rho, rel=1e-10)
    assert three.mean_norm == pytest.approx(3 * one.mean_norm, rel=1e-10)


def test_only_the_direction_of_mu_matters(model: Gaussian) -> None:
    u = {WEIGHT: torch.tensor([[0.6, 0.0, 0.8]]).double()}
    q = projections(model, model.batches(500, 0, 2000), u)
    for how in ("per_sequence", "directional"):
        longer = projections(model, model.batches(500, 0, 2000), {WEIGHT: 1e-20 * u[WEIGHT]}, how=how)  # type: ignore[arg-type]
        torch.testing.assert_close(1e20 * longer, q, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(q, model.gradients()[:2000] @ u[WEIGHT][0])


# --- language models --------------------------------------------------------------------------------------------------


def batches_of(n_rows: int) -> list[Rows]:
    inputs, targets = rows(6)
    return [Rows(x, y) for x, y in zip(inputs.split(n_rows), targets.split(n_rows), strict=True)]


@pytest.mark.parametrize("n_rows", [1, 3, 4, 6])
def test_estimates_do_not_depend_on_how_rows_are_batched(n_rows: int) -> None:
    net = made(llama)
    right = brute_force(net, *rows(6))
    fisher, mean, n = second_moment(net, batches_of(n_rows))
    plain, m = mean_gradient(net, batches_of(n_rows))
    assert n == m == 6 and fisher.keys() == mean.keys() == plain.keys() == right.keys()
    scale = max(float(g.abs().max()) for g in right.values())
    for name, g in right.items():
        torch.testing.assert_close(fisher[name], g.square().mean(0), rtol=1e-3, atol=1e-6 * scale**2)
        torch.testing.assert_close(mean[name], g.mean(0), rtol=1e-4, atol=1e-6 * scale)
        torch.testing.assert_close(plain[name], g.mean(0), rtol=1e-4, atol=1e-6 * scale)
    direction = {name: torch.ones_like(value) for name, value in mean.items()}
    expected = sum(g.flatten(1).double().sum(1) for g in right.values())
    torch.testing.assert_close(projections(net, batches_of(n_rows), direction), expected, rtol=1e-4, atol=1e-4)


def test_steps_along_a_direction_agree_with_gradients_and_put_the_weights_back() -> None:
    net = made(llama)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    direction, _ = mean_gradient(net, batches_of(3))
    exact = projections(net, batches_of(3), direction)
    by_steps = projections(net, batches_of(3), direction, how="directional")
    torch.testing.assert_close(by_steps, exact, rtol=2e-2, atol=1e-2 * float(exact.abs().max()))
    assert all(torch.equal(p, start[name]) for name, p in net.named_parameters())
    with pytest.raises(LinearityError, match="not linear along the direction"):
        projections(net, batches_of(3), direction, how="directional", step=0.5 * norm(start))
    assert all(torch.equal(p, start[name]) for name, p in net.named_parameters())


def test_the_three_routes_agree_on_a_language_model() -> None:
    net = made(llama)
    one = rank_one(net, batches_of(2), batches_of(3))
    two = rank_one(net, batches_of(2), batches_of(3), how="directional")
    assert two.rho == pytest.approx(one.rho, rel=1e-2)
    means, n_rows = projections_of_batches(net, batches_of(1), one.direction)
    assert c_star_of_batches(means, n_rows, one.mean_norm) == pytest.approx(one.c_star, rel=1e-4)  # b = 1: the same
    means, n_rows = projections_of_batches(net, batches_of(4), one.direction)
    assert (len(means), n_rows) == (1, 4)  # the last two rows are left out


def test_errors_say_what_to_mend(model: Gaussian) -> None:
    with pytest.raises(ConfigError, match="got no rows"):
        second_moment(model, [])
    with pytest.raises(ConfigError, match="function or a list"):
        rank_one(model, model.batches(10), None)
    with pytest.raises(ConfigError, match="per_sequence or directional"):
        projections(model, model.batches(10), {WEIGHT: SHIFT[None]}, how="guess")  # type: ignore[arg-type]


def test_a_mean_of_zero_is_called_noise() -> None:
    model = Gaussian(torch.tensor([[1.0], [-1.0]]).double(), torch.ones(2).double())
    found = rank_one(model, lambda: model.batches(2), None)
    assert found.mean_norm == 0 and found.rho == 0 and found.is_noise
