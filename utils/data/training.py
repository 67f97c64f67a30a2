"""What a run trains on: its images or their cached latents, in the order of its steps."""

from pathlib import Path

from accelerate import Accelerator

from models.checks.errors import UserError
from utils.config.schema import Config
from utils.data.base import BadImages, Source
from utils.data.decoding.conversion import Conversion
from utils.data.labels import ONE_CLASS
from utils.data.latents import CachedSource, LatentCache
from utils.data.registry import open_source
from utils.data.sampling import Loader, StepSampler, make_loader


def open_training_data(config: Config) -> Source:
    """The source that the config names; `UserError` if its classes are not the expected ones. Where
    an image cannot be read, another one takes its place, as `data.max_bad_images` says."""
    d = config.data
    how = Conversion.asked(d.exif, d.depth_range)
    source = open_source(
        d.source, d.path, d.resolution, d.split, conversion=how, labels=d.labels or ONE_CLASS
    )
    if not source.random_access:
        text = f"data.source={d.source} is read in its order only"
        raise UserError(f"{text}; pack it: python scripts/prepare_data.py {d.path} OUT")
    if d.num_classes not in (None, source.num_classes):
        text = f"data.num_classes={d.num_classes}, but the data has {source.num_classes}"
        raise UserError(f"{text}: correct it, or set data.num_classes=null")
    if d.path and source.root is None:
        source.notes = [*source.notes, f"data.source={d.source} does not read data.path={d.path}"]
    source.bad = BadImages(d.max_bad_images)
    return source


def join_cache(config: Config, source: Source) -> Source:
    """The images with their cached latents (a `CachedSource`) if the config names a cache, else the
    images alone. `UserError` if the cache is not of these images and settings."""
    if config.data.latents is None:
        return source
    cache, encoder = LatentCache(Path(config.data.latents)), config.encoder
    cache.check_images(config.data.resolution, config.data.hflip)
    features = config.uses_encoder and encoder.cached
    if features:
        files = encoder.weights or [None] * len(encoder.names)
        cache.check_features(encoder.names, files, config.encoder_grid)
    return CachedSource(source, cache, features, pixels=config.uses_encoder and not features)


def open_loader(
    config: Config,
    source: Source,
    accelerator: Accelerator,
    first: int,
    left_out: frozenset[int] = frozenset(),
) -> Loader:
    """The batches of this rank from step `first` on, without those of the steps `left_out`, as
    `make_loader` describes them."""
    run = config.run
    sampler = StepSampler(
        len(source),
        run.batch_size,
        seed=run.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start_step=first,
        end_step=run.steps,
        left_out=left_out,
    )
    return make_loader(source, sampler, config.data.workers, accelerator.device.type == "cuda")
