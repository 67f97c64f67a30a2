"""Images to be evaluated, read in blocks: no set is ever held in memory as a whole.

Every set gives uint8 RGB (n, H, W, 3) by global index, so ranks share it by index and file order is
kept. Nothing is resized here (a resize before Inception changes every number), nothing converted.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from models.errors import UserError
from utils.data import SOURCES, Source, open_source
from utils.npz_images import ArrayImages, check_array, hash_pixels, open_array_file, readable
from utils.sources import IMAGE_EXTENSIONS, PACKED_FORMAT, natural_key

SYNTAX = (".npz (arr_0), .npy, a folder of images, a packed folder, or SOURCE[:PATH][@RESOLUTION], "
          "e.g. digits:test@16 or folder:DIR@256")  # fmt: skip
SOURCE_SPEC = re.compile(rf"({'|'.join(SOURCES)})(?::(.+?))?(?:@(\d+))?")
READ_THREADS = 8  # PIL decodes outside the interpreter lock


class ImageSet(Protocol):
    """What the evaluator knows of a set of images."""

    name: str
    kind: str
    size: tuple[int, int]  # H, W

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop - 1: (n, H, W, 3) uint8."""

    def fingerprint(self) -> str:
        """sha256 of what tells this content from another (pixels where that is affordable)."""


def open_images(spec, resolution: int = 256, split: str = "all") -> ImageSet:
    """Open what `SYNTAX` allows, or a uint8 array (N, H, W, 3), or a uint8 tensor (N, 3, H, W).

    `resolution` and `split` are for sources, where the spec does not name them.
    """
    if isinstance(spec, torch.Tensor):
        if spec.dtype != torch.uint8:
            raise UserError(f"{spec.dtype} images, expected uint8 in 0..255; see utils/images.py")
        check_array("tensor in memory", spec.numpy(force=True), channels=1)
        return ArrayImages(spec.permute(0, 2, 3, 1).numpy(force=True), "in memory", "tensor")
    if isinstance(spec, np.ndarray):
        return ArrayImages(spec, "in memory", "array")
    path = Path(spec).expanduser()
    if path.suffix in (".npz", ".npy") and not path.is_dir():
        return open_array_file(path)
    if path.is_dir():
        packed = is_packed(path)
        return SourceImages(*_open_packed(path)) if packed else FolderImages(path)
    return SourceImages(*parse_source(str(spec), resolution, split))


def is_packed(path: Path) -> bool:
    """Whether a folder was written by scripts/prepare_data.py."""
    meta = path / "meta.json"
    return meta.is_file() and PACKED_FORMAT in meta.read_text(encoding="utf-8")


def _open_packed(path: Path) -> tuple[Source, str]:
    resolution = json.loads((path / "meta.json").read_text(encoding="utf-8"))["resolution"]
    return open_source("packed", path, resolution), f"packed:{path}"


def is_source(spec: str) -> bool:
    """Whether a spec names a data source of training, not a file."""
    return SOURCE_SPEC.fullmatch(spec) is not None


def parse_source(spec: str, resolution: int, split: str = "all") -> tuple[Source, str]:
    """ "digits:test@16" or "folder:DIR@256" => (source, its full name)."""
    match = SOURCE_SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"{spec!r}: no such file or folder; expected {SYNTAX}")
    name, path, at = match.groups()
    resolution = int(at or resolution)
    if name == "digits":
        path, split = None, path or split
    elif name == "packed" and path and not at and is_packed(Path(path)):
        return _open_packed(Path(path))
    full = ":".join(filter(None, (name, path or (split if name == "digits" else None))))
    return open_source(name, path, resolution, split), f"{full}@{resolution}"


class FolderImages:
    """All images below a folder in natural order of their paths, as they are: no crop, no resize.

    8-bit RGB of one size; anything else is a `UserError`.
    """

    kind = "folder"

    def __init__(self, root: Path):
        found = (p for p in root.rglob("*") if p.suffix.lower() in IMAGE_EXTENSIONS)
        names = [p.relative_to(root).as_posix() for p in found if not p.name.startswith(".")]
        if not names:
            raise UserError(f"no images below {root}: expected {', '.join(IMAGE_EXTENSIONS)}")
        self.root, self.name = root, str(root)
        self.names = sorted(names, key=natural_key)
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
            digest.update(f"{name}\0".encode())
            digest.update((self.root / name).read_bytes())
        return digest.hexdigest()

    @property
    def lossy(self) -> bool:
        return any(name.lower().endswith((".jpg", ".jpeg", ".webp")) for name in self.names)


def _decode(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    with readable(path), Image.open(path) as image:
        if image.mode != "RGB":
            raise UserError(
                f"{path}: mode {image.mode}, expected 8-bit RGB; convert it, or read the folder as "
                "data, which crops and converts: folder:DIR@RES"
            )
        array = np.asarray(image)
    if size is not None and array.shape[:2] != tuple(size):
        (h, w), (other_h, other_w) = array.shape[:2], size
        raise UserError(
            f"{path}: {h}x{w} beside {other_h}x{other_w} in one set; expected one size "
            "(folder:DIR@RES crops)"
        )
    return array


class SourceImages:
    """A data source of training (`utils.data.Source`) in its own order."""

    kind = "source"

    def __init__(self, source: Source, name: str):
        self.source, self.name = source, name
        self.size = (source.resolution, source.resolution)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> np.ndarray:
        images = _in_threads(lambda i: self.source[i][0].numpy(), range(start, stop))
        return np.stack(images).transpose(0, 2, 3, 1)

    def fingerprint(self) -> str:
        """Packed data: meta.json, which holds the hash of what was packed. Sources of encoded
        files: keys and sizes (pixels would mean decoding all twice). Others: pixels."""
        meta = Path(getattr(self.source, "root", "")) / "meta.json"
        if meta.is_file():
            return hashlib.sha256(meta.read_bytes()).hexdigest()
        if not hasattr(self.source, "sizes"):
            return hash_pixels(self)
        keys = (self.source.key(i) for i in range(len(self)))
        return hash_lines([f"{self.size}", *keys, *map(str, self.source.sizes())])


def hash_lines(lines: Iterable[str]) -> str:
    """sha256 of strings, each closed by a zero byte."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class Subset:
    """`num` images evenly spaced over a set (the first ones of a folder may be one class)."""

    def __init__(self, images: ImageSet, num: int):
        self.images, self.kind, self.size = images, images.kind, images.size
        self.indices = np.arange(num) * len(images) // num
        self.name = f"{images.name}, {num} of {len(images)} evenly spaced"

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([self.images.read(i, i + 1) for i in self.indices[start:stop]])

    def fingerprint(self) -> str:
        return hash_pixels(self)


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
        pending = None
        for start, stop in blocks:
            following = reader.submit(images.read, start, stop)
            if pending is not None:
                yield _to_nchw(pending.result())
            pending = following
        if pending is not None:
            yield _to_nchw(pending.result())


def _to_nchw(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2)


def sidecar(spec) -> dict | None:
    """The record that sample_ddp.py writes beside its .npz, if there is one."""
    if not isinstance(spec, str | Path) or not (path := Path(spec).with_suffix(".json")).is_file():
        return None
    with readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


def sampling_settings(record: dict | None) -> dict:
    """The settings in a record of sample_ddp.py; empty for anything else of the same name."""
    settings = record.get("settings", record) if isinstance(record, dict) else {}
    return settings if "solver" in settings else {}
