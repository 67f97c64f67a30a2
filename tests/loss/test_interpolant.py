"""The path against finite differences and the closed form of Gaussian data."""

import math

import pytest
import torch

from loss.interpolant import PATHS, coefficients, interpolate, score_from_velocity, time_from_normal

F64 = torch.float64
INSIDE = torch.linspace(0.02, 0.98, 25, dtype=F64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_paths_are_linear_and_cosine_as_written_in_the_paper():
    assert PATHS == ("linear", "cosine")
    alpha, sigma, d_alpha, d_sigma = coefficients(INSIDE, "linear")
    assert torch.equal(alpha, 1 - INSIDE) and torch.equal(sigma, INSIDE)
    assert (d_alpha == -1).all() and (d_sigma == 1).all()
    alpha, sigma, d_alpha, d_sigma = coefficients(INSIDE, "cosine")
    for i, t in enumerate(INSIDE.tolist()):
        assert alpha[i] == pytest.approx(math.cos(math.pi * t / 2), abs=1e-15)
        assert sigma[i] == pytest.approx(math.sin(math.pi * t / 2), abs=1e-15)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_equal_finite_differences(path):
    step = 1e-5
    here = coefficients(INSIDE, path)
    after, before = coefficients(INSIDE + step, path), coefficients(INSIDE - step, path)
    assert torch.allclose(here.d_alpha, (after.alpha - before.alpha) / (2 * step), atol=1e-9)
    assert torch.allclose(here.d_sigma, (after.sigma - before.sigma) / (2 * step), atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_x(path):
    z, eps = torch.randn(25, 4, 3, 3, dtype=F64), torch.randn(25, 4, 3, 3, dtype=F64)
    step = 1e-5
    _, v = interpolate(z, eps, INSIDE, path)
    after, before = (interpolate(z, eps, INSIDE + d, path)[0] for d in (step, -step))
    assert torch.allclose(v, (after - before) / (2 * step), atol=1e-8)


def test_linear_velocity_is_noise_minus_data():
    z, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.rand(4)
    x, v = interpolate(z, eps, t)
    assert torch.equal(v, eps - z)
    for n in range(4):  # each image at its own time
        assert torch.allclose(x[n], (1 - t[n]) * z[n] + t[n] * eps[n])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_data_at_time_0_and_noise_at_time_1(path, dtype):
    z, eps = torch.randn(3, 2, 4, 4, dtype=dtype), torch.randn(3, 2, 4, 4, dtype=dtype)
    start, _ = interpolate(z, eps, torch.zeros(3, dtype=dtype), path)
    end, _ = interpolate(z, eps, torch.ones(3, dtype=dtype), path)
    assert torch.equal(start, z)
    assert torch.allclose(end, eps, atol=1e-6)


def test_cosine_path_keeps_the_variance():
    alpha, sigma, _, _ = coefficients(INSIDE, "cosine")
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(INSIDE))


def gaussian_field(x, t, mean, std, path):
    """Of data N(mean, std^2): score of the marginal, and velocity E[dx_t/dt | x_t = x]."""
    if path == "linear":
        alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1.0, 1.0
    else:
        angle = math.pi / 2 * t
        alpha, sigma = math.cos(angle), math.sin(angle)
        d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
    var = (alpha * std) ** 2 + sigma**2
    score = -(x - alpha * mean) / var
    slope = (alpha * d_alpha * std**2 + sigma * d_sigma) / var
    return score, d_alpha * mean + slope * (x - alpha * mean)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.01, 0.04, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_score_from_velocity_is_the_closed_form_of_gaussian_data(path, t):
    x = 3 * torch.randn(6, 4, 2, 2, dtype=F64)
    for mean, std in ((0.0, 1.0), (1.5, 0.3), (-2.0, 4.0)):
        score, v = gaussian_field(x, t, mean, std, path)
        found = score_from_velocity(v, x, torch.tensor(t, dtype=F64), path)
        assert torch.allclose(found, score, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_score_of_one_known_pair_points_at_its_noise(path):
    """x = alpha z + sigma eps and v = alpha' z + sigma' eps of one z: the score is -eps / sigma."""
    z, eps = torch.randn(5, 3, 2, 2, dtype=F64), torch.randn(5, 3, 2, 2, dtype=F64)
    for t in (0.05, 0.4, 0.8):
        time = torch.tensor(t, dtype=F64)
        x, v = interpolate(z, eps, time, path)
        sigma = t if path == "linear" else math.sin(math.pi * t / 2)
        assert torch.allclose(score_from_velocity(v, x, time, path), -eps / sigma, rtol=1e-8)


def test_lognormal_times_written_out():
    for n in (-3.0, -0.5, 0.0, 1.0, 2.5):
        s = math.exp(n)
        value = torch.tensor([n], dtype=F64)
        assert time_from_normal(value, "linear").item() == pytest.approx(s / (1 + s))
        assert time_from_normal(value, "cosine").item() == pytest.approx(2 / math.pi * math.atan(s))


@pytest.mark.parametrize("path", PATHS)
def test_at_lognormal_times_the_noise_to_data_ratio_is_lognormal(path):
    n = torch.randn(1000, dtype=F64)
    t = time_from_normal(n, path)
    alpha, sigma, _, _ = coefficients(t, path)
    assert torch.allclose((sigma / alpha).log(), n, atol=1e-9)
    assert ((t > 0) & (t < 1)).all()
    assert time_from_normal(torch.zeros(1), path) == 0.5
