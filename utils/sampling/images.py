"""Images of a SiT and a VAE: one code path for sample_ddp.py and for pictures in training.

Image i depends on (seed, i) alone: its label, its initial noise and the noise of every SDE step
come from a generator of its own, on the CPU, for any device, batch size or number of ranks.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from loss.interpolant import PATHS
from models.errors import UserError
from models.sit import SiT
from models.vae import VAE
from utils.data.images import pm1_to_u8
from utils.precision import autocast
from utils.random import generator
from utils.samplers import sample
from utils.sampling.settings import SamplingSettings

# Part of what identifies samples on disk. Raise it with every change of the rules by which
# `_draw_batch` and `draw_labels` turn (seed, i) into noise and labels.
NOISE_VERSION = 1


@torch.no_grad()
def draw_images(
    settings: SamplingSettings,
    sit: SiT,
    vae: VAE,
    indices: range,
    device: torch.device,
    progress: Callable[[int], None] = lambda num: None,
) -> torch.Tensor:
    """(N, 3, H, W) uint8 on the CPU, made in batches of at most `settings.batch_size`; `progress`
    is told the number of images of each. Raises `UserError` if a latent is not finite."""
    images = []
    for batch in split_evenly(indices, settings.batch_size):
        images.append(_draw_batch(settings, sit, vae, batch, device))
        progress(len(batch))
    return torch.cat(images)


def _draw_batch(
    s: SamplingSettings, sit: SiT, vae: VAE, indices: range, device: torch.device
) -> torch.Tensor:
    generators = [generator("sample", s.seed, i) for i in indices]
    side, channels = sit.config.input_size, sit.config.in_channels
    noise = torch.stack([torch.randn(channels, side, side, generator=g) for g in generators])
    y = draw_labels(s, indices, sit.config.num_classes)
    how = {"solver": s.solver, "steps": s.steps, "path": s.path or PATHS[0]}
    how |= {"cfg_scale": s.cfg_scale, "guidance": (s.guidance_low, s.guidance_high)}
    how |= {"shift": s.timestep_shift, "generator": generators}
    with autocast(device, s.precision):
        z_n = sample(sit, noise.to(device), y.to(device), **how)
    if not z_n.isfinite().all():
        which = f"{indices.start}..{indices.stop - 1}"
        raise UserError(f"images {which} are not finite: try --precision fp32, other weights")
    latents = sit.denormalize(z_n).split(s.decode_batch_size)
    return torch.cat([pm1_to_u8(vae.decode(z), s.uint8).cpu() for z in latents])


def draw_labels(settings: SamplingSettings, indices: range, num_classes: int) -> torch.Tensor:
    """(N,) int64. Balanced labels run through the classes in turn: a file sorted by class would
    lower the Inception Score of its splits."""
    if settings.class_balanced:
        return torch.tensor([i % num_classes for i in indices])
    keys = (generator("label", settings.seed, i) for i in indices)
    return torch.cat([torch.randint(num_classes, (1,), generator=g) for g in keys])


def split_evenly(indices: range, most: int) -> list[range]:
    """Ranges of at most `most` indices whose lengths differ by 1 at most: few shapes to compile."""
    num = -(-len(indices) // most)
    ends = [len(indices) * k // num for k in range(num + 1)]
    return [indices[start:stop] for start, stop in pairwise(ends)]
