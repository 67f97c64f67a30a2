"""Samples on disk: blocks of images while they are made, then one .npz and what lies beside it.

    NAME.npz          `arr_0`, (N, H, W, 3) uint8: what FID suites read
    NAME.json         every setting, their hash, where and how fast the images were made
    NAME.labels.npy   (N,) int64
    NAME.png          the first images with the names of their classes
    NAME.shards/      finished blocks (utils/data/sharded.py), until NAME.json is written
    DIR/              with --png: each image as a file (utils/sampling/png.py)

A block has a fixed size, whatever the number of ranks and the batch size: a killed command can be
continued with others. With the same batch size, the bytes do not depend on kills and ranks, since a
batch always holds the same images. With another batch size some pixels differ by one grey level:
sums of floating-point numbers are rounded in another order (in bfloat16 more of them do).
"""

import math
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from models.checks.errors import UserError
from utils.cli import check_output
from utils.data.base import image_hashes, join_hashes
from utils.data.sharded import PLAN, ShardedFolder, plan_differences
from utils.evaluation.images.beside import CONTENT, hash_settings
from utils.evaluation.images.npz_images import open_array_file
from utils.files import (
    files_below,
    format_bytes,
    free_disk,
    read_record,
    write_atomically,
    write_json,
)
from utils.process import written
from utils.provenance import versions
from utils.sampling.images import DrawnImages, draw_labels
from utils.sampling.load import SampledCheckpoint
from utils.sampling.png import PngFolder
from utils.sampling.settings import BLOCK

KEY = "settings_sha256"  # the name of the hash of the settings in NAME.json
PREVIEW_IMAGES = 64

# writes (N, 3, H, W) uint8 images with a title for each to a path; the number of the classes that
# follow each other in turn, 0 if they are drawn at random
SavePreview = Callable[[Path, torch.Tensor, list[str], int], None]


