"""The official REPA-E data layout: images.h5 with encoded images and their labels."""

import io
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from models.checks.errors import UserError, printable
from models.checks.file_kinds import read_json, what_is
from models.checks.values import convert
from utils.data.base import Allocator, EncodedSource, Names
from utils.data.images import ImageFileError, UnreadableImageError
from utils.data.labels import (
    AUTO,
    FOLDERS,
    ONE_CLASS,
    Labels,
    labels_in_file,
    name_classes,
    one_class,
    read_labels,
)
from utils.data.listing import LABELS, list_names

LARGEST_FILE = 2**29  # bytes of one encoded image
TRIED = 8  # names that are looked up at the start


class Hdf5Source(EncodedSource):
    """images.h5 (one data set of encoded bytes for each image name), images_h5.json (the names),
    dataset.json ({"labels": [[name, label], ...] or null}): in images.h5, or beside it.

    Labels are joined to images by name. HDF5 handles do not survive a fork, so a process that may
    still fork (any but a worker) opens and closes the file for every image or batch.
    """

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
        names, ignored = _listed_names(root / "images_h5.json", layout)
        with self._open() as file:
            inside = self._read(LABELS) if LABELS in file else None
            self.labels, self.classes, notes = self._find_labels(names, inside)
            self.notes = [*notes, *([ignored] if ignored else [])]
            for i in np.linspace(0, len(names) - 1, min(TRIED, len(names)), dtype=int).tolist():
                self._find(file, names[i])
        self._names = Names(names)

    def _find_labels(self, names: list[str], inside: bytes | None) -> Labels:
        """As `labels_from` says; of dataset.json, the one in images.h5 counts, if there is one."""
        if self.labels_from == ONE_CLASS:
            return one_class(len(names))
        if self.labels_from == FOLDERS:
            return name_classes([os.path.dirname(name) or "." for name in names])
        if self.labels_from != AUTO:
            return labels_in_file(Path(self.labels_from), names, self.words)
        if inside is not None:
            where = f"{LABELS} in {self._images}"
            return read_labels(inside.rstrip(b"\0"), where, names, self.words)
        record = self._images.parent / LABELS
        if not record.is_file():
            kind = what_is(record)
            why = "not found" if kind == "absent" else f"is {kind}, expected a JSON file"
            give = self.words.labels.format("FILE"), self.words.labels.format(ONE_CLASS)
            raise UserError(f"{record} {why}, nor in images.h5; give {' or '.join(give)}")
        return labels_in_file(record, names, self.words)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def encoded(self, i: int) -> BinaryIO:
        return io.BytesIO(self._read(self._names[i]))

    def where(self, i: int) -> str:
        return f"{printable(self._names[i])} in {self._images}"

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
                if dtype.kind == "O" and data.shape == ():  # text of any length, as of dataset.json
                    value = data[()]
                    return value.encode() if isinstance(value, str) else bytes(value)
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


def _listed_names(path: Path, layout: str) -> tuple[list[str], str]:
    """The names of images in images_h5.json, sorted, and a line on the others; `UserError` if it is
    no such list."""
    listed = read_json(path, layout)
    try:
        names = convert(listed, list[str])
    except UserError as error:
        raise UserError(f"{path} is no list of names: {error}; {layout}") from None
    listing = list_names(path, names)
    names = sorted(itertools.chain(listing.flat, *listing.per_class.values()))
    if not names:
        raise UserError(f"{path} names no images; {layout}")
    twice = next((a for a, b in itertools.pairwise(names) if a == b), None)
    if twice is not None:
        raise UserError(f"{path} names {printable(twice)} twice; make it again")
    return names, listing.ignored_line()
