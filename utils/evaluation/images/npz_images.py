"""What a set of images offers (`ImageSet`), and the sets in .npz, .npy and arrays.

What the ADM suite reads: an .npz with `arr_0`, uint8 (N, H, W, 3); 50,000 images of 256x256 are
9.2 GiB: arrays are memory-mapped where stored, streamed where compressed, never loaded as a whole.
"""

import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from models.checks.errors import UserError
from models.checks.file_kinds import what_is
from utils.data.base import image_hashes, join_hashes
from utils.data.content import digests

HASH_BLOCK = 64  # images hashed at a time
DEFLATE_RATIO = 1100  # bytes that a compressed one can stand for, at most (zlib: 1032)
NPZ, NPY = "a NumPy archive (.npz)", "a NumPy array (.npy)"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns whatever a broken file makes its reader raise into one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and Pillow raise anything for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} is truncated or damaged ({reason}); copy or make it again"
                        ) from error  # fmt: skip


def require_kind(path: Path, kind: str) -> None:
    """`UserError` unless what stands at `path` is what `kind` says, in the words of `what_is`; it
    says whether there is nothing, or something else."""
    found = what_is(path)
    if found == "absent":
        raise UserError(f"{path}: no such file; check the path")
    if found != kind:
        raise UserError(f"{path} is {found}, expected {kind}: name another file")


class ImageSet(ABC):
    """uint8 RGB images of one size, in a fixed order, of which only blocks are read."""

    name: str
    # the container, for the record: npz, folder, source, ...
    kind: str
    # H, W
    size: tuple[int, int]
    # whether the files are lossily compressed
    lossy = False
    # what the reader of a number should know of them, a sentence each, e.g. what was passed over
    notes: Sequence[str] = ()
    # what sample_ddp.py has written beside them, see beside.py
    record: dict | None = None
    # whether several threads may read at the same time, in any order
    parallel = True
    # whether a network on the CPU gets the images in planes, (3, H, W) in memory: the last bits of
    # a convolution depend on it, and recorded numbers come from this layout
    planes = False
    # whether the fingerprint is made of the pixels, and of which file alone these are, if of one
    hashed = True
    file: Path | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop - 1: (n, H, W, 3) uint8."""

    @cached_property
    def hashes(self) -> np.ndarray:
        """(N, 32) uint8: the sha256 of each image that was noted; zeros for the others."""
        return np.zeros((len(self), 32), np.uint8)

    def note(self, start: int, block: np.ndarray) -> None:
        """Hash images that were read in any case: `fingerprint` need not read them again."""
        rows = self.hashes[start : start + len(block)]
        if self.hashed and not rows.any(1).all():
            rows[:] = np.frombuffer(image_hashes(block), np.uint8).reshape(-1, 32)

    def fingerprint(self) -> str:
        """sha256 of size and pixels in order: the same for the same images in any container. A set
        whose pixels are dear to read takes something else that tells its content from another."""
        if self.file is None or self.hashes.any():  # what was noted is not kept: it may be old
            return self._hash_pixels().hex()
        kept = digests([self.file], "pixels", lambda _, tell: self._hash_pixels(tell))
        return kept[0].hex()

    def _hash_pixels(self, tell: Callable[[int], None] = lambda num_bytes: None) -> bytes:
        """The fingerprint; reads the images that were not noted, and calls `tell` after each part
        with its number of bytes."""
        for start in range(0, len(self), HASH_BLOCK):
            hashes = self.hashes[start : start + HASH_BLOCK]
            if not hashes.any(1).all():
                block = self.read(start, start + len(hashes))
                self.note(start, block)
                tell(block.nbytes)
        return bytes.fromhex(join_hashes(self.size, self.hashes.tobytes()))


def open_array_file(path: Path) -> ImageSet:
    """Open an .npz or .npy; anything wrong with the file is a `UserError`."""
    if path.suffix == ".npy":
        require_kind(path, NPY)
        with readable(path):
            return ArrayImages(np.load(path, "r", allow_pickle=False), str(path), "npy", path)
    if "arr_0" not in (members := npz_members(path)):
        raise UserError(f"{path} holds {', '.join(sorted(members)) or 'nothing'}, but no images: "
                        "expected the array arr_0, uint8 (N, H, W, 3)")  # fmt: skip
    with readable(path), zipfile.ZipFile(path) as archive:
        info, shape, fortran, dtype, header = _member(path, archive, "arr_0")
        if fortran and len(shape) > 1:
            raise UserError(f"{path}: arr_0 is in Fortran order, expected C order; save it again")
        check_layout(str(path), shape, dtype, channels=-1)
        if info.compress_type != zipfile.ZIP_STORED:
            return StreamImages(path, shape, header)
        return ArrayImages(_map_member(path, info, shape, header), str(path), "npz", path)


def npz_members(path: Path) -> set[str]:
    """Names of the arrays in an .npz, from its directory alone; a file that is none, or damaged, is
    a `UserError`."""
    require_kind(path, NPZ)
    with readable(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_array(
    path: Path, name: str, shape: tuple[int | None, ...], kinds: str = "biufc"
) -> np.ndarray:
    """An array of this shape in an .npz, None standing for any length, of one of NumPy's `kinds` of
    numbers; `UserError` if it is another one, which its header shows before memory is taken."""
    with readable(path), zipfile.ZipFile(path) as archive:
        _, found, _, dtype, _ = _member(path, archive, name)
        same = len(found) == len(shape) and all(w in (None, n) for w, n in zip(shape, found))
        if not same or dtype.kind not in kinds:
            wanted = str(shape).replace("None", "any")
            raise UserError(f"{path}: {name} has shape {found} and dtype {dtype}, expected "
                            f"{wanted} and numbers; give another file")  # fmt: skip
        with archive.open(f"{name}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def _member(
    path: Path, archive: zipfile.ZipFile, name: str
) -> tuple[zipfile.ZipInfo, tuple[int, ...], bool, np.dtype, int]:
    """Entry, shape, whether it is in Fortran order, dtype and length of the header of an array in
    an .npz; `UserError` if the entry is not as long as the header says, or longer than the file can
    be."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype, header = _npy_header(stream)
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which are never unpickled: expected "
                        "numbers")  # fmt: skip
    if min(shape, default=0) < 0 or info.file_size != header + math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: {name} is damaged or cut short ({info.file_size} bytes for "
                        f"{shape} {dtype}); make the file again")  # fmt: skip
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO
    if info.file_size > ratio * path.stat().st_size:
        raise UserError(f"{path}: {name} of {info.file_size} bytes cannot be in a file of "
                        f"{path.stat().st_size}; make it again")  # fmt: skip
    return info, shape, fortran, dtype, header


