"""The formulas of the metrics against closed forms, scipy, scikit-image and brute force."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.ndimage import uniform_filter
from scipy.signal import convolve2d
from skimage.metrics import structural_similarity
from sklearn.datasets import load_digits, load_sample_images

from models.checks.errors import UserError
from utils.evaluation.formulas.frechet import (
    Moments,
    centred_factor,
    factor,
    frechet_distance,
    frechet_from_factors,
)
from utils.evaluation.formulas.pictures import LatentStatistics, psnr, ssim
from utils.evaluation.formulas.scores import inception_score

ROOT = Path(__file__).parents[3]


@pytest.fixture
def rng():
    return np.random.Generator(np.random.PCG64(0))


def rotation(rng, d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def gaussian(rng, d, n=None):
    x = rng.standard_normal((n or 4 * d, d)) @ rng.standard_normal((d, d)) / np.sqrt(d)
    x += rng.standard_normal(d)
    return x.mean(0), np.cov(x, rowvar=False), x


@pytest.mark.parametrize("d", [1, 2, 64, 300])
@pytest.mark.parametrize("spread", [1, 12])
def test_frechet_equals_the_analytic_value_of_commuting_gaussians(rng, d, spread):
    q, m1, m2 = rotation(rng, d), rng.standard_normal(d), rng.standard_normal(d)
    l1, l2 = np.exp(-spread * rng.random(d)), np.exp(-spread * rng.random(d))
    s1, s2 = (q * l1) @ q.T, (q * l2) @ q.T
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(l1) - np.sqrt(l2)) ** 2).sum()
    assert abs(frechet_distance(m1, s1, m2, s2) - expected) < 1e-10
    assert abs(frechet_from_factors(m1, factor(s1), m2, factor(s2)) - expected) < 1e-10


def test_frechet_of_equal_covariances_is_the_distance_of_the_means(rng):
    m, s, _ = gaussian(rng, 20)
    shift = rng.standard_normal(20)
    assert frechet_distance(m, s, m + shift, s) == pytest.approx((shift**2).sum(), abs=1e-10)
    assert frechet_distance(m, s, m, 4 * s) == pytest.approx(np.trace(s), rel=1e-12)


def test_frechet_agrees_with_scipy_is_symmetric_and_invariant(rng):
    (m1, s1, _), (m2, s2, _) = gaussian(rng, 128), gaussian(rng, 128)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    value = frechet_distance(m1, s1, m2, s2)
    assert value == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(value, rel=1e-11)
    q = rotation(rng, 128)
    turned = frechet_distance(q @ m1, q @ s1 @ q.T, q @ m2, q @ s2 @ q.T)
    assert turned == pytest.approx(value, rel=1e-11)


def test_frechet_of_a_set_with_itself_is_zero_to_rounding(rng):
    m, s, _ = gaussian(rng, 64)
    assert abs(frechet_distance(m, s, m, s)) < 1e-10


def test_rank_deficient_covariances_neither_fail_nor_lose_the_exact_value(rng):
    (m1, s1, x1), (m2, s2, x2) = gaussian(rng, 64, n=30), gaussian(rng, 64, n=20)
    exact = frechet_from_factors(m1, centred_factor(x1), m2, centred_factor(x2))
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(exact, abs=1e-5)
    assert abs(frechet_from_factors(m1, centred_factor(x1), m1, centred_factor(x1))) < 1e-10
    mixed = frechet_from_factors(m1, factor(s1), m2, centred_factor(x2))
    assert mixed == pytest.approx(exact, abs=1e-5)


def test_frechet_refuses_what_is_not_finite(rng):
    m, s, _ = gaussian(rng, 4)
    with pytest.raises(UserError, match="nan or inf"):
        frechet_distance(m * np.nan, s, m, s)


@pytest.mark.slow
def test_frechet_at_2048_dimensions_takes_less_than_15_seconds(rng):
    scale = np.exp(-np.linspace(0, 4, 2048))
    sets = [rng.standard_normal((4000, 2048)) * scale for _ in range(2)]
    stats = [(x.mean(0), np.cov(x, rowvar=False)) for x in sets]
    start = time.perf_counter()
    frechet_distance(*stats[0], *stats[1])
    assert time.perf_counter() - start < 15


def moments_of(x, block=1024):
    moments = Moments(x.shape[1])
    for rows in torch.as_tensor(x).split(block):
        moments.add(rows)
    return moments


def test_moments_are_those_of_numpy_for_any_split_of_the_data(rng):
    x = rng.standard_normal((101, 12)) * 3 + 5
    moments = Moments(12)
    for rows in np.split(x, [0, 7, 64]):  # one of them empty, the last ragged
        moments.add(torch.from_numpy(rows))
    merged = moments_of(x[:50]) + moments_of(x[50:], block=16)
    for m in (moments, merged):
        assert m.count == 101
        np.testing.assert_allclose(m.mean(), x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(m.cov(), np.cov(x, rowvar=False), rtol=1e-11, atol=1e-12)


def test_moments_of_one_image_have_no_covariance():
    with pytest.raises(UserError, match="at least 2"):
        moments_of(np.zeros((1, 3))).cov()


@pytest.mark.slow
def test_moments_of_50000_features_stay_below_2_gb():
    """By the peak of the process's own memory; ru_maxrss would count what pytest holds, too."""
    code = """
import numpy as np, torch
from utils.evaluation.formulas.frechet import Moments
rng, moments = np.random.default_rng(0), Moments(2048)
for _ in range(500):
    moments.add(torch.from_numpy(rng.standard_normal((100, 2048), np.float32)))
assert moments.count == 50_000 and moments.cov().shape == (2048, 2048)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(out.stdout) < 2e6  # kB


def test_inception_score_of_certain_and_of_uniform_predictions():
    certain = 1000 * torch.eye(5).repeat(20, 1)  # a softmax with exact zeros: must not give nan
    assert inception_score(certain, torch.eye(5), split_size=5000) == pytest.approx((5, 0))
    assert inception_score(torch.zeros(50, 5), torch.eye(5), split_size=5000) == pytest.approx(
        (1, 0)
    )


def test_inception_score_depends_on_order_and_takes_splits_in_file_order():
    pool = 1000 * torch.eye(4).repeat_interleave(10, 0)  # sorted by class
    score, _ = inception_score(pool, torch.eye(4), split_size=10)
    assert score == pytest.approx(1)
    order = np.arange(40).reshape(4, 10).T.reshape(-1)
    score, _ = inception_score(pool, torch.eye(4), order, split_size=20)
    assert score == pytest.approx(4)
    scores = inception_score(pool[:25], torch.eye(4), split_size=10)  # 10, 10 and a last 5
    assert scores == pytest.approx((1, 0))


def test_inception_score_equals_a_direct_float64_computation(rng):
    pool, weight = rng.standard_normal((30, 16)), rng.standard_normal((7, 16))
    pool, weight = np.float32(pool), np.float32(weight)
    p = np.exp(np.float64(pool @ weight.T))
    p /= p.sum(1, keepdims=True)
    splits = [p[:20], p[20:]]
    scores = [np.exp((s * np.log(s / s.mean(0))).sum(1).mean()) for s in splits]
    expected = np.mean(scores), np.std(scores)
    assert inception_score(pool, weight, split_size=20) == pytest.approx(expected, rel=1e-6)


def test_psnr_of_a_constant_error_and_of_none():
    x = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    y = x.clone()
    y[0] += 10
    expected = -20 * np.log10(10 / 255), 100  # mse is floored at 1e-10
    assert psnr(x, y).tolist() == pytest.approx(expected)


def test_ssim_equals_its_formula_with_an_11x11_gaussian(rng):
    x = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    y = np.uint8(np.clip(x + rng.normal(0, 20, x.shape), 0, 255))
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    scores = []
    for a, b in zip(np.float64(x).transpose(2, 0, 1), np.float64(y).transpose(2, 0, 1)):
        ma, mb, aa, bb, ab = (convolve2d(i, window, "valid") for i in (a, b, a * a, b * b, a * b))
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        top = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
        scores.append(top / ((ma**2 + mb**2 + c1) * (aa - ma**2 + bb - mb**2 + c2)))
    assert ssim_of(x, y) == pytest.approx(np.mean(scores), abs=1e-9)
    with pytest.raises(UserError, match="at least 11x11"):
        ssim_of(x[:8], y[:8])


def ssim_of(x, y) -> float:
    """Of two pictures (H, W, 3); in a batch with others, whose score must not matter."""
    pair = [torch.tensor(a).permute(2, 0, 1) for a in (x, y)]
    first, second = ssim(*(torch.stack([a, pair[0]]) for a in pair))
    assert second == 1 or x is y
    return first.item()


@pytest.mark.parametrize("damage", ["noise", "blur", "brighter", "none"])
def test_ssim_agrees_with_scikit_image_on_photographs_and_digits(rng, damage):
    flat = np.full((40, 40, 3), 255, np.uint8)  # where float32 would lose 1e-3
    photographs = [image[:96, :120] for image in load_sample_images().images]
    digits = [np.kron(d, np.ones((4, 4)))[..., None].repeat(3, 2) * 15.9375
              for d in load_digits().images[:2]]  # fmt: skip
    for x in (*photographs, *map(np.uint8, digits), flat):
        y = x + rng.normal(0, 20, x.shape) if damage == "noise" else np.float64(x)
        y = y + 3 if damage == "brighter" else y
        y = uniform_filter(y, (5, 5, 0)) if damage == "blur" else y
        y = np.uint8(np.clip(y, 0, 255))
        expected = structural_similarity(
            x, y, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert ssim_of(x, y) == pytest.approx(expected, abs=1e-11)


def test_latent_statistics_of_known_maps():
    ramp = torch.arange(4.0).expand(4, 4)  # rows 0 1 2 3: 12 horizontal steps of 1
    z = torch.stack([torch.stack([ramp, 2 * ramp]), torch.zeros(2, 4, 4)])
    parts, whole = LatentStatistics(2), LatentStatistics(2)
    whole.add(z)
    for image in (z[:1], z[1:], z[:0]):
        parts.add(image)
    assert parts.result() == whole.result()
    result = whole.result()
    assert result["total_variation"] == pytest.approx((12 + 24) / 4)
    assert result["spatial_variance"] == pytest.approx((1.25 + 5) / 4)
    assert result["latent_mean"] == pytest.approx([0.75, 1.5])
    assert result["latent_std"] == pytest.approx(z.double().std((0, 2, 3), correction=0).tolist())
