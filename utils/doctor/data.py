"""Checks of the training data: it opens, its classes and number fit, a few images can be read."""

from collections.abc import Generator, Iterator
from pathlib import Path

from models.checks.errors import UserError
from utils.config.schema import Config
from utils.data.base import EncodedSource, Source, cautions, describe
from utils.data.images import open_image
from utils.data.latents import CachedSource
from utils.data.training import join_cache
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.training.plan import open_data

SAMPLED = 8  # images that are read


@check("data")
def check_source(c: Config) -> Generator[Finding, None, Source | None]:
    """The source opens, with the expected classes and enough images; returns it."""
    d = c.data
    try:
        source = open_data(c)
    except UserError as error:
        if d.source != "packed" or not d.path or Path(d.path).expanduser().is_dir():
            raise
        command = f"python scripts/prepare_data.py IMAGES {d.path} --resolution {d.resolution}"
        raise UserError(f"{error}, or make it: {command}") from None
    yield ok(f"{describe(source)}; {d.source} {d.path or d.split}")
    yield from map(warn, cautions(source))
    return source


@check("latents")
def check_latents(c: Config, source: Source | None) -> Iterator[Finding]:
    """Cached latents belong to these images and hold what the config asks for."""
    if c.data.latents is None or source is None:
        return
    joined = join_cache(c, source)
    assert isinstance(joined, CachedSource)
    made_by = joined.cache.meta.vae
    yield ok(f"{c.data.latents}, made by {made_by}; its weights are compared at the start")


@check("images")
def check_images(source: Source | None) -> Iterator[Finding]:
    """A few images, spread over the set, can be read and are not smaller than asked for."""
    if source is None:
        return
    last, problems, sides = len(source) - 1, [], []
    chosen = sorted({last * i // (SAMPLED - 1) for i in range(SAMPLED)})
    for i in chosen:
        try:
            source[i]
            if isinstance(source, EncodedSource):  # other sources hold images cut to size
                with open_image(source.encoded(i), source.where(i)) as image:
                    sides.append(min(image.size))
        except UserError as error:
            problems.append(error)
    small = sum(side < source.resolution for side in sides)
    if problems:
        yield fail(f"{len(problems)} of {len(chosen)} sampled fail; the first: {problems[0]}")
    elif small:
        yield warn(
            f"{small} of {len(chosen)} sampled are smaller than {source.resolution} px (down to "
            f"{min(sides)}) and would be enlarged: lower data.resolution, or leave them out"
        )
    else:
        more = f"; {min(sides)} px or more" if sides else ""
        yield ok(f"{len(chosen)} sampled can be read{more}")
