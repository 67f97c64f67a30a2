"""What a file is, told by its first bytes, in words for messages; JSON files."""

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

from models.checks.errors import UserError

SAFETENSORS, PYTORCH, OLD_PYTORCH = (
    "a safetensors file", "a PyTorch file", "a PyTorch file of the format before 1.6"
)  # fmt: skip
PICKLE = "a Python pickle"
PICKLES = (PYTORCH, OLD_PYTORCH, PICKLE)
# a path of these is not a regular file, and is never opened
PLACES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# first bytes => what such a file is
BEGINNINGS = {
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.": OLD_PYTORCH,
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or a RIFF file",
    b"%!PS": "a PostScript file",
    b"\xc5\xd0\xd3\xc6": "a PostScript file",
    b"%PDF": "a PDF file",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x7fELF": "a program",
    b"version https://git-lfs": "a pointer of Git LFS (run `git lfs pull`)",
    **{bytes([0x80, protocol]): PICKLE for protocol in range(2, 6)},
}
# what the first KiB of a zip archive names => what it is
ZIPPED = {b"data.pkl": PYTORCH, b".npy": "a NumPy archive (.npz)"}


def what_is(path: str | os.PathLike) -> str:
    """What stands at `path`, as words that follow "it is": "absent", "a folder", "a FIFO", "an
    empty file", "a zip archive", "a text file", ...

    Reads at most the first KiB, and opens regular files alone: it never waits, nor raises.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:
            return PLACES.get(kind, "something that is no file")
        with open(path, "rb") as file:
            return _what_begins_with(file.read(1024))
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if os.path.islink(path) else "absent"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"unreadable ({getattr(error, 'strerror', None) or error})"


def _what_begins_with(head: bytes) -> str:
    """What a file is whose first KiB is `head`."""
    if not head:
        return "an empty file"
    if head.startswith(b"PK"):
        zipped = "an empty zip archive" if head.startswith(b"PK\x05\x06") else "a zip archive"
        return next((words for mark, words in ZIPPED.items() if mark in head), zipped)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return SAFETENSORS
    if head[257:262] == b"ustar":
        return "a tar archive"
    found = next((words for mark, words in BEGINNINGS.items() if head.startswith(mark)), None)
    return found or _kind_of_text(head)


def _kind_of_text(head: bytes) -> str:
    try:  # the last character may be cut
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip()
    except UnicodeDecodeError:
        return "a binary file of no known kind"
    if "\0" in text:
        return "a binary file of no known kind"
    if text.lower().startswith(("<!doctype html", "<html")):
        return "an HTML page"
    return "a JSON file" if text.startswith(("{", "[")) else "a text file"


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file; one that is absent, unreadable or no JSON is a `UserError` ending
    in `remedy`."""
    if not os.path.isfile(path):
        kind = what_is(path)
        why = "not found" if kind == "absent" else f"is {kind}, expected a JSON file"
        raise UserError(f"{path} {why}; {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:  # no right to read it, a disk that fails
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        why = f"it is {what_is(path)}: {error}"
        raise UserError(f"{path} is no valid JSON ({why}); {remedy}") from None
