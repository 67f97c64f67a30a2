"""Pictures of random pixels for the tests of this folder."""

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (20, 28)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), "u1"))


def fill(root, names):
    """A picture under each name below `root`; returns `root`."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)
    return root
