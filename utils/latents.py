"""Cached latents: what scripts/cache_latents.py writes, joined to the images by key.

DIR/latents-00000.npy ...       (n, F, 2, C, h, w) float16: posterior mean and std; F = 2 with
                                mirrored copies, else 1
DIR/features-K-00000.npy ...    (n, F, T, D) float16: tokens of the K-th encoder, if asked for
DIR/keys.txt  checksums.npy     of the images, in the order of the rows
DIR/plan.json  meta.json        what it was made from; shard lengths and statistics, written last
"""

import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.encoders import wanted_encoder
from models.errors import UserError
from models.vae import VAE
from utils.checkpoint import sha256_file
from utils.config import Config
from utils.data import Source
from utils.images import CROP_VERSION
from utils.resumable import META, read_lines
from utils.sources import read_json

CACHE_FORMAT = "repae-latents-1"
KEYS, CHECKSUMS = "keys.txt", "checksums.npy"
CHECKED_IMAGES = 32  # whose pixels are compared at the start of a run
OPEN_FILES = 256  # memory maps of one process: each holds a file descriptor
NO_PIXELS = torch.empty(3, 0, 0, dtype=torch.uint8)  # where nothing looks at the image


class LatentCache:
    """A finished cache; `UserError` if it is unfinished, damaged, or of another crop or format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()
        if not self.folder.is_dir():
            raise UserError(f"data.latents={folder}: no such folder; correct the path, or make it "
                            "with scripts/cache_latents.py")  # fmt: skip
        again = "an unfinished cache: run the same cache_latents.py command again"
        self.meta = read_json(self.folder / META, again)
        for name, wanted in (("format", CACHE_FORMAT), ("crop_version", CROP_VERSION)):
            self._expect(name, self.meta.get(name), wanted)
        self._ends = np.cumsum(self.meta["shards"], dtype=np.int64)
        self._arrays: dict[tuple[str, int], np.ndarray] = {}
        for name, row in self.rows().items():
            self._check_shards(name, 2 * int(np.prod(row)))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_arrays": {}}

    def __len__(self) -> int:
        return self.meta["num_images"]

    def rows(self) -> dict[str, tuple[int, ...]]:
        """Name of an array => the shape of one image's row."""
        return row_shapes(self.meta["copies"], self.meta["latent_shape"], self.meta["encoders"])

    def read(self, name: str, row: int) -> Tensor:
        """(F, ...) float16."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        if (name, shard) not in self._arrays:
            if len(self._arrays) >= OPEN_FILES:
                del self._arrays[next(iter(self._arrays))]
            file = self.folder / shard_name(name, shard)
            self._arrays[name, shard] = np.load(file, mmap_mode="r")
        start = self._ends[shard - 1] if shard else 0
        return torch.from_numpy(np.array(self._arrays[name, shard][row - start]))

    def encoder_dims(self) -> tuple[int, ...]:
        return tuple(e["shape"][1] for e in self.meta["encoders"])

    def stats(self) -> tuple[Tensor, Tensor]:
        """Per-channel (mean, std), each (C,) float64."""
        return tuple(torch.tensor(self.meta[k], dtype=torch.float64) for k in ("mean", "std"))

    def check_vae(self, vae: VAE, spec: str) -> None:
        """`UserError` unless these weights made the cache."""
        found = weights_digest(vae)
        if found != self.meta["vae_sha256"]:
            raise UserError(
                f"{self.folder} was made with another VAE: {self.meta['vae']} with weights "
                f"{self.meta['vae_sha256'][:12]}, {spec} has {found[:12]}; cache the latents "
                "again, or correct vae.name and vae.weights"
            )

    def check_settings(self, c: Config) -> None:
        """`UserError` where the config asks for what the cache does not hold."""
        self._expect("resolution", self.meta["resolution"], c.data.resolution)
        if c.data.hflip and self.meta["copies"] < 2:
            raise UserError(f"data.hflip=true, but {self.folder} holds no mirrored copies: cache "
                            "again with --hflip, or set data.hflip=false")  # fmt: skip
        if c.encoder.cached and c.uses_encoder:
            files = c.encoder.weights or [None] * len(c.encoder.names)
            pairs = zip(c.encoder.names, files)
            wanted = [[name, c.encoder_grid**2, weights_id(name, file)] for name, file in pairs]
            held = [[e["name"], e["shape"][0], e["weights"]] for e in self.meta["encoders"]]
            self._expect("features [encoder, tokens, weights]", held, wanted)

    def join(self, source: Source) -> np.ndarray:
        """(N,) int64: the row of each image of `source`, which must be the images of the cache."""
        keys = read_lines(self.folder / KEYS)
        own = [source.key(i) for i in range(len(source))]
        row_of = {key: row for row, key in enumerate(keys)}
        without = [key for key in own if key not in row_of]
        extra = sorted(set(keys) - set(own), key=row_of.get)
        if without or extra:
            words = [f"images without latents: {_count(without)}"] if without else []
            words += [f"latents without an image: {_count(extra)}"] if extra else []
            raise UserError(
                f"{self.folder} holds the latents of {len(keys)} images, the data has {len(own)}: "
                f"{'; '.join(words)}; cache the latents again, or correct data.path"
            )
        rows = np.array([row_of[key] for key in own], dtype=np.int64)
        self._check_pixels(source, rows)
        return rows

    def _check_pixels(self, source: Source, rows: np.ndarray) -> None:
        """The same names do not make the same images."""
        checksums = np.load(self.folder / CHECKSUMS)
        for i in np.linspace(0, len(rows) - 1, min(CHECKED_IMAGES, len(rows)), dtype=int).tolist():
            if checksum(source[i][0]) != checksums[rows[i]]:
                raise UserError(
                    f"{self.folder} was made from other images: the pixels of {source.key(i)} "
                    "differ; cache the latents again, or correct data.path"
                )

    def _expect(self, what: str, found, wanted) -> None:
        if found != wanted:
            raise UserError(f"{self.folder} was made with {what} {found}, but {wanted} is asked "
                            "for; cache the latents again, or change the config")  # fmt: skip

    def _check_shards(self, name: str, row_bytes: int) -> None:
        for shard, length in enumerate(self.meta["shards"]):
            path = self.folder / shard_name(name, shard)
            if not path.is_file() or path.stat().st_size < length * row_bytes:
                raise UserError(f"{path} is missing or cut short (expected {length} images); run "
                                "the same cache_latents.py command again")  # fmt: skip


def _count(keys: list[str]) -> str:
    return f"{len(keys)} (first {keys[0]})"


class CachedSource:
    """A source with the latents of its images: item i is (x_u8, label, latents, *features), the
    latents (F, 2, C, h, w) and features (F, T, D) float16."""

    def __init__(self, images: Source, cache: LatentCache, c: Config) -> None:
        cache.check_settings(c)
        self.images, self.cache, self.rows = images, cache, cache.join(images)
        self.num_classes, self.resolution = images.num_classes, images.resolution
        self.labels = getattr(images, "labels", None)
        features = c.uses_encoder and c.encoder.cached
        self.arrays = list(cache.rows()) if features else ["latents"]
        self.pixels = c.uses_encoder and not features  # the encoders still look at the image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, *tuple[Tensor, ...]]:
        if self.pixels or self.labels is None:
            x_u8, y = self.images[i]
        else:
            x_u8, y = NO_PIXELS, int(self.labels[i])
        return x_u8, y, *(self.cache.read(name, self.rows[i]) for name in self.arrays)

    def key(self, i: int) -> str:
        return self.images.key(i)


def row_shapes(copies: int, latent: list[int], encoders: list[dict]) -> dict[str, tuple[int, ...]]:
    """Name of each array => shape of a row; latent (C, h, w), "shape" of an encoder (T, D)."""
    shapes = {"latents": (copies, 2, *latent)}
    return shapes | {f"features-{k}": (copies, *e["shape"]) for k, e in enumerate(encoders)}


def shard_name(array: str, shard: int) -> str:
    return f"{array}-{shard:05d}.npy"


def checksum(x_u8: Tensor) -> int:
    """CRC-32 of the pixels."""
    return zlib.crc32(x_u8.contiguous().numpy())


def weights_id(name: str, file: str | None) -> str:
    """What tells an encoder's weight file: its sha256, `published`, or `random`."""
    if file in (None, "random"):
        return file or "published"
    return sha256_file(wanted_encoder(name, file).path)


def weights_digest(net: nn.Module) -> str:
    """sha256 of all weights, by name, in float32: the same for every file format."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()
