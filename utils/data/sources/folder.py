"""Images in a folder: one subfolder a class, or all in one class."""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from models.checks.errors import UserError
from utils.cli import SourceWords
from utils.data.base import Names, Source, number_classes, printable, read_labels
from utils.data.images import read_image
from utils.data.listing import LABELS, is_image_name, list_images

# Folders of these names hold parts of a data set, each with the class folders.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
# Folders of these names lie beside the images and belong to them; none of them is a class.
COMPANIONS = {"label", "labels", "mask", "masks", "annotation", "annotations", "gt", "depth"}
COMPANIONS |= {"segmentation", "segmentations", "bbox", "bboxes", "thumbnail", "thumbnails"}
SIBLINGS = 100  # entries beside a folder that are looked at


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
        found = _ClassFolders(root, self.words)
        if os.path.lexists(root / LABELS):
            names = sorted(name for below in found.per_class for name in below) + found.flat
            labels = read_labels(root / LABELS, names)
            self.labels, self.classes, notes = number_classes(labels, None, root / LABELS)
            notes = [*notes, f"the labels are those of {root / LABELS}, not the folders"]
        else:
            self.classes, per_class, notes = found.classes_of_folders()
            names = [name for below in per_class for name in below]
            self.labels = np.repeat(np.arange(self.num_classes), [len(b) for b in per_class])
        ignored = found.listing.ignored_line()
        self.notes = [*notes, *([ignored] if ignored else [])]
        self._names = Names(names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path = self.root / self._names[i]
        return read_image(path, str(path), self.resolution), int(self.labels[i])

    def key(self, i: int) -> str:
        """Path below root, with forward slashes."""
        return self._names[i]

    def files(self) -> Iterable[Path]:
        """Each image is a file."""
        return (self.root / name for name in self._names)


class _ClassFolders:
    """The images of a `Listing` as classes, and what is odd about its folders."""

    def __init__(self, root: Path, words: SourceWords) -> None:
        self.root, self.words = root, words
        self.listing = list_images(root)
        self.listing.require_images("give the folder of the class folders")
        self.folders = list(self.listing.per_class)
        self.per_class = list(self.listing.per_class.values())
        self.flat = self.listing.flat

    def classes_of_folders(self) -> tuple[list[str], list[list[str]], Iterable[str]]:
        """Class names, the images of each, and notes; `UserError` if the folder is no data set."""
        if self.flat and any(self.per_class):
            text = f"{self.root} holds images ({self.flat[0]}) beside class folders"
            raise UserError(f"{text}; move them away")
        if self.flat:
            return ["."], [self.flat], self._notes_on_siblings()
        self._refuse_what_are_no_classes()
        return self.folders, self.per_class, [*self._notes_on_levels(), *self._notes_on_names()]

    def _refuse_what_are_no_classes(self) -> None:
        """`UserError` for folders that are the parts of a data set, or that hold no images."""
        root, pairs = self.root, zip(self.folders, self.per_class)
        filled = [name for name, images in pairs if images]
        parts = {name.lower() for name in filled} <= PARTS
        if parts and (self._nested or len(filled) > 1):
            text = f"{root} holds {' and '.join(filled)}, which are parts of a data set and no"
            raise UserError(f"{text} classes; give one of them, e.g. {self._as_path(filled[0])}")
        if len(filled) == len(self.folders):
            return
        empty = self.folders[self.per_class.index([])]
        text = f"class folder {root / empty} holds no images; "
        text += self.listing.unread(empty) or "fill or remove it"
        if len(filled) == 1:  # images beside their labels, for example
            text += f", or give the only folder with images, {self._as_path(filled[0])}"
        raise UserError(text)

    @property
    def _nested(self) -> bool:
        """Whether no class folder holds an image itself."""
        return all(name.count("/") > 1 for below in self.per_class for name in below)

    def _as_path(self, *below: str | Path) -> str:
        """How the user would give a folder below this one as the data."""
        return printable(self.words.path.format(Path(self.root, *below)))

    def _notes_on_levels(self) -> Iterator[str]:
        """Where the classes seem to lie deeper."""
        if not self._nested:
            return
        inner = sorted({os.path.dirname(name) for below in self.per_class for name in below})
        text = f"the images lie in folders of folders ({printable(inner[0])}), and the upper ones"
        text += f" are the classes: is {self.root} one level too high?"
        if common := os.path.commonpath(inner):
            text += f" Then give {self._as_path(common)}"
        yield text

    def _notes_on_names(self) -> Iterator[str]:
        """Of class folders whose names tell that they are no classes, or that differ too little."""
        by_lower = {name.casefold(): name for name in self.folders}
        if twins := [name for name in self.folders if by_lower[name.casefold()] != name]:
            other = by_lower[twins[0].casefold()]
            yield f"class folders {twins[0]} and {other} differ in case alone"
        beside = [name for name in self.folders if name.lower() in COMPANIONS]
        others = [name for name in self.folders if name not in beside]
        if beside and len(others) == 1:
            yield (
                f"{' and '.join(beside)} would be trained on as classes of their own; if they "
                f"only belong to the images in {others[0]}, give {self._as_path(others[0])}"
            )

    def _notes_on_siblings(self) -> Iterator[str]:
        """Of other folders with images beside this one, which is then perhaps a class folder."""
        root = Path(os.path.realpath(self.root))
        if root.name.lower() in PARTS:
            return
        found = []
        with suppress(OSError), os.scandir(root.parent) as entries:
            for entry in itertools.islice(entries, SIBLINGS):
                own = entry.name == root.name or entry.name.lower() in PARTS
                if not own and not entry.name.startswith(".") and _holds_images(entry):
                    found.append(entry.name)
        if found:
            yield (
                f"{printable(min(found))} beside {root.name} holds images too: if these are "
                f"classes, {self.root} is one level too low; give {self._as_path(root.parent)}"
            )


def _holds_images(entry: os.DirEntry) -> bool:
    """Whether a folder holds an image itself, among its first files."""
    try:
        with os.scandir(entry) as files:
            return any(is_image_name(file.name) for file in itertools.islice(files, SIBLINGS))
    except OSError:  # no folder, or not to be read
        return False
