"""Images of a SiT and a VAE: one code path for sample_ddp.py and for pictures in training.

Image i depends on (seed, i) alone: its label, its initial noise and the noise of every SDE step
(utils/sampling/noise.py) are the same for any batch size or number of ranks.

On a GPU nothing here waits for it: `begin_images` returns as soon as all work is in its queue, and
images and checks are copied into pinned memory meanwhile. Who wants them asks for the `result`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from loss.interpolant import PATHS
from models.checks.errors import UserError
from models.sit import SiT
from models.vae import VAE
from utils.data.images import pm1_to_u8
from utils.precision import autocast, tf32_inside
from utils.random import generator
from utils.samplers import copy_without_wait, sample
from utils.sampling.noise import ImageNoise
from utils.sampling.settings import SamplingSettings

# Part of what identifies samples on disk. Raise it with every change of the rules by which
# `ImageNoise` and `draw_labels` turn (seed, i) into noise and labels, and say so in CHANGELOG.md.
NOISE_VERSION = 2


@dataclass
class DrawnImages:
    """Images that a device may still be computing."""

    device: torch.device
    parts: list[torch.Tensor] = field(default_factory=list)  # (n, 3, H, W) uint8 on the CPU
    # indices of a batch, and whether all its latents are finite, a boolean on the CPU
    finite: list[tuple[range, torch.Tensor]] = field(default_factory=list)
    ready: torch.cuda.Event | None = None

    def done(self) -> None:
        """To be called when all work is in the device's queue."""
        if self.device.type == "cuda" and torch.cuda.is_available():
            self.ready = torch.cuda.Event(blocking=True)
            self.ready.record(torch.cuda.current_stream(self.device))

    def result(self, must_be_finite: bool = True) -> torch.Tensor:
        """(N, 3, H, W) uint8 on the CPU. Raises `UserError` if a latent is not finite, and must."""
        if self.ready:
            self.ready.synchronize()
        for i, finite in self.finite:
            if must_be_finite and not finite:
                which = f"{i.start}..{i.stop - 1}"
                raise UserError(
                    f"images {which} are not finite: try --precision fp32, other weights"
                )
        return torch.cat(self.parts)


def draw_images(
    settings: SamplingSettings,
    sit: SiT,
    vae: VAE,
    indices: range,
    device: torch.device,
    progress: Callable[[int], None] = lambda num: None,
) -> torch.Tensor:
    """The result of `begin_images`: (N, 3, H, W) uint8 on the CPU."""
    return begin_images(settings, sit, vae, indices, device, progress).result()


@torch.no_grad()
def begin_images(
    settings: SamplingSettings,
    sit: SiT,
    vae: VAE,
    indices: range,
    device: torch.device,
    progress: Callable[[int], None] = lambda num: None,
) -> DrawnImages:
    """Make images in batches of at most `settings.batch_size`; `progress` is told the number of
    images of each as soon as the device has been told of it."""
    drawn = DrawnImages(device)
    for batch, new in batches_of(indices, settings.batch_size, equal=settings.compile):
        latents = _draw_latents(settings, sit, batch, device)
        x_u8 = _decode(settings, vae, latents, device)[new.start - batch.start :][: len(new)]
        # into pinned memory, which the GPU fills later
        finite = latents.isfinite().all().to("cpu", non_blocking=True)
        drawn.finite.append((new, finite))
        drawn.parts.append(x_u8.to("cpu", non_blocking=True))
        progress(len(new))
    drawn.done()
    return drawn


def _draw_latents(
    s: SamplingSettings, sit: SiT, indices: range, device: torch.device
) -> torch.Tensor:
    """(N, C, h, w) float32, as the VAE decodes them."""
    noise, side = ImageNoise(s.seed, indices, device), sit.config.input_size
    y = copy_without_wait(draw_labels(s, indices, sit.config.num_classes), device)
    how = {"solver": s.solver, "steps": s.steps, "path": s.path or PATHS[0]}
    how |= {"cfg_scale": s.cfg_scale, "guidance": (s.guidance_low, s.guidance_high)}
    how |= {"cfg_channels": s.cfg_channels, "heun_guidance": s.heun_guidance}
    how |= {"shift": s.timestep_shift, "generator": noise}
    with autocast(device, s.precision):
        z_n = sample(sit, noise.start(sit.config.in_channels, side, side), y, **how)
    return sit.denormalize(z_n)


def _decode(
    s: SamplingSettings, vae: VAE, latents: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """(N, C, h, w) => (N, 3, H, W) uint8, both on the device."""
    parts, rows = [], range(len(latents))
    with decoding(s.decode_precision, device):
        for batch, new in batches_of(rows, s.decode_batch_size, equal=s.compile):
            x = vae.decode(latents[batch.start : batch.stop])[new.start - batch.start :]
            parts.append(pm1_to_u8(x[: len(new)], s.uint8))
    return torch.cat(parts)


def decoding(precision: str | None, device: torch.device) -> AbstractContextManager:
    """What the VAE decodes in; None: float32, with TF32 or not as the process is set."""
    if precision is None:
        return nullcontext()
    if precision in ("fp32", "tf32"):
        return tf32_inside(precision == "tf32")
    return autocast(device, precision)


def draw_labels(settings: SamplingSettings, indices: range, num_classes: int) -> torch.Tensor:
    """(N,) int64. Balanced labels run through the classes in turn, chosen ones through these: a
    file sorted by class would lower the Inception Score of its splits."""
    if settings.classes:
        return torch.tensor([settings.classes[i % len(settings.classes)] for i in indices])
    if settings.class_balanced:
        return torch.tensor([i % num_classes for i in indices])
    keys = (generator("label", settings.seed, i) for i in indices)
    return torch.cat([torch.randint(num_classes, (1,), generator=g) for g in keys])


def batches_of(indices: range, most: int, equal: bool) -> list[tuple[range, range]]:
    """Batches of at most `most` indices, each with the part of it that is new: all of it, unless
    the batches are to be `equal`ly long, for compiled networks; then they overlap where their
    number does not divide that of the indices."""
    parts = split_evenly(indices, most)
    if not equal:
        return [(part, part) for part in parts]
    length = max(map(len, parts), default=0)
    starts = [min(part.start, indices.stop - length) for part in parts]
    return [(range(start, start + length), part) for start, part in zip(starts, parts)]


def split_evenly(indices: range, most: int) -> list[range]:
    """Ranges of at most `most` indices whose lengths differ by 1 at most."""
    num = -(-len(indices) // most)
    ends = [len(indices) * k // num for k in range(num + 1)]
    return [indices[start:stop] for start, stop in pairwise(ends)]
