"""The examples that a run trains on, in the order of its steps."""

from pathlib import Path

from accelerate import Accelerator

from models.errors import UserError
from utils.config import Config
from utils.data import Loader, Source, StepSampler, make_loader, open_source
from utils.latents import CachedSource, LatentCache


def open_training_data(config: Config) -> Source:
    """The source that the config names; `UserError` if its classes are not the expected ones."""
    d = config.data
    source = open_source(d.source, d.path, d.resolution, d.split)
    if d.num_classes not in (None, source.num_classes):
        raise UserError(
            f"data.num_classes={d.num_classes}, but the data has {source.num_classes}: "
            "correct it, or set data.num_classes=null"
        )
    return source


def join_cache(config: Config, source: Source) -> Source:
    """The images with their cached latents, if the config names a cache."""
    if config.data.latents is None:
        return source
    return CachedSource(source, LatentCache(Path(config.data.latents)), config)


def open_loader(config: Config, source: Source, accelerator: Accelerator, first: int) -> Loader:
    """Batches (x_u8, y) of this rank, from step `first` on."""
    sampler = StepSampler(
        len(source),
        config.run.batch_size,
        seed=config.run.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start_step=first,
        end_step=config.run.steps,
    )
    return make_loader(source, sampler, config.data.workers, accelerator.device.type == "cuda")
