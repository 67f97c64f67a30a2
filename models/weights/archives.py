"""PyTorch's files: the zip archive of today, which TorchScript has too, and the format before 1.6.

Both hold a pickle and, beside it, the bytes of the tensors. These are mapped from the file, so what
is not used is never read; only numbers that begin at an odd place, as in old files, are copied.
"""

import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from torch import UntypedStorage

from models.weights.objects import Damaged, Placeholder
from models.weights.pickles import read_pickle
from models.weights.tensors import BUILD, StorageId, Stored, storage_id

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the format before 1.6
LONGEST_PICKLE = 2**28  # bytes; that of a checkpoint has less than a thousandth of it
ALIGNED = 16  # numbers in memory begin at multiples; in PyTorch's zip archives at those of 64
LOCAL_HEADER = 30  # bytes before the name of a member of a zip archive
CUT = "it is cut short: numbers of a tensor are missing"


class FileBytes:
    """A file, mapped, whose parts become storages."""

    def __init__(self, path: Path):
        self.size = path.stat().st_size
        self.bytes = UntypedStorage.from_file(str(path), False, self.size)
        self.found: dict[tuple, Stored] = {}
        self.copied = 0

    def stored(self, wanted: StorageId, start: int, held: int, swap: bool = False) -> Stored:
        """The storage `wanted` of the `held` bytes from `start` on; one object for all who ask.
        `swap`: its numbers are written in the other order of bytes."""
        first = wanted.start * wanted.dtype.itemsize
        if first + wanted.nbytes > held or start + held > self.size:
            raise Damaged(CUT)
        place = (start + first, wanted.nbytes, wanted.dtype)
        if place not in self.found:
            numbers: Any = self.bytes[start + first : start + first + wanted.nbytes]
            if swap or place[0] % ALIGNED:
                self.copied += wanted.nbytes
                if self.copied > self.size:
                    raise Damaged("its tensors are larger than the file")
                numbers = numbers.clone()
            if swap:
                numbers.byteswap(wanted.dtype)
            self.found[place] = Stored(numbers, wanted.dtype)
        return self.found[place]


def read_zip(path: Path) -> Any:
    """What a zip archive of PyTorch holds; `Damaged`, or any other error, if it is none."""
    content = FileBytes(path)
    with path.open("rb") as file:
        members = _members(file)
        roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Damaged("it has no data.pkl, as PyTorch's archives have")
        order = members.get(f"{roots[0]}/byteorder")
        written = _content(file, order).decode() if order else sys.byteorder

        def load(given: Any) -> Stored | Placeholder:
            wanted = storage_id(given)
            if isinstance(wanted, Placeholder):
                return wanted
            member = members.get(f"{roots[0]}/data/{wanted.key}")
            if member is None:
                raise Damaged(CUT)
            start = _begin(file, member)
            return content.stored(wanted, start, member.file_size, written != sys.byteorder)

        pickled = _content(file, members[f"{roots[0]}/data.pkl"])
        return read_pickle(BytesIO(pickled), BUILD, load)


def _members(file: IO[bytes]) -> dict[str, zipfile.ZipInfo]:
    """The directory of a zip archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except zipfile.BadZipFile:
        raise Damaged("it is cut short or damaged: the end of its archive is missing") from None
    members = {member.filename: member for member in listed}
    if len(members) < len(listed):
        raise Damaged("its archive holds two files of one name")
    return members


def _content(file: IO[bytes], member: zipfile.ZipInfo) -> bytes:
    """A small member; not read by zipfile, whose check sums PyTorch can be told to leave out."""
    file.seek(_begin(file, member))
    if member.file_size > LONGEST_PICKLE:
        raise Damaged(f"its pickle has more than {LONGEST_PICKLE:,} bytes")
    return file.read(member.file_size)


def _begin(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Where in the file the bytes of a member begin, which stand there as they are."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise Damaged("its archive is compressed or encrypted, which PyTorch's never are")
    file.seek(member.header_offset)
    header = file.read(LOCAL_HEADER)
    if header[:4] != b"PK\3\4" or len(header) < LOCAL_HEADER:
        raise Damaged("its archive is damaged")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return member.header_offset + LOCAL_HEADER + name + extra


def read_old(path: Path) -> Any:
    """What a file of the format before 1.6 holds: pickles of a magic number, a version, facts of
    the machine, the object, and the keys of its storages; then these, each after its size."""
    content = FileBytes(path)
    with path.open("rb") as file:
        if read_pickle(file, {}, _refuse) != MAGIC:
            raise Damaged("PyTorch did not write it; load it where it is trusted, and save it with "
                          "torch.save")  # fmt: skip
        for _ in range(2):
            read_pickle(file, {}, _refuse)
        begin, types = file.tell(), {}
        read_pickle(file, {}, _note(types))  # where a storage lies is only said after it
        places = _places(file, types, content.size)
        file.seek(begin)

        def load(given: Any) -> Stored | Placeholder:
            wanted = storage_id(given)
            if isinstance(wanted, Placeholder):
                return wanted
            return content.stored(wanted, *places[wanted.key])

        return read_pickle(file, BUILD, load)


def _refuse(given: Any) -> Any:
    raise Damaged("PyTorch did not write it")


def _note(types: dict[str, int]) -> Callable[[Any], Any]:
    """A function for persistent ids that notes the bytes of a number of each storage."""

    def note(given: Any) -> Any:
        wanted = storage_id(given)
        if isinstance(wanted, StorageId):
            types[wanted.key] = wanted.dtype.itemsize
        return wanted

    return note


def _places(file: IO[bytes], types: dict[str, int], size: int) -> dict[str, tuple[int, int]]:
    """Of each storage its first byte and its number of bytes."""
    keys, places = read_pickle(file, {}, _refuse), {}
    for key in keys:
        begin = file.tell() + 8
        held = int.from_bytes(file.read(8), "little") * types[key]
        if begin + held > size:
            raise Damaged(CUT)
        places[key] = (begin, held)
        file.seek(begin + held)
    return places
