"""From images to the statistics of their features: one pass, any number of ranks.

Ranks share a set by global index: batch b of the set belongs to rank b % world, nothing is padded
or seen twice. In memory are three float64 tensors per feature, and on the main process the feature
of every image (a row, float32), but only where a metric or a covariance without full rank needs it.
"""

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch

from utils.distributed import Ranks
from utils.evaluation.formulas.frechet import Moments, Statistics, frechet_between
from utils.evaluation.images.image_sets import ImageSet, read_ahead
from utils.evaluation.networks import FeatureNet

HALF_SEED = 0  # of the split of a reference into two halves


class Collector:
    """Gathers one feature over the batches of a set; every rank calls `add` equally often.
    `keep_rows`: whether the rows are needed in any case; `halves`: whether `floor` is measured."""

    def __init__(self, total: int, dim: int, ranks: Ranks, *, keep_rows: bool, halves: bool):
        self.total, self.ranks, self.filled = total, ranks, 0
        # whether an image belongs to the second half: random, but the same everywhere
        second = np.arange(total) % 2 == 1 if halves else np.zeros(total, bool)
        self.half = second[np.random.Generator(np.random.PCG64(HALF_SEED)).permutation(total)]
        self.moments = [Moments(dim, ranks.device) for _ in range(1 + halves)]
        # a half of less than twice the dimension has no full rank, and its floor needs the rows
        self.keep = keep_rows or total <= (2 * dim if halves else dim)
        self.rows = np.empty((total if self.keep and ranks.is_main else 0, dim), np.float32)

    def add(self, feats: torch.Tensor, start: int, batch_size: int) -> None:
        """feats (n, D) of the images from global index `start` on; n may be 0 at the end."""
        second = torch.from_numpy(self.half[start : start + len(feats)]).to(feats.device)
        for moments, mask in zip(self.moments, (~second, second)):
            moments.add(feats[mask])
        if not self.keep:
            return
        padded = torch.nn.functional.pad(feats, (0, 0, 0, batch_size - len(feats)))
        block = self.ranks.gather(padded)[: self.total - self.filled]
        if self.ranks.is_main:
            self.rows[self.filled : self.filled + len(block)] = block.cpu().numpy()
        self.filled += len(block)

    def result(self) -> Statistics:
        """The statistics of all ranks' images; rows and floor on the main process alone."""
        for moments in self.moments:
            moments.reduce(self.ranks.sum)
        merged = sum(self.moments[1:], start=self.moments[0])
        assert merged.count == self.total, (merged.count, self.total)
        rows = self.rows if self.keep and self.ranks.is_main else None
        statistics = Statistics(merged.count, merged.mean(), merged.cov(), rows)
        both_halves = len(self.moments) == 2 and min(m.count for m in self.moments) > 1
        if both_halves and self.ranks.is_main:
            halves = [Statistics(m.count, m.mean(), m.cov(), None if rows is None else rows[mask])
                      for m, mask in zip(self.moments, (~self.half, self.half))]  # fmt: skip
            statistics.floor = frechet_between(*halves)
        return statistics


def rank_batches(
    images: ImageSet, ranks: Ranks, batch_size: int, progress: Callable[[int], None] | None
) -> Iterator[tuple[torch.Tensor, int, int]]:
    """(x_u8 (n', 3, H, W), start, n) for this rank's batches, equally many on every rank: the first
    n of the n' images count, from global index `start` on. A rank that has no images left gets the
    first image again with n = 0. `progress` is called with the number of images that all have done.
    """
    total, stride = len(images), batch_size * ranks.world
    starts = [s + ranks.rank * batch_size for s in range(0, total, stride)]
    blocks = [(s, min(s + batch_size, total)) if s < total else (0, 1) for s in starts]
    for x_u8, start in zip(read_ahead(images, blocks), starts):
        yield x_u8, min(start, total), max(0, min(batch_size, total - start))
        if progress:
            progress(min(total, start // stride * stride + stride))


def collect(
    images: ImageSet, net: FeatureNet, features: Collection[str], ranks: Ranks, *, batch_size: int,
    rows_of: Collection[str] = (), halves: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Statistics]:  # fmt: skip
    """One pass of `net` over `images` => statistics of each of `features` ("pool", "spatial"), in
    the same order on every rank. `rows_of`: features whose rows are needed; `halves`: measure the
    floor of "pool"."""
    collectors: dict[str, Collector] = {}
    for x_u8, start, n in rank_batches(images, ranks, batch_size, progress):
        outputs = net(x_u8)
        for name in features:
            if name not in collectors:
                collectors[name] = Collector(
                    len(images), outputs[name].shape[1], ranks,
                    keep_rows=name in rows_of, halves=halves and name == "pool",
                )  # fmt: skip
            collectors[name].add(outputs[name][:n], start, batch_size)
    return {name: collector.result() for name, collector in collectors.items()}
