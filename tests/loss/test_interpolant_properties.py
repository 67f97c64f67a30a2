"""Properties of the interpolants for any data, noise and time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loss.interpolant import PATHS, coefficients, interpolate, time_from_normal

pytestmark = pytest.mark.parametrize("path", PATHS)
SEEDS = st.integers(0, 2**32)


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))


@given(SEEDS)
def test_the_ends_are_data_and_noise(path, seed):
    z, eps = pair(seed)
    start, _ = interpolate(z, eps, torch.zeros(3, dtype=torch.float64), path)
    end, _ = interpolate(z, eps, torch.ones(3, dtype=torch.float64), path)
    torch.testing.assert_close(start, z)
    torch.testing.assert_close(end, eps)


@given(SEEDS, st.floats(1e-3, 1 - 1e-3))
def test_the_velocity_is_the_derivative_of_the_path(path, seed, at):
    z, eps = pair(seed)
    t = torch.full((3,), at, dtype=torch.float64, requires_grad=True)
    moved = [interpolate(z, eps, t + h, path)[0] for h in (1e-6, -1e-6)]
    torch.testing.assert_close(
        interpolate(z, eps, t, path)[1], (moved[0] - moved[1]) / 2e-6, rtol=1e-6, atol=1e-7
    )
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
    for value, stated in ((alpha, d_alpha), (sigma, d_sigma)):
        (found,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(found, stated)


@given(st.floats(-30, 30))
def test_log_normal_times_are_times_and_grow(path, n):
    t = time_from_normal(torch.tensor([n, n + 1], dtype=torch.float64), path)
    assert 0 <= t[0] <= t[1] <= 1
