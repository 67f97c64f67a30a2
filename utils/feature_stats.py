"""From images to the statistics of their features: one pass, any number of ranks.

Ranks share a set by global index: batch b of the set belongs to rank b % world, nothing is padded
or seen twice. Memory: three float64 tensors per feature, and the feature rows (float32, on rank 0)
only where precision/recall, the Inception Score or a rank-deficient covariance need them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather, reduce

from models.errors import UserError
from utils.distributed import join
from utils.features import FeatureNet
from utils.image_sets import ImageSet, read_ahead
from utils.metrics import Moments, centred_factor, factor, frechet_distance, frechet_from_factors

HALF_SEED = 0  # of the split of a reference into two halves


class Ranks:
    """The processes of an evaluation. `distributed=False`: this one alone, however launched."""

    def __init__(self, distributed: bool = True, device: torch.device | str | None = None):
        state = join() if distributed else None
        self.rank = state.process_index if state else 0
        self.world = state.num_processes if state else 1
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or (state.device if state else default))
        if self.device.type == "mps":  # has no float64, which the moments need
            self.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return reduce(tensor, "sum") if self.world > 1 else tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, D) of every rank => (world * B, D) in the order of ranks."""
        return gather(tensor.contiguous()) if self.world > 1 else tensor

    def on_main(self, function: Callable):
        """Result of a call that only rank 0 makes, on every rank; its `UserError` likewise."""
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
        if self.world > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]


@dataclass
class Statistics:
    """What is kept of one feature of one set.

    n (None: a file did not say), mean (D,) and cov (D, D) float64, `rows` (n, D) float32 in file
    order or None, `floor`: the Frechet distance between two random halves of the set, or None.
    """

    n: int | None
    mean: np.ndarray
    cov: np.ndarray
    rows: np.ndarray | None = None
    floor: float | None = None

    @property
    def rank_deficient(self) -> bool:
        return self.n is not None and self.n - 1 < len(self.mean)

    def factor(self) -> np.ndarray:
        """(D, K) float64 whose product with its transpose is `cov`."""
        exact = self.rank_deficient and self.rows is not None
        return centred_factor(self.rows) if exact else factor(self.cov)


def frechet(reference: Statistics, samples: Statistics) -> float:
    """Frechet distance; through the features themselves where a covariance is rank-deficient."""
    if not any(s.rank_deficient and s.rows is not None for s in (reference, samples)):
        return frechet_distance(reference.mean, reference.cov, samples.mean, samples.cov)
    return frechet_from_factors(reference.mean, reference.factor(), samples.mean, samples.factor())


class Collector:
    """Gathers one feature over the batches of a set; every rank calls `add` equally often."""

    def __init__(self, total: int, dim: int, ranks: Ranks, *, keep_rows: bool, halves: bool):
        self.total, self.ranks, self.filled = total, ranks, 0
        self.half = _half_mask(total) if halves else np.zeros(total, bool)
        self.moments = [Moments(dim, ranks.device) for _ in range(1 + halves)]
        # below twice the dimension a half is rank-deficient and its floor needs the rows
        self.keep = keep_rows or total <= (2 * dim if halves else dim)
        shape = (total if self.keep and ranks.is_main else 0, dim)
        self.rows = np.empty(shape, np.float32)

    def add(self, feats: torch.Tensor, start: int, batch_size: int) -> None:
        """feats (n, D) of the images from global index `start` on; n may be 0 at the end."""
        second = torch.from_numpy(self.half[start : start + len(feats)]).to(feats.device)
        for moments, mask in zip(self.moments, (~second, second)):
            moments.add(feats[mask])
        if not self.keep:
            return
        padded = feats.new_zeros(batch_size, feats.shape[1])
        padded[: len(feats)] = feats
        block = self.ranks.gather(padded)[: self.total - self.filled]
        if self.ranks.is_main:
            self.rows[self.filled : self.filled + len(block)] = block.cpu().numpy()
        self.filled += len(block)

    def result(self) -> Statistics:
        for moments in self.moments:
            moments.reduce(self.ranks.sum)
        merged = sum(self.moments[1:], start=self.moments[0])
        assert merged.count == self.total, (merged.count, self.total)
        rows = self.rows if self.keep and self.ranks.is_main else None
        statistics = Statistics(merged.count, merged.mean(), merged.cov(), rows)
        if len(self.moments) == 2 and self.ranks.is_main and min(self.half_counts()) > 1:
            statistics.floor = frechet(*self._half_statistics(rows))
        return statistics

    def half_counts(self) -> tuple[int, int]:
        return int((~self.half).sum()), int(self.half.sum())

    def _half_statistics(self, rows: np.ndarray | None) -> list[Statistics]:
        masks = (~self.half, self.half)
        return [Statistics(m.count, m.mean(), m.cov(), None if rows is None else rows[mask])
                for m, mask in zip(self.moments, masks)]  # fmt: skip


def _half_mask(total: int) -> np.ndarray:
    """(total,) bool, half of it True, random but the same everywhere."""
    mask = np.arange(total) % 2 == 1
    return mask[np.random.Generator(np.random.PCG64(HALF_SEED)).permutation(total)]


def walk(images: ImageSet, ranks: Ranks, batch_size: int, progress: Callable[[int], None] | None):
    """Yields (x_u8 (n, 3, H, W), start, n) for this rank's batches, equally many on every rank.

    A rank without images left gets the first image again with n = 0: run it, keep nothing.
    """
    total, stride = len(images), batch_size * ranks.world
    starts = [s + ranks.rank * batch_size for s in range(0, total, stride)]
    blocks = [(s, min(s + batch_size, total)) if s < total else (0, 1) for s in starts]
    for x_u8, start in zip(read_ahead(images, blocks), starts):
        yield x_u8, min(start, total), max(0, min(batch_size, total - start))
        if progress:
            progress(min(total, start // stride * stride + stride))


def collect(
    images: ImageSet,
    net: FeatureNet,
    keys: Iterable[str],
    ranks: Ranks,
    *,
    batch_size: int = 64,
    keep_rows: bool = False,
    halves: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Statistics]:
    """One pass of `net` over `images` => statistics of each feature in `keys` ("pool", "spatial").

    `keep_rows` is about "pool"; `halves` also measures the distance between two halves (floor).
    """
    collectors: dict[str, Collector] = {}
    for x_u8, start, n in walk(images, ranks, batch_size, progress):
        feats = net(x_u8)
        for key in keys:
            if key not in collectors:
                pool = key == "pool"
                collectors[key] = Collector(
                    len(images), feats[key].shape[1], ranks,
                    keep_rows=keep_rows and pool, halves=halves and pool,
                )  # fmt: skip
            collectors[key].add(feats[key][:n], start, batch_size)
    return {key: collector.result() for key, collector in collectors.items()}
