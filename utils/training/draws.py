"""The random numbers of one training step, in one object that is handed into the step.

Keyed by (seed, step, rank): nothing to save, so a resumed run draws what an uninterrupted one
would, and a test can hand in numbers of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch

from loss.interpolant import time_from_normal
from utils.config.schema import Config
from utils.random import generator


@dataclass
class Draws:
    """The random numbers of one step on one rank, for N images (all micro-batches)."""

    # (N,) bool: mirror the image
    flip: torch.Tensor
    # (N, C, h, w), standard normal: z = mean + std * posterior_noise
    posterior_noise: torch.Tensor
    # (N,) in [0, 1]: time, the same in VAE and SiT phase
    t: torch.Tensor
    # (N, C, h, w), standard normal: diffusion noise, the same in both phases
    eps: torch.Tensor
    # (N,) bool: replace the label by the null label in the SiT phase
    drop_label: torch.Tensor

    def split(self, num: int) -> list["Draws"]:
        """The numbers of `num` micro-batches, in order."""
        chunks = [getattr(self, f.name).chunk(num) for f in fields(self)]
        return [Draws(*columns) for columns in zip(*chunks)]


def drawing(config: Config, rank: int = 0, device: torch.device | str = "cpu") -> Callable:
    """`draw` for the run that `config` describes, on one rank: latent_shape and step are left to be
    given."""
    return partial(
        draw,
        seed=config.run.seed,
        rank=rank,
        device=device,
        hflip=config.data.hflip,
        time=config.loss.diffusion.time,
        path=config.loss.diffusion.path,
        class_dropout_prob=config.sit.class_dropout_prob,
    )


def draw(
    latent_shape: tuple[int, ...],
    *,
    seed: int,
    step: int,
    rank: int = 0,
    device: torch.device | str = "cpu",
    hflip: bool = False,
    time: str = "uniform",
    path: str = "linear",
    class_dropout_prob: float = 0.1,
) -> Draws:
    """Draw for latents of `latent_shape` = (N, C, h, w).

    `time` is "uniform" or "lognormal" (which depends on the `path`); without `hflip` no image is
    mirrored. Every number is drawn whatever the settings, so that one setting does not change the
    stream of another.
    """
    g = generator("train", seed, step, rank, device=device)
    num = latent_shape[0]
    return Draws(
        flip=(torch.rand(num, generator=g, device=device) < 0.5) & hflip,
        posterior_noise=torch.randn(latent_shape, generator=g, device=device),
        t=_draw_time(num, time, path, g),
        eps=torch.randn(latent_shape, generator=g, device=device),
        drop_label=torch.rand(num, generator=g, device=device) < class_dropout_prob,
    )


def _draw_time(num: int, time: str, path: str, g: torch.Generator) -> torch.Tensor:
    if time == "uniform":
        return torch.rand(num, generator=g, device=g.device)
    return time_from_normal(torch.randn(num, generator=g, device=g.device), path)
