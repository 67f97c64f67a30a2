"""Where images come from. Every source follows `utils.data.Source`.

A source is picklable and opens its files in the process that reads them, so it works in forked and
spawned workers alike. Labels are 0 .. num_classes - 1; data without labels have one class, 0.
"""

import io
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.errors import UserError
from utils.images import CROP_VERSION, array_to_u8, read_image
from utils.resumable import META, read_lines

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
DIGITS_SPLIT_SEED = 20250416  # a constant, so that "test" is the same 20% for everybody
PACKED_FORMAT = "repae-packed-1"


class Names(Sequence):
    """Many strings in one buffer. Workers share it: a list would be copied into each of them, page
    by page, because touching a string writes its reference count."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._buffer = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        name = self._buffer[self._ends[i] : self._ends[i + 1]]
        return name.decode("utf-8", "surrogateescape")


def read_json(path: Path, remedy: str):
    """The content of a JSON file; a missing or broken one is a `UserError` ending in `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} not found; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}); {remedy}") from error


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, resized with BICUBIC; ten classes.

    `split` is "all", or "train" / "test": 80% / 20% of every class, the same for everybody.
    """

    num_classes = 10

    def __init__(self, resolution: int, split: str = "all") -> None:
        from sklearn.datasets import load_digits  # slow to import, and needed here only

        if split not in ("all", "train", "test"):
            raise UserError(f"split {split!r} of the digits: expected all, train or test")
        digits = load_digits()
        self.resolution = resolution
        self._indices = _split_digits(digits.target, split)
        self._grey = np.rint(digits.images[self._indices] * (255 / 16)).astype(np.uint8)
        self.labels = digits.target[self._indices].astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        size = (self.resolution, self.resolution)
        image = Image.fromarray(self._grey[i]).resize(size, Image.Resampling.BICUBIC)
        return array_to_u8(np.asarray(image.convert("RGB"))), int(self.labels[i])

    def key(self, i: int) -> str:
        """The digit's index in scikit-learn's set, whatever the split."""
        return str(self._indices[i])


def _split_digits(labels: np.ndarray, split: str) -> np.ndarray:
    """Ascending indices of `split`; a fifth of each class, by a fixed random rank, is "test"."""
    draws = np.random.Philox(DIGITS_SPLIT_SEED).random_raw(len(labels))
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranked = members[draws[members].argsort(kind="stable")]
        is_test[ranked[: round(len(members) / 5)]] = True
    chosen = {"all": np.ones_like(is_test), "train": ~is_test, "test": is_test}[split]
    return np.flatnonzero(chosen)


class SyntheticSource:
    """10,000 images of noise in 1,000 classes, a function of the index: for benchmarks only."""

    num_classes = 1000

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        count = 3 * self.resolution**2
        noise = np.random.Philox(key=i).random_raw(-(-count // 8)).view(np.uint8)[:count]
        shape = (3, self.resolution, self.resolution)
        return torch.from_numpy(noise).reshape(shape), i % self.num_classes

    def key(self, i: int) -> str:
        return str(i)


class FolderSource:
    """root/class/**/*.{jpg,jpeg,png,webp,bmp}, or images in root itself = one class.

    Class folders in natural order (2 before 10; ImageNet's wnids as everywhere) are labels 0, 1 ...
    Names that begin with a dot are ignored. Images are cropped as ADM does when they are read.
    """

    def __init__(self, root: Path, resolution: int) -> None:
        self.root, self.resolution = root, resolution
        self.classes, per_class = _list_folder(root)
        self.num_classes = len(self.classes)
        self.labels = np.repeat(np.arange(self.num_classes), [len(names) for names in per_class])
        self._names = Names(name for names in per_class for name in names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path = self.root / self._names[i]
        return read_image(path, str(path), self.resolution), int(self.labels[i])

    def key(self, i: int) -> str:
        """Path below root, with forward slashes."""
        return self._names[i]

    def sizes(self) -> Iterable[int]:
        """File sizes: with the keys, what tells one data set from another."""
        for name in self._names:
            try:
                yield os.stat(self.root / name).st_size
            except OSError as error:
                text = f"cannot read {self.root / name}: {error.strerror}; mend or remove it"
                raise UserError(text) from error


def _list_folder(root: Path) -> tuple[list[str], list[list[str]]]:
    """Class names and, for each, its images' sorted paths below root."""
    folders = [e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")]
    classes = sorted(folders, key=natural_key)
    per_class = [_images_below(root, name) for name in classes]
    flat = sorted(e.name for e in os.scandir(root) if _is_image(e.name) and not e.is_dir())
    if flat and any(per_class):
        raise UserError(f"{root} holds images ({flat[0]}) beside class folders; move them away")
    if flat:
        return ["."], [flat]
    if not any(per_class):
        text = f"no images in {root}: looked for {', '.join(IMAGE_EXTENSIONS)}, also in subfolders"
        raise UserError(f"{text}; give the folder that holds the class folders")
    empty = [name for name, images in zip(classes, per_class) if not images]
    if empty:
        raise UserError(f"class folder {root / empty[0]} holds no images; fill or remove it")
    return classes, per_class


def natural_key(name: str) -> tuple:
    """Sort key: 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], name


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)


def _images_below(root: Path, folder: str) -> list[str]:
    names = []
    for parent, subfolders, files in os.walk(root / folder, followlinks=True, onerror=_cannot_list):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = Path(parent).relative_to(root).as_posix()
        names += [f"{below}/{name}" for name in files if _is_image(name)]
    return sorted(names)


def _cannot_list(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; mend it") from error


class PackedSource:
    """What scripts/prepare_data.py wrote: uint8 NHWC `.npy` shards, labels, keys, meta.json."""

    def __init__(self, root: Path, resolution: int) -> None:
        again = "the folder is unfinished: run the same prepare_data.py command again"
        meta = read_json(root / META, again)
        if meta.get("format") != PACKED_FORMAT:
            raise UserError(f"{root}: format {meta.get('format')!r}, expected {PACKED_FORMAT!r}")
        _check_same(root, "crop version", meta["crop_version"], CROP_VERSION)
        _check_same(root, "resolution", meta["resolution"], resolution)
        self.root, self.resolution = root, resolution
        self.num_classes, self.classes = len(meta["classes"]), meta["classes"]
        self._ends = np.cumsum(meta["shards"], dtype=np.int64)
        _check_shards(root, meta["shards"], 3 * resolution**2)
        self.labels = np.load(root / "labels.npy")
        assert len(self.labels) == self._ends[-1] == meta["num_images"], root
        self._shards: dict[int, np.ndarray] = {}
        self._keys: list[str] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": {}, "_keys": None}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        label = int(self.labels[i])
        shard = int(np.searchsorted(self._ends, i, side="right"))
        if shard not in self._shards:
            self._shards[shard] = np.load(self.root / shard_name(shard), mmap_mode="r")
        rows = self._shards[shard]
        return array_to_u8(
            rows[i - int(self._ends[shard])]
        ), label  # negative: counted from the end

    def key(self, i: int) -> str:
        """The image's path in the source that was packed."""
        if self._keys is None:
            self._keys = read_lines(self.root / "keys.txt")
            assert len(self._keys) == len(self), self.root
        return self._keys[i]


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.npy"


def _check_same(root: Path, what: str, packed: object, wanted: object) -> None:
    if packed != wanted:
        text = f"{root} was packed with {what} {packed}, but {wanted} is asked for"
        raise UserError(f"{text}; pack again with scripts/prepare_data.py, or change the config")


def _check_shards(root: Path, lengths: list[int], row_bytes: int) -> None:
    for shard, length in enumerate(lengths):
        path = root / shard_name(shard)
        if not path.is_file() or path.stat().st_size < length * row_bytes:
            text = f"{path} is missing or cut short (expected {length} images)"
            raise UserError(f"{text}; run the same prepare_data.py command again")


class Hdf5Source:
    """The official REPA-E layout: images.h5 (one data set of encoded bytes per image name),
    images_h5.json (the names), dataset.json ({"labels": [[name, label], ...] or null}).

    Labels are joined to images by name. HDF5 handles do not survive a fork, so a process that may
    still fork (any but a worker) opens and closes the file for every image.
    """

    def __init__(self, root: Path, resolution: int) -> None:
        _import_h5py()
        self.root, self.resolution = root, resolution
        layout = "the layout is images.h5, images_h5.json and dataset.json"
        if not (root / "images.h5").is_file():
            raise UserError(f"{root / 'images.h5'} not found; {layout}")
        listed = read_json(root / "images_h5.json", layout)
        names = sorted(name for name in listed if _is_image(Path(name).name))
        if not names:
            raise UserError(f"{root / 'images_h5.json'} names no images; {layout}")
        pairs = read_json(root / "dataset.json", layout).get("labels")
        self.labels = _join_labels(names, pairs, root / "dataset.json")
        self.num_classes = int(self.labels.max()) + 1
        self.classes = [str(label) for label in range(self.num_classes)]
        self._names = Names(names)
        self._file, self._pid = None, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        name = self._names[i]
        where = f"{name} in {self.root / 'images.h5'}"
        image = read_image(io.BytesIO(self._read(name)), where, self.resolution)
        return image, int(self.labels[i])

    def key(self, i: int) -> str:
        """The image's name in images_h5.json."""
        return self._names[i]

    def sizes(self) -> Iterable[int]:
        """Size of images.h5: with the keys, what tells one data set from another."""
        yield (self.root / "images.h5").stat().st_size

    def _read(self, name: str) -> bytes:
        h5py = _import_h5py()
        if multiprocessing.parent_process() is None:
            with h5py.File(self.root / "images.h5", "r") as file:
                return self._bytes_of(file, name)
        if self._file is None or self._pid != os.getpid():
            self._file, self._pid = h5py.File(self.root / "images.h5", "r"), os.getpid()
        return self._bytes_of(self._file, name)

    def _bytes_of(self, file, name: str) -> bytes:
        if name not in file:
            text = f"{name} is listed in images_h5.json but missing in {self.root / 'images.h5'}"
            raise UserError(f"{text}; the two files do not belong together, make both again")
        return np.asarray(file[name][()]).tobytes()


def _import_h5py():
    try:
        import h5py  # optional: only this source needs it
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
