"""Image files inside other files: where each lies, how it is read there, and what tells it."""

import hashlib
import io
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from models.checks.errors import UserError, printable
from utils.data.base import EncodedSource, Names, hash_lines
from utils.data.content import digests
from utils.data.images import UnreadableImageError
from utils.data.listing import LABELS, Listing

LARGEST = 2**29  # bytes of one encoded image
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
PLAIN, STORED, DEFLATED = -1, 0, 8  # a member without a header before it; methods of zip
ZIP_HEADER = 30  # bytes before the name in the header of a zip's member


class Member(NamedTuple):
    """Where the bytes of a file lie in an archive."""

    file: int  # number of the archive
    start: int  # of the bytes; of the header of a member of a zip
    stored: int  # bytes in the archive
    size: int  # bytes of the file
    method: int = PLAIN
    crc: int = 0  # of the file's bytes; where `method` is PLAIN, there is none


class MembersSource(EncodedSource):
    """A source of images that are members of archives, by their places in them. An archive is
    opened for each image alone: nothing is shared by processes."""

    path_may_be_file = True

    def _set_members(
        self, archives: Sequence[Path], names: Sequence[str], members: Mapping[str, Member]
    ) -> None:
        """`names`: the keys of the images, in their order."""
        self._archives, self._names = list(archives), Names(names)
        self._places = np.array([members[name] for name in names], dtype=np.int64).reshape(-1, 6)

    def _member(self, i: int) -> Member:
        return Member(*self._places[i].tolist())

    def encoded(self, i: int) -> BinaryIO:
        member = self._member(i)
        with open(self._archives[member.file], "rb") as file:
            return io.BytesIO(read_member(file, member, self.where(i)))

    def where(self, i: int) -> str:
        return f"{printable(self._names[i])} in {self._archives[self._places[i, 0]]}"

    def key(self, i: int) -> str:
        """The path in the archive; behind the archive's name, where there are several."""
        return self._names[i]

    def files(self) -> list[Path]:
        """The archives."""
        return self._archives

    def hash_files(self) -> list[str]:
        """sha256 of each image's file, so that an archive and its unpacked folder are the same."""
        order = np.lexsort((self._places[:, 1], self._places[:, 0]))
        numbers = np.arange(1, len(self._archives))
        in_archive = np.split(order, np.searchsorted(self._places[order, 0], numbers))
        by_path = {str(path): rows for path, rows in zip(self._archives, in_archive)}

        def compute(path: str, tell: Callable[[int], None]) -> bytes:
            found = []
            with open(path, "rb") as file:
                for i in by_path[path].tolist():
                    member = self._member(i)
                    try:
                        data = read_member(file, member, self.where(i))
                    except UnreadableImageError:
                        data = b"unreadable"
                    found.append(hashlib.sha256(data).digest())
                    tell(member.stored)
            return b"".join(found)

        # what is kept of an archive must depend on its bytes and on these words
        members = hash_lines(map(str, self._places.ravel().tolist()))
        hashes = digests(self._archives, f"members {members}", compute)
        result = [""] * len(self)
        for rows, data in zip(in_archive, hashes):
            for n, i in enumerate(rows.tolist()):
                result[i] = data[32 * n : 32 * n + 32].hex()
        return result


def read_member(file: BinaryIO, member: Member, where: str) -> bytes:
    """The bytes of a member of an opened archive; `UnreadableImageError` if they are damaged."""
    if member.size > LARGEST:
        raise _damaged(where, f"{member.size:,} bytes, expected at most {LARGEST:,}")
    file.seek(member.start)
    if member.method != PLAIN:
        header = file.read(ZIP_HEADER)
        if len(header) < ZIP_HEADER or not header.startswith(b"PK\3\4"):
            raise _damaged(where, "damaged: no header of a zip's member")
        file.seek(int.from_bytes(header[26:28], "little"), 1)
        file.seek(int.from_bytes(header[28:30], "little"), 1)
    data = file.read(min(member.stored, LARGEST))
    if member.method == DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        except zlib.error as error:
            raise _damaged(where, f"damaged: {error}") from None
    if len(data) != member.size:
        raise _damaged(where, f"damaged: {len(data)} bytes, expected {member.size}")
    if member.method != PLAIN and zlib.crc32(data) != member.crc:
        raise _damaged(where, "damaged: its checksum does not fit")
    return data


def _damaged(where: str, reason: str) -> UnreadableImageError:
    return UnreadableImageError(f"cannot read {where}: {reason}; make the archive again", reason)


def require_no_archives(listing: Listing) -> None:
    """`UserError` where an archive holds archives in the place of images."""
    inner = [path for kind, path in listing.ignored if kind in ARCHIVES]
    if inner and not len(listing):
        text = f"{listing.root} holds archives ({printable(min(inner))}) and no images"
        raise UserError(f"{text}; unpack it, and give what it holds")


def common_folder(listing: Listing, names: Collection[str]) -> str:
    """The folder of an archive in which all class folders lie: "x/" where all images lie in folders
    of x; "" for the root. Labels above the images end that."""
    filled = [top for top, images in listing.per_class.items() if images]
    if listing.flat or len(filled) != 1:
        return ""
    images, above = listing.per_class[filled[0]], ""
    while f"{above}{LABELS}" not in names:
        tops = {name.removeprefix(above).partition("/")[::2] for name in images}
        if len({top for top, _ in tops}) > 1 or any("/" not in rest for _, rest in tops):
            break
        above += f"{next(iter(tops))[0]}/"
    return above


def below(above: str, name: str) -> str:
    """A name in an archive as seen from the folder `above`; of what lies outside, the last part."""
    return name.removeprefix(above) if name.startswith(above) else name.rpartition("/")[2]
