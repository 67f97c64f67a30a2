"""What every data source must offer: the class `Source`; images that are broken; fingerprints."""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from models.checks.errors import UserError, printable
from utils import cli
from utils.data.content import file_sha256s
from utils.data.decoding import oddities
from utils.data.decoding.conversion import PLAIN, Conversion
from utils.data.images import FIRST_CROP, ImageFileError, read_image
from utils.data.labels import AUTO
from utils.files import TEXT

MOST_IN_A_ROW = 100  # unreadable images, over the limit, before one is no longer replaced
HASHED = 64  # images that are read at a time to hash them
TRIED = 8  # items of which one must be readable before a run starts
SHOWN_CLASSES = 5  # whose names stand in a line about the data

# (shape, dtype=...) => memory for a part of a batch, like torch.empty
Allocator = Callable[..., Tensor]


class BadImages:
    """The images of a source that this process found unreadable: each is named once, in a line of
    its own. `error` is the `UserError` to stop with once they are more than `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.reasons: dict[str, str] = {}  # of each image, by its key
        self.error: UserError | None = None

    def add(self, found: Mapping[str, str]) -> None:
        """Note these images and why they cannot be read."""
        for key, reason in found.items():
            if key in self.reasons:
                continue
            self.reasons[key] = reason
            number = f"{len(self.reasons)} of at most {self.most}"
            text = f"warning: {printable(key)} cannot be read ({reason}); another image takes its"
            tqdm.write(f"{text} place ({number}: data.max_bad_images)", file=sys.stderr)
        if len(self.reasons) > self.most:
            last = printable(next(reversed(self.reasons)))
            self.error = UserError(
                f"{len(self.reasons)} images cannot be read, more than data.max_bad_images="
                f"{self.most}; the last: {last}; repair or remove them, pack the data "
                "(scripts/prepare_data.py leaves them out), or raise the limit"
            )


class Source(ABC):
    """A data set of labelled images of one size: all that the rest of the code knows of it.

    A new kind of data is a subclass in a file of its own and one row in utils/data/registry.py. It
    must set `resolution` and `classes`, define `__init__`, `__getitem__` and `key`, and either set
    `labels` or define `__len__`; with `files` it can be packed, too. It is pickled when loader
    workers start: no open files then.
    """

    needs_path: bool = True  # whether data.path must name the data
    path_may_be_file: bool = False  # whether data.path may be a file; else it must be a folder
    splits: tuple[str, ...] = ("all",)  # values of data.split
    takes_labels: bool = False  # whether `labels_from` is read
    random_access: bool = True  # whether any image is read at once; else the data must be packed

    # how the user names the arguments that this was opened by, for messages
    words: cli.SourceWords = cli.SETTINGS
    # data.labels: "folder", "none", the path of a file, or "auto" = what the data themselves say
    labels_from: str = AUTO
    root: Path | None = None  # the folder or file of the data, if there is one
    resolution: int  # side of the images, in pixels
    conversion: Conversion = PLAIN  # how files become pixels; of packed data, how they did
    classes: Sequence[str]  # names of the classes, in the order of the labels
    # (N,) int64, if the labels are known without reading the images; set it if you can: cached
    # latents then need no image, and packing reads each image once.
    labels: np.ndarray | None = None
    # what a user should know of these data, a sentence each; `describe` has the numbers
    notes: Sequence[str] = ()
    # `content_of` these data, where a run has looked at it
    content: dict[str, str] | None = None
    # the unreadable images so far, if others are to take their place; None = they are errors
    bad: BadImages | None = None

    def __init__(self, root: Path | None, resolution: int, split: str = "all") -> None:
        """Open the data; `UserError` if they are not there or cannot be used."""
        self.root, self.resolution = root, resolution

    @classmethod
    def own_resolution(cls, root: Path) -> int | None:
        """The resolution that the data at `root` have, where that is no choice; None where it is.
        `UserError` if they cannot be used."""
        return None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        assert self.labels is not None, "a source without labels defines __len__"
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Image i as a (3, resolution, resolution) uint8 tensor, and its label, from 0 to
        num_classes - 1. Any memory layout will do; a view of (H, W, 3) memory is the fastest.
        `UnreadableImageError` if the image is broken."""

    def read(self, i: int) -> tuple[tuple, dict[str, str]]:
        """Item i and {}. If it cannot be read and `bad` is set: the next item that can be, which is
        a function of i alone, and the keys and reasons of those between, for `bad.add`."""
        if self.bad is None:
            return self[i], {}
        found: dict[str, str] = {}
        while True:
            j = (i + len(found)) % len(self)
            try:
                return self[j], found
            except ImageFileError as error:
                found[self.key(j)] = error.reason
                if len(found) > self.bad.most + MOST_IN_A_ROW or len(found) == len(self):
                    raise

    def read_batch(
        self, indices: Sequence[int], empty: Allocator = torch.empty
    ) -> tuple[list[Tensor], dict[str, str]]:
        """The items at `indices`, each as `read` gives it, as one batch: [x_u8 (B, 3, R, R) uint8
        in channels-last memory, y (B,) int64, what else the source gives]; and the keys and reasons
        of all images that could not be read. Large parts lie in memory that `empty` makes.

        A source may override this to copy each image only once; the bits must stay the same.
        """
        items, unreadable = [], {}
        for i in indices:
            item, found = self.read(i)
            items.append(item)
            unreadable |= found
        return collate(items, empty), unreadable

    def take(self, i: int) -> tuple:
        """Item i, or the one that takes its place, which is noted in `bad`. For the process that
        owns this source, not for a worker."""
        item, found = self.read(i)
        if found and self.bad is not None:
            self.bad.add(found)
        return item

    def try_some(self) -> None:
        """`UserError` if none of some items, evenly spaced over the data, can be read."""
        error = None
        for i in np.linspace(0, len(self) - 1, min(TRIED, len(self)), dtype=int).tolist():
            try:
                self[i]
                return
            except ImageFileError as found:
                error = error or found
        if error is not None:
            raise error

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

    def files(self) -> Iterable[Path] | None:
        """The files that hold the encoded images: with the keys, their bytes tell one data set from
        another without decoding it. None if the source holds pixels."""
        return None

    def hash_files(self) -> Sequence[str] | None:
        """What stands for the encoded images in the fingerprint: sha256 of each of the `files`."""
        files = self.files()
        return None if files is None else file_sha256s(files, unreadable="unreadable")

    def fingerprint(self) -> str:
        """What tells these images from others, in their order: sha256 of resolution, crop and
        conversion, keys and bytes of the files where the images are encoded, else of the pixels
        (`hash_images`). It is true of what is there now; files that stay the same are read once
        (content.py)."""
        size, hashes = (self.resolution, self.resolution), self.hash_files()
        if hashes is not None:
            keys = (self.key(i) for i in range(len(self)))
            # the first version: runs that began then go on
            crop = f"{FIRST_CROP} {self.conversion.describe()}".rstrip()
            return hash_lines([f"{size}", crop, *keys, *hashes])
        starts = range(0, len(self), HASHED)
        batches = (self.read_batch(range(k, min(k + HASHED, len(self))))[0][0] for k in starts)
        return hash_images(size, (x_u8.permute(0, 2, 3, 1).numpy() for x_u8 in batches))


