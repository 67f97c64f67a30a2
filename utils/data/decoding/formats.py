"""Formats of pictures: what Pillow reads here, and the endings of their names. Imports no torch.

Of Pillow's other formats, some start a program (EPS starts Ghostscript), and many are read by code
that few have tested.
"""

import warnings
from collections.abc import Iterable
from functools import cache

from models.checks.file_kinds import what_begins_with

# Pillow's name of a format: endings of names
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
}
IMAGE_EXTENSIONS = tuple(ending for endings in FORMATS.values() for ending in endings)
# what may be missing in an older Pillow, or in one built without it
FEATURES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
# files of these formats hold other pixels than were saved into them
LOSSY = tuple(e for name in ("JPEG", "WEBP", "AVIF", "JPEG2000") for e in FORMATS[name])
# pictures that are not read: their users are told what to do
UNREAD_EXTENSIONS = (
    *(".heic", ".heif", ".jxl", ".tga", ".psd", ".svg", ".ico", ".exr", ".hdr", ".pfm", ".eps"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".dcm", ".jpx", ".jpf", ".dds"),
)

UNREAD_IMAGES = ("HEIC", "JPEG XL", "Photoshop")  # in the words of `what_begins_with`


@cache
def missing_formats() -> tuple[str, ...]:
    """The formats of `FORMATS` that the Pillow of this machine does not read."""
    from PIL import features  # loads the libraries that it asks for

    with warnings.catch_warnings(action="ignore"):  # of features that it has never heard of
        return tuple(name for name, feature in FEATURES.items() if not features.check(feature))


@cache
def read_formats() -> tuple[str, ...]:
    """The formats that are read, whatever a file's name ends in."""
    return tuple(name for name in FORMATS if name not in missing_formats())


@cache
def is_read(ending: str) -> bool:
    """Whether files whose names have this ending, e.g. ".png", are pictures that are read."""
    name = _format_of(ending)
    return name is not None and (name not in FEATURES or name not in missing_formats())


def why_missing(endings: Iterable[str]) -> str:
    """What to do where files with these endings are not read because of this machine's Pillow; ""
    if it is not that."""
    names = {_format_of(ending) for ending in endings if not is_read(ending)} - {None}
    if not names:
        return ""
    import PIL

    what = " or ".join(sorted(map(str, names)))
    return f"Pillow {PIL.__version__} here reads no {what}: run pip install --upgrade pillow"


def why_unidentified(head: bytes) -> str:
    """Why Pillow makes nothing of a file that begins with `head`, 1 KiB of it."""
    what = what_begins_with(head)
    if "image" not in what:
        known = "of no known kind" not in what
        return f"not an image, but {what}" if known else (
            f"not an image of a known kind ({', '.join(read_formats())})")  # fmt: skip
    if "AVIF" in what and (missing := why_missing([".avif"])):
        return f"{what}; {missing}"
    if any(name in what for name in UNREAD_IMAGES):
        return f"{what}, which is not read: convert it to PNG"
    return f"{what}, damaged or of a kind that Pillow does not read"


def _format_of(ending: str) -> str | None:
    return next((name for name, endings in FORMATS.items() if ending in endings), None)
