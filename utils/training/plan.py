"""What a run will be, before anything is loaded: what --dry-run prints."""

import torch.nn as nn

from models.errors import UserError
from utils.config.load import to_yaml
from utils.config.schema import Config, per_rank_batch
from utils.data.base import Source
from utils.data.registry import source_class
from utils.data.training import join_cache, open_training_data
from utils.distributed import launched_ranks
from utils.evaluation.metrics import METRICS, select_metrics
from utils.training.networks import Networks, count, skeleton


def print_plan(c: Config) -> None:
    """--dry-run: the resolved config and what follows from it. Needs neither weights nor data."""
    source_class(c.data.source, c.data.split)
    if c.eval.every:
        select_metrics(METRICS, tuple(c.eval.metrics))
    source, note = None, ""
    try:
        source = open_training_data(c)
    except UserError as error:
        note = f"note: {error}"
    if source:
        join_cache(c, source)
    print(to_yaml(c))
    for name, value in describe_run(c, source, launched_ranks()).items():
        print(f"{name:>16}: {value}")
    if note:
        print(note)


def check_shapes(c: Config, num_classes: int, ranks: int) -> tuple[Networks, int]:
    """The networks of a run without numbers, and the images of one rank in a step. Loads nothing.

    Raises `UserError` where the shapes of the networks do not meet or the batch does not split.
    """
    rank_batch = per_rank_batch(c, ranks)
    return skeleton(c, num_classes), rank_batch


def describe_run(c: Config, source: Source | None, ranks: int) -> dict[str, str]:
    """Batch, steps, shapes and parameters of a run on `ranks` ranks; `source` None = no data here.

    Raises `UserError` where the batch does not split or the shapes of the networks do not meet.
    """
    classes = source.num_classes if source else c.data.num_classes or 1000
    nets, rank_batch = check_shapes(c, classes, ranks)
    epoch = (
        f"{len(source) // c.run.batch_size:,}" if source else f"unknown: no data at {c.data.path}"
    )
    return {
        "global batch": f"{c.run.batch_size} = {rank_batch // c.run.accumulation} per rank x "
        f"{ranks} rank(s) x {c.run.accumulation} micro-batch(es)",
        "steps per epoch": epoch,
        "steps": f"{c.run.steps:,} ({c.run.steps * c.run.batch_size:,} images)",
        "classes": str(classes) + ("" if source else " (assumed: data not found)"),
        "latents": "x".join(map(str, nets.vae.latent_shape(c.data.resolution))),
        "tokens": f"{nets.sit.grid}x{nets.sit.grid} = {nets.sit.grid**2}",
        "encoders": ", ".join(c.encoder.names) if c.uses_encoder else "none",
        "parameters": parameters(nets.vae, nets.sit, nets.disc),
        "trained": ", ".join(["VAE"] * c.vae.train + ["SiT"] + ["discriminator"] * c.uses_disc),
    }


def parameters(vae: nn.Module, sit: nn.Module, disc: nn.Module | None) -> str:
    """Number of parameters of each network, in words."""
    projectors = count(sit.projectors)
    text = f"SiT {count(sit) - projectors:,} + projectors {projectors:,}, VAE {count(vae):,}"
    return text + (f", discriminator {count(disc):,}" if disc else "")
