"""Data that need no files: scikit-learn's digits, and noise for benchmarks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.data.base import Allocator, Source, hash_lines
from utils.data.images import array_to_u8

DIGITS_SPLIT_SEED = 20250416  # a constant, so that "test" is the same 20% for everybody


_fingerprints: dict[tuple[int, bytes], str] = {}  # of digits


class DigitsSource(Source):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, resized with BICUBIC; ten classes.

    `split` is "all", or "train" / "test": 80% / 20% of every class, the same for everybody.
    """

    labels: np.ndarray
    needs_path = False
    splits = ("all", "train", "test")

    def __init__(self, root: None, resolution: int, split: str = "all") -> None:
        from sklearn.datasets import load_digits

        super().__init__(None, resolution)
        digits: Any = load_digits()
        self.classes = list("0123456789")
        self._indices = _split_digits(digits.target, split)
        self._grey = np.rint(digits.images[self._indices] * (255 / 16)).astype(np.uint8)
        self.labels = digits.target[self._indices].astype(np.int64)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return array_to_u8(self._resized(i).convert("RGB")), int(self.labels[i])

    def read_batch(
        self, indices: Sequence[int], empty: Allocator = torch.empty
    ) -> tuple[list[torch.Tensor], dict[str, str]]:
        """As `Source.read_batch`: grey is written three times into the batch."""
        rows = empty((len(indices), self.resolution, self.resolution, 3), dtype=torch.uint8)
        for row, i in zip(rows.numpy(), indices):
            _interleave([np.asarray(self._resized(i))] * 3, row)
        return [rows.permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])], {}

    def _resized(self, i: int) -> Image.Image:
        size = (self.resolution, self.resolution)
        return Image.fromarray(self._grey[i]).resize(size, Image.Resampling.BICUBIC)

    def fingerprint(self) -> str:
        """Of the pixels. They are constants: a process hashes those of a split and size once."""
        what = self.resolution, self._indices.tobytes()
        if what not in _fingerprints:
            _fingerprints[what] = super().fingerprint()
        return _fingerprints[what]

    def key(self, i: int) -> str:
        """The digit's index in scikit-learn's set, whatever the split."""
        return str(self._indices[i])


def _split_digits(labels: np.ndarray, split: str) -> np.ndarray:
    """Ascending indices of `split`; a fifth of each class, by a fixed random rank, is "test"."""
    draws = np.random.Philox(DIGITS_SPLIT_SEED).random_raw(len(labels))
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranked = members[draws[members].argsort(kind="stable")]
        is_test[ranked[: round(len(members) / 5)]] = True
    chosen = {"all": np.ones_like(is_test), "train": ~is_test, "test": is_test}[split]
    return np.flatnonzero(chosen)


def _interleave(channels: Sequence[np.ndarray] | np.ndarray, row: np.ndarray) -> None:
    """Write three channels (H, W) into `row` (H, W, 3): one by one, numpy and torch are 4 to 8
    times faster than with the permuted array."""
    for channel, values in enumerate(channels):
        row[..., channel] = values


class SyntheticSource(Source):
    """10,000 images of noise in 1,000 classes, a function of the index: for benchmarks only."""

    labels: np.ndarray
    needs_path = False

    def __init__(self, root: None, resolution: int, split: str = "all") -> None:
        super().__init__(None, resolution)
        self.classes = [str(label) for label in range(1000)]
        self.labels = np.arange(10_000) % 1000

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self._noise(i)), int(self.labels[i])

    def read_batch(
        self, indices: Sequence[int], empty: Allocator = torch.empty
    ) -> tuple[list[torch.Tensor], dict[str, str]]:
        """As `Source.read_batch`, without a copy of the batch."""
        rows = empty((len(indices), self.resolution, self.resolution, 3), dtype=torch.uint8)
        for row, i in zip(rows.numpy(), indices):
            _interleave(self._noise(i), row)
        return [rows.permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])], {}

    def _noise(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)
        shape = (3, self.resolution, self.resolution)
        noise = np.random.Philox(key=i).random_raw(-(-math.prod(shape) // 8)).view(np.uint8)
        return noise[: math.prod(shape)].reshape(shape)

    def fingerprint(self) -> str:
        """Of what the noise is a function of: to make and hash it would take ten seconds."""
        return hash_lines([f"{len(self)} images of Philox noise, {self.resolution} px"])

    def key(self, i: int) -> str:
        return str(i)
