"""Images of a SiT and a VAE: one code path for sample_ddp.py and for evaluation in training.

Image i depends on (seed, i) alone: its label, its initial noise and the noise of every SDE step
come from a generator of its own, on the CPU, for any device, batch size or number of ranks.
"""

from dataclasses import dataclass

import torch

from models.errors import UserError
from models.sit import SiT
from models.vae import VAE
from utils.draws import generator
from utils.images import pm1_to_u8
from utils.learner import DTYPES
from utils.samplers import sample


@dataclass(frozen=True)
class Sampling:
    """What the pixels depend on beside the weights; the fields are flags of sample_ddp.py."""

    seed: int = 0
    solver: str = "sde"
    steps: int = 250
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    timestep_shift: float = 1.0
    path: str = "linear"
    class_balanced: bool = False
    precision: str = "bf16"  # of the SiT; the VAE runs in float32
    uint8: str = "round"
    decode_batch_size: int = 16


@torch.no_grad()
def draw_images(
    s: Sampling, sit: SiT, vae: VAE, indices: range, device: torch.device
) -> torch.Tensor:
    """(N, 3, H, W) uint8 on the CPU; `UserError` if a latent is not finite."""
    generators = [generator("sample", s.seed, i) for i in indices]
    side, channels = sit.config.input_size, sit.config.in_channels
    noise = torch.stack([torch.randn(channels, side, side, generator=g) for g in generators])
    y = draw_labels(s, indices, sit.config.num_classes).to(device)
    dtype = DTYPES[s.precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        z_n = sample(
            sit,
            noise.to(device),
            y,
            solver=s.solver,
            steps=s.steps,
            cfg_scale=s.cfg_scale,
            guidance=(s.guidance_low, s.guidance_high),
            path=s.path,
            generator=generators,
            shift=s.timestep_shift,
        )
    if not z_n.isfinite().all():
        which = f"{indices.start}..{indices.stop - 1}"
        raise UserError(f"images {which} are not finite: try --precision fp32, other weights")
    latents = sit.denormalize(z_n).split(s.decode_batch_size)
    return torch.cat([pm1_to_u8(vae.decode(z), s.uint8).cpu() for z in latents])


def draw_labels(s: Sampling, indices: range, num_classes: int) -> torch.Tensor:
    """(N,) int64. Balanced labels run through the classes in turn: a file sorted by class would
    lower the Inception Score of its splits."""
    if s.class_balanced:
        return torch.tensor([i % num_classes for i in indices])
    keys = (generator("label", s.seed, i) for i in indices)
    return torch.cat([torch.randint(num_classes, (1,), generator=g) for g in keys])
