"""How images are named on the command line; imports no torch, so --help is quick."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from utils.data.decoding.conversion import PLAIN, Conversion
from utils.data.registry import SOURCES
from utils.files import expand_path

if TYPE_CHECKING:
    from utils.config.schema import DataConfig

# how to name images: `image_sets.open_images` reads these
IMAGES = (".npz (arr_0), .npy, a folder of images, a packed folder, or SOURCE[:PATH][@RESOLUTION]"
          "[,split=NAME][,exif][,depth_range=LO-HI], "
          "e.g. digits:test@16 or folder:DIR@256")  # fmt: skip
# behind a comma, what the settings data.split, data.exif and data.depth_range say in a run
CHOICES = r"(?:,split=(\w+))?(,exif)?(?:,depth_range=(\d+)-(\d+))?"
SOURCE_SPEC = re.compile(rf"({'|'.join(SOURCES)})(?::(.+?))?(?:@(\d+))?{CHOICES}")
WITHOUT_PATH = ("digits", "synthetic")  # sources that read no folder


def path_of(spec: str | None) -> str | None:
    """The file or folder that a spec names, if it may name one: DIR of folder:DIR@256."""
    match = SOURCE_SPEC.fullmatch(spec or "")
    if not match or os.path.exists(spec or ""):
        return spec
    return expand_path(match[2]) if match[2] and match[1] not in WITHOUT_PATH else None


def is_source(spec: str) -> bool:
    """Whether a spec names a data source of training, e.g. digits:test@16, and not a file."""
    return SOURCE_SPEC.fullmatch(spec) is not None


def spec_of(
    name: str, place: str | Path | None, resolution: int, split: str = "all",
    conversion: Conversion = PLAIN,
) -> str:  # fmt: skip
    """The spec of a data source. `place`: its path, or the split of one that needs no path."""
    parts = [f"{':'.join(filter(None, (name, str(place or ''))))}@{resolution}"]
    parts += [f"split={split}"] if split != "all" else []
    parts += ["exif"] if conversion.exif else []
    if conversion.depth_range:
        parts.append("depth_range={}-{}".format(*conversion.depth_range))
    return ",".join(parts)


def spec_of_data(d: DataConfig) -> str:
    """The spec of the images that a run trains on."""
    how = Conversion.asked(d.exif, d.depth_range)
    if d.source in WITHOUT_PATH:
        return spec_of(d.source, d.split, d.resolution)
    return spec_of(d.source, d.path, d.resolution, d.split, how)
