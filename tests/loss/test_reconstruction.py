"""Pixel losses, KL and the perceptual loss. LPIPS itself: tests/models/test_lpips.py."""

import math

import pytest
import torch

from loss.reconstruction import kl_loss, perceptual_loss, pixel_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(num=2, side=32):
    return torch.rand(num, 3, side, side) * 2 - 1


def test_pixel_losses_are_means_over_all_values():
    x_hat, x = images(), images()
    l1, mse = (x_hat - x).abs().sum() / x.numel(), (x_hat - x).square().sum() / x.numel()
    assert pixel_loss(x_hat, x).item() == pytest.approx(l1.item(), rel=1e-5)
    assert pixel_loss(x_hat, x, "l1").item() == pytest.approx(l1.item(), rel=1e-5)
    assert pixel_loss(x_hat, x, "mse").item() == pytest.approx(mse.item(), rel=1e-5)
    with pytest.raises(AssertionError):
        pixel_loss(x_hat, x, "l2")


@pytest.mark.parametrize("rounding", [1e-6, 1e-5])
def test_rounding_alone_turns_gradients_of_l1_over(rounding):
    """Why steps are compared in float64 (docs/verification.md): of images that are 0.05 off,
    `rounding` turns atan(rounding / 0.05) / pi of the signs over that are L1's gradient."""
    x = torch.zeros(4_000_000, dtype=torch.float64)
    x_hat, rounded = 0.05 * torch.randn_like(x), rounding * torch.randn_like(x)
    differences = {}
    for kind in ("l1", "mse"):
        grads = []
        for image in (x_hat, x_hat + rounded):
            image.requires_grad_()
            grads += torch.autograd.grad(pixel_loss(image, x, kind), image)
        differences[kind] = ((grads[1] - grads[0]).norm() / grads[0].norm()).item()
    share = math.atan(rounding / 0.05) / math.pi
    assert differences["l1"] == pytest.approx(2 * share**0.5, rel=0.2)  # 5e-3 and 1.6e-2
    assert differences["mse"] == pytest.approx(rounding / 0.05, rel=0.01)  # 2e-5 and 2e-4


def test_kl_is_summed_over_the_latent_and_averaged_over_images():
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=(1, 2, 3)).mean()
    assert kl_loss(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_loss(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moments_do_not_overflow(dtype):
    """A mean of 300 has an infinite square in float16."""
    mean = torch.full((1, 1, 2, 2), 300.0, dtype=dtype)
    logvar = torch.zeros(1, 1, 2, 2, dtype=dtype)
    assert kl_loss(mean, logvar).item() == 4 * 0.5 * 90_000
    loss = pixel_loss(mean, -mean, "mse")
    assert loss.dtype == torch.float32 and loss.item() == 360_000


def test_the_perceptual_loss_is_the_mean_of_what_the_network_says_in_float32():
    seen = []

    def net(x, y, normalize):
        seen.append((x.dtype, y.dtype, normalize))
        return torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)

    x = images().bfloat16()
    assert perceptual_loss(net, x, x).item() == 2.0
    perceptual_loss(net, x, x, double_scaling=True)
    assert seen == [(torch.float32, torch.float32, scaling) for scaling in (False, True)]
