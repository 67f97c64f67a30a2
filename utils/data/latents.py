"""Cached latents, joined to the images by key: the reader. latent_writer.py writes them.

latents-00000.npy ...       (n, F, 2, C, h, w) float16: posterior mean and std; F = 2 with
                            mirrored copies, else 1
features-K-00000.npy ...    (n, F, T, D) float16: tokens of the K-th encoder, if asked for
shard-00000.json ...        checksums and hashes of its images, and sums of its latents
keys.txt checksums.npy      one key a line, (N,) uint32, in the order of the rows
plan.json meta.json         what it was made from; written last, with statistics and a hash of all
                            pixels
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.checks.errors import UserError, printable
from models.checks.file_kinds import INDEX, what_is
from models.checks.values import RecordError
from models.encoders import encoder_weight_file
from models.vae import VAE
from models.weights.reading import shards_of
from utils.data.base import Allocator, Source
from utils.data.content import THREADS
from utils.data.images import CROP_VERSION, READ_CROPS, ImageFileError
from utils.data.sharded import (
    META,
    ShardedRows,
    load_column,
    load_keys,
    remedy_for_meta,
    shard_file,
)
from utils.files import sha256_file
from utils.records import load_record, number

CACHE_FORMAT = "repae-latents-1"
LATENTS, CHECKSUMS = "latents", "checksums.npy"
MOST, LEAST_STD = 65504, 1e-8  # what float16 holds, and about its smallest step
CHECKED_IMAGES = 32  # whose pixels are compared at the start of a run
OPEN_FILES = 256  # memory maps of one process: each holds a file descriptor
PART = 64  # images that one of the threads compares in a row
NO_PIXELS = torch.empty(3, 0, 0, dtype=torch.uint8)  # where nothing looks at the image


@dataclass(kw_only=True)
class CachedFeatures:
    """The tokens of one encoder in a cache."""

    name: str
    weights: str  # `weights_id`
    shape: tuple[int, int] = number(at_least=1)  # T, D


@dataclass(kw_only=True)
class CacheMeta:
    """What meta.json must hold."""

    format: str
    crop_version: str
    vae: str
    vae_sha256: str
    num_images: int = number(at_least=1)
    resolution: int = number(at_least=1)
    copies: int = number(at_least=1, at_most=2)
    latent_shape: tuple[int, int, int] = number(at_least=1)  # C, h, w
    shards: list[int] = number(at_least=0)  # images in each
    # (C,), of float16 numbers
    mean: list[float] = number(at_least=-MOST, at_most=MOST)
    std: list[float] = number(at_least=LEAST_STD, at_most=MOST)
    encoders: list[CachedFeatures]
    # fingerprint of the data, and the one that the same pixels have where they are packed; caches
    # of earlier versions have none
    images_sha256: str | None = None
    pixels_sha256: str | None = None

    def __post_init__(self) -> None:
        channels = self.latent_shape[0]
        if not len(self.mean) == len(self.std) == channels:
            counts = f"{len(self.mean)} means and {len(self.std)} stds of {channels} channels"
            raise RecordError(counts)
        if sum(self.shards) != self.num_images:
            text = f"shards={sum(self.shards)} images in all: expected num_images="
            raise RecordError(f"{text}{self.num_images}")


def cache_rows(layout: dict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name of each array => shape and dtype of one image's row, from `copies`, `latent_shape`
    (C, h, w) and `encoders`, each with its `shape` (T, D)."""
    f = layout["copies"]
    shapes = {LATENTS: (f, 2, *layout["latent_shape"])}
    shapes |= {f"features-{k}": (f, *e["shape"]) for k, e in enumerate(layout["encoders"])}
    return {array: (shape, np.dtype(np.float16)) for array, shape in shapes.items()}


def checksum(x_u8: Tensor) -> int:
    """CRC-32 of the pixels of one image (3, H, W), in this order."""
    return zlib.crc32(x_u8.contiguous().numpy().data)


def weights_id(encoder: str, file: str | None) -> str:
    """What tells an encoder's weight file from another: its sha256 (of
    shards, one of their hashes), `published`, or `random`."""
    if file is None or file == "random":
        return file or "published"
    file_of = encoder_weight_file(encoder, file)
    path = file_of.find() if file_of else None
    assert path is not None, "a file that is named is there, or an error"
    if what_is(path) != INDEX:
        return sha256_file(path)
    shards = "".join(map(sha256_file, shards_of(path)))
    return hashlib.sha256(shards.encode()).hexdigest()


