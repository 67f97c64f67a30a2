"""Images to be evaluated: opened by name, read ahead in blocks, with the record beside them.

Nothing is resized here (a resize before Inception changes every number), nothing converted.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch

from models.errors import UserError, what_is
from utils.cli import SourceWords, expand_path
from utils.data.base import Source
from utils.data.images import open_image
from utils.data.registry import RESOLUTION, open_source, source_class
from utils.data.sharded import META
from utils.data.sources.folder import IMAGE_EXTENSIONS, natural_key
from utils.data.sources.packed import PACKED_FORMAT
from utils.evaluation.images.naming import IMAGES, SOURCE_SPEC, is_source
from utils.evaluation.images.npz_images import (
    ArrayImages,
    ImageSet,
    check_layout,
    open_array_file,
)
from utils.files import TEXT, read_json, read_record

READ_THREADS = 8  # PIL decodes outside the interpreter lock


def open_images(spec, resolution: int | None = None, split: str = "all") -> ImageSet:
    """Open what `naming.IMAGES` says, or a uint8 array (N, H, W, 3) or tensor (N, 3, H, W); a set
    that is open already is returned.
    `resolution` and `split` are for data sources whose spec does not name them. `UserError` for
    anything that cannot be read."""
    if isinstance(spec, ImageSet):
        return spec
    if isinstance(spec, torch.Tensor):
        if spec.dtype != torch.uint8:
            raise UserError(f"{spec.dtype} images, expected uint8; see utils/data/images.py")
        array = spec.numpy(force=True)
        check_layout("tensor in memory", array.shape, array.dtype, channels=1)
        return ArrayImages(array.transpose(0, 2, 3, 1), "in memory", "tensor")
    if isinstance(spec, np.ndarray):
        return ArrayImages(spec, "in memory", "array")
    path = Path(expand_path(str(spec)))
    if path.suffix in (".npz", ".npy") and not path.is_dir():
        return open_array_file(path)
    if path.is_dir():
        packed = _open_packed(path)
        return SourceImages(*packed) if packed else FolderImages(path)
    if not is_source(str(spec)) and (found := what_is(path)) != "absent":
        raise UserError(f"{spec} is {found}, expected {IMAGES}")
    return SourceImages(*parse_source(str(spec), resolution, split))


def _open_packed(path: Path) -> tuple[Source, str] | None:
    """Data packed by scripts/prepare_data.py, at their resolution; None for any other folder."""
    if (read_record(path / META) or {}).get("format") != PACKED_FORMAT:
        return None
    return open_source("packed", path, words=words_of("packed")), f"packed:{path}"


def words_of(name: str) -> SourceWords:
    """How the user names what a spec of the source `name` consists of."""
    return SourceWords("{}:PATH", f"{name}:{{}}", "@{}", f"{name}:{{}}")


def parse_source(spec: str, resolution: int | None, split: str = "all") -> tuple[Source, str]:
    """ "digits:test@16" or "folder:DIR@256" => (source, its full name). Behind the colon stands the
    path of a source, or the split of one that needs no path."""
    match = SOURCE_SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"{spec!r}: no such file or folder; expected {IMAGES}")
    name, path, at = match.groups()
    path = path and Path(expand_path(path))
    resolution = int(at) if at else resolution or RESOLUTION
    words = words_of(name)
    cls = source_class(name, words=words)
    if not cls.needs_path:
        if path and split not in ("all", str(path)):
            raise UserError(f"--split {split}: {spec} asks for another part; leave one of them out")
        path, split = None, str(path or split)
    elif split not in cls.splits:
        raise UserError(f"--split {split}: the source {name} has {', '.join(cls.splits)}")
    elif name == "packed" and path and not at and (packed := _open_packed(path)):
        return packed
    part = split if len(cls.splits) > 1 else ""
    full = ":".join(filter(None, (name, str(path or ""), part)))
    return open_source(name, path, resolution, split, words), f"{full}@{resolution}"


class FolderImages(ImageSet):
    """All images below a folder in natural order of their paths, as they are: no crop, no resize.
    8-bit RGB of one size; anything else is a `UserError`."""

    kind = "folder"

    def __init__(self, root: Path):
        walk = os.walk(root, onerror=_cannot_list)
        found = (Path(folder, name) for folder, _, files in walk for name in files)
        images = (p for p in found if p.suffix.lower() in IMAGE_EXTENSIONS)
        names = [p.relative_to(root).as_posix() for p in images]
        names = [name for name in names if not (name.startswith(".") or "/." in name)]
        if not names:
            raise UserError(f"no images below {root}: expected {', '.join(IMAGE_EXTENSIONS)}")
        self.root, self.name, self.names = root, str(root), sorted(names, key=natural_key)
        self.lossy = any(name.lower().endswith((".jpg", ".jpeg", ".webp")) for name in names)
        self.size = _decode(root / self.names[0], None).shape[:2]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, start: int, stop: int) -> np.ndarray:
        paths = [self.root / name for name in self.names[start:stop]]
        return np.stack(_in_threads(partial(_decode, size=self.size), paths))

    def fingerprint(self) -> str:
        """Of names and file bytes: cheaper than pixels, and as telling."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0".encode(*TEXT))
            digest.update((self.root / name).read_bytes())
        return digest.hexdigest()


