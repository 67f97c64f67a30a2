"""Generators of torch as seeds, and the noise of the images that they mean.

Image i of seed s is the same for any batch size and device (utils/sampling/noise.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.checks.errors import UserError
from utils.sampling.noise import ImageNoise


def seeds_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, num: int
) -> int | list[int]:
    """The seed whose images 0 ... num - 1 are meant, or for a list of generators that of each."""
    if generator is None:
        return int(torch.randint(2**63 - 1, ()))
    if isinstance(generator, torch.Generator):
        return seed_of(generator)
    several = list(generator) if isinstance(generator, list | tuple) else []
    if not several or not all(isinstance(g, torch.Generator) for g in several):
        text = "expected torch.Generator().manual_seed(0), or a list of such"
        raise UserError(f"generator={generator!r}: {text}")
    if len(several) != num:
        raise UserError(f"generator: a list of {len(several)} for {num} images; give one for each")
    return [seed_of(g) for g in several]


def seed_of(generator: torch.Generator) -> int:
    """The seed of a generator that nothing was drawn from; of another one, a new seed that it
    draws. It is no longer fresh afterwards."""
    seed = generator.initial_seed()
    as_seeded = torch.Generator(generator.device).manual_seed(seed)
    fresh = torch.equal(generator.get_state(), as_seeded.get_state())
    drawn = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return seed if fresh else int(drawn)


def noise_of(
    seeds: int | list[int], batch: range, device: torch.device
) -> ImageNoise | SeveralSeeds:
    """The noise of the images `batch` of what `seeds_of` gave, for `utils.samplers.sample`."""
    if isinstance(seeds, int):
        return ImageNoise(seeds, batch, device)
    return SeveralSeeds(seeds[batch.start : batch.stop], device)


class SeveralSeeds:
    """The noise of image 0 of each seed."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.parts = [ImageNoise(seed, range(1), device) for seed in seeds]

    def start(self, *shape: int) -> torch.Tensor:
        """(N, *shape) float32: the noise at time 1."""
        return torch.cat([part.start(*shape) for part in self.parts])

    def __call__(self, x: torch.Tensor, draw: int) -> torch.Tensor:
        """Number `draw` = 1, 2, ... of x's shape (N, ...) and dtype."""
        rows = x.split(1)
        return torch.cat([part(row, draw) for part, row in zip(self.parts, rows)])
