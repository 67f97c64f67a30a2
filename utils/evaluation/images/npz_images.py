"""What a set of images offers (`ImageSet`), and the sets in .npz, .npy and arrays.

What the ADM suite reads: an .npz with `arr_0`, uint8 (N, H, W, 3); 50,000 images of 256x256 are
9.2 GiB: arrays are memory-mapped where stored, streamed where compressed, never loaded as a whole.
"""

import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from models.errors import UserError, what_is
from utils.data.base import hash_images

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

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop - 1: (n, H, W, 3) uint8."""

    def fingerprint(self) -> str:
        """sha256 of size and pixels in order: the same for the same images in any container. A set
        whose pixels are dear to read takes something else that tells its content from another."""
        starts, total = range(0, len(self), HASH_BLOCK), len(self)
        blocks = (self.read(start, min(start + HASH_BLOCK, total)) for start in starts)
        return hash_images(self.size, blocks)


def open_array_file(path: Path) -> ImageSet:
    """Open an .npz or .npy; anything wrong with the file is a `UserError`."""
    if path.suffix == ".npy":
        require_kind(path, NPY)
        with readable(path):
            return ArrayImages(np.load(path, "r", allow_pickle=False), str(path), "npy")
    if "arr_0" not in (members := npz_members(path)):
        raise UserError(f"{path} holds {', '.join(sorted(members)) or 'nothing'}, but no images: "
                        "expected the array arr_0, uint8 (N, H, W, 3)")  # fmt: skip
    with readable(path), zipfile.ZipFile(path) as archive:
        info, shape, dtype, header = _member(path, archive, "arr_0")
        check_layout(str(path), shape, dtype, channels=-1)
        if info.compress_type != zipfile.ZIP_STORED:
            return StreamImages(path, shape, header)
        return ArrayImages(_map_member(path, info, shape, header), str(path), "npz")


def npz_members(path: Path) -> set[str]:
    """Names of the arrays in an .npz, from its directory alone; a file that is none, or damaged, is
    a `UserError`."""
    require_kind(path, NPZ)
    with readable(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_array(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of numbers of this shape in an .npz; `UserError` if it is another one, which is seen
    from its header, before memory is taken."""
    with readable(path), zipfile.ZipFile(path) as archive:
        _, found, dtype, _ = _member(path, archive, name)
        if found != shape or dtype.kind not in "fiu":
            raise UserError(f"{path}: {name} has shape {found} and dtype {dtype}, expected {shape} "
                            "and numbers; give another file")  # fmt: skip
        with archive.open(f"{name}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def _member(
    path: Path, archive: zipfile.ZipFile, name: str
) -> tuple[zipfile.ZipInfo, tuple[int, ...], np.dtype, int]:
    """Entry, shape, dtype and length of the header of an array in an .npz; `UserError` if the entry
    is not as long as the header says, or longer than the file can be."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        shape, dtype, header = _npy_header(stream)
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
    return info, shape, dtype, header


def _npy_header(stream) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and length of the header of an .npy stream."""
    npy = np.lib.format
    first = npy.read_magic(stream) == (1, 0)
    read_header = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if fortran and len(shape) > 1:
        raise ValueError("it is in Fortran order, expected C order")
    return shape, dtype, stream.tell()


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

    def __init__(self, array: np.ndarray, name: str, kind: str):
        check_layout(name, array.shape, array.dtype, channels=-1)
        self.array, self.name, self.kind, self.size = array, name, kind, array.shape[1:3]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]


class StreamImages(ImageSet):
    """arr_0 of a compressed .npz: decompressed block by block, going back starts again."""

    kind = "npz (compressed)"

    def __init__(self, path: Path, shape: tuple[int, ...], header: int):
        self.path, self.name, self.shape, self.header = path, str(path), shape, header
        self.size, self._stream = (shape[1], shape[2]), None

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        image = math.prod(self.shape[1:])
        with readable(self.path):
            if self._stream is None:
                self._stream = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115
            self._stream.seek(self.header + start * image)
            data = self._stream.read((stop - start) * image)
            return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])
