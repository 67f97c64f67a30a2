"""Images in .npz, .npy and arrays: memory-mapped where stored, streamed where compressed.

What the ADM suite reads: an .npz with `arr_0`, uint8 (N, H, W, 3); 50,000 images of 256x256 are
9.2 GiB, so nothing here loads an array as a whole.
"""

import hashlib
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from models.errors import UserError

HASH_BLOCK = 64  # images hashed at a time
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


class readable:
    """Turns whatever a broken file makes numpy, zipfile or zlib raise into one `UserError`."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, UNREADABLE) and not isinstance(error, UserError):
            raise UserError(
                f"{self.path} is truncated or damaged ({type(error).__name__}: {error}); copy or "
                "make it again"
            ) from error


def open_array_file(path: Path) -> "ArrayImages | StreamImages":
    """Open an .npz or .npy; anything wrong with the file is a `UserError`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if path.suffix == ".npz":
        return _open_npz(path)
    with readable(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    return ArrayImages(array, str(path), "npy")


def npz_members(path: Path) -> set[str]:
    """Names of the arrays in an .npz, from its directory alone; a damaged file is a `UserError`."""
    with readable(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _open_npz(path: Path) -> "ArrayImages | StreamImages":
    members = npz_members(path)
    if "arr_0" not in members:
        raise UserError(f"{path} holds {', '.join(sorted(members)) or 'nothing'}, but no images: "
                        "expected the array arr_0, uint8 (N, H, W, 3)")  # fmt: skip
    with readable(path), zipfile.ZipFile(path) as archive:
        info = archive.getinfo("arr_0.npy")
        with archive.open(info) as stream:
            shape, dtype, header = _npy_header(stream)
        check_array(str(path), np.empty((0, *shape[1:]), dtype), channels=-1)
        if info.file_size != header + math.prod(shape):
            raise UserError(f"{path}: arr_0 is cut short ({info.file_size} bytes for {shape}); "
                            "make the file again")  # fmt: skip
        if info.compress_type != zipfile.ZIP_STORED:
            return StreamImages(path, shape, header)
        return ArrayImages(_map_member(path, info, shape, header), str(path), "npz")


def _npy_header(stream) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and length of the header of an .npy stream."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
    shape, fortran, dtype = (read or np.lib.format.read_array_header_2_0)(stream)
    if fortran and len(shape) > 1:
        raise ValueError("arr_0 is in Fortran order, expected C order")
    return shape, dtype, stream.tell()


def _map_member(path: Path, info: zipfile.ZipInfo, shape: tuple, header: int) -> np.ndarray:
    """Memory-map a stored member: its bytes follow the local header (30 bytes + name + extra)."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
    offset = info.header_offset + 30 + name_length + extra_length + header
    return np.memmap(path, np.uint8, "r", offset, shape)


def check_array(name: str, array: np.ndarray, channels: int) -> None:
    """uint8, four axes, three channels on axis `channels`; else a `UserError`."""
    layout = "(N, H, W, 3)" if channels == -1 else "(N, 3, H, W)"
    if array.dtype != np.uint8:
        raise UserError(
            f"{name}: {array.dtype} images, expected uint8 in 0..255; convert them once, by a "
            "stated rule (round), and save again"
        )
    if array.ndim != 4 or array.shape[channels] != 3:
        raise UserError(f"{name}: shape {array.shape}, expected {layout}: RGB images; convert it")


class ArrayImages:
    """An array in memory or a memory map, (N, H, W, 3) uint8."""

    def __init__(self, array: np.ndarray, name: str, kind: str):
        check_array(name, array, channels=-1)
        self.array, self.name, self.kind = array, name, kind
        self.size = array.shape[1:3]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]

    def fingerprint(self) -> str:
        return hash_pixels(self)


class StreamImages:
    """arr_0 of a compressed .npz: decompressed block by block, going back starts again."""

    kind = "npz (compressed)"

    def __init__(self, path: Path, shape: tuple[int, ...], header: int):
        self.path, self.name, self.shape, self.header = path, str(path), shape, header
        self.size = shape[1:3]
        self._stream = None

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

    def fingerprint(self) -> str:
        return hash_pixels(self)


def hash_pixels(images) -> str:
    """sha256 of size and pixels in order: the same for the same images in any container."""
    digest = hashlib.sha256(f"{images.size[0]}x{images.size[1]}".encode())
    for start in range(0, len(images), HASH_BLOCK):
        block = images.read(start, min(start + HASH_BLOCK, len(images)))
        digest.update(np.ascontiguousarray(block))
    return digest.hexdigest()
