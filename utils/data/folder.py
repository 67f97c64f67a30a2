"""Images in a folder: one subfolder a class, or all in one class."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from models.errors import UserError
from utils.data.base import Names, Source, number_classes, printable, read_labels
from utils.data.images import read_image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LABELS = "dataset.json"  # of the layout of EDM's and REPA's tools, whose folders are no classes
# Folders of these names hold parts of a data set, each with the class folders.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


class FolderSource(Source):
    """root/class/**/*.{jpg,jpeg,png,webp,bmp}, or images in root itself = one class; with a
    root/dataset.json, the labels are those in it, and the folders have no meaning.

    Class folders in natural order (2 before 10; ImageNet's wnids as everywhere) are labels 0, 1 ...
    Names that begin with a dot are ignored. Images are cropped as ADM does when they are read.
    """

    root: Path
    labels: np.ndarray

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        super().__init__(root, resolution)
        found = _Listing(root)
        if os.path.lexists(root / LABELS):
            names = sorted(name for below in found.per_class for name in below) + found.flat
            labels = read_labels(root / LABELS, names)
            self.labels, self.classes, notes = number_classes(labels, None, root / LABELS)
            notes.append(f"the labels are those of {root / LABELS}, not the folders")
        else:
            self.classes, per_class, notes = found.classes_of_folders()
            names = [name for below in per_class for name in below]
            self.labels = np.repeat(np.arange(self.num_classes), [len(b) for b in per_class])
        self.notes = [*notes, *found.notes()]
        self._names = Names(names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path = self.root / self._names[i]
        return read_image(path, str(path), self.resolution), int(self.labels[i])

    def key(self, i: int) -> str:
        """Path below root, with forward slashes."""
        return self._names[i]

    def sizes(self) -> Iterable[int]:
        """The size of each image's file."""
        for name in self._names:
            try:
                yield os.stat(self.root / name).st_size
            except OSError as error:
                text = f"cannot read {self.root / name}: {error.strerror}; repair or remove it"
                raise UserError(text) from error


class _Listing:
    """The images below a folder: `flat` in the folder itself, `per_class` below each of its
    `folders`, sorted paths below root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored: list[str] = []  # visible files that are no images by their names
        # (device, inode) of the folders above: a link to one of them would never end
        above = [_identity(folder) for folder in (root, *Path(os.path.realpath(root)).parents)]
        folders, files = self._scan("")
        self.folders = sorted(folders, key=natural_key)
        self.flat = sorted(self._images(files))
        self.per_class = [self._below(folder, above) for folder in self.folders]
        if not (self.flat or any(self.per_class)):
            text = f"no images in {root}: looked for {', '.join(IMAGE_EXTENSIONS)}"
            raise UserError(f"{text}, also in subfolders; give the folder of the class folders")

    def _scan(self, folder: str) -> tuple[list[str], list[str]]:
        """Paths below root of the visible folders and files in a folder."""
        found: tuple[list[str], list[str]] = [], []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        found[not _is_folder(entry)].append(path)
        except OSError as error:
            text = f"cannot list {self.root / folder}: {error.strerror}; repair or remove it"
            raise UserError(text) from error
        return found

    def _images(self, files: list[str]) -> list[str]:
        self.ignored += [f for f in files if not is_image_name(f) and f != LABELS]
        return [f for f in files if is_image_name(f)]

    def _below(self, top: str, above: list[tuple[int, int]]) -> list[str]:
        """All images below a class folder. Links to folders are followed, each folder once."""
        images, seen, todo = [], set(), [(top, above)]
        while todo:
            folder, above = todo.pop()
            identity = _identity(self.root / folder)
            if identity in above:
                raise UserError(f"{self.root / folder} links back to a folder above it; remove it")
            if identity not in seen:
                seen.add(identity)
                folders, files = self._scan(folder)
                images += self._images(files)
                todo += [(each, [*above, identity]) for each in sorted(folders, reverse=True)]
        return sorted(images)

    def classes_of_folders(self) -> tuple[list[str], list[list[str]], list[str]]:
        """Class names, the images of each, and notes; `UserError` if the folder is no data set."""
        root, classes = self.root, self.folders
        if self.flat and any(self.per_class):
            text = f"{root} holds images ({self.flat[0]}) beside class folders"
            raise UserError(f"{text}; move them away")
        if self.flat:
            return ["."], [self.flat], []
        if not all(self.per_class):
            empty = root / classes[self.per_class.index([])]
            raise UserError(f"class folder {empty} holds no images; fill or remove it")
        # whether no class folder holds an image itself
        nested = all(name.count("/") > 1 for below in self.per_class for name in below)
        inner = self.per_class[0][0].split("/")[1]
        if nested and {name.lower() for name in classes} <= PARTS:
            text = f"{root} holds {' and '.join(classes)}, which are parts of a data set and no"
            raise UserError(f"{text} classes; give one of them, e.g. data.path={root / classes[0]}")
        notes = []
        if nested:
            notes.append(
                f"the images lie in folders of folders ({printable(f'{classes[0]}/{inner}')}), and "
                f"the upper ones are the classes: is {root} one level too high?"
            )
        by_lower = {name.casefold(): name for name in classes}
        if twins := [name for name in classes if by_lower[name.casefold()] != name]:
            other = by_lower[twins[0].casefold()]
            notes.append(f"class folders {twins[0]} and {other} differ in case alone")
        return classes, self.per_class, notes

    def notes(self) -> list[str]:
        """Of the files that are passed over."""
        if not self.ignored:
            return []
        text = f"{len(self.ignored)} files below {self.root} are no images by their names"
        first = printable(min(self.ignored))
        return [f"{text} and are ignored (first {first}; images are {', '.join(IMAGE_EXTENSIONS)})"]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; repair or remove it") from error
    return found.st_dev, found.st_ino


def natural_key(name: str) -> tuple:
    """Sort key: 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], name


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name, or its path."""
    name = name.rsplit("/", 1)[-1]
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)
