"""Images to be evaluated: opened by name, read in blocks, with the record beside them.

Nothing is resized here (a resize before Inception changes every number), nothing converted.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from models.checks.errors import UserError
from models.checks.file_kinds import what_is
from utils.cli import SourceWords, expand_path
from utils.data.base import Source, hash_lines, notes_on_pictures
from utils.data.content import file_sha256s
from utils.data.decoding import oddities
from utils.data.decoding.conversion import PLAIN, Conversion
from utils.data.decoding.formats import LOSSY
from utils.data.decoding.pixels import is_deep_colour, stored_as, to_rgb
from utils.data.images import open_image
from utils.data.labels import ONE_CLASS
from utils.data.listing import IGNORED, list_images
from utils.data.registry import RESOLUTION, conversion, open_source, source_class
from utils.data.sharded import META
from utils.data.sources.packed import PACKED_FORMAT
from utils.evaluation.images.beside import record_beside
from utils.evaluation.images.naming import IMAGES, SOURCE_SPEC, is_source, spec_of
from utils.evaluation.images.npz_images import (
    ArrayImages,
    ImageSet,
    check_layout,
    open_array_file,
)
from utils.files import read_record

ALL_TAKEN = "all images are taken, though "  # how a note begins where labels are wanting


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
        images = open_array_file(path)
        images.record, note = record_beside(path, len(images))
        images.notes = [note] if note else []
        return images
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
    split = "PATH,split={}" if source_class(name).needs_path else "{}"
    return SourceWords("{}:PATH", f"{name}:{{}}", "@{}", f"{name}:{split}")


def parse_source(spec: str, resolution: int | None, split: str = "all") -> tuple[Source, str]:
    """ "digits:test@16" or "folder:DIR@256" => (source, its full name). Behind the colon stands the
    path of a source, or the split of one that needs no path."""
    match = SOURCE_SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"{spec!r}: no such file or folder; expected {IMAGES}")
    name, given, at, part, exif, *depth = match.groups()
    path = Path(expand_path(given)) if given else None
    resolution = int(at) if at else resolution or RESOLUTION
    how = conversion(bool(exif), [int(end) for end in depth if end], spec)
    cls = source_class(name, words=words_of(name))
    part = part or (None if cls.needs_path or not path else str(path))
    if part and split not in ("all", part):
        raise UserError(f"--split {split}: {spec} asks for another part; leave one of them out")
    if part is None and split not in cls.splits:
        raise UserError(f"--split {split}: the source {name} has {', '.join(cls.splits)}")
    split = part or split
    if name == "packed" and path and not at and how == PLAIN and (packed := _open_packed(path)):
        return packed
    source = _open(name, path, resolution, split, how)
    if cls.needs_path:
        return source, spec_of(name, path, resolution, split, how)
    return source, spec_of(name, split if len(cls.splits) > 1 else "", resolution)


def _open(name: str, path: Path | None, resolution: int, split: str, how: Conversion) -> Source:
    """A source whose labels nobody needs here: where it does not tell them, all images are taken,
    in one class, and a note says why."""
    words = words_of(name)
    try:
        return open_source(name, path, resolution, split, words, how)
    except UserError as error:
        if source_class(name, split, words).takes_labels:
            with suppress(UserError):
                source = open_source(name, path, resolution, split, words, how, ONE_CLASS)
                why = str(error).partition("; ")[0]  # without the remedy, which is about labels
                source.notes = [*source.notes, ALL_TAKEN + why]
                return source
        raise


class FolderImages(ImageSet):
    """All images below a folder in natural order of their paths, as they are: no crop, no resize.
    8-bit RGB of one size; anything else is a `UserError`."""

    kind = "folder"
    hashed = False

    def __init__(self, root: Path):
        found = list_images(root)
        found.require_images("give the folder of the images")
        self.root, self.name, self.names = root, str(root), found.in_natural_order()
        self.lossy = any(name.lower().endswith(LOSSY) for name in self.names)
        self.size = _decode(root / self.names[0], None).shape[:2]
        ignored = found.ignored_line()
        self.notes = [ignored] if ignored else []
        self.notes += oddities.sample(lambda i: self.read(i, i + 1), len(self), PLAIN)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, start: int, stop: int) -> np.ndarray:
        paths = (self.root / name for name in self.names[start:stop])
        return np.stack([_decode(path, self.size) for path in paths])

    def fingerprint(self) -> str:
        """Of names and file bytes: cheaper than pixels, and as telling."""
        hashes = file_sha256s(self.root / name for name in self.names)
        return hash_lines([*self.names, *hashes])


def _decode(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8; `UserError` unless it is 8-bit RGB and of `size`, if that is given."""
    if not path.is_file():
        raise UserError(f"{path} is {what_is(path)}, expected an image: repair or remove it")
    with open_image(path, str(path)) as image:
        what = "16-bit colour" if is_deep_colour(image, stored_as(image)) else f"mode {image.mode}"
        if "transparency" in image.info:
            what += ", transparent"
        if what != "mode RGB":
            raise UserError(f"{path}: {what}, expected 8-bit RGB; convert it, or read "
                            "the folder as data: folder:DIR@RES crops and converts")  # fmt: skip
        array = np.asarray(to_rgb(image))
    if size is not None and array.shape[:2] != tuple(size):
        (h, w), (first_h, first_w) = array.shape[:2], size
        raise UserError(f"{path} is {h}x{w}, the first image {first_h}x{first_w}: expected one "
                        "size (folder:DIR@RES crops)")  # fmt: skip
    return array


class SourceImages(ImageSet):
    """A data source of training in its own order."""

    kind = "source"
    planes = True
    hashed = False

    def __init__(self, source: Source, name: str):
        self.source, self.name, self.size = source, name, (source.resolution, source.resolution)
        self.notes = [note for note in source.notes if note.startswith((IGNORED, ALL_TAKEN))]
        self.notes += notes_on_pictures(source)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> np.ndarray:
        (x_u8, *_), unreadable = self.source.read_batch(range(start, stop))
        if unreadable and self.source.bad is not None:
            self.source.bad.add(unreadable)
        return x_u8.permute(0, 2, 3, 1).numpy()

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class Subset(ImageSet):
    """`num` images evenly spaced over a set (the first ones of a folder may be one class)."""

    def __init__(self, images: ImageSet, num: int):
        self.kind, self.size, self.lossy = images.kind, images.size, images.lossy
        self.parallel, self.planes = images.parallel, images.planes
        self.images, self.indices = images, np.arange(num) * len(images) // num
        self.notes = images.notes
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
