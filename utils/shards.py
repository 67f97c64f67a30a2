"""Finished batches of samples on disk: a killed run goes on from them, an .npz is made of them.

NAME.shards/settings.json   the settings, and a hash of them
NAME.shards/000012.npy      batch 12, uint8 (n, H, W, 3)
"""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from models.errors import UserError
from utils.checkpoint import write_atomically

KEY = "settings_sha256"  # name of the hash, here and in the record beside an .npz


class Shards:
    """The batches of one set of settings, which name `num_samples`, `batch_size`, `resolution`."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self.key = hash_settings(settings)

    def open(self) -> None:
        """Create the folder or go on with it; `UserError` if it belongs to other settings."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {self.folder}: {error.strerror}; choose another --out"
            ) from None
        file = self.folder / "settings.json"
        if file.is_file() or any(self.folder.glob("*.npy")):
            self._check(read_record(file))
        else:
            write_atomically(file, json.dumps({KEY: self.key, "settings": self.settings}))

    def _check(self, found: dict | None) -> None:
        if found is None or found.get(KEY) != self.key:
            raise UserError(
                f"{self.folder} holds samples of other settings "
                f"({differing(found, self.settings)}): choose another --out, or delete that folder"
            )

    def exist(self) -> bool:
        """Whether the folder holds batches of these settings."""
        return (read_record(self.folder / "settings.json") or {}).get(KEY) == self.key

    def __len__(self) -> int:
        return -(-self.settings["num_samples"] // self.settings["batch_size"])

    def indices(self, index: int) -> range:
        """The images of one batch."""
        size = self.settings["batch_size"]
        return range(index * size, min((index + 1) * size, self.settings["num_samples"]))

    def unfinished(self) -> list[int]:
        return [index for index in range(len(self)) if not self._is_whole(index)]

    def _is_whole(self, index: int) -> bool:
        """Whether a batch is there and as it must be; a damaged or foreign file is made again."""
        file, side = self.file(index), self.settings["resolution"]
        if not file.is_file():
            return False
        try:
            images = np.load(file, mmap_mode="r", allow_pickle=False)
            whole = images.dtype == np.uint8 and images.shape == (
                len(self.indices(index)),
                side,
                side,
                3,
            )
            whole = whole and file.stat().st_size == images.offset + images.nbytes
        except (OSError, ValueError, EOFError):
            whole = False
        if not whole:
            print(f"{file} is damaged: made again")
        return whole

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def write(self, index: int, images: np.ndarray) -> None:
        """(n, H, W, 3) uint8; a kill leaves the whole file or none."""
        draft = self.file(index).with_suffix(".tmp")
        with draft.open("wb") as file:
            np.save(file, images)
            os.fsync(file.fileno())
        draft.rename(self.file(index))

    def first_images(self, num: int) -> np.ndarray:
        """The first `num` images, or all if there are fewer."""
        count = min(len(self), -(-num // self.settings["batch_size"]))
        return np.concatenate([np.load(self.file(index)) for index in range(count)])[:num]

    def write_npz(self, out: Path) -> None:
        """Stream all batches into one uncompressed .npz: memory holds one of them at a time.

        The zip entry has a fixed date, so that equal images make equal files.
        """
        side = self.settings["resolution"]
        shape = (self.settings["num_samples"], side, side, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        draft = out.with_name(f".{out.name}.tmp")
        entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        with draft.open("wb") as disk:
            with (
                zipfile.ZipFile(disk, "w") as archive,
                archive.open(entry, "w", force_zip64=True) as file,
            ):
                np.lib.format.write_array_header_1_0(file, header)
                for index in range(len(self)):
                    file.write(np.load(self.file(index)).data)
            os.fsync(disk.fileno())
        draft.rename(out)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def hash_settings(settings: dict) -> str:
    """sha256 of all settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_record(file: Path) -> dict | None:
    """A JSON object from disk; None if there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def differing(found: dict | None, settings: dict) -> str:
    """What tells the settings of a record from `settings`, in words."""
    if found is None or not isinstance(found.get("settings"), dict):
        return "which ones, no readable record tells"
    old, words = found["settings"], []
    for name in sorted(set(old) | set(settings)):
        was, now = old.get(name), settings.get(name)
        if was != now:
            words.append(f"{name} differ" if isinstance(now, dict) else f"{name} {was}, now {now}")
    return ", ".join(words) or "its hash does not fit"
