"""Fills a cache of latents: what frozen networks make of images, shard by shard."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.checks.errors import UserError
from models.checks.values import RecordError
from models.encoders import Encoder
from models.vae import VAE
from utils.data.base import Source, image_hashes, join_hashes
from utils.data.images import CROP_VERSION, u8_to_pm1
from utils.data.latent_stats import ChannelMoments
from utils.data.latents import CACHE_FORMAT, CHECKSUMS, checksum, weights_digest
from utils.data.sampling import make_loader
from utils.data.sharded import KEYS, ShardedFolder
from utils.files import TEXT, write_atomically, write_lines
from utils.precision import autocast
from utils.provenance import versions
from utils.records import number


@dataclass(kw_only=True)
class CacheShard:
    """What the record of a shard holds: sums of its latents (3, C), a checksum of each image, and
    `image_hashes` in hexadecimal."""

    moments: list[list[float]]
    checksums: list[int] = number(at_least=0, below=2**32)
    hashes: str

    def __post_init__(self) -> None:
        digits = set(self.hashes) <= set("0123456789abcdef")
        if not digits or len(self.hashes) != 64 * len(self.checksums):
            count = len(self.checksums)
            raise RecordError(f"hashes: expected 64 digits for each of {count} images")


@dataclass
class CacheWriter:
    """Fills `folder` with what frozen networks make of the images of `source`. `begin` completes
    its plan, which is a layout for `cache_rows`, with resolution and precision."""

    folder: ShardedFolder
    source: Source
    vae: VAE  # on the device where it runs, as the encoders
    encoders: list[Encoder]
    precision: str  # of utils/precision.py

    @contextmanager
    def begin(self) -> Iterator[list[int]]:
        """Complete the plan, and hold the folder; gives the shards still to be written. `UserError`
        if it was begun with other images, networks or settings. For the main process only."""
        folder, keys = self.folder, "".join(f"{key}\n" for key in self.source.list_keys())
        pairs = zip(folder.plan["encoders"], self.encoders)
        folder.plan |= {
            "format": CACHE_FORMAT,
            "crop_version": CROP_VERSION,
            "num_images": len(self.source),
            "keys_sha256": hashlib.sha256(keys.encode(*TEXT)).hexdigest(),
            "vae_sha256": weights_digest(self.vae),
            "encoders": [entry | {"sha256": weights_digest(net)} for entry, net in pairs],
            "shard_size": folder.shard_size,
        }
        folder.check_plan([*folder.plan])
        folder.plan |= {"images_sha256": self.source.fingerprint()}
        folder.check_plan()
        with folder.locked():
            folder.begin()
            yield folder.unfinished()

    def write(self, shards: list[int], batch_size: int, workers: int, progress: bool) -> None:
        """Encode and write these shards, one after the other."""
        images = [self.folder.items(shard) for shard in shards]
        starts = [(items, k) for items in images for k in range(0, len(items), batch_size)]
        batches = [list(items[k : k + batch_size]) for items, k in starts]
        on_gpu = next(self.vae.parameters()).is_cuda
        loader = iter(make_loader(self.source, batches, workers, on_gpu))
        total = sum(map(len, images))
        with tqdm(total=total, unit="img", disable=not progress, mininterval=1) as bar:
            for shard, indices in zip(shards, images):
                parts = (next(loader)[0] for _ in range(0, len(indices), batch_size))
                self._write_shard(shard, parts, bar)

    def _write_shard(self, shard: int, parts: Iterator[Tensor], bar: tqdm) -> None:
        arrays, plan = self.folder.draft(shard), self.folder.plan
        moments, checksums, hashes = ChannelMoments(plan["latent_shape"][0]), [], b""
        for x_u8 in parts:
            at = slice(len(checksums), len(checksums) + len(x_u8))
            rows = self._encode(x_u8, plan["copies"])
            for array, row in zip(arrays.values(), rows):
                array[at] = row.numpy()
            moments.add(*rows[0].flatten(0, 1).unbind(1))
            checksums += map(checksum, x_u8)
            hashes += image_hashes(x_u8.permute(0, 2, 3, 1).numpy())
            bar.update(len(x_u8))
        record = {"moments": moments.sums.tolist(), "checksums": checksums}
        self.folder.seal(shard, record | {"hashes": hashes.hex()})

    @torch.no_grad()
    def _encode(self, x_u8: Tensor, copies: int) -> list[Tensor]:
        """Images (n, 3, H, W) uint8 => their rows of every array, (n, copies, ...) float16 on the
        CPU. `UserError` if one is not finite."""
        x, views = u8_to_pm1(x_u8.to(next(self.vae.parameters()).device).contiguous()), []
        for pixels in (x, x.flip(-1))[:copies]:
            with autocast(x.device, self.precision):
                posterior = self.vae.encode(pixels)
                feats = [encoder(pixels).float() for encoder in self.encoders]
            views.append([torch.stack([posterior.mean, posterior.std], dim=1), *feats])
        rows = [torch.stack(views, dim=1).half().cpu() for views in zip(*views)]
        if not all(array.isfinite().all() for array in rows):
            text = "the latents or features are not finite in float16: the network does not fit"
            raise UserError(f"{text} these images, or needs --precision fp32")
        return rows

    def finish(self, vae: str) -> None:
        """Join the records of all shards; write meta.json last. `vae`: its name, for messages.
        `UserError` if the images have changed since `begin`."""
        folder, records = self.folder, self.folder.records(CacheShard)
        folder.require_unchanged({"images_sha256": self.source.fingerprint()})
        moments = ChannelMoments(folder.plan["latent_shape"][0])
        for shard, record in enumerate(records):
            size = [len(record.checksums), len(record.moments), *{*map(len, record.moments)}]
            if size != [len(folder.items(shard)), *moments.sums.shape]:
                path = folder.record_file(shard)
                text = f"{path} does not fit the images and channels of its shard; delete it, and"
                raise UserError(f"{text} run the same command again")
        moments.sums += sum(torch.tensor(r.moments, dtype=torch.float64) for r in records)
        mean, std = moments.result()
        checksums = np.array([c for r in records for c in r.checksums], dtype=np.uint32)
        write_atomically(folder.folder / CHECKSUMS, lambda file: np.save(file, checksums))
        write_lines(folder.folder / KEYS, self.source.list_keys())
        lengths = [len(record.checksums) for record in records]
        stats = {"shards": lengths, "mean": mean.tolist(), "std": std.tolist()}
        size = (self.source.resolution, self.source.resolution)
        hashes = bytes.fromhex("".join(record.hashes for record in records))
        stats |= {"pixels_sha256": join_hashes(size, hashes)}
        folder.finish(folder.plan | {"vae": vae} | stats | {"versions": versions()})
