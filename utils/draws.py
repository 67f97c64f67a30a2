"""Every random number of a training step, in one object that is handed into the step.

Keyed by (seed, step, rank): nothing to save, so a resumed run draws what an uninterrupted one
would, and a check can hand in draws of its own.
"""

import hashlib
from dataclasses import dataclass, fields

import torch

from loss.interpolant import time_from_normal
from utils.config import Config


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every key, e.g. (seed, step, rank)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class Draws:
    """The randomness of one step on one rank, N images (all micro-batches)."""

    flip: torch.Tensor  # (N,) bool: mirror the image
    posterior_noise: torch.Tensor  # (N, C, h, w): z = mean + std * posterior_noise
    t: torch.Tensor  # (N,) in [0, 1], the same in VAE and SiT phase
    eps: torch.Tensor  # (N, C, h, w), the same in both phases
    drop_label: torch.Tensor  # (N,) bool: replace the label in the SiT phase

    def split(self, parts: int) -> list["Draws"]:
        """Micro-batches, in order."""
        chunks = [getattr(self, f.name).chunk(parts) for f in fields(self)]
        return [Draws(*columns) for columns in zip(*chunks)]


def draw(
    config: Config, step: int, rank: int, latent_shape: tuple[int, ...], device: torch.device
) -> Draws:
    """The draws of `rank` at `step` for latents of `latent_shape` = (N, C, h, w)."""
    g = generator("train", config.run.seed, step, rank, device=device)
    num = latent_shape[0]
    return Draws(
        flip=(torch.rand(num, generator=g, device=device) < 0.5) & config.data.hflip,
        posterior_noise=torch.randn(latent_shape, generator=g, device=device),
        t=_draw_time(config, num, g),
        eps=torch.randn(latent_shape, generator=g, device=device),
        drop_label=torch.rand(num, generator=g, device=device) < config.sit.class_dropout_prob,
    )


def _draw_time(config: Config, num: int, g: torch.Generator) -> torch.Tensor:
    if config.loss.diffusion.time == "uniform":
        return torch.rand(num, generator=g, device=g.device)
    normal = torch.randn(num, generator=g, device=g.device)
    return time_from_normal(normal, config.loss.diffusion.path)