def _cannot_list(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; repair or remove it")


def _decode(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8; `UserError` unless it is 8-bit RGB and of `size`, if that is given."""
    if not path.is_file():
        raise UserError(f"{path} is {what_is(path)}, expected an image: repair or remove it")
    with open_image(path, str(path)) as image:
        if image.mode != "RGB":
            raise UserError(f"{path}: mode {image.mode}, expected 8-bit RGB; convert it, or read "
                            "the folder as data: folder:DIR@RES crops and converts")  # fmt: skip
        array = np.asarray(image)
    if size is not None and array.shape[:2] != tuple(size):
        (h, w), (first_h, first_w) = array.shape[:2], size
        raise UserError(f"{path} is {h}x{w}, the first image {first_h}x{first_w}: expected one "
                        "size (folder:DIR@RES crops)")  # fmt: skip
    return array


class SourceImages(ImageSet):
    """A data source of training in its own order."""

    kind = "source"

    def __init__(self, source: Source, name: str):
        self.source, self.name, self.size = source, name, (source.resolution, source.resolution)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> np.ndarray:
        # memory in the order (3, H, W) for every source: the last bits of a convolution depend on
        # the layout, and recorded numbers come from this one
        take = self.source.take
        images = _in_threads(lambda i: take(i)[0].contiguous().numpy(), range(start, stop))
        return np.stack(images).transpose(0, 2, 3, 1)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class Subset(ImageSet):
    """`num` images evenly spaced over a set (the first ones of a folder may be one class)."""

    def __init__(self, images: ImageSet, num: int):
        self.kind, self.size, self.lossy = images.kind, images.size, images.lossy
        self.images, self.indices = images, np.arange(num) * len(images) // num
        self.name = f"{images.name}, {num} of {len(images)} evenly spaced"

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([self.images.read(i, i + 1) for i in self.indices[start:stop]])


def subset(images: ImageSet, num: int | None) -> ImageSet:
    """`num` images of a set, or all of them for None."""
    if num is None or num == len(images):
        return images
    if not 0 < num <= len(images):
        raise UserError(f"--num {num}: expected 1 .. {len(images)}, the images of {images.name}")
    return Subset(images, num)


def _in_threads(function: Callable, items: Iterable) -> list:
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(function, items))


def read_ahead(images: ImageSet, blocks: Iterable[tuple[int, int]]) -> Iterator[torch.Tensor]:
    """(n, 3, H, W) uint8 for each (start, stop), the next block read while this one is used."""
    with ThreadPoolExecutor(1) as reader:
        submitted = (reader.submit(images.read, *block) for block in blocks)
        for pending, _ in pairwise(chain(submitted, [None])):
            assert pending is not None  # the last one is only ever a successor
            yield torch.tensor(pending.result()).permute(0, 3, 1, 2)


def record_beside(spec) -> dict | None:
    """The JSON of the same name beside a file of samples, as of sample_ddp.py; None without one."""
    named = isinstance(spec, str | Path) and Path(spec).name  # "." and "/" have no name
    path = Path(spec).with_suffix(".json") if named else None
    if path is None or not path.is_file():
        return None
    return read_json(path, "copy or make it again, or remove it")
