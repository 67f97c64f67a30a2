"""What every data source must offer: the class `Source`; class numbers; images that are broken."""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from models.checks.errors import UserError
from models.checks.file_kinds import read_json
from utils import cli
from utils.data.content import file_sha256s
from utils.data.images import CROP_VERSION, ImageFileError
from utils.data.listing import printable
from utils.files import TEXT

MOST_CLASSES = 1_000_000  # a larger label is no class number
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

    # how the user names the arguments that this was opened by, for messages
    words: cli.SourceWords = cli.SETTINGS
    root: Path | None = None  # the folder or file of the data, if there is one
    resolution: int  # side of the images, in pixels
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

    def fingerprint(self) -> str:
        """What tells these images from others, in their order: sha256 of resolution, crop, keys and
        bytes of the files where the images are encoded, else of the pixels (`hash_images`). It is
        true of what is there now; files that stay the same are read once (content.py)."""
        size, files = (self.resolution, self.resolution), self.files()
        if files is not None:
            keys = (self.key(i) for i in range(len(self)))
            hashes = file_sha256s(files, unreadable="unreadable")
            return hash_lines([f"{size}", CROP_VERSION, *keys, *hashes])
        starts = range(0, len(self), HASHED)
        batches = (self.read_batch(range(k, min(k + HASHED, len(self))))[0][0] for k in starts)
        return hash_images(size, (x_u8.permute(0, 2, 3, 1).numpy() for x_u8 in batches))


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


def cautions(source: Source) -> list[str]:
    """Sentences to be said as warnings at the start: the notes, and a word on a single class."""
    notes = list(source.notes)
    if source.num_classes == 1:
        notes.append(
            "all images are one class: guidance does next to nothing; if there should be more, "
            "give the folder that holds the class folders"
        )
    return notes


# --------------------------------------------------------------------------------------
# Class numbers.


def number_classes(
    labels: np.ndarray, names: Sequence[str] | None, where: object
) -> tuple[np.ndarray, list[str], list[str]]:
    """Labels (N,) int64 as class numbers 0, 1, ... without a gap, the names of these classes, and
    notes for `Source.notes`: a class without an image would be sampled but never trained.

    `names`: of label 0, 1, ...; None = the labels are the names. `where`: their file. `UserError`
    for a label that is out of range.
    """
    end = MOST_CLASSES if names is None else len(names)
    wrong = labels[(labels < 0) | (labels >= end)]
    if len(wrong):
        text = f"{where} holds the label {wrong[0]}: expected 0 .. {end - 1}"
        raise UserError(f"{text}; correct the labels")
    used = np.unique(labels)
    classes = [str(label) if names is None else str(names[label]) for label in used.tolist()]
    if len(set(classes)) < len(classes):
        double = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{where}: two classes are called {printable(double)}; rename one")
    if len(used) == (int(used[-1]) + 1 if names is None else end):
        return labels, classes, []
    without = next(label for label, found in enumerate([*used.tolist(), -1]) if label != found)
    note = (
        f"{where}: no image has the label {without}; the {len(used)} labels in use, {used[0]} .. "
        f"{used[-1]}, are numbered 0 .. {len(used) - 1} in their order"
    )
    return np.searchsorted(used, labels), classes, [note]


def read_labels(path: Path, names: Sequence[str]) -> np.ndarray:
    """(N,) int64: the label of each image in `names`, from a dataset.json {"labels": [[name,
    label], ...]}; zeros for {"labels": null}. `UserError` if one is missing or is no class."""
    record = read_json(path, "repair or remove it")
    if not isinstance(record, dict) or "labels" not in record:
        raise UserError(f'{path} holds no "labels": expected {{"labels": [[name, label], ...]}}')
    pairs, by_name = record["labels"], {}
    if pairs is None:
        return np.zeros(len(names), dtype=np.int64)
    for i, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not (isinstance(pair, list) and [*map(type, pair)] == [str, int]):
            text = f"{path}: labels[{i}]={str(pair)[:60]}: expected [name, label], the label a"
            raise UserError(f"{text} whole number; correct it")
        name, label = pair[0].replace("\\", "/"), pair[1]
        if not 0 <= label < MOST_CLASSES:
            text = f"{path}: label {str(label)[:30]} of {printable(name)}: expected"
            raise UserError(f"{text} 0 .. {MOST_CLASSES - 1}; correct it")
        if by_name.setdefault(name, label) != label:
            text = f"{path} holds two labels of {printable(name)}, {by_name[name]} and {label}"
            raise UserError(f"{text}; correct it")
    missing = [name for name in names if name.replace("\\", "/") not in by_name]
    if missing:
        text = f"{path} has no label for {printable(missing[0])} ({len(missing)} such of"
        text = f"{text} {len(names)} images)"
        raise UserError(f"{text}; complete it, or set labels to null for one class")
    return np.array([by_name[name.replace("\\", "/")] for name in names], dtype=np.int64)


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
