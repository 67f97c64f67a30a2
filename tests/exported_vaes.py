"""Small VAEs and checkpoints that the tests of exporting share."""

from pathlib import Path

import torch
import yaml

from models.discriminator import PatchGAN
from models.vae import VAE, build_vae
from utils.checkpoint import Checkpoints, Contents
from utils.data.images import u8_to_pm1
from utils.data.registry import open_source

FAMILIES = ["tiny-f8d4", "tiny-f16d32", "tiny-qwen"]


def awake(name: str) -> VAE:
    """A VAE whose zero-initialised layers are random, too."""
    torch.manual_seed(0)
    vae = build_vae(name).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return vae


def checkpoint(run: Path, name: str, stats=True, disc=True) -> Path:
    """A sealed checkpoint with what export reads, inside a run with a config.yaml."""
    vae, channels = awake(name), awake(name).latent_channels
    both = (torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)) if stats else None
    contents = Contents(vae, both, disc=PatchGAN(2, 8) if disc else None)
    run.mkdir(exist_ok=True)
    config = {"vae": {"name": "sdvae", "weights": "/home/me/vae", "optim": {"lr": 2e-5}}}
    config |= {"encoder": {"names": ["dinov2-b"]}, "run": {"batch_size": 256}}
    config |= {"loss": {"reg": {"pixel": 0.5, "lpips_weights": "/home/me/vgg"}}}
    config |= {"disc": {"alone_steps": 0}}  # as an old run has saved it
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return Checkpoints(run).save(1200, contents.write, {"seed": 0})


def digits(side: int, split: str, num: int) -> torch.Tensor:
    """(num, 3, side, side) in [-1, 1]."""
    source = open_source("digits", None, side, split)
    return u8_to_pm1(torch.stack([source[i][0] for i in range(num)]))
