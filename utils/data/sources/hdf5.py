"""The official REPA-E data layout: images.h5 with encoded images, and labels beside it."""

import io
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from models.checks.errors import UserError
from models.checks.file_kinds import read_json, what_is
from models.checks.values import convert
from utils.data.base import Allocator, Names, Source, number_classes, printable, read_labels
from utils.data.images import ImageFileError, UnreadableImageError, read_image
from utils.data.listing import LABELS, is_image_name

LARGEST_FILE = 2**29  # bytes of one encoded image
TRIED = 8  # names that are looked up at the start


class Hdf5Source(Source):
    """images.h5 (one data set of encoded bytes for each image name), images_h5.json (the names),
    dataset.json ({"labels": [[name, label], ...] or null}).

    Labels are joined to images by name. HDF5 handles do not survive a fork, so a process that may
    still fork (any but a worker) opens and closes the file for every image or batch.
    """

    labels: np.ndarray

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        _import_h5py()
        super().__init__(root, resolution)
        self._images = root / "images.h5"
        self._file, self._pid = None, None
        layout = f"the layout is images.h5, images_h5.json and {LABELS}"
        if not os.path.isfile(self._images):
            found = what_is(self._images)
            why = "not found" if found == "absent" else f"is {found}, expected an HDF5 file"
            raise UserError(f"{self._images} {why}; {layout}")
        names = _listed_names(root / "images_h5.json", layout)
        labels = read_labels(root / LABELS, names)
        self.labels, self.classes, self.notes = number_classes(labels, None, root / LABELS)
        self._names = Names(names)
        with self._open() as file:
            for i in np.linspace(0, len(names) - 1, min(TRIED, len(names)), dtype=int).tolist():
                self._find(file, names[i])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        name = self._names[i]
        encoded = io.BytesIO(self._read(name))
        image = read_image(encoded, f"{name} in {self._images}", self.resolution)
        return image, int(self.labels[i])

    def read_batch(
        self, indices: Sequence[int], empty: Allocator = torch.empty
    ) -> tuple[list[torch.Tensor], dict[str, str]]:
        """As `Source.read_batch`; the file is opened once for all its images."""
        with self._open() as file:
            before, self._file, self._pid = self._file, file, os.getpid()
            try:
                return super().read_batch(indices, empty)
            finally:
                self._file = before

    def key(self, i: int) -> str:
        """The image's name in images_h5.json."""
        return self._names[i]

    def files(self) -> list[Path]:
        """images.h5 alone."""
        return [self._images]

    def _read(self, name: str) -> bytes:
        """The encoded bytes; `UnreadableImageError` if they are none."""
        with self._open() as file:
            data = self._find(file, name)
            where = f"{printable(name)} in {self._images}"
            try:
                dtype = data.dtype
                is_bytes = dtype.kind in "VS" or (dtype.kind in "iu" and dtype.itemsize == 1)
                if not is_bytes or data.size * dtype.itemsize > LARGEST_FILE:
                    reason = f"{data.shape} {dtype}, expected the bytes of an image file"
                    raise UnreadableImageError(f"cannot decode {where}: {reason}", reason)
                return np.asarray(data[()]).tobytes()
            except (OSError, RuntimeError, AttributeError, TypeError) as error:
                reason = "damaged, or no data set"
                raise UnreadableImageError(f"cannot read {where}: {reason}", reason) from error

    def _find(self, file, name: str):
        """What the file holds under a name."""
        try:
            return file[name]
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            text = f"{printable(name)} is listed in images_h5.json but missing in {self._images}"
            text += "; the two files do not belong together, make both again"
            raise ImageFileError(text, f"missing in {self._images.name}") from error

    @contextmanager
    def _open(self) -> Iterator:
        if self._file is not None and self._pid == os.getpid():
            yield self._file
        elif multiprocessing.parent_process() is None:
            with self._new_file() as file:
                yield file
        else:
            self._file, self._pid = self._new_file(), os.getpid()
            yield self._file

    def _new_file(self):
        try:
            return _import_h5py().File(self._images, "r")
        except (OSError, RuntimeError) as error:
            found = what_is(self._images)
            damage = ", truncated or damaged" if "HDF5" in found else ", expected an HDF5 file"
            text = f"{self._images} cannot be opened: it is {found}{damage}; copy or make it again"
            raise UserError(text) from error


def _import_h5py():
    try:
        import h5py
    except ImportError:
        raise UserError("the source hdf5 needs h5py; run: pip install h5py") from None
    return h5py


def _listed_names(path: Path, layout: str) -> list[str]:
    """The names of images in images_h5.json, sorted; `UserError` if it is no such list."""
    listed = read_json(path, layout)
    try:
        names = convert(listed, list[str])
    except UserError as error:
        raise UserError(f"{path} is no list of names: {error}; {layout}") from None
    names = sorted(name for name in names if is_image_name(name))
    if not names:
        raise UserError(f"{path} names no images; {layout}")
    twice = next((a for a, b in itertools.pairwise(names) if a == b), None)
    if twice is not None:
        raise UserError(f"{path} names {printable(twice)} twice; make it again")
    return names
