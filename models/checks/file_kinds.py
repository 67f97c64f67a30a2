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
INDEX = "an index of weights in several files"
PICKLES = (PYTORCH, OLD_PYTORCH, PICKLE)
WEIGHT_FILES = (SAFETENSORS, INDEX, *PICKLES)
# how names of weight files end, where one is looked for in a folder; content tells what it is
WEIGHT_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
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
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"II+\0": "a TIFF image",
    b"MM\0+": "a TIFF image",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"8BPS": "a Photoshop image",
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
    b"GGUF": "a GGUF file",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    **{bytes([0x80, protocol]): PICKLE for protocol in range(2, 6)},
}
# a file in the folder of a checkpoint that many ranks have written => what it is, and what to do
SHARDED = {
    ".metadata": "torch's distributed checkpoint, in parts: make one file of it with `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE`",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed in parts: make one file of it with its own "
    "zero_to_fp32.py",
}
# the brand of an ISO media file => what it is
BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image"}
BRANDS |= dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"), "a HEIC image")
# what the first KiB of a zip archive names => what it is
ZIPPED = {
    b"data.pkl": PYTORCH,
    b".npy": "a NumPy archive (.npz)",
    b"model.weights.h5": "a Keras file",
}


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
            return what_begins_with(file.read(1024))
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if os.path.islink(path) else "absent"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"unreadable ({getattr(error, 'strerror', None) or error})"


def advice_on_shards(folder: str | os.PathLike) -> str:
    """What the folder of a training checkpoint in parts is, and how to make one file of it, as
    words that follow "it is"; "" for any other folder."""
    found = (what for name, what in SHARDED.items() if os.path.isfile(os.path.join(folder, name)))
    return next(found, "")


def what_begins_with(head: bytes) -> str:
    """What a file is whose first KiB is `head`, in the words of `what_is`."""
    if not head:
        return "an empty file"
    if head.startswith(b"PK"):
        zipped = "an empty zip archive" if head.startswith(b"PK\x05\x06") else "a zip archive"
        return next((words for mark, words in ZIPPED.items() if mark in head), zipped)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return SAFETENSORS
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "a video or another ISO media file")
    found = next((words for mark, words in BEGINNINGS.items() if head.startswith(mark)), None)
    return found or _kind_of_text(head) or _kind_of_binary(head)


def _kind_of_binary(head: bytes) -> str:
    # both begin with a number for what follows, and have no mark of their own
    if head[0] == 8 and any(maker in head[:64] for maker in (b"pytorch", b"onnx", b"tf2onnx")):
        return "an ONNX file"
    # a map of few entries, the first of which has a short text as its key
    if 0x81 <= head[0] <= 0x8F and 0xA1 <= head[1] <= 0xBF and head[2 : head[1] - 158].isalnum():
        return "a MessagePack file, as Flax writes"
    return "a binary file of no known kind"


def _kind_of_text(head: bytes) -> str:
    """What a text is whose first KiB is `head`; "" if it is none."""
    try:  # the last character may be cut
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip()
    except UnicodeDecodeError:
        return ""
    if any(char in text for char in "\0\b"):
        return ""
    if text.lower().startswith(("<!doctype html", "<html")):
        return "an HTML page"
    if text.startswith("{") and '"weight_map"' in text:
        return INDEX
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
