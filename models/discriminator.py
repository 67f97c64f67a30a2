"""PatchGAN discriminator (pix2pix, arXiv 1611.07004), as in latent-diffusion VAE training."""

import torch
import torch.nn as nn

from models.checks.errors import UserError
from models.latent_norm import JointBatchNorm2d


class PatchGAN(nn.Module):
    """Convolutions that give one logit for each of many overlapping patches; higher = real.

    layers: convolutions with a norm, all but the last of stride 2. channels: of the first layer.
    norm: "batch" is the published one; its moments are those of all ranks together, so the number
    of GPUs does not change the update. "group" has no statistics across images, so that gradient
    accumulation equals the big batch exactly.
    The keys `main.N.*` of the state dict are those of the published discriminators.
    """

    def __init__(
        self, layers: int = 3, channels: int = 64, norm: str = "batch", in_channels: int = 3
    ):
        super().__init__()
        assert norm in ("batch", "group"), norm
        self.layers = layers
        stack = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for n in range(1, layers + 1):
            wider = channels * min(2**n, 8)
            stride = 2 if n < layers else 1
            stack.append(nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False))
            stack.append(JointBatchNorm2d(wider) if norm == "batch" else nn.GroupNorm(8, wider))
            stack.append(nn.LeakyReLU(0.2))
            width = wider
        stack.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*stack)
        self.apply(_initialize)

    def forward(self, *batches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each batch of images (N, 3, H, W) in [-1, 1] => its logits (N, 1, H', W').

        Real images and reconstructions are given in one call, as DDP wants one forward for each
        backward, but as two batches: with one set of batch moments over both, the discriminator
        would see a mixture whose statistics give the answer away.
        """
        return tuple(self.main(x) for x in batches)

    @staticmethod
    def check_resolution(layers: int, resolution: int) -> None:
        """Raise `UserError` if images of `resolution` pixels leave no patch to judge."""
        if resolution >> layers < 3:
            raise UserError(
                f"disc.layers={layers} leaves no patch of a {resolution} px image: lower it"
            )


def _initialize(module: nn.Module) -> None:
    """pix2pix: convolutions N(0, 0.02), norm weights N(1, 0.02)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
