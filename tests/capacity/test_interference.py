"""Interference of changes: exact identities, and nulls against simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from clbench.capacity import interference as i
from clbench.capacity.spectra import Floats


def own_blocks(z_N: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(len(z_N))


def test_the_mean_change_is_magnitude_times_what_does_not_cancel() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        z = generator.standard_normal(57) + generator.normal()
        f = i.opposition(z, own_blocks(z)).figures
        product = f["magnitude_nats"].value * (1 - f["interference"].value)
        assert product == pytest.approx(abs(z.mean()), rel=1e-12)
        assert f["change_nats"].value == pytest.approx(z.mean(), rel=1e-12)


def test_one_direction_is_0_pairs_are_1_and_scale_does_not_count() -> None:
    z = np.random.default_rng(1).random(40)
    assert i.destructive_interference(z).value == pytest.approx(0, abs=1e-12)
    assert i.destructive_interference(-z).value == pytest.approx(0, abs=1e-12)
    assert i.destructive_interference(np.concatenate([z, -z])).value == pytest.approx(1, abs=1e-12)
    z[::3] *= -1
    assert i.destructive_interference(1e6 * z).value == pytest.approx(i.destructive_interference(z).value)
    assert i.destructive_interference(np.zeros(5)).reason == "nothing changed"


DISTRIBUTIONS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], Floats], float]] = {
    # sqrt(2/pi) sd / E|z| in closed form
    "normal": (lambda g, shape: g.standard_normal(shape), 1.0),
    "laplace": (lambda g, shape: g.laplace(size=shape), math.sqrt(2 / math.pi) * math.sqrt(2)),
    "uniform": (lambda g, shape: g.uniform(-1, 1, shape), math.sqrt(2 / math.pi) * 2 / math.sqrt(3)),
    "signs": (lambda g, shape: g.choice([-1.0, 1.0], shape), math.sqrt(2 / math.pi)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [100, 900])
def test_the_null_is_what_random_changes_give(name: str, n: int) -> None:
    draw, constant = DISTRIBUTIONS[name]
    z_RN = draw(np.random.default_rng(2), (6000, n))
    d_R = 1 - np.abs(z_RN.sum(1)) / np.abs(z_RN).sum(1)
    standard_error = d_R.std() / math.sqrt(len(d_R))
    # within 5 standard errors and the terms of second order, 1/n
    assert d_R.mean() == pytest.approx(1 - constant / math.sqrt(n), abs=5 * standard_error + 1 / n)
    nulls = [i.null_of_signs(z_N)[0].value for z_N in z_RN[:200]]
    assert np.mean(nulls) == pytest.approx(1 - constant / math.sqrt(n), abs=2 / n)
    if name == "normal":
        assert i.null_of_normal(n) == 1 - 1 / math.sqrt(n)


def test_documents_that_move_together_need_the_null_over_blocks() -> None:
    generator = np.random.default_rng(3)
    n_blocks, size = 60, 40
    block = np.repeat(np.arange(n_blocks), size)
    found, plain, blocked, below = [], [], [], 0
    for _ in range(1500):
        z = np.repeat(generator.standard_normal(n_blocks), size) + 0.5 * generator.standard_normal(n_blocks * size)
        d = i.destructive_interference(z).value
        mean, low = i.null_of_signs(z, block)
        found.append(d)
        blocked.append(mean.value)
        plain.append(i.null_of_signs(z)[0].value)
        below += d < low.value
    assert np.mean(blocked) == pytest.approx(np.mean(found), abs=0.004)
    assert np.mean(plain) - np.mean(found) > 0.05  # tokens as if independent: cancelling looks weak
    assert below / len(found) == pytest.approx(0.05, abs=0.02)


def test_a_common_change_falls_below_the_null() -> None:
    generator = np.random.default_rng(4)
    block = np.repeat(np.arange(50), 30)
    z = generator.standard_normal(1500) + 0.3
    f = i.opposition(z, block).figures
    assert f["interference"].value < f["interference_null_blocks_low"].value < f["interference_null_blocks"].value
    assert f["change_nats_low"].value > 0


def test_intervals_cover_and_are_the_same_every_time() -> None:
    generator = np.random.default_rng(5)
    block = np.repeat(np.arange(40), 10)
    hits = 0
    for _ in range(80):
        effects = generator.standard_normal(40)
        z = np.repeat(effects, 10) + generator.standard_normal(400) + 0.2
        f = i.opposition(z, block).figures
        hits += f["change_nats_low"].value <= 0.2 <= f["change_nats_high"].value
    assert 0.85 <= hits / 80 <= 1
    assert i.opposition(z, block) == i.opposition(z, block)
    assert i.opposition(z, block, seed=1) != i.opposition(z, block)
    widths = [f[f"{name}_high"].value - f[f"{name}_low"].value for name in ("interference", "magnitude_nats")]
    assert min(widths) > 0


def test_numbers_of_documents_do_not_matter_but_for_their_grouping() -> None:
    z = np.random.default_rng(6).standard_normal(30)
    block = np.repeat([7, 1, 900], 10)
    f, same = i.opposition(z, block), i.opposition(z, np.repeat([1, 0, 2], 10))
    assert f.n_documents == 3 and f.figures["interference"] == same.figures["interference"]
    assert f.figures["interference_null_blocks"].value == pytest.approx(same.figures["interference_null_blocks"].value)
    one = i.opposition(z, np.zeros(30, dtype=np.int64)).figures
    assert one["interference_low"].reason == "fewer than 2 documents"
    still = i.opposition(np.zeros(30), block).figures
    assert still["interference_null"].reason == still["change_nats_low"].reason == "nothing changed"