def weights_digest(net: nn.Module) -> str:
    """sha256 of all weights, by name, in float32: the same for every file format."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()


class LatentCache:
    """A finished cache; `UserError` if it is unfinished, damaged, or of another crop or format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()
        if not os.path.isdir(self.folder):
            found = what_is(self.folder)
            what = "no such folder" if found == "absent" else f"it is {found}, expected a folder"
            text = f"data.latents={folder}: {what}; correct the path, or make it with"
            raise UserError(f"{text} scripts/cache_latents.py")
        self._again = again = "run the same cache_latents.py command again"
        other = "expected a folder that scripts/cache_latents.py wrote, finished"
        remedy = remedy_for_meta(self.folder, CACHE_FORMAT, again, other)
        self.meta = meta = load_record(self.folder / META, CacheMeta, remedy)
        self._expect("format", meta.format, CACHE_FORMAT)
        if meta.crop_version not in READ_CROPS:
            self._expect("crop_version", meta.crop_version, CROP_VERSION)
        self._rows: dict[str, ShardedRows] = {}
        open_files = max(1, OPEN_FILES // (1 + len(meta.encoders)))
        for array, row in cache_rows(asdict(meta)).items():
            files = [shard_file(self.folder, array, shard) for shard in range(len(meta.shards))]
            self._rows[array] = ShardedRows(files, meta.shards, row, again, open_files)

    def __len__(self) -> int:
        return self.meta.num_images

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays: the latents first, then the features of each encoder."""
        return list(self._rows)

    def read(self, array: str, row: int) -> Tensor:
        """(F, ...) float16."""
        return torch.from_numpy(np.array(self._rows[array][row]))

    def read_rows(self, array: str, rows: np.ndarray, empty: Allocator = torch.empty) -> Tensor:
        """(B, F, ...) float16, of the rows (B,), in memory that `empty` makes."""
        out = empty((len(rows), *self._rows[array].row[0]), dtype=torch.float16)
        self._rows[array].gather(rows, out.numpy())
        return out

    def encoder_dims(self) -> tuple[int, ...]:
        """Channels of the cached features, for each encoder."""
        return tuple(e.shape[1] for e in self.meta.encoders)

    def stats(self) -> tuple[Tensor, Tensor]:
        """Per-channel (mean, std), each (C,) float64."""
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.meta.mean, self.meta.std))
        return mean, std

    def check_vae(self, vae: VAE, spec: str) -> None:
        """`UserError` unless these weights made the cache."""
        found, meta = weights_digest(vae), self.meta
        if found != meta.vae_sha256:
            raise UserError(
                f"{self.folder} was made with another VAE: {meta.vae} with weights "
                f"{meta.vae_sha256[:12]}, {spec} has {found[:12]}; cache the latents again, or "
                "correct vae.name and vae.weights"
            )

    def check_images(self, resolution: int, hflip: bool) -> None:
        """`UserError` if the cache is of another resolution, or lacks mirrored copies."""
        held = self.meta.resolution
        if held != resolution:
            text = f"{self.folder} was made with resolution {held}; cache again, or set"
            raise UserError(f"{text} data.resolution={held} (now {resolution})")
        if hflip and self.meta.copies < 2:
            text = f"data.hflip=true, but {self.folder} holds no mirrored copies"
            raise UserError(f"{text}: cache again with --hflip, or set data.hflip=false")

    def check_features(self, names: Sequence[str], files: Sequence[str | None], grid: int) -> None:
        """`UserError` unless the features are those of these encoders, grid x grid tokens each.
        `files`: their weights (None = published)."""
        wanted = [[name, grid**2, weights_id(name, file)] for name, file in zip(names, files)]
        held = [[e.name, e.shape[0], e.weights] for e in self.meta.encoders]
        self._expect("features [encoder, tokens, weights]", held, wanted)

    def join(self, source: Source) -> np.ndarray:
        """(N,) int64: the row of each image of `source`; `UserError` unless its images have the
        names of those of the cache, and some of them the same pixels."""
        keys = load_keys(self.folder, len(self), self._again)
        own = [source.key(i) for i in range(len(source))]
        row_of = {key: row for row, key in enumerate(keys)}
        without = [key for key in own if key not in row_of]
        extra = sorted(set(keys) - set(own), key=row_of.__getitem__)
        kinds = {"images without latents": without, "latents without an image": extra}
        words = [f"{what}: {len(k)} (first {k[0]})" for what, k in kinds.items() if k]
        if words:
            raise UserError(
                f"{self.folder} holds the latents of {len(keys)} images, the data has {len(own)}: "
                f"{'; '.join(words)}; cache the latents again, or correct data.path"
            )
        rows = np.array([row_of[key] for key in own], dtype=np.int64)
        some = np.linspace(0, len(rows) - 1, min(CHECKED_IMAGES, len(rows)), dtype=int)
        self._compare(source, rows, some.tolist())
        return rows

    def check_content(self, source: Source, rows: np.ndarray, fingerprint: str) -> None:
        """`UserError` unless the cache was made from the images of `source`, whose `fingerprint`
        and `rows` these are. Where the cache knows the fingerprint, no image is read; else (data in
        another container, a cache of an earlier version) the pixels of all are compared."""
        known = fingerprint in (self.meta.images_sha256, self.meta.pixels_sha256)
        if not (known and np.array_equal(rows, np.arange(len(rows)))):
            self._compare(source, rows, range(len(rows)))

    def _compare(self, source: Source, rows: np.ndarray, indices: Sequence[int]) -> None:
        """`UserError` unless these images have the pixels that the cache was made from."""
        checksums = load_column(self.folder / CHECKSUMS, len(self), np.uint32, self._again)

        def differing(part: Sequence[int]) -> list[int]:
            found = []
            for i in part:
                try:
                    if checksum(source[i][0]) != checksums[rows[i]]:
                        found.append(i)
                except ImageFileError:  # in training, another image takes its place: `Source.read`
                    if source.bad is None:
                        raise
            return found

        parts = [indices[k : k + PART] for k in range(0, len(indices), PART)]
        with tqdm(total=len(indices), desc=f"comparing images with {self.folder}", unit=" images",
                  disable=len(parts) < 2, mininterval=1) as bar:  # fmt: skip
            pool = ThreadPoolExecutor(THREADS)
            try:
                for part, found in zip(parts, pool.map(differing, parts)):
                    bar.update(len(part))
                    if found:
                        text = f"{self.folder} was made from other images: the pixels of"
                        text = f"{text} {printable(source.key(found[0]))} differ"
                        raise UserError(f"{text}; cache the latents again, or correct data.path")
            finally:
                pool.shutdown(cancel_futures=True)

    def _expect(self, what: str, found, wanted) -> None:
        if found != wanted:
            text = f"{self.folder} was made with {what} {found}, but {wanted} is asked for"
            raise UserError(f"{text}; cache the latents again, or change the config")


class CachedSource(Source):
    """A source with the latents of its images: item i is (x_u8, label, latents, *features), the
    latents (F, 2, C, h, w) and features (F, T, D) float16.

    `features`: whether to read the cached features. `pixels`: whether to read the images, too; else
    x_u8 is empty, (3, 0, 0).
    """

    def __init__(self, images: Source, cache: LatentCache, features: bool, pixels: bool) -> None:
        super().__init__(images.root, images.resolution)
        self.images, self.cache, self.rows = images, cache, cache.join(images)
        self.classes, self.labels = images.classes, images.labels
        self.notes, self.bad = images.notes, images.bad
        self.arrays = cache.arrays if features else [LATENTS]
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.images)

    def check_content(self, fingerprint: str) -> None:
        """`LatentCache.check_content` of the images, whose fingerprint this is."""
        self.cache.check_content(self.images, self.rows, fingerprint)

    def __getitem__(self, i: int) -> tuple[Tensor, int, *tuple[Tensor, ...]]:
        x_u8, y = self.images[i] if self.pixels else (NO_PIXELS, self.images.label(i))
        return x_u8, y, *(self.cache.read(array, self.rows[i]) for array in self.arrays)

    def read_batch(
        self, indices: Sequence[int], empty: Allocator = torch.empty
    ) -> tuple[list[Tensor], dict[str, str]]:
        """As `Source.read_batch`: every row is copied from its file straight into the batch."""
        images = self._read_images(indices, empty)
        if images is None:
            return super().read_batch(indices, empty)
        rows = self.rows[indices]
        return [*images, *(self.cache.read_rows(array, rows, empty) for array in self.arrays)], {}

    def _read_images(self, indices: Sequence[int], empty: Allocator) -> list[Tensor] | None:
        """Images and labels; None if that takes item by item: where another image takes the place
        of a broken one, so must its latents."""
        if not self.pixels:
            if self.labels is None:
                return None
            nothing = NO_PIXELS.expand(len(indices), -1, -1, -1)
            return [nothing, torch.from_numpy(self.labels[indices])]
        try:
            images, found = self.images.read_batch(indices, empty)
        except ImageFileError:
            return None
        return None if found else images

    def key(self, i: int) -> str:
        return self.images.key(i)