class EncodedSource(Source):
    """A source of image files, wherever they lie, which are converted when they are read."""

    labels: np.ndarray
    takes_labels = True

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        file, where = self.encoded(i), self.where(i)
        return read_image(file, where, self.resolution, self.conversion), int(self.labels[i])

    @abstractmethod
    def encoded(self, i: int) -> Path | BinaryIO:
        """The file of image i; `ImageFileError` if it is not there or damaged."""

    @abstractmethod
    def where(self, i: int) -> str:
        """How messages call image i."""


def collate(items: Sequence[tuple], empty: Allocator = torch.empty) -> list[Tensor]:
    """Items (x_u8, label, ...) of a source => one batch. The images (B, 3, H, W) are channels-last:
    they are stacked as (B, H, W, 3), the order in which sources hold their pixels."""
    pixels = [x_u8.permute(1, 2, 0) for x_u8, *_ in items]
    x_u8 = empty((len(items), *pixels[0].shape), dtype=pixels[0].dtype)
    torch.stack(pixels, out=x_u8)
    return [x_u8.permute(0, 3, 1, 2), *default_collate([rest for _, *rest in items])]


def describe(source: Source) -> str:
    """The images, the number of classes and the names of the first ones, in a line."""
    names = [printable(name) for name in source.classes[:SHOWN_CLASSES]]
    more = ", ..." if source.num_classes > len(names) else ""
    classes = "1 class" if source.num_classes == 1 else f"{source.num_classes:,} classes"
    return f"{len(source):,} images of {classes}: {', '.join(names)}{more}"


def notes_on_pictures(source: Source) -> list[str]:
    """What should be known of the files that hold the images, as far as some of them tell."""
    if source.files() is None or not source.random_access:
        return []
    return oddities.sample(source.__getitem__, len(source), source.conversion)


def cautions(source: Source) -> list[str]:
    """Sentences to be said as warnings at the start: the notes, what some pictures tell, and a word
    on a single class."""
    notes = [*source.notes, *notes_on_pictures(source)]
    if source.num_classes == 1:
        notes.append(
            "all images are one class: guidance does next to nothing; if there should be more, "
            "give the folder that holds the class folders"
        )
    return notes


# --------------------------------------------------------------------------------------
# Fingerprints and names.


def content_of(source: Source) -> dict[str, str]:
    """What is learned from: the fingerprint of the images, and sha256 of the labels if they are
    known without reading the images."""
    content = {"images_sha256": source.fingerprint()}
    if source.labels is not None:
        labels = map(str, source.labels.tolist())
        content["labels_sha256"] = hash_lines([*labels, *source.classes])
    return content


def hash_lines(lines: Iterable[str]) -> str:
    """sha256 of strings, each closed by a zero byte."""
    return hashlib.sha256(b"".join(f"{line}\0".encode(*TEXT) for line in lines)).hexdigest()


def hash_images(size: tuple[int, int], images: Iterable[np.ndarray]) -> str:
    """sha256 of the size (H, W) and of the pixels of uint8 images (H, W, 3), or of blocks
    (n, H, W, 3), in order: the same for the same images, however they are stored."""
    return join_hashes(size, b"".join(map(image_hashes, images)))


def image_hashes(images: np.ndarray) -> bytes:
    """sha256 of each of the images (n, H, W, 3), or of the one image (H, W, 3), 32 bytes each."""
    block = np.ascontiguousarray(images).reshape(-1, *images.shape[-3:])
    return b"".join(hashlib.sha256(image.data).digest() for image in block)


def join_hashes(size: tuple[int, int], hashes: bytes) -> str:
    """What `hash_images` says of images of this size (H, W) with these `image_hashes`."""
    return hashlib.sha256(f"{size[0]}x{size[1]}".encode() + hashes).hexdigest()


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
