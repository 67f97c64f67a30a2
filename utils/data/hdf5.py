"""The official REPA-E data layout: images.h5 with encoded images, and labels beside it."""

import io
import multiprocessing
import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from models.errors import UserError
from utils.data.base import Names, Source
from utils.data.folder import is_image_name
from utils.data.images import read_image
from utils.files import read_json


class Hdf5Source(Source):
    """images.h5 (one data set of encoded bytes for each image name), images_h5.json (the names),
    dataset.json ({"labels": [[name, label], ...] or null}).

    Labels are joined to images by name. HDF5 handles do not survive a fork, so a process that may
    still fork (any but a worker) opens and closes the file for every image.
    """

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        _import_h5py()
        super().__init__(root, resolution)
        self._images = root / "images.h5"
        layout = "the layout is images.h5, images_h5.json and dataset.json"
        if not self._images.is_file():
            raise UserError(f"{self._images} not found; {layout}")
        listed = read_json(root / "images_h5.json", layout)
        names = sorted(name for name in listed if is_image_name(Path(name).name))
        if not names:
            raise UserError(f"{root / 'images_h5.json'} names no images; {layout}")
        pairs = read_json(root / "dataset.json", layout).get("labels")
        self.labels = _join_labels(names, pairs, root / "dataset.json")
        self.classes = [str(label) for label in range(int(self.labels.max()) + 1)]
        self._names = Names(names)
        self._file, self._pid = None, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        name = self._names[i]
        encoded = io.BytesIO(self._read(name))
        image = read_image(encoded, f"{name} in {self._images}", self.resolution)
        return image, int(self.labels[i])

    def key(self, i: int) -> str:
        """The image's name in images_h5.json."""
        return self._names[i]

    def sizes(self) -> Iterable[int]:
        """The size of images.h5."""
        yield self._images.stat().st_size

    def _read(self, name: str) -> bytes:
        with self._open() as file:
            if name not in file:
                text = f"{name} is listed in images_h5.json but missing in {self._images}"
                raise UserError(f"{text}; the two files do not belong together, make both again")
            return np.asarray(file[name][()]).tobytes()

    def _open(self):
        if multiprocessing.parent_process() is None:
            return _import_h5py().File(self._images, "r")
        if self._file is None or self._pid != os.getpid():
            self._file, self._pid = _import_h5py().File(self._images, "r"), os.getpid()
        return nullcontext(self._file)


def _import_h5py():
    try:
        import h5py
    except ImportError:
        raise UserError("data.source=hdf5 needs h5py; run: pip install h5py") from None
    return h5py


def _join_labels(names: list[str], pairs: list | None, path: Path) -> np.ndarray:
    """(N,) int64 labels in the order of `names`; zeros if the data have none."""
    if pairs is None:
        return np.zeros(len(names), dtype=np.int64)
    by_name = {str(name).replace("\\", "/"): label for name, label in pairs}
    missing = [name for name in names if name.replace("\\", "/") not in by_name]
    if missing:
        text = f"{path} has no label for {missing[0]} ({len(missing)} such of {len(names)} images)"
        raise UserError(f"{text}; complete it, or set labels to null for one class")
    labels = np.array([by_name[name.replace("\\", "/")] for name in names], dtype=np.int64)
    if labels.min() < 0:
        raise UserError(f"{path} holds the label {labels.min()}; expected 0 or more")
    return labels
