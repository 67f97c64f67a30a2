"""How images are named on the command line; imports no torch, so --help is quick."""

import re

from utils.data.registry import SOURCES

# how to name images: `image_sets.open_images` reads these
IMAGES = (".npz (arr_0), .npy, a folder of images, a packed folder, or SOURCE[:PATH][@RESOLUTION], "
          "e.g. digits:test@16 or folder:DIR@256")  # fmt: skip
SOURCE_SPEC = re.compile(rf"({'|'.join(SOURCES)})(?::(.+?))?(?:@(\d+))?")


def is_source(spec: str) -> bool:
    """Whether a spec names a data source of training, e.g. digits:test@16, and not a file."""
    return SOURCE_SPEC.fullmatch(spec) is not None
