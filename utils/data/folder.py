"""Images in a folder: one subfolder a class, or all in one class."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from models.errors import UserError
from utils.data.base import Names, Source
from utils.data.images import read_image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class FolderSource(Source):
    """root/class/**/*.{jpg,jpeg,png,webp,bmp}, or images in root itself = one class.

    Class folders in natural order (2 before 10; ImageNet's wnids as everywhere) are labels 0, 1 ...
    Names that begin with a dot are ignored. Images are cropped as ADM does when they are read.
    """

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        super().__init__(root, resolution)
        self.classes, per_class = _list_folder(root)
        self.labels = np.repeat(np.arange(self.num_classes), [len(names) for names in per_class])
        self._names = Names(name for names in per_class for name in names)

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


def _list_folder(root: Path) -> tuple[list[str], list[list[str]]]:
    """Class names and, for each, its images' sorted paths below root."""
    entries = [(e.name, e.is_dir()) for e in os.scandir(root)]
    classes = [name for name, is_dir in entries if is_dir and not name.startswith(".")]
    classes.sort(key=natural_key)
    per_class = [_images_below(root, name) for name in classes]
    flat = sorted(name for name, is_dir in entries if is_image_name(name) and not is_dir)
    if flat and any(per_class):
        raise UserError(f"{root} holds images ({flat[0]}) beside class folders; move them away")
    if flat:
        return ["."], [flat]
    if not any(per_class):
        text = f"no images in {root}: looked for {', '.join(IMAGE_EXTENSIONS)}, also in subfolders"
        raise UserError(f"{text}; give the folder that holds the class folders")
    if not all(per_class):
        empty = root / classes[per_class.index([])]
        raise UserError(f"class folder {empty} holds no images; fill or remove it")
    return classes, per_class


def natural_key(name: str) -> tuple:
    """Sort key: 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], name


def is_image_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)


def _images_below(root: Path, folder: str) -> list[str]:
    names = []
    for parent, subfolders, files in os.walk(root / folder, followlinks=True, onerror=_cannot_list):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = Path(parent).relative_to(root).as_posix()
        names += [f"{below}/{name}" for name in files if is_image_name(name)]
    return sorted(names)


def _cannot_list(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; repair it") from error
