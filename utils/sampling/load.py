"""A checkpoint that is sampled from: sit_ema/ and vae/, and nothing else of it."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loss.interpolant import PATHS
from models.checks.errors import UserError, printable
from models.sit import SiT, load_sit, read_sit_config
from models.vae import VAE, build_vae, load_vae
from utils.checkpoint import SIT_EMA, VAE_FOLDER
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
from utils.sampling.labels import labels_of, readable_names, short_name
from utils.sampling.locate import require_checkpoint
from utils.sampling.settings import SamplingSettings, flag_of
from utils.sealed import STATE, CheckpointState, ModelIndex, read_model_index, read_state_json


@dataclass(frozen=True)
class SampledCheckpoint:
    """A checkpoint as it will be sampled from, before its networks are loaded."""

    folder: Path
    settings: SamplingSettings  # with the path of the run and the chosen labels filled in
    resolution: int  # side of the images in pixels
    num_classes: int
    weights: dict[str, str]  # sha256 of every file that is loaded, by its name in the folder
    names: tuple[str, ...] = ()  # of the classes, readable; "" where it is not known

    def identity(self, num_samples: int) -> dict[str, Any]:
        """All that the first `num_samples` images depend on, for JSON."""
        facts = {"num_samples": num_samples, "noise_version": NOISE_VERSION}
        facts |= {"resolution": self.resolution, "num_classes": self.num_classes}
        return self.settings.that_decide_pixels() | facts | {"weights": self.weights}

    def titles(self, y: torch.Tensor) -> list[str]:
        """What to write beside images with the labels (N,)."""
        names = self.names or [""] * self.num_classes
        short = [printable(short_name(name, label)) for label, name in enumerate(names)]
        times = Counter(short)  # ImageNet has two cranes
        return [short[i] if times[short[i]] == 1 else f"{short[i]} ({i})" for i in y.tolist()]


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


def open_checkpoint(
    folder: Path, settings: SamplingSettings, classes: Sequence[str] = ()
) -> SampledCheckpoint:
    """Read the configs and hash the weights of a checkpoint. `classes`: those of --classes, see
    `labels_of`; none = all. Raises `UserError` if the checkpoint is not whole, or cannot do what
    `settings` and `classes` ask for."""
    require_checkpoint(folder)
    state = read_state_json(folder) if os.path.lexists(folder / STATE) else CheckpointState()
    if (state.source or {}).get("predicts"):
        why = "was imported from a DiT, which predicts noise, not velocity"
        raise UserError(f"{folder} {why}: it can start a run (run.init_from), not be sampled")
    weights = hash_weights(folder, state)
    sit = read_sit_config(folder / SIT_EMA)
    if settings.cfg_scale != 1 and not sit["class_dropout_prob"]:
        text = f"--cfg-scale {settings.cfg_scale}: this SiT was trained without a null label"
        raise UserError(f"{text}; leave it 1")
    if settings.cfg_channels > sit["in_channels"]:
        text = f"--cfg-channels {settings.cfg_channels}: the latents of this SiT have"
        raise UserError(f"{text} {sit['in_channels']} channels; 0 = all")
    with torch.device("meta"):
        vae = build_vae(str(folder / VAE_FOLDER))
    if vae.latent_channels != sit["in_channels"]:
        raise UserError(
            f"--checkpoint {folder}: {SIT_EMA}/ makes latents of {sit['in_channels']} channels, "
            f"{VAE_FOLDER}/ decodes {vae.latent_channels}; put the VAE there that it was made for"
        )
    index, num_classes = read_model_index(folder), sit["num_classes"]
    names = names_of_classes(state, index, num_classes)
    settings = replace(settings, path=settings.path or state.path or index.path or PATHS[0])
    if classes:
        settings = replace(settings, classes=labels_of(classes, state.classes or names, names))
    resolution = sit["input_size"] * vae.downsample_factor
    return SampledCheckpoint(folder, settings, resolution, num_classes, weights, tuple(names))


def hash_weights(folder: Path, state: CheckpointState) -> dict[str, str]:
    """sha256 of every file that is loaded, by its name; `UserError` if `state` knows another."""
    files = [p for name in (SIT_EMA, VAE_FOLDER) for p in files_below(folder / name)]
    try:
        weights = {str(p.relative_to(folder)): sha256_file(p) for p in files}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): repair it") from None
    for name, digest in weights.items():
        if state.files.get(name, digest) != digest:
            raise UserError(f"{folder / name} is not as it was saved: copy the checkpoint again")
    return weights


def names_of_classes(state: CheckpointState, index: ModelIndex, num_classes: int) -> list[str]:
    """Readable names of the classes of a checkpoint; "" where it is not known."""
    if index.id2label:
        return [index.id2label.get(str(label), "") for label in range(num_classes)]
    # state.json may know fewer than the SiT: data.num_classes
    return readable_names([*(state.classes or ()), *[""] * num_classes][:num_classes])


def check_balance(settings: SamplingSettings, num_samples: int, num_classes: int) -> None:
    """Raise `UserError` if classes shall be balanced and cannot be."""
    if settings.class_balanced and num_samples % num_classes:
        text = f"--num-samples {num_samples} does not split evenly over {num_classes} classes"
        raise UserError(f"--class-balanced: {text}: give a multiple")
    if settings.classes and num_samples % (chosen := len(settings.classes)):
        text = f"--num-samples {num_samples} does not split evenly over the {chosen} of --classes"
        raise UserError(f"{text}: give a multiple, or --per-class")


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
