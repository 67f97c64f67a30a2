"""Precision and recall: by brute force in exact arithmetic, and in that of the ADM suite."""

import numpy as np
import pytest
import torch

from models.checks.errors import UserError
from utils.evaluation.formulas import manifolds
from utils.evaluation.formulas.manifolds import (
    block_distances,
    manifold_radii,
    precision_recall,
    squared_norms,
)

HALF = np.float16
MODES = ("fp32", "adm_fp16")


@pytest.fixture
def rng():
    return np.random.Generator(np.random.PCG64(0))


def distances(u, v, mode: str) -> torch.Tensor:
    parts = block_distances(torch.as_tensor(u), torch.as_tensor(v), mode)
    return torch.cat([d for _, d in parts])


def by_hand(real, fake, distances, k=3) -> tuple[float, float]:
    radii = [np.sort(distances(x, x), 1)[:, k] for x in (real, fake)]
    d = distances(real, fake)
    return (d <= radii[0][:, None]).any(0).mean(), (d <= radii[1][None]).any(1).mean()


def exact(u, v) -> np.ndarray:
    return ((np.float64(u)[:, None] - np.float64(v)[None]) ** 2).sum(2)


def eigen_sum(values) -> HALF:
    """One value after the other, in float16: 4 packets of 8 side by side, up to 1,600 values."""
    n, packet = len(values), 8
    if n > 1600:
        half = -(-n // 16) * 8
        return HALF(eigen_sum(values[:half]) + eigen_sum(values[half:]))
    sums = [[HALF(0)] * packet for _ in range(4)]
    wide, whole = n // 32 * 32, n // packet * packet
    for i in range(whole):
        at = i % 32 // packet if i < wide else 0
        if i == wide:  # the four are added before the packets that are left
            sums[0] = [HALF(HALF(HALF(a + b) + c) + d) for a, b, c, d in zip(*sums)]
            sums[1:] = [[HALF(0)] * packet] * 3
        sums[at][i % packet] = HALF(sums[at][i % packet] + values[i])
    last = [HALF(HALF(HALF(a + b) + c) + d) for a, b, c, d in zip(*sums)]
    rest = HALF(0)
    for value in values[whole:]:
        rest = HALF(rest + value)
    wide_sums = [np.float32(last[i]) + np.float32(last[i + 4]) for i in range(4)]
    return HALF(rest + HALF((wide_sums[0] + wide_sums[2]) + (wide_sums[1] + wide_sums[3])))


def in_adms_rule(u, v) -> np.ndarray:
    """Every distance by itself, every step rounded to float16, products summed in float32."""
    u, v = HALF(u), HALF(v)
    norms = [[eigen_sum(list(row * row)) for row in rows] for rows in (u, v)]
    d = np.zeros((len(u), len(v)), np.float32)
    for i, row in enumerate(u):
        for j, other in enumerate(v):
            product = HALF((np.float32(row) * np.float32(other)).sum(dtype=np.float32))
            d[i, j] = max(HALF(HALF(norms[0][i] - HALF(2) * product) + norms[1][j]), HALF(0))
    return d


@pytest.mark.parametrize("block", [32, 10_000])
def test_precision_and_recall_equal_brute_force(rng, block, monkeypatch):
    real = np.float32(rng.standard_normal((200, 8)))
    fake = np.float32(rng.standard_normal((150, 8)) * 0.8 + 0.3)
    expected = by_hand(real, fake, exact)
    for budget in (manifolds.BUDGET, 1000):  # at once, or a few rows at a time
        monkeypatch.setattr(manifolds, "BUDGET", budget)
        assert precision_recall(real, fake, 3, "fp32", block) == pytest.approx(expected)
    assert 0.1 < expected[1] < expected[0] < 1


@pytest.mark.parametrize("dim", [1, 7, 8, 20, 33, 64, 200, 1600, 2048])
def test_norms_are_summed_in_the_order_of_eigen(rng, dim):
    x = HALF(np.abs(rng.standard_normal((6, dim))) * 0.4 + 0.1)
    found = squared_norms(torch.from_numpy(x))
    assert found.dtype == torch.float16
    assert found.tolist() == [float(eigen_sum(list(row * row))) for row in x]


@pytest.mark.parametrize("spread", [0.03, 0.3])
def test_a_tight_cluster_in_the_rule_of_adm_equals_figures_by_hand(rng, spread):
    centre = rng.gamma(0.7, 0.6, 64) * 4
    real, fake = (np.float32(centre + spread * rng.standard_normal((n, 64))) for n in (20, 14))
    np.testing.assert_array_equal(distances(real, fake, "adm_fp16"), in_adms_rule(real, fake))
    assert precision_recall(real, fake, 3, "adm_fp16") == by_hand(real, fake, in_adms_rule)


def test_a_tight_cluster_has_the_numbers_of_the_adm_suite():
    """Printed by its own evaluator (openai/guided-diffusion, TensorFlow 2.21 on a CPU) for these
    features; then with one of them enlarged and blocks of 100, of which one alone overflows."""
    draw = np.random.RandomState(0)
    centre = draw.gamma(0.7, 0.6, 2048)
    real, fake = (np.float32(centre + 0.02 * draw.standard_normal((n, 2048))) for n in (200, 150))
    assert precision_recall(real, fake, 3, "adm_fp16") == (115 / 150, 169 / 200)
    radii = [manifold_radii(torch.from_numpy(x), 3, "adm_fp16").sum() for x in (real, fake)]
    assert radii == [143.5, 110.0]
    assert precision_recall(real, fake, 3, "fp32") == (80 / 150, 132 / 200)
    real[7] *= 14
    assert precision_recall(real, fake, 3, "adm_fp16", block=100) == (133 / 150, 81 / 200)


@pytest.mark.parametrize("mode", MODES)
def test_precision_and_recall_of_extreme_sets_are_not_exchanged(rng, mode):
    real = np.float32(rng.standard_normal((100, 16)))
    collapsed = real[:1] + np.float32(rng.standard_normal((100, 16)) * 0.05)
    assert precision_recall(real, real, 3, mode) == (1, 1)
    assert precision_recall(real, real + 100, 3, mode) == (0, 0)
    precision, recall = precision_recall(real, collapsed, 3, mode)
    assert precision > 0.9
    assert recall < 0.1


@pytest.mark.parametrize("size", [60, 1000])  # norms that are finite in float16, and that are not
def test_a_block_that_overflows_float16_is_float32_as_a_whole(rng, size, monkeypatch):
    x = np.float32(rng.standard_normal((20, 8)))
    x[:2] *= size
    monkeypatch.setattr(manifolds, "BUDGET", 1000)  # the others would be finite by themselves
    assert torch.equal(distances(x, -x, "adm_fp16"), distances(x, -x, "fp32"))
    small = x[2:]
    assert not torch.equal(distances(small, -small, "adm_fp16"), distances(small, -small, "fp32"))


def test_doubled_products_that_overflow_downwards_count_as_no_distance():
    """As in TensorFlow: norm - inf is -inf, which is finite once negative distances are cut off."""
    x = np.full((4, 8), 70, np.float32)
    assert (distances(x, x, "adm_fp16") == 0).all()


def test_precision_and_recall_need_k_plus_1_images():
    with pytest.raises(UserError, match="3 images in the samples"):
        precision_recall(np.zeros((4, 2)), np.zeros((3, 2)), 3, "fp32")
    assert manifold_radii(torch.zeros(4, 2), 3, "fp32").shape == (4,)
