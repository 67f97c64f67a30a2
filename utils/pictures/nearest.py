"""Samples beside the training images that are most like them: does a model copy its training set?

Two images are compared as thumbnails, by the root mean square difference of their pixels in grey
levels (0 .. 255). That finds copies and near copies, mirrored ones too; it does not find the same
object in another place.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.checks.errors import UserError
from utils.evaluation.images.npz_images import ImageSet
from utils.evaluation.images.reader import read_ahead
from utils.evaluation.options import Options
from utils.pictures.grid import Row

SIDE = 16  # pixels of a thumbnail
READ = 64  # images that a thread reads at a time
BLOCK = 256  # thumbnails that are compared at a time
PROBES = 1000  # training images whose own distances are the yardstick
NEAREST = 3  # training images that are shown of each sample


@dataclass
class Nearest:
    """Of N samples, the nearest training images, and what tells whether they are too near.

    distances, indices: (N, NEAREST), nearest first. own: (P,) distances of training images to the
    nearest other one.
    """

    distances: Tensor
    indices: Tensor
    own: Tensor

    @property
    def copies(self) -> Tensor:
        """(N,) bool: nearer to a training image than 99 % of the training images are to others."""
        return self.distances[:, 0] < self.own.quantile(0.01)

    def summary(self) -> str:
        medians = [values.median().item() for values in (self.distances[:, 0], self.own)]
        return (
            f"distance to the nearest training image, median in grey levels: {medians[0]:.1f} of "
            f"samples, {medians[1]:.1f} of other training images; {int(self.copies.sum())} of "
            f"{len(self.distances)} samples are nearer than all but 1 % of the training images"
        )


def find_nearest(samples: ImageSet, training: ImageSet) -> Nearest:
    """`UserError` for sets of another size, or too few training images."""
    if samples.size != training.size:
        sizes = f"{samples.name} has images of {samples.size}, {training.name} of {training.size}"
        raise UserError(f"{sizes}: give the training images at the resolution of the samples")
    if len(training) <= NEAREST:
        raise UserError(f"{training.name} has {len(training)} images: expected more than {NEAREST}")
    known = thumbnails(training)
    distances, indices = nearest_rows(thumbnails(samples), known, NEAREST)
    probes = np.linspace(0, len(known) - 1, min(PROBES, len(known)), dtype=int)
    own, _ = nearest_rows(known[probes], known, 2)  # the first is the image itself
    return Nearest(distances, indices, own[:, 1])


def thumbnails(images: ImageSet) -> Tensor:
    """(N, 3, SIDE, SIDE) float32 in 0 .. 255."""
    blocks = []
    starts = range(0, len(images), READ)
    parts = [(start, min(start + READ, len(images))) for start in starts]
    for x_u8 in read_ahead(images, parts, workers=Options.workers):
        blocks.append(F.adaptive_avg_pool2d(x_u8.float(), SIDE))
    return torch.cat(blocks)


def nearest_rows(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of each thumbnail in `a`, distances and indices (N, k) of the nearest ones in `b`, which
    count as they are or mirrored."""
    both = [each.flatten(1) for each in (b, b.flip(3))]
    found = []
    for block in a.flatten(1).split(BLOCK):
        distances = torch.stack([torch.cdist(block, each) for each in both]).amin(0)
        found.append(distances.topk(k, largest=False))
    scale = both[0].shape[1] ** 0.5
    distances, indices = (torch.cat(parts) for parts in zip(*found))
    return distances / scale, indices


def nearest_row_pictures(
    found: Nearest, samples: ImageSet, training: ImageSet, num: int
) -> list[Row]:
    """The `num` samples that are nearest to a training image, each a row with its neighbours."""
    rows = []
    for i in found.distances[:, 0].argsort()[:num].tolist():
        neighbours = [training.read(j, j + 1) for j in found.indices[i].tolist()]
        pixels = np.concatenate([samples.read(i, i + 1), *neighbours])
        captions = ["", *(f"{d:.1f}" for d in found.distances[i].tolist())]
        panels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        rows.append(Row(f"sample {i}", [], panels, captions))
    return rows