def _npy_header(stream) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype and length of the header of an .npy stream."""
    npy = np.lib.format
    first = npy.read_magic(stream) == (1, 0)
    read_header = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    return shape, fortran, dtype, stream.tell()


def _map_member(path: Path, info: zipfile.ZipInfo, shape: tuple, header: int) -> np.ndarray:
    """Memory-map a stored member: its bytes follow the local header (30 bytes + name + extra)."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
    offset = info.header_offset + 30 + name_length + extra_length + header
    return np.memmap(path, np.uint8, "r", offset, shape)


def check_layout(name: str, shape: tuple[int, ...], dtype: np.dtype, channels: int) -> None:
    """uint8, four axes of 1 or more, three channels on axis `channels`; else a `UserError`."""
    if dtype != np.uint8:
        raise UserError(f"{name}: {dtype} images, expected uint8 in 0..255; convert them "
                        "once, by a stated rule (round), and save again")  # fmt: skip
    if len(shape) != 4 or shape[channels] != 3 or min(shape) < 1:
        layout = "(N, H, W, 3)" if channels == -1 else "(N, 3, H, W)"
        raise UserError(f"{name}: shape {shape}, expected {layout}: RGB images; convert it")


class ArrayImages(ImageSet):
    """An array in memory or a memory map, (N, H, W, 3) uint8."""

    def __init__(self, array: np.ndarray, name: str, kind: str, file: Path | None = None):
        check_layout(name, array.shape, array.dtype, channels=-1)
        self.file = file
        self.array, self.name, self.kind, self.size = array, name, kind, array.shape[1:3]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]


class StreamImages(ImageSet):
    """arr_0 of a compressed .npz: decompressed block by block, going back starts again."""

    kind = "npz (compressed)"
    parallel = False
    file: Path

    def __init__(self, path: Path, shape: tuple[int, ...], header: int):
        self.file, self.name, self.shape, self.header = path, str(path), shape, header
        self.size, self._stream = (shape[1], shape[2]), None

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        image = math.prod(self.shape[1:])
        with readable(self.file):
            if self._stream is None:
                self._stream = zipfile.ZipFile(self.file).open("arr_0.npy")  # noqa: SIM115
            self._stream.seek(self.header + start * image)
            data = self._stream.read((stop - start) * image)
            return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])
