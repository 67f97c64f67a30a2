"""How images are named on the command line; imports no torch, so --help is quick."""

import os
import re

from utils.data.registry import SOURCES
from utils.files import expand_path

# how to name images: `image_sets.open_images` reads these
IMAGES = (".npz (arr_0), .npy, a folder of images, a packed folder, or SOURCE[:PATH][@RESOLUTION], "
          "e.g. digits:test@16 or folder:DIR@256")  # fmt: skip
SOURCE_SPEC = re.compile(rf"({'|'.join(SOURCES)})(?::(.+?))?(?:@(\d+))?")
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
