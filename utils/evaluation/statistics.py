"""From images to the statistics of their features: one pass, any number of ranks.

Ranks share a set by global index: batch b of the set belongs to rank b % world, nothing is padded
or seen twice. In memory are three float64 tensors per feature, and on the main process the feature
of every image (a row, float32), but only where a metric or a covariance without full rank needs it.
The host prepares the next batches while a GPU computes: in no batch does it wait for a result.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing

import numpy as np
import torch

from utils.distributed import Ranks
from utils.evaluation.formulas.frechet import Moments, Statistics, frechet_between
from utils.evaluation.formulas.uncertainty import group_of
from utils.evaluation.images.npz_images import ImageSet
from utils.evaluation.images.reader import Prepare, Queue, host_memory, read_ahead, upload
from utils.evaluation.networks import FeatureNet

# called with the number of images that are done, and that of all images
Progress = Callable[[int, int], None]
GROUP_SEED = 0  # of the split of a set into halves


class Collector:
    """Gathers one feature over the batches of a set; every rank calls `add` equally often.

    `keep_rows`: whether the rows are needed in any case. `groups`: the moments of so many disjoint
    groups of the images, equally large, are kept apart: those of a jackknife, interleaved; or two
    random halves of the set, and the distance between them is its `floor`.
    """

    def __init__(
        self, total: int, dim: int, ranks: Ranks, *, keep_rows: bool = False, groups: int = 1
    ):
        self.total, self.ranks, self.filled = total, ranks, 0
        # the group of each image, the same on every rank; halves at random, others interleaved
        self.group = group_of(total, groups)
        if groups == 2:
            order = np.random.Generator(np.random.PCG64(GROUP_SEED)).permutation(total)
            self.group = self.group[order]
        self.moments = [Moments(dim, ranks.device) for _ in range(groups)]
        # a group of no more images than dimensions has no full rank, and its distances need rows
        self.keep = keep_rows or total <= groups * dim
        shape = (total if self.keep and ranks.is_main else 0, dim)
        self.rows = host_memory(shape, torch.float32, ranks.device)

    def add(self, feats: torch.Tensor, start: int, batch_size: int) -> None:
        """feats (n, D) of the images from global index `start` on; n may be 0 at the end."""
        for moments, part in zip(self.moments, self._split(feats, start)):
            moments.add(part)
        if not self.keep:
            return
        padded = torch.nn.functional.pad(feats, (0, 0, 0, batch_size - len(feats)))
        block = self.ranks.gather(padded)[: self.total - self.filled]
        if self.ranks.is_main:
            place = self.rows[self.filled : self.filled + len(block)]
            place.copy_(block, non_blocking=True)
        self.filled += len(block)

    def _split(self, feats: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The rows of each group. Which they are is known on the host: a mask on the device would
        make the host wait for its number of rows."""
        if len(self.moments) == 1:
            return (feats,)
        group = self.group[start : start + len(feats)]
        order = torch.from_numpy(np.argsort(group, kind="stable"))
        sizes = np.bincount(group, minlength=len(self.moments)).tolist()
        return feats.index_select(0, upload(order, feats.device)).split(sizes)

    def result(self) -> Statistics:
        """The statistics of all ranks' images; rows, groups and floor on the main process alone."""
        for moments in self.moments:
            moments.reduce(self.ranks.sum)
        merged = sum(self.moments[1:], start=self.moments[0])
        # reading this number also waits for the copies of rows, which are earlier in the queue
        assert merged.count == self.total, (merged.count, self.total)
        rows = self.rows.numpy() if self.keep and self.ranks.is_main else None
        statistics = Statistics(merged.count, merged.mean(), merged.cov(), rows)
        if self.ranks.is_main and 1 < len(self.moments) <= self.total // 2:
            statistics.groups = [
                Statistics(m.count, m.mean(), m.cov(), None if rows is None else rows[of_group])
                for m, of_group in zip(self.moments, self._of_groups())
            ]
        if len(statistics.groups) == 2:
            statistics.floor = frechet_between(*statistics.groups)
        return statistics

    def _of_groups(self) -> Iterator[np.ndarray]:
        """For each group, whether an image belongs to it: (N,) bool."""
        return (self.group == number for number in range(len(self.moments)))


def rank_batches(
    images: ImageSet, ranks: Ranks, batch_size: int, progress: Progress | None,
    *, workers: int = 1, prepare: Prepare | None = None,
) -> Generator[tuple[torch.Tensor, int, int]]:  # fmt: skip
    """(x_u8 (n', 3, H, W), start, n) for this rank's batches, equally many on every rank: the first
    n of the n' images count, from global index `start` on. A rank that has no images left gets the
    first image again with n = 0. `progress` is told how many images all ranks have done.
    `workers` and `prepare` as in `read_ahead`. Close it after use: it reads ahead in threads.
    """
    total, stride = len(images), batch_size * ranks.world
    starts = [s + ranks.rank * batch_size for s in range(0, total, stride)]
    blocks = [(s, min(s + batch_size, total)) if s < total else (0, 1) for s in starts]
    batches = read_ahead(images, blocks, workers=workers, device=ranks.device, prepare=prepare)
    queue = Queue(ranks.device)
    with closing(batches):
        for x_u8, start in zip(batches, starts):
            yield x_u8, min(start, total), max(0, min(batch_size, total - start))
            queue.add()
            if progress:
                progress(min(total, start // stride * stride + stride), total)
    share_hashes(images, ranks)


def share_hashes(images: ImageSet, ranks: Ranks) -> None:
    """Give the main process the hashes of the images that other ranks have read; each has read
    images of its own, and perhaps the first one, which the main process has read, too."""
    if ranks.world == 1 or not images.hashed:
        return
    found = ranks.sum(torch.from_numpy(images.hashes).to(ranks.device)).cpu().numpy()
    if ranks.is_main:
        missing = ~images.hashes.any(1)
        images.hashes[missing] = found[missing]


def collect(
    images: ImageSet, net: FeatureNet, features: Collection[str], ranks: Ranks, *, batch_size: int,
    workers: int = 1, rows_of: Collection[str] = (), groups: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Statistics]:  # fmt: skip
    """One pass of `net` over `images` => statistics of each of `features` ("pool", "spatial"), in
    the same order on every rank. `rows_of`: features whose rows are needed; `groups`: numbers of
    groups of a feature, see `Collector`."""
    collectors: dict[str, Collector] = {}
    batches = rank_batches(
        images, ranks, batch_size, progress, workers=workers, prepare=net.prepare
    )
    with closing(batches):
        for x_u8, start, n in batches:
            outputs = net(x_u8, prepared=True)
            for name in features:
                if name not in collectors:
                    collectors[name] = Collector(
                        len(images), outputs[name].shape[1], ranks, keep_rows=name in rows_of,
                        groups=(groups or {}).get(name, 1),
                    )  # fmt: skip
                collectors[name].add(outputs[name][:n], start, batch_size)
    return {name: collector.result() for name, collector in collectors.items()}
