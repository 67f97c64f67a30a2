"""PCA colours of latents: planted structure comes back; nothing arbitrary, nothing crashes.

python -m pytest tests/utils/pictures/test_pca.py
"""

import pytest
import torch
from sklearn.decomposition import PCA

from models.latent_norm import LatentNorm
from utils.pictures import pca
from utils.pictures.pca import fit_basis, to_rows


def rows(channels: int, rank: int, num: int = 4000, noise: float = 0.0) -> torch.Tensor:
    """(num, channels) of `rank` planted directions, far from normalised."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(num, rank, generator=g, dtype=torch.float64)
    z = (
        scores
        * torch.tensor([5.0, 3.0, 1.5])[:rank]
        @ torch.randn(rank, channels, generator=g, dtype=torch.float64)
    )
    z += noise * torch.randn(num, channels, generator=g, dtype=torch.float64)
    return (z + 100 * torch.arange(channels)).float()


def normalised(z: torch.Tensor) -> torch.Tensor:
    var, mean = torch.var_mean(z.double(), 0, correction=0)
    return (z.double() - mean) / (var + pca.EPS).sqrt()


def test_three_planted_directions_carry_everything():
    z = rows(16, 3)
    basis = fit_basis(z)
    torch.testing.assert_close(basis.axes @ basis.axes.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(basis.project(z) @ basis.axes, normalised(z), atol=1e-4, rtol=0)
    shares = basis.explained(z)
    assert abs(shares.sum() - 1) < 1e-6 and shares[0] > shares[1] > shares[2] > 0.01


def test_the_axes_are_those_of_sklearn_up_to_sign():
    z = rows(8, 3, noise=1.0)
    basis, reference = fit_basis(z), PCA(3).fit(normalised(z).numpy())
    cosines = (basis.axes * torch.from_numpy(reference.components_)).sum(1)
    torch.testing.assert_close(cosines.abs(), torch.ones(3, dtype=torch.float64))
    ratio = torch.from_numpy(reference.explained_variance_ratio_)
    torch.testing.assert_close(basis.explained(z), ratio)


def test_normalised_as_the_latent_norm_does_it():
    assert LatentNorm(4).eps == pca.EPS


def test_a_ramp_becomes_a_ramp_of_one_colour():
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    z = ramp * torch.tensor([1.0, -2.0, 0.5, 3.0]).view(1, 4, 1, 1) + 7
    colours = fit_basis(to_rows(z)).colours(z)
    assert colours.shape == (1, 3, 8, 8) and colours.dtype == torch.uint8
    red = colours[0, 0].flatten().int()
    assert (red.diff() >= 0).all() and red[0] == 0 and red[-1] == 255 and red[31:33].sum() == 255
    assert (colours[0, 1:] == 128).all()  # no second direction: no second colour


def test_the_colours_do_not_depend_on_the_order_of_the_images():
    z = rows(8, 3, num=64 * 16, noise=0.5).view(64, 4, 4, 8).permute(0, 3, 1, 2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    one, other = (fit_basis(to_rows(some)) for some in (z, z[order]))
    torch.testing.assert_close(one.axes, other.axes)
    difference = one.colours(z).int() - other.colours(z).int()
    assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 1e-3


def test_the_scale_of_a_channel_does_not_matter():
    z = rows(6, 3, noise=0.5)
    scaled = z * torch.tensor([1, 10, 0.5, 3, 2, 100])
    torch.testing.assert_close(fit_basis(z).axes, fit_basis(scaled).axes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_is_that_of_the_largest_loading_or_the_first_of_equals(sign):
    basis = fit_basis(sign * rows(8, 3, noise=0.5))
    largest = basis.axes.abs().argmax(1)
    assert (basis.axes[range(3), largest] > 0).all()
    pair = fit_basis(1000 * rows(2, 1) * torch.tensor([sign, -1]))  # loadings +-0.7071
    assert pair.axes[0, 0] > 0.7


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_few_channels(channels):
    z = rows(channels, 1, num=16, noise=1.0).view(1, 4, 4, channels).permute(0, 3, 1, 2)
    basis = fit_basis(to_rows(z))
    colours = basis.colours(z)
    assert colours.shape == (1, 3, 4, 4) and (colours[:, channels:] == 128).all()
    assert abs(basis.explained(to_rows(z)).sum() - 1) < 1e-6


def test_collapsed_latents_are_grey_and_a_dead_channel_is_ignored():
    flat = torch.full((2, 4, 4, 4), 3.3)
    basis = fit_basis(to_rows(flat))
    assert (basis.colours(flat) == 128).all() and (basis.explained(to_rows(flat)) == 0).all()
    z = rows(4, 3)
    z[:, 2] = -1.7
    basis = fit_basis(z)
    assert basis.axes.isfinite().all() and (basis.axes[:, 2].abs() < 1e-9).all()
