"""The terms of the VAE's own objective L_REG beside the GAN's (loss/gan.py): pixels, perceptual
distance, KL.

Each is an unweighted scalar, in float32 or more. Images are (N, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.layers.autocast import at_least_float32


def pixel_loss(x_hat: torch.Tensor, x: torch.Tensor, kind: str = "l1") -> torch.Tensor:
    """Mean over all pixel values. "l1": what the published models were trained with; "mse": what
    the paper's text says."""
    assert kind in ("l1", "mse"), kind
    loss = F.l1_loss if kind == "l1" else F.mse_loss
    return loss(at_least_float32(x_hat), at_least_float32(x))


def kl_loss(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)) for moments (N, C, h, w): summed over the values of each
    latent, averaged over images."""
    mean, logvar = at_least_float32(mean), at_least_float32(logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1).mean()


def perceptual_loss(
    net: Callable, x_hat: torch.Tensor, x: torch.Tensor, double_scaling: bool = False
) -> torch.Tensor:
    """Mean perceptual distance over images. `net`: LPIPS (arXiv 1801.03924), from
    `models.lpips.load_lpips`, or one of `models.lpips.load_perceptual_net`.

    `double_scaling` maps the images from [-1, 1] to [-3, 1], as the published runs did by mistake;
    it is only for reproducing them.
    """

    x_hat, x = at_least_float32(x_hat), at_least_float32(x)

    def distance(x_hat: torch.Tensor) -> torch.Tensor:
        return net(x_hat, x, normalize=double_scaling).mean()

    if not (torch.is_grad_enabled() and x_hat.requires_grad):
        return distance(x_hat)
    return _GradientAtOnce.apply(x_hat, distance)


class _GradientAtOnce(torch.autograd.Function):
    """A scalar function of images whose gradient is found together with its value: the activations
    of a large network are released before the next one runs. They would wait for the backward pass
    beside those of the VAE and the SiT."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, function: Callable) -> torch.Tensor:  # pyright: ignore
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = function(leaf)
        ctx.save_for_backward(*torch.autograd.grad(value, leaf))
        return value.detach()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.saved_tensors[0], None
