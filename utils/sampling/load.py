"""A checkpoint that is sampled from: sit_ema/ and vae/, and nothing else of it."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loss.interpolant import PATHS
from models.errors import UserError, what_is
from models.sit import SiT, load_sit, read_sit_config
from models.vae import VAE, build_vae, load_vae
from models.weights import CONFIG
from utils.checkpoint import SIT_EMA, VAE_FOLDER, Checkpoints
from utils.compilation import compile_network
from utils.files import files_below, sha256_file
from utils.precision import (
    DTYPES,
    allow_tf32,
    cast_weights,
    effective_precision,
    emulation_note,
    to_channels_last,
)
from utils.sampling.images import NOISE_VERSION
from utils.sampling.settings import SamplingSettings, flag_of
from utils.sealed import STATE, CheckpointState, read_state_json


@dataclass(frozen=True)
class SampledCheckpoint:
    """A checkpoint as it will be sampled from, before its networks are loaded."""

    folder: Path
    settings: SamplingSettings  # with the path of the run filled in
    resolution: int  # side of the images in pixels
    num_classes: int
    weights: dict[str, str]  # sha256 of every file that is loaded, by its name in the folder

    def identity(self, num_samples: int) -> dict[str, Any]:
        """All that the first `num_samples` images depend on, for JSON."""
        facts = {"num_samples": num_samples, "noise_version": NOISE_VERSION}
        facts |= {"resolution": self.resolution, "num_classes": self.num_classes}
        return self.settings.that_decide_pixels() | facts | {"weights": self.weights}


def settings_for(device: torch.device, settings: SamplingSettings) -> SamplingSettings:
    """The settings with precisions that `device` has, as they decide pixels and are recorded; a
    line tells of each change."""
    for name in ("precision", "decode_precision"):
        asked = getattr(settings, name)
        if asked not in DTYPES:  # "tf32", or that of the process
            continue
        if note := emulation_note(asked, device):
            print(f"{flag_of(name)} {asked}: {note}")
        settings = replace(settings, **{name: effective_precision(asked, device)})
    return settings


def open_checkpoint(folder: Path, settings: SamplingSettings) -> SampledCheckpoint:
    """Read the configs and hash the weights of a checkpoint. Raises `UserError` if it is not whole,
    or cannot do what `settings` ask for."""
    require_checkpoint(folder)
    state = read_state_json(folder) if os.path.lexists(folder / STATE) else CheckpointState()
    files = [p for name in (SIT_EMA, VAE_FOLDER) for p in files_below(folder / name)]
    try:
        weights = {str(p.relative_to(folder)): sha256_file(p) for p in files}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): repair it") from None
    for name, digest in weights.items():
        if state.files.get(name, digest) != digest:
            raise UserError(f"{folder / name} is not as it was saved: copy the checkpoint again")
    sit = read_sit_config(folder / SIT_EMA)
    if settings.cfg_scale != 1 and not sit["class_dropout_prob"]:
        text = f"--cfg-scale {settings.cfg_scale}: this SiT was trained without a null label"
        raise UserError(f"{text}; leave it 1")
    with torch.device("meta"):
        vae = build_vae(str(folder / VAE_FOLDER))
    if vae.latent_channels != sit["in_channels"]:
        raise UserError(
            f"--checkpoint {folder}: {SIT_EMA}/ makes latents of {sit['in_channels']} channels, "
            f"{VAE_FOLDER}/ decodes {vae.latent_channels}; put the VAE there that it was made for"
        )
    settings = replace(settings, path=settings.path or state.path or PATHS[0])
    resolution = sit["input_size"] * vae.downsample_factor
    return SampledCheckpoint(folder, settings, resolution, sit["num_classes"], weights)


def require_checkpoint(folder: Path) -> None:
    """`UserError` unless `folder` can be a checkpoint that is sampled from; for the folder of a run
    it names the newest one in it."""
    example = f"name a folder with {SIT_EMA}/ and {VAE_FOLDER}/, like exps/NAME/checkpoints/0400000"
    if (found := what_is(folder)) != "a folder":
        found = "no such folder" if found == "absent" else f"it is {found}"
        raise UserError(f"--checkpoint {folder}: {found}; {example}")
    missing = [n for n in (SIT_EMA, VAE_FOLDER) if not (folder / n / CONFIG).is_file()]
    if not missing:
        return
    config = folder / missing[0] / CONFIG
    if (found := what_is(config)) != "absent":
        raise UserError(f"{config} is {found}, expected a JSON file: copy the checkpoint again")
    run = folder.parent if folder.name == "checkpoints" else folder
    if folder.name in (SIT_EMA, VAE_FOLDER) and (folder / CONFIG).is_file():
        example = f"name the folder around it, {folder.parent}"
    elif newest := Checkpoints(run).latest(report=lambda _: None, read_all=False):
        example = f"that is a run; its newest checkpoint is {newest}"
    raise UserError(f"--checkpoint {folder} has no {missing[0]}/ with a {CONFIG}: {example}")


def check_balance(settings: SamplingSettings, num_samples: int, num_classes: int) -> None:
    """Raise `UserError` if classes shall be balanced and cannot be."""
    if settings.class_balanced and num_samples % num_classes:
        text = f"--num-samples {num_samples} does not split evenly over {num_classes} classes"
        raise UserError(f"--class-balanced: {text}: give a multiple")


def load_networks(
    checkpoint: Path, settings: SamplingSettings, device: torch.device
) -> tuple[SiT, VAE]:
    """EMA SiT and VAE of a checkpoint, as `prepare_networks` makes them."""
    sit = load_sit(checkpoint / SIT_EMA)
    return prepare_networks(sit, load_vae(str(checkpoint / VAE_FOLDER)), settings, device)


def prepare_networks(
    sit: Any, vae: VAE, settings: SamplingSettings, device: torch.device
) -> tuple[SiT, VAE]:
    """The SiT in the sampling precision, without its projectors, and the VAE in float32, both
    frozen, on a GPU with convolutions in NHWC. Sets TF32 for the process, as `settings` say."""
    allow_tf32(settings.tf32)
    sit.projectors = torch.nn.ModuleList()
    cast_weights(sit, settings.precision)
    for net in (sit, vae):
        net.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        to_channels_last(vae)
    if settings.compile:
        compile_network(sit)
        compile_network(vae, "decode")
    return sit, vae