class SampleFiles:
    """The files of one command: `num_samples` images of a checkpoint, and their blocks."""

    def __init__(
        self, out: Path, checkpoint: SampledCheckpoint, num_samples: int, png: Path | None = None
    ):
        self.out, self.checkpoint, self.num_samples = out, checkpoint, num_samples
        self.record_file = out.with_suffix(".json")
        self.settings = checkpoint.identity(num_samples)
        self.shape = (checkpoint.resolution, checkpoint.resolution, 3)
        self.blocks = ShardedFolder(
            out.with_suffix(".shards"),
            plan=_with_short_hash(self.settings) | {"block": BLOCK},
            num_items=num_samples,
            shard_size=BLOCK,
            rows={"images": (self.shape, np.uint8)},
        )
        plan = _with_short_hash(self.settings)
        self.pngs = PngFolder(png, plan, num_samples) if png else None

    def is_done(self) -> bool:
        """Whether --out holds these very samples. `UserError` if it holds others, or nobody knows
        which."""
        if not self.out.exists():
            return False
        record = read_record(self.record_file) if self.record_file.is_file() else None
        if record is None and read_record(self.blocks.folder / PLAN) == self.blocks.plan:
            return False  # killed between the .npz and its record
        if record is not None and record.get(KEY) == hash_settings(self.settings):
            # records of earlier versions say nothing of the content
            if record.get(CONTENT) in (None, open_array_file(self.out).fingerprint()):
                return True
            raise UserError(f"--out {self.out} holds other images than its record says: delete it "
                            "to make them again, or choose another name")  # fmt: skip
        old, found = (record or {}).get("settings"), "which ones, no readable record says"
        if isinstance(old, dict):
            changes = plan_differences(_with_short_hash(old), _with_short_hash(self.settings))
            found = ", ".join(changes) or "its hash does not fit them"
        text = f"--out {self.out} exists, of other settings ({found})"
        raise UserError(f"{text}: choose another, or delete it")

    def check(self) -> list[int]:
        """The blocks still to be made. `UserError` if something else is where they and the samples
        will be, or if there is no room. Writes nothing."""
        self._check_beside()
        if self.pngs:
            self.pngs.check()
        num_bytes = self.num_samples * math.prod(self.shape)
        place, free = free_disk(self.out)
        # the blocks, and the .npz that is joined from them
        if 2 * num_bytes > free + sum(p.stat().st_size for p in files_below(self.blocks.folder)):
            raise UserError(f"--num-samples {self.num_samples} take 2 x {format_bytes(num_bytes)} "
                            f"while they are made, {format_bytes(free)} are free in {place}: "
                            "choose another --out, or fewer")  # fmt: skip
        try:
            self.blocks.check_plan()
        except UserError as error:
            raise UserError(f"{error} (choose another --out, or delete that folder)") from None
        return self.blocks.unfinished()

    def _check_beside(self) -> None:
        """`UserError` if a file beside --out is not one of ours, as that of an .npz which somebody
        has deleted would be."""
        check_output("--out", self.record_file, written.SAMPLING)
        check_output("--out", self.out.with_suffix(".png"), written.PICTURE)
        # nothing in the labels tells whose they are: they are ours with our record, or our blocks
        known = self.record_file.is_file() or (self.blocks.folder / PLAN).is_file()
        labels = written.Kind((".npy",), "the labels of samples", lambda path: known)
        check_output("--out", self.out.with_suffix(".labels.npy"), labels)

    def begin(self) -> list[int]:
        """`check`, and make the folders that are not there."""
        todo = self.check()
        self.blocks.begin()
        if self.pngs:
            self.pngs.begin()
        return todo

    def write(self, block: int, drawn: DrawnImages) -> None:
        """All images of a block; a kill leaves the whole block or none."""
        images = drawn.result().permute(0, 2, 3, 1).numpy()
        if self.pngs:  # first: a finished block is not looked at again
            self.pngs.write(self.blocks.items(block), lambda: images)
        self.blocks.draft(block)["images"][:] = images
        self.blocks.seal(block, {"images": len(images)})

    def finish(self, facts: dict[str, Any], save_preview: SavePreview) -> None:
        """Join the blocks into the .npz and write what goes beside it, the record last; then drop
        the blocks. `facts` go into the record."""
        try:
            self._finish(facts, save_preview)
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be written ({error.strerror}): its images "
                            f"are kept in {self.blocks.folder}; mend that, and run the command "
                            "again") from None  # fmt: skip

    def _finish(self, facts: dict[str, Any], save_preview: SavePreview) -> None:
        self.record_file.unlink(missing_ok=True)  # of an .npz that was deleted
        hashes: list[bytes] = []
        write_atomically(self.out, lambda file: self._write_npz(file, hashes))
        settings, y = self.checkpoint.settings, self.labels()
        write_atomically(self.out.with_suffix(".labels.npy"), lambda file: np.save(file, y.numpy()))
        self.write_pngs(lambda items: self.blocks.read(items.start // BLOCK, "images"))
        blocks = range(min(self.blocks.num_shards, -(-PREVIEW_IMAGES // BLOCK)))
        first = np.concatenate([self.blocks.read(k, "images") for k in blocks])[:PREVIEW_IMAGES]
        titles = self.checkpoint.titles(y[:PREVIEW_IMAGES])
        grid = torch.from_numpy(first).permute(0, 3, 1, 2)
        save_preview(self.out.with_suffix(".png"), grid, titles, len(settings.classes))
        known = {"settings": self.settings, KEY: hash_settings(self.settings)}
        known |= {CONTENT: join_hashes(self.shape[:2], b"".join(hashes))}
        known |= {"checkpoint": str(self.checkpoint.folder)}
        if chosen := settings.classes:
            known |= {"class_names": self.checkpoint.titles(torch.tensor(chosen))}
        known |= {"checkpoint_sha256": hash_settings(self.settings["weights"])}
        batches = {name: getattr(settings, name) for name in ("batch_size", "decode_batch_size")}
        write_json(self.record_file, known | {"versions": versions()} | batches | facts)
        self.blocks.remove()

    def add_pngs(self) -> bool:
        """Write the images of --png that are missing from a finished .npz; whether any was."""
        if self.pngs is None or self.pngs.is_done():
            return False
        self.pngs.begin()
        images = open_array_file(self.out)
        self.write_pngs(lambda items: images.read(items.start, items.stop))
        return True

    def labels(self) -> torch.Tensor:
        """(N,) int64 of the images."""
        indices = range(self.num_samples)
        return draw_labels(self.checkpoint.settings, indices, self.checkpoint.num_classes)

    def write_pngs(self, read: Callable[[range], np.ndarray]) -> None:
        """Write the images of --png that are missing, and the list of their labels; `read` gives
        the images of a block, (n, H, W, 3) uint8."""
        if self.pngs is None:
            return
        for block in range(self.blocks.num_shards):
            items = self.blocks.items(block)
            self.pngs.write(items, partial(read, items))
        y = self.labels()
        self.pngs.finish(y.tolist(), self.checkpoint.titles(y))

    def _write_npz(self, disk: BinaryIO, hashes: list[bytes]) -> None:
        """Stream all blocks into one uncompressed .npz: memory holds one of them at a time. The zip
        entry has a fixed date, so that equal images make equal files. `hashes` gets those of the
        images of each block."""
        shape = (self.num_samples, *self.shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        archive = zipfile.ZipFile(disk, "w")
        with archive, archive.open(entry, "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in range(self.blocks.num_shards):
                images = np.ascontiguousarray(self.blocks.read(block, "images"))
                hashes.append(image_hashes(images))
                file.write(images.data)


def _with_short_hash(settings: dict) -> dict:
    """The settings with one hash of all weights in place of one for each file."""
    return settings | {"weights": hash_settings(settings.get("weights") or {})}
