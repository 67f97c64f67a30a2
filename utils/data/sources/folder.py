"""Images in a folder: one subfolder a class, or labels in a file, or all in one class."""

import os
from collections.abc import Iterable
from pathlib import Path

from models.checks.errors import UserError
from models.checks.file_kinds import what_is
from utils.data.base import EncodedSource, Names
from utils.data.listing import list_images
from utils.data.sources.classes import Classes


class FolderSource(EncodedSource):
    """root/class/**/*.png and other images, or images in root itself = one class. With a
    dataset.json in root, in its only folder of images, or beside root, the labels are those in it,
    and the folders have no meaning; `labels_from` says where the labels are.

    Class folders in natural order (2 before 10; ImageNet's wnids as everywhere) are labels 0, 1 ...
    Names that begin with a dot are ignored. Images are cropped as ADM does when they are read.
    """

    root: Path

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        super().__init__(root, resolution)
        classes = Classes(list_images(root), self.words, self.labels_from, self._content)
        names, (self.labels, self.classes, self.notes) = classes.find()
        self._names = Names(names)

    def _content(self, name: str) -> bytes | None:
        """Of a file in the folder."""
        path = self.root / name
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise UserError(f"{path} is {what_is(path)}, expected a JSON file; repair or remove it")
        try:
            return path.read_bytes()
        except OSError as error:
            text = f"{path} cannot be read ({error.strerror}); repair or remove it"
            raise UserError(text) from None

    def encoded(self, i: int) -> Path:
        return self.root / self._names[i]

    def where(self, i: int) -> str:
        return str(self.encoded(i))

    def key(self, i: int) -> str:
        """Path below root, with forward slashes."""
        return self._names[i]

    def files(self) -> Iterable[Path]:
        """Each image is a file."""
        return (self.root / name for name in self._names)
