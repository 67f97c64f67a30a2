"""Per-channel mean and std of a VAE's latents, by which they are normalised.

Those of posterior samples in expectation, E z = E mean and E z^2 = E[mean^2 + std^2], so no noise
is drawn; sums in float64, over all positions of all images.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.vae import VAE
from utils.data import Source, step_indices
from utils.images import u8_to_pm1

CHUNK = 32  # images encoded at a time


class ChannelMoments:
    """Running sums: positions, z, z^2; (3, C) float64."""

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(3, channels, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Posteriors (N, C, h, w)."""
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
    vae: VAE,
    source: Source,
    num: int,
    seed: int = 0,
    *,
    rank: int = 0,
    ranks: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[Tensor, Tensor]:
    """(mean, std), each (C,) float64, of the first `num` images (at most all) in the order of
    `seed`, on the device of `vae`; every rank encodes its share."""
    vae.latent_shape(source.resolution)
    device = next(vae.parameters()).device
    found = ChannelMoments(vae.latent_channels, device)
    order = step_indices(len(source), min(num, len(source)), seed, step=0).tolist()
    for start in range(rank * CHUNK, len(order), ranks * CHUNK):
        chosen = order[start : start + CHUNK]
        x_u8 = torch.stack([source[i][0] for i in chosen])
        posterior = vae.encode(u8_to_pm1(x_u8.to(device)))
        found.add(posterior.mean, posterior.std)
    found.sums = sum_over_ranks(found.sums)
    return found.result()
