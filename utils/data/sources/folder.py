"""Images in a folder: one subfolder a class, or all in one class."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from models.errors import UserError
from utils.cli import SourceWords
from utils.data.base import Names, Source, number_classes, printable, read_labels
from utils.data.images import read_image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Pictures of these kinds are ignored, and their users told so.
UNREAD_EXTENSIONS = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".ppm")
LABELS = "dataset.json"  # of the layout of EDM's and REPA's tools, whose folders are no classes
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
        found = _Listing(root, self.words)
        if os.path.lexists(root / LABELS):
            names = sorted(name for below in found.per_class for name in below) + found.flat
            labels = read_labels(root / LABELS, names)
            self.labels, self.classes, notes = number_classes(labels, None, root / LABELS)
            notes = [*notes, f"the labels are those of {root / LABELS}, not the folders"]
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

    def __init__(self, root: Path, words: SourceWords) -> None:
        self.root, self.words = root, words
        self.ignored: list[str] = []  # visible files that are no images by their names
        # (device, inode) of the folders above: a link to one of them would never end
        above = [_identity(folder) for folder in (root, *Path(os.path.realpath(root)).parents)]
        folders, files = self._scan("")
        self.folders = sorted(folders, key=natural_key)
        self.flat = sorted(self._images(files))
        self.per_class = [self._below(folder, above) for folder in self.folders]
        if not (self.flat or any(self.per_class)):
            text = f"no images in {root}: looked for {', '.join(IMAGE_EXTENSIONS)}"
            remedy = self._unread("") or "give the folder of the class folders"
            raise UserError(f"{text}, also in subfolders; {remedy}")

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

    def _unread(self, folder: str) -> str:
        """What to do about the pictures below a folder that are of no kind that is read, if any."""
        found = [f for f in self.ignored if f.lower().endswith(UNREAD_EXTENSIONS)]
        found = [f for f in found if not folder or f.startswith(f"{folder}/")]
        first = printable(min(found, default=""))
        return f"convert its {len(found)} other pictures to PNG (first {first})" if found else ""

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
        text += self._unread(empty) or "fill or remove it"
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

    def notes(self) -> list[str]:
        """Of the files that are passed over."""
        if not self.ignored:
            return []
        text = f"{len(self.ignored)} files below {self.root} are no images by their names"
        first = printable(min(self.ignored))
        return [f"{text} and are ignored (first {first}; images are {', '.join(IMAGE_EXTENSIONS)})"]


def _holds_images(entry: os.DirEntry) -> bool:
    """Whether a folder holds an image itself, among its first files."""
    try:
        with os.scandir(entry) as files:
            return any(is_image_name(file.name) for file in itertools.islice(files, SIBLINGS))
    except OSError:  # no folder, or not to be read
        return False


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
