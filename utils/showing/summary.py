"""The block of facts that a run begins with, and that --dry-run prints."""

from __future__ import annotations

import torch
import torch.nn as nn

from models.checks.errors import printable
from models.sit import SiT
from models.weights.loading import count
from utils.config.schema import Config
from utils.data.base import SHOWN_CLASSES, Source
from utils.distributed import default_device
from utils.precision import effective_precision
from utils.provenance import device_name
from utils.sampling.labels import readable_names


def print_block(facts: dict[str, str]) -> None:
    """One line for each fact, the values in a column."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:>{width}}: {value}", flush=True)


def describe_run(c: Config, plan, ranks: int) -> dict[str, str]:
    """Device, data, shapes and length of a run on `ranks` ranks; `plan`: what
    `utils.training.plan.check_run` found (a Plan)."""
    nets, source, start, device = plan.nets, plan.source, plan.start, default_device()
    vae = f"{c.vae.name}, {f'weights: {c.vae.weights}' if c.vae.weights else 'from scratch'}"
    vae = f"that of {start.origin}" if start.origin else vae
    new = f"a new run with the weights of {start.origin}" if start.origin else "a new run"
    begins = f"{start.checkpoint}, step {start.step:,}" if start.checkpoint else new
    return {
        "device": f"{device_name(device)}, {ranks} rank{'s' * (ranks > 1)}",
        "precision": precision(c, device),
        **describe_data(c, source, nets.sit.config.num_classes),
        "VAE": vae,
        "latents": "x".join(map(str, nets.vae.latent_shape(c.data.resolution))),
        "tokens": f"{nets.sit.grid}x{nets.sit.grid} = {nets.sit.grid**2}",
        "encoders": ", ".join(c.encoder.names) if c.uses_encoder else "none",
        "parameters": parameters(nets.vae, nets.sit, nets.disc),
        "trained": ", ".join(["VAE"] * c.vae.train + ["SiT"] + ["discriminator"] * c.uses_disc),
        "global batch": f"{c.run.batch_size} = {plan.rank_batch // c.run.accumulation} per rank x "
        f"{ranks} rank(s) x {c.run.accumulation} micro-batch(es)",
        **length(c, source),
        "begins with": begins,
        "output": str(c.run_dir),
    }


def precision(c: Config, device: torch.device) -> str:
    """The number format that `device` computes in, and the one that was asked for."""
    used = effective_precision(c.run.precision, device)
    text = used if used == c.run.precision else f"{used} (run.precision={c.run.precision})"
    return f"{text}, TF32 in float32" if c.run.tf32 and device.type == "cuda" else text


def describe_data(c: Config, source: Source | None, num_classes: int) -> dict[str, str]:
    """Number and size of the images, number and first names of the classes."""
    pixels = f"{c.data.resolution} px"
    if source is None:
        images = f"none at {c.data.path} yet, {pixels}"
        return {"images": images, "classes": f"{num_classes:,}, which is assumed"}
    place = f"{c.data.source}:{c.data.path or c.data.split}"
    cached = f", latents of {c.data.latents}" if c.data.latents else ""
    names = [printable(name) for name in readable_names(source.classes[:SHOWN_CLASSES])]
    first = [name.split(",")[0] for name in names]  # of WordNet's synonyms
    more = ", ..." if source.num_classes > len(first) else ""
    return {
        "images": f"{len(source):,} of {pixels}, {place}{cached}",
        "classes": f"{source.num_classes:,}: {', '.join(first)}{more}",
    }


def length(c: Config, source: Source | None) -> dict[str, str]:
    """Steps, and with known data epochs."""
    images = c.run.steps * c.run.batch_size
    steps = f"{c.run.steps:,} ({images:,} images)"
    if source is None:
        return {"steps": steps, "steps per epoch": "unknown"}
    epochs = f"{images / len(source):,.3g} epochs"
    if images >= 1000 * len(source):
        epochs = f"{images // len(source):,} epochs"
    per_epoch = len(source) // c.run.batch_size
    return {"steps": f"{steps[:-1]}, {epochs})", "steps per epoch": f"{per_epoch:,}"}


def parameters(vae: nn.Module, sit: SiT, disc: nn.Module | None) -> str:
    """Number of parameters of each network, in words."""
    projectors = count(sit.projectors)
    text = f"SiT {count(sit) - projectors:,} + projectors {projectors:,}, VAE {count(vae):,}"
    return text + (f", discriminator {count(disc):,}" if disc else "")
