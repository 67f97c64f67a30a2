"""What every data source must offer: the class `Source`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from models.errors import UserError
from utils.files import TEXT


class Source(ABC):
    """A data set of labelled images of one size: all that the rest of the code knows of it.

    A new kind of data is a subclass in a file of its own and one row in utils/data/registry.py. It
    must set `resolution` and `classes`, define `__init__`, `__getitem__` and `key`, and either set
    `labels` or define `__len__`; with `sizes` it can be packed, too. It is pickled when loader
    workers start: no open files then.
    """

    needs_path: bool = True  # whether data.path must name the data
    path_may_be_file: bool = False  # whether data.path may be a file; else it must be a folder
    splits: tuple[str, ...] = ("all",)  # values of data.split

    root: Path | None = None  # the folder or file of the data, if there is one
    resolution: int  # side of the images, in pixels
    classes: Sequence[str]  # names of the classes, in the order of the labels
    # (N,) int64, if the labels are known without reading the images; set it if you can: cached
    # latents then need no image, and packing reads each image once.
    labels: np.ndarray | None = None

    def __init__(self, root: Path | None, resolution: int, split: str = "all") -> None:
        """Open the data; `UserError` if they are not there or cannot be used."""
        self.root, self.resolution = root, resolution

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Image i as a (3, resolution, resolution) uint8 tensor, and its label, from 0 to
        num_classes - 1. Any memory layout will do; a view of (H, W, 3) memory is the fastest.
        `UnreadableImageError` if the image is broken."""

    @abstractmethod
    def key(self, i: int) -> str:
        """A name of image i that stays the same; cached latents are joined to images by it."""

    def list_keys(self) -> list[str]:
        """The keys of all images; `UserError` for one that does not fit in a line of a file."""
        keys = [self.key(i) for i in range(len(self))]
        if broken := [key for key in keys if "\n" in key]:
            raise UserError(f"{broken[0]!r} has a line break in its name; rename it")
        return keys

    def label(self, i: int) -> int:
        """The label of image i, without reading the image where that is possible."""
        return self[i][1] if self.labels is None else int(self.labels[i])

    def sizes(self) -> Iterable[int] | None:
        """Bytes of the files that hold the encoded images: with the keys, they tell one data set
        from another without decoding it. None if the source holds pixels."""
        return None

    def fingerprint(self) -> str:
        """sha256 of the resolution, and of the keys and file sizes where there are encoded files
        (hashing the pixels would decode everything once more), else of the pixels."""
        size, sizes = (self.resolution, self.resolution), self.sizes()
        if sizes is not None:
            keys = (self.key(i) for i in range(len(self)))
            return hash_lines([f"{size}", *keys, *map(str, sizes)])
        return hash_images(size, (self[i][0].permute(1, 2, 0).numpy() for i in range(len(self))))


def hash_lines(lines: Iterable[str]) -> str:
    """sha256 of strings, each closed by a zero byte."""
    return hashlib.sha256(b"".join(f"{line}\0".encode(*TEXT) for line in lines)).hexdigest()


def hash_images(size: tuple[int, int], images: Iterable[np.ndarray]) -> str:
    """sha256 of the size (H, W) and of the pixels of uint8 images (H, W, 3), or of blocks
    (n, H, W, 3), in order: the same for the same images, however they are stored."""
    digest = hashlib.sha256(f"{size[0]}x{size[1]}".encode())
    for image in images:
        digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


class Names(Sequence):
    """Many strings in one buffer. Loader workers share it; a list of strings would be copied into
    each of them, page by page, because touching a string writes its reference count."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode(*TEXT) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._buffer = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._buffer[self._ends[i] : self._ends[i + 1]].decode(*TEXT)
