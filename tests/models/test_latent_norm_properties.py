"""Properties of the latent norm for any statistics of the latents."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.latent_norm import LatentNorm

NUMBERS = st.floats(-1e3, 1e3, width=32)


@given(
    st.lists(st.tuples(NUMBERS, st.floats(0.0, 1e3, width=32)), min_size=1, max_size=5),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_the_inverse_undoes_the_norm(stats, seed, fixed):
    mean, std = (torch.tensor(side) for side in zip(*stats))
    norm = LatentNorm(len(stats), fixed=fixed)
    norm.set_stats(mean, std)
    norm.eval().double()
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, len(stats), 3, 3, generator=g, dtype=torch.float64) * 10
    z_n = norm(z)
    torch.testing.assert_close(norm.inverse(z_n), z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm(norm.inverse(z_n)), z_n, rtol=1e-9, atol=1e-6)
    known_mean, known_std = (value[:, None, None] for value in norm.stats())
    torch.testing.assert_close((z - known_mean) / known_std, z_n, rtol=1e-9, atol=1e-6)


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**32))
def test_in_train_mode_the_batch_has_mean_0_and_variance_1(channels, num, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(num, channels, 4, 4, generator=g) * 7 + 3
    z_n = LatentNorm(channels).train()(z)
    torch.testing.assert_close(z_n.mean((0, 2, 3)), torch.zeros(channels), rtol=0, atol=1e-5)
    found = z_n.var((0, 2, 3), correction=0)
    torch.testing.assert_close(found, torch.ones(channels), rtol=1e-3, atol=0)
