"""Per-channel mean and std of a VAE's latents, by which they are normalised.

They are those of samples z of the posterior, in expectation: E z = E mean, and
E z^2 = E[mean^2 + std^2]. So no noise is drawn. Sums are float64, over all positions and images.
"""

import torch
from torch import Tensor

from models.vae import VAE
from utils.data.base import Source
from utils.data.images import u8_to_pm1
from utils.data.sampling import step_indices
from utils.distributed import Ranks

CHUNK = 32  # images encoded at a time


class ChannelMoments:
    """Running sums for C channels: `sums` is (3, C) float64, the number of positions, the sum of z,
    and the sum of z^2."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(3, channels, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Add posteriors, (N, C, h, w) each."""
        mean, std = mean.to(self.sums), std.to(self.sums)
        self.sums[0] += mean.numel() // mean.shape[1]
        self.sums[1] += mean.sum((0, 2, 3))
        self.sums[2] += (mean.square() + std.square()).sum((0, 2, 3))

    def result(self) -> tuple[Tensor, Tensor]:
        """(mean, std), each (C,) float64."""
        mean, square = self.sums[1:] / self.sums[0]
        return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def measure_latents(
    vae: VAE, source: Source, num: int, seed: int = 0, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """(mean, std) of the latents of `num` images (at most all), drawn by `seed`: each (C,) float64,
    on the device of `vae`. With `ranks`, each rank encodes its share, and all get the result."""
    vae.latent_shape(source.resolution)  # raises if the VAE does not take images of this size
    device = next(vae.parameters()).device
    moments = ChannelMoments(vae.latent_channels, device)
    order = step_indices(len(source), min(num, len(source)), seed, step=0).tolist()
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    for start in range(rank * CHUNK, len(order), world * CHUNK):
        x_u8 = torch.stack([source.take(i)[0] for i in order[start : start + CHUNK]])
        posterior = vae.encode(u8_to_pm1(x_u8.to(device)))
        moments.add(posterior.mean, posterior.std)
    if ranks:
        moments.sums = ranks.sum(moments.sums)
    return moments.result()
